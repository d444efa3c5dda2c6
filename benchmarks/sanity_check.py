"""Kornblith's sanity check in miniature: does a measure find the same layer in a network of another seed?

Kornblith et al. 2019 (section 6.1, table 2): of two networks of one architecture trained from different seeds, the
most similar layer of the second to a layer of the first should be the same layer. Here on real photographs:

    python -m benchmarks.sanity_check --data FOLDER      # FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg

The networks are that paper's Tiny-10: eight convolutions, the mean over space, logits. As there, the outputs of the
convolutions (after their ReLU) and of the mean are compared, the logits are not. Unlike there: photographs of
Imagenette at 32 × 32 pixels instead of CIFAR-10, fewer epochs, fewer networks and fewer images. Maps are pooled to
4 × 4 cells (flat:4), to one (gap), and, for CKA, compared whole, as in the paper (full).
Under gap the mean over space is the last convolution itself, and eight layers are compared.

Trained networks are kept in OUT/sanity_check/models by what they were trained with and on, and found there again.
This is a check of the measures; it says nothing of lesions and takes part in no study.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.sanity_networks import (
    FULL,
    RECIPE,
    Network,
    Photographs,
    check_photographs,
    find_photographs,
    model_path,
    record_all,
    train_all,
)
from benchmarks.sanity_report import write
from similarity import Recording, plane
from similarity.measures import MEASURES, SMALLEST_N
from similarity.policies import parse_policy
from similarity.recording import hash_model
from utils import (
    InputError,
    environment,
    format_seconds,
    progress,
    read_settings,
    resolve_device,
    sentences_instead_of_tracebacks,
)

MODELS = Path("sanity_check") / "models"  # in the folder of the results
SECONDS_OF_TRAINING = 0.001  # an image and epoch, on one core
SECONDS_OF_COMPARING = 600  # six pairs of networks, 1,000 images; one core, most of it for CCA
TIE = 1e-9  # similarities closer than this (relative to the larger of 1 and their size) are the same number


@dataclass
class SanityConfig:
    """
    Args:
        data: folder with train/CLASS and val/CLASS folders of photographs (jpg or png)
        seeds: of the networks (their first weights and the order of their images); at least two
        epochs: of each training
        n: validation images that are recorded, drawn at random once
        policy: flat:g or gap; gap, and whole maps for CKA, are reported beside it
        out: folder of the results
        device: auto, cpu or cuda
    """

    data: str
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    epochs: int = 16
    n: int = 1000
    policy: str = "flat:4"
    out: str = "results/benchmarks"
    device: str = "auto"


@dataclass(frozen=True)
class Comparison:
    """A row of the table: a measure with its options, and what the paper found for that very estimator (percent).

    whole : also of whole maps; the measure must see no rotation
    symmetrized : S + Sᵀ is compared, as the paper does for asymmetric measures
    remark : what sets the published number apart from ours
    """

    measure: str
    options: dict = field(default_factory=dict)
    published: float | None = None
    whole: bool = False
    symmetrized: bool = False
    remark: str = ""

    @property
    def text(self) -> str:
        """The options as the table shows them."""
        words = [f"{key}={value}" for key, value in self.options.items()]
        return " ".join(words + ["S+Sᵀ"] * self.symmetrized)


COMPARISONS = (
    Comparison("linear_cka", {"debiased": True}, whole=True),
    Comparison("linear_cka", {"debiased": False}, 99.3, whole=True),
    *(Comparison("rbf_cka", {"fraction": fraction, "debiased": True}) for fraction in (0.2, 0.4, 0.8, 1.0)),
    Comparison("rbf_cka", {"fraction": 0.2, "debiased": False}, 80.6, whole=True),
    Comparison("rbf_cka", {"fraction": 0.4, "debiased": False}, 99.1, whole=True),
    Comparison("rbf_cka", {"fraction": 0.8, "debiased": False}, 99.3, whole=True),
    Comparison("cca", {}, 1.4),
    Comparison("svcca", {"variance": 0.99}, 9.9),
    Comparison("pwcca", {}, 11.1, symmetrized=True),
    Comparison("linear_regression_r2", {}, 45.4, symmetrized=True, remark="published: R² of the fitted images"),
    Comparison("linear_regression_r2"),
    Comparison("rsa"),
    Comparison("procrustes_distance"),
    Comparison("angular_distance"),
    Comparison("mutual_knn", {"k": 10}),
    Comparison("cknna", {"k": 10}),
    Comparison("information_imbalance"),
)


def run(config: SanityConfig) -> Path:
    """The whole benchmark; returns the path of its table as markdown."""
    check(config)
    device, out = resolve_device(config.device), Path(config.out)
    photographs = {split: find_photographs(Path(config.data) / split) for split in ("train", "val")}
    check_photographs(photographs, config.n)
    print(estimate(config, photographs), flush=True)
    networks = train_all(out / MODELS, config.seeds, config.epochs, photographs, device)
    policies = tuple(dict.fromkeys((config.policy, "gap", FULL)))
    rows = compare_all(record_all(networks, photographs["val"], config.n, policies))
    return write(out, stamp_of(config, networks, photographs, device), rows)


def check(config: SanityConfig) -> None:
    """Refuse settings that cannot run, before anything long."""
    if len(config.seeds) < 2 or len(set(config.seeds)) != len(config.seeds) or min(config.seeds) < 0:
        raise InputError(f"seeds must be at least two different numbers from 0 up, got {config.seeds}")
    if config.epochs < 1:
        raise InputError(f"epochs must be at least 1, got {config.epochs}")
    if config.n < SMALLEST_N:
        raise InputError(f"n must be at least {SMALLEST_N} images, got {config.n}")
    try:
        kind = parse_policy(config.policy)[0]
    except ValueError as error:
        raise InputError(str(error)) from error
    if kind not in ("flat", "gap"):
        raise InputError(f"policy must be flat:g or gap, got {config.policy!r}")


def estimate(config: SanityConfig, photographs: Mapping[str, Photographs]) -> str:
    """One sentence: about how long this takes on one core, from an earlier run."""
    paths = [model_path(Path(config.out) / MODELS, seed, config.epochs, photographs) for seed in config.seeds]
    todo = sum(not path.exists() for path in paths)
    training = todo * config.epochs * len(photographs["train"].paths) * SECONDS_OF_TRAINING
    comparing = SECONDS_OF_COMPARING * math.comb(len(config.seeds), 2) / 6 * (config.n / 1000) ** 2
    return (
        f"{todo} trainings of {config.epochs} epochs, {len(config.seeds)} recordings of {config.n} images, "
        f"{len(COMPARISONS)} comparisons: about {format_seconds(training + comparing)} on one core."
    )


def joint(recordings: Mapping[int, Recording]) -> Recording:
    """The sites of several networks side by side in one recording, named seedS.layer: each is prepared once."""
    first = next(iter(recordings.values()))
    features, sites = {}, []
    for seed, recording in recordings.items():
        for site in recording.sites:
            sites.append(dataclasses.replace(site, name=f"seed{seed}.{site.name}"))
            features[sites[-1].name] = recording[site.name]
    return dataclasses.replace(first, features=features, sites=sites)


@dataclass
class Pairs:
    """values[a, b][i, j]: the measure between layer i of seed a and layer j of seed b, for every ordered pair.

    layers : their names, in order
    notes : what the plane says of its values, one a value that has a note
    """

    layers: list[str]
    values: dict[tuple[int, int], np.ndarray]
    notes: list[str]


def compare_all(recordings: Mapping[str, Mapping[int, Recording]]) -> list[dict]:
    """The rows of the table, one a policy and comparison; see `row_of`."""
    jobs = [
        (policy, comparison)
        for policy in recordings
        for comparison in COMPARISONS
        if policy != FULL or comparison.whole
    ]
    known: dict[tuple, Pairs] = {}
    rows = []
    for policy, comparison in progress(jobs, desc="comparing", unit="measure"):
        key = (policy, comparison.measure, str(comparison.options))  # S and S + Sᵀ are made of the same planes
        if key not in known:
            known[key] = compare(comparison.measure, recordings[policy], comparison.options)
        rows.append(row_of(comparison, policy, known[key]))
    return rows


def compare(measure: str, recordings: Mapping[int, Recording], options: dict) -> Pairs:
    """The measure over every ordered pair of networks; a symmetric one is computed once for both directions."""
    seeds, values, notes, symmetric = list(recordings), {}, [], MEASURES[measure].symmetric
    for place, seed in enumerate(seeds):
        others = seeds[place + 1 :] if symmetric else [other for other in seeds if other != seed]
        if not others:
            continue
        block = plane(measure, recordings[seed], joint({other: recordings[other] for other in others}), **options)
        notes += block.notes.values()
        for other, part in zip(others, np.split(block.values, len(others), axis=1)):
            values[seed, other] = part
            if symmetric:
                values[other, seed] = part.T
    return Pairs(recordings[seeds[0]].names, values, notes)


def identified(values: np.ndarray, distance: bool = False) -> np.ndarray:
    """(layers,) booleans: is column i the best of row i, and no other column as good?

    values : (layers, layers), larger is better, or smaller where `distance`; NaN is never better, and a row whose own
    layer or every other layer is NaN is not identified
    """
    own, rival, margin = _contest(values, distance)
    return own > rival + margin


def tied(values: np.ndarray, distance: bool = False) -> np.ndarray:
    """(layers,) booleans: is column i as good as the best other column of row i?"""
    own, rival, margin = _contest(values, distance)
    return np.abs(own - rival) <= margin


def _contest(values: np.ndarray, distance: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's own score, the best of its others (larger is better), and the margin within which they tie."""
    scores = -values if distance else values
    own = np.diag(scores)
    others = np.where(np.eye(len(scores), dtype=bool), np.nan, scores)
    return own, np.fmax.reduce(others, axis=1), TIE * np.fmax(1, np.abs(own))


