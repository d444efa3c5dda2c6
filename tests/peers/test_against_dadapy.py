"""Our information imbalance is DADApy's."""

import warnings

import numpy as np
import pytest

from similarity.measures import information_imbalance

INSTALL = "dadapy is not installed: pip install -r requirements-dev.txt -r tests/peers/requirements.txt"
pytest.importorskip("dadapy", reason=INSTALL)

from dadapy import MetricComparisons  # noqa: E402 (only once it is known to be there)


def theirs(X, Y, k):
    """(Δ(X→Y), Δ(Y→X)) of all rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the subset is the whole
        forth, back = MetricComparisons(coordinates=X).return_information_imbalace(Y, k=k, subset_size=len(X))
    return forth[0], back[0]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n, p, q", [(60, 5, 8), (50, 80, 3)])
def test_information_imbalance_is_theirs_in_both_directions(n, p, q, k):
    random = np.random.default_rng(n)
    latents = random.normal(size=(n, 3))
    X, Y = (latents @ random.normal(size=(3, width)) + random.normal(size=(n, width)) for width in (p, q))
    forth, back = theirs(X, Y, k)
    assert information_imbalance(X, Y, k=k) == pytest.approx(forth, abs=1e-12)
    assert information_imbalance(Y, X, k=k) == pytest.approx(back, abs=1e-12)


def test_what_adds_a_feature_knows_more_than_it_is_known_by():
    random = np.random.default_rng(0)
    Y = random.normal(size=(200, 3))
    X = np.hstack([Y, random.normal(size=(200, 1))])
    assert information_imbalance(X, Y) < information_imbalance(Y, X)
    assert theirs(X, Y, 1) == pytest.approx((information_imbalance(X, Y), information_imbalance(Y, X)), abs=1e-12)
