"""What happens to a training image anew each epoch: flips, rotation, zoom, colour and drawn hair.

Which of these, and how much, is said by the `Transform`; what is drawn is a function of (seed, epoch, id) alone. Every
step has a seed of its own: when albumentations' Compose is given a seed it hands the same one to all of its steps, so
they would be drawn alike (two flips in a row always together). It also makes an ablation paired: switching one step
on changes no other's draws. Images and masks come at their final size; how they got there is in `images.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import cv2
import numpy as np

from images import Transform
from utils import digest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for a newer release
import albumentations

Step = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # (image, mask, seed) -> (image, mask)

HUE_SHARE = 0.1  # of the colour circle, at strength 1: skin stays between purple and yellow
HAIRS = (3, 12)  # a picture, fewest and most


class Augmenter:
    """The steps that a transform asks for, in order: flips; rotation and zoom; hair; colour.

    Hair comes after rotation and zoom so that it stays sharp, and before colour because one light falls on both.
    """

    def __init__(self, transform: Transform) -> None:
        self.steps = steps_of(transform)

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, seed: int, epoch: int, id: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """image (H, W, 3) uint8 RGB, mask (H, W) uint8 {0, 1} -> the same, drawn for this seed, epoch and id."""
        for name, step in self.steps.items():
            # 'flips' alone carries no name in its seed: its draws are older than the other steps
            parts = (seed, epoch, id) if name == "flips" else (seed, epoch, id, name)
            image, mask = step(image, mask, int(digest(*parts)[:8], 16))
        return image, mask


def steps_of(transform: Transform) -> dict[str, Step]:
    """Name -> step, for what is switched on."""
    steps: dict[str, Step] = {}
    if transform.flips:
        # all that two flips and a quarter turn make together, all eight equally likely
        steps["flips"] = Library(albumentations.D4(p=1.0))
    if transform.rotate or transform.scale:
        steps["rotate and scale"] = Library(_rotation_and_zoom(transform.rotate, transform.scale))
    if transform.hair:
        steps["hair"] = Hair(transform.hair)
    if transform.colour:
        steps["colour"] = Library(_colour(transform.colour))
    return steps


class Library:
    """A step made of one albumentations transform."""

    def __init__(self, transform) -> None:
        self.compose = albumentations.Compose([transform])

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        self.compose.set_random_seed(seed)
        moved = self.compose(image=image, mask=mask)
        return moved["image"], moved["mask"]


def _rotation_and_zoom(degrees: float, scale: float):
    """One warp about the centre (two would blur twice); what comes in at the border is the image's own reflection."""
    return albumentations.Affine(
        rotate=(-degrees, degrees),
        scale=(1 - scale, 1 + scale),
        keep_ratio=True,
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST,
        border_mode=cv2.BORDER_REFLECT_101,
        p=1.0,
    )


def _colour(strength: float):
    """Factors of brightness, contrast and saturation in 1 ± strength, hue turned by ± strength × 36 degrees."""
    return albumentations.ColorJitter(
        brightness=strength, contrast=strength, saturation=strength, hue=HUE_SHARE * strength, p=1.0
    )


class Hair:
    """A step that draws hairs over an image, with a probability; the mask stays: a lesion under hair is a lesion."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(seed)
        return (draw_hair(image, generator) if generator.random() < self.probability else image), mask


def draw_hair(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """An (H, W, 3) uint8 RGB image with 3 to 12 dark brown curves drawn in; no pixel becomes lighter.

    A hair is a quadratic Bézier curve, 0.3 to 1 sides long and one pixel wide, or up to a 100th of the side.
    """
    height, width = image.shape[:2]
    colour = generator.uniform(10, 60) * np.array([1.0, 0.8, 0.7])
    drawn = np.array(image)
    for _ in range(generator.integers(*HAIRS, endpoint=True)):
        # in 16ths of a pixel, which OpenCV calls a shift of 4 bits
        points = np.round(_curve(generator) * (width, height) * 16).astype(np.int32)
        thickness = int(generator.integers(1, max(1, min(height, width) // 100), endpoint=True))
        cv2.polylines(drawn, [points], False, colour.tolist(), thickness, cv2.LINE_AA, shift=4)
    return np.minimum(drawn, image)  # over a black border a brown hair is not seen


def _curve(generator: np.random.Generator, points: int = 17) -> np.ndarray:
    """(points, 2) x and y of a bent line that starts in the unit square."""
    start, angle, length = generator.random(2), generator.uniform(0, 2 * np.pi), generator.uniform(0.3, 1.0)
    along = length * np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]]) * generator.normal(0, 0.25)
    bend, end = start + along / 2 + across, start + along
    t = np.linspace(0, 1, points)[:, None]
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
