"""A grid of runs: its cells and their names, what is refused, and that no cell is run twice, whoever is killed."""

import errno
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from grid_work import calls_of, drive, wait_for, work

from locks import alone_in
from recipes import TrainConfig
from studies import grid
from studies.grid import Cell, cells_of, check_settings, dry_run, merged, overview, page, run_cell, state
from utils import HOME, InputError, refuse_other_run

KNOWN = TrainConfig.__dataclass_fields__
ENCODERS = {
    "clip": {"preset": "vit_clip", "options": {"encoder_name": "clip"}},
    "mae": {"preset": "vit_mae", "options": {"encoder_name": "mae"}},
}
NECKS = {"taps": {"options": {"neck": "taps", "fuse": True}}, "pyramid": {"options": {"neck": "pyramid"}}}


def driver(folder: Path, axes: dict) -> subprocess.Popen:
    """A real process that runs the grid once `folder/start` is there."""
    command = [sys.executable, str(Path(__file__).with_name("grid_work.py")), str(folder), json.dumps(axes)]
    variables = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)


# ------------------------------------------------------------------------------------------------------- the cells


def test_cells_are_the_product_in_the_order_written():
    cells = cells_of({"encoder": ENCODERS, "neck": NECKS, "seed": [0, 1, 2]})
    assert [tuple(cell.labels.values()) for cell in cells] == list(itertools.product(ENCODERS, NECKS, [0, 1, 2]))
    assert cells[5].changes == {
        "preset": "vit_clip",
        "options": {"encoder_name": "clip", "neck": "pyramid"},
        "seed": 2,
    }
    assert NECKS["pyramid"] == {"options": {"neck": "pyramid"}}  # what was given is left as it is


def test_names_are_folders_of_their_own():
    axes = {"learning_rate": [1e-3, 1e-05], "freeze": [[], ["encoder"]], "flips": [True], "hub": {"a/b, c=1": {}}}
    names = [cell.name for cell in cells_of(axes)]
    assert names[0] == "learning_rate-0.001--freeze-none--flips-true--hub-a_b_c_1"
    assert names[3] == "learning_rate-1e-05--freeze-encoder--flips-true--hub-a_b_c_1"
    assert len(set(names)) == 4 and not any(set("/=, ") & set(name) for name in names)


@pytest.mark.parametrize("labels", [["a/b", "a b"], ["ViT", "vit"], [0, 0]])
def test_two_cells_of_one_name_are_refused(labels):
    with pytest.raises(InputError, match="share the folder"):
        cells_of({"seed": labels})


def test_nested_settings_are_merged_one_level_deep():
    base = {"options": {"a": 1, "b": {"c": 2}}, "seed": 0, "freeze": ["encoder"]}
    changed = merged(base, {"options": {"b": {"d": 3}}, "freeze": []})
    assert changed == {"options": {"a": 1, "b": {"d": 3}}, "seed": 0, "freeze": []}
    assert base["options"] == {"a": 1, "b": {"c": 2}}


def test_skipped_combinations_are_left_out_and_no_others():
    axes = {"encoder": ENCODERS, "neck": NECKS, "seed": [0, 1, 2]}
    left = cells_of(axes, skip=[{"encoder": "mae", "neck": "pyramid"}, {"seed": [1, 2], "neck": "taps"}])
    wanted = [
        (encoder, neck, seed)
        for encoder, neck, seed in itertools.product(ENCODERS, NECKS, [0, 1, 2])
        if not (encoder == "mae" and neck == "pyramid") and not (seed in (1, 2) and neck == "taps")
    ]
    assert [tuple(cell.labels.values()) for cell in left] == wanted and len(wanted) == 5


