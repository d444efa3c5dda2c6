"""What is drawn for a training image: ranges, independence of the steps, registration of image and mask, defaults."""

from __future__ import annotations

import dataclasses
import math
import pickle

import albumentations
import numpy as np
import pytest
from PIL import Image

import augmentation
from augmentation import Augmenter, steps_of
from dataset import SegmentationDataset, find_splits, make_loader
from images import Transform, cache_file
from sources import ImageSource
from utils import InputError, digest

SIDE = 64
ALL = {"flips": True, "rotate": 30.0, "scale": 0.2, "colour": 0.3, "hair": 0.5}
IDS = [f"ISIC_{number:07d}" for number in range(500)]


def disc(x: float, y: float, radius: float, side: int = SIDE) -> np.ndarray:
    """(side, side) uint8 {0, 1}."""
    rows, columns = np.mgrid[:side, :side]
    return ((columns - x) ** 2 + (rows - y) ** 2 <= radius**2).astype(np.uint8)


def skin(side: int = SIDE) -> np.ndarray:
    """(side, side, 3) uint8 smooth colours of skin."""
    coarse = np.random.default_rng(0).integers(-25, 25, (4, 4, 3)) + np.array([200, 150, 130])
    return np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC))


def as_image(mask: np.ndarray) -> np.ndarray:
    return np.dstack([mask * 255] * 3)


def centre(mask: np.ndarray) -> tuple[float, float]:
    """x, y of the centre of mass, from the middle of the picture."""
    rows, columns = np.nonzero(mask)
    return columns.mean() - (mask.shape[1] - 1) / 2, rows.mean() - (mask.shape[0] - 1) / 2


def one_step(**switches):
    (step,) = steps_of(Transform(size=SIDE, **switches)).values()
    return step


# ---- defaults and settings ----


def test_everything_new_is_off_by_default_and_changes_no_pixel_key_or_fingerprint(synthetic_root):
    pairs = find_splits(synthetic_root)["train"]
    plain, full = Transform(size=16), Transform(size=16, **ALL)
    assert steps_of(plain) == {} and full.unaugmented == plain
    assert list(steps_of(ImageSource().transform)) == ["flips"]
    assert [cache_file(pair, plain, None) for pair in pairs] == [cache_file(pair, full, None) for pair in pairs]
    drawn, still = (SegmentationDataset(pairs, full, augment=augment) for augment in (True, False))
    assert drawn.fingerprint == still.fingerprint == SegmentationDataset(pairs, plain).fingerprint
    assert still.augmenter is None and (drawn[0].image != still[0].image).any()


def test_flips_alone_draw_what_they_always_drew():
    """Against the one-step Compose seeded by (seed, epoch, id) that the data set used to hold."""
    compose = albumentations.Compose([albumentations.D4(p=1.0)])
    image, mask = skin(), disc(20, 30, 8)
    for flips in (Augmenter(Transform(flips=True)), Augmenter(Transform(flips=True, hair=1e-9))):
        for number in range(20):
            compose.set_random_seed(int(digest(7, 3, f"id{number}")[:8], 16))
            expected = compose(image=image, mask=mask)
            moved = flips(image, mask, 7, 3, f"id{number}")
            np.testing.assert_array_equal(moved[0], expected["image"])
            np.testing.assert_array_equal(moved[1], expected["mask"])


@pytest.mark.parametrize("name, value", [("rotate", 181), ("rotate", -1), ("scale", 1), ("colour", 1.5), ("hair", 2)])
def test_impossible_strengths_are_refused_with_their_range(name, value):
    with pytest.raises(InputError, match=rf"{name} {value} is not between 0 and .*; 0 turns it off"):
        ImageSource(**{name: value}).transform  # noqa: B018
    with pytest.raises(InputError, match=name):
        Transform(**{name: math.nan})


def test_the_settings_are_fields_of_a_yaml_and_of_the_command_line(tmp_path):
    from train import load_config

    (tmp_path / "run.yaml").write_text("rotate: 45\nhair: 0.2\n")
    config = load_config(["--config", str(tmp_path / "run.yaml"), "--scale", "0.25", "--colour", "0.3", "--rotate=30"])
    assert config.transform == Transform(64, flips=True, rotate=30, scale=0.25, colour=0.3, hair=0.2)


# ---- draws ----


def drawn(switches: dict, epoch: int = 0, ids=IDS, monkeypatch=None) -> dict[str, np.ndarray]:
    """Name -> one number an id, measured on what comes out: mirrored, angle (degrees), zoom, brightness, hair."""
    middle = (SIDE - 1) / 2  # of rotations and reflections
    marked = disc(middle + 11, middle, 5) + 2 * disc(middle, middle + 11, 5)
    found: dict[str, list] = {name: [] for name in ("mirrored", "angle", "zoom", "light", "hair")}
    augmenter = Augmenter(Transform(size=SIDE, **switches))
    grey = np.full((SIDE, SIDE, 3), 128, np.uint8)
    for id_ in ids:
        image, mask = augmenter(grey, marked, 1, epoch, id_)
        (ax, ay), (bx, by) = centre(mask == 1), centre(mask == 2)
        mirrored = ax * by - ay * bx < 0
        found["mirrored"].append(mirrored)
        # from the first mark to the right, or where the flip's quarter turns would have put it
        found["angle"].append((math.degrees(math.atan2(ay, ax)) + 45) % 90 - 45)
        found["zoom"].append(math.hypot(ax, ay) / 11)
        found["light"].append(np.median(image))
        found["hair"].append((image < image.max()).mean() > 0.005)
    return {name: np.array(values, float) for name, values in found.items()}


