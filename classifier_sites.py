"""Where classifiers are listened to: the blocks of every known architecture, with the axes of what they emit.

Axes are declared by architecture, because shapes do not tell them: Swin emits (batch, height, width, channel), PVTv2's
blocks emit tokens and its stages maps. Timm's and torchvision's classes share names: their modules tell them apart.
"""

from __future__ import annotations

from torch import nn

from similarity import Site
from similarity.sites import IMAGE_AXES
from utils import InputError

TOKENS = ("batch", "token", "channel")
CHANNELS_LAST = ("batch", "height", "width", "channel")
# class of the network -> modules that are listened to; '*' stands for every child
MAPS = {
    "ConvNeXt": ("stem", "stages.*.blocks.*"),
    "DenseNet": ("features.norm0", "features.denseblock*", "features.transition*", "features.norm5"),
    "EdgeNeXt": ("stem", "stages.*.blocks.*"),
    "EfficientFormerV2": ("stem", "stages.*.blocks.*"),
    "EfficientNet": ("bn1", "blocks.*.*", "bn2"),
    "FastVit": ("stem", "stages.*.blocks.*"),
    "MaxxVit": ("stem", "stages.*.blocks.*"),
    "ByobNet": ("stem", "stages.*.*"),
    "MobileNetV3": ("bn1", "blocks.*.*"),
    "RegNet": ("stem", "s1.*", "s2.*", "s3.*", "s4.*"),
    "ResNet": ("act1", "layer1.*", "layer2.*", "layer3.*", "layer4.*"),
    "ResNetV2": ("stem", "stages.*.blocks.*"),
}
# torchvision's
_STAGES = ("features.1.*", "features.3.*", "features.5.*", "features.7.*")
TORCHVISION_MAPS = {
    "ConvNeXt": ("features.0", *_STAGES),
    "DenseNet": ("features.norm0", "features.denseblock*", "features.transition*", "features.norm5"),
    "MobileNetV2": ("features.*",),
    "MobileNetV3": ("features.*",),
    "RegNet": ("stem", "trunk_output.*.*"),
    "ResNet": ("relu", "layer1.*", "layer2.*", "layer3.*", "layer4.*"),
    "ShuffleNetV2": ("conv1", "stage2.*", "stage3.*", "stage4.*", "conv5"),
}
SWIN = ("SwinTransformer", "SwinTransformerV2")


def declared_sites(body: nn.Module, prefix: str = "") -> list[Site]:
    """The sites of a network of timm or torchvision held at `prefix`; an architecture not known here is refused."""
    kind = type(body).__name__
    if type(body).__module__.startswith("torchvision."):
        return _of_torchvision(body, prefix, kind)
    if kind in MAPS:
        return [_site(prefix, path, IMAGE_AXES) for pattern in MAPS[kind] for path in _matching(body, pattern)]
    if kind in SWIN:
        return [_site(prefix, path, CHANNELS_LAST) for path in _matching(body, "layers.*.blocks.*")]
    if kind in ("VisionTransformer", "VisionTransformerDistilled", "Beit", "Eva"):
        options = {"strides": (body.patch_embed.patch_size[0],), "prefix": body.num_prefix_tokens}
        return [_site(prefix, path, TOKENS, **options) for path in _matching(body, "blocks.*")]
    if kind == "PyramidVisionTransformerV2":
        return _by_stage(body, prefix, first=4)
    if kind in ("Levit", "LevitDistilled"):
        return _levit(body, prefix)
    if kind == "EfficientFormer":
        return _efficient_former(body, prefix)
    raise InputError(
        f"where to listen to {kind} is not declared; give Sites with their axes, or use one of "
        f"{', '.join([*MAPS, *SWIN, 'VisionTransformer', 'PyramidVisionTransformerV2', 'Levit', 'EfficientFormer'])}"
    )


def _of_torchvision(body: nn.Module, prefix: str, kind: str) -> list[Site]:
    if kind in TORCHVISION_MAPS:
        patterns = TORCHVISION_MAPS[kind]
        return [_site(prefix, path, IMAGE_AXES) for pattern in patterns for path in _matching(body, pattern)]
    if kind == "EfficientNet":  # stages of blocks, between two single convolutions
        parts = body.features.named_children()
        patterns = [f"features.{name}.*" if type(part) is nn.Sequential else f"features.{name}" for name, part in parts]
        return [_site(prefix, path, IMAGE_AXES) for pattern in patterns for path in _matching(body, pattern)]
    if kind == "SwinTransformer":
        return [_site(prefix, path, CHANNELS_LAST) for pattern in _STAGES for path in _matching(body, pattern)]
    if kind == "VisionTransformer":
        options = {"strides": (body.patch_size,), "prefix": 1}
        return [_site(prefix, path, TOKENS, **options) for path in _matching(body, "encoder.layers.*")]
    known = ", ".join([*TORCHVISION_MAPS, "EfficientNet", "SwinTransformer", "VisionTransformer"])
    raise InputError(
        f"where to listen to torchvision's {kind} is not declared; give Sites with their axes, or use one of {known}"
    )


def _site(held_at: str, path: str, axes: tuple[str, ...], **options) -> Site:
    return Site(held_at + path, axes, part="encoder", **options)


def _matching(body: nn.Module, pattern: str) -> list[str]:
    """'blocks.*.*' -> every child of every child of blocks; 'denseblock*' -> children that begin so; absent: none."""
    found = [""]
    for part in pattern.split("."):
        start = part.rstrip("*")
        found = [
            f"{path}.{name}" if path else name
            for path in found
            for name, _ in body.get_submodule(path).named_children()
            if (name.startswith(start) if part.endswith("*") else name == part)
        ]
    return found


def _by_stage(body: nn.Module, prefix: str, first: int) -> list[Site]:
    """Blocks that emit tokens, of stages that halve the map each."""
    return [
        _site(prefix, path, TOKENS, strides=(first * 2**stage,))
        for stage in range(len(body.stages))
        for path in _matching(body, f"stages.{stage}.blocks.*")
    ]


def _levit(body: nn.Module, prefix: str) -> list[Site]:
    """Blocks, which emit tokens or, in the convolutional variant, maps; the stem has stride 16."""
    if body.use_conv:
        return [_site(prefix, path, IMAGE_AXES) for path in _matching(body, "stages.*.blocks.*")]
    return _by_stage(body, prefix, first=16)


def _efficient_former(body: nn.Module, prefix: str) -> list[Site]:
    """Blocks of maps, then, in the last stage, of tokens."""
    kinds = {"MetaBlock2d": (IMAGE_AXES, {}), "MetaBlock1d": (TOKENS, {"strides": (32,)})}
    blocks = [(path, type(body.get_submodule(path)).__name__) for path in _matching(body, "stages.*.blocks.*")]
    return [_site(prefix, path, kinds[kind][0], **kinds[kind][1]) for path, kind in blocks if kind in kinds]
