"""Intervals over images: how far a similarity would move had other images of the same kind been drawn.

The delete-d jackknife (Shao & Wu 1989; Politis & Romano 1994): draw subsets of m = share·n images *without*
replacement, compute the similarity of each, and take se = √(m/(n − m)) · (standard deviation over the subsets), which
for a mean is s/√n. A bootstrap would draw images twice; the two copies are perfectly similar on both sides and put
ones beside the diagonal of a Gram matrix, which is what U-statistics such as debiased CKA leave out. Here no image
comes twice, whatever the measure. One image's several rows stay together.

What the interval is for: the estimator's expectation at this n. And it speaks of a similarity that is there: of two
independent sides a debiased statistic is degenerate (its first-order terms vanish, and a jackknife that scales by the
first order is then too wide), so whether there is any similarity is decided by the null (`nulls`), not by whether
an interval holds zero. Over seeds of an architecture the variance is a plain jackknife; `combine` adds the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from similarity.inputs import SMALLEST_N
from similarity.measures import lookup

SHARE = 0.8  # of the images in a subset
# Canonical correlations and neighbours answer to a deletion beyond its share of the images: the standard error is up to
# 1.4 times too large from subsets of 80 %, 1.2 times from halves (tests/test_interval_coverage.py).
HALVES = ("cca", "svcca", "pwcca", "mutual_knn", "cknna", "information_imbalance")
FEWEST_IMAGES = 20  # of fewer, subsets are too alike and too small to say anything


# ------------------------------------------------------------------------------------------------------ over images


def subsamples(n: int, *, resamples: int = 100, share: float = SHARE, seed: int = 0) -> list[np.ndarray]:
    """Sorted positions of round(share·n) of n images without replacement, so many times."""
    if n < FEWEST_IMAGES:
        raise ValueError(f"{n} images are too few for an interval over images; at least {FEWEST_IMAGES} are needed")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2 to have a spread, got {resamples}")
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1 (of the images, without replacement), got {share}")
    m = round(share * n)
    if not SMALLEST_N <= m < n:
        raise ValueError(f"share {share} of {n} images is {m}; choose one that keeps {SMALLEST_N} to {n - 1} images")
    generator = np.random.default_rng(seed)
    return [np.sort(generator.choice(n, m, replace=False)) for _ in range(resamples)]


def share_for(measure: str, **options) -> float:
    """The share of images in a subset from which the measure's standard error is best, as simulations have it.

    Not halves for SVCCA of so many `components`: fewer images interchange components of similar variance. Halves of few
    images make canonical correlations 1 by construction, and their spread 0: n/2 has to be well above p + q.
    """
    lookup(measure, options)
    return 0.5 if measure in HALVES and options.get("components") is None else SHARE


def standard_error(samples: np.ndarray, n: int, m: int) -> np.ndarray:
    """√(m/(n − m)) · standard deviation over axis 0 of a statistic on subsets of m of n images (Shao & Wu 1989, eq. 2).

    Any statistic of the resampled planes will do: compute it for every resample, and give the results. The variance
    over the subsets drawn is divided by their number − 1, and so unbiased for that over all subsets. NaN where the
    statistic was not computable on some subset.
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} resamples have no spread; give at least 2")
    if not 0 < m < n:
        raise ValueError(f"subsets must hold fewer images than there are, got m = {m} of n = {n}")
    return math.sqrt(m / (n - m)) * np.std(samples, axis=0, ddof=1)


def interval(value, se, *, df=math.inf, level: float = 0.95) -> tuple:
    """value ∓ quantile · se: (low, high) that covers at `level`, of the normal, or Student's t of df degrees."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    reach = stats.t.ppf((1 + level) / 2, df) * se
    return value - reach, value + reach


# --------------------------------------------------------------------------------------------------- and over seeds


def seed_variance(leave_one_out: Sequence[float] | Sequence[np.ndarray]) -> float | np.ndarray:
    """(k − 1)/k · Σ (v − v̄)², v the statistic without each of the k seeds of one architecture in turn (Tukey 1958).

    Numbers, or arrays of one shape: then of every entry.
    """
    values = np.asarray(leave_one_out, dtype=float)
    if values.ndim == 0 or len(values) < 2:
        raise ValueError(f"a variance over seeds needs one value for each of at least 2 seeds, got {leave_one_out!r}")
    variance = (len(values) - 1) / len(values) * ((values - values.mean(0)) ** 2).sum(0)
    return variance if variance.ndim else float(variance)


def combine(image_se, seed_variances: Sequence[float], counts: Sequence[int]) -> tuple:
    """(se, df) over images and over the seeds of each architecture: variances add.

    df by Satterthwaite (1946), (Σ v)² / Σ (v²/df of v), where images count as having infinitely many and an
    architecture of k seeds k − 1; infinite where no seed varies. Numbers, or arrays of one shape.
    """
    if len(seed_variances) != len(counts):
        raise ValueError(f"{len(seed_variances)} variances over seeds but {len(counts)} counts of seeds; give one each")
    if any(count < 2 for count in counts):
        raise ValueError(f"a variance over seeds needs at least 2 seeds an architecture, got {list(counts)}")
    variances = [np.asarray(variance, dtype=float) for variance in seed_variances]
    total = np.asarray(image_se, dtype=float) ** 2 + sum(variances)
    uncertain = np.asarray(sum(v**2 / (k - 1) for v, k in zip(variances, counts)), dtype=float)
    df = np.full(np.broadcast_shapes(total.shape, uncertain.shape), math.inf)
    np.divide(total**2, uncertain, out=df, where=uncertain != 0)
    return (np.sqrt(total), df) if df.ndim else (math.sqrt(total), float(df))
