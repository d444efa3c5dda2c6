"""What the next person relies on: the pages that say how to go on, their examples, and the files beside the README."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from similarity import measures

PROJECT = Path(__file__).resolve().parents[1]
DOCS = PROJECT / "docs"


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


# ------------------------------------------------------------------------------------------------------------ the traps


def traps() -> dict[str, list[tuple[str, str]]]:
    """{trap: [(file, test) …]} of the page's table."""
    lines = (DOCS / "traps.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
    return {row[0].strip("| "): re.findall(r"`(tests/\w+\.py)::(test_\w+)`", row[-1]) for row in rows}


def test_every_trap_has_tests_and_every_one_of_them_exists():
    found = traps()
    assert len(found) >= 15 and all(found.values())
    named = {pair for tests in found.values() for pair in tests}
    there = {file: functions_of(PROJECT / file) for file, _ in named}
    assert not [f"{file}::{test}" for file, test in named if test not in there[file]]


def test_the_default_and_the_headline_are_debiased():
    for name in ("linear_cka", "rbf_cka"):
        assert inspect.signature(getattr(measures, name)).parameters["debiased"].default is True
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith(("| encoder |", "| decoder |"))]
    assert [row.split(" | ")[1] for row in rows[::5]] == ["linear_cka", "linear_cka"]
    assert measures.with_defaults("linear_cka", {})["debiased"] is True


def test_every_committed_similarity_stands_beside_its_null_floor_and_ceiling():
    tables = sorted(PROJECT.glob("results/universality*/summary.csv"))
    assert tables
    for path in tables:
        table = pd.read_csv(path)
        assert table[["similarity", "similarity_low", "similarity_high", "floor", "ceiling"]].notna().all(axis=None), (
            path
        )
        tested = table[~table["estimator"].str.contains("deconfounded")]  # their chance is not tested, and they say so
        assert tested["null_high"].notna().all(), path


# ------------------------------------------------------------------------------------------------ beside the README


def test_the_citation_has_what_its_format_asks_for():
    """The Citation File Format, 1.2.0: required keys, known kinds, authors that are entities."""
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] in ("software", "dataset")
    assert all(set(author) == {"name"} and author["name"] for author in citation["authors"])
    text = [citation[key] for key in ("message", "title", "abstract", "license")] + citation["keywords"]
    assert all(isinstance(value, str) and value for value in text)


def test_the_licence_is_the_one_that_the_citation_names():
    licence = (PROJECT / "LICENSE").read_text(encoding="utf-8")
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert licence.startswith(f"{citation['license']} License\n") and "WITHOUT WARRANTY OF ANY KIND" in licence


def test_the_changelog_is_newest_first_and_of_known_kinds():
    lines = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    heads = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert heads[0] == "Unreleased" and heads[1:] == sorted(heads[1:], reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", head) for head in heads[1:])
    kinds = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# ------------------------------------------------------------------------------------------------ pages with examples

LEFT_OUT = ("tests", "benchmarks", "notebooks", "docs", "results", "data", "runs")  # folders no example needs
PAGES = sorted(DOCS.glob("adding_a_*.md"))
# one process for all pages: most of the time goes into importing torch
FOLLOW = """
import pathlib, runpy, traceback
for script in sorted(pathlib.Path().glob("follow_*.py")):
    try:
        runpy.run_path(str(script))
        print(f"followed {script.stem}", flush=True)
    except Exception:
        print(traceback.format_exc(), flush=True)
"""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(kind, text) of each block of code of a page."""
    return re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def carry_out(page: Path, project: Path) -> str:
    """Make the page's changes in a copy of the project; returns what it then runs.

    A block whose first line names a file is a new one, stands at its end, or is a diff: lines to put behind another.
    """
    script = []
    for kind, text in blocks(page):
        named = re.match(r"# (\S+\.(?:py|yaml))(?:, (at the end|a new file))?\n", text)
        if named is None:
            script.append(text)
            continue
        file, body = project / named[1], text[named.end() :]
        assert file.exists() == (named[2] != "a new file"), f"{page.name}: {named[1]}"
        if kind == "diff":
            (line, *added) = body.splitlines()
            whole = file.read_text(encoding="utf-8")
            assert whole.count(f"\n{line[1:]}\n") == 1, f"{page.name}: no line {line[1:]!r} in {named[1]}, or several"
            extra = "".join(f"{one.removeprefix('+')}\n" for one in added)
            body, whole = "", whole.replace(f"\n{line[1:]}\n", f"\n{line[1:]}\n{extra}")
        else:
            whole = file.read_text(encoding="utf-8") if file.exists() else ""
        file.write_text(whole + ("\n\n" if whole and body else "") + body, encoding="utf-8")
    return "\n".join(script)


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory) -> str:
    """What a copy of the project prints in which every page is followed: all examples, one after another."""
    project = tmp_path_factory.mktemp("copy")
    listed = [*PROJECT.glob("*.py"), *(path for path in PROJECT.glob("[!.]*/*") if path.parent.name not in LEFT_OUT)]
    for path in listed:
        if path.is_file():
            target = project / path.relative_to(PROJECT)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    for page in PAGES:
        (project / f"follow_{page.stem}.py").write_text(carry_out(page, project), encoding="utf-8")
    (project / "follow.py").write_text(FOLLOW, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "follow.py"], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_there_is_a_page_for_each_thing_that_is_added():
    assert [page.stem for page in PAGES] == [
        f"adding_a_{what}" for what in ("dataset", "measure", "model", "site", "study")
    ]
    contents = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES if f"docs/{page.name}" not in contents]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_holds_when_it_is_followed(page, carried_out):
    assert f"followed follow_{page.stem}\n" in carried_out, carried_out[-3000:]
