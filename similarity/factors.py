"""What a matrix of similarities between items follows: groups that items share, or scores that are near each other.

For each factor a Mantel test (1967), and all factors in one multiple regression on distance matrices (Legendre,
Lapointe & Casgrain 1994; Lichstein 2007), with p by permuting the items. Entries of a matrix are not independent of
each other, its items are exchangeable where nothing is followed: so whole rows and columns move together. Questions
have a direction: p is of being *more* alike where the factor is higher. What the items are, this room does not know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

MOST_ENUMERATED = 5040  # 7!: of more orders of the items a sample is drawn
REACHED = 1e-9  # a correlation this near to the observed one counts as having reached it: the sum is another's rounding
VANISHED = 1e-20  # share of the squares left by the other factors, below which rounding is what is left
COLUMNS = ["factor", "items", "pairs", "same_pairs", "r", "p", "p_smallest", "p_holm", "difference", "null_low"]
COLUMNS += ["null_high", "coefficient", "p_partial", "p_partial_holm", "orders", "exact", "reason", "reason_partial"]


def same(values: Sequence) -> np.ndarray:
    """(K, K): 1 where two items have the same value, else 0."""
    _, codes = np.unique(np.asarray([str(value) for value in values]), return_inverse=True)
    return (codes[:, None] == codes[None, :]).astype(float)


def nearness(scores: Sequence[float]) -> np.ndarray:
    """(K, K): −|difference of two items' scores|, 0 where they are equal."""
    scores = np.asarray(scores, dtype=float)
    return -np.abs(scores[:, None] - scores[None, :])


def follows(
    similarity: np.ndarray, factors: Mapping[str, np.ndarray], *, permutations: int = 9999, seed: int = 0
) -> pd.DataFrame:
    """Does a symmetric (K, K) similarity follow each (K, K) factor? One row a factor; diagonals are not read.

    r : Pearson correlation over the K(K − 1)/2 pairs; p of reaching it when the items change places: the share of all
        K! orders where those are at most 5040 (`exact`), else (1 + #{≥}) / (1 + permutations)
    p_smallest : the p of a similarity that is the factor itself; no data can give less (orders that leave the factor as
        it is always reach it)
    difference : mean similarity of the `same_pairs` (those where a factor of 0 and 1 is 1; of other factors, those
        above their median) less that of the other pairs; null_low, null_high: where 95 % of the orders put it
    coefficient, p_partial : in the regression on all factors at once: of a factor of 0 and 1 the difference of its
        pairs with the others held fixed. p by double semi-partialling (Dekker, Krackhardt & Snijders 2007): what the
        others leave of the factor is what changes places, and its partial correlation is the statistic
    p_holm, p_partial_holm : corrected over the factors (Holm 1979)
    Where a number does not exist it is NaN, and `reason` or `reason_partial` says why.
    """
    similarity = _square(similarity, "similarity", None)
    given = {name: _square(factor, f"factor {name!r}", len(similarity)) for name, factor in factors.items()}
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    upper = np.triu_indices(len(similarity), 1)
    why = _no_test(similarity[upper])
    reasons = {name: why or _no_factor(factor[upper]) for name, factor in given.items()}
    usable = {name: factor for name, factor in given.items() if not reasons[name]}
    orders, exact = item_orders(len(similarity), permutations, seed)
    rows = {name: {"reason": reason, "reason_partial": ""} for name, reason in reasons.items()}
    for name, factor in usable.items():
        rows[name] |= _alone(similarity, factor, orders) | _among(similarity, usable, name, orders)
    table = pd.DataFrame([{"factor": name} | row for name, row in rows.items()]).reindex(columns=COLUMNS)
    table[["items", "pairs", "orders", "exact"]] = len(similarity), len(upper[0]), len(orders), exact
    return table.assign(p_holm=holm(table["p"]), p_partial_holm=holm(table["p_partial"]))


