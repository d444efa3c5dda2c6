"""KernelSHAP as arithmetic: which coalitions of features to ask for, and the Shapley values that the answers give.

Lundberg and Lee 2017, theorem 2: Shapley values are the weighted least squares fit of an additive game to v, with
weights (M − 1) / (C(M, s) s (M − s)) for coalitions of s among M features, under v(none) and v(all) held exactly. The
constraint is built into the equations here, so that efficiency (the values sum to v(all) − v(none)) holds to rounding
and not by a large weight. It knows no model and no image.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import comb

import numpy as np

from utils import InputError


@dataclass(frozen=True)
class Fitted:
    """Shapley values (games, features) and their standard errors, of the same shape."""

    values: np.ndarray
    errors: np.ndarray


def coalitions(features: int, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(members (S, features) bool, weights (S,)): all coalitions when they are few enough, else a sample of them.

    With 2^features − 2 <= samples every coalition but none and all, with its Shapley kernel weight: the values are then
    exact. Else sizes are drawn in proportion to the kernel's total weight of a size, members evenly, and every
    coalition is followed by its complement (Covert and Lee 2021: the pairing removes all error from interactions of
    two features); their weights are equal. An odd number of samples is one less.
    """
    if features < 1 or samples < 1:
        raise InputError(f"KernelSHAP needs at least one feature and one sample, got {features} and {samples}")
    if complete(features, samples):
        return _every(features)
    if samples // 2 < features - 1:  # a coalition and its complement are one equation
        raise InputError(
            f"{samples} samples cannot tell {features} features apart; give at least {3 * features} samples, "
            f"better {8 * features}, or fewer features"
        )
    rng = np.random.default_rng(seed)
    sizes = np.arange(1, features // 2 + 1)  # the complement is of the other size
    chances = np.where(2 * sizes == features, 0.5, 1.0) / (sizes * (features - sizes))
    drawn, counts = np.unique(rng.choice(sizes, samples // 2, p=chances / chances.sum()), return_counts=True)
    half = np.concatenate([_evenly(features, size, count, rng) for size, count in zip(drawn, counts)])
    members = np.stack([half, ~half], 1).reshape(-1, features)
    return members, np.ones(len(members))


def _evenly(features: int, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, features): each a random coalition of that size; those cut from one order share no member.

    So no feature is asked for much more often than another, which about halves the variance at 8 samples a feature
    (measured on a saturating game of 49).
    """
    cuts = features // size
    orders = rng.permuted(np.tile(np.arange(features), (-(-count // cuts), 1)), axis=1)  # each feature's place in each
    parts = orders[:, None] // size == np.arange(cuts)[:, None]
    return parts.reshape(-1, features)[:count]


def complete(features: int, samples: int) -> bool:
    """Whether every coalition is asked for."""
    return features < 60 and 2**features - 2 <= samples


def asked(features: int, samples: int) -> int:
    """Values of coalitions that are needed: those of `coalitions`, and of none and all."""
    return (2**features - 2 if complete(features, samples) else samples // 2 * 2) + 2


def _every(features: int) -> tuple[np.ndarray, np.ndarray]:
    rows = list(itertools.product((False, True), repeat=features))[1:-1]
    members = np.array(rows, dtype=bool).reshape(len(rows), features)
    kernel = [(features - 1) / (comb(features, s) * s * (features - s)) for s in members.sum(1).tolist()]
    return members, np.array(kernel)


def shapley_values(
    members: np.ndarray, weights: np.ndarray, answers: np.ndarray, none: np.ndarray, everyone: np.ndarray
) -> Fitted:
    """Values of features from the answers (games, S) of `coalitions` and v(none), v(all), (games,); float64.

    The last feature's value is what the others leave of v(all) − v(none), so its column is taken off the equations.
    Standard errors are those of the least squares fit, where the game's higher interactions are the noise (on the large
    side: the even draw does better); 0 with all coalitions, nan where there are no more equations than features.
    """
    games, features = len(answers), members.shape[1]
    total = everyone - none
    if features == 1:
        return Fitted(total[:, None], np.zeros((games, 1)))
    table, scale = members.astype(np.float64), np.sqrt(weights)[:, None]
    design = scale * (table[:, :-1] - table[:, -1:])
    wanted = scale * (answers - none[:, None] - table[:, -1] * total[:, None]).T
    fitted, _, rank, _ = np.linalg.lstsq(design, wanted, rcond=None)
    if rank < features - 1:
        raise InputError(
            f"the {len(members)} coalitions drawn leave {features - 1 - rank} of {features} features undetermined; "
            f"give more samples, better {8 * features}, or another seed"
        )
    values = np.concatenate([fitted.T, total[:, None] - fitted.sum(0)[:, None]], axis=1)
    if len(members) == 2**features - 2:
        return Fitted(values, np.zeros_like(values))
    return Fitted(values, _standard_errors(design[::2], (wanted - design @ fitted).T))


def _standard_errors(design: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """(games, features) from one equation a pair, (S/2, features − 1), and the residuals (games, S) of both halves.

    A coalition and its complement are the same equation with two answers, of which the fit sees the mean.
    """
    pairs, unknown = design.shape
    if pairs == unknown:
        return np.full((len(residuals), unknown + 1), np.nan)
    noise = ((residuals[:, ::2] - residuals[:, 1::2]) / 2) ** 2  # the complement's equation has the other sign
    variance = noise.sum(1) / (pairs - unknown)
    spread = np.linalg.inv(design.T @ design)
    share = np.append(spread.diagonal(), spread.sum())  # the last value is minus the sum of the others
    return np.sqrt(variance[:, None] * share)
