"""Which images a run uses: the embedded synthetic set or a folder in ISIC's layout, opened as checked data sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dataset import SegmentationDataset, cap, find_splits
from images import Transform
from synthetic import make_dataset
from utils import HOME, InputError

SYNTHETIC = "synthetic"
# the settings of an ImageSource that say which images there are; the others say how a model sees them
CHOICE_OF_IMAGES = ("data", "synthetic_images", "synthetic_size", "synthetic_seed", "limits")


@dataclass
class ImageSource:
    """
    Args:
        data: 'synthetic' (made once, in data/synthetic) or a folder in ISIC 2018's layout
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

    @property
    def is_synthetic(self) -> bool:
        return self.data == SYNTHETIC

    @property
    def transform(self) -> Transform:
        pixels = (self.image_size, self.blur, self.interpolation)
        return Transform(*pixels, self.flips, self.rotate, self.scale, self.colour, self.hair)


def locate(source: ImageSource) -> Path:
    """The folder of the images, after making the synthetic set if that is the one asked for."""
    if not source.is_synthetic:
        return Path(source.data)
    counts = "-".join(str(count) for count in source.synthetic_images.values())
    folder = HOME / "data" / f"synthetic-{counts}-{source.synthetic_size}px-seed{source.synthetic_seed}"
    return make_dataset(folder, counts=source.synthetic_images, size=source.synthetic_size, seed=source.synthetic_seed)


def open_datasets(source: ImageSource, *, seed: int = 0, needed: tuple[str, ...] = ("train", "validation", "test")):
    """{split: SegmentationDataset} with every file checked and cached; only 'train' is augmented.

    Which image is in which split, and which ones `limits` keeps, never depends on `seed`, which draws the augmentation.
    """
    transform = source.transform
    splits = find_splits(locate(source))
    for name in source.limits:
        if name not in ("train", "validation", "test"):
            raise InputError(f"limits: unknown split {name!r}; use train, validation or test")
    absent = [name for name in needed if name not in splits]
    if absent:
        raise InputError(f"{source.data} has no {absent[0]} images, and no Training folder to draw them from")
    return {
        name: SegmentationDataset(
            cap(splits[name], source.limits.get(name)), transform, augment=name == "train", seed=seed
        )
        for name in needed
    }
