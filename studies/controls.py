"""Controls and regions: what of two models' similarity is the images' own, and in which part of the image it lies.

Controls are recordings without a model (raw pixels, shape of the lesion's mask, mean colour), to be compared with sites
like any other, or regressed out (`similarity.deconfounding`). Regions are weights for a grid's cells, from the mask
(`similarity.regions`). Both describe the data set's images as they are, without augmentation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from dataset import SegmentationDataset
from similarity import Recording, Site
from utils import InputError, progress

SIDE = 16  # cells of the raw-pixel control, in each direction
SHAPE = ("area", "centroid x", "centroid y", "elongation", "orientation cos", "orientation sin")


def control_recordings(dataset: SegmentationDataset) -> Recording:
    """The three controls as sites of one recording under 'gap', part 'control', float64, with the data's fingerprint.

    'raw pixels' : (n, 768) the image area-resized to 16 × 16 cells of R, G, B in [0, 1]
    'mask' : (n, 6) `mask_shape`, each column with mean 0 and standard deviation 1 over these images, so that no unit
        dominates; a column that does not vary over them is 0 and so takes no part
    'mean colour' : (n, 3) mean R, G, B in [0, 1]

    Images with an empty mask have no centroid and are refused by name: leave them out of the data set.
    """
    pixels, shapes, colours, empty = [], [], [], []
    for image, picture, mask in _images(dataset, "controls"):
        if not mask.any():
            empty.append(image)
            continue
        pixels.append(area_resized(picture, SIDE))
        shapes.append(mask_shape(mask))
        colours.append(picture.mean((1, 2)))
    if empty:
        raise InputError(
            f"{len(empty)} images have an empty mask, which has no centroid: {', '.join(empty[:5])}"
            f"{', …' if len(empty) > 5 else ''}; leave them out of the data set"
        )
    features = {
        "raw pixels": np.stack(pixels).reshape(len(pixels), -1),
        "mask": standardised(np.stack(shapes)),
        "mean colour": np.stack(colours),
    }
    tensors = {name: torch.from_numpy(values) for name, values in features.items()}
    sites = [Site(name, ("batch", "channel"), part="control", shape=X.shape[1:]) for name, X in tensors.items()]
    return Recording(tensors, dataset.ids, sites, "gap", "controls", dataset.fingerprint)


def with_lesion(dataset: SegmentationDataset) -> SegmentationDataset:
    """The same data set without the images whose mask is empty, which have no shape; itself where there are none."""
    kept = [index for index in range(len(dataset)) if dataset.pixels(index)[..., 3].any()]
    if len(kept) == len(dataset):
        return dataset
    print(f"note: {len(dataset) - len(kept)} images without lesion are left out of controls and deconfounding")
    smaller = copy.copy(dataset)
    smaller.__dict__.pop("fingerprint", None)  # of the images that were there
    smaller.pairs, smaller.files = ([items[index] for index in kept] for items in (dataset.pairs, dataset.files))
    return smaller


def region_weights(dataset: SegmentationDataset, g: int) -> dict[str, dict[str, np.ndarray]]:
    """{region: {id: weights (g·g,)}} of a grid's cells, row by row, for `similarity.regions.pooled`.

    With s the lesion's share of the cell: 'inside' s, 'outside' 1 − s, 'border' 4s(1 − s), which is 1 where the
    outline halves the cell. Cells are the same as those of policy 'grid:g'. An image without lesion has no inside.
    """
    weights: dict[str, dict[str, np.ndarray]] = {"inside": {}, "outside": {}, "border": {}}
    for image, _, mask in _images(dataset, "regions"):
        share = area_resized(mask[None].astype(np.float64), g).ravel()
        weights["inside"][image] = share
        weights["outside"][image] = 1 - share
        weights["border"][image] = 4 * share * (1 - share)
    return weights


def mask_shape(mask: np.ndarray) -> np.ndarray:
    """`SHAPE` of a mask (height, width) that is not empty: (6,).

    Area as a share of the image; centroid in image widths and heights from the upper left; elongation √(λ₁/λ₂) ≥ 1 of
    the second central moments' eigenvalues, for an ellipse the ratio of its axes; cos 2θ and sin 2θ of the longest
    axis, θ from x to y (y down). Pixels are squares, so each adds 1/12 to its own moments, and λ₂ is never 0. A mask
    without a longest axis (moments equal to rounding, as of a disc) has (0, 0), the mean of all directions.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise InputError("an empty mask has no shape; leave the image out")
    x, y = columns + 0.5, rows + 0.5
    xx, yy, xy = x.var() + 1 / 12, y.var() + 1 / 12, ((x - x.mean()) * (y - y.mean())).mean()
    length, total = np.hypot(xx - yy, 2 * xy), xx + yy  # λ₁ − λ₂ and λ₁ + λ₂
    elongation = np.sqrt((total + length) / (total - length))
    direction = (0.0, 0.0) if length <= 1e-12 * total else ((xx - yy) / length, 2 * xy / length)
    height, width = mask.shape
    return np.array([len(rows) / mask.size, x.mean() / width, y.mean() / height, elongation, *direction])


def standardised(columns: np.ndarray) -> np.ndarray:
    """(n, p) columns with mean 0 and standard deviation 1 over the rows; one that varies by rounding only is 0."""
    centred, spread = columns - columns.mean(0), columns.std(0)
    varies = np.ptp(columns, axis=0) > 32 * np.finfo(np.float64).eps * np.abs(columns).max(0)
    return np.divide(centred, spread, out=np.zeros_like(centred), where=varies)


def area_resized(maps: np.ndarray, cells: int) -> np.ndarray:
    """(channel, height, width) -> means over cells (channel, cells, cells) as policy 'grid:g' makes them, float64."""
    if not 1 <= cells <= min(maps.shape[1:]):
        raise InputError(
            f"images of {maps.shape[1]} × {maps.shape[2]} pixels have no {cells} × {cells} cells of their own"
        )
    return adaptive_avg_pool2d(torch.from_numpy(maps)[None], cells)[0].numpy()


def _images(dataset: SegmentationDataset, label: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(id, image (3, H, W) float64 in [0, 1], mask (H, W) bool) of every image."""
    if dataset.augmenter is not None:
        raise InputError("controls describe images as they are; open the data set without augmentation")
    for index, image in enumerate(progress(dataset.ids, desc=label, unit="image")):
        pixels = dataset.pixels(index)
        yield image, pixels[..., :3].transpose(2, 0, 1) / 255.0, pixels[..., 3] > 0
