"""Are a network's explanations faithful, and what changes when the object is covered? Tables of one network.

Deletion and insertion curves of every variant beside those of random maps, rank correlations as the weights turn
random, and scores and maps with the object covered, and with as much covered elsewhere. Made once and kept, by the way
that was asked. Which methods fail by these numbers is said in `explanation_verdicts`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from answers import decided, pixel_logits
from explanations.checks import cover_check, curves, random_maps, randomization
from explanations.covering import boxes, covered
from explanations.targets import Target, device_of, quiet
from studies.explained_images import Chosen, Images, own_classes, true_masks
from studies.explaining import CANNOT, Made, explainer_of, reason
from studies.explanation_ways import Way
from studies.subjects import CLASSIFICATION, Subject
from utils import write_table, write_text

RANDOM = "random maps"
STEPS = tuple(step / 10 for step in range(11))
OBJECT, ELSEWHERE = "object", "elsewhere"  # what is covered


@dataclass(frozen=True)
class Checks:
    """How the checks are made.

    images : that the curves are drawn for; few : that are explained again (randomised weights, covered objects);
    cells : a side, whole cells of a grid being removed, so that methods of other grain compare; levels : of
    randomisation; cover : what is covered: 'mask', 'box' (of the mask), 'centre' (a centred box of half the side, for
    photographs without masks); again : whether this network is explained again at all
    """

    images: int
    few: int
    cells: int
    levels: int
    cover: str
    again: bool = True

    def passes(self, way: Way) -> tuple[int, int]:
        """(forward, backward) through the network that the checks of one way take, of all images together."""
        drawn = min(self.images, way.images) * len(way.variants) * 2 * len(STEPS)
        times = self.few * len(way.variants) * (self.levels + 2) if self.again else 0
        forward, backward = way.passes
        return drawn + times * forward, times * backward


@dataclass(frozen=True)
class Asked:
    """One network and what it is asked about: target_of makes its target for some of the images."""

    subject: Subject
    model: nn.Module
    images: Images
    chosen: Chosen
    target_of: Callable[[Images], Target]
    label: int | None
    batch: int
    seed: int


def check_way(asked: Asked, way: Way, made: Made, checks: Checks) -> dict[str, pd.DataFrame]:
    """curves, and where it is explained again randomization and cover; a row with its `reason` where one cannot be."""
    part = asked.images.first(min(checks.images, len(made.ids)))
    target = asked.target_of(part)
    frames = [
        _curve(asked, part, maps[: len(part.ids)], target, checks).assign(variant=variant)
        for variant, maps in made.maps.items()
    ]
    found = {"curves": pd.concat(frames, ignore_index=True)}
    if checks.again:
        few = asked.images.first(min(checks.few, len(made.ids)))
        found["randomization"] = _randomization(asked, few, way, made, checks)
        found["cover"] = _cover(asked, few, way, made, checks)
    return found


def random_curves(asked: Asked, checks: Checks) -> dict[str, pd.DataFrame]:
    """The curves of maps that know nothing, one draw an image."""
    part = asked.images.first(checks.images)
    size = part.pixels.shape[-1]
    nothing = random_maps(len(part.ids), size, size, cells=checks.cells, seed=asked.seed)
    return {"curves": _curve(asked, part, nothing, asked.target_of(part), checks).assign(variant=RANDOM)}


def _curve(asked: Asked, images: Images, maps: Tensor, target: Target, checks: Checks) -> pd.DataFrame:
    given = {"cells": checks.cells, "fractions": STEPS, "ids": images.ids, "batch": asked.batch, "seed": asked.seed}
    return curves(asked.model, images.pixels, maps, target, **given)


def _explainer(asked: Asked, images: Images, way: Way, variant: str, made: Made, target: Target) -> Callable:
    """As `explainer_of`, with the kept maps for the network and images as they are."""
    make = explainer_of(way, variant, images.pixels, target, batch=asked.batch, seed=asked.seed)
    rows = {name: row for row, name in enumerate(made.ids)}
    own = made.maps[variant][[rows[name] for name in images.ids]]

    def of(model: nn.Module, pixels: Tensor) -> Tensor:
        return own if model is asked.model and pixels is images.pixels else make(model, pixels)

    return of


def _randomization(asked: Asked, images: Images, way: Way, made: Made, checks: Checks) -> pd.DataFrame:
    target, frames = asked.target_of(images), []
    for variant in made.maps:
        explainer = _explainer(asked, images, way, variant, made, target)
        settings = {"levels": checks.levels, "seed": asked.seed, "ids": images.ids}
        try:
            found = randomization(asked.model, images.pixels, explainer, **settings)
        except CANNOT as error:
            found = pd.DataFrame([{"reason": reason(error)}])
        frames.append(found.assign(variant=variant))
    return pd.concat(frames, ignore_index=True)


# -------------------------------------------------------------------------------------------------------------- covered


def _cover(asked: Asked, few: Images, way: Way, made: Made, checks: Checks) -> pd.DataFrame:
    """Rows of `cover_check` with answers before and after, for the object and for as much elsewhere (`which`)."""
    frames = []
    for which in (OBJECT, ELSEWHERE):
        hidden, words = region(few, checks.cover, which, asked.label)
        rows = [row for row, mask in enumerate(hidden[:, 0]) if mask.any() and not mask.all()]
        if not rows:
            why = {"reason": "all of every image is covered", "which": which}
            frames.append(pd.DataFrame([{"variant": variant} | why for variant in made.maps]))
            continue
        images, hidden = few.at_rows(rows), hidden[rows]
        answers = _answers(asked, images, hidden)
        target = asked.target_of(images)
        for variant in made.maps:
            explainer = _explainer(asked, images, way, variant, made, target)
            try:
                found = cover_check(
                    asked.model, images.pixels, hidden, target, explainer, ids=images.ids, batch=asked.batch
                ).merge(answers, on="id")
            except CANNOT as error:
                found = pd.DataFrame([{"reason": reason(error)}])
            frames.append(found.assign(variant=variant, which=which, covered=words))
    return pd.concat(frames, ignore_index=True)


def region(images: Images, cover: str, which: str, label: int | None) -> tuple[Tensor, str]:
    """(what is covered (N, 1, H, W) bool, in words); 'elsewhere' is the same moved by half the image, wrapped."""
    size = images.pixels.shape[-1]
    if cover == "centre":
        inside = (torch.arange(size) >= size // 4) & (torch.arange(size) < size - size // 4)
        hidden = (inside[:, None] & inside).expand(len(images.ids), 1, size, size)
        words = "a centred box of half the side (nobody outlined the objects)"
    else:
        hidden = true_masks(images, label)
        hidden = boxes(hidden[:, 0])[:, None] if cover == "box" else hidden
        words = {"mask": "the object's mask", "box": "the box around its mask"}[cover]
    return (hidden, words) if which == OBJECT else (hidden.roll((size // 2, size // 2), (2, 3)), words)


def _answers(asked: Asked, images: Images, hidden: Tensor) -> pd.DataFrame:
    """Per image, before and after: is the class right (0, 1), or what share of the object is outlined."""
    without, _ = covered(images.pixels, hidden)
    before, after = (_right(asked, images, pixels) for pixels in (images.pixels, without))
    return pd.DataFrame({"id": images.ids, "answer": before, "answer_covered": after})


def _right(asked: Asked, images: Images, pixels: Tensor) -> np.ndarray:
    model, shares = asked.model, []
    with quiet(model), torch.no_grad():
        for part in pixels.to(device_of(model)).split(asked.batch):
            seen = model(part).argmax(1) if asked.subject.kind == CLASSIFICATION else decided(pixel_logits(model, part))
            shares.append(seen.cpu())
    seen = torch.cat(shares)
    if asked.subject.kind == CLASSIFICATION:
        return (seen == own_classes(asked.subject, images, asked.chosen)).double().numpy()
    inside = true_masks(images, asked.label)
    found = (seen == (1 if asked.label is None else asked.label)) & inside
    return (found.sum((1, 2, 3)) / inside.sum((1, 2, 3))).double().numpy()


# ---------------------------------------------------------------------------------------------------------------- files


def keep(folder: Path, tables: Mapping[str, pd.DataFrame], expected: str) -> None:
    """A CSV each; the key last, and an old one gone before."""
    (folder / "checks.json").unlink(missing_ok=True)
    for name, table in tables.items():
        write_table(table, folder / f"{name}.csv")
    write_text(folder / "checks.json", json.dumps({"key": expected, "tables": list(tables)}) + "\n")


def known(folder: Path, expected: str) -> dict[str, pd.DataFrame] | None:
    """The tables that are kept, if they are of this key."""
    try:
        about = json.loads((folder / "checks.json").read_text(encoding="utf-8"))
        if about["key"] != expected:
            return None
        return {name: pd.read_csv(folder / f"{name}.csv", dtype={"id": str}) for name in about["tables"]}
    except (OSError, ValueError, KeyError):  # not there, or cut short
        return None
