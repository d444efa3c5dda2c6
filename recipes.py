"""What is trained and how, as settings: their meaning, what is refused, when a training ends and what it minimises.

A room without files: it opens no image and writes nothing, so a study can check its recipes before anything long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from class_metrics import ce_dice
from loss_metrics import LOSSES
from models import ModelSpec, lesion_logits, pixel_logits, set_loss
from optimization import check_optimization
from settings import check_seed, check_types
from sources import ImageSource
from utils import InputError, closest

OVERFIT_IOU = 0.95  # that a model must reach on the images it was trained on
OVERFIT_EPOCHS = 60
OBJECTIVES = ("auto", "set", "ce_dice", *LOSSES)


@dataclass
class Recipe:
    """A model and how it is trained.

    Args:
        model: unetpp, mask2former, fcn, unet, fpn, deeplabv3plus, segformer, segformer_smp, upernet or all_mlp
        preset: demo, smoke, isic2018, …; for models of segmentation-models-pytorch any of its encoders; for mask2former
            swin_tiny, or any Swin-based hub name; for segformer any hub name; for all_mlp any network of timm
        weights: none, imagenet (the preset's pretrained ones), or a file; for all_mlp also the folder of a classifier
            that was trained here
        normalization: of the input: imagenet, half, clip or none
        freeze: roles of modules that do not train: encoder
        answer: Mask2Former's lesion: semantic, or query:1 (the earlier study's)
        options: overrides of the preset, e.g. {"encoder_name": "mobilenet_v2"}; for mask2former also another encoder,
            e.g. {"encoder": {"vit": "dinov2_s14", "neck": "taps"}} or {"encoder": {"cnn": "mobilenet_v2"}}; for all_mlp
            of the body, such as {"body": {"depths": [1, 1, 2, 1]}, "image_size": 64}
        loss: scaled_dice, dice_bce (for a lesion), ce_dice (for several classes), set (Mask2Former's own); auto is set
            for mask2former, else dice_bce or ce_dice
        epochs: passes over the training images
        batch_size: images a step, in each process
        learning_rate: the highest one, with a schedule
        weight_decay: of the optimiser
        optimizer: adam or adamw
        schedule: over all epochs: constant, one_cycle, or cosine (down to 0)
        patience: stop when the validation IoU has not improved for so many epochs; 0 never stops early
        warmup: share of all steps over which the schedule cosine first climbs, 0 to 1
        clip_norm: the gradient's norm is cut down to this; 0 never
        average: decay of an exponential moving average of the weights, such as 0.99, which is then what is validated
            and kept; 0 keeps the weights themselves
        encoder_learning_rate: factor on the encoder's learning rate
        compile: whether torch.compile speeds the steps up; the first ones then take minutes
    """

    model: str = "unetpp"
    preset: str = "demo"
    weights: str = "none"
    normalization: str = "imagenet"
    freeze: list[str] = field(default_factory=list)
    answer: str = "semantic"
    options: dict = field(default_factory=dict)
    loss: str = "auto"
    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: str = "adamw"
    schedule: str = "one_cycle"
    patience: int = 0
    warmup: float = 0.0
    clip_norm: float = 0.0
    average: float = 0.0
    encoder_learning_rate: float = 1.0
    compile: bool = False

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            self.model, self.preset, self.weights, self.normalization, tuple(self.freeze), self.answer, self.options
        )


@dataclass
class TrainConfig(ImageSource, Recipe):
    """One training run: images, recipe, and where and how it runs.

    Args:
        seed: of the initial weights, the order of the images and their augmentation
        out: run folder; the same settings continue it, others are refused
        device: auto, cpu or cuda
        workers: processes that read images
        mixed_precision: no, fp16 or bf16
        cache_features: whether a frozen encoder's answers are kept on disk (in ISIC_FEATURES, or beside the cached
            images) and read from there; only where images repeat: flips may be on, other augmentation may not
        overfit: train and validate on the same so many training images, without augmentation, until the IoU reaches
            0.95: a check that a model can learn at all, see `for_overfit`; 0 is off
    """

    seed: int = 0
    out: str = "runs/train"
    device: str = "auto"
    workers: int = 0
    mixed_precision: str = "no"
    cache_features: bool = False
    overfit: int = 0

    @property
    def spec(self) -> ModelSpec:
        """The recipe's model for as many classes as the images have."""
        return dataclasses.replace(super().spec, classes=1 if self.num_classes == 2 else self.num_classes)


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that cannot run, before any image is read."""
    check_types(recipe, f"{recipe.model}: ")
    check_seed(getattr(recipe, "seed", 0))
    if recipe.loss not in OBJECTIVES:
        raise InputError(f"unknown loss {recipe.loss!r}; closest: {closest(recipe.loss, OBJECTIVES)}")
    check_optimization(recipe)
    for name in ("epochs", "batch_size"):
        if not getattr(recipe, name) > 0:
            raise InputError(f"{name} must be above 0, got {getattr(recipe, name)}")
    if not getattr(recipe, "overfit", 0) >= 0:
        raise InputError(f"overfit must be a number of images, or 0, got {recipe.overfit}")
    if not recipe.patience >= 0:
        raise InputError(f"patience must not be below 0, got {recipe.patience}")


def for_overfit(config: TrainConfig) -> TrainConfig:
    """The same training as an overfit check: a constant learning rate, averaged weights, nothing that holds it back.

    Ten passes over the few images are an epoch; a check ends at the first one that reaches the IoU, at the latest after
    `OVERFIT_EPOCHS`.
    """
    settings = {"schedule": "constant", "warmup": 0.0, "average": 0.9, "weight_decay": 0.0, "clip_norm": 1.0}
    settings |= {"epochs": max(config.epochs, OVERFIT_EPOCHS), "repeats": 10, "patience": 0, "fraction": 1.0}
    return dataclasses.replace(config, batch_size=min(config.batch_size, max(2, config.overfit // 2)), **settings)


def is_finished(recipe: Recipe, validation_ious: Sequence[float]) -> bool:
    """Whether all epochs are done, none of the last `patience` improved on the best IoU, or an overfit check passed."""
    scores = list(validation_ious)
    if getattr(recipe, "overfit", 0) and scores and max(scores) >= OVERFIT_IOU:
        return True
    waited = len(scores) - 1 - scores.index(max(scores)) if scores else 0
    return len(scores) >= recipe.epochs or bool(recipe.patience and waited >= recipe.patience)


def check_cache_features(config: TrainConfig) -> None:
    """Refuse to keep features of pictures that never come again, or of an encoder that changes."""
    if config.cache_features and "encoder" not in config.freeze:
        raise InputError("cache_features needs a frozen encoder; set --freeze [encoder], or leave cache_features out")
    anew = [name for name in ("rotate", "scale", "colour", "hair") if getattr(config, name)]
    if config.cache_features and anew:
        raise InputError(
            f"cache_features: with {', '.join(anew)} no image comes twice and nothing can be read again; leave one out"
        )


def objective(recipe: Recipe) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """(model, images, masks) -> loss, by name."""
    name, several = recipe.loss, recipe.spec.classes > 1
    if name == "auto":
        name = "set" if recipe.model == "mask2former" else "ce_dice" if several else "dice_bce"
    if name == "set":
        if recipe.model != "mask2former":
            raise InputError(
                f"loss 'set' needs a set of queries; {recipe.model} has none: use scaled_dice, dice_bce or ce_dice"
            )
        return set_loss
    if several != (name == "ce_dice"):
        fit = "ce_dice or set" if several else f"{', '.join(LOSSES)} or set"
        raise InputError(f"loss {name!r} does not fit {max(2, recipe.spec.classes)} classes; use {fit}")
    if several:
        return lambda model, images, masks: ce_dice(pixel_logits(model, images), masks)
    loss = LOSSES[name]
    return lambda model, images, masks: loss(lesion_logits(model, images), masks)
