"""The measures: pure functions f(X, Y) -> float of two matrices whose rows are the same images in the same order.

X is (n, p), Y is (n, q), tensors or arrays. Each measure is made of two steps, so that a plane of sites × sites can
share the first: `prepare(X)` turns one side into a representation whose rows are images, and `combine` turns two
of them into the number. Scalars are float64; no denominator gets an epsilon and no result is clamped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import kendalltau, rankdata
from torch import Tensor

SMALLEST_N = 4


class NotComputable(ValueError):
    """One side does not allow this measure (constant, too few rows or features); the message says why."""


class FewImages(UserWarning):
    """So few images that a measure is large by construction."""


# ------------------------------------------------------------------------------------------------------ the inputs


def as_matrix(X, side: str = "X") -> Tensor:
    """(n, p) float64 tensor on its own device; refuses what no measure can use, naming the side."""
    X = _as_tensor(X, side)
    if X.ndim != 2:
        raise ValueError(f"{side} must be (n images, p features), got shape {tuple(X.shape)}; pool or flatten it first")
    if len(X) < SMALLEST_N:
        raise NotComputable(f"{side} has {len(X)} rows; at least {SMALLEST_N} images are needed")
    # half precision is judged by float32's rounding: its own would call features constant that vary by a few percent
    rounding = min(torch.finfo(X.dtype).eps, torch.finfo(torch.float32).eps) if X.is_floating_point() else 0.0
    X = X.to(torch.float64)
    if not torch.isfinite(X).all():
        raise NotComputable(f"{side} holds NaN or infinite values; look for the layer that overflows")
    if X.shape[1] == 0 or _is_constant(X, 32 * rounding):
        raise NotComputable(f"{side} is constant: every image has the same features, so nothing can be compared")
    return X


def _is_constant(X: Tensor, tolerance: float) -> bool:
    """Whether no feature varies over images by more than rounding: `tolerance` × its size, or a typical feature's.

    Matrix products round a row differently by its place in the batch, so a site that sees no image is not constant
    to the last bit.
    """
    size = torch.maximum(X.abs().amax(0), X[0].abs().median())
    return bool((X.amax(0) - X.amin(0) <= tolerance * size).all())


def _as_tensor(X, side: str) -> Tensor:
    """Numbers of any layout and library as a tensor without gradient."""
    if not isinstance(X, Tensor):
        try:
            X = np.asarray(X)
        except ValueError as reason:
            raise ValueError(f"{side} is not a matrix: its rows differ in length") from reason
        if X.dtype.kind in "biuf":
            kept = X.dtype if X.dtype in (np.float16, np.float32) else np.float64
            X = torch.as_tensor(np.require(X, kept, ["C", "W"]))  # torch takes no negative strides
    if not isinstance(X, Tensor) or X.is_complex():
        raise ValueError(f"{side} holds {X.dtype} values; give real numbers")
    return X.detach()


def _combined(measure: Measure, X, Y, **options) -> float:
    """prepare both sides and combine them; the one route from two matrices to a number."""
    left, right = _as_tensor(X, "X"), _as_tensor(Y, "Y")
    if left.ndim == right.ndim == 2 and len(left) != len(right):
        raise ValueError(
            f"X has {len(left)} rows and Y has {len(right)}; rows must be the same images in the same order"
        )
    return measure.combine(
        measure.prepare(as_matrix(left, "X"), side="X", **options),
        measure.prepare(as_matrix(right, "Y"), side="Y", **options),
    )


# --------------------------------------------------------------------------------------------- centred Gram matrices


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
    centered = K - rows[:, None] - rows[None, :] + K.sum() / ((n - 1) * (n - 2))
    return centered - torch.diag(torch.diag(centered))


def _unit_gram(K: Tensor, debiased: bool, side: str) -> Tensor:
    centered = u_center(K) if debiased else double_center(K)
    norm = torch.linalg.matrix_norm(centered)
    # centring leaves rounding errors of order eps·‖K‖; below that there is no similarity structure to normalise
    if norm <= 1e-12 * torch.linalg.matrix_norm(K):
        raise NotComputable(f"{side}: all images are equally similar to each other, so centring leaves nothing")
    return centered / norm


def _linear_gram(X: Tensor, *, side: str, debiased: bool = True) -> Tensor:
    X = X - X.mean(0)  # changes neither estimator, and keeps the products small when means are far from zero
    return _unit_gram(X @ X.T, debiased, side)


def _rbf_gram(X: Tensor, *, side: str, fraction: float = 1.0, debiased: bool = True) -> Tensor:
    if not fraction > 0:
        raise ValueError(f"fraction must be above 0 (a share of the median distance), got {fraction}")
    distances = torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist")
    upper = torch.triu_indices(len(X), len(X), 1, device=X.device)
    median = distances[upper[0], upper[1]].quantile(0.5) if upper.shape[1] < 2**24 else _median(distances[tuple(upper)])
    if median == 0:
        raise NotComputable(f"{side}: more than half of the image pairs are identical, so its median distance is 0")
    return _unit_gram(torch.exp(-(distances**2) / (2 * (fraction * median) ** 2)), debiased, side)


def _median(values: Tensor) -> Tensor:
    """Median of many values (torch.quantile stops at 2²⁴)."""
    ordered = values.sort().values
    middle = (len(ordered) - 1) / 2
    return (ordered[math.floor(middle)] + ordered[math.ceil(middle)]) / 2


def _inner(left: Tensor, right: Tensor) -> float:
    return float((left * right.to(left.device)).sum())


# ------------------------------------------------------------------------------------------- canonical correlations


def _principal_basis(X: Tensor, *, side: str, variance: float = 0.99, squared: bool = False) -> tuple[Tensor, bool]:
    """Orthonormal (n, k) basis of the k leading principal components that hold `variance` of the total."""
    if not 0 < variance <= 1:
        raise ValueError(f"variance must be in (0, 1], got {variance}")
    U, S, _ = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    # numerical rank; subtracting a large mean leaves rounding of the mean's size
    S = S[torch.maximum(S[0], X.abs().max()) * max(X.shape) * torch.finfo(S.dtype).eps < S]
    share = (S**2).cumsum(0) / (S**2).sum()
    keep = len(S) if variance == 1 else int((share < variance).sum()) + 1
    return U[:, :keep], squared


def _mean_correlation(left: tuple[Tensor, bool], right: tuple[Tensor, bool]) -> float:
    """Mean canonical correlation ρ (or ρ²) over min(kx, ky) pairs."""
    (Qx, squared), (Qy, _) = left, right
    n, total = len(Qx), Qx.shape[1] + Qy.shape[1]
    if total > n - 1:
        warnings.warn(
            f"SVCCA keeps {Qx.shape[1]} + {Qy.shape[1]} components of {n} images: at least "
            f"{total - n + 1} canonical correlations are 1 by construction; use more images or a lower variance",
            FewImages,
            stacklevel=4,
        )
    rho = torch.linalg.svdvals(Qx.T @ Qy.to(Qx.device))
    return float((rho**2 if squared else rho).mean())


# -------------------------------------------------------------------------------------------------------------- RSA


def _rdm(X: Tensor, rdm: str, side: str) -> Tensor:
    """Condensed representational dissimilarities (n(n − 1)/2,) between images."""
    if rdm == "euclidean":
        distances = torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist")
    elif rdm == "correlation":
        if X.shape[1] < 2:
            raise NotComputable(f"{side} has one feature per image; a correlation RDM needs at least 2 features")
        rows = X - X.mean(1, keepdim=True)
        norms = rows.norm(dim=1, keepdim=True)
        if (norms <= 1e-12 * X.norm(dim=1, keepdim=True)).any():
            raise NotComputable(f"{side}: an image has the same value in all its features; use rdm='euclidean'")
        distances = 1 - (rows / norms) @ (rows / norms).T
    else:
        raise ValueError(f"unknown rdm {rdm!r}; choose 'correlation' or 'euclidean'")
    upper = torch.triu_indices(len(X), len(X), 1, device=X.device)
    return distances[upper[0], upper[1]]


def _rsa_profile(X: Tensor, *, side: str, rdm: str = "correlation", compare: str = "spearman") -> Tensor:
    """(n, n) symmetric, zero diagonal, unit norm: the RDM ready to be compared by an inner product."""
    n = len(X)
    values = _rdm(X, rdm, side)
    if compare != "cosine" and values.max() - values.min() <= 1e-12 * values.abs().max():
        raise NotComputable(f"{side}: all image pairs are equally dissimilar, so RDMs cannot be compared")
    if compare in ("spearman", "kendall"):
        # ranks must not order equal distances by their rounding errors (two features: every correlation is ±1)
        values = torch.round(values / values.abs().max(), decimals=12)
    if compare == "spearman":
        values = torch.as_tensor(rankdata(values.cpu().numpy()), device=X.device)
    if compare in ("spearman", "pearson"):
        values = values - values.mean()
    elif compare not in ("cosine", "kendall"):
        raise ValueError(f"unknown compare {compare!r}; choose 'spearman', 'pearson', 'cosine' or 'kendall'")
    norm = values.norm()
    profile = X.new_zeros(n, n)
    upper = torch.triu_indices(n, n, 1, device=X.device)
    profile[upper[0], upper[1]] = values / norm / math.sqrt(2)  # each pair stands twice in the symmetric matrix
    return profile + profile.T


def _kendall_tau_a(left: Tensor, right: Tensor) -> float:
    """(concordant − discordant) / all pairs of image pairs; tied ones count as neither."""
    upper = np.triu_indices(len(left), 1)
    a, b = (np.asarray(side.cpu())[upper] for side in (left, right))
    pairs = len(a) * (len(a) - 1) / 2
    ties = [(counts * (counts - 1) / 2).sum() for counts in (np.unique(v, return_counts=True)[1] for v in (a, b))]
    tau_b = kendalltau(a, b).statistic
    return float(tau_b * math.sqrt((pairs - ties[0]) * (pairs - ties[1])) / pairs)


# ------------------------------------------------------------------------------------------------ the table of them


@dataclass(frozen=True)
class Measure:
    """How a measure is computed, and what it does not see.

    prepare : (X, side=, **options) -> what one side contributes; its rows (and columns, if `gram`) are images
    combine : (prepared X, prepared Y) -> float
    gram : whether `combine` is the inner product of two (n, n) matrices, so that a plane is one GEMM
    invariances : of 'permutation', 'orthogonal', 'scale', 'translation', 'invertible' (maps of the features)
    """

    name: str
    label: str
    prepare: Callable
    combine: Callable
    gram: bool
    invariances: frozenset[str]
    range: tuple[float, float]
    needs_two_features: bool = False


_RIGID = frozenset({"permutation", "orthogonal", "scale", "translation"})


def _entry(name: str, label: str, prepare: Callable, **rest) -> Measure:
    rest = {"combine": _inner, "gram": True, "invariances": _RIGID} | rest
    return Measure(name, label, prepare, **rest)


MEASURES = {
    measure.name: measure
    for measure in (
        _entry("linear_cka", "linear CKA", _linear_gram, range=(-1.0, 1.0)),
        _entry("rbf_cka", "RBF-CKA", _rbf_gram, range=(-1.0, 1.0)),
        _entry("svcca", "SVCCA", _principal_basis, combine=_mean_correlation, gram=False, range=(0.0, 1.0)),
        _entry(
            "rsa",
            "RSA",
            _rsa_profile,
            invariances=frozenset({"permutation", "scale"}),  # correlation RDMs see rotations and translations
            range=(-1.0, 1.0),
            needs_two_features=True,
        ),
    )
}


def lookup(name: str, options: dict) -> Measure:
    """The measure of that name, as its options make it; an unknown name raises."""
    if name not in MEASURES:
        raise ValueError(f"unknown measure {name!r}; choose from {', '.join(MEASURES)}")
    if name == "rsa" and options.get("compare") == "kendall":
        return replace(MEASURES[name], combine=_kendall_tau_a, gram=False)
    return MEASURES[name]


def linear_cka(X, Y, *, debiased: bool = True) -> float:
    """Linear CKA of X (n, p) and Y (n, q).

    Biased: ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of centred columns, in [0, 1] (Kornblith et al. 2019, eq. 4). Debiased:
    HSIC₁(K, L) / √(HSIC₁(K, K) HSIC₁(L, L)) with Song's unbiased HSIC₁, which may be slightly negative.
    """
    return _combined(MEASURES["linear_cka"], X, Y, debiased=debiased)


def rbf_cka(X, Y, *, fraction: float = 1.0, debiased: bool = True) -> float:
    """CKA with k(x, y) = exp(−‖x − y‖² / 2σ²), σ = fraction × the median pairwise distance of *each* side.

    Kornblith et al. 2019, section 3; estimators as in `linear_cka`.
    """
    return _combined(MEASURES["rbf_cka"], X, Y, fraction=fraction, debiased=debiased)


def svcca(X, Y, *, variance: float = 0.99, squared: bool = False) -> float:
    """Mean canonical correlation (its square with `squared`) of the leading components holding `variance` per side.

    Raghu et al. 2017. In [0, 1]. Warns with the numbers when n images are too few for the components kept.
    """
    return _combined(MEASURES["svcca"], X, Y, variance=variance, squared=squared)


def rsa(X, Y, *, rdm: str = "correlation", compare: str = "spearman") -> float:
    """Correlation of the two sides' representational dissimilarities (Kriegeskorte et al. 2008).

    rdm : 'correlation' (1 − Pearson between images' features, at least 2 of them) or 'euclidean'
    compare : 'spearman' (ties averaged), 'pearson', 'cosine', or 'kendall' (τ_a) over the n(n − 1)/2 image pairs
    """
    return _combined(lookup("rsa", {"compare": compare}), X, Y, rdm=rdm, compare=compare)


def chance(name: str, n: int, p: int, q: int, **options) -> float | None:
    """What independent Gaussian features of n images score on average, where a formula is known; else None.

    Debiased estimators: 0. Biased linear CKA: √(pq) / √((n + p)(n + q)).
    """
    debiased = options.get("debiased", True)
    if name == "linear_cka":
        return 0.0 if debiased else math.sqrt(p * q) / math.sqrt((n + p) * (n + q))
    return 0.0 if name == "rbf_cka" and debiased else None
