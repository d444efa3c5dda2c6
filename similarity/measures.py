"""The measures: pure functions f(X, Y) -> float of two matrices whose rows are the same images in the same order.

X is (n, p), Y is (n, q), tensors or arrays. Each measure is made of two steps, so that a plane of sites × sites can
share the first: `prepare(X)` turns one side into what a pair needs of it, and `combine` turns two of them into the
number. Scalars are float64; no denominator gets an epsilon and no result is clamped. What each measure does not see,
its range and its cost stand in `MEASURES`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from similarity import kernels, neighbors, rdm, subspaces
from similarity.inputs import SMALLEST_N, FewImages, NotComputable, as_matrix, both_sides
from similarity.kernels import double_center, u_center

__all__ = [
    "MEASURES",
    "SMALLEST_N",
    "FewImages",
    "Measure",
    "NotComputable",
    "angular_distance",
    "as_matrix",
    "cca",
    "chance",
    "cknna",
    "double_center",
    "information_imbalance",
    "linear_cka",
    "linear_regression_r2",
    "lookup",
    "mutual_knn",
    "procrustes_distance",
    "pwcca",
    "rbf_cka",
    "rsa",
    "svcca",
    "table",
    "u_center",
]


# --------------------------------------------------------------------------------------------------------- kernels, CKA


def linear_cka(X, Y, *, debiased: bool = True) -> float:
    """Linear CKA: the cosine of the two sides' centred Gram matrices K = XXᵀ, L = YYᵀ.

    Biased: ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of centred columns, in [0, 1] (Kornblith et al. 2019, eq. 4). Debiased:
    HSIC₁(K, L) / √(HSIC₁(K, K) HSIC₁(L, L)) with Song's unbiased HSIC₁ (Song et al. 2012), which may be
    slightly negative.
    """
    return _of_two("linear_cka", X, Y, debiased=debiased)


def rbf_cka(X, Y, *, fraction: float | Sequence[float] = 1.0, debiased: bool = True) -> float | list[float]:
    """CKA with k(x, y) = exp(−‖x − y‖² / 2σ²), σ = fraction × the median pairwise distance of *each* side.

    Kornblith et al. 2019, section 3; estimators as in `linear_cka`. Several fractions give a list of as many numbers.
    """
    if is_several(fraction):
        return [rbf_cka(X, Y, fraction=one, debiased=debiased) for one in fraction]
    return _of_two("rbf_cka", X, Y, fraction=fraction, debiased=debiased)


# ------------------------------------------------------------------------------------------------------------------ RSA


def rsa(X, Y, *, rdm: str = "correlation", compare: str = "spearman") -> float:
    """Correlation of the two sides' representational dissimilarities (Kriegeskorte et al. 2008).

    rdm : 'correlation' (1 − Pearson between images' features, at least 2 of them) or 'euclidean'
    compare : 'spearman' (ties averaged), 'pearson', 'cosine', or 'kendall' (τ_a) over the n(n − 1)/2 image pairs
    """
    return _of_two("rsa", X, Y, rdm=rdm, compare=compare)


# ----------------------------------------------------------------------------------------------- canonical correlations


def cca(X, Y, *, squared: bool = False) -> float:
    """Mean canonical correlation ρ (its square with `squared`): singular values of QxᵀQy, orthonormal bases of X and Y.

    Hotelling 1936; Kornblith et al. 2019. In [0, 1]. Sees nothing but the column spaces: p + q ≥ n makes some of it 1
    by construction, and a warning says how many.
    """
    return _of_two("cca", X, Y, squared=squared)


def svcca(X, Y, *, variance: float = 0.99, components: int | None = None, squared: bool = False) -> float:
    """Mean canonical correlation (its square with `squared`) of the leading principal components of each side.

    Raghu et al. 2017: those holding `variance` of it, or the first `components`. In [0, 1]. Warns with the numbers when
    n images are too few for the components kept.
    """
    return _of_two("svcca", X, Y, variance=variance, components=components, squared=squared)


def pwcca(X, Y) -> float:
    """Projection-weighted CCA: Σ αᵢρᵢ / Σ αᵢ, αᵢ = Σⱼ |⟨hᵢ, xⱼ⟩| with hᵢ the canonical variates of X, xⱼ its columns.

    Morcos et al. 2018. In [0, 1]; not symmetric: the weights are X's. Warns as `cca` does.
    """
    return _of_two("pwcca", X, Y)


# --------------------------------------------------------------------------------------------------------------- shapes


def procrustes_distance(X, Y, *, squared: bool = False) -> float:
    """d of the centred sides scaled to unit Frobenius norm, rotated onto each other: d² = 2 − 2‖XᵀY‖_* (in [0, 2]).

    Schönemann 1966; Williams et al. 2021. The narrower side is taken as padded with zeros.
    """
    return _of_two("procrustes_distance", X, Y, squared=squared)


def angular_distance(X, Y) -> float:
    """Angular shape distance θ = arccos ‖XᵀY‖_*, in radians in [0, π/2] (Williams et al. 2021); a metric."""
    return _of_two("angular_distance", X, Y)


# ----------------------------------------------------------------------------------------------------------- neighbours


def mutual_knn(X, Y, *, k: int = 10) -> float:
    """Share of common k nearest neighbours, mean over images of |N_k^X(i) ∩ N_k^Y(i)| / k (Huh et al. 2024, app. A).

    Euclidean; in [0, 1], k/(n − 1) by chance. Neighbours tied for the last place share it.
    """
    return _of_two("mutual_knn", X, Y, k=k)


def cknna(X, Y, *, k: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment (Huh et al. 2024, app. A): HSIC₁ on Grams masked by mutual top-k.

    HSIC₁(M∘K, M∘L) / √(HSIC₁(Mx∘K, Mx∘K) HSIC₁(My∘L, My∘L)) with K = XXᵀ, L = YYᵀ as they are, Mx and My the k largest
    entries of each row of them, and M = Mx∘My. M is not symmetric, so neither is HSIC₁'s last term, 1ᵀK̃L̃1, exactly.
    """
    return _of_two("cknna", X, Y, k=k)


def information_imbalance(X, Y, *, k: int = 1) -> float:
    """Δ(X→Y) = 2/(n²k) · Σᵢ Σ ranks in Y of image i's k nearest neighbours in X (Glielmo et al. 2022).

    (k + 1)/n where X tells everything of Y's neighbours, 1 where it tells nothing. Not symmetric: ask both ways.
    """
    return _of_two("information_imbalance", X, Y, k=k)


# ----------------------------------------------------------------------------------------------------------- regression


def linear_regression_r2(X, Y, *, folds: int = 5, seed: int = 0, rows_per_image: int = 1) -> float:
    """R² of Y predicted linearly from X on held-out images: 1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖² over `folds` folds.

    Least squares with intercept (minimum norm where X has more features than rows), ȳ the training images' mean; at
    most 1, below 0 when worse than that mean. Images are dealt to folds by `seed`, all rows of an image together.
    """
    return _of_two("linear_regression_r2", X, Y, folds=folds, seed=seed, rows_per_image=rows_per_image)


# ---------------------------------------------------------------------------------------------------- the table of them


@dataclass(frozen=True)
class Measure:
    """How a measure is computed, and what to know of it.

    prepare : (X, side=, **options) -> what a pair needs of one side; X (n, p) as it was recorded, float32 or float64
    combine : (prepared X, prepared Y) -> float
    together : ([prepared X …], [prepared Y …]) -> all pairs at once, (left, right), where that shares work
    gram : whether `prepare` gives an (n, n) matrix and `combine` is the inner product
    invariances, invariances_y : maps of X's (of Y's) features that it does not see, of 'permutation', 'orthogonal',
        'scale', 'translation', 'invertible'
    identical : its value between a side and itself
    smallest_n : images needed; more are needed for it to mean something
    site_cost, pair_cost : operations for n images and p features (q of the other side), preparing once and combining
    """

    name: str
    label: str
    prepare: Callable
    combine: Callable
    range: tuple[float, float]
    invariances: frozenset[str]
    invariances_y: frozenset[str]
    identical: str
    smallest_n: str
    site_cost: str
    pair_cost: str
    together: Callable | None = None
    gram: bool = False
    distance: bool = False
    symmetric: bool = True
    needs_two_features: bool = False


_RIGID = frozenset({"permutation", "orthogonal", "scale", "translation"})
_LINEAR = _RIGID | {"invertible"}


def _entry(name: str, label: str, prepare: Callable, combine: Callable, site_cost: str, pair_cost: str, **rest):
    defaults = {"range": (0.0, 1.0), "invariances": _RIGID, "identical": "1", "smallest_n": str(SMALLEST_N)}
    rest = defaults | rest
    rest.setdefault("invariances_y", rest["invariances"])
    return Measure(name, label, prepare, combine, site_cost=site_cost, pair_cost=pair_cost, **rest)


_ENTRIES = (
    _entry("linear_cka", "linear CKA", kernels.linear_gram, kernels.inner, "n²p", "n²", range=(-1.0, 1.0), gram=True),
    _entry("rbf_cka", "RBF-CKA", kernels.rbf_gram, kernels.inner, "n²p", "n²", range=(-1.0, 1.0), gram=True),
    _entry(
        "rsa",
        "RSA",
        rdm.profile,
        kernels.inner,
        "n²p + n² log n",
        "n² (Kendall: n² log n)",
        invariances=frozenset({"permutation", "scale"}),  # correlation RDMs see rotations and translations
        range=(-1.0, 1.0),
        gram=True,
        needs_two_features=True,
    ),
    _entry(
        "cca",
        "CCA",
        subspaces.basis,
        subspaces.mean_correlation,
        "np·min(n, p)",
        "npq",
        invariances=_LINEAR,
        smallest_n="4, and n > p + q to mean anything",
    ),
    _entry(
        "svcca",
        "SVCCA",
        subspaces.svcca_basis,
        subspaces.mean_correlation,
        "np·min(n, p)",
        "nkl of the k, l components kept",
        smallest_n="4, and n > k + l components to mean anything",
    ),
    _entry(
        "pwcca",
        "PWCCA",
        subspaces.basis,
        subspaces.projection_weighted,
        "np·min(n, p)",
        "npq",
        invariances=frozenset({"permutation", "scale", "translation"}),
        invariances_y=_LINEAR,
        smallest_n="4, and n > p + q to mean anything",
        symmetric=False,
    ),
    _entry(
        "procrustes_distance",
        "Procrustes distance",
        subspaces.shape,
        subspaces.procrustes,
        "np·min(n, p)",
        "npq + pq·min(p, q), p and q at most n",
        range=(0.0, math.sqrt(2)),
        identical="0",
        distance=True,
    ),
    _entry(
        "angular_distance",
        "angular shape distance",
        subspaces.shape,
        subspaces.angle,
        "np·min(n, p)",
        "npq + pq·min(p, q), p and q at most n",
        range=(0.0, math.pi / 2),
        identical="0",
        distance=True,
    ),
    _entry(
        "mutual_knn",
        "mutual kNN",
        neighbors.cloud,
        neighbors.mutual_share,
        "n²p",
        "nk",
        together=neighbors.mutual_shares,
        smallest_n="k + 2",
    ),
    _entry(
        "cknna",
        "CKNNA",
        neighbors.masked_gram,
        neighbors.cknna_of,
        "n²p",
        "nk",
        range=(-math.inf, math.inf),
        invariances=_RIGID - {"translation"},
        smallest_n="k + 2",
        symmetric=False,
    ),
    _entry(
        "information_imbalance",
        "information imbalance",
        neighbors.cloud,
        lambda left, right: float(neighbors.imbalances([left], [right])[0, 0]),
        "n²p + n² log n",
        "nk log n",
        together=neighbors.imbalances,
        range=(0.0, 2.0),
        identical="(k + 1)/n",
        smallest_n="k + 2",
        distance=True,
        symmetric=False,
    ),
    _entry(
        "linear_regression_r2",
        "linear regression R²",
        subspaces.fit,
        subspaces.held_out_r2,
        "np·min(n, p) a fold",
        "n²q",
        range=(-math.inf, 1.0),
        invariances=_LINEAR,
        invariances_y=_RIGID,
        identical="1",
        smallest_n="4, and n > p to mean anything",
        symmetric=False,
    ),
)

MEASURES = {measure.name: measure for measure in _ENTRIES}


def lookup(name: str, options: dict) -> Measure:
    """The measure of that name, as its options make it; an unknown name or option raises."""
    if name not in MEASURES:
        raise ValueError(f"unknown measure {name!r}; choose from {', '.join(MEASURES)}")
    allowed = [option for option in inspect.signature(globals()[name]).parameters if option not in ("X", "Y")]
    for option in options:
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(allowed) or 'none'}")
    if name == "rsa" and options.get("compare") == "kendall":
        return replace(MEASURES[name], combine=rdm.kendall_tau_a, gram=False)
    return MEASURES[name]


