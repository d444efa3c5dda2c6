"""Figures of explanations: what they draw is what the arrays and tables say."""

import itertools

import numpy as np
import pandas as pd
import pytest

import visualization
from explanations import clusters as mc
from explanations import figures as figures
from explanations import pictures as pictures
from explanations.masks import follows_per_image
from utils import InputError

TEXTS = {"caption": "n = 9 images.", "synthetic": True}
MODELS = ["c0", "t0", "c1", "t1"]
FAMILY = {"c0": "CNN", "c1": "CNN", "t0": "transformer", "t1": "transformer"}


def image(side=12):
    return np.random.default_rng(0).random((3, side, side))


def maps(side=12):
    a, b = np.random.default_rng(1).normal(size=(2, side, side))
    return {"one": {"IG": a, "Grad-CAM": 5 * np.abs(b)}, "two": {"IG": 0.5 * b, "Grad-CAM": "no gradients here"}}


def strips():
    found = {f"{depth} %": 10.0**-depth * np.ones((12, 12)) for depth in (1, 2)}
    return [("one", image(), found), ("two", image(), {"1 %": np.ones((12, 12))})]


def pairs(shift=0.0):
    rows = [(a, b, 0.8 if FAMILY[a] == FAMILY[b] else 0.2) for a, b in itertools.combinations(MODELS, 2)]
    table = pd.DataFrame(rows, columns=["model_a", "model_b", "mean"]).assign(similarity="cosine", method="IG")
    return table.assign(dissimilarity=1 - table["mean"], mean=table["mean"] - shift)


def squares(shift=0.0):
    return [mc.square(pairs(shift), name, diagonal=d) for name, d in (("mean", 1), ("dissimilarity", 0))]


def clusters():
    table = pd.DataFrame({"parameter": [0.5, 1.0, 2.0], "ari": [0.0, 1.0, 0.3], "p_adjusted": [1.0, 0.01, 0.2]})
    return pd.concat([table.assign(method=m, similarity="cosine", clustering="Louvain") for m in ("IG", "SHAP")])


def deletions():
    f = np.linspace(0, 1, 5)
    rows = [pd.DataFrame({"kind": "deletion", "label": "IG", "fraction": f, "score": 1 - f})]
    rows += [pd.DataFrame({"kind": "insertion", "label": "IG", "fraction": f, "score": np.ones(5)})]
    return pd.concat(rows).assign(low=np.nan, high=np.nan)


def agreements():
    x, y, flat = *np.random.default_rng(0).normal(size=(2, 20)), np.ones(20)
    ids = [f"i{i}" for i in range(20)]
    others = {"masks": pd.Series(x, ids), "flat": pd.Series(flat, ids)}
    found = follows_per_image(pd.Series(y, ids), others, area=pd.Series(x + y**2, ids), resamples=50, permutations=50)
    points = [pd.DataFrame({"other": name, "x": values, "y": y}) for name, values in others.items()]
    return pd.concat(points), found


ALL = {
    "grid": lambda: pictures.explanation_grid(image(), maps(), mask=np.tri(12), **TEXTS),
    "strips": lambda: pictures.depth_strips(strips(), **TEXTS),
    "map": lambda: figures.similarity_map(*squares(), FAMILY, **TEXTS),
    "ari": lambda: figures.ari_by_resolution(clusters(), **TEXTS),
    "deletion": lambda: figures.deletion_curves(deletions(), **TEXTS),
    "scatter": lambda: figures.agreement_scatter(*agreements(), **TEXTS),
}


@pytest.mark.parametrize("name", ALL)
def test_every_figure_has_a_question_labels_and_says_when_data_are_synthetic(name, tmp_path):
    figure = ALL[name]()
    assert figure.get_suptitle().endswith("?")
    assert "n = 9 images." in figure.get_supxlabel() and "synthetic" in figure.get_supxlabel()
    drawn = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert all(ax.get_xlabel() or ax.images or ax.patch.get_hatch() for ax in drawn) and drawn[0].get_ylabel()
    visualization.save(figure, tmp_path / "figure.png")
    first = (tmp_path / "figure.png").read_bytes()
    visualization.save(ALL[name](), tmp_path / "again.png")
    assert first == (tmp_path / "again.png").read_bytes()


# ------------------------------------------------------------------------------------------------------------- pictures


def overlays(figure):
    """(name, the signed map) of every axes that has one."""
    return [ax.images[1] for ax in figure.axes if len(ax.images) == 2]


def test_a_row_of_the_grid_has_one_symmetric_scale_to_its_percentile():
    one, two, cam = overlays(ALL["grid"]())
    end = np.percentile(np.abs([maps()["one"]["IG"], maps()["two"]["IG"]]), 99)
    for drawn in (one, two):
        assert (drawn.norm.vmin, drawn.norm.vmax) == (pytest.approx(-end), pytest.approx(end))
    assert cam.norm.vmax == pytest.approx(np.percentile(maps()["one"]["Grad-CAM"], 99))
    assert np.array_equal(one.get_array(), maps()["one"]["IG"]) and one.get_cmap().name == "PuOr_r"
    ticks = [ax.get_yticklabels()[-1].get_text() for ax in ALL["grid"]().axes if ax.get_label() == "<colorbar>"]
    assert ticks == [f"{end:.2g}", f"{cam.norm.vmax:.2g}"]


def test_where_nothing_is_attributed_the_grey_image_is_seen():
    found = np.zeros((12, 12))
    found[3, 4] = -2.0
    (drawn,) = overlays(pictures.explanation_grid(image(), {"one": {"IG": found}}, **TEXTS))
    assert np.array_equal(drawn.get_alpha() > 0, found != 0) and drawn.norm.vmax == 2
    (drawn,) = overlays(pictures.explanation_grid(image(), {"one": {"IG": 0 * found}}, **TEXTS))
    assert not drawn.get_alpha().any()


