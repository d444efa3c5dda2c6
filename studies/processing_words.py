"""What a processing-steps study found, in sentences and small tables: its summary.md from its own tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from studies.processing_tables import FAMILY, OTHER, SEED, START
from studies.processing_work import ENCODER, Work
from studies.walks import UNTRAINED, Walk
from utils import git_commit, markdown_table

ALPHA = 0.05
OF_LESIONS = ("area_share", "centre_x", "centre_y", "elongation", "border_contrast")
STATISTICS = {"mean": "mean change", "cv": "coefficient of variation", "largest": "largest jump"}
Tables = Mapping[str, pd.DataFrame]


def page(config, walks: Sequence[Walk], asked: Work, tables: Tables, drawn: Sequence[str]) -> str:
    """summary.md."""
    of = "(embedded set)" if config.is_synthetic else f"of `{Path(config.data).name}`"
    data = f"**Synthetic images** {of}" if config.is_drawn else f"Images {of}"
    shown = "\n".join(f"![{name.replace('_', ' ')}]({name}.png)\n" for name in drawn)
    networks = tables["networks"]
    return f"""# How do they get there? Processing steps of {len(networks)} networks

{data}, n = {len(asked.chosen.ids)} that no network was trained on; {counts(networks)}. Sites: every block's output
(`sites.csv`), space reduced by `{config.policy}`; relative depth is the place among a network's own encoder sites.

## The answer
{answer(tables)}

### The paper's three findings
{findings(tables)}

## 1. Same depth, most alike?
{relation_words(tables["relations"], ENCODER)}
Imbalance: information imbalance at k = {config.k}, mean of both directions, 0 where neighbours in one network are
neighbours in the other, 1 where one says nothing of the other. Matched: every site with the one nearest in relative
depth, a rule fixed before looking; elsewhere: all other pairs of sites. Distance: of every site's best match, in
relative depth; chance: with one network's sites in shuffled order ({config.permutations} times); told from chance:
share of pairs of networks with q < {ALPHA} (Benjamini-Hochberg over all pairs). 95 %: leaving out one body with all its
networks at a time. Another seed is the ceiling; untrained networks are the floor. Backwards: the distance, were one
network run backwards: neighbouring sites are alike in any network, so the p alone says little.

Where two networks differ most, first seeds, n = {len(asked.chosen.ids)} images, {config.resamples} halves of them (all
pairs in `largest.csv`):

{largest_words(tables["largest"], tables["networks"])}

## 2. Who changes smoothly?
{family_words(tables["families"])}
Change: imbalance between consecutive encoder sites, mean of both directions; p over bodies (seeds averaged), all
arrangements of the families, corrected for the three statistics (Holm). A body is the unit, never a layer. What a step
changes for its parameters and operations is in `steps.csv` and below.

## 3. What is kept of the image?
{loss_words(tables["losses"])}
R² of cross-validated ridge regression on a site's features. Late: mean over the third quarter of the encoder's depth;
last: its last site; lost: late − last; learnt: last − that of the untrained twin. Median and range over bodies (seeds
averaged), p by signed ranks of the bodies (Wilcoxon, exact). Every site and statistic, with interval over images, null
and the imbalance both ways:
`kept.csv`.

