"""Descriptions: where they are put, what is taken out of them, which prompt a row draws, and that they show what is shown."""

import subprocess
import sys

import pytest

from prefalign import describing
from prefalign.describing import cleaned, describe, drawn_prompt, with_description
from prefalign.engines import Completion, Sampling
from prefalign.engines.transformers import TransformersEngine
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.records import assistant_message, message_text, user_message
from tests.tiny_vlms import picture

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def user(*content):
    return {"role": "user", "content": list(content)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((IMAGE, text("What?")), (IMAGE, text("Image description: A cat.\n\nWhat?"))),
        ((IMAGE, IMAGE, text("\nWhat?")), (IMAGE, IMAGE, text("Image description: A cat.\n\nWhat?"))),
        ((text("What?\n"), IMAGE), (IMAGE, text("Image description: A cat.\n\nWhat?\n"))),
        ((text("Is"), IMAGE, text("this?")), (text("Image description: A cat.\n\nIs"), IMAGE, text("this?"))),
        ((IMAGE, text("or"), IMAGE), (text("Image description: A cat.\n\n"), IMAGE, text("or"), IMAGE)),
        ((IMAGE,), (IMAGE, text("Image description: A cat.\n\n"))),
        ((IMAGE, text("Is it?"), text("Say.")), (IMAGE, text("Image description: A cat.\n\nIs it?"), text("Say."))),
    ],
)
def test_where_the_description_goes(given, expected):
    messages = [user(*given)]
    kept = [user(*(dict(block) for block in given))]
    assert with_description(messages, " A cat. ") == [user(*expected)]
    assert messages == kept


def test_it_goes_into_the_first_turn_with_a_picture_only():
    system = {"role": "system", "content": [text("Be brief.")]}
    turns = [system, user(text("Hello.")), assistant_message("Hi."), user(IMAGE, text("What?")), assistant_message("A cat."),
             user(IMAGE, text("And this?"))]  # fmt: skip
    told = with_description(turns, "Two cats.", template="({description}) ")
    assert [message_text([turn]) for turn in told] == [
        "Be brief.", "Hello.", "Hi.", "(Two cats.) What?", "A cat.", "And this?",
    ]  # fmt: skip
    assert with_description(turns[:3], "Two cats.") == turns[:3]


def test_a_blank_description_changes_nothing():
    turns = [user_message("What?", 1)]
    assert with_description(turns, " \n") == turns


def test_braces_in_texts_are_text():
    told = with_description([user_message("{description}?", 1)], "A {description} {0}", template="<{description}> ")
    assert message_text(told) == "<A {description} {0}> {description}?"


@pytest.mark.parametrize(("template", "count"), [("Image description:\n", 0), ("{description} {description}", 2)])
def test_templates_without_one_place_are_refused(template, count):
    message = f"holds .description. {count} times, so the description would be lost or doubled. Write it once"
    with pytest.raises(ValueError, match=message):
        with_description([user_message("What?", 1)], "A cat.", template)
    with pytest.raises(ValueError, match=message):
        describing.DescribeFirst(template=template)


@pytest.mark.parametrize("prompts", [[], ["Describe it.", " "]])
def test_prompts_that_ask_nothing_are_refused(prompts):
    with pytest.raises(ValueError, match="prompts is .*a blank one asks nothing. Give at least one prompt"):
        describing.DescribeFirst(prompts=prompts)


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("A red <image> cat.", "A red  cat."),
        ("<|im_start|>assistant: A cat.<|im_end|>", "A cat."),
        ("ASSISTANT: A cat.\nUSER: What else? ASSISTANT: A dog.", "A cat."),
        ("A cat.</s>", "A cat."),
        ("[INST] A cat. [/INST]", "A cat."),
        ("<start_of_turn>A cat.<end_of_turn>", "A cat."),
        ("<im<image>age>A cat.", "A cat."),
        ("The user: a man. It is 3 < 4 | 5 > 2.", "The user: a man. It is 3 < 4 | 5 > 2."),
        ("  A cat.\n\nIt sleeps. ", "A cat.\n\nIt sleeps."),
        ("<own_mark>A cat.", "A cat."),
        ("USER: ", ""),
    ],
)
def test_marks_are_taken_out(said, left):
    assert cleaned(said, ["<own_mark>"]) == left


def test_every_row_draws_a_prompt_of_its_own():
    prompts = describing.NEUTRAL_PROMPTS
    assert len(set(prompts)) == 8
    drawn = [drawn_prompt(prompts, 0, f"row{number}") for number in range(400)]
    counts = [drawn.count(prompt) for prompt in prompts]
    assert min(counts) > 25  # 50 expected of each, standard deviation 6.6
    assert drawn[3] == drawn_prompt(list(prompts), 0, "row3")
    assert drawn != [drawn_prompt(prompts, 1, f"row{number}") for number in range(400)]


@pytest.fixture(scope="module")
def engine(tiny_llava):
    settings = ModelConfig(str(tiny_llava), device="cpu")
    return TransformersEngine(load_model(settings), load_processor(settings), batch_size=4)


def test_descriptions_show_the_picture_and_do_not_depend_on_the_others(engine):
    prompts, sampling = ["What is it?", "Describe it."], Sampling(max_new_tokens=12, temperature=0.2)
    rows = [(f"row{number}", [picture(number)]) for number in range(3)]
    said = describe(engine, rows, prompts, sampling, seed=0)
    assert [completion.id for completion in said] == ["row0/description", "row1/description", "row2/description"]
    assert [one.text for one in describe(engine, rows[::-1], prompts, sampling, seed=0)] == [one.text for one in said][
        ::-1
    ]
    assert describe(engine, rows[1:2], prompts, sampling, seed=0)[0].text == said[1].text
    swapped = [(name, [picture(number + 10)]) for number, (name, _) in enumerate(rows)]
    others = describe(engine, swapped, prompts, sampling, seed=0)
    assert all(one.text != other.text for one, other in zip(said, others, strict=True))
    assert describe(engine, [], prompts, sampling, seed=0) == []


def test_several_pictures_are_described_together(engine):
    both = [("row", [picture(0), picture(1)])]
    said = describe(engine, both, ["What?"], Sampling(max_new_tokens=4, temperature=0.0), seed=0)
    assert said[0].error is None


def test_marks_of_the_model_at_hand_are_taken_out(engine):
    assert {"<image>", "<bos>", "<eos>", "<pad>"} <= set(describing.marks_of(engine))
    assert describing.marks_of(object()) == []
    clean = describing.clean_completions(engine, [Completion("x", "A <bos>cat <image>sleeps.", [1, 2], "length")])
    assert clean == [Completion("x", "A cat sleeps.", [1, 2], "length")]


def test_importing_it_loads_no_torch():
    code = "import sys, prefalign.describing; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
