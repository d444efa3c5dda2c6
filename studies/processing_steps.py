"""How do they get there? The processing steps of many networks, compared along their depths.

`python experiments.py processing_steps` records the networks of other studies' results folders (and pretrained ones by
name) on the same images and asks three questions (after Similarity of Processing Steps in Vision Model
Representations, arXiv 2601.21621, 2026): are two networks most alike at the same relative depth, and how unlike are
they there? Do transformers change more smoothly than CNNs? Which statistics of the images do sites keep, and where are
they lost? Without `networks` it trains some small ones first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch

from classification.photos import RECORD
from locks import alone_in
from processing.image_statistics import image_statistics
from processing.lesion_statistics import lesion_statistics
from settings import check_seed
from similarity.intervals import FEWEST_IMAGES
from similarity.policies import parse_policy
from sources import ImageSource
from studies import architectures, classifiers, processing_report, processing_work
from studies.explained_images import Chosen, choose
from studies.processing_work import Work
from studies.results_folder import open_with_hashes
from studies.subjects import CLASSIFICATION, SEGMENTATION, Subject, subjects_in
from studies.unseen import check_photographs, check_segmentation
from studies.walks import Walk, walks_of
from utils import (
    HOME,
    InputError,
    format_seconds,
    pick,
    progress,
    read_settings,
    refuse_other_run,
    resolve_device,
    write_table,
)

TRAINERS = {
    "classifiers": (classifiers.ClassifiersConfig, classifiers.run),
    "architectures": (architectures.ArchitecturesConfig, architectures.run),
}
LOW_LEVEL = ("luminance", "rms_contrast", "red_green", "yellow_blue", "edge_density", "spectral_slope")
LESION = ("area_share", "centre_x", "centre_y", "elongation", "border_contrast")


@dataclass
class ProcessingConfig(ImageSource):
    """
    Args:
        photographs: `data` holds photographs in train/CLASS/ and val/CLASS/ instead of segmentation images; nothing is
            asked of lesions then
        networks: results folders of studies that trained here (classifiers, universality, architectures, encoders),
            each with the labels that are wanted, [] for all: {"results/classifiers-imagenette": []}
        train: without networks, those of these YAMLs are trained first (or found trained), by study:
            {classifiers: [FILE, …], architectures: [FILE, …]}
        pretrained: networks of timm or torchvision beside them, label -> {name: resnet50, …}; weights are the
            pretrained ones when not said; self-supervised ones by timm's tags, such as
            {"DINOv2": {"name": "vit_small_patch14_dinov2.lvd142m", "classes": 0, "image_size": 224}}
        leave_out: labels of networks that are not looked at
        images: so many test images, or photographs evenly over the classes; all networks see the same
        untrained: whether every body is also looked at with random weights, as the floor
        policy: how space is reduced, such as gap (mean over places) or flat:2
        k: neighbours of the information imbalance
        neighbours: of mutual kNN
        statistics_size: side of the images, pixels, whose statistics are read out
        folds: of the read-out's cross-validation
        read_permutations: of the images, for the read-out's null
        permutations: of the sites, for the test of best matches, and of families over bodies
        resamples: halves of the images, for the intervals of matched depths
        intervals_of: labels whose networks (first seeds) get such intervals; none: all but untrained ones
        shown: pairs of labels whose planes are drawn and kept as a table (first seeds); none: four by a fixed rule
        batch_size: images in one pass
        jobs: networks at a time, in processes of their own
        seed: of the choice of images, folds and permutations
        out: results folder; default results/processing-steps- and the data's name
        device: auto, cpu or cuda
    """

    photographs: bool = False
    networks: dict[str, list[str]] = field(default_factory=dict)
    train: dict[str, list[str]] = field(default_factory=dict)
    pretrained: dict[str, dict[str, Any]] = field(default_factory=dict)
    leave_out: list[str] = field(default_factory=list)
    images: int = 1000
    untrained: bool = True
    policy: str = "gap"
    k: int = 1
    neighbours: int = 10
    statistics_size: int = 128
    folds: int = 5
    read_permutations: int = 100
    permutations: int = 999
    resamples: int = 40
    intervals_of: list[str] = field(default_factory=list)
    shown: list[list[str]] = field(default_factory=list)
    batch_size: int = 64
    jobs: int = 1
    seed: int = 0
    out: str | None = None
    device: str = "auto"

    @property
    def is_drawn(self) -> bool:
        """Whether the images are synthetic ones: the embedded set, or a folder of drawn ones."""
        return self.is_synthetic or (Path(self.data) / RECORD).is_file()


# settings that change what is made of the recordings, and not a recording: those are found by their own key
OF_THE_REPORT = ("networks", "train", "pretrained", "leave_out", "untrained", "k", "neighbours", "folds", "shown")
OF_THE_REPORT += ("read_permutations", "permutations", "resamples", "intervals_of", "batch_size", "jobs")


def run(config: ProcessingConfig) -> Path:
    """The whole study; returns the results folder."""
    config = settle(config)
    check_settings(config)
    refuse_other_run(Path(config.out), dataclasses.asdict(config), OF_THE_REPORT)
    if not config.networks and not config.pretrained:
        config = dataclasses.replace(config, networks={str(folder): [] for folder in train_first(config)})
    subjects = subjects_in(config.networks, config.pretrained, config.leave_out)
    walks = walks_of(subjects, config.untrained)
    check_labels(config, walks)
    chosen = choose_images(config, subjects)
    chosen, statistics = with_statistics(config, chosen)
    hashes = {"images": len(chosen.ids), "hash": chosen.fingerprint}
    folder = open_with_hashes(config, hashes, resolve_device(config.device), OF_THE_REPORT)
    with alone_in(folder):
        write_table(statistics, folder / "statistics.csv")
        asked = asked_of(config, chosen, statistics)
        print(expected(walks, asked, folder), f"Results: {folder}", flush=True)
        make_all(walks, asked, folder, config.jobs)
        processing_report.write(config, walks, asked, folder)
    return folder


def asked_of(config: ProcessingConfig, chosen: Chosen, statistics: pd.DataFrame) -> Work:
    """What is asked of every network."""
    options = {"k": config.k, "batch": config.batch_size, "seed": config.seed, "device": config.device}
    return Work(chosen, config.policy, statistics, config.folds, config.read_permutations, **options)


# ----------------------------------------------------------------------------------------------- settings and networks


def settle(config: ProcessingConfig) -> ProcessingConfig:
    """The results folder's name."""
    data = "synthetic" if config.is_synthetic else Path(config.data).resolve().name
    return dataclasses.replace(config, out=config.out or f"results/processing-steps-{data}")


