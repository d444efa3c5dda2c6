"""What the processing-steps study shows: tables of all networks together, figures, and summary.md.

From what `processing_work` made of each network; nothing is recorded here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from processing import figures
from processing.together import Together
from similarity import Recording
from studies import processing_tables, processing_words, processing_work
from studies.processing_planes import WHOLE, kept_planes, kept_samples, parts_of
from studies.processing_tables import RELATIONS
from studies.processing_work import ENCODER, Work
from studies.walks import UNTRAINED, Walk
from utils import write_table, write_text
from visualization import save

RULE = "every block"


@dataclass(frozen=True)
class Part:
    """One part of the networks: which of them, their recordings' order, and the planes over all their sites."""

    name: str
    walks: list[Walk]
    recordings: Mapping[str, Recording]
    together: Together


def write(config, walks: Sequence[Walk], asked: Work, folder: Path) -> None:
    """Every table, figure and the page of a results folder."""
    recordings = {walk.name: processing_work.recording(walk, asked, folder) for walk in walks}
    sites = {walk.name: processing_work.sites_table(walk, asked, folder) for walk in walks}
    parts = []
    for name, own in parts_of(recordings).items():
        together = kept_planes(own, asked, config.neighbours, folder)
        parts.append(Part(name, [walk for walk in walks if walk.name in own], own, together))
    tables = tables_of(config, walks, asked, folder, sites, parts)
    shown = shown_pairs(config, walks)
    inner = next(each for each in parts if each.name == ENCODER)
    planes = {f"{a} | {b}": inner.together.table(a, b) for a, b in shown}
    tables["planes"] = pd.concat(
        [table.assign(network_a=a, network_b=b) for (a, b), table in zip(shown, planes.values())], ignore_index=True
    )
    for name, table in tables.items():
        write_table(table, folder / f"{name}.csv")
    drawn = draw(config, tables, planes, asked)
    for name, figure in drawn.items():
        save(figure, folder / f"{name}.png")
    write_text(folder / "summary.md", processing_words.page(config, walks, asked, tables, list(drawn)))
    print("\n" + processing_words.answer(tables))


def tables_of(
    config, walks: Sequence[Walk], asked: Work, folder: Path, sites: Mapping[str, pd.DataFrame], parts: Sequence[Part]
) -> dict[str, pd.DataFrame]:
    """All tables but those of single planes."""
    options = (config.permutations, config.seed)
    pairs = [processing_tables.pairs_table(each.walks, each.together, each.name, *options) for each in parts]
    curves = [processing_tables.curves_table(own, each.together, each.walks) for own, each in zip(pairs, parts)]
    steps = [processing_tables.steps_table(each.walks, each.together, sites, each.name) for each in parts]
    tables = {"networks": networks_table(walks, sites), "sites": all_sites(walks, sites), "pairs": pd.concat(pairs)}
    tables["relations"] = processing_tables.relations_table(tables["pairs"], walks)
    tables["curves"], tables["steps"] = pd.concat(curves), pd.concat(steps)
    tables["smoothness"] = processing_tables.smoothness_table(tables["steps"], walks)
    tables["families"] = processing_tables.families_table(tables["smoothness"], *options)
    tables["matched"], tables["largest"] = with_intervals(config, parts, asked, folder)
    kept = [processing_work.kept_table(walk, asked, folder).assign(network=walk.name) for walk in walks]
    tables["kept"] = pd.concat(kept, ignore_index=True)
    tables["losses"] = processing_tables.losses_table(tables["kept"], groups_of(tables["kept"]), walks)
    return tables


def groups_of(kept: pd.DataFrame) -> dict[str, list[str]]:
    """Statistics that are also told together."""
    there = list(dict.fromkeys(kept["statistic"]))
    lesion = [name for name in there if name in processing_words.OF_LESIONS]
    groups = {"low-level": [name for name in there if name not in lesion], "lesion": lesion}
    return {name: members for name, members in groups.items() if members}


