"""What MIA-DPO keeps and drops, by worked numbers: texts, shares of attention, parts without a token; its settings."""

import math
import random

import numpy as np
import pytest
import torch
from tiny_vlms import picture

from prefalign import bundled, collage, config
from prefalign.collage import Layouts, Wording, lowered
from prefalign.engines import Completion, ImageAttention
from prefalign.store import Dropped, Failed


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("mia_dpo")


class CentreCrop:
    """LLaVA-1.5 at its real size: 24 x 24 tokens over the middle square of a picture."""

    def centres(self, size):
        short = min(size)
        steps = (np.arange(24) + 0.5) * short / 24
        x, y = np.meshgrid(steps + (size[0] - short) / 2, steps + (size[1] - short) / 2)
        return np.stack([x.ravel(), y.ravel()], 1)


@pytest.mark.parametrize(
    ("layout", "pictures", "square", "shown"),
    [
        ("grid", [(640, 480)] * 3, False, False),  # the outer cells lie beside the crop, margins and labels in it
        ("grid", [(640, 480)] * 3, True, True),
        ("grid", [(640, 480)] * 4, False, True),
        ("pic_in_pic", [(640, 480), (640, 480)], True, True),
        ("pic_in_pic", [(640, 480), (1000, 20)], True, False),  # an inset thinner than a token
    ],
)
def test_a_part_without_a_token_is_noticed_at_real_size(stage, layout, pictures, square, shown):
    made_of = [picture(number, size=size) for number, size in enumerate(pictures)]
    made = (
        collage.grid(made_of, collage.GridStyle(square=square))
        if layout == "grid"
        else collage.inset(*made_of, square=square)
    )
    task = stage.Task(None, layout, len(pictures), 1, [], [made.image], [], made.regions, [])
    assert stage._all_shown(task, CentreCrop()) is shown


class TestText:
    @pytest.mark.parametrize(
        ("answer", "gold", "reason"),
        [
            ("a red STAR", "A red star.", "same_as_reference"),
            ("  ", "A red star.", "empty_answer"),
            ("one two three four five six seven", "one two", "length_ratio"),  # 7 / 2 = 3.5 > 3
            ("one two three four five six", "one two", None),  # 6 / 2 = 3
            ("Yes", "no but why not", None),  # both under five words: 4 / 1 <= 10
            ("a red star at the very top", "a red star at the very tip", "near_reference"),  # 1 of 26 letters: 0.038
            ("abcdefghij", "abcdefghix", None),  # 1 of 10 letters: 0.1
        ],
    )
    def test_worked(self, stage, answer, gold, reason):
        found = stage.text_problem(Completion("a", answer), gold, stage.Selection())
        assert (found.reason if isinstance(found, Dropped) else found) == reason

    def test_what_failed_is_kept_with_its_message(self, stage):
        found = stage.text_problem(Completion("a", "", finish_reason="error", error="why"), "gold", stage.Selection())
        assert found == Failed("generation_failed", "why")

    @pytest.mark.parametrize(
        ("question", "small"),
        [
            ("What is it?", "what is it?"),
            ("I see?", "I see?"),
            ("TV or not?", "TV or not?"),
            ("A cat?", "a cat?"),
            ("", ""),
        ],
    )
    def test_small_first_letter(self, question, small):
        assert lowered(question) == small


