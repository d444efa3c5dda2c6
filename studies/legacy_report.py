"""What the legacy study shows: the table of published, repeated and corrected numbers, and its reading in words.

Takes the observations that `legacy` made; measures nothing.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

import verdict_figures
import visualization
from models import TITLES
from similarity import calibration
from similarity.measures import MEASURES
from studies.ruler import ESTIMATORS
from utils import (
    git_commit,
    markdown_table,
    write_table,
    write_text,
)

STEADY = 0.2  # a number is called steady where its spread is at most this share of its mean
KEY = ["pair", "measure"]
COLUMNS = [*KEY, "printed", "published", "published_again", "run1", "run2", "run1_cut_again", "run_difference"]
COLUMNS += ["cut_spread", "low", "high", "word", "corrected", "corrected_low", "corrected_high", "null_high", "p_value"]
COLUMNS += ["floor", "ceiling", "u", "verdict", "note"]
# the corrected counterpart of each of the earlier study's measures, by the same name
CORRECTED = {name: ESTIMATORS[name][1] for name in ("linear_cka", "svcca", "rbf_cka", "rsa")}


def short_site(site: str) -> str:
    return ".".join(site.split(".")[-3:])


def headline(config, observations: pd.DataFrame) -> pd.DataFrame:
    """One row a pair of sites and measure: published, the same recipe here, again, and corrected; see `COLUMNS`."""
    groups = dict(list(observations.groupby(KEY)))
    rows = []
    for pair, measure in itertools.product(config.pairs, CORRECTED):
        group = groups[pair.name, measure]
        by = {name: part for name, part in group.groupby("protocol")}
        row = {"pair": pair.name, "measure": measure}
        printed = by["published"]["value"].tolist() if "published" in by else []
        row |= {"printed": len(printed), "published": _at(printed, 0), "published_again": _at(printed, 1)}
        rows.append(row | _same_recipe(by.get("legacy")) | _corrected(by["corrected"]))
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def _at(values: list[float], place: int) -> float:
    return values[place] if place < len(values) else np.nan


def _same_recipe(legacy: pd.DataFrame | None) -> dict:
    """The recipe's own spread: over runs (first cut), over cuts of the same networks, over both."""
    if legacy is None:
        return {"word": "cannot be addressed"}
    cuts = legacy.pivot(index="cut", columns="run", values="value")
    low, high = cuts.min().min(), cuts.max().max()
    return {
        "run1": cuts.loc[0, 1],
        "run2": cuts.loc[0, 2],
        "run1_cut_again": cuts.loc[1, 1],
        "run_difference": cuts.loc[0].max() - cuts.loc[0].min(),
        "cut_spread": (cuts.max() - cuts.min()).max(),
        "low": low,
        "high": high,
        "word": steadiness(low, high, cuts.mean().mean()),
    }


def steadiness(low: float, high: float, mean: float) -> str:
    """What a number is worth that its recipe gives again as low … high: no number, changes sign, varies or steady."""
    if np.isnan(mean):
        return "no number"
    if low < 0 < high:
        return "changes sign"
    return "steady" if high - low <= STEADY * abs(mean) else "varies"


def _corrected(part: pd.DataFrame) -> dict:
    note = part["note"].iloc[0]
    if note:
        return {"verdict": "no number", "note": note}
    numbers = part.set_index(["quantity", "run"])["value"]
    values, mean = numbers["value"], float(numbers["value"].mean())
    found = {key: float(numbers[key, 0]) for key in ("floor", "ceiling", "u")}
    # of the runs' own nulls the less favourable one
    chance = {key: float(numbers[key].max()) for key in ("null_high", "p_value")}
    row = {"corrected": mean, "corrected_low": values.min(), "corrected_high": values.max()} | chance | found
    return row | {"verdict": calibration.word(mean, found["u"], chance["null_high"], found["ceiling"]), "note": ""}


def write(config, tables: dict[str, pd.DataFrame], datasets: dict, folder: Path) -> None:
    """The tables as CSV, summary.md, and the headline on the terminal."""
    for name, table in tables.items():
        write_table(table, folder / f"{name}.csv")
    if tables["table"]["corrected"].notna().any():
        visualization.save(figure(config, tables["table"], datasets), folder / "legacy.png")
    shown, words = markdown(tables["table"]), reading(config, tables["table"])
    write_text(folder / "summary.md", page(config, shown, words, tables["control"], datasets))
    print(f"\n{shown}\n{words}")


