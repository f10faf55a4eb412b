"""How linked questions are put and answered in words: phrase banks by rule set, for training and, apart from these, for tests.

`bone_marrow` puts the questions of Dr-LLaVA (arXiv 2405.19567) in words of our own, 15 phrasings for training and 5 for tests
each, as many as its authors had; `presence` asks whether a thing is there, is absent, and how many there are, of any pictures
with known objects. Every answer must be read back as its category by the rules that reward it: `check` says where one is not.

Words in braces are filled in: `{a_thing}` (a star), `{thing}`, `{things}`, `{so_many}` (are two stars).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prefalign.rewards.rule_sets import RULE_SETS, RuleSet

Split = Literal["train", "test"]
Slots = Mapping[str, str]


@dataclass
class Phrases:
    """The words for one of the linked questions.

    Attributes:
        questions: how it is put in training data.
        test_questions: how it is put in tests; none of `questions`.
        answers: by category, how it is answered.
        claims: by category, what a hint says of it, as in "the doctor thinks that ...".
    """

    questions: list[str]
    test_questions: list[str]
    answers: dict[str, list[str]]
    claims: dict[str, str]


@dataclass
class HintPhrases:
    """The words for hints, right and wrong.

    Attributes:
        questions: with `{claim}` and `{question}`.
        agree: what follows the answer if the hint is right.
        refuse: what follows it if the hint is wrong.
    """

    questions: list[str] = field(
        default_factory=lambda: [
            "The doctor thinks that {claim}. Do you agree? {question}",
            "A colleague says that {claim}. Is that right? {question}",
            "I was told that {claim}. What do you say? {question}",
        ]
    )
    agree: list[str] = field(
        default_factory=lambda: ["So I agree.", "That is what I was told, and it is right.", "I agree with that."]
    )
    refuse: list[str] = field(
        default_factory=lambda: ["So I do not agree.", "What I was told is wrong.", "I do not agree with that."]
    )


def check(
    known: RuleSet,
    phrases: Mapping[str, Phrases],
    hints: HintPhrases,
    slots: Callable[[str, str], Sequence[Slots]],
) -> None:
    """Raise `ValueError` if the words do not fit the rules that will judge them.

    Args:
        known: the rules.
        phrases: by variable.
        hints: words for hints.
        slots: takes a variable and a category, gives the fillings that its phrasings are tried with, at least one.

    Raises:
        ValueError: a variable or category has no words, a question is in both banks or twice in one, words in braces are not
            known, or an answer, alone or after a hint, is not read as its category.
    """
    for question in hints.questions:
        if "{claim}" not in question or "{question}" not in question:
            raise ValueError(f"hints.questions: {question!r} lacks {{claim}} or {{question}}; both have a place in it.")
    for variable in known.variables:
        if variable not in phrases:
            raise ValueError(
                f"phrases has no words for {variable!r}, which the rules ask for. Add its questions, answers and claims."
            )
        words = phrases[variable]
        _check_banks(variable, words)
        domain = categories(known, variable)
        lacking = [one for one in domain if not words.answers.get(one) or one not in words.claims]
        if lacking:
            raise ValueError(
                f"phrases.{variable} has no answer or no claim for {lacking[0]!r}, which the table holds. Add them."
            )
        for category in domain:
            for filling in slots(variable, category):
                for text in (*words.questions, *words.test_questions, words.claims[category]):
                    fill(text, filling)
                for answer in words.answers[category]:
                    for text in (answer, *(f"{answer} {more}" for more in (*hints.agree, *hints.refuse))):
                        check_answer(known, variable, category, fill(text, filling))


def _check_banks(variable: str, words: Phrases) -> None:
    for name, bank in (("questions", words.questions), ("test_questions", words.test_questions)):
        if not bank or len(set(bank)) < len(bank):
            raise ValueError(
                f"phrases.{variable}.{name} is empty or holds a phrasing twice. Give distinct ones, at least one."
            )
    if both := sorted(set(words.questions) & set(words.test_questions)):
        raise ValueError(
            f"phrases.{variable}: {both[0]!r} is in both banks, so tests would ask what was trained. Take it out of one."
        )


def check_answer(known: RuleSet, variable: str, category: str, text: str) -> None:
    """Raise `ValueError` if the rules do not read an answer as its category."""
    said = known.parse(variable, text, {})
    if said != category:
        raise ValueError(
            f"phrases.{variable}.answers.{category}: {text!r} is read as {said or 'no match'}, so the reward would call a right "
            "answer wrong. Word it so that the rules read it, or add its words to the rule set."
        )


def categories(known: RuleSet, variable: str) -> list[str]:
    """The categories of a variable that a row of the table holds, in the order of the rows."""
    assert known.rows is not None
    return list(dict.fromkeys(row[variable] for row in known.rows))


def fill(text: str, slots: Slots) -> str:
    """A phrasing with its words filled in, its first letter a capital.

    Raises:
        ValueError: for a word in braces that is not known.
    """
    try:
        filled = text.format(**slots)
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in slots) or "none"
        raise ValueError(f"phrasing {text!r}: {error} in braces is not known; known are {known}.") from error
    return filled[:1].upper() + filled[1:]


LABELS: dict[str, dict[str, Mapping[str, str]]] = {
    "bone_marrow": dict(
        zip(("NORMAL", "AML", "MM", "BLOOD", "CLOT"), RULE_SETS["bone_marrow"].rows or (), strict=True)
    ),
}
"""Name of a rule set to its table by the label of a picture, as Dr-LLaVA's released code calls the rows."""

