"""What one cell of a grid computes: a training, then its network's scores on every image set that is asked for.

Files of a cell's folder: `run/` (the training), and for each image set NAME.csv (one row an image) and
NAME-confusion.csv (pixels by true and predicted class, an image at a time). Which cells there are, and what the scores
of all of them say, is the business of `grid_study` and `grid_tables`.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import yaml
from torch import nn

from class_metrics import confusion_table, image_confusions
from dataset import SegmentationDataset, cap, make_loader
from inference import image_scores, predict
from models import decided, encoder_name, load_model
from recipes import TrainConfig, for_overfit
from sources import CHOICE_OF_IMAGES, ImageSource, check_source, open_datasets
from studies.cells import Cell, merged, text_of
from train import train
from utils import HOME, InputError, progress, resolve_device, write_table, write_text

TRAINED_ON, VALIDATION = "train", "validation"  # image sets that networks are scored on, too, without augmentation


def job_of(config, cell: Cell, folder: Path) -> TrainConfig:
    """The training of a cell: the study's settings with the cell's changes.

    A cell on a fraction draws it by its own seed, and with `same_steps` sees its images so much oftener. Where it asks
    for ImageNet weights and `pretrained` has a file of them, the file is taken. Braces in weights: `named_weights`.
    """
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    job = TrainConfig(**merged({name: getattr(config, name) for name in names}, cell.changes))
    check_source(job)
    if job.overfit:
        job = for_overfit(job)
    if job.fraction < 1:
        job.fraction_seed = job.seed
        if config.same_steps:
            job.repeats = max(1, round(1 / job.fraction))
    if job.weights == "imagenet":
        for key, value in config.pretrained.get(encoder_name(job.spec), {}).items():
            setattr(job, key, value)
    job.weights = named_weights(job.weights, cell)
    job.out = str(folder / "run")
    return job


def named_weights(weights: str, cell: Cell) -> str:
    """'…/{body}--seed-{seed}' with a cell's own labels: weights that depend on more than one axis."""
    try:
        return weights.format(**{axis: text_of(label) for axis, label in cell.labels.items()})
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"weights {weights!r}: braces hold the name of an axis ({', '.join(cell.labels)}), not {error}"
        ) from error


def work(cell: Cell, folder: Path, config) -> None:
    """Train the cell's network and score it; what is already there is not computed again."""
    job = job_of(config, cell, folder)
    if config.processes > 1:
        train_in_processes(job, config.processes, folder)
    else:
        train(job)
    if not job.overfit:
        score_all(job, folder, config)


def score_all(job: TrainConfig, folder: Path, config) -> None:
    """Score a cell's network on the image sets on which it was not scored before."""
    names = ["test", VALIDATION, TRAINED_ON, *config.transfer]
    if all((folder / f"{name}.csv").exists() for name in names):
        return
    model, _ = load_model(Path(job.out) / "best")
    model.to(resolve_device(job.device))
    for name, images in image_sets(job, config.transfer, config.scored_train).items():
        score_into(folder, name, model, images, job.batch_size)


def train_in_processes(job: TrainConfig, number: int, folder: Path) -> None:
    """The cell's training by `accelerate launch`: on so many GPUs, or processes of a CPU; its words go to train.log."""
    settings, log = folder / "job.yaml", folder / "train.log"
    write_text(settings, yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(job))), sort_keys=False))
    on_cpu = ["--cpu"] if resolve_device(job.device).type == "cpu" else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(number), *on_cpu]
    with open(log, "a", encoding="utf-8") as words:
        done = subprocess.run(
            [*command, str(HOME / "train.py"), "--config", str(settings)], stdout=words, stderr=words, check=False
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise InputError(
            f"training in {number} processes ended with code {done.returncode}: {' '.join(last)}; see {log}"
        )


def image_sets(job: TrainConfig, transfer: Mapping[str, Mapping], most: int) -> dict[str, SegmentationDataset]:
    """{name: images as they are}: the training's own (some of those it was trained on), and other data sets'."""
    opened = open_datasets(job, seed=job.seed)
    known = cap(opened["train"].pairs, most)
    found = {"test": opened["test"], VALIDATION: opened["validation"]}
    found |= {TRAINED_ON: SegmentationDataset(known, job.transform.unaugmented)}
    for name, settings in transfer.items():
        found[name] = open_datasets(other_source(job, name, settings), needed=("test",))["test"]
    return found


def other_source(job: TrainConfig, name: str, settings: Mapping) -> ImageSource:
    """The images of a transfer: other data, seen by the model at its own size."""
    if name in ("test", TRAINED_ON, VALIDATION):
        raise InputError(f"transfer: {name!r} is one of the run's own image sets; choose another name")
    kept = {field.name: getattr(job, field.name) for field in dataclasses.fields(ImageSource)}
    kept = {key: value for key, value in kept.items() if key not in CHOICE_OF_IMAGES}
    source = ImageSource(**(kept | {"data": job.data} | dict(settings)))
    if source.num_classes != job.num_classes:
        raise InputError(
            f"transfer {name!r} has {source.num_classes} classes and the training {job.num_classes}; say with classes "
            "and mask_values which of its values mean which class"
        )
    if job.num_classes > 2 and source.class_names != job.class_names:
        raise InputError(
            f"transfer {name!r} has the classes {', '.join(source.class_names)}, the training "
            f"{', '.join(job.class_names)}; give the transfer the training's classes, with mask_values that mean them"
        )
    return source


def score_into(folder: Path, name: str, model: nn.Module, images: SegmentationDataset, batch_size: int) -> None:
    """NAME.csv and NAME-confusion.csv of one image set, in one pass over it."""
    path = folder / f"{name}.csv"
    if path.exists():
        return
    scores, matrices = [], []
    for batch in progress(make_loader(images, batch_size), desc=f"scoring {name}", unit="batch"):
        logits = predict(model, batch.image)
        scores.append(pd.DataFrame({"id": batch.id} | image_scores(logits, batch.mask)))
        counts = image_confusions(decided(logits), batch.mask.long(), max(2, logits.shape[1]))
        matrices.append(confusion_table(batch.id, counts))
    write_table(pd.concat(matrices, ignore_index=True), folder / f"{name}-confusion.csv")
    write_table(pd.concat(scores, ignore_index=True), path)  # last: it says that both are there
