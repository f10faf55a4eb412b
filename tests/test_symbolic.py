"""Symbolic rules: the worked numbers of Dr-LLaVA's specification, both parsers, every rule set, and credit by turn."""

import itertools
import math

import pytest
import torch

from prefalign.config import ConfigError
from prefalign.records import Prompt, assistant_message, message_text, user_message
from prefalign.rewards import FactsError, Response, read_rewards
from prefalign.rewards.rule_sets import RULE_SETS, read_as_released
from prefalign.rewards.symbolic import Symbolic
from prefalign.scenes import world
from prefalign.scenes.linked import linked, rows

ORDER = ("quality", "analysis", "abnormality", "cells", "diagnosis")
AML = {"quality": "good", "analysis": "adequate", "abnormality": "abnormal", "cells": "myeloblasts", "diagnosis": "AML"}
MM = {**AML, "cells": "plasma cells", "diagnosis": "MM"}
SAYS_AML = {
    "quality": "The patch is suitable for a diagnosis.",
    "analysis": "The region is optimal.",
    "abnormality": "Yes, it shows signs of cancer.",
    "cells": "Myeloblasts have multiplied.",
    "diagnosis": "It points to acute myeloid leukemia.",
}


def conversation(says, reference, *, asked=ORDER, rules="bone_marrow", **more):
    """The response is the answer to the last question; earlier questions and answers are its messages."""
    messages = [user_message(f"{asked[0]}?", 1)]
    for before, after in itertools.pairwise(asked):
        messages += [assistant_message(says[before]), user_message(f"{after}?")]
    facts = {"rules": {"set": rules, "asked": list(asked), "reference": reference, **more}}
    return Response("row", [], messages, says[asked[-1]], facts=facts)


def scores(response, **settings):
    return {term: values.item() for term, values in Symbolic(**settings).score([response]).items()}


def test_a_perfect_conversation():
    assert scores(conversation(SAYS_AML, AML)) == {"correct": 5, "consistent": 4}


def test_the_right_row_for_another_picture_is_consistent_and_partly_right():
    assert scores(conversation(SAYS_AML, MM)) == {"correct": 3, "consistent": 4}


def test_conditional_consistency_pays_nothing_for_the_wrong_row():
    assert scores(conversation(SAYS_AML, MM), conditional=True) == {"correct": 3, "consistent": 2}
    assert scores(conversation(SAYS_AML, AML), conditional=True)["consistent"] == 4
    assert scores(conversation(SAYS_AML, MM), conditional=True, pair_scope="full_row")["consistent"] == 0


def test_five_unreadable_answers():
    says = dict.fromkeys(ORDER, "Let me think.")
    assert scores(conversation(says, AML)) == {"correct": -2.5, "consistent": 0}
    assert scores(conversation(says, AML), no_match=-1.0, inconsistent=-0.25) == {"correct": -5, "consistent": -1}


@pytest.mark.parametrize(("scope", "expected"), [("all", {0.6}), ("full_row", {0}), ("adjacent", {2, 3})])
def test_order_of_the_questions_counts_for_adjacent_pairs_only(scope, expected):
    """A wrong analysis breaks its 4 pairs of the 10; one or two of these are adjacent."""
    says = {**SAYS_AML, "analysis": "There is too much blood."}
    found = [scores(conversation(says, AML, asked=asked), pair_scope=scope) for asked in itertools.permutations(ORDER)]
    assert {round(terms["consistent"], 5) for terms in found} == expected
    assert {terms["correct"] for terms in found} == {4}


def test_full_row_and_all_of_a_perfect_conversation():
    assert scores(conversation(SAYS_AML, AML), pair_scope="all")["consistent"] == pytest.approx(1)
    assert scores(conversation(SAYS_AML, AML), pair_scope="full_row")["consistent"] == 1


def test_cancer_fits_no_row():
    says = {**SAYS_AML, "diagnosis": "It is a kind of cancer."}
    assert scores(conversation(says, AML)) == {"correct": 4, "consistent": 3}


