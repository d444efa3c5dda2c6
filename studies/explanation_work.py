"""What an explanation study does with one network: predict, record, explain, check; each part kept once it is made.

Everything is found again by what it depends on: the network's weights, the images, the method's settings. How long it
takes is estimated here from timed passes. Networks are compared elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from answers import decided, pixel_logits
from explanations.targets import Target
from similarity import Recording, record
from studies import explaining, explanation_checks
from studies.explained_images import Chosen, Images, own_classes, target_of
from studies.explaining import Made, Way
from studies.explanation_checks import Checks
from studies.subjects import SEGMENTATION, Subject
from utils import InputError, atomic_path, digest, format_seconds, resolve_device


@dataclass(frozen=True)
class Job:
    """What is asked of every network; see `ExplanationsConfig`."""

    chosen: Chosen
    ways: list[Way]
    checks: Checks
    mask: str
    label: int | None
    batch: int
    seed: int
    device: str

    @property
    def asked(self) -> dict:
        """What maps depend on beside network, images and way."""
        return {"mask": self.mask, "label": self.label, "seed": self.seed}


def first_of_each_label(subjects: Iterable[Subject]) -> list[Subject]:
    """One network a label: the first seed."""
    return list({subject.label: subject for subject in reversed(list(subjects))}.values())[::-1]


def work(subject: Subject, job: Job, folder: Path, again: bool) -> None:
    """Make what is missing of one network; again : whether it is explained again for the checks."""
    if not missing(subject, job, folder, again):
        return
    model = subject.load(resolve_device(job.device))
    images = job.chosen.at(subject.image_size)
    predict(subject, model, images, job, folder)
    recorded(subject, model, images, job, folder)
    made = {way.name: explained(subject, model, images, way, job, folder) for way in job.ways}
    check(subject, model, images, made, job, folder, again)


def missing(subject: Subject, job: Job, folder: Path, again: bool) -> bool:
    """Whether something is still to be made."""
    parts = [kept(subject, way, job, folder) for way in job.ways]
    if any(part is None or part.refused for part in parts):
        return True
    tables = checked(subject, job, folder, again)
    own = [predictions(subject, job, folder), recording(subject, job, folder), tables]
    return any(part is None for part in own) or not _covers(tables, parts)


def _covers(tables: Mapping[str, pd.DataFrame], parts: Iterable[Made]) -> bool:
    """Whether all variants were checked: what was refused before may have been made since."""
    return {variant for part in parts for variant in part.maps} <= set(tables["curves"]["variant"])


# --------------------------------------------------------------------------------------------------------------- parts


def target(subject: Subject, model: nn.Module, images: Images, job: Job) -> Target:
    return target_of(subject, model, images, job.chosen, job.mask, job.label)


def explained(subject: Subject, model: nn.Module, images: Images, way: Way, job: Job, folder: Path) -> Made:
    """The maps of one way: kept ones, or made now."""
    found = kept(subject, way, job, folder)
    if found is not None and not found.refused:
        return found
    part = images.first(way.images)
    try:
        asked = target(subject, model, part, job)
    except InputError as error:  # what this network cannot be asked at all
        found = Made({}, {}, {}, part.ids, {}, dict.fromkeys(way.variants, str(error)), 0.0)
    else:
        found = explaining.make(way, model, part, asked, batch=job.batch, seed=job.seed)
    path = explaining.place_of(folder, subject, way)
    explaining.keep(path, found, explaining.key(subject, job.chosen, way, job.asked))
    return found


def kept(subject: Subject, way: Way, job: Job, folder: Path) -> Made | None:
    """The maps of one way if they are there."""
    expected = explaining.key(subject, job.chosen, way, job.asked)
    return explaining.known(explaining.place_of(folder, subject, way), expected)


def check(
    subject: Subject, model: nn.Module, images: Images, made: Mapping[str, Made], job: Job, folder: Path, again: bool
) -> None:
    """The tables of `explanation_checks`, unless they are there."""
    found = checked(subject, job, folder, again)
    if found is not None and _covers(found, made.values()):
        return
    variants = {
        variant: (way, made[way.name]) for way in job.ways for variant in way.variants if variant in made[way.name].maps
    }
    if not variants:
        return
    tables = explanation_checks.check(
        subject,
        model,
        images,
        job.chosen,
        lambda part: target(subject, model, part, job),
        variants,
        _checks(job, again),
        label=job.label,
        batch=job.batch,
        seed=job.seed,
    )
    explanation_checks.keep(explaining.place_of(folder, subject, "checks"), tables, _check_key(subject, job, again))


def checked(subject: Subject, job: Job, folder: Path, again: bool) -> dict[str, pd.DataFrame] | None:
    """The tables of a network's checks if they are there."""
    return explanation_checks.known(explaining.place_of(folder, subject, "checks"), _check_key(subject, job, again))


def _checks(job: Job, again: bool) -> Checks:
    return dataclasses.replace(job.checks, again=again)


