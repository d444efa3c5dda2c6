"""Our numbers are rsatoolbox's where both compute the same: RSA, biased linear CKA, angular distance."""

import numpy as np
import pytest

from similarity.measures import angular_distance, linear_cka, rsa

INSTALL = "rsatoolbox is not installed: pip install -r requirements-dev.txt -r tests/peers/requirements.txt"
pytest.importorskip("rsatoolbox", reason=INSTALL)

from rsatoolbox.data import Dataset  # noqa: E402 (only once it is known to be there)
from rsatoolbox.rdm import calc_rdm, compare  # noqa: E402

THEIRS = {"spearman": "spearman", "kendall": "tau-a", "cosine": "cosine", "pearson": "corr"}


@pytest.fixture(params=[(30, 5, 8), (40, 60, 12)], ids=["n>p", "n<p"])
def sides(request):
    """Correlated X (n, p), Y (n, q) with means above zero."""
    n, p, q = request.param
    random = np.random.default_rng(n)
    latents = random.normal(size=(n, 4))
    return tuple(latents @ random.normal(size=(4, width)) + random.normal(size=(n, width)) + 2 for width in (p, q))


def condensed(X, rdm):
    """Their dissimilarities (1, n(n − 1)/2); theirs of 'euclidean' are squares over the number of features."""
    values = calc_rdm(Dataset(X), method=rdm).get_vectors()
    return np.sqrt(values) if rdm == "euclidean" else values


@pytest.mark.parametrize("ours, theirs", THEIRS.items())
@pytest.mark.parametrize("rdm", ["correlation", "euclidean"])
def test_rsa_is_theirs(sides, rdm, ours, theirs):
    X, Y = sides
    expected = compare(condensed(X, rdm), condensed(Y, rdm), method=theirs)
    assert rsa(X, Y, rdm=rdm, compare=ours) == pytest.approx(float(expected.item()), abs=1e-10)


@pytest.mark.parametrize("ours, theirs", [("spearman", "spearman"), ("kendall", "tau-a")])
def test_ranks_do_not_see_that_their_euclidean_distances_are_squared(sides, ours, theirs):
    X, Y = (calc_rdm(Dataset(side), method="euclidean") for side in sides)
    expected = float(compare(X, Y, method=theirs).item())
    assert rsa(*sides, rdm="euclidean", compare=ours) == pytest.approx(expected, abs=1e-10)


def test_biased_linear_cka_is_their_whitened_cosine_of_squared_distances(sides):
    """Their documentation calls it unbiased; for RDMs that are not cross-validated it is the biased estimator."""
    X, Y = (calc_rdm(Dataset(side), method="euclidean") for side in sides)
    expected = float(compare(X, Y, method="cosine_cov").item())
    assert linear_cka(*sides, debiased=False) == pytest.approx(expected, abs=1e-10)
    assert linear_cka(*sides, debiased=True) != pytest.approx(expected, abs=1e-3)


def test_the_cosine_of_the_angular_distance_is_their_bures_similarity(sides):
    X, Y = (calc_rdm(Dataset(side), method="euclidean") for side in sides)
    expected = float(compare(X, Y, method="bures").item())
    assert np.cos(angular_distance(*sides)) == pytest.approx(expected, abs=1e-6)
