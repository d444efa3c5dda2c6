"""Everything the universality study finds out about recorded networks, stage by stage, as tables.

The ruler (planes, null, intervals, floor, ceiling), the same with what images have in common regressed out, by region
of the image, both models in one space, stitched together, and whether their masks agree. Networks come trained and
recorded from `universality`; `universality_report` shows what is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dataset import SegmentationDataset
from similarity import (
    Recording,
    alignment,
    card,
    deconfounding,
    intervals,
    per_image,
    plane,
    regions,
)
from similarity.calibration import Comparison, Resamples
from similarity.nulls import Null
from similarity.plane import rows_an_image
from similarity.policies import parse_policy
from similarity.resampling import resampled_planes
from studies import controls, mask_agreement, ruler, stitched
from studies.ruler import HEADLINE, PARTS, Key
from studies.segmentation import mean_with_bootstrap
from utils import digest, write_table

ALIGNED_PAIRS = 3  # site pairs a part that are brought into one space
STITCH_RATE = 1e-3  # of the map between two sites
STITCH_BATCH = 16
DECONFOUNDED = "linear_cka_deconfounded"


@dataclass(frozen=True)
class Findings:
    """What the study found: the networks' recordings, their planes and nulls, tidy tables by name, what to know."""

    recordings: Mapping[str, dict[str, Recording]]
    comparisons: Mapping[Key, Comparison]
    nulls: Mapping[Key, Null]
    tables: dict[str, pd.DataFrame]
    notes: list[str]


def analyse(
    config,
    recordings: Mapping[str, dict[str, Recording]],
    datasets: Mapping[str, SegmentationDataset],
    masks: Mapping[str, Mapping[str, Tensor]],
    networks: Callable[[str], nn.Module],
    folder: Path,
) -> Findings:
    """All stages, what takes long kept on disk; every table is also written as {name}.csv.

    masks : of the test images by each trained network, by name and id ; networks : name -> the network, to be stitched
    """
    comparisons = ruler.compare_all(config, recordings, folder)
    nulls = ruler.null_all(config, recordings, folder)
    resamples = ruler.resample_all(config, recordings, folder)
    tables = ruler.calibrate(config, recordings, comparisons, resamples, nulls)
    test = datasets["test"]
    control = controls.control_recordings(controls.with_lesion(test))
    tables["controls"] = control_table(config, recordings, control)
    notes = []
    try:
        more = deconfounded_summary(config, recordings, control)
        tables["summary"] = pd.concat([tables["summary"], more], ignore_index=True)
    except ValueError as reason:  # the controls explain each other, or all that there is
        notes.append(f"The deconfounded similarity is left out: {reason}.")
        print(f"note: {notes[-1]}")
    tables["regions"] = region_table(config, recordings, test, folder)
    tables["card"] = convergence_card(config, recordings, tables["summary"])
    tables["disagreement"] = disagreement_table(tables["summary"])
    tables["alignment"] = alignment_table(config, recordings)
    tables["stitching"] = stitching_table(config, recordings, datasets, networks, folder)
    tables["agreement"] = agreement_table(config, recordings, test, masks)
    tables["agreement_summary"] = agreement_summary(tables["agreement"])
    for name, table in tables.items():
        write_table(table, folder / f"{name}.csv")
    return Findings(recordings, comparisons, nulls, tables, notes)


# ------------------------------------------------------------------------------------------- controls and deconfounding


def control_table(config, recordings: Mapping, control: Recording) -> pd.DataFrame:
    """Debiased linear CKA of every site with what an image is without any network; mean over seeds.

    Columns model, part, site, control, similarity. Images without a centroid (empty masks) are left out.
    """
    rows = []
    for recipe in config.models:
        values = []
        for seed in config.seeds:
            recording = recordings[f"{recipe.model}-seed{seed}"]["gap"].select(ids=control.ids)
            values.append(plane("linear_cka", recording, control).frame())
        mean = sum(values) / len(values)
        parts = {site.name: site.part for site in recording.sites}
        for (site, name), value in mean.stack(future_stack=True).items():
            rows.append((recipe.model, parts[site], site, name, value))
    return pd.DataFrame(rows, columns=["model", "part", "site", "control", "similarity"])


