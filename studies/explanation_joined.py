"""Does agreement on explanations follow other agreement, image by image? Of representations, and of answers.

For pairs of networks, per image: cosine of their maps against how alike they represent the image
(`similarity.per_image`) and how alike they answer. The correlation over images is with this set of images and these
networks: an image's representational agreement is measured against all the others, and the pairs share networks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from explanations import agreement, masks
from loss_metrics import image_metrics
from similarity import Recording, per_image
from similarity.calibration import matched_depth_pairs
from studies import explanation_work
from studies.analysis import varying
from studies.explained_images import true_masks
from studies.explanation_tables import Kept, maps_of, variants_of
from studies.explanation_work import Job, first_of_each_label
from studies.subjects import SEGMENTATION, Subject
from utils import InputError

Pair = tuple[Subject, Subject]
CORRELATED = [f"{part}{end}" for part in ("", "partial_") for end in ("low", "high", "p")] + ["spearman", "partial"]
MASKS, PROBABILITIES = "Dice between the masks", "1 − difference in the class's probability"


def joined(
    config, subjects: Sequence[Subject], job: Job, kept: Kept, folder: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(points, correlations), empty where there is no pair of different networks.

    Means over pairs of labels' first seeds: those of different families, or all where there is one family; of each
    method the pairs that have its maps, the same pairs on both sides, and only images that have a value of all of them.
    points : method, other, id, x, y, pairs; correlations : `masks.follows_per_image` of each method, and pairs
    """
    others = _Others(job, folder)
    area = _areas(subjects, job)
    points, found = [], []
    for way, variant in variants_of(job):
        firsts = [each for each in first_of_each_label(subjects) if variant in kept[each.name][way].maps]
        pairs = [(a, b) for a, b in itertools.combinations(firsts, 2) if a.family != b.family]
        pairs = pairs or list(itertools.combinations(firsts, 2))
        if not pairs:
            continue
        own = _explained_alike(maps_of({s.name: kept[s.name] for s in firsts}, way, variant, config.compared_at), pairs)
        given = {"area": None if area is None else area.reindex(own.index), "resamples": config.resamples}
        for name, values in others.of(pairs).items():
            values = values.reindex(own.index)
            row = _followed(own, name, values, config.seed, given)
            found.append(row.assign(method=variant, pairs=len(pairs)))
            frame = pd.DataFrame({"method": variant, "other": name, "id": own.index, "x": values, "y": own})
            points.append(frame.assign(pairs=len(pairs)))
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


def _explained_alike(maps: Mapping, pairs: Sequence[Pair]) -> pd.Series:
    """id -> mean cosine over the pairs, NaN where one of them has none."""
    table = agreement.per_image(maps, ["cosine"])
    wanted = {frozenset((a.name, b.name)) for a, b in pairs}
    there = [frozenset(pair) in wanted for pair in zip(table["model_a"], table["model_b"])]
    wide = table[there].pivot(index="id", columns=["model_a", "model_b"], values="value")
    return wide.mean(axis=1, skipna=False).reindex(list(dict.fromkeys(table["id"])))


class _Others:
    """What else pairs of networks agree on, each pair computed once."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.folder = job, folder
        self.recordings: dict[str, Recording] = {}
        self.answers: dict[str, Mapping[str, Tensor]] = {}
        self.known: dict[tuple[str, str], dict[str, pd.Series]] = {}

    def of(self, pairs: Sequence[Pair]) -> dict[str, pd.Series]:
        """name -> id -> mean over the pairs, NaN where one has none; what some pair lacks altogether is left out."""
        each = [self._of_pair(a, b) for a, b in pairs]
        names = [name for name in each[0] if all(name in other for other in each)]
        return {name: pd.concat([one[name] for one in each], axis=1).mean(axis=1, skipna=False) for name in names}

    def _of_pair(self, a: Subject, b: Subject) -> dict[str, pd.Series]:
        key = a.name, b.name
        if key not in self.known:
            for subject in (a, b):
                if subject.name not in self.answers:
                    self.recordings[subject.name] = explanation_work.recording(subject, self.job, self.folder)
                    self.answers[subject.name] = explanation_work.predictions(subject, self.job, self.folder)
            found = _represented_alike(*(self.recordings[name] for name in key))
            name = MASKS if a.kind == SEGMENTATION else PROBABILITIES
            self.known[key] = found | {name: _answered_alike(*(self.answers[each] for each in key), a.kind)}
        return self.known[key]


def _represented_alike(A: Recording, B: Recording) -> dict[str, pd.Series]:
    """By part, over pairs of sites at matched depth that are not constant."""
    found = {}
    for part in dict.fromkeys(site.part for site in A.sites):
        if all(site.part != part for site in B.sites):
            continue
        one, other = A.select(part=part), B.select(part=part)
        pairs = varying(one, other, matched_depth_pairs(one, other))
        if pairs:
            name = f"agreement of {part} representations".replace("  ", " ")
            found[name] = per_image.mean_agreement(one, other, pairs).set_index("id")["agreement"]
    return found


def _answered_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor], kind: str) -> pd.Series:
    names = list(a)
    one, other = (torch.stack([answers[name] for name in names]) for answers in (a, b))
    if kind == SEGMENTATION:
        return pd.Series(image_metrics(one, other)["dice"], names)
    return pd.Series((1 - (one[:, 0] - other[:, 0]).abs()).double().numpy(), names)


def _areas(subjects: Sequence[Subject], job: Job) -> pd.Series | None:
    images = job.chosen.at(max(subject.image_size for subject in subjects))
    if images.masks is None:
        return None
    return pd.Series(true_masks(images, job.label).double().mean((1, 2, 3)).numpy(), list(images.ids))
