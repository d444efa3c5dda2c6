"""The README says only what is true of the committed state."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import experiments
from studies import universality
from utils import refuse_other_run

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
RESULTS = PROJECT / "results" / "universality"


def test_every_linked_file_exists():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets and not [target for target in targets if not (PROJECT / target).exists()]


def test_every_named_file_exists():
    named = re.findall(r"`([\w./]+\.(?:py|yaml|ipynb|txt))`", README)
    assert len(named) > 10 and not [name for name in named if not list(PROJECT.rglob(Path(name).name))]


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
    specification = importlib.util.spec_from_file_location("docs_build", PROJECT / "docs" / "build.py")
    build = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(build)
    assert build.with_answer(README) == README, "run python docs/build.py"
    assert "debiased linear CKA" in build.answer() and README.count(build.MARKS[0]) == 1
    assert "KernelSHAP" in build.explanation_answer() and README.count(build.EXPLANATION_MARKS[0]) == 1
    stored = yaml.safe_load((PROJECT / build.REFERENCE / "config.yaml").read_text(encoding="utf-8"))
    asked = yaml.safe_load((PROJECT / "configs" / "reference.yaml").read_text(encoding="utf-8"))
    assert all(stored[key] == asked[key] for key in ("seeds", "image_size", "policies", "permutations", "resamples"))
    assert [row["epochs"] for row in stored["models"]] == [row["epochs"] for row in asked["models"]]


def test_the_segmentation_scores_are_those_of_the_committed_tables():
    words = " ".join(README.partition("### How well do they segment?")[2].split())
    for model, networks in (("unetpp", "one"), ("mask2former", "all")):
        table = pd.read_csv(PROJECT / "results" / f"segmentation-isic2018_256-{model}" / "summary.csv")
        table = table[table.flips & (table.networks == networks)].set_index("metric")
        iou, jaccard = table.loc["iou"], table.loc["thresholded_jaccard"]
        assert f"{iou['mean']:.3f} ({iou['low']:.3f} … {iou['high']:.3f}) and" in words
        assert f"{jaccard['mean']:.3f} after" in words


def test_the_scores_of_encoders_and_architectures_are_those_of_the_committed_tables():
    words = " ".join(README.partition("### Encoders and architectures")[2].split())

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


@pytest.mark.parametrize(
    "arguments",
    [["experiments.py", "--help"], ["train.py", "--help"], ["inference.py", "--help"], ["dataset.py", "--help"]],
)
def test_doors_explain_themselves(arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--" in done.stdout
