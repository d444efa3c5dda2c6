"""Figures of a grid of runs: what each encoder, each share of the data and each operation is worth.

Takes tidy tables, returns Figures in the manner of `visualization`, whose colours and layout it shares. Every figure's
title is one question; the caption (n, estimator, interval) is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from utils import InputError
from visualization import BLACK, BLUE, MODEL_COLOURS, SEED_STYLES, need_columns, new_figure, settle, tidy

MARKERS = ("o", "^", "s", "D", "v", "P", "X")
DODGE = 0.035  # decades of the x axis between two labels at one share of the data
LARGEST = 400.0  # area of the largest mark in `cost_scatter`, in points²
LETTER, LINE = 4.3, 9.0  # width and height that a letter of 7 points takes, in points
WORDS_IN_CELLS = 12  # classes up to which a confusion matrix has numbers in its cells


def looks_of(labels: Sequence) -> dict:
    """label -> (colour, marker): seven of each in order; beyond, the same colours come with other markers."""
    n, looks = len(MODEL_COLOURS), {}
    for i, label in enumerate(dict.fromkeys(labels)):
        looks[label] = (MODEL_COLOURS[i % n], MARKERS[(i + i // n) % len(MARKERS)])
    return looks


def _bars(ax: Axes, rows: pd.DataFrame, x: np.ndarray, colour: str) -> None:
    """The intervals low to high of the rows that have one, upright at their x."""
    has = rows[["low", "high"]].notna().all(axis=1).to_numpy()
    ax.vlines(np.asarray(x)[has], rows["low"][has], rows["high"][has], color=colour, lw=1.5)


def data_curve(
    table: pd.DataFrame,
    *,
    title: str = "How much training data does each need?",
    ylabel: str = "mean IoU of the test images",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """Mean IoU against the share of the training data, on a logarithmic axis, with intervals; one colour a label.

    table : columns label (or encoder), fraction in (0, 1], iou, low, high (NaN without an interval) and n_seeds, which
    the legend names. One row a label and fraction. Labels at one fraction stand beside each other.
    """
    if "label" not in table and "encoder" in table:
        table = table.rename(columns={"encoder": "label"})
    need_columns(table, ["label", "fraction", "iou", "low", "high", "n_seeds"], "data-share")
    if not table["fraction"].between(0, 1, inclusive="right").all():
        raise InputError("the data-share table holds fractions outside (0, 1]; 5 % of the images is 0.05")
    _refuse_doubles(table, ["label", "fraction"], "data-share")
    figure = new_figure(7.6, 3.5, title=title, caption=caption, synthetic=synthetic)
    ax, looks = figure.subplots(), looks_of(table["label"])
    for i, (label, (colour, marker)) in enumerate(looks.items()):
        rows = table[table["label"] == label].sort_values("fraction")
        x = 100 * rows["fraction"].to_numpy() * 10 ** (DODGE * (i - (len(looks) - 1) / 2))
        _bars(ax, rows, x, colour)
        ax.plot(x, rows["iou"], color=colour, marker=marker, ms=5.5, lw=1.3, label=f"{label} ({_seeds(rows)})")
    ticks = sorted(100 * table["fraction"].unique())
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="training images used (% of all, logarithmic)", ylabel=ylabel)
    tidy(ax)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)


def _seeds(rows: pd.DataFrame) -> str:
    low, high = int(rows["n_seeds"].min()), int(rows["n_seeds"].max())
    return ("1 seed" if high == 1 else f"{high} seeds") if low == high else f"{low} to {high} seeds"


def _refuse_doubles(table: pd.DataFrame, keys: list[str], what: str) -> None:
    doubled = table[table.duplicated(keys)]
    if len(doubled):
        raise InputError(
            f"the {what} table has several rows for {' '.join(f'{key} {doubled.iloc[0][key]}' for key in keys)}; "
            "give one row each (over seeds: their mean)"
        )


def confusion_matrix(
    matrix: np.ndarray,
    class_names: Sequence[str],
    *,
    title: str = "Which classes are taken for which?",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """Each true class's pixels by predicted class: colour and upper number are the share of its row, below the pixels.

    matrix : (C, C) counts of pixels, rows true. A class without pixels has no shares: its row is hatched. Beyond
    twelve classes the numbers are left out.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape != (len(class_names),) * 2 or not len(class_names):
        raise InputError(
            f"the confusion matrix has shape {matrix.shape} for {len(class_names)} class names; it needs a row and a "
            "column for each"
        )
    if not (matrix >= 0).all() or not matrix.any():
        raise InputError("the confusion matrix counts no pixel, or negative ones; there is nothing to draw")
    true = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, true, out=np.full(matrix.shape, np.nan), where=true > 0)
    note = "Hatched: no pixel of the class" if not true.all() else ""
    side = max(0.62 * len(class_names), 2.8) if len(class_names) <= WORDS_IN_CELLS else 7.0
    longest = 0.07 * max(len(str(name)) for name in class_names)
    size = (side + longest + 2.0, side + longest + 0.6)
    figure = new_figure(*size, title=title, caption=caption, synthetic=synthetic, note=note)
    ax = figure.subplots()
    ax.patch.set(facecolor="0.88", hatch="//////", edgecolor="0.65")
    drawn = ax.imshow(np.ma.masked_invalid(shares), cmap="cividis", vmin=0, vmax=1, interpolation="none")
    if len(class_names) <= WORDS_IN_CELLS:
        _number_cells(ax, shares, matrix)
    turned = 90 if longest > 0.9 * side / len(class_names) else 0
    ax.set_xticks(range(len(class_names)), class_names, rotation=turned, fontsize=8)
    ax.set_yticks(range(len(class_names)), class_names, fontsize=8)
    ax.tick_params(length=2)
    ax.set_xlabel("predicted class", fontsize=9)
    ax.set_ylabel("true class", fontsize=9)
    bar = figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.03)
    bar.set_label("share of the true class's pixels", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return settle(figure)


def _number_cells(ax: Axes, shares: np.ndarray, matrix: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):  # cividis is dark below about a half: white is read there, black above
            text = f"{share:.3f}\n{_short(matrix[row, column])}"
            ax.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if share < 0.5 else BLACK)


