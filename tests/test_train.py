"""Training: one loop for both models, resumable to the bit, chosen on validation, never near the test images."""

import dataclasses
import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import model_sites
import train as door
from dataset import SegmentationDataset
from models import ModelSpec, build_model, lesion_logits, load_model, set_loss
from sources import open_datasets
from train import Recipe, TrainConfig, check_recipe, objective, train
from utils import InputError

SIZE = 32


@pytest.fixture(scope="module")
def base(synthetic_root) -> TrainConfig:
    return TrainConfig(
        data=str(synthetic_root), image_size=SIZE, preset="smoke", epochs=3, batch_size=5, device="cpu", limits={}
    )


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """One finished run of three epochs of each model."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        model: train(dataclasses.replace(base, model=model, out=str(folder / model)))
        for model in ("unetpp", "mask2former")
    }


def history(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv")


def same_weights(first, second) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def interrupt_epoch(monkeypatch, epoch: int) -> None:
    """The process dies after the first step of this epoch (counted from 0)."""
    inside, step = door._Run._train_epoch, door._Run._step

    def train_epoch(self, current):
        if current == epoch:
            self._step = lambda batch: (step(self, batch), (_ for _ in ()).throw(KeyboardInterrupt))[0]
        return inside(self, current)

    monkeypatch.setattr(door._Run, "_train_epoch", train_epoch)


@pytest.mark.parametrize("model", ["unetpp", "mask2former"])
def test_a_run_leaves_best_last_history_curves_and_its_record(uninterrupted, model):
    folder = uninterrupted[model]
    for name in ("best/model.safetensors", "best/model.json", "last/model.safetensors", "last/model.json"):
        assert (folder / name).is_file()
    for name in ("history.csv", "training_curves.png", "config.yaml", "environment.json"):
        assert (folder / name).is_file()
    table = history(folder)
    assert table["epoch"].tolist() == [1, 2, 3]
    assert {"train_loss", "validation_loss", "validation_iou", "learning_rate", "seconds"} <= set(table)
    assert table["validation_iou"].between(0, 1).all()


@pytest.mark.parametrize(("model", "epochs"), [("unetpp", 6), ("mask2former", 12)])
def test_a_few_images_are_learnt(base, tmp_path, monkeypatch, model, epochs):
    rows = []
    monkeypatch.setattr(door._Run, "_keep", lambda self, row: rows.append(row))  # writing the epochs takes longer
    few = {"limits": {"train": 4}, "batch_size": 4, "epochs": epochs, "learning_rate": 5e-3, "flips": False}
    train(dataclasses.replace(base, model=model, out=str(tmp_path / "run"), **few))
    loss = pd.DataFrame(rows)["train_loss"]
    assert loss.tail(2).mean() < 0.9 * loss.head(2).mean()


@pytest.mark.parametrize("model", ["unetpp", "mask2former"])
def test_an_interrupted_run_ends_bit_identical_to_an_uninterrupted_one(
    base, uninterrupted, tmp_path, monkeypatch, model
):
    config = dataclasses.replace(base, model=model, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        interrupt_epoch(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert history(tmp_path / "run")["epoch"].tolist() == [1]
    torch.rand(17)  # whatever else the new process has drawn
    folder = train(config)
    pd.testing.assert_frame_equal(
        history(folder).drop(columns="seconds"), history(uninterrupted[model]).drop(columns="seconds")
    )
    for kept in ("best", "last"):
        assert same_weights(folder / kept, uninterrupted[model] / kept)


def test_a_finished_run_is_not_trained_again(base, uninterrupted, monkeypatch):
    folder = uninterrupted["unetpp"]
    kept = [folder / "best/model.safetensors", folder / "last/model.safetensors", folder / "history.csv"]
    before = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.setattr(door._Run, "_train_epoch", lambda *_: pytest.fail("trained again"))
    assert train(dataclasses.replace(base, out=str(folder))) == folder
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(base, uninterrupted, tmp_path):
    config = dataclasses.replace(base, epochs=1, schedule="constant")
    first, again, other = (
        train(dataclasses.replace(config, out=str(tmp_path / name), seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert same_weights(first / "last", again / "last") and not same_weights(first / "last", other / "last")
    columns = ["train_loss", "validation_loss", "validation_iou"]
    assert history(first)[columns].equals(history(again)[columns])


def test_neither_validation_nor_training_sees_a_test_image(base, tmp_path, monkeypatch):
    seen = set()
    serve = SegmentationDataset.__getitem__

    def watched(self, index):
        sample = serve(self, index)
        seen.add(sample.id)
        return sample

    monkeypatch.setattr(SegmentationDataset, "__getitem__", watched)
    train(dataclasses.replace(base, epochs=1, out=str(tmp_path / "run")))
    splits = open_datasets(base)
    assert seen == {*splits["train"].ids, *splits["validation"].ids}
    assert not seen & set(splits["test"].ids) and len(splits["test"]) == 8


def scripted_validation(monkeypatch, scores) -> None:
    """Validation IoUs as written; each epoch's weights remain what training made them."""
    remaining = iter(scores)
    monkeypatch.setattr(
        door._Run, "_validate", lambda self: {"validation_loss": 1.0, "validation_iou": next(remaining)}
    )


