"""SimCLR (Chen et al. 2020): a network without a head learns, without labels, that two views of a picture are alike.

A view is a random crop, mirrored or not, in jittered colours or in grey; views are made of whole batches on the device.
The projection head is trained beside the network and thrown away. As the authors did for small pictures there is no
blur; unlike theirs, the jitter leaves hues alone and keeps one order, and the optimizer is AdamW instead of LARS.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.classifiers import Classifier, ClassifierSpec, build_classifier
from classification.training import (
    ClassifierRecipe,
    Photos,
    as_kept,
    autocast,
    check_photos,
    check_recipe,
    crop_and_flip,
    fit,
    in_fast_layout,
)
from utils import InputError

PROJECTION = 128  # dimensions in which views are compared
JITTERED, GREY = 0.8, 0.2  # shares of the views: Appendix A of the paper
LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601


def train_simclr(
    spec: ClassifierSpec,
    train: Photos,
    val: Photos,
    recipe: ClassifierRecipe,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[dict], None] | None = None,
) -> tuple[Classifier, pd.DataFrame]:
    """The network after its last epoch, in eval mode, and its history; labels are not looked at.

    spec : with classes 0; the network's pooled features are what is projected
    history : one row an epoch: epoch (from 1), learning_rate, train_loss, val_loss, seconds. The loss depends on the
        number of pictures in a batch; val_loss is of the same random views every time.
    """
    check_recipe(recipe)
    check_photos(spec, train, val)
    if spec.classes:
        raise InputError(f"{spec.name}: SimCLR trains a network without a head; set classes to 0, not {spec.classes}")
    if min(len(train[0]), len(val[0])) < 2:
        raise InputError("SimCLR tells a picture from the others of its batch; give at least 2 in train and in val")
    device = torch.device(device)
    model = in_fast_layout(build_classifier(spec, seed).to(device))
    both = nn.ModuleDict({"network": model, "head": projection(_width(model)).to(device)})
    images, held_out = train[0].to(device), val[0].to(device)

    def loss_of(rows: Tensor, generator: torch.Generator, of: Tensor = images) -> Tensor:
        pictures = of[rows].float() / 255
        pair = torch.cat([view(pictures, recipe, generator) for _ in range(2)])
        with autocast(recipe, device):
            projected = both["head"](both["network"](pair))
        return nt_xent(*projected.float().chunk(2), recipe.temperature)

    def measure() -> dict[str, float]:
        both.eval()
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(len(held_out), device=device).split(recipe.batch_size)
        with torch.no_grad():
            losses = [loss_of(some, generator, held_out) for some in rows if len(some) == len(rows[0])]
        return {"val_loss": float(torch.stack(losses).double().mean())}

    history = fit(both, loss_of, len(images), recipe, seed, measure, on_epoch, spec.name)
    return as_kept(model), history


def projection(width: int) -> nn.Sequential:
    """Two layers, as g(h) in section 2.1 of the paper."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION))


def _width(model: Classifier) -> int:
    """How many features a network answers; the pass leaves its running statistics alone."""
    size = model.spec.image_size
    model.eval()
    with torch.no_grad():
        return model(torch.zeros(1, 3, size, size, device=model.mean.device)).shape[1]


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The mean of equation 1 over all 2 N views; (N, d) projections each, row i of one belongs to row i of the other.

    ℓ(i, j) = −log exp(s_ij / τ) / Σ_{k ≠ i} exp(s_ik / τ), s the cosine and j the other view of the picture of i.
    """
    views = torch.cat([first, second])
    views = views / torch.linalg.vector_norm(views, dim=1, keepdim=True)
    likeness = views @ views.T / temperature
    likeness = likeness.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), -math.inf)
    partner = torch.arange(len(views), device=views.device).roll(len(first))
    return F.cross_entropy(likeness, partner)


def view(pictures: Tensor, recipe: ClassifierRecipe, generator: torch.Generator) -> Tensor:
    """One random view of every picture (B, 3, H, W) in [0, 1]."""
    return recolour(crop_and_flip(pictures, recipe.smallest_crop, generator), recipe.jitter, generator)


def recolour(pictures: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], most with brightness, contrast and saturation of their own, some of them grey.

    Of every five, four are jittered: each of the three by a factor between 1 − 0.8 s and 1 + 0.8 s (not below 0); one
    is grey. Strength 0 returns the pictures as they are.
    """
    if strength == 0:
        return pictures
    draw = torch.rand(5, len(pictures), generator=generator)
    factors = (1 + 0.8 * strength * (2 * draw[:3] - 1)).clamp(min=0)
    factors = torch.where(draw[3] < JITTERED, factors, torch.ones(()))
    factors = torch.cat([factors, (draw[4:] >= GREY).float()])  # saturation 0 is grey
    brightness, contrast, saturation, grey = factors.to(pictures.device, non_blocking=True).view(4, -1, 1, 1, 1)
    pictures = (pictures * brightness).clamp(0, 1)
    pictures = _between(luma(pictures).mean((2, 3), keepdim=True), pictures, contrast)
    pictures = _between(luma(pictures), pictures, saturation)
    return _between(luma(pictures), pictures, grey)


def luma(pictures: Tensor) -> Tensor:
    """(B, 1, H, W): how bright each pixel is."""
    weights = torch.tensor(LUMA, dtype=pictures.dtype).to(pictures.device, non_blocking=True)
    return torch.einsum("bchw,c->bhw", pictures, weights)[:, None]


def _between(start: Tensor, pictures: Tensor, factor: Tensor) -> Tensor:
    return (start + factor * (pictures - start)).clamp(0, 1)
