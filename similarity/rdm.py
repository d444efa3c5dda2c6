"""Representational dissimilarities between images, and what makes two sets of them comparable (RSA)."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor

from similarity.inputs import NotComputable
from similarity.kernels import below_diagonal, condensed, squared_distances

RDMS = ("correlation", "euclidean")
COMPARISONS = ("spearman", "pearson", "cosine", "kendall")


def rdm(X: Tensor, kind: str, side: str) -> Tensor:
    """(n, n) dissimilarities: 1 − Pearson correlation between images' features, or Euclidean distance."""
    if kind == "euclidean":
        return squared_distances(X).sqrt()
    if kind != "correlation":
        raise ValueError(f"unknown rdm {kind!r}; choose {' or '.join(map(repr, RDMS))}")
    if X.shape[1] < 2:
        raise NotComputable(f"{side} has one feature per image; a correlation RDM needs at least 2 features")
    rows = X - X.mean(1, keepdim=True)
    norms = rows.norm(dim=1, keepdim=True)
    if (norms <= 1e-12 * X.norm(dim=1, keepdim=True)).any():
        raise NotComputable(f"{side}: an image has the same value in all its features; use rdm='euclidean'")
    rows = rows / norms
    return 1 - rows @ rows.T


def comparable(values: Tensor, compare: str, side: str) -> Tensor:
    """Condensed dissimilarities (n(n − 1)/2,) made ready: their inner product with another side's is the result.

    Spearman: centred ranks of unit norm, ties averaged; Pearson: centred, unit norm; cosine: unit norm; Kendall: as
    they are, to be ordered by `kendall_tau_a`.
    """
    if compare not in COMPARISONS:
        raise ValueError(f"unknown compare {compare!r}; choose {', '.join(map(repr, COMPARISONS))}")
    if compare != "cosine" and values.max() - values.min() <= 1e-12 * values.abs().max():
        raise NotComputable(f"{side}: all image pairs are equally dissimilar, so RDMs cannot be compared")
    if compare in ("spearman", "kendall"):
        # ranks must not order equal distances by their rounding errors (two features: every correlation is ±1)
        values = torch.round(values / values.abs().max(), decimals=12)
    if compare == "kendall":
        return values
    if compare == "spearman":
        values = torch.as_tensor(average_ranks(values.cpu().numpy()), device=values.device)
    if compare != "cosine":
        values = values - values.mean()
    return values / values.norm()


def profile(X: Tensor, *, side: str, rdm: str = "correlation", compare: str = "spearman") -> Tensor:
    """(n, n) symmetric, zero diagonal: the comparable dissimilarities, each of the two times it stands there / √2."""
    dissimilarities = _rdm(X.double(), rdm, side)
    square = torch.zeros_like(dissimilarities)
    square[below_diagonal(square)] = comparable(condensed(dissimilarities), compare, side) / math.sqrt(2)
    return square + square.T


_rdm = rdm  # the option of `profile` has the field's name for it, too


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties averaged, float64: scipy's `rankdata` by numpy's vectorised sort, several times faster."""
    order = np.argsort(values)
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ranks = np.empty(len(values))
    if len(starts) == len(values):
        ranks[order] = np.arange(1, len(values) + 1)
        return ranks
    counts = np.diff(np.append(starts, len(values)))
    ranks[order] = np.repeat(starts + (counts + 1) / 2, counts)
    return ranks


def kendall_tau_a(left: Tensor, right: Tensor) -> float:
    """(concordant − discordant) / all pairs of image pairs; tied ones count as neither."""
    upper = np.triu_indices(len(left), 1)
    a, b = (np.asarray(side.cpu())[upper] for side in (left, right))
    pairs = len(a) * (len(a) - 1) / 2
    ties = [(counts * (counts - 1) / 2).sum() for counts in (np.unique(v, return_counts=True)[1] for v in (a, b))]
    tau_b = kendalltau(a, b).statistic
    return float(tau_b * math.sqrt((pairs - ties[0]) * (pairs - ties[1])) / pairs)
