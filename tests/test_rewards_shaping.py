"""Fact-RLHF's terms, by the published table and numbers, in both readings of replies."""

import math

import pytest

from prefalign.config import ConfigError
from prefalign.rewards import Combined, Response, Weighted, read_rewards
from prefalign.rewards.function import Function
from prefalign.rewards.shaping import Length, MissingEos, MultipleChoice, YesNo, read_choice


def response(text="", **more):
    return Response("row", [], [], text, **more)


def correct(reward, text, answer=None, **facts):
    return reward.score([response(text, answer=answer, facts=facts)])["correct"].item()


FACT_RLHF = [
    {"name": "missing_eos"},
    {"name": "length"},
    {"name": "multiple_choice", "weight": 2.0},
    {"name": "yes_no", "weight": 2.0},
]


def test_an_unfinished_wrong_answer_of_448_tokens_loses_13():
    wrong = response("A. a cat", answer="B", tokens=448, finished=False)
    found = read_rewards(FACT_RLHF).score([wrong])
    assert found["missing_eos/penalty"].item() == -8
    assert found["length/penalty"].item() == -5
    assert found["multiple_choice/correct"].item() == 0
    assert found["total"].item() == -13


def test_the_right_option_is_worth_2_and_100_tokens_cost_1_1():
    found = read_rewards(FACT_RLHF).score([response("B", answer="B", tokens=100)])
    assert found["total"].item() == pytest.approx(2 - 1.116, abs=1e-3)


def test_replace_decides_alone_even_where_another_reward_has_no_score(tmp_path):
    (tmp_path / "seven.py").write_text("def seven(responses):\n    return [7.0, 7.0, None, None]\n")
    four = [response(finished=finished) for finished in (True, False, True, False)]
    entries = [Weighted("f", Function(f"{tmp_path}/seven.py:seven")), Weighted("eos", MissingEos(3.0, replace=True))]
    found = Combined(entries).score(four)
    assert found["eos/penalty"].tolist() == [0, -3, 0, -3]
    assert found["total"].tolist()[:2] == [7, -3]
    assert math.isnan(found["total"][2])
    assert found["total"][3] == -3


def test_length_multiplier_of_a_row_and_unknown_length():
    reward = Length(penalty=1.0, max_tokens=10)
    rows = [response(tokens=5), response(tokens=5, facts={"length_multiplier": 0.5}), response()]
    found = reward.score(rows)["penalty"].tolist()
    assert found[:2] == [-0.5, -0.25]
    assert math.isnan(found[2])
    with pytest.raises(ValueError, match=r"response row: facts.length_multiplier is 'two'"):
        reward.score([response(tokens=1, facts={"length_multiplier": "two"})])


@pytest.mark.parametrize(
    ("text", "answer", "released", "robust"),
    [
        ("No.", "No", 0.5, 0.5),
        ("Yes, it is.", "No", -0.5, -0.5),
        ("I think so.", "No", 0, 0),
        ("Yes.", "Yes", 0, 0),
        ("No.", "Yes", 0, 0),
        ("no, there is none", "no", 0, 0.5),
        ("Nothing is there.", "No", 0.5, 0),
        ("Not sure, I cannot tell.", "No", 0.5, 0),
        ("There is no dog.", "No, there is no dog.", 0, 0.5),
        ("No.", "A dog.", 0, 0),
        ("No.", "No smoking sign", 0, 0),
        ("No.", None, 0, 0),
    ],
)
def test_yes_no_table(text, answer, released, robust):
    assert correct(YesNo(parser="released"), text, answer) == released
    assert correct(YesNo(), text, answer) == robust


def test_yes_no_label_of_the_facts_counts_first():
    assert correct(YesNo(), "No.", "There are trees.", label="no") == 0.5
    assert correct(YesNo(), "No.", "No.", label="yes") == 0


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("B) a dog", "B"), ("B: the red one", "B"), ("**B**", "B"), ("Option B", "B"),
        ("Answer: C", "C"), ("The answer is B", "B"), ("The answer is **B**.", "B"), ("The correct answer is (B), not C.", "B"),
        ("I think the best option is D because it is red.", "D"), ("The correct option is B.", "B"), ("C, since it is blue", "C"),
        ("A is wrong. The answer is C.", "C"), ("B, not C", "B"),
        ("", None), ("A dog sits here.", None), ("The answer is a dog.", None), ("The answer is A cat", None), ("A-frame", None),
        ("Both A and B.", None), ("A, B", None), ("A. But the correct option is B.", None), ("The answer is not B.", None),
        ("Because it is red.", None), ("The answer is B, the answer is C", None), ("E.", None),
    ],
)  # fmt: skip
def test_options_that_replies_take(text, option):
    assert read_choice(text, "ABCD") == option


@pytest.mark.parametrize(
    ("text", "answer", "released", "robust"),
    [
        ("B. a dog", "B", 1, 1),
        ("The correct option is B.", "B. a dog", 1, 1),
        ("B", "(B)", 0, 1),
        ("The answer is B.", "B", 0, 1),
        ("B. No: the correct option is C.", "C", 1, 0),
        ("C.", "B", 0, 0),
        ("B.", "A dog", 0, 0),
        ("B.", None, 0, 0),
    ],
)
def test_multiple_choice_in_both_readings(text, answer, released, robust):
    assert correct(MultipleChoice(parser="released"), text, answer) == released
    assert correct(MultipleChoice(), text, answer) == robust


def test_choice_of_the_facts():
    assert correct(MultipleChoice(), "C", "a dog", choice="C") == 1
    assert correct(MultipleChoice(options="ABCDE"), "E", choice="E") == 1
    with pytest.raises(ValueError, match=r"facts.choice is 'E'.*A, B, C, D"):
        correct(MultipleChoice(), "E", choice="E")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "missing_eos", "penalty": -8.0}, "penalty is -8.0, and it is what a response loses"),
        ({"name": "length", "penalty": 0.0}, "penalty is 0.0"),
        ({"name": "length", "max_tokens": 0}, "max_tokens is 0"),
        ({"name": "multiple_choice", "options": "abcd"}, "options is 'abcd'"),
        ({"name": "multiple_choice", "options": "AAB"}, "options is 'AAB'"),
        ({"name": "yes_no", "parser": "strict"}, "parser: .*'robust' or 'released'"),
    ],
)
def test_settings_that_cannot_be(entry, message):
    with pytest.raises(ConfigError, match=message):
        read_rewards([entry])