def _short(count: float) -> str:
    """A count in four characters or so: 950, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:g}"


def loss_curves(
    history: pd.DataFrame,
    *,
    title: str = "How fast does each learn?",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """Training loss and validation IoU against the epoch, one colour a label, one line a seed.

    history : one row an epoch, columns label, seed, epoch, train_loss, validation_iou (NaN where an epoch was not
    validated).
    """
    panels = {"train_loss": "training loss, each network's own", "validation_iou": "validation IoU"}
    need_columns(history, ["label", "seed", "epoch", *panels], "history")
    _refuse_doubles(history, ["label", "seed", "epoch"], "history")
    figure = new_figure(9.0, 3.1, title=title, caption=caption, synthetic=synthetic)
    looks, seeds = looks_of(history["label"]), sorted(history["seed"].unique())
    style = {seed: SEED_STYLES[i % len(SEED_STYLES)] for i, seed in enumerate(seeds)}
    for ax, (column, name) in zip(figure.subplots(1, 2), panels.items()):
        for (label, seed), run in history.groupby(["label", "seed"], sort=False):
            run = run.dropna(subset=[column]).sort_values("epoch")
            colour, marker = looks[label]
            ax.plot(run["epoch"], run[column], color=colour, ls=style[seed], marker=marker, ms=3, lw=1.2)
        ax.set(xlabel="epoch", ylabel=name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        tidy(ax)
    handles = [Line2D([], [], color=c, marker=m, ms=4, lw=1.6, label=str(name)) for name, (c, m) in looks.items()]
    handles += [Line2D([], [], color="0.4", ls=style[seed], label=f"seed {seed}") for seed in seeds]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)


def cost_scatter(
    table: pd.DataFrame,
    *,
    title: str = "What does a better mask cost?",
    ylabel: str = "mean IoU of the test images",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """Mean IoU against GFLOPs of one image (logarithmic); a mark's area is proportional to the model's parameters.

    table : one row a model, columns label, gflops, latency_ms_1, parameters, iou, low, high. Beside each mark stand
    its label and its latency of one image.
    """
    need_columns(table, ["label", "gflops", "latency_ms_1", "parameters", "iou", "low", "high"], "cost")
    if not (table[["gflops", "parameters"]] > 0).all(axis=None):
        raise InputError("the cost table holds GFLOPs or parameters that are not above 0; measure them with costs.py")
    figure = new_figure(8.2, 4.2, title=title, caption=caption, synthetic=synthetic)
    ax, largest = figure.subplots(), table["parameters"].max()
    _bars(ax, table, table["gflops"].to_numpy(), "0.6")
    areas = LARGEST * table["parameters"] / largest
    ax.scatter(table["gflops"], table["iou"], s=areas, color=BLUE, alpha=0.8, edgecolors=BLACK, lw=0.6, zorder=3)
    ax.set_xscale("log")
    ax.set(xlabel="GFLOPs of one image (10⁹ operations, logarithmic)", ylabel=ylabel)
    ax.margins(x=0.16, y=0.1)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # a grid seldom spans many decades
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    tidy(ax)
    mark = {"ls": "none", "marker": "o", "color": BLUE, "mec": BLACK, "alpha": 0.8}
    marks = [Line2D([], [], ms=np.sqrt(LARGEST * x), label=_short(x * largest), **mark) for x in (1.0, 0.25, 0.05)]
    style = {"fontsize": 8, "frameon": False, "title_fontsize": 8, "labelspacing": 1.2, "borderpad": 1.2}
    figure.legend(handles=marks, loc="outside right center", title="parameters", **style)
    settle(figure)
    _label_points(ax, table)
    return figure


def _label_points(ax: Axes, table: pd.DataFrame) -> None:
    """Each row's label beside its mark, at the first of some places where it covers no mark, interval or other label.

    Boxes are (left, bottom, right, top) in points of the laid-out figure; where no place is free, the one that covers
    least is taken. A label that stands away from its mark is tied to it by a line.
    """
    scale = 72 / ax.figure.dpi
    marks, *ends = (ax.transData.transform(table[["gflops", y]].astype(float)) * scale for y in ("iou", "low", "high"))
    radii = np.sqrt(LARGEST * table["parameters"].to_numpy() / table["parameters"].max() / np.pi)
    taken = [(*(mark - radius), *(mark + radius)) for mark, radius in zip(marks, radii)]
    taken += [(*(low - 1), *(high + 1)) for low, high in zip(*ends) if np.isfinite([low, high]).all()]
    frame = tuple(np.array(ax.get_window_extent().extents) * scale)
    for row, mark, radius in sorted(zip(table.itertuples(), marks, radii), key=lambda item: -item[1][1]):
        text = f"{row.label}, {row.latency_ms_1:.3g} ms"
        boxes = list(_places(mark, radius, LETTER * len(text), LINE))
        covered = [sum(_overlap(box, other) for other in taken) - _overlap(box, frame) for box in boxes]
        best = int(np.argmin(np.round(covered, 6)))  # all boxes are of one size: less in the frame is more outside
        taken.append(boxes[best])
        where = (boxes[best][0] - mark[0], boxes[best][1] + LINE / 2 - mark[1])
        line = {"arrowstyle": "-", "color": "0.6", "lw": 0.6} if best >= len(boxes) // 4 else None
        options = {"textcoords": "offset points", "fontsize": 7, "va": "center", "arrowprops": line}
        ax.annotate(text, (row.gflops, row.iou), where, **options)


def _places(mark: np.ndarray, radius: float, width: float, height: float):
    """Boxes around a mark, nearest first: to its right and left, above and below it, and at its corners."""
    x, y = mark
    for gap in (4, 16, 30, 46):
        right, left = x + radius + gap, x - radius - gap - width
        above, below = y + radius + gap, y - radius - gap - height
        corners = [(right, y - height / 2), (left, y - height / 2), (right, above), (right, below), (left, above)]
        corners += [(left, below), (x - width / 2, above), (x - width / 2, below)]
        yield from ((*corner, corner[0] + width, corner[1] + height) for corner in corners)


def _overlap(box: tuple, other: tuple) -> float:
    sides = [min(box[i + 2], other[i + 2]) - max(box[i], other[i]) for i in (0, 1)]
    return sides[0] * sides[1] if min(sides) > 0 else 0.0
