"""The plane: all sites against all sites in one go, equal to asking pair by pair, and never across unlike rows."""

import functools
import itertools
import warnings

import numpy as np
import pytest

from similarity import measures, moments, plane
from similarity.measures import MEASURES, FewImages, NotComputable
from similarity.plane import Plane
from tests.made import made

OPTIONS = [
    ("linear_cka", {}),
    ("linear_cka", {"debiased": False}),
    ("rbf_cka", {}),
    ("rbf_cka", {"fraction": 0.4, "debiased": False}),
    ("svcca", {}),
    ("svcca", {"variance": 0.9, "squared": True}),
    ("rsa", {}),
    ("rsa", {"rdm": "euclidean", "compare": "cosine"}),
    ("rsa", {"compare": "pearson"}),
    ("rsa", {"compare": "kendall"}),
    ("cca", {}),
    ("svcca", {"components": 2}),
    ("pwcca", {}),
    ("procrustes_distance", {"squared": True}),
    ("angular_distance", {}),
    ("mutual_knn", {"k": 3}),
    ("cknna", {"k": 9}),
    ("information_imbalance", {"k": 1}),
    ("information_imbalance", {"k": 4}),
    ("linear_regression_r2", {"folds": 4, "rows_per_image": 1}),
]


def of_itself(name, rows, options):
    k = options.get("k", 10 if name != "information_imbalance" else 1)
    return {"1": 1, "0": 0, "(k + 1)/n": (k + 1) / rows}[MEASURES[name].identical]


def gaussian(*shape, seed=0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1, shape)


@pytest.fixture(scope="module", params=["wide", "tall", "grid"])
def two(request):
    """Feature space is the cheaper route for tall matrices, Grams for wide ones; grids have several rows an image."""
    shapes = {"wide": [(20, 30), (20, 6), (20, 55)], "tall": [(40, 7), (40, 3), (40, 12)], "grid": [(10, 4, 6)] * 3}
    shape = shapes[request.param]
    shared = gaussian(*shape[1])
    A = {f"a{i}": gaussian(*s, seed=i, mean=3 * i) for i, s in enumerate(shape)}
    A["a1"] = shared
    B = {f"b{i}": gaussian(*s, seed=10 + i, mean=-5) for i, s in enumerate(shape[::-1])}
    B["b1"] = 2 * shared + gaussian(*shape[1], seed=30)
    policy = "grid:2" if request.param == "grid" else "gap"
    return made(A, policy=policy), made(B, policy=policy)


@pytest.mark.parametrize("name, options", OPTIONS)
def test_a_plane_is_what_the_measure_says_pair_by_pair(two, name, options):
    A, B = two
    result = plane(name, A, B, **options)
    function = getattr(measures, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewImages)
        for i, a in enumerate(A.names):
            for j, b in enumerate(B.names):
                assert result.values[i, j] == pytest.approx(function(A.matrix(a), B.matrix(b), **options), abs=1e-9)
    assert (result.rows, result.columns, result.measure, result.options) == (A.names, B.names, name, options)
    np.testing.assert_array_equal(plane(function, A, B, **options).values, result.values)


@pytest.mark.parametrize("name, options", OPTIONS)
def test_a_plane_with_itself_has_the_tables_symmetry_and_diagonal(two, name, options):
    A, _ = two
    values = plane(name, A, **options).values
    if MEASURES[name].symmetric:
        np.testing.assert_allclose(values, values.T, atol=1e-9)
    if name != "linear_regression_r2":  # minimum-norm regression on fewer rows than features does not extrapolate
        np.testing.assert_allclose(np.diag(values), of_itself(name, len(A.matrix("a0")), options), atol=1e-9)
    np.testing.assert_allclose(plane(name, A, A, **options).values, values, atol=0)


def own_measure(X, Y, *, power=1):
    return float((X.mean() - Y.mean()) ** power)


@pytest.mark.parametrize(
    "measure, name",
    [
        (own_measure, "own_measure"),
        (lambda X, Y, power: len(X) * power, "<lambda>"),
        (functools.partial(own_measure), None),
    ],
)
def test_a_measure_of_ones_own_needs_no_registration(two, measure, name):
    A, B = two
    result = plane(measure, A, B, power=2)
    expected = [[measure(A.matrix(a), B.matrix(b), power=2) for b in B.names] for a in A.names]
    np.testing.assert_allclose(result.values, expected)
    assert name is None or result.measure == name


def test_a_function_that_only_shares_a_name_is_not_taken_for_ours(two):
    def svcca(X, Y):
        return 42.0

    A, B = two
    assert (plane(svcca, A, B).values == 42).all()
    np.testing.assert_allclose(plane(moments.linear_cka, A, B).values, plane("linear_cka", A, B).values, atol=1e-9)


def test_an_unknown_measure_is_answered_with_the_known_ones():
    A = made({"a": gaussian(6, 3)})
    with pytest.raises(ValueError, match="unknown measure 'cka'; choose from linear_cka, rbf_cka, rsa, cca, svcca"):
        plane("cka", A)


# --------------------------------------------------------------------------------------------------------- pairing rows


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("policy", ["gap", "grid:2"])
def test_rows_are_matched_by_id_whatever_their_order(name, policy):
    shape = (24, 5) if policy == "gap" else (24, 4, 5)
    X, order = gaussian(*shape), np.random.default_rng(1).permutation(24)
    A = made({"a": X}, policy=policy)
    B = made({"b": X[order]}, ids=[A.ids[i] for i in order], policy=policy)
    same = of_itself(name, len(A.matrix("a")), {})
    assert plane(name, A, B).values[0, 0] == pytest.approx(same, abs=1e-9)
    other = plane(name, A, made({"b": X[order]}, policy=policy)).values[0, 0]  # same ids, other rows: not a match
    assert other > same + 0.1 if MEASURES[name].distance else other < same - 0.1


