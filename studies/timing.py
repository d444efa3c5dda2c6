"""How long a study of two architectures will take on this machine, from timed steps of its trainings."""

from __future__ import annotations

import time

import numpy as np
import torch

from dataset import SegmentationDataset
from models import build_model
from recipes import Recipe, objective
from utils import resolve_device


def time_a_step(recipe: Recipe, data: SegmentationDataset, device_name: str) -> tuple[float, float]:
    """(training, scoring) seconds an image: the second of two steps, the first being warm-up."""
    device = resolve_device(device_name)
    model = build_model(recipe.spec).to(device).train()
    loss = objective(recipe)
    samples = [data[i % len(data)] for i in range(recipe.batch_size)]
    images, masks = (torch.stack([getattr(s, key) for s in samples]).to(device) for key in ("image", "mask"))
    for _ in range(2):
        started = time.perf_counter()
        value = loss(model, images, masks)
        forward = time.perf_counter() - started
        value.backward()
        float(value.detach())  # waits for the device
        step = time.perf_counter() - started
    return step / len(samples), forward / len(samples)


def training_seconds(recipe: Recipe, sizes: dict[str, int], step: float, forward: float) -> float:
    """Seconds of one network's epochs, and of the passes over the test images."""
    scored = sizes["validation"] * recipe.epochs + 3 * sizes["test"]
    return sizes["train"] * recipe.epochs * step + scored * forward


def statistics_seconds(config, images: int) -> float:
    """Seconds of nulls, intervals and figures: those of the demo on two cores, scaled to so many images."""
    return 30 + (20 * config.permutations / 100 + 160 * config.resamples / 50) * (images / 200) ** 2


def stitching_seconds(config, images: int, timed: list[tuple[float, float]]) -> float:
    """Seconds of all stitches: both directions, with two baselines each, trained and scored through two networks."""
    if not config.stitch_pairs or len(config.seeds) < 2:
        return 0
    step, forward = np.mean(timed, axis=0)
    # the stitch, and for one job in three the mean alone in its place, score all images through two networks
    trained = config.stitch_epochs * config.stitch_images * (step + forward)
    return 2 * config.stitch_pairs * 3 * (trained + 8 / 3 * images * forward)
