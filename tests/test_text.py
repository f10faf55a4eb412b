"""Sentences, splits, swaps, diffs and similarity, with every expected value written by hand."""

import builtins
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefalign.text import (
    first_sentence,
    lexical_similarity,
    load_similarity,
    normalised,
    same_answer,
    split_inside,
    split_sentences,
    swap_yes_no,
    word_diff,
)

PROSE = st.text(alphabet=st.sampled_from("ab I1.!?\n\t \"')-,\u3002Dr"), max_size=60) | st.text(max_size=40)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("There is a cat. It sleeps.", ["There is a cat. ", "It sleeps."]),
        ("It is 3.5 m tall. Two of 1,000.25 remain.", ["It is 3.5 m tall. ", "Two of 1,000.25 remain."]),
        ("Dr. No lives on St. Mary street, e.g. here. Next", ["Dr. No lives on St. Mary street, e.g. here. ", "Next"]),
        ("J. R. Smith came at 5 p.m. yesterday. Bye", ["J. R. Smith came at 5 p.m. yesterday. ", "Bye"]),
        ("He came at 5 p.m. She did not.", ["He came at 5 p.m. ", "She did not."]),
        ("1. A ball.\n2. A cat, etc.\n\n- a dog\n", ["1. A ball.\n", "2. A cat, etc.\n\n", "- a dog\n"]),
        ("Really?! Yes!! Wait... what? Hm... Fine", ["Really?! ", "Yes!! ", "Wait... what? ", "Hm... ", "Fine"]),
        ('He said "stop." (She did.) Then', ['He said "stop." ', "(She did.) ", "Then"]),
        ("No. There is none.", ["No. ", "There is none."]),
        ("  leading blanks. end  ", ["  leading blanks. ", "end  "]),
        ("a line\r\nanother", ["a line\r\n", "another"]),
        ("\u732b\u3002\u72ac\u3002", ["\u732b\u3002", "\u72ac\u3002"]),
        ("a circle at the top . a star .", ["a circle at the top . ", "a star ."]),
        ("", []),
    ],
)
def test_sentences(text, parts):
    assert split_sentences(text) == parts


@given(PROSE)
def test_parts_join_to_the_text(text):
    parts = split_sentences(text)
    assert "".join(parts) == text
    assert all(parts)


@given(PROSE)
def test_first_sentence_starts_the_text_and_is_the_first_part(text):
    first = first_sentence(text)
    assert text.startswith(first)
    if text.strip():
        assert first.strip() == split_sentences(text)[0].strip()


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (" red circle. There is", " red circle."),
        ("no end here", "no end here"),
        ("3.5 cm. Then", "3.5 cm."),
        ("\n\nhi\nyo", "\n\nhi"),
        ("Dr. ", "Dr. "),
        ("Yes.", "Yes."),
        ("", ""),
    ],
)
def test_first_sentence(text, first):
    assert first_sentence(text) == first


def test_split_inside_draws_every_inner_boundary_and_no_other():
    sentence = "There is a  red circle."
    seen = {split_inside(sentence, random.Random(seed)) for seed in range(200)}
    assert seen == {
        ("There", " is a  red circle."),
        ("There is", " a  red circle."),
        ("There is a", "  red circle."),
        ("There is a  red", " circle."),
    }


@given(st.text(max_size=30), st.integers())
def test_split_inside_loses_nothing(sentence, seed):
    head, tail = split_inside(sentence, random.Random(seed))
    assert head + tail == sentence
    assert (head == "") == (len(sentence.split()) < 2)
    assert head == head.rstrip()


def test_split_inside_is_seeded():
    assert split_inside("a b c d e f g", random.Random(3)) == split_inside("a b c d e f g", random.Random(3))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Yes, there is.", "No, there is."),
        ("no", "yes"),
        ("  No.", "  Yes."),
        ("YES", None),
        ("Nothing here", None),
        ("Yesterday", None),
        ("no-one", None),
        ("It says yes", None),
    ],
)
def test_swap_yes_no(before, after):
    assert swap_yes_no(before) == after


def test_normalised():
    assert normalised("  A  Red,\ncircle! ") == "a red circle"
    assert same_answer("There is a cat.", "there is  A cat")
    assert not same_answer("3.5 cm", "35 cm")
    assert not same_answer("a red cat", "a blue cat")


def test_word_diff():
    assert word_diff("There is a red cat.", "There is a blue cat. Yes") == [
        ("same", "There is a "),
        ("removed", "red "),
        ("added", "blue "),
        ("same", "cat."),
        ("added", " Yes"),
    ]
    assert word_diff("a cat", "a cat sits") == [("same", "a cat"), ("added", " sits")]
    assert word_diff("a  red cat", "a cat ") == [
        ("same", "a"),
        ("removed", "  red "),
        ("added", " "),
        ("same", "cat"),
        ("added", " "),
    ]
    assert word_diff("same", "same") == [("same", "same")]
    assert word_diff("", "") == []


@given(PROSE, PROSE)
def test_word_diff_rebuilds_both_texts(before, after):
    pieces = word_diff(before, after)
    assert "".join(text for op, text in pieces if op != "added") == before
    assert "".join(text for op, text in pieces if op != "removed") == after
    assert all(text for _, text in pieces)


@given(st.lists(st.sampled_from(("a", "cat", ".", "sits")), max_size=8), st.data())
def test_blanks_alone_never_make_words_differ(words, data):
    before, after = ("".join(word + data.draw(st.sampled_from((" ", "\n"))) for word in words) for _ in range(2))
    changed = [text for op, text in word_diff(before, after.rstrip()) if op != "same"]
    assert all(text.isspace() for text in changed)


def test_lexical_similarity_by_hand():
    # "a cat": {a, cat, a cat}; "a dog": {a, dog, a dog}: 1 shared of 3 and 3
    # "a a": {a: 1 + ln 2, (a, a): 1}; "a": {a: 1}
    twice = 1 + math.log(2)
    expected = [1 / 3, twice / math.sqrt(twice**2 + 1), 1.0, 0.0, 1.0, 0.0]
    one = ["a cat", "a a", "A cat!", "cat", "", "cat"]
    other = ["a dog", "a", "a  cat", "dog", "...", ""]
    assert lexical_similarity(one, other) == pytest.approx(expected)


def test_one_word_of_a_long_caption_counts():
    caption = (
        "There is a large red circle at the top left. There is a small blue square at the bottom. "
        "There is a small green star on the right."
    )
    assert 0.9 < lexical_similarity([caption], [caption.replace("star", "ring")])[0] < 0.97


def test_load_similarity(monkeypatch):
    assert load_similarity() is lexical_similarity
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("sentence_transformers"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    message = (
        r"'all-mpnet-base-v2'.*pip install \"prefalign\[similarity\]\".*pip install -e \"\.\[similarity\]\".*"
        r"--similarity lexical"
    )
    with pytest.raises(ImportError, match=message):
        load_similarity("all-mpnet-base-v2")


def test_sentence_transformers_model(tmp_path):
    """A tiny random encoder stands for all-mpnet-base-v2: cosines of unit vectors, equal texts at 1."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bert")
    sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu").save(str(tmp_path / "model"))
    same, other = load_similarity(str(tmp_path / "model"))(["a cat.", "a cat."], ["a cat.", "a red dog."])
    assert same == pytest.approx(1, abs=1e-5)
    assert -1 <= other < 0.9999
