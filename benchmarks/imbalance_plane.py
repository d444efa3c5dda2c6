"""How long do the planes of information imbalance take, both directions, over 60 × 60 sites of 2000 images?

    python -m benchmarks.imbalance_plane
    python -m benchmarks.imbalance_plane --images 200 --sites 4     # does it run?

Asked for are less than 60 s of wall time on 2 threads, of sites with 512 features. Printed are seconds, the most memory
that was resident, and the machine's load: on a busy machine wall time says little, processor time more.
"""

from __future__ import annotations

import argparse
import os
import resource

import torch

from benchmarks.nulls import recording, seconds
from processing.planes import imbalance_planes

BAR = "the bar is 60 s of wall time for 60 × 60 sites of 2000 images on 2 threads"


def main(argv: list[str] | None = None) -> None:
    """Read the sizes, print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"images": 2000, "sites": 60, "features": 512, "k": 1, "threads": 2}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    A, B = (recording(asked.images, asked.sites, asked.features, seed) for seed in (0, 1))
    what = f"information imbalance both ways, {asked.sites} × {asked.sites} sites of {asked.features} features"
    took = seconds(lambda: imbalance_planes(A, B, asked.k))
    print(f"{what}, {asked.images} images, k = {asked.k}: {took}; {BAR}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{asked.threads} threads; {peak:.0f} MiB at most; load {load} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
