"""The Python environment of the packages that `benchmarks.planes` compares with: made here, or given and only read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from utils import InputError

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements-peers.txt"
DEFAULT_FOLDER = HERE / ".peers"
WITHOUT_DEPENDENCIES = ("thingsvision",)  # their pins would take the other packages away
_LIST = (
    "import importlib.metadata as m, json, platform;"
    "print(json.dumps([platform.python_version(), {d.metadata['Name']: d.version for d in m.distributions()}]))"
)


@dataclass(frozen=True)
class PeerEnvironment:
    """executable : its Python; version ; packages {distribution: version} ; missing {distribution: reason}"""

    executable: Path
    version: str
    packages: dict[str, str]
    missing: dict[str, str] = field(default_factory=dict)

    def why_missing(self, package: str) -> str:
        """'' if the package is installed, else the reason."""
        return self.missing.get(normal(package), "")


def normal(name: str) -> str:
    """Distribution names differ by case and by - _ . only in writing."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> dict[str, str]:
    """{distribution: requirement}, in the order of the file."""
    lines = [line.strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    return {normal(re.match(r"[\w.-]+", line)[0]): line for line in lines if line and not line.startswith("#")}


def existing(executable: Path) -> PeerEnvironment:
    """An environment as it is; nothing is installed into it."""
    if not Path(executable).is_file():
        raise InputError(
            f"--peers {executable}: no such file; give the Python of an environment, such as peers/bin/python"
        )
    return _described(Path(executable), {}, "not installed in the environment given by --peers")


def make(folder: Path = DEFAULT_FOLDER) -> PeerEnvironment:
    """A virtual environment with every requirement that can be installed, one at a time."""
    executable = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not executable.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    present = _described(executable, {}, "").packages
    reasons = {}
    for name, requirement in requirements().items():
        if name not in {normal(each) for each in present}:
            print(f"installing {requirement}", flush=True)
            reasons[name] = _install(executable, name, requirement)
    return _described(executable, reasons, "not installed")


def _install(executable: Path, name: str, requirement: str) -> str:
    """'' or why pip could not."""
    alone = ["--no-deps"] if name in WITHOUT_DEPENDENCIES else []
    done = subprocess.run(
        [str(executable), "-m", "pip", "install", "--quiet", *alone, requirement], capture_output=True, text=True
    )
    if done.returncode == 0:
        return ""
    told = [line.strip() for line in done.stderr.splitlines() if re.search(r"fatal:|ERROR:", line)]
    return "pip: " + without_paths(told[0] if told else f"exit code {done.returncode}")


def without_paths(text: str) -> str:
    """The text without this machine's folders: of absolute paths only the last part is kept."""
    return re.sub(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+", "…/", text)


def _described(executable: Path, reasons: dict[str, str], otherwise: str) -> PeerEnvironment:
    listed = subprocess.run([str(executable), "-c", _LIST], capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        raise InputError(f"{executable} does not run as Python: {listed.stderr.strip()[-300:]}")
    version, packages = json.loads(listed.stdout)
    present = {normal(name) for name in packages}
    missing = {name: reasons.get(name) or otherwise for name in requirements() if name not in present}
    return PeerEnvironment(executable, version, dict(sorted(packages.items())), missing)
