"""The figure of the matrix of architectures: who is how similar to whom, and what that follows.

Takes tables, returns a Figure in the manner of `visualization`, whose colours and layout it shares.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from utils import InputError
from visualization import (
    BLACK,
    BLUE,
    MODEL_COLOURS,
    RANGE_COLOUR,
    VERMILLION,
    need_columns,
    new_figure,
    settle,
    tidy,
)

CELL = 0.46  # inches
MAP = "cividis"
GREY = "0.82"
NUMBERS = ["similarity", "ceiling", "u"]
MARKS = {"encoder": "o", "decoder": "D"}
CHANCE = "below chance"
SHOWN_U = (-1.0, 2.0)  # u has no bounds where floor and ceiling are close


def architecture_matrix(
    matrix: pd.DataFrame,
    factors: pd.DataFrame,
    facts: pd.DataFrame,
    *,
    title: str,
    caption: str,
    synthetic: bool,
    quantity: str = "similarity",
) -> Figure:
    """u of every pair of labels, a heat map a part, and beside them what the similarity follows.

    matrix : columns label_a, label_b, part, similarity, ceiling, u, verdict; one row an unordered pair, with itself too
    factors : columns part, quantity, factor, difference, null_low, null_high, p_holm, reason
    facts : columns label, title, family; labels are ordered by family, in the order in which families come
    quantity : of which matrix the factors are shown
    Diagonal: the ceiling, in bold. Without a scale (no u) a cell has its similarity, in brackets and without a colour;
    grey: below chance; hatched: no number.
    """
    need_columns(matrix, ["label_a", "label_b", "part", *NUMBERS, "verdict"], "matrix")
    columns = ["part", "quantity", "factor", "difference", "null_low", "null_high", "p_holm", "reason"]
    need_columns(factors, columns, "factor")
    need_columns(facts, ["label", "title", "family"], "fact")
    ordered = by_family(facts, matrix)
    parts = list(dict.fromkeys(matrix["part"]))
    side, names = CELL * len(ordered), 0.075 * ordered["title"].str.len().max() + 0.3
    widths = [side] * len(parts) + [3.0]
    height = max(side + names, 2.8) + 0.9
    figure = new_figure(sum(widths) + names + 2.6, height, title=title, caption=caption, synthetic=synthetic)
    *maps, effects = figure.subplots(1, len(widths), width_ratios=widths)
    families = dict(zip(dict.fromkeys(ordered["family"]), MODEL_COLOURS * (1 + len(ordered) // len(MODEL_COLOURS))))
    for place, (ax, part) in enumerate(zip(maps, parts)):
        _heat_map(ax, matrix[matrix["part"] == part], ordered, families)
        ax.set_title(f"{part}s", fontsize=10)
        if place:
            ax.set_yticklabels([])
    maps[0].set_ylabel("architecture", fontsize=9)
    scale = ScalarMappable(Normalize(0, 1), MAP)
    bar = figure.colorbar(scale, ax=maps, orientation="horizontal", fraction=0.04, pad=0.03, aspect=40, extend="both")
    bar.set_label("u: 0 untrained twins, 1 another seed", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _effects(effects, factors[factors["quantity"] == quantity], parts, quantity)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.62 / max(side, 2.0)), "ncols": 2}  # of the axis' words
    effects.legend(handles=_legend(families), fontsize=7, frameon=False, columnspacing=1.0, **below)
    return settle(figure)


def by_family(facts: pd.DataFrame, matrix: pd.DataFrame) -> pd.DataFrame:
    """The facts of the labels in the matrix, families together in the order in which they come."""
    labels = pd.unique(matrix[["label_a", "label_b"]].to_numpy().ravel())
    absent = [label for label in labels if label not in set(facts["label"])]
    if absent:
        raise InputError(f"the fact table has no row for {absent[0]!r}, which the matrix has; add its row")
    here = facts[facts["label"].isin(labels)]
    place = {family: place for place, family in enumerate(dict.fromkeys(here["family"]))}
    return here.sort_values("family", key=lambda families: families.map(place), kind="stable").reset_index(drop=True)


def _heat_map(ax: Axes, rows: pd.DataFrame, ordered: pd.DataFrame, families: dict[str, str]) -> None:
    """Cells, borders between families, and names in the colours of their families."""
    place = {label: number for number, label in enumerate(ordered["label"])}
    count = len(place)
    for row in rows.itertuples():
        i, j = place[row.label_a], place[row.label_b]
        for y, x in {(i, j), (j, i)}:
            _cell(ax, y, x, row)
    borders = np.flatnonzero((ordered["family"] != ordered["family"].shift()).to_numpy())[1:] - 0.5
    for border in borders:
        ax.axhline(border, color=BLACK, lw=1.6)
        ax.axvline(border, color=BLACK, lw=1.6)
    ax.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
    ax.set_xticks(range(count), ordered["title"], rotation=90, fontsize=8)
    ax.set_yticks(range(count), ordered["title"], fontsize=8)
    for ticks in (ax.get_xticklabels(), ax.get_yticklabels()):
        for tick, family in zip(ticks, ordered["family"]):
            tick.set_color(families[family])
    ax.tick_params(length=0)
    ax.set_xlabel("architecture", fontsize=9)


def _cell(ax: Axes, y: int, x: int, row) -> None:
    """One square and its number."""
    box = {"xy": (x - 0.5, y - 0.5), "width": 1, "height": 1, "lw": 0.6, "edgecolor": "white"}
    style, words = {"fontsize": 7, "color": BLACK}, ""
    if np.isnan(row.similarity):
        box |= {"facecolor": "white", "hatch": "////", "edgecolor": "0.6"}
    elif y == x:
        box, words, style = box | {"facecolor": RANGE_COLOUR}, f"{row.similarity:.2f}", style | {"fontweight": "bold"}
    elif str(row.verdict).startswith(CHANCE):
        box, words = box | {"facecolor": GREY}, f"({row.similarity:.2f})" if np.isnan(row.u) else f"{row.u:.2f}"
    elif np.isnan(row.u):
        box, words = box | {"facecolor": "white", "edgecolor": "0.85"}, f"({row.similarity:.2f})"
    else:
        colour = ScalarMappable(Normalize(0, 1), MAP).to_rgba(row.u)
        dark = np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.5
        box, words, style = box | {"facecolor": colour}, f"{row.u:.2f}", style | {"color": "white" if dark else BLACK}
    ax.add_patch(Rectangle(box.pop("xy"), box.pop("width"), box.pop("height"), **box))
    if words:
        ax.text(x, y, words.replace("-", "−"), ha="center", va="center", **style)


def _effects(ax: Axes, table: pd.DataFrame, parts: list[str], quantity: str) -> None:
    """The difference that each factor makes, on the range where 95 % of the orders of the architectures put it."""
    names = list(dict.fromkeys(table["factor"]))
    steps = dict(zip(parts, np.linspace(-0.2, 0.2, len(parts)) if len(parts) > 1 else [0.0]))
    blended = ax.get_yaxis_transform()
    for row in table.itertuples():
        y = names.index(row.factor) + steps[row.part]
        if np.isnan(row.difference):
            ax.text(0.02, y, f"{row.part}: not testable", transform=blended, fontsize=7, color="0.4", va="center")
            continue
        ax.barh(y, row.null_high - row.null_low, left=row.null_low, height=0.26, color=RANGE_COLOUR)
        below = row.p_holm < 0.05
        marker = {"marker": MARKS.get(row.part, "s"), "mfc": VERMILLION if below else "white", "mec": BLACK, "ms": 6}
        ax.plot(row.difference, y, linestyle="none", **marker)
        ax.text(1.02, y, f"p = {row.p_holm:.2g}", transform=blended, fontsize=7, va="center")
    ax.axvline(0, color="0.6", lw=0.8)
    ax.use_sticky_edges = False  # of bars: the widest would touch the axis
    ax.autoscale_view(scaley=False)
    tidy(ax)
    ax.grid(axis="y", visible=False)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_ylabel("same in", fontsize=9)
    ax.tick_params(axis="x", labelsize=7)
    ax.set_xlabel(f"{quantity}: pairs that are the same (or near)\nminus other pairs", fontsize=8)
    ax.set_title("what it follows", fontsize=10)


def _legend(families: dict[str, str]) -> list:
    handles = [Patch(color=colour, label=f"family: {family}") for family, colour in families.items()]
    handles += [
        Patch(facecolor=RANGE_COLOUR, label="diagonal: its own other seeds (similarity)"),
        Patch(facecolor=GREY, label="not told from chance"),
        Patch(facecolor="white", edgecolor="0.6", label="(similarity): no scale for u"),
        Patch(facecolor="white", edgecolor="0.6", hatch="////", label="no number"),
        Patch(facecolor=RANGE_COLOUR, label="right: 95 % of the orders of the architectures"),
    ]
    shapes = {"encoder": "encoders", "decoder": "decoders"}
    style = {"linestyle": "none", "mec": BLACK, "ms": 6}
    handles += [
        Line2D([], [], marker=MARKS[part], mfc="white", label=f"right: {word}", **style)
        for part, word in shapes.items()
    ]
    return [*handles, Line2D([], [], marker="o", mfc=VERMILLION, label="right: p below 0.05 (Holm)", **style)]


def u_by_depth(depth: pd.DataFrame, facts: pd.DataFrame, *, title: str, caption: str, synthetic: bool) -> Figure:
    """u against relative depth, a panel a part: each pair of labels a thin line, the median of each kind a thick one.

    depth : columns label_a, label_b, part, relative_depth (0 to 1), u; facts : label, family. Kinds: pairs of one
    family, and of two; pairs of a label with itself (u is 1 by construction) and cells without a scale are left out.
    """
    need_columns(depth, ["label_a", "label_b", "part", "relative_depth", "u"], "depth")
    need_columns(facts, ["label", "family"], "fact")
    family = facts.set_index("label")["family"]
    rows = depth[(depth["label_a"] != depth["label_b"]) & depth["u"].notna()]
    alike = rows["label_a"].map(family).to_numpy() == rows["label_b"].map(family).to_numpy()
    parts = list(depth["part"].unique())
    figure = new_figure(4.0 * len(parts) + 1.6, 3.0, title=title, caption=caption, synthetic=synthetic)
    for ax, part in zip(figure.subplots(1, len(parts), squeeze=False, sharey=True)[0], parts):
        here = (rows["part"] == part).to_numpy()
        _depth_lines(ax, {"one family": rows[here & alike], "two families": rows[here & ~alike]})
        ax.set_title(f"{part}s", fontsize=10)
        ax.set_xlabel("relative depth (0 first site, 1 last)", fontsize=9)
    figure.axes[0].set_ylabel("u: 0 untrained, 1 another seed", fontsize=9)
    handles = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)


def _depth_lines(ax: Axes, kinds: dict[str, pd.DataFrame]) -> None:
    for (kind, mine), colour in zip(kinds.items(), (BLUE, VERMILLION)):
        for _, pair in mine.groupby(["label_a", "label_b"]):
            ax.plot(pair["relative_depth"], pair["u"], color=colour, lw=0.6, alpha=0.35)
        median = mine.groupby("relative_depth")["u"].median()
        ax.plot(median.index, median, color=colour, marker="o", ms=4, lw=2, label=f"{kind}: median")
    ax.axhline(0, color="0.6", lw=0.8)
    ax.axhline(1, color="0.6", lw=0.8, ls="--")
    ax.set(xlim=(0, 1), ylim=SHOWN_U)
    tidy(ax)