def test_length_counts_what_differs_by_more_than_ten_characters():
    answers = {**SAYS_AML, "diagnosis": "x" * 30}
    says = {**SAYS_AML, "cells": SAYS_AML["cells"] + " Yes indeed"}  # 11 characters more
    response = conversation({**says, "diagnosis": "AML" + "." * 17}, AML, reference_answers=answers)
    assert scores(response, length=True)["length"] == pytest.approx(-1.1)
    del response.facts["rules"]["reference_answers"]["cells"]
    assert math.isnan(scores(response, length=True)["length"])


@pytest.mark.parametrize("scope", ["adjacent", "all", "full_row"])
def test_turns_add_up_to_the_conversation(scope):
    says = {**SAYS_AML, "analysis": "There is too much blood.", "cells": "Who knows."}
    response = conversation(says, AML, reference_answers=SAYS_AML)
    reward = Symbolic(pair_scope=scope, length=True)
    (turns,), whole = reward.turn_scores([response]), reward.score([response])
    assert set(turns) == set(whole) == {"correct", "consistent", "length"}
    for term, values in turns.items():
        assert values.shape == (5,)
        torch.testing.assert_close(values.sum(), whole[term][0])
    assert turns["correct"].tolist() == [1, 0, 1, -0.5, 1]


def test_consistency_belongs_to_the_later_turn():
    (turns,) = Symbolic().turn_scores([conversation(SAYS_AML, AML)])
    assert turns["consistent"].tolist() == [0, 1, 1, 1, 1]
    (turns,) = Symbolic(pair_scope="full_row").turn_scores([conversation(SAYS_AML, AML)])
    assert turns["consistent"].tolist() == [0, 0, 0, 0, 1]
    (turns,) = Symbolic(pair_scope="all").turn_scores([conversation(SAYS_AML, AML)])
    torch.testing.assert_close(turns["consistent"], torch.tensor([0, 0.1, 0.2, 0.3, 0.4]))


def test_one_question_alone_has_no_pair():
    for scope in ("adjacent", "all", "full_row"):
        one = conversation(SAYS_AML, AML, asked=["diagnosis"])
        assert scores(one, pair_scope=scope) == {"correct": 1, "consistent": 0}


def test_rows_without_rules_or_references_have_no_score():
    plain = Response("row", [], [user_message("What?")], "AML")
    partly = conversation(SAYS_AML, {"quality": "good"})
    found = Symbolic().score([plain, partly, conversation(SAYS_AML, AML)])
    assert found["correct"].isnan().tolist() == [True, True, False]
    assert found["consistent"].tolist()[1:] == [4, 4]
    assert math.isnan(found["consistent"][0])
    assert Symbolic().turn_scores([plain]) == [{}]
    assert Symbolic().score([])["correct"].shape == (0,)


def test_accuracy_by_question_and_by_conversation():
    says = {**SAYS_AML, "cells": "Who knows."}
    rows = [conversation(SAYS_AML, AML), conversation(SAYS_AML, MM), conversation(says, AML), Response("x", [], [], "")]
    assert Symbolic().accuracy(rows) == pytest.approx(
        {"question_accuracy": 12 / 15, "conversation_accuracy": 1 / 3, "no_match": 1 / 15}
    )


