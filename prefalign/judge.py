"""Ask a model for a judgement: what it is asked, how its replies are read, and the replies kept on disk.

A reply is JSON or it counts as missing; nothing is guessed. An unreadable reply is asked for twice more. A request that got no
reply at all has failed, which says nothing of what was to be judged: it is told apart. Replies are kept by model, prompt,
pictures and sampling, so that a rerun asks nothing but what failed and what was given up as unreadable.

Sources: attribute scores 0 to 4 as in HelpSteer and arXiv 2402.10884; pairwise criteria as in arXiv 2407.02477, section 3. The
wording is ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefalign.engines import Engine, Request, Sampling
from prefalign.images import EncodedImage, ImageError, open_image, pixels_sha256, sha256
from prefalign.records import Message, canonical_json, message_text, user_message
from prefalign.replies import Replies
from prefalign.text import json_objects

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Reply = TypeVar("Reply")

RUBRIC = {
    "helpfulness": (
        "does the answer serve the request?",
        "of no use, or about something else",
        "serves a part of it, or takes some work to use",
        "all that was asked for, ready to use",
    ),
    "correctness": (
        "are its statements true and complete?",
        "mostly false, or built on something that is not there",
        "true in the main, with a false or missing point",
        "nothing false, nothing missing",
    ),
    "coherence": (
        "is it clear, and in agreement with itself?",
        "hard to follow, or contradicts itself",
        "can be followed, with a jump or a repetition",
        "clear throughout",
    ),
    "complexity": (
        "how much knowledge or reasoning does it show?",
        "anyone could have written it at a glance",
        "some thought or background",
        "the reasoning of an expert",
    ),
    "verbosity": (
        "how much detail does it give for what was asked?",
        "as short as it can be",
        "about as long as expected",
        "far more than was asked",
    ),
}
"""Attribute to what is asked, and what 0, 2 and 4 mean."""

CRITERIA = """\
First compare what is false: things, colours, numbers, positions or relations that are not so. The answer with fewer of these
is better. If they are equal in that, the more helpful one is better: it answers what was asked, with details that are right and
exact. A longer answer is not better for being longer, and vague words count for nothing."""

REMINDER = "\n\nYour last reply could not be read. Reply with the JSON object and nothing else."


def grading_prompt(
    conversation: str, response: str, attributes: Sequence[str], known: str = "", *, pictures: bool
) -> str:
    """What a judge is asked to score one response by attributes, in the order given."""
    lines = []
    for name in attributes:
        question, low, middle, high = RUBRIC[name]
        lines.append(f"- {name}: {question} 0: {low}. 2: {middle}. 4: {high}.")
    form = ", ".join(f'"{name}": <0-4>' for name in attributes)
    return (
        f"Grade the last answer of a conversation{' about the picture shown' if pictures else ''}. Give a whole number "
        "from 0 to 4 for each attribute; 1 and 3 lie between what is described.\n\n" + "\n".join(lines) + f"\n\n{known}"
        f"Conversation:\n{conversation}\n\nAnswer to grade:\n{response.strip()}\n\n"
        f"Reply with one JSON object and nothing else: {{{form}}}"
    )


def comparison_prompt(conversation: str, first: str, second: str, known: str = "", *, pictures: bool) -> str:
    """What a judge is asked to compare two responses, called A and B."""
    return (
        f"Compare two answers to the end of a conversation{' about the picture shown' if pictures else ''}.\n"
        f"{CRITERIA}\n\n{known}"
        f"Conversation:\n{conversation}\n\nAnswer A:\n{first.strip()}\n\nAnswer B:\n{second.strip()}\n\n"
        'Reply with one JSON object and nothing else: {"reason": "<one sentence>", "better": "<A, B or tie>", '
        '"confidence": <0-100>}'
    )


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as text, a line for each turn."""
    names = {"user": "User", "assistant": "Assistant", "system": "System"}
    return "\n".join(f"{names.get(turn['role'], turn['role'])}: {message_text([turn]).strip()}" for turn in messages)


def known_text(facts: Mapping[str, Any], answer: str | None = None) -> str:
    """What is known of the pictures, as lines for a prompt: captions, rationales, objects, reference answer; "" without any."""
    pictures = facts.get("pictures") or [facts]
    lines = []
    for number, known in enumerate(pictures, 1):
        start = f"- picture {number}: " if len(pictures) > 1 else "- "
        for key in ("captions", "rationales"):
            told = known.get(key) or []
            lines += [start + line for line in ([told] if isinstance(told, str) else told) if isinstance(line, str)]
        if things := [_thing_line(thing) for thing in known.get("objects") or []]:
            lines.append(f"{start}objects: {'; '.join(things)}")
    if answer:
        lines.append(f"- a correct answer: {answer.strip()}")
    return "What is known of the picture:\n" + "\n".join(lines) + "\n\n" if lines else ""


