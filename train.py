"""Door: one training loop for every model, on accelerate.

`python train.py --model unetpp --data FOLDER --out runs/unetpp` trains, validates each epoch, keeps the best and the
last checkpoint and a history CSV; the same command again continues where it stopped. Models are chosen by looking at
validation images only; test images are for `inference.py`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import visualization
from dataset import SegmentationDataset, make_loader
from inference import score
from loss_metrics import LOSSES, dice_bce
from models import TITLES, ModelSpec, build_model, lesion_logits, save_model, set_loss
from sources import ImageSource, open_datasets
from utils import (
    InputError,
    atomic_path,
    closest,
    digest,
    open_run,
    pick,
    progress,
    read_settings,
    resolve_device,
    seed_everything,
    sentences_instead_of_tracebacks,
    write_table,
)
from weights import UNREADABLE

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "one_cycle")
PRECISIONS = ("no", "fp16", "bf16")


@dataclass
class Recipe:
    """A model and how it is trained.

    Args:
        model: unetpp or mask2former
        preset: demo, smoke, isic2018, …; for unetpp any encoder of segmentation-models-pytorch, for mask2former
            swin_tiny, or any Swin-based hub name
        weights: none, imagenet (the preset's pretrained ones), or a file
        normalization: of the input: imagenet, half or none
        freeze: roles of modules that do not train: encoder
        answer: Mask2Former's lesion: semantic, or query:1 (the earlier study's)
        options: overrides of the preset, e.g. {"encoder_name": "mobilenet_v2"}
        loss: scaled_dice, dice_bce, set (Mask2Former's own); auto is set for mask2former and dice_bce for others
        epochs: passes over the training images
        batch_size: images a step
        learning_rate: the highest one, with a schedule
        weight_decay: of the optimiser
        optimizer: adam or adamw
        schedule: constant or one_cycle (over all epochs)
        patience: stop when the validation IoU has not improved for so many epochs; 0 never stops early
    """

    model: str = "unetpp"
    preset: str = "demo"
    weights: str = "none"
    normalization: str = "imagenet"
    freeze: list[str] = field(default_factory=list)
    answer: str = "semantic"
    options: dict = field(default_factory=dict)
    loss: str = "auto"
    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: str = "adamw"
    schedule: str = "one_cycle"
    patience: int = 0

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            self.model, self.preset, self.weights, self.normalization, tuple(self.freeze), self.answer, self.options
        )


@dataclass
class TrainConfig(ImageSource, Recipe):
    """One training run: images, recipe, and where and how it runs.

    Args:
        seed: of the initial weights, the order of the images and their augmentation
        out: run folder; the same settings continue it, others are refused
        device: auto, cpu or cuda
        workers: processes that read images
        mixed_precision: no, fp16 or bf16
    """

    seed: int = 0
    out: str = "runs/train"
    device: str = "auto"
    workers: int = 0
    mixed_precision: str = "no"


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that cannot run, before any image is read."""
    if recipe.loss not in {"auto", "set", *LOSSES}:
        raise InputError(f"unknown loss {recipe.loss!r}; closest: {closest(recipe.loss, ['set', *LOSSES])}")
    pick("optimizer", recipe.optimizer, OPTIMIZERS)
    if recipe.schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {recipe.schedule!r}; use one of {', '.join(SCHEDULES)}")
    for name in ("epochs", "batch_size", "learning_rate"):
        if not getattr(recipe, name) > 0:
            raise InputError(f"{name} must be above 0, got {getattr(recipe, name)}")
    for name in ("weight_decay", "patience"):
        if not getattr(recipe, name) >= 0:
            raise InputError(f"{name} must not be below 0, got {getattr(recipe, name)}")


def is_finished(recipe: Recipe, validation_ious: Sequence[float]) -> bool:
    """Whether all epochs are done, or none of the last `patience` improved on the best validation IoU."""
    scores = list(validation_ious)
    waited = len(scores) - 1 - scores.index(max(scores)) if scores else 0
    return len(scores) >= recipe.epochs or bool(recipe.patience and waited >= recipe.patience)


def objective(recipe: Recipe) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """(model, images, masks) -> loss, by name."""
    name = recipe.loss
    if name == "auto":
        name = "set" if recipe.model == "mask2former" else "dice_bce"
    if name == "set":
        if recipe.model != "mask2former":
            raise InputError(f"loss 'set' needs a set of queries; {recipe.model} has none: use scaled_dice or dice_bce")
        return set_loss
    loss = LOSSES[name]
    return lambda model, images, masks: loss(lesion_logits(model, images), masks)


def train(config: TrainConfig, datasets: dict[str, SegmentationDataset] | None = None) -> Path:
    """Train as configured and return the run folder; a finished run returns at once, an interrupted one continues.

    The folder holds `best/` and `last/` (model.safetensors, model.json), history.csv, training_curves.png, config.yaml
    and environment.json. `datasets` (train and validation) may be given when they are already open.
    """
    check_recipe(config)
    device = resolve_device(config.device)
    folder = Path(config.out)
    if "encoder" in config.freeze and config.weights == "none":
        print("note: the encoder is frozen at its random weights (weights: none); nothing in it is trained")
    loss = objective(config)
    accelerator = _accelerator(config, device)
    model = build_model(config.spec, config.seed)
    datasets = datasets or open_datasets(config, seed=config.seed, needed=("train", "validation"))
    settings = dataclasses.asdict(config) | {"data_hash": digest(*(datasets[k].fingerprint for k in sorted(datasets)))}
    open_run(folder, settings, device)
    run = _Run(config, model, datasets, accelerator, loss, folder)
    run.resume()
    run.finish_epochs()
    return folder


def _accelerator(config: TrainConfig, device: torch.device) -> Accelerator:
    if config.mixed_precision not in PRECISIONS:
        raise InputError(f"unknown mixed precision {config.mixed_precision!r}; use one of {', '.join(PRECISIONS)}")
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise InputError("mixed precision fp16 needs a GPU; on the CPU use --mixed_precision no, or bf16")
    # accelerate keeps the first run's device and precision for the whole process; a notebook may train with others
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=config.mixed_precision)


