"""Merging: what several processes recorded, each its share of the images, becomes one recording, matched by id."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from similarity.policies import canonical
from similarity.recording import Recording, hash_data

ROUNDING = 1e-3  # of a site's largest magnitude: rows of one image, read in other batches, agree to this


def merge(recordings: Iterable[Recording]) -> Recording:
    """One recording of all images, its rows sorted by id, so that it does not tell how the images were shared out.

    Shards must be of one model, policy and list of sites. An id in several shards (samplers repeat images to make
    shards equally long) is kept once, and must be the same image with the same rows up to rounding.
    """
    recordings = list(recordings)
    if not recordings:
        raise ValueError("there is no recording to merge")
    first = recordings[0]
    for place, other in enumerate(recordings[1:], start=1):
        _refuse_other(first, other, place)
    ids = [image for recording in recordings for image in recording.ids]
    kept, repeats = _places(ids)
    hashes, data_hash = _merged_hashes(recordings, ids, kept, repeats)
    features = {}
    for name in first.names:
        rows = _joined(name, [recording[name] for recording in recordings])
        _refuse_disagreement(name, rows, repeats, ids)
        features[name] = rows[torch.tensor(kept, dtype=torch.long)]
    return Recording(
        features, [ids[row] for row in kept], first.sites, first.policy, first.model_hash, data_hash, hashes
    )


def gather(recording: Recording, group=None) -> Recording:
    """Every process's recording merged, the same on all of them; without a process group, the recording as it is.

    group : of torch.distributed; default: all processes. Every process of it must call this.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return recording
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group whose recordings are gathered; call gather in the others")
    shards: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(shards, recording, group)
    return merge(shards)


def _refuse_other(first: Recording, other: Recording, place: int) -> None:
    """The shards must differ in their images only."""
    compared = {
        "policy": [canonical(recording.policy) for recording in (first, other)],
        "model hash": [recording.model_hash for recording in (first, other)],
    }
    for what, (here, there) in compared.items():
        if here != there:
            raise ValueError(f"recordings 0 and {place} have different {what}: {here!r} and {there!r}; record alike")
    here, there = ({site.name: site.axes for site in recording.sites} for recording in (first, other))
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            axes = [sites.get(name, "absent") for sites in (here, there)]
            raise ValueError(
                f"recordings 0 and {place} have different sites: {name!r} has axes {axes[0]} and {axes[1]}"
            )
    if (first.image_hashes is None) != (other.image_hashes is None):
        raise ValueError(
            f"one of recordings 0 and {place} has a data hash given by its caller, the other one computed from its "
            "images; record both alike"
        )


def _places(ids: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
    """(rows to keep, by sorted id; pairs of a row and the earlier row of the same id)."""
    place: dict[str, int] = {}
    repeats = [(row, place[image]) for row, image in enumerate(ids) if place.setdefault(image, row) != row]
    return [place[image] for image in sorted(place)], repeats


def _merged_hashes(
    recordings: list[Recording], ids: list[str], kept: list[int], repeats: list[tuple[int, int]]
) -> tuple[list[str] | None, str]:
    """(hash of every kept image or None, data hash of the union)."""
    if recordings[0].image_hashes is None:
        given = sorted({recording.data_hash for recording in recordings})
        if len(given) > 1:
            raise ValueError(f"the recordings are of different data: their data hashes are {', '.join(given)}")
        return None, given[0]
    hashes = [image for recording in recordings for image in recording.image_hashes]
    for row, earlier in repeats:
        if hashes[row] != hashes[earlier]:
            raise ValueError(
                f"image id {ids[row]!r} names two different images in the recordings; give each its own id"
            )
    hashes = [hashes[row] for row in kept]
    return hashes, hash_data([ids[row] for row in kept], hashes)


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"site {name!r} has rows of different shapes in the recordings: {sorted(shapes)}; record images of one size"
        )
    return torch.cat(parts)


def _refuse_disagreement(name: str, rows: Tensor, repeats: list[tuple[int, int]], ids: list[str]) -> None:
    """Rows of one image must be equal up to rounding; where a model gave no number (nan), it must do so twice."""
    if not repeats:
        return
    finite = rows[rows.isfinite()].abs()
    scale = finite.max() if len(finite) else rows.new_zeros(())
    for row, earlier in repeats:
        one, two = rows[row], rows[earlier]
        same = ((one - two).abs() <= ROUNDING * scale) | (one == two) | (one.isnan() & two.isnan())
        if not same.all():
            raise ValueError(
                f"image {ids[row]!r} was recorded twice at site {name!r}, and its rows differ by up to "
                f"{(one - two).abs().max():.3g} (largest magnitude there {scale:.3g}); was the model in one state?"
            )
