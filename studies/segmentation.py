"""How well do models outline lesions, and what does each switch of a recipe change?

Trains a recipe and its variants (the recipe with some settings changed) from several seeds, scores each network on the
test images as it is and with test-time flips, and reports the metrics with intervals over seeds and images, the
difference of each variant from the recipe on the same images, and the answer of all seeds together. What is finished
is never computed again.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

import visualization
from dataset import SegmentationDataset, make_loader
from images import Transform
from inference import load_ensemble, score_split
from locks import alone_in
from loss_metrics import METRICS
from models import TITLES, build_model
from recipes import TrainConfig, check_cache_features, check_recipe, objective
from settings import check_label, check_seeds
from sources import CHOICE_OF_IMAGES, open_datasets
from train import train
from utils import (
    InputError,
    closest,
    git_commit,
    markdown_table,
    open_run,
    refuse_other_run,
    resolve_device,
    write_table,
    write_text,
)

RECIPE = "recipe"  # the name of the recipe itself among its variants
SHARED = {"seed", "out", *CHOICE_OF_IMAGES}  # settings that no variant has for itself
RESAMPLES = 2000


@dataclass
class SegmentationConfig(TrainConfig):
    """
    Args:
        seeds: of the trainings of each variant
        variants: name -> settings that differ from the recipe, such as {"no flips": {"flips": false}}
        full_resolution: score at each image's own size, against its mask as it is
        out: results folder; default results/segmentation and the data's name
    """

    seeds: list[int] = field(default_factory=lambda: [0])
    variants: dict[str, dict] = field(default_factory=dict)
    full_resolution: bool = False
    out: str | None = None


def run(config: SegmentationConfig) -> Path:
    """The whole study; returns the results folder."""
    device = resolve_device(config.device)
    config = dataclasses.replace(config, out=config.out or default_folder(config))
    jobs = trainings(config)
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "seed"}
    refuse_other_run(Path(config.out), settings)
    for name in (RECIPE, *config.variants):
        build_model(jobs[name, config.seeds[0]].spec)  # unknown presets and missing weights
    opened: dict[Transform, dict[str, SegmentationDataset]] = {}
    datasets = {name: _datasets(jobs[name, config.seeds[0]], opened) for name in (RECIPE, *config.variants)}
    folder = open_run(Path(config.out), settings, device)
    with alone_in(folder):
        write_text(folder / "data.json", json.dumps(_hashes(opened), indent=1) + "\n")
        for (name, seed), job in jobs.items():
            train_one(name, seed, job, datasets[name])
        metrics = pd.concat([score_variant(config, name, datasets) for name in (RECIPE, *config.variants)])
        write_table(metrics, folder / "per_image.csv")
        counts = {split: len(data.ids) for split, data in datasets[RECIPE].items()}
        report(config, folder, metrics, counts, {key: Path(job.out) for key, job in jobs.items()})
    return folder


def trainings(config: SegmentationConfig) -> dict[tuple[str, int], TrainConfig]:
    """{(variant, seed): its training}, the recipe first; refuses settings that do not exist or cannot run."""
    check_seeds(config.seeds)
    for name in config.variants:
        check_label("variant", name)
    if RECIPE in config.variants:
        raise InputError(f"a variant may not be called {RECIPE!r}: that is the recipe without changes; rename it")
    known = {part.name for part in dataclasses.fields(TrainConfig)}
    base = {name: getattr(config, name) for name in known}
    jobs = {}
    for name, changes in {RECIPE: {}, **config.variants}.items():
        for key in changes:
            if key not in known:
                raise InputError(f"variant {name!r}: unknown setting {key!r}; closest: {closest(key, known)}")
            if key in SHARED:
                raise InputError(f"variant {name!r} may not change {key}: variants are compared on the same images")
        for seed in config.seeds:
            own = {"seed": seed, "out": str(_network(config, name, seed))}
            jobs[name, seed] = TrainConfig(**(base | changes | own))
        check_recipe(jobs[name, config.seeds[0]])
        check_cache_features(jobs[name, config.seeds[0]])
        objective(jobs[name, config.seeds[0]])
    return jobs


def default_folder(config: SegmentationConfig) -> str:
    """results/segmentation-synthetic, or the data folder's name instead, and the model's name."""
    data = "synthetic" if config.is_synthetic else Path(config.data).resolve().name
    return f"results/segmentation-{data}-{config.model}"


def _datasets(job: TrainConfig, opened: dict) -> dict[str, SegmentationDataset]:
    """Train, validation and test images of a training; those of one transform are checked once."""
    if job.transform not in opened:
        opened[job.transform] = open_datasets(job)
    return opened[job.transform]


def _hashes(opened: dict[Transform, dict[str, SegmentationDataset]]) -> dict[str, str]:
    """{'64 px, train': hash of these images}, whatever the augmentation."""
    return {
        f"{transform.size} px, {split}": data.fingerprint
        for transform, splits in opened.items()
        for split, data in splits.items()
    }


def _network(config: SegmentationConfig, name: str, seed: int) -> Path:
    return Path(config.out) / "models" / f"{name.replace(' ', '_')}-seed{seed}"


def train_one(name: str, seed: int, job: TrainConfig, datasets: dict[str, SegmentationDataset]) -> None:
    """Train one network, or find it trained."""
    datasets["train"].seed = seed
    train(job, {split: datasets[split] for split in ("train", "validation")})
    history = pd.read_csv(Path(job.out) / "history.csv")
    minutes = history["seconds"].sum() / 60
    print(f"{name}, seed {seed}: validation IoU {history['validation_iou'].max():.4f}, {minutes:.1f} min", flush=True)


# ------------------------------------------------------------------------------------------------------------ scoring


def score_variant(config: SegmentationConfig, name: str, datasets: dict) -> pd.DataFrame:
    """Per-image test metrics of each seed's network and of all together: columns variant, seed, flips, id, METRICS."""
    outs = {str(seed): [_network(config, name, seed)] for seed in config.seeds}
    if len(config.seeds) > 1:
        outs["all"] = [out for (out,) in list(outs.values())]
    test = datasets[name]["test"]
    tables = []
    for seed, networks in outs.items():
        for flips in (False, True):
            path = networks[0] / f"test-{seed}{'-flips' if flips else ''}-{test.fingerprint}.csv"
            if not path.exists():
                models, _, _ = load_ensemble([network / "best" for network in networks])
                device = resolve_device(config.device)
                loader = make_loader(test, config.batch_size, workers=config.workers)
                on_device = [model.to(device) for model in models]
                write_table(score_split(on_device, loader, flips=flips, full_resolution=config.full_resolution), path)
            tables.append(pd.read_csv(path).assign(variant=name, seed=seed, flips=flips))
    columns = ["variant", "seed", "flips", "id", *METRICS]
    return pd.concat(tables)[columns]


