"""CCA and its kin, Procrustes and linear regression against scipy, scikit-learn and exact constants."""

import math
import warnings

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes, subspace_angles
from scipy.stats import ortho_group
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from similarity import measures
from similarity.measures import (
    FewImages,
    NotComputable,
    angular_distance,
    cca,
    chance,
    linear_regression_r2,
    procrustes_distance,
    pwcca,
    svcca,
)


def gaussian(n, p, seed=0):
    return np.random.default_rng(seed).normal(size=(n, p))


def related(n=60, p=8, q=5):
    X = gaussian(n, p)
    return X, X[:, :q] @ gaussian(q, q, 1) + 0.7 * gaussian(n, q, 2)


# ------------------------------------------------------------------------------------------------------------------ CCA


def correlations(X, Y):
    """Canonical correlations as cosines of the angles between the centred column spaces."""
    return np.cos(subspace_angles(X - X.mean(0), Y - Y.mean(0)))


def test_cca_agrees_with_scipys_angles_between_subspaces():
    X, Y = related()
    rho = correlations(X, Y)
    assert cca(X, Y) == pytest.approx(rho.mean(), abs=1e-12)
    assert cca(X, Y, squared=True) == pytest.approx((rho**2).mean(), abs=1e-12)
    assert svcca(X, Y, variance=1) == pytest.approx(rho.mean(), abs=1e-12)


def test_mean_squared_cca_of_strangers_is_what_chance_says():
    values = [cca(gaussian(200, 20, s), gaussian(200, 30, s + 50), squared=True) for s in range(20)]
    assert np.mean(values) == pytest.approx(30 / 199, abs=0.005)
    assert chance("cca", 200, 20, 30, squared=True) == pytest.approx(30 / 199)
    assert chance("cca", 40, 20, 30, squared=True) is None  # saturated


def test_components_may_be_counted_instead_of_their_variance():
    X, Y = related()

    def leading(Z, k):
        U, S, _ = np.linalg.svd(Z - Z.mean(0), full_matrices=False)
        return U[:, :k] * S[:k]

    assert svcca(X, Y, components=3) == pytest.approx(correlations(leading(X, 3), leading(Y, 3)).mean(), abs=1e-12)
    assert svcca(X, Y, components=99) == pytest.approx(cca(X, Y), abs=1e-12)
    with pytest.raises(ValueError, match="components must be at least 1, got 0"):
        svcca(X, Y, components=0)


def test_pwcca_weights_canonical_correlations_by_what_they_carry_of_x():
    X, Y = related()
    Qx, Qy = (np.linalg.qr(Z - Z.mean(0))[0] for Z in (X, Y))
    U, rho, _ = np.linalg.svd(Qx.T @ Qy)
    variates = (Qx @ U)[:, : len(rho)]
    alpha = np.abs(variates.T @ (X - X.mean(0))).sum(1)
    assert pwcca(X, Y) == pytest.approx((alpha * rho).sum() / alpha.sum(), abs=1e-12)
    assert pwcca(X, Y) != pytest.approx(cca(X, Y), abs=1e-3)


