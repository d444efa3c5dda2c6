"""A study that is a grid of trainings: its settings, its checks, and its walk from cells to tables and a page.

What the grid is about (encoders, architectures) is said by the study that calls `run_grid`; the engine of cells is
`grid` and `launch`, what a cell computes `grid_work`, the numbers of all of them `grid_tables`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dataset import SegmentationDataset
from models import build_model, check_image_size
from recipes import OVERFIT_IOU, TrainConfig, check_cache_features, check_recipe, objective
from sources import CHOICE_OF_IMAGES, open_datasets
from studies import grid, grid_tables
from studies.cells import Cell, cells_of, check_settings
from studies.grid_report import FinishedGrid, write_page
from studies.grid_work import job_of, other_source, score_all, work
from studies.launch import check_launcher, launch
from studies.results_folder import open_results
from studies.timing import time_a_step
from utils import InputError, progress, refuse_other_run, resolve_device, write_table


@dataclass
class GridConfig(TrainConfig):
    """
    Args:
        axes: of the grid, in order: a setting and the list of its values, such as {"seed": [0, 1, 2]}, or a name and
            its labels, each with the settings it stands for, such as {"encoder": {"clip": {"options": {…}}}}
        skip: combinations that are left out, such as [{"encoder": "clip", "fraction": [0.05]}]
        same_steps: whether cells on a fraction of the images see them so much oftener, to make equally many steps
        target: a validation IoU; the first epoch that reaches it is reported
        weights: as of one training; braces stand for the cell's label on an axis, as in FOLDER/{body}--seed-{seed}
        pretrained: encoder -> settings that take the place of `weights: imagenet` for it, such as
            {"mobilenet_v2": {"weights": "FILE", "normalization": "half"}}
        transfer: name -> settings of other images ({"data": …, "layout": …}) whose test images every network is scored
            on, too
        scored_train: so many of the training images at most are scored, as they are, beside the test images
        launcher: here, joblib (processes of this machine), submitit-local or slurm (see requirements-cluster.txt)
        jobs: cells at a time
        processes: that share one training, started by accelerate: GPUs, or processes of a CPU
        launcher_options: for submitit, such as {"timeout_min": 600, "slurm_partition": "gpu"}
        retry: whether cells that failed are run again
        dry_run: print the grid, the state of its cells and how long the rest may take, and end; nothing is written
        overfit: run each network once, on so many training images that it is also validated on, until IoU 0.95
        out: results folder; default results/, the study's and the data's name
    """

    axes: dict[str, Any] = field(default_factory=lambda: {"seed": [0]})
    skip: list[dict[str, Any]] = field(default_factory=list)
    same_steps: bool = True
    target: float = 0.7
    pretrained: dict[str, dict[str, Any]] = field(default_factory=dict)
    transfer: dict[str, dict[str, Any]] = field(default_factory=dict)
    scored_train: int = 300
    launcher: str = "here"
    jobs: int = 1
    processes: int = 1
    launcher_options: dict[str, Any] = field(default_factory=dict)
    retry: bool = False
    dry_run: bool = False
    out: str | None = None


# Settings that change the report and no cell: a finished grid may be reported anew with others.
OF_THE_REPORT = ("target", "transfer", "scored_train", "resamples", "permutations", "compare")
Report = Callable[[FinishedGrid], str]  # what a study adds to the page, and to the folder


def run_grid(config: GridConfig, study: str, question: str, more: Report) -> Path:
    """Run what is left of the grid and report all that is finished; returns the results folder.

    question: the page's title; more: adds the study's own tables and figures, and returns text for the page.
    """
    config, cells = settle(config, study)
    folder, place = Path(config.out), Path(config.out) / "cells"
    jobs = {cell.name: job_of(config, cell, place / cell.name) for cell in cells}
    check(config, cells, jobs, place)
    datasets = open_datasets(dataclasses.replace(config, fraction=1.0, repeats=1))
    estimate = functools.partial(estimate_cell, config=config, jobs=jobs, datasets=datasets, known={})
    plan = grid.dry_run(cells, place, estimate, config.jobs, config.retry)
    if config.dry_run:
        print(plan)
        return folder
    open_results(config, datasets, resolve_device(config.device), OF_THE_REPORT)
    print(plan.strip().splitlines()[-1], flush=True)
    run_cells(config, cells, place, study)
    done = grid_tables.finished(cells, place)
    if not done:
        raise InputError(f"none of the {len(cells)} cells is finished, so there is nothing to report; see {place}")
    if config.overfit:
        overfit_page(config, cells, folder)
    else:
        report(finished_grid(config, done, jobs, datasets["test"]), question, grid.overview(cells, place), more)
    return folder


def run_cells(config: GridConfig, cells: list[Cell], place: Path, study: str) -> None:
    """Run what is left, by the launcher that was asked for, and print what became of it."""
    run_one = functools.partial(
        grid.run_cell, folder=place, work=functools.partial(work, config=config), retry=config.retry
    )
    launch(cells, run_one, config.launcher, config.jobs, place, config.launcher_options)
    print(grid.page(grid.overview(cells, place), place, f"python experiments.py {study} …"), flush=True)


def finished_grid(
    config: GridConfig, done: list[Cell], jobs: Mapping[str, TrainConfig], test: SegmentationDataset
) -> FinishedGrid:
    """The finished cells' scores and tables; image sets that were asked for later are scored first."""
    place = Path(config.out) / "cells"
    # what a cell does not change is the study's own setting
    base = {"seed": config.seed, "fraction": config.fraction}
    done = [Cell(cell.labels, base | dict(cell.changes)) for cell in done]
    for cell in progress(done, desc="scores", unit="cell"):
        score_all(jobs[cell.name], place / cell.name, config)
    scores = grid_tables.read_scores(done, place)
    return FinishedGrid(config, done, jobs, test, scores, all_tables(config, done, jobs, scores))


