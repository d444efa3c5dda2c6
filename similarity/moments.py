"""Linear CKA in feature space: everything the estimators need is a sum over rows, so no n × n Gram is formed.

For X (n, p) and Y (n, q) with centred columns, a = row norms² of X and b those of Y:
    biased:   D(X, Y) = ‖XᵀY‖²_F
    debiased: D(X, Y) = ‖XᵀY‖²_F − n/(n − 2) · aᵀb + Σa Σb / ((n − 1)(n − 2))
and CKA = D(X, Y) / √(D(X, X) D(Y, Y)): exact, in O(n p q) time and O(p q) memory. `Moments` takes the rows in pieces,
however many there are, and adds up with the Moments of other processes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from similarity import memory
from similarity.inputs import SMALLEST_N, NotComputable, as_matrix, as_tensor, centered, relative_rounding
from similarity.kernels import equally_similar

ROWS = 4096  # taken in at a time
Place = tuple[int, str]  # (0 for A or 1 for B, name of the site)
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
    return int(sites * len(first) ** 2 * 5 / 8 * max(first.dtype.itemsize, 4))


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
        theirs = other.tensors()
        for name, mine in self.tensors().items():
            mine += theirs[name]

    def tensors(self) -> dict[str, Tensor]:
        """Every sum by its name, always in the same order."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

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
    multiplies each update's rows in float32 before that, in 50 to 60 % of the time and to 2e-6.
    """

    def __init__(self, precision: torch.dtype = torch.float64):
        self.precision = precision
        self.sides = 0  # 1: A with itself; 2: A with B. Below, a site is (side, name)
        self.shifts: dict[Place, Tensor] = {}  # taken off every row; any shift gives the same result
        self.rounding: dict[Place, float] = {}  # of the features' own precision
        self.pairs: dict[tuple[Place, Place], Sums] = {}  # A × B and every site with itself

    def update(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor] | None = None) -> None:
        """Add rows: {site: (rows, p)} of A, and of B unless it is A."""
        sides = [left] if right is None else [left, right]
        self.update_checked(*({name: checked(X, name) for name, X in side.items()} for side in sides))

    def update_checked(self, *sides: Mapping[str, Tensor]) -> None:
        """Add rows of A, and of B unless it is A, that are as `checked` gives them."""
        rows = {(place, name): X for place, side in enumerate(sides) for name, X in side.items()}
        counts = {len(X) for X in rows.values()}
        if len(counts) != 1:
            raise ValueError(f"sites have {sorted(counts)} rows; rows must be the same images or positions")
        if counts == {0}:
            return  # there is no mean to shift by
        if not self.sides:
            self.sides = len(sides)
            self.shifts = {site: X.mean(0, dtype=torch.float64) for site, X in rows.items()}  # small sums near the mean
            self.rounding = {site: relative_rounding(X) for site, X in rows.items()}
        self._refuse_other_sites({site: X.shape[1] for site, X in rows.items()})
        for start in range(0, counts.pop(), ROWS):
            self._add({site: X[start : start + ROWS].double() - self.shifts[site] for site, X in rows.items()})

    def _add(self, rows: dict[Place, Tensor]) -> None:
        """All pairs; what is shared between them is computed once."""
        sites = list(rows)
        totals = {site: U.sum(0) for site, U in rows.items()}
        S = torch.stack([torch.linalg.vector_norm(U, dim=1) ** 2 for U in rows.values()], dim=1)  # (rows, sites)
        norms, T, Z = S.sum(0), {site: S.T @ U for site, U in rows.items()}, S.T @ S
        factors = {site: U.to(self.precision) for site, U in rows.items()}
        n = torch.tensor(float(len(S)), dtype=torch.float64, device=S.device)
        for x, y in self._wanted(sites):
            i, j = sites.index(x), sites.index(y)
            C = (factors[x].T @ factors[y]).double()
            sums = Sums(n, totals[x], totals[y], norms[i], norms[j], C, T[y][i], T[x][j], Z[i, j])
            if (x, y) in self.pairs:
                self.pairs[x, y].add(sums)
            else:
                self.pairs[x, y] = Sums(*(each.clone() for each in sums.tensors().values()))  # they are shared

    def _wanted(self, sites: list[Place]) -> list[tuple[Place, Place]]:
        if self.sides == 1:
            return list(itertools.combinations_with_replacement(sites, 2))
        left, right = ([site for site in sites if site[0] == place] for place in (0, 1))
        return [*itertools.product(left, right), *((site, site) for site in sites)]

    def _refuse_other_sites(self, widths: dict[Place, int]) -> None:
        known = {site: len(shift) for site, shift in self.shifts.items()}
        if widths != known:
            raise ValueError(f"sites and widths are {_told(widths)}, but these Moments began with {_told(known)}")

    def merge(self, other: Moments) -> None:
        """Add the rows that another Moments has seen."""
        if not other.sides:
            return
        if not self.sides:
            self.__dict__ |= copy.deepcopy(other.__dict__) | {"precision": self.precision}
            return
        self._refuse_other_sites({site: len(shift) for site, shift in other.shifts.items()})
        for pair, sums in other._about(self.shifts).items():
            self.pairs[pair].add(sums)

    def _about(self, shifts: dict[Place, Tensor]) -> dict[tuple[Place, Place], Sums]:
        """The same sums about other shifts."""
        step = {site: self.shifts[site] - shifts[site] for site in shifts}
        return {(x, y): sums.moved(step[x], step[y]) for (x, y), sums in self.pairs.items()}

    def all_reduce(self, group=None) -> None:
        """Add up the Moments of all processes of a torch.distributed group; every process then holds the total.

        Every process must have seen rows, each its own: an image given to two processes counts twice.
        """
        if not self.sides:
            raise ValueError("this process has no rows yet; give every process some before all_reduce")
        self._refuse_other_order(group)
        shifts = {site: shift.clone() for site, shift in self.shifts.items()}
        first = torch.distributed.get_global_rank(group, 0) if group is not None else 0
        for shift in shifts.values():
            torch.distributed.broadcast(shift, src=first, group=group)
        self.pairs, self.shifts = self._about(shifts), shifts
        for sums in self.pairs.values():
            for name, tensor in sums.tensors().items():
                total = tensor.clone()  # counts are shared between pairs
                torch.distributed.all_reduce(total, group=group)
                setattr(sums, name, total)

    def _refuse_other_order(self, group) -> None:
        """Sums are added up in order of the sites, which must therefore be the same in every process."""
        mine = [(site, len(shift)) for site, shift in self.shifts.items()]
        everyone = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(everyone, mine, group=group)
        for process, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                raise ValueError(
                    f"process 0 has the sites {_told(dict(everyone[0]))}, process {process} {_told(dict(theirs))}; "
                    "give every process the same sites in the same order"
                )

    @property
    def n(self) -> int:
        """Rows seen."""
        return int(next(iter(self.pairs.values())).n) if self.pairs else 0

    def cka(self, *, debiased: bool = True) -> tuple[np.ndarray, list[dict[str, str]]]:
        """(values (A's sites, B's sites), [{site of A: why it allows no number}, the same of B]); NaN at those."""
        if self.n < SMALLEST_N:
            raise NotComputable(f"{self.n} rows were seen; at least {SMALLEST_N} are needed")
        norms, reasons = {}, {}
        for site in self.shifts:
            norms[site], reasons[site] = self._norm(site, debiased)
        sides = [[site for site in self.shifts if site[0] == place] for place in (0, self.sides - 1)]
        values = np.full([len(side) for side in sides], np.nan)
        for (i, x), (j, y) in itertools.product(*(enumerate(side) for side in sides)):
            if not reasons[x] and not reasons[y]:
                sums = self.pairs[x, y] if (x, y) in self.pairs else self.pairs[y, x]
                values[i, j] = float(sums.dot(debiased) / torch.sqrt(norms[x] * norms[y]))
        return values, [{name: reasons[place, name] for place, name in side if reasons[place, name]} for side in sides]

    def _norm(self, site: Place, debiased: bool) -> tuple[Tensor, str]:
        """(D(X, X), '' or why it allows no number)."""
        sums = self.pairs[site, site]
        norm, mean = sums.dot(debiased), self.shifts[site] + sums.u / sums.n
        variance = sums.moved(-sums.u / sums.n, -sums.v / sums.n).s / sums.n
        if variance <= (32 * self.rounding[site]) ** 2 * (mean @ mean):
            return norm, f"{site[1]} is constant: every row has the same features, so nothing can be compared"
        return norm, str(equally_similar(site[1])) if norm <= ROUNDING * (sums.n * variance) ** 2 else ""


def _told(widths: dict[Place, int]) -> str:
    """'a1 of A: 12, b1 of B: 5'."""
    return ", ".join(f"{name} of {'AB'[side]}: {width}" for (side, name), width in widths.items())


def checked(X: Tensor, name: str) -> Tensor:
    """(rows, p), finite."""
    X = as_tensor(X, name)
    if X.ndim != 2:
        raise ValueError(f"{name} must be (rows, features), got shape {tuple(X.shape)}")
    if X.numel() and not (torch.isfinite(X.amin()) and torch.isfinite(X.amax())):
        raise NotComputable(f"{name} holds NaN or infinite values; look for the layer that overflows")
    return X