@pytest.mark.parametrize("measure", [cca, pwcca])
def test_too_few_images_are_said_with_the_numbers(measure):
    with pytest.warns(FewImages, match=r"12 \+ 10 components of 20 images: at least 3 of them are 1 by construction"):
        measure(gaussian(20, 12), gaussian(20, 10, 1))
    with pytest.warns(FewImages, match=r"19 \+ 19 components of 20 images: at least 19 of them"):
        assert measure(gaussian(20, 300), gaussian(20, 200, 1)) == pytest.approx(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(gaussian(200, 3), gaussian(200, 3, 1))


# ----------------------------------------------------------------------------------------------------------- Procrustes


def shape_of(Z):
    Z = Z - Z.mean(0)
    return Z / np.linalg.norm(Z)


@pytest.mark.parametrize("p, q", [(4, 4), (3, 7), (7, 3), (40, 6), (40, 50)])
def test_procrustes_agrees_with_scipys_best_rotation(p, q):
    X, Y = gaussian(20, p), gaussian(20, q, 1)
    a, b = (np.pad(shape_of(Z), ((0, 0), (0, max(p, q) - Z.shape[1]))) for Z in (X, Y))
    rotation, nuclear_norm = orthogonal_procrustes(a, b)
    assert procrustes_distance(X, Y) == pytest.approx(np.linalg.norm(a @ rotation - b), abs=1e-12)
    assert procrustes_distance(X, Y, squared=True) == pytest.approx(2 - 2 * nuclear_norm, abs=1e-12)
    assert angular_distance(X, Y) == pytest.approx(math.acos(nuclear_norm), abs=1e-12)


def test_small_shape_distances_are_not_lost_in_the_difference_of_equal_terms():
    X = gaussian(50, 6)
    for p in (6, 80):
        X = gaussian(50, p)
        turned = 3 * X @ ortho_group.rvs(p, random_state=1) + 2
        assert 0 <= angular_distance(X, turned) < 1e-13
        step = gaussian(50, p, 1)
        steps = [procrustes_distance(X, X + t * step) for t in (1e-8, 1e-6, 1e-4)]
        assert steps[1] / steps[0] == pytest.approx(100, rel=1e-3)
        assert steps[2] / steps[1] == pytest.approx(100, rel=1e-2)


@pytest.mark.parametrize("narrow_first", [True, False])
def test_a_side_padded_with_silent_features_has_the_same_shape(narrow_first):
    X = gaussian(30, 4)
    sides = (X, np.c_[X, np.zeros((30, 3))])
    assert 0 <= procrustes_distance(*(sides if narrow_first else sides[::-1])) < 1e-13


def test_angular_distance_is_a_metric():
    shapes = [gaussian(30, p, p) for p in (2, 5, 9, 40)]
    for X in shapes:
        for Y in shapes:
            for Z in shapes:
                assert angular_distance(X, Z) <= angular_distance(X, Y) + angular_distance(Y, Z) + 1e-12


def test_sides_that_share_nothing_are_a_right_angle_apart():
    basis = np.linalg.qr(np.c_[np.ones(12), gaussian(12, 6)])[0][:, 1:]
    assert angular_distance(basis[:, :3], basis[:, 3:]) == pytest.approx(math.pi / 2)
    assert procrustes_distance(basis[:, :3], basis[:, 3:]) == pytest.approx(math.sqrt(2))


# ----------------------------------------------------------------------------------------------------------- regression


def folds_of(images, folds, seed):
    place = np.empty(images, int)
    for fold, part in enumerate(np.array_split(np.random.default_rng(seed).permutation(images), folds)):
        place[part] = fold
    return place


def plain_r2(X, Y, place):
    predicted = cross_val_predict(LinearRegression(), X, Y, cv=PredefinedSplit(place))
    means = np.stack([Y[place != fold].mean(0) for fold in place])
    return 1 - ((Y - predicted) ** 2).sum() / ((Y - means) ** 2).sum()


@pytest.mark.parametrize("folds, seed", [(5, 0), (7, 3), (60, 0)])
def test_regression_agrees_with_scikit_learn_on_the_same_folds(folds, seed):
    X, Y = related()
    expected = plain_r2(X, Y, folds_of(60, folds, seed))
    assert linear_regression_r2(X, Y, folds=folds, seed=seed) == pytest.approx(expected, abs=1e-11)


def test_what_is_linear_in_x_is_predicted_and_strangers_are_not():
    X = gaussian(100, 6)
    assert linear_regression_r2(X, X @ gaussian(6, 4, 1) + 5) == pytest.approx(1, abs=1e-12)
    assert linear_regression_r2(X[:, :3], X) < 0.6
    assert linear_regression_r2(X, gaussian(100, 4, 2)) < 0  # held-out: chance is below zero, not above


def test_features_that_repeat_each_other_do_not_spoil_the_fit():
    X = gaussian(60, 4)
    Y = X @ gaussian(4, 3, 1) + 0.1 * gaussian(60, 3, 2)
    repeated = np.c_[X, X @ gaussian(4, 5, 3), np.ones(60)]
    assert linear_regression_r2(repeated, Y) == pytest.approx(linear_regression_r2(X, Y), abs=1e-9)


def test_rows_of_one_image_are_held_out_together():
    """Each image has its own colour in both sides: seen in another row of the image, it would be predicted."""
    image = np.repeat(np.arange(20), 4)
    X = np.eye(20)[image] + 0.01 * gaussian(80, 20)
    Y = gaussian(20, 3, 1)[image]
    assert linear_regression_r2(X, Y) > 0.9
    assert linear_regression_r2(X, Y, rows_per_image=4) < 0.1


def test_more_features_than_rows_and_impossible_folds_are_said():
    with pytest.warns(FewImages, match="linear regression on 30 features of 16 rows fits them exactly"):
        linear_regression_r2(gaussian(20, 30), gaussian(20, 2, 1))
    for folds in (1, 21):
        with pytest.raises(ValueError, match=r"folds must be from 2 to the number of images \(20\)"):
            linear_regression_r2(gaussian(20, 3), gaussian(20, 2, 1), folds=folds)


def test_a_side_with_nothing_to_predict_is_refused():
    """Every image but the held-out one is constant: leave-one-out has a total of zero only if all are."""
    Y = np.ones((10, 2))
    with pytest.raises(NotComputable, match="Y is constant"):
        linear_regression_r2(gaussian(10, 2), Y)


def test_every_measure_is_in_the_table_of_the_documentation():
    table = measures.table()
    assert [name.strip("`") for name in table["measure"]] == list(measures.MEASURES)
    assert not table.isna().any().any()
    assert set(table["symmetric"]) == {"yes", "no"}
