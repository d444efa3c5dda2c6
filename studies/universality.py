"""Do UNet++ and Mask2Former, trained on the same task, end up with the same internal representations?

Trains both with several seeds, scores them on the test images, records every informative site of each and of its
untrained twin on those images, and compares all sites × sites with a ruler: the null (permuted images), the ceiling
(the same architecture from another seed) and the floor (the untrained twins). Finished parts are never recomputed.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dataset import SegmentationDataset, make_loader
from images import duplicates
from inference import score
from locks import alone_in
from loss_metrics import summarize
from models import build_model, load_model
from settings import check_seeds
from similarity import Recording, record_models
from similarity.intervals import FEWEST_IMAGES
from similarity.policies import parse_policy
from sources import ImageSource, open_datasets
from studies import analysis
from studies import universality_report as report
from studies.controls import with_lesion
from studies.recordings import kept_recording
from studies.results_folder import open_results
from studies.ruler import ESTIMATORS, HEADLINE, NEIGHBOURS
from studies.stitched import matched_sites
from studies.timing import statistics_seconds, stitching_seconds, time_a_step, training_seconds
from train import Recipe, TrainConfig, check_recipe, is_finished, objective, train
from utils import (
    InputError,
    atomic_path,
    closest,
    format_seconds,
    progress,
    refuse_other_run,
    resolve_device,
    write_table,
)


@dataclass
class UniversalityConfig(ImageSource):
    """
    Args:
        seeds: of the trainings; at least two, or there is no ceiling
        models: the two recipes to compare
        policies: spatial policy -> estimators computed under it (linear_cka, linear_cka_biased, rbf_cka, svcca, rsa,
            mutual_knn, procrustes_distance, angular_distance, information_imbalance)
        permutations: of the images, for the null
        resamples: subsamples of the images, for the intervals
        alignment_splits: random halves of the images on which both models are brought into one space
        stitch_pairs: pairs of decoder sites that are stitched, in both directions; 0 leaves stitching out
        stitch_stride: only maps of image_size / stitch_stride cells a side are stitched; none: of every size
        stitch_images: training images that each stitch is trained on
        stitch_epochs: passes over them
        batch_size: images at a time when scoring and recording
        weights: overrides every model's weights: 'none' or 'imagenet'
        epochs: overrides every model's epochs
        overrides: settings of one model by its name, e.g. {"unetpp": {"weights": "encoder.safetensors"}}
        out: results folder; default results/universality, with the data's and preset's name unless both are the demo's
        device: auto, cpu or cuda
        workers: processes that read images
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1])
    models: list[Recipe] = field(default_factory=lambda: [Recipe(), Recipe(model="mask2former")])
    policies: dict[str, list[str]] = field(default_factory=lambda: {"gap": [HEADLINE]})
    permutations: int = 200
    resamples: int = 100
    alignment_splits: int = 5
    stitch_pairs: int = 2
    stitch_stride: int | None = None
    stitch_images: int = 200
    stitch_epochs: int = 1
    batch_size: int = 32
    weights: str | None = None
    epochs: int | None = None
    overrides: dict[str, dict] = field(default_factory=dict)
    out: str | None = None
    device: str = "auto"
    workers: int = 0


LEAST = {"permutations": 1, "resamples": 2, "alignment_splits": 1, "stitch_pairs": 0, "stitch_images": 1}
LEAST |= {"stitch_epochs": 0, "batch_size": 1, "workers": 0}
STATES = ("trained", "untrained", "pretrained")


@dataclass(frozen=True)
class Member:
    """One network of the study: which recipe, which seed, and how far it was trained.

    state : 'trained'; 'untrained' (its twin at random weights); 'pretrained' (its twin as training began, where an
        encoder came with weights)
    """

    recipe: Recipe
    seed: int
    state: str = "trained"

    @property
    def name(self) -> str:
        return f"{self.recipe.model}-seed{self.seed}" + ("" if self.state == "trained" else f"-{self.state}")


def run(config: UniversalityConfig) -> Path:
    """The whole study; returns the results folder."""
    config, datasets, folder = prepare(config)
    with alone_in(folder):
        device = resolve_device(config.device)
        print(f"{estimate(config, datasets)} Results: {folder}", flush=True)
        for member in members(config):
            train_member(config, member, datasets, folder)
        metrics = score_all(config, datasets["test"], folder, device)
        recordings = record_all(config, datasets["test"], folder, device)
        found = analyse(config, recordings, datasets, folder, device)
        report.write(config, folder, datasets, metrics, found, device)
    return folder


