"""What the earlier study published, what its own recipe gives when it is run again, and the corrected numbers.

Trains the two models by its recipe from two seeds and measures the same networks both ways: as it did
(`legacy_protocol`, faults included) and by the corrected protocol (images matched by id, debiased estimators, null,
floor, ceiling). Not for any other comparison of models: that is `universality`. No figure is made here; `table.csv` is
what one is made from.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

import train as training
from dataset import SegmentationDataset, make_loader
from locks import alone_in
from model_sites import declare_site
from models import TITLES, build_model, load_model
from recipes import Recipe, TrainConfig, check_recipe, objective
from settings import check_seeds
from similarity import Plane, Recording, calibration, plane, record_models
from similarity.inputs import SMALLEST_N
from similarity.nulls import Null, plane_null
from sources import ImageSource, open_datasets
from studies.legacy_protocol import legacy_freeze, legacy_rows, legacy_similarities
from studies.legacy_report import CORRECTED, KEY, headline, short_site, write
from studies.results_folder import open_results
from utils import (
    HOME,
    InputError,
    closest,
    progress,
    refuse_other_run,
    resolve_device,
)

PUBLISHED = HOME / "studies" / "published.csv"
SIDES = ("unetpp", "mask2former")  # first and second model of every pair
FREEZING = ("substring", "module", "none")


@dataclass(frozen=True)
class SitePair:
    """One pair of sites, in either spelling of transformers.

    published : its name in published.csv; empty where nothing was published of it
    """

    unetpp: str
    mask2former: str
    published: str = ""

    @property
    def name(self) -> str:
        return self.published or f"{short_site(self.unetpp)} × {short_site(self.mask2former)}"


@dataclass
class LegacyConfig(ImageSource):
    """
    Args:
        seeds: of the runs of the recipe; two or more
        models: the two recipes, of unetpp and of mask2former
        pairs: of sites, with the names of their rows in studies/published.csv
        freezing: substring (the earlier study's: every parameter with "encoder" in its name, batch norms drifting),
            module (the encoder, in eval mode), or none
        mixed_precision: no, fp16 or bf16; on a CPU always no
        cuts: how often the rows of the same networks are cut anew by the earlier study's random permutations
        permutations: of the images, for the corrected protocol's null
        batch_size: images at a time when recording; the earlier study's order of rows depends on it
        weights: overrides every model's weights: 'none' (then nothing is frozen) or 'imagenet'
        epochs: overrides every model's epochs
        out: results folder; default results/legacy-, and the data's name and the presets
        device: auto, cpu or cuda
        workers: processes that read images
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1])
    models: list[Recipe] = field(default_factory=lambda: [Recipe(model=name) for name in SIDES])
    pairs: list[SitePair] = field(default_factory=list)
    freezing: str = "substring"
    mixed_precision: str = "no"
    cuts: int = 20
    permutations: int = 200
    batch_size: int = 16
    weights: str | None = None
    epochs: int | None = None
    out: str | None = None
    device: str = "auto"
    workers: int = 0

    @property
    def own_models_and_data(self) -> bool:
        """Whether these are the earlier study's models, weights and image size, so that its numbers may be expected."""
        same = all((recipe.preset, recipe.weights) == ("isic2018", "imagenet") for recipe in self.models)
        return same and not self.is_synthetic and self.image_size == 128 and self.freezing == "substring"


def run(config: LegacyConfig) -> Path:
    """The whole study; returns the results folder."""
    config, datasets, sites, folder = prepare(config)
    device = resolve_device(config.device)
    epochs = ", ".join(f"{TITLES[recipe.model]} {recipe.epochs} epochs" for recipe in config.models)
    print(
        f"{len(config.seeds)} runs of the recipe on {len(datasets['train'])} images ({epochs}), measured on "
        f"{len(datasets['validation'])} validation images; finished trainings are kept. Results: {folder}",
        flush=True,
    )
    with alone_in(folder):
        for recipe, seed in itertools.product(config.models, config.seeds):
            train_network(config, recipe, seed, datasets, folder, device)
        rows, recordings = measure_networks(config, datasets["validation"], sites, folder, device)
        parts = [
            published(config),
            by_the_legacy_protocol(config, rows),
            by_the_corrected_one(config, recordings, sites),
        ]
        observations = pd.concat(parts, ignore_index=True)
        tables = {
            "legacy": observations,
            "table": headline(config, observations),
            "control": against_itself(config, rows, recordings, sites),
        }
        write(config, tables, datasets, folder)
    return folder


