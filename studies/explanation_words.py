"""What an explanation study found, in sentences and small tables: its summary.md from its own tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from explanations.clusters import HIERARCHICAL, LOUVAIN, MANTEL
from studies.explaining import TITLES, titled
from studies.explanation_checks import UNCHANGED
from studies.explanation_tables import DIFFERENT, MOST, OTHER_SEED, SAME
from studies.explanation_work import Job
from studies.subjects import SEGMENTATION, Subject
from utils import git_commit, markdown_table

Tables = Mapping[str, pd.DataFrame]
HEADLINE = "cosine"


def page(config, subjects: Sequence[Subject], job: Job, tables: Tables, drawn: Sequence[str]) -> str:
    """summary.md."""
    segmenting = subjects[0].kind == SEGMENTATION
    data = "**Synthetic images** (embedded set)" if config.is_synthetic else f"Images of `{Path(config.data).name}`"
    shown = "\n".join(f"![{name.replace('_', ' ')}]({name}.png)\n" for name in drawn)
    asked = (
        f"the summed lesion logit inside the {config.mask} mask"
        if segmenting
        else "the logit of the photograph's class"
    )
    return f"""# Do the models look at the same things?

{data}; {counted(tables)} What is explained: {asked}.

## The answer
{answer(tables)}

{kind_words(tables["kinds"])}
Means over pairs of networks that differ in their seed alone, are of one family, or of two; maps averaged to
{config.compared_at} × {config.compared_at} cells. Of the pairs of other families: chance (the two networks' maps of
different images), u (0 chance, 1 another seed of the same networks), the share above chance (p < 0.05, permuted images,
Holm over the pairs) and the share with a network on which the method fails (below).

## Do groups of networks follow CNN, transformer, hybrid?
{group_words(tables["clusters"])}
ARI: adjusted Rand index of the best clustering with these labels (1 the same groups, 0 chance); its p is corrected for
all cuts and resolutions looked at, labels moved over whole networks with their seeds; smallest: the p that perfect
groups would have. Mantel: correlation of the similarity with having the same label.

## Are the explanations faithful?
{faith_words(tables)}
Insertion, deletion: area under the curves, 0 the baseline's score and 1 the image's, {job.checks.images} images;
passes: networks on which insertion less deletion beats that of random maps (Wilcoxon over images, p < 0.05). Random
weights: rank correlation of maps with those of the same network at random weights ({job.checks.few} images, one seed
each); from {UNCHANGED} on a method counts as failing there. Gap: what Integrated Gradients and KernelSHAP miss of the
sum that their axioms promise, as a share of it; sampling error: standard errors of KernelSHAP's values, as a share of
these; both median and largest of the networks, and failing above {MOST}.

{mask_words(tables)}
## With the object covered
{cover_words(tables, segmenting)}
## Does agreement on explanations follow other agreement, image by image?
{joined_words(tables.get("joined", pd.DataFrame()))}
Spearman over images (bootstrap 95 %); the second one for masks of equal area, where there are masks.

