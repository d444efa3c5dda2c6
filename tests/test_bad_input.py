"""Bad input, door by door: one clear sentence on stderr, exit code 2, nothing written, and no traceback.

The doors are run as scripts inside this process (`runpy`), and some once more as real processes.
"""

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import experiments
import train as training
import utils
from models import ModelSpec, build_model, save_model
from utils import HOME

IMAGES, MASKS = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """`unetpp` and `mask2former`, untrained; `swapped`, one's description with the other's weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("unetpp", "mask2former"):
        save_model(build_model(ModelSpec(name, "smoke")), folder / name, {"transform": {"size": 32}})
    shutil.copytree(folder / "unetpp", folder / "swapped")
    shutil.copy(folder / "mask2former" / "model.safetensors", folder / "swapped" / "model.safetensors")
    save_file({"layer.weight": torch.zeros(2)}, folder / "other.safetensors")
    return folder


def run_door(script: str, arguments: list[str], capsys, monkeypatch) -> tuple[int, str]:
    """(exit code, stderr) of `python script arguments`, run in this process."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(HOME / script), run_name="__main__")
    return caught.value.code, capsys.readouterr().err


def first(root: Path, folder: str) -> Path:
    return sorted((root / folder).iterdir())[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:400])


def other_size(path: Path) -> None:
    Image.open(path).resize((40, 64), Image.Resampling.NEAREST).save(path)


def not_binary(path: Path) -> None:
    image = Image.open(path)
    image.paste(120, (0, 0, 9, 9))
    image.paste(255, (20, 20, 29, 29))
    image.save(path)


def empty_all(root: Path) -> None:
    for file in root.rglob("*.*"):
        if file.suffix in (".jpg", ".png"):
            file.unlink()


# what is done to a copy of a sound image set -> what the sentence must say
BROKEN_SETS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no such folder": (shutil.rmtree, ("does not exist", "download")),
    "no known folders": (
        lambda root: [shutil.rmtree(root), root.mkdir()],
        ("no ISIC 2018 folder in", "looked for", IMAGES),
    ),
    "zero images": (empty_all, ("no pairs in",)),
    "image without a mask": (
        lambda root: first(root, MASKS).unlink(),
        ("image without a mask", "ISIC_9000000.jpg"),
    ),
    "mask without an image": (
        lambda root: first(root, IMAGES).unlink(),
        ("mask without an image", "ISIC_9000000_segmentation.png"),
    ),
    "truncated JPEG": (lambda root: truncate(first(root, IMAGES)), ("ISIC_9000000.jpg cannot be decoded", "fetch")),
    "text for an image": (
        lambda root: first(root, IMAGES).write_text("hello"),
        ("ISIC_9000000.jpg cannot be decoded",),
    ),
    "mask of another size": (
        lambda root: other_size(first(root, MASKS)),
        ("ISIC_9000000_segmentation.png", "40×64", "64×64"),
    ),
    "mask that is not binary": (
        lambda root: not_binary(first(root, MASKS)),
        ("ISIC_9000000_segmentation.png is not binary", "different values"),
    ),
}


@pytest.mark.parametrize("script", ["train.py", "experiments.py", "inference.py"])
@pytest.mark.parametrize("kind", BROKEN_SETS)
def test_a_broken_image_set_is_named_by_every_door(
    kind, script, synthetic_root, checkpoints, tmp_path, capsys, monkeypatch
):
    spoil, words = BROKEN_SETS[kind]
    root, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(synthetic_root, root)
    spoil(root)
    arguments = ["--data", str(root), "--out", str(out)]
    if script == "inference.py":
        arguments += ["--checkpoint", str(checkpoints / "unetpp"), "--split", "train"]
    elif script == "train.py":
        arguments += ["--preset", "smoke", "--image_size", "32"]
    else:
        arguments = ["--config", str(HOME / "configs" / "smoke.yaml"), *arguments]
    monkeypatch.setattr(training._Run, "train_epoch", lambda *_: pytest.fail("training had begun"))
    code, said = run_door(script, arguments, capsys, monkeypatch)
    assert code == 2 and said.startswith("error: ") and "Traceback" not in said
    assert all(word in said for word in words), said
    assert not out.exists()


