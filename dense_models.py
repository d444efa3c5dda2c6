"""Architectures that answer a map of logits: U-Net, UNet++, FPN, DeepLabV3+, SegFormer, UPerNet and FCN, by name.

The first ones are segmentation-models-pytorch's on any of its encoders, FCN is torchvision's on a dilated ResNet,
SegFormer transformers'. Presets differ in size: `smoke` for tests, `demo` for minutes on a CPU, `isic2018` in full.
Mask2Former, which answers a set of masks, is built in `mask2former_model`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import segmentation_models_pytorch as smp
from torch import nn
from torchvision.models import ResNet50_Weights
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.models.segmentation.fcn import IntermediateLayerGetter as Layers
from transformers import AutoConfig, SegformerConfig, SegformerForSemanticSegmentation

from cnn_encoders import encoder_repository
from model_spec import ModelSpec, refuse_options, refuse_unknown_options
from utils import InputError, closest
from weights import HUB_ERRORS, from_hub, load_pretrained_file, offline_message

_UNET = {
    "smoke": {"encoder_name": "resnet18", "decoder_channels": [32, 16, 16, 8, 8]},
    "demo": {"encoder_name": "resnet18", "decoder_channels": [64, 48, 32, 24, 16]},
    "isic2018": {"encoder_name": "resnet34", "decoder_channels": [256, 128, 64, 32, 16]},
}
_SMOKE_MIT = {"encoder_name": "mit_b0", "decoder_segmentation_channels": 32}
SMP_PRESETS = {
    "unetpp": _UNET,
    "unet": _UNET,
    "fpn": {
        "smoke": {
            "encoder_name": "resnet18",
            "decoder_pyramid_channels": 32,
            "decoder_segmentation_channels": 32,
            "decoder_dropout": 0.0,
        },
        "demo": {"encoder_name": "resnet18", "decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32},
        "isic2018": {"encoder_name": "resnet34"},
    },
    "deeplabv3plus": {
        # atrous rates of 6 and more reach over the border of the 4 to 8 cells that small images leave at stride 16
        "smoke": {
            "encoder_name": "resnet18",
            "decoder_channels": 32,
            "decoder_atrous_rates": [1, 2, 3],
            "decoder_aspp_dropout": 0.0,
        },
        "demo": {"encoder_name": "resnet18", "decoder_channels": 64, "decoder_atrous_rates": [2, 4, 6]},
        "isic2018": {"encoder_name": "resnet34"},
    },
    "segformer_smp": {
        "smoke": _SMOKE_MIT,
        "demo": {"encoder_name": "mit_b0", "decoder_segmentation_channels": 64},
        "isic2018": {"encoder_name": "mit_b0"},
    },
    "upernet": {
        "smoke": {"encoder_name": "resnet18", "decoder_channels": 32},
        "demo": {"encoder_name": "resnet18", "decoder_channels": 48},
        "isic2018": {"encoder_name": "resnet34"},
    },
}
UNETPP_PRESETS = SMP_PRESETS["unetpp"]
_SMP = {
    "unetpp": (
        smp.UnetPlusPlus,
        {"decoder_channels", "encoder_depth", "decoder_use_batchnorm", "decoder_attention_type"},
    ),
    "unet": (smp.Unet, {"decoder_channels", "encoder_depth", "decoder_use_norm", "decoder_attention_type"}),
    "fpn": (
        smp.FPN,
        {"decoder_pyramid_channels", "decoder_segmentation_channels", "decoder_merge_policy", "decoder_dropout"},
    ),
    "deeplabv3plus": (
        smp.DeepLabV3Plus,
        {"decoder_channels", "decoder_atrous_rates", "decoder_aspp_dropout", "encoder_output_stride"},
    ),
    "segformer_smp": (smp.Segformer, {"decoder_segmentation_channels"}),
    "upernet": (smp.UPerNet, {"decoder_channels", "decoder_use_norm"}),
}
FCN_PRESETS = {
    # fewer stages of fewer blocks, the last one at stride 4 and 8: for images of 64 to 128 pixels
    "smoke": {"layers": [1, 1], "dilated": [True], "width_per_group": 16},
    "demo": {"layers": [1, 2, 2], "dilated": [False, True], "width_per_group": 16},
    "isic2018": {"layers": [3, 4, 6, 3], "dilated": [False, True, True], "width_per_group": 64},  # ResNet-50
}
SEGFORMER_PRESETS = {
    "smoke": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
    "demo": {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1], "decoder_hidden_size": 64},
    "isic2018": {"hub": "nvidia/mit-b0"},
}
_MIT_B0 = {"hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "decoder_hidden_size": 256}


# ------------------------------------------------------------------------------------ segmentation-models-pytorch's


def build_smp(spec: ModelSpec) -> nn.Module:
    """One of `SMP_PRESETS`' architectures."""
    options = _smp_options(spec)
    make, _ = _SMP[spec.name]
    encoder = options["encoder_name"]
    if spec.weights != "imagenet":
        model = make(encoder_weights=None, classes=spec.classes, **options)
        if spec.weights != "none":
            load_pretrained_file(model, model.encoder, Path(spec.weights))
        return model
    try:
        return make(encoder_weights="imagenet", classes=spec.classes, **options)
    except KeyError as error:
        raise InputError(
            f"encoder {encoder!r} has no ImageNet weights: {error}; use weights 'none' or a file"
        ) from error
    except HUB_ERRORS as error:
        raise InputError(offline_message(*encoder_repository(encoder), error)) from error