def _check_key(subject: Subject, job: Job, again: bool) -> str:
    ways = [explaining.key(subject, job.chosen, way, job.asked) for way in job.ways]
    return digest(ways, asdict(_checks(job, again)))


def predict(
    subject: Subject, model: nn.Module, images: Images, job: Job, folder: Path, name: str = "predictions"
) -> dict[str, Tensor]:
    """id -> what the network answers: its mask (H, W) bool; or (2,): probability of the own class, 1 where it wins.

    name : of the file that they are kept in
    """
    found = predictions(subject, job, folder, name)
    if found is not None:
        return found
    answers = []
    device = next(model.parameters()).device
    own = None if subject.kind == SEGMENTATION else own_classes(model, images, job.chosen)
    with torch.no_grad():
        for rows in torch.arange(len(images.ids)).split(job.batch):
            pixels = images.pixels[rows].to(device)
            if own is None:
                seen = decided(pixel_logits(model, pixels))[:, 0].cpu()
                answers.append(seen == (1 if job.label is None else job.label))
            else:
                logits = model(pixels).cpu()
                share = logits.softmax(1).gather(1, own[rows, None])[:, 0]
                answers.append(torch.stack([share, (logits.argmax(1) == own[rows]).float()], 1))
    values = torch.cat(answers)
    path = explaining.place_of(folder, subject, name).with_suffix(".safetensors")
    about = {"key": _images_key(subject, job), "ids": "\n".join(images.ids)}
    with atomic_path(path) as temporary:
        save_file({"values": values.contiguous()}, temporary, about)
    return dict(zip(images.ids, values))


def predictions(subject: Subject, job: Job, folder: Path, name: str = "predictions") -> dict[str, Tensor] | None:
    """As `predict`, if they are there."""
    path = explaining.place_of(folder, subject, name).with_suffix(".safetensors")
    try:
        with safe_open(path, "pt") as stored:
            about = stored.metadata()
            if about["key"] != _images_key(subject, job):
                return None
            return dict(zip(about["ids"].split("\n"), stored.get_tensor("values")))
    except (OSError, KeyError, SafetensorError):  # not there, or cut short
        return None


def _images_key(subject: Subject, job: Job) -> str:
    nothing = Way("nothing", "occlusion", len(job.chosen.ids))
    return explaining.key(subject, job.chosen, nothing, {"label": job.label})


def recorded(subject: Subject, model: nn.Module, images: Images, job: Job, folder: Path) -> Recording:
    """The network's own sites under gap, for what its explanations are set beside."""
    found = recording(subject, job, folder)
    if found is None:
        path = explaining.place_of(folder, subject, "recording").with_suffix(".safetensors")
        batches = [
            (images.pixels[rows], [images.ids[row] for row in rows])
            for rows in torch.arange(len(images.ids)).split(job.batch)
        ]
        found = record(model, batches, policy="gap", data_hash=_images_key(subject, job))
        found.save(path)
    return found


def recording(subject: Subject, job: Job, folder: Path) -> Recording | None:
    """As `recorded`, if it is there; its data hash is of images and weights."""
    path = explaining.place_of(folder, subject, "recording").with_suffix(".safetensors")
    if not path.exists():
        return None
    try:
        return Recording.load(path, data_hash=_images_key(subject, job))
    except (SafetensorError, ValueError):  # cut short, of another version, or stale
        return None


def empty_predictions(subjects: Sequence[Subject], job: Job, folder: Path) -> dict[str, list[str]]:
    """network -> ids of the images in which it outlines nothing.

    Kept beside the predictions of the images that are left then, which would else take their place, and they theirs.
    """
    empty, name = {}, "predictions_of_all"
    for subject in subjects:
        found = predictions(subject, job, folder, name)
        if found is None:
            model = subject.load(resolve_device(job.device))
            found = predict(subject, model, job.chosen.at(subject.image_size), job, folder, name)
        empty[subject.name] = [name for name, mask in found.items() if not mask.any()]
    return empty


# ---------------------------------------------------------------------------------------------------------------- cost


def estimate(subjects: Sequence[Subject], job: Job, folder: Path) -> str:
    """How many explanations are to be made, and how long that may take, from passes timed on one network a label."""
    known: dict[str, tuple[float, float]] = {}
    seconds, count = 0.0, 0
    for subject in subjects:
        left = [way for way in job.ways if kept(subject, way, job, folder) is None]
        if not left:
            continue
        if subject.label not in known:
            model = subject.load(resolve_device(job.device))
            images = job.chosen.first(job.batch).at(subject.image_size)
            known[subject.label] = explaining.time_passes(model, images, target(subject, model, images, job), job.batch)
        seconds += explaining.seconds_of(left, *known[subject.label])
        count += sum(way.images * len(way.variants) for way in left)
    if not count:
        return f"All explanations of {len(subjects)} networks are there."
    return (
        f"{count} explanations of {len(subjects)} networks to make: about {format_seconds(seconds)} one network at a "
        "time, and about a third more for the checks."
    )
