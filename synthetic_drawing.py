"""How one image of the synthetic set is drawn from a seed: skin, lesion, and everything that lies in the way.

Hairs, rulers, bubbles, stickers, ink and vignettes lie over a lesion that is a level set of warped lobes; colour
follows Beer-Lambert absorption by melanin and blood, so that contrast, hue and skin tone hang together as they do in
real images. Which images a set holds, and where they are written, is in `synthetic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

MELANIN = np.array([0.37, 0.70, 1.0], np.float32)  # absorbance of R, G, B at unit density
BLOOD = np.array([0.08, 0.62, 0.48], np.float32)
SKIN_RED = np.array([236, 224, 214, 206, 190, 158, 122], np.float32)  # seven skins, light to dark, in 0..255
SKIN_GREEN = np.array([205, 192, 178, 170, 148, 116, 86], np.float32)
SKIN_BLUE = np.array([198, 184, 162, 146, 124, 92, 68], np.float32)
SKIN = np.stack([SKIN_RED, SKIN_GREEN, SKIN_BLUE], 1)
SKIN_WEIGHTS = np.array([0.18, 0.22, 0.2, 0.16, 0.12, 0.07, 0.05])
STICKERS = np.array([[200, 200, 20], [245, 150, 25], [110, 200, 195], [10, 130, 220], [60, 160, 70], [200, 60, 60]])
HAIRS = np.array([[30, 22, 18], [52, 34, 24], [88, 58, 38], [150, 112, 72], [190, 180, 165]])
INK = np.array([[80, 60, 150], [60, 70, 160], [110, 60, 140]])


@dataclass(frozen=True)
class Kind:
    """A family of lesions. Pairs are the ends of uniform draws; single numbers are chances."""

    weight: float
    melanin: tuple[float, float]  # density relative to MELANIN
    blood: tuple[float, float]  # density relative to BLOOD
    softness: tuple[float, float]  # width of the border as a fraction of the lesion's inner radius
    roughness: tuple[float, float]  # irregularity of the outline
    variegation: tuple[float, float]  # relative spread of the pigment inside
    most_lobes: int
    network: float = 0.0
    globules: float = 0.0
    regression: float = 0.0
    veil: float = 0.0
    scale: float = 0.0


KINDS = {
    "naevus": Kind(0.36, (0.4, 1.1), (0.0, 0.15), (0.04, 0.16), (0.3, 0.9), (0.15, 0.4), 2, 0.6, 0.35, 0.05, 0.0),
    "melanoma": Kind(0.26, (0.6, 1.7), (0.0, 0.25), (0.02, 0.14), (0.5, 1.3), (0.3, 0.65), 4, 0.5, 0.5, 0.5, 0.4),
    "keratosis": Kind(0.14, (0.3, 1.0), (0.0, 0.2), (0.01, 0.05), (0.2, 0.7), (0.2, 0.45), 2, 0.0, 0.6, 0.1, 0.1, 0.6),
    "pink": Kind(0.12, (0.08, 0.3), (0.35, 0.9), (0.05, 0.2), (0.3, 1.0), (0.2, 0.5), 3, 0.0, 0.3, 0.3, 0.0, 0.3),
    "faint": Kind(0.12, (0.22, 0.4), (0.03, 0.2), (0.08, 0.25), (0.5, 1.2), (0.2, 0.45), 3, 0.7, 0.1, 0.2, 0.0),
}


class Lesion(NamedTuple):
    """The lesion's shape; both maps are (size, size)."""

    mask: np.ndarray  # bool
    depth: np.ndarray  # float32, signed distance to the border in image widths, positive inside


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as x (1, size) and y (size, 1), in image widths from 0 to 1."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return axis[None, :], axis[:, None]


def _noise(rng: np.random.Generator, size: int, cells: int, octaves: int = 1, rows: int = 0) -> np.ndarray:
    """Smooth noise (size, size), about N(0, 1), with `cells` cells across (`rows` down) in its coarsest octave.

    Random numbers are drawn per cell, not per pixel, so a seed gives much the same scene at every size.
    """
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        shape = ((rows or cells) << octave, cells << octave)
        grid = rng.standard_normal(shape, dtype=np.float32)
        total += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC) * 0.55**octave
    return total * (1.35 / sum(0.55 ** (2 * octave) for octave in range(octaves)) ** 0.5)


def _soft_step(values: np.ndarray) -> np.ndarray:
    """Logistic step from 0 to 1; the clip only keeps exp() from overflowing."""
    return 1 / (1 + np.exp(-np.clip(values, -30, 30)))


