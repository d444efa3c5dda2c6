"""Statistics of images and lesions against numbers known beforehand, and skimage where it measures the same."""

import numpy as np
import pytest
import torch
from skimage.color import rgb2hsv, rgb2xyz
from skimage.measure import regionprops

from processing.image_statistics import edge_density, image_statistics, spectral_slope
from processing.lesion_statistics import lesion_statistics
from utils import InputError


def grey(values):
    """(H, W) display values as one RGB image (1, 3, H, W)."""
    return torch.as_tensor(np.asarray(values)).double().expand(1, 3, -1, -1)


def of(images, statistic):
    """(value, reason) of one image."""
    table = image_statistics(images, ["a"]).set_index("statistic")
    return table.loc[statistic, "value"], table.loc[statistic, "reason"]


def halves(low=0.0, high=1.0, side=32):
    return grey(np.where(np.arange(side) < side // 2, low, high)[None].repeat(side, 0))


def falling_noise(a, side=128, seed=0):
    """Gaussian noise on a torus whose expected power is 1/fᵃ, as luminance around 0.5."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    noise = np.fft.ifft2(np.fft.fft2(generator.normal(size=(side, side))) * frequency ** (-a / 2)).real
    return 0.5 + 0.4 * noise / np.abs(noise).max()


# ------------------------------------------------------------------------------------------------------------- images


def test_a_constant_image_has_all_but_a_slope():
    image = torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert of(image, "rms_contrast")[0] == pytest.approx(0, abs=1e-12)
    assert of(image, "edge_density") == (0, "")
    assert of(image, "red_green")[0] == pytest.approx(-0.3, abs=1e-7)
    assert of(image, "yellow_blue")[0] == pytest.approx(0.05, abs=1e-7)
    value, reason = of(image, "spectral_slope")
    assert np.isnan(value) and "luminance does not vary" in reason


def test_luminance_is_that_of_skimage():
    images = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(0)).double()
    theirs = rgb2xyz(images.permute(0, 2, 3, 1).numpy())[..., 1]  # Y by weights of six digits, white at 1
    table = image_statistics(images, ["a", "b", "c"]).pivot(index="id", columns="statistic", values="value")
    np.testing.assert_allclose(table["luminance"], theirs.mean((1, 2)), atol=1e-4)
    np.testing.assert_allclose(table["rms_contrast"], theirs.std((1, 2)) / theirs.mean((1, 2)), atol=1e-4)


@pytest.mark.parametrize(("colour", "linear"), [([1, 0, 0], 0.2126), ([0, 1, 0], 0.7152), ([0.5, 0.5, 0.5], 0.2140)])
def test_luminance_adds_up_linear_light(colour, linear):
    image = torch.tensor(colour, dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert of(image, "luminance")[0] == pytest.approx(linear, abs=1e-4)


def test_half_black_half_white_has_contrast_one():
    assert of(halves(), "rms_contrast")[0] == pytest.approx(1)


def test_a_black_image_has_no_contrast():
    value, reason = of(grey(np.zeros((32, 32))), "rms_contrast")
    assert np.isnan(value) and "black" in reason


def test_opponent_colours_of_grey_are_zero_and_of_blue_are_negative():
    assert of(halves(0.2, 0.9), "red_green")[0] == pytest.approx(0, abs=1e-15)
    assert of(halves(0.2, 0.9), "yellow_blue")[0] == pytest.approx(0, abs=1e-15)
    blue = torch.zeros(1, 3, 32, 32)
    blue[:, 2] = 1
    assert rgb2hsv(blue[0].permute(1, 2, 0).numpy())[0, 0, 0] == pytest.approx(2 / 3)
    assert of(blue, "yellow_blue")[0] == -1


def test_a_grid_of_edges_has_the_density_of_its_lines():
    """Steps every 8 pixels have gradient on 2 of 8 columns and 2 of 8 rows; 64 of the 66 pixels a side are counted."""
    step = (np.arange(66) - 1) // 8 % 2 * 0.3
    luma = 0.2 + step[:, None] + step[None, :]
    assert edge_density(luma, 0.149) == pytest.approx(1 - (6 / 8) ** 2, abs=0.02)
    assert edge_density(luma.repeat(2, 0), 0.149) == pytest.approx(1 - (6 / 8) * (14 / 16), abs=0.02)
    assert edge_density(luma, 0.3) == 0  # where lines cross, gradients add up to 0.15·√2


def test_a_ramp_has_its_own_slope_as_gradient():
    ramp = np.tile(np.arange(32) * 0.02, (32, 1))
    assert edge_density(ramp, 0.0199) == 1 and edge_density(ramp, 0.0201) == 0


def test_images_of_a_batch_do_not_touch_each_other():
    images = torch.cat([halves(), grey(np.full((32, 32), 0.5)), halves(0.4, 0.6)])
    together = image_statistics(images, ["a", "b", "c"]).set_index(["id", "statistic"])["value"]
    for place, name in enumerate("abc"):
        alone = image_statistics(images[place : place + 1], [name]).set_index(["id", "statistic"])["value"]
        np.testing.assert_allclose(together[name].to_numpy(), alone[name][together[name].index], rtol=1e-12)


@pytest.mark.parametrize("a", [0.0, 1.0, 2.0, 3.0])
def test_noise_whose_power_falls_as_1_over_f_to_the_a_has_slope_minus_a(a):
    found = [spectral_slope(falling_noise(a, seed=seed)) for seed in range(6)]
    assert np.mean(found) == pytest.approx(-a, abs=0.05)


def test_the_slope_does_not_see_the_mean_nor_the_contrast():
    noise = falling_noise(2.0, side=64)
    assert spectral_slope(0.3 * noise + 0.1) == pytest.approx(spectral_slope(noise), rel=1e-9)


def test_a_picture_that_is_not_square_has_the_same_slope():
    noise = falling_noise(2.0, side=256)
    found = [spectral_slope(noise[row : row + 64, column : column + 96]) for row in (0, 90) for column in (0, 130)]
    assert np.mean(found) == pytest.approx(-2, abs=0.15)


def test_a_wave_has_no_slope_and_neither_have_eight_pixels():
    wave = 0.5 + 0.25 * np.cos(2 * np.pi * 8 * np.arange(64) / 64)[None].repeat(64, 0)
    assert "no power" in spectral_slope(wave)
    assert "8 pixels" in spectral_slope(np.random.default_rng(0).random((8, 8)))


def test_what_are_no_display_values_is_refused():
    with pytest.raises(InputError, match=r"first 'b'.*before a network's normalisation"):
        image_statistics(torch.stack([torch.ones(3, 16, 16), -torch.ones(3, 16, 16)]), ["a", "b"])
    with pytest.raises(InputError, match="outside"):
        image_statistics(torch.full((1, 3, 16, 16), torch.nan), ["a"])
    with pytest.raises(InputError, match="B, 3, H, W"):
        image_statistics(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a"])
    with pytest.raises(InputError, match="'a' comes twice"):
        image_statistics(torch.zeros(2, 3, 16, 16), ["a", "a"])
    with pytest.raises(InputError, match="1 ids were given for 2"):
        image_statistics(torch.zeros(2, 3, 16, 16), ["a"])


# ------------------------------------------------------------------------------------------------------------ lesions

SIDE = 100


def ellipse(x, y, across, down, angle=0.0, side=SIDE):
    """Mask of the pixels whose centre is in it; angle in radians."""
    rows, columns = np.mgrid[:side, :side] + 0.5
    u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    v = -(columns - x) * np.sin(angle) + (rows - y) * np.cos(angle)
    return (u / across) ** 2 + (v / down) ** 2 <= 1


def lesion(mask, image=None, **options):
    """{statistic: value} and {statistic: reason} of one mask."""
    image = torch.zeros(1, 3, *mask.shape) if image is None else image
    table = lesion_statistics(torch.as_tensor(mask)[None, None].float(), image, ["a"], **options)
    table = table.set_index("statistic")
    return table["value"], table["reason"]


def coloured(mask, inside, outside):
    image = torch.tensor(outside).view(3, 1, 1).repeat(1, *mask.shape)
    image[:, torch.as_tensor(mask)] = torch.tensor(inside)[:, None]
    return image[None]


def test_a_disc_in_the_middle():
    value, _ = lesion(ellipse(50, 50, 30, 30))
    assert value["area_share"] == pytest.approx(np.pi * 0.09, rel=0.01)
    assert value[["centre_x", "centre_y", "centre_distance"]].tolist() == pytest.approx([0.5, 0.5, 0])
    assert value["elongation"] == pytest.approx(1)


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.2])
def test_an_ellipse_has_the_ratio_of_its_axes(angle):
    mask = ellipse(50, 50, 36, 18, angle)
    theirs = regionprops(mask.astype(int))[0]
    found = lesion(mask)[0]["elongation"]
    assert found == pytest.approx(2, rel=0.01)
    # skimage's axes are 4√λ of pixels as points
    longer, shorter = theirs.axis_major_length**2 / 16, theirs.axis_minor_length**2 / 16
    assert found == pytest.approx(np.sqrt((longer + 1 / 12) / (shorter + 1 / 12)), rel=1e-9)


def test_a_rectangle_off_centre():
    mask = np.zeros((SIDE, 2 * SIDE), dtype=bool)
    mask[80:100, 150:160] = True
    value, _ = lesion(mask)
    assert value["area_share"] == pytest.approx(0.01)
    assert value[["centre_x", "centre_y"]].tolist() == pytest.approx([155 / 200, 0.9])
    assert value["centre_distance"] == pytest.approx(np.hypot(55, 40) / np.hypot(100, 50))
    assert value["elongation"] == pytest.approx(2)


def test_one_pixel_is_a_square_and_a_line_has_its_length():
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[3, 3] = True
    assert lesion(mask)[0]["elongation"] == pytest.approx(1)
    mask[3, 3:10] = True
    assert lesion(mask)[0]["elongation"] == pytest.approx(7)


def test_border_contrast_is_the_difference_of_the_two_colours():
    mask = ellipse(40, 60, 20, 15)
    value, _ = lesion(mask, coloured(mask, [0.4, 0.2, 0.1], [0.7, 0.6, 0.1]))
    assert value["border_contrast"] == pytest.approx(0.5, abs=1e-6)


def test_border_contrast_reads_the_band_alone():
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[:, :50] = True
    image = coloured(mask, [0.5, 0.5, 0.5], [0.6, 0.5, 0.5])
    image[..., :44], image[..., 56:] = 0.0, 1.0  # more than 5 pixels away from the border
    assert lesion(mask, image)[0]["border_contrast"] == pytest.approx(0.1, abs=1e-6)
    assert lesion(mask, image, band=0.1)[0]["border_contrast"] > 0.3


def test_empty_and_full_masks_say_what_they_lack():
    value, reason = lesion(np.zeros((SIDE, SIDE), dtype=bool))
    assert value["area_share"] == 0 and value.drop("area_share").isna().all()
    assert (reason.drop("area_share") == "the mask is empty").all()
    value, reason = lesion(np.ones((SIDE, SIDE), dtype=bool))
    assert value[["area_share", "centre_x", "elongation"]].tolist() == pytest.approx([1, 0.5, 1])
    assert np.isnan(value["border_contrast"]) and "nothing outside" in reason["border_contrast"]


def test_masks_that_are_no_masks_are_refused():
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(InputError, match=r"first that of 'b'.*0 and 1"):
        lesion_statistics(torch.stack([torch.ones(1, 32, 32), torch.full((1, 32, 32), 0.7)]), images, ["a", "b"])
    with pytest.raises(InputError, match=r"masks must be \(2, 1, 32, 32\)"):
        lesion_statistics(torch.zeros(2, 32, 32), images, ["a", "b"])
    with pytest.raises(InputError, match="at least 1 pixel"):
        lesion_statistics(torch.zeros(2, 1, 32, 32), images, ["a", "b"], band=0.01)
