"""Articles, plurals and forms of words, with every expected value written by hand."""

import pytest

from prefalign.english import NUMBERS, SCALES, TENS, article, bases, plural, plural_spellings, read_number, spoken, stem


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("red star", "a"), ("orange star", "an"), ("hour", "an"), ("honest man", "an"), ("house", "a"), ("umbrella", "an"),
     ("uniform", "a"), ("unidentified man", "an"), ("user", "a"), ("usher", "an"), ("utensil", "a"), ("urn", "an"),
     ("one-way sign", "a"), ("European", "a"), ("X-ray", "an"), ("8-ball", "an"), ("18", "an"), ("1", "a"), ("", "a")],
)  # fmt: skip
def test_articles_go_by_sound(words, wanted):
    assert article(words) == wanted


@pytest.mark.parametrize(
    ("words", "number"),
    [("zero", 0), ("nineteen", 19), ("twenty", 20), ("forty-two", 42), ("a hundred", 100), ("one hundred and fifty", 150),
     ("two thousand three hundred one", 2301), ("a million", 10**6), ("ninety-nine thousand nine hundred ninety-nine", 99_999),
     ("one billion two million three", 1_002_000_003), ("one fifty", None), ("ten thirty", None), ("nineteen eighty", None),
     ("twelve hundred", None), ("hundred", None), ("fifty two three", None), ("one hundred, two", None), ("twenty dogs", None),
     ("", None)],
)  # fmt: skip
def test_numbers_in_words_by_hand(words, number):
    assert read_number(words) == number


def test_every_number_is_read_as_it_is_said():
    for number in (*range(2001), 45_678, 10**5, 999_999, 10**6 + 7, 10**9, 123_456_789_012):
        assert read_number(spoken(number)) == number


@pytest.mark.parametrize(
    ("noun", "wanted"),
    [("star", "stars"), ("box", "boxes"), ("bus", "buses"), ("dish", "dishes"), ("wine glass", "wine glasses"),
     ("baby", "babies"), ("toy", "toys"), ("knife", "knives"), ("bookshelf", "bookshelves"), ("fireman", "firemen"),
     ("woman", "women"), ("human", "humans"), ("ottoman", "ottomans"), ("ox", "oxen"), ("fox", "foxes"), ("sheep", "sheep"),
     ("potato", "potatoes"), ("photo", "photos"), ("traffic light", "traffic lights"), ("young person", "young people")],
)  # fmt: skip
def test_plurals_by_hand(noun, wanted):
    assert plural(noun) == wanted


@pytest.mark.parametrize(
    ("noun", "spelled"),
    [("glasses", ["glasseses"]), ("wine glass", ["wine glasses"]), ("baby", ["babys", "babies"]),
     ("child", ["childs", "children"]), ("tomato", ["tomatos", "tomatoes"]), ("leaf", ["leafs", "leaves"])],
)  # fmt: skip
def test_plurals_as_they_may_be_spelled(noun, spelled):
    assert plural_spellings(noun) == spelled


def test_number_words_stand_at_their_numbers():
    assert [NUMBERS[number] for number in (0, 1, 12, 20)] == ["zero", "one", "twelve", "twenty"]
    assert len(set(NUMBERS)) == 21
    assert TENS[0] == NUMBERS[20]
    assert TENS[7] == "ninety"
    assert SCALES["billion"] == 10**9


@pytest.mark.parametrize(
    ("one", "many"), [("house", "houses"), ("knife", "knives"), ("woman", "women"), ("ox", "oxen")]
)
def test_a_noun_has_one_stem(one, many):
    assert stem(one) == stem(many)
    assert stem(one) != stem("star")


@pytest.mark.parametrize(
    ("word", "other", "related"),
    [("sitting", "sits", True), ("men", "man", True), ("carried", "carry", True), ("stood", "standing", True),
     ("tied", "tying", True), ("cape", "cap", False), ("red", "r", False), ("glass", "glas", False)],
)  # fmt: skip
def test_forms_of_a_word_have_a_base_in_common(word, other, related):
    assert bool(bases(word) & bases(other)) == related