@pytest.fixture(scope="module")
def draws():
    return drawn(ALL)


def test_steps_are_drawn_independently_of_each_other(draws):
    """Under independence a correlation of 500 draws has standard deviation 0.045."""
    names = list(draws)
    correlations = np.corrcoef([draws[name] for name in names])
    off = np.abs(correlations[np.triu_indices(len(names), 1)])
    assert off.max() < 4 * 0.045, correlations


def test_the_fault_that_the_steps_own_seeds_avoid_is_still_there():
    """Should a later albumentations draw steps apart by itself, this says that our seeds are no longer needed."""
    compose = albumentations.Compose([albumentations.HorizontalFlip(p=0.5), albumentations.VerticalFlip(p=0.5)])
    marks = np.zeros((8, 8, 3), np.uint8)
    marks[0, 0] = 1
    both = set()
    for seed in range(100):
        compose.set_random_seed(seed)
        both.add(tuple(np.argwhere(compose(image=marks)["image"][..., 0])[0].tolist()))
    assert both == {(0, 0), (7, 7)}


def test_ranges_are_the_stated_ones_and_are_filled(draws):
    """Uniform in ± 30 degrees and 0.8 to 1.2, measured from centres of marks, so to about 2 degrees and 4 %."""
    angle, zoom = draws["angle"], draws["zoom"]
    assert np.abs(angle).max() < 33 and angle.max() > 26 and angle.min() < -26 and abs(angle.mean()) < 4 * 0.8
    assert 0.77 < zoom.min() < 0.84 and 1.16 < zoom.max() < 1.24
    assert abs(draws["mirrored"].mean() - 0.5) < 4 * 0.0224
    assert abs(draws["hair"].mean() - 0.5) < 4 * 0.0224  # binomial, n = 500
    # on a grey image with few dark hairs, saturation, hue and contrast do next to nothing: what is left is brightness
    assert 128 * 0.7 - 3 <= draws["light"].min() < 95 and 160 < draws["light"].max() <= 128 * 1.3 + 3


def test_a_step_draws_the_same_whether_or_not_others_are_on(draws):
    alone = drawn(ALL | {"colour": 0.0, "hair": 0.0, "scale": 0.0}, ids=IDS[:60])
    for name in ("mirrored", "angle"):
        assert np.abs(alone[name] - draws[name][:60]).max() < 5


def test_a_draw_is_a_function_of_seed_epoch_and_id_alone():
    image, mask = skin(), disc(30, 25, 12)
    full = Transform(size=SIDE, **ALL)

    def draw(seed=0, epoch=0, id_="a", augmenter=None):
        moved = (augmenter or Augmenter(full))(image, mask, seed, epoch, id_)
        return moved[0].tobytes() + moved[1].tobytes()

    used = Augmenter(full)
    for other in range(5):
        used(image, mask, 0, other, "b")
    np.random.seed(5)
    assert draw() == draw(augmenter=used) == draw(augmenter=pickle.loads(pickle.dumps(used)))
    assert len({draw(), draw(seed=1), draw(epoch=1), draw(id_="b")}) == 4


def test_a_data_set_given_another_seed_draws_as_one_opened_with_it(synthetic_root):
    """Studies open the images once and train several seeds on them."""
    pairs, transform = find_splits(synthetic_root)["train"][:4], Transform(size=32, **ALL)
    opened, given = (SegmentationDataset(pairs, transform, augment=True, seed=seed) for seed in (5, 0))
    before = [given[i].image for i in range(4)]
    given.seed = 5
    assert all((opened[i].image == given[i].image).all() for i in range(4))
    assert any((opened[i].image != before[i]).any() for i in range(4))


