"""What of a model's answer is explained: small callables from (model, images) to one number an image, with gradients.

A class logit for classifiers, the summed logit inside a mask for segmentation models. How the number is attributed to
pixels is in `attributions`; nothing here looks at gradients or at pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from answers import LESION, decided, pixel_logits
from similarity.hooks import quiet
from utils import InputError

WHICH = ("true", "predicted")


@dataclass(frozen=True)
class Target:
    """One number for every image; `target(model, images)` gives them, (B,) float64.

    name : what it is, in words, kept beside every explanation of it
    score : (model, images (N, 3, H, W), rows (N,)) -> (N,); `rows` say which of the explained images each of the N
        pictures was made from, so that a picture with a part covered is asked about the same class and the same mask
    count : so many images it was made for; None when it does not matter
    """

    name: str
    score: Callable[[nn.Module, Tensor, Tensor], Tensor]
    count: int | None = None

    def __call__(self, model: nn.Module, images: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is None:
            self.check(len(images))
            rows = torch.arange(len(images))
        scores = self.score(model, images, rows.to(images.device))
        if scores.shape != (len(images),):
            raise InputError(
                f"target {self.name!r} gives numbers of shape {tuple(scores.shape)} for {len(images)} images; "
                "it must give one an image"
            )
        return scores.double()

    def check(self, images: int) -> None:
        """Refuse another number of images than it was made for."""
        if self.count not in (None, images):
            raise InputError(f"target {self.name!r} was made for {self.count} images, and {images} are to be explained")


def class_logit(index: int | Sequence[int] | Tensor) -> Target:
    """The logit of a class by a classifier that answers (B, K): one class for all images, or one for each of them."""
    classes = torch.as_tensor(index)
    if classes.is_floating_point() or classes.ndim > 1 or classes.numel() == 0:
        raise InputError(f"a class is a whole number, or one for every image; got {index!r}")
    several = classes.ndim == 1

    def score(model: nn.Module, images: Tensor, rows: Tensor) -> Tensor:
        logits = _class_answer(model, images)
        wanted = classes.to(rows.device)[rows] if several else classes.to(rows.device).expand(len(rows))
        _refuse_class(wanted, logits.shape[1], rows)
        return logits.gather(1, wanted[:, None].long())[:, 0]

    name = "logit of each image's own class" if several else f"logit of class {int(classes)}"
    return Target(name, score, len(classes) if several else None)


def _class_answer(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise InputError(
            f"class_logit needs a classifier that answers (images, classes), and this model answers {shape}; "
            "for a segmentation model use masked_logit"
        )
    return logits


def _refuse_class(wanted: Tensor, known: int, rows: Tensor) -> None:
    outside = ((wanted < 0) | (wanted >= known)).nonzero()[:, 0].tolist()
    if outside:
        raise InputError(
            f"class {int(wanted[outside[0]])} (image in row {int(rows[outside[0]])}) is out of range: the model has "
            f"{known} classes, numbered from 0 to {known - 1}"
        )


def masked_logit(masks: Tensor, label: int | None = None, *, which: str, ids: Sequence[str] | None = None) -> Target:
    """The sum over a mask's pixels of the lesion logit, or of a class's, by a segmentation model.

    masks : (B, 1, H, W) of {0, 1} or bool, at the images' size; a true one of classes is `classes == label`
    label : the class, for models of several; a model of one lesion logit needs none
    which : 'true' or 'predicted' (see `predicted_masks`): whose mask this is, stated in the target's name
    ids : of the images, for error messages

    The sum (not the mean) follows the definition in use for Grad-CAM of segmentation (Vinogradova et al. 2020, eq. 2);
    the masks stay as given when pixels are covered: a predicted mask is that of the whole image.
    """
    inside = _checked_masks(masks, which, ids)

    def score(model: nn.Module, images: Tensor, rows: Tensor) -> Tensor:
        if images.shape[-2:] != inside.shape[-2:]:
            raise InputError(f"masks of {tuple(inside.shape[-2:])} pixels, images of {tuple(images.shape[-2:])}")
        logits = _logit_of(_pixel_answer(model, images), label)
        return (logits.double() * inside.to(images.device)[rows]).sum((1, 2))

    what = "lesion logit" if label is None else f"logit of class {label}"
    return Target(f"summed {what} inside the {which} mask", score, len(inside))


def _pixel_answer(model: nn.Module, images: Tensor) -> Tensor:
    handle = model.register_forward_hook(_refuse_classifier)
    try:
        return pixel_logits(model, images)
    finally:
        handle.remove()


def _refuse_classifier(model: nn.Module, _inputs: tuple, output: object) -> None:
    maps = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(maps, Tensor) and maps.ndim != 4:
        raise InputError(
            f"a mask needs a segmentation model, and {type(model).__name__} answers {tuple(maps.shape)}; for a "
            "classifier use class_logit"
        )


def _checked_masks(masks: Tensor, which: str, ids: Sequence[str] | None) -> Tensor:
    """(B, H, W) bool."""
    if which not in WHICH:
        raise InputError(f"which mask it is must be said: 'true' or 'predicted', not {which!r}")
    if not isinstance(masks, Tensor) or masks.ndim != 4 or masks.shape[1] != 1:
        shape = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise InputError(f"masks must be (images, 1, height, width), got {shape}")
    if not ((masks == 0) | (masks == 1)).all():
        raise InputError("masks must be of 0 and 1; of class indices give `masks == label`")
    if ids is not None and len(ids) != len(masks):
        raise InputError(f"{len(ids)} ids for {len(masks)} masks; give one id for every mask")
    empty = (~masks.flatten(1).any(1)).nonzero()[:, 0].tolist()
    if empty:
        names = ", ".join(f"row {row}" if ids is None else repr(ids[row]) for row in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise InputError(
            f"the {which} mask is empty for {names}{more}: there is nothing to sum; leave these images out"
        )
    return masks[:, 0].bool()


def _logit_of(logits: Tensor, label: int | None) -> Tensor:
    """(N, H, W) of the one label, from the model's own (N, 1 or C, H, W)."""
    known = logits.shape[1]
    if known == 1:
        if label not in (None, LESION):
            raise InputError(f"the model has one lesion logit, and label {label} was asked for; leave the label out")
        return logits[:, 0]
    if label is None or not 0 <= label < known:
        raise InputError(f"the model has {known} classes, and label {label} is none of 0 to {known - 1}; give a label")
    return logits[:, label]


def predicted_masks(model: nn.Module, images: Tensor, label: int | None = None, *, batch: int = 16) -> Tensor:
    """Where the model itself sees lesion, or a label: (B, 1, H, W) bool on the CPU, in eval mode."""
    found = []
    with quiet(model), torch.no_grad():
        for part in images.split(batch):
            logits = _pixel_answer(model, part.to(device_of(model)))
            _logit_of(logits, label)  # refuses a label that the model does not have
            found.append((decided(logits) == (LESION if label is None else label)).cpu())
    return torch.cat(found)


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes; the CPU for one without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
