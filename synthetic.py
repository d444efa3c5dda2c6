"""A procedural dermoscopy set in ISIC 2018's own layout and naming: the embedded default, for demos and tests.

It is good for seeing that code runs and learns; it is not for any claim about skin, and no score on it says anything
about ISIC. How an image is drawn is in `synthetic_drawing`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np

from synthetic_drawing import draw
from utils import InputError, atomic_path, pick, progress, write_text

VERSION = 1  # raise it whenever the same seed gives other pixels (see `synthetic_drawing`)
COUNTS = MappingProxyType({"Training": 240, "Validation": 60, "Test": 100})
FIRST_ID = 9_000_000
BLOCK = 100_000  # ids reserved for each split: a split's images then do not depend on the other splits' counts
SMALLEST, LARGEST = 32, 2048  # pixels
RECORD = "SYNTHETIC.json"
NOTE = "Procedurally drawn images: no patient, no camera, not part of ISIC. For demonstrations and tests only."


def _encoded(seed: int, index: int, size: int) -> tuple[bytes, bytes]:
    """Image `index` as JPEG bytes, at a quality of its own (the artefacts are wanted), and its mask as PNG bytes."""
    image, mask = draw(seed, index, size)
    quality = int(np.random.default_rng([seed, index, 1]).integers(75, 97))
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    _, png = cv2.imencode(".png", mask)
    return jpeg.tobytes(), png.tobytes()


def _planned(root: Path, counts: Mapping[str, int]) -> Iterator[tuple[int, Path, Path]]:
    """Index, image path and mask path of every image in the set."""
    for block, split in enumerate(COUNTS):
        for index in range(block * BLOCK, block * BLOCK + counts.get(split, 0)):
            name = f"ISIC_{FIRST_ID + index}"
            image = root / f"ISIC2018_Task1-2_{split}_Input" / f"{name}.jpg"
            yield index, image, root / f"ISIC2018_Task1_{split}_GroundTruth" / f"{name}_segmentation.png"


def _check_arguments(counts: Mapping[str, int], size: int, seed: int) -> None:
    for split, count in counts.items():
        pick("split", split, COUNTS)
        if not 0 <= count <= BLOCK:
            raise InputError(f"{count} images were asked for the split {split!r}; give 0 to {BLOCK}")
    if sum(counts.values()) == 0:
        raise InputError("a synthetic set of no images was asked for; give at least one split a count")
    if not SMALLEST <= size <= LARGEST:
        raise InputError(f"size {size} pixels was asked for; synthetic images are drawn at {SMALLEST} to {LARGEST}")
    if seed < 0:
        raise InputError(f"seed {seed} was given; it must be 0 or more")


def _is_recorded(root: Path, record: Mapping) -> bool:
    """Whether `root` records this very set; another set, or files that are none of its own, are refused."""
    remedy = "nothing was changed: choose another folder, or delete that one"
    path = root / RECORD
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not readable as JSON ({error}); {remedy}") from error
        keys = [key for key in record if not isinstance(found, dict) or found.get(key, "absent") != record[key]]
        if keys:
            raise InputError(f"{root} holds another synthetic set ({', '.join(keys)} differ: see {RECORD}); {remedy}")
        return True
    planned = {file for _, *files in _planned(root, record["counts"]) for file in files}
    present = (file for file in root.rglob("*") if file.is_file() and not file.name.startswith("."))
    foreign = next((file for file in present if file not in planned), None)
    if foreign is not None:
        raise InputError(f"{root} holds files that are not of this synthetic set, such as {foreign}; {remedy}")
    return False


def make_dataset(root: Path, *, counts: Mapping[str, int] = COUNTS, size: int = 128, seed: int = 0) -> Path:
    """Write a synthetic set of images (size, size) in ISIC 2018's layout under `root`, and return `root`.

    Each image depends only on the seed, the size and its own id; ids start at 9000000 for Training, 9100000 for
    Validation and 9200000 for Test. The record `SYNTHETIC.json` is written last: a folder without it is taken for an
    interrupted run, whose files are compared with what would be drawn, then completed. InputError where the folder
    holds anything else. The bytes are those of one OpenCV version: another may encode the same pixels differently.
    """
    root = Path(root)
    _check_arguments(counts, size, seed)
    if root.exists() and not root.is_dir():
        raise InputError(f"{root} is a file; choose a folder for the synthetic set")
    counts = {split: counts.get(split, 0) for split in COUNTS}
    record = {"seed": seed, "size": size, "counts": counts, "version": VERSION, "note": NOTE}
    recorded = _is_recorded(root, record)
    plan = list(_planned(root, counts))
    missing = [entry for entry in plan if not all(file.exists() for file in entry[1:])]
    if not recorded:
        _refuse_other_images(root, plan, seed, size)
    for index, *files in progress(missing, desc="synthetic images", unit="image"):
        for file, data in zip(files, _encoded(seed, index, size)):
            with atomic_path(file) as temporary:
                temporary.write_bytes(data)
    if not recorded:
        write_text(root / RECORD, json.dumps(record, indent=1) + "\n")
    return root


def _refuse_other_images(root: Path, plan: list[tuple[int, Path, Path]], seed: int, size: int) -> None:
    """InputError if a file left by an interrupted run is not, byte for byte, what this seed and size would give."""
    left = [entry for entry in plan if any(file.exists() for file in entry[1:])]
    for index, *files in progress(left, desc="checking images", unit="image"):
        for file, data in zip(files, _encoded(seed, index, size)):
            if file.exists() and file.read_bytes() != data:
                raise InputError(
                    f"{root} holds an unfinished synthetic set of another seed, size or version ({file.name} differs "
                    f"from seed {seed} at {size} pixels); nothing was changed: choose another folder or delete it"
                )


def main(arguments: list[str] | None = None) -> None:
    """Command line: make the set and say what was made."""
    parser = argparse.ArgumentParser(description="Draw a synthetic dermoscopy set in ISIC 2018's layout.")
    parser.add_argument("--root", type=Path, default=Path("data/synthetic"), help="folder to write (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images (%(default)s)")
    for split, count in COUNTS.items():
        parser.add_argument(f"--{split.lower()}", type=int, default=count, help=f"{split} images (%(default)s)")
    options = parser.parse_args(arguments)
    counts = {split: getattr(options, split.lower()) for split in COUNTS}
    try:
        root = make_dataset(options.root, counts=counts, size=options.size, seed=options.seed)
    except InputError as error:
        sys.exit(f"error: {error}")
    listed = ", ".join(f"{split} {count}" for split, count in counts.items())
    print(f"{root}: {sum(counts.values())} synthetic images at {options.size} px, seed {options.seed} ({listed})")


if __name__ == "__main__":
    main()
