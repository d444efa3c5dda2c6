"""One image and its mask, from two files to pixels: decoded in full, checked, resized once, and kept in a cache.

The cache folder (`ISIC_CACHE`, default ~/.cache/isic-similarity/images) may be deleted at any time and shared by
processes: a file appears whole or not at all, is named after the two files' paths, sizes and dates and the transform,
and carries a checksum, so that an old or damaged one is never served. `duplicates` compares the cached pixels of the
splits. What folders the files come from is no matter of this module.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

from settings import check_id
from utils import InputError, atomic_path, digest, pick, progress

# Before any worker process is forked: OpenCV's threads do not survive a fork, and a worker that touches them waits for
# ever. Nothing is lost, since images are decoded and served by several threads or processes of ours.
cv2.setNumThreads(1)

# In a mask of three classes or more: a pixel of no class. It is never scored; ce_dice leaves it out, and for the set
# loss it lies outside every mask, as published.
IGNORE = 255
CACHE_FORMAT = 1  # raise it whenever the same file and transform give other pixels
MAX_PIXELS = 100_000_000  # the largest ISIC original has 30 million; a header that claims more is refused undecoded
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
RESAMPLING = {"area": None, "bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# What may be drawn anew each epoch -> (largest value, its unit); 0 is off. What it does to an image: augmentation.py.
DRAWN_ANEW = {"rotate": (180, "degrees"), "scale": (0.9, "of the size"), "colour": (1, ""), "hair": (1, "")}
# Two images are near duplicates when both hold. Chosen by eye on 2,000 ISIC 2018 images (2 million pairs): 10 pairs
# pass and all 10 show one lesion; at 62 bits and 0.78 the round vignette of a microscope begins to pass for one.
NEAR_BITS = 50
NEAR_CORRELATION = 0.80


@dataclass(frozen=True)
class Pair:
    """An image file and its mask file; `id` is the image's name without its ending ('ISIC_0000000')."""

    id: str
    image: Path
    mask: Path

    def __post_init__(self) -> None:
        check_id(self.id)


@dataclass(frozen=True)
class Transform:
    """How a file becomes pixels.

    size: side of the square output, pixels; other aspect ratios are squeezed to it, as the earlier study did.
    blur: radius of a Gaussian blur before resizing, in pixels of the original image; 0 is off, that study used 2.
    interpolation: of the image: 'area' (OpenCV), 'bicubic' or 'bilinear' (PIL, antialiased). Masks: always nearest.
    flips, rotate, scale, colour, hair: what is drawn anew each epoch where a data set is asked to augment; all are off
        by default, and none changes the pixels that are cached or the data's fingerprint. flips: one of the eight
        rotations and reflections of the square; rotate: turned by up to so many degrees either way; scale: zoomed by
        1 - scale to 1 + scale; colour: strength of the change of colours; hair: probability of drawn hair.
    values: for each class in order the mask values that mean it. () is binary: 0, and one other value. Two entries are
        binary too, the second one being what is segmented; with more, a pixel is a class index or IGNORE.
    """

    size: int = 128
    blur: float = 0.0
    interpolation: str = "area"
    flips: bool = False
    rotate: float = 0.0
    scale: float = 0.0
    colour: float = 0.0
    hair: float = 0.0
    values: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(tuple(entry) for entry in self.values))  # JSON knows lists only
        _refuse_values(self.values)
        pick("interpolation", self.interpolation, RESAMPLING)
        if not 8 <= self.size <= 4096:
            raise InputError(f"image size {self.size} is not between 8 and 4096 pixels; set size to 128, for example")
        if not 0 <= self.blur <= 100:
            raise InputError(f"blur {self.blur} is not a radius between 0 and 100 pixels; 0 turns it off")
        for name, (most, unit) in DRAWN_ANEW.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise InputError(f"{name} {value} is not between 0 and {most} {unit}".rstrip() + "; 0 turns it off")

    @property
    def unaugmented(self) -> Transform:
        """The same pixels, with nothing drawn anew: for images that are scored, not trained on."""
        return Transform(self.size, self.blur, self.interpolation, values=self.values)

    @property
    def num_classes(self) -> int:
        return len(self.values) or 2