def encoder_name(spec: ModelSpec) -> str:
    """The encoder that a spec of one of these architectures asks for, as segmentation-models-pytorch calls it."""
    return _smp_options(spec)["encoder_name"]


def _smp_options(spec: ModelSpec) -> dict:
    known, presets = set(smp.encoders.get_encoder_names()), SMP_PRESETS[spec.name]
    if spec.preset in presets:
        options = presets[spec.preset] | spec.options
    elif spec.preset in known or spec.preset.startswith("tu-"):
        options = {"encoder_name": spec.preset} | spec.options
    else:
        raise InputError(
            f"unknown {spec.name} preset or encoder {spec.preset!r}; closest: "
            f"{closest(spec.preset, [*presets, *known])}"
        )
    encoder = options["encoder_name"]
    if not isinstance(encoder, str) or (encoder not in known and not encoder.startswith("tu-")):
        raise InputError(f"unknown encoder {encoder!r}; closest: {closest(str(encoder), known)}")
    refuse_unknown_options(options, {"encoder_name"} | _SMP[spec.name][1])
    return options


# ------------------------------------------------------------------------------------------------------ torchvision's


def build_fcn(spec: ModelSpec) -> nn.Module:
    """FCN on a dilated ResNet of bottlenecks; preset isic2018 is torchvision's `fcn_resnet50`."""
    if spec.preset not in FCN_PRESETS:
        raise InputError(f"unknown fcn preset {spec.preset!r}; closest: {closest(spec.preset, FCN_PRESETS)}")
    options = FCN_PRESETS[spec.preset] | spec.options
    refuse_unknown_options(options, set(FCN_PRESETS["smoke"]))
    stages, dilated = list(options["layers"]), list(options["dilated"])
    if not 2 <= len(stages) <= 4 or len(dilated) != len(stages) - 1:
        raise InputError(f"fcn: 2 to 4 layers with one dilated less are needed, got {stages} and {dilated}")
    missing = 4 - len(stages)
    resnet = ResNet(
        Bottleneck,
        stages + [1] * missing,
        replace_stride_with_dilation=dilated + [False] * missing,
        width_per_group=options["width_per_group"],
    )
    if spec.weights == "imagenet":
        if spec.preset != "isic2018":
            raise InputError(f"fcn preset {spec.preset!r} has no pretrained weights; use 'none', a file or isic2018")
        _fetch_resnet50(resnet)
    backbone = Layers(resnet, {f"layer{len(stages)}": "out"})  # leaves out what lies behind that layer
    model = FCN(backbone, FCNHead(256 * 2 ** (len(stages) - 1), spec.classes))
    if spec.weights not in ("none", "imagenet"):
        load_pretrained_file(model, model.backbone, Path(spec.weights))
    return model


