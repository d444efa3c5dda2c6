"""Many networks at once give what two at a time give."""

import numpy as np
import pandas as pd
import pytest
from made import made

from processing import matched_depth, planes
from processing.together import named_pairs, planes_together, resampled_together

N = 40


def networks():
    """Three of different depths and widths, one with a constant site, its name holding what a site's must not."""
    generator = np.random.default_rng(0)
    base = generator.normal(size=(N, 4))
    first = {f"a{i}": base @ generator.normal(size=(4, 3)) for i in range(3)}
    second = {f"b{i}": base @ generator.normal(size=(4, 5)) + generator.normal(size=(N, 5)) for i in range(2)}
    third = {"c0": base, "c1": np.ones((N, 2)), "c2": base[:, :1]}
    return {"first": made(first), "second: B@2": made(second), "third (0)": made(third)}


@pytest.mark.parametrize("k", [1, 3])
def test_the_table_of_two_is_cut_out_of_all(k):
    found = networks()
    together = planes_together(found, k, neighbours=5)
    for a, b in named_pairs(list(found)):
        alone = planes.similarity_planes(found[a], found[b], k, neighbours=5)
        table = together.table(a, b)
        assert list(table[["site_a", "site_b"]].itertuples(index=False)) == list(
            alone[["site_a", "site_b"]].itertuples(index=False)
        )
        for name in ("depth_a", "depth_b", "a_to_b", "b_to_a", "linear_cka", "mutual_knn"):
            np.testing.assert_allclose(table[name], alone[name], atol=1e-12, err_msg=name)
        pd.testing.assert_series_equal(table["note"] != "", alone["note"] != "")


def test_the_other_way_round_changes_the_sides():
    found = networks()
    together = planes_together(found)
    there, back = together.table("first", "second: B@2"), together.table("second: B@2", "first")
    turned = back.set_index(["site_b", "site_a"]).loc[list(zip(there["site_a"], there["site_b"]))]
    np.testing.assert_array_equal(there["a_to_b"], turned["b_to_a"])


def test_intervals_of_two_are_cut_out_of_all():
    found = {name: recording for name, recording in networks().items() if name != "third (0)"}
    a, b = found
    samples, taken = resampled_together(found, resamples=6, seed=3)
    together = planes_together(found).resampled(samples, taken, a, b)
    alone = matched_depth.resample(found[a], found[b], resamples=6, seed=3)
    pd.testing.assert_frame_equal(matched_depth.matched_depth(together), matched_depth.matched_depth(alone))


def test_given_depths_are_used():
    found = networks()
    depths = {"first": {"a0": 0.1, "a1": 0.2, "a2": 0.9}}
    table = planes_together(found, depths=depths).table("first", "second: B@2")
    assert table["depth_a"].unique().tolist() == [0.1, 0.2, 0.9]
