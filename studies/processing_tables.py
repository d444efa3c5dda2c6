"""Tables of the processing-steps study: pairs of networks at matched depth, how they group, how smoothly each changes.

From planes over all sites of all networks and what was kept of each; nothing is recorded or drawn here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from processing.matched_depth import largest_difference, matched_depth, quantities
from processing.planes import depth_test, grid
from processing.smoothness import COLUMNS, RULES, choose_sites, compare_families, steps_along, summary
from processing.together import Together, named_pairs
from similarity.intervals import interval, seed_variance
from similarity.nulls import benjamini_hochberg
from studies.walks import Walk
from utils import InputError

TESTED = ("both", "linear_cka", "mutual_knn")
SEED, START, BODY = (
    "another seed",
    "same body and seed",
    "same body",
)  # the second: before and after, where one was first
FAMILY, OTHER = "same family", "other family"
RELATIONS = (SEED, START, BODY, FAMILY, OTHER)
CHANGES = ("both", "cka_change")
TENTHS = np.linspace(0.1, 1, 10)  # of the relative depth
SPENT = ("parameters", "operations")
QUANTITIES = ["matched", "elsewhere", "elsewhere − matched", "distance", "chance", "reversed"]


# ------------------------------------------------------------------------------------------------------- pairs of them


def relation_of(a: Walk, b: Walk) -> str:
    """How two networks are related: by the first of these that is true."""
    if a.label == b.label:
        return SEED
    if a.body == b.body:
        return START if a.subject.seed == b.subject.seed else BODY
    return FAMILY if a.subject.family == b.subject.family else OTHER


def pairs_table(walks: Sequence[Walk], together: Together, part: str, permutations: int, seed: int) -> pd.DataFrame:
    """One row a pair of networks: what they are to each other, and both questions about depth, for three measures.

    matched, elsewhere, elsewhere − matched : of the mean of both imbalances, see `matched_depth`; a_to_b, b_to_a of
    matched depths; distance, chance, reversed, p, … : of best matches, see `depth_test`, and for other measures with
    their name behind; q : Benjamini-Hochberg over all pairs of the table
    """
    rows, by_name = [], {walk.name: walk for walk in walks}
    for a, b in named_pairs([walk.name for walk in walks]):
        one, other, table = by_name[a], by_name[b], together.table(a, b)
        row = {"network_a": a, "network_b": b, "label_a": one.label, "label_b": other.label, "part": part}
        row |= {"training": _both(one.training, other.training), "relation": relation_of(one, other)}
        row |= {"family": _both(one.subject.family, other.subject.family)}
        rows.append(row | _numbers(table, permutations, seed))
    found = pd.DataFrame(rows)
    for name in TESTED:
        p = "p" if name == "both" else f"p_{name}"
        found[p.replace("p", "q", 1)] = benjamini_hochberg(found[p])
    return found


def _both(a: str, b: str) -> str:
    return a if a == b else " × ".join(sorted((a, b)))


def _numbers(table: pd.DataFrame, permutations: int, seed: int) -> dict:
    values = quantities(grid(table, "both"))
    row = {name: values[name] for name in ("matched", "elsewhere", "elsewhere − matched")}
    row |= {name: quantities(grid(table, name))["matched"] for name in ("a_to_b", "b_to_a")}
    tests = depth_test(table, permutations=permutations, seed=seed).set_index("value")
    for name in TESTED:
        end = "" if name == "both" else f"_{name}"
        row |= {f"{key}{end}": tests.loc[name, key] for key in ("distance", "chance", "reversed", "p")}
    row |= {key: tests.loc["both", key] for key in ("smallest", "null_low", "p_smallest", "sites_a", "sites_b")}
    return row | {"left_out": tests.loc["both", "left_out"], "n_images": int(table["n_images"].iloc[0])}


def matched_curve(together: Together, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
    """(depths, imbalances) of the matched pairs of sites: mean of both relative depths, mean of both directions."""
    one = grid(together.table(a, b), "both")
    i, j = np.nonzero(one.matched())
    return (one.depth_a[i] + one.depth_b[j]) / 2, one.values[i, j]


def relations_table(pairs: pd.DataFrame, walks: Sequence[Walk]) -> pd.DataFrame:
    """Means over pairs of networks, by how they were trained and what they are to each other; one row a quantity.

    Columns part, training, relation, quantity, pairs, bodies, mean, low, high: 95 % by leaving out one body at a time
    with all networks on it (jackknife, Student's t of bodies − 1), NaN with fewer than 3 bodies. 'closer' is chance −
    distance: by how much of the depth best matches are nearer than in shuffled networks. 'told from chance' is the
    share of pairs with q < 0.05.
    """
    body = {walk.name: walk.body for walk in walks}
    pairs = pairs.assign(closer=pairs["chance"] - pairs["distance"], told=(pairs["q"] < 0.05).astype(float))
    pairs = pairs.rename(columns={"told": "told from chance"})
    rows = []
    for (part, training, relation), group in pairs.groupby(["part", "training", "relation"], sort=False):
        bodies = {name: {body[x] for x in pair} for name, pair in _pairs_of(group).items()}
        for quantity in (*QUANTITIES, "closer", "told from chance"):
            row = {"part": part, "training": training, "relation": relation, "quantity": quantity, "pairs": len(group)}
            rows.append(row | over_bodies(group[quantity], list(bodies.values())))
    return pd.DataFrame(rows)


def _pairs_of(group: pd.DataFrame) -> dict[int, tuple[str, str]]:
    return {row.Index: (row.network_a, row.network_b) for row in group.itertuples()}


def over_bodies(values: pd.Series, bodies: Sequence[set[str]]) -> dict[str, float]:
    """bodies, mean, low, high of one value a pair; the jackknife leaves out every pair with a network on a body."""
    values = values.to_numpy(float)
    every = sorted(set().union(*bodies))
    kept = [np.array([body not in each for each in bodies]) for body in every]
    row = {"bodies": len(every), "mean": float(values.mean()), "low": np.nan, "high": np.nan}
    if len(every) < 3 or not all(some.any() for some in kept):
        return row
    se = np.sqrt(seed_variance([values[some].mean() for some in kept]))
    row["low"], row["high"] = interval(row["mean"], se, df=len(every) - 1)
    return row


def curves_table(pairs: pd.DataFrame, together: Together, walks: Sequence[Walk]) -> pd.DataFrame:
    """Imbalance of matched sites along the depth, by training and relation: one row a tenth of the depth.

    Between the matched pairs of sites of two networks their imbalance is interpolated, so that every tenth is of the
    same pairs of networks; a pair's first sites are where it begins.
    """
    body = {walk.name: walk.body for walk in walks}
    found = []
    for row in pairs.itertuples():
        depths, values = matched_curve(together, row.network_a, row.network_b)
        each = pd.DataFrame({"depth": TENTHS, "matched": along_tenths(depths, values)}).dropna()
        about = {"training": row.training, "relation": row.relation, "part": row.part}
        found.append(each.assign(**about, bodies=[{body[row.network_a], body[row.network_b]}] * len(each)))
    rows = []
    for (part, training, relation, depth), group in pd.concat(found).groupby(["part", "training", "relation", "depth"]):
        about = {"part": part, "training": training, "relation": relation, "depth": depth, "pairs": len(group)}
        rows.append(about | over_bodies(group["matched"], list(group["bodies"])))
    return pd.DataFrame(rows)


def along_tenths(depths: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values at the tenths of the depth, linearly between the means at equal depths; NaN before the first depth."""
    means = pd.Series(values).groupby(depths).mean()
    return np.interp(TENTHS, means.index, means, left=np.nan)


def intervals_tables(
    together: Together, samples: np.ndarray, taken: int, names: Sequence[str], part: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(`matched_depth`, `largest_difference`) of every pair of some networks, with intervals over images.

    together, samples : of these networks, in this order
    """
    near, most = [], []
    for a, b in named_pairs(names):
        resampled, about = together.resampled(samples, taken, a, b), {"part": part, "network_a": a, "network_b": b}
        near.append(matched_depth(resampled).assign(**about))
        most.append(largest_difference(resampled).assign(**about))
    front = ["part", "network_a", "network_b"]
    return tuple(pd.concat(each, ignore_index=True).set_index(front).reset_index() for each in (near, most))


# ---------------------------------------------------------------------------------------------------------- smoothness


def steps_table(
    walks: Sequence[Walk], together: Together, sites: Mapping[str, pd.DataFrame], part: str
) -> pd.DataFrame:
    """The change from site to site of every network, under every rule of choosing sites; see `steps_along`."""
    rows = []
    for walk in walks:
        own, facts = together.table(walk.name, walk.name), sites[walk.name].set_index("site")
        names = list(together.depths[walk.name])
        for rule in RULES:
            chosen = choose_sites(names, facts.loc[names, "stage"].tolist(), rule)
            if len(chosen) < 2:
                continue
            steps = steps_along(own, chosen, together.depths[walk.name], facts[list(SPENT)])
            for name in SPENT:  # as shares of what the last site has spent
                steps[f"{name}_share"] = steps[f"{name}_to"] / facts.loc[names[-1], name]
            rows.append(steps.assign(network=walk.name, rule=rule, part=part))
    return pd.concat(rows, ignore_index=True)


def smoothness_table(steps: pd.DataFrame, walks: Sequence[Walk]) -> pd.DataFrame:
    """mean, coefficient of variation and largest jump of every network, rule and change; see `smoothness.summary`."""
    facts = {walk.name: walk.facts() for walk in walks}
    rows = []
    for (part, network, rule), group in steps.groupby(["part", "network", "rule"], sort=False):
        about = {key: facts[network][key] for key in ("network", "label", "family", "training", "body")}
        rows += [about | {"part": part, "rule": rule} | summary(group, change) for change in CHANGES]
    return pd.DataFrame(rows)


def families_table(smooth: pd.DataFrame, permutations: int, seed: int) -> pd.DataFrame:
    """CNNs against transformers, for every training, rule and change: a test over bodies, never over layers.

    Hybrids are left out. Where there are not two families, or one body of each at least, a reason stands instead.
    """
    rows = []
    for key, group in smooth.groupby(["part", "training", "rule", "change"], sort=False):
        about = dict(zip(("part", "training", "rule", "change"), key))
        group = group[group["family"].isin(("CNN", "transformer"))].rename(columns={"network": "model"})
        labels, bodies = (dict(zip(group["model"], group[name])) for name in ("family", "body"))
        try:
            found = compare_families(group, labels, architectures=bodies, permutations=permutations, seed=seed)
        except InputError as reason:
            found = pd.DataFrame([{"reason": str(reason)}])
        rows.append(found.assign(**about))
    columns = ["part", "training", "rule", "change", *COLUMNS, "p_holm"]  # all of them, also where nothing was tested
    return pd.concat(rows, ignore_index=True).reindex(columns=columns)


# -------------------------------------------------------------------------------------------------------- what is kept


def losses_table(kept: pd.DataFrame, groups: Mapping[str, Sequence[str]], walks: Sequence[Walk]) -> pd.DataFrame:
    """What the last sites of an encoder lose of the images' statistics, by training; one row a statistic or group.

    kept : columns network, site, depth, statistic, r2; groups : name -> statistics whose mean is taken
    Quantities: 'late' (mean R² over sites in the third quarter of the depth), 'last' (R² at the last site), 'lost'
    (late − last), 'learnt' (last − that of the untrained twin). median, low, high (range), p over bodies, whose seeds
    are averaged first, see `over_median`
    """
    of_network = {walk.name: walk for walk in walks}
    each = kept.groupby(["network", "statistic"], sort=False).apply(_late_and_last, include_groups=False).reset_index()
    whole = [each]
    for name, members in groups.items():
        some = each[each["statistic"].isin(members)]
        whole.append(some.groupby("network", sort=False)[["late", "last"]].mean().reset_index().assign(statistic=name))
    table = pd.concat(whole, ignore_index=True)
    table["lost"] = table["late"] - table["last"]
    table["body"] = [of_network[name].body for name in table["network"]]
    table["training"] = [of_network[name].training for name in table["network"]]
    table["learnt"] = table["last"] - _of_twin(table, of_network)
    rows = []
    for (training, statistic), group in table.groupby(["training", "statistic"], sort=False):
        for quantity in ("late", "last", "lost", "learnt"):
            means = group.groupby("body")[quantity].mean()
            row = {"training": training, "statistic": statistic, "quantity": quantity, "networks": len(group)}
            rows.append(row | over_median(means.to_numpy(float), tested=quantity in ("lost", "learnt")))
    return pd.DataFrame(rows)


def _late_and_last(group: pd.DataFrame) -> pd.Series:
    late = group[(group["depth"] > 0.5) & (group["depth"] <= 0.75)]["r2"]
    return pd.Series({"late": late.mean(), "last": group.sort_values("depth")["r2"].iloc[-1]})


def _of_twin(table: pd.DataFrame, of_network: Mapping[str, Walk]) -> pd.Series:
    """The last R² of the untrained twin of every row's network; NaN where there is none."""
    seeds = table["network"].map(lambda name: of_network[name].subject.seed)
    keys = pd.Series(list(zip(table["body"], seeds, table["statistic"])), table.index)
    untrained = table["training"] == "untrained"
    twins = dict(zip(keys[untrained], table.loc[untrained, "last"]))
    return keys.map(lambda key: twins.get(key, np.nan)).where(~untrained)


def over_median(values: np.ndarray, tested: bool) -> dict[str, float]:
    """bodies, median, low, high (range) and p of one number a body (Wilcoxon's signed ranks, exact, two-sided).

    Medians and ranks, since R² has no lower bound: one network whose features stretch far is as far down as it likes.
    """
    values = values[np.isfinite(values)]
    count = len(values)
    row = {"bodies": count} | dict.fromkeys(("median", "low", "high", "p"), np.nan)
    if not count:
        return row
    row |= {"median": float(np.median(values)), "low": values.min(), "high": values.max()}
    if tested and count > 2:
        row["p"] = float(stats.wilcoxon(values, method="exact").pvalue)
    return row
