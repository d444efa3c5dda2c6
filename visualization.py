"""Every figure: takes tables and arrays, returns a matplotlib Figure, and knows no model and no file but `save`'s.

Each function answers one question, named in its title; the caption (n, estimator, policy, null) is drawn small below,
and `synthetic=True` adds that the images are synthetic. Figures are made without pyplot, so none is kept alive behind
the caller's back. A notebook draws a returned Figure as the last value of a cell (or through IPython's `display`) once
matplotlib's inline backend is on: put `%matplotlib inline` into the notebook's set-up cell. Importing pyplot is not
enough.

Colours are safe for colour-blind readers: Okabe-Ito for lines, cividis for magnitudes, and PuOr centred on 0 wherever
a value is negative. A value that could not be computed is hatched grey, never a colour of the scale.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from utils import InputError, atomic_path

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
MODEL_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
SEED_STYLES = ("-", "--", ":", "-.")
RANGE_COLOUR = "#D9E2EA"
PARTS = ("encoder", "decoder")


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG at 150 dpi, atomically; the same figure gives the same bytes."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def short_labels(names: Sequence[str], width: int = 24) -> list[str]:
    """Site names without the dotted parts that all share at the front; a name still longer than `width` characters
    keeps as many of its last dotted parts as fit after an ellipsis, as long as it stays unique."""
    split = [str(name).split(".") for name in names]
    shared = 0
    while len(split) > 1 and all(len(s) > shared + 1 and s[shared] == split[0][shared] for s in split):
        shared += 1
    labels = [".".join(parts[shared:]) for parts in split]
    cut = [_last_parts(label, width) for label in labels]
    return [short if cut.count(short) == 1 else label for short, label in zip(cut, labels)]


def _last_parts(label: str, width: int) -> str:
    if len(label) <= width:
        return label
    parts = label.split(".")
    tails = ("…" + ".".join(parts[start:]) for start in range(1, len(parts)))
    return next((tail for tail in tails if len(tail) <= width), "…" + label[1 - width :])


def new_figure(width: float, height: float, *, title: str, caption: str, synthetic: bool, note: str = "") -> Figure:
    """A Figure (inches) with its title at the top left and its wrapped caption at the bottom left."""
    sentences = [part.strip().rstrip(".") + "." for part in (caption, note) if part.strip()]
    if synthetic:
        sentences.append("Made from synthetic images.")
    lines = textwrap.wrap(" ".join(sentences), width=int(width * 17.5))
    heading = textwrap.wrap(title, width=int(width * 10))
    height += 0.12 * len(lines) + 0.17 * len(heading)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    if heading:
        figure.suptitle("\n".join(heading), x=0.01, ha="left", fontsize=11, fontweight="bold")
    if lines:
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7, color="0.3")
    return figure


def need_columns(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise InputError(f"the {what} table lacks the columns {missing}; it has {list(frame.columns)}")
    if frame.empty:
        raise InputError(f"the {what} table is empty; there is nothing to draw")


def settle(figure: Figure) -> Figure:
    """Lay the figure out once and for all: constrained layout moves things a little at every further drawing, and
    the file must not depend on whether a notebook has drawn the figure before. The second pass knows the sizes of
    the title, caption and legend that the first one has placed."""
    for _ in range(2):
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    ax.xaxis.label.set_size(9)
    ax.yaxis.label.set_size(9)


def training_curves(
    history: pd.DataFrame, *, title: str = "How did training go?", caption: str = "", synthetic: bool = False
) -> Figure:
    """Training loss, validation loss and validation IoU against the epoch.

    history : one row an epoch, columns model, seed, epoch, train_loss, validation_loss, validation_iou (NaN where an
    epoch was not validated). One colour a model, one line style a seed.
    """
    panels = {"train_loss": "training loss", "validation_loss": "validation loss", "validation_iou": "validation IoU"}
    need_columns(history, ["model", "seed", "epoch", *panels], "history")
    figure = new_figure(9.5, 2.9, title=title, caption=caption, synthetic=synthetic)
    models, seeds = list(history["model"].unique()), sorted(history["seed"].unique())
    colour = {model: MODEL_COLOURS[i % len(MODEL_COLOURS)] for i, model in enumerate(models)}
    style = {seed: SEED_STYLES[i % len(SEED_STYLES)] for i, seed in enumerate(seeds)}
    for ax, (column, label) in zip(figure.subplots(1, 3), panels.items()):
        for (model, seed), run in history.groupby(["model", "seed"], sort=False):
            run = run.dropna(subset=[column]).sort_values("epoch")
            ax.plot(run["epoch"], run[column], color=colour[model], linestyle=style[seed], marker="o", ms=2.5, lw=1.4)
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        tidy(ax)
    handles = [Line2D([], [], color=colour[model], lw=2, label=str(model)) for model in models]
    handles += [Line2D([], [], color="0.4", linestyle=style[seed], label=f"seed {seed}") for seed in seeds]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)


def _scale(values: np.ndarray, vmin: float | None, vmax: float | None) -> tuple[str, Normalize, tuple[float, float]]:
    """Colour map, normalisation and the range in use; PuOr centred on 0 as soon as that range goes below 0."""
    finite = values[np.isfinite(values)]
    low = vmin if vmin is not None else min(0.0, finite.min(initial=0.0))
    high = vmax if vmax is not None else max(finite.max(initial=low), 0.0)
    if not high > low:  # nothing finite, or all equal to the bound
        high = low + 1.0
    if low < 0:
        extreme = max(-low, high)
        return "PuOr_r", Normalize(-extreme, extreme), (low, high)
    return "cividis", Normalize(low, high), (low, high)


def _draw_plane(
    ax: Axes, frame: pd.DataFrame, cmap: str, norm: Normalize, boundaries: tuple[int | None, int | None]
) -> None:
    """Rows of `frame` upwards, columns to the right; NaN cells show the hatched background."""
    values = np.ma.masked_invalid(frame.to_numpy(dtype=np.float64))
    ax.patch.set(facecolor="0.88", hatch="//////", edgecolor="0.65")
    ax.imshow(values, cmap=cmap, norm=norm, origin="lower", aspect="auto", interpolation="none")
    in_row, in_column = boundaries
    text = {"fontsize": 7, "color": "0.25"}
    if in_row is not None:
        ax.axhline(in_row - 0.5, color="white", lw=2.4)
        ax.axhline(in_row - 0.5, color="black", lw=1)
        for part, centre in zip(PARTS, (in_row / 2, (in_row + len(frame)) / 2)):
            where = (1.01, centre - 0.5)
            ax.text(*where, part, transform=ax.get_yaxis_transform(), rotation=-90, va="center", ha="left", **text)
    if in_column is not None:
        ax.axvline(in_column - 0.5, color="white", lw=2.4)
        ax.axvline(in_column - 0.5, color="black", lw=1)
        for part, centre in zip(PARTS, (in_column / 2, (in_column + frame.shape[1]) / 2)):
            ax.text(centre - 0.5, 1.01, part, transform=ax.get_xaxis_transform(), va="bottom", ha="center", **text)


def _grey(ax: Axes, cells: pd.DataFrame) -> None:
    """Cover the cells that are True."""
    covered = np.ma.masked_equal(cells.to_numpy(dtype=np.float64), 0.0)
    ax.imshow(covered, cmap=ListedColormap(["0.72"]), origin="lower", aspect="auto", interpolation="none")


def _mark_best(ax: Axes, frame: pd.DataFrame, larger_is_better: bool) -> None:
    values = frame.to_numpy(dtype=np.float64)
    rows = np.flatnonzero(np.isfinite(values).any(axis=1))
    pick = np.nanargmax if larger_is_better else np.nanargmin
    best = [pick(values[row]) for row in rows]
    ax.scatter(best, rows, s=9, color="white", edgecolors="black", linewidths=0.7, zorder=3)


def _name_sites(ax: Axes, frame: pd.DataFrame, *, x: bool = True, y: bool = True) -> None:
    size = 7 if max(frame.shape) <= 20 else 6 if max(frame.shape) <= 32 else 4.5
    columns, rows = (short_labels([str(name) for name in names]) for names in (frame.columns, frame.index))
    ax.set_xticks(range(len(columns)), columns if x else [], rotation=90, fontsize=size)
    ax.set_yticks(range(len(rows)), rows if y else [], fontsize=size)
    ax.tick_params(length=2, pad=1.5)


def _colour_bar(figure: Figure, axes, cmap: str, norm: Normalize, used: tuple[float, float], label: str) -> None:
    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=axes, fraction=0.05, pad=0.02, aspect=30)
    bar.set_label(label, fontsize=8)
    bar.ax.set_ylim(*used)
    bar.ax.tick_params(labelsize=7)


def _check_planes(frames: Mapping[str, pd.DataFrame]) -> str:
    """The note the caption owes the reader about hatched cells, if there are any."""
    if not frames:
        raise InputError("no plane was given; pass at least one table of sites × sites")
    for name, frame in frames.items():
        if frame.empty:
            raise InputError(f"plane {name!r} has shape {frame.shape}; it needs at least one site on each axis")
    return "Hatched: could not be computed" if any(frame.isna().any(axis=None) for frame in frames.values()) else ""


def _plane_size(tables: Sequence[pd.DataFrame], shared: bool) -> tuple[float, float]:
    """Width and height in inches for about square cells, with room for the site names (0.06 inches a letter)."""

    def letters(names) -> float:
        return 0.06 * max(len(label) for label in short_labels(list(names)))

    sites = max(max(frame.shape) for frame in tables)
    cell = np.clip(5.0 / sites, 0.15, 0.5) if len(tables) == 1 else np.clip(3.5 / sites, 0.115, 0.4)
    beside = [letters(frame.index) + 0.35 for frame in tables]
    width = sum(frame.shape[1] * cell + 0.25 for frame in tables) + (beside[0] if shared else sum(beside)) + 1.1
    height = max(len(frame) for frame in tables) * cell + max(letters(frame.columns) for frame in tables) + 0.7
    return max(float(width), 4.2), float(height)


def planes(
    frames: Mapping[str, pd.DataFrame],
    *,
    title: str = "",
    xlabel: str = "site",
    ylabel: str = "site",
    label: str = "similarity",
    vmin: float | None = None,
    vmax: float | None = None,
    boundaries: tuple[int | None, int | None] = (None, None),
    best: bool = True,
    larger_is_better: bool = True,
    by_chance: Mapping[str, pd.DataFrame] | None = None,
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """Several planes (name -> table sites A × sites B) side by side, with one colour scale.

    Site names on the left are drawn once when all planes have the same rows. `boundaries` are the indices at which
    decoder sites begin on the row and the column axis. `best` puts a dot on the best column of every row.
    `by_chance` (name -> table of True and False) says which cells are no more than chance; they are greyed.
    """
    note = _check_planes(frames)
    if by_chance:
        note = (note + ". " if note else "") + "Grey: not told from chance"
    if best:
        note = (note + ". " if note else "") + "Dots: the best column of each row"
    tables = list(frames.values())
    shared = all(frame.index.equals(tables[0].index) for frame in tables)
    figure = new_figure(*_plane_size(tables, shared), title=title, caption=caption, synthetic=synthetic, note=note)
    cmap, norm, used = _scale(
        np.concatenate([frame.to_numpy(dtype=np.float64).ravel() for frame in tables]), vmin, vmax
    )
    axes = figure.subplots(1, len(tables), squeeze=False, width_ratios=[frame.shape[1] for frame in tables])[0]
    for i, (ax, (name, frame)) in enumerate(zip(axes, frames.items())):
        _draw_plane(ax, frame, cmap, norm, boundaries)
        if by_chance and name in by_chance:
            _grey(ax, by_chance[name].loc[frame.index, frame.columns])
        if best:
            _mark_best(ax, frame, larger_is_better)
        _name_sites(ax, frame, y=i == 0 or not shared)
        if i == (len(tables) - 1) // 2 or not shared:  # narrow panels have no room for a label each
            ax.set_xlabel(xlabel, fontsize=9)
        if i == 0 or not shared:
            ax.set_ylabel(ylabel, fontsize=9)
        if len(tables) > 1:
            ax.set_title(name, fontsize=9, pad=14 if boundaries[1] is not None else 4)
    _colour_bar(figure, list(axes), cmap, norm, used, label)
    return settle(figure)


def measure_grid(
    planes: Mapping[str, pd.DataFrame],
    *,
    title: str = "Do the measures agree?",
    xlabel: str = "site of B",
    ylabel: str = "site of A",
    boundaries: tuple[int | None, int | None] = (None, None),
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """Small multiples, three to a row, one plane a measure, each with its own colour scale over its own range.

    Sites are numbered in the order given, since their names would not be legible.
    """
    note = _check_planes(planes)
    columns = min(3, len(planes))
    rows = -(-len(planes) // columns)
    figure = new_figure(3.2 * columns, 2.7 * rows, title=title, caption=caption, synthetic=synthetic, note=note)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, (name, frame) in zip(axes.flat, planes.items()):
        values = frame.to_numpy(dtype=np.float64)
        finite = values[np.isfinite(values)]
        cmap, norm, used = _scale(values, finite.min() if finite.size else None, finite.max() if finite.size else None)
        _draw_plane(ax, frame, cmap, norm, boundaries)
        ax.set_title(name, fontsize=9, pad=14 if boundaries[1] is not None else 4)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.tick_params(labelsize=7)
        _colour_bar(figure, ax, cmap, norm, used, "")
    for ax in axes.flat[max(0, len(planes) - columns) : len(planes)]:  # the lowest plane of each column
        ax.set_xlabel(f"{xlabel} (number, in order)", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel(f"{ylabel} (number, in order)", fontsize=8)
    for ax in axes.flat[len(planes) :]:
        ax.remove()
    return settle(figure)


def ruler(
    summary: pd.DataFrame,
    *,
    title: str = "How similar are they, between untrained and the same network again?",
    spread: str = "interval",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """The headline: observed similarity on the ruler from floor to ceiling, a row a measure and policy, a panel a part.

    summary : columns measure, policy, part ('encoder' or 'decoder'), similarity, low, high, ceiling, floor, null_high
    (the null's 95 % point); NaN where unknown, then that mark is not drawn. `spread` says what low and high are. The
    number at the right is u = (similarity - floor) / (ceiling - floor), where the ceiling lies above the floor.
    """
    columns = ["measure", "policy", "part", "similarity", "low", "high", "ceiling", "floor", "null_high"]
    need_columns(summary, columns, "ruler")
    parts = [part for part in PARTS if (summary["part"] == part).any()]
    if unknown := set(summary["part"]) - set(PARTS):
        raise InputError(f"the ruler table holds parts {sorted(map(str, unknown))}; only {PARTS} are known")
    names = list(dict.fromkeys(zip(summary["measure"], summary["policy"])))
    figure = new_figure(9.5, max(0.42 * len(names) + 1.25, 2.6), title=title, caption=caption, synthetic=synthetic)
    axes = figure.subplots(1, len(parts), squeeze=False, sharex=True, sharey=True)[0]
    for ax, part in zip(axes, parts):
        for row in summary[summary["part"] == part].itertuples():
            _draw_ruler(ax, names.index((row.measure, row.policy)), row)
        ax.axvline(0, color="0.75", lw=0.8, zorder=0)
        ax.margins(x=0.06)  # a mark at an end is drawn whole
        ax.set_title(part, fontsize=10)
        ax.set_xlabel("similarity (dimensionless)", fontsize=9)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(labelsize=8, left=False)
        ax.text(1.02, 1.0, "u", transform=ax.transAxes, fontsize=8, fontstyle="italic", va="bottom")
    labels = [f"{measure} · {policy}" for measure, policy in names]
    axes[0].set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.4, -0.6))
    axes[0].set_ylabel("measure · spatial policy", fontsize=9)
    figure.legend(
        handles=_ruler_legend(spread), loc="outside right center", fontsize=8, frameon=False, labelspacing=1.0
    )
    return settle(figure)


def _draw_ruler(ax: Axes, y: int, row) -> None:
    """One row of the ruler at height y; NaN marks are left out by matplotlib or by hand."""
    if row.floor < row.ceiling:  # else there is no scale, and none is drawn
        ax.barh(y, row.ceiling - row.floor, left=row.floor, height=0.5, color=RANGE_COLOUR, zorder=1)
        if np.isfinite(row.similarity):
            u = (row.similarity - row.floor) / (row.ceiling - row.floor)
            ax.text(1.02, y, f"{u:.2f}", transform=ax.get_yaxis_transform(), fontsize=8, va="center")
    ax.vlines(row.floor, y - 0.25, y + 0.25, color=ORANGE, lw=2.6, zorder=2)
    ax.vlines(row.ceiling, y - 0.25, y + 0.25, color=GREEN, lw=2.6, zorder=2)
    ax.vlines(row.null_high, y - 0.36, y + 0.36, color=VERMILLION, lw=1.5, linestyle=(0, (2, 1)), zorder=3)
    if np.isfinite([row.low, row.high]).all():
        ax.hlines(y, row.low, row.high, color=BLACK, lw=1.6, zorder=4)
    ax.plot(row.similarity, y, "o", color=BLACK, ms=6, zorder=5)


def _ruler_legend(spread: str) -> list:
    tick = {"linestyle": "none", "marker": "|", "ms": 11}
    return [
        Line2D([], [], color=BLACK, marker="o", ms=6, lw=1.6, label=f"observed, with {spread}"),
        Patch(color=RANGE_COLOUR, label="floor to ceiling"),
        Line2D([], [], color=ORANGE, mew=2.6, label="floor: untrained twins", **tick),
        Line2D([], [], color=GREEN, mew=2.6, label="ceiling: another seed", **tick),
        Line2D([], [], color=VERMILLION, lw=1.5, linestyle=(0, (2, 1)), label="95 % point of the null"),
        Line2D([], [], linestyle="none", label="u: place from floor (0)\nto ceiling (1)"),
    ]


def depth_profile(
    frame: pd.DataFrame,
    *,
    title: str = "Where along the depth are they similar?",
    ylabel: str = "similarity (dimensionless)",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """Similarity of sites at matched relative depth, with ceiling and floor, a panel a part.

    frame : columns part, relative_depth (0 first site to 1 last site of the part), similarity, ceiling, floor; NaN
    where unknown; with similarity_low and similarity_high a bar shows them.
    """
    need_columns(frame, ["part", "relative_depth", "similarity", "ceiling", "floor"], "depth")
    parts = list(frame["part"].unique())
    figure = new_figure(4.2 * len(parts) + 1.4, 3.0, title=title, caption=caption, synthetic=synthetic)
    axes = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for ax, part in zip(axes, parts):
        rows = frame[frame["part"] == part].sort_values("relative_depth")
        depth = rows["relative_depth"].to_numpy(dtype=float)
        low, high = rows["floor"].to_numpy(dtype=float), rows["ceiling"].to_numpy(dtype=float)
        above = low < high  # elsewhere there is no scale, and no band
        ax.fill_between(
            depth, low, high, where=above, interpolate=True, color=RANGE_COLOUR, lw=0, label="floor to ceiling"
        )
        ax.plot(depth, high, color=GREEN, lw=1.6, marker="^", ms=4, label="ceiling: another seed")
        ax.plot(depth, low, color=ORANGE, lw=1.6, marker="v", ms=4, label="floor: untrained twins")
        ax.plot(depth, rows["similarity"], color=BLACK, lw=1.8, marker="o", ms=5, label="observed")
        if {"similarity_low", "similarity_high"} <= set(rows):
            ax.vlines(depth, rows["similarity_low"], rows["similarity_high"], color=BLACK, lw=1.4, label="95 %")
        ax.axhline(0, color="0.75", lw=0.8, zorder=0)
        ax.set(xlabel=f"relative depth in the {part} (0 first site, 1 last)", title=part, xlim=(-0.03, 1.03))
        ax.title.set_fontsize(10)
        tidy(ax)
    axes[0].set_ylabel(ylabel)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)
