"""Training of a small classifier on photographs that fit into memory, seeded, and the answers of a trained one.

AdamW under a cosine schedule with warm-up, label smoothing, and random crops and flips that are made of a whole batch
at a time on the device, where the photographs stay as bytes. `fit` is the loop, whatever the loss (`simclr` has another
one); it waits for the device once an epoch. For networks of minutes; a training that has to survive being killed in its
middle is train.py.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from classification.classifiers import Classifier, ClassifierSpec, build_classifier, family_of
from classification.origins import OBJECTIVES
from kernel_layout import channels_last
from optimization import cosine
from utils import InputError, progress

PRECISIONS = ("auto", "fp32", "bf16")
ASPECT = 4 / 3  # of a crop, at most; its inverse at least
Photos = tuple[Tensor, Tensor]  # uint8 (N, 3, H, W), int64 (N,)
LEAST_ABOVE = ("learning_rate", "smallest_crop", "clip_norm", "temperature")


@dataclass(frozen=True)
class ClassifierRecipe:
    """How a classifier is trained, or a network without a head by SimCLR.

    epochs : passes over the photographs
    batch_size : photographs a step; what is left over at an epoch's end waits for the next order
    learning_rate : the highest, reached after `warmup` of all steps
    weight_decay : of matrices and kernels alone, not of biases and norms
    label_smoothing : share of the target that is spread over all classes
    smallest_crop : area of the smallest random crop, as a share of the picture; 1 shows pictures whole and unflipped
    clip_norm : gradients are scaled down to this length
    objective : 'supervised' (class labels) or 'simclr' (none: two views of a picture are to be alike, see `simclr`)
    temperature : of SimCLR's loss
    jitter : strength of SimCLR's colour jitter; 0 leaves colours as they are
    precision : 'fp32', 'bf16' (autocast to bfloat16), or 'auto': bf16 on a GPU, fp32 elsewhere
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.002
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup: float = 0.1
    smallest_crop: float = 0.35
    clip_norm: float = 1.0
    objective: str = "supervised"
    temperature: float = 0.5
    jitter: float = 0.5
    precision: str = "auto"


def check_recipe(recipe: ClassifierRecipe, name: str = "recipe") -> None:
    """Refuse settings that no training can have."""
    for key in ("epochs", "batch_size"):
        value = getattr(recipe, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: {key} must be a whole number of at least 1, got {value!r}")
    for key in LEAST_ABOVE:
        if not getattr(recipe, key) > 0:
            raise InputError(f"{name}: {key} must be above 0, got {getattr(recipe, key)}")
    for key in ("label_smoothing", "warmup"):
        if not 0 <= getattr(recipe, key) < 1:
            raise InputError(f"{name}: {key} must be at least 0 and below 1, got {getattr(recipe, key)}")
    if recipe.smallest_crop > 1 or recipe.weight_decay < 0 or recipe.jitter < 0:
        raise InputError(f"{name}: smallest_crop is at most 1, weight_decay and jitter at least 0")
    for key, known in {"objective": OBJECTIVES, "precision": PRECISIONS}.items():
        if getattr(recipe, key) not in known:
            raise InputError(f"{name}: {key} {getattr(recipe, key)!r} is none of {', '.join(known)}")
    if recipe.objective == "simclr" and recipe.batch_size < 2:
        raise InputError(f"{name}: SimCLR tells a picture from the others of its batch; give batch_size 2 or more")


def train_classifier(
    spec: ClassifierSpec,
    train: Photos,
    val: Photos,
    recipe: ClassifierRecipe,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[dict], None] | None = None,
) -> tuple[Classifier, pd.DataFrame]:
    """The classifier after its last epoch, in eval mode, and its history; the same seed gives the same numbers.

    train, val : uint8 images (N, 3, H, W) at the spec's size and their labels (N,)
    history : one row an epoch: epoch (from 1), learning_rate, train_loss, val_loss, val_accuracy, seconds

    The last weights are kept, not the best ones: the schedule ends at 0, and nothing is chosen on `val`, whose accuracy
    is reported. A loss that is no number ends the training with an InputError.
    """
    check_recipe(recipe)
    check_photos(spec, train, val)
    device = torch.device(device)
    model = in_fast_layout(build_classifier(spec, seed).to(device))
    images, labels = (tensor.to(device) for tensor in train)

    def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
        pictures = crop_and_flip(images[rows].float() / 255, recipe.smallest_crop, generator)
        with autocast(recipe, device):
            logits = model(pictures)
        return F.cross_entropy(logits.float(), labels[rows], label_smoothing=recipe.label_smoothing)

    history = fit(model, loss_of, len(images), recipe, seed, lambda: _validate(model, *val), on_epoch, spec.name)
    return as_kept(model), history