def figure(config, table: pd.DataFrame, datasets: dict):
    """Published, run twice, corrected: the pairs of sites that were published."""
    shown = table[table["published"].notna() | table["corrected"].notna()]
    shown = shown.rename(columns={"run1": "run_1", "run2": "run_2"}).assign(
        measure=shown["measure"].map(lambda name: MEASURES[name].label)
    )
    return verdict_figures.legacy_points(
        shown,
        title="Which of the earlier study's numbers come back, and what do the corrected ones say?",
        caption=f"Rows: UNet++ site × Mask2Former site. Published: other networks and images unless the settings say "
        f"so. Here: seeds {config.seeds[0]} and "
        f"{config.seeds[1]}, n = {len(datasets['validation'])} validation images; corrected: debiased linear CKA and "
        f"RBF-CKA, SVCCA (99 %), RSA, mean over runs; {config.permutations} permutations.",
        synthetic=config.is_synthetic,
    )


def markdown(table: pd.DataFrame) -> str:
    """The headline as it is printed."""
    header = ["pair", "measure", "published", "recipe here", "recipe again", "same networks, rows cut again"]
    header += ["by the recipe", "corrected (range over runs)", "null 95 %", "p", "floor", "ceiling", "verdict"]
    rows = []
    for row in table.itertuples():
        printed = [row.published, row.published_again][: row.printed]
        corrected = f"{row.corrected:.3f} ({row.corrected_low:.3f} … {row.corrected_high:.3f})"
        legacy = ["–"] * 3 if row.word == "cannot be addressed" else [row.run1, row.run2, row.run1_cut_again]
        end = [row.null_high, row.p_value, row.floor, row.ceiling]
        cells = [" / ".join(f"{value:.4f}" for value in printed) or "–", *map(_cell, legacy), row.word]
        if row.note:
            why = " ".join(map(short_site, row.note.partition(": ")[0].split(" ")))
            rows.append([row.pair, row.measure, *cells, *["–"] * 5, f"no number: {why}"])
        else:
            shown = ["–" if np.isnan(value) else f"{value:.3f}" for value in end]
            rows.append([row.pair, row.measure, *cells, corrected, *shown, row.verdict])
    return markdown_table(header, rows)


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"  # nan stays nan: so it was printed


def reading(config, table: pd.DataFrame) -> str:
    """One paragraph: which numbers their own recipe gives again, and what the corrected protocol says of them."""
    legacy = table[~table["word"].isin(["no number", "cannot be addressed"])]
    printed = legacy[legacy["printed"] > 0]
    count = legacy["word"].value_counts()
    cut = legacy[legacy["cut_spread"] > 0]
    steady = ", ".join(f"{row.pair} ({row.measure})" for row in legacy[legacy["word"] == "steady"].itertuples())
    differences = legacy["run_difference"]
    lines = [
        f"**By its own recipe.** The earlier way of measuring gives {len(legacy)} numbers of pairs and measures. Over "
        f"{len(config.seeds)} runs and {config.cuts} random cuts of the rows: {count.get('steady', 0)} steady (range "
        f"at most {STEADY:.0%} of the mean): {steady or 'none'}; {count.get('varies', 0)} varying more; "
        f"{count.get('changes sign', 0)} changing sign. Two runs differ by {differences.median():.4f} in the median, "
        f"by up to {differences.max():.4f}."
    ]
    if len(cut):
        lines.append(
            f"In {len(cut)} of them one side has more rows than the other; there the *same two networks*, measured "
            f"again, differ by up to {cut['cut_spread'].max():.4f}: rows are cut by random permutations and no longer "
            "belong to the same images."
        )
    for row in table[table["printed"] > 1].itertuples():
        lines.append(f"The {row.measure} of {row.pair} was printed twice: {row.published}, {row.published_again}.")
    if config.freezing != "none" and all(recipe.weights != "none" for recipe in config.models):
        how = "frozen by name, batch norms still drift" if config.freezing == "substring" else "frozen by module"
        lines.append(
            f"The encoders are frozen: all runs hold the same pretrained weights ({how}), so that numbers of encoder "
            "pairs hardly move and their ceiling is near 1, by construction."
        )
    if config.own_models_and_data:
        inside = [row.low <= row.published <= row.high for row in printed.itertuples()]
        lines.append(f"{sum(inside)} of {len(printed)} published numbers lie within what their recipe gives here.")
    else:
        lines.append(
            "Other models, settings or images were used here than in the earlier study: the published column only "
            "stands beside, and no difference from it means anything. What carries over is how steady such a number is."
        )
    sure = table[table["verdict"] != "no number"]
    if len(sure):
        cka = sure[sure["measure"] == "linear_cka"]
        words = ", ".join(f"{word} {number}" for word, number in sure["verdict"].value_counts().items())
        lines.append(
            f"**Corrected**, on the same networks: {len(sure)} pairs and measures have a number; verdicts: {words}."
            + (
                f" Debiased linear CKA is {cka['corrected'].min():.3f} to {cka['corrected'].max():.3f}."
                if len(cka)
                else ""
            )
        )
    notes = table.loc[table["note"].fillna("") != "", "note"].drop_duplicates()
    lines += [f"No number: {'; '.join(notes)}."] if len(notes) else []
    return "\n".join(lines)


