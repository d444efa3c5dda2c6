"""What the next person relies on: the pages that say how to go on, their examples, and the files beside the README."""

import ast
import inspect
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


# ------------------------------------------------------------------------------------------------------------- the traps


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
        assert table[["similarity", "similarity_low", "similarity_high", "floor", "ceiling"]].notna().all(axis=None), path
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


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), PROJECT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_changelog_is_newest_first_and_of_known_kinds():
    lines = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    heads = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert heads[0] == "Unreleased" and heads[1:] == sorted(heads[1:], reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", head) for head in heads[1:])
    kinds = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
