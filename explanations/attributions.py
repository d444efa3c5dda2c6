"""Explanations of a model's answer: how much every pixel of an image counts for a number that the model gives.

Integrated Gradients (through captum), Grad-CAM at any site that has a map, KernelSHAP over cells or superpixels, and
occlusion, for any model and any `targets.Target`. The maps are signed and at the image's resolution. It
knows no study: what explanations are compared with is elsewhere, and so is whether they are faithful
(`checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from explanations import kernel_shap
from explanations.covering import Baseline, baseline_images, checked_images, counts_of, spread
from explanations.features import cut, end_scores, occluded, shapley
from explanations.grad_cam import cams
from explanations.grad_cam import sites_at_depths as sites_at_depths  # where Grad-CAM can be asked for
from explanations.targets import Target, device_of, quiet
from similarity import Site
from utils import InputError, pick

METHODS = {
    "integrated_gradients": "(x − b) · ∫ ∇f along the line from baseline b to image x, summed over colours",
    "grad_cam": "Σ over channels of activation · mean gradient, at a site",
    "kernel_shap": "Shapley values of features that are there or covered, each spread evenly over its pixels",
    "occlusion": "f(image) − f(image with one feature covered), spread evenly over the feature's pixels",
}
QUADRATURE = "gausslegendre"


@dataclass(frozen=True)
class Explained:
    """Maps of a method, and all that they depend on beside model and images.

    maps : (B, H, W) on the CPU, float64; Grad-CAM's float32
    method : one of `METHODS`
    settings : in words and numbers: target, baseline, steps, …
    values : (B, F) float64 of each feature, by the methods that cover features; nan past an image's last feature. The
        pixels of a feature share its value, so that a map sums to what the values sum to
    gap : (B,) float64, the sum of the map less (target of the image − target of the baseline): what Integrated
        Gradients lack in completeness and KernelSHAP in efficiency; None where no axiom is promised
    errors : (B, F) float64, KernelSHAP's standard errors of the values, from having asked for a sample of coalitions
    """

    maps: Tensor
    method: str
    settings: Mapping[str, object]
    values: Tensor | None = None
    gap: Tensor | None = None
    errors: Tensor | None = None


class Passes(NamedTuple):
    """Of one image through the model."""

    forward: int
    backward: int


def explain(
    method: str,
    model: nn.Module,
    images: Tensor,
    target: Target,
    *,
    site: Site | str | None = None,
    baseline: Baseline = "mean",
    steps: int = 32,
    features: int | str | Tensor = 7,
    samples: int = 200,
    relu: bool = False,
    batch: int = 16,
    seed: int = 0,
) -> Explained:
    """Maps (B, H, W) of images (B, 3, H, W) in [0, 1]; the model is in eval mode meanwhile, and left as it was.

    method : one of `METHODS`
    site : of Grad-CAM, by name or with its axes: a map, or tokens that have places
    baseline : what stands where something is missing, see `covering.baseline_images`; not of Grad-CAM
    steps : of Integrated Gradients' path, a Gauss-Legendre quadrature
    features : of KernelSHAP and occlusion: cells a side of a grid, 'superpixels:40' (about so many of each image's
        own), or a map of them, see `features.cut`
    samples : coalitions of KernelSHAP; all of them where there are no more, and then the values are exact
    relu : Grad-CAM's positive part alone, as in its paper; False keeps the sign
    batch : pictures in one pass, which bounds the memory; results do not depend on it but for rounding
    seed : of the coalitions. One draw serves all images of a call, so that two models of the same seed are asked the
        same questions about an image, and the same about all other images
    """
    _check_settings(method, site, {"steps": steps, "samples": samples, "batch": batch})
    if method == "grad_cam":
        (explained,) = grad_cams(model, images, target, [site], relu=relu, batch=batch).values()
        return explained
    images = checked_images(images).to(device_of(model))
    target.check(len(images))
    missing, words = baseline_images(images, baseline)
    stated = {"target": target.name, "baseline": words}
    if method == "integrated_gradients":
        return _integrated_gradients(model, target, images, missing, stated, steps, batch)
    cells, stated["features"] = cut(features, images)
    if method == "occlusion":
        values = occluded(model, target, images, missing, cells, batch=batch)
        return Explained(spread(values, cells), method, stated, values)
    return _kernel_shap(model, target, images, missing, cells, stated, samples, seed, batch)


def _check_settings(method: str, site: Site | str | None, numbers: Mapping[str, int]) -> None:
    pick("method", method, METHODS)
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    if (site is None) == (method == "grad_cam"):
        need = "needs a site, such as one of `sites_at_depths`" if site is None else "takes no site: that is grad_cam's"
        raise InputError(f"method {method!r} {need}")


def _kernel_shap(
    model: nn.Module,
    target: Target,
    images: Tensor,
    missing: Tensor,
    cells: Tensor,
    stated: dict,
    samples: int,
    seed: int,
    batch: int,
) -> Explained:
    fitted, ends = shapley(model, target, images, missing, cells, samples=samples, seed=seed, batch=batch)
    every = all(kernel_shap.complete(count, samples) for count in counts_of(cells))
    stated |= {"coalitions": "all"} if every else {"coalitions": samples, "seed": seed}
    values, errors = torch.from_numpy(fitted.values), torch.from_numpy(fitted.errors)
    maps = spread(values, cells)
    gap = maps.sum((1, 2)) - torch.from_numpy(ends[:, 1] - ends[:, 0])
    return Explained(maps, "kernel_shap", stated, values, gap, errors)


def cost(method: str, *, steps: int = 32, features: int = 49, samples: int = 200) -> Passes:
    """The passes that one image's explanation takes, so that a run can say its cost before it begins.

    features : how many an image has (of a 7 × 7 grid 49), unlike the cells a side that `explain` takes; of superpixels
        as many as the image with most of them, which occlusion asks of all
    """
    pick("method", method, METHODS)
    return {
        "integrated_gradients": Passes(steps + 2, steps),
        "grad_cam": Passes(1, 1),
        "kernel_shap": Passes(kernel_shap.asked(features, samples), 0),
        "occlusion": Passes(features + 1, 0),
    }[method]


# ---- Integrated Gradients ---------------------------------------------------------------------------------------


def _integrated_gradients(
    model: nn.Module, target: Target, images: Tensor, missing: Tensor, stated: dict, steps: int, batch: int
) -> Explained:
    """Sundararajan et al. 2017, eq. 1; the gap is what the quadrature leaves of their completeness axiom."""
    method = IntegratedGradients(lambda pictures, rows: target(model, pictures, rows))
    method.gradient_func = _gradients
    maps = []
    with quiet(model):
        for rows in torch.arange(len(images), device=images.device).split(batch):
            attributed = method.attribute(
                images[rows],
                baselines=missing[rows],
                additional_forward_args=rows,
                n_steps=steps,
                method=QUADRATURE,
                internal_batch_size=batch,
            )
            maps.append(attributed.detach().double().sum(1).cpu())
    maps = torch.cat(maps)
    ends = end_scores(model, target, images, missing, batch)
    change = ends[:, 1] - ends[:, 0]
    if change.any() and not maps.any():
        raise InputError(
            f"no gradient of the target ({target.name}) reaches the image, although it changes by up to "
            f"{float(change.abs().max()):.3g} from baseline to image; use kernel_shap or occlusion for this model"
        )
    stated |= {"steps": steps, "quadrature": QUADRATURE}
    return Explained(maps, "integrated_gradients", stated, gap=maps.sum((1, 2)) - change)


def _gradients(forward_fn: Callable, inputs: tuple, target_ind=None, additional_forward_args=()) -> tuple:
    """What captum integrates; zero where the answer does not depend on the input, which captum itself refuses."""
    with torch.enable_grad():
        scores = forward_fn(*inputs, *additional_forward_args)
        if not scores.requires_grad:
            return tuple(torch.zeros_like(each) for each in inputs)
        return torch.autograd.grad(scores.sum(), inputs, materialize_grads=True)


# ---- Grad-CAM ---------------------------------------------------------------------------------------------------


def grad_cams(
    model: nn.Module,
    images: Tensor,
    target: Target,
    sites: Sequence[Site | str],
    *,
    relu: bool = False,
    batch: int = 16,
    refused: dict[str, str] | None = None,
) -> dict[str, Explained]:
    """{site: Grad-CAM} of all sites in one pass, see `grad_cam.cams`; as `explain`, which takes one site.

    refused : filled with {site: why} where Grad-CAM is impossible, so that the other sites go on; without it (None) the
        first such site raises InputError
    """
    images = checked_images(images).to(device_of(model))
    target.check(len(images))
    stated = {"target": target.name, "relu": relu, "upsampling": "bilinear"}
    maps = cams(model, images, target, sites, relu=relu, batch=batch, refused=refused)
    return {name: Explained(each, "grad_cam", {"site": name, **stated}) for name, each in maps.items()}