@pytest.mark.parametrize("ids", [[f"i{k:03d}" for k in range(1, 13)], [f"i{k:03d}" for k in range(13)]])
def test_recordings_of_different_images_are_not_compared(ids):
    A, B = made({"a": gaussian(12, 3)}), made({"b": gaussian(len(ids), 3)}, ids=ids)
    for one, other in ((A, B), (B, A)):
        with pytest.raises(
            ValueError, match=r"hold different images: \d+ only in A, \d+ only in B \(such as 'i0\d\d'\)"
        ):
            plane("linear_cka", one, other)
    common = sorted(set(A.ids) & set(B.ids))
    assert plane("linear_cka", A.select(ids=common), B.select(ids=common)).n_images == len(common)


def test_recordings_under_different_policies_are_not_compared():
    A, B = made({"a": gaussian(12, 3)}), made({"b": gaussian(12, 4, 3)}, policy="grid:2")
    with pytest.raises(ValueError, match="A was recorded with policy 'gap' and B with 'grid:2'"):
        plane("linear_cka", A, B)


@pytest.mark.parametrize("name", MEASURES)
def test_sites_with_different_numbers_of_positions_have_no_common_rows(name):
    A = made({"fine": gaussian(6, 16, 3), "coarse": gaussian(6, 4, 3)}, policy="tokens")
    with pytest.raises(ValueError, match=r"gives site 'coarse' 24 rows and site 'fine' 96; .* record with 'gap'"):
        plane(name, A)


# ----------------------------------------------------------------------------------------- cells that hold no number


@pytest.mark.parametrize("name", MEASURES)
def test_a_site_that_allows_no_number_gives_nan_and_the_reason_and_spoils_no_other(name):
    bad = gaussian(30, 3)
    bad[4, 1] = np.nan
    A = made({"good": gaussian(30, 5), "constant": np.ones((30, 5)), "nan": bad, "scalar": gaussian(30, 1, seed=3)})
    result = plane(name, A)
    frame = result.frame()
    numbers = ["good"] if MEASURES[name].needs_two_features else ["good", "scalar"]
    for a, b in itertools.product(A.names, A.names):
        assert np.isfinite(frame.loc[a, b]) == (a in numbers and b in numbers), (a, b)
    assert result.notes["good", "constant"].startswith("constant is constant")
    assert result.notes["nan", "good"].startswith("nan holds NaN")
    if MEASURES[name].needs_two_features:
        assert "needs at least 2 features" in result.notes["good", "scalar"]
    assert ("good", "good") not in result.notes


def test_a_plane_on_which_nothing_can_be_computed_is_all_nan():
    A = made({"one": np.ones((9, 3)), "two": np.zeros((9, 2))})
    for name in MEASURES:
        assert np.isnan(plane(name, A).values).all()


def test_ones_own_measure_may_decline_a_pair():
    def picky(X, Y):
        if X.shape != Y.shape:
            raise NotComputable("shapes differ")
        return 1.0

    A = made({"a": gaussian(8, 3), "b": gaussian(8, 4)})
    result = plane(picky, A)
    np.testing.assert_array_equal(result.values, [[1, np.nan], [np.nan, 1]])
    assert result.notes == {("a", "b"): "shapes differ", ("b", "a"): "shapes differ"}


def test_regression_on_few_images_is_noted_in_every_cell_of_the_site_that_predicts():
    A = made({"wide": gaussian(12, 30), "narrow": gaussian(12, 2, seed=1)})
    result = plane("linear_regression_r2", A)
    for b in A.names:
        assert "linear regression on 30 features of 9 rows fits them exactly" in result.notes["wide", b]
        assert ("narrow", b) not in result.notes
    folded = made({"a": gaussian(6, 4, 2)}, policy="grid:2")  # cells of one image are held out together
    assert plane("linear_regression_r2", folded).options["rows_per_image"] == 4


def test_svcca_of_few_images_is_noted_in_its_cell():
    A = made({"wide": gaussian(12, 30), "narrow": gaussian(12, 2, seed=1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = plane("svcca", A)
    assert "components of 12 images" in result.notes["wide", "wide"]
    assert ("narrow", "narrow") not in result.notes


# ---------------------------------------------------------------------------------------------------------- the table


def test_the_tidy_table_has_one_row_a_pair_and_says_how_it_was_made():
    A, B = made({"a": gaussian(9, 3), "b": np.ones((9, 2))}), made({"c": gaussian(9, 4, seed=1)})
    result = plane("rbf_cka", A, B, fraction=0.4)
    table = result.tidy()
    assert isinstance(result, Plane)
    assert table[["site_a", "site_b"]].to_numpy().tolist() == [["a", "c"], ["b", "c"]]
    assert set(table["measure"]) == {"rbf_cka"} and set(table["options"]) == {"fraction=0.4"}
    assert set(table["policy"]) == {"gap"} and set(table["n_images"]) == {9}
    assert table["value"].tolist()[0] == result.frame().loc["a", "c"]
    assert table["note"].tolist()[0] == "" and "constant" in table["note"].tolist()[1]


def test_misspelt_options_are_not_swallowed():
    with pytest.raises(ValueError, match="linear_cka has no option 'debias'; it has debiased"):
        plane("linear_cka", made({"a": gaussian(9, 3)}), debias=True)