def _strokes(size: int, lines: list[np.ndarray], widths: list[float]) -> np.ndarray:
    """Antialiased coverage (size, size) in [0, 1] of polylines (points, 2) and their widths, in image widths."""
    scale = 2 * size  # drawn at twice the size: a hair may be thinner than a pixel
    canvas = np.zeros((scale, scale), np.uint8)
    for line, width in zip(lines, widths):
        points = np.round(line * scale * 16).astype(np.int32)
        cv2.polylines(canvas, [points], False, 255, max(1, round(width * scale)), cv2.LINE_AA, shift=4)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _blend(image: np.ndarray, coverage: np.ndarray, colour) -> None:
    """Lay `colour` over `image` in place, by `coverage` (size, size) in [0, 1]."""
    image += coverage[..., None] * (np.asarray(colour, np.float32) - image)


def _lobes(rng: np.random.Generator, size: int, area: float, most: int, touches: bool) -> np.ndarray:
    """Height field (size, size) of one to `most` joined ellipses: 1 at the centres, 0 at about the wanted outline."""
    count = int(rng.integers(1, most + 1))
    radius = (area / np.pi) ** 0.5
    room = max(0.45 - 1.2 * radius, 0.02)
    centre = 0.5 + rng.uniform(-room, room, 2)
    if touches:
        centre[rng.integers(2)] = rng.choice([0.75, 0.25]) + rng.uniform(-0.3, 0.3) * (0.6 - radius)
    stretch = 1 + rng.uniform(0, 0.9) * (1 - area)
    angle = rng.uniform(0, np.pi)
    warp = 0.2 * radius
    x, y = _grid(size)
    x, y = x + warp * _noise(rng, size, 3), y + warp * _noise(rng, size, 3)
    field = np.zeros((size, size), np.float32)
    for lobe in range(count):
        turn = rng.uniform(0, 2 * np.pi)
        reach = 0 if lobe == 0 else radius * rng.uniform(0.6, 1.0)
        u, v = x - centre[0] - reach * np.cos(turn), y - centre[1] - reach * np.sin(turn)
        tilt = angle + rng.normal(0, 0.5)
        along, across = np.cos(tilt) * u + np.sin(tilt) * v, np.cos(tilt) * v - np.sin(tilt) * u
        own = radius * (1 if lobe == 0 else rng.uniform(0.4, 0.8))
        distance = np.sqrt(along**2 / stretch + across**2 * stretch) / own
        field += np.exp(6 * np.clip(1 - distance, -8, 1))  # the soft maximum joins lobes without a crease
    return np.log(field) / 6


