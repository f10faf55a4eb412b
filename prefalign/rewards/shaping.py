"""Fact-RLHF's terms beside the reward model: no end, length, multiple choice, yes/no.

Source:
    Fact-RLHF, arXiv 2309.14525; released code `llava-rlhf/LLaVA-RLHF`, ppo_trainer.py and train_rl_model.sh.
Equation, for a response of n tokens, end of turn included, and a budget of L = 896:
    R = RM - 8 [no end] - 10 m n / L + 2 c, with c the table of `MultipleChoice` and `YesNo`, and m a multiplier of the row.
    As a list: `{name: missing_eos}`, `{name: length}`, `{name: multiple_choice, weight: 2}`, `{name: yes_no, weight: 2}`.
Differs from the authors' code:
    8 and 10 suit the scale of their reward model; give penalties in units of the deviation of a normalised one. Replies are read
    by whole words; `parser: released` reads them as the authors did ("Nothing" is a "No").

Legend of shapes: `N` responses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from prefalign.evals import yesno
from prefalign.rewards.reward import Response

if TYPE_CHECKING:
    import torch

Parser = Literal["robust", "released"]

_YES_NO_REFERENCE = re.compile(
    r"\W*(yes|no)\b\W*(?:$|(?<=[.,;:!])|(?:it|there|they|he|she|the|this|that|i|we|you)\b)", re.IGNORECASE
)


@dataclass(frozen=True)
class MissingEos:
    """A penalty for responses that ran into the length limit.

    Attributes:
        penalty: what they lose, in units of the total.
        replace: their total is `-penalty`, whatever the other rewards say (a score of a cut answer means little).
    """

    penalty: float = 8.0
    replace: bool = False

    terms: ClassVar[tuple[str, ...]] = ("penalty",)
    needs_finished: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_penalty(self.penalty)

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """`penalty` (N,): `-penalty` where a response is not finished, else 0."""
        import torch

        return {"penalty": torch.tensor([0.0 if one.finished else -self.penalty for one in responses])}


@dataclass(frozen=True)
class Length:
    """A cost for each token.

    Attributes:
        penalty: what a response of `max_tokens` loses.
        max_tokens: L, the budget that `penalty` belongs to; not a limit.
    """

    penalty: float = 10.0
    max_tokens: int = 896

    terms: ClassVar[tuple[str, ...]] = ("penalty",)

    def __post_init__(self) -> None:
        _check_penalty(self.penalty)
        if self.max_tokens < 1:
            raise ValueError(
                f"max_tokens is {self.max_tokens}; the penalty is spread over that many tokens: at least 1."
            )

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """`penalty` (N,): `-penalty * m * n / max_tokens`.

        m is `facts["length_multiplier"]`, 1 without one; NaN where a response's number of tokens is not known.
        """
        import torch

        return {"penalty": torch.tensor([self._cost(one) for one in responses])}

    def _cost(self, response: Response) -> float:
        if response.tokens is None:
            return math.nan
        multiplier = response.facts.get("length_multiplier", 1.0)
        if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)) or not math.isfinite(multiplier):
            raise ValueError(
                f"response {response.id}: facts.length_multiplier is {multiplier!r}, and the length penalty is multiplied by it. "
                "Write a number there, such as 1, or leave it out."
            )
        return -self.penalty * multiplier * response.tokens / self.max_tokens


@dataclass(frozen=True)
class MultipleChoice:
    """c = 1 for the right option of a multiple-choice question, else 0.

    The truth is `facts["choice"]`, or a reference answer that is an option ("B", "(B)", "B. a dog"); other rows score 0.

    Attributes:
        options: the letters that are options.
        parser: `robust` takes the option that a reply names at its start or as its answer, and none if these differ; `released`
            looks for "B." at the start and for "correct option is B." anywhere.
    """

    options: str = "ABCD"
    parser: Parser = "robust"

    terms: ClassVar[tuple[str, ...]] = ("correct",)

    def __post_init__(self) -> None:
        if not re.fullmatch("[A-Z]{2,}", self.options) or len(set(self.options)) < len(self.options):
            raise ValueError(f"options is {self.options!r}; write the letters of the options once each, such as ABCD.")

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """`correct` (N,): c."""
        import torch

        return {"correct": torch.tensor([self._correct(one) for one in responses])}

    def _correct(self, response: Response) -> float:
        truth = self._truth(response)
        if truth is None:
            return 0.0
        if self.parser == "released":
            text = response.text
            return float(text.startswith(f"{truth}.") or f"correct option is {truth}." in text)
        return float(read_choice(response.text, self.options) == truth)

    def _truth(self, response: Response) -> str | None:
        given = response.facts.get("choice")
        if given is None:
            found = re.match(rf"\s*\(?([{self.options}])(?:\)|\s*$|[.:])", response.answer or "")
            return found[1] if found else None
        if not isinstance(given, str) or given not in self.options or len(given) != 1:
            raise ValueError(
                f"response {response.id}: facts.choice is {given!r}, and no reply could be right. The options are "
                f"{', '.join(self.options)}: write one of them there, or set `options`."
            )
        return given


@dataclass(frozen=True)
class YesNo:
    """Fact-RLHF's c of yes/no questions, which pays for a true "no" only.

    Truth "no": 0.5 for a no, -0.5 for a yes. Truth "yes": always 0, on purpose: models say yes too often, and a reward for it
    would feed that. The truth is `facts["label"]`, or a reference answer that begins with yes or no; other rows score 0.

    Attributes:
        parser: `robust` reads replies as `evals.yesno` does; `released` goes by the letters that a reply begins with.
    """

    parser: Parser = "robust"

    terms: ClassVar[tuple[str, ...]] = ("correct",)

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """`correct` (N,): c."""
        import torch

        return {"correct": torch.tensor([self._correct(one) for one in responses])}

    def _correct(self, response: Response) -> float:
        if _yes_no_truth(response) != "no":
            return 0.0
        if self.parser == "released":
            said = "no" if response.text.startswith("No") else "yes" if response.text.startswith("Yes") else None
        else:
            said = yesno.robust(response.text)
        return {"no": 0.5, "yes": -0.5, None: 0.0}[said]


def read_choice(text: str, options: str) -> str | None:
    """The option that a reply to a multiple-choice question takes.

    Args:
        text: the reply.
        options: the letters there are.

    Returns:
        The letter; None if the reply names none, or one at its start and another as its answer.

    Example:
        >>> read_choice("The correct answer is (B), not C.", "ABCD")
        'B'
    """
    text = text.replace("*", "")
    letter = rf"\(?([{options}])(?![\w'-])\)?"
    closing = rf"(?=\s*(?:[.:;)\n]|,(?!\s*(?:and |or )?\(?[{options}]\b)|$|because\b|since\b|not\b|as\b))"
    leading = re.match(
        rf"\W*(?:(?:option|answer|choice)[:\s]+)?(?:\(([{options}])\)|([{options}])\)|{letter}{closing})", text
    )
    answer = r"\b(?i:answer|option|choice)\b(?:\s+(?i:is|would be|should be))?[:\s]+(?i:option\s+)?\W{0,2}"
    named = [
        found[1]
        for found in re.finditer(rf"{answer}{letter}(?:{closing}|(?<=\)))", text)
        if not re.search(r"\b(?i:not|wrong|incorrect)\s+(?:\w+\s+)?$", text[: found.start()])
    ]
    said = {*named, *(group for group in (leading.groups() if leading else ()) if group)}
    return said.pop() if len(said) == 1 else None


def _yes_no_truth(response: Response) -> str | None:
    label = response.facts.get("label")
    if isinstance(label, str) and label.lower() in ("yes", "no"):
        return label.lower()
    found = _YES_NO_REFERENCE.match(response.answer or "")
    return found[1].lower() if found else None


def _check_penalty(penalty: float) -> None:
    if not 0 < penalty < math.inf:
        raise ValueError(
            f"penalty is {penalty}, and it is what a response loses: a number above 0, in units of the total (the paper: 8 for a "
            "missing end, 10 for 896 tokens)."
        )
