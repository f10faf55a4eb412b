"""Canvases: published sizes, where everything lies, pictures that are odd."""

import numpy as np
import pytest
from PIL import Image
from tiny_vlms import picture

from prefalign.collage import GridStyle, fitted, grid, inset, noised

PUBLISHED = GridStyle(square=False)


def colours(count, size=(448, 448)):
    return [Image.new("RGB", size, (20 * number + 10, 0, 200)) for number in range(count)]


class TestGrid:
    @pytest.mark.parametrize(
        ("count", "size"), [(2, (936, 488)), (3, (1424, 488)), (4, (936, 976)), (6, (1424, 976)), (9, (1424, 1464))]
    )
    def test_published_canvases(self, count, size):
        """Columns of 448 with 40 between them, rows of 40 + 448: three columns are 3 * 448 + 2 * 40 = 1424."""
        made = grid(colours(count), PUBLISHED)
        assert made.image.size == size
        assert made.image.mode == "RGB"
        pixels = np.asarray(made.image)
        for number, (left, top, right, bottom) in enumerate(made.cells):
            assert (right - left, bottom - top) == (448, 448)
            assert (pixels[top:bottom, left:right] == (20 * number + 10, 0, 200)).all()
        assert [(left, top - 40, right, bottom) for left, top, right, bottom in made.cells] == made.regions

    def test_cells_run_row_by_row(self):
        assert [box[:2] for box in grid(colours(6), PUBLISHED).cells] == [
            (0, 40), (488, 40), (976, 40), (0, 528), (488, 528), (976, 528)
        ]  # fmt: skip

    def test_labels(self):
        """Black on white in the strip above each cell, beginning 20 pixels right of its corner, and not the same number twice."""
        made = grid(colours(2), PUBLISHED)
        strips = [np.asarray(made.image.convert("L"))[0:40, left : left + 448] for left in (0, 488)]
        for strip in strips:
            dark = np.argwhere(strip < 128)
            assert len(dark) > 200
            assert dark[:, 1].min() >= 20
            assert dark[:, 1].max() < 20 + 200
        assert (strips[0] != strips[1]).any()

    def test_pictures_stand_at_the_top_left_of_a_white_cell(self):
        made = grid([Image.new("RGB", (200, 100), "red"), Image.new("RGB", (10, 40), "red")], PUBLISHED)
        pixels = np.asarray(made.image)
        (left, top, right, bottom), (left2, top2, right2, bottom2) = made.cells
        assert (pixels[top : top + 224, left:right] == (255, 0, 0)).all()
        assert (pixels[top + 224 : bottom, left:right] == 255).all()
        assert (pixels[top2:bottom2, left2 : left2 + 112] == (255, 0, 0)).all()
        assert (pixels[top2:bottom2, left2 + 112 : right2] == 255).all()

    def test_square_padding_moves_the_cells_along(self):
        plain, square = grid(colours(3), PUBLISHED), grid(colours(3), GridStyle())
        assert square.image.size == (1424, 1424)
        assert [(box[0], box[1] - 468, box[2], box[3] - 468) for box in square.cells] == plain.cells  # (1424 - 488) / 2
        left, top, right, bottom = square.cells[2]
        assert (np.asarray(square.image)[top:bottom, left:right] == (50, 0, 200)).all()
        assert (np.asarray(square.image)[:468] == 255).all()

    def test_small_cells(self):
        made = grid(colours(2, (60, 60)), GridStyle(cell=60, margin=12, font=10, square=False))
        assert made.image.size == (132, 72)
        assert made.cells == [(0, 12, 60, 72), (72, 12, 132, 72)]

    @pytest.mark.parametrize("count", [1, 5, 10])
    def test_other_numbers_have_no_layout(self, count):
        with pytest.raises(ValueError, match=f"a grid of {count} pictures has no layout; it has one for 2, 3, 4, 6, 9"):
            grid(colours(count), PUBLISHED)


class TestInset:
    def test_the_largest_that_fits_seventy_percent_centred(self):
        """Into 420 x 280 of 600 x 400 goes a 3:1 picture as 420 x 140, at (90, 130)."""
        made = inset(Image.new("RGB", (600, 400), "blue"), Image.new("RGB", (30, 10), "red"), square=False)
        assert made.cells == [(90, 130, 510, 270), (0, 0, 600, 400)]
        pixels = np.asarray(made.image)
        assert (pixels[130:270, 90:510] == (255, 0, 0)).all()
        assert (pixels == (255, 0, 0)).all(-1).sum() == 420 * 140

    def test_tall_targets_are_bound_by_the_height(self):
        made = inset(Image.new("RGB", (600, 400)), Image.new("RGB", (10, 40)), square=False)
        assert made.cells[0] == (265, 60, 335, 340)

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
    def test_the_background_does_not_decide_the_colours(self, mode):
        """Pasting into a grey or palette picture, as the released code does, would turn the red inset grey."""
        background = Image.new("RGB", (100, 100), "grey").convert(mode)
        made = inset(background, Image.new("RGB", (10, 10), "red"))
        assert made.image.mode == "RGB"
        assert made.image.getpixel((50, 50)) == (255, 0, 0)

    def test_square_padding(self):
        made = inset(Image.new("RGB", (600, 400), "blue"), Image.new("RGB", (10, 10), "red"))
        assert made.image.size == (600, 600)
        assert made.cells == [(160, 160, 440, 440), (0, 100, 600, 500)]
        assert made.image.getpixel((0, 99)) == (255, 255, 255)
        assert made.image.getpixel((0, 100)) == (0, 0, 255)

    def test_the_pictures_given_stay_as_they_are(self):
        background = Image.new("RGB", (100, 100), "blue")
        inset(background, Image.new("RGB", (10, 10), "red"))
        assert background.getpixel((50, 50)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("size", "expected"), [((336, 448), (336, 448)), ((2000, 3), (448, 1)), ((3, 2000), (1, 448)), ((3, 1), (448, 149))]
)
def test_fitting_keeps_the_ratio_and_at_least_one_pixel(size, expected):
    assert fitted(Image.new("RGB", size), 448, 448).size == expected


class TestNoise:
    def test_only_the_box_changes_and_the_seed_decides(self):
        image, box = picture(1, (80, 60)), (10, 20, 50, 40)
        one, again, other = (noised(image, box, std=49, seed=seed) for seed in (1, 1, 2))
        assert one.tobytes() == again.tobytes() != other.tobytes()
        changed = (np.asarray(one) != np.asarray(image)).any(-1)
        assert changed[20:40, 10:50].mean() > 0.95
        changed[20:40, 10:50] = False
        assert not changed.any()

    def test_the_released_wrap(self):
        """Uniform levels at std 49: clamping moves a pixel by 34 on average, wrapping bytes by 59, and 15 % by more than 128."""
        levels = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
        moves = {}
        for wrap in (False, True):
            made = noised(Image.fromarray(levels), (0, 0, 300, 300), std=49, seed=0, wrap=wrap)
            moves[wrap] = np.abs(np.asarray(made).astype(int) - levels)
        assert moves[False].mean() == pytest.approx(34, abs=1)
        assert moves[True].mean() == pytest.approx(59, abs=1)
        assert (moves[True] > 128).mean() == pytest.approx(0.15, abs=0.01)
        assert (moves[False] > 128).mean() < 0.01
