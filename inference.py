"""Door: from a checkpoint to masks, per-image metrics with intervals, and pictures.

`python inference.py --checkpoint runs/unetpp/best --data FOLDER` scores a split; `--images FILE_OR_FOLDER` segments
images that have no masks. Metrics are per image, at the model's input size.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from jsonargparse import CLI
from PIL import Image
from torch import Tensor, nn

import pictures
import visualization
from dataset import IMAGE_SUFFIXES, Sample, find_splits, make_loader
from dataset import SegmentationDataset as Images
from images import Transform, read_pixels
from loss_metrics import image_metrics, summarize
from models import TITLES, lesion_logits, load_model
from utils import (
    InputError,
    progress,
    resolve_device,
    sentences_instead_of_tracebacks,
    write_table,
)

EXAMPLES = 4


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> lesion log-odds (B, 1, H, W) on the CPU, in eval mode."""
    training = model.training
    model.eval()
    try:
        return lesion_logits(model, images.to(next(model.parameters()).device)).float().cpu()
    finally:
        model.train(training)


def score(model: nn.Module, loader: Iterable[Sample], label: str = "scoring") -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """(one row an image: id and metrics; {id: lesion log-odds (1, H, W)}) over a loader."""
    rows, logits = [], {}
    for batch in progress(loader, desc=label, unit="batch"):
        output = predict(model, batch.image)
        rows.append(pd.DataFrame({"id": batch.id} | image_metrics(output > 0, batch.mask > 0.5)))
        logits |= dict(zip(batch.id, output))
    return pd.concat(rows, ignore_index=True), logits


def save_mask(logits: Tensor, size: tuple[int, int], path: Path) -> None:
    """Lesion log-odds (1, H, W) -> {0, 255} PNG of (width, height) pixels: upsampled bilinearly, then cut at 0."""
    full = cv2.resize(logits[0].numpy(), size, interpolation=cv2.INTER_LINEAR)
    Image.fromarray(np.where(full > 0, 255, 0).astype(np.uint8)).save(path)


def segment_files(model: nn.Module, transform: Transform, files: Sequence[Path], out: Path) -> pd.DataFrame:
    """Masks of images without ground truth, at each image's own size, and a table of id and lesion share."""
    rows = []
    for file in progress(files, desc="segmenting", unit="image"):
        pixels, size = read_pixels(file, transform)
        logits = predict(model, torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float()[None] / 255)[0]
        save_mask(logits, size, out / f"{file.stem}_segmentation.png")
        rows.append({"id": file.stem, "lesion_share": float((logits > 0).float().mean())})
    return pd.DataFrame(rows)


def picture(
    dataset: Images,
    logits: dict[str, Tensor],
    metrics: pd.DataFrame,
    name: str,
    *,
    split: str = "test",
    synthetic: bool,
):
    """Side by side: image with its true contour, and the prediction, for the first images of the data set."""
    chosen = [dataset[i] for i in range(min(EXAMPLES, len(dataset)))]
    ids = [sample.id for sample in chosen]
    return pictures.example_predictions(
        torch.stack([sample.image for sample in chosen]).numpy(),
        torch.stack([sample.mask for sample in chosen]).numpy() > 0.5,
        {name: torch.stack([logits[i] for i in ids]).numpy() > 0},
        ids,
        {name: metrics.set_index("id").loc[ids, "iou"].tolist()},
        title="What does the model outline?",
        caption=f"First {split} images in order of id; IoU per image at the model's input size.",
        synthetic=synthetic,
    )


def infer(
    checkpoint: Path,
    data: Path | None = None,
    images: Path | None = None,
    split: str = "test",
    out: Path = Path("runs/inference"),
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Segment a split with masks (metrics, intervals, pictures) or images without.

    Args:
        checkpoint: a folder that train.py wrote, such as runs/unetpp/best
        data: folder in ISIC 2018's layout, to score one of its splits
        images: an image file, or a folder of them, to segment without scoring
        split: train, validation or test, with --data
        out: where masks, tables and pictures go; must be new or empty
        batch_size: images at a time
        device: auto, cpu or cuda
    """
    if (data is None) == (images is None):
        raise InputError("give either --data (a folder with masks, to score) or --images (a file or folder to segment)")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"output folder {out} is a file; choose another with --out")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"output folder {out} is not empty; choose another with --out")
    device_found = resolve_device(device)
    model, extra = load_model(checkpoint)
    model.to(device_found)
    transform = Transform(**{**extra.get("transform", {}), "flips": False})
    if images is not None:
        files = image_files(Path(images))
        refuse_unusable(files, transform)
        out.mkdir(parents=True, exist_ok=True)
        write_table(segment_files(model, transform, files, out), out / "lesion_share.csv")
        print(f"{len(files)} masks in {out}")
        return
    splits = find_splits(data)
    if split not in splits:
        raise InputError(f"{data} has no split {split!r}; it has {', '.join(splits)}")
    dataset = Images(splits[split], transform)
    metrics, logits = score(model, make_loader(dataset, batch_size))
    (out / "masks").mkdir(parents=True, exist_ok=True)
    for pair in dataset.pairs:
        with Image.open(pair.image) as original:
            save_mask(logits[pair.id], original.size, out / "masks" / f"{pair.id}_segmentation.png")
    summary = summarize(metrics)
    write_table(metrics, out / "per_image.csv")
    write_table(summary, out / "summary.csv")
    figure = picture(
        dataset, logits, metrics, TITLES[model.spec.name], split=split, synthetic=extra.get("data") == "synthetic"
    )
    visualization.save(figure, out / "examples.png")
    print(summary.round(4).to_string(index=False))
    print(f"{len(metrics)} images of {split} at {transform.size} px; masks, per-image metrics and pictures in {out}")


def image_files(path: Path) -> list[Path]:
    """The image files of a folder in order of name, or the one file."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"--images {path} is neither a file nor a folder")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"--images {path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files


def refuse_unusable(files: Sequence[Path], transform: Transform) -> None:
    """One InputError, before any mask is written, that names every unreadable file and two files of one name."""
    faults = []
    for name, count in Counter(file.stem for file in files).items():
        if count > 1:
            faults.append(f"{count} images are called {name}: their masks would overwrite each other; rename them")
    for file in progress(files, desc="checking", unit="image"):
        try:
            read_pixels(file, transform)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults[:10]) + (f"; … and {len(faults) - 10} more" if len(faults) > 10 else ""))


if __name__ == "__main__":
    with sentences_instead_of_tracebacks():
        sys.exit(CLI(infer, as_positional=False))
