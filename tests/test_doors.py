"""Every door refuses bad input alike: one sentence, an exit code that is not 0, nothing written, nothing run.

The rows are in `bad_inputs`; here is what is typed at no command line: disks, permissions, links, a second process, and
the public functions.
"""

import contextlib
import errno
import importlib.util
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bad_inputs import LINES
from PIL import Image
from safetensors.torch import save_file

import dataset
import experiments
import inference
import locks
import settings
import studies.grid_study
import synthetic
import train as training
from images import Pair, Transform, read_pixels
from models import ModelSpec, build_model, save_model
from recipes import TrainConfig, check_recipe
from sentences import InputError, sentence_of, sentences_instead_of_tracebacks
from utils import HOME, open_run

CPU = torch.device("cpu")
NINE = ", ".join(["*{0}"] * 9)


def script(name: str):
    """The `main` of a script that lies in no package."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), HOME / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda arguments: module.main()  # it reads sys.argv


def doors() -> dict:
    found = {"train": training, "experiments": experiments, "inference": inference, "dataset": dataset}
    found = {name: module.main for name, module in (found | {"synthetic": synthetic}).items()}
    return found | {name: script(name) for name in ("docs/build", "notebooks/build")}


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch '{self.mark}'",))


def claims(width: int, height: int) -> bytes:
    """A PNG whose header says so many pixels, and that holds none of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("net") / "best"
    save_model(build_model(ModelSpec("unetpp", "smoke")), folder, {"transform": {"size": 32}})
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, net) -> Path:
    """The folder {tmp} of the table."""
    root = tmp_path_factory.mktemp("hostile")
    yamls = {
        "tag": f'model: !!python/object/apply:os.system ["touch {root}/RAN"]\n',
        "list": "- 1\n- 2\n",
        "empty": "",
        "open": "model: [unetpp\n",
        "twice": "epochs: 1\nepochs: 2\n",
        "aliases": "a: &a [x]\n" + "".join(f"{b}: &{b} [{NINE.format(a)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
        "deep": "a: " + "[" * 1200,
        "unknown": "epoch: 3\n",
        "type": "epochs: {a: 1}\n",
    }
    for name, text in yamls.items():
        (root / f"{name}.yaml").write_text(text)
    (root / "latin.yaml").write_bytes(b'model: "\xff"\n')
    for folder in ("folder.yaml", "folder.png", "mine", "linked", "elsewhere", "long", "zips"):
        (root / folder).mkdir()
    (root / "file").write_text("mine")
    (root / "mine" / "thesis.txt").write_text("years of work")
    (root / "elsewhere" / "model.safetensors").write_text("years of work")
    (root / "linked" / "config.yaml").write_text("{}")
    (root / "linked" / "best").symlink_to(root / "elsewhere")
    (root / "dangling").symlink_to(root / "gone")
    (root / "loop").symlink_to(root / "loop")
    _add_weights(root, net)
    _add_images(root)
    return root


def _add_weights(root: Path, net: Path) -> None:
    data = pickle.dumps({"a": Evil(root / "RAN")})
    (root / "evil.pth").write_bytes(data)
    (root / "evil.safetensors").write_bytes(data)
    torch.save({"a": Evil(root / "RAN")}, root / "evil-torch.pth")
    (root / "zero.pth").touch()
    said = (net / "model.json").read_text()
    changed = {"json": "{", "name": said.replace('"unetpp"', '"zzz"'), "extra": said.replace('"extra"', '"xtra"')}
    changed |= {"transform": said.replace('"size"', '"sze"'), "evil": said, "zero": said, "without": said}
    for name, text in changed.items():
        shutil.copytree(net, root / f"net-{name}")
        (root / f"net-{name}" / "model.json").write_text(text)
    (root / "net-evil" / "model.safetensors").write_bytes(data)
    (root / "net-zero" / "model.safetensors").write_bytes(b"")
    (root / "net-without" / "model.safetensors").unlink()


def _add_images(root: Path) -> None:
    (root / "huge.png").write_bytes(claims(50_000, 50_000))
    photo = Image.effect_noise((64, 64), 50).convert("RGB")
    photo.save(root / "cut.jpg")
    data = bytearray((root / "cut.jpg").read_bytes())
    (root / "cut.jpg").write_bytes(data[:400])
    place = data.index(b"\xff\xc0") + 5  # the frame header's height and width
    data[place : place + 4] = struct.pack(">HH", 50_000, 50_000)
    (root / "huge.jpg").write_bytes(data)
    (root / "zero.png").touch()
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(root / "deep.png")
    photo.save(root / "moving.png", save_all=True, append_images=[photo.rotate(90)])
    photo.save(root / "long" / f"{'x' * 230}.png")
    annotations = root / "pet-up" / "annotations"
    (annotations / "trimaps").mkdir(parents=True)
    (root / "pet-up" / "images").mkdir()
    for name in ("trainval.txt", "test.txt"):
        (annotations / name).write_text("../../x 1 1 1\n")
    for name in ("ISIC2018_Task1-2_Test_Input", "ISIC2018_Task1_Test_GroundTruth"):
        with zipfile.ZipFile(root / "zips" / f"{name}.zip", "w") as archive:
            archive.writestr("../../out.txt", "1")


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(("door", "line", "words"), LINES, ids=[f"{d} {a}"[:70].replace("\0", "") for d, a, _ in LINES])
def test_one_sentence_nothing_written_nothing_run(
    door, line, words, hostile, net, synthetic_root, tmp_path, capsys, monkeypatch
):
    for module, name in ((training._Run, "train_epoch"), (studies.grid_study, "run_cells")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("work had begun"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    places = {"tmp": hostile, "set": synthetic_root, "net": net, "smoke": HOME / "configs" / "smoke.yaml"}
    arguments = line.format(**places).split(" ")
    if door in ("train", "experiments", "inference") and "--out" not in arguments:
        arguments += ["--out", "out"]
    monkeypatch.setattr(sys, "argv", [door, *arguments])
    before = contents(hostile)
    with pytest.raises(SystemExit) as caught, sentences_instead_of_tracebacks():
        code = doors()[door](arguments)
        if code:
            sys.exit(code)
    said = capsys.readouterr().err
    if isinstance(caught.value.code, str):  # what sys.exit prints itself
        said, caught.value.code = caught.value.code, 1
    sentence = said[said.index("error: ") :]
    assert caught.value.code in (1, 2) and "Traceback" not in said
    assert all(word.format() in sentence for word in words), said
    assert contents(hostile) == before and list(tmp_path.iterdir()) == []  # RAN would be among them


def test_the_table_covers_every_door_and_study():
    assert {door for door, *_ in LINES} == set(doors()) and len(LINES) >= 40
    named = {line.split(" ")[0] for door, line, _ in LINES if door == "experiments"}
    assert named >= set(experiments.STUDIES)


def test_the_pickles_that_were_refused_would_have_run(hostile):
    assert not (hostile / "RAN").exists()
    pickle.loads((hostile / "evil.pth").read_bytes())
    assert (hostile / "RAN").exists()
    (hostile / "RAN").unlink()


# ---- images and ids ----


def test_a_header_of_fifty_thousand_squared_pixels_costs_no_memory(hostile):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("huge.png", "huge.jpg"):
        with pytest.raises(InputError, match="claims more than"):
            read_pixels(hostile / name, Transform(size=32))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 50e6  # decoded it is 7,500 MB


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "1", "RGBA", "LA"])
def test_images_of_other_colours_and_names_of_any_script_are_read(mode, tmp_path):
    name = tmp_path / "späce ünï 皮.tiff"
    grey = Image.new("L", (40, 30), 255)
    (grey if mode != "CMYK" else grey.convert("RGB")).convert(mode).save(name)
    pixels, size = read_pixels(name, Transform(size=8))
    assert size == (40, 30) and (pixels == 255).all()


@pytest.mark.parametrize("id_", ["", ".", "..", "../x", "a/b", "a\\b", "a\0b", "x" * 201, "é" * 101])
def test_an_id_that_is_no_name_of_a_file_is_refused(id_):
    with pytest.raises(InputError, match="id"):
        Pair(id_, Path("a.png"), Path("b.png"))
    Pair("é" * 100, Path("a.png"), Path("b.png"))


# ---- settings that come from Python ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"epochs": "3"}, "epochs must be a whole number, got '3'"),
        ({"freeze": "encoder"}, "freeze must be"),
        ({"limits": {"train": 1.5}}, "limits must be"),
        ({"limits": {1: 1}}, "limits must be"),
        ({"options": [1]}, "options must be a mapping"),
        ({"seed": 2**63}, "seed 9223372036854775808 is not between"),
    ],
)
def test_settings_of_another_type_are_refused_from_python_too(changes, words):
    with pytest.raises(InputError, match=words):
        check_recipe(TrainConfig(**changes))
    check_recipe(TrainConfig(out=Path("x"), learning_rate=1, freeze=("encoder",), epochs=np.int64(3)))


