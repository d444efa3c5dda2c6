"""Deconfounded similarity: equal to regressing Gram matrices one by one, and right where the answer is known."""

import numpy as np
import pytest
import torch

from similarity import plane
from similarity.deconfounding import FLOAT64, deconfounded, deconfounded_plane, share_left
from tests.made import made


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def double(features, **options):
    """A recording in float64: `made` rounds arrays to float32."""
    return made({name: torch.from_numpy(np.asarray(X, dtype=np.float64)) for name, X in features.items()}, **options)


def u_centred(X):
    """U-centred XXᵀ entry by entry, from the definition (Székely & Rizzo 2014), as a vector."""
    n, K = len(X), X @ X.T
    np.fill_diagonal(K, 0)
    centred = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                centred[i, j] = K[i, j] - (K[i].sum() + K[:, j].sum()) / (n - 2) + K.sum() / ((n - 1) * (n - 2))
    return centred.ravel()


def directly(X, Y, controls):
    """Regress the controls' vectors out of both sides' by least squares, and take the cosine of what is left."""
    Z = np.stack([u_centred(control) for control in controls], axis=1)
    x, y = (v - Z @ np.linalg.lstsq(Z, v, rcond=None)[0] for v in map(u_centred, (X, Y)))
    return x @ y / np.sqrt((x @ x) * (y @ y))


@pytest.fixture(scope="module")
def confounded():
    """Two sites a side that all hold something of three controls, which resemble each other too."""
    n = 24
    common = gaussian(n, 3, seed=1)
    controls = {
        "c0": common,
        "c1": common @ gaussian(3, 5, seed=2) + gaussian(n, 5, seed=3),
        "c2": gaussian(n, 2, seed=4),
    }
    A = {f"a{i}": np.hstack([common, gaussian(n, 4, seed=5 + i), (1 + i) * controls["c2"]]) for i in range(2)}
    B = {f"b{i}": controls["c1"] @ gaussian(5, 6, seed=8 + i) + gaussian(n, 6, seed=10 + i) for i in range(3)}
    return A, B, controls


def test_the_plane_equals_regression_of_the_gram_matrices(confounded):
    A, B, controls = confounded
    found = deconfounded_plane(double(A), double(B), double(controls))
    expected = [[directly(X, Y, list(controls.values())) for Y in B.values()] for X in A.values()]
    np.testing.assert_allclose(found.values, expected, atol=1e-10)
    assert np.abs(found.values - plane("linear_cka", double(A), double(B)).values).max() > 0.1
    assert (found.rows, found.columns, found.options) == (list(A), list(B), {"without": "c0, c1, c2"})


def test_with_one_control_it_is_the_partial_distance_correlation(confounded):
    A, B, controls = (double(side) for side in confounded)
    one = double({"c1": controls["c1"].numpy()})
    ab, ac, bc = (
        plane("linear_cka", A, B).values,
        plane("linear_cka", A, one).values,
        plane("linear_cka", B, one).values,
    )
    expected = (ab - ac * bc.T) / np.sqrt((1 - ac**2) * (1 - bc.T**2))
    np.testing.assert_allclose(deconfounded_plane(A, B, one).values, expected, atol=1e-12)


def test_spaces_that_share_only_a_confound_share_nothing_without_it():
    n, plain, without = 60, [], []
    for seed in range(40):
        confound = gaussian(n, 3, seed=3 * seed)
        A, B = (np.hstack([2 * confound, gaussian(n, 4, seed=1000 + 2 * seed + side)]) for side in (0, 1))
        A, B, controls = made({"a": A}), made({"b": B}), made({"c": confound})
        plain.append(plane("linear_cka", A, B).values[0, 0])
        without.append(deconfounded_plane(A, B, controls).values[0, 0])
    error = np.std(without, ddof=1) / np.sqrt(len(without))
    assert min(plain) > 0.7
    assert abs(np.mean(without)) < 3.5 * error
    assert error < 0.01


