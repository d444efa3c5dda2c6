"""The measures against exact constants, independent implementations, and the invariances they declare."""

import itertools
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import ortho_group, spearmanr
from sklearn.metrics.pairwise import rbf_kernel

from similarity import measures, moments
from similarity.measures import (
    MEASURES,
    FewImages,
    NotComputable,
    chance,
    double_center,
    linear_cka,
    rbf_cka,
    rsa,
    svcca,
    u_center,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "similarity.json").read_text())
X5, Y5 = (torch.tensor(GOLDEN[side], dtype=torch.float64) for side in ("X", "Y"))
FUNCTIONS = {name: getattr(measures, name) for name in MEASURES}
FEW = {"mutual_knn": {"k": 2}, "cknna": {"k": 2}, "linear_regression_r2": {"folds": 2}}  # for a handful of images
FLAVOURS = [
    (linear_cka, {}),
    (linear_cka, {"debiased": False}),
    (rbf_cka, {}),
    (rbf_cka, {"fraction": 0.4, "debiased": False}),
    (svcca, {}),
    (svcca, {"variance": 1.0, "squared": True}),
    (rsa, {}),
    (rsa, {"rdm": "euclidean", "compare": "pearson"}),
    (rsa, {"compare": "kendall"}),
    (measures.cca, {}),
    (measures.cca, {"squared": True}),
    (svcca, {"components": 3}),
    (measures.pwcca, {}),
    (measures.procrustes_distance, {}),
    (measures.angular_distance, {}),
    (measures.mutual_knn, {}),
    (measures.mutual_knn, {"k": 1}),
    (measures.cknna, {}),
    (measures.information_imbalance, {}),
    (measures.information_imbalance, {"k": 3}),
    (measures.linear_regression_r2, {}),
    (measures.linear_regression_r2, {"folds": 10, "seed": 3}),
]


def of_itself(name, n, options):
    """What the table says a side scores with itself."""
    options = measures.with_defaults(name, options)
    return {"1": lambda: 1, "0": lambda: 0, "(k + 1)/n": lambda: (options["k"] + 1) / n}[MEASURES[name].identical]()


def flavour_name(value):
    return getattr(value, "__name__", None) or " ".join(f"{k}={v}" for k, v in value.items()) or "defaults"


every_flavour = pytest.mark.parametrize("measure, options", FLAVOURS, ids=flavour_name)
every_measure = pytest.mark.parametrize("measure", FUNCTIONS.values(), ids=FUNCTIONS)


def gaussian(n, p, seed=0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1.0, (n, p))


def related(n=40, p=6, q=5, seed=0):
    """Two matrices that share some, not all, of what they hold."""
    X = gaussian(n, p, seed)
    return X, X[:, :q] @ gaussian(q, q, seed + 1) + gaussian(n, q, seed + 2)


# ------------------------------------------------------------------------------------------------------ known answers


def gram(X):
    return X @ X.T


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("pair", ["XY", "XX", "YY"])
def test_hsic_of_the_worked_example_is_the_exact_fraction(pair, centred):
    sides = {"X": X5, "Y": Y5}
    K, L = (gram(sides[s] - sides[s].mean(0) if centred else sides[s]) for s in pair)
    n = 5
    numerator, denominator = GOLDEN["hsic0"][pair]
    biased = (double_center(K) * double_center(L)).sum() / (n - 1) ** 2
    assert float(biased) == pytest.approx(numerator / denominator, rel=1e-13)
    numerator, denominator = GOLDEN["hsic1"][pair]
    unbiased = (u_center(K) * u_center(L)).sum() / (n * (n - 3))
    assert float(unbiased) == pytest.approx(numerator / denominator, rel=1e-12)


def test_cka_of_the_worked_example_and_negative_values_are_not_clamped():
    assert linear_cka(X5, Y5, debiased=False) == pytest.approx(GOLDEN["cka_biased"], abs=1e-14)
    assert linear_cka(X5, Y5) == pytest.approx(GOLDEN["cka_debiased"], abs=1e-14)
    assert GOLDEN["cka_debiased"] < 0


def song_hsic1(K, L):
    """Song et al. 2012, the formula as printed."""
    n = len(K)
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    one = np.ones(n)
    total = (
        np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)
    )
    return total / (n * (n - 3))


