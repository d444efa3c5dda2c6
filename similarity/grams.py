"""Whole planes of kernel similarities: each site's Gram matrix once, half of it, then one product for all pairs.

A Gram matrix is symmetric, so only the blocks on and below its diagonal are made; those below count twice. Centring is
not applied to n × n entries but to the inner products, by row sums: with K̃ the matrix without its diagonal
    debiased: n(n − 3)·HSIC₁ = Σ K̃∘L̃ − 2/(n − 2)·(K̃1)ᵀ(L̃1) + 1ᵀK̃1·1ᵀL̃1/((n − 1)(n − 2))       (Song et al. 2012)
    biased:   (n − 1)²·HSIC₀ = Σ K∘L − 2/n·(K1)ᵀ(L1) + 1ᵀK1·1ᵀL1/n²                          (Gretton et al. 2005)
and CKA is HSIC(K, L)/√(HSIC(K, K)·HSIC(L, L)). float32 entries are multiplied in float32 and summed in float64; where
the terms above nearly cancel, so that this would cost digits, `NeedsDouble` is raised and float64 has to be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from similarity.inputs import NotComputable, as_matrix, centered
from similarity.kernels import SAME, check_fraction, equally_similar, median_distance
from similarity.rdm import comparable, rdm

BLOCKS = 8  # a Gram matrix is made in 8 × 8 blocks, of which 36 are needed
CHUNK = 65_536  # entries multiplied in float32 before they are added in float64
CANCELLATION = 0.02  # share of Σ K∘K that must be left after centring, for float32 to give five digits


class NeedsDouble(ArithmeticError):
    """float32 entries would lose too many digits here."""


@dataclass
class Grams:
    """The packed Gram matrices of some sites.

    entries : (sites, packed), blocks below the diagonal scaled by √2, so that inner products are those of the whole
    rows : (sites, n) row sums, float64
    """

    entries: Tensor
    rows: Tensor
    debiased: bool

    def hsic(self, other: Grams) -> Tensor:
        """(sites, other's sites), float64, up to a factor that CKA does not see."""
        return self._centre(products(self.entries, other.entries), self.rows @ other.rows.T, self.rows, other.rows)

    def own(self) -> Tensor:
        """(sites,): each with itself."""
        squares = torch.stack([_chunked_dot(row, row) for row in self.entries])
        n = self.rows.shape[1]
        sums = self.rows.sum(1)
        one, both = (2 / (n - 2), (n - 1) * (n - 2)) if self.debiased else (2 / n, n**2)
        return squares - one * (self.rows**2).sum(1) + sums**2 / both

    def _centre(self, products: Tensor, row_products: Tensor, left: Tensor, right: Tensor) -> Tensor:
        n = left.shape[1]
        one, both = (2 / (n - 2), (n - 1) * (n - 2)) if self.debiased else (2 / n, n**2)
        return products - one * row_products + torch.outer(left.sum(1), right.sum(1)) / both


def products(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T of (sites, entries) matrices, summed in float64."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for start in range(0, left.shape[1], CHUNK):
        total += left[:, start : start + CHUNK] @ right[:, start : start + CHUNK].T
    return total


def _chunked_dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([a @ b for a, b in zip(left.split(CHUNK), right.split(CHUNK))]).double().sum()


# ------------------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Layout:
    """Where the blocks of an (n, n) matrix lie in a packed row of `size` entries."""

    n: int

    @property
    def edges(self) -> list[int]:
        """First row of each block of rows, and n."""
        blocks = max(1, min(BLOCKS, self.n // 16))
        return [self.n * block // blocks for block in range(blocks + 1)]

    @property
    def size(self) -> int:
        """Entries on and below the block diagonal."""
        return sum((end - start) * end for start, end in zip(self.edges, self.edges[1:]))

    def blocks(self, packed: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
        """(rows, entries left of the diagonal block (rows, start), the diagonal block) as views of one packed row."""
        views, offset = [], 0
        for start, end in zip(self.edges, self.edges[1:]):
            height = end - start
            below = packed[offset : offset + height * start].view(height, start)
            offset += height * start
            views.append((slice(start, end), below, packed[offset : offset + height * height].view(height, height)))
            offset += height * height
        return views


def _fill(packed: Tensor, layout: Layout, X: Tensor, scale: float = 1.0) -> None:
    """The packed XXᵀ, what is below the diagonal blocks times `scale`."""
    for rows, below, diagonal in layout.blocks(packed):
        if below.numel():
            torch.addmm(below, X[rows], X[: rows.start].T, beta=0, alpha=scale, out=below)
        torch.mm(X[rows], X[rows].T, out=diagonal)


def _unit_scale(X: Tensor) -> Tensor:
    """Centred features of largest value 1: no kernel here sees the scale, and float32 cannot overflow in squares."""
    X = centered(X)
    return X.div_(torch.maximum(X.amax(), -X.amin()))


def linear(sites: dict[str, Tensor], debiased: bool, dtype: torch.dtype) -> tuple[Grams, list[str], dict[str, str]]:
    """(packed XXᵀ of the sites that allow it, their names, why the others do not)."""
    features, notes = _usable(sites, dtype)

    def pack(row: Tensor, rows: Tensor, X: Tensor, layout: Layout) -> None:
        _fill(row, layout, X, math.sqrt(2))
        if debiased:
            for _, _, diagonal in layout.blocks(row):
                diagonal.fill_diagonal_(0)
            rows.copy_(-(torch.linalg.vector_norm(X, dim=1).double() ** 2))  # K1 = X(Xᵀ1) = 0 for centred columns

    return _packed(features, notes, debiased, dtype, pack)


def rbf(
    sites: dict[str, Tensor], fractions: Sequence[float], debiased: bool, dtype: torch.dtype
) -> list[tuple[Grams, list[str], dict[str, str]]]:
    """For each fraction of the sites' own median distance: their packed RBF Gram matrices, as `linear` gives them."""
    for fraction in fractions:
        check_fraction(fraction)
    features, notes = _usable(sites, dtype)
    distances, medians = {}, {}
    for name, X in features.items():
        try:
            distances[name], medians[name] = _packed_distances(X, name)
        except NotComputable as reason:
            notes[name] = str(reason)

    def packer(fraction: float) -> Callable:
        def pack(row: Tensor, rows: Tensor, name: str, layout: Layout) -> None:
            squared = distances.pop(name) if fraction is fractions[-1] else distances[name]  # free what is used up
            torch.mul(squared, -1 / (2 * (fraction * medians[name]) ** 2), out=row)
            row.exp_()
            _centre_entries(row, rows, layout, debiased)

        return pack

    usable = {name: name for name in distances}
    n = len(next(iter(features.values()))) if features else 0
    return [_packed(usable, dict(notes), debiased, dtype, packer(fraction), n) for fraction in fractions]


def _usable(sites: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    ready, notes = {}, {}
    for name, X in sites.items():
        try:
            ready[name] = _unit_scale(as_matrix(X, name, dtype))
        except NotComputable as reason:
            notes[name] = str(reason)
    return ready, notes


def _packed(sites: dict, notes: dict, debiased: bool, dtype: torch.dtype, pack: Callable, n: int | None = None):
    """Pack every site, and leave out those of which centring leaves nothing."""
    if not sites:
        return None, [], notes
    first = next(iter(sites.values()))
    n = len(first) if n is None else n
    device = first.device if isinstance(first, Tensor) else None
    layout = Layout(n)
    entries = torch.empty(len(sites), layout.size, dtype=dtype, device=device)
    rows = torch.zeros(len(sites), n, dtype=torch.float64, device=device)
    for row, sums, site in zip(entries, rows, sites.values()):
        pack(row, sums, site, layout)
    grams = Grams(entries, rows, debiased)
    return _keep_those_with_structure(grams, list(sites), notes)


def _keep_those_with_structure(grams: Grams, names: list[str], notes: dict[str, str]):
    left = grams.own() / torch.stack([_chunked_dot(row, row) for row in grams.entries])
    if grams.entries.dtype == torch.float32 and (left < CANCELLATION).any():
        raise NeedsDouble
    keep = (left > 1e-13).tolist()
    if all(keep):
        return grams, names, notes
    notes |= {name: str(equally_similar(name)) for name, kept in zip(names, keep) if not kept}
    mask = torch.tensor(keep, device=grams.entries.device)
    return Grams(grams.entries[mask], grams.rows[mask], grams.debiased), [n for n, k in zip(names, keep) if k], notes


def _packed_distances(X: Tensor, side: str) -> tuple[Tensor, float]:
    """(packed squared distances, their median's root)."""
    layout = Layout(len(X))
    packed = X.new_empty(layout.size)
    squares = (X * X).sum(1)
    _fill(packed, layout, X)
    pairs = []
    for rows, below, diagonal in layout.blocks(packed):
        for block, columns in ((below, slice(0, rows.start)), (diagonal, rows)):
            both = squares[rows, None] + squares[None, columns]
            torch.sub(both, block, alpha=2, out=block)
            if X.dtype == torch.float64:
                block.masked_fill_(block <= SAME * both, 0.0)
        lower = torch.tril_indices(len(diagonal), len(diagonal), -1, device=X.device)
        pairs += [below.flatten(), diagonal[lower[0], lower[1]]]
        diagonal.fill_diagonal_(0)
    pairs = torch.cat(pairs)
    if X.dtype == torch.float32:
        median = float(np.median(pairs.cpu().numpy()))
        # distances of almost identical images are rounding in float32
        if median <= 1e-4 * 2 * float(squares.mean()):
            raise NeedsDouble
    return packed, median_distance(pairs, side)


def _centre_entries(row: Tensor, rows: Tensor, layout: Layout, debiased: bool) -> None:
    """Set the diagonal aside, subtract the mean entry (which changes no HSIC), note row sums, scale for packing.

    Kernel values lie close together: without their mean, fewer digits cancel later.
    """
    n, total = layout.n, 0.0
    for _, below, diagonal in layout.blocks(row):
        if debiased:
            diagonal.fill_diagonal_(0)
        total += 2 * float(below.sum(dtype=torch.float64)) + float(diagonal.sum(dtype=torch.float64))
    row -= total / (n * (n - 1) if debiased else n**2)
    for part, below, diagonal in layout.blocks(row):
        if debiased:
            diagonal.fill_diagonal_(0)
        rows[part] += below.sum(1, dtype=torch.float64) + diagonal.sum(1, dtype=torch.float64)
        rows[: part.start] += below.sum(0, dtype=torch.float64)
        below *= math.sqrt(2)


def cka(left: Grams | None, right: Grams | None) -> np.ndarray:
    """(left sites, right sites) of CKA."""
    if left is None or right is None:
        return np.empty((0, 0))
    hsic = left.hsic(right)
    own_left, own_right = (hsic.diag(),) * 2 if right is left else (left.own(), right.own())
    return (hsic / torch.sqrt(torch.outer(own_left, own_right))).cpu().numpy()


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
                values = _condensed(as_matrix(X, name), kind, name)
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


def _condensed(X: Tensor, kind: str, side: str) -> Tensor:
    dissimilarities = rdm(X, kind, side)
    lower = torch.tril_indices(len(X), len(X), -1, device=X.device)
    return dissimilarities[lower[0], lower[1]]
