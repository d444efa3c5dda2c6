"""Our own implementations for `benchmarks.planes`: the instrument, a floor, and plain references in float64.

Each takes `workloads.Sides` and returns the function that is timed. Imports stand inside the functions: the table of
workloads is also read where neither PyTorch nor the instrument is installed.
"""

from __future__ import annotations

import numpy as np


def _recording(site_arrays, places=None):
    """A Recording of some of the arrays (default all), float32, under 'gap'."""
    import torch

    from similarity import Recording, Site

    places = range(len(site_arrays)) if places is None else places
    features = {f"site_{i}": torch.from_numpy(site_arrays[i]) for i in places}
    ids = [f"{row:05d}" for row in range(len(site_arrays[0]))]
    sites = [Site(name, ("batch", "channel")) for name in features]
    return Recording(features, ids, sites, "gap", "model", "data")


def plane(measure: str, sides):
    """The instrument's plane of a measure: (sites, sites)."""
    import similarity

    A, B = _recording(sides.A), _recording(sides.B)
    return lambda: similarity.plane(measure, A, B).values


def imbalance_of_pairs(sides):
    """The plane of two sites with themselves holds both directions, for each pair A[i], B[i]: (pairs, 2)."""
    import similarity

    pairs = [_recording([sides.A[i], sides.B[i]]) for i in range(sides.pairs)]

    def run():
        planes = [similarity.plane("information_imbalance", pair).values for pair in pairs]
        return np.array([[plane[0, 1], plane[1, 0]] for plane in planes])

    return run


def imbalance_planes(sides):
    """The whole plane in both directions: (sites, sites, 2)."""
    import similarity

    A, B = _recording(sides.A), _recording(sides.B)

    def run():
        forth, back = (similarity.plane("information_imbalance", *pair).values for pair in ((A, B), (B, A)))
        return np.stack([forth, back.T], axis=-1)

    return run


def gemm_floor(sides):
    """Gram matrices of all sites and one product of all with all, float32: what no Gram-based CKA can do without."""
    import torch

    A, B = ([torch.from_numpy(X) for X in side] for side in (sides.A, sides.B))

    def grams(side):
        made = torch.empty(len(side), sides.n, sides.n)
        for X, K in zip(side, made):
            torch.mm(X, X.T, out=K)
        return made.flatten(1)

    def run():
        grams(A) @ grams(B).T

    return run


def streamed_cka(repeats: int, sides):
    """Linear CKA by streaming moments of the rows, fed `repeats` times over as if there were that many more."""
    import torch

    from similarity.moments import Moments

    A, B = ({f"site_{i}": torch.from_numpy(X) for i, X in enumerate(side)} for side in (sides.A, sides.B))

    def run():
        sums = Moments()
        for _ in range(repeats):
            sums.update(A, B)
        return sums.cka()[0]

    return run


def moment_products(repeats: int, sides):
    """The products of `streamed_cka` alone: all columns of A with all of B, and every site with itself, float64."""
    import torch

    sites = [[torch.from_numpy(X).double() for X in side] for side in (sides.A, sides.B)]
    A, B = (torch.cat(side, dim=1) for side in sites)

    def run():
        for _ in range(repeats):
            A.T @ B
            for X in (*sites[0], *sites[1]):
                X.T @ X

    return run


def plain_linear_cka(sides):
    """Debiased linear CKA by its formula (Song's HSIC₁ of n × n Grams), float64, every pair on its own."""

    def gram(X):
        X = X.astype(np.float64)
        X -= X.mean(0)
        K = X @ X.T
        np.fill_diagonal(K, 0)
        return K

    def hsic(K, L):
        n = len(K)
        crossed = K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K.sum(0) @ L.sum(0))
        return (np.sum(K * L) + crossed) / (n * (n - 3))

    def cka(X, Y):
        K, L = gram(X), gram(Y)
        return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))

    return lambda: np.array([[cka(X, Y) for Y in sides.B] for X in sides.A])


def plain_angular(sides):
    """arccos ‖XᵀY‖_* of centred X, Y with unit Frobenius norm, float64, an SVD for every pair."""
    import torch

    def shape(X):
        X = torch.from_numpy(X).double()
        X = X - X.mean(0)
        return X / torch.linalg.matrix_norm(X)

    def angle(X, Y):
        return float(torch.arccos(torch.linalg.svdvals(shape(X).T @ shape(Y)).sum()))

    return lambda: np.array([[angle(X, Y) for Y in sides.B] for X in sides.A])