# arguments of a door -> what the sentence must say; {data}, {checkpoints} and {tmp} are filled in
BAD_ARGUMENTS = [
    ("train.py", "--model unett", ["unknown model 'unett'", "'unet'"]),
    ("train.py", "--preset resnet19", ["'resnet18'"]),
    ("train.py", "--model mask2former --preset smoky", ["'smoke'"]),
    ("train.py", "--loss scaled_dise", ["unknown loss 'scaled_dise'", "'scaled_dice'"]),
    ("train.py", "--loss set", ["loss 'set' needs a set of queries", "dice_bce"]),
    ("train.py", "--freeze [decoder]", ["can freeze 'encoder' or 'encoder_statistics', not 'decoder'"]),
    ("train.py", "--answer query:x", ["unknown answer 'query:x'", "query:N"]),
    ("train.py", "--normalization imagnet", ["unknown normalization", "'imagenet'"]),
    ("train.py", "--optimizer sgd", ["unknown optimizer 'sgd'"]),
    ("train.py", "--schedule cosin", ["unknown schedule 'cosin'"]),
    ("train.py", "--epochs 0", ["epochs must be above 0, got 0"]),
    ("train.py", "--batch_size 0", ["batch_size must be above 0"]),
    ("train.py", "--device cuda", ["no CUDA device here", "--device cpu"]),
    ("train.py", "--device gpu", ["unknown device 'gpu'"]),
    ("train.py", "--mixed_precision half", ["unknown mixed precision 'half'", "bf16"]),
    ("train.py", "--mixed_precision fp16 --device cpu", ["fp16 needs a GPU", "bf16"]),
    ("train.py", "--image_size 4", ["image size 4 is not between"]),
    ("train.py", "--image_size 50", ["multiples of 32 pixels", "--image_size 32"]),
    ("train.py", "--interpolation cubic", ["unknown interpolation 'cubic'", "'bicubic'"]),
    ("train.py", '--limits {{"tset":3}}', ["unknown split 'tset'"]),
    ("train.py", '--options {{"encoder_name":"resnet35"}}', ["unknown encoder 'resnet35'", "'resnet34'"]),
    ("train.py", "--weights {tmp}/absent.pth", ["absent.pth does not exist"]),
    ("train.py", "--weights {checkpoints}/other.safetensors", ["other.safetensors fits neither the encoder nor"]),
    ("train.py", "--weights {checkpoints}/mask2former/model.safetensors", ["fits neither"]),
    ("train.py", "--weights imagenet", ["smp-hub/resnet18.imagenet", "hf download", "--weights none"]),
    (
        "train.py",
        "--model mask2former --preset isic2018 --weights imagenet",
        [
            "facebook/mask2former-swin-base-IN21k-ade-semantic",
            "models--facebook--mask2former-swin-base-IN21k-ade-semantic",
            "--weights none",
        ],
    ),
    ("train.py", "--epochs many", ["epochs", "many"]),
    ("train.py", "--colour red", ["colour"]),
    ("train.py", "--config {tmp}/absent.yaml", ["absent.yaml"]),
    ("experiments.py", "universalty", ["unknown study 'universalty'", "'universality'"]),
    (
        "experiments.py",
        '--policies {{"gap":["linear_cka","linear_kca"]}}',
        ["unknown measure 'linear_kca'", "linear_cka"],
    ),
    ("experiments.py", "--device cuda", ["no CUDA device here", "--device cpu"]),
    ("experiments.py", '--models [{{"model":"unetpp"}},{{"model":"mask3former"}}]', ["unknown model 'mask3former'"]),
    ("experiments.py", '--models [{{"model":"unetpp","loss":"dise"}},{{"model":"mask2former"}}]', ["unknown loss"]),
    ("experiments.py", "--colour red", ["colour"]),
    ("inference.py", "--checkpoint {tmp}", ["has no model.json", "train.py"]),
    ("inference.py", "--checkpoint {checkpoints}/swapped", ["is of another architecture", "missing"]),
    ("inference.py", "--checkpoint {checkpoints}/unetpp --device cuda", ["no CUDA device here"]),
    ("inference.py", "--checkpoint {checkpoints}/unetpp --split tset", ["has no split 'tset'", "test"]),
    ("inference.py", "--checkpoint {checkpoints}/unetpp --images {tmp}", ["give either --data"]),
    ("inference.py", "--checkpoint {checkpoints}/unetpp --batch_size 0", ["batch size 0"]),
]


