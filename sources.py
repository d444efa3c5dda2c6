"""Which images a run uses: the embedded synthetic set or a folder in a known layout, opened as checked data sets.

What the classes are called and how large a part of the training images is used is said here too. How a folder becomes
pairs is in `layouts.py`, how they are served in `dataset.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset import SegmentationDataset, cap, find_splits
from images import IGNORE, Pair, Transform
from layouts import AUTO, READERS, recognise, settle_classes
from synthetic import make_dataset
from utils import HOME, InputError, pick

SYNTHETIC = "synthetic"
# the settings of an ImageSource that say which images there are; the others say how a model sees them
CHOICE_OF_IMAGES = (
    "data",
    "synthetic_images",
    "synthetic_size",
    "synthetic_seed",
    "limits",
    "layout",
    "classes",
    "mask_values",
    "fraction",
    "fraction_seed",
    "repeats",
)


@dataclass
class ImageSource:
    """
    Args:
        data: 'synthetic' (made once, in data/synthetic) or a folder of images and masks, such as ISIC 2018's
        image_size: side of the square images the models see, pixels
        blur: radius of a Gaussian blur of the original image, pixels; the earlier study used 2
        interpolation: 'area', 'bicubic' or 'bilinear'
        flips: whether training images are flipped and turned by quarters, anew each epoch, as all that follows to hair
        rotate: training images are turned by up to so many degrees either way (0 to 180); 0 is off
        scale: training images are zoomed by 1 - scale to 1 + scale (0 to 0.9); 0 is off
        colour: strength of the change in brightness, contrast, saturation and hue of training images (0 to 1)
        hair: probability that dark hairs are drawn over a training image (0 to 1)
        synthetic_images: images of the synthetic set per split, drawn at `synthetic_size` pixels
        synthetic_size: side of the synthetic originals, pixels
        synthetic_seed: another seed is another synthetic set
        limits: at most so many images of a split, e.g. {"train": 400}; a seeded choice by id
        layout: of the data folder: 'isic', 'pet' (Oxford-IIIT Pet) or 'folder' (images beside masks, whole or in train,
            validation and test); 'auto' recognises it
        classes: names of the classes; none: background and lesion, or of Pet's trimaps pet, background and border
        mask_values: for each class the mask values that mean it, such as [[2], [1, 3]] for background and pet; none:
            Pet's 1, 2 and 3; else of two classes 0 and whatever is not 0, of more 0, 1, 2 and so on; 255 is ignored
            where there are three classes or more
        fraction: this share of the training images is used (above 0, up to 1), after limits; a smaller one is a subset
            of a larger one
        fraction_seed: of the choice of that share; another seed is another choice
        repeats: an epoch serves each training image so many times, augmented anew each time, so that runs on fractions
            can make equally many steps
    """

    data: str = SYNTHETIC
    image_size: int = 64
    blur: float = 0.0
    interpolation: str = "area"
    flips: bool = True
    rotate: float = 0.0
    scale: float = 0.0
    colour: float = 0.0
    hair: float = 0.0
    synthetic_images: dict[str, int] = field(default_factory=lambda: {"Training": 240, "Validation": 60, "Test": 100})
    synthetic_size: int = 128
    synthetic_seed: int = 0
    limits: dict[str, int] = field(default_factory=dict)
    layout: str = AUTO
    classes: list[str] = field(default_factory=list)
    mask_values: list[list[int]] = field(default_factory=list)
    fraction: float = 1.0
    fraction_seed: int = 0
    repeats: int = 1

    @property
    def is_synthetic(self) -> bool:
        return self.data == SYNTHETIC

    @property
    def settled_layout(self) -> str:
        """'isic', 'pet' or 'folder'; with 'auto' the data folder is looked at, so it has to be there."""
        if self.is_synthetic:
            return "isic"
        if self.layout == AUTO:
            return recognise(self.data, AUTO)
        pick("layout", self.layout, READERS)
        return self.layout

    @property
    def class_names(self) -> tuple[str, ...]:
        return settle_classes(self.settled_layout, self.classes, self.mask_values)[0]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def transform(self) -> Transform:
        pixels = (self.image_size, self.blur, self.interpolation)
        values = settle_classes(self.settled_layout, self.classes, self.mask_values)[1]
        return Transform(*pixels, self.flips, self.rotate, self.scale, self.colour, self.hair, values)


def locate(source: ImageSource) -> Path:
    """The folder of the images, after making the synthetic set if that is the one asked for."""
    if not source.is_synthetic:
        return Path(source.data)
    counts = "-".join(str(count) for count in source.synthetic_images.values())
    folder = HOME / "data" / f"synthetic-{counts}-{source.synthetic_size}px-seed{source.synthetic_seed}"
    return make_dataset(folder, counts=source.synthetic_images, size=source.synthetic_size, seed=source.synthetic_seed)


def open_datasets(source: ImageSource, *, seed: int = 0, needed: tuple[str, ...] = ("train", "validation", "test")):
    """{split: SegmentationDataset} with every file checked and cached; only 'train' is augmented.

    Which image is in which split, and which ones `limits` and `fraction` keep, never depends on `seed`, which draws the
    augmentation. InputError where the training images hold no pixel of some class.
    """
    check_source(source)
    transform = source.transform
    splits = find_splits(locate(source), layout=source.settled_layout)
    absent = [name for name in needed if name not in splits]
    if absent:
        raise InputError(f"{source.data} has no {absent[0]} images, and no Training folder to draw them from")
    chosen = {name: cap(splits[name], source.limits.get(name)) for name in needed}
    if "train" in chosen:
        chosen["train"] = part_of(chosen["train"], source.fraction, source.fraction_seed)
    datasets = {
        name: SegmentationDataset(
            pairs, transform, augment=name == "train", seed=seed, repeats=source.repeats if name == "train" else 1
        )
        for name, pairs in chosen.items()
    }
    if "train" in datasets and (source.fraction < 1 or source.classes or transform.values):
        _refuse_absent_class(source, datasets["train"])
    if transform.num_classes > 2:
        for data in datasets.values():
            _refuse_uncounted(data)
    return datasets


def part_of(pairs: Sequence[Pair], fraction: float, seed: int = 0) -> list[Pair]:
    """This share of the pairs, at least one, in id order; a smaller share lies in a larger one of the same seed."""
    return cap(pairs, max(1, round(fraction * len(pairs))), seed) if fraction < 1 else list(pairs)


def check_source(source: ImageSource) -> None:
    """Refuse what no image set could answer, before any is looked for."""
    for name in source.limits:
        if name not in ("train", "validation", "test"):
            raise InputError(f"limits: unknown split {name!r}; use train, validation or test")
    if not 0 < source.fraction <= 1:
        raise InputError(f"fraction {source.fraction} is not above 0 and at most 1; 1 uses every training image")
    if source.repeats < 1:
        raise InputError(
            f"repeats {source.repeats}: an epoch serves each image at least once; set repeats to 1 or more"
        )


def _refuse_uncounted(data: SegmentationDataset) -> None:
    """Refuse images of which no pixel counts: no loss can be computed from them, and no score."""
    empty = [data.ids[k] for k in range(len(data.pairs)) if (data.pixels(k)[..., 3] == IGNORE).all()]
    if empty:
        named = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        raise InputError(
            f"the masks of {len(empty)} images hold nothing but {IGNORE}, pixels of no class: {named}; take these "
            "images out, or correct mask_values"
        )


def _refuse_absent_class(source: ImageSource, train: SegmentationDataset) -> None:
    """Refuse training images that hold no pixel of some class, at the size that the model sees."""
    wanted = set(range(source.num_classes))
    for index in range(len(train.pairs)):  # the first images show them all as a rule
        wanted -= set(np.unique(train.pixels(index)[..., 3]).tolist())
        if not wanted:
            return
    absent = ", ".join(repr(source.class_names[index]) for index in sorted(wanted))
    if source.fraction < 1:
        raise InputError(
            f"fraction {source.fraction:g} (fraction_seed {source.fraction_seed}) leaves {len(train.pairs)} training "
            f"images, and none holds a pixel of class {absent} at {source.image_size} px; raise fraction, or choose "
            "another fraction_seed"
        )
    raise InputError(
        f"none of the {len(train.pairs)} training images of {source.data} holds a pixel of class {absent} at "
        f"{source.image_size} px; correct classes and mask_values, raise image_size, or raise limits"
    )
