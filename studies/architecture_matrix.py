"""Every architecture against every other, with the ruler: how similar, how deep, and what the similarity follows.

From recordings of trained networks and their untrained twins to three tables; who trained and recorded them is not the
subject here, the words are in `architecture_words`, and the picture is `matrix_figures`. Between two architectures
sites are paired by matched relative depth. The matching of A's sites to B's may differ from that of B's to A's: both
directions' pairs are taken together, a pair that comes in both counting twice, so that every number is the same either
way round.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from similarity import Recording, calibration, intervals
from similarity.calibration import Comparison, Resamples, matched_depth_pairs
from similarity.measures import MEASURES
from similarity.nulls import Null, benjamini_hochberg, plane_null
from similarity.policies import canonical
from similarity.resampling import resampled_planes
from studies import ruler
from studies.architecture_words import what_it_follows
from utils import InputError, closest, progress

MEASURE, OPTIONS = ruler.ESTIMATORS[ruler.HEADLINE]
STATES = ("trained", "untrained")
FACTS = ("label", "title", "family", "encoder", "pretrained", "iou")
KEPT = [f"{name}{end}" for name in calibration.QUANTITIES for end in ("", "_low", "_high")]
Name = tuple[str, int, str]  # label, seed, state
Pairs = list[tuple[str, str]]


def compare(
    networks: Mapping[Name, Recording],
    facts: pd.DataFrame,
    *,
    resamples: int,
    permutations: int,
    seed: int,
    image_permutations: int = 99,
    bins: int = 4,
) -> dict[str, pd.DataFrame]:
    """The tables `matrix`, `depth` and `factors` of debiased linear CKA.

    networks : {(label, seed, 'trained' or 'untrained'): recording under 'gap'}, all of the same images
    facts : one row a label: label, title, family, encoder, pretrained (bool), iou (task score, mean over seeds)
    resamples : subsets of the images for the intervals; permutations : orders of the labels for the factors (all of
        them, where there are few); image_permutations : for the null of a label pair, of its first seeds
    matrix : one row an unordered pair of labels and part: label_a, label_b, part, similarity, floor, ceiling, u, each
        with _low and _high, null_mean, null_high, p_value, verdict, note. label_a = label_b: own seeds (the ceiling)
    depth : the same within `bins` equal parts of relative depth (that of a pair of sites is the mean of its two);
        relative_depth is the middle of the bin; bins that no pair falls in have no row
    factors : `factors.follows` by part and quantity (similarity, u, floor); left_out: labels that have no number
    """
    labels, parts = check(networks, facts)
    if bins < 1:
        raise InputError(f"bins must be at least 1, got {bins}")
    tables: dict[str, list] = {"matrix": [], "depth": []}
    for part in parts:
        found = _Part(networks, labels, part, resamples, seed)
        nulls = found.nulls(image_permutations)
        for a, b in progress(_label_pairs(labels), desc=f"{part}s on the ruler", unit="pair"):
            first = {"label_a": a, "label_b": b, "part": part}
            tables["matrix"].append(first | found.line(a, b, nulls))
            tables["depth"] += [first | line for line in found.by_depth(a, b, bins)]
    made = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    made["matrix"]["q_value"] = benjamini_hochberg(made["matrix"]["p_value"])
    return made | {"factors": what_it_follows(made["matrix"], facts, permutations=permutations, seed=seed)}


def _label_pairs(labels: list[str]) -> list[tuple[str, str]]:
    return list(itertools.combinations_with_replacement(labels, 2))


# ----------------------------------------------------------------------------------------------------------- one part


class _Part:
    """The encoders, or the decoders, of all networks: one plane of all their sites for all images and every subset.

    One plane instead of one for each two networks: every Gram matrix is made once, and their products are one.
    """

    def __init__(self, networks: Mapping[Name, Recording], labels: list[str], part: str, resamples: int, seed: int):
        ids = next(iter(networks.values())).ids
        self.sides = {name: recording.select(part=part, ids=ids) for name, recording in networks.items()}
        self.seed, self.images = seed, len(ids)
        self.seeds = {label: sorted({s for one, s, _ in networks if one == label}) for label in labels}
        self.twins = {label: (label, self.seeds[label][0], "untrained") in networks for label in labels}
        share = intervals.share_for(MEASURE, **OPTIONS)
        subsets = intervals.subsamples(len(ids), resamples=resamples, share=share, seed=seed)
        self.taken = len(subsets[0])
        self.compared = {state: self._compared(labels, state) for state in STATES}
        every = [np.arange(len(ids)), *subsets]  # the first 'subset' is all images: what is observed
        self.planes = {state: self._planes(state, every) for state in STATES if self.compared[state]}

    def _compared(self, labels: list[str], state: str) -> list[tuple[Name, Name]]:
        """The networks of a state that are compared: all seeds of one label with all of another, each two of one."""
        found = []
        for a, b in _label_pairs(labels):
            several = list(itertools.product(self.seeds[a], self.seeds[b]))
            # at one seed the same encoder starts from the same weights and sees the same order of images
            apart = [(i, j) for i, j in several if i != j] or several
            seeds = apart if a != b else itertools.combinations(self.seeds[a], 2)
            found += [((a, i, state), (b, j, state)) for i, j in seeds]
        return [both for both in found if self.sides.keys() >= set(both)]

    def _planes(self, state: str, subsets: list[np.ndarray]) -> dict[tuple[Name, Name], np.ndarray]:
        """(network, network) -> (subsets, sites, sites)."""
        together, places = merged({name: side for name, side in self.sides.items() if name[2] == state})
        pairs = [pair for one, other in self.compared[state] for pair in self._named_pairs(one, other)]
        planes = resampled_planes(MEASURE, {state: (together, together)}, subsets, pairs={state: pairs}, **OPTIONS)
        return {(one, other): planes[state][:, places[one], places[other]] for one, other in self.compared[state]}

    def _named_pairs(self, one: Name, other: Name) -> Pairs:
        """The pairs of sites of two networks by their names in a merged recording."""
        return [(site_of(one, a), site_of(other, b)) for a, b in self.pairs(one[0], other[0])]

    def network(self, label: str, place: int = 0) -> Name:
        """The first trained network of a label, or another."""
        return label, self.seeds[label][place], "trained"

    def other(self, a: str, b: str) -> Name:
        """The first trained network of `b` that has another seed than the first of `a`; its first, where none has."""
        return self.network(b, int(self.seeds[b][0] == self.seeds[a][0] and len(self.seeds[b]) > 1))

    def pairs(self, a: str, b: str) -> Pairs:
        """Pairs of sites: of one label each site with itself, of two by matched depth in both directions."""
        A, B = (self.sides[self.network(label)] for label in (a, b))
        if a == b:
            return [(name, name) for name in A.names]
        return matched_depth_pairs(A, B) + [(x, y) for y, x in matched_depth_pairs(B, A)]

    def comparison(self, a: str, b: str, samples: int | slice) -> Comparison:
        """The ruler's planes of two labels (of one: of its pairs of seeds), of all images or of the subsets."""

        def planes(one: str, other: str, state: str) -> dict:
            found = self.planes.get(state, {}).items()
            return {(x[1], y[1]): v[samples] for (x, y), v in found if (x[0], y[0]) == (one, other)}

        return Comparison(
            *(self.sides[self.network(label)].names for label in (a, b)),
            planes(a, b, "trained"),
            planes(a, a, "trained"),
            planes(b, b, "trained"),
            planes(a, b, "untrained"),
            distance=MEASURES[MEASURE].distance,
        )

    def nulls(self, permutations: int) -> Callable[[str, str], Null]:
        """(label, label) -> the permutation null of their first networks; of one label of its first two seeds.

        One permutation of the images serves all labels.
        """
        labels = list(self.seeds)
        several = [label for label in labels if len(self.seeds[label]) > 1]
        first = {self.network(label): self.sides[self.network(label)] for label in labels}
        second = {self.network(label, 1): self.sides[self.network(label, 1)] for label in several}
        (A, rows), (B, columns) = merged(first), merged(first | second)
        both = [(self.network(a), self.other(a, b)) for a, b in _label_pairs(labels) if a != b or b in several]
        pairs = [pair for one, other in both for pair in self._named_pairs(one, other)]
        null = plane_null(MEASURE, A, B, pairs=pairs, permutations=permutations, seed=self.seed, **OPTIONS)

        def of(a: str, b: str) -> Null:
            one, other = self.network(a), self.other(a, b)
            here = (..., rows[one], columns[other])
            names = {"rows": self.sides[one].names, "columns": self.sides[other].names}
            return dataclasses.replace(
                null, observed=null.observed[here], samples=null.samples[here], notes={}, **names
            )

        return of

    def line(self, a: str, b: str, null_of: Callable[[str, str], Null]) -> dict:
        """The row of a pair of labels, without their names."""
        numbers = [*KEPT, "null_mean", "null_high", "p_value"]
        if a == b and len(self.seeds[a]) == 1:
            empty = dict.fromkeys(numbers, np.nan) | {"verdict": "no number", "site_pairs": 0, "network_pairs": 0}
            return empty | {"n_images": self.images, "note": self._note(a, b)}
        pairs, observed = self.pairs(a, b), self.comparison(a, b, 0)
        again = Resamples(self.comparison(a, b, slice(1, None)), self.images, self.taken)
        line = ruler.summarize(observed, again, null_of(a, b), pairs)
        if a == b and line["site_pairs"]:
            line |= own_intervals(observed, again, ruler.usable(observed, pairs))
            line["interval_over"] = "images and seeds" if len(self.seeds[a]) > 2 else "images"
        more = ("verdict", "site_pairs", "site_pairs_left_out", "network_pairs", "n_images", "interval_over")
        return {name: line[name] for name in (*numbers, *more)} | {"note": self._note(a, b)}

    def by_depth(self, a: str, b: str, bins: int) -> list[dict]:
        """A row for each bin of relative depth in which a pair of sites falls."""
        if a == b and len(self.seeds[a]) == 1:
            return []
        pairs, observed = self.pairs(a, b), self.comparison(a, b, 0)
        again = Resamples(self.comparison(a, b, slice(1, None)), self.images, self.taken)
        with_intervals = own_intervals if a == b else calibration.with_intervals
        rows = []
        for middle, inside in binned(pairs, observed.rows, observed.columns, bins).items():
            chosen = ruler.usable(observed, inside)
            values = with_intervals(observed, again, chosen) if chosen else dict.fromkeys(KEPT, np.nan)
            kept = {name: float(values[name]) for name in KEPT}
            rows.append({"relative_depth": middle} | kept | {"site_pairs": len(chosen)})
        return rows

    def _note(self, a: str, b: str) -> str:
        """Why floor, ceiling or u are missing."""
        labels = dict.fromkeys((a, b))
        single = [f"{label!r}" for label in labels if len(self.seeds[label]) == 1]
        bare = [f"{label!r}" for label in labels if not self.twins[label]]
        shared = a != b and self.seeds[a] == self.seeds[b] and len(self.seeds[a]) == 1
        twins = ["both of the same seed: where they share an encoder, it began with the same weights"] if shared else []
        notes = [f"one seed of {' and '.join(single)}: no ceiling, so no u"] if single else []
        return "; ".join(
            twins + notes + ([f"no untrained twin of {' and '.join(bare)}: no floor, so no u"] if bare else [])
        )


