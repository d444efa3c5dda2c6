"""Linear CKA in feature space: everything the estimators need is a sum over rows, so no n × n Gram is formed.

For X (n, p) and Y (n, q) with centred columns, a = row norms² of X and b those of Y:
    biased:   D(X, Y) = ‖XᵀY‖²_F
    debiased: D(X, Y) = ‖XᵀY‖²_F − n/(n − 2) · aᵀb + Σa Σb / ((n − 1)(n − 2))
and CKA = D(X, Y) / √(D(X, X) D(Y, Y)): exact, in O(n p q) time and O(p q) memory. `Moments` takes the rows in pieces,
however many there are, and adds up with the Moments of other processes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
import torch.distributed
from torch import Tensor

from similarity import memory
from similarity.inputs import SMALLEST_N, NotComputable, as_matrix, as_tensor, centered
from similarity.kernels import equally_similar

ROWS = 16_384  # taken in at a time
ROUNDING = 1e-13  # D(X, X) below this share of its terms is the rounding error of a difference of equal ones


# ------------------------------------------------------------------------------------------------- rows all in memory


def dot(X: Tensor, Y: Tensor, debiased: bool = True) -> Tensor:
    """D(X, Y) of two matrices with centred columns, float64: n(n − 3)·HSIC₁, or (n − 1)²·HSIC₀."""
    cross = torch.linalg.matrix_norm(X.T @ Y) ** 2
    if not debiased:
        return cross
    a, b = (X**2).sum(1), (Y**2).sum(1)
    return _debias(cross, a @ b, a.sum(), b.sum(), len(X))


def _debias(cross: Tensor, ab: Tensor, a: Tensor, b: Tensor, n: int) -> Tensor:
    return cross - n / (n - 2) * ab + a * b / ((n - 1) * (n - 2))


class FeatureSide:
    """One side's centred features and its own D(X, X): what a plane shares between its pairs."""

    def __init__(self, X, side: str = "X", debiased: bool = True):
        self.features, self.debiased = centered(as_matrix(X, side)), debiased
        self.norm = dot(self.features, self.features, debiased)
        if self.norm <= ROUNDING * (self.features**2).sum() ** 2:
            raise equally_similar(side)

    def permuted(self, rows: Tensor) -> FeatureSide:
        """The same side with its rows in another order; its own D does not change."""
        other = copy.copy(self)
        other.features = self.features[rows]
        return other

    def cka(self, other: FeatureSide) -> float:
        """Linear CKA with another side of the same rows."""
        if len(self.features) != len(other.features):
            raise ValueError(
                f"X has {len(self.features)} rows and Y has {len(other.features)}; rows must be the same images in "
                "the same order"
            )
        return float(dot(self.features, other.features, self.debiased) / torch.sqrt(self.norm * other.norm))


def linear_cka(X, Y, *, debiased: bool = True) -> float:
    """Linear CKA without Gram matrices; equal to `measures.linear_cka` to rounding."""
    return FeatureSide(X, "X", debiased).cka(FeatureSide(Y, "Y", debiased))


