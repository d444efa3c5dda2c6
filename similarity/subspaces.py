"""Measures of the features' column spaces and shapes: CCA and its kin, Procrustes, linear regression.

Each side is prepared once (an orthonormal basis, a centred shape, the folds' projections); a pair then costs a small
matrix product and its singular values. Prepared sides can be `permuted` without preparing them anew.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from similarity.inputs import FewImages, NotComputable, centered

# ------------------------------------------------------------------------------------------- canonical correlations


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns Q (n, k) of one side's centred features; `loadings` = QᵀX (k, p)."""

    Q: Tensor
    loadings: Tensor
    squared: bool

    def permuted(self, rows: Tensor) -> Basis:
        """The basis of the same features with their rows in another order."""
        return replace(self, Q=self.Q[rows])


def basis(
    X: Tensor, *, side: str, variance: float = 1.0, components: int | None = None, squared: bool = False
) -> Basis:
    """Basis of the leading principal components: those that hold `variance` of the total, or the first `components`."""
    if not 0 < variance <= 1:
        raise ValueError(f"variance must be in (0, 1], got {variance}")
    if components is not None and components < 1:
        raise ValueError(f"components must be at least 1, got {components}")
    U, S, Vt = torch.linalg.svd(centered(X.double()), full_matrices=False)
    S = S[_rounding(X, X.dtype) < S]  # what is only rounding would count as much as any other dimension
    share = (S**2).cumsum(0) / (S**2).sum()
    keep = len(S) if variance == 1 else int((share < variance).sum()) + 1
    keep = keep if components is None else min(components, len(S))
    return Basis(U[:, :keep], S[:keep, None] * Vt[:keep], squared)


def _rounding(X: Tensor, precision: torch.dtype) -> float:
    """Singular values of this size come from rounding alone, 32 units in the last place of the largest feature.

    Random errors of size ε make singular values up to ε(√n + √p); a layer's sums round more often than once, and
    subtracting a large mean leaves errors of the mean's size.
    """
    return 32 * torch.finfo(precision).eps * float(X.abs().max()) * max(X.shape) ** 0.5


def svcca_basis(X: Tensor, *, side: str, variance: float = 0.99, components=None, squared: bool = False) -> Basis:
    """As `basis`, with SVCCA's 99 %."""
    return basis(X, side=side, variance=variance, components=components, squared=squared)


def mean_correlation(left: Basis, right: Basis) -> float:
    """Mean canonical correlation ρ (or ρ²): singular values of QxᵀQy, min(kx, ky) of them."""
    _warn_of_few_images(left, right)
    rho = torch.linalg.svdvals(left.Q.T @ right.Q)
    return float((rho**2 if left.squared else rho).mean())


def projection_weighted(left: Basis, right: Basis) -> float:
    """Σ αᵢ ρᵢ / Σ αᵢ with αᵢ = Σⱼ |⟨hᵢ, xⱼ⟩|, hᵢ the canonical variates of the left side, xⱼ its features."""
    _warn_of_few_images(left, right)
    U, rho, _ = torch.linalg.svd(left.Q.T @ right.Q, full_matrices=False)
    alpha = (U.T @ left.loadings).abs().sum(1)  # hᵢ = Qx uᵢ
    return float((alpha * rho).sum() / alpha.sum())


def _warn_of_few_images(left: Basis, right: Basis) -> None:
    n, (kx, ky) = len(left.Q), (left.Q.shape[1], right.Q.shape[1])
    if kx + ky > n - 1:
        warnings.warn(
            f"canonical correlations of {kx} + {ky} components of {n} images: at least {kx + ky - n + 1} of them are 1 "
            "by construction; use more images or fewer components",
            FewImages,
            stacklevel=5,
        )


# -------------------------------------------------------------------------------------------------------- Procrustes

NEARLY_EQUAL = 1e-6


@dataclass(frozen=True)
class Shape:
    """Centred features of unit Frobenius norm, rotated into at most n dimensions: (n, min(n, p))."""

    scores: Tensor
    squared: bool = False

    def permuted(self, rows: Tensor) -> Shape:
        """The shape of the same features with their rows in another order."""
        return replace(self, scores=self.scores[rows])


