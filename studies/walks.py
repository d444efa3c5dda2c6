"""The networks of the processing-steps study: trained ones and their untrained twins, and how each is described.

What is known of a network without loading it: its label, family, body and how it was trained. Its weights are read, or
drawn, when it is asked for. What is computed of it is elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from classification.classifiers import build_classifier
from model_spec import ModelSpec
from models import build_model, encoder_name
from studies.explaining import weights_key
from studies.subjects import SEGMENTATION, Subject
from utils import InputError, digest

UNTRAINED = "untrained"
TRAININGS = {  # how a subject was trained -> how the study calls it, in the order in which it is shown
    "supervised": "classifier",
    "self-supervised": "self-supervised",
    "segmentation": "segmentation",
    UNTRAINED: UNTRAINED,
}


@dataclass(frozen=True)
class Walk:
    """One network as a path from image to answer.

    twin : the same network with random weights, those of its training's seed
    body : what its encoder is, whatever it was trained for
    """

    subject: Subject
    body: str
    twin: bool = False

    @property
    def label(self) -> str:
        return f"{self.body}, {UNTRAINED}" if self.twin else self.subject.label

    @property
    def name(self) -> str:
        """Of this network alone."""
        seed = self.subject.seed
        return self.label if seed is None else f"{self.label} ({seed})"

    @property
    def training(self) -> str:
        return UNTRAINED if self.twin else TRAININGS[self.subject.training]

    @property
    def key(self) -> str:
        """Of all that its activations depend on beside the images."""
        seed = [self.subject.seed] if self.twin else []
        return digest(weights_key(self.subject), self.twin, seed)

    def load(self, device: torch.device | str = "cpu") -> nn.Module:
        """The network in eval mode."""
        return (_untrained(self.subject).eval().to(device)) if self.twin else self.subject.load(device)

    def facts(self) -> dict:
        """What tables say of it."""
        subject = self.subject
        about = {"network": self.name, "label": self.label, "family": subject.family, "training": self.training}
        return about | {"seed": subject.seed, "body": self.body, "image_size": subject.image_size}


def walks_of(subjects: Sequence[Subject], untrained: bool = True) -> list[Walk]:
    """The networks, and for each body and seed one untrained twin; two networks of one name are refused.

    In the order of `TRAININGS`; a body is called as the first network with it. Bodies are the same where name and
    options of the encoder are.
    """
    titles: dict[str, str] = {}
    subjects = sorted(subjects, key=lambda subject: list(TRAININGS).index(subject.training))
    found = [Walk(subject, titles.setdefault(body_key(subject), subject.label)) for subject in subjects]
    twins = {(walk.body, walk.subject.seed): dataclasses.replace(walk, twin=True) for walk in reversed(found)}
    found += reversed(twins.values()) if untrained else []
    names = [walk.name for walk in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"two networks are called {twice!r}; leave out one folder, or its label with leave_out")
    return found


def body_key(subject: Subject) -> str:
    """Of what the encoder is: name and options, without weights, head or decoder."""
    if subject.kind != SEGMENTATION:
        spec = subject.spec or _stored(subject, "classifier.json")
        name, options = (spec.name, spec.options) if subject.spec else (spec["name"], spec["options"])
        return digest(name.partition(".")[0], dict(options))
    spec = ModelSpec(**{key: value for key, value in _stored(subject, "model.json").items() if key != "freeze"})
    if spec.name == "all_mlp":  # on a timm network as a classifier knows it
        return digest(spec.preset.partition(".")[0], dict(spec.options.get("body", {})))
    options = {key: value for key, value in spec.options.items() if key in ("encoder", "backbone", "hub")}
    return digest(spec.name if spec.name == "mask2former" else "", spec.preset, encoder_name(spec), options)


def _stored(subject: Subject, name: str) -> dict:
    return json.loads((subject.folder / name).read_text(encoding="utf-8"))["spec"]


def _untrained(subject: Subject) -> nn.Module:
    """The same network with the random weights that its training's seed draws."""
    seed = subject.seed or 0
    if subject.kind == SEGMENTATION:
        stored = _stored(subject, "model.json")
        return build_model(ModelSpec(**stored | {"freeze": tuple(stored["freeze"]), "weights": "none"}), seed)
    spec = subject.load().spec if subject.spec is None else subject.spec
    return build_classifier(dataclasses.replace(spec, weights="none"), seed)
