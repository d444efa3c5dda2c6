"""A grid of runs: its cells, the state of each cell's folder, one cell run at most once, and what is left to do.

Free of models and images: what a cell computes is a function that the study gives (`work`), and where and by whom the
cells are run is `launch`'s business. Several processes, on one machine or on several with a common disk, may run the
cells of one grid: whoever holds a cell's lock runs it, and the system frees the lock when that process dies.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import pandas as pd

from studies.cells import Cell as Cell  # studies ask for the whole grid here
from studies.cells import cells_of as cells_of
from studies.cells import check_settings as check_settings
from studies.cells import merged as merged
from studies.cells import text_of
from utils import InputError, format_seconds, markdown_table, write_text

FINISHED, FAILED, TRACEBACK = "finished.json", "failed.json", "traceback.txt"
# Beside the cells' folders and not in them: a training refuses a new run folder that already holds something.
LOCKS = ".locks"
# Of a lock file one byte decides who runs the cell, and another shows it: a look never gets in the way of a claim.
CLAIM, SIGN = 0, 1
STATES = ("finished", "failed", "running", "started", "new")
_HELD: set[Path] = set()  # cells of this process: the system's locks do not tell a process from itself


# ------------------------------------------------------------------------------------------------------ their state


def state(folder: Path) -> str:
    """'finished', 'running', 'failed', 'started' (begun, and nobody is at it) or 'new', of a cell's folder.

    Reads only. InputError where the disk knows no locks.
    """
    folder = Path(folder)
    held = _is_held(folder)  # first: a cell that finishes meanwhile is then seen as finished
    if (folder / FINISHED).exists():
        return "finished"
    if held:
        return "running"
    if (folder / FAILED).exists():
        return "failed"
    return "started" if folder.exists() else "new"


def _lock_file(folder: Path) -> Path:
    return folder.parent / LOCKS / folder.name


def _is_held(folder: Path) -> bool:
    if folder.absolute() in _HELD:  # opening and closing the file would give the lock up
        return True
    if fcntl is None or not _lock_file(folder).exists():
        return False
    with open(_lock_file(folder), "rb") as stream:  # once made, the file stays
        return not _lock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB, SIGN)


def _lock(stream, how: int, byte: int) -> bool:
    """Lock one byte of a file; False when another process has it."""
    try:
        fcntl.lockf(stream, how, 1, byte)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise InputError(
            f"{stream.name}: this disk knows no file locks ({error.strerror}), so that nothing would keep two "
            "processes from the same cell; choose a folder on another disk with --out"
        ) from error
    return True


@contextlib.contextmanager
def _held(folder: Path) -> Iterator:
    """Hold a cell: yields its open lock file, or None when it is held already. Never waits for another cell's end."""
    if folder.absolute() in _HELD:
        yield None
        return
    path = _lock_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as stream:
        if fcntl is None:
            _say_no_locks()
        elif not _lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, CLAIM):
            yield None
            return
        else:
            _lock(stream, fcntl.LOCK_EX, SIGN)  # waits at most for a look
        _HELD.add(folder.absolute())
        try:
            yield stream
        finally:
            _HELD.discard(folder.absolute())


@functools.cache
def _say_no_locks() -> None:
    print("note: this system has no file locks: run one command at a time on this grid", flush=True)


def _count_attempt(stream) -> int:
    """Which attempt this is; the count lives in the lock file, so that killed attempts are counted too."""
    stream.seek(0)
    text = stream.read().strip()
    number = (int(text) if text.isdigit() else 0) + 1  # empty when a process was killed between these lines
    stream.truncate(0)
    stream.write(str(number))
    stream.flush()
    return number


# ------------------------------------------------------------------------------------------------------- run a cell


def run_cell(cell: Cell, folder: Path, work: Callable[[Cell, Path], None], retry: bool = False) -> str:
    """Run `work(cell, folder / cell.name)` unless it is done or being done; returns what became of it.

    'finished' or 'failed' (now), 'finished before', 'failed before' (and `retry` is off), 'taken' (by another process).
    An error of `work` is kept in the cell's folder and the caller goes on to other cells; an interrupt passes through.
    """
    own = Path(folder) / cell.name
    if done := _done(own, retry):
        return done
    with _held(own) as stream:
        if stream is None:
            return "taken"
        # asked again under the lock: another process may have ended the cell just before
        return _done(own, retry) or _attempt(cell, own, work, _count_attempt(stream))


def _done(own: Path, retry: bool) -> str:
    if (own / FINISHED).exists():
        return "finished before"
    return "failed before" if not retry and (own / FAILED).exists() else ""


