"""Trains small networks, convolutional and with attention, on photographs in class folders, from scratch.

With class labels, or without them by SimCLR. The networks are what other studies look into. Each stays in
`networks/LABEL--seed-K/` of the results folder and is never trained twice; accuracies with intervals, costs and
learning curves are written beside them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import pandas as pd
import torch

from classification.classifiers import Classifier, build_classifier, load_classifier, save_classifier
from classification.photos import PhotoSet, load_photos, photo_set, summary_of, synthetic_photos
from classification.probe import linear_probe
from classification.simclr import train_simclr
from classification.training import precision_on, predict, train_classifier, wilson_interval
from costs import flops, latency, parameter_counts
from locks import alone_in
from settings import check_seeds
from studies import classifiers_report as report
from studies.classifier_members import LATER, Member, members_of
from utils import (
    HOME,
    InputError,
    device_name,
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
MEASURED_BY = {"supervised": "its own head", "simclr": "linear probe"}
MAY_GROW = ("networks", "seeds", "jobs")  # what was trained is looked after by each network's own settings


@dataclass
class ClassifiersConfig:
    """
    Args:
        data: 'synthetic', or a folder with train/CLASS/ and val/CLASS/ (Imagenette's layout)
        image_size: side in pixels to which photographs are brought
        networks: label -> name (of timm, or 'torchvision/NAME'), options (of timm.create_model), family (where it is
            not known), and of its own objective, epochs, batch_size, learning_rate, weight_decay, smallest_crop,
            temperature, jitter
        objective: supervised (class labels) or simclr (none), unless a network has its own
        simclr: what is otherwise for networks with objective simclr, such as {epochs: 40, batch_size: 256}
        seeds: of the trainings
        epochs: passes over the training photographs, unless a network has its own
        batch_size: photographs a step
        learning_rate: the highest of the schedule (warm-up, then a cosine to 0)
        weight_decay: of AdamW
        smallest_crop: area of the smallest random crop, as a share of the picture; 1 trains without crops and flips
        temperature: of SimCLR's loss
        jitter: strength of SimCLR's colour jitter
        precision: fp32, bf16, or auto: bf16 on a GPU, fp32 elsewhere
        limits: at most so many photographs a class, such as {train: 50, val: 20}, for quick runs
        synthetic_photos: photographs a class of the synthetic set, by split
        out: results folder; default results/classifiers-DATA
        device: auto, cpu or cuda
        jobs: networks trained at a time, each in a process with its share of the cores; on one GPU they share it
    """

    data: str = "synthetic"
    image_size: int = 64
    networks: dict[str, dict] = field(default_factory=dict)
    objective: str = "supervised"
    simclr: dict[str, int | float] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.002
    weight_decay: float = 0.05
    smallest_crop: float = 0.35
    temperature: float = 0.5
    jitter: float = 0.5
    precision: str = "auto"
    limits: dict[str, int] = field(default_factory=dict)
    synthetic_photos: dict[str, int] = field(default_factory=lambda: {"train": 40, "val": 20})
    out: str | None = None
    device: str = "auto"
    jobs: int = 1

    @property
    def is_synthetic(self) -> bool:
        return self.data == "synthetic"


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
    """label, family, seed, objective and path of every finished network of a results folder."""
    folder = Path(folder)
    rows = []
    for marker in sorted(folder.glob(f"networks/*/{FINISHED}")):
        settings = json.loads(marker.read_text(encoding="utf-8"))["settings"]
        row = {key: settings[key] for key in ("label", "family", "seed")}
        row["objective"] = (LATER | settings["recipe"])["objective"]
        rows.append(row | {"path": str(marker.parent)})
    if not rows:
        raise InputError(f"{folder} holds no finished network; train some with `python experiments.py classifiers`")
    return pd.DataFrame(rows)


def refuse_other_network(folder: Path, member: Member) -> None:
    """Refuse a finished network of this name that was trained otherwise."""
    if not is_finished(folder):
        return
    there, now = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["settings"], member.settings()
    there["recipe"] = LATER | there["recipe"]
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
    threads = min(2, threads) if device.type == "cuda" else threads  # the processes wait for the GPU, not for cores
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
    model, history = train_by(member.recipe.objective)(
        member.spec, tensors["train"], tensors["val"], member.recipe, member.seed, device
    )
    answers = answers_of(model.to(device), tensors)
    seconds = time.perf_counter() - started
    right, n = int((answers == tensors["val"][1]).sum()), len(answers)
    write_table(history, folder / "history.csv")
    about = {"label": member.label, "family": member.family, "seed": member.seed, "objective": member.recipe.objective}
    save_classifier(folder, model.cpu(), about)
    found = {"right": right, "n": n, "seconds": seconds, "answers": digest(answers.tolist())}
    found |= {"precision": precision_on(member.recipe, device), "device": device_name(device)}
    write_text(folder / FINISHED, json.dumps({"settings": member.settings(), "found": found}, indent=1) + "\n")
    by = MEASURED_BY[member.recipe.objective]
    print(f"{member.name}: {right / n:.1%} of {n} photographs ({by}), {format_seconds(seconds)}", flush=True)


def train_by(objective: str) -> Callable:
    """The function that trains by an objective."""
    return {"supervised": train_classifier, "simclr": train_simclr}[objective]


def answers_of(model: Classifier, tensors: Mapping) -> torch.Tensor:
    """(N,) the class of every validation photograph: by the network's head, or without one by a linear probe."""
    if model.spec.classes:
        return predict(model, tensors["val"][0]).argmax(1)
    return torch.from_numpy(linear_probe(model, tensors["train"], tensors["val"][0]))


def row_of(member: Member, folder: Path) -> dict:
    """A network's row of accuracy.csv; what it costs is measured once and kept with it."""
    found = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["found"]
    low, high = wilson_interval(found["right"], found["n"])
    return {
        "label": member.label,
        "family": member.family,
        "name": member.spec.name,
        "seed": member.seed,
        "objective": member.recipe.objective,
        "measured_by": MEASURED_BY[member.recipe.objective],
        **_costs(folder, member.spec.image_size),
        "epochs": member.recipe.epochs,
        "top1": found["right"] / found["n"],
        "low": low,
        "high": high,
        "n": found["n"],
        "seconds": found["seconds"],
        "trained_on": found.get("device", ""),
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
    """The learning curve of one network: label, family, seed, objective, and the columns of its training's history."""
    history = pd.read_csv(network_folder(folder, member) / "history.csv")
    return history.assign(label=member.label, family=member.family, seed=member.seed, objective=member.recipe.objective)


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
    photos = (images, torch.arange(count) % max(1, member.spec.classes))
    recipe = dataclasses.replace(member.recipe, epochs=2)
    _, history = train_by(recipe.objective)(member.spec, photos, photos, recipe, 0, device)
    both = float(history["seconds"].diff().iloc[-1]) / count
    return both * 0.75, both * 0.25  # a backward pass takes about twice a forward pass