@pytest.mark.parametrize("n, p, q", [(4, 3, 2), (30, 5, 8), (20, 60, 45), (25, 1, 7)])
def test_linear_cka_agrees_with_a_plain_numpy_twin(n, p, q):
    X, Y = gaussian(n, p, 1), gaussian(n, q, 2)
    X, Y = X - X.mean(0), Y - Y.mean(0)
    plain = np.linalg.norm(Y.T @ X) ** 2 / (np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y))
    assert linear_cka(X, Y, debiased=False) == pytest.approx(plain, abs=1e-12)
    K, L = X @ X.T, Y @ Y.T
    debiased = song_hsic1(K, L) / np.sqrt(song_hsic1(K, K) * song_hsic1(L, L))
    assert linear_cka(X, Y) == pytest.approx(debiased, abs=1e-12)


@pytest.mark.parametrize("n, p, expected", [(100, 100, 0.500), (100, 1000, 0.909)])
def test_biased_cka_of_independent_gaussians_is_far_from_zero_and_debiased_is_zero(n, p, expected):
    pairs = [(gaussian(n, p, seed), gaussian(n, p, seed + 100)) for seed in range(6)]
    assert np.mean([linear_cka(X, Y, debiased=False) for X, Y in pairs]) == pytest.approx(expected, abs=0.01)
    assert chance("linear_cka", n, p, p, debiased=False) == pytest.approx(expected, abs=5e-4)
    assert np.mean([linear_cka(X, Y) for X, Y in pairs]) == pytest.approx(0, abs=0.02)
    assert np.mean([rbf_cka(X, Y) for X, Y in pairs]) == pytest.approx(0, abs=0.02)
    assert chance("linear_cka", n, p, p) == chance("rbf_cka", n, p, p) == 0


def test_cka_of_two_spectra_in_one_subspace():
    basis = np.linalg.qr(np.c_[np.ones(12), gaussian(12, 3)])[0][:, 1:]  # orthonormal and centred
    x, y = (basis * np.sqrt(GOLDEN["spectra"][side]) for side in "xy")
    numerator, denominator = GOLDEN["spectra"]["cka"]
    assert linear_cka(x, y, debiased=False) == pytest.approx(numerator / denominator, abs=1e-13)


def test_biased_cka_is_the_cosine_of_double_centred_squared_distances():
    X, Y = related()

    def centred(Z):
        D = ((Z[:, None] - Z[None]) ** 2).sum(-1)
        H = np.eye(len(Z)) - 1 / len(Z)
        return (H @ D @ H).ravel()

    a, b = centred(X), centred(Y)
    assert linear_cka(X, Y, debiased=False) == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-12)


def test_mean_squared_cca_of_independent_gaussians():
    n, p, q = 200, 20, 30
    values = [svcca(gaussian(n, p, 2 * s), gaussian(n, q, 2 * s + 1), variance=1, squared=True) for s in range(20)]
    assert np.mean(values) == pytest.approx(max(p, q) / (n - 1), abs=0.005)


def test_shuffled_rows_of_a_perfect_match_score_like_strangers():
    X = gaussian(100, 8, 5)
    shuffled = X[np.random.default_rng(0).permutation(100)]
    for name, measure in FUNCTIONS.items():
        same, strange = measure(X, X), measure(X, shuffled)
        assert same == pytest.approx(of_itself(name, 100, {}), abs=1e-9)
        assert strange > same + 0.2 if MEASURES[name].distance else strange < same - 0.4
    assert abs(linear_cka(X, shuffled)) < 0.1
    assert abs(rbf_cka(X, shuffled)) < 0.1
    assert abs(rsa(X, shuffled)) < 0.1


# --------------------------------------------------------------------------------------------------- independent twins


@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.8, 1.0])
def test_rbf_cka_agrees_with_sklearn_kernels_at_each_sides_own_median(fraction):
    X, Y = related()
    Y = 100 * Y  # another scale altogether
    K, L = (rbf_kernel(Z, gamma=1 / (2 * (fraction * np.median(pdist(Z))) ** 2)) for Z in (X, Y))
    expected = song_hsic1(K, L) / np.sqrt(song_hsic1(K, K) * song_hsic1(L, L))
    assert rbf_cka(X, Y, fraction=fraction) == pytest.approx(expected, abs=1e-11)
    H = np.eye(len(X)) - 1 / len(X)
    K, L = H @ K @ H, H @ L @ H
    biased = (K * L).sum() / (np.linalg.norm(K) * np.linalg.norm(L))
    assert rbf_cka(X, Y, fraction=fraction, debiased=False) == pytest.approx(biased, abs=1e-11)