def are_cheaper(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether a plane of linear CKA costs less in feature space than by Gram matrices, in operations or in memory."""
    by_features, by_grams = _costs(left, right)
    device = next(iter(left.values())).device
    return by_features < by_grams or 2 * _gram_bytes(left, right) > memory.available_bytes(device)


def explain_choice(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> str:
    """One line that says why feature space was chosen."""
    by_features, by_grams = _costs(left, right)
    rows = len(next(iter(left.values())))
    return (
        f"linear CKA of {len(left)} × {len(right)} sites, {rows:,} rows: exact moments in feature space "
        f"({by_features / 1e9:.3g} G operations; Gram matrices would take {by_grams / 1e9:.3g} G and "
        f"{memory.size(_gram_bytes(left, right))})"
    )


def _costs(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> tuple[float, float]:
    """Multiply-adds (feature space, Gram matrices); feature space is in float64, twice as slow as float32."""
    n = len(next(iter(left.values())))
    p, q = ([X.shape[1] for X in side.values()] for side in (left, right))
    widths = p if right is left else p + q
    by_features = 2 * n * (sum(p) * sum(q) + sum(width**2 for width in widths))
    by_grams = n**2 / 2 * (sum(widths) + len(p) * len(q))  # half of each symmetric matrix is made
    return by_features, by_grams


def _gram_bytes(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> int:
    first = next(iter(left.values()))
    sites = len(left) if right is left else len(left) + len(right)
    return int(sites * len(first) ** 2 * 9 / 16 * max(first.dtype.itemsize, 4))


# --------------------------------------------------------------------------------------------------- rows in pieces


@dataclass
class Sums:
    """Sums over rows for two sites: of u = x − a shift of X and v = y − a shift of Y, with s = ‖u‖² and r = ‖v‖².

    n ; u (p,), v (q,), s (), r () ; C = Σ u vᵀ (p, q) ; t = Σ s v (q,) ; w = Σ r u (p,) ; z = Σ s r ()
    """

    n: Tensor
    u: Tensor
    v: Tensor
    s: Tensor
    r: Tensor
    C: Tensor
    t: Tensor
    w: Tensor
    z: Tensor

    def moved(self, d: Tensor, e: Tensor) -> Sums:
        """The same sums for u + d and v + e: their products, multiplied out."""
        n, dd, ee = self.n, d @ d, e @ e
        s = self.s + 2 * d @ self.u + n * dd
        r = self.r + 2 * e @ self.v + n * ee
        C = self.C + torch.outer(self.u, e) + torch.outer(d, self.v) + n * torch.outer(d, e)
        t = self.t + 2 * self.C.T @ d + dd * self.v + e * s
        w = self.w + 2 * self.C @ e + ee * self.u + d * r
        z = self.z + 2 * e @ self.t + 2 * d @ self.w + 4 * d @ self.C @ e + ee * (self.s + 2 * d @ self.u) + dd * r
        return Sums(n, self.u + n * d, self.v + n * e, s, r, C, t, w, z)

    def add(self, other: Sums) -> None:
        """Take in the sums of other rows, shifted alike."""
        for mine, theirs in zip(self.tensors(), other.tensors()):
            mine += theirs

    def tensors(self) -> list[Tensor]:
        """Every sum, always in the same order."""
        return [getattr(self, part.name) for part in fields(self)]

    def dot(self, debiased: bool) -> Tensor:
        """D(X, Y)."""
        central = self.moved(-self.u / self.n, -self.v / self.n)
        cross = (central.C**2).sum()
        return _debias(cross, central.z, central.s, central.r, self.n) if debiased else cross


class Moments:
    """Sums over rows that give the exact linear-CKA plane of the sites of A with those of B (or A with itself).

        sums = Moments()
        for batch in …:
            sums.update({"a1": X1, "a2": X2}, {"b1": Y1})  # (rows, p) each, the same rows in the same order
        values, notes = sums.cka()  # (2, 1), float64

    Memory is Σp × Σq numbers, whatever the number of rows. Everything is added up in float64; precision=torch.float32
    multiplies each update's rows in float32 before that, in half the time and to about 1e-6.
    """

    def __init__(self, precision: torch.dtype = torch.float64):
        self.precision = precision
        self.shifts: list[dict[str, Tensor]] = []  # of A's sites and of B's; any shift gives the same result
        self.rounding: list[dict[str, float]] = []  # of the features' own precision
        self.pairs: dict[tuple[str, str], Sums] = {}
        self.own: list[dict[str, Sums]] = []  # of A's sites with themselves, and of B's

    def update(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor] | None = None) -> None:
        """Add rows: {site: (rows, p)} of A, and of B unless it is A."""
        sides = [_checked(side) for side in ([left] if right is None else [left, right])]
        counts = {len(X) for side in sides for X in side.values()}
        if len(counts) != 1:
            raise ValueError(f"sites have {sorted(counts)} rows; rows must be the same images or positions")
        if not self.shifts:  # near the mean, the sums stay small
            self.shifts = [{name: X.mean(0, dtype=torch.float64) for name, X in side.items()} for side in sides]
            self.rounding = [{name: _rounding(X) for name, X in side.items()} for side in sides]
        self._refuse_other_sites([{name: X.shape[1] for name, X in side.items()} for side in sides])
        for start in range(0, counts.pop(), ROWS):
            self._add_rows([{name: X[start : start + ROWS] for name, X in side.items()} for side in sides])

    def _add_rows(self, sides: list[dict[str, Tensor]]) -> None:
        rows = [{name: X.double() - shift[name] for name, X in side.items()} for side, shift in zip(sides, self.shifts)]
        self._add(rows[0], rows[-1])
        for place, side in enumerate(rows):
            if place == len(self.own):
                self.own.append({})
            for name, U in side.items():
                s = (U**2).sum(1)
                self._take(self.own[place], name, self._sums(U, U, s, s, s @ U, s @ U, s @ s))

    def _add(self, left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
        """All pairs; what is shared between them is computed once."""
        S, R = (torch.stack([(X**2).sum(1) for X in side.values()], dim=1) for side in (left, right))
        T, W = {b: S.T @ V for b, V in right.items()}, {a: R.T @ U for a, U in left.items()}
        Z = S.T @ R
        for i, (a, U) in enumerate(left.items()):
            for j, (b, V) in enumerate(right.items()):
                self._take(self.pairs, (a, b), self._sums(U, V, S[:, i], R[:, j], T[b][i], W[a][j], Z[i, j]))

    def _sums(self, U: Tensor, V: Tensor, s: Tensor, r: Tensor, t: Tensor, w: Tensor, z: Tensor) -> Sums:
        C = (U.to(self.precision).T @ V.to(self.precision)).double()
        n = torch.tensor(float(len(U)), dtype=torch.float64, device=U.device)
        return Sums(n, U.sum(0), V.sum(0), s.sum(), r.sum(), C, t.clone(), w.clone(), z.clone())

    def _take(self, book: dict, key, sums: Sums) -> None:
        if key in book:
            book[key].add(sums)
        else:
            book[key] = sums

    def _refuse_other_sites(self, widths: list[dict[str, int]]) -> None:
        known = [{name: len(shift) for name, shift in side.items()} for side in self.shifts]
        if widths != known:
            raise ValueError(f"sites and widths are {widths}, but these Moments began with {known}")

    def merge(self, other: Moments) -> None:
        """Add the rows that another Moments has seen."""
        if not other.shifts:
            return
        if not self.shifts:
            self.__dict__ |= copy.deepcopy(other.__dict__) | {"precision": self.precision}
            return
        self._refuse_other_sites([{name: len(shift) for name, shift in side.items()} for side in other.shifts])
        other = other._shifted_by(self.shifts)
        for book, theirs in zip([self.pairs, *self.own], [other.pairs, *other.own]):
            for key, sums in theirs.items():
                book[key].add(sums)

    def _shifted_by(self, shifts: list[dict[str, Tensor]]) -> Moments:
        """The same sums about other shifts."""
        move = [{name: old[name] - new[name] for name in old} for old, new in zip(self.shifts, shifts)]
        moved = Moments(self.precision)
        moved.shifts = shifts
        moved.pairs = {(a, b): sums.moved(move[0][a], move[-1][b]) for (a, b), sums in self.pairs.items()}
        moved.own = [{a: sums.moved(d[a], d[a]) for a, sums in own.items()} for own, d in zip(self.own, move)]
        return moved

    def all_reduce(self, group=None) -> None:
        """Add up the Moments of all processes of a torch.distributed group; every process then holds the total.

        Every process must have seen rows; the shifts of the first one are used by all.
        """
        if not self.shifts:
            raise ValueError("this process has no rows yet; give every process some before all_reduce")
        shifts = [{name: shift.clone() for name, shift in side.items()} for side in self.shifts]
        first = torch.distributed.get_global_rank(group, 0) if group is not None else 0
        for side in shifts:
            for shift in side.values():
                torch.distributed.broadcast(shift, src=first, group=group)
        total = self._shifted_by(shifts)
        for book in (total.pairs, *total.own):
            for sums in book.values():
                for tensor in sums.tensors():
                    torch.distributed.all_reduce(tensor, group=group)
        self.shifts, self.pairs, self.own = total.shifts, total.pairs, total.own

    @property
    def n(self) -> int:
        """Rows seen."""
        return int(next(iter(self.pairs.values())).n) if self.pairs else 0

    def cka(self, *, debiased: bool = True) -> tuple[np.ndarray, dict[str, dict[str, str]]]:
        """(values (A's sites, B's sites), [{site of A: why it allows no number}, the same of B]); NaN at those."""
        if self.n < SMALLEST_N:
            raise NotComputable(f"{self.n} rows were seen; at least {SMALLEST_N} are needed")
        norms, notes = zip(*(self._norms(place, debiased) for place in range(len(self.own))))
        values = pd.DataFrame(np.nan, index=list(self.own[0]), columns=list(self.own[-1]))
        for (a, b), sums in self.pairs.items():
            if a in norms[0] and b in norms[-1]:
                values.loc[a, b] = float(sums.dot(debiased) / torch.sqrt(norms[0][a] * norms[-1][b]))
        return values.to_numpy(), [notes[0], notes[-1]]

    def _norms(self, place: int, debiased: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
        norms, notes = {}, {}
        for name, sums in self.own[place].items():
            mean, norm = self.shifts[place][name] + sums.u / sums.n, sums.dot(debiased)
            variance = sums.moved(-sums.u / sums.n, -sums.v / sums.n).s / sums.n
            if variance <= (32 * self.rounding[place][name]) ** 2 * (mean @ mean):
                notes[name] = f"{name} is constant: every row has the same features, so nothing can be compared"
            elif norm <= ROUNDING * (sums.n * variance) ** 2:
                notes[name] = str(equally_similar(name))
            else:
                norms[name] = norm
        return norms, notes


def _rounding(X: Tensor) -> float:
    """Relative rounding of the features; half precision is judged by float32's, as in `as_matrix`."""
    return min(torch.finfo(X.dtype).eps, torch.finfo(torch.float32).eps) if X.is_floating_point() else 0.0


def _checked(side: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{site: (rows, p)}, finite."""
    checked = {}
    for name, X in side.items():
        X = as_tensor(X, name)
        if X.ndim != 2:
            raise ValueError(f"{name} must be (rows, features), got shape {tuple(X.shape)}")
        if not torch.isfinite(X).all():
            raise NotComputable(f"{name} holds NaN or infinite values; look for the layer that overflows")
        checked[name] = X
    return checked
