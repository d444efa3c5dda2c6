"""What `benchmarks.planes` times: the data, and the table of workloads with every implementation that does each.

Read by the driver and by every worker, under two Python environments: this room imports NumPy and nothing heavier.
An implementation is a function that takes the data and returns what is timed, a function of no arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import own, peers

SEED = 0
LATENTS = 200  # dimensions that both sides share
NOISE = 0.3  # standard deviation of what no two sites share, in units of the shared part's


@dataclass(frozen=True)
class Size:
    """n images, `sites` sites a side, their widths taken in turn."""

    n: int
    sites: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Sides:
    """The sites of two models: lists of float32 arrays (n, width), rows the same images.

    batch : images in a minibatch, for what works in minibatches: n / 8
    pairs : how many pairs (A[i], B[i]) the workloads of single pairs take
    """

    A: list[np.ndarray]
    B: list[np.ndarray]
    pairs: int = 5

    @property
    def n(self) -> int:
        return len(self.A[0])

    @property
    def batch(self) -> int:
        return self.n // 8

    def slice(self) -> Sides:
        """A small part to warm up on: 256 images, 2 sites a side, one pair."""
        A, B = ([X[:256] for X in side[:2]] for side in (self.A, self.B))
        return replace(self, A=A, B=B, pairs=1)

    def save(self, path: Path) -> None:
        """One .npz, uncompressed."""
        np.savez(path, **{f"{side}{i:02d}": X for side in "AB" for i, X in enumerate(getattr(self, side))})

    @classmethod
    def load(cls, path: Path) -> Sides:
        with np.load(path) as stored:
            A, B = ([stored[name] for name in sorted(stored) if name[0] == side] for side in "AB")
        return cls(A, B)


def make_sides(size: Size, seed: int = SEED) -> Sides:
    """ReLU of randomly mixed shared latents plus noise: correlated sites whose features have means above zero.

    The latents' spectrum decays as k^-s, with s from 0.25 at the first site to 1 at the last, so that sites of like
    depth are alike.
    """
    random = np.random.default_rng(seed)
    latents = random.standard_normal((size.n, LATENTS))
    decays = np.linspace(0.25, 1.0, size.sites)

    def site(index: int) -> np.ndarray:
        width = size.widths[index % len(size.widths)]
        scales = np.arange(1, LATENTS + 1) ** -decays[index]
        shared = latents @ (scales[:, None] * random.standard_normal((LATENTS, width)) / np.linalg.norm(scales))
        return np.maximum(shared + NOISE * random.standard_normal((size.n, width)), 0).astype(np.float32)

    A, B = ([site(index) for index in range(size.sites)] for _ in "AB")
    return Sides(A, B)


@dataclass(frozen=True)
class Implementation:
    """One way to do a workload.

    build : Sides -> the function that is timed; what it returns is compared with the reference
    package : the peer's distribution, installed in the peers' environment; '' for our own
    note : what a reader of its row must know
    slow : warm up on a slice of the data only
    at_most : (implementation, factor): the bar, its time at most factor × that one's
    at_least : the bar, its time at least this × ours
    yardstick : computes something else, to measure the time of the others by
    """

    name: str
    build: Callable[[Sides], Callable[[], object]]
    package: str = ""
    note: str = ""
    slow: bool = False
    at_most: tuple[str, float] | None = None
    at_least: float | None = None
    yardstick: bool = False


@dataclass(frozen=True)
class Workload:
    """The first implementation is ours, the one that ratios refer to; `reference` is the one that errors refer to."""

    name: str
    size: str
    reference: str
    implementations: tuple[Implementation, ...]

    def implementation(self, name: str) -> Implementation:
        return next(each for each in self.implementations if each.name == name)


SIZES = {
    "n1000": Size(1000, 20, (64, 128, 256, 512, 1024, 2048)),
    "n5000": Size(5000, 20, (64, 128, 256, 512)),
    "rows": Size(10_000, 10, (256,)),
}
# not narrower: an image whose features are all 0 after the ReLU has no correlation with others
QUICK_SIZES = {"n1000": Size(80, 6, (32, 64, 96)), "n5000": Size(120, 6, (32, 64, 96)), "rows": Size(100, 4, (16,))}

MINIBATCHES = "average over minibatches of n/8 images: a weaker estimator"
SINGLE_PAIRS = "5 pairs of sites, both directions"
FULL_PLANE = "all sites x sites, both directions: more work than the rows of 5 pairs"


def _imbalance(bar: float) -> tuple[Implementation, ...]:
    return (
        Implementation("ours", own.imbalance_of_pairs, note=SINGLE_PAIRS),
        Implementation("ours_full_plane", own.imbalance_planes, note=FULL_PLANE, slow=True),
        Implementation("dadapy", peers.dadapy_imbalance, "dadapy", note=SINGLE_PAIRS, slow=True, at_least=bar),
    )


def _moments(repeats: int) -> tuple[Implementation, ...]:
    """Rows are fed that many times over; 60 % of the rate of the products alone is a time of 1 / 0.6."""
    return (
        Implementation("ours", partial(own.streamed_cka, repeats), slow=True, at_most=("gemm_floor", 1 / 0.6)),
        Implementation(
            "gemm_floor",
            partial(own.moment_products, repeats),
            note="the matrix products alone, float64",
            yardstick=True,
            slow=True,
        ),
    )


WORKLOADS = (
    Workload(
        "linear_cka_debiased",
        "n1000",
        "plain_float64",
        (
            Implementation("ours", partial(own.plane, "linear_cka"), at_most=("gemm_floor", 1.6)),
            Implementation("gemm_floor", own.gemm_floor, note="float32 matrix products alone, no CKA", yardstick=True),
            Implementation(
                "torch_cka_minibatch", peers.torch_cka_minibatches, "torch_cka", note=MINIBATCHES, at_least=6
            ),
            Implementation("torch_cka_full_batch", peers.torch_cka_full_batch, "torch_cka", slow=True, at_least=25),
            Implementation("pytorch_cka_minibatch", peers.pytorch_cka_minibatches, "pytorch-cka", note=MINIBATCHES),
            Implementation("pytorch_cka_full_batch", peers.pytorch_cka_full_batch, "pytorch-cka", at_least=1.5),
            Implementation("plain_float64", own.plain_linear_cka, note="every pair from its data", slow=True),
        ),
    ),
    Workload(
        "rbf_cka_median",
        "n1000",
        "ours",
        (
            Implementation("ours", partial(own.plane, "rbf_cka"), at_most=("ours_linear_cka", 3)),
            Implementation("ours_linear_cka", partial(own.plane, "linear_cka"), note="for the bar", yardstick=True),
            Implementation(
                "thingsvision",
                peers.thingsvision_rbf_cka,
                "thingsvision",
                note="its torch backend, one pair at a time; only its cka module can be imported",
                slow=True,
                at_least=100,
            ),
        ),
    ),
    Workload(
        "rsa_spearman",
        "n1000",
        "ours",
        (
            Implementation("ours", partial(own.plane, "rsa")),
            Implementation("rsatoolbox", peers.rsatoolbox_rsa, "rsatoolbox", note="RDMs once per site", at_least=2.5),
        ),
    ),
    Workload(
        "angular_shape_distance",
        "n1000",
        "plain_svd_float64",
        (
            Implementation("ours", partial(own.plane, "angular_distance")),
            Implementation(
                "netrep", peers.netrep_angular, "netrep", note="on GitHub only, not on PyPI", slow=True, at_least=40
            ),
            Implementation("plain_svd_float64", own.plain_angular, note="an SVD for every pair", slow=True, at_least=8),
        ),
    ),
    Workload("information_imbalance_1000", "n1000", "ours", _imbalance(15)),
    Workload("information_imbalance_5000", "n5000", "ours", _imbalance(10)),
    Workload("moments_100_000_rows", "rows", "ours", _moments(10)),
    Workload("moments_1_000_000_rows", "rows", "ours", _moments(100)),
)
