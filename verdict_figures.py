"""Figures of what the universality study concludes: u along the depth, stitched networks, one space for two models.

Takes tables, returns Figures in the manner of `visualization`, whose colours and layout it shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from visualization import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RANGE_COLOUR,
    SKY,
    VERMILLION,
    need_columns,
    new_figure,
    settle,
    tidy,
)

SHOWN_U = (-1.0, 2.0)  # u has no bounds where floor and ceiling are close; beyond these a triangle points outwards
GIVERS = {"cross": (BLACK, "o", "the other architecture"), "twin": (GREEN, "^", "its own from another seed")}
GIVERS |= {"untrained": (ORANGE, "v", "the other architecture, untrained")}


def position_by_depth(depth: pd.DataFrame, *, title: str, caption: str, synthetic: bool) -> Figure:
    """u at matched relative depth with its interval, a panel a part; floor (0) and ceiling (1) are bands of ± 0.1.

    depth : columns part, relative_depth, u, u_low, u_high; rows without a scale (u NaN) are crosses at the bottom.
    """
    need_columns(depth, ["part", "relative_depth", "u", "u_low", "u_high"], "depth")
    parts = list(depth["part"].unique())
    figure = new_figure(4.2 * len(parts) + 1.4, 3.0, title=title, caption=caption, synthetic=synthetic)
    low, high = SHOWN_U
    for ax, part in zip(figure.subplots(1, len(parts), squeeze=False, sharey=True)[0], parts):
        rows = depth[depth["part"] == part].sort_values("relative_depth")
        ax.axhspan(0.9, 1.1, color=GREEN, alpha=0.25, lw=0, label="at ceiling: another seed")
        ax.axhspan(-0.1, 0.1, color=ORANGE, alpha=0.3, lw=0, label="at floor: untrained twins")
        shown = rows[rows["u"].between(low, high)]
        ends = (rows["u_low"].clip(low, high), rows["u_high"].clip(low, high))
        ax.vlines(rows["relative_depth"], *ends, color=BLACK, lw=1.4)
        ax.plot(shown["relative_depth"], shown["u"], "o-", color=BLACK, lw=1.2, ms=5, label="u with 95 % interval")
        for outside, marker, height in ((rows["u"] > high, "^", high), (rows["u"] < low, "v", low)):
            if outside.any():
                ax.plot(rows.loc[outside, "relative_depth"], [height] * outside.sum(), marker, color=BLACK, mfc="white")
        if rows["u"].isna().any():
            where = rows.loc[rows["u"].isna(), "relative_depth"]
            ax.plot(where, [low] * len(where), "x", color=VERMILLION, label="no scale: ceiling not above floor")
        ax.set(xlim=(-0.03, 1.03), ylim=(low - 0.1, high + 0.1))
        ax.set_xlabel(f"relative depth in the {part} (0 first site, 1 last)", fontsize=9)
        ax.set_title(part, fontsize=10)
        tidy(ax)
    figure.axes[0].set_ylabel("u: 0 untrained, 1 another seed", fontsize=9)
    handles = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)


def stitched_dice(summary: pd.DataFrame, *, title: str, caption: str, synthetic: bool) -> Figure:
    """What a network keeps of its Dice when another's activation takes the place of its own; a row a receiving site.

    summary : columns receiver, site_b, kind (cross, twin, untrained), kept, low, high (as shares of its own) and
    without, the share kept with the site's mean in its place: what skip connections carry past it.
    """
    need_columns(summary, ["receiver", "site_b", "kind", "kept", "low", "high", "without"], "stitching")
    places = list(dict.fromkeys(zip(summary["receiver"], summary["site_b"])))
    figure = new_figure(8.0, 0.5 * len(places) + 1.3, title=title, caption=caption, synthetic=synthetic)
    ax = figure.subplots()
    for offset, (kind, (colour, marker, label)) in zip((-0.18, 0.0, 0.18), GIVERS.items()):
        rows = summary[summary["kind"] == kind]
        y = [places.index(place) + offset for place in zip(rows["receiver"], rows["site_b"])]
        ax.hlines(y, rows["low"], rows["high"], color=colour, lw=1.5)
        ax.plot(rows["kept"], y, marker, color=colour, ms=6, linestyle="none", label=label)
    bare = summary.drop_duplicates(["receiver", "site_b"])
    y = [places.index(place) for place in zip(bare["receiver"], bare["site_b"])]
    ax.plot(bare["without"], y, "x", color=PURPLE, ms=7, mew=1.8, linestyle="none", label="nobody: the site's mean")
    ax.axvline(1, color="0.6", lw=1, linestyle="--")
    ax.set_yticks(range(len(places)), [f"{site}\nin {receiver}" for receiver, site in places], fontsize=7)
    ax.set_ylim(len(places) - 0.5, -0.5)
    ax.set_xlabel("Dice kept, as a share of the receiving network's own", fontsize=9)
    ax.set_ylabel("activation replaced", fontsize=9)
    tidy(ax)
    ax.grid(axis="x", color="0.92", linewidth=0.8)
    figure.legend(loc="outside right center", fontsize=8, frameon=False, title="activation given by", title_fontsize=8)
    return settle(figure)


def shared_space(
    panels: Sequence[tuple[str, np.ndarray, np.ndarray]],
    colours: np.ndarray,
    *,
    names: Sequence[str],
    colour_label: str,
    title: str,
    caption: str,
    synthetic: bool,
) -> Figure:
    """Both models' held-out images in the first two shared coordinates, the same image in the same colour.

    panels : (name, a (n, ≥ 2), b (n, ≥ 2)); colours : (n,) one number an image; names : of the two models
    """
    figure = new_figure(3.3 * len(panels) + 1.2, 3.3, title=title, caption=caption, synthetic=synthetic)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    options = {"c": colours, "cmap": "cividis", "s": 16, "lw": 0.4, "zorder": 3}
    for ax, (name, a, b) in zip(axes, panels):
        ax.plot(*np.stack([a[:, :2], b[:, :2]]).transpose(2, 0, 1), color="0.85", lw=0.6, zorder=1)
        drawn = ax.scatter(*a[:, :2].T, marker="o", edgecolors="black", label=names[0], **options)
        ax.scatter(*b[:, :2].T, marker="^", edgecolors=VERMILLION, label=names[1], **options)
        tidy(ax)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("first shared coordinate", fontsize=8)
    axes[0].set_ylabel("second shared coordinate", fontsize=8)
    bar = figure.colorbar(drawn, ax=list(axes), fraction=0.04, pad=0.02)
    bar.set_label(colour_label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return settle(figure)


def legacy_points(table: pd.DataFrame, *, title: str, caption: str, synthetic: bool) -> Figure:
    """The earlier study's number, its recipe here (twice), the corrected number; a row a site pair, a panel a measure.

    table : columns pair, measure, published, run_1, run_2, corrected, null_high, ceiling; NaN where there is none.
    """
    need_columns(
        table, ["pair", "measure", "published", "run_1", "run_2", "corrected", "null_high", "ceiling"], "legacy"
    )
    measures, pairs = list(table["measure"].unique()), list(table["pair"].unique())
    figure = new_figure(
        2.6 * len(measures) + 3.0, 0.42 * len(pairs) + 1.4, title=title, caption=caption, synthetic=synthetic
    )
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for ax, measure in zip(axes, measures):
        rows = table[table["measure"] == measure].set_index("pair").reindex(pairs)
        y = np.arange(len(pairs))
        ax.barh(y, rows["ceiling"], color=RANGE_COLOUR, height=0.6, label="up to the corrected ceiling")
        ax.hlines(y, rows[["run_1", "run_2"]].min(axis=1), rows[["run_1", "run_2"]].max(axis=1), color=SKY, lw=1.5)
        ax.plot(rows["published"], y, "x", color=PURPLE, ms=7, label="published")
        for run, label in (("run_1", "the same recipe here, twice"), ("run_2", "")):
            ax.plot(rows[run], y, "o", color=BLUE, ms=4, mfc="white", label=label or None)
        ax.plot(rows["corrected"], y, "D", color=BLACK, ms=5, label="corrected")
        ax.plot(rows["null_high"], y, "|", color=VERMILLION, ms=12, label="95 % point of its null")
        ax.axvline(0, color="0.75", lw=0.8, zorder=0)
        ax.set_title(measure, fontsize=9)
        tidy(ax)
        ax.set_xlabel("similarity", fontsize=8)
    axes[0].set_yticks(range(len(pairs)), pairs, fontsize=7)
    axes[0].set_ylim(len(pairs) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)


def region_bars(regions: pd.DataFrame, *, title: str, caption: str, synthetic: bool) -> Figure:
    """Similarity by region of the image with floor and ceiling, a panel a part.

    regions : columns region, part, similarity, similarity_low, similarity_high, floor, ceiling.
    """
    columns = ["region", "part", "similarity", "similarity_low", "similarity_high", "floor", "ceiling"]
    need_columns(regions, columns, "region")
    parts, names = list(regions["part"].unique()), list(regions["region"].unique())
    figure = new_figure(3.2 * len(parts) + 1.8, 2.9, title=title, caption=caption, synthetic=synthetic)
    for ax, part in zip(figure.subplots(1, len(parts), squeeze=False, sharey=True)[0], parts):
        rows = regions[regions["part"] == part].set_index("region").loc[names]
        x = np.arange(len(names))
        scaled = (rows["ceiling"] > rows["floor"]).to_numpy()
        height = (rows["ceiling"] - rows["floor"])[scaled]
        ax.bar(x[scaled], height, bottom=rows["floor"][scaled], color=RANGE_COLOUR, width=0.6, label="floor to ceiling")
        ax.vlines(x, rows["similarity_low"], rows["similarity_high"], color=BLACK, lw=1.5)
        ax.plot(x, rows["similarity"], "o", color=BLACK, ms=6, label="observed, 95 % interval")
        ax.set_xticks(x, names, fontsize=8)
        ax.set_xlabel("region of the image", fontsize=9)
        ax.set_title(part, fontsize=10)
        tidy(ax)
    figure.axes[0].set_ylabel("debiased linear CKA", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)
