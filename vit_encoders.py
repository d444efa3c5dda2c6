"""Vision Transformers of timm as backbones of transformers, so that Mask2Former stands on CLIP, DINOv2, MAE or any.

A body (the Vision Transformer, four of its blocks tapped) and a neck that makes of its maps, which all have one size,
a pyramid of strides 4, 8, 16 and 32. Images come normalised by the caller; nothing here trains or knows of lesions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math

import timm
import timm.models
import torch
import torch.nn.functional as F
from timm.layers import LayerScale, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from cnn_encoders import STRIDES, align_outputs, keep_initial_weights, pack, register_backbone
from utils import InputError, closest, pick

_CLIP_B16 = "vit_base_patch16_clip_quickgelu_224"  # OpenAI's own activation; plain `clip_224` computes GELU instead
_TINY = {"embed_dim": 96, "depth": 4, "num_heads": 3, "img_size": 128}
# LayerScale at DINOv2's 1e-5 leaves each block an identity for a short training; 0.1 is for shallow nets trained from
# scratch (Touvron et al. 2021, "Going deeper with image transformers", 3)
_TINY_DINOV2 = _TINY | {"patch_size": 16, "init_values": 0.1}
# Arguments of ViTPyramidConfig by one name each. The tiny ones have no pretrained weights: random, for small runs.
PRESETS = {
    "clip_b16": {"encoder_name": f"{_CLIP_B16}.openai"},
    "dinov2_s14": {"encoder_name": "vit_small_patch14_dinov2.lvd142m"},
    "dinov2_b14": {"encoder_name": "vit_base_patch14_dinov2.lvd142m"},
    "mae_b16": {"encoder_name": "vit_base_patch16_224.mae"},
    "clip_tiny": {"encoder_name": _CLIP_B16, "encoder_options": _TINY, "width": 64},
    "dinov2_tiny": {
        "encoder_name": "vit_small_patch14_reg4_dinov2",
        "encoder_options": _TINY_DINOV2,
        "width": 64,
    },
    "dinov2_tiny14": {
        "encoder_name": "vit_small_patch14_reg4_dinov2",
        "encoder_options": _TINY_DINOV2 | {"patch_size": 14, "img_size": 126},
        "width": 64,
    },
    "mae_tiny": {"encoder_name": "vit_base_patch16_224", "encoder_options": _TINY, "width": 64},
}
OURS = ("num_classes", "dynamic_img_size", "pretrained", "features_only", "in_chans", "checkpoint_path")
# timm reads these with another resampling of its own, which would have to be repeated here
_RESAMPLED_OTHERWISE = ("flexivit", "radio")
# what the libraries raise for options that do not fit each other
MISFITS = (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError)


class ViTPyramidConfig(BackboneConfigMixin, PreTrainedConfig):
    """Everything that builds a `ViTPyramid` again.

    encoder_name : a Vision Transformer of timm, such as 'vit_small_patch14_dinov2.lvd142m'
    encoder_options : passed to timm.create_model, e.g. {'img_size': 112} (the grid of the stored position embeddings;
        other sizes are interpolated while running) or {'embed_dim': 96, 'depth': 4, 'num_heads': 3}
    neck : a key of NECKS
    taps : four fractions of depth, increasing, in (0, 1]: fraction t of d blocks is the output of block ceil(t·d).
        The neck 'simple' reads the last of them only
    width : channels of every level of the pyramid
    top_down, smooth : of the neck 'taps', see `TapNeck`
    adapters : rank of low-rank adapters in the body, 0 for none, see `add_adapters`
    """

    model_type = "vit_pyramid"
    encoder_name: str = "vit_base_patch16_224"
    encoder_options: dict | None = None
    neck: str = "taps"
    taps: list[float] | tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    width: int = 256
    top_down: bool = False
    smooth: bool = False
    adapters: int = 0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.encoder_options = dict(self.encoder_options or {})
        self.taps = list(self.taps)  # as JSON knows it, so that a config read back equals the one written
        align_outputs(self, kwargs)
        super().__post_init__(**kwargs)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Of a Vision Transformer: pixels a side of a patch, blocks, channels, tokens in front of the patches' own."""

    patch: int
    depth: int
    width: int
    prefix_tokens: int


# ------------------------------------------------------------------------------------------------------- checks


def check(config: ViTPyramidConfig) -> Geometry:
    """The body's geometry, if the config can be built; an InputError otherwise. Allocates no weights."""
    pick("neck", config.neck, NECKS)
    taps = config.taps
    increasing = all(shallow < deep for shallow, deep in itertools.pairwise(taps))
    if len(taps) != len(STRIDES) or not increasing or not 0 < taps[0] <= taps[-1] <= 1:
        raise InputError(f"taps must be four increasing fractions of depth in (0, 1], got {taps}")
    if config.width < 1 or config.adapters < 0:
        raise InputError(f"width must be positive and adapters 0 or more, got {config.width} and {config.adapters}")
    geometry = body_geometry(config)
    blocks = tap_blocks(taps, geometry.depth)
    if len(set(blocks)) < len(blocks):
        raise InputError(
            f"taps {taps} fall on blocks {blocks} of the {geometry.depth} of {config.encoder_name}; "
            "choose fractions of four different blocks"
        )
    return geometry


