"""A frozen encoder sees each picture once: what it answered is kept in memory-mapped files and read from there.

A row is found by the pixels that went in. So an image and its seven rotations and reflections are eight rows, no
augmentation can be given the features of another picture, and validation images need no rule of their own. The folder
is named after the encoder's weights; it may be deleted at any time, and the next run with that encoder finds it again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import model_sites
from utils import InputError, atomic_path, digest

NAME = 16  # bytes of a picture's name in `rows.bin`


def cache_features(model: nn.Module, folder: Path, rows: int, process: int = 0) -> FrozenFeatures:
    """From now on the model's frozen encoder reads what it answered before; at most `rows` pictures of a size are kept.

    folder : where the caches are, one for each encoder and `process`, since a file has one writer
    """
    encoder = model_sites.encoder_of(model)
    if encoder.training or any(parameter.requires_grad for parameter in encoder.parameters()):
        raise InputError("cache_features: only a frozen encoder's features stay what they are; set freeze to [encoder]")
    state = [part for name, tensor in sorted(encoder.state_dict().items()) for part in (name, _bytes(tensor))]
    cache = FrozenFeatures(encoder, Path(folder) / f"{digest(*state)}-{process}", rows)
    encoder.forward = cache.forward
    return cache


class FrozenFeatures:
    """Stands in for an encoder's `forward` that answers a list of maps, or an output with `feature_maps`."""

    def __init__(self, encoder: nn.Module, folder: Path, rows: int) -> None:
        self.compute, self.folder, self.rows = encoder.forward, folder, rows
        self.stores: dict[tuple[int, ...], _Store] = {}
        self.computed = self.read = 0  # pictures, since this run began

    @torch.no_grad()
    def forward(self, images: Tensor):
        """What the encoder itself would answer for images (B, 3, H, W), already normalised."""
        names = [hashlib.sha256(_bytes(image)).digest()[:NAME] for image in images]
        size = tuple(images.shape[1:])
        if size not in self.stores:
            self.stores[size] = _Store(self.folder, size, self.rows, self.compute(images[:1]))
        store = self.stores[size]
        new = [place for place, name in enumerate(names) if name not in store.row_of]
        self.computed, self.read = self.computed + len(new), self.read + len(names) - len(new)
        fresh = self.compute(images[new]) if new else None
        if new:
            store.keep([names[place] for place in new], fresh)
        if all(name in store.row_of for name in names):
            # also what was computed just now: its layout in memory may differ, and so the last bits of what follows
            return store.answer(names, images)
        return fresh if len(new) == len(names) else self.compute(images)  # the files are full


class _Store:
    """The files of one encoder and one input size."""

    def __init__(self, folder: Path, size: Sequence[int], rows: int, example) -> None:
        self.kind, self.rows = type(example), rows
        shapes = [tuple(part.shape[1:]) for part in _maps(example)]
        self.from_input = len(shapes) > 0 and self.kind is list and shapes[0] == tuple(size)  # smp's first "feature"
        folder = Path(folder) / "x".join(map(str, (*size, rows)))
        files = {folder / f"map{place}.npy": (rows, *shape) for place, shape in enumerate(shapes[self.from_input :])}
        _refuse_full_disk(files)
        self.maps = [_open_rows(file, shape) for file, shape in files.items()]
        self.log = folder / "rows.bin"
        known = self.log.read_bytes() if self.log.exists() else b""
        whole = range(0, len(known) - NAME + 1, NAME)  # a name cut short by a crash is written anew
        self.row_of = {known[start : start + NAME]: row for row, start in enumerate(whole)}

    def keep(self, names: Sequence[bytes], answer) -> None:
        """Write rows while there is room; names are written after the rows, so that what is named is whole.

        All names of a batch are one write: a run that was killed finds the batch or nothing of it, computes it together
        as before, and so to the same bit.
        """
        places = {name: place for place, name in enumerate(names) if name not in self.row_of}
        places = dict(list(places.items())[: self.rows - len(self.row_of)])
        first = len(self.row_of)
        for row, place in enumerate(places.values(), start=first):
            for file, part in zip(self.maps, _maps(answer)[self.from_input :]):
                file[row] = part[place].float().cpu().numpy()
        with open(self.log, "r+b" if self.log.exists() else "w+b") as log:
            log.seek(first * NAME)
            log.write(b"".join(places))
        self.row_of |= {name: row for row, name in enumerate(places, start=first)}

    def answer(self, names: Sequence[bytes], images: Tensor):
        """As the encoder would have put it."""
        rows = [self.row_of[name] for name in names]
        read = [torch.from_numpy(file[rows]).to(images.device) for file in self.maps]
        if self.kind is not list:
            return self.kind(feature_maps=tuple(read))
        return [images, *read] if self.from_input else read


def _refuse_full_disk(files: dict[Path, tuple[int, ...]]) -> None:
    """Refuse files, path -> shape, that could not all be filled."""
    (folder,) = {file.parent for file in files}
    folder.mkdir(parents=True, exist_ok=True)
    needed = 4 * sum(int(np.prod(shape)) for file, shape in files.items() if not file.exists())
    if needed > shutil.disk_usage(folder).free:
        raise InputError(
            f"cache_features: {folder} may grow to {needed / 1e9:.1f} GB, more than is free there; leave "
            "cache_features out, or name another folder in the environment variable ISIC_FEATURES"
        )


def _open_rows(file: Path, shape: tuple[int, ...]) -> np.memmap:
    """A float32 array on disk, found again or made; sparse, so that a row takes space once it is written."""
    if not file.exists():
        with atomic_path(file) as temporary:
            np.lib.format.open_memmap(temporary, "w+", np.float32, shape).flush()
    return np.load(file, mmap_mode="r+")


def _maps(answer) -> list[Tensor]:
    return list(answer if isinstance(answer, (list, tuple)) else answer.feature_maps)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
