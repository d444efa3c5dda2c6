"""Finding the same image in another space: the nearest row, and the exact null of how often it is the right one."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np


def strictly_nearest(distances: np.ndarray) -> np.ndarray:
    """(n,) the column of the one smallest entry of each row, −1 where another is as small to float32 precision."""
    first, second = np.partition(distances, 1, axis=1)[:, :2].T
    alone = second - first > np.finfo(np.float32).eps * distances.max()
    return np.where(alone, distances.argmin(1), -1)


def hit_count(nearest: np.ndarray) -> int:
    return int((nearest == np.arange(len(nearest))).sum())


def permutation_p(nearest: np.ndarray) -> float:
    """P(at least as many images retrieved) over all n! orders of B's held-out images, exactly, without sampling.

    nearest : (n,) for every image the row of the other side nearest to it, −1 for none
    The maps saw the fit half only, so a permutation of the held-out images of B leaves every point where it is and
    relabels it: row j, nearest of m_j images, gets one of n labels and is a hit if it is one of those m_j. Images with
    the same nearest row are disjoint sets, so the chance that k given rows are all hits is Π m_j · (n − k)!/n!, and by
    inclusion and exclusion P(T ≥ t) = Σ_{k ≥ t} (−1)^(k−t) C(k−1, t−1) e_k(m) (n − k)!/n!, e_k the elementary symmetric
    polynomials. In whole numbers; rounded once, so that a p below the smallest float64 (1e-323) is 0.0.
    """
    n, hits = len(nearest), hit_count(nearest)
    if hits == 0:
        return 1.0
    e = _elementary(np.unique(nearest[nearest >= 0], return_counts=True)[1].tolist())
    ways, total, sign = math.factorial(n - hits), 0, 1
    for k in range(hits, len(e)):
        total += sign * math.comb(k - 1, hits - 1) * e[k] * ways
        ways, sign = ways // max(n - k, 1), -sign
    return total / math.factorial(n)


def _elementary(numbers: list[int]) -> list[int]:
    """e_0, e_1, … of whole numbers: the coefficients of Π (1 + m x), equal m taken together."""
    product = np.array([1], dtype=object)
    for m, times in Counter(numbers).items():
        product = np.convolve(product, np.array([math.comb(times, k) * m**k for k in range(times + 1)], dtype=object))
    return product.tolist()
