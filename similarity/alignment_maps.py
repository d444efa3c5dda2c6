"""The maps of an alignment: from two sites' principal components on the fit half into one space, both linear.

Each function returns what the components of A and of B are multiplied with. Choosing halves and scoring what the maps
do with held-out images is the subject of `alignment`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg, sparse

from similarity import neighbors as neighborhoods
from similarity.inputs import NotComputable


@dataclass(frozen=True)
class Options:
    """What `align` and `alignment_table` are asked alike; see there."""

    components: int
    neighbors: int
    weight: float
    principal: int


@dataclass(frozen=True)
class Side:
    """Principal scores of one site, fit (n_fit, k) and test (n_test, k), and each one's standard deviation (k,)."""

    fit: np.ndarray
    test: np.ndarray
    deviation: np.ndarray
    name: str


def refuse_narrow(left: Side, right: Side, method: str, components: int) -> None:
    """cca and manifold need `components` dimensions of each side; procrustes pads the narrower one with zeros."""
    both = sorted(((side.fit.shape[1], side.name) for side in (left, right)), reverse=method == "procrustes")
    width, name = both[0]
    if width < components:
        which = "has" if method != "procrustes" else "is the wider one and has"
        raise NotComputable(
            f"{name} {which} {width} dimensions on the fit half, too few for components={components} of {method}; ask "
            f"for at most {width}"
        )


def cca(left: Side, right: Side, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Canonical variates from the SVD of Q_aᵀQ_b, orthonormal bases of the two fit halves (Hotelling 1936)."""
    X, Y = left.fit / left.deviation, right.fit / right.deviation
    U, _, Vt = linalg.svd(X.T @ Y)
    c = options.components
    return U[:, :c] / left.deviation[:, None], Vt[:c].T / right.deviation[:, None]


def procrustes(left: Side, right: Side, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """B's components rotated onto A's: R = UVᵀ of the SVD of YᵀX (Schönemann 1966), and scaled by ‖X‖/‖Y‖.

    The least-squares scale would be that times the cosine of X and YR: it shrinks B the more the less alike the sides
    are, so that R² would divide by what was shrunk and retrieval would compare a large cloud with a small one.
    """
    P, pad = np.eye(left.fit.shape[1], options.components), np.eye(right.fit.shape[1], options.components)
    X, Y = left.fit @ P, right.fit @ pad
    U, _, Vt = linalg.svd(Y.T @ X)
    return P, pad @ U @ Vt * (linalg.norm(X) / linalg.norm(Y))


def manifold(left: Side, right: Side, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Linear maps with the smallest Σ W_ij ‖z_i − z_j‖² over a joint graph: Z L Zᵀ g = λ Z D Zᵀ g, smallest λ first.

    Ham, Lee & Saul 2005; Wang & Mahadevan 2009, with features: Z is block-diagonal, the two sides' principal
    components (k_a + k_b, 2 n_fit) in units of their standard deviation, which changes no solution and keeps Z D Zᵀ
    well conditioned. W holds each side's heat kernel (`_heat_graph`) and one weight between the two rows of every
    image; D its row sums, L = D − W. The graph's trivial solution, all images in one point, is dropped by centring:
    every column of a centred Z averages to 0 on each side, so no combination of them is a constant other than 0. Each
    axis is then scaled to mean square 1 over both sides' fit images together.
    """
    X, Y = left.fit / left.deviation, right.fit / right.deviation
    graphs = [_heat_graph(side, options.neighbors) for side in (left, right)]
    n = len(X)
    tie = options.weight * sum(graph.sum() for graph in graphs) / (2 * n)
    ties = sparse.diags_array(np.full(n, tie))
    W = sparse.block_array([[graphs[0], ties], [ties, graphs[1]]], format="csr")
    D = sparse.diags_array(W.sum(1))
    Z = linalg.block_diag(X, Y)  # images as rows: the papers' Zᵀ
    _, g = linalg.eigh(Z.T @ ((D - W) @ Z), Z.T @ (D @ Z), subset_by_index=[0, options.components - 1])
    g /= np.sqrt(((Z @ g) ** 2).mean(0))
    k = X.shape[1]
    return g[:k] / left.deviation[:, None], g[k:] / right.deviation[:, None]


def _heat_graph(side: Side, k: int) -> sparse.csr_array:
    """(n, n): exp(−d²/2σ²) where either image is among the other's k nearest, σ the median distance to a neighbour.

    Distances are Euclidean in the principal components; those tied for the k-th place are all neighbours.
    """
    graph = neighborhoods.cloud(torch.as_tensor(side.fit), side=side.name, k=k).graph
    joined = graph.maximum(graph.T).tocoo()
    from_, to = joined.coords
    distances = linalg.norm(side.fit[from_] - side.fit[to], axis=1)
    near, far = graph.tocoo().coords
    sigma = float(np.median(linalg.norm(side.fit[near] - side.fit[far], axis=1)))
    if sigma == 0:
        raise NotComputable(
            f"{side.name}: more than half of the {k} nearest images are identical, so the median neighbour distance is "
            "0; leave out repeated images"
        )
    return sparse.csr_array((np.exp(-(distances**2) / (2 * sigma**2)), (from_, to)), shape=graph.shape)


MAPS = {"cca": cca, "procrustes": procrustes, "manifold": manifold}
