"""Training: one loop for both models, resumable to the bit, chosen on validation, never near the test images."""

import copy
import dataclasses
import json
import math
import sys
import types

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import model_sites
import train as door
from averaging import AveragedWeights
from dataset import SegmentationDataset, make_loader
from inference import score
from models import ModelSpec, build_model, lesion_logits, load_model, set_loss
from optimization import cosine, make_optimizer, make_schedule
from sources import open_datasets
from train import Recipe, TrainConfig, check_recipe, objective, train
from utils import InputError

SIZE = 32
pytestmark = pytest.mark.usefixtures("slim_unetpp")


@pytest.fixture(scope="module")
def base(synthetic_root) -> TrainConfig:
    return TrainConfig(
        data=str(synthetic_root), image_size=SIZE, preset="smoke", epochs=3, batch_size=5, device="cpu", limits={}
    )


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory, slim_unetpp):
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
    inside, step = door._Run.train_epoch, door._Run._step

    def train_epoch(self, current):
        if current == epoch:
            self._step = lambda batch: (step(self, batch), (_ for _ in ()).throw(KeyboardInterrupt))[0]
        return inside(self, current)

    monkeypatch.setattr(door._Run, "train_epoch", train_epoch)


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
    monkeypatch.setattr(door._Run, "train_epoch", lambda *_: pytest.fail("trained again"))
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
    monkeypatch.setattr(door._Run, "validate", lambda self: {"validation_loss": 1.0, "validation_iou": next(remaining)})


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
    inside = door._Run.train_epoch

    def spoilt(self, epoch):
        if epoch == 1:
            with torch.no_grad():
                next(iter(self.model.parameters())).fill_(float("nan"))
        return inside(self, epoch)

    monkeypatch.setattr(door._Run, "train_epoch", spoilt)
    for model in ("unetpp", "mask2former"):
        out = tmp_path / model
        with pytest.raises(InputError, match=r"loss became nan on images ISIC_\d+, ISIC_\d+.*lower the learning rate"):
            train(dataclasses.replace(base, model=model, limits={"train": 5}, out=str(out)))
        assert history(out)["epoch"].tolist() == [1]
        assert all(tensor.isfinite().all() for tensor in load_file(out / "last" / "model.safetensors").values())
        assert math.isnan(door.replay(out / "nan_batch.pt"))


@pytest.mark.parametrize("model", ["unetpp", "mask2former"])
def test_the_step_that_stopped_a_run_is_computed_again_from_its_file(base, tmp_path, monkeypatch, model):
    """A step that only passes for a broken one: what is replayed must be its loss to the bit, random points and all."""
    calls = iter([True, True, False, False])
    config = dataclasses.replace(base, model=model, average=0.9, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        numbers = types.SimpleNamespace(isfinite=lambda _: next(calls), ceil=math.ceil)  # asked twice a step
        patch.setattr(door, "math", numbers)
        with pytest.raises(
            InputError, match=r"the loss became [\d.]+ on images .*nan_batch\.pt \(train\.replay\)"
        ) as stop:
            train(config)
    said = str(stop.value)
    assert door.replay(tmp_path / "run" / "nan_batch.pt") == float(said.split()[3])
    kept = torch.load(tmp_path / "run" / "nan_batch.pt", weights_only=True)
    assert (kept["epoch"], kept["step"]) == (1, 1)
    assert kept["images"].shape == (5, 3, SIZE, SIZE) and kept["masks"].shape == (5, 1, SIZE, SIZE)
    assert ", ".join(kept["ids"]) in said
    torch.rand(3)
    assert door.replay(tmp_path / "run" / "nan_batch.pt") == float(said.split()[3])


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
        assert extra["transform"] == json.loads(json.dumps(dataclasses.asdict(base.transform)))
        expected = {"size": SIZE, "blur": 0.0, "interpolation": "area", "flips": True}
        assert {name: extra["transform"][name] for name in expected} == expected


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
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; use one of constant, one_cycle, cosine"),
        ({"warmup": 0.1}, "warmup belongs to the schedule cosine, not to one_cycle"),
        ({"warmup": 1.0, "schedule": "cosine"}, "warmup must be at least 0 and below 1, got 1.0"),
        ({"average": 1.0}, "average must be at least 0 and below 1"),
        ({"clip_norm": -1.0}, "clip_norm must not be below 0"),
        ({"encoder_learning_rate": 0.0}, "encoder_learning_rate must be above 0"),
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"batch_size": -1}, "batch_size must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
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


