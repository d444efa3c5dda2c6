"""Planes on many subsets of the images: what recordings share is prepared once a subset, whatever planes use it.

Which subsets, and what the spread over them says, is the subject of `intervals`.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from similarity import grams, memory, moments
from similarity.cells import LONG_WORK, pair_route, prepare_all
from similarity.inputs import SMALLEST_N, FewImages, NotComputable, as_matrix
from similarity.measures import Measure, is_several, lookup, with_defaults
from similarity.plane import complete, match_rows, matrices, rows_an_image
from similarity.recording import Recording

CANCELLED = 0.01  # share of D(X, X) that must be left when rows are taken out of a sum, to keep 13 digits of it


def resampled_planes(
    measure: str,
    jobs: Mapping[Hashable, tuple[Recording, Recording]],
    subsets: Sequence[np.ndarray],
    *,
    pairs: Mapping[Hashable, Sequence[tuple[str, str]]] | None = None,
    **options,
) -> dict[Hashable, np.ndarray]:
    """`measure` of every job on the images of every subset: {job: (resamples, sites of A, sites of B)}.

    jobs : recordings A, B of the same images; a recording that comes in several jobs is prepared once a subset
    subsets : positions among the images of the first job's A, as `subsamples(len(A))` gives them
    pairs : the (site of A, site of B) wanted of every job; the other cells are NaN, and often not computed
    options : of the measure; one `fraction` of rbf_cka at a time
    Each array's slice is the plane of the recordings with only those images; NaN where that has no number.
    """
    known = lookup(measure, options)
    if is_several(options.get("fraction", 1.0)):
        raise ValueError("resampled planes are made for one fraction of rbf_cka at a time; ask once for each")
    if not jobs:
        raise ValueError("no jobs were given: name at least one pair of recordings")
    first = next(iter(jobs.values()))[0]
    sides, positions = _matched(jobs, first), rows_an_image(first)
    rows = [_rows(subset, len(first), positions) for subset in subsets]
    if not rows:
        raise ValueError("no subsets were given; make some with `subsamples`")
    wanted = {key: _job(key, *each, None if pairs is None else pairs.get(key, ())) for key, each in jobs.items()}
    samples = {key: np.full((len(rows), *job.wanted.shape), np.nan) for key, job in wanted.items()}
    options = complete(measure, options, first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImages)  # said once, when the observed plane was made
        for route, part in _routes(known, wanted, sides, rows):
            route(_Work(known, options, part, _used(part, sides), rows), samples)
    return samples


@dataclass(frozen=True)
class _Job:
    """The two recordings by identity, their sites, and which cells are wanted, (sites of A, sites of B)."""

    left: int
    right: int
    names: tuple[list[str], list[str]]
    wanted: np.ndarray

    def pairs(self) -> list[tuple[int, int, str, str]]:
        """(row, column, site of A, site of B) of every wanted cell."""
        rows, columns = self.names
        return [(i, j, rows[i], columns[j]) for i, j in np.argwhere(self.wanted)]


Jobs = dict[Hashable, _Job]
Sides = dict[int, dict[str, Tensor]]  # of every recording by identity: {site: (rows, features)}


@dataclass(frozen=True)
class _Work:
    """What one of the routes has to compute, and of what."""

    known: Measure
    options: dict
    jobs: Jobs
    sides: Sides
    rows: list[Tensor]


def _job(key: Hashable, A: Recording, B: Recording, pairs: Sequence[tuple[str, str]] | None) -> _Job:
    wanted = np.full((len(A.names), len(B.names)), pairs is None)
    if pairs is not None and len(pairs) == 0:
        raise ValueError(f"`pairs` names no pair of sites for job {key!r}; give it some, or leave the job out")
    for a, b in pairs or ():
        A[a], B[b]  # an unknown site is refused with those that come closest
        wanted[A.names.index(a), B.names.index(b)] = True
    return _Job(id(A), id(B), (A.names, B.names), wanted)


def _rows(subset: np.ndarray, n: int, positions: int) -> Tensor:
    """The rows of a subset's images, all positions of each."""
    subset = np.asarray(subset)
    if subset.ndim != 1 or not np.issubdtype(subset.dtype, np.integer) or len(np.unique(subset)) != len(subset):
        raise ValueError("a subset must be a vector of whole positions, none of them twice; use `subsamples`")
    if len(subset) < SMALLEST_N or subset.min() < 0 or subset.max() >= n:
        raise ValueError(f"a subset must hold at least {SMALLEST_N} positions from 0 to {n - 1}; use `subsamples({n})`")
    return torch.as_tensor((subset[:, None] * positions + np.arange(positions)).ravel())


