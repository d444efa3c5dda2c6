"""Recording: run models over a loader once and keep, for every site and image id, what the site computed.

Each activation is reduced on its device the moment it fires (see `POLICIES`), so memory is images × pooled size.
Rows carry image ids; two recordings are only ever matched by id. This room compares nothing: see `plane`. What
several processes recorded is put together in `merging`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from similarity import memory
from similarity.policies import estimate_bytes
from similarity.reading import Reader, check_query_weights, open_reader
from similarity.sites import Site, resolve_sites

FORMAT = "1"


@dataclass
class Recording:
    """What the sites of one model computed for a set of images.

    features : site name -> Tensor (n, channel) or (n, position, channel), row i belonging to ids[i]
    ids : the image ids, one per row
    sites : the Site of every feature, in execution order
    policy : how space was reduced, one of `POLICIES`
    model_hash, data_hash : of the weights, and of the images (or as given by the caller)
    image_hashes : one per id, where data_hash was computed from the images; None where the caller gave it
    """

    features: dict[str, Tensor]
    ids: list[str]
    sites: list[Site]
    policy: str
    model_hash: str
    data_hash: str
    image_hashes: list[str] | None = None

    def __post_init__(self):
        repeated = len(self.ids) - len(set(self.ids))
        if repeated:
            raise ValueError(f"{repeated} image ids come twice in a recording; every image has one row")
        if self.image_hashes is not None and len(self.image_hashes) != len(self.ids):
            raise ValueError(f"a recording has {len(self.image_hashes)} image hashes for {len(self.ids)} image ids")
        for name, tensor in self.features.items():
            if len(tensor) != len(self.ids):
                raise ValueError(f"site {name!r} has {len(tensor)} rows for {len(self.ids)} image ids")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.features:
            near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.3) or self.names[:3]
            raise ValueError(f"site {name!r} was not recorded; closest: {', '.join(map(repr, near))}")
        return self.features[name]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def names(self) -> list[str]:
        """Site names in execution order."""
        return [site.name for site in self.sites]

    def matrix(self, name: str) -> Tensor:
        """The site's rows as (rows, features): images, or image × position pairs, image-major."""
        tensor = self[name]
        if self.policy == "map":
            raise ValueError("a recording of full maps has no (n, p) matrices; record with 'gap', 'grid:g' or 'flat:g'")
        return tensor.reshape(-1, tensor.shape[-1])

    def select(self, *, part: str | None = None, ids: Sequence[str] | None = None) -> Recording:
        """The same recording with only the sites of one part, and / or only these ids, in this order."""
        sites = [site for site in self.sites if part is None or site.part == part]
        if not sites:
            raise ValueError(f"no site of part {part!r} was recorded; parts: {sorted({s.part for s in self.sites})}")
        features = {site.name: self.features[site.name] for site in sites}
        kept, hashes = self.ids, self.image_hashes
        if ids is not None:
            place = {image: row for row, image in enumerate(self.ids)}
            absent = [image for image in ids if image not in place]
            if absent:
                raise ValueError(f"{len(absent)} ids were not recorded, first {absent[0]!r}")
            kept, rows = list(ids), [place[image] for image in ids]
            hashes = None if hashes is None else [hashes[row] for row in rows]
            features = {name: tensor[torch.tensor(rows)] for name, tensor in features.items()}
        return Recording(features, kept, sites, self.policy, self.model_hash, self.data_hash, hashes)

    def save(self, path: Path) -> None:
        """Write as safetensors (atomically); axes, ids, policy and hashes are its metadata."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": FORMAT,
            "ids": json.dumps(self.ids),
            "sites": json.dumps([vars(site) for site in self.sites]),
            "policy": self.policy,
            "model_hash": self.model_hash,
            "data_hash": self.data_hash,
        }
        if self.image_hashes is not None:
            metadata["image_hashes"] = json.dumps(self.image_hashes)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # two processes may be recording the same
        save_file({name: tensor.contiguous() for name, tensor in self.features.items()}, temporary, metadata)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, *, model: nn.Module | str | None = None, data_hash: str | None = None) -> Recording:
        """Read a recording; one made of another model (a module or its hash) or of other data raises ValueError."""
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata()
                if metadata is None or metadata.get("format") != FORMAT:
                    raise ValueError(f"{path} is not a recording of this version; delete it and record again")
                features = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no recording ({error}); delete it and record again") from error
        expected = {"model_hash": hash_model(model) if isinstance(model, nn.Module) else model, "data_hash": data_hash}
        for key, value in expected.items():
            if value is not None and metadata[key] != value:
                what = "model" if key == "model_hash" else "data"
                raise ValueError(f"{path} was recorded with another {what} ({metadata[key]}, asked for {value})")
        sites = [
            Site(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
            for fields in json.loads(metadata["sites"])
        ]
        ordered = {site.name: features[site.name] for site in sites}
        return cls(
            ordered,
            json.loads(metadata["ids"]),
            sites,
            metadata["policy"],
            metadata["model_hash"],
            metadata["data_hash"],
            json.loads(metadata["image_hashes"]) if "image_hashes" in metadata else None,
        )


def record(
    model: nn.Module,
    loader: Iterable,
    sites: Sequence | Mapping | None = None,
    policy: str = "gap",
    *,
    forward: Callable[[nn.Module, Tensor], object] | None = None,
    data_hash: str | None = None,
) -> Recording:
    """Record one model over a loader of batches with images and ids.

    loader : batches with `.image` and `.id`, or {"image", "id"}, or (images, ids)
    sites : names, Site objects, or {name: axes}; default: the sites the model declares, else every module whose
        layout PyTorch's contract fixes, that the policy can be used on
    policy : one of `POLICIES`; under 'mask' a model with queries says how it weights them, see `Reader`
    forward : called as forward(model, images); default model(images)
    data_hash : stored with the recording; default: the digest of the ids and images seen
    """
    return record_models({"model": model}, loader, {"model": sites}, (policy,), forward, data_hash)["model"][policy]


def record_models(
    models: Mapping[str, nn.Module],
    loader: Iterable,
    sites: Mapping[str, Sequence | Mapping | None] | None = None,
    policies: Sequence[str] = ("gap",),
    forward: Callable[[nn.Module, Tensor], object] | None = None,
    data_hash: str | None = None,
) -> dict[str, dict[str, Recording]]:
    """Record several models under several policies over one pass of the data: {model name: {policy: Recording}}.

    What will be kept is said on stderr before anything is; more than the memory at hand is refused.
    """
    sites = sites or {}
    given = {name: sites.get(name) is not None for name in models}
    wanted = {name: resolve_sites(model, sites.get(name)) for name, model in models.items()}
    for name, model in models.items():
        check_query_weights(model, wanted[name] or [], policies)
    books: dict[str, _Book] | None = None
    ids: list[str] = []
    seen: set[str] = set()
    hashes: list[str] = []
    for batch in with_bar(loader, "recording"):
        images, batch_ids = images_and_ids(batch)
        refuse_repeated(seen, batch_ids)
        ids += batch_ids
        seen.update(batch_ids)
        if data_hash is None:
            hashes += hash_images(images)
        if books is None:
            books = {
                name: _Book(open_reader(model, images, wanted[name], policies, strict=given[name], forward=forward))
                for name, model in models.items()
            }
            _announce([book.reader for book in books.values()], policies, images, *_images_to_come(loader, len(images)))
        for book in books.values():
            book.write(images, batch_ids)
    if books is None:
        raise ValueError("the loader gave no batch: nothing to record")
    image_hashes = hashes if data_hash is None else None
    data_hash = data_hash or hash_data(ids, hashes)
    return {name: book.close(ids, data_hash, image_hashes) for name, book in books.items()}


class _Rows:
    """Rows of one site on the CPU, in one piece whose room doubles.

    Many small pieces, kept while activations come and go between them, would scatter the memory.
    """

    def __init__(self):
        self.room: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Append a batch."""
        needed = self.count + len(rows)
        if self.room is not None and (rows.shape[1:], rows.dtype) != (self.room.shape[1:], self.room.dtype):
            here, there = (f"{tuple(each.shape[1:])} {each.dtype}" for each in (rows, self.room))
            raise ValueError(f"a batch has rows of {here} after rows of {there}; record images of one size")
        if self.room is None or needed > len(self.room):
            larger = torch.empty(max(2 * needed, 64), *rows.shape[1:], dtype=rows.dtype)
            if self.room is not None:
                larger[: self.count] = self.room[: self.count]
            self.room = larger
        self.room[self.count : needed] = rows
        self.count = needed

    def joined(self) -> Tensor:
        """All rows, without the room to spare."""
        return self.room[: self.count].clone()


