"""Masked answers filled in again: what of a continuation belongs to a gap, and what is refused."""

import pytest

from prefalign.engines import Completion, Sampling
from prefalign.filling import fill_by_request, fill_gaps, fill_of, opening, unusable
from prefalign.guided import Item
from prefalign.records import message_text, user_message
from tests.test_masking import M, Scripted


@pytest.mark.parametrize(
    ("written", "gap", "original", "expected"),
    [
        (" a red ball. It", ".", "a cat", ("a red ball", "sentence")),
        (" a 3.5 m pole!", ". The", "a cat", ("a 3.5 m pole", "sentence")),
        (" a ball", "", "a cat", ("a ball", "sentence")),
        (" a ball and so on", "\n", "a cat", ("a ball and so on", "sentence")),
        (" woman in red is standing next to a car.", " is riding ", "man", ("woman in red", "anchor")),
        (" man who is tall is riding a horse.", " is riding ", "man", ("man who is tall", "anchor")),
        (" dog, Two cats and a bird.", ", ", "cat", ("dog", "anchor")),
        (" is is red.", " is ", "cat", ("is", "anchor")),  # a fill is never empty
        (" a motorcycle down the street.", " on the ", "a brown horse", ("a motorcycle", "phrase")),
        (" on the old road to nowhere", " with ", "here", ("on the old", "phrase")),  # 1 + 2 words at most
        (" dog; it barks.", " with ", "cat", ("dog", "phrase")),
        (" 2.5 miles away.", ". Then", "3.5 miles", ("2.5 miles away", "sentence")),
        (" 2 p.m. by the clock.", " by ", "10:30", ("2 p.m.", "anchor")),
        (" cup of tea.", '." He', "mug", ("cup of tea", "sentence")),
        (" cat video", ".mp4 file", "dog", ("cat video", "phrase")),
        ("", " with ", "cat", ("", "phrase")),
        (" ...", ".", "cat", ("", "sentence")),
    ],
)
def test_a_gap_takes_its_part_of_what_was_written(written, gap, original, expected):
    assert fill_of(written, gap, original, last=gap in ("", ".")) == expected


def test_a_mark_ends_a_gap_only_before_a_blank_or_the_end():
    """At the end of the answer the full stop ends a sentence; with the next span right behind it, it does not."""
    assert fill_of("2.5 miles and a clock", ".", "3", last=True) == ("2.5 miles and a clock", "sentence")
    assert fill_of("2.5 miles and a clock", ".", "3", last=False) == ("2.5 miles", "phrase")
    (found,) = fill_gaps(
        Scripted(" pdf on the desk.", "txt"), items("See a.b here"), [[(4, 5), (6, 7)]], Sampling(), seed=0
    )
    assert found.text == "See pdf.txt here"


@pytest.mark.parametrize(
    ("answer", "span", "expected"),
    [
        ("On the left there is a cat.", (0, 11), "On the"),
        ("A cat is here. The dogs sit.", (0, 5), "A"),
        ("A cat is here. The big dogs sit.", (15, 27), "The"),
        ("There is a cat.", (9, 14), ""),  # not at the start of a sentence
        ("No star is here.", (0, 7), ""),  # no would force what is true
        ("There is not a star.", (0, 19), "There is"),
        ("Cats sit.", (0, 4), ""),
        ("Yes.", (0, 3), ""),
    ],
)
def test_a_gap_at_the_start_of_a_sentence_keeps_its_function_words(answer, span, expected):
    assert opening(answer, span) == expected


def items(*answers):
    return [Item(f"row{n}/1", [user_message("What is it?", 1)], [], answer) for n, answer in enumerate(answers)]


def test_gaps_are_filled_one_after_the_other_all_answers_together():
    engine = Scripted(" small dog is on a rug.", " ox.", " the floor. It")
    given = items("A cat is on the mat.", "It is a cow.")
    one, two = fill_gaps(engine, given, [[(0, 5), (12, 19)], [(6, 11)]], Sampling(), seed=5)
    assert (one.text, one.fills, one.cut) == ("A small dog is on the floor.", ["A small dog", "the floor"], 0)
    assert (two.text, two.fills) == ("It is ox.", ["ox"])
    assert [[request.id for request in call] for call in engine.asked] == [["row0/1/0", "row1/1/0"], ["row0/1/1"]]
    assert [request.prefix for call in engine.asked for request in call] == ["A", "It is", "A small dog is on"]
    assert all(request.stop_at_sentence and request.seed == 5 for call in engine.asked for request in call)