def deconfound(config, recordings: Mapping, control: Recording) -> tuple[Comparison, Resamples]:
    """The headline comparison with the controls' kernels regressed out of both sides, observed and resampled."""
    gap = {name: policies["gap"].select(ids=control.ids) for name, policies in recordings.items()}
    networks = ruler.jobs(config, recordings)
    jobs = {("networks", *key): (gap[a], gap[b]) for key, (a, b) in networks.items()}
    jobs |= {("controls", name): (recording, control) for name, recording in gap.items()}
    jobs["controls", "controls"] = (control, control)
    measure, options = ruler.ESTIMATORS[HEADLINE]
    observed = {key: plane(measure, *sides, **options).values for key, sides in jobs.items()}
    subsets = intervals.subsamples(len(control), resamples=config.resamples, seed=config.seeds[0])
    again = resampled_planes(measure, jobs, subsets, **options)

    def partial(found: Mapping) -> Comparison:
        kinds: dict[str, dict] = {kind: {} for kind in ruler.KINDS}
        for key, (a, b) in networks.items():
            sides = found["controls", a], found["controls", b], found["controls", "controls"]
            kinds[key[0]][key[1:]] = deconfounding.deconfounded(found["networks", *key], *sides)
        a, b = ruler.first_pair(config)
        return Comparison(gap[a].names, gap[b].names, **kinds)

    return partial(observed), Resamples(partial(again), len(control), len(subsets[0]))


def deconfounded_summary(config, recordings: Mapping, control: Recording) -> pd.DataFrame:
    """Lines of the summary for the deconfounded headline, one a part; without a null, see `deconfounding`."""
    comparison, resamples = deconfound(config, recordings, control)
    a, b = ruler.first_pair(config)
    A, B = (recordings[name]["gap"].select(ids=control.ids) for name in (a, b))
    rows = [
        {"part": part, "measure": "linear CKA, deconfounded", "estimator": DECONFOUNDED, "policy": "gap"}
        | ruler.summarize(comparison, resamples, None, pairs)
        for part, pairs in ruler.matched(A, B).items()
    ]
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------------------------------------------- where


def region_table(config, recordings: Mapping, test: SegmentationDataset, folder: Path) -> pd.DataFrame:
    """The headline measure on cells inside, on the border of and outside the lesion, beside all cells; one row a part.

    Columns region, part, grid, those of `ruler.summarize`; empty without a `grid` policy. Regions that fewer than 20
    images have are left out, and a line on the terminal says so.
    """
    grids = [policy for policy in config.policies if parse_policy(policy)[0] == "grid"]
    if not grids:
        return pd.DataFrame(columns=["region", "part", "similarity", "u"])
    finest = max(grids, key=lambda policy: parse_policy(policy)[1])
    weights = controls.region_weights(test, parse_policy(finest)[1])
    weights["whole image"] = {id_: np.ones(len(cells)) for id_, cells in weights["inside"].items()}
    rows = []
    for region, cells in weights.items():
        have = sum(1 for weight in cells.values() if weight.sum() > 0)
        if have < intervals.FEWEST_IMAGES:
            print(f"note: {have} images have {region} cells, too few to compare; the region is left out")
            continue
        pooled = {name: regions.pooled(policies[finest], cells) for name, policies in recordings.items()}
        jobs = {job: (pooled[a], pooled[b]) for job, (a, b) in ruler.jobs(config, recordings).items()}
        path = folder / "planes" / f"resamples-{region.replace(' ', '_')}.npz"
        resamples = ruler.resample(config, jobs, HEADLINE, path)
        measure, options = ruler.ESTIMATORS[HEADLINE]
        planes: dict[str, dict] = {kind: {} for kind in ruler.KINDS}
        for job, sides in jobs.items():
            planes[job[0]][job[1:]] = plane(measure, *sides, **options)
        comparison = ruler.as_comparison(planes)
        A, B = next(iter(jobs.values()))
        for part, pairs in ruler.matched(A, B).items():
            line = {"region": region, "part": part, "grid": finest}
            rows.append(line | ruler.summarize(comparison, resamples, None, pairs))
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------ card, disagreement


