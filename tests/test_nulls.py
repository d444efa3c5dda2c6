"""The null of a plane: against permuting by hand, against all n! permutations, against other libraries."""

import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control

from similarity import exact_nulls, measures, memory, null_scorers, plane
from similarity.exact_nulls import exact_moments
from similarity.kernels import unit_gram
from similarity.measures import MEASURES, NotComputable
from similarity.nulls import Null, benjamini_hochberg, plane_null
from tests.made import made


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def two(n=12, sites=(2, 3), widths=(3, 5), **rest):
    """Recordings with something in common, of sites of different widths."""
    common = gaussian(n, max(widths) + max(sites), seed=99)
    return tuple(
        made({f"{s}{i}": common[:, : w + i] + gaussian(n, w + i, seed=10 * w + i) for i in range(k)})
        for s, k, w in zip("ab", sites, widths)
    )


def by_hand(name, A, B, permutations, seed, **options):
    """(1 + permutations, rows, columns): the measure itself on permuted images, one pair at a time."""
    rng, planes = np.random.default_rng(seed), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", measures.FewImages)
        for order in [np.arange(len(A)), *(rng.permutation(len(A)) for _ in range(permutations))]:
            moved = [B[b][torch.as_tensor(order)].reshape(-1, B[b].shape[-1]) for b in B.names]
            function = getattr(measures, name)
            planes.append([[function(A.matrix(a), Y, **options) for Y in moved] for a in A.names])
    return np.array(planes)


VARIANTS = [(name, {}) for name in MEASURES if name not in ("mutual_knn", "cknna")]
VARIANTS += [
    ("mutual_knn", {"k": 3}),
    ("cknna", {"k": 8}),
    ("linear_cka", {"debiased": False}),
    ("rbf_cka", {"debiased": False, "fraction": 0.7}),
    ("rsa", {"rdm": "euclidean", "compare": "cosine"}),
    ("rsa", {"compare": "kendall"}),
    ("information_imbalance", {"k": 3}),
]


# ------------------------------------------------------------------------------------------------------- sampled nulls


@pytest.mark.parametrize("name, options", VARIANTS, ids=str)
def test_every_cell_of_every_permutation_is_the_measure_of_permuted_images(name, options):
    A, B = two()
    null = plane_null(name, A, B, permutations=6, seed=4, **options)
    expected = by_hand(name, A, B, 6, 4, **options)
    np.testing.assert_allclose(null.observed, expected[0], atol=1e-9)
    np.testing.assert_allclose(null.samples, expected[1:], atol=1e-9)
    assert np.ptp(null.samples, axis=0).min() > 1e-4  # images did move
    assert (null.rows, null.columns, null.measure) == (A.names, B.names, name)
    assert null.n_images == 12 and null.distance == MEASURES[name].distance and not null.notes


@pytest.mark.parametrize("name", ["linear_cka", "rbf_cka", "rsa", "svcca", "information_imbalance"])
@pytest.mark.parametrize("policy", ["grid:2", "tokens"])
def test_rows_of_one_image_move_together(name, policy):
    A = made({"a": gaussian(7, 4, 3)}, policy=policy)
    B = made({"b": gaussian(7, 4, 3, seed=1), "c": gaussian(7, 4, 2, seed=2)}, policy=policy)
    null = plane_null(name, A, B, permutations=5, seed=8)
    np.testing.assert_allclose(null.samples, by_hand(name, A, B, 5, 8)[1:], atol=1e-9)


@pytest.mark.parametrize("debiased", [True, False])
def test_feature_space_and_gram_matrices_give_the_same_null(debiased, monkeypatch):
    A, B = two(40)
    both = []
    for cheaper in (True, False):
        monkeypatch.setattr(null_scorers, "_feature_space_is_cheaper", lambda *_, cheaper=cheaper: cheaper)
        both.append(plane_null("linear_cka", A, B, permutations=9, debiased=debiased))
    np.testing.assert_allclose(both[0].samples, both[1].samples, atol=1e-12)
    np.testing.assert_allclose(both[0].observed, plane("linear_cka", A, B, debiased=debiased).values, atol=1e-12)


