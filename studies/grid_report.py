"""The page of a grid study: its tables in words, with the figures that every grid has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import grid_figures
import pictures
import visualization
from class_metrics import confusion_table, from_confusion
from dataset import SegmentationDataset
from inference import image_scores, predict
from models import decided, load_model
from recipes import TrainConfig
from studies import grid_tables
from studies.cells import Cell
from utils import git_commit, markdown_table, write_table, write_text

SHOWN_IMAGES, SHOWN_NETWORKS = 4, 6  # in the picture of predictions
RANDOM = "random"
INTERVAL = "intervals: 95 %, over images and, from three seeds on, over seeds"


@dataclass(frozen=True)
class FinishedGrid:
    """A grid whose trainings are over: what its report is made from.

    config : the study's settings; cells : the finished ones, with seed and fraction among their changes
    jobs : cell's name -> its training; scores : see `grid_tables.read_scores`; test : the test images
    tables : runs, scores, paired, costs and history
    """

    config: Any
    cells: list[Cell]
    jobs: Mapping[str, TrainConfig]
    test: SegmentationDataset
    scores: grid_tables.Scores
    tables: Mapping[str, pd.DataFrame]

    @property
    def folder(self) -> Path:
        """Of the results."""
        return Path(self.config.out)

    def run(self, cell: Cell) -> Path:
        """The folder of a cell's training."""
        return Path(self.jobs[cell.name].out)

    def seen_by(self, cell: Cell) -> SegmentationDataset:
        """The test images as a cell's network sees them, at its own size."""
        own = self.jobs[cell.name].transform.unaugmented
        return self.test if own == self.test.transform.unaugmented else SegmentationDataset(self.test.pairs, own)


def share_words(fraction: float) -> str:
    """0.05 -> '5 %'."""
    return f"{100 * fraction:g} %"


def ranged(mean: float, low: float, high: float, digits: int = 3) -> str:
    """'0.812 (0.801 … 0.823)'."""
    return f"{mean:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def caption(grid: FinishedGrid) -> str:
    """What all figures of the study say of their numbers."""
    scores = grid.tables["scores"].query("images == 'test'")
    seeds = sorted(scores["seeds"].unique())
    some = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    return f"{scores['n'].iloc[0]} test images at {grid.config.image_size} px, {some}; {INTERVAL}."


