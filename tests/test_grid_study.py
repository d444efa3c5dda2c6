"""Grids of trainings, end to end: what each cell does, what is reported of all, what happens after a kill."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from scipy.stats import t, wilcoxon

from experiments import load_config, spelt_out
from model_spec import ModelSpec
from sources import open_datasets
from studies import architectures, encoders, grid_study
from studies.cells import cells_of
from studies.encoders import EncodersConfig
from studies.families import family_of
from studies.grid_report import FinishedGrid
from studies.grid_tables import mean_with_interval
from studies.grid_work import job_of
from utils import HOME, InputError

IMAGES = {"synthetic_images": {"Training": 16, "Validation": 4, "Test": 20}, "synthetic_size": 64, "image_size": 64}
SMALL = {"preset": "smoke", "epochs": 1, "batch_size": 8, "learning_rate": 2e-3, "device": "cpu", "scored_train": 6}
FEW = {"Training": 8, "Validation": 4, "Test": 4}
AXES = {
    "encoder": {"ViT": {"options": {"encoder": {"vit": "mae_tiny"}}}, "Swin": {}},
    "fraction": [0.5, 1.0],
    "seed": [0, 1],
}


def config_of(out, **settings) -> EncodersConfig:
    return EncodersConfig(**({"out": str(out), "axes": AXES} | IMAGES | SMALL | settings))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    transfer = {"elsewhere": {"synthetic_seed": 7}}
    return encoders.run(config_of(tmp_path_factory.mktemp("grid") / "run", transfer=transfer))


def test_every_cell_is_trained_scored_and_reported(results):
    runs = pd.read_csv(results / "runs.csv")
    assert len(runs) == 8 and set(runs["label"]) == {"ViT", "Swin"}
    assert {
        "test_iou",
        "train_miou",
        "validation_miou",
        "elsewhere_iou",
        "best_validation_iou",
        "epochs_to_target",
        "seconds",
    } <= set(runs)
    page = (results / "summary.md").read_text()
    assert "**Synthetic images**" in page and "random weights" in page and "elsewhere" in page
    for name in ("data_curve", "costs", "loss_curves", "confusion", "predictions"):
        assert (results / f"{name}.png").stat().st_size > 5000 and f"({name}.png)" in page


def test_scores_are_the_means_of_each_images_own(results):
    scores = pd.read_csv(results / "scores.csv").set_index(["label", "fraction", "images"])
    tables = [
        pd.read_csv(results / "cells" / f"encoder-ViT--fraction-0.5--seed-{seed}" / "test.csv") for seed in (0, 1)
    ]
    row = scores.loc[("ViT", 0.5, "test")]
    assert row["iou"] == pytest.approx(np.mean([table["iou"].mean() for table in tables]), abs=1e-5)
    pooled = [from_confusion_file(results, seed) for seed in (0, 1)]
    assert row["miou"] == pytest.approx(np.mean(pooled), abs=1e-4)
    assert row["seed_sd"] == pytest.approx(np.std([table["iou"].mean() for table in tables], ddof=1), abs=1e-5)
    assert (row["seeds"], row["n"]) == (2, 20) and row["low"] <= row["iou"] <= row["high"]


def from_confusion_file(results, seed) -> float:
    """Mean IoU over both classes of all pixels of one network, by hand."""
    table = pd.read_csv(results / "cells" / f"encoder-ViT--fraction-0.5--seed-{seed}" / "test-confusion.csv")
    count = table.groupby(["true", "predicted"])["pixels"].sum()
    return np.mean([count[k, k] / (count[k].sum() + count[1 - k, k]) for k in (0, 1)])


def test_intervals_over_images_alone_are_the_means_own(results):
    scores = pd.read_csv(results / "scores.csv").set_index(["label", "fraction", "images"])
    folder = results / "cells"
    tables = [pd.read_csv(folder / f"encoder-Swin--fraction-1.0--seed-{s}" / "test.csv") for s in (0, 1)]
    values = np.mean([table.sort_values("id")["iou"] for table in tables], axis=0)
    row = scores.loc[("Swin", 1.0, "test")]
    assert row["high"] - row["iou"] == pytest.approx(1.959964 * values.std(ddof=1) / np.sqrt(20), rel=1e-3)


def test_three_seeds_widen_an_interval_by_students_t():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 200)) * 0.01 + np.array([[0.5], [0.6], [0.7]])  # seeds differ, images do not
    mean, low, high = mean_with_interval(values)
    reach = t.ppf(0.975, 2) * values.mean(1).std(ddof=1) / np.sqrt(3)
    assert (mean - low, high - mean) == pytest.approx((reach, reach), rel=2e-3)


def test_what_a_cell_does_not_change_is_the_studys_own_setting(tmp_path):
    axes = {"encoder": {"Swin": {}}}
    folder = encoders.run(config_of(tmp_path / "out", axes=axes, fraction=0.5, seed=5, model="mask2former"))
    assert pd.read_csv(folder / "runs.csv")[["fraction", "seed"]].to_numpy().tolist() == [[0.5, 5]]
    assert "| 50 % |" in (folder / "summary.md").read_text()


def test_a_finished_grid_is_scored_on_other_images_later(tmp_path):
    config = config_of(tmp_path / "out", axes={"seed": [0]}, model="segformer")
    folder = encoders.run(config)
    history = (folder / "cells" / "seed-0" / "run" / "history.csv").stat().st_mtime_ns
    encoders.run(dataclasses.replace(config, transfer={"elsewhere": {"synthetic_seed": 3}}, target=0.5))
    assert "elsewhere_iou" in pd.read_csv(folder / "runs.csv")
    assert (folder / "cells" / "seed-0" / "run" / "history.csv").stat().st_mtime_ns == history


def test_differences_are_of_the_same_images_and_seeds(results):
    paired = pd.read_csv(results / "paired.csv").set_index(["label_a", "label_b", "fraction"])
    values = {
        label: [
            pd.read_csv(results / "cells" / f"encoder-{label}--fraction-1.0--seed-{seed}" / "test.csv").set_index("id")
            for seed in (0, 1)
        ]
        for label in ("ViT", "Swin")
    }
    difference = np.mean([a["iou"] - b["iou"][a.index] for a, b in zip(values["ViT"], values["Swin"])], axis=0)
    row = paired.loc[("ViT", "Swin", 1.0)]
    assert row["difference"] == pytest.approx(difference.mean(), abs=1e-5)
    assert row["p_value"] == pytest.approx(wilcoxon(difference).pvalue, rel=1e-3)


def test_confusions_count_every_pixel_of_all_seeds_once(results):
    confusion = pd.read_csv(results / "confusion.csv")
    assert (confusion.groupby("label")["pixels"].sum() == 2 * 20 * 64 * 64).all()
    classes = pd.read_csv(results / "classes.csv").set_index(["label", "class"])
    table = confusion.set_index(["label", "true", "predicted"])["pixels"]
    hit, miss, alarm = table["ViT", 1, 1], table["ViT", 1, 0], table["ViT", 0, 1]
    assert classes.loc[("ViT", "lesion"), "iou"] == pytest.approx(hit / (hit + miss + alarm), rel=1e-4)


def test_cells_on_a_part_of_the_images_make_as_many_steps_on_nested_subsets(tmp_path):
    config = config_of(tmp_path)
    jobs = [job_of(config, cell, tmp_path) for cell in cells_of({"fraction": [0.25, 0.5, 1.0], "seed": [3]})]
    assert [job.repeats for job in jobs] == [4, 2, 1] and [job.fraction_seed for job in jobs[:2]] == [3, 3]
    chosen = [set(open_datasets(job, needed=("train",))["train"].ids) for job in jobs]
    assert chosen[0] < chosen[1] < chosen[2]
    assert [len(open_datasets(job, needed=("train",))["train"]) for job in jobs] == [16, 16, 16]


def test_weights_from_a_file_take_the_place_of_imagenets_for_their_encoder(tmp_path):
    known = {"mobilenet_v2": {"weights": "some.safetensors", "normalization": "half"}}
    config = config_of(tmp_path, pretrained=known)
    axes = {
        "encoder": {
            name: {"weights": "imagenet", "options": {"encoder": {"cnn": name}}}
            for name in ("mobilenet_v2", "resnet18")
        }
    }
    jobs = {cell.labels["encoder"]: job_of(config, cell, tmp_path) for cell in cells_of(axes)}
    assert (jobs["mobilenet_v2"].weights, jobs["mobilenet_v2"].normalization) == ("some.safetensors", "half")
    assert (jobs["resnet18"].weights, jobs["resnet18"].normalization) == ("imagenet", "imagenet")


def test_a_dry_run_says_what_is_left_and_writes_nothing(tmp_path, capsys):
    encoders.run(config_of(tmp_path / "out", dry_run=True))
    said = capsys.readouterr().out
    assert "8 of 8 cells are left" in said and "estimated" in said and not (tmp_path / "out").exists()


def test_a_network_that_takes_no_other_size_is_shown_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr("costs.peak_memory", lambda *_: 1.0)  # it starts a process, which takes its time
    patches = {"options": {"encoder": {"vit": "dinov2_tiny14"}}, "image_size": 70}
    config = config_of(tmp_path / "out", axes={"encoder": {"ViT 14": patches}}, synthetic_images=FEW)
    folder = encoders.run(config)  # the study's own 64 px are no whole number of patches
    assert (folder / "summary.md").exists() and not (folder / "predictions.png").exists()


def test_networks_of_one_size_see_the_test_images_that_are_open(tmp_path):
    config = config_of(tmp_path / "out")
    cells = cells_of({"image_size": [64, 48], "seed": [0]})
    jobs = {cell.name: job_of(config, cell, tmp_path / cell.name) for cell in cells}
    grid = FinishedGrid(config, cells, jobs, open_datasets(config, needed=("test",))["test"], {}, {})
    own, other = map(grid.seen_by, cells)
    assert own is grid.test and grid.run(cells[1]) == tmp_path / cells[1].name / "run"
    assert other.ids == own.ids and other[0].image.shape == (3, 48, 48)


def test_a_finished_grid_is_timed_no_more(results, monkeypatch, capsys):
    monkeypatch.setattr(grid_study, "time_a_step", lambda *_: pytest.fail("a step was timed"))
    encoders.run(config_of(results, transfer={"elsewhere": {"synthetic_seed": 7}}, dry_run=True))
    said = capsys.readouterr().out
    assert "Nothing is left to run" in said and said.count("took") == 8


def test_every_image_set_is_opened_once_before_anything_runs(tmp_path, monkeypatch):
    opened = []

    def noted(source, *, seed=0, needed=("train", "validation", "test")):
        opened.append((source.fraction, source.fraction_seed, source.synthetic_seed, needed))
        return open_datasets(source, seed=seed, needed=needed)

    monkeypatch.setattr(grid_study, "open_datasets", noted)
    axes = {"learning_rate": [1e-3, 1e-2], **AXES}
    encoders.run(config_of(tmp_path / "out", axes=axes, transfer={"elsewhere": {"synthetic_seed": 7}}, dry_run=True))
    shares = [(0.5, seed, 0, ("train",)) for seed in (0, 1)]
    whole = (1.0, 0, 0, ("train", "validation", "test"))
    assert sorted(opened) == sorted([*shares, (1.0, 0, 7, ("test",)), whole])


def test_a_cell_that_fails_is_listed_with_its_error_and_the_others_go_on(tmp_path, capsys):
    axes = {"learning_rate": [1e-3, 1e30], "seed": [0]}
    config = config_of(tmp_path / "out", axes=axes, model="segformer", epochs=3)
    folder = encoders.run(config)
    said = capsys.readouterr().out
    assert "1 finished, 1 failed" in said and "the loss became" in said and "--retry true" in said
    assert "1 of 2 cells are not finished" in (folder / "summary.md").read_text()
    record = json.loads((folder / "cells" / "learning_rate-1e+30--seed-0" / "failed.json").read_text())
    encoders.run(config)
    assert record == json.loads((folder / "cells" / "learning_rate-1e+30--seed-0" / "failed.json").read_text())
    encoders.run(dataclasses.replace(config, retry=True))
    again = json.loads((folder / "cells" / "learning_rate-1e+30--seed-0" / "failed.json").read_text())
    assert (record["attempts"], again["attempts"]) == (1, 2)


def test_a_killed_grid_goes_on_where_it_was(tmp_path):
    out, axes = tmp_path / "out", {"seed": [0, 1]}
    few = {"synthetic_images": FEW, "batch_size": 2}
    settings = IMAGES | SMALL | few | {"axes": axes, "model": "segformer", "out": str(out), "epochs": 2}
    arguments = [part for key, value in settings.items() for part in (f"--{key}", _text(value))]
    command = [sys.executable, str(HOME / "experiments.py"), "encoders", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = out / "cells" / "seed-0"
    until = time.monotonic() + 240
    while not (out / "cells" / "seed-1").exists():
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert (first / "finished.json").exists() and not (out / "summary.md").exists()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())  # nothing of it was made anew
    assert len(pd.read_csv(out / "runs.csv")) == 2 and (out / "summary.md").exists()


def _text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """30 pictures in Oxford-IIIT Pet's layout: a disc (1) with a border (3) on background (2)."""
    root = tmp_path_factory.mktemp("pets")
    for part in ("images", "annotations/trimaps"):
        (root / part).mkdir(parents=True)
    rng, rows = np.random.default_rng(0), np.indices((48, 64))
    lists = {"trainval": [], "test": []}
    for k in range(30):
        centre, radius = rng.uniform(16, 32, 2), rng.uniform(8, 14)
        distance = np.hypot(rows[0] - centre[0], rows[1] - centre[1] - 8)
        trimap = np.where(distance < radius, 1, np.where(distance < radius + 3, 3, 2)).astype(np.uint8)
        picture = rng.integers(0, 60, (48, 64, 3)) + 150 * (trimap == 1)[..., None]
        name = f"Cat_{k}"
        Image.fromarray(picture.astype(np.uint8)).save(root / "images" / f"{name}.jpg")
        Image.fromarray(trimap).save(root / "annotations" / "trimaps" / f"{name}.png")
        lists["trainval" if k < 20 else "test"].append(f"{name} 1 1 1")
    for name, lines in lists.items():
        (root / "annotations" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_three_classes_run_through_the_same_grid(pets, tmp_path):
    axes = {"architecture": {"SegFormer": {"model": "segformer"}, "Mask2Former": {"model": "mask2former"}}}
    config = architectures.ArchitecturesConfig(
        **(SMALL | {"axes": axes, "data": str(pets), "image_size": 64, "out": str(tmp_path / "out")})
    )
    folder = architectures.run(config)
    classes = pd.read_csv(folder / "classes.csv")
    assert list(classes["class"].unique()) == ["pet", "background", "border"]
    assert "at least 20 are needed to compare" in (folder / "summary.md").read_text()
    confusion = pd.read_csv(folder / "confusion.csv")
    assert confusion.groupby("label").size().eq(9).all()


def test_a_transfer_to_other_classes_is_refused_before_anything_runs(pets, tmp_path):
    transfer = {"pets": {"data": str(pets), "layout": "pet"}}
    with pytest.raises(InputError, match="transfer 'pets' has 3 classes and the training 2"):
        encoders.run(config_of(tmp_path / "out", transfer=transfer))
    assert not (tmp_path / "out").exists()


def test_a_transfer_to_classes_of_other_meaning_is_refused(pets, tmp_path):
    known = {"data": str(pets), "layout": "pet", "classes": ["a", "b", "c"], "mask_values": [[1], [2], [3]]}
    config = config_of(
        tmp_path / "out", axes={"seed": [0]}, transfer={"pets": {"layout": "pet", "classes": []}}, **known
    )
    with pytest.raises(InputError, match="has the classes pet, background, border, the training a, b, c"):
        encoders.run(config)


def test_pets_against_background_are_a_transfer_of_lesions(pets, tmp_path):
    values = {"data": str(pets), "layout": "pet", "classes": ["background", "pet"], "mask_values": [[2], [1, 3]]}
    config = config_of(tmp_path / "out", transfer={"pets": values}, axes={"seed": [0]}, model="segformer")
    folder = encoders.run(config)
    table = pd.read_csv(folder / "cells" / "seed-0" / "pets.csv")
    assert len(table) == 10 and table["id"].str.startswith("Cat_").all()


def test_a_cell_may_be_trained_by_several_processes(tmp_path):
    few = {"batch_size": 2, "synthetic_images": FEW}
    config = config_of(tmp_path / "out", axes={"seed": [0]}, model="segformer", processes=2, **few)
    folder = encoders.run(config)
    stored = yaml.safe_load((folder / "cells" / "seed-0" / "run" / "config.yaml").read_text())
    assert stored["processes"] == 2 and len(pd.read_csv(folder / "runs.csv")) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"axes": {"learning_rat": [1.0]}}, "learning_rate"),
        ({"axes": {"fraction": [0.0], "seed": [0]}}, "fraction 0"),
        ({"axes": {"fraction": [0.75], "seed": [0]}}, "cannot make as many steps"),
        ({"axes": {"limits": {"few": {"limits": {"train": 4}}}}}, "axes may not change limits"),
        ({"target": 2.0}, "target must be an IoU"),
        ({"scored_train": 0}, "scored_train must be at least 1"),
        ({"axes": {"model": ["unett"]}}, "unknown model 'unett'"),
        ({"axes": {"e": {"v": {"options": {"encoder": {"vit": "dinov2_tiny14"}}}}}}, "56 or 70"),
        ({"launcher": "jobblib"}, "joblib"),
        ({"pretrained": {"resnet18": {"weigths": "x"}}}, "unknown setting 'weigths'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, settings, said):
    with pytest.raises(InputError, match=said):
        encoders.run(config_of(tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_switches_may_be_named_alone():
    assert spelt_out(["--dry-run"]) == ["--dry_run", "true"]
    assert spelt_out(["--retry", "false", "--jobs", "2"]) == ["--retry", "false", "--jobs", "2"]
    assert load_config("encoders", ["--dry-run", "--overfit", "20"]).overfit == 20


def test_families_are_of_encoder_and_decoder():
    def family(model, **options):
        return family_of(ModelSpec(model, "smoke", options=options))

    assert [family(name) for name in ("unet", "fcn", "deeplabv3plus", "segformer")] == ["CNN"] * 3 + ["transformer"]
    assert family("mask2former") == "transformer"
    assert family("mask2former", encoder={"cnn": "resnet18"}) == "hybrid"
    assert family("mask2former", encoder={"vit": "mae_tiny"}) == "transformer"
    assert family("upernet", encoder_name="mit_b0") == "hybrid"
    assert family("segformer_smp", encoder_name="resnet18") == "CNN"


def test_an_overfit_check_says_which_networks_do_not_learn(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.OVERFIT_EPOCHS", 1)
    config = config_of(tmp_path / "out", axes={"seed": [0, 1]}, model="segformer", overfit=4, epochs=1)
    with pytest.raises(InputError, match=r"stayed below IoU 0.95 on 4 images"):
        grid_study.run_grid(config, "encoders", "?", encoders.answer)
    table = pd.read_csv(tmp_path / "out" / "overfit.csv")
    assert len(table) == 1 and table["images"].tolist() == [4]  # one seed on all images
