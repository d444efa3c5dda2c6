"""A measure over all sites × sites of two recordings at once: rows matched by image id, a labelled table out.

Rows are matched by image id, whatever the order in which the two recordings saw the images. How the cells are
computed is the subject of `cells`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from similarity import cells, measures
from similarity.measures import MEASURES, Measure
from similarity.policies import canonical
from similarity.recording import Recording


@dataclass
class Plane:
    """values[i, j] is the measure between rows[i] of A and columns[j] of B.

    notes : what to know of a cell: why it is NaN, or why its value is large by construction
    """

    values: np.ndarray
    rows: list[str]
    columns: list[str]
    measure: str
    options: dict
    policy: str
    n_images: int
    notes: dict[tuple[str, str], str] = field(default_factory=dict)

    def frame(self) -> pd.DataFrame:
        """Sites of A × sites of B."""
        return pd.DataFrame(self.values, index=self.rows, columns=self.columns)

    def tidy(self) -> pd.DataFrame:
        """One row a site pair: site_a, site_b, measure, options, policy, n_images, value, note."""
        pairs = [(a, b) for a in self.rows for b in self.columns]
        return pd.DataFrame(
            {
                "site_a": [a for a, _ in pairs],
                "site_b": [b for _, b in pairs],
                "measure": self.measure,
                "options": " ".join(f"{key}={value}" for key, value in self.options.items()),
                "policy": self.policy,
                "n_images": self.n_images,
                "value": self.values.ravel(),
                "note": [self.notes.get(pair, "") for pair in pairs],
            }
        )


def plane(
    measure: str | Callable[..., float],
    A: Recording,
    B: Recording | None = None,
    *,
    device: torch.device | str | None = None,
    **options,
) -> Plane | list[Plane]:
    """`measure` between every site of A and every site of B (default: A with itself).

    measure : a name in `measures.MEASURES`, one of its functions, or any f(X, Y) -> float
    device : where to compute, such as 'cuda'; default: where the recordings' features are
    options : passed to the measure, e.g. debiased=False; several `fraction`s of rbf_cka give a list of planes
    Sites that are constant, or too small for the measure, give NaN and a note, never a number. Recordings of
    different images, or under different policies, raise ValueError.
    """
    B = A if B is None else B
    B = match_rows(A, B)
    name, known = _known(measure, options)
    left = matrices(A, device)
    right = left if B is A else matrices(B, next(iter(left.values())).device)

    def made(options: dict, values: np.ndarray, notes: dict) -> Plane:
        return Plane(values, A.names, B.names, name, options, A.policy, len(A), notes)

    if known is None:
        return made(options, *cells.every_pair(measure, left, right, options))
    options = complete(name, options, A)
    if name == "rbf_cka" and measures.is_several(options.get("fraction", 1.0)):
        planes = cells.rbf_planes(left, right, options)
        return [made(options | {"fraction": one}, *each) for one, each in zip(options["fraction"], planes)]
    return made(options, *cells.compute(known, left, right, options))


def _known(measure: str | Callable, options: dict) -> tuple[str, Measure | None]:
    if isinstance(measure, str):
        return measure, measures.lookup(measure, options)
    name = getattr(measure, "__name__", repr(measure))
    ours = name in MEASURES and getattr(measures, name) is measure
    return name, measures.lookup(name, options) if ours else None


def match_rows(A: Recording, B: Recording) -> Recording:
    """B with its rows in A's order."""
    if canonical(A.policy) != canonical(B.policy):
        raise ValueError(f"A was recorded with policy {A.policy!r} and B with {B.policy!r}; record both alike")
    only_a, only_b = set(A.ids) - set(B.ids), set(B.ids) - set(A.ids)
    if only_a or only_b:
        example = sorted(only_a or only_b)[0]
        raise ValueError(
            f"the recordings hold different images: {len(only_a)} only in A, {len(only_b)} only in B (such as "
            f"{example!r}); record both on the same images, or select(ids=…) the common ones"
        )
    _refuse_unequal_rows(A, B)
    return B if A.ids == B.ids else B.select(ids=A.ids)


def _refuse_unequal_rows(A: Recording, B: Recording) -> None:
    """Rows are images, or images × positions: then every site must have as many positions as the others."""
    counts = [(len(recording.matrix(site)), site) for recording in (A, B) for site in recording.names]
    (few, small), (many, large) = min(counts), max(counts)
    if few != many:
        raise ValueError(
            f"policy {A.policy!r} gives site {small!r} {few} rows and site {large!r} {many}; rows are compared one to "
            "one: record with 'gap' or 'grid:g', or choose sites of one size"
        )


def complete(name: str, options: dict, recording: Recording) -> dict:
    """The options of one of our measures with what it must know of the recording's rows."""
    return {"rows_per_image": rows_an_image(recording)} | options if name == "linear_regression_r2" else options


def matrices(recording: Recording, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """{site: (rows, features)}."""
    found = {name: recording.matrix(name) for name in recording.names}
    return found if device is None else {name: X.to(device) for name, X in found.items()}


def rows_an_image(recording: Recording) -> int:
    """1, or positions an image under policies that make rows of them."""
    return len(recording.matrix(recording.names[0])) // len(recording)
