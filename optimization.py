"""How weights move: the optimiser and its groups, the schedule of the learning rate, by name from a recipe.

Free of data and of files: everything here is a function of a recipe, a model and a number of steps.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from model_sites import encoder_of
from utils import InputError, pick

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "one_cycle", "cosine")


def check_optimization(recipe) -> None:
    """Refuse an optimiser, a schedule or a number that cannot be used."""
    pick("optimizer", recipe.optimizer, OPTIMIZERS)
    if recipe.schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {recipe.schedule!r}; use one of {', '.join(SCHEDULES)}")
    for name in ("learning_rate", "encoder_learning_rate"):
        if not getattr(recipe, name) > 0:
            raise InputError(f"{name} must be above 0, got {getattr(recipe, name)}")
    for name in ("weight_decay", "clip_norm"):
        if not getattr(recipe, name) >= 0:
            raise InputError(f"{name} must not be below 0, got {getattr(recipe, name)}")
    for name in ("warmup", "average"):
        if not 0 <= getattr(recipe, name) < 1:
            raise InputError(f"{name} must be at least 0 and below 1, got {getattr(recipe, name)}")
    if recipe.warmup and recipe.schedule != "cosine":
        raise InputError(f"warmup belongs to the schedule cosine, not to {recipe.schedule}; set one of them otherwise")


def make_optimizer(recipe, model: nn.Module) -> Optimizer:
    """The optimiser of what trains: one group, or with an `encoder_learning_rate` other than 1 the encoder's after it.

    The first group is never the encoder's, so its learning rate is the one that the history shows.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    encoder = set(map(id, encoder_of(model).parameters())) if recipe.encoder_learning_rate != 1 else set()
    groups = [{"params": [parameter for parameter in trained if id(parameter) not in encoder]}]
    inside = [parameter for parameter in trained if id(parameter) in encoder]
    if inside:  # a frozen encoder has none
        groups.append({"params": inside, "lr": recipe.learning_rate * recipe.encoder_learning_rate})
    # fused: one kernel does all the arithmetic of a step on a tensor
    return OPTIMIZERS[recipe.optimizer](groups, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def make_schedule(recipe, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """The schedule over all epochs of `steps` optimiser steps each; None where the learning rate stays."""
    total = recipe.epochs * steps
    if recipe.schedule == "constant":
        return None
    if recipe.schedule == "cosine":
        return LambdaLR(optimizer, functools.partial(cosine, total=total, warm=round(recipe.warmup * total)))
    return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=total)


def cosine(step: int, total: int, warm: int) -> float:
    """Share of the full learning rate at a step: up linearly for `warm` steps, then half a cosine, to 0 at `total`.

    No step is wasted: the first one has 1 / (warm + 1), not 0.
    """
    if step < warm:
        return (step + 1) / (warm + 1)
    return (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