class TestShare:
    def task(self, stage, layout, count, target):
        return stage.Task(None, layout, count, target, [], [], [], [], [])

    def test_thresholds(self, stage):
        """Sequences keep the threshold itself, grids and pic-in-pics do not; one for each number of pictures."""
        limits = stage.Selection()
        cases = [("sequence", 2, 0.8, False), ("sequence", 2, 0.81, True), ("sequence", 5, 0.6, False),
                 ("sequence", 3, 0.71, True), ("grid", 2, 0.7, True), ("grid", 9, 0.29, False), ("grid", 9, 0.3, True),
                 ("pic_in_pic", 2, 0.79, False), ("pic_in_pic", 2, 0.8, True)]  # fmt: skip
        for layout, count, share, drops in cases:
            assert stage.on_target(self.task(stage, layout, count, 0), share, limits) == drops

    def test_even_cells_of_576_tokens(self, stage):
        """All attention on the last row of tokens: in a 3 x 3 grid it is split between cells 7 to 9; the centre gets none."""
        weights = torch.zeros(24, 24)
        weights[-1] = 1 / 24
        found = ImageAttention(weights.flatten(), torch.zeros(576, dtype=torch.int64))
        limits = stage.Selection(cells="even")
        shares = [stage.target_share(self.task(stage, "grid", 9, cell), found, None, limits) for cell in range(9)]
        assert shares == pytest.approx([0.0] * 6 + [1 / 3] * 3)
        assert stage.target_share(self.task(stage, "pic_in_pic", 2, 1), found, None, limits) == 0.0

    def test_pictures_without_attention_have_no_share(self, stage):
        found = ImageAttention(torch.zeros(4), torch.tensor([0, 0, 1, 1]))
        assert math.isnan(stage.target_share(self.task(stage, "sequence", 2, 0), found, None, stage.Selection()))


class TestConfig:
    def test_published(self, stage):
        """Thresholds, layouts and noise of the released code; the shares of layouts are those of the paper's pairs."""
        built = config.load(stage.Config, bundled.find("datagen/mia_dpo"))
        assert built.selection == stage.Selection()
        assert built.selection.sequence == {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6}
        assert built.selection.grid == {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3}
        assert (built.selection.pic_in_pic, built.selection.least_perplexity, built.max_new_tokens) == (0.8, 1.1, 512)
        assert built.layouts == Layouts()
        assert built.wording == Wording()
        assert (built.noise.grid, built.noise.pic_in_pic, built.noise.wrap) == (225, 49, False)
        assert built.model.model_name_or_path == "llava-hf/llava-1.5-7b-hf"
        pairs = np.array([15.1, 9.3, 4.5])
        shares = [built.layouts.sequence, built.layouts.grid, built.layouts.pic_in_pic]
        assert shares == pytest.approx(pairs / pairs.sum(), abs=0.005)

    def test_layouts_are_drawn_by_their_shares(self):
        """4,000 draws; standard error of a share of 0.52 is 0.008."""
        rng = random.Random(0)
        drawn = [Layouts().draw(rng) for _ in range(4000)]
        share = {name: sum(layout == name for layout, _ in drawn) / 4000 for name in ("sequence", "grid", "pic_in_pic")}
        assert list(share.values()) == pytest.approx([0.52, 0.32, 0.16], abs=0.03)
        pairs = sum(made == ("sequence", 2) for made in drawn) / sum(layout == "sequence" for layout, _ in drawn)
        assert pairs == pytest.approx(0.55, abs=0.04)
        assert {count for layout, count in drawn if layout == "grid"} == {2, 3, 4, 6, 9}
        assert {count for layout, count in drawn if layout == "pic_in_pic"} == {2}

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            (
                lambda: Layouts(grid_sizes={5: 1.0}),
                r"layouts.grid_sizes is \{5: 1.0\}; it gives a share to numbers of pictures",
            ),
            (
                lambda: Layouts(sequence_sizes={2: 0.0}),
                r"layouts.sequence_sizes is \{2: 0.0\}; .* at least one of them above 0",
            ),
            (lambda: Layouts(0, 0, 0), r"layouts.sequence, .grid and .pic_in_pic are 0, 0 and 0; they are shares"),
            (
                lambda: Wording(sequence=["What? {question}"]),
                r"which does not say which picture is meant. Put {number} or",
            ),
            (
                lambda: Wording(grid=["In {picture}"]),
                r"wording.grid has the template 'In \{picture\}', which cannot be filled",
            ),
            (lambda: Wording(pic_in_pic=[]), r"wording.pic_in_pic is empty"),
        ],
    )
    def test_settings_that_mean_nothing(self, part, message):
        with pytest.raises(ValueError, match=message):
            part()

    def test_a_threshold_for_every_number(self, stage):
        values = config.read_yaml(bundled.find("datagen/mia_dpo_scenes"))
        values["layouts"]["sequence_sizes"] = {2: 0.5, 3: 0.5}
        with pytest.raises(config.ConfigError, match=r"selection.sequence has no threshold for \[3\] pictures"):
            config.build(stage.Config, values)
