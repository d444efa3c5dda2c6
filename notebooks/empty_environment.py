"""Run the notebooks as a stranger does: in an environment with only Colab's usual packages, beside a zip of the project.

`python notebooks/empty_environment.py` makes a virtual environment of `colab_packages.txt` (some gigabytes are fetched), puts
a zip of the last commit and one notebook into an empty folder, and executes it there through its set-up cell alone.
`--keep FOLDER` keeps the environment there, and finds it again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
NOTEBOOKS = ("unetpp", "mask2former", "mech_interp_experiment")
KEPT = ("torch", "torchvision", "numpy")  # what the set-up cell must leave as Colab has it


def environment(folder: Path, base: str) -> Path:
    """Its Python; made of Colab's packages, and of an empty google.colab by which the set-up cell knows where it is."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([base, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / "colab_packages.txt"], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "google" / "colab").mkdir(parents=True, exist_ok=True)
    (Path(site) / "google" / "colab" / "__init__.py").touch()
    return python


def installed(python: Path) -> dict[str, str]:
    """{package: version} of an environment."""
    listed = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    return dict(line.split("==") for line in listed.splitlines() if "==" in line)


def run(python: Path, name: str, preset: str) -> None:
    """Execute one notebook in an empty folder that holds it and the project's zip; its error is this program's."""
    with tempfile.TemporaryDirectory() as place:
        zipped = ["git", "archive", "--format=zip", "--prefix=project-main/", "-o", f"{place}/project.zip", "HEAD"]
        subprocess.run(zipped, cwd=PROJECT, check=True)
        shutil.copy(PROJECT / f"{name}.ipynb", place)
        variables = os.environ | {"PRESET": preset, "TQDM_DISABLE": "1", "ISIC_CACHE": f"{place}/cache"}
        variables["PATH"] = f"{python.parent}{os.pathsep}{variables['PATH']}"
        command = [python.parent / "jupyter-execute", "--timeout=-1", f"{name}.ipynb"]
        subprocess.run(command, cwd=place, env=variables, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NOTEBOOKS)
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--keep", type=Path, help="folder of the environment; default: one that is removed again")
    parser.add_argument("--python", default=sys.executable, help="the Python to make it from; Colab's is 3.12")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        python = environment((options.keep or Path(made)).resolve(), options.python)
        before = installed(python)
        for name in NOTEBOOKS if options.only is None else (options.only,):
            run(python, name, options.preset)
            after = installed(python)
            news = [f"{package} {version}" for package, version in after.items() if before.get(package) != version]
            print(f"{name}: ran; installed or changed: {', '.join(news) or 'nothing'}", flush=True)
            if changed := [package for package in KEPT if before[package] != after[package]]:
                raise SystemExit(f"the set-up cell changed {', '.join(changed)}, which it should keep")
            before = after


if __name__ == "__main__":
    main()