def test_one_bandwidth_for_two_spaces_would_have_been_noticed():
    X, Y = related()
    sigma = np.median(pdist(X))
    K, L = (rbf_kernel(Z, gamma=1 / (2 * sigma**2)) for Z in (X, 4 * Y))
    shared = song_hsic1(K, L) / np.sqrt(song_hsic1(K, K) * song_hsic1(L, L))
    assert abs(rbf_cka(X, 4 * Y) - shared) > 0.05
    assert rbf_cka(X, 4 * Y) == pytest.approx(rbf_cka(X, Y), abs=1e-11)


def kendall_tau_a(a, b):
    signs = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in itertools.combinations(range(len(a)), 2)]
    return np.mean(signs)


@pytest.mark.parametrize("rdm, metric", [("correlation", "correlation"), ("euclidean", "euclidean")])
def test_rsa_agrees_with_scipy(rdm, metric):
    X, Y = related(n=14)
    a, b = pdist(X, metric), pdist(Y, metric)
    assert rsa(X, Y, rdm=rdm) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert rsa(X, Y, rdm=rdm, compare="pearson") == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert rsa(X, Y, rdm=rdm, compare="cosine") == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-12)
    assert rsa(X, Y, rdm=rdm, compare="kendall") == pytest.approx(kendall_tau_a(a, b), abs=1e-12)


def test_kendall_counts_ties_as_neither():
    X, Y = np.arange(9.0)[:, None] % 4, np.arange(9.0)[:, None] ** 2
    expected = kendall_tau_a(pdist(X), pdist(Y))
    assert rsa(X, Y, rdm="euclidean", compare="kendall") == pytest.approx(expected, abs=1e-12)
    assert rsa(X, X, rdm="euclidean", compare="kendall") < 1  # τ_a of a tied ranking with itself


@pytest.mark.parametrize("compare", ["spearman", "kendall"])
def test_ranks_do_not_order_equal_distances_by_their_rounding(compare):
    X, Y = gaussian(20, 2, 7), gaussian(20, 2, 8)  # two features: every correlation is +1 or −1
    a, b = (pdist(np.sign(Z[:, :1] - Z[:, 1:]), "cityblock") for Z in (X, Y))
    exact = spearmanr(a, b).statistic if compare == "spearman" else kendall_tau_a(a, b)
    assert rsa(X, Y, compare=compare) == pytest.approx(exact, abs=1e-12)


def test_svcca_agrees_with_a_plain_numpy_twin():
    X, Y = related(n=60, p=10, q=8)

    def leading(Z):
        U, S, _ = np.linalg.svd(Z - Z.mean(0), full_matrices=False)
        k = next(k for k in range(1, len(S) + 1) if (S[:k] ** 2).sum() >= 0.8 * (S**2).sum())
        return U[:, :k] * S[:k]

    a, b = leading(X), leading(Y)
    rho = np.linalg.svd(np.linalg.qr(a)[0].T @ np.linalg.qr(b)[0], compute_uv=False)
    assert svcca(X, Y, variance=0.8) == pytest.approx(rho.mean(), abs=1e-12)
    assert svcca(X, Y, variance=0.8, squared=True) == pytest.approx((rho**2).mean(), abs=1e-12)
    assert (rho >= 0).all() and (rho <= 1 + 1e-12).all()


def test_svcca_is_never_negative_whatever_the_signs_of_the_components():
    X, Y = gaussian(50, 4, 1), gaussian(50, 4, 2)
    for signs in itertools.product([1, -1], repeat=2):
        value = svcca(X * signs[0], Y * signs[1])
        assert 0 <= value <= 1
        assert value == pytest.approx(svcca(X, Y), abs=1e-12)


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("n, p, q, mean", [(50, 7, 4, 0.0), (50, 7, 4, 1e3), (12, 40, 30, 50.0), (4, 1, 2, 10.0)])
def test_feature_space_cka_equals_the_gram_form(n, p, q, mean, debiased):
    X, Y = gaussian(n, p, 1, mean), gaussian(n, q, 2, -mean)
    assert moments.linear_cka(X, Y, debiased=debiased) == pytest.approx(linear_cka(X, Y, debiased=debiased), abs=1e-9)


