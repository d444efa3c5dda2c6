"""The planes over all sites of all networks of the processing-steps study, kept: they take minutes and are asked for
again with every new table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from processing.together import Together, planes_together, resampled_together
from similarity import Recording
from studies.processing_work import ENCODER, Work
from utils import atomic_path, digest

WHOLE = "whole"  # encoder and decoder


def parts_of(recordings: Mapping[str, Recording]) -> dict[str, dict[str, Recording]]:
    """The paths that are compared: all networks' encoders, and those of networks with a decoder from end to end."""
    encoders = {name: each.select(part=ENCODER) for name, each in recordings.items()}
    whole = {name: each for name, each in recordings.items() if any(site.part != ENCODER for site in each.sites)}
    parts = {ENCODER: encoders, WHOLE: whole}
    return {part: found for part, found in parts.items() if len(found) > 1}


def kept_planes(recordings: Mapping[str, Recording], asked: Work, neighbours: int, folder: Path) -> Together:
    """`planes_together` of some networks, read where they are there."""
    path = _path(recordings, asked, f"neighbours {neighbours}", folder)
    if path.exists():
        with np.load(path) as stored:
            return Together.of(recordings, dict(stored), asked.k, neighbours)
    found = planes_together(recordings, asked.k, neighbours=neighbours, device=_device(asked))
    with atomic_path(path) as temporary:
        np.savez(temporary, **found.values)
    return found


def kept_samples(recordings: Mapping[str, Recording], asked: Work, resamples: int, folder: Path) -> tuple:
    """`resampled_together` of some networks, read where they are there."""
    path = _path(recordings, asked, f"resamples {resamples} {asked.seed}", folder)
    if path.exists():
        with np.load(path) as stored:
            return stored["samples"], int(stored["taken"])
    samples, taken = resampled_together(recordings, asked.k, resamples=resamples, seed=asked.seed)
    with atomic_path(path) as temporary:
        np.savez(temporary, samples=samples, taken=taken)
    return samples, taken


def _path(recordings: Mapping[str, Recording], asked: Work, what: str, folder: Path) -> Path:
    of = [(name, each.model_hash, each.names) for name, each in recordings.items()]
    return folder / "walks" / f"planes-{digest(of, asked.images_key, asked.k, what)[:8]}.npz"


def _device(asked: Work) -> torch.device | None:
    return torch.device("cuda") if asked.device != "cpu" and torch.cuda.is_available() else None
