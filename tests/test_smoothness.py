"""Changes from site to site: networks whose jumps are known, rules of site choice, and a test over architectures."""

import itertools

import numpy as np
import pandas as pd
import pytest
from made import made

from processing.smoothness import RULES, choose_sites, compare_families, step_changes, summary
from similarity.measures import information_imbalance, linear_cka
from utils import InputError

N = 80


def gaussian(n=N, p=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, p))


def rotation(p, seed):
    return np.linalg.qr(gaussian(p, p, seed))[0]


def bottleneck():
    """Rotations of 12 coordinates, then two of them only, then two in 12 again: the jump is into `d`."""
    X = gaussian(p=12)
    narrow = X[:, :2]
    sites = {"a": X, "b": X @ rotation(12, 1), "c": X @ rotation(12, 2), "d": narrow}
    return made(sites | {"e": narrow @ rotation(12, 3)[:2], "f": narrow @ rotation(12, 4)[:2]})


def even(steps, noise=0.3):
    """A path that changes by as much at every step."""
    X, sites = gaussian(p=6), {}
    for step in range(steps + 1):
        sites[f"s{step}"] = X
        X = np.sqrt(1 - noise**2) * X + noise * gaussian(p=6, seed=step + 1)
    return made(sites)


# --------------------------------------------------------------------------------------------------------- the changes


