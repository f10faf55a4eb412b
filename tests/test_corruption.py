"""POVID's noise to its check values, and what clamping, wrapping and blanking do to pixels."""

import numpy as np
import pytest
from PIL import Image

from prefalign.corruption import blank, diffusion_noise, noise_factors
from tests.tiny_vlms import picture


@pytest.mark.parametrize(
    ("step", "signal", "noise"),
    [
        (300, 0.98098, 0.19409),
        (400, 0.94486, 0.32748),
        (500, 0.86302, 0.50518),
        (600, 0.73425, 0.67888),
        (999, 0.28504, 0.95852),
    ],
)
def test_noise_factors(step, signal, noise):
    # the published table is off by less than one unit of its last digit at 500 (0.505175) and 999 (0.958515)
    assert noise_factors(step) == pytest.approx((signal, noise), abs=5.5e-6)


def test_noise_factors_counted_from_one():
    assert noise_factors(500, first=1) == pytest.approx((0.86344, 0.50444), abs=5e-6)


def test_first_factor_by_hand():
    # beta_0 = sigmoid(-6) * 0.00499 + 0.00001 = 0.00247262 * 0.00499 + 0.00001 = 2.233838e-5
    assert noise_factors(0)[1] ** 2 == pytest.approx(2.233838e-5, rel=1e-5)


@pytest.mark.parametrize(("step", "first"), [(-1, 0), (1000, 0), (0, 1), (1001, 1)])
def test_steps_outside_the_schedule(step, first):
    with pytest.raises(ValueError, match=rf"noise step {step} is outside the schedule.*from {first} to {999 + first}"):
        noise_factors(step, first=first)


def test_noised_pixels_have_the_mean_and_spread_of_the_formula():
    grey = Image.new("RGB", (300, 200), (128, 128, 128))
    pixels = np.asarray(diffusion_noise(grey, seed=0, step=300), dtype=float)
    # 0.98098 * 128 = 125.57, half a level lost in truncation; 0.19409 * 255 = 49.49, a little less where it was clamped
    assert pixels.mean() == pytest.approx(125.57 - 0.5, abs=0.6)
    assert pixels.std() == pytest.approx(49.49, abs=1.2)


def test_noise_is_seeded_and_depends_on_the_picture():
    one = diffusion_noise(picture(0), seed=7)
    assert one.size == picture(0).size
    assert one.mode == "RGB"
    assert one.tobytes() == diffusion_noise(picture(0), seed=7).tobytes()
    assert one.tobytes() != diffusion_noise(picture(0), seed=8).tobytes()
    assert one.tobytes() != diffusion_noise(picture(1), seed=7).tobytes()


def test_wrapping_differs_only_where_values_leave_the_range():
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    clamped = np.asarray(diffusion_noise(white, seed=1, step=100)).astype(int)
    wrapped = np.asarray(diffusion_noise(white, seed=1, step=100, wrap=True)).astype(int)
    inside = clamped == wrapped
    assert 0.2 < inside.mean() < 0.8
    assert (clamped[~inside] == 255).all()
    assert wrapped[~inside].mean() < 60  # just above white wraps to near black


def test_noise_at_encoder_resolution_survives_shrinking():
    grey = Image.new("RGB", (1344, 1344), (128, 128, 128))
    spread = {
        space: np.asarray(
            diffusion_noise(grey, seed=0, step=300, space=space).resize((336, 336), Image.Resampling.BOX)
        ).std()
        for space in ("native", "preprocessed")
    }
    # sixteen pixels are averaged into one: a quarter of the noise is left, or all of it
    assert spread["native"] == pytest.approx(49.49 / 4, abs=0.6)
    assert spread["preprocessed"] == pytest.approx(49.49, abs=1.2)


def test_small_pictures_are_noised_alike_in_both_spaces():
    small = picture(3)
    assert diffusion_noise(small, seed=2).tobytes() == diffusion_noise(small, seed=2, space="preprocessed").tobytes()


def test_blank():
    halves = Image.new("RGB", (10, 4), (200, 0, 10))
    halves.paste((100, 50, 30), (0, 0, 5, 4))
    assert blank(halves).size == (10, 4)
    assert blank(halves).getpixel((9, 3)) == (150, 25, 20)
    assert blank(halves, colour="black").getcolors() == [(40, (0, 0, 0))]
    assert blank(halves, colour="white").getcolors() == [(40, (255, 255, 255))]
