"""Seeded operations that spoil a picture and keep its size: crop, blur, masked pixels, diffusion noise, low resolution, colour
jitter, blanking.

Pictures are RGB `PIL.Image`s; a seed comes from `records.row_seed(seed, id)`, so the same row is always spoilt the same way.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image

STEPS = 1000
_LOWEST, _HIGHEST = 1e-5, 5e-3
ENCODER_SIDE = 336


@cache
def noise_factors(step: int, *, first: Literal[0, 1] = 0) -> tuple[float, float]:
    """How much of the picture and how much noise a noised picture holds.

    `beta_k = sigmoid(s_k) * (0.005 - 0.00001) + 0.00001`, `abar_k = prod_{j <= k} (1 - beta_j)`; the factors are
    `(sqrt(abar_k), sqrt(1 - abar_k))`.

    Args:
        step: k, up to 1000 steps. 500 is the published one: (0.86302, 0.50517).
        first: 0 counts from zero with `s` evenly spaced from -6 to 6 (POVID's code); 1 counts from one with spacing 12/1000, as
            the BDHS paper writes it: (0.86344, 0.50444) at 500.

    Returns:
        `(signal, noise)` with `signal**2 + noise**2 == 1`.

    Raises:
        ValueError: if there is no such step.

    Source: POVID, arXiv 2402.11411, `train_dpo_inherent.py` at 92c7c67; BDHS, arXiv 2407.02477, appendix E.1.
    """
    import numpy as np

    if not first <= step < STEPS + first:
        raise ValueError(
            f"noise step {step} is outside the schedule, which has {STEPS} steps from {first} to {STEPS + first - 1}. "
            "Take 500, as published; more drowns the picture."
        )
    points = np.linspace(-6, 6, STEPS) if first == 0 else -6 + 12 / STEPS * np.arange(1, STEPS + 1)
    betas = (_HIGHEST - _LOWEST) / (1 + np.exp(-points)) + _LOWEST
    kept = float(np.prod(1 - betas[: step - first + 1]))
    return kept**0.5, (1 - kept) ** 0.5


def diffusion_noise(
    image: Image.Image,
    *,
    seed: int,
    step: int = 500,
    space: Literal["native", "preprocessed"] = "native",
    wrap: bool = False,
) -> Image.Image:
    """A picture with diffusion noise added in one jump: `signal * x + noise * eps`, `x` in [0, 1], `eps` normal.

    Args:
        image: RGB picture.
        seed: seed of the noise.
        step: step of the schedule, counted from zero (`noise_factors`).
        space: `native` draws the noise for every pixel of the picture, as the released code does; a large picture averages
            much of it away when an encoder shrinks it. `preprocessed` draws it on a grid whose longer side has
            `ENCODER_SIDE` points, so that the same share of noise reaches the encoder whatever the picture's size.
        wrap: let values outside [0, 1] wrap around in the 8-bit conversion, so that white turns black (parity with the
            released code); they are clamped otherwise.

    Returns:
        An RGB picture of the same size.

    Raises:
        ValueError: for a step outside the schedule.

    Source: POVID, arXiv 2402.11411, `train_dpo_inherent.py` at 92c7c67.
    Differs from the released code: clamps (`wrap=True` does not); draws from the row's seed, not anew at each fetch.
    """
    import numpy as np
    from PIL import Image

    signal, noise = noise_factors(step)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    height, width = pixels.shape[:2]
    rows, columns = height, width
    if space == "preprocessed" and max(height, width) > ENCODER_SIDE:
        shrink = ENCODER_SIDE / max(height, width)
        rows, columns = max(1, round(height * shrink)), max(1, round(width * shrink))
    eps = np.random.default_rng(seed).standard_normal((rows, columns, 3), dtype=np.float32)
    if (rows, columns) != (height, width):
        eps = eps[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    noised = (np.float32(signal) * pixels + np.float32(noise) * eps) * 255
    # truncation, not rounding, in both cases: torchvision's `pic.mul(255).byte()`
    levels = np.trunc(noised).astype(np.int64) & 255 if wrap else np.clip(noised, 0, 255)
    return Image.fromarray(levels.astype(np.uint8))


def blank(image: Image.Image, *, colour: Literal["mean", "black", "white"] = "mean") -> Image.Image:
    """A picture of one colour and the same size: its own mean colour, black or white."""
    import numpy as np
    from PIL import Image

    if colour == "mean":
        red, green, blue = np.asarray(image.convert("RGB"), dtype=np.float64).mean(axis=(0, 1)).round().astype(int)
        return Image.new("RGB", image.size, (int(red), int(green), int(blue)))
    return Image.new("RGB", image.size, colour)


def crop_box(
    size: tuple[int, int],
    *,
    seed: int,
    area: Sequence[float] = (0.01, 0.2),
    aspect: Sequence[float] = (3 / 4, 4 / 3),
    least_side: int = 28,
) -> tuple[int, int, int, int]:
    """A box that shows too little of a picture: area fraction drawn evenly, aspect ratio log-evenly, place evenly.

    Args:
        size: width and height of the picture, in pixels.
        seed: seed of the draw.
        area: smallest and largest share of the picture's area.
        aspect: smallest and largest width over height.
        least_side: a shorter side is lengthened to this many pixels; the largest area still holds.

    Returns:
        `(left, top, width, height)` in whole pixels, never more than the largest area (one pixel apart, in a tiny picture).

    Source: mDPO, arXiv 2406.11839, section 3.2; ranges of its code, `modeling_bunny_phi.py` (torchvision's random resized crop).
    Differs from the released code: drawn for the picture as it is, not for the padded tensor, so that no box lies in the
        padding; where the drawn box is wider or higher than the picture, it keeps its area and gives up its aspect ratio (the
        library falls back to a box of nearly the whole picture, which is no negative).
    """
    columns, rows = size
    rng = random.Random(seed)
    whole = columns * rows
    wanted = rng.uniform(*area) * whole
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    width, height = max(least_side, math.sqrt(wanted * ratio)), max(least_side, math.sqrt(wanted / ratio))
    shrink = min(1.0, math.sqrt(area[1] * whole / (width * height)))
    width, height = width * shrink, height * shrink
    if width > columns:
        width, height = columns, width * height / columns
    if height > rows:
        width, height = width * height / rows, rows
    w, h = (min(side, max(1, round(drawn))) for side, drawn in ((columns, width), (rows, height)))
    while w * h > area[1] * whole and w * h > 1:
        w, h = (w - 1, h) if w > h else (w, h - 1)
    return rng.randint(0, columns - w), rng.randint(0, rows - h), w, h


def crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The part of a picture in `box` (left, top, width, height), enlarged to the whole picture's size (bilinear)."""
    from PIL import Image

    left, top, width, height = box
    part = image.convert("RGB").crop((left, top, left + width, top + height))
    return part.resize(image.size, Image.Resampling.BILINEAR)


def blur(image: Image.Image, *, sigma: float = 0.03) -> Image.Image:
    """A picture under a Gaussian blur whose standard deviation is `sigma` of its longer side."""
    from PIL import ImageFilter

    return image.convert("RGB").filter(ImageFilter.GaussianBlur(sigma * max(image.size)))


def mask_pixels(image: Image.Image, *, seed: int, share: float = 0.3, block: float = 0.0) -> Image.Image:
    """A picture with a share of its pixels, or of square blocks of them, painted black.

    Args:
        image: RGB picture.
        seed: decides which.
        share: how many of them, rounded to the nearest whole number.
        block: side of a block as a share of the longer side; 0 masks single pixels, which an encoder that shrinks the picture
            averages into a darker one.

    Source: OPA-DPO, arXiv 2501.09695, masks 30 % of the pixels.
    """
    import numpy as np
    from PIL import Image

    side = max(1, round(block * max(image.size)))
    pixels = np.array(image.convert("RGB"))
    rows, columns = -(-pixels.shape[0] // side), -(-pixels.shape[1] // side)
    cells = np.zeros(rows * columns, dtype=bool)
    cells[np.random.default_rng(seed).permutation(cells.size)[: round(share * cells.size)]] = True
    masked = cells.reshape(rows, columns).repeat(side, axis=0).repeat(side, axis=1)
    pixels[masked[: pixels.shape[0], : pixels.shape[1]]] = 0
    return Image.fromarray(pixels)


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, 0 (the same) to 1 (black against white)."""
    import numpy as np

    pixels = [np.asarray(image.convert("RGB"), dtype=np.float64) for image in (one, other)]
    return float(np.abs(pixels[0] - pixels[1]).mean() / 255)


def low_resolution(image: Image.Image, *, short_side: int = 20) -> Image.Image:
    """A picture shrunk until its short side has `min(short_side, short / 4)` pixels and enlarged again, both bilinear.

    The quarter makes a small picture lose detail too. The aspect is kept, cut to whole pixels as torchvision's `Resize` does.

    Raises:
        ValueError: for a short side below one pixel.

    Source: STIC, arXiv 2405.19716, `stic/generate_pref.py`.
    Differs from the released code: enlarges again, since some processors refuse so small a picture; below 80 pixels the quarter.
    """
    from PIL import Image

    if short_side < 1:
        raise ValueError(f"short_side is {short_side}; a picture has at least 1 pixel. Take 20, as published.")
    short = min(image.size)
    target = max(1, min(short_side, short // 4))
    shrunk = (image.width * target // short, image.height * target // short)
    small = image.convert("RGB").resize(shrunk, Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.BILINEAR)


@dataclass
class Jitter:
    """How `colour_jitter` is drawn. What would leave a picture nearly as it is is drawn again (STIC's code does not).

    Attributes:
        brightness: range of the brightness factor.
        hue: range of the hue shift, as a share of the colour circle.
        least_brightness: the factor is at least so far from 1, or
        least_hue: the shift is at least so far from 0.
    """

    brightness: tuple[float, float] = (0.5, 1.5)
    hue: tuple[float, float] = (-0.3, 0.3)
    least_brightness: float = 0.1
    least_hue: float = 0.05

    def __post_init__(self) -> None:
        brightness, hue = self.brightness, self.hue
        if not 0 <= brightness[0] <= brightness[1] or not -0.5 <= hue[0] <= hue[1] <= 0.5:
            raise ValueError(
                f"brightness {brightness} and hue {hue} are ranges, lowest first: of factors from 0, and of shifts from -0.5 to "
                "0.5 of the colour circle. Take (0.5, 1.5) and (-0.3, 0.3), as published."
            )
        if max(abs(end - 1) for end in brightness) <= self.least_brightness and max(map(abs, hue)) <= self.least_hue:
            raise ValueError(
                f"brightness {brightness} and hue {hue} never reach the least strength ({self.least_brightness} or "
                f"{self.least_hue}), so no draw would do. Widen a range, or lower the least strength."
            )

    def factors(self, seed: int) -> tuple[float, float]:
        """Brightness factor and hue shift, drawn evenly from their ranges."""
        rng = random.Random(seed)
        while True:
            factor, shift = rng.uniform(*self.brightness), rng.uniform(*self.hue)
            if abs(factor - 1) >= self.least_brightness or abs(shift) >= self.least_hue:
                return factor, shift


def colour_jitter(image: Image.Image, *, brightness: float, hue: float) -> Image.Image:
    """A picture with its channels multiplied and then its hue turned, as torchvision's `adjust_brightness` and `adjust_hue` do.

    Args:
        image: RGB picture.
        brightness: factor of every channel, cut to 0..255 and to whole levels; 1 changes nothing.
        hue: shift as a share of the colour circle: `trunc(255 * hue)` of the 256 steps that Pillow's HSV has.

    Source: STIC, arXiv 2405.19716, `stic/generate_pref.py`.
    """
    import numpy as np
    from PIL import Image, ImageEnhance

    brighter = ImageEnhance.Brightness(image.convert("RGB")).enhance(brightness)
    turns, saturation, value = brighter.convert("HSV").split()
    turned = (np.asarray(turns, dtype=np.int64) + int(hue * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


def jitter_shows(image: Image.Image, jittered: Image.Image) -> bool:
    """Whether colour jitter spoilt a picture: it has colours that a hue shift turns, and its levels (0 to 255) changed.

    Both the mean spread of its channels (0: a grey picture) and the mean absolute change are at least 4.
    """
    import numpy as np

    least = 4.0
    spread = float(np.ptp(np.asarray(image.convert("RGB")), axis=2).mean())
    return spread >= least and 255 * difference(image, jittered) >= least
