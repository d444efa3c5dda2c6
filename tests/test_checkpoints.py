"""Killed and resumed: at every boundary between files, by a real SIGKILL, on a full disk, from a damaged state."""

import dataclasses
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file

import checkpoints
import locks
import models
import train as door
from train import TrainConfig, train
from utils import HOME, InputError, refuse_other_run

SIZE, EPOCHS = 32, 3
IOUS = [0.2, 0.6, 0.4]  # scripted: the second epoch is the best, the third is not
FILES = 8  # renamed into place after each epoch: two states, best and last with their json, curves, history


VALIDATE = door._Run.validate


@pytest.fixture(scope="module")
def base(synthetic_root) -> TrainConfig:
    """Everything that has a state: moments, schedule, two groups, averaged weights, random points of the loss."""
    switches = {"schedule": "cosine", "warmup": 0.3, "clip_norm": 1.0, "average": 0.9, "encoder_learning_rate": 0.5}
    places = {"data": str(synthetic_root), "image_size": SIZE, "device": "cpu", "limits": {"train": 8}}
    return TrainConfig(model="mask2former", preset="smoke", epochs=EPOCHS, batch_size=4, **switches, **places)


@pytest.fixture(scope="module", autouse=True)
def _quick_epochs():
    """A scripted validation and an empty picture: these tests write many epochs."""

    def validate(self):
        return {"validation_loss": 1.0, "validation_iou": IOUS[len(self.history)]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door._Run, "validate", validate)
        patch.setattr(door.visualization, "training_curves", lambda *_, **__: Figure(figsize=(0.1, 0.1)))
        yield


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The run that nobody interrupted."""
    return train(dataclasses.replace(base, out=str(tmp_path_factory.mktemp("whole") / "run")))


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours may catch it."""


def kill_at_rename(patch, number: int) -> None:
    """The process ends before the so-manieth file (from 0) takes its name."""
    replace, left = os.replace, [number]

    def counted(*places):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        replace(*places)

    patch.setattr(os, "replace", counted)


def assert_same_run(folder, other) -> None:
    """Both checkpoints bit for bit, the history in all but its seconds, and the states."""
    for kept in ("best", "last"):
        a, b = (load_file(run / kept / "model.safetensors") for run in (folder, other))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        assert (folder / kept / "model.json").read_bytes() == (other / kept / "model.json").read_bytes()
    tables = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (folder, other)]
    pd.testing.assert_frame_equal(*tables)
    for name in (checkpoints.LAST, checkpoints.BEFORE):
        a, b = (torch.load(run / name, weights_only=True) for run in (folder, other))
        for part in ("model", "average"):
            first, second = (s["model"] if part == "model" else s["average"]["model"] for s in (a, b))
            assert all(torch.equal(first[key], second[key]) for key in first)
        assert a["schedule"] == b["schedule"] and a["average"]["steps"] == b["average"]["steps"]
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


# ------------------------------------------------------------------------------------------------------------ killed


@pytest.fixture(scope="module")
def after_one_epoch(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_at_rename(patch, 2 + FILES - 1)  # 2: settings and environment; the first epoch has no state before it
        with pytest.raises(Killed):
            train(dataclasses.replace(base, out=str(folder)))
    assert len(pd.read_csv(folder / "history.csv")) == 1
    return folder


@pytest.mark.parametrize("rename", range(2 + FILES + 1))
def test_a_run_killed_between_any_two_files_ends_as_if_it_had_not_been(
    base, whole, after_one_epoch, tmp_path, monkeypatch, rename
):
    folder = shutil.copytree(after_one_epoch, tmp_path / "run")
    config = dataclasses.replace(base, out=str(folder))
    with monkeypatch.context() as patch:
        kill_at_rename(patch, rename)
        with pytest.raises(Killed):
            train(config)
    # what a real kill leaves beside: a file that was being written
    for leftover in (".resume-abcdefgh.pt", ".history-0_234567.csv", "best/.model-abcdefgh.safetensors"):
        (folder / leftover).write_bytes(b"half")
    train(config)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("rename", [0, 1, 2, 3])
def test_a_run_killed_before_its_first_epoch_was_whole_begins_again(base, whole, tmp_path, monkeypatch, rename):
    config = dataclasses.replace(base, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        kill_at_rename(patch, rename)
        with pytest.raises(Killed):
            train(config)
    (tmp_path / "run" / ".config-abcdefgh.yaml").write_bytes(b"half")
    train(config)
    assert_same_run(tmp_path / "run", whole)


def test_best_is_never_ahead_of_what_the_run_continues_from(base, after_one_epoch, tmp_path, monkeypatch):
    """Killed before the state of the best epoch has its name: best/ is still the first epoch's."""
    folder = shutil.copytree(after_one_epoch, tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 3)
        with pytest.raises(Killed):
            train(dataclasses.replace(base, out=str(folder)))
    assert checkpoints.saved_extra(folder / "best")["epoch"] == 1
    assert checkpoints.load_state(folder)["history"][-1]["epoch"] == 1


def test_a_killed_process_goes_on_by_the_same_command(base, tmp_path):
    """SIGKILL to a real process, as soon as the first epoch's state is there; against one that was left alone."""
    config = dataclasses.replace(base, out=str(tmp_path / "alone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door._Run, "validate", VALIDATE)
        train(config)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    command = [sys.executable, str(HOME / "train.py"), "--config", str(tmp_path / "settings.yaml"), "--out"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start():
        return subprocess.Popen([*command, str(tmp_path / "killed")], env=env, stdout=subprocess.DEVNULL)

    killed, state = start(), tmp_path / "killed" / checkpoints.LAST
    deadline = time.monotonic() + 120
    while not state.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    written = tmp_path / "killed" / "history.csv"
    assert not written.exists() or len(pd.read_csv(written)) < EPOCHS
    assert start().wait(120) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "alone")


# ----------------------------------------------------------------------------------------------------------- damaged


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def of_another_program(path):
    torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut_short, "is damaged (BadZipFile"),
        (flip_a_byte, "is damaged (wrong checksum of"),
        (empty, "is damaged (BadZipFile"),
        (of_another_program, "is damaged (no state of a training"),
        (os.unlink, "is missing"),
    ],
)
def test_a_damaged_state_falls_back_to_the_one_before_and_says_so(base, whole, tmp_path, capsys, spoil, words):
    folder = shutil.copytree(whole, tmp_path / "run")
    spoil(folder / checkpoints.LAST)
    train(dataclasses.replace(base, out=str(folder)))
    said = capsys.readouterr().out
    assert words in said and "continuing from the checkpoint before it, resume-previous.pt, after epoch 2" in said
    assert_same_run(folder, whole)


def test_a_run_killed_after_falling_back_still_has_the_whole_state(base, whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "run")
    cut_short(folder / checkpoints.LAST)
    config = dataclasses.replace(base, out=str(folder))
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 4)  # settings, environment, the damaged state set aside, and one of the new files
        with pytest.raises(Killed):
            train(config)
    train(config)
    assert_same_run(folder, whole)


