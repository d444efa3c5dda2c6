"""Ground floor: settings from command lines, seeds, devices, run folders and the record of the environment.

Everything here is free of models, images and measures, so that every other room may import it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from tqdm.auto import tqdm

from locks import refuse_busy
from sentences import InputError as InputError
from sentences import sentences_instead_of_tracebacks as sentences_instead_of_tracebacks
from settings import check_seed, read_yaml

HOME = Path(__file__).resolve().parent
RECORDED_PACKAGES = (
    "torch",
    "torchvision",
    "segmentation-models-pytorch",
    "transformers",
    "timm",
    "accelerate",
    "albumentations",
    "numpy",
    "scipy",
    "scikit-learn",
    "scikit-image",
    "captum",
)
# Settings that say where and how fast a run goes, not what it computes.
UNCOMPARED_SETTINGS = ("out", "device", "workers")
# Settings of a grid that say which of its cells are run, how and where: what a cell is, its own folder remembers.
UNCOMPARED_SETTINGS += ("axes", "skip", "launcher", "jobs", "launcher_options", "retry", "dry_run")
# Settings that are newer than some results, with the value that means what was done before there were any: a run that
# lacks one may be continued with this value.
LATER_SETTINGS = {
    "clip_norm": 0.0,
    "warmup": 0.0,
    "average": 0.0,
    "encoder_learning_rate": 1.0,
    "compile": False,
    "cache_features": False,
    "processes": 1,
    "rotate": 0.0,
    "scale": 0.0,
    "colour": 0.0,
    "hair": 0.0,
    "layout": "auto",
    "classes": [],
    "mask_values": [],
    "fraction": 1.0,
    "fraction_seed": 0,
    "repeats": 1,
    "overfit": 0,
    "objective": "supervised",
    "simclr": {},
    "temperature": 0.5,
    "jitter": 0.5,
    "precision": "auto",
}
# What a killed process leaves beside its results: its lock, and a file that it was writing (see `atomic_path`).
LEFTOVER = re.compile(
    r"\.lock|\.(resume|config|environment|history|training_curves|model|nan_batch)-[a-z0-9_]{8}\.(pt|yaml|json|csv|png|safetensors)"
)


def read_settings(kind: type, prog: str, arguments: Sequence[str]):
    """Settings of a dataclass from a YAML (`--config FILE`), overridden by the other arguments wherever they stand."""
    parser = ArgumentParser(
        prog=prog, description=f"{prog}: every setting, also as YAML with --config", exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML of settings")
    parser.add_class_arguments(kind)
    arguments = _config_first(arguments)
    for place, argument in enumerate(arguments):
        if argument.startswith("--config=") or (argument == "--config" and place + 1 < len(arguments)):
            read_yaml(Path(argument.partition("=")[2] or arguments[place + 1]))
    with arguments_in_a_sentence(prog, [part.name for part in dataclasses.fields(kind)]):
        values = parser.instantiate(parser.parse_args(arguments)).as_dict()
    values.pop("config")
    return kind(**values)


@contextlib.contextmanager
def arguments_in_a_sentence(prog: str, known: Iterable[str] = ()) -> Iterator[None]:
    """Around a parser that does not exit: what it refuses becomes an InputError, with the closest `known` names."""
    try:
        yield
    except ArgumentError as error:
        said = " ".join(str(error).split())
        unknown = re.search(r"Option '(\w+)' is not accepted|unrecognized arguments: --(\w+)", said)
        near = difflib.get_close_matches(unknown[1] or unknown[2], known) if unknown else []
        nearest = f"; closest: {', '.join(map(repr, near))}" if near else ""
        raise InputError(f"{said}{nearest}; `{prog} --help` lists every setting") from error


def _config_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments with `--config FILE` in front: the parser lets whatever comes last win."""
    arguments, configs = list(arguments), []
    for form, words in (("--config", 2), ("--config=", 1)):
        for place in reversed(range(len(arguments))):
            if arguments[place] == form or (words == 1 and arguments[place].startswith(form)):
                configs = arguments[place : place + words] + configs
                del arguments[place : place + words]
    return configs + arguments


def closest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """The `n` names most like `name`, as a phrase for an error message."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=n, cutoff=0.3) or choices[:n]
    return ", ".join(repr(choice) for choice in near)


def pick(kind: str, name: str, table: Mapping[str, object]):
    """`table[name]`, or an InputError that lists the closest names of this kind."""
    if name not in table:
        raise InputError(f"unknown {kind} {name!r}; closest: {closest(name, table)}")
    return table[name]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    check_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resolve_device(name: str = "auto") -> torch.device:
    """'auto' (CUDA when there is one), 'cpu' or 'cuda'; asking for absent CUDA is an error."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; use auto, cpu or cuda (which GPU: set CUDA_VISIBLE_DEVICES)")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {name!r} was asked for, but PyTorch finds no CUDA device here; use --device cpu (or auto)"
        )
    return device


def progress(iterable=None, **options):
    """tqdm, silent when the output is neither a terminal nor a notebook, TQDM_DISABLE is set, or others count too."""
    quiet = bool(os.environ.get("TQDM_DISABLE")) or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
    quiet = quiet or os.environ.get("RANK", "0") != "0"  # of several processes the first one draws the bar
    return tqdm(iterable, disable=quiet, leave=False, dynamic_ncols=True, **options)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that takes its name only once the block has succeeded."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes files private; results are for everyone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Have the disk keep the names in a folder too, where the system lets a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete the half-written files that a killed process left in a folder of ours."""
    for path in Path(folder).glob(".*"):
        if LEFTOVER.fullmatch(path.name) and path.name != ".lock":
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_table(frame, path: Path) -> None:
    """Write a DataFrame as CSV atomically, without its index, floats to six significant digits."""
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g")


