"""What an explanation study found, in sentences and small tables: its summary.md from its own tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from explanations.clusters import HIERARCHICAL, LOUVAIN, MANTEL
from studies.explanation_checks import ELSEWHERE, OBJECT
from studies.explanation_tables import DIFFERENT, OTHER_SEED, SAME
from studies.explanation_verdicts import ALPHA, MOST, UNCHANGED
from studies.explanation_ways import TITLES, titled
from studies.explanation_work import Job
from studies.subjects import SEGMENTATION, Subject
from utils import git_commit, markdown_table

Tables = Mapping[str, pd.DataFrame]


def page(
    config, subjects: Sequence[Subject], job: Job, tables: Tables, drawn: Sequence[str], unasked: Mapping[str, str]
) -> str:
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
{config.compared_at} × {config.compared_at} cells. Of the pairs of other families (if there is one family, of that):
chance (the two networks' maps of different images), u (0 chance, 1 another seed of the same networks; 95 %, jackknife
over networks), the share above chance (q < 0.05, permuted images, Benjamini-Hochberg over all pairs) and the share with
a network on which the method fails (below).

## Do groups of networks follow CNN, transformer, hybrid?
{group_words(tables["clusters"])}
ARI: adjusted Rand index of the best clustering with these labels (1 the same groups, 0 chance); its p is corrected for
all cuts and resolutions looked at, labels moved over whole networks with their seeds; smallest: the p that perfect
groups would have. Mantel: correlation of the similarity with having the same label, p alone and corrected for the
methods (Holm); again without the networks on which the method fails.

## Are the explanations faithful?
{faith_words(tables)}
Insertion, deletion: area under the curves, 0 the baseline's score and 1 the image's, {job.checks.images} images;
passes: networks on which insertion less deletion beats that of random maps, one draw an image (Wilcoxon over
images, q < 0.05 over all rows). Random weights: rank correlation of maps, and of their absolute values, with those of
the same network at random weights ({job.checks.few} images, {job.checks.levels} groups of layers from the output on,
one seed each; normalisation layers keep their running statistics); from {UNCHANGED} on a method fails, the first
counting for all that uses maps as they are, the second for absolute mass alone: maps that are large only where an image
differs from its baseline are alike in size at any weights. Gap: what Integrated Gradients and KernelSHAP miss of the
sum that their axioms promise, as a share of it; sampling error: standard errors of KernelSHAP's values, as a share of
these; both median and largest of the networks, and failing above {MOST}.
{unchecked_words(tables["faithfulness"])}
{mask_words(tables)}
## With the object covered
{cover_words(tables, segmenting)}
## Does agreement on explanations follow other agreement, image by image?
{joined_words(tables.get("joined", pd.DataFrame()))}
Spearman over images (bootstrap 95 %) of means over pairs of networks of different families, one seed each; p is not
corrected for the rows, and the interval is for these networks and for agreement with this set of images. The second one
is for masks of equal area, where there are masks.

{shown}
## What could not be asked
{refused_words(tables["explanations"], unasked)}
## Networks
{network_words(tables["networks"], segmenting)}
`pairs.csv` has the pairs of networks by the first similarity, `similarity.csv` by all of them.
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
    """A sentence a method, by the first similarity."""
    kinds = tables["kinds"]
    headline = kinds["similarity"].iloc[0]
    return "\n".join(
        f"- **{titled(method)}**: {_sentence(part.set_index('kind'), tables['clusters'], method, headline)}"
        for method, part in kinds[kinds["similarity"] == headline].groupby("method", sort=False)
    )


def _sentence(kinds: pd.DataFrame, groups: pd.DataFrame, method: str, similarity: str) -> str:
    named = {OTHER_SEED: "two seeds", SAME: "two networks of one family", DIFFERENT: "networks of different families"}
    parts = [
        f"{words} {_with_interval(kinds.loc[kind], 'mean')}" for kind, words in named.items() if kind in kinds.index
    ]
    text = f"{similarity} of {', '.join(parts)}; of other images {kinds['null_mean'].mean():.2f}."
    if DIFFERENT in kinds.index and np.isfinite(kinds.loc[DIFFERENT, "u"]):
        text += f" On the way from chance to another seed: u = {_with_interval(kinds.loc[DIFFERENT], 'u')}."
    mantel = _mantel(groups, method, similarity, "all")
    if mantel is not None:
        word = "follows" if mantel["p_holm"] < ALPHA else "does not demonstrably follow"
        text += f" Likeness {word} family (r = {mantel['r']:.2f}, p = {mantel['p_holm']:.2g} for all methods together)."
    if kinds["failed"].max() > 0:
        text += f" The method fails on some networks (in up to {kinds['failed'].max():.0%} of the pairs)."
    return text


def _with_interval(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f}" + ("" if np.isnan(low) else f" ({low:.2f} … {high:.2f})")


def _mantel(groups: pd.DataFrame, method: str, similarity: str, among: str) -> pd.Series | None:
    """The row of the Mantel test, where there is one with a p."""
    rows = groups[(groups["method"] == method) & (groups["similarity"] == similarity) & (groups["among"] == among)]
    rows = rows[(rows["clustering"] == MANTEL) & rows["p"].notna()]
    return rows.iloc[0] if len(rows) else None


def kind_words(kinds: pd.DataFrame) -> str:
    """A row a method and similarity, kinds of pairs beside each other; the rest is of the last kind there is."""
    rows = []
    for (method, similarity), part in kinds.groupby(["method", "similarity"], sort=False):
        part = part.set_index("kind").reindex([OTHER_SEED, SAME, DIFFERENT])
        means = [number(value) for value in part["mean"]]
        last = part[part["mean"].notna()].iloc[-1] if part["mean"].notna().any() else part.iloc[-1]
        ends = [number(last["null_mean"]), _with_interval(last, "u") if pd.notna(last["u"]) else "–"]
        rows.append([titled(method), similarity, *means, *ends, share(last["above_null"]), share(last["failed"])])
    header = ["method", "similarity", "two seeds", "same family", "other family", "chance", "u"]
    return markdown_table([*header, "above chance", "failing"], rows)


def share(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.0%}"


def group_words(groups: pd.DataFrame) -> str:
    """A row a method and similarity: the best clustering of each kind, and the Mantel test."""
    rows = []
    for (method, similarity), part in groups.groupby(["method", "similarity"], sort=False):
        row = [titled(method), similarity]
        every = part[part["among"] == "all"]
        for clustering in (HIERARCHICAL, LOUVAIN):
            found = every[(every["clustering"] == clustering) & every["ari"].notna()]
            best = found.loc[found["ari"].idxmax()] if len(found) else None
            row.append("–" if best is None else f"{best['ari']:.2f} (p {best['p_adjusted']:.2g})")
        for among in ("all", "faithful"):
            test = _mantel(groups, method, similarity, among)
            row.append("–" if test is None else f"{test['r']:.2f} (p {test['p']:.2g}, {test['p_holm']:.2g})")
        rows.append([*row, number(every["p_smallest"].min(), 4), part["failing"].iloc[0]])
    header = [
        "method",
        "similarity",
        "ARI, tree",
        "ARI, Louvain",
        "Mantel r",
        "without failing",
        "smallest p",
        "failing",
    ]
    return markdown_table(header, rows)


def faith_words(tables: Tables) -> str:
    rows = []
    for variant, part in tables["faithfulness"].groupby("variant", sort=False):
        row = [titled(variant), number(part["insertion"].mean()), number(part["deletion"].mean())]
        row.append(f"{(part['q'] < ALPHA).sum()} of {len(part)}")
        row.append(f"{number(part['randomized'].mean())}; {number(part['randomized_absolute'].mean())}")
        for column in ("gap", "sampling_error"):
            values = part[column].dropna()
            row.append(f"{values.median():.2g}; {values.max():.2g}" if len(values) else "–")
        rows.append([*row, failing(part)])
    header = ["method", "insertion", "deletion", "passes", "random weights", "gap", "sampling error", "fails on"]
    return markdown_table(header, rows)


def unchecked_words(verdicts: pd.DataFrame) -> str:
    """Where there is no check with random weights, and why."""
    rows = verdicts[verdicts["unchecked"] != ""]
    return "".join(
        f"- Not checked with random weights: {titled(variant)} of {', '.join(part['network'])}: {why}\n"
        for (variant, why), part in rows.groupby(["variant", "unchecked"], sort=False)
    )


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
        above, failed = share((part["p"] < ALPHA).mean()), share((part["failed"] != "").mean())
        rows.append([titled(method), quantity, *values, above, number(part["other_seeds"].mean()), failed])
    header = ["method", "quantity", "mean", "masks of other images", "area of the mask", "above these", "other seeds"]
    header.append("failing")
    return f"""## How much of a map lies in the mask?
{markdown_table(header, rows)}
Shares of the positive and of the absolute attribution that lie in the mask, and pointing game (is the maximum in it);
means over networks. Each network, with interval: `in_mask.csv`.
"""


def cover_words(tables: Tables, segmenting: bool) -> str:
    """A row a network: its answers, the fall of its score, its maps; with as much covered elsewhere beside."""
    if "cover" not in tables:
        return "Not asked.\n"
    table = tables["cover"][tables["cover"]["reason"] == ""]
    rows = []
    for label, part in table.groupby("label", sort=False):
        own, other = part[part["which"] == OBJECT], part[part["which"] == ELSEWHERE]
        row = [label, own["n"].max(), number(own["answer"].mean()), number(own["answer_covered"].mean())]
        row += [number(other["answer_covered"].mean()), f"{number(own['fall'].mean())}; {number(other['fall'].mean())}"]
        known = other.set_index("variant")["rank_correlation"]
        maps = [
            f"{titled(each.variant)}{'*' if each.failed else ''} {each.rank_correlation:.2f}; "
            f"{number(known.get(each.variant, np.nan))}"
            for each in own.itertuples()
        ]
        rows.append([*row, "<br>".join(maps)])
    what = "share of the object outlined" if segmenting else "share of right classes"
    header = ["network", "images", what, "object covered", "as much elsewhere", "fall of the score", "maps stay alike"]
    return f"""{markdown_table(header, rows)}