class _Book:
    """The rows of one model, growing batch by batch."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.rows: dict[tuple[str, str], _Rows] = {}

    def write(self, images: Tensor, ids: list[str]) -> None:
        for key, rows in self.reader.read(images, ids).items():
            self.rows.setdefault(key, _Rows()).add(rows)

    def close(self, ids: list[str], data_hash: str, image_hashes: list[str] | None) -> dict[str, Recording]:
        """The recordings; each site's room is let go as its rows are taken out, so that nothing is held twice."""
        model_hash = hash_model(self.reader.model)
        recordings = {}
        for policy in self.reader.policies:
            sites = [site for site in self.reader.sites if (site.name, policy) in self.rows]
            features = {site.name: self.rows.pop((site.name, policy)).joined() for site in sites}
            hashes = None if image_hashes is None else list(image_hashes)
            recordings[policy] = Recording(features, list(ids), sites, policy, model_hash, data_hash, hashes)
        return recordings


def with_bar(loader: Iterable, what: str) -> Iterable:
    """A progress bar over batches on a terminal, unless the caller has put one there."""
    if isinstance(loader, tqdm):
        return loader
    return tqdm(loader, desc=what, unit="batch", leave=False, dynamic_ncols=True, disable=None, file=sys.stderr)


def _images_to_come(loader: Iterable, batch: int) -> tuple[int | None, bool]:
    """(images that the loader will give, None where it does not say; whether there may be fewer).

    A sampler may take fewer than all of a data set, so it is asked first.
    """
    for part in (getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        if hasattr(part, "__len__"):
            return len(part), False
    try:
        return len(loader) * batch, len(loader) > 1
    except TypeError:  # a generator, or a loader of a stream
        return None, False


def _announce(readers: list[Reader], policies: Sequence[str], images: Tensor, count: int | None, most: bool) -> None:
    """One line on what will be kept; MemoryError where that is more than there is."""
    size = tuple(images.shape[-2:])
    listed = [(reader, [site for site in reader.sites if site.shape]) for reader in readers]
    each = sum(estimate_bytes(s, policies, size, 1, itemsize=_itemsize(r.model, images)) for r, s in listed)
    sites = sum(len(reader.sites) for reader in readers)
    what = f"recording {_number(len(readers), 'model')}, {_number(sites, 'site')}"
    under = f"under {', '.join(policies)}"
    if count is None:
        tqdm.write(f"{what} {under}: {memory.size(each)} an image", file=sys.stderr)
        return
    what = f"{what}, {'up to ' if most else ''}{_number(count, 'image')} {under}"
    memory.refuse_more_than_available(
        each * count, what, "use a coarser policy ('gap', or a smaller grid), fewer sites or fewer images"
    )
    tqdm.write(f"{what}: {memory.size(each * count)}", file=sys.stderr)


def _itemsize(model: nn.Module, images: Tensor) -> int:
    """Bytes of a recorded number: 8 where anything in the model, or images that it does not convert, are float64."""
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]
    return 8 if torch.float64 in {tensor.dtype for tensor in tensors or [images]} else 4


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


