"""Results folders made by hand for the tests of the explanation study: of a grid, of universality, of classifiers."""

import dataclasses
import json

import pandas as pd
import yaml

from classification.classifiers import ClassifierSpec, build_classifier, save_classifier
from classification.photos import SHAPES
from model_spec import ModelSpec
from models import build_model, save_model
from recipes import TrainConfig
from studies.cells import cells_of
from utils import write_text

RESNET = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 8}
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL = {"preset": "smoke", "image_size": 32, "epochs": 2, "synthetic_size": 64}
SMALL |= {"synthetic_images": {"Training": 4, "Validation": 2, "Test": 10}}


def run_of(folder, settings, weights=False):
    """A training's folder: its config and its best checkpoint, with weights where they are asked for."""
    config = TrainConfig(**SMALL | settings, out=str(folder), device="cpu")
    write_text(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config)))
    spec = ModelSpec(config.model, config.preset, options=config.options)
    if weights:
        save_model(build_model(spec, config.seed), folder / "best")
    else:
        write_text(folder / "best" / "model.json", json.dumps({"spec": dataclasses.asdict(spec)}))
    return folder


def grid_of(folder, axes, unfinished=(), weights=False, **settings):
    """A grid's folder; cells whose name is among `unfinished` have a checkpoint and no end."""
    base = SMALL | settings | {"data": "synthetic", "axes": axes, "skip": []}
    write_text(folder / "config.yaml", yaml.safe_dump(base, sort_keys=False))
    for cell in cells_of(axes):
        run_of(folder / "cells" / cell.name / "run", {**settings, **cell.changes}, weights)
        if cell.name not in unfinished:
            write_text(folder / "cells" / cell.name / "finished.json", "{}")
    return folder


def universality_of(folder, epochs):
    """epochs : name of a network -> (its model, how many of its two epochs are done)."""
    for seed, (name, (model, done)) in enumerate(epochs.items()):
        run = run_of(folder / "models" / name, {"model": model, "seed": seed})
        pd.DataFrame({"validation_iou": [0.1] * done}).to_csv(run / "history.csv", index=False)
    return folder


def classifiers_of(folder, networks, seeds=(0,), size=32, settings=None, unfinished=()):
    """networks : label -> (name of timm, options, family); untrained, each seed its own weights."""
    classes = len(SHAPES)
    for label, (name, options, family) in networks.items():
        for seed in seeds:
            model = build_classifier(ClassifierSpec(name, options, classes=classes, image_size=size), seed)
            extra = {"label": label, "family": family, "seed": seed}
            place = folder / "networks" / f"{label}--seed-{seed}"
            save_classifier(place, model, extra)
            if place.name not in unfinished:
                write_text(place / "finished.json", "{}")
    write_text(folder / "data.json", json.dumps({"train": {"classes": list(SHAPES)}}))
    write_text(folder / "config.yaml", yaml.safe_dump(settings or {"data": "synthetic"}))
    return folder
