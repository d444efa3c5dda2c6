"""Intervals over images and seeds: exact against planes of fewer images, and against variances worked out by hand."""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from similarity import grams, intervals, moments, plane, resampling
from similarity.intervals import (
    combine,
    interval,
    seed_variance,
    share_for,
    standard_error,
    subsamples,
)
from similarity.measures import MEASURES, FewImages
from similarity.resampling import resampled_planes
from tests.made import made

OPTIONS = [
    ("linear_cka", {}),
    ("linear_cka", {"debiased": False}),
    ("rbf_cka", {}),
    ("rbf_cka", {"fraction": 0.4, "debiased": False}),
    ("rsa", {}),
    ("rsa", {"rdm": "euclidean", "compare": "cosine"}),
    ("rsa", {"compare": "kendall"}),
    ("cca", {}),
    ("svcca", {}),
    ("svcca", {"components": 2, "squared": True}),
    ("pwcca", {}),
    ("procrustes_distance", {}),
    ("angular_distance", {}),
    ("mutual_knn", {"k": 3}),
    ("cknna", {"k": 9}),
    ("information_imbalance", {"k": 1}),
    ("information_imbalance", {"k": 4}),
    ("linear_regression_r2", {"folds": 4}),
]


def gaussian(*shape, seed=0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1, shape)


def three(shape, policy="gap"):
    """Recordings A, B, C that share something; B saw the images in another order."""
    common = gaussian(*shape, seed=9)
    recordings = [
        made(
            {f"{letter}{i}": common * i + gaussian(*shape, seed=10 * place + i, mean=3) for i in range(3)}, None, policy
        )
        for place, letter in enumerate("abc")
    ]
    A, B, C = recordings
    return A, B.select(ids=[B.ids[i] for i in np.random.default_rng(1).permutation(len(B))]), C


@pytest.fixture(scope="module", params=["gap", "wide", "grid:2"])
def recordings(request):
    """Feature space is the cheaper route for tall matrices, Grams for wide ones; grids have several rows an image."""
    shape = {"gap": (30, 5), "wide": (24, 50), "grid:2": (20, 4, 6)}[request.param]
    return three(shape, "gap" if request.param == "wide" else request.param)


def test_every_measure_has_a_case_here():
    assert {name for name, _ in OPTIONS} == set(MEASURES)


@pytest.mark.parametrize("name, options", OPTIONS)
@pytest.mark.filterwarnings("error::similarity.inputs.FewImages")
def test_a_subsets_plane_is_the_plane_of_only_those_images(recordings, name, options):
    A, B, C = recordings
    jobs = {"ab": (A, B), "cb": (C, B), "aa": (A, A)}
    subsets = subsamples(len(A), resamples=2, seed=4)
    found = resampled_planes(name, jobs, subsets, **options)
    some = {"ab": [("a1", "b2"), ("a0", "b2")], "cb": [("c0", "b0")], "aa": [("a2", "a1"), ("a0", "a0")]}
    only = resampled_planes(name, jobs, subsets, pairs=some, **options)
    for (key, (X, Y)), (number, subset) in itertools.product(jobs.items(), enumerate(subsets)):
        ids = [A.ids[i] for i in subset]
        expected = plane(name, X.select(ids=ids), Y.select(ids=ids), **options).frame()
        np.testing.assert_allclose(found[key][number], expected, atol=1e-10)
        wanted = np.full(expected.shape, np.nan)
        for a, b in some[key]:
            wanted[X.names.index(a), Y.names.index(b)] = expected.loc[a, b]
        np.testing.assert_allclose(only[key][number], wanted, atol=1e-10)


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("debiased", [True, False])
def test_feature_space_is_taken_for_many_rows_and_gives_the_same(monkeypatch, share, debiased):
    A, B, _ = three((30, 9, 2), "grid:3")
    monkeypatch.setattr(grams, "linear", None)  # 270 rows of 2 features: no Gram matrix is made
    subsets = subsamples(30, resamples=3, share=share)
    found = resampled_planes("linear_cka", {0: (A, B)}, subsets, debiased=debiased)[0]
    for subset, values in zip(subsets, found):
        rows = [A.select(ids=[A.ids[i] for i in subset]), B.select(ids=[A.ids[i] for i in subset])]
        for (i, a), (j, b) in itertools.product(enumerate(A.names), enumerate(B.names)):
            by_hand = moments.linear_cka(rows[0].matrix(a), rows[1].matrix(b), debiased=debiased)
            assert values[i, j] == pytest.approx(by_hand, abs=1e-10)


