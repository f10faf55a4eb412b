"""Short answers by hand: which say the same, which are denied, what units and numbers are, and what an annotator wrote."""

import pytest

from prefalign.parity import Number, is_refusal, matches, read_annotation, released_match, tokens, undecided


@pytest.mark.parametrize(
    ("wanted", "said", "same", "released"),
    [
        ("no", "snow", False, True),
        ("1", "10", False, True),
        ("15", "1.5", False, True),
        ("1.5", "15", False, True),
        ("1.5", "1.50", True, True),
        ("red car", "A red  car.", True, True),
        ("red car", "redcar", False, True),
        ("ed car", "red car", False, True),
        ("red car", "a car, red", False, False),
        ("a dog", "The dog", True, False),
        ("two", "2", True, False),
        ("50%", "50 %", True, True),
        ("50", "50%", False, True),
        ("$5", "5", False, True),
        ("5 km", "about 5km", True, True),
        ("5 km", "5 m", False, False),
        ("1,000", "1000", True, True),
        ("1,5", "1.5", True, True),
        ("-3", "3", False, True),
        ("\u22123", "-3", True, True),
        ("7-11", "7-11", True, True),
        ("don't walk", "DON\u2019T WALK", True, True),
        ("yes", "Yes, it is.", True, True),
        ("yes", "No. I would not say yes.", False, True),
        ("no", "Yes, there is no other one.", False, True),
        ("red", "not red", False, True),
        ("red", "not really red", False, True),
        ("red", "It isn't a very bright red.", False, True),
        ("red", "No visible red", True, True),
        ("red", "There is no visible red", False, True),
        ("red", "No, it is red.", True, True),
        ("red", "Not blue but red", True, True),
        ("red", "red, not blue", True, True),
        ("walk", "don't walk", False, True),
        ("not allowed", "Not allowed.", True, True),
        ("5%", "5 percent", True, True),
        ("12.5 per cent", "12.5%", True, False),
        ("5%", "5 dollars", False, True),
        ("$5", "5 dollars", True, True),
        ("5 euros", "\u20ac5", True, False),
        ("$5 million", "5 million dollars", True, True),
        ("$5", "$5 million", False, True),
        ("20", "twenty", True, False),
        ("twenty one", "21", True, False),
        ("20", "twenty-one", False, False),
        ("14", "fourteen", True, False),
        ("a hundred", "100", True, False),
        ("100", "two hundred", False, False),
        ("5000", "5 thousand", True, False),
        ("ten", "tenth", False, True),
        ("St. John's", "St Johns", True, True),
        ("caf\u00e9", "Cafe", True, False),
        ("cafe\u0301", "cafe", True, True),
        ("\u0439", "\u0438", False, False),  # Russian letters of their own
        ("colour", "Color", True, False),
        ("grey harbours", "gray harbors", True, False),
        ("city centre", "the city center", True, False),
        ("four", "for", False, False),
        ("red", "red or blue", False, True),
        ("blue", "blue/red", False, True),
        ("red", "Blue / red.", False, True),
        ("AC/DC", "It says AC/DC.", True, True),
        ("5 km/h", "5 km/h", True, True),
        ("60", "The limit is 60 km/h.", True, True),
        ("coffee", "Coffee w/ milk.", True, True),
        ("rock", "AC/DC plays rock.", True, True),
        ("red car", "red car/blue car", False, True),
        ("blue", "red/dark blue", False, True),
        ("dog", "The cat/a big dog.", False, True),
        ("2019", "12 May 2019 (UTC/GMT)", True, True),
        ("red", "Nothing is red", False, True),
        ("red", "Nobody wears red", False, True),
        ("red", "Nothing but red", True, True),
        ("nothing", "It says: nothing", True, True),
        ("red or blue", "Red or blue.", True, True),
        ("stra\u00dfe", "STRASSE", True, False),
        (
            "\u0915\u093f",
            "\u0915\u093e",
            False,
            True,
        ),  # Devanagari ki and ka differ in a vowel sign, which is no letter
        ("\u7ea2\u8272", "\u7ea2\u8272\u6c7d\u8f66", True, True),  # "red" in "red car", written without blanks
        ("\u8272\u7ea2", "\u7ea2\u8272\u6c7d\u8f66", False, False),
        ("\u043d\u0435\u0442", "\u043c\u043e\u043d\u0435\u0442\u0430", False, True),  # "no" in "coin", in Russian
        ("a", "A", True, True),  # the name of a choice
        ("", "anything", False, True),
        ("...", "...", False, True),
    ],
)
def test_matching_by_hand(wanted, said, same, released):
    assert matches(wanted, said) is same
    assert released_match(wanted, said) is released


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("150", "one hundred fifty"),
        ("150", "a hundred and fifty"),
        ("2,301", "two thousand three hundred and one"),
        ("1,000,007", "one million seven"),
        ("-5", "minus 5"),
        ("-21", "negative twenty-one"),
        ("one thousand dollars", "$1000"),
        ("1/2", "1/2"),
        ("2\u00bd", "2 1/2"),
        ("10:30", "10:30"),
        ("5\u201310 m", "5-10 m"),
    ],
)
def test_a_number_is_one_token_however_it_is_said(one, other):
    assert matches(one, other)
    assert matches(other, one, whole=True)
    assert not undecided(one, other)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("100", "one hundred fifty"),
        ("50", "one hundred and fifty"),
        ("5", "minus 5"),
        ("5", "10 minus 5"),
        ("1000", "two thousand"),
    ],
)
def test_parts_of_a_number_say_nothing_of_it(wanted, said):
    assert not matches(wanted, said)
    assert not undecided(wanted, said)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("2", "1/2"),
        ("0.5", "1/2"),
        ("30", "10:30"),
        ("10:30", "ten thirty"),
        ("10:30 pm", "22:30"),
        ("1", "half past one"),
        ("1980", "nineteen eighty"),
        ("150", "one fifty"),
        ("2", "two and a half"),
        ("2", "two dozen"),
        ("24", "two dozen"),
        ("2300", "two thousand, three hundred"),
        ("1200", "twelve hundred"),
        ("1", "1 000"),
        ("12345.6", "12 345.6"),
        ("21/2", "2\u00bd"),
        ("5", "5-10"),
        ("5", "5k"),
        ("3rd", "third"),
        ("3", "3rd"),
        ("123", "1.2.3"),
        ("5%", "half percent"),
    ],
)
def test_a_number_that_cannot_be_read_surely_neither_confirms_nor_rejects(wanted, said):
    for one, other in ((wanted, said), (said, wanted)):
        assert not matches(one, other)
        assert undecided(one, other)


