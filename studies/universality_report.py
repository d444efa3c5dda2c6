"""What the universality study shows: its figures, its summary and the short table it prints.

Takes what `analysis` found; measures nothing itself, but records full maps of a few images for the pictures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

import pictures
import verdict_figures
import visualization
from dataset import SegmentationDataset
from inference import predict
from models import TITLES, load_model
from similarity import alignment, calibration, record_models
from similarity.measures import MEASURES
from studies import site_facts
from studies.analysis import DECONFOUNDED, Findings, aligned_by, chosen_pairs, varying
from studies.ruler import ESTIMATORS, HEADLINE
from studies.universality_words import METHODS, sentence, short_table, summary_text
from utils import write_text

SIGNIFICANT = 0.05
PICTURED = 4  # images in the pictures
PICTURED_PAIRS = 4  # matched site pairs in the PCA pictures
SMALLEST_PICTURED_MAP = 4  # cells a side; smaller maps show nothing of the image


def write(
    config, folder: Path, datasets: dict, metrics: pd.DataFrame, found: Findings, device, quiet: bool = False
) -> None:
    """Figures, summary.md, facts of the sites, and (unless quiet) the short table on the terminal."""
    names = titles(config)
    figures = {
        **plane_figures(config, found, names),
        **verdict_figures_of(config, found, names),
        "training_curves": curves_figure(config, folder),
        "shared_space": space_figure(config, found, datasets["test"], names),
        **picture_figures(config, folder, datasets["test"], device),
    }
    shown = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in shown.items():
        visualization.save(figure, folder / f"{name}.png")
    text = summary_text(config, datasets, metrics, found.tables, names, found.notes, has_space="shared_space" in shown)
    write_text(folder / "summary.md", text)
    site_facts.write(config, folder, datasets["test"], device)
    if not quiet:
        print("\n" + short_table(found.tables["summary"]))
        print(sentence(config, found.tables["summary"], names))


def titles(config) -> list[str]:
    """The two models' names as they are written."""
    return [TITLES[recipe.model] for recipe in config.models]


# ---------------------------------------------------------------------------------------------------------- figures


def plane_figures(config, found: Findings, names: list[str]) -> dict:
    """Planes of encoder and decoder sites beside floor and ceiling, and the whole plane under every measure."""
    (a, b), pairs = names, found.tables["pairs"]
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
            by_chance={"trained": pivot(chosen, "q_value") > SIGNIFICANT},
            caption=f"Debiased linear CKA, mean over space (gap), n = {n} test images, mean over pairs of networks; "
            f"expected for unrelated features: 0. Told from chance: q ≤ {SIGNIFICANT} (Benjamini–Hochberg over all "
            f"pairs of sites, {config.permutations} permutations of the images, first pair of networks).",
            synthetic=config.is_synthetic,
        )
    whole = {name: mean_plane(found.comparisons["gap", name]) for name in config.policies["gap"] if not _distance(name)}
    first = found.comparisons["gap", HEADLINE]
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


def mean_plane(comparison: calibration.Comparison) -> pd.DataFrame:
    """Mean over pairs of networks."""
    return pd.DataFrame(comparison.scale()["similarity"], comparison.rows, comparison.columns)


def _distance(estimator: str) -> bool:
    return MEASURES[ESTIMATORS[estimator][0]].distance


def verdict_figures_of(config, found: Findings, names: list[str]) -> dict:
    """The headline figures: the ruler, depth, u by depth, regions, stitching (where there are any)."""
    tables, synthetic = found.tables, config.is_synthetic
    summary = tables["summary"]
    figures = {
        "ruler": ruler_figure(config, summary, names),
        "depth": depth_figure(config, tables["depth"], names),
        "position": position_figure(config, tables["depth"], names),
    }
    if not tables["regions"].empty:
        figures["regions"] = verdict_figures.region_bars(
            tables["regions"],
            title=f"Are {names[0]} and {names[1]} more alike inside the lesion than around it?",
            caption=f"Debiased linear CKA of features averaged over the cells of {tables['regions']['grid'].iloc[0]}, "
            f"weighted by the mask; mean over pairs at matched relative depth; n = {_counts(tables['regions'])} test "
            "images (those that have such cells).",
            synthetic=synthetic,
        )
    if not tables["stitching"].empty:
        rows = tables["stitching"]
        figures["stitching"] = verdict_figures.stitched_dice(
            rows.assign(
                site_b=visualization.short_labels(rows["site_b"], width=30),
                receiver=[_in_words(name) for name in rows["receiver"]],
            ),
            title=f"Can {names[0]} and {names[1]} go on from each other's activations?",
            caption=f"Only a 1×1 convolution is trained ({config.stitch_images} training images at most); share of the "
            f"receiving network's own mean Dice on n = {int(rows['images'].iloc[0])} test images, 95 % bootstrap.",
            synthetic=synthetic,
        )
    return figures


