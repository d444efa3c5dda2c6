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
from studies.explaining import CANNOT, Made, path_of, reason
from studies.explanation_checks import RANDOM, Asked, Checks
from studies.explanation_ways import Way, slug
from studies.subjects import SEGMENTATION, Subject
from utils import atomic_path, digest, format_seconds, resolve_device


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

    def checks_of(self, again: bool) -> Checks:
        """The checks of a network that is, or is not, explained again."""
        return dataclasses.replace(self.checks, again=again)


def first_of_each_label(subjects: Iterable[Subject]) -> list[Subject]:
    """One network a label: the first seed."""
    firsts: dict[str, Subject] = {}
    for subject in subjects:
        firsts.setdefault(subject.label, subject)
    return list(firsts.values())


def work(subject: Subject, job: Job, folder: Path, again: bool) -> str:
    """Make what is missing of one network; '' or why this network can be asked nothing.

    again : whether it is explained again for the checks
    """
    if not missing(subject, job, folder, again):
        return ""
    try:
        model = subject.load(resolve_device(job.device))
        images = job.chosen.at(subject.image_size)
        predict(subject, model, images, job, folder)
        recorded(subject, model, images, job, folder)
    except CANNOT as error:
        return reason(error)
    made = {way.name: explained(subject, model, images, way, job, folder) for way in job.ways}
    check(subject, model, images, made, job, folder, again)
    return ""


def missing(subject: Subject, job: Job, folder: Path, again: bool) -> bool:
    """Whether something is still to be made."""
    parts = {way.name: kept(subject, way, job, folder, maps=False) for way in job.ways}
    if any(part is None or not part.finished for part in parts.values()):
        return True
    own = [predictions(subject, job, folder), recording(subject, job, folder)]
    checked = [_kept_checks(subject, way, job, folder, again) for way in _checked_ways(job, parts)]
    return any(part is None for part in [*own, *checked])


def _checked_ways(job: Job, made: Mapping[str, Made]) -> list[Way | None]:
    """The ways that gave maps, and None for random maps where there is any."""
    ways = [way for way in job.ways if made[way.name].maps]
    return [*ways, None] if ways else []


# ------------------------------------------------------------------------------------------------------------ explained


def target(subject: Subject, model: nn.Module, images: Images, job: Job) -> Target:
    return target_of(subject, model, images, job.chosen, job.mask, job.label)


def explained(subject: Subject, model: nn.Module, images: Images, way: Way, job: Job, folder: Path) -> Made:
    """The maps of one way: kept ones, or made now."""
    found = kept(subject, way, job, folder)
    if found is not None and found.finished:
        return found
    part = images.first(way.images)
    try:
        asked = target(subject, model, part, job)
    except CANNOT as error:  # what this network cannot be asked at all
        found = Made({}, {}, {}, part.ids, {}, dict.fromkeys(way.variants, reason(error)), 0.0)
    else:
        found = explaining.make(way, model, part, asked, batch=job.batch, seed=job.seed)
    expected = explaining.key(subject, job.chosen, way, job.asked)
    explaining.keep(path_of(folder, subject, way.name, expected), found, expected)
    return found


def kept(subject: Subject, way: Way, job: Job, folder: Path, *, maps: bool = True) -> Made | None:
    """The maps of one way if they are there, or without `maps` what there is beside them."""
    expected = explaining.key(subject, job.chosen, way, job.asked)
    return explaining.known(path_of(folder, subject, way.name, expected), expected, maps=maps)


# -------------------------------------------------------------------------------------------------------------- checked


def check(
    subject: Subject, model: nn.Module, images: Images, made: Mapping[str, Made], job: Job, folder: Path, again: bool
) -> None:
    """The tables of `explanation_checks` that are not there."""
    asked = Asked(
        subject,
        model,
        images,
        job.chosen,
        lambda part: target(subject, model, part, job),
        job.label,
        job.batch,
        job.seed,
    )
    checks = job.checks_of(again)
    for way in _checked_ways(job, made):
        if _kept_checks(subject, way, job, folder, again) is not None:
            continue
        if way is None:
            tables = explanation_checks.random_curves(asked, checks)
        else:
            tables = explanation_checks.check_way(asked, way, made[way.name], checks)
        place, expected = _checks_place(subject, way, job, folder, again)
        explanation_checks.keep(place, tables, expected)


def checked(subject: Subject, job: Job, folder: Path, again: bool) -> dict[str, pd.DataFrame] | None:
    """The tables of a network's checks, of all its ways together; None where it was explained in no way."""
    made = {way.name: kept(subject, way, job, folder, maps=False) for way in job.ways}
    if any(part is None for part in made.values()):
        return None
    parts = [_kept_checks(subject, way, job, folder, again) for way in _checked_ways(job, made)]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: pd.concat([part[name] for part in parts if name in part]) for name in names} or None


def _kept_checks(subject: Subject, way: Way | None, job: Job, folder: Path, again: bool) -> dict | None:
    return explanation_checks.known(*_checks_place(subject, way, job, folder, again))


def _checks_place(subject: Subject, way: Way | None, job: Job, folder: Path, again: bool) -> tuple[Path, str]:
    """(folder, key) of one way's checks, or of those of random maps."""
    asked = _images_key(subject, job) if way is None else explaining.key(subject, job.chosen, way, job.asked)
    expected = digest(asked, job.asked, asdict(job.checks_of(again and way is not None)))
    name = RANDOM if way is None else way.name
    return folder / "explanations" / slug(subject.name) / f"{slug(name)}-{expected[:8]}", expected