def report(found: FinishedGrid, question: str, overview: pd.DataFrame, more: Report) -> None:
    """All tables as CSV, what the study adds, and the page; overview : of all cells."""
    for name, table in found.tables.items():
        write_table(table, found.folder / f"{name}.csv")
    write_page(found, question, overview, more(found))


def settle(config: GridConfig, study: str) -> tuple[GridConfig, list[Cell]]:
    """The results folder and the cells; for an overfit check only the first seed on all images."""
    names = [part.name for part in dataclasses.fields(TrainConfig) if part.name not in ("out", "overfit")]
    check_settings(config.axes | {f"pretrained {name}": {"": each} for name, each in config.pretrained.items()}, names)
    cells = cells_of(config.axes, config.skip)
    data = "synthetic" if config.is_synthetic else Path(config.data).resolve().name
    out = config.out or f"results/{study}-{data}{'-overfit' if config.overfit else ''}"
    if config.overfit:
        seeds = [cell.changes.get("seed", config.seed) for cell in cells]
        shares = [cell.changes.get("fraction", config.fraction) for cell in cells]
        first = (seeds[0], max(shares))
        cells = [cell for cell, seed, share in zip(cells, seeds, shares) if (seed, share) == first]
    return dataclasses.replace(config, out=str(out)), cells