@pytest.mark.parametrize(
    ("written", "text"), [(" orange ox is here.", "An orange ox is here."), (" cat is.", "A cat is here."),
                          (" an ox is", "An ox is here."), (" uniform is", "A uniform is here."),
                          (" hourglass is", "An hourglass is here.")]
)  # fmt: skip
def test_the_article_suits_what_follows(written, text):
    (found,) = fill_gaps(Scripted(written), items("An ant is here."), [[(0, 6)]], Sampling(), seed=0)
    assert found.text == text


def test_gaps_that_cannot_be_filled_refuse_the_answer():
    engine = Scripted(
        Completion("a", "", finish_reason="error", error="too long"),
        Completion("b", " "),
        Completion("c", " a very long tale", finish_reason="length"),
        Completion("d", " a long tale that is", finish_reason="length"),
        " rug.",
    )
    given = items(*["See a cat on the mat."] * 4)
    found = fill_gaps(engine, given, [[(4, 20)], [(4, 20)], [(4, 20)], [(4, 9), (17, 20)]], Sampling(), seed=0)
    assert [(one.refused, one.message, one.text) for one in found] == [
        ("generation_failed", "too long", ""),
        ("empty_completion", None, ""),
        ("cut_off", None, ""),
        (None, None, "See a long tale on the rug."),  # the limit came after the first phrase
    ]
    assert found[3].cut == 1
    assert fill_gaps(Scripted(), [], [], Sampling(), seed=0) == []


def test_an_answer_by_request_is_laid_over_the_words_that_stay():
    answer = "A man in a grey coat waits at a bus stop. The street behind him is empty."
    spans = [(0, 5), (9, 20), (30, 40), (46, 52), (67, 72)]
    engine = Scripted(
        '"A woman in blue waits at a station. The road behind him is full."',
        "A woman in blue waits at a station. The road behind her is full.",
        "A woman in blue is at a station. The road near her is full of cars.",
        "A woman in [MASK] waits at a station. The road behind him is full.",
        "I'm sorry, there is no man.",
        Completion("a", "A woman", finish_reason="length"),
        Completion("a", "", finish_reason="error", error="too long"),
        "  ",
    )
    found = fill_by_request(engine, items(*[answer] * 8), [spans] * 8, Sampling(), marker=M, max_edits=0.15, seed=5)
    expected = "A woman in blue waits at a station. The road behind him is full."
    assert [one.text for one in found] == [expected, expected] + [""] * 6  # him is put back in the second
    assert found[0].fills == ["A woman", "blue", "a station", "road", "full"]
    assert [one.refused for one in found[2:]] == [
        "rewritten", "unfilled", "refusal", "cut_off", "generation_failed", "empty_completion"
    ]  # fmt: skip
    assert found[6].message == "too long"
    (requests,) = engine.asked
    assert (requests[0].id, requests[0].seed) == ("row0/1", 5)
    assert [block["type"] for block in requests[0].messages[0]["content"]] == ["image", "text"]
    asked = message_text(requests[0].messages)
    assert "What is it?" in asked
    assert "[MASK] in [MASK] waits at [MASK]. The [MASK] behind him is [MASK]." in asked
    assert fill_by_request(Scripted(), [], [], Sampling(), marker=M, max_edits=0, seed=0) == []


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("A red [mask].", "A cat.", "unfilled"),
        ("I cannot see that.", "A cat.", "refusal"),
        ("I cannot see a cat.", "I cannot see a dog.", None),
        ("As an AI I see.", "A cat.", "refusal"),
        ("The masked word is cat.", "A cat.", "refusal"),
        ("A man with a mask.", "A cat.", None),
        ("A dog sits in front of a blank wall.", "A cat sits there.", None),
        ("Men fill in a hole, and blanks lie there.", "A cat.", None),
        ("A mask part lies there.", "A cat.", None),
        ("A cat.", "A dog.", None),
    ],
)
def test_refusals_and_markers_cannot_serve(text, answer, reason):
    assert unusable(text, answer, M) == reason