SENTENCES = [
    ("quality", "This patch is fit for assessing whether cancer is there.", "good", None),
    ("quality", "The sample is suitable for a diagnosis.", "good", "good"),
    ("quality", "This image is not acceptable for diagnosis.", "bad", "bad"),
    ("quality", "This segment is unsuitable.", "bad", "bad"),
    ("quality", "The image isn't of good quality.", "bad", None),
    ("quality", "Nothing here is usable.", "bad", "bad"),
    ("quality", "None of it is suitable.", "bad", "good"),
    ("quality", "Nothing is wrong, it is suitable.", "good", "good"),
    ("quality", "There is nothing wrong with this good patch.", "good", "bad"),
    ("quality", "No clot is seen in this suitable region.", "good", "good"),
    ("quality", "I am not sure.", None, "bad"),  # "no" in "not"
    ("analysis", "Many nucleated cells make this region ideal.", "adequate", None),
    ("analysis", "The region is optimal, being close to the particles.", "adequate", "adequate"),
    ("analysis", "There is neither blood nor a clot; it is adequate.", "adequate", "blood"),
    ("analysis", "Clotting with dense particles makes it unsuitable.", "clot", "clot"),
    ("analysis", "The region is near a clot.", "clot", None),
    ("analysis", "It shows blood and a clot.", None, "blood"),
    ("analysis", "There is a blood clot.", "clot", "blood"),
    ("analysis", "The patch consists of clotted blood.", "clot", "blood"),
    ("analysis", "Clots of blood cover it.", "clot", "blood"),
    ("analysis", "Coagulated blood.", "clot", "blood"),
    ("analysis", "There is no blood clot; it is optimal.", "adequate", "blood"),
    ("analysis", "The region is adequate; there are few red blood cells.", "adequate", "blood"),
    ("analysis", "There are few red blood cells.", None, "blood"),
    ("abnormality", "Yes, the image shows signs of cancer.", "abnormal", "abnormal"),
    ("abnormality", "It is free of cancer and healthy.", "normal", "abnormal"),
    ("abnormality", "No, it appears normal without irregularities.", "normal", "normal"),
    ("abnormality", "The image is not normal.", "abnormal", "normal"),
    ("abnormality", "The image is too poor in quality to look for irregularities.", "inadequate", "inadequate"),
    ("abnormality", "Nothing is abnormal.", "normal", None),
    ("abnormality", "I see nothing abnormal.", "normal", None),
    ("abnormality", "Nothing in this patch is abnormal.", "normal", None),
    ("abnormality", "No cell in this patch is abnormal.", "normal", None),
    ("abnormality", "None of the cells are abnormal.", "normal", None),
    ("abnormality", "Nowhere is it abnormal.", "normal", None),
    ("abnormality", "Nothing is normal here.", "abnormal", "normal"),
    ("abnormality", "A patch with no clots or blood is abnormal.", "abnormal", None),
    ("abnormality", "The cells are far from normal.", None, "normal"),
    ("abnormality", "The cells are anything but normal.", None, "normal"),
    ("abnormality", "Hardly anything is abnormal.", None, None),
    ("cells", "There are no plasma cells.", None, "plasma cells"),
    ("cells", "None of the cells are myeloblasts.", None, "myeloblasts"),
    ("cells", "None of the cells are abnormal.", "none", None),
    ("cells", "I see nothing unusual.", "none", "none"),
    ("cells", "Nothing but normal cells.", "none", "none"),
    ("cells", "Myeloblasts rather than plasma cells.", "myeloblasts", "plasma cells"),
    ("cells", "No abnormal cell growth is seen.", "none", "none"),
    ("cells", "The sample lacks sufficient nucleated cells.", "inadequate", None),
    ("diagnosis", "This is AML, a blood cancer.", "AML", "AML"),
    ("diagnosis", "Not AML but multiple myeloma.", "MM", "MM"),
    ("diagnosis", "Nothing points to AML.", None, "AML"),
    ("diagnosis", "There is nothing to suggest that this is AML.", None, "AML"),
    ("diagnosis", "None of the findings point to multiple myeloma.", None, "MM"),
    ("diagnosis", "Nothing but AML explains this.", "AML", "AML"),
    ("diagnosis", "AML is hardly likely.", None, "AML"),
    ("diagnosis", "A field of 5 mm is shown.", None, "MM"),
    ("diagnosis", "No signs of disease.", "normal", "inadequate"),  # any letter of "quality" counts
    ("diagnosis", "It is a kind of blood cancer.", "cancer", "cancer"),
    ("diagnosis", "Either AML or MM.", None, "MM"),
    ("diagnosis", "I am not sure; it may be AML.", None, "AML"),
]  # fmt: skip


@pytest.mark.parametrize(("variable", "text", "robust", "released"), SENTENCES)
def test_bone_marrow_in_both_readings(variable, text, robust, released):
    known = RULE_SETS["bone_marrow"]
    assert known.parse(variable, text, {}) == robust
    assert read_as_released(known.released[variable], text) == released