def check_image_size(config: ViTPyramidConfig, height: int, width: int) -> None:
    """Refuse images whose sides the patch does not divide, naming the nearest sizes that it does."""
    _check_sides(config.encoder_name, body_geometry(config).patch, height, width)


def tap_blocks(taps: list[float], depth: int) -> list[int]:
    """The blocks, counted from 1, after which to listen: ceil(t·depth), so that 12 blocks give 3, 6, 9, 12."""
    return [math.ceil(round(tap * depth, 6)) for tap in taps]  # 0.07 × 100 is 7.000000000000001


def body_geometry(config: ViTPyramidConfig) -> Geometry:
    """Of the Vision Transformer that a config names, found without allocating it."""
    return _geometry(config.encoder_name, json.dumps(config.encoder_options, sort_keys=True))


@functools.cache
def _geometry(name: str, options: str) -> Geometry:
    with torch.device("meta"):
        vit = create_vit(name, json.loads(options))
    return Geometry(vit.patch_embed.patch_size[0], len(vit.blocks), vit.embed_dim, vit.num_prefix_tokens)


def _check_sides(name: str, patch: int, height: int, width: int) -> None:
    wrong = [side for side in dict.fromkeys((height, width)) if side % patch]
    if not wrong:
        return
    nearest = [
        " or ".join(str(n * patch) for n in (side // patch, side // patch + 1) if n) + f" for {side}" for side in wrong
    ]
    raise InputError(
        f"{name} reads patches of {patch}×{patch} pixels, which do not divide an image of {height}×{width}; "
        f"the nearest sizes that fit: {', '.join(nearest)}"
    )


def create_vit(name: str, options: dict) -> VisionTransformer:
    """timm's model without its classifier, at any input size; what is no plain Vision Transformer is refused."""
    _check_encoder_name(name)
    taken = [option for option in OURS if option in options]
    if taken:
        raise InputError(f"encoder options {taken} are set here and cannot be given")
    try:
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
    except MISFITS as error:
        raise InputError(f"encoder {name!r} with options {options} cannot be built: {error}") from error
    patch = getattr(vit.patch_embed, "patch_size", None)
    if type(vit.patch_embed) is not PatchEmbed or patch[0] != patch[1]:
        raise InputError(f"encoder {name!r} does not read square patches of pixels; use a plain Vision Transformer")
    return vit


def _check_encoder_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise InputError(
            f"timm knows no encoder {name!r}; closest: {closest(name, timm.list_models() + timm.list_pretrained())}"
        )
    plain = timm.model_entrypoint(architecture).__module__ == VisionTransformer.__module__
    if not plain or architecture.startswith(_RESAMPLED_OTHERWISE) or "_radio_" in architecture:
        raise InputError(
            f"encoder {name!r} is no plain Vision Transformer of timm, whose blocks could be tapped; closest: "
            f"{closest(name, timm.list_models('vit_*', module='vision_transformer'))}"
        )
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise InputError(f"timm has no weights {tag!r} of {architecture}; closest: {closest(name, tagged)}")


# --------------------------------------------------------------------------------------------------- body and necks


class TappedViT(nn.Module):
    """A Vision Transformer whose forward gives the maps after its tapped blocks: (B, 3, H, W) -> four (B, C, h, w).

    Without the class and register tokens, and as they leave the block: not through the Vision Transformer's last
    norm, whose gain and shift are trained for the last block's output alone; the neck normalises each map by itself.
    So timm's `forward_intermediates` and `get_intermediate_layers` do by default.
    patch : pixels a side; prefix_tokens : how many tokens stand in front of the patches'; taps : blocks, from 0
    """

    def __init__(self, config: ViTPyramidConfig):
        super().__init__()
        geometry = check(config)
        self.name = config.encoder_name
        self.patch, self.prefix_tokens = geometry.patch, geometry.prefix_tokens
        self.taps = [block - 1 for block in tap_blocks(config.taps, geometry.depth)]
        self.vit = create_vit(config.encoder_name, config.encoder_options)

    def forward(self, images: Tensor) -> list[Tensor]:
        _check_sides(self.name, self.patch, *images.shape[-2:])
        return self.vit.forward_intermediates(
            images, indices=self.taps, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )


class TapNeck(nn.Module):
    """One level from each tap, the shallowest at stride 4: 1 × 1 projection with GroupNorm, resized bilinearly.

    top_down : each level adds the coarser one, upsampled (feature pyramid network, Lin et al. 2017, 3)
    smooth : a 3 × 3 convolution with GroupNorm after that
    """

    def __init__(self, channels: int, width: int, top_down: bool, smooth: bool):
        super().__init__()
        self.top_down = top_down
        self.projections = nn.ModuleList(_convolution(channels, width, 1) for _ in STRIDES)
        self.smoothing = nn.ModuleList(_convolution(width, width, 3) for _ in STRIDES) if smooth else None

    def forward(self, taps: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        levels = [_resize(project(tap), size) for project, tap, size in zip(self.projections, taps, sizes)]
        if self.top_down:
            for fine in range(len(levels) - 2, -1, -1):
                levels[fine] = levels[fine] + _resize(levels[fine + 1], sizes[fine])
        if self.smoothing is not None:
            levels = [smooth(level) for smooth, level in zip(self.smoothing, levels)]
        return levels


class SimpleNeck(nn.Module):
    """Simple feature pyramid from the last tap alone (ViTDet, Li et al. 2022, 3): no fusion, no second tap.

    The map times 4 (two transposed convolutions), times 2 (one), as it is, and halved by max pooling, each then 1 × 1
    and 3 × 3 convolutions. With patches of 16 pixels these are strides 4 to 32; with others the levels are resized.
    """

    def __init__(self, channels: int, width: int, top_down: bool, smooth: bool):
        super().__init__()
        if top_down or smooth:
            raise InputError("top_down and smooth belong to the neck 'taps'; the neck 'simple' has neither")
        half, quarter = max(1, channels // 2), max(1, channels // 4)
        double, again = nn.ConvTranspose2d(channels, half, 2, 2), nn.ConvTranspose2d(half, quarter, 2, 2)
        steps = (
            (quarter, nn.Sequential(double, _norm(half), nn.GELU(), again)),
            (half, nn.ConvTranspose2d(channels, half, 2, 2)),
            (channels, nn.Identity()),
            (channels, nn.MaxPool2d(2, ceil_mode=True)),
        )
        self.scales = nn.ModuleList(scale for _, scale in steps)
        self.projections = nn.ModuleList(
            nn.Sequential(_convolution(inner, width, 1), _convolution(width, width, 3)) for inner, _ in steps
        )

    def forward(self, taps: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        return [
            project(_resize(scale(taps[-1]), size))
            for scale, project, size in zip(self.scales, self.projections, sizes)
        ]


NECKS = {"taps": TapNeck, "simple": SimpleNeck}


def _convolution(inner: int, outer: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, kernel, padding=kernel // 2, bias=False), _norm(outer))


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of about eight channels, as 32 of 256 have; never of one, which at a map of one cell has no variance."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels)


def _resize(level: Tensor, size: tuple[int, int]) -> Tensor:
    if level.shape[-2:] == size:
        return level
    return F.interpolate(level, size=size, mode="bilinear", align_corners=False)


class ViTPyramid(BackboneMixin, PreTrainedModel):
    """`body` (a TappedViT, random weights: `load_vit_weights` brings others) and `neck`."""

    config_class = ViTPyramidConfig
    main_input_name = "pixel_values"
    has_attentions = False  # none that are handed out

    def __init__(self, config: ViTPyramidConfig):
        super().__init__(config)
        self.body = TappedViT(config)
        self.neck = NECKS[config.neck](self.body.vit.embed_dim, config.width, config.top_down, config.smooth)
        self.num_features = [config.width] * len(STRIDES)
        if config.adapters:
            add_adapters(self.body, config.adapters)
        keep_initial_weights(self)
        self.post_init()

    def forward(self, pixel_values: Tensor, output_hidden_states=None, return_dict=None, **kwargs) -> BackboneOutput:
        """(B, 3, H, W) -> feature maps (B, width, ⌈H/s⌉, ⌈W/s⌉) for s = 4, 8, 16, 32; hidden states are the taps."""
        height, width = pixel_values.shape[-2:]
        taps = self.body(pixel_values)
        maps = self.neck(taps, [(-(-height // stride), -(-width // stride)) for stride in STRIDES])
        return pack(self, maps, taps, output_hidden_states, return_dict)

    def train(self, mode: bool = True) -> ViTPyramid:
        """Also keeps the base of the adapters frozen: `from_pretrained` makes every tensor that it loads trainable."""
        super().train(mode)
        if self.config.adapters:
            _freeze_base(self.body)
        return self

    def _init_weights(self, module: nn.Module) -> None:
        # reached only for what a checkpoint lacks, see `keep_initial_weights`; transformers skips what was loaded
        super()._init_weights(module)
        if isinstance(module, VisionTransformer):
            for parameter in module.parameters(recurse=False):
                init.trunc_normal_(parameter, std=0.02)
        elif isinstance(module, LayerScale):
            init.constant_(module.gamma, module.init_values)


register_backbone(ViTPyramidConfig, ViTPyramid)


# ----------------------------------------------------------------------------------------------------------- adapters


def add_adapters(body: TappedViT, rank: int) -> None:
    """Low-rank adapters (LoRA, Hu et al. 2022) beside every block's qkv and output projections, by peft.

    They start at zero effect and are all of the body that trains from here on; their scale α/r is 1. They are a part
    of the state dict, and of a backbone whose config says `adapters=rank`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("adapters need the package peft: `pip install peft`") from error
    if rank < 1:
        raise InputError(f"the rank of the adapters must be 1 or more, got {rank}")
    # by the attention's own two: a patch embedding has a `proj` as well
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=r".*\.attn\.(qkv|proj)")
    inject_adapter_in_model(settings, body)
    _freeze_base(body)


def _freeze_base(body: TappedViT) -> None:
    for name, parameter in body.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(False)
