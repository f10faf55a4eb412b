"""Short answers: what counts as the same answer, and what as none."""

from __future__ import annotations

import json

import pytest

from prefalign.evals import Item, Prediction, attributes

COLOURS = ("red", "green", "blue", "orange")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
COUNTS = tuple(str(number) for number in range(10))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Blue.", "blue"),
        ("The  BLUE one", "blue 1"),
        ("Two", "2"),
        ("a dog", "dog"),
        ("Gray!", "grey"),
        ("3.5", "3.5"),
        ("...", ""),
    ],
)
def test_normalise(text, normal):
    assert attributes.normalise(text) == normal


@pytest.mark.parametrize(
    ("reply", "choices", "answer"),
    [
        ("The ring is blue.", COLOURS, "blue"),
        ("Blue, not red.", COLOURS, None),
        ("It is dark.", COLOURS, None),
        ("Blue blue", COLOURS, "blue"),
        ("redder", COLOURS, None),
        ("At the top left.", PLACES, "top left"),
        ("In the center.", PLACES, "centre"),
        ("On the left or at the top.", PLACES, None),
        ("There are no stars in the picture.", COUNTS, "0"),
        ("There is one star in the picture.", COUNTS, "1"),
        ("There are three stars.", COUNTS, "3"),
        ("three", (), "3"),
        ("?", (), None),
    ],
)
def test_parse(reply, choices, answer):
    assert attributes.parse(reply, choices) == answer


def scored(reply, label, choices=()):
    item = Item("attributes", "1", "p", [], [], label=label, kind="colour", choices=choices)
    return attributes.score(item, Prediction("attributes", "1", "p", "What colour?", reply))


def test_score():
    assert scored("The ring is blue.", "blue", COLOURS).numbers == {"asked": 1, "words": 4, "correct": 1}
    assert scored("Red.", "blue", COLOURS).numbers == {"asked": 1, "words": 1, "correct": 0}
    assert scored("two", "2").numbers["correct"] == 1
    assert scored("It is two", "2").numbers["correct"] == 0
    unparsed = scored("Who knows", "blue", COLOURS)
    assert (unparsed.status, unparsed.numbers["correct"]) == ("unparsed", 0)
    assert (scored("", "blue").status, scored("", "blue").numbers) == ("empty", {})


def test_gold_answer_outside_the_choices_is_refused():
    with pytest.raises(ValueError, match="gold answer 'pink', which is not one of red, green, blue, orange"):
        scored("Red.", "pink", COLOURS)


def test_constant_answers_by_kind():
    labels = [("colour", "red"), ("colour", "Red"), ("colour", "blue"), ("count", "2"), ("count", "two")]
    items = [Item("attributes", str(i), "p", [], [], label=label, kind=kind) for i, (kind, label) in enumerate(labels)]
    assert attributes.constant_answers(items) == {"colour": pytest.approx(2 / 3), "count": 1.0}


def test_questions_from_a_file(tmp_path):
    file = tmp_path / "q.jsonl"
    row = {
        "id": 7,
        "image": "a.png",
        "question": "What colour is it?",
        "answer": "red",
        "kind": "colour",
        "group": "scene 1",
    }
    file.write_text(
        json.dumps(row) + "\n\n" + json.dumps({**row, "id": 8, "group": "scene 2", "choices": ["red", "blue"]}) + "\n"
    )
    first, second = attributes.read_short(file)
    assert (first.id, first.group, first.kind, first.label, first.choices) == ("7", "scene 1", "colour", "red", ())
    assert second.choices == ("red", "blue")
    file.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="line 2 repeats id '7'"):
        attributes.read_short(file)
    file.write_text('{"id": 1, "image": "a.png"}\n')
    with pytest.raises(ValueError, match="q.jsonl line 1 lacks question, answer"):
        attributes.read_short(file)
    file.write_text(json.dumps(row) + "\n" + json.dumps(row)[:40])
    with pytest.raises(ValueError, match="q.jsonl line 2 is not complete JSON"):
        attributes.read_short(file)
    file.write_text("")
    with pytest.raises(ValueError, match="q.jsonl holds no rows"):
        attributes.read_short(file)