PRESENCE = [  # what an answer says to "is there a star?", "is there no star?" and "how many?", and the number in it
    ("There is a star in the picture.", "yes", "no", "some", None),
    ("There are stars.", "yes", "no", "some", None),
    ("There is clearly a star.", "yes", "no", "some", None),
    ("Several stars.", "yes", "no", "some", None),
    ("A single star.", "yes", "no", "some", 1),
    ("There are fifteen stars.", "yes", "no", "some", 15),
    ("Twenty-one.", "yes", "no", "some", 21),
    ("A dozen.", "yes", "no", "some", 12),
    ("Two dozen.", None, None, None, None),
    ("At least two stars.", "yes", "no", "some", None),
    ("There is no doubt that there is a star.", "yes", "no", "some", None),
    ("There is no star in the picture.", "no", "yes", "none", 0),
    ("No stars are there.", "no", "yes", "none", 0),
    ("There is not one star.", "no", "yes", "none", 0),
    ("Not a single star.", "no", "yes", "none", 0),
    ("There aren't any stars.", "no", "yes", "none", 0),
    ("I do not see a star.", "no", "yes", "none", 0),
    ("The star is missing.", "no", "yes", "none", 0),
    ("The star is not missing.", "yes", "no", None, None),
    ("The star is at the top.", "yes", "no", None, None),
    ("There is no star, but there is a circle.", "no", "yes", "none", 0),
    ("There is a circle, but no star.", None, None, None, 0),
    ("There are not two stars.", None, None, None, None),
    ("There may be a star.", None, None, None, None),
    ("I am not sure, maybe two.", None, None, None, None),
    ("There are two stars and three circles.", None, None, None, None),
    ("Yes.", "yes", "yes", None, None),
    ("No.", "no", "no", "none", 0),
    ("Yes, it is missing.", "yes", "yes", "none", 0),
    ("No, there are two stars.", "no", "no", "some", 2),
    ("Yes, there is no star.", None, "yes", "none", 0),
    ("No, there is a star.", "no", "no", "some", None),
    ("No, there is one circle and one square.", "no", "no", "some", 1),
    ("Yes or no.", None, None, None, None),
    ("It does not.", "no", None, None, None),
]


@pytest.mark.parametrize(("text", "exists", "absent", "count", "number"), PRESENCE)
def test_what_is_there_and_what_is_not(text, exists, absent, count, number):
    known = RULE_SETS["presence"]
    assert [known.parse(name, text, {}) for name in ("exists", "absent", "count")] == [exists, absent, count]
    assert RULE_SETS["count_list"].parse("count", text, {}) == (None if number is None else str(number))


@pytest.mark.parametrize(
    ("count", "number", "correct", "conditional"),
    [
        ("There are two stars.", 2, 3, 2),
        ("There are five stars.", 2, 2, 1),
        ("There are some stars.", 2, 3, 2),
        ("There are five stars.", None, 3, 2),
    ],
)
def test_a_wrong_number_of_what_is_there_is_wrong_and_agrees(count, number, correct, conditional):
    says = {"exists": "There is a star.", "absent": "There is a star.", "count": count}
    reference = {"exists": "yes", "absent": "no", "count": "some"}
    response = conversation(says, reference, asked=list(says), rules="presence", number=number)
    assert scores(response) == {"correct": correct, "consistent": 2}
    assert scores(response, conditional=True)["consistent"] == conditional
    assert scores(response, numbers=False) == {"correct": 3, "consistent": 2}
    assert Symbolic().accuracy([response])["question_accuracy"] == pytest.approx(correct / 3)