def networks_table(walks: Sequence[Walk], sites: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a network: what it is, its number of sites, and what it has spent at its last one."""
    rows = []
    for walk in walks:
        own = sites[walk.name]
        counts = {"sites": int((own["part"] == ENCODER).sum()), "decoder_sites": int((own["part"] != ENCODER).sum())}
        counts |= {"parameters": own["parameters"].max(), "gflops": own["operations"].max() / 1e9}
        rows.append(walk.facts() | counts | {"source": str(walk.subject.source or "pretrained")})
    return pd.DataFrame(rows)


def all_sites(walks: Sequence[Walk], sites: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The sites of all networks, with their place and relative depth within encoder, and within the whole path."""
    found = []
    for walk in walks:
        own = sites[walk.name].copy()
        own["place"] = range(1, len(own) + 1)
        inner = own["part"] == ENCODER
        own["depth"] = inner.cumsum().where(inner) / inner.sum()
        own["whole_depth"] = own["place"] / len(own)
        found.append(own.assign(network=walk.name))
    return pd.concat(found, ignore_index=True)


def with_intervals(config, parts: Sequence[Part], asked: Work, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Matched depths and the largest difference of the first seeds, with intervals over images."""
    near, most = [], []
    for each in parts:
        names = first_seeds(config, each.walks)
        own = {name: each.recordings[name] for name in names}
        if len(own) < 2:
            continue
        samples, taken = kept_samples(own, asked, config.resamples, folder)
        together = kept_planes(own, asked, config.neighbours, folder)
        for found, table in zip(
            (near, most), processing_tables.intervals_tables(together, samples, taken, names, each.name)
        ):
            found.append(table)
    if not near:
        return pd.DataFrame(), pd.DataFrame()
    return pd.concat(near, ignore_index=True), pd.concat(most, ignore_index=True)


def first_seeds(config, walks: Sequence[Walk]) -> list[str]:
    """The first network of every label that gets intervals."""
    wanted = config.intervals_of or [walk.label for walk in walks if walk.training != UNTRAINED]
    firsts = {walk.label: walk.name for walk in reversed(walks)}
    return [firsts[label] for label in dict.fromkeys(wanted) if label in firsts]


def shown_pairs(config, walks: Sequence[Walk]) -> list[tuple[str, str]]:
    """Whose planes are shown: the pairs asked for, or of each training the first CNN and the first transformer."""
    firsts = {walk.label: walk.name for walk in reversed(walks)}
    if config.shown:
        return [(firsts[a], firsts[b]) for a, b in config.shown]
    found = []
    for training in dict.fromkeys(walk.training for walk in walks):
        of = {walk.subject.family: walk.name for walk in reversed(walks) if walk.training == training}
        if {"CNN", "transformer"} <= set(of):
            found.append((of["CNN"], of["transformer"]))
    return found or [(walks[0].name, walks[1].name)]


# ---------------------------------------------------------------------------------------------------------- figures


def draw(
    config, tables: Mapping[str, pd.DataFrame], planes: Mapping[str, pd.DataFrame], asked: Work
) -> dict[str, Figure]:
    """name -> figure."""
    n, made = len(asked.chosen.ids), {}
    of = f"n = {n} images, {config.policy}, k = {config.k}"
    synthetic = config.is_drawn
    made["planes"] = figures.planes(
        planes,
        title="Are two networks most alike at the same depth?",
        label="imbalance, mean of both ways",
        caption=f"Encoder sites (every block's output), {of}; 0: neighbours in one are neighbours in the other, 1: no "
        "information. White dots: the best match in B of each site of A; orange squares: in A of each of B. "
        "Dashed: equal depth.",
        synthetic=synthetic,
        value="both",
    )
    trainings = set(tables["networks"]["training"])
    relations, curves = (
        table[(table["part"] == ENCODER) & table["training"].isin(trainings) & table["relation"].isin(RELATIONS)]
        for table in (tables["relations"], tables["curves"])
    )
    made["matched_depths"] = figures.matched_depths(
        relations,
        curves,
        title="Is the best match at the same depth, and how much do networks share there?",
        caption=f"Pairs of networks of one training, encoder sites, {of}. Means over pairs; bars and bands: 95 %, "
        "leaving out one body at a time. Chance: mean distance with the sites of one network shuffled, "
        f"{config.permutations} times. Imbalance: mean of both directions at matched depth.",
        synthetic=synthetic,
    )
    steps = tables["steps"]
    steps = steps[(steps["rule"] == RULE) & (steps["part"] == ENCODER)]
    made["smoothness"] = figures.smooth_steps(
        steps,
        tables["networks"],
        title="How much does each step change, and what for?",
        caption=f"Information imbalance between consecutive sites (mean of both directions), encoder, every block's "
        f"output, {of}; one line a network. Parameters and operations as shares of what the last site has spent.",
        synthetic=synthetic,
    )
    smooth, tests = (table[table["part"] == ENCODER] for table in (tables["smoothness"], tables["families"]))
    made["families"] = figures.families_compared(
        smooth,
        tests,
        title="Do transformers change more smoothly than CNNs, whatever rule chooses the sites?",
        caption=f"Imbalance between consecutive encoder sites, {of}. A dot a body (seeds averaged), a bar a family's "
        "mean; p: arrangements of the families over bodies, Holm over the three statistics.",
        synthetic=synthetic,
    )
    made["kept"] = figures.kept_along_depth(
        tables["kept"],
        tables["networks"],
        title="What do sites keep of the image's statistics?",
        caption=f"Cross-validated R² of ridge regression on an encoder site's features, n = {n} images, "
        f"{config.policy}, {config.folds} folds; medians over networks, in tenths of the depth. Grey: untrained "
        "ones, from the lower to the higher family's median.",
        synthetic=synthetic,
    )
    if WHOLE in set(tables["relations"]["part"]):
        whole, bends = (
            table[(table["part"] == WHOLE) & table["training"].isin(trainings) & table["relation"].isin(RELATIONS)]
            for table in (tables["relations"], tables["curves"])
        )
        made["matched_depths_whole"] = figures.matched_depths(
            whole,
            bends,
            title="The same from the first block of the encoder to the last of the decoder",
            caption=f"Networks with a decoder, all sites, {of}. As above.",
            synthetic=synthetic,
        )
    return made
