"""Which models group together, and do the groups follow a label such as CNN or transformer?

From a table of pairs of models (`agreement.compare`, or any other similarity): average-linkage clusters of
the dissimilarity, Louvain communities of the similarity at several resolutions, and their agreement with labels as
adjusted Rand index (Hubert & Arabie 1985) with a permutation p-value in which the seeds of an architecture stay
together; beside it a Mantel test that needs no clustering. What a model is, and where the similarity is from, it does
not know.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import networkx as nx
import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from similarity.factors import MOST_ENUMERATED, REACHED, follows, same
from utils import InputError

CLUSTERS = (2, 3, 4)
RESOLUTIONS = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
STARTS = 10  # runs of Louvain, of which the best is kept
KEYS = ["method", "similarity"]
CLUSTERING = ["clustering", "parameter", "weights"]
HIERARCHICAL, LOUVAIN, MANTEL = "hierarchical", "Louvain", "none (Mantel)"
COLUMNS = [*KEYS, *CLUSTERING, "models", "communities", "ari", "null_high", "r", "p", "p_adjusted", "p_smallest"]
COLUMNS += ["orders", "exact", "reason"]


# ---------------------------------------------------------------------------------------------------------- clusterings


def square(pairs: pd.DataFrame, column: str, *, diagonal: float) -> pd.DataFrame:
    """Symmetric (K, K) table of a column of pairs (model_a, model_b), models in order of appearance.

    diagonal : what a model has with itself, e.g. 1 of a similarity and 0 of a dissimilarity. A pair that is absent or
    there twice is refused.
    """
    models = list(pd.unique(pairs[["model_a", "model_b"]].to_numpy().T.ravel()))
    found = {frozenset(pair): value for *pair, value in pairs[["model_a", "model_b", column]].itertuples(index=False)}
    wanted = [frozenset(pair) for pair in itertools.combinations(models, 2)]
    absent = [sorted(pair) for pair in wanted if pair not in found]
    if absent or len(pairs) != len(wanted):
        problem = f"lack {absent[0]}" if absent else f"have {len(pairs)} rows for {len(wanted)} pairs"
        raise InputError(f"the pairs of {len(models)} models {problem}; give one row for each pair of different models")
    table = pd.DataFrame(float(diagonal), index=models, columns=models)
    for a, b in itertools.combinations(models, 2):
        table.loc[a, b] = table.loc[b, a] = found[frozenset((a, b))]
    return table


def tree(dissimilarity: pd.DataFrame) -> np.ndarray:
    """Average linkage (UPGMA) of a (K, K) dissimilarity: scipy's (K − 1, 4)."""
    values = _finite(dissimilarity, "dissimilarity")
    if (values[np.triu_indices(len(values), 1)] < 0).any():
        raise InputError("a dissimilarity is negative; give distances, such as √((1 − x̄)² + s²)")
    return linkage(squareform(values, checks=False), method="average")


def cut(dissimilarity: pd.DataFrame, clusters: int) -> pd.Series:
    """model -> number of its cluster, 1 upwards; where heights of the tree tie, fewer clusters than were asked for."""
    if not 1 <= clusters <= len(dissimilarity):
        raise InputError(f"{len(dissimilarity)} models cannot be cut into {clusters} clusters")
    return pd.Series(fcluster(tree(dissimilarity), clusters, criterion="maxclust"), dissimilarity.index)


def louvain(similarity: pd.DataFrame, resolution: float = 1.0, *, shift: bool = False, seed: int = 0) -> pd.Series:
    """model -> number of its community (Blondel et al. 2008), the largest modularity of ten seeded runs.

    Weights are the similarities of different models. Modularity has no meaning for negative ones, and leaving them out
    would hide who is unlike whom: they are refused, unless `shift` makes all weights (1 + similarity)/2. That changes
    the communities also where nothing is negative: weights become more even, and need higher resolutions to part.
    """
    values = _finite(similarity, "similarity")
    upper = np.triu_indices(len(values), 1)
    values = (1 + values) / 2 if shift else values
    if (values[upper] < 0).any():
        problem = f"{int((values[upper] < 0).sum())} of {len(upper[0])} weights are negative, which Louvain cannot use"
        raise InputError(f"{problem}; use shift=True: weights (1 + similarity)/2 of similarities in [−1, 1]")
    if not values[upper].any():
        raise InputError("all weights between different models are 0; there is no graph to find communities in")
    graph = nx.Graph()
    graph.add_nodes_from(range(len(values)))
    graph.add_weighted_edges_from((i, j, values[i, j]) for i, j in zip(*upper) if values[i, j] > 0)
    runs = [
        nx.community.louvain_communities(graph, resolution=resolution, seed=seed + start) for start in range(STARTS)
    ]
    best = max(runs, key=lambda found: nx.community.modularity(graph, found, resolution=resolution))
    number = {node: place for place, community in enumerate(sorted(best, key=min), 1) for node in community}
    return pd.Series([number[node] for node in range(len(values))], similarity.index)


