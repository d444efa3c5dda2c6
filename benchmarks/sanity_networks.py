"""The networks of the sanity check: photographs, a small CNN, its training, the trained ones kept, their recordings.

The network is that paper's Tiny-10 (Kornblith et al. 2019, appendix E) for photographs of 32 × 32 pixels. What is
compared of it, and how, is in `sanity_check`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from similarity import Recording, record_models
from utils import InputError, atomic_path, digest, file_digest, format_seconds, git_commit, progress, seed_everything

SIZE = 32  # pixels a side
CONVOLUTIONS = (  # channels, kernel, stride, padding
    (16, 3, 1, 1),
    (16, 3, 1, 1),
    (32, 3, 2, 1),
    (32, 3, 1, 1),
    (32, 3, 1, 1),
    (64, 3, 2, 1),
    (64, 3, 1, 0),
    (64, 1, 1, 0),
)
FULL = "full"  # a policy of this benchmark: every cell of a map is a feature, as in the paper
LAYERS = tuple(f"layer{number}" for number in range(1, len(CONVOLUTIONS) + 1))
RECIPE = {
    "optimizer": "SGD, Nesterov momentum 0.9, one cycle",
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "batch": 64,
    "augmentation": "horizontal flips, shifts of up to 2 pixels",
}
SHIFT = 2  # pixels
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Photographs:
    """One split: its files, each file's class number, the names of the classes, and a digest of all their bytes."""

    paths: list[Path]
    labels: list[int]
    classes: list[str]
    hash: str

    def ids(self) -> list[str]:
        return [f"{path.parent.name}/{path.stem}" for path in self.paths]

    def load(self, desc: str) -> Tensor:
        """(n, 3, SIZE, SIZE) uint8, read and resized once."""
        files = progress(self.paths, desc=f"reading {desc}", unit="image")
        return torch.from_numpy(np.stack([_read(path) for path in files])).permute(0, 3, 1, 2).contiguous()

    def take(self, places: Sequence[int]) -> Photographs:
        """Only the photographs at these places, in this order."""
        paths, labels = ([kept[i] for i in places] for kept in (self.paths, self.labels))
        return dataclasses.replace(self, paths=paths, labels=labels)


def find_photographs(folder: Path) -> Photographs:
    """The photographs of folder/CLASS/, in order of their names."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; --data needs train/CLASS and val/CLASS folders of photographs")
    classes = sorted(place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    if len(classes) < 2:
        raise InputError(f"{folder} holds {len(classes)} folders of photographs; at least two classes are needed")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise InputError(f"{folder / name} holds no photograph ({', '.join(IMAGE_SUFFIXES)})")
        paths += found
        labels += [label] * len(found)
    return Photographs(paths, labels, classes, digest(*((p.parent.name, p.name, file_digest(p)) for p in paths)))


def check_photographs(photographs: Mapping[str, Photographs], n: int) -> None:
    """Refuse splits of different classes, and fewer than n images to record."""
    train, val = photographs["train"], photographs["val"]
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(f"--data: class folder {odd[0]!r} is in only one of train and val")
    if len(val.paths) < n:
        raise InputError(f"--data has {len(val.paths)} validation images; --n {n} asks for more")


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}); remove it or fetch it again") from error


class Tiny10(nn.Module):
    """Eight convolutions with BatchNorm and ReLU (`layer1` to `layer8`), mean over space, linear: the paper's Tiny-10.

    Takes images in [0, 1], (n, 3, height, width).
    """

    def __init__(self, classes: int):
        super().__init__()
        before = 3
        for name, (width, kernel, stride, padding) in zip(LAYERS, CONVOLUTIONS):
            convolution = nn.Conv2d(before, width, kernel, stride, padding, bias=False)
            self.add_module(name, nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        self.logits = nn.Linear(before, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = ((images - 0.45) / 0.27).contiguous(memory_format=torch.channels_last)
        for name in LAYERS:
            x = getattr(self, name)(x)
        return self.logits(x.mean((2, 3)))


@dataclass(frozen=True)
class Network:
    """A trained network, its share of right answers on all validation images, and the commit that trained it."""

    seed: int
    model: Tiny10
    accuracy: float
    seconds: float
    commit: str


def model_path(folder: Path, seed: int, epochs: int, photographs: Mapping[str, Photographs]) -> Path:
    """Where the network of this seed is kept: by architecture, recipe, epochs and both splits."""
    hashes = {split: found.hash for split, found in photographs.items()}
    key = digest(str(Tiny10(len(photographs["train"].classes))), SIZE, RECIPE, epochs, hashes)
    return folder / f"seed{seed}-{key}.safetensors"


def train_all(
    folder: Path, seeds: Sequence[int], epochs: int, photographs: Mapping[str, Photographs], device: torch.device
) -> list[Network]:
    """Every seed's network, trained or found in `folder`; photographs are read only if one has to be trained."""
    networks: list[Network] = []
    images: dict[str, Tensor] = {}
    for seed in seeds:
        path = model_path(folder, seed, epochs, photographs)
        network = find_network(path, seed, len(photographs["train"].classes))
        if network is None:
            images = images or {split: found.load(split) for split, found in photographs.items()}
            network = train_network(seed, epochs, photographs, images, device)
            keep_network(network, path)
            print(
                f"seed {seed}: trained in {format_seconds(network.seconds)}, {network.accuracy:.1%} right", flush=True
            )
        else:
            print(f"seed {seed}: already trained, {network.accuracy:.1%} right", flush=True)
        networks.append(network)
    return networks


