"""The experiments door: settings from YAML and command line, and one whole study in its smoke preset."""

import dataclasses
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import experiments
from classification.classifiers import FAMILIES, check_spec
from models import load_model
from recipes import check_recipe, objective
from sources import ImageSource
from studies import classifiers, explanations, grid_study, legacy, processing_steps, segmentation, universality
from studies.explanation_ways import ways_of
from studies.grid_work import job_of
from studies.subjects import named
from synthetic import make_dataset
from train import Recipe
from utils import HOME, InputError

CONFIGS = sorted((HOME / "configs").glob("*.yaml"))
SMOKE = HOME / "configs" / "smoke.yaml"
TABLES = ("summary", "pairs", "depth", "controls", "regions", "card", "disagreement", "alignment", "stitching")
TABLES += ("agreement", "agreement_summary")
COUNTS = {"Training": 12, "Validation": 4, "Test": 20}
POLICIES = '{"gap": ["linear_cka", "rsa"], "grid:4": ["linear_cka"]}'


def tiny(root, out, *more: str) -> list[str]:
    """The smoke preset on a few images: two models × two seeds, one epoch each."""
    return [
        *("--config", str(SMOKE), "--data", str(root), "--out", str(out), "--device", "cpu"),
        *("--policies", POLICIES, "--permutations", "5", "--resamples", "4", *more),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """As few test images as the study takes; a set of its own, because one test changes it for a moment."""
    return make_dataset(tmp_path_factory.mktemp("images") / "set", counts=COUNTS, size=64, seed=0)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "results"
    experiments.main(tiny(root, out))
    return out


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take a third of the time, and `finished` has them."""
    for name in ("plane_figures", "verdict_figures_of", "picture_figures"):
        monkeypatch.setattr(universality.report, name, lambda *_: {})


def stamps(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------ the settings


def test_without_arguments_the_main_job_is_the_demo():
    config = experiments.load_config("universality")
    assert isinstance(config, universality.UniversalityConfig)
    assert config.is_synthetic and [recipe.model for recipe in config.models] == ["unetpp", "mask2former"]
    assert all(isinstance(recipe, Recipe) and recipe.preset == "demo" for recipe in config.models)
    stored = yaml.safe_load((HOME / "configs" / "demo.yaml").read_text())
    assert config.policies == stored["policies"] and config.synthetic_images == stored["synthetic_images"]


def test_the_command_line_overrides_the_yaml():
    config = experiments.load_config(
        "universality", ["--config", str(SMOKE), "--epochs", "3", "--seeds", "[4, 5]", "--weights=none"]
    )
    assert (config.epochs, config.seeds, config.weights) == (3, [4, 5], "none")
    assert config.permutations == yaml.safe_load(SMOKE.read_text())["permutations"]
    assert [recipe.epochs for recipe in config.models] == [1, 1]
    assert [recipe.epochs for recipe in universality.settle(config).models] == [3, 3]


def test_the_command_line_wins_wherever_the_yaml_is_named():
    config = experiments.load_config("universality", ["--data", "here", "--config", str(SMOKE)])
    assert config.data == "here" and config.permutations == 20


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_parses_and_settles(path):
    study = "segmentation" if path.stem == "ablation" else path.stem.partition("_")[0]
    study = "classifiers" if path.stem.startswith("processing_networks") else study
    study = "processing_steps" if path.stem.startswith("processing_steps") else study
    study = study if study in experiments.STUDIES else "universality"
    if path.stem.startswith(("processing_segmentation", "processing_universality")):
        study = "architectures"
    config = experiments.load_config(study, ["--config", str(path)])
    stored = yaml.safe_load(path.read_text())
    for key in set(stored) - {"models", "pairs"}:
        assert getattr(config, key) == stored[key], key
    if study == "universality":
        settled = universality.settle(config)
        for recipe, row in zip(settled.models, stored["models"]):
            assert {key: getattr(recipe, key) for key in row} == row
    elif study == "legacy":
        assert [pair.unetpp for pair in legacy.settle(config).pairs] == [pair["unetpp"] for pair in stored["pairs"]]
    elif study in ("encoders", "architectures"):
        grid = dataclasses.replace(config, layout="isic" if config.layout == "auto" else config.layout)
        _, cells = grid_study.settle(grid, study)
        assert len(cells) > 3
        for cell in cells:
            job = job_of(grid, cell, Path("somewhere"))
            check_recipe(job)
            objective(job)
    elif study == "classifiers":
        members = classifiers.members_of(config, 10)
        assert len(members) == len(config.networks) * len(config.seeds) > 3
        for member in members:
            check_spec(member.spec)
    elif study == "explanations":
        explanations.check_settings(explanations.settle(config))
        assert [way.name for way in ways_of(config.methods, config.images)] == list(stored["methods"])
        for label, settings in config.pretrained.items():
            assert named(label, dict(settings)).family in FAMILIES
    elif study == "processing_steps":
        processing_steps.check_settings(processing_steps.settle(config))
        for trainer, files in config.train.items():
            assert files and all((HOME / file).is_file() for file in files), trainer
        for label, settings in config.pretrained.items():
            assert named(label, dict(settings)).family in FAMILIES
    elif study == "report":
        assert config.out.endswith(".html") and config.results == ["results"]
    else:
        jobs = segmentation.trainings(dataclasses.replace(config, out="somewhere"))
        assert len(jobs) == len(config.seeds) * (1 + len(config.variants))


def test_the_published_protocol_is_the_published_one():
    config = universality.settle(
        experiments.load_config("universality", ["--config", str(HOME / "configs" / "isic2018.yaml")])
    )
    assert config.image_size == 128 and not config.is_synthetic
    for recipe in config.models:
        assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (10, 16, 1e-4)
        assert (recipe.weights, recipe.freeze, recipe.preset) == ("imagenet", ["encoder"], "isic2018")


@pytest.mark.parametrize(
    ("data", "presets", "expected"),
    [
        ("synthetic", ("demo", "demo"), "results/universality"),
        ("synthetic", ("smoke", "smoke"), "results/universality-smoke"),
        ("/somewhere/isic/", ("demo", "demo"), "results/universality-isic"),
        ("data/isic2018", ("isic2018", "demo"), "results/universality-isic2018-isic2018"),
    ],
)
def test_other_images_and_presets_get_folders_of_their_own(data, presets, expected):
    config = dataclasses.replace(
        experiments.load_config("universality"),
        data=data,
        models=[Recipe(model=name, preset=preset) for name, preset in zip(("unetpp", "mask2former"), presets)],
    )
    assert universality.default_folder(config) == expected
    assert universality.settle(config).out == expected


@pytest.mark.parametrize(
    "tag",
    [
        '!!python/object/apply:os.system ["touch {victim}"]',
        '!!python/object/apply:builtins.open ["{victim}", "w"]',
        "!!python/object/new:os.system ['touch {victim}']",
        "!!python/name:os.system",
    ],
)
def test_a_hostile_yaml_is_refused_and_not_executed(tmp_path, capsys, tag):
    victim = tmp_path / "executed"
    (tmp_path / "gift.yaml").write_text(f"data: {tag.format(victim=victim)}\n")
    with pytest.raises(InputError, match="could not determine a constructor"):
        experiments.main(["--config", str(tmp_path / "gift.yaml")])
    assert not victim.exists()


def test_a_hostile_stored_config_is_not_executed(tmp_path):
    victim = tmp_path / "executed"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f'a: !!python/object/apply:os.system ["touch {victim}"]\n')
    from utils import open_run

    with pytest.raises(InputError, match="no readable YAML"):
        open_run(tmp_path / "run", {"a": 1}, torch.device("cpu"))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["universalty"], "unknown study 'universalty'; closest: 'universality'"),
        (["--policies", '{"gap": ["linear_cka", "linear_ckaa"]}'], "unknown measure 'linear_ckaa' under gap"),
        (["--policies", '{"gap": ["rsa"]}'], "policies must hold linear_cka under gap"),
        (["--seeds", "[1, 1]"], "seeds must be different numbers"),
        (["--models", '[{"model": "unetpp"}, {"model": "unetpp"}]'], "compares two different models"),
        (["--stitch_stride", "0"], "stitch_stride must be at least 1"),
        (["--overrides", '{"unetpp": {"freeze": ["encoder"]}}'], "unetpp: a frozen encoder without weights"),
        (["--weights", "some.pth"], "a file belongs to one model"),
        (["--weights", "imagenet"], "has no pretrained weights"),
    ],
)
def test_settings_that_cannot_run_are_refused_before_any_image_is_read(arguments, words, monkeypatch, tmp_path):
    monkeypatch.setattr(universality, "open_datasets", lambda *_, **__: pytest.fail("images were read"))
    more = [] if arguments[0] == "universalty" else ["--out", str(tmp_path / "out")]
    # offline, the demo's ImageNet weights of UNet++ are said to be missing first
    words = rf"{words}|could not be fetched" if "imagenet" in arguments else words
    with pytest.raises(InputError, match=words):
        experiments.main([*arguments, *more])
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- the study


def test_the_study_writes_all_it_promises(finished):
    for name in ("config.yaml", "environment.json", "summary.md", "summary.csv", "pairs.csv", "depth.csv"):
        assert (finished / name).stat().st_size > 0, name
    for name in ("test_metrics.csv", "test_summary.csv", "planes/planes.csv"):
        assert (finished / name).stat().st_size > 0, name
    assert list(finished.glob("*.png"))
    for model in ("unetpp", "mask2former"):
        for seed in (0, 1):
            member = finished / "models" / f"{model}-seed{seed}"
            assert (member / "best" / "model.safetensors").is_file() and (member / "history.csv").is_file()
            for twin in ("", "-untrained"):
                for policy in ("gap", "grid4"):
                    assert (finished / "recordings" / f"{model}-seed{seed}{twin}-{policy}.safetensors").is_file()


def test_the_studys_tables_hold_every_part_and_stay_in_range(finished):
    summary, metrics = pd.read_csv(finished / "summary.csv"), pd.read_csv(finished / "test_metrics.csv")
    assert {"encoder", "decoder"} == set(summary["part"])
    assert {"linear_cka", "rsa", "linear_cka_deconfounded"} == set(summary["estimator"])
    assert {"similarity", "floor", "ceiling", "null_mean", "p_value"} <= set(summary)
    assert (summary["similarity"] <= 1).all() and (summary["n_images"] == 20).all()
    assert summary["p_value"].dropna().between(1 / 6, 1).all()  # five permutations can show no less
    assert (summary["p_value"].isna() == (summary["estimator"] == "linear_cka_deconfounded")).all()
    assert len(metrics) == 20 * 4 and metrics.groupby(["model", "seed"])["id"].nunique().eq(20).all()


def test_every_stage_of_the_analysis_has_its_table_and_figure(finished):
    """What each holds is tested where it is made; here, that none is left out."""
    rows = {name: len(pd.read_csv(finished / f"{name}.csv")) for name in TABLES}
    assert rows["summary"] == rows["card"] == 2 * 4 and rows["regions"] == 2 * 4  # parts × estimators, × regions
    assert rows["stitching"] == 2 * 3 and rows["alignment"] % 3 == 0 < rows["alignment"]
    assert rows["agreement"] == 20 * (4 + 1 + 1) and rows["disagreement"] == 2 * 3 and rows["controls"] > 0
    for name in ("ruler", "position", "regions", "stitching", "shared_space", "plane_encoder", "plane_decoder"):
        assert (finished / f"{name}.png").stat().st_size > 0
        assert f"({name}.png)" in (finished / "summary.md").read_text(encoding="utf-8")


def test_a_network_of_one_seed_only_has_no_ceiling_and_the_page_says_so(root, tmp_path):
    experiments.main(tiny(root, tmp_path / "one", "--seeds", "[3]", "--policies", '{"gap": ["linear_cka"]}'))
    summary, page = pd.read_csv(tmp_path / "one" / "summary.csv"), (tmp_path / "one" / "summary.md").read_text()
    assert summary[["ceiling", "u", "u_low"]].isna().all(axis=None) and summary["floor"].notna().all()
    assert (
        summary["verdict"].str.removesuffix(" (chance not tested)").isin(["no scale: no ceiling", "below chance"]).all()
    )
    assert "One seed only: there is no ceiling, and none was made up." in page
    assert not (tmp_path / "one" / "stitching.png").exists() and "stitching.png" not in page


def test_fewer_than_twenty_test_images_are_refused_before_anything_is_trained(synthetic_root, tmp_path):
    with pytest.raises(InputError, match="8 test images: at least 20 are needed"):
        experiments.main(tiny(synthetic_root, tmp_path / "few"))
    assert not (tmp_path / "few").exists()


def test_what_no_stage_could_use_is_refused_before_anything_is_trained(root, tmp_path):
    for more, words in (
        (("--stitch_stride", "3"), "no maps of 21 cells a side"),
        (("--policies", '{"gap": ["linear_cka", "mutual_knn"]}'), "mutual_knn looks at 10 neighbours .* at least 24"),
    ):
        with pytest.raises(InputError, match=words):
            experiments.main(tiny(root, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_controls_that_explain_everything_are_said_and_the_rest_of_the_study_stays(
    root, finished, undrawn, tmp_path, monkeypatch
):
    out = tmp_path / "results"
    shutil.copytree(finished, out)
    actual = universality.analysis.controls.control_recordings

    def twice(dataset):
        found = actual(dataset)
        site = dataclasses.replace(found.sites[0], name="again")
        features = found.features | {"again": 2 * found.features[found.sites[0].name]}
        return dataclasses.replace(found, features=features, sites=[*found.sites, site])

    monkeypatch.setattr(universality.analysis.controls, "control_recordings", twice)
    experiments.main(tiny(root, out))
    page = (out / "summary.md").read_text()
    assert "linear_cka_deconfounded" not in set(pd.read_csv(out / "summary.csv")["estimator"])
    assert "The deconfounded similarity is left out: the controls" in page and "linearly dependent" in page


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ('{"unet": {"epochs": 2}}', "overrides: no model 'unet' in this study; closest: 'unetpp'"),
        ('{"unetpp": {"epoch": 2}}', "overrides of unetpp: unknown setting 'epoch'; closest: 'epochs'"),
    ],
)
def test_overrides_of_one_model_are_checked_by_name(overrides, words, root, tmp_path):
    with pytest.raises(InputError, match=words):
        experiments.main(tiny(root, tmp_path / "out", "--overrides", overrides))


def test_an_override_changes_one_model_alone():
    config = experiments.load_config(
        "universality", ["--overrides", '{"unetpp": {"epochs": 7, "normalization": "half"}}']
    )
    unetpp, mask2former = universality.settle(config).models
    assert (unetpp.epochs, unetpp.normalization) == (7, "half")
    assert (mask2former.epochs, mask2former.normalization) == (12, "imagenet")


def test_the_study_measures_on_test_images_and_trains_without_them(finished, root):
    from dataset import find_splits

    test = {pair.id for pair in find_splits(root)["test"]}
    assert set(pd.read_csv(finished / "test_metrics.csv")["id"]) == test


def test_no_result_names_a_machine_or_a_home(finished):
    for path in finished.glob("*.md"):
        assert str(os.path.expanduser("~")) not in path.read_text() or os.path.expanduser("~") == "/"


def test_checkpoints_of_the_study_load_for_inference(finished):
    model, extra = load_model(finished / "models" / "unetpp-seed0" / "best")
    assert extra["transform"]["size"] == 64 and not model.training


def test_a_second_run_recomputes_nothing(finished, root, undrawn, capsys, monkeypatch):
    import train as door

    kept = [*(finished / "models").rglob("*.safetensors"), *(finished / "recordings").iterdir()]
    kept += list((finished / "models").rglob("history.csv"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    tables = {path.name: path.read_bytes() for path in finished.glob("*.csv")}
    assert len(before) >= 8 + 16
    monkeypatch.setattr(door._Run, "train_epoch", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(universality, "record_models", lambda *_, **__: pytest.fail("recorded again"))
    experiments.main(tiny(root, finished))
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert {path.name: path.read_bytes() for path in finished.glob("*.csv")} == tables  # the same numbers again
    assert "already trained" in capsys.readouterr().out


def test_other_settings_are_refused_with_nothing_changed(finished, root):
    before = stamps(finished)
    for more, word in ((("--epochs", "2"), "epochs"), (("--image_size", "96"), "image_size")):
        with pytest.raises(InputError, match=f"run with other settings .*{word}.*nothing was changed"):
            experiments.main(tiny(root, finished, *more))
    assert stamps(finished) == before


def test_an_image_set_that_has_changed_is_refused(finished, root, tmp_path):
    out = tmp_path / "results"
    shutil.copytree(finished, out)
    mask, other = sorted((root / "ISIC2018_Task1_Test_GroundTruth").glob("*.png"))[:2]
    original = mask.read_bytes()
    before = stamps(out)
    try:
        shutil.copy(other, mask)
        with pytest.raises(InputError, match=r"other images|data"):
            experiments.main(tiny(root, out))
    finally:
        mask.write_bytes(original)
    assert stamps(out) == before


def test_an_interrupted_study_continues_to_the_same_numbers(finished, root, undrawn, tmp_path, monkeypatch):
    out = tmp_path / "results"
    inside = universality.train

    def dies_in_the_third_training(job, datasets):
        if job.model == "mask2former":
            raise KeyboardInterrupt
        return inside(job, datasets)

    with monkeypatch.context() as patch:
        patch.setattr(universality, "train", dies_in_the_third_training)
        with pytest.raises(KeyboardInterrupt):
            experiments.main(tiny(root, out))
    trained = out / "models" / "unetpp-seed1" / "best" / "model.safetensors"
    stamp = trained.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(universality.analysis.ruler, "compare_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            experiments.main(tiny(root, out))
    recorded = stamps(out / "recordings")
    experiments.main(tiny(root, out))
    assert trained.stat().st_mtime_ns == stamp and stamps(out / "recordings") == recorded
    for name in ("summary.csv", "pairs.csv", "test_metrics.csv"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_a_recording_of_other_weights_is_made_again(finished, root, undrawn, tmp_path):
    """A stale file in the recordings folder is never taken for the model's own."""
    out = tmp_path / "results"
    shutil.copytree(finished, out)
    recordings = out / "recordings"
    right = (recordings / "unetpp-seed0-gap.safetensors").read_bytes()
    shutil.copy(recordings / "unetpp-seed1-gap.safetensors", recordings / "unetpp-seed0-gap.safetensors")
    experiments.main(tiny(root, out))
    from similarity import Recording

    again = Recording.load(recordings / "unetpp-seed0-gap.safetensors")
    assert again.model_hash == Recording.load(finished / "recordings" / "unetpp-seed0-gap.safetensors").model_hash
    assert len(right) == len((recordings / "unetpp-seed0-gap.safetensors").read_bytes())
    assert (out / "summary.csv").read_bytes() == (finished / "summary.csv").read_bytes()


def test_the_synthetic_set_is_named_after_what_it_holds(tmp_path, monkeypatch):
    import sources

    monkeypatch.setattr(sources, "HOME", tmp_path)
    counts = {"Training": 2, "Validation": 1, "Test": 1}
    folder = sources.locate(ImageSource(synthetic_images=counts, synthetic_size=32))
    assert folder == tmp_path / "data" / "synthetic-2-1-1-32px-seed0" and (folder / "SYNTHETIC.json").is_file()
    with pytest.raises(InputError, match="unknown split 'tset'"):
        sources.open_datasets(ImageSource(synthetic_images=counts, synthetic_size=32, limits={"tset": 1}))
