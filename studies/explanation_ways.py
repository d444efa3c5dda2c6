"""The ways in which an explanation study asks: a method with all its settings, and what is refused before it starts.

A way is such as KernelSHAP on 4 × 4 cells with 48 coalitions. Grad-CAM's gives a set of maps for each depth; sets of
maps are called variants. Plain data: nothing is explained here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from explanations import kernel_shap
from explanations.attributions import METHODS, cost
from explanations.covering import baseline_images
from explanations.grad_cam import DEPTHS
from utils import InputError, closest, pick

GRAD_CAM = "grad_cam"
TITLES = {
    "integrated_gradients": "Integrated Gradients",
    "grad_cam": "Grad-CAM",
    "kernel_shap": "KernelSHAP",
    "occlusion": "occlusion",
}
# every setting that `methods` may give, so that what maps depend on is written down with them, and not elsewhere
DEFAULTS = {
    "integrated_gradients": {"baseline": "mean", "steps": 32},
    "grad_cam": {"depths": list(DEPTHS), "relu": False},
    "kernel_shap": {"baseline": "mean", "features": 5, "samples": 100},
    "occlusion": {"baseline": "mean", "features": 5},
}
OWN_FILES = ("predictions", "predictions_of_all", "recording", "checks")  # beside those of the ways


@dataclass(frozen=True)
class Way:
    """A method with its settings; `images`: the first so many are explained."""

    name: str
    method: str
    images: int
    settings: Mapping[str, object]

    @property
    def depths(self) -> tuple[float, ...]:
        return tuple(self.settings["depths"])

    @property
    def variants(self) -> list[str]:
        """Names of the sets of maps that it gives."""
        return [f"{self.name}, {100 * depth:g} %" for depth in self.depths] if self.method == GRAD_CAM else [self.name]

    @property
    def passes(self) -> tuple[int, int]:
        """(forward, backward) of one image."""
        features = self.settings.get("features", 1)
        count = features**2 if isinstance(features, int) else int(str(features).partition(":")[2])
        numbers = {key: self.settings[key] for key in ("steps", "samples") if key in self.settings}
        return tuple(cost(self.method, features=count, **numbers))


def ways_of(methods: Mapping[str, Mapping], images: int) -> list[Way]:
    """From settings such as {"kernel_shap": {"features": 4, "samples": 48, "images": 300}, "IG": {"method": …}}.

    A way is called by its method's name, or by any name when its `method` is given, so that one method can be asked
    with several baselines.
    """
    if not methods:
        raise InputError(f"methods: none is given; choose from {', '.join(METHODS)}")
    found = []
    for name, given in methods.items():
        given = dict(given or {})
        method = given.pop("method", name)
        pick("method", method, METHODS)
        count = given.pop("images", images)
        for key in given:
            if key not in DEFAULTS[method]:
                known = [*DEFAULTS[method], "images", "method"]
                raise InputError(f"methods, {name!r}: unknown setting {key!r}; closest: {closest(key, known)}")
        if not _whole(count) or count > images:
            raise InputError(
                f"methods, {name!r}: images must be 1 to {images}, the number that is chosen; got {count!r}"
            )
        found.append(Way(name, method, count, DEFAULTS[method] | given))
        _check_values(found[-1])
    refuse_one_folder("methods", [*OWN_FILES, *methods])
    return found


def _check_values(way: Way) -> None:
    """Refuse settings that no network could be asked with."""
    given = way.settings
    problem = ""
    for key in ("steps", "samples"):
        if not _whole(given.get(key, 1)):
            problem = f"{key} must be a whole number of at least 1, got {given[key]!r}"
    features = given.get("features", 1)
    count = features.removeprefix("superpixels:") if isinstance(features, str) else ""
    if not _whole(features) and not (count.isdecimal() and int(count) > 0):
        problem = f"features must be a number of cells a side, or superpixels:40; got {features!r}"
    depths = given.get("depths", DEPTHS)
    if not isinstance(given.get("relu", False), bool):
        problem = f"relu must be true or false, got {given['relu']!r}"
    numbers = isinstance(depths, Sequence) and all(isinstance(each, int | float) for each in depths)
    if not numbers or not depths or len(set(depths)) < len(depths) or not all(0 < each <= 1 for each in depths):
        problem = f"depths must be different shares of the network in (0, 1], such as [0.5, 1.0]; got {depths!r}"
    if problem:
        raise InputError(f"methods, {way.name!r}: {problem}")
    try:
        baseline_images(torch.zeros(1, 3, 2, 2), given.get("baseline", "mean"))
        if way.method == "kernel_shap" and _whole(features):
            kernel_shap.coalitions(features**2, given["samples"])
    except InputError as error:
        raise InputError(f"methods, {way.name!r}: {error}") from error


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def refuse_one_folder(what: str, names: Iterable[str]) -> None:
    """Refuse names whose files would be the same ones; some disks do not tell A from a."""
    of: dict[str, str] = {}
    for name in names:
        called = slug(name).casefold()
        if not called or called in of:
            other = f"as those of {of[called]!r}" if called else "by no letter"
            raise InputError(f"{what}: the files of {name!r} would be called {other}; rename one of them")
        of[called] = name


def slug(name: str) -> str:
    """As a folder is called."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", name).strip("_")


def titled(variant: str) -> str:
    """A variant as readers know it: 'grad_cam, 25 %' -> 'Grad-CAM, 25 %'."""
    name, comma, rest = variant.partition(", ")
    return TITLES.get(name, name) + comma + rest
