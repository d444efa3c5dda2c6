"""Statistics of a lesion in its image: how large, where, how elongated, how much its colour stands out at the border.

Of masks and display values alone, in the long tables of `image_statistics`: NaN and a reason where a statistic does
not exist. All pixels of a mask are one lesion, connected or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import ndimage
from torch import Tensor

from processing.image_statistics import Values, all_exist, checked_images, long_table, one_by_one
from utils import InputError

BAND = 0.05  # of the shorter side: how far from the border colours are averaged, on either side of it
EMPTY = "the mask is empty"


def lesion_statistics(masks: Tensor, images: Tensor, ids: Sequence[str], *, band: float = BAND) -> pd.DataFrame:
    """Six statistics of every lesion, in long form: id, statistic, value, reason.

    masks : (B, 1, H, W) of 0 and 1; images : (B, 3, H, W) RGB display values in [0, 1], of the same pixels
    area_share : share of the image's pixels, 0 where the mask is empty
    centre_x, centre_y : centroid as a share of the width (from the left) and height (from the top)
    centre_distance : pixels from the image's centre to the centroid, over half the diagonal: 0 to 1
    elongation : longer over shorter principal axis by second moments, see `elongation`; at least 1
    border_contrast : difference of mean colours inside and outside the border, see `border_contrast`; 0 to √3
    """
    pixels = checked_images(images, ids)
    lesions = _checked_masks(masks, images, ids)
    reach = _reach(band, lesions.shape[1:])
    x, y, distance = (one_by_one(statistic, lesions) for statistic in (_centre_x, _centre_y, _centre_distance))
    values = {
        "area_share": all_exist(lesions.mean((1, 2))),
        "centre_x": x,
        "centre_y": y,
        "centre_distance": distance,
        "elongation": one_by_one(elongation, lesions),
        "border_contrast": _border_contrasts(lesions, pixels, reach),
    }
    return long_table(ids, values)


def _reach(band: float, shape: tuple[int, int]) -> float:
    """The band's width in pixels."""
    reach = band * min(shape)
    if not 1 <= reach <= min(shape):
        raise InputError(
            f"a band of {band} of the shorter side is {reach:.2g} of {min(shape)} pixels; give one of at least 1 pixel "
            "and at most 1.0"
        )
    return reach


def centroid(mask: np.ndarray) -> np.ndarray:
    """(y, x) of a mask (H, W) that is not empty, in pixels from the image's upper left corner: pixel 0 is at 0.5."""
    return np.argwhere(mask).mean(0) + 0.5


def _centre_x(mask: np.ndarray) -> float | str:
    return float(centroid(mask)[1] / mask.shape[1]) if mask.any() else EMPTY


def _centre_y(mask: np.ndarray) -> float | str:
    return float(centroid(mask)[0] / mask.shape[0]) if mask.any() else EMPTY


def _centre_distance(mask: np.ndarray) -> float | str:
    half = np.array(mask.shape) / 2
    return float(np.linalg.norm(centroid(mask) - half) / np.linalg.norm(half)) if mask.any() else EMPTY


def elongation(mask: np.ndarray) -> float | str:
    """√(λ₁/λ₂) of the second central moments of a mask (H, W), or why there is none; a/b of an ellipse's half axes.

    A pixel is a unit square, which has moments 1/12 about its own centre: so an a × b rectangle has exactly a/b, and
    a line one pixel wide a number.
    """
    if not mask.any():
        return EMPTY
    places = np.argwhere(mask) - centroid(mask) + 0.5
    moments = places.T @ places / len(places) + np.eye(2) / 12
    shorter, longer = np.linalg.eigvalsh(moments)
    return float(np.sqrt(longer / shorter))


def _border_contrasts(lesions: np.ndarray, pixels: np.ndarray, reach: float) -> Values:
    return one_by_one(lambda mask, image: border_contrast(mask, image, reach), lesions, pixels)


def border_contrast(mask: np.ndarray, image: np.ndarray, reach: float) -> float | str:
    """‖mean RGB inside − mean RGB outside‖ over the pixels within `reach` pixels of the border, or why there is none.

    mask : (H, W) bool; image : (3, H, W). A pixel's distance is that to the nearest pixel centre of the other side, so
    those that touch the border are 1 away; the image's own border is none.
    """
    if not mask.any():
        return EMPTY
    if mask.all():
        return "the mask fills the image: there is nothing outside"
    inside = mask & (ndimage.distance_transform_edt(mask) <= reach)
    outside = ~mask & (ndimage.distance_transform_edt(~mask) <= reach)
    return float(np.linalg.norm(image[:, inside].mean(1) - image[:, outside].mean(1)))


def _checked_masks(masks: Tensor, images: Tensor, ids: Sequence[str]) -> np.ndarray:
    """(B, H, W) of bool, or InputError."""
    wanted = (len(images), 1, *images.shape[2:])
    if tuple(masks.shape) != wanted:
        raise InputError(f"masks must be {wanted}, as the images are; got {tuple(masks.shape)}")
    values = masks.detach().cpu().numpy()
    other = ~((values == 0) | (values == 1)).all((1, 2, 3))
    if other.any():
        raise InputError(
            f"{other.sum()} of {len(values)} masks, the first that of {ids[int(other.argmax())]!r}, hold values other "
            "than 0 and 1; give one lesion's mask, without probabilities or class numbers"
        )
    return values[:, 0] == 1
