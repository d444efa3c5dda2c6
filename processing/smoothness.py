"""How smoothly does a network change what it represents? The change from each site to the next, and families compared.

Of one recording: information imbalance of consecutive sites in both directions and 1 − debiased linear CKA, by relative
depth and by what has been spent up to there (parameters, operations); their mean, coefficient of variation and largest
jump; which sites to take; and whether families of networks differ, tested over architectures and never over layers.
Numbers depend on which sites were taken: compare networks under one rule of `choose_sites`. Two networks site by site
are the subject of `planes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from explanations.clusters import arrangements
from processing.planes import IMBALANCE, Depths, relative_depths
from similarity import Recording, plane
from similarity.factors import REACHED, holm
from utils import InputError, pick

RULES = ("every block", "every second", "stage ends")
CHANGES = ("forward", "backward", "both", "cka_change")
STATISTICS = ("mean", "cv", "largest")
COLUMNS = ["statistic", "family_a", "family_b", "architectures_a", "architectures_b", "networks", "mean_a", "mean_b"]
COLUMNS += ["difference", "p", "p_smallest", "orders", "exact", "reason"]


# ---------------------------------------------------------------------------------------------------------- which sites


def choose_sites(sites: Sequence[str], stages: Sequence, rule: str) -> list[str]:
    """The sites of a network to compare, in its order: 'every block', 'every second' or 'stage ends'.

    stages : of each site, anything that is equal within a stage. Every second is counted from the end, so the last
    site is there under every rule. A stage that comes back after another is refused.
    """
    pick("rule of site choice", rule, dict.fromkeys(RULES))
    if not sites or len(sites) != len(stages) or len(set(sites)) != len(sites):
        raise InputError(f"{len(sites)} sites with {len(stages)} stages; name sites, each once, and the stage of each")
    ends = [place for place, stage in enumerate(stages) if place + 1 == len(stages) or stages[place + 1] != stage]
    if len({stages[place] for place in ends}) != len(ends):
        raise InputError("a stage comes back after another; give the sites in execution order, stages as they follow")
    if rule == "every block":
        return list(sites)
    return list(sites[::-1][::2][::-1]) if rule == "every second" else [sites[place] for place in ends]


# ----------------------------------------------------------------------------------------------- the changes of one


def step_changes(
    recording: Recording,
    k: int = 1,
    *,
    depths: Depths | None = None,
    spent: pd.DataFrame | None = None,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """The change between consecutive sites of one network; one row a step.

    Columns step (from 1), site_from, site_to, depth_from, depth_to (relative), depth (their middle), forward
    Δ(earlier → later), small where the earlier tells the later's neighbours, backward Δ(later → earlier), large where
    something of the earlier is lost, both (their mean), cka_change (1 − debiased linear CKA), floor ((k + 1)/n: the
    imbalance where nothing changes), k, n_images, note.
    spent : index the sites, columns such as parameters and operations spent up to and with each site; every column c
    gives c_from and c_to
    """
    names = recording.names
    if len(names) < 2:
        raise InputError(f"{len(names)} site is no path; record at least 2 sites in execution order")
    made, alike = plane(IMBALANCE, recording, device=device, k=k), plane("linear_cka", recording, device=device)
    pairs = list(itertools.product(names, names))
    own = pd.DataFrame(pairs, columns=["site_a", "site_b"])
    own = own.assign(a_to_b=made.values.ravel(), b_to_a=made.values.T.ravel(), linear_cka=alike.values.ravel())
    own["note"] = [made.notes.get(pair) or alike.notes.get(pair, "") for pair in pairs]
    own = own.assign(k=k, n_images=made.n_images)
    return steps_along(own, names, relative_depths(recording, depths), spent)


def steps_along(
    own: pd.DataFrame, names: Sequence[str], depths: Depths, spent: pd.DataFrame | None = None
) -> pd.DataFrame:
    """`step_changes` along some sites of one network, from the planes of the network with itself.

    own : site_a, site_b, a_to_b, b_to_a, linear_cka, note, k, n_images, as `together.Together.table` gives them
    names : at least 2 of its sites, in execution order; depths : site -> relative depth
    """
    paid = _spent(spent, list(names))
    pairs = list(itertools.pairwise(names))
    made = own.set_index(["site_a", "site_b"]).loc[pairs]
    table = pd.DataFrame(pairs, columns=["site_from", "site_to"])
    table.insert(0, "step", np.arange(len(pairs)) + 1)
    table["depth_from"], table["depth_to"] = ([depths[name] for name in table[f"site_{end}"]] for end in ("from", "to"))
    table["depth"] = (table["depth_from"] + table["depth_to"]) / 2
    table["forward"], table["backward"] = made["a_to_b"].to_numpy(), made["b_to_a"].to_numpy()
    table["both"] = (table["forward"] + table["backward"]) / 2
    table["cka_change"] = 1 - made["linear_cka"].to_numpy()
    for name in paid:
        table[f"{name}_from"], table[f"{name}_to"] = paid[name].to_numpy()[:-1], paid[name].to_numpy()[1:]
    k, images = made["k"].to_numpy(), made["n_images"].to_numpy()
    return table.assign(floor=(k + 1) / images, k=k, n_images=images, note=made["note"].to_numpy())


def _spent(spent: pd.DataFrame | None, names: list[str]) -> pd.DataFrame:
    """What was spent up to every site, in order."""
    if spent is None:
        return pd.DataFrame(index=names)
    missing = [name for name in names if name not in spent.index]
    if missing or not spent.index.is_unique:
        what = f"has no row for site {missing[0]!r}" if missing else "has a site twice"
        raise InputError(f"the table of what was spent {what}; give one row for each site of the recording")
    paid = spent.loc[names].astype(float)
    for name in paid:
        if not np.isfinite(paid[name]).all() or (paid[name].diff().iloc[1:] < 0).any():
            raise InputError(f"column {name!r} is not a sum spent up to each site: it falls, or is not finite")
    return paid


def summary(changes: pd.DataFrame, change: str = "both") -> dict:
    """steps, mean, cv, largest, largest_from, largest_to, largest_depth of one network's changes; reason.

    cv : standard deviation over the steps (divided by steps − 1) / mean, the unevenness of the path; NaN of a single
        step, or where the mean is not above 0. Imbalances count from 0, not from their floor.
    largest : the largest jump, of equal ones the first; largest_depth is the middle of its two depths
    A step without a number (a constant site) leaves everything NaN, and a reason.
    """
    pick("change between sites", change, dict.fromkeys(CHANGES))
    if change not in changes or not len(changes):
        raise InputError(f"the table has no steps with a column {change!r}; make it with step_changes")
    values, row = changes[change].to_numpy(float), {"change": change, "steps": len(changes)}
    row |= dict.fromkeys((*STATISTICS, "largest_from", "largest_to", "largest_depth"), np.nan) | {"reason": ""}
    if np.isnan(values).any():
        where = changes.iloc[int(np.isnan(values).argmax())]
        return row | {"reason": f"no number from {where['site_from']!r} to {where['site_to']!r}: {where['note']}"}
    top = changes.iloc[int(values.argmax())]
    row |= {"mean": float(values.mean()), "largest": float(values.max())}
    row |= {"largest_from": top["site_from"], "largest_to": top["site_to"], "largest_depth": float(top["depth"])}
    if len(values) < 2:
        return row | {"reason": "one step has no spread"}
    if row["mean"] <= 0:
        return row | {"reason": "the mean change is not above 0, so there is no coefficient of variation"}
    return row | {"cv": float(values.std(ddof=1) / row["mean"])}


# ----------------------------------------------------------------------------------------------- families compared


def compare_families(
    table: pd.DataFrame,
    labels: Mapping[str, str],
    *,
    architectures: Mapping[str, str] | None = None,
    statistics: Sequence[str] = STATISTICS,
    permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Do two families, such as CNN and transformer, differ in how smoothly they change? One row a statistic.

    table : one row a network: `model` and the statistics, such as rows of `summary`
    labels : model -> family, of two; architectures : model -> architecture, whose seeds are averaged first and keep
        one label; else each model is its own
    difference : mean of family_a's architectures less that of family_b's (families in alphabetical order)
    p : two-sided, share of the arrangements of the labels over the architectures with a difference as large; all where
        those are at most 5040 (`exact`), else (1 + #)/(1 + permutations). Layers are never units: they are not
        independent. p_smallest : the p of families that do not overlap; no data can give less
    p_holm : corrected over the statistics (Holm 1979)
    A model without a number leaves its statistic without a test, and the reason.
    """
    if permutations < 1:
        raise InputError(f"permutations must be at least 1, got {permutations}")
    own, label = _architectures(table, labels, architectures)
    families = sorted(set(label.values()))
    kinds = list(label)
    orders, exact = arrangements([label[kind] for kind in kinds], permutations, seed)
    rows = []
    for name in statistics:
        if name not in table:
            raise InputError(f"the table has no column {name!r}; choose statistics of it")
        row = {"statistic": name, "family_a": families[0], "family_b": families[1]}
        row |= {f"architectures_{side}": list(label.values()).count(family) for side, family in zip("ab", families)}
        row |= {"networks": len(table), "orders": len(orders), "exact": exact, "reason": ""}
        values = table[name].astype(float)
        if not np.isfinite(values).all():
            row["reason"] = f"{table.loc[~np.isfinite(values), 'model'].iloc[0]!r} has no {name}"
            rows.append(row)
            continue
        means = values.groupby([own[model] for model in table["model"]]).mean()
        rows.append(row | _two_sided(means[kinds].to_numpy(), orders))
    found = pd.DataFrame(rows).reindex(columns=COLUMNS)
    return found.assign(p_holm=holm(found["p"]))


