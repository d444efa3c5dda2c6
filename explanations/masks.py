"""What explanations have to do with masks: how much of a map lies in one, and does agreement follow other agreement?

Lesion mass and the pointing game of every map, with their null (explanations of *other* images by the same model); and
rank correlation over images of two models' explanation agreement with what else they agree on. Takes arrays and tables;
two models' maps are compared in `agreement`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from explanations.agreement import Maps, Stacked, check_twins, counted, over_images, stack
from utils import InputError

QUANTITIES = {"positive mass": "no positive attribution", "absolute mass": "zero map", "pointing": "zero map"}
FEWEST = 4  # images of a partial correlation
EQUAL = 1e-12  # equal correlations of ranks differ in their last bits with the order of the sum, and equal ones count


# -------------------------------------------------------------------------------------------------------- maps in masks


def in_mask(maps: Maps, masks: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row a map and quantity: model, id, quantity, value, area, reason.

    masks : id -> (H, W), bool or {0, 1}, of the maps' size; those of other images are not used
    positive mass : share of the positive attribution that lies in the mask
    absolute mass : share of the absolute attribution that does
    pointing : 1 where the map's maximum is in the mask (Zhang et al. 2018); of maxima that tie, the share that is
    area : the mask's share of the image: the value that a map without any place to it has
    NaN, with the reason, for an empty mask, and for a map of which there is nothing to share out.
    """
    stacked, frames = stack(maps), []
    inside = _masks(masks, stacked)
    for model, quantity, shares, why in _shares(stacked, inside):
        values = np.where(why == "", (shares * inside).sum(1), np.nan)
        names = {"model": model, "id": stacked.ids, "quantity": quantity}
        frames.append(pd.DataFrame(names | {"value": values, "area": inside.mean(1), "reason": why}))
    return pd.concat(frames, ignore_index=True)


