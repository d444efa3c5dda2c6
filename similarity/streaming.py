"""Streaming: a linear-CKA plane of two models in one pass over the data, keeping no rows.

For rows that do not fit in memory: every token or pixel of every image, under 'tokens' or a fine 'grid:g'. Exact, not
an average over batches (`moments`). Memory is all columns of A × all columns of B, whatever the number of images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from similarity import memory
from similarity.cells import notes_of_cells
from similarity.moments import Moments
from similarity.plane import Plane
from similarity.policies import parse_policy, row_shape
from similarity.reading import Reader, open_reader
from similarity.recording import images_and_ids, refuse_repeated, with_bar
from similarity.sites import resolve_sites


def stream_plane(
    model_a: nn.Module,
    model_b: nn.Module | None,
    loader: Iterable,
    sites_a: Sequence | Mapping | None = None,
    sites_b: Sequence | Mapping | None = None,
    policy: str = "gap",
    *,
    debiased: bool = True,
    forward: Callable[[nn.Module, Tensor], object] | None = None,
    precision: torch.dtype = torch.float64,
) -> Plane:
    """Linear CKA between every site of A and every site of B, each image read once.

    model_b : None is A again: with `sites_b`, sites of A against other sites of A; without, all of A's with themselves

    loader, sites, policy, forward : as for `record`; under 'tokens' all sites must have as many positions
    precision : of the products of one batch's rows; sums are float64 (see `Moments`)
    In several processes, each with its share of the images, use `stream` and `Moments.all_reduce`.
    """
    sums, readers, images = stream(
        model_a, model_b, loader, sites_a, sites_b, policy, forward=forward, precision=precision
    )
    values, (row_notes, column_notes) = sums.cka(debiased=debiased)
    rows, columns = (_names(reader, policy) for reader in (readers[0], readers[-1]))
    notes = notes_of_cells(rows, columns, row_notes, column_notes)
    return Plane(values, rows, columns, "linear_cka", {"debiased": debiased}, policy, images, notes)


def stream(
    model_a: nn.Module,
    model_b: nn.Module | None,
    loader: Iterable,
    sites_a: Sequence | Mapping | None = None,
    sites_b: Sequence | Mapping | None = None,
    policy: str = "gap",
    *,
    forward: Callable[[nn.Module, Tensor], object] | None = None,
    precision: torch.dtype = torch.float64,
) -> tuple[Moments, list[Reader], int]:
    """(the sums over all rows, one Reader a model, images read); what `stream_plane` turns into a plane."""
    if parse_policy(policy)[0] == "map":
        raise ValueError("full maps have no rows; stream under 'gap', 'tokens', 'grid:g' or 'flat:g'")
    with_itself = sites_b is None and (model_b is None or model_b is model_a)
    models = [model_a] if with_itself else [model_a, model_a if model_b is None else model_b]
    wanted = [resolve_sites(model, sites) for model, sites in zip(models, (sites_a, sites_b))]
    strict = [sites is not None for sites in (sites_a, sites_b)]
    sums, readers, seen = Moments(precision), [], set()
    for batch in with_bar(loader, "streaming"):
        images, ids = images_and_ids(batch)
        refuse_repeated(seen, ids)
        seen.update(ids)
        if not readers:
            readers = [
                open_reader(model, images, sites, [policy], strict=must, forward=forward)
                for model, sites, must in zip(models, wanted, strict)
            ]
            _refuse_too_large(readers, policy, tuple(images.shape[-2:]))
        rows = [_matrices(reader.read(images, ids)) for reader in readers]
        sums.update(*rows)
    if not seen:
        raise ValueError("the loader gave no batch: nothing to stream")
    return sums, readers, len(seen)


def _names(reader: Reader, policy: str) -> list[str]:
    return [site.name for site in reader.sites if policy in reader.wanted[site.name]]


def _matrices(rows: dict[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """{site: (rows, features)}: images, or image × position pairs."""
    return {name: tensor.reshape(-1, tensor.shape[-1]) for (name, _), tensor in rows.items()}


def _refuse_too_large(readers: list[Reader], policy: str, size: tuple[int, int]) -> None:
    """Every pair of sites keeps p × q numbers, every site p × p of its own; say how much that is, before it starts."""
    shapes = [
        [row_shape(site, policy, size) for site in reader.sites if policy in reader.wanted[site.name]]
        for reader in readers
    ]
    widths = [[shape[-1] for shape in side] for side in shapes]
    needed = 8 * (sum(widths[0]) * sum(widths[-1]) + sum(width**2 for side in widths for width in side))
    positions = {shape[0] if len(shape) > 1 else 1 for side in shapes for shape in side}
    if len(positions) > 1:
        raise ValueError(
            f"under {policy!r} the sites have {sorted(positions)} positions; rows are compared one to one: choose "
            "sites of one size, or 'gap' or 'grid:g'"
        )
    what = f"streaming {len(widths[0])} × {len(widths[-1])} sites under {policy}"
    tqdm.write(f"{what}: {memory.size(needed)}, whatever the number of images", file=sys.stderr)
    memory.refuse_more_than_available(needed, what, "choose fewer sites, or record and use `plane`")
