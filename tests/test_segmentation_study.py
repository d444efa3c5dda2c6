"""The segmentation study: what it refuses, its intervals on known numbers, and a whole small run."""

import json

import numpy as np
import pandas as pd
import pytest

import experiments
from dataset import make_loader
from inference import load_ensemble, score_split
from loss_metrics import METRICS
from sources import open_datasets
from studies import segmentation
from studies.segmentation import RECIPE, SegmentationConfig, mean_with_bootstrap, summarize_variants, trainings
from utils import InputError

TINY = [
    "--preset",
    "smoke",
    "--synthetic_images",
    '{"Training": 12, "Validation": 6, "Test": 8}',
    "--synthetic_size",
    "64",
    "--epochs",
    "1",
]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"variants": {"a": {"epoch": 3}}}, "variant 'a': unknown setting 'epoch'; closest: 'epochs'"),
        ({"variants": {"a": {"schedule": "linear"}}}, "unknown schedule 'linear'"),
        ({"variants": {"a": {"data": "elsewhere"}}}, "variant 'a' may not change data: .* on the same images"),
        ({"variants": {"a": {"limits": {"train": 9}}}}, "variant 'a' may not change limits"),
        ({"variants": {"a": {"cache_features": True}}}, "cache_features needs a frozen encoder"),
        ({"variants": {RECIPE: {}}}, "that is the recipe without changes"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"seeds": []}, "seeds must be different"),
    ],
)
def test_settings_that_cannot_run_are_refused_before_anything_starts(changes, complaint, tmp_path):
    with pytest.raises(InputError, match=complaint):
        trainings(SegmentationConfig(out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_every_variant_of_every_seed_is_the_recipe_but_for_its_changes(tmp_path):
    config = SegmentationConfig(out=str(tmp_path), seeds=[3, 5], epochs=7, variants={"no flips": {"flips": False}})
    jobs = trainings(config)
    assert list(jobs) == [(RECIPE, 3), (RECIPE, 5), ("no flips", 3), ("no flips", 5)]
    assert [job.seed for job in jobs.values()] == [3, 5, 3, 5] and all(job.epochs == 7 for job in jobs.values())
    assert [job.flips for job in jobs.values()] == [True, True, False, False]
    assert len({job.out for job in jobs.values()}) == 4


def test_intervals_hold_the_spread_of_seeds_and_of_images():
    rng = np.random.default_rng(0)
    images, seeds = rng.normal(0, 1, 400), rng.normal(0, 1, 30)[:, None]
    mean, low, high = mean_with_bootstrap(np.zeros((3, 5)) + 0.25)
    assert (mean, low, high) == (0.25, 0.25, 0.25)
    mean, low, high = mean_with_bootstrap(images[None])  # one seed: the images' standard error, 1.96 / √400 either way
    assert high - low == pytest.approx(2 * 1.96 * images.std() / 20, rel=0.1) and low < mean < high
    mean, low, high = mean_with_bootstrap(images + seeds)
    expected = 2 * 1.96 * np.sqrt(images.var() / 400 + seeds.var() / 30)
    assert high - low == pytest.approx(expected, rel=0.15)


def test_differences_are_taken_on_the_same_images_and_seeds():
    rows = []
    for seed, images in ((0, [0.5, 0.9]), (1, [0.6, 0.8]), ("all", [0.7, 0.9])):
        for variant, gain in ((RECIPE, 0.0), ("better", 0.05)):
            for flips in (False, True):
                for place, value in enumerate(images):
                    shift = gain + 0.01 * flips
                    rows.append((variant, str(seed), flips, f"image{place}", value + shift))
    table = pd.DataFrame(rows, columns=["variant", "seed", "flips", "id", "iou"]).sample(frac=1, random_state=0)
    summary = summarize_variants(table).set_index(["variant", "flips", "networks"])
    assert summary.loc[(RECIPE, False, "one"), "mean"] == pytest.approx(0.7)
    assert np.isnan(summary.loc[(RECIPE, False, "one"), "difference"])
    row = summary.loc[("better", True, "one")]  # every image of every seed gains the same: no spread at all
    assert [row.difference, row.difference_low, row.difference_high] == pytest.approx([0.06] * 3)
    assert summary.loc[(RECIPE, False, "all"), "difference"] == pytest.approx(0.1)  # [0.7, 0.9] less [0.55, 0.85]


def test_a_small_run_writes_what_its_networks_score_and_is_not_computed_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["segmentation", *TINY, "--out", str(out), "--full_resolution", "true"]
    experiments.main(arguments)
    table = pd.read_csv(out / "per_image.csv")
    assert len(table) == 2 * 3 * 2 * 8  # variants, seeds and all of them, flips, images
    config = experiments.load_config("segmentation", arguments[1:])
    job = next(iter(trainings(config).values()))
    loader = make_loader(open_datasets(job)["test"], 16)
    models, _, synthetic = load_ensemble([out / "models" / "recipe-seed0" / "best"])
    expected = score_split(models, loader, full_resolution=True)
    mine = table[(table.variant == RECIPE) & (table.seed == "0") & ~table.flips]
    assert mine["id"].tolist() == expected["id"].tolist()
    np.testing.assert_allclose(mine[list(METRICS)], expected[list(METRICS)], rtol=1e-4)
    assert synthetic and "**synthetic**" in (out / "summary.md").read_text()
    summary = pd.read_csv(out / "summary.csv")
    shown = summary[
        (summary.metric == "iou") & (summary.variant == RECIPE) & ~summary.flips & (summary.networks == "one")
    ]
    singles = table[(table.variant == RECIPE) & table.seed.isin(["0", "1"]) & ~table.flips]
    assert shown["mean"].item() == pytest.approx(singles["iou"].mean(), abs=1e-5)
    assert set(json.loads((out / "data.json").read_text())) == {"64 px, train", "64 px, validation", "64 px, test"}
    assert (out / "learning_curves.png").exists() and (out / "environment.json").exists()
    monkeypatch.setattr(segmentation, "score_split", None)  # the second time nothing is trained or scored
    before = (out / "models" / "recipe-seed0" / "resume.pt").stat().st_mtime_ns
    experiments.main(arguments)
    assert (out / "models" / "recipe-seed0" / "resume.pt").stat().st_mtime_ns == before