def test_feature_space_cka_refuses_unequal_rows_and_what_is_only_rounding():
    with pytest.raises(ValueError, match="X has 10 rows and Y has 9"):
        moments.linear_cka(gaussian(10, 3), gaussian(9, 3))
    simplex = np.eye(7) * 3.7 + 0.3  # all images equally far from each other: the debiased norm is zero
    for cka in (moments.linear_cka, linear_cka):
        with pytest.raises(NotComputable, match="equally similar"):
            cka(simplex, gaussian(7, 3))


@pytest.mark.parametrize("mean", [1e3, 1e6])
@pytest.mark.parametrize("measure", [linear_cka, rbf_cka, svcca])  # a correlation RDM does see translations
def test_means_far_from_zero_do_not_cost_precision(measure, mean):
    X, Y = related()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure(X + mean, Y - mean) == pytest.approx(measure(X, Y), abs=1e-7)


def test_rank_is_counted_without_the_rounding_that_a_large_mean_leaves():
    X = gaussian(50, 3, 1) @ gaussian(3, 10, 2)  # rank 3 in 10 features
    Y = gaussian(50, 4, 3)
    assert svcca(X + 1e6, Y, variance=1) == pytest.approx(svcca(X, Y, variance=1), abs=1e-6)


# --------------------------------------------------------------------------------------------------------- invariances

_RANDOM = {
    "permutation": lambda X, rng: X[:, rng.permutation(X.shape[1])],
    "orthogonal": lambda X, rng: X @ ortho_group.rvs(X.shape[1], random_state=rng),
    "scale": lambda X, rng: X * np.exp(rng.uniform(-6, 6)),
    "translation": lambda X, rng: X + rng.normal(0, 5, X.shape[1]),
    "invertible": lambda X, rng: X @ (rng.normal(size=(X.shape[1],) * 2) + 3 * np.eye(X.shape[1])),
}
# one strong map of each kind: what a measure sees, it must see here
_STRONG = {
    "orthogonal": lambda X: X @ ortho_group.rvs(X.shape[1], random_state=3),
    "translation": lambda X: X + np.linspace(-9, 9, X.shape[1]),
    "invertible": lambda X: X * np.geomspace(1, 100, X.shape[1]),
}


def test_declared_invariances_are_known_kinds():
    assert all(measure.invariances | measure.invariances_y <= set(_RANDOM) for measure in MEASURES.values())
    assert all(m.invariances == m.invariances_y for m in MEASURES.values() if m.symmetric)


def sides(names):
    return [(m.name, side, kind) for m in MEASURES.values() for side in "XY" for kind in sorted(names(m, side))]


def ignored(measure, side):
    return measure.invariances if side == "X" else measure.invariances_y


def changed(change, side, X, Y):
    return (change(X), Y) if side == "X" else (X, change(Y))


@pytest.mark.parametrize("name, side, kind", sides(ignored))
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), p=st.integers(2, 9), q=st.integers(2, 30))
def test_a_measure_does_not_see_what_it_declares_itself_invariant_to(name, side, kind, seed, p, q):
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(40, p)), rng.normal(size=(40, q if side == "Y" or kind != "invertible" else p))
    expected = quietly(FUNCTIONS[name], X, Y)
    value = quietly(FUNCTIONS[name], *changed(lambda Z: _RANDOM[kind](Z, rng), side, X, Y))
    assert value == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name, side, kind", sides(lambda m, side: set(_RANDOM) - ignored(m, side)))
def test_a_measure_does_see_what_it_does_not_declare(name, side, kind):
    X, Y = related(n=60)
    measure = FUNCTIONS[name]
    assert abs(measure(*changed(_STRONG[kind], side, X, Y)) - measure(X, Y)) > 1e-3


def test_full_cca_is_invariant_to_invertible_maps():
    X, Y = related(n=60)
    value = svcca(X, Y, variance=1)
    assert svcca(_STRONG["invertible"](X), Y, variance=1) == pytest.approx(value, abs=1e-9)


