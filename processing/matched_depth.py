"""How unlike are two networks at matched depth, and where along it most? Imbalances with intervals over images.

Which sites are matched is a rule fixed before looking, and no pair is chosen for being alike. The planes themselves,
and the test of best matches, stand in `planes`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pandas as pd

from processing.planes import IMBALANCE, Depths, Grid, grid, imbalance_planes, joined, weights_of
from similarity import Recording
from similarity.intervals import interval, share_for, standard_error, subsamples
from similarity.resampling import resampled_planes

DIRECTIONS = ("a_to_b", "b_to_a", "both")


@dataclass(frozen=True)
class Resampled:
    """The planes of all images, and those of subsets: `samples` of each value, (resamples, sites of A, sites of B)."""

    planes: pd.DataFrame
    samples: dict[str, np.ndarray]
    images: int
    taken: int

    def of(self, value: str) -> tuple[Grid, np.ndarray]:
        """One value, and its samples of the same sites."""
        one = grid(self.planes, value)
        sites_a, sites_b = (list(pd.unique(self.planes[name])) for name in ("site_a", "site_b"))
        kept = [sites_a.index(site) for site in one.sites_a], [sites_b.index(site) for site in one.sites_b]
        return one, self.samples[value][np.ix_(range(len(self.samples[value])), *kept)]


def resample(
    A: Recording,
    B: Recording,
    k: int = 1,
    *,
    depths_a: Depths | None = None,
    depths_b: Depths | None = None,
    resamples: int = 100,
    seed: int = 0,
) -> Resampled:
    """`imbalance_planes`, and the same on halves of the images without replacement (see `similarity.intervals`)."""
    subsets = subsamples(len(A), resamples=resamples, share=share_for(IMBALANCE), seed=seed)
    planes = imbalance_planes(A, B, k, depths_a=depths_a, depths_b=depths_b)
    both, count = joined({"A": A, "B": B}), len(A.names)
    found = resampled_planes(IMBALANCE, {"": (both, both)}, subsets, k=k)[""]
    samples = {"a_to_b": found[:, :count, count:], "b_to_a": found[:, count:, :count].swapaxes(1, 2)}
    samples["both"] = (samples["a_to_b"] + samples["b_to_a"]) / 2
    return Resampled(planes, samples, len(A), len(subsets[0]))


def matched_depth(resampled: Resampled, *, level: float = 0.95) -> pd.DataFrame:
    """How far apart are matched depths? For each direction and quantity: estimate, se, low, high over images.

    Matched are each site of A with the site of B nearest in relative depth, and each of B with that of A, every pair
    once (`pairs`): a rule fixed before looking. Quantities: 'matched' (mean imbalance of these), 'elsewhere' (of all
    other pairs), 'elsewhere − matched', and 'best match', the `distance` of `depth_test`. se by the delete-d jackknife
    over images (`similarity.intervals`); NaN where a subset of the images leaves no number.
    """
    rows = []
    for value in DIRECTIONS:
        one, samples = resampled.of(value)
        again = [quantities(dataclasses.replace(one, values=sample)) for sample in samples]
        for name, estimate in quantities(one).items():
            se = float(standard_error(np.array([each[name] for each in again]), resampled.images, resampled.taken))
            low, high = interval(estimate, se, level=level)
            row = {"value": value, "quantity": name, "pairs": int(one.matched().sum()), "estimate": estimate}
            rows.append(row | {"se": se, "low": low, "high": high, "n_images": resampled.images})
    return pd.DataFrame(rows)


def quantities(one: Grid) -> dict[str, float]:
    """The numbers of `matched_depth` of one value, without intervals."""
    matched = one.matched()
    near = float(one.values[matched].mean())
    far = float(one.values[~matched].mean()) if not matched.all() else np.nan
    distance = float((weights_of(one) * one.apart).sum())
    return {"matched": near, "elsewhere": far, "elsewhere − matched": far - near, "best match": distance}


def largest_difference(resampled: Resampled, *, level: float = 0.95) -> pd.DataFrame:
    """Where along the depth do the two differ most? For each direction the matched pair with the largest imbalance.

    depth : mean of the pair's two relative depths; of equal values the earlier pair
    depth_low, depth_high : where it falls in `level` of the subsets of the images. They hold fewer images than there
        are, so this is rather too wide than too narrow
    same : share of the subsets in which it is this pair
    """
    rows = []
    for value in DIRECTIONS:
        one, samples = resampled.of(value)
        i, j = np.nonzero(one.matched())
        depths = (one.depth_a[i] + one.depth_b[j]) / 2
        order = np.argsort(depths, kind="stable")
        i, j, depths = i[order], j[order], depths[order]
        here, again = one.values[i, j], samples[:, i, j]
        place, places = int(here.argmax()), again.argmax(1)
        found = np.where(np.isnan(again).any(1), np.nan, depths[places])
        low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
        row = {"value": value, "site_a": one.sites_a[i[place]], "site_b": one.sites_b[j[place]]}
        row |= {"depth": depths[place], "imbalance": here[place], "depth_low": low, "depth_high": high}
        rows.append(row | {"same": float((places == place).mean()), "n_images": resampled.images})
    return pd.DataFrame(rows)
