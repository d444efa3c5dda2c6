"""The ruler: what a similarity is worth beside chance, beside another seed, and beside no training at all.

A similarity between two models is reported with its null (images of one side permuted), its ceiling (the same
architecture from another seed) and its floor (the untrained twins). See SCIENCE, section 4, for the definitions.
"""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pandas as pd
import torch

from similarity.cells import pair_route, prepare_all
from similarity.measures import FewImages, NotComputable, lookup
from similarity.plane import Plane, complete, match_rows, matrices, rows_an_image
from similarity.recording import Recording


def matched_depth_pairs(A: Recording, B: Recording) -> list[tuple[str, str]]:
    """For every site of A the site of B at the nearest relative depth (rank among the sites / their number − 1).

    A rule fixed before looking: no pair is chosen for being similar. Ties go to the earlier site.
    """

    last_a, last_b = (max(len(recording.names) - 1, 1) for recording in (A, B))
    # i / last_a against j / last_b, in whole numbers: rounding would break ties either way
    rows, columns = np.arange(len(A.names)) * last_b, np.arange(len(B.names)) * last_a
    nearest = np.abs(rows[:, None] - columns[None, :]).argmin(1)
    return [(name, B.names[j]) for name, j in zip(A.names, nearest)]


def geometric_ceiling(own_a: float, own_b: float) -> float:
    """√(s_AA′ · s_BB′): what two architectures would share if they differed no more than two seeds of each do.

    NaN when either seed-to-seed similarity is not positive: then there is no ceiling to speak of.
    """
    return math.sqrt(own_a * own_b) if own_a > 0 and own_b > 0 else math.nan


def ruler_table(cross: list[Plane], own_a: list[Plane], own_b: list[Plane], floor: list[Plane]) -> pd.DataFrame:
    """One row a site pair: similarity, low, high, ceiling, floor, u.

    cross : planes A_s × B_t over all pairs of seeds; similarity is their mean, low and high their range
    own_a, own_b : planes between two seeds of the same architecture; an empty list leaves the ceiling NaN
    floor : planes between untrained twins; an empty list leaves the floor NaN
    """
    values = np.stack([p.values for p in cross])
    similarity = values.mean(0)
    seeds_a, seeds_b = (
        _diagonal(planes, len(axis)) for planes, axis in ((own_a, cross[0].rows), (own_b, cross[0].columns))
    )
    ceiling = np.array([[geometric_ceiling(a, b) for b in seeds_b] for a in seeds_a])
    ground = np.stack([p.values for p in floor]).mean(0) if floor else np.full_like(similarity, np.nan)
    table = cross[0].tidy().drop(columns=["value"])
    for name, column in {
        "similarity": similarity,
        "low": values.min(0),
        "high": values.max(0),
        "ceiling": ceiling,
        "floor": ground,
    }.items():
        table[name] = column.ravel()
    table["u"] = position(table["similarity"], table["floor"], table["ceiling"])
    return table


def mean_over(plane: Plane, pairs: list[tuple[str, str]]) -> float:
    """Mean similarity over the given site pairs."""
    row, column = ({name: i for i, name in enumerate(names)} for names in (plane.rows, plane.columns))
    return float(np.mean([plane.values[row[a], column[b]] for a, b in pairs]))


def _diagonal(planes: list[Plane], count: int) -> np.ndarray:
    """Seed-to-seed similarity of each site with itself, averaged over the pairs of seeds."""
    return np.stack([np.diag(p.values) for p in planes]).mean(0) if planes else np.full(count, np.nan)


def position(similarity, floor, ceiling):
    """u = (s − floor) / (ceiling − floor): 0 is untrained, 1 is another seed; for numbers or Series.

    NaN where the ceiling is not above the floor: then there is no scale to place s on.
    """
    room = np.asarray(ceiling - floor, dtype=float)
    u = np.full(room.shape, np.nan)
    np.divide(np.asarray(similarity - floor, dtype=float), room, out=u, where=room > 0)
    return pd.Series(u, similarity.index) if isinstance(similarity, pd.Series) else float(u)


def word(similarity: float, u: float, null_high: float) -> str:
    """The place on the ruler in a word.

    below chance (not above the null's 95 % point) / below floor (u < −0.1) / at floor (u < 0.1) / partial / at ceiling
    (u ≥ 0.9) / above ceiling (u > 1.1)
    """
    if similarity <= null_high:
        return "below chance"
    if math.isnan(u):
        return "no scale: the ceiling is not above the floor"
    if u < 0.1:
        return "below floor" if u < -0.1 else "at floor"
    return "partial" if u < 0.9 else "at ceiling" if u <= 1.1 else "above ceiling"


def permutation_null(
    measure: str,
    A: Recording,
    B: Recording,
    pairs: list[tuple[str, str]],
    *,
    permutations: int = 200,
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """Null of each pair and of their mean: the images of B are permuted, one permutation for all pairs.

    Returns one row a pair and a last one ('mean', 'mean'): observed, null_mean, null_high (95 % point), p_value =
    (1 + #{null ≥ observed}) / (1 + permutations); of a distance, small values count: null_high is the 5 % point and
    p_value counts null ≤ observed. Policies with several rows an image permute whole images.
    Pairs with a site on which the measure cannot be computed are left out of the mean and NaN in the table.
    """
    B = match_rows(A, B)
    known = lookup(measure, options)
    options = complete(measure, options, A)
    X, Y = matrices(_only(A, {a for a, _ in pairs})), matrices(_only(B, {b for _, b in pairs}))
    route = pair_route(known, X, Y, options)
    left, right = prepare_all(route.prepare, X)[0], prepare_all(route.prepare, Y)[0]
    usable = [(a, b) for a, b in pairs if a in left and b in right]
    if not usable:
        raise NotComputable(f"no pair of sites allows {measure}")
    generator = np.random.default_rng(seed)
    positions = rows_an_image(A)

    def scores(order: np.ndarray) -> np.ndarray:
        rows = torch.as_tensor((order[:, None] * positions + np.arange(positions)).ravel())
        permuted = {name: route.permute(side, rows) for name, side in right.items()}
        each = np.array([route.combine(left[a], permuted[b]) for a, b in usable])
        return np.append(each, each.mean())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImages)  # said once, when the observed plane was made
        observed = scores(np.arange(len(A)))
        null = np.stack([scores(generator.permutation(len(A))) for _ in range(permutations)])
    keys = pd.MultiIndex.from_tuples([*usable, ("mean", "mean")], names=["site_a", "site_b"])
    # equality up to rounding counts as reaching the observed value
    reached = null <= observed + 1e-12 if known.distance else null >= observed - 1e-12
    columns = {
        "observed": observed,
        "null_mean": null.mean(0),
        "null_high": np.quantile(null, 0.05 if known.distance else 0.95, axis=0),
        "p_value": (1 + reached.sum(0)) / (1 + permutations),
    }
    return pd.DataFrame(columns, index=keys).reindex([*pairs, ("mean", "mean")]).reset_index()


def _only(recording: Recording, names: set[str]) -> Recording:
    return dataclasses.replace(recording, sites=[site for site in recording.sites if site.name in names])
