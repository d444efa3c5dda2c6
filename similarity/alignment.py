"""Two sites in one space: maps fitted on half of the images, judged on the other half, matched image by image.

Where a measure of `measures` says how alike two sites are, an alignment says which point of one belongs to which
point of the other, for images that no map has seen. Every map is linear in the site's leading principal components,
and held-out images are placed by what the fit half alone decided. It is not for sites with several rows an image
(grids, tokens), whose rows are not independent, and it replaces no null of `plane`: its own is that of retrieval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from similarity.alignment_maps import MAPS, Options, Side, refuse_narrow
from similarity.cells import prepare_all
from similarity.inputs import NotComputable, as_matrix
from similarity.plane import match_rows
from similarity.policies import parse_policy
from similarity.recording import Recording
from similarity.retrieval import hit_count, permutation_p, strictly_nearest
from similarity.subspaces import basis

METHODS = tuple(MAPS)
IMAGES_A_COMPONENT = 4  # fit images for every principal component kept of a side
SCORES = ("r2", "r2_ba", "retrieval_ab", "retrieval_ba")


@dataclass(frozen=True)
class Alignment:
    """Held-out images of two sites in one space; row i of both sides is image ids[i].

    a, b : (n_test, components) held-out images of A's and of B's site; the fit half's mean is the origin
    fit_a, fit_b : (n_fit, components) the images the maps were fitted on, for plots; no score looks at them
    ids, fit_ids : the image ids of both halves, each in alphabetical order
    principal : how many principal components of A and of B the maps were fitted in
    """

    a: np.ndarray
    b: np.ndarray
    fit_a: np.ndarray
    fit_b: np.ndarray
    ids: list[str]
    fit_ids: list[str]
    method: str
    components: int
    principal: tuple[int, int]

    @cached_property
    def r2(self) -> float:
        """R² of B's held-out coordinates from A's: 1 − Σ‖aᵢ − bᵢ‖² / Σ‖bᵢ − mean of B's fit half‖² (which is 0).

        At most 1, and not bounded below: a is B's prediction as it stands, without a slope. Sides of equal size whose
        coordinates correlate by ρ on all axes have 2ρ − 1, so unrelated ones about −1, and 0 is no chance level.
        cca: all coordinates have variance 1 on the fit half, so the two directions differ by sampling only.
        procrustes: both sides have the same Σ‖·‖² on the fit half, and so it is there, too; on the fit half R² is
        1 − d² with d the Procrustes distance of the components. manifold: an axis has one scale for both sides, each
        side's share of it being what the fit gave it, so the directions may differ: see `r2_ba`.
        """
        return _explained(self.b, self.a, "B")

    @cached_property
    def r2_ba(self) -> float:
        """R² of A's held-out coordinates from B's: 1 − Σ‖aᵢ − bᵢ‖² / Σ‖aᵢ − mean of A's fit half‖²."""
        return _explained(self.a, self.b, "A")

    @property
    def retrieval_ab(self) -> float:
        """Share of A's held-out images whose nearest image of B's, by Euclidean distance, is the same image.

        An image with several nearest ones (equal to float32 precision) is not retrieved: no row order breaks ties.
        """
        return hit_count(self.nearest_ab) / len(self.ids)

    @property
    def retrieval_ba(self) -> float:
        """Share of B's held-out images whose nearest image of A's is the same image."""
        return hit_count(self.nearest_ba) / len(self.ids)

    @property
    def chance(self) -> float:
        """Expected retrieval of images of B in random order: 1 / n_test (without ties)."""
        return 1 / len(self.ids)

    @cached_property
    def p_value_ab(self) -> float:
        """Of `retrieval_ab`, exact over all permutations of B's held-out images: see `permutation_p`."""
        return permutation_p(self.nearest_ab)

    @cached_property
    def p_value_ba(self) -> float:
        """Of `retrieval_ba`, exact over all permutations of B's held-out images: see `permutation_p`."""
        return permutation_p(self.nearest_ba)

    @cached_property
    def nearest_ab(self) -> np.ndarray:
        """(n_test,) for every row of a the row of b nearest to it, −1 where several are."""
        return strictly_nearest(cdist(self.a, self.b))

    @cached_property
    def nearest_ba(self) -> np.ndarray:
        """(n_test,) for every row of b the row of a nearest to it, −1 where several are."""
        return strictly_nearest(cdist(self.b, self.a))


