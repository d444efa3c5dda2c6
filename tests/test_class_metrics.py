"""Multi-class losses against slow plain-numpy twins, metrics and confusion matrices against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

import loss_metrics
from class_metrics import (
    IGNORE,
    ce_dice,
    class_scores,
    confusion_table,
    confusions_of,
    from_confusion,
    image_confusions,
    mean_class_accuracy,
    mean_iou,
)
from utils import InputError


def random_batch(seed, classes=4, images=3, side=9, ignored=0.2):
    """Logits in double precision and masks; the first image lacks the last class."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, classes, side, side, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, classes, (images, 1, side, side), generator=generator)
    masks[0] = masks[0].clamp(max=classes - 2)
    masks[torch.rand(masks.shape, generator=generator) < ignored] = IGNORE
    return logits, masks


def plain_ce_dice(logits, masks) -> float:
    """The definition once more, pixel by pixel for the entropy and class by class for Dice."""
    entropies, image_dice = [], []
    for logit, mask in zip(logits.numpy(), masks.numpy()):
        counted = mask[0] != IGNORE
        scores, truth = logit[:, counted], mask[0][counted]
        p = np.exp(scores) / np.exp(scores).sum(0)
        entropies += [-math.log(p[c, i]) for i, c in enumerate(truth)]
        losses = []
        for c in sorted(set(truth)):
            t = (truth == c).astype(float)
            losses.append(1 - 2 * (p[c] * t).sum() / (p[c].sum() + t.sum()))
        image_dice.append(np.mean(losses))
    return float(np.mean(entropies) + np.mean(image_dice))


def random_pair(seed, classes=4, images=5, side=7):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (images, side, side), generator=generator)
    noise = torch.randint(0, classes, (images, side, side), generator=generator)
    prediction = torch.where(torch.rand(target.shape, generator=generator) < 0.6, target, noise)
    target[torch.rand(target.shape, generator=generator) < 0.15] = IGNORE
    return prediction, target


def counted_of(prediction, target, image):
    keep = target[image] != IGNORE
    return target[image][keep].numpy(), prediction[image][keep].numpy()


# ---- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_loss_agrees_with_its_plain_twin(classes, ignored):
    for seed in range(4):
        logits, masks = random_batch(seed, classes=classes, ignored=ignored)
        assert ce_dice(logits, masks).item() == pytest.approx(plain_ce_dice(logits, masks), rel=1e-12)


def test_loss_by_hand_for_even_odds_over_three_classes():
    masks = torch.tensor([0, 0, 1, IGNORE]).reshape(1, 1, 2, 2)
    dice = (2 * (2 / 3) / (1 + 2) + 2 * (1 / 3) / (1 + 1)) / 2  # three counted pixels, p = 1/3: P = 1
    expected = math.log(3) + 1 - dice
    assert ce_dice(torch.zeros(1, 3, 2, 2).double(), masks).item() == pytest.approx(expected, rel=1e-12)


def test_ignored_pixels_teach_nothing():
    logits, masks = random_batch(1)
    logits.requires_grad_()
    loss = ce_dice(logits, masks)
    (gradient,) = torch.autograd.grad(loss, logits)
    ignored = (masks == IGNORE).expand_as(gradient)
    assert (gradient[ignored] == 0).all() and (gradient[~ignored] != 0).any()
    other = logits.detach().clone()
    other[ignored] += 5
    assert ce_dice(other, masks).item() == pytest.approx(loss.item(), rel=1e-12)


def test_an_absent_class_is_left_to_the_cross_entropy():
    logits, masks = torch.zeros(1, 3, 4, 4).double(), torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    entropy = torch.nn.functional.cross_entropy(logits, masks[:, 0]).item()
    assert ce_dice(logits, masks).item() - entropy == pytest.approx(1 - 2 * (16 / 3) / (16 / 3 + 16), rel=1e-12)


def test_the_batchs_dice_part_is_the_mean_of_its_images():
    logits, masks = random_batch(3, ignored=0.0)
    alone = [ce_dice(logits[i : i + 1], masks[i : i + 1]).item() for i in range(len(logits))]
    assert ce_dice(logits, masks).item() == pytest.approx(np.mean(alone), rel=1e-12)


