"""Are two networks most alike at the same depth? Planes of information imbalance over all sites of both, and tests.

From two recordings of the same images: Δ(A→B) and Δ(B→A) (Glielmo et al. 2022) of every site of A with every site of
B, debiased linear CKA and mutual kNN beside them; how far from its own relative depth each site finds its best match,
against shuffled orders of the sites. How unlike the networks are at matched depth, with intervals over images, is the
subject of `matched_depth`; how one network changes from site to site that of `smoothness`. This room records nothing
and draws nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from similarity import Recording, plane
from similarity.factors import item_orders
from similarity.plane import match_rows
from utils import InputError, pick

IMBALANCE = "information_imbalance"
# value -> whether small numbers mean alike; 'both' is the mean of the two directions, made where it is asked for
VALUES = {"a_to_b": True, "b_to_a": True, "both": True, "linear_cka": False, "mutual_knn": False}
PAIR = ["site_a", "site_b", "depth_a", "depth_b"]
TIED = 1e-12  # values, depths and sums of distances this near to each other are the same, up to rounding
Depths = Mapping[str, float]


# ----------------------------------------------------------------------------------------------------------- the planes


def relative_depths(recording: Recording, given: Depths | None = None) -> dict[str, float]:
    """{site: relative depth in (0, 1]} in execution order: place among the sites / their number, unless given.

    The last site is at 1, and a network of which only every second site is recorded, the last among them, keeps the
    depths of those. Where sites are no even sample of the depth, give their depths, such as block / blocks.
    """
    names = recording.names
    if given is None:
        return {name: (place + 1) / len(names) for place, name in enumerate(names)}
    depths = {name: float(pick("site with a given depth", name, given)) for name in names}
    for name, depth in depths.items():
        if not 0 < depth <= 1:
            raise InputError(f"the depth of site {name!r} is {depth:g}; relative depths are above 0 and at most 1")
    return depths


def imbalance_planes(
    A: Recording,
    B: Recording,
    k: int = 1,
    *,
    depths_a: Depths | None = None,
    depths_b: Depths | None = None,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """Information imbalance of every site of A with every site of B, both ways; one row a pair of sites.

    Columns site_a, site_b, depth_a, depth_b (relative, see `relative_depths`), a_to_b = Δ(A→B), small where
    neighbours in A tell those in B, b_to_a, k, n_images, and note (why a pair has no number). (k + 1)/n is complete, 1
    no information. Rows are matched by image id. Every site's distances are made and ordered once for both directions:
    1,000,000 of them a site are held at a time. device : where to compute; default: where the features are.
    """
    table = _pairs(relative_depths(A, depths_a), relative_depths(B, depths_b))
    made, count = plane(IMBALANCE, joined({"A": A, "B": B}), device=device, k=k), len(A.names)
    table["a_to_b"] = made.values[:count, count:].ravel()
    table["b_to_a"] = made.values[count:, :count].T.ravel()
    notes = [made.notes.get((a, b), "") for a in made.rows[:count] for b in made.rows[count:]]
    return table.assign(k=k, n_images=made.n_images, note=notes)


def similarity_planes(
    A: Recording,
    B: Recording,
    k: int = 1,
    *,
    neighbours: int = 10,
    depths_a: Depths | None = None,
    depths_b: Depths | None = None,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """`imbalance_planes` with columns linear_cka (debiased) and mutual_knn (of so many neighbours) beside them."""
    table = imbalance_planes(A, B, k, depths_a=depths_a, depths_b=depths_b, device=device)
    table["linear_cka"] = plane("linear_cka", A, B, device=device).values.ravel()
    table["mutual_knn"] = plane("mutual_knn", A, B, device=device, k=neighbours).values.ravel()
    return table.assign(neighbours=neighbours)


def _pairs(depth_a: Depths, depth_b: Depths) -> pd.DataFrame:
    rows = [(a, b, depth_a[a], depth_b[b]) for a in depth_a for b in depth_b]
    return pd.DataFrame(rows, columns=PAIR)


def joined(recordings: Mapping[str, Recording]) -> Recording:
    """The sites of several networks in one recording, `network/site`, with the first one's rows.

    A plane of it with itself makes each site's distances once.
    """
    first, sites, features = next(iter(recordings.values())), [], {}
    for network, recording in recordings.items():
        recording = match_rows(first, recording)
        for site in recording.sites:
            sites.append(dataclasses.replace(site, name=f"{network}/{site.name}"))
            features[sites[-1].name] = recording[site.name]
    hashes = "+".join(recording.model_hash for recording in recordings.values())
    return Recording(features, first.ids, sites, first.policy, hashes, first.data_hash, first.image_hashes)


# ----------------------------------------------------------------------------------------------- one value of the plane


@dataclass(frozen=True)
class Grid:
    """One value over sites of A × sites of B, turned so that small means alike; sites without a number left out."""

    sites_a: list[str]
    depth_a: np.ndarray
    sites_b: list[str]
    depth_b: np.ndarray
    values: np.ndarray
    left_out: list[str]

    @property
    def apart(self) -> np.ndarray:
        """|depth of A's site − depth of B's site|, (sites of A, sites of B)."""
        return np.abs(self.depth_a[:, None] - self.depth_b[None, :])

    def best(self, axis: int) -> np.ndarray:
        """Share of being the best match: over B for each site of A (axis 1), over A for each of B (axis 0)."""
        return _shares(self.values, axis)

    def matched(self) -> np.ndarray:
        """(sites of A, sites of B) of bool: is one the nearest in depth to the other? Ties go to the earlier site."""
        apart, matched = np.round(self.apart, 12), np.zeros(self.values.shape, dtype=bool)
        matched[np.arange(len(apart)), apart.argmin(1)] = True
        matched[apart.argmin(0), np.arange(apart.shape[1])] = True
        return matched


def _shares(values: np.ndarray, axis: int) -> np.ndarray:
    """1 at the smallest value along an axis; ties share it. NaN where a value is NaN."""
    best = values <= values.min(axis, keepdims=True) + TIED
    there = best.sum(axis, keepdims=True)
    return np.divide(best, there, out=np.full(values.shape, np.nan), where=there > 0)


def grid(planes: pd.DataFrame, value: str = "both") -> Grid:
    """One value of a table of planes (see `VALUES`), in the order of its sites."""
    small = pick("value of a plane", value, VALUES)
    columns = ["a_to_b", "b_to_a"] if value == "both" else [value]
    missing = [column for column in [*PAIR, *columns] if column not in planes]
    if missing:
        raise InputError(f"the table of planes has no column {missing[0]!r}; make it with imbalance_planes")
    sites_a, sites_b = (list(pd.unique(planes[name])) for name in ("site_a", "site_b"))
    if len(planes) != len(sites_a) * len(sites_b) or planes.duplicated(["site_a", "site_b"]).any():
        raise InputError(f"{len(planes)} rows are not every pair of {len(sites_a)} × {len(sites_b)} sites once")
    depth_a, depth_b = (planes.groupby(f"site_{side}", sort=False)[f"depth_{side}"].first() for side in "ab")
    means = planes.assign(value=planes[columns].mean(axis=1, skipna=False))
    values = means.pivot(index="site_a", columns="site_b", values="value").loc[sites_a, sites_b].to_numpy(float)
    here_a, here_b = ~np.isnan(values).all(1), ~np.isnan(values).all(0)
    if not here_a.any():
        raise InputError(f"no pair of sites has a number for {value!r}; the column `note` says why")
    return Grid(
        list(itertools.compress(sites_a, here_a)),
        depth_a.to_numpy(float)[here_a],
        list(itertools.compress(sites_b, here_b)),
        depth_b.to_numpy(float)[here_b],
        (values if small else -values)[np.ix_(here_a, here_b)],
        [f"A {site}" for site in itertools.compress(sites_a, ~here_a)]
        + [f"B {site}" for site in itertools.compress(sites_b, ~here_b)],
    )


# ------------------------------------------------------------------------------------ is the best match at equal depth?


def best_matches(planes: pd.DataFrame, value: str = "both") -> pd.DataFrame:
    """For every site of both models its best match in the other: model ('a', 'b'), site, depth, match, distance.

    match : the best site, several joined by ' | ' where they tie; match_depth and distance (|depth − match_depth|)
    are means over these; value : what it scores
    """
    one, rows = grid(planes, value), []
    sides = {
        "a": (one.sites_a, one.depth_a, one.sites_b, one.depth_b, one.best(1), one.apart, one.values),
        "b": (one.sites_b, one.depth_b, one.sites_a, one.depth_a, one.best(0).T, one.apart.T, one.values.T),
    }
    sign = 1 if VALUES[value] else -1
    for model, (sites, depths, others, other_depths, best, apart, values) in sides.items():
        for place, site in enumerate(sites):
            row = {"model": model, "site": site, "depth": depths[place]}
            row["match"] = " | ".join(other for other, share in zip(others, best[place]) if share > 0)
            row |= {"match_depth": best[place] @ other_depths, "distance": best[place] @ apart[place]}
            rows.append(row | {"value": sign * values[place].min()})
    return pd.DataFrame(rows)


def depth_test(planes: pd.DataFrame, *, permutations: int = 9999, seed: int = 0) -> pd.DataFrame:
    """Is the best match at the same relative depth? One row for each value in the table; 'both' is the one to read.

    distance : mean of |own depth − depth of the best match| over the sites of A, averaged with that over the sites of
        B. One direction alone is ambiguous: Δ(A→B) is smallest towards the B that has least to tell. 'both' takes the
        best match by the mean of the two directions.
    smallest : what it would be, were each site's best match the one nearest in depth
    chance, null_low : its mean and its lower 5 % point where the order of the sites means nothing
    p_shuffled_b : share of the orders of B's sites, A's kept, with a distance as small: all orders of at most 7 sites
        (`exact`), else (1 + #)/(1 + permutations); p_shuffled_a the same of A's; p : the larger, so that it holds
        where either order means nothing; p_smallest : no data can give less
    left_out : sites that have no number
    reversed : the distance, were B run backwards
    Sites next to each other are alike in most networks, and shuffled ones are not. So a small p says that order carries
    over, not that every site is matched by itself; and where both networks change smoothly but are unrelated, p below
    0.05 comes more often than one time in twenty: read it beside `reversed`, which is then as likely to be the smaller.
    """
    if permutations < 1:
        raise InputError(f"permutations must be at least 1, got {permutations}")
    values = [name for name in VALUES if name in planes or name == "both"]
    return pd.DataFrame([{"value": name} | _test(grid(planes, name), permutations, seed) for name in values])


def weights_of(one: Grid) -> np.ndarray:
    """Weight of each pair in the mean distance of best matches, (sites of A, sites of B); sums to 1."""
    return (one.best(1) / len(one.sites_a) + one.best(0) / len(one.sites_b)) / 2


def _test(one: Grid, permutations: int, seed: int) -> dict:
    weights, apart = weights_of(one), one.apart
    # [site, depth it is given]: what a site adds to the distance when it takes another's place
    found = {"b": weights.T @ apart, "a": weights @ apart.T}
    orders = {side: item_orders(len(cost), permutations, seed) for side, cost in found.items()}
    null = {side: cost[np.arange(len(cost)), orders[side][0]].sum(1) for side, cost in found.items()}
    p = {side: float((sums <= sums[0] + TIED).mean()) for side, sums in null.items()}
    backwards = np.argsort(np.argsort(-one.depth_b, kind="stable"), kind="stable")
    return {
        "sites_a": len(one.sites_a),
        "sites_b": len(one.sites_b),
        "distance": (weights * apart).sum(),
        "smallest": (apart.min(1).mean() + apart.min(0).mean()) / 2,
        "chance": np.mean([sums.mean() for sums in null.values()]),
        "null_low": min(np.quantile(sums, 0.05) for sums in null.values()),
        "reversed": (weights * np.abs(one.depth_a[:, None] - np.sort(one.depth_b)[backwards])).sum(),
        "p": max(p.values()),
        "p_shuffled_a": p["a"],
        "p_shuffled_b": p["b"],
        "p_smallest": 1 / min(len(sums) for sums in null.values()),
        "exact": all(exact for _, exact in orders.values()),
        "left_out": ", ".join(one.left_out),
    }
