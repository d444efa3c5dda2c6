"""The page of an explanation study: its tables, its figures, and in a few sentences what they say.

Figures that show photographs are written where they do not get into the repository (pictures/), unless the images are
the synthetic ones.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import visualization
from explanations import clusters, figures, pictures
from studies import explanation_joined, explanation_tables, explanation_verdicts, explanation_work
from studies.explained_images import true_masks
from studies.explaining import Made
from studies.explanation_tables import Kept
from studies.explanation_ways import GRAD_CAM, Way, titled
from studies.explanation_words import page
from studies.explanation_work import Job, first_of_each_label
from studies.subjects import Subject
from utils import InputError, write_table, write_text

MORE = "maps"  # folder of the heat maps that the page does not show
SHOWN_IMAGES, SHOWN_NETWORKS = 2, 9


def write(config, subjects: Sequence[Subject], job: Job, folder: Path, unasked: Mapping[str, str]) -> None:
    """Tables, figures and summary.md of what was made; unasked : network -> why it could be asked nothing."""
    kept = explanation_tables.all_kept(subjects, job, folder)
    tables = tables_of(config, subjects, job, kept, folder)
    for name, table in tables.items():
        write_table(table, folder / f"{name}.csv")
    drawn = draw(config, subjects, job, kept, tables, folder)
    write_text(folder / "summary.md", page(config, subjects, job, tables, drawn, unasked))
    print(f"{len(tables['explanations'])} sets of explanations, {tables['explanations']['explanations'].sum()} in all.")


def tables_of(config, subjects: Sequence[Subject], job: Job, kept: Kept, folder: Path) -> dict[str, pd.DataFrame]:
    """Every table of the study by the name of its CSV."""
    labels = {subject.name: subject.label for subject in subjects}
    again = {subject.name for subject in first_of_each_label(subjects)}
    checks = {s.name: explanation_work.checked(s, job, folder, s.name in again) for s in subjects}
    checks = {name: found for name, found in checks.items() if found is not None}
    if not checks:
        raise InputError(f"no network could be explained by any method: {_reasons(kept)}")
    made = {network: explanation_tables.by_variant(job, kept[network]) for network in checks}
    verdicts = explanation_verdicts.verdicts(checks, labels, made)
    similarity = explanation_tables.similarities(config, subjects, job, kept, verdicts)
    points, joined = explanation_joined.joined(config, subjects, job, kept, folder)
    found = {
        "networks": explanation_tables.network_table(subjects, job, folder),
        "explanations": explanation_tables.inventory(subjects, job, kept, verdicts),
        "faithfulness": verdicts,
        "curves": explanation_verdicts.over_networks(checks),
        "randomization": explanation_verdicts.randomized(checks, labels),
        "cover": explanation_verdicts.covered(checks, labels, config.seed, config.resamples),
        "similarity": similarity,
        "pairs": explanation_tables.headline(similarity),
        "kinds": explanation_tables.kinds(similarity, labels),
        "clusters": explanation_tables.groups(config, subjects, similarity),
        "in_mask": explanation_tables.inside_masks(config, subjects, job, kept, verdicts),
        "joined": joined,
        "joined_points": points,
    }
    found = {name: table for name, table in found.items() if len(table) or name == "clusters"}
    for name in sorted({"randomization", "cover"} & set(found)):
        found[name] = found[name].merge(
            verdicts[["network", "variant", "failed"]], on=["network", "variant"], how="left"
        )
    for name in sorted({"clusters", "joined"} & set(found)):
        found[name] = explanation_tables.with_counted_failures(found[name], verdicts)
    return found


def _reasons(kept: Kept) -> str:
    reasons = [why for of_network in kept.values() for made in of_network.values() for why in made.refused.values()]
    return "; ".join(dict.fromkeys(reasons))[:300] or "nothing was made"


def draw(config, subjects, job: Job, kept: Kept, tables: Mapping[str, pd.DataFrame], folder: Path) -> list[str]:
    """All figures; the names of those that the page shows."""
    about = {"synthetic": config.is_synthetic}
    networks = tables["networks"]
    count = f"{networks['label'].nunique()} networks, {len(networks)} with their seeds"
    made = _heat_maps(tables, count, about)
    table = tables["clusters"]
    if (table["ari"].notna() & (table["clustering"] == clusters.LOUVAIN) & (table["among"] == "all")).any():
        caption = f"Louvain communities of {count}; labels: CNN, transformer, hybrid, seeds of a network together."
        named = table[table["among"] == "all"].assign(method=table["method"].map(titled))
        made["ari"] = figures.ari_by_resolution(named, caption=caption, **about)
    made["faithfulness"] = _curves(job, tables, count, about)
    if "joined" in tables:
        made |= _joined(job, tables, about)
    for name, figure in made.items():
        visualization.save(figure, folder / f"{name}.png")
    shown = write_pictures(config, subjects, job, kept, folder)
    return [*(name for name in made if "/" not in name), *(shown if config.is_synthetic else [])]


def _heat_maps(tables: Mapping[str, pd.DataFrame], count: str, about: dict) -> dict[str, Figure]:
    """One of every method and similarity, without networks that have no value; those of the first one are shown."""
    networks, made = tables["networks"], {}
    headline = tables["similarity"]["similarity"].iloc[0]
    for (method, similarity), part in tables["similarity"].groupby(["method", "similarity"], sort=False):
        part = explanation_tables.without_missing(part)
        if part.empty:
            continue
        caption = f"Mean {similarity} of two networks' maps over {part['n'].min()} images; {count}; tree: average "
        caption += "linkage of √((1 − mean)² + variance)."
        name = f"map_{_file(method)}" if similarity == headline else f"{MORE}/{_file(method)}_{similarity}"
        made[name] = figures.similarity_map(
            clusters.square(part, "mean", diagonal=1),
            clusters.square(part, "dissimilarity", diagonal=0),
            dict(zip(networks["network"], networks["family"])),
            title=f"Which networks explain alike? {titled(method)}",
            label=f"mean {similarity} of the maps",
            caption=caption,
            **about,
        )
    return made


def _curves(job: Job, tables: Mapping[str, pd.DataFrame], count: str, about: dict) -> Figure:
    cells = f"{job.checks.cells} × {job.checks.cells}"
    caption = (
        f"First {job.checks.images} images, {count}; whole cells of {cells} removed; bands: the middle 90 % of the "
    )
    caption += "networks; random maps: chance."
    curves = tables["curves"].assign(label=tables["curves"]["label"].map(titled))
    return figures.deletion_curves(curves, ylabel="score (0 baseline, 1 the image)", caption=caption, **about)


def _file(method: str) -> str:
    return method.replace(" %", "").replace(", ", "_").replace(" ", "_")


def _joined(job: Job, tables: Mapping[str, pd.DataFrame], about: dict) -> dict[str, Figure]:
    """Of the first method that was asked."""
    method = tables["joined"]["method"].iloc[0]
    points, found = (tables[name][tables[name]["method"] == method] for name in ("joined_points", "joined"))
    pairs = points["pairs"].iloc[0]
    caption = (
        f"{titled(method)}: cosine of two networks' maps, mean over {pairs} pairs of networks, of different families "
    )
    caption += "where there are several (one seed each); one mark an image; 95 % bootstrap intervals over images."
    return {"joined": figures.agreement_scatter(points, found, ylabel="cosine of the maps", caption=caption, **about)}


def write_pictures(config, subjects: Sequence[Subject], job: Job, kept: Kept, folder: Path) -> list[str]:
    """pictures/: the first images, as one seed of each network explains them, and Grad-CAM by depth."""
    place = folder / ("" if config.is_synthetic else "pictures")
    size = max(subject.image_size for subject in subjects)
    firsts = first_of_each_label(subjects)[:SHOWN_NETWORKS]
    images = job.chosen.first(SHOWN_IMAGES).at(size)
    made = {}
    for row, image in enumerate(images.ids):
        maps = {subject.label: _of_image(kept[subject.name], job, row, size) for subject in firsts}
        mask = None if images.masks is None else true_masks(images, job.label)[row, 0].numpy()
        text = f"Image {image}. Each map in percent of the sum of its absolute attribution."
        text = {"caption": text, "synthetic": config.is_synthetic}
        made[f"grid_{row + 1}"] = pictures.explanation_grid(images.pixels[row].numpy(), maps, mask=mask, **text)
    for way in [way for way in job.ways if way.method == GRAD_CAM][:1]:
        strips = [(each.label, images.pixels[0].numpy(), _by_depth(kept[each.name], way, size)) for each in firsts]
        text = {"caption": f"Grad-CAM; image {images.ids[0]}.", "synthetic": config.is_synthetic}
        made["depth_strips"] = pictures.depth_strips(strips, **text)
    for name, figure in made.items():
        visualization.save(figure, place / f"{name}.png")
    return list(made)


def _of_image(made: Mapping, job: Job, row: int, size: int) -> dict:
    """method -> its map of one image or why there is none; of Grad-CAM that of the last depth."""
    found = {}
    for way in job.ways:
        for variant in way.variants if way.method != GRAD_CAM else way.variants[-1:]:
            maps = made[way.name].maps.get(variant)
            if maps is None:
                found[titled(variant)] = _why(made[way.name], variant)
            elif row < len(maps):
                found[titled(variant)] = _in_percent(_at(maps[row], size))
    return found


def _why(made: Made, variant: str) -> str:
    """Short enough for a picture; the page has the whole reason."""
    return textwrap.shorten(made.refused.get(variant, "not made"), 60, placeholder=" …")


def _in_percent(values: np.ndarray) -> np.ndarray:
    """Networks' logits differ in size: without this the map of one would hide all others."""
    total = np.abs(values).sum()
    return 100 * values / total if total > 0 else values


def _at(values: Tensor, size: int) -> np.ndarray:
    """A map at another size, with the same sum."""
    share = (len(values) / size) ** 2
    return share * F.interpolate(values[None, None], size=(size, size), mode="nearest-exact")[0, 0].numpy()


def _by_depth(made: Mapping, way: Way, size: int) -> dict:
    of = made[way.name]
    return {
        f"{100 * depth:g} %": _at(of.maps[variant][0], size) if variant in of.maps else _why(of, variant)
        for depth, variant in zip(way.depths, way.variants)
    }