{shown}
## What could not be asked
{refused_words(tables["explanations"])}
## Networks
{network_words(tables["networks"], segmenting)}
All numbers: {", ".join(f"`{name}.csv`" for name in tables)}; settings in `config.yaml`, versions and machine in
`environment.json`, the hash of the images in `data.json`. Commit {git_commit()}.
"""


def counted(tables: Tables) -> str:
    """How many explanations of how many networks, by method."""
    made, networks = tables["explanations"], tables["networks"]
    by_method = made.groupby("method", sort=False)["explanations"].sum()
    each = ", ".join(f"{TITLES[method]} {count:,}" for method, count in by_method.items())
    total = f"**{made['explanations'].sum():,} explanations** ({each})"
    return f"{total} of {len(networks)} networks ({networks['label'].nunique()} with their seeds)."


def answer(tables: Tables) -> str:
    """A sentence a method."""
    return "\n".join(
        f"- **{titled(method)}**: {_sentence(part.set_index('kind'), tables['clusters'], method)}"
        for method, part in tables["kinds"][tables["kinds"]["similarity"] == HEADLINE].groupby("method", sort=False)
    )


def _sentence(kinds: pd.DataFrame, groups: pd.DataFrame, method: str) -> str:
    named = {OTHER_SEED: "two seeds", SAME: "two networks of one family", DIFFERENT: "networks of different families"}
    parts = [f"{words} {kinds.loc[kind, 'mean']:.2f}" for kind, words in named.items() if kind in kinds.index]
    text = f"cosine of {', '.join(parts)}; of other images {kinds['null_mean'].mean():.2f}."
    mantel = groups[(groups["method"] == method) & (groups["similarity"] == HEADLINE)]
    mantel = mantel[mantel["clustering"] == MANTEL]
    if len(mantel) and np.isfinite(mantel["p"].iloc[0]):
        r, p = mantel[["r", "p"]].iloc[0]
        text += (
            f" Likeness {'follows' if p < 0.05 else 'does not demonstrably follow'} family (r = {r:.2f}, p = {p:.2g})."
        )
    if kinds["failed"].max() > 0:
        text += f" The method fails on some networks ({kinds['failed'].max():.0%} of pairs at most)."
    return text


def kind_words(kinds: pd.DataFrame) -> str:
    """A row a method and similarity, the kinds of pairs beside each other."""
    rows = []
    for (method, similarity), part in kinds.groupby(["method", "similarity"], sort=False):
        part = part.set_index("kind").reindex([OTHER_SEED, SAME, DIFFERENT])
        means = [number(value) for value in part["mean"]]
        last = part.loc[DIFFERENT] if pd.notna(part.loc[DIFFERENT, "mean"]) else part.loc[SAME]
        ends = [number(last["null_mean"]), number(last["u"]), share(last["above_null"]), share(last["failed"])]
        rows.append([titled(method), similarity, *means, *ends])
    header = ["method", "similarity", "two seeds", "same family", "other family", "chance", "u"]
    return markdown_table([*header, "above chance", "failing"], rows)


def share(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.0%}"


def group_words(groups: pd.DataFrame) -> str:
    """A row a method and similarity: the best clustering of each kind, and the Mantel test."""
    rows = []
    for (method, similarity), part in groups.groupby(["method", "similarity"], sort=False):
        row = [titled(method), similarity]
        for clustering in (HIERARCHICAL, LOUVAIN):
            found = part[(part["clustering"] == clustering) & part["ari"].notna()]
            best = found.loc[found["ari"].idxmax()] if len(found) else None
            row.append("–" if best is None else f"{best['ari']:.2f} (p {best['p_adjusted']:.2g})")
        mantel = part[part["clustering"] == MANTEL].iloc[0]
        row.append("–" if np.isnan(mantel["p"]) else f"{mantel['r']:.2f} (p {mantel['p']:.2g})")
        rows.append([*row, number(part["p_smallest"].min(), 4)])
    return markdown_table(["method", "similarity", "ARI, tree", "ARI, Louvain", "Mantel r", "smallest p"], rows)


def faith_words(tables: Tables) -> str:
    rows = []
    for variant, part in tables["faithfulness"].groupby("variant", sort=False):
        row = [titled(variant), number(part["insertion"].mean()), number(part["deletion"].mean())]
        row += [f"{(part['p'] < 0.05).sum()} of {len(part)}", number(part["randomized"].mean())]
        for column in ("gap", "sampling_error"):
            values = part[column].dropna()
            row.append(f"{values.median():.2g}; {values.max():.2g}" if len(values) else "–")
        rows.append([*row, failing(part)])
    header = ["method", "insertion", "deletion", "passes", "random weights", "gap", "sampling error", "fails on"]
    return markdown_table(header, rows)


def failing(part: pd.DataFrame) -> str:
    """The networks on which a method fails, by name where they are few."""
    names = part.loc[part["failed"] != "", "network"].tolist()
    return "none" if not names else ", ".join(names) if len(names) <= 4 else f"{len(names)} of {len(part)} networks"


def mask_words(tables: Tables) -> str:
    if "in_mask" not in tables:
        return ""
    rows = []
    for (method, quantity), part in tables["in_mask"].groupby(["method", "quantity"], sort=False):
        values = [number(part[name].mean()) for name in ("mean", "null_mean", "area")]
        rows.append(
            [titled(method), quantity, *values, f"{(part['p'] < 0.05).mean():.0%}", number(part["other_seeds"].mean())]
        )
    header = ["method", "quantity", "mean", "masks of other images", "area of the mask", "above these", "other seeds"]
    return f"""## How much of a map lies in the mask?
{markdown_table(header, rows)}
Shares of the positive and of the absolute attribution that lie in the mask, and pointing game (is the maximum in it);
means over networks. Each network, with interval: `in_mask.csv`.
"""


def cover_words(tables: Tables, segmenting: bool) -> str:
    if "cover" not in tables:
        return "Not asked.\n"
    table = tables["cover"]
    rows = []
    for label, part in table.groupby("label", sort=False):
        row = [label, part["n"].max(), number(part["answer"].mean(), 2), number(part["answer_covered"].mean(), 2)]
        maps = "; ".join(f"{titled(each.variant)} {each.rank_correlation:.2f}" for each in part.itertuples())
        rows.append([*row, maps])
    what = "share of the object outlined" if segmenting else "share of right classes"
    header = ["network", "images", what, "with it covered", "rank correlation of the maps before and after"]
    return f"{markdown_table(header, rows)}\nCovered: {table['covered'].iloc[0]}, by the mean colour outside it.\n"


def joined_words(joined: pd.DataFrame) -> str:
    if joined.empty:
        return "Not asked: no two different networks have maps of one method.\n"
    rows = []
    for row in joined.itertuples():
        partial = "–" if np.isnan(row.partial) else ranged(row.partial, row.partial_low, row.partial_high)
        rows.append(
            [titled(row.method), row.other, row.n, ranged(row.spearman, row.low, row.high), number(row.p, 4), partial]
        )
    return markdown_table(["method", "other agreement", "images", "Spearman", "p", "for equal area"], rows)


def refused_words(inventory: pd.DataFrame) -> str:
    refused = inventory[inventory["reason"] != ""]
    if refused.empty:
        return "Every method worked on every network.\n"
    lines = []
    for (method, reason), part in refused.groupby(["method", "reason"], sort=False):
        depths = ", ".join(dict.fromkeys(each.partition(", ")[2] for each in part["variant"]))
        networks = ", ".join(dict.fromkeys(part["network"]))
        lines.append(f"- {TITLES[method]}{f' ({depths})' if depths else ''} of {networks}: {reason}")
    return "\n".join(lines) + "\n"


def network_words(networks: pd.DataFrame, segmenting: bool) -> str:
    rows = []
    for label, part in networks.groupby("label", sort=False):
        scores = ", ".join(f"{score:.3f}" for score in part["score"])
        rows.append([label, part["family"].iloc[0], part["image_size"].iloc[0], len(part), scores])
    what = (
        "mean IoU of these images, each seed" if segmenting else "share of these photographs that is right, each seed"
    )
    return markdown_table(["network", "family", "px", "seeds", what], rows)


def number(value: float, digits: int = 2) -> str:
    """'0.12', or '–' for what does not exist."""
    return "–" if pd.isna(value) else f"{value:.{digits}g}" if digits > 2 else f"{value:.{digits}f}"


def ranged(mean: float, low: float, high: float) -> str:
    return "–" if np.isnan(mean) else f"{mean:.2f} ({low:.2f} … {high:.2f})"
