"""Images in: image and mask pairs, resized once, and served as `Sample` batches; checked and fetched from here too.

Images leave as RGB in [0, 1]: normalisation belongs to the model. Which files are a pair, and of which split, is in
`layouts.py`; how a file becomes pixels, and their cache, in `images.py`; the archives in `download.py`. On the command
line: `python dataset.py check --data FOLDER`, `python dataset.py download --dataset isic|pet --to FOLDER` and
`python dataset.py resplit --data FOLDER --to FOLDER …` (`resplit.py`).
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from download import DATASETS, SPLITS, fetch_dataset
from images import IGNORE, Pair, Transform, cache_file, cached_pixels, duplicates, faults, prepare, read_or_fill
from layouts import AUTO, IMAGE_SUFFIXES, cap, find_splits, recognise, scan, settle_classes
from resplit import resplit
from utils import InputError, arguments_in_a_sentence, digest, sentences_instead_of_tracebacks

__all__ = [
    "IMAGE_SUFFIXES",  # of layouts.py, as cap and find_splits, for who serves what it finds
    "EpochShuffle",
    "Sample",
    "SegmentationDataset",
    "cap",
    "check",
    "class_pixels",
    "find_splits",
    "main",
    "make_loader",
]


class Sample(NamedTuple):
    """One image: image Tensor (3, H, W) float32 RGB in [0, 1], mask Tensor (1, H, W), id.

    The mask is float32 {0, 1} of two classes; of more it is int64, the class index or `images.IGNORE`. A batch is a
    Sample too: (B, 3, H, W), (B, 1, H, W) and a list of B ids.
    """

    image: torch.Tensor
    mask: torch.Tensor
    id: str | list[str]


# ---- serving ----------------------------------------------------------------------------------------------------


class SegmentationDataset(Dataset):
    """Pairs as `Sample`s. Everything is checked and cached on construction, so a bad file fails before any training.

    With `augment`, what `transform` says to draw anew is drawn for each image by (seed, epoch, id) alone: not by the
    number of workers, the order, or where a run was resumed. Call `set_epoch` before each epoch; `seed` may be set too.
    `repeats`: how often an epoch serves each of the n images, `len` being n · repeats; index r·n + i is image i with
    what would be drawn for it in epoch `epoch`·repeats + r. `pairs` and `ids` name each image once.
    """

    def __init__(
        self, pairs, transform: Transform, *, augment: bool = False, seed: int = 0, cache=None, repeats: int = 1
    ) -> None:
        if not pairs:
            raise InputError("a data set of no images was asked for; check the data folder and the split's name")
        if repeats < 1:
            raise InputError(f"repeats {repeats}: an epoch serves each image at least once; set repeats to 1 or more")
        prepare(pairs, transform, cache)
        self.pairs, self.transform, self.seed, self.epoch = list(pairs), transform, seed, 0
        self.repeats = repeats
        # Computed once: asking a network drive for two file dates per image and epoch is slow.
        self.files = [cache_file(pair, transform, cache) for pair in self.pairs]
        self.augmenter = _augmenter(transform) if augment and transform != transform.unaugmented else None

    def __len__(self) -> int:
        return len(self.pairs) * self.repeats

    def __getitem__(self, index: int) -> Sample:
        time, place = divmod(range(len(self))[index], len(self.pairs))
        pixels, id_ = self.pixels(place), self.pairs[place].id
        image, mask = pixels[..., :3], pixels[..., 3]
        if self.augmenter is not None:
            image, mask = self.augmenter(image, mask, self.seed, self.epoch * self.repeats + time, id_)
        # Scaled by NumPy: on busy cores PyTorch's threads wait for each other ten times longer than the work takes.
        scaled = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)
        kind = np.float32 if self.transform.num_classes == 2 else np.int64
        return Sample(torch.from_numpy(scaled), torch.from_numpy(mask[None].astype(kind)), id_)

    def pixels(self, index: int) -> np.ndarray:
        """(size, size, 4) uint8 R, G, B, mask of image `index` of n without augmentation; see `images.decode`.

        Decoded again if the cache lost it.
        """
        return read_or_fill(self.pairs[index], self.transform, self.files[index])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the augmentation and the loader's shuffling are drawn for."""
        self.epoch = epoch

    @property
    def ids(self) -> list[str]:
        return [pair.id for pair in self.pairs]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the ids, the resized pixels and masks, and the transform that made them; not of order or paths."""
        parts = [self.transform.size, self.transform.blur, self.transform.interpolation]
        parts += [self.transform.values] if self.transform.values else []
        for index in sorted(range(len(self.pairs)), key=self.ids.__getitem__):
            parts += [self.pairs[index].id, digest(self.pixels(index).tobytes())]
        return digest(parts)


def class_pixels(pairs: Sequence[Pair], transform: Transform, cache: Path | str | None = None) -> np.ndarray:
    """(n, C + 1) pixels of each class, and last those that are ignored, of sound pairs at the transform's size."""
    labels = [*range(transform.num_classes), IGNORE]
    counts = [
        np.bincount(cached_pixels(pair, transform, cache)[..., 3].ravel(), minlength=256)[labels] for pair in pairs
    ]
    return np.array(counts, np.int64).reshape(-1, len(labels))


