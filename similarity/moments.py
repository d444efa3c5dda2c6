"""Linear CKA in feature space: everything the estimators need is a sum over rows, so no n × n Gram is formed.

For X (n, p) and Y (n, q) with centred columns, a = row norms² of X and b those of Y (SCIENCE: HSIC₁ in feature space):
    biased:   D(X, Y) = ‖XᵀY‖²_F
    debiased: D(X, Y) = ‖XᵀY‖²_F − n/(n − 2) · aᵀb + Σa Σb / ((n − 1)(n − 2))
and CKA = D(X, Y) / √(D(X, X) D(Y, Y)). Exact, in O(n p q) time and O(p q) memory.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from similarity.measures import NotComputable, as_matrix


def dot(X: Tensor, Y: Tensor, debiased: bool = True) -> Tensor:
    """D(X, Y) of two matrices with centred columns, float64: n(n − 3)·HSIC₁, or (n − 1)²·HSIC₀."""
    n = len(X)
    cross = torch.linalg.matrix_norm(X.T @ Y) ** 2
    if not debiased:
        return cross
    a, b = (X**2).sum(1), (Y**2).sum(1)
    return cross - n / (n - 2) * (a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2))


class FeatureSide:
    """One side's centred features and its own D(X, X): what a plane shares between its pairs."""

    def __init__(self, X, side: str = "X", debiased: bool = True):
        X = as_matrix(X, side)
        self.features, self.debiased = X - X.mean(0), debiased
        self.norm = dot(self.features, self.features, debiased)
        if self.norm <= 1e-13 * (self.features**2).sum() ** 2:  # rounding error of a difference of equal terms
            raise NotComputable(f"{side}: all images are equally similar to each other, so centring leaves nothing")

    def permuted(self, rows: Tensor) -> FeatureSide:
        """The same side with its rows in another order; its own D does not change."""
        other = copy.copy(self)
        other.features = self.features[rows]
        return other

    def cka(self, other: FeatureSide) -> float:
        """Linear CKA with another side of the same rows."""
        if len(self.features) != len(other.features):
            raise ValueError(
                f"X has {len(self.features)} rows and Y has {len(other.features)}; rows must be the same images in "
                "the same order"
            )
        return float(dot(self.features, other.features, self.debiased) / torch.sqrt(self.norm * other.norm))


def linear_cka(X, Y, *, debiased: bool = True) -> float:
    """Linear CKA without Gram matrices; equal to `measures.linear_cka` to rounding."""
    return FeatureSide(X, "X", debiased).cka(FeatureSide(Y, "Y", debiased))
