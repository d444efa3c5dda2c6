"""Models by name: build, freeze, save and load. Their sites are declared in `model_sites`, their answers in `answers`.

Every model built here takes RGB images in [0, 1]: its input normalisation is a part of it (`input_normalization`), so
that no caller can forget it or apply it twice. The other rooms use `lesion_logits` and never ask which model they hold.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Mask2FormerForUniversalSegmentation, SegformerForSemanticSegmentation

import deformable_attention
import dense_decoder
import dense_models
import mask2former_model
import model_sites
import timm_bodies
import vit_encoders
from answers import class_logits as class_logits  # asked for beside building a model
from answers import decided as decided
from answers import lesion_logits as lesion_logits
from answers import pixel_logits as pixel_logits
from answers import query_weights
from answers import set_loss as set_loss
from dense_models import UNETPP_PRESETS as UNETPP_PRESETS
from mask2former_model import MASK2FORMER_PRESETS as MASK2FORMER_PRESETS
from model_sites import sites as sites  # what a model computes, in order
from model_spec import NORMALIZATIONS as NORMALIZATIONS
from model_spec import TITLES as TITLES
from model_spec import ModelSpec as ModelSpec
from model_spec import check_answer, check_query
from settings import check_types
from utils import InputError, atomic_path, pick, seed_everything, write_text
from weights import load_state

FREEZABLE = ("encoder", "encoder_statistics")
_OF_TRANSFORMERS = {"mask2former": Mask2FormerForUniversalSegmentation, "segformer": SegformerForSemanticSegmentation}
POOLS_WHOLE_IMAGES = ("deeplabv3plus", "upernet")
_BUILDERS = dense_models.BUILDERS | {
    "mask2former": mask2former_model.build_mask2former,
    "all_mlp": timm_bodies.build_all_mlp,
}


def build_model(spec: ModelSpec, seed: int = 0) -> nn.Module:
    """The model of a spec, its random weights drawn from `seed`; carries `spec`, its normalisation and its sites."""
    builder = pick("model", spec.name, _BUILDERS)
    pick("normalization", spec.normalization, NORMALIZATIONS)
    check_answer(spec)
    seed_everything(seed)
    try:
        return _dress(builder(spec), spec)
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:  # what the libraries say of options that do not fit
        raise InputError(
            f"{spec.name} preset {spec.preset!r} with options {spec.options} cannot be built: {error}"
        ) from error


def encoder_name(spec: ModelSpec) -> str:
    """The encoder of a spec as its library calls it; of Swin, of SegFormer and of FCN the family's name."""
    known = {"fcn": "dilated ResNet", "segformer": "mix transformer"}
    if spec.name == "mask2former":
        encoder = spec.options.get("encoder", {})
        return encoder.get("cnn") or encoder.get("vit") or "swin"
    if spec.name == "all_mlp":
        return timm_bodies.network_of(spec)
    return known.get(spec.name) or dense_models.encoder_name(spec)


def _dress(model: nn.Module, spec: ModelSpec) -> nn.Module:
    model.spec = spec
    model.input_normalization = NORMALIZATIONS[spec.normalization]
    model.recording_key = _recording_key(spec)
    model.register_forward_pre_hook(normalize_input, with_kwargs=True)
    model.default_sites = functools.partial(model_sites.default_sites, model)
    model.declare_site = functools.partial(model_sites.declare_site, model)
    if spec.name == "mask2former":
        check_query(spec, model.config.num_queries)
        model.query_weights = functools.partial(query_weights, answer=spec.answer)
        deformable_attention.speed_up(model)
    elif spec.name == "unetpp":
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
    check_image_size(model, *images.shape[-2:], len(images))
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in model.input_normalization)
    images = (images - mean) / std
    return ((images, *args[1:]), kwargs) if args else (args, kwargs | {"pixel_values": images})


def check_image_size(model: nn.Module, height: int, width: int, images: int = 2) -> None:
    """Refuse images (pixels, and how many at a time) that the model cannot take, with the sizes that it can."""
    if isinstance(model, Mask2FormerForUniversalSegmentation):
        if isinstance(model.config.backbone_config, vit_encoders.ViTPyramidConfig):
            vit_encoders.check_image_size(model.config.backbone_config, height, width)
        # its pixel decoder normalises in 32 groups of channels: a group of one value has no variance
        if model.config.feature_size == 32 and images == 1 and max(height, width) <= 32:
            raise InputError(
                f"one image of {height}×{width} pixels is too small for preset {model.spec.preset!r}; "
                "use --image_size 64 or more"
            )
        return
    built_for = getattr(model, "image_size", None)
    if built_for and (height, width) != (built_for, built_for):
        raise InputError(
            f"{model.spec.name} on {model.spec.preset} was built for images of {built_for}×{built_for} pixels, got "
            f"{height}×{width}; use --image_size {built_for}, or set image_size among its options"
        )
    stride = getattr(getattr(model, "encoder", None), "output_stride", 1)
    if height % stride or width % stride:
        raise InputError(
            f"{model.spec.name} needs images whose sides are multiples of {stride} pixels, got {height}×{width}; "
            f"use --image_size {max(stride, height // stride * stride)}"
        )


def check_batches(model: nn.Module, images: int, batch_size: int) -> None:
    """Refuse a last batch of one image where batch norm follows a mean over the whole image: one value has no variance.

    images : served in an epoch
    """
    left = images % batch_size
    if left == 1 and model.spec.name in POOLS_WHOLE_IMAGES:
        raise InputError(
            f"{images} training images in batches of {batch_size} leave one over, and {model.spec.name} cannot train "
            f"on one image; use --batch_size {batch_size + 1 if images % (batch_size + 1) != 1 else batch_size - 1}"
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
    if role == "encoder" and any("lora_" in name for name, _ in encoder.named_parameters()):
        raise InputError("adapters train inside the encoder, whose own weights they keep as they are; leave freeze out")
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
    if isinstance(model, tuple(_OF_TRANSFORMERS.values())):
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
        stored["extra"] = dict(stored["extra"])
        check_types(spec)
        pick("model", spec.name, _OF_TRANSFORMERS if "config" in stored else _BUILDERS)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / 'model.json'} is damaged or of another program: {error}") from error
    if "config" in stored:
        kind = _OF_TRANSFORMERS[spec.name]
        model = kind(kind.config_class.from_dict(stored["config"]))
    else:
        model = _BUILDERS[spec.name](dataclasses.replace(spec, weights="none"))
    load_state(_dress(model, spec), folder / "model.safetensors")
    return model.eval(), stored["extra"]


warnings.filterwarnings("ignore", message=r".*torch\.meshgrid.*")  # transformers' own, once a process
