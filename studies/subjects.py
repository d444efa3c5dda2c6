"""The networks that a study looks at after they were trained: found in results folders, or named as pretrained ones.

A results folder is one of the universality study, of a grid (encoders, architectures) or of the classifiers study. What
is known of a network without loading it is plain data; its weights are read when it is asked for. What is done with the
networks is elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
import torch
import yaml
from torch import nn

from classification.classifiers import FAMILIES, ClassifierSpec, build_classifier, load_classifier
from classification.classifiers import family_of as classifier_family
from classification.origins import OBJECTIVES, SUPERVISED, TRAININGS, training_of
from kernel_layout import channels_last
from model_spec import TITLES, ModelSpec
from models import load_model
from recipes import TrainConfig, is_finished
from studies.cells import cells_of
from studies.families import family_of
from studies.grid import FINISHED
from studies.grid_tables import label_of
from utils import InputError, closest

SEGMENTATION, CLASSIFICATION = "segmentation", "classification"
REMEDY = "give a results folder as a study wrote it"


@dataclass(frozen=True)
class Subject:
    """One network.

    label : what it is apart from its seed; networks of one label are each other's ceiling
    family : 'CNN', 'transformer' or 'hybrid'
    seed : of its training; None of a pretrained network of others
    kind : 'segmentation' or 'classification'
    image_size : side of the square images that it was trained on
    folder : its checkpoint; None when `spec` says how to build it
    classes : of a classifier trained here, in the order of its answers; () of one of ImageNet's, or without a head
    source : the results folder that it is from
    training : 'supervised', 'self-supervised' or 'segmentation'; when not said, what its kind is trained by as a rule
    """

    label: str
    family: str
    seed: int | None
    kind: str
    image_size: int
    folder: Path | None = None
    spec: ClassifierSpec | None = None
    classes: tuple[str, ...] = ()
    source: Path | None = None
    training: str = ""

    def __post_init__(self):
        if not self.training:
            object.__setattr__(self, "training", SEGMENTATION if self.kind == SEGMENTATION else SUPERVISED)

    @property
    def name(self) -> str:
        """Of this network alone."""
        return self.label if self.seed is None else f"{self.label} ({self.seed})"

    def load(self, device: torch.device | str = "cpu") -> nn.Module:
        """The network in eval mode, its kernels with channels last: convnets answer and go back up to twice as fast."""
        if self.spec is not None:
            model = build_classifier(self.spec).eval()
        else:
            model, _ = (load_model if self.kind == SEGMENTATION else load_classifier)(self.folder)
        return channels_last(model.to(device))


def subjects_of(
    folders: Mapping[str, Sequence[str]],
    pretrained: Mapping[str, Mapping] | None = None,
    leave_out: Iterable[str] = (),
) -> list[Subject]:
    """All networks of some results folders, and pretrained classifiers by name, without those of some labels.

    folders : results folder -> the labels that are wanted of it; none: all
    pretrained : label -> fields of ClassifierSpec, of which `name` is needed and weights are ImageNet's when not said;
        family and training where they are not known by the name
    """
    found = subjects_in(folders, pretrained, leave_out)
    _refuse_mixtures(found)
    return found


def subjects_in(
    folders: Mapping[str, Sequence[str]],
    pretrained: Mapping[str, Mapping] | None = None,
    leave_out: Iterable[str] = (),
) -> list[Subject]:
    """As `subjects_of`, whatever the networks were trained for and however few they are."""
    found = [subject for folder, labels in folders.items() for subject in wanted_of(Path(folder), labels)]
    found += [named(label, dict(settings)) for label, settings in (pretrained or {}).items()]
    labels = list(dict.fromkeys(subject.label for subject in found))
    for label in leave_out:
        if label not in labels:
            raise InputError(f"leave_out: there is no network {label!r}; closest: {closest(label, labels)}")
    found = [subject for subject in found if subject.label not in set(leave_out)]
    _refuse_one_name(found)
    return found


def wanted_of(folder: Path, labels: Sequence[str]) -> list[Subject]:
    """The networks of one results folder that have one of these labels, or all of them."""
    found = networks_in(folder)
    there = list(dict.fromkeys(subject.label for subject in found))
    for label in labels:
        if label not in there:
            raise InputError(f"networks: {folder} has no {label!r}; closest: {closest(label, there)}")
    return [subject for subject in found if not labels or subject.label in labels]


def networks_in(folder: Path) -> list[Subject]:
    """The finished networks of one results folder; of a grid with several shares of the data, those on the largest."""
    if not folder.is_dir():
        raise InputError(f"networks: folder {folder} does not exist; give the results folder of a study that trained")
    for place, find in (("cells", _of_grid), ("models", _of_universality), ("networks", _of_classifiers)):
        if (folder / place).is_dir():
            found = find(folder)
            if found:
                return [dataclasses.replace(subject, source=folder) for subject in found]
    raise InputError(
        f"networks: {folder} holds no finished network (cells/, models/ or networks/ of a study that trained here); "
        "checkpoints are not committed: run the study that its config.yaml describes first"
    )


def named(label: str, settings: dict) -> Subject:
    """A pretrained classifier by its name; its weights are fetched, or read from a file, when it is built."""
    known = {field.name for field in fields(ClassifierSpec)} | {"family", "training"}
    for key in settings:
        if key not in known:
            raise InputError(f"pretrained {label!r}: unknown setting {key!r}; closest: {closest(key, known)}")
    if "name" not in settings:
        raise InputError(f"pretrained {label!r}: which network? give its name, such as {{name: resnet18}}")
    family = settings.pop("family", None) or classifier_family(settings["name"])
    if family not in FAMILIES:
        raise InputError(f"pretrained {label!r}: family {family!r} is none of {', '.join(FAMILIES)}")
    training = settings.pop("training", None) or training_of(settings["name"])
    if training not in TRAININGS:
        raise InputError(f"pretrained {label!r}: training {training!r} is none of {', '.join(TRAININGS)}")
    classes = 1000 if training == SUPERVISED else 0
    spec = ClassifierSpec(**{"weights": "imagenet", "classes": classes, "image_size": 224} | settings)
    return Subject(label, family, None, CLASSIFICATION, spec.image_size, spec=spec, training=training)


def _of_grid(folder: Path) -> list[Subject]:
    """Of cells/: their labels are known from the grid's own settings."""
    settings = settings_in(folder)
    if "axes" not in settings:
        raise InputError(f"{folder / 'config.yaml'} has no axes, which say what the cells are; {REMEDY}")
    by_name = {cell.name: cell for cell in cells_of(settings["axes"], settings.get("skip") or [])}
    found = []
    for path in sorted(folder.glob(f"cells/*/{FINISHED}")):
        if path.parent.name in by_name:
            cell = by_name[path.parent.name]
            found.append((settings_in(path.parent / "run"), _segmenter(path.parent / "run", label_of(cell))))
    most = max((run["fraction"] for run, _ in found), default=None)
    order = list(by_name)
    found = [subject for run, subject in found if run["fraction"] == most]
    return sorted(found, key=lambda subject: order.index(subject.folder.parents[1].name))