def test_feature_space_is_used_where_rows_are_many():
    many, wide = {"a": torch.zeros(5000, 4)}, {"a": torch.zeros(50, 400)}
    asked = np.ones((1, 1), dtype=bool)
    assert null_scorers._feature_space_is_cheaper(many, many, asked)
    assert not null_scorers._feature_space_is_cheaper(wide, wide, asked)


@pytest.mark.parametrize("options", [{"debiased": True}, {"debiased": False}])
def test_float32_tables_differ_from_float64_by_less_than_the_rounding_that_is_allowed(options, monkeypatch):
    """Wide sites without debiasing score 0.9 by chance: the hardest case for products in float32."""
    A, B = (made({f"{s}{i}": gaussian(300, 900, seed=i + k) for i in range(3)}) for s, k in (("a", 0), ("b", 9)))
    exact = plane_null("linear_cka", A, B, permutations=20, **options)
    monkeypatch.setattr(null_scorers, "LONG_WORK", 0)
    single = plane_null("linear_cka", A, B, permutations=20, **options)
    assert (exact.rounding, single.rounding) == (1e-12, 1e-6)
    error = np.abs(single.samples - exact.samples).max()
    assert 0 < error < single.rounding / 2  # of the observed value and of the null
    assert single.rounding < 0.01 * exact.samples.std(0).min()  # and what it allows is nothing beside the spread


@pytest.mark.parametrize("name", ["mutual_knn", "information_imbalance"])
def test_tied_neighbours_are_shared_in_tables_as_in_the_measure_itself(name, monkeypatch):
    A, B = (made({f"{s}{i}": np.round(gaussian(14, 2, seed=i + k)) for i in range(2)}) for s, k in (("a", 0), ("b", 5)))
    expected = by_hand(name, A, B, 8, 0, k=3)
    np.testing.assert_allclose(plane_null(name, A, B, permutations=8, k=3).samples, expected[1:], atol=1e-12)
    monkeypatch.setattr(null_scorers, "_tables_fit", lambda _: False)  # the route of those that are too large
    for pairs in (None, [("a0", "b0"), ("a0", "b1"), ("a1", "b0"), ("a1", "b1")], [("a1", "b0")]):
        null = plane_null(name, A, B, permutations=8, pairs=pairs, k=3)
        here = ~np.isnan(null.observed)
        assert here.sum() == (4 if pairs is None else len(pairs))
        np.testing.assert_allclose(null.samples[:, here], expected[1:, here], atol=1e-12)


@pytest.mark.parametrize("name", ["linear_cka", "rbf_cka", "procrustes_distance", "information_imbalance"])
def test_pairs_restrict_the_plane_and_change_no_number(name):
    A, B = two()
    whole = plane_null(name, A, B, permutations=5)
    some = plane_null(name, A, B, permutations=5, pairs=[("a1", "b0"), ("a1", "b2")])
    asked = np.zeros((2, 3), dtype=bool)
    asked[1, [0, 2]] = True
    np.testing.assert_allclose(some.samples[:, asked], whole.samples[:, asked], atol=1e-12)
    for values in (some.observed, some.p_values(), some.family_p(), some.mean(), some.high()):
        assert (np.isnan(values) == ~asked).all()
    assert (some.rows, some.columns) == (A.names, B.names)


def test_rows_are_matched_by_id_and_permutations_are_seeded():
    A, B = two()
    shuffled = B.select(ids=B.ids[::-1])
    nulls_ = [plane_null("rbf_cka", A, Z, permutations=9, seed=s) for Z, s in ((B, 0), (shuffled, 0), (B, 1))]
    np.testing.assert_array_equal(nulls_[0].samples, nulls_[1].samples)
    assert not np.isclose(nulls_[0].samples, nulls_[2].samples).any()
    other = dataclasses.replace(B, ids=[f"j{k}" for k in range(12)])
    for function in (plane_null, exact_moments):
        with pytest.raises(ValueError, match="hold different images"):
            function("rbf_cka", A, other)


