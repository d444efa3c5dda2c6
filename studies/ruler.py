"""From recordings to the ruler's tables: planes, their null, their intervals, and what they say by part and by depth.

Every number of the universality study that compares representations is made here; what the networks are, and how they
were trained and recorded, is the subject of `universality`, and how the tables are shown of its report.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from similarity import Plane, Recording, calibration, intervals, plane
from similarity.calibration import Comparison, Resamples, matched_depth_pairs
from similarity.exact_nulls import exact_moments
from similarity.measures import MEASURES
from similarity.nulls import Null, benjamini_hochberg, plane_null
from similarity.plane import rows_an_image
from similarity.policies import parse_policy
from similarity.resampling import resampled_planes
from utils import atomic_path, digest, progress, write_table

NEIGHBOURS = 10
# name in the configuration -> (measure, options); the debiased estimators are the headline
ESTIMATORS = {
    "linear_cka": ("linear_cka", {"debiased": True}),
    "linear_cka_biased": ("linear_cka", {"debiased": False}),
    "rbf_cka": ("rbf_cka", {"debiased": True, "fraction": 1.0}),
    "svcca": ("svcca", {"variance": 0.99}),
    "rsa": ("rsa", {"rdm": "correlation", "compare": "spearman"}),
    "mutual_knn": ("mutual_knn", {"k": NEIGHBOURS}),
    "procrustes_distance": ("procrustes_distance", {}),
    "angular_distance": ("angular_distance", {}),
    "information_imbalance": ("information_imbalance", {"k": 1}),
}
HEADLINE = "linear_cka"
PARTS = ("encoder", "decoder")
NEEDED = ("similarity", "floor", "ceiling")
ENDS = ("", "_image_se", "_se", "_low", "_high")
NUMBERS = [f"{name}{end}" for name in calibration.QUANTITIES for end in ENDS]
NUMBERS += ["low", "high", "start", "null_mean", "null_high", "p_value"]
MOST_WITH_MANY_ROWS = 200  # permutations where an image has many rows: each took 2 s for 300 images × 16 cells
KINDS = ("cross", "own_a", "own_b", "floor", "start")
Key = tuple[str, str]  # (policy, estimator)


# ------------------------------------------------------------------------------------------------------------- planes


def network_pairs(config, recordings: Mapping[str, dict]) -> dict[str, dict[tuple[int, int], tuple[str, str]]]:
    """kind -> (seed, seed) -> the names of the two networks that are compared."""
    a, b = (recipe.model for recipe in config.models)
    seeds = list(config.seeds)
    every, later = list(itertools.product(seeds, seeds)), list(itertools.combinations(seeds, 2))

    def named(one: str, other: str, pairs: list, state: str = "") -> dict[tuple[int, int], tuple[str, str]]:
        return {(i, j): (f"{one}-seed{i}{state}", f"{other}-seed{j}{state}") for i, j in pairs}

    def begun(name: str, seed: int) -> str:
        """What training began with: the pretrained twin, or the untrained one of a model without pretrained weights."""
        pretrained = f"{name}-seed{seed}-pretrained"
        return pretrained if pretrained in recordings else f"{name}-seed{seed}-untrained"

    starts = {(i, j): (begun(a, i), begun(b, j)) for i, j in every}
    pretrained = any(name.endswith("-pretrained") for pair in starts.values() for name in pair)
    return {
        "cross": named(a, b, every),
        "own_a": named(a, a, later),
        "own_b": named(b, b, later),
        "floor": named(a, b, every, "-untrained"),
        "start": starts if pretrained else {},
    }


def jobs(config, recordings: Mapping[str, dict]) -> dict[tuple[str, int, int], tuple[str, str]]:
    """(kind, seed, seed) -> the names of the two networks: `network_pairs` as one mapping."""
    pairs = network_pairs(config, recordings)
    return {(kind, *seeds): names for kind, networks in pairs.items() for seeds, names in networks.items()}


def first_pair(config) -> tuple[str, str]:
    """The names of the two networks of the first seed."""
    return tuple(f"{recipe.model}-seed{config.seeds[0]}" for recipe in config.models)


def compare_all(config, recordings: Mapping[str, dict[str, Recording]], folder: Path) -> dict[Key, Comparison]:
    """Planes of all sites × all sites between all networks that the ruler needs; also written as planes.csv."""
    found, tidy = {}, []
    pairs = network_pairs(config, recordings)
    for policy, estimator in progress(_keys(config), desc="comparing", unit="measure"):
        measure, options = ESTIMATORS[estimator]
        made: dict[str, dict] = {kind: {} for kind in KINDS}
        for kind, networks in pairs.items():
            for seeds, (a, b) in networks.items():
                made[kind][seeds] = result = plane(measure, recordings[a][policy], recordings[b][policy], **options)
                tidy.append(result.tidy().assign(kind=kind, estimator=estimator, model_a=a, model_b=b))
        found[policy, estimator] = as_comparison(made)
    write_table(pd.concat(tidy, ignore_index=True), folder / "planes" / "planes.csv")
    return found


def as_comparison(planes: Mapping[str, Mapping[tuple[int, int], Plane]]) -> Comparison:
    """The values of planes by kind and seeds."""
    first = next(iter(planes["cross"].values()))
    values = {kind: {seeds: each.values for seeds, each in planes[kind].items()} for kind in KINDS}
    return Comparison(first.rows, first.columns, **values, distance=MEASURES[first.measure].distance)


def _keys(config) -> list[Key]:
    return [(policy, estimator) for policy, estimators in config.policies.items() for estimator in estimators]


def matched(A: Recording, B: Recording) -> dict[str, list[tuple[str, str]]]:
    """part -> its pairs of sites at matched relative depth."""
    return {part: matched_depth_pairs(A.select(part=part), B.select(part=part)) for part in PARTS}


# ----------------------------------------------------------------------------------------------- null and uncertainty


def null_all(config, recordings: Mapping[str, dict[str, Recording]], folder: Path) -> dict[Key, Null]:
    """The permutation null of each estimator, for the first pair of networks; kept on disk.

    Of all cells; under policies with many rows an image, of those at matched depth, by at most 200 permutations.
    """
    found = {}
    a, b = first_pair(config)
    for policy, estimator in _keys(config):
        measure, options = ESTIMATORS[estimator]
        A, B = recordings[a][policy], recordings[b][policy]
        pairs = _only_matched(A, B)
        permutations = config.permutations if pairs is None else min(config.permutations, MOST_WITH_MANY_ROWS)
        asked = {"permutations": permutations, "seed": config.seeds[0]}
        path = folder / "planes" / f"null-{policy.replace(':', '')}-{estimator}.npz"
        key = digest(
            "null", A.model_hash, B.model_hash, A.data_hash, A.names, B.names, policy, estimator, options, asked
        )

        def compute(A=A, B=B, measure=measure, options=options, asked=asked, pairs=pairs) -> dict[str, np.ndarray]:
            null = plane_null(measure, A, B, pairs=pairs, **asked, **options)
            return {"observed": null.observed, "samples": null.samples, "rounding": np.array(null.rounding)}

        kept = _kept(path, key, compute)
        found[policy, estimator] = Null(
            kept["observed"],
            kept["samples"],
            A.names,
            B.names,
            measure,
            len(A),
            MEASURES[measure].distance,
            rounding=float(kept["rounding"]),
        )
    return found


def resample_all(config, recordings: Mapping[str, dict[str, Recording]], folder: Path) -> dict[Key, Resamples]:
    """Every comparison again on subsamples of the images, the same ones for all networks; kept on disk."""
    found = {}
    for policy, estimator in progress(_keys(config), desc="resampling the images", unit="measure"):
        used = {
            name: (recordings[a][policy], recordings[b][policy]) for name, (a, b) in jobs(config, recordings).items()
        }
        path = folder / "planes" / f"resamples-{policy.replace(':', '')}-{estimator}.npz"
        found[policy, estimator] = resample(config, used, estimator, path)
    return found


def resample(config, sides: Mapping[tuple, tuple[Recording, Recording]], estimator: str, path: Path) -> Resamples:
    """{(kind, seed, seed): (A, B)} -> the same comparison on subsamples of the images; kept in the file `path`."""
    measure, options = ESTIMATORS[estimator]
    A, B = next(iter(sides.values()))
    share = intervals.share_for(measure, **options)
    subsets = intervals.subsamples(len(A), resamples=config.resamples, share=share, seed=config.seeds[0])
    own = {"own_a": [(name, name) for name in A.names], "own_b": [(name, name) for name in B.names]}
    cross = _only_matched(A, B)
    wanted = None if cross is None else {job: own.get(job[0], cross) for job in sides}

    def compute() -> dict[str, np.ndarray]:
        made = resampled_planes(measure, sides, subsets, pairs=wanted, **options)
        return {"/".join(map(str, job)): values for job, values in made.items()}

    hashes = [(job, one.model_hash, other.model_hash, one.names, other.names) for job, (one, other) in sides.items()]
    key = digest(
        "resamples", hashes, A.data_hash, A.policy, estimator, options, config.resamples, share, config.seeds[0]
    )
    made = _kept(path, key, compute)
    values: dict[str, dict] = {kind: {} for kind in KINDS}
    for job in sides:
        values[job[0]][job[1:]] = made["/".join(map(str, job))]
    comparison = Comparison(A.names, B.names, **values, distance=MEASURES[measure].distance)
    return Resamples(comparison, len(A), len(subsets[0]))


def _only_matched(A: Recording, B: Recording) -> list[tuple[str, str]] | None:
    """The pairs at matched depth where an image has many rows, and so a plane takes minutes; else None: all."""
    kind, _ = parse_policy(A.policy)
    if kind not in ("grid", "tokens"):
        return None
    return [pair for pairs in matched(A, B).values() for pair in pairs]


def _kept(path: Path, key: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from a file, if it holds those of this key; else computed and written there."""
    if path.exists():
        with np.load(path) as stored:
            if str(stored["key"]) == key:
                return {name: stored[name] for name in stored.files if name != "key"}
    made = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:  # by name, savez would add its own suffix
        np.savez_compressed(file, key=np.array(key), **made)
    return made


