"""Symbolic reward: are the answers to linked questions right, and can they stand together?

Source:
    Dr-LLaVA, arXiv 2405.19567; released code `AlaaLab/Dr-LLaVA`, RewardModel_HEME.calculate_reward.
Equation, for a conversation with parsed answers c_1..c_T, references c*, and texts of len_i characters:
    correct    = sum_i [1 if c_i = c*_i, else -0.5 if c_i is no match, else 0]
    consistent = sum over consecutive questions [1 if a row of the table holds both answers, else 0]
    length     = -sum_i g(|len_i - len*_i| / 10), g(z) = z above 1, else 0
Differs from the authors' code:
    Answers are read by whole words with negation and abstention (`parser: released` reads parts of words); references are
    categories, so that an unreadable reference cannot be met by an unreadable answer; `length` measures texts, which the code
    means to do and does not. `pair_scope` and `conditional` are not in the paper.

Legend of shapes: `N` responses, `T` turns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefalign.config import nearest
from prefalign.records import message_text
from prefalign.rewards import FactsError
from prefalign.rewards.reward import Response
from prefalign.rewards.rule_sets import RULE_SETS, RuleSet, read_as_released, read_rule_set

if TYPE_CHECKING:
    import torch


@dataclass
class Turn:
    """An answer with what was asked.

    Attributes:
        variable: what was asked.
        text: the answer.
        said: its category; None: no match.
        reference: the true category; None: not known.
        hint: the category that the question said somebody else thinks it is; None: no hint.
        miscounted: the answer says another number than the row's, though the category may be right.
    """

    variable: str
    text: str
    said: str | None
    reference: str | None
    hint: str | None = None
    miscounted: bool = False

    @property
    def right(self) -> bool:
        """Whether the answer says the true category, and no wrong number."""
        return self.said is not None and self.said == self.reference and not self.miscounted

    @property
    def hinted(self) -> str:
        """`none`, `correct` or `wrong`."""
        return "none" if self.hint is None else "correct" if self.hint == self.reference else "wrong"


@dataclass
class Symbolic:
    """Rules over whole conversations: assistant turns of `messages`, and the response as the last.

    Rows name their rules in `facts["rules"]`: `set` (a key of `RULE_SETS` or of `rule_sets`), `asked` (the variable that each
    assistant turn answers, in order), `reference` (category by variable), for `length` also `reference_answers` (text by
    variable); `choice` needs `options` (text by letter, by variable), `attribute` needs `value` and `values`; where it is asked
    whether there are some, `number` is how many there are, so that "five" is wrong of two ("some" is not). `questions`, the
    user's turns in the order of `asked`, are for a trainer that draws the whole conversation; `hints`, category by variable, for
    `accuracy`. Rows come from `datagen/clinical_rules.py`, or, about the embedded world, from `prefalign.scenes.linked`.

    Attributes:
        right: weight of a right answer.
        no_match: weight of an answer that cannot be read.
        wrong: weight of another answer.
        consistent: weight of a pair of answers (with `full_row`, of all answers) that a row of the table holds.
        inconsistent: weight of one that no row holds.
        pair_scope: `adjacent` adds up the pairs of questions asked one after the other, which depends on their order; `all` is
            the mean over all pairs; `full_row` asks for a row that holds all answers.
        conditional: count only answers that are right as consistent, so that the commonest row earns nothing for other pictures.
        length: give the term `length`.
        numbers: a number that is said must be the row's `number`; false: of two, "five" is as right as "some".
        parser: `robust`, or `released` for the reading of the authors' code (`bone_marrow` only).
        rule_sets: further rule sets by name: `variables` (phrases by category, by variable) and `rows`.
    """

    right: float = 1.0
    no_match: float = -0.5
    wrong: float = 0.0
    consistent: float = 1.0
    inconsistent: float = 0.0
    pair_scope: Literal["adjacent", "all", "full_row"] = "adjacent"
    conditional: bool = False
    length: bool = False
    numbers: bool = True
    parser: Literal["robust", "released"] = "robust"
    rule_sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sets = {**RULE_SETS, **{name: read_rule_set(name, entry) for name, entry in self.rule_sets.items()}}

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms that these settings give."""
        return ("correct", "consistent", *(["length"] if self.length else []))

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """`correct`, `consistent` and with `length` also `length`, (N,): sums over turns.

        NaN where `facts` have no `rules`, and for `correct` or `length` where a turn has no reference.
        """
        import torch

        turns = self.turn_scores(responses)
        return {
            term: torch.stack([row[term].sum() if row else torch.tensor(math.nan) for row in turns])
            if turns
            else torch.zeros(0)
            for term in self.terms
        }

    def turn_scores(self, responses: Sequence[Response]) -> list[dict[str, torch.Tensor]]:
        """The same terms by turn, for a trainer that rewards each turn at its own end.

        A turn gets what its answer earns, and what it earns together with earlier ones; a full row belongs to the last turn.

        Returns:
            For each response (T,) by term; an empty mapping where `facts` have no `rules`.
        """
        return [self._by_turn(response) if "rules" in response.facts else {} for response in responses]

    def accuracy(self, responses: Sequence[Response]) -> dict[str, float]:
        """What to report beside the reward, over responses with rules; NaN without any.

        Returns:
            `question_accuracy` (share of answers that are right), `conversation_accuracy` (of conversations in which all are),
            and `no_match` (of answers that cannot be read). Where a question has a hint (`rules["hints"]`: category by variable),
            also `accuracy_hint_none`, `accuracy_hint_correct` and `accuracy_hint_wrong`, by question, and `misled`: the share of
            answers to wrong hints that say what the hint says.
        """
        rows = [self.turns(response) for response in responses if "rules" in response.facts]
        flat = [turn for row in rows for turn in row]
        found = {
            "question_accuracy": _mean([turn.right for turn in flat]),
            "conversation_accuracy": _mean([all(turn.right for turn in row) for row in rows]),
            "no_match": _mean([turn.said is None for turn in flat]),
        }
        if any(turn.hint is not None for turn in flat):
            for kind in ("none", "correct", "wrong"):
                found[f"accuracy_hint_{kind}"] = _mean([turn.right for turn in flat if turn.hinted == kind])
            found["misled"] = _mean([turn.said == turn.hint for turn in flat if turn.hinted == "wrong"])
        return found

    def turns(self, response: Response) -> list[Turn]:
        """The answers of a conversation, read.

        Raises:
            FactsError: for an unknown variable or category, facts that are missing, or other turns than were asked for.
            ValueError: for an unknown rule set.
        """
        rules, where = response.facts["rules"], f"response {response.id}: facts.rules"
        known = self._rule_set(rules, where)
        asked, reference = list(rules.get("asked") or []), dict(rules.get("reference") or {})
        strange = [name for name in (*asked, *reference) if name not in known.variables]
        if strange:
            raise FactsError(
                f"{where} has a variable {strange[0]!r}; {nearest(str(strange[0]), list(known.variables))}"
            )
        lacking = known.lacking(rules)
        if lacking is not None:
            raise FactsError(f"{where} has no {lacking}, without which {rules['set']!r} cannot read answers. Add it.")
        for name, category in reference.items():
            domain = known.domain(name, rules)
            if domain is None and not (isinstance(category, str) and category.isdigit()):
                raise FactsError(
                    f"{where}.reference.{name} is {category!r}, which no answer is read as; write the number as text ('2')."
                )
            if domain is not None and category not in domain:
                raise FactsError(
                    f"{where}.reference.{name} is {category!r}, which no answer is read as; {nearest(str(category), domain)}"
                )
        _check_number(rules, reference, where)
        texts = [message_text([turn]) for turn in response.messages if turn["role"] == "assistant"] + [response.text]
        if len(texts) != len(asked):
            raise FactsError(
                f"{where}.asked names {len(asked)} variable(s), and the conversation has {len(texts)} assistant turn(s), the "
                "response included, so that answers would be read as answers to other questions. Name one variable for each turn."
            )
        return [
            Turn(
                name,
                text,
                self._parse(known, name, text, rules),
                reference.get(name),
                (rules.get("hints") or {}).get(name),
                self.numbers and known.miscounts(name, text, rules),
            )
            for name, text in zip(asked, texts, strict=True)
        ]

    def _rule_set(self, rules: Mapping[str, Any], where: str) -> RuleSet:
        name = rules.get("set")
        if name not in self._sets:
            raise ValueError(f"{where}.set is {name!r}; {nearest(str(name), list(self._sets))}")
        if self.parser == "released" and not self._sets[name].released:
            raise ValueError(f"{where}.set is {name!r}, which the released code does not have. Set `parser` to robust.")
        return self._sets[name]

    def _parse(self, known: RuleSet, name: str, text: str, rules: Mapping[str, Any]) -> str | None:
        return (
            read_as_released(known.released[name], text)
            if self.parser == "released"
            else known.parse(name, text, rules)
        )

    def _by_turn(self, response: Response) -> dict[str, torch.Tensor]:
        import torch

        rules = response.facts["rules"]
        turns = self.turns(response)
        found = {
            "correct": torch.tensor([self._correct(turn) for turn in turns]),
            "consistent": torch.tensor(self._consistent(turns, self._rule_set(rules, ""))),
        }
        if self.length:
            answers = rules.get("reference_answers") or {}
            found["length"] = torch.tensor([_length_cost(turn.text, answers.get(turn.variable)) for turn in turns])
        return found

    def _correct(self, turn: Turn) -> float:
        if turn.reference is None:
            return math.nan
        if turn.said is None:
            return self.no_match
        return self.right if turn.right else self.wrong

    def _consistent(self, turns: Sequence[Turn], known: RuleSet) -> list[float]:
        """By turn, what it earns together with earlier ones."""
        earned = [0.0] * len(turns)
        if self.pair_scope == "full_row":
            groups = [tuple(range(len(turns)))] if len(turns) > 1 else []
        elif self.pair_scope == "all":
            groups = list(itertools.combinations(range(len(turns)), 2))
        else:
            groups = [(place - 1, place) for place in range(1, len(turns))]
        share = len(groups) if self.pair_scope == "all" else 1
        for group in groups:
            fits = known.agree([(turns[place].variable, turns[place].said) for place in group])
            if self.conditional:
                fits = fits and all(turns[place].right for place in group)
            earned[group[-1]] += (self.consistent if fits else self.inconsistent) / share
        return earned


def _check_number(rules: Mapping[str, Any], reference: Mapping[str, str], where: str) -> None:
    number = rules.get("number")
    if number is None:
        return
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise FactsError(f"{where}.number is {number!r}; it is how many there are, so give a whole number from 0 on.")
    if reference.get("count") == ("some" if number == 0 else "none"):
        raise FactsError(
            f"{where}.number is {number}, and reference.count is {reference['count']!r}, so that no answer could be right. "
            "Correct one of them."
        )


def _length_cost(text: str, reference: str | None) -> float:
    if reference is None:
        return math.nan
    excess = abs(len(text.strip()) - len(reference.strip())) / 10
    return -excess if excess > 1 else 0.0


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan
