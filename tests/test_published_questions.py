"""Questions of published rows: where their pictures stand, which line breaks are text, and prompts that are rendered already."""

import re

import jinja2
import pytest

from prefalign.collage import Wording
from prefalign.records import RecordError, message_text
from prefalign.sources import DataConfig, to_pair
from prefalign.sources.turns import marked_blocks
from tests.published_sets import QUESTION, ROWS, pictures


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path)


def data(folder):
    return DataConfig(folder / "rows.jsonl")


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("<|im_start|>user\n<image>Q<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>"),
        ("<s>[INST] <image>\nQ [/INST]", "[INST]"),
        ("<|user|>\n<|image_1|>\nQ<|end|>\n<|assistant|>\n", "<|user|>"),
        ("<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n", "<start_of_turn>"),
        ("User:<image>Q<end_of_utterance>\nAssistant:", "<end_of_utterance>"),
        ("Human: <image>\nQ\nAssistant:", "Assistant:"),
        ("<image>\nQ ASSISTANT:", "ASSISTANT:"),
        ("### Instruction: Q\n\n### Response:", "### Response:"),
        ("What does the label USER: say?", "USER:"),
        ("<|im_start|>user\nUSER: <image>\nQ<|im_end|> ASSISTANT:", "<|im_start|>"),
    ],
)
def test_a_prompt_rendered_by_another_template_is_refused(folder, prompt, mark):
    with pytest.raises(
        RecordError, match=rf"holds '{re.escape(mark)}' of a chat template.*Give the question alone"
    ) as error:
        to_pair({**ROWS["mdpo"][0], "prompt": prompt}, data(folder))
    assert error.value.reason == "bad_prompt"


@pytest.mark.parametrize("question", ["What does the assistant: sign say?", "Who is the user?", "Is this [1] or [2]?"])
def test_a_plain_question_of_that_layout_is_no_rendered_prompt(folder, question):
    assert message_text(to_pair({**ROWS["mdpo"][0], "prompt": question}, data(folder)).prompt) == question


IMAGE = ()


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("<image>\nWhat?", [IMAGE, "What?"]),
        ("<image>What?\n", [IMAGE, "What?\n"]),
        ("<image>\n\nWhat?", [IMAGE, "\nWhat?"]),
        ("What?\n<image>", ["What?", IMAGE]),
        ("<image>\n<image>\nWhich?", [IMAGE, IMAGE, "Which?"]),
        ("Look:\n<image>\nWhat?", ["Look:\n", IMAGE, "\nWhat?"]),
        ("A:\n<image>\nB:\n<image>", ["A:\n", IMAGE, "\nB:\n", IMAGE]),
        ("Both:\n<image> <image>\nWhich?", ["Both:\n", IMAGE, " ", IMAGE, "\nWhich?"]),
        ("<image>\nFirst.\n<image>\nSecond.", [IMAGE, "First.\n", IMAGE, "\nSecond."]),
        ("No picture here.\n", ["No picture here.\n"]),
        ("<image>\n", [IMAGE]),
    ],
)
def test_line_breaks_beside_pictures(text, blocks):
    expected = [{"type": "image"} if block is IMAGE else {"type": "text", "text": block} for block in blocks]
    assert marked_blocks([{"type": "text", "text": text}]) == expected


def test_published_questions_about_several_pictures_are_those_that_mia_dpo_writes(folder):
    made = Wording(line="Image{number}: ").turn(f"In Image2, {QUESTION}", 2)
    assert to_pair(ROWS["mia_dpo"][0], data(folder)).prompt == [made]


# As Qwen2-VL's template puts the blocks of a turn, and as LLaVA-1.5's does.
IN_ORDER = "{% for m in messages %}{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}{% endfor %}"
PICTURES_FIRST = (
    "{% for m in messages %}{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("layout", ["mia_dpo", "povid", "llava_rlhf"])
def test_a_template_shows_the_published_prompt(folder, layout):
    """mia_dpo in order as it is; LLaVA's own sets under LLaVA's template as its training shows them, the mark in front."""
    row = ROWS[layout][-1]
    prompt = to_pair(row, data(folder)).prompt
    if layout == "mia_dpo":
        assert jinja2.Template(IN_ORDER).render(messages=prompt) == row["prompt"]
    else:
        assert (
            jinja2.Template(PICTURES_FIRST, keep_trailing_newline=True).render(messages=prompt)
            == f"<image>\n{QUESTION}"
        )
