"""Models by name: build, freeze, ask for lesion logits, save and load. Their sites are declared in `model_sites`.

Every model built here takes RGB images in [0, 1]: its input normalisation is a part of it (`input_normalization`), so
that no caller can forget it or apply it twice. The other rooms use `lesion_logits` and never ask which model they hold.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.utils import logging as transformers_logging

import deformable_attention
import dense_decoder
import model_sites
from model_sites import sites as sites  # what a model computes, in order: asked for beside building it
from set_criterion import SetCriterion, set_criterion
from utils import InputError, atomic_path, closest, pick, seed_everything, write_text
from weights import HUB_ERRORS, UNUSED_NORM, from_hub, load_pretrained_file, load_state, offline_message

NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((128 / 255,) * 3, (128 / 255,) * 3),  # (x − 128) / 128 for x in 0..255
    "none": ((0.0,) * 3, (1.0,) * 3),  # the earlier study's
}
UNETPP_PRESETS = {
    "smoke": {"encoder_name": "resnet18", "decoder_channels": [32, 16, 16, 8, 8]},
    "demo": {"encoder_name": "resnet18", "decoder_channels": [64, 48, 32, 24, 16]},
    "isic2018": {"encoder_name": "resnet34", "decoder_channels": [256, 128, 64, 32, 16]},
}
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
FREEZABLE = ("encoder", "encoder_statistics")
TITLES = {"unetpp": "UNet++", "mask2former": "Mask2Former"}
LABELS = {0: "background", 1: "lesion"}
FEWEST_POINTS = 1024  # in the set loss, however small the maps are
LESION = 1  # its label among Mask2Former's classes


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a model again; stored beside its weights.

    name : 'unetpp' or 'mask2former'
    preset : a preset of that name; for unetpp also any encoder of segmentation-models-pytorch, for mask2former any
        Swin-based hub name or local folder in the hub's format
    weights : 'none' (random), 'imagenet' (the pretrained ones of the preset, from the hub or its local cache), or a
        file: encoder or whole-model state as safetensors or legacy .pth; for mask2former also a folder
    normalization : 'imagenet', 'half' or 'none', see NORMALIZATIONS
    freeze : 'encoder' (its parameters do not train, and it stays in eval mode) or 'encoder_statistics', see `freeze`
    answer : what `lesion_logits` means for Mask2Former: 'semantic', or 'query:1' (the earlier study's objective)
    options : overrides of the preset's entries, e.g. {'encoder_name': 'mobilenet_v2'} or {'num_queries': 20}
    """

    name: str = "unetpp"
    preset: str = "demo"
    weights: str = "none"
    normalization: str = "imagenet"
    freeze: tuple[str, ...] = ()
    answer: str = "semantic"
    options: dict = field(default_factory=dict)


def build_model(spec: ModelSpec, seed: int = 0) -> nn.Module:
    """The model of a spec, its random weights drawn from `seed`; carries `spec`, its normalisation and its sites."""
    builder = pick("model", spec.name, _BUILDERS)
    pick("normalization", spec.normalization, NORMALIZATIONS)
    _check_answer(spec)
    seed_everything(seed)
    try:
        return _dress(builder(spec), spec)
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:  # what the libraries say of options that do not fit
        raise InputError(
            f"{spec.name} preset {spec.preset!r} with options {spec.options} cannot be built: {error}"
        ) from error


def _dress(model: nn.Module, spec: ModelSpec) -> nn.Module:
    model.spec = spec
    model.input_normalization = NORMALIZATIONS[spec.normalization]
    model.recording_key = _recording_key(spec)
    model.register_forward_pre_hook(normalize_input, with_kwargs=True)
    model.default_sites = functools.partial(model_sites.default_sites, model)
    model.declare_site = functools.partial(model_sites.declare_site, model)
    if spec.name == "mask2former":
        model.query_weights = functools.partial(query_weights, answer=spec.answer)
        deformable_attention.speed_up(model)
    else:
        dense_decoder.speed_up(model)
    for role in spec.freeze:
        freeze(model, role)
    return model


def _recording_key(spec: ModelSpec) -> str:
    """What recordings of equal weights differ by: the input's normalisation, and the answer that weights queries."""
    return spec.normalization if spec.answer == "semantic" else f"{spec.normalization} {spec.answer}"