Covered: {table["covered"].iloc[0]}, by the mean colour of the rest; elsewhere: the same moved by half the image (it
may touch the object). Fall of the score (as a share of its size) and rank correlation of the maps before and after:
with the object covered; with as much elsewhere; *: the method fails on this network. Intervals: `cover.csv`.
"""


def joined_words(joined: pd.DataFrame) -> str:
    if joined.empty:
        return "Not asked: no two different networks have maps of one method.\n"
    rows = []
    for row in joined.itertuples():
        partial = "–" if np.isnan(row.partial) else ranged(row.partial, row.partial_low, row.partial_high)
        spearman = ranged(row.spearman, row.low, row.high)
        found = [spearman, number(row.p, 4), partial, row.failing]
        rows.append([titled(row.method), row.other, row.n, row.pairs, *found])
    header = ["method", "other agreement", "images", "pairs", "Spearman", "p", "for equal area", "failing"]
    return markdown_table(header, rows)


def refused_words(inventory: pd.DataFrame, unasked: Mapping[str, str]) -> str:
    """By method and reason; first the networks that could be asked nothing."""
    refused = inventory[inventory["reason"] != ""]
    if refused.empty and not unasked:
        return "Every method worked on every network.\n"
    lines = [f"- {network}, by any method: {reason}" for network, reason in unasked.items()]
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
