"""Masks of two models: Dice and error consistency by hand and by sklearn; what follows from what over images."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score, f1_score

from studies.mask_agreement import compare_masks, follows
from utils import InputError


def flips(truth, share, seed):
    """The truth with a share of its pixels wrong."""
    return truth ^ (torch.rand(truth.shape, generator=torch.Generator().manual_seed(seed)) < share)


@pytest.fixture(scope="module")
def masks():
    truth = torch.rand(5, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    return flips(truth, 0.2, 1), flips(truth, 0.3, 2), truth


def of_pixels(a, b, truth):
    """One image of 1 × n pixels."""
    rows = (torch.tensor(side, dtype=torch.float32).reshape(1, 1, -1) for side in (a, b, truth))
    return compare_masks(*rows, ["p"]).iloc[0]


# ---- one image --------------------------------------------------------------------------------------------------


def test_eight_pixels_by_hand():
    #                    a wrong at 0, 1; b wrong at 1, 2, 3
    row = of_pixels([0, 0, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0])
    assert row["area"] == 0.5 and row["dice"] == 0
    assert (row["accuracy_a"], row["accuracy_b"]) == (6 / 8, 5 / 8)
    assert row["observed"] == 5 / 8  # both wrong at 1, both right at 4 to 7
    assert row["expected"] == pytest.approx((30 + 6) / 64)
    assert row["kappa"] == pytest.approx((40 - 36) / (64 - 36))


def test_kappa_is_cohens_of_the_two_error_vectors_and_dice_is_f1_of_the_masks(masks):
    a, b, truth = masks
    table = compare_masks(a, b, truth, list("pqrst"))
    for i, row in table.iterrows():
        errors = [(side[i] != truth[i]).flatten().numpy() for side in (a, b)]
        assert row["kappa"] == pytest.approx(cohen_kappa_score(*errors), abs=1e-12)
        assert row["dice"] == pytest.approx(f1_score(a[i].flatten().numpy(), b[i].flatten().numpy()), abs=1e-12)
        assert row["area"] == pytest.approx(truth[i].double().mean().item())


def test_independent_errors_have_no_consistency_and_the_same_errors_have_all():
    truth = torch.rand(200, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.4
    a, b = flips(truth, 0.2, 1), flips(truth, 0.1, 2)
    ids = [f"i{k}" for k in range(200)]
    kappa = compare_masks(a, b, truth, ids)["kappa"]
    assert abs(kappa.mean()) < 3.5 * kappa.std() / np.sqrt(200)
    assert kappa.std() / np.sqrt(200) < 0.01
    np.testing.assert_allclose(compare_masks(a, a, truth, ids)["kappa"], 1)


def test_errors_at_opposite_pixels_are_less_consistent_than_chance():
    row = of_pixels([1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0])
    assert (row["observed"], row["expected"], row["kappa"]) == (0, 0.5, -1)


@pytest.mark.parametrize("wrong", [False, True])
def test_kappa_does_not_exist_where_both_are_right_or_both_wrong_everywhere(wrong):
    truth = [1, 1, 0, 0, 0]
    mask = [1 - pixel for pixel in truth] if wrong else truth
    row = of_pixels(mask, mask, truth)
    assert row["expected"] == 1 and np.isnan(row["kappa"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(cohen_kappa_score([wrong] * 5, [wrong] * 5))


def test_one_perfect_model_leaves_no_consistency():
    row = of_pixels([1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0])
    assert row["expected"] == row["observed"] == 0.75 and row["kappa"] == 0


def test_two_empty_masks_have_dice_one_and_one_empty_mask_dice_zero():
    assert of_pixels([0, 0], [0, 0], [1, 0])["dice"] == 1
    assert of_pixels([0, 0], [0, 1], [1, 0])["dice"] == 0


def test_swapping_the_models_swaps_their_accuracies_only(masks):
    a, b, truth = masks
    one, other = compare_masks(a, b, truth, list("pqrst")), compare_masks(b, a, truth, list("pqrst"))
    swapped = other.rename(columns={"accuracy_a": "accuracy_b", "accuracy_b": "accuracy_a"})[one.columns]
    pd.testing.assert_frame_equal(one, swapped)


def test_masks_that_do_not_belong_together_are_refused(masks):
    a, b, truth = masks
    with pytest.raises(InputError, match="5, 5 and 5 masks for 4 ids"):
        compare_masks(a, b, truth, list("pqrs"))
    with pytest.raises(InputError, match="twice, first 'p'"):
        compare_masks(a, b, truth, list("ppqrs"))
    with pytest.raises(InputError, match="shape"):
        compare_masks(a, b[:, :6], truth, list("pqrst"))
    with pytest.raises(InputError, match="other than 0 and 1"):
        compare_masks(a.float() * 0.7, b, truth, list("pqrst"))


# ---- over images ------------------------------------------------------------------------------------------------


def tables(dice, agreement, area):
    ids = [f"i{k:03d}" for k in range(len(dice))]
    return pd.DataFrame({"id": ids, "dice": dice, "area": area}), pd.DataFrame({"id": ids, "agreement": agreement})


def gaussian(n, seed):
    return np.random.default_rng(seed).normal(size=n)


def test_the_correlation_is_scipys_and_the_partial_one_that_of_rank_residuals():
    area = np.round(gaussian(50, 1), 1)  # with ties
    dice, agreement = np.round(area + gaussian(50, 2), 1), area + gaussian(50, 3)
    found = follows(*tables(dice, agreement, area), resamples=50, permutations=50)
    assert found["n"] == 50
    assert found["spearman"] == pytest.approx(spearmanr(agreement, dice).statistic, abs=1e-12)
    r = spearmanr(np.stack([agreement, dice, area], axis=1)).statistic
    partial = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert found["partial"] == pytest.approx(partial, abs=1e-12)


def test_what_only_area_makes_common_is_gone_from_the_partial_correlation():
    area = gaussian(400, 1)
    found = follows(*tables(area + 0.5 * gaussian(400, 2), area + 0.5 * gaussian(400, 3), area))
    assert found["spearman"] > 0.7 and found["p"] == 1 / 2001
    assert found["partial_low"] < 0 < found["partial_high"] and abs(found["partial"]) < 0.15
    assert found["partial_p"] > 0.05


def test_what_is_common_beside_area_stays():
    area, common = gaussian(200, 1), gaussian(200, 2)
    found = follows(*tables(area + common, common - area, area))
    assert found["partial"] > 0.8 and found["partial_p"] == 1 / 2001 and found["partial_low"] > 0.75
    assert abs(found["spearman"]) < 0.2


def test_any_rising_map_of_the_values_gives_the_same_answer():
    area, dice, agreement = (gaussian(40, seed) for seed in (1, 2, 3))
    one = follows(*tables(dice, agreement, area), resamples=100, permutations=100)
    pd.testing.assert_series_equal(
        one, follows(*tables(np.exp(dice), agreement**3, 5 * area), resamples=100, permutations=100)
    )


def test_images_are_matched_by_id():
    area, dice, agreement = (gaussian(40, seed) for seed in (1, 2, 3))
    per_image, agreed = tables(dice, dice + 0.1 * agreement, area)
    one = follows(per_image, agreed, resamples=100, permutations=100)
    assert one["spearman"] > 0.9
    pd.testing.assert_series_equal(one, follows(per_image, agreed[::-1], resamples=100, permutations=100))


def test_without_any_relation_five_percent_are_significant():
    p = []
    for seed in range(300):
        area = gaussian(30, 3 * seed)
        found = follows(
            *tables(area + gaussian(30, 3 * seed + 1), gaussian(30, 3 * seed + 2), area), resamples=1, permutations=99
        )
        p.append([found["p"], found["partial_p"]])
    rejected = (np.array(p) <= 0.05).sum(0)
    assert ((rejected >= 4) & (rejected <= 29)).all()  # binomial(300, 0.05): beyond these with p < 0.001 each


def test_the_interval_holds_the_true_correlation_nineteen_times_in_twenty():
    rho, held = 0.6, 0
    true = 6 / np.pi * np.arcsin(rho / 2)  # Spearman of a bivariate Gaussian (Kruskal 1958)
    for seed in range(200):
        common = gaussian(80, 3 * seed)
        y = rho * common + np.sqrt(1 - rho**2) * gaussian(80, 3 * seed + 1)
        found = follows(*tables(common, y, gaussian(80, 3 * seed + 2)), resamples=300, permutations=1)
        held += found["low"] <= true <= found["high"]
    assert 177 <= held <= 199  # binomial(200, 0.95): fewer with p < 0.0005; a percentile interval is a little short


def test_a_correlation_that_does_not_exist_is_nan():
    found = follows(*tables(np.ones(20), gaussian(20, 1), gaussian(20, 2)), resamples=20, permutations=20)
    assert found.drop("n").isna().all()
    area = gaussian(20, 1)
    found = follows(
        *tables(np.exp(area), gaussian(20, 2), area), resamples=20, permutations=20
    )  # area says all of Dice
    assert np.isfinite(found[["spearman", "low", "high", "p"]].astype(float)).all()
    assert found[["partial", "partial_low", "partial_high", "partial_p"]].isna().all()


def test_permutations_that_reach_the_same_correlation_count():
    """Of the 24 orders of four images two reach |1|, so p is 1/12 and not the smallest there is."""
    found = follows(*tables(np.arange(4), np.arange(4) ** 2, [1, 3, 2, 4]), resamples=1, permutations=4000)
    assert found["spearman"] == pytest.approx(1)
    assert found["p"] == pytest.approx(1 / 12, abs=4 * np.sqrt(11 / 144 / 4000))


def test_an_area_that_is_the_same_everywhere_explains_nothing():
    dice, agreement = gaussian(20, 1), gaussian(20, 2)
    found = follows(*tables(dice, agreement, np.full(20, 0.3)), resamples=20, permutations=20)
    assert found["partial"] == pytest.approx(found["spearman"], abs=1e-12)


def test_tables_that_do_not_belong_together_are_refused():
    per_image, agreement = tables(gaussian(9, 1), gaussian(9, 2), gaussian(9, 3))
    cases = [
        (per_image.drop(columns="area"), agreement, "lacks the columns .'area'"),
        (per_image, agreement[1:], "1 images are in one table only, first 'i000'"),
        (per_image, pd.concat([agreement, agreement[:1]]), "1 ids twice, first 'i000'"),
        (per_image, agreement.assign(agreement=[np.nan, *range(8)]), "no value for 1 images, first 'i000'"),
        (per_image[:3], agreement[:3], "at least 4"),
    ]
    for one, other, message in cases:
        with pytest.raises(InputError, match=message):
            follows(one, other)