@pytest.mark.parametrize(
    ("axes", "skip", "said"),
    [
        ({"seed": []}, [], "'seed' has no values"),
        ({"encoder": {}}, [], "'encoder' has no values"),
        ({"seed": 3}, [], r"write seed: \[3\]"),
        ({"options": [{"a": 1}]}, [], "needs a label"),
        ({"encoder": {"clip": "vit_clip"}}, [], "label 'clip': expected"),
        ({"state": [1]}, [], "column"),
        ({}, [], "no cells"),
        ({"seed": [0]}, [{"seed": 0}], "no cells"),
        ({"seed": [0]}, [{"sead": 0}], "no axis 'sead'; closest: 'seed'"),
        ({"encoder": ENCODERS}, [{"encoder": "clop"}], "no label 'clop'; closest: 'clip'"),
        ({"preset": ["demo"], "encoder": ENCODERS}, [], "both change preset"),
        ({"neck": NECKS, "other": {"x": {"options": {"fuse": False}}}}, [], "both change options.fuse"),
        ({"neck": NECKS, "other": {"x": {"options": None}}}, [], r"both change options\."),
        ({"preset": ["x" * 300]}, [], "shorten"),
    ],
)
def test_what_is_no_grid_is_refused(axes, skip, said):
    with pytest.raises(InputError, match=said):
        cells_of(axes, skip)


def test_unknown_settings_are_refused_with_the_closest():
    check_settings({"encoder": ENCODERS, "seed": [0]}, KNOWN)
    with pytest.raises(InputError, match=r"axis 'sede' is no setting; closest: 'seed'"):
        check_settings({"sede": [0]}, KNOWN)
    with pytest.raises(InputError, match=r"label 'clip': unknown setting 'presett'; closest: 'preset'"):
        check_settings({"encoder": {"clip": {"presett": "demo"}}}, KNOWN)


# ----------------------------------------------------------------------------------------------- one cell at a time


def test_finished_cells_are_not_run_again(tmp_path):
    axes = {"do": ["count", "share"], "seed": [0, 1]}
    assert drive(tmp_path, axes) == ["finished"] * 4
    assert drive(tmp_path, axes) == ["finished before"] * 4
    assert [len(calls) for calls in calls_of(cells_of(axes), tmp_path)] == [1] * 4


def test_a_failing_cell_is_listed_and_run_again_only_on_request(tmp_path):
    cells = cells_of({"do": ["fail", "count"]})
    assert [run_cell(cell, tmp_path, work) for cell in cells] == ["failed", "finished"]
    assert [run_cell(cell, tmp_path, work) for cell in cells] == ["failed before", "finished before"]
    said = page(overview(cells, tmp_path), tmp_path, "python experiments.py encoders")
    assert "1 finished, 1 failed" in said and "do-fail failed: this encoder has no blocks\n" in said
    assert "python experiments.py encoders --retry true" in said and "go on" not in said
    assert 'raise ValueError("this encoder' in (tmp_path / "do-fail" / "traceback.txt").read_text()
    assert run_cell(cells[0], tmp_path, work, retry=True) == "failed"
    assert overview(cells, tmp_path)["attempts"].tolist() == [2, 1]
    assert "(2 attempts)" in page(overview(cells, tmp_path), tmp_path, "")
    assert run_cell(cells[0], tmp_path, lambda cell, folder: None, retry=True) == "finished"
    assert not (tmp_path / "do-fail" / "failed.json").exists() and state(tmp_path / "do-fail") == "finished"
    assert len(calls_of(cells, tmp_path)[0]) == 2


def test_an_error_without_words_is_listed_by_its_kind(tmp_path):
    def wordless(cell, folder):
        raise MemoryError

    cells = cells_of({"seed": [0]})
    assert run_cell(cells[0], tmp_path, wordless) == "failed"
    assert "seed-0 failed: MemoryError" in page(overview(cells, tmp_path), tmp_path, "")


def test_an_interrupt_ends_the_grid_and_leaves_the_cell_to_go_on(tmp_path):
    def interrupted(cell, folder):
        raise KeyboardInterrupt

    cell = cells_of({"seed": [0]})[0]
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path, interrupted)
    assert state(tmp_path / cell.name) == "started"
    assert run_cell(cell, tmp_path, lambda cell, folder: None) == "finished"