def _outline(rng: np.random.Generator, size: int, kind: Kind, *, touches: bool) -> np.ndarray:
    """One attempt at a lesion: uint8 (size, size) of 0 and 1, in one piece without holes, perhaps empty."""
    area = 0.05 * 12 ** rng.beta(1.5, 1.1)  # 5 to 60 % of the image, small ones more often
    field = _lobes(rng, size, area, kind.most_lobes, touches)
    rough = rng.uniform(*kind.roughness)
    field += rough * (0.1 * _noise(rng, size, 7, 2) + 0.05 * _noise(rng, size, 28, 2))
    level = np.quantile(field, 1 - area)
    if not touches:  # raise the level until the outline is clear of the frame
        rim = max(1, size // 40)
        level = max(level, field[:rim].max(), field[-rim:].max(), field[:, :rim].max(), field[:, -rim:].max())
    outlines, _ = cv2.findContours((field > level).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros((size, size), np.uint8)
    if outlines:
        cv2.drawContours(filled, [max(outlines, key=cv2.contourArea)], -1, 1, cv2.FILLED)
    return filled


def _lesion(rng: np.random.Generator, size: int, kind: Kind) -> Lesion:
    """A lesion over 4 to 65 % of the image; about one in ten reaches the frame."""
    touches = rng.random() < 0.14
    filled = _outline(rng, size, kind, touches=touches)
    while not 0.04 < filled.mean() < 0.65:  # a lobe fell outside the frame: most attempts do not, so this ends
        filled = _outline(rng, size, kind, touches=touches)
    inside = cv2.distanceTransform(filled, cv2.DIST_L2, 5)
    outside = cv2.distanceTransform(1 - filled, cv2.DIST_L2, 5)
    return Lesion(filled > 0, np.where(filled > 0, inside - 0.5, 0.5 - outside) / size)


def _dots(rng: np.random.Generator, size: int, lesion: Lesion, count: int, radii: tuple[float, float]) -> np.ndarray:
    """Coverage (size, size) of small round spots scattered over the lesion."""
    centres = rng.random((count, 2))
    widths = 2 * rng.uniform(*radii, count)
    points = [np.stack([centre, centre + 1e-3]) for centre in centres]
    return _strokes(size, points, list(widths)) * (lesion.depth > 0)


def _pigment(rng: np.random.Generator, size: int, lesion: Lesion, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Melanin and blood densities (size, size) that the lesion adds to the skin."""
    softness = max(rng.uniform(*kind.softness) * lesion.depth.max(), 0.25 / size)
    body = _soft_step(lesion.depth / (softness * np.exp(0.35 * _noise(rng, size, 5))))
    spread = rng.uniform(*kind.variegation)
    relief = 1 + spread * (0.8 * _noise(rng, size, 4, 2) + 0.5 * _noise(rng, size, 14, 2))
    if rng.random() < kind.network:
        web = np.exp(-((_noise(rng, size, int(rng.integers(30, 46))) / 0.4) ** 2))
        relief += rng.uniform(0.25, 0.6) * (web - 0.4)
    if rng.random() < kind.globules:
        globules = _dots(rng, size, lesion, int(rng.integers(60, 300)), (0.004, 0.011))
        relief += rng.uniform(0.4, 1.0) * globules * _soft_step(3 * _noise(rng, size, 3))
    if rng.random() < kind.regression:
        relief *= 1 - rng.uniform(0.5, 0.85) * _soft_step(6 * (_noise(rng, size, 5, 3) - rng.uniform(0.6, 1.4)))
    centre = lesion.depth / lesion.depth.max()  # some lesions are darkest in the middle, some paler
    relief *= 1 + rng.uniform(-0.25, 0.5) * np.clip(centre, 0, 1)
    relief = np.clip(relief, 0.2, 2.2)
    blood = np.clip(1 + 0.5 * _noise(rng, size, 5, 3), 0.1, 2.5)
    return body * relief * rng.uniform(*kind.melanin), body * blood * rng.uniform(*kind.blood)


def _surface(rng: np.random.Generator, image: np.ndarray, lesion: Lesion, kind: Kind) -> None:
    """Blue-white veil and pale scales, which lie over the lesion's pigment, in place."""
    size = len(image)
    if rng.random() < kind.veil:
        veil = _soft_step(3 * (_noise(rng, size, 4, 4) - rng.uniform(0, 0.8))) * _soft_step(lesion.depth * 80 - 3)
        _blend(image, rng.uniform(0.35, 0.7) * veil, np.array([104, 112, 138]) * rng.uniform(0.75, 1.2))
    if rng.random() < kind.scale:
        scales = _soft_step(3 * (_noise(rng, size, 14, 3) - rng.uniform(0.5, 1.2))) * _soft_step(lesion.depth * 150 - 2)
        _blend(image, rng.uniform(0.2, 0.6) * scales, (226, 214, 205))


def _skin(rng: np.random.Generator, size: int, lesion: Lesion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Base reflectance (3,) in 0..255, and the skin's own melanin and blood densities (size, size)."""
    tone = SKIN[rng.choice(len(SKIN), p=SKIN_WEIGHTS)] * np.exp(rng.normal(0, 0.05, 3)) * rng.uniform(0.88, 1.14)
    mottle, flush = rng.uniform(0.01, 0.05), rng.uniform(0.01, 0.07)
    melanin = mottle * (_noise(rng, size, 5, 4) + 0.6 * _noise(rng, size, 40))
    lines = _noise(rng, size, 18, 2, rows=44) if rng.random() < 0.5 else _noise(rng, size, 44, 2, rows=18)
    melanin += rng.uniform(0, 0.03) * lines
    blood = flush * _noise(rng, size, 6, 4)
    if rng.random() < 0.25:  # a flushed surround, which is not lesion
        blood += rng.uniform(0.15, 0.5) * np.exp(np.minimum(lesion.depth, 0) / rng.uniform(0.03, 0.12))
    if rng.random() < 0.3:  # freckles, which are not lesion either
        melanin += rng.uniform(0.15, 0.6) * _freckles(rng, size, lesion)
    return np.clip(tone, 0, 250).astype(np.float32), melanin, blood


def _freckles(rng: np.random.Generator, size: int, lesion: Lesion) -> np.ndarray:
    """Coverage (size, size) of small blurred spots, kept clear of the lesion."""
    count = int(rng.integers(3, 30))
    centres, widths = rng.random((count, 2)), rng.uniform(0.01, 0.045, count)
    spots = _strokes(size, [np.stack([centre, centre + 0.006]) for centre in centres], list(widths))
    return cv2.GaussianBlur(spots, (0, 0), 0.007 * size) * _soft_step(-(lesion.depth + 0.04) * 150)


def _hairs(rng: np.random.Generator, image: np.ndarray) -> None:
    """Curved hairs of one colour, mostly along one direction, with a faint shadow, in place."""
    count = int(rng.choice([rng.integers(2, 8), rng.integers(8, 22), rng.integers(22, 45)], p=[0.55, 0.33, 0.12]))
    colour = HAIRS[rng.choice(len(HAIRS), p=[0.3, 0.3, 0.2, 0.12, 0.08])] * rng.uniform(0.8, 1.1)
    thick, direction, disorder = rng.uniform(0.0015, 0.0055), rng.uniform(0, 2 * np.pi), rng.choice([0.3, 1.5])
    steps = np.linspace(-0.5, 0.5, 14)[:, None]
    lines = []
    for _ in range(count):
        turn = direction + rng.normal(0, disorder)
        along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
        length, bend, wave = rng.uniform(0.3, 1.4), rng.normal(0, 0.25), rng.normal(0, 0.25)
        curve = steps * along + (bend * steps**2 + wave * steps**3) * across
        lines.append(rng.uniform(-0.1, 1.1, 2) + length * curve)
    widths = list(thick * rng.uniform(0.7, 1.3, count))
    shadow = np.roll(_strokes(len(image), lines, [2 * width for width in widths]), 1, axis=(0, 1))
    image *= 1 - 0.12 * shadow[..., None]
    _blend(image, rng.uniform(0.65, 0.95) * _strokes(len(image), lines, widths), colour)


def _ruler(rng: np.random.Generator, image: np.ndarray) -> None:
    """A millimetre scale along one edge, slightly tilted, with longer ticks at every fifth place, in place."""
    start, end, offset = rng.uniform(0.02, 0.3), rng.uniform(0.6, 0.98), rng.uniform(0.03, 0.12)
    tilt, step = rng.normal(0, 0.06), rng.uniform(0.02, 0.05)
    places = np.arange(start, end, step)
    lines = []
    for number, place in enumerate(places):
        depth, height = offset + tilt * (place - 0.5), 0.035 if number % 5 == 0 else 0.018
        lines.append(np.array([[place, depth], [place - tilt * height, depth + height]]))
    if rng.random() < 0.6:
        lines.append(np.array([[place, offset + tilt * (place - 0.5)] for place in (places[0], places[-1])]))
    coverage = _strokes(len(image), lines, [0.005] * len(lines))
    coverage = np.rot90(coverage, int(rng.choice([2, 0, 1, 3], p=[0.55, 0.15, 0.15, 0.15])))
    _blend(image, rng.uniform(0.6, 0.95) * coverage, [rng.uniform(15, 60)] * 3)


def _sticker(rng: np.random.Generator, image: np.ndarray, lesion: Lesion) -> None:
    """A coloured paper disc that reaches in from outside, in place; none where the lesion leaves no room for it."""
    size = len(image)
    x, y = _grid(size)
    for _ in range(6):
        turn, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.35)
        centre = 0.5 + rng.uniform(0.55, 0.72) * np.array([np.cos(turn), np.sin(turn)])
        disc = _soft_step((radius - np.hypot(x - centre[0], y - centre[1])) * size * 1.5)
        if not (disc[lesion.depth > -0.01] > 0.01).any():
            paper = STICKERS[rng.integers(len(STICKERS))] * rng.uniform(0.75, 1.05)
            _blend(image, disc, paper * (1 + 0.04 * _noise(rng, size, 50)[..., None]))
            return


def _ink(rng: np.random.Generator, image: np.ndarray, lesion: Lesion) -> None:
    """Broken marker strokes around the lesion, in place: ink sits in the skin's lines, hence the grain."""
    size = len(image)
    ys, xs = np.nonzero(lesion.mask)
    centre = np.array([xs.mean(), ys.mean()]) / size
    reach = (lesion.mask.mean() / np.pi) ** 0.5 + rng.uniform(0.1, 0.2)
    lines = []
    for _ in range(int(rng.integers(2, 6))):
        turns = rng.uniform(0, 2 * np.pi) + np.linspace(0, rng.uniform(0.3, 0.9), 9)
        circle = np.stack([np.cos(turns), np.sin(turns)], 1)
        lines.append(centre + reach * rng.uniform(0.9, 1.2) * circle + rng.normal(0, 0.006, (9, 2)))
    stain = _strokes(size, lines, [rng.uniform(0.015, 0.035)] * len(lines)) * _soft_step(-(lesion.depth + 0.01) * 200)
    grain = _soft_step(2.5 * (_noise(rng, size, 36, 2) - 0.2))
    image *= 1 - (0.75 * stain * grain)[..., None] * (1 - INK[rng.integers(len(INK))] / 255).astype(np.float32)


def _bubbles(rng: np.random.Generator, image: np.ndarray) -> None:
    """Gel bubbles in a loose clump: a darker rim, a brighter inner rim and a specular highlight, in place."""
    size, scale = len(image), 2 * len(image)
    rim, glow, shine = (np.zeros((scale, scale), np.uint8) for _ in range(3))
    clump = rng.random(2)
    for _ in range(int(rng.integers(2, 14))):
        centre = clump + rng.normal(0, 0.18, 2)
        radius = 0.008 + 0.045 * rng.beta(1, 3)
        at = tuple(int(value) for value in np.round(centre * scale * 16))
        line = max(1, round(0.004 * scale))
        cv2.circle(rim, at, round(radius * scale * 16), 255, line, cv2.LINE_AA, 4)
        cv2.circle(glow, at, round(0.8 * radius * scale * 16), 255, line, cv2.LINE_AA, 4)
        spot = tuple(int(value) for value in np.round((centre - 0.4 * radius) * scale * 16))
        cv2.circle(shine, spot, round((0.25 * radius + 0.002) * scale * 16), 255, cv2.FILLED, cv2.LINE_AA, 4)
    for layer, opacity, colour in ((rim, 0.3, (60, 45, 40)), (glow, 0.35, (250, 244, 240)), (shine, 0.9, (255,) * 3)):
        coverage = cv2.resize(layer, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        _blend(image, opacity * coverage, colour)


def _light(rng: np.random.Generator, image: np.ndarray, *, dark_corners: bool) -> None:
    """Uneven lighting with a colour cast, and (in some) the dark corners of a round lens, in place."""
    x, y = _grid(len(image))
    turn, slope, falloff = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.45), rng.uniform(0, 0.5)
    dx, dy = x - 0.5 + rng.normal(0, 0.06), y - 0.5 + rng.normal(0, 0.06)
    distance = np.hypot(dx, dy)
    light = 1 + slope * (np.cos(turn) * dx + np.sin(turn) * dy) - falloff * distance**2
    if dark_corners:
        light *= _soft_step((rng.uniform(0.52, 0.66) - distance) / rng.uniform(0.005, 0.035)) * 0.95 + 0.05
    image *= light[..., None] * np.exp(rng.normal(0, 0.03, 3)).astype(np.float32)


def draw(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image `index` of the set `seed`: RGB image (size, size, 3) uint8 and mask (size, size) uint8 in {0, 255}.

    The mask is the lesion's outline before hairs, bubbles and the like are laid over it. Seed and index are 0 or more.
    """
    rng = np.random.default_rng([seed, index])
    kinds = list(KINDS.values())
    kind = kinds[rng.choice(len(kinds), p=[kind.weight for kind in kinds])]
    lesion = _lesion(rng, size, kind)
    tone, melanin, blood = _skin(rng, size, lesion)
    more_melanin, more_blood = _pigment(rng, size, lesion, kind)
    absorbed = (melanin + more_melanin)[..., None] * MELANIN + (blood + more_blood)[..., None] * BLOOD
    image = (tone * np.exp(-absorbed)).astype(np.float32)
    _surface(rng, image, lesion, kind)
    for chance, lay, about in (
        (0.10, _ink, (lesion,)),
        (0.12, _sticker, (lesion,)),
        (0.25, _ruler, ()),
        (0.45, _hairs, ()),
        (0.25, _bubbles, ()),
    ):
        if rng.random() < chance:
            lay(rng, image, *about)
    x, y = _grid(size)
    reach = np.hypot(x - 0.5, y - 0.5)[lesion.mask].max()
    _light(rng, image, dark_corners=rng.random() < 0.25 and reach < 0.5)  # the lesion must stay in sight
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.0) * size / 160)
    image += rng.uniform(0.5, 3.5) * rng.standard_normal(image.shape, dtype=np.float32)  # the sensor; drawn last
    return np.clip(np.round(image), 0, 255).astype(np.uint8), lesion.mask.astype(np.uint8) * 255
