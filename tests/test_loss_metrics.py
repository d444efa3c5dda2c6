"""Losses against slow plain-numpy twins, metrics against hand-worked values and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, recall_score

from loss_metrics import LOSSES, METRICS, dice_bce, image_metrics, scaled_dice, summarize


def logits_of(*probabilities_per_image: float, side: int = 8) -> torch.Tensor:
    return torch.stack([torch.full((1, side, side), math.log(p / (1 - p))) for p in probabilities_per_image]).double()


def random_batch(seed: int, areas: tuple[int, ...], side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(len(areas), 1, side * side, dtype=torch.float64)
    logits = torch.randn(len(areas), 1, side * side, generator=generator, dtype=torch.float64) - 5
    for i, area in enumerate(areas):
        pixels = torch.randperm(side * side, generator=generator)[:area]
        masks[i, 0, pixels] = 1
        logits[i, 0, pixels] += 4
    return logits.reshape(-1, 1, side, side), masks.reshape(-1, 1, side, side)


def plain_scaled_dice(logits, masks, smooth=0.3, threshold=20.0) -> float:
    """The definition once more, image by image and pixel by pixel."""
    small_costs, large_totals, pixels_p, pixels_t = [], [], [], []
    for logit, mask in zip(np.asarray(logits), np.asarray(masks)):
        p, t = 1 / (1 + np.exp(-logit.ravel())), mask.ravel()
        if p.sum() <= threshold and t.sum() <= threshold:
            small_costs.append(2 ** -(2.75 * threshold - p.sum() - t.sum()))
        else:
            large_totals.append(p.sum() + t.sum())
            pixels_p.extend(p)
            pixels_t.extend(t)
    loss = 0.0
    if small_costs:
        loss += np.mean(small_costs) * len(small_costs) / len(logits)
    if large_totals:
        p, t = np.array(pixels_p), np.array(pixels_t)
        dice = (2 * (p * t).sum() + smooth) / (p.sum() + t.sum() + smooth)
        loss += math.log(np.mean(large_totals)) * (1 - dice) * len(large_totals) / len(logits)
    return float(loss)


def plain_dice_bce(logits, masks) -> float:
    """The definition once more, image by image, with probabilities rather than logits."""
    losses = []
    for logit, mask in zip(np.asarray(logits), np.asarray(masks)):
        p, t = 1 / (1 + np.exp(-logit.ravel())), mask.ravel()
        dice_loss = 0.0 if t.sum() == 0 else 1 - 2 * (p * t).sum() / (p.sum() + t.sum())
        losses.append(dice_loss - np.mean(t * np.log(p) + (1 - t) * np.log(1 - p)))
    return float(np.mean(losses))


GROUPS = {"mixed": (0, 5, 60, 100), "all small": (0, 3, 9), "all large": (50, 90), "one image": (70,)}


@pytest.mark.parametrize("areas", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize(
    "loss, twin", [(scaled_dice, plain_scaled_dice), (dice_bce, plain_dice_bce)], ids=["scaled_dice", "dice_bce"]
)
def test_loss_agrees_with_its_plain_twin(loss, twin, areas):
    for seed in range(5):
        logits, masks = random_batch(seed, areas)
        assert loss(logits, masks).item() == pytest.approx(twin(logits, masks), rel=1e-9)


def test_scaled_dice_of_one_large_image_by_hand():
    masks = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    expected = math.log(32 + 64) * (1 - (2 * 32 + 0.3) / (96 + 0.3))
    assert scaled_dice(logits_of(0.5), masks).item() == pytest.approx(expected, rel=1e-12)


def test_scaled_dice_of_one_small_image_by_hand():
    masks = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    assert scaled_dice(logits_of(0.25), masks).item() == pytest.approx(2.0**-39, rel=1e-9)  # 2.75*20 - 16


def test_scaled_dice_options_are_used():
    logits, masks = random_batch(0, (5, 60))
    ours = scaled_dice(logits, masks, smooth=2.0, threshold=3.0).item()
    assert ours == pytest.approx(plain_scaled_dice(logits, masks, smooth=2.0, threshold=3.0), rel=1e-9)
    assert ours != pytest.approx(scaled_dice(logits, masks).item(), rel=1e-3)


def test_sum_exactly_at_the_threshold_is_small():
    masks = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    assert scaled_dice(logits_of(0.5), masks, threshold=32.0).item() == pytest.approx(2.0 ** -(88 - 32), rel=1e-12)


def test_dice_bce_by_hand():
    masks = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    masks[..., :4] = 1  # P = 32, T = 32, I = 16
    assert dice_bce(logits_of(0.5), masks).item() == pytest.approx(0.5 + math.log(2), rel=1e-12)


def test_dice_bce_of_a_batch_is_the_mean_of_its_images():
    logits, masks = random_batch(3, (0, 5, 100))
    each = [dice_bce(logits[i : i + 1], masks[i : i + 1]).item() for i in range(3)]
    assert dice_bce(logits, masks).item() == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("logit", [-200.0, -3.0, 0.0, 200.0])
@pytest.mark.parametrize("areas", [(0, 0), (144, 144), (0, 144), (7, 60)])
def test_loss_and_gradient_are_finite(name, logit, areas):
    _, masks = random_batch(0, areas)
    logits = torch.full_like(masks, logit, dtype=torch.float32).requires_grad_()
    loss = LOSSES[name](logits, masks)
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_empty_prediction_of_empty_mask_costs_nothing():
    assert dice_bce(torch.full((2, 1, 8, 8), -200.0), torch.zeros(2, 1, 8, 8)).item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_descending_the_loss_recovers_the_mask(name):
    _, masks = random_batch(0, (60, 80))
    logits = torch.zeros_like(masks).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        LOSSES[name](logits, masks).backward()
        optimizer.step()
    assert ((logits > 0) == masks.bool()).all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_do_not_overflow(name):
    masks = torch.ones(1, 1, 512, 512)
    loss = LOSSES[name](torch.full((1, 1, 512, 512), 1.0, dtype=torch.float16), masks)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_refuses_wrong_shapes_and_soft_masks(name):
    logits = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"masks have shape \(2, 1, 8, 8\)"):
        LOSSES[name](logits, torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="needed"):
        LOSSES[name](torch.zeros(2, 4, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="other than 0 and 1"):
        LOSSES[name](logits, torch.full((2, 1, 4, 4), 255.0))


def test_metrics_by_hand():
    target = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0]]], dtype=torch.bool)
    found = torch.tensor([[[1, 1, 1, 0], [1, 0, 0, 0]]], dtype=torch.bool)  # hit 3, miss 1, alarm 1, rest 3
    metrics = image_metrics(found, target)
    expected = {"iou": 3 / 5, "dice": 6 / 8, "accuracy": 6 / 8, "sensitivity": 3 / 4, "specificity": 3 / 4}
    assert tuple(metrics) == METRICS
    assert {name: metrics[name].item() for name in expected} == expected
    assert metrics["thresholded_jaccard"].item() == 0  # 0.6 < 0.65


def test_metrics_agree_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(12, 1, 16, 16, generator=generator) < torch.linspace(0.05, 0.9, 12).view(-1, 1, 1, 1)
    found = target ^ (torch.rand(12, 1, 16, 16, generator=generator) < 0.2)
    metrics = image_metrics(found, target)
    references = {
        "iou": jaccard_score,
        "dice": f1_score,
        "accuracy": accuracy_score,
        "sensitivity": recall_score,
        "specificity": lambda truth, guess: recall_score(truth, guess, pos_label=0),
    }
    for name, reference in references.items():
        expected = [reference(t.flatten().int().numpy(), f.flatten().int().numpy()) for t, f in zip(target, found)]
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-12, err_msg=name)
    without_channel = image_metrics(found[:, 0], target[:, 0])
    assert all(np.array_equal(metrics[name], without_channel[name]) for name in METRICS)


def test_thresholded_jaccard_keeps_exactly_the_threshold():
    target = torch.ones(3, 1, 20, dtype=torch.bool)
    found = torch.zeros(3, 1, 20, dtype=torch.bool)
    for i, hits in enumerate((12, 13, 20)):
        found[i, 0, :hits] = True
    np.testing.assert_array_equal(image_metrics(found, target)["thresholded_jaccard"], [0, 0.65, 1])


def test_degenerate_images_follow_the_stated_conventions():
    empty, full = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    both_empty = image_metrics(empty, empty)
    assert all(both_empty[name] == 1 for name in METRICS if name != "sensitivity")
    assert np.isnan(both_empty["sensitivity"]) and np.isnan(image_metrics(full, full)["specificity"])
    assert image_metrics(full, empty)["iou"] == 0 and image_metrics(empty, full)["sensitivity"] == 0


def test_metrics_refuse_other_shapes_and_greys():
    mask = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="shape"):
        image_metrics(mask, mask[:, 0])
    with pytest.raises(ValueError, match="needed"):
        image_metrics(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="prediction hold values other than 0 and 1"):
        image_metrics(mask + 0.5, mask)
    with pytest.raises(ValueError, match="target hold values other than 0 and 1"):
        image_metrics(mask, mask + 255)


def table(values) -> pd.DataFrame:
    return pd.DataFrame({name: np.asarray(values, dtype=float) for name in METRICS})


def test_summary_leaves_out_missing_values_and_counts_the_rest():
    frame = table([0.2, 0.4, 0.9]).assign(sensitivity=[np.nan, 0.4, 0.6], specificity=[np.nan, np.nan, 0.7])
    summary = summarize(frame).set_index("metric")
    assert list(summary.columns) == ["mean", "low", "high", "n"] and list(summary.index) == list(METRICS)
    assert summary.loc["iou", "n"] == 3 and summary.loc["iou", "mean"] == pytest.approx(0.5)
    assert summary.loc["sensitivity", "n"] == 2 and summary.loc["sensitivity", "mean"] == pytest.approx(0.5)
    assert summary.loc["specificity", "n"] == 1 and summary.loc["specificity", "mean"] == pytest.approx(0.7)
    assert np.isnan(summary.loc["specificity", ["low", "high"]].astype(float)).all()
    assert summarize(table([])).n.eq(0).all() and summarize(table([]))["mean"].isna().all()


def test_bootstrap_interval_of_a_large_sample_is_the_normal_one():
    values = np.random.default_rng(1).normal(0.7, 0.1, 900)
    row = summarize(table(values), resamples=4000).iloc[0]
    half = 1.96 * values.std(ddof=1) / 30
    assert row.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert row.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    narrow = summarize(table(values), level=0.5).iloc[0]
    assert row.low < narrow.low < row["mean"] < narrow.high < row.high


def test_interval_of_equal_values_has_no_width():
    row = summarize(table([0.5] * 6)).iloc[0]
    assert row.low == row.high == row["mean"] == 0.5


def test_summary_is_the_same_for_the_same_seed_only():
    frame = table(np.random.default_rng(0).random(40))
    pd.testing.assert_frame_equal(summarize(frame, seed=3), summarize(frame, seed=3))
    assert not summarize(frame, seed=3).equals(summarize(frame, seed=4))


def test_summary_names_the_missing_column():
    with pytest.raises(ValueError, match="specificity"):
        summarize(table([1, 2]).drop(columns="specificity"))