def _two_sided(values: np.ndarray, orders: np.ndarray) -> dict:
    """The difference of the two groups' means, and its place among the orders (orders, architectures) of 0 and 1."""
    differences = _differences(values, orders)
    # values that keep the families apart as far as can be: their order is the label itself
    apart = _differences(-orders[0].astype(float), orders)
    return {
        "mean_a": float(values[orders[0] == 0].mean()),
        "mean_b": float(values[orders[0] == 1].mean()),
        "difference": float(differences[0]),
        "p": _reaching(differences),
        "p_smallest": _reaching(apart),
    }


def _differences(values: np.ndarray, orders: np.ndarray) -> np.ndarray:
    ones = orders.sum(1)
    total = orders @ values
    return (values.sum() - total) / (orders.shape[1] - ones) - total / ones


def _reaching(differences: np.ndarray) -> float:
    size = np.abs(differences)
    return float((size >= size[0] * (1 - REACHED)).mean())


def _architectures(
    table: pd.DataFrame, labels: Mapping[str, str], architectures: Mapping[str, str] | None
) -> tuple[dict[str, str], dict[str, str]]:
    """({model: architecture}, {architecture: family}); every model has one of each, and there are two families."""
    if "model" not in table or table["model"].duplicated().any():
        raise InputError("the table must have a column 'model' with every network once")
    models = list(table["model"])
    for what, given in (("family", labels), ("architecture", architectures)):
        missing = [model for model in models if given is not None and model not in given]
        if missing:
            raise InputError(f"{len(missing)} models have no {what}, first {missing[0]!r}; give one for each")
    own = {model: model if architectures is None else architectures[model] for model in models}
    label = {}
    for model in models:
        if label.setdefault(own[model], labels[model]) != labels[model]:
            raise InputError(f"architecture {own[model]!r} is of two families; its seeds must share one")
    if len(set(label.values())) != 2:
        raise InputError(f"{sorted(set(label.values()))} are the families given; a comparison is of two")
    return own, label
