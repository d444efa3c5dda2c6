"""Do two models segment the same images alike, and does that follow how alike they represent them?

Per image: Dice between the two models' masks, and error consistency, which asks whether they err at the same pixels
more often than their accuracies make them (Geirhos et al. 2020). Over images: rank correlation of representational
agreement (`similarity.per_image`) with that Dice. Not for scoring a model: see `loss_metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from torch import Tensor

from loss_metrics import image_metrics
from utils import InputError

BATCH = 256  # resamples at a time, which bounds memory


def compare_masks(masks_a: Tensor, masks_b: Tensor, truth: Tensor, ids: Sequence[str]) -> pd.DataFrame:
    """One row an image: id, area, dice, accuracy_a, accuracy_b, observed, expected, kappa.

    masks_a, masks_b, truth : (B, H, W) or (B, 1, H, W), bool or {0, 1}, all alike; rows belong to `ids`
    area : the true lesion's share of the image
    dice : 2|a ∩ b| / (|a| + |b|) between the two models' masks; 1 where both are empty
    accuracy_a, accuracy_b : share of pixels that are right, p_a and p_b
    observed : share of pixels where both are right or both are wrong (of two classes: where the masks are equal)
    expected : p_a p_b + (1 − p_a)(1 − p_b), that share were their errors independent
    kappa : (observed − expected) / (1 − expected); NaN where expected is 1, both right or both wrong everywhere
    """
    if not len(masks_a) == len(masks_b) == len(truth) == len(ids):
        counts = f"{len(masks_a)}, {len(masks_b)} and {len(truth)} masks for {len(ids)} ids"
        raise InputError(f"{counts}; give every image one of each")
    _refuse_repeated(ids, "ids")
    p_a, p_b = (image_metrics(masks, truth)["accuracy"] for masks in (masks_a, masks_b))
    between = image_metrics(masks_a, masks_b)
    observed, expected = between["accuracy"], p_a * p_b + (1 - p_a) * (1 - p_b)
    return pd.DataFrame(
        {
            "id": list(ids),
            "area": truth.flatten(1).double().mean(1).cpu().numpy(),
            "dice": between["dice"],
            "accuracy_a": p_a,
            "accuracy_b": p_b,
            "observed": observed,
            "expected": expected,
            "kappa": _beyond_chance(observed, expected),
        }
    )


def _beyond_chance(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    room = 1 - expected
    return np.divide(observed - expected, room, out=np.full(len(room), np.nan), where=room > 0)


def follows(
    per_image: pd.DataFrame,
    agreement: pd.DataFrame,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    permutations: int = 2000,
    seed: int = 0,
) -> pd.Series:
    """Spearman correlation over images of representational agreement with the Dice between the models' masks.

    per_image : id, dice, area (`compare_masks`); agreement : id, agreement (`similarity.per_image.mean_agreement`);
        the same images, in any order
    Returns n; spearman with low, high and p; partial with partial_low, partial_high and partial_p: the same without
    what the lesion's area says of both, since large lesions may make both high (partial correlation of ranks).

    Intervals are percentile bootstrap over images. An image keeps the agreement it has against all recorded images, so
    it is resampled as any other row of a table, no pair is counted twice, and the interval is for agreement with this
    set of images. p is two-sided, (1 + #{|permuted| ≥ |observed|}) / (1 + permutations), of agreements permuted over
    images; for the partial correlation their rank residuals are permuted. All NaN where a correlation does not exist,
    as when Dice is the same in all images; its interval where that is so in a resample.
    """
    table = _joined(per_image, agreement)
    ranks = rankdata(table[["agreement", "dice", "area"]].to_numpy(dtype=np.float64), axis=0)
    generator = np.random.default_rng(seed)
    intervals = _intervals(ranks, level, resamples, generator)
    x, y, z = (ranks - ranks.mean(0)).T
    sides = {"spearman": (x, y), "partial": (_residual(x, z), _residual(y, z))}
    row: dict[str, float] = {"n": len(table)}
    for (name, pair), (low, high) in zip(sides.items(), intervals):
        prefix = "partial_" if name == "partial" else ""
        p = _p_value(*pair, permutations, generator)
        row |= {name: float(_cosine(*pair)), f"{prefix}low": low, f"{prefix}high": high, f"{prefix}p": p}
    return pd.Series(row)


def _joined(per_image: pd.DataFrame, agreement: pd.DataFrame) -> pd.DataFrame:
    """One row an image: id, dice, area, agreement; matched by id."""
    for name, frame, needed in (
        ("per_image", per_image, ["id", "dice", "area"]),
        ("agreement", agreement, ["id", "agreement"]),
    ):
        absent = [column for column in needed if column not in frame.columns]
        if absent:
            raise InputError(f"the table {name} lacks the columns {absent}; it needs {needed}")
        _refuse_repeated(frame["id"], name)
        missing = frame.loc[frame[needed].isna().any(axis=1), "id"]
        if len(missing):
            raise InputError(
                f"the table {name} has no value for {len(missing)} images, first {missing.iloc[0]!r}; leave them out"
            )
    different = set(per_image["id"]) ^ set(agreement["id"])
    if different:
        raise InputError(
            f"{len(different)} images are in one table only, first {min(different)!r}; give tables of the same images"
        )
    if len(per_image) < 4:
        raise InputError(f"{len(per_image)} images are too few for a partial correlation; give at least 4")
    return per_image[["id", "dice", "area"]].merge(agreement[["id", "agreement"]], on="id", validate="one_to_one")


def _refuse_repeated(ids: Sequence[str], where: str) -> None:
    repeated = pd.Series(list(ids))
    repeated = repeated[repeated.duplicated()]
    if len(repeated):
        raise InputError(
            f"{where} holds {len(repeated)} ids twice, first {repeated.iloc[0]!r}; every image has one row"
        )


def _correlations(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of ranks x, y, z, (…, n, 3): Pearson of x and y, and the same with z regressed out of both; (…,) each."""
    x, y, z = np.moveaxis(columns - columns.mean(-2, keepdims=True), -1, 0)
    return _cosine(x, y), _cosine(_residual(x, z), _residual(y, z))


def _residual(ranks: np.ndarray, z: np.ndarray) -> np.ndarray:
    """What regression on ranks z leaves of ranks, both centred, along the last axis.

    A constant z explains nothing. Ranks that follow from z linearly are equal or reversed, and leave exactly 0.
    """
    squares = (z**2).sum(-1, keepdims=True)
    slope = np.divide((ranks * z).sum(-1, keepdims=True), squares, out=np.zeros_like(squares), where=squares > 0)
    return ranks - slope * z


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN where one of them is 0."""
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.divide((x * y).sum(-1), norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def _intervals(
    ranks: np.ndarray, level: float, resamples: int, generator: np.random.Generator
) -> list[tuple[float, float]]:
    """(low, high) of both correlations over images drawn with replacement, ranked anew."""
    found = []
    for start in range(0, resamples, BATCH):
        rows = generator.integers(0, len(ranks), (min(BATCH, resamples - start), len(ranks)))
        found.append(np.stack(_correlations(rankdata(ranks[rows], axis=1))))
    edges = [(1 - level) / 2, (1 + level) / 2]
    return [tuple(map(float, np.quantile(each, edges))) for each in np.concatenate(found, axis=1)]


def _p_value(x: np.ndarray, y: np.ndarray, permutations: int, generator: np.random.Generator) -> float:
    """Two-sided, of the cosine of x permuted against y; both centred, (n,)."""
    observed = abs(float(_cosine(x, y)))
    if np.isnan(observed):
        return np.nan
    reached = 0
    for start in range(0, permutations, BATCH):
        shuffled = generator.permuted(np.tile(x, (min(BATCH, permutations - start), 1)), axis=1)
        # equal correlations of ranks differ in their last bits with the order of the sum, and equal ones count
        reached += np.count_nonzero(np.abs(_cosine(shuffled, y)) >= observed - 1e-12)
    return (1 + reached) / (1 + permutations)
