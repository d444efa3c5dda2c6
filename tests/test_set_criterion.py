"""The set loss for a whole batch at once, against the library's own, which goes image by image."""

import dataclasses

import pytest
import torch
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from set_criterion import SetCriterion, set_criterion

BATCH, QUERIES, SIDE = 4, 7, 16


def layers(count=3, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            (torch.randn(BATCH, QUERIES, SIDE, SIDE, generator=generator) * scale).requires_grad_(),
            torch.randn(BATCH, QUERIES, 3, generator=generator).requires_grad_(),
        )
        for _ in range(count)
    ]


def targets():
    """A lesion, a lesion beside it, an empty mask and a full one: two, two, one and one targets."""
    lesion = torch.zeros(BATCH, 1, 50, 40)
    lesion[0, :, 5:20, 3:30] = 1
    lesion[1, :, 25:45, 10:12] = 1
    lesion[3] = 1
    masks = torch.cat([1 - lesion, lesion], 1)
    return masks, masks.flatten(2).any(-1)


def librarys(settings, predictions, masks, present):
    weights = {
        "loss_cross_entropy": settings.class_weight,
        "loss_mask": settings.mask_weight,
        "loss_dice": settings.dice_weight,
    }
    config = Mask2FormerConfig(
        num_labels=2,
        class_weight=settings.class_weight,
        mask_weight=settings.mask_weight,
        dice_weight=settings.dice_weight,
        no_object_weight=settings.no_object,
        train_num_points=settings.points,
        oversample_ratio=settings.oversample,
        importance_sample_ratio=settings.importance,
    )
    criterion = Mask2FormerLoss(config, weights)
    others = [{"masks_queries_logits": m, "class_queries_logits": c} for m, c in predictions[1:]]
    losses = criterion(
        *predictions[0],
        [mask[here] for mask, here in zip(masks, present)],
        [here.nonzero()[:, 0] for here in present],
        others,
    )
    return sum(weight * value for key, weight in weights.items() for name, value in losses.items() if key in name)


@pytest.mark.parametrize(
    "settings",
    [
        SetCriterion(points=200),
        SetCriterion(points=64, importance=1.0, oversample=2.0),
        SetCriterion(1.0, 3.0, 0.5, 0.4, points=40, importance=0.0),
    ],
)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_value_and_gradients_are_the_librarys_on_the_same_random_numbers(settings, scale):
    masks, present = targets()
    mine, theirs = layers(scale=scale), layers(scale=scale)
    torch.manual_seed(3)
    value = set_criterion(settings, mine, masks, present, present.sum().float())
    torch.manual_seed(3)
    expected = librarys(settings, theirs, masks, present)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    value.backward()
    expected.backward()
    for (m, c), (m2, c2) in zip(mine, theirs):
        torch.testing.assert_close(m.grad, m2.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(c.grad, c2.grad, rtol=1e-4, atol=1e-6)


def test_a_right_answer_costs_little_and_a_wrong_label_its_weight():
    masks, present = targets()
    masks, present = masks[:2], present[:2]
    logits = torch.full((2, QUERIES, 50, 40), -50.0)
    logits[:, 2], logits[:, 5] = 100 * masks[:, 0] - 50, 100 * masks[:, 1] - 50
    classes = torch.zeros(2, QUERIES, 3)
    classes[..., 2] = 50.0
    classes[:, 2] = torch.tensor([50.0, 0, 0])
    classes[:, 5] = torch.tensor([0, 50.0, 0])
    settings = SetCriterion(points=500, importance=0.0)
    perfect = set_criterion(settings, [(logits, classes)], masks, present, torch.tensor(4.0))
    opposite = set_criterion(settings, [(-logits, classes)], masks, present, torch.tensor(4.0))
    assert 0 <= perfect < opposite / 10  # not 0: between two pixels of the border the truth is a fraction
    classes[0, 5] = torch.tensor([0, 0, 50.0])  # it says 'no object' over the right mask: 50 nats
    weight = 1.0 / (4 + 10 * settings.no_object)
    wrong = set_criterion(settings, [(logits, classes)], masks, present, torch.tensor(4.0))
    assert wrong - perfect == pytest.approx(settings.class_weight * 50 * weight, rel=0.02)


def test_queries_that_overflow_are_matched_last_and_the_loss_says_so():
    masks, present = targets()
    ((m, c),) = layers(1)
    with torch.no_grad():
        m[0, 3] = torch.nan
    settings = SetCriterion(points=50)
    assert torch.isfinite(set_criterion(settings, [(m, c)], masks, present, present.sum().float()))
    with torch.no_grad():
        m[0] = torch.nan
    assert torch.isnan(set_criterion(settings, [(m, c)], masks, present, present.sum().float()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: all images are matched in one call there")
def test_the_gpu_gives_the_same_loss_on_the_same_points(monkeypatch):
    masks, _ = targets()
    points = torch.rand(BATCH, 300, 2)
    settings = dataclasses.replace(SetCriterion(), points=300)
    import set_criterion as room

    ((m, _),) = layers(1)
    expected = room._mask_costs(settings, m, masks, points)
    torch.testing.assert_close(room._mask_costs(settings, m.cuda(), masks.cuda(), points.cuda()).cpu(), expected)