def normalize_input(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook: (images − mean) / std of the model's own training, for images (B, 3, H, W) in [0, 1]."""
    images = args[0] if args else kwargs["pixel_values"]
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"images must be float (batch, 3, height, width) in [0, 1], got {tuple(images.shape)} {images.dtype}"
        )
    _check_sides(model, images)
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in model.input_normalization)
    images = (images - mean) / std
    return ((images, *args[1:]), kwargs) if args else (args, kwargs | {"pixel_values": images})


def _check_sides(model: nn.Module, images: Tensor) -> None:
    height, width = images.shape[-2:]
    if isinstance(model, Mask2FormerForUniversalSegmentation):
        # its pixel decoder normalises in 32 groups of channels: a group of one value has no variance
        if model.config.feature_size == 32 and len(images) == 1 and max(height, width) <= 32:
            raise InputError(
                f"one image of {height}×{width} pixels is too small for preset {model.spec.preset!r}; "
                "use --image_size 64 or more"
            )
        return
    stride = getattr(model.encoder, "output_stride", 1)
    if height % stride or width % stride:
        raise InputError(
            f"{model.spec.name} needs images whose sides are multiples of {stride} pixels, got {height}×{width}; "
            f"use --image_size {max(stride, height // stride * stride)}"
        )


# --------------------------------------------------------------------------------------------------------- building


def _build_unetpp(spec: ModelSpec) -> nn.Module:
    options = _unetpp_options(spec)
    encoder = options["encoder_name"]
    if spec.weights != "imagenet":
        model = smp.UnetPlusPlus(encoder_weights=None, classes=1, **options)
        if spec.weights != "none":
            load_pretrained_file(model, model.encoder, Path(spec.weights))
        return model
    try:
        return smp.UnetPlusPlus(encoder_weights="imagenet", classes=1, **options)
    except KeyError as error:
        raise InputError(
            f"encoder {encoder!r} has no ImageNet weights: {error}; use weights 'none' or a file"
        ) from error
    except HUB_ERRORS as error:
        raise InputError(offline_message(*_encoder_repository(encoder), error)) from error


def _encoder_repository(encoder: str) -> tuple[str, str]:
    """(hub repository, the revision that the library asks for, '' for its newest) of an encoder's ImageNet weights."""
    if not encoder.startswith("tu-"):
        settings = smp.encoders.encoders[encoder]["pretrained_settings"]["imagenet"]
        return settings["repo_id"], settings["revision"]
    known = timm.get_pretrained_cfg(encoder.removeprefix("tu-"))
    return (encoder.removeprefix("tu-") if known is None else known.hf_hub_id), ""


def _unetpp_options(spec: ModelSpec) -> dict:
    known = set(smp.encoders.get_encoder_names())
    if spec.preset in UNETPP_PRESETS:
        options = UNETPP_PRESETS[spec.preset] | spec.options
    elif spec.preset in known or spec.preset.startswith("tu-"):
        options = {"encoder_name": spec.preset} | spec.options
    else:
        raise InputError(
            f"unknown unetpp preset or encoder {spec.preset!r}; closest: "
            f"{closest(spec.preset, [*UNETPP_PRESETS, *known])}"
        )
    encoder = options["encoder_name"]
    if encoder not in known and not encoder.startswith("tu-"):
        raise InputError(f"unknown encoder {encoder!r}; closest: {closest(encoder, known)}")
    allowed = {"encoder_name", "decoder_channels", "encoder_depth", "decoder_use_batchnorm", "decoder_attention_type"}
    _refuse_unknown_options(options, allowed)
    return options


def _build_mask2former(spec: ModelSpec) -> nn.Module:
    options = MASK2FORMER_PRESETS.get(spec.preset, {"hub": spec.preset}) | spec.options
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
        _refuse_options(spec)
        return _mask2former_from_hub(source)
    if spec.weights == "imagenet":
        raise InputError(
            f"mask2former preset {spec.preset!r} has no pretrained weights; use 'none', a file, or a hub name"
        )
    if Path(spec.weights).is_dir():
        _refuse_options(spec)
        return _mask2former_from_hub(spec.weights)
    config = _mask2former_config(options)
    model = Mask2FormerForUniversalSegmentation(config)
    if spec.weights != "none":
        load_pretrained_file(model, model_sites.encoder_of(model), Path(spec.weights))
    return model


def _refuse_options(spec: ModelSpec) -> None:
    if spec.options:
        raise InputError(
            f"options {spec.options} cannot change a pretrained model; leave them out, or use weights none"
        )


