"""POPE's figures and both readings of a reply, on the worked examples of the evaluation spec (9.2)."""

from __future__ import annotations

import json

import pytest

from prefalign.evals import Item, Prediction, yesno
from prefalign.evals.files import PopeFiles, pope_items

REPLIES = ["Yes", "yes, there is a dog", "No", "No, there is no cat.", "Yes.", "no"]
GOLD = ["yes", "yes", "no", "no", "no", "yes"]


def scored(replies, gold):
    rows = []
    for number, (reply, label) in enumerate(zip(replies, gold, strict=True)):
        item = Item("yesno", str(number), "p", [], [], label=label)
        rows.append(yesno.score(item, Prediction("yesno", str(number), "p", "Is there?", reply)))
    return rows


@pytest.mark.parametrize("reading", ["", "strict_"])
def test_worked_example(reading):
    rows = [row.numbers for row in scored(REPLIES, GOLD)]
    assert [sum(row[reading + cell] for row in rows) for cell in ("tp", "fp", "tn", "fn")] == [2, 1, 2, 1]
    found = yesno.figures(rows, reading=reading)
    assert found == pytest.approx(
        {"accuracy": 2 / 3, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 0.5}
    )


def test_real_run_of_2910_questions():
    replies = ["yes"] * (1183 + 31) + ["no"] * (1379 + 317)
    gold = ["yes"] * 1183 + ["no"] * 31 + ["no"] * 1379 + ["yes"] * 317
    found = yesno.figures([row.numbers for row in scored(replies, gold)])
    expected = {"accuracy": 0.88041, "precision": 0.97446, "recall": 0.78867, "f1": 0.87178, "yes_ratio": 0.41718}
    assert found == pytest.approx(expected, abs=5e-6)


def test_constant_answers():
    found = yesno.constant_answers(["yes", "no"] * 5)
    assert found["always_yes"] == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1}
    )
    assert found["always_no"] == {"accuracy": 0.5, "precision": None, "recall": 0, "f1": 0, "yes_ratio": 0}


@pytest.mark.parametrize(
    ("reply", "strict", "robust"),
    [
        ("There isn't a dog", "yes", "no"),
        ("I do not know", "no", None),
        ("maybe", "yes", None),
        ("", "yes", None),
        ("NO", "yes", "no"),
        ("It is a cat. No dog", "yes", "no"),
        ("Not sure", "yes", None),
        ("nope", "yes", "no"),
        ("Yes, no doubt", "no", "yes"),
        ("Yes, there is no doubt", "no", "yes"),
        ("Yes, a person with no hat.", "no", "yes"),
        ("**Yes**. It is not far from the ring.", "yes", "yes"),
        ("No. Yes would be wrong.", "no", "no"),
        ("Yes and no.", "no", None),
        ("Yes/no", "yes", None),
        ("Yes or no, who can say", "no", None),
        ("I would say yes, not no", "no", None),
        ("There is a dog. Yes. No hat.", "yes", "yes"),
        ("There is no dog. I cannot tell the rest.", "no", "no"),
        ("Nothing like yesterday", "yes", None),
        ("There is a dog, not a cat", "no", "no"),
        ("YES!", "yes", "yes"),
        ("I don\u2019t know.", "yes", None),
        ("I cannot see a dog.", "yes", "no"),
        ("No, the star is blue.", "no", "no"),
        ("Yes, there is a ring at the top left.", "yes", "yes"),
    ],
)
def test_odd_replies(reply, strict, robust):
    assert yesno.strict(reply) == strict
    assert yesno.robust(reply) == robust


def test_unparsed_is_wrong_and_neither_yes_nor_no():
    rows = scored(["maybe", "maybe", "Yes"], ["yes", "no", "yes"])
    assert [row.status for row in rows] == ["unparsed", "unparsed", "ok"]
    found = yesno.figures([row.numbers for row in rows])
    assert found == pytest.approx({"accuracy": 1 / 3, "precision": 1, "recall": 0.5, "f1": 2 / 3, "yes_ratio": 1 / 3})