# ------------------------------------------------------------------------------------------------------------- tables


def calibrate(
    config,
    recordings: Mapping[str, dict[str, Recording]],
    comparisons: Mapping[Key, Comparison],
    resamples: Mapping[Key, Resamples],
    nulls: Mapping[Key, Null],
) -> dict[str, pd.DataFrame]:
    """The tables `pairs` (every site pair), `depth` (pairs at matched relative depth) and `summary` (their means)."""
    tables: dict[str, list] = {"pairs": [], "depth": [], "summary": []}
    for key, comparison in comparisons.items():
        policy, estimator = key
        A, B = (recordings[name][policy] for name in first_pair(config))
        table = calibration.ruler_table(comparison, resamples[key])
        table = _labelled(table, policy, estimator, A, B)
        table = with_null(table, nulls[key], _only_matched(A, B) is None).assign(p_exact=exact_p(estimator, A, B))
        table["verdict"] = [
            calibration.word(row.similarity, row.u, row.null_high, row.ceiling, distance=comparison.distance)
            for row in table.itertuples()
        ]
        tables["pairs"].append(table)
        for part, pairs in matched(A, B).items():
            rows = table.set_index(["site_a", "site_b"]).loc[pairs].reset_index()
            rows["relative_depth"] = np.arange(len(pairs)) / max(len(pairs) - 1, 1)
            tables["depth"].append(rows)
            line = {"part": part, "measure": MEASURES[ESTIMATORS[estimator][0]].label, "estimator": estimator}
            line |= {"policy": policy}
            tables["summary"].append(line | summarize(comparison, resamples[key], nulls[key], pairs))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in list(tables.items())[:2]} | {
        "summary": pd.DataFrame(tables["summary"])
    }


