"""The numbers of an explanation study over all its networks: what was made, how alike, grouped how, following what.

From the kept maps of each network to tables, maps averaged to a common grid of cells and matched by image ids. Nothing
is made or drawn here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor

from explanations import agreement, clusters, masks
from loss_metrics import image_metrics
from similarity.factors import holm
from similarity.nulls import benjamini_hochberg
from studies import explanation_work
from studies.explained_images import true_masks
from studies.explaining import Made
from studies.explanation_verdicts import ALPHA
from studies.explanation_work import Job
from studies.subjects import SEGMENTATION, Subject, twins
from utils import InputError

OTHER_SEED, SAME, DIFFERENT = "same network, other seed", "same family", "different family"
FEWEST_LABELS = 3  # of a jackknife
ABSOLUTE = "absolute mass"  # the one quantity that is of maps without their signs
RESOLUTIONS = (0.5, 0.75, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.25, 1.5, 2.0)  # even weights part near 1
Kept = dict[str, dict[str, Made]]  # network -> way -> what it gave


def all_kept(subjects: Sequence[Subject], job: Job, folder: Path) -> Kept:
    """Everything that was made; a way that a network could not be asked for is in its `refused`."""
    empty = Made({}, {}, {}, (), {}, {}, 0.0)
    return {
        subject.name: {way.name: explanation_work.kept(subject, way, job, folder) or empty for way in job.ways}
        for subject in subjects
    }


def by_variant(job: Job, made: Mapping[str, Made]) -> dict[str, Made]:
    """variant -> what its way gave of one network."""
    return {variant: made[way] for way, variant in variants_of(job)}


def inventory(subjects: Sequence[Subject], job: Job, kept: Kept, checks: pd.DataFrame) -> pd.DataFrame:
    """One row a network and variant: how many explanations, how long one takes, why there is none, what failed.

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
    return pd.DataFrame(rows).merge(checks[["network", "variant", "failed"]], on=["network", "variant"], how="left")


def _words(settings: Mapping) -> str:
    return "; ".join(f"{name} {value}" for name, value in settings.items())


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
    """`agreement.compare` of every variant, with the kind of each pair, q over all pairs, and what failed."""
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
    table["q"] = table.groupby(["method", "similarity"])["p"].transform(lambda p: benjamini_hochberg(p.to_numpy()))
    return with_failures(table, checks)


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """The first similarity's pairs in the columns that a heat map needs: small enough to be committed."""
    columns = ["method", "model_a", "model_b", "kind", "n", "mean", "dissimilarity", "null_mean", "q", "ceiling", "u"]
    return table.loc[table["similarity"] == table["similarity"].iloc[0], columns]


def with_failures(table: pd.DataFrame, checks: pd.DataFrame, column: str = "failed") -> pd.DataFrame:
    """Column `failed`: why the method is not to be trusted on one of the two networks of a row; '' where it is."""
    why = {(row.network, row.variant): getattr(row, column) for row in checks.itertuples()}
    sides = [column for column in ("model_a", "model_b", "model") if column in table]

    def words(row: tuple) -> str:
        *names, method = row
        return "; ".join(f"{name}: {why[name, method]}" for name in names if why.get((name, method)))

    return table.assign(failed=[words(row) for row in table[[*sides, "method"]].itertuples(index=False)])


def with_counted_failures(table: pd.DataFrame, verdicts: pd.DataFrame) -> pd.DataFrame:
    """Column `failing`: on how many of the networks a row's method fails, such as '3 of 36'."""
    fails = (verdicts["failed"] != "").groupby(verdicts["variant"])
    words = {method: f"{count} of {size}" for method, count, size in zip(fails.sum().index, fails.sum(), fails.size())}
    return table.assign(failing=table["method"].map(words))


def _kind(a: Subject, b: Subject) -> str:
    return OTHER_SEED if a.label == b.label else SAME if a.family == b.family else DIFFERENT


