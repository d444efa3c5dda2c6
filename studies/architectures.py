"""Which architecture is best, and does what they compute follow family, encoder, pretraining or score?

`python experiments.py architectures` trains a grid of architectures (× pretrained or from scratch × seeds …), reports
their scores and costs as every grid does, then records all of them and their untrained twins on the test images and
compares each with each, with the ruler (`architecture_matrix`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import matrix_figures
import visualization
from dataset import SegmentationDataset, make_loader
from models import TITLES, build_model, encoder_name, load_model
from recipes import TrainConfig
from similarity import Recording, record
from similarity.intervals import FEWEST_IMAGES
from studies import architecture_matrix
from studies.architecture_words import sentence
from studies.cells import Cell
from studies.families import family_of
from studies.grid_report import FinishedGrid, counted
from studies.grid_study import GridConfig, run_grid
from studies.grid_tables import by_group, label_of
from studies.recordings import kept_recording
from utils import InputError, progress, resolve_device, write_table

QUESTION = "Which architecture is best, and does what they compute follow family, encoder, pretraining or score?"


@dataclass
class ArchitecturesConfig(GridConfig):
    """
    Args:
        resamples: subsamples of the images, for the intervals of similarities
        permutations: of the networks, for what similarity follows
        compare: whether similarities are computed at all
    """

    resamples: int = 40
    permutations: int = 5000
    compare: bool = True


ArchitecturesConfig.__doc__ = GridConfig.__doc__ + ArchitecturesConfig.__doc__.split("Args:\n")[1]


def run(config: ArchitecturesConfig) -> Path:
    """The whole study; returns the results folder."""
    if config.resamples < 2 or config.permutations < 1:
        raise InputError(
            f"resamples must be at least 2 and permutations at least 1: got {config.resamples}, {config.permutations}"
        )
    return run_grid(config, "architectures", QUESTION, compare)


def compare(grid: FinishedGrid) -> str:
    """matrix.csv, depth.csv, factors.csv, matrix.png and what they say, of the networks trained on most images."""
    config, folder = grid.config, grid.folder
    groups = by_group(grid.cells)
    share = max(fraction for _, fraction in groups)
    chosen = [cell for (_, fraction), each in groups.items() if fraction == share for cell in each]
    labels = list(dict.fromkeys(map(label_of, chosen)))
    if not config.compare or len(labels) < 2:
        return ""
    if len({grid.jobs[cell.name].image_size for cell in chosen}) > 1:
        return "The networks see images of several sizes, so their representations are not compared.\n"
    test = grid.seen_by(chosen[0])
    if len(test) < FEWEST_IMAGES:
        return f"{len(test)} test images: at least {FEWEST_IMAGES} are needed to compare representations.\n"
    networks = record_all(grid, chosen, test, resolve_device(config.device))
    facts = fact_table(chosen, grid.jobs, grid.tables["scores"], share)
    found = architecture_matrix.compare(
        networks, facts, resamples=config.resamples, permutations=config.permutations, seed=config.seed
    )
    for name, table in (found | {"facts": facts}).items():
        write_table(table, folder / f"{name}.csv")
    text = sentence(found)
    figure = matrix_figures.architecture_matrix(
        found["matrix"],
        found["factors"],
        facts,
        title="Do architectures compute the same, and what does it follow?",
        caption=f"{len(test)} test images at {config.image_size} px, {counted(facts['seeds'].min(), 'seed')}; debiased "
        "linear CKA of means over maps, at matched relative depth; chance: permuted images.",
        synthetic=config.is_synthetic,
    )
    visualization.save(figure, folder / "matrix.png")
    figure = matrix_figures.u_by_depth(
        found["depth"],
        facts,
        title="Where along the depth are architectures alike?",
        caption="Means over pairs of sites in quarters of relative depth; values beyond -1 and 2 are not shown.",
        synthetic=config.is_synthetic,
    )
    visualization.save(figure, folder / "depth.png")
    return f"## Do they compute the same?\n{text}\n\n![similarity matrix](matrix.png)\n\n![u by depth](depth.png)\n"


def fact_table(cells: list[Cell], jobs: Mapping[str, TrainConfig], scores: pd.DataFrame, share: float) -> pd.DataFrame:
    """One row a label: title, family, encoder, pretrained, iou (mean over test images and seeds)."""
    scores = scores[(scores["images"] == "test") & (scores["fraction"] == share)].set_index("label")
    rows = {}
    for cell in cells:
        label, job = label_of(cell), jobs[cell.name]
        seeds = sum(label_of(other) == label for other in cells)
        row = {
            "label": label,
            "title": label,
            "seeds": seeds,
            "architecture": TITLES[job.model],
            "family": family_of(job.spec),
        }
        rows[label] = row | {"encoder": encoder_name(job.spec), "pretrained": job.weights != "none"}
    return pd.DataFrame(rows.values()).assign(iou=lambda table: scores.loc[table["label"], "iou"].to_numpy())


def record_all(
    grid: FinishedGrid, cells: list[Cell], test: SegmentationDataset, device: torch.device
) -> dict[tuple[str, int, str], Recording]:
    """{(label, seed, 'trained' or 'untrained'): its default sites under gap}; kept in recordings/, read from there."""
    found = {}
    for cell in progress(cells, desc="recording", unit="network"):
        job = grid.jobs[cell.name]
        # the floor is the random-init twin, also where training starts from pretrained weights (SCIENCE, section 4)
        spec = dataclasses.replace(job.spec, weights="none", freeze=())
        networks = {
            "trained": load_model(grid.run(cell) / "best")[0],
            "untrained": build_model(spec, job.seed).eval(),
        }
        for state, model in networks.items():
            path = grid.folder / "recordings" / f"{cell.name}-{state}.safetensors"
            found[label_of(cell), job.seed, state] = recorded(model.to(device), test, path, job.batch_size)
    return found


def recorded(model: nn.Module, test: SegmentationDataset, path: Path, batch_size: int) -> Recording:
    """The recording of `path` if it is of this network and these images; else made anew and kept there."""
    if (known := kept_recording(path, model, test)) is not None:
        return known
    made = record(model, make_loader(test, batch_size), policy="gap", data_hash=test.fingerprint)
    made.save(path)
    return made
