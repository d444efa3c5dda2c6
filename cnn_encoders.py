"""Encoders of segmentation-models-pytorch as backbones of transformers, so that Mask2Former stands on any of them.

Only the encoder: what reads its maps belongs to the model it is put in, and images come normalised by the caller. The
maps are the encoder's own, in its own widths, at strides 4, 8, 16 and 32. Here are also the two steps that every
backbone of ours shares: being registered, and keeping the initial weights that its own library drew.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    Mask2FormerConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.initialization import meta_device_safe_creation_ops
from transformers.modeling_outputs import BackboneOutput

from utils import InputError, closest
from weights import HUB_ERRORS, load_pretrained_file, offline_message

STRIDES = (4, 8, 16, 32)
STAGES = [f"stride{stride}" for stride in STRIDES]
_PROBE = 64  # pixels a side: the smallest that every stride divides into more than one cell
# what the libraries raise for an encoder that cannot be built, or that cannot read an image of the probe's size
_MISFITS = (ValueError, TypeError, RuntimeError, AssertionError, KeyError, NotImplementedError)


class ConvPyramidConfig(BackboneConfigMixin, PreTrainedConfig):
    """encoder_name : any encoder of segmentation-models-pytorch, or 'tu-…' for one of timm's."""

    model_type = "conv_pyramid"
    encoder_name: str = "resnet18"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        align_outputs(self, kwargs)
        super().__post_init__(**kwargs)


class ConvPyramid(BackboneMixin, PreTrainedModel):
    """`body`, the encoder with random weights; its feature maps at strides 4, 8, 16, 32 are this backbone's output."""

    config_class = ConvPyramidConfig
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: ConvPyramidConfig):
        super().__init__(config)
        self.num_features = list(stage_channels(config.encoder_name))
        self.body = _encoder(config.encoder_name)
        keep_initial_weights(self)
        self.post_init()

    def forward(self, pixel_values: Tensor, output_hidden_states=None, return_dict=None, **kwargs) -> BackboneOutput:
        """(B, 3, H, W) -> feature maps (B, C_k, H/stride_k, W/stride_k)."""
        maps = self.body(pixel_values)
        return pack(self, maps[-len(STRIDES) :], maps, output_hidden_states, return_dict)


def load_conv_weights(backbone: ConvPyramid, source: str | Path) -> None:
    """The encoder's pretrained weights: 'imagenet' (hub or its cache), or a file of this encoder's state.

    For a 'tu-…' encoder 'imagenet' means the weights that timm has under that name.
    """
    if str(source) != "imagenet":
        load_pretrained_file(backbone.body, backbone.body, Path(source))
        return
    name = backbone.config.encoder_name
    try:
        pretrained = _encoder(name, weights=True if name.startswith("tu-") else "imagenet")
    except KeyError as error:
        raise InputError(f"encoder {name!r} has no ImageNet weights: {error}; use 'none' or a file") from error
    except HUB_ERRORS as error:
        raise InputError(offline_message(*encoder_repository(name), error)) from error
    except RuntimeError as error:  # timm's word for a name without weights
        raise InputError(f"encoder {name!r} has no pretrained weights: {error}; use 'none' or a file") from error
    backbone.body.load_state_dict(pretrained.state_dict())


def encoder_repository(name: str) -> tuple[str, str]:
    """(hub repository, the revision that the library asks for, '' for its newest) of an encoder's ImageNet weights."""
    if not name.startswith("tu-"):
        settings = smp.encoders.encoders[name]["pretrained_settings"]["imagenet"]
        return settings["repo_id"], settings["revision"]
    known = timm.get_pretrained_cfg(name.removeprefix("tu-"))
    return (name.removeprefix("tu-") if known is None else known.hf_hub_id), ""


@functools.cache
def stage_channels(name: str) -> tuple[int, ...]:
    """Channels at strides 4, 8, 16, 32; an encoder that is unknown or has other strides is refused.

    Found by an image without pixels (PyTorch's meta device): nothing is computed or allocated.
    """
    check_name(name)
    try:
        with torch.device("meta"), meta_device_safe_creation_ops():
            maps = _encoder(name).eval()(torch.zeros(1, 3, _PROBE, _PROBE))[-len(STRIDES) :]
    except _MISFITS as error:
        raise InputError(f"encoder {name!r} gives no feature pyramid: {error}; use e.g. 'resnet34'") from error
    sides = [tuple(level.shape[-2:]) for level in maps]
    if sides != [(_PROBE // stride,) * 2 for stride in STRIDES]:
        found = [_PROBE / height for height, _ in sides]
        raise InputError(f"encoder {name!r} has maps at strides {found}, not {list(STRIDES)}; use e.g. 'resnet34'")
    return tuple(level.shape[1] for level in maps)


def check_name(name: str) -> None:
    """Refuse an encoder that neither library knows, with the closest names."""
    known = smp.encoders.get_encoder_names()
    plain = name.removeprefix("tu-").partition(".")[0]
    if name.startswith("tu-") and not timm.is_model(plain):
        raise InputError(f"timm knows no encoder {plain!r}; closest: {closest(plain, timm.list_models())}")
    if not name.startswith("tu-") and name not in known:
        raise InputError(f"unknown encoder {name!r}; closest: {closest(name, known)}; timm's begin with 'tu-'")


def _encoder(name: str, weights: str | bool | None = None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its older names of timm's encoders, which work
        return smp.encoders.get_encoder(name, in_channels=3, depth=5, weights=weights)


# ---------------------------------------------------------------------------------- what every backbone of ours shares


def align_outputs(config: BackboneConfigMixin, kwargs: dict) -> None:
    """Set a config's stages, by default all four of them as outputs; takes its entries out of `kwargs`."""
    config.stage_names = list(STAGES)
    kwargs.pop("stage_names", None)
    features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
    features = list(STAGES) if features is None and indices is None else features
    config.set_output_features_output_indices(out_features=features, out_indices=indices)


def pack(backbone, maps, hidden, output_hidden_states, return_dict) -> BackboneOutput | tuple:
    """The maps of the stages that the config asks for, and on demand what the body computed on the way."""
    chosen = tuple(level for stage, level in zip(backbone.stage_names, maps) if stage in backbone.out_features)
    shown = tuple(hidden) if output_hidden_states else None
    if return_dict is False:
        return (chosen,) if shown is None else (chosen, shown)
    return BackboneOutput(feature_maps=chosen, hidden_states=shown)


def keep_initial_weights(backbone: PreTrainedModel) -> None:
    """Tell transformers that the initial weights are drawn already, by the body's own library.

    Not while a checkpoint is loaded: then the tensors are empty, and one that the checkpoint lacks must be drawn.
    """
    if not any(parameter.is_meta for parameter in backbone.parameters()):
        for module in backbone.modules():
            module._is_hf_initialized = True


def register_backbone(config_class: type, model_class: type) -> None:
    """Make a backbone known to transformers' Auto classes, and to Mask2Former's list of what may stand under it."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoBackbone.register(config_class, model_class, exist_ok=True)
    if config_class.model_type not in Mask2FormerConfig.backbones_supported:
        Mask2FormerConfig.backbones_supported = [*Mask2FormerConfig.backbones_supported, config_class.model_type]


register_backbone(ConvPyramidConfig, ConvPyramid)
