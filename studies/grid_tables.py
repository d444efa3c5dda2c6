"""The numbers of a grid: from its finished cells' files to tables of scores, differences, costs and learning curves.

A group is all cells that differ in their seed alone. Scores are given with intervals over seeds and images, differences
between groups on the same seeds and images. Nothing is trained or scored here but the costs, which are measured once a
group, one after another, so that nothing else of ours runs beside the clock.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from class_metrics import confusions_of, mean_class_accuracy, mean_iou
from costs import measure
from similarity import intervals
from similarity.nulls import benjamini_hochberg
from studies.cells import Cell, text_of
from studies.grid import FINISHED
from utils import progress, resolve_device, write_text

SEED, FRACTION = "seed", "fraction"  # a cell of a report has both among its changes
RESAMPLES = 1000
POOLED = {"miou": mean_iou, "class_accuracy": mean_class_accuracy}  # scores of a network's pooled confusion matrix
PAIRED_COLUMNS = ("label_a", "label_b", "fraction", "seeds", "n", "difference", "low", "high", "p_value")
Group = tuple[str, float]  # (label, fraction of the training images)


@dataclass(frozen=True)
class Scored:
    """One network on one image set: iou, a Series by image id, and confusions, pixels (images, C, C)."""

    iou: pd.Series
    confusions: np.ndarray


Scores = Mapping[str, Mapping[str, Scored]]  # cell's name -> image set, test first -> what was scored


def label_of(cell: Cell) -> str:
    """What a cell's network is, apart from its seed and the share of the images: its other labels, joined."""
    return " · ".join(text_of(value) for axis, value in cell.labels.items() if axis not in (SEED, FRACTION)) or "run"


def group_of(cell: Cell) -> Group:
    return label_of(cell), float(cell.changes[FRACTION])


def finished(cells: Iterable[Cell], folder: Path) -> list[Cell]:
    """The cells whose files are whole."""
    return [cell for cell in cells if (folder / cell.name / FINISHED).exists()]


def by_group(cells: Iterable[Cell]) -> dict[Group, list[Cell]]:
    """{(label, fraction): its cells}, in the grid's order."""
    groups: dict[Group, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(group_of(cell), []).append(cell)
    return groups


def read_scores(cells: Iterable[Cell], folder: Path) -> Scores:
    """All that the cells' networks scored, each file read once."""
    return {
        cell.name: {images: scored_in(folder / cell.name, images) for images in image_sets_of(folder / cell.name)}
        for cell in cells
    }


def image_sets_of(cell_folder: Path) -> list[str]:
    """Names of the image sets that a cell was scored on: test first, then by name."""
    names = {path.name.removesuffix("-confusion.csv") for path in cell_folder.glob("*-confusion.csv")}
    return sorted(names, key=lambda name: (name != "test", name))


def scored_in(cell_folder: Path, images: str) -> Scored:
    """What a cell's files hold of an image set."""
    table = pd.read_csv(cell_folder / f"{images}.csv", dtype={"id": str}).set_index("id")
    _, confusions = confusions_of(pd.read_csv(cell_folder / f"{images}-confusion.csv", dtype={"id": str}))
    return Scored(table["iou"], confusions)


def run_table(cells: Sequence[Cell], scores: Scores, folder: Path, target: float) -> pd.DataFrame:
    """One row a cell: label, fraction, seed, its scores on each of its image sets, and how its training went.

    epochs_to_target: the first epoch with a validation IoU of `target`, NaN where none has; seconds: of the training.
    """
    rows = []
    for cell in cells:
        history = pd.read_csv(folder / cell.name / "run" / "history.csv")
        label, fraction = group_of(cell)
        row = {"label": label, "fraction": fraction, "seed": seed_of(cell)}
        for images, scored in scores[cell.name].items():
            matrix = scored.confusions.sum(0)
            row |= {f"{images}_iou": scored.iou.mean()}
            row |= {f"{images}_{name}": statistic(matrix) for name, statistic in POOLED.items()}
        reached = history.loc[history["validation_iou"] >= target, "epoch"]
        row |= {"best_validation_iou": history["validation_iou"].max(), "epochs": len(history)}
        row |= {"epochs_to_target": reached.min() if len(reached) else np.nan, "seconds": history["seconds"].sum()}
        rows.append(row)
    return pd.DataFrame(rows)


def seed_of(cell: Cell) -> int:
    return int(cell.changes[SEED])


def image_scores(cells: Sequence[Cell], scores: Scores, images: str = "test") -> pd.DataFrame:
    """Per-image IoU of one group: a row a seed, a column an image; NaN where a seed was not scored on an image."""
    return pd.DataFrame({seed_of(cell): scores[cell.name][images].iou for cell in cells}).T.sort_index()


def pooled_confusions(cells: Sequence[Cell], scores: Scores, images: str = "test") -> np.ndarray:
    """(C, C) pixels of one group: of all its images, summed over its seeds."""
    return sum(scores[cell.name][images].confusions.sum(0) for cell in cells)


def mean_with_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, images): the mean over seeds of each one's mean over images.

    The variance over images (of the mean over seeds) and, from three seeds on, that over seeds add; the interval is
    Student's with Satterthwaite's degrees of freedom (`similarity.intervals`). With fewer seeds it speaks of these
    networks only. No interval where the seeds saw other images, or fewer than two.
    """
    each = np.nanmean(values, axis=1)
    if np.isnan(values).any() or values.shape[1] < 2:
        return float(each.mean()), np.nan, np.nan
    image_se = values.mean(0).std(ddof=1) / np.sqrt(values.shape[1])
    return float(each.mean()), *_interval(each, image_se, level)


def _interval(each: np.ndarray, image_se: float, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of the mean of one value a seed, given its standard error over images."""
    count = len(each)
    variances = [each.var(ddof=1) / count] if count > 2 else []
    se, df = intervals.combine(image_se, variances, [count] * len(variances))
    low, high = intervals.interval(each.mean(), se, df=df, level=level)
    return float(low), float(high)


