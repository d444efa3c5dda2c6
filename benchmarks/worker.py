"""One implementation of one workload in a process of its own, so that its memory is its own.

    python -m benchmarks.worker WORKLOAD IMPLEMENTATION DATA.npz THREADS VALUES.npy

Loads the data, warms up, answers "ready", then runs once for every line "go" on its input and answers a line of JSON:
seconds, rss_mb (peak above what was resident once the data were loaded) and rss_total_mb (the peak itself), in MB of
10⁶ bytes. The last run's result, if it is a matrix, is left in VALUES.npy. Whatever else is printed goes to stderr.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.workloads import WORKLOADS, Sides


def main(workload: str, name: str, data: str, threads: str, values: str) -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    chosen = next(each for each in WORKLOADS if each.name == workload).implementation(name)
    sides = Sides.load(Path(data))
    run = chosen.build(sides)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
    loaded = resident()
    (chosen.build(sides.slice()) if chosen.slow else run)()
    print(json.dumps({"loaded_mb": loaded}), file=answers, flush=True)
    for line in sys.stdin:
        if line.strip() == "go":
            print(json.dumps(once(run, loaded, Path(values))), file=answers, flush=True)


def once(run, loaded: float, values: Path) -> dict[str, float]:
    """Time one run; its result is written after the clock has stopped."""
    gc.collect()
    reset_peak()
    started = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - started
    peak = peak_resident()
    if result is not None:
        np.save(values, np.asarray(result, dtype=np.float64))
    return {"seconds": seconds, "rss_mb": peak - loaded, "rss_total_mb": peak}


def _status(field: str) -> float | None:
    """A line of /proc/self/status (Linux) in MB."""
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))
    return None


def resident() -> float:
    """Memory of this process now, MB."""
    now = _status("VmRSS")
    return peak_resident() if now is None else now


def peak_resident() -> float:
    """The most memory this process has had since `reset_peak` (elsewhere than on Linux: since its start), MB."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / 1e6


def reset_peak() -> None:
    """Let the peak start anew from what is resident now (Linux; elsewhere nothing)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as control:
        control.write("5")


if __name__ == "__main__":
    main(*sys.argv[1:])