def mean_with_bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, images): percentile bootstrap that draws seeds and images anew, 95 %.

    Networks of one recipe differ and images differ; an interval over images alone would speak of these networks only.
    With one seed it does, and the table says how many there were. NaN values are left out.
    """
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for k in range(RESAMPLES):
        rows, columns = (rng.integers(0, size, size) for size in values.shape)
        means[k] = np.nanmean(values[rows][:, columns])
    return float(np.nanmean(values)), *map(float, np.quantile(means, [0.025, 0.975]))


def summarize_variants(metrics: pd.DataFrame, metric: str = "iou") -> pd.DataFrame:
    """One row for each variant, with and without flips, of single networks and of all seeds together.

    Columns variant, flips, networks ('one' or 'all'), seeds, images, mean, low, high; difference from the recipe's
    single networks without flips on the same images and seeds, with its interval.
    """
    cells = {}
    metrics = metrics.assign(networks=np.where(metrics["seed"] == "all", "all", "one"))
    for key, group in metrics.groupby(["variant", "flips", "networks"], sort=False):
        cells[key] = group.pivot(index="seed", columns="id", values=metric)
    base = cells[RECIPE, False, "one"]
    rows = []
    for (variant, flips, networks), table in cells.items():
        mean, low, high = mean_with_bootstrap(table.to_numpy())
        row = {"variant": variant, "flips": flips, "networks": networks, "seeds": len(base), "images": table.shape[1]}
        row |= {"mean": mean, "low": low, "high": high}
        if (variant, flips, networks) != (RECIPE, False, "one"):
            other = base if networks == "one" else base.mean().to_frame().T
            difference = table[other.columns].to_numpy() - other.to_numpy()
            row |= dict(zip(("difference", "difference_low", "difference_high"), mean_with_bootstrap(difference)))
        rows.append(row)
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------------- report


def report(config: SegmentationConfig, folder: Path, metrics: pd.DataFrame, counts: dict, outs: dict) -> None:
    """summary.csv and summary.md, history.csv and learning_curves.png of a results folder."""
    tables = [summarize_variants(metrics, metric).assign(metric=metric) for metric in METRICS]
    summary = pd.concat(tables, ignore_index=True)
    write_table(summary, folder / "summary.csv")
    parts = [pd.read_csv(out / "history.csv").assign(variant=key[0], seed=key[1]) for key, out in outs.items()]
    history = pd.concat(parts, ignore_index=True)
    write_table(history, folder / "history.csv")
    figure = visualization.training_curves(
        history.rename(columns={"variant": "model"}),
        caption=f"{counts['train']} training and {counts['validation']} validation images at {config.image_size} px.",
        synthetic=config.is_synthetic,
    )
    visualization.save(figure, folder / "learning_curves.png")
    write_text(folder / "summary.md", _page(config, summary, history, counts))
    print(_table(summary, "iou"))


def _page(config: SegmentationConfig, summary: pd.DataFrame, history: pd.DataFrame, counts: dict) -> str:
    minutes = history.groupby(["variant", "seed"])["seconds"].sum() / 60
    data = "**synthetic** images" if config.is_synthetic else f"`{Path(config.data).name}`"
    size = "each image's own size" if config.full_resolution else f"{config.image_size} px"
    changes = "\n".join(f"- {name}: `{json.dumps(settings)}`" for name, settings in config.variants.items())
    variants = f"\n## The variants\n{changes}\n" if changes else ""
    return f"""# Segmentation of {data} by {TITLES[config.model]}

