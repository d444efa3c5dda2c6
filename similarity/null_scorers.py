"""How the null of a plane is computed: scorers that give all asked cells for one order of B's rows, cheaply many times.

What a null says is the subject of `nulls`; here is the choice between packed Gram matrices, neighbour tables, feature
space and prepared sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from similarity import measures, memory
from similarity.cells import Route, notes_of_cells, pair_route, prepare_all
from similarity.inputs import NotComputable, as_matrix
from similarity.measures import Measure
from similarity.moments import FeatureSide
from similarity.neighbors import Cloud, row_blocks

PIECE = 16_384  # image pairs gathered at a time: what they hold stays in a core's cache for the product
GATHERING = 10  # gathering a number costs about as much as so many multiply-adds
CALL = 300_000  # and starting the product of a pair in feature space about as much as so many
LONG_WORK = 1e9  # numbers gathered in all; fewer are kept in float64, where float32 would save little
# Nulls within this of the observed value have reached it. float64: as the measures' own sums. float32: Gram matrices
# of unit norm are rounded by 6e-8 of each entry, and Σ|aᵢⱼbᵢⱼ| <= 1 bounds what that does to a product of two by
# 1.2e-7; adding up PIECE products in float32 a few times that. The spread of a null is far larger, ≈ 1/n.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclass(frozen=True)
class Scorer:
    """score(rows) -> (sites of A, sites of B), NaN where there is no number, once B's rows are put in that order."""

    score: Callable[[Tensor], np.ndarray]
    notes: dict[tuple[str, str], str]
    precision: torch.dtype = torch.float64


def scorer(known: Measure, left: dict, right: dict, options: dict, asked: np.ndarray, permutations: int) -> Scorer:
    """The cheapest exact way to all asked cells of many permutations."""
    full = measures.with_defaults(known.name, options)

    def prepare(X: Tensor, side: str):
        return known.prepare(as_matrix(X, side, None), side=side, **full)

    if known.name == "linear_cka" and _feature_space_is_cheaper(left, right, asked):
        route = Route(
            lambda X, side: FeatureSide(X, side, **options), FeatureSide.cka, lambda side, rows: side.permuted(rows)
        )
        return _by_pairs(route, None, left, right, asked)
    if known.gram:
        n = len(next(iter(left.values())))
        long = permutations * n**2 / 2 * len(right) > LONG_WORK
        return _by_grams(prepare, left, right, torch.float32 if long else torch.float64)
    if known.name in ("mutual_knn", "information_imbalance") and _tables_fit(right):
        return _by_neighbors(known.name, full["k"], prepare, left, right)
    route = pair_route(known, left, right, options)
    return _by_pairs(route, known.together if asked.all() else None, left, right, asked)


def _feature_space_is_cheaper(left: dict, right: dict, asked: np.ndarray) -> bool:
    """Multiply-adds a permutation, or whether the Gram matrices do not fit."""
    n, p, q = len(next(iter(left.values()))), *([X.shape[1] for X in side.values()] for side in (left, right))
    by_features = (2 * n * np.outer(p, q) + CALL)[asked].sum()  # float64 is twice as slow
    by_grams = n**2 / 2 * len(right) * (len(left) + GATHERING)
    device = next(iter(left.values())).device
    return by_features < by_grams or _gram_bytes(left, right, torch.float32) > memory.available_bytes(device)


