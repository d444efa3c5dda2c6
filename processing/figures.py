"""Figures of processing steps: planes of two networks, best matches, smoothness along the depth, and what sites keep.

Takes tables, returns Figures in the manner of `visualization`, whose colours and layout it shares. Each answers one
question, named in its title.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from processing.planes import grid
from visualization import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILLION,
    need_columns,
    new_figure,
    settle,
    tidy,
)

TRAINING_COLOURS = {"classifier": BLUE, "self-supervised": GREEN, "segmentation": VERMILLION, "untrained": "0.55"}
FAMILY_STYLES = {"CNN": "-", "transformer": "--", "hybrid": ":"}
FAMILY_COLOURS = {"CNN": BLUE, "transformer": VERMILLION, "hybrid": GREEN}
RELATION_COLOURS = {"another seed": BLACK, "same body and seed": GREEN, "same body": PURPLE, "same family": BLUE}
RELATION_COLOURS["other family"] = VERMILLION
BROKEN = {"self-supervised": "self-\nsupervised", "segmentation": "segmen-\ntation"}  # where there is little room
PANEL = 2.3  # inches
COLUMNS = 4


def planes(
    tables: Mapping[str, pd.DataFrame],
    *,
    title: str,
    label: str,
    caption: str,
    synthetic: bool,
    value: str = "both",
    best: bool = True,
) -> Figure:
    """Heat maps of one value over depth × depth, one panel a pair of networks, on one scale; dots are best matches.

    tables : title of a panel, 'A | B' -> table of planes as `planes.similarity_planes` gives it
    best : whether best matches are marked
    """
    columns = min(COLUMNS, len(tables))
    rows = -(-len(tables) // columns)
    figure = new_figure(PANEL * columns + 1.0, (PANEL + 0.35) * rows, title=title, caption=caption, synthetic=synthetic)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    grids = {name: grid(table, value) for name, table in tables.items()}
    sign = -1 if value in ("linear_cka", "mutual_knn") else 1
    shown = np.concatenate([one.values.ravel() * sign for one in grids.values()])
    norm = Normalize(min(0.0, np.nanmin(shown)), np.nanmax(shown))
    colours = "cividis_r" if sign > 0 else "cividis"
    for ax, (name, one) in zip(axes, grids.items()):
        a, _, b = name.partition(" | ")
        edges_a, edges_b = _edges(one.depth_a), _edges(one.depth_b)
        ax.pcolormesh(edges_b, edges_a, one.values * sign, cmap=colours, norm=norm)
        ax.plot([0, 1], [0, 1], color="white", lw=0.8, ls="--")
        if best:
            _best(ax, one)
        ax.set(xlim=(edges_b[0], 1), ylim=(edges_a[0], 1))
        ax.set_xlabel(_wrapped(f"depth of {b}"), fontsize=7)
        ax.set_ylabel(_wrapped(f"depth of {a}"), fontsize=7)
        ax.tick_params(labelsize=6)
    for ax in axes[len(grids) :]:
        ax.set_axis_off()
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes.tolist(), fraction=0.03, pad=0.01, aspect=30)
    bar.set_label(_wrapped(label), fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return settle(figure)


def _wrapped(text: str) -> str:
    """In lines that are no longer than a panel."""
    return "\n".join(textwrap.wrap(text, 30))


def _edges(depths: np.ndarray) -> np.ndarray:
    """Borders of cells whose upper ends are the depths."""
    return np.concatenate([[max(0.0, depths[0] - (depths[1] - depths[0] if len(depths) > 1 else 1))], depths])


def _best(ax: Axes, one) -> None:
    """A mark at the best match of every site: round and white of A's sites, square and orange of B's."""
    middle_a, middle_b = ((_edges(each)[1:] + _edges(each)[:-1]) / 2 for each in (one.depth_a, one.depth_b))
    for best, marker, colour, size in ((one.best(0), "s", ORANGE, 22), (one.best(1), "o", "white", 9)):
        i, j = np.nonzero(best > 0)
        ax.scatter(middle_b[j], middle_a[i], s=size, marker=marker, facecolor=colour, edgecolor=BLACK, linewidth=0.6)


def matched_depths(
    relations: pd.DataFrame, curves: pd.DataFrame, *, title: str, caption: str, synthetic: bool
) -> Figure:
    """Above: how far best matches are from equal depth, against chance; below: the imbalance of matched depths.

    relations : training, relation, quantity, mean, low, high; curves : training, relation, depth, matched as mean
    """
    need_columns(relations, ["training", "relation", "quantity", "mean", "low", "high"], "relations")
    need_columns(curves, ["training", "relation", "depth", "mean", "low", "high"], "curves")
    trainings = list(dict.fromkeys(relations["training"]))
    figure = new_figure(2.5 * len(trainings) + 1.6, 5.2, title=title, caption=caption, synthetic=synthetic)
    above, below = figure.subplots(2, len(trainings), squeeze=False, sharey="row")
    for column, training in enumerate(trainings):
        of_training = relations[relations["training"] == training]
        _distances(above[column], of_training)
        above[column].set_title(training, fontsize=9)
        for relation, line in curves[curves["training"] == training].groupby("relation", sort=False):
            colour = RELATION_COLOURS[relation]
            below[column].plot(line["depth"], line["mean"], color=colour, lw=1.5, marker="o", ms=2.5)
            below[column].fill_between(line["depth"], line["low"], line["high"], color=colour, alpha=0.15, lw=0)
        below[column].set(xlabel="relative depth", xlim=(0, 1))
        tidy(below[column])
    below[0].set_ylim(0, 1.25 * curves["mean"].max())  # a wide band may leave the panel
    above[0].set_ylabel("distance of best matches\n(relative depth)")
    below[0].set_ylabel("imbalance at matched depth\n(0 all, 1 nothing shared)")
    there = {name: colour for name, colour in RELATION_COLOURS.items() if name in set(relations["relation"])}
    handles = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in there.items()]
    handles += [Line2D([], [], color="0.5", marker="_", ls="none", ms=10, mew=2, label="chance (shuffled sites)")]
    figure.legend(handles=handles, loc="outside right center", fontsize=7, frameon=False)
    return settle(figure)


def _distances(ax: Axes, table: pd.DataFrame) -> None:
    """A point a relation with its interval, and the chance level beside it."""
    relations = [name for name in RELATION_COLOURS if name in set(table["relation"])]
    for place, relation in enumerate(relations):
        own = table[table["relation"] == relation].set_index("quantity")
        row = own.loc["distance"]
        reach = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
        ax.errorbar([place], [row["mean"]], yerr=reach, fmt="o", color=RELATION_COLOURS[relation], ms=5, capsize=3)
        ax.plot([place], [own.loc["chance", "mean"]], marker="_", ms=14, mew=2, color="0.5")
    ax.set_xticks(range(len(relations)), [name.replace(" ", "\n") for name in relations], fontsize=7)
    ax.set(xlim=(-0.6, len(relations) - 0.4))
    _reach_up(ax, table.loc[table["quantity"].isin(("distance", "chance")), ["mean", "high"]].to_numpy())
    tidy(ax)


def _reach_up(ax: Axes, values: np.ndarray, room: float = 1.05) -> None:
    """From 0 to where the highest value has its room; of axes that are shared the highest of all."""
    others = [other for other in ax.get_shared_y_axes().get_siblings(ax) if not other.get_autoscaley_on()]
    tops = [other.get_ylim()[1] for other in others] + [room * value for value in np.ravel(values) if value > 0]
    if tops:  # none of NaN alone
        ax.set_ylim(0, max(tops))


def smooth_steps(
    steps: pd.DataFrame,
    facts: pd.DataFrame,
    *,
    title: str,
    caption: str,
    synthetic: bool,
    change: str = "both",
    against: Mapping[str, str] | None = None,
) -> Figure:
    """The change into every site: rows of panels by what it is drawn against, columns by training, a line a network.

    steps : network, depth_to, {parameters, operations}_share and the change; facts : network, family, training
    """
    against = against or {
        "depth_to": "relative depth",
        "parameters_share": "share of the parameters spent",
        "operations_share": "share of the operations spent",
    }
    need_columns(steps, ["network", change, *against], "steps")
    steps = steps.merge(facts[["network", "family", "training"]], on="network")
    trainings = [name for name in TRAINING_COLOURS if name in set(steps["training"])]
    height = 2.1 * len(against) + 0.4
    figure = new_figure(2.5 * len(trainings) + 1.4, height, title=title, caption=caption, synthetic=synthetic)
    axes = figure.subplots(len(against), len(trainings), squeeze=False, sharey=True)
    for row, (column, words) in enumerate(against.items()):
        for place, training in enumerate(trainings):
            ax = axes[row, place]
            for (_, family), path in steps[steps["training"] == training].groupby(["network", "family"], sort=False):
                ax.plot(
                    path[column],
                    path[change],
                    color=FAMILY_COLOURS[family],
                    lw=0.9,
                    alpha=0.75,
                    marker="o",
                    ms=1.8,
                    clip_on=False,
                )
            ax.set(xlabel=words, xlim=(0, 1))
            tidy(ax)
            if not row:
                ax.set_title(training, fontsize=9)
        axes[row, 0].set_ylabel("change into the site" if change == "both" else "1 − CKA of neighbours")
    families = [family for family in FAMILY_COLOURS if family in set(steps["family"])]
    handles = [Line2D([], [], color=FAMILY_COLOURS[family], label=family) for family in families]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)


def families_compared(
    smooth: pd.DataFrame, tests: pd.DataFrame, *, title: str, caption: str, synthetic: bool, change: str = "both"
) -> Figure:
    """Mean, unevenness and largest jump of every body, CNNs beside transformers, by training and rule of sites.

    smooth : label, body, family, training, rule, change, mean, cv, largest; tests : training, rule, change, statistic,
        p_holm
    """
    names = {"mean": "mean change", "cv": "coefficient of variation", "largest": "largest jump"}
    need_columns(smooth, ["body", "family", "training", "rule", "change", *names], "smoothness")
    need_columns(tests, ["training", "rule", "change", "statistic", "p_holm"], "families")
    smooth, tests = smooth[smooth["change"] == change], tests[tests["change"] == change]
    trainings = [name for name in TRAINING_COLOURS if name in set(smooth["training"])]
    rules = list(dict.fromkeys(smooth["rule"]))
    figure = new_figure(3.2 * len(rules) + 1.2, 6.2, title=title, caption=caption, synthetic=synthetic)
    axes = figure.subplots(len(names), len(rules), squeeze=False, sharey="row")
    for row, (statistic, words) in enumerate(names.items()):
        for column, rule in enumerate(rules):
            ax = axes[row, column]
            own = smooth[smooth["rule"] == rule].groupby(["training", "family", "body"])[statistic].mean().reset_index()
            _beside(ax, own, statistic, trainings)
            _say_p(ax, tests[(tests["rule"] == rule) & (tests["statistic"] == statistic)], trainings)
            tidy(ax)
            if not row:
                ax.set_title(f"sites: {rule}", fontsize=9)
        axes[row, 0].set_ylabel(words)
    shown = [family for family in FAMILY_COLOURS if family in set(smooth["family"])]
    handles = [Line2D([], [], color=FAMILY_COLOURS[f], marker="o", ls="none", label=f) for f in shown]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)


def _beside(ax: Axes, own: pd.DataFrame, statistic: str, trainings: Sequence[str]) -> None:
    families = [family for family in FAMILY_COLOURS if family in set(own["family"])]
    for place, training in enumerate(trainings):
        for shift, family in zip(np.linspace(-0.18, 0.18, len(families)), families):
            values = own[(own["training"] == training) & (own["family"] == family)][statistic].dropna()
            ax.plot([place + shift] * len(values), values, "o", ms=3.5, color=FAMILY_COLOURS[family], alpha=0.7)
            if len(values):
                mean = values.mean()
                ax.plot([place + shift - 0.14, place + shift + 0.14], [mean, mean], color=FAMILY_COLOURS[family], lw=2)
    ax.set_xticks(range(len(trainings)), [BROKEN.get(name, name) for name in trainings], fontsize=7)
    ax.set(xlim=(-0.5, len(trainings) - 0.5))
    _reach_up(ax, own[statistic].to_numpy(), room=1.15)  # p stands above the dots


def _say_p(ax: Axes, tests: pd.DataFrame, trainings: Sequence[str]) -> None:
    place = ax.get_xaxis_transform()
    for row in tests.itertuples():
        if row.training in trainings and np.isfinite(row.p_holm):
            where, text = trainings.index(row.training), f"p = {row.p_holm:.2g}"
            ax.text(where, 0.99, text, fontsize=6, ha="center", va="top", color="0.3", transform=place)


def _at_tenths(kept: pd.DataFrame) -> pd.DataFrame:
    """R² of every network and statistic at the tenths of the depth, linearly between its sites."""
    tenths, parts = np.linspace(0.1, 1, 10), []
    for (network, statistic), own in kept.groupby(["network", "statistic"], sort=False):
        values = np.interp(tenths, own["depth"], own["r2"], left=np.nan)
        parts.append(pd.DataFrame({"network": network, "statistic": statistic, "tenth": tenths, "r2": values}))
    return pd.concat(parts, ignore_index=True).dropna()


def kept_along_depth(
    kept: pd.DataFrame, facts: pd.DataFrame, *, title: str, caption: str, synthetic: bool, columns: int = 4
) -> Figure:
    """R² of a linear read-out along the depth, one panel a statistic: the median network by training and family.

    kept : network, depth, statistic, r2; facts : network, family, training. Untrained twins, the floor, are a grey band
    from the lowest to the highest family's median.
    """
    need_columns(kept, ["network", "depth", "statistic", "r2"], "kept")
    kept = _at_tenths(kept).merge(facts[["network", "family", "training"]], on="network")
    statistics = list(dict.fromkeys(kept["statistic"]))
    rows = -(-len(statistics) // columns)
    figure = new_figure(2.3 * columns + 1.5, 2.0 * rows, title=title, caption=caption, synthetic=synthetic)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    families = [family for family in FAMILY_STYLES if family in set(kept["family"])]
    trainings = [name for name in TRAINING_COLOURS if name in set(kept["training"])]
    for ax, statistic in zip(axes, statistics):
        own = kept[kept["statistic"] == statistic]
        means = own.groupby(["training", "family", "tenth"])["r2"].median()
        if "untrained" in trainings:
            floor = means.loc["untrained"].unstack("family")
            ax.fill_between(floor.index, floor.min(axis=1), floor.max(axis=1), color="0.8", lw=0, zorder=0)
        for training in trainings:
            for family in families:
                if training != "untrained" and (training, family) in means.index.droplevel(2):
                    line = means.loc[training, family]
                    ax.plot(line.index, line, color=TRAINING_COLOURS[training], ls=FAMILY_STYLES[family], lw=1.3)
        ax.set_title(statistic.replace("_", " "), fontsize=8)
        ax.axhline(0, color="0.6", lw=0.6)
        ax.set(xlim=(0, 1), ylim=(min(-0.05, max(-0.3, means.min() - 0.02)), 1.02))
        tidy(ax)
        ax.tick_params(labelsize=7)
    for ax in axes[len(statistics) :]:
        ax.set_axis_off()
    for ax in axes[-columns:]:
        ax.set_xlabel("relative depth", fontsize=8)
    for place in range(0, len(axes), columns):
        axes[place].set_ylabel("R²", fontsize=8)
    shown = [name for name in trainings if name != "untrained"]
    handles = [Line2D([], [], color=TRAINING_COLOURS[name], lw=2, label=name) for name in shown]
    handles += [Patch(color="0.8", label="untrained (floor)")] if "untrained" in trainings else []
    handles += [Line2D([], [], color="0.3", ls=FAMILY_STYLES[family], label=family) for family in families]
    figure.legend(handles=handles, loc="outside right center", fontsize=7, frameon=False)
    return settle(figure)