def read_grades(text: str, attributes: Sequence[str]) -> dict[str, int] | None:
    """The scores in a reply.

    Args:
        text: the reply: a JSON object, alone, in a code fence or among words.
        attributes: the names it must hold; others are left out.

    Returns:
        A whole number from 0 to 4 by attribute; None if the reply holds no such object, or several that differ.
    """
    found = [
        {name: entry[name] for name in attributes}
        for entry in json_objects(text)
        if all(
            isinstance(entry.get(name), int) and not isinstance(entry[name], bool) and 0 <= entry[name] <= 4
            for name in attributes
        )
    ]
    return found[0] if found and all(one == found[0] for one in found) else None


@dataclass(frozen=True)
class Vote:
    """What a judge said of answers A and B: `better` is `A`, `B` or `tie`, `confidence` in [0, 1] if it gave one."""

    better: str
    confidence: float | None = None
    reason: str = ""


def read_vote(text: str) -> Vote | None:
    """The vote in a reply: a JSON object with `better`, or a reply that is "A", "B" or "tie" and nothing else; else None."""
    votes = [vote for entry in json_objects(text) if (vote := _vote(entry)) is not None]
    if votes:
        return votes[0] if len({vote.better for vote in votes}) == 1 else None
    bare = re.fullmatch(r"\W*(?:answer\s+)?(a|b|tie)\W*", text, re.IGNORECASE)
    return Vote(_SIDES[bare[1].lower()]) if bare else None


@dataclass
class Question:
    """Something to ask a judge.

    Attributes:
        id: names it in logs; not part of what a reply is kept under.
        text: the prompt.
        images: pictures to show, in order.
    """

    id: str
    text: str
    images: Sequence[EncodedImage | Image.Image] = ()


@dataclass(frozen=True)
class NoReply:
    """What came of a request that got no reply: why."""

    message: str


def ask_until_read(
    count: int,
    put: Callable[[list[int], int], Sequence[Reply | NoReply]],
    read: Callable[[int, Reply], Answer | None],
    *,
    attempts: int,
    failed_again: bool = False,
) -> tuple[list[Answer | None], dict[int, str]]:
    """Ask, read, and ask again what could not be read.

    Args:
        count: number of questions.
        put: asks the questions of these places, for the n-th time (from 0); gives what came of each.
        read: makes an answer of the reply to the question of this place, or None of one that it cannot read.
        attempts: how often a question is asked at most.
        failed_again: ask again what got no reply, too; else that ends it, since the engine has made its tries.

    Returns:
        One answer for each question, None for what is missing; and why, by place, of what is missing and got no reply.
    """
    answers: list[Answer | None] = [None] * count
    failed: dict[int, str] = {}
    for attempt in range(attempts):
        left = [place for place in range(count) if answers[place] is None and (failed_again or place not in failed)]
        for place, reply in zip(left, put(left, attempt) if left else (), strict=True):
            if isinstance(reply, NoReply):
                failed[place] = reply.message
            else:
                answers[place] = read(place, reply)
    return answers, {place: message for place, message in failed.items() if answers[place] is None}


