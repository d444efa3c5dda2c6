"""Explanations of one network by several methods, made once and kept: maps in a file, beside it what they depend on.

A way is a method with its settings, such as KernelSHAP on 4 × 4 cells with 48 coalitions; Grad-CAM's gives a set of
maps for each depth, which are called variants. What a network cannot be asked for is noted with its reason, and the
rest goes on. How the maps are compared or tested is elsewhere.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from explanations import kernel_shap
from explanations.attributions import METHODS, Explained, cost, explain, grad_cams, sites_at_depths
from explanations.covering import baseline_images
from explanations.grad_cam import DEPTHS
from explanations.targets import Target
from studies.explained_images import Chosen, Images, key_of
from studies.subjects import CLASSIFICATION, Subject
from utils import InputError, atomic_path, closest, digest, file_digest, pick, write_text

GRAD_CAM = "grad_cam"
TITLES = {
    "integrated_gradients": "Integrated Gradients",
    "grad_cam": "Grad-CAM",
    "kernel_shap": "KernelSHAP",
    "occlusion": "occlusion",
}
SETTINGS = {
    "integrated_gradients": {"baseline", "steps"},
    "grad_cam": {"depths", "relu"},
    "kernel_shap": {"baseline", "features", "samples"},
    "occlusion": {"baseline", "features"},
}
STORED = ("maps/", "gap/", "error/")  # what the tensors of a file are called, before the variant's name
DEFAULTS = {"kernel_shap": {"features": 5, "samples": 100}, "occlusion": {"features": 5}}
# a model that cannot be explained in some way: refused by us, or by PyTorch in the middle of a pass
CANNOT = (InputError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Way:
    """A method with its settings; `images`: the first so many are explained."""

    name: str
    method: str
    images: int
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def depths(self) -> tuple[float, ...]:
        return tuple(self.settings.get("depths", DEPTHS))

    @property
    def variants(self) -> list[str]:
        """Names of the sets of maps that it gives."""
        return [f"{self.name}, {100 * depth:g} %" for depth in self.depths] if self.method == GRAD_CAM else [self.name]

    @property
    def passes(self) -> tuple[int, int]:
        """(forward, backward) of one image."""
        settings = dict(self.settings)
        features = settings.get("features", 5)
        settings = {key: settings[key] for key in ("steps", "samples") if key in settings}
        count = features**2 if isinstance(features, int) else int(str(features).partition(":")[2])
        return tuple(cost(self.method, features=count, **settings))


OWN_FILES = ("predictions", "predictions_of_all", "recording", "checks")  # beside those of the ways


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
            if key not in SETTINGS[method]:
                known = [*SETTINGS[method], "images", "method"]
                raise InputError(f"methods, {name!r}: unknown setting {key!r}; closest: {closest(key, known)}")
        if not _whole(count) or count > images:
            raise InputError(
                f"methods, {name!r}: images must be 1 to {images}, the number that is chosen; got {count!r}"
            )
        found.append(Way(name, method, count, DEFAULTS.get(method, {}) | given))
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
        other = of.setdefault(slug(name).casefold(), name)
        if not slug(name) or other != name:
            raise InputError(f"{what}: the files of {name!r} would be called as those of {other!r}; rename one of them")


@dataclass(frozen=True)
class Made:
    """What one way gave of one network.

    maps : {variant: (N, H, W)}; ids : of the N images
    gaps : {variant: (N,)} where an axiom is promised
    errors : {variant: (N,)} of KernelSHAP: norm of the values' standard errors / norm of the values
    settings, refused : {variant: in words}, {variant: why there are no maps}; seconds : that it took
    """

    maps: Mapping[str, Tensor]
    gaps: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    ids: tuple[str, ...]
    settings: Mapping[str, Mapping]
    refused: Mapping[str, str]
    seconds: float


def slug(name: str) -> str:
    """As a folder is called."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", name).strip("_")


def titled(variant: str) -> str:
    """A variant as readers know it: 'grad_cam, 25 %' -> 'Grad-CAM, 25 %'."""
    name, comma, rest = variant.partition(", ")
    return TITLES.get(name, name) + comma + rest


def place_of(folder: Path, subject: Subject, way: Way | str) -> Path:
    """Where a way's files are, without their suffixes."""
    return folder / "explanations" / slug(subject.name) / slug(way if isinstance(way, str) else way.name)


def beside(path: Path, ending: str) -> Path:
    """A file of that place; not `with_suffix`, for which the end of a name such as 'blur:1.5' would be one."""
    return path.with_name(path.name + ending)


def key(subject: Subject, chosen: Chosen, way: Way, asked: Mapping) -> str:
    """Of all that the maps depend on: weights, images, method, and what is asked (target, seed)."""
    weights = asdict(subject.spec) if subject.spec else file_digest(subject.folder / weights_file(subject))
    return digest(weights, key_of(chosen.first(way.images)), way.method, way.images, dict(way.settings), dict(asked))


def weights_file(subject: Subject) -> str:
    return "classifier.safetensors" if subject.kind == CLASSIFICATION else "model.safetensors"