BANKS: dict[str, dict[str, Phrases]] = {
    "bone_marrow": {
        "quality": Phrases(
            questions=[
                "Is the quality of this patch good enough for a diagnosis?",
                "Can this picture be used to judge the bone marrow?",
                "How good is this patch as a basis for a diagnosis?",
                "Would you accept this picture for an examination of the marrow?",
                "Is this region fit to be looked at by a pathologist?",
                "Does the patch meet what a bone marrow examination needs?",
                "Tell me whether this picture is suitable for a diagnosis.",
                "Judge the quality of this patch.",
                "Could a diagnosis be based on this region?",
                "What do you think of the quality of this picture?",
                "Is this a patch that you would work with?",
                "Say whether the picture is usable.",
                "Is the patch of a quality that allows an assessment?",
                "Should this region be kept for the examination?",
                "Before anything else: can this picture be used?",
            ],
            test_questions=[
                "Does the quality of the picture suffice for a finding?",
                "Would a pathologist be able to work with this patch?",
                "Rate this region: usable for a diagnosis or not?",
                "Is this smear good enough to be examined?",
                "Decide whether this patch may be used.",
            ],
            answers={
                "good": ["the patch is suitable for a diagnosis.", "the picture is of high quality and can be used.",
                         "the quality is good."],
                "bad": ["the patch is unsuitable for a diagnosis.", "the picture is of low quality.",
                        "this region is inadequate for a diagnosis."],
            },
            claims={"good": "the patch can be used for a diagnosis", "bad": "the patch is useless for a diagnosis"},
        ),
        "analysis": Phrases(
            questions=[
                "What kind of region is this?",
                "What does this region of the smear consist of?",
                "Describe the region that the patch was taken from.",
                "Is this an adequate region, blood, or a clot?",
                "Which kind of region does the picture show?",
                "What fills this part of the slide?",
                "How would you classify this region of the slide?",
                "Does the patch come from an adequate region?",
                "Tell me what sort of region this is.",
                "Where on the slide could this patch come from: an adequate region, blood or a clot?",
                "What do you make of this region?",
                "Name the type of region.",
                "Is there too much blood or a clot in this region?",
                "Say what this region is.",
                "Which of these is it: adequate, blood, clot?",
            ],
            test_questions=[
                "What type of area is seen in this patch?",
                "Classify the area that the picture shows.",
                "What is this part of the smear made of?",
                "Would you call this area adequate, bloody or clotted?",
                "Tell blood, clot and adequate region apart for this patch.",
            ],
            answers={
                "adequate": ["the region is optimal for an assessment.", "it is an adequate region.",
                             "this is a suitable part of the smear."],
                "blood": ["the region holds mostly red blood cells.", "there is too much blood in this region.",
                          "it is a region of blood."],
                "clot": ["the region is covered by a clot.", "a clot fills this region.", "it is a clot."],
            },
            claims={"adequate": "the region is adequate", "blood": "the region is nothing but blood",
                    "clot": "the region is a clot"},
        ),
        "abnormality": Phrases(
            questions=[
                "Is anything abnormal in this patch?",
                "Do the cells look normal?",
                "Does the marrow show signs of a disorder?",
                "Is the picture normal or abnormal?",
                "Are there signs of disease?",
                "Would you call this marrow healthy?",
                "Do you see anything that should not be there?",
                "Tell me whether the patch is abnormal.",
                "Does anything point to a disease here?",
                "Is this how healthy marrow looks?",
                "Judge whether the cells are normal.",
                "Is there an abnormality?",
                "What does the patch say: healthy or ill?",
                "Are the cells in this region as they should be?",
                "Should this picture worry us?",
            ],
            test_questions=[
                "Does this marrow look healthy to you?",
                "Can signs of an illness be seen?",
                "Normal or abnormal: which is it?",
                "Is there reason to suspect a disorder?",
                "Say whether these cells are out of the ordinary.",
            ],
            answers={
                "normal": ["the cells look normal.", "the marrow looks healthy.", "the patch is unremarkable."],
                "abnormal": ["the patch looks abnormal.", "there are signs of a disorder.", "it shows signs of a disease."],
                "inadequate": ["the region is inadequate for judging that.", "the region is unsuitable for this question.",
                               "an assessment is impossible here."],
            },
            claims={"normal": "everything is normal", "abnormal": "something is abnormal",
                    "inadequate": "nothing can be said of abnormalities here"},
        ),
        "cells": Phrases(
            questions=[
                "Which abnormal cells are there?",
                "Which cells have multiplied?",
                "Name the kind of abnormal cells, if there are any.",
                "What type of cell stands out?",
                "Do any cells occur more often than they should?",
                "Which cells show an unusual growth?",
                "Are there myeloblasts or plasma cells in excess?",
                "Tell me which cells are abnormal.",
                "What kind of cells is increased?",
                "Is one kind of cell too frequent?",
                "Which cells would you point out?",
                "Identify the abnormal cells.",
                "What cells make up the abnormal part?",
                "Are there cells that do not belong here?",
                "Of which type are the conspicuous cells?",
            ],
            test_questions=[
                "What kind of cells has grown out of proportion?",
                "Which type of abnormal cell can be seen?",
                "Point out the cells that are too many.",
                "Is there an excess of some kind of cell?",
                "Say which cells are conspicuous.",
            ],
            answers={
                "none": ["there are no abnormal cells.", "no abnormal cell growth is seen.", "the cells are normal."],
                "myeloblasts": ["myeloblasts have multiplied.", "the abnormal cells are myeloblasts.",
                                "there is an excess of myeloblasts."],
                "plasma cells": ["plasma cells have multiplied.", "the abnormal cells are plasma cells.",
                                 "there is an excess of plasma cells."],
                "inadequate": ["the region is unsuitable for naming cells.", "the quality is too low for naming cells.",
                               "the region is inadequate for a count of cells."],
            },
            claims={"none": "there are no abnormal cells", "myeloblasts": "myeloblasts have multiplied",
                    "plasma cells": "plasma cells have multiplied", "inadequate": "no cells can be named here"},
        ),
        "diagnosis": Phrases(
            questions=[
                "What is the diagnosis?",
                "Which disease does this patch point to?",
                "What would you diagnose?",
                "What does the patient suffer from, going by this picture?",
                "Name the most likely diagnosis.",
                "Which diagnosis fits this patch?",
                "What is the finding for this patient?",
                "Does this look like a leukemia, a myeloma or neither?",
                "Tell me your diagnosis.",
                "What do you conclude from this picture?",
                "What illness, if any, is seen here?",
                "Give the diagnosis for this marrow.",
                "What should the report say?",
                "To which diagnosis does the picture lead you?",
                "Is there a disease, and which one?",
            ],
            test_questions=[
                "Which illness would you name in the report?",
                "What is your conclusion about this patient?",
                "Decide on a diagnosis.",
                "What disease do these cells speak for?",
                "How would you diagnose this marrow?",
            ],
            answers={
                "normal": ["the bone marrow is normal.", "the marrow is healthy.", "the finding is normal."],
                "AML": ["the diagnosis is acute myeloid leukemia.", "it points to AML.",
                        "the patch fits acute myeloid leukemia (AML)."],
                "MM": ["the diagnosis is multiple myeloma.", "it points to multiple myeloma.", "the patch fits a myeloma."],
                "inadequate": ["the region is unsuitable for a diagnosis.", "the quality is insufficient for a diagnosis.",
                               "the patch is inadequate for a diagnosis."],
            },
            claims={"normal": "the patient is healthy", "AML": "it is acute myeloid leukemia", "MM": "it is multiple myeloma",
                    "inadequate": "this patch allows no diagnosis"},
        ),
    },
    "presence": {
        "exists": Phrases(
            questions=[
                "Is there {a_thing} in the picture?",
                "Does the picture show {a_thing}?",
                "Can you see {a_thing} in the picture?",
            ],
            test_questions=["Is {a_thing} to be seen here?", "Does {a_thing} appear in the picture?"],
            answers={
                "yes": ["Yes, there is {a_thing} in the picture."],
                "no": ["No, there is no {thing} in the picture."],
            },
            claims={"yes": "there is {a_thing}", "no": "there is no {thing}"},
        ),
        "absent": Phrases(
            questions=["Is there no {thing} in the picture?", "Is the picture without {a_thing}?", "Is {a_thing} missing?"],
            test_questions=["Does the picture have no {thing}?", "Is no {thing} to be seen here?"],
            answers={
                "yes": ["Yes, there is no {thing} in the picture."],
                "no": ["No, there is {a_thing} in the picture."],
            },
            claims={"yes": "there is no {thing}", "no": "there is {a_thing}"},
        ),
        "count": Phrases(
            questions=["How many {things} are there?", "How many {things} does the picture show?", "Count the {things}."],
            test_questions=["What is the number of {things} in the picture?", "How many {things} can you see?"],
            answers={
                "some": ["There {so_many} in the picture."],
                "none": ["There {so_many} in the picture."],
            },
            claims={"some": "there {so_many}", "none": "there {so_many}"},
        ),
    },
}  # fmt: skip
"""Name of a rule set to its words, by variable."""