def with_defaults(name: str, options: dict) -> dict:
    """The options of a measure, those left out at their defaults."""
    parameters = inspect.signature(globals()[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("X", "Y")} | options


def _of_two(name: str, X, Y, **options) -> float:
    """prepare both sides and combine them; the one route from two matrices to a number."""
    measure = lookup(name, options)
    X, Y = both_sides(X, Y)
    return measure.combine(measure.prepare(X, side="X", **options), measure.prepare(Y, side="Y", **options))


def is_several(fraction) -> bool:
    """Whether `fraction` is a sequence of bandwidths, which a plane computes from the same distances."""
    return not isinstance(fraction, (int, float, str)) and hasattr(fraction, "__len__")


def chance(name: str, n: int, p: int, q: int, **options) -> float | None:
    """What independent Gaussian features of n images score on average, where a formula is known; else None.

    Debiased estimators: 0. Biased linear CKA: √(pq) / √((n + p)(n + q)). Mean squared CCA: max(p, q)/(n − 1). Mutual
    kNN: k/(n − 1). Information imbalance: 1.
    """
    options = with_defaults(name, options)
    if name == "linear_cka" and not options["debiased"]:
        return math.sqrt(p * q) / math.sqrt((n + p) * (n + q))
    if name in ("linear_cka", "rbf_cka") and options["debiased"]:
        return 0.0
    if name == "cca" and options["squared"] and p + q < n:
        return max(p, q) / (n - 1)
    if name == "mutual_knn":
        return options["k"] / (n - 1)
    return 1.0 if name == "information_imbalance" else None


def table() -> pd.DataFrame:
    """One row a measure: what the documentation shows, and the property tests check."""
    kinds = ("permutation", "orthogonal", "scale", "translation", "invertible")

    def seen(measure: Measure, kind: str) -> str:
        sides = [kind in measure.invariances, kind in measure.invariances_y]
        return {(True, True): "yes", (False, False): "no"}.get(tuple(sides), f"of {'X' if sides[0] else 'Y'} only")

    rows = [
        {
            "measure": f"`{m.name}`",
            "range": f"{_bound(m.range[0])} … {_bound(m.range[1])}",
            "X with itself": m.identical,
            "symmetric": "yes" if m.symmetric else "no",
            **{f"ignores {kind}": seen(m, kind) for kind in kinds},
            "smallest n": m.smallest_n,
            "cost a site": m.site_cost,
            "cost a pair": m.pair_cost,
        }
        for m in MEASURES.values()
    ]
    return pd.DataFrame(rows)


def _bound(value: float) -> str:
    named = {math.inf: "∞", -math.inf: "−∞", math.sqrt(2): "√2", math.pi / 2: "π/2", -1.0: "−1"}
    return named.get(value, f"{value:g}")
