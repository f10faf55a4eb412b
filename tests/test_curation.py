"""The pure parts of curation: comparisons and corruption, shares that are kept, z-scores, baselines, conversations."""

import math
import random
from collections import Counter

import pytest

from prefalign.curation import (
    BuilderConfig,
    Judged,
    aggregated,
    baseline,
    build_comparisons,
    conversation,
    corrupted,
    keep_best,
    kept_count,
    turns_of,
    z_scores,
)
from prefalign.records import Prompt, assistant_message, message_text, placeholder_count, user_message
from prefalign.text import same_answer

WORDS = "the quick brown fox jumps over the lazy dog"


def rng(seed=0):
    return random.Random(seed)


@pytest.mark.parametrize("kind", ["word_shuffle", "word_drop", "duplicate"])
@pytest.mark.parametrize("text", [WORDS, "two words", "A cat, a cat.", "yes", "a a", "a - b", ""])
def test_corrupted_text_never_equals_its_source(kind, text):
    for seed in range(50):
        made = corrupted(text, kind, rng(seed))
        assert made is None or (made.strip() and not same_answer(made, text))
        if made is not None and kind == "word_shuffle":
            assert Counter(made.split()) == Counter(text.split())
        if made is not None and kind == "word_drop":
            assert Counter(made.split()) < Counter(text.split())
        if made is not None and kind == "duplicate":
            assert Counter(made.split()) > Counter(text.split())
    if text in (WORDS, "two words"):
        assert made is not None
    if text in ("", "yes", "a a") and kind == "word_shuffle":
        assert made is None  # no other order


def test_words_are_dropped_at_their_rate():
    text = " ".join(f"w{number}" for number in range(100))
    kept = [len(str(corrupted(text, "word_drop", rng(seed), drop=0.3)).split()) for seed in range(100)]
    assert abs(sum(kept) / 100 - 70) < 4 * math.sqrt(21 / 100)


def test_the_released_bug_is_a_switch():
    """The release iterates a string, so characters are shuffled and joined with blanks."""
    made = corrupted("a red cat", "word_shuffle", rng(), characters=True)
    assert sorted(made.replace(" ", "")) == sorted("aredcat")
    assert max(map(len, made.split())) == 1
    assert max(map(len, corrupted("a red cat", "word_shuffle", rng()).split())) == 3


def build(texts, ratings, seed=0, others=lambda rng: None, **changes):
    return build_comparisons(texts, ratings, rng(seed), BuilderConfig(**changes), others)


def test_comparisons_have_a_gap_and_never_equal_scores_or_texts():
    texts = ["one", "two", "three", "Three.", "five", " "]
    ratings = [0.7, 0.5, 0.5, 0.9, None, 0.1]
    made = build(texts, ratings, aug_prob=0.0)
    assert [(one.better, one.worse, one.margin) for one in made] == [(0, 1, 0.2), (0, 2, 0.2), (3, 0, 0.2), (3, 1, 0.4)]
    assert all(one.text == texts[one.worse] and one.corruption is None for one in made)
    assert len(build(texts, ratings, aug_prob=0.0, min_gap=0.3)) == 1
    assert build(texts, [0.5] * 6, aug_prob=0.0) == []
    some = build(texts, ratings, aug_prob=0.0, max_pairs_per_group=2)
    assert len(some) == 2
    assert set(some) <= set(made)
    assert len({tuple(build(texts, ratings, seed, aug_prob=0.0, max_pairs_per_group=2)) for seed in range(20)}) > 3