@pytest.mark.parametrize("shape, policy", [((40, 60), "gap"), ((30, 9, 2), "grid:3")], ids=["grams", "features"])
def test_an_image_that_outweighs_all_others_costs_no_digits(shape, policy):
    """Subtracting its rows from a sum would; every other subset leaves it out."""
    X, Y = gaussian(*shape), gaussian(*shape, seed=1)
    X[3] *= 1e6
    A, B = made({"a": X}, policy=policy), made({"b": X + Y}, policy=policy)
    subsets = subsamples(len(A), resamples=8)
    assert 0 < sum(3 in subset for subset in subsets) < 8
    found = resampled_planes("linear_cka", {0: (A, B)}, subsets)[0]
    for subset, values in zip(subsets, found):
        ids = [A.ids[i] for i in subset]
        assert values[0, 0] == pytest.approx(
            plane("linear_cka", A.select(ids=ids), B.select(ids=ids)).values[0, 0], abs=1e-6
        )


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("shape, policy", [((30, 40), "gap"), ((30, 9, 2), "grid:3")])
def test_a_site_that_is_constant_on_a_subset_has_no_number_there(name, shape, policy):
    varying = np.zeros(shape)
    varying[0] = gaussian(*shape[1:])  # one image differs; without it nothing does
    A = made({"a": gaussian(*shape), "one": varying, "none": np.ones(shape)}, policy=policy)
    subsets = [np.arange(1, 25), np.arange(24)]
    found = resampled_planes(name, {0: (A, A)}, subsets)[0]
    assert np.isnan(found[:, 2, :]).all() and np.isnan(found[:, :, 2]).all()
    for subset, values in zip(subsets, found):
        part = A.select(ids=[A.ids[i] for i in subset])
        np.testing.assert_allclose(values, plane(name, part).values, atol=1e-10)
    assert np.isnan(found[0, 1]).all() and np.isnan(found[0, :, 1]).all()


# -------------------------------------------------------------------------------------------------------------- sharing


@pytest.mark.parametrize("name, prepared", [("cca", "cca"), ("mutual_knn", "mutual_knn"), ("procrustes_distance",) * 2])
def test_a_recording_in_many_jobs_is_prepared_once_a_subset(monkeypatch, name, prepared):
    A, B, C = three((24, 4))
    count = collections.Counter()
    known = MEASURES[prepared]

    def counting(X, *, side, **options):
        count[side] += 1
        return known.prepare(X, side=side, **options)

    monkeypatch.setitem(MEASURES, prepared, dataclasses.replace(known, prepare=counting))
    resampled_planes(name, {"ab": (A, B), "ac": (A, C), "cb": (C, B), "aa": (A, A)}, subsamples(24, resamples=5))
    assert count == {site: 5 for recording in (A, B, C) for site in recording.names}


@pytest.mark.parametrize("name, made_by", [("linear_cka", "linear"), ("rbf_cka", "rbf"), ("rsa", "profiles")])
def test_gram_matrices_are_made_once_a_subset_and_only_of_the_sites_wanted(monkeypatch, name, made_by):
    A, B, C = three((24, 60))
    seen, real = collections.Counter(), getattr(grams, made_by)

    def counting(sites, *arguments):
        seen.update(list(sites))
        return real(sites, *arguments)

    monkeypatch.setattr(grams, made_by, counting)
    pairs = {"ab": [("a1", "b2")], "ac": [("a1", "c0"), ("a2", "c0")], "cb": [("c0", "b2")]}
    resampled_planes(name, {"ab": (A, B), "ac": (A, C), "cb": (C, B)}, subsamples(24, resamples=5), pairs=pairs)
    assert seen == {"a1": 5, "a2": 5, "b2": 5, "c0": 5}


def test_rows_are_matched_by_id_and_positions_are_those_of_the_first_recording():
    A, B, _ = three((24, 60))
    subset = [np.arange(20)]
    one = resampled_planes("linear_cka", {0: (A, B)}, subset)[0]
    other = resampled_planes("linear_cka", {0: (B, A)}, subset)[0].transpose(0, 2, 1)
    ids = B.ids[:20]
    np.testing.assert_allclose(other[0], plane("linear_cka", A.select(ids=ids), B.select(ids=ids)).values, atol=1e-10)
    assert abs(one - other).max() > 1e-3  # another twenty images


# ---------------------------------------------------------------------------------------------------------- its formula


