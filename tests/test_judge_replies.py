"""What a judge is asked, how replies are read, and which questions are asked again."""

import json

import pytest
from witnesses import ASKED, FIVE, Overloaded, Scripted

from prefalign.judge import (
    RUBRIC,
    Judge,
    NoReply,
    Question,
    Vote,
    ask_until_read,
    comparison_prompt,
    grading_prompt,
    known_text,
    read_grades,
    read_vote,
    transcript,
)
from prefalign.records import assistant_message, message_text, user_message
from prefalign.rewards.judged import COMPARING, GRADING, JudgedAttributes


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps(FIVE),
        json.dumps(FIVE, indent=2),
        f"```json\n{json.dumps(FIVE)}\n```",
        f"Here are the grades:\n{json.dumps(FIVE)}\nThe answer names a cup {{which is not there}}.",
        json.dumps({"reason": "clear", **FIVE}),
        f"{json.dumps(FIVE)}\n{json.dumps(FIVE)}",
    ],
)
def test_grades_that_can_be_read(reply):
    assert read_grades(reply, list(RUBRIC)) == FIVE


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "4",
        "helpfulness: 3, correctness: 4, coherence: 4, complexity: 1, verbosity: 2",
        json.dumps({**FIVE, "correctness": 4.0}),
        json.dumps({**FIVE, "correctness": "4"}),
        json.dumps({**FIVE, "correctness": 5}),
        json.dumps({**FIVE, "correctness": -1}),
        json.dumps({**FIVE, "correctness": True}),
        json.dumps({**FIVE, "correctness": None}),
        json.dumps({name: value for name, value in FIVE.items() if name != "verbosity"}),
        json.dumps(FIVE)[:-1],
        json.dumps(FIVE).replace("3", "<0-4>"),
        json.dumps(FIVE)[:-1] + ', "verbosity": 3}',
        f"{json.dumps(FIVE)} or rather {json.dumps({**FIVE, 'verbosity': 3})}",
        json.dumps({"grades": FIVE}),
        json.dumps(list(FIVE.values())),
        '{"helpfulness": ' + "[" * 100_000,
        '{"helpfulness": ' * 2_000,
    ],
)
def test_grades_that_cannot_be_read_are_missing(reply):
    assert read_grades(reply, list(RUBRIC)) is None


@pytest.mark.parametrize(
    ("reply", "vote"),
    [
        ('{"reason": "B invents a cup.", "better": "A", "confidence": 85}', Vote("A", 0.85, "B invents a cup.")),
        ('```json\n{"better": "b"}\n```', Vote("B")),
        ('Well.\n{"better": "Answer B", "confidence": 300}', Vote("B")),
        ('{"better": "TIE", "confidence": 50}', Vote("tie", 0.5)),
        ('{"better": "A", "confidence": true, "reason": 3}', Vote("A")),
        ("A", Vote("A")),
        ("**Answer B.**", Vote("B")),
        ("tie", Vote("tie")),
        ("A is better because it is shorter.", None),
        ("Both A and B are fine.", None),
        ('{"better": "A"} no wait {"better": "B"}', None),
        ('{"better": "C"}', None),
        ('{"better": 1}', None),
        ('{"winner": "A"}', None),
        ('{"better": "A", "better": "B"}', None),
        ('{"better": "<A, B or tie>"}', None),
        ("A person stands there.", None),
        ("", None),
    ],
)
def test_votes(reply, vote):
    assert read_vote(reply) == vote


def test_what_a_judge_is_asked():
    text = grading_prompt("User: What?", " A cup. ", ["coherence", "helpfulness"], "KNOWN\n\n", pictures=True)
    assert "about the picture shown" in text
    assert "KNOWN\n\nConversation:\nUser: What?\n\nAnswer to grade:\nA cup.\n" in text
    assert text.endswith('{"coherence": <0-4>, "helpfulness": <0-4>}')
    assert "correctness" not in text
    for question, *anchors in (RUBRIC["coherence"], RUBRIC["helpfulness"]):
        assert question in text
        assert all(f"{value}: {anchor}" in text for value, anchor in zip((0, 2, 4), anchors, strict=True))
    both = comparison_prompt("User: What?", "A cup.", "A cat.", pictures=False)
    assert "picture" not in both
    assert both.index("Answer A:\nA cup.") < both.index("Answer B:\nA cat.")


