"""Where the cells of a grid are run: in this process, in processes of this machine (joblib), or as jobs (submitit).

The queues, arrays and processes are those engines'; which cell may run is decided by its folder (`grid.run_cell`), so
that a cell is never run twice at once however many launchers are at it. What a cell computes is not known here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import joblib
import torch
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from studies.grid import Cell, refuse_other_cells, state
from utils import HOME, InputError, closest

LAUNCHERS = ("here", "joblib", "submitit-local", "slurm")
RunOne = Callable[[Cell], str]
A_WEEK = 7 * 24 * 60  # minutes; submitit's own limit for local jobs is 2 minutes


def launch(
    cells: Sequence[Cell],
    run_one: RunOne,
    launcher: str,
    jobs: int,
    folder: Path,
    options: Mapping | None = None,
) -> list[str]:
    """Run all cells and return what became of each, in their order: see `grid.run_cell`.

    A cell whose worker died (killed, out of memory) leaves the others alone and is 'started': the same command goes on
    from there. An error that `run_one` raises itself ends the launch.

    Args:
        run_one: picklable, such as functools.partial(run_cell, folder=…, work=…, retry=…)
        launcher: here (one after another in this process), joblib (processes of this machine), submitit-local (jobs of
            this machine that outlive this process), slurm (an array of jobs that outlives it too: scancel ends it)
        jobs: cells at a time
        folder: of the grid; the logs of jobs are in its jobs/
        options: for submitit's update_parameters, such as {"timeout_min": 600, "slurm_partition": "gpu"}
    """
    check_launcher(launcher, jobs, options)
    cells, folder = list(cells), Path(folder)
    refuse_other_cells(cells, folder)
    if not cells:
        return []
    if launcher == "here":
        return [_say(cell, run_one(cell)) for cell in cells]
    if launcher == "joblib":
        return _joblib(cells, run_one, jobs, folder)
    return _submitit(cells, run_one, launcher, jobs, folder, dict(options or {}))


def check_launcher(launcher: str, jobs: int, options: Mapping | None = None) -> None:
    """Refuse a launcher that does not exist or cannot work here, before anything long."""
    if launcher not in LAUNCHERS:
        raise InputError(f"unknown launcher {launcher!r}; closest: {closest(launcher, LAUNCHERS)}")
    if jobs < 1:
        raise InputError(f"jobs must be above 0, got {jobs}")
    if launcher == "here" and jobs > 1:
        raise InputError(
            f"launcher 'here' runs one cell at a time; for jobs {jobs} choose joblib, submitit-local or slurm"
        )
    if launcher in ("here", "joblib"):
        if options:
            raise InputError(f"launcher {launcher!r} takes no options ({', '.join(options)}); they are submitit's")
        return
    if importlib.util.find_spec("submitit") is None:
        raise InputError(
            f"launcher {launcher!r} needs submitit; install it with `pip install -r requirements-cluster.txt`"
        )
    if launcher == "slurm":
        if shutil.which("srun") is None:
            raise InputError("launcher 'slurm' finds no srun here; run it on a node of the cluster, or use joblib")
        if not {"timeout_min", "slurm_time"} & set(options or {}):
            raise InputError("launcher 'slurm' needs the option timeout_min, the minutes a cell may take at most")


def _say(cell: Cell, outcome: str, why: str = "") -> str:
    if outcome != "finished before":  # the plan has told how many are left
        print(f"{cell.name}: {outcome}{why}", flush=True)
    return outcome


def _say_died(cell: Cell, folder: Path, log: Path | None = None) -> str:
    """What a cell is left as whose worker ended without an answer."""
    seen = f"; its log is {log}" if log else ""
    return _say(
        cell,
        state(folder / cell.name),
        f" (its process died, killed or out of memory{seen}; the same command goes on from there)",
    )


# ----------------------------------------------------------------------------------------------------- this machine


def _threads(jobs: int) -> int:
    """Threads for each of so many processes; never more than this process may use."""
    return max(1, min(torch.get_num_threads(), joblib.cpu_count() // jobs))


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


def _variables(slot: int, threads: int) -> dict[str, str]:
    """Environment of the worker in a slot: its share of the cores, and one GPU where there are any, in turn."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    gpus = _gpus()
    return dict.fromkeys(names, str(threads)) | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})


def _in_worker(run_one: RunOne, cell: Cell, variables: Mapping[str, str]) -> str:
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    return run_one(cell)


def _joblib(cells: Sequence[Cell], run_one: RunOne, jobs: int, folder: Path) -> list[str]:
    """joblib's threads hand out the cells, and each has a process of its own.

    One pool for all would be ended, with every cell in it, by a single worker that dies.
    """
    slot, numbers, pools = threading.local(), itertools.count(), []
    threads = _threads(jobs)

    def in_own_process(cell: Cell) -> str:
        if not hasattr(slot, "variables"):
            slot.variables, slot.pool = _variables(next(numbers), threads), None
        if slot.pool is None:
            slot.pool = ProcessPoolExecutor(max_workers=1, env=slot.variables)
            pools.append(slot.pool)
        try:
            return _say(cell, slot.pool.submit(_in_worker, run_one, cell, slot.variables).result())
        except TerminatedWorkerError:
            slot.pool = None
            return _say_died(cell, folder)

    try:
        return joblib.Parallel(n_jobs=jobs, backend="threading")(joblib.delayed(in_own_process)(cell) for cell in cells)
    finally:
        for pool in pools:
            pool.shutdown(wait=True, kill_workers=True)


# ------------------------------------------------------------------------------------------------------------- jobs


def _submitit(cells, run_one: RunOne, launcher: str, jobs: int, folder: Path, options: dict) -> list[str]:
    executor = _executor(launcher, jobs, folder / "jobs", options)
    # an array is throttled by Slurm; local jobs would all start at once
    size = len(cells) if launcher == "slurm" else jobs
    outcomes = []
    for start in range(0, len(cells), size):
        chunk = cells[start : start + size]
        variables = [{} if launcher == "slurm" else _variables(slot, _threads(jobs)) for slot in range(len(chunk))]
        with _importable():
            handles = executor.map_array(_in_worker, [run_one] * len(chunk), chunk, variables)
        outcomes += [_answer(cell, handle, folder) for cell, handle in zip(chunk, handles)]
    return outcomes


def _executor(launcher: str, jobs: int, logs: Path, options: dict):
    import submitit

    executor = submitit.AutoExecutor(folder=logs, cluster="slurm" if launcher == "slurm" else "local")
    if launcher == "slurm":
        own = {"name": "grid", "slurm_array_parallelism": jobs}
    else:  # submitit hides the GPUs from local jobs unless it is told how many there are
        own = {"timeout_min": A_WEEK, "gpus_per_node": torch.cuda.device_count()}
    try:
        executor.update_parameters(**(own | options))
    except (NameError, AssertionError, ValueError, TypeError) as error:
        raise InputError(f"submitit refuses the options {options}: {error}") from error
    return executor


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """While jobs are submitted: they inherit the environment, and through it find the modules that this process has."""
    installed = (sys.prefix, sys.base_prefix)
    own = [path for path in sys.path if path and not os.path.abspath(path).startswith(installed)]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(HOME), *map(os.path.abspath, own)]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _answer(cell: Cell, handle, folder: Path) -> str:
    """Wait for a job; one that ended without an answer is said to have died, and an error of our own is raised."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return _say(cell, handle.result())
    except FailedJobError:
        raise
    except UncompletedJobError:
        return _say_died(cell, folder, handle.paths.stderr)