def _matched(jobs: Mapping[Hashable, tuple[Recording, Recording]], first: Recording) -> Sides:
    """{identity of a recording: {site: (rows, features)}}, rows in the first recording's order, on its device."""
    sides, device = {}, first.features[first.names[0]].device
    for recording in (recording for both in jobs.values() for recording in both):
        if id(recording) not in sides:
            sides[id(recording)] = matrices(match_rows(first, recording), device)
    return sides


def _routes(known: Measure, jobs: Jobs, sides: Sides, rows: list[Tensor]) -> list[tuple[Callable, Jobs]]:
    """How to compute which jobs: feature space where rows are many, packed Grams, or prepared sides."""
    many = {}
    if known.name == "linear_cka":
        few = {i: {name: X[: len(rows[0])] for name, X in side.items()} for i, side in sides.items()}  # shapes count
        many = {key: job for key, job in jobs.items() if moments.are_cheaper(few[job.left], few[job.right])}
    others = {key: job for key, job in jobs.items() if key not in many}
    routes = [(_in_feature_space, many), (_by_grams if known.gram else _by_prepared_sides, others)]
    return [(route, part) for route, part in routes if part]


def _used(jobs: Jobs, sides: Sides) -> Sides:
    """The sites that some of the jobs want."""
    wanted = {identity: set() for job in jobs.values() for identity in (job.left, job.right)}
    for job in jobs.values():
        wanted[job.left].update(a for _, _, a, _ in job.pairs())
        wanted[job.right].update(b for *_, b in job.pairs())
    return {i: {name: X for name, X in sides[i].items() if name in names} for i, names in wanted.items()}


def _bar(things: Sequence, what: str) -> tqdm:
    """Progress on a terminal."""
    return tqdm(things, "resampling", leave=False, unit=what, dynamic_ncols=True, disable=None, file=sys.stderr)


# -------------------------------------------------------------------------------------------------- the three routes


def _by_grams(work: _Work, samples: dict[Hashable, np.ndarray]) -> None:
    """Each recording's packed Gram matrices (or ranked dissimilarities) once a subset, and one product a job."""
    name, given = work.known.name, with_defaults(work.known.name, work.options)

    def pack(sites: dict[str, Tensor], chosen: Tensor, dtype: torch.dtype) -> grams.Packed:
        sites = {name: X[chosen] for name, X in sites.items()}
        if name == "rsa":
            return grams.profiles(sites, given["rdm"], given["compare"], dtype)
        if name == "rbf_cka":
            return grams.rbf(sites, [given["fraction"]], given["debiased"], dtype)[0]
        return grams.linear(sites, given["debiased"], dtype)

    dtype = _precision(work.sides, len(work.rows[0]))
    for number, chosen in enumerate(_bar(work.rows, "resample")):
        try:
            ready = {i: pack(side, chosen, dtype) for i, side in work.sides.items()}
        except grams.NeedsDouble:
            dtype = torch.float64  # from here on: other subsets of these features would need it, too
            ready = {i: pack(side, chosen, dtype) for i, side in work.sides.items()}
        for key, job in work.jobs.items():
            (x, rows, _), (y, columns, _) = ready[job.left], ready[job.right]
            if rows and columns:
                places = np.ix_([job.names[0].index(a) for a in rows], [job.names[1].index(b) for b in columns])
                cells = grams.products(x, y).cpu().numpy() if name == "rsa" else grams.cka(x, y)
                samples[key][number][places] = cells
            samples[key][number][~job.wanted] = np.nan


def _precision(sides: Sides, n: int) -> torch.dtype:
    """float32 where the features have no more digits and the work is long; MemoryError where a subset has no room."""
    tensors = [X for side in sides.values() for X in side.values()]
    wide = any(X.dtype not in (torch.float32, torch.float16, torch.bfloat16) for X in tensors)
    short = n**2 * sum(X.shape[1] for X in tensors) < LONG_WORK
    dtype = torch.float64 if wide or short else torch.float32
    needed, what = len(tensors) * grams.Layout(n).size * dtype.itemsize, f"a subset of {len(tensors)} sites × {n} rows"
    memory.refuse_more_than_available(needed, what, "give fewer jobs at a time, or fewer sites", tensors[0].device)
    return dtype


