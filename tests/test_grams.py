"""Packed Gram matrices: the same planes as from whole ones, in float32 as well, and float64 where that would not do."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from similarity import cells, grams, measures, plane
from similarity.rdm import average_ranks
from tests.made import made


def correlated(n, widths, seed, mean=1.0, dtype=torch.float32):
    """Sites that share a latent cause, with means far from zero as after a leaky ReLU."""
    cause = np.random.default_rng(0).normal(size=(n, 12))
    rng = np.random.default_rng(seed)
    maps = [cause @ rng.normal(size=(12, w)) / 3 + rng.normal(size=(n, w)) + mean for w in widths]
    return {f"s{k}": torch.as_tensor(np.maximum(X, 0.1 * X), dtype=dtype) for k, X in enumerate(maps)}


def pairwise(name, A, B, **options):
    return [[getattr(measures, name)(X, Y, **options) for Y in B.values()] for X in A.values()]


FLAVOURS = [
    ("linear_cka", {}),
    ("linear_cka", {"debiased": False}),
    ("rbf_cka", {}),
    ("rbf_cka", {"fraction": 0.2}),
    ("rbf_cka", {"fraction": 0.5, "debiased": False}),
    ("rsa", {}),
    ("rsa", {"rdm": "euclidean"}),
    ("rsa", {"compare": "pearson"}),
    ("rsa", {"compare": "cosine"}),
]


@pytest.fixture
def always_float32(monkeypatch):
    monkeypatch.setattr(cells, "LONG_WORK", 0)


@pytest.mark.parametrize("name, options", FLAVOURS)
@pytest.mark.parametrize("n, mean", [(4, 1), (17, 1), (50, 0), (150, 300)])
def test_float32_planes_are_good_to_five_digits(always_float32, name, options, n, mean):
    A, B = correlated(n, [3, 40, 200], 1, mean), correlated(n, [7, 130], 2, mean)
    got = plane(name, made(A), made(B), **options).values
    np.testing.assert_allclose(got, pairwise(name, A, B, **options), atol=1e-5)


@pytest.mark.parametrize("name, options", FLAVOURS)
@pytest.mark.parametrize("n", [4, 5, 16, 33, 130])  # one block, and several of unequal height
def test_float64_planes_are_exact(name, options, n):
    A, B = correlated(n, [3, 40], 1, dtype=torch.float64), correlated(n, [7, 130], 2, dtype=torch.float64)
    np.testing.assert_allclose(
        plane(name, made(A), made(B), **options).values, pairwise(name, A, B, **options), atol=1e-11
    )
    np.testing.assert_allclose(plane(name, made(A), **options).values, pairwise(name, A, A, **options), atol=1e-11)


def test_several_bandwidths_at_once_are_those_one_by_one():
    A, B = correlated(40, [3, 40], 1), correlated(40, [7], 2)
    planes = plane("rbf_cka", made(A), made(B), fraction=(0.2, 0.4, 0.8))
    assert [p.options["fraction"] for p in planes] == [0.2, 0.4, 0.8]
    for fraction, result in zip((0.2, 0.4, 0.8), planes):
        np.testing.assert_allclose(result.values, plane("rbf_cka", made(A), made(B), fraction=fraction).values)
        assert set(result.tidy()["options"]) == {f"fraction={fraction}"}
    expected = [measures.rbf_cka(A["s0"], B["s0"], fraction=f) for f in (0.2, 0.4, 0.8)]
    assert measures.rbf_cka(A["s0"], B["s0"], fraction=[0.2, 0.4, 0.8]) == expected
    with pytest.raises(ValueError, match="fraction must be above 0"):
        plane("rbf_cka", made(A), fraction=(0.2, 0))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_of_very_large_or_small_features_do_not_overflow(always_float32, scale):
    A, B = correlated(30, [5, 40], 1), correlated(30, [7], 2)
    scaled = {name: X * scale for name, X in A.items()}
    for name in ("linear_cka", "rbf_cka", "rsa"):
        got = plane(name, made(scaled), made(B)).values
        np.testing.assert_allclose(got, plane(name, made(A), made(B)).values, atol=1e-5)


def test_where_float32_would_lose_digits_float64_is_taken(always_float32):
    """All images almost equally far from each other: centring leaves a thousandth of the Gram matrix."""
    noise = torch.as_tensor(np.random.default_rng(0).normal(size=(40, 40)))
    A, B = {"s": (10 * torch.eye(40) + 0.01 * noise).float()}, {"s": (20 * torch.eye(40) + 0.02 * noise.T).float()}
    with pytest.raises(grams.NeedsDouble):
        grams.linear(A, True, torch.float32)
    np.testing.assert_allclose(plane("linear_cka", made(A), made(B)).values, pairwise("linear_cka", A, B), atol=1e-9)


def test_a_cluster_of_almost_identical_images_keeps_its_median_distance(always_float32):
    """Distances within the cluster are rounding in float32, and they are most of them."""
    X = 100 + 1e-3 * torch.as_tensor(np.random.default_rng(0).normal(size=(40, 6)))
    X[:4] += torch.as_tensor(np.random.default_rng(1).normal(size=(4, 6))) * 1e3
    A, B = {"s": X.float()}, correlated(40, [5], 1)
    with pytest.raises(grams.NeedsDouble):
        grams.rbf(A, [1.0], True, torch.float32)
    np.testing.assert_allclose(plane("rbf_cka", made(A), made(B)).values, pairwise("rbf_cka", A, B), atol=1e-9)


def test_a_plane_notes_what_the_measures_refuse(always_float32):
    A = correlated(20, [5], 1)
    A["simplex"] = torch.eye(20) * 3.7 + 0.3
    A["repeated"] = torch.cat([torch.ones(18, 2), torch.tensor([[2.0, 3], [5, 1]])])
    linear, rbf, rsa = (plane(name, made(A)) for name in ("linear_cka", "rbf_cka", "rsa"))
    assert "simplex: all images are equally similar" in linear.notes["s0", "simplex"]
    assert "repeated: more than half of the image pairs are identical" in rbf.notes["repeated", "s0"]
    assert "repeated: an image has the same value in all its features" in rsa.notes["repeated", "s0"]
    for result in (linear, rbf, rsa):
        assert np.isfinite(result.frame().loc["s0", "s0"])


@pytest.mark.parametrize("values", [[3.0, 1, 2], [1.0, 1, 1], [2.0, 1, 2, 1, 0], [5.0]])
def test_ranks_are_scipys(values):
    np.testing.assert_array_equal(average_ranks(np.array(values)), rankdata(values))


@pytest.mark.parametrize("n", [4, 16, 37, 1000])
def test_the_kept_blocks_hold_every_pair_once(n):
    whole = torch.zeros(n, n)
    kept = grams.Grams.empty(1, n, True, torch.float32, torch.device("cpu"))
    for rows, below, diagonal in kept.pieces(0):
        whole[rows, : rows.start] += below.fill_(1)
        whole[: rows.start, rows] += below.T
        whole[rows, rows] += diagonal.fill_(1)
    assert (whole == 1).all()
    assert sum(block.numel() for block in kept.below + kept.diagonal) == grams.Layout(n).size
    assert grams.Layout(1000).size < 0.63 * 1000**2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: planes on the GPU were not checked")
@pytest.mark.parametrize("name", list(measures.MEASURES))
def test_planes_on_the_gpu_agree_with_the_cpu(name):
    A, B = made(correlated(60, [3, 20], 1)), made(correlated(60, [7], 2))
    np.testing.assert_allclose(plane(name, A, B, device="cuda").values, plane(name, A, B).values, atol=1e-5)
