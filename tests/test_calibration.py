"""The ruler: ceilings and floors that admit when they do not exist, places between them, and their intervals."""

import math

import numpy as np
import pandas as pd
import pytest

from similarity import intervals, plane
from similarity.calibration import (
    Comparison,
    Resamples,
    geometric_ceiling,
    matched_depth_pairs,
    position,
    ruler_table,
    with_intervals,
    word,
)
from similarity.resampling import resampled_planes
from tests.made import made


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def named(count, prefix="s"):
    return made({f"{prefix}{i}": gaussian(5, 2, seed=i) for i in range(count)})


# ----------------------------------------------------------------------------------------------------------- the pairs


def test_pairs_are_matched_by_relative_depth_and_ties_go_to_the_earlier_site():
    def places(count_a, count_b):
        return [(int(a[1:]), int(b[1:])) for a, b in matched_depth_pairs(named(count_a, "a"), named(count_b, "b"))]

    assert places(4, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert places(3, 5) == [(0, 0), (1, 2), (2, 4)]
    assert places(5, 3) == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]
    assert places(3, 4) == [(0, 0), (1, 1), (2, 3)]  # 1/2 lies between 1/3 and 2/3
    assert places(1, 3) == [(0, 0)] and places(3, 1) == [(0, 0), (1, 0), (2, 0)]
    for count_a in range(2, 12):  # every tie in whole numbers
        for count_b in range(2, 12):
            for i, j in places(count_a, count_b):
                gaps = [abs(i * (count_b - 1) - k * (count_a - 1)) for k in range(count_b)]
                assert j == gaps.index(min(gaps))


# ------------------------------------------------------------------------------------------------------------ the ruler


@pytest.mark.parametrize(
    "own_a, own_b, expected",
    [(0.9, 0.4, 0.6), (1, 1, 1), (0.0, 0.5, None), (0.5, -0.1, None), (-0.5, -0.5, None), (math.nan, 0.5, None)],
)
def test_the_ceiling_is_a_geometric_mean_and_does_not_exist_when_a_side_is_not_positive(own_a, own_b, expected):
    value = geometric_ceiling(own_a, own_b)
    assert math.isnan(value) if expected is None else value == pytest.approx(expected)


def test_position_is_zero_at_the_floor_and_one_at_the_ceiling():
    assert position(0.2, 0.2, 0.8) == 0
    assert position(0.8, 0.2, 0.8) == pytest.approx(1)
    assert position(0.1, 0.2, 0.7) == pytest.approx(-0.2)  # not clamped
    assert position(0.9, 0.2, 0.7) == pytest.approx(1.4)
    for floor, ceiling in ((0.5, 0.5), (0.6, 0.5), (math.nan, 0.5), (0.1, math.nan)):
        assert math.isnan(position(0.55, floor, ceiling))
    series = position(pd.Series([0.5, 0.5], [7, 9]), pd.Series([0.0, 0.6], [7, 9]), pd.Series([1.0, 0.6], [7, 9]))
    assert series.index.tolist() == [7, 9] and series[7] == 0.5 and math.isnan(series[9])


@pytest.mark.parametrize(
    "similarity, u, null_high, expected",
    [
        (0.05, 0.5, 0.06, "below chance"),
        (0.06, 0.5, 0.06, "below chance"),
        (0.05, math.nan, 0.06, "below chance"),
        (math.nan, math.nan, math.nan, "no number"),
        (0.5, math.nan, 0.06, "no scale"),
        (0.5, -0.3, 0.06, "below floor"),
        (0.5, -0.1, 0.06, "at floor"),
        (0.5, 0.0999, 0.06, "at floor"),
        (0.5, 0.1, 0.06, "partial"),
        (0.5, 0.8999, 0.06, "partial"),
        (0.5, 0.9, 0.06, "at ceiling"),
        (0.5, 1.1, 0.06, "at ceiling"),
        (0.5, 1.7, 0.06, "above ceiling"),
    ],
)
def test_the_word_follows_from_the_null_and_the_position(similarity, u, null_high, expected):
    assert word(similarity, u, null_high).startswith(expected)


def test_distances_have_their_ceiling_below_their_floor():
    assert position(0.5, 0.9, 0.1, distance=True) == pytest.approx(0.5)
    assert math.isnan(position(0.5, 0.1, 0.9, distance=True))
    assert word(0.5, 0.5, 0.8, distance=True) == "partial" and word(0.8, 0.5, 0.8, distance=True) == "below chance"


def arrays(*values):
    return [np.array(each, float) for each in values]


def compared():
    """One site of A, two of B, two seeds of B; every number chosen by hand."""
    cross = dict(zip([(0, 0), (0, 1)], arrays([[0.4, 0.2]], [[0.6, 0.0]])))
    floor = dict(zip([(0, 0), (0, 1)], arrays([[0.1, 0.1]], [[0.3, 0.1]])))
    own_b = {(0, 1): np.array([[1.0, 0.9], [0.9, 0.0]])}
    own_b[0, 1][0, 0], own_b[0, 1][1, 1] = 1.0, -0.49  # the diagonal is what counts
    return Comparison(["a"], ["b0", "b1"], cross, {(0, 1): np.array([[0.81]])}, own_b, floor)


def test_the_ruler_table_sets_each_pair_between_its_own_floor_and_ceiling():
    table = ruler_table(compared()).set_index("site_b")
    np.testing.assert_allclose(table["similarity"], [0.5, 0.1])
    np.testing.assert_allclose(table["low"], [0.4, 0.0])
    np.testing.assert_allclose(table["high"], [0.6, 0.2])
    np.testing.assert_allclose(table["floor"], [0.2, 0.1])
    np.testing.assert_allclose(table["ceiling"], [0.9, np.nan])  # b1's seeds share nothing
    np.testing.assert_allclose(table["u"], [0.3 / 0.7, np.nan])
    assert table["start"].isna().all()


