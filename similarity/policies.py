"""Spatial policies: how one batch of a site's activations becomes rows and features, by axis name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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
    "mean": "the same as gap, by the name that queries give it: (n, channel)",
    "mask": "mean over queries weighted by their share in the model's own answer, elsewhere as gap: (n, channel)",
}
_AVERAGES = ("gap", "mean", "mask")  # one row of channels an image, at any site


def parse_policy(policy: str) -> tuple[str, int]:
    """'grid:4' -> ('grid', 4); 'gap' -> ('gap', 0)."""
    kind, _, cells = str(policy).partition(":")
    known = {name.partition(":")[0] for name in POLICIES}
    takes_cells = kind in ("grid", "flat")
    if kind not in known or takes_cells != bool(cells) or (takes_cells and not (cells.isdigit() and int(cells) > 0)):
        raise ValueError(
            f"unknown policy {policy!r}; choose from {', '.join(POLICIES)} (g a whole number, as in grid:4)"
        )
    return kind, int(cells or 0)


def canonical(policy: str) -> str:
    """One name a policy: 'mean' is 'gap'. Recordings under policies of one canonical name may be compared."""
    return "gap" if policy == "mean" else policy


def weighs_queries(site: Site, policy: str) -> bool:
    """Whether the rows of this site are only known once the model has answered."""
    return policy == "mask" and "query" in site.axes


def unfit(site: Site, policy: str, image_size: tuple[int, int]) -> str:
    """Why the policy is not defined at this site (listed, so with its shape), for a message; '' where it is.

    Grids, flat grids and maps need features that have a place; `grid:g` also a map of at least g × g: a smaller one
    would repeat its cells as rows, which no estimator that counts rows may see.
    """
    kind, cells = parse_policy(policy)
    if kind == "tokens" or kind in _AVERAGES:
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


def row_shape(site: Site, policy: str, image_size: tuple[int, int]) -> tuple[int, ...]:
    """The shape of one image's row at a listed site that the policy fits."""
    if not site.shape:
        raise ValueError(f"site {site.name!r} has no shape yet; list it first, with `list_sites`")
    kind, cells = parse_policy(policy)
    sizes = dict(zip((axis for axis in site.axes if axis != "batch"), site.shape))
    channels = sizes.pop("channel")
    if site.prefix:
        sizes["token"] -= site.prefix
    if kind in _AVERAGES:
        return (channels,)
    if kind == "tokens":
        return (math.prod(sizes.values()), channels)
    if kind == "map":
        return (channels, *map_size(site, image_size))
    return (cells * cells, channels) if kind == "grid" else (cells * cells * channels,)


def estimate_bytes(
    sites: Iterable[Site], policies: Sequence[str], image_size: tuple[int, int], images: int, *, itemsize: int = 4
) -> int:
    """Bytes of the rows that recordings of listed sites keep; where a policy is unfit for a site there are none.

    `itemsize` is that of a number: 4, or 8 for sites that compute in float64.
    """
    pairs = [(site, policy) for site in sites for policy in policies if not unfit(site, policy, image_size)]
    return images * itemsize * sum(math.prod(row_shape(site, policy, image_size)) for site, policy in pairs)


def reduce(
    tensor: Tensor, site: Site, policy: str, image_size: tuple[int, int], weights: Tensor | None = None
) -> Tensor:
    """One batch of a site's activations, reduced: (batch, channel), (batch, position, channel) or full maps.

    image_size : (height, width) of the model's input in pixels; tokens find their places by it and their strides
    weights : (batch, query), each row summing to 1; needed by 'mask' at a site with queries, see `weighs_queries`

    Computed in at least float32.
    """
    kind, cells = parse_policy(policy)
    if weighs_queries(site, policy):
        if weights is None:
            raise ValueError(f"policy 'mask' needs the weights of the queries at site {site.name!r}; none were given")
        return weigh(query_rows(tensor, site), weights, site)
    if kind in _AVERAGES:
        return _average(tensor.detach(), site)
    tensor = _precise(tensor)
    if kind == "tokens":
        return _positions(tensor, site)
    maps = to_map(tensor, site, image_size)
    if kind == "map":
        return maps
    grid = F.adaptive_avg_pool2d(maps, cells).flatten(2).transpose(1, 2)
    return grid if kind == "grid" else grid.flatten(1)


def without_prefix(tensor: Tensor, site: Site) -> Tensor:
    """The tokens that have a place: class and register tokens in front of them are left out."""
    if not site.prefix:
        return tensor
    axis = site.axes.index("token")
    return tensor.narrow(axis, site.prefix, tensor.shape[axis] - site.prefix)


def query_rows(tensor: Tensor, site: Site) -> Tensor:
    """(batch, query, channel), the mean over any position beside the queries; in at least float32."""
    places = [i for i, axis in enumerate(site.axes) if axis not in ("batch", "query", "channel")]
    order = [*(site.axes.index(axis) for axis in ("batch", "query")), *places, site.axes.index("channel")]
    tensor = _precise(tensor).permute(order)
    return tensor.mean(tuple(range(2, 2 + len(places)))) if places else tensor


def weigh(rows: Tensor, weights: Tensor, site: Site) -> Tensor:
    """(batch, query, channel) and weights (batch, query), each row of them summing to 1 -> (batch, channel)."""
    if weights.shape != rows.shape[:2]:
        raise ValueError(
            f"site {site.name!r} has {rows.shape[1]} queries for each of {rows.shape[0]} images, and the model weights "
            f"{weights.shape[1]} for each of {weights.shape[0]}; take the site out, or record it under 'gap'"
        )
    return (weights.to(rows)[..., None] * rows).sum(1)


def _average(tensor: Tensor, site: Site) -> Tensor:
    """(batch, channel), the mean over every other axis, without a copy of the activation in another order."""
    places = [i for i, axis in enumerate(site.axes) if axis not in ("batch", "channel")]
    tensor = without_prefix(tensor, site)
    if places:
        precise = tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32
        tensor = tensor.mean(places, dtype=precise)
    tensor = _precise(tensor)
    return tensor if site.axes.index("batch") < site.axes.index("channel") else tensor.T


def _precise(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _positions(tensor: Tensor, site: Site) -> Tensor:
    """(batch, position, channel): every axis that is neither batch nor channel is a position."""
    tensor = without_prefix(tensor, site)
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