def _refuse_values(values: tuple[tuple[int, ...], ...]) -> None:
    """Refuse classes that no mask could be read by."""
    flat = [value for entry in values for value in entry]
    shown = [list(entry) for entry in values]
    if values and not 2 <= len(values) <= IGNORE:
        raise InputError(f"mask values {shown} are of {len(values)} classes; use between 2 and {IGNORE}")
    if not all(values):
        raise InputError(f"mask values {shown} give class {values.index(())} none; list at least one for each class")
    if not all(isinstance(value, int) and value >= 0 for value in flat):
        raise InputError(f"mask values {shown} are not all whole numbers from 0 up")
    twice = sorted({value for value in flat if flat.count(value) > 1})
    if twice:
        raise InputError(f"mask value {twice[0]} is listed twice in {shown}; it can mean one class only")


# ---- decoding and the cache -------------------------------------------------------------------------------------


def decode(pair: Pair, transform: Transform) -> np.ndarray:
    """Decode, check and resize one pair -> (size, size, 4) uint8: R, G, B, mask {0, 1} or class index and IGNORE.

    The EXIF orientation is ignored for image and mask alike (ISIC has none).
    Raises InputError naming the file that cannot be read, or a mask that does not fit its image or its classes.
    """
    image, mask = _read_colours(pair.image), _read_image(pair.mask)
    if image.size != mask.size:
        sizes = " but its image ".join("{}×{}".format(*item.size) for item in (mask, image))
        raise InputError(f"mask {pair.mask} has {sizes} pixels; replace one of them so that they fit")
    target = (transform.size, transform.size)
    classes = Image.fromarray(_classes(mask, pair.mask, transform.values)).resize(target, Image.Resampling.NEAREST)
    return np.dstack([_resized(image, transform), np.asarray(classes)])


def read_pixels(path: Path, transform: Transform) -> tuple[np.ndarray, tuple[int, int]]:
    """((size, size, 3) uint8 RGB, (width, height) of the file in pixels) of an image without a mask, uncached."""
    image = _read_colours(path)
    return _resized(image, transform), image.size


def read_mask(path: Path, values: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """(H, W) uint8 of a mask file at its own size, uncached: {0, 1}, or of three classes or more index and IGNORE.

    values: as those of a `Transform`.
    """
    return _classes(_read_image(path), path, Transform(values=values).values)


def _resized(image: Image.Image, transform: Transform) -> np.ndarray:
    """Blur and resize an RGB image -> (size, size, 3) uint8."""
    target = (transform.size, transform.size)
    if transform.blur:
        image = image.filter(ImageFilter.GaussianBlur(transform.blur))
    if transform.interpolation == "area":
        return cv2.resize(np.asarray(image), target, interpolation=cv2.INTER_AREA)
    return np.asarray(image.resize(target, RESAMPLING[transform.interpolation]))


def _read_image(path: Path) -> Image.Image:
    """The fully decoded file."""
    with opened(path, absent="remove its partner", broken="remove it and its partner") as image:
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # of a camera's MPO only the first is the photo
            raise InputError(f"{path} holds {image.n_frames} pictures; save the one that is meant as a file of its own")
        image.load()
        return image


def _read_colours(path: Path) -> Image.Image:
    """The fully decoded file as 8-bit RGB; a picture of finer numbers is refused, which would be cut off at 255."""
    image = _read_image(path)
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{path} has more than 8 bits a pixel (mode {image.mode}); save it as 8-bit grey or RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def opened(path: Path, *, absent: str, broken: str) -> Iterator[Image.Image]:
    """An image file, to be decoded in the block; what cannot be is refused by its name.

    A claim of more than MAX_PIXELS is refused from the header. absent, broken : what else may be done about a file that
    is gone, or that cannot be decoded
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels")
            yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} is no longer there; put it back, or {absent}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} claims more than {MAX_PIXELS:,} pixels ({error}); replace or remove it") from error
    except DECODING_ERRORS as error:
        raise InputError(f"{path} cannot be decoded ({error}); fetch it again, or {broken}") from error


def _classes(mask: Image.Image, path: Path, values: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """(H, W) uint8 of a mask, by the rule that `Transform.values` states."""
    return _indexed(mask, path, values) if values else _binary(_numbers(mask, path), path)


def _numbers(mask: Image.Image, path: Path) -> np.ndarray:
    """(H, W) of what a mask holds; of a colour picture the one channel, if all are alike."""
    if mask.mode in ("1", "L", "I", "I;16", "F"):
        return np.asarray(mask)
    channels = np.asarray(mask.convert("RGB"))
    if (channels != channels[..., :1]).any():
        raise InputError(
            f"mask {path} is a colour picture ({mask.mode}); save it in grey, such as black (skin) and white (lesion)"
        )
    return channels[..., 0]


def _binary(numbers: np.ndarray, path: Path) -> np.ndarray:
    """(H, W) uint8 {0, 1} of a mask that holds 0 and at most one other value."""
    found = np.unique(numbers)
    if np.count_nonzero(found) > 1 or not (found >= 0).all():
        raise InputError(
            f"mask {path} is not binary: {len(found)} different values from {found[0]} to {found[-1]}; "
            "save it as a PNG of 0 (skin) and 255 (lesion), or say which value means which class (mask_values)"
        )
    return (numbers > 0).astype(np.uint8)


def _indexed(mask: Image.Image, path: Path, values: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """(H, W) uint8 of class indices; of a picture with a palette it is the numbers that count, not their colours."""
    numbers = np.asarray(mask) if mask.mode == "P" else _numbers(mask, path)
    found, places = np.unique(numbers, return_inverse=True)
    index_of = {value: index for index, entry in enumerate(values) for value in entry}
    if len(values) > 2:
        index_of.setdefault(IGNORE, IGNORE)
    unknown = [value for value in found.tolist() if value not in index_of]
    if unknown == [IGNORE]:
        raise InputError(
            f"mask {path} holds {IGNORE} (ignore), and with two classes every pixel counts; list {IGNORE} in "
            "mask_values as one of them, or tell three classes apart"
        )
    if unknown:
        known = "; ".join(f"{', '.join(map(str, entry))} for class {index}" for index, entry in enumerate(values))
        raise InputError(
            f"mask {path} holds the value {unknown[0]:.15g}, which is no class: known are {known}"
            f"{f'; {IGNORE} to ignore' if index_of.get(IGNORE) == IGNORE else ''}; correct the mask or mask_values"
        )
    return np.array([index_of[value] for value in found.tolist()], np.uint8)[places.reshape(numbers.shape)]


class CacheError(InputError):
    """The cache folder cannot be written: no fault of any image, so the first one ends the work."""


def cache_folder(cache: Path | str | None = None) -> Path:
    """`cache`, or what ISIC_CACHE names, or ~/.cache/isic-similarity/images."""
    return Path(cache or os.environ.get("ISIC_CACHE") or Path.home() / ".cache" / "isic-similarity" / "images")


def cache_file(pair: Pair, transform: Transform, cache: Path | str | None) -> Path:
    """Where this pair's pixels are kept; the name changes with either file and with all that shapes the pixels."""
    facts = []
    for path in (pair.image, pair.mask):
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); put it back, or remove its partner") from error
        facts += [os.path.abspath(path), status.st_size, status.st_mtime_ns]
    classes = [transform.values] if transform.values else []  # without them the key is what it always was
    key = digest(CACHE_FORMAT, facts, transform.size, transform.blur, transform.interpolation, *classes)
    return cache_folder(cache) / f"{pair.id}-{key}.rgbm"


