"""How long does a plane of sites × sites take, and how much memory, beside other packages and beside plain code?

    python -m benchmarks.planes                             # other packages go into benchmarks/.peers
    python -m benchmarks.planes --peers PEERS/bin/python    # or finds them in an environment that is there
    python -m benchmarks.planes --only rbf_cka_median --rounds 5

Every implementation of a workload runs in a process of its own, with the same data and number of threads; all have
loaded the data and warmed up before the first is timed, then they take turns. Results are medians over the rounds.
Written are planes.json (everything, with versions and settings) and planes.csv (its table). Workloads that are not
run keep their rows. What could not be installed or failed has a row that says why.

This room times; what is computed stands in `workloads`, `own` and `peers`. A quick run shows only that all works.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks import peer_environment
from benchmarks.peer_environment import PeerEnvironment, without_paths
from benchmarks.workloads import QUICK_SIZES, SEED, SIZES, WORKLOADS, Implementation, Workload, make_sides
from utils import HOME, environment, sentences_instead_of_tracebacks, write_table, write_text

COLUMNS = [
    "workload",
    "implementation",
    "seconds",
    "ratio",
    "rss_mb",
    "rounds",
    "max_error",
    "against",
    "bar",
    "note",
]
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "LOKY_MAX_CPU_COUNT",
)


class Failed(RuntimeError):
    """An implementation's process ended; the message is its last line."""


class Worker:
    """The process of one implementation; `go` times one run."""

    def __init__(self, workload: Workload, which: Implementation, python: Path, data: Path, threads: int):
        self.which, self.answers = which, []
        self.values = data.with_name(f"{workload.name}-{which.name}.npy")
        self.log = data.with_name(f"{workload.name}-{which.name}.log")
        told = os.environ | {"MPLBACKEND": "Agg", "TQDM_DISABLE": "1"} | dict.fromkeys(THREAD_VARIABLES, str(threads))
        arguments = [workload.name, which.name, str(data), str(threads), str(self.values)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(python), "-m", "benchmarks.worker", *arguments],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log},
                **{"cwd": HOME, "env": told, "text": True},
            )

    def answer(self) -> dict[str, float]:
        """Its next line; Failed, with the reason, if it has none."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        said = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        raise Failed(without_paths(said[-1]) if code > 0 and said else f"ended by signal {-code}")

    def go(self) -> None:
        """One more round."""
        with suppress(BrokenPipeError):  # then the answer says why
            print("go", file=self.process.stdin, flush=True)
        self.answers.append(self.answer())

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def median(self, what: str) -> float:
        return float(np.median([answer[what] for answer in self.answers])) if self.answers else math.nan


def time_workload(workload: Workload, data: Path, peers: PeerEnvironment | None, options) -> list[dict]:
    """A row for every implementation, in the order of the table."""
    reasons = {each.name: _why_not(each, peers) for each in workload.implementations}
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        for each in workload.implementations:
            if not reasons[each.name]:
                python = peers.executable if each.package else Path(sys.executable)
                workers[each.name] = Worker(workload, each, python, data, options.threads)
                stack.callback(workers[each.name].close)
        for name, worker in workers.items():
            reasons[name] = _attempt(worker.answer)
            print(f"  {name}: {reasons[name] or 'loaded and warmed up'}", flush=True)
        for turn in range(options.rounds):
            for name, worker in workers.items():
                if not reasons[name] and not _long(worker, options.longest):
                    reasons[name] = _attempt(worker.go)
                    if not reasons[name]:
                        print(f"  {name}: round {turn + 1}, {worker.answers[-1]['seconds']:.3f} s", flush=True)
        return _rows(workload, workers, reasons, options)


def _why_not(which: Implementation, peers: PeerEnvironment | None) -> str:
    if not which.package:
        return ""
    return "left out by --no-peers" if peers is None else peers.why_missing(which.package)


def _attempt(step) -> str:
    """'' or why it failed."""
    try:
        step()
    except Failed as reason:
        return f"failed: {reason}"
    return ""


def _long(worker: Worker, longest: float) -> bool:
    return any(answer["seconds"] > longest for answer in worker.answers)


def _rows(workload: Workload, workers: dict[str, Worker], reasons: dict[str, str], options) -> list[dict]:
    seconds = {name: math.nan if reasons[name] else worker.median("seconds") for name, worker in workers.items()}
    ours = seconds.get(workload.implementations[0].name, math.nan)
    reference = _values(workers, workload.reference)
    rows = []
    for each in workload.implementations:
        worker, reason = workers.get(each.name), reasons[each.name]
        rounds = [answer["seconds"] for answer in worker.answers] if worker else []
        few = worker is not None and not reason and len(rounds) < options.rounds
        values = None if reason or each.yardstick else _values(workers, each.name)
        error = math.nan if each.name == workload.reference else _max_error(values, reference)
        notes = [
            reason,
            each.note,
            f"no further round after one of over {options.longest:g} s" if few else "",
            "its result holds NaN" if values is not None and np.isnan(values).any() else "",
        ]
        mine = seconds.get(each.name, math.nan)
        rows.append(
            {
                "workload": workload.name,
                "implementation": each.name,
                "seconds": mine,
                "ratio": mine / ours,
                "rss_mb": math.nan if reason or not worker else worker.median("rss_mb"),
                "rounds": len(rounds),
                "max_error": error,
                "against": "" if math.isnan(error) else workload.reference,
                "bar": _bar(each, seconds),
                "note": "; ".join(note for note in notes if note),
                "rss_total_mb": math.nan if reason or not worker else worker.median("rss_total_mb"),
                "seconds_each": rounds,
            }
        )
    return rows


def _values(workers: dict[str, Worker], name: str) -> np.ndarray | None:
    path = workers[name].values if name in workers else None
    return np.load(path) if path is not None and path.exists() else None


def _max_error(values: np.ndarray | None, reference: np.ndarray | None) -> float:
    """Largest absolute difference; NaN where one is missing, or another number of pairs was computed."""
    if values is None or reference is None or values.shape != reference.shape:
        return math.nan
    return float(np.abs(values - reference).max())


def _bar(which: Implementation, seconds: dict[str, float]) -> str:
    """What was asked of the ratio, and whether it was met."""
    mine = seconds.get(which.name, math.nan)
    if which.at_least is not None:
        share, asked = mine / seconds.get("ours", math.nan), f"at least {which.at_least:g} x ours"
        met = share >= which.at_least
    elif which.at_most is not None:
        other, factor = which.at_most
        share, asked = mine / seconds.get(other, math.nan), f"at most {factor:.3g} x {other}"
        met = share <= factor
    else:
        return ""
    return f"{asked}: not known" if math.isnan(share) else f"{asked}: {share:.2f}, {'met' if met else 'missed'}"


# ---------------------------------------------------------------------------------------------------------- the results


def stamp(options, workload: Workload, peers: PeerEnvironment | None) -> dict:
    """Settings, versions and machine of one workload's rows."""
    sizes = QUICK_SIZES if options.quick else SIZES
    return {
        "config": {
            "rounds": options.rounds,
            "threads": options.threads,
            "longest": options.longest,
            "quick": options.quick,
            "seed": SEED,
            "data": dataclasses.asdict(sizes[workload.size]),
        },
        "environment": environment(torch.device("cpu")) | {"processor": _processor()},
        "peers": None
        if peers is None
        else {"python": peers.version, "packages": peers.packages, "missing": peers.missing},
    }


