"""Groups of models: block structure is found, labels at random are not, and sklearn and scipy agree."""

import itertools
import math

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest
from sklearn.metrics import adjusted_rand_score

from explanations import clusters as mc
from utils import InputError

MODELS = [f"{family}{k} seed {seed}" for family in "ct" for k in range(3) for seed in (0, 1)]
FAMILY = {model: "CNN" if model[0] == "c" else "transformer" for model in MODELS}
ARCHITECTURE = {model: model[:2] for model in MODELS}


def pairs(value, models=MODELS, **columns):
    """A row a pair, its similarity value(a, b), its dissimilarity 1 − that."""
    rows = [{"model_a": a, "model_b": b, "mean": value(a, b)} for a, b in itertools.combinations(models, 2)]
    table = pd.DataFrame(rows).assign(similarity="cosine")
    return table.assign(dissimilarity=1 - table["mean"], **columns)


def blocks(a, b):
    """0.9 between seeds, 0.6 within a family, 0.1 between families."""
    return 0.9 if ARCHITECTURE[a] == ARCHITECTURE[b] else 0.6 if FAMILY[a] == FAMILY[b] else 0.1


def groups(series):
    return {frozenset(series.index[series == number]) for number in series.unique()}


def of(mapping, models=MODELS):
    return {frozenset(m for m in models if mapping[m] == value) for value in set(mapping.values())}


# ---------------------------------------------------------------------------------------------------------- clusterings


def test_blocks_are_joined_at_the_mean_of_their_distances():
    linked = mc.tree(mc.square(pairs(blocks), "dissimilarity", diagonal=0))
    assert linked[:, 2] == pytest.approx([0.1] * 6 + [0.4] * 4 + [0.9])  # six pairs of seeds, two families, all


def test_average_linkage_by_hand():
    distances = pd.DataFrame([[0, 1, 4], [1, 0, 6], [4, 6, 0]], list("xyz"), list("xyz"), dtype=float)
    assert mc.tree(distances)[:, 2] == pytest.approx([1, 5])  # (4 + 6) / 2


def test_blocks_are_cut_into_families_and_architectures():
    distances = mc.square(pairs(blocks), "dissimilarity", diagonal=0)
    assert groups(mc.cut(distances, 2)) == of(FAMILY)
    assert groups(mc.cut(distances, 6)) == of(ARCHITECTURE)
    assert len(groups(mc.cut(distances, 4))) == 2  # the architectures of a family join at one height


def test_communities_are_families_and_at_a_higher_resolution_architectures():
    similarity = mc.square(pairs(blocks), "mean", diagonal=1)
    assert groups(mc.louvain(similarity, 1.0)) == of(FAMILY)
    assert groups(mc.louvain(similarity, 2.0)) == of(ARCHITECTURE)
    assert len(groups(mc.louvain(similarity, 0.1))) == 1


def test_communities_are_the_best_of_all_partitions_of_few_models():
    generator = np.random.default_rng(3)
    for _ in range(3):
        values = generator.random((6, 6))
        similarity = pd.DataFrame((values + values.T) / 2, list("uvwxyz"), list("uvwxyz"))
        graph = nx.from_numpy_array(similarity.to_numpy() - np.diag(np.diag(similarity)))

        def modularity(codes, graph=graph):
            parts = [{i for i in range(6) if codes[i] == c} for c in set(codes)]
            return nx.community.modularity(graph, parts, resolution=1.1)

        best = max(modularity(codes) for codes in itertools.product(range(6), repeat=6) if codes[0] == 0)
        assert modularity(tuple(mc.louvain(similarity, 1.1))) == pytest.approx(best)


