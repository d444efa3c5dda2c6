"""Recordings that a study keeps in its folder: read again where they are still of the same network and images.

How a network is recorded is in `similarity.recording`; which ones are, and what is done with them, the studies say.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from dataset import SegmentationDataset
from models import sites
from similarity import Recording
from similarity.policies import unfit
from similarity.recording import hash_model


def kept_recording(path: Path, model: nn.Module, test: SegmentationDataset) -> Recording | None:
    """The recording of a path if it is of these weights and images and of all the sites that its policy fits.

    None where there is none, or a stale or damaged one: it is made again.
    """
    if not path.exists():
        return None
    try:
        found = Recording.load(path, model=hash_model(model), data_hash=test.fingerprint)
    except (SafetensorError, ValueError):  # cut short, of another version, or stale
        return None
    size = test.transform.size
    fitting = [site.name for site in sites(model, size) if not unfit(site, found.policy, (size, size))]
    return found if found.names == fitting else None
