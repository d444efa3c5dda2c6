"""Measures of neighbourhoods: mutual kNN, CKNNA, information imbalance.

Distances are made for some rows at a time, so no n × n matrix is kept. They are computed in float64 and compared in
float32: what agrees to that precision is a tie. (Of float32 features without many ties, long computations find
ranks in float32, and choose between almost equally near neighbours in float64.) Ties are shared, never broken by the
order of the rows: the images tied for the last place among k neighbours divide it between them, and tied ranks are
averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from similarity.inputs import NotComputable, centered
from similarity.kernels import squared_to_all

BLOCK_ENTRIES = 1_000_000  # distances of a site held at a time
HELD_ENTRIES = 250_000_000  # of all sites
LONG_WORK = 1e8  # multiply-adds; shorter ones are done in float64
SPARE = 4  # candidates beyond the k nearest in float32 that float64 may prefer


@dataclass(frozen=True)
class Nearest:
    """The k nearest neighbours of every image: index (n, m) and weight (n, m), rows of weights sum to k.

    Without ties m = k and all weights are 1. Entries of weight 0 fill rows that have fewer tied candidates.
    """

    index: np.ndarray
    weight: np.ndarray

    def graph(self, entries: np.ndarray | None = None) -> sparse.csr_array:
        """(n, n) with the weights, or other entries (n, m), at the neighbours."""
        n, m = self.index.shape
        here = self.weight > 0
        rows = np.repeat(np.arange(n), m)[here.ravel()]
        entries = self.weight if entries is None else entries
        return sparse.csr_array((entries[here], (rows, self.index[here])), shape=(n, n))

    @classmethod
    def stacked(cls, parts: Sequence[Nearest]) -> Nearest:
        """Those of blocks of rows, below each other."""
        return cls(_stacked([part.index for part in parts]), _stacked([part.weight for part in parts]))


@dataclass(frozen=True)
class Cloud:
    """One side: centred features X (n, p), in float64 or, where that will do, float32; and how many neighbours."""

    X: Tensor
    k: int

    def permuted(self, rows: Tensor) -> Cloud:
        """The same features with their rows in another order."""
        return replace(self, X=self.X[rows])

    @cached_property
    def squares(self) -> Tensor:
        """‖xᵢ‖², (n,)."""
        return torch.linalg.vector_norm(self.X, dim=1) ** 2

    @property
    def rounding(self) -> Tensor:
        """(n,) what float32 products leave uncertain in squared distances of each image."""
        return 8 * torch.finfo(torch.float32).eps * (self.squares + self.squares.max())

    def distances(self, rows: slice) -> Tensor:
        """(rows, n) in float32: squared distances, up to a constant a row; an image's own is infinite."""
        if self.X.dtype == torch.float64:
            distances = squared_to_all(self.X, self.squares, rows).float()
        else:  # ‖xᵢ‖² is the same for the whole row
            distances = torch.addmm(self.squares, self.X[rows], self.X.T, alpha=-2)
        return _fill_own(distances, rows, torch.inf)

    def nearest_of(self, rows: slice, distances: Tensor) -> Nearest:
        """The k nearest neighbours of some rows; float64 chooses where float32 leaves it open."""
        if self.X.dtype == torch.float64:
            return smallest(distances, self.k)
        found = torch.topk(distances, min(self.k + SPARE, len(self.X) - 1), largest=False)
        index, last = found.indices.cpu().numpy(), found.values[:, self.k - 1]
        weight = np.zeros(index.shape)
        weight[:, : self.k] = 1
        open_rows = (found.values[:, self.k] - last <= self.rounding[rows]).nonzero().flatten()
        if len(open_rows):
            here = self.X[rows][open_rows, None].double()
            exact = ((self.X[found.indices[open_rows]].double() - here) ** 2).sum(-1)
            chosen = smallest(exact.float(), self.k)
            decided = np.zeros((len(open_rows), index.shape[1]))
            np.put_along_axis(decided, chosen.index, chosen.weight, axis=1)
            weight[open_rows.cpu().numpy()] = decided
        return Nearest(index, weight)

    @cached_property
    def nearest(self) -> Nearest:
        """The k nearest neighbours by Euclidean distance."""
        return Nearest.stacked([self.nearest_of(rows, self.distances(rows)) for rows in row_blocks(len(self.X))])

    @cached_property
    def graph(self) -> sparse.csr_array:
        """`nearest` as a sparse matrix."""
        return self.nearest.graph()


