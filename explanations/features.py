"""Explanations by covering parts of an image: the answers to partly covered pictures, and what features are worth.

KernelSHAP and occlusion over any features, in batches that run over images and coverings together. captum's KernelShap
takes as long where its coverings are batched (nearly all of it is the model's), but one image at a time, with unpaired
coalitions, and efficient only up to a large weight: hence our own, tested against it. Models, targets and pictures come
checked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from explanations import kernel_shap
from explanations.covering import counts_of, features_of, partly
from explanations.superpixels import superpixels
from explanations.targets import Target, quiet
from utils import InputError

FEATURES = ("a number (cells a side of a grid)", "superpixels:n (about n by SLIC)", "a map of whole numbers")


def cut(features: int | str | Tensor, images: Tensor) -> tuple[Tensor, str]:
    """(the number of every pixel's feature, (B, H, W) int64; what the features are, in words).

    features : cells a side of a grid; 'superpixels:n', about n of each image's own (`superpixels.superpixels`); or a
        map, (H, W) or (B, H, W), numbered from 0 without a gap in each image
    """
    if not isinstance(features, str):
        words = f"grid {features} × {features}" if isinstance(features, int) else "superpixels"
        return features_of(features, images), words
    kind, _, count = features.partition(":")
    if kind != "superpixels" or not count.isdecimal():
        raise InputError(f"unknown features {features!r}; choose from {'; '.join(FEATURES)}")
    return features_of(superpixels(images, int(count)), images), f"superpixels (SLIC, about {int(count)})"


def picture_scores(
    model: nn.Module,
    target: Target,
    images: Tensor,
    missing: Tensor,
    keep: Callable[[Tensor, Tensor], Tensor],
    count: int,
    batch: int,
) -> Tensor:
    """The target of `count` pictures of each of B images, (B, count) float64 on the CPU; `batch` pictures a pass.

    keep : (rows (N,), which of the count (N,)) -> (N, H, W) bool, or what broadcasts to it: where the image is kept
    """
    scores = []
    with quiet(model), torch.no_grad():
        for pairs in torch.arange(len(images) * count, device=images.device).split(batch):
            rows, which = pairs // count, pairs % count
            scores.append(target(model, partly(images[rows], missing[rows], keep(rows, which)), rows).cpu())
    return torch.cat(scores).view(len(images), count)


def end_scores(model: nn.Module, target: Target, images: Tensor, missing: Tensor, batch: int) -> Tensor:
    """(B, 2): the target of the baseline, and of the image."""
    return picture_scores(model, target, images, missing, lambda _, which: (which == 1)[:, None, None], 2, batch)


def coalition_scores(
    model: nn.Module,
    target: Target,
    images: Tensor,
    missing: Tensor,
    features: Tensor,
    members: np.ndarray,
    batch: int,
) -> np.ndarray:
    """The target of every image with some features kept: features (B, H, W), members (S, F) bool -> (B, S)."""
    table = torch.from_numpy(members).to(images.device)

    def keep(rows: Tensor, which: Tensor) -> Tensor:
        return table[which[:, None, None], features[rows]]

    return picture_scores(model, target, images, missing, keep, len(members), batch).numpy()


def shapley(
    model: nn.Module,
    target: Target,
    images: Tensor,
    missing: Tensor,
    features: Tensor,
    *,
    samples: int,
    seed: int,
    batch: int,
) -> tuple[kernel_shap.Fitted, np.ndarray]:
    """(Shapley values of the features (B, F), nan past an image's last; target of baseline and image (B, 2))."""
    counts = np.array(counts_of(features))
    designs = {count: kernel_shap.coalitions(count, samples, seed) for count in np.unique(counts).tolist()}
    values, errors = (np.full((len(images), counts.max()), np.nan) for _ in range(2))
    ends = np.empty((len(images), 2))
    for count, (members, weights) in designs.items():
        of = np.flatnonzero(counts == count)
        asked = np.concatenate([np.zeros((1, count), bool), np.ones((1, count), bool), members])
        part = torch.from_numpy(of).to(images.device)
        answers = coalition_scores(model, _of(target, part), images[part], missing[part], features[part], asked, batch)
        ends[of] = answers[:, :2]
        fitted = kernel_shap.shapley_values(members, weights, answers[:, 2:], *ends[of].T)
        values[of, :count], errors[of, :count] = fitted.values, fitted.errors
    return kernel_shap.Fitted(values, errors), ends


def _of(target: Target, part: Tensor) -> Target:
    """The same target of some of its images."""
    return Target(target.name, lambda model, pictures, rows: target(model, pictures, part[rows]))


def occluded(
    model: nn.Module, target: Target, images: Tensor, missing: Tensor, features: Tensor, *, batch: int
) -> Tensor:
    """Target of the image less that of the image without one feature, (B, F); nan past an image's last feature."""
    counts = torch.tensor(counts_of(features))
    most = int(counts.max())
    asked = np.concatenate([np.ones((1, most), bool), ~np.eye(most, dtype=bool)])
    answers = torch.from_numpy(coalition_scores(model, target, images, missing, features, asked, batch))
    values = answers[:, :1] - answers[:, 1:]
    return torch.where(torch.arange(most) < counts[:, None], values, torch.nan)
