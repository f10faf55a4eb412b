"""Conversations of linked questions: banks of phrases, order, hints, and what the rules make of them."""

import dataclasses
import random
from collections import Counter

import pytest

from prefalign.rewards import Response, cases, dialogues
from prefalign.rewards.cases import Case
from prefalign.rewards.dialogues import Hints, Speaker
from prefalign.rewards.phrases import BANKS, LABELS, HintPhrases
from prefalign.rewards.rule_sets import RULE_SETS
from prefalign.rewards.symbolic import Symbolic

NAMES = ("quality", "analysis", "abnormality", "cells", "diagnosis")
MARROW = RULE_SETS["bone_marrow"]


def speaker(split="train"):
    return Speaker(MARROW, BANKS["bone_marrow"], HintPhrases(), split)


def case(label):
    return Case(label, LABELS["bone_marrow"][label])


def scored(turns, reference, **settings):
    """The terms of a conversation of these turns, judged by this reference."""
    truth = Case("", reference)
    rules = dialogues.rules_of("bone_marrow", truth, turns)
    asked = dialogues.messages_of(turns, 1, answered=False)
    found = Symbolic(**settings).score([Response("row", [], asked, turns[-1].answer, facts={"rules": rules})])
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize("seed", range(5))
def test_a_perfect_conversation_earns_what_the_specification_says(seed):
    turns = speaker().dialogue(case("AML"), random.Random(seed), Hints())
    assert scored(turns, LABELS["bone_marrow"]["AML"]) == {"correct": 5, "consistent": 4}
    # the same answers about a picture of another disease: three are right, and all fit together
    assert scored(turns, LABELS["bone_marrow"]["MM"]) == {"correct": 3, "consistent": 4}
    assert scored(turns, LABELS["bone_marrow"]["MM"], conditional=True)["consistent"] <= 2


def test_banks_hold_what_was_published_and_do_not_meet():
    for words in BANKS["bone_marrow"].values():
        assert (len(words.questions), len(words.test_questions)) == (15, 5)
        assert not set(words.questions) & set(words.test_questions)
        assert all(len(answers) == 3 for answers in words.answers.values())


@pytest.mark.parametrize("split", ["train", "test"])
def test_questions_come_from_the_bank_of_the_split_in_any_order(split):
    rng = random.Random(0)
    orders, asked = Counter(), {name: set() for name in NAMES}
    for _ in range(200):
        turns = speaker(split).dialogue(case("MM"), rng, Hints())
        orders[tuple(turn.variable for turn in turns)] += 1
        for turn in turns:
            asked[turn.variable].add(turn.question)
    assert len(orders) > 80  # of 120
    for name, words in BANKS["bone_marrow"].items():
        assert asked[name] == set(words.questions if split == "train" else words.test_questions)


def test_hints_are_as_often_and_as_wrong_as_they_are_told():
    rng, hints = random.Random(0), Hints(share=0.4, wrong=0.25)
    turns = [turn for _ in range(300) for turn in speaker().dialogue(case("AML"), rng, hints)]
    hinted = [turn for turn in turns if turn.hint is not None]
    wrong = [turn for turn in hinted if turn.hint != LABELS["bone_marrow"]["AML"][turn.variable]]
    assert abs(len(hinted) / len(turns) - 0.4) < 0.06
    assert abs(len(wrong) / len(hinted) - 0.25) < 0.08
    assert {turn.hint for turn in wrong if turn.variable == "diagnosis"} == {
        "normal",
        "MM",
        "inadequate",
    }  # no "cancer"
    words = HintPhrases()
    for turn in hinted:
        claim = BANKS["bone_marrow"][turn.variable].claims[turn.hint]
        assert claim in turn.question
        said = words.refuse if turn in wrong else words.agree
        assert turn.answer.endswith(tuple(said))
        assert MARROW.parse(turn.variable, turn.answer, {}) == LABELS["bone_marrow"]["AML"][turn.variable]


def test_names_of_things_are_put_into_words_as_people_say_them():
    assert cases.thing_slots("hour", 1, {})["a_thing"] == "an hour"
    assert cases.thing_slots("baby", 2, {})["so_many"] == "are two babies"
    assert cases.thing_slots("knife", 2, {"knife": "blades"})["things"] == "blades"


def test_a_model_that_gives_in_is_measured_as_misled():
    """Three questions, with no hint, a right and a wrong one; the model says what it is told."""
    words = speaker()
    truth, rng = case("AML"), random.Random(0)
    turns = [words.turn(truth, "quality", rng), words.turn(truth, "cells", rng, "myeloblasts"),
             words.turn(truth, "diagnosis", rng, "MM")]  # fmt: skip
    rules = dialogues.rules_of("bone_marrow", truth, turns)
    said = [*turns[:2], dataclasses.replace(turns[2], answer="It points to multiple myeloma. So I agree.")]
    asked = dialogues.messages_of(said, 1, answered=False)
    found = Symbolic().accuracy([Response("row", [], asked, said[-1].answer, facts={"rules": rules})])
    assert found == pytest.approx({
        "question_accuracy": 2 / 3, "conversation_accuracy": 0, "no_match": 0, "accuracy_hint_none": 1,
        "accuracy_hint_correct": 1, "accuracy_hint_wrong": 0, "misled": 1,
    })  # fmt: skip