{counts["train"]} training, {counts["validation"]} validation and {counts["test"]} test images.
Test metrics are means over images of per-image values at {size}; intervals are 95 % bootstraps that draw
seeds ({len(config.seeds)}) and images anew. "All seeds" is the mean probability of the networks of all seeds;
differences are from single networks of the recipe without flips, on the same images.

## Mean IoU
{_table(summary, "iou")}
## Thresholded Jaccard (0 below 0.65)
{_table(summary, "thresholded_jaccard")}{variants}
Training took {minutes.min():.0f} to {minutes.max():.0f} minutes a network. Per-image values are in `per_image.csv`, all
metrics in `summary.csv`, epochs in `history.csv`, settings in `config.yaml`, versions and machine in
`environment.json`, hashes of the images in `data.json`. Commit {git_commit()}.
"""


def _table(summary: pd.DataFrame, metric: str) -> str:
    rows = []
    for row in summary[summary["metric"] == metric].itertuples():
        networks = "one seed" if row.networks == "one" else "all seeds"
        difference = f"{row.difference:+.4f} ({row.difference_low:+.4f} … {row.difference_high:+.4f})"
        shown = "" if np.isnan(row.difference) else difference
        value = f"{row.mean:.4f} ({row.low:.4f} … {row.high:.4f})"
        rows.append((row.variant, networks, "yes" if row.flips else "no", value, shown))
    return markdown_table(["variant", "networks", "test flips", "mean (95 %)", "difference from the recipe"], rows)
