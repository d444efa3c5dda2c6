"""The planes of many networks at once: each site's distances are made once, whatever pairs of networks use them.

`planes` and `matched_depth` ask about two networks; here their tables are cut out of one computation over the sites of
all. Which pairs are looked at is the caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from processing.matched_depth import Resampled
from processing.planes import IMBALANCE, PAIR, joined, relative_depths
from similarity import Recording, plane
from similarity.intervals import share_for, subsamples
from similarity.resampling import resampled_planes


@dataclass(frozen=True)
class Together:
    """Every value over all sites × all sites: `values[name]` (S, S), network by network in the order given.

    depths : network -> {site: relative depth}; places : network -> its rows
    """

    values: Mapping[str, np.ndarray]
    depths: Mapping[str, Mapping[str, float]]
    places: Mapping[str, slice]
    images: int
    k: int
    neighbours: int

    @classmethod
    def of(
        cls,
        recordings: Mapping[str, Recording],
        values: Mapping[str, np.ndarray],
        k: int,
        neighbours: int,
        depths: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Together:
        """Values of some recordings, with what is known of these."""
        where = {name: relative_depths(each, (depths or {}).get(name)) for name, each in recordings.items()}
        return cls(values, where, places_of(recordings), len(next(iter(recordings.values()))), k, neighbours)

    def table(self, a: str, b: str) -> pd.DataFrame:
        """The planes of two networks, as `planes.similarity_planes` gives them."""
        return self._pairs(a, b).assign(
            **{name: values.ravel() for name, values in self._cut(self.values, a, b).items()},
            k=self.k,
            n_images=self.images,
            neighbours=self.neighbours,
        )

    def _pairs(self, a: str, b: str) -> pd.DataFrame:
        rows = [(i, j, x, y) for i, x in self.depths[a].items() for j, y in self.depths[b].items()]
        lost = {name: self._lost(name) for name in (a, b)}
        notes = [lost[a].get(i) or lost[b].get(j, "") for i, j, *_ in rows]
        return pd.DataFrame(rows, columns=PAIR).assign(note=notes)

    def _lost(self, network: str) -> dict[str, str]:
        """Sites that have no number even with themselves."""
        own = np.diagonal(self.values[IMBALANCE])[self.places[network]]
        sites = self.depths[network]
        return {site: f"site {site!r} is constant, or not finite" for site, value in zip(sites, own) if np.isnan(value)}

    def _cut(self, values: Mapping[str, np.ndarray], a: str, b: str) -> dict[str, np.ndarray]:
        """The part of two networks: imbalance both ways (the last two axes A × B), the others as they are."""
        here, there = self.places[a], self.places[b]
        found = {"a_to_b": values[IMBALANCE][..., here, there]}
        found["b_to_a"] = values[IMBALANCE][..., there, here].swapaxes(-1, -2)
        return found | {name: each[..., here, there] for name, each in values.items() if name != IMBALANCE}

    def resampled(self, samples: np.ndarray, taken: int, a: str, b: str) -> Resampled:
        """What `matched_depth` asks of two networks, from planes of subsets of so many images, (resamples, S, S)."""
        parts = self._cut({IMBALANCE: samples}, a, b)
        parts["both"] = (parts["a_to_b"] + parts["b_to_a"]) / 2
        return Resampled(self.table(a, b), parts, self.images, taken)


def planes_together(
    recordings: Mapping[str, Recording],
    k: int = 1,
    *,
    neighbours: int = 10,
    depths: Mapping[str, Mapping[str, float]] | None = None,
    device: torch.device | str | None = None,
) -> Together:
    """Information imbalance by k neighbours, debiased linear CKA and mutual kNN between all sites of all networks.

    recordings : network -> its recording; rows are matched by image id
    depths : network -> relative depths of its sites, where not their places (see `planes.relative_depths`)
    """
    whole = _joined(recordings)
    made = plane(IMBALANCE, whole, device=device, k=k)
    values = {
        IMBALANCE: made.values,
        "linear_cka": plane("linear_cka", whole, device=device).values,
        "mutual_knn": plane("mutual_knn", whole, device=device, k=neighbours).values,
    }
    return Together.of(recordings, values, k, neighbours, depths)


def _joined(recordings: Mapping[str, Recording]) -> Recording:
    """By number: a network's name may hold what a site's name must not."""
    return joined({str(place): recording for place, recording in enumerate(recordings.values())})


def places_of(recordings: Mapping[str, Recording]) -> dict[str, slice]:
    """network -> the rows of its sites in the joined recording."""
    ends = np.cumsum([len(recording.names) for recording in recordings.values()]).tolist()
    return {name: slice(end - len(recordings[name].names), end) for name, end in zip(recordings, ends)}


def resampled_together(
    recordings: Mapping[str, Recording], k: int = 1, *, resamples: int = 40, seed: int = 0
) -> tuple[np.ndarray, int]:
    """((resamples, S, S) imbalances of halves of the images, how many images those hold), for `Together.resampled`."""
    whole = _joined(recordings)
    subsets = subsamples(len(whole), resamples=resamples, share=share_for(IMBALANCE), seed=seed)
    return resampled_planes(IMBALANCE, {"": (whole, whole)}, subsets, k=k)[""], len(subsets[0])


def named_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every unordered pair of networks, in the order given."""
    return [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
