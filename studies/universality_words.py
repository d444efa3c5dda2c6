"""What the universality study says in words and short tables: the answer, the ruler, the card, summary.md.

Takes tables and returns text; draws and measures nothing.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from similarity.measures import MEASURES
from studies.ruler import ESTIMATORS, HEADLINE, PARTS
from utils import git_commit, markdown_table

METHODS = {"cca": "CCA", "procrustes": "Procrustes", "manifold": "manifold alignment"}


def cell(value: float, digits: int = 3) -> str:
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def p_cell(value: float) -> str:
    return "< 0.001" if value < 0.001 else cell(value)


def span(low: float, high: float, digits: int = 3) -> str:
    return "–" if pd.isna(low) else f"{low:.{digits}f} … {high:.{digits}f}"


def short_table(summary: pd.DataFrame) -> str:
    """The table that the main job prints: one line a part and estimator."""
    header = (
        "part",
        "estimator",
        "policy",
        "pairs",
        "similarity",
        "95 %",
        "null 95 %",
        "floor",
        "ceiling",
        "u",
        "95 %",
        "verdict",
    )
    rows = [
        (
            row.part,
            row.estimator,
            row.policy,
            _pairs(row),
            cell(row.similarity),
            span(row.similarity_low, row.similarity_high),
            cell(row.null_high),
            cell(row.floor),
            cell(row.ceiling),
            cell(row.u, 2),
            span(row.u_low, row.u_high, 2),
            row.verdict,
        )
        for row in _encoders_first(summary).itertuples()
    ]
    return markdown_table(header, rows)


def _pairs(row) -> str:
    """'7 of 8' pairs of sites, or '8' where none was left out."""
    every = row.site_pairs + row.site_pairs_left_out
    return f"{row.site_pairs} of {every}" if row.site_pairs_left_out else str(every)


def _encoders_first(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("part", ascending=False, kind="stable")


def headline(summary: pd.DataFrame, part: str) -> pd.Series:
    """The line that answers the question for a part."""
    return summary[(summary.part == part) & (summary.estimator == HEADLINE) & (summary.policy == "gap")].iloc[0]


def sentence(config, summary: pd.DataFrame, names: list[str]) -> str:
    """The answer in one line each for encoders and decoders, from the headline estimator."""
    lines = []
    for part in PARTS:
        row = headline(summary, part)
        lines.append(
            f"{part.capitalize()}s of {names[0]} and {names[1]}: {row.verdict}, debiased linear CKA "
            f"{row.similarity:.2f} (95 % {span(row.similarity_low, row.similarity_high, 2)}; chance below "
            f"{row.null_high:.2f}), {place_on_ruler(row)}."
        )
    if len(config.seeds) < 2:
        lines.append("One seed only: there is no ceiling, and none was made up.")
    return "\n".join(lines)


def place_on_ruler(row) -> str:
    """Where a similarity stands between floor and ceiling, in words."""
    ends = f"untrained twins {cell(row.floor, 2)}, another seed {cell(row.ceiling, 2)}"
    if pd.isna(row.u):
        return f"no scale to place it on ({ends})"
    interval = f", u = {row.u:.2f} (95 % {span(row.u_low, row.u_high, 2)})"
    if row.u < 0:
        return f"no more than without training ({ends}{interval})"
    return f"{row.u:.0%} of the way from untrained to another seed ({ends}{interval})"


def begun(summary: pd.DataFrame) -> str:
    """What the pretrained twins, with which training began, scored; '' where all began at random weights."""
    rows = {part: headline(summary, part) for part in PARTS}
    if all(pd.isna(row.start) for row in rows.values()):
        return ""
    values = ", ".join(f"{part} {row.start:.3f}" for part, row in rows.items())
    return f"*Pretrained twins* (what training began with, where an encoder came with weights): {values} (headline).\n"


# ------------------------------------------------------------------------------------------------------ further tables


def card_table(card: pd.DataFrame) -> str:
    rows = [
        (
            row.part,
            row.estimator,
            row.policy,
            row.n_images,
            f"{row.effective_rank_a:.1f}, {row.effective_rank_b:.1f}",
            cell(row.biased_cka_by_chance),
            cell(row.se_over_images, 4),
            "–" if pd.isna(row.images_needed) else f"{row.images_needed:,.0f}",
        )
        for row in _encoders_first(card).itertuples()
    ]
    header = ("part", "estimator", "policy", "n", "effective ranks", "biased CKA by chance", "s.e.", "n for ± 0.02")
    return markdown_table(header, rows)


def disagreement_table(table: pd.DataFrame) -> str:
    rows = [
        (
            r.part,
            r.estimator,
            cell(r.similarity),
            cell(r.u, 2),
            r.verdict,
            "yes" if r.as_headline else "**no**",
            r.explained_by,
        )
        for r in _encoders_first(table).itertuples()
    ]
    return markdown_table(
        ("part", "estimator", "similarity", "u", "verdict", "as headline", "may differ because"), rows
    )


def region_table(table: pd.DataFrame) -> str:
    rows = [
        (
            r.part,
            r.region,
            r.n_images,
            cell(r.similarity),
            span(r.similarity_low, r.similarity_high),
            cell(r.floor),
            cell(r.ceiling),
            cell(r.u, 2),
        )
        for r in _encoders_first(table).itertuples()
    ]
    return markdown_table(("part", "region", "n", "similarity", "95 %", "floor", "ceiling", "u"), rows)


def controls_table(table: pd.DataFrame) -> str:
    """Largest and mean similarity of a part's sites with each control."""
    rows = []
    for (part, model, control), group in table.groupby(["part", "model", "control"], sort=False):
        best = group.loc[group["similarity"].idxmax()] if group["similarity"].notna().any() else group.iloc[0]
        rows.append(
            (part, model, control, cell(group["similarity"].mean()), cell(best["similarity"]), f"`{best['site']}`")
        )
    return markdown_table(("part", "model", "control", "mean over sites", "highest", "at"), rows)