@every_flavour
def test_range_symmetry_and_the_value_of_a_side_with_itself_are_as_the_table_says(measure, options):
    low, high = MEASURES[measure.__name__].range
    values = {}
    for seed in range(4):
        X, Y = related(seed=10 * seed)
        value = measure(X, Y, **options)
        assert isinstance(value, float)
        assert low - 1e-12 <= value <= high + 1e-12
        assert measure(X, X, **options) == pytest.approx(of_itself(measure.__name__, len(X), options), abs=1e-9)
        order = np.random.default_rng(seed).permutation(len(X))
        if measure is not measures.linear_regression_r2:  # which deals images to folds by their place
            assert measure(X[order], Y[order], **options) == pytest.approx(value, abs=1e-12)
        values[measure(Y, X, **options)] = value
    symmetric = all(swapped == pytest.approx(value, abs=1e-12) for swapped, value in values.items())
    assert symmetric == MEASURES[measure.__name__].symmetric


# ----------------------------------------------------------------------------------------------------------- bad input


def spoiled(value):
    X = gaussian(10, 3)
    X[4, 1] = value
    return X


BAD_SIDES = {
    "not 2-D": (gaussian(10, 3)[:, :, None], "pool or flatten"),
    "one dimension": (gaussian(10, 3)[:, 0], "pool or flatten"),
    "constant": (np.full((10, 3), 2.5), "constant"),
    "no features": (np.zeros((10, 0)), "constant"),
    "NaN": (spoiled(np.nan), "NaN or infinite"),
    "inf": (spoiled(-np.inf), "NaN or infinite"),
    "overflown half": (torch.tensor(spoiled(1e6)).half(), "NaN or infinite"),
    "complex": (gaussian(10, 3) * 1j, "real numbers"),
    "complex tensor": (torch.ones(10, 3, dtype=torch.complex64), "real numbers"),
    "text": (np.full((10, 3), "a"), "real numbers"),
    "ragged": ([[1.0, 2.0]] * 9 + [[1.0]], "differ in length"),
    "constant but for rounding": (
        np.full((10, 3), 0.1, np.float32) + np.eye(10, 3, dtype=np.float32) * np.float32(2e-8),
        "constant",
    ),
}


@pytest.mark.parametrize("bad, remedy", BAD_SIDES.values(), ids=BAD_SIDES)
@every_measure
def test_bad_input_names_its_side_and_the_remedy(measure, bad, remedy):
    good, few = gaussian(10, 4, 1), FEW.get(measure.__name__, {})
    with pytest.raises(ValueError, match=rf"^X .*{remedy}"):
        measure(bad, good, **few)
    with pytest.raises(ValueError, match=rf"^Y .*{remedy}"):
        measure(good, bad, **few)


@every_measure
def test_unequal_and_too_few_rows_are_refused(measure):
    with pytest.raises(ValueError, match="X has 10 rows and Y has 9; rows must be the same images"):
        measure(gaussian(10, 3), gaussian(9, 3))
    with pytest.raises(ValueError, match="X has 3 rows; at least 4 images"):
        measure(gaussian(3, 3), gaussian(3, 5))
    few = FEW.get(measure.__name__, {})
    if measure is not measures.cknna:  # of 4 images' 2 neighbours each, HSIC₁ may be negative; it says so
        assert math.isfinite(quietly(measure, gaussian(4, 3, 1), gaussian(4, 5, 2), **few))


def quietly(measure, X, Y, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImages)
        return measure(X, Y, **options)


