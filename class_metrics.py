"""Losses and segmentation metrics for several classes, the siblings of the binary ones in `loss_metrics`.

A loss takes logits and is averaged over a batch; scores are kept per image. Everything that is pooled over pixels of
many images is read from confusion matrices (rows true, columns predicted, in pixels), which are kept per image too, so
that intervals can be drawn over images. Masks hold a class index a pixel, `IGNORE` where a pixel does not count. No
model and no file is known here. No denominator carries an added constant: what is 0/0 is NaN, or left out of a mean
over the classes that occur, as each function says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from utils import InputError

IGNORE = 255  # the index of pixels that do not count, in any mask
FEWEST_CLASSES = 2


def ce_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy over counted pixels, plus the mean over images of (1 − soft Dice of the classes present).

    Soft Dice of class c in an image is 2 I / (P + T), with P, T, I the sums over the image's counted pixels of the
    class's softmax probability, of its mask and of their product; an image's Dice part is the mean of 1 − Dice over the
    classes that its mask holds. An absent class has Dice 0 for every prediction but the perfect one, where it is 0/0;
    it teaches nothing through Dice, and the cross-entropy alone speaks for it. The cross-entropy is a mean over the
    counted pixels of the batch, so images with many ignored pixels weigh less in it.

    logits : Tensor (B, C, H, W). masks : int64 Tensor (B, 1, H, W) of class indices, 255 = ignored. Returns a scalar
    Tensor, at least float32; InputError for other shapes, for an index outside the classes, or when an image has no
    counted pixel.
    """
    target = _check_logits(logits, masks)
    counted = target != IGNORE
    _refuse_uncounted(counted)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # pixel sums overflow half precision
    cross_entropy = functional.cross_entropy(logits, target, ignore_index=IGNORE)
    index = target.where(counted, 0)[:, None]
    truth = torch.zeros_like(logits).scatter_(1, index, 1.0) * counted[:, None]
    probabilities = logits.softmax(1) * counted[:, None]
    predicted, true, shared = (x.flatten(2).sum(2) for x in (probabilities, truth, probabilities * truth))
    present = true > 0
    dice = 2 * shared[present] / (predicted + true)[present]
    weight = present.to(logits.dtype)  # of each class in the batch's mean
    share = (weight / weight.sum(1, keepdim=True) / len(weight))[present]
    return ((1 - dice) * share).sum() + cross_entropy


def _check_logits(logits: Tensor, masks: Tensor) -> Tensor:
    """The masks as (B, H, W) int64, once they fit the logits."""
    if logits.ndim != 4 or logits.shape[1] < FEWEST_CLASSES or logits.numel() == 0:
        raise InputError(
            f"logits have shape {tuple(logits.shape)}; a non-empty (B, C, H, W) of at least {FEWEST_CLASSES} classes "
            "is needed (for one lesion logit a pixel use dice_bce)"
        )
    if masks.shape != (len(logits), 1, *logits.shape[2:]):
        raise InputError(
            f"masks have shape {tuple(masks.shape)} and logits {tuple(logits.shape)}; masks must be (B, 1, H, W) of "
            "the same images and sides: resize one to the other"
        )
    return _check_indices("masks", masks[:, 0], logits.shape[1])


def _refuse_uncounted(counted: Tensor) -> None:
    empty = (~counted.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"image number {empty[0]} of the batch (from 0) has no counted pixel: all are {IGNORE}, and no loss can be "
            "computed from it; leave such images out of the training set"
        )


def _check_indices(name: str, values: Tensor, classes: int, counted: Tensor | None = None) -> Tensor:
    """The values as int64, once those that count are a class index (or, in a mask, IGNORE)."""
    if values.is_floating_point() or values.is_complex():
        raise InputError(f"{name} are {values.dtype}; class indices are integers: convert them with .long()")
    values = values.long()
    wrong = (values < 0) | (values >= classes)
    wrong &= values != IGNORE if counted is None else counted
    if wrong.any():
        raise InputError(
            f"{name} hold the value {int(values[wrong][0])}, outside the classes 0 to {classes - 1}"
            f"{f' and {IGNORE} (ignored)' if counted is None else ''}; check the number of classes"
        )
    return values


# ---- confusion matrices -----------------------------------------------------------------------------------------


def image_confusions(prediction: Tensor, target: Tensor, classes: int) -> np.ndarray:
    """Each image's confusion matrix, int64 (B, C, C) in pixels, rows true and columns predicted class.

    prediction, target : integer or bool Tensor (B, H, W) or (B, 1, H, W), the same for both; target 255 is ignored,
    whatever is predicted there. InputError otherwise, or for an index outside the classes.
    """
    if not FEWEST_CLASSES <= classes <= IGNORE:
        raise InputError(f"{classes} classes were asked for; {FEWEST_CLASSES} to {IGNORE} can be told apart")
    if prediction.shape != target.shape:
        raise InputError(f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}")
    if target.ndim not in (3, 4) or (target.ndim == 4 and target.shape[1] != 1) or target.numel() == 0:
        raise InputError(f"masks have shape {tuple(target.shape)}; a non-empty (B, 1, H, W) or (B, H, W) is needed")
    truth = _check_indices("target", target, classes).flatten(1)
    counted = truth != IGNORE
    found = _check_indices("prediction", prediction.flatten(1), classes, counted)
    image = torch.arange(len(truth), device=truth.device)[:, None].expand_as(truth)
    cell = (image * classes + truth) * classes + found
    counts = torch.bincount(cell[counted], minlength=len(truth) * classes * classes)
    return counts.reshape(len(truth), classes, classes).cpu().numpy()


