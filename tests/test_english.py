"""Articles, plurals and forms of words, with every expected value written by hand."""

import pytest

from prefalign.english import NUMBERS, SCALES, TENS, article, bases, plural, plural_spellings, stem


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("red star", "a"), ("orange star", "an"), ("hour", "an"), ("honest man", "an"), ("house", "a"), ("umbrella", "an"),
     ("uniform", "a"), ("unidentified man", "an"), ("user", "a"), ("usher", "an"), ("utensil", "a"), ("urn", "an"),
     ("one-way sign", "a"), ("European", "a"), ("X-ray", "an"), ("8-ball", "an"), ("18", "an"), ("1", "a"), ("", "a")],
)  # fmt: skip
def test_articles_go_by_sound(words, wanted):
    assert article(words) == wanted


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
