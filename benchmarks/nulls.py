"""How long does the null of a plane take: 1000 permutations of linear CKA over 20 × 20 sites of 1000 images?

    python -m benchmarks.nulls
    python -m benchmarks.nulls --permutations 20 --images 100 --sites 3     # does it run?

Printed are seconds on one thread (by default) of the sampled null and of the exact moments, observed plane and each
site's Gram matrix included, and the machine's load. On a busy machine wall time says little, processor time more.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch

from similarity import Recording, Site
from similarity.exact_nulls import exact_moments
from similarity.nulls import plane_null


def recording(images: int, sites: int, features: int, seed: int) -> Recording:
    """Independent Gaussian features of some sites."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"s{place:02d}" for place in range(sites)]
    tensors = {name: torch.randn(images, features, generator=generator) for name in names}
    made = [Site(name, ("batch", "channel")) for name in names]
    return Recording(tensors, [f"{row:06d}" for row in range(images)], made, "gap", "made", "made")


def seconds(work: Callable[[], object]) -> str:
    """Wall time and processor time of one call."""
    start, used = time.perf_counter(), time.process_time()
    work()
    return f"{time.perf_counter() - start:.1f} s ({time.process_time() - used:.1f} s of processor time)"


def main(argv: list[str] | None = None) -> None:
    """Read the sizes, print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"images": 1000, "sites": 20, "features": 512, "permutations": 1000, "threads": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--measure", default="linear_cka", help="default linear_cka")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    A, B = (recording(asked.images, asked.sites, asked.features, seed) for seed in (0, 1))
    what = f"{asked.measure}, {asked.sites} × {asked.sites} sites of {asked.features} features, {asked.images} images"
    sampled = seconds(lambda: plane_null(asked.measure, A, B, permutations=asked.permutations))
    print(f"{what}, {asked.permutations} permutations: {sampled}")
    if asked.measure in ("linear_cka", "rbf_cka"):
        print(f"{what}, exact moments: {seconds(lambda: exact_moments(asked.measure, A, B))}")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{asked.threads} threads; load {load} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
