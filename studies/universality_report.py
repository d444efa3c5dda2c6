"""What the universality study shows: its figures, its summary and the short table it prints.

Takes the tables and planes that `universality` made; measures nothing itself, but records full maps of a few images
for the pictures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

import pictures
import visualization
from dataset import SegmentationDataset
from inference import predict
from models import TITLES, load_model
from similarity import Plane, calibration, record_models
from utils import git_commit, markdown_table, write_table, write_text

PICTURED = 4  # images in the pictures
PICTURED_PAIRS = 4  # matched site pairs in the PCA pictures
SMALLEST_PICTURED_MAP = 4  # cells a side; smaller maps show nothing of the image


def write(
    config, folder: Path, datasets: dict, metrics: pd.DataFrame, planes: dict, tables: dict, device, quiet=False
) -> None:
    """Tables, figures, summary.md, and (unless quiet) the short table on the terminal."""
    for name, table in tables.items():
        write_table(table, folder / f"{name}.csv")
    names = titles(config)
    figures = {
        **plane_figures(config, planes, tables["pairs"], names),
        "ruler": ruler_figure(config, tables["summary"], names),
        "depth": depth_figure(config, tables["depth"], names),
        "training_curves": curves_figure(config, folder),
        **picture_figures(config, folder, datasets["test"], device),
    }
    for name, figure in figures.items():
        visualization.save(figure, folder / f"{name}.png")
    text = summary_text(config, datasets, metrics, tables, names)
    write_text(folder / "summary.md", text)
    if not quiet:
        print("\n" + short_table(tables["summary"]))
        print(sentence(config, tables["summary"], names))


def titles(config) -> list[str]:
    """The two models' names as they are written."""
    return [TITLES[recipe.model] for recipe in config.models]


# ---------------------------------------------------------------------------------------------------------- figures


def plane_figures(config, planes: dict, pairs: pd.DataFrame, names: list[str]) -> dict:
    """Planes of encoder and decoder sites beside floor and ceiling, and the whole plane under every measure."""
    a, b = names
    n = int(pairs["n_images"].iloc[0])
    network_pairs = len(config.seeds) ** 2
    figures = {}
    for part in ("encoder", "decoder"):
        chosen = pairs[
            (pairs.estimator == "linear_cka")
            & (pairs.policy == "gap")
            & (pairs.part_a == part)
            & (pairs.part_b == part)
        ]
        frames = {"trained": pivot(chosen, "similarity"), "untrained twins (floor)": pivot(chosen, "floor")}
        if chosen["ceiling"].notna().any():
            frames["another seed (ceiling)"] = pivot(chosen, "ceiling")
        figures[f"plane_{part}"] = visualization.planes(
            frames,
            title=f"How similar are the {part}s of {a} and {b}?",
            xlabel=f"{b} site, in execution order",
            ylabel=f"{a} site, in execution order",
            label="debiased linear CKA",
            vmax=1.0,
            caption=f"Debiased linear CKA, mean over space (gap), n = {n} test images, mean over pairs "
            "of networks; expected value for unrelated features 0.",
            synthetic=config.is_synthetic,
        )
    whole = {estimator: mean_plane(planes["cross", "gap", estimator]) for estimator in config.policies["gap"]}
    first = planes["cross", "gap", "linear_cka"][0]
    parts = (
        pairs.drop_duplicates("site_a").set_index("site_a")["part_a"],
        pairs.drop_duplicates("site_b").set_index("site_b")["part_b"],
    )
    boundaries = tuple(int((parts[k][axis] == "encoder").sum()) for k, axis in enumerate((first.rows, first.columns)))
    figures["measures"] = visualization.measure_grid(
        whole,
        title="Do the measures agree on where the models are alike?",
        xlabel=f"{b} site",
        ylabel=f"{a} site",
        boundaries=boundaries,
        caption=f"All sites × all sites, gap, n = {n} test images, mean of {network_pairs} pairs of networks; each "
        "panel on its own scale. linear_cka and rbf_cka are debiased; linear_cka_biased, svcca and rsa are not.",
        synthetic=config.is_synthetic,
    )
    return figures


def pivot(pairs: pd.DataFrame, column: str) -> pd.DataFrame:
    """Sites A × sites B of one column, in execution order."""
    order = [pairs[side].drop_duplicates() for side in ("site_a", "site_b")]
    return pairs.pivot(index="site_a", columns="site_b", values=column).loc[order[0], order[1]]


def mean_plane(planes: list[Plane]) -> pd.DataFrame:
    """Mean over pairs of networks."""
    return pd.DataFrame(np.mean([p.values for p in planes], axis=0), planes[0].rows, planes[0].columns)