def test_the_loss_and_its_gradient_are_finite_in_half_precision_and_at_extreme_logits():
    masks = torch.zeros(1, 1, 300, 300, dtype=torch.int64)
    masks[..., :150] = 2
    logits = torch.zeros(1, 3, 300, 300, dtype=torch.float16).requires_grad_()
    loss = ce_dice(logits, masks)
    loss.backward()
    expected = math.log(3) + 1 - (2 * 15000 / (30000 + 45000))
    assert loss.item() == pytest.approx(expected, rel=1e-5) and torch.isfinite(logits.grad).all()
    extreme = torch.full((1, 3, 300, 300), -1e4).scatter_(1, masks, 1e4).requires_grad_()
    ce_dice(extreme, masks).backward()
    assert ce_dice(extreme, masks).item() == pytest.approx(0.0, abs=1e-6) and torch.isfinite(extreme.grad).all()


def test_its_gradient_is_that_of_finite_differences():
    logits, masks = random_batch(5, classes=3, images=2, side=3)
    assert torch.autograd.gradcheck(lambda x: ce_dice(x, masks), logits.requires_grad_())


@pytest.mark.parametrize(
    "logits, masks, words",
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.int64), "dice_bce"),
        (torch.zeros(0, 3, 4, 4), torch.zeros(0, 1, 4, 4, dtype=torch.int64), "non-empty"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64), r"\(B, 1, H, W\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 8, 8, dtype=torch.int64), "resize"),
        (torch.zeros(1, 3, 4, 4), torch.full((1, 1, 4, 4), 3), "value 3, outside the classes 0 to 2"),
        (torch.zeros(1, 3, 4, 4), torch.full((1, 1, 4, 4), -1), "value -1"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4), "integers"),
    ],
)
def test_what_the_loss_cannot_use_is_refused(logits, masks, words):
    with pytest.raises(InputError, match=words):
        ce_dice(logits, masks)


def test_an_image_without_a_counted_pixel_is_refused_by_its_number():
    logits, masks = random_batch(0)
    masks[1] = IGNORE
    with pytest.raises(InputError, match=r"image number 1 .* no counted pixel"):
        ce_dice(logits, masks)


# ---- the scores -------------------------------------------------------------------------------------------------


def test_confusions_are_those_of_sklearn_image_by_image_and_together():
    prediction, target = random_pair(0)
    matrices = image_confusions(prediction, target, 4)
    assert matrices.dtype == np.int64
    for image, matrix in enumerate(matrices):
        expected = sk.confusion_matrix(*counted_of(prediction, target, image), labels=range(4))
        assert (matrix == expected).all()
    assert (image_confusions(prediction[:, None], target[:, None], 4) == matrices).all()


def test_scores_are_those_of_sklearn_over_the_classes_present():
    prediction, target = random_pair(1)
    prediction[0], target[0] = prediction[0].clamp(max=2), torch.where(target[0] == IGNORE, IGNORE, target[0] % 3)
    scores = class_scores(prediction, target, 4)
    for image in range(len(target)):
        true, found = counted_of(prediction, target, image)
        either = sorted(set(true) | set(found))
        expected = {
            "iou": sk.jaccard_score(true, found, labels=either, average="macro"),
            "dice": sk.f1_score(true, found, labels=either, average="macro"),
            "accuracy": sk.accuracy_score(true, found),
            "class_accuracy": sk.recall_score(true, found, labels=sorted(set(true)), average="macro"),
        }
        for name, value in expected.items():
            assert scores[name].dtype == np.float64
            assert scores[name][image] == pytest.approx(value, rel=1e-12), name


def test_a_class_in_neither_mask_is_not_counted_as_found_and_a_false_one_costs():
    truth = torch.zeros(1, 4, 4, dtype=torch.int64)
    assert class_scores(truth, truth, 5)["iou"][0] == 1.0
    wrong = truth.clone()
    wrong[0, 0, 0] = 4
    scores = class_scores(wrong, truth, 5)
    assert scores["iou"][0] == pytest.approx((15 / 16 + 0) / 2)
    assert scores["class_accuracy"][0] == pytest.approx(15 / 16)


def test_an_image_without_counted_pixels_has_no_scores_and_an_empty_matrix():
    target = torch.full((1, 3, 3), IGNORE)
    prediction = torch.full((1, 3, 3), 77)  # nothing is asked of ignored pixels
    assert all(np.isnan(values).all() for values in class_scores(prediction, target, 3).values())
    assert (image_confusions(prediction, target, 3) == 0).all()


