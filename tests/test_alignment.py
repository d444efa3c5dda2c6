"""Alignment of two sites, fitted on half of the images: known answers, held-out honesty, scipy and scikit-learn."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import eig, orthogonal_procrustes
from scipy.stats import binom, ortho_group
from sklearn.cross_decomposition import CCA
from sklearn.metrics import pairwise_distances, r2_score
from sklearn.neighbors import NearestNeighbors

from similarity.alignment import METHODS, align, alignment_table
from similarity.inputs import NotComputable
from similarity.measures import procrustes_distance
from similarity.retrieval import permutation_p
from tests.made import made

N = 160
SCORES = ["r2", "r2_ba", "retrieval_ab", "retrieval_ba"]


def gaussian(n, p, seed=0):
    return np.random.default_rng(seed).normal(size=(n, p))


def site(n=N, p=10, seed=0):
    """Features of unlike variance, so that principal components have an order."""
    return gaussian(n, p, seed) * np.linspace(3, 1, p)


def recording(X, **keywords):
    return made({"x": torch.as_tensor(X)}, **keywords)


def aligned(X, Y, method, components=6, **options):
    return align(recording(X), "x", recording(Y), "x", method=method, components=components, **options)


def scores(alignment):
    return [getattr(alignment, name) for name in SCORES]


def related(n=N, seed=0):
    X = site(n, 10, seed)
    return X, X @ gaussian(10, 7, seed + 1) + 2 * gaussian(n, 7, seed + 2)


# ------------------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize("method", METHODS)
def test_a_rotated_scaled_and_moved_site_is_the_same_site(method):
    X = site()
    found = aligned(X, 2.5 * X @ ortho_group.rvs(10, random_state=0) + 100, method)
    assert scores(found) == pytest.approx([1, 1, 1, 1], abs=1e-9)
    np.testing.assert_allclose(found.a, found.b, atol=1e-9)


def test_procrustes_keeps_the_first_sides_distances():
    X = site(p=6)
    found = aligned(X, 2.5 * X @ ortho_group.rvs(6, random_state=0) + 100, "procrustes")
    held_out = X[[int(name[1:]) for name in found.ids]]
    np.testing.assert_allclose(pairwise_distances(found.a), pairwise_distances(held_out), atol=1e-9)


def test_an_invertible_linear_map_is_seen_through_by_cca_and_not_by_procrustes():
    X = site()
    Y = X @ gaussian(10, 10, 1) + 3
    assert scores(aligned(X, Y, "cca")) == pytest.approx([1, 1, 1, 1], abs=1e-9)
    assert aligned(X, Y, "procrustes").r2 < 0.8


def test_a_curved_monotone_map_is_followed_by_the_manifold_alignment():
    t = np.random.default_rng(0).uniform(-1, 1, (200, 2))
    flat = t @ gaussian(2, 6, 1)
    curved = np.c_[np.sinh(3 * t[:, 0]), np.exp(2 * t[:, 1]), np.tanh(4 * t[:, 0]), t[:, 1] ** 3 + t[:, 1] / 3]
    found = aligned(flat, curved, "manifold", components=2)
    assert min(found.retrieval_ab, found.retrieval_ba) > 20 * found.chance
    ranks = (pairwise_distances(found.a, found.b) < np.linalg.norm(found.a - found.b, axis=1)[:, None]).sum(1)
    assert np.median(ranks) <= 2  # by chance 50 of 100
    assert found.p_value_ab < 1e-20


@pytest.mark.parametrize("method", METHODS)
def test_held_out_scores_of_strangers_are_at_chance(method):
    """48 to 80 dimensions against 100 images to fit on: what is fitted to noise would be near 1 if it leaked."""
    found = [aligned(gaussian(200, 80, s), gaussian(200, 48, s + 50), method, components=10) for s in range(8)]
    assert max(each.r2 for each in found) < 0
    assert max(each.r2_ba for each in found) < 0
    hits = sum(each.retrieval_ab * 100 for each in found)
    assert hits <= binom.ppf(0.9999, 800, 0.01)  # expected 8
    assert np.mean([np.corrcoef(each.a[:, 0], each.b[:, 0])[0, 1] for each in found]) == pytest.approx(0, abs=0.15)
    if method != "procrustes":  # and the fit half does look related
        assert min(np.corrcoef(each.fit_a[:, 0], each.fit_b[:, 0])[0, 1] for each in found) > 0.5


# -------------------------------------------------------------------------------------------------- what was fitted on


@pytest.mark.parametrize("method", METHODS)
def test_held_out_images_do_not_move_the_maps(method):
    X, Y = related()
    found = aligned(X, Y, method)
    rows = [int(name[1:]) for name in found.ids]
    other_x, other_y = X.copy(), Y.copy()
    other_x[rows] = 1000 * gaussian(len(rows), 10, 8) + 50
    other_y[rows] = gaussian(len(rows), 7, 9) ** 3 - 20
    again = aligned(other_x, other_y, method)
    np.testing.assert_array_equal(again.fit_a, found.fit_a)
    np.testing.assert_array_equal(again.fit_b, found.fit_b)
    assert not np.allclose(again.a, found.a)


@pytest.mark.parametrize("method", METHODS)
def test_a_held_out_image_does_not_move_another(method):
    X, Y = related()
    found = aligned(X, Y, method)
    changed = X.copy()
    changed[int(found.ids[3][1:])] *= 100
    again = aligned(changed, Y, method)
    others = np.arange(len(found.ids)) != 3
    np.testing.assert_allclose(again.a[others], found.a[others], rtol=0, atol=1e-9)
    assert np.abs(again.a[3] - found.a[3]).max() > 1


def test_halves_are_disjoint_random_and_all_of_the_images():
    X, Y = related(41)
    found = aligned(X, Y, "cca", components=2)
    assert (len(found.fit_ids), len(found.ids)) == (21, 20)
    assert sorted(found.fit_ids + found.ids) == recording(X).ids
    assert aligned(X, Y, "cca", components=2, seed=1).ids != found.ids
    assert found.chance == 1 / 20


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_matched_by_id_whatever_their_order(method):
    X, Y = related()
    A, B = recording(X), recording(Y)
    rng = np.random.default_rng(3)
    shuffled = [one.select(ids=[one.ids[i] for i in rng.permutation(N)]) for one in (A, B)]
    one = align(A, "x", B, "x", method=method, components=6)
    other = align(shuffled[0], "x", shuffled[1], "x", method=method, components=6)
    assert one.ids == other.ids
    assert scores(one) == scores(other)


def test_the_principal_components_are_at_most_a_quarter_of_the_fit_images():
    X, Y = gaussian(101, 60), gaussian(101, 5, 1)
    assert aligned(X, Y, "cca", components=3).principal == (12, 5)  # 51 // 4
    assert aligned(X, Y, "cca", components=3, principal=4).principal == (4, 4)


def test_features_that_are_linear_combinations_of_others_count_once():
    X = site(p=3)
    Y = np.c_[X, X @ gaussian(3, 20, 1)].astype(np.float32)
    assert aligned(X, Y, "cca", components=3).principal == (3, 3)


# ---------------------------------------------------------------------------------------------- independent references


def fit_rows(found, X):
    return X[[int(name[1:]) for name in found.fit_ids]]


def test_canonical_variates_agree_with_scikit_learns():
    X, Y = related()
    found = aligned(X, Y, "cca")
    peer = CCA(6, max_iter=5000, tol=1e-12).fit(fit_rows(found, X), fit_rows(found, Y))
    theirs = peer.transform(fit_rows(found, X), fit_rows(found, Y))
    ours = [np.corrcoef(found.fit_a[:, i], found.fit_b[:, i])[0, 1] for i in range(6)]
    rho = [np.corrcoef(theirs[0][:, i], theirs[1][:, i])[0, 1] for i in range(6)]
    assert ours == pytest.approx(rho, abs=1e-6)
    np.testing.assert_allclose(np.cov(found.fit_a.T), np.eye(6), atol=1e-9)  # unit variance, uncorrelated
    np.testing.assert_allclose(np.cov(found.fit_b.T), np.eye(6), atol=1e-9)
    held_out = peer.transform(X, Y)[0][[int(name[1:]) for name in found.ids]]
    for i in range(6):
        assert abs(np.corrcoef(held_out[:, i], found.a[:, i])[0, 1]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("widths", [(7, 7), (4, 7), (7, 4)])
def test_procrustes_agrees_with_scipys_rotation_and_pads_the_narrower_side(widths):
    X, Y = (related()[i][:, :width] for i, width in enumerate(widths))
    found = aligned(X, Y, "procrustes", components=7)
    sides = [fit_rows(found, Z) - fit_rows(found, Z).mean(0) for Z in (X, Y)]
    one, other = (np.pad(side, ((0, 0), (0, 7 - side.shape[1]))) for side in sides)
    R, _ = orthogonal_procrustes(other, one)
    scale = np.linalg.norm(one) / np.linalg.norm(other)
    residual = ((one - scale * other @ R) ** 2).sum()
    assert ((found.fit_a - found.fit_b) ** 2).sum() == pytest.approx(residual, rel=1e-9)
    assert found.fit_a.shape == found.fit_b.shape == (80, 7)
    assert 1 - residual / (one**2).sum() == pytest.approx(1 - procrustes_distance(*sides) ** 2, abs=1e-9)
    held_out = [Z[[int(name[1:]) for name in found.ids]] for Z in (X, Y)]
    one, other = (
        np.pad(h - fit_rows(found, Z).mean(0), ((0, 0), (0, 7 - Z.shape[1]))) for h, Z in zip(held_out, (X, Y))
    )
    expected = 1 - ((one - scale * other @ R) ** 2).sum() / ((scale * other) ** 2).sum()
    assert found.r2 == pytest.approx(expected, abs=1e-9)


def joint_graph(one, other, k, weight):
    """W of the manifold alignment, entry by entry."""
    n, blocks = len(one), []
    for X in (one, other):
        distances, near = NearestNeighbors(n_neighbors=k + 1).fit(X).kneighbors(X)
        sigma, W = np.median(distances[:, 1:]), np.zeros((n, n))
        for i in range(n):
            for d, j in zip(distances[i, 1:], near[i, 1:]):
                W[i, j] = W[j, i] = math.exp(-(d**2) / (2 * sigma**2))
        blocks.append(W)
    tie = weight * np.mean([W.sum(1).mean() for W in blocks]) * np.eye(n)
    return np.block([[blocks[0], tie], [tie, blocks[1]]])


def test_the_manifold_alignment_solves_its_eigenproblem_on_a_graph_made_by_hand():
    X, Y = related(60)
    found = aligned(X, Y, "manifold", components=4, neighbors=5, weight=0.7)
    one, other = (fit_rows(found, Z) - fit_rows(found, Z).mean(0) for Z in (X, Y))
    assert found.principal == (7, 7)  # 30 // 4: X is cut to its first 7 components
    U = np.linalg.svd(one, full_matrices=False)[2][:7].T
    W = joint_graph(one @ U, other, 5, 0.7)
    D, Z = np.diag(W.sum(1)), np.block([[one @ U, np.zeros((30, 7))], [np.zeros((30, 7)), other]])
    values, vectors = eig(Z.T @ (D - W) @ Z, Z.T @ D @ Z)
    order = np.argsort(values.real)[:4]
    placed = np.r_[found.fit_a, found.fit_b]
    for i, column in enumerate(order):
        theirs = Z @ vectors[:, column].real
        assert abs(theirs @ placed[:, i]) == pytest.approx(np.linalg.norm(theirs) * np.linalg.norm(placed[:, i]))
    rayleigh = [(placed[:, i] @ (D - W) @ placed[:, i]) / (placed[:, i] @ D @ placed[:, i]) for i in range(4)]
    assert rayleigh == pytest.approx(values.real[order])
    np.testing.assert_allclose((placed**2).mean(0), 1)


def test_no_axis_of_the_manifold_alignment_is_the_trivial_one():
    found = aligned(*related(), "manifold")
    for side in (found.fit_a, found.fit_b):
        np.testing.assert_allclose(side.mean(0), 0, atol=1e-9)
        assert side.std(0).min() > 0.1


def test_with_strong_enough_ties_the_manifold_alignment_is_cca():
    """As the ties outweigh the neighbours: least ‖Xg − Yh‖² for a given ‖Xg‖² + ‖Yh‖²."""
    X, Y = related()
    cca, manifold = aligned(X, Y, "cca"), aligned(X, Y, "manifold", weight=1e7)
    for i in range(6):
        assert abs(np.corrcoef(cca.a[:, i], manifold.a[:, i])[0, 1]) == pytest.approx(1, abs=1e-4)
        assert abs(np.corrcoef(cca.b[:, i], manifold.b[:, i])[0, 1]) == pytest.approx(1, abs=1e-4)
    assert aligned(X, Y, "manifold").r2 != pytest.approx(cca.r2, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_exchanging_the_sides_exchanges_the_scores(method):
    X, Y = related()
    one, other = aligned(X, Y, method), aligned(Y, X, method)
    assert [other.r2_ba, other.r2, other.retrieval_ba, other.retrieval_ab] == pytest.approx(scores(one), abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_r2_and_retrieval_agree_with_scikit_learn(method):
    found = aligned(*related(), method)
    # r2_score centres with the held-out mean, and the fit half's mean is 0: put it there by mirrored rows
    mirrored = [np.r_[side, -side] for side in (found.a, found.b)]
    for value, (target, source) in {"r2": mirrored[::-1], "r2_ba": mirrored}.items():
        weights = (target**2).sum(0)
        by_axis = r2_score(target, source, multioutput=weights)
        assert getattr(found, value) == pytest.approx(by_axis, abs=1e-9)
    nearest = NearestNeighbors(n_neighbors=1).fit(found.b).kneighbors(found.a)[1][:, 0]
    assert found.retrieval_ab == (nearest == np.arange(len(found.a))).mean()
    nearest = NearestNeighbors(n_neighbors=1).fit(found.a).kneighbors(found.b)[1][:, 0]
    assert found.retrieval_ba == (nearest == np.arange(len(found.b))).mean()


# ---------------------------------------------------------------------------------------------------------- retrieval


@pytest.mark.parametrize("seed", range(6))
def test_the_p_value_counts_all_permutations(seed):
    rng = np.random.default_rng(seed)
    nearest = rng.integers(0, 7, 7)
    nearest[:seed] = np.arange(seed)
    if seed == 4:
        nearest[0] = -1
    hits = (nearest == np.arange(7)).sum()
    counts = [
        sum(labels[j] == i for i, j in enumerate(nearest) if j >= 0) for labels in itertools.permutations(range(7))
    ]
    assert permutation_p(nearest) == pytest.approx(np.mean(np.array(counts) >= hits), rel=1e-12)


def test_p_values_of_many_images_are_those_of_matching_hats():
    """All nearest rows different: hits of a random permutation; P(T ≥ 1) = 1 − derangements/n!, all hits 1/n!."""
    others = np.roll(np.arange(50), 1)
    assert permutation_p(others) == 1
    one = np.r_[0, np.roll(np.arange(1, 50), 1)]
    assert permutation_p(one) == pytest.approx(1 - math.exp(-1), rel=1e-12)
    assert permutation_p(np.arange(50)) == pytest.approx(1 / math.factorial(50), rel=1e-12)
    assert permutation_p(np.zeros(50, int)) == 1  # all nearest to one row: always exactly one hit


def test_strangers_are_called_related_no_more_often_than_promised():
    p = [aligned(gaussian(40, 4, s), gaussian(40, 4, s + 500), "cca", components=3).p_value_ab for s in range(200)]
    assert np.mean(np.array(p) <= 0.05) <= binom.ppf(0.999, 200, 0.05) / 200
    assert min(p) < 0.1  # and it is not always 1


def test_an_image_seen_twice_is_not_retrieved_by_luck():
    X = site(60)
    found = aligned(X, X, "procrustes")
    twins = [int(name[1:]) for name in found.ids[:2]]
    Y = X.copy()
    Y[twins[1]] = Y[twins[0]]
    again = aligned(Y, Y, "procrustes")
    assert (again.nearest_ab[:2] == -1).all()
    assert again.retrieval_ab == again.retrieval_ba == pytest.approx(28 / 30)


# --------------------------------------------------------------------------------------------------------------- table


def two_recordings():
    X, Y = related()
    A = made({"x": torch.as_tensor(X), "strange": torch.as_tensor(gaussian(N, 8, 7)), "still": torch.ones(N, 5)})
    return A, made({"y": torch.as_tensor(Y), "narrow": torch.as_tensor(Y[:, :2])})


def test_a_row_is_the_mean_over_halves_of_single_alignments():
    A, B = two_recordings()
    table = alignment_table(A, B, [("x", "y"), ("strange", "y")], splits=4, components=5, seed=3)
    assert len(table) == 2 * len(METHODS)
    for _, row in table.iterrows():
        each = [align(A, row.site_a, B, "y", method=row.method, components=5, seed=3 + s) for s in range(4)]
        values = np.array([scores(one) for one in each])
        assert row[SCORES].tolist() == pytest.approx(values.mean(0).tolist())
        assert row[[f"{name}_sd" for name in SCORES]].tolist() == pytest.approx(values.std(0, ddof=1).tolist())
        ab = min(1, 2 * sorted(one.p_value_ab for one in each)[1])
        ba = min(1, 2 * sorted(one.p_value_ba for one in each)[1])
        assert [row.p_value_ab, row.p_value_ba] == pytest.approx([ab, ba])
        assert row.p_value == pytest.approx(min(1, 2 * min(ab, ba)))
    assert (table.n_fit == 80).all() and (table.n_test == 80).all() and (table.chance == 1 / 80).all()
    assert (table[table.site_a == "x"].p_value < 1e-6).all()
    assert (table[table.site_a == "strange"].p_value > 0.001).all()


def test_one_half_has_no_spread():
    A, B = two_recordings()
    table = alignment_table(A, B, [("x", "y")], methods=["cca"], splits=1, components=5)
    one = align(A, "x", B, "y", method="cca", components=5)
    assert table.r2_sd.isna().all()
    assert table.p_value_ab.item() == one.p_value_ab


def test_sites_that_cannot_be_aligned_have_a_note_and_no_number():
    A, B = two_recordings()
    table = alignment_table(A, B, [("still", "y"), ("x", "narrow"), ("x", "y")], splits=2, components=5)
    table = table.set_index(["site_a", "site_b", "method"])
    still = table.loc["still"]
    assert still[[*SCORES, "p_value"]].isna().all(axis=None)
    assert still.note.str.contains("A's site 'still' is constant").all()
    narrow = table.loc["x", "narrow"]
    assert narrow.note["cca"] == narrow.note["manifold"].replace("manifold", "cca")
    assert "B's site 'narrow' has 2 dimensions" in narrow.note["cca"]
    assert narrow.note["procrustes"] == "" and np.isfinite(narrow.r2["procrustes"])  # padded with zeros
    assert (table.loc["x", "y"].note == "").all()


# ------------------------------------------------------------------------------------------------------------ sentences


def test_a_constant_site_is_named():
    with pytest.raises(NotComputable, match="B's site 'x' is constant"):
        aligned(site(), np.ones((N, 4)), "cca")


def test_a_site_constant_on_the_half_of_the_fit_is_named():
    X, Y = related()
    held_out = [int(name[1:]) for name in aligned(X, Y, "cca").ids]
    flat = np.zeros_like(X)
    flat[held_out] = X[held_out]
    with pytest.raises(NotComputable, match="A's site 'x', on the half of the images it is fitted on, is constant"):
        aligned(flat, Y, "cca")


def test_repeated_images_leave_no_bandwidth():
    X = np.repeat(site(8), 20, axis=0)
    with pytest.raises(NotComputable, match="median neighbour distance is 0"):
        aligned(X, X, "manifold", neighbors=3, components=3)


def test_a_site_that_procrustes_cannot_fill_is_named():
    with pytest.raises(NotComputable, match="is the wider one and has 3 dimensions"):
        aligned(site(p=3), site(p=2), "procrustes")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"method": "pls"}, "unknown method 'pls'; choose from cca, procrustes, manifold"),
        ({"components": 0}, "components must be a whole number, at least 1, got 0"),
        ({"components": 21}, "needs at least 84 images to fit on, and half of 160 images is 80; .*components ≤ 20"),
        ({"components": 6, "principal": 5}, "components=6 axes cannot be found in principal=5"),
        ({"weight": 0.0}, "weight must be a number above 0"),
        ({"method": "manifold", "neighbors": 79}, "neighbors=79 of each of 80 fit images; use at most 78"),
        ({"neighbors": 2.5}, "neighbors must be a whole number"),
    ],
)
def test_options_that_cannot_be_used_are_explained(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        aligned(site(p=30), site(p=30, seed=1), **({"method": "cca"} | options))


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="needs at least 40 images to fit on, and half of 30 images is 15"):
        aligned(site(30), site(30), "cca", components=10)


def test_recordings_of_other_images_or_of_several_rows_an_image_are_refused():
    X = recording(site())
    with pytest.raises(ValueError, match="different images"):
        align(X, "x", replace(X, ids=[f"j{i}" for i in range(N)]), "x", method="cca")
    cells = made({"x": torch.randn(N, 4, 6)}, policy="grid:2")
    with pytest.raises(ValueError, match="policy 'grid:2', which does not give one row of features an image"):
        align(cells, "x", cells, "x", method="cca")
    with pytest.raises(ValueError, match="site 'y' was not recorded"):
        align(X, "x", X, "y", method="cca")


def test_a_table_of_nothing_is_refused():
    A, B = two_recordings()
    with pytest.raises(ValueError, match="pairs is empty"):
        alignment_table(A, B, [])
    with pytest.raises(ValueError, match="methods is empty"):
        alignment_table(A, B, [("x", "y")], methods=[])
    with pytest.raises(ValueError, match="splits must be a whole number"):
        alignment_table(A, B, [("x", "y")], splits=0)


@pytest.mark.parametrize("policy", ["gap", "mean", "mask", "flat:2"])
def test_policies_with_one_row_an_image_are_taken(policy):
    A, B = (recording(X, policy=policy) for X in related())
    assert align(A, "x", B, "x", method="cca", components=3).retrieval_ab > 0.1