def _gram_bytes(left: dict, right: dict, dtype: torch.dtype) -> int:
    """B's table, half as much for a site of A, the places of pairs, and one float64 Gram matrix in the making."""
    n = len(next(iter(left.values())))
    return n**2 * (dtype.itemsize * (2 * len(right) + len(left)) // 2 + 48)


def _by_grams(prepare: Callable, left: dict, right: dict, dtype: torch.dtype) -> Scorer:
    """Inner products of centred Gram matrices: B's as (n·n, sites), so that one permutation gathers runs of sites.

    Of symmetric matrices the pairs below the diagonal count twice; the diagonal (0 of debiased ones) goes by itself.
    """
    first = next(iter(left.values()))
    n, device = len(first), first.device
    memory.refuse_more_than_available(
        _gram_bytes(left, right, dtype),
        f"the null of {len(left)} × {len(right)} sites × {n} rows",
        "select(ids=…) fewer images, fewer sites, or a policy with fewer rows",
        device,
    )
    i, j = torch.tril_indices(n, n, -1, device=device)
    x, own_x, names, notes = _table(prepare, left, dtype, i * n + j)
    y, own_y, other_names, other_notes = _table(prepare, right, dtype)
    i, j = i.int(), j.int()
    room = torch.empty(PIECE, len(other_names), dtype=dtype, device=device)

    def score(rows: Tensor) -> np.ndarray:
        total, starts = own_x.T @ own_y[rows], rows * n
        for start in range(0, len(i), PIECE):
            some = slice(start, start + PIECE)
            places = starts.index_select(0, i[some]) + rows.index_select(0, j[some])
            moved = torch.index_select(y, 0, places, out=room[: len(places)])
            total += 2 * (x[some].T @ moved)
        return _spread(left, right, names, other_names, total)

    return Scorer(score, notes_of_cells(left, right, notes, other_notes), dtype)


def _table(prepare: Callable, sites: dict, dtype: torch.dtype, places: Tensor | None = None):
    """(entries (n·n or as many as places, usable sites), diagonals (n, usable sites) float64, their names, notes).

    prepare(X, side) -> (n, n); one such matrix is held at a time.
    """
    first, filled = next(iter(sites.values())), itertools.count()
    n = len(first)
    entries = torch.empty(n * n if places is None else len(places), len(sites), dtype=dtype, device=first.device)
    own = torch.empty(n, len(sites), dtype=torch.float64, device=first.device)

    def fill(X: Tensor, side: str) -> None:
        K = prepare(X, side)
        column = next(filled)
        entries[:, column] = K.flatten() if places is None else K.flatten()[places]
        own[:, column] = K.diagonal()

    usable, notes = prepare_all(fill, sites)
    return entries[:, : len(usable)].contiguous(), own[:, : len(usable)], list(usable), notes


def _spread(left: dict, right: dict, names: list[str], other_names: list[str], cells: Tensor) -> np.ndarray:
    """Cells of the usable sites among all."""
    values = np.full((len(left), len(right)), np.nan)
    values[np.ix_([a in names for a in left], [b in other_names for b in right])] = cells.cpu().numpy()
    return values


def _tables_fit(right: dict) -> bool:
    first = next(iter(right.values()))
    return len(first) ** 2 * 8 * (len(right) + 4) <= memory.available_bytes(first.device)


def _by_neighbors(name: str, k: int, prepare: Callable, left: dict, right: dict) -> Scorer:
    """The neighbours of A's images looked up in B's (n·n, sites) table: of ranks, or of neighbours' weights."""
    first = next(iter(left.values()))
    n, ranked = len(first), name == "information_imbalance"
    x, notes = prepare_all(lambda X, side: prepare(X, side).nearest, left)
    x = {a: [torch.as_tensor(part, device=first.device) for part in (near.index, near.weight)] for a, near in x.items()}
    tabled, dtype = (_ranks, torch.float32) if ranked else (_weights, torch.float64)  # (half) ranks are exact
    table, _, other_names, other_notes = _table(lambda X, side: tabled(prepare(X, side)), right, dtype)

    def score(rows: Tensor) -> np.ndarray:
        cells = torch.empty(len(x), len(other_names), dtype=torch.float64)
        for place, (index, weight) in enumerate(x.values()):
            found = table.index_select(0, (rows[:, None] * n + rows[index]).flatten()).double()
            weight = weight.reshape(-1, 1)
            each = 2 / n * weight * found if ranked else torch.minimum(weight, found)
            cells[place] = each.sum(0) / (n * k)
        return _spread(left, right, list(x), other_names, cells)

    return Scorer(score, notes_of_cells(left, right, notes, other_notes))


def _ranks(side: Cloud) -> Tensor:
    """(n, n): rank of image j among the neighbours of image i, 1 the nearest, ties averaged, itself the last."""
    blocks = [rankdata(side.distances(rows).cpu().numpy(), axis=1) for rows in row_blocks(len(side.X))]
    return torch.as_tensor(np.concatenate(blocks))


def _weights(side: Cloud) -> Tensor:
    """(n, n): how far image j belongs to the k nearest neighbours of image i."""
    return torch.as_tensor(side.graph.toarray())


def _by_pairs(route: Route, together: Callable | None, left: dict, right: dict, asked: np.ndarray) -> Scorer:
    """Prepared sides, pair by pair or all together where that shares work."""
    x, notes = prepare_all(route.prepare, left)
    y, other_notes = (x, notes) if right is left else prepare_all(route.prepare, right)
    notes = notes_of_cells(left, right, notes, other_notes)
    places = [(i, a, j, b) for i, a in enumerate(left) for j, b in enumerate(right) if asked[i, j]]
    places = [place for place in places if place[1] in x and place[3] in y]

    def score(rows: Tensor) -> np.ndarray:
        moved = {b: route.permute(side, rows) for b, side in y.items()}
        if together is not None and x and y:
            return _spread(left, right, list(x), list(y), torch.as_tensor(together([*x.values()], [*moved.values()])))
        values = np.full((len(left), len(right)), np.nan)
        for i, a, j, b in places:
            try:
                values[i, j] = route.combine(x[a], moved[b])
            except NotComputable as reason:
                notes[a, b] = str(reason)
        return values

    return Scorer(score, notes)


def one_measure(measure: str, options: dict) -> Measure:
    if measures.is_several(options.get("fraction", 1.0)):
        raise ValueError(f"a null is of one measure: give one fraction at a time, not {options['fraction']}")
    return measures.lookup(measure, options)