def _read_cached(file: Path, size: int) -> np.ndarray | None:
    """The cached (size, size, 4) pixels; None when the file is absent, cut short or altered (CRC-32 in front)."""
    try:
        data = file.read_bytes()
    except OSError:  # absent, or no folder that can be read: writing it will say so
        return None
    if len(data) != 4 + 4 * size**2 or zlib.crc32(memoryview(data)[4:]) != int.from_bytes(data[:4], "big"):
        return None
    return np.frombuffer(data, np.uint8, offset=4).reshape(size, size, 4)


def _fill(pair: Pair, transform: Transform, file: Path) -> np.ndarray:
    """Decode a pair and keep its pixels in `file`."""
    pixels = decode(pair, transform)
    data = pixels.tobytes()
    try:
        with atomic_path(file) as temporary:
            temporary.write_bytes(zlib.crc32(data).to_bytes(4, "big") + data)
    except OSError as error:
        raise CacheError(
            f"the image cache {file.parent} cannot be written ({error.strerror or error}); free some space or name "
            "another folder in the environment variable ISIC_CACHE"
        ) from error
    return pixels


def read_or_fill(pair: Pair, transform: Transform, file: Path) -> np.ndarray:
    """The cached pixels, decoded again when the cache lost or spoiled them."""
    cached = _read_cached(file, transform.size)
    return _fill(pair, transform, file) if cached is None else cached


def _looks_whole(file: Path, size: int) -> bool:
    """Length alone: it is quick, and an altered file is found and rebuilt when it is read."""
    try:
        return file.stat().st_size == 4 + 4 * size**2
    except OSError:  # absent, or no folder that can be read: writing it will say so
        return False