@dataclass
class Judge:
    """Puts questions to a model and reads the replies.

    Attributes:
        engine: the model.
        prompt_version: names the wording; with the model it is the judge's version.
        sampling: how replies are drawn; greedy unless set.
        cache: file that replies are kept in (`Replies`); None keeps none.
        retries: how often an unreadable reply is asked for again.
        counts: questions since the start, by `asked` (requests to the model), `cached`, `read` and `missing`; of the missing
            `failed` got no reply.
        failed: of the last call of `ask`, by place of the question, why it got no reply (a server that was overloaded, a
            picture that cannot be opened).
        unread: the last reply to a question that was given up because none of its replies could be read.
    """

    engine: Engine
    prompt_version: str
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=256, temperature=0.0))
    cache: Path | None = None
    retries: int = 2
    counts: Counter[str] = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict, init=False)
    unread: str | None = field(default=None, init=False)

    @property
    def version(self) -> str:
        """Model and wording."""
        return f"{self.engine.fingerprint}/{self.prompt_version}"

    def ask(self, questions: Sequence[Question], read: Callable[[str], Answer | None]) -> list[Answer | None]:
        """Ask, read, and ask again what could not be read; all of a round in one call of the engine.

        What got no reply is not asked again here; `failed` says of each why. A question that was given up in an earlier call,
        all its kept replies being unreadable, is asked anew, and what is said now takes their place.

        Args:
            questions: what to ask.
            read: makes an answer of a reply, or None of one that it cannot read.

        Returns:
            One answer for each question; None for what is missing.
        """

        anew = self._given_up(questions, read)
        said: dict[int, str] = {}

        def put(rows: list[int], attempt: int) -> list[str | NoReply]:
            return self._replies([questions[row] for row in rows], attempt, [row in anew for row in rows])

        def read_reply(row: int, reply: str) -> Answer | None:
            said[row] = reply
            return read(reply)

        answers, self.failed = ask_until_read(len(questions), put, read_reply, attempts=self.retries + 1)
        missing = [row for row, answer in enumerate(answers) if answer is None]
        self.counts["missing"] += len(missing)
        self.counts["read"] += len(questions) - len(missing)
        if self.failed:
            self.counts["failed"] += len(self.failed)
            row, message = next(iter(self.failed.items()))
            logger.warning(
                "%d of %d judgements failed: no reply came (first: %s: %s).",
                len(self.failed), len(questions), questions[row].id, message,
            )  # fmt: skip
        if unread := [row for row in missing if row not in self.failed]:
            self.unread = said[unread[0]]
            logger.warning(
                "%d of %d judgements are missing: no readable reply in %d attempts (first: %s: %s).",
                len(unread), len(questions), self.retries + 1, questions[unread[0]].id, shortened(self.unread),
            )  # fmt: skip
        return answers

    def _given_up(self, questions: Sequence[Question], read: Callable[[str], Answer | None]) -> set[int]:
        """Places of the questions of which a reply to every attempt is kept and none can be read."""
        if self.cache is None:
            return set()
        left, kept = list(range(len(questions))), Replies(self.cache)
        for attempt in range(self.retries + 1):
            if not left:
                break
            keys = [self._key(questions[row], attempt) for row in left]
            known = kept.kept(keys)
            left = [row for row, key in zip(left, keys, strict=True) if key in known and read(known[key]) is None]
        return set(left)

    def _replies(self, questions: Sequence[Question], attempt: int, anew: Sequence[bool]) -> list[str | NoReply]:
        sampling = self._sampling(attempt)
        keys = [self._key(question, attempt) for question in questions]
        kept = Replies(self.cache) if self.cache is not None else None
        over = {key for key, again in zip(keys, anew, strict=True) if again}
        known = kept.kept(set(keys) - over) if kept is not None else {}
        fresh = {key: row for row, key in enumerate(keys) if key not in known}
        failed: dict[str, str] = {}
        requests = []
        for key, row in fresh.items():
            try:
                images = [open_image(one) if isinstance(one, dict) else one for one in questions[row].images]
            except ImageError as error:
                failed[key] = str(error)
                continue
            requests.append(
                Request(key, [user_message(_text(questions[row], attempt), len(images))], images, seed=attempt)
            )
        completions = self.engine.generate(requests, sampling) if requests else []
        said = {request.id: completion for request, completion in zip(requests, completions, strict=True)}
        if kept is not None:
            fit = {key: one.text for key, one in said.items() if one.finish_reason != "error"}
            kept.keep(fit, self.version, over=over)
        self.counts["asked"] += len(said)
        self.counts["cached"] += len(set(keys) & set(known))
        for key, completion in said.items():
            if completion.finish_reason == "error":
                failed[key] = (completion.error or "no reason was given").removeprefix(f"request {key}: ")
            else:
                known[key] = completion.text
        return [known[key] if key in known else NoReply(failed[key]) for key in keys]

    def _sampling(self, attempt: int) -> Sampling:
        """A greedy model would say the same again: the second time it is reminded, from then on it is drawn from."""
        if attempt > 1 and not self.sampling.temperature:
            return dataclasses.replace(self.sampling, temperature=0.7)
        return self.sampling

    def _key(self, question: Question, attempt: int) -> str:
        content = {
            "judge": self.version,
            "text": _text(question, attempt),
            "images": [picture_hash(image) for image in question.images],
            "sampling": dataclasses.asdict(self._sampling(attempt)),
            "attempt": attempt,
        }
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def shortened(reply: str) -> str:
    """The beginning of a reply in quotes, on one line, for messages."""
    words = " ".join(reply.split())
    return repr(words if len(words) <= 80 else f"{words[:80]}...")


def wording_version(name: str, *texts: str) -> str:
    """Version of a wording: its name and a hash, so that a changed word is another version."""
    return f"{name}-{hashlib.sha256(''.join(texts).encode()).hexdigest()[:8]}"


def picture_hash(image: EncodedImage | Image.Image) -> str:
    """Hex SHA-256 of a picture's content: the encoded bytes, or mode, size and pixels of a decoded one."""
    return sha256(image) if isinstance(image, dict) else pixels_sha256(image)


def _text(question: Question, attempt: int) -> str:
    return question.text + (REMINDER if attempt else "")


_SIDES = {"a": "A", "b": "B", "tie": "tie"}


def _vote(entry: Mapping[str, Any]) -> Vote | None:
    better = entry.get("better")
    side = _SIDES.get(re.sub(r"^answer\s+", "", better.strip().lower())) if isinstance(better, str) else None
    if side is None:
        return None
    stated, reason = entry.get("confidence"), entry.get("reason")
    confidence = None
    if isinstance(stated, (int, float)) and not isinstance(stated, bool) and 0 <= stated <= 100:
        confidence = stated / 100
    return Vote(side, confidence, reason.strip() if isinstance(reason, str) else "")


def _thing_line(thing: Any) -> str:
    if not isinstance(thing, Mapping):
        return str(thing)
    words = [thing.get("size"), thing.get("colour"), thing.get("name") or thing.get("shape")]
    named = " ".join(word for word in words if isinstance(word, str))
    place = thing.get("place")
    return f"{named} ({place})" if isinstance(place, str) else named
