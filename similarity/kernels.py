"""Kernel (Gram) matrices between images, centred so that their inner products are HSIC estimators.

K = XXᵀ or an RBF kernel; K is (n, n) with images as rows and columns.
"""

from __future__ import annotations

import math
import numbers

import numpy as np
import torch
from torch import Tensor

from similarity.inputs import NotComputable, centered

SAME = 1e-13  # squared distances below this share of the squared norms are rounding: the two rows are identical


def double_center(K: Tensor) -> Tensor:
    """HKH with H = I − 11ᵀ/n: the Gram matrix of column-centred features."""
    return K - K.mean(0, keepdim=True) - K.mean(1, keepdim=True) + K.mean()


def u_center(K: Tensor) -> Tensor:
    """U-centred Gram matrix, whose inner products are Song's unbiased HSIC₁ times n(n − 3).

    With K̃ the matrix without its diagonal, r = K̃1/(n − 2) and g = 1ᵀK̃1/((n − 1)(n − 2)): K̃ᵢⱼ − rᵢ − rⱼ + g off the
    diagonal, 0 on it (Song et al. 2012; Székely & Rizzo 2014).
    """
    n = len(K)
    K = K - torch.diag(torch.diag(K))
    rows = K.sum(1) / (n - 2)
    centred = K - rows[:, None] - rows[None, :] + K.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(torch.diag(centred))


def unit_gram(K: Tensor, debiased: bool, side: str) -> Tensor:
    """The centred Gram matrix with Frobenius norm 1: the inner product of two of them is CKA."""
    centred = u_center(K) if debiased else double_center(K)
    norm = torch.linalg.matrix_norm(centred)
    # centring leaves rounding errors of order eps·‖K‖; below that there is no similarity structure to normalise
    if norm <= 1e-12 * torch.linalg.matrix_norm(K):
        raise equally_similar(side)
    return centred / norm


def equally_similar(side: str) -> NotComputable:
    """What to say where centring leaves nothing."""
    return NotComputable(f"{side}: all images are equally similar to each other, so centring leaves nothing")


def linear_gram(X: Tensor, *, side: str, debiased: bool = True) -> Tensor:
    """Unit-norm centred XXᵀ."""
    X = centered(X.double())  # changes neither estimator, and keeps the products small when means are far from zero
    return unit_gram(X @ X.T, debiased, side)


def rbf_gram(X: Tensor, *, side: str, fraction: float = 1.0, debiased: bool = True) -> Tensor:
    """Unit-norm centred exp(−‖xᵢ − xⱼ‖² / 2σ²), σ = fraction × the median pairwise distance of this side."""
    check_fraction(fraction)
    squared = squared_distances(X.double())
    sigma = fraction * refuse_no_distance(median_distance(condensed(squared)), side)
    return unit_gram(torch.exp(squared / (-2 * sigma**2)), debiased, side)


def check_fraction(fraction: float) -> None:
    """A bandwidth is a positive share of the median distance."""
    if not isinstance(fraction, numbers.Real) or not fraction > 0:
        raise ValueError(f"fraction must be above 0 (a share of the median distance), got {fraction}")


def squared_distances(X: Tensor) -> Tensor:
    """‖xᵢ − xⱼ‖², (n, n), in X's precision; 0 between identical rows."""
    X = centered(X)  # small norms, so that the difference of products loses nothing
    return squared_to_all(X, (X**2).sum(1), slice(None))


def squared_to_all(X: Tensor, squares: Tensor, rows: slice) -> Tensor:
    """‖xᵢ − xⱼ‖² of some rows of centred X to all its rows, given squares = ‖xᵢ‖²."""
    both = squares[rows, None] + squares[None, :]
    distances = torch.addmm(both, X[rows], X.T, alpha=-2)
    return distances.masked_fill_(distances <= SAME * both, 0.0)


def below_diagonal(square: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of every pair of images once, (n(n − 1)/2,) each."""
    rows, columns = torch.tril_indices(*square.shape, -1, device=square.device)
    return rows, columns


def condensed(square: Tensor) -> Tensor:
    """The entries of a symmetric (n, n) matrix for every pair of images once, (n(n − 1)/2,); a copy."""
    return square[below_diagonal(square)]


def median_distance(squared: Tensor) -> float:
    """Median of the pairwise distances, given their squares in one vector, which is put in another order."""
    ordered = squared.cpu().numpy()
    middle = (len(ordered) - 1) / 2
    low, high = math.floor(middle), math.ceil(middle)
    ordered.partition(sorted({low, high}))
    return float(np.sqrt(ordered[[low, high]].astype(np.float64)).mean())


def refuse_no_distance(median: float, side: str) -> float:
    """The median distance, where it is above 0."""
    if median <= 0:
        raise NotComputable(f"{side}: more than half of the image pairs are identical, so its median distance is 0")
    return median


def inner(left: Tensor, right: Tensor) -> float:
    """Σᵢⱼ leftᵢⱼ rightᵢⱼ."""
    return float((left * right.to(left.device)).sum())
