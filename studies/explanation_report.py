"""The page of an explanation study: its tables, its figures, and in a few sentences what they say.

Figures that show photographs are written where they do not get into the repository (pictures/), unless the images are
the synthetic ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import visualization
from explanations import clusters, figures, pictures
from studies import explanation_checks, explanation_tables, explanation_work
from studies.explaining import GRAD_CAM
from studies.explanation_tables import Kept
from studies.explanation_words import page
from studies.explanation_work import Job, first_of_each_label
from studies.subjects import Subject
from utils import InputError, write_table, write_text

MAPPED = "cosine"  # the similarity whose heat maps are drawn; the others are in similarity.csv
SHOWN_IMAGES, SHOWN_NETWORKS = 2, 9


def write(config, subjects: Sequence[Subject], job: Job, folder: Path) -> None:
    """Tables, figures and summary.md of what was made."""
    kept = explanation_tables.all_kept(subjects, job, folder)
    tables = tables_of(config, subjects, job, kept, folder)
    for name, table in tables.items():
        write_table(table, folder / f"{name}.csv")
    drawn = draw(config, subjects, job, kept, tables, folder)
    write_text(folder / "summary.md", page(config, subjects, job, tables, drawn))
    print(f"{len(tables['explanations'])} sets of explanations, {tables['explanations']['explanations'].sum()} in all.")


def tables_of(config, subjects: Sequence[Subject], job: Job, kept: Kept, folder: Path) -> dict[str, pd.DataFrame]:
    """Every table of the study by the name of its CSV."""
    labels = {subject.name: subject.label for subject in subjects}
    again = {subject.name for subject in first_of_each_label(subjects)}
    checks = {s.name: explanation_work.checked(s, job, folder, s.name in again) for s in subjects}
    checks = {name: found for name, found in checks.items() if found is not None}
    if not checks:
        raise InputError(f"no network could be explained by any method: {_reasons(kept)}")
    verdicts = explanation_tables.with_accuracy(explanation_checks.verdicts(checks, labels), job, kept)
    similarity = explanation_tables.similarities(config, subjects, job, kept, verdicts)
    points, joined = explanation_tables.joined(config, subjects, job, kept, folder)
    found = {
        "networks": explanation_tables.network_table(subjects, job, folder),
        "explanations": explanation_tables.inventory(subjects, job, kept, verdicts),
        "faithfulness": verdicts,
        "curves": explanation_checks.over_networks(checks),
        "randomization": explanation_tables.randomized(checks, labels),
        "cover": explanation_tables.covered(checks, labels),
        "similarity": similarity,
        "kinds": explanation_tables.kinds(similarity),
        "clusters": explanation_tables.groups(config, subjects, similarity),
        "in_mask": explanation_tables.inside_masks(config, subjects, job, kept, verdicts),
        "joined": joined,
        "joined_points": points,
    }
    return {name: table for name, table in found.items() if len(table)}


def _reasons(kept: Kept) -> str:
    reasons = [why for of_network in kept.values() for made in of_network.values() for why in made.refused.values()]
    return "; ".join(dict.fromkeys(reasons))[:300] or "nothing was made"


def draw(config, subjects, job: Job, kept: Kept, tables: Mapping[str, pd.DataFrame], folder: Path) -> list[str]:
    """All figures; the names of those that the page shows."""
    about = {"synthetic": config.is_synthetic}
    networks = tables["networks"]
    count = f"{networks['label'].nunique()} networks, {len(networks)} with their seeds"
    made = {}
    for method in dict.fromkeys(tables["similarity"]["method"]):
        part = tables["similarity"][tables["similarity"]["method"] == method]
        part = part[part["similarity"] == MAPPED]
        if len(part) and np.isfinite(part["mean"]).all():
            caption = f"Mean over {part['n'].min()} images of the cosine of two networks' maps; {count}; tree: average "
            caption += "linkage of √((1 − mean)² + variance)."
            made[f"map_{_file(method)}"] = figures.similarity_map(
                clusters.square(part, "mean", diagonal=1),
                clusters.square(part, "dissimilarity", diagonal=0),
                dict(zip(networks["network"], networks["family"])),
                title=f"Which networks explain alike? {method}",
                label="mean cosine of the maps",
                caption=caption,
                **about,
            )
    if (tables["clusters"]["clustering"] == clusters.LOUVAIN).any():
        caption = f"Louvain communities of {count}; labels: CNN, transformer, hybrid, seeds of a network together."
        made["ari"] = figures.ari_by_resolution(tables["clusters"], caption=caption, **about)
    caption = (
        f"First {job.checks.images} images, {count}; whole cells of {job.checks.cells} × {job.checks.cells} removed; "
    )
    caption += "bands: the middle 90 % of the networks; random maps: chance."
    label = "score (0 baseline, 1 the image)"
    made["faithfulness"] = figures.deletion_curves(tables["curves"], ylabel=label, caption=caption, **about)
    made |= _joined_figure(config, job, tables, about)
    for name, figure in made.items():
        visualization.save(figure, folder / f"{name}.png")
    shown = write_pictures(config, subjects, job, kept, folder)
    return [*made, *(shown if config.is_synthetic else [])]


def _file(method: str) -> str:
    return method.replace(" %", "").replace(", ", "_").replace(" ", "_")


def _joined_figure(config, job: Job, tables: Mapping[str, pd.DataFrame], about: dict) -> dict:
    method = job.ways[0].variants[0]
    points, found = (tables[name][tables[name]["method"] == method] for name in ("joined_points", "joined"))
    found = found[found["other"].isin(points["other"])]
    if points.empty or found.empty:
        return {}
    caption = (
        f"{method}: cosine of two networks' maps, mean over {points['pairs'].iloc[0]} pairs of networks of different "
    )
    caption += "families (one seed each); one mark an image; 95 % bootstrap intervals over images."
    return {"joined": figures.agreement_scatter(points, found, ylabel="cosine of the maps", caption=caption, **about)}


def write_pictures(config, subjects: Sequence[Subject], job: Job, kept: Kept, folder: Path) -> list[str]:
    """pictures/: the first images, as one seed of each network explains them, and Grad-CAM by depth."""
    place = folder / ("" if config.is_synthetic else "pictures")
    size = max(subject.image_size for subject in subjects)
    firsts = [subject for subject in first_of_each_label(subjects) if subject.image_size == size][:SHOWN_NETWORKS]
    images = job.chosen.first(SHOWN_IMAGES).at(size)
    about = {"synthetic": config.is_synthetic}
    names = []
    for row, image in enumerate(images.ids):
        maps = {s.label: _of_image(kept[s.name], job, row) for s in firsts}
        mask = None if images.masks is None else (images.masks[row, 0] > 0).numpy()
        figure = pictures.explanation_grid(
            images.pixels[row].numpy(), maps, mask=mask, caption=f"Image {image}.", **about
        )
        names.append(f"grid_{row + 1}")
        visualization.save(figure, place / f"{names[-1]}.png")
    ways = [way for way in job.ways if way.method == GRAD_CAM]
    if ways:
        strips = [(s.label, images.pixels[0].numpy(), _by_depth(kept[s.name], ways[0])) for s in firsts]
        caption = f"Grad-CAM; image {images.ids[0]}."
        visualization.save(pictures.depth_strips(strips, caption=caption, **about), place / "depth_strips.png")
        names.append("depth_strips")
    return names


def _of_image(made: Mapping, job: Job, row: int) -> dict:
    found = {}
    for way in job.ways:
        for variant in way.variants if way.method != GRAD_CAM else way.variants[-1:]:
            maps = made[way.name].maps.get(variant)
            if maps is None:
                found[variant] = made[way.name].refused.get(variant, "not made")
            elif row < len(maps):
                found[variant] = maps[row].numpy()
    return found


def _by_depth(made: Mapping, way) -> dict:
    of = made[way.name]
    return {
        f"{100 * depth:g} %": of.maps[variant][0].numpy() if variant in of.maps else of.refused.get(variant, "not made")
        for depth, variant in zip(way.depths, way.variants)
    }
