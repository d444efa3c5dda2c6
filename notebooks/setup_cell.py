# Set-up. In Colab: find (or fetch) the project and install what it needs. Anywhere else: nothing but finding it.
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = ""  # the project's public address; empty: not published yet
IN_COLAB = importlib.util.find_spec("google.colab") is not None if importlib.util.find_spec("google") else False


def is_project(folder):
    return (folder / "experiments.py").is_file() and (folder / "similarity").is_dir()


def find_project(start):
    places = [start, start.parent, *sorted(path for path in start.glob("*") if path.is_dir())]
    return next((place for place in places if is_project(place)), None)


project = find_project(Path.cwd())
if project is None:
    for archive in sorted(Path.cwd().glob("*.zip")):
        with zipfile.ZipFile(archive) as content:
            if any(name.endswith("experiments.py") for name in content.namelist()):
                content.extractall("project")  # zipfile keeps every member inside this folder
                project = find_project(Path.cwd()) or find_project(Path("project"))
if project is None and REPOSITORY:
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "project"], check=True)
    project = Path("project")
if project is None:
    raise SystemExit(
        "The project is not here: upload its folder or zip beside this notebook, then run this cell again."
    )
os.chdir(project.resolve())
sys.path.insert(0, os.getcwd())
if IN_COLAB:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"], check=True)
get_ipython().run_line_magic("matplotlib", "inline")
