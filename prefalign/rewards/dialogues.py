"""Linked questions about a picture whose answers are known: conversations in any order, hints, and wrong answers to them.

Source:
    Dr-LLaVA, arXiv 2405.19567; released code `AlaaLab/Dr-LLaVA`, data scripts: five questions in a random order for each picture,
    15 phrasings for training and 5 for tests, templated answers from labels, and builders for questions with a misleading hint.
Differs from the authors' code:
    Any rule set with a table. Hints are used (there a constant 0 switches them off); the right answer to a wrong one gives the
    right category and refuses. Every answer is read back by the rules that reward it. Pairs are ours.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefalign.records import Message, assistant_message, user_message
from prefalign.rewards.cases import Case
from prefalign.rewards.phrases import HintPhrases, Phrases, Split, categories, check_answer, fill
from prefalign.rewards.readings import number
from prefalign.rewards.rule_sets import RuleSet

Kind = Literal["hint", "consistent", "inconsistent"]
_ORDERS = 32  # tried until one leaves room for a wrong answer


@dataclass
class Hints:
    """How often a question comes with what somebody else thinks.

    Attributes:
        share: share of the questions with a hint.
        wrong: share of the hints that name another category than the true one; left out where there is no other.
    """

    share: float = 0.0
    wrong: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("wrong", self.wrong)):
            if not 0 <= value <= 1:
                raise ValueError(f"hints.{name} is {value}; it is a share, so give a value from 0 to 1.")


@dataclass(frozen=True)
class Turn:
    """A question with its right answer.

    Attributes:
        variable: what is asked.
        question: as it is put, with the hint.
        answer: right, and after a hint with what is to be said of it.
        hint: the category that somebody else thinks it is, or None.
    """

    variable: str
    question: str
    answer: str
    hint: str | None = None


@dataclass(frozen=True)
class WrongTurn:
    """A conversation that ends with a question, and a wrong answer to it.

    Attributes:
        turns: the conversation; the last one has the right answer.
        wrong: the wrong answer to the last question.
        category: what it says; the true one of a wrong number.
    """

    turns: list[Turn]
    wrong: str
    category: str


@dataclass(frozen=True)
class Speaker:
    """Puts questions and answers into words.

    Attributes:
        known: the rules.
        phrases: words by variable.
        hints: words for hints.
        split: which bank of questions: `train` or `test`.
    """

    known: RuleSet
    phrases: Mapping[str, Phrases]
    hints: HintPhrases
    split: Split = "train"

    def dialogue(self, case: Case, rng: random.Random, hints: Hints) -> list[Turn]:
        """All questions in an order that is drawn, some with a hint.

        A wrong hint is left out where the table has one category only for a variable.

        Raises:
            ValueError: the rules do not read an answer as its category.
        """
        turns = []
        for variable in rng.sample(list(self.known.variables), len(self.known.variables)):
            hint = None
            if rng.random() < hints.share:
                misled, others = rng.random() < hints.wrong, self.others(case, variable)
                hint = case.reference[variable] if not misled else rng.choice(others) if others else None
            turns.append(self.turn(case, variable, rng, hint))
        return turns

    def turn(self, case: Case, variable: str, rng: random.Random, hint: str | None = None) -> Turn:
        """One question with its right answer."""
        words, true = self.phrases[variable], case.reference[variable]
        bank = words.questions if self.split == "train" else words.test_questions
        question = fill(rng.choice(bank), case.words(true))
        answer = self.answer(case, variable, true, rng)
        if hint is not None:
            claim = words.claims[hint].format(**case.words(hint))
            question = rng.choice(self.hints.questions).format(claim=claim, question=question)
            answer += " " + rng.choice(self.hints.agree if hint == true else self.hints.refuse)
        check_answer(self.known, variable, true, answer)
        return Turn(variable, question, answer, hint)

    def answer(self, case: Case, variable: str, category: str, rng: random.Random) -> str:
        """An answer that says this category."""
        return fill(rng.choice(self.phrases[variable].answers[category]), case.words(category))

    def others(self, case: Case, variable: str) -> list[str]:
        """The categories that a hint or a wrong answer may name: those in the table, less the true one."""
        return [category for category in categories(self.known, variable) if category != case.reference[variable]]

    def wrong_turn(self, case: Case, kind: Kind, rng: random.Random) -> WrongTurn | None:
        """A conversation with a wrong answer at its end.

        Args:
            case: what is true.
            kind: `hint`: the question comes with a wrong hint, and the answer agrees; `consistent`: the answer fits the right
                ones before it, by some row of the table, or is a wrong number of what is there; `inconsistent`: it contradicts
                them.
            rng: draws.

        Returns:
            The conversation; None if no order was found that leaves room for such an answer.

        Raises:
            ValueError: the rules do not read an answer as its category.
        """
        if kind != "hint" and len(self.known.variables) < 2:
            return None
        for _ in range(_ORDERS):
            order = rng.sample(list(self.known.variables), len(self.known.variables))
            place = rng.randrange(len(order)) if kind == "hint" else rng.randrange(1, len(order))
            said = [(variable, case.reference[variable]) for variable in order[:place]]
            wrong = [
                category
                for category in self.others(case, order[place])
                if kind == "hint" or self.known.agree([*said, (order[place], category)]) == (kind == "consistent")
            ]
            if kind == "consistent" and order[place] == "count" and self._miscounts(case):
                wrong.append(case.reference["count"])
            if wrong:
                return self._wrong(case, order[: place + 1], rng.choice(wrong), rng, hint=kind == "hint")
        return None

    def _miscounts(self, case: Case) -> list[str]:
        """Answers about the count that say a wrong number; a phrase without one would be true."""
        if case.miscounted is None:
            return []
        texts = [fill(phrase, case.miscounted) for phrase in self.phrases["count"].answers[case.reference["count"]]]
        return [text for text in texts if number(text) not in (None, case.number)]

    def _wrong(self, case: Case, order: Sequence[str], category: str, rng: random.Random, *, hint: bool) -> WrongTurn:
        *earlier, last = order
        turns = [self.turn(case, variable, rng) for variable in earlier]
        turns.append(self.turn(case, last, rng, category if hint else None))
        if category == case.reference[last] and case.miscounted is not None:
            text = rng.choice(self._miscounts(case))
        else:
            text = self.answer(case, last, category, rng)
        if hint:
            text += " " + rng.choice(self.hints.agree)
        check_answer(self.known, last, category, text)
        return WrongTurn(turns, text, category)


def rules_of(name: str, case: Case, turns: Sequence[Turn]) -> dict[str, Any]:
    """`facts["rules"]` of a conversation, as the reward `symbolic` and the trainers of whole conversations read it."""
    counted = {} if case.number is None else {"number": case.number}
    return {
        "set": name,
        **counted,
        "asked": [turn.variable for turn in turns],
        "reference": {turn.variable: case.reference[turn.variable] for turn in turns},
        "questions": [turn.question for turn in turns],
        "reference_answers": {turn.variable: turn.answer for turn in turns},
        "hints": {turn.variable: turn.hint for turn in turns if turn.hint is not None},
    }


def messages_of(turns: Sequence[Turn], pictures: int, *, answered: bool = True) -> list[Message]:
    """A conversation, the pictures in its first question; without the last answer unless `answered`."""
    said: list[Message] = []
    for place, turn in enumerate(turns):
        said += [user_message(turn.question, 0 if place else pictures), assistant_message(turn.answer)]
    return said if answered else said[:-1]
