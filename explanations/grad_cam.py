"""Grad-CAM at any site that has a map, of any model: convolutional maps, and tokens laid out where they are.

The sites' axes come from `similarity.sites`; the maps are given to `attributions`, which says what they are maps of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explanations.targets import Target, device_of, quiet
from similarity import Site, list_sites, resolve_sites
from similarity.hooks import Listener, check_batch
from similarity.policies import map_size, to_map
from utils import InputError, closest

DEPTHS = (0.25, 0.5, 0.75, 1.0)
ROUNDING = 100 * torch.finfo(torch.float32).eps  # of a mean over places, relative to what is averaged


def cams(
    model: nn.Module,
    images: Tensor,
    target: Target,
    sites: Sequence[Site | str],
    *,
    relu: bool,
    batch: int,
    refused: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """{site: (B, H, W) on the CPU}: Σ_c a_c(place) · mean over places of ∂f/∂a_c (Selvaraju et al. 2017, eq. 1 and 2).

    Tokens are laid out as a map; those in front that have no place (class, registers) are left out of the mean and of
    the map, and of several strides the finest is used. Upsampled bilinearly to the images; `relu` keeps the positive
    part, before the upsampling as the paper's order has it.

    refused : filled with {site: why} of sites that have no Grad-CAM while the others go on; without it the first of
        them raises InputError. Names and axes that the model does not have raise always
    """
    going = {site.name: site for site in (_resolved(model, site) for site in sites)}
    attempt = partial(_attempt, going=going, refused=refused)
    for site in list(going.values()):
        with attempt(site):
            _refuse_without_places(site)
    maps: dict[str, list[Tensor]] = {name: [] for name in going}
    size = tuple(images.shape[-2:])
    with quiet(model), torch.enable_grad():
        for rows in torch.arange(len(images), device=images.device).split(batch):
            for site, activation, gradient in _at_sites(model, images[rows], target, rows, going, attempt):
                with attempt(site):
                    cam = _cam(site, activation, gradient, size)
                    cam = F.interpolate(F.relu(cam) if relu else cam, size=size, mode="bilinear", align_corners=False)
                    maps[site.name].append(cam[:, 0].cpu())
    return {name: torch.cat(maps[name]) for name in going}


@contextmanager
def _attempt(site: Site, *, going: dict[str, Site], refused: dict[str, str] | None) -> Iterator[None]:
    """What is refused at a site ends that site alone where the refused are collected."""
    try:
        yield
    except InputError as error:
        if refused is None:
            raise
        refused[site.name] = str(error)
        del going[site.name]


def _resolved(model: nn.Module, site: Site | str) -> Site:
    try:
        (found,) = resolve_sites(model, [site])
    except ValueError as error:
        raise InputError(str(error)) from error
    return found


def _refuse_without_places(site: Site) -> None:
    if not site.spatial:
        kind = "queries" if "query" in site.axes else "features without a place"
        raise InputError(
            f"site {site.name!r} has {kind} (axes {site.axes}), so Grad-CAM has no map there; choose a site with "
            "height and width, or tokens with strides, such as those of `sites_at_depths`"
        )


def _at_sites(
    model: nn.Module, images: Tensor, target: Target, rows: Tensor, going: Mapping[str, Site], attempt: Callable
) -> list[tuple[Site, Tensor, Tensor]]:
    """(site, its activations, gradients of the target in them) of one batch, of the sites that are not refused."""
    if not going:
        return []
    scores, kept = _pass(model, images, target, rows, list(going.values()))
    for site in list(going.values()):
        with attempt(site):
            tensor, version = kept[site.name]
            if tensor._version != version:
                raise InputError(
                    f"site {site.name!r} is changed in place by what follows it; choose the module that follows"
                )
            if not (tensor.requires_grad and scores.requires_grad):
                raise _without_gradient(site.name, target)
    sites = list(going.values())
    activations = [kept[site.name][0] for site in sites]
    gradients = torch.autograd.grad(scores.sum(), activations, allow_unused=True) if sites else ()
    found = []
    for site, activation, gradient in zip(sites, activations, gradients):
        with attempt(site):
            if gradient is None:
                raise _without_gradient(site.name, target)
            found.append((site, activation.detach(), gradient))
    return found


def _pass(
    model: nn.Module, images: Tensor, target: Target, rows: Tensor, sites: Sequence[Site]
) -> tuple[Tensor, dict[str, tuple[Tensor, int]]]:
    """(target of a batch, {site: what it emitted and how often that had been changed in place by then})."""

    def keep(site: Site, tensor: Tensor) -> tuple[Tensor, int]:
        check_batch(site, tensor, len(images))
        return tensor, tensor._version

    with Listener(model, sites, keep) as listener:
        scores = target(model, images.clone().requires_grad_(), rows)
        try:
            return scores, listener.take()
        except ValueError as error:
            raise InputError(str(error)) from error


def _without_gradient(name: str, target: Target) -> InputError:
    return InputError(
        f"site {name!r} has no gradient: the target ({target.name}) does not depend on it, or the model cuts the "
        "gradient off; choose another site, or kernel_shap or occlusion, which need none"
    )


def _cam(site: Site, activation: Tensor, gradient: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 1, h, w) of one site, at its own resolution."""
    maps, slopes = (to_map(tensor, site, size).float() for tensor in (activation, gradient))
    if site.prefix and gradient.any() and not slopes.any():
        raise InputError(
            f"at site {site.name!r} the target depends on the first {site.prefix} tokens alone, which have no place: "
            "Grad-CAM is zero there; choose an earlier site"
        )
    weights = slopes.mean((2, 3), keepdim=True)
    if slopes.any() and (weights.abs().amax((1, 2, 3)) <= ROUNDING * slopes.abs().mean((1, 2, 3))).all():
        raise InputError(
            f"at site {site.name!r} every channel's mean gradient is zero up to rounding, so Grad-CAM has no weights: "
            "what follows normalises each channel over the places, and its mean level no longer counts; choose another "
            "site"
        )
    return (weights * maps).sum(1, keepdim=True)


def sites_at_depths(
    model: nn.Module, image_size: int, depths: Sequence[float] = DEPTHS, *, sites: Sequence[Site] | None = None
) -> dict[float, Site]:
    """{depth: site} among the sites that have a map of more than one place, in the order in which they fire.

    depths : in (0, 1]; of n sites the k-th is at depth k/n, and the nearest is taken
    sites : to choose from; the model's own, of encoder and decoder, when not given
    """
    if not all(0 < depth <= 1 for depth in depths):
        raise InputError(f"depths are shares of the model in (0, 1], got {list(depths)}")
    blank = torch.zeros(1, 3, image_size, image_size, device=device_of(model))
    listed = list_sites(model, blank, sites)
    fit = [site for site in listed if site.spatial and math.prod(map_size(site, (image_size, image_size))) > 1]
    if not fit:
        names = closest("encoder", [site.name for site in listed]) if listed else "none that is declared"
        raise InputError(f"no site of this model has a map (its sites: {names}); give `sites` with their axes")
    return {depth: fit[max(round(depth * len(fit)), 1) - 1] for depth in depths}