def convergence_card(config, recordings: Mapping, summary: pd.DataFrame) -> pd.DataFrame:
    """What to know before believing a verdict: one row a line of the summary.

    Effective ranks are medians over a part's sites of the first pair of networks; images_needed is for ± 0.02.
    """
    a, b = ruler.first_pair(config)
    rows = []
    for line in summary.itertuples():
        A, B = (recordings[name][line.policy].select(part=line.part) for name in (a, b))
        ranks = [float(card.effective_ranks(recording).median()) for recording in (A, B)]
        rows.append(
            {
                "part": line.part,
                "estimator": line.estimator,
                "policy": line.policy,
                "n_images": line.n_images,
                "effective_rank_a": ranks[0],
                "effective_rank_b": ranks[1],
                "biased_cka_by_chance": _chance(line.n_images, A, *ranks),
                "se_over_images": line.similarity_image_se,
                "images_needed": card.images_needed(line.n_images, line.similarity_image_se),
                "interval_over": line.interval_over,
                "model_hash_a": A.model_hash,
                "model_hash_b": B.model_hash,
                "data_hash": A.data_hash,
            }
        )
    return pd.DataFrame(rows)


def _chance(images: int, recording: Recording, rank_a: float, rank_b: float) -> float:
    """Of biased linear CKA; NaN where an image has several rows: the formula takes rows for independent."""
    return np.nan if rows_an_image(recording) > 1 else card.biased_by_chance(images, rank_a, rank_b)


def disagreement_table(summary: pd.DataFrame) -> pd.DataFrame:
    """What each estimator says under `gap`, and by which invariance it may differ from the headline."""
    rows = []
    for part in PARTS:
        lines = summary[(summary.part == part) & (summary.policy == "gap")]
        headline = lines[lines.estimator == HEADLINE].iloc[0]
        for line in lines.itertuples():
            measure = ruler.ESTIMATORS.get(line.estimator, ruler.ESTIMATORS[HEADLINE])[0]
            same = line.verdict == headline.verdict
            why = "" if line.estimator == HEADLINE else _why(line.estimator, measure)
            rows.append((part, line.estimator, line.similarity, line.u, line.verdict, same, why))
    return pd.DataFrame(
        rows, columns=["part", "estimator", "similarity", "u", "verdict", "as_headline", "explained_by"]
    )


def _why(estimator: str, measure: str) -> str:
    if estimator == DECONFOUNDED:
        return "what size, place, shape, colour and pixels of the lesion image explain is taken out"
    if measure == ruler.ESTIMATORS[HEADLINE][0]:
        return "the same measure with its bias left in: few images and many features push it up"
    return card.explain_difference(measure, ruler.ESTIMATORS[HEADLINE][0])


# ------------------------------------------------------------------------------------------------- one space, one net


def chosen_pairs(config, recordings: Mapping, count: int = ALIGNED_PAIRS) -> dict[str, list[tuple[str, str]]]:
    """part -> pairs at matched depth, spread evenly over it, the last one always there."""
    a, b = ruler.first_pair(config)
    found = {}
    for part, pairs in ruler.matched(recordings[a]["gap"], recordings[b]["gap"]).items():
        places = np.linspace(0, len(pairs) - 1, min(count, len(pairs)) + 1).round().astype(int)[1:]
        found[part] = [pairs[place] for place in dict.fromkeys(places.tolist())]
    return found


