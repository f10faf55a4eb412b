"""Scores to training sets: the worked values of the gap rule, ties, missing scores, attribute lines, what makes a usable pair."""

import math
import random

import pytest

from prefalign.pairing import (
    HELPSTEER,
    Choice,
    attribute_line,
    bare_scores,
    best_of_n_kl,
    edit_similarity,
    keeps_attributes,
    make_dpo_pairs,
    make_rs,
    make_steerlm,
    make_two_turn,
    quality,
    ranked_pairs,
    strip_attributes,
    unusable,
    with_attributes,
)
from prefalign.records import assistant_message, message_text, placeholder_count, user_message

LINE = "<attributes>helpfulness:4,correctness:3</attributes>"


def rng(seed=0):
    return random.Random(seed)


def test_quality_adds_three_of_five_attributes_and_needs_all_of_them():
    scores = {"helpfulness": 4, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}
    assert quality({"scores": scores}) == 11
    assert quality({"scores": scores}, {"verbosity": -0.5, "correctness": 2}) == 5
    assert quality({"scores": {**scores, "correctness": None}}) is None
    assert quality({"scores": {}}) is None is quality({"text": "no scores"})
    assert list(HELPSTEER) == ["helpfulness", "correctness", "coherence"]


def test_worked_values_of_the_gap_rule():
    """[12, 11, 10, 4]: chosen 12, rejected 10 or 4, each about half of the time; 11 is too near."""
    drawn = [make_dpo_pairs([12, 11, 10, 4], rng(seed)) for seed in range(400)]
    assert all(len(pairs) == 1 and pairs[0].chosen == 0 for pairs in drawn)
    share = sum(pairs[0] == Choice(0, 2, 2) for pairs in drawn) / 400
    assert {pairs[0].rejected for pairs in drawn} == {2, 3}
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 400)
    assert make_dpo_pairs([9, 8, 8, 8], rng()) == []
    assert make_dpo_pairs([12, 10, 4], rng()) == []  # a group of 3 is skipped
    assert make_dpo_pairs([12, 10, 4, None], rng()) == []  # so is one with 3 graded answers
    assert make_dpo_pairs([12, 10, 4, None], rng(), group_size=None, rejected="worst") == [Choice(0, 2, 8)]


def test_rejected_policies_and_ties():
    group = [4, 12, 10, 4, 12, 9]
    known = {"group_size": 6, "per_prompt": 9}
    assert [pair.rejected for pair in make_dpo_pairs(group, rng(), rejected="worst", **known)] == [0, 3, 5, 2]
    assert [pair.rejected for pair in make_dpo_pairs(group, rng(), rejected="nearest", **known)] == [2, 5, 0, 3]
    several = make_dpo_pairs(group, rng(), **known)
    assert sorted(pair.rejected for pair in several) == [0, 2, 3, 5]  # drawn without putting back
    assert {pair.chosen for pair in several} == {1}  # the first of the best
    assert make_dpo_pairs(group, rng(3), **known) == make_dpo_pairs(group, rng(3), **known)
    assert make_dpo_pairs([1.0], rng(), group_size=None) == []


def test_tenths_meet_their_gap():
    """0.7 - 0.5 is 0.19999999999999996 in binary."""
    assert make_dpo_pairs([0.7, 0.5], rng(), min_gap=0.2, group_size=None) == [Choice(0, 1, 0.2)]
    assert ranked_pairs([0.7, 0.5], min_gap=0.2) == [Choice(0, 1, 0.2)]


def test_answers_that_may_not_be_used_are_in_no_pair():
    assert make_dpo_pairs([12, 11, 9, 4], rng(), rejected="worst", allowed={1, 2}) == [Choice(1, 2, 2)]
    assert make_dpo_pairs([12, 11, 9, 4], rng(), allowed=set()) == []
    assert make_rs([12, 11, 9, 4], allowed={2, 3}) == [2]


def test_ranked_pairs_are_all_that_differ():
    assert ranked_pairs([5, 9, None, 7], min_gap=2) == [Choice(1, 3, 2), Choice(1, 0, 4), Choice(3, 0, 2)]
    assert ranked_pairs([5, 5, 5], min_gap=0.5) == []
    assert len(ranked_pairs([1, 2, 3, 4], min_gap=0.5)) == 6


def test_best_of_n():
    assert make_rs([3, 9, None, 9, 7]) == [1]
    assert make_rs([3, 9, None, 9, 7], k=3) == [1, 3, 4]
    assert make_rs([3, 9, 7], k=3, min_quality=7) == [1, 2]
    assert make_rs([3, 9], min_quality=12) == []


