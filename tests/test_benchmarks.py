"""The timings of planes: every implementation of ours runs, agrees with the plain one, and gets its row."""

import json
import math
import sys

import numpy as np
import pandas as pd
import pytest

from benchmarks import peer_environment, planes, training
from benchmarks.workloads import QUICK_SIZES, WORKLOADS, Sides, make_sides

RUN = ("linear_cka_debiased", "rbf_cka_median")
OWN = [(each, one) for each in WORKLOADS for one in each.implementations if not one.package]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planes")
    planes.main(["--quick", "--no-peers", "--rounds", "2", "--threads", "1", "--out", str(folder), "--only", *RUN])
    return folder


def test_every_implementation_of_a_workload_has_a_row_and_only_peers_lack_a_time(quick):
    table = pd.read_csv(quick / "planes.csv").set_index(["workload", "implementation"])
    expected = {
        (each.name, one.name): one.package for each in WORKLOADS if each.name in RUN for one in each.implementations
    }
    assert list(table.index) == list(expected)
    for place, package in expected.items():
        row = table.loc[place]
        if package:
            assert math.isnan(row["seconds"]) and "left out by --no-peers" in row["note"]
        else:
            assert row["seconds"] > 0 and row["rss_mb"] >= 0 and row["rounds"] == 2, row["note"]


def test_ratios_are_to_ours(quick):
    table = pd.read_csv(quick / "planes.csv")
    for _, rows in table.groupby("workload"):
        ours = rows.set_index("implementation").loc["ours"]
        assert ours["ratio"] == 1
        np.testing.assert_allclose(rows["ratio"], rows["seconds"] / ours["seconds"], rtol=1e-4)


def test_errors_refer_to_the_plain_formula_and_bars_say_whether_they_are_met(quick):
    table = pd.read_csv(quick / "planes.csv").set_index(["workload", "implementation"])
    row = table.loc["linear_cka_debiased", "ours"]
    assert row["max_error"] < 1e-5 and row["against"] == "plain_float64"
    assert table.loc[("rbf_cka_median", "ours"), "bar"].endswith(("met", "missed"))
    assert math.isnan(table.loc[("linear_cka_debiased", "gemm_floor"), "max_error"])


@pytest.mark.parametrize("workload, which", OWN, ids=[f"{each.name}-{one.name}" for each, one in OWN])
def test_every_implementation_of_ours_gives_numbers_and_agrees_with_its_reference(workload, which):
    sides = make_sides(QUICK_SIZES[workload.size])
    values = which.build(sides)()
    reference = workload.implementation(workload.reference).build(sides)()
    if which.yardstick:
        return
    assert np.isfinite(values).all()
    if values.shape == reference.shape:
        np.testing.assert_allclose(values, reference, atol=1e-5)
    else:  # the whole plane: its diagonal is the single pairs
        np.testing.assert_allclose(values[range(sides.pairs), range(sides.pairs)], reference, atol=1e-5)


def test_the_record_says_with_what_it_was_timed(quick):
    stored = json.loads((quick / "planes.json").read_text())
    assert list(stored) == list(RUN)
    for made in stored.values():
        assert made["config"]["rounds"] == 2 and made["config"]["threads"] == 1 and made["config"]["quick"]
        assert {"commit", "packages", "processor"} <= set(made["environment"])
    assert str(quick) not in (quick / "planes.json").read_text()


def test_workloads_that_are_not_run_keep_their_rows(tmp_path):
    row = dict.fromkeys(planes.COLUMNS, "")
    first, second = WORKLOADS[0].name, WORKLOADS[1].name
    planes.write(tmp_path, {second: {"rows": [row | {"workload": second}]}})
    table = planes.write(tmp_path, {first: {"rows": [row | {"workload": first}]}})
    assert list(table["workload"]) == [first, second]


def test_a_peer_that_is_not_installed_is_named_with_its_reason():
    given = peer_environment.existing(sys.executable)
    assert "not installed" in given.why_missing("torch_cka")
    assert given.why_missing("torch") == ""


def test_reasons_do_not_tell_where_this_machine_keeps_its_files():
    told = peer_environment.without_paths("cannot import x (/home/someone/site/x.py) from https://host/a/b")
    assert told == "cannot import x (…/x.py) from https://host/a/b"


def test_the_data_are_the_same_every_time_and_after_saving(tmp_path):
    made, again = (make_sides(QUICK_SIZES["n1000"]) for _ in range(2))
    made.save(tmp_path / "sides.npz")
    stored = Sides.load(tmp_path / "sides.npz")
    for side in ("A", "B"):
        for X, Y, Z in zip(getattr(made, side), getattr(again, side), getattr(stored, side)):
            assert X.dtype == np.float32 and (X == Y).all() and (X == Z).all()
            assert X.mean() > 0.1


def test_every_package_that_a_workload_needs_is_in_the_requirements():
    needed = {peer_environment.normal(one.package) for each in WORKLOADS for one in each.implementations if one.package}
    assert needed <= set(peer_environment.requirements())


def test_both_training_loops_learn_the_same_and_get_their_row(tmp_path):
    training.main(["--quick", "--threads", "1", "--only", "unetpp_frozen", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "training.csv").set_index("implementation")
    assert list(table.index) == ["plain", "ours"] and table.loc["plain", "ratio"] == 1
    speeds = table["images_per_second"]
    assert table.loc["ours", "ratio"] == pytest.approx(speeds["ours"] / speeds["plain"], rel=1e-4)
    assert table.loc["ours", "train_loss"] == pytest.approx(table.loc["plain", "train_loss"], rel=1e-3)
    stamp = json.loads((tmp_path / "training.json").read_text())["unetpp_frozen"]
    assert stamp["config"]["data"] == "synthetic" and stamp["environment"]["commit"]