def prepare(config: UniversalityConfig) -> tuple[UniversalityConfig, dict[str, SegmentationDataset], Path]:
    """Everything that can be refused, before anything long: settings, models, every image, the results folder."""
    config = settle(config)
    device = resolve_device(config.device)
    refuse_other_run(Path(config.out), dataclasses.asdict(config))
    built = [build_model(recipe.spec) for recipe in config.models]  # unknown presets and missing weights
    if config.stitch_pairs and len(config.seeds) > 1:
        matched_sites(*built, image_size=config.image_size, stride=config.stitch_stride)
    datasets = open_datasets(config)
    check_test_images(config, datasets["test"])
    folder = open_results(config, datasets, device)
    if not config.is_synthetic:
        report_duplicates({name: data.pairs for name, data in datasets.items()}, config, folder)
    return config, datasets, folder


def check_test_images(config: UniversalityConfig, test: SegmentationDataset) -> None:
    """Refuse so few images that the null, the intervals or the controls would have nothing to go by."""
    if len(test) < FEWEST_IMAGES:
        raise InputError(
            f"{len(test)} test images: at least {FEWEST_IMAGES} are needed for a null and an interval; give a larger "
            "test split, or raise limits"
        )
    lesions = len(with_lesion(test))
    if lesions < FEWEST_IMAGES:
        raise InputError(
            f"{lesions} of {len(test)} test images have a lesion in their mask: give at least {FEWEST_IMAGES}"
        )
    neighbours = any("mutual_knn" in estimators for estimators in config.policies.values())
    if neighbours and len(test) // 2 < NEIGHBOURS + 2:
        raise InputError(
            f"mutual_knn looks at {NEIGHBOURS} neighbours in halves of {len(test)} test images: give at least "
            f"{2 * NEIGHBOURS + 4}, or leave it out of policies"
        )


def report_duplicates(splits: dict, config: UniversalityConfig, folder: Path) -> None:
    """Images that two splits share: a line on the terminal and duplicates.csv; they stay where the data put them."""
    shared = duplicates(splits, config.transform)
    write_table(shared, folder / "duplicates.csv")
    if len(shared):
        pairs = "; ".join(
            f"{r.id_a} ({r.split_a}) and {r.id_b} ({r.split_b}), {r.kind}" for r in shared.head(3).itertuples()
        )
        print(f"note: {len(shared)} pairs of images are the same in two splits, listed in duplicates.csv: {pairs}")


def settle(config: UniversalityConfig) -> UniversalityConfig:
    """Apply the overrides, choose the results folder, and refuse what cannot run."""
    # a frozen encoder is the pretrained one: without its weights there is nothing to keep
    changes = {"freeze": []} if config.weights == "none" else {}
    changes |= {key: getattr(config, key) for key in ("weights", "epochs") if getattr(config, key) is not None}
    if changes.get("weights") not in (None, "none", "imagenet"):
        raise InputError(
            f"--weights {changes['weights']}: a file belongs to one model; set weights in the YAML instead"
        )
    models = [dataclasses.replace(recipe, **changes) for recipe in config.models]
    models = _override(models, config.overrides)
    names = [recipe.model for recipe in models]
    if len(models) != 2 or len(set(names)) != 2:
        raise InputError(f"the study compares two different models, got {names}; give one recipe of each")
    if config.stitch_stride is not None and config.stitch_stride < 1:
        raise InputError(f"stitch_stride must be at least 1, got {config.stitch_stride}")
    for recipe in models:
        if recipe.weights == "none" and "encoder" in recipe.freeze:
            raise InputError(
                f"{recipe.model}: a frozen encoder without weights keeps its random ones; set weights, or freeze: []"
            )
        check_recipe(recipe)
        objective(recipe)
    for name, least in LEAST.items():
        if getattr(config, name) < least:
            raise InputError(f"{name} must be at least {least}, got {getattr(config, name)}")
    for policy, estimators in config.policies.items():
        _check_policy(policy, config.image_size)
        for name in estimators:
            if name not in ESTIMATORS:
                raise InputError(f"unknown measure {name!r} under {policy}; closest: {closest(name, ESTIMATORS)}")
    if HEADLINE not in config.policies.get("gap", []):
        raise InputError(f"policies must hold {HEADLINE} under gap: it is the headline of the summary")
    for policy, estimators in config.policies.items():
        if twice := {name for name in estimators if estimators.count(name) > 1}:
            raise InputError(f"policies: {policy} lists {min(twice)} twice; once is enough")
    check_seeds(config.seeds)
    out = config.out or default_folder(config)
    return dataclasses.replace(config, models=models, out=str(out))


