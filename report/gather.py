"""What the page shows, out of results folders: one plain structure of numbers and words, ready for JSON.

A folder is known by the columns of its tables, not by its name. How it is drawn is said in page.js and its neighbours.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from model_spec import TITLES
from report import explained, steps
from report.tables import Folder, chosen, packed, results_folders
from visualization import short_labels

RULER = ("similarity", "floor", "ceiling", "u")
INTERVALS = tuple(f"{name}_{end}" for name in RULER for end in ("low", "high"))
TESTS = ("null_mean", "null_high", "p_value", "q_value", "p_best", "p_exact")
PAIR_COLUMNS = ("estimator", "policy", "part_a", "part_b", "n_images", "site_a", "site_b", *RULER, *INTERVALS, *TESTS)
PAIR_COLUMNS += ("verdict",)
DEPTH_COLUMNS = ("estimator", "policy", "part_a", "n_images", "site_a", "site_b", "relative_depth", *RULER, *INTERVALS)
SUMMARY_COLUMNS = ("part", "estimator", "policy", "n_images", "site_pairs", *RULER, *INTERVALS, "null_high", "p_value")
SUMMARY_COLUMNS += ("verdict", "interval_over")
MATRIX_COLUMNS = ("label_a", "label_b", "part", *RULER, *INTERVALS, *TESTS, "verdict", "n_images", "interval_over")
MATRIX_COLUMNS += ("network_pairs", "site_pairs", "note")
STITCH_COLUMNS = ("giver", "site_a", "receiver", "site_b", "kind", "images", "dice", "dice_own", "kept", "low", "high")
STITCH_COLUMNS += ("without", "without_low", "without_high", "twin", "untrained")
LEGACY_COLUMNS = ("pair", "measure", "published", "published_again", "run1", "run2", "run1_cut_again", "word")
LEGACY_COLUMNS += ("corrected", "corrected_low", "corrected_high", "null_high", "p_value", "floor", "ceiling", "u")
LEGACY_COLUMNS += ("verdict", "note")
LONGEST_SETTING = 400  # characters
DISTANCES = ("procrustes_distance", "angular_distance", "information_imbalance")  # smaller is more similar


def gather(places: Sequence[Path]) -> dict:
    """All that the results in these places hold for the page; sections without results are empty lists."""
    folders = results_folders(places)
    found: dict[str, list] = {"planes": [], "stitching": [], "legacy": [], "explanations": [], "steps": []}
    found |= {"matrices": []}
    for folder in folders:
        for section, entry in entries(folder):
            if entry is not None:
                found[section].append(origin(folder) | entry)
    return found | {"runs": [run_facts(folder, found) for folder in folders], "titles": TITLES}


def entries(folder: Folder):
    """(section, what the folder has for it) by the columns of its tables."""
    pairs = folder.columns("pairs")
    if {"estimator", "policy", "site_a"} <= set(pairs):
        yield "planes", plane_entry(folder)
    if {"method", "model_a", "model_b"} <= set(pairs):
        yield "explanations", explained.entry(folder)
    if {"network_a", "site_a"} <= set(folder.columns("planes")):
        yield "steps", steps.entry(folder)
    if "kept" in folder.columns("stitching"):
        yield "stitching", _packed(folder, "stitching", ("receiver", "site_b", "kind"), ("kept",), STITCH_COLUMNS)
    if "published" in folder.columns("table"):
        yield "legacy", _packed(folder, "table", ("pair", "measure"), ("published", "corrected"), LEGACY_COLUMNS)
    if "label_a" in folder.columns("matrix"):
        yield "matrices", matrix_entry(folder)


def origin(folder: Folder) -> dict:
    """Where an entry comes from, and whether its images were real."""
    settings = folder.data("config.yaml")
    return {"folder": folder.name, "synthetic": _synthetic(settings), "permutations": settings.get("permutations")}


def _synthetic(settings: dict) -> bool | None:
    """Whether the images were synthetic; None where the settings do not say."""
    return str(settings["data"]) == "synthetic" if "data" in settings else None


def _packed(folder: Folder, table: str, words: Sequence[str], numbers: Sequence[str], columns) -> dict | None:
    found = folder.table(table, words, numbers)
    return None if found is None else {"table": packed(chosen(found, columns))}


# ------------------------------------------------------------------------------------------------------------ planes


def plane_entry(folder: Folder) -> dict | None:
    """A comparison of two models: its pairs of sites, depth, summary, facts of sites and pictures."""
    words, numbers = ("estimator", "policy", "part_a", "part_b", "site_a", "site_b"), RULER
    pairs = folder.table("pairs", words, numbers)
    if pairs is None:
        return None
    depth = folder.table("depth", ("estimator", "policy", "part_a"), ("relative_depth", *RULER))
    summary = folder.table("summary", ("part", "estimator", "policy"), RULER)
    facts = folder.table("sites", ("model", "site", "axes", "shape"), ("depth",))
    settings = folder.data("config.yaml")
    models = [str(row.get("model")) for row in settings.get("models") or [] if isinstance(row, dict)]
    names = [TITLES.get(name, name) for name in models] if len(models) == 2 else ["model A", "model B"]
    return {
        "names": names,
        "models": models,
        "seeds": settings.get("seeds"),
        "distances": [name for name in pairs["estimator"].unique() if name in DISTANCES],
        "pairs": packed(chosen(pairs, PAIR_COLUMNS)),
        "depth": None if depth is None else packed(chosen(depth, DEPTH_COLUMNS)),
        "summary": None if summary is None else packed(chosen(summary, SUMMARY_COLUMNS)),
        "sites": None if facts is None else packed(facts),
        "short": {side: _short(pairs[side]) for side in ("site_a", "site_b")},
        "pictures": pictures(folder, settings),
    }


def _short(names: pd.Series) -> dict[str, str]:
    unique = [str(name) for name in names.unique()]
    return dict(zip(unique, short_labels(unique, width=26)))


def pictures(folder: Folder, settings: dict) -> dict | None:
    """The atlas of pictures as a data address with its index; only ever of synthetic images."""
    index = folder.data("pca_rgb.json")
    atlas = folder.path / "pca_rgb.png"
    if not index or not atlas.is_file() or not _synthetic(settings):
        return None
    if not isinstance(index.get("sites"), list) or not isinstance(index.get("images"), list) or "tile" not in index:
        folder.problems.append("pca_rgb.json does not say what pca_rgb.png shows.")
        return None
    data = base64.b64encode(atlas.read_bytes()).decode("ascii")
    return {**index, "address": f"data:image/png;base64,{data}"}


def matrix_entry(folder: Folder) -> dict | None:
    """All architectures against all: the matrix, and the family of each where facts.csv has it."""
    matrix = folder.table("matrix", ("label_a", "label_b", "part"), RULER)
    if matrix is None:
        return None
    facts = folder.table("facts", ("label", "family"))
    families = {} if facts is None else dict(zip(facts["label"].astype(str), facts["family"].astype(str)))
    return {"table": packed(chosen(matrix, MATRIX_COLUMNS)), "families": families}


# -------------------------------------------------------------------------------------------------------- provenance


def run_facts(folder: Folder, found: dict[str, list]) -> dict:
    """What was run, on which data, from which commit; and what of it could not be read."""
    settings, environment = folder.data("config.yaml"), folder.data("environment.json")
    shown = [section for section, entries in found.items() if any(e["folder"] == folder.name for e in entries)]
    return {
        "folder": folder.name,
        "sections": shown,
        "synthetic": _synthetic(settings),
        "data": images_of(folder.data("data.json")),
        "commit": environment.get("commit"),
        "time": environment.get("time"),
        "device": environment.get("device"),
        "packages": {str(k): str(v) for k, v in (environment.get("packages") or {}).items()},
        "settings": [[str(key), _brief(value)] for key, value in settings.items()],
        "problems": list(dict.fromkeys(folder.problems)),
    }


def images_of(data: dict) -> list[list]:
    """[what, how many, hash] of data.json: of several splits or of one set, counted or only hashed."""
    rows = {"images": data} if isinstance(data.get("hash"), str) else data
    found = []
    for name, row in rows.items():
        if isinstance(row, dict):
            found.append([str(name), row.get("images", row.get("photographs")), row.get("hash")])
        else:
            found.append([str(name), None, str(row)])
    return found


def _brief(value: object) -> str:
    """A setting in one line; a place of somebody's machine by its last part only."""
    text = Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else str(value)
    return text if len(text) <= LONGEST_SETTING else text[:LONGEST_SETTING] + " …"
