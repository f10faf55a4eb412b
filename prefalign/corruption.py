"""Seeded operations that spoil a picture and keep its size: diffusion noise, blanking.

Pictures are RGB `PIL.Image`s; a seed comes from `records.row_seed(seed, id)`, so the same row is always spoilt the same way.
"""

from __future__ import annotations

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
