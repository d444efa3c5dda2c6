"""Recording: run models over a loader once and keep, for every site and image id, what the site computed.

Each activation is reduced on its device the moment it fires (see `POLICIES`), so memory is images × pooled size.
Rows carry image ids; two recordings are only ever matched by id. This room compares nothing: see `plane`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from similarity.hooks import Listener, check_batch, list_sites, run_quietly
from similarity.policies import parse_policy, reduce, unfit
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
    """

    features: dict[str, Tensor]
    ids: list[str]
    sites: list[Site]
    policy: str
    model_hash: str
    data_hash: str

    def __post_init__(self):
        repeated = len(self.ids) - len(set(self.ids))
        if repeated:
            raise ValueError(f"{repeated} image ids come twice in a recording; every image has one row")
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
        if ids is not None:
            place = {image: row for row, image in enumerate(self.ids)}
            absent = [image for image in ids if image not in place]
            if absent:
                raise ValueError(f"{len(absent)} ids were not recorded, first {absent[0]!r}")
            rows = torch.tensor([place[image] for image in ids])
            features = {name: tensor[rows] for name, tensor in features.items()}
        kept = self.ids if ids is None else list(ids)
        return Recording(features, kept, sites, self.policy, self.model_hash, self.data_hash)

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
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # two processes may be recording the same
        save_file({name: tensor.contiguous() for name, tensor in self.features.items()}, temporary, metadata)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, *, model: nn.Module | str | None = None, data_hash: str | None = None) -> Recording:
        """Read a recording; one made of another model (a module or its hash) or of other data raises ValueError."""
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata()
            if metadata is None or metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a recording of this version; delete it and record again")
            features = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
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
    policy : one of `POLICIES`
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
    """Record several models under several policies over one pass of the data: {model name: {policy: Recording}}."""
    for policy in policies:
        parse_policy(policy)
    wanted = {name: resolve_sites(model, (sites or {}).get(name)) for name, model in models.items()}
    given = {name: (sites or {}).get(name) is not None for name in models}
    books: dict[str, _Book] = {}
    ids: list[str] = []
    hasher = _ImageHasher()
    for batch in loader:
        images, batch_ids = _images_and_ids(batch)
        _refuse_repeated(ids, batch_ids)
        ids += batch_ids
        if data_hash is None:
            hasher.update(images, batch_ids)
        for name, model in models.items():
            if name not in books:
                listed = list_sites(model, images[:1], wanted[name], forward)
                listed = _in_order(listed, wanted[name]) if given[name] else listed
                books[name] = _Book(model, listed, policies, tuple(images.shape[-2:]), strict=given[name])
            books[name].write(images, forward)
    if not ids:
        raise ValueError("the loader gave no batch: nothing to record")
    data_hash = data_hash or hasher.digest()
    return {name: book.close(ids, data_hash) for name, book in books.items()}


def _in_order(listed: list[Site], wanted: list[Site]) -> list[Site]:
    """Listed sites, and after them those that did not fire in the listing pass (the recording pass says why)."""
    seen = {site.name for site in listed}
    return listed + [site for site in wanted if site.name not in seen]


class _Book:
    """The rows of one model, growing batch by batch."""

    def __init__(
        self, model: nn.Module, sites: list[Site], policies: Sequence[str], size: tuple[int, int], strict: bool
    ):
        """Sites asked for by name (`strict`) must suit every policy; of default sites, those that do are kept."""
        if not sites:
            raise ValueError("no site to record: the model declares none; name them with their axes")
        self.model, self.sites, self.policies = model, sites, policies
        self.rows: dict[tuple[str, str], list[Tensor]] = {}
        misfits = {(s.name, p): unfit(s, p, size) if s.shape else "" for s in sites for p in policies}
        reasons = [reason for reason in misfits.values() if reason]
        if reasons and strict:
            raise ValueError(reasons[0])
        self.wanted = {site.name: [p for p in policies if not misfits[site.name, p]] for site in sites}

    def write(self, images: Tensor, forward) -> None:
        size = tuple(images.shape[-2:])

        def keep(site: Site, tensor: Tensor) -> dict[str, Tensor]:
            check_batch(site, tensor, len(images))
            return {p: reduce(tensor, site, p, size).clone() for p in self.wanted[site.name]}

        with Listener(self.model, self.sites, keep) as listener:
            run_quietly(self.model, images, forward)
            for name, reduced in listener.take().items():
                for policy, rows in reduced.items():
                    self.rows.setdefault((name, policy), []).append(rows.cpu())

    def close(self, ids: list[str], data_hash: str) -> dict[str, Recording]:
        model_hash = hash_model(self.model)
        recordings = {}
        for policy in self.policies:
            sites = [site for site in self.sites if (site.name, policy) in self.rows]
            features = {site.name: torch.cat(self.rows[site.name, policy]) for site in sites}
            recordings[policy] = Recording(features, list(ids), sites, policy, model_hash, data_hash)
        return recordings


def _images_and_ids(batch) -> tuple[Tensor, list[str]]:
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


def _refuse_repeated(seen: list[str], new: list[str]) -> None:
    repeated = set(seen) & set(new) or {image for image in new if new.count(image) > 1}
    if repeated:
        raise ValueError(f"image id {sorted(repeated)[0]!r} comes twice; every image is recorded once, by its id")


class _ImageHasher:
    """Digest of (id, image) pairs that does not depend on their order or batching."""

    def __init__(self):
        self.parts: list[str] = []

    def update(self, images: Tensor, ids: list[str]) -> None:
        for image, name in zip(images.cpu().contiguous(), ids):
            pixels = image.flatten().view(torch.uint8).numpy().tobytes()  # as bytes: numpy has no bfloat16
            self.parts.append(name + hashlib.sha256(pixels).hexdigest())

    def digest(self) -> str:
        return hashlib.sha256("".join(sorted(self.parts)).encode()).hexdigest()[:16]


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
