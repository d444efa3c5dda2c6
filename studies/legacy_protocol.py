"""The earlier study's way of freezing and of measuring, as it was, faults included: for the study `legacy` alone.

Nothing here is for any other use: each function keeps on purpose a trap that SCIENCE (section 1) lists, says which, and
has a test that the trap is there and that the corrected protocol (`similarity`) does not have it. This is the only file
in which a denominator may carry an epsilon. What the description of the earlier study leaves open is said where it is
decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.spatial.distance import cdist, pdist
from scipy.stats import spearmanr
from torch import Tensor, nn

from model_sites import resolve_alias
from similarity.hooks import run_quietly
from similarity.sites import find_module
from utils import InputError

EPSILON = 1e-6  # in the denominator of the earlier study's linear CKA
MOST_ROWS = 500  # a longer side was cut to so many rows
MOST_COMPONENTS = 20  # of its "SVCCA"


def legacy_freeze(model: nn.Module) -> list[str]:
    """FAULTY ON PURPOSE: freeze every parameter with "encoder" in its name; returns these names.

    That also takes the transformer encoder inside Mask2Former's pixel *decoder*. No module is put into eval mode, so
    the running statistics of a frozen encoder's batch norms go on drifting. `models.freeze` goes by module, and keeps
    the encoder as it is and nothing else.
    """
    frozen = [name for name, _ in model.named_parameters() if "encoder" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def legacy_pool(output: Tensor) -> Tensor:
    """FAULTY ON PURPOSE: (batch, features), the mean of 4-D outputs over space and of 3-D ones over the last axis.

    For tokens and queries the last axis holds the channels, so what is left as features are positions. The corrected
    protocol pools by the names of the axes.
    """
    if output.ndim not in (3, 4):
        raise InputError(f"the earlier study pooled 3-D and 4-D activations, not one of shape {tuple(output.shape)}")
    return output.mean((2, 3)) if output.ndim == 4 else output.mean(-1)


def legacy_rows(model: nn.Module, loader: Iterable, names: Sequence[str]) -> dict[str, np.ndarray]:
    """FAULTY ON PURPOSE: {name: (calls × images, features)}; plain hooks append every call along the first dimension.

    A module that runs k times a pass gives k rows an image, batch by batch and call by call; no row knows its image.

    loader : batches with `.image`, Tensor (B, 3, H, W)
    names : paths of modules, in either spelling of transformers
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str):
        return lambda _module, _inputs, output: kept[name].append(legacy_pool(output.detach()).double().cpu())

    handles = [find_module(model, resolve_alias(model, name)).register_forward_hook(hook(name)) for name in names]
    try:
        for batch in loader:
            run_quietly(model, batch.image)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows).numpy() for name, rows in kept.items()}


def legacy_cut(X: np.ndarray, Y: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """FAULTY ON PURPOSE: each side longer than 500 rows is cut to 500 by its own permutation, then the longer side to
    the shorter by another one.

    A side that is cut is also shuffled: its rows no longer belong to the images of the other side's rows. The corrected
    protocol matches rows by image id and refuses anything else. The earlier study drew from an unseeded generator.
    """

    def shortened(rows: np.ndarray, most: int) -> np.ndarray:
        return rows[rng.permutation(len(rows))[:most]] if len(rows) > most else rows

    X, Y = shortened(X, MOST_ROWS), shortened(Y, MOST_ROWS)
    return shortened(X, len(Y)), shortened(Y, len(X))


def legacy_linear_cka(X: np.ndarray, Y: np.ndarray) -> float:
    """FAULTY ON PURPOSE: biased linear CKA of centred columns (Kornblith et al. 2019, eq. 4), 1e-6 in its denominator.

    Of independent features it is about √(pq)/√((n + p)(n + q)), not 0, and of small features the epsilon makes it 0.
    That columns were centred is taken from the measure's definition; the description does not say it.
    """
    X, Y = X - X.mean(0), Y - Y.mean(0)
    norms = np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y)
    return float(np.linalg.norm(Y.T @ X) ** 2 / (norms + EPSILON))


def legacy_svcca(X: np.ndarray, Y: np.ndarray) -> float:
    """FAULTY ON PURPOSE: mean correlation of the i-th singular score of X with the i-th of Y, both uncentred.

    k = min(20, p of X) components. No canonical correlation is in it: a singular vector's sign is arbitrary, so that it
    can be negative, and it depends on the features' means. nan for one feature, where the printed tables have nan.
    Where Y has fewer than k features (in none of the published pairs), as many components as Y has are compared.
    """
    if X.shape[1] < 2:
        return float("nan")
    k = min(MOST_COMPONENTS, *X.shape, *Y.shape)
    scores = [np.linalg.svd(side, full_matrices=False) for side in (X, Y)]
    left, right = (U[:, :k] * S[:k] for U, S, _ in scores)
    return float(np.mean([_pearson(left[:, i], right[:, i]) for i in range(k)]))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation; nan where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norms) if norms > 0 else float("nan")


def legacy_rbf_cka(X: np.ndarray, Y: np.ndarray) -> float:
    """FAULTY ON PURPOSE: biased RBF-CKA, exp(−d²/2σ²), with the median distance of X as σ of both sides.

    A side on another scale than X then has a kernel of ones, or of nothing but its diagonal. The median is that of the
    distances between different rows; nan where it is 0.
    """
    sigma = np.median(pdist(X))
    if sigma == 0:
        return float("nan")
    K, L = (_centered_twice(np.exp(-cdist(side, side, "sqeuclidean") / (2 * sigma**2))) for side in (X, Y))
    norms = np.linalg.norm(K) * np.linalg.norm(L)
    return float((K * L).sum() / norms) if norms > 0 else float("nan")


def _centered_twice(K: np.ndarray) -> np.ndarray:
    return K - K.mean(0) - K.mean(1, keepdims=True) + K.mean()


def legacy_rsa(X: np.ndarray, Y: np.ndarray) -> float:
    """Spearman correlation of the upper triangles of the correlation distances; nan for one feature, as printed.

    Right as a measure; its fault is in the rows that it was given.
    """
    if min(X.shape[1], Y.shape[1]) < 2:
        return float("nan")
    return float(spearmanr(pdist(X, "correlation"), pdist(Y, "correlation")).statistic)


LEGACY_MEASURES = {
    "linear_cka": legacy_linear_cka,
    "svcca": legacy_svcca,
    "rbf_cka": legacy_rbf_cka,
    "rsa": legacy_rsa,
}


def legacy_similarities(X: np.ndarray, Y: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """All four measures of one random cut of two sides' rows, each (rows, features): another `rng`, other numbers."""
    X, Y = legacy_cut(X, Y, rng)
    return {name: measure(X, Y) for name, measure in LEGACY_MEASURES.items()}
