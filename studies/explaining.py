"""Explanations of one network, made once and kept: a way's maps in a file, with what they depend on.

A file is found by a key of all that its maps depend on, which is in its name: other settings give another file, and
take no other's place. What a network cannot be asked for is noted with its reason, and the rest goes on. How maps are
compared or tested is elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from explanations.attributions import Explained, explain, grad_cams, sites_at_depths
from explanations.features import cut
from explanations.targets import Target
from studies.explained_images import Chosen, Images, key_of
from studies.explanation_ways import GRAD_CAM, Way, slug
from studies.subjects import Subject
from utils import InputError, atomic_path, digest, file_digest

VERSION = 1  # of what the same settings give
FILES = ("classifier.json", "classifier.safetensors", "model.json", "model.safetensors")  # of a checkpoint
STORED = ("maps/", "gap/", "error/")  # what the tensors of a file are called, before the variant's name
# a model that cannot be explained in some way: refused by us, or by PyTorch in the middle of a pass
CANNOT = (InputError, NotImplementedError, RuntimeError)
PASSING = "PyTorch stopped: "  # begins a reason that may be gone next time


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

    @property
    def finished(self) -> bool:
        """Whether nothing was refused for a reason that may be gone next time."""
        return not any(why.startswith(PASSING) for why in self.refused.values())


# ---------------------------------------------------------------------------------------------------------------- files


def key(subject: Subject, chosen: Chosen, way: Way, asked: Mapping) -> str:
    """Of all that the maps depend on: network, images, method, and what is asked (target, seed)."""
    images = key_of(chosen.first(way.images))
    return digest(VERSION, weights_key(subject), images, way.method, way.images, dict(way.settings), dict(asked))


def weights_key(subject: Subject) -> str:
    """Of a network's weights and of how it is built around them."""
    if subject.spec is None:
        return digest([_file_key(path) for path in sorted(subject.folder.iterdir()) if path.name in FILES])
    file = Path(subject.spec.weights)
    return digest(asdict(subject.spec), _file_key(file) if file.is_file() else "")


def _file_key(path: Path) -> list[str]:
    found = path.stat()
    return [path.name, _digest_of(path.absolute(), found.st_mtime_ns, found.st_size)]


@functools.cache
def _digest_of(path: Path, _changed: int, _size: int) -> str:
    return file_digest(path)


def path_of(folder: Path, subject: Subject, name: str, expected: str, ending: str = ".safetensors") -> Path:
    """Where something of this key is kept."""
    return folder / "explanations" / slug(subject.name) / f"{slug(name)}-{expected[:8]}{ending}"


def known(path: Path, expected: str, *, maps: bool = True) -> Made | None:
    """What is kept at `path` if it is of this key and whole; without `maps` their names alone are read, each empty."""
    try:
        with safe_open(path, "pt") as stored:
            about = json.loads(stored.metadata()["about"])
            if about["key"] != expected:
                return None
            facts = {name: about[name] for name in ("ids", "settings", "refused", "seconds")}
            tensors = {name: stored.get_tensor(name) if maps else torch.empty(0) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):  # not there, cut short, of another version
        return None
    parts = [
        {name.removeprefix(kind): each for name, each in tensors.items() if name.startswith(kind)} for kind in STORED
    ]
    return Made(*parts, **facts | {"ids": tuple(facts["ids"])})


def keep(path: Path, made: Made, expected: str) -> None:
    """Write all of it at once."""
    maps = {name: each.float() for name, each in made.maps.items()}
    tensors = {
        kind + name: each.contiguous().clone()  # two depths may be one site, and a file has no two names for a tensor
        for kind, part in zip(STORED, (maps, made.gaps, made.errors))
        for name, each in part.items()
    }
    plain = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)[len(STORED) :]}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"about": json.dumps(plain | {"key": expected}, default=str)})


# ----------------------------------------------------------------------------------------------------------------- made


def make(way: Way, model: nn.Module, images: Images, target: Target, *, batch: int, seed: int) -> Made:
    """All variants of a way for some images; those that cannot be made are in `refused`."""
    started, found, refused = time.perf_counter(), {}, {}
    try:
        found, refused = _variants(way, model, images.pixels, target, batch, seed)
    except CANNOT as error:
        refused = dict.fromkeys(way.variants, reason(error))
    for name in [name for name, each in found.items() if not each.maps.isfinite().all()]:
        broken = ~found.pop(name).maps.flatten(1).isfinite().all(1)
        refused[name] = f"the maps of {int(broken.sum())} images hold NaN"
    maps = {name: each.maps for name, each in found.items()}
    gaps = {name: each.gap for name, each in found.items() if each.gap is not None}
    errors = {name: _relative(each) for name, each in found.items() if each.errors is not None}
    settings = {name: dict(each.settings) for name, each in found.items()}
    return Made(maps, gaps, errors, images.ids, settings, refused, time.perf_counter() - started)


def _variants(way: Way, model: nn.Module, pixels: Tensor, target: Target, batch: int, seed: int) -> tuple[dict, dict]:
    if way.method != GRAD_CAM:
        made = explain(way.method, model, pixels, target, batch=batch, seed=seed, **way.settings)
        return {way.name: made}, {}
    sites = sites_at_depths(model, pixels.shape[-1], way.depths)
    by_name = {site.name: site for site in sites.values()}  # in a network of few sites two depths may be one
    why: dict[str, str] = {}
    made = grad_cams(model, pixels, target, list(by_name.values()), relu=way.settings["relu"], batch=batch, refused=why)
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


def reason(error: Exception) -> str:
    """Why, in a line; of too little memory the run ends, since that is no property of the network."""
    if isinstance(error, torch.OutOfMemoryError):
        raise InputError("the memory does not suffice; lower batch_size") from error
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if isinstance(error, InputError) else PASSING + line


def explainer_of(way: Way, variant: str, pixels: Tensor, target: Target, *, batch: int, seed: int) -> Callable:
    """(model, pixels) -> maps of one variant, for the checks, which ask it of changed models and changed images.

    pixels : the images as they are, whose superpixels serve the changed ones, too
    """
    settings = dict(way.settings)
    if isinstance(settings.get("features"), str):
        settings["features"], _ = cut(settings["features"], pixels)

    def of(model: nn.Module, changed: Tensor) -> Tensor:
        if way.method != GRAD_CAM:
            return explain(way.method, model, changed, target, batch=batch, seed=seed, **settings).maps
        depth = way.depths[way.variants.index(variant)]
        site = sites_at_depths(model, changed.shape[-1], [depth])[depth]
        return explain(GRAD_CAM, model, changed, target, site=site, batch=batch, relu=settings["relu"]).maps

    return of


# ----------------------------------------------------------------------------------------------------------------- cost


def time_passes(model: nn.Module, images: Images, target: Target, batch: int) -> tuple[float, float]:
    """(forward, backward) seconds of one image: the second of two passes, the first being warm-up."""
    pixels = images.pixels[:batch].to(next(model.parameters()).device)
    rows = torch.arange(len(pixels))
    for _ in range(2):
        started = time.perf_counter()
        asked = pixels.clone().requires_grad_()
        score = target(model, asked, rows).sum()
        float(score.detach())  # waits for the device
        forward = time.perf_counter() - started
        if score.requires_grad:  # not of a network that cuts gradients, which its ways will say
            torch.autograd.grad(score, asked, allow_unused=True)
        both = time.perf_counter() - started
    return forward / len(pixels), (both - forward) / len(pixels)