def pooled_with_interval(
    matrices: Sequence[np.ndarray], statistic: Callable[[np.ndarray], float], seed: int = 0
) -> tuple[np.ndarray, float, float]:
    """(each seed's, low, high) of a statistic of the pooled confusion matrix; the interval is of their mean, as above.

    matrices : one (images, C, C) a seed. The standard error over images is a bootstrap's (`RESAMPLES` draws, the same
    images for all seeds); none where the seeds saw other numbers of images, or fewer than two.
    """
    each = np.array([statistic(matrix.sum(0)) for matrix in matrices])
    count = len(matrices[0])
    if count < 2 or any(len(matrix) != count for matrix in matrices):
        return each, np.nan, np.nan
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    drawn = np.zeros(RESAMPLES)
    for matrix in matrices:
        pooled = np.tensordot(times.astype(np.float64), matrix.astype(np.float64), 1)
        drawn += [statistic(one) / len(matrices) for one in pooled]
    return each, *_interval(each, drawn.std(ddof=1))


def score_table(groups: Mapping[Group, Sequence[Cell]], scores: Scores) -> pd.DataFrame:
    """One row a group and image set: iou, miou and class_accuracy, each with _low and _high (of iou low and high).

    iou is the mean over images of per-image values; miou and class_accuracy are of a seed's pooled pixels; all are
    means over seeds, with intervals as of `mean_with_interval`. seed_sd and miou_sd: standard deviations over seeds.
    """
    rows = []
    for (label, fraction), cells in groups.items():
        for images in scores[cells[0].name]:
            values = image_scores(cells, scores, images)
            mean, low, high = mean_with_interval(values.to_numpy())
            row = {"label": label, "fraction": fraction, "images": images, "seeds": len(values)}
            row |= {"n": int(values.notna().sum(axis=1).min()), "iou": mean, "low": low, "high": high}
            row["seed_sd"] = values.mean(axis=1).std(ddof=1)  # of one seed NaN
            matrices = [scores[cell.name][images].confusions for cell in cells]
            pooled = {name: pooled_with_interval(matrices, statistic) for name, statistic in POOLED.items()}
            for name, (each, low, high) in pooled.items():
                row |= {name: float(each.mean()), f"{name}_low": low, f"{name}_high": high}
            row["miou_sd"] = pd.Series(pooled["miou"][0]).std(ddof=1)
            rows.append(row)
    return pd.DataFrame(rows)


def paired_table(groups: Mapping[Group, Sequence[Cell]], scores: Scores) -> pd.DataFrame:
    """Every two labels at one fraction: the difference of their IoU on the same seeds and test images.

    low, high: as of `mean_with_interval`. p_value: Wilcoxon's signed-rank test over images of the mean over seeds
    (two-sided; of these networks, seeds are not drawn anew); q_value: Benjamini-Hochberg over the whole table.
    """
    rows = []
    for (a, b), fraction in itertools.product(
        itertools.combinations(dict.fromkeys(label for label, _ in groups), 2),
        dict.fromkeys(fraction for _, fraction in groups),
    ):
        if (a, fraction) not in groups or (b, fraction) not in groups:
            continue
        one, other = (image_scores(groups[label, fraction], scores) for label in (a, b))
        seeds = [seed for seed in one.index if seed in other.index]
        if not seeds:
            continue
        difference = (one.loc[seeds] - other.loc[seeds, one.columns]).to_numpy()
        mean, low, high = mean_with_interval(difference)
        row = {"label_a": a, "label_b": b, "fraction": fraction, "seeds": len(seeds), "n": difference.shape[1]}
        test = wilcoxon(np.nanmean(difference, axis=0), nan_policy="omit")
        rows.append(row | {"difference": mean, "low": low, "high": high, "p_value": float(test.pvalue)})
    table = pd.DataFrame(rows, columns=[*PAIRED_COLUMNS])
    return table.assign(q_value=benjamini_hochberg(table["p_value"]))


def histories(cells: Sequence[Cell], folder: Path) -> pd.DataFrame:
    """Learning curves of all cells: label, fraction, seed and the columns of history.csv."""
    tables = []
    for cell in cells:
        label, fraction = group_of(cell)
        known = {"label": label, "fraction": fraction, "seed": seed_of(cell)}
        tables.append(pd.read_csv(folder / cell.name / "run" / "history.csv").assign(**known))
    return pd.concat(tables, ignore_index=True)


def cost_table(
    groups: Mapping[Group, Sequence[Cell]], folder: Path, sizes: Mapping[str, int], device: str
) -> pd.DataFrame:
    """One row a label: `costs.measure` of the network of its first cell; measured once and kept beside that cell.

    sizes : cell's name -> side of its images, pixels
    """
    first: dict[str, Cell] = {}
    for (label, _), cells in groups.items():
        first.setdefault(label, cells[0])
    rows = []
    for label, cell in progress(first.items(), desc="costs", unit="model"):
        path = folder / cell.name / f"costs-{resolve_device(device).type}.json"
        if not path.exists():
            found = measure(folder / cell.name / "run" / "best", sizes[cell.name], device)
            write_text(path, json.dumps(found, indent=1) + "\n")
        rows.append({"label": label} | json.loads(path.read_text(encoding="utf-8")))
    return pd.DataFrame(rows)
