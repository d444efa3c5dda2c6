"""A segmentation network on the body of any image classifier of timm: its stages, and SegFormer's all-MLP decoder.

The body keeps the layout of the classifier's state dict, so that a network trained to classify (`classification`) can
be taken over and fine-tuned, and be compared with what it was, place by place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from classification.classifiers import ClassifierSpec, is_sized, load_classifier, timm_body
from model_spec import NORMALIZATIONS, ModelSpec, refuse_unknown_options
from utils import InputError, pick
from weights import differences, load_pretrained_file, read_state

LEVELS = 4  # taps at most, as SegFormer has stages
BODY_PRESETS = {
    "smoke": {
        "network": "resnet18",
        "body": {"channels": [16, 16, 24, 32], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 8},
        "decoder_channels": 32,
    },
    "demo": {
        "network": "resnet18",
        "body": {"channels": [24, 48, 96, 192], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 12},
        "decoder_channels": 64,
    },
    "isic2018": {"network": "resnet34", "decoder_channels": 256},
}
_OPTIONS = {"body", "decoder_channels", "image_size"}


class AllMLP(nn.Module):
    """A body that answers feature maps, and a decoder of 1 × 1 convolutions alone; logits at the images' size.

    image_size : the one side in pixels that the body was built for; None where it takes any
    """

    def __init__(self, body: nn.Module, decoder: nn.Module, image_size: int | None) -> None:
        super().__init__()
        self.encoder, self.decoder, self.image_size = body, decoder, image_size

    def forward(self, images: Tensor) -> Tensor:
        logits = self.decoder(self.encoder(images))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


class AllMLPDecoder(nn.Module):
    """Xie et al. 2021, section 3.2: project every level, resize to the finest, concatenate, fuse, classify.

    MiT's stages end in a layer norm, and not every body's do: here each level is normalised before its projection.
    """

    def __init__(self, widths: list[int], channels: int, classes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, channels, 1)) for width in widths
        )
        fusing = nn.Conv2d(channels * len(widths), channels, 1, bias=False)
        self.fusion = nn.Sequential(fusing, nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = max((part.shape[-2:] for part in maps), key=lambda side: side[0] * side[1])
        levels = [level(part) for level, part in zip(self.levels, maps)]
        levels = [F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in levels]
        return self.classifier(self.fusion(torch.cat(levels, 1)))


def network_of(spec: ModelSpec) -> str:
    """What timm calls the body of a spec."""
    return BODY_PRESETS.get(spec.preset, {"network": spec.preset})["network"]


def build_all_mlp(spec: ModelSpec) -> nn.Module:
    """The network of a spec, whose preset is one of `BODY_PRESETS` or a network of timm.

    Options: body (of timm.create_model), decoder_channels, image_size (of bodies that are built for one size).
    """
    options = {"body": {}, "decoder_channels": 64, "image_size": 64} | BODY_PRESETS.get(spec.preset, {}) | spec.options
    options.pop("network", None)
    refuse_unknown_options(options, _OPTIONS)
    name, size = network_of(spec), options["image_size"]
    if name.startswith("torchvision/"):
        raise InputError(f"{name} is not timm's, whose bodies answer feature maps; use one of those, such as resnet18")
    body_spec = ClassifierSpec(name, options["body"], classes=1, image_size=size)
    body = timm_body(body_spec, spec.weights == "imagenet")
    everything = set(body.state_dict())
    widths = _make_pyramid(body, name, size)
    head = everything - set(body.state_dict())  # with what only the head looks at, such as a last norm
    model = AllMLP(
        body, AllMLPDecoder(widths, options["decoder_channels"], spec.classes), size if is_sized(name) else None
    )
    if Path(spec.weights).is_dir():
        _load_classifier_body(body, head, spec)
    elif spec.weights not in ("none", "imagenet"):
        _load_file(model, head, Path(spec.weights))
    return model


def _make_pyramid(body: nn.Module, name: str, size: int) -> list[int]:
    """Take the head off, and have the body's `forward` answer its last stages' maps; returns their channels.

    Bodies whose maps keep one size have no stages: theirs are the blocks at 1/4, 1/2, 3/4 and all of their depth.
    """
    if not hasattr(body, "forward_intermediates") or not hasattr(body, "prune_intermediate_layers"):
        raise InputError(f"{name}: timm offers no feature maps of {type(body).__name__}; choose another body")
    body.prune_intermediate_layers(None, prune_norm=True, prune_head=True)
    for head in {name.partition(".")[0] for name in _heads(body)}:  # some versions of timm leave a norm of ConvNeXt's
        setattr(body, head, nn.Identity())
    maps = functools.partial(body.forward_intermediates, output_fmt="NCHW", intermediates_only=True)
    training = body.training
    with torch.no_grad():
        shapes = [part.shape for part in body.eval() and maps(torch.zeros(1, 3, size, size))]
    body.train(training)
    count = len(shapes)
    if len({shape[-2:] for shape in shapes}) == 1:
        taps = sorted({-(-count * level // LEVELS) - 1 for level in range(1, LEVELS + 1)})
    else:
        taps = list(range(count))[-LEVELS:]
    body.forward = functools.partial(maps, indices=taps)
    return [shapes[tap][1] for tap in taps]


def _heads(body: nn.Module) -> tuple[str, ...]:
    """Where a body of timm has its last linear map; of distilled ones there are two."""
    classifier = body.pretrained_cfg["classifier"]
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _load_file(model: AllMLP, head: set[str], path: Path) -> None:
    """Of a body with or without its head, in timm's layout, or of a whole network of ours."""
    state = read_state(path)
    if any(key.startswith("decoder.") for key in state):
        load_pretrained_file(model, model.encoder, path)
    else:
        _load_body(model.encoder, state, head, f"weights file {path}")


def _load_classifier_body(body: nn.Module, head: set[str], spec: ModelSpec) -> None:
    """The body of a classifier that `save_classifier` wrote; it must have seen images as this network will."""
    classifier, _ = load_classifier(Path(spec.weights))
    seen = [getattr(classifier, name).flatten().tolist() for name in ("mean", "std")]
    wanted = pick("normalization", spec.normalization, NORMALIZATIONS)
    if not all(torch.allclose(torch.tensor(a), torch.tensor(b)) for a, b in zip(seen, wanted)):
        raise InputError(
            f"classifier {spec.weights} normalises its input otherwise (mean {seen[0]}, std {seen[1]}) than "
            f"{spec.normalization!r} does; set normalization to what it was trained with"
        )
    _load_body(body, classifier.body.state_dict(), head, f"classifier {spec.weights} ({classifier.spec.name})")


def _load_body(body: nn.Module, state: Mapping[str, Tensor], head: set[str], what: str) -> None:
    """Load what the body has; everything else must belong to a head."""
    own, heads = body.state_dict(), tuple(f"{name}." for name in _heads(body))
    asked = {key: part for key, part in state.items() if key in own or not (key in head or key.startswith(heads))}
    if wrong := differences(own, asked):
        raise InputError(
            f"{what} is of another body than this {type(body).__name__}: {len(wrong)} differences, first "
            f"{'; '.join(wrong[:3])}; give preset and options.body as it was built"
        )
    body.load_state_dict({key: state[key] for key in own})
