"""Door: from checkpoints to masks, per-image metrics with intervals, and pictures.

`python inference.py --checkpoint runs/unetpp/best --data FOLDER` scores a split; `--images FILE_OR_FOLDER` segments
images that have no masks. Metrics are per image, at the model's input size or, with `--full_resolution`, at each
image's own size, as the ISIC challenge scores. `--checkpoint` given several times is an ensemble; `--flips` averages
each model's answers to the eight flipped and turned views. Averages are of probabilities, not of log-odds: there one
answer that is sure of itself would outvote all the others.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid
from torch.utils.data import DataLoader

import pictures
import visualization
from class_metrics import class_scores
from dataset import IMAGE_SUFFIXES, Sample, class_pixels, find_splits, make_loader
from dataset import SegmentationDataset as Images
from images import Transform, read_mask, read_pixels
from loss_metrics import image_metrics, summarize
from models import TITLES, decided, load_model, pixel_logits
from settings import check_id
from utils import (
    InputError,
    arguments_in_a_sentence,
    peak_memory,
    progress,
    refuse_place,
    resolve_device,
    sentences_instead_of_tracebacks,
    write_table,
)

EXAMPLES = 4
WORST = 10
VIEWS = [(mirrored, turns) for mirrored in (False, True) for turns in range(4)]  # the square's eight symmetries

Models = nn.Module | Sequence[nn.Module]


# ---- predicting -------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: Models, images: Tensor, flips: bool = False) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> lesion log-odds (B, 1, H, W), or C classes' logits, on the CPU, in eval mode.

    Of several models: the log-odds of their mean probability. `flips`: each model's mean over the eight flips and
    quarter turns of the images, turned back; the answer to a flipped image is then exactly the flipped answer.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    if not models:
        raise InputError("a prediction by no model was asked for; give at least one")
    return mean_log_odds([_predict_one(each, images, flips) for each in models])


def _predict_one(model: nn.Module, images: Tensor, flips: bool) -> Tensor:
    images, training = images.to(next(model.parameters()).device), model.training
    model.eval()
    try:
        if not flips:
            return pixel_logits(model, images).float().cpu()
        views = ((view, pixel_logits(model, _turned(images, *view))) for view in VIEWS)
        return mean_log_odds([_turned_back(logits.float().cpu(), *view) for view, logits in views])
    finally:
        model.train(training)


def _turned(images: Tensor, mirrored: bool, turns: int) -> Tensor:
    return (images.flip(-1) if mirrored else images).rot90(turns, (-2, -1)).contiguous()


def _turned_back(maps: Tensor, mirrored: bool, turns: int) -> Tensor:
    maps = maps.rot90(-turns, (-2, -1))
    return maps.flip(-1) if mirrored else maps


def mean_log_odds(answers: Sequence[Tensor]) -> Tensor:
    """Log-odds of the mean probability of K answers of log-odds, of any one shape; of one answer: itself.

    log Σ σ(x) − log Σ σ(−x), in log space because probabilities round to 1 from log-odds of 17 on. The answers are
    sorted first, pixel by pixel, so that their order does not show even in the last bit. Of answers (B, C, H, W) with
    C > 1 classes: log Σ softmax(x), up to a constant.
    """
    if len(answers) == 1:
        return answers[0]
    if answers[0].ndim == 4 and answers[0].shape[1] > 1:
        shares = np.sort(torch.stack([log_softmax(answer, 1) for answer in answers]).numpy(), axis=0)
        return functools.reduce(torch.logaddexp, torch.from_numpy(shares))
    ordered = torch.from_numpy(np.sort(torch.stack(list(answers)).numpy(), axis=0))
    lesion, skin = (functools.reduce(torch.logaddexp, logsigmoid(sign * ordered)) for sign in (1, -1))
    return lesion - skin


def _answers(
    model: Models, loader: Iterable[Sample], label: str, flips: bool = False
) -> Iterator[tuple[Sample, Tensor]]:
    for batch in progress(loader, desc=label, unit="batch"):
        yield batch, predict(model, batch.image, flips)


# ---- scoring ----------------------------------------------------------------------------------------------------


def score(
    model: Models, loader: Iterable[Sample], label: str = "scoring", flips: bool = False
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """(one row an image: id and metrics; {id: log-odds (1, H, W), or C classes' logits}) over a loader."""
    rows, logits = [], {}
    for batch, output in _answers(model, loader, label, flips):
        rows.append(_at_input_size(batch, output))
        logits |= dict(zip(batch.id, output))
    return pd.concat(rows, ignore_index=True), logits


def score_split(
    model: Models,
    loader: DataLoader,
    *,
    flips: bool = False,
    full_resolution: bool = False,
    masks: Path | None = None,
) -> pd.DataFrame:
    """One row an image: id and metrics, over a loader of a data set; `masks`: a folder for the predicted masks, too.

    `full_resolution`: the log-odds are upsampled bilinearly to the size of the image's own mask, cut at 0 and compared
    with that mask as it is in its file; the table then has the columns width and height in pixels. One batch at the
    model's size and one image at its own are in memory, however many there are.
    """
    pairs, values = {pair.id: pair for pair in loader.dataset.pairs}, loader.dataset.transform.values
    rows = []
    for batch, output in _answers(model, loader, "scoring", flips):
        if not full_resolution:
            rows.append(_at_input_size(batch, output))
        for id_, logits in zip(batch.id, output):
            if full_resolution:
                rows.append(_at_own_size(id_, logits, read_mask(pairs[id_].mask, values)))
            if masks is not None:
                with Image.open(pairs[id_].image) as original:  # reads the header only
                    save_mask(logits, original.size, masks / f"{id_}_segmentation.png", values)
    return pd.concat(rows, ignore_index=True)


def _at_input_size(batch: Sample, logits: Tensor) -> pd.DataFrame:
    return pd.DataFrame({"id": batch.id} | image_scores(logits, batch.mask))


def image_scores(logits: Tensor, masks: Tensor) -> dict[str, np.ndarray]:
    """Metrics of each image, (B,): of lesion log-odds (B, 1, H, W), or of logits of C classes against their indices."""
    if logits.shape[1] == 1:
        return image_metrics(logits > 0, masks > 0.5)
    return class_scores(decided(logits), masks, logits.shape[1])


def _at_own_size(id_: str, logits: Tensor, truth: np.ndarray) -> pd.DataFrame:
    """The row of one image: log-odds (1, h, w), or logits of classes, against its mask (H, W)."""
    height, width = truth.shape
    prediction, truth = (torch.from_numpy(x)[None] for x in (own_size(logits, (width, height)), truth))
    several = len(logits) > 1
    metrics = class_scores(prediction, truth.long(), len(logits)) if several else image_metrics(prediction > 0, truth)
    return pd.DataFrame({"id": [id_], "width": width, "height": height} | metrics)


def own_size(logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Log-odds (1, h, w), or logits (C, h, w), -> labels (H, W) int64, size (W, H) in pixels: resized, then decided."""
    maps = [cv2.resize(part.numpy(), size, interpolation=cv2.INTER_LINEAR) for part in logits]
    return decided(torch.from_numpy(np.stack(maps))[None])[0, 0].numpy()


def save_mask(logits: Tensor, size: tuple[int, int], path: Path, values: Sequence[Sequence[int]] = ()) -> None:
    """Log-odds (1, h, w), or logits, -> PNG of (width, height) pixels: {0, 255}, or the data's own value of each class.

    values : of each class, its mask values in the data; the first is written
    """
    labels = own_size(logits, size)
    written = [each[0] for each in values] or [0, 255]
    Image.fromarray(np.array(written, np.uint8)[labels]).save(path)


# ---- images without masks ---------------------------------------------------------------------------------------


def segment_files(
    model: Models, transform: Transform, files: Sequence[Path], out: Path, flips: bool = False
) -> pd.DataFrame:
    """Masks of images without ground truth, at each image's own size, and a table of id and lesion share."""
    rows = []
    for file in progress(files, desc="segmenting", unit="image"):
        pixels, size = read_pixels(file, transform)
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255
        logits = predict(model, image[None], flips)[0]
        save_mask(logits, size, out / f"{file.stem}_segmentation.png", transform.values)
        rows.append({"id": file.stem} | _shares(logits))
    return pd.DataFrame(rows)


def _shares(logits: Tensor) -> dict[str, float]:
    """The share of an image's pixels that is lesion, or that each class but the first has."""
    labels = decided(logits[None])
    if len(logits) == 1:
        return {"lesion_share": float(labels.float().mean())}
    return {f"share_of_class_{label}": float((labels == label).float().mean()) for label in range(1, len(logits))}


# ---- pictures ---------------------------------------------------------------------------------------------------


def picture(
    dataset: Images,
    logits: dict[str, Tensor],
    metrics: pd.DataFrame,
    name: str,
    *,
    worst: bool = False,
    split: str = "test",
    synthetic: bool,
):
    """Side by side: image with its true contour, and the prediction; the first images, or those of lowest IoU."""
    if worst:
        ids = worst_ids(metrics)
        title = "Which images does the model get most wrong?"
        which = f"The {len(ids)} of {len(metrics)} {split} images with the lowest IoU"
    else:
        ids, title, which = first_ids(dataset), "What does the model outline?", f"First {split} images in order of id"
    place = {id_: index for index, id_ in enumerate(dataset.ids)}
    chosen = [dataset[place[id_]] for id_ in ids]
    return pictures.example_predictions(
        torch.stack([sample.image for sample in chosen]).numpy(),
        torch.stack([sample.mask for sample in chosen]).numpy(),
        {name: decided(torch.stack([logits[id_] for id_ in ids])).numpy()},
        ids,
        {name: metrics.set_index("id").loc[list(ids), "iou"].tolist()},
        title=title,
        caption=f"{which}; {_which_iou(metrics)}.",
        synthetic=synthetic,
    )


def first_ids(dataset: Images) -> list[str]:
    return dataset.ids[:EXAMPLES]


def worst_ids(metrics: pd.DataFrame) -> list[str]:
    return metrics.nsmallest(WORST, "iou")["id"].tolist()


def _which_iou(metrics: pd.DataFrame) -> str:
    place = "each image's own size, drawn at the model's input size" if "width" in metrics else "the model's input size"
    return f"IoU per image at {place}"


# ---- the door ---------------------------------------------------------------------------------------------------


def infer(
    checkpoint: Path | list[Path],
    data: Path | None = None,
    images: Path | None = None,
    split: str = "test",
    out: Path = Path("runs/inference"),
    batch_size: int = 16,
    device: str = "auto",
    flips: bool = False,
    full_resolution: bool = False,
    layout: str = "auto",
    mask_values: Sequence[Sequence[int]] = (),
) -> None:
    """Segment a split with masks (metrics, intervals, pictures) or images without.

    Args:
        checkpoint: a folder that train.py wrote, such as runs/unetpp/best; given several times, the mean of their
            probabilities
        data: folder in ISIC 2018's layout, to score one of its splits
        images: an image file, or a folder of them, to segment without scoring
        split: train, validation or test, with --data
        out: where masks, tables and pictures go; must be new or empty
        batch_size: images at a time
        device: auto, cpu or cuda
        flips: mean probability over the eight flips and quarter turns of each image; takes eight times as long
        full_resolution: score at each image's own size, against its mask as it is, as the ISIC challenge does
        layout: of --data: auto, isic, pet or folder
        mask_values: for each class of the model the values that mean it in the masks of --data, where they are others
            than those it was trained on, such as [[2], [1, 3]] for background and pet
    """
    if (data is None) == (images is None):
        raise InputError("give either --data (a folder with masks, to score) or --images (a file or folder to segment)")
    if full_resolution and images is not None:
        raise InputError("--full_resolution is for --data; with --images every mask has its image's own size anyway")
    out = Path(out)
    refuse_place(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"output folder {out} is not empty; choose another with --out")
    device_found = resolve_device(device)
    models, transform, synthetic = load_ensemble(checkpoint)
    for model in models:
        model.to(device_found)
    if images is not None:
        files = image_files(Path(images))
        refuse_unusable(files, transform)
        out.mkdir(parents=True, exist_ok=True)
        write_table(segment_files(models, transform, files, out, flips), out / "lesion_share.csv")
        print(f"{len(files)} masks in {out}")
        return
    if mask_values:
        transform = dataclasses.replace(transform, values=tuple(map(tuple, mask_values)))
    splits = find_splits(data, layout=layout)
    if split not in splits:
        raise InputError(f"{data} has no split {split!r}; it has {', '.join(splits)}")
    images_of_split = Images(splits[split], transform)
    refuse_unlabelled(images_of_split)
    loader = make_loader(images_of_split, batch_size)
    options = {"flips": flips, "full_resolution": full_resolution}
    _score_into(out, models, loader, options, {"split": split, "synthetic": synthetic})


def refuse_unlabelled(images: Images) -> None:
    """Refuse masks that hold no class but the first, where there are several: they mean something else."""
    if images.transform.num_classes > 2 and not class_pixels(images.pairs, images.transform).sum(0)[1:-1].any():
        raise InputError(
            f"the masks hold none of the {images.transform.num_classes - 1} classes after the first one that the model "
            "was trained on; say with --mask_values which of their values mean which class"
        )


def load_ensemble(checkpoints: Path | Sequence[Path]) -> tuple[list[nn.Module], Transform, bool]:
    """(the models, the transform they share without augmentation, whether any was trained on synthetic images)."""
    folders = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if not folders:
        raise InputError("--checkpoint names no folder; give at least one that train.py wrote")
    models, extras = zip(*(load_model(folder) for folder in folders))
    transforms = [_transform_of(folder, extra) for folder, extra in zip(folders, extras)]
    for folder, transform in zip(folders, transforms):
        if transform != transforms[0]:
            raise InputError(
                f"{folders[0]} was trained on {_in_words(transforms[0])}, {folder} on {_in_words(transform)}; models "
                "answer together only at one size: score them one at a time, or train them on the same images"
            )
    return list(models), transforms[0], any(extra.get("data") == "synthetic" for extra in extras)


def _transform_of(folder: Path, extra: dict) -> Transform:
    """What a checkpoint says of its images, without augmentation."""
    try:
        return Transform(**extra.get("transform", {})).unaugmented
    except TypeError as error:
        raise InputError(f"{folder}/model.json: its transform is damaged or of another program ({error})") from error


def _in_words(transform: Transform) -> str:
    classes = f", {transform.num_classes} classes" if transform.values else ""
    return f"images of {transform.size} px (blur {transform.blur:g}, {transform.interpolation}{classes})"


def _score_into(out: Path, models: list[nn.Module], loader: DataLoader, options: dict, labels: dict) -> None:
    """Write masks, tables and pictures of a split into a folder; `options` of `score_split`, `labels` of `picture`."""
    dataset = loader.dataset
    (out / "masks").mkdir(parents=True, exist_ok=True)
    metrics = score_split(models, loader, masks=out / "masks", **options)
    summary = summarize(metrics)
    write_table(metrics, out / "per_image.csv")
    write_table(summary, out / "summary.csv")
    shown = dict.fromkeys(first_ids(dataset) + worst_ids(metrics))
    # asked again, one by one: keeping all log-odds would take a gigabyte for a thousand images of 512 px
    images = {id_: dataset[dataset.ids.index(id_)].image for id_ in shown}
    logits = {id_: predict(models, image[None], options["flips"])[0] for id_, image in images.items()}
    name = TITLES[models[0].spec.name] if len(models) == 1 else f"mean of {len(models)} models"
    for file, worst in (("examples.png", False), ("worst.png", True)):
        visualization.save(picture(dataset, logits, metrics, name, worst=worst, **labels), out / file)
    print(summary.round(4).to_string(index=False))
    where = "at their own sizes" if options["full_resolution"] else f"at {dataset.transform.size} px"
    print(
        f"{len(metrics)} images of {labels['split']} {where}; masks, per-image metrics and pictures in {out}, "
        f"the worst in worst.png; {peak_memory(next(models[0].parameters()).device)}"
    )


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
            check_id(file.stem)
            read_pixels(file, transform)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults[:10]) + (f"; … and {len(faults) - 10} more" if len(faults) > 10 else ""))


def repeatable(arguments: Sequence[str], option: str = "--checkpoint") -> list[str]:
    """The same arguments with every further `--checkpoint` as `--checkpoint+`: else the parser keeps the last alone."""
    seen, result = False, []
    for argument in arguments:
        if argument == option or argument.startswith(f"{option}="):
            result.append(option + "+" * seen + argument.removeprefix(option))
            seen = True
        else:
            result.append(argument)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """What `infer` does, from a command line."""
    arguments = repeatable(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(prog="python inference.py", description=infer.__doc__, exit_on_error=False)
    parser.add_function_arguments(infer)
    with arguments_in_a_sentence("python inference.py", inspect.signature(infer).parameters):
        settings = parser.instantiate(parser.parse_args(arguments))
    infer(**settings.as_dict())


if __name__ == "__main__":
    with sentences_instead_of_tracebacks("delete what it had written, or choose another --out, to begin anew"):
        main()
