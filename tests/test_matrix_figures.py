"""The figure of the matrix of architectures: what it draws is what the tables say."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

import matrix_figures
import visualization
from utils import InputError

TEXTS = {"title": "What does it follow?", "caption": "n = 9 test images.", "synthetic": True}
FAMILIES = ["CNN", "transformer", "CNN", "hybrid"]
NAMES = ["family", "encoder", "pretraining", "task score"]


def facts(count=4):
    titles = [f"Net {k}" for k in range(count)]
    return pd.DataFrame({"label": [f"n{k}" for k in range(count)], "title": titles, "family": (FAMILIES * 4)[:count]})


def matrix(count=4):
    rows = []
    for part, (a, b) in itertools.product(
        ("encoder", "decoder"), itertools.combinations_with_replacement(range(count), 2)
    ):
        u = 1.0 if a == b else 0.1 * a + 0.01 * b
        line = {"label_a": f"n{a}", "label_b": f"n{b}", "part": part, "u": u, "similarity": u / 2, "ceiling": 0.9}
        rows.append(line | {"verdict": "partial"})
    table = pd.DataFrame(rows)
    enc = table["part"] == "encoder"
    table.loc[enc & (table["label_a"] == "n0") & (table["label_b"] == "n1"), ["u", "similarity"]] = np.nan, 0.33
    table.loc[enc & (table["label_a"] == "n0") & (table["label_b"] == "n2"), "verdict"] = "below chance"
    table.loc[enc & (table["label_a"] == "n1") & (table["label_b"] == "n2"), ["u", "similarity"]] = np.nan
    return table


def factor_table():
    rows = []
    for part, (place, name) in itertools.product(("encoder", "decoder"), enumerate(NAMES)):
        known = {"difference": 0.1 * place, "null_low": -0.1, "null_high": 0.15, "p_holm": 0.01 + 0.1 * place}
        rows.append({"part": part, "quantity": "similarity", "factor": name, "reason": ""} | known)
    table = pd.DataFrame(rows)
    absent = (table["part"] == "decoder") & (table["factor"] == "encoder")
    table.loc[absent, ["difference", "null_low", "null_high", "p_holm"]] = np.nan
    return table


def drawn(count=4):
    return matrix_figures.architecture_matrix(matrix(count), factor_table(), facts(count), **TEXTS)


def words_at(ax):
    return {tuple(map(round, text.get_position())): text.get_text() for text in ax.texts}


def boxes(ax):
    patches = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    return {(round(p.get_x() + 0.5), round(p.get_y() + 0.5)): p for p in patches}


def test_the_figure_asks_a_question_labels_its_axes_and_is_the_same_again(tmp_path):
    figure = drawn()
    assert figure.get_suptitle().endswith("?") and "synthetic" in figure.get_supxlabel()
    assert all(ax.get_xlabel() for ax in figure.axes)
    for name in ("one", "two"):
        visualization.save(drawn(), tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_cells_hold_u_both_ways_round_and_families_stand_together():
    ax = drawn().axes[0]
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names == ["Net 0", "Net 2", "Net 1", "Net 3"] == [tick.get_text() for tick in ax.get_xticklabels()]
    colours = [to_hex(tick.get_color()) for tick in ax.get_yticklabels()]
    assert colours[0] == colours[1] and len(set(colours)) == 3
    words = words_at(ax)
    assert words[3, 1] == words[1, 3] == "0.23"  # Net 2 with Net 3
    assert [line.get_ydata()[0] for line in ax.lines[::2]] == [1.5, 2.5]  # borders after two CNNs and a transformer


def test_the_diagonal_is_the_ceiling_and_cells_without_a_scale_say_so():
    ax = drawn().axes[0]
    words, cells = words_at(ax), boxes(ax)
    assert words[0, 0] == "0.50" and to_hex(cells[0, 0].get_facecolor()) == visualization.RANGE_COLOUR.lower()
    assert words[2, 0] == words[0, 2] == "(0.33)" and to_hex(cells[2, 0].get_facecolor()) == "#ffffff"
    assert words[1, 0] == "0.02" and to_hex(cells[1, 0].get_facecolor()) == to_hex(matrix_figures.GREY)
    assert (2, 1) not in words and cells[2, 1].get_hatch() == "////"
    assert cells[3, 1].get_hatch() is None and to_hex(cells[3, 1].get_facecolor()) not in ("#ffffff", "#d1d1d1")


def test_effects_stand_on_their_null_and_small_p_are_filled():
    ax = drawn().axes[2]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == NAMES
    points = {round(float(line.get_ydata()[0]), 1): line for line in ax.lines if line.get_marker() in ("o", "D")}
    assert len(points) == 7
    assert [points[y].get_xdata()[0] for y in (-0.2, 0.8, 1.8)] == pytest.approx([0, 0.1, 0.2])
    assert points[-0.2].get_markerfacecolor() == visualization.VERMILLION
    assert points[0.8].get_markerfacecolor() == "white"
    ends = {(round(bar.get_x(), 2), round(bar.get_x() + bar.get_width(), 2)) for bar in ax.patches}
    assert ends == {(-0.1, 0.15)}
    assert [text.get_text() for text in ax.texts].count("decoder: not testable") == 1


@pytest.mark.parametrize("count", [2, 6, 14])
def test_labels_of_few_and_of_many_architectures_do_not_overlap(count):
    figure = drawn(count)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for ax in figure.axes[:2]:
        boxes = [text.get_window_extent(renderer) for text in ax.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    first, second = (figure.axes[place].get_tightbbox(renderer) for place in (0, 1))
    effects = figure.axes[2].get_tightbbox(renderer)
    assert first.x1 <= second.x0 and second.x1 <= effects.x0
    assert effects.x1 <= figure.bbox.x1 and effects.y0 >= figure.bbox.y0


def test_tables_that_lack_something_are_refused_by_name():
    with pytest.raises(InputError, match=r"matrix table lacks .*'u'"):
        matrix_figures.architecture_matrix(matrix().drop(columns="u"), factor_table(), facts(), **TEXTS)
    with pytest.raises(InputError, match=r"factor table lacks .*p_holm"):
        matrix_figures.architecture_matrix(matrix(), factor_table().drop(columns="p_holm"), facts(), **TEXTS)
    with pytest.raises(InputError, match="no row for 'n3'"):
        matrix_figures.architecture_matrix(matrix(), factor_table(), facts().iloc[:3], **TEXTS)
