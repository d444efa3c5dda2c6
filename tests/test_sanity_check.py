"""Kornblith's sanity check: what counts as finding a layer, and the whole benchmark on a tiny folder of noise."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks import sanity_check, sanity_networks
from benchmarks.sanity_check import Comparison, SanityConfig, identified, tied, wilson
from benchmarks.sanity_networks import LAYERS, Network, Tiny10, as_input, find_photographs, record_all, train_network
from benchmarks.sanity_report import COLUMNS
from similarity.recording import hash_model
from utils import InputError

DIAGONAL = np.array([[0.9, 0.5, 0.1], [0.4, 0.8, 0.2], [0.1, 0.6, 0.7]])


def test_a_plane_whose_diagonal_is_best_identifies_every_layer():
    assert identified(DIAGONAL).tolist() == [True, True, True]


def test_a_row_whose_best_is_elsewhere_is_a_miss_whatever_its_column_says():
    values = DIAGONAL.copy()
    values[2, 0] = 0.75
    assert identified(values).tolist() == [True, True, False]
    assert identified(values.T).tolist() == [True, True, True]


def test_the_smallest_distance_is_the_best():
    assert identified(1 - DIAGONAL, distance=True).tolist() == [True, True, True]
    assert identified(1 - DIAGONAL).tolist() == [False, False, False]


@pytest.mark.parametrize("rounding", [0.0, 1e-13, -1e-13])
def test_a_tie_for_the_best_is_a_miss_also_when_rounding_breaks_it(rounding):
    values = np.ones((3, 3)) + rounding * np.eye(3)  # as CCA of too few images is
    assert not identified(values).any()
    assert tied(values).all()


def test_a_tie_below_the_best_does_not_matter():
    values = np.array([[0.9, 0.5, 0.5], [0.5, 0.9, 0.5], [0.5, 0.5, 0.9]])
    assert identified(values).all()
    assert not tied(values).any()


def test_what_is_not_computable_is_a_miss_and_no_rival():
    values = DIAGONAL.copy()
    values[0, 0] = values[1, 2] = np.nan
    values[2, :2] = np.nan
    assert identified(values).tolist() == [False, True, False]
    assert identified(1 - values, distance=True).tolist() == [False, True, False]


def test_wilson_interval_has_its_published_values():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)  # z²/(n + z²)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_symmetrizing_adds_the_plane_of_the_other_direction():
    """Row 0 of 0→1 names layer 1; what 1→0 says of the pair (0, 0) turns it."""
    there = np.array([[0.5, 0.6], [0.1, 0.9]])
    back = np.array([[0.9, 0.2], [0.1, 0.9]])
    pairs = sanity_check.Pairs(["a", "b"], {(0, 1): there, (1, 0): back}, [])
    plain = sanity_check.row_of(Comparison("linear_cka"), "gap", pairs)
    both = sanity_check.row_of(Comparison("linear_cka", symmetrized=True), "gap", pairs)
    assert plain["identified_percent"] == 75
    assert both["identified_percent"] == 100
    assert both["per_pair"] == {"0→1": 100, "1→0": 100}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of noise in the layout of Imagenette: 12 training and 10 validation images each."""
    root = tmp_path_factory.mktemp("photographs")
    noise = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 10)):
        for name, brightness in (("dark", 60), ("light", 190)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(brightness - 60, brightness + 60, (48, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def few_measures(monkeypatch):
    rows = (
        Comparison("linear_cka", {"debiased": False}, 99.3, whole=True),
        Comparison("svcca", {"variance": 0.99}, 9.9),
        Comparison("rsa"),
    )
    monkeypatch.setattr(sanity_check, "COMPARISONS", rows)
    return rows


def small(photographs, out, **changes) -> SanityConfig:
    settings = {"seeds": [0, 1], "epochs": 1, "n": 12, "policy": "flat:2", "out": str(out), "device": "cpu"} | changes
    return SanityConfig(data=str(photographs), **settings)


def test_the_benchmark_writes_its_table_and_trains_nothing_the_second_time(
    photographs, few_measures, tmp_path, monkeypatch, capsys
):
    page = sanity_check.run(small(photographs, tmp_path))
    table = pd.read_csv(tmp_path / "sanity_check.csv")
    assert tuple(table.columns) == COLUMNS
    assert table[["measure", "policy"]].values.tolist() == [
        *([row.measure, policy] for policy in ("flat:2", "gap") for row in few_measures),
        ["linear_cka", "full"],
    ]
    assert table.cells.tolist() == [2 * 9] * 3 + [2 * 8] * 3 + [2 * 9]  # two directions; under gap one layer less
    assert ((table.low <= table.identified_percent) & (table.identified_percent <= table.high)).all()
    assert table.published_percent.dropna().tolist() == [99.3, 9.9, 99.3, 9.9, 99.3]
    stamp = json.loads((tmp_path / "sanity_check.json").read_text(encoding="utf-8"))
    assert {"commit", "packages"} <= set(stamp["environment"])
    assert stamp["data"]["train"]["images"] == 24
    for written in (page.read_text(encoding="utf-8"), json.dumps(stamp)):
        assert str(tmp_path) not in written and str(photographs.parent) not in written
    assert (tmp_path / "sanity_check.png").stat().st_size > 10_000

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(sanity_networks, "train_network", refuse)
    sanity_check.run(small(photographs, tmp_path))
    assert capsys.readouterr().out.count("already trained") == 2
    again = pd.read_csv(tmp_path / "sanity_check.csv")
    pd.testing.assert_frame_equal(again, table)
    with pytest.raises(AssertionError, match="trained again"):
        sanity_check.run(small(photographs, tmp_path, epochs=2))


def test_networks_of_two_seeds_differ_and_of_one_seed_do_not(photographs):
    found = {split: find_photographs(photographs / split) for split in ("train", "val")}
    images = {split: part.load(split) for split, part in found.items()}
    networks = [train_network(seed, 1, found, images, torch.device("cpu")) for seed in (0, 0, 1)]
    first, same, other = (hash_model(network.model) for network in networks)
    assert first == same != other


def test_the_mean_over_space_is_the_ninth_layer_where_it_is_not_the_eighth(photographs):
    networks = [Network(seed, Tiny10(2).eval(), 0.5, 0.0, "") for seed in (0, 1)]
    made = record_all(networks, find_photographs(photographs / "val"), 12, ("flat:2", "gap"))
    flat, gap = made["flat:2"][0], made["gap"][0]
    assert flat.names == [*LAYERS, "mean"]
    assert gap.names == list(LAYERS)
    assert flat["layer8"].shape == (12, 2 * 2 * 64)
    torch.testing.assert_close(flat["mean"], flat["layer8"].view(12, 2 * 2, 64).mean(1))


def test_whole_maps_are_compared_as_their_rotation_into_n_dimensions(photographs):
    network, found = Network(0, Tiny10(2).eval(), 0.5, 0.0, ""), find_photographs(photographs / "val")
    rotated = record_all([network], found, 20, ("full",))["full"][0]["layer1"]
    assert rotated.shape == (20, 20)
    with torch.no_grad():
        maps = network.model.layer1((as_input(found.load("val")) - 0.45) / 0.27).flatten(1).double()
    centred = maps - maps.mean(0)
    torch.testing.assert_close(rotated @ rotated.T, centred @ centred.T, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": "nowhere"}, "no folder nowhere/train"),
        ({"n": 21}, "has 20 validation images"),
        ({"seeds": [3]}, "at least two different"),
        ({"policy": "grid:4"}, "must be flat:g or gap"),
        ({"policy": "flat"}, "unknown policy"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(photographs, tmp_path, changes, sentence):
    config = small(photographs, tmp_path / "out", **{key: value for key, value in changes.items() if key != "data"})
    config.data = changes.get("data", config.data)
    with pytest.raises(InputError, match=sentence):
        sanity_check.run(config)
    assert not (tmp_path / "out").exists()