def prepare(config: LegacyConfig) -> tuple[LegacyConfig, dict[str, SegmentationDataset], dict[str, dict], Path]:
    """Everything that can be refused, before anything long: (settings, images, sites, results folder).

    sites : {model: {site as the settings write it: as this version of transformers spells it}}
    """
    config = settle(config)
    settings = dataclasses.asdict(config)
    device = resolve_device(config.device)
    refuse_other_run(Path(config.out), settings)
    sites = {recipe.model: _resolved(config, recipe) for recipe in config.models}
    datasets = open_datasets(config, needed=("train", "validation"))
    if len(datasets["validation"]) < SMALLEST_N:
        raise InputError(
            f"{len(datasets['validation'])} validation images: at least {SMALLEST_N} are needed to compare anything"
        )
    return config, datasets, sites, open_results(config, datasets, device)


def settle(config: LegacyConfig) -> LegacyConfig:
    """Apply the overrides, choose the results folder, and refuse what cannot run."""
    if config.weights not in (None, "none", "imagenet"):
        raise InputError(f"weights {config.weights!r} for both models: use none or imagenet, or set it in the YAML")
    if config.weights == "none":  # a frozen encoder is the pretrained one: without its weights there is nothing to keep
        config = dataclasses.replace(config, freezing="none")
    if config.freezing not in FREEZING:
        raise InputError(f"unknown freezing {config.freezing!r}; use {', '.join(FREEZING)}")
    changes = {key: getattr(config, key) for key in ("weights", "epochs") if getattr(config, key) is not None}
    changes |= {"freeze": ["encoder"] if config.freezing == "module" else []}
    models = [dataclasses.replace(recipe, **changes) for recipe in config.models]
    if tuple(recipe.model for recipe in models) != SIDES:
        raise InputError(f"models are {[recipe.model for recipe in models]}; give one of {' and one of '.join(SIDES)}")
    for given, recipe in zip(config.models, models):
        if given.freeze not in ([], recipe.freeze):
            raise InputError(f"{given.model}: freeze {given.freeze}; leave it out here and set freezing instead")
        check_recipe(recipe)
        objective(recipe)
    least = {"cuts": 2, "permutations": 1, "batch_size": 1, "workers": 0}
    for name, number in least.items():
        if getattr(config, name) < number:
            raise InputError(f"{name} must be at least {number}, got {getattr(config, name)}")
    if len(config.seeds) < 2 or len(set(config.seeds)) != len(config.seeds) or min(config.seeds) < 0:
        raise InputError(f"seeds must be two different numbers or more, from 0 up, got {config.seeds}")
    check_seeds(config.seeds)
    _check_pairs(config.pairs)
    return dataclasses.replace(config, models=models, out=str(config.out or default_folder(config)))


def _check_pairs(pairs: list[SitePair]) -> None:
    names, known = [pair.name for pair in pairs], set(_printed()["pair"])
    if not pairs or len(set(names)) != len(names):
        raise InputError("pairs must hold pairs of sites, each once; configs/legacy.yaml has the published ones")
    for pair in pairs:
        if pair.published and pair.published not in known:
            raise InputError(f"unknown published pair {pair.published!r}; closest: {closest(pair.published, known)}")


def default_folder(config: LegacyConfig) -> str:
    """results/legacy-synthetic, or the data folder's name instead, and the presets unless they are the demo's."""
    presets = sorted({recipe.preset for recipe in config.models} - {"demo"})
    return "-".join(
        ["results/legacy", "synthetic" if config.is_synthetic else Path(config.data).resolve().name, *presets]
    )


def _resolved(config: LegacyConfig, recipe: Recipe) -> dict[str, str]:
    model = build_model(recipe.spec)
    try:
        return {site: declare_site(model, site).name for site in (getattr(p, recipe.model) for p in config.pairs)}
    except ValueError as error:  # of an unknown module, with the closest names
        raise InputError(f"pairs, {recipe.model}: {error}") from error


# ------------------------------------------------------------------------------------------------------- the networks


def network(recipe: Recipe, seed: int, *, trained: bool = True) -> str:
    """A network's name, of its folder under models/ too."""
    return f"{recipe.model}-seed{seed}{'' if trained else '-untrained'}"


