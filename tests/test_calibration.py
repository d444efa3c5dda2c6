"""The ruler: nulls with the right size, ceilings and floors that admit when they do not exist."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest

from similarity import calibration, measures, plane
from similarity.calibration import (
    geometric_ceiling,
    matched_depth_pairs,
    mean_over,
    permutation_null,
    position,
    ruler_table,
    word,
)
from similarity.measures import MEASURES, NotComputable
from tests.made import made


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def named(count, prefix="s"):
    return made({f"{prefix}{i}": gaussian(5, 2, seed=i) for i in range(count)})


# ------------------------------------------------------------------------------------------------------------ the null


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("n, p", [(12, 60), (16, 16), (40, 4)], ids=["n<<p", "n=p", "n>>p"])
def test_independent_data_are_rejected_at_the_stated_rate(name, n, p):
    """Type-I error at α = 0.05: 39 permutations make p ≤ 0.05 an event of probability exactly 2/40."""
    # all components of n <= p make canonical correlations 1 for any two sides, and 10 neighbours are most of 12
    options = {"svcca": {"variance": 0.5}, "mutual_knn": {"k": 4}, "cknna": {"k": 7}}.get(name, {})
    if name in ("cca", "pwcca") and n <= p:
        pytest.skip(f"{name} of {n} images and {p} features is 1 for any two sides: test_a_saturated_measure…")
    rng = np.random.default_rng(1)
    trials, pairs_each = 12, 25
    p_values = []
    for trial in range(trials):
        A, B = (made({f"{s}{i}": rng.normal(size=(n, p)) for i in range(pairs_each)}) for s in "ab")
        pairs = [(f"a{i}", f"b{i}") for i in range(pairs_each)]
        p_values += permutation_null(name, A, B, pairs, permutations=39, seed=trial, **options)["p_value"].tolist()[:-1]
    p_values = np.array(p_values)
    spread = math.sqrt(0.05 * 0.95 / len(p_values))
    assert np.mean(p_values <= 0.05) == pytest.approx(0.05, abs=3 * spread)
    assert np.mean(p_values) == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / len(p_values)))


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("shape", [(30, 40), (60, 5)])
def test_the_observed_value_is_the_measure_and_a_perfect_match_is_never_reached(name, shape):
    A, B = made({"a": gaussian(*shape)}), made({"b": gaussian(*shape), "c": gaussian(*shape, seed=2)})
    table = permutation_null(name, A, B, [("a", "b"), ("a", "c")], permutations=19)
    values = plane(name, A, B).values[0]
    np.testing.assert_allclose(table["observed"], [*values, values.mean()], atol=1e-9)
    saturated = name in ("cca", "pwcca") and shape == (30, 40)
    assert table["p_value"][0] == (1 if saturated else 1 / 20)
    assert table.iloc[-1][["site_a", "site_b"]].tolist() == ["mean", "mean"]


@pytest.mark.parametrize(
    "name, options", [("linear_cka", {}), ("svcca", {"variance": 0.9}), ("rsa", {"compare": "kendall"})]
)
@pytest.mark.parametrize("policy", ["gap", "grid:2"])
def test_the_null_agrees_with_permuting_the_images_by_hand(name, options, policy):
    shape = (9, 3) if policy == "gap" else (9, 4, 3)
    A, B = made({"a": gaussian(*shape)}, policy=policy), made({"b": gaussian(*shape, seed=1)}, policy=policy)
    table = permutation_null(name, A, B, [("a", "b")], permutations=30, seed=5, **options)
    rng, by_hand = np.random.default_rng(5), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", measures.FewImages)
        for _ in range(30):
            moved = B["b"][rng.permutation(9)].reshape(-1, 3)  # whole images: their cells move together
            by_hand.append(getattr(measures, name)(A.matrix("a"), moved, **options))
    assert table["null_mean"][0] == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert table["null_high"][0] == pytest.approx(np.quantile(by_hand, 0.95), abs=1e-9)
    assert table["p_value"][0] == (1 + np.sum(np.array(by_hand) >= table["observed"][0] - 1e-12)) / 31


@pytest.mark.parametrize("name", ["linear_cka", "rbf_cka", "svcca"])
def test_grids_permute_whole_images_because_cells_of_one_image_are_not_independent(name):
    """What two models share here is only where a cell lies, the same in every image: permuting images keeps it, and
    the null must hold it too; permuting cells would call it significant."""
    place = gaussian(16, 3, seed=7)
    A, B = (made({"x": place + 0.3 * gaussian(20, 16, 3, seed=s)}, policy="grid:4") for s in (1, 2))
    row = permutation_null(name, A, B, [("x", "x")], permutations=39).iloc[0]
    assert row["observed"] > 0.5
    assert row["null_mean"] == pytest.approx(row["observed"], abs=0.05)
    assert row["p_value"] > 0.05
    cells = [np.random.default_rng(s).permutation(320) for s in range(39)]
    by_cells = [getattr(measures, name)(A.matrix("x"), B.matrix("x")[order]) for order in cells]
    assert max(by_cells) < 0.3 < row["observed"]  # the mistake would have been seen


def test_one_permutation_serves_all_pairs_so_that_their_mean_has_a_null():
    X = gaussian(20, 4)
    A, B = made({"a": X, "b": X}), made({"c": gaussian(20, 4, seed=1)})
    table = permutation_null("linear_cka", A, B, [("a", "c"), ("b", "c")], permutations=50)
    for column in ("observed", "null_mean", "null_high", "p_value"):
        assert table[column].nunique() == 1 or np.ptp(table[column]) < 1e-12


def test_the_null_is_seeded_and_matches_rows_by_id():
    A, B = made({"a": gaussian(15, 3)}), made({"b": gaussian(15, 3, seed=1)})
    again = B.select(ids=B.ids[::-1])
    tables = [
        permutation_null("rbf_cka", A, other, [("a", "b")], permutations=25, seed=seed)
        for other, seed in ((B, 0), (B, 0), (again, 0), (B, 1))
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2])
    assert not np.isclose(tables[0]["null_mean"][0], tables[3]["null_mean"][0], atol=1e-9)
    with pytest.raises(ValueError, match="hold different images"):
        permutation_null("rbf_cka", A, made({"b": gaussian(15, 3)}, ids=[f"j{k}" for k in range(15)]), [("a", "b")])


def test_pairs_without_a_number_are_nan_in_the_table_and_left_out_of_the_mean():
    A = made({"a": gaussian(15, 3), "constant": np.ones((15, 3))})
    table = permutation_null("rsa", A, A, [("constant", "a"), ("a", "a")], permutations=9)
    assert table["site_a"].tolist() == ["constant", "a", "mean"]
    assert table.iloc[0][["observed", "null_mean", "null_high", "p_value"]].isna().all()
    assert table["observed"][2] == table["observed"][1] == pytest.approx(1)
    with pytest.raises(NotComputable, match="no pair of sites allows rsa"):
        permutation_null("rsa", A, A, [("constant", "a")], permutations=9)


def test_an_unknown_measure_is_answered_with_the_known_ones():
    A = named(1)
    with pytest.raises(ValueError, match="unknown measure 'cka'; choose from linear_cka"):
        permutation_null("cka", A, A, [("s0", "s0")])


def test_a_saturated_measure_is_never_called_significant():
    """With more components than images every canonical correlation is 1, under the null as well."""
    A, B = made({"a": gaussian(12, 60)}), made({"b": gaussian(12, 60, seed=1)})
    for name, options in (("svcca", {"variance": 1}), ("cca", {}), ("pwcca", {})):
        row = permutation_null(name, A, B, [("a", "b")], permutations=39, **options).iloc[0]
        assert row["observed"] == pytest.approx(1) and row["null_mean"] == pytest.approx(1)
        assert row["p_value"] == 1


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


def test_the_mean_over_pairs_takes_those_cells_and_no_others():
    A, B = named(2, "a"), named(3, "b")
    result = plane("linear_cka", A, B)
    assert mean_over(result, [("a0", "b2"), ("a1", "b0")]) == pytest.approx(
        (result.values[0, 2] + result.values[1, 0]) / 2
    )


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


def planes_of(values_by_plane, rows, columns):
    return [calibration.Plane(np.array(v, float), rows, columns, "linear_cka", {}, "gap", 9) for v in values_by_plane]


def test_the_ruler_table_sets_each_pair_between_its_own_floor_and_ceiling():
    cross = planes_of([[[0.4, 0.2]], [[0.6, 0.0]]], ["a"], ["b0", "b1"])
    own_a = planes_of([[[0.81]]], ["a"], ["a"])
    own_b = planes_of([[[1.0, 0.9], [0.9, 0.49]], [[1.0, 0.9], [0.9, -0.49]]], ["b0", "b1"], ["b0", "b1"])
    floor = planes_of([[[0.1, 0.1]], [[0.3, 0.1]]], ["a"], ["b0", "b1"])
    table = ruler_table(cross, own_a, own_b, floor).set_index("site_b")
    np.testing.assert_allclose(table["similarity"], [0.5, 0.1])
    np.testing.assert_allclose(table["low"], [0.4, 0.0])
    np.testing.assert_allclose(table["high"], [0.6, 0.2])
    np.testing.assert_allclose(table["floor"], [0.2, 0.1])
    np.testing.assert_allclose(table["ceiling"], [0.9, np.nan])  # b1's seeds share nothing: 0.49 and −0.49
    np.testing.assert_allclose(table["u"], [0.3 / 0.7, np.nan])


def test_one_seed_has_no_ceiling_and_no_twin_no_floor():
    cross = planes_of([[[0.4, 0.2]]], ["a"], ["b0", "b1"])
    own_a = planes_of([[[0.81]]], ["a"], ["a"])
    floor = planes_of([[[0.1, 0.1]]], ["a"], ["b0", "b1"])
    one_seed = ruler_table(cross, own_a, [], floor)
    assert one_seed["ceiling"].isna().all() and one_seed["u"].isna().all()
    assert one_seed["floor"].tolist() == [0.1, 0.1]
    bare = ruler_table(cross, [], [], [])
    assert bare[["ceiling", "floor", "u"]].isna().all().all()
    assert bare["similarity"].tolist() == bare["low"].tolist() == bare["high"].tolist() == [0.4, 0.2]
