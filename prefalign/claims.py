"""Divide and conquer: an answer's claims, a yes/no question for each, and how sure a labeller is of yes and of no.

Equations: of a claim, p_yes = sum over spellings of "yes" of p(the reply begins with it | pictures, question), p_no likewise; it
is undecided if p_yes + p_no is below a floor, else accepted if p_yes > p_no, else rejected (on a tie too). Of an answer,
score = -(number of rejected claims), or that over the number of decided ones (`per_claim`).

Source: RLAIF-V, arXiv 2405.17220, and its released pipeline. Differs from the release: any instruct model divides and asks, with
words of our own (there two models tuned for it); lists are read line by line or not at all (there every line loses its first
character); claims and questions are paired only where they are equally many (there cut to the shorter list); equal claims count
once; long answers are left out instead of cut to 300 words; probabilities are plain ones (there after a repetition penalty); a
labeller that says neither yes nor no decides nothing.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefalign.engines import Engine, Request, Sampling
from prefalign.evidence import ClaimConfig
from prefalign.judge import transcript, wording_version
from prefalign.records import Message, user_message
from prefalign.text import normalised

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)
FAILED = "generation_failed"
_BULLET = re.compile(r"\s*(?:[-*\u2022]|\d{1,3}[.)])\s+(\S.*?)\s*")
_NOTHING = re.compile(r"\W*(?:none|no claims)\W*", re.IGNORECASE)
_NEGATED = re.compile(
    r"\b(?:no|not|none|nothing|nobody|never|neither|nor|without|cannot)\b|n['\u2019]t\b", re.IGNORECASE
)


def dividing_prompt(conversation: str, answer: str) -> str:
    """What a model is asked to list the claims of an answer."""
    return (
        "Here are a conversation about a picture and the last answer in it. List every single thing that the answer states about "
        "the picture.\n"
        '- One statement on each line, and each line begins with "- ".\n'
        "- Each statement is a whole sentence that can be understood alone: name things, do not write it, they or this.\n"
        "- State what the answer states, nothing more and nothing less: keep its details, its tense and its negations, also "
        "where it is wrong. Split a sentence that states several things.\n"
        "- Leave out opinions, moods, guesses, advice and what does not concern the picture.\n"
        "- If nothing is left, reply with the one word NONE.\n\n"
        f"Conversation:\n{conversation}\n\nAnswer:\n{answer.strip()}\n\nReply with the list and nothing else."
    )


def asking_prompt(claims: Sequence[str]) -> str:
    """What a model is asked to turn claims into questions."""
    return (
        f"Here are {len(claims)} statements about a picture. Turn each into one question that is answered with yes if the "
        "statement is true, and with no if it is false. Keep its details, its tense and its negations. Give the questions in the "
        f'same order, one on each line, {len(claims)} in all; each line begins with "- ". Reply with the list and nothing else.'
        "\n\n" + "\n".join(f"- {claim}" for claim in claims)
    )


WORDING = wording_version("claims", dividing_prompt("", ""), asking_prompt([""]))


def read_list(text: str) -> list[str] | None:
    """The entries of a reply that is a list, one on each line after `-`, `*`, a bullet or a number.

    A first line that ends in a colon may announce the list; the word NONE is an empty one.

    Returns:
        The entries; None if any other line is not an entry, or there is none.

    Example:
        >>> read_list("Here they are:\\n- A cat sits.\\n2. It is red.")
        ['A cat sits.', 'It is red.']
        >>> read_list("- A cat sits.\\nIt is red.") is None
        True
    """
    if _NOTHING.fullmatch(text):
        return []
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].rstrip().endswith(":") and not _BULLET.fullmatch(lines[0]):
        lines = lines[1:]
    entries = [_BULLET.fullmatch(line) for line in lines]
    return [entry[1] for entry in entries if entry] if entries and all(entries) else None


@dataclass
class Rules:
    """Claims and questions by patterns, for answers that are all built alike.

    Attributes:
        patterns: regular expressions; every match in an answer is a claim, its named groups fill the templates.
        claim: the claim. A template's `{name}` begins in lower case, its `{Name}` with a capital, whatever the group is called.
        question: what the labeller is asked.
    """

    patterns: list[str] = field(default_factory=lambda: [r"(?P<claim>[^.!?]+[.!?])"])
    claim: str = "{Claim}"
    question: str = 'Is this statement true of the picture? "{Claim}"'

    def __post_init__(self) -> None:
        for filling in (
            dict.fromkeys(_names(re.compile(pattern)), "") for pattern in ClaimConfig(self.patterns).patterns
        ):
            for name, template in (("claim", self.claim), ("question", self.question)):
                try:
                    template.format_map(filling)
                except (KeyError, ValueError, IndexError) as error:
                    raise ValueError(
                        f"rules.{name} is {template!r}, and a pattern has no group for {error}. Its groups give "
                        f"{', '.join(sorted(filling))}: name these in braces."
                    ) from None

    def of(self, answer: str) -> list[tuple[str, str]]:
        """(claim, question) of each match, pattern by pattern."""
        found = ClaimConfig(self.patterns).of(answer)
        return [(self.claim.format_map(filling), self.question.format_map(filling)) for filling in found]


def _names(pattern: re.Pattern[str]) -> list[str]:
    return [name for group in pattern.groupindex for name in (group.lower(), group.capitalize())]


@dataclass
class ListSampling(Sampling):
    """`Sampling` with the published temperature and top-p (there at most 256 tokens)."""

    max_new_tokens: int = 1024
    temperature: float = 0.2
    top_p: float = 0.9


@dataclass
class DivideConfig:
    """How an answer becomes claims and questions.

    Attributes:
        by: `model` asks one, `rules` takes patterns.
        rules: the patterns.
        sampling: how the model's lists are drawn.
        attempts: how often a list is asked for until one can be read.
        max_words: an answer of more words is not judged; 0: no limit.
        negated: `ask` about claims with a negation too, where a yes confirms it and labellers are weak; `leave_out` does not
            count them.
    """

    by: Literal["model", "rules"] = "model"
    rules: Rules = field(default_factory=Rules)
    sampling: ListSampling = field(default_factory=ListSampling)
    attempts: int = 3
    max_words: int = 2000
    negated: Literal["ask", "leave_out"] = "ask"

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.max_words < 0:
            raise ValueError(
                f"divide.attempts is {self.attempts} and divide.max_words {self.max_words}: a list is asked for at least once, "
                "and the limit is a number of words, or 0 for none."
            )


@dataclass
class ConquerConfig:
    """How the labeller is asked, and what its reply is read from.

    Attributes:
        yes: spellings of yes that a reply may begin with; the probabilities of their first tokens are added up.
        no: spellings of no.
        suffix: what follows every question.
        least_mass: a claim is undecided if p_yes + p_no is below this; 0: none is.
    """

    yes: list[str] = field(default_factory=lambda: ["yes", "Yes"])
    no: list[str] = field(default_factory=lambda: ["no", "No"])
    suffix: str = "Please answer yes or no."
    least_mass: float = 0.5

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


@dataclass
class Answer:
    """An answer to judge: what it answers (up to the user turn), its text, and the decoded pictures."""

    id: str
    messages: list[Message]
    text: str
    images: Sequence[Image.Image]


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
            questions), `undecided` (all claims) or `generation_failed`.
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
        found = self._divided(answers)
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
        if all(one == "undecided" for one in judged.verdicts):
            judged.reason = "undecided"

    def _divided(self, answers: Sequence[Answer]) -> list[Judgement]:
        """Claims and questions of each answer, or why there are none."""
        limit = self.divide.max_words
        found = [Judgement(reason="too_long" if limit and len(a.text.split()) > limit else None) for a in answers]
        short = [number for number, judged in enumerate(found) if judged.reason is None]
        if self.divide.by == "rules":
            for number in short:
                pairs = dict(self.divide.rules.of(answers[number].text))
                self._claim(found[number], list(pairs))
                found[number].questions = [pairs[claim] for claim in found[number].claims]
            return found
        told = {number: transcript(answers[number].messages) for number in short}
        prompts = {number: dividing_prompt(told[number], answers[number].text) for number in short}
        lists = self._lists(answers, found, "claims", prompts, {})
        for number in short:
            if found[number].reason is None:
                self._claim(found[number], lists[number])
        prompts = {number: asking_prompt(found[number].claims) for number in short if found[number].reason is None}
        counts = {number: len(found[number].claims) for number in prompts}
        for number, questions in self._lists(answers, found, "questions", prompts, counts).items():
            found[number].questions = questions
        return found

    def _claim(self, judged: Judgement, claims: Sequence[str]) -> None:
        first: dict[str, str] = {}
        for claim in claims:
            first.setdefault(normalised(claim), claim)
        distinct = list(first.values())
        kept = [claim for claim in distinct if self.divide.negated == "ask" or not _NEGATED.search(claim)]
        judged.claims, judged.left_out = kept, len(distinct) - len(kept)
        if not kept:
            judged.reason = "no_claims"

    def _lists(
        self,
        answers: Sequence[Answer],
        found: list[Judgement],
        what: str,
        prompts: dict[int, str],
        counts: dict[int, int],
    ) -> dict[int, list[str]]:
        """By number of the answer, the list that the splitter gave; where none is of use, `found` gets the reason.

        A list is asked for again while it cannot be read, or has not as many entries as `counts` wants. If that is how it ends,
        and a request failed on the way, that is the reason: one try more could have given the list.
        """
        assert self.splitter is not None
        lists: dict[int, list[str]] = {}
        errors: dict[int, str] = {}

        def missing() -> list[int]:
            fit = {number for number, known in lists.items() if len(known) == counts.get(number, len(known))}
            return [number for number in prompts if number not in fit]

        for attempt in range(self.divide.attempts):
            if not (left := missing()):
                break
            requests = [
                Request(f"{answers[number].id}/{what}/{attempt}", [user_message(prompts[number])], [], seed=self.seed)
                for number in left
            ]
            replies = self.splitter.generate(requests, self.divide.sampling)
            if lost := [reply.error for reply in replies if reply.error is not None]:
                logger.warning("%d of %d requests to the splitter failed (first: %s).", len(lost), len(left), lost[0])
            for number, reply in zip(left, replies, strict=True):
                if reply.error is not None:
                    errors[number] = f"the splitter could not be asked for the list of {what}: {reply.error}"
                if reply.finish_reason == "stop" and (entries := read_list(reply.text)) is not None:
                    lists[number] = entries
        for number in missing():
            unfit = "unequal_counts" if number in lists else "unreadable_list"
            found[number].reason, found[number].error = FAILED if number in errors else unfit, errors.get(number)
        return lists


def _key(answer: Answer, question: str) -> tuple[Any, ...]:
    return (question, *(id(image) for image in answer.images))


def as_meta(judged: Judgement) -> dict[str, Any]:
    """A judgement as JSON-able values, probabilities to six digits; without its error, which is no part of it."""
    digits = {name: [round(value, 6) for value in getattr(judged, name)] for name in ("p_yes", "p_no")}
    return {name: value for name, value in {**asdict(judged), **digits}.items() if name != "error"}
