"""Planes over the depths of two networks: brute force, chains whose answer is known, a test that keeps its level."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from made import made
from scipy.spatial.distance import cdist
from scipy.stats import binom, rankdata

from processing import matched_depth, planes
from similarity.measures import linear_cka, mutual_knn
from utils import InputError

N = 60


def gaussian(n=N, p=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, p))


def rotated(X, seed):
    return X @ np.linalg.qr(gaussian(X.shape[1], X.shape[1], seed))[0]


def network(**sites):
    return made(sites)


def dropping(n=N, p=6):
    """A chain that keeps p coordinates, then one fewer at every site, down to one."""
    X = gaussian(n, p)
    return {f"s{p - kept}": X[:, :kept] for kept in range(p, 0, -1)}


def drifting(sites=12, n=N, p=4, seed=0):
    """A path through unrelated directions: what is near in depth is alike."""
    steps = np.random.default_rng(seed).normal(size=(sites, n, p))
    return {f"b{i:02d}": X for i, X in enumerate(np.cumsum(steps, axis=0))}


def plain_imbalance(X, Y, k):
    """2/(n²k) Σ ranks, by sorting everything."""
    n, D, E = len(X), cdist(X, X), cdist(Y, Y)
    np.fill_diagonal(D, np.inf)
    np.fill_diagonal(E, np.inf)
    ranks = rankdata(E, axis=1)
    return 2 / (n**2 * k) * sum(ranks[i, j] for i in range(n) for j in D[i].argsort()[:k])


def table_of(values, backward=None):
    """A table of planes of given numbers."""
    values = np.asarray(values, dtype=float)
    a, b = values.shape
    rows = [(f"a{i}", f"b{j}", (i + 1) / a, (j + 1) / b, values[i, j]) for i in range(a) for j in range(b)]
    table = pd.DataFrame(rows, columns=[*planes.PAIR, "a_to_b"])
    return table.assign(b_to_a=table["a_to_b"] if backward is None else np.ravel(backward))


def both(table):
    return planes.depth_test(table).set_index("value").loc["both"]


# ----------------------------------------------------------------------------------------------------------- the planes


@pytest.mark.parametrize("k", [1, 3])
def test_both_directions_agree_with_brute_force(k):
    A = network(x=gaussian(p=3), y=gaussian(p=2, seed=1))
    B = network(u=gaussian(p=4, seed=2), v=A["x"].numpy() + 0.5 * gaussian(p=3, seed=3), w=gaussian(p=1, seed=4))
    found = planes.imbalance_planes(A, B, k)
    assert list(zip(found["site_a"], found["site_b"])) == [(a, b) for a in "xy" for b in "uvw"]
    for row in found.itertuples():
        X, Y = A[row.site_a].double().numpy(), B[row.site_b].double().numpy()
        assert row.a_to_b == pytest.approx(plain_imbalance(X, Y, k), abs=1e-12)
        assert row.b_to_a == pytest.approx(plain_imbalance(Y, X, k), abs=1e-12)


def test_images_are_matched_by_id():
    A, B = network(x=gaussian()), network(u=gaussian(p=2, seed=1), v=gaussian(p=3, seed=2))
    turned = B.select(ids=B.ids[::-1])
    pd.testing.assert_frame_equal(planes.imbalance_planes(A, B), planes.imbalance_planes(A, turned))


def test_sites_of_one_name_in_both_networks_are_told_apart():
    X, Y = gaussian(), gaussian(seed=1)
    A, B = network(same=X), network(same=Y)
    assert planes.imbalance_planes(A, B)["a_to_b"].item() == pytest.approx(plain_imbalance(X, Y, 1), abs=0.02)
    assert planes.imbalance_planes(A, A)["a_to_b"].item() == pytest.approx(2 / N)


def test_cka_and_shared_neighbours_stand_beside():
    A, B = network(x=gaussian(), y=gaussian(seed=1)), network(u=gaussian() + 0.3 * gaussian(seed=2))
    found = planes.similarity_planes(A, B, neighbours=7)
    for row in found.itertuples():
        assert row.linear_cka == pytest.approx(linear_cka(A[row.site_a], B["u"]), abs=1e-10)
        assert row.mutual_knn == pytest.approx(mutual_knn(A[row.site_a], B["u"], k=7), abs=1e-12)


def test_rotations_lose_nothing_either_way():
    X = gaussian()
    A, B = (network(**{f"s{i}": 3 * rotated(X, 10 * side + i) for i in range(3)}) for side in (1, 2))
    found = planes.imbalance_planes(A, B)
    np.testing.assert_allclose(found[["a_to_b", "b_to_a"]], 2 / N, atol=1e-12)


def test_a_chain_that_drops_coordinates_loses_one_way():
    chain = dropping(n=200)
    found = planes.imbalance_planes(network(first=chain["s0"]), network(**chain))
    lost, kept = found["b_to_a"].to_numpy(), found["a_to_b"].to_numpy()
    assert (np.diff(lost) > 0).all() and lost[0] == pytest.approx(2 / 200)
    assert (lost[1:] > kept[1:]).all()


def test_a_constant_site_has_a_note_and_is_left_out():
    A = network(dead=np.ones((N, 3)), **drifting(4))
    found = planes.imbalance_planes(A, network(**drifting(4)))
    dead = found[found["site_a"] == "dead"]
    assert dead["a_to_b"].isna().all() and dead["note"].str.contains("constant").all()
    row = both(found)
    assert row["left_out"] == "A dead" and row["sites_a"] == 4 and np.isfinite(row["distance"])


def test_depths_are_shares_of_the_path_unless_given():
    A = network(x=gaussian(), y=gaussian())
    assert planes.relative_depths(A) == {"x": 0.5, "y": 1.0}
    assert planes.relative_depths(A, {"y": 0.9, "x": 0.3}) == {"x": 0.3, "y": 0.9}
    with pytest.raises(InputError, match="unknown site with a given depth 'y'"):
        planes.relative_depths(A, {"x": 0.3})
    with pytest.raises(InputError, match="above 0 and at most 1"):
        planes.relative_depths(A, {"x": 0, "y": 1})


# ------------------------------------------------------------------------------------------------------- best matches


def test_one_network_sampled_at_other_depths_matches_itself():
    every = drifting(12)
    half = {name: every[name] for name in list(every)[1::2]}
    row = both(planes.imbalance_planes(network(**every), network(**half)))
    # six sites of A are in B; the other six have a neighbour in B one twelfth away
    assert row["distance"] == row["smallest"] == pytest.approx((6 / 12 * 1 / 12) / 2)
    assert row["distance"] < row["null_low"] < row["chance"] < row["reversed"] and row["p"] <= 0.002


def test_the_exact_p_is_the_share_of_all_orders():
    row = both(table_of(1 - np.eye(4)))
    assert row["distance"] == 0 and row["exact"]
    assert row["p"] == row["p_smallest"] == pytest.approx(1 / math.factorial(4))


def test_each_p_is_of_shuffling_that_network_and_the_larger_one_counts():
    values, a, b = np.random.default_rng(6).random((3, 4)), np.arange(1, 4) / 3, np.arange(1, 5) / 4

    def distance(a, b):
        return (np.abs(a - b[values.argmin(1)]).mean() + np.abs(a[values.argmin(0)] - b).mean()) / 2

    shuffled_a = np.mean([distance(np.array(x), b) <= distance(a, b) + 1e-9 for x in itertools.permutations(a)])
    shuffled_b = np.mean([distance(a, np.array(x)) <= distance(a, b) + 1e-9 for x in itertools.permutations(b)])
    row = both(table_of(values))
    assert row[["p_shuffled_a", "p_shuffled_b"]].tolist() == pytest.approx([shuffled_a, shuffled_b])
    assert shuffled_a != shuffled_b and row["p"] == pytest.approx(max(shuffled_a, shuffled_b))
    assert row["p_smallest"] == pytest.approx(1 / 6)


def test_chance_is_the_mean_distance_of_any_two_sites():
    table = table_of(np.random.default_rng(0).random((5, 3)))
    depth_a, depth_b = np.arange(1, 6) / 5, np.arange(1, 4) / 3
    rng, values = np.random.default_rng(1), table["a_to_b"].to_numpy().reshape(5, 3)
    drawn = []
    for _ in range(4000):
        side = rng.random() < 0.5
        a, b = (rng.permutation(depth_a), depth_b) if side else (depth_a, rng.permutation(depth_b))
        to_b, to_a = np.abs(a - b[values.argmin(1)]).mean(), np.abs(a[values.argmin(0)] - b).mean()
        drawn.append((to_a + to_b) / 2)
    assert both(table)["chance"] == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / math.sqrt(4000))


def test_the_two_networks_may_change_places():
    values = np.random.default_rng(0).random((4, 6))
    one, other = both(table_of(values)), both(table_of(values.T))
    assert one[["distance", "chance", "p", "reversed"]].tolist() == pytest.approx(
        other[["distance", "chance", "p", "reversed"]].tolist()
    )
    assert one["p_shuffled_a"] == other["p_shuffled_b"]


def test_a_reversed_network_is_as_far_as_reversal_says():
    row = both(table_of(np.abs(np.arange(5)[:, None] + np.arange(5) - 4.0)))
    assert row["reversed"] == 0 and row["distance"] == pytest.approx(
        np.abs(np.arange(5) - np.arange(5)[::-1]).mean() / 5
    )


def test_ties_share_the_match_and_say_nothing():
    row = both(table_of(np.full((3, 4), 0.25)))
    assert row["distance"] == pytest.approx(row["chance"]) and row["p"] == 1
    assert planes.best_matches(table_of(np.full((1, 2), 0.25)))["match"].iloc[0] == "b0 | b1"


def test_similarities_are_best_where_they_are_large():
    table = table_of(1 - np.eye(3)).assign(linear_cka=np.eye(3).ravel(), mutual_knn=np.eye(3)[::-1].ravel())
    found = planes.depth_test(table).set_index("value")["distance"]
    assert found["linear_cka"] == 0 and found["mutual_knn"] == pytest.approx(4 / 9)
    matches = planes.best_matches(table, "linear_cka")
    assert matches["match"].tolist() == ["b0", "b1", "b2", "a0", "a1", "a2"] and (matches["value"] == 1).all()


def test_both_takes_the_best_match_by_the_mean_of_the_directions():
    forward, backward = np.array([[0.1, 0.3]]), np.array([[0.9, 0.3]])
    table = table_of(forward, backward)
    assert [planes.best_matches(table, value)["match"].iloc[0] for value in ("a_to_b", "both")] == ["b0", "b1"]


@pytest.mark.parametrize("shape, permutations", [((5, 5), 99), ((9, 8), 199)])
def test_the_test_keeps_its_level_where_order_means_nothing(shape, permutations):
    rng, draws = np.random.default_rng(7), 200
    found = []
    for draw in range(draws):
        grid = planes.grid(table_of(rng.random(shape)))
        found.append(planes._test(grid, permutations, draw))
    for level in (0.05, 0.2, 0.5):
        low, high = binom.ppf([0.001, 0.999], draws, level)
        for side in ("p_shuffled_a", "p_shuffled_b"):
            assert low <= sum(row[side] <= level for row in found) <= high
        assert sum(row["p"] <= level for row in found) <= high


def test_it_keeps_its_level_where_one_network_is_smooth_and_the_other_shuffled():
    path, rng, draws = np.stack(list(drifting(6).values())), np.random.default_rng(3), 200
    apart = np.abs(path[:, None] - path[None]).mean((2, 3))
    p = [planes._test(planes.grid(table_of(apart[:, rng.permutation(6)])), 99, 0)["p"] for _ in range(draws)]
    assert sum(np.array(p) <= 0.05) <= binom.ppf(0.999, draws, 0.05)


def test_no_permutations_are_no_test():
    with pytest.raises(InputError, match="permutations must be at least 1"):
        planes.depth_test(table_of(np.eye(3)), permutations=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda table: table.iloc[1:], "not every pair"),
        (lambda table: table.drop(columns="b_to_a"), "no column 'b_to_a'"),
        (lambda table: table.assign(a_to_b=np.nan), "no pair of sites has a number"),
    ],
)
def test_a_table_that_is_no_plane_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        planes.depth_test(change(table_of(np.eye(3))))


# ------------------------------------------------------------------------------------------------------ over the images


def test_matched_depths_of_one_network_are_nearest_and_the_interval_holds_the_estimate():
    A, B = network(**drifting(6)), network(**{name: rotated(X, 5) for name, X in drifting(6).items()})
    found = matched_depth.matched_depth(matched_depth.resample(A, B, resamples=20)).set_index(["value", "quantity"])
    plane = planes.imbalance_planes(A, B)
    same = plane["depth_a"] == plane["depth_b"]
    for value in ("a_to_b", "b_to_a"):
        assert found.loc[(value, "matched"), "estimate"] == pytest.approx(plane.loc[same, value].mean()) == 2 / N
        assert found.loc[(value, "elsewhere"), "estimate"] == pytest.approx(plane.loc[~same, value].mean())
    assert (found.loc["both", "pairs"] == 6).all()
    contrast = found.loc[("both", "elsewhere − matched")]
    assert 0 < contrast["low"] < contrast["estimate"] < contrast["high"]
    assert found.loc[("both", "best match"), "estimate"] == 0


def test_every_site_is_matched_with_the_nearest_and_ties_go_to_the_earlier():
    matched = planes.grid(table_of(np.zeros((2, 4)))).matched()  # depths 1/2, 1 and 1/4, 1/2, 3/4, 1
    assert matched.tolist() == [[True, True, True, False], [False, False, False, True]]


def test_the_place_of_the_largest_difference_is_found():
    chain = drifting(5)
    other = dict(chain, b02=gaussian(seed=99))
    found = matched_depth.largest_difference(matched_depth.resample(network(**chain), network(**other), resamples=20))
    assert (found["site_a"] == "b02").all() and (found["site_b"] == "b02").all() and (found["same"] == 1).all()
    np.testing.assert_allclose(found[["depth", "depth_low", "depth_high"]], 0.6)


def test_of_equal_differences_the_earlier_is_named():
    chain = {f"s{i}": rotated(gaussian(), i) for i in range(3)}
    found = matched_depth.largest_difference(matched_depth.resample(network(**chain), network(**chain), resamples=2))
    assert (found["site_a"] == "s0").all() and (found["same"] == 1).all()


def test_an_undecided_place_has_a_wide_interval():
    A, B = (network(**{f"s{i}": gaussian(seed=10 * side + i) for i in range(8)}) for side in (1, 2))
    row = matched_depth.largest_difference(matched_depth.resample(A, B, resamples=30)).iloc[0]
    assert row["depth_high"] - row["depth_low"] > 0.3 and row["same"] < 0.6


def test_subsets_are_planes_of_fewer_images():
    A, B = network(**drifting(3)), network(x=gaussian(), y=gaussian(seed=1))
    again = matched_depth.resample(A, B, resamples=2, seed=4)
    chosen = matched_depth.subsamples(N, resamples=2, share=0.5, seed=4)[1]
    part = [recording.select(ids=[A.ids[i] for i in chosen]) for recording in (A, B)]
    expected = planes.imbalance_planes(*part)
    for value in ("a_to_b", "b_to_a"):
        np.testing.assert_allclose(again.samples[value][1].ravel(), expected[value], atol=1e-12)
