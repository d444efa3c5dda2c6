"""Of independent data the calibrated test rejects as often as it says: every measure, n ≪ p, n ≈ p and n ≫ p.

19 permutations make p <= 0.05 an event of probability exactly 1/20 where no two values tie: the observed one is above
all others. Where values can tie (neighbours counted), the test is conservative, and breaking ties by lot, in
expectation 1 / (1 + ties), brings back 1/20. Numbers of rejections lie where a binomial does with 1 − 1e-4.
"""

import numpy as np
import pytest
from scipy.stats import binom

from similarity.exact_nulls import exact_moments
from similarity.measures import MEASURES
from similarity.nulls import benjamini_hochberg, plane_null
from tests.made import made

ALPHA, PERMUTATIONS = 0.05, 19
SIDES = 20  # independent pairs of a trial, which share its permutations
SHAPES = {"n<<p": (12, 60), "n~p": (16, 16), "n>>p": (40, 4)}

VARIANTS = [
    ("linear_cka", {}),
    ("linear_cka", {"debiased": False}),
    ("rbf_cka", {}),
    ("rbf_cka", {"debiased": False}),
    ("rsa", {}),
    ("rsa", {"compare": "pearson"}),
    ("rsa", {"compare": "kendall"}),
    ("rsa", {"rdm": "euclidean", "compare": "cosine"}),
    ("cca", {}),
    ("svcca", {"variance": 0.5}),
    ("svcca", {"components": 3, "squared": True}),
    ("pwcca", {}),
    ("procrustes_distance", {}),
    ("angular_distance", {}),
    ("mutual_knn", {"k": 4}),
    ("cknna", {"k": 7}),
    ("information_imbalance", {}),
    ("information_imbalance", {"k": 4}),
    ("linear_regression_r2", {"folds": 2}),
]
# p >= n − 1 independent columns span everything that centred images can: these correlations are 1 for any two sides
CONSTANT = {(name, shape) for name in ("cca", "pwcca") for shape in ("n<<p", "n~p")}
COUNTS = ("mutual_knn", "information_imbalance", "kendall")  # of neighbours, ranks, pairs: permutations may agree
SLOW = ("cknna", "kendall")  # a third of the trials
CASES = [
    pytest.param(name, options, shape, id=f"{name} {options} {shape}")
    for name, options in VARIANTS
    for shape in SHAPES
    if (name, shape) not in CONSTANT
]


def independent(rng, *shape, count=SIDES, policy="gap"):
    """Recordings A and B of so many sites, everything independent but the rows of one image of a grid."""
    images = (shape[0], 1, shape[-1])

    def side():
        X = rng.normal(size=shape)
        return X if policy == "gap" else 2 * rng.normal(size=images) + X

    return (made({f"{s}{i}": side() for i in range(count)}, policy=policy) for s in "ab")


def expected_rejections(tests, probability=ALPHA):
    """The fewest and most of so many tests that a test of the right size rejects, but for 1e-4."""
    return binom.interval(1 - 1e-4, tests, probability)


def rejections(name, shape, trials, policy="gap", count=SIDES, **options):
    """(tests, rejected at ALPHA, rejected once ties are broken by lot, in expectation; tests with ties)."""
    rejected, by_lot, tied, rng = 0, 0.0, 0, np.random.default_rng(7)
    for trial in range(trials):
        A, B = independent(rng, *shape, count=count, policy=policy)
        pairs = list(zip(A.names, B.names))
        null = plane_null(name, A, B, pairs=pairs, permutations=PERMUTATIONS, seed=trial, **options)
        sign, cells = -1 if null.distance else 1, np.arange(count)
        above = sign * (null.samples - null.observed)[:, cells, cells]
        ties = (np.abs(above) <= null.rounding).sum(0)
        rejected += (null.p_values()[cells, cells] <= ALPHA).sum()
        by_lot += ((above <= null.rounding).all(0) / (1 + ties)).sum()
        tied += (ties > 0).sum()
    return trials * count, rejected, by_lot, tied


def test_every_measure_is_tried():
    assert {name for name, _ in VARIANTS} == set(MEASURES)


@pytest.mark.parametrize("name, options, shape", CASES)
def test_independent_data_are_rejected_at_the_stated_rate(name, options, shape):
    kind = options.get("compare", name)
    tests, rejected, by_lot, tied = rejections(name, SHAPES[shape], 8 if kind in SLOW else 24, **options)
    fewest, most = expected_rejections(tests)
    assert rejected <= most
    assert fewest <= by_lot <= most
    if kind in COUNTS:
        assert rejected > 0  # conservative, but a test
    else:
        assert tied == 0 and rejected == pytest.approx(by_lot)


