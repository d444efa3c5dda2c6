"""Figures about explanations: which models explain alike, are the maps faithful, and what does their agreement follow?

Takes tables, returns Figures in the manner of `visualization`, whose colours and layout it shares. The maps themselves
are drawn in `pictures`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.cluster.hierarchy import dendrogram
from scipy.integrate import trapezoid

from explanations.clusters import LOUVAIN, tree
from grid_figures import looks_of
from utils import InputError
from visualization import (
    BLACK,
    BLUE,
    MODEL_COLOURS,
    SEED_STYLES,
    need_columns,
    new_figure,
    settle,
    tidy,
)

CELL = 0.3  # inches
DODGE = 0.012  # of the resolutions' range, between two methods


def similarity_map(
    similarity: pd.DataFrame,
    dissimilarity: pd.DataFrame,
    families: Mapping[str, str],
    *,
    title: str = "Which models explain alike?",
    label: str = "mean similarity of explanations",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """Heat map of a (K, K) similarity in the order of the leaves of the average-linkage tree of the dissimilarity.

    similarity, dissimilarity : tables with the same models as rows and columns (`clusters.square`)
    families : model -> e.g. 'CNN', the colour of its name and of a strip beside the map
    """
    if list(similarity.index) != list(dissimilarity.index):
        raise InputError("similarity and dissimilarity have different models, or another order; give one order")
    missing = [model for model in similarity.index if model not in families]
    if missing:
        raise InputError(f"{len(missing)} models have no family, first {missing[0]!r}; give one for each")
    linked = tree(dissimilarity)
    order = dendrogram(linked, no_plot=True)["leaves"]
    names = [similarity.index[place] for place in order]
    side, letters = max(CELL * len(names), 2.4), 0.075 * max(map(len, names))
    size, note = (side + letters + 3.2, side + letters + 1.9), "Grey: a model with itself"
    figure = new_figure(*size, title=title, caption=caption, synthetic=synthetic, note=note)
    ax = figure.subplots()
    _heat(figure, ax, similarity.loc[names, names], label)
    colours = dict(zip(dict.fromkeys(families.values()), MODEL_COLOURS))
    shades = [colours.get(families[name], BLACK) for name in names]
    strip, top = ax.inset_axes([0, 1.01, 1, 0.12 / side]), ax.inset_axes([0, 1.02 + 0.12 / side, 1, 0.9 / side])
    strip.bar(range(len(names)), 1, width=1, color=shades)
    strip.set(xlim=ax.get_xlim(), ylim=(0, 1))
    strip.axis("off")
    _tree(top, dendrogram(linked, no_plot=True), ax.get_xlim())
    for ticks in (ax.get_xticklabels(), ax.get_yticklabels()):
        for tick, shade in zip(ticks, shades):
            tick.set_color(shade)
    handles = [Patch(color=shade, label=family) for family, shade in colours.items()]
    style = {"fontsize": 8, "frameon": False, "title_fontsize": 8}
    figure.legend(handles=handles, loc="outside right upper", title="family", **style)
    return settle(figure)


def _heat(figure: Figure, ax: Axes, table: pd.DataFrame, label: str) -> None:
    """Cells in the given order; the diagonal, what a model has with itself, is left grey."""
    values = table.to_numpy(dtype=float)
    shown = np.ma.masked_array(values, np.eye(len(values), dtype=bool) | ~np.isfinite(values))
    low, high = float(min(shown.min(), 0)), float(shown.max())
    high = high if high > low else low + 1.0
    signed = {"cmap": "PuOr_r", "vmin": -max(-low, high), "vmax": max(-low, high)}
    ax.patch.set_facecolor("0.88")
    drawn = ax.imshow(shown, **signed if low < 0 else {"cmap": "cividis", "vmin": low, "vmax": high})
    if len(values) <= 12:
        for (y, x), value in np.ndenumerate(values):
            if y != x:
                dark = np.dot(drawn.to_rgba(value)[:3], (0.299, 0.587, 0.114)) < 0.5
                ax.text(
                    x,
                    y,
                    f"{value:.2f}".replace("-", "−"),
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if dark else BLACK,
                )
    ax.set_xticks(range(len(values)), table.columns, rotation=90, fontsize=8)
    ax.set_yticks(range(len(values)), table.index, fontsize=8)
    ax.tick_params(length=0)
    ax.set_xlabel("model", fontsize=9)
    ax.set_ylabel("model", fontsize=9)
    bar = figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _tree(ax: Axes, found: Mapping, limits: tuple[float, float]) -> None:
    """scipy's dendrogram with its leaves at 0, 1, … and the dissimilarity upwards."""
    for x, y in zip(found["icoord"], found["dcoord"]):
        ax.plot((np.array(x) - 5) / 10, y, color=BLACK, lw=1.1)
    ax.set(xlim=limits, xticks=[])
    ax.set_ylim(bottom=0)
    ax.set_ylabel("dissimilarity", fontsize=7)
    ax.tick_params(labelsize=6)
    ax.spines[["top", "right", "bottom"]].set_visible(False)