def test_a_training_finds_its_folder_as_it_wants_it(tmp_path):
    """Empty or its own, with the lock that it takes itself; also after it failed before it wrote anything."""

    def refused(cell, folder):
        refuse_other_run(folder, {"seed": 0})
        raise InputError("unknown preset")

    def trained(cell, folder):
        refuse_other_run(folder, {"seed": 0})
        with alone_in(folder):
            assert state(folder) == "running"

    cell = cells_of({"seed": [0]})[0]
    assert run_cell(cell, tmp_path, refused) == "failed"
    assert run_cell(cell, tmp_path, trained, retry=True) == "finished"


def test_a_label_that_changed_its_meaning_is_refused(tmp_path):
    (cell,) = cells_of({"encoder": {"vit": {"preset": "vit_s", "freeze": ("encoder",)}}})
    run_cell(cell, tmp_path, lambda cell, folder: None)
    grid.refuse_other_cells([cell], tmp_path)
    with pytest.raises(InputError, match=r"encoder-vit was finished with .*vit_s"):
        grid.refuse_other_cells(cells_of({"encoder": {"vit": {"preset": "vit_b"}}}), tmp_path)


# ------------------------------------------------------------------------------------------------ several processes


def test_a_killed_driver_is_gone_on_from(tmp_path):
    axes = {"do": ["count", "share", "wait", "fail"]}
    cells = cells_of(axes)
    (tmp_path / "start").touch()
    process = driver(tmp_path, axes)
    wait_for(tmp_path / "do-wait" / "calls.txt")
    assert [state(tmp_path / cell.name) for cell in cells] == ["finished", "finished", "running", "new"]
    assert run_cell(cells[2], tmp_path, work) == "taken"
    process.kill()
    process.wait()
    assert [state(tmp_path / cell.name) for cell in cells] == ["finished", "finished", "started", "new"]
    assert "go on with those that are started or new: again" in page(overview(cells, tmp_path), tmp_path, "again")
    (tmp_path / "go").touch()
    assert drive(tmp_path, axes) == ["finished before", "finished before", "finished", "failed"]
    assert [len(calls) for calls in calls_of(cells, tmp_path)] == [1, 1, 2, 1]
    assert overview(cells, tmp_path)["attempts"].tolist() == [1, 1, 2, 1]


def test_two_drivers_share_twelve_cells_and_run_none_twice(tmp_path):
    axes = {"do": ["share"], "seed": list(range(12))}
    drivers = [driver(tmp_path, axes) for _ in range(2)]
    for process in drivers:
        wait_for(tmp_path / f"ready-{process.pid}")
    (tmp_path / "start").touch()
    outcomes = [json.loads(process.communicate(timeout=60)[0]) for process in drivers]
    calls = calls_of(cells_of(axes), tmp_path)
    assert [len(each) for each in calls] == [1] * 12
    for pair in zip(*outcomes):  # each cell was finished by one of them, and the other one passed it by
        assert sorted(pair)[0] == "finished" and sorted(pair)[1] in ("finished before", "taken")
    assert {process for each in calls for process, _ in each} == {process.pid for process in drivers}


def other_process(folder: Path, byte: int, how: str, then: str = "") -> str:
    """What another process meets that locks a byte of the cell's lock file."""
    code = f"""
import fcntl, time
stream = open({str(grid._lock_file(folder))!r}, "r+")
try:
    fcntl.lockf(stream, fcntl.{how} | fcntl.LOCK_NB, 1, {byte})
    print("free", flush=True)
    {then}
except OSError:
    print("held")
"""
    return shlex.join([sys.executable, "-c", code])


def test_a_look_does_not_give_up_the_lock_of_its_own_process(tmp_path):
    seen = []

    def looks(cell, folder):
        seen.append(state(folder))
        seen.append(run_cell(cell, tmp_path, looks))
        for byte in (grid.CLAIM, grid.SIGN):
            seen.append(subprocess.check_output(other_process(folder, byte, "LOCK_EX"), shell=True, text=True).strip())

    assert run_cell(cells_of({"seed": [0]})[0], tmp_path, looks) == "finished"
    assert seen == ["running", "taken", "held", "held"]
    command = other_process(tmp_path / "seed-0", grid.CLAIM, "LOCK_EX")
    assert subprocess.check_output(command, shell=True, text=True).strip() == "free"  # the look at it can fail


