"""Torchvision's classifiers by name: which there are, built with or without a head, with the weights that it offers.

Names are 'torchvision/NAME' or 'torchvision/NAME.WEIGHTS', where WEIGHTS is one of torchvision's own names of weights,
such as IMAGENET1K_V1; without it the weights are those that torchvision calls its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.vision_transformer import interpolate_embeddings

from utils import InputError, closest
from weights import HUB_ERRORS

PREFIX = "torchvision/"
NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # where weights do not say their own


def is_torchvision(name: str) -> bool:
    return name.startswith(PREFIX)


def check_name(name: str) -> None:
    """Refuse a network, or a name of weights, that torchvision does not have."""
    plain, _, tag = name.removeprefix(PREFIX).partition(".")
    known = zoo.list_models(module=zoo)
    if plain not in known:
        raise InputError(f"unknown network {name!r}; closest: {closest(name, [PREFIX + each for each in known])}")
    tags = list(zoo.get_model_weights(plain).__members__)
    if tag and tag not in tags:
        raise InputError(f"unknown weights {tag!r} of {PREFIX}{plain}; closest: {closest(tag, tags)}")


def family(name: str) -> str:
    """'CNN', 'transformer' or 'hybrid'."""
    plain = name.removeprefix(PREFIX)
    if plain.startswith("maxvit"):
        return "hybrid"
    return "transformer" if plain.startswith(("vit_", "swin_")) else "CNN"


def takes_one_size(name: str) -> bool:
    """Whether a network takes images of one size alone: those that embed the place of a patch."""
    return name.removeprefix(PREFIX).startswith(("vit_", "maxvit"))


def build(name: str, options: Mapping, classes: int, size: int, pretrained: bool) -> nn.Module:
    """A network with `classes` logits, or with its last linear layer taken away (0): then it answers features."""
    plain = name.removeprefix(PREFIX).partition(".")[0]
    sized = {key: size for key in _size_names(plain)}
    try:
        body = zoo.get_model(plain, weights=None, num_classes=classes or 1000, **sized, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, IndexError, KeyError) as error:
        raise InputError(
            f"{name} cannot be built at {size} px with the options {dict(options)} ({error}); see "
            f"help(torchvision.models.{plain}) for what it takes"
        ) from error
    if pretrained:
        _load(body, name, plain, size)
    if classes == 0:
        _take_head_away(body)
    return body


def _size_names(plain: str) -> tuple[str, ...]:
    return ("image_size",) if plain.startswith("vit_") else ("input_size",) if plain.startswith("maxvit") else ()


def weights_of(name: str) -> WeightsEnum:
    """The weights that a name stands for."""
    plain, _, tag = name.removeprefix(PREFIX).partition(".")
    return zoo.get_model_weights(plain)[tag or "DEFAULT"]


def normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the colours that the weights were trained with."""
    preset = weights_of(name).transforms()
    return tuple(preset.mean), tuple(preset.std)


def _load(body: nn.Module, name: str, plain: str, size: int) -> None:
    state = _state(name)
    if plain.startswith("vit_"):
        state = interpolate_embeddings(size, body.patch_size, state)
    try:
        body.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{name}: its pretrained weights do not fit options that change its shape ({error})"
        ) from error


def _state(name: str) -> dict[str, Tensor]:
    weights = weights_of(name)
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except HUB_ERRORS as error:
        file = weights.url.rpartition("/")[2]
        raise InputError(
            f"the pretrained weights of {name!r} could not be fetched and are not in the local cache "
            f"({type(error).__name__}). On a connected machine download {weights.url} and put it here as "
            f"{Path(torch.hub.get_dir()) / 'checkpoints' / file}; or give --weights a local file; or use --weights none"
        ) from error


def _take_head_away(body: nn.Module) -> None:
    """The last linear layer is the head in all of torchvision's classifiers."""
    path = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)][-1]
    body.set_submodule(path, nn.Identity())