{shown}
## Networks
{network_words(networks)}
All numbers: {", ".join(f"`{name}.csv`" for name in tables)}; the images' statistics in `statistics.csv`, settings in
`config.yaml`, versions and machine in `environment.json`, the hash of the images in `data.json`. Commit {git_commit()}.
"""


def counts(networks: pd.DataFrame) -> str:
    """How many networks of which training."""
    each = networks.groupby("training", sort=False)["label"].agg(["count", "nunique"])
    return ", ".join(
        f"{row['count']} {training} ({row['nunique']} with their seeds)" for training, row in each.iterrows()
    )


def answer(tables: Tables) -> str:
    """Each of the three findings, for every training, in a line."""
    trainings = [name for name in dict.fromkeys(tables["networks"]["training"]) if name != UNTRAINED]
    lines = []
    for training in trainings:
        own = tables["relations"]
        own = own[(own["part"] == ENCODER) & (own["training"] == training)]
        parts = [_depth_sentence(own), _smooth_sentence(tables["families"], training)]
        parts.append(_kept_sentence(tables["losses"], training))
        lines.append(f"- **{training}**: {' '.join(part for part in parts if part)}")
    return "\n".join(lines)


def findings(tables: Tables, training: str = "segmentation") -> str:
    """Which of the three findings of arXiv 2601.21621 hold for one training here, by rules fixed in this text."""
    relations = tables["relations"]
    own = relations[(relations["part"] == ENCODER) & (relations["training"] == training)]
    across = own[own["relation"] == OTHER].set_index("quantity")
    seeds = own[own["relation"] == SEED].set_index("quantity")
    if across.empty or seeds.empty:
        return f"There are not two families of {training} networks with two seeds here, so the findings are not asked."
    nearer, apart = across.loc["closer"], across.loc["matched"]
    first = "holds" if nearer["low"] > 0 else "is not demonstrated"
    strong = (
        "strong differences remain" if apart["low"] > seeds.loc["matched", "mean"] else "how strong is not told apart"
    )
    lost = {name: _low_level(tables["losses"], name).loc["lost"] for name in ("classifier", training)}
    third = [f"{name} {_with_range(row)}{_told(row)}" for name, row in lost.items() if np.isfinite(row["median"])]
    return (
        f"For {training} networks: that **same-depth sites are the most alike, yet strong differences remain**, "
        f"{first}: best matches are {_with_interval(nearer)} of the depth nearer than chance, and {strong} (imbalance "
        f"at matched depth {_with_interval(apart)}, of another seed {seeds.loc['matched', 'mean']:.2f}). That "
        f"**transformers change more smoothly** {_smoother(tables['families'], training)}. "
        "That **classifiers discard low-level statistics in their last layers**: R² lost from the third quarter of the "
        f"depth to the last site is {'; '.join(third)} (median and range over bodies)."
    )


def _smoother(families: pd.DataFrame, training: str) -> str:
    """Whether transformers change less, or more evenly, a step than CNNs: p is two-sided, so the sign is asked too."""
    rule = (families["part"] == ENCODER) & (families["training"] == training) & (families["change"] == "both")
    asked = families[rule & (families["statistic"] != "largest") & families["p_holm"].notna()]
    if asked.empty:
        return "is not asked: there are not two families of bodies"
    less = asked["mean_a"] > asked["mean_b"]  # families stand in alphabetical order: CNN, transformer
    found = asked.loc[asked["p_holm"].idxmin()]
    told = f"smallest p over rules, mean and unevenness: {found['p_holm']:.2g}"
    if not found["p_holm"] < ALPHA:
        return f"does not hold demonstrably ({told})"
    against = asked["p_holm"] < ALPHA
    if less[against].all():
        return f"holds under some rule of sites ({told})"
    return f"does not hold: under some rule of sites it is the CNNs that change more smoothly ({told})"


def _low_level(losses: pd.DataFrame, training: str) -> pd.DataFrame:
    own = losses[(losses["training"] == training) & (losses["statistic"] == "low-level")].set_index("quantity")
    return own.reindex(["late", "last", "lost", "learnt"])


def _depth_sentence(relations: pd.DataFrame) -> str:
    """Best matches, and how much is shared, between families."""
    if OTHER not in set(relations["relation"]):
        return ""
    own = relations[relations["relation"] == OTHER].set_index("quantity")
    distance, chance = own.loc["distance"], own.loc["chance", "mean"]
    more = own.loc["elsewhere − matched"]
    text = (
        f"best matches between families are {_with_interval(distance)} of the depth apart (chance "
        f"{chance:.2f}); imbalance at matched depth {_with_interval(own.loc['matched'])}, elsewhere "
        f"{own.loc['elsewhere', 'mean']:.2f} (difference {_with_interval(more)})"
    )
    seeds = relations[(relations["relation"] == SEED) & (relations["quantity"] == "matched")]
    return text + (f"; another seed: {_with_interval(seeds.iloc[0])}." if len(seeds) else ".")


def _smooth_sentence(families: pd.DataFrame, training: str, rule: str = "every block") -> str:
    own = families[
        (families["part"] == ENCODER)
        & (families["training"] == training)
        & (families["rule"] == rule)
        & (families["change"] == "both")
    ]
    if "p_holm" not in own or own["p_holm"].isna().all():
        return ""
    own = own.set_index("statistic")
    mean, cv = own.loc["mean"], own.loc["cv"]
    return (
        f"Change a step, {mean['family_a']} {mean['mean_a']:.3f} and {mean['family_b']} {mean['mean_b']:.3f} "
        f"(p = {mean['p_holm']:.2g}); unevenness {cv['mean_a']:.2f} and {cv['mean_b']:.2f} (p = {cv['p_holm']:.2g})."
    )


def _kept_sentence(losses: pd.DataFrame, training: str) -> str:
    own = _low_level(losses, training)
    if own["median"].isna().all():
        return ""
    late, last, lost = own.loc["late"], own.loc["last"], own.loc["lost"]
    return (
        f"Of low-level statistics the median body has R² {late['median']:.2f} late and {last['median']:.2f} at its "
        f"last site (lost {_with_range(lost)}{_told(lost)})."
    )


def _told(row: Mapping) -> str:
    return f", p = {row['p']:.2g}" if np.isfinite(row["p"]) else ""


def _with_range(row: Mapping) -> str:
    return f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def _with_interval(row: Mapping) -> str:
    text = f"{row['mean']:.2f}"
    return text if not np.isfinite(row["low"]) else f"{text} ({row['low']:.2f} … {row['high']:.2f})"


def relation_words(relations: pd.DataFrame, part: str) -> str:
    """A row a training and relation, and of two trainings those of one body and seed: before and after."""
    relations = relations[~relations["training"].str.contains(" × ") | (relations["relation"] == START)]
    header = [
        "training",
        "pair",
        "pairs",
        "matched",
        "elsewhere",
        "difference",
        "distance",
        "chance",
        "backwards",
        "told",
    ]
    rows = []
    for (training, relation), own in relations[relations["part"] == part].groupby(["training", "relation"], sort=False):
        own = own.set_index("quantity")
        rows.append(
            [
                training,
                relation,
                int(own["pairs"].iloc[0]),
                _with_interval(own.loc["matched"]),
                f"{own.loc['elsewhere', 'mean']:.2f}",
                _with_interval(own.loc["elsewhere − matched"]),
                _with_interval(own.loc["distance"]),
                f"{own.loc['chance', 'mean']:.2f}",
                f"{own.loc['reversed', 'mean']:.2f}",
                f"{own.loc['told from chance', 'mean']:.0%}",
            ]
        )
    return markdown_table(header, rows)


def largest_words(largest: pd.DataFrame, networks: pd.DataFrame) -> str:
    """By training and whether families differ: where along the depth pairs differ most."""
    if largest.empty:
        return "No pair has intervals here.\n"
    facts = networks.set_index("network")
    own = largest[(largest["value"] == "both") & (largest["part"] == ENCODER)].copy()
    sides = [facts.loc[own[f"network_{side}"]].reset_index() for side in "ab"]
    same = (sides[0]["training"] == sides[1]["training"]).to_numpy()
    own["training"] = sides[0]["training"].to_numpy()
    own["pair"] = np.where((sides[0]["family"] == sides[1]["family"]).to_numpy(), FAMILY, OTHER)
    rows = [
        [
            training,
            pair,
            len(group),
            f"{group['depth'].median():.2f} ({group['depth'].min():.2f} to {group['depth'].max():.2f})",
            f"{(group['depth_high'] - group['depth_low']).median():.2f}",
            f"{group['imbalance'].mean():.2f}",
        ]
        for (training, pair), group in own[same].groupby(["training", "pair"], sort=False)
    ]
    header = ["training", "pair", "pairs", "depth, median (range)", "width of 95 %, median", "imbalance there, mean"]
    return markdown_table(header, rows)


def family_words(families: pd.DataFrame, change: str = "both") -> str:
    """A row a training, rule and statistic."""
    rows = []
    for row in families[families["change"] == change].itertuples():
        if not isinstance(row.statistic, str):
            continue
        rows.append(
            [
                row.part,
                row.training,
                row.rule,
                STATISTICS[row.statistic],
                f"{row.mean_a:.3f} ({row.architectures_a})",
                f"{row.mean_b:.3f} ({row.architectures_b})",
                f"{row.p_holm:.2g}" if np.isfinite(row.p_holm) else f"– ({row.reason})",
                f"{row.p_smallest:.2g}" if np.isfinite(row.p_smallest) else "–",
            ]
        )
    header = ["path", "training", "sites", "statistic", "CNN (bodies)", "transformer (bodies)", "p", "smallest p"]
    return markdown_table(header, rows)


def loss_words(losses: pd.DataFrame) -> str:
    """A row a training and statistic or group."""
    rows = []
    for (training, statistic), own in losses.groupby(["training", "statistic"], sort=False):
        own = own.set_index("quantity")
        lost = own.loc["lost"]
        rows.append(
            [
                training,
                statistic.replace("_", " "),
                int(own["bodies"].iloc[0]),
                *(_with_range(own.loc[name]) for name in ("late", "last", "lost")),
                f"{lost['p']:.2g}" if np.isfinite(lost["p"]) else "–",
                _with_range(own.loc["learnt"]) if np.isfinite(own.loc["learnt", "median"]) else "–",
            ]
        )
    return markdown_table(["training", "statistic", "bodies", "late", "last", "lost", "p of lost", "learnt"], rows)


def network_words(networks: pd.DataFrame) -> str:
    """A row a label."""
    rows = [
        [
            label,
            own["family"].iloc[0],
            own["training"].iloc[0],
            own["body"].iloc[0],
            len(own),
            f"{own['image_size'].iloc[0]} px",
            own["sites"].iloc[0],
            own["decoder_sites"].iloc[0],
            f"{own['parameters'].iloc[0] / 1e6:.2f} M",
            f"{own['gflops'].iloc[0]:.3f}",
        ]
        for label, own in networks.groupby("label", sort=False)
    ]
    header = [
        "network",
        "family",
        "training",
        "body",
        "seeds",
        "images",
        "sites",
        "in the decoder",
        "parameters",
        "GFLOPs",
    ]
    return markdown_table(header, rows)
