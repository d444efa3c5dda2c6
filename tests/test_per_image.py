"""Per-image agreement: rows of U-centred Gram matrices, adding up to debiased CKA, and pointing at the odd image."""

import numpy as np
import pytest
import torch

from similarity import measures
from similarity.inputs import NotComputable
from similarity.per_image import agreement, mean_agreement
from tests.made import made


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def of(X, Y, **options):
    return agreement(made({"x": X}, **options), "x", made({"y": Y}), "y")


def u_centred(X):
    """As in SCIENCE, section 2, with sums over lists."""
    n = len(X)
    K = [[0.0 if i == j else float(X[i] @ X[j]) for j in range(n)] for i in range(n)]
    r = [sum(row) / (n - 2) for row in K]
    g = sum(map(sum, K)) / ((n - 1) * (n - 2))
    return np.array([[0.0 if i == j else K[i][j] - r[i] - r[j] + g for j in range(n)] for i in range(n)])


def test_it_is_the_cosine_of_rows_of_u_centred_gram_matrices():
    X, Y = (torch.from_numpy(gaussian(12, p, seed=p)) for p in (3, 5))
    found = of(X, Y)
    for i, (x, y) in enumerate(zip(u_centred(X.numpy()), u_centred(Y.numpy()))):
        assert found.iloc[i] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-12)


def test_weighted_by_the_rows_norms_it_adds_up_to_debiased_cka():
    X = torch.from_numpy(gaussian(30, 4, seed=1))
    Y = torch.from_numpy(X.numpy() @ gaussian(4, 6, seed=2) + gaussian(30, 6, seed=3))
    x, y = (np.linalg.norm(u_centred(side.numpy()), axis=1) for side in (X, Y))
    total = (of(X, Y) * x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    assert total == pytest.approx(measures.linear_cka(X, Y), abs=1e-12)


def test_identical_sides_agree_on_every_image():
    X = gaussian(20, 7)
    np.testing.assert_allclose(of(X, X), 1, atol=1e-12)


def test_rotation_scale_and_shift_are_not_seen_but_stretching_is():
    X, Y = (torch.from_numpy(gaussian(25, 6, seed=seed)) for seed in (1, 2))
    rotation = torch.from_numpy(np.linalg.qr(gaussian(6, 6, seed=3))[0])
    before = of(X, Y)
    np.testing.assert_allclose(of(5 * X @ rotation - 40, Y), before, atol=1e-9)
    np.testing.assert_allclose(of(X, 0.01 * Y @ rotation + 3), before, atol=1e-9)
    stretched = X * torch.tensor([5.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert np.abs(of(stretched, Y) - before).max() > 0.05


def test_independent_sides_agree_on_no_image_on_average():
    means = [of(gaussian(40, 8, seed=2 * k), gaussian(40, 8, seed=2 * k + 1)).mean() for k in range(60)]
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    assert abs(np.mean(means)) < 3.5 * error
    assert error < 0.01


def test_an_image_whose_row_was_corrupted_in_one_space_stands_out():
    X = gaussian(60, 10, seed=1)
    Y = X @ np.linalg.qr(gaussian(10, 10, seed=2))[0]
    Y[17] = gaussian(10, seed=3)
    found = of(X, Y)
    others = found.drop("i017")
    assert found.idxmin() == "i017"
    assert found["i017"] < others.mean() - 5 * others.std()


def test_images_are_matched_by_id():
    A, B = made({"x": gaussian(15, 4, seed=1)}), made({"y": gaussian(15, 4, seed=2)})
    turned = B.select(ids=B.ids[::-1])
    found = agreement(A, "x", turned, "y")
    np.testing.assert_allclose(found, agreement(A, "x", B, "y"), atol=1e-14)
    assert found.index.tolist() == A.ids
    with pytest.raises(ValueError, match="hold different images"):
        agreement(A, "x", B.select(ids=B.ids[1:]), "y")


def test_an_image_equally_similar_to_all_others_has_no_agreement():
    X = np.zeros((6, 5))
    X[1:] = np.eye(5) * np.array([1.0, 2, 3, 4, 5])  # orthogonal rows: every similarity is the same
    with pytest.raises(NotComputable, match="x: all images are equally similar"):
        of(X, gaussian(6, 3))


def hub():
    """Eleven points on a circle and its centre, which is as similar to each of them as all are on average."""
    turns = np.linspace(0, 2 * np.pi, 11, endpoint=False)[:, None]
    return 0.7 * np.vstack([np.zeros((1, 2)), np.hstack([np.cos(turns), np.sin(turns)])]) + 0.1


def test_an_image_as_similar_to_each_as_all_are_on_average_has_no_agreement():
    assert 0 < np.abs(u_centred(hub())[0]).max() < 1e-14  # not 0: rounding would pass for a direction
    found = of(torch.from_numpy(hub()), gaussian(12, 3))
    assert np.isnan(found.iloc[0]) and found.iloc[1:].notna().all()


def test_an_image_without_agreement_at_one_pair_has_no_mean():
    A, B = made({"a0": torch.from_numpy(hub()), "a1": gaussian(12, 3, seed=1)}), made({"b": gaussian(12, 4, seed=2)})
    table = mean_agreement(A, B, [("a0", "b"), ("a1", "b")]).set_index("id")["agreement"]
    assert table.isna().tolist() == [True] + [False] * 11


def test_a_constant_site_is_refused():
    with pytest.raises(NotComputable, match="constant"):
        of(np.ones((8, 3)), gaussian(8, 3))


def test_several_rows_an_image_are_refused():
    A = made({"x": gaussian(6, 4, 3)}, policy="grid:2")
    with pytest.raises(ValueError, match="several rows an image"):
        agreement(A, "x", A, "x")


def test_the_mean_over_pairs_is_taken_image_by_image():
    A = made({"a0": gaussian(10, 3, seed=1), "a1": gaussian(10, 4, seed=2)})
    B = made({"b0": gaussian(10, 5, seed=3)}).select(ids=[f"i{k:03d}" for k in (3, 1, 0, 2, 9, 8, 7, 6, 5, 4)])
    pairs = [("a0", "b0"), ("a1", "b0")]
    table = mean_agreement(A, B, pairs)
    assert table.columns.tolist() == ["id", "agreement"] and table["id"].tolist() == A.ids
    one, other = (agreement(A, a, B, b) for a, b in pairs)
    np.testing.assert_allclose(table["agreement"], (one.to_numpy() + other.to_numpy()) / 2)
    with pytest.raises(ValueError, match="no pair"):
        mean_agreement(A, B, [])
