"""Losses and segmentation metrics for one lesion class against background.

Losses take logits and are averaged over a batch; metrics take binary masks and are kept per image, never pooled over
a batch, so that intervals can be drawn over images. No model and no file is known here. No denominator carries an
added constant: where a ratio is 0/0 its value is a stated convention or NaN.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap
from torch import Tensor
from torch.nn import functional

from utils import InputError

METRICS = ("iou", "dice", "accuracy", "sensitivity", "specificity", "thresholded_jaccard")
CLASS_METRICS = ("iou", "dice", "accuracy", "class_accuracy")  # of several classes, see class_metrics
JACCARD_THRESHOLD = 0.65  # ISIC 2018 Task 1: a Jaccard index below this scores zero


def _check_pair(logits: Tensor, masks: Tensor) -> None:
    if logits.ndim != 4 or logits.shape[1] != 1 or logits.numel() == 0:
        raise InputError(f"logits have shape {tuple(logits.shape)}; a non-empty (B, 1, H, W) is needed")
    if masks.shape != logits.shape:
        raise InputError(
            f"masks have shape {tuple(masks.shape)} and logits {tuple(logits.shape)}; resize one to the other"
        )
    _check_binary("masks", masks)


def _check_binary(name: str, values: Tensor) -> None:
    if values.dtype != torch.bool and not ((values == 0) | (values == 1)).all():
        raise InputError(f"{name} hold values other than 0 and 1; threshold them first (for 8-bit masks: mask > 128)")


def _sums(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per image (B,): sum of probabilities, sum of mask, sum of their product, in pixels, at least float32."""
    precision = torch.promote_types(logits.dtype, torch.float32)  # pixel sums overflow half precision
    probabilities, target = logits.to(precision).sigmoid().flatten(1), masks.to(precision).flatten(1)
    return probabilities.sum(1), target.sum(1), (probabilities * target).sum(1)


def scaled_dice(logits: Tensor, masks: Tensor, *, smooth: float = 0.3, threshold: float = 20.0) -> Tensor:
    """The scaled Dice loss of the earlier UNet++ / Mask2Former study, for its `legacy` protocol.

    An image is small when its predicted sum P and its true sum T (pixels at the mask's resolution) are both at most
    `threshold`; it costs 2^-(2.75 threshold - P - T). The other images together cost
    log(mean of P + T over them) x (1 - (2 I + smooth) / (sum P + sum T + smooth)), I the sum of the products over all
    their pixels. The loss is the two groups' means weighted by their share of the batch; an absent group weighs 0.
    `smooth` belongs to the published definition. For a large image P + T > threshold, so with the default the
    logarithm is positive.

    logits, masks : Tensor (B, 1, H, W), masks in {0, 1}. Returns a scalar Tensor; raises InputError otherwise.
    """
    _check_pair(logits, masks)
    predicted, true, shared = _sums(logits, masks)
    total = predicted + true
    small = (predicted <= threshold) & (true <= threshold)
    large = ~small
    loss = torch.exp2(total[small] - 2.75 * threshold).sum() / len(total)  # mean x share; an empty sum is 0
    if large.any():
        dice = (2 * shared[large].sum() + smooth) / (total[large].sum() + smooth)
        share = large.to(loss.dtype).mean()
        loss = loss + share * total[large].mean().log() * (1 - dice)
    return loss


def dice_bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over images of (1 - soft Dice), plus the mean over pixels of the binary cross-entropy with logits.

    Soft Dice of an image is 2 I / (P + T) with P, T, I the sums over its pixels of the probability, the mask and
    their product. With an empty mask it is 0 for every prediction but the empty one and 0/0 there, so it teaches
    nothing: such an image's Dice term is 0 and the cross-entropy alone speaks for it. The loss of a batch is
    therefore always the mean of its images' losses.

    logits, masks : Tensor (B, 1, H, W), masks in {0, 1}. Returns a scalar Tensor; raises InputError otherwise.
    """
    _check_pair(logits, masks)
    predicted, true, shared = _sums(logits, masks)
    lesion = true > 0
    dice = 2 * shared[lesion] / (predicted + true)[lesion]
    cross_entropy = functional.binary_cross_entropy_with_logits(logits.to(predicted.dtype), masks.to(predicted.dtype))
    return (1 - dice).sum() / len(true) + cross_entropy


LOSSES = {"scaled_dice": scaled_dice, "dice_bce": dice_bce}


def image_metrics(prediction: Tensor, target: Tensor) -> dict[str, np.ndarray]:
    """The six task metrics of every image: a dict of METRICS, each float64 (B,).

    Empty against empty scores Jaccard and Dice 1 (nothing was there and nothing was found). Sensitivity of an image
    without lesion and specificity of one without background do not exist and are NaN. The thresholded Jaccard is 0
    below 0.65 and the Jaccard index from there on.

    prediction, target : Tensor (B, 1, H, W) or (B, H, W), the same for both, bool or {0, 1}. InputError otherwise.
    """
    if prediction.shape != target.shape:
        raise InputError(f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}")
    if prediction.ndim not in (3, 4) or (prediction.ndim == 4 and prediction.shape[1] != 1):
        raise InputError(f"masks have shape {tuple(prediction.shape)}; (B, 1, H, W) or (B, H, W) is needed")
    _check_binary("prediction", prediction)
    _check_binary("target", target)
    found, truth = prediction.bool().flatten(1), target.bool().flatten(1)

    def count(pixels: Tensor) -> np.ndarray:
        return pixels.sum(1).double().cpu().numpy()

    hit, miss, alarm, rest = (count(x) for x in (found & truth, ~found & truth, found & ~truth, ~found & ~truth))
    iou = _ratio(hit, hit + miss + alarm, if_undefined=1.0)
    return {
        "iou": iou,
        "dice": _ratio(2 * hit, 2 * hit + miss + alarm, if_undefined=1.0),
        "accuracy": _ratio(hit + rest, hit + miss + alarm + rest),
        "sensitivity": _ratio(hit, hit + miss),
        "specificity": _ratio(rest, rest + alarm),
        "thresholded_jaccard": np.where(iou < JACCARD_THRESHOLD, 0.0, iou),
    }


def _ratio(part: np.ndarray, whole: np.ndarray, if_undefined: float = np.nan) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), if_undefined), where=whole > 0)


def summarize(frame: pd.DataFrame, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Mean over images and percentile bootstrap interval of each metric: columns metric, mean, low, high, n.

    frame : one row an image, with the columns METRICS, or those of several classes (others are ignored). NaN values (an
    image for which the metric does not exist) are left out, and n says how many counted; below two the interval is NaN.
    Each metric draws from the same seed, so metrics that exist for all images share their resamples.
    """
    metrics = CLASS_METRICS if "class_accuracy" in frame.columns else METRICS
    missing = [name for name in metrics if name not in frame.columns]
    if missing:
        raise InputError(f"the table of per-image metrics lacks the columns {missing}; make it with image_metrics")
    rows = []
    for name in metrics:
        values = frame[name].to_numpy(dtype=np.float64)
        values = values[~np.isnan(values)]
        low, high = _interval(values, level, resamples, seed)
        mean = values.mean() if len(values) else np.nan
        rows.append({"metric": name, "mean": mean, "low": low, "high": high, "n": len(values)})
    return pd.DataFrame(rows)


def _interval(values: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    if len(values) < 2:
        return np.nan, np.nan
    result = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=256,  # bounds memory at 256 x n values
        vectorized=True,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
