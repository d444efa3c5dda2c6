"""Figures of the verdict: what they draw is what the tables say."""

import numpy as np
import pandas as pd
import pytest

import verdict_figures as figures
import visualization
from utils import InputError

TEXTS = {"title": "Is it so?", "caption": "n = 9 test images.", "synthetic": True}


def depth_table():
    u = [0.2, 5.0, np.nan, -3.0]
    rows = {"part": ["encoder"] * 4, "relative_depth": [0, 1 / 3, 2 / 3, 1], "u": u}
    return pd.DataFrame(rows | {"u_low": [0.1, 4, np.nan, -4], "u_high": [0.3, 6, np.nan, -2]})


def stitching():
    rows = [("m", "s", kind, kept, kept - 0.1, kept + 0.1) for kind, kept in (("cross", 0.8), ("twin", 0.9))]
    return pd.DataFrame(rows, columns=["receiver", "site_b", "kind", "kept", "low", "high"]).assign(without=0.2)


def legacy():
    numbers = {"published": [0.3, np.nan], "run_1": [0.2, 0.1], "run_2": [0.4, -0.1], "corrected": [0.5, np.nan]}
    return pd.DataFrame({"pair": ["a | b", "c | d"], "measure": "CKA"} | numbers | {"null_high": 0.05, "ceiling": 0.9})


def regions():
    table = pd.DataFrame({"region": ["inside", "outside"] * 2, "part": ["encoder"] * 2 + ["decoder"] * 2})
    return table.assign(similarity=0.4, similarity_low=0.3, similarity_high=0.5, floor=0.1, ceiling=[0.9, 0.05] * 2)


def points(n=12):
    return np.random.default_rng(0).normal(size=(n, 3))


ALL = {
    "position": lambda: figures.position_by_depth(depth_table(), **TEXTS),
    "stitching": lambda: figures.stitched_dice(stitching(), **TEXTS),
    "legacy": lambda: figures.legacy_points(legacy(), **TEXTS),
    "regions": lambda: figures.region_bars(regions(), **TEXTS),
    "space": lambda: figures.shared_space(
        [("CCA", points(), points())], np.arange(12.0), names=("a", "b"), colour_label="share", **TEXTS
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_every_figure_has_a_question_labelled_axes_and_says_when_data_are_synthetic(name, tmp_path):
    figure = ALL[name]()
    assert figure.get_suptitle().endswith("?") and "synthetic" in figure.get_supxlabel()
    assert all(ax.get_xlabel() for ax in figure.axes if ax.get_label() != "<colorbar>")
    visualization.save(figure, tmp_path / "figure.png")
    first = (tmp_path / "figure.png").read_bytes()
    visualization.save(ALL[name](), tmp_path / "again.png")
    assert first == (tmp_path / "again.png").read_bytes()


def test_a_position_beyond_the_axis_is_a_triangle_and_one_without_a_scale_a_cross():
    (ax,) = ALL["position"]().axes
    marks = {line.get_marker(): line.get_xydata().tolist() for line in ax.lines}
    assert marks["^"] == [[pytest.approx(1 / 3), 2.0]] and marks["v"] == [[1.0, -1.0]]
    assert marks["x"] == [[pytest.approx(2 / 3), -1.0]] and marks["o"] == [[0.0, 0.2]]


def test_a_band_is_drawn_only_where_the_ceiling_is_above_the_floor():
    for ax in ALL["regions"]().axes:
        (bar,) = ax.patches
        assert (bar.get_y(), bar.get_height()) == (pytest.approx(0.1), pytest.approx(0.8))


def test_grey_covers_the_cells_that_are_no_more_than_chance():
    frame = pd.DataFrame([[0.1, 0.5], [0.2, 0.6]], index=["a", "b"], columns=["c", "d"])
    chance = pd.DataFrame([[True, False], [True, True]], index=["a", "b"], columns=["c", "d"])
    figure = visualization.planes({"trained": frame}, by_chance={"trained": chance.loc[["b", "a"]]}, **TEXTS)
    covered = figure.axes[0].images[1].get_array()
    assert (~np.ma.getmaskarray(covered) == chance.to_numpy()).all()
    assert "Grey: not told from chance" in figure.get_supxlabel()


@pytest.mark.parametrize("draw, table", [(figures.position_by_depth, depth_table()), (figures.region_bars, regions())])
def test_a_table_without_a_column_is_refused_by_name(draw, table):
    with pytest.raises(InputError, match=r"lacks .*part"):
        draw(table.drop(columns="part"), **TEXTS)
    with pytest.raises(InputError, match="is empty"):
        draw(table.iloc[:0], **TEXTS)
