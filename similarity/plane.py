"""A measure over all sites × sites of two recordings at once; per-site work is done once.

Rows are matched by image id, whatever the order in which the two recordings saw the images.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from similarity import measures, moments
from similarity.measures import MEASURES, FewImages, Measure, NotComputable
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


def plane(measure: str | Callable[..., float], A: Recording, B: Recording | None = None, **options) -> Plane:
    """`measure` between every site of A and every site of B (default: A with itself).

    measure : a name in `measures.MEASURES`, one of its functions, or any f(X, Y) -> float
    options : passed to the measure, e.g. debiased=False
    Sites that are constant, or too small for the measure, give NaN and a note, never a number. Recordings of
    different images, or under different policies, raise ValueError.
    """
    B = A if B is None else B
    B = match_rows(A, B)
    name, known = _known(measure, options)
    if known is None:
        values, notes = _every_pair(measure, _matrices(A), _matrices(B), options)
    else:
        values, notes = _shared(choose_route(known, A, B, options), A, B)
    return Plane(values, A.names, B.names, name, options, A.policy, len(A), notes)


@dataclass(frozen=True)
class Route:
    """How a plane is computed: what each site prepares once, and what makes a number of two of them.

    prepare(X, side) ; combine(left, right) -> float ; permute(prepared, rows) is prepare of the permuted rows
    gemm : combine is the inner product of matrices, so that all pairs are one product
    """

    prepare: Callable
    combine: Callable
    permute: Callable
    gemm: bool


def choose_route(known: Measure, A: Recording, B: Recording, options: dict) -> Route:
    """Feature space for linear CKA when it is cheaper, else the measure's own preparation."""
    if known.name == "linear_cka" and _features_are_cheaper(A, B):
        return Route(
            lambda X, side: moments.FeatureSide(X, side, **options),
            moments.FeatureSide.cka,
            moments.FeatureSide.permuted,
            gemm=False,
        )
    return Route(
        lambda X, side: known.prepare(measures.as_matrix(X, side), side=side, **options),
        known.combine,
        _permute,
        known.gram,
    )


def _permute(side: Tensor | tuple, rows: Tensor) -> Tensor | tuple:
    if isinstance(side, Tensor):  # images × images
        return side[rows][:, rows]
    basis, *rest = side
    return (basis[rows], *rest)


def _known(measure: str | Callable, options: dict) -> tuple[str, Measure | None]:
    if isinstance(measure, str):
        return measure, _with_options(measure, options)
    name = getattr(measure, "__name__", repr(measure))
    ours = name in MEASURES and getattr(measures, name) is measure
    return name, _with_options(name, options) if ours else None


def _with_options(name: str, options: dict) -> Measure:
    known = measures.lookup(name, options)
    allowed = [option for option in inspect.signature(getattr(measures, name)).parameters if option not in ("X", "Y")]
    for option in options:
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(allowed)}")
    return known


def match_rows(A: Recording, B: Recording) -> Recording:
    """B with its rows in A's order."""
    if A.policy != B.policy:
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


def _matrices(recording: Recording) -> dict[str, Tensor]:
    return {name: recording.matrix(name) for name in recording.names}


def _features_are_cheaper(A: Recording, B: Recording) -> bool:
    """Grams cost rows² a site; feature space costs p·q a pair. The rule compares the memory of one of each."""
    rows = len(A.matrix(A.names[0]))
    widest = max(recording.matrix(name).shape[1] for recording in (A, B) for name in recording.names)
    return rows > 2 * widest


def _shared(route: Route, A: Recording, B: Recording):
    """Prepare each site once, then combine: by one GEMM when combining is an inner product."""
    left, left_notes = prepare_all(route, A)
    right, right_notes = (left, left_notes) if B is A else prepare_all(route, B)
    values = np.full((len(A.names), len(B.names)), np.nan)
    i, j = ([k for k, name in enumerate(r.names) if name in side] for r, side in ((A, left), (B, right)))
    if route.gemm and left and right:
        values[np.ix_(i, j)] = _inner_products(list(left.values()), list(right.values()))
    notes = {
        (a, b): left_notes.get(a) or right_notes[b]
        for a in A.names
        for b in B.names
        if a in left_notes or b in right_notes
    }
    if not route.gemm:
        for (row, (a, x)), (column, (b, y)) in itertools.product(zip(i, left.items()), zip(j, right.items())):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", FewImages)
                values[row, column] = route.combine(x, y)
            if caught:
                notes[a, b] = str(caught[0].message)
    return values, notes


def prepare_all(route: Route, recording: Recording) -> tuple[dict, dict[str, str]]:
    """({site: prepared}, {site: why it allows no number})."""
    ready, notes = {}, {}
    for name in recording.names:
        try:
            ready[name] = route.prepare(recording.matrix(name), name)
        except NotComputable as reason:
            notes[name] = str(reason)
    return ready, notes


def _inner_products(left: list[Tensor], right: list[Tensor]) -> np.ndarray:
    """All ⟨left_i, right_j⟩ of (n, n) matrices, as one matrix product."""
    stack_a = torch.stack([matrix.flatten() for matrix in left])
    stack_b = stack_a if right is left else torch.stack([matrix.flatten() for matrix in right])
    return (stack_a @ stack_b.T).cpu().numpy()


def _every_pair(function: Callable, rows: dict[str, Tensor], columns: dict[str, Tensor], options: dict):
    """The plain route for a measure of the caller's own."""
    values, notes = np.full((len(rows), len(columns)), np.nan), {}
    for i, (a, X) in enumerate(rows.items()):
        for j, (b, Y) in enumerate(columns.items()):
            try:
                values[i, j] = function(X, Y, **options)
            except NotComputable as reason:
                notes[a, b] = str(reason)
    return values, notes
