"""The study that trains classifiers: no network twice, other settings are refused, the tables say what is so."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from classification.classifiers import load_classifier, sites
from classification.photos import load_photos, photo_set, synthetic_photos
from classification.probe import linear_probe
from classification.training import predict
from studies import classifiers
from studies.classifiers import ClassifiersConfig, networks, prepare, run
from studies.subjects import networks_in
from utils import HOME, InputError, git_commit, read_settings

RESNET = {
    "name": "resnet18",
    "options": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 8},
}
VIT = {
    "name": "vit_tiny_patch16_224",
    "options": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "epochs": 1,
}


@pytest.fixture
def config(tmp_path, monkeypatch) -> ClassifiersConfig:
    monkeypatch.setattr(classifiers, "SYNTHETIC", tmp_path / "data")
    return ClassifiersConfig(
        image_size=32,
        networks={"ResNet": dict(RESNET), "ViT": dict(VIT)},
        epochs=2,
        batch_size=8,
        synthetic_photos={"train": 6, "val": 3},
        out=str(tmp_path / "out"),
        device="cpu",
    )


def test_a_run_trains_every_network_once_and_says_what_it_found(config, monkeypatch):
    folder = run(config)
    table = pd.read_csv(folder / "accuracy.csv")
    assert list(table["label"]) == ["ResNet", "ResNet", "ViT", "ViT"] and list(table["seed"]) == [0, 1, 0, 1]
    assert set(zip(table["label"], table["family"])) == {("ResNet", "CNN"), ("ViT", "transformer")}
    photos = photo_set(next((folder.parent / "data").iterdir()), "val")
    images, labels = load_photos(photos, 32)
    for row, path in zip(table.itertuples(), networks(folder)["path"]):
        model, extra = load_classifier(path)
        assert extra == {"label": row.label, "family": row.family, "seed": row.seed, "objective": "supervised"}
        right = int((predict(model, images).argmax(1) == labels).sum())
        assert row.n == 12 and row.top1 == pytest.approx(right / 12, abs=1e-5) and row.low <= row.top1 <= row.high
        assert row.parameters == sum(parameter.numel() for parameter in model.parameters())
    page = (folder / "summary.md").read_text()
    assert "**synthetic** photo set" in page and photos.fingerprint in page and git_commit() in page
    assert (folder / "learning_curves.png").stat().st_size > 1000

    def refuse(*_args, **_options):
        raise AssertionError("a finished network was trained again")

    monkeypatch.setattr(classifiers, "train_classifier", refuse)
    run(config)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "accuracy.csv"), table)


def test_a_killed_run_goes_on_with_the_network_in_work(config, monkeypatch):
    whole = run(dataclasses.replace(config, out=config.out + "-whole"))
    real, done = classifiers.train_classifier, []

    def until_the_third(spec, train, *rest, **options):
        if len(train[0]) == 24:  # not the timing of a step
            done.append(spec.name)
            if len(done) == 3:
                raise KeyboardInterrupt
        return real(spec, train, *rest, **options)

    monkeypatch.setattr(classifiers, "train_classifier", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert len(networks(config.out)) == 2
    run(config)
    assert len(done) == 5  # the third one again, and the fourth
    compared = ["label", "seed", "top1", "low", "high", "n", "parameters"]
    ours, theirs = (pd.read_csv(f"{folder}/accuracy.csv")[compared] for folder in (config.out, whole))
    pd.testing.assert_frame_equal(ours, theirs)


def test_networks_and_seeds_may_be_added_but_not_changed(config):
    config = dataclasses.replace(config, networks={"ResNet": dict(RESNET)}, seeds=[0])
    folder = run(config)
    before = (folder / "networks" / "ResNet--seed-0" / "classifier.safetensors").stat().st_mtime_ns
    run(dataclasses.replace(config, networks={"ResNet": dict(RESNET), "ViT": dict(VIT)}, seeds=[0, 1]))
    assert len(networks(folder)) == 4
    assert (folder / "networks" / "ResNet--seed-0" / "classifier.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="finished with other settings"):
        run(dataclasses.replace(config, networks={"ResNet": {**RESNET, "epochs": 3}}))
    with pytest.raises(InputError, match="epochs: 2 there, 5 now"):
        run(dataclasses.replace(config, epochs=5))


def test_several_jobs_train_the_same_networks(config):
    config = dataclasses.replace(config, networks={"ResNet": dict(RESNET)})
    tables = [
        pd.read_csv(run(dataclasses.replace(config, out=f"{config.out}-{jobs}", jobs=jobs)) / "accuracy.csv")
        for jobs in (1, 2)
    ]
    assert list(tables[0]["top1"]) == list(tables[1]["top1"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"networks": {}}, "networks is empty"),
        ({"networks": {"A": {"options": {}}}}, "A has no name"),
        ({"networks": {"A": {"name": "resnet18", "epoch": 3}}}, "unknown setting 'epoch'; closest: 'epochs'"),
        ({"networks": {"A": {"name": "resnet81"}}}, "unknown network 'resnet81'"),
        ({"networks": {"A/B": dict(RESNET)}}, "names a folder"),
        ({"networks": {"A": {"name": "mixer_s32_224"}}}, "say it: family"),
        ({"networks": {"A": {**RESNET, "family": "CNNs"}}}, "family 'CNNs'"),
        ({"networks": {"A": {**RESNET, "epochs": 0}}}, "A: epochs must be"),
        ({"networks": {"A": {**RESNET, "options": {"wings": 1}}}}, "wings"),
        ({"seeds": [0, 0]}, "different numbers"),
        ({"limits": {"test": 3}}, "limits"),
        ({"data": "nowhere"}, "nowhere does not exist"),
        ({"objective": "simcrl"}, "objective 'simcrl' is none of supervised, simclr"),
        ({"networks": {"A": {**RESNET, "objective": "byol"}}}, "A: objective 'byol'"),
        ({"simclr": {"epoch": 3}}, "simclr: unknown setting 'epoch'; closest: 'epochs'"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"jobs": 0}, "jobs must be at least 1"),
    ],
)
def test_what_cannot_run_is_refused_before_any_training(config, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        prepare(dataclasses.replace(config, **changes))
    assert not Path(config.out).exists()


def test_other_photographs_are_refused(config, tmp_path):
    own = synthetic_photos(tmp_path / "own", {"train": 4, "val": 2}, 32)
    config = dataclasses.replace(config, networks={"ResNet": dict(RESNET)}, seeds=[0], data=str(own))
    run(config)
    next((own / "train" / "disc").iterdir()).unlink()
    with pytest.raises(InputError, match="trained on other photographs"):
        run(config)


@pytest.mark.parametrize("name", ["classifiers_demo", "classifiers_imagenette", "processing_networks_demo"])
def test_the_configs_build_their_networks(name):
    config = read_settings(ClassifiersConfig, "test", ["--config", str(HOME / "configs" / f"{name}.yaml")])
    members = classifiers.members_of(config, 10)
    families = [member.family for member in members]
    assert families.count("CNN") == len(members) // 2 and len(members) == len(config.networks) * 2
    for member in members[::2]:
        model = classifiers.build_classifier(member.spec).eval()
        assert model(torch.rand(1, 3, config.image_size, config.image_size)).shape[0] == 1
        assert len(model.default_sites()) >= 3


def test_the_networks_of_processing_steps_have_steps_enough_and_travel_light():
    path = HOME / "configs" / "processing_networks.yaml"
    config = read_settings(ClassifiersConfig, "test", ["--config", str(path)])
    members = classifiers.members_of(config, 10)
    assert len(members) == 32 and config.seeds == [0, 1]
    for objective, classes in (("supervised", 10), ("simclr", 0)):
        chosen = [member for member in members if member.recipe.objective == objective]
        assert [member.family for member in chosen] == ["CNN"] * 8 + ["transformer"] * 8
        assert {member.spec.classes for member in chosen} == {classes}
    for member in members[:16:2]:
        model = classifiers.build_classifier(member.spec).eval()
        assert 0.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6, member.label
        assert len(sites(model)) >= 9 and model(torch.rand(1, 3, 64, 64)).shape == (1, 10)


def test_with_and_without_labels_are_trained_side_by_side(config, monkeypatch):
    vit = {key: VIT[key] for key in ("name", "options")}
    networks_of = {"ViT": dict(vit), "ViT SimCLR": {**vit, "objective": "simclr", "batch_size": 6}}
    config = dataclasses.replace(config, networks=networks_of, seeds=[0], simclr={"epochs": 3, "batch_size": 4})
    folder = run(config)
    table = pd.read_csv(folder / "accuracy.csv").set_index("label")
    assert table["measured_by"].to_dict() == {"ViT": "its own head", "ViT SimCLR": "linear probe"}
    assert table["epochs"].to_dict() == {"ViT": 2, "ViT SimCLR": 3}
    assert dict(zip(networks(folder)["label"], networks(folder)["objective"])) == table["objective"].to_dict()
    second, first = networks_in(folder)  # by name
    assert (first.training, second.training) == ("supervised", "self-supervised")
    assert len(first.classes) == 4 and second.classes == () and second.folder.name == "ViT SimCLR--seed-0"
    assert second.load()(torch.rand(2, 3, 32, 32)).shape == (2, 24)
    marker = json.loads((second.folder / "finished.json").read_text())
    assert marker["settings"]["recipe"]["batch_size"] == 6 and marker["found"]["precision"] == "fp32"
    photos = [load_photos(photo_set(next((folder.parent / "data").iterdir()), split), 32) for split in ("train", "val")]
    right = (linear_probe(second.load(), photos[0], photos[1][0]) == photos[1][1].numpy()).mean()
    assert table.loc["ViT SimCLR", "top1"] == pytest.approx(right, abs=1e-5)
    page = (folder / "summary.md").read_text()
    assert "have seen no label" in page and "linear probe" in page
    monkeypatch.setattr(classifiers, "train_simclr", None)
    run(config)  # nothing is trained again
    networks_of["ViT SimCLR"].pop("objective")
    with pytest.raises(InputError, match="finished with other settings"):
        run(dataclasses.replace(config, networks=networks_of))


def test_networks_of_before_objectives_are_still_finished(config):
    config = dataclasses.replace(config, networks={"ResNet": dict(RESNET)}, seeds=[0])
    folder = run(config)
    marker = folder / "networks" / "ResNet--seed-0" / "finished.json"
    kept = json.loads(marker.read_text())
    for key in ("objective", "temperature", "jitter", "precision"):
        del kept["settings"]["recipe"][key]
    marker.write_text(json.dumps(kept))
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    for key in ("objective", "simclr", "temperature", "jitter", "precision"):
        del settings[key]
    settings["out"] = config.out
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    before = (folder / "networks" / "ResNet--seed-0" / "classifier.safetensors").stat().st_mtime_ns
    run(config)
    assert (folder / "networks" / "ResNet--seed-0" / "classifier.safetensors").stat().st_mtime_ns == before
    assert list(networks(folder)["objective"]) == ["supervised"]


def test_the_marker_holds_all_that_a_training_depends_on(config):
    _, members, _, _ = prepare(config)
    settings = members[0].settings()
    assert json.loads(json.dumps(settings)) == settings
    assert {"label", "family", "spec", "recipe", "seed"} == set(settings)