def test_best_is_the_epoch_of_the_highest_validation_iou_and_the_first_of_equals(base, tmp_path, monkeypatch):
    scripted_validation(monkeypatch, [0.2, 0.6, 0.6, 0.4])
    folder = train(dataclasses.replace(base, epochs=4, limits={"train": 5}, out=str(tmp_path / "run")))
    best, last = (json.loads((folder / name / "model.json").read_text())["extra"] for name in ("best", "last"))
    assert (best["epoch"], best["validation_iou"]) == (2, 0.6) and last["epoch"] == 4
    assert not same_weights(folder / "best", folder / "last")


def test_patience_stops_after_so_many_epochs_without_improvement(base, tmp_path, monkeypatch):
    scripted_validation(monkeypatch, [0.2, 0.5, 0.5, 0.4, 0.9])
    config = dataclasses.replace(base, epochs=5, patience=2, limits={"train": 5}, out=str(tmp_path / "run"))
    folder = train(config)
    assert history(folder)["epoch"].tolist() == [1, 2, 3, 4]
    train(config)  # stopped is finished
    assert len(history(folder)) == 4


def test_a_loss_that_is_not_a_number_stops_and_names_the_images(base, tmp_path, monkeypatch):
    inside = door._Run._train_epoch

    def spoilt(self, epoch):
        if epoch == 1:
            with torch.no_grad():
                next(iter(self.model.parameters())).fill_(float("nan"))
        return inside(self, epoch)

    monkeypatch.setattr(door._Run, "_train_epoch", spoilt)
    for model in ("unetpp", "mask2former"):
        out = tmp_path / model
        with pytest.raises(InputError, match=r"loss became nan on images ISIC_\d+, ISIC_\d+.*lower the learning rate"):
            train(dataclasses.replace(base, model=model, limits={"train": 5}, out=str(out)))
        assert history(out)["epoch"].tolist() == [1]
        assert all(tensor.isfinite().all() for tensor in load_file(out / "last" / "model.safetensors").values())


@pytest.mark.parametrize("model", ["unetpp", "mask2former"])
def test_a_frozen_encoder_is_what_it_was_before_training(base, tmp_path, model):
    config = dataclasses.replace(
        base, model=model, freeze=["encoder"], epochs=1, learning_rate=1e-2, out=str(tmp_path / "run")
    )
    folder = train(config)
    before = model_sites.encoder_of(build_model(config.spec, config.seed)).state_dict()
    trained = load_model(folder / "last")[0]
    after = model_sites.encoder_of(trained).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    untouched = build_model(config.spec, config.seed).state_dict()
    assert sum(not torch.equal(untouched[key], value) for key, value in trained.state_dict().items()) > 10


def test_the_transform_is_kept_with_the_checkpoint(uninterrupted, base):
    for kept in ("best", "last"):
        _, extra = load_model(uninterrupted["unetpp"] / kept)
        assert extra["transform"] == dataclasses.asdict(base.transform)
        assert extra["transform"] == {"size": SIZE, "blur": 0.0, "interpolation": "area", "flips": True}


