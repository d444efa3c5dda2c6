"""The committed notebooks: executed in order, without errors, small, of the sources here, of one skeleton."""

import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[1]
# by its path: notebooks/ on sys.path would put the source explanations.py before the package of that name
SPEC = importlib.util.spec_from_file_location("notebooks_build", PROJECT / "notebooks" / "build.py")
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


@pytest.fixture(params=build.NOTEBOOKS)
def name(request) -> str:
    return request.param


@pytest.fixture
def notebook(name):
    return nbformat.read(PROJECT / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_cell_was_executed_once_and_in_order(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))


def test_no_cell_ended_in_an_error_or_left_a_warning_or_a_progress_bar(notebook):
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]


def test_a_notebook_is_below_its_limit_of_bytes(name):
    assert (PROJECT / f"{name}.ipynb").stat().st_size < build.LIMIT_BYTES


def test_the_committed_cells_are_those_of_the_source(name, notebook):
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in build.source(name).cells]


def test_a_notebook_shows_figures(notebook):
    shown = [o for cell in code(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(shown) >= 4


def test_a_committed_notebook_shows_synthetic_images_only(notebook):
    parameters = next(cell for cell in code(notebook) if cell.source.startswith("PRESET, DATA"))
    assert parameters.source.splitlines()[0] == 'PRESET, DATA = os.environ.get("PRESET", "demo"), None'
    assert "[ISIC_0" not in str(notebook) and "ISIC_00" not in str(notebook)


def test_the_skeleton_is_title_badge_setup_parameters(notebook):
    first, setup, about, parameters = notebook.cells[:4]
    assert first.source.startswith("# ") and "Question" in first.source and build.COLAB_BADGE in first.source
    assert setup.source == build.setup_cell()
    assert "Parameters" in about.source and parameters.source.startswith("PRESET")


def test_no_cell_is_longer_than_a_screen(notebook):
    lengths = [len(cell.source.splitlines()) for cell in code(notebook)]
    assert max(lengths) <= build.LONGEST_CELL


def test_a_notebook_tells_its_story_in_few_words_and_begins_no_part_without_any(notebook):
    told = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert sum(len(text.split()) for text in told) < build.MOST_WORDS
    assert len(told) >= 6 and sum(text.startswith("## ") for text in told) >= 4


def test_outputs_name_no_place_of_one_machine(notebook):
    texts = [
        str(output.get("text", "")) + str(output.get("data", "")) for cell in code(notebook) for output in cell.outputs
    ]
    assert not [text for text in texts if re.search(r"(?<![\w.+/=])/(?:work|home|root|Users|tmp|content)/", text)]


def test_the_emptied_environment_holds_a_part_of_what_is_required():
    """So that the set-up cell has something to install, and what it finds there is a version that is asked for."""

    def packages(file):
        lines = (PROJECT / file).read_text(encoding="utf-8").splitlines()
        found = [Requirement(line) for line in lines if line and not line.startswith("#")]
        return {canonicalize_name(each.name): each.specifier for each in found}

    required, there = packages("requirements.txt"), packages("notebooks/colab_packages.txt")
    assert {"segmentation-models-pytorch", "captum", "jsonargparse"} <= set(required) - set(there)
    for name in ("torch", "torchvision", "numpy", "pandas", "scipy", "scikit-learn", "scikit-image", "matplotlib"):
        pinned = str(there[name]).removeprefix("==")
        assert required[name].contains(pinned), f"the set-up cell would change Colab's {name} {pinned}"


def test_without_a_public_address_none_is_invented(monkeypatch):
    monkeypatch.setattr(build, "address", lambda: {"url": None, "branch": "main"})
    assert "github.com" not in build.badge("unetpp") and 'REPOSITORY = ""' in build.setup_cell()


def test_badge_and_setup_follow_the_one_address(monkeypatch):
    monkeypatch.setattr(build, "address", lambda: {"url": "https://github.com/someone/something", "branch": "main"})
    assert "/github/someone/something/blob/main/unetpp.ipynb" in build.badge("unetpp")
    assert 'REPOSITORY = "https://github.com/someone/something"' in build.setup_cell()


class TestSetupCell:
    """The set-up cell in folders as a reader may have them; run as a script, with Colab's module made up."""

    SCRIPT = "get_ipython = lambda: type('IPython', (), {'run_line_magic': lambda *a: None})()\n"

    def run(self, folder, *, after="print(os.getcwd())"):
        import subprocess

        program = self.SCRIPT + build.setup_cell() + "\n" + after
        return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)

    def project(self, folder):
        (folder / "similarity").mkdir(parents=True)
        (folder / "experiments.py").write_text("")
        return folder

    def test_inside_the_project_it_stays(self, tmp_path):
        done = self.run(self.project(tmp_path / "p"))
        assert done.stdout.strip() == str(tmp_path / "p"), done.stderr

    def test_it_finds_a_folder_beside_the_notebook(self, tmp_path):
        self.project(tmp_path / "uploaded")
        assert self.run(tmp_path).stdout.strip() == str(tmp_path / "uploaded")

    def test_it_unpacks_a_zip_beside_the_notebook_once(self, tmp_path):
        import shutil

        inside = tmp_path / "made"
        self.project(inside / "name-main")
        shutil.make_archive(str(tmp_path / "place" / "upload"), "zip", inside)
        for _ in range(2):
            done = self.run(tmp_path / "place")
            assert done.stdout.strip() == str(tmp_path / "place" / "project" / "name-main"), done.stderr

    def test_without_any_it_says_what_to_do(self, tmp_path):
        done = self.run(tmp_path)
        assert done.returncode != 0 and "upload its folder or zip" in done.stderr