def test_a_control_that_neither_side_holds_changes_nothing():
    ab = np.array([[0.3, -0.1], [0.8, 0.2]])
    none = np.zeros((2, 2))
    np.testing.assert_array_equal(deconfounded(ab, none, none, np.eye(2)), ab)

    n, shared = 200, gaussian(200, 5, seed=1)
    A, B = (made({name: shared + gaussian(n, 5, seed=seed)}) for name, seed in (("a", 2), ("b", 3)))
    unrelated = made({"c": gaussian(n, 5, seed=4)})
    # independent similarities are of the order of 1/n, and enter the formula as products of two
    change = deconfounded_plane(A, B, unrelated).values - plane("linear_cka", A, B).values
    assert 0 < np.abs(change).max() < 100 / n**2


def test_what_is_shared_beside_the_confound_stays():
    n = 80
    confound, shared = gaussian(n, 3, seed=1), gaussian(n, 6, seed=2)
    A = made({"a": np.hstack([confound, shared])})
    B = made({"b": np.hstack([3 * confound, shared @ np.linalg.qr(gaussian(6, 6, seed=3))[0]])})
    assert deconfounded_plane(A, B, made({"c": confound})).values[0, 0] == pytest.approx(1, abs=1e-5)
    assert plane("linear_cka", A, B).values[0, 0] < 0.9


def test_rows_are_matched_by_id_and_the_order_of_images_does_not_matter(confounded):
    A, B, controls = (double(side) for side in confounded)
    order = np.random.default_rng(0).permutation(len(A))
    turned = B.select(ids=[B.ids[i] for i in order])
    expected = deconfounded_plane(A, B, controls).values
    np.testing.assert_allclose(deconfounded_plane(A, turned, controls).values, expected, atol=1e-12)
    np.testing.assert_allclose(deconfounded_plane(A, B, controls.select(ids=turned.ids)).values, expected, atol=1e-12)
    with pytest.raises(ValueError, match="hold different images"):
        deconfounded_plane(A, B, double(confounded[2], ids=[f"x{i}" for i in range(24)]))


def test_leading_axes_are_broadcast(confounded):
    A, B, controls = (double(side) for side in confounded)
    sides = ((A, B), (A, controls), (B, controls), (controls, controls))

    def planes(images):
        return [plane("linear_cka", *(side.select(ids=images) for side in pair)).values for pair in sides]

    parts = [A.ids[:18], A.ids[3:21], A.ids[6:]]
    stacked = [np.stack(each) for each in zip(*map(planes, parts))]
    together = deconfounded(*stacked)
    for values, images in zip(together, parts):
        np.testing.assert_allclose(values, deconfounded(*planes(images)), atol=1e-12)
    ab, ac, bc, cc = stacked
    np.testing.assert_allclose(deconfounded(ab, ac[0], bc[0], cc[0])[2], deconfounded(ab[2], ac[0], bc[0], cc[0]))


def test_a_site_that_the_controls_explain_is_nan_with_a_note(confounded):
    A, B, controls = confounded
    mixture = np.hstack([2 * controls["c0"], controls["c2"]])  # its Gram matrix is 4 that of c0 and that of c2
    found = deconfounded_plane(double(A | {"all of it": mixture}), double(B), double(controls))
    assert np.isnan(found.values[2]).all()
    assert np.isfinite(found.values[:2]).all()
    assert "explain 'all of it' entirely" in found.notes["all of it", "b0"]
    assert "% of 'a0'" in found.notes["a0", "b0"]


def test_errors_of_float32_planes_do_not_pass_for_what_is_left(confounded):
    A, B, controls = (double(side) for side in confounded)
    A = double({"copy": controls["c0"].numpy() * 3} | dict(A.features))
    rounded = np.random.default_rng(0).normal(size=(3, 3)) * 1e-6
    ab, ac, bc = (plane("linear_cka", *pair).values for pair in ((A, B), (A, controls), (B, controls)))
    given = ab, ac - np.abs(rounded), bc, plane("linear_cka", controls).values
    values = deconfounded(*given)
    assert np.isnan(values[0]).all()
    assert np.isfinite(values[1:]).all()
    assert np.isfinite(deconfounded(*given, rounding=FLOAT64)[0]).all()  # taken at their word, they leave something


