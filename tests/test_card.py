"""The convergence card: dimensions, chance of the biased estimator, images needed, why measures differ."""

import numpy as np
import pytest

from similarity import card, measures
from tests.made import made


def test_the_effective_rank_is_the_number_of_equal_directions_and_one_for_a_line():
    X = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 8)) - 0.0)[0]
    X = X - X.mean(0)
    whitened = np.linalg.qr(X)[0]
    assert card.effective_rank(whitened) == pytest.approx(8)
    assert card.effective_rank(np.outer(np.arange(20.0), [1, 2, 3])) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(30, 5), (5, 30)])
def test_the_effective_rank_is_the_participation_ratio_of_the_covariances_eigenvalues(shape):
    X = np.random.default_rng(1).normal(size=shape) + 7
    eigenvalues = np.linalg.eigvalsh(np.cov(X.T))
    assert card.effective_rank(X) == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def test_a_constant_site_has_no_rank_and_the_others_keep_theirs():
    ranks = card.effective_ranks(made({"flat": np.ones((9, 3)), "line": np.outer(np.arange(9.0), [1, 2])}))
    assert np.isnan(ranks["flat"]) and ranks["line"] == pytest.approx(1)


def test_independent_features_score_the_biased_chance_of_their_ranks():
    rng = np.random.default_rng(2)
    values = [
        measures.linear_cka(rng.normal(size=(100, 100)), rng.normal(size=(100, 100)), debiased=False) for _ in range(5)
    ]
    assert card.biased_by_chance(100, 100, 100) == 0.5
    assert np.mean(values) == pytest.approx(0.5, abs=0.01)


def test_four_times_the_images_halve_the_interval():
    assert card.images_needed(100, 0.02 / 1.96) == pytest.approx(100)
    assert card.images_needed(100, 0.04 / 1.96) == pytest.approx(400)
    assert card.images_needed(100, 0.02 / 1.96, half_width=0.01) == pytest.approx(400)


def test_measures_are_told_apart_by_what_they_ignore():
    assert "any invertible linear map" in card.explain_difference("cca", "linear_cka")
    assert "CCA ignores" in card.explain_difference("cca", "linear_cka")
    rsa = card.explain_difference("rsa", "linear_cka")
    assert rsa.startswith("linear CKA ignores rotations of the features and shifts of their mean, RSA does not")
    assert "weigh" in card.explain_difference("rbf_cka", "linear_cka")