def shape(X: Tensor, *, side: str, squared: bool = False) -> Shape:
    """A rotation of the features changes no Procrustes distance: more features than images are reduced by QR."""
    X = centered(X.double())
    X = torch.linalg.qr(X.T, mode="r").R.T if X.shape[1] > X.shape[0] else X
    return Shape(X / torch.linalg.matrix_norm(X), squared)


def procrustes(left: Shape, right: Shape) -> float:
    """d with d² = 2 − 2‖XᵀY‖_* (or d²)."""
    cross = left.scores.T @ right.scores
    squared = 2 - 2 * torch.linalg.svdvals(cross).sum()
    if squared < NEARLY_EQUAL:  # the difference of two equal terms: take the residual of the best rotation instead
        U, _, Vt = torch.linalg.svd(cross, full_matrices=False)
        squared = _residual(left.scores, right.scores, U @ Vt)
    return float(squared if left.squared else squared.sqrt())


def _residual(X: Tensor, Y: Tensor, rotation: Tensor) -> Tensor:
    """‖XR − Y‖²_F for the (p, q) partial isometry R, and what R leaves out of X where X is the wider side."""
    turned = X @ rotation
    lost = ((X - turned @ rotation.T) ** 2).sum() if X.shape[1] > Y.shape[1] else 0.0
    return ((turned - Y) ** 2).sum() + lost


def angle(left: Shape, right: Shape) -> float:
    """θ = arccos ‖XᵀY‖_* in radians, as 2·arcsin(d/2): exact for small angles, too."""
    return float(2 * np.arcsin(procrustes(replace(left, squared=False), right) / 2))


# -------------------------------------------------------------------------------------------------- linear regression


@dataclass(frozen=True)
class Fit:
    """One side of a cross-validated regression; its folds' projections are made when it is first used to predict."""

    X: Tensor
    rounded_as: torch.dtype
    side: str
    folds: int
    seed: int
    rows_per_image: int

    def permuted(self, rows: Tensor) -> Fit:
        """The same features with their rows in another order."""
        return replace(self, X=self.X[rows])

    @cached_property
    def projections(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(held-out rows, training rows, H) of every fold: H Y_train predicts Y_held-out, both minus Y_train's mean."""
        made, rounding = [], _rounding(self.X, self.rounded_as)
        for test, train in self._folds():
            mean = self.X[train].mean(0)
            inverse = torch.linalg.pinv(self.X[train] - mean, atol=rounding, rtol=0.0)
            made.append((test, train, (self.X[test] - mean) @ inverse))
        return made

    def _folds(self) -> list[tuple[Tensor, Tensor]]:
        images = len(self.X) // self.rows_per_image
        if not 2 <= self.folds <= images:
            raise ValueError(f"folds must be from 2 to the number of images ({images}), got {self.folds}")
        rows = np.arange(images * self.rows_per_image).reshape(images, self.rows_per_image)
        order = np.random.default_rng(self.seed).permutation(images)
        held_out = [rows[np.sort(part)].ravel() for part in np.array_split(order, self.folds)]
        return [(torch.as_tensor(test), torch.as_tensor(np.setdiff1d(rows, test))) for test in held_out]


def fit(X: Tensor, *, side: str, folds: int = 5, seed: int = 0, rows_per_image: int = 1) -> Fit:
    """A side of `held_out_r2`."""
    return Fit(X.double(), X.dtype, side, folds, seed, rows_per_image)


def held_out_r2(left: Fit, right: Fit) -> float:
    """1 − Σ‖y − ŷ‖² / Σ‖y − ȳ_train‖² over the held-out images of all folds, y predicted linearly from the left."""
    _warn_of_exact_fit(left)
    residual, total = 0.0, 0.0
    for test, train, projection in left.projections:
        mean = right.X[train].mean(0)
        target = right.X[test] - mean
        residual += ((target - projection @ (right.X[train] - mean)) ** 2).sum()
        total += (target**2).sum()
    if total == 0:
        raise NotComputable(f"{right.side}: the held-out images have the training images' mean; nothing to predict")
    return float(1 - residual / total)


def _warn_of_exact_fit(left: Fit) -> None:
    rows = min(len(train) for _, train, _ in left.projections)
    if left.X.shape[1] >= rows:
        warnings.warn(
            f"linear regression on {left.X.shape[1]} features of {rows} rows fits them exactly; the held-out R² then "
            "says little: use more images or fewer features",
            FewImages,
            stacklevel=5,
        )
