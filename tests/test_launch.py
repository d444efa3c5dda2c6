"""Cells handed to joblib and to submitit: all are run, in their order, and a worker that dies takes nobody along."""

import functools
import importlib.util
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grid_work import calls_of, wait_for, work

from studies.grid import cells_of, run_cell, state
from studies.launch import _variables, check_launcher, launch
from utils import HOME, InputError

NEEDS_SUBMITIT = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")

SBATCH = """#!{python}
# A cluster of one machine: runs the command of each task of the array, one after another.
import os, re, subprocess, sys
text = open(sys.argv[1]).read()
first, last, at_once = re.search(r"--array=(\\d+)-(\\d+)%(\\d+)", text).groups()
open(os.environ["CLUSTER_LOG"], "w").write(text)
for task in range(int(first), int(last) + 1):
    own = dict(SLURM_JOB_ID=str(100 + task), SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=str(task), SLURM_NTASKS="1",
               SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_NODELIST="me")
    subprocess.Popen(["bash", sys.argv[1]], env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 77")
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done\nexec "$@"\n'
SACCT = "#!/bin/bash\necho 'JobID|State|NodeList'\n"


def runner(folder: Path):
    return functools.partial(run_cell, folder=folder, work=work)


def test_here_is_one_after_another_in_this_process(tmp_path, capsys):
    cells = cells_of({"do": ["count", "fail"], "seed": [0, 1]})
    assert launch(cells, runner(tmp_path), "here", 1, tmp_path) == ["finished", "finished", "failed", "failed"]
    assert {call[0] for calls in calls_of(cells, tmp_path) for call in calls} == {os.getpid()}
    assert capsys.readouterr().out.splitlines()[2] == "do-fail--seed-0: failed"


def test_joblib_runs_all_and_a_dying_worker_takes_nobody_along(tmp_path, capsys):
    cells = cells_of({"do": ["count", "die once", "share", "fail"], "seed": [0]})
    outcomes = launch(cells, runner(tmp_path), "joblib", 2, tmp_path)
    assert outcomes == ["finished", "started", "finished", "failed"]
    assert "do-die_once--seed-0: started (its process died" in capsys.readouterr().out
    calls = calls_of(cells, tmp_path)
    assert [len(each) for each in calls] == [1] * 4
    assert os.getpid() not in {process for each in calls for process, _ in each}
    assert {threads for each in calls for _, threads in each} == {1}  # conftest lets this process have one
    # the same command goes on from there
    again = launch(cells, runner(tmp_path), "here", 1, tmp_path)
    assert again == ["finished before", "finished", "finished before", "failed before"]


INTERRUPTED = """
import functools, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from pathlib import Path
sys.path.insert(0, {tests!r})
from grid_work import work
from studies.grid import cells_of, run_cell
from studies.launch import launch
folder = Path({folder!r})
cells = cells_of({{"do": ["wait"], "seed": [0, 1, 2]}})
launch(cells, functools.partial(run_cell, folder=folder, work=work), "joblib", 2, folder)
"""


def test_an_interrupt_ends_joblibs_workers_too(tmp_path):
    code = INTERRUPTED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    variables = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=variables, stderr=subprocess.PIPE, text=True)
    for seed in (0, 1):
        wait_for(tmp_path / f"do-wait--seed-{seed}" / "calls.txt")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    states = [state(tmp_path / cell.name) for cell in cells_of({"do": ["wait"], "seed": [0, 1, 2]})]
    assert states == ["started", "started", "new"]


@NEEDS_SUBMITIT
def test_local_jobs_run_all_and_a_dying_one_takes_nobody_along(tmp_path, capsys, monkeypatch):
    import submitit

    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)  # its patience with slow disks
    cells = cells_of({"do": ["die once", "count"]})
    assert launch(cells, runner(tmp_path), "submitit-local", 1, tmp_path) == ["started", "finished"]
    said = capsys.readouterr().out
    assert "do-die_once: started (its process died" in said and str(tmp_path / "jobs") in said
    assert [len(each) for each in calls_of(cells, tmp_path)] == [1] * 2
    assert launch(cells[:1], runner(tmp_path), "here", 1, tmp_path) == ["finished"]


@NEEDS_SUBMITIT
def test_slurm_gets_one_array_with_the_options_and_its_throttle(tmp_path, monkeypatch):
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text.replace("{python}", sys.executable))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER_LOG", str(tmp_path / "array.sh"))
    cells = cells_of({"do": ["count", "fail"]})
    options = {"timeout_min": 90, "slurm_partition": "gpu"}
    assert launch(cells, runner(tmp_path), "slurm", 1, tmp_path, options) == ["finished", "failed"]
    script = (tmp_path / "array.sh").read_text()
    for line in ("--array=0-1%1", "--partition=gpu", "--time=90", "--job-name=grid"):
        assert f"#SBATCH {line}\n" in script
    with pytest.raises(InputError, match=r"refuses the options.*'slurm_partitoin'"):
        launch(cells, runner(tmp_path), "slurm", 5, tmp_path, {"timeout_min": 90, "slurm_partitoin": "gpu"})


@pytest.mark.parametrize(
    ("launcher", "jobs", "options", "said"),
    [
        ("jobib", 2, None, "closest: 'joblib'"),
        ("joblib", 0, None, "jobs must be above 0"),
        ("here", 2, None, "one cell at a time"),
        ("joblib", 2, {"timeout_min": 5}, r"takes no options \(timeout_min\)"),
        pytest.param("slurm", 2, {"timeout_min": 5}, "no srun", marks=NEEDS_SUBMITIT),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_runs(launcher, jobs, options, said, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=said):
        launch(cells_of({"do": ["count"]}), runner(tmp_path), launcher, jobs, tmp_path, options)
    assert not list(tmp_path.iterdir())


def test_without_submitit_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-cluster\.txt"):
        check_launcher("slurm", 2)
    assert "submitit" in (HOME / "requirements-cluster.txt").read_text()


def test_slurm_wants_to_know_how_long_a_cell_may_take(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/srun")
    with pytest.raises(InputError, match="timeout_min"):
        check_launcher("slurm", 2, {"slurm_partition": "gpu"})
    check_launcher("slurm", 2, {"slurm_time": 90})


def test_workers_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [_variables(slot, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["3", "5", "3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert _variables(3, 2) == dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2") | {
        "CUDA_VISIBLE_DEVICES": "1"
    }
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "CUDA_VISIBLE_DEVICES" not in _variables(0, 1)