def wilson(hits: int, cells: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share of `cells` independent trials (Wilson 1927)."""
    share, spread = hits / cells, z**2 / cells
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / cells + spread / (4 * cells))
    return (centre - half) / (1 + spread), (centre + half) / (1 + spread)


def row_of(comparison: Comparison, policy: str, pairs: Pairs) -> dict:
    """A row from the planes of all ordered pairs; per_layer counts identified cells, per_pair is in percent."""
    planes, distance = pairs.values, MEASURES[comparison.measure].distance
    if comparison.symmetrized:
        planes = {(a, b): values + planes[b, a].T for (a, b), values in planes.items()}
    found = {pair: identified(values, distance) for pair, values in planes.items()}
    cells = np.stack(list(found.values()))
    low, high = wilson(int(cells.sum()), cells.size)
    return {
        "measure": comparison.measure,
        "options": comparison.text,
        "policy": policy,
        "identified_percent": 100 * float(cells.mean()),
        "low": 100 * low,
        "high": 100 * high,
        "published_percent": comparison.published,
        "cells": cells.size,
        "note": "; ".join([comparison.remark] * bool(comparison.remark) + notes_of(planes, pairs.notes, distance)),
        "first_note_of_a_value": next(iter(pairs.notes), ""),
        "per_layer": dict(zip(pairs.layers, cells.sum(0).tolist())),
        "per_pair": {f"{a}→{b}": 100 * float(f.mean()) for (a, b), f in found.items()},
    }


def notes_of(planes: Mapping[tuple, np.ndarray], notes: Sequence[str], distance: bool) -> list[str]:
    """What to know of a row: ties, values that are not computable, and how many values have a note."""
    counts = {
        "ties": sum(int(tied(values, distance).sum()) for values in planes.values()),
        "values not computable": sum(int(np.isnan(values).sum()) for values in planes.values()),
        "values with a note": len(notes),
    }
    return [f"{what}: {count}" for what, count in counts.items() if count]


def stamp_of(
    config: SanityConfig, networks: Sequence[Network], photographs: Mapping[str, Photographs], device: torch.device
) -> dict:
    """What the numbers were computed with and on; no path of this machine."""
    settings = dataclasses.asdict(config) | {"data": Path(config.data).resolve().name}
    settings.pop("out")
    return {
        "config": settings,
        "recipe": RECIPE,
        "environment": environment(device),
        "data": {split: {"images": len(p.paths), "hash": p.hash} for split, p in photographs.items()},
        "networks": [
            {
                "seed": network.seed,
                "validation_accuracy": network.accuracy,
                "training_seconds": round(network.seconds, 1),
                "training_commit": network.commit,
                "model_hash": hash_model(network.model),
            }
            for network in networks
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with the settings of the command line, and say where the results are."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    started = time.perf_counter()
    page = run(read_settings(SanityConfig, "python -m benchmarks.sanity_check", arguments))
    print(f"\nDone in {format_seconds(time.perf_counter() - started)}. Read {page}")


if __name__ == "__main__":
    with sentences_instead_of_tracebacks():
        main()
