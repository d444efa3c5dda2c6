"""What the processing-steps study makes of one network: its recording, what it has spent, what its sites keep.

Each part is kept under a key of network, images and settings, and made once. Networks are compared elsewhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from torch import nn

from classification.classifiers import sites as classifier_sites
from models import sites as model_sites
from processing.readout import folds_of, permuted_orders, statistic_columns
from processing.readout import kept as kept_by_sites
from processing.ridge import read_out
from processing.spending import spent_by_site
from processing.stages import stages_of
from similarity import Recording, Site, record
from similarity.policies import unfit
from studies.explained_images import Chosen, key_of
from studies.explanation_ways import slug
from studies.subjects import SEGMENTATION
from studies.walks import Walk
from utils import InputError, digest, resolve_device, write_table

VERSION = 1  # of what the same settings give
ENCODER = "encoder"


@dataclass(frozen=True)
class Work:
    """What is asked of every network.

    statistics : id, statistic, value of the images, see `processing.readout.kept`
    """

    chosen: Chosen
    policy: str
    statistics: pd.DataFrame
    folds: int
    permutations: int
    k: int
    batch: int
    seed: int
    device: str

    @property
    def images_key(self) -> str:
        return digest(VERSION, key_of(self.chosen), self.policy)

    @property
    def kept_key(self) -> str:
        values = self.statistics.sort_values(["id", "statistic"])["value"].round(12).tolist()
        return digest(self.images_key, values, self.folds, self.permutations, self.k, self.seed)


def work(walk: Walk, asked: Work, folder: Path, threads: int | None = None) -> None:
    """Make what is missing of one network."""
    if threads is not None:
        torch.set_num_threads(threads)
    if recording(walk, asked, folder) is None or sites_table(walk, asked, folder) is None:
        model = walk.load(resolve_device(asked.device))
        listed = listed_sites(walk, model)
        write_table(_sites(walk, model, listed), _path(walk, asked.images_key, folder, "sites", ".csv"))
        _record(walk, asked, model, listed, folder)
    if kept_table(walk, asked, folder) is None:
        made = recording(walk, asked, folder).select(part=ENCODER)
        options = {"folds": asked.folds, "permutations": asked.permutations, "k": asked.k, "seed": asked.seed}
        write_table(
            kept_by_sites(made, asked.statistics, **options), _path(walk, asked.kept_key, folder, "kept", ".csv")
        )


def timed(walk: Walk, asked: Work) -> tuple[float, int]:
    """(seconds that recording and reading out take, sites), from one batch and one site's read-out."""
    model = walk.load(resolve_device(asked.device))
    listed = [site for site in listed_sites(walk, model) if site.part == ENCODER]
    images = asked.chosen.at(walk.subject.image_size).first(min(asked.batch, len(asked.chosen.ids)))
    device = next(model.parameters()).device
    started = time.perf_counter()
    with torch.inference_mode():
        model(images.pixels.to(device))
    passing = (time.perf_counter() - started) / len(images.ids) * len(asked.chosen.ids)
    rng = np.random.default_rng(0)
    width = int(listed[-1].shape[[axis for axis in listed[-1].axes if axis != "batch"].index("channel")])
    noise = rng.normal(size=(len(asked.chosen.ids), width))
    values = statistic_columns(asked.statistics, list(asked.chosen.ids)).to_numpy()
    fold = folds_of(asked.chosen.ids, folds=asked.folds, seed=asked.seed)
    orders = permuted_orders(len(noise), asked.permutations, asked.seed)
    started = time.perf_counter()
    read_out(noise, values, fold, orders)
    return passing + (time.perf_counter() - started) * len(listed), len(listed)


def listed_sites(walk: Walk, model: nn.Module) -> list[Site]:
    """Every block's output, in execution order, with the shapes of an image of the network's own size."""
    listing = model_sites if walk.subject.kind == SEGMENTATION else classifier_sites
    return listing(model, walk.subject.image_size)


def _sites(walk: Walk, model: nn.Module, listed: list[Site]) -> pd.DataFrame:
    """One row a site: site, part, axes, shape, stage (within the encoder, and beyond it), parameters, operations."""
    size = walk.subject.image_size
    spent = spent_by_site(model, listed, size)
    parts = [[site for site in listed if (site.part == ENCODER) == inner] for inner in (True, False)]
    inner, outer = (stages_of(part) for part in parts)
    after = max(inner, default=-1) + 1
    stage = dict(zip((site.name for part in parts for site in part), [*inner, *(after + each for each in outer)]))
    rows = [
        {
            "site": site.name,
            "part": site.part,
            "axes": " ".join(site.axes),
            "shape": " × ".join(map(str, site.shape)),
            "stage": stage[site.name],
            "parameters": int(spent.loc[site.name, "parameters"]),
            "operations": int(spent.loc[site.name, "operations"]),
        }
        for site in listed
    ]
    return pd.DataFrame(rows)


def _record(walk: Walk, asked: Work, model: nn.Module, listed: list[Site], folder: Path) -> None:
    size = walk.subject.image_size
    images = asked.chosen.at(size)
    device = next(model.parameters()).device
    batches = (
        (images.pixels[rows].to(device), [images.ids[row] for row in rows])
        for rows in torch.arange(len(images.ids)).split(asked.batch)
    )
    fitting = [site for site in listed if not unfit(site, asked.policy, (size, size))]
    found = record(model, batches, fitting, asked.policy, data_hash=asked.images_key)
    found.features = {name: tensor.cpu() for name, tensor in found.features.items()}
    found.save(_path(walk, asked.images_key, folder, "recording", ".safetensors"))


def recording(walk: Walk, asked: Work, folder: Path) -> Recording | None:
    """What its sites computed, if it is there and whole."""
    path = _path(walk, asked.images_key, folder, "recording", ".safetensors")
    if not path.exists():
        return None
    try:
        return Recording.load(path, data_hash=asked.images_key)
    except (SafetensorError, ValueError):  # cut short, or of another version
        return None


def kept_recording(network: str, folder: Path) -> Recording:
    """What the sites of one network computed, by its name in a results folder's tables: for asking more of it."""
    found = sorted((folder / "walks" / slug(network)).glob("recording-*.safetensors"))
    if len(found) != 1:
        raise InputError(
            f"{folder} has {len(found)} recordings of {network!r}; run the study where there are none; where several"
            " weights, images or policies were recorded, read the one that is meant with Recording.load"
        )
    return Recording.load(found[0])


def sites_table(walk: Walk, asked: Work, folder: Path) -> pd.DataFrame | None:
    """The facts of its sites, if they are there."""
    return _table(_path(walk, asked.images_key, folder, "sites", ".csv"))


def kept_table(walk: Walk, asked: Work, folder: Path) -> pd.DataFrame | None:
    """What its encoder's sites keep of the images' statistics, if it is there."""
    return _table(_path(walk, asked.kept_key, folder, "kept", ".csv"))


def _table(path: Path) -> pd.DataFrame | None:
    return pd.read_csv(path, keep_default_na=True) if path.exists() else None


def _path(walk: Walk, key: str, folder: Path, what: str, ending: str) -> Path:
    return folder / "walks" / slug(walk.name) / f"{what}-{digest(walk.key, key)[:8]}{ending}"