def check_settings(config: ProcessingConfig) -> None:
    """Refuse what cannot be, before anything long."""
    for name in ("images", "k", "neighbours", "folds", "read_permutations", "permutations", "batch_size", "jobs"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.images < 2 * FEWEST_IMAGES:
        raise InputError(f"images: {config.images} are too few for halves of them; give at least {2 * FEWEST_IMAGES}")
    if config.resamples < 2 or config.folds < 2:
        raise InputError(f"resamples and folds must be at least 2, got {config.resamples} and {config.folds}")
    for name, most in (("k", config.images // 2 - 2), ("neighbours", config.images - 2), ("folds", config.images)):
        if getattr(config, name) > most:
            raise InputError(f"{name} must be at most {most} with {config.images} images, got {getattr(config, name)}")
    if config.statistics_size < 16:
        raise InputError(f"statistics_size must be at least 16 pixels, got {config.statistics_size}")
    try:
        kind, _ = parse_policy(config.policy)
    except ValueError as reason:
        raise InputError(f"policy: {reason}") from reason
    if kind not in ("gap", "mean", "flat"):
        raise InputError(f"policy {config.policy!r} gives no one row an image; use gap or flat:2")
    if config.photographs and config.is_synthetic:
        raise InputError("photographs: the synthetic set has lesions, not photographs; give a folder as data")
    for pair in config.shown:
        if len(pair) != 2:
            raise InputError(f"shown: {pair} is no pair of labels; give two, such as [ResNet, ViT]")
    for study in config.train:
        pick("study that trains networks", study, TRAINERS)
    check_seed(config.seed)
    resolve_device(config.device)


def train_first(config: ProcessingConfig) -> list[Path]:
    """The results folders of the studies that `train` describes, after running what is left of them."""
    if not config.train:
        raise InputError("networks: give results folders of studies that trained, `train` YAMLs, or `pretrained` names")
    if not config.is_synthetic:
        raise InputError("networks: give the results folders of studies that trained on these images")
    folders = []
    for study, names in config.train.items():
        kind, runner = TRAINERS[study]
        for name in names:
            found = [path for path in (Path(name), HOME / name) if path.is_file()]
            if not found:
                raise InputError(f"train: {name} does not exist; give a YAML of the {study} study, or networks")
            settings = read_settings(kind, "processing_steps", ["--config", str(found[0])])
            folders.append(runner(dataclasses.replace(settings, device=config.device)))
    return folders


def check_labels(config: ProcessingConfig, walks: list[Walk]) -> None:
    """Refuse labels that no network has, and runs of one network."""
    labels = dict.fromkeys(walk.label for walk in walks)
    for name in (*config.intervals_of, *(label for pair in config.shown for label in pair)):
        pick("label of a network", name, labels)
    if len(walks) < 2:
        raise InputError(f"{len(walks)} network: at least two are compared; give more networks")


# ------------------------------------------------------------------------------------------------------------ images


def choose_images(config: ProcessingConfig, subjects: list[Subject]) -> Chosen:
    """The same images for all networks, which none of them was trained on."""
    kind = CLASSIFICATION if config.photographs else SEGMENTATION
    if not config.photographs:
        check_segmentation(config, subjects)
    sizes = sorted({config.statistics_size, *(subject.image_size for subject in subjects)})
    chosen = choose(config, kind, config.images, sizes, seed=config.seed)
    if len(chosen.ids) < config.images:
        raise InputError(f"images: {config.images} were asked for, and there are {len(chosen.ids)}; lower it")
    if config.photographs:
        check_photographs(chosen.ids, subjects)
    return chosen


def with_statistics(config: ProcessingConfig, chosen: Chosen) -> tuple[Chosen, pd.DataFrame]:
    """The images that have every statistic, and these: id, statistic, value, reason, of all images that were chosen."""
    images = chosen.at(config.statistics_size)
    parts = [image_statistics(images.pixels, images.ids)]
    if not config.photographs:
        masks = (images.masks > 0).float()
        parts.append(lesion_statistics(masks, images.pixels, images.ids))
    table = pd.concat(parts, ignore_index=True)
    table = table[table["statistic"].isin([*LOW_LEVEL, *LESION])]
    without = sorted(set(table.loc[~np.isfinite(table["value"]), "id"]))
    left = chosen.without(without)
    if len(left.ids) < FEWEST_IMAGES * 2:
        reason = table.loc[~np.isfinite(table["value"]), "reason"].iloc[0]
        raise InputError(f"only {len(left.ids)} images have every statistic (of others: {reason}); give more images")
    return left, table


# ------------------------------------------------------------------------------------------------------- the networks


def make_all(walks: list[Walk], asked: Work, folder: Path, jobs: int) -> None:
    """All that is asked of each network; what is finished is not made again."""
    if jobs == 1:
        for walk in progress(walks, desc="processing steps", unit="network"):
            processing_work.work(walk, asked, folder)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    tasks = (joblib.delayed(processing_work.work)(walk, asked, folder, threads) for walk in walks)
    joblib.Parallel(n_jobs=jobs)(tasks)


def expected(walks: list[Walk], asked: Work, folder: Path) -> str:
    """What is to be done, in a sentence: networks, sites, images, and how long by one network's own time."""
    left = [walk for walk in walks if processing_work.kept_table(walk, asked, folder) is None]
    if not left:
        return f"All {len(walks)} networks are recorded; tables and figures follow."
    first = left[0]
    seconds, sites = processing_work.timed(first, asked)
    guess = format_seconds(seconds * len(left))
    return (
        f"{len(left)} of {len(walks)} networks to record on {len(asked.chosen.ids)} images ({first.name} has {sites} "
        f"sites), and {asked.statistics['statistic'].nunique()} statistics to read out of every site: about {guess}, "
        "one network at a time; then planes over all their sites."
    )