def _augmenter(transform: Transform):
    from augmentation import Augmenter  # here because albumentations takes seconds, and only training needs it

    return Augmenter(transform)


class EpochShuffle(Sampler):
    """A new order each epoch, a function of (seed, the data set's epoch) alone."""

    def __init__(self, dataset: SegmentationDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(int(digest("order", self.seed, self.dataset.epoch)[:8], 16))
        return iter(torch.randperm(len(self.dataset), generator=generator).tolist())


def _collate(samples: Sequence[Sample]) -> Sample:
    images, masks, ids = zip(*samples)
    return Sample(torch.stack(images), torch.stack(masks), list(ids))


def _seed_worker(worker: int) -> None:
    """Nothing of ours draws from the global generators; a user's own transform may."""
    random.seed(torch.initial_seed())
    np.random.seed(torch.initial_seed() % 2**32)


def make_loader(
    dataset: SegmentationDataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
) -> DataLoader:
    """Batches of `Sample`, the same ones for any number of workers; shuffled by (seed, `dataset.epoch`)."""
    if batch_size < 1 or workers < 0:
        raise InputError(f"batch size {batch_size} with {workers} workers: use at least 1 image and 0 workers")
    if drop_last and len(dataset) < batch_size:
        raise InputError(f"{len(dataset)} images do not fill one batch of {batch_size}; lower the batch size")
    return DataLoader(
        dataset,
        batch_size,
        sampler=EpochShuffle(dataset, seed) if shuffle else None,
        num_workers=workers,
        drop_last=drop_last,
        collate_fn=_collate,
        worker_init_fn=_seed_worker,
        generator=torch.Generator().manual_seed(seed),
        pin_memory=torch.cuda.is_available(),
    )


# ---- command line -----------------------------------------------------------------------------------------------


def check(
    data: Path,
    size: int = 128,
    cache: Path | None = None,
    seed: int = 0,
    layout: str = AUTO,
    classes: Sequence[str] = (),
    mask_values: Sequence[Sequence[int]] = (),
) -> int:
    """Print counts, sizes, lesion areas, every unusable file, and images that two splits share.

    Fills the image cache on the way. Duplicates are reported, not counted as faults: the official sets hold some.

    Args:
        data: folder which holds the images and masks, in any layout
        size: side of the cached images, pixels
        cache: folder of the image cache; default: what ISIC_CACHE names, or ~/.cache/isic-similarity/images
        seed: of the draw that stands in for a missing Validation or Test folder
        layout: 'isic', 'pet' or 'folder'; 'auto' recognises it
        classes: names of the classes; none: background and lesion, or those of Pet's trimaps
        mask_values: for each class the mask values that mean it, such as [[2], [1, 3]]

    Returns: 0 when every file can be used, 1 otherwise.
    """
    layout = recognise(data, layout)
    names, values = settle_classes(layout, classes, mask_values)
    transform = Transform(size=size, values=values)
    splits, problems = scan(data, seed=seed, layout=layout)
    broken = {name: faults(pairs, transform, cache) for name, pairs in splits.items()}
    sound = {name: [pair for pair in pairs if pair.id not in broken[name]] for name, pairs in splits.items()}
    for name, pairs in sound.items():
        print(f"{name}: {len(pairs)} pairs{_ranges(pairs, transform, names, cache)}")
    for kind, where in problems.items():
        print("\n".join(f"{kind}: {item}" for item in where))
    for split in broken.values():
        print("\n".join(split.values()), end="\n" if split else "")
    shared = duplicates(sound, transform, cache)
    for kind in ("exact", "near"):
        print(f"{kind} duplicates across splits: {(shared.kind == kind).sum()}")
    if len(shared):
        print(shared.round(3).to_string(index=False))
    if "train" not in splits:
        print("note: no Training folder: these images can be scored, but nothing can be trained on them")
    faulty = sum(map(len, problems.values())) + sum(map(len, broken.values()))
    print(f"{faulty} problems" if faulty else "every file can be used")
    return 1 if faulty else 0


def _ranges(pairs: Sequence[Pair], transform: Transform, names: Sequence[str], cache: Path | None) -> str:
    """', 600×450 to 6708×4439 pixels, lesions 0.3 to 99 % …' of sound pairs; with more classes each one's share."""
    if not pairs:
        return ""
    sizes = []
    for pair in pairs:
        with Image.open(pair.image) as image:  # reads the header only
            sizes.append(image.size)
    sizes.sort(key=lambda item: item[0] * item[1])
    low, high = ("{}×{}".format(*item) for item in (sizes[0], sizes[-1]))
    counts = class_pixels(pairs, transform, cache)
    masks = _lesions(counts, names[1]) if transform.num_classes == 2 else _shares(counts, names, transform.size)
    return f", {low} to {high} pixels{masks}"


def _lesions(counts: np.ndarray, name: str) -> str:
    """From (n, 3) pixels of background, foreground and none: what there is of the foreground."""
    areas = counts[:, 1] / counts.sum(1) * 100
    span = f"{areas.min():.1f} to {areas.max():.1f} % of the image (median {np.median(areas):.1f} %)"
    return f", {name}s {span}, {np.count_nonzero(areas == 0)} empty masks"


def _shares(counts: np.ndarray, names: Sequence[str], size: int) -> str:
    """From (n, C + 1) pixels: of each class the sum, its share of the labelled ones, and the images that hold it."""
    totals, images = counts.sum(0), np.count_nonzero(counts, axis=0)
    labelled = totals[:-1].sum()
    parts = [
        f"\n  {name}: {total:,} pixels{f' ({100 * total / labelled:.1f} %)' if labelled else ''} in {held} images"
        for name, total, held in zip(names, totals, images)
    ]
    return f"; at {size} px:{''.join(parts)}\n  ignored: {totals[-1]:,} pixels in {images[-1]} images"


def main(arguments: Sequence[str] | None = None) -> int:
    """The commands `check`, `download` and `resplit`; an InputError is one line on stderr and exit code 2."""
    prog = "python dataset.py"
    parser = ArgumentParser(
        prog=prog, description="Check, download or deal anew a set of images and masks.", exit_on_error=False
    )
    commands = parser.add_subcommands()
    checking, fetching, dealing = (
        ArgumentParser(description=f.__doc__.splitlines()[0], exit_on_error=False)
        for f in (check, fetch_dataset, resplit)
    )
    checking.add_function_arguments(check)
    dealing.add_function_arguments(resplit)
    fetching.add_argument("--dataset", choices=tuple(DATASETS), default="isic", help="ISIC 2018 or Oxford-IIIT Pet")
    fetching.add_argument("--to", type=Path, required=True, help="folder to unpack into")
    fetching.add_argument("--splits", nargs="+", choices=SPLITS, help="which to fetch of ISIC; default: all three")
    fetching.add_argument("--base-url", help="where the archives are; default: the official place")
    fetching.add_argument("--keep-archives", action="store_true", help="keep each archive after unpacking it")
    commands.add_subcommand("check", checking, help=checking.description)
    commands.add_subcommand("download", fetching, help=fetching.description)
    commands.add_subcommand("resplit", dealing, help=dealing.description)
    try:
        with arguments_in_a_sentence(prog):
            options = parser.parse_args(arguments)
        chosen = {"check": check, "download": fetch_dataset, "resplit": resplit}[options.subcommand]
        return chosen(**options[options.subcommand].as_dict())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    with sentences_instead_of_tracebacks():
        sys.exit(main())