@pytest.mark.parametrize("name, shape", sorted(CONSTANT))
def test_what_is_left_out_is_constant_by_construction_and_never_rejected(name, shape):
    tests, rejected, _, tied = rejections(name, SHAPES[shape], 2)
    assert rejected == 0 and tied == tests


# -------------------------------------------------------------------------------------------------- rows of one image

GRID = (16, 4, 6)


@pytest.mark.parametrize("name", ["linear_cka", "rbf_cka", "rsa", "procrustes_distance", "linear_regression_r2"])
def test_whole_images_keep_the_rate_where_rows_of_one_image_are_alike_and_rows_do_not(name):
    tests, rejected, *_ = rejections(name, GRID, 15, policy="grid:2", count=10)
    fewest, most = expected_rejections(tests)
    assert fewest <= rejected <= most
    by_rows = 0
    rng, few = np.random.default_rng(8), 4
    for trial in range(few):
        A, B = (
            made({site: recording.matrix(site) for site in recording.names})  # the mistake: every row an image
            for recording in independent(rng, *GRID, count=10, policy="grid:2")
        )
        pairs = list(zip(A.names, B.names))
        p = plane_null(name, A, B, pairs=pairs, permutations=PERMUTATIONS, seed=trial).p_values()
        by_rows += (np.diag(p) <= ALPHA).sum()
    assert by_rows > 3 * expected_rejections(few * 10)[1]


# ------------------------------------------------------------------------------------------------ a whole plane at once


@pytest.mark.parametrize("name", ["linear_cka", "information_imbalance"])
def test_choosing_the_best_of_many_keeps_the_rate_only_with_the_null_of_choosing(name):
    """Sites alike, as those of one network are: of 1 × 6 and of 3 × 6 sites the best is chosen."""
    rng, trials = np.random.default_rng(3), 200
    chosen = np.zeros(4)
    for trial in range(trials):
        common = rng.normal(size=(2, 20, 5))
        A, B = (
            made({f"{s}{i}": shared + rng.normal(size=(20, 5)) for i in range(count)})
            for s, count, shared in (("a", 3, common[0]), ("b", 6, common[1]))
        )
        null = plane_null(name, A, B, permutations=PERMUTATIONS, seed=trial)
        best = null.best_match().iloc[0]
        family, plain = np.nanmin(null.family_p()), null.p_values().min()
        mean = null.mean_over([(a, b) for a in A.names for b in B.names])
        chosen += np.array([best["p_best"], family, mean["p_value"], plain]) <= ALPHA
    fewest, most = expected_rejections(trials)
    assert (fewest <= chosen[:3]).all() and (chosen[:3] <= most).all()
    assert chosen[3] > 1.5 * most  # forgetting the choice is seen


def test_false_discoveries_are_as_rare_as_said():
    """Independent cells, a quarter of them real: of the cells called at q <= 0.2, at most 0.2 × 3/4 are false."""
    rng, shares = np.random.default_rng(5), []
    for trial in range(60):
        A, B = independent(rng, 30, 4, count=16)
        for i in range(4):
            B.features[f"b{i}"] = B.features[f"b{i}"] + 3 * A.features[f"a{i}"]
        p = np.diag(plane_null("linear_cka", A, B, permutations=199, seed=trial).p_values())
        called = benjamini_hochberg(p) <= 0.2
        assert called[:4].all()
        shares.append(called[4:].sum() / called.sum())
    assert np.mean(shares) == pytest.approx(0.15, abs=4 * np.std(shares) / 60**0.5)


@pytest.mark.parametrize("name", ["linear_cka", "rbf_cka"])
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_null_in_closed_form_rejects_at_the_stated_rate(name, debiased, shape):
    """p by Pearson III is no rank among permutations, so 5 % hold but for its fit: up to 1 % here."""
    rng, p = np.random.default_rng(6), []
    for _ in range(20):
        A, B = independent(rng, *SHAPES[shape])
        p.append(np.diag(exact_moments(name, A, B, debiased=debiased).p_values()))
    rejected, tests = (np.array(p) <= ALPHA).sum(), np.size(p)
    assert expected_rejections(tests, ALPHA - 0.01)[0] <= rejected <= expected_rejections(tests, ALPHA + 0.01)[1]