def in_mask_summary(
    maps: Maps,
    masks: Mapping[str, np.ndarray],
    *,
    twins: Sequence[tuple[str, str]] = (),
    permutations: int = 999,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """One row a model and quantity of `in_mask`: its mean over images with interval, null and other seeds.

    n, left_out : images with and without a value (`reason` counts why); area : the masks' mean share of the image
    low, high : percentile bootstrap over images
    null_mean, null_high, p : the same masks on this model's maps of other images, as in `agreement.compare`
    other_seeds : mean of the models that are its twins (same architecture, other seed); NaN without one
    """
    stacked, rows = stack(maps), []
    check_twins(twins, stacked.models)
    inside = _masks(masks, stacked)
    for model, quantity, shares, why in _shares(stacked, inside):
        there = why == ""
        found = over_images(shares[there] @ inside[there].T, permutations, resamples, level, seed)
        kept = {name: found[name] for name in ("n", "mean", "low", "high", "null_mean", "null_high", "p")}
        row = {"model": model, "quantity": quantity, "left_out": int((~there).sum())} | kept
        rows.append(row | {"area": inside[there].mean() if there.any() else np.nan, "reason": counted(why)})
    table = pd.DataFrame(rows)
    means = table.set_index(["model", "quantity"])["mean"]
    others = {m: [pair[1 - pair.index(m)] for pair in twins if m in pair] for m in stacked.models}
    of_twins = [np.mean([means[o, q] for o in others[m]] or np.nan) for m, q in zip(table["model"], table["quantity"])]
    return table.assign(other_seeds=of_twins, reason=table.pop("reason"))


def _masks(masks: Mapping[str, np.ndarray], stacked: Stacked) -> np.ndarray:
    """(images, pixels) float64 of 0 and 1, in the order of the maps."""
    missing = [name for name in stacked.ids if name not in masks]
    if missing:
        raise InputError(f"{len(missing)} explained images have no mask, first {missing[0]!r}; give their masks")
    found = np.stack([np.asarray(_checked(masks[name], name, stacked.shape), dtype=float) for name in stacked.ids])
    return found.reshape(len(stacked.ids), -1)


def _checked(mask: np.ndarray, name: str, shape: tuple[int, int]) -> np.ndarray:
    if np.shape(mask) != shape:
        raise InputError(f"the mask of {name!r} has shape {np.shape(mask)}, its maps {shape}; resize one to the other")
    if not np.isin(mask, (0, 1)).all():
        raise InputError(f"the mask of {name!r} holds other values than 0 and 1; threshold it")
    return mask


def _shares(stacked: Stacked, inside: np.ndarray) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """model, quantity, (images, pixels) that sum to 1 over an image where there is no reason, (images,) reasons."""
    for model, maps in zip(stacked.models, stacked.values):
        for quantity, nothing in QUANTITIES.items():
            if quantity == "pointing":
                shares = np.where(maps.any(1)[:, None], maps == maps.max(1, keepdims=True), 0.0)
            else:
                shares = (np.maximum(maps, 0) if quantity == "positive mass" else np.abs(maps)).astype(float)
            sums = shares.sum(1, keepdims=True)
            why = np.where(inside.any(1), np.where(sums[:, 0] > 0, "", nothing), "empty mask").astype(object)
            yield model, quantity, shares / np.where(sums > 0, sums, 1), why


# ---------------------------------------------------------------------------------------------- what agreement follows


def follows_per_image(
    explanation: Mapping[str, float] | pd.Series,
    others: Mapping[str, Mapping[str, float] | pd.Series],
    *,
    area: Mapping[str, float] | pd.Series | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    permutations: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Spearman correlation over images of two models' explanation agreement with what else they agree on; a row each.

    explanation : id -> agreement of the explanations; others : name -> id -> agreement, e.g. of representations
        (`similarity.per_image`) or masks; area : id -> share of the image that is mask. Images whose value is NaN are
        left out and counted; ids that only one of the tables has are refused.
    Columns other, n, left_out; spearman, low, high, p; partial, partial_low, partial_high, partial_p: the same without
    what the ranks of the area say of both (NaN without an area); reason, where a correlation does not exist.

    low, high : percentile bootstrap over images, NaN where a resample has no correlation. p : two-sided,
    (1 + #{|permuted| ≥ |observed|})/(1 + permutations), of values permuted over images (of the partial: rank
    residuals). For these images and these models: the images' agreements share the models, and so does the interval.
    """
    if not others:
        raise InputError("nothing was given that explanation agreement could follow; give {name: {id: agreement}}")
    first, rows = _series(explanation, "explanation agreement"), []
    given = {name: _series(values, name) for name, values in others.items()}
    areas = None if area is None else _series(area, "area")
    for name, other in given.items():
        table = _joined(first, other if areas is None else pd.concat([other, areas], axis=1), name)
        row = {"other": name, "n": len(table), "left_out": len(first) - len(table)}
        rows.append(row | _correlated(table.to_numpy(dtype=float), level, resamples, permutations, seed))
    return pd.DataFrame(rows)


def _series(values: Mapping[str, float] | pd.Series, name: str) -> pd.Series:
    series = values if isinstance(values, pd.Series) else pd.Series(dict(values), dtype=float)
    if not series.index.is_unique:
        twice = series.index[series.index.duplicated()][0]
        raise InputError(f"{name} has the image {twice!r} twice; give one value an image, and ids as the index")
    return series.rename(name)


def _joined(first: pd.Series, rest: pd.Series | pd.DataFrame, name: str) -> pd.DataFrame:
    """Explanation agreement, other agreement (and area) of the images that have all, matched by id."""
    table = pd.concat([first, rest], axis=1)
    strange = first.index.symmetric_difference(rest.index)
    if len(strange):
        problem = f"{len(strange)} images are not in both explanation agreement and {name} (or area)"
        raise InputError(f"{problem}, first {strange[0]!r}; give values of the same images")
    table = table.dropna()
    if len(table) < FEWEST:
        raise InputError(
            f"{len(table)} images have both explanation agreement and {name}; at least {FEWEST} are needed"
        )
    return table


def _correlated(columns: np.ndarray, level: float, resamples: int, permutations: int, seed: int) -> dict:
    generator = np.random.default_rng(seed)
    drawn = columns[generator.integers(0, len(columns), (resamples, len(columns)))]
    row: dict = {}
    for name, partial in (("spearman", False), ("partial", True)):
        prefix = "partial_" if partial else ""
        row |= dict.fromkeys([name, f"{prefix}low", f"{prefix}high", f"{prefix}p"], np.nan)
        if partial and columns.shape[1] < 3:
            continue
        x, y = _sides(columns, partial)
        row[name] = float(_cosine(x, y))
        ends = np.quantile(_cosine(*_sides(drawn, partial)), [(1 - level) / 2, (1 + level) / 2])
        row |= {f"{prefix}low": ends[0], f"{prefix}high": ends[1]}
        if not np.isnan(row[name]):
            shuffled = generator.permuted(np.tile(x, (permutations, 1)), axis=1)
            reached = np.abs(_cosine(shuffled, y)) >= abs(row[name]) - EQUAL
            row[f"{prefix}p"] = (1 + int(reached.sum())) / (1 + permutations)
    constant = np.isnan(row["spearman"])
    return row | {"reason": "one of the two is the same in all images" if constant else ""}


def _sides(columns: np.ndarray, partial: bool) -> tuple[np.ndarray, np.ndarray]:
    """Centred ranks of the first two columns, (…, n) each, without what the third's ranks say of them if partial."""
    ranks = rankdata(columns, axis=-2)
    x, y, *z = np.moveaxis(ranks - ranks.mean(-2, keepdims=True), -1, 0)
    return (_residual(x, z[0]), _residual(y, z[0])) if partial else (x, y)


def _residual(ranks: np.ndarray, z: np.ndarray) -> np.ndarray:
    """What regression on z leaves; a constant z explains nothing, and what is but rounding is 0."""
    squares = (z**2).sum(-1, keepdims=True)
    slope = np.divide((ranks * z).sum(-1, keepdims=True), squares, out=np.zeros_like(squares), where=squares > 0)
    left = ranks - slope * z
    vanished = (left**2).sum(-1, keepdims=True) <= EQUAL**1.5 * (ranks**2).sum(-1, keepdims=True)
    return np.where(vanished, 0.0, left)


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN where one of them is 0."""
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.divide((x * y).sum(-1), norms, out=np.full(norms.shape, np.nan), where=norms > 0)