def class_scores(prediction: Tensor, target: Tensor, classes: int) -> dict[str, np.ndarray]:
    """Four scores of every image, each float64 (B,); NaN for an image without a counted pixel.

    'iou' and 'dice' are means over the classes present in the prediction or in the target (a class in neither is not
    counted as found); 'accuracy' is the share of pixels; 'class_accuracy' is the mean over the classes present in the
    target of the share of their pixels that was found. Arguments as of `image_confusions`.
    """
    matrices = image_confusions(prediction, target, classes)
    hit, true, found = _sums(matrices)
    return {
        "iou": _mean_defined(_ratio(hit, true + found - hit)),
        "dice": _mean_defined(_ratio(2 * hit, true + found)),
        "accuracy": _ratio(hit.sum(-1), true.sum(-1)),
        "class_accuracy": _mean_defined(_ratio(hit, true)),
    }


def _sums(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of matrices (..., C, C), for each class (..., C): pixels that agree, true pixels, predicted pixels."""
    return np.diagonal(matrices, axis1=-2, axis2=-1), matrices.sum(-1), matrices.sum(-2)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the values that are not NaN; NaN where all are."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(-1), defined.sum(-1))


def from_confusion(matrix: np.ndarray, names: Sequence[str] | None = None) -> pd.DataFrame:
    """One row a class of a confusion matrix (C, C): columns class, iou, accuracy, precision, pixels.

    iou is NaN for a class that is neither in the masks nor predicted, accuracy (the share of the class's pixels that
    was found, its recall) for one that is not in the masks, precision for one that is never predicted. pixels are the
    true ones. `names` of the classes in order; their numbers without it.
    """
    matrix = _check_matrix(matrix)
    names = list(range(len(matrix))) if names is None else list(names)
    if len(names) != len(matrix):
        raise InputError(f"{len(names)} class names for a confusion matrix of {len(matrix)} classes; give one a class")
    hit, true, found = _sums(matrix)
    columns = {"iou": _ratio(hit, true + found - hit), "accuracy": _ratio(hit, true), "precision": _ratio(hit, found)}
    return pd.DataFrame({"class": names} | columns | {"pixels": true.astype(np.int64)})


def mean_iou(matrix: np.ndarray) -> float:
    """Mean IoU over the classes that are in the masks or predicted, of a matrix (C, C); NaN of an empty matrix."""
    hit, true, found = _sums(_check_matrix(matrix))
    return float(_mean_defined(_ratio(hit, true + found - hit)))


def mean_class_accuracy(matrix: np.ndarray) -> float:
    """Mean recall over the classes that are in the masks, of a matrix (C, C); NaN of an empty matrix."""
    hit, true, _ = _sums(_check_matrix(matrix))
    return float(_mean_defined(_ratio(hit, true)))


def _check_matrix(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < FEWEST_CLASSES:
        raise InputError(f"a confusion matrix is square, classes × classes; this one has shape {matrix.shape}")
    if not (matrix >= 0).all():  # NaN is refused here, too
        raise InputError("a confusion matrix counts pixels; this one holds negative numbers or NaN")
    return matrix


# ---- over images ------------------------------------------------------------------------------------------------


def confusion_table(ids: Sequence[str], confusions: np.ndarray) -> pd.DataFrame:
    """Per-image matrices (n, C, C) as a long table: columns id, true, predicted, pixels, C² rows an image."""
    confusions = _check_confusions(confusions)
    ids = list(ids)
    if len(ids) != len(confusions) or len(set(ids)) != len(ids):
        raise InputError(
            f"{len(ids)} ids, {len(set(ids))} of them different, for {len(confusions)} confusion matrices; each image "
            "needs an id of its own"
        )
    image, true, predicted = np.indices(confusions.shape).reshape(3, -1)
    columns = {"id": np.array(ids, dtype=object)[image], "true": true, "predicted": predicted}
    return pd.DataFrame(columns | {"pixels": confusions.ravel()})


def confusions_of(table: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """(ids, matrices (n, C, C)) of a table that `confusion_table` made, in the order in which the ids first appear."""
    missing = [name for name in ("id", "true", "predicted", "pixels") if name not in table.columns]
    if missing or table.empty:
        raise InputError(f"the confusion table is empty or lacks columns {missing}; make it with confusion_table")
    numbers, ids = pd.factorize(table["id"])
    classes = int(table[["true", "predicted"]].to_numpy().max()) + 1
    places = (numbers, table["true"].to_numpy(), table["predicted"].to_numpy())
    if len(table) != len(ids) * classes**2 or table.duplicated(["id", "true", "predicted"]).any():
        raise InputError(
            f"the confusion table has {len(table)} rows for {len(ids)} images of {classes} classes; each image needs "
            f"one row for each of the {classes**2} pairs of classes"
        )
    confusions = np.zeros((len(ids), classes, classes), dtype=np.int64)
    confusions[places] = table["pixels"]
    return list(ids), confusions


def _check_confusions(confusions: np.ndarray) -> np.ndarray:
    confusions = np.asarray(confusions)
    if confusions.ndim != 3 or len(confusions) == 0 or confusions.shape[1] != confusions.shape[2]:
        raise InputError(f"confusion matrices have shape {confusions.shape}; (images, classes, classes) is needed")
    return confusions
