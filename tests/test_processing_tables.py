"""Tables of the processing-steps study on networks whose answer is known."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from made import made
from scipy import stats

from processing.together import planes_together, resampled_together
from studies import processing_tables as tables
from studies.subjects import Subject
from studies.walks import Walk

N = 48


def walk(label, seed=0, family="CNN", body=None, training="supervised", twin=False):
    kind = "segmentation" if training == "segmentation" else "classification"
    return Walk(Subject(label, family, seed, kind, 32, training=training), body or label, twin)


def drifting(sites=6, seed=0, p=4):
    """A path through unrelated directions: what is near in depth is alike."""
    steps = np.random.default_rng(seed).normal(size=(sites, N, p))
    return {f"e{i}": X for i, X in enumerate(np.cumsum(steps, axis=0))}


def rotated(path, seed=0):
    """The same neighbours at every site, in other coordinates: an invertible linear map that keeps distances."""
    generator = np.random.default_rng(seed)
    return {name: X @ np.linalg.qr(generator.normal(size=(X.shape[1],) * 2))[0] for name, X in path.items()}


def sites_of(path, stages):
    rows = {"site": list(path), "stage": stages, "parameters": range(1, len(path) + 1)}
    return pd.DataFrame(rows | {"operations": range(10, 10 * len(path) + 1, 10)})


def together_of(paths):
    return planes_together({name: made(path) for name, path in paths.items()}, neighbours=5)


# ------------------------------------------------------------------------------------------------------------ relations


def test_two_networks_are_what_they_share_first():
    a, b = walk("ResNet", 0), walk("ResNet", 1)
    tuned = walk("ResNet, tuned", 0, body="ResNet", training="segmentation")
    assert tables.relation_of(a, b) == tables.SEED
    assert tables.relation_of(a, tuned) == tables.START
    assert tables.relation_of(b, tuned) == tables.BODY
    assert tables.relation_of(a, walk("RegNet")) == tables.FAMILY
    assert tables.relation_of(a, walk("ViT", family="transformer")) == tables.OTHER
    assert walk("ResNet", 3, twin=True).name == "ResNet, untrained (3)"


def test_a_rotated_network_matches_itself_at_every_depth():
    path = drifting()
    walks = [walk("A", 0), walk("A", 1)]
    together = together_of({"A (0)": path, "A (1)": rotated(path)})
    (row,) = tables.pairs_table(walks, together, "encoder", 199, 0).to_dict("records")
    assert row["matched"] == pytest.approx(2 / N)  # (k + 1)/n with k = 1: all is told
    assert row["distance"] == row["smallest"] == 0
    assert row["relation"] == tables.SEED and row["q"] == row["p"] < 0.05
    assert row["elsewhere − matched"] == pytest.approx(row["elsewhere"] - row["matched"])
    depths, values = tables.matched_curve(together, "A (0)", "A (1)")
    np.testing.assert_allclose(depths, np.arange(1, 7) / 6)
    np.testing.assert_allclose(values, 2 / N)


def test_a_network_sampled_at_every_second_site_matches_itself_at_equal_depth():
    path = drifting(8)
    half = dict(list(path.items())[1::2])
    walks = [walk("A"), walk("B")]
    (row,) = tables.pairs_table(walks, together_of({"A (0)": path, "B (0)": half}), "encoder", 199, 0).to_dict(
        "records"
    )
    # each of the four has its own site; the four between them are an eighth of the depth from the nearest
    assert row["distance"] == pytest.approx((0 + 0.5 * 1 / 8) / 2)
    assert row["matched"] < row["elsewhere"]


def test_losing_a_coordinate_at_every_step_shows_one_way_between_networks():
    base = np.random.default_rng(1).normal(size=(N, 6))
    whole, losing = {f"e{i}": base for i in range(5)}, {f"e{i}": base[:, i:] for i in range(5)}
    together = together_of({"A (0)": whole, "B (0)": losing})
    table = together.table("A (0)", "B (0)")
    last = table[(table["site_a"] == "e4") & (table["site_b"] == "e4")].iloc[0]
    first = table[(table["site_a"] == "e0") & (table["site_b"] == "e0")].iloc[0]
    assert first["a_to_b"] == first["b_to_a"] == pytest.approx(2 / N)
    along = table[table["site_a"] == "e0"]
    assert (np.diff(along["b_to_a"]) > 0).all()  # what was dropped cannot be told
    assert last["a_to_b"] < last["b_to_a"]


def test_means_over_pairs_have_the_jackknife_of_bodies():
    values = pd.Series([0.1, 0.4, 0.2, 0.9, 0.3, 0.5])
    bodies = [set(pair) for pair in itertools.combinations("ABCD", 2)]
    row = tables.over_bodies(values, bodies)
    without = [np.mean([v for v, pair in zip(values, bodies) if body not in pair]) for body in "ABCD"]
    se = math.sqrt(3 / 4 * sum((w - np.mean(without)) ** 2 for w in without))
    reach = stats.t.ppf(0.975, 3) * se
    assert row == pytest.approx({"bodies": 4, "mean": values.mean(), "low": 0.4 - reach, "high": 0.4 + reach})


def test_two_bodies_have_no_interval():
    row = tables.over_bodies(pd.Series([0.1, 0.3]), [{"A"}, {"B"}])
    assert row["mean"] == pytest.approx(0.2) and math.isnan(row["low"])


def test_relations_and_curves_are_means_of_their_pairs():
    path = drifting()
    paths = {"A (0)": path, "A (1)": rotated(path), "B (0)": drifting(seed=5)}
    walks = [walk("A", 0), walk("A", 1), walk("B", 0, family="transformer")]
    together = together_of(paths)
    pairs = tables.pairs_table(walks, together, "encoder", 99, 0)
    relations = tables.relations_table(pairs, walks).set_index(["relation", "quantity"])
    other = pairs[pairs["relation"] == tables.OTHER]
    assert len(other) == 2
    assert relations.loc[(tables.OTHER, "matched"), "mean"] == pytest.approx(other["matched"].mean())
    closer = (other["chance"] - other["distance"]).mean()
    assert relations.loc[(tables.OTHER, "closer"), "mean"] == pytest.approx(closer)
    curves = tables.curves_table(pairs, together, walks)
    seeds = curves[curves["relation"] == tables.SEED]
    np.testing.assert_allclose(seeds["mean"], 2 / N)
    assert seeds["depth"].between(0, 1.001).all() and (seeds["pairs"] == 1).all()


def test_intervals_of_matched_depths_hold_their_estimates():
    recordings = {name: made(drifting(4, seed)) for name, seed in (("A (0)", 0), ("B (0)", 1))}
    samples, taken = resampled_together(recordings, resamples=6)
    near, most = tables.intervals_tables(planes_together(recordings), samples, taken, list(recordings), "encoder")
    matched = near[near["quantity"] == "matched"]
    assert (matched["low"] < matched["estimate"]).all() and (matched["estimate"] < matched["high"]).all()
    assert set(most["value"]) == {"a_to_b", "b_to_a", "both"} and (most["network_b"] == "B (0)").all()


# ----------------------------------------------------------------------------------------------------------- smoothness


def test_steps_follow_the_rule_of_sites_and_spend_their_shares():
    path = drifting(6)
    one = walk("A")
    sites = {one.name: sites_of(path, [0, 0, 1, 1, 2, 2])}
    steps = tables.steps_table([one], together_of({one.name: path, "B (0)": path}), sites, "encoder")
    by_rule = {rule: group for rule, group in steps.groupby("rule", sort=False)}
    assert by_rule["every block"]["site_to"].tolist() == ["e1", "e2", "e3", "e4", "e5"]
    assert by_rule["every second"]["site_to"].tolist() == ["e3", "e5"]
    assert by_rule["stage ends"]["site_from"].tolist() == ["e1", "e3"]
    np.testing.assert_allclose(by_rule["stage ends"]["parameters_share"], [4 / 6, 1])
    smooth = tables.smoothness_table(steps, [one])
    both = smooth[(smooth["rule"] == "every block") & (smooth["change"] == "both")].iloc[0]
    assert both["mean"] == pytest.approx(by_rule["every block"]["both"].mean())


def test_a_bottleneck_is_the_largest_jump_under_every_rule():
    base = np.random.default_rng(2).normal(size=(N, 6))
    path = {f"e{i}": base + 0.01 * i for i in range(6)} | {"e3": base[:, :1], "e4": base[:, :1], "e5": base[:, :1]}
    one = walk("A")
    sites = {one.name: sites_of(path, [0, 0, 0, 1, 1, 1])}
    steps = tables.steps_table([one], together_of({one.name: path, "B (0)": path}), sites, "encoder")
    for _, row in tables.smoothness_table(steps, [one]).iterrows():
        assert row["largest_from"] in ("e1", "e2") and row["largest_to"] in ("e3", "e5")


def smoothness_of(families, values):
    rows = []
    for (label, family), value in zip(families.items(), values):
        rows.append({"part": "encoder", "network": label, "label": label, "family": family, "training": "classifier"})
        rows[-1] |= {
            "body": label,
            "rule": "every block",
            "change": "both",
            "mean": value,
            "cv": value,
            "largest": value,
        }
    return pd.DataFrame(rows)


def test_families_apart_reach_the_smallest_p_over_bodies():
    families = dict(zip("ABCDEFGH", ["CNN"] * 4 + ["transformer"] * 4))
    found = tables.families_table(smoothness_of(families, [1, 2, 3, 4, 5, 6, 7, 8]), 999, 0)
    assert found["p"].tolist() == pytest.approx([2 / 70] * 3)
    assert (found["mean_a"] == 2.5).all() and (found["mean_b"] == 6.5).all()


def test_one_family_leaves_a_reason():
    found = tables.families_table(smoothness_of({"A": "CNN", "B": "CNN"}, [1, 2]), 99, 0)
    assert "a comparison is of two" in found["reason"].iloc[0]


# ----------------------------------------------------------------------------------------------------- what is lost


def kept_of(curves):
    """network -> {statistic: R² at eight sites}."""
    rows = [
        {"network": network, "site": f"e{place}", "depth": (place + 1) / 8, "statistic": statistic, "r2": value}
        for network, own in curves.items()
        for statistic, values in own.items()
        for place, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_late_last_lost_and_learnt_are_what_they_say():
    walks, curves = [], {}
    for place, body in enumerate("ABC"):
        trained, twin = walk(body), walk(body, twin=True)
        walks += [trained, twin]
        curves[trained.name] = {"luminance": [1, 1, 1, 1, 0.8, 0.6, 0.5, 0.3 - 0.1 * place]}
        curves[twin.name] = {"luminance": [0.1] * 8}
    found = tables.losses_table(kept_of(curves), {"low-level": ["luminance"]}, walks)
    own = found[(found["training"] == "classifier") & (found["statistic"] == "luminance")].set_index("quantity")
    assert own.loc["late", "median"] == pytest.approx(0.7)  # depths 5/8 and 6/8
    assert own.loc["last", "median"] == pytest.approx(0.2)
    assert own.loc["lost", "median"] == pytest.approx(0.5) and own.loc["lost", "p"] == pytest.approx(2 / 8)
    assert own.loc["learnt", "median"] == pytest.approx(0.1)
    whole = found[(found["training"] == "classifier") & (found["statistic"] == "low-level")].set_index("quantity")
    pd.testing.assert_series_equal(whole["median"], own["median"])
    untrained = found[(found["training"] == "untrained") & (found["quantity"] == "learnt")]
    assert untrained["median"].isna().all()


def test_one_body_far_down_moves_neither_median_nor_ranks():
    values = np.array([0.5, 0.4, 0.3, 0.2, -40.0])
    row = tables.over_median(values, tested=True)
    assert row["median"] == 0.3 and row["low"] == -40 and row["bodies"] == 5
    ranks = np.array([4, 3, 2, 1, -5])  # of the sizes, with the sign
    sums = [abs(sum(s * abs(r) for s, r in zip(signs, ranks))) for signs in itertools.product([1, -1], repeat=5)]
    assert row["p"] == pytest.approx(np.mean([each >= abs(ranks.sum()) for each in sums]))