def test_the_same_sentences_of_a_picture_without_a_star():
    says = dict.fromkeys(("exists", "absent", "count"), "There is no star in the picture.")
    gone, there = {"exists": "no", "absent": "yes", "count": "none"}, {"exists": "yes", "absent": "no", "count": "some"}
    of = [conversation(says, one, asked=list(says), rules="presence", number=n) for one, n in ((gone, 0), (there, 1))]
    assert [scores(one) for one in of] == [{"correct": 3, "consistent": 2}, {"correct": 0, "consistent": 2}]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("2", r"facts.rules.number is '2'; it is how many there are, so give a whole number from 0 on"),
        (-1, r"facts.rules.number is -1; it is how many"),
        (True, r"facts.rules.number is True; it is how many"),
        (0, r"facts.rules.number is 0, and reference.count is 'some', so that no answer could be right"),
    ],
)
def test_numbers_that_cannot_be(number, message):
    says = {"exists": "Yes.", "count": "Two."}
    known = {"exists": "yes", "count": "some"}
    with pytest.raises(FactsError, match=message):
        Symbolic().score([conversation(says, known, asked=list(says), rules="existence_count", number=number)])


def test_released_reading_of_a_conversation():
    says = {**SAYS_AML, "analysis": "The region is optimal, close to the particles."}
    assert scores(conversation(says, AML), parser="released") == {"correct": 5, "consistent": 4}
    assert scores(conversation(SAYS_AML, AML), parser="released") == {"correct": 3.5, "consistent": 2}


RULES = {
    "options": {"first": {"A": "Dog", "B": "cat"}, "second": {"A": "cat", "B": "dog"}},
    "value": "red",
    "values": ["red", "blue"],
}
GENERAL = [
    ("existence_count", {"exists": "Yes.", "count": "There are three dogs."}, {"exists": "yes", "count": "some"}, 1),
    ("existence_count", {"exists": "Yes.", "count": "There are no dogs."}, {"exists": "yes", "count": "none"}, 0),
    ("existence_count", {"exists": "No, none.", "count": "0"}, {"exists": "no", "count": "none"}, 1),
    ("existence_absence", {"exists": "Yes.", "absent": "No, there is one."}, {"exists": "yes", "absent": "no"}, 1),
    ("existence_absence", {"exists": "Yes.", "absent": "Yes."}, {"exists": "yes", "absent": "yes"}, 0),
    ("attribute", {"is": "Yes.", "which": "It is red."}, {"is": "yes", "which": "yes"}, 1),
    ("attribute", {"is": "Yes.", "which": "Blue, not red."}, {"is": "yes", "which": "no"}, 0),
    ("attribute", {"is": "No.", "which": "Blue."}, {"is": "no", "which": "no"}, 1),
    ("count_list", {"count": "Three.", "list": "I see a dog, a cat, and a cow. They rest."}, {"count": "3", "list": "3"}, 1),
    ("count_list", {"count": "3", "list": "- dog\n- cat"}, {"count": "3", "list": "2"}, 0),
    ("count_list", {"count": "None.", "list": "Nothing."}, {"count": "0", "list": "0"}, 1),
    ("count_list", {"count": "2.5", "list": "There are: a dog; a cat"}, {"count": None, "list": "2"}, 0),
    ("count_list", {"count": "3 cars and 2 dogs", "list": "1. dog\n2. cat"}, {"count": None, "list": "2"}, 0),
    ("sides", {"there": "It is to the left of the dog.", "back": "On its right side."}, {"there": "left", "back": "right"}, 1),
    ("sides", {"there": "Above it.", "back": "above"}, {"there": "above", "back": "above"}, 0),
    ("sides", {"there": "Not on the left, but under it.", "back": "above"}, {"there": "below", "back": "above"}, 1),
    ("choice", {"first": "B", "second": "The answer is A."}, {"first": "cat", "second": "cat"}, 1),
    ("choice", {"first": "A.", "second": "A."}, {"first": "dog", "second": "cat"}, 0),
    ("choice", {"first": "A.", "second": "Both."}, {"first": "dog", "second": None}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "says", "parsed", "fits"), GENERAL)
def test_general_rule_sets(rules, says, parsed, fits):
    response = conversation(says, {}, asked=list(says), rules=rules, **RULES)
    assert {turn.variable: turn.said for turn in Symbolic().turns(response)} == parsed
    found = Symbolic(pair_scope="full_row").score([response])
    assert found["consistent"].item() == fits
    reference = {name: category for name, category in parsed.items() if category is not None}
    right = conversation(says, reference, asked=list(says), rules=rules, **RULES)
    if None not in parsed.values():
        assert scores(right)["correct"] == 2


