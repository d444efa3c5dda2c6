"""Ground floor: run folders, atomic files, digests, devices, errors as sentences."""

import hashlib
import json
import random

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import utils
from utils import InputError

CPU = torch.device("cpu")


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_run_folder_says_what_it_was_made_with(tmp_path):
    folder = utils.open_run(tmp_path / "a" / "run", {"seed": 1, "models": [{"name": "x"}]}, CPU)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"seed": 1, "models": [{"name": "x"}]}
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0] or "torch" in environment["packages"]
    assert environment["device"] == "cpu" and {"commit", "time", "python"} <= set(environment)


def test_the_same_settings_continue_a_run_and_others_change_nothing(tmp_path):
    run = {"seed": 1, "rate": 0.1, "out": "a", "device": "cpu", "workers": 0}
    utils.open_run(tmp_path / "run", run, CPU)
    utils.open_run(tmp_path / "run", run | {"out": "b", "device": "cuda", "workers": 4}, CPU)
    before = snapshot(tmp_path)
    for other, words in (
        (run | {"seed": 2}, "seed: 1 there, 2 now"),
        (run | {"new": 3}, "new: 'absent' there, 3 now"),
        ({key: run[key] for key in run if key != "rate"}, "rate: 0.1 there, 'absent' now"),
    ):
        with pytest.raises(InputError, match=f"other settings .*{words}.*nothing was changed"):
            utils.open_run(tmp_path / "run", other, CPU)
    assert snapshot(tmp_path) == before


def test_a_folder_of_something_else_is_no_run_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="not empty and is no run of ours"):
        utils.open_run(tmp_path, {"seed": 1}, CPU)
    with pytest.raises(InputError, match="is a file"):
        utils.open_run(tmp_path / "notes.txt", {"seed": 1}, CPU)
    assert snapshot(tmp_path) == before


def test_settings_survive_yaml_whatever_their_type(tmp_path):
    """A tuple, a path or a small float must not make the second run look like another."""
    run = {"t": (1, 2), "p": tmp_path, "f": 1e-4, "n": None, "s": "no", "x": float(np.float32(0.1))}
    for _ in range(2):
        utils.open_run(tmp_path / "run", run, CPU)


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path):
    utils.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), utils.atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


def test_tables_keep_six_digits(tmp_path):
    utils.write_table(pd.DataFrame({"id": ["a"], "x": [1 / 3], "n": [12345678]}), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "id,x,n\na,0.333333,12345678\n"


def test_digests_are_of_the_content(tmp_path):
    assert utils.digest(b"abc") == hashlib.sha256(b"abc\0").hexdigest()[:16]
    assert utils.digest({"a": 1, "b": 2}) == utils.digest({"b": 2, "a": 1})
    assert utils.digest("ab", "c") != utils.digest("a", "bc")
    assert utils.digest([1, 2]) != utils.digest([2, 1])
    (tmp_path / "f").write_bytes(b"abc")
    assert utils.file_digest(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()[:16]


def test_one_seed_is_for_all_generators():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(1))

    utils.seed_everything(3)
    first = draw()
    utils.seed_everything(3)
    assert draw() == first
    utils.seed_everything(4)
    assert all(a != b for a, b in zip(draw(), first))
    utils.seed_everything(2**40)  # NumPy takes 32 bits only


def test_devices_are_resolved_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.resolve_device("auto") == utils.resolve_device("cpu") == CPU
    for name in ("cuda",):
        with pytest.raises(InputError, match="no CUDA device here; use --device cpu"):
            utils.resolve_device(name)
    with pytest.raises(InputError, match="unknown device 'gpu'; use auto, cpu or cuda"):
        utils.resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert utils.resolve_device("auto").type == "cuda"


def test_unknown_names_come_with_the_closest():
    with pytest.raises(InputError, match="unknown fruit 'aple'; closest: 'apple'"):
        utils.pick("fruit", "aple", {"apple": 1, "pear": 2})
    assert utils.closest("zzzz", ["a", "b", "c", "d"]) == "'a', 'b', 'c'"
    assert utils.pick("fruit", "pear", {"apple": 1, "pear": 2}) == 2


def test_an_input_error_becomes_one_line_and_code_two_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as caught, utils.sentences_instead_of_tracebacks():
        raise InputError("the folder is empty; fill it")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the folder is empty; fill it\n"
    with pytest.raises(ZeroDivisionError), utils.sentences_instead_of_tracebacks():
        _ = 1 / 0


def test_progress_is_quiet_when_not_a_terminal(capsys):
    assert list(utils.progress(range(3), desc="counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_durations_are_readable(seconds, text):
    assert utils.format_seconds(seconds) == text


def test_markdown_tables_are_githubs():
    assert utils.markdown_table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"


def test_the_peak_of_memory_holds_what_was_once_there():
    before = float(utils.peak_memory(torch.device("cpu")).split()[0])
    _ = torch.ones(150_000_000)  # 0.6 GB
    del _
    after = float(utils.peak_memory(torch.device("cpu")).split()[0])
    assert after >= max(0.6, before)