@pytest.mark.parametrize("name", ["linear_cka", "rsa", "cca", "procrustes_distance", "information_imbalance"])
def test_sites_without_a_number_are_nan_with_notes(name):
    A, B = two()
    A.features["a0"], B.features["b1"] = torch.ones(12, 3), torch.full((12, 2), math.nan)
    null = plane_null(name, A, B, permutations=5)
    nan = np.isnan(null.observed)
    assert nan[0].all() and nan[:, 1].all() and nan.sum() == 4
    assert (np.isnan(null.samples) == nan).all() and (np.isnan(null.p_values()) == nan).all()
    assert set(null.notes) == {(a, b) for a in A.names for b in B.names if a == "a0" or b == "b1"}
    assert "constant" in null.notes["a0", "b0"] and "NaN" in null.notes["a1", "b1"]
    assert null.notes == plane(name, A, B).notes
    assert list(plane_null(name, A, B, pairs=[("a0", "b0")], permutations=3).notes) == [("a0", "b0")]


@pytest.mark.parametrize("as_observed", [True, False])
def test_a_pair_that_fails_in_any_permutation_is_nan_with_a_note(as_observed, monkeypatch):
    """Some measures only find out when two sides are combined, as they are or in some permutations."""
    A, B = two()
    known = MEASURES["cca"]
    first = known.prepare(B.matrix("b0"), side="b0").Q[0, 0]

    def picky(left, right):
        if right.Q.shape[1] == 5 and (right.Q[0, 0] == first) == as_observed:
            raise NotComputable("not in this order")
        return known.combine(left, right)

    monkeypatch.setitem(MEASURES, "cca", dataclasses.replace(known, combine=picky))
    null = plane_null("cca", A, B, permutations=6)
    assert np.isnan(null.observed[:, 0]).all() and np.isnan(null.samples[:, :, 0]).all()
    assert not np.isnan(null.samples[:, :, 1:]).any()
    assert null.notes == {("a0", "b0"): "not in this order", ("a1", "b0"): "not in this order"}


def test_what_cannot_be_asked_is_answered_with_the_remedy(monkeypatch):
    A, B = two()
    for asked, message in (
        ({"measure": "cka"}, "unknown measure 'cka'; choose from linear_cka"),
        ({"pairs": [("a0", "b7")]}, "'b7' is no site of B; its sites are 'b0', 'b1', 'b2'"),
        ({"pairs": []}, "pairs is empty; leave it out"),
        ({"permutations": 0}, "permutations must be at least 1, got 0"),
        ({"k": 3}, "rbf_cka has no option 'k'"),
        ({"fraction": [0.2, 0.4]}, "give one fraction at a time"),
    ):
        with pytest.raises(ValueError, match=message):
            plane_null(**{"measure": "rbf_cka", "A": A, "B": B} | asked)
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 1000)
    with pytest.raises(MemoryError, match=r"the null of 2 × 3 sites × 12 rows needs about .* fewer images"):
        plane_null("rbf_cka", A, B)
    with pytest.raises(MemoryError, match="the exact null of 12 images needs about"):
        exact_moments("rbf_cka", A, B)
    assert plane_null("linear_cka", A, B, permutations=2).rounding == 1e-12  # feature space needs no n × n matrix


# ----------------------------------------------------------------------------------------------------- what it answers


def null_of(observed, samples, distance=False):
    observed, samples = np.array(observed, float), np.array(samples, float)
    rows, columns = ([f"{s}{i}" for i in range(count)] for s, count in zip("ab", observed.shape))
    return Null(observed, samples, rows, columns, "linear_cka", 9, distance)