def ari_by_resolution(
    table: pd.DataFrame,
    *,
    title: str = "Do the groups of models follow their architecture?",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """Adjusted Rand index of Louvain communities with the labels against the resolution; a panel a similarity.

    table : of `clusters.cluster_table`, with columns method, similarity, clustering, parameter, ari, p_adjusted.
    Filled marks: adjusted p below 0.05. Methods at one resolution stand beside each other.
    """
    columns = ["method", "similarity", "clustering", "parameter", "ari", "p_adjusted"]
    need_columns(table, columns, "cluster")
    rows = table[(table["clustering"] == LOUVAIN) & table["ari"].notna()]
    if rows.empty:
        raise InputError("the cluster table has no Louvain communities with an index; there is nothing to draw")
    reach = np.ptp(rows["parameter"])
    panels, methods = list(dict.fromkeys(rows["similarity"])), list(dict.fromkeys(rows["method"]))
    figure = new_figure(2.9 * len(panels) + 1.6, 2.9, title=title, caption=caption, synthetic=synthetic)
    for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels):
        for place, (method, (colour, marker)) in enumerate(looks_of(methods).items()):
            part = rows[(rows["similarity"] == panel) & (rows["method"] == method)].sort_values("parameter")
            x = part["parameter"] + DODGE * reach * (place - (len(methods) - 1) / 2)
            ax.plot(x, part["ari"], color=colour, marker=marker, ms=5, mfc="white", lw=1.3, label=method)
            sure = part["p_adjusted"] < 0.05
            ax.plot(x[sure], part.loc[sure, "ari"], marker, color=colour, ms=5)
        ax.axhline(0, color="0.7", lw=0.8, zorder=0)
        ax.set_title(panel, fontsize=9)
        ax.set(xlabel="resolution γ", ylim=(min(-0.1, rows["ari"].min() - 0.05), 1.05))
        tidy(ax)
    figure.axes[0].set_ylabel("adjusted Rand index\n(1: the labels, 0: chance)", fontsize=8)
    handles = figure.axes[0].get_legend_handles_labels()[0]
    handles.append(Line2D([], [], ls="none", marker="o", color="0.4", label="p < 0.05 (adjusted)"))
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)


def deletion_curves(
    table: pd.DataFrame,
    *,
    title: str = "Do the explanations point at what the model uses?",
    ylabel: str = "score / score of the whole image",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """Score against the share of pixels deleted or inserted, most important first; the area under each in the legend.

    table : columns kind ('deletion', 'insertion'), label, fraction (0 to 1), score, low, high (NaN without interval);
    one row each. A faithful map falls early when deleting (small area) and rises early when inserting (large area).
    """
    need_columns(table, ["kind", "label", "fraction", "score", "low", "high"], "deletion")
    if not table["fraction"].between(0, 1).all() or table.duplicated(["kind", "label", "fraction"]).any():
        raise InputError("the deletion table has fractions outside [0, 1] or several rows for one; give one row each")
    labels, kinds = list(dict.fromkeys(table["label"])), list(dict.fromkeys(table["kind"]))
    longest = max(len(str(label)) for label in labels)
    width = (3.2 + 0.07 * longest + 0.6) * len(kinds)
    figure = new_figure(width, 2.9, title=title, caption=caption, synthetic=synthetic)
    for ax, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        for place, label in enumerate(labels):
            rows = table[(table["kind"] == kind) & (table["label"] == label)].sort_values("fraction")
            if rows.empty:
                continue
            colour = MODEL_COLOURS[place % len(MODEL_COLOURS)]
            style = SEED_STYLES[place // len(MODEL_COLOURS) % len(SEED_STYLES)]
            area = trapezoid(rows["score"], rows["fraction"])
            ax.fill_between(rows["fraction"], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0)
            ax.plot(rows["fraction"], rows["score"], color=colour, ls=style, lw=1.6, label=f"{label}: {area:.2f}")
        word = {"deletion": "deleted", "insertion": "inserted"}.get(kind, kind)
        ax.set(xlabel=f"share of the pixels {word}, most important first", ylabel=ylabel, xlim=(0, 1), title=kind)
        ax.title.set_fontsize(10)
        tidy(ax)
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
        ax.legend(title="area under the curve", fontsize=7, title_fontsize=7, **beside)
    return settle(figure)


def agreement_scatter(
    points: pd.DataFrame,
    found: pd.DataFrame,
    *,
    title: str = "Are images explained alike where models agree otherwise?",
    ylabel: str = "agreement of the explanations",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """One mark an image: explanation agreement against each other agreement, a panel each.

    points : columns other, x (the other agreement), y (explanation agreement), one row an image and other
    found : of `masks.follows_per_image`: Spearman's ρ with its interval and p stands above each panel
    """
    need_columns(points, ["other", "x", "y"], "agreement")
    need_columns(
        found, ["other", "n", "spearman", "low", "high", "p", "partial", "partial_low", "partial_high"], "correlation"
    )
    names = list(dict.fromkeys(points["other"]))
    missing = [name for name in names if name not in set(found["other"])]
    if missing:
        raise InputError(f"the correlation table has no row for {missing[0]!r}, which has points; add its row")
    figure = new_figure(3.4 * len(names) + 0.6, 3.2, title=title, caption=caption, synthetic=synthetic)
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names):
        rows, row = points[points["other"] == name], found.set_index("other").loc[name]
        ax.plot(rows["x"], rows["y"], "o", color=BLUE, ms=4, alpha=0.6, mec="none")
        ax.set_title(_correlation(row), fontsize=8)
        ax.set_xlabel(textwrap.fill(name, 38))
        tidy(ax)
    figure.axes[0].set_ylabel(ylabel)
    return settle(figure)


def _correlation(row: pd.Series) -> str:
    """In words: Spearman's ρ with interval and p, and the partial one where there is one."""
    if np.isnan(row["spearman"]):
        return f"n = {row['n']}: no correlation, one side is constant"
    words = f"Spearman {row['spearman']:.2f} [{row['low']:.2f}, {row['high']:.2f}], p = {row['p']:.2g}, n = {row['n']}"
    if not np.isnan(row["partial"]):
        words += f"\nfor equal area {row['partial']:.2f} [{row['partial_low']:.2f}, {row['partial_high']:.2f}]"
    return words.replace("-", "−")
