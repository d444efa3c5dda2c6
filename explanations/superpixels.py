"""Features that follow what an image shows: superpixels, in place of the cells of a grid.

SLIC (Achanta et al. 2012) by scikit-image, with the settings below. It knows no model; what superpixels are worth is
measured by `features`.
"""

from __future__ import annotations

import numpy as np
import torch
from skimage.segmentation import slic
from torch import Tensor

from explanations.covering import checked_images
from utils import InputError

# Each image's values are stretched to [0, 1] and taken to CIELAB by scikit-image, so that the same compactness fits
# dark and pale images. Of 8 dermoscopic images at 128 px and n = 40 these two settings give 33 to 36 superpixels whose
# borders follow the lesion's; without smoothing, single hairs and noise end in slivers or, of noise alone, in one.
COMPACTNESS = 20.0  # weight of nearness against colour: scikit-image's 10 gives long rims, 30 nearly a grid
SMOOTHING = 1.0  # σ of the Gaussian before, pixels


def superpixels(images: Tensor, count: int) -> Tensor:
    """The number of every pixel's superpixel, (B, H, W) int64 on the CPU, of images (B, 3, H, W) in [0, 1].

    Numbered from 0 without a gap in each image for itself. SLIC starts from a grid of at most `count` seeds and merges
    what is small, so that images have about `count`, and rather fewer; a constant image has tiles of about equal size.
    The same images give the same superpixels. InputError names an image that falls into fewer than half as many.
    """
    height, width = checked_images(images).shape[-2:]
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= height * width:
        raise InputError(
            f"superpixels must be a whole number from 2 to {height * width}, the pixels of an image; got {count!r}"
        )
    maps = [_of_one(image, count) for image in images.detach().cpu()]
    for row, each in enumerate(maps):
        found = int(each.max()) + 1
        if found < max(2, count / 2):
            raise InputError(
                f"SLIC cuts the image in row {row} into {found} superpixels where about {count} were asked for; ask "
                "for another number, or for a grid, which fits every image: features as a number of cells a side"
            )
    return torch.stack(maps)


def _of_one(image: Tensor, count: int) -> Tensor:
    """(H, W) int64 of one image (3, H, W)."""
    colours = image.permute(1, 2, 0).double().numpy()
    labels = slic(colours, count, compactness=COMPACTNESS, sigma=SMOOTHING, start_label=0, channel_axis=-1)
    _, numbers = np.unique(labels, return_inverse=True)  # scikit-image does not promise that no number is left out
    return torch.from_numpy(numbers.reshape(labels.shape)).long()