def test_a_map_that_could_not_be_made_is_hatched_with_its_reason():
    figure = ALL["grid"]()
    (ax,) = [ax for ax in figure.axes if ax.patch.get_hatch()]
    assert ax.texts[0].get_text().replace("\n", " ") == "no gradients here" and not ax.images
    assert "Hatched: no map" in figure.get_supxlabel()
    absent = pictures.depth_strips(strips(), **TEXTS)
    (ax,) = [ax for ax in absent.axes if ax.patch.get_hatch()]
    assert ax.texts[0].get_text() == "not made"


def test_columns_are_models_rows_are_methods_and_depths():
    axes = ALL["grid"]().axes
    assert [ax.get_title() for ax in axes[:3]] == ["image", "one", "two"]
    assert [ax.get_ylabel() for ax in axes[:6:3]] == ["IG", "Grad-CAM"]
    assert [ax.get_title() for ax in ALL["strips"]().axes[:3]] == ["image", "1 % of depth", "2 % of depth"]


def test_every_depth_has_its_own_scale_and_says_it():
    figure = ALL["strips"]()
    assert [drawn.norm.vmax for drawn in overlays(figure)] == pytest.approx([0.1, 0.01, 1])
    assert [text.get_text() for ax in figure.axes[:3] for text in ax.texts] == ["±0.1", "±0.01"]


@pytest.mark.parametrize(
    "words, draw",
    [
        ("its image is", lambda: pictures.explanation_grid(image(), {"m": {"IG": np.ones((3, 3))}})),
        ("NaN", lambda: pictures.explanation_grid(image(), {"m": {"IG": np.full((12, 12), np.nan)}})),
        ("the mask has shape", lambda: pictures.explanation_grid(image(), maps(), mask=np.ones((3, 3)))),
        ("in \\[0, 1\\]", lambda: pictures.explanation_grid(5 * image(), maps())),
        ("no explanation", lambda: pictures.explanation_grid(image(), {})),
        ("no strip", lambda: pictures.depth_strips([])),
        ("no family", lambda: figures.similarity_map(*squares(), {"c0": "CNN"})),
        ("another order", lambda: figures.similarity_map(squares()[0], squares()[1].iloc[::-1, ::-1], FAMILY)),
        ("lacks the columns", lambda: figures.ari_by_resolution(clusters().drop(columns="ari"))),
        ("no Louvain", lambda: figures.ari_by_resolution(clusters().assign(clustering="hierarchical"))),
        ("fractions outside", lambda: figures.deletion_curves(deletions().assign(fraction=50.0))),
        ("several rows", lambda: figures.deletion_curves(pd.concat([deletions()] * 2))),
        ("no row for 'flat'", lambda: figures.agreement_scatter(agreements()[0], agreements()[1].iloc[:1])),
    ],
)
def test_what_cannot_be_drawn_is_refused(words, draw):
    with pytest.raises(InputError, match=words):
        draw()


# --------------------------------------------------------------------------------------------------------------- tables


def test_models_stand_in_the_order_of_the_leaves_in_the_colours_of_their_families():
    ax = ALL["map"]().axes[0]
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert [FAMILY[name] for name in names] in (["CNN"] * 2 + ["transformer"] * 2, ["transformer"] * 2 + ["CNN"] * 2)
    colours = {FAMILY[tick.get_text()]: tick.get_color() for tick in ax.get_xticklabels()}
    assert len(set(colours.values())) == 2
    shown = ax.images[0].get_array()
    assert np.ma.getmaskarray(shown).tolist() == np.eye(4, dtype=bool).tolist()
    assert (shown[0, 1], shown[0, 2]) == (0.8, 0.2)


def test_the_tree_joins_families_at_their_dissimilarity():
    (tree,) = [child for child in ALL["map"]().axes[0].child_axes if child.lines]
    heights = sorted(max(line.get_ydata()) for line in tree.lines)
    assert heights == pytest.approx([0.2, 0.2, 0.8])
    assert max(line.get_xdata()[0] for line in tree.lines) <= 3 and tree.get_xlim() == (-0.5, 3.5)


def test_negative_similarities_are_centred_on_no_colour():
    norm = figures.similarity_map(*squares(0.5), FAMILY).axes[0].images[0].norm
    assert norm.vmin == -norm.vmax == pytest.approx(-0.3)
    positive = ALL["map"]().axes[0].images[0].norm
    assert (positive.vmin, positive.vmax) == (0, 0.8)


def test_an_index_is_filled_where_its_adjusted_p_is_below_5_percent():
    lines = [line for line in ALL["ari"]().axes[0].lines if line.get_marker() not in ("", "None")]
    curve, filled = lines[:2]
    assert list(curve.get_ydata()) == [0.0, 1.0, 0.3] and curve.get_markerfacecolor() == "white"
    assert list(filled.get_ydata()) == [1.0] and filled.get_xdata()[0] == pytest.approx(curve.get_xdata()[1])


def test_the_legend_of_deletion_curves_has_the_area_under_each():
    labels = [ax.get_legend().texts[0].get_text() for ax in ALL["deletion"]().axes]
    assert labels == ["IG: 0.50", "IG: 1.00"]


def test_the_scatter_has_every_image_and_the_correlation_in_words():
    points, found = agreements()
    masks, flat = figures.agreement_scatter(points, found).axes
    assert len(masks.lines[0].get_xdata()) == 20 and "constant" in flat.get_title()
    assert f"Spearman {found['spearman'][0]:.2f}".replace("-", "−") in masks.get_title()
    assert "for equal area" in masks.get_title()
