"""Do the models look at the same things? Explanations of many trained networks, made, tested and compared.

`python experiments.py explanations` explains the networks of other studies' results folders (and pretrained classifiers
by name) on the same images by several methods, asks whether each method is faithful to each network, compares what the
methods say about two networks with its null (other images) and its ceiling (another seed), groups the networks by it,
and asks whether the groups follow CNN and transformer. Without `networks` it trains some small ones first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
import torch

from classification.origins import SELF_SUPERVISED
from explanations.agreement import FRACTION, SIGMA, SIMILARITIES
from explanations.targets import WHICH
from locks import alone_in
from settings import check_seed
from sources import ImageSource
from studies import architectures, explanation_report, explanation_work
from studies.classifiers import ClassifiersConfig, photo_folder
from studies.explained_images import Chosen, choose
from studies.explanation_checks import Checks
from studies.explanation_verdicts import ALPHA
from studies.explanation_ways import refuse_one_folder, ways_of
from studies.explanation_work import Job
from studies.results_folder import open_with_hashes
from studies.subjects import SEGMENTATION, Subject, settings_in, subjects_of
from studies.unseen import check_photographs, check_segmentation
from utils import (
    HOME,
    InputError,
    closest,
    pick,
    progress,
    read_settings,
    refuse_other_run,
    resolve_device,
)

COVERS = ("mask", "box", "centre")


@dataclass
class ExplanationsConfig(ImageSource):
    """
    Args:
        networks: results folders of studies that trained here (universality, architectures, encoders, classifiers),
            each with the labels that are wanted, [] for all: {"results/architectures-isic2018": []}
        train: without networks, those of this YAML of the architectures study are trained first (or found trained)
        pretrained: classifiers beside them, label -> {name: of timm, weights: a file, …}; weights are ImageNet's when
            not said, such as {"ResNet-18": {"name": "resnet18"}}
        leave_out: labels of networks that are not explained
        images: so many test images, or photographs evenly over the classes; all networks see the same
        methods: method (integrated_gradients, grad_cam, kernel_shap, occlusion) -> its settings: images (the first so
            many), baseline (mean, blur, blur:σ), steps, features (cells a side, or superpixels:N), samples, depths,
            relu; a method may come twice under other names with `method` among its settings
        mask: of segmentation networks: the summed logit inside the 'true' or the 'predicted' mask is explained
        label: of segmentation networks of several classes: which class
        compared_at: cells a side to which maps are averaged before two networks are compared
        similarities: of two maps: cosine, rbf, spearman, kappa
        sigma: of rbf, for maps of norm 1
        top: share of the cells, for kappa
        permutations: of the images, for the null
        resamples: of the images, for the intervals
        check_images: images that deletion and insertion curves are drawn for
        check_cells: cells a side that these curves remove as a whole
        few_images: images that are explained again with random weights, and with the object covered
        levels: of the randomisation, from the output to the input
        cover: what is covered: mask, box or centre (of photographs, whose objects nobody outlined)
        batch_size: pictures in one pass, which bounds memory
        jobs: networks at a time, in processes of their own
        seed: of the choice of images, coalitions and permutations
        out: results folder; default results/explanations- and the data's name
        device: auto, cpu or cuda
    """

    networks: dict[str, list[str]] = field(default_factory=dict)
    train: str = "configs/architectures_demo.yaml"
    pretrained: dict[str, dict[str, Any]] = field(default_factory=dict)
    leave_out: list[str] = field(default_factory=list)
    images: int = 40
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {"kernel_shap": {}, "grad_cam": {}})
    mask: str = "true"
    label: int | None = None
    compared_at: int = 32
    similarities: list[str] = field(default_factory=lambda: list(SIMILARITIES))
    sigma: float = SIGMA
    top: float = FRACTION
    permutations: int = 999
    resamples: int = 1000
    check_images: int = 16
    check_cells: int = 8
    few_images: int = 8
    levels: int = 4
    cover: str = "mask"
    batch_size: int = 16
    jobs: int = 1
    seed: int = 0
    out: str | None = None
    device: str = "auto"


# Settings that change which maps are asked for or what is made of them, and not a map: a map's own settings are in the
# name of its file, so that a folder may be asked for more.
OF_THE_REPORT = ("networks", "train", "pretrained", "leave_out", "compared_at", "similarities", "sigma", "top")
OF_THE_REPORT += ("permutations", "resamples", "jobs", "batch_size", "methods", "check_images", "few_images", "levels")
OF_THE_REPORT += ("check_cells", "cover")


def run(config: ExplanationsConfig) -> Path:
    """The whole study; returns the results folder."""
    config = settle(config)
    check_settings(config)
    refuse_other_run(Path(config.out), dataclasses.asdict(config), OF_THE_REPORT)
    if not config.networks and not config.pretrained:
        config = dataclasses.replace(config, networks={str(train_first(config)): []})
    subjects = subjects_of(config.networks, config.pretrained, config.leave_out)
    check_subjects(config, subjects)
    source = images_of(config, subjects)
    pool = choose_images(config, source, subjects)
    hashes = {"images": len(pool.ids), "hash": pool.fingerprint}
    folder = open_with_hashes(config, hashes, resolve_device(config.device), OF_THE_REPORT)
    with alone_in(folder):
        job = job_of(config, subjects, pool, folder)
        print(explanation_work.estimate(subjects, job, folder), f"Results: {folder}", flush=True)
        unasked = explain_all(subjects, job, folder, config.jobs)
        left = [subject for subject in subjects if subject.name not in unasked]
        if len(left) < 2:
            raise InputError(f"only {len(left)} networks can be asked: {'; '.join(map(': '.join, unasked.items()))}")
        explanation_report.write(config, left, job, folder, unasked)
    return folder


def job_of(config: ExplanationsConfig, subjects: list[Subject], pool: Chosen, folder: Path) -> Job:
    """What is asked of every network, about the first images of the pool."""
    checks = Checks(config.check_images, config.few_images, config.check_cells, config.levels, config.cover)
    ways = ways_of(config.methods, config.images)
    job = Job(pool, ways, checks, config.mask, config.label, config.batch_size, config.seed, config.device)
    left = without_empty(job, subjects, folder) if config.mask == "predicted" else pool
    if len(left.ids) < config.images:
        raise InputError(
            f"images: {config.images} were asked for, and {len(left.ids)} can be explained"
            f"{' (in the others some network outlines nothing)' if config.mask == 'predicted' else ''}; lower it"
        )
    return dataclasses.replace(job, chosen=left.first(config.images))


def settle(config: ExplanationsConfig) -> ExplanationsConfig:
    """The results folder's name."""
    data = "synthetic" if config.is_synthetic else Path(config.data).resolve().name
    return dataclasses.replace(config, out=config.out or f"results/explanations-{data}")


