"""Where a model is listened to: the name of a site, its declared axes, and how names become sites.

A site is `module.path`, then optionally `@k` for the k-th call of that module in one forward pass (default the
last, `@-1`), then any number of `:i` or `:key` for an element of a tuple, dict or ModelOutput.

Axes are declared, never guessed from a shape: by the model (`model.declare_site(name) -> Site`), by the caller
(`{"layer3": "batch channel height width"}`), or by PyTorch itself for modules built only of operations whose layout
is part of their contract (Conv2d, BatchNorm2d, pooling, and element-wise functions between them).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

AXES = ("batch", "channel", "height", "width", "token", "query")
IMAGE_AXES = ("batch", "channel", "height", "width")
VECTOR_AXES = ("batch", "channel")
_NAME = re.compile(r"(?P<path>[^@:]*)(?:@(?P<call>-?\d+))?(?P<selectors>(?::[^@:]+)*)")

_CONVOLUTIONAL = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.InstanceNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.PixelShuffle,
)
_VECTOR = (nn.Linear, nn.Bilinear, nn.BatchNorm1d, nn.Flatten)
_ELEMENTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Dropout,
    nn.Dropout2d,
)


@dataclass(frozen=True)
class Site:
    """One place in a model.

    name : `path[@call][:selector…]`
    axes : the names of its tensor's axes, in order, from `AXES`
    strides : for token axes, the pixels between neighbouring tokens; several when maps of several strides are
        concatenated along the token axis (spatial policies then use the finest). Empty: the tokens have no place.
    part : a label for grouping ("encoder", "decoder"), free to choose
    shape : the shape seen when the site was listed, with the batch axis first taken out; () before that
    prefix : so many tokens in front stand for no place of the image (class and register tokens); policies drop them
    """

    name: str
    axes: tuple[str, ...]
    strides: tuple[int, ...] = ()
    part: str = ""
    shape: tuple[int, ...] = ()
    prefix: int = 0

    def __post_init__(self):
        for key in ("axes", "strides", "shape"):
            value = getattr(self, key)
            object.__setattr__(self, key, tuple(value.split() if isinstance(value, str) else value))
        unknown = [axis for axis in self.axes if axis not in AXES]
        if unknown or len(set(self.axes)) != len(self.axes) or not {"batch", "channel"} <= set(self.axes):
            raise ValueError(
                f"site {self.name!r}: axes {self.axes} must be distinct, hold 'batch' and 'channel', "
                f"and come from {', '.join(AXES)}"
            )
        if self.prefix and "token" not in self.axes:
            raise ValueError(
                f"site {self.name!r}: {self.prefix} prefix tokens need an axis 'token'; it has {self.axes}"
            )
        parse(self.name)

    @property
    def spatial(self) -> bool:
        """Whether its features have a place in the image."""
        return "height" in self.axes or ("token" in self.axes and bool(self.strides))


@dataclass(frozen=True)
class Address:
    """A site's name, taken apart."""

    path: str
    call: int
    selectors: tuple[str, ...]


def parse(name: str) -> Address:
    """'a.b@2:key:0' -> Address('a.b', 2, ('key', '0')); the call is -1, the last one, unless given."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"site name {name!r} is not of the form 'module.path', 'path@call' or 'path@call:element'")
    call = -1 if match["call"] is None else int(match["call"])
    return Address(match["path"], call, tuple(part for part in match["selectors"].split(":") if part))


def resolve_sites(model: nn.Module, sites: Sequence | Mapping | None) -> list[Site] | None:
    """Sites from names, Site objects or {name: axes}; unknown ones raise before any forward pass.

    `None` gives the sites the model declares for itself (`model.default_sites()`), or None when it declares none.
    """
    if sites is None:
        default = getattr(model, "default_sites", None)
        return None if default is None else list(default())
    if isinstance(sites, str):
        raise ValueError(f"sites is the text {sites!r}; give a list of names, such as [{sites!r}]")
    if isinstance(sites, Mapping):
        sites = [Site(name, axes) for name, axes in sites.items()]
    resolved = [site if isinstance(site, Site) else _declared(model, site) for site in sites]
    if not resolved:
        raise ValueError("sites is empty; name at least one, or leave it out for the model's own")
    for site in resolved:
        find_module(model, site.name)
    repeated = {site.name for site in resolved if [other.name for other in resolved].count(site.name) > 1}
    if repeated:
        raise ValueError(f"site {sorted(repeated)[0]!r} is asked for twice")
    return resolved


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module a site listens to; an unknown path raises with the closest names."""
    modules = dict(model.named_modules(remove_duplicate=False))  # a shared module answers to each of its names
    path = parse(name).path
    if path not in modules:
        near = difflib.get_close_matches(path, modules, n=3, cutoff=0.3) or list(modules)[1:4]
        raise ValueError(f"unknown site {name!r}; closest modules: {', '.join(map(repr, near))}")
    return modules[path]


def _declared(model: nn.Module, name: str) -> Site:
    declare = getattr(model, "declare_site", None)
    if declare is not None:
        return declare(name)
    module = find_module(model, name)
    axes = None if parse(name).selectors else contract_axes(module)
    if axes is None:
        raise ValueError(
            f"the axes of site {name!r} ({type(module).__name__}) are not declared; say them, for example "
            f"sites={{{name!r}: 'batch channel height width'}} or 'batch token channel'"
        )
    return Site(name, axes)


def contract_axes(module: nn.Module) -> tuple[str, ...] | None:
    """The axes of a module's output where PyTorch's own contract fixes them, else None.

    A container counts when every leaf in it is convolutional (images out) or, for a Sequential, by its last
    module that is not element-wise.
    """
    leaves = [leaf for leaf in module.modules() if not list(leaf.children())]
    telling = [leaf for leaf in leaves if not isinstance(leaf, _ELEMENTWISE)]
    if not telling:
        return None
    if all(isinstance(leaf, _CONVOLUTIONAL) for leaf in telling):
        return IMAGE_AXES
    if len(leaves) == 1 and isinstance(module, _VECTOR):
        return VECTOR_AXES
    if isinstance(module, nn.Sequential):
        last = next((child for child in reversed(module) if not isinstance(child, _ELEMENTWISE)), None)
        return None if last is None else contract_axes(last)
    return None
