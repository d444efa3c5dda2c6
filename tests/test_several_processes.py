"""Several processes: the same metrics as one, nothing counted twice, one writer, and resumed to the bit."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import checkpoints
from dataset import make_loader
from inference import score
from models import load_model
from processes import _processes_asked_for, share_of
from sources import open_datasets
from train import TrainConfig, train
from utils import HOME, InputError

SETTINGS = {"image_size": 32, "preset": "smoke", "epochs": 2, "batch_size": 3, "average": 0.5, "limits": {"train": 10}}
SETTINGS |= {"options": {"encoder_name": "tu-mobilenetv3_small_050"}}  # most of the time went into writing weights


ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--cpu"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # what accelerate ends up with; quicker


def launch(launcher, root, out) -> subprocess.CompletedProcess:
    """`accelerate launch --num_processes 2 train.py …`: batches of 3, of 10 training and of 4 validation images."""
    values = [word for key, value in SETTINGS.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            *launcher,
            str(HOME / "train.py"),
            "--data",
            str(root),
            "--device",
            "cpu",
            "--out",
            str(out),
            *values,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(synthetic_root, tmp_path_factory):
    """(the run folder of two processes, what they printed)"""
    out = tmp_path_factory.mktemp("two") / "run"
    done = launch(ACCELERATE, synthetic_root, out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_two_processes_share_one_run_and_one_of_them_speaks(trained):
    folder, said = trained
    assert "processes: 2" in (folder / "config.yaml").read_text()
    assert said.count("best epoch") == 1 and said.count("validation_iou") == 1
    assert pd.read_csv(folder / "history.csv")["epoch"].tolist() == [1, 2]
    # 4 batches of 3, 3, 3 and 1 images make two steps for each of two processes
    assert torch.load(folder / checkpoints.LAST, weights_only=True)["average"]["steps"] == 4


@pytest.mark.parametrize("kept", ["best", "last"])
def test_their_metrics_are_those_of_one_process_for_the_same_checkpoint(trained, synthetic_root, kept):
    folder, _ = trained
    model, extra = load_model(folder / kept)
    images = open_datasets(TrainConfig(data=str(synthetic_root), **SETTINGS))["validation"]
    metrics, _ = score(model, make_loader(images, SETTINGS["batch_size"]))
    assert sorted(metrics["id"]) == images.ids and len(images) == 4
    assert extra["validation_iou"] == pytest.approx(metrics["iou"].mean(), abs=1e-12)
    written = pd.read_csv(folder / "history.csv").set_index("epoch")["validation_iou"]
    assert written[extra["epoch"]] == pytest.approx(metrics["iou"].mean(), abs=1e-6)


def test_two_processes_resume_to_the_bit(trained, synthetic_root, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (folder / checkpoints.LAST).write_bytes(b"damaged")
    done = launch(TORCHRUN, synthetic_root, folder)
    assert done.returncode == 0 and done.stdout.count("after epoch 1") == 1, done.stdout + done.stderr
    for kept in ("best", "last"):
        a, b = (load_file(run / kept / "model.safetensors") for run in (folder, trained[0]))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    tables = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (folder, trained[0])]
    pd.testing.assert_frame_equal(*tables)


def test_another_number_of_processes_is_another_run(trained, synthetic_root):
    config = TrainConfig(data=str(synthetic_root), device="cpu", out=str(trained[0]), **SETTINGS)
    with pytest.raises(InputError, match="processes: 2 there, 1 now"):
        train(config)


@pytest.mark.parametrize(("images", "batch", "processes"), [(10, 3, 2), (4, 3, 2), (1, 3, 4), (12, 4, 3), (7, 1, 3)])
def test_every_image_is_in_one_process_and_batches_stay_whole(images, batch, processes):
    shares = [
        list(share_of(range(images), batch, SimpleNamespace(process_index=rank, num_processes=processes)))
        for rank in range(processes)
    ]
    assert sorted(index for share in shares for index in share) == list(range(images))
    batches = [share[at : at + batch] for share in shares for at in range(0, len(share), batch)]
    assert sorted(batches) == [list(range(at, min(at + batch, images))) for at in range(0, images, batch)]


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("python /bin/accelerate launch --num_processes 2 train.py --epochs 3", 2),
        ("python -m accelerate.commands.launch --cpu --num_processes=3 train.py --num_processes 5", 3),
        ("python /bin/accelerate-launch --num_processes 4 train.py", 4),
        ("accelerate launch --num_processes 4 --num_machines 2 train.py", None),
        ("bash -c run", None),
    ],
)
def test_the_number_of_processes_is_read_from_accelerates_command(command, number):
    assert _processes_asked_for(command.split()) == number