def test_mask2former_trains_on_its_own_loss_unless_told_otherwise():
    images, masks = torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64)
    masks[:, :, 8:40, 8:40] = 1
    assert objective(Recipe(model="mask2former")) is set_loss
    assert objective(Recipe(model="mask2former", loss="set")) is set_loss
    from loss_metrics import dice_bce, scaled_dice

    for name in ("unetpp", "mask2former"):
        model = build_model(ModelSpec(name, "smoke")).eval()
        with torch.no_grad():
            logits = lesion_logits(model, images)
            for loss, function in (("scaled_dice", scaled_dice), ("dice_bce", dice_bce)):
                value = objective(Recipe(model=name, loss=loss))(model, images, masks)
                torch.testing.assert_close(value, function(logits, masks))
            if name == "unetpp":
                torch.testing.assert_close(objective(Recipe())(model, images, masks), dice_bce(logits, masks))


def test_the_earlier_studys_recipe_trains(base, tmp_path):
    folder = train(
        dataclasses.replace(
            base,
            model="mask2former",
            answer="query:1",
            loss="scaled_dice",
            normalization="none",
            freeze=["encoder"],
            optimizer="adam",
            schedule="constant",
            learning_rate=1e-4,
            epochs=1,
            blur=2.0,
            interpolation="bicubic",
            flips=False,
            out=str(tmp_path / "run"),
        )
    )
    model, extra = load_model(folder / "best")
    assert model.spec.answer == "query:1" and extra["transform"]["blur"] == 2.0
    assert history(folder)["learning_rate"].tolist() == [1e-4]


def test_mixed_precision_is_a_flag_and_one_process_may_use_several(base, tmp_path):
    results = {}
    for precision in ("no", "bf16", "no"):
        out = tmp_path / f"{precision}-{len(results)}"
        config = dataclasses.replace(
            base, mixed_precision=precision, epochs=1, model="mask2former", limits={"train": 5}, out=str(out)
        )
        results[out.name] = history(train(config))["train_loss"].item()
    assert results["no-0"] == results["no-2"]
    assert results["bf16-1"] != results["no-0"] and results["bf16-1"] == pytest.approx(results["no-0"], rel=0.05)


def test_other_settings_are_refused_and_nothing_is_changed(base, uninterrupted):
    folder = uninterrupted["unetpp"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    for change in ({"learning_rate": 1e-2}, {"seed": 4}, {"model": "mask2former"}, {"limits": {"train": 5}}):
        with pytest.raises(InputError, match=f"other settings .*{next(iter(change))}"):
            train(dataclasses.replace(base, out=str(folder), **change))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "scaled_dise"}, "unknown loss 'scaled_dise'; closest: 'scaled_dice'"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm'; closest: 'adam"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; use one of constant, one_cycle"),
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"batch_size": -1}, "batch_size must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"weight_decay": -1e-4}, "weight_decay must not be below 0"),
        ({"patience": -1}, "patience must not be below 0"),
    ],
)
def test_impossible_recipes_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        check_recipe(Recipe(**changes))


def test_a_yaml_and_the_command_line_make_the_settings(tmp_path):
    (tmp_path / "run.yaml").write_text("model: mask2former\nepochs: 4\nlimits: {train: 7}\noptions: {num_queries: 3}\n")
    config = door.load_config(["--config", str(tmp_path / "run.yaml"), "--epochs", "2", "--freeze", "[encoder]"])
    assert isinstance(config, TrainConfig)
    assert (config.model, config.epochs, config.limits) == ("mask2former", 2, {"train": 7})
    assert config.options == {"num_queries": 3} and config.spec.freeze == ("encoder",)
    assert door.load_config([]) == TrainConfig()


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_the_command_line_wins_wherever_the_yaml_is_named(tmp_path, form):
    (tmp_path / "run.yaml").write_text("data: elsewhere\nepochs: 4\n")
    named = [word.format(tmp_path / "run.yaml") for word in form]
    for arguments in (["--data", "here", *named], [*named, "--data", "here"]):
        config = door.load_config(arguments)
        assert (config.data, config.epochs) == ("here", 4)


def test_the_command_trains_and_prints_its_best_epoch(base, tmp_path, capsys):
    out = tmp_path / "run"
    door.main(
        f"--data {base.data} --image_size 32 --preset smoke --epochs 1 --batch_size 6 --device cpu --out {out}".split()
    )
    assert (out / "best" / "model.safetensors").is_file()
    assert "best epoch 1: validation IoU" in capsys.readouterr().out
