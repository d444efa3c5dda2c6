"""Trains small classifiers, convolutional and with attention, on photographs in class folders, from scratch.

The networks are what the explanation study asks what they look at. Each stays in `networks/LABEL--seed-K/` of the
results folder and is never trained twice; accuracies with intervals, costs and learning curves are written beside them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import pandas as pd
import torch

from classification.classifiers import (
    FAMILIES,
    ClassifierSpec,
    build_classifier,
    check_spec,
    family_of,
    load_classifier,
    save_classifier,
)
from classification.photos import PhotoSet, load_photos, photo_set, summary_of, synthetic_photos
from classification.training import (
    ClassifierRecipe,
    accuracy,
    check_recipe,
    predict,
    train_classifier,
    wilson_interval,
)
from costs import flops, latency, parameter_counts
from locks import alone_in
from settings import check_seeds
from studies import classifiers_report as report
from utils import (
    HOME,
    InputError,
    closest,
    digest,
    format_seconds,
    open_run,
    refuse_other_run,
    resolve_device,
    write_table,
    write_text,
)

SYNTHETIC = HOME / "data"  # where the synthetic photographs are drawn
FINISHED = "finished.json"  # written last: a network without it is trained again
OWN_RECIPE = ("epochs", "batch_size", "learning_rate", "weight_decay")
OF_A_NETWORK = ("name", "options", "family", "image_size", *OWN_RECIPE)
MAY_GROW = ("networks", "seeds", "jobs")  # what was trained is looked after by each network's own settings


@dataclass
class ClassifiersConfig:
    """
    Args:
        data: 'synthetic', or a folder with train/CLASS/ and val/CLASS/ (Imagenette's layout)
        image_size: side in pixels to which photographs are brought
        networks: label -> name (of timm), options (of timm.create_model), family (where timm's is not known), and of
            its own epochs, batch_size, learning_rate, weight_decay
        seeds: of the trainings
        epochs: passes over the training photographs, unless a network has its own
        batch_size: photographs a step
        learning_rate: the highest of the schedule (warm-up, then a cosine to 0)
        weight_decay: of AdamW
        smallest_crop: area of the smallest random crop, as a share of the picture; 1 trains without augmentation
        limits: at most so many photographs a class, such as {train: 50, val: 20}, for quick runs
        synthetic_photos: photographs a class of the synthetic set, by split
        out: results folder; default results/classifiers-DATA
        device: auto, cpu or cuda
        jobs: networks trained at a time, each in a process with its share of the cores
    """

    data: str = "synthetic"
    image_size: int = 64
    networks: dict[str, dict] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.002
    weight_decay: float = 0.05
    smallest_crop: float = 0.35
    limits: dict[str, int] = field(default_factory=dict)
    synthetic_photos: dict[str, int] = field(default_factory=lambda: {"train": 40, "val": 20})
    out: str | None = None
    device: str = "auto"
    jobs: int = 1

    @property
    def is_synthetic(self) -> bool:
        return self.data == "synthetic"


@dataclass(frozen=True)
class Member:
    """One network of the study, and all that its training depends on beside the photographs."""

    label: str
    family: str
    spec: ClassifierSpec
    recipe: ClassifierRecipe
    seed: int

    @property
    def name(self) -> str:
        return f"{self.label}--seed-{self.seed}"

    def settings(self) -> dict:
        """What must be the same for a finished network to be taken as this one."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def run(config: ClassifiersConfig) -> Path:
    """Train what is missing, measure all; returns the results folder."""
    config, members, photos, folder = prepare(config)
    device = resolve_device(config.device)
    with alone_in(folder):
        todo = [member for member in members if not is_finished(network_folder(folder, member))]
        print(f"{estimate(config, todo, photos, device)} Results: {folder}", flush=True)
        if todo:
            train_all(config, todo, photos, folder, device)
        rows = [pd.DataFrame([row_of(member, network_folder(folder, member))]) for member in members]
        table = pd.concat(rows, ignore_index=True)
        write_table(table, folder / "accuracy.csv")
        history = pd.concat([history_of(member, folder) for member in members], ignore_index=True)
        report.write(folder, table, history, summary_of(photos), config)
    return folder


def prepare(config: ClassifiersConfig) -> tuple[ClassifiersConfig, list[Member], dict[str, PhotoSet], Path]:
    """Everything that can be refused, before anything long."""
    config = settle(config)
    device = resolve_device(config.device)
    refuse_other_run(Path(config.out), dataclasses.asdict(config), MAY_GROW)
    photos = open_photos(config)
    members = members_of(config, len(photos["train"].classes))
    for member in {member.label: member for member in members}.values():
        build_classifier(member.spec)  # options that do not fit each other
    _refuse_other_photos(Path(config.out), photos)
    for member in members:
        refuse_other_network(network_folder(Path(config.out), member), member)
    folder = open_run(Path(config.out), dataclasses.asdict(config), device, MAY_GROW)
    write_text(folder / "data.json", json.dumps(summary_of(photos), indent=1) + "\n")
    return config, members, photos, folder


def settle(config: ClassifiersConfig) -> ClassifiersConfig:
    """Choose the results folder, and refuse settings that cannot run."""
    if not config.networks:
        raise InputError("networks is empty; name at least one, such as {ResNet: {name: resnet18}}")
    check_seeds(config.seeds)
    if config.jobs < 1 or config.image_size < 8:
        raise InputError(
            f"jobs must be at least 1 and image_size at least 8, got {config.jobs} and {config.image_size}"
        )
    for setting in ("limits", "synthetic_photos"):
        for split, count in getattr(config, setting).items():
            if split not in ("train", "val") or count < 1:
                raise InputError(f"{setting}: give at least 1 for 'train' and 'val', got {split!r}: {count}")
    data = "synthetic" if config.is_synthetic else Path(config.data).resolve().name
    return dataclasses.replace(config, out=str(config.out or f"results/classifiers-{data}"))


def open_photos(config: ClassifiersConfig) -> dict[str, PhotoSet]:
    """Both splits, within the limits."""
    folder, photos = photo_folder(config), {}
    for split in ("train", "val"):
        whole = photo_set(folder, split)
        photos[split] = whole.part(whole.rows(config.limits.get(split)))
    return photos


def photo_folder(config: ClassifiersConfig) -> Path:
    """Where the photographs are; the synthetic set is drawn where it is not there yet."""
    if not config.is_synthetic:
        return Path(config.data)
    counts = {"train": 40, "val": 20} | config.synthetic_photos
    words = f"{counts['train']}-{counts['val']}-{config.image_size}px"
    return synthetic_photos(SYNTHETIC / f"synthetic-photos-{words}", counts, config.image_size)


def members_of(config: ClassifiersConfig, classes: int) -> list[Member]:
    """networks × seeds; names, options and recipes are checked here, options against each other when it is built."""
    members = []
    for label, settings in config.networks.items():
        if not label or set(label) & set("/\\:") or label.startswith(".") or "--" in label:
            raise InputError(f"networks: {label!r} names a folder, so it needs letters, and no slash, colon or '--'")
        spec, recipe, family = _of_network(config, label, settings, classes)
        members += [Member(label, family, spec, recipe, seed) for seed in config.seeds]
    return members


def _of_network(
    config: ClassifiersConfig, label: str, settings: Mapping, classes: int
) -> tuple[ClassifierSpec, ClassifierRecipe, str]:
    for key in settings:
        if key not in OF_A_NETWORK:
            raise InputError(f"networks: {label}: unknown setting {key!r}; closest: {closest(key, OF_A_NETWORK)}")
    if "name" not in settings:
        raise InputError(f"networks: {label} has no name; give one of timm's, such as name: resnet18")
    spec = ClassifierSpec(
        settings["name"], dict(settings.get("options", {})), classes=classes, image_size=config.image_size
    )
    check_spec(spec)
    own = {key: settings.get(key, getattr(config, key)) for key in OWN_RECIPE}
    recipe = ClassifierRecipe(**own, smallest_crop=config.smallest_crop)
    check_recipe(recipe, label)
    family = settings.get("family") or family_of(spec.name)
    if family not in FAMILIES:
        raise InputError(f"networks: {label}: family {family!r} is none of {', '.join(FAMILIES)}")
    return spec, recipe, family


def _refuse_other_photos(folder: Path, photos: Mapping[str, PhotoSet]) -> None:
    known = folder / "data.json"
    if known.exists() and json.loads(known.read_text(encoding="utf-8")) != summary_of(photos):
        raise InputError(f"{folder} holds networks that were trained on other photographs; choose another --out")


# ---- the networks -----------------------------------------------------------------------------------------------


def network_folder(folder: Path, member: Member) -> Path:
    return folder / "networks" / member.name


def is_finished(folder: Path) -> bool:
    """Whether a network's training came to its end."""
    return (folder / FINISHED).is_file()


def networks(folder: Path) -> pd.DataFrame:
    """label, family, seed and path of every finished network of a results folder, for the studies that use them."""
    folder = Path(folder)
    rows = []
    for marker in sorted(folder.glob(f"networks/*/{FINISHED}")):
        settings = json.loads(marker.read_text(encoding="utf-8"))["settings"]
        rows.append({key: settings[key] for key in ("label", "family", "seed")} | {"path": str(marker.parent)})
    if not rows:
        raise InputError(f"{folder} holds no finished network; train some with `python experiments.py classifiers`")
    return pd.DataFrame(rows)


def refuse_other_network(folder: Path, member: Member) -> None:
    """Refuse a finished network of this name that was trained otherwise."""
    if not is_finished(folder):
        return
    there, now = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["settings"], member.settings()
    different = [key for key in now if there.get(key) != now[key]]
    if different:
        key = different[0]
        raise InputError(
            f"{folder} is finished with other settings ({key}: {there.get(key)} there, {now[key]} now); choose another "
            "label or --out, or delete that folder"
        )


def train_all(
    config: ClassifiersConfig, todo: list[Member], photos: Mapping[str, PhotoSet], folder: Path, device: torch.device
) -> None:
    """Train every network that is missing; what is finished stays when one fails or all is killed."""
    tensors = {split: load_photos(photos[split], config.image_size) for split in ("train", "val")}
    jobs = min(config.jobs, len(todo))
    if jobs == 1:
        for member in todo:
            train_member(member, tensors, network_folder(folder, member), device)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    work = (
        joblib.delayed(train_member)(member, tensors, network_folder(folder, member), device, threads)
        for member in todo
    )
    joblib.Parallel(n_jobs=jobs)(work)


def train_member(
    member: Member, tensors: Mapping, folder: Path, device: torch.device, threads: int | None = None
) -> None:
    """Train one network and keep it; the marker that it is finished is written last."""
    if threads is not None:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    model, history = train_classifier(member.spec, tensors["train"], tensors["val"], member.recipe, member.seed, device)
    images, labels = tensors["val"]
    logits = predict(model.to(device), images)
    seconds = time.perf_counter() - started
    share = accuracy(logits, labels)
    write_table(history, folder / "history.csv")
    save_classifier(folder, model.cpu(), {"label": member.label, "family": member.family, "seed": member.seed})
    found = {"right": round(share * len(labels)), "n": len(labels), "seconds": seconds}
    found["answers"] = digest(logits.argmax(1).tolist())
    write_text(folder / FINISHED, json.dumps({"settings": member.settings(), "found": found}, indent=1) + "\n")
    print(f"{member.name}: {share:.1%} of {len(labels)} photographs, {format_seconds(seconds)}", flush=True)


def row_of(member: Member, folder: Path) -> dict:
    """A network's row of accuracy.csv; what it costs is measured once and kept with it."""
    found = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["found"]
    low, high = wilson_interval(found["right"], found["n"])
    return {
        "label": member.label,
        "family": member.family,
        "name": member.spec.name,
        "seed": member.seed,
        **_costs(folder, member.spec.image_size),
        "epochs": member.recipe.epochs,
        "top1": found["right"] / found["n"],
        "low": low,
        "high": high,
        "n": found["n"],
        "seconds": found["seconds"],
    }


def _costs(folder: Path, image_size: int) -> dict[str, float]:
    file = folder / "costs.json"
    if not file.exists():
        model, _ = load_classifier(folder)
        times = latency(model, image_size, batch=16, repeats=10, warmup=2)
        about = {"parameters": parameter_counts(model)[0], "gflops": flops(model, image_size) / 1e9}
        write_text(file, json.dumps(about | {"ms_an_image": times["median"]}) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


def history_of(member: Member, folder: Path) -> pd.DataFrame:
    """The learning curve of one network: label, family, seed, and the columns of `train_classifier`."""
    history = pd.read_csv(network_folder(folder, member) / "history.csv")
    return history.assign(label=member.label, family=member.family, seed=member.seed)


# ---- estimate ---------------------------------------------------------------------------------------------------


def estimate(
    config: ClassifiersConfig, todo: list[Member], photos: Mapping[str, PhotoSet], device: torch.device
) -> str:
    """One sentence: how long the trainings will take here, from a timed step of every network."""
    if not todo:
        return "All networks are finished; the tables follow."
    steps = {member.label: time_a_photo(member, device) for member in {m.label: m for m in todo}.values()}
    seconds = 10.0
    for member in todo:
        learning, asking = steps[member.label]
        seconds += member.recipe.epochs * (len(photos["train"]) * learning + len(photos["val"]) * asking)
    counts = f"{len(photos['train'])} photographs"
    return f"{len(todo)} trainings on {counts}: about {format_seconds(seconds / config.jobs)} on this machine."


def time_a_photo(member: Member, device: torch.device) -> tuple[float, float]:
    """Seconds a photograph of training and of answering, from the second of two steps of a training on noise."""
    size, count = member.spec.image_size, member.recipe.batch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % member.spec.classes
    recipe = dataclasses.replace(member.recipe, epochs=2)
    _, history = train_classifier(member.spec, (images, labels), (images, labels), recipe, 0, device)
    both = float(history["seconds"].diff().iloc[-1]) / count
    return both * 0.75, both * 0.25  # a backward pass takes about twice a forward pass