def _attempt(cell: Cell, own: Path, work: Callable[[Cell, Path], None], number: int) -> str:
    own.mkdir(parents=True, exist_ok=True)
    # an attempt that is killed leaves the cell 'started', not failed as before; and a training that failed before it
    # wrote anything finds its run folder empty
    for stale in (FAILED, TRACEBACK):
        (own / stale).unlink(missing_ok=True)
    started, error = time.perf_counter(), {}
    try:
        work(cell, own)
    except Exception as raised:  # noqa: BLE001 whatever a cell stumbles over must not end the others; it is kept
        write_text(own / TRACEBACK, traceback.format_exc())
        # not the exception itself: its traceback would keep the failed cell's model in memory
        error = {"error": str(raised) or type(raised).__name__, "type": type(raised).__name__}
    record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "attempts": number}
    record |= {"seconds": round(time.perf_counter() - started, 3), "changes": dict(cell.changes)} | error
    write_text(own / (FAILED if error else FINISHED), json.dumps(record, indent=1, default=str) + "\n")
    return "failed" if error else "finished"


def _record(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it, and the cell is run again") from error


def refuse_other_cells(cells: Iterable[Cell], folder: Path) -> None:
    """Refuse a grid in which a label of a finished cell now means something else; nothing is changed."""
    for cell in cells:
        path = Path(folder) / cell.name / FINISHED
        if not path.exists():
            continue
        then, now = _record(path)["changes"], json.loads(json.dumps(dict(cell.changes), default=str))
        if then != now:
            raise InputError(
                f"{path.parent} was finished with {then}, and its labels now mean {now}; rename the label, choose "
                "another folder with --out, or delete that one"
            )


# ------------------------------------------------------------------------------------------------------- what is left


def overview(cells: Sequence[Cell], folder: Path) -> pd.DataFrame:
    """One row a cell: name, a column for each axis, state, attempts, seconds (of the last attempt), error.

    attempts and seconds are NaN, and error is empty, for cells that neither finished nor failed.
    """
    rows = []
    for cell in cells:
        own = Path(folder) / cell.name
        row = {"name": cell.name, **cell.labels, "state": state(own)}
        record = {}
        if row["state"] in ("finished", "failed"):
            record = _record(own / (FINISHED if row["state"] == "finished" else FAILED))
        row |= {key: record.get(key, math.nan) for key in ("attempts", "seconds")} | {"error": record.get("error", "")}
        rows.append(row)
    return pd.DataFrame(rows)


def page(table: pd.DataFrame, folder: Path, command: str, retry: str = "--retry true") -> str:
    """The overview in words: counts, failed cells with their error and folder, and what to type for the rest.

    Args:
        command: what was typed to run the grid
        retry: what is added to it to run failed cells again
    """
    counts = table["state"].value_counts()
    said = ", ".join(f"{counts[name]} {name}" for name in STATES if name in counts)
    lines = [f"{len(table)} cells in {folder}: {said}."]
    for row in table[table["state"] == "failed"].itertuples():
        times = f" ({row.attempts:.0f} attempts)" if row.attempts > 1 else ""
        lines += [f"- {row.name} failed{times}: {row.error.splitlines()[0]}"]
        lines += [f"  traceback: {os.path.join(folder, row.name, TRACEBACK)}"]
    if "failed" in counts:
        lines += [f"To run the failed ones again: {command} {retry}"]
    if "started" in counts or "new" in counts:
        lines += [f"To go on with those that are started or new: {command}"]
    return "\n".join(lines) + "\n"


def dry_run(
    cells: Sequence[Cell],
    folder: Path,
    estimate: Callable[[Cell], float],
    jobs: int = 1,
    retry: bool = False,
    seed: str = "seed",
) -> str:
    """The grid as a table with each cell's state and time, and how long the rest may take; writes nothing.

    The time of a cell is what it took; what a cell that differs only in the axis `seed` took (their mean, of those
    that ran through at the first attempt); or `estimate(cell)` in seconds.
    """
    table = overview(cells, folder)
    clean = (table["state"] == "finished") & (table["attempts"] == 1)
    alike = [tuple(text_of(label) for axis, label in cell.labels.items() if axis != seed) for cell in cells]
    measured = table["seconds"].where(clean).groupby(pd.Series([str(key) for key in alike])).transform("mean")
    rows, left = [], []
    for cell, row, known in zip(cells, table.itertuples(), measured):
        if row.state == "finished":
            seconds, source = row.seconds, "took"
        else:
            seconds, source = (estimate(cell), "estimated") if math.isnan(known) else (known, "as other seeds took")
        if row.state in ("new", "started", "running") or (row.state == "failed" and retry):
            left.append(seconds)
        rows.append([*map(text_of, cell.labels.values()), row.state, format_seconds(seconds), source])
    text = markdown_table([*cells[0].labels, "state", "time", "source"], rows)
    if not left:
        return f"{text}\nNothing is left to run.\n"
    wall = max(sum(left) / jobs, max(left))  # no cell is shared out among jobs
    at_a_time = "one at a time" if jobs == 1 else f"{jobs} at a time"
    return f"{text}\n{len(left)} of {len(cells)} cells are left: about {format_seconds(wall)}, {at_a_time}.\n"