def train_network(config, recipe: Recipe, seed: int, datasets: dict, folder: Path, device: torch.device) -> None:
    """Train one network as the earlier study did, or find it trained.

    The substring freezing is no setting of the training door, so it is applied to the model that the door has built;
    the optimiser leaves alone what has no gradient.
    """
    images = {f.name: getattr(config, f.name) for f in dataclasses.fields(ImageSource)}
    out = folder / "models" / network(recipe, seed)
    places = {"out": str(out), "device": config.device, "workers": config.workers}
    precision = config.mixed_precision if device.type == "cuda" else "no"
    job = TrainConfig(**images, **vars(recipe), seed=seed, mixed_precision=precision, **places)
    datasets["train"].seed = seed
    run_of_it = training.prepare(job, datasets)
    frozen = legacy_freeze(run_of_it.plain) if config.freezing == "substring" else []
    run_of_it.open_folder()
    with alone_in(out):
        run_of_it.resume()
        run_of_it.finish_epochs()
    last = pd.read_csv(out / "history.csv").iloc[-1]
    how = f", {len(frozen)} tensors frozen by name" if frozen else ""
    print(f"{network(recipe, seed)}: epoch {last.epoch:.0f}, validation IoU {last.validation_iou:.3f}{how}", flush=True)


def measure_networks(config, validation: SegmentationDataset, sites: dict, folder: Path, device: torch.device):
    """(rows, recordings): {network: {site: rows as the earlier study kept them}} and {network: Recording under gap}.

    Rows of trained networks only; recordings also of their untrained twins. The last checkpoint is measured, not the
    best: the earlier study kept a fixed epoch.
    """
    models, wanted, rows = {}, {}, {}
    loader = make_loader(validation, config.batch_size, workers=config.workers)
    for recipe, seed, trained in itertools.product(config.models, config.seeds, (True, False)):
        name, asked = network(recipe, seed, trained=trained), sites[recipe.model]
        models[name] = _loaded(recipe, seed, folder, trained).to(device)
        wanted[name] = list(dict.fromkeys(asked.values()))
        if trained:  # plain hooks know modules, not their calls
            modules = [site for site in asked if "@" not in site and ":" not in site]
            rows[name] = legacy_rows(models[name], progress(loader, desc=f"hooks on {name}", unit="batch"), modules)
    batches = progress(loader, desc="recording", unit="batch")
    recordings = record_models(models, batches, wanted, data_hash=validation.fingerprint)
    return rows, {name: made["gap"] for name, made in recordings.items()}


def _loaded(recipe: Recipe, seed: int, folder: Path, trained: bool) -> nn.Module:
    if trained:
        return load_model(folder / "models" / network(recipe, seed) / "last")[0]
    return build_model(dataclasses.replace(recipe.spec, weights="none", freeze=()), seed).eval()


# --------------------------------------------------------------------------------------------------- the observations


def _printed() -> pd.DataFrame:
    return pd.read_csv(PUBLISHED, comment="#", dtype={"printed": str}, keep_default_na=False)


def published(config: LegacyConfig) -> pd.DataFrame:
    """The printed numbers of the chosen pairs, as observations; `run` is 1, or 2 where a pair was printed twice."""
    table = _printed()
    table = table[table["pair"].isin([pair.published for pair in config.pairs])]
    fixed = {"protocol": "published", "run": table["printing"], "cut": 0, "quantity": "value", "note": ""}
    return table[KEY].assign(value=table["printed"].astype(float), **fixed)


def by_the_legacy_protocol(config: LegacyConfig, rows: dict) -> pd.DataFrame:
    """The earlier study's four numbers of every pair, run of the recipe and random cut, as observations."""
    found = []
    for (place, pair), (number, seed) in itertools.product(enumerate(config.pairs), enumerate(config.seeds, 1)):
        X, Y = (rows[network(recipe, seed)].get(getattr(pair, recipe.model)) for recipe in config.models)
        if X is None or Y is None:
            continue
        for cut in range(config.cuts):
            values = legacy_similarities(X, Y, np.random.default_rng([seed, place, cut]))
            found += [_seen(pair, measure, "legacy", number, value, cut=cut) for measure, value in values.items()]
    return pd.DataFrame(found)