def _labelled(table: pd.DataFrame, policy: str, estimator: str, A: Recording, B: Recording) -> pd.DataFrame:
    """Which estimator and policy, and which part of its model each site is in."""
    parts = {side: {s.name: s.part for s in recording.sites} for side, recording in (("a", A), ("b", B))}
    labels = {f"part_{side}": table[f"site_{side}"].map(known) for side, known in parts.items()}
    labels = {"estimator": estimator, "policy": policy} | labels | {"n_images": len(A)}
    return pd.concat([pd.DataFrame(labels, index=table.index), table], axis=1)


def with_null(table: pd.DataFrame, null: Null, whole: bool = True) -> pd.DataFrame:
    """The table of site pairs with the tested value, its null's mean and 95 % point, p_value, q_value and p_best.

    tested : the similarity of the first pair of networks, which p_value and q_value (over all cells there are) are of

    p_best : of being the best of all of B's sites for a site of A, under one permutation for all of them; NaN for other
        sites, and where matched cells alone were computed
    """
    p_values = null.p_values()
    best = null.best_match().set_index(["site_a", "site_b"])["p_best"]
    columns = {
        "tested": null.observed.ravel(),
        "null_mean": null.mean().ravel(),
        "null_high": null.high().ravel(),
        "p_value": p_values.ravel(),
        "q_value": benjamini_hochberg(p_values).ravel(),
    }
    table = table.assign(**columns)
    places = pd.MultiIndex.from_frame(table[["site_a", "site_b"]])
    table["p_best"] = best.reindex(places).to_numpy() if whole else np.nan
    return table


