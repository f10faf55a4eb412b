"""Divide and conquer: how sure a labeller is of yes and of no to a question for each claim of an answer.

Equations: of a claim, p_yes = sum over spellings of "yes" of p(the reply begins with it | pictures, question), p_no likewise; it
is undecided if p_yes + p_no is below a floor, else accepted if p_yes > p_no, else rejected (on a tie too). Of an answer,
score = -(number of rejected claims), or that over the number of decided ones (`per_claim`); none if too small a share of its
claims is decided, since an answer that nobody could judge would beat all that were judged.

Source: RLAIF-V, arXiv 2405.17220, and its released pipeline. Differs from the release, besides what `prefalign.dividing` says:
probabilities are plain ones (there after a repetition penalty); a labeller that says neither yes nor no decides nothing, and
an answer needs a share of decided claims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prefalign.dividing import FAILED, WORDING, Answer, DivideConfig, divide
from prefalign.engines import Engine, Request
from prefalign.records import user_message


@dataclass
class ConquerConfig:
    """How the labeller is asked, and what its reply is read from.

    Attributes:
        yes: spellings of yes that a reply may begin with; the probabilities of their first tokens are added up.
        no: spellings of no.
        suffix: what follows every question.
        least_mass: a claim is undecided if p_yes + p_no is below this; 0: none is.
        least_decided: share of an answer's claims that has to be decided for a score; 0: one claim is enough.
    """

    yes: list[str] = field(default_factory=lambda: ["yes", "Yes"])
    no: list[str] = field(default_factory=lambda: ["no", "No"])
    suffix: str = "Please answer yes or no."
    least_mass: float = 0.5
    least_decided: float = 0.5

    def __post_init__(self) -> None:
        if not self.yes or not self.no or set(self.yes) & set(self.no):
            raise ValueError(
                f"conquer.yes is {self.yes} and conquer.no {self.no}: each needs a word, and none may be in both, or it would "
                "speak for and against a claim. Give the spellings of yes and of no."
            )
        if not 0 <= self.least_mass <= 1:
            raise ValueError(
                f"conquer.least_mass is {self.least_mass}; it is a probability: 0.5 wants half of all replies to be yes or no."
            )
        if not 0 <= self.least_decided <= 1:
            raise ValueError(
                f"conquer.least_decided is {self.least_decided}; it is a share of an answer's claims: 0.5 gives a score to an "
                "answer of which half are decided."
            )


@dataclass
class Judgement:
    """The claims of an answer and what the labeller says of each; lists of one length, except where there is a `reason`.

    Attributes:
        claims: what the answer states.
        questions: what the labeller was asked.
        p_yes: probability of yes, in [0, 1].
        p_no: probability of no.
        verdicts: `accepted`, `rejected` or `undecided`.
        reason: why the answer has no score: `no_claims`, `too_long`, `unreadable_list`, `unequal_counts` (of claims and
            questions), `undecided` (too many claims) or `generation_failed`.
        error: of `generation_failed`, why splitter or labeller could not be asked; another time it may go well.
        left_out: claims with a negation that were not asked about.
    """

    claims: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    p_yes: list[float] = field(default_factory=list)
    p_no: list[float] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None
    left_out: int = 0

    def score(self, *, per_claim: bool = False) -> float | None:
        """-(number of rejected claims), if `per_claim` over the number of decided ones; None where there is a `reason`."""
        if self.reason is not None:
            return None
        rejected = self.verdicts.count("rejected")
        return (-rejected / (len(self.verdicts) - self.verdicts.count("undecided")) if per_claim else -rejected) + 0.0


def verdict(p_yes: float, p_no: float, least_mass: float = 0.5) -> str:
    """What the labeller's probabilities say of a claim.

    Example:
        >>> verdict(0.6, 0.3), verdict(0.4, 0.4), verdict(0.3, 0.1)
        ('accepted', 'rejected', 'undecided')
    """
    if p_yes + p_no < least_mass:
        return "undecided"
    return "accepted" if p_yes > p_no else "rejected"


@dataclass
class ClaimJudge:
    """Judges answers by their claims.

    Attributes:
        labeller: says yes or no; needs `first_token`.
        splitter: lists claims and questions, from text alone; not needed where rules do.
        divide: how answers become claims and questions.
        conquer: how the labeller is asked.
        seed: with an answer's id it decides the draw of its lists.
    """

    labeller: Engine
    splitter: Engine | None
    divide: DivideConfig = field(default_factory=DivideConfig)
    conquer: ConquerConfig = field(default_factory=ConquerConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.splitter is None and self.divide.by == "model":
            raise ValueError("divide.by is 'model', and no splitter is given. Name one, or set divide.by to rules.")

    @property
    def version(self) -> str:
        """Models and wording."""
        by = f"{self.splitter.fingerprint}/{WORDING}" if self.splitter and self.divide.by == "model" else "rules"
        return f"{self.labeller.fingerprint}/{by}"

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """One judgement for each answer, in order; all questions go to the labeller in one call, equal ones on a picture once."""
        divided = divide(answers, self.splitter, self.divide, seed=self.seed)
        found = [
            Judgement(one.claims, one.questions, reason=one.reason, error=one.error, left_out=one.left_out)
            for one in divided
        ]
        asked: dict[tuple[Any, ...], Request] = {}
        for answer, judged in zip(answers, found, strict=True):
            for question in judged.questions if judged.reason is None else ():
                text = f"{question} {self.conquer.suffix}".strip()
                said = [user_message(text, len(answer.images))]
                request = Request(f"{answer.id}/{len(asked)}", said, list(answer.images))
                asked.setdefault(_key(answer, question), request)
        words = [*self.conquer.yes, *self.conquer.no]
        replies = self.labeller.first_token(list(asked.values()), words) if asked else []
        told = dict(zip(asked, replies, strict=True))
        failed = {key: reply.error for key, reply in told.items() if reply.error is not None}
        for answer, judged in zip(answers, found, strict=True):
            keys = [_key(answer, question) for question in judged.questions if judged.reason is None]
            if lost := next((key for key in keys if key in failed), None):
                of = f"the labeller failed at {len(failed)} of {len(asked)} questions, {lost[0]!r} among them"
                judged.reason, judged.error = FAILED, f"{of}: {failed[lost]}"
            elif keys:
                self._label(judged, [told[key].probs for key in keys])
        return found

    def _label(self, judged: Judgement, replies: Sequence[dict[str, float]]) -> None:
        judged.p_yes = [math.fsum(reply[word] for word in self.conquer.yes) for reply in replies]
        judged.p_no = [math.fsum(reply[word] for word in self.conquer.no) for reply in replies]
        pairs = zip(judged.p_yes, judged.p_no, strict=True)
        judged.verdicts = [verdict(yes, no, self.conquer.least_mass) for yes, no in pairs]
        decided = len(judged.verdicts) - judged.verdicts.count("undecided")
        if decided < max(1.0, round(self.conquer.least_decided * len(judged.verdicts), 9)):
            judged.reason = "undecided"


def _key(answer: Answer, question: str) -> tuple[Any, ...]:
    return (question, *(id(image) for image in answer.images))


def as_meta(judged: Judgement) -> dict[str, Any]:
    """A judgement as JSON-able values, probabilities to six digits; without its error, which is no part of it."""
    digits = {name: [round(value, 6) for value in getattr(judged, name)] for name in ("p_yes", "p_no")}
    return {name: value for name, value in {**asdict(judged), **digits}.items() if name != "error"}