def alignment_table(table: pd.DataFrame) -> str:
    rows = [
        (
            row.part,
            f"`{row.site_a}` × `{row.site_b}`",
            METHODS[row.method],
            cell(row.r2, 2),
            cell(row.retrieval_ab, 2),
            cell(row.retrieval_ba, 2),
            cell(row.chance, 3),
            p_cell(row.p_value),
        )
        for row in _encoders_first(table).itertuples()
    ]
    header = ("part", "sites", "method", "R² held out", "found A→B", "found B→A", "chance", "p")
    return markdown_table(header, rows)


def stitching_table(table: pd.DataFrame) -> str:
    rows = [
        (
            f"`{row.site_b}` in {row.receiver}",
            f"`{row.site_a}` of {row.giver}",
            row.kind,
            cell(row.dice),
            cell(row.dice_own),
            cell(row.kept),
            span(row.low, row.high),
            cell(row.without),
        )
        for row in table.itertuples()
    ]
    return markdown_table(("replaced", "by", "kind", "Dice", "its own Dice", "kept", "95 %", "kept by its mean"), rows)


def agreement_table(table: pd.DataFrame) -> str:
    rows = [
        (row.between, row.quantity, row.n_images, cell(row.value), span(row.low, row.high), p_cell(row.p_value))
        for row in table.itertuples()
    ]
    return markdown_table(("between", "quantity", "images", "value", "95 %", "p"), rows)


# ----------------------------------------------------------------------------------------------------------- the page


def remarks(config, summary: pd.DataFrame, notes: list[str]) -> str:
    """What has to be said of the lines that are there, a sentence a line."""
    estimators, policies = set(summary["estimator"]), set(summary["policy"])
    lines = list(notes)
    if "linear_cka_deconfounded" in estimators:
        lines.append(
            "`linear_cka_deconfounded` is the headline with the kernels of raw pixels, mask (area, place, shape) and "
            "mean colour regressed out of both sides; it has no null, since what is left cannot be permuted."
        )
    if any(policy.startswith("grid") for policy in policies):
        lines.append(
            "Rows of `grid` leave out sites without a place in the image or with smaller maps, so they are means over "
            "other pairs than those of `gap`; there q is over the pairs at matched depth, by at most 200 permutations."
        )
    if "linear_cka_biased" in estimators:
        lines.append("The biased linear CKA is shown only to be read beside its null.")
    if any(MEASURES[ESTIMATORS[name][0]].distance for name in estimators & set(ESTIMATORS)):
        lines.append("Of distances, small is alike, and the null's 95 % point is the low one.")
    if "information_imbalance" in estimators:
        lines.append(
            "Information imbalance is that of the second model's neighbours given the first's, one direction only."
        )
    frozen = [recipe.model for recipe in config.models if "encoder" in recipe.freeze]
    if frozen:
        lines.append(
            f"The encoder of {' and '.join(frozen)} is frozen: all its seeds hold the pretrained weights, so that its "
            "seed-to-seed similarity is 1 by construction and its numbers are those of pretraining, not of this task."
        )
    return "\n".join(lines)


def pictures_of(config) -> str:
    """Links to the pictures that show images; photographs are shown to who made the run, and published by nobody."""
    if config.is_synthetic:
        return "![PCA pictures](pca.png)\n![predictions](predictions.png)"
    return "`pca.png` and `predictions.png` show photographs of the data set: mind its licence before passing them on."