def site_of(network: Name, site: str) -> str:
    """The name of a network's site in a recording of many networks."""
    label, seed, state = network
    return f"{label} {seed} {state} {site}"


def merged(networks: Mapping[Name, Recording]) -> tuple[Recording, dict[Name, slice]]:
    """One recording of all sites of networks whose rows are in one order, and where each network's sites are in it."""
    first = next(iter(networks.values()))
    sites, features, places = [], {}, {}
    for name, recording in networks.items():
        places[name] = slice(len(sites), len(sites) + len(recording.sites))
        sites += [dataclasses.replace(site, name=site_of(name, site.name)) for site in recording.sites]
        features |= {site_of(name, site): recording[site] for site in recording.names}
    together = Recording(features, first.ids, sites, first.policy, "several", first.data_hash)
    return together, places


def own_intervals(observed: Comparison, again: Resamples, pairs: Pairs) -> dict[str, float]:
    """`calibration.with_intervals` of one architecture's pairs of seeds: a seed left out is left out on both sides."""
    found, samples = observed.scale(pairs), again.comparison.scale(pairs)
    seeds = sorted({seed for both in observed.cross for seed in both})
    left_out = [observed.without("a", s).without("b", s).scale(pairs) for s in seeds if len(seeds) > 2]
    values = {}
    for name in calibration.QUANTITIES:
        se = intervals.standard_error(samples[name], again.images, again.taken)
        variances = [intervals.seed_variance([each[name] for each in left_out])] if left_out else []
        se, df = intervals.combine(se, variances, [len(seeds)] * len(variances))
        low, high = intervals.interval(found[name], se, df=df)
        values |= {name: float(found[name]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return values


def binned(pairs: Pairs, rows: list[str], columns: list[str], bins: int) -> dict[float, Pairs]:
    """Middle of each bin of relative depth -> the pairs in it, by the mean of their sites' relative depths."""
    found: dict[int, Pairs] = {}
    for a, b in pairs:
        depth = [names.index(name) / max(len(names) - 1, 1) for names, name in ((rows, a), (columns, b))]
        found.setdefault(min(int(sum(depth) / 2 * bins), bins - 1), []).append((a, b))
    return {(place + 0.5) / bins: found[place] for place in sorted(found)}


# ------------------------------------------------------------------------------------------------------ what is refused


def check(networks: Mapping[Name, Recording], facts: pd.DataFrame) -> tuple[list[str], list[str]]:
    """(labels in the order of the facts, parts); InputError names what does not fit, before any work."""
    _check_facts(facts)
    labels = list(dict.fromkeys(label for label, _, _ in networks))
    if len(labels) < 2:
        raise InputError(f"networks holds {len(labels)} labels; give at least two architectures to compare")
    for label in labels:
        if label not in set(facts["label"]):
            near = closest(str(label), map(str, facts["label"]))
            raise InputError(f"facts has no row for label {label!r}; closest: {near}; add its row")
        _check_networks(label, {name: r for name, r in networks.items() if name[0] == label})
    first, ids = next((name, set(recording.ids)) for name, recording in networks.items())
    for name, recording in networks.items():
        if set(recording.ids) != ids:
            differing = sorted(set(recording.ids) ^ ids)
            raise InputError(
                f"networks {first} and {name} hold different images, {len(differing)} are in one only (such as "
                f"{differing[0]!r}); record both on the same test images, or select(ids=…) the common ones"
            )
    parts = [part for part in ruler.PARTS if any(site.part == part for r in networks.values() for site in r.sites)]
    for name, recording in networks.items():
        lacking = set(parts or ruler.PARTS) - {site.part for site in recording.sites}
        if lacking:
            raise InputError(f"network {name} has no site of part {sorted(lacking)[0]!r}; record sites of both parts")
    return [label for label in facts["label"] if label in labels], parts


def _check_facts(facts: pd.DataFrame) -> None:
    missing = [column for column in FACTS if column not in facts]
    if missing:
        raise InputError(f"facts lacks the columns {missing}; it needs {list(FACTS)}, one row a label")
    twice = facts["label"][facts["label"].duplicated()]
    if len(twice):
        raise InputError(f"facts has label {twice.iloc[0]!r} twice; give one row a label")
    for column in ("title", "family", "encoder", "pretrained"):
        if facts[column].isna().any():
            label = facts.loc[facts[column].isna(), "label"].iloc[0]
            raise InputError(f"facts has no {column} for label {label!r}; fill it in")


def _check_networks(label: str, mine: Mapping[Name, Recording]) -> None:
    """Of one label: known states, twins for all of its seeds or for none, the same sites, one row an image."""
    seeds = {state: sorted(seed for _, seed, this in mine if this == state) for state in {s for *_, s in mine}}
    unknown = set(seeds) - set(STATES)
    if unknown:
        raise InputError(f"label {label!r} has state {sorted(unknown)[0]!r}; states are 'trained' and 'untrained'")
    if seeds.get("untrained", seeds.get("trained")) != seeds.get("trained"):
        raise InputError(
            f"label {label!r} has trained seeds {seeds.get('trained', [])} and untrained twins of "
            f"{seeds.get('untrained')}; record a twin of every seed, or of none"
        )
    first, sites = next((name, recording.names) for name, recording in mine.items())
    for name, recording in mine.items():
        if canonical(recording.policy) != "gap":
            raise InputError(f"network {name} was recorded under policy {recording.policy!r}; record it under 'gap'")
        if recording.names != sites:
            raise InputError(
                f"network {name} has other sites than {first}; record the same sites of all networks of a label"
            )