def counted(number: int, what: str) -> str:
    """'1 seed', '3 seeds'."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def figures(grid: FinishedGrid) -> list[str]:
    """Draw what the tables allow; the names of the files that were written."""
    tables, config = grid.tables, grid.config
    scores = tables["scores"].query("images == 'test'").rename(columns={"seeds": "n_seeds"})
    full = scores[scores["fraction"] == scores["fraction"].max()]
    about = {"caption": caption(grid), "synthetic": config.is_synthetic}
    made = {}
    if scores["fraction"].nunique() > 1:
        made["data_curve"] = grid_figures.data_curve(scores, **about)
    known = full.merge(tables["costs"], on="label")
    made["costs"] = grid_figures.cost_scatter(known, **about)
    last = tables["history"].query("fraction == fraction.max()")
    made["loss_curves"] = grid_figures.loss_curves(
        last, **(about | {"caption": f"{counted(last['seed'].nunique(), 'seed')}."})
    )
    best = full.sort_values("iou")["label"].iloc[-1]
    matrix = pooled(grid, best)
    text = f"{best}, the best of these: pixels of {full['n'].iloc[0]} test images and all seeds together."
    names = list(config.class_names)
    made["confusion"] = grid_figures.confusion_matrix(matrix, names, **(about | {"caption": text}))
    for name, figure in made.items():
        visualization.save(figure, grid.folder / f"{name}.png")
    return list(made)


def first_predictions(grid: FinishedGrid) -> None:
    """predictions.png: the first test images, as the first seed of each of the first networks outlines them."""
    groups = grid_tables.by_group(grid.cells)
    share = max(fraction for _, fraction in groups)
    shown = {label: each[0] for (label, fraction), each in groups.items() if fraction == share}
    samples = [grid.test[index] for index in range(min(SHOWN_IMAGES, len(grid.test)))]
    images, masks = (torch.stack([getattr(sample, key) for sample in samples]) for key in ("image", "mask"))
    predictions, scores = {}, {}
    for label, cell in list(shown.items())[:SHOWN_NETWORKS]:
        logits = predict(load_model(grid.run(cell) / "best")[0], images)
        predictions[label] = decided(logits).numpy()
        scores[label] = image_scores(logits, masks)["iou"].tolist()
    figure = pictures.example_predictions(
        images.numpy(),
        masks.numpy(),
        predictions,
        [sample.id for sample in samples],
        scores,
        title="What does each outline?",
        caption=f"The first test images at {grid.config.image_size} px; one seed of each network.",
        synthetic=grid.config.is_synthetic,
    )
    visualization.save(figure, grid.folder / "predictions.png")


def pooled(grid: FinishedGrid, label: str) -> np.ndarray:
    """(C, C) pixels of all seeds and test images of a label at the largest share of the data."""
    groups = grid_tables.by_group(grid.cells)
    share = max(fraction for known, fraction in groups if known == label)
    return grid_tables.pooled_confusions(groups[label, share], grid.scores)


def confusions(grid: FinishedGrid) -> pd.DataFrame:
    """Per label and class: IoU, recall, precision, true pixels; also written as classes.csv and confusion.csv."""
    rows, matrices = [], []
    for label in dict.fromkeys(map(grid_tables.label_of, grid.cells)):
        matrix = pooled(grid, label)
        rows.append(from_confusion(matrix, grid.config.class_names).assign(label=label))
        matrices.append(confusion_table(["all"], matrix[None]).drop(columns="id").assign(label=label))
    table = pd.concat(rows, ignore_index=True)
    write_table(pd.concat(matrices, ignore_index=True), grid.folder / "confusion.csv")
    write_table(table, grid.folder / "classes.csv")
    return table


def starts_of(grid: FinishedGrid) -> dict[str, str]:
    """label -> what its encoder started from: the weights setting in a word, or the names of its file or files."""
    words = {"none": RANDOM, "imagenet": "ImageNet"}
    found: dict[str, list[str]] = {}
    for cell in grid.cells:
        start = grid.jobs[cell.name].weights
        found.setdefault(grid_tables.label_of(cell), []).append(words.get(start) or Path(start).name)
    return {label: ", ".join(dict.fromkeys(starts)) for label, starts in found.items()}


def write_page(grid: FinishedGrid, question: str, overview: pd.DataFrame, more: str) -> None:
    """summary.md of a grid study, with `more` of the study's own before the scores; overview : of all cells."""
    config, tables, starts = grid.config, grid.tables, starts_of(grid)
    drawn = figures(grid)
    if all(grid.jobs[cell.name].image_size == config.image_size for cell in grid.cells):
        first_predictions(grid)
        drawn += ["predictions"] if config.is_synthetic else []  # real photographs stay with who may have them
    classes = confusions(grid)
    start = " All networks start from random weights." if set(starts.values()) == {RANDOM} else ""
    data = "**Synthetic images** (embedded set)" if config.is_synthetic else f"Images of `{Path(config.data).name}`"
    done, whole = (overview["state"] == "finished").sum(), len(overview)
    notes = "" if done == whole else f"\n{whole - done} of {whole} cells are not finished:\n{unfinished(overview)}"
    pictures = "\n".join(f"![{name.replace('_', ' ')}]({name}.png)\n" for name in drawn)
    write_text(
        grid.folder / "summary.md",
        f"""# {question}

{data} at {config.image_size} px; {done} trainings.{start}
{notes}
{more}
## Scores
{score_words(tables["scores"], starts)}
IoU: mean over images of each image's own (of several classes, over those that it has). mIoU and class accuracy: of
pixels pooled over images, means over the classes {", ".join(config.class_names)}. All are means over seeds;
{INTERVAL}. Other image sets: IoU / mIoU.
{pictures}
## Classes
{class_words(classes)}
## Differences
{paired_words(tables["paired"])}
On the same seeds and test images at the same share of the data; q: Wilcoxon's signed-rank test over images,
Benjamini-Hochberg over the table (of these networks: other seeds could differ more, which the intervals include).

## Costs
{cost_words(tables["costs"])}
FLOPs of one image by PyTorch's counter (multiplications and additions both count; what it does not know counts 0);
medians of warm passes; memory: peak of 16 images. {tables["costs"]["device"].iloc[0]},
{tables["costs"]["threads"].iloc[0]} thread(s).

## Learning
{learning_words(tables["runs"], config.target)}
All numbers: `runs.csv` (a row a training), `scores.csv`, `paired.csv`, `costs.csv`, `history.csv`, `confusion.csv`,
`classes.csv`; settings in `config.yaml`, versions and machine in `environment.json`, hashes of the images in
`data.json`. Commit {git_commit()}.
""",
    )
    print(score_words(tables["scores"], starts))