ODD_LAYOUTS = {
    "float32": lambda X: X.astype(np.float32),
    "float16": lambda X: X.astype(np.float16),
    "int": lambda X: X.astype(np.int64),
    "unsigned": lambda X: (X - X.min()).astype(np.uint16),
    "big-endian": lambda X: X.astype(">f8"),
    "reversed view": lambda X: np.ascontiguousarray(X[::-1])[::-1],
    "column-major": np.asfortranarray,
    "every second column": lambda X: np.repeat(X, 2, axis=1)[:, ::2],
    "read-only": lambda X: np.frombuffer(X.tobytes()).reshape(X.shape),
    "list": lambda X: X.tolist(),
    "bfloat16 tensor": lambda X: torch.tensor(X, dtype=torch.bfloat16),
    "transposed tensor": lambda X: torch.tensor(X.T.copy()).T,
    "tensor that needs a gradient": lambda X: torch.tensor(X, requires_grad=True),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", ODD_LAYOUTS.values(), ids=ODD_LAYOUTS)
@every_measure
def test_layout_and_dtype_of_the_input_do_not_matter(measure, layout):
    rng = np.random.default_rng(0)
    X = rng.integers(-60, 60, (30, 4)).astype(float)  # exact in every dtype
    Y = rng.integers(-60, 60, (30, 3)).astype(float)
    X = X - X.min()
    assert measure(layout(X), Y) == pytest.approx(measure(X, Y), abs=1e-12)
    assert measure(Y, layout(X)) == pytest.approx(measure(Y, X), abs=1e-12)


def test_float32_features_of_large_mean_are_not_mistaken_for_constant():
    X = gaussian(30, 4, 1, mean=1e4).astype(np.float32)
    assert linear_cka(X, X) == pytest.approx(1)
    massive = np.c_[np.full(30, 3e4), gaussian(30, 4, 2)].astype(np.float32)  # one huge constant feature beside others
    assert linear_cka(massive, massive[:, 1:]) == pytest.approx(1, abs=1e-5)


def test_a_scalar_site_is_told_that_rsa_needs_two_features():
    X, scalar = gaussian(12, 3), gaussian(12, 1, 1)
    with pytest.raises(NotComputable, match=r"Y has one feature per image.* at least 2 features"):
        rsa(X, scalar)
    assert math.isfinite(rsa(X, scalar, rdm="euclidean"))
    for name, measure in FUNCTIONS.items():
        if not MEASURES[name].needs_two_features:
            assert math.isfinite(measure(X, scalar, **FEW.get(name, {})))


def test_identical_images_are_refused_where_they_leave_no_scale():
    X = np.repeat(gaussian(1, 3), 12, axis=0)
    X[0] += 1  # 11 of 12 rows are the same
    with pytest.raises(NotComputable, match="X: more than half of the image pairs are identical"):
        rbf_cka(X, gaussian(12, 3, 1))
    dead = gaussian(12, 3, 1)
    dead[3] = 0  # an image on which a layer is silent
    with pytest.raises(NotComputable, match="Y: an image has the same value in all its features; use rdm='euclidean'"):
        rsa(gaussian(12, 3), dead)


@pytest.mark.parametrize("compare", ["spearman", "pearson", "kendall"])
def test_equally_dissimilar_images_cannot_be_compared(compare):
    with pytest.raises(NotComputable, match="X: all image pairs are equally dissimilar"):
        rsa(np.eye(6) * 1.3 + 0.7, gaussian(6, 4), rdm="euclidean", compare=compare)


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda X: rbf_cka(X, X, fraction=0), "fraction must be above 0"),
        (lambda X: rbf_cka(X, X, fraction=float("nan")), "fraction must be above 0"),
        (lambda X: svcca(X, X, variance=1.5), r"variance must be in \(0, 1\]"),
        (lambda X: svcca(X, X, variance=0), r"variance must be in \(0, 1\]"),
        (lambda X: rsa(X, X, rdm="cosine"), "unknown rdm 'cosine'; choose"),
        (lambda X: rsa(X, X, compare="tau"), "unknown compare 'tau'; choose"),
    ],
)
def test_bad_options_are_named(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call(gaussian(10, 3))


def test_svcca_says_with_numbers_when_images_are_too_few():
    X, Y = gaussian(20, 30, 1), gaussian(20, 30, 2)
    with pytest.warns(FewImages, match=r"\d+ \+ \d+ components of 20 images: at least \d+ of them are 1"):
        svcca(X, Y)
    U, V = gaussian(20, 12, 1), gaussian(20, 10, 2)
    with pytest.warns(FewImages, match=r"12 \+ 10 components of 20 images: at least 3 of them"):
        svcca(U, V, variance=1)
    Qu, Qv = (np.linalg.qr(Z - Z.mean(0))[0] for Z in (U, V))
    assert (np.linalg.svd(Qu.T @ Qv, compute_uv=False) > 1 - 1e-10).sum() == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svcca(gaussian(200, 3), gaussian(200, 3, 1))


def test_more_features_than_images_is_no_obstacle():
    X, Y = gaussian(8, 3000, 1), gaussian(8, 2000, 2)
    for name, measure in FUNCTIONS.items():
        if name == "cknna":
            continue  # too few images for HSIC₁ of the neighbours to be positive
        few = FEW.get(name, {})
        low, high = MEASURES[name].range
        assert low <= quietly(measure, X, Y, **few) <= high + 1e-12
        if name != "linear_regression_r2":  # minimum-norm regression on too few images does not extrapolate
            assert quietly(measure, X, X, **few) == pytest.approx(of_itself(name, 8, few), abs=1e-9)
