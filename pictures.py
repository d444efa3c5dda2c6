"""Pictures: what the models outline, and what their sites see, drawn on the images themselves.

Principal components of feature maps become colours here; planes, curves and rulers are in `visualization.py`, whose
conventions (title, caption, `synthetic`, no pyplot) hold here too.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.linalg import orthogonal_procrustes
from torch.nn import functional

from utils import InputError
from visualization import SKY, YELLOW, new_figure, settle

COLOURS = 128  # of a figure shown in a notebook: a fifth of the bytes
PERCENTILES = (2, 98)  # of each component's scores, mapped to no colour and full colour


def show(picture: Figure | Path | str) -> None:
    """In a notebook: a figure, or a picture file of a results folder, in few colours: the notebook stays small."""
    from IPython.display import Image, display  # of a notebook only

    whole, small = io.BytesIO(), io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(whole, dpi=150)
        picture = whole
    PIL.Image.open(picture).convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
    display(Image(small.getvalue()))


def _picture_grid(rows: int, columns: int, *, heading: float = 0.3, **texts) -> tuple[Figure, np.ndarray]:
    """Square pictures of 1.45 inches without ticks, under column headings `heading` inches high."""
    figure = new_figure(columns * 1.45 + 0.2, rows * 1.45 + heading + 0.2, **texts)
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.05, wspace=0, hspace=0)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def _pictures(images) -> np.ndarray:
    """(k, 3, H, W) in [0, 1] to (k, H, W, 3)."""
    images = np.asarray(images, dtype=np.float64)
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images have shape {images.shape}; (k, 3, H, W) is needed")
    if not (images.min() >= 0 and images.max() <= 1):
        raise InputError(f"images span {images.min():.3g} to {images.max():.3g}; undo the normalisation to get [0, 1]")
    return images.transpose(0, 2, 3, 1)


def _outline(ax: Axes, mask: np.ndarray, colour: str) -> None:
    for style, label in zip(itertools.cycle(["solid", "dashed", "dotted"]), np.unique(mask[(mask > 0) & (mask < 255)])):
        inside = mask == label
        if inside.all():  # no border to draw
            continue
        options = {"levels": [0.5], "colors": colour, "linewidths": 1.3, "linestyles": style}
        lines = ax.contour(np.pad(inside.astype(float), 1), **options)
        lines.set_path_effects([withStroke(linewidth=2.4, foreground="black", alpha=0.6)])


def _note(ax: Axes, text: str) -> None:
    box = {"facecolor": "black", "alpha": 0.6, "pad": 1.5, "edgecolor": "none"}
    ax.text(0.03, 0.03, text, transform=ax.transAxes, color="white", fontsize=7, va="bottom", bbox=box)


def example_predictions(
    images: np.ndarray,
    masks: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    ids: Sequence[str],
    scores: Mapping[str, Sequence[float]],
    *,
    title: str = "What do the models outline?",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """One row an image: the image with the true outline, then each model's outline beside the true one.

    images (k, 3, H, W) in [0, 1]; masks (k, 1, H, W) in {0, 1} or of class indices; predictions: model -> bool or
    class indices (k, 1, H, W); every class but the first is outlined, each in its own line style;
    scores: model -> k per-image IoU values, written into the pictures.
    """
    pictures, masks = _pictures(images), np.asarray(masks)
    k, size = len(pictures), pictures.shape[1:3]
    shapes = {"masks": masks.shape, **{name: np.shape(prediction) for name, prediction in predictions.items()}}
    for name, shape in shapes.items():
        if shape != (k, 1, *size):
            raise InputError(f"{name} have shape {shape}; {(k, 1, *size)} is needed, as the images'")
    if len(ids) != k or any(len(scores[name]) != k for name in predictions):
        raise InputError(f"{k} images need {k} ids and {k} scores of each model")
    note = "Yellow: true outline; blue: predicted outline"
    texts = {"title": title, "caption": caption, "synthetic": synthetic, "note": note}
    figure, axes = _picture_grid(k, 1 + len(predictions), **texts)
    names = ["true outline", *predictions]
    for (row, column), ax in np.ndenumerate(axes):
        ax.imshow(pictures[row], extent=(0.5, size[1] + 0.5, size[0] + 0.5, 0.5))  # masks are padded by one pixel
        _outline(ax, masks[row, 0], YELLOW)
        if column:
            prediction = np.asarray(predictions[names[column]])[row, 0]
            _outline(ax, prediction, SKY)
            _note(ax, f"IoU {scores[names[column]][row]:.2f}" + ("" if prediction.any() else ", nothing found"))
        elif not masks[row, 0].any():
            _note(ax, "no lesion")
        if row == 0:
            ax.set_title(names[column], fontsize=9)
        if column == 0:
            ax.set_ylabel(ids[row], fontsize=7)
        ax.set(xlim=(0.5, size[1] + 0.5), ylim=(size[0] + 0.5, 0.5))
    return settle(figure)


def gallery(
    images: np.ndarray,
    masks: np.ndarray,
    ids: Sequence[str],
    *,
    title: str = "What is to be outlined?",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """A row of images (k, 3, H, W) in [0, 1] with the outlines of their masks (k, 1, H, W), their ids below."""
    pictures, masks = _pictures(images), np.asarray(masks)
    k, size = len(pictures), pictures.shape[1:3]
    if masks.shape != (k, 1, *size) or len(ids) != k:
        raise InputError(f"{k} images need masks of shape {(k, 1, *size)} and {k} ids, got {masks.shape}, {len(ids)}")
    texts = {"title": title, "caption": caption, "synthetic": synthetic, "note": "Yellow: outline of the mask"}
    figure, axes = _picture_grid(1, k, **texts)
    for ax, picture, mask, name in zip(axes[0], pictures, masks, ids):
        ax.imshow(picture, extent=(0.5, size[1] + 0.5, size[0] + 0.5, 0.5))  # masks are padded by one pixel
        _outline(ax, mask[0], YELLOW)
        ax.set_xlabel(name, fontsize=7)
        ax.set(xlim=(0.5, size[1] + 0.5), ylim=(size[0] + 0.5, 0.5))
    return settle(figure)


def pca_scores(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first three principal components over all pixels of all k maps together.

    maps (k, C, h, w) -> scores (k, 3, h, w) in units of the maps, and each component's share of the variance (3,).
    Components that do not exist (fewer than three channels, or a lower rank at the maps' own float precision) have
    zero scores and share 0. Signs are fixed so that each component's largest loading is positive.
    """
    maps = np.asarray(maps)
    if maps.ndim != 4 or not np.isfinite(maps).all():
        raise InputError(f"maps have shape {maps.shape}; a finite (k, C, h, w) is needed")
    k, channels, height, width = maps.shape
    pixels = maps.transpose(0, 2, 3, 1).reshape(-1, channels).astype(np.float64)
    rounding = np.finfo(maps.dtype).eps * np.abs(pixels).max() if maps.dtype.kind == "f" else 0.0
    for _ in range(2):  # the second pass removes what rounding left of a large mean
        pixels -= pixels.mean(axis=0)
    left, values, loadings = np.linalg.svd(pixels, full_matrices=False)
    tolerance = rounding * (np.sqrt(len(pixels)) + np.sqrt(channels))  # largest singular value of pure rounding
    kept = min(3, int((values > tolerance).sum()))
    scores, share = np.zeros((len(pixels), 3)), np.zeros(3)
    if kept:
        strongest = np.abs(loadings[:kept]).argmax(axis=1)
        signs = np.sign(loadings[np.arange(kept), strongest])
        scores[:, :kept] = left[:, :kept] * values[:kept] * signs
        share[:kept] = values[:kept] ** 2 / (values**2).sum()
    return scores.reshape(k, height, width, 3).transpose(0, 3, 1, 2), share


