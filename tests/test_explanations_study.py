"""The explanation study end to end on tiny networks: what it leaves, a second time, after a kill, two at a time."""

import dataclasses
import json
import pickle
import shutil

import joblib
import pandas as pd
import pytest
import torch
import yaml
from made_networks import RESNET, VIT, classifiers_of, grid_of
from safetensors.torch import load_file

from classification.classifiers import load_classifier, save_classifier
from experiments import main
from models import load_model, save_model
from studies import classifiers, explanation_report, explanation_work, explanations
from studies.classifiers import ClassifiersConfig, photo_folder
from studies.explanations import ExplanationsConfig, run
from studies.subjects import Subject
from utils import InputError

IMAGES = {"synthetic_images": {"Training": 16, "Validation": 4, "Test": 20}, "synthetic_size": 64, "image_size": 32}
METHODS = {
    "kernel_shap": {"features": 2},
    "integrated_gradients": {"steps": 2, "images": 6},
    "grad_cam": {"depths": [1.0], "images": 5},
}
SMALL = {"images": 8, "methods": METHODS, "compared_at": 4, "similarities": ["cosine"], "permutations": 19}
SMALL |= {"resamples": 20, "check_images": 5, "check_cells": 4, "few_images": 2, "levels": 2, "device": "cpu"}
EXPLAINED = 8 + 6 + 5  # of one network
TINY = {"Conv": ("resnet18", RESNET, "CNN"), "Attention": ("vit_tiny_patch16_224", VIT, "transformer")}
COLUMNS = {
    "networks": "network label family seed image_size score n",
    "explanations": "network label family variant method explanations reason settings milliseconds failed",
    "faithfulness": "network variant n deletion insertion p q randomized gap sampling_error failed",
    "curves": "kind label fraction score low high",
    "randomization": "network variant level randomized n rank_correlation rank_correlation_absolute",
    "cover": "network label variant which n fall answer answer_covered rank_correlation covered",
    "similarity": "similarity model_a model_b n mean dissimilarity null_mean p ceiling u method kind q failed",
    "pairs": "method model_a model_b kind n mean dissimilarity null_mean q ceiling u",
    "kinds": "method similarity kind pairs mean null_mean u above_null failed",
    "clusters": "method similarity clustering parameter ari p p_adjusted reason among left_out",
    "in_mask": "model quantity n mean null_mean p area other_seeds method failed",
    "joined": "method other n spearman low high p partial reason",
    "joined_points": "method other id x y pairs",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of one architecture, one of another, at their random weights: training would be most of the time."""
    axes = {"architecture": {"FCN": {"model": "fcn"}, "SegFormer": {"model": "segformer"}}, "seed": [0, 1]}
    out, unfinished = tmp_path_factory.mktemp("trained") / "grid", ["architecture-SegFormer--seed-1"]
    folder = grid_of(out, axes, unfinished, weights=True, synthetic_images=IMAGES["synthetic_images"])
    (folder / "data.json").write_text(json.dumps({"test": {"hash": "of others"}}))
    return folder


@pytest.fixture(scope="module")
def study(trained, tmp_path_factory):
    """Through the command line, with all figures."""
    out = tmp_path_factory.mktemp("study")
    settings = SMALL | IMAGES | {"networks": {str(trained): []}, "out": str(out / "run")}
    (out / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    main(["explanations", "--config", str(out / "study.yaml")])
    return out / "run"


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take longest, and are drawn once."""
    monkeypatch.setattr(explanation_report, "draw", lambda *_: [])


@pytest.fixture
def loaded(monkeypatch):
    """Names of the networks that are loaded."""
    names, real = [], Subject.load

    def load(self, device="cpu"):
        names.append(self.name)
        return real(self, device)

    monkeypatch.setattr(Subject, "load", load)
    return names


def config_of(trained_in, out, **changes):
    return ExplanationsConfig(**{"networks": {str(trained_in): []}, "out": str(out)} | SMALL | IMAGES | changes)


def tables(folder):
    """Every CSV; how long something took is nobody's finding."""
    found = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    return {name: table.drop(columns="milliseconds", errors="ignore") for name, table in found.items()}


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name in ours:
        pd.testing.assert_frame_equal(ours[name], theirs[name], obj=name)


# -------------------------------------------------------------------------------------------------------------- one run


def test_all_tables_are_there_with_their_columns(study):
    found = tables(study)
    assert set(found) == set(COLUMNS)
    for name, columns in COLUMNS.items():
        assert set(columns.split()) - {"milliseconds"} <= set(found[name].columns), name
    assert len(found["networks"]) == 3 and set(found["networks"]["family"]) == {"CNN", "transformer"}
    assert found["similarity"]["n"].tolist() == [8] * 3 + [6] * 3 + [5] * 3  # pairs of each method
    assert (found["similarity"]["kind"] == "same network, other seed").sum() == 3  # of the two seeds


def test_the_explanations_are_counted_in_table_and_summary(study):
    table = pd.read_csv(study / "explanations.csv")
    assert table["explanations"].sum() == 3 * EXPLAINED and (table["reason"].isna()).all()
    text = (study / "summary.md").read_text()
    assert f"**{3 * EXPLAINED} explanations**" in text and "Synthetic images" in text
    assert "Every method worked on every network" in text and "inside the true mask" in text


def test_figures_of_synthetic_images_are_beside_the_page_and_shown_by_it(study):
    text = (study / "summary.md").read_text()
    shown = {line.partition("(")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert {"grid_1.png", "depth_strips.png", "faithfulness.png", "joined.png", "ari.png"} <= shown
    assert all((study / name).stat().st_size > 1000 for name in shown) and not (study / "pictures").exists()


def test_a_second_run_loads_no_network_and_finds_the_same(study, trained, loaded, undrawn, capsys):
    before = tables(study)
    run(config_of(trained, study))
    assert loaded == [] and "All explanations of 3 networks are there" in capsys.readouterr().out
    assert_same(tables(study), before)


def test_a_report_of_other_similarities_needs_no_network_either(study, trained, loaded, undrawn, tmp_path):
    shutil.copytree(study, tmp_path / "run")
    run(config_of(trained, tmp_path / "run", similarities=["spearman"], compared_at=8, permutations=9))
    assert loaded == []
    assert set(pd.read_csv(tmp_path / "run" / "similarity.csv")["similarity"]) == {"spearman"}


def test_a_killed_run_goes_on_and_finds_the_same(study, trained, loaded, undrawn, tmp_path, monkeypatch):
    real, done = explanation_work.explained, []

    def until_the_fifth(subject, *rest):
        done.append(subject.name)
        if len(done) == 5:  # the second method of the second network
            raise KeyboardInterrupt
        return real(subject, *rest)

    monkeypatch.setattr(explanation_work, "explained", until_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        run(config_of(trained, tmp_path / "run"))
    assert done == ["FCN (0)"] * 3 + ["FCN (1)"] * 2
    monkeypatch.setattr(explanation_work, "explained", real)
    monkeypatch.setattr(explanation_work, "estimate", lambda *_: "")
    loaded.clear()
    run(config_of(trained, tmp_path / "run"))
    assert loaded == ["FCN (1)", "SegFormer (0)"]
    assert_same(tables(tmp_path / "run"), tables(study))


def test_two_networks_at_a_time_find_the_same(study, trained, undrawn, tmp_path, monkeypatch):
    """By threads: what goes to a process of its own is only seen to fit through."""
    real, tasks = joblib.delayed(explanation_work.work), []
    config = joblib.parallel_config

    def delayed(function):
        assert function is explanation_work.work
        return lambda *given: tasks.append(given) or real(*given)

    monkeypatch.setattr(explanations.joblib, "delayed", delayed)
    monkeypatch.setattr(explanations.joblib, "parallel_config", lambda *_, **__: config("threading"))
    monkeypatch.setattr(explanation_report, "write", lambda *_: None)
    run(config_of(trained, tmp_path / "run", networks={str(trained): ["FCN"]}, jobs=2))
    assert [again for *_, again in tasks] == [True, False]
    ours = sorted((tmp_path / "run" / "explanations").rglob("*.*"))
    assert len(ours) > 20
    for path in ours:
        other = study / path.relative_to(tmp_path / "run")
        if path.suffix == ".safetensors":
            both = [load_file(each) for each in (path, other)]
            assert both[0].keys() == both[1].keys()
            assert all(torch.equal(each, both[1][name]) for name, each in both[0].items()), path
        else:
            assert path.read_bytes() == other.read_bytes(), path
    assert [pickle.loads(pickle.dumps(task))[0] for task in tasks] == [task[0] for task in tasks]


# ---------------------------------------------------------------------------------------------------------- photographs


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """(results folder of classifiers, the drawn photographs) with nothing drawn into the project's own folder."""
    root = tmp_path_factory.mktemp("photos")
    before, classifiers.SYNTHETIC = classifiers.SYNTHETIC, root / "data"
    settings = ClassifiersConfig(image_size=32, synthetic_photos={"train": 1, "val": 3}, device="cpu")
    folder = classifiers_of(root / "networks", TINY, seeds=(0, 1), settings=dataclasses.asdict(settings))
    yield folder, photo_folder(settings)
    classifiers.SYNTHETIC = before


def test_classifiers_are_explained_on_what_they_were_drawn_for(photos, undrawn, tmp_path):
    folder = run(config_of(photos[0], tmp_path / "run"))
    found, text = tables(folder), (folder / "summary.md").read_text()
    assert found["explanations"]["explanations"].sum() == 4 * EXPLAINED - 2 * 5
    assert "Grad-CAM (100 %) of Attention (0), Attention (1): at site" in text  # all of it is in the class token
    assert set(found) == set(COLUMNS) and "the logit of the photograph's class" in text and "Synthetic" in text
    assert set(found["joined"]["other"]) >= {"1 − difference in the class's probability"}
    model, _ = load_classifier(photos[0] / "networks" / "Conv--seed-0")
    score = found["networks"].set_index("network").loc["Conv (0)", "score"]
    assert score * 8 == pytest.approx(round(score * 8)) and model.spec.classes == 4


def test_photographs_are_shown_nowhere_but_in_the_folder_that_is_not_committed(photos, tmp_path, monkeypatch):
    own = tmp_path / "mine"
    for split in ("train", "val"):
        shutil.copytree(photos[1] / split, own / split)  # without the masks
    shutil.rmtree(own / "train")
    written = []
    monkeypatch.setattr(explanation_report.visualization, "save", lambda _figure, path: written.append(path))
    methods = {"occlusion": {"features": 2}, "grad_cam": {"depths": [1.0]}}
    settings = {"data": str(own), "cover": "centre", "methods": methods, "similarities": ["cosine"]}
    folder = run(config_of(photos[0], tmp_path / "run", **settings))
    pictures = {path.relative_to(folder).as_posix() for path in written if "grid" in path.name or "strips" in path.name}
    assert pictures == {"pictures/grid_1.png", "pictures/grid_2.png", "pictures/depth_strips.png"}
    text = (folder / "summary.md").read_text()
    assert "ynthetic" not in text and "pictures/" not in text and "grid_1" not in text and "`mine`" in text
    assert "in_mask" not in tables(folder)
    assert "pictures/" in (explanations.HOME / ".gitignore").read_text()


def test_a_network_that_ignores_its_input_ends_nothing_and_is_flagged(photos, undrawn, tmp_path):
    folder = tmp_path / "networks"
    shutil.copytree(photos[0], folder)
    place = folder / "networks" / "Conv--seed-1"
    model, extra = load_classifier(place)
    with torch.no_grad():
        model.body.fc.weight.zero_()
    save_classifier(place, model, extra)
    methods = {"occlusion": {"features": 2}, "integrated_gradients": {"steps": 2}}
    found = tables(run(config_of(folder, tmp_path / "run", methods=methods)))
    rows = found["faithfulness"].set_index("network").loc["Conv (1)"]
    assert rows["failed"].str.contains("not shown to beat random maps").all() and rows["insertion"].isna().all()
    ones = found["similarity"]
    mine = ones[(ones["model_a"] == "Conv (1)") | (ones["model_b"] == "Conv (1)")]
    assert mine["failed"].str.contains(r"Conv \(1\)").all() and mine["mean"].isna().all()
    assert (found["clusters"]["left_out"] == "Conv (1)").any()


def test_two_seeds_of_one_network_are_a_study_without_the_questions_about_others(photos, undrawn, tmp_path):
    networks = {str(photos[0]): ["Conv"]}
    methods = {"occlusion": {"features": 2}}
    folder = run(config_of(photos[0], tmp_path / "run", networks=networks, methods=methods, similarities=["spearman"]))
    assert "joined" not in tables(folder) and tables(folder)["clusters"].empty
    assert set(tables(folder)["kinds"]["kind"]) == {"same network, other seed"}


def test_photographs_that_a_network_was_trained_on_are_refused(photos, tmp_path):
    own = tmp_path / "mine"
    shutil.copytree(photos[1] / "train", own / "val")
    shutil.copytree(photos[1] / "val", own / "val", dirs_exist_ok=True)
    with pytest.raises(InputError, match="of the photographs were trained on by the networks of"):
        run(config_of(photos[0], tmp_path / "run", data=str(own), cover="centre", images=16))


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def unloaded(monkeypatch):
    def load(self, device="cpu"):
        raise AssertionError(f"{self.name} was loaded before the settings were looked at")

    monkeypatch.setattr(Subject, "load", load)


BAD = [
    ({"images": 0}, "images must be at least 1, got 0"),
    ({"jobs": 0}, "jobs must be at least 1"),
    ({"levels": 0}, "levels must be at least 1"),
    ({"images": 21}, "images: 21 were asked for, and .* can be explained"),
    ({"images": 4, "check_images": 4, "few_images": 2, "methods": {"occlusion": {}}}, "give"),
    ({"similarities": ["cosin"]}, "unknown similarity of explanations 'cosin'; closest: 'cosine'"),
    ({"similarities": []}, "similarities: none is given"),
    ({"mask": "treu"}, "unknown mask 'treu'; closest: 'true'"),
    ({"cover": "circle"}, "unknown cover 'circle'"),
    ({"sigma": 0.0}, "sigma must be above 0"),
    ({"top": 1.0}, "top between 0 and 1"),
    ({"compared_at": 1, "similarities": ["kappa"]}, "top 0.2 of 1 × 1 cells marks 0"),
    ({"check_images": 9}, "check_images is 9, and 8 images are chosen; lower it"),
    ({"check_images": 4}, "check_images 4: no method can beat random maps"),
    ({"few_images": 9}, "few_images is 9, and 8 images"),
    ({"check_cells": 33}, "check_cells 33 a side do not fit images of 32 px"),
    ({"methods": {}}, "methods: none is given"),
    ({"methods": {"occlusion": {"images": 9}}}, "images must be 1 to 8"),
    ({"methods": {"occlusion": {"features": 0}}}, "features must be a number of cells"),
    ({"leave_out": ["FNC"]}, "leave_out: there is no network 'FNC'; closest: 'FCN'"),
    ({"networks": {"nowhere": []}}, "nowhere does not exist"),
    ({"fraction": 0.0}, "fraction 0.0 is not above 0"),
    ({"synthetic_seed": 3}, r"FCN \(0\) was trained with synthetic_seed 0, and the images .* of 3"),
    ({"label": 7}, "label 7 is none of the classes"),
    ({"device": "gpu"}, "unknown device 'gpu'"),
    ({"pretrained": {"R": {"name": "resnet18"}}}, "some networks segment and some classify"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_what_cannot_be_is_refused_before_a_network_is_loaded(trained, tmp_path, unloaded, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        run(config_of(trained, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "explanations").exists()


def test_without_networks_real_images_are_refused(synthetic_root, tmp_path, unloaded):
    with pytest.raises(InputError, match="networks: give the results folder of a study that trained on these images"):
        run(ExplanationsConfig(data=str(synthetic_root), out=str(tmp_path / "run"), **SMALL))


def test_without_networks_the_yaml_to_train_by_has_to_be_there(tmp_path, unloaded):
    with pytest.raises(InputError, match=r"nowhere.yaml does not exist; give a YAML of the architectures study"):
        run(ExplanationsConfig(train="nowhere.yaml", out=str(tmp_path / "run"), **SMALL))


def test_networks_that_saw_other_real_images_are_refused(trained, synthetic_root, tmp_path, unloaded):
    with pytest.raises(InputError, match=r"the test images of .* are not those of"):
        run(config_of(trained, tmp_path / "run", data=str(synthetic_root)))
    (tmp_path / "bare").mkdir()
    shutil.copy(trained / "config.yaml", tmp_path / "bare")
    shutil.copytree(trained / "cells", tmp_path / "bare" / "cells")
    with pytest.raises(InputError, match=r"data\.json"):
        run(config_of(tmp_path / "bare", tmp_path / "run", data=str(synthetic_root)))


def test_pretrained_ones_alone_have_no_synthetic_photographs(tmp_path, unloaded):
    two = {"A": {"name": "resnet18"}, "B": {"name": "resnet34"}}
    with pytest.raises(InputError, match="data synthetic: no network was trained on it"):
        run(ExplanationsConfig(pretrained=two, out=str(tmp_path / "run"), **SMALL))


def test_classifiers_trained_on_photographs_are_not_called_synthetic(photos, tmp_path, unloaded):
    settings = yaml.safe_load((photos[0] / "config.yaml").read_text()) | {"data": str(photos[1])}
    shutil.copytree(photos[0], tmp_path / "networks")
    (tmp_path / "networks" / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match=r"were trained on .*, not on synthetic images"):
        run(config_of(tmp_path / "networks", tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mask": "predicted"}, "mask and label are of segmentation"),
        ({"label": 1}, "mask and label are of segmentation"),
    ],
)
def test_settings_of_segmentation_are_refused_for_classifiers(photos, tmp_path, unloaded, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        run(config_of(photos[0], tmp_path / "run", **changes))


def test_a_folder_of_other_settings_or_images_is_refused_and_left_alone(study, trained, unloaded):
    before = {path: path.read_bytes() for path in study.glob("*.csv")}
    with pytest.raises(InputError, match="holds a run with other settings"):
        run(config_of(trained, study, seed=1))
    assert {path: path.read_bytes() for path in study.glob("*.csv")} == before
    known = json.loads((study / "data.json").read_text())
    (study / "data.json").write_text(json.dumps(known | {"hash": "another"}))
    try:
        with pytest.raises(InputError, match="holds results of other images"):
            run(config_of(trained, study))
    finally:
        (study / "data.json").write_text(json.dumps(known, indent=1) + "\n")


def test_a_network_that_outlines_nothing_is_named_when_predicted_masks_are_asked(tmp_path):
    axes = {"architecture": {"FCN": {"model": "fcn"}, "SegFormer": {"model": "segformer"}}, "seed": [0]}
    folder = grid_of(tmp_path / "grid", axes, weights=True, synthetic_images=IMAGES["synthetic_images"])
    for cell, bias in (("FCN", -1e3), ("SegFormer", 1e3)):
        place = folder / "cells" / f"architecture-{cell}--seed-0" / "run" / "best"
        model, extra = load_model(place)
        last = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)][-1]
        with torch.no_grad():
            last.bias.fill_(bias)
        save_model(model, place, extra)
    with pytest.raises(InputError, match=r"images: 8 were asked for, and 0 can be explained .*outlines nothing"):
        run(config_of(folder, tmp_path / "run", mask="predicted"))