def ruler_figure(config, summary: pd.DataFrame, names: list[str]):
    """The headline: similarity on the scale from untrained to another seed."""
    return visualization.ruler(
        summary.assign(measure=summary["estimator"]),
        title=f"How similar are {names[0]} and {names[1]}, between untrained and another seed?",
        spread="range over seeds",
        caption=f"Mean over site pairs at matched relative depth, n = {int(summary.n_images.iloc[0])} test images, "
        f"{int(summary.network_pairs.iloc[0])} pairs of networks. Null: 95 % point over "
        f"{config.permutations} permutations of the images of one side (first pair of networks).",
        synthetic=config.is_synthetic,
    )


def depth_figure(config, depth: pd.DataFrame, names: list[str]):
    """The headline measure at matched depth, with ceiling and floor."""
    rows = depth[(depth.estimator == "linear_cka") & (depth.policy == "gap")].rename(columns={"part_a": "part"})
    return visualization.depth_profile(
        rows,
        title=f"Where along their depth are {names[0]} and {names[1]} similar?",
        ylabel="debiased linear CKA",
        caption=f"Each {names[0]} site with the {names[1]} site at the nearest relative depth; gap, "
        f"n = {int(rows.n_images.iloc[0])} test images, mean over pairs of networks.",
        synthetic=config.is_synthetic,
    )


def curves_figure(config, folder: Path):
    """Training curves of all runs."""
    history = pd.concat(
        [
            pd.read_csv(folder / "models" / f"{recipe.model}-seed{seed}" / "history.csv").assign(
                model=TITLES[recipe.model], seed=seed
            )
            for recipe in config.models
            for seed in config.seeds
        ]
    )
    return visualization.training_curves(
        history,
        caption="Training loss: each model's own objective, so only its course compares; validation loss: mean "
        "per-image soft Dice loss + cross-entropy for both.",
        synthetic=config.is_synthetic,
    )


def picture_figures(config, folder: Path, test: SegmentationDataset, device: torch.device) -> dict:
    """Predictions and PCA pictures of matched sites of the first seed's models on the same images."""
    seed = config.seeds[0]
    models = {
        recipe.model: load_model(folder / "models" / f"{recipe.model}-seed{seed}" / "best")[0].to(device)
        for recipe in config.models
    }
    chosen = [test[i] for i in range(min(PICTURED, len(test)))]
    images, masks = (torch.stack([getattr(sample, key) for sample in chosen]) for key in ("image", "mask"))
    ids = [sample.id for sample in chosen]
    metrics = pd.read_csv(folder / "test_metrics.csv").query("seed == @seed").set_index(["model", "id"])["iou"]
    predictions = pictures.example_predictions(
        images.numpy(),
        masks.numpy(),
        {TITLES[name]: (predict(model, images) > 0).numpy() for name, model in models.items()},
        ids,
        {TITLES[name]: [float(metrics[name, i]) for i in ids] for name in models},
        title="What do the models outline?",
        caption=f"The first test images in order of id; models of seed {seed}; IoU at {config.image_size} px.",
        synthetic=config.is_synthetic,
    )
    return {"predictions": predictions, "pca": pca_figure(config, models, images, ids)}


