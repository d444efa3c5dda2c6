"""The README and the pages of the studies say only what is true of the committed state."""

import dataclasses
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

import experiments
from studies import universality
from utils import InputError, refuse_other_run

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
STUDIES = (PROJECT / "docs" / "studies.md").read_text(encoding="utf-8")
EXPLANATIONS = (PROJECT / "docs" / "explanations.md").read_text(encoding="utf-8")
RESULTS = PROJECT / "results" / "universality"
SPECIFICATION = importlib.util.spec_from_file_location("docs_build", PROJECT / "docs" / "build.py")
build = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(build)


def test_every_test_that_the_documentation_names_exists():
    pages = [README, *(page.read_text(encoding="utf-8") for page in (PROJECT / "docs").glob("*.md"))]
    named = {name for page in pages for name in re.findall(r"`(test_\w+)`", page)}
    code = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob("*.py"))
    assert len(named) > 10 and not [name for name in named if f"def {name}(" not in code]


def test_the_two_commands_use_the_files_that_are_there():
    assert "pip install -r requirements.txt && python experiments.py" in README
    assert "pip install -r requirements-dev.txt && python -m pytest" in README
    assert (PROJECT / "requirements-dev.txt").read_text().splitlines()[0] == "-r requirements.txt"


def test_the_answer_is_that_of_the_committed_reference_run():
    assert build.with_answers("README.md", README) == README, "run python docs/build.py"
    assert "debiased linear CKA" in build.answer()
    stored = yaml.safe_load((PROJECT / build.REFERENCE / "config.yaml").read_text(encoding="utf-8"))
    asked = yaml.safe_load((PROJECT / "configs" / "reference.yaml").read_text(encoding="utf-8"))
    assert all(stored[key] == asked[key] for key in ("seeds", "image_size", "policies", "permutations", "resamples"))
    assert [row["epochs"] for row in stored["models"]] == [row["epochs"] for row in asked["models"]]


def test_the_words_after_the_answer_are_those_of_its_table():
    """Far above chance, below another seed; decoders nearer than untrained ones, encoders not shown; RSA not."""
    table = pd.read_csv(PROJECT / build.REFERENCE / "summary.csv").query("policy == 'gap'").set_index("estimator")
    headline, rsa = table.loc[["linear_cka"]], table.loc[["rsa"]]
    assert (headline["similarity_low"] > headline["null_high"]).all()
    assert (headline["similarity_high"] < headline["ceiling"]).all()
    low = headline.set_index("part")["u_low"]
    assert low["decoder"] > 0 > low["encoder"]
    assert (table.loc[["linear_cka_deconfounded"], "u_low"] > 0).all()
    assert (rsa["floor"] > rsa["similarity"]).all()
    assert "RSA does not join in" in README


def test_the_explanations_found_are_those_of_the_committed_runs():
    assert build.with_answers("docs/explanations.md", EXPLANATIONS) == EXPLANATIONS, "run python docs/build.py"
    assert "KernelSHAP" in build.explanation_answer()