def test_negative_similarities_are_refused_or_shifted_and_said_to_be():
    table = pairs(lambda a, b: blocks(a, b) - 0.3)
    with pytest.raises(InputError, match="36 of 66 weights are negative"):
        mc.louvain(mc.square(table, "mean", diagonal=1))
    found = mc.cluster_table(table, FAMILY, architectures=ARCHITECTURE, shift=True)
    assert set(found.loc[found["clustering"] == "Louvain", "weights"]) == {"(1 + similarity)/2"}
    with pytest.raises(InputError, match="no graph"):
        mc.louvain(mc.square(pairs(lambda a, b: 0.0), "mean", diagonal=1))


def test_the_table_goes_on_where_louvain_cannot():
    table = mc.cluster_table(pairs(lambda a, b: blocks(a, b) - 0.3), FAMILY, architectures=ARCHITECTURE)
    (row,) = table[table["clustering"] == "Louvain"].to_dict("records")
    assert "negative" in row["reason"] and np.isnan(row["p"])
    first = table.iloc[0]
    assert (first["clustering"], first["parameter"], first["ari"]) == ("hierarchical", 2, 1)


def test_the_order_of_the_pairs_does_not_matter():
    table = pairs(blocks)
    turned = table.rename(columns={"model_a": "model_b", "model_b": "model_a"}).sample(frac=1, random_state=0)
    one, other = (mc.square(each, "mean", diagonal=1) for each in (table, turned))
    pd.testing.assert_frame_equal(one, other.loc[one.index, one.columns])


def test_tables_that_are_not_of_pairs_are_refused():
    table = pairs(blocks)
    wrong = {"lack": table.iloc[1:], "have 67 rows for 66": pd.concat([table, table.iloc[:1]])}
    for words, each in wrong.items():
        with pytest.raises(InputError, match=words):
            mc.square(each, "mean", diagonal=1)
    distances = mc.square(table, "dissimilarity", diagonal=0)
    with pytest.raises(InputError, match="negative"):
        mc.tree(-distances)
    with pytest.raises(InputError, match="a pair of models has none"):
        mc.tree(distances * np.nan)
    with pytest.raises(InputError, match="cannot be cut"):
        mc.cut(distances, 13)


# ------------------------------------------------------------------------------------------------ agreement with labels


def test_the_index_is_sklearns():
    generator = np.random.default_rng(0)
    for _ in range(20):
        clusters, labels = generator.integers(0, 4, 12), generator.integers(0, 3, (5, 12))
        expected = [adjusted_rand_score(row, clusters) for row in labels]
        assert mc.adjusted_rand(clusters, labels) == pytest.approx(expected, abs=1e-12)
    one = np.zeros(5, dtype=int)
    assert np.isnan(mc.adjusted_rand(one, one)) and mc.adjusted_rand(one, np.arange(5) % 2) == 0


def test_all_arrangements_are_there_once_the_given_one_first():
    labels = ["b", "a", "b", "c", "a", "b"]
    orders, exact = mc.arrangements(labels)
    assert exact and len(orders) == math.factorial(6) // (2 * 3 * 2) == len(np.unique(orders, axis=0))
    assert (np.array(["a", "b", "c"])[orders[0]] == labels).all()
    many, exact = mc.arrangements(["a", "b"] * 10, permutations=50)
    assert not exact and many.shape == (51, 20) and (many.sum(1) == 10).all()


def test_groups_that_are_the_labels_have_an_index_of_1_and_the_smallest_p():
    table = mc.cluster_table(pairs(blocks), FAMILY, architectures=ARCHITECTURE).set_index(["clustering", "parameter"])
    for key in [("hierarchical", 2.0), ("Louvain", 1.0)]:
        row = table.loc[key]
        assert row["ari"] == 1 and row["communities"] == 2 and row["models"] == 12
        # of 20 arrangements of three and three architectures, two are the families
        assert row["p"] == row["p_adjusted"] == row["p_smallest"] == pytest.approx(0.1)
        assert row["orders"] == 20 and row["exact"]
    mantel = table[table["r"].notna()].iloc[0]
    assert mantel["r"] == pytest.approx(1) and mantel["p"] == mantel["p_smallest"] == pytest.approx(0.1)


