"""How much of a statistic of the images a site keeps: a linear read-out, and whose neighbours follow whose.

R² of ridge regression on images that it was not fitted to (`ridge`) asks for what is linearly there; information
imbalance asks for what neighbours tell, curved or not. Neither says that the network uses it. What the statistics are,
this room does not know: see `image_statistics` and `lesion_statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from processing.planes import Depths, relative_depths
from processing.ridge import Readout, read_out
from similarity.inputs import NotComputable, as_matrix
from similarity.intervals import FEWEST_IMAGES
from similarity.neighbors import cloud, imbalances
from similarity.recording import Recording
from utils import InputError, progress

COLUMNS = ["site", "depth", "statistic", "r2", "low", "high", "null_high", "p", "imbalance_from", "imbalance_to"]
COLUMNS += ["features", "images", "reason"]


def kept(
    recording: Recording,
    statistics: pd.DataFrame,
    *,
    folds: int = 5,
    permutations: int = 200,
    k: int = 1,
    level: float = 0.95,
    seed: int = 0,
    depths: Depths | None = None,
) -> pd.DataFrame:
    """What every site of a recording keeps of every statistic: one row a site and statistic.

    statistics : long form (id, statistic, value) with a number for every recorded image; other images are not read
    depth : relative, see `planes.relative_depths`, which also takes `depths`
    r2 : out of sample, see `ridge.Readout`; low, high : its interval over images at `level` (jackknife)
    null_high : the `level` quantile of R² with the statistic's images permuted; p : (1 + #{null ≥ r2}) / (1 + their
        number). One permutation serves all sites and statistics
    imbalance_from : Δ(site → statistic) by k neighbours, (k + 1)/n where the site's neighbours are the statistic's, 1
        where they tell nothing of it; imbalance_to : Δ(statistic → site). The statistic is one standardised column
    reason : why a site has no numbers (it is constant); else ''

    Images are matched by id, folds and permutations follow the ids: the order of the rows changes nothing.
    """
    _check_options(recording, folds, permutations, k, level)
    relative = relative_depths(recording, depths)
    ids = sorted(recording.ids)
    recording, table = recording.select(ids=ids), statistic_columns(statistics, ids)
    sites, reasons = _usable(recording)
    Y, fold = table.to_numpy(), folds_of(ids, folds=folds, seed=seed)
    orders = permuted_orders(len(ids), permutations, seed)
    numbers = {}
    for site, X in progress(sites.items(), desc="what sites keep", unit="site"):
        try:
            numbers[site] = _scores(read_out(X.double().cpu().numpy(), Y, fold, orders), level)
        except NotComputable as reason:
            reasons[site] = f"site {site!r}: {reason}"
    both = _imbalances({site: sites[site] for site in numbers}, table, k)
    rows = []
    for site, depth in relative.items():
        about = {"site": site, "depth": depth, "statistic": list(table), "reason": reasons.get(site, "")}
        about |= {"features": recording[site].shape[1], "images": len(ids)}
        rows.append(pd.DataFrame(about | numbers.get(site, {}) | both.get(site, {})))
    return pd.concat(rows, ignore_index=True).reindex(columns=COLUMNS)


def _usable(recording: Recording) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({site: (n, p)}, {site: why it cannot be read})."""
    sites, reasons = {}, {}
    for site in recording.names:
        try:
            sites[site] = as_matrix(recording[site], f"site {site!r}", None)
        except NotComputable as reason:
            reasons[site] = str(reason)
    return sites, reasons


def _scores(found: Readout, level: float) -> dict[str, np.ndarray]:
    """Columns of `kept`, each (T,)."""
    low, high = found.interval(level)
    return {"r2": found.r2, "low": low, "high": high, "null_high": found.null_high(level), "p": found.p}