@pytest.mark.parametrize(("script", "line", "words"), BAD_ARGUMENTS, ids=[f"{s[:5]} {a}" for s, a, _ in BAD_ARGUMENTS])
def test_bad_arguments_get_a_sentence(script, line, words, synthetic_root, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training, "visualization", None)  # nothing may get as far as a figure
    out = tmp_path / "out"
    arguments = line.format(tmp=tmp_path, checkpoints=checkpoints).split()
    if arguments[0] != "universalty":
        arguments += ["--data", str(synthetic_root), "--out", str(out)]
    if script == "train.py" and "--preset" not in arguments:
        arguments += ["--preset", "smoke"]
    code, said = run_door(script, arguments, capsys, monkeypatch)
    assert code == 2 and "Traceback" not in said
    sentence = said[said.index("error: ") :]
    assert all(word in sentence for word in words), said
    assert not out.exists() or not list(out.rglob("*.safetensors"))


def test_an_output_folder_of_another_configuration_is_left_alone(synthetic_root, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    common = ["--data", str(synthetic_root), "--image_size", "32", "--preset", "smoke", "--epochs", "1"]
    training.main([*common, "--device", "cpu", "--out", str(out)])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, said = run_door("train.py", [*common, "--seed", "3", "--out", str(out)], capsys, monkeypatch)
    assert code == 2 and "seed: 0 there, 3 now" in said and "nothing was changed" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, said = run_door("train.py", [*common, "--out", str(tmp_path / "mine")], capsys, monkeypatch)
    assert code == 2 and "is not empty and is no run of ours" in said
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train.py --model unett", "error: unknown model 'unett'; closest: 'unet'"),
        ("experiments.py --data absent", "error: data folder absent does not exist"),
    ],
)
def test_real_processes_end_with_code_two_and_one_line(line, words, tmp_path):
    script, *arguments = line.split()
    done = subprocess.run(
        [sys.executable, str(HOME / script), *arguments],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(words)
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--policies", '{"gap": ["linear_cka"], "grid:four": ["linear_cka"]}'], "unknown policy 'grid:four'"),
        (["--policies", '{"gap": ["linear_cka"], "tokens": ["linear_cka"]}'], "cannot be compared between models"),
        (["--policies", '{"gap": ["linear_cka"], "grid:32": ["linear_cka"]}'], "finer than the models' maps"),
        (["--permutations", "0"], "permutations must be at least 1"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--seeds", "[-1,0]"], "seeds must be different numbers from 0 up"),
        (["--limits", '{"test": 3}'], "3 test images: at least 20"),
        (["--epochs", "abc"], "epochs"),
    ],
)
def test_a_study_is_refused_before_anything_is_trained(tmp_path, synthetic_root, capsys, arguments, sentence):
    smoke = Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"
    with pytest.raises(SystemExit) as caught, utils.sentences_instead_of_tracebacks():
        experiments.main(
            ["--config", str(smoke), "--data", str(synthetic_root), "--out", str(tmp_path / "out"), *arguments]
        )
    printed = capsys.readouterr()
    assert caught.value.code == 2 and sentence in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_an_output_place_that_is_a_file_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(utils.InputError, match="cannot be written"):
        utils.open_run(tmp_path / "file" / "run", {"a": 1}, torch.device("cpu"))
    assert (tmp_path / "file").read_text() == "mine"


def test_stopping_by_hand_is_one_line_and_code_130(capsys):
    with pytest.raises(SystemExit) as caught, utils.sentences_instead_of_tracebacks():
        raise KeyboardInterrupt
    assert caught.value.code == 130 and "the same command goes on" in capsys.readouterr().err
