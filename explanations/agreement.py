"""Do models give the same explanations of the same images, and more so than chance and as much as two seeds do?

Takes maps as arrays, matched by the images' ids, and returns tables: four similarities of two models' maps of an image,
for every pair of models their mean with its null (explanations of *other* images by the same two models) and its
ceiling (same architecture, other seed). It makes no explanations and knows no model. Maps and masks are in
`masks`, groups of models in `clusters`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from similarity.calibration import geometric_ceiling, position
from similarity.factors import item_orders
from utils import InputError, pick

Maps = Mapping[str, Mapping[str, np.ndarray]]  # model -> id -> (H, W)

KINDS = {"unit": ("cosine", "rbf"), "ranks": ("spearman",), "top": ("kappa",)}
SIMILARITIES = {similarity: kind for kind, names in KINDS.items() for similarity in names}
SIDES = ["model_a", "model_b"]
SIGMA = 1.0  # maps of norm 1 are 0 to 2 apart: RBF is 1 for equal ones, 0.37 for orthogonal, 0.14 for opposite ones
FRACTION = 0.2  # of the pixels
REACHED = 1e-12  # a mean this near to the observed one has reached it: the sum is another's rounding


# --------------------------------------------------------------------------------------------------- maps, by their ids


@dataclass(frozen=True)
class Stacked:
    """Maps of the same images by all models: values (models, images, pixels), shape (H, W) of each."""

    models: list[str]
    ids: list[str]
    values: np.ndarray
    shape: tuple[int, int]


def stack(maps: Maps) -> Stacked:
    """All maps in one array, images in the order of the first model; others are matched by id. Refuses what differs."""
    if not maps or not all(maps.values()):
        raise InputError("no explanations were given; give {model: {id: map (H, W)}}")
    first = next(iter(maps))
    ids, shape = list(maps[first]), np.shape(next(iter(maps[first].values())))
    for model, of_images in maps.items():
        different = set(ids) ^ set(of_images)
        if different:
            problem = f"models {first!r} and {model!r} explain different images ({len(different)} of one only, first "
            raise InputError(f"{problem}{min(different)!r}); give both models' maps of the same images")
        for name, values in of_images.items():
            if np.ndim(values) != 2 or np.shape(values) != shape:
                problem = f"the map of {name!r} by {model!r} has shape {np.shape(values)}, others {shape}"
                raise InputError(f"{problem}; resize all maps to one (H, W)")
            if not np.isfinite(values).all():
                raise InputError(f"the map of {name!r} by {model!r} holds NaN or infinity; leave that model out")
    dtype = np.result_type(
        np.float32, *{np.asarray(v).dtype for of_images in maps.values() for v in of_images.values()}
    )
    values = np.empty((len(maps), len(ids), shape[0] * shape[1]), dtype)
    for place, of_images in enumerate(maps.values()):
        for row, name in enumerate(ids):
            values[place, row] = np.ravel(of_images[name])
    return Stacked(list(maps), ids, values, shape)


# ----------------------------------------------------------------------------------------------------- two models' maps


def per_image(
    maps: Maps, similarities: Sequence[str] = tuple(SIMILARITIES), *, sigma: float = SIGMA, fraction: float = FRACTION
) -> pd.DataFrame:
    """Similarity of two models' maps of every image: columns similarity, model_a, model_b, id, value, reason.

    cosine : of the maps as vectors of pixels
    rbf : exp(−‖x − y‖²/2σ²) of the maps scaled to norm 1
    spearman : rank correlation of the pixels
    kappa : Cohen's κ = (p_o − p_e)/(1 − p_e) of the `fraction` of pixels with the highest values, p_e from the shares
        that were marked. Pixels that tie at the edge are left out, all of them: what is marked has no arbitrary part.
    NaN, with the reason, where a map has none of it: all zero (cosine, rbf), constant (spearman, kappa), or more than
    the fraction tied at the top (kappa).
    """
    stacked, frames = stack(maps), []
    for kind, wanted in _kinds(similarities, sigma, fraction).items():
        features, reasons = _features(stacked.values, kind, fraction)
        for a, b in itertools.combinations(range(len(stacked.models)), 2):
            inner = np.einsum("np,np->n", features[a], features[b])
            why = _either(stacked.models, reasons, a, b)
            marked = features[a].mean(1), features[b].mean(1)
            for similarity in wanted:
                values = np.where(why == "", _similarity(inner, similarity, sigma, marked, stacked), np.nan)
                names = {"similarity": similarity, "model_a": stacked.models[a], "model_b": stacked.models[b]}
                frames.append(pd.DataFrame(names | {"id": stacked.ids, "value": values, "reason": why}))
    return pd.concat(frames, ignore_index=True)


def compare(
    maps: Maps,
    similarities: Sequence[str] = tuple(SIMILARITIES),
    *,
    twins: Sequence[tuple[str, str]] = (),
    sigma: float = SIGMA,
    fraction: float = FRACTION,
    permutations: int = 999,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """One row a pair of models and similarity, over images.

    twins : pairs of models that are the same architecture from another seed
    n, left_out : images with and without a value (`reason` counts why); mean x̄ and sd s of the values of `per_image`
    dissimilarity : √((1 − x̄)² + s²), with s² over n: the root of the mean of (1 − x)²
    low, high and dissimilarity_low, _high : percentile bootstrap over images, for these models
    null_mean : mean similarity of the two models' maps of different images (the mean over all derangements)
    p, null_high : one-sided share of orders of b's images whose mean reaches the observed one, and their 95 % point.
        All orders where those are at most 5040, else (1 + #)/(1 + permutations). An order may leave an image in its
        place: of derangements alone, images without agreement would be rejected too often. Not corrected for the
        number of pairs (`similarity.factors.holm`).
    ceiling : √(s_AA′ · s_BB′), s_AA′ the mean over the twins of a; NaN for a model without one
    u : (mean − null_mean)/(ceiling − null_mean), 0 other images, 1 another seed; NaN where the ceiling is not above
    """
    stacked, rows = stack(maps), []
    check_twins(twins, stacked.models)
    for similarity, a, b, gram, why in _grams(stacked, similarities, sigma, fraction):
        there = why == ""
        row = {"similarity": similarity, "settings": _settings(similarity, sigma, fraction)}
        row |= {"model_a": stacked.models[a], "model_b": stacked.models[b], "left_out": int((~there).sum())}
        row |= over_images(gram[np.ix_(there, there)], permutations, resamples, level, seed)
        rows.append(row | {"reason": counted(why)})
    table = pd.DataFrame(rows)
    paired = {frozenset(pair) for pair in twins}
    table.insert(4, "twins", [frozenset(pair) in paired for pair in zip(table["model_a"], table["model_b"])])
    return _with_ceiling(table)


def _kinds(similarities: Sequence[str], sigma: float, fraction: float) -> dict[str, list[str]]:
    """What has to be made of the maps -> the similarities that need it."""
    if not sigma > 0 or not 0 < fraction < 1:
        raise InputError(f"sigma must be above 0 and fraction between 0 and 1; got {sigma} and {fraction}")
    kinds: dict[str, list[str]] = {}
    for similarity in similarities:
        kinds.setdefault(pick("similarity of explanations", similarity, SIMILARITIES), []).append(similarity)
    return kinds


def _features(values: np.ndarray, kind: str, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(models, images, pixels) float64 whose inner products are the similarity, and (models, images) reasons.

    unit: maps of norm 1; ranks: centred ranks of norm 1; top: 1 at the marked pixels. Rows with a reason are 0.
    """
    features, reasons = np.zeros(values.shape), np.full(values.shape[:2], "", dtype=object)
    marked = int(np.floor(fraction * values.shape[2] + 0.5))
    if kind == "top" and not 0 < marked < values.shape[2]:
        raise InputError(f"fraction {fraction} of {values.shape[2]} pixels marks {marked}; choose one that splits them")
    for model, maps in enumerate(values):
        zero, constant = ~maps.any(1), np.ptp(maps, axis=1) == 0
        reasons[model] = np.where(zero, "zero map", np.where(constant & (kind != "unit"), "constant map", ""))
        if kind == "top":  # all that is above the first value left out
            edge = np.partition(maps, -marked - 1, axis=1)[:, -marked - 1]
            found = (maps > edge[:, None]).astype(float)
            reasons[model][~found.any(1) & ~constant] = f"more than {fraction:.0%} of the pixels tie at the top"
        else:
            found = maps / np.where(zero, 1, np.abs(maps).max(1))[:, None].astype(float)  # squares do not underflow
            found = found if kind == "unit" else rankdata(maps, axis=1) - (maps.shape[1] + 1) / 2
            norms = np.linalg.norm(found, axis=1)
            found /= np.where(norms > 0, norms, 1)[:, None]
        features[model] = np.where((reasons[model] == "")[:, None], found, 0)
    return features, reasons


def _similarity(inner: np.ndarray, similarity: str, sigma: float, marked, stacked: Stacked) -> np.ndarray:
    """From inner products of features; marked : shares of the pixels marked on both sides, for κ."""
    if similarity == "rbf":
        return np.exp(-(1 - inner) / sigma**2)  # ‖x − y‖² = 2 − 2⟨x, y⟩
    if similarity != "kappa":
        return inner
    p_a, p_b = marked
    observed = 1 - p_a - p_b + 2 * inner / stacked.values.shape[2]
    expected = p_a * p_b + (1 - p_a) * (1 - p_b)  # 1 where nothing is marked on both sides, for which there is a reason
    return np.divide(observed - expected, 1 - expected, out=np.full_like(observed, np.nan), where=expected < 1)


def _grams(stacked: Stacked, similarities: Sequence[str], sigma: float, fraction: float) -> Iterator[tuple]:
    """similarity, a, b, (images of a, images of b), (images,) reasons."""
    for kind, wanted in _kinds(similarities, sigma, fraction).items():
        features, reasons = _features(stacked.values, kind, fraction)
        for a, b in itertools.combinations(range(len(stacked.models)), 2):
            inner, marked = features[a] @ features[b].T, (features[a].mean(1)[:, None], features[b].mean(1)[None])
            for similarity in wanted:
                gram = _similarity(inner, similarity, sigma, marked, stacked)
                yield similarity, a, b, gram, _either(stacked.models, reasons, a, b)


def _either(models: list[str], reasons: np.ndarray, a: int, b: int) -> np.ndarray:
    """(images,) why a pair has no value; '' where it has."""
    named = [np.where(reasons[m] == "", "", reasons[m] + f" of {models[m]}") for m in (a, b)]
    both = np.where((named[0] != "") & (named[1] != ""), " and ", "")
    return named[0] + both + named[1]


def counted(why: np.ndarray) -> str:
    counts = pd.Series(why[why != ""], dtype=object).value_counts(sort=False)
    return "; ".join(f"{count} images: {reason}" for reason, count in counts.items())


def _settings(similarity: str, sigma: float, fraction: float) -> str:
    return {"rbf": f"σ = {sigma:g}", "kappa": f"top {fraction:.0%} of the pixels"}.get(similarity, "")


def over_images(gram: np.ndarray, permutations: int, resamples: int, level: float, seed: int) -> dict[str, float]:
    """Mean of the diagonal with its spread, interval and null; gram (n, n), of images with other images."""
    n, edges = len(gram), [(1 - level) / 2, (1 + level) / 2]
    names = ["mean", "low", "high", "sd", "dissimilarity", "dissimilarity_low", "dissimilarity_high"]
    row = {"n": n} | dict.fromkeys([*names, "null_mean", "null_high", "p"], np.nan)
    if n == 0:
        return row
    own = np.diagonal(gram)
    row |= {"mean": own.mean(), "sd": own.std(), "dissimilarity": np.sqrt(((1 - own) ** 2).mean())}
    if n > 1:
        drawn = own[np.random.default_rng(seed).integers(0, n, (resamples, n))]
        row["low"], row["high"] = np.quantile(drawn.mean(1), edges)
        distances = np.sqrt(((1 - drawn) ** 2).mean(1))
        row["dissimilarity_low"], row["dissimilarity_high"] = np.quantile(distances, edges)
        orders, _ = item_orders(n, permutations, seed)
        means = gram[np.arange(n), orders].mean(1)
        row["null_mean"] = (gram.sum() - own.sum()) / (n * (n - 1))
        row |= {"null_high": np.quantile(means, 0.95), "p": (means >= means[0] - REACHED).mean()}
    return row


def check_twins(twins: Sequence[tuple[str, str]], models: list[str]) -> None:
    for name in itertools.chain.from_iterable(twins):
        pick("model among the twins", name, dict.fromkeys(models))
    if any(a == b for a, b in twins):
        raise InputError("a model is given as its own twin; twins are the same architecture from another seed")


def _with_ceiling(table: pd.DataFrame) -> pd.DataFrame:
    found = []
    for _, rows in table.groupby("similarity", sort=False):
        pairs = rows[rows["twins"]]
        sides = pd.concat([pairs[[side, "mean"]].set_axis(["model", "mean"], axis=1) for side in SIDES])
        own = sides.groupby("model")["mean"].mean()
        ends = (rows[side].map(own).to_numpy(dtype=float) for side in SIDES)
        found.append(pd.Series(geometric_ceiling(*ends), rows.index))
    ceiling = pd.concat(found)
    u = position(table["mean"], table["null_mean"], ceiling)
    return table.assign(ceiling=ceiling, u=u, reason=table.pop("reason"))