def fit(
    model: nn.Module,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    count: int,
    recipe: ClassifierRecipe,
    seed: int,
    measure: Callable[[], dict],
    on_epoch: Callable[[dict], None] | None = None,
    name: str = "network",
) -> pd.DataFrame:
    """Train all of a model's parameters on `count` pictures; the history, with what `measure` finds after every epoch.

    loss_of : the loss of some rows; what it draws comes from the generator, which lives on the CPU
    """
    steps = max(1, count // recipe.batch_size)
    optimizer, schedule = _optimizer(recipe, model, steps)
    generator = torch.Generator().manual_seed(seed)
    rows, started = [], time.perf_counter()
    for epoch in progress(range(1, recipe.epochs + 1), desc=name):
        rate = optimizer.param_groups[0]["lr"]
        loss = _one_epoch(model, loss_of, count, recipe, optimizer, schedule, generator)
        if not math.isfinite(loss):
            raise InputError(
                f"{name}: the loss of epoch {epoch} is {loss}; lower learning_rate (now {recipe.learning_rate}) "
                "or lengthen warmup"
            )
        rows.append({"epoch": epoch, "learning_rate": rate, "train_loss": loss, **measure()})
        rows[-1]["seconds"] = time.perf_counter() - started
        if on_epoch is not None:
            on_epoch(rows[-1])
    return pd.DataFrame(rows)


def as_kept(model: Classifier) -> Classifier:
    """A trained network as it is handed on: on the CPU, in the usual layout, in eval mode."""
    return model.to("cpu", memory_format=torch.contiguous_format).eval()


def autocast(recipe: ClassifierRecipe, device: torch.device) -> torch.autocast:
    """The context in which a network's forward pass is computed."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_on(recipe, device) == "bf16")


def precision_on(recipe: ClassifierRecipe, device: torch.device) -> str:
    """'fp32' or 'bf16': what the recipe's precision comes to on a device."""
    auto = "bf16" if device.type == "cuda" else "fp32"
    return auto if recipe.precision == "auto" else recipe.precision


def in_fast_layout(model: Classifier) -> Classifier:
    """Convolutional networks with channels last in memory, in which the CPU and the GPU are faster; others as is."""
    return channels_last(model) if _is_cnn(model.spec.name) else model


def _is_cnn(name: str) -> bool:
    try:
        return family_of(name) == "CNN"
    except InputError:  # of a kind that the caller had to say
        return False


def check_photos(spec: ClassifierSpec, train: Photos, val: Photos) -> None:
    """Refuse pictures of another size, and labels that do not fit them or a head; without a head labels are unused."""
    for name, (images, labels) in {"train": train, "val": val}.items():
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, spec.image_size, spec.image_size):
            raise InputError(
                f"{name} images must be uint8 (N, 3, {spec.image_size}, {spec.image_size}), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        if len(labels) != len(images) or len(images) == 0:
            raise InputError(f"{len(images)} {name} images and {len(labels)} labels; give one label for every image")
        if spec.classes and (labels.min() < 0 or labels.max() >= spec.classes):
            raise InputError(
                f"{name} labels run from {int(labels.min())} to {int(labels.max())}, but {spec.name} has "
                f"{spec.classes} classes"
            )


def _optimizer(recipe: ClassifierRecipe, model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, recipe.learning_rate, fused=True)
    total = recipe.epochs * steps
    return optimizer, LambdaLR(optimizer, functools.partial(cosine, total=total, warm=round(recipe.warmup * total)))


def _one_epoch(
    model: nn.Module,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    count: int,
    recipe: ClassifierRecipe,
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    generator: torch.Generator,
) -> float:
    """The mean training loss of one pass in a new order; the device is waited for at its end alone."""
    model.train()
    device = next(model.parameters()).device
    losses = []
    batches = torch.randperm(count, generator=generator).to(device).split(recipe.batch_size)
    whole = [rows for rows in batches if len(rows) == recipe.batch_size] or [batches[0]]
    for rows in whole:
        loss = loss_of(rows, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).double().mean())


def crop_and_flip(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W), each with a crop of its own brought to full size bilinearly, half of them mirrored.

    The crop's area is drawn between `smallest` and 1 of the picture's, its aspect log-uniformly up to 4:3 either way,
    its place anywhere inside (Szegedy et al. 2015, as torchvision's RandomResizedCrop, but for a crop that does not
    fit: its longer side is cut to the picture's). smallest = 1 returns the pictures as they are.
    """
    if smallest == 1:
        return images
    count = len(images)
    draw = torch.rand(5, count, generator=generator)
    area = smallest + (1 - smallest) * draw[0]
    aspect = torch.exp((2 * draw[1] - 1) * math.log(ASPECT))
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    side = torch.where(draw[4] < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)  # from places in the answer to places in the picture, both in [-1, 1]
    theta[:, 0, 0], theta[:, 0, 2] = wide * side, (2 * draw[2] - 1) * (1 - wide)
    theta[:, 1, 1], theta[:, 1, 2] = high, (2 * draw[3] - 1) * (1 - high)
    grid = F.affine_grid(theta.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def predict(model: Classifier, images: Tensor, batch: int = 128) -> Tensor:
    """Logits (N, classes), or features, float32 on the CPU, of uint8 images (N, 3, H, W); the model is left as is."""
    device, training = model.mean.device, model.training
    model.eval()
    try:
        with torch.inference_mode():
            parts = [model(part.to(device).float() / 255).float() for part in images.split(batch)]
    finally:
        model.train(training)
    return torch.cat(parts).cpu()


def _validate(model: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    logits = predict(model, images)
    loss = F.cross_entropy(logits.double(), labels)
    return {"val_loss": float(loss), "val_accuracy": accuracy(logits, labels)}


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose highest logit is their label's (top-1)."""
    return float((logits.argmax(1) == labels).double().mean())


def wilson_interval(right: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): of `right` among `count` independent images."""
    if not 0 <= right <= count or count < 1:
        raise InputError(f"{right} right answers of {count} images is no share; give 0 to {count} of at least 1")
    share, spread = right / count, z * z / count
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)
