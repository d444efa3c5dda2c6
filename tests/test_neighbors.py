"""Neighbourhood measures against plain loops, exact constants, and what ties must not do."""

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

from similarity import neighbors
from similarity.measures import NotComputable, chance, cknna, information_imbalance, mutual_knn


def gaussian(n, p, seed=0):
    return np.random.default_rng(seed).normal(size=(n, p))


def related(n=50, p=6, q=4):
    X = gaussian(n, p)
    return X, X[:, :q] + 0.7 * gaussian(n, q, 1)


# --------------------------------------------------------------------------------------------------------- plain twins


def order(X):
    """For each row the other rows from nearest to farthest."""
    D = cdist(X, X)
    np.fill_diagonal(D, np.inf)
    return D.argsort(1)


def plain_mutual_knn(X, Y, k):
    x, y = order(X)[:, :k], order(Y)[:, :k]
    return np.mean([len(set(a) & set(b)) / k for a, b in zip(x, y)])


def plain_imbalance(X, Y, k):
    n, near, order_y = len(X), order(X)[:, :k], order(Y)
    return 2 / (n**2 * k) * sum(list(order_y[i]).index(j) + 1 for i in range(n) for j in near[i])


def plain_hsic1(K, L):
    """Song et al. 2012, as printed; kernels without diagonals."""
    n, one = len(K), np.ones(len(K))
    cross = 2 / (n - 2) * (one @ K @ L @ one)
    return (np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - cross) / (n * (n - 3))


def plain_cknna(X, Y, k):
    def kernel_and_mask(Z):
        K = Z @ Z.T
        np.fill_diagonal(K, -np.inf)
        mask = np.zeros_like(K)
        np.put_along_axis(mask, np.argsort(-K, 1)[:, :k], 1, 1)
        np.fill_diagonal(K, 0)
        return K, mask

    (K, a), (L, b) = kernel_and_mask(X), kernel_and_mask(Y)
    both = a * b
    return plain_hsic1(K * both, L * both) / np.sqrt(plain_hsic1(K * a, K * a) * plain_hsic1(L * b, L * b))


PLAIN = [(mutual_knn, plain_mutual_knn), (information_imbalance, plain_imbalance), (cknna, plain_cknna)]


@pytest.mark.parametrize("k", [2, 3, 10, 30])
@pytest.mark.parametrize("measure, plain", PLAIN, ids=lambda f: f.__name__)
def test_agrees_with_a_plain_twin(measure, plain, k):
    X, Y = related()
    X = X + 0.8  # CKNNA's Grams are not centred
    assert measure(X, Y, k=k) == pytest.approx(plain(X, Y, k), abs=1e-12)
    assert measure(Y, X, k=k) == pytest.approx(plain(Y, X, k), abs=1e-12)


@pytest.mark.parametrize("measure, plain", PLAIN, ids=lambda f: f.__name__)
def test_rows_may_be_taken_in_blocks(measure, plain, monkeypatch):
    X, Y = related()
    monkeypatch.setattr(neighbors, "BLOCK_ENTRIES", 7 * len(X))
    assert measure(X, Y, k=5) == pytest.approx(plain(X, Y, 5), abs=1e-12)


# ------------------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("n, k", [(20, 1), (50, 1), (50, 7)])
def test_the_imbalance_of_a_side_with_itself_is_exact(n, k):
    X = gaussian(n, 3)
    assert information_imbalance(X, X, k=k) == pytest.approx((k + 1) / n, abs=1e-14)  # 2/n for k = 1


def test_the_imbalance_of_strangers_is_one():
    values = [information_imbalance(gaussian(200, 3, s), gaussian(200, 3, s + 50)) for s in range(20)]
    assert np.mean(values) == pytest.approx(chance("information_imbalance", 200, 3, 3), abs=0.02)


def test_a_plane_tells_its_first_coordinate_more_than_the_coordinate_tells_the_plane():
    values = [(gaussian(500, 2, s),) * 2 for s in range(10)]
    there = np.mean([information_imbalance(X, X[:, :1]) for X, _ in values])
    back = np.mean([information_imbalance(X[:, :1], X) for X, _ in values])
    assert there == pytest.approx(0.066, abs=0.015) and back == pytest.approx(0.530, abs=0.03)


def test_mutual_neighbours_of_strangers_are_as_many_as_chance_says():
    values = [mutual_knn(gaussian(100, 3, s), gaussian(100, 3, s + 50), k=10) for s in range(20)]
    assert np.mean(values) == pytest.approx(chance("mutual_knn", 100, 3, 3), abs=0.01)
    assert chance("mutual_knn", 100, 3, 3, k=33) == pytest.approx(1 / 3)