def pca_figure(config, models: dict, images: torch.Tensor, ids: list[str]):
    """Matched sites that have a place in the image, spread over encoder and decoder."""
    maps = record_models(models, [(images, ids)], policies=("map",))
    first, second = (maps[name]["map"] for name in models)
    rows = []
    for part in ("encoder", "decoder"):
        pairs = [
            (a, b)
            for a, b in calibration.matched_depth_pairs(first.select(part=part), second.select(part=part))
            if min(*first[a].shape[-2:], *second[b].shape[-2:]) >= SMALLEST_PICTURED_MAP
        ]
        places = np.linspace(0, len(pairs) - 1, PICTURED_PAIRS // 2 + 1).round().astype(int)[1:]
        rows += [pairs[i] for i in dict.fromkeys(places)]
    names = [TITLES[name] for name in models]
    labels = [visualization.short_labels(side, width=18) for side in zip(*rows)]
    return pictures.pca_rgb_grid(
        [
            (f"{names[0]} {label_a}", first[a].numpy(), f"{names[1]} {label_b}", second[b].numpy())
            for (a, b), label_a, label_b in zip(rows, *labels)
        ],
        images.numpy(),
        ids,
        caption=f"Test images; models of seed {config.seeds[0]}; pairs at matched relative "
        "depth among the sites that have a map.",
        synthetic=config.is_synthetic,
    )


# ------------------------------------------------------------------------------------------------------------- words


def short_table(summary: pd.DataFrame) -> str:
    """The table that the main job prints: one line a part and estimator."""
    header = (
        "part",
        "estimator",
        "policy",
        "similarity",
        "range over seeds",
        "null 95 %",
        "floor",
        "ceiling",
        "u",
        "verdict",
    )

    def cell(value: float) -> str:
        return "–" if pd.isna(value) else f"{value:.3f}"

    rows = [
        (
            row.part,
            row.estimator,
            row.policy,
            cell(row.similarity),
            f"{cell(row.low)} … {cell(row.high)}",
            cell(row.null_high),
            cell(row.floor),
            cell(row.ceiling),
            cell(row.u),
            row.verdict,
        )
        for row in summary.sort_values(["part", "policy"], ascending=[False, True], kind="stable").itertuples()
    ]
    return markdown_table(header, rows)


def sentence(config, summary: pd.DataFrame, names: list[str]) -> str:
    """The answer in one line each for encoders and decoders, from the headline estimator."""
    lines = []
    for part in ("encoder", "decoder"):
        row = summary[(summary.part == part) & (summary.estimator == "linear_cka") & (summary.policy == "gap")].iloc[0]
        scale = place_on_ruler(row)
        lines.append(
            f"{part.capitalize()}s of {names[0]} and {names[1]}: {row.verdict}, debiased linear CKA "
            f"{row.similarity:.2f} (range over seeds {row.low:.2f} to {row.high:.2f}; "
            f"chance below {row.null_high:.2f}), {scale}."
        )
    if len(config.seeds) < 2:
        lines.append("One seed only: there is no ceiling, and none was made up.")
    return "\n".join(lines)


def place_on_ruler(row) -> str:
    """Where a similarity stands between floor and ceiling, in words."""
    ends = f"untrained twins {row.floor:.2f}, another seed {row.ceiling:.2f}"
    if pd.isna(row.u):
        return f"no scale to place it on ({ends})"
    if row.u < 0:
        return f"no more than without training ({ends})"
    return f"{row.u:.0%} of the way from untrained to another seed ({ends})"


def pictures_of(config) -> str:
    """Links to the pictures that show images; photographs are shown to who made the run, and published by nobody."""
    if config.is_synthetic:
        return "![PCA pictures](pca.png)\n![predictions](predictions.png)"
    return "`pca.png` and `predictions.png` show photographs of the data set: mind its licence before passing them on."


def summary_text(config, datasets: dict, metrics: pd.DataFrame, tables: dict, names: list[str]) -> str:
    """summary.md: what was run on what, the answer, the tables, what each number means."""
    kind = "**Synthetic images** (embedded set)" if config.is_synthetic else f"Images of `{Path(config.data).name}`"
    counts = ", ".join(f"{len(data)} {name}" for name, data in datasets.items())
    task = metrics.groupby(["model", "seed"])[["iou", "dice", "accuracy", "thresholded_jaccard"]].mean().reset_index()
    task_rows = [(r.model, r.seed, *(f"{v:.4f}" for v in r[3:])) for r in task.itertuples()]
    out, seeds = Path(config.out).name, ", ".join(map(str, config.seeds))
    return f"""# Do {names[0]} and {names[1]} end up with the same representations?

{kind}: {counts}, {config.image_size} px, data {datasets["test"].fingerprint}. Seeds {seeds}.
Commit {git_commit()}; settings in `config.yaml`, versions and machine in `environment.json`.

{sentence(config, tables["summary"], names)}

## The ruler
{short_table(tables["summary"])}
Each number is a mean over site pairs at matched relative depth (`depth.csv`; every site pair is in `pairs.csv`).
*Similarity*: trained against trained, mean and range over all pairs of seeds. *Null 95 %*: what permuted images reach
in one case of twenty ({config.permutations} permutations, first pair of networks). *Floor*: the untrained twins.
*Ceiling*: geometric mean of each architecture's own seed-to-seed similarity.
*u* = (similarity − floor) / (ceiling − floor).
*Verdict*: below chance (not above the null's 95 % point), below floor (u < −0.1), at floor (u < 0.1), partial,
at ceiling (u ≥ 0.9), above ceiling (u > 1.1).
Rows of `grid` leave out sites without a place in the image or with smaller maps, so they are means over other pairs
than those of `gap`. The biased linear CKA is shown only to be read beside its null.
The range over seeds is no confidence interval over images.

## The task (mean over test images, at {config.image_size} px; intervals in `test_summary.csv`)
{markdown_table(("model", "seed", "IoU", "Dice", "pixel accuracy", "thresholded Jaccard"), task_rows)}
## Figures
![ruler](ruler.png)
![depth](depth.png)
![encoder plane](plane_encoder.png)
![decoder plane](plane_decoder.png)
![measures](measures.png)
![training curves](training_curves.png)
{pictures_of(config)}

Made by `python experiments.py universality` with the settings in `{out}/config.yaml`.
"""
