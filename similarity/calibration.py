"""The ruler: what a similarity is worth beside another seed, and beside no training at all.

A similarity between two architectures is reported with its ceiling (the same architecture from another seed), its
floor (the untrained twins) and its place between them, u = (s − floor)/(ceiling − floor). See SCIENCE, section 4. The
null (permuted images) is the subject of `nulls`, the interval over images of `intervals`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from similarity import intervals
from similarity.recording import Recording

QUANTITIES = ("similarity", "floor", "ceiling", "u")
Seeds = tuple[int, int]
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Comparison:
    """Two architectures, several seeds of each, under one measure: {(seed, seed): values (…, rows, columns)}.

    rows, columns : the sites of A and of B
    cross : trained A against trained B
    own_a, own_b : two seeds of one architecture, sites of A × sites of A; empty with one seed
    floor : untrained twins of A and B
    start : what training began with, where that is more than random weights (pretrained twins); else empty
    distance : whether small values mean alike
    Leading axes, such as resamples of the images, are the same in all of them.
    """

    rows: list[str]
    columns: list[str]
    cross: Mapping[Seeds, np.ndarray]
    own_a: Mapping[Seeds, np.ndarray] = field(default_factory=dict)
    own_b: Mapping[Seeds, np.ndarray] = field(default_factory=dict)
    floor: Mapping[Seeds, np.ndarray] = field(default_factory=dict)
    start: Mapping[Seeds, np.ndarray] = field(default_factory=dict)
    distance: bool = False

    def seeds(self, side: str) -> list[int]:
        """The seeds of architecture 'a' or 'b'."""
        return sorted({pair["ab".index(side)] for pair in self.cross})

    def without(self, side: str, seed: int) -> Comparison:
        """The same without one seed of one architecture."""
        place = "ab".index(side)
        kept = {kind: {k: v for k, v in getattr(self, kind).items() if k[place] != seed} for kind in ("cross", "floor")}
        own = {k: v for k, v in getattr(self, f"own_{side}").items() if seed not in k}
        return dataclasses.replace(self, **kept, **{f"own_{side}": own})

    def scale(self, pairs: Pairs | None = None) -> dict[str, np.ndarray]:
        """similarity, floor, ceiling and u: (…, rows, columns) of every cell, or (…,) means over the given pairs.

        Means over the seeds come first, then the geometric mean that is the ceiling, then means over pairs, then u.
        Missing seeds or twins leave NaN.
        """
        rows, columns = self._cells(pairs)
        shape = next(iter(self.cross.values()))[..., rows, columns].shape
        own = {side: self._own(side) for side in "ab"}
        ceiling = np.full(shape, np.nan)
        if own["a"] is not None and own["b"] is not None:
            ceiling = geometric_ceiling(own["a"][..., rows], own["b"][..., columns])
        found = {
            "similarity": _mean(self.cross)[..., rows, columns],
            "floor": _mean(self.floor)[..., rows, columns] if self.floor else np.full(shape, np.nan),
            "ceiling": ceiling,
        }
        if pairs is not None:
            found = {name: values.mean(-1) for name, values in found.items()}
        return found | {"u": position(*found.values(), distance=self.distance)}

    def per_network_pair(self, pairs: Pairs | None = None) -> np.ndarray:
        """(network pairs, …) of trained against trained: cells, or means over pairs of sites."""
        rows, columns = self._cells(pairs)
        values = np.stack([plane[..., rows, columns] for plane in self.cross.values()])
        return values if pairs is None else values.mean(-1)

    def _cells(self, pairs: Pairs | None) -> tuple[np.ndarray, np.ndarray]:
        if pairs is None:
            return np.arange(len(self.rows))[:, None], np.arange(len(self.columns))[None, :]
        places = [(self.rows.index(a), self.columns.index(b)) for a, b in pairs]
        return tuple(np.array(places, dtype=int).reshape(-1, 2).T)

    def _own(self, side: str) -> np.ndarray | None:
        """(…, sites) seed-to-seed similarity of each site with itself, averaged over the pairs of seeds."""
        planes = getattr(self, f"own_{side}")
        return np.diagonal(_mean(planes), axis1=-2, axis2=-1) if planes else None


def _mean(planes: Mapping[Seeds, np.ndarray]) -> np.ndarray:
    return np.mean(list(planes.values()), axis=0)


def matched_depth_pairs(A: Recording, B: Recording) -> list[tuple[str, str]]:
    """For every site of A the site of B at the nearest relative depth (rank among the sites / their number − 1).

    A rule fixed before looking: no pair is chosen for being similar. Ties go to the earlier site.
    """
    last_a, last_b = (max(len(recording.names) - 1, 1) for recording in (A, B))
    # i / last_a against j / last_b, in whole numbers: rounding would break ties either way
    rows, columns = np.arange(len(A.names)) * last_b, np.arange(len(B.names)) * last_a
    nearest = np.abs(rows[:, None] - columns[None, :]).argmin(1)
    return [(name, B.names[j]) for name, j in zip(A.names, nearest)]


def geometric_ceiling(own_a, own_b):
    """√(s_AA′ · s_BB′): what two architectures would share if they differed no more than two seeds of each do.

    For numbers or arrays. NaN when either seed-to-seed similarity is not positive: then there is no ceiling.
    """
    own_a, own_b = np.broadcast_arrays(np.asarray(own_a, float), np.asarray(own_b, float))
    ceiling = np.full(own_a.shape, np.nan)
    there = (own_a > 0) & (own_b > 0)
    ceiling[there] = np.sqrt(own_a[there] * own_b[there])
    return ceiling if ceiling.ndim else float(ceiling)


def position(similarity, floor, ceiling, *, distance: bool = False):
    """u = (s − floor) / (ceiling − floor): 0 is untrained, 1 is another seed; for numbers, arrays or Series.

    NaN where the ceiling is not above the floor (of a distance: not below): then there is no scale to place s on.
    """
    room = np.asarray(ceiling - floor, dtype=float)
    u = np.full(room.shape, np.nan)
    there = room < 0 if distance else room > 0
    np.divide(np.asarray(similarity - floor, dtype=float), room, out=u, where=there)
    return pd.Series(u, similarity.index) if isinstance(similarity, pd.Series) else u if u.ndim else float(u)


def word(similarity: float, u: float, null_edge: float, ceiling: float = math.inf, *, distance: bool = False) -> str:
    """The place on the ruler in a word.

    no number (a constant site) / below chance (not beyond the null's 95 % point) / below floor (u < −0.1) / at floor
    (u < 0.1) / partial / at ceiling (u ≥ 0.9) / above ceiling (u > 1.1)
    """
    if math.isnan(similarity):
        return "no number"
    if similarity >= null_edge if distance else similarity <= null_edge:
        return "below chance"
    if math.isnan(u):
        if math.isnan(ceiling):
            return "no scale: no ceiling"
        return f"no scale: the ceiling is not {'below' if distance else 'above'} the floor"
    if u < 0.1:
        return "below floor" if u < -0.1 else "at floor"
    return "partial" if u < 0.9 else "at ceiling" if u <= 1.1 else "above ceiling"


# -------------------------------------------------------------------------------------------------------- uncertainty


@dataclass(frozen=True)
class Resamples:
    """The same comparison on subsamples of the images: planes (resamples, rows, columns), of `taken` among `images`."""

    comparison: Comparison
    images: int
    taken: int


def with_intervals(
    observed: Comparison, resamples: Resamples, pairs: Pairs | None = None, *, level: float = 0.95
) -> dict[str, np.ndarray]:
    """`scale`, and for each of its quantities `…_image_se` (images alone), `…_se`, `…_low` and `…_high`.

    Over images by the delete-d jackknife. Where an architecture has three seeds or more, the jackknife over its seeds
    adds their variance (with two, leaving one out leaves no ceiling: the interval is over images only, for these
    networks), and Student's t takes the place of the normal distribution. A u whose scale vanished in a resample has no
    interval.
    """
    found = observed.scale(pairs)
    again = resamples.comparison.scale(pairs)
    left_out = {
        side: [observed.without(side, seed).scale(pairs) for seed in observed.seeds(side)]
        for side in "ab"
        if len(observed.seeds(side)) > 2
    }
    table = dict(found)
    for name in QUANTITIES:
        se = intervals.standard_error(again[name], resamples.images, resamples.taken)
        variances = [intervals.seed_variance([each[name] for each in values]) for values in left_out.values()]
        counts = [len(values) for values in left_out.values()]
        table[f"{name}_image_se"] = se
        se, df = intervals.combine(se, variances, counts)
        low, high = intervals.interval(found[name], se, df=df, level=level)
        table |= {f"{name}_se": se, f"{name}_low": low, f"{name}_high": high}
    return table


def ruler_table(observed: Comparison, resamples: Resamples | None = None) -> pd.DataFrame:
    """One row a site pair: similarity, range over pairs of networks (low, high), floor, ceiling, u, start.

    With resamples also the intervals of `with_intervals`.
    """
    each = observed.per_network_pair()
    columns = {
        "site_a": np.repeat(observed.rows, len(observed.columns)),
        "site_b": np.tile(observed.columns, len(observed.rows)),
    }
    values = observed.scale() if resamples is None else with_intervals(observed, resamples)
    values |= {"low": each.min(0), "high": each.max(0)}
    values["start"] = _mean(observed.start) if observed.start else np.full(each.shape[1:], np.nan)
    return pd.DataFrame(columns | {name: np.ravel(value) for name, value in values.items()})