def _of_universality(folder: Path) -> list[Subject]:
    """Of models/; one in the middle of its training has a checkpoint of its best epoch, too, and is left out."""
    runs = [path.parents[1] for path in sorted(folder.glob("models/*/best/model.json"))]
    runs = [run for run in runs if _is_trained(run)]
    return [_segmenter(run, TITLES[settings_in(run)["model"]]) for run in runs]


def _is_trained(run: Path) -> bool:
    settings, history = settings_in(run), run / "history.csv"
    known = {field.name for field in fields(TrainConfig)}
    recipe = TrainConfig(**{key: value for key, value in settings.items() if key in known})
    return history.is_file() and is_finished(recipe, pd.read_csv(history)["validation_iou"])


def _segmenter(run: Path, label: str) -> Subject:
    """`label` says which architecture it is, also where its own study had no need to."""
    settings = settings_in(run)
    spec = _json(run / "best" / "model.json")["spec"]
    family = family_of(ModelSpec(**spec | {"freeze": tuple(spec["freeze"])}))
    title = TITLES[spec["name"]]
    label = label if title in label else f"{title}, {label}"
    return Subject(label, family, settings["seed"], SEGMENTATION, settings["image_size"], run / "best")


def _of_classifiers(folder: Path) -> list[Subject]:
    """Of networks/: the classifiers study's."""
    found, classes = [], tuple(stored_images(folder, "train", "classes"))
    for path in sorted(folder.glob("networks/*/finished.json")):
        about = path.with_name("classifier.json")
        stored = _json(about)
        spec, extra = stored["spec"], stored["extra"]
        if not {"label", "family", "seed"} <= set(extra):
            raise InputError(f"{about} says no label, family and seed of the classifier; {REMEDY}")
        of = (extra["label"], extra["family"], extra["seed"], CLASSIFICATION, spec["image_size"])
        objective = extra.get("objective", "supervised")  # networks of before have none
        if objective not in OBJECTIVES:
            raise InputError(f"{about}: objective {objective!r} is none of {', '.join(OBJECTIVES)}; {REMEDY}")
        training = OBJECTIVES[objective]
        answers = classes if spec["classes"] else ()
        found.append(Subject(*of, path.parent, classes=answers, training=training))
    return found


def settings_in(folder: Path) -> dict:
    """The config.yaml of a results or run folder."""
    path = folder / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); {REMEDY}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no settings; {REMEDY}")
    return settings


def stored_images(folder: Path, split: str, what: str):
    """What data.json of a results folder keeps of a split of its images, such as their hash."""
    stored = _json(folder / "data.json").get(split)
    if not isinstance(stored, dict) or what not in stored:
        raise InputError(f"{folder / 'data.json'} says no {what} of the {split} images; {REMEDY}")
    return stored[what]


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {REMEDY}") from error


def _refuse_mixtures(subjects: Sequence[Subject]) -> None:
    if len(subjects) < 2:
        raise InputError(f"{len(subjects)} networks: at least two are needed to compare what they look at")
    kinds = {subject.kind for subject in subjects}
    if len(kinds) > 1:
        raise InputError("some networks segment and some classify; explain them in two runs, with two --out folders")


def _refuse_one_name(subjects: Sequence[Subject]) -> None:
    names = [subject.name for subject in subjects]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"two networks are called {twice!r}; leave out one folder, or its label with leave_out")
    of_label: dict[str, tuple] = {}
    for subject in subjects:
        own = (subject.family, subject.image_size, subject.source, subject.training)
        if of_label.setdefault(subject.label, own) != own:
            raise InputError(
                f"networks called {subject.label!r} differ in more than their seed (family, training, image size or "
                "results folder), and would be each other's ceiling; leave one folder's out"
            )


def twins(subjects: Sequence[Subject]) -> list[tuple[str, str]]:
    """Pairs of names that differ in their seed alone."""
    return [(a.name, b.name) for place, a in enumerate(subjects) for b in subjects[place + 1 :] if a.label == b.label]