def _seen(pair: SitePair, measure: str, protocol: str, run_number: int, value: float, **rest) -> dict:
    """One observation; run 0 is all runs together."""
    fixed = {"pair": pair.name, "measure": measure, "protocol": protocol, "run": run_number, "cut": 0}
    return fixed | {"quantity": "value", "value": value, "note": ""} | rest


def by_the_corrected_one(config: LegacyConfig, recordings: dict[str, Recording], sites: dict) -> pd.DataFrame:
    """Similarity of the same networks with null, floor, ceiling and u; where there is no number, NaN and a note."""
    first, second = config.models
    runs = [(network(first, seed), network(second, seed)) for seed in config.seeds]
    twins = [tuple(network(recipe, seed, trained=False) for recipe in config.models) for seed in config.seeds]
    own = [itertools.combinations([network(recipe, seed) for seed in config.seeds], 2) for recipe in config.models]
    places = {pair: tuple(sites[side][getattr(pair, side)] for side in SIDES) for pair in config.pairs}
    comparisons = [runs, twins, *map(list, own)]
    found = []
    for name, options in progress(CORRECTED.items(), desc="comparing", unit="measure"):
        cross, *others = (
            [plane(name, recordings[a], recordings[b], **options) for a, b in networks] for networks in comparisons
        )
        notes = {pair: _why_no_number(cross, recordings, runs[0], place) for pair, place in places.items()}
        usable = [places[pair] for pair, note in notes.items() if not note]
        asked = {"pairs": usable, "permutations": config.permutations} | options
        paired = enumerate(runs) if usable else []
        nulls = [plane_null(name, recordings[a], recordings[b], seed=s, **asked) for s, (a, b) in paired]
        for pair, note in notes.items():
            if note:
                found.append(_seen(pair, name, "corrected", 0, np.nan, note=note))
            else:
                numbers = _on_the_ruler(cross, *others, nulls, *places[pair])
                found += [_seen(pair, name, "corrected", run, value, quantity=key) for run, key, value in numbers]
    return pd.DataFrame(found)


def _why_no_number(cross: list[Plane], recordings: dict, names: tuple[str, str], place: tuple[str, str]) -> str:
    """Why two sites are not compared: a scalar site, one that is constant over images, or too small a one; else ''."""
    for name, site in zip(names, place):
        if recordings[name].matrix(site).shape[1] == 1:
            return f"{site} is a scalar: one number an image once it is averaged over space"
    missing = (each.notes.get(place, "no number") for each in cross if np.isnan(each.frame().loc[place]))
    return next(missing, "")


def _on_the_ruler(cross, floors, own_a, own_b, nulls: list[Null], a: str, b: str) -> list[tuple[int, str, float]]:
    """(run, quantity, value) of one pair of sites; run 0 is all runs together. Definitions: SCIENCE, section 4."""
    values = [each.frame().loc[a, b] for each in cross]
    floor = np.mean([each.frame().loc[a, b] for each in floors])
    seed_to_seed = (np.mean([e.frame().loc[s, s] for e in planes]) for planes, s in ((own_a, a), (own_b, b)))
    ceiling = float(calibration.geometric_ceiling(*seed_to_seed))
    numbers = [(run, "value", value) for run, value in enumerate(values, 1)]
    for run, null in enumerate(nulls, 1):
        at = null.rows.index(a), null.columns.index(b)
        numbers += [(run, "null_high", null.high()[at]), (run, "p_value", null.p_values()[at])]
    u = calibration.position(float(np.mean(values)), float(floor), ceiling)
    return [*numbers, (0, "floor", floor), (0, "ceiling", ceiling), (0, "u", u)]


def against_itself(config: LegacyConfig, rows: dict, recordings: dict[str, Recording], sites: dict) -> pd.DataFrame:
    """A control: each site of the first run's networks compared with itself, both ways; every measure should say 1."""
    found = []
    for recipe in config.models:
        name = network(recipe, config.seeds[0])
        own = {measure: plane(measure, recordings[name], **options) for measure, options in CORRECTED.items()}
        for place, (site, X) in enumerate(rows[name].items()):
            for measure, value in legacy_similarities(X, X, np.random.default_rng([config.seeds[0], place])).items():
                spelled = sites[recipe.model][site]
                corrected = own[measure].frame().loc[spelled, spelled]
                found.append((recipe.model, site, measure, len(X), value, corrected))
    return pd.DataFrame(found, columns=["model", "site", "measure", "legacy_rows", "legacy", "corrected"])
