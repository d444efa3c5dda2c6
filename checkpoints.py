"""What a training can be continued from: the state after its last epoch, and beside it the one after the epoch before.

A state is written in full under another name, flushed to the disk, and only then named `resume.pt`, while the one that
had the name becomes `resume-previous.pt`. So a process that is killed, or a disk that is full, leaves one that is whole
at every moment. The files are zip archives with a checksum for each tensor, which is verified before anything is used.
What belongs into a state is the trainer's business.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from utils import InputError, atomic_path, flush_folder
from weights import UNREADABLE

LAST, BEFORE, DAMAGED = "resume.pt", "resume-previous.pt", "resume-damaged.pt"
NEEDED = ("model", "optimizer", "history")


def save_state(folder: Path, state: dict) -> None:
    """Make `state` (tensors, numbers, text) the last one of a run folder. OSError when the disk refuses it."""
    last = Path(folder) / LAST
    with atomic_path(last) as temporary:
        _write(state, temporary)
        if last.exists():
            os.replace(last, last.with_name(BEFORE))
    flush_folder(last.parent)


def _write(state: dict, path: Path) -> None:
    with open(path, "wb") as stream:
        try:
            torch.save(state, stream)
        except RuntimeError as error:  # the archive's writer stumbles over what the disk refused, and says only that
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def full_disk_as_a_sentence(folder: Path, what: str) -> Iterator[None]:
    """Around writing into a run folder: what the disk refuses becomes an InputError with its remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{what} could not be written to {folder} ({reason}); what was written before is whole: free some space "
            "there, and the same command continues from it"
        ) from error


def saved_extra(folder: Path) -> dict | None:
    """What a checkpoint of `models.save_model` says of itself; None when there is none that can be read."""
    try:
        return json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))["extra"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_state(folder: Path) -> dict | None:
    """The last whole state of a run folder, on the CPU; None when it has none yet.

    A damaged last state is set aside and the one before it is used, which a printed sentence says: the epoch between
    is then trained again, on a CPU to the same bits. InputError when neither can be used.
    """
    faults: dict[str, str] = {}
    for name in (LAST, BEFORE):
        path = Path(folder) / name
        if not path.exists():
            continue
        try:
            state = _read(path)
        except DamagedError as error:
            faults[name] = str(error)
            continue
        if name == BEFORE:
            _set_aside(Path(folder), faults, len(state["history"]))
        return state
    if faults:
        named = " and ".join(f"{name} ({fault})" for name, fault in faults.items())
        raise InputError(
            f"{folder}: {named} cannot be continued from; put back a copy, or delete resume*.pt there to train this "
            "run anew; best/ and last/ stay usable"
        )
    return None


def _set_aside(folder: Path, faults: dict[str, str], epoch: int) -> None:
    """Rename a damaged last state, or the next epoch would make it the one before; and say what is used instead."""
    went = f"{folder / LAST} is missing"
    if LAST in faults:
        os.replace(folder / LAST, folder / DAMAGED)
        went = f"{folder / LAST} is damaged ({faults[LAST]}; kept as {DAMAGED})"
    print(f"note: {went}: continuing from the checkpoint before it, {BEFORE}, after epoch {epoch}", flush=True)


class DamagedError(Exception):
    """A file of ours that is cut short, altered, or of another program."""


def _read(path: Path) -> dict:
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save writes
            spoilt = archive.testzip()
        if spoilt is not None:
            raise DamagedError(f"wrong checksum of {spoilt}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, zlib.error, *UNREADABLE) as error:
        raise DamagedError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no text'}"
        ) from error
    if not isinstance(state, dict) or any(key not in state for key in NEEDED):
        raise DamagedError("no state of a training")
    return state
