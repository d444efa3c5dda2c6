"""Images as explanations need them: checked, with a baseline for what is missing, cut into features, partly covered.

It knows no model and no method. A picture is an image whose pixels are its own where `keep` is true and the baseline's
elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from utils import InputError

BASELINES = ("mean", "blur", "blur:σ")
BLUR = 1 / 10  # of the shorter side: σ of 'blur'

Baseline = str | Tensor


def checked_images(images: Tensor) -> Tensor:
    """Refuse what is no batch of images (B, 3, H, W) in [0, 1]."""
    if isinstance(images, Sequence) and not isinstance(images, str):
        sizes = sorted({tuple(image.shape[-2:]) for image in images if isinstance(image, Tensor)})
        raise InputError(f"images of sizes {sizes} in a list; resize them to one size and give one tensor (B, 3, H, W)")
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        what = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images must be float (batch, 3, height, width) in [0, 1], got {what}")
    if not len(images):
        raise InputError("there is no image to explain")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # nan fails, too
        raise InputError(
            f"images must lie in [0, 1], got {low:.3g} to {high:.3g}: the models normalise their input themselves"
        )
    return images.detach()


def baseline_images(images: Tensor, baseline: Baseline) -> tuple[Tensor, str]:
    """(what stands where an image (B, 3, H, W) is missing, of the same shape; the same in words).

    baseline : 'mean' (each image's mean colour), 'blur' or 'blur:σ' (Gaussian, σ in pixels; a tenth of the shorter side
        when not said), or a Tensor: one colour (3,), one picture (3, H, W), or one for every image
    """
    if isinstance(baseline, Tensor):
        return _given(images, baseline)
    if baseline == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images), "mean colour of the image"
    kind, _, width = str(baseline).partition(":")
    if kind != "blur" or not (baseline == "blur" or _positive(width)):
        raise InputError(f"unknown baseline {baseline!r}; choose from {', '.join(BASELINES)}, or give a tensor")
    sides = images.shape[-2:]
    sigma = float(width) if width else BLUR * min(sides)
    # three σ to each side, no further than reflection at the border reaches
    kernel = [2 * min(int(3 * sigma + 0.5), side - 1) + 1 for side in reversed(sides)]
    return gaussian_blur(images, kernel, [sigma, sigma]), f"image blurred by a Gaussian of σ = {sigma:g} px"


def _given(images: Tensor, baseline: Tensor) -> tuple[Tensor, str]:
    if not baseline.is_floating_point() or not baseline.isfinite().all():
        raise InputError(
            "a baseline given as a tensor must be of finite floating point numbers, in [0, 1] as images are"
        )
    given = baseline.to(images).detach()
    if given.shape == (3,):
        colour = ", ".join(f"{value:.3g}" for value in given.tolist())
        return given[:, None, None].expand_as(images), f"one colour ({colour})"
    if given.shape == images.shape:
        return given, "a picture given for each image"
    if given.shape == images.shape[1:]:
        return given.expand_as(images), "one given picture"
    raise InputError(
        f"a baseline of shape {tuple(given.shape)} fits no images {tuple(images.shape)}; give (3,), (3, H, W) or theirs"
    )


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def grid(cells: int, height: int, width: int) -> Tensor:
    """The number of every pixel's cell, row by row, (height, width) int64; cells' sides differ by a pixel at most."""
    if not 1 <= cells <= min(height, width):
        raise InputError(f"a grid of {cells} × {cells} cells does not fit images of {height} × {width} pixels")
    down, across = (torch.arange(side) * cells // side for side in (height, width))
    return down[:, None] * cells + across


def features_of(features: int | Tensor, images: Tensor) -> Tensor:
    """The number of every pixel's feature, (B, H, W) int64, from a grid's cells a side or from a map of superpixels.

    A map is (H, W) or (B, H, W); its numbers run from 0 without a gap, in each image for itself.
    """
    count, _, height, width = images.shape
    if isinstance(features, bool) or not isinstance(features, int | Tensor):
        raise InputError(f"features are a number of cells a side, or a map of whole numbers; got {features!r}")
    if isinstance(features, int):
        return grid(features, height, width).expand(count, -1, -1).to(images.device)
    if features.is_floating_point() or features.shape not in ((height, width), (count, height, width)):
        raise InputError(
            f"a map of features must be of whole numbers, ({height}, {width}) or ({count}, {height}, {width}), "
            f"got {tuple(features.shape)} {features.dtype}"
        )
    features = features.long().expand(count, -1, -1).to(images.device)
    for row, each in enumerate(features):
        found = each.unique()
        if not torch.equal(found, torch.arange(len(found), device=found.device)):
            raise InputError(
                f"the features of the image in row {row} are numbered {found[0]} to {found[-1]} with "
                f"{len(found)} in use; number them from 0 without a gap"
            )
    return features


def counts_of(features: Tensor) -> list[int]:
    """How many features each image has, from (B, H, W)."""
    return (features.flatten(1).amax(1) + 1).tolist()


def spread(values: Tensor, features: Tensor) -> Tensor:
    """Each feature's value, (B, F), shared evenly by its pixels: maps (B, H, W) that sum to what the values sum to."""
    flat = features.flatten(1).to(values.device)
    sizes = torch.zeros_like(values).scatter_add_(1, flat, torch.ones_like(flat, dtype=values.dtype))
    return (values.gather(1, flat) / sizes.gather(1, flat)).view(features.shape)