def _override(models: list[Recipe], overrides: dict[str, dict]) -> list[Recipe]:
    """Recipes with the settings that were given for one model alone."""
    names = [recipe.model for recipe in models]
    known = [part.name for part in dataclasses.fields(Recipe)]
    for name, changes in overrides.items():
        if name not in names:
            raise InputError(f"overrides: no model {name!r} in this study; closest: {closest(name, names)}")
        for key in changes:
            if key not in known or key == "model":
                raise InputError(f"overrides of {name}: unknown setting {key!r}; closest: {closest(key, known)}")
    return [dataclasses.replace(recipe, **overrides.get(recipe.model, {})) for recipe in models]


def _check_policy(policy: str, image_size: int) -> None:
    """Policies of the study pool each image to a row, or to a grid that the first blocks of both models have."""
    try:
        kind, cells = parse_policy(policy)
    except ValueError as error:
        raise InputError(str(error)) from error
    if kind not in ("gap", "mask", "grid", "flat"):
        raise InputError(f"policy {policy!r} cannot be compared between models; use gap, mask, grid:g or flat:g")
    if kind == "grid" and cells > image_size // 4:
        raise InputError(
            f"policy {policy!r} is finer than the models' maps; at {image_size} px use grid:{image_size // 4}"
        )


def default_folder(config: UniversalityConfig) -> str:
    """results/universality for the synthetic demo; other images and presets get folders of their own."""
    presets = sorted({recipe.preset for recipe in config.models} - {"demo"})
    data = [] if config.is_synthetic else [Path(config.data).resolve().name]
    return "-".join(["results/universality", *data, *presets])


def members(config: UniversalityConfig, state: str = "trained") -> list[Member]:
    """The networks of the study in one state: recipes × seeds; pretrained twins only of recipes with weights."""
    recipes = [recipe for recipe in config.models if state != "pretrained" or recipe.weights != "none"]
    return [Member(recipe, seed, state) for recipe in recipes for seed in config.seeds]


def load_member(member: Member, folder: Path) -> nn.Module:
    """The best checkpoint, or for a twin the weights that its training could have, or did, start from."""
    if member.state == "trained":
        return load_model(folder / "models" / member.name / "best")[0]
    spec = dataclasses.replace(member.recipe.spec, freeze=())
    # the floor is the random-init twin, also where training starts from pretrained weights (SCIENCE, section 4)
    weights = spec.weights if member.state == "pretrained" else "none"
    return build_model(dataclasses.replace(spec, weights=weights), member.seed).eval()


def analyse(config: UniversalityConfig, recordings: dict, datasets: dict, folder: Path, device) -> analysis.Findings:
    """What the recordings, the masks and (stitched) the networks say."""
    by_name = {member.name: member for state in STATES for member in members(config, state)}
    masks = {member.name: load_file(masks_path(folder, member.name, datasets["test"])) for member in members(config)}
    return analysis.analyse(
        config, recordings, datasets, masks, lambda name: load_member(by_name[name], folder).to(device), folder
    )


# --------------------------------------------------------------------------------------------------------- estimate


def estimate(config: UniversalityConfig, datasets: dict[str, SegmentationDataset]) -> str:
    """One sentence: how long all will take here, from timed steps of both models on this machine."""
    sizes = {name: len(data.ids) for name, data in datasets.items()}
    left = [(recipe, sum(not _finished(config, recipe, seed) for seed in config.seeds)) for recipe in config.models]
    todo = sum(count for _, count in left)
    networks = sum(len(members(config, state)) for state in STATES)
    recorded = f"{networks} recordings of {sizes['test']} test images"
    if not todo:
        return (
            f"Trainings are finished; {recorded} and what is computed from them follow in minutes, unless they are "
            "there too."
        )
    timed = [time_a_step(recipe, datasets["train"], config.device) for recipe in config.models]
    trainings = sum(count * training_seconds(recipe, sizes, *each) for (recipe, count), each in zip(left, timed))
    seconds = trainings + statistics_seconds(config, sizes["test"]) + stitching_seconds(config, sizes["test"], timed)
    epochs = ", ".join(f"{recipe.model} {recipe.epochs} epochs" for recipe in config.models)
    return (
        f"{todo} trainings on {sizes['train']} images ({epochs}): about {format_seconds(trainings)}; with {recorded} "
        f"and what is computed from them about {format_seconds(seconds)} on this machine."
    )