def check_settings(config: ExplanationsConfig) -> None:
    """Refuse what cannot be, before anything long."""
    check_seed(config.seed)
    counts = ("images", "compared_at", "permutations", "resamples", "check_images", "check_cells", "few_images")
    for name in (*counts, "levels", "batch_size", "jobs"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")
    for name in config.similarities:
        pick("similarity of explanations", name, SIMILARITIES)
    if not config.similarities:
        raise InputError(f"similarities: none is given; choose from {', '.join(SIMILARITIES)}")
    for name, value, choices in (("mask", config.mask, WHICH), ("cover", config.cover, COVERS)):
        if value not in choices:
            raise InputError(f"unknown {name} {value!r}; closest: {closest(value, choices)}")
    if not config.sigma > 0 or not 0 < config.top < 1:
        raise InputError(f"sigma must be above 0 and top between 0 and 1: got {config.sigma}, {config.top}")
    for name in ("check_images", "few_images"):
        if getattr(config, name) > config.images:
            raise InputError(f"{name} is {getattr(config, name)}, and {config.images} images are chosen; lower it")
    marked = int(config.top * config.compared_at**2 + 0.5)
    if "kappa" in config.similarities and not 0 < marked < config.compared_at**2:
        raise InputError(f"top {config.top} of {config.compared_at} × {config.compared_at} cells marks {marked}")
    if 0.5**config.check_images >= ALPHA:  # the smallest p of a signed-rank test
        raise InputError(f"check_images {config.check_images}: no method can beat random maps at p < {ALPHA}; give 5")
    few = [way.name for way in ways_of(config.methods, config.images) if 0.5**way.images >= ALPHA]
    if few:
        raise InputError(f"methods, {few[0]!r}: with so few images nothing can be shown of it; give at least 5")
    resolve_device(config.device)


def train_first(config: ExplanationsConfig) -> Path:
    """The results folder of the architectures study that `train` describes, after running what is left of it."""
    if not config.is_synthetic:
        raise InputError("networks: give the results folder of a study that trained on these images")
    found = [path for path in (Path(config.train), HOME / config.train) if path.is_file()]
    if not found:
        raise InputError(f"train: {config.train} does not exist; give a YAML of the architectures study, or networks")
    settings = read_settings(architectures.ArchitecturesConfig, "explanations", ["--config", str(found[0])])
    return architectures.run(dataclasses.replace(settings, device=config.device))


def check_subjects(config: ExplanationsConfig, subjects: list[Subject]) -> None:
    """Refuse settings that do not fit what the networks do."""
    refuse_one_folder("networks", [subject.name for subject in subjects])
    smallest = min(subject.image_size for subject in subjects)
    if config.check_cells > smallest:
        raise InputError(f"check_cells {config.check_cells} a side do not fit images of {smallest} px; lower it")
    if subjects[0].kind == SEGMENTATION:
        if config.label is not None and not 0 <= config.label < config.num_classes:
            raise InputError(f"label {config.label} is none of the classes 0 to {config.num_classes - 1}")
        return
    headless = next((subject.label for subject in subjects if subject.training == SELF_SUPERVISED), None)
    if headless:
        raise InputError(
            f"{headless!r} was trained without labels and answers no class to explain; leave it out: leave_out"
        )
    if config.cover != "centre" and not config.is_synthetic:
        raise InputError(f"cover {config.cover!r} needs masks, and photographs have none; use cover centre")
    if config.mask != "true" or config.label is not None:
        raise InputError("mask and label are of segmentation networks; these classify: leave both out")


def images_of(config: ExplanationsConfig, subjects: list[Subject]) -> ImageSource:
    """Where the images are, after refusing networks that were trained on others, or on these."""
    if subjects[0].kind == SEGMENTATION:
        check_segmentation(config, subjects)
        return config
    if config.is_synthetic:  # what the classifiers were trained on, drawn again
        return dataclasses.replace(config, data=str(photo_folder(drawn_for(config))))
    return config


def drawn_for(config: ExplanationsConfig) -> ClassifiersConfig:
    """The settings of the classifiers study whose synthetic photographs are explained."""
    if not config.networks:
        raise InputError("data synthetic: no network was trained on it; give a folder of photographs as data")
    studies = {folder: ClassifiersConfig(**settings_in(Path(folder))) for folder in config.networks}
    for folder, own in studies.items():
        if not own.is_synthetic:
            raise InputError(f"the networks of {folder} were trained on {own.data}, not on synthetic images; give data")
    return next(iter(studies.values()))


def choose_images(config: ExplanationsConfig, source: ImageSource, subjects: list[Subject]) -> Chosen:
    """The images in the order in which they are explained; more than are needed where some may have to be left out."""
    sizes = sorted({subject.image_size for subject in subjects})
    count = None if config.mask == "predicted" else config.images
    chosen = choose(source, subjects[0].kind, count, sizes, label=config.label, seed=config.seed)
    check_photographs(chosen.ids, subjects)
    return chosen


def without_empty(job: Job, subjects: list[Subject], folder: Path) -> Chosen:
    """The pool without the images in which some network outlines nothing: there would be nothing to sum."""
    empty = explanation_work.empty_predictions(subjects, job, folder)
    return job.chosen.without(sorted({name for names in empty.values() for name in names}))


def explain_all(subjects: list[Subject], job: Job, folder: Path, jobs: int) -> dict[str, str]:
    """All that is asked of each network; what is finished is not made again. {network: why it can be asked nothing}."""
    again = explanation_work.first_of_each_label(subjects)
    if jobs == 1:
        bar = progress(subjects, desc="explanations", unit="network")
        reasons = [explanation_work.work(subject, job, folder, subject in again) for subject in bar]
    else:
        tasks = (joblib.delayed(explanation_work.work)(each, job, folder, each in again) for each in subjects)
        with joblib.parallel_config("loky", inner_max_num_threads=max(1, torch.get_num_threads() // jobs)):
            reasons = joblib.Parallel(n_jobs=jobs)(tasks)
    return {subject.name: why for subject, why in zip(subjects, reasons) if why}
