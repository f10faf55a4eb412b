"""Low resolution and colour jitter: worked pixel values, draws, and when jitter does not show."""

import math

import numpy as np
import pytest
from PIL import Image

from prefalign import config
from prefalign.corruption import Jitter, colour_jitter, jitter_shows, low_resolution
from tests.tiny_vlms import picture


def dot(*colour):
    return Image.new("RGB", (1, 1), colour)


def jittered(colour, brightness=1.0, hue=0.0):
    return colour_jitter(dot(*colour), brightness=brightness, hue=hue).getpixel((0, 0))


@pytest.mark.parametrize(
    ("colour", "factor", "expected"),
    [
        ((100, 100, 100), 0.5, (50, 50, 50)),
        ((100, 100, 100), 1.5, (150, 150, 150)),
        ((101, 101, 101), 0.5, (50, 50, 50)),  # 50.5 is cut, not rounded
        ((200, 200, 200), 1.5, (255, 255, 255)),  # 300 stops at 255
    ],
)
def test_brightness_multiplies(colour, factor, expected):
    assert jittered(colour, brightness=factor) == expected


@pytest.mark.parametrize(
    ("hue", "expected"),
    [
        (0.0, (255, 0, 0)),
        (0.3, (54, 255, 0)),
        (-0.3, (60, 0, 255)),
        (0.5, (0, 255, 252)),
    ],
)
def test_hue_turns_red(hue, expected):
    """Pillow's hue of pure red is 0 of 256 steps, one turn of the circle being 255 of them; its saturation and value are 255.

    +0.3: trunc(76.5) = 76 steps, 6 * 76 / 255 = 1.788: sixth 1, so green is full, blue 0, red 255 * (1 - 0.788) = 54.
    -0.3: 256 - 76 = 180, 6 * 180 / 255 = 4.235: sixth 4, blue full, green 0, red 255 * 0.235 = 60.
    +0.5: 127, 6 * 127 / 255 = 2.988: sixth 2, green full, red 0, blue 255 * 0.988 = 252.
    """
    assert jittered((255, 0, 0), hue=hue) == expected


def test_brightness_comes_before_hue():
    """(200, 100, 40) * 1.5 = (255, 150, 60): red stops at 255 and the hue is another one by the time it is turned."""
    first = jittered((200, 100, 40), brightness=1.5)
    assert np.abs(np.array(first) - (255, 150, 60)).max() <= 3  # HSV has 256 hues
    assert jittered((200, 100, 40), brightness=1.5, hue=0.3) == jittered((255, 150, 60), hue=0.3)
    other = colour_jitter(dot(*jittered((200, 100, 40), hue=0.3)), brightness=1.5, hue=0).getpixel((0, 0))
    assert other != jittered((200, 100, 40), brightness=1.5, hue=0.3)


def test_grey_has_no_hue():
    assert jittered((90, 90, 90), hue=0.3) == (90, 90, 90)


def test_jitter_shows_where_there_is_colour_and_a_change():
    red, grey = Image.new("RGB", (8, 8), (200, 30, 30)), Image.new("RGB", (8, 8), (120, 120, 120))
    assert jitter_shows(red, colour_jitter(red, brightness=1, hue=0.2))
    assert not jitter_shows(red, colour_jitter(red, brightness=1, hue=0))
    assert not jitter_shows(grey, colour_jitter(grey, brightness=0.5, hue=0.3))
    assert not jitter_shows(grey, colour_jitter(grey, brightness=1, hue=0.3))
    speck = grey.copy()
    speck.putpixel((0, 0), (255, 0, 0))  # 255 / 64 = 3.98 levels of spread in the mean, just below 4
    assert not jitter_shows(speck, colour_jitter(speck, brightness=0.5, hue=0.3))


def test_factors_lie_in_their_ranges_and_are_never_weak():
    jitter = Jitter()
    drawn = [jitter.factors(seed) for seed in range(400)]
    assert all(0.5 <= factor <= 1.5 and -0.3 <= hue <= 0.3 for factor, hue in drawn)
    assert all(abs(factor - 1) >= 0.1 or abs(hue) >= 0.05 for factor, hue in drawn)
    weak = [jitter.factors(seed) != Jitter(least_brightness=0, least_hue=0).factors(seed) for seed in range(400)]
    # 0.2 of the brightness range times 1/6 of the hue range is drawn again: 13 of 400
    assert math.isclose(sum(weak), 400 / 30, abs_tol=12)
    assert sum(weak) > 0
    assert jitter.factors(5) == jitter.factors(5) != jitter.factors(6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"brightness": (1.5, 0.5)}, "are ranges, lowest first"),
        ({"brightness": (-0.5, 1.5)}, "factors from 0"),
        ({"hue": (-0.6, 0.3)}, "shifts from -0.5 to 0.5 of the colour circle. Take"),
        (
            {"brightness": (0.95, 1.05), "hue": (-0.01, 0.01)},
            "never reach the least strength .0.1 or 0.05., so no draw would do",
        ),
    ],
)
def test_jitter_that_cannot_be_drawn(values, message):
    with pytest.raises(ValueError, match=message):
        Jitter(**values)
    with pytest.raises(config.ConfigError, match=message):
        config.build(Jitter, values)


@pytest.mark.parametrize(
    ("size", "short_side", "small"),
    [
        ((640, 480), 20, (26, 20)),  # 640 * 20 / 480 = 26.67, cut as torchvision cuts it
        ((480, 640), 20, (20, 26)),
        ((60, 60), 20, (15, 15)),  # a quarter of 60
        ((70, 210), 20, (17, 51)),  # 70 / 4 = 17.5, cut; 210 * 17 / 70 = 51
        ((3, 5), 20, (1, 1)),
        ((1000, 10), 20, (200, 2)),
        ((640, 480), 8, (10, 8)),
    ],
)
def test_low_resolution_shrinks_to_the_target_and_back(size, short_side, small, monkeypatch):
    seen = []
    resize = Image.Image.resize

    def watched(self, size, *rest, **more):
        seen.append(size)
        return resize(self, size, *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    shrunk = low_resolution(picture(0, size), short_side=short_side)
    assert seen == [small, size]
    assert (shrunk.size, shrunk.mode) == (size, "RGB")


def test_low_resolution_keeps_the_mean_and_loses_the_detail():
    """Lines one pixel wide, black and white, become an even grey; a picture of one colour stays as it is."""
    lines = np.zeros((160, 160, 3), dtype=np.uint8)
    lines[:, ::2] = 255
    grey = np.asarray(low_resolution(Image.fromarray(lines)), dtype=float)[20:-20, 20:-20]
    assert abs(grey.mean() - 127.5) < 2
    assert grey.std() < 3
    plain = Image.new("RGB", (100, 90), (10, 200, 30))
    assert np.array_equal(np.asarray(low_resolution(plain)), np.asarray(plain))


def test_low_resolution_needs_a_pixel():
    with pytest.raises(ValueError, match="short_side is 0; a picture has at least 1 pixel. Take 20"):
        low_resolution(picture(0), short_side=0)
