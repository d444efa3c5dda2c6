"""Results folders read for the page: tables as far as they are there and whole, and as little text as possible.

Whatever cannot be used is said in a sentence that the page shows; nothing here raises for what a folder holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

DIGITS = 4  # significant, of every number on the page


@dataclass
class Folder:
    """One results folder.

    path : where it is; problems : sentences about what could not be read
    """

    path: Path
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    def columns(self, table: str) -> list[str]:
        """Names of the columns of `{table}.csv`; none where there is no such file or it cannot be read."""
        file = self.path / f"{table}.csv"
        if not file.is_file():
            return []
        try:
            return list(pd.read_csv(file, nrows=0).columns)
        except (OSError, ValueError):  # empty, not CSV or not text: said when the table itself is asked for
            return []

    def table(self, table: str, words: Sequence[str], numbers: Sequence[str] = ()) -> pd.DataFrame | None:
        """`{table}.csv`, if it has these columns of words and of numbers; else None, and a sentence unless absent."""
        file = self.path / f"{table}.csv"
        if not file.is_file():
            return None
        try:
            found = pd.read_csv(file)
        except (OSError, ValueError) as error:
            self.problems.append(f"{table}.csv cannot be read ({str(error).strip()}).")
            return None
        absent = [name for name in (*words, *numbers) if name not in found]
        if absent:
            self.problems.append(f"{table}.csv has no column {', '.join(absent)}.")
            return None
        if found.empty:
            self.problems.append(f"{table}.csv has no rows.")
            return None
        wrong = [name for name in numbers if not pd.api.types.is_numeric_dtype(found[name])]
        if wrong:
            self.problems.append(f"{table}.csv has words where numbers are expected (column {', '.join(wrong)}).")
            return None
        return found

    def data(self, file: str) -> dict:
        """A YAML or JSON file that holds a mapping; empty where it is absent or damaged, and the latter is said."""
        path = self.path / file
        if not path.is_file():
            return {}
        try:
            text = path.read_text(encoding="utf-8")
            found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError):
            self.problems.append(f"{file} cannot be read.")
            return {}
        if not isinstance(found, dict):
            self.problems.append(f"{file} holds no settings.")
            return {}
        return found


def results_folders(places: Sequence[Path]) -> list[Folder]:
    """Every place that holds tables itself, and every folder in it that does, in order of name, each once."""
    found: dict[Path, Folder] = {}
    for place in places:
        inside = sorted(path for path in Path(place).iterdir() if path.is_dir()) if Path(place).is_dir() else []
        for path in (Path(place), *inside):
            if next(path.glob("*.csv"), None) is not None or (path / "config.yaml").is_file():
                found.setdefault(path.resolve(), Folder(path))
    return list(found.values())


# --------------------------------------------------------------------------------------------------- tables as JSON


def packed(frame: pd.DataFrame, digits: int = DIGITS) -> dict:
    """Columns by name: numbers as a list (None where there is none), words as {levels, codes}; and the row count."""
    return {"rows": len(frame), "columns": {str(name): packed_column(frame[name], digits) for name in frame}}


def packed_column(column: pd.Series, digits: int = DIGITS) -> list | dict:
    """One column, see `packed`."""
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        codes, levels = pd.factorize(column.astype("string"))
        return {"levels": [str(level) for level in levels], "codes": [int(code) for code in codes]}
    return [rounded(value, digits) for value in column.to_numpy(dtype=float)]


def rounded(value: float, digits: int = DIGITS) -> float | int | None:
    """`value` to so many significant digits, None where it is no finite number, whole numbers as such."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def chosen(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Those of the columns that there are."""
    return frame[[name for name in columns if name in frame]]
