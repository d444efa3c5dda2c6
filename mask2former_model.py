"""Mask2Former of transformers, built from a preset, a hub name, or on another encoder; what it answers is in `answers`.

The encoder is a Swin as published, or with the option `encoder` any Vision Transformer of timm (`vit_encoders`) or any
convolutional encoder of segmentation-models-pytorch (`cnn_encoders`) behind the same decoder.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.utils import logging as transformers_logging

import cnn_encoders
import model_sites
import vit_encoders
import vit_weights
from model_spec import ModelSpec, refuse_options, refuse_unknown_options
from utils import InputError, closest
from weights import UNUSED_NORM, from_hub, load_pretrained_file

_SWIN_STAGES = ["stage1", "stage2", "stage3", "stage4"]
MASK2FORMER_PRESETS = {
    "smoke": {
        "swin": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4},
        "hidden_dim": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_queries": 5,
        "num_attention_heads": 4,
        "train_num_points": 256,
    },
    "demo": {
        "swin": {"embed_dim": 48, "depths": [1, 1, 2, 1], "num_heads": [2, 4, 8, 16], "window_size": 4},
        "hidden_dim": 64,
        "encoder_layers": 2,
        "decoder_layers": 4,
        "num_queries": 10,
        "num_attention_heads": 4,
        "train_num_points": 1024,
    },
    "swin_tiny": {"swin": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}},
    "isic2018": {"hub": "facebook/mask2former-swin-base-IN21k-ade-semantic"},
}
# The architecture behind the hub names we know, so that `weights: none` needs no network.
_KNOWN_HUB_CONFIGS = {
    "facebook/mask2former-swin-base-IN21k-ade-semantic": {
        "swin": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12}
    },
}
LABELS = {0: "background", 1: "lesion"}


def build_mask2former(spec: ModelSpec) -> nn.Module:
    """Mask2Former for the spec's labels; its encoder's weights where the spec names some."""
    options = MASK2FORMER_PRESETS.get(spec.preset, {"hub": spec.preset}) | spec.options
    if "encoder" in options:
        return _on_encoder(spec, options)
    source = options.get("hub")
    if (
        source is not None
        and spec.preset not in MASK2FORMER_PRESETS
        and "/" not in source
        and not Path(source).is_dir()
    ):
        raise InputError(
            f"unknown mask2former preset {spec.preset!r}; closest: {closest(spec.preset, MASK2FORMER_PRESETS)}; "
            "a hub name has the form 'owner/name', a local one is a folder"
        )
    if source is not None and spec.weights == "imagenet":
        refuse_options(spec)
        return _mask2former_from_hub(source, labels_of(spec))
    if spec.weights == "imagenet":
        raise InputError(
            f"mask2former preset {spec.preset!r} has no pretrained weights; use 'none', a file, or a hub name"
        )
    if Path(spec.weights).is_dir():
        refuse_options(spec)
        return _mask2former_from_hub(spec.weights, labels_of(spec))
    model = Mask2FormerForUniversalSegmentation(_config(options, labels_of(spec)))
    if spec.weights != "none":
        load_pretrained_file(model, model_sites.encoder_of(model), Path(spec.weights))
    return model


def labels_of(spec: ModelSpec) -> dict[int, str]:
    """Index -> name of the labels that queries are classified into, 'no object' left out."""
    return LABELS if spec.classes == 1 else {index: f"class {index}" for index in range(spec.classes)}


def _config(options: dict, labels: dict[int, str]) -> Mask2FormerConfig:
    options = dict(options)
    if "hub" in options:
        hub = options.pop("hub")
        if hub not in _KNOWN_HUB_CONFIGS:
            if options:
                raise InputError(f"options {options} cannot change the model {hub!r}; leave them out")
            config = from_hub(Mask2FormerConfig.from_pretrained, hub)
            config.num_labels = len(labels)
            return config
        options = _KNOWN_HUB_CONFIGS[hub] | options
    return _decoder_config(SwinConfig(out_features=_SWIN_STAGES, **options.pop("swin")), options, labels)


def _decoder_config(encoder, options: dict, labels: dict[int, str]) -> Mask2FormerConfig:
    """The configuration of an encoder and what follows it."""
    if "hidden_dim" in options:  # one width for the whole decoder, and feed-forwards of twice that
        width = options["hidden_dim"]
        options = {
            "feature_size": width,
            "mask_feature_size": width,
            "dim_feedforward": 2 * width,
            "encoder_feedforward_dim": 2 * width,
        } | options
    refuse_unknown_options(options, set(Mask2FormerConfig().to_dict()) | {"num_labels", "encoder"})
    return Mask2FormerConfig(
        backbone_config=encoder, id2label=labels, label2id={name: index for index, name in labels.items()}, **options
    )


# ----------------------------------------------------------------------------------------------- on another encoder


def _on_encoder(spec: ModelSpec, options: dict) -> nn.Module:
    """The preset's decoder behind the encoder that `options['encoder']` names; see `_encoder_config`."""
    rest = {key: value for key, value in options.items() if key not in ("encoder", "swin", "hub")}
    encoder = _encoder_config(options["encoder"], rest.get("hidden_dim", Mask2FormerConfig().hidden_dim))
    model = Mask2FormerForUniversalSegmentation(_decoder_config(encoder, rest, labels_of(spec)))
    if spec.weights != "none":
        of_vit = isinstance(encoder, vit_encoders.ViTPyramidConfig)
        load = vit_weights.load_vit_weights if of_vit else cnn_encoders.load_conv_weights
        load(model.model.pixel_level_module.encoder, spec.weights)
    return model


