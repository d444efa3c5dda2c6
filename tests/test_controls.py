"""Controls: what they say of drawn shapes and colours with known answers, and of which images."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import SegmentationDataset, find_splits, make_loader
from images import Pair, Transform
from similarity import plane, record
from similarity.deconfounding import deconfounded_plane
from similarity.regions import pooled
from studies.controls import (
    SHAPE,
    area_resized,
    control_recordings,
    mask_shape,
    region_weights,
    standardised,
    with_lesion,
)
from utils import InputError


def ellipse(side, x, y, a, b, angle=0.0):
    """Mask (side, side): half axes a and b in pixels, angle in degrees from x towards y (down), pixel centres at ½."""
    rows, columns = np.mgrid[:side, :side] + 0.5
    turn = np.deg2rad(angle)
    along = (columns - x) * np.cos(turn) + (rows - y) * np.sin(turn)
    across = -(columns - x) * np.sin(turn) + (rows - y) * np.cos(turn)
    return (along / a) ** 2 + (across / b) ** 2 <= 1


def drawn(folder, pictures, masks, **options):
    """A data set of these pictures (H, W, 3) uint8 and masks, not resized."""
    pairs = []
    for number, (picture, mask) in enumerate(zip(pictures, masks)):
        pairs.append(Pair(f"ISIC_{number:07d}", folder / f"{number}.png", folder / f"{number}_mask.png"))
        Image.fromarray(picture).save(pairs[-1].image)
        Image.fromarray(mask.astype(np.uint8) * 255).save(pairs[-1].mask)
    return SegmentationDataset(pairs, Transform(size=len(masks[0])), **options)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def lesions():
    rng = np.random.default_rng(1)
    return [ellipse(32, *rng.uniform(12, 20, 2), *rng.uniform(3, 9, 2), rng.uniform(0, 180)) for _ in range(6)]


@pytest.fixture(scope="module")
def small(tmp_path_factory, noise, lesions):
    return drawn(tmp_path_factory.mktemp("drawn"), noise, lesions)


# ---- shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(40, 40), (60, 30), (60, 15), (90, 60)])
@pytest.mark.parametrize("angle", [0, 25, 90, 160])
def test_an_ellipse_has_the_area_centroid_elongation_and_orientation_it_was_drawn_with(a, b, angle):
    shape = dict(zip(SHAPE, mask_shape(ellipse(256, 120.3, 131.8, a, b, angle))))
    assert shape["area"] == pytest.approx(np.pi * a * b / 256**2, rel=0.005)
    assert shape["centroid x"] == pytest.approx(120.3 / 256, abs=0.1 / 256)  # a tenth of a pixel
    assert shape["centroid y"] == pytest.approx(131.8 / 256, abs=0.1 / 256)
    assert shape["elongation"] == pytest.approx(a / b, rel=0.01)
    if a != b:
        assert shape["orientation cos"] == pytest.approx(np.cos(2 * np.deg2rad(angle)), abs=0.01)
        assert shape["orientation sin"] == pytest.approx(np.sin(2 * np.deg2rad(angle)), abs=0.01)


def test_a_rectangle_of_whole_pixels_is_exact():
    mask = np.zeros((20, 40), dtype=bool)
    mask[3:5, 10:22] = True  # 2 high, 12 wide
    np.testing.assert_allclose(mask_shape(mask), [24 / 800, 16 / 40, 4 / 20, 6, 1, 0], atol=1e-12)
    np.testing.assert_allclose(mask_shape(mask.T), [24 / 800, 4 / 20, 16 / 40, 6, -1, 0], atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 20])
def test_a_square_has_no_longest_axis_and_so_no_direction(size):
    mask = np.zeros((20, 20), dtype=bool)
    mask[:size, :size] = True
    np.testing.assert_allclose(mask_shape(mask)[3:], [1, 0, 0], atol=1e-12)


def test_a_line_along_the_falling_diagonal_is_at_45_degrees():
    np.testing.assert_allclose(mask_shape(np.eye(30, dtype=bool))[4:], [0, 1], atol=1e-12)
    np.testing.assert_allclose(mask_shape(np.eye(30, dtype=bool)[::-1])[4:], [0, -1], atol=1e-12)


def test_an_empty_mask_has_no_shape():
    with pytest.raises(InputError, match="no shape"):
        mask_shape(np.zeros((4, 4), dtype=bool))


def test_a_column_that_does_not_vary_takes_no_part():
    columns = np.array([[1.0, 0.1, 3.0], [2.0, 0.1, 3.0], [6.0, 0.1, 9.0]])
    columns[1, 1] += 1e-17
    found = standardised(columns)
    np.testing.assert_allclose(found[:, 0], (columns[:, 0] - 3) / np.sqrt(14 / 3))
    assert (found[:, 1] == 0).all()
    np.testing.assert_allclose(found[:, 2].std(), 1)


# ---- recordings -------------------------------------------------------------------------------------------------


def test_the_three_controls_of_drawn_images(small, noise, lesions):
    found = control_recordings(small)
    assert found.names == ["raw pixels", "mask", "mean colour"]
    assert {site.part for site in found.sites} == {"control"} and found.policy == "gap"
    assert {name: tuple(X.shape) for name, X in found.features.items()} == {
        "raw pixels": (6, 768),
        "mask": (6, 6),
        "mean colour": (6, 3),
    }
    picture = noise[2] / 255
    halves = picture.reshape(16, 2, 16, 2, 3).mean((1, 3))  # 32 pixels in 16 cells
    np.testing.assert_allclose(found["raw pixels"][2].reshape(3, 16, 16), halves.transpose(2, 0, 1), atol=1e-12)
    np.testing.assert_allclose(found["mean colour"][2], picture.mean((0, 1)), atol=1e-12)
    raw = np.stack([mask_shape(mask) for mask in lesions])
    np.testing.assert_allclose(found["mask"], (raw - raw.mean(0)) / raw.std(0), atol=1e-9)


def test_mean_colour_is_the_images_own_where_cells_overlap(tmp_path):
    pictures = np.random.default_rng(3).integers(0, 256, (4, 25, 25, 3), dtype=np.uint8)
    masks = [ellipse(25, 12, 12, 5 + k, 3) for k in range(4)]
    found = control_recordings(drawn(tmp_path, pictures, masks))
    np.testing.assert_allclose(found["mean colour"], pictures.mean((1, 2)) / 255, atol=1e-12)


def test_controls_are_of_the_images_that_a_model_records(synthetic_root):
    data = SegmentationDataset(find_splits(synthetic_root)["test"], Transform(size=32))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))
    sites = {"0": "batch channel height width"}
    recording = record(model, make_loader(data, 4, shuffle=True), sites, data_hash=data.fingerprint)
    controls = control_recordings(data)
    assert controls.data_hash == recording.data_hash and controls.ids == data.ids
    # a 1 × 1 convolution pooled over space is a linear map of the mean colour: as kernels they are alike
    weight = model[0].weight.detach().flatten(1).double()
    recording.features["0"] = recording["0"].double() @ torch.linalg.pinv(weight).T
    assert plane("linear_cka", recording, controls).values[0, 2] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="explain every site"):
        deconfounded_plane(recording, recording, controls)


def test_the_order_of_the_data_set_does_not_matter(small):
    turned = SegmentationDataset(small.pairs[::-1], small.transform)
    one, other = control_recordings(small), control_recordings(turned)
    np.testing.assert_allclose(plane("linear_cka", one, other).values, plane("linear_cka", one).values, atol=1e-9)
    assert one.data_hash == other.data_hash


def test_empty_masks_are_refused_by_name(tmp_path, noise, lesions):
    masks = [*lesions[:4], np.zeros((32, 32), dtype=bool), lesions[5]]
    with pytest.raises(InputError, match=r"1 images have an empty mask.*ISIC_0000004"):
        control_recordings(drawn(tmp_path, noise, masks))


def test_images_without_lesion_can_be_left_out_and_the_others_stay_what_they_are(tmp_path, noise, lesions, capsys):
    masks = [*lesions[:4], np.zeros((32, 32), dtype=bool), lesions[5]]
    data = drawn(tmp_path, noise, masks)
    before = data.fingerprint
    kept = with_lesion(data)
    assert kept.ids == [id_ for id_ in data.ids if id_ != "ISIC_0000004"] and len(data.ids) == 6
    assert kept.fingerprint != before == data.fingerprint
    assert (kept[4].image == data[5].image).all() and "1 images without lesion" in capsys.readouterr().out
    assert control_recordings(kept).ids == kept.ids
    assert with_lesion(kept) is kept


def test_small_or_augmented_images_are_refused(tmp_path, noise, lesions):
    pair = [noise[0, :8, :8]], [ellipse(8, 4, 4, 2, 2)]
    with pytest.raises(InputError, match="no 16 × 16 cells"):
        control_recordings(drawn(tmp_path, *pair))
    data = drawn(tmp_path, noise, lesions)
    data = SegmentationDataset(data.pairs, Transform(size=32, flips=True), augment=True)
    with pytest.raises(InputError, match="without augmentation"):
        control_recordings(data)


# ---- regions ----------------------------------------------------------------------------------------------------


def test_region_weights_of_a_lesion_of_whole_and_half_cells(tmp_path, noise):
    mask = np.zeros((32, 32), dtype=bool)
    mask[:8, 8:16] = True  # the second cell of the first row, of 4 × 4
    mask[8:16, 0:4] = True  # half of the first cell of the second row
    mask[16:24, 24:26] = True  # a quarter of the last cell of the third row
    data = drawn(tmp_path, noise[:1], [mask])
    found = region_weights(data, 4)
    inside = np.zeros(16)
    inside[[1, 4, 11]] = 1, 0.5, 0.25
    border = np.zeros(16)
    border[[4, 11]] = 1, 0.75
    (image,) = data.ids
    np.testing.assert_array_equal(found["inside"][image], inside)
    np.testing.assert_array_equal(found["outside"][image], 1 - inside)
    np.testing.assert_array_equal(found["border"][image], border)


def test_the_inside_of_a_recorded_grid_is_the_mean_colour_of_the_lesion(tmp_path):
    rng = np.random.default_rng(5)
    pictures = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    masks = np.zeros((5, 32, 32), dtype=bool)
    for mask, place in zip(masks, rng.integers(0, 3, (5, 2)) * 8):
        mask[place[0] : place[0] + 16, place[1] : place[1] + 8] = True  # whole cells
    data = drawn(tmp_path, pictures, masks)
    model = torch.nn.Sequential(torch.nn.Identity())
    grid = record(model, make_loader(data, 2), {"0": "batch channel height width"}, "grid:4")
    weights = region_weights(data, 4)
    for name, chosen in (("inside", masks), ("outside", ~masks)):
        expected = [picture[mask].mean(0) / 255 for picture, mask in zip(pictures, chosen)]
        np.testing.assert_allclose(pooled(grid, weights[name])["0"], expected, atol=1e-6)
    with pytest.raises(ValueError, match="no image has this region"):
        pooled(grid, weights["border"])  # no cell is cut


def test_cells_are_those_of_the_grid_policy():
    maps = np.random.default_rng(0).random((2, 25, 25))
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(maps), 4)
    np.testing.assert_allclose(area_resized(maps, 4), expected)
    assert area_resized(np.ones((1, 25, 25)), 4).max() <= 1
    with pytest.raises(InputError, match="no 26 × 26 cells"):
        area_resized(maps, 26)