def _by_prepared_sides(work: _Work, samples: dict[Hashable, np.ndarray]) -> None:
    """What the measure prepares of each site, once a subset; then the wanted pairs, together where that shares work."""
    known, one = work.known, next(iter(work.sides.values()))
    prepare = pair_route(known, one, one, work.options).prepare
    for number, chosen in enumerate(_bar(work.rows, "resample")):
        ready = {
            i: prepare_all(prepare, {name: X[chosen] for name, X in side.items()})[0] for i, side in work.sides.items()
        }
        for key, job in work.jobs.items():
            x, y = ready[job.left], ready[job.right]
            usable = [pair for pair in job.pairs() if pair[2] in x and pair[3] in y]
            if known.together is None:
                for i, j, a, b in usable:
                    samples[key][number, i, j] = _number(known.combine, x[a], y[b])
                continue
            for rows, columns in _rectangles(usable):
                cells = known.together([x[job.names[0][i]] for i in rows], [y[job.names[1][j]] for j in columns])
                samples[key][number][np.ix_(rows, columns)] = cells


def _rectangles(pairs: list[tuple[int, int, str, str]]) -> list[tuple[list[int], list[int]]]:
    """(rows, columns) of full rectangles that hold every pair once: columns that want the same rows."""
    columns = {}
    for i, j, _, _ in pairs:
        columns.setdefault(j, []).append(i)
    alike = {}
    for j, wanted in columns.items():
        alike.setdefault(tuple(wanted), []).append(j)
    return [(list(left), right) for left, right in alike.items()]


def _number(combine: Callable, x, y) -> float:
    """A measure of two prepared sides, NaN where there is none."""
    try:
        return combine(x, y)
    except NotComputable:
        return math.nan


def _in_feature_space(work: _Work, samples: dict[Hashable, np.ndarray]) -> None:
    """Sums over rows, pair by pair: those of a subset are those of all rows less those of the rows left out.

    Where most of a site's variance is in the latter, the subtraction would cost digits: its rows are taken themselves.
    """
    rows, debiased = work.rows, work.options.get("debiased", True)
    own = {(i, name): _own_dots(X, name, rows, debiased) for i, side in work.sides.items() for name, X in side.items()}
    cells = [(key, job, pair) for key, job in work.jobs.items() for pair in job.pairs()]
    for key, job, (i, j, a, b) in _bar(cells, "pair"):
        X, Y = work.sides[job.left][a], work.sides[job.right][b]
        values = _dots(X, Y, rows, debiased)[1:] / np.sqrt(own[job.left, a] * own[job.right, b])
        for number in np.flatnonzero(np.isnan(values)):
            exactly = partial(moments.linear_cka, debiased=debiased)
            values[number] = _number(exactly, X[rows[number]], Y[rows[number]])
        samples[key][:, i, j] = values


def _own_dots(X: Tensor, name: str, rows: list[Tensor], debiased: bool) -> np.ndarray:
    """D(X, X) of every subset; NaN where the features themselves have to be looked at."""
    try:
        as_matrix(X, name, None)
    except NotComputable:
        return np.full(len(rows), np.nan)
    dots = _dots(X, X, rows, debiased)
    return np.where(dots[1:] > CANCELLED * dots[0], dots[1:], np.nan)


def _dots(X: Tensor, Y: Tensor, rows: list[Tensor], debiased: bool) -> np.ndarray:
    """(1 + subsets,) D(X, Y), as `moments` defines it, of all rows and of every subset."""
    U, V = (Z.double() - Z.mean(0, dtype=torch.float64) for Z in (X, Y))
    full = _sums(U, V)
    dots = [float(full.dot(debiased))]
    for chosen in rows:
        left_out = torch.ones(len(X), dtype=torch.bool).index_fill(0, chosen, False)
        if 2 * len(chosen) <= len(X):
            sums = _sums(U[chosen], V[chosen])
        else:
            part = _sums(U[left_out], V[left_out]).tensors()
            sums = moments.Sums(**{name: total - part[name] for name, total in full.tensors().items()})
        dots.append(float(sums.dot(debiased)))
    return np.array(dots)


def _sums(U: Tensor, V: Tensor) -> moments.Sums:
    s, r = (U**2).sum(1), (V**2).sum(1)
    n = torch.tensor(float(len(U)), dtype=torch.float64, device=U.device)
    return moments.Sums(n, U.sum(0), V.sum(0), s.sum(), r.sum(), U.T @ V, V.T @ s, U.T @ r, s @ r)