def test_two_damaged_states_are_named_and_nothing_is_changed(base, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    cut_short(folder / checkpoints.LAST)
    flip_a_byte(folder / checkpoints.BEFORE)
    before = {path: path.read_bytes() for path in folder.rglob("*.*t*") if path.suffix in (".pt", ".safetensors")}
    with pytest.raises(InputError, match=r"resume\.pt .*resume-previous\.pt .*delete resume\*\.pt there to train"):
        train(dataclasses.replace(base, out=str(folder)))
    assert {path: path.read_bytes() for path in before} == before
    for path in folder.glob("resume*.pt"):  # the remedy
        path.unlink()
    train(dataclasses.replace(base, out=str(folder)))
    assert_same_run(folder, whole)


def test_every_flipped_byte_of_a_tensor_is_noticed(tmp_path):
    state = {"model": {"weight": torch.arange(64.0)}, "optimizer": {}, "history": []}
    checkpoints.save_state(tmp_path, state)
    path = tmp_path / checkpoints.LAST
    data = path.read_bytes()
    start = data.index(torch.arange(64.0).numpy().tobytes())
    for place in range(start, start + 256):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(InputError, match="wrong checksum"):
            checkpoints.load_state(tmp_path)


# --------------------------------------------------------------------------------------------------------- full disk


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rust_has_no_space(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "name", "refuse"),
    [
        (checkpoints.os, "fsync", no_space),
        (models, "save_file", rust_has_no_space),
        (door, "write_table", no_space),
    ],
    ids=["state", "weights", "history"],
)
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_once_there_is_space(
    base, whole, after_one_epoch, tmp_path, monkeypatch, place, name, refuse
):
    folder = shutil.copytree(after_one_epoch, tmp_path / "run")
    config = dataclasses.replace(base, out=str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(place, name, refuse)
        with pytest.raises(InputError, match=rf"checkpoint of epoch 2 .*{folder} .*No space left.*free some space"):
            train(config)
    models.load_model(folder / "best")
    models.load_model(folder / "last")
    train(config)
    assert_same_run(folder, whole)


def test_a_disk_that_really_refuses_leaves_the_earlier_checkpoint_untouched(
    base, whole, after_one_epoch, tmp_path, monkeypatch
):
    folder = shutil.copytree(after_one_epoch, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.suffix in (".pt", ".safetensors", ".csv")}
    config, write = dataclasses.replace(base, out=str(folder)), door.save_state

    def limited(*arguments):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # bytes a file; the state has millions
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(door, "save_state", limited)
        with pytest.raises(InputError, match=r"checkpoint of epoch 2 could not be written to .*File too large"):
            train(config)
    assert {path: path.read_bytes() for path in before} == before
    train(config)
    assert_same_run(folder, whole)


# ---------------------------------------------------------------------------------------------------------- settings


def test_two_trainings_in_one_folder_are_refused(base, whole):
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(whole / locks.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is at work in"):
            train(dataclasses.replace(base, out=str(whole)))
        other.kill()
    train(dataclasses.replace(base, out=str(whole)))  # the lock went with the process


def test_a_run_from_before_a_setting_was_there_continues_with_what_it_then_did(tmp_path):
    (tmp_path / "config.yaml").write_text("epochs: 3\nmodels:\n- {model: unetpp}\n")
    refuse_other_run(tmp_path, {"epochs": 3, "clip_norm": 0.0, "models": [{"model": "unetpp", "average": 0.0}]})
    with pytest.raises(InputError, match=r"models\[0\]\.average: 0\.0 there, 0\.9 now"):
        refuse_other_run(tmp_path, {"epochs": 3, "models": [{"model": "unetpp", "average": 0.9}]})
