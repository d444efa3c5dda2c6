"""Explanations of many networks, for the page: how alike two networks' are, in the order of their tree."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import dendrogram

from explanations import clusters
from report.tables import Folder, chosen, packed, rounded
from utils import InputError

COLUMNS = ("method", "similarity", "model_a", "model_b", "kind", "n", "mean", "dissimilarity", "null_mean", "q")
COLUMNS += ("ceiling", "u")


def entry(folder: Folder) -> dict | None:
    """Pairs of networks by method, the tree of each method, and families and failures of networks."""
    pairs = folder.table("pairs", ("method", "model_a", "model_b"), ("mean", "dissimilarity"))
    if pairs is None:
        return None
    if "similarity" not in pairs:
        pairs = pairs.assign(similarity=_first_similarity(folder))
    networks = folder.table("networks", ("network", "family"))
    families = {} if networks is None else dict(zip(networks["network"].astype(str), networks["family"].astype(str)))
    trees = []
    for (method, similarity), rows in pairs.groupby(["method", "similarity"], sort=False):
        try:
            tree = tree_of(rows)
        except InputError as error:
            folder.problems.append(f"pairs.csv gives no tree of {method}: {error}.")
            tree = {"order": list(dict.fromkeys([*rows["model_a"], *rows["model_b"]])), "lines": [], "left_out": []}
        trees.append({"method": str(method), "similarity": str(similarity), **tree})
    found = {"pairs": packed(chosen(pairs, COLUMNS)), "trees": trees, "families": families}
    return found | {"failed": _failures(folder), "mask": folder.data("config.yaml").get("mask")}


def _first_similarity(folder: Folder) -> str:
    """The small table holds the first similarity of the settings only."""
    named = folder.data("config.yaml").get("similarities")
    return str(named[0]) if isinstance(named, list) and named else "similarity"


def tree_of(pairs: pd.DataFrame) -> dict:
    """Average-linkage tree of the dissimilarity: networks in order of its leaves, and its lines.

    Lines are (x, y) with leaves at 0, 1, …; networks without a dissimilarity to all others are left out of the tree and
    follow behind.
    """
    square, left_out = _whole(pairs)
    if len(square) < 2:
        return {"order": [*map(str, square.index), *left_out], "lines": [], "left_out": left_out}
    drawn = dendrogram(clusters.tree(square), no_plot=True)
    order = [str(square.index[leaf]) for leaf in drawn["leaves"]]
    lines = [
        {"x": [(x - 5) / 10 for x in xs], "y": [rounded(y) for y in ys]}
        for xs, ys in zip(drawn["icoord"], drawn["dcoord"])
    ]
    return {"order": [*order, *left_out], "lines": lines, "left_out": left_out}


def _whole(pairs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The square of dissimilarities without those networks that lack some, the ones that lack most first."""
    sides = [pairs[side].astype(str) for side in ("model_a", "model_b")]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    a, b = (pd.Index(names).get_indexer(side) for side in sides)
    values = np.full((len(names), len(names)), np.nan)
    values[a, b] = values[b, a] = pairs["dissimilarity"]
    np.fill_diagonal(values, 0.0)
    square = pd.DataFrame(values, index=names, columns=names)
    left_out = []
    while len(square) and square.isna().any(axis=None):
        worst = square.isna().sum().idxmax()
        left_out.append(worst)
        square = square.drop(index=worst, columns=worst)
    return square, left_out


def _failures(folder: Folder) -> list[list[str]]:
    """[network, method, why] of methods that fail on a network."""
    table = folder.table("explanations", ("network", "variant", "failed"))
    if table is None:
        return []
    rows = table[table["failed"].notna()]
    return rows[["network", "variant", "failed"]].astype(str).to_numpy().tolist()