def test_rotations_change_nothing():
    X = gaussian()
    found = step_changes(made({f"s{i}": X @ rotation(5, i) for i in range(4)}))
    np.testing.assert_allclose(found[["forward", "backward"]].sub(found["floor"], axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(found["cka_change"], 0, atol=1e-6)
    assert found["floor"].iloc[0] == 2 / N


def test_steps_are_the_measures_of_neighbouring_sites():
    recording = even(3)
    for row in step_changes(recording, 3).itertuples():
        X, Y = recording[row.site_from], recording[row.site_to]
        assert row.forward == pytest.approx(information_imbalance(X, Y, k=3), abs=1e-12)
        assert row.backward == pytest.approx(information_imbalance(Y, X, k=3), abs=1e-12)
        assert row.both == pytest.approx((row.forward + row.backward) / 2)
        assert row.cka_change == pytest.approx(1 - linear_cka(X, Y), abs=1e-10)


def test_dropping_a_coordinate_loses_backwards():
    X = gaussian(300, 5)
    found = step_changes(made({f"s{i}": X[:, : 5 - i] for i in range(4)}))
    assert (found["backward"] > found["forward"]).all()


@pytest.mark.parametrize("change", ["both", "backward", "cka_change"])
def test_the_largest_jump_is_into_the_bottleneck(change):
    found = summary(step_changes(bottleneck()), change)
    assert (found["largest_from"], found["largest_to"]) == ("c", "d")
    assert found["largest_depth"] == pytest.approx((3 / 6 + 4 / 6) / 2) and found["steps"] == 5


def test_an_even_path_is_smoother_than_one_with_a_bottleneck():
    smooth, rough = (summary(step_changes(each)) for each in (even(5), bottleneck()))
    assert smooth["cv"] < 0.5 < rough["cv"]


def test_mean_and_coefficient_of_variation_are_those_of_the_steps():
    changes = pd.DataFrame({"both": [1.0, 2.0, 6.0], "site_from": list("abc"), "site_to": list("bcd"), "depth": 0.5})
    found = summary(changes)
    assert (found["mean"], found["largest"]) == (3.0, 6.0) and found["cv"] == pytest.approx(np.sqrt(7) / 3)


def test_what_was_spent_goes_with_the_steps():
    spent = pd.DataFrame({"parameters": [30, 10, 20], "operations": [9.0, 1.0, 1.0]}, index=["s2", "s0", "s1"])
    found = step_changes(even(2), spent=spent)
    assert found[["parameters_from", "parameters_to"]].to_numpy().tolist() == [[10, 20], [20, 30]]
    assert found["operations_to"].tolist() == [1, 9]
    with pytest.raises(InputError, match="no row for site 's1'"):
        step_changes(even(2), spent=spent.drop("s1"))
    with pytest.raises(InputError, match="'parameters' is not a sum"):
        step_changes(even(2), spent=spent.assign(parameters=[5, 10, 20]))


def test_a_constant_site_leaves_a_reason_and_no_number():
    found = summary(step_changes(made({"a": gaussian(), "dead": np.ones((N, 2)), "c": gaussian()})))
    assert np.isnan(found["mean"]) and "'a' to 'dead'" in found["reason"] and "constant" in found["reason"]


def test_one_step_has_no_spread_and_one_site_no_step():
    found = summary(step_changes(made({"a": gaussian(), "b": gaussian(seed=1)})))
    assert np.isnan(found["cv"]) and found["mean"] == found["largest"] and "no spread" in found["reason"]
    with pytest.raises(InputError, match="at least 2 sites"):
        step_changes(made({"a": gaussian()}))


# -------------------------------------------------------------------------------------------------- the choice of sites


def test_the_rules_choose_blocks_every_second_and_ends_of_stages():
    sites, stages = list("abcdefg"), [1, 1, 2, 2, 2, 3, 3]
    assert [choose_sites(sites, stages, rule) for rule in RULES] == [sites, list("aceg"), list("beg")]
    assert choose_sites(sites[:6], stages[:6], "every second") == list("bdf")


@pytest.mark.parametrize(
    "sites, stages, rule, message",
    [
        ("ab", [1, 1], "every third", "unknown rule"),
        ("ab", [1], "every block", "2 sites with 1 stages"),
        ("aba", [1, 1, 2], "every block", "each once"),
        ("abc", [1, 2, 1], "stage ends", "comes back"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(sites, stages, rule, message):
    with pytest.raises(InputError, match=message):
        choose_sites(sites, stages, rule)


# ------------------------------------------------------------------------------------------------------------- families


def networks(values, seeds=1):
    """A table of models, labels and architectures: {(family, architecture): cv}, so many seeds of each."""
    rows = [(f"{name}-{seed}", family, name, cv) for (family, name), cv in values.items() for seed in range(seeds)]
    table = pd.DataFrame(rows, columns=["model", "family", "architecture", "cv"])
    return table, dict(zip(table["model"], table["family"])), dict(zip(table["model"], table["architecture"]))


def eight(values):
    names = [("CNN", f"c{i}") for i in range(4)] + [("transformer", f"t{i}") for i in range(4)]
    return dict(zip(names, values))


def test_p_is_the_share_of_all_arrangements():
    values = np.random.default_rng(5).normal(size=8)
    table, labels, _ = networks(eight(values))
    row = compare_families(table, labels, statistics=["cv"]).iloc[0]
    picks = [list(chosen) for chosen in itertools.combinations(range(8), 4)]
    differences = [2 * values[chosen].mean() - 2 * values.mean() for chosen in picks]
    assert row["difference"] == pytest.approx(differences[0]) and row["orders"] == 70 and row["exact"]
    assert row["p"] == pytest.approx(np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12))


def test_families_that_do_not_overlap_reach_the_smallest_p():
    table, labels, _ = networks(eight([5, 6, 7, 8, 1, 2, 3, 4]))
    row = compare_families(table, labels, statistics=["cv"]).iloc[0]
    assert row["p"] == row["p_smallest"] == pytest.approx(2 / 70) and row["difference"] == 4


def test_more_seeds_are_no_more_architectures():
    values = eight([5, 6, 3, 8, 1, 2, 7, 4])
    one, many = (
        compare_families(table, labels, architectures=own, statistics=["cv"]).iloc[0]
        for table, labels, own in (networks(values), networks(values, seeds=3))
    )
    assert many["networks"] == 24 and many["architectures_a"] == 4
    assert many[["difference", "p", "orders"]].tolist() == one[["difference", "p", "orders"]].tolist()


def test_seeds_are_averaged_before_architectures():
    table = pd.DataFrame({"model": list("abcd"), "cv": [0.0, 3.0, 4.0, 2.0]})
    labels = {"a": "CNN", "b": "CNN", "c": "CNN", "d": "transformer"}
    own = {"a": "x", "b": "x", "c": "y", "d": "z"}
    row = compare_families(table, labels, architectures=own, statistics=["cv"]).iloc[0]
    assert row["mean_a"] == pytest.approx((1.5 + 4) / 2) and row["mean_b"] == 2


def test_a_model_without_a_number_leaves_no_test():
    table, labels, _ = networks(eight([1, 2, 3, np.nan, 5, 6, 7, 8]))
    found = compare_families(table.assign(mean=table.index), labels, statistics=["cv", "mean"])
    assert np.isnan(found["p"][0]) and "'c3-0' has no cv" in found["reason"][0]
    assert found["p_holm"][1] == found["p"][1]


@pytest.mark.parametrize(
    "labels, architectures, message",
    [
        ({"a": "CNN", "b": "CNN", "c": "CNN"}, None, "comparison is of two"),
        ({"a": "CNN", "b": "transformer"}, None, "no family, first 'c'"),
        ({"a": "CNN", "b": "transformer", "c": "CNN"}, {"a": "x", "b": "x", "c": "y"}, "two families"),
    ],
)
def test_families_that_cannot_be_compared_are_refused(labels, architectures, message):
    table = pd.DataFrame({"model": list("abc"), "cv": [1.0, 2.0, 3.0]})
    with pytest.raises(InputError, match=message):
        compare_families(table, labels, architectures=architectures, statistics=["cv"])


def test_no_permutations_are_no_test():
    table, labels, _ = networks(eight(range(8)))
    with pytest.raises(InputError, match="permutations must be at least 1"):
        compare_families(table, labels, statistics=["cv"], permutations=0)