OBSERVED = [[0.5, 0.2, np.nan], [0.3, 0.9, 0.1]]
SAMPLES = [
    [[0.1, 0.3, np.nan], [0.3, 0.2, 0.1]],  # equal to observed at (1, 0) and (1, 2)
    [[0.2, 0.1, np.nan], [0.1, 0.8, 0.0]],
    [[0.6, 0.1, np.nan], [0.2, 0.1, 0.2]],
]


@pytest.mark.parametrize("distance", [False, True])
def test_answers_counted_by_hand(distance):
    sign = -1 if distance else 1
    null = null_of(sign * np.array(OBSERVED), sign * np.array(SAMPLES), distance)
    np.testing.assert_allclose(null.p_values(), np.array([[2, 2, np.nan], [2, 1, 3]]) / 4)
    # the largest of each permutation: 0.3, 0.8, 0.6
    np.testing.assert_allclose(null.family_p(), np.array([[3, 4, np.nan], [4, 1, 4]]) / 4)
    np.testing.assert_allclose(null.mean(), sign * np.array([[0.3, 0.5 / 3, np.nan], [0.2, 1.1 / 3, 0.1]]))
    np.testing.assert_allclose(null.high(0.5), sign * np.array([[0.2, 0.1, np.nan], [0.2, 0.2, 0.1]]))
    np.testing.assert_allclose(null.high(0.95)[0, 0], sign * (0.2 + 0.9 * 0.4))  # between the 2nd and 3rd of 3
    best = null.best_match()
    assert best["site_a"].tolist() == ["a0", "a1"] and best["site_b"].tolist() == ["b0", "b1"]
    np.testing.assert_allclose(best["value"], [sign * 0.5, sign * 0.9])
    np.testing.assert_allclose(best["p_value"], [2 / 4, 1 / 4])
    np.testing.assert_allclose(best["p_best"], [2 / 4, 1 / 4])  # of B's sites: 0.3, 0.2, 0.6 and 0.3, 0.8, 0.2
    mean = null.mean_over([("a0", "b0"), ("a1", "b1"), ("a0", "b2")])
    per_permutation = np.array([0.15, 0.5, 0.35])
    assert mean["observed"] == pytest.approx(sign * 0.7) and mean["pairs"] == 2
    assert mean["null_mean"] == pytest.approx(sign * per_permutation.mean())
    assert mean["null_sd"] == pytest.approx(per_permutation.std(ddof=1))
    assert mean["null_high"] == pytest.approx(sign * (0.35 + 0.9 * 0.15))
    assert mean["p_value"] == 1 / 4


def test_choosing_the_best_of_many_sites_costs_significance():
    null = null_of([[0.5, 0.1]], [[[0.1, 0.7]], [[0.2, 0.6]], [[0.3, 0.0]]])
    row = null.best_match().iloc[0]
    assert (row["p_value"], row["p_best"]) == (1 / 4, 3 / 4)


def test_a_site_without_numbers_has_no_best_match_and_no_mean():
    null = null_of([[np.nan, np.nan], [0.1, np.nan]], [[[np.nan, np.nan], [0.2, np.nan]]])
    best = null.best_match()
    assert best["site_a"].tolist() == ["a0", "a1"] and best.iloc[0, 1:].isna().all()
    assert best["site_b"][1] == "b0" and best["p_best"][1] == 1
    with pytest.raises(NotComputable, match="no pair of sites allows linear_cka"):
        null.mean_over([("a0", "b0")])
    with pytest.raises(ValueError, match="'x' is no site of A"):
        null.mean_over([("x", "b0")])


def test_equality_up_to_rounding_reaches_the_observed_value():
    near = null_of([[0.5]], [[[0.5 - 1e-14]], [[0.5 - 1e-9]]])
    assert near.p_values()[0, 0] == near.family_p()[0, 0] == near.mean_over([("a0", "b0")])["p_value"] == 2 / 3
    assert dataclasses.replace(near, rounding=1e-6).p_values()[0, 0] == 1