def _encoder_config(wanted: dict, width: int):
    """{'vit': preset, timm's name or folder in the hub's format, …} or {'cnn': name} -> the encoder's configuration.

    What else is given goes to `ViTPyramidConfig`: neck, taps, top_down, smooth, adapters, encoder_options.
    """
    wanted = dict(wanted) if isinstance(wanted, dict) else {}
    if set(wanted) == {"cnn"}:
        return cnn_encoders.ConvPyramidConfig(encoder_name=wanted["cnn"])
    if "vit" not in wanted:
        raise InputError(
            f"option encoder {wanted}: give {{'cnn': name of segmentation-models-pytorch}} or {{'vit': preset, timm's "
            f"name or folder, and neck, taps, …}}; presets: {', '.join(vit_encoders.PRESETS)}"
        )
    name, known = wanted.pop("vit"), {"neck", "taps", "width", "top_down", "smooth", "adapters", "encoder_options"}
    refuse_unknown_options(wanted, known)
    if name in vit_encoders.PRESETS:
        settings = vit_encoders.PRESETS[name]
    elif Path(name).is_dir():
        settings = dict(zip(("encoder_name", "encoder_options"), vit_weights.folder_encoder(Path(name))))
    else:
        settings = {"encoder_name": name}
    merged = {"encoder_options": settings.get("encoder_options", {}) | wanted.pop("encoder_options", {})}
    return vit_encoders.ViTPyramidConfig(**({"width": width} | settings | merged | wanted))


def _mask2former_from_hub(source: str, labels: dict[int, str]) -> nn.Module:
    load = functools.partial(
        Mask2FormerForUniversalSegmentation.from_pretrained,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        ignore_mismatched_sizes=True,  # the class head is new: ours has other labels
        output_loading_info=True,
    )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its load report names the new head on every start
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        model, report = from_hub(load, source)
    finally:
        transformers_logging.set_verbosity(verbosity)
    # transformers 4 lists the mismatched keys, 5 with their shapes
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]]
    unmatched = [*report["missing_keys"], *mismatched]
    new = ("class_predictor.", "criterion.")
    lost = sorted(key for key in unmatched if not key.startswith(new) and not key.endswith(UNUSED_NORM))
    if lost or model.config.backbone_config.model_type != "swin":
        gap = f"{len(lost)} tensors, first {lost[0]!r}, are not in it" if lost else "its backbone is another"
        raise InputError(f"{source!r} is no Mask2Former with a Swin encoder: {gap}")
    return model