# -------------------------------------------------------------------------------------------------- predicted, recorded


def predict(subject: Subject, model: nn.Module, images: Images, job: Job, folder: Path) -> dict[str, Tensor]:
    """id -> what the network answers: its mask (H, W) bool; or (2,): probability of the own class, 1 where it wins."""
    found = predictions(subject, job, folder)
    if found is not None:
        return found
    device = next(model.parameters()).device
    own = None if subject.kind == SEGMENTATION else own_classes(subject, images, job.chosen)
    label = 1 if job.label is None else job.label
    answers = []
    with torch.no_grad():
        for rows in torch.arange(len(images.ids)).split(job.batch):
            pixels = images.pixels[rows].to(device)
            if own is None:
                answers.append(decided(pixel_logits(model, pixels))[:, 0].cpu() == label)
            else:
                logits = model(pixels).cpu()
                share = logits.softmax(1).gather(1, own[rows, None])[:, 0]
                answers.append(torch.stack([share, (logits.argmax(1) == own[rows]).float()], 1))
    values = torch.cat(answers)
    expected = _images_key(subject, job)
    with atomic_path(path_of(folder, subject, "predictions", expected)) as temporary:
        about = {"key": expected, "ids": "\n".join(images.ids)}
        save_file({"values": values.contiguous()}, temporary, about)
    return dict(zip(images.ids, values))


def predictions(subject: Subject, job: Job, folder: Path) -> dict[str, Tensor] | None:
    """As `predict`, if they are there."""
    expected = _images_key(subject, job)
    try:
        with safe_open(path_of(folder, subject, "predictions", expected), "pt") as stored:
            about = stored.metadata()
            if about["key"] != expected:
                return None
            return dict(zip(about["ids"].split("\n"), stored.get_tensor("values")))
    except (OSError, KeyError, SafetensorError):  # not there, or cut short
        return None


def _images_key(subject: Subject, job: Job) -> str:
    """Of what a network answers for all images, and of what it computes."""
    return explaining.key(subject, job.chosen, Way("all", "none", len(job.chosen.ids), {}), {"label": job.label})


def recorded(subject: Subject, model: nn.Module, images: Images, job: Job, folder: Path) -> Recording:
    """The network's own sites under gap, for what its explanations are set beside."""
    found = recording(subject, job, folder)
    if found is None:
        expected = _images_key(subject, job)
        batches = [
            (images.pixels[rows], [images.ids[row] for row in rows])
            for rows in torch.arange(len(images.ids)).split(job.batch)
        ]
        found = record(model, batches, policy="gap", data_hash=expected)
        found.save(path_of(folder, subject, "recording", expected))
    return found


def recording(subject: Subject, job: Job, folder: Path) -> Recording | None:
    """As `recorded`, if it is there; its data hash is of images and weights."""
    expected = _images_key(subject, job)
    path = path_of(folder, subject, "recording", expected)
    if not path.exists():
        return None
    try:
        return Recording.load(path, data_hash=expected)
    except (SafetensorError, ValueError):  # cut short, of another version, or stale
        return None


def empty_predictions(subjects: Sequence[Subject], job: Job, folder: Path) -> dict[str, list[str]]:
    """network -> ids of the images in which it outlines nothing; a network that cannot be asked has none."""
    empty = {}
    for subject in subjects:
        found = predictions(subject, job, folder)
        if found is None:
            try:
                model = subject.load(resolve_device(job.device))
                found = predict(subject, model, job.chosen.at(subject.image_size), job, folder)
            except CANNOT:  # `work` says why
                continue
        empty[subject.name] = [name for name, mask in found.items() if not mask.any()]
    return empty


# ----------------------------------------------------------------------------------------------------------------- cost


def estimate(subjects: Sequence[Subject], job: Job, folder: Path) -> str:
    """How many explanations are to be made, and how long that may take, from passes timed on one network a label."""
    again = {subject.name for subject in first_of_each_label(subjects)}
    known: dict[str, tuple[float, float]] = {}
    seconds, count = 0.0, 0
    for subject in subjects:
        made = {way.name: kept(subject, way, job, folder, maps=False) for way in job.ways}
        left = [way for way in job.ways if made[way.name] is None]
        checks = job.checks_of(subject.name in again)
        checkable = [way for way in job.ways if made[way.name] is None or made[way.name].maps]
        unchecked = [way for way in checkable if _kept_checks(subject, way, job, folder, checks.again) is None]
        if not unchecked:
            continue
        if subject.label not in known:
            known[subject.label] = _timed(subject, job)
        passes = [(way.images * way.passes[0], way.images * way.passes[1]) for way in left]
        passes += [checks.passes(way) for way in unchecked]
        seconds += sum(forward * known[subject.label][0] + back * known[subject.label][1] for forward, back in passes)
        count += sum(way.images * len(way.variants) for way in left)
    if not known:
        return f"All explanations of {len(subjects)} networks are there."
    return (
        f"{count} explanations of {len(subjects)} networks to make and to check: about {format_seconds(seconds)}, one "
        "network at a time."
    )


def _timed(subject: Subject, job: Job) -> tuple[float, float]:
    """(forward, backward) seconds of an image; nothing for a network that cannot be asked, which `work` says."""
    try:
        model = subject.load(resolve_device(job.device))
        images = job.chosen.first(job.batch).at(subject.image_size)
        return explaining.time_passes(model, images, target(subject, model, images, job), job.batch)
    except CANNOT:
        return 0.0, 0.0