@pytest.mark.parametrize(
    "prediction, target, words",
    [
        (torch.full((1, 2, 2), 3), torch.zeros(1, 2, 2, dtype=torch.int64), "prediction hold the value 3"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 9), "target hold the value 9"),
        (torch.full((1, 2, 2), IGNORE), torch.zeros(1, 2, 2, dtype=torch.int64), "prediction hold the value 255"),
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), "integers"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.int64), "shape"),
        (torch.zeros(1, 2, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 2, 2, dtype=torch.int64), r"\(B, 1, H, W\)"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(prediction, target, words):
    with pytest.raises(InputError, match=words):
        class_scores(prediction, target, 3)


# ---- from a confusion matrix ------------------------------------------------------------------------------------


def test_the_table_of_classes_is_that_of_sklearn():
    prediction, target = random_pair(2)
    keep = target != IGNORE
    true, found = target[keep].numpy(), prediction[keep].numpy()
    matrix = image_confusions(prediction, target, 4).sum(0)
    table = from_confusion(matrix, ["skin", "lesion", "hair", "ruler"])
    assert list(table["class"]) == ["skin", "lesion", "hair", "ruler"]
    assert table["iou"].to_numpy() == pytest.approx(sk.jaccard_score(true, found, average=None))
    assert table["accuracy"].to_numpy() == pytest.approx(sk.recall_score(true, found, average=None))
    assert table["precision"].to_numpy() == pytest.approx(sk.precision_score(true, found, average=None))
    assert list(table["pixels"]) == list(np.bincount(true, minlength=4))
    assert mean_iou(matrix) == pytest.approx(sk.jaccard_score(true, found, average="macro"))
    assert mean_class_accuracy(matrix) == pytest.approx(sk.balanced_accuracy_score(true, found))


def test_a_binary_lesion_mask_is_the_case_of_two_classes():
    generator = torch.Generator().manual_seed(0)
    found, truth = (torch.rand(1, 1, 16, 16, generator=generator) < 0.4 for _ in range(2))
    binary = loss_metrics.image_metrics(found, truth)
    table = from_confusion(image_confusions(found, truth, 2).sum(0))
    assert table["iou"][1] == pytest.approx(binary["iou"][0])
    assert table["accuracy"].to_numpy() == pytest.approx([binary["specificity"][0], binary["sensitivity"][0]])


def test_ratios_that_do_not_exist_are_nan_and_left_out_of_the_means():
    matrix = np.array([[8, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0], [5, 0, 0, 0]])
    table = from_confusion(matrix)
    assert list(table["class"]) == [0, 1, 2, 3]
    np.testing.assert_allclose(table["iou"], [8 / 15, np.nan, 0, 0])
    np.testing.assert_allclose(table["accuracy"], [0.8, np.nan, np.nan, 0])
    np.testing.assert_allclose(table["precision"], [8 / 13, np.nan, 0, np.nan])
    assert mean_iou(matrix) == pytest.approx(8 / 15 / 3) and mean_class_accuracy(matrix) == pytest.approx(0.4)
    empty = np.zeros((3, 3), dtype=int)
    assert np.isnan([mean_iou(empty), mean_class_accuracy(empty)]).all()


@pytest.mark.parametrize("matrix", [np.ones((2, 3)), np.ones(4), np.ones((1, 1)), np.full((2, 2), -1)])
def test_what_is_no_confusion_matrix_is_refused(matrix):
    for statistic in (mean_iou, mean_class_accuracy, from_confusion):
        with pytest.raises(InputError, match="confusion matrix"):
            statistic(matrix)


# ---- over images ------------------------------------------------------------------------------------------------


def test_a_table_of_confusions_gives_them_back_in_any_order_of_its_rows():
    matrices = image_confusions(*random_pair(3), 4)
    ids = [f"ISIC_{i}" for i in (7, 3, 5, 1, 9)]
    table = confusion_table(ids, matrices)
    assert list(table.columns) == ["id", "true", "predicted", "pixels"] and len(table) == 5 * 16
    names, again = confusions_of(table.sample(frac=1, random_state=0))
    for name, matrix in zip(names, again):
        assert (matrix == matrices[ids.index(name)]).all()


def test_a_table_with_a_missing_or_double_row_is_refused():
    table = confusion_table(["a", "b"], image_confusions(*random_pair(3, images=2), 4))
    for damaged in (table.iloc[:-1], pd.concat([table, table.iloc[:1]]), table.drop(columns="pixels"), table.iloc[:0]):
        with pytest.raises(InputError, match="confusion table"):
            confusions_of(damaged)
    with pytest.raises(InputError, match="an id of its own"):
        confusion_table(["a", "a"], np.ones((2, 3, 3), dtype=int))