def digest(*parts: object) -> str:
    """First 16 hex digits of the SHA-256 of the parts; dicts and lists by their sorted JSON."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
        state.update(data + b"\0")
    return state.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def git_commit() -> str:
    """The commit of this checkout, with '+changes' when tracked files differ; 'not a git checkout' outside one."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=HOME, capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:
        return "git is not installed"
    if head.returncode != 0:
        return "not a git checkout"
    computing = (":!results", ":!*.ipynb", ":!*.md")  # what a result does not depend on is left out
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *computing).stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")


def environment(device: torch.device) -> dict:
    """What a result was computed with: commit, versions, machine, device, time (UTC)."""
    return {
        "commit": git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "device": device_name(device),
        "packages": {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
    }


def device_name(device: torch.device) -> str:
    """'cpu', or what the GPU is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def refuse_place(folder: Path) -> None:
    """Refuse an output folder that no disk can have, that is a file or may not be written to; nothing is written."""
    folder = Path(folder)
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_symlink():
            raise InputError(
                f"output folder {folder} is a link to {os.readlink(folder)}, which is not there; make that folder, or "
                "choose another with --out"
            ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"output folder {folder} cannot be used ({reason}); choose another with --out") from error
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output folder {folder} is a file; choose another with --out")
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output folder {folder} cannot be written: {parent} is no folder that may be written to")


def refuse_other_run(folder: Path, config: Mapping, may_differ: Sequence[str] = ()) -> None:
    """Refuse a folder that holds something else, a run with other settings, or that a process is at work in.

    Nothing is written. Settings in `UNCOMPARED_SETTINGS` and `may_differ` may differ between the runs, and
    `LATER_SETTINGS` may be absent from the old one.
    """
    folder = Path(folder)
    refuse_place(folder)
    stored = folder / "config.yaml"
    if stored.exists():
        _refuse_links(folder)
        _refuse_other_config(folder, _stored_settings(stored), _plain(config), may_differ)
    elif folder.exists() and any(not LEFTOVER.fullmatch(path.name) for path in folder.iterdir()):
        raise InputError(f"output folder {folder} is not empty and is no run of ours; choose another with --out")
    refuse_busy(folder)


def _refuse_links(folder: Path) -> None:
    """Refuse folders in a run that are links to places outside it, where files of others could be overwritten."""
    home = folder.resolve()
    for place, inner, _ in os.walk(folder):
        for path in (Path(place, name) for name in inner):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise InputError(
                    f"{path} is a link to {path.resolve()}, outside the run: what lies there could be overwritten; put "
                    "the folder itself here, or choose another with --out"
                )


def open_run(folder: Path, config: Mapping, device: torch.device, may_differ: Sequence[str] = ()) -> Path:
    """Create a run folder, or continue one made with the same settings; another config is refused.

    Writes `config.yaml` and `environment.json`.
    """
    folder = Path(folder)
    refuse_other_run(folder, config, may_differ)
    if folder.is_symlink():
        print(f"note: {folder} is a link: what is written goes to {folder.resolve()}", flush=True)
    try:
        write_text(folder / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False))
        write_text(folder / "environment.json", json.dumps(environment(device), indent=1) + "\n")
    except OSError as error:
        raise InputError(f"output folder {folder} cannot be written ({error}); choose another with --out") from error
    return folder


def _plain(config: Mapping) -> dict:
    """Settings as YAML knows them: tuples as lists, paths as text."""
    return json.loads(json.dumps(config, default=str))


def _stored_settings(path: Path) -> dict:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no readable YAML ({error}); choose another folder with --out") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no settings; choose another folder with --out")
    return settings


def _refuse_other_config(folder: Path, old: Mapping, new: Mapping, may_differ: Sequence[str]) -> None:
    left_out = {*UNCOMPARED_SETTINGS, *may_differ}
    old, new = (_flat({key: value for key, value in config.items() if key not in left_out}) for config in (old, new))
    for key in set(new) - set(old):
        name = key.rpartition(".")[2]
        if name in LATER_SETTINGS:
            old[key] = LATER_SETTINGS[name]
    different = [key for key in sorted(set(old) | set(new)) if old.get(key, "absent") != new.get(key, "absent")]
    if different:
        named = [f"{key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} now" for key in different[:3]]
        more = f"; … and {len(different) - 3} more" if len(different) > 3 else ""
        raise InputError(
            f"output folder {folder} holds a run with other settings ({'; '.join(named)}{more}); "
            "nothing was changed: choose another folder with --out, or delete that one"
        )


def _flat(value, name: str = "") -> dict[str, object]:
    """Nested settings as {'models[0].weights': 'none', …}; empty lists and mappings are values."""
    if isinstance(value, Mapping) and value:
        parts = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        parts = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for part, item in parts for key, leaf in _flat(item, part).items()}


def format_seconds(seconds: float) -> str:
    """'45 s', '3 min', '2.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_memory(device: torch.device) -> str:
    """The most memory this process has held so far, in words: of the GPU where it computes on one, else its own."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory at most"
    used = psutil.Process().memory_info()
    if hasattr(used, "peak_wset"):  # Windows
        return f"{used.peak_wset / 1e9:.1f} GB of memory at most"
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of memory at most"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A GitHub table of already formatted cells."""
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