def align(
    A: Recording,
    site_a: str,
    B: Recording,
    site_b: str,
    *,
    method: str,
    components: int = 10,
    seed: int = 0,
    neighbors: int = 10,
    weight: float = 1.0,
    principal: int = 50,
) -> Alignment:
    """Site site_a of A and site_b of B in one space of `components` axes, fitted on a random half of the images.

    Images are matched by id, and halved by `seed` in the order of their ids, whatever the order of the rows; of an odd
    number one more is fitted on. Each side is centred with the fit half's mean and reduced to the fit half's leading
    principal components: as many as its numerical rank, at most `principal`, at most a quarter of the fit images.

    method : 'cca', the leading canonical variates, of unit variance on the fit half (Hotelling 1936); 'procrustes', the
        first `components` principal components of each side, zeros where a side has fewer, B's rotated onto A's
        (Schönemann 1966) and scaled to A's Σ‖·‖²; 'manifold', linear maps that keep near images near on each side and
        join every image to itself (Ham, Lee & Saul 2005; Wang & Mahadevan 2009), see `manifold`
    neighbors : of 'manifold', how many nearest images are joined to each image on its own side
    weight : of 'manifold', the strength that joins an image of A to itself in B, in units of the mean total strength
        that joins an image to its own side's neighbours

    ValueError for recordings of other images or of several rows an image; `NotComputable` for a constant site or one
    with fewer dimensions than the method needs.
    """
    options = Options(components, neighbors, weight, principal)
    A, B = _matched(A, {site_a}, B, {site_b})
    _check([method], options, len(A))
    halves = _halves(A.ids, seed)
    left, right = (
        _reduced(A[site_a], halves, options, "A's", site_a),
        _reduced(B[site_b], halves, options, "B's", site_b),
    )
    return _aligned(left, right, method, options, halves)


def alignment_table(
    A: Recording,
    B: Recording,
    pairs: Sequence[tuple[str, str]],
    *,
    methods: Sequence[str] = METHODS,
    splits: int = 5,
    components: int = 10,
    seed: int = 0,
    neighbors: int = 10,
    weight: float = 1.0,
    principal: int = 50,
) -> pd.DataFrame:
    """One row a pair of sites and method: r2, r2_ba, retrieval_ab, retrieval_ba as means over random halves.

    The halves are those of `align` with seed, seed + 1, …; `…_sd` is the standard deviation over them (NaN of one
    split), a spread and no standard error, since halves share images. p_value_ab and p_value_ba: the exact p of each
    split, joined by Rüger's rule (1978), K/k times the k-th smallest of K, k = ⌈K/2⌉, which holds whatever their
    dependence; p_value: twice the smaller of the two (Bonferroni). A pair that a method cannot be used on has NaN and
    says why in `note`.
    """
    options = Options(components, neighbors, weight, principal)
    pairs = list(pairs)
    if not pairs:
        raise ValueError("pairs is empty; give (site of A, site of B) pairs, such as calibration.matched_depth_pairs")
    _check_whole("splits", splits)
    A, B = _matched(A, {a for a, _ in pairs}, B, {b for _, b in pairs})
    _check(methods, options, len(A))
    keys = list(dict.fromkeys((a, b, method) for a, b in pairs for method in methods))
    found = [_split(A, B, keys, options, seed + split) for split in range(splits)]
    return pd.DataFrame([_row(key, [each[key] for each in found], len(A), components) for key in keys])


# -------------------------------------------------------------------------------------------------------- preparation


@dataclass(frozen=True)
class _Halves:
    """Rows to fit on and rows held out, each in ascending order, of images `ids`."""

    fit: np.ndarray
    test: np.ndarray
    ids: list[str]


def _matched(A: Recording, sites_a: set[str], B: Recording, sites_b: set[str]) -> tuple[Recording, Recording]:
    """The two recordings with these sites only and their rows in the order of the ids."""
    for name, recording in (("A", A), ("B", B)):
        if parse_policy(recording.policy)[0] not in ("gap", "mean", "mask", "flat"):
            raise ValueError(
                f"{name} was recorded with policy {recording.policy!r}, which does not give one row of features an "
                "image; record with 'gap', 'mean', 'mask' or 'flat:g' to align it"
            )
    A, B = _only(A, sites_a), _only(B, sites_b)
    A = A.select(ids=sorted(A.ids))
    return A, match_rows(A, B)


def _only(recording: Recording, names: set[str]) -> Recording:
    """The recording with these sites alone, so that no other is copied."""
    features = {name: recording[name] for name in names}
    return replace(recording, features=features, sites=[site for site in recording.sites if site.name in features])


def _halves(ids: list[str], seed: int) -> _Halves:
    order, cut = np.random.default_rng(seed).permutation(len(ids)), (len(ids) + 1) // 2
    return _Halves(np.sort(order[:cut]), np.sort(order[cut:]), ids)


