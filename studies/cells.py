"""The cells of a grid of runs: the product of its axes, by name, and what is refused before any of them runs.

An axis is a list of values of one setting, or labels that each stand for some settings. Nothing here touches a file.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from utils import InputError, closest

COLUMNS = ("name", "state", "attempts", "seconds", "error")  # of the grid's table, beside its axes
LONGEST_NAME = 200  # characters; most file systems end at 255 bytes


@dataclass(frozen=True)
class Cell:
    """One run of a grid: labels {axis: label}, and changes {setting: value} of the study's settings."""

    labels: Mapping[str, object]
    changes: Mapping[str, object]

    @property
    def name(self) -> str:
        """Its folder's name, such as encoder-clip_tiny--fraction-0.05--seed-0."""
        parts = (f"{axis}-{text_of(label)}" for axis, label in self.labels.items())
        return "--".join(re.sub(r"[^A-Za-z0-9._+-]+", "_", part) for part in parts)


def text_of(label: object) -> str:
    """A label or value as it stands in names and tables."""
    if label is None or label in ([], ()):
        return "none"
    if isinstance(label, bool):
        return str(label).lower()
    return "+".join(map(text_of, label)) if isinstance(label, list | tuple) else str(label)


def merged(base: Mapping, changes: Mapping) -> dict:
    """Settings with some of them changed; a mapping such as `options` is merged one level deep, all else replaced."""
    both = {
        key: {**base[key], **value}
        for key, value in changes.items()
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    return {**base, **changes, **both}


def cells_of(axes: Mapping, skip: Sequence[Mapping] = ()) -> list[Cell]:
    """The product of the axes in their order, the last one fastest.

    Args:
        axes: axis -> values of the setting of that name ({"seed": [0, 1]}), or label -> {setting: value}
        skip: combinations to leave out, {axis: label or labels}; all cells that fit one are left out
    """
    choices = {axis: _choices(axis, values) for axis, values in axes.items()}
    _refuse_clashes(choices)
    left_out = [_combination(entry, choices) for entry in skip]
    cells = []
    for picked in itertools.product(*choices.values()):
        labels = {axis: label for axis, (label, _) in zip(choices, picked)}
        if any(all(text_of(labels[axis]) in texts for axis, texts in entry.items()) for entry in left_out):
            continue
        cells.append(Cell(labels, functools.reduce(merged, (changes for _, changes in picked), {})))
    _refuse_names(cells)
    return cells


def _choices(axis: str, values) -> list[tuple[object, dict]]:
    """[(label, changes)] of an axis."""
    if axis in COLUMNS:
        raise InputError(f"an axis may not be called {axis!r}: that is a column of the grid's table; rename it")
    if not isinstance(values, Mapping | list | tuple):
        raise InputError(f"axis {axis!r}: {values!r} is no list and no mapping of labels; write {axis}: [{values}]")
    if not values:
        raise InputError(f"axis {axis!r} has no values; give it some, or leave it out")
    labelled = isinstance(values, Mapping)
    for value in values.items() if labelled else values:
        if labelled and not isinstance(value[1], Mapping):
            raise InputError(f"axis {axis!r}, label {value[0]!r}: expected {{setting: value}}, got {value[1]!r}")
        if isinstance(value, Mapping):
            raise InputError(f"axis {axis!r}: {value!r} needs a label; write {axis}: {{some label: {value!r}}}")
    if labelled:
        return [(label, dict(changes)) for label, changes in values.items()]
    return [(text_of(value) if isinstance(value, list | tuple) else value, {axis: value}) for value in values]


def _settings(changes: Mapping) -> set[tuple[str, ...]]:
    """What changes touch: (setting,), or (setting, part of it)."""
    nested = {(key, part) for key, value in changes.items() if isinstance(value, Mapping) for part in value}
    return nested | {(key,) for key, value in changes.items() if not isinstance(value, Mapping)}


def _refuse_clashes(choices: Mapping[str, list]) -> None:
    """Refuse two axes that change the same setting: the later one would undo the earlier one."""
    touched = {axis: set().union(*(_settings(changes) for _, changes in pairs)) for axis, pairs in choices.items()}
    for (one, ones), (other, others) in itertools.combinations(touched.items(), 2):
        for a, b in itertools.product(sorted(ones), sorted(others)):
            shared = min(len(a), len(b))
            if a[:shared] == b[:shared]:
                named = ".".join(max(a, b, key=len))
                raise InputError(f"axes {one!r} and {other!r} both change {named}; each setting may be on one axis")


def _combination(entry: Mapping, choices: Mapping[str, list]) -> dict[str, set[str]]:
    """A combination to skip as {axis: labels}; one that fits nothing is a slip of the pen."""
    if not isinstance(entry, Mapping) or not entry:
        raise InputError(f"skip: expected {{axis: label or labels}}, got {entry!r}")
    wanted = {}
    for axis, labels in entry.items():
        if axis not in choices:
            raise InputError(f"skip: there is no axis {axis!r}; closest: {closest(str(axis), choices)}")
        known = [text_of(label) for label, _ in choices[axis]]
        wanted[axis] = {text_of(label) for label in (labels if isinstance(labels, list | tuple) else [labels])}
        for label in sorted(wanted[axis].difference(known)):
            raise InputError(f"skip: axis {axis!r} has no label {label!r}; closest: {closest(label, known)}")
    return wanted


def _refuse_names(cells: Sequence[Cell]) -> None:
    if not cells or not cells[0].labels:
        raise InputError("the grid has no cells: give it an axis, and skip fewer combinations")
    seen: dict[str, Cell] = {}
    for cell in cells:
        if len(cell.name) > LONGEST_NAME:
            raise InputError(f"a folder cannot be called {cell.name!r} ({len(cell.name)} characters); shorten labels")
        other = seen.setdefault(cell.name.casefold(), cell)  # some disks do not tell A from a
        if other is not cell:
            named = f"{dict(other.labels)} and {dict(cell.labels)}"
            raise InputError(f"two cells would share the folder {cell.name}: {named}; change a label")


def check_settings(axes: Mapping, known: Iterable[str]) -> None:
    """Refuse settings that do not exist; `known` are the names of the study's, such as the fields of TrainConfig."""
    known = list(known)
    for axis, values in axes.items():
        if not isinstance(values, Mapping) and axis not in known:
            raise InputError(
                f"axis {axis!r} is no setting; closest: {closest(axis, known)}; an axis of another name needs labels: "
                f"{axis}: {{label: {{setting: value}}}}"
            )
        for label, changes in _choices(axis, values):
            for key in changes:
                if key not in known:
                    raise InputError(
                        f"axis {axis!r}, label {label!r}: unknown setting {key!r}; closest: {closest(str(key), known)}"
                    )
