"""On which networks does a method of explanation fail? Verdicts from the checks of all networks.

Four reasons, each a number against a stated line: not shown to beat random maps, alike at random weights, missing what
its axiom promises, drowned in its sampling error. And the curves and covered objects of all networks as tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from explanations.checks import areas
from similarity.nulls import benjamini_hochberg
from studies.explaining import Made
from studies.explanation_checks import RANDOM

UNCHANGED = 0.5  # rank correlation of maps with those of the network at random weights
ALPHA = 0.05
MOST = 0.5  # of what is attributed
NOT_BETTER, SURVIVES = "not shown to beat random maps", "survives random weights"
GAP, SAMPLING = "misses more than half of what it should sum to", "sampling error above half of the values"
Tables = Mapping[str, Mapping[str, pd.DataFrame]]  # network -> name -> table of `explanation_checks`


def verdicts(tables: Tables, labels: Mapping[str, str], made: Mapping[str, Mapping[str, Made]]) -> pd.DataFrame:
    """One row a network and variant: columns below, and `failed`, the reasons joined, '' where there is none.

    failed is of the maps as they are, with their signs, which all comparisons use; failed_absolute is of their absolute
    values: Integrated Gradients and what covers parts are large only where an image differs from its baseline, so that
    absolute maps survive random weights where signed ones do not.

    labels : network -> its label: networks that were not explained again share the randomisation check of their
        label's first seed; made : network -> variant -> what its way gave
    n, deletion, insertion : images; mean area under the curves as a share of the way from the baseline's to the
        image's score (ratio of means; NaN where the image's is not the higher one)
    p, q : one-sided Wilcoxon signed-rank test over images that insertion less deletion is above that of random maps;
        Benjamini-Hochberg over the rows. q ≥ 0.05: not shown to beat random maps
    randomized, randomized_absolute : mean rank correlation of the maps, and of their absolute values, with those at
        random weights (normalisation layers keep their running statistics); ≥ 0.5: survives random weights
    gap : median over images of |what the map sums to less the change of the target| / |that change|, NaN where no axiom
        is promised; sampling_error : of KernelSHAP, median of its values' standard errors / the values (norms)
    unchecked : why there is no randomisation check, where there is none
    """
    changed = {labels[name]: found["randomization"] for name, found in tables.items() if "randomization" in found}
    rows = []
    for name, found in tables.items():
        for row in _against_random(found["curves"]):
            kept = made[name][row["variant"]]
            row |= _at_last_level(changed.get(labels[name]), row["variant"])
            rows.append({"network": name, **row, **_accuracy(kept, row["variant"])})
    table = pd.DataFrame(rows)
    table["q"] = benjamini_hochberg(table["p"].to_numpy())
    lines = {NOT_BETTER: ~(table["q"] < ALPHA), SURVIVES: table["randomized"] >= UNCHANGED}
    lines |= {GAP: table["gap"] > MOST, SAMPLING: table["sampling_error"] > MOST}
    absolute = lines | {SURVIVES: table["randomized_absolute"] >= UNCHANGED}
    return table.assign(failed=_joined(lines, table), failed_absolute=_joined(absolute, table))


def _joined(lines: Mapping[str, pd.Series], table: pd.DataFrame) -> list[str]:
    return ["; ".join(text for text, holds in lines.items() if holds[row]) for row in table.index]


def _against_random(table: pd.DataFrame) -> Iterator[dict]:
    nothing = _ends_and_areas(table[table["variant"] == RANDOM])
    for variant, part in table.groupby("variant", sort=False):
        if variant == RANDOM:
            continue
        own = _ends_and_areas(part)
        of_random = nothing.loc[own.index]
        change = (own["full"] - own["empty"]).mean()
        over = {name: (own[name] - own["empty"]).mean() for name in ("deletion", "insertion")}
        shares = {name: value / change if change > 0 else np.nan for name, value in over.items()}
        better = (own["insertion"] - own["deletion"]) - (of_random["insertion"] - of_random["deletion"])
        p = float(wilcoxon(better, alternative="greater").pvalue) if better.any() else 1.0
        yield {"variant": variant, "n": len(own), **shares, "p": p}


def _ends_and_areas(table: pd.DataFrame) -> pd.DataFrame:
    """By id: deletion, insertion (mean score along the curve), full, empty (score of image and of baseline)."""
    wide = areas(table).pivot(index="id", columns="curve", values="auc")
    ends = table[table["curve"] == "deletion"].pivot(index="id", columns="fraction", values="score")
    return wide.assign(full=ends[0.0], empty=ends[1.0])


def _at_last_level(table: pd.DataFrame | None, variant: str) -> dict:
    nothing = {"randomized": np.nan, "randomized_absolute": np.nan}
    if table is None:
        return nothing | {"unchecked": "not explained again"}
    part = table[table["variant"] == variant]
    if "level" not in part or part["level"].isna().all():
        return nothing | {"unchecked": part["reason"].iloc[0] if len(part) and "reason" in part else "not made"}
    part = part[part["level"] == part["level"].max()]
    found = {"randomized": part["rank_correlation"].mean()}
    found["randomized_absolute"] = part["rank_correlation_absolute"].mean()
    return found | {"unchecked": "constant maps" if np.isnan(found["randomized"]) else ""}


def _accuracy(made: Made, variant: str) -> dict:
    gap, error = np.nan, np.nan
    if variant in made.gaps:
        missed = made.gaps[variant].double()
        change = made.maps[variant].double().sum((1, 2)) - missed
        gap = float((missed.abs() / change.abs()).quantile(0.5))
    if variant in made.errors:
        error = float(made.errors[variant].quantile(0.5))
    return {"gap": gap, "sampling_error": error}


# --------------------------------------------------------------------------------------------------------- all networks


def over_networks(tables: Tables) -> pd.DataFrame:
    """For the figure: kind, label (variant), fraction, score (mean over networks), low, high (their middle 90 %).

    Networks that score no more for the images than for the baselines have no such scale, and are left out.
    """
    frames = [
        normalised(part).assign(label=variant)
        for found in tables.values()
        for variant, part in found["curves"].groupby("variant", sort=False)
    ]
    grouped = pd.concat(frames).groupby(["curve", "label", "fraction"], sort=False)["score"]
    table = pd.DataFrame({"score": grouped.mean(), "low": grouped.quantile(0.05), "high": grouped.quantile(0.95)})
    table["networks"] = grouped.count()
    return table.reset_index().rename(columns={"curve": "kind"})


def normalised(table: pd.DataFrame) -> pd.DataFrame:
    """Columns curve, fraction, score: of one network and variant; means over images, from 0 (baseline) to 1 (image)."""
    means = table.groupby(["curve", "fraction"], sort=False)["score"].mean()
    empty, full = means["deletion", 1.0], means["deletion", 0.0]
    return ((means - empty) / (full - empty) if full > empty else means * np.nan).reset_index()


def covered(tables: Tables, labels: Mapping[str, str], seed: int, resamples: int) -> pd.DataFrame:
    """What covering changes: network, label, variant, which ('object', or as much 'elsewhere'), n, and means.

    fall : mean of score − score_covered as a share of the mean |score|; answer, answer_covered : share of the object
        outlined, or of right classes; rank_correlation : of the maps before and after; each with _low and _high,
        percentile bootstrap over images. reason : where it could not be asked
    """
    rows = []
    for name, found in tables.items():
        if "cover" not in found:
            continue
        for (variant, which), part in found["cover"].groupby(["variant", "which"], sort=False):
            row = {"network": name, "label": labels[name], "variant": variant, "which": which, "n": len(part)}
            if "id" not in part or part["id"].isna().all():
                rows.append(row | {"n": 0, "reason": part["reason"].iloc[0]})
                continue
            rows.append(row | _changes(part, seed, resamples) | {"covered": part["covered"].iloc[0], "reason": ""})
    return pd.DataFrame(rows)


def _changes(part: pd.DataFrame, seed: int, resamples: int) -> dict[str, float]:
    rows = np.random.default_rng(seed).integers(0, len(part), (resamples, len(part)))
    fall = (part["score"] - part["score_covered"]) / part["score"].abs().mean()
    found = {"fall": fall, **{name: part[name] for name in ("answer", "answer_covered", "rank_correlation")}}
    row = {}
    for name, values in found.items():
        values = values.to_numpy(dtype=float)
        row[name] = values.mean()
        row[f"{name}_low"], row[f"{name}_high"] = np.quantile(values[rows].mean(1), [0.025, 0.975])
    return row


def randomized(tables: Tables, labels: Mapping[str, str]) -> pd.DataFrame:
    """Rank correlation with the maps of the intact network, by level: network, variant, level, randomized, n, means."""
    frames = []
    for name, found in tables.items():
        if "randomization" in found and "level" in found["randomization"]:
            grouped = found["randomization"].dropna(subset=["level"]).groupby(["variant", "level"], sort=False)
            means = grouped[["randomized", "rank_correlation", "rank_correlation_absolute"]].mean()
            means["n"] = grouped["rank_correlation"].count()
            frames.append(means.reset_index().assign(network=name, label=labels[name]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
