"""The results folder of a study: its settings, versions and the hashes of its images, never those of another run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dataset import SegmentationDataset
from utils import InputError, open_run, write_text


def open_results(
    config, datasets: Mapping[str, SegmentationDataset], device: torch.device, may_differ: Sequence[str] = ()
) -> Path:
    """Create or continue the folder `config.out` with data.json; other settings or images are refused.

    may_differ : settings that may be others than the folder's
    """
    hashes = {name: {"images": len(data.ids), "hash": data.fingerprint} for name, data in datasets.items()}
    # the synthetic set may differ in its last bits between versions of OpenCV; each stage checks its own hash
    return open_with_hashes(config, hashes, device, may_differ, compared=not config.is_synthetic)


def open_with_hashes(
    config, hashes: Mapping, device: torch.device, may_differ: Sequence[str] = (), compared: bool = True
) -> Path:
    """As `open_results` for images of any kind, by their hashes; `compared`: those of the folder must be these."""
    known = Path(config.out) / "data.json"
    if compared and known.exists() and json.loads(known.read_text(encoding="utf-8")) != hashes:
        raise InputError(f"{config.out} holds results of other images than {config.data} has now; choose another --out")
    folder = open_run(Path(config.out), dataclasses.asdict(config), device, may_differ)
    write_text(known, json.dumps(hashes, indent=1) + "\n")
    return folder
