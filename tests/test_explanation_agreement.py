"""Agreement of explanations: by hand, by scipy and sklearn, and where nothing agrees."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from explanations import agreement as ea
from explanations import masks as em
from utils import InputError


def made(*models, seed=0):
    """{a, b, …: {i0, i1, …: map}} from arrays (images, H, W)."""
    return {
        name: {f"i{i}": values for i, values in enumerate(maps)}
        for name, maps in zip("abcdefgh", (np.asarray(model, dtype=float) for model in models))
    }


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def values(maps, similarity, **options):
    return ea.per_image(maps, [similarity], **options)["value"].to_numpy()


# ------------------------------------------------------------------------------------------------------- of one image


def test_equal_maps_are_alike_and_orthogonal_ones_are_not():
    left, right = np.eye(4)[:1], np.eye(4)[:, ::-1][:1]  # no pixel in both
    same, apart = made([left], [3 * left]), made([left], [right])
    for similarity, alike, unlike in (("cosine", 1, 0), ("rbf", 1, np.exp(-1))):
        assert values(same, similarity) == pytest.approx([alike], abs=1e-12)
        assert values(apart, similarity) == pytest.approx([unlike], abs=1e-12)


def test_rbf_of_unit_maps_is_the_formula():
    a, b = noise(2, 5, 7)
    x, y = (side / np.linalg.norm(side) for side in (a, b))
    for sigma in (0.3, 1.0, 2.0):
        expected = np.exp(-(np.linalg.norm(x - y) ** 2) / (2 * sigma**2))
        assert values(made([a], [b]), "rbf", sigma=sigma) == pytest.approx([expected], rel=1e-12)


def test_rank_correlation_is_scipys_with_ties():
    a, b = noise(2, 6, 8, 8).round(1)
    expected = [spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b)]
    assert values(made(a, b), "spearman") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_kappa_of_the_highest_pixels_is_sklearns(fraction):
    a, b = noise(2, 6, 10, 10)
    b += a
    count, expected = round(100 * fraction), []
    for x, y in zip(a, b):
        marks = [np.isin(np.arange(100), np.argsort(side.ravel())[-count:]) for side in (x, y)]
        expected.append(cohen_kappa_score(*marks))
    assert values(made(a, b), "kappa", fraction=fraction) == pytest.approx(expected, abs=1e-12)


def test_pixels_that_tie_at_the_edge_are_left_out_and_the_marginals_say_so():
    a = np.array([[3, 2, 2, 2, 1, 0, 0, 0, 0, 0]])  # of the upper 2, one is there and three tie
    b = np.array([[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]])
    expected = cohen_kappa_score(np.arange(10) < 1, np.arange(10) < 2)
    assert values(made([a], [b]), "kappa", fraction=0.2) == pytest.approx([expected])


def test_a_map_without_any_agreement_is_no_number_and_says_why():
    zero, flat, plateau = np.zeros((4, 4)), np.ones((4, 4)), np.where(np.arange(16) < 9, 1.0, 0.0).reshape(4, 4)
    maps = made([zero, flat, plateau], noise(3, 4, 4))
    table = ea.per_image(maps).pivot(index="id", columns="similarity", values=["value", "reason"])
    reasons = table["reason"]
    assert list(reasons.loc["i0"]) == ["zero map of a"] * 4
    assert dict(reasons.loc["i1"]) == {"cosine": "", "rbf": "", "kappa": "constant map of a"} | {
        "spearman": "constant map of a"
    }
    assert reasons.loc["i2", "kappa"] == "more than 20% of the pixels tie at the top of a"
    assert (table["value"].isna().to_numpy() == (reasons != "").to_numpy()).all()


def test_tiny_maps_do_not_vanish():
    a = noise(1, 4, 4)
    assert values(made(a, 1e-200 * a), "cosine") == pytest.approx([1])


# --------------------------------------------------------------------------------------------------------- of a pair


def test_dissimilarity_by_hand():
    angles = np.array([0.0, 60.0, 90.0])  # cosines 1, 0.5, 0
    a = np.stack([np.array([[1.0, 0.0, 0.0]])] * 3)
    b = np.stack([[[np.cos(t), np.sin(t), 0.0]] for t in np.deg2rad(angles)])
    row = ea.compare(made(a, b), ["cosine"]).iloc[0]
    assert row["mean"] == pytest.approx(0.5) and row["sd"] == pytest.approx(np.sqrt(0.5 / 3))
    assert row["dissimilarity"] == pytest.approx(np.sqrt(0.25 + 0.5 / 3))


def test_the_null_mean_is_that_of_all_pairs_of_different_images():
    a, b = noise(2, 5, 3, 3)
    by_hand = [spearmanr(a[i].ravel(), b[j].ravel()).statistic for i, j in itertools.permutations(range(5), 2)]
    row = ea.compare(made(a, b), ["spearman"]).iloc[0]
    assert row["null_mean"] == pytest.approx(np.mean(by_hand), abs=1e-12)


def test_p_of_few_images_is_the_share_of_all_orders():
    a, b = noise(2, 5, 3, 3)
    b += 0.5 * a
    cosines = [[np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a]
    means = [np.mean([cosines[i][j] for i, j in enumerate(order)]) for order in itertools.permutations(range(5))]
    row = ea.compare(made(a, b), ["cosine"]).iloc[0]
    assert row["p"] == np.mean(np.array(means) >= means[0] - 1e-12)


@pytest.mark.parametrize("images", [5, 12])
def test_independent_maps_are_rejected_as_often_as_asked_for(images):
    p = []
    for start in range(0, 240, 8):
        models = [noise(images, 5, 5, seed=seed) for seed in range(start, start + 8)]
        p.extend(ea.compare(made(*models), ["cosine"], permutations=119, resamples=2)["p"])
    error = np.sqrt(0.05 * 0.95 / len(p))  # two pairs that share a model are independent given that model
    assert len(p) == 840 and abs((np.array(p) <= 0.05 + 1e-9).mean() - 0.05) < 3 * error
    assert abs(np.mean(p) - 0.5) < 0.03


def test_orders_that_move_every_image_would_reject_too_often():
    orders = np.array(list(itertools.permutations(range(5))))
    derangements, p = orders[(orders != np.arange(5)).all(1)], []
    for seed in range(400):
        a, b = noise(2, 5, 25, seed=seed)
        inner = a @ b.T
        null = inner[np.arange(5), derangements].mean(1)
        p.append((1 + (null >= inner.trace() / 5).sum()) / (1 + len(null)))
    assert (np.array(p) <= 0.05).mean() > 0.08


def test_a_bias_towards_the_centre_that_all_images_share_is_not_above_the_null():
    centre = np.exp(-((np.mgrid[:8, :8] - 3.5) ** 2).sum(0) / 8)
    biased = made(*(3 * centre + 0.3 * noise(30, 8, 8, seed=seed) for seed in (1, 2)))
    row = ea.compare(biased, ["cosine"]).iloc[0]
    assert row["mean"] > 0.9 and row["p"] > 0.05  # very alike, and no more so than maps of different images
    specific = noise(30, 8, 8, seed=3)
    seen = made(*(3 * centre + 0.3 * noise(30, 8, 8, seed=seed) + 0.2 * specific for seed in (1, 2)))
    assert ea.compare(seen, ["cosine"]).iloc[0]["p"] == 1 / 1000


def test_a_pair_stands_between_other_images_and_another_seed():
    shared, own = noise(40, 8, 8, seed=9), [noise(40, 8, 8, seed=s) for s in (10, 11)]
    models = [shared + own[m // 2] + 0.3 * noise(40, 8, 8, seed=m) for m in range(4)]  # a, b and c, d are twins
    table = ea.compare(made(*models), ["cosine"], twins=[("a", "b"), ("d", "c")]).set_index(["model_a", "model_b"])
    ceiling = np.sqrt(table.loc[("a", "b"), "mean"] * table.loc[("c", "d"), "mean"])
    row = table.loc[("a", "c")]
    assert row["ceiling"] == pytest.approx(ceiling) and not row["twins"] and table.loc[("c", "d"), "twins"]
    assert row["u"] == pytest.approx((row["mean"] - row["null_mean"]) / (ceiling - row["null_mean"]))
    assert 0.3 < row["u"] < 0.7
    without = ea.compare(made(*models), ["cosine"], twins=[("a", "b")]).set_index(["model_a", "model_b"])
    assert np.isnan(without.loc[("a", "c"), ["ceiling", "u"]].astype(float)).all()


def test_no_scale_where_twins_agree_no_more_than_other_images():
    table = ea.compare(made(*(1 + noise(30, 6, 6, seed=s) for s in range(4))), ["cosine"], twins=[("a", "b")])
    row = table.iloc[0]
    assert np.isnan(row["u"]) == (not row["ceiling"] > row["null_mean"])
    flat = ea.compare(made(*[np.ones((5, 2, 2))] * 2), ["cosine"], twins=[("a", "b")]).iloc[0]
    assert flat["ceiling"] == pytest.approx(1) and np.isnan(flat["u"]) and flat["p"] == 1


def test_zero_maps_are_counted_and_the_rest_goes_on():
    a, b = noise(2, 8, 4, 4)
    a[2] = 0
    row = ea.compare(made(a, b), ["cosine"]).iloc[0]
    kept = ea.compare(made(np.delete(a, 2, 0), np.delete(b, 2, 0)), ["cosine"]).iloc[0]
    assert (row["n"], row["left_out"], row["reason"]) == (7, 1, "1 images: zero map of a")
    assert row["mean"] == pytest.approx(kept["mean"]) and row["null_mean"] == pytest.approx(kept["null_mean"])
    none = ea.compare(made(0 * a, b), ["cosine"]).iloc[0]
    assert none["n"] == 0 and np.isnan(none[["mean", "p", "dissimilarity"]].astype(float)).all()


def test_the_interval_covers_as_the_standard_error_of_a_mean_does():
    a, b = noise(2, 200, 4, 4)
    row, each = ea.compare(made(a, b), ["cosine"]).iloc[0], values(made(a, b), "cosine")
    half = 1.96 * each.std() / np.sqrt(200)
    assert row["low"] == pytest.approx(each.mean() - half, abs=0.1 * half)
    assert row["high"] == pytest.approx(each.mean() + half, abs=0.1 * half)


def test_images_are_matched_by_id():
    a, b = noise(2, 6, 4, 4)
    maps = made(a, b)
    mixed = maps | {"b": dict(reversed(maps["b"].items()))}
    pd.testing.assert_frame_equal(ea.compare(maps), ea.compare(mixed))


def test_maps_that_do_not_belong_together_are_refused():
    a, b = noise(2, 3, 4, 4)
    maps = made(a, b)
    cases = {
        "different images": maps | {"b": {**maps["b"], "other": a[0]}},
        "resize all maps": maps | {"b": {**maps["b"], "i1": a[0][:2]}},
        "NaN": maps | {"b": {**maps["b"], "i1": a[0] * np.nan}},
        "no explanations": {},
    }
    for words, wrong in cases.items():
        with pytest.raises(InputError, match=words):
            ea.compare(wrong)
    for words, options in {"closest: 'kappa'": {"similarities": ["kapa"]}, "sigma": {"sigma": 0.0}}.items():
        with pytest.raises(InputError, match=words):
            ea.compare(maps, **options)
    with pytest.raises(InputError, match="marks 0"):
        ea.compare(maps, ["kappa"], fraction=0.01)
    for words, twins in {"among the twins": [("a", "z")], "own twin": [("a", "a")]}.items():
        with pytest.raises(InputError, match=words):
            ea.compare(maps, twins=twins)


# ---------------------------------------------------------------------------------------------------------- in masks


def of_map(values, mask, quantity):
    table = em.in_mask({"a": {"i": np.asarray(values, dtype=float)}}, {"i": np.asarray(mask)})
    return table.set_index("quantity").loc[quantity]


def test_a_map_that_is_the_mask_lies_wholly_in_it():
    mask = np.eye(4, dtype=bool)
    for quantity in em.QUANTITIES:
        assert of_map(mask, mask, quantity)["value"] == 1
        assert of_map(~mask, mask, quantity)["value"] == 0
    assert of_map(mask, mask, "pointing")["area"] == 0.25


def test_lesion_mass_by_hand_and_what_tells_it_from_the_absolute_one():
    values, mask = [[3, -4], [1, 2]], [[1, 1], [0, 0]]
    assert of_map(values, mask, "positive mass")["value"] == pytest.approx(3 / 6)
    assert of_map(values, mask, "absolute mass")["value"] == pytest.approx(7 / 10)


def test_maxima_that_tie_point_in_parts():
    assert of_map([[2, 2], [2, 1]], [[1, 0], [0, 0]], "pointing")["value"] == pytest.approx(1 / 3)
    assert of_map(np.ones((2, 2)), [[1, 0], [0, 0]], "pointing")["value"] == 0.25  # nowhere: the mask's area


def test_no_number_for_an_empty_mask_or_a_map_without_mass():
    for values, mask, quantity, reason in (
        (np.ones((2, 2)), np.zeros((2, 2)), "pointing", "empty mask"),
        (-np.ones((2, 2)), np.eye(2), "positive mass", "no positive attribution"),
        (np.zeros((2, 2)), np.eye(2), "absolute mass", "zero map"),
        (np.zeros((2, 2)), np.eye(2), "pointing", "zero map"),
    ):
        row = of_map(values, mask, quantity)
        assert np.isnan(row["value"]) and row["reason"] == reason


def test_a_map_that_follows_its_own_lesion_is_above_maps_of_other_images():
    generator = np.random.default_rng(0)
    masks = {
        f"i{i}": np.roll(np.kron([[1, 0], [0, 0]], np.ones((4, 4))), generator.integers(0, 8, 2), (0, 1))
        for i in range(30)
    }
    following = {i: mask + 0.1 * generator.random((8, 8)) for i, mask in masks.items()}
    central = {i: np.exp(-((np.mgrid[:8, :8] - 3.5) ** 2).sum(0)) + 0.01 * generator.random((8, 8)) for i in masks}
    maps = {"follows": following, "twin": following, "centre": central}
    table = em.in_mask_summary(maps, masks, twins=[("follows", "twin")]).set_index(["model", "quantity"])
    assert table.loc[("follows", "positive mass"), "p"] == 1 / 1000
    assert table.loc[("centre", "positive mass"), "p"] > 0.05
    assert table.loc[("follows", "pointing"), "other_seeds"] == table.loc[("twin", "pointing"), "mean"] == 1
    assert np.isnan(table.loc[("centre", "pointing"), "other_seeds"])
    assert (table["area"] == 0.25).all()
    each = em.in_mask(maps, masks)
    means = each.groupby(["model", "quantity"])["value"].mean()
    assert table["mean"].to_dict() == pytest.approx(means.to_dict())


def test_masks_that_do_not_fit_are_refused():
    maps = {"a": {"i": np.ones((2, 2))}}
    for words, masks in {
        "no mask": {},
        "resize": {"i": np.ones((3, 3))},
        "threshold": {"i": np.full((2, 2), 0.5)},
    }.items():
        with pytest.raises(InputError, match=words):
            em.in_mask(maps, masks)


# ------------------------------------------------------------------------------------------- what agreement follows


def series(values):
    return pd.Series(np.asarray(values, dtype=float), [f"i{i}" for i in range(len(values))])


def test_the_correlation_over_images_is_scipys_whatever_their_order():
    x, y = noise(2, 60)
    found = em.follows_per_image(series(x), {"other": series(y + x).iloc[::-1]}).iloc[0]
    expected = spearmanr(x, y + x)
    assert found["spearman"] == pytest.approx(expected.statistic) and found["n"] == 60
    assert found["low"] < found["spearman"] < found["high"] and found["p"] == 1 / 2001
    assert np.isnan(found["partial"])


def test_permuting_images_gives_scipys_p_and_noise_a_p_that_is_not_small():
    x, y = noise(2, 40, seed=4)
    y += 0.25 * x
    found = em.follows_per_image(series(x), {"other": series(y)}, permutations=4000).iloc[0]
    assert found["p"] == pytest.approx(spearmanr(x, y).pvalue, abs=0.02)


def test_what_large_lesions_make_of_both_is_taken_out():
    area, x, y = noise(3, 300)
    x, y = x + 2 * area, y + 2 * area
    found = em.follows_per_image(series(x), {"masks": series(y)}, area=series(area)).iloc[0]
    ranks = pd.DataFrame({"x": x, "y": y, "z": area}).rank()
    r = ranks.corr().to_numpy()
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert found["partial"] == pytest.approx(expected, abs=1e-12)
    assert found["spearman"] > 0.6 and abs(found["partial"]) < 0.2
    assert found["partial_low"] < found["partial"] < found["partial_high"]


def test_missing_values_are_counted_and_constant_ones_have_no_correlation():
    x, y = noise(2, 20)
    x[3] = np.nan
    table = em.follows_per_image(series(x), {"y": series(y), "flat": series(np.ones(20))}).set_index("other")
    assert (table["n"] == 19).all() and (table["left_out"] == 1).all()
    assert np.isnan(table.loc["flat", "spearman"]) and "same in all images" in table.loc["flat", "reason"]
    assert table.loc["y", "spearman"] == pytest.approx(spearmanr(x, y, nan_policy="omit").statistic)


def test_tables_of_different_images_are_refused():
    x = series(noise(10))
    twice = pd.concat([x, x.iloc[:1]])
    for words, first, others in (
        ("first 'i9'", x, {"y": x.iloc[:9]}),
        ("twice", twice, {"y": x}),
        ("at least 4", x.iloc[:3], {"y": x.iloc[:3]}),
        ("nothing was given", x, {}),
    ):
        with pytest.raises(InputError, match=words):
            em.follows_per_image(first, others)
