"""The cells of a plane: how all pairs of two sets of matrices are computed, each site's work done once.

Linear CKA, RBF-CKA and RSA go through packed Gram matrices (`grams`) or, where rows are many, feature space
(`moments`); the other measures through what `measures.MEASURES` says each side prepares. Everything here takes
{site: (rows, features)} of A and of B, the same dictionary twice for A with itself, and returns (values, notes).
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from similarity import grams, measures, memory, moments
from similarity.inputs import FewImages, NotComputable, as_matrix
from similarity.measures import Measure

LONG_WORK = 1e9  # multiply-adds; shorter planes are computed in float64, where float32 would save little


def compute(known: Measure, left: dict[str, Tensor], right: dict[str, Tensor], options: dict):
    """(values, notes) of a measure of ours, by the cheapest exact way."""
    if known.name == "linear_cka":
        return _linear_plane(left, right, **options)
    if known.name == "rbf_cka":
        return rbf_planes(left, right, options)[0]
    if known.name == "rsa" and known.gram:
        return _rsa_plane(left, right, **options)
    return _shared(known, left, right, options)


# ------------------------------------------------------------------------------------------- planes by Gram matrices


def _linear_plane(left: dict[str, Tensor], right: dict[str, Tensor], debiased: bool = True):
    if moments.are_cheaper(left, right):
        _say_once(moments.explain_choice(left, right))
        return _moments_plane(left, right, debiased)

    def sides(dtype: torch.dtype):
        return [grams.linear(sites, debiased, dtype) for sites in _distinct(left, right)]

    return _cka_cells(left, right, *_twice(_precisely(sides, left, right)))


def _moments_plane(left: dict[str, Tensor], right: dict[str, Tensor], debiased: bool):
    """In feature space: all pairs in one pass over the rows, or pair by pair where that holds less in memory."""
    widths = [sum(X.shape[1] for X in side.values()) for side in (left, right)]
    if widths[0] * widths[1] > len(next(iter(left.values()))) * sum(widths):
        return _pair_by_pair(
            lambda X, side: moments.FeatureSide(X, side, debiased), moments.FeatureSide.cka, left, right, symmetric=True
        )
    checked = [prepare_all(moments.checked, side) for side in _distinct(left, right)]
    (x, notes), (y, other_notes) = _twice(checked)
    if not x or not y:
        return _spread(left, right, [], [], np.empty((0, 0)), notes, other_notes)
    sums = moments.Moments()
    sums.update_checked(*(usable for usable, _ in checked))
    values, (more, other_more) = sums.cka(debiased=debiased)
    return _spread(left, right, list(x), list(y), values, notes | more, other_notes | other_more)


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def rbf_planes(left: dict[str, Tensor], right: dict[str, Tensor], options: dict) -> list:
    """One (values, notes) for each fraction, from the same distances."""
    fraction, debiased = options.get("fraction", 1.0), options.get("debiased", True)
    fractions = list(fraction) if measures.is_several(fraction) else [fraction]

    def sides(dtype: torch.dtype):
        return [grams.rbf(sites, fractions, debiased, dtype) for sites in _distinct(left, right)]

    one, other = _twice(_precisely(sides, left, right, copies=len(fractions)))
    return [_cka_cells(left, right, x, y) for x, y in zip(one, other)]


def _cka_cells(left: dict, right: dict, one: tuple, other: tuple):
    (x, names, notes), (y, other_names, other_notes) = one, other
    values = grams.cka(x, y) if names and other_names else np.empty((0, 0))
    return _spread(left, right, names, other_names, values, notes, other_notes)


def _rsa_plane(left: dict[str, Tensor], right: dict[str, Tensor], rdm: str = "correlation", compare: str = "spearman"):
    dtype = _precision(left, right)
    _refuse_too_large(left, right, dtype)
    sides = [grams.profiles(sites, rdm, compare, dtype) for sites in _distinct(left, right)]
    (x, names, notes), (y, other_names, other_notes) = _twice(sides)
    values = np.empty((0, 0)) if x is None or y is None else grams.products(x, y).cpu().numpy()
    return _spread(left, right, names, other_names, values, notes, other_notes)


def _precisely(sides: Callable, left: dict[str, Tensor], right: dict[str, Tensor], copies: int = 1) -> list:
    """Packed Grams in the features' precision, in float64 where float32 would lose digits."""
    dtype = _precision(left, right)
    _refuse_too_large(left, right, dtype, copies)
    try:
        return sides(dtype)
    except grams.NeedsDouble:
        _refuse_too_large(left, right, torch.float64, copies)
        return sides(torch.float64)


def _precision(left: dict[str, Tensor], right: dict[str, Tensor]) -> torch.dtype:
    """float32 where the features have no more digits and the work is long enough for it to matter."""
    tensors = [X for side in _distinct(left, right) for X in side.values()]
    wide = any(X.dtype not in (torch.float32, torch.float16, torch.bfloat16) for X in tensors)
    short = sum(len(X) ** 2 * X.shape[1] for X in tensors) < LONG_WORK
    return torch.float64 if wide or short else torch.float32


