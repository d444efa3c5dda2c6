"""How fast does `train.py` train beside the plain loop one would write, and does it learn the same?

    python -m benchmarks.training --data FOLDER             # ISIC 2018's layout; results/benchmarks/training.csv
    python -m benchmarks.training --quick                   # tiny models on synthetic images: does everything run?

16 images a step, from the same seed. Each loop runs in a process of its own and they take turns, an
epoch each. Images per second are medians over the epochs after the first, in which features are computed for the first
time; that one has a column of its own. The validation IoU after the last epoch says whether both learned the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch

from sources import SYNTHETIC
from utils import HOME, InputError, environment, sentences_instead_of_tracebacks, write_table, write_text

COLUMNS = [
    "workload",
    "implementation",
    "images_per_second",
    "ratio",
    "first_epoch_images_per_second",
    "validation_iou",
    "train_loss",
    "rss_mb",
    "bar",
]
IOU_TOLERANCE = 0.01
VALIDATION = 100  # images


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training, and how many times faster than the plain loop it is asked to be."""

    name: str
    model: str
    preset: str
    frozen: bool
    at_least: float
    learning_rate: float
    image_size: int = 128
    images: int = 96
    epochs: int = 4
    schedule: str = "constant"
    options: dict = dataclasses.field(default_factory=dict)


WORKLOADS = (
    Workload("mask2former_frozen", "mask2former", "swin_tiny", True, 2.0, 1e-4),
    Workload("unetpp_frozen", "unetpp", "isic2018", True, 1.4, 1e-3),
    Workload("unetpp_unfrozen", "unetpp", "isic2018", False, 1.2, 1e-3),
    # Mask2Former from scratch says nothing after so few steps: a small one, trained to the end, shows whether fewer
    # sampled points teach the same
    Workload(
        "mask2former_small_to_the_end",
        "mask2former",
        "demo",
        False,
        1.0,
        1e-3,
        image_size=64,
        images=400,
        epochs=24,
        schedule="one_cycle",
        options={"train_num_points": 12544},
    ),
)


class Loop:
    """The process of one implementation."""

    def __init__(self, kind: str, settings: Path) -> None:
        self.kind, self.epochs = kind, []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training_loops", kind, str(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=HOME,
            env=os.environ | {"TQDM_DISABLE": "1"},
            text=True,
        )

    def answer(self) -> dict:
        """Its next line."""
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"the {self.kind} loop ended with code {self.process.wait()}; what it said is above")
        return json.loads(line)

    def ask(self, what: str) -> dict:
        print(what, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def time_workload(workload: Workload, options) -> list[dict]:
    """A row for each loop, the plain one first."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        loops = []
        for kind in ("plain", "ours"):
            settings = Path(folder) / f"{kind}.json"
            write_text(settings, json.dumps(_settings(workload, kind, options)))
            loops.append(Loop(kind, settings))
            stack.callback(loops[-1].close)
        for loop in loops:
            loop.answer()  # ready
        for epoch in range(workload.epochs):
            for loop in loops:
                loop.epochs.append(loop.ask("epoch"))
                print(f"  {loop.kind}: epoch {epoch + 1}, {loop.epochs[-1]['seconds']:.1f} s", flush=True)
        ious = [loop.ask("validate")["validation_iou"] for loop in loops]
        return _rows(workload, loops, ious)


def _settings(workload: Workload, kind: str, options) -> dict:
    settings = {
        "threads": options.threads,
        "data": options.data,
        "image_size": workload.image_size,
        "flips": False,  # as in the published protocol; so that features of frozen encoders can be kept
        "limits": {"train": workload.images, "validation": VALIDATION},
        "model": workload.model,
        "preset": workload.preset,
        "options": workload.options,
        "freeze": ["encoder"] if workload.frozen else [],
        "schedule": workload.schedule,
        "learning_rate": workload.learning_rate,
        "epochs": workload.epochs,
    }
    if kind == "ours":
        settings["cache_features"] = workload.frozen
    return settings


def _rows(workload: Workload, loops: Sequence[Loop], ious: Sequence[float]) -> list[dict]:
    speeds = [workload.images / statistics.median(epoch["seconds"] for epoch in loop.epochs[1:]) for loop in loops]
    rows = []
    for loop, speed, iou in zip(loops, speeds, ious):
        ratio = speed / speeds[0]
        bar = ""
        if loop.kind == "ours":
            parts = {
                f"at least {workload.at_least:g} x plain: {ratio:.2f}": ratio >= workload.at_least,
                f"IoU within {IOU_TOLERANCE}: {abs(iou - ious[0]):.4f}": abs(iou - ious[0]) <= IOU_TOLERANCE,
            }
            bar = "; ".join(f"{text}, {'met' if met else 'missed'}" for text, met in parts.items())
        rows.append(
            {
                "workload": workload.name,
                "implementation": loop.kind,
                "images_per_second": speed,
                "ratio": ratio,
                "first_epoch_images_per_second": workload.images / loop.epochs[0]["seconds"],
                "validation_iou": iou,
                "train_loss": loop.epochs[-1]["train_loss"],
                "rss_mb": max(epoch["rss_mb"] for epoch in loop.epochs),
                "bar": bar,
                "epochs": loop.epochs,
            }
        )
    return rows


def _quick(workload: Workload) -> Workload:
    small = {"preset": "smoke", "image_size": 64, "images": 16, "epochs": 3, "options": {}}
    return dataclasses.replace(workload, **small)


def write(out: Path, done: dict[str, dict]) -> pd.DataFrame:
    """training.json and training.csv, with the rows of workloads that were run before."""
    path = out / "training.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merged = stored | done
    everything = {each.name: merged[each.name] for each in WORKLOADS if each.name in merged}
    write_text(path, json.dumps(everything, indent=1) + "\n")
    table = pd.DataFrame([row for each in everything.values() for row in each["rows"]], columns=COLUMNS)
    write_table(table, out / "training.csv")
    return table


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=SYNTHETIC, help="folder in ISIC 2018's layout; default: synthetic images")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="WORKLOAD", help=", ".join(names))
    parser.add_argument("--threads", type=int, default=2, help="of every process (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models, few images: does everything run?")
    parser.add_argument("--out", type=Path, help="results/benchmarks, or results/benchmarks-smoke for a quick run")
    options = parser.parse_args(arguments)
    if options.data != SYNTHETIC:
        options.data = str(Path(options.data).absolute())
    options.out = options.out or HOME / "results" / ("benchmarks-smoke" if options.quick else "benchmarks")
    return options


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Time what the command line asks for; returns the table that is written."""
    options = read_options(arguments)
    table = pd.DataFrame(columns=COLUMNS)
    for workload in (each for each in WORKLOADS if each.name in options.only):
        workload = _quick(workload) if options.quick else workload
        print(f"\n{workload.name}", flush=True)
        data = options.data if options.data == SYNTHETIC else Path(options.data).name
        kept = {"data": data, "threads": options.threads, "quick": options.quick, "validation": VALIDATION}
        config = kept | dataclasses.asdict(workload)
        made = {"config": config, "environment": environment(torch.device("cpu"))}
        table = write(options.out, {workload.name: made | {"rows": time_workload(workload, options)}})
    print(table.drop(columns="bar").to_string(index=False, float_format="%.4g"))
    print("\n".join(f"{row.workload}: {row.bar}" for row in table.itertuples() if row.bar))
    print(f"\n{options.out / 'training.csv'}")
    return table


if __name__ == "__main__":
    with sentences_instead_of_tracebacks():
        main()