def kinds(table: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """Means over pairs of networks by kind: method, similarity, kind, pairs, mean, null_mean, u, above_null, failed.

    u : Σ (mean − null_mean) / Σ (ceiling − null_mean) over the pairs that have a ceiling: a ratio of means, since a
        single pair's ceiling may lie next to its null; NaN where the ceilings are not above
    mean_low, mean_high, u_low, u_high : 95 %, Student's t of the jackknife that leaves out one label at a time with all
        its pairs (pairs share networks, so they are no independent values); NaN with fewer than three labels
    above_null : share of the pairs whose q (Benjamini-Hochberg over all pairs) is below 0.05; failed : share of the
        pairs with a network on which the method fails
    """
    rows = []
    for (method, similarity, kind), part in table.groupby(["method", "similarity", "kind"], sort=False):
        ends = part[["model_a", "model_b"]].map(labels.get)
        row = {"method": method, "similarity": similarity, "kind": kind, "pairs": len(part)}
        row |= {"null_mean": part["null_mean"].mean(), "above_null": (part["q"] < ALPHA).mean()}
        row |= {"failed": (part["failed"] != "").mean()}
        for name, statistic in (("mean", _mean), ("u", _position)):
            row[name] = statistic(part)
            row[f"{name}_low"], row[f"{name}_high"] = _over_labels(statistic, part, ends)
        rows.append(row)
    return pd.DataFrame(rows)


def _mean(pairs: pd.DataFrame) -> float:
    return pairs["mean"].mean()


def _position(pairs: pd.DataFrame) -> float:
    there = pairs[pairs["ceiling"].notna()]
    room = (there["ceiling"] - there["null_mean"]).sum()
    return (there["mean"] - there["null_mean"]).sum() / room if room > 0 else np.nan


def _over_labels(statistic: Callable, pairs: pd.DataFrame, ends: pd.DataFrame) -> tuple[float, float]:
    """Delete-one jackknife over labels."""
    names = list(pd.unique(ends.to_numpy().ravel()))
    without = np.array([statistic(pairs[~(ends == name).any(axis=1)]) for name in names])
    count = len(names)
    if count < FEWEST_LABELS or not np.isfinite(without).all():
        return np.nan, np.nan
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    reach = error * student.ppf(0.975, count - 1)
    return statistic(pairs) - reach, statistic(pairs) + reach


# -------------------------------------------------------------------------------------------------------------- grouped


def groups(config, subjects: Sequence[Subject], table: pd.DataFrame) -> pd.DataFrame:
    """`clusters.cluster_table` with the families as labels, seeds of a label kept together.

    among : 'all' networks, or only those on which the method does not 'fail'; left_out : networks without a value,
    which can be in no group; p_holm : of the Mantel tests, corrected for the methods (Holm)
    """
    frames = []
    for among, rows in (("all", table), ("faithful", _without_failing(table))):
        for _, part in rows.groupby(["method", "similarity"], sort=False):
            left = without_missing(part)
            if left["model_a"].nunique() < 2:  # two networks make no groups
                continue
            absent = sorted(_models(part) - _models(left))
            found = _grouped(config, subjects, left)
            frames.append(found.assign(among=among, left_out=", ".join(absent)))
    if not frames:
        return pd.DataFrame(columns=[*clusters.COLUMNS, "among", "left_out", "p_holm"])
    found = pd.concat(frames, ignore_index=True)
    tests = found["clustering"] == clusters.MANTEL
    by_similarity = found[tests].groupby(["among", "similarity"])["p"]
    return found.assign(p_holm=by_similarity.transform(lambda p: holm(p.to_numpy())))


def _grouped(config, subjects: Sequence[Subject], pairs: pd.DataFrame) -> pd.DataFrame:
    families = {subject.name: subject.family for subject in subjects}
    labels = {subject.name: subject.label for subject in subjects}
    shift = bool((pairs["mean"] < 0).any())  # Louvain knows no negative weights
    settings = {"architectures": labels, "resolutions": RESOLUTIONS, "shift": shift, "seed": config.seed}
    return clusters.cluster_table(pairs, families, **settings)


def _models(pairs: pd.DataFrame) -> set[str]:
    return {*pairs["model_a"], *pairs["model_b"]}


def _without_failing(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["failed"] == ""]


def without_missing(pairs: pd.DataFrame) -> pd.DataFrame:
    """Without the networks that have no value with others, those with most such pairs first."""
    while pairs["mean"].isna().any():
        missing = pairs[pairs["mean"].isna()]
        worst = pd.concat([missing["model_a"], missing["model_b"]]).value_counts().index[0]
        pairs = pairs[(pairs["model_a"] != worst) & (pairs["model_b"] != worst)]
    return pairs


# --------------------------------------------------------------------------------------------------------- beside masks


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
    table = pd.concat(frames, ignore_index=True)
    signed, absolute = (with_failures(table, checks, column) for column in ("failed", "failed_absolute"))
    return signed.assign(failed=signed["failed"].where(table["quantity"] != ABSOLUTE, absolute["failed"]))


def _size(subject: Subject) -> int:
    return subject.image_size


# ------------------------------------------------------------------------------------------------------------- networks


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
