"""The permutation null of linear and kernel CKA in closed form: mean, variance, skewness, and p by Pearson's type III.

No permutation is drawn. For other measures, and for policies with several rows an image, see `nulls.plane_null`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from scipy.stats import pearson3
from torch import Tensor

from similarity import measures, memory
from similarity.cells import prepare_all
from similarity.inputs import as_matrix
from similarity.null_scorers import ROUNDING, one_measure
from similarity.plane import match_rows, plane, rows_an_image
from similarity.recording import Recording

BLOCKS = 8  # rows of blocks of a cubed Gram matrix


@dataclass(frozen=True)
class ExactNull:
    """A plane of CKA and the first three moments of its null under permutations of images, (rows, columns) each.

    Moments are exact. p_values and high take the null for a Pearson type III distribution, which has all three: close
    where many images share in the similarity, rough where a few outlying ones make most of it (sample it there).
    Cells without a number are NaN; notes say why. A null that is one value has variance 0 and no skewness.
    """

    observed: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    skewness: np.ndarray
    rows: list[str]
    columns: list[str]
    measure: str
    n_images: int
    notes: dict[tuple[str, str], str] = field(default_factory=dict)

    def p_values(self) -> np.ndarray:
        """Probability that a permutation reaches the observed value; 0 beyond the end of a bounded tail."""
        p = pearson3.sf(self.observed, self.skewness, self.mean, self._sd())
        return np.where(self.variance == 0, 1.0, p)  # every permutation gives the observed value

    def high(self, level: float = 0.95) -> np.ndarray:
        """The point that `level` of the null stay below."""
        point = pearson3.ppf(level, self.skewness, self.mean, self._sd())
        return np.where(self.variance == 0, self.mean, point)

    def _sd(self) -> np.ndarray:
        return np.sqrt(np.where(self.variance == 0, np.nan, self.variance))


def exact_moments(measure: str, A: Recording, B: Recording, **options) -> ExactNull:
    """Null of linear or RBF CKA, debiased or not, without sampling: (n!) permutations by eight sums of every site.

    Josse, Pagès & Husson 2008, after Kazi-Aoual et al. 1995, give such moments for the RV coefficient; here they are
    derived by enumeration, see `_form`. Recordings with several rows an image are refused: whole images move there.
    """
    if measure not in ("linear_cka", "rbf_cka"):
        raise ValueError(f"exact moments are of linear_cka and rbf_cka, not of {measure!r}; use plane_null")
    if rows_an_image(A) > 1:
        raise ValueError(f"policy {A.policy!r} has several rows an image, which move together; use plane_null")
    known, n = one_measure(measure, options), len(A)
    what, remedy = f"the exact null of {n} images", "select(ids=…) fewer images, or use plane_null"
    first = A.matrix(A.names[0])
    memory.refuse_more_than_available(48 * n**2, what, remedy, first.device)
    full, found = measures.with_defaults(measure, options), plane(measure, A, B, **options)

    def prepare(X: Tensor, side: str) -> np.ndarray:
        return _invariants(known.prepare(as_matrix(X.to(first.device), side, None), side=side, **full))

    x = _stacked(prepare, A)
    y = x if B is A else _stacked(prepare, match_rows(A, B))
    mean = np.outer(x[:, 0], y[:, 0]) / (n - 1)
    variance, third = (x[:, part] @ _form(order, n) @ y[:, part].T for order, part in _PARTS.items())
    varies = variance > ROUNDING[torch.float64] ** 2
    variance = np.where(varies | np.isnan(variance), variance, 0.0)
    skewness = np.divide(third, variance**1.5, out=np.full(third.shape, np.nan), where=varies)
    return ExactNull(found.values, mean, variance, skewness, found.rows, found.columns, measure, n, found.notes)


def _stacked(prepare: Callable, recording: Recording) -> np.ndarray:
    """(sites, invariants), NaN of those on which the measure cannot be computed."""
    usable, _ = prepare_all(prepare, {name: recording.matrix(name) for name in recording.names})
    return np.stack([usable.get(name, np.full(8, np.nan)) for name in recording.names])


# Sums over all images of products of entries of a symmetric matrix K without trace and with rows that sum to 0, as
# multigraphs: images are vertices, entries edges, diagonal ones loops. (vertices, loops) tells them apart, since a
# vertex of degree 1 stands for a row sum and a lone loop for the trace: all other sums are 0.
_GRAPHS = {2: [(1, 2), (2, 0)], 3: [(1, 3), (2, 0), (2, 1), (2, 2), (3, 0)]}
_PARTS = {2: slice(1, 3), 3: slice(3, 8)}


def _invariants(K: Tensor) -> np.ndarray:
    """(8,) float64: the trace of a centred (n, n) Gram matrix, and the sums of `_GRAPHS` once the trace is removed.

    Removing it takes a multiple of H = I − 11ᵀ/n off K, and ⟨H, any centred L⟩ = tr L: it moves the null's mean to 0.
    """
    n, trace = len(K), float(K.trace())
    K = K + trace / (n - 1) / n
    K.diagonal().sub_(trace / (n - 1))
    d, squares = K.diagonal(), K**2
    sums = [(d**2).sum(), squares.sum(), (d**3).sum(), (squares * K).sum(), d @ squares.sum(1), d @ K @ d, _cubed(K)]
    return np.array([trace, *map(float, sums)])


def _cubed(K: Tensor) -> Tensor:
    """tr K³ of a symmetric matrix, by the blocks of K² on and below the diagonal."""
    n, total = len(K), 0.0
    for start, stop in itertools.pairwise(n * place // BLOCKS for place in range(BLOCKS + 1)):
        product = K[start:stop] @ K[:, :stop] * K[start:stop, :stop]
        total = total + 2 * product[:, :start].sum() + product[:, start:].sum()
    return total


@cache
def _form(order: int, n: int) -> np.ndarray:
    """F with E[Tʳ] = f(A)ᵀ F f(B), r = order, for T = Σᵢⱼ Aᵢⱼ B_π(i)π(j), f the sums of `_GRAPHS`.

    Tʳ is a sum over 2r indices. Those of A that are equal are so of π, too: for each partition of the indices into v
    blocks of equal ones, E = M(A) M(B) / (n)_v, where M sums over v different images and (n)_v counts them. By Möbius
    inversion M is a combination of sums over images that may be equal, which are those of `_GRAPHS` or 0.
    """
    total = np.zeros((len(_GRAPHS[order]),) * 2)
    for blocks in _partitions(list(range(2 * order))):
        if len(blocks) <= n:
            M = _over_different(blocks, order)
            total += np.outer(M, M) / math.perm(n, len(blocks))
    return total


def _over_different(blocks: list[list[int]], order: int) -> np.ndarray:
    """M of one partition, in terms of the sums of `_GRAPHS`."""
    M = np.zeros(len(_GRAPHS[order]))
    for merged in _partitions(blocks):
        vertex = {index: place for place, parts in enumerate(merged) for part in parts for index in part}
        edges = [(vertex[2 * e], vertex[2 * e + 1]) for e in range(order)]
        degrees = np.bincount(np.ravel(edges), minlength=len(merged))
        graph = len(merged), sum(u == v for u, v in edges)
        if degrees.min() > 1 and graph in _GRAPHS[order]:
            sign = math.prod((-1) ** (len(parts) - 1) * math.factorial(len(parts) - 1) for parts in merged)
            M[_GRAPHS[order].index(graph)] += sign
    return M


def _partitions(things: list) -> Iterator[list[list]]:
    """All ways to put things into blocks."""
    if not things:
        yield []
        return
    for rest in _partitions(things[1:]):
        yield [[things[0]], *rest]
        for place, block in enumerate(rest):
            yield [*rest[:place], [things[0], *block], *rest[place + 1 :]]
