"""Whole planes of kernel similarities: each site's Gram matrix once, half of it, then one product for all pairs.

A Gram matrix is symmetric, so only the blocks on and below its diagonal are made; those below count twice. Centring is
not applied to n × n entries but to the inner products, by row sums: with K̃ the matrix without its diagonal
    debiased: n(n − 3)·HSIC₁ = Σ K̃∘L̃ − 2/(n − 2)·(K̃1)ᵀ(L̃1) + 1ᵀK̃1·1ᵀL̃1/((n − 1)(n − 2))       (Song et al. 2012)
    biased:   (n − 1)²·HSIC₀ = Σ K∘L − 2/n·(K1)ᵀ(L1) + 1ᵀK1·1ᵀL1/n²                          (Gretton et al. 2005)
and CKA is HSIC(K, L)/√(HSIC(K, K)·HSIC(L, L)). float32 entries are multiplied in float32 and summed in float64; where
the terms above nearly cancel, so that this would cost digits, `NeedsDouble` is raised and float64 has to be used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from similarity.inputs import SMALLEST_N, NotComputable, as_matrix
from similarity.kernels import SAME, check_fraction, condensed, equally_similar, median_distance, refuse_no_distance
from similarity.rdm import comparable, rdm

BLOCKS = 4  # rows of blocks; more would leave out more of the upper half, and make the products less efficient
CHUNK = 65_536  # entries multiplied in float32 before they are added in float64
CANCELLATION = 0.02  # share of Σ K∘K that must be left after centring, for float32 to give five digits


class NeedsDouble(ArithmeticError):
    """float32 entries would lose too many digits here."""


@dataclass(frozen=True)
class Layout:
    """The blocks of an (n, n) matrix that are kept: those on the diagonal, and what lies left of them."""

    n: int

    @property
    def spans(self) -> list[slice]:
        """The rows of each row of blocks."""
        count = max(1, min(BLOCKS, self.n // 16))
        edges = [self.n * place // count for place in range(count + 1)]
        return [slice(*span) for span in itertools.pairwise(edges)]

    @property
    def size(self) -> int:
        """Entries kept."""
        return sum((span.stop - span.start) * span.stop for span in self.spans)


@dataclass
class Grams:
    """The Gram matrices of some sites.

    below : for each span of the layout (sites, rows of the span, columns before it); each entry stands for two
    diagonal : for each span (sites, rows of the span, the same columns)
    rows : (sites, n) row sums, float64
    """

    layout: Layout
    below: list[Tensor]
    diagonal: list[Tensor]
    rows: Tensor
    debiased: bool

    @classmethod
    def empty(cls, sites: int, n: int, debiased: bool, dtype: torch.dtype, device: torch.device) -> Grams:
        """Room for so many sites."""
        layout = Layout(n)
        sizes = [(span.stop - span.start, span.start) for span in layout.spans]
        below = [torch.empty(sites, height, before, dtype=dtype, device=device) for height, before in sizes]
        diagonal = [torch.empty(sites, height, height, dtype=dtype, device=device) for height, _ in sizes]
        return cls(layout, below, diagonal, torch.zeros(sites, n, dtype=torch.float64, device=device), debiased)

    def only(self, sites) -> Grams:
        """Some of the sites, by an index or mask."""
        below, diagonal = ([block[sites] for block in blocks] for blocks in (self.below, self.diagonal))
        return Grams(self.layout, below, diagonal, self.rows[sites], self.debiased)

    def pieces(self, site: int) -> list[Piece]:
        """(rows, left of the diagonal block, the diagonal block) of one site, to be filled."""
        return [(span, left[site], own[site]) for span, left, own in zip(self.layout.spans, self.below, self.diagonal)]

    def hsic(self, other: Grams) -> Tensor:
        """(sites, other's sites), float64, up to a factor that CKA does not see."""
        total = sum(2 * products(*(x.flatten(1) for x in both)) for both in zip(self.below, other.below))
        total += sum(products(*(x.flatten(1) for x in both)) for both in zip(self.diagonal, other.diagonal))
        sums = torch.outer(self.rows.sum(1), other.rows.sum(1))
        return self._centred(total, self.rows @ other.rows.T, sums)

    @cached_property
    def own(self) -> Tensor:
        """(sites,): each with itself."""
        return self._centred(self.squares, (self.rows**2).sum(1), self.rows.sum(1) ** 2)

    @cached_property
    def squares(self) -> Tensor:
        """(sites,): Σ K∘K, float64."""
        below, diagonal = (sum(_squares(x.flatten(1)) for x in blocks) for blocks in (self.below, self.diagonal))
        return 2 * below + diagonal

    def _centred(self, products: Tensor, row_products: Tensor, sums: Tensor) -> Tensor:
        """Σ K∘L, (K1)ᵀ(L1) and 1ᵀK1·1ᵀL1 -> HSIC."""
        n = self.layout.n
        one, both = (2 / (n - 2), (n - 1) * (n - 2)) if self.debiased else (2 / n, n**2)
        return products - one * row_products + sums / both


Piece = tuple[slice, Tensor, Tensor]
# (the Gram matrices of the sites that allow them, those sites' names, why the others do not)
Packed = tuple[Grams, list[str], dict[str, str]]


def products(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T of (sites, entries) matrices, summed in float64."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for start in range(0, left.shape[1], CHUNK):
        total += left[:, start : start + CHUNK] @ right[:, start : start + CHUNK].T
    return total


def _squares(rows: Tensor) -> Tensor:
    """Squared norm of every row, summed in float64."""
    return torch.stack([torch.stack([part @ part for part in row.split(CHUNK)]).double().sum() for row in rows])


def cka(left: Grams, right: Grams) -> np.ndarray:
    """(left sites, right sites) of CKA."""
    hsic = left.hsic(right)
    own_left, own_right = (hsic.diag(),) * 2 if right is left else (left.own, right.own)
    return (hsic / torch.sqrt(torch.outer(own_left, own_right))).cpu().numpy()


# ------------------------------------------------------------------------------------------------- filling the blocks


def linear(sites: dict[str, Tensor], debiased: bool, dtype: torch.dtype) -> Packed:
    """XXᵀ of centred features."""

    def fill(X: Tensor, _name: str, pieces: list, sums: Tensor) -> None:
        for rows, below, diagonal in pieces[0]:
            torch.mm(X[rows], X[: rows.start].T, out=below)
            torch.mm(X[rows], X[rows].T, out=diagonal)
            if debiased:
                diagonal.fill_diagonal_(0)
        if debiased:
            sums[0].copy_(-(torch.linalg.vector_norm(X, dim=1).double() ** 2))  # K1 = X(Xᵀ1) = 0 for centred columns

    return _filled(sites, debiased, dtype, fill, 1)[0]


def rbf(sites: dict[str, Tensor], fractions: Sequence[float], debiased: bool, dtype: torch.dtype) -> list[Packed]:
    """For each fraction of the sites' own median distance, exp(−‖xᵢ − xⱼ‖² / 2σ²)."""
    for fraction in fractions:
        check_fraction(fraction)

    def fill(X: Tensor, name: str, pieces: list, sums: Tensor) -> None:
        squares = (X * X).sum(1)
        for rows, below, diagonal in pieces[0]:
            for block, columns in ((below, slice(0, rows.start)), (diagonal, rows)):
                _fill_distances(block, X, squares, rows, columns)
            diagonal.fill_diagonal_(0)
        median = _median(pieces[0], squares, name)
        for fraction, copy, own_sums in list(zip(fractions, pieces, sums))[::-1]:  # the first holds the distances
            for distances, piece in zip(pieces[0], copy):
                for squared, block in zip(distances[1:], piece[1:]):
                    torch.mul(squared, -1 / (2 * (fraction * median) ** 2), out=block).exp_()
            _centre_entries(copy, own_sums, debiased)

    return _filled(sites, debiased, dtype, fill, len(fractions))


def _filled(sites: dict[str, Tensor], debiased: bool, dtype: torch.dtype, fill: Callable, copies: int) -> list[Packed]:
    """The Gram matrices that `fill` makes of every site's centred features, so many copies of them.

    Features are centred in one place for all sites: fresh memory costs more than the arithmetic.
    """
    first = next(iter(sites.values()))
    made = [Grams.empty(len(sites), len(first), debiased, dtype, first.device) for _ in range(copies)]
    room = torch.empty(max(X.numel() for X in sites.values()), dtype=dtype, device=first.device)
    names, notes = [], {}
    for name, X in sites.items():
        try:
            centred = _centred(X.to(dtype), name, room)
            fill(centred, name, [each.pieces(len(names)) for each in made], [each.rows[len(names)] for each in made])
            names.append(name)
        except NotComputable as reason:
            notes[name] = str(reason)
    return [_those_with_structure(each.only(slice(len(names))), list(names), dict(notes)) for each in made]


def _centred(X: Tensor, name: str, room: Tensor) -> Tensor:
    """Centred features of ordinary size, in `room`: no kernel here sees the scale.

    Features of ordinary size that clearly vary need no closer look; others are examined by `as_matrix`, and scaled so
    that float32 does not overflow in products of squares.
    """
    mean = X.mean(0)
    centred = torch.sub(X, mean, out=room[: X.numel()].view(X.shape))
    centred.sub_(centred.mean(0))
    spread = float(torch.linalg.vector_norm(centred)) / math.sqrt(max(X.numel(), 1))
    if len(X) >= SMALLEST_N and 1e-3 < spread < 1e3 and spread > 1e-4 * float(mean.abs().max()):
        return centred
    as_matrix(X, name, X.dtype)
    return centred.div_(torch.maximum(centred.amax(), -centred.amin()))


def _those_with_structure(grams: Grams, names: list[str], notes: dict[str, str]) -> Packed:
    """Leave out sites of whose Gram matrix centring leaves nothing."""
    if not names:
        return grams, names, notes
    left = grams.own / grams.squares
    if grams.diagonal[0].dtype == torch.float32 and (left < CANCELLATION).any():
        raise NeedsDouble
    keep = left > 1e-13
    if keep.all():
        return grams, names, notes
    notes |= {name: str(equally_similar(name)) for name, kept in zip(names, keep) if not kept}
    return grams.only(keep), [name for name, kept in zip(names, keep) if kept], notes


def _fill_distances(block: Tensor, X: Tensor, squares: Tensor, rows: slice, columns: slice) -> None:
    """‖xᵢ − xⱼ‖² of some rows to some others."""
    both = squares[rows, None] + squares[None, columns]
    torch.addmm(both, X[rows], X[columns].T, alpha=-2, out=block)
    if X.dtype == torch.float64:
        block.masked_fill_(block <= SAME * both, 0.0)


def _median(pieces: list[Piece], squares: Tensor, side: str) -> float:
    """Median distance of all pairs, from their squares."""
    pairs = []
    for _, below, diagonal in pieces:
        pairs += [below.flatten(), condensed(diagonal)]
    pairs = torch.cat(pairs)
    median = median_distance(pairs)
    # distances of almost identical images are rounding in float32
    if squares.dtype == torch.float32 and median**2 <= 1e-4 * 2 * float(squares.mean()):
        raise NeedsDouble
    return refuse_no_distance(median, side)


def _centre_entries(pieces: list[Piece], sums: Tensor, debiased: bool) -> None:
    """Set the diagonal aside, subtract the mean entry (which changes no HSIC), note row sums.

    Kernel values lie close together: without their mean, fewer digits cancel later.
    """
    n, total = len(sums), 0.0
    for _, below, diagonal in pieces:
        if debiased:
            diagonal.fill_diagonal_(0)
        total += 2 * float(below.sum(dtype=torch.float64)) + float(diagonal.sum(dtype=torch.float64))
    mean = total / (n * (n - 1) if debiased else n**2)
    for rows, below, diagonal in pieces:
        below -= mean
        diagonal -= mean
        if debiased:
            diagonal.fill_diagonal_(0)
        sums[rows] += below.sum(1, dtype=torch.float64) + diagonal.sum(1, dtype=torch.float64)
        sums[: rows.start] += below.sum(0, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------- RSA


def profiles(
    sites: dict[str, Tensor], kind: str, compare: str, dtype: torch.dtype
) -> tuple[Tensor | None, list[str], dict[str, str]]:
    """Comparable dissimilarities (sites, n(n − 1)/2) of the sites that allow it, their names, why the others do not.

    Dissimilarities are computed and ranked in float64, since rounding must not order equal ones; ranking runs beside
    the next site's matrix product.
    """
    waiting, notes = {}, {}
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        for name, X in sites.items():
            try:
                values = condensed(rdm(as_matrix(X, name), kind, name))
            except NotComputable as reason:
                notes[name] = str(reason)
                continue
            waiting[name] = pool.submit(comparable, values, compare, name)
        ready = {}
        for name, future in waiting.items():
            try:
                ready[name] = future.result().to(dtype)
            except NotComputable as reason:
                notes[name] = str(reason)
    return (torch.stack(list(ready.values())) if ready else None), list(ready), notes