def test_a_perfect_match_is_found_among_the_other_sites():
    X = [gaussian(40, 6, seed=s) for s in range(4)]
    A = made({f"a{i}": x for i, x in enumerate(X)})
    B = made({f"b{i}": X[i] @ gaussian(6, 6, seed=20 + i) for i in (2, 0, 3, 1)})
    best = plane_null("cca", A, B, permutations=39).best_match()
    assert best["site_b"].tolist() == ["b0", "b1", "b2", "b3"]
    assert (best["p_best"] == 1 / 40).all()


# ------------------------------------------------------------------------------------------------------- exact moments


def moments_of_all_permutations(K, L):
    orders = torch.tensor(list(itertools.permutations(range(len(K)))))
    values = (K * L[orders[:, :, None], orders[:, None, :]]).sum((1, 2)).numpy()
    centred = values - values.mean()
    return values.mean(), (centred**2).mean(), (centred**3).mean()


@pytest.mark.parametrize("n", [4, 5, 6, 7])
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("name", ["linear_cka", "rbf_cka"])
def test_exact_moments_are_those_of_all_permutations(name, debiased, n):
    A = made({"a": gaussian(n, 2), "skewed": gaussian(n, 3, seed=1) ** 3})
    B = made({"b": gaussian(n, 6, seed=2), "one far": np.eye(n)[:, :1] + 0.1 * gaussian(n, 2, seed=3)})
    B.features = {site: X.double() for site, X in B.features.items()}
    null = exact_moments(name, A, B, debiased=debiased)
    np.testing.assert_allclose(null.observed, plane(name, A, B, debiased=debiased).values, atol=1e-12)
    prepare = MEASURES[name].prepare
    for (i, a), (j, b) in itertools.product(enumerate(A.names), enumerate(B.names)):
        sides = (prepare(X.double(), side="X", debiased=debiased) for X in (A.matrix(a), B.matrix(b)))
        mean, variance, third = moments_of_all_permutations(*sides)
        assert null.mean[i, j] == pytest.approx(mean, abs=1e-14)
        assert null.variance[i, j] == pytest.approx(variance, rel=1e-10)
        assert null.skewness[i, j] == pytest.approx(third / variance**1.5, rel=1e-8, abs=1e-10)
        if debiased:
            assert null.variance[i, j] == pytest.approx(2 / (n * (n - 3)), rel=1e-12)


@pytest.mark.parametrize("n", [6, 30, 200])
def test_without_diagonals_the_third_moment_is_the_sum_over_eight_graphs_of_three_edges(n):
    """An independent derivation: edges are counted by the graph they form, and sums over different images by hand."""
    K, L = (unit_gram(X @ X.T, True, "X") for X in (torch.randn(n, p, dtype=torch.float64) ** 3 for p in (3, 8)))

    def terms(K):
        S3, t = float((K**3).sum()), float((K @ K @ K).trace())
        return np.array([S3, -S3, 2 * S3, t, 2 * S3, S3 - t, 2 * t - 4 * S3, 16 * S3 - 8 * t])

    images, counts = [2, 3, 4, 3, 4, 4, 5, 6], [1 / 2, 3, 3 / 4, 1, 1, 3, 3 / 2, 1 / 8]
    third = 8 * sum(c * a * b / math.perm(n, v) for c, v, a, b in zip(counts, images, terms(K), terms(L)))
    part = exact_nulls._PARTS[3]
    ours = exact_nulls._invariants(K)[part] @ exact_nulls._form(3, n) @ exact_nulls._invariants(L)[part]
    assert ours == pytest.approx(third, rel=1e-9)