# ------------------------------------------------------------------------------------------------------- the switches


def test_cosine_climbs_linearly_and_falls_to_zero():
    shares = [cosine(step, total=10, warm=2) for step in range(11)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert shares[6] == pytest.approx(0.5) and shares[10] == pytest.approx(0, abs=1e-12)
    assert shares[2:] == sorted(shares[2:], reverse=True)
    assert cosine(0, total=10, warm=0) == 1


@pytest.mark.parametrize("schedule", ["constant", "one_cycle", "cosine"])
@pytest.mark.parametrize("model", ["unetpp", "mask2former"])
def test_the_encoder_may_learn_more_slowly_under_every_schedule(model, schedule):
    recipe = Recipe(model=model, preset="smoke", encoder_learning_rate=0.1, schedule=schedule, epochs=2)
    built = build_model(recipe.spec)
    optimizer = make_optimizer(recipe, built)
    plan = make_schedule(recipe, optimizer, 4)
    rest, encoder = optimizer.param_groups
    assert set(map(id, encoder["params"])) == set(map(id, model_sites.encoder_of(built).parameters()))
    assert len(rest["params"]) + len(encoder["params"]) == len(list(built.parameters()))
    for _ in range(8):
        assert encoder["lr"] == pytest.approx(0.1 * rest["lr"])
        optimizer.step()
        if plan is not None:
            plan.step()
    frozen = build_model(dataclasses.replace(recipe, freeze=["encoder"]).spec)
    assert len(make_optimizer(recipe, frozen).param_groups) == 1


def gradient_norms(monkeypatch) -> list[float]:
    norms, step = [], door._Run._step

    def watched(self, batch):
        value = step(self, batch)
        gradients = [p.grad.flatten() for p in self.plain.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return value

    monkeypatch.setattr(door._Run, "_step", watched)
    return norms


def test_gradients_are_cut_to_the_norm_that_was_asked_for(base, tmp_path, monkeypatch):
    norms = gradient_norms(monkeypatch)
    config = dataclasses.replace(base, model="mask2former", epochs=1)
    train(dataclasses.replace(config, out=str(tmp_path / "free")))
    free = norms.copy()
    norms.clear()
    train(dataclasses.replace(config, out=str(tmp_path / "cut"), clip_norm=0.5))
    assert min(free) > 1 and norms == pytest.approx([0.5] * len(free), rel=1e-4)


def test_the_average_follows_its_formula_and_counts_are_copied():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model.register_buffer("index", torch.tensor([0, 1, 2, 3]))  # as a Swin block's positions: rounding would spoil it
    average = AveragedWeights(model, 0.3)
    expected = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    for step in range(8):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
                tensor.add_(torch.randn_like(tensor))
            model[1].num_batches_tracked += 1
        average.update(model)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-6)
    assert average.module.index.tolist() == [0, 1, 2, 3] and average.module[1].num_batches_tracked == 8


@pytest.mark.parametrize("model", ["unetpp", "mask2former"])
def test_a_frozen_dressed_model_is_averaged_and_its_copy_stands_alone(model):
    built = build_model(Recipe(model=model, preset="smoke", freeze=["encoder"]).spec)
    average = AveragedWeights(built, 0.9).module
    average.train()
    assert not any(module.training for module in model_sites.encoder_of(average).modules())
    assert average.default_sites.args[0] is average and average.spec == built.spec
    assert [site.name for site in average.default_sites()] == [site.name for site in built.default_sites()]
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(float("nan"))
    images = torch.rand(2, 3, 64, 64)
    assert lesion_logits(average.eval(), images).isfinite().all()  # its own weights, and its own normalisation
    copy.deepcopy(average)


def test_what_is_validated_and_kept_is_the_average_and_the_state_holds_both(base, tmp_path, monkeypatch):
    seen, step = [], door._Run._step

    def watched(self, batch):
        if not seen:
            seen.append({name: value.double().clone() for name, value in self.plain.state_dict().items()})
        value = step(self, batch)
        seen.append({name: value.double().clone() for name, value in self.plain.state_dict().items()})
        return value

    monkeypatch.setattr(door._Run, "_step", watched)
    folder = train(dataclasses.replace(base, epochs=2, average=0.6, out=str(tmp_path / "run")))
    expected = seen[0]
    for number, state in enumerate(seen[1:]):
        decay = min(0.6, (1 + number) / (10 + number))
        expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in expected}
    kept = load_file(folder / "last" / "model.safetensors")
    for name, tensor in kept.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-6)
    state = torch.load(folder / "resume.pt", weights_only=True)
    assert all(torch.equal(state["average"]["model"][name], kept[name]) for name in kept)
    assert any(not torch.equal(state["model"][name], kept[name]) for name in kept)
    assert all(torch.equal(state["model"][name].double(), seen[-1][name]) for name in kept)
    model, extra = load_model(folder / "last")
    metrics, _ = score(model, make_loader(open_datasets(base)["validation"], base.batch_size))
    assert extra["validation_iou"] == pytest.approx(metrics["iou"].mean(), abs=1e-9)


