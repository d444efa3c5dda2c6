"""Low-level statistics of images: how bright, how contrasted, which colours, how many edges, how steep a spectrum.

For asking what of them a layer keeps (`readout`). Tables are long: one row an image and statistic, and where a
statistic does not exist its value is NaN and `reason` says why. Nothing here knows of lesions (see `lesion_statistics`)
or of networks.

Images are RGB display values in [0, 1] (sRGB). Light adds up in linear values only, so luminance, contrast and the
spectrum are those of linear light; colours and edges are taken of the display values, as networks get them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import ndimage, signal
from torch import Tensor

from utils import InputError

WEIGHTS = np.array([0.2126, 0.7152, 0.0722])  # of red, green and blue in luminance (ITU-R BT.709)
EDGE = 0.05  # change of luma a pixel, of its whole range
LOWEST_CYCLES = 3  # an image; the window's main lobe spreads the mean and slow gradients over 2
FEWEST_RINGS = 6  # frequencies that a slope is fitted to, so images of 16 pixels
COLUMNS = ["id", "statistic", "value", "reason"]

Values = tuple[np.ndarray, list[str]]  # one an image, and why it is NaN ("" where it is not)


def image_statistics(images: Tensor, ids: Sequence[str]) -> pd.DataFrame:
    """Six statistics of every image, in long form: id, statistic, value, reason.

    images : (B, 3, H, W) RGB display values in [0, 1], not normalised for a network
    luminance : mean of Y = 0.2126 R + 0.7152 G + 0.0722 B of linear light (ITU-R BT.709), in [0, 1]
    rms_contrast : standard deviation of Y over its mean (Frazor & Geisler 2006); a black image has none
    red_green, yellow_blue : means of R − G and of (R + G)/2 − B of display values (Hasler & Süsstrunk 2003)
    edge_density : share of pixels where luma changes by more than `EDGE` a pixel, see `edge_density`
    spectral_slope : −a where the power of Y falls as 1/fᵃ with spatial frequency f, see `spectral_slope`
    """
    pixels = checked_images(images, ids)
    luma = np.tensordot(pixels, WEIGHTS, axes=(1, 0))
    luminance = np.tensordot(linear_light(pixels), WEIGHTS, axes=(1, 0))
    red, green, blue = pixels.mean((2, 3)).T
    values = {
        "luminance": all_exist(luminance.mean((1, 2))),
        "rms_contrast": one_by_one(rms_contrast, luminance),
        "red_green": all_exist(red - green),
        "yellow_blue": all_exist((red + green) / 2 - blue),
        "edge_density": all_exist(np.array([edge_density(image) for image in luma])),
        "spectral_slope": one_by_one(spectral_slope, luminance),
    }
    return long_table(ids, values)


def linear_light(display: np.ndarray) -> np.ndarray:
    """Display values in [0, 1] as linear light (IEC 61966-2-1, sRGB)."""
    return np.where(display <= 0.04045, display / 12.92, ((display + 0.055) / 1.055) ** 2.4)


def rms_contrast(luminance: np.ndarray) -> float | str:
    """Standard deviation over mean of (H, W), or why there is none. 1 where half is black and half is white."""
    mean = luminance.mean()
    return luminance.std() / mean if mean else "the image is black, and contrast is relative to the mean luminance"


def edge_density(luma: np.ndarray, threshold: float = EDGE) -> float:
    """Share of the pixels of (H, W), the outermost left out, whose gradient is above the threshold.

    The gradient is Sobel's over 8, in luma a pixel: a ramp has its own slope, a step of height h has h/2 at the pixels
    on both of its sides.
    """
    gradient = np.hypot(ndimage.sobel(luma, 0), ndimage.sobel(luma, 1)) / 8
    return float((gradient[1:-1, 1:-1] > threshold).mean())


def spectral_slope(luminance: np.ndarray) -> float | str:
    """Slope of log power against log frequency of (H, W), or why there is none: −a of power that falls as 1/fᵃ.

    Y less its mean under a Hann window (the window's square sums to 1, the mean is weighted by the window); power
    averaged over rings one cycle per shorter side wide, from `LOWEST_CYCLES` cycles to half a cycle a pixel; least
    squares with the same weight for every ring (van der Schaaf & van Hateren 1996 average radially in the same way).
    """
    if min(luminance.shape) < 2 * (LOWEST_CYCLES + FEWEST_RINGS - 1):
        return f"a slope is fitted to {FEWEST_RINGS} frequencies or more; {min(luminance.shape)} pixels have fewer"
    window = np.outer(*(signal.windows.hann(side, sym=False) for side in luminance.shape))
    window /= np.sqrt((window**2).sum())
    varying = luminance - (luminance * window).sum() / window.sum()
    log_frequency, power = _rings(np.abs(np.fft.fft2(varying * window)) ** 2)
    # pixels of float32 in [0, 1] are rounded by up to half its eps, white noise of power eps²/12 or less
    lost = int((power <= np.finfo(np.float32).eps ** 2).sum())
    if lost:
        return f"{lost} of {len(power)} frequencies have no power beyond float32 rounding" + (
            ": luminance does not vary" if lost == len(power) else ""
        )
    return float(np.polyfit(log_frequency, np.log(power), 1)[0])


def _rings(power: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean log frequency, mean power) of the rings of a spectrum (H, W) as fft2 orders it."""
    side = min(power.shape)
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(length) for length in power.shape), indexing="ij"))
    ring = np.round(frequency * side).astype(int)
    used = (ring >= LOWEST_CYCLES) & (ring <= side // 2)
    counts = np.bincount(ring[used])[LOWEST_CYCLES:]
    sums = (np.bincount(ring[used], values)[LOWEST_CYCLES:] for values in (np.log(frequency[used]), power[used]))
    log_frequency, total = sums
    return log_frequency / counts, total / counts


# ----------------------------------------------------------------------------------------- tables, and what is refused


def all_exist(values: np.ndarray) -> Values:
    """Values that every image has."""
    return values, [""] * len(values)


def one_by_one(statistic: Callable[..., float | str], *arrays: np.ndarray) -> Values:
    """A statistic of each image, NaN where it answers with a reason instead."""
    found = [statistic(*each) for each in zip(*arrays, strict=True)]
    reasons = [one if isinstance(one, str) else "" for one in found]
    return np.array([np.nan if reason else one for one, reason in zip(found, reasons)]), reasons


def long_table(ids: Sequence[str], values: Mapping[str, Values]) -> pd.DataFrame:
    """{statistic: (values, reasons)} of the same images as one row an image and statistic."""
    parts = [
        pd.DataFrame({"id": list(ids), "statistic": name, "value": numbers, "reason": reasons})
        for name, (numbers, reasons) in values.items()
    ]
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def checked_images(images: Tensor, ids: Sequence[str]) -> np.ndarray:
    """(B, 3, H, W) as float64; InputError for what are no display values, and for ids that are not one an image."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"images must be a float tensor (B, 3, H, W); got {tuple(images.shape)} of {images.dtype}: of grey images "
            "repeat the channel, and divide whole numbers by their largest value"
        )
    check_ids(ids, len(images))
    if min(images.shape[2:]) < 3:
        raise InputError(
            f"images of {tuple(images.shape[2:])} pixels have no inside to find edges in; give larger ones"
        )
    pixels = images.detach().cpu().double().numpy()
    outside = ~((pixels >= 0) & (pixels <= 1)).all((1, 2, 3))  # NaN is outside, too
    if outside.any():
        raise InputError(
            f"{outside.sum()} of {len(pixels)} images, the first {ids[int(outside.argmax())]!r}, hold values outside "
            "[0, 1]; give the pixels as they are displayed, before a network's normalisation"
        )
    return pixels


def check_ids(ids: Sequence[str], images: int) -> None:
    """One id an image, none twice, or InputError."""
    if len(ids) != images or not images:
        raise InputError(f"{len(ids)} ids were given for {images} images; give one each, and at least one image")
    repeated = pd.Index(ids)[pd.Index(ids).duplicated()]
    if len(repeated):
        raise InputError(f"image id {repeated[0]!r} comes twice; every image has statistics of its own")