def images_and_ids(batch) -> tuple[Tensor, list[str]]:
    """The images (batch, …) and their ids, as texts, of a batch in any of the forms that `record` takes."""
    if hasattr(batch, "image") and hasattr(batch, "id"):
        images, ids = batch.image, batch.id
    elif isinstance(batch, Mapping) and {"image", "id"} <= set(batch):
        images, ids = batch["image"], batch["id"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        images, ids = batch
    else:
        raise ValueError("each batch must have .image and .id, or keys 'image' and 'id', or be (images, ids)")
    if isinstance(ids, str) or not isinstance(images, Tensor):
        raise ValueError(
            f"a batch must hold a tensor of images and one id each, got {type(images).__name__} and {ids!r}"
        )
    ids = [str(image.item() if isinstance(image, Tensor) else image) for image in ids]
    if len(ids) != len(images):
        raise ValueError(f"a batch has {len(images)} images but {len(ids)} ids")
    return images, ids


def refuse_repeated(seen: set[str], new: list[str]) -> None:
    """ValueError where an id of a batch was seen before, or comes twice in the batch."""
    repeated = seen.intersection(new) or {image for image, count in Counter(new).items() if count > 1}
    if repeated:
        raise ValueError(f"image id {sorted(repeated)[0]!r} comes twice; every image is recorded once, by its id")


def hash_images(images: Tensor) -> list[str]:
    """SHA-256 of every image of a batch, over the bytes of its pixels."""
    pixels = (image.flatten().view(torch.uint8).numpy() for image in images.detach().cpu().contiguous())
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]  # as bytes: numpy has no bfloat16


def hash_data(ids: Sequence[str], image_hashes: Sequence[str]) -> str:
    """Digest of (id, image) pairs that does not depend on their order or batching."""
    parts = sorted(image + pixels for image, pixels in zip(ids, image_hashes, strict=True))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def hash_model(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over every named tensor of the model's state.

    A model whose outputs depend on more than its state says so in `model.recording_key`, a text.
    """
    state = hashlib.sha256(getattr(model, "recording_key", "").encode())
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        state.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        state.update(data.flatten().view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return state.hexdigest()[:16]