def test_cknna_of_all_neighbours_is_debiased_cka_of_the_grams_as_they_are():
    X, Y = related(n=20)
    K, L = X @ X.T, Y @ Y.T
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    expected = plain_hsic1(K, L) / np.sqrt(plain_hsic1(K, K) * plain_hsic1(L, L))
    masked = plain_cknna(X, Y, 19)  # the twin allows every other image as a neighbour
    assert masked == pytest.approx(expected, abs=1e-12)
    assert cknna(X, Y, k=18) == pytest.approx(plain_cknna(X, Y, 18), abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------- ties


def tied_imbalance(X, Y):
    """Nearest neighbours share their place, ranks are averaged; a double loop over integers."""
    n, total = len(X), 0.0
    for i in range(n):
        a, b = (np.array([np.sum((Z[i] - Z[j]) ** 2) for j in range(n) if j != i]) for Z in (X, Y))
        total += rankdata(b)[a == a.min()].mean()
    return 2 / n**2 * total


def test_ties_are_averaged_and_rounding_does_not_break_them():
    rng = np.random.default_rng(0)
    for _ in range(5):
        X, Y = rng.integers(0, 3, (40, 2)).astype(float), rng.integers(0, 4, (40, 1)).astype(float)
        assert information_imbalance(X, Y) == pytest.approx(tied_imbalance(X, Y), abs=1e-12)
        assert information_imbalance(X * 0.1 + 7, Y / 3) == pytest.approx(tied_imbalance(X, Y), abs=1e-12)


@pytest.mark.parametrize("measure", [mutual_knn, information_imbalance, cknna])
def test_tied_rows_give_the_same_number_in_any_order(measure):
    rng = np.random.default_rng(1)
    X, Y = rng.integers(-3, 4, (60, 2)).astype(float), rng.integers(-3, 4, (60, 3)).astype(float)
    value = measure(X, Y, k=4)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(60)
        assert measure(X[order], Y[order], k=4) == pytest.approx(value, abs=1e-12)


def test_neighbours_tied_for_the_last_place_share_it():
    points = torch.tensor([[0.0], [1.0], [-1.0], [10.0]])  # the first has two nearest neighbours
    nearest = neighbors.cloud(points.double(), side="X", k=1).graph.toarray()
    np.testing.assert_allclose(nearest[0], [0, 0.5, 0.5, 0])
    np.testing.assert_allclose(nearest.sum(1), 1)
    assert mutual_knn(points, points, k=1) == 1


def test_identical_images_are_each_others_nearest_neighbours():
    X = gaussian(20, 300)  # many features: products round
    X[7] = X[3]
    graph = neighbors.cloud(torch.as_tensor(X + 1e3), side="X", k=1).graph.toarray()
    assert graph[7, 3] == graph[3, 7] == 1


# -------------------------------------------------------------------------------------------------------------- float32


@pytest.fixture
def always_long(monkeypatch):
    monkeypatch.setattr(neighbors, "LONG_WORK", 0)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("scale, mean", [(1, 0), (1, 300), (1e-25, 0), (1e25, 0)])
def test_float32_features_are_ranked_as_well_as_in_float64(always_long, k, scale, mean):
    X, Y = (
        (scale * (Z + mean)).astype(np.float32) for Z in (gaussian(300, 40), gaussian(300, 40) + gaussian(300, 40, 1))
    )
    for measure in (mutual_knn, information_imbalance):
        expected = measure(X.astype(float), Y.astype(float), k=k)
        assert measure(X, Y, k=k) == pytest.approx(expected, abs=1e-5)


def test_float32_features_full_of_ties_are_compared_in_float64(always_long):
    rng = np.random.default_rng(0)
    X, Y = (rng.integers(0, 3, (60, p)).astype(np.float32) for p in (5, 40))
    assert neighbors.cloud(torch.as_tensor(X), side="X", k=1).X.dtype == torch.float64
    assert information_imbalance(X, Y) == pytest.approx(tied_imbalance(X, Y), abs=1e-12)
    continuous = torch.as_tensor(gaussian(60, 5)).float()
    assert neighbors.cloud(continuous, side="X", k=1).X.dtype == torch.float32


def test_almost_equally_near_neighbours_are_told_apart_in_float64(always_long):
    """Two images nearly the same distance from a third, far closer to equal than float32 products can tell."""
    X = gaussian(50, 300).astype(np.float32)
    X[1], X[2] = X[0] + 1e-3, X[0] - 1e-3
    X[2, 0] += 1e-5
    D = cdist(X.astype(float), X.astype(float))
    np.fill_diagonal(D, np.inf)
    cloud = neighbors.cloud(torch.as_tensor(X), side="X", k=1)
    assert cloud.X.dtype == torch.float32
    np.testing.assert_array_equal(cloud.graph.toarray().argmax(1), D.argmin(1))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("measure", [mutual_knn, information_imbalance, cknna])
def test_as_many_neighbours_as_images_are_refused_with_the_numbers(measure):
    X = gaussian(12, 3)
    with pytest.raises(NotComputable, match="X has 12 rows; 11 neighbours of each need at least 13 images"):
        measure(X, X, k=11)
    assert np.isfinite(measure(X, X, k=10))
    for k in (0, -1, 2.5, "3", True):
        with pytest.raises(ValueError, match="k must be a whole number of neighbours, at least 1"):
            measure(X, X, k=k)


def test_neighbours_without_positive_hsic_are_refused_not_made_a_number():
    """Three images in a circle, each the nearest of the next: trace 0, Σ = 3, 1ᵀK̃K̃1 = 3, so HSIC₁ < 0."""
    circle = sparse.csr_array(np.roll(np.eye(8)[:, :3], 1, axis=1) @ np.eye(3, 8))
    assert neighbors.hsic1(circle, circle) == pytest.approx((0 + 9 / 42 - 2 / 6 * 3) / 40)
    with pytest.raises(NotComputable, match=r"a: HSIC₁ of its nearest neighbours is -0.0196, not above 0"):
        neighbors.cknna_of(*[neighbors.MaskedGram(circle, circle, "a")] * 2)