@pytest.mark.parametrize("n, m", [(8, 6), (9, 5), (7, 1)])
def test_of_a_mean_all_subsets_give_s_over_root_n(n, m):
    values = gaussian(n, 2, seed=3) ** 3
    means = np.stack([values[list(subset)].mean(0) for subset in itertools.combinations(range(n), m)])
    all_of_them = math.sqrt((len(means) - 1) / len(means))  # `standard_error` divides by the number of subsets − 1
    expected = values.std(0, ddof=1) / math.sqrt(n)
    np.testing.assert_allclose(standard_error(means, n, m) * all_of_them, expected, rtol=1e-12)


def test_of_a_mean_drawn_subsets_give_its_variance_in_expectation():
    values = np.random.default_rng(0).exponential(size=50)
    subsets = subsamples(50, resamples=4000, seed=2)
    se = standard_error(np.array([values[subset].mean() for subset in subsets]), 50, len(subsets[0]))
    assert se == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=4 / math.sqrt(2 * 4000))  # 4 standard errors


def test_subsets_are_sorted_distinct_seeded_and_draw_all_images_alike():
    subsets = subsamples(50, resamples=400, share=0.7, seed=5)
    assert all(len(set(s)) == len(s) == 35 and (np.diff(s) > 0).all() for s in subsets)
    counts = np.bincount(np.concatenate(subsets), minlength=50)
    assert abs(counts - 280).max() < 5 * math.sqrt(400 * 0.7 * 0.3)
    np.testing.assert_array_equal(subsets, subsamples(50, resamples=400, share=0.7, seed=5))
    assert not np.array_equal(subsets, subsamples(50, resamples=400, share=0.7, seed=6))


def test_neighbours_and_canonical_correlations_are_resampled_by_halves():
    assert {name for name in MEASURES if share_for(name) == 0.5} == set(intervals.HALVES)
    assert (share_for("svcca", components=3), share_for("svcca", variance=0.9), share_for("rbf_cka")) == (0.8, 0.5, 0.8)
    with pytest.raises(ValueError, match="unknown measure"):
        share_for("cka")


def test_the_interval_is_the_normal_one_or_students():
    low, high = interval(np.array([1.0, 2.0]), np.array([0.1, np.nan]))
    np.testing.assert_allclose([low[0], high[0]], [1 - 0.1959963984540054, 1 + 0.1959963984540054])
    assert np.isnan([low[1], high[1]]).all()
    low, high = interval(0.5, 0.1, df=2, level=0.9)
    assert (low, high) == pytest.approx((0.5 - 0.2919985580353725, 0.5 + 0.2919985580353725))
    assert interval(0.0, 1.0, df=7)[1] == pytest.approx(stats.t(7).ppf(0.975))


def test_the_jackknife_over_seeds_is_the_one_worked_out_by_hand():
    # v̄ = 0.6, deviations −0.1, 0.1, 0 -> Σ 0.02, times 2/3
    assert seed_variance([0.5, 0.7, 0.6]) == pytest.approx(0.02 * 2 / 3)
    planes = [np.array([[0.5, 1.0]]), np.array([[0.7, 1.0]]), np.array([[0.6, 1.0]])]
    np.testing.assert_allclose(seed_variance(planes), [[0.02 * 2 / 3, 0.0]], atol=1e-15)
    seeds = gaussian(6, seed=8)  # of a mean it is s²/k
    assert seed_variance([np.delete(seeds, i).mean() for i in range(6)]) == pytest.approx(seeds.var(ddof=1) / 6)


def test_variances_add_and_satterthwaite_gives_the_degrees_of_freedom():
    # v = 0.01 + 0.02 + 0.03 = 0.06; df = 0.0036 / (0.0004/2 + 0.0009/3) = 7.2
    se, df = combine(0.1, [0.02, 0.03], [3, 4])
    assert (se, df) == pytest.approx((math.sqrt(0.06), 7.2))
    assert combine(0.1, [0.0, 0.0], [3, 3]) == pytest.approx((0.1, math.inf))
    assert combine(0.0, [0.02], [3]) == pytest.approx((math.sqrt(0.02), 2))
    assert combine(0.0, [], []) == (0.0, math.inf)
    several = combine(np.array([0.1, 0.1]), [np.array([0.02, 0.0]), np.array([0.03, 0.0])], [3, 4])
    np.testing.assert_allclose(several, [[math.sqrt(0.06), 0.1], [7.2, math.inf]])


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": 19}, "19 images are too few for an interval over images; at least 20"),
        ({"n": 50, "resamples": 1}, "resamples must be at least 2"),
        ({"n": 50, "share": 0.0}, "share must be between 0 and 1"),
        ({"n": 50, "share": 1.0}, "share must be between 0 and 1"),
        ({"n": 20, "share": 0.99}, "share 0.99 of 20 images is 20"),
        ({"n": 20, "share": 0.1}, "share 0.1 of 20 images is 2"),
    ],
)
def test_subsets_that_would_say_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        subsamples(**arguments)