def _reduced(X: Tensor, halves: _Halves, options: Options, whose: str, site: str) -> Side:
    """Principal components of the fit half, decided by its rows alone; the held-out rows are projected on them."""
    side = f"{whose} site {site!r}"
    as_matrix(X, side, None)
    rows = as_matrix(X[torch.as_tensor(halves.fit)], f"{side}, on the half of the images it is fitted on,", None)
    found = basis(rows, side=side, components=min(options.principal, len(rows) // IMAGES_A_COMPONENT))
    sizes = torch.linalg.vector_norm(found.loadings, dim=1)  # singular values
    if len(sizes) == 0:
        raise NotComputable(f"{side} varies over the images by rounding only, so nothing can be aligned")
    mean = rows.double().mean(0)
    rest = (rows.double() - mean).mean(0)  # what rounding left, as in `centered`
    held_out = X[torch.as_tensor(halves.test)].double() - mean - rest
    scores = (found.Q * sizes, held_out @ (found.loadings / sizes[:, None]).T, sizes / (len(rows) - 1) ** 0.5)
    return Side(*(each.cpu().numpy() for each in scores), side)


def _check(methods: Sequence[str], options: Options, n: int) -> None:
    """Refuse what no site could be aligned with."""
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        what = f"unknown method {unknown[0]!r}" if unknown else "methods is empty"
        raise ValueError(f"{what}; choose from {', '.join(METHODS)}")
    for name in ("components", "neighbors", "principal"):
        _check_whole(name, getattr(options, name))
    if not (options.weight > 0 and math.isfinite(options.weight)):
        raise ValueError(f"weight must be a number above 0, got {options.weight}")
    n_fit = (n + 1) // 2
    if options.components > options.principal:
        raise ValueError(
            f"components={options.components} axes cannot be found in principal={options.principal} principal "
            "components; ask for fewer axes or keep more principal components"
        )
    if options.components > n_fit // IMAGES_A_COMPONENT:
        raise ValueError(
            f"components={options.components} needs at least {IMAGES_A_COMPONENT * options.components} images to fit "
            f"on, and half of {n} images is {n_fit}; use more images or components ≤ {n_fit // IMAGES_A_COMPONENT}"
        )
    if "manifold" in methods and options.neighbors > n_fit - 2:
        raise ValueError(f"neighbors={options.neighbors} of each of {n_fit} fit images; use at most {n_fit - 2}")


def _check_whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")


# --------------------------------------------------------------------------------------------------------------- maps


def _aligned(left: Side, right: Side, method: str, options: Options, halves: _Halves) -> Alignment:
    refuse_narrow(left, right, method, options.components)
    P, Q = MAPS[method](left, right, options)
    placed = left.test @ P, right.test @ Q, left.fit @ P, right.fit @ Q
    ids = [[halves.ids[row] for row in half] for half in (halves.test, halves.fit)]
    return Alignment(*placed, *ids, method, options.components, (len(P), len(Q)))


# ------------------------------------------------------------------------------------------------------------- scores


def _explained(target: np.ndarray, source: np.ndarray, side: str) -> float:
    """1 − Σ‖target − source‖² / Σ‖target‖²; maps of centred features put the fit half's mean at 0."""
    total = float((target**2).sum())
    if total == 0:
        raise NotComputable(f"{side}: all held-out images have the fit half's mean; nothing to explain")
    return 1 - float(((target - source) ** 2).sum()) / total


# -------------------------------------------------------------------------------------------------------------- table


def _split(A: Recording, B: Recording, keys: list[tuple], options: Options, seed: int) -> dict:
    """{(site_a, site_b, method): scores, or the sentence why there are none} of one half; sites are reduced once."""
    halves = _halves(A.ids, seed)
    x, notes = prepare_all(lambda X, site: _reduced(X, halves, options, "A's", site), A.features)
    y, other_notes = prepare_all(lambda X, site: _reduced(X, halves, options, "B's", site), B.features)
    found = {}
    for a, b, method in keys:
        note = notes.get(a) or other_notes.get(b)
        found[a, b, method] = note or _scores(x[a], y[b], method, options, halves)
    return found


def _scores(left: Side, right: Side, method: str, options: Options, halves: _Halves) -> dict | str:
    try:
        found = _aligned(left, right, method, options, halves)
        return {name: getattr(found, name) for name in (*SCORES, "p_value_ab", "p_value_ba")}
    except NotComputable as reason:
        return str(reason)


def _row(key: tuple[str, str, str], results: list[dict | str], n: int, components: int) -> dict:
    """A row of the table; a pair that any split refuses has no numbers."""
    refused = next((result for result in results if isinstance(result, str)), "")
    row = dict(zip(("site_a", "site_b", "method"), key))
    row |= {"splits": len(results), "components": components, "n_fit": (n + 1) // 2, "n_test": n // 2}
    for name in SCORES:
        values = np.array([np.nan if refused else result[name] for result in results])
        row |= {name: values.mean(), f"{name}_sd": values.std(ddof=1) if len(values) > 1 else np.nan}
    row["chance"] = 1 / (n // 2)
    each = [np.nan if refused else _joined([result[f"p_value_{d}"] for result in results]) for d in ("ab", "ba")]
    row |= {"p_value": min(1.0, 2 * min(each)) if not refused else np.nan, "p_value_ab": each[0], "p_value_ba": each[1]}
    return row | {"note": refused}


def _joined(p_values: list[float]) -> float:
    """One p of several dependent ones: K/k times the k-th smallest, k = ⌈K/2⌉ (Rüger 1978); 1 if that is more."""
    many, k = len(p_values), (len(p_values) + 1) // 2
    return min(1.0, many / k * sorted(p_values)[k - 1])
