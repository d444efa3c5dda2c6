"""The explorer page: one HTML file of whatever results there are, for those who only read.

Nothing is computed here; `report/gather.py` reads the folders and `report/page.py` writes the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from report.gather import gather
from report.page import write_page
from utils import InputError


@dataclass
class ReportConfig:
    """
    Args:
        results: results folders, or folders of results folders
        out: the page; an earlier page there is replaced, another file is not
    """

    results: list[str] = field(default_factory=lambda: ["results"])
    out: str = "results/report.html"


def run(config: ReportConfig) -> Path:
    """Build the page and say where it is."""
    check(config)
    found = gather([Path(place) for place in config.results])
    if not found["runs"]:
        raise InputError(f"no results in {', '.join(config.results)}; run a study first, or name its folder in results")
    for line in (f"note: {run['folder']}: {problem}" for run in found["runs"] for problem in run["problems"]):
        print(line)
    out = write_page(found, Path(config.out))
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    print(f"Wrote {out} ({size}) from {len(found['runs'])} results folders; open it in a browser")
    return out


def check(config: ReportConfig) -> None:
    """Refuse folders that are not there, and a place where something else than a page would be overwritten."""
    absent = [place for place in config.results if not Path(place).is_dir()]
    if not config.results or absent:
        raise InputError(f"results: no folder {', '.join(absent) or 'given'}; give existing folders")
    out = Path(config.out)
    if out.suffix != ".html":
        raise InputError(f"out must be the name of an .html file, got {config.out}")
    if out.is_dir():
        raise InputError(f"out {config.out} is a folder; give a file in it")
    if out.exists() and 'id="stamp"' not in out.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{config.out} is there and is no page of ours; give another name with --out")