def test_divergence_of_best_of_n():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(0.6363, abs=1e-4)
    # n = 2 without ties, exactly: the better of two uniforms has density 2u, and the integral of 2u log 2u is log 2 - 1/2
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    with pytest.raises(ValueError, match="n is 0; best-of-n draws at least one answer"):
        best_of_n_kl(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_gap": 0}, "min_gap is 0: answers of equal quality would become pairs"),
        ({"per_prompt": 0}, "per_prompt is 0, so no prompt would give a pair"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_dpo_pairs([1, 2], rng(), **changes)
    with pytest.raises(ValueError, match="min_gap is -1: equals would be ranked"):
        ranked_pairs([1, 2], min_gap=-1)


def test_unusable_answers():
    said = [
        ("A cat.", "stop"),
        ("a cat", "stop"),
        (" ", "stop"),
        ("A dog", "length"),
        ("A cow.", "stop"),
        ("A fox", None),
    ]
    responses = [{"text": text, "finish_reason": reason} for text, reason in said]
    assert unusable(responses) == [None, "duplicate", "empty", "unfinished", None, None]
    assert unusable(responses, unfinished=True)[3] is None
    assert unusable([{"text": "imported"}]) == [None]


def test_edit_similarity_counts_edits():
    assert edit_similarity("A red cat.", "a red cat") == 1
    assert edit_similarity("abcd", "abce") == pytest.approx(0.75)
    assert edit_similarity("there are 3 cats here on the mat", "there are 4 cats here on the mat") > 0.95
    assert edit_similarity("a cat", "the two dogs over there") < 0.5


def test_attribute_line():
    scores = {"judge/helpfulness": 4.0, "judge/correctness": 2.6, "total": -0.04, "gone": None}
    assert attribute_line(scores, ["judge/helpfulness", "judge/correctness"]) == (
        "<attributes>helpfulness:4,correctness:3</attributes>"
    )
    assert attribute_line(scores, ["total"], decimals=1) == "<attributes>total:0.0</attributes>"
    assert attribute_line(scores, ["total", "gone"]) is None is attribute_line(scores, ["never"])


def test_scores_lose_the_label_of_their_reward_where_that_is_clear():
    scores = {"judge/helpfulness": 4.0, "total": 4.0, "a/value": 1.0, "b/value": 2.0, "c/gone": None}
    assert bare_scores(scores) == {"helpfulness": 4.0, "total": 4.0, "a/value": 1.0, "b/value": 2.0}


@pytest.mark.parametrize("place", ["user", "system"])
def test_attributes_stand_in_the_prompt_and_nowhere_else(place):
    messages = [user_message("What is it?", 1)]
    made = make_steerlm(messages, {"text": "A cat."}, LINE, place=place)
    assert made[-1] == assistant_message("A cat.")
    assert placeholder_count(made) == 1
    where = made[0] if place == "system" else made[-2]
    assert where["role"] == place
    assert message_text([where]).endswith(LINE)
    assert messages == [user_message("What is it?", 1)]  # the prompt is left as it was
    assert make_steerlm(messages, {"text": "A cat."}, None, place=place) == [*messages, assistant_message("A cat.")]
    told = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *messages]
    assert message_text(with_attributes(told, LINE, place)[:1]) == (
        "Be brief." if place == "user" else f"Be brief.\n{LINE}"
    )


def test_two_turns_rate_the_first_answer_and_ask_for_another():
    made = make_two_turn(
        [user_message("What is it?", 1)],
        {"text": "A dog."},
        {"text": "A cat."},
        (LINE, "<attributes>helpfulness:0</attributes>"),
    )
    assert [turn["role"] for turn in made] == ["user", "assistant", "user", "assistant"]
    asked = message_text(made[2:3])
    assert asked.index(LINE) < asked.index("helpfulness:0")
    assert message_text(made[3:]) == "A cat."
    assert placeholder_count(made) == 1


def test_attributes_are_dropped_for_a_tenth_of_rows_whatever_their_order():
    kept = {row: keeps_attributes(0, str(row)) for row in range(4000)}
    share = 1 - sum(kept.values()) / 4000
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / 4000)
    assert all(keeps_attributes(0, str(row)) == kept[row] for row in reversed(range(100)))
    assert keeps_attributes(0, "x", 0.0)
    assert not keeps_attributes(0, "x", 1.0)


@pytest.mark.parametrize(("leaked", "clean"), [
    (f"A cat.\n{LINE}", "A cat."),
    (f"{LINE}\nA cat.", "A cat."),
    (f"A cat {LINE}sleeps.", "A cat sleeps."),
    ("A cat.\n<attributes>helpfulness:4,corr", "A cat."),
    ("<attributes>helpfulness:4,corr\nA cat.", "A cat."),
    ("A cat.</attributes>", "A cat."),
    (" A tag: <b>.\n", " A tag: <b>.\n"),
])  # fmt: skip
def test_leaked_attribute_lines_are_stripped(leaked, clean):
    assert strip_attributes(leaked) == clean