def _check_pair(pair: Pair, transform: Transform, cache: Path | str | None) -> str | None:
    """What is wrong with a pair, as a sentence; a sound pair is in the cache afterwards."""
    try:
        file = cache_file(pair, transform, cache)
        if not _looks_whole(file, transform.size):
            _fill(pair, transform, file)
    except CacheError:
        raise
    except InputError as error:
        return str(error)
    return None


def faults(pairs: Sequence[Pair], transform: Transform, cache: Path | str | None = None) -> dict[str, str]:
    """Fill the cache; id -> what is wrong, for the pairs that cannot be used."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checks = pool.map(functools.partial(_check_pair, transform=transform, cache=cache), pairs)
        found = list(progress(checks, total=len(pairs), desc="images", unit="image"))
    return {pair.id: fault for pair, fault in zip(pairs, found) if fault}


def prepare(pairs: Sequence[Pair], transform: Transform, cache: Path | str | None = None) -> None:
    """Decode, check, resize and cache every pair that is not cached yet.

    Raises one InputError that names the first ten unusable files, or the cache folder that cannot be written.
    """
    broken = list(faults(pairs, transform, cache).values())
    if broken:
        more = f"\n… and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise InputError(f"{len(broken)} of {len(pairs)} pairs cannot be used:\n" + "\n".join(broken[:10]) + more)


# ---- duplicates across splits -----------------------------------------------------------------------------------


def cached_pixels(pair: Pair, transform: Transform, cache: Path | str | None = None) -> np.ndarray:
    """(size, size, 4) uint8 R, G, B, mask of a pair (see `decode`), from the cache or decoded into it."""
    return read_or_fill(pair, transform, cache_file(pair, transform, cache))


def duplicates(
    splits: Mapping[str, Sequence[Pair]], transform: Transform, cache: Path | str | None = None
) -> pd.DataFrame:
    """Pairs of images that two different splits share.

    Columns split_a, id_a, split_b, id_b, kind, distance (differing bits of 256), correlation. "exact": the same RGB
    pixels once decoded and resized, whatever the file's name or compression. "near": at most NEAR_BITS of the 256
    bits of a 16×16 gradient hash differ (Krawetz's dHash) and the 32×32 thumbnails, each less its own blur,
    correlate by at least NEAR_CORRELATION. The blur is taken off because any two dark spots on light skin correlate.
    Rotations, reflections and strongly shifted crops are not found. Memory: two float32 for each pair compared.
    """
    signs = {name: _signatures(pairs, transform, cache) for name, pairs in splits.items()}
    rows = []
    for one, other in itertools.combinations(splits, 2):
        (digests_a, bits_a, thumbs_a), (digests_b, bits_b, thumbs_b) = signs[one], signs[other]
        distance = (bits_a.shape[1] - bits_a @ bits_b.T) / 2  # of ±1 vectors
        correlation = thumbs_a @ thumbs_b.T
        exact = digests_a[:, None] == digests_b[None]
        near = (distance <= NEAR_BITS) & (correlation >= NEAR_CORRELATION)
        for a, b in np.argwhere(exact | near):
            kind, values = "exact" if exact[a, b] else "near", (int(distance[a, b]), float(correlation[a, b]))
            rows.append((one, splits[one][a].id, other, splits[other][b].id, kind, *values))
    columns = ["split_a", "id_a", "split_b", "id_b", "kind", "distance", "correlation"]
    return pd.DataFrame(rows, columns=columns).sort_values(["kind", "distance"], ignore_index=True)


def _signatures(pairs: Sequence[Pair], transform: Transform, cache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Digests (n,), hash bits (n, 256) as ±1, unit-norm thumbnails (n, 1024), float32."""
    digests, bits, thumbs = [], [], []
    for pair in progress(pairs, desc="duplicates", unit="image"):
        colours = np.ascontiguousarray(cached_pixels(pair, transform, cache)[..., :3])
        grey = cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY).astype(np.float32)
        small = cv2.resize(grey, (17, 16), interpolation=cv2.INTER_AREA)
        thumb = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA)
        detail = (thumb - cv2.GaussianBlur(thumb, (0, 0), 2)).ravel()
        detail -= detail.mean()
        norm = np.linalg.norm(detail)
        digests.append(digest(colours.tobytes()))
        bits.append(np.where(small[:, 1:] > small[:, :-1], 1, -1).ravel())
        thumbs.append(detail / norm if norm > 0 else detail)  # an even image correlates with nothing
    n = len(pairs)  # a split may be empty
    return (
        np.array(digests, str),
        np.array(bits, np.float32).reshape(n, 256),
        np.array(thumbs, np.float32).reshape(n, 1024),
    )