def exact_p(estimator: str, A: Recording, B: Recording) -> np.ndarray | float:
    """p of every cell from the null's exact moments, which any p however small has; NaN where there is no such form."""
    measure, options = ESTIMATORS[estimator]
    if measure not in ("linear_cka", "rbf_cka") or rows_an_image(A) > 1:
        return np.nan
    return exact_moments(measure, A, B, **options).p_values().ravel()


def usable(comparison: Comparison, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs that have a similarity, and a floor and a ceiling where any of them has: one set for every column."""
    cells = comparison.scale()
    place = {pair: (comparison.rows.index(pair[0]), comparison.columns.index(pair[1])) for pair in pairs}
    there = {name: [pair for pair in pairs if not np.isnan(cells[name][place[pair]])] for name in NEEDED}
    return [pair for pair in there["similarity"] if all(pair in having for having in there.values() if having)]


def summarize(comparison: Comparison, resamples: Resamples, null: Null | None, pairs: list[tuple[str, str]]) -> dict:
    """One line: means over pairs of sites, beside the same mean of null, floor, ceiling, with intervals and a word.

    Without a null, the verdict says that chance was not tested; without a pair that has a number, it is 'no number'.
    """
    chosen = usable(comparison, pairs)
    more_seeds = any(len(comparison.seeds(side)) > 2 for side in "ab")
    line = {
        "interval_over": "images and seeds" if more_seeds else "images",
        "site_pairs": len(chosen),
        "site_pairs_left_out": len(pairs) - len(chosen),
        "network_pairs": len(comparison.cross),
        "n_images": resamples.images,
    }
    if not chosen:
        return dict.fromkeys(NUMBERS, np.nan) | line | {"verdict": "no number"}
    values = {name: float(value) for name, value in calibration.with_intervals(comparison, resamples, chosen).items()}
    chance = null.mean_over(chosen) if null else dict.fromkeys(("null_mean", "null_high", "p_value"), np.nan)
    each = comparison.per_network_pair(chosen)
    start = calibration.Comparison(comparison.rows, comparison.columns, comparison.start or comparison.cross)
    verdict = calibration.word(
        values["similarity"], values["u"], chance["null_high"], values["ceiling"], distance=comparison.distance
    )
    return (
        values
        | {
            "low": each.min(),
            "high": each.max(),
            "start": float(start.scale(chosen)["similarity"]) if comparison.start else np.nan,
        }
        | {name: chance[name] for name in ("null_mean", "null_high", "p_value")}
        | {"verdict": verdict if null else f"{verdict} (chance not tested)"}
        | line
    )
