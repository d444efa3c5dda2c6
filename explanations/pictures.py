"""Pictures of explanations: signed maps over the grey image, by model and method or by depth.

Takes arrays, returns Figures in the manner of `visualization`. Maps are PuOr, centred on 0: orange speaks for the
prediction, purple against it. Tables about explanations are drawn in `figures`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from utils import InputError
from visualization import BLUE, new_figure, settle

SIGNED = "PuOr_r"
PERCENTILE = 99  # of |attribution|: the end of a scale
PICTURE = 1.35  # inches
Picture = np.ndarray | str  # a map (H, W), or why there is none


def explanation_grid(
    image: np.ndarray,
    maps: Mapping[str, Mapping[str, Picture]],
    *,
    mask: np.ndarray | None = None,
    title: str = "Where does each model look, by each method?",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """A row a method, a column a model: its map over the grey image, after the image itself.

    image : (3, H, W) in [0, 1]; maps : model -> method -> signed map (H, W), or the reason why there is none, which is
    written into a hatched square; mask : (H, W), outlined in all of them
    The scale of a row is symmetric and ends at the 99th percentile of |attribution| of all its maps: within a method,
    models compare.
    """
    methods = list(dict.fromkeys(method for of_model in maps.values() for method in of_model))
    if not methods:
        raise InputError("no explanation was given; give {model: {method: map (H, W)}}")
    rows = [(method, image, [maps[model].get(method, "not made") for model in maps]) for method in methods]
    texts = {"title": title, "caption": caption, "synthetic": synthetic}
    return _overlays(rows, list(maps), mask, per_row=True, **texts)


def depth_strips(
    strips: Sequence[tuple[str, np.ndarray, Mapping[str, Picture]]],
    *,
    title: str = "Where does a model look, by depth?",
    caption: str = "",
    synthetic: bool = False,
) -> Figure:
    """A row a strip (label, image (3, H, W) in [0, 1], {depth such as '25 %': map (H, W) or reason}).

    Gradients differ by orders of magnitude along the depth: every map has its own scale, written into it.
    """
    depths = list(dict.fromkeys(depth for _, _, of_depth in strips for depth in of_depth))
    if not depths:
        raise InputError("no strip was given; give [(label, image, {depth: map (H, W)})]")
    rows = [(label, image, [found.get(depth, "not made") for depth in depths]) for label, image, found in strips]
    texts = {"title": title, "caption": caption, "synthetic": synthetic}
    return _overlays(rows, [f"{depth} of depth" for depth in depths], None, per_row=False, **texts)


def _overlays(rows: Sequence[tuple], columns: list[str], mask: np.ndarray | None, *, per_row: bool, **texts) -> Figure:
    """A row (label, image, maps): the image and the maps over it."""
    whose = "of a row" if per_row else "of a picture (± its end)"
    note = f"Orange: for the prediction, purple: against it. Scale {whose}: symmetric, to the {PERCENTILE}th percentile"
    note += " of |attribution|; beyond, colours are saturated"
    note += ". Blue: outline of the mask" if mask is not None else ""
    if any(isinstance(found, str) for _, _, maps in rows for found in maps):
        note += ". Hatched: no map"
    width, height = PICTURE * (1 + len(columns)) + 0.4 + 0.8 * per_row, PICTURE * len(rows) + 0.6
    figure = new_figure(width, height, note=note, **texts)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), 1 + len(columns), squeeze=False)
    for (label, image, maps), line in zip(rows, axes):
        grey = _grey(image)
        ends = [_end([found], grey.shape) for found in maps]
        shared = _end(maps, grey.shape)
        _bare(line[0], "\n".join(textwrap.wrap(label, 18)))
        line[0].imshow(np.moveaxis(image, 0, -1), interpolation="nearest")
        if mask is not None:
            _outline(line[0], mask, grey.shape)
        for ax, found, end in zip(line[1:], maps, ends):
            _bare(ax)
            _overlay(ax, grey, found, shared if per_row else end, "" if per_row else f"±{end:.2g}")
            if mask is not None and not isinstance(found, str):
                _outline(ax, mask, grey.shape)
        if per_row:
            _scale(figure, line, shared)
    for ax, name in zip(axes[0], ["image", *columns]):
        ax.set_title("\n".join(textwrap.wrap(name, 16)), fontsize=8)
    return settle(figure)


def _grey(image: np.ndarray) -> np.ndarray:
    """(H, W) brightness, 0 to 1, of a (3, H, W) image (ITU-R BT.601)."""
    image = np.asarray(image, dtype=float)
    if image.ndim != 3 or image.shape[0] != 3 or not (image.min() >= 0 and image.max() <= 1):
        raise InputError(
            f"an image has shape {image.shape}, {image.min():.3g} to {image.max():.3g}; (3, H, W) in [0, 1]"
        )
    return np.tensordot([0.299, 0.587, 0.114], image, 1)


def _end(maps: Sequence[Picture], shape: tuple[int, int]) -> float:
    """The 99th percentile of |attribution|; where that is 0 the maximum, and 1 of maps that are 0 or absent."""
    found = [np.abs(np.asarray(each, dtype=float)) for each in maps if not isinstance(each, str)]
    for each in found:
        if each.shape != shape or not np.isfinite(each).all():
            raise InputError(
                f"a map has shape {each.shape} or holds NaN; its image is {shape}: give finite maps that fit"
            )
    if not found:
        return 1.0
    return float(np.percentile(found, PERCENTILE) or np.max(found) or 1.0)


def _overlay(ax: Axes, grey: np.ndarray, found: Picture, end: float, words: str) -> None:
    if isinstance(found, str):
        ax.patch.set(facecolor="0.88", hatch="//////", edgecolor="0.65")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
        ax.text(0.5, 0.5, textwrap.fill(found, 18), ha="center", va="center", fontsize=6.5, bbox=box)
        return
    strength = np.minimum(np.abs(np.asarray(found, dtype=float)) / end, 1)  # of the ink, not of a measure
    ax.imshow(0.35 + 0.65 * grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.imshow(found, cmap=SIGNED, norm=Normalize(-end, end), alpha=strength**0.5, interpolation="nearest")
    if words:
        box = {"facecolor": "black", "alpha": 0.6, "pad": 1.2, "edgecolor": "none"}
        ax.text(0.03, 0.03, words, transform=ax.transAxes, color="white", fontsize=6, va="bottom", bbox=box)


def _scale(figure: Figure, line: Sequence[Axes], end: float) -> None:
    bar = figure.colorbar(ScalarMappable(Normalize(-end, end), SIGNED), ax=list(line), fraction=0.03, pad=0.01)
    bar.set_ticks([-end, 0, end], labels=[f"−{end:.2g}", "0", f"{end:.2g}"], fontsize=6.5)
    bar.set_label("attribution", fontsize=7)


def _bare(ax: Axes, label: str = "") -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_ylabel(label, fontsize=8)


def _outline(ax: Axes, mask: np.ndarray, shape: tuple[int, int]) -> None:
    mask = np.asarray(mask, dtype=float)
    if mask.shape != shape:
        raise InputError(f"the mask has shape {mask.shape}, its image {shape}; resize one to the other")
    if 0 < mask.mean() < 1:
        ax.contour(mask, levels=[0.5], colors=BLUE, linewidths=1.1)