def aligned_by(images: int) -> dict[str, int]:
    """Dimensions of the shared space and neighbours of its graph: ten, or what half of the images allows."""
    half = images - images // 2
    return {"components": min(10, half // alignment.IMAGES_A_COMPONENT), "neighbors": min(10, half - 2)}


def alignment_table(config, recordings: Mapping) -> pd.DataFrame:
    """Both models in one space, fitted on half of the images and scored on the other: one row a pair × method."""
    a, b = ruler.first_pair(config)
    options = aligned_by(len(recordings[a]["gap"]))
    tables = [
        alignment.alignment_table(
            recordings[a]["gap"], recordings[b]["gap"], pairs, splits=config.alignment_splits, **options
        ).assign(part=part)
        for part, pairs in chosen_pairs(config, recordings).items()
    ]
    return pd.concat(tables, ignore_index=True)


# ----------------------------------------------------------------------------------------------------------- the masks


def agreement_table(
    config, recordings: Mapping, test: SegmentationDataset, masks: Mapping[str, Mapping[str, Tensor]]
) -> pd.DataFrame:
    """One row an image and pair of trained networks: how alike their masks and their representations are.

    Columns kind (cross, own_a, own_b), model_a, model_b, those of `mask_agreement.compare_masks`, agreement_encoder
    and agreement_decoder (mean over pairs at matched depth; NaN between seeds of one architecture, not computed).
    """
    truth = torch.stack([test[index].mask for index in range(len(test))]) > 0.5
    tables = []
    for kind in ("cross", "own_a", "own_b"):
        for a, b in ruler.network_pairs(config, recordings)[kind].values():
            both = [torch.stack([masks[name][id_] for id_ in test.ids]) for name in (a, b)]
            table = mask_agreement.compare_masks(*both, truth, test.ids)
            if kind == "cross":
                A, B = recordings[a]["gap"], recordings[b]["gap"]
                for part, pairs in ruler.matched(A, B).items():
                    table[f"agreement_{part}"] = np.nan
                    if chosen := varying(A, B, pairs):
                        agreed = per_image.mean_agreement(A, B, chosen).set_index("id")["agreement"]
                        table[f"agreement_{part}"] = agreed.loc[table["id"]].to_numpy()
            tables.append(table.assign(kind=kind, model_a=a, model_b=b))
    return pd.concat(tables, ignore_index=True)


def varying(A: Recording, B: Recording, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of which neither site is constant over the images."""
    flat = {side: card.effective_ranks(recording).isna() for side, recording in (("a", A), ("b", B))}
    return [(a, b) for a, b in pairs if not flat["a"][a] and not flat["b"][b]]


def agreement_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice and κ between masks, of the two architectures and of two seeds of one, and what the Dice follows.

    Columns between, quantity, value, low, high, p_value, n_images; values are first averaged over pairs of networks.
    """
    between = {"cross": "the two architectures", "own_a": "seeds of the first", "own_b": "seeds of the second"}
    rows = []
    for kind, group in table.groupby("kind", sort=False):
        columns = [name for name in group.columns if name in ("dice", "kappa", "area") or name.startswith("agreement_")]
        images = group.groupby("id")[columns].mean()
        for name, words in (("dice", "Dice between masks"), ("kappa", "error consistency κ")):
            values = images[name].dropna().to_numpy()
            mean, low, high = mean_with_bootstrap(values[None])
            rows.append((between[kind], words, mean, low, high, np.nan, len(values)))
        if kind != "cross":
            continue
        for part in PARTS:
            agreed = images[f"agreement_{part}"].rename("agreement").dropna().reset_index()
            if agreed.empty:
                continue
            found = mask_agreement.follows(images.loc[agreed["id"]].reset_index(), agreed)
            for prefix, words in (("", ""), ("partial_", ", lesion area held fixed")):
                value = found["partial" if prefix else "spearman"]
                line = (value, found[f"{prefix}low"], found[f"{prefix}high"], found[f"{prefix}p"], int(found["n"]))
                rows.append((between[kind], f"rank correlation of mask Dice with {part} agreement{words}", *line))
    return pd.DataFrame(rows, columns=["between", "quantity", "value", "low", "high", "p_value", "n_images"])


def stitching_table(config, recordings: Mapping, datasets: Mapping, networks: Callable, folder: Path) -> pd.DataFrame:
    """One row a stitch of decoder sites (`stitched.summarize`), of the first seeds, in both directions; kept on disk.

    Empty where `stitch_pairs` is 0 or there is one seed only, and so no twin of another seed to compare with.
    """
    if not config.stitch_pairs or len(config.seeds) < 2:
        return pd.DataFrame(columns=["receiver", "site_b", "kind", "kept", "low", "high", "without"])
    a, b = ([f"{recipe.model}-seed{seed}" for seed in config.seeds] for recipe in config.models)
    untrained = {name: f"{name}-untrained" for name in (*a, *b)}
    first = [networks(names[0]) for names in (a, b)]
    matched = stitched.matched_sites(*first, image_size=config.image_size, stride=config.stitch_stride)
    jobs = stitched.plan(a, b, untrained, matched, pairs=config.stitch_pairs)
    used = sorted({name for job in jobs for name in (job.giver, job.receiver)})
    settings = {"images": config.stitch_images, "epochs": config.stitch_epochs, "learning_rate": STITCH_RATE}
    hashes = [recordings[name]["gap"].model_hash for name in used]
    key = digest(hashes, datasets["train"].fingerprint, datasets["test"].fingerprint, settings, jobs, config.seeds[0])
    path = folder / "planes" / f"stitching-{key}.csv"
    if not path.exists():
        found = {name: networks(name) for name in used}
        device = next(first[0].parameters()).device
        table = stitched.stitched_scores(
            found,
            jobs,
            datasets["train"],
            datasets["test"],
            batch_size=STITCH_BATCH,
            seed=config.seeds[0],
            device=device,
            **settings,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(table, path)
    return stitched.summarize(pd.read_csv(path))