def _cuts(pairs: pd.DataFrame, clusters: Sequence[int]) -> pd.DataFrame:
    distances = square(pairs, "dissimilarity", diagonal=0)
    return _long({(HIERARCHICAL, k, "dissimilarity"): cut(distances, k) for k in clusters if k < len(distances)})


def _communities(pairs: pd.DataFrame, resolutions: Sequence[float], shift: bool, seed: int) -> pd.DataFrame:
    similarity, weights = square(pairs, "mean", diagonal=1), "(1 + similarity)/2" if shift else "similarity"
    return _long({(LOUVAIN, γ, weights): louvain(similarity, γ, shift=shift, seed=seed) for γ in resolutions})


def _long(found: Mapping[tuple, pd.Series]) -> pd.DataFrame:
    frames = [pd.DataFrame({"model": each.index, "cluster": each.to_numpy()}) for each in found.values()]
    frames = [frame.assign(**dict(zip(CLUSTERING, key))) for key, frame in zip(found, frames)]
    return pd.concat(frames or [pd.DataFrame(columns=[*CLUSTERING, "model", "cluster"])], ignore_index=True)


def _finite(table: pd.DataFrame, what: str) -> np.ndarray:
    """Values of a symmetric table whose rows and columns have the same names."""
    if list(table.index) != list(table.columns) or not table.index.is_unique:
        raise InputError(f"rows and columns of the {what} must have the same names, each once")
    values, upper = table.to_numpy(dtype=float), np.triu_indices(len(table), 1)
    if len(values) < 2:
        raise InputError(f"{len(values)} models cannot be grouped; give at least 2")
    if not np.isfinite(values[upper]).all() or not np.allclose(values[upper], values.T[upper], rtol=1e-9, atol=1e-12):
        raise InputError(f"the {what} is not symmetric, or a pair of models has none; leave that model out")
    return values


# ------------------------------------------------------------------------------------------------ agreement with labels