def test_a_look_of_another_process_keeps_nobody_from_the_cell(tmp_path):
    cell = cells_of({"seed": [0]})[0]
    lock = grid._lock_file(tmp_path / cell.name)
    lock.parent.mkdir()
    lock.touch()
    command = other_process(tmp_path / cell.name, grid.SIGN, "LOCK_SH", "time.sleep(0.3)")
    with subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, text=True) as looking:
        assert looking.stdout.readline() == "free\n"
        assert run_cell(cell, tmp_path, lambda cell, folder: None) == "finished"


def test_a_look_asks_only_for_the_byte_that_claims_do_not_depend_on(tmp_path, monkeypatch):
    (cell,) = cells_of({"do": ["fail"]})
    run_cell(cell, tmp_path, work)
    asked, lockf = [], grid.fcntl.lockf
    monkeypatch.setattr(
        grid.fcntl, "lockf", lambda stream, how, *place: asked.append(place) or lockf(stream, how, *place)
    )
    assert state(tmp_path / cell.name) == "failed"
    assert asked == [(1, grid.SIGN)]


def test_a_disk_without_locks_is_refused(tmp_path, monkeypatch):
    def lockf(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(grid.fcntl, "lockf", lockf)
    with pytest.raises(InputError, match=r"no file locks \(No locks available\)"):
        run_cell(cells_of({"do": ["count"]})[0], tmp_path, work)
    assert not (tmp_path / "do-count").exists()


# ------------------------------------------------------------------------------------------------------- what is left


def took(cell: Cell, folder: Path, seconds: float, attempts: int = 1) -> None:
    """As if the cell had taken so long."""
    run_cell(cell, folder, lambda cell, folder: None)
    path = folder / cell.name / grid.FINISHED
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds, "attempts": attempts}))


def files(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_writes_nothing_even_where_nothing_is(tmp_path):
    cells = cells_of({"do": ["count", "fail", "share"]})
    assert "3 of 3 cells are left: about 45 s, one" in dry_run(cells, tmp_path / "grid", lambda cell: 15.0)
    assert not (tmp_path / "grid").exists()
    run_cell(cells[0], tmp_path, work)
    run_cell(cells[1], tmp_path, work)
    before = files(tmp_path)
    text = dry_run(cells, tmp_path, lambda cell: 15.0)
    assert files(tmp_path) == before
    assert [row.split(" | ")[1] for row in text.splitlines()[2:5]] == ["finished", "failed", "new"]
    assert "1 of 3 cells are left: about 15 s" in text
    assert "2 of 3 cells are left: about 30 s" in dry_run(cells, tmp_path, lambda cell: 15.0, retry=True)


def test_measured_times_of_other_seeds_come_before_estimates(tmp_path):
    cells = cells_of({"encoder": ENCODERS, "seed": [0, 1, 2, 3]})
    took(cells[0], tmp_path, 1000)
    took(cells[1], tmp_path, 3000)
    took(cells[2], tmp_path, 1, attempts=2)  # the end of a longer one: says nothing of a whole one
    asked = []
    text = dry_run(cells, tmp_path, lambda cell: asked.append(cell) or 4000.0, jobs=3)
    assert asked == cells[4:]  # all of the other encoder
    rows = text.splitlines()
    assert rows[2] == "| clip | 0 | finished | 17 min | took |" and rows[5].endswith("33 min | as other seeds took |")
    assert rows[6] == "| mae | 0 | new | 67 min | estimated |"
    # (2000 + 4 · 4000) / 3 = 6000 s
    assert rows[-1] == "5 of 8 cells are left: about 1.7 h, 3 at a time."
    # no cell is cut in two: 18000 / 100 s is less than the longest one takes
    assert "about 67 min, 100" in dry_run(cells, tmp_path, lambda cell: 4000.0, jobs=100)


def test_a_damaged_record_is_named(tmp_path):
    (cell,) = cells_of({"do": ["count"]})
    run_cell(cell, tmp_path, work)
    (tmp_path / cell.name / grid.FINISHED).write_text("{")
    with pytest.raises(InputError, match=r"do-count/finished\.json cannot be read"):
        overview([cell], tmp_path)
