"""Other packages for `benchmarks.planes`, each called the way its own documentation does, at its best.

Each adapter takes `workloads.Sides` and returns the function that is timed. Imports stand inside the functions: they
run in the peers' environment only, and each process loads the one peer it times.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

# ------------------------------------------------------------------------- packages that want a model and a data loader


def _playback(site_arrays):
    """A model whose submodules `site_i` return stored rows: forward takes consecutive image indices.

    Rows are handed out as a view, so playing back costs next to nothing.
    """
    import torch
    from torch import nn

    class Stored(nn.Module):
        def __init__(self, X):
            super().__init__()
            self.rows = torch.from_numpy(X)

        def forward(self, indices):
            return self.rows[int(indices[0]) : int(indices[-1]) + 1]

    class Playback(nn.Module):
        def __init__(self):
            super().__init__()
            for i, X in enumerate(site_arrays):
                self.add_module(f"site_{i}", Stored(X))

        def forward(self, indices):
            for site in self.children():
                site(indices)
            return indices

    return Playback(), [f"site_{i}" for i in range(len(site_arrays))]


def _loader(n: int, batch: int):
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(torch.arange(n)), batch_size=batch, shuffle=False)


def _torch_cka(sides, batch: int):
    from torch_cka import CKA

    (left, names_a), (right, names_b) = _playback(sides.A), _playback(sides.B)
    cka = CKA(left, right, "A", "B", names_a, names_b, device="cpu")
    loader = _loader(sides.n, batch)

    def run():
        cka.compare(loader, loader)
        return cka.export()["CKA"].numpy()

    return run


def torch_cka_minibatches(sides):
    """torch_cka as its README has it: HSIC averaged over minibatches."""
    return _torch_cka(sides, sides.batch)


def torch_cka_full_batch(sides):
    """torch_cka with one batch of all images: the estimator itself."""
    return _torch_cka(sides, sides.n)


def pytorch_cka_minibatches(sides):
    """pytorch-cka's `compute_cka`: vectorised HSIC summed over minibatches."""
    from cka import compute_cka

    (left, names_a), (right, names_b) = _playback(sides.A), _playback(sides.B)
    loader = _loader(sides.n, sides.batch)
    options = {"layers": names_a, "model2_layers": names_b, "device": "cpu", "progress": False}
    return lambda: compute_cka(left, right, loader, **options)[0].numpy()


def pytorch_cka_full_batch(sides):
    """pytorch-cka's `cka_from_features`, for features that are at hand."""
    import torch
    from cka import cka_from_features

    A, B = ([torch.from_numpy(X) for X in side] for side in (sides.A, sides.B))
    return lambda: cka_from_features(A, B).numpy()


# ----------------------------------------------------------------------------------------- packages that take matrices


def _thingsvision_cka():
    """Its cka module alone: importing the package would import TensorFlow."""
    if "thingsvision" not in sys.modules:
        folder = Path(importlib.util.find_spec("thingsvision").submodule_search_locations[0])
        for name, place in (("thingsvision", folder), ("thingsvision.core", folder / "core")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(place)]
    return importlib.import_module("thingsvision.core.cka")


def thingsvision_rbf_cka(sides):
    """Unbiased RBF-CKA; sigma=None is each side's median distance (its default, sigma=1, gives nan for wide sites)."""
    get_cka = _thingsvision_cka().get_cka

    def run():
        cka = get_cka(backend="torch", m=sides.n, kernel="rbf", unbiased=True, sigma=None, device="cpu")
        return np.array([[float(cka.compare(X, Y)) for Y in sides.B] for X in sides.A])

    return run


def rsatoolbox_rsa(sides):
    """Correlation RDMs once per site, then one comparison of all with all."""
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm, compare

    A, B = ([Dataset(X) for X in side] for side in (sides.A, sides.B))
    return lambda: compare(calc_rdm(A, method="correlation"), calc_rdm(B, method="correlation"), method="spearman")


def netrep_angular(sides):
    """LinearMetric(alpha=1): rotations only; the wider side decides the width, the other is padded with zeros."""
    from netrep.metrics import LinearMetric

    metric = LinearMetric(alpha=1.0, center_columns=True, zero_pad=True, score_method="angular")
    return lambda: np.array([[metric.fit(X, Y).score(X, Y) for Y in sides.B] for X in sides.A])


def dadapy_imbalance(sides):
    """Both directions in one call per pair; subset_size=n asks for all images rather than the mean over subsets."""
    from dadapy import MetricComparisons

    def both(X, Y):
        forth, back = MetricComparisons(coordinates=X).return_information_imbalace(Y, k=1, subset_size=len(X))
        return forth[0], back[0]

    return lambda: np.array([both(sides.A[i], sides.B[i]) for i in range(sides.pairs)])