def test_compiling_changes_no_name_and_with_eager_arithmetic_no_number(base, tmp_path, monkeypatch):
    """PyTorch's tracer with its own kernels left out: those take a minute to build here."""
    compiled, built = [], torch.compile

    def eager(function, **options):
        compiled.append(function)
        return built(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", eager)
    config = dataclasses.replace(base, epochs=1, limits={"train": 10}, average=0.5)
    plain, traced = (
        train(dataclasses.replace(config, compile=switch, out=str(tmp_path / str(switch)))) for switch in (False, True)
    )
    assert len(compiled) == 1 and same_weights(plain / "last", traced / "last")
    load_model(traced / "best")


# ------------------------------------------------------------------------------------------------------------ watched


def test_each_validation_image_is_served_once_an_epoch(base, tmp_path, monkeypatch):
    served, serve = [], SegmentationDataset.__getitem__
    validation = set(open_datasets(base)["validation"].ids)

    def watched(self, index):
        sample = serve(self, index)
        served.append(sample.id)
        return sample

    monkeypatch.setattr(SegmentationDataset, "__getitem__", watched)
    train(dataclasses.replace(base, model="mask2former", epochs=2, out=str(tmp_path / "run")))
    assert sorted(id_ for id_ in served if id_ in validation) == sorted([*validation, *validation])


def test_tensorboard_gets_every_number_of_the_history_where_it_is_installed(base, tmp_path, monkeypatch):
    written, opened = {}, []

    class Writer:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written[name, step] = value

        def flush(self):
            pass

        close = flush

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    config = dataclasses.replace(base, model="mask2former", epochs=2, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        interrupt_epoch(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    table = history(train(config))
    assert opened == [(str(tmp_path / "run" / "tensorboard"), step) for step in (1, 2)]
    assert {step for _, step in written} == {1, 2} and {name for name, _ in written} == {*table} - {"epoch"}
    assert [written["validation_iou", step] for step in (1, 2)] == pytest.approx(table["validation_iou"].tolist())


@pytest.mark.parametrize("model", ["unetpp", "mask2former"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_that_keeps_features_and_is_interrupted_ends_bit_identical(base, tmp_path, monkeypatch, model, epoch):
    """Whether the process dies while the features are written or while they are read."""
    config = dataclasses.replace(base, model=model, freeze=["encoder"], cache_features=True)
    monkeypatch.setenv("ISIC_FEATURES", str(tmp_path / "whole features"))
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    monkeypatch.setenv("ISIC_FEATURES", str(tmp_path / "features"))
    config = dataclasses.replace(config, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        interrupt_epoch(patch, epoch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = train(config)
    for kept in ("best", "last"):
        assert same_weights(folder / kept, whole / kept)
    pd.testing.assert_frame_equal(history(folder).drop(columns="seconds"), history(whole).drop(columns="seconds"))


def test_kept_features_of_a_frozen_encoder_train_the_same_model(base, tmp_path, monkeypatch):
    monkeypatch.setenv("ISIC_FEATURES", str(tmp_path / "features"))
    config = dataclasses.replace(base, model="mask2former", freeze=["encoder"], epochs=3, average=0.5)
    plain, kept = (
        train(dataclasses.replace(config, cache_features=switch, out=str(tmp_path / str(switch))))
        for switch in (False, True)
    )
    assert list((tmp_path / "features").iterdir())
    numbers = ["train_loss", "validation_loss", "validation_iou"]
    pd.testing.assert_frame_equal(history(plain)[numbers], history(kept)[numbers], rtol=1e-3)
    with pytest.raises(InputError, match="cache_features needs a frozen encoder"):
        train(dataclasses.replace(base, cache_features=True, out=str(tmp_path / "no")))
    with pytest.raises(InputError, match="with hair no image comes twice"):
        train(dataclasses.replace(config, cache_features=True, hair=0.5, out=str(tmp_path / "no")))
