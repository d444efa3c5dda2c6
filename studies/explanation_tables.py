"""The numbers of an explanation study over all its networks: what was made, how alike, grouped how, following what.

From the kept maps of each network to tables, maps averaged to a common grid of cells and matched by image ids. Nothing
is made or drawn here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from explanations import agreement, clusters, masks
from loss_metrics import image_metrics
from similarity import per_image
from similarity.calibration import matched_depth_pairs
from similarity.factors import holm
from studies import explanation_work
from studies.explained_images import true_masks
from studies.explaining import Made
from studies.explanation_checks import ALPHA
from studies.explanation_work import Job, first_of_each_label
from studies.subjects import SEGMENTATION, Subject, twins
from utils import InputError

OTHER_SEED, SAME, DIFFERENT = "same network, other seed", "same family", "different family"
MOST = 0.5  # of what is attributed
GAP, SAMPLING = "misses more than half of what it should sum to", "sampling error above half of the values"
CORRELATED = [f"{part}{end}" for part in ("", "partial_") for end in ("low", "high", "p")] + ["spearman", "partial"]
Kept = dict[str, dict[str, Made]]  # network -> way -> what it gave


def all_kept(subjects: Sequence[Subject], job: Job, folder: Path) -> Kept:
    """Everything that was made; a way that a network could not be asked for is in its `refused`."""
    empty = Made({}, {}, {}, (), {}, {}, 0.0)
    return {
        subject.name: {way.name: explanation_work.kept(subject, way, job, folder) or empty for way in job.ways}
        for subject in subjects
    }


def inventory(subjects: Sequence[Subject], job: Job, kept: Kept, checks: pd.DataFrame) -> pd.DataFrame:
    """One row a network and variant: how many explanations, seconds, what axiom is missed by, why none, what failed.

    milliseconds : of one explanation (Grad-CAM's share of a pass that serves all depths)
    """
    rows = []
    for subject, way in itertools.product(subjects, job.ways):
        made = kept[subject.name][way.name]
        for variant in way.variants:
            row = {"network": subject.name, "label": subject.label, "family": subject.family, "variant": variant}
            count = len(made.maps.get(variant, ()))
            row |= {"method": way.method, "explanations": count, "reason": made.refused.get(variant, "")}
            row |= {"settings": _words(made.settings.get(variant, {}))}
            row["milliseconds"] = 1000 * made.seconds / count / len(way.variants) if count else np.nan
            rows.append(row)
    beside = checks[["network", "variant", "gap", "sampling_error", "failed"]]
    return pd.DataFrame(rows).merge(beside, on=["network", "variant"], how="left")


def with_accuracy(checks: pd.DataFrame, job: Job, kept: Kept) -> pd.DataFrame:
    """Verdicts with two further columns, and `failed` also where one of them is above one half.

    gap : median over images of |what the map sums to less the change of the target| / |that change|; NaN where no axiom
        is promised
    sampling_error : of KernelSHAP, median over images of its values' standard errors / the values (norms)
    """
    way_of = {variant: way for way, variant in variants_of(job)}
    made = [kept[row.network][way_of[row.variant]] for row in checks.itertuples()]
    gaps = [_gap(each, variant) for each, variant in zip(made, checks["variant"])]
    errors = [
        float(each.errors[v].quantile(0.5)) if v in each.errors else np.nan for each, v in zip(made, checks["variant"])
    ]
    failed = [
        "; ".join(filter(None, [before, GAP * (gap > MOST), SAMPLING * (error > MOST)]))
        for before, gap, error in zip(checks["failed"], gaps, errors)
    ]
    return checks.assign(gap=gaps, sampling_error=errors, failed=failed)


def _words(settings: Mapping) -> str:
    return "; ".join(f"{name} {value}" for name, value in settings.items())


def _gap(made: Made, variant: str) -> float:
    if variant not in made.gaps:
        return np.nan
    gap = made.gaps[variant].double()
    change = made.maps[variant].double().sum((1, 2)) - gap
    return float((gap.abs() / change.abs()).quantile(0.5))


# ------------------------------------------------------------------------------------------------------------- compared


def pooled(maps: Tensor, cells: int) -> np.ndarray:
    """(N, cells, cells): maps (N, H, W) averaged over the cells of a grid (adaptive where they do not divide)."""
    return F.adaptive_avg_pool2d(maps[:, None].double(), cells)[:, 0].numpy()


def maps_of(kept: Kept, way: str, variant: str, cells: int) -> dict[str, dict[str, np.ndarray]]:
    """{network: {id: map}} of the networks that have this variant."""
    return {
        network: dict(zip(made[way].ids, pooled(made[way].maps[variant], cells)))
        for network, made in kept.items()
        if variant in made[way].maps
    }


def variants_of(job: Job) -> Iterator[tuple[str, str]]:
    """(way, variant) of all."""
    yield from ((way.name, variant) for way in job.ways for variant in way.variants)


def similarities(config, subjects: Sequence[Subject], job: Job, kept: Kept, checks: pd.DataFrame) -> pd.DataFrame:
    """`agreement.compare` of every variant, with the kind of each pair, p corrected for the pairs, and what failed."""
    frames, facts = [], {subject.name: subject for subject in subjects}
    for way, variant in variants_of(job):
        maps = maps_of(kept, way, variant, config.compared_at)
        if len(maps) < 2:
            continue
        there = [facts[name] for name in maps]
        found = agreement.compare(
            maps,
            config.similarities,
            twins=twins(there),
            sigma=config.sigma,
            fraction=config.top,
            permutations=config.permutations,
            resamples=config.resamples,
            seed=config.seed,
        )
        frames.append(found.assign(method=variant))
    if not frames:
        raise InputError("no method gave maps of two networks, so there is nothing to compare; see explanations/")
    table = pd.concat(frames, ignore_index=True)
    table["kind"] = [_kind(facts[a], facts[b]) for a, b in zip(table["model_a"], table["model_b"])]
    table["p_holm"] = table.groupby(["method", "similarity"])["p"].transform(lambda p: holm(p.to_numpy()))
    return with_failures(table, checks)


def with_failures(table: pd.DataFrame, checks: pd.DataFrame) -> pd.DataFrame:
    """Column `failed`: why the method is not to be trusted on one of the two networks of a row; '' where it is."""
    why = {(row.network, row.variant): row.failed for row in checks.itertuples()}
    sides = [column for column in ("model_a", "model_b", "model") if column in table]

    def words(row: tuple) -> str:
        *names, method = row
        return "; ".join(f"{name}: {why[name, method]}" for name in names if why.get((name, method)))

    return table.assign(failed=[words(row) for row in table[[*sides, "method"]].itertuples(index=False)])


def _kind(a: Subject, b: Subject) -> str:
    return OTHER_SEED if a.label == b.label else SAME if a.family == b.family else DIFFERENT


def kinds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over pairs of networks by kind: method, similarity, kind, pairs, mean, null_mean, u, above_null, failed.

    u : Σ (mean − null_mean) / Σ (ceiling − null_mean) over the pairs that have a ceiling: a ratio of means, since a
    single pair's ceiling may lie next to its null; NaN where the ceilings are not above. above_null : share of the
    pairs whose p, corrected for the pairs (Holm), is below 0.05; failed : share of the pairs with a network on which
    the method fails
    """
    grouped = table.groupby(["method", "similarity", "kind"], sort=False)
    found = grouped[["mean", "null_mean"]].mean()
    found["pairs"] = grouped.size()
    found["u"] = grouped.apply(_position)
    found["above_null"] = grouped["p_holm"].agg(lambda p: (p < ALPHA).mean())
    found["failed"] = grouped["failed"].agg(lambda words: (words != "").mean())
    return found.reset_index()


def _position(pairs: pd.DataFrame) -> float:
    there = pairs[pairs["ceiling"].notna()]
    room = (there["ceiling"] - there["null_mean"]).sum()
    return (there["mean"] - there["null_mean"]).sum() / room if room > 0 else np.nan


def groups(config, subjects: Sequence[Subject], table: pd.DataFrame) -> pd.DataFrame:
    """`clusters.cluster_table` with the families as labels, seeds of a label kept together."""
    families = {subject.name: subject.family for subject in subjects}
    labels = {subject.name: subject.label for subject in subjects}
    return clusters.cluster_table(table, families, architectures=labels, shift=True, seed=config.seed)


def inside_masks(config, subjects: Sequence[Subject], job: Job, kept: Kept, checks: pd.DataFrame) -> pd.DataFrame:
    """`masks.in_mask_summary` of every variant, at the resolution of each network, where there are masks."""
    frames = []
    by_size: dict[int, dict[str, np.ndarray]] = {}
    for way, variant in variants_of(job):
        for size, part in itertools.groupby(sorted(subjects, key=lambda each: each.image_size), _size):
            there = [subject for subject in part if variant in kept[subject.name][way].maps]
            if size not in by_size:
                images = job.chosen.at(size)
                if images.masks is None:
                    return pd.DataFrame()
                inside = true_masks(images, job.label)[:, 0].numpy()
                by_size[size] = dict(zip(images.ids, inside))
            if not there:
                continue
            maps = {s.name: dict(zip(kept[s.name][way].ids, kept[s.name][way].maps[variant].numpy())) for s in there}
            limits = {"permutations": config.permutations, "resamples": config.resamples, "seed": config.seed}
            found = masks.in_mask_summary(maps, by_size[size], twins=twins(there), **limits)
            frames.append(found.assign(method=variant))
    return with_failures(pd.concat(frames, ignore_index=True), checks)


def _size(subject: Subject) -> int:
    return subject.image_size


# --------------------------------------------------------------------------------------------------------------- joined


def joined(
    config, subjects: Sequence[Subject], job: Job, kept: Kept, folder: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(points, correlations): per image, does explanation agreement follow other agreement of the same networks?

    Means over pairs of labels' first seeds: those of different families, or all where there is one family. points :
    method, other, id, x, y, pairs; correlations : `masks.follows_per_image` of each method.
    """
    firsts = first_of_each_label(subjects)
    pairs = [(a, b) for a, b in itertools.combinations(firsts, 2) if a.family != b.family]
    pairs = pairs or list(itertools.combinations(firsts, 2))
    if not pairs:  # seeds of one network
        return pd.DataFrame(), pd.DataFrame()
    others = _other_agreements(pairs, job, folder)
    area = _areas(subjects, job)
    points, found = [], []
    for way, variant in variants_of(job):
        maps = maps_of({s.name: kept[s.name] for s in firsts}, way, variant, config.compared_at)
        usable = [(a.name, b.name) for a, b in pairs if a.name in maps and b.name in maps]
        if not usable:
            continue
        own = _explained_alike(maps, usable)
        known = {name: values.reindex(own.index) for name, values in others.items()}
        given = {"area": None if area is None else area.reindex(own.index), "resamples": config.resamples}
        rows = [_followed(own, name, values, config.seed, given) for name, values in known.items()]
        found.append(pd.concat(rows).assign(method=variant))
        for name, values in known.items():
            frame = pd.DataFrame({"method": variant, "other": name, "id": own.index, "x": values, "y": own})
            points.append(frame.assign(pairs=len(usable)))
    if not found:
        return pd.DataFrame(), pd.DataFrame()
    return pd.concat(points, ignore_index=True), pd.concat(found, ignore_index=True)


def _followed(own: pd.Series, name: str, values: pd.Series, seed: int, given: Mapping) -> pd.DataFrame:
    """A row of `masks.follows_per_image`; of too few images one without numbers, and why."""
    try:
        return masks.follows_per_image(own, {name: values}, seed=seed, **given)
    except InputError as error:
        there = (own.notna() & values.notna()).sum()
        row = {"other": name, "n": there, "left_out": len(own) - there, "reason": str(error)}
        return pd.DataFrame([row | dict.fromkeys(CORRELATED, np.nan)])


def _explained_alike(maps: Mapping, pairs: Sequence[tuple[str, str]]) -> pd.Series:
    """id -> mean cosine over the pairs that have one."""
    table = agreement.per_image(maps, ["cosine"])
    wanted = {frozenset(pair) for pair in pairs}
    there = [frozenset(pair) in wanted for pair in zip(table["model_a"], table["model_b"])]
    return table[there].groupby("id", sort=False)["value"].mean()


def _other_agreements(pairs: Sequence[tuple[Subject, Subject]], job: Job, folder: Path) -> dict[str, pd.Series]:
    """name -> id -> agreement: of representations by part, and of masks or probabilities."""
    recordings = {s.name: explanation_work.recording(s, job, folder) for pair in pairs for s in pair}
    answers = {s.name: explanation_work.predictions(s, job, folder) for pair in pairs for s in pair}
    parts = dict.fromkeys(site.part for each in recordings.values() for site in each.sites)
    found = {}
    for part in parts:
        own = {
            name: each.select(part=part)
            for name, each in recordings.items()
            if any(site.part == part for site in each.sites)
        }
        each = [_represented_alike(own[a.name], own[b.name]) for a, b in pairs if a.name in own and b.name in own]
        if each:
            found[f"agreement of {part} representations"] = pd.concat(each, axis=1).mean(axis=1)
    name = "Dice between the masks" if pairs[0][0].kind == SEGMENTATION else "1 − difference in the class's probability"
    each = [_answered_alike(answers[a.name], answers[b.name], a.kind) for a, b in pairs]
    return found | {name: pd.concat(each, axis=1).mean(axis=1)}


def _represented_alike(A, B) -> pd.Series:
    return per_image.mean_agreement(A, B, matched_depth_pairs(A, B)).set_index("id")["agreement"]


def _answered_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor], kind: str) -> pd.Series:
    names = list(a)
    one, other = (torch.stack([answers[name] for name in names]) for answers in (a, b))
    if kind == SEGMENTATION:
        return pd.Series(image_metrics(one, other)["dice"], names)
    return pd.Series((1 - (one[:, 0] - other[:, 0]).abs()).double().numpy(), names)


def _areas(subjects: Sequence[Subject], job: Job) -> pd.Series | None:
    images = job.chosen.at(max(map(_size, subjects)))
    if images.masks is None:
        return None
    return pd.Series(true_masks(images, job.label).double().mean((1, 2, 3)).numpy(), list(images.ids))


# --------------------------------------------------------------------------------------------------------------- checks


def covered(tables: Mapping[str, Mapping[str, pd.DataFrame]], labels: Mapping[str, str]) -> pd.DataFrame:
    """What covering the object changes: network, label, variant, n, answer before and after, map's rank correlation."""
    rows = []
    for name, found in tables.items():
        if "cover" not in found:
            continue
        for variant, part in found["cover"].groupby("variant", sort=False):
            row = {"network": name, "label": labels[name], "variant": variant, "n": len(part)}
            columns = ["score", "score_covered", "answer", "answer_covered", "rank_correlation"]
            rows.append(row | part.reindex(columns=columns).mean().to_dict() | {"covered": part["covered"].iloc[0]})
    return pd.DataFrame(rows)


def randomized(tables: Mapping[str, Mapping[str, pd.DataFrame]], labels: Mapping[str, str]) -> pd.DataFrame:
    """Rank correlation with the maps of the intact network, by level: network, variant, level, randomized, n, means."""
    frames = []
    for name, found in tables.items():
        if "randomization" in found and "level" in found["randomization"]:
            grouped = found["randomization"].dropna(subset=["level"]).groupby(["variant", "level"], sort=False)
            means = grouped[["randomized", "rank_correlation", "rank_correlation_absolute"]].mean()
            means["n"] = grouped["rank_correlation"].count()
            frames.append(means.reset_index().assign(network=name, label=labels[name]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def network_table(subjects: Sequence[Subject], job: Job, folder: Path) -> pd.DataFrame:
    """One row a network: name, label, family, seed, image_size, score (mean IoU, or share of right classes), n."""
    rows = []
    for subject in subjects:
        answers = explanation_work.predictions(subject, job, folder)
        row = {"network": subject.name, "label": subject.label, "family": subject.family, "seed": subject.seed}
        row |= {"image_size": subject.image_size, "score": _score(subject, answers, job), "n": len(answers)}
        rows.append(row)
    return pd.DataFrame(rows)


def _score(subject: Subject, answers: Mapping[str, Tensor], job: Job) -> float:
    values = torch.stack(list(answers.values()))
    if subject.kind != SEGMENTATION:
        return float(values[:, 1].double().mean())
    truth = true_masks(job.chosen.at(subject.image_size), job.label)[:, 0]
    return float(image_metrics(values, truth)["iou"].mean())