@pytest.mark.parametrize(
    "subsets, message",
    [
        ([], "no subsets"),
        ([np.array([0, 1, 2, 3, 3])], "none of them twice"),
        ([np.array([0.0, 1, 2, 3])], "whole positions"),
        ([np.array([0, 1, 2, 24])], "from 0 to 23"),
        ([np.array([-1, 1, 2, 3])], "from 0 to 23"),
        ([np.arange(3)], "at least 4 positions"),
    ],
)
def test_subsets_that_hold_no_subset_are_refused(subsets, message):
    A, B, _ = three((24, 4))
    with pytest.raises(ValueError, match=message):
        resampled_planes("cca", {0: (A, B)}, subsets)


def test_what_cannot_be_asked_for_is_refused_with_the_remedy():
    A, B, _ = three((24, 4))
    jobs, subsets = {0: (A, B)}, subsamples(24, resamples=2)
    with pytest.raises(ValueError, match="one fraction of rbf_cka at a time"):
        resampled_planes("rbf_cka", jobs, subsets, fraction=[0.2, 0.4])
    with pytest.raises(ValueError, match="no jobs"):
        resampled_planes("cca", {}, subsets)
    with pytest.raises(ValueError, match="no pair of sites for job 0"):
        resampled_planes("cca", jobs, subsets, pairs={1: [("a0", "b0")]})
    with pytest.raises(ValueError, match="site 'b9' was not recorded; closest: 'b"):
        resampled_planes("cca", jobs, subsets, pairs={0: [("a0", "b9")]})
    with pytest.raises(ValueError, match="hold different images"):
        resampled_planes("cca", {0: (A, B), 1: (A, B.select(ids=B.ids[:23]))}, subsets)
    with pytest.raises(ValueError, match="unknown measure 'cka'"):
        resampled_planes("cka", jobs, subsets)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: standard_error(np.zeros((1, 3)), 10, 8), "1 resamples have no spread"),
        (lambda: standard_error(np.zeros((5, 3)), 10, 10), "m = 10 of n = 10"),
        (lambda: interval(0.0, 1.0, level=1.0), "level must be between 0 and 1"),
        (lambda: seed_variance([0.5]), "at least 2 seeds"),
        (lambda: combine(0.1, [0.1], [3, 3]), "1 variances over seeds but 2 counts"),
        (lambda: combine(0.1, [0.1], [1]), "at least 2 seeds an architecture"),
    ],
)
def test_numbers_without_a_spread_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_measures_warning_of_few_images_is_not_said_again_for_every_subset(recwarn):
    A, B, _ = three((24, 50))
    plane_of_all = plane("cca", A, B)
    assert "by construction" in plane_of_all.notes["a0", "b0"]
    resampled_planes("cca", {0: (A, B)}, subsamples(24, resamples=2))
    assert not [w for w in recwarn if issubclass(w.category, FewImages)]


def test_features_that_float32_cannot_carry_are_computed_in_float64(monkeypatch):
    """A few digits of a site survive centring: its Gram matrices, and from there on all, are made in float64."""
    monkeypatch.setattr(resampling, "LONG_WORK", 0)
    steep = 1e-3 * gaussian(40, 60) + 30 * gaussian(40, 1)
    A, B = made({"a": torch.as_tensor(steep).float()}), made({"b": gaussian(40, 60, seed=1)})
    dtypes, real = [], grams.rbf

    def noting(sites, fractions, debiased, dtype):
        dtypes.append(dtype)
        return real(sites, fractions, debiased, dtype)

    monkeypatch.setattr(grams, "rbf", noting)
    subsets = subsamples(40, resamples=3)
    found = resampled_planes("rbf_cka", {0: (A, B)}, subsets, fraction=0.01)[0]
    for subset, values in zip(subsets, found):
        ids = [A.ids[i] for i in subset]
        exact = plane("rbf_cka", A.select(ids=ids), B.select(ids=ids), fraction=0.01).values
        np.testing.assert_allclose(values, exact, atol=1e-4)
    assert dtypes[0] == torch.float32 and dtypes[-4:] == [torch.float64] * 4  # A and B, of the last two subsets
