"""Which token shows what: through real processors and towers, with worked shares."""

import math

import numpy as np
import pytest
import torch
import transformers
from local_features import changed_tokens, without_vision_attention
from tiny_vlms import BUILDERS, PLAIN, picture

from prefalign import collage
from prefalign.collage import GridStyle
from prefalign.grounding import Grounding, cell_share, even_centre, even_split, sequence_share, tokens_in

SIZES = [(96, 40), (40, 96), (64, 64), (200, 100), (61, 83)]


@pytest.fixture(scope="module", params=PLAIN)
def family(request):
    processor, model_class, config = BUILDERS[request.param]()
    torch.manual_seed(0)
    return without_vision_attention(model_class(config)), processor


@pytest.mark.parametrize("size", SIZES)
def test_a_spot_at_a_tokens_centre_moves_that_token(family, size):
    """The real tower, made local: white pixels at a token's centre move its feature; most other tokens stay as they were."""
    model, processor = family
    if model.config.model_type == "gemma3":
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    centres = Grounding(model, processor).centres(size)
    moved = {}
    for number, centre in enumerate(centres):
        if np.isnan(centre).any():
            continue
        moved[number] = changed_tokens(model, processor, size, tuple(centre))
        assert moved[number][number]
    assert len(moved) >= 2
    assert np.mean([found.mean() for found in moved.values()]) < 0.55
    line_ends = np.isnan(centres).any(1)
    assert not any(found[line_ends].any() for found in moved.values())
    assert line_ends.any() == (model.config.model_type == "llava_next")


def llava_1_5():
    """LLaVA-1.5's own picture settings: shortest side to 336, centre cut out, 24 x 24 tokens."""
    processor, model_class, config = BUILDERS["llava"]()
    processor.image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    config.vision_config.image_size = 336
    return Grounding(model_class(config), processor)


def test_the_centre_crop_of_llava_is_noticed():
    """Of a 1424 x 488 canvas the centre 488 x 488 is kept: x from 468 to 956. The middle cell (488 to 936) fills it.

    448 of the 488 columns kept are the middle cell's: 22 of 24 columns of tokens, and of 24 rows those below the label: 22.
    """
    known = llava_1_5()
    pictures = [picture(number) for number in range(3)]
    wide = collage.grid(pictures, GridStyle(square=False))
    assert wide.image.size == (1424, 488)
    centres = known.centres(wide.image.size)
    assert centres.shape == (576, 2)
    assert centres[:, 0].min() > 468
    assert centres[:, 0].max() < 956
    cells = tokens_in(centres, wide.cells)
    assert [int((cells == number).sum()) for number in range(3)] == [0, 22 * 22, 0]
    square = collage.grid(pictures, GridStyle())
    cells = tokens_in(known.centres(square.image.size), square.cells)
    counts = [int((cells == number).sum()) for number in range(3)]
    assert min(counts) >= 49
    assert max(counts) - min(counts) <= 14  # 448 of 1424 pixels: 7 or 8 of 24 columns


def test_each_size_is_worked_out_once(family):
    model, processor = family
    known = Grounding(model, processor)
    assert known.centres((64, 64)) is known.centres((64, 64))


def test_tokens_that_do_not_follow_from_the_pixels(family, monkeypatch):
    model, processor = family
    monkeypatch.setattr(Grounding, "_tokens", lambda *_: torch.ones(3, 4))
    with pytest.raises(
        ValueError, match=r"do not follow from its processed pixels .* Use sequences of pictures instead"
    ):
        Grounding(model, processor).centres((64, 64))


def test_tokens_in_boxes():
    centres = np.array([[1, 1], [5, 1], [10, 9], [np.nan, np.nan], [12, 1]], dtype=np.float32)
    boxes = [(4, 0, 10, 10), (0, 0, 12, 12)]
    assert tokens_in(centres, boxes).tolist() == [1, 0, 1, -1, -1]


class TestEvenSplit:
    @pytest.mark.parametrize(
        ("rows", "columns", "blocks"),
        [(1, 2, [288] * 2), (1, 3, [192] * 3), (2, 2, [144] * 4), (2, 3, [96] * 6), (3, 3, [64] * 9)],
    )
    def test_576_tokens(self, rows, columns, blocks):
        """24 divides by 2 and 3, so the published grids give equal blocks; 2 x 3 is 12 rows by 8 columns: 96."""
        cells = even_split(576, rows, columns)
        assert np.bincount(cells).tolist() == blocks
        assert cells.reshape(24, 24)[0, -1] == columns - 1
        assert cells.reshape(24, 24)[-1, 0] == (rows - 1) * columns

    def test_what_is_left_over_goes_to_the_first(self):
        """6 rows in 2 parts are 3 and 3; 5 columns in 3 parts are 2, 2 and 1."""
        assert np.bincount(even_split(25, 1, 3)).tolist() == [10, 10, 5]

    def test_centre(self):
        """16 x 16 of 24 x 24, so chance is 256 / 576 = 0.444; rows and columns 4 to 19."""
        cells = even_centre(576).reshape(24, 24)
        assert (cells == 0).mean() == pytest.approx(0.4444, abs=1e-4)
        assert (cells[4:20, 4:20] == 0).all()
        assert cells[3, 10] == cells[20, 10] == 1

    def test_tokens_that_are_no_square(self):
        for cut in (lambda: even_split(575, 1, 2), lambda: even_centre(575)):
            with pytest.raises(ValueError, match="needs a square map of image tokens, and this picture has 575"):
                cut()


class TestShare:
    def test_sequence(self):
        """Means 0.2, 0.1 and 0.1 over 1, 2 and 4 tokens: the first has 0.2 / 0.4 = 0.5, though the third has most tokens."""
        weights = np.array([0.2, 0.05, 0.15, 0.1, 0.1, 0.1, 0.1])
        image = np.array([0, 1, 1, 2, 2, 2, 2])
        assert [sequence_share(weights, image, target) for target in range(3)] == pytest.approx([0.5, 0.25, 0.25])

    def test_cells(self):
        """0.1 + 0.2 of the 0.6 that lies in a cell is 0.5; the margin's 0.4 counts for nothing."""
        weights, cells = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, -1])
        assert cell_share(weights, cells, 0) == pytest.approx(0.5)
        assert cell_share(weights, cells, 1) == pytest.approx(0.5)

    def test_even_attention_gives_chance(self):
        even = np.full(576, 1 / 576)
        for count, (rows, columns) in collage.GRIDS.items():
            assert cell_share(even, even_split(576, rows, columns), 0) == pytest.approx(1 / count)
        assert cell_share(even, even_centre(576), 0) == pytest.approx(256 / 576)

    def test_no_attention_has_no_share(self):
        assert math.isnan(sequence_share(np.zeros(4), np.array([0, 0, 1, 1]), 0))
        assert math.isnan(cell_share(np.zeros(4), np.array([0, 0, 1, 1]), 0))


def test_the_inset_of_a_square_canvas_is_the_published_block():
    """420 x 420 of 600 x 600, from 90 to 510; token centres lie at 12.5 + 25 k: k = 4 to 19 are inside, 16 x 16 of 24 x 24."""
    made = collage.inset(picture(1, (600, 600)), picture(2, (50, 50)))
    cells = tokens_in(llava_1_5().centres(made.image.size), made.cells)
    assert cells.tolist() == even_centre(576).tolist()
