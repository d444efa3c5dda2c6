"""Images in: ISIC 2018 Task 1 image and mask pairs, found by id, resized once, and served as `Sample` batches.

Both folder layouts are read (`ISIC2018_Task1-2_Training_Input` beside `ISIC2018_Task1_Training_GroundTruth`, and the
plain `ISIC2018_Training_Input` beside `ISIC2018_Training_GroundTruth`; also Validation and Test). Images leave as RGB
in [0, 1]: normalisation belongs to the model. How a file becomes pixels, and their cache, is in `images.py`.
On the command line: `python dataset.py check --data FOLDER` and `python dataset.py download --to FOLDER`.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from download import BASE_URL, SPLITS, download
from images import Pair, Transform, cache_file, cached_pixels, duplicates, faults, prepare, read_or_fill
from utils import InputError, digest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_ENDING = "_segmentation"
# The share of Training that stands in for a missing folder, as a range of the id's hash in [0, 1).
DRAWN = {"test": (0.0, 0.2), "validation": (0.2, 0.3)}


class Sample(NamedTuple):
    """One image: image Tensor (3, H, W) float32 RGB in [0, 1], mask Tensor (1, H, W) float32 {0, 1}, id.

    A batch is a Sample too: (B, 3, H, W), (B, 1, H, W) and a list of B ids.
    """

    image: torch.Tensor
    mask: torch.Tensor
    id: str | list[str]


# ---- finding pairs ----------------------------------------------------------------------------------------------


def layout_names(split: str) -> tuple[tuple[str, str], ...]:
    """The (image folder, mask folder) names of 'Training', 'Validation' or 'Test' in the two layouts."""
    return tuple(
        (f"ISIC2018_{images}{split}_Input", f"ISIC2018_{masks}{split}_GroundTruth")
        for images, masks in (("Task1-2_", "Task1_"), ("", ""))
    )


def find_splits(root: Path | str, *, seed: int = 0) -> dict[str, list[Pair]]:
    """The pairs of each split, sorted by id, from file names alone; keys among 'train', 'validation', 'test'.

    Beside a Training folder, a missing Test or Validation is drawn from Training by a seeded hash of the id: test 20 %,
    validation 10 % of the ids. So the split of an id never depends on which other images are there. Without a
    Training folder only what is there is returned.

    Raises InputError when there is no known folder, or when an image or a mask has no partner (some are named).
    """
    splits, problems = scan(root, seed=seed)
    if problems:
        raise InputError(
            f"{root}: {_summary(problems)}. Add or remove these files; "
            f"`python dataset.py check --data {root}` lists every one"
        )
    return splits


def scan(root: Path | str, *, seed: int = 0) -> tuple[dict[str, list[Pair]], dict[str, list[str]]]:
    """As `find_splits`, but what is wrong is returned beside the sound pairs: kind of problem -> where."""
    folders = _layout_folders(Path(root))
    problems: dict[str, list[str]] = {}
    splits = {split: _pair_up(*pair, problems) for split, pair in folders.items()}
    if "train" in splits:
        splits = _draw_missing(splits, seed)
    for name, pairs in splits.items():
        if not pairs:
            problems.setdefault("empty split", []).append(f"no pairs in {name} ({folders.get(name, ['drawn'])[0]})")
    for (one, pairs), (other, others) in itertools.combinations(splits.items(), 2):
        shared = {pair.id for pair in pairs} & {pair.id for pair in others}
        for id_ in sorted(shared):
            problems.setdefault("same id in two splits", []).append(f"{id_} ({one} and {other})")
    order = [name for name in ("train", "validation", "test") if name in splits]
    return {name: splits[name] for name in order}, problems


def _layout_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Split name -> (image folder, mask folder), for the folders that are in `root`."""
    if root.is_file():
        raise InputError(f"data folder {root} is a file; give the folder which holds the ISIC 2018 folders")
    if not root.is_dir():
        raise InputError(
            f"data folder {root} does not exist; `python dataset.py download --to {root}` fetches ISIC 2018"
        )
    found = {}
    for split in SPLITS:
        present = [names for names in layout_names(split) if any((root / name).is_dir() for name in names)]
        if len(present) > 1:
            raise InputError(
                f"{root} holds two layouts of {split} ({present[0][0]}, {present[1][0]}); keep one of them"
            )
        for names in present:
            missing = [name for name in names if not (root / name).is_dir()]
            if missing:
                raise InputError(f"{root} has one half of {split} only: folder {missing[0]} is missing; put it there")
            found["train" if split == "Training" else split.lower()] = (root / names[0], root / names[1])
    if not found:
        looked = ", ".join(f"{images} with {masks}" for split in SPLITS for images, masks in layout_names(split))
        raise InputError(f"no ISIC 2018 folder in {root}: looked for {looked}; give the folder which holds these")
    return found


