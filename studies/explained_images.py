"""The images that an explanation study asks about: the same ones for every network, at each network's own size.

Test images of a segmentation set with their masks, or validation photographs of a set of classes; chosen by id, never
by position. What is asked about them is said here too: the target of a network. Nothing is explained here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.photos import IMAGENETTE, PhotoSet, load_photos, photo_set, synthetic_masks
from dataset import SegmentationDataset
from explanations.targets import Target, class_logit, masked_logit, predicted_masks
from sources import ImageSource, open_datasets
from studies.subjects import CLASSIFICATION, SEGMENTATION, Subject
from utils import InputError, digest

FEWEST = 8  # images: with fewer there is no null worth the name


@dataclass(frozen=True)
class Images:
    """One size of the chosen images.

    pixels : (N, 3, size, size) in [0, 1]; masks : (N, 1, size, size) bool of the object, None where nobody outlined it;
    classes : (N,) of photographs, None of segmentation images
    """

    ids: tuple[str, ...]
    pixels: Tensor
    masks: Tensor | None
    classes: Tensor | None

    def first(self, count: int) -> Images:
        """The first so many."""
        return self.at_rows(range(len(self.ids))[:count])

    def at_rows(self, rows: Sequence[int]) -> Images:
        """Those of these rows."""
        parts = (part if part is None else part[list(rows)] for part in (self.pixels, self.masks, self.classes))
        return Images(tuple(self.ids[row] for row in rows), *parts)


@dataclass(frozen=True)
class Chosen:
    """Which images all networks are asked about, in the order in which methods take the first so many of them.

    fingerprint : of all images of the split; names : of the classes of photographs
    """

    kind: str
    ids: tuple[str, ...]
    fingerprint: str
    source: ImageSource
    names: tuple[str, ...] = ()
    _read: dict[int, Images] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict:
        """Without what was read: another process reads for itself, which is less than sending it hundreds of MB."""
        return {**self.__dict__, "_read": {}}

    def at(self, size: int) -> Images:
        """The images at `size` pixels a side, read once."""
        if size not in self._read:
            if self.kind == SEGMENTATION:
                self._read[size] = _segmented(_test_set(self.source, size), self.ids)
            else:
                self._read[size] = _photographs(self.source, self.ids, size)
        return self._read[size]

    def first(self, count: int) -> Chosen:
        """The first so many."""
        return dataclasses.replace(self, ids=self.ids[:count])

    def without(self, ids: Sequence[str]) -> Chosen:
        """The same without some."""
        return dataclasses.replace(self, ids=tuple(each for each in self.ids if each not in set(ids)))


def choose(
    source: ImageSource, kind: str, count: int | None, sizes: Sequence[int], *, label: int | None = None, seed: int = 0
) -> Chosen:
    """A seeded choice by id: of segmentation images those with an object, of photographs evenly over the classes.

    count : at most so many; None: all there are
    sizes : at which the object has to be there, since a small one may vanish; label : of the object, where there are
        several classes
    """
    if kind == SEGMENTATION:
        tests = [_test_set(source, size) for size in sorted(set(sizes))]
        there = set.intersection(*(_with_object(each, label) for each in tests))
        return Chosen(kind, _first(_shuffled(sorted(there), seed), count), tests[-1].fingerprint, source)
    photos = _photos(source)
    by_class = [_shuffled(sorted(_of_class(photos, label)), seed) for label in range(len(photos.classes))]
    turns = [names[turn] for turn in range(max(map(len, by_class))) for names in by_class if turn < len(names)]
    return Chosen(kind, _first(turns, count), photos.fingerprint, source, photos.classes)


def _shuffled(names: Sequence[str], seed: int) -> list[str]:
    return [names[place] for place in np.random.default_rng(seed).permutation(len(names))]


def _first(names: Sequence[str], count: int | None) -> tuple[str, ...]:
    found = tuple(names[:count])
    if len(found) < FEWEST:
        raise InputError(f"{len(found)} images can be explained: give at least {FEWEST}")
    return found


def _test_set(source: ImageSource, size: int) -> SegmentationDataset:
    return open_datasets(dataclasses.replace(source, image_size=size), needed=("test",))["test"]


def _with_object(test: SegmentationDataset, label: int | None) -> set[str]:
    masks = (test.pixels(row)[..., 3] for row in range(len(test)))
    return {name for name, mask in zip(test.ids, masks) if (mask > 0 if label is None else mask == label).any()}


def _segmented(test: SegmentationDataset, ids: Sequence[str]) -> Images:
    rows = {name: row for row, name in enumerate(test.ids)}
    samples = [test[rows[name]] for name in ids]
    pixels, masks = (torch.stack([getattr(sample, key) for sample in samples]) for key in ("image", "mask"))
    return Images(tuple(ids), pixels, masks, None)


def _photos(source: ImageSource) -> PhotoSet:
    return photo_set(source.data, "val")


def _of_class(photos: PhotoSet, label: int) -> list[str]:
    return [name for name, own in zip(photos.ids, photos.labels) if own == label]


def _photographs(source: ImageSource, ids: Sequence[str], size: int) -> Images:
    photos = _photos(source)
    rows = {name: row for row, name in enumerate(photos.ids)}
    chosen = [rows[name] for name in ids]
    pixels, labels = load_photos(photos, size, chosen)
    return Images(tuple(ids), pixels.float() / 255, _outlined(Path(source.data), ids, size), labels)


def _outlined(folder: Path, ids: Sequence[str], size: int) -> Tensor | None:
    """(N, 1, size, size) bool of drawn pictures, which come with masks; nobody outlined photographs."""
    if not (folder / "masks").is_dir():
        return None
    masks = synthetic_masks(folder, ids)
    whole = torch.stack([torch.from_numpy(masks[name]) for name in ids])[:, None].float()
    return F.interpolate(whole, size=(size, size), mode="nearest") > 0.5


# ------------------------------------------------------------------------------------------------------------- targets


def target_of(
    subject: Subject, model: nn.Module, images: Images, chosen: Chosen, which: str, label: int | None
) -> Target:
    """What is explained: the logit of a photograph's own class, or the summed logit inside the true or predicted mask.

    label : the class of a segmentation model of several; its true mask is where the image has that class
    """
    if subject.kind == CLASSIFICATION:
        return class_logit(own_classes(subject, images, chosen))
    if which == "predicted":
        return masked_logit(predicted_masks(model, images.pixels, label), label, which=which, ids=images.ids)
    return masked_logit(true_masks(images, label), label, which=which, ids=images.ids)


def true_masks(images: Images, label: int | None) -> Tensor:
    """(N, 1, H, W) bool: where the object is, or a class of several."""
    return images.masks > 0 if label is None else images.masks == label


def own_classes(subject: Subject, images: Images, chosen: Chosen) -> Tensor:
    """(N,): the number that a classifier has for each photograph's class, by the classes' names; of one of ImageNet's
    1000 classes ImageNet's own."""
    unknown = [name for name in chosen.names if name not in (subject.classes or IMAGENETTE)]
    if unknown:
        known = "trained on other classes" if subject.classes else "asked for Imagenette's ten classes alone"
        raise InputError(
            f"{subject.name} does not know the class {unknown[0]!r}: it was {known}; use photographs of its classes, "
            "or a classifier trained on these"
        )
    numbers = [subject.classes.index(name) if subject.classes else IMAGENETTE[name].index for name in chosen.names]
    return torch.tensor(numbers)[images.classes]


def key_of(chosen: Chosen) -> str:
    """Of the images and their order."""
    return digest(chosen.fingerprint, list(chosen.ids))