def test_groups_that_are_seeds_do_not_pass_for_families():
    def twins_only(a, b):
        return 0.9 if ARCHITECTURE[a] == ARCHITECTURE[b] else 0.1

    table = mc.cluster_table(pairs(twins_only), FAMILY, architectures=ARCHITECTURE, clusters=[6])
    row = table[table["clustering"] == "hierarchical"].iloc[0]
    assert row["communities"] == 6 and row["ari"] > 0.2 and row["p"] == 1  # whatever the labels, seeds share them
    free = mc.cluster_table(pairs(twins_only), FAMILY, clusters=[6])  # as if seeds were architectures
    assert free[free["clustering"] == "hierarchical"].iloc[0]["p"] < 0.05


def test_p_is_that_of_sklearn_over_all_labelings_that_keep_seeds_together():
    generator = np.random.default_rng(1)
    noisy = pairs(lambda a, b: 0.6 * blocks(a, b) + 0.4 * generator.random())
    table = mc.cluster_table(noisy, FAMILY, architectures=ARCHITECTURE, clusters=[3], resolutions=[1.0])
    clusters = mc.cut(mc.square(noisy, "dissimilarity", diagonal=0), 3)
    kinds, indices = sorted(set(ARCHITECTURE.values())), []
    for chosen in itertools.combinations(kinds, 3):
        indices.append(adjusted_rand_score([ARCHITECTURE[m] in chosen for m in clusters.index], clusters))
    observed = adjusted_rand_score([FAMILY[m] for m in clusters.index], clusters)
    row = table.iloc[0]
    assert row["ari"] == pytest.approx(observed)
    assert row["p"] == pytest.approx(np.mean(np.array(indices) >= observed - 1e-9))
    assert row["p_adjusted"] >= row["p"]


def test_labels_at_random_give_a_uniform_p():
    models = [f"m{k:02d}" for k in range(12)]
    mantel, clustered = [], []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        labels = dict(zip(models, generator.permuted(["CNN"] * 6 + ["transformer"] * 6)))
        table = pairs(lambda a, b, generator=generator: generator.random(), models)
        options = {"clusters": [4], "resolutions": [1.1], "permutations": 199, "seed": seed}
        found = mc.cluster_table(table, labels, **options).set_index("clustering")
        mantel.append(found.loc["none (Mantel)", "p"])
        clustered += [found.loc["hierarchical", "p"], found.loc["Louvain", "p"]]
        assert not found.loc["Louvain", "reason"] and found.loc["Louvain", "p_smallest"] == pytest.approx(2 / 924)
    assert kstest(mantel, "uniform").pvalue > 0.01
    for level in (0.05, 0.1, 0.25):  # an index has few values, so that its p stays at or below the level
        assert (np.array(clustered) <= level).mean() < level + 3 * np.sqrt(level * (1 - level) / len(clustered))


def test_methods_and_similarities_are_tested_apart_and_a_missing_pair_only_where_it_is():
    good, bad = pairs(blocks, method="a"), pairs(blocks, method="b")
    bad.loc[3, ["mean", "dissimilarity"]] = np.nan
    table = mc.cluster_table(pd.concat([good, bad]), FAMILY, architectures=ARCHITECTURE, resolutions=[1.0])
    assert table.loc[table["method"] == "a", "reason"].eq("").all()
    assert table.loc[table["method"] == "b", "p"].isna().all()
    assert all("none" in reason or "no similarity" in reason for reason in table.loc[table["method"] == "b", "reason"])


def test_labels_that_are_missing_or_split_an_architecture_are_refused():
    table = pairs(blocks)
    with pytest.raises(InputError, match="no label"):
        mc.cluster_table(table, {MODELS[0]: "CNN"})
    with pytest.raises(InputError, match="seeds must share one"):
        mc.cluster_table(table, FAMILY | {MODELS[0]: "transformer"}, architectures=ARCHITECTURE)
