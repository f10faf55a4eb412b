"""Answers taken apart: the claims of each, and a yes/no question for each claim, by a model or by patterns.

Source: RLAIF-V, arXiv 2405.17220, and its released pipeline. Differs from the release: any instruct model divides and asks, with
words of our own (there two models tuned for it); lists are read line by line or not at all (there every line loses its first
character); claims and questions are paired only where they are equally many (there cut to the shorter list); equal claims count
once; long answers are left out instead of cut to 300 words.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from prefalign.engines import Completion, Engine, Request, Sampling
from prefalign.evidence import ClaimConfig
from prefalign.judge import NoReply, ask_until_read, transcript, wording_version
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
class Answer:
    """An answer to judge: what it answers (up to the user turn), its text, and the decoded pictures."""

    id: str
    messages: list[Message]
    text: str
    images: Sequence[Image.Image]


@dataclass
class Divided:
    """An answer taken apart.

    Attributes:
        claims: what it states, each once.
        questions: one for each claim; none where there is a `reason`.
        reason: why it cannot be judged: `no_claims`, `too_long`, `unreadable_list`, `unequal_counts` (of claims and questions) or
            `generation_failed`.
        error: of `generation_failed`, why the splitter could not be asked.
        left_out: claims with a negation that are not asked about.
    """

    claims: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None
    left_out: int = 0


def divide(answers: Sequence[Answer], splitter: Engine | None, config: DivideConfig, *, seed: int) -> list[Divided]:
    """Take answers apart; all lists of claims are asked for in one call of the splitter, then all lists of questions.

    Args:
        answers: the answers.
        splitter: lists claims and questions, from text alone; not asked where rules do it.
        config: how.
        seed: with an answer's id it decides the draw of its lists.

    Returns:
        One for each answer, in order.
    """
    limit = config.max_words
    found = [Divided(reason="too_long" if limit and len(one.text.split()) > limit else None) for one in answers]
    ready = _without_reason(zip(answers, found, strict=True))
    if config.by == "rules" or splitter is None:
        for answer, divided in ready:
            pairs = dict(config.rules.of(answer.text))
            _keep(divided, list(pairs), config)
            divided.questions = [pairs[claim] for claim in divided.claims]
        return found
    lists = _Lists(splitter, config, seed)
    claims = lists.ask("claims", ready, lambda answer, _: dividing_prompt(transcript(answer.messages), answer.text))
    for (_, divided), entries in zip(ready, claims, strict=True):
        if entries is not None:
            _keep(divided, entries, config)
    ready = _without_reason(ready)
    asked = lists.ask("questions", ready, lambda _, divided: asking_prompt(divided.claims), one_each=True)
    for (_, divided), entries in zip(ready, asked, strict=True):
        divided.questions = entries or []
    return found


def _without_reason(pairs: Iterable[tuple[Answer, Divided]]) -> list[tuple[Answer, Divided]]:
    return [(answer, divided) for answer, divided in pairs if divided.reason is None]


def _keep(divided: Divided, claims: Sequence[str], config: DivideConfig) -> None:
    first: dict[str, str] = {}
    for claim in claims:
        first.setdefault(normalised(claim), claim)
    distinct = list(first.values())
    kept = [claim for claim in distinct if config.negated == "ask" or not _NEGATED.search(claim)]
    divided.claims, divided.left_out = kept, len(distinct) - len(kept)
    if not kept:
        divided.reason = "no_claims"


@dataclass
class _Lists:
    """Lists that a splitter is asked for."""

    splitter: Engine
    config: DivideConfig
    seed: int

    def ask(
        self,
        what: str,
        rows: Sequence[tuple[Answer, Divided]],
        prompt: Callable[[Answer, Divided], str],
        *,
        one_each: bool = False,
    ) -> list[list[str] | None]:
        """A list for each row, or None, in which case the row's `Divided` gets the reason.

        A list is asked for again while it cannot be read, or if `one_each` has not one entry for each claim. If that is how it
        ends, and a request failed on the way, that is the reason: one try more could have given the list.
        """
        prompts = [prompt(answer, divided) for answer, divided in rows]
        readable: set[int] = set()

        def put(places: list[int], attempt: int) -> list[Completion | NoReply]:
            requests = [
                Request(f"{rows[place][0].id}/{what}/{attempt}", [user_message(prompts[place])], [], seed=self.seed)
                for place in places
            ]
            replies = self.splitter.generate(requests, self.config.sampling)
            if lost := [reply.error for reply in replies if reply.error is not None]:
                logger.warning("%d of %d requests to the splitter failed (first: %s).", len(lost), len(places), lost[0])
            return [
                reply
                if reply.error is None
                else NoReply(f"the splitter could not be asked for the list of {what}: {reply.error}")
                for reply in replies
            ]

        def read(place: int, reply: Completion) -> list[str] | None:
            entries = read_list(reply.text) if reply.finish_reason == "stop" else None
            if entries is None:
                return None
            readable.add(place)
            return None if one_each and len(entries) != len(rows[place][1].claims) else entries

        lists, failed = ask_until_read(len(rows), put, read, attempts=self.config.attempts, failed_again=True)
        for place, entries in enumerate(lists):
            if entries is None:
                divided = rows[place][1]
                unfit = "unequal_counts" if place in readable else "unreadable_list"
                divided.reason, divided.error = FAILED if place in failed else unfit, failed.get(place)
        return lists
