"""Door: one training loop for every model, on accelerate.

`python train.py --model unetpp --data FOLDER --out runs/unetpp` trains, validates each epoch, keeps the best and the
last checkpoint and a history CSV; the same command again continues where it stopped, also after `kill -9`. Several
processes: `accelerate launch --num_processes 2 train.py …`. Models are chosen by looking at validation images only;
test images are for `inference.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from torch import nn

import visualization
from allocation import keep_freed_memory
from averaging import AveragedWeights
from checkpoints import full_disk_as_a_sentence, load_state, save_state, saved_extra
from class_metrics import ce_dice
from dataset import SegmentationDataset, make_loader
from frozen_features import cache_features
from images import cache_folder
from inference import image_scores, predict
from locks import alone_in
from loss_metrics import dice_bce
from model_sites import encoder_of
from models import TITLES, build_model, check_batches, check_image_size, save_model
from optimization import make_optimizer, make_schedule
from processes import (
    close_connections,
    gather_rows,
    main_first,
    make_accelerator,
    on_main,
    share_buffers,
    share_of,
    start_the_others,
)
from recipes import OVERFIT_IOU, TrainConfig, check_cache_features, check_recipe, for_overfit, is_finished, objective
from recipes import Recipe as Recipe  # studies and notebooks ask for it here
from sources import open_datasets
from utils import (
    InputError,
    digest,
    open_run,
    peak_memory,
    progress,
    read_settings,
    remove_leftovers,
    resolve_device,
    seed_everything,
    sentences_instead_of_tracebacks,
    write_table,
)
from watching import Scalars, StepMemory, read_batch, restore_generators


def features_folder() -> Path:
    """Where features of frozen encoders are kept: what ISIC_FEATURES names, or beside the cached images."""
    return Path(os.environ.get("ISIC_FEATURES") or cache_folder().parent / "features")


def train(config: TrainConfig, datasets: dict[str, SegmentationDataset] | None = None) -> Path:
    """Train as configured and return the run folder; a finished run returns at once, an interrupted one continues.

    The folder holds `best/` and `last/` (model.safetensors, model.json), history.csv, training_curves.png, config.yaml
    and environment.json, and what a later call continues from. `datasets` (train and validation) may be given when they
    are already open.
    """
    run = prepare(config, datasets)
    on_main(run.accelerator, run.open_folder)
    with contextlib.ExitStack() as held:
        on_main(run.accelerator, lambda: held.enter_context(alone_in(run.folder)))
        run.resume()
        run.finish_epochs()
    return run.folder


def prepare(config: TrainConfig, datasets: dict[str, SegmentationDataset] | None = None) -> _Run:
    """Everything that can be refused before the first step, and a run that has written nothing yet."""
    check_recipe(config)
    check_cache_features(config)
    device = resolve_device(config.device)
    loss = objective(config)
    accelerator = make_accelerator(device, config.mixed_precision)
    if device.type == "cpu":
        keep_freed_memory()
    if "encoder" in config.freeze and config.weights == "none":
        accelerator.print("note: the encoder is frozen at its random weights (weights: none); nothing in it is trained")
    model = main_first(accelerator, lambda: build_model(config.spec, config.seed))
    size = config.transform.size  # refuses what is no size at all
    check_image_size(model, size, size)
    datasets = datasets or main_first(accelerator, lambda: _open(config))
    check_batches(model, len(datasets["train"]), config.batch_size)
    return _Run(config, model, datasets, accelerator, loss)


def _open(config: TrainConfig) -> dict[str, SegmentationDataset]:
    """Training and validation images; for an overfit check the same few, as they are, for both."""
    if not config.overfit:
        return open_datasets(config, seed=config.seed, needed=("train", "validation"))
    few = dataclasses.replace(config, limits=config.limits | {"train": config.overfit}, fraction=1.0)
    pairs = open_datasets(few, seed=config.seed, needed=("train",))["train"].pairs
    datasets = {name: SegmentationDataset(pairs, config.transform.unaugmented) for name in ("train", "validation")}
    datasets["train"].repeats = config.repeats
    return datasets


def in_fast_layout(model: nn.Module, device: torch.device) -> nn.Module:
    """Channels last on a GPU, whose tensor cores want it; on the CPUs tried it made some weight gradients slower."""
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


class _Run:
    """The state of one training run, between its epochs."""

    def __init__(self, config, model, datasets, accelerator, loss):
        self.config, self.folder, self.accelerator, self.loss = config, Path(config.out), accelerator, loss
        self.datasets = {name: datasets[name] for name in ("train", "validation")}
        loader = make_loader(
            datasets["train"], config.batch_size, shuffle=True, seed=config.seed, workers=config.workers
        )
        mine = share_of(datasets["validation"], config.batch_size, accelerator)
        self.validation = make_loader(mine, config.batch_size, workers=config.workers)
        model = in_fast_layout(model, accelerator.device)
        optimizer = make_optimizer(config, model)
        self.schedule = make_schedule(config, optimizer, math.ceil(len(loader) / accelerator.num_processes))
        self.average = AveragedWeights(model, config.average) if config.average else None
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        self.plain = accelerator.unwrap_model(self.model)
        if self.average is not None:  # for its device and its precision; it is never trained
            accelerator.prepare_model(self.average.module, evaluation_mode=True)
        if config.cache_features:
            self._cache_features()
        if config.compile:
            self.plain.compile()  # in place: the names of the weights stay
        self.memory = StepMemory(self.plain)
        self.history: list[dict] = []

    def _cache_features(self) -> None:
        """A frozen encoder answers from files; that of the averaged weights is the same one."""
        config, place = self.config, self.accelerator.process_index
        views = 8 if config.flips else 1
        rows = views * len(self.datasets["train"].ids) + len(self.datasets["validation"])
        cache_features(self.plain, features_folder(), rows, place)
        if self.average is not None:
            encoder_of(self.average.module).forward = encoder_of(self.plain).forward

    @property
    def kept(self) -> nn.Module:
        """The model that is validated and saved: the average of the weights, where there is one."""
        return self.plain if self.average is None else self.average.module

    # ------------------------------------------------------------------------------------------------ the epochs

    def finish_epochs(self) -> None:
        scalars = Scalars(self.folder, len(self.history)) if self.accelerator.is_main_process else None
        while not is_finished(self.config, [row["validation_iou"] for row in self.history]):
            started, epoch = time.perf_counter(), len(self.history)
            train_loss = self.train_epoch(epoch)
            for model in (self.plain, *([self.average.module] if self.average else [])):
                share_buffers(model, self.accelerator)
            row = {"epoch": epoch + 1, "train_loss": train_loss} | self.validate()
            row |= {
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "seconds": round(time.perf_counter() - started, 2),
            }
            self.history.append(row)
            self._keep(row)
            if scalars:
                scalars.write(row)
        if scalars:
            scalars.close()

    def train_epoch(self, epoch: int) -> float:
        """Mean loss of the images served, by every process; what fills up their last step counts again."""
        # what is random inside an epoch (dropout, sampled points) is a function of seed, epoch and process, so that a
        # resumed run draws what an uninterrupted one would have drawn
        place = [self.accelerator.process_index] if self.accelerator.process_index else []
        seed_everything(int(digest("epoch", self.config.seed, epoch, *place)[:8], 16))
        # not data.set_epoch: accelerate's loader sets its own count on the data set each time it is iterated
        self.loader.set_epoch(epoch)
        self.model.train()
        total = count = 0
        label = f"{self.config.model} seed {self.config.seed} epoch {epoch + 1}/{self.config.epochs}"
        # an IoU of training batches would cost Mask2Former, whose loss needs no masks, another pass
        known = {"validation_iou": f"{self.history[-1]['validation_iou']:.3f}"} if self.history else {}
        bar = progress(self.loader, desc=label, unit="batch")
        for step, batch in enumerate(bar):
            value = self._step(batch)
            if not math.isfinite(value):
                self._stop(value, batch, epoch, step)
            total, count = total + value * len(batch.id), count + len(batch.id)
            bar.set_postfix(loss=f"{total / count:.3f}", **known)
        totals, counts = zip(*gather_rows([(total, count)]))
        return sum(totals) / sum(counts)

    def _step(self, batch) -> float:
        """The loss, after the step that it calls for; none is made where it is not finite."""
        self.memory.remember()
        with self.accelerator.autocast():
            loss = self.loss(self.model, batch.image, batch.mask)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if self.config.clip_norm:  # takes fp16's loss scale out of the gradients first
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
            self.average.update(self.plain)
        return value

    def _stop(self, value: float, batch, epoch: int, step: int) -> None:
        """Keep what the step began with, and end the run with a sentence."""
        path = self.folder / "nan_batch.pt"
        with full_disk_as_a_sentence(self.folder, f"the loss became {value}, and {path.name}"):
            config = dataclasses.asdict(self.config)
            self.memory.write(path, batch, epoch=epoch + 1, step=step, config=config)
        raise InputError(
            f"the loss became {value} on images {', '.join(batch.id)}; lower the learning rate, set clip_norm, or "
            f"train in full precision; the step can be computed again from {path} (train.replay); the checkpoints of "
            f"earlier epochs are in {self.folder}"
        )

    def validate(self) -> dict[str, float]:
        """One pass over the validation images: each is decoded once, and the model sees it once."""
        rows = []
        for batch in progress(self.validation, desc="validating", unit="batch"):
            logits = predict(self.kept, batch.image)
            ious = image_scores(logits, batch.mask.cpu())["iou"].tolist()
            # one validation loss for every model, whatever it trains on, so that their curves can be compared
            loss = dice_bce if logits.shape[1] == 1 else ce_dice
            losses = [float(loss(*pair)) for pair in zip(logits.split(1), batch.mask.cpu().split(1))]
            rows += zip(batch.id, losses, ious)
        table = pd.DataFrame(sorted(gather_rows(rows)), columns=["id", "validation_loss", "validation_iou"])
        return {name: float(table[name].mean()) for name in ("validation_loss", "validation_iou")}

    # ------------------------------------------------------------------------------------------------- the folder

    def _keep(self, row: dict) -> None:
        """Write what this epoch can be continued from, and after it what follows from it: see `_export`."""
        on_main(self.accelerator, lambda: self._write(row["epoch"]))

    def _write(self, epoch: int) -> None:
        with full_disk_as_a_sentence(self.folder, f"the checkpoint of epoch {epoch}"):
            save_state(self.folder, self._state())
            self._export()

    @property
    def _parts(self) -> dict:
        """What else has a state, by its name in the saved one; None where this run has no such part."""
        return {"schedule": self.schedule, "scaler": self.accelerator.scaler, "average": self.average}

    def _state(self) -> dict:
        return {
            "model": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        } | {name: None if part is None else part.state_dict() for name, part in self._parts.items()}

    def resume(self) -> None:
        """Continue from the last finished epoch of this folder, if there is one."""
        state = on_main(self.accelerator, self._find_state)
        if state is None:
            return
        self.plain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, part in self._parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        self.history = state["history"]
        on_main(self.accelerator, self._complete)

    def open_folder(self) -> None:
        """Make or check the run folder; the number of processes counts, because it multiplies the images of a step."""
        hashes = digest(*(self.datasets[name].fingerprint for name in sorted(self.datasets)))
        settings = dataclasses.asdict(self.config)
        settings |= {"processes": self.accelerator.num_processes, "data_hash": hashes}
        open_run(self.folder, settings, self.accelerator.device)

    def _find_state(self) -> dict | None:
        for place in (self.folder, self.folder / "best", self.folder / "last"):
            remove_leftovers(place)
        return load_state(self.folder)

    def _complete(self) -> None:
        """Write what a process that was killed between the state and its exports has left undone."""
        last, best = self.history[-1], self._best()
        undone = self._label(last) != saved_extra(self.folder / "last")
        undone |= best is last and self._label(best) != saved_extra(self.folder / "best")
        written = self.folder / "history.csv"
        undone |= not written.exists() or len(pd.read_csv(written)) != len(self.history)
        if undone:
            with full_disk_as_a_sentence(self.folder, f"the checkpoint of epoch {last['epoch']}"):
                self._export()

    def _best(self) -> dict:
        """The epoch of the highest validation IoU, the first of equals."""
        return max(self.history, key=lambda row: row["validation_iou"])

    def _label(self, row: dict) -> dict:
        """What a checkpoint of this epoch says of itself."""
        return {
            "transform": json.loads(json.dumps(dataclasses.asdict(self.config.transform))),  # as it is read back
            "data": "synthetic" if self.config.is_synthetic else "folder",
            "seed": self.config.seed,
            "epoch": row["epoch"],
            "validation_iou": row["validation_iou"],
        }

    def _export(self) -> None:
        """Best (when it is), last, curves and history, from the state that is already safe: none runs ahead of it."""
        row = self.history[-1]
        if self._best() is row:
            save_model(self.kept, self.folder / "best", self._label(row))
        save_model(self.kept, self.folder / "last", self._label(row))
        history = pd.DataFrame(self.history)
        curves = visualization.training_curves(
            history.assign(model=TITLES[self.config.model], seed=self.config.seed),
            caption="{train} training images, {validation} validation images.".format(
                **{name: len(data.ids) for name, data in self.datasets.items()}
            ),
            synthetic=self.config.is_synthetic,
        )
        visualization.save(curves, self.folder / "training_curves.png")
        write_table(history, self.folder / "history.csv")


def replay(path: Path | str) -> float:
    """The loss of the step in a nan_batch.pt, computed again from the weights and generators that it began with."""
    kept = read_batch(Path(path))
    config = TrainConfig(**kept["config"])
    device = resolve_device(config.device)
    accelerator = make_accelerator(device, config.mixed_precision)
    model = build_model(dataclasses.replace(config.spec, weights="none"), config.seed)
    model.load_state_dict(kept["model"])
    model = accelerator.prepare_model(in_fast_layout(model, accelerator.device)).train()
    restore_generators(kept["generators"])
    with accelerator.autocast():
        return float(objective(config)(model, kept["images"].to(device), kept["masks"].to(device)).detach())


def load_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The settings from a YAML (`--config`), overridden by the other arguments of the command line."""
    config = read_settings(TrainConfig, "python train.py", sys.argv[1:] if arguments is None else arguments)
    return for_overfit(config) if config.overfit else config


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one model and print its history."""
    config = load_config(arguments)
    start_the_others(resolve_device(config.device))
    folder = train(config)
    if PartialState().is_main_process:
        history = pd.read_csv(folder / "history.csv")
        best = history.loc[history["validation_iou"].idxmax()]
        print(history.round(4).to_string(index=False))
        memory = peak_memory(resolve_device(config.device))
        print(
            f"best epoch {int(best['epoch'])}: validation IoU {best['validation_iou']:.4f}; {memory}; "
            f"checkpoints in {folder}"
        )
        if config.overfit and best["validation_iou"] < OVERFIT_IOU:
            raise InputError(
                f"the overfit check failed: IoU {best['validation_iou']:.3f} on its own {config.overfit} training "
                f"images, below {OVERFIT_IOU}; try more epochs or another learning rate, else it cannot learn the task"
            )
    close_connections()


if __name__ == "__main__":
    with sentences_instead_of_tracebacks():
        main()
