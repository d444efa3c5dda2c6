"""What the figures promise: labels, captions, hatched gaps, comparable colours, the same bytes; looks are for eyes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import ortho_group

import pictures
import visualization as viz
from utils import InputError

RNG = np.random.default_rng(0)
K, SIZE = 3, 24
IMAGES = RNG.random((K, 3, SIZE, SIZE))
IDS = [f"ISIC_{i:07d}" for i in range(K)]


def plane(rows: int = 5, columns: int = 4, low: float = 0.0, high: float = 0.9) -> pd.DataFrame:
    values = np.linspace(low, high, rows * columns).reshape(rows, columns)
    return pd.DataFrame(values, [f"encoder.a{i}" for i in range(rows)], [f"encoder.b{i}" for i in range(columns)])


def one_plane(values: pd.DataFrame, title: str, xlabel: str, ylabel: str, **options) -> Figure:
    return viz.planes({title: values}, title=title, xlabel=xlabel, ylabel=ylabel, **options)


def history() -> pd.DataFrame:
    rows = [(m, s, e, 1 / e, 1 / e, 1 - 1 / e) for m in ("one", "two") for s in (0, 1) for e in (1, 2, 3)]
    columns = ["model", "seed", "epoch", "train_loss", "validation_loss", "validation_iou"]
    return pd.DataFrame(rows, columns=columns)


def ruler_table() -> pd.DataFrame:
    columns = ["measure", "policy", "part", "similarity", "low", "high", "ceiling", "floor", "null_high"]
    rows = [
        ("CKA", "gap", "encoder", 0.5, 0.4, 0.6, 0.9, 0.1, 0.05),
        ("CKA", "gap", "decoder", 0.2, np.nan, np.nan, 0.8, 0.1, 0.05),
        ("RSA", "gap", "encoder", 0.3, 0.2, 0.4, np.nan, np.nan, np.nan),
    ]
    return pd.DataFrame(rows, columns=columns)


def depth_table() -> pd.DataFrame:
    rows = [(part, x, 0.5, 0.9, 0.1) for part in ("encoder", "decoder") for x in (0, 0.5, 1)]
    return pd.DataFrame(rows, columns=["part", "relative_depth", "similarity", "ceiling", "floor"])


def masks() -> np.ndarray:
    result = np.zeros((K, 1, SIZE, SIZE))
    result[0, 0, 5:15, 5:15] = result[1, 0, :8] = 1  # the third image has no lesion, the second touches the border
    return result


def examples(**options) -> Figure:
    truth = masks()
    predictions = {"one": truth > 0, "two": np.zeros_like(truth, dtype=bool)}
    return pictures.example_predictions(
        IMAGES, truth, predictions, IDS, {"one": [1, 1, 1], "two": [0, 0, 1]}, **options
    )


def maps(channels: int = 8, side: int = 6, seed: int = 0) -> np.ndarray:
    scale = np.linspace(3, 0.1, channels)[None, :, None, None]
    return np.random.default_rng(seed).normal(size=(K, channels, side, side)) * scale


FIGURES = {
    "training_curves": lambda **o: viz.training_curves(history(), **o),
    "example_predictions": examples,
    "planes of one": lambda **o: one_plane(plane(), "Title", "B", "A", boundaries=(2, 2), **o),
    "planes": lambda **o: viz.planes({"cross": plane(), "floor": plane()}, title="Title", **o),
    "measure_grid": lambda **o: viz.measure_grid({str(i): plane(low=-0.1 * i) for i in range(4)}, **o),
    "ruler": lambda **o: viz.ruler(ruler_table(), **o),
    "depth_profile": lambda **o: viz.depth_profile(depth_table(), **o),
    "pca_rgb": lambda **o: pictures.pca_rgb(maps(), maps(5, 9), IMAGES, IDS, ("A", "B"), **o),
    "pca_rgb_grid": lambda **o: pictures.pca_rgb_grid([("A", maps(), "B", maps(2, 4))] * 2, IMAGES, IDS, **o),
}
every_figure = pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES.keys())


def caption_of(figure: Figure) -> str:
    return figure.get_supxlabel().replace("\n", " ")


def picture_of(ax) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


@every_figure
def test_caption_and_title_are_in_the_figure(make):
    plain, marked = make(caption="n = 7 images; gap"), make(caption="n = 7 images; gap", synthetic=True)
    assert plain.get_suptitle() and "n = 7 images; gap." in caption_of(plain)
    assert "synthetic images" in caption_of(marked) and "synthetic" not in caption_of(plain)


@every_figure
def test_png_is_the_same_when_drawn_and_saved_twice(make, tmp_path):
    figure = make(caption="n = 7")
    for name, source in (("a", figure), ("b", figure), ("c", make(caption="n = 7"))):
        viz.save(source, tmp_path / "new" / f"{name}.png")
    first, second, fresh = ((tmp_path / "new" / f"{name}.png").read_bytes() for name in "abc")
    assert first == second == fresh and b"Software" not in first
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "b.png", "c.png"]
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)


@every_figure
def test_nothing_is_clipped_at_the_edges(make, tmp_path):
    viz.save(make(caption="n = 7 images of the validation set; debiased linear CKA. " * 4), tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((edge == 255).all() for edge in edges)


def test_long_titles_are_wrapped_and_small_tables_keep_their_room(tmp_path):
    title = "Where do the two networks agree with one another more than chance and their untrained twins would? " * 2
    viz.save(one_plane(plane(3, 3), title, "B", "A"), tmp_path / "plane.png")
    viz.save(viz.ruler(ruler_table().iloc[:1], title=title), tmp_path / "ruler.png")
    for name in ("plane", "ruler"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_epochs_are_whole_numbers_even_if_there_is_one():
    ax = viz.training_curves(history().query("epoch == 1")).axes[0]
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_no_pyplot_figure_is_left_behind():
    code = "import sys, visualization; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=viz.__file__.rsplit("/", 1)[0]).returncode == 0
    from matplotlib import pyplot

    for make in FIGURES.values():
        make()
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("name", ["training_curves", "planes of one", "depth_profile"])
def test_every_axis_is_labelled(name):
    axes = [ax for ax in FIGURES[name]().axes if ax.get_label() != "<colorbar>"]
    assert all(ax.get_xlabel() for ax in axes) and axes[0].get_ylabel()


def test_one_colour_a_model_and_one_style_a_seed():
    ax = viz.training_curves(history()).axes[0]
    looks = [(line.get_color(), line.get_linestyle()) for line in ax.lines]
    assert len(looks) == 4 and len(set(looks)) == 4
    assert len({colour for colour, _ in looks}) == len({style for _, style in looks}) == 2


def test_an_epoch_without_validation_is_a_gap_in_that_curve_only():
    table = history()
    table.loc[table.epoch == 2, "validation_iou"] = np.nan
    train, _, iou = viz.training_curves(table).axes
    assert len(train.lines[0].get_xdata()) == 3 and list(iou.lines[0].get_xdata()) == [1, 3]


def test_example_grid_has_an_image_a_cell_and_scores_of_models():
    figure = examples()
    assert len(figure.axes) == K * 3 and all(len(ax.images) == 1 for ax in figure.axes)
    assert [figure.axes[3 * i].get_ylabel() for i in range(K)] == IDS
    notes = [" ".join(text.get_text() for text in ax.texts) for ax in figure.axes]
    assert notes[1] == "IoU 1.00" and notes[2] == "IoU 0.00, nothing found" and notes[6] == "no lesion"


def test_outline_lies_on_the_border_of_the_mask():
    ax = examples().axes[0]
    x, y = ax.collections[0].get_paths()[0].vertices.T
    shift = 1  # axes count pixels from 1, so the square 5..14 runs from 5.5 to 15.5
    assert (x.min(), x.max(), y.min(), y.max()) == (4.5 + shift, 14.5 + shift, 4.5 + shift, 14.5 + shift)
    assert ax.images[0].get_extent() == [0.5, SIZE + 0.5, SIZE + 0.5, 0.5]


def test_cells_that_could_not_be_computed_are_hatched_not_coloured():
    table = plane()
    table.iloc[1, 2] = np.nan
    figure = one_plane(table, "Title", "B", "A")
    ax = figure.axes[0]
    drawn = ax.images[0].get_array()
    assert drawn.mask.sum() == 1 and drawn.mask[1, 2] and ax.patch.get_hatch()
    assert ax.images[0].cmap.get_bad()[3] == 0  # transparent, so that the hatching shows
    assert "Hatched: could not be computed" in caption_of(figure)
    assert "Hatched" not in caption_of(one_plane(plane(), "Title", "B", "A"))


def test_colours_are_centred_on_zero_exactly_when_values_are_negative():
    negative = one_plane(plane(low=-0.2), "T", "B", "A").axes[0].images[0]
    positive = one_plane(plane(), "T", "B", "A").axes[0].images[0]
    assert negative.cmap.name == "PuOr_r" and negative.norm.vmin == -negative.norm.vmax == -0.9
    assert positive.cmap.name == "cividis" and (positive.norm.vmin, positive.norm.vmax) == (0, 0.9)
    assert np.ptp(colormaps["PuOr_r"](negative.norm(0.0))[:3]) < 0.03  # zero is grey
    fixed = one_plane(plane(), "T", "B", "A", vmin=0.25, vmax=0.5).axes[0].images[0]
    assert (fixed.norm.vmin, fixed.norm.vmax) == (0.25, 0.5)


def test_planes_side_by_side_share_one_scale():
    figure = viz.planes({"cross": plane(), "floor": plane(high=0.1)}, title="T")
    norms = [ax.images[0].norm for ax in figure.axes if ax.images]
    assert len(norms) == 2 and len(figure.axes) == 3 and all(norm.vmax == 0.9 for norm in norms)


def test_measure_grid_gives_every_measure_its_own_scale():
    figure = viz.measure_grid({"a": plane(), "b": plane(low=0.2, high=0.3), "c": plane(), "d": plane()})
    bars = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(bars) == len(drawn) == 4 and (drawn[1].images[0].norm.vmin, drawn[1].images[0].norm.vmax) == (0.2, 0.3)
    assert [bool(ax.get_xlabel()) for ax in drawn] == [False, True, True, True]


@pytest.mark.parametrize("larger_is_better, column", [(True, 3), (False, 0)])
def test_best_column_of_each_row_is_dotted(larger_is_better, column):
    table = plane()
    table.iloc[2] = np.nan
    ax = one_plane(table, "T", "B", "A", larger_is_better=larger_is_better).axes[0]
    dots = ax.collections[-1].get_offsets()
    np.testing.assert_array_equal(dots, [(column, row) for row in (0, 1, 3, 4)])


def test_boundaries_part_encoder_from_decoder_on_both_axes():
    ax = one_plane(plane(), "T", "B", "A", boundaries=(3, 2)).axes[0]
    places = {(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in ax.lines}
    assert ((0, 1), (2.5, 2.5)) in places and ((1.5, 1.5), (0, 1)) in places
    assert sorted(text.get_text() for text in ax.texts) == ["decoder", "decoder", "encoder", "encoder"]


def test_a_plane_of_gaps_only_and_a_plane_of_equal_values_are_drawn(tmp_path):
    for value in (np.nan, 0.0, 0.5, -0.5):
        table = plane().map(lambda _, value=value: value)
        viz.save(one_plane(table, "T", "B", "A"), tmp_path / "a.png")
        viz.save(viz.measure_grid({"m": table}), tmp_path / "b.png")


def test_empty_planes_are_refused():
    with pytest.raises(ValueError, match="no plane"):
        viz.planes({})
    with pytest.raises(ValueError, match=r"'cross'.*at least one site"):
        viz.planes({"cross": plane().iloc[:0]})


def test_short_labels_drop_the_shared_front_and_stay_unique():
    assert viz.short_labels(["encoder.layer1.0", "encoder.layer2.0"]) == ["layer1.0", "layer2.0"]
    assert viz.short_labels(["encoder.layer1", "decoder.x"]) == ["encoder.layer1", "decoder.x"]
    assert viz.short_labels(["a.b", "a.b.c"]) == ["b", "b.c"]
    assert viz.short_labels(["only.one"]) == ["only.one"]
    long = ["model.pixel_level_module.encoder.layers.0", "model.transformer_module.decoder.layers.0"]
    assert viz.short_labels(long) == ["…encoder.layers.0", "…decoder.layers.0"]
    clash = ["x." + "a" * 30 + ".end", "y." + "b" * 30 + ".end"]
    assert len(set(viz.short_labels(clash))) == 2


def test_ruler_shows_each_mark_where_the_table_puts_it():
    figure = viz.ruler(ruler_table())
    encoder, decoder = figure.axes
    assert (encoder.get_title(), decoder.get_title()) == ("encoder", "decoder")
    bar = encoder.patches[0]
    assert (bar.get_x(), bar.get_x() + bar.get_width()) == pytest.approx((0.1, 0.9))
    dots = [line for line in encoder.lines if line.get_marker() == "o"]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(0.5, 0), (0.3, 1)]
    assert "0.50" in [text.get_text() for text in encoder.texts]  # u = (0.5 - 0.1) / 0.8
    assert [label.get_text() for label in encoder.get_yticklabels()] == ["CKA · gap", "RSA · gap"]
    assert len(encoder.patches) == 1 and encoder.get_xlabel() and figure.legends


def test_ruler_without_interval_draws_none():
    with_interval, without = ruler_table().iloc[:1], ruler_table().iloc[:1].assign(low=np.nan, high=np.nan)
    counts = [len(viz.ruler(table).axes[0].collections) for table in (with_interval, without)]
    assert counts[0] - counts[1] == 1


@pytest.mark.parametrize(
    "draw, table, column",
    [
        (viz.ruler, ruler_table(), "ceiling"),
        (viz.depth_profile, depth_table(), "floor"),
        (viz.training_curves, history(), "validation_iou"),
    ],
)
def test_missing_columns_and_empty_tables_are_named(draw, table, column):
    with pytest.raises(ValueError, match=column):
        draw(table.drop(columns=column))
    with pytest.raises(ValueError, match="empty"):
        draw(table.iloc[:0])


def test_ruler_refuses_an_unknown_part():
    with pytest.raises(ValueError, match="neck"):
        viz.ruler(ruler_table().assign(part="neck"))


def test_pca_scores_agree_with_scikit_learn():
    from sklearn.decomposition import PCA

    data = maps(6, 5)
    scores, share = pictures.pca_scores(data)
    reference = PCA(3).fit(data.transpose(0, 2, 3, 1).reshape(-1, 6))
    expected = reference.transform(data.transpose(0, 2, 3, 1).reshape(-1, 6)).reshape(K, 5, 5, 3).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(np.abs(scores), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(share, reference.explained_variance_ratio_, rtol=1e-9)


def test_rotated_copy_gives_the_same_colours():
    data = maps(3, 6)
    turned = np.einsum("kchw,cd->kdhw", data, ortho_group.rvs(3, random_state=1)) * 7 + 5
    figure = pictures.pca_rgb(data, turned, IMAGES, IDS, ("A", "B"))
    assert len(figure.axes) == K * 3
    for row in range(K):
        np.testing.assert_allclose(
            picture_of(figure.axes[3 * row + 1]), picture_of(figure.axes[3 * row + 2]), atol=1e-9
        )


def test_copy_in_more_channels_and_finer_grid_gives_the_same_colours():
    coarse = maps(3, 8)
    wide = np.einsum("kchw,cd->kdhw", coarse, ortho_group.rvs(12, random_state=1)[:3])
    fine = wide.repeat(2, axis=2).repeat(2, axis=3)
    a, _ = pictures.pca_scores(coarse)
    turned = pictures.rotate_onto(pictures.pca_scores(fine)[0], a)
    assert turned.shape == (K, 3, 16, 16)
    colours_a, colours_b = pictures.scores_to_rgb(a), pictures.scores_to_rgb(turned)
    assert np.abs(colours_a - colours_b[:, ::2, ::2]).mean() < 0.02
    unrelated = pictures.scores_to_rgb(pictures.rotate_onto(pictures.pca_scores(maps(12, 16, seed=9))[0], a))
    assert np.abs(colours_a - unrelated[:, ::2, ::2]).mean() > 0.2


def test_rotation_keeps_lengths():
    a, b = pictures.pca_scores(maps(5))[0], pictures.pca_scores(maps(7, seed=3))[0]
    turned = pictures.rotate_onto(b, a)
    np.testing.assert_allclose((turned**2).sum(1), (b**2).sum(1), rtol=1e-9)
    assert ((turned - a) ** 2).sum() <= ((b - a) ** 2).sum()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_missing_components_are_grey_and_said(channels, dtype):
    one = maps(1) + 100.0
    flat = np.full((K, channels, 6, 6), 0.1, dtype=dtype)
    copies = (one * np.arange(1, channels + 1)[None, :, None, None] / 3).astype(dtype)  # rank 1 up to rounding
    assert (pictures.scores_to_rgb(pictures.pca_scores(flat)[0]) == 0.5).all()
    scores, share = pictures.pca_scores(copies)
    assert share[0] == pytest.approx(1) and not share[1:].any()
    colours = pictures.scores_to_rgb(scores)
    assert np.ptp(colours[..., 0]) == 1 and (colours[..., 1:] == 0.5).all()
    figure = pictures.pca_rgb(copies, flat, IMAGES, IDS, ("A", "B"))
    assert "lacks is mid-grey" in caption_of(figure) and (picture_of(figure.axes[2]) == 0.5).all()
    assert "mid-grey" not in caption_of(pictures.pca_rgb(maps(), maps(4), IMAGES, IDS, ("A", "B")))


def test_pca_caption_states_percentiles_and_rotation():
    caption = caption_of(FIGURES["pca_rgb"]())
    assert all(word in caption for word in ("2nd", "98th percentile", "orthogonal Procrustes", "all images"))


def test_pca_grid_has_two_columns_a_pair():
    assert len(FIGURES["pca_rgb_grid"]().axes) == K * (1 + 2 * 2)


def test_bad_arrays_are_refused_in_sentences():
    with pytest.raises(ValueError, match="undo the normalisation"):
        pictures.pca_rgb(maps(), maps(), IMAGES * 4 - 2, IDS, ("A", "B"))
    with pytest.raises(ValueError, match=r"\(k, 3, H, W\) is needed"):
        pictures.pca_rgb(maps(), maps(), IMAGES[:, 0], IDS, ("A", "B"))
    with pytest.raises(ValueError, match="3 images, but 2 maps of A"):
        pictures.pca_rgb(maps()[:2], maps(), IMAGES, IDS, ("A", "B"))
    with pytest.raises(ValueError, match="finite"):
        pictures.pca_scores(maps() * np.nan)
    with pytest.raises(ValueError, match="one have shape"):
        pictures.example_predictions(IMAGES, masks(), {"one": masks()[:, 0] > 0}, IDS, {"one": [1, 1, 1]})
    with pytest.raises(ValueError, match="3 scores"):
        pictures.example_predictions(IMAGES, masks(), {"one": masks() > 0}, IDS, {"one": [1]})


def test_a_returned_figure_is_rendered_by_a_notebook_with_the_inline_backend():
    pytest.importorskip("matplotlib_inline", reason="IPython's inline backend is not installed")
    shell = pytest.importorskip("IPython.core.interactiveshell", reason="IPython is not installed").InteractiveShell()
    from IPython.core.pylabtools import select_figure_formats

    select_figure_formats(shell, {"png"})  # what %matplotlib inline does to the display formatter
    data, _ = shell.display_formatter.format(one_plane(plane(), "T", "B", "A"))
    assert "image/png" in data


def test_a_gallery_shows_every_image_with_its_id():
    images, masks = np.random.default_rng(0).random((3, 3, 16, 16)), np.zeros((3, 1, 16, 16))
    masks[:, :, 4:9, 4:9] = 1
    figure = pictures.gallery(images, masks, ["a", "b", "c"], caption="n = 3", synthetic=True)
    assert [ax.get_xlabel() for ax in figure.axes] == ["a", "b", "c"]
    with pytest.raises(InputError, match="3 images need masks"):
        pictures.gallery(images, masks[:2], ["a", "b", "c"])
