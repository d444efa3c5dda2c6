"""The convergence card: what to know of a comparison before believing it, in numbers.

How many dimensions the features have, what the biased estimator gives by chance at this number of images, how many
images would make the interval narrow enough, and by which invariance two measures may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from similarity.inputs import as_matrix, centered
from similarity.measures import MEASURES, chance
from similarity.recording import Recording


def effective_rank(X) -> float:
    """Participation ratio (Σλ)²/Σλ² of the covariance's eigenvalues: p for p equal ones, 1 for a single one.

    X : (n, p). From ‖XᵀX‖² = ‖XXᵀ‖² on the smaller side, without an eigendecomposition.
    """
    X = centered(as_matrix(X))
    product = X.T @ X if X.shape[1] <= len(X) else X @ X.T
    return float(torch.trace(product) ** 2 / (product * product).sum())


def effective_ranks(recording: Recording) -> pd.Series:
    """Of every site, in execution order; NaN for a constant one."""
    ranks = {}
    for name in recording.names:
        try:
            ranks[name] = effective_rank(recording.matrix(name))
        except ValueError:  # constant, or not finite: its cells in the planes say which
            ranks[name] = np.nan
    return pd.Series(ranks, name="effective_rank")


def biased_by_chance(n: int, rank_a: float, rank_b: float) -> float:
    """What biased linear CKA gives independent features of these effective ranks: √(pq)/√((n + p)(n + q))."""
    return chance("linear_cka", n, rank_a, rank_b, debiased=False)


def images_needed(n: int, se: float, half_width: float = 0.02, z: float = 1.96) -> float:
    """Images for a 95 % interval of ± half_width, from a standard error over n images that shrinks as 1/√n."""
    return n * (z * se / half_width) ** 2


def explain_difference(one: str, other: str) -> str:
    """Why two measures of `MEASURES` may disagree: the maps of the features that one of them ignores and not the other.

    Measures that ignore the same maps differ in how they weigh what is left.
    """
    words = {
        "permutation": "the order of features",
        "orthogonal": "rotations of the features",
        "scale": "their common scale",
        "translation": "shifts of their mean",
        "invertible": "any invertible linear map of the features",
    }

    def ignored(name: str) -> frozenset[str]:
        return MEASURES[name].invariances & MEASURES[name].invariances_y

    more = [words[kind] for kind in words if kind in ignored(one) - ignored(other)]
    less = [words[kind] for kind in words if kind in ignored(other) - ignored(one)]
    parts = []
    if more:
        parts.append(f"{MEASURES[one].label} ignores {_listed(more)}, {MEASURES[other].label} does not")
    if less:
        parts.append(f"{MEASURES[other].label} ignores {_listed(less)}, {MEASURES[one].label} does not")
    return "; ".join(parts) or "both ignore the same maps and differ only in how they weigh what is left"


def _listed(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