def test_a_rule_set_of_a_config():
    weather = {
        "variables": {"sky": {"clear": ["clear", "cloudless"], "grey": ["gr[ae]y", "clouds?"]},
                      "rain": {"dry": ["dry"], "wet": ["rain(?:s|ing)?"]}},
        "rows": [{"sky": "clear", "rain": "dry"}, {"sky": "grey", "rain": "dry"}, {"sky": "grey", "rain": "wet"}],
    }  # fmt: skip
    rewards = read_rewards([{"name": "symbolic", "rule_sets": {"weather": weather}}])
    reference = {"sky": "clear", "rain": "dry"}
    rows = [
        conversation({"sky": "A cloudless sky.", "rain": rain}, reference, asked=["sky", "rain"], rules="weather")
        for rain in ("It is dry.", "It is raining.")
    ]
    found = rewards.score(rows)
    assert found["symbolic/correct"].tolist() == [2, 1]
    assert found["symbolic/consistent"].tolist() == [1, 0]
    assert found["total"].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rows": []}, "rule set 'mine' has rows; it consists of `variables`"),
        ({"variables": {"a": {"b": ["("]}}, "rows": [{"a": "b"}]}, r"rule set 'mine': .* is no regular expression"),
        ({"variables": {"a": {"b": ["c"]}}, "rows": [{"a": "x"}]}, r"a row has a: x, which no answer .* a \(b\)"),
        ({"variables": {"a": {"b": ["c"]}}, "rows": [{"z": "b"}]}, "a row has z: b"),
    ],
)
def test_rule_sets_that_cannot_be(entry, message):
    with pytest.raises(ConfigError, match=message):
        read_rewards([{"name": "symbolic", "rule_sets": {"mine": entry}}])


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"set": "bone_marow"}, {}, r"response row: facts.rules.set is 'bone_marow'; did you mean 'bone_marrow'\?"),
        ({"asked": ORDER[:3]}, {}, r"asked names 3 variable\(s\), and the conversation has 5 assistant turn\(s\)"),
        ({"asked": [*ORDER[:4], "diagnose"]}, {}, r"has a variable 'diagnose'; did you mean 'diagnosis'\?"),
        ({"reference": {"cell": "none"}}, {}, r"has a variable 'cell'; did you mean 'cells'\?"),
        (
            {"reference": {"cells": "plasma"}},
            {},
            r"reference.cells is 'plasma', which no answer is read as; did you mean",
        ),
        ({"set": "sides"}, {"parser": "released"}, "'sides', which the released code does not have"),
    ],
)
def test_facts_that_cannot_be(change, settings, message):
    response = conversation(SAYS_AML, AML)
    response.facts["rules"] |= change
    with pytest.raises(ValueError, match=message):
        Symbolic(**settings).score([response])


def scene_rows(answer):
    """Rows about scenes in which `answer(linked, place)` is said."""
    made = []
    for index in range(12):
        for one in linked(world.scene("test_fair", index), index):
            messages = [user_message(one.rules["questions"][0], 1)]
            for place, text in enumerate(one.rules["questions"][1:]):
                messages += [assistant_message(answer(one, place)), user_message(text)]
            made.append(Response("row", [], messages, answer(one, len(one.questions) - 1), facts={"rules": one.rules}))
    return made


def test_true_answers_about_scenes_are_right_and_fit():
    asked = scene_rows(lambda one, place: one.questions[place].answer)
    found = Symbolic().score(asked)
    assert len(asked) > 30
    assert {row.facts["rules"]["set"] for row in asked} == {"existence_count", "attribute"}
    assert {tuple(row.facts["rules"]["asked"]) for row in asked} == {
        ("exists", "count"), ("count", "exists"), ("is", "which"), ("which", "is")
    }  # fmt: skip
    assert found["correct"].tolist() == [2] * len(asked)
    assert found["consistent"].tolist() == [1] * len(asked)
    assert Symbolic().accuracy(asked) == {"question_accuracy": 1, "conversation_accuracy": 1, "no_match": 0}


