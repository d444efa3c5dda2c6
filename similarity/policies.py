"""Spatial policies: how one batch of a site's activations becomes rows and features, by axis name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from similarity.sites import IMAGE_AXES, Site

POLICIES = {
    "gap": "mean over space, tokens or queries: (n, channel)",
    "grid:g": "area-resized to g × g cells, (image, cell) pairs as rows: (n, g·g, channel)",
    "flat:g": "area-resized to g × g cells, all of them features of the image: (n, g·g·channel)",
    "tokens": "every position, token or query is a row: (n, position, channel)",
    "map": "the full map: (n, channel, height, width); memory grows with it",
}


def parse_policy(policy: str) -> tuple[str, int]:
    """'grid:4' -> ('grid', 4); 'gap' -> ('gap', 0)."""
    kind, _, cells = policy.partition(":")
    known = {name.partition(":")[0] for name in POLICIES}
    takes_cells = kind in ("grid", "flat")
    if kind not in known or takes_cells != bool(cells) or (takes_cells and not (cells.isdigit() and int(cells) > 0)):
        raise ValueError(
            f"unknown policy {policy!r}; choose from {', '.join(POLICIES)} (g a whole number, as in grid:4)"
        )
    return kind, int(cells or 0)


def unfit(site: Site, policy: str, image_size: tuple[int, int]) -> str:
    """Why the policy is not defined at this site (listed, so with its shape), for a message; '' where it is.

    Grids, flat grids and maps need features that have a place; `grid:g` also a map of at least g × g: a smaller one
    would repeat its cells as rows, which no estimator that counts rows may see.
    """
    kind, cells = parse_policy(policy)
    if kind in ("gap", "tokens"):
        return ""
    if not site.spatial:
        return f"policy {policy!r} needs space, and site {site.name!r} has axes {site.axes}; use 'gap'"
    height, width = map_size(site, image_size)
    if kind == "grid" and min(height, width) < cells:
        size = f"{height} × {width} cells for images of {image_size[0]} × {image_size[1]}"
        return f"policy {policy!r} needs a larger map: site {site.name!r} has {size}; use 'gap' or a smaller grid"
    return ""


def map_size(site: Site, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in cells of a listed spatial site; of its finest stride, where it has several."""
    if "height" in site.axes:
        shape = dict(zip((axis for axis in site.axes if axis != "batch"), site.shape))
        return shape["height"], shape["width"]
    return tuple(-(-side // min(site.strides)) for side in image_size)


def reduce(tensor: Tensor, site: Site, policy: str, image_size: tuple[int, int]) -> Tensor:
    """One batch of a site's activations, reduced: (batch, channel), (batch, position, channel) or full maps.

    `image_size` is (height, width) of the model's input in pixels; tokens find their places by it and their strides.
    Computed in at least float32.
    """
    kind, cells = parse_policy(policy)
    tensor = tensor.detach()
    tensor = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    if kind in ("gap", "tokens"):
        rows = _positions(tensor, site)
        return rows.mean(1) if kind == "gap" else rows
    maps = to_map(tensor, site, image_size)
    if kind == "map":
        return maps
    grid = F.adaptive_avg_pool2d(maps, cells).flatten(2).transpose(1, 2)
    return grid if kind == "grid" else grid.flatten(1)


def _positions(tensor: Tensor, site: Site) -> Tensor:
    """(batch, position, channel): every axis that is neither batch nor channel is a position."""
    places = [i for i, axis in enumerate(site.axes) if axis not in ("batch", "channel")]
    tensor = tensor.permute(site.axes.index("batch"), *places, site.axes.index("channel"))
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def to_map(tensor: Tensor, site: Site, image_size: tuple[int, int]) -> Tensor:
    """(batch, channel, height, width); tokens are laid out row by row, the finest of several strides is used."""
    if "height" in site.axes:
        return tensor.permute(*(site.axes.index(axis) for axis in IMAGE_AXES))
    tokens = _positions(tensor, site)
    sizes = [tuple(-(-side // stride) for side in image_size) for stride in site.strides]
    counts = [height * width for height, width in sizes]
    if sum(counts) != tokens.shape[1]:
        raise ValueError(
            f"site {site.name!r} has {tokens.shape[1]} tokens, but strides {site.strides} on {image_size} give {counts}"
        )
    finest = site.strides.index(min(site.strides))
    start = sum(counts[:finest])
    chosen = tokens[:, start : start + counts[finest]]
    return chosen.transpose(1, 2).unflatten(2, sizes[finest])