def _refuse_too_large(left: dict[str, Tensor], right: dict[str, Tensor], dtype: torch.dtype, copies: int = 1) -> None:
    first = next(iter(left.values()))
    sites = sum(len(side) for side in _distinct(left, right))
    memory.refuse_more_than_available(
        copies * sites * grams.Layout(len(first)).size * dtype.itemsize,
        f"a plane of {sites} sites × {len(first)} rows",
        "select(ids=…) fewer images, fewer sites, or a policy with fewer rows",
        first.device,
    )


def _distinct(left: dict, right: dict) -> list[dict]:
    return [left] if right is left else [left, right]


def _twice(sides: list) -> list:
    return sides * 2 if len(sides) == 1 else sides


def _spread(left: dict, right: dict, rows: list, columns: list, cells: np.ndarray, row_notes: dict, column_notes: dict):
    """Cells of the sites that allow a number in the plane of all; (values, notes)."""
    values = np.full((len(left), len(right)), np.nan)
    if rows and columns:
        values[np.ix_([list(left).index(a) for a in rows], [list(right).index(b) for b in columns])] = cells
    return values, notes_of_cells(left, right, row_notes, column_notes)


def notes_of_cells(left: dict, right: dict, row_notes: dict, column_notes: dict) -> dict[tuple[str, str], str]:
    """A note for every cell of a site that allows no number."""
    return {
        (a, b): row_notes.get(a) or column_notes[b] for a in left for b in right if a in row_notes or b in column_notes
    }


# -------------------------------------------------------------------------------------------- planes by prepared sides


def _shared(known: Measure, left: dict[str, Tensor], right: dict[str, Tensor], options: dict):
    """Prepare each site once, then combine all pairs: together where that shares work, else one by one."""
    prepare = _preparation(known, options)
    if known.together is None:
        return _pair_by_pair(prepare, known.combine, left, right, known.symmetric)
    x, row_notes = prepare_all(prepare, left)
    y, column_notes = (x, row_notes) if right is left else prepare_all(prepare, right)
    cells = known.together(list(x.values()), list(y.values())) if x and y else np.empty((0, 0))
    return _spread(left, right, list(x), list(y), cells, row_notes, column_notes)


def _pair_by_pair(prepare: Callable, combine: Callable, left: dict, right: dict, symmetric: bool):
    x, row_notes = prepare_all(prepare, left)
    y, column_notes = (x, row_notes) if right is left else prepare_all(prepare, right)
    values = pd.DataFrame(np.nan, index=list(left), columns=list(right))
    notes = notes_of_cells(left, right, row_notes, column_notes)
    done = set()
    for a, b in itertools.product(x, y):
        if right is left and symmetric and (b, a) in done:
            values.loc[a, b], note = values.loc[b, a], notes.get((b, a), "")
        else:
            values.loc[a, b], note = _one_cell(combine, x[a], y[b])
        notes |= {(a, b): note} if note else {}
        done.add((a, b))
    return values.to_numpy(), notes


def _one_cell(combine: Callable, x, y) -> tuple[float, str]:
    """(value or NaN, what to know of it)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FewImages)
        try:
            value = combine(x, y)
        except NotComputable as reason:
            return np.nan, str(reason)
    return value, next((str(w.message) for w in caught if issubclass(w.category, FewImages)), "")


def prepare_all(prepare: Callable, sites: dict[str, Tensor]) -> tuple[dict, dict[str, str]]:
    """({site: prepare(X, site)}, {site: why it allows no number})."""
    ready, notes = {}, {}
    for name, X in sites.items():
        try:
            ready[name] = prepare(X, name)
        except NotComputable as reason:
            notes[name] = str(reason)
    return ready, notes


def _preparation(known: Measure, options: dict) -> Callable:
    options = measures.with_defaults(known.name, options)
    return lambda X, side: known.prepare(as_matrix(X, side, None), side=side, **options)


def every_pair(function: Callable, left: dict[str, Tensor], right: dict[str, Tensor], options: dict):
    """The plain route for a measure of the caller's own."""
    values, notes = np.full((len(left), len(right)), np.nan), {}
    for i, (a, X) in enumerate(left.items()):
        for j, (b, Y) in enumerate(right.items()):
            try:
                values[i, j] = function(X, Y, **options)
            except NotComputable as reason:
                notes[a, b] = str(reason)
    return values, notes


# ----------------------------------------------------------------------------------------------- two sides, row by row


@dataclass(frozen=True)
class Route:
    """One pair of sites at a time: what each prepares once, and what makes a number of two of them.

    prepare(X, side) ; combine(left, right) -> float ; permute(prepared, rows) is prepare of the permuted rows
    """

    prepare: Callable
    combine: Callable
    permute: Callable


def pair_route(known: Measure, left: dict[str, Tensor], right: dict[str, Tensor], options: dict) -> Route:
    """For the null: feature space for linear CKA when rows are many, else the measure's own preparation."""
    if known.name == "linear_cka" and moments.are_cheaper(left, right):
        return Route(
            lambda X, side: moments.FeatureSide(X, side, **options),
            moments.FeatureSide.cka,
            moments.FeatureSide.permuted,
        )
    return Route(
        _preparation(known, options),
        known.combine,
        _permute_gram if known.name in ("linear_cka", "rbf_cka", "rsa") else lambda side, rows: side.permuted(rows),
    )


def _permute_gram(K: Tensor, rows: Tensor) -> Tensor:
    return K[rows][:, rows]