def _pair_up(image_folder: Path, mask_folder: Path, problems: dict[str, list[str]]) -> list[Pair]:
    """The pairs of two folders, sorted by id; what has no partner or two of them goes to `problems`."""

    def note(kind: str, where: str) -> None:
        problems.setdefault(kind, []).append(where)

    images, masks = _by_id(image_folder), _by_id(mask_folder, MASK_ENDING)
    for found in (images, masks):
        for id_, files in sorted(found.items()):
            if len(files) > 1:
                note("duplicate id", f"{id_}: {', '.join(f'{file.parent.name}/{file.name}' for file in files)}")
    for id_ in sorted(set(images) - set(masks)):
        note("image without a mask", f"{image_folder.name}/{images[id_][0].name}")
    for id_ in sorted(set(masks) - set(images)):
        note("mask without an image", f"{mask_folder.name}/{masks[id_][0].name}")
    both = sorted(set(images) & set(masks))
    return [Pair(id_, images[id_][0], masks[id_][0]) for id_ in both if len(images[id_]) == len(masks[id_]) == 1]


def _by_id(folder: Path, ending: str = "") -> dict[str, list[Path]]:
    """Id -> the image files of that id; hidden files, superpixels and texts of the official archives are left out."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES or path.stem.endswith("_superpixels"):
            continue
        found.setdefault(path.stem.removesuffix(ending), []).append(path)
    return found


def _draw_missing(splits: dict[str, list[Pair]], seed: int) -> dict[str, list[Pair]]:
    drawn = {name: share for name, share in DRAWN.items() if name not in splits}
    result = {**splits, "train": []} | {name: [] for name in drawn}
    for pair in splits["train"]:
        place = int(digest("split", seed, pair.id), 16) / 16**16
        home = next((name for name, (low, high) in drawn.items() if low <= place < high), "train")
        result[home].append(pair)
    return result


def _summary(problems: Mapping[str, Sequence[str]], limit: int = 3) -> str:
    """'2 × image without a mask: a.jpg, b.jpg; 7 × …', the first `limit` of each kind."""
    return "; ".join(
        f"{len(where)} × {kind}: {', '.join(where[:limit])}{', …' if len(where) > limit else ''}"
        for kind, where in problems.items()
    )


def cap(pairs: Sequence[Pair], n: int | None, seed: int = 0) -> list[Pair]:
    """A seeded subset of at most `n` pairs in id order (None: all); a smaller n is a subset of a larger one."""
    if n is not None and n < 1:
        raise InputError(f"a subset of {n} images was asked for; ask for at least 1")
    chosen = sorted(pairs, key=lambda pair: digest("cap", seed, pair.id))[:n]
    return sorted(chosen, key=lambda pair: pair.id)


# ---- serving ----------------------------------------------------------------------------------------------------


class SegmentationDataset(Dataset):
    """Pairs as `Sample`s. Everything is checked and cached on construction, so a bad file fails before any training.

    With `augment`, what `transform` says to draw anew is drawn for each image by (seed, epoch, id) alone: not by the
    number of workers, the order, or where a run was resumed. Call `set_epoch` before each epoch; `seed` may be set too.
    """

    def __init__(self, pairs, transform: Transform, *, augment: bool = False, seed: int = 0, cache=None) -> None:
        if not pairs:
            raise InputError("a data set of no images was asked for; check the data folder and the split's name")
        prepare(pairs, transform, cache)
        self.pairs, self.transform, self.seed, self.epoch = list(pairs), transform, seed, 0
        # Computed once: asking a network drive for two file dates per image and epoch is slow.
        self.files = [cache_file(pair, transform, cache) for pair in self.pairs]
        self.augmenter = _augmenter(transform) if augment and transform != transform.unaugmented else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pixels = self.pixels(index)
        image, mask = pixels[..., :3], pixels[..., 3]
        if self.augmenter is not None:
            image, mask = self.augmenter(image, mask, self.seed, self.epoch, self.pairs[index].id)
        # Scaled by NumPy: on busy cores PyTorch's threads wait for each other ten times longer than the work takes.
        scaled = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)
        return Sample(torch.from_numpy(scaled), torch.from_numpy(mask[None].astype(np.float32)), self.pairs[index].id)

    def pixels(self, index: int) -> np.ndarray:
        """(size, size, 4) uint8 R, G, B, mask {0, 1} without augmentation; decoded again if the cache lost it."""
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
        for index in sorted(range(len(self)), key=self.ids.__getitem__):
            parts += [self.pairs[index].id, digest(self.pixels(index).tobytes())]
        return digest(parts)


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


def check(data: Path, size: int = 128, cache: Path | None = None, seed: int = 0) -> int:
    """Print counts, sizes, lesion areas, every unusable file, and images that two splits share.

    Fills the image cache on the way. Duplicates are reported, not counted as faults: the official sets hold some.

    Args:
        data: folder which holds the ISIC 2018 folders
        size: side of the cached images, pixels
        cache: folder of the image cache; default: what ISIC_CACHE names, or ~/.cache/isic-similarity/images
        seed: of the draw that stands in for a missing Validation or Test folder

    Returns: 0 when every file can be used, 1 otherwise.
    """
    transform = Transform(size=size)
    splits, problems = scan(data, seed=seed)
    broken = {name: faults(pairs, transform, cache) for name, pairs in splits.items()}
    sound = {name: [pair for pair in pairs if pair.id not in broken[name]] for name, pairs in splits.items()}
    for name, pairs in sound.items():
        print(f"{name}: {len(pairs)} pairs{_ranges(pairs, transform, cache)}")
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


def _ranges(pairs: Sequence[Pair], transform: Transform, cache: Path | None) -> str:
    """', 600×450 to 6708×4439 pixels, lesions 0.3 to 99 % …' of sound pairs."""
    if not pairs:
        return ""
    sizes = []
    for pair in pairs:
        with Image.open(pair.image) as image:  # reads the header only
            sizes.append(image.size)
    sizes.sort(key=lambda item: item[0] * item[1])
    areas = np.array([cached_pixels(pair, transform, cache)[..., 3].mean() for pair in pairs]) * 100
    low, high = ("{}×{}".format(*item) for item in (sizes[0], sizes[-1]))
    span = f"{areas.min():.1f} to {areas.max():.1f} % of the image (median {np.median(areas):.1f} %)"
    return f", {low} to {high} pixels, lesions {span}, {np.count_nonzero(areas == 0)} empty masks"


def main(arguments: Sequence[str] | None = None) -> int:
    """The commands `check` and `download`; an InputError is one line on stderr and exit code 2."""
    parser = ArgumentParser(description="Check or download ISIC 2018 Task 1.")
    commands = parser.add_subcommands()
    checking, fetching = (ArgumentParser(description=f.__doc__.splitlines()[0]) for f in (check, download))
    checking.add_function_arguments(check)
    fetching.add_argument("--to", type=Path, required=True, help="folder to unpack into")
    fetching.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="which to fetch")
    fetching.add_argument("--base-url", default=BASE_URL, help="where the archives are")
    fetching.add_argument("--keep-archives", action="store_true", help="keep each .zip after unpacking it")
    commands.add_subcommand("check", checking, help=checking.description)
    commands.add_subcommand("download", fetching, help=fetching.description)
    options = parser.parse_args(arguments)
    chosen = {"check": check, "download": download}[options.subcommand]
    try:
        return chosen(**options[options.subcommand].as_dict())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