def _in_words(network: str) -> str:
    """'unetpp-seed0' -> 'UNet++, seed 0'."""
    model, _, seed = network.partition("-seed")
    return f"{TITLES[model]}, seed {seed}"


def _counts(table: pd.DataFrame) -> str:
    low, high = table["n_images"].min(), table["n_images"].max()
    return str(low) if low == high else f"{low} to {high}"


def ruler_figure(config, summary: pd.DataFrame, names: list[str]):
    """The headline: similarity on the scale from untrained to another seed."""
    shown = summary[[name == DECONFOUNDED or not _distance(name) for name in summary["estimator"]]]
    over = shown["interval_over"].iloc[0]
    return visualization.ruler(
        shown.assign(measure=shown["estimator"], low=shown["similarity_low"], high=shown["similarity_high"]),
        title=f"How similar are {names[0]} and {names[1]}, between untrained and another seed?",
        spread="95 % interval",
        caption=f"Mean over site pairs at matched relative depth, n = {_counts(shown)} test images, "
        f"{int(summary.network_pairs.iloc[0])} pairs of networks; intervals over {over} (delete-d jackknife). Null: "
        f"95 % point over {config.permutations} permutations of the images of one side (first pair of networks).",
        synthetic=config.is_synthetic,
    )


def _headline(depth: pd.DataFrame) -> pd.DataFrame:
    return depth[(depth.estimator == HEADLINE) & (depth.policy == "gap")].rename(columns={"part_a": "part"})


def depth_figure(config, depth: pd.DataFrame, names: list[str]):
    """The headline measure at matched depth, with ceiling and floor."""
    rows = _headline(depth)
    return visualization.depth_profile(
        rows,
        title=f"Where along their depth are {names[0]} and {names[1]} similar?",
        ylabel="debiased linear CKA",
        caption=f"Each {names[0]} site with the {names[1]} site at the nearest relative depth; gap, "
        f"n = {int(rows.n_images.iloc[0])} test images, mean over pairs of networks.",
        synthetic=config.is_synthetic,
    )


def position_figure(config, depth: pd.DataFrame, names: list[str]):
    """u at matched depth, with ceiling and floor as bands."""
    rows = _headline(depth)
    return verdict_figures.position_by_depth(
        rows,
        title=f"How far have {names[0]} and {names[1]} come from untrained to another seed?",
        caption=f"u = (similarity − floor) / (ceiling − floor) of debiased linear CKA, gap, n = "
        f"{int(rows.n_images.iloc[0])} test images; delete-d jackknife over images, and over seeds with three or more. "
        "Triangles: beyond the axis. No bar: the scale vanishes in some subsample.",
        synthetic=config.is_synthetic,
    )


def space_figure(config, found: Findings, test: SegmentationDataset, names: list[str]):
    """Held-out images of both models in the space of each method, at the last matched pair of the decoders; None if all
    of them are constant."""
    a, b = (f"{recipe.model}-seed{config.seeds[0]}" for recipe in config.models)
    A, B = (found.recordings[name]["gap"] for name in (a, b))
    possible = varying(A, B, chosen_pairs(config, found.recordings)["decoder"])
    if not possible:
        return None
    site_a, site_b = possible[-1]
    shares = {sample.id: float(sample.mask.mean()) for sample in (test[i] for i in range(len(test)))}
    options, panels = aligned_by(len(A)), []
    for method in alignment.METHODS:
        aligned = alignment.align(A, site_a, B, site_b, method=method, seed=config.seeds[0], **options)
        panels.append((f"{METHODS[method]}: R² {aligned.r2:.2f}", np.asarray(aligned.a), np.asarray(aligned.b)))
    short = [visualization.short_labels([site], width=30)[0] for site in (site_a, site_b)]
    return verdict_figures.shared_space(
        panels,
        np.array([shares[id_] for id_ in aligned.ids]),
        names=names,
        colour_label="share of the image that is lesion",
        title=f"Do {names[0]} and {names[1]} put the same images in the same places?",
        caption=f"{short[0]} and {short[1]} of seed {config.seeds[0]}, gap; n = {len(aligned.ids)} held-out test "
        "images; maps fitted on the other half. A line joins the two points of one image.",
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
