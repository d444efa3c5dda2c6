"""What does recording cost over the bare forward pass, and does its memory stay flat as images are added?

    python -m benchmarks.recording
    python -m benchmarks.recording --rounds 1 --images 8 --batch_size 4 --out FOLDER     # does it run?

Time: the same batches through the same model, as it is (`forward`), with every site pooled (`reading`), and as a
whole recording (`recording`: also the listing of sites and the digests of model and images). The three take turns in
one process; seconds are medians over the rounds, ratios are to `forward`, rss_mb is the peak of the process meanwhile.

Memory: 4N and 8N images are recorded in a process each, images made batch by batch (a peak settles only after some
batches). The row `growth beyond rows` holds the growth of the peak from 4N to 8N, less the rows that are kept of those
4N images: about 0 where memory is flat.

Written are recording.csv and recording.json (versions, machine, settings). Timings of a busy machine say little.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.worker import peak_resident, reset_peak
from models import ModelSpec, build_model
from similarity import Site, list_sites, open_reader, record, resolve_sites
from utils import HOME, environment, resolve_device, sentences_instead_of_tracebacks, write_table, write_text

COLUMNS = ["workload", "implementation", "seconds", "ratio", "rss_mb"]
SITES = 40
SEED = 0


@dataclass(frozen=True)
class Workload:
    """A model, and the side of its square images in pixels."""

    name: str
    build: Callable[[], nn.Module]
    side: int
    sites: Callable[[nn.Module, int], list[Site]]


def some_sites(model: nn.Module, side: int) -> list[Site]:
    """40 convolutions and normalisations, evenly spread over depth."""
    listed = list_sites(model, torch.zeros(1, 3, side, side))
    listed = [site for site in listed if "height" in site.axes]
    return [listed[place] for place in np.linspace(0, len(listed) - 1, SITES).round().astype(int)]


def own_sites(model: nn.Module, side: int) -> list[Site]:
    """The sites that the model declares, as the studies record them."""
    return resolve_sites(model, None)


WORKLOADS = {
    "resnet50": Workload("resnet50", lambda: torchvision.models.resnet50(weights=None), 224, some_sites),
    "unetpp": Workload("unetpp demo", lambda: build_model(ModelSpec("unetpp", "demo")), 128, own_sites),
}


def batches(side: int, images: int, size: int) -> Iterator[tuple[Tensor, list[str]]]:
    """(images in [0, 1], their ids), made as they are asked for."""
    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, images, size):
        ids = [f"{place:06d}" for place in range(start, min(start + size, images))]
        yield torch.rand(len(ids), 3, side, side, generator=generator), ids


# ---------------------------------------------------------------------------------------------------------------- time


def implementations(model: nn.Module, sites: list[Site], loader: list, device: torch.device) -> dict[str, Callable]:
    """{name: what is timed}; all see the same batches in eval mode without gradients."""
    reader = open_reader(model, loader[0][0], sites, ("gap",), strict=True)

    def forward() -> None:
        with torch.no_grad():
            for images, _ in loader:
                model(images.to(device))

    def reading() -> None:
        for images, ids in loader:
            for rows in reader.read(images, ids).values():
                rows.cpu()

    def recording() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            record(model, loader, sites)

    return {"forward": forward, "reading": reading, "recording": recording}


def time_once(run: Callable, device: torch.device) -> tuple[float, float]:
    """(seconds, peak of the process's memory meanwhile in MB)."""
    reset_peak()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, peak_resident()


def time_workload(workload: Workload, options: argparse.Namespace) -> list[dict]:
    """A row for every implementation."""
    device = resolve_device(options.device)
    model = workload.build().eval()
    sites = workload.sites(model, workload.side)
    loader = list(batches(workload.side, options.images, options.batch_size))
    runs = implementations(model.to(device), sites, loader, device)
    for run in runs.values():  # warm up, on all batches: the last may have another size
        run()
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            measured[name].append(time_once(run, device))
    medians = {name: np.median(each, axis=0) for name, each in measured.items()}
    title = f"{workload.name}, {len(sites)} sites, {options.images} images of {workload.side} px"
    base = medians["forward"][0]
    return [_row(title, name, seconds, seconds / base, peak) for name, (seconds, peak) in medians.items()]


# -------------------------------------------------------------------------------------------------------------- memory


def probe(workload: Workload, images: int, options: argparse.Namespace) -> dict[str, float]:
    """Record that many images in this process: {peak_mb of the process, rows_mb kept, sites}."""
    device = resolve_device(options.device)
    model = workload.build().eval()
    sites = workload.sites(model, workload.side)
    recording = record(model.to(device), batches(workload.side, images, options.batch_size), sites)
    kept = sum(rows.nbytes for rows in recording.features.values())
    return {"peak_mb": peak_resident(), "rows_mb": kept / 1e6, "sites": len(sites)}


def in_a_process(key: str, images: int, options: argparse.Namespace) -> dict[str, float]:
    """`probe` in a fresh process, so that the peak is its own."""
    arguments = {"--probe": images, "--only": key, "--batch_size": options.batch_size, "--device": options.device}
    words = [str(word) for pair in (arguments | {"--threads": options.threads}).items() for word in pair]
    command = [sys.executable, "-m", "benchmarks.recording", *words]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"recording {images} images of {key} in a process of its own failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def typical(key: str, images: int, options: argparse.Namespace) -> dict[str, float]:
    """The probe of middle peak among three: the allocator's peaks are erratic."""
    probes = [in_a_process(key, images, options) for _ in range(3)]
    return sorted(probes, key=lambda each: each["peak_mb"])[1]


def memory_of(key: str, options: argparse.Namespace) -> list[dict]:
    """Rows of the peaks at 4N and 8N images, and of the growth that the rows do not account for."""
    workload, few, many = WORKLOADS[key], 4 * options.images, 8 * options.images
    small, large = (typical(key, images, options) for images in (few, many))
    title = f"memory: {workload.name}, {small['sites']} sites, {few} and {many} images of {workload.side} px"
    growth = large["peak_mb"] - small["peak_mb"] - (large["rows_mb"] - small["rows_mb"])
    return [
        _row(title, f"recording {few} images", rss=small["peak_mb"]),
        _row(title, f"recording {many} images", rss=large["peak_mb"]),
        _row(title, "rows of the difference", rss=large["rows_mb"] - small["rows_mb"]),
        _row(title, "growth beyond rows", rss=growth),
    ]


# --------------------------------------------------------------------------------------------------------- the results


def _row(workload: str, implementation: str, seconds=math.nan, ratio=math.nan, rss=math.nan) -> dict:
    return dict(zip(COLUMNS, (workload, implementation, seconds, ratio, rss), strict=True))


def stamp(options: argparse.Namespace) -> dict:
    """Settings, versions and machine."""
    config = {key: getattr(options, key) for key in ("only", "rounds", "images", "batch_size", "threads", "device")}
    return {
        "config": config | {"seed": SEED, "policy": "gap"},
        "environment": environment(resolve_device(options.device)),
    }


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="of every implementation, taking turns (%(default)s)")
    parser.add_argument("--images", type=int, default=64, help="N, of every run (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="%(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (%(default)s)")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "benchmarks", help="folder of the table")
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)  # what `in_a_process` asks of its process
    options = parser.parse_args(arguments)
    for name in ("rounds", "images", "batch_size", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure what the command line asks for; returns the table that is written."""
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    if options.probe:
        print(json.dumps(probe(WORKLOADS[options.only[0]], options.probe, options)))
        return pd.DataFrame()
    rows = []
    for key in options.only:
        rows += time_workload(WORKLOADS[key], options) + memory_of(key, options)
    table = pd.DataFrame(rows, columns=COLUMNS)
    write_table(table, options.out / "recording.csv")
    write_text(options.out / "recording.json", json.dumps(stamp(options), indent=1) + "\n")
    print(table.to_string(index=False))
    return table


if __name__ == "__main__":
    with sentences_instead_of_tracebacks():
        main()