def partly(images: Tensor, missing: Tensor, keep: Tensor) -> Tensor:
    """Pictures (N, 3, H, W): the image where `keep` (N, H, W) is true, `missing` elsewhere."""
    return torch.where(keep[:, None], images, missing)


def covered(images: Tensor, masks: Tensor, *, baseline: Baseline = "outside", box: bool = False) -> tuple[Tensor, str]:
    """(images whose object, masks (B, 1, H, W), is covered by a baseline; how, in words).

    baseline : 'outside' (the mean colour of the rest of the image), or as in `baseline_images`, whose mean colour and
        blur still hold something of the object
    box : cover the mask's bounding box, so that its outline does not show either
    """
    images = checked_images(images)
    if not isinstance(masks, Tensor) or masks.shape != (len(images), 1, *images.shape[-2:]):
        raise InputError(f"masks must be {(len(images), 1, *images.shape[-2:])}, one for every image")
    hidden = masks[:, 0].to(images.device) > 0.5
    _refuse_rows(~hidden.flatten(1).any(1), "has an empty mask: there is nothing to cover")
    hidden = boxes(hidden) if box else hidden
    missing, words = _outside(images, hidden) if baseline == "outside" else baseline_images(images, baseline)
    return torch.where(hidden[:, None], missing, images), f"{'box' if box else 'mask'} covered by: {words}"


def _outside(images: Tensor, hidden: Tensor) -> tuple[Tensor, str]:
    rest = (~hidden).sum((1, 2))
    _refuse_rows(rest == 0, "is covered whole, so there is no colour outside; use another baseline")
    colour = (images * ~hidden[:, None]).sum((2, 3)) / rest[:, None]
    return colour[:, :, None, None].expand_as(images), "mean colour outside"


def boxes(hidden: Tensor) -> Tensor:
    """The bounding box of each (H, W) of (B, H, W) bool, filled."""
    down, across = (_between(hidden.any(axis)) for axis in (2, 1))
    return down[:, :, None] & across[:, None, :]


def _between(used: Tensor) -> Tensor:
    """(B, n): true from the first true to the last."""
    counts = used.long()
    return (counts.cumsum(1) > 0) & (counts.flip(1).cumsum(1).flip(1) > 0)


def _refuse_rows(bad: Tensor, why: str) -> None:
    rows = bad.nonzero()[:, 0].tolist()
    if rows:
        raise InputError(f"the image in row {rows[0]} {why} ({len(rows)} of {len(bad)} images)")