def test_an_ordinary_yaml_with_aliases_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n")
    assert settings.read_yaml(path) == yaml.safe_load(path.read_text())


# ---- disks ----


@contextlib.contextmanager
def no_file_longer_than(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def mounted(place: Path, *how: str):
    """A mount of this test's own; skipped where the system allows none."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *how, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting needs more rights than this test has: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_a_sentence_and_leaves_no_half_file(net, tmp_path, capsys):
    Image.effect_noise((256, 256), 90).convert("RGB").save(tmp_path / "a.png")
    out = tmp_path / "disk" / "out"
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4k", "tmpfs"):
        (tmp_path / "disk" / "filled").write_bytes(b"x" * 4096)
        with pytest.raises(SystemExit) as caught, sentences_instead_of_tracebacks():
            inference.main(["--checkpoint", str(net), "--images", str(tmp_path / "a.png"), "--out", str(out)])
        said = capsys.readouterr().err
        assert caught.value.code == 2 and "No space left on device; free some space" in said
        assert (tmp_path / "disk" / "filled").stat().st_size == 4096


def test_every_way_of_writing_names_a_disk_that_refuses(tmp_path):
    with no_file_longer_than(10):
        with pytest.raises(OSError, match="File too large") as text:
            (tmp_path / "t").write_text("x" * 99)
        with pytest.raises(Exception, match="os error") as tensors:
            save_file({"a": torch.zeros(99)}, tmp_path / "s")
    for caught in (text, tensors):
        assert "free some space" in sentence_of(caught.value)


def test_a_place_that_may_not_be_written_to_is_refused_before_anything(synthetic_root, tmp_path, capsys):
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:  # root may write wherever the permissions forbid it
            stack.enter_context(mounted(tmp_path / "closed", "-t", "tmpfs", "-o", "ro", "tmpfs"))
        else:
            (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(SystemExit), sentences_instead_of_tracebacks():
            training.main(
                ["--data", str(synthetic_root), "--preset", "smoke", "--out", str(tmp_path / "closed" / "run")]
            )
    assert "closed is no folder that may be written to" in capsys.readouterr().err


def test_a_results_folder_that_is_a_link_is_followed_in_so_many_words_and_spares_what_is_not_ours(tmp_path, capsys):
    for name in ("scratch", "thesis"):
        (tmp_path / name).mkdir()
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
    (tmp_path / "thesis" / "config.yaml").write_text("years: of work")
    open_run(tmp_path / "to-scratch", {"a": 1}, CPU)
    assert f"is a link: what is written goes to {tmp_path / 'scratch'}" in capsys.readouterr().out
    assert (tmp_path / "scratch" / "config.yaml").exists()
    with pytest.raises(InputError, match="nothing was changed"):
        open_run(tmp_path / "to-thesis", {"a": 1}, CPU)
    assert contents(tmp_path / "thesis") == {"config.yaml"}
    (tmp_path / "scratch" / "inner").mkdir()
    (tmp_path / "scratch" / "best").symlink_to(tmp_path / "scratch" / "inner")  # a link that stays inside is no matter
    open_run(tmp_path / "to-scratch", {"a": 1}, CPU)


# ---- two at once ----

HOLDER = "import sys, locks\nwith locks.alone_in(sys.argv[1]):\n    print(1, flush=True)\n    input()"


def test_a_second_process_is_refused_by_the_name_of_the_first_and_a_dead_ones_lock_is_taken_over(tmp_path):
    open_run(tmp_path, {}, CPU)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=HOME, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        for attempt in (lambda: open_run(tmp_path, {}, CPU), lambda: locks.alone_in(tmp_path).__enter__()):
            with pytest.raises(InputError, match=f"another process is at work in .*: process {other.pid} on .*--out"):
                attempt()
        assert {path: path.read_bytes() for path in before} == before
        other.kill()  # SIGKILL: it cleans nothing up
    with locks.alone_in(tmp_path):
        open_run(tmp_path, {}, CPU)
        assert (tmp_path / locks.LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_a_process_may_open_its_own_folder_again_without_losing_it(tmp_path):
    ask = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", ask, str(tmp_path / locks.LOCK)]
    with locks.alone_in(tmp_path):
        with locks.alone_in(tmp_path):
            open_run(tmp_path, {}, CPU)
        assert b"BlockingIOError" in subprocess.run(command, capture_output=True, check=False).stderr
    assert subprocess.run(command, check=False).returncode == 0


def test_a_study_holds_its_folder_while_it_works(tmp_path, monkeypatch):
    from studies import universality

    class Seen(Exception):
        pass

    def estimate(*_):
        assert (tmp_path / locks.LOCK).resolve() in locks._HELD
        raise Seen

    monkeypatch.setattr(universality, "prepare", lambda config: (config, {}, tmp_path))
    monkeypatch.setattr(universality, "estimate", estimate)
    with pytest.raises(Seen):
        universality.run(universality.UniversalityConfig())
    assert not locks._HELD


# ---- what is no input ----


def test_memory_that_is_not_there_is_a_sentence():
    with pytest.raises(RuntimeError) as tensor:
        torch.empty(2**55)
    with pytest.raises(MemoryError) as array:
        np.empty(2**55)
    for error in (tensor.value, array.value, torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        assert "not enough memory" in sentence_of(error) and "lower batch_size" in sentence_of(error)


@pytest.mark.parametrize(
    "bug",
    [KeyError("x"), RuntimeError("x"), FileNotFoundError(errno.ENOENT, "x", "y"), ValueError("x"), TypeError("x")],
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)), sentences_instead_of_tracebacks():
        raise bug


def test_a_forbidden_file_is_named_and_stopping_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as caught, sentences_instead_of_tracebacks():
        raise PermissionError(errno.EACCES, "Permission denied", "photos/a.jpg")
    assert caught.value.code == 2 and "error: photos/a.jpg: Permission denied; change" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught, sentences_instead_of_tracebacks("begin anew"):
        raise KeyboardInterrupt
    assert caught.value.code == 130 and "stopped; begin anew" in capsys.readouterr().err