def page(config, shown: str, words: str, control: pd.DataFrame, datasets: dict) -> str:
    """summary.md."""
    data = "**Synthetic images** (embedded set)" if config.is_synthetic else f"Images of `{Path(config.data).name}`"
    counts = ", ".join(f"{len(images)} {name}" for name, images in datasets.items())
    models = "; ".join(
        f"{TITLES[r.model]} `{r.preset}`, weights {r.weights}, {r.epochs} epochs, learning rate {r.learning_rate}"
        for r in config.models
    )
    freezing = {
        "substring": 'every parameter with "encoder" in its name is frozen, batch norms drift, as in the earlier study',
        "module": "the encoder is frozen by module and stays in eval mode, **unlike** the earlier study (by substring)",
        "none": "nothing is frozen, **unlike** the earlier study",
    }[config.freezing]
    rows = [
        (
            TITLES[r.model],
            r.site,
            r.legacy_rows,
            _cell(r.legacy),
            "–" if np.isnan(r.corrected) else f"{r.corrected:.3f}",
        )
        for r in control[control["measure"] == "linear_cka"].itertuples()
    ]
    itself = markdown_table(("model", "site", "rows kept by plain hooks", "earlier way", "corrected"), rows)
    return f"""# What do the earlier study's numbers say?

{data}: {counts}, {config.image_size} px, blur {config.blur}, {config.interpolation}.
Similarities are of the validation images. {models}; {freezing}.
Seeds {", ".join(map(str, config.seeds))} are the runs of the recipe. The earlier study ran 15 epochs and kept the
tenth; here the last of the epochs above is kept, whatever its score: at a constant learning rate the tenth of ten is
the tenth of 15.
Mixed precision (on CUDA only): {config.mixed_precision}.
Commit {git_commit()}; settings in `config.yaml`, versions and machine in `environment.json`.

{words}

## Published, run again, corrected
{shown}
*Recipe here / again*: the earlier study's training and its way of measuring, first and second seed. *Rows cut again*:
the first run's networks with other random permutations of the rows. *By the recipe*: steady (range over runs and
{config.cuts} cuts at most {STEADY:.0%} of the mean), varies, changes sign. *Corrected*: the same networks, images
matched by id, means over space, tokens or queries by the names of the axes; debiased linear CKA and RBF-CKA, SVCCA of
99 % of the variance, RSA. *Null 95 %*: what permuted images reach in one case of twenty ({config.permutations}
permutations, the higher of the runs); *p*: the larger of the runs. *Floor*: untrained twins. *Ceiling*: geometric
mean of each architecture's own seed-to-seed similarity. *Verdict*: as in the universality study. The range over runs
is no confidence interval.

## A control: linear CKA of a network with itself
{itself}
The same network on both sides: anything but 1 is the way of measuring. Of a side of more than 500 rows it is the random
cuts, else the 1e-6 in the denominator beside small features. Every measure is in `control.csv`.

Every observation is a row of `legacy.csv`; the table above is `table.csv`. Published numbers: `studies/published.csv`.
Made by `python experiments.py legacy` with the settings in `{Path(config.out).name}/config.yaml`.
"""