def _imbalances(sites: dict[str, Tensor], table: pd.DataFrame, k: int) -> dict[str, dict[str, np.ndarray]]:
    """Δ of each site and statistic both ways. All sites at once: the distances of a statistic are sorted only once."""
    if not sites:
        return {}
    standard = (table - table.mean()) / table.std()
    targets = [cloud(torch.tensor(y.to_numpy()[:, None]), side=name, k=k) for name, y in standard.items()]
    clouds = [cloud(X.cpu(), side=site, k=k) for site, X in sites.items()]
    pairs = zip(sites, imbalances(clouds, targets), imbalances(targets, clouds).T)
    return {site: {"imbalance_from": from_site, "imbalance_to": to_site} for site, from_site, to_site in pairs}


# ---------------------------------------------------------------------------------- which images, and what is refused


def folds_of(ids: Sequence[str], *, folds: int = 5, seed: int = 0) -> np.ndarray:
    """(n,) the fold in which each image is held out, of nearly equal sizes; it depends on the set of ids alone."""
    ordered = np.random.default_rng(seed).permutation(sorted(ids))
    place = {image: rank * folds // len(ids) for rank, image in enumerate(ordered.tolist())}
    return np.array([place[image] for image in ids])


def permuted_orders(n: int, permutations: int, seed: int) -> np.ndarray:
    """(permutations, n) orders of n images."""
    return np.random.default_rng([seed, 1]).permuted(np.tile(np.arange(n), (permutations, 1)), axis=1)


def statistic_columns(statistics: pd.DataFrame, ids: Sequence[str]) -> pd.DataFrame:
    """A long table (id, statistic, value) as columns of the images asked for; InputError where one has no number."""
    absent = [name for name in ("id", "statistic", "value") if name not in statistics]
    if absent:
        raise InputError(f"statistics has no column {absent[0]!r}; give a long table of id, statistic, value")
    twice = statistics[statistics.duplicated(["id", "statistic"])]
    if len(twice):
        raise InputError(f"statistic {twice['statistic'].iloc[0]!r} of image {twice['id'].iloc[0]!r} comes twice")
    names = statistics["statistic"].unique()
    if not len(names):
        raise InputError("statistics is empty; give at least one statistic of the recorded images")
    missing = sorted(set(ids) - set(statistics["id"]))
    if missing:
        raise InputError(
            f"{len(missing)} recorded images have no statistics, the first {missing[0]!r}; compute them for all, or "
            "select(ids=…) those that have them"
        )
    wide = statistics.pivot(index="id", columns="statistic", values="value").loc[list(ids), names].astype(float)
    for name, values in wide.items():
        _check_statistic(name, values)
    return wide


def _check_statistic(name: str, values: pd.Series) -> None:
    """InputError where some image has no finite value, or all have the same."""
    without = values.index[~np.isfinite(values)]
    if len(without):
        raise InputError(
            f"statistic {name!r} has no finite value for {len(without)} of {len(values)} images, the first "
            f"{without[0]!r}; leave it out, or select(ids=…) the images that have it"
        )
    try:
        as_matrix(values.to_numpy()[:, None], f"statistic {name!r}")
    except NotComputable as reason:
        raise InputError(f"{reason}; leave it out") from reason


def _check_options(recording: Recording, folds: int, permutations: int, k: int, level: float) -> None:
    n = len(recording)
    if n < FEWEST_IMAGES:
        raise InputError(f"{n} images are too few to read statistics out of; record at least {FEWEST_IMAGES}")
    if not 2 <= folds <= n:
        raise InputError(f"folds must be from 2 to the number of images ({n}), got {folds}")
    if permutations < 1:
        raise InputError(f"permutations must be at least 1, got {permutations}")
    if not 1 <= k <= n - 2:
        raise InputError(f"k must be from 1 to the number of images − 2 ({n - 2}), got {k}")
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1, got {level}")
    several = [site for site in recording.names if recording[site].ndim != 2]
    if several:
        raise InputError(
            f"policy {recording.policy!r} gives site {several[0]!r} several rows an image, and a statistic has one; "
            "record with 'gap' or 'flat:g'"
        )