def test_the_share_left_is_what_regression_leaves(confounded):
    A, _, controls = confounded
    ac, cc = (plane("linear_cka", double(side), double(controls)).values for side in (A, controls))
    Z = np.stack([u_centred(control) for control in controls.values()], axis=1)
    for name, share in zip(A, share_left(ac, cc)):
        x = u_centred(A[name])
        residual = x - Z @ np.linalg.lstsq(Z, x, rcond=None)[0]
        assert share == pytest.approx(residual @ residual / (x @ x), abs=1e-10)


def test_a_constant_site_is_nan_and_keeps_its_own_note(confounded):
    A, B, controls = (double(side) for side in confounded)
    A = double(dict(A.features) | {"still": np.ones((24, 4))})
    found = deconfounded_plane(A, B, controls)
    assert np.isnan(found.values[2]).all() and np.isfinite(found.values[:2]).all()
    assert "constant" in found.notes["still", "b0"]


def test_dependent_controls_are_refused(confounded):
    A, B, controls = confounded
    more = {"mixture": np.hstack([controls["c0"], 0.5 * controls["c1"]])}
    with pytest.raises(ValueError, match=r"'mixture'.*linearly dependent"):
        deconfounded_plane(double(A), double(B), double(controls | more))
    with pytest.raises(ValueError, match="linearly dependent"):
        deconfounded(np.zeros((1, 1)), np.zeros((1, 2)), np.zeros((1, 2)), np.ones((2, 2)))


def test_a_constant_control_is_refused(confounded):
    A, B, _ = confounded
    with pytest.raises(ValueError, match=r"'flat'.*constant"):
        deconfounded_plane(double(A), double(B), double({"flat": np.ones((24, 2))}))


def test_controls_that_explain_everything_are_refused(confounded):
    _, B, controls = confounded
    copies = {"a0": 2 * controls["c0"], "a1": controls["c1"] @ np.linalg.qr(gaussian(5, 5))[0]}
    with pytest.raises(ValueError, match="explain every site"):
        deconfounded_plane(double(copies), double(B), double(controls))


def test_values_that_do_not_belong_together_are_refused(confounded):
    A, B, controls = (double(side) for side in confounded)
    ab, ac, bc = plane("linear_cka", A, B), plane("linear_cka", A, controls), plane("linear_cka", B, controls)
    cc = plane("linear_cka", controls)
    assert np.isfinite(deconfounded(ab, ac, bc, cc)).all()
    with pytest.raises(ValueError, match="sites of 'b'"):
        deconfounded(ab, ac, bc.values[:1], cc)
    with pytest.raises(ValueError, match="other sites of 'a'"):
        deconfounded(ab, plane("linear_cka", double(dict(list(A.features.items())[::-1])), controls), bc, cc)
    with pytest.raises(ValueError, match="not alike"):
        deconfounded(ab, plane("linear_cka", A, controls, debiased=False), bc, cc)
    with pytest.raises(ValueError, match="no cosine"):
        deconfounded(plane("rsa", A, B), ac, bc, cc)
    with pytest.raises(ValueError, match="diagonal"):
        deconfounded(ab, ac, bc, 5 * cc.values)


def test_stating_the_default_estimator_is_no_difference(confounded):
    A, B, controls = (double(side) for side in confounded)
    said = [plane("linear_cka", *pair, debiased=True) for pair in ((A, B), (A, controls), (B, controls))]
    np.testing.assert_array_equal(
        deconfounded(*said, plane("linear_cka", controls)),
        deconfounded(*(p.values for p in said), plane("linear_cka", controls)),
    )


def test_what_is_left_averages_to_nothing_but_varies_more_than_permuted_images_would():
    """Why there is no permutation null: products of the control with each side's own features are on both sides."""
    rng, left, permuted = np.random.default_rng(1), [], []
    for _ in range(60):
        Z = rng.normal(size=(40, 1))  # one feature, whose kernel is the same however it is mixed into others
        A, B = (made({name: Z @ rng.normal(size=(1, 4)) + rng.normal(size=(40, 4))}) for name in "ab")
        left.append(deconfounded_plane(A, B, made({"z": Z})).values[0, 0])
        permuted.append(plane("linear_cka", A, made({"b": B["b"][rng.permutation(40)]})).values[0, 0])
    assert np.mean(left) == pytest.approx(0, abs=4 * np.std(left) / np.sqrt(60))
    assert np.std(left) > 1.5 * np.std(permuted)