@pytest.mark.parametrize("debiased", [True, False])
def test_exact_moments_agree_with_sampling(debiased):
    n, P = 100, 4000
    A = made({"a": gaussian(n, 3), "heavy": gaussian(n, 4, seed=1) ** 3})
    B = made({"b": gaussian(n, 60, seed=2), "c": gaussian(n, 2, seed=3) ** 3})
    null, exact = (
        plane_null("linear_cka", A, B, permutations=P, debiased=debiased),
        exact_moments("linear_cka", A, B, debiased=debiased),
    )
    centred = null.samples - exact.mean
    for moment, expected in ((1, 0), (2, exact.variance), (3, exact.skewness * exact.variance**1.5)):
        powers = centred**moment
        assert (np.abs(powers.mean(0) - expected) < 4.5 * powers.std(0) / math.sqrt(P)).all()
    assert (exact.skewness > 0.1).all()  # the third moment was there to be found
    # Pearson III has three moments right, and the tail where no outlying images rule: all but heavy × c
    above = (null.samples > exact.high(0.95)).mean(0)
    tail = dataclasses.replace(exact, observed=np.quantile(null.samples, 0.9, axis=0)).p_values()
    for share, expected in ((above, 0.05), (tail, 0.1)):
        spread = math.sqrt(expected * (1 - expected) / P)
        np.testing.assert_allclose(share[:, 0], expected, atol=4.5 * spread + 0.005)


def test_exact_nulls_note_the_sites_without_a_number_and_take_a_recording_with_itself():
    A, _ = two()
    A.features["a0"] = torch.ones(12, 3)
    null = exact_moments("linear_cka", A, A)
    nan = [[True, True], [True, False]]
    for values in (null.observed, null.mean, null.variance, null.skewness, null.p_values(), null.high()):
        assert (np.isnan(values) == nan).all()
    assert set(null.notes) == {("a0", "a0"), ("a0", "a1"), ("a1", "a0")} and "constant" in null.notes["a0", "a1"]
    assert null.observed[1, 1] == pytest.approx(1) and null.p_values()[1, 1] < 1e-3


def test_a_null_of_one_value_is_never_called_significant():
    """All images equally far from each other: centring leaves H, which no permutation changes."""
    A, B = made({"a": np.eye(9)}), made({"b": gaussian(9, 3)})
    exact = exact_moments("linear_cka", A, B, debiased=False)
    assert exact.variance[0, 0] == 0 and exact.mean[0, 0] == pytest.approx(exact.observed[0, 0])
    assert exact.p_values()[0, 0] == 1 and exact.high()[0, 0] == exact.mean[0, 0]
    assert plane_null("linear_cka", A, B, permutations=9, debiased=False).p_values()[0, 0] == 1


def test_exact_moments_refuse_what_they_are_not_exact_for():
    A, B = two()
    with pytest.raises(ValueError, match="exact moments are of linear_cka and rbf_cka, not of 'rsa'; use plane_null"):
        exact_moments("rsa", A, B)
    grid = made({"a": gaussian(6, 4, 3)}, policy="grid:2")
    with pytest.raises(ValueError, match="'grid:2' has several rows an image, which move together; use plane_null"):
        exact_moments("linear_cka", grid, grid)


# ---------------------------------------------------------------------------------------------------------- many cells


@pytest.mark.parametrize("shape", [(1,), (7,), (4, 5), (2, 3, 4)])
def test_q_values_are_scipys_in_any_shape(shape):
    p = np.random.default_rng(0).uniform(size=shape) ** 3
    p.flat[0] = p.flat[-1]  # a tie
    np.testing.assert_allclose(benjamini_hochberg(p).ravel(), false_discovery_control(p.ravel()), rtol=1e-12)


def test_q_values_keep_nan_which_counts_as_no_test():
    p = np.array([[0.01, np.nan], [0.04, 0.5]])
    q = benjamini_hochberg(p)
    assert np.isnan(q[0, 1])
    np.testing.assert_allclose(q[[0, 1, 1], [0, 0, 1]], [0.03, 0.06, 0.5])
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        benjamini_hochberg([0.5, 1.5])
