"""Where in the image: recordings on a grid become one row an image, the mean over a region that the caller weights.

A region is a weight for every cell of every image, so that it can be another part of each image. What the regions mean
is the caller's; nothing is compared here. Not for whole images: 'gap' records those in far less memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from similarity.policies import parse_policy
from similarity.recording import Recording

Weights = pd.DataFrame | Mapping[str, Sequence[float]]


def pooled(recording: Recording, weights: Weights) -> Recording:
    """Σ_cell w x / Σ_cell w of every site and image: a recording (n, channel) under the policy 'gap'.

    recording : under 'grid:g', (n, g·g, channel), cells row by row
    weights : for every id g·g weights, at least 0 and in the same order: {id: array (g·g,)}, or a table with ids as
        its index. Their scale does not matter; further ids are not used.

    Images whose weights are all 0 have no such region and are left out, so two recordings pooled with the same weights
    hold the same images. The mean is in float64 and rounded to the features' precision. A region's recording may be
    compared with one of another region, or of whole images: that both are 'gap' says one row an image, no more.
    """
    kind, cells = parse_policy(recording.policy)
    if kind != "grid":
        raise ValueError(f"regions need a recording under 'grid:g', and this one is under {recording.policy!r}")
    table = _table(weights, recording.ids, cells**2)
    kept = [image for image, total in zip(recording.ids, table.sum(1)) if total > 0]
    if not kept:
        raise ValueError("the weights of every image sum to 0: no image has this region")
    table = table[table.sum(1) > 0]
    chosen = recording if len(kept) == len(recording) else recording.select(ids=kept)
    shares = table / table.sum(1, keepdim=True)
    features = {name: _weighted(chosen[name], shares) for name in chosen.names}
    sites = [
        dataclasses.replace(site, axes=("batch", "channel"), strides=(), shape=tuple(features[site.name].shape[1:]))
        for site in chosen.sites
    ]
    return dataclasses.replace(chosen, features=features, sites=sites, policy="gap")


def _weighted(X: Tensor, shares: Tensor) -> Tensor:
    """(n, cells, channel) and shares (n, cells), each row summing to 1 -> (n, channel)."""
    return torch.einsum("nk,nkc->nc", shares.to(X.device), X.double()).to(X.dtype)


def _table(weights: Weights, ids: list[str], cells: int) -> Tensor:
    """(n, cells) float64 in the order of ids."""
    if isinstance(weights, pd.DataFrame):
        if weights.index.has_duplicates:
            raise ValueError("the table of weights has an id twice in its index; every image has one row")
        weights = dict(zip(weights.index, weights.to_numpy(dtype=np.float64)))
    absent = [image for image in ids if image not in weights]
    if absent:
        raise ValueError(f"{len(absent)} recorded images have no weights, first {absent[0]!r}; give weights for them")
    rows = [np.asarray(weights[image], dtype=np.float64) for image in ids]
    for image, row in zip(ids, rows):
        if row.shape != (cells,):
            raise ValueError(
                f"image {image!r} has weights of shape {row.shape}; the grid has {cells} cells, row by row"
            )
        if not (np.isfinite(row).all() and (row >= 0).all()):
            raise ValueError(f"image {image!r} has weights that are negative or not finite; give shares of the cells")
    return torch.from_numpy(np.stack(rows))
