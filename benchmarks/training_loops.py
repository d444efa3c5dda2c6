"""One training loop in a process of its own: the plain one that one would write, or the one of `train.py`.

    python -m benchmarks.training_loops plain|ours SETTINGS.json

Answers a line of JSON once it is ready, then trains one epoch for every line "epoch" on its input (seconds, images,
train_loss, rss_mb), and validates on "validate" (validation_iou). Both loops get the same model from the same seed, the
same batches in the same order, the same optimiser and the same random numbers. What differs is how it is computed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder
from torch import nn

import deformable_attention
import model_sites
import train
from benchmarks.worker import peak_resident
from dataset import make_loader
from inference import score
from loss_metrics import dice_bce
from models import ModelSpec, build_model
from optimization import make_schedule
from sources import open_datasets
from utils import digest, seed_everything


class Plain:
    """The libraries' loss and point count, attention and decoder; the default allocator; the encoder run each epoch."""

    def __init__(self, config: train.TrainConfig) -> None:
        self.config = config
        deformable_attention.MOST_PIXELS = 0  # the library's own way
        datasets = open_datasets(config, seed=config.seed, needed=("train", "validation"))
        self.data = datasets["train"]
        self.loader = make_loader(self.data, config.batch_size, shuffle=True, seed=config.seed)
        self.validation = make_loader(datasets["validation"], config.batch_size)
        self.model = build_model(ModelSpec(config.model, config.preset, options=config.options), config.seed)
        if config.model == "unetpp":
            self.model.decoder.__class__ = UnetPlusPlusDecoder
        self.encoder = model_sites.encoder_of(self.model)
        if config.freeze:
            self.encoder.requires_grad_(False)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = make_schedule(config, self.optimizer, len(self.loader))

    def epoch(self, number: int) -> float:
        seed_everything(int(digest("epoch", self.config.seed, number)[:8], 16))
        self.data.set_epoch(number)
        self.model.train()
        if self.config.freeze:
            self.encoder.eval()
        total = 0.0
        for batch in self.loader:
            loss = plain_loss(self.model, batch.image, batch.mask)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            total += loss.item() * len(batch.id)
        return total / len(self.data)

    def validate(self) -> float:
        return float(score(self.model, self.validation)[0]["iou"].mean())


def plain_loss(model: nn.Module, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """transformers' own set loss for Mask2Former; Dice and cross-entropy of the one answer for UNet++."""
    if model.spec.name == "unetpp":
        return dice_bce(model(images), masks)
    both = torch.cat([1 - masks, masks], dim=1)
    present = both.flatten(2).any(-1)
    labels = {
        "mask_labels": [labels[here] for labels, here in zip(both, present)],
        "class_labels": [here.nonzero()[:, 0] for here in present],
    }
    return model(images, **labels).loss.sum()


class Ours:
    """The loop of `python train.py`, one epoch at a time."""

    def __init__(self, config: train.TrainConfig) -> None:
        self.run = train.prepare(config)

    def epoch(self, number: int) -> float:
        return self.run.train_epoch(number)

    def validate(self) -> float:
        return self.run.validate()["validation_iou"]


def main(kind: str, settings: str) -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    told = json.loads(Path(settings).read_text(encoding="utf-8"))
    torch.set_num_threads(told.pop("threads"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ISIC_FEATURES"] = folder  # nothing is found there that an earlier run left
        config = train.TrainConfig(**told, out=f"{folder}/run", device="cpu")
        loop = {"plain": Plain, "ours": Ours}[kind](config)
        print(json.dumps({"ready": True}), file=answers, flush=True)
        epoch = 0
        for line in sys.stdin:
            started = time.perf_counter()
            if line.strip() == "epoch":
                answer = {"train_loss": loop.epoch(epoch), "seconds": time.perf_counter() - started}
                epoch += 1
            else:
                answer = {"validation_iou": loop.validate()}
            print(json.dumps(answer | {"rss_mb": peak_resident()}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