@pytest.mark.parametrize(("one", "other"), [("24", "25"), ("half", "red"), ("1/2", "1/2"), ("two dozen", "Two dozen.")])
def test_numbers_that_can_be_read_or_are_the_same_are_decided(one, other):
    assert not undecided(one, other)


def test_numbers_have_a_tolerance_and_years_none():
    assert matches("100", "104", tolerance=0.05)
    assert matches("100", "105", tolerance=0.05)
    assert not matches("100", "105.1", tolerance=0.05)
    assert not matches("100%", "104", tolerance=0.05)
    assert not matches("2010", "2011", tolerance=0.05)
    assert not matches("1.2.3", "1.2.4", tolerance=0.05)
    assert matches("1,010", "1011", tolerance=0.05) is matches("1010", "1,011", tolerance=0.05) is False
    assert tokens("The red car, 1.5 m") == ["red", "car", Number(1.5), "m"]


def test_the_whole_answer_can_be_asked_for():
    assert matches("At the top.", "At the top left.")
    assert not matches("At the top.", "At the top left.", whole=True)
    assert matches("two 1.5", "2, 1.6", tolerance=0.1, whole=True)
    assert not matches("yes", "Yes, it is.", whole=True)
    assert not matches("", "", whole=True)


@pytest.mark.parametrize(
    ("text", "refuses", "read"),
    [
        ("Unknown Soldier", True, False),
        ("No Answer Road", True, False),
        ("unknown", True, True),
        ("The answer is unknown.", True, True),
        ("No answer.", True, True),
        ("The text is not visible", True, True),
        ("I can\u2019t tell", True, True),
        ("No parking", False, False),
    ],
)
def test_words_of_a_sign_are_no_refusal(text, refuses, read):
    assert (is_refusal(text), is_refusal(text, read=True)) == (refuses, read)


def test_long_answers_give_none():
    assert matches("red", "It is a red one", most_words=4)
    assert not matches("red", "It is clearly a red one", most_words=4)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Question: What does the sign say?\nAnswer: STOP", ("What does the sign say?", "STOP")),
        ("Sure!\n\n1. **Question:** How many?\n\n2. **Answer:** 2\nThat is all.", ("How many?", "2")),
        ("Question: Which one,\nleft or right? \nAnswer: left", ("Which one, left or right?", "left")),
        ("Question: What?\nAnswer:", ("What?", "")),
        ("Question: What?\nAnswer:\nA cat", ("What?", "A cat")),
        ("**Question:** What is it?\n**Answer:**\n\n**Red**", ("What is it?", "Red")),
        ("Question: What? Answer: Red", ("What?", "Red")),
        ("**Question:** What? **Answer:** Red.", ("What?", "Red.")),
        ("Question: Which answer: A or B?\nAnswer: B", ("Which answer: A or B?", "B")),
        ("Question: A? Answer: x\nQuestion: B? Answer: y", ("A?", "x")),
        ("Question: A?\nAnswer:\nQuestion: B?\nAnswer: y", ("A?", "")),
        ("Question: What?", None),
        ("What is it? A dog.", None),
    ],
)
def test_annotations_keep_their_question_mark(reply, found):
    assert read_annotation(reply) == found