def test_empty_reply_is_no_score_although_the_original_calls_it_yes():
    (row,) = scored([" "], ["yes"])
    assert (row.status, row.numbers) == ("empty", {})


def test_label_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="item 0 has label 'maybe'"):
        scored(["Yes"], ["maybe"])


@pytest.fixture
def questions(tmp_path):
    rows = [{"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "yes"},
            {"question_id": 2, "image": "a.png", "text": "Is there a cat in the image?", "label": "no"}]  # fmt: skip
    file = tmp_path / "coco_pope_random.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_questions_and_answers_in_the_benchmarks_format(tmp_path, questions):
    items = yesno.read_pope(questions, suffix="Answer with one word.")
    assert [item.id for item in items] == ["coco_pope_random-1", "coco_pope_random-2"]
    assert [item.group for item in items] == ["a.png", "a.png"]
    assert items[0].messages[0]["content"][-1]["text"] == "Is there a dog in the image? Answer with one word."
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question": "Is there a dog in the image?", "answer": "Yes"}\n'
                       '{"question": "Is there a cat in the image?", "answer": "No."}\n')  # fmt: skip
    predictions = yesno.read_pope_answers(answers, items)
    rows = [yesno.score(item, said).numbers for item, said in zip(items, predictions, strict=True)]
    assert yesno.figures(rows)["accuracy"] == 1


def test_answers_out_of_order_are_refused(tmp_path, questions):
    items = yesno.read_pope(questions)
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question": "Is there a dog in the image?", "answer": "Yes"}\n')
    with pytest.raises(ValueError, match="has 1 answers for 2 questions"):
        yesno.read_pope_answers(answers, items)
    answers.write_text('{"question": "Is there a cat in the image?", "answer": "Yes"}\n' * 2)
    with pytest.raises(ValueError, match="line 1 answers 'Is there a cat in the image"):
        yesno.read_pope_answers(answers, items)
    answers.write_text('{"question": "Is there a dog in the image?"}\n' * 2)
    with pytest.raises(ValueError, match=r"answers.jsonl line 1 lacks answer \(it has question\)"):
        yesno.read_pope_answers(answers, items)


def test_question_without_label_is_refused(tmp_path):
    file = tmp_path / "q.json"
    file.write_text('{"question_id": 1, "image": "a.png", "text": "Is there a dog?"}\n')
    with pytest.raises(ValueError, match="line 1 lacks label"):
        yesno.read_pope(file)


def test_questions_that_are_cut_off_or_missing_are_refused(tmp_path, questions):
    whole = questions.read_text()
    questions.write_text(whole[:-30])
    with pytest.raises(ValueError, match=r"coco_pope_random.json line 2 is not complete JSON .* Was the file cut off"):
        yesno.read_pope(questions)
    for nothing in ("", "\n \n"):
        questions.write_text(nothing)
        with pytest.raises(ValueError, match=r"coco_pope_random.json holds no rows: there would be nothing to score"):
            yesno.read_pope(questions)
    questions.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 is a list, not an object with image, text, label"):
        yesno.read_pope(questions)
    questions.write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(ValueError, match=r"coco_pope_random.json is not text in UTF-8"):
        yesno.read_pope(questions)
    with pytest.raises(ValueError, match=r"there is no file .*gone.json"):
        yesno.read_pope(tmp_path / "gone.json")


def test_questions_about_one_picture_share_its_bytes(tmp_path, questions):
    """Within a file, and over the splits of one benchmark; another picture is another object."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"two")
    other = tmp_path / "coco_pope_popular.json"
    other.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], {**rows[1], "image": "b.png"}]))
    items, _ = pope_items(PopeFiles([questions, other], images=tmp_path), needs_pictures=True)
    first, second, third, last = (item.images[0] for item in items)
    assert first is second is third
    assert (first["bytes"], last["bytes"]) == (b"one", b"two")