def test_means_over_pairs_take_those_cells_and_no_others():
    rng = np.random.default_rng(0)
    cross = {(i, j): rng.normal(size=(2, 3)) for i in range(2) for j in range(2)}
    comparison = Comparison(["a0", "a1"], ["b0", "b1", "b2"], cross)
    mean = sum(cross.values()) / 4
    found = comparison.scale([("a0", "b2"), ("a1", "b0")])
    assert found["similarity"] == pytest.approx((mean[0, 2] + mean[1, 0]) / 2)
    assert np.isnan(found["ceiling"]) and np.isnan(found["floor"]) and np.isnan(found["u"])
    each = comparison.per_network_pair([("a0", "b2"), ("a1", "b0")])
    np.testing.assert_allclose(each, [(v[0, 2] + v[1, 0]) / 2 for v in cross.values()])


def test_one_seed_has_no_ceiling_and_no_twin_no_floor():
    full = compared()
    one_seed = ruler_table(Comparison(full.rows, full.columns, full.cross, full.own_a, {}, full.floor))
    assert one_seed["ceiling"].isna().all() and one_seed["u"].isna().all()
    assert one_seed["floor"].tolist() == [0.2, 0.1]
    bare = ruler_table(Comparison(full.rows, full.columns, {(0, 0): np.array([[0.4, 0.2]])}))
    assert bare[["ceiling", "floor", "u"]].isna().all().all()
    assert bare["similarity"].tolist() == bare["low"].tolist() == bare["high"].tolist() == [0.4, 0.2]


# --------------------------------------------------------------------------------------------------------- uncertainty


def seeds_of(count, rng, spread=0.05):
    """A comparison of one site each with so many seeds an architecture, which differ by `spread`."""
    pairs = [(i, j) for i in range(count) for j in range(count)]
    own = [(i, j) for i in range(count) for j in range(i + 1, count)]

    def values(keys, mean):
        return {key: np.array([[mean + spread * rng.normal()]]) for key in keys}

    return Comparison(["a"], ["b"], values(pairs, 0.5), values(own, 0.8), values(own, 0.8), values(pairs, 0.1))


def resampled(comparison, rng, count=40, spread=0.01):
    kinds = {}
    for kind in ("cross", "own_a", "own_b", "floor"):
        kinds[kind] = {k: v + spread * rng.normal(size=(count, 1, 1)) for k, v in getattr(comparison, kind).items()}
    return Resamples(Comparison(["a"], ["b"], **kinds), images=100, taken=80)


def test_with_two_seeds_the_interval_is_over_images_alone():
    rng = np.random.default_rng(1)
    observed = seeds_of(2, rng)
    again = resampled(observed, rng)
    found = with_intervals(observed, again, [("a", "b")])
    samples = again.comparison.scale([("a", "b")])["u"]
    expected = np.sqrt(80 / 20) * samples.std(ddof=1)
    assert found["u_se"] == pytest.approx(expected, rel=0.02) == found["u_image_se"]
    assert found["u_high"] - found["u"] == pytest.approx(1.96 * expected, rel=0.02)


def test_with_three_seeds_their_spread_is_in_the_interval():
    """Against the jackknife written out: every seed left out once, everything that it is in with it."""
    rng = np.random.default_rng(2)
    observed = seeds_of(3, rng)
    again = resampled(observed, rng)
    found = with_intervals(observed, again, [("a", "b")])

    def u(cross, own_a, own_b, floor):
        s, a, b, f = (np.mean([float(v[0, 0]) for v in kind]) for kind in (cross, own_a, own_b, floor))
        return (s - f) / (math.sqrt(a * b) - f)

    variance = found["u_image_se"] ** 2
    for side in (0, 1):
        values = []
        for seed in range(3):
            kept = [[v for k, v in kind.items() if k[side] != seed] for kind in (observed.cross, observed.floor)]
            own = [observed.own_a, observed.own_b]
            own[side] = {k: v for k, v in own[side].items() if seed not in k}
            values.append(u(kept[0], own[0].values(), own[1].values(), kept[1]))
        variance += 2 / 3 * np.sum((np.array(values) - np.mean(values)) ** 2)
    assert found["u_se"] == pytest.approx(math.sqrt(variance))
    assert (found["u_high"] - found["u_low"]) / (2 * found["u_se"]) > 1.97  # Student's t: few seeds


def test_a_scale_that_vanishes_in_a_resample_has_no_interval():
    rng = np.random.default_rng(3)
    observed = seeds_of(2, rng)
    again = resampled(observed, rng)
    for planes in (again.comparison.own_a, again.comparison.own_b):
        for values in planes.values():
            values[7] = 0.05  # below the floor
    found = with_intervals(observed, again, [("a", "b")])
    assert np.isnan(found["u_low"]) and np.isnan(found["u_high"]) and not np.isnan(found["u"])
    assert not np.isnan(found["similarity_low"])


def test_resampled_planes_and_the_observed_one_speak_of_the_same_cells():
    A, B = (made({f"{s}{i}": gaussian(60, 3, seed=i + 10 * k) for i in range(2)}) for k, s in enumerate("ab"))
    subsets = intervals.subsamples(60, resamples=5)
    planes = resampled_planes("linear_cka", {"cross": (A, B)}, subsets)["cross"]
    ids = [A.ids[k] for k in subsets[3]]
    np.testing.assert_allclose(planes[3], plane("linear_cka", A.select(ids=ids), B.select(ids=ids)).values, atol=1e-10)


def test_position_of_a_series_keeps_its_index():
    assert isinstance(position(pd.Series([0.5]), pd.Series([0.0]), pd.Series([1.0])), pd.Series)