def _mask2former_config(options: dict) -> Mask2FormerConfig:
    options = dict(options)
    if "hub" in options:
        hub = options.pop("hub")
        if hub not in _KNOWN_HUB_CONFIGS:
            if options:
                raise InputError(f"options {options} cannot change the model {hub!r}; leave them out")
            config = from_hub(Mask2FormerConfig.from_pretrained, hub)
            config.num_labels = len(LABELS)
            return config
        options = _KNOWN_HUB_CONFIGS[hub] | options
    swin = SwinConfig(out_features=_SWIN_STAGES, **options.pop("swin"))
    if "hidden_dim" in options:  # one width for the whole decoder, and feed-forwards of twice that
        width = options["hidden_dim"]
        options = {
            "feature_size": width,
            "mask_feature_size": width,
            "dim_feedforward": 2 * width,
            "encoder_feedforward_dim": 2 * width,
        } | options
    allowed = set(Mask2FormerConfig().to_dict()) | {"num_labels"}
    _refuse_unknown_options(options, allowed)
    return Mask2FormerConfig(
        backbone_config=swin, id2label=LABELS, label2id={v: k for k, v in LABELS.items()}, **options
    )


def _mask2former_from_hub(source: str) -> nn.Module:
    load = functools.partial(
        Mask2FormerForUniversalSegmentation.from_pretrained,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
        ignore_mismatched_sizes=True,  # the class head is new: ours has two labels
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


def _refuse_unknown_options(options: dict, allowed: set[str]) -> None:
    for name in options:
        if name not in allowed:
            raise InputError(f"unknown model option {name!r}; closest: {closest(name, allowed)}")


def _check_answer(spec: ModelSpec) -> None:
    kind, _, query = spec.answer.partition(":")
    if spec.answer != "semantic" and (kind != "query" or not query.isdigit()):
        raise InputError(f"unknown answer {spec.answer!r}; use 'semantic' or 'query:N'")


_BUILDERS = {"unetpp": _build_unetpp, "mask2former": _build_mask2former}


# --------------------------------------------------------------------------------------------------- what they do


def _unwrapped(model: nn.Module) -> nn.Module:
    """With several processes the distributed wrapper holds the model."""
    return getattr(model, "module", model)


def _spec_of(model: nn.Module) -> ModelSpec:
    return _unwrapped(model).spec


def lesion_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Log-odds of lesion for every pixel: images (B, 3, H, W) in [0, 1] -> (B, 1, H, W).

    Mask2Former: log-odds of its semantic inference, log Σ_q p_q(lesion) σ(m_q) − log Σ_q p_q(background) σ(m_q)
    (Cheng et al. 2022), computed in log space at the masks' resolution and upsampled bilinearly; with
    `answer='query:k'` the k-th query's mask logit.
    """
    output = model(images)
    if isinstance(output, Tensor):
        return output
    answer = _spec_of(model).answer
    logits = _semantic_log_odds(output) if answer == "semantic" else _one_query(output, answer)
    return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _semantic_log_odds(output) -> Tensor:
    classes = output.class_queries_logits.float().log_softmax(-1)[..., : len(LABELS)]  # the last one is 'no object'
    masks = F.logsigmoid(output.masks_queries_logits.float())
    background, lesion = (torch.logsumexp(classes[..., label, None, None] + masks, dim=1) for label in LABELS)
    return (lesion - background)[:, None]


def query_weights(output, answer: str = "semantic") -> Tensor:
    """Each query's share in the lesion, from Mask2Former's output (of its last layer): (batch, query), not normalised.

    p_q(lesion) times the mean over pixels of σ(mask_q): what query q adds to the semantic inference of
    `lesion_logits`. With `answer='query:k'` the k-th query is the whole answer, so the k-th weight is 1, the others 0.
    """
    masks = output.masks_queries_logits
    if answer != "semantic":
        chosen = _query_number(masks, answer)
        return F.one_hot(torch.full((len(masks),), chosen, device=masks.device), masks.shape[1]).float()
    classes = output.class_queries_logits.float().softmax(-1)  # over the labels and 'no object'
    return classes[..., LESION] * masks.float().sigmoid().mean((2, 3))


def _one_query(output, answer: str) -> Tensor:
    masks = output.masks_queries_logits
    return masks[:, _query_number(masks, answer), None]


def _query_number(masks: Tensor, answer: str) -> int:
    query = int(answer.partition(":")[2])
    if query >= masks.shape[1]:
        raise InputError(f"answer {answer!r}: the model has {masks.shape[1]} queries, numbered from 0")
    return query


def set_loss(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """Mask2Former's own loss: Hungarian matching of queries to a background and a lesion mask per image.

    A label that has no pixel in an image is left out of that image's targets. The loss looks at the configured number
    of points a mask (12,544 by default: made for maps of 256 × 256), but at no more than the mask logits have pixels or
    `FEWEST_POINTS`, whichever is more: further points would read the same few pixels again.
    """
    name = _spec_of(model).name
    if name != "mask2former":
        raise InputError(f"loss 'set' needs a set of queries; {name} has none: use scaled_dice or dice_bce")
    both = torch.cat([1 - masks, masks], dim=1)
    present = both.flatten(2).any(-1)
    output = model(images, output_auxiliary_logits=True)
    layers = [
        (output.masks_queries_logits, output.class_queries_logits),
        *((layer["masks_queries_logits"], layer["class_queries_logits"]) for layer in output.auxiliary_logits),
    ]
    criterion = _unwrapped(model).criterion
    count = criterion.get_num_masks([here.nonzero()[:, 0] for here in present], images.device)
    return set_criterion(_criterion_settings(criterion, layers[0][0]), layers, both, present, count)


def _criterion_settings(criterion: nn.Module, mask_logits: Tensor) -> SetCriterion:
    pixels = mask_logits.shape[-2] * mask_logits.shape[-1]
    return SetCriterion(
        class_weight=criterion.matcher.cost_class,
        mask_weight=criterion.matcher.cost_mask,
        dice_weight=criterion.matcher.cost_dice,
        no_object=criterion.eos_coef,
        points=min(criterion.num_points, max(FEWEST_POINTS, pixels)),
        oversample=criterion.oversample_ratio,
        importance=criterion.importance_sample_ratio,
    )


def freeze(model: nn.Module, role: str) -> None:
    """Keep a part as it is for good, chosen by its role.

    'encoder': its parameters do not train and it stays in eval mode. 'encoder_statistics': only its batch norms'
    running means and variances stay (all parameters train). Weights whose batch norm was folded away need that: theirs
    are 0 and 1, and a batch's own statistics would make another function of them.
    By module, never by a substring of parameter names: Mask2Former's pixel decoder has an encoder of its own.
    """
    if role not in FREEZABLE:
        raise InputError(f"can freeze {' or '.join(map(repr, FREEZABLE))}, not {role!r}")
    encoder = model_sites.encoder_of(model)
    kept = [encoder] if role == "encoder" else [part for part in encoder.modules() if isinstance(part, _BatchNorm)]
    encoder.requires_grad_(role != "encoder")
    for module in kept:
        module.eval()
        # in train mode batch norm would go on updating its statistics: train() of the parent must not reach in here
        module.train = functools.partial(_stay_in_eval, module)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def parameter_count(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters."""
    counts = [(p.numel(), p.numel() if p.requires_grad else 0) for p in model.parameters()]
    return sum(c for c, _ in counts), sum(t for _, t in counts)


# ---------------------------------------------------------------------------------------------------- save and load


def save_model(model: nn.Module, folder: Path, extra: dict | None = None) -> None:
    """`model.safetensors` and `model.json` (spec, `extra`, e.g. the transform of the images) in a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    stored = {"spec": dataclasses.asdict(model.spec), "extra": extra or {}}
    if isinstance(model, Mask2FormerForUniversalSegmentation):
        stored["config"] = model.config.to_diff_dict()  # so that loading needs neither hub nor the folder it came from
    write_text(folder / "model.json", json.dumps(stored, indent=1, default=str) + "\n")


def load_model(folder: Path) -> tuple[nn.Module, dict]:
    """(model in eval mode, the extra that was saved with it) from a folder of `save_model`."""
    folder = Path(folder)
    if not (folder / "model.json").is_file():
        raise InputError(
            f"checkpoint folder {folder} has no model.json; give a folder that train.py wrote, such as …/best"
        )
    try:
        stored = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        spec = ModelSpec(**{key: tuple(value) if key == "freeze" else value for key, value in stored["spec"].items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / 'model.json'} is damaged or of another program: {error}") from error
    if "config" in stored:
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig.from_dict(stored["config"]))
    else:
        model = _build_unetpp(dataclasses.replace(spec, weights="none"))
    load_state(_dress(model, spec), folder / "model.safetensors")
    return model.eval(), stored["extra"]


warnings.filterwarnings("ignore", message=r".*torch\.meshgrid.*")  # transformers' own, once a process
