"""What a measure scores by chance: the permutation null of a whole plane of sites × sites, sampled or in closed form.

One permutation of the images of B serves every pair of sites, so that maxima and means over pairs have nulls too.
Each site's work is done once: of Gram matrices, ranks of distances and bases only the order of the images changes.
This room says what chance does; what a similarity is worth beside other seeds and untrained twins is `calibration`.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from similarity.inputs import FewImages, NotComputable
from similarity.null_scorers import ROUNDING, one_measure, scorer
from similarity.plane import complete, match_rows, rows_an_image
from similarity.recording import Recording

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Null:
    """A plane and its null under permutations of the images of B.

    observed : (rows, columns) ; samples : (permutations, rows, columns), the k-th of all cells by one permutation.
    Both are NaN in cells that were not asked for or have no number; notes say why they have none.
    distance : small values are the similar ones: wherever the null is counted, <= takes the place of >=
    rounding : a null this far from reaching the observed value counts as having reached it
    """

    observed: np.ndarray
    samples: np.ndarray
    rows: list[str]
    columns: list[str]
    measure: str
    n_images: int
    distance: bool = False
    notes: dict[tuple[str, str], str] = field(default_factory=dict)
    rounding: float = ROUNDING[torch.float64]

    def p_values(self) -> np.ndarray:
        """(1 + #{null >= observed}) / (1 + permutations) of every cell by itself."""
        return self._p(self.observed, self.samples)

    def family_p(self) -> np.ndarray:
        """The same with the null's most similar cell of the whole plane in place of the cell's own null.

        The single-step procedure of Westfall & Young (1993): the probability that any cell falls below α by chance is
        at most α. Values are compared as they are: where chance alone scores high (biased estimators of wide sites),
        it takes more to stand out.
        """
        return self._p(self.observed, self._most_similar(self.samples, (1, 2))[:, None, None])

    def mean(self) -> np.ndarray:
        """Mean of every cell's null."""
        return self.samples.mean(0)

    def high(self, level: float = 0.95) -> np.ndarray:
        """The point that `level` of every cell's null stay below; of a distance, above."""
        return np.quantile(self.samples, self._upper(level), axis=0)

    def best_match(self) -> pd.DataFrame:
        """One row a site of A: site_a, site_b (its most similar site of B), value, p_value, p_best.

        p_value is the cell's own, which forgets that the site was chosen; p_best has the null of choosing: the most
        similar of B's sites under each permutation.
        """
        cells = np.where(np.isnan(self.observed), -np.inf, self._strength(self.observed))
        best, here = cells.argmax(1), np.arange(len(self.rows))
        value = self.observed[here, best]
        chosen = [None if np.isnan(v) else self.columns[j] for j, v in zip(best, value)]
        table = pd.DataFrame({"site_a": self.rows, "site_b": chosen, "value": value})
        table["p_value"] = self.p_values()[here, best]
        table["p_best"] = self._p(value, self._most_similar(self.samples, 2))
        return table

    def mean_over(self, pairs: Pairs) -> pd.Series:
        """observed, null_mean, null_sd, null_high (95 %), p_value of the mean over the given pairs; pairs: how many.

        Pairs without a number are left out; NotComputable where none is left.
        """
        places = [(_place(self.rows, a, "A"), _place(self.columns, b, "B")) for a, b in pairs]
        places = [place for place in places if not np.isnan(self.observed[place])]
        if not places:
            raise NotComputable(f"no pair of sites allows {self.measure}")
        i, j = np.array(places).T
        observed, samples = self.observed[i, j].mean(), self.samples[:, i, j].mean(1)
        return pd.Series(
            {
                "observed": observed,
                "null_mean": samples.mean(),
                "null_sd": samples.std(ddof=1) if len(samples) > 1 else math.nan,
                "null_high": np.quantile(samples, self._upper(0.95)),
                "p_value": float(self._p(observed, samples)),
                "pairs": len(places),
            }
        )

    def _upper(self, level: float) -> float:
        return 1 - level if self.distance else level

    def _strength(self, values: np.ndarray) -> np.ndarray:
        return -values if self.distance else values

    def _most_similar(self, samples: np.ndarray, axes: int | tuple) -> np.ndarray:
        """The most similar cell over some axes, cells without a number left out."""
        strength = np.where(np.isnan(samples), -np.inf, self._strength(samples)).max(axes)
        return self._strength(strength)

    def _p(self, observed: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """p of the observed values; samples have one axis more, the first."""
        reached = self._strength(samples) >= self._strength(observed) - self.rounding
        return np.where(np.isnan(observed), np.nan, (1 + reached.sum(0)) / (1 + len(samples)))


def plane_null(
    measure: str,
    A: Recording,
    B: Recording,
    *,
    pairs: Pairs | None = None,
    permutations: int = 200,
    seed: int = 0,
    **options,
) -> Null:
    """Permutation null of a measure over all sites of A × all sites of B, or over some pairs (site of A, site of B).

    Rows are matched by image id; one permutation of the images of B serves all pairs. Policies with several rows an
    image permute whole images: their rows are not independent of each other.
    Sites on which the measure cannot be computed are NaN, with notes. More memory than there is raises MemoryError.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    B = match_rows(A, B)
    known = one_measure(measure, options)
    options = complete(measure, options, A)
    asked = _asked(A, B, pairs)
    left = {a: A.matrix(a) for a, any_of_b in zip(A.names, asked.any(1)) if any_of_b}
    device = next(iter(left.values())).device
    right = {b: B.matrix(b).to(device) for b, any_of_a in zip(B.names, asked.any(0)) if any_of_a}
    here = np.ix_(asked.any(1), asked.any(0))
    scoring = scorer(known, left, right, options, asked[here], permutations)
    values = np.full((1 + permutations, *asked.shape), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImages)  # said where the observed plane is made
        for place, rows in enumerate(_orders(A, permutations, seed, f"null of {measure}")):
            values[place][here] = scoring.score(rows.to(device))
    values[:, ~asked | np.isnan(values).any(0)] = np.nan
    notes = {(a, b): note for (a, b), note in scoring.notes.items() if asked[A.names.index(a), B.names.index(b)]}
    return Null(
        values[0], values[1:], A.names, B.names, measure, len(A), known.distance, notes, ROUNDING[scoring.precision]
    )


def _asked(A: Recording, B: Recording, pairs: Pairs | None) -> np.ndarray:
    """(sites of A, sites of B): which cells were asked for."""
    if pairs is None:
        return np.ones((len(A.names), len(B.names)), dtype=bool)
    if not len(pairs):
        raise ValueError("pairs is empty; leave it out for all sites of A × all sites of B")
    asked = np.zeros((len(A.names), len(B.names)), dtype=bool)
    for a, b in pairs:
        asked[_place(A.names, a, "A"), _place(B.names, b, "B")] = True
    return asked


def _place(names: list[str], name: str, side: str) -> int:
    if name not in names:
        raise ValueError(f"{name!r} is no site of {side}; its sites are {', '.join(map(repr, names))}")
    return names.index(name)


def _orders(A: Recording, permutations: int, seed: int, what: str) -> Iterator[Tensor]:
    """Rows of B as they are, then by each permutation of the images, all rows of an image together."""
    generator, positions = np.random.default_rng(seed), rows_an_image(A)
    yield torch.arange(len(A) * positions)
    bar = tqdm(range(permutations), what, unit="permutation", leave=False, disable=None, file=sys.stderr)
    for _ in bar:
        order = generator.permutation(len(A))
        yield torch.as_tensor((order[:, None] * positions + np.arange(positions)).ravel())


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q-values of any shape: the false discovery rate at which each p would be called (Benjamini & Hochberg 1995).

    NaN stays NaN and counts as no test.
    """
    p = np.asarray(p, dtype=np.float64)
    tested = ~np.isnan(p)
    if ((p[tested] < 0) | (p[tested] > 1)).any():
        raise ValueError("p holds values outside [0, 1]; give p-values")
    order = np.argsort(p[tested])
    scaled = p[tested][order] * len(order) / np.arange(1, len(order) + 1)
    ordered, q = np.minimum.accumulate(scaled[::-1])[::-1], np.full(p.shape, np.nan)
    found = np.empty(len(order))
    found[order] = ordered
    q[tested] = found
    return q
