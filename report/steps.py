"""Processing steps of many networks, for the page: depth × depth planes of pairs of networks."""

from __future__ import annotations

import pandas as pd

from report.tables import Folder, packed, packed_column

MOST_VALUES = 300_000  # of all planes of a folder: about two megabytes
PLANE_DIGITS = 3
KEYS = ("network_a", "network_b", "site_a", "site_b", "depth_a", "depth_b")
SAID = ("note", "k", "n_images", "neighbours")  # of all rows alike, or in words
LONGEST_TABLE = 250  # rows of the tables that are shown as tables


def entry(folder: Folder) -> dict | None:
    """Planes (a value a pair of sites, by column), facts of networks and sites, and the short tables there are."""
    planes = folder.table("planes", ("network_a", "network_b", "site_a", "site_b"))
    if planes is None:
        return None
    if {"a_to_b", "b_to_a"} <= set(planes):  # by the mean of both ways sites are matched
        planes = planes.assign(both=planes[["a_to_b", "b_to_a"]].mean(axis=1, skipna=False))
    values = [name for name in planes.drop(columns=[*KEYS, *SAID], errors="ignore") if _has_numbers(planes[name])]
    values.sort(key=lambda name: name != "both")  # first
    if not values:
        folder.problems.append("planes.csv has no column of numbers.")
        return None
    kept, total = [], 0
    groups = list(planes.groupby(["network_a", "network_b"], sort=False))
    for (a, b), rows in groups:
        total += len(rows) * len(values)
        if total > MOST_VALUES:
            break
        kept.append({"a": str(a), "b": str(b), **_plane(rows, values)})
    sites = folder.table("sites", ("network", "site"))
    networks = folder.table("networks", ("network",))
    return {
        "values": values,
        "images": int(planes["n_images"].max()) if "n_images" in planes else None,
        "planes": kept,
        "left_out": len(groups) - len(kept),
        "sites": None if sites is None else packed(sites),
        "networks": None if networks is None else packed(networks),
        "pairs": _short(folder, "pairs", ("network_a", "network_b"), most=len(groups)),
        "tables": {name: found for name in ("smoothness", "steps") if (found := _short(folder, name, ("network",)))},
    }


def _has_numbers(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and column.notna().any()


def _plane(rows: pd.DataFrame, values: list[str]) -> dict:
    """One pair of networks: sites of both in order, and where each row is among them."""
    sides = {}
    for side in ("a", "b"):
        names = rows[f"site_{side}"].astype(str)
        column = packed_column(names)
        sides |= {f"sites_{side}": column["levels"], f"row_{side}": column["codes"]}
        if f"depth_{side}" in rows:
            first = rows.assign(site=names).drop_duplicates("site")[f"depth_{side}"]
            sides[f"depths_{side}"] = packed_column(first, PLANE_DIGITS)
    return sides | {"values": {name: packed_column(rows[name], PLANE_DIGITS) for name in values}}


def _short(folder: Folder, name: str, words: tuple[str, ...], most: int = LONGEST_TABLE) -> dict | None:
    """A table that is short enough to be read on a page."""
    if not set(words) <= set(folder.columns(name)):
        return None
    found = folder.table(name, words)
    return None if found is None or len(found) > max(most, LONGEST_TABLE) else packed(found)
