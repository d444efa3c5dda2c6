"""Stitched segmentation: what a network still segments when another's activation is put in place of its own.

Which networks and sites are stitched (`matched_sites`, `plan`), the Dice of every test image (`stitched_scores`), and
what was kept beside its ceiling (another seed of the receiver gives), its floor (the giver's untrained twin gives) and
the receiver without what the site knows (`summarize`). How a stitch works is in `similarity.stitching`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import models
from dataset import SegmentationDataset, cap, make_loader
from inference import predict
from loss_metrics import dice_bce, image_metrics
from similarity import Site
from similarity.policies import map_size
from similarity.stitching import Stitch, fit, mean_only, stitchable
from utils import InputError, pick, progress

RESAMPLES = 2000
BASELINES = ("twin", "untrained")
JOB = ["giver", "site_a", "receiver", "site_b", "kind", "direction"]
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StitchJob:
    """One stitch, networks and sites by name: what `giver` computes at `site_a` goes into `receiver` at `site_b`.

    kind : 'cross' (another architecture gives), 'twin' (the receiver's architecture from another seed gives, at the
        same site), 'untrained' (the untrained twin of a cross job's giver gives)
    """

    giver: str
    site_a: str
    receiver: str
    site_b: str
    kind: str

    @property
    def direction(self) -> str:
        """What jobs have in common that are read together: the network they go into."""
        return f"into {self.receiver}"


# ------------------------------------------------------------------------------------------------------------ planning


def matched_sites(
    A: nn.Module, B: nn.Module, *, image_size: int, parts: Sequence[str] = ("decoder",), stride: int | None = None
) -> list[tuple[str, str]]:
    """For every stitchable site of A the stitchable site of B nearest in relative depth, part by part, in A's order.

    Relative depth is the rank among all sites of the part / (their number − 1), of the stitchable and the others alike;
    ties go to the earlier site. No pair is chosen for being similar.

    image_size : side of the square images, pixels
    stride : only maps of image_size / stride cells a side, rounded up; None: maps of every size
    """
    sites = [models.sites(model, image_size) for model in (A, B)]
    pairs = []
    for part in parts:
        left, right = (_depths(listed, part, image_size, stride) for listed in sites)
        if right:
            nearest = {a: min(right, key=lambda b: abs(right[b] - depth)) for a, depth in left.items()}
            pairs += nearest.items()
    if not pairs:
        cells = "" if stride is None else f" of {image_size // stride} cells a side"
        raise InputError(f"no maps{cells} in {' or '.join(parts)} that both models have; use another stride or part")
    return pairs


def _depths(sites: Sequence[Site], part: str, image_size: int, stride: int | None) -> dict[str, Fraction]:
    """Stitchable sites of a part -> relative depth, exact so that rounding breaks no tie."""
    within = [site for site in sites if site.part == part]
    wanted = None if stride is None else (-(-image_size // stride),) * 2
    return {
        site.name: Fraction(rank, max(len(within) - 1, 1))
        for rank, site in enumerate(within)
        if not stitchable(site) and wanted in (None, map_size(site, (image_size, image_size)))
    }


def plan(
    first: Sequence[str],
    second: Sequence[str],
    untrained: Mapping[str, str],
    matched: Sequence[tuple[str, str]],
    *,
    pairs: int = 6,
    seeds: int = 1,
) -> list[StitchJob]:
    """The stitches of two architectures in both directions, each with its two baselines; none is there twice.

    first, second : names of the trained networks of each, one a seed; at least two of each, or there is no twin
    untrained : trained network -> its untrained twin
    matched : (site of the first, site of the second), as `matched_sites` gives them
    pairs : at most so many of them, evenly over the depth, the ends included
    seeds : so many networks of each play, the k-th of one with the k-th of the other and the next seed as twin
    """
    if min(len(first), len(second)) < max(2, seeds) or seeds < 1 or pairs < 1:
        raise InputError(
            f"{len(first)} and {len(second)} networks for {seeds} seeds and {pairs} pairs of sites: a twin needs at "
            "least two seeds of each architecture, and at least one seed and one pair are stitched"
        )
    places = np.linspace(0, len(matched) - 1, min(pairs, len(matched))).round().astype(int)
    chosen = [tuple(matched[place]) for place in places]
    jobs = []
    for k in range(seeds):
        for givers, receivers, sites in ((first, second, chosen), (second, first, [pair[::-1] for pair in chosen])):
            giver, receiver, twin = givers[k], receivers[k], receivers[(k + 1) % len(receivers)]
            without = pick("network among the untrained twins", giver, untrained)
            for site_a, site_b in sites:
                jobs += [
                    StitchJob(giver, site_a, receiver, site_b, "cross"),
                    StitchJob(twin, site_b, receiver, site_b, "twin"),
                    StitchJob(without, site_a, receiver, site_b, "untrained"),
                ]
    return list(dict.fromkeys(jobs))


# ------------------------------------------------------------------------------------------------------------- scoring


def stitched_scores(
    networks: Mapping[str, nn.Module],
    jobs: Sequence[StitchJob],
    train: SegmentationDataset,
    test: SegmentationDataset,
    *,
    images: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
) -> pd.DataFrame:
    """One row a job and test image: what the job is, id, dice, dice_own and dice_without.

    dice : of the receiver with the stitch, trained by Dice and cross-entropy from the least-squares map
    dice_own : of the receiver as it is, on the same image
    dice_without : of the receiver with its site's mean over the training images in place of the site: where skip
        connections carry the answer past the site this stays high, and no stitch there says much
    networks : by name, moved to `device` and otherwise left as they are
    images : so many training images, a seeded choice by id, without augmentation; `seed` draws all else, too
    """
    batches = _training_batches(train, images, batch_size, seed)
    for name in {name for job in jobs for name in (job.giver, job.receiver)}:
        pick("network", name, networks).to(device)
    count = sum(len(part) for part, _ in batches)
    print(
        f"{len(jobs)} stitches of {epochs} epochs × {len(batches)} steps ({count} images, {batch_size} a step): "
        f"{len(jobs) * epochs * len(batches)} steps through two networks, then {len(test)} test images each.",
        flush=True,
    )
    loader = make_loader(test, batch_size)
    own: dict[str, pd.Series] = {}
    without: dict[tuple[str, str], pd.Series] = {}
    tables = []
    for job in progress(jobs, desc="stitching", unit="stitch"):
        giver, receiver = networks[job.giver], networks[job.receiver]
        if job.receiver not in own:
            own[job.receiver] = _dice(receiver, loader)
        stitch = Stitch(giver, job.site_a, receiver, job.site_b, batches[0][0][:2])
        stitch.spec = receiver.spec  # what the receiver's answer means, for `lesion_logits`
        target = (job.receiver, job.site_b)
        if target not in without:
            mean_only(stitch, [part for part, _ in batches])
            without[target] = _dice(stitch, loader)
        fit(stitch, batches, _loss, epochs=epochs, learning_rate=learning_rate, seed=seed)
        columns = {"dice": _dice(stitch, loader), "dice_own": own[job.receiver], "dice_without": without[target]}
        table = pd.DataFrame(columns).rename_axis("id").reset_index()
        tables.append(table.assign(**{key: getattr(job, key) for key in JOB}))
    if not tables:
        raise InputError("no stitch was asked for; make some with `plan`")
    return pd.concat(tables, ignore_index=True)[[*JOB, "id", "dice", "dice_own", "dice_without"]]


def _training_batches(train: SegmentationDataset, images: int, batch_size: int, seed: int) -> Batches:
    """(images, masks) on the CPU, the same in every epoch; their order is `fit`'s to draw."""
    chosen = SegmentationDataset(cap(train.pairs, images, seed), train.transform.unaugmented)
    return [(batch.image, batch.mask) for batch in make_loader(chosen, batch_size, shuffle=True, seed=seed)]


def _loss(stitch: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    return dice_bce(models.lesion_logits(stitch, images), masks)


def _dice(model: nn.Module, loader) -> pd.Series:
    """Dice of every image, by id."""
    parts = [
        pd.Series(image_metrics(predict(model, batch.image) > 0, batch.mask > 0.5)["dice"], index=batch.id)
        for batch in loader
    ]
    return pd.concat(parts)


# ------------------------------------------------------------------------------------------------------------- summary


def summarize(table: pd.DataFrame, *, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row a job: its names, images, dice and dice_own (means), kept with low and high, and the baselines beside.

    kept : mean(dice) / mean(dice_own) over images, with a 95 % percentile bootstrap that draws images anew, both
        Dice of an image together; not defined (NaN) where the receiver's own mean is 0
    without, without_low, without_high : the same of the receiver without what its site knows
    twin…, untrained… : kept of the baselines of a cross job: same receiver and sites; NaN for other jobs, or where the
        table holds no such baseline

    The intervals speak of these networks on other images, not of other seeds.
    """
    rows = []
    for key, group in table.groupby(JOB, sort=False):
        group = group.sort_values("id")
        row = dict(zip(JOB, key)) | {"images": len(group), "dice": group.dice.mean(), "dice_own": group.dice_own.mean()}
        for name, column in (("kept", "dice"), ("without", "dice_without")):
            values = _ratio_with_interval(group[column], group.dice_own, resamples, seed)
            row |= dict(zip((name, *_ends(name)), values))
        rows.append(row)
    summary = pd.DataFrame(rows)
    for kind in BASELINES:
        columns = [kind, f"{kind}_low", f"{kind}_high"]
        summary[columns] = [_baseline(summary, row, kind) for row in summary.itertuples()]
    return summary


def _ends(name: str) -> tuple[str, str]:
    return ("low", "high") if name == "kept" else (f"{name}_low", f"{name}_high")


def _baseline(summary: pd.DataFrame, job, kind: str) -> list[float]:
    """kept, low and high of the baseline of a cross job; NaN where there is none."""
    site_a = job.site_b if kind == "twin" else job.site_a
    same = (summary.receiver == job.receiver) & (summary.site_b == job.site_b) & (summary.site_a == site_a)
    found = summary[same & (summary.kind == kind)]
    if job.kind != "cross" or found.empty:
        return [np.nan] * 3
    if len(found) > 1:
        raise InputError(f"{len(found)} {kind} stitches for {job.site_b!r} of {job.receiver!r}; summarize them apart")
    return found[["kept", "low", "high"]].iloc[0].tolist()


def _ratio_with_interval(part: pd.Series, whole: pd.Series, resamples: int, seed: int) -> tuple[float, float, float]:
    """(mean(part) / mean(whole), low, high): 95 %, rows of both drawn together."""
    values = np.stack([part, whole], axis=1).astype(np.float64)
    rng = np.random.default_rng(seed)
    sums = np.array([values[rng.integers(0, len(values), len(values))].sum(0) for _ in range(resamples)])
    low, high = np.quantile(_quotient(sums), [0.025, 0.975])
    return float(_quotient(values.sum(0))), float(low), float(high)


def _quotient(sums: np.ndarray) -> np.ndarray:
    """First over second along the last axis, NaN where the second is 0."""
    part, whole = sums[..., 0], sums[..., 1]
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