def test_a_change_of_wording_is_noticed():
    """A change of wording is another judge: its replies are asked for anew, and scores are not comparable."""
    assert (GRADING, COMPARING) == ("grades-08bcb48e", "pairs-9689500e")


def test_transcript_and_facts():
    turns = [*ASKED, assistant_message("A cup."), user_message("What colour?")]
    assert transcript(turns) == "User: Describe the picture.\nAssistant: A cup.\nUser: What colour?"
    assert known_text({}) == ""
    facts = {"captions": ["A cup."], "rationales": ["Cups are round."],
             "objects": ["spoon", {"name": "cup", "colour": "red", "size": "small", "place": "left"}]}  # fmt: skip
    assert known_text(facts, "Red.") == (
        "What is known of the picture:\n- A cup.\n- Cups are round.\n- objects: spoon; small red cup (left)\n"
        "- a correct answer: Red.\n\n"
    )
    two = {**facts, "pictures": [{"captions": ["A cup."]}, {"objects": ["dog"]}]}
    assert "- picture 1: A cup.\n- picture 2: objects: dog\n" in known_text(two)


def test_one_caption_and_objects_by_shape():
    assert "- a dog\n" in known_text({"captions": "a dog"})
    assert "- objects: red star (top left)\n" in known_text(
        {"objects": [{"shape": "star", "colour": "red", "place": "top left"}]}
    )


def test_a_file_that_is_no_cache(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but long enough to be taken for one" * 20)
    judge = Judge(Scripted("Fine."), "v", cache=tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"cache 'notes.txt' holds no replies of a model"):
        judge.ask([Question("a", "Well?")], read_vote)
    reward = JudgedAttributes(engine=Scripted("Fine."), cache=str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match=r"holds no replies of a model"):
        reward.version  # noqa: B018  (stages ask for it before any row)


def test_a_question_that_got_no_reply_is_not_an_unreadable_one():
    engine = Overloaded("One?", reply="Well.")
    judge = Judge(engine, "v")
    assert judge.ask([Question("a", "One?"), Question("b", "Two?"), Question("c", "One?")], read_vote) == [None] * 3
    assert judge.failed == {0: "busy", 2: "busy"}  # an equal question was asked once
    texts = [message_text(request.messages) for request in engine.requests]
    assert texts[:2] == ["One?", "Two?"]
    assert [text.startswith("Two?") and "could not be read" in text for text in texts[2:]] == [True, True]
    assert (judge.counts["failed"], judge.counts["missing"], judge.counts["read"]) == (2, 3, 0)
    assert judge.ask([Question("d", "tie")], read_vote) == [None]
    assert judge.failed == {}


def test_a_reminded_question_that_gets_no_reply_has_failed():
    judge = Judge(Overloaded("could not be read", reply="Well."), "v")
    assert judge.ask([Question("a", "One?")], read_vote) == [None]
    assert judge.failed == {0: "busy"}


@pytest.mark.parametrize(
    ("failed_again", "put", "answers", "failed"),
    [
        (False, [[0, 1, 2, 3], [1, 3], [1]], ["a", None, None, "d"], {1: "busy", 2: "down"}),
        (True, [[0, 1, 2, 3], [1, 2, 3], [1]], ["a", None, "c", "d"], {1: "busy"}),
    ],
)
def test_what_is_asked_again(failed_again, put, answers, failed):
    """A reason is kept only of what is missing at the end; a question that fails may be worth another try, or not."""
    replies = {0: ["a"], 1: ["?", "?", NoReply("busy")], 2: [NoReply("down"), "c"], 3: ["?", "d"]}
    asked = []

    def say(places, attempt):
        assert attempt == len(asked)
        asked.append(places)
        return [replies[place].pop(0) for place in places]

    found = ask_until_read(
        4, say, lambda place, reply: None if reply == "?" else reply, attempts=3, failed_again=failed_again
    )
    assert (asked, *found) == (put, answers, failed)
