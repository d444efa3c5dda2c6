"""How long a training will take on this machine, from one timed step of it."""

from __future__ import annotations

import time

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