def test_epochs_are_the_same_for_any_number_of_workers(synthetic_root):
    data = SegmentationDataset(find_splits(synthetic_root)["train"], Transform(size=32, **ALL), augment=True, seed=2)
    data.set_epoch(4)
    one, two = (list(make_loader(data, 5, shuffle=True, seed=3, workers=workers)) for workers in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert a.id == b.id and (a.image == b.image).all() and (a.mask == b.mask).all()
        assert set(a.mask.unique().tolist()) <= {0.0, 1.0} and a.image.min() >= 0 and a.image.max() <= 1


# ---- geometry ----


def warped(mask: np.ndarray, degrees: float, zoom: float) -> np.ndarray:
    """By hand, counterclockwise: each pixel takes the nearest source pixel, the border mirrored, not repeated."""
    side, angle = len(mask), math.radians(degrees)
    middle = (side - 1) / 2
    y, x = np.mgrid[:side, :side] - middle
    source_x = (math.cos(angle) * x - math.sin(angle) * y) / zoom + middle
    source_y = (math.sin(angle) * x + math.cos(angle) * y) / zoom + middle

    def mirrored(places):
        places = np.abs(np.round(places).astype(int)) % (2 * side - 2)
        return np.where(places >= side, 2 * side - 2 - places, places)

    return mask[mirrored(source_y), mirrored(source_x)]


@pytest.mark.parametrize("switches", [{"rotate": 180.0}, {"scale": 0.9}, {"rotate": 30.0, "scale": 0.2}])
def test_rotation_and_zoom_are_the_warp_worked_out_by_hand(switches):
    step, mask = one_step(**switches), disc(40, 22, 11)
    (affine,) = step.compose.transforms
    for seed in range(8):
        _, moved = step(as_image(mask), mask, seed)
        affine.set_random_seed(seed)
        params = affine.get_params_dependent_on_data({"shape": (SIDE, SIDE, 3)}, {})
        expected = warped(mask, params["rotate"], params["scale"]["x"])
        assert params["scale"]["x"] == params["scale"]["y"]
        edge = sum(np.abs(np.diff(np.pad(expected, 1).astype(int), axis=axis)).sum() for axis in (0, 1))
        assert (moved != expected).sum() <= 0.1 * edge  # rounding to another neighbour, at the outline only


def test_image_and_mask_stay_registered_and_the_mask_binary():
    """A picture that equals its mask: cut at a half after the warp, it is the mask but for pixels of the outline."""
    mask = disc(40, 22, 11)
    augmenter = Augmenter(Transform(size=SIDE, flips=True, rotate=180, scale=0.5))
    for id_ in IDS[:60]:
        image, moved = augmenter(as_image(mask), mask, 0, 0, id_)
        assert moved.dtype == np.uint8 and set(np.unique(moved)) <= {0, 1}
        inner, outer = image[..., 0] > 250, image[..., 0] > 4
        assert (moved[inner] == 1).all() and (moved[~outer] == 0).all()
        assert np.abs(np.subtract(centre(image[..., 0] > 127), centre(moved))).max() < 0.35


def test_the_border_is_reflected_not_black():
    image, mask = skin(), disc(40, 22, 11)
    step = one_step(rotate=45.0, scale=0.5)
    low = image.reshape(-1, 3).min(0)
    for seed in range(10):
        assert (step(image, mask, seed)[0] >= low).all()


# ---- colour and hair ----


def test_colour_changes_no_mask_and_grows_with_its_strength():
    image, mask = skin(), disc(40, 22, 11)
    changes = []
    for strength in (0.05, 0.3, 1.0):
        step = one_step(colour=strength)
        moved = [step(image, mask, seed) for seed in range(40)]
        assert all((each[1] == mask).all() for each in moved)
        changes.append(np.mean([np.abs(each[0].astype(int) - image).mean() for each in moved]))
    assert 0 < changes[0] < changes[1] < changes[2]


def test_hair_comes_with_its_probability_dark_thin_and_over_the_image_alone():
    image, mask = skin(128), disc(60, 60, 30, 128)
    never, sometimes, always = (augmentation.Hair(probability) for probability in (0.0, 0.2, 1.0))
    assert all(never(image, mask, seed)[0] is image for seed in range(50))
    share = np.mean([(sometimes(image, mask, seed)[0] != image).any() for seed in range(1000)])
    assert abs(share - 0.2) < 4 * 0.0127  # binomial, n = 1000
    for seed in range(40):
        drawn_on, same = always(image, mask, seed)
        assert same is mask and (drawn_on <= image).all()
        touched = (drawn_on != image).any(-1)
        assert 0.001 < touched.mean() < 0.2
        # the darkest of each channel is a hair's own colour: 10 to 60, and what anti-aliasing adds
        assert drawn_on[touched].min(0).max() <= 62


def test_a_hair_is_one_pixel_wide_and_bent():
    """Blank skin of 64 px: nine tenths of what is drawn is gone after an erosion by one pixel; curves are no lines."""
    import cv2

    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    for seed in range(20):
        dark = (augmentation.draw_hair(white, np.random.default_rng(seed))[..., 0] < 128).astype(np.uint8)
        assert cv2.erode(dark, np.ones((3, 3), np.uint8)).sum() <= 0.1 * dark.sum()
    bends = []
    for seed in range(200):
        points = augmentation._curve(np.random.default_rng(seed))
        chord = points[-1] - points[0]
        middle = points[len(points) // 2] - points[0]
        bends.append(abs(chord[0] * middle[1] - chord[1] * middle[0]) / (chord @ chord))
    assert 0.04 < np.median(bends) < 0.15  # half of 0.67 standard deviations of 0.25


def test_the_settings_of_a_transform_and_of_a_source_agree():
    names = {field.name for field in dataclasses.fields(Transform)} - {"size", "values"}
    assert names <= {field.name for field in dataclasses.fields(ImageSource)}