def unfinished(overview: pd.DataFrame) -> str:
    """The cells that are not there, with what became of them."""
    rows = overview[overview["state"] != "finished"].itertuples()
    return "".join(f"- {row.name}: {row.state} {row.error.splitlines()[0] if row.error else ''}\n" for row in rows)


def score_words(scores: pd.DataFrame, starts: dict[str, str]) -> str:
    """Test, training, validation and transfer scores, a row a label and share of the data."""
    others = [name for name in dict.fromkeys(scores["images"]) if name != "test"]
    rows = []
    for (label, fraction), group in scores.groupby(["label", "fraction"], sort=False):
        by_set = group.set_index("images")
        test = by_set.loc["test"]
        row = [label, starts[label], share_words(fraction), test["seeds"]]
        row += [
            ranged(test["iou"], test["low"], test["high"]),
            "–" if np.isnan(test["seed_sd"]) else f"{test['seed_sd']:.3f}",
        ]
        row += [ranged(test["miou"], test["miou_low"], test["miou_high"]), f"{test['class_accuracy']:.3f}"]
        rows.append([*row, *(f"{by_set.loc[name, 'iou']:.3f} / {by_set.loc[name, 'miou']:.3f}" for name in others)])
    header = ["network", "start", "data", "seeds", "test IoU (95 %)", "sd over seeds", "mIoU (95 %)", "class accuracy"]
    return markdown_table([*header, *others], rows)


def class_words(classes: pd.DataFrame) -> str:
    """A row a label and class."""
    rows = [
        (r.label, r._asdict()["_1"], f"{r.iou:.3f}", f"{r.accuracy:.3f}", f"{r.precision:.3f}")
        for r in classes[["class", "iou", "accuracy", "precision", "label"]].itertuples()
    ]
    return markdown_table(["network", "class", "IoU", "accuracy (recall)", "precision"], rows)


def signed(row) -> str:
    """'+0.012 (-0.003 … +0.020)'."""
    return f"{row.difference:+.3f} ({row.low:+.3f} … {row.high:+.3f})"


def paired_words(paired: pd.DataFrame, most: int = 40) -> str:
    """A row a pair; the largest differences where there are many."""
    shown = paired.reindex(paired["difference"].abs().sort_values(ascending=False).index).head(most)
    rows = [(r.label_a, r.label_b, share_words(r.fraction), signed(r), f"{r.q_value:.2g}") for r in shown.itertuples()]
    text = markdown_table(["A", "B", "data", "IoU of A − B (95 %)", "q"], rows)
    return text if len(paired) <= most else f"{text}\nThe {most} largest of {len(paired)}; all are in `paired.csv`.\n"


def cost_words(costs: pd.DataFrame) -> str:
    """A row a label."""
    rows = [
        (
            r.label,
            f"{r.parameters / 1e6:.2f} M",
            f"{r.gflops:.2f}",
            f"{r.latency_ms_1:.1f}",
            f"{r.latency_ms_16:.1f}",
            f"{r.memory_mb:.0f}",
        )
        for r in costs.itertuples()
    ]
    header = ["network", "parameters", "GFLOPs", "ms an image, alone", "in a batch of 16", "memory, MB"]
    return markdown_table(header, rows)


def learning_words(runs: pd.DataFrame, target: float) -> str:
    """Epochs to the target and minutes of training, a row a label and share of the data."""
    rows = []
    for (label, fraction), group in runs.groupby(["label", "fraction"], sort=False):
        reached = group["epochs_to_target"].dropna()
        epochs = f"{reached.min():.0f} to {reached.max():.0f}" if len(reached) else "–"
        minutes = group["seconds"].mean() / 60
        row = [label, share_words(fraction), f"{len(reached)} of {len(group)}", epochs, group["epochs"].max()]
        rows.append([*row, f"{minutes:.1f}"])
    header = ["network", "data", f"seeds that reach {target:g}", "after epochs", "of epochs", "minutes a training"]
    return markdown_table(header, rows)