def summary_text(
    config, datasets: dict, metrics: pd.DataFrame, tables: dict, names: list[str], notes: list[str], *, has_space: bool
) -> str:
    """summary.md: what was run on what, the answer, the tables, what each number means."""
    kind = "**Synthetic images** (embedded set)" if config.is_synthetic else f"Images of `{Path(config.data).name}`"
    counts = ", ".join(f"{len(data)} {name}" for name, data in datasets.items())
    task = metrics.groupby(["model", "seed"])[["iou", "dice", "accuracy", "thresholded_jaccard"]].mean().reset_index()
    task_rows = [(r.model, r.seed, *(f"{v:.4f}" for v in r[3:])) for r in task.itertuples()]
    out, seeds = Path(config.out).name, ", ".join(map(str, config.seeds))
    summary = tables["summary"]
    over = headline(summary, "encoder").interval_over
    labels = ", ".join(
        f"{name}: {MEASURES[ESTIMATORS[name][0]].label}"
        for name in dict.fromkeys(summary.estimator)
        if name in ESTIMATORS
    )
    stitching = (
        ""
        if tables["stitching"].empty
        else f"""
## Function: what a network keeps when another's activation takes the place of its own
![stitching](stitching.png)

{stitching_table(tables["stitching"])}
Only a 1×1 convolution is trained between the two (least squares first, then the task's loss,
{config.stitch_epochs} epoch(s) of {min(config.stitch_images, len(datasets["train"]))} training
images); 95 %: paired bootstrap over test images.
"""
    )
    space = "![shared space](shared_space.png)\n\n" if has_space else ""
    where = (
        ""
        if tables["regions"].empty
        else f"""
## Where: inside, on the border of, and outside the lesion
![regions](regions.png)

{region_table(tables["regions"])}
Cells of the grid are weighted by the mask: its share s in a cell (inside), 1 − s (outside), 4 s (1 − s) (border).
"""
    )
    return f"""# Do {names[0]} and {names[1]} end up with the same representations?

{kind}: {counts}, {config.image_size} px, data {datasets["test"].fingerprint}. Seeds {seeds}.
Commit {git_commit()}; settings in `config.yaml`, versions and machine in `environment.json`.

{sentence(config, summary, names)}

## The ruler
![ruler](ruler.png)
![u by depth](position.png)
![depth](depth.png)

{short_table(summary)}
Each number is a mean over site pairs at matched relative depth (`depth.csv`; every site pair is in `pairs.csv`).
*Similarity*: trained against trained, mean over all pairs of seeds. *95 %*: interval over {over}, by the delete-d
jackknife ({config.resamples} subsamples of four fifths of the images, of half for SVCCA and neighbour measures;
with three seeds or more the jackknife over seeds adds their variance).
*Null 95 %*: what permuted images reach in one case of twenty ({config.permutations} permutations,
first pair of networks, whose value `pairs.csv` gives as `tested`, with p, q (Benjamini–Hochberg), p from the
null's exact moments where there is a closed form, and, for each row's best site, p of the maximum).
*Floor*: the untrained twins. *Ceiling*: geometric mean of each architecture's own seed-to-seed similarity.
*u* = (similarity − floor) / (ceiling − floor).
*Verdict*: below chance (not above the null's 95 % point), below floor (u < −0.1), at floor (u < 0.1), partial,
at ceiling (u ≥ 0.9), above ceiling (u > 1.1).
*Pairs*: site pairs that have a number, of those at matched depth; the others (a constant site; seeds of one
architecture that share nothing, so no ceiling) are in no column.
Estimators: {labels}.
{begun(summary)}{remarks(config, summary, notes)}

## What each measure says, and why one may differ
{disagreement_table(tables["disagreement"])}
## Convergence card
{card_table(tables["card"])}
Effective rank: participation ratio, median over sites. *n for ± 0.02*: images that would bring the 95 % interval over
images to ± 0.02. Hashes of weights and images are in `card.csv`.

## Controls: what the images alone explain
{controls_table(tables["controls"])}{where}
## Into one space
{space}{alignment_table(tables["alignment"])}
Fitted on half of the images, scored on the other half, mean over {config.alignment_splits} random halves; *found*: how
often the nearest image in the other model is the same image. First pair of networks.
{stitching}
## Do the masks agree, and on the same images as the representations?
{agreement_table(tables["agreement_summary"])}
κ: agreement of pixel errors beyond what the two accuracies imply. Per-image values are in `agreement.csv`.

## The task (mean over test images, at {config.image_size} px; intervals in `test_summary.csv`)
{markdown_table(("model", "seed", "IoU", "Dice", "pixel accuracy", "thresholded Jaccard"), task_rows)}
## Planes and training
![encoder plane](plane_encoder.png)
![decoder plane](plane_decoder.png)
![measures](measures.png)
![training curves](training_curves.png)
{pictures_of(config)}

Made by `python experiments.py universality` with the settings in `{out}/config.yaml`.
"""
