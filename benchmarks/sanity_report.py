"""What the sanity check found, as a table, a page and a figure.

Everything here is made of the rows of `sanity_check.row_of` and of what they were computed with, which is also all
that sanity_check.json holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from similarity.measures import MEASURES
from utils import InputError, markdown_table, write_table, write_text
from visualization import BLUE, GREEN, ORANGE, VERMILLION, new_figure, save, settle

COLUMNS = ("measure", "options", "policy", "identified_percent", "low", "high", "published_percent", "cells", "note")
TITLE = "Which measures find the same layer in a network of another seed?"
TABLE_NOTE = (
    "*Identified*: percent of the cells (layers × ordered pairs of networks) in which the best layer of the other "
    "network is the same layer and no other. Ties for the best are misses (CCA of n images is 1 by construction once "
    "two layers have n − 1 or more independent features together), and so are values that are not computable. *95 %*: "
    "Wilson's interval over cells; they share networks and images, so it is too narrow. *Range*: worst and best "
    "ordered pair. *Published*: Kornblith et al. 2019, table 2 (10 networks, CIFAR-10, whole layers flattened, "
    "asymmetric measures as S + Sᵀ), beside the same estimator here."
)
REASONS = (
    "Where CKA stays below the published figures, likely reasons are networks trained on {train:,} images (CIFAR-10 "
    "has 50,000) for {epochs} epochs and, for linear CKA, the pooling of maps (compare full with flat and gap)."
)
SHORTER = {"debiased=True": "debiased", "debiased=False": "biased", "fraction=": "", "variance=": ""}


def write(out: Path, stamp: dict, rows: Sequence[dict]) -> Path:
    """sanity_check.csv, .json, .md and .png in `out`; returns the path of the page."""
    table = pd.DataFrame(list(rows))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_table(table[list(COLUMNS)], out / "sanity_check.csv")
        known = stamp | {"rows": list(rows)}
        write_text(out / "sanity_check.json", json.dumps(known, indent=1, ensure_ascii=False) + "\n")
        write_text(out / "sanity_check.md", page_of(stamp, table))
        save(figure_of(stamp, table), out / "sanity_check.png")
    except OSError as error:
        raise InputError(f"the results cannot be written to {out} ({error}); choose another --out") from error
    return out / "sanity_check.md"


def page_of(stamp: dict, table: pd.DataFrame) -> str:
    """The results as a page."""
    config, data = stamp["config"], stamp["data"]
    right = ", ".join(f"seed {n['seed']} {n['validation_accuracy']:.1%}" for n in stamp["networks"])
    lines = [
        "# Does a measure find the same layer in a network of another seed?\n",
        f"{len(stamp['networks'])} networks (Tiny-10), {config['epochs']} epochs on the {data['train']['images']} "
        f"training images of {config['data']} at 32 px, compared on {config['n']} of its {data['val']['images']} "
        f"validation images. Right answers on all of those: {right}. Commit {stamp['environment']['commit']}; data "
        f"{data['train']['hash']} (train) and {data['val']['hash']} (val); settings, versions, and the counts of each "
        "layer and pair in `sanity_check.json`.\n",
    ]
    header = ["measure", "options", "identified %", "95 %", "range", "published %", "cells", "note"]
    for policy in table.policy.unique():
        rows = [_printed(row) for row in table[table.policy == policy].itertuples()]
        lines += [f"## Policy `{policy}`", markdown_table(header, rows)]
    reasons = REASONS.format(train=data["train"]["images"], epochs=config["epochs"])
    return "\n".join([*lines, TABLE_NOTE, "", reasons, ""])


def _printed(row) -> list:
    """The cells of one row of the page."""
    worst, best = min(row.per_pair.values()), max(row.per_pair.values())
    return [
        MEASURES[row.measure].label,
        row.options,
        f"{row.identified_percent:.1f}",
        f"{row.low:.1f} … {row.high:.1f}",
        f"{worst:.0f} … {best:.0f}",
        "–" if pd.isna(row.published_percent) else f"{row.published_percent:.1f}",
        row.cells,
        row.note,
    ]


def figure_of(stamp: dict, table: pd.DataFrame) -> Figure:
    """Dots: identified here, a colour a policy, with Wilson's interval; diamonds: published."""
    names = list(dict.fromkeys(zip(table.measure, table.options)))
    figure = new_figure(7.5, 0.3 * len(names) + 1.2, title=TITLE, caption=_caption(stamp, table), synthetic=False)
    ax = figure.subplots()
    found = dict(list(table.groupby("policy", sort=False)))
    for place, ((policy, rows), colour) in enumerate(zip(found.items(), (BLUE, ORANGE, GREEN))):
        heights = [names.index(name) + 0.22 * (place - 1) for name in zip(rows.measure, rows.options)]
        ax.hlines(heights, rows.low, rows.high, color=colour, lw=1.4, zorder=2)
        ax.plot(rows.identified_percent, heights, "o", color=colour, ms=5, zorder=3, label=f"here, policy {policy}")
    published = table[(table.policy == table.policy.iloc[0]) & table.published_percent.notna()]
    heights = [names.index(name) for name in zip(published.measure, published.options)]
    diamonds = {"color": "none", "markeredgecolor": VERMILLION, "mew": 1.5, "ms": 8, "zorder": 4}
    ax.plot(published.published_percent, heights, "D", label="published", **diamonds)
    layers = len(table.per_layer.iloc[0])
    ax.axvline(100 / layers, color="0.4", lw=1, ls=(0, (3, 2)), zorder=1, label=f"guessing, 1 in {layers}")
    _dress(ax, [_label(measure, options) for measure, options in names])
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return settle(figure)


def _caption(stamp: dict, table: pd.DataFrame) -> str:
    config, right = stamp["config"], [network["validation_accuracy"] for network in stamp["networks"]]
    cells = ", ".join(
        f"{rows.cells.iloc[0]} under {policy} ({len(rows.per_layer.iloc[0])} layers)"
        for policy, rows in table.groupby("policy", sort=False)
    )
    return (
        f"Tiny-10 networks, seeds {', '.join(map(str, config['seeds']))}, {config['epochs']} epochs on "
        f"{config['data']} at 32 px ({min(right):.0%} to {max(right):.0%} of its validation images right); "
        f"n = {config['n']} of those images recorded. Cells (layers × ordered "
        f"pairs of networks): {cells}. Bars: Wilson's 95 % interval over cells, which are not "
        "independent. Ties for the best count as misses. Published: Kornblith et al. 2019, table 2 (10 networks, "
        "CIFAR-10, whole layers flattened)"
    )


def _label(measure: str, options: str) -> str:
    """A measure with its options, as short as the figure's margin needs it."""
    for long, short in SHORTER.items():
        options = options.replace(long, short)
    return f"{MEASURES[measure].label} {options}".strip()


def _dress(ax, labels: Sequence[str]) -> None:
    """The axes around the dots, a row a label, the first on top."""
    ax.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6), xlim=(-3, 103))
    ax.set_xlabel("layers identified (% of cells)", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(axis="x", color="0.92", lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