def test_what_the_processing_steps_found_is_left_open_until_they_have_run(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PROJECT", tmp_path)
    assert build.steps_answer() == ""
    (tmp_path / "processing_steps.ipynb").write_text("{}")
    assert build.steps_answer() == "[notebook](processing_steps.ipynb).\n"


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(InputError, match="once each"):
        build.with_answers("README.md", README.replace(build.STEPS_MARKS[0], ""))


def test_networks_trained_on_a_gpu_are_named_in_the_readme():
    limits = README.partition("## Limits")[2]
    for place in (PROJECT / "results").glob("*/environment.json"):
        device = json.loads(place.read_text(encoding="utf-8")).get("device", "cpu")
        config = f"configs/{place.parent.name.replace('-', '_')}.yaml"
        assert device == "cpu" or (device in limits and config in limits), place.parent.name


def test_the_segmentation_scores_are_those_of_the_committed_tables():
    words = " ".join(STUDIES.partition("## How well do they segment?")[2].split())
    for model, networks in (("unetpp", "one"), ("mask2former", "all")):
        table = pd.read_csv(PROJECT / "results" / f"segmentation-isic2018_256-{model}" / "summary.csv")
        table = table[table.flips & (table.networks == networks)].set_index("metric")
        iou, jaccard = table.loc["iou"], table.loc["thresholded_jaccard"]
        assert f"{iou['mean']:.3f} ({iou['low']:.3f} … {iou['high']:.3f}) and" in words
        assert f"{jaccard['mean']:.3f} after" in words


def test_the_scores_of_encoders_and_architectures_are_those_of_the_committed_tables():
    words = " ".join(STUDIES.partition("## Encoders and architectures")[2].split())

    def table(study, **chosen):
        rows = pd.read_csv(PROJECT / "results" / f"{study}-isic2018_256" / "scores.csv").query("images == 'test'")
        rows = rows[(rows[list(chosen)] == pd.Series(chosen)).all(axis=1)]
        return rows.set_index("label")

    full, few = (table("encoders", fraction=share) for share in (1.0, 0.05))
    for label, start in (("MobileNetV2, ImageNet", "IoU of"), ("MobileNetV2, random", "from scratch")):
        row = full.loc[label]
        assert f"{start} {row['iou']:.3f} ({row['low']:.3f} … {row['high']:.3f})" in words
    vits = [f"{kind} ViT, random" for kind in ("CLIP", "DINOv2", "MAE")]
    assert f"at random weights {full.loc[vits, 'iou'].min():.3f} to {full.loc[vits, 'iou'].max():.3f}" in words
    shown = [f"{few.loc[label, 'iou']:.3f}" for label in ("MobileNetV2, ImageNet", "MobileNetV2, random")]
    span = f"{few.loc[vits, 'iou'].min():.3f} to {few.loc[vits, 'iou'].max():.3f}"
    assert f"5 % of the images {', '.join(shown)} and {span}" in words
    best = table("architectures", fraction=1.0).sort_values("iou").iloc[-1]
    assert best.name == "UNet++, ImageNet"
    assert f"UNet++ first with {best['iou']:.3f} ({best['low']:.3f} … {best['high']:.3f})" in words
    matrix = pd.read_csv(PROJECT / "results" / "architectures-isic2018_256" / "matrix.csv")
    same = matrix["label_a"].str.endswith("ImageNet") & matrix["label_b"].str.endswith("ImageNet")
    u = matrix[same & (matrix["label_a"] != matrix["label_b"]) & (matrix["part"] == "encoder")]["u"]
    assert f"(u {u.min():.2f} to {u.max():.2f})" in words


def test_no_picture_of_a_photograph_is_committed():
    listed = subprocess.run(["git", "ls-files", "results"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert not [
        name
        for name in listed.stdout.split()
        if re.search(r"/(universality|encoders|architectures|explanations)-(?!synthetic)", name)
        and re.search(r"/(pca|predictions|depth_strips|grid_\d+)\.png$|/pictures/", name)
    ]


def test_the_committed_results_are_those_of_the_demo_settings():
    """So that the first command of a fresh clone goes on instead of being refused."""
    config = universality.settle(experiments.load_config("universality"))
    stored = yaml.safe_load((RESULTS / "config.yaml").read_text(encoding="utf-8"))
    assert config.out == stored["out"] == "results/universality"
    refuse_other_run(RESULTS, dataclasses.asdict(config))


def test_committed_results_are_stamped_and_called_synthetic():
    summary = (RESULTS / "summary.md").read_text(encoding="utf-8")
    assert "Synthetic images" in summary and re.search(r"Commit [0-9a-f]{12}", summary)
    assert all((RESULTS / name).exists() for name in ("config.yaml", "environment.json", "data.json"))


def test_nothing_committed_names_a_place_of_one_machine():
    suspicious = re.compile(r"(?<![\w.])/(?:work|home|root|Users|tmp)/")
    files = [
        path
        for pattern in ("*.md", "*.py", "*.ipynb", "*.yaml", "results/**/*.csv", "results/**/*.md", "results/**/*.json")
        for path in PROJECT.glob(pattern)
    ]
    found = [path.name for path in files if suspicious.search(path.read_text(encoding="utf-8"))]
    assert not found