def find_network(path: Path, seed: int, classes: int) -> Network | None:
    """The network kept at `path`; None where there is none or it is damaged."""
    if not path.exists():
        return None
    model = Tiny10(classes)
    try:
        with safe_open(path, framework="pt") as stream:
            kept = stream.metadata()
            model.load_state_dict({name: stream.get_tensor(name) for name in stream.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError, OSError):  # cut short: it is trained again
        return None
    return Network(seed, model.eval(), float(kept["accuracy"]), float(kept["seconds"]), kept["commit"])


def keep_network(network: Network, path: Path) -> None:
    """Write the weights, with what is to be known of the training."""
    known = {"accuracy": repr(network.accuracy), "seconds": repr(network.seconds), "commit": network.commit}
    state = {name: tensor.cpu().contiguous() for name, tensor in network.model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, known)


def train_network(
    seed: int, epochs: int, photographs: Mapping[str, Photographs], images: Mapping[str, Tensor], device: torch.device
) -> Network:
    """One network from scratch: cross entropy, SGD, one cycle; first weights and order of the images by `seed`."""
    started = time.perf_counter()
    seed_everything(seed)
    model = Tiny10(len(photographs["train"].classes)).to(device).train()
    labels = {split: torch.tensor(found.labels) for split, found in photographs.items()}
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * len(list(_batches(len(labels["train"]))))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=RECIPE["learning_rate"], momentum=0.9, nesterov=True, weight_decay=RECIPE["weight_decay"]
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(  # which needs some steps to go up and down in
        optimizer, RECIPE["learning_rate"], total_steps=max(steps, 10), pct_start=0.25
    )
    with progress(total=steps, desc=f"training seed {seed}", unit="batch") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(labels["train"]), generator=generator)
            for batch in _batches(len(order)):
                rows = order[batch]
                loss = _loss(model, augment(images["train"][rows], generator), labels["train"][rows], device)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()
                bar.update()
    model.eval()
    accuracy = score(model, images["val"], labels["val"], device)
    return Network(seed, model.cpu(), accuracy, time.perf_counter() - started, git_commit())


def _batches(n: int) -> Iterator[slice]:
    """Batches of at least two images: BatchNorm needs them."""
    size = RECIPE["batch"]
    yield from (slice(start, start + size) for start in range(0, n, size) if n - start > 1)


def _loss(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    return functional.cross_entropy(model(as_input(images).to(device)), labels.to(device))


def as_input(images: Tensor) -> Tensor:
    """uint8 to [0, 1]."""
    return images.float() / 255


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (n, 3, s, s) flipped or not, and shifted by up to SHIFT pixels each way, its border repeated."""
    n, size = len(images), images.shape[-1]
    flips = torch.rand(n, generator=generator) < 0.5
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2, n), generator=generator)
    columns = torch.arange(size).expand(n, size)
    columns = torch.where(flips[:, None], size - 1 - columns, columns)
    rows = (torch.arange(size) + down[:, None]).clamp(0, size - 1)
    columns = (columns + right[:, None]).clamp(0, size - 1)
    every = torch.arange(n)[:, None, None]
    return images.permute(0, 2, 3, 1)[every, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Share of right answers."""
    right = [
        (model(as_input(images[rows]).to(device)).argmax(1).cpu() == labels[rows]).sum()
        for rows in (slice(start, start + 500) for start in range(0, len(images), 500))
    ]
    return float(sum(right)) / len(images)


def record_all(
    networks: Sequence[Network], photographs: Photographs, n: int, policies: Sequence[str]
) -> dict[str, dict[int, Recording]]:
    """{policy: {seed: Recording}} of the same n photographs, drawn at random; policies of `similarity`, or FULL."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(photographs.paths))[:n])
    sample = photographs.take(chosen.tolist())
    images, ids = as_input(sample.load("val")), sample.ids()
    reductions = tuple(dict.fromkeys(["map" if policy == FULL else policy for policy in policies] + ["gap"]))
    recordings: dict[str, dict[int, Recording]] = {policy: {} for policy in policies}
    for network in networks:  # one by one: full maps are large
        loader = ((images[i : i + 100], ids[i : i + 100]) for i in range(0, n, 100))
        made = record_models({"": network.model}, loader, {"": LAYERS}, reductions)[""]
        for policy in policies:
            recordings[policy][network.seed] = _under(policy, made)
    return recordings


def _under(policy: str, made: Mapping[str, Recording]) -> Recording:
    """One policy's recording; its last layer is the mean over space, which under gap is the last convolution itself."""
    gap, last = made["gap"], LAYERS[-1]
    if policy == "gap":
        return gap
    recording = whole(made["map"]) if policy == FULL else made[policy]
    site = next(site for site in recording.sites if site.name == last)
    return dataclasses.replace(
        recording,
        features=recording.features | {"mean": gap[last]},
        sites=[*recording.sites, dataclasses.replace(site, name="mean")],
    )


def whole(maps: Recording) -> Recording:
    """Every cell of the maps as a feature, centred and rotated into n dimensions: X = RᵀQᵀ becomes Rᵀ, exactly.

    Distances and inner products of centred rows stay; only for measures that see no rotation and no translation.
    """
    features = {}
    for name, tensor in maps.features.items():
        X = tensor.flatten(1).double()
        features[name] = torch.linalg.qr((X - X.mean(0)).T, mode="r").R.T.contiguous()
    return dataclasses.replace(maps, features=features, policy=FULL)
