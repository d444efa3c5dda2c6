"""What cells of the tests' grids do; `python tests/grid_work.py FOLDER AXES` runs a grid in a process of its own."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from studies.grid import cells_of, run_cell


def work(cell, folder: Path) -> None:
    """Note the call, then do what the cell's `do` says; two at once in one folder is an error."""
    calls = folder / "calls.txt"
    first = not calls.exists()
    with open(calls, "a") as stream:
        stream.write(f"{os.getpid()} {torch.get_num_threads()}\n")
    do = cell.changes["do"]
    if do == "fail":
        raise ValueError("this encoder has no blocks\nsee above")
    if do == "die once" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "wait":
        wait_for(folder.parent / "go")
    if do == "share":
        (folder / "busy").mkdir()
        time.sleep(0.05)
        (folder / "busy").rmdir()


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} never came")
        time.sleep(0.01)


def calls_of(cells, folder: Path) -> list[list[tuple[int, int]]]:
    """For each cell the (process, threads) of each call of `work`."""
    lines = [(Path(folder) / cell.name / "calls.txt").read_text().splitlines() for cell in cells]
    return [[tuple(map(int, line.split())) for line in each] for each in lines]


def drive(folder: Path, axes: dict) -> list[str]:
    return [run_cell(cell, folder, work) for cell in cells_of(axes)]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    (root / f"ready-{os.getpid()}").touch()
    wait_for(root / "start")
    print(json.dumps(drive(root, json.loads(sys.argv[2]))))