def row_blocks(n: int, sides: int = 1) -> Iterator[slice]:
    """Rows to take at a time, of so many sides together."""
    step = max(1, min(BLOCK_ENTRIES, HELD_ENTRIES // sides) // n)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _fill_own(block: Tensor, rows: slice, value: float) -> Tensor:
    """Some rows of an (n, n) matrix, with `value` where an image meets itself; written in place."""
    block[torch.arange(rows.stop - rows.start), torch.arange(rows.start, rows.stop)] = value
    return block


def cloud(X: Tensor, *, side: str, k: int) -> Cloud:
    """A side of `mutual_share` and of `imbalances`."""
    _check_k(X, k, side)
    if X.dtype == torch.float32 and len(X) ** 2 * X.shape[1] > LONG_WORK:
        rough = Cloud(centered(X), k)
        if _float32_will_do(rough):
            return rough
    return Cloud(centered(X.double()), k)


def _float32_will_do(rough: Cloud) -> bool:
    """Not for extreme sizes, nor for many ties, which rounding would put in order: judged by eight images."""
    if not 1e-20 < float(rough.squares.max()) < 1e20:
        return False
    for image in np.linspace(0, len(rough.X) - 1, 8).astype(int):
        steps = rough.distances(slice(image, image + 1))[0].sort().values.diff()
        if (steps <= rough.rounding[image]).double().mean() > 0.25:
            return False
    return True


def _check_k(X: Tensor, k: int, side: str) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k must be a whole number of neighbours, at least 1, got {k!r}")
    if k > len(X) - 2:
        raise NotComputable(f"{side} has {len(X)} rows; {k} neighbours of each need at least {k + 2} images")


def smallest(values: Tensor, k: int) -> Nearest:
    """The k smallest of each row of (rows, n) values; those tied for the last place share it."""
    last = torch.topk(values, k, largest=False).values[:, -1:]
    candidates = int((values <= last).sum(1).max())
    found = torch.topk(values, candidates, largest=False)
    nearer, tied = found.values < last, found.values == last
    room = k - nearer.sum(1, keepdim=True)
    weight = nearer + tied * (room.double() / tied.sum(1, keepdim=True))
    return Nearest(found.indices.cpu().numpy(), weight.cpu().numpy())


def _stacked(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Blocks of rows below each other; narrower ones are filled with zeros."""
    widest = max(block.shape[1] for block in blocks)
    return np.concatenate([np.pad(block, ((0, 0), (0, widest - block.shape[1]))) for block in blocks])


# ---------------------------------------------------------------------------------------------------------- mutual kNN


def mutual_share(left: Cloud, right: Cloud) -> float:
    """Σᵢ |N_k^X(i) ∩ N_k^Y(i)| / nk; of a neighbour that only partly belongs, the smaller part counts."""
    return float(left.graph.minimum(right.graph).sum() / (len(left.X) * left.k))


def mutual_shares(left: Sequence[Cloud], right: Sequence[Cloud]) -> np.ndarray:
    """`mutual_share` of every pair, (left, right): where no neighbours are tied, one sparse product of all graphs."""
    graphs = {id(side): side.graph for side in (*left, *right)}
    if any((graph.data != 1).any() for graph in graphs.values()):
        return np.array([[mutual_share(one, other) for other in right] for one in left])
    flat = {key: graph.reshape(1, -1) for key, graph in graphs.items()}
    rows, columns = (sparse.vstack([flat[id(side)] for side in sides], format="csr") for sides in (left, right))
    return (rows @ columns.T).toarray() / (len(left[0].X) * left[0].k)


# --------------------------------------------------------------------------------------------------------------- CKNNA


@dataclass(frozen=True)
class MaskedGram:
    """Inner products of every image with its k most similar ones: values and mask, (n, n) sparse."""

    values: sparse.csr_array
    mask: sparse.csr_array
    side: str

    def permuted(self, rows: Tensor) -> MaskedGram:
        """The same features with their rows in another order."""
        order = rows.cpu().numpy()
        return replace(self, values=self.values[order][:, order], mask=self.mask[order][:, order])

    @cached_property
    def own(self) -> float:
        """HSIC₁ with itself."""
        hsic = hsic1(self.values, self.values)
        if hsic <= 0:
            raise NotComputable(
                f"{self.side}: HSIC₁ of its nearest neighbours is {hsic:.3g}, not above 0; use more images"
            )
        return hsic


def masked_gram(X: Tensor, *, side: str, k: int) -> MaskedGram:
    """K = XXᵀ (not centred) at the k largest entries of each row outside the diagonal, with all tied for the last."""
    _check_k(X, k, side)
    X, found, entries = X.double(), [], []
    for rows in row_blocks(len(X)):
        K = _fill_own(X[rows] @ X.T, rows, -torch.inf)
        found.append(smallest(-K.float(), k))
        entries.append(np.take_along_axis(K.cpu().numpy(), found[-1].index, 1))
    nearest = Nearest.stacked(found)
    return MaskedGram(nearest.graph(_stacked(entries)), nearest.graph(np.ones_like(nearest.weight)), side)


def hsic1(K: sparse.csr_array, L: sparse.csr_array) -> float:
    """Song's unbiased HSIC of two kernels without diagonals: K̃, L̃ (n, n), not necessarily symmetric."""
    n = K.shape[0]
    trace = K.multiply(L.T).sum()
    cross = K.sum(0) @ L.sum(1)  # 1ᵀK̃L̃1
    return float((trace + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3)))


def cknna_of(left: MaskedGram, right: MaskedGram) -> float:
    """HSIC₁ of both Grams where an image is among the k most similar on both sides, over √ of each side's own."""
    K, L = left.values.multiply(right.mask).tocsr(), right.values.multiply(left.mask).tocsr()
    return hsic1(K, L) / float(np.sqrt(left.own * right.own))


# ----------------------------------------------------------------------------------------------- information imbalance


def imbalances(left: Sequence[Cloud], right: Sequence[Cloud]) -> np.ndarray:
    """Δ(A→B) = 2/(n²k) · Σᵢ Σ ranks in B of i's k nearest neighbours in A, for every A of left and B of right.

    Some rows at a time: the distances of each side are made once, those of each B sorted once, and ranks found by
    counting for all A together. So a plane of sites with themselves costs as much as one direction.
    """
    n, k = len(left[0].X), left[0].k
    shared = {id(side) for side in left} & {id(side) for side in right}
    total = np.zeros((len(left), len(right)))
    for rows in row_blocks(n, len(left)):
        near, held = [], {}
        for side in left:
            distances = side.distances(rows)
            near.append(side.nearest_of(rows, distances))
            if id(side) in shared:
                held[id(side)] = distances
        starts = np.cumsum([0, *(part.index.shape[1] for part in near[:-1])])
        index, weight = (np.concatenate(parts, axis=1) for parts in zip(*((each.index, each.weight) for each in near)))
        for column, side in enumerate(right):
            ranks = _ranks(held.pop(id(side)) if id(side) in held else side.distances(rows), index)
            total[:, column] += np.add.reduceat((weight * ranks).sum(0), starts)
    return 2 / (n**2 * k) * total


def _ranks(distances: Tensor, index: np.ndarray) -> np.ndarray:
    """Rank (1 = nearest) of column index[i, m] in row i of the distances, which are put in order; ties averaged."""
    asked = distances.gather(1, torch.as_tensor(index, device=distances.device))
    ordered = _sorted(distances)
    nearer, upto = (torch.searchsorted(ordered, asked, right=right) for right in (False, True))
    return ((nearer + upto + 1) / 2).cpu().numpy()


def _sorted(values: Tensor) -> Tensor:
    """Each row in ascending order (numpy's sort is several times faster than torch's on a CPU)."""
    if values.is_cuda:
        return values.sort(1).values
    values.numpy().sort(axis=1)
    return values