def known(path: Path, expected: str) -> Made | None:
    """What is kept at `path` if it is of this key and whole, and nothing was refused for a passing reason."""
    try:
        about = json.loads(beside(path, ".json").read_text(encoding="utf-8"))
        if about["key"] != expected:
            return None
        tensors = load_file(beside(path, ".safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):  # not there, cut short, of another version
        return None
    parts = [
        {name.removeprefix(kind): each for name, each in tensors.items() if name.startswith(kind)} for kind in STORED
    ]
    return Made(*parts, tuple(about["ids"]), about["settings"], about["refused"], about["seconds"])


def keep(path: Path, made: Made, expected: str) -> None:
    """Write both files; the one with the key last, so that a killed run leaves nothing that looks finished."""
    beside(path, ".json").unlink(missing_ok=True)  # what it says of the old maps is not so of the new ones
    maps = {name: each.float() for name, each in made.maps.items()}
    tensors = {
        kind + name: each.contiguous().clone()  # two depths may be one site, and a file has no two names for a tensor
        for kind, part in zip(STORED, (maps, made.gaps, made.errors))
        for name, each in part.items()
    }
    with atomic_path(beside(path, ".safetensors")) as temporary:
        save_file(tensors, temporary)
    about = {"key": expected, "ids": list(made.ids), "settings": made.settings, "refused": made.refused}
    write_text(beside(path, ".json"), json.dumps(about | {"seconds": made.seconds}, indent=1, default=str) + "\n")


def make(way: Way, model: nn.Module, images: Images, target: Target, *, batch: int, seed: int) -> Made:
    """All variants of a way for some images; those that cannot be made are in `refused`."""
    started, found, refused = time.perf_counter(), {}, {}
    try:
        found, refused = _variants(way, model, images.pixels, target, batch, seed)
    except CANNOT as error:
        refused = dict.fromkeys(way.variants, reason(error))
    for name in [name for name, each in found.items() if not each.maps.isfinite().all()]:
        refused[name] = f"the maps of {int((~found.pop(name).maps.flatten(1).isfinite().all(1)).sum())} images hold NaN"
    maps = {name: each.maps for name, each in found.items()}
    gaps = {name: each.gap for name, each in found.items() if each.gap is not None}
    errors = {name: _relative(each) for name, each in found.items() if each.errors is not None}
    settings = {name: dict(each.settings) for name, each in found.items()}
    return Made(maps, gaps, errors, images.ids, settings, refused, time.perf_counter() - started)


def _variants(way: Way, model: nn.Module, pixels: Tensor, target: Target, batch: int, seed: int) -> tuple[dict, dict]:
    if way.method != GRAD_CAM:
        made = explain(way.method, model, pixels, target, batch=batch, seed=seed, **_numbers(way))
        return {way.name: made}, {}
    sites = sites_at_depths(model, pixels.shape[-1], way.depths)
    by_name = {site.name: site for site in sites.values()}  # in a network of few sites two depths may be one
    why: dict[str, str] = {}
    relu = bool(way.settings.get("relu", False))
    made = grad_cams(model, pixels, target, list(by_name.values()), relu=relu, batch=batch, refused=why)
    named = dict(zip(way.variants, (site.name for site in sites.values())))
    found = {variant: made[name] for variant, name in named.items() if name in made}
    return found, {variant: why[name] for variant, name in named.items() if name in why}


def _relative(explained: Explained) -> Tensor:
    """(N,) norm of the standard errors / norm of the values; an image's features may be fewer than another's."""
    absent = explained.values.isnan()  # and not an error that nobody knows, with as many equations as features
    norms = [
        torch.linalg.vector_norm(each.masked_fill(absent, 0), dim=1) for each in (explained.errors, explained.values)
    ]
    return norms[0] / norms[1]


def _numbers(way: Way) -> dict:
    return {name: value for name, value in way.settings.items() if name != "depths"}


def reason(error: Exception) -> str:
    """Why, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def explainer_of(way: Way, variant: str, image_size: int, target: Target, *, batch: int, seed: int) -> Callable:
    """(model, pixels) -> maps of one variant, for the checks, which ask it of changed models and images."""

    def of(model: nn.Module, pixels: Tensor) -> Tensor:
        if way.method != GRAD_CAM:
            return explain(way.method, model, pixels, target, batch=batch, seed=seed, **_numbers(way)).maps
        depth = way.depths[way.variants.index(variant)]
        site = sites_at_depths(model, image_size, [depth])[depth]
        return explain(
            GRAD_CAM, model, pixels, target, site=site, batch=batch, relu=way.settings.get("relu", False)
        ).maps

    return of


def seconds_of(ways: Iterable[Way], forward: float, backward: float) -> float:
    """What all images of some ways take, from the seconds of one image's passes."""
    return sum(way.images * (way.passes[0] * forward + way.passes[1] * backward) for way in ways)


def time_passes(model: nn.Module, images: Images, target_name: Target, batch: int) -> tuple[float, float]:
    """(forward, backward) seconds of one image: the second of two passes, the first being warm-up."""
    pixels = images.pixels[:batch]
    parameter = next(model.parameters())
    pixels = pixels.to(parameter.device)
    rows = torch.arange(len(pixels))
    for _ in range(2):
        started = time.perf_counter()
        asked = pixels.clone().requires_grad_()
        score = target_name(model, asked, rows).sum()
        float(score.detach())  # waits for the device
        forward = time.perf_counter() - started
        if score.requires_grad:  # not of a network that cuts gradients, which its ways will say
            torch.autograd.grad(score, asked, allow_unused=True)
        both = time.perf_counter() - started
    return forward / len(pixels), (both - forward) / len(pixels)


def maps_by_id(made: Made, variant: str) -> dict[str, Tensor]:
    """{id: map (H, W)}."""
    return dict(zip(made.ids, made.maps[variant]))