def _finished(config: UniversalityConfig, recipe: Recipe, seed: int) -> bool:
    history = Path(config.out) / "models" / Member(recipe, seed).name / "history.csv"
    return history.exists() and is_finished(recipe, pd.read_csv(history)["validation_iou"])


# ------------------------------------------------------------------------------------------------------- the stages


def train_member(
    config: UniversalityConfig, member: Member, datasets: dict[str, SegmentationDataset], folder: Path
) -> Path:
    """Train one network (or find it trained) and return its run folder."""
    images = {f.name: getattr(config, f.name) for f in dataclasses.fields(ImageSource)}
    out = folder / "models" / member.name
    places = {"out": str(out), "device": config.device, "workers": config.workers}
    datasets["train"].seed = member.seed
    started, finished = time.perf_counter(), _finished(config, member.recipe, member.seed)
    job = TrainConfig(**images, **vars(member.recipe), seed=member.seed, **places)
    train(job, {name: datasets[name] for name in ("train", "validation")})
    best = pd.read_csv(out / "history.csv")["validation_iou"].max()
    took = "already trained" if finished else f"trained in {format_seconds(time.perf_counter() - started)}"
    print(f"{member.name}: {took}, best validation IoU {best:.3f}", flush=True)
    return out


def score_all(config: UniversalityConfig, test: SegmentationDataset, folder: Path, device) -> pd.DataFrame:
    """Per-image test metrics of every trained model; they and its masks are kept beside its checkpoint."""
    tables = []
    for member in members(config):
        path = folder / "models" / member.name / f"test_metrics-{test.fingerprint}.csv"
        masks = masks_path(folder, member.name, test)
        if not path.exists() or not masks.exists():
            model = load_member(member, folder).to(device)
            table, logits = score(model, make_loader(test, config.batch_size), f"scoring {member.name}")
            with atomic_path(masks) as temporary:
                save_file({id_: (output > 0).contiguous() for id_, output in logits.items()}, temporary)
            write_table(table, path)
        tables.append(pd.read_csv(path).assign(model=member.recipe.model, seed=member.seed))
    metrics = pd.concat(tables, ignore_index=True)
    write_table(metrics, folder / "test_metrics.csv")
    summaries = [
        summarize(group).assign(model=model, seed=seed) for (model, seed), group in metrics.groupby(["model", "seed"])
    ]
    write_table(pd.concat(summaries, ignore_index=True), folder / "test_summary.csv")
    return metrics


def masks_path(folder: Path, member: str, test: SegmentationDataset) -> Path:
    """Where a network's masks of the test images are kept: {id: (1, H, W) bool}."""
    return folder / "models" / member / f"test_masks-{test.fingerprint}.safetensors"


def record_all(
    config: UniversalityConfig, test: SegmentationDataset, folder: Path, device: torch.device
) -> dict[str, dict[str, Recording]]:
    """{member name: {policy: Recording}} on the test images; recordings of the same weights and images are reused."""
    found, missing = {}, {}
    everyone = [member for state in STATES for member in members(config, state)]
    for member in everyone:
        model = load_member(member, folder)
        paths = {policy: recording_path(folder, member.name, policy) for policy in config.policies}
        cached = {policy: kept_recording(path, model, test) for policy, path in paths.items()}
        if all(cached.values()):
            found[member.name] = cached
        else:
            missing[member.name] = model.to(device)
    if missing:
        loader = progress(make_loader(test, config.batch_size, workers=config.workers), desc="recording", unit="batch")
        made = record_models(missing, loader, policies=tuple(config.policies), data_hash=test.fingerprint)
        for name, recordings in made.items():
            for policy, recording in recordings.items():
                recording.save(recording_path(folder, name, policy))
        found |= made
    return {member.name: found[member.name] for member in everyone}


def recording_path(folder: Path, member: str, policy: str) -> Path:
    return folder / "recordings" / f"{member}-{policy.replace(':', '')}.safetensors"