def test_a_denial_of_one_of_two_linked_answers_breaks_the_pair():
    swap = {"yes": "No.", "no": "Yes."}
    asked = scene_rows(lambda one, place: swap.get(one.questions[place].label, one.questions[place].answer))
    found = Symbolic().score(asked)
    assert found["correct"].tolist() == [1] * len(asked)
    assert not found["consistent"].any()


def test_another_number_of_what_a_scene_shows_is_wrong():
    def nine(one, place):
        question = one.questions[place]
        return "Nine." if question.kind == "count" and question.label != "0" else question.answer

    asked = scene_rows(nine)
    some = [row.facts["rules"]["reference"].get("count") == "some" for row in asked]
    found = Symbolic().score(asked)
    assert any(some)
    assert found["correct"].tolist() == [1 if one else 2 for one in some]
    assert found["consistent"].tolist() == [1] * len(asked)


def test_rows_about_scenes_are_prompts():
    made = [Prompt(**row) for row in rows("test_fair", 0, 12)]
    for prompt in made:
        prompt.check()
        rules = prompt.facts["rules"]
        assert message_text(prompt.messages) == rules["questions"][0]
        whole = [*prompt.messages, assistant_message(prompt.answer), user_message(rules["questions"][1])]
        assert (
            Symbolic().turns(Response("row", [], whole, "?", facts=prompt.facts))[0].said
            == rules["reference"][rules["asked"][0]]
        )
    assert {prompt.facts["rules"]["set"] for prompt in made} == {"existence_count", "attribute"}
    assert [Prompt(**row).facts for row in rows("test_fair", 0, 12)] == [prompt.facts for prompt in made]


@pytest.mark.parametrize(
    ("rules", "reference", "message"),
    [
        (
            "count_list",
            {"count": 2},
            r"reference.count is 2, which no answer is read as; write the number as text \('2'\)",
        ),
        ("count_list", {"list": "two"}, r"reference.list is 'two', which no answer is read as; write the number"),
        (
            "existence_count",
            {"exists": "Yes"},
            r"reference.exists is 'Yes', which no answer is read as; did you mean 'yes'",
        ),
        ("existence_count", {"count": "2"}, r"reference.count is '2', which no answer is read as; .*some"),
        ("attribute", {"which": "red"}, r"reference.which is 'red', which no answer is read as; .*yes"),
        ("choice", {"first": "cow"}, r"reference.first is 'cow', which no answer is read as; .*cat"),
    ],
)
def test_references_that_no_answer_could_meet(rules, reference, message):
    says = dict.fromkeys(RULE_SETS[rules].variables, "Yes.")
    with pytest.raises(FactsError, match=message):
        Symbolic().score([conversation(says, reference, asked=list(says), rules=rules, **RULES)])


@pytest.mark.parametrize(
    ("rules", "facts", "message"),
    [
        (
            "choice",
            {},
            r"response row: facts.rules has no options.first \(text by letter, such as A\), without which 'choice'",
        ),
        ("choice", {"options": {"first": {"A": "dog"}}}, r"has no options.second"),
        ("choice", {"options": {"first": {}, "second": {}}}, r"has no options.first \(text by letter, such as A\)"),
        ("choice", {"options": {"first": {"(a)": "dog", "(b)": "cat"}}}, r"has no options.first \(text by letter"),
        ("choice", {"options": {"first": {"AB": "dog"}}}, r"has no options.first \(text by letter"),
        ("attribute", {"value": "red", "values": []}, r"has no values \(what could be named\)"),
        ("attribute", {"value": "red"}, r"response row: facts.rules has no values \(what could be named\)"),
        ("attribute", {"values": ["red"]}, r"has no value \(the one asked for\)"),
    ],
)
def test_facts_that_reading_needs(rules, facts, message):
    says = dict.fromkeys(RULE_SETS[rules].variables, "A.")
    with pytest.raises(FactsError, match=message):
        Symbolic().score([conversation(says, {}, asked=list(says), rules=rules, **facts)])