def test_a_quarter_of_texts_is_compared_with_a_corrupted_copy_of_each_kind():
    made = [one for seed in range(600) for one in build([WORDS], [0.3], seed, others=lambda rng: "another answer")]
    assert abs(len(made) - 150) < 4 * math.sqrt(600 * 0.25 * 0.75)
    kinds = Counter(one.corruption for one in made)
    assert set(kinds) == {"word_shuffle", "word_drop", "duplicate", "swap_image", "swap_answer"}
    assert min(kinds.values()) > 10
    for one in made:
        assert (one.better, one.worse, one.margin) == (0, None, None)
        assert (one.text == WORDS) == (one.corruption == "swap_image")
        assert (one.text == "another answer") == (one.corruption == "swap_answer")
    alone = {"aug_prob": 1.0, "corruptions": ["swap_answer"]}
    assert build([WORDS], [0.3], **alone) == []  # there is no other answer
    assert build([WORDS], [0.3], others=lambda rng: WORDS.upper(), **alone) == []  # nor is this one
    assert build([WORDS], [None], aug_prob=1.0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_gap": 0}, "min_gap is 0: texts of one rating would be compared"),
        ({"aug_prob": 2}, "aug_prob is 2; it is a share of texts"),
        ({"corruptions": []}, "corruptions is empty, so there is nothing to compare with"),
        ({"drop": 1}, "drop is 1; it is a share of words"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BuilderConfig(**changes)
    assert BuilderConfig(corruptions=[], aug_prob=0.0).corruptions == []


def test_shares_are_rounded_up_whatever_binary_fractions_say():
    assert [kept_count(rows, 0.3) for rows in (0, 1, 3, 10, 11, 100)] == [0, 1, 1, 3, 4, 30]
    assert kept_count(100, 0.07) == 7  # 0.07 * 100 is 7.000000000000001
    assert kept_count(kept_count(158_000, 0.3), 0.3) == 14_220


def test_each_type_keeps_its_share_and_ties_go_to_the_lower_id():
    scores = {"d": 1.0, "b": 1.0, "a": 0.0, "c": 1.0, "z": 9.0, "y": 9.5}
    types = dict.fromkeys("abcd", "short") | dict.fromkeys("yz", "long")
    kept = keep_best(scores, types, 0.3, "within_type")
    assert kept == {"b", "c", "y"}  # ceil(0.3 * 4) = 2 of the short ones, ceil(0.3 * 2) = 1 of the long ones
    backwards = dict(reversed(scores.items()))
    assert keep_best(backwards, types, 0.3, "within_type") == kept
    assert keep_best(scores, types, 0.3, "overall") == {"y", "z"}
    assert keep_best({}, {}, 0.3, "within_type") == set()


def test_z_scores_compare_types_of_other_scales():
    """Worked: type x has 0, 2, 4 (mean 2, deviation sqrt(8/3)), type y 100, 101, 102 (deviation sqrt(2/3))."""
    scores = {"x0": 0.0, "x1": 2.0, "x2": 4.0, "y0": 100.0, "y1": 101.0, "y2": 102.0}
    types = {name: name[0] for name in scores}
    found = z_scores(scores, types)
    assert found["x2"] == pytest.approx(2 / math.sqrt(8 / 3)) == found["y2"] == pytest.approx(1 / math.sqrt(2 / 3))
    assert found["x1"] == 0 == found["y1"]
    assert keep_best(scores, types, 0.3, "z_score") == {"x2", "y2"}
    assert keep_best(scores, types, 0.3, "overall") == {"y1", "y2"}
    assert z_scores({"a": 3.0}, {"a": "x"}) == {"a": 0.0}


def test_a_conversation_is_scored_by_its_turns():
    assert aggregated([1.0, 2.0, 6.0]) == 3
    assert aggregated([1.0, 2.0, 6.0], "min") == 1
    assert aggregated([1.0, None]) is None
    assert aggregated([]) is None


def table():
    """Two types; the cascade kept the longest rows of one and the shortest of the other."""
    rows = [Judged(f"s{number:02}", "short", number, number >= 30) for number in range(40)]
    return rows + [Judged(f"l{number:02}", "long", 100 + number, number < 6) for number in range(20)]


@pytest.mark.parametrize("kind", ["random", "length_matched"])
def test_baselines_have_equal_counts_of_each_type(kind):
    drawn = baseline(table(), kind, 0)
    assert Counter(name[0] for name in drawn) == {"s": 10, "l": 6}
    assert baseline(reversed(table()), kind, 0) == drawn
    assert len({frozenset(baseline(table(), kind, seed)) for seed in range(10)}) > 3


def test_length_matched_rows_are_as_long_as_those_kept():
    rows = {row.id: row for row in table()}
    words = {
        kind: sum(rows[name].words for name in baseline(table(), kind, 1) if name[0] == "s") / 10
        for kind in ("random", "length_matched")
    }
    assert words["length_matched"] == pytest.approx(34.5, abs=2)  # those kept: 30 to 39
    assert words["random"] < 30
    spread = [Judged(f"{number:03}", "", number, number % 4 == 0) for number in range(200)]
    drawn = baseline(spread, "length_matched", 0)
    assert len(drawn) == 50
    assert len(drawn - {row.id for row in spread if row.kept}) > 20  # others than the cascade's
    assert all(sum(1 for name in drawn if int(name) // 20 == tenth) == 5 for tenth in range(10))


def test_conversations_are_taken_apart_and_put_together():
    prompt = Prompt(
        "p", [], [user_message("What is it?", 2), assistant_message("A cat."), user_message("Colour?")], "Grey."
    )
    first, second = turns_of(prompt)
    assert (first.question, first.answer, first.place) == ("What is it?", "A cat.", 1)
    assert (second.question, second.answer) == ("Colour?", "Grey.")
    assert [len(turn.context) for turn in (first, second)] == [1, 3]
    made = conversation(prompt, {1: "Which animal?"}, {3: "It is grey."})
    assert [message_text([turn]) for turn in made] == ["Which animal?", "A cat.", "Colour?", "It is grey."]
    assert placeholder_count(made[:1]) == 2
    assert message_text(prompt.messages[:1]) == "What is it?"  # the row stays as it was
    assert conversation(prompt, {}, {}) == [*prompt.messages, assistant_message("Grey.")]


def test_a_negative_number_of_pairs_is_refused():
    with pytest.raises(ValueError, match="max_pairs_per_group is -1: no number of pairs can be drawn. Give 0 for all"):
        BuilderConfig(max_pairs_per_group=-1)