def rotate_onto(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`scores` (k, 3, h2, w2) rotated (or reflected) onto `target` (k, 3, h, w) by orthogonal Procrustes.

    The rotation is found on the target's grid, to which the scores are resized bilinearly, and applied to the scores
    on their own grid: no detail is lost, and no component is stretched.
    """
    if len(scores) != len(target) or scores.shape[1] != 3 or target.shape[1] != 3:
        raise InputError(
            f"scores of shapes {scores.shape} and {target.shape}; (k, 3, h, w) of the same k images needed"
        )
    resized = functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(scores)), size=target.shape[2:], mode="bilinear", antialias=True
    ).numpy()
    rotation, _ = orthogonal_procrustes(*(side.transpose(0, 2, 3, 1).reshape(-1, 3) for side in (resized, target)))
    return np.einsum("kchw,cd->kdhw", scores, rotation)


def scores_to_rgb(scores: np.ndarray) -> np.ndarray:
    """(k, 3, h, w) scores to (k, h, w, 3) colours in [0, 1]: 2nd to 98th percentile of each component over all images.

    A component without spread is mid-grey (0.5).
    """
    low, high = np.percentile(scores, PERCENTILES, axis=(0, 2, 3), keepdims=True)
    spread = high - low
    scaled = np.divide(scores - low, spread, out=np.full_like(scores, 0.5), where=spread > 0)
    return scaled.clip(0, 1).transpose(0, 2, 3, 1)  # beyond the stated percentiles a colour is saturated


def pca_rgb(
    maps_a: np.ndarray,
    maps_b: np.ndarray,
    images: np.ndarray,
    ids: Sequence[str],
    labels: tuple[str, str],
    *,
    title: str = "Do the two sites see the same regions?",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """One row an image: the image, A's map (k, C, h, w) and B's map (k, D, h2, w2) as colours; see `pca_rgb_grid`."""
    pair = (labels[0], maps_a, labels[1], maps_b)
    return pca_rgb_grid([pair], images, ids, title=title, caption=caption, synthetic=synthetic)


def pca_rgb_grid(
    rows: Sequence[tuple[str, np.ndarray, str, np.ndarray]],
    images: np.ndarray,
    ids: Sequence[str],
    *,
    title: str = "Do matched sites see the same regions?",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """One row an image; columns: the image, then A's and B's map of each matched pair of sites as colours.

    rows : matched pairs (label of A, maps of A (k, C, h, w), label of B, maps of B (k, D, h2, w2)). Three principal
    components a site, over all pixels of all k images, give red, green and blue; B's are rotated onto A's.
    """
    pictures = _pictures(images)
    for label_a, maps_a, label_b, maps_b in rows:
        if not len(maps_a) == len(maps_b) == len(ids) == len(pictures):
            counts = f"{len(maps_a)} maps of {label_a}, {len(maps_b)} of {label_b}, {len(ids)} ids"
            raise InputError(f"{len(pictures)} images, but {counts}; each needs one row an image, in the same order")
    columns, incomplete = [("image", "", pictures)], False
    for label_a, maps_a, label_b, maps_b in rows:
        (scores_a, share_a), (scores_b, share_b) = pca_scores(maps_a), pca_scores(maps_b)
        columns.append((label_a, f"{share_a.sum():.0%}", scores_to_rgb(scores_a)))
        columns.append((label_b, f"{share_b.sum():.0%}", scores_to_rgb(rotate_onto(scores_b, scores_a))))
        incomplete |= bool((share_a == 0).any() or (share_b == 0).any())
    note = (
        "Colours: first three principal components of each site over all pixels of all images shown, scaled from the "
        f"{PERCENTILES[0]}nd to the {PERCENTILES[1]}th percentile; the right site of each pair is rotated onto the "
        "left one by orthogonal Procrustes, so that colours compare within a pair only. "
        "Percentages: variance the three components hold."
    )
    note += " A component that a site lacks is mid-grey." if incomplete else ""
    texts = {"title": title, "caption": caption, "synthetic": synthetic, "note": note}
    figure, axes = _picture_grid(len(pictures), len(columns), heading=0.5, **texts)
    for (row, column), ax in np.ndenumerate(axes):
        name, share, content = columns[column]
        ax.imshow(content[row], interpolation="nearest")
        if row == 0:
            ax.set_title("\n".join(textwrap.wrap(name, 20) + [share] * bool(share)), fontsize=7.5)
        if column == 0:
            ax.set_ylabel(ids[row], fontsize=7)
    return settle(figure)
