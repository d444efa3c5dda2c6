"""The pages that are made from code and results are those that are committed."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


@pytest.mark.parametrize("page", build.PAGES)
def test_the_page_is_what_build_makes(page):
    assert (DOCS / page).read_text(encoding="utf-8") == build.PAGES[page](), "run python docs/build.py"
