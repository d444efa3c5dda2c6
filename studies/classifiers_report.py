"""What the training of classifiers found, in words and pictures: summary.md and the learning curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from classification.photos import class_names
from utils import format_seconds, git_commit, markdown_table, write_text
from visualization import MODEL_COLOURS, SEED_STYLES, need_columns, new_figure, save, settle, tidy

# what a way of training is followed by: column of the history, and its words
YARDSTICKS = {
    "supervised": ("val_accuracy", "top-1 on validation photographs"),
    "simclr": ("val_loss", "SimCLR's loss on validation photographs"),
}
INTERVALS = "95 % Wilson score intervals over the photographs: they do not cover what another seed would give"


def write(folder: Path, table: pd.DataFrame, history: pd.DataFrame, data: Mapping, config) -> None:
    """summary.md and learning_curves.png of a results folder."""
    caption = f"{_photographs(data)}. On the validation photographs after every epoch; the last weights are kept."
    save(learning_curves(history, caption=caption, synthetic=config.is_synthetic), folder / "learning_curves.png")
    write_text(folder / "summary.md", summary(folder, table, data, config))


def summary(folder: Path, table: pd.DataFrame, data: Mapping, config) -> str:
    """The page: accuracies, what they are of, and how they were made."""
    return "\n".join(
        [
            "# Small networks, trained here from scratch\n",
            _kind_of_data(config, data),
            f"{len(table)} networks: {_ranges(table)}.\n",
            markdown_table(*_accuracies(table)),
            f"Top-1 on {int(table['n'].iloc[0])} validation photographs, {INTERVALS}.{_probed(table)} Nothing was "
            "chosen on these photographs: every network is the one after its last epoch, and epochs and learning rates "
            "are as in config.yaml. GFLOPs are 10^9 operations of one photograph, two a multiply-accumulate, of matrix "
            "products and convolutions; ms is a photograph's share of a batch of 16, on this machine.\n",
            "![learning curves](learning_curves.png)\n",
            _stamp(folder, data, table),
        ]
    )


def _photographs(data: Mapping) -> str:
    train, val = data["train"], data["val"]
    counts = f"{train['photographs']} training and {val['photographs']} validation photographs"
    return f"{counts} of {len(train['classes'])} classes"


def _kind_of_data(config, data: Mapping) -> str:
    names = ", ".join(class_names(data["train"]["classes"]))
    source = "the **synthetic** photo set (drawn shapes: it shows that the code runs, and nothing about photographs)"
    source = source if config.is_synthetic else f"`{Path(config.data).name}`"
    augmented = "random crops and flips" if config.smallest_crop < 1 else "no augmentation"
    return f"{_photographs(data)} ({names}) from {source}, at {config.image_size} px, trained with {augmented}.\n"


def _probed(table: pd.DataFrame) -> str:
    """What the accuracy of networks without a head is."""
    if not (table["measured_by"] == "linear probe").any():
        return ""
    return (
        " Networks that were trained by SimCLR (Chen et al. 2020) have seen no label: their accuracy is that of a "
        "logistic regression on their frozen, standardised features, fitted to the training photographs."
    )


def _ranges(table: pd.DataFrame) -> str:
    groups = table.groupby(["family", "measured_by"], sort=False)["top1"]
    return "; ".join(
        f"{family} ({by}) {values.min():.1%} to {values.max():.1%} (mean {values.mean():.1%}, {len(values)} networks)"
        for (family, by), values in groups
    )


def _accuracies(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    header = ["network", "family", "name", "seed", "top-1 (95 %)", "by", "parameters", "GFLOPs", "ms", "epochs", "took"]
    rows = [
        [
            row.label,
            row.family,
            row.name,
            row.seed,
            f"{row.top1:.1%} ({row.low:.1%} to {row.high:.1%})",
            row.measured_by,
            f"{row.parameters / 1e6:.2f} M",
            f"{row.gflops:.3f}",
            f"{row.ms_an_image:.2f}",
            row.epochs,
            format_seconds(row.seconds),
        ]
        for row in table.itertuples(index=False)
    ]
    return header, rows


def _stamp(folder: Path, data: Mapping, table: pd.DataFrame) -> str:
    made = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {made['packages'][name]}" for name in ("torch", "timm"))
    hashes = ", ".join(f"{name} {about['hash']}" for name, about in data.items())
    devices = ", ".join(name for name in table["trained_on"].unique() if name) or made["device"]
    here = f"measured with {versions} on {made['device']}"
    return f"Commit {git_commit()}; trained on {devices}, {here}; hashes of the photographs: {hashes}.\n"


def learning_curves(history: pd.DataFrame, *, caption: str, synthetic: bool) -> Figure:
    """One panel a family, one colour a network, one line style a seed; a row for each way of training.

    history : columns label, family, seed, epoch, and val_accuracy; with a column objective, val_loss of 'simclr', too
    """
    need_columns(history, ["label", "family", "seed", "epoch", "val_accuracy"], "history")
    if "objective" not in history:
        history = history.assign(objective="supervised")
    families, objectives = list(history["family"].unique()), list(history["objective"].unique())
    seeds = sorted(history["seed"].unique())
    style = {seed: SEED_STYLES[i % len(SEED_STYLES)] for i, seed in enumerate(seeds)}
    title = "How well do the networks do, and have they finished learning?"
    size = (3.4 * len(families) + 1.2, 0.6 + 2.8 * len(objectives))
    figure = new_figure(*size, title=title, caption=caption, synthetic=synthetic)
    grid = figure.subplots(len(objectives), len(families), sharey="row", squeeze=False)
    for axes, objective in zip(grid, objectives):
        for ax, family in zip(axes, families):
            chosen = (history["family"] == family) & (history["objective"] == objective)
            _curves(ax, history[chosen], YARDSTICKS[objective][0], style)
            ax.title.set_text(family)
            ax.title.set_size(9)
            if objective == "supervised":
                ax.set_ylim(0, 1)
                ax.yaxis.set_major_formatter(PercentFormatter(1))
        axes[0].set_ylabel(YARDSTICKS[objective][1])
    handles = [Line2D([], [], color="0.4", linestyle=style[seed], label=f"seed {seed}") for seed in seeds]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return settle(figure)


def _curves(ax: Axes, history: pd.DataFrame, column: str, style: Mapping[int, object]) -> None:
    colour = {label: MODEL_COLOURS[i % len(MODEL_COLOURS)] for i, label in enumerate(history["label"].unique())}
    for (label, seed), run in history.groupby(["label", "seed"], sort=False):
        ax.plot(run["epoch"], run[column], color=colour[label], linestyle=style[seed], lw=1.4)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    tidy(ax)
    handles = [Line2D([], [], color=colour[label], lw=2, label=label) for label in colour]
    ax.legend(handles=handles, fontsize=7, frameon=False, loc="best")
