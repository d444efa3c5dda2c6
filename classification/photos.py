"""Photographs in class folders (`FOLDER/train/CLASS/*.jpg`, `FOLDER/val/CLASS/*.jpg`; Imagenette's layout), as tensors.

Reads and checks; draws the synthetic stand-in that tests and demos use; knows the ten Imagenette classes by their
WordNet ids. What is learnt from the photographs is no matter of this module.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from images import opened
from utils import InputError, digest, file_digest, progress, write_text

SPLITS = ("train", "val")
SUFFIXES = (".jpg", ".jpeg", ".png")  # in either case


class WordNetClass(NamedTuple):
    """name : in words; index : among the 1000 classes of ImageNet"""

    name: str
    index: int


IMAGENETTE = {
    "n01440764": WordNetClass("tench", 0),
    "n02102040": WordNetClass("English springer", 217),
    "n02979186": WordNetClass("cassette player", 482),
    "n03000684": WordNetClass("chain saw", 491),
    "n03028079": WordNetClass("church", 497),
    "n03394916": WordNetClass("French horn", 566),
    "n03417042": WordNetClass("garbage truck", 569),
    "n03425413": WordNetClass("gas pump", 571),
    "n03445777": WordNetClass("golf ball", 574),
    "n03888257": WordNetClass("parachute", 701),
}


@dataclass(frozen=True)
class PhotoSet:
    """The photographs of one split.

    paths, ids, labels : one each; an id is the file's name without its ending; a label counts in `classes`
    classes : the names of the class folders, sorted; those of train where there is one, so that labels agree
    """

    paths: tuple[Path, ...]
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of ids, classes and the files' bytes; not of order or paths."""
        parts: list[str] = []
        for row in sorted(range(len(self)), key=self.ids.__getitem__):
            parts += [self.ids[row], self.classes[self.labels[row]], file_digest(self.paths[row])]
        return digest(parts)

    def rows(self, per_class: int | None, seed: int = 0) -> list[int]:
        """At most `per_class` photographs of every class, drawn by the seed and in the set's order; None: all."""
        if per_class is None:
            return list(range(len(self)))
        if per_class < 1:
            raise InputError(f"photographs per class must be at least 1, got {per_class}")
        generator, labels = np.random.default_rng(seed), np.array(self.labels)
        drawn = [generator.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
        return sorted(np.concatenate(drawn).tolist())

    def part(self, rows: Sequence[int]) -> PhotoSet:
        """The set of these rows alone, with the same classes."""
        chosen = (tuple(column[row] for row in rows) for column in (self.paths, self.ids, self.labels))
        return PhotoSet(*chosen, self.classes)

    def imagenet_classes(self) -> Tensor:
        """(N,) index of each photograph's own class among ImageNet's 1000; classes of other data are refused."""
        unknown = [name for name in self.classes if name not in IMAGENETTE]
        if unknown:
            raise InputError(
                f"class {unknown[0]!r} is none of Imagenette's ten, so its place among ImageNet's 1000 classes is not "
                "known; use a model trained on these classes"
            )
        return torch.tensor([IMAGENETTE[self.classes[label]].index for label in self.labels])


def class_names(classes: Sequence[str]) -> list[str]:
    """Class folders in words where they are Imagenette's WordNet ids, else as they are."""
    return [IMAGENETTE[name].name if name in IMAGENETTE else name for name in classes]


# ---- from a folder ----------------------------------------------------------------------------------------------


def photo_set(folder: Path | str, split: str) -> PhotoSet:
    """The photographs of a split ('train' or 'val'), sorted by class and name; a wrong layout is refused by name."""
    folder = Path(folder)
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; use 'train' or 'val'")
    if not folder.is_dir():
        raise InputError(f"photo folder {folder} does not exist; give one that holds train/CLASS/ and val/CLASS/")
    own = _class_folders(folder / split)
    known = _class_folders(folder / "train") if split == "val" and (folder / "train").is_dir() else own
    unknown = sorted(set(own) - set(known))
    if unknown:
        raise InputError(
            f"{folder / split / unknown[0]}: class {unknown[0]!r} is not in {folder / 'train'}; add it there, or "
            "remove this folder"
        )
    files = {name: _photos_in(own[name]) for name in own}
    labels = {name: label for label, name in enumerate(sorted(known))}
    rows = [(path, path.stem, labels[name]) for name in sorted(files) for path in files[name]]
    paths, ids, numbers = zip(*rows)
    _refuse_repeated(ids, paths)
    return PhotoSet(paths, ids, numbers, tuple(labels))


def _class_folders(folder: Path) -> dict[str, Path]:
    """{class: folder}; hidden ones are left out."""
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; the photographs of a class belong in {folder}/CLASS/")
    found = {path.name: path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if not found:
        raise InputError(f"{folder} holds no class folders; the photographs of a class belong in {folder}/CLASS/")
    return found


def _photos_in(folder: Path) -> list[Path]:
    """The photographs of one class, sorted by name."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not paths:
        raise InputError(
            f"class folder {folder} holds no photograph ({', '.join(SUFFIXES)}); add some, or remove the folder"
        )
    return sorted(paths)


def _refuse_repeated(ids: Sequence[str], paths: Sequence[Path]) -> None:
    name, count = Counter(ids).most_common(1)[0]
    if count > 1:
        first, second = [path for path, own in zip(paths, ids) if own == name][:2]
        raise InputError(f"{first} and {second} have the same id {name!r}, which must be unique; rename one of them")


# ---- into tensors -----------------------------------------------------------------------------------------------


def load_photos(photos: PhotoSet, size: int, chosen: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """(uint8 (N, 3, size, size), int64 labels (N,)) of the chosen rows, or of all, in the order asked for.

    The short side is resized to `size` pixels (averaging over the area that a pixel covers; bicubic where the file is
    smaller), and the centre is cut out.
    """
    if size < 1:
        raise InputError(f"photographs of {size} pixels were asked for; give at least 1")
    rows = list(range(len(photos)) if chosen is None else chosen)
    if not rows:
        raise InputError("no photograph was chosen; give at least one row")
    pixels = np.empty((len(rows), 3, size, size), np.uint8)
    for place, row in enumerate(progress(rows, desc="reading photographs")):
        pixels[place] = read_photo(photos.paths[row], size).transpose(2, 0, 1)
    return torch.from_numpy(pixels), torch.tensor([photos.labels[row] for row in rows])


def read_photo(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8 of one file."""
    with opened(path, absent="read the folder again", broken="remove it") as file:
        file.draft("RGB", (size, size))  # a JPEG may be decoded at a fraction of its size, never below this one
        image = file.convert("RGB")
    scale = size / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    if (wide, high) != image.size:
        image = image.resize((wide, high), Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def summary_of(sets: Mapping[str, PhotoSet]) -> dict:
    """What data.json keeps of the splits: photographs, classes and hash of each."""
    return {
        name: {"photographs": len(photos), "classes": list(photos.classes), "hash": photos.fingerprint}
        for name, photos in sets.items()
    }


# ---- the synthetic stand-in -------------------------------------------------------------------------------------

# class -> colour around which each of its objects is drawn: form and colour both tell, as they do for many things
SHAPES = {
    "cross": (0.2, 0.65, 0.3),
    "disc": (0.8, 0.25, 0.2),
    "ring": (0.2, 0.35, 0.8),
    "stripes": (0.85, 0.75, 0.2),
}
RECORD = "SYNTHETIC.json"


def synthetic_photos(folder: Path | str, counts: Mapping[str, int], size: int = 64, seed: int = 0) -> Path:
    """Write `counts` drawn pictures a class of every split, the objects' masks in `masks/ID.png`; returns `folder`.

    A coloured shape stands somewhere on a noisy background; the class is its form. They are not photographs, and no
    accuracy on them says anything about photographs. A folder with the same pictures is left alone, any other one
    is refused.
    """
    folder = Path(folder)
    if size < 16 or not set(counts) <= set(SPLITS) or not counts or min(counts.values()) < 1:
        raise InputError(f"synthetic photos: size at least 16, at least 1 of 'train' or 'val'; got {size}, {counts}")
    record = {"synthetic": True, "counts": dict(counts), "size": size, "seed": seed, "version": 1}
    if folder.exists() and any(folder.iterdir()):
        known = folder / RECORD
        if not known.exists() or json.loads(known.read_text(encoding="utf-8")) != record:
            raise InputError(f"{folder} holds something else than this synthetic set; choose another folder")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / "photos"
        for split, count in counts.items():
            _draw_split(whole, split, count, size, seed)
        write_text(whole / RECORD, json.dumps(record) + "\n")
        whole.replace(folder)  # all of it or nothing
    return folder


def _draw_split(folder: Path, split: str, count: int, size: int, seed: int) -> None:
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for label, shape in enumerate(SHAPES):
        (folder / split / shape).mkdir(parents=True)
        for number in range(count):
            generator = np.random.default_rng([seed, SPLITS.index(split), label, number])
            pixels, mask = draw_photo(shape, size, generator)
            name = f"synthetic_{split}_{shape}_{number:04d}.png"
            Image.fromarray(pixels).save(folder / split / shape / name)
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / name)


def draw_photo(shape: str, size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(size, size, 3) uint8 picture of one shape, and (size, size) bool: where the shape is."""
    radius = generator.uniform(0.18, 0.3)
    x, y = generator.uniform(radius, 1 - radius, 2)
    rows, columns = (np.mgrid[:size, :size] + 0.5) / size
    across, down = (columns - x) / radius, (rows - y) / radius
    distance = np.hypot(across, down)
    inside = {
        "disc": distance < 0.85,
        "ring": (distance < 1) & (distance > 0.6),
        "cross": (np.minimum(abs(across), abs(down)) < 0.28) & (np.maximum(abs(across), abs(down)) < 1),
        "stripes": (np.maximum(abs(across), abs(down)) < 0.9) & (((down + 0.9) / 0.36).astype(int) % 2 == 0),
    }[shape]
    ground = generator.uniform(0.2, 0.8) + generator.normal(0, 0.05, 3)
    colour = (np.array(SHAPES[shape]) + generator.normal(0, 0.08, 3)).clip(0, 1)
    slope = generator.normal(0, 0.15, (2, 3))
    picture = ground + (rows[..., None] - 0.5) * slope[0] + (columns[..., None] - 0.5) * slope[1]
    picture = np.where(inside[..., None], colour, picture) + generator.normal(0, 0.06, (size, size, 3))
    return (picture.clip(0, 1) * 255).round().astype(np.uint8), inside


def synthetic_masks(folder: Path | str, ids: Sequence[str]) -> dict[str, np.ndarray]:
    """id -> (H, W) bool: where the object of a synthetic picture is."""
    masks = {}
    for name in ids:
        path = Path(folder) / "masks" / f"{name}.png"
        if not path.is_file():
            raise InputError(f"{path} does not exist; masks are there for the synthetic set alone")
        masks[name] = np.asarray(Image.open(path)) > 0
    return masks