def adjusted_rand(clusters: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Adjusted Rand index of K clusters with each row of labels (…, K): 1 the same groups, 0 as by chance.

    NaN where both are one group, or both are all singletons: then there is nothing to agree about.
    """
    one, many = _indicators(np.asarray(clusters)), _indicators(np.asarray(labels))
    pairs = _pairs(one.T @ many).sum((-2, -1))
    a, b = _pairs(one.sum(0)).sum(), _pairs(many.sum(-2)).sum(-1)
    expected = a * b / _pairs(float(len(one)))
    room = (a + b) / 2 - expected
    return np.divide(pairs - expected, room, out=np.full(np.shape(room), np.nan), where=room > 0)


def cluster_table(
    pairs: pd.DataFrame,
    labels: Mapping[str, str],
    *,
    architectures: Mapping[str, str] | None = None,
    clusters: Sequence[int] = CLUSTERS,
    resolutions: Sequence[float] = RESOLUTIONS,
    shift: bool = False,
    permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Do the models' groups follow their labels? One row a method, similarity and clustering, one a Mantel test.

    pairs : columns model_a, model_b, mean, dissimilarity, similarity, and method (if there are several)
    labels : model -> e.g. 'CNN'; architectures : model -> architecture, so that its seeds keep one label; else each
        model is its own
    communities : how many groups; ari : adjusted Rand index with the labels; r (Mantel rows) : correlation of the
        similarity with having the same label, over architectures, whose seeds are averaged
    p : one-sided share of the arrangements of the labels over the architectures with an index as high; all different
        arrangements where those are at most 5040 (`exact`), else (1 + #)/(1 + permutations)
    null_high : the index that 95 % of the arrangements stay below or at
    p_smallest : the p of a clustering that is the labels; no data can give less
    p_adjusted : the share whose highest index over all clusterings of this method and similarity is as high (Westfall &
        Young 1993): p of having looked at several cuts and resolutions
    What cannot be computed leaves a row with its reason.
    """
    pairs = pairs if "method" in pairs else pairs.assign(method="")
    models = list(pd.unique(pairs[["model_a", "model_b"]].to_numpy().ravel()))
    own = {model: model for model in models} if architectures is None else architectures
    _check_labels(models, labels, own)
    rows = []
    for key, part in pairs.groupby(KEYS, sort=False):
        makers = {
            HIERARCHICAL: functools.partial(_cuts, part, clusters),
            LOUVAIN: functools.partial(_communities, part, resolutions, shift, seed),
        }
        found, failed = _made(makers)
        found = _tested(found, labels, own, permutations, seed) if len(found) else []
        mantel = _mantel(part, labels, own, permutations, seed)
        rows += [dict(zip(KEYS, key)) | row for row in [*found, *failed, mantel]]
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def arrangements(labels: Sequence[str], permutations: int = 9999, seed: int = 0) -> tuple[np.ndarray, bool]:
    """((orders, items) codes of labels, whether those are all there are), the first as given.

    All different arrangements of the labels where they are at most 5040, else so many random ones.
    """
    _, codes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    total = math.factorial(len(codes)) // math.prod(math.factorial(count) for count in np.bincount(codes))
    if total <= MOST_ENUMERATED:
        every = np.array(list(_different(tuple(np.bincount(codes)))), dtype=int).reshape(total, len(codes))
        given = (every == codes).all(1)
        return np.concatenate([every[given], every[~given]]), True
    drawn = np.random.default_rng(seed).permuted(np.tile(codes, (permutations, 1)), axis=1)
    return np.concatenate([codes[None], drawn]), False


def _different(left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every arrangement of left[c] items of each code c."""
    if not any(left):
        yield ()
    for code, count in enumerate(left):
        if count:
            rest = (*left[:code], count - 1, *left[code + 1 :])
            yield from ((code, *tail) for tail in _different(rest))


def _made(makers: Mapping[str, Callable[[], pd.DataFrame]]) -> tuple[pd.DataFrame, list[dict]]:
    """The clusterings that could be made, and a row with the reason for each kind that could not."""
    frames, failed = [], []
    for name, make in makers.items():
        try:
            frames.append(make())
        except InputError as error:
            failed.append({"clustering": name, "reason": str(error)})
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(), failed


def _tested(found: pd.DataFrame, labels: Mapping, own: Mapping, permutations: int, seed: int) -> list[dict]:
    """A row for each clustering: its index on every arrangement of the labels, and the p-values from those."""
    names = list(pd.unique(found["model"]))
    kinds = list(dict.fromkeys(own[name] for name in names))
    label = {own[name]: labels[name] for name in names}
    orders, exact = arrangements([label[kind] for kind in kinds], permutations, seed)
    of_models = orders[:, [kinds.index(own[name]) for name in names]]
    groups = [(key, part.set_index("model")["cluster"][names]) for key, part in found.groupby(CLUSTERING, sort=False)]
    indices = np.stack([adjusted_rand(part.to_numpy(), of_models) for _, part in groups])
    highest = np.where(np.isnan(indices), -np.inf, indices).max(0)
    same_groups = adjusted_rand(of_models[0], of_models)
    shared = {"models": len(names), "orders": len(orders), "exact": exact}
    shared["p_smallest"] = _share(same_groups, same_groups[0])
    rows = []
    for (key, part), values in zip(groups, indices):
        row = dict(zip(CLUSTERING, key)) | shared | {"communities": part.nunique(), "ari": values[0]}
        row["null_high"] = np.quantile(values, 0.95)
        row |= {"p": _share(values, values[0]), "p_adjusted": _share(highest, values[0])}
        reason = "one group, and one label: nothing to agree about" if np.isnan(values[0]) else ""
        rows.append(row | {"reason": reason})
    return rows


def _mantel(pairs: pd.DataFrame, labels: Mapping, own: Mapping, permutations: int, seed: int) -> dict:
    """Correlation of the similarity of two architectures, seeds averaged, with having the same label."""
    similarity = square(pairs, "mean", diagonal=0)
    kinds = list(dict.fromkeys(own[name] for name in similarity.index))
    label = {own[name]: labels[name] for name in similarity.index}
    member = np.array([[own[name] == kind for name in similarity.index] for kind in kinds], dtype=float)
    between = member @ similarity.to_numpy() @ member.T / np.outer(member.sum(1), member.sum(1))
    factor = {"label": same([label[kind] for kind in kinds])}
    found = follows(between, factor, permutations=permutations, seed=seed).iloc[0]
    row = {"clustering": MANTEL, "weights": "similarity", "models": len(similarity)}
    return row | {name: found[name] for name in ("r", "p", "p_smallest", "orders", "exact", "reason")}


def _share(values: np.ndarray, observed: float) -> float:
    return float((values >= observed - REACHED).mean()) if np.isfinite(observed) else np.nan


def _indicators(codes: np.ndarray) -> np.ndarray:
    """(…, K) of values -> (…, K, groups) of 0 and 1."""
    return (codes[..., None] == np.unique(codes)).astype(float)


def _pairs(counts: np.ndarray) -> np.ndarray:
    return counts * (counts - 1) / 2


def _check_labels(models: Sequence[str], labels: Mapping[str, str], own: Mapping[str, str]) -> None:
    for what, given in (("label", labels), ("architecture", own)):
        missing = [model for model in models if model not in given]
        if missing:
            raise InputError(f"{len(missing)} models have no {what}, first {missing[0]!r}; give one for each")
    for kind in dict.fromkeys(own[model] for model in models):
        several = {labels[model] for model in models if own[model] == kind}
        if len(several) > 1:
            raise InputError(f"architecture {kind!r} has the labels {sorted(several)}; its seeds must share one")
