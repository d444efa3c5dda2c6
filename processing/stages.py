"""Which stage of its network a site belongs to, read off the shapes: for choosing sites by one rule for all.

Networks that shrink their maps have stages of one map size; columnar ones (ViT), whose maps stay as they are, have
quarters of their depth instead. See `smoothness.choose_sites`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from similarity import Site
from utils import InputError

FEWEST = 3  # map sizes of a network that has stages
QUARTERS = 4


def stages_of(sites: Sequence[Site]) -> list[int]:
    """The stage of every site, from 0, in execution order.

    A stage ends where the map changes size (height and width, or number of tokens), also back to an earlier size; a
    network with fewer than three sizes is cut into quarters of its sites. Shapes are those that `list_sites` fills in.
    """
    without = [site.name for site in sites if not site.shape]
    if without:
        raise InputError(f"site {without[0]!r} has no shape; list the sites with the shapes of an image first")
    sizes = [_size(site) for site in sites]
    if len(set(sizes)) < FEWEST:
        return [place * QUARTERS // len(sites) for place in range(len(sites))]
    stage, found = 0, [0]
    for before, here in itertools.pairwise(sizes):
        stage += here != before
        found.append(stage)
    return found


def _size(site: Site) -> tuple[int, ...]:
    """The lengths of the axes that are places, in their order."""
    axes = [axis for axis in site.axes if axis != "batch"]
    return tuple(length for axis, length in zip(axes, site.shape) if axis != "channel")
