"""Are a network's explanations faithful, and what changes when the object is covered? Tables of one network.

Deletion and insertion curves of every variant beside those of random maps, rank correlations as the weights turn
random, and scores and maps with the object covered; made once and kept. Which methods fail by these numbers is said by
`verdicts`, from the tables of all networks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import wilcoxon
from torch import Tensor, nn

from answers import decided, pixel_logits
from explanations.checks import cover_check, curves, random_maps, randomization
from explanations.covering import covered
from explanations.targets import Target, device_of, quiet
from studies.explained_images import Chosen, Images, own_classes, true_masks
from studies.explaining import CANNOT, Made, Way, explainer_of, reason
from studies.subjects import CLASSIFICATION, Subject
from utils import InputError, write_table, write_text

RANDOM = "random maps"
STEPS = tuple(step / 10 for step in range(11))
TABLES = ("curves", "randomization", "cover")
UNCHANGED = 0.5  # rank correlation of maps with those of the network at random weights
ALPHA = 0.05


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


def check(
    subject: Subject,
    model: nn.Module,
    images: Images,
    chosen: Chosen,
    target_of: Callable[[Images], Target],
    made: Mapping[str, tuple[Way, Made]],
    checks: Checks,
    *,
    label: int | None,
    batch: int,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """The tables of one network; made : {variant: (its way, its maps)}."""
    found = {"curves": _curves(model, images, target_of, made, checks, batch, seed)}
    if not checks.again:
        return found
    few = images.first(checks.few)
    target = target_of(few)
    again = (subject, model, few, target, checks, batch, seed)
    found["randomization"] = _randomization(*again, made)
    few = few.at_rows(_coverable(few, checks.cover, label))
    if few.ids:
        masks, words = cover_of(few, checks.cover, label)
        again = (subject, model, few, target_of(few), checks, batch, seed)
        found["cover"] = _cover(*again, made, masks, words, _right_of(subject, few, chosen, label))
    return found


def _coverable(images: Images, cover: str, label: int | None) -> list[int]:
    """Rows of the images in which something is left outside of what is covered; else there is no colour to cover by."""
    masks, _ = cover_of(images, cover, label)
    rows = []
    for row in range(len(images.ids)):
        try:
            covered(images.pixels[row : row + 1], masks[row : row + 1], box=cover == "box")
        except InputError:
            continue
        rows.append(row)
    return rows


def _curves(model, images: Images, target_of, made: Mapping, checks: Checks, batch: int, seed: int) -> pd.DataFrame:
    frames = []
    size = images.pixels.shape[-1]
    for variant, (_, kept) in made.items():
        part = images.first(min(checks.images, len(kept.ids)))
        maps = kept.maps[variant][: len(part.ids)]
        frames.append(_curve(model, part, maps, target_of(part), checks, batch, seed).assign(variant=variant))
    part = images.first(checks.images)
    nothing = random_maps(len(part.ids), size, size, cells=checks.cells, seed=seed)
    frames.append(_curve(model, part, nothing, target_of(part), checks, batch, seed).assign(variant=RANDOM))
    return pd.concat(frames, ignore_index=True)


def _curve(model, images: Images, maps: Tensor, target: Target, checks: Checks, batch: int, seed: int) -> pd.DataFrame:
    given = {"cells": checks.cells, "fractions": STEPS, "ids": images.ids, "batch": batch, "seed": seed}
    return curves(model, images.pixels, maps, target, **given)


def _randomization(subject, model, images: Images, target, checks: Checks, batch, seed, made: Mapping) -> pd.DataFrame:
    frames = []
    for variant, (way, _) in made.items():
        explainer = explainer_of(way, variant, subject.image_size, target, batch=batch, seed=seed)
        try:
            found = randomization(model, images.pixels, explainer, levels=checks.levels, seed=seed, ids=images.ids)
        except CANNOT as error:
            found = pd.DataFrame([{"reason": reason(error)}])
        frames.append(found.assign(variant=variant))
    return pd.concat(frames, ignore_index=True)


def _cover(
    subject, model, images: Images, target, checks: Checks, batch, seed, made: Mapping, masks: Tensor, words: str, right
) -> pd.DataFrame:
    frames = []
    for variant, (way, _) in made.items():
        explainer = explainer_of(way, variant, subject.image_size, target, batch=batch, seed=seed)
        try:
            found = cover_check(
                model, images.pixels, masks, target, explainer, box=checks.cover == "box", ids=images.ids, batch=batch
            )
        except CANNOT as error:
            found = pd.DataFrame([{"reason": reason(error)}])
        frames.append(found.assign(variant=variant))
    without, _ = covered(images.pixels, masks, box=checks.cover == "box")
    answers = {"answer": right(model, images.pixels), "answer_covered": right(model, without)}
    table = pd.concat(frames, ignore_index=True).assign(covered=words)
    if "id" not in table:  # refused for every variant
        return table
    return table.merge(pd.DataFrame({"id": images.ids} | answers), on="id", how="left")


def cover_of(images: Images, cover: str, label: int | None) -> tuple[Tensor, str]:
    """(what is covered (N, 1, H, W), in words)."""
    if cover != "centre":
        return true_masks(images, label), {"mask": "the object's mask", "box": "the box around its mask"}[cover]
    size = images.pixels.shape[-1]
    inside = (torch.arange(size) >= size // 4) & (torch.arange(size) < size - size // 4)
    box = (inside[:, None] & inside).expand(len(images.ids), 1, size, size)
    return box, "a centred box of half the side (nobody outlined the objects)"


def _right_of(subject: Subject, images: Images, chosen: Chosen, label: int | None) -> Callable:
    """(model, pixels) -> (N,): is the class right (0, 1), or what share of the object is outlined."""

    def right(model: nn.Module, pixels: Tensor) -> np.ndarray:
        with quiet(model), torch.no_grad():
            pixels = pixels.to(device_of(model))
            if subject.kind == CLASSIFICATION:
                return (model(pixels).argmax(1).cpu() == own_classes(model, images, chosen)).double().numpy()
            seen = decided(pixel_logits(model, pixels)).cpu() == (1 if label is None else label)
        inside = true_masks(images, label)
        return ((seen & inside).sum((1, 2, 3)) / inside.sum((1, 2, 3))).double().numpy()

    return right


# --------------------------------------------------------------------------------------------------------------- files


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


# ------------------------------------------------------------------------------------------------------------ verdicts


def verdicts(tables: Mapping[str, Mapping[str, pd.DataFrame]], labels: Mapping[str, str]) -> pd.DataFrame:
    """One row a network and variant: does it beat random maps, and does it change with the weights?

    tables : network -> tables of `check`; labels : network -> its label: networks that were not explained again share
    the randomisation check of their label's first seed
    n, deletion, insertion : images; mean area under the curves as a share of the way from the baseline's to the
        image's score (ratio of means)
    advantage : insertion less deletion, less the same of random maps, in those shares; p : one-sided Wilcoxon
        signed-rank test over images that it is above 0
    randomized : mean rank correlation of the maps with those at fully random weights
    failed : 'no better than random maps' where p ≥ 0.05; 'survives random weights' where that correlation is 0.5 or
        more; '' where neither
    """
    changed = {labels[name]: found["randomization"] for name, found in tables.items() if "randomization" in found}
    rows = []
    for name, found in tables.items():
        last = _at_last_level(changed.get(labels[name]))
        rows += [{"network": name, **row} | last(row["variant"]) for row in _against_random(found["curves"])]
    table = pd.DataFrame(rows)
    reasons = [
        "; ".join(
            text
            for text, holds in (
                ("no better than random maps", not row.p < ALPHA),
                ("survives random weights", row.randomized >= UNCHANGED),
            )
            if holds
        )
        for row in table.itertuples()
    ]
    return table.assign(failed=reasons)


def areas_of(table: pd.DataFrame) -> pd.DataFrame:
    """Rows (variant, id): deletion, insertion (mean score along the curve), empty, full (score of baseline, image)."""
    rows = []
    for (variant, image), part in table.groupby(["variant", "id"], sort=False):
        row = {"variant": variant, "id": image}
        for curve, points in part.groupby("curve", sort=False):
            points = points.sort_values("fraction")
            row[curve] = np.trapezoid(points["score"], points["fraction"])
            if curve == "deletion":
                row |= {"full": points["score"].iloc[0], "empty": points["score"].iloc[-1]}
        rows.append(row)
    return pd.DataFrame(rows)


def _against_random(table: pd.DataFrame) -> Iterator[dict]:
    areas = areas_of(table).set_index(["variant", "id"])
    nothing = areas.loc[RANDOM]
    for variant in dict.fromkeys(table["variant"]):
        if variant == RANDOM:
            continue
        own = areas.loc[variant]
        of_random = nothing.loc[own.index]
        change = (own["full"] - own["empty"]).mean()
        better = (own["insertion"] - own["deletion"]) - (of_random["insertion"] - of_random["deletion"])
        row = {"variant": variant, "n": len(own)}
        row |= {name: (own[name] - own["empty"]).mean() / change for name in ("deletion", "insertion")}
        p = float(wilcoxon(better, alternative="greater").pvalue) if better.any() else 1.0
        yield row | {"advantage": better.mean() / change, "p": p}


def _at_last_level(table: pd.DataFrame | None) -> Callable[[str], dict]:
    def of(variant: str) -> dict:
        if table is None or "level" not in table:
            return {"randomized": np.nan}
        part = table[(table["variant"] == variant) & (table["level"] == table["level"].max())]
        return {"randomized": part["rank_correlation"].mean()}

    return of


def normalised(table: pd.DataFrame) -> pd.DataFrame:
    """Columns curve, fraction, score: of one network and variant; means over images, from 0 (baseline) to 1 (image)."""
    means = table.groupby(["curve", "fraction"], sort=False)["score"].mean()
    empty, full = means["deletion", 1.0], means["deletion", 0.0]
    return ((means - empty) / (full - empty)).reset_index()


def over_networks(tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> pd.DataFrame:
    """For the figure: kind, label (variant), fraction, score (mean over networks), low, high (their middle 90 %)."""
    frames = [
        normalised(part).assign(label=variant)
        for found in tables.values()
        for variant, part in found["curves"].groupby("variant", sort=False)
    ]
    grouped = pd.concat(frames).groupby(["curve", "label", "fraction"], sort=False)["score"]
    table = pd.DataFrame({"score": grouped.mean(), "low": grouped.quantile(0.05), "high": grouped.quantile(0.95)})
    return table.reset_index().rename(columns={"curve": "kind"})
