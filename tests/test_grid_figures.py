"""Figures of a grid of runs: what they draw is what the tables say."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.text import Text

import grid_figures as figures
import visualization
from utils import InputError

TEXTS = {"caption": "n = 9 test images, three seeds.", "synthetic": True}
LABELS = ("DINOv2", "CLIP", "from scratch")
FRACTIONS = (0.01, 0.05, 1.0)


def data_table():
    rows = [(label, f, 0.5 + 0.1 * i + 0.1 * f, 3) for i, label in enumerate(LABELS) for f in FRACTIONS]
    table = pd.DataFrame(rows, columns=["encoder", "fraction", "iou", "n_seeds"])
    return table.assign(low=table["iou"] - 0.02, high=table["iou"] + 0.02)


def history():
    rows = [(label, seed, epoch) for label in LABELS[:2] for seed in (0, 1) for epoch in (1, 2, 3)]
    table = pd.DataFrame(rows, columns=["label", "seed", "epoch"])
    return table.assign(train_loss=1 / table["epoch"], validation_iou=[np.nan, 0.5, 0.6] * 4)


def cost_table():
    """Ten models, several of them close to each other."""
    names = [f"architecture {i}" for i in range(10)]
    table = pd.DataFrame({"label": names, "gflops": [28, 6, 7, 5.5, 5, 1.7, 30, 12, 26, 33], "latency_ms_1": 12.5})
    iou = np.array([0.74, 0.76, 0.77, 0.758, 0.75, 0.745, 0.765, 0.78, 0.79, 0.792])
    parameters = np.array([35, 14, 16, 13, 12, 3.7, 37, 47, 45, 105]) * 1e6
    return table.assign(parameters=parameters, iou=iou, low=iou - 0.015, high=iou + 0.015)


MATRIX = np.array([[900, 50, 50], [0, 0, 0], [1000, 500, 2500]])
NAMES = ["background", "pet", "border"]
ALL = {
    "data": lambda: figures.data_curve(data_table(), **TEXTS),
    "confusion": lambda: figures.confusion_matrix(MATRIX, NAMES, **TEXTS),
    "loss": lambda: figures.loss_curves(history(), **TEXTS),
    "cost": lambda: figures.cost_scatter(cost_table(), **TEXTS),
}


def lines_with_marks(ax):
    return [line for line in ax.lines if len(line.get_xdata())]


def segments(ax):
    """The (x, y) end points of all intervals drawn, as one array (number, 2, 2)."""
    return np.concatenate([part.get_segments() for part in ax.collections if hasattr(part, "get_segments")])


@pytest.mark.parametrize("name", ALL)
def test_every_figure_has_a_question_labelled_axes_and_says_when_data_are_synthetic(name, tmp_path):
    figure = ALL[name]()
    assert figure.get_suptitle().endswith("?")
    assert "n = 9" in figure.get_supxlabel() and "synthetic" in figure.get_supxlabel()
    drawn = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in drawn)
    visualization.save(figure, tmp_path / "figure.png")
    visualization.save(ALL[name](), tmp_path / "again.png")
    assert (tmp_path / "figure.png").read_bytes() == (tmp_path / "again.png").read_bytes()


@pytest.mark.parametrize(
    "draw, table",
    [
        (figures.data_curve, data_table().rename(columns={"encoder": "label"})),
        (figures.loss_curves, history()),
        (figures.cost_scatter, cost_table()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_empty_tables_and_missing_columns_are_refused(draw, table):
    with pytest.raises(InputError, match="empty"):
        draw(table.iloc[:0])
    for column in table.columns:
        with pytest.raises(InputError, match=rf"lacks the columns \['{column}'\]"):
            draw(table.drop(columns=column))


# ---- data -------------------------------------------------------------------------------------------------------


def test_the_data_axis_has_a_tick_for_each_share_present_and_a_curve_for_each_label():
    figure = figures.data_curve(data_table(), **TEXTS)
    ax = figure.axes[0]
    assert ax.get_xscale() == "log" and [t.get_text() for t in ax.get_xticklabels()] == ["1", "5", "100"]
    curves = lines_with_marks(ax)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{label} (3 seeds)" for label in LABELS]
    assert len({(line.get_color(), line.get_marker()) for line in curves}) == 3
    for line, (_, rows) in zip(curves, data_table().groupby("encoder", sort=False)):
        assert list(line.get_ydata()) == list(rows["iou"])


def test_intervals_at_one_share_stand_beside_each_other_and_reach_from_low_to_high():
    ax = figures.data_curve(data_table(), **TEXTS).axes[0]
    drawn, table = segments(ax), data_table()
    assert len(drawn) == len(table) and len(np.unique(drawn[:, 0, 0])) == len(table)
    assert drawn[:, :, 1] == pytest.approx(table[["low", "high"]].to_numpy())
    assert drawn[:, 0, 0] == pytest.approx(100 * table["fraction"].to_numpy(), rel=0.1)


def test_a_point_without_interval_is_drawn_without_one():
    table = data_table()
    table.loc[0, ["low", "high"]] = np.nan
    ax = figures.data_curve(table, **TEXTS).axes[0]
    assert len(segments(ax)) == len(table) - 1 and sum(len(line.get_xdata()) for line in ax.lines) == len(table)


def test_more_labels_than_colours_still_look_different():
    table = pd.concat([data_table().iloc[:3].assign(encoder=f"encoder {i}") for i in range(20)])
    lines = lines_with_marks(figures.data_curve(table, **TEXTS).axes[0])
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


def test_percent_in_place_of_fractions_and_several_rows_a_point_are_refused():
    with pytest.raises(InputError, match=r"0\.05"):
        figures.data_curve(data_table().assign(fraction=25))
    with pytest.raises(InputError, match="several rows"):
        figures.data_curve(pd.concat([data_table(), data_table()]))


# ---- confusion --------------------------------------------------------------------------------------------------


def test_cells_hold_the_share_of_the_row_and_the_pixels():
    ax = figures.confusion_matrix(MATRIX, NAMES, **TEXTS).axes[0]
    words = {text.get_position(): text.get_text() for text in ax.texts}
    assert words[(0, 0)] == "0.900\n900" and words[(2, 2)] == "0.625\n2.5k" and words[(1, 2)] == "0.125\n500"
    assert [t.get_text() for t in ax.get_xticklabels()] == NAMES == [t.get_text() for t in ax.get_yticklabels()]


@pytest.mark.parametrize("names", [NAMES, ["a", "b", "c"], ["a name of some length", "b", "c"]])
def test_the_axes_labels_lie_within_the_picture(names):
    figure = figures.confusion_matrix(MATRIX, names, **TEXTS)
    whole = figure.bbox.extents
    for label in (figure.axes[0].yaxis.label, figure.axes[0].xaxis.label, figure.axes[1].yaxis.label):
        box = label.get_window_extent().extents
        assert (box[:2] >= whole[:2]).all() and (box[2:] <= whole[2:]).all()


def test_a_class_without_pixels_has_no_numbers_and_the_caption_says_so():
    figure = figures.confusion_matrix(MATRIX, NAMES, **TEXTS)
    assert {text.get_position()[1] for text in figure.axes[0].texts} == {0, 2}
    assert "no pixel" in figure.get_supxlabel()


def test_the_numbers_stand_out_from_their_cells():
    matrix = np.array([[100 - share, share] for share in (3, 45)])
    ax = figures.confusion_matrix(matrix, ["a", "b"]).axes[0]
    image = ax.images[0]

    def luminance(colour):  # WCAG 2: relative luminance of an sRGB colour
        parts = np.array(to_rgba(colour)[:3])
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)

    for text in ax.texts:
        column, row = text.get_position()
        cell = image.cmap(image.norm(matrix[row, column] / matrix[row].sum()))
        light, dark = sorted((luminance(cell), luminance(text.get_color())), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5  # the contrast that WCAG 2 asks of small text


@pytest.mark.parametrize(
    "matrix, names, words",
    [
        (np.ones((2, 3)), ["a", "b"], "a row and a column"),
        (np.ones((2, 2)), ["a"], "a row and a column"),
        (np.zeros((2, 2)), ["a", "b"], "nothing to draw"),
        (np.zeros((0, 0)), [], "a row and a column"),
        (np.full((2, 2), -1), ["a", "b"], "negative"),
    ],
)
def test_matrices_that_cannot_be_drawn_are_refused(matrix, names, words):
    with pytest.raises(InputError, match=words):
        figures.confusion_matrix(matrix, names)


# ---- curves, costs, scores --------------------------------------------------------------------------------------


def test_each_run_is_a_line_in_both_panels_and_unvalidated_epochs_are_left_out():
    figure = figures.loss_curves(history(), **TEXTS)
    left, right = figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("training loss, each network's own", "validation IoU")
    assert len(left.lines) == len(right.lines) == 4
    assert list(left.lines[0].get_xdata()) == [1, 2, 3] and list(right.lines[0].get_xdata()) == [2, 3]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == [*LABELS[:2], "seed 0", "seed 1"]


def test_marks_areas_are_in_proportion_to_the_parameters():
    table = cost_table()
    ax = figures.cost_scatter(table, **TEXTS).axes[0]
    marks = next(part for part in ax.collections if not hasattr(part, "get_segments"))
    assert ax.get_xscale() == "log"
    assert np.asarray(marks.get_offsets()) == pytest.approx(table[["gflops", "iou"]].to_numpy())
    sizes = marks.get_sizes()
    assert sizes / sizes.max() == pytest.approx(table["parameters"] / table["parameters"].max())


def test_labels_of_crowded_models_cover_neither_each_other_nor_a_mark():
    figure = figures.cost_scatter(cost_table(), **TEXTS)
    ax = figure.axes[0]
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # an annotation's own holds its line, too
    assert {text.get_text() for text in ax.texts} == {f"architecture {i}, 12.5 ms" for i in range(10)}
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    centres = ax.transData.transform(cost_table()[["gflops", "iou"]].to_numpy())
    assert not any(box.contains(*centre) for box in boxes for centre in centres)


def test_models_without_operations_are_refused():
    with pytest.raises(InputError, match="above 0"):
        figures.cost_scatter(cost_table().assign(gflops=0.0))