class _Run:
    """The state of one training run, between its epochs."""

    def __init__(self, config, model, datasets, accelerator, loss, folder):
        self.config, self.folder, self.accelerator, self.loss = config, folder, accelerator, loss
        self.data = datasets["train"]
        loader = make_loader(
            self.data, config.batch_size, shuffle=True, seed=config.seed, workers=config.workers, drop_last=False
        )
        self.validation = make_loader(datasets["validation"], config.batch_size, workers=config.workers)
        model = model.to(memory_format=torch.channels_last)  # convolutions run a fifth faster so
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = OPTIMIZERS[config.optimizer](trained, config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = _schedule(config, optimizer, len(loader))
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        self.history: list[dict] = []

    # ------------------------------------------------------------------------------------------------ the epochs

    def finish_epochs(self) -> None:
        while not is_finished(self.config, [row["validation_iou"] for row in self.history]):
            started, epoch = time.perf_counter(), len(self.history)
            train_loss = self._train_epoch(epoch)
            row = {"epoch": epoch + 1, "train_loss": train_loss} | self._validate()
            row |= {
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "seconds": round(time.perf_counter() - started, 2),
            }
            self.history.append(row)
            self._keep(row)

    def _train_epoch(self, epoch: int) -> float:
        # what is random inside an epoch (dropout, sampled points) is a function of seed and epoch, so that a
        # resumed run draws what an uninterrupted one would have drawn
        seed_everything(int(digest("epoch", self.config.seed, epoch)[:8], 16))
        # not data.set_epoch: accelerate's loader sets its own count on the data set each time it is iterated
        self.loader.set_epoch(epoch)
        self.model.train()
        total = count = 0
        label = f"{self.config.model} seed {self.config.seed} epoch {epoch + 1}/{self.config.epochs}"
        bar = progress(self.loader, desc=label, unit="batch")
        for batch in bar:
            value = self._step(batch)
            total, count = total + value * len(batch.id), count + len(batch.id)
            bar.set_postfix(loss=f"{total / count:.3f}")
        return total / count

    def _step(self, batch) -> float:
        with self.accelerator.autocast():
            loss = self.loss(self.model, batch.image, batch.mask)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"the loss became {value} on images {', '.join(batch.id)}; lower the learning rate, or train in full "
                f"precision; the checkpoints of earlier epochs are in {self.folder}"
            )
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        return value

    def _validate(self) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        metrics, logits = score(model, self.validation, "validating")
        masks = {image: mask for batch in self.validation for image, mask in zip(batch.id, batch.mask)}
        # one validation loss for every model, whatever it trains on, so that their curves can be compared
        stacked = [torch.stack([table[image] for image in metrics["id"]]) for table in (logits, masks)]
        return {"validation_loss": float(dice_bce(*stacked)), "validation_iou": float(metrics["iou"].mean())}

    # ------------------------------------------------------------------------------------------------- the folder

    def _keep(self, row: dict) -> None:
        """Write best (when it is), last, history and curves; the resume file last, so that it never runs ahead."""
        if not self.accelerator.is_main_process:
            return
        model = self.accelerator.unwrap_model(self.model)
        extra = {
            "transform": dataclasses.asdict(self.config.transform),
            "data": "synthetic" if self.config.is_synthetic else "folder",
            "seed": self.config.seed,
            "epoch": row["epoch"],
            "validation_iou": row["validation_iou"],
        }
        if row["validation_iou"] > max((past["validation_iou"] for past in self.history[:-1]), default=-1.0):
            save_model(model, self.folder / "best", extra)
        save_model(model, self.folder / "last", extra)
        history = pd.DataFrame(self.history)
        write_table(history, self.folder / "history.csv")
        curves = visualization.training_curves(
            history.assign(model=TITLES[self.config.model], seed=self.config.seed),
            caption=f"{len(self.data)} training images, {len(self.validation.dataset)} validation images.",
            synthetic=self.config.is_synthetic,
        )
        visualization.save(curves, self.folder / "training_curves.png")
        state = {
            "model": model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "history": self.history,
        }
        with atomic_path(self.folder / "resume.pt") as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        """Continue from the last finished epoch of this folder, if there is one."""
        path = self.folder / "resume.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}); delete it to train this run anew: best/ and last/ stay"
            ) from error
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = state["history"]


def _schedule(config: Recipe, optimizer, steps: int):
    if config.schedule == "constant":
        return None
    total = config.epochs * steps
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=total)


def load_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The settings from a YAML (`--config`), overridden by the other arguments of the command line."""
    return read_settings(TrainConfig, "python train.py", sys.argv[1:] if arguments is None else arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one model and print its history."""
    folder = train(load_config(arguments))
    history = pd.read_csv(folder / "history.csv")
    best = history.loc[history["validation_iou"].idxmax()]
    print(history.round(4).to_string(index=False))
    print(f"best epoch {int(best['epoch'])}: validation IoU {best['validation_iou']:.4f}; checkpoints in {folder}")


if __name__ == "__main__":
    with sentences_instead_of_tracebacks():
        main()