def _fetch_resnet50(resnet: nn.Module) -> None:
    """torchvision's ImageNet weights, from its cache or its server."""
    weights = ResNet50_Weights.IMAGENET1K_V1
    try:
        resnet.load_state_dict(weights.get_state_dict(progress=False, check_hash=True))
    except OSError as error:
        raise InputError(
            f"the ImageNet weights of ResNet-50 could not be fetched and are not in the local cache "
            f"({type(error).__name__}). Fetch {weights.url} on a connected machine and put the file into "
            "~/.cache/torch/hub/checkpoints here; or give --weights that file; or use --weights none"
        ) from error


# ----------------------------------------------------------------------------------------------------- transformers'


def build_segformer(spec: ModelSpec) -> nn.Module:
    """SegFormer of transformers, by preset, hub name or local folder."""
    options = SEGFORMER_PRESETS.get(spec.preset, {"hub": spec.preset}) | spec.options
    source = options.get("hub")
    if source and spec.preset not in SEGFORMER_PRESETS and "/" not in source and not Path(source).is_dir():
        raise InputError(
            f"unknown segformer preset {spec.preset!r}; closest: {closest(spec.preset, SEGFORMER_PRESETS)}; "
            "a hub name has the form 'owner/name', a local one is a folder"
        )
    if spec.weights == "imagenet" or Path(spec.weights).is_dir():
        refuse_options(spec)
        where = spec.weights if spec.weights != "imagenet" else source
        if where is None:
            raise InputError(
                f"segformer preset {spec.preset!r} has no pretrained weights; use 'none', a file, or a hub name"
            )
        return _segformer_from_hub(where, spec.classes)
    model = SegformerForSemanticSegmentation(_segformer_config(options, spec.classes))
    if spec.weights != "none":
        load_pretrained_file(model, model.segformer, Path(spec.weights))
    return model


def _segformer_config(options: dict, classes: int) -> SegformerConfig:
    options = dict(options)
    hub = options.pop("hub", None)
    if hub == SEGFORMER_PRESETS["isic2018"]["hub"]:  # known, so that weights 'none' needs no network
        options = _MIT_B0 | options
    elif hub is not None:
        config = from_hub(SegformerConfig.from_pretrained, hub)
        config.num_labels = classes
        return config
    refuse_unknown_options(options, set(SegformerConfig().to_dict()))
    return SegformerConfig(num_labels=classes, **options)


def _segformer_from_hub(source: str, classes: int) -> nn.Module:
    """The encoder of a checkpoint (and its head, where it has as many classes); a head that is missing is new."""
    kind = from_hub(AutoConfig.from_pretrained, source).model_type
    if kind != SegformerConfig.model_type:
        raise InputError(f"{source!r} is no SegFormer but a model of type {kind!r}; give another name or folder")
    load = functools.partial(
        SegformerForSemanticSegmentation.from_pretrained,
        num_labels=classes,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = from_hub(load, source)
    lost = sorted(key for key in report["missing_keys"] if key.startswith("segformer."))
    if lost:
        raise InputError(
            f"{source!r} is no SegFormer: {len(lost)} tensors of its encoder, first {lost[0]!r}, are not in it"
        )
    return model


BUILDERS: dict[str, Callable[[ModelSpec], nn.Module]] = {
    **dict.fromkeys(SMP_PRESETS, build_smp),
    "fcn": build_fcn,
    "segformer": build_segformer,
}