def check(config: GridConfig, cells: list[Cell], jobs: Mapping[str, TrainConfig], place: Path) -> None:
    """Refuse what cannot run, before anything long: settings of every cell, and one model of each kind."""
    check_launcher(config.launcher, config.jobs, config.launcher_options)
    grid.refuse_other_cells(cells, place)
    if not 0 < config.target < 1:
        raise InputError(f"target must be an IoU between 0 and 1, got {config.target}")
    for name in ("processes", "scored_train"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")
    refuse_other_run(Path(config.out), dataclasses.asdict(config), OF_THE_REPORT)
    for cell in cells:
        check_share(config, cell, jobs[cell.name])
        check_recipe(jobs[cell.name])
        check_cache_features(jobs[cell.name])
        objective(jobs[cell.name])
    check_images(config, jobs)
    for job in {kind_of(job): job for job in jobs.values()}.values():
        check_image_size(build_model(job.spec), job.image_size, job.image_size)


def kind_of(job: TrainConfig, *more: object) -> str:
    """What trainings of one network on images of one size have in common, with whatever else is to be the same."""
    return json.dumps([dataclasses.asdict(job.spec), job.image_size, *more], sort_keys=True)


def check_share(config: GridConfig, cell: Cell, job: TrainConfig) -> None:
    """Refuse other images for some cells, and shares of them that cannot make equally many steps."""
    if others := sorted(set(cell.changes) & set(CHOICE_OF_IMAGES) - {"fraction", "fraction_seed", "repeats"}):
        raise InputError(f"axes may not change {', '.join(others)}: all cells of a grid are scored on the same images")
    if config.same_steps and job.fraction < 1 and abs(job.fraction * job.repeats - 1) > 0.05:
        raise InputError(
            f"fraction {job.fraction:g}: whole repeats of its images cannot make as many steps as all images do; use "
            "1/2, 1/3, 1/4 and so on, or set same_steps false"
        )


def check_images(config: GridConfig, jobs: Mapping[str, TrainConfig]) -> None:
    """Refuse image sets that a cell would stumble over at its end: each is opened once."""
    shares = {(job.fraction, job.fraction_seed, job.image_size): job for job in jobs.values() if job.fraction < 1}
    sizes = {job.image_size: job for job in jobs.values()}
    for job in shares.values():
        open_datasets(job, needed=("train",))  # a share that leaves no image of a class
    for name, settings in config.transfer.items():
        for job in sizes.values():
            open_datasets(other_source(job, name, settings), needed=("test",))


def estimate_cell(
    cell: Cell, config: GridConfig, jobs: Mapping[str, TrainConfig], datasets: dict, known: dict
) -> float:
    """Seconds that a cell may take, from timed steps of its model; one of each kind is timed and kept in `known`."""
    job = jobs[cell.name]
    job = dataclasses.replace(job, weights="none")  # which ones makes no step longer
    kind = kind_of(job, job.batch_size)
    if kind not in known:
        data = datasets["train"]
        if job.transform != data.transform:
            data = SegmentationDataset(data.pairs[: job.batch_size], job.transform)
        known[kind] = time_a_step(job, data, job.device)
    step, forward = known[kind]
    sizes = {name: len(data.ids) for name, data in datasets.items()}
    if job.overfit:
        return job.overfit * job.epochs * (job.repeats * step + forward)
    served = max(1, round(sizes["train"] * job.fraction)) * job.repeats * job.epochs
    scored = sizes["validation"] * job.epochs + sizes["test"] + min(config.scored_train, sizes["train"])
    return served * step + scored * forward


def all_tables(
    config: GridConfig, cells: list[Cell], jobs: Mapping[str, TrainConfig], scores: grid_tables.Scores
) -> dict[str, pd.DataFrame]:
    """runs, scores, paired, costs and history of the finished cells."""
    place = Path(config.out) / "cells"
    groups = grid_tables.by_group(cells)
    sizes = {cell.name: jobs[cell.name].image_size for cell in cells}
    return {
        "runs": grid_tables.run_table(cells, scores, place, config.target),
        "scores": grid_tables.score_table(groups, scores),
        "paired": grid_tables.paired_table(groups, scores),
        "costs": grid_tables.cost_table(groups, place, sizes, config.device),
        "history": grid_tables.histories(cells, place),
    }


def overfit_page(config: GridConfig, cells: list[Cell], folder: Path) -> None:
    """overfit.csv: the IoU of each network on the images that it was trained on; printed, and refused below 0.95."""
    place, rows = folder / "cells", []
    for cell in grid_tables.finished(cells, place):
        history = pd.read_csv(place / cell.name / "run" / "history.csv")
        best = history["validation_iou"].max()
        row = {"label": grid_tables.label_of(cell), "images": config.overfit, "iou": best, "epochs": len(history)}
        rows.append(row | {"passed": best >= OVERFIT_IOU, "seconds": history["seconds"].sum()})
    table = pd.DataFrame(rows)
    write_table(table, folder / "overfit.csv")
    print(table.round(3).to_string(index=False))
    failed = table.loc[~table["passed"], "label"]
    if len(failed) or len(rows) < len(cells):
        missing = len(cells) - len(rows)
        raise InputError(
            f"overfit check: {', '.join(failed) or 'none'} stayed below IoU {OVERFIT_IOU} on {config.overfit} images, "
            f"and {missing} networks did not run through; more epochs or another learning rate may do; see {folder}"
        )