def _processor() -> str:
    """The name of the CPU, where the system tells it."""
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return ""


def write(out: Path, done: dict[str, dict]) -> pd.DataFrame:
    """planes.json and planes.csv, with the rows of workloads that were run before."""
    path = out / "planes.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = [workload.name for workload in WORKLOADS]
    everything = {name: (stored | done)[name] for name in known if name in stored | done}
    write_text(path, json.dumps(_without_nan(everything), indent=1, ensure_ascii=False) + "\n")
    table = pd.DataFrame([row for each in everything.values() for row in each["rows"]], columns=COLUMNS)
    write_table(table, out / "planes.csv")
    return table


def _without_nan(value):
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def text_of(rows: Iterable[dict]) -> str:
    """One workload's rows for the terminal."""
    lines = []
    for row in rows:
        error = "" if math.isnan(row["max_error"]) else f"  max error {row['max_error']:.1e} against {row['against']}"
        numbers = f"{row['seconds']:10.3f} s {row['ratio']:8.2f} x {row['rss_mb']:8.0f} MB"
        tail = "".join(f"  [{text}]" for text in (row["bar"], row["note"]) if text)
        lines.append(f"  {row['implementation']:24s}{numbers}{error}{tail}")
    return "\n".join(lines)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planes", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="WORKLOAD", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=3, help="of every implementation, taking turns (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every process (%(default)s)")
    parser.add_argument(
        "--longest", type=float, default=60, help="no further round after one of this many seconds (%(default)s)"
    )
    parser.add_argument("--peers", type=Path, help="Python of an environment that has the other packages")
    parser.add_argument("--no-peers", action="store_true", help="time our own implementations only")
    parser.add_argument("--quick", action="store_true", help="tiny data: does everything run?")
    parser.add_argument("--out", type=Path, help="results/benchmarks, or results/benchmarks-smoke for a quick run")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    options.out = options.out or HOME / "results" / ("benchmarks-smoke" if options.quick else "benchmarks")
    return options


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Time what the command line asks for; returns the table that is written."""
    options = read_options(arguments)
    peers = None
    if not options.no_peers:
        peers = peer_environment.existing(options.peers) if options.peers else peer_environment.make()
        for name, reason in peers.missing.items():
            print(f"without {name}: {reason}")
    table = pd.DataFrame(columns=COLUMNS)
    for workload in (each for each in WORKLOADS if each.name in options.only):
        print(f"\n{workload.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "sides.npz"
            make_sides((QUICK_SIZES if options.quick else SIZES)[workload.size]).save(data)
            made = stamp(options, workload, peers)
            rows = time_workload(workload, data, peers, options)
        table = write(options.out, {workload.name: made | {"rows": rows}})
        print(f"{text_of(rows)}", flush=True)
    print(f"\n{options.out / 'planes.csv'}")
    return table


if __name__ == "__main__":
    with sentences_instead_of_tracebacks():
        main()