def item_orders(items: int, permutations: int, seed: int) -> tuple[np.ndarray, bool]:
    """((orders, items), whether they are all there are); the first is the order as it is."""
    if math.factorial(items) <= MOST_ENUMERATED:
        return np.array(list(itertools.permutations(range(items))), dtype=int).reshape(-1, items), True
    generator = np.random.default_rng(seed)
    drawn = generator.permuted(np.tile(np.arange(items), (permutations, 1)), axis=1)
    return np.concatenate([np.arange(items)[None], drawn]), False


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values corrected for their number, step-down (Holm 1979); NaN stays NaN and counts as no test."""
    p = np.asarray(p, dtype=float)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    corrected = np.full(p.shape, np.nan)
    scaled = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)  # a probability; no measure is cut
    return corrected


# ------------------------------------------------------------------------------------------------------------ the tests


def _alone(similarity: np.ndarray, factor: np.ndarray, orders: np.ndarray) -> dict[str, float]:
    """The Mantel test of one factor, and its difference."""
    upper = np.triu_indices(len(similarity), 1)
    moved, f = _in_orders(similarity, orders), factor[upper]
    r = _unit(moved) @ _unit(f)
    alike = f == 1 if set(np.unique(f)) <= {0.0, 1.0} else f > np.median(f)
    differences = moved[:, alike].mean(1) - moved[:, ~alike].mean(1) if alike.any() else np.full(len(moved), np.nan)
    low, high = np.quantile(differences, [0.025, 0.975])
    return {
        "same_pairs": int(alike.sum()),
        "r": r[0],
        "p": _share_reaching(r),
        "p_smallest": float((_in_orders(factor, orders) == f).all(1).mean()),
        "difference": differences[0],
        "null_low": low,
        "null_high": high,
    }


def _among(similarity: np.ndarray, factors: Mapping[str, np.ndarray], name: str, orders: np.ndarray) -> dict:
    """The factor's coefficient and p in the regression on all factors."""
    upper = np.triu_indices(len(similarity), 1)
    y, x = similarity[upper], factors[name][upper]
    others = [factor[upper] for other, factor in factors.items() if other != name]
    basis = _basis(np.column_stack([np.ones(len(y)), *others]))
    left_x, left_y = _without(x, basis), _without(y, basis)
    if _nothing_left(left_x, x):
        twins = [other for other in factors if other != name and _parallel(factors[other][upper], x)]
        which = f"{' and '.join(twins)} parts" if twins else "the other factors together part"
        return {"reason_partial": f"{which} the pairs in the same way"}
    if len(y) - basis.shape[1] - 1 < 1:
        return {"reason_partial": f"{len(y)} pairs are too few for {len(factors)} factors at once"}
    if _nothing_left(left_y, y):
        return {"reason_partial": "the other factors leave nothing of the similarity to explain"}
    square = np.zeros(similarity.shape)
    square[upper] = left_x
    moved = _without(_in_orders(square + square.T, orders), basis)
    squares = (moved**2).sum(1)
    partial = np.zeros(len(moved))  # an order that the other factors explain fully adds nothing to them
    there = squares > VANISHED * (left_x @ left_x)
    np.divide(moved @ left_y, np.sqrt(squares * (left_y @ left_y)), out=partial, where=there)
    return {"coefficient": left_x @ left_y / (left_x @ left_x), "p_partial": _share_reaching(partial)}


def _in_orders(matrix: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """(orders, pairs): the upper triangle with the items in each order."""
    i, j = np.triu_indices(len(matrix), 1)
    return matrix[orders[:, i], orders[:, j]]


def _share_reaching(values: np.ndarray) -> float:
    """Share of the orders, the given one among them, whose value is at least the given one's, the first."""
    return float((values >= values[0] - REACHED).mean())


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows centred, of norm 1."""
    centred = rows - rows.mean(-1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=-1, keepdims=True)


def _basis(columns: np.ndarray) -> np.ndarray:
    """Orthonormal basis of the columns' span; columns are scaled alike first."""
    U, s, _ = np.linalg.svd(columns / np.linalg.norm(columns, axis=0), full_matrices=False)
    return U[:, s > 1e-10 * s[0]]


def _without(rows: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """What the basis leaves of every row."""
    return rows - rows @ basis @ basis.T


def _nothing_left(left: np.ndarray, whole: np.ndarray) -> bool:
    centred = whole - whole.mean()
    return bool(left @ left <= VANISHED * (centred @ centred))


def _parallel(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(abs(_unit(one) @ _unit(other)) > 1 - 1e-12)


# ------------------------------------------------------------------------------------------------------ what is refused


def _square(matrix: np.ndarray, what: str, items: int | None) -> np.ndarray:
    """A symmetric float64 matrix, NaN allowed."""
    matrix = np.asarray(matrix, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) != (items or len(matrix)):
        wanted = f"({items}, {items}), as the similarity is" if items else "square"
        raise ValueError(f"{what} must be {wanted}; got shape {matrix.shape}")
    upper = np.triu_indices(len(matrix), 1)
    if not np.allclose(matrix[upper], matrix.T[upper], rtol=1e-9, atol=1e-12, equal_nan=True):
        raise ValueError(f"{what} is not symmetric; give the mean of both directions")
    return matrix


def _no_test(pairs: np.ndarray) -> str:
    """Why nothing can be asked of this similarity; '' where it can."""
    if len(pairs) < 3:
        return f"{len(pairs)} pair{'s'[: len(pairs) != 1]} of items: too few to correlate, three items are needed"
    if np.isnan(pairs).any():
        return f"{int(np.isnan(pairs).sum())} of {len(pairs)} pairs have no similarity"
    return "all pairs are equally similar" if np.ptp(pairs) == 0 else ""


def _no_factor(pairs: np.ndarray) -> str:
    """Why a factor cannot be asked about; '' where it can."""
    if np.isnan(pairs).any():
        return f"{int(np.isnan(pairs).sum())} of {len(pairs)} pairs have no value of this factor"
    return "the factor does not vary: all pairs are the same in it" if np.ptp(pairs) == 0 else ""
