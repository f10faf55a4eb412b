"""What a model knows of a picture, told from its answers, and whether a caption says no more than that: KnowAda.

Source: Yanuka et al., "Bridging the Visual Gap: Fine-Tuning Multimodal Models with Knowledge-Adapted Captions", arXiv 2411.09018;
code moranyanuka/KnowAda. Differs from the released code: a grade that cannot be read is missing, not wrong; a request that fails
fails its own row; rewrites are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from prefalign.engines import Engine, Request, Sampling
from prefalign.english import FUNCTION_WORDS, bases
from prefalign.records import user_message
from prefalign.text import normalised, same_answer

if TYPE_CHECKING:
    from PIL import Image

_TELLING = frozenset(
    ("no", "not", "never", "none", "without", "neither", "nor", "above", "below", "under", "over", "behind", "beneath", "beside",
     "between", "near", "inside", "outside", "across", "along", "around", "through")
)  # fmt: skip
"""Function words that change what is said, so that a rewrite may not add them."""


@dataclass(frozen=True)
class Captioned:
    """A picture's dense caption: the id of its row, the caption, and what else is known of the picture."""

    id: str
    caption: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What came of one request: the text, or why there is none.

    Attributes:
        text: the text.
        refused: `generation_failed`, `cut_off`, `unreadable`, `no_questions`; None: there is a text.
        message: more about a refusal.
    """

    text: str = ""
    refused: str | None = None
    message: str = ""


class Annotator(Protocol):
    """Who writes questions, judges answers and rewrites captions; everything in order, one result for each item."""

    fingerprint: str

    def questions(self, items: Sequence[Captioned]) -> list[list[str] | Reply]:
        """Probing questions of each caption, or why there are none."""
        ...

    def judge(self, items: Sequence[tuple[str, str, str]]) -> Sequence[int | Reply | None]:
        """For each (caption, question, answer) 1 (wrong), 2 (nearly right), 3 (right), None: missing, or why nobody replied."""
        ...

    def rewrite(self, items: Sequence[tuple[Captioned, Sequence[str]]]) -> list[Reply]:
        """Each caption changed so that it does not answer the questions."""
        ...

    def answerable(self, items: Sequence[tuple[str, str]]) -> Sequence[bool | Reply | None]:
        """For each (text, question) whether the text answers it, None: missing, or why nobody replied."""
        ...

    def statements(self, items: Sequence[tuple[Captioned, str]]) -> list[list[str] | Reply]:
        """For each text about a captioned picture one label a statement: `entailed`, `contradicted` or `neutral`."""
        ...


@dataclass
class Probe:
    """What a model knows of one thing in a picture.

    Attributes:
        question: what it was asked.
        answers: its answers.
        scores: grade of each answer (1 wrong, 2 nearly right, 3 right), None: missing.
        unknown: whether it does not know; None: too few answers were judged.
    """

    question: str
    answers: list[str] = field(default_factory=list)
    scores: list[int | None] = field(default_factory=list)
    unknown: bool | None = None


@dataclass(frozen=True)
class Probing:
    """How a model's knowledge is probed: answers to each question, how they are drawn, and `is_unknown`'s two numbers."""

    num_generations: int
    sampling: Sampling
    threshold: int
    least_judged: int


def probe(
    engine: Engine,
    annotator: Annotator,
    rows: Sequence[tuple[Captioned, list[Image.Image], Sequence[str]]],
    how: Probing,
    *,
    seed: int,
) -> list[list[Probe] | Reply]:
    """Put questions about captioned pictures to a model, have its answers judged, and tell what is unknown to it.

    Answers are found by row, question and number, so one that fails moves no other. One that is empty is wrong, and nobody is
    asked about it. Equal answers to a question are judged once.

    Args:
        engine: the model; it sees pictures and question, not the caption.
        annotator: who judges.
        rows: a caption, its decoded pictures, and questions, for each row.
        how: number of answers, sampling and thresholds.
        seed: seed of the stage; with row, question and number it decides a draw.

    Returns:
        For each row a probe of each question, in order, or which answer or grade nobody replied to (`generation_failed`): another
        time it may be had, so the row should not be decided without it.
    """
    count = how.num_generations
    found = [[Probe(question) for question in questions] for *_, questions in rows]
    requests = [
        Request(f"{item.id}/question {number}/{place}", [user_message(question, len(images))], images, seed=seed)
        for item, images, questions in rows
        for number, question in enumerate(questions)
        for place in range(count)
    ]
    said = {each.id: each for each in (engine.generate(requests, how.sampling) if requests else [])}
    lost: dict[int, Reply] = {}
    for row, ((item, *_), probes) in enumerate(zip(rows, found, strict=True)):
        for number, one in enumerate(probes):
            answers = [said[f"{item.id}/question {number}/{place}"] for place in range(count)]
            one.answers = [answer.text.strip() for answer in answers]
            for answer in answers:
                if answer.finish_reason == "error":
                    lost[row] = Reply(refused="generation_failed", message=f"an answer to a question: {answer.error}")
    whole = [(row, item) for row, (item, *_) in enumerate(rows) if row not in lost]
    items = list(
        dict.fromkeys(
            (item.caption, one.question, text)
            for row, item in whole for one in found[row] for text in one.answers if text
        )
    )  # fmt: skip
    grades = dict(zip(items, annotator.judge(items) if items else [], strict=True))
    for row, item in whole:
        for one in found[row]:
            given = [grades[item.caption, one.question, text] if text else 1 for text in one.answers]
            lost.update((row, grade) for grade in given if isinstance(grade, Reply))
            one.scores = [None if isinstance(grade, Reply) else grade for grade in given]
            one.unknown = is_unknown(one.scores, threshold=how.threshold, least_judged=how.least_judged)
    return [lost.get(row, probes) for row, probes in enumerate(found)]


def is_unknown(scores: Sequence[int | None], *, threshold: int, least_judged: int) -> bool | None:
    """Whether a model does not know the answer to a question.

    Args:
        scores: grade of each of its answers; None: missing, which is neither right nor wrong.
        threshold: wrong answers (grade 1) out of all from which a question is unknown. Where grades are missing, the share
            counts: 7 of 8 judged are at least 8 of 10, 7 of 9 are not.
        least_judged: grades that are needed.

    Returns:
        None where fewer were judged: nobody can tell.
    """
    judged = [score for score in scores if score is not None]
    if len(judged) < max(1, least_judged):
        return None
    return sum(score < 2 for score in judged) * len(scores) >= threshold * len(judged)


def content_words(text: str) -> set[str]:
    """The words of a text that say something; articles, auxiliaries and the like are left out."""
    return {word for word in normalised(text).split() if word in _TELLING or word not in FUNCTION_WORDS}


def rewrite_problem(caption: str, rewritten: str, *, least_words: float, allowed: Sequence[str] = ()) -> str | None:
    """Why a rewritten caption cannot be used, or None.

    Args:
        caption: the caption before.
        rewritten: the caption after.
        least_words: share of the words that has to be left.
        allowed: words that a rewrite may add.

    Returns:
        `empty_rewrite`, `short_rewrite`, `unchanged_rewrite`, or `new_words` for content words that the caption has in no form
        ("sits" is there in "is sitting").
    """
    if not normalised(rewritten):
        return "empty_rewrite"
    if same_answer(caption, rewritten):
        return "unchanged_rewrite"
    if len(rewritten.split()) < least_words * len(caption.split()):
        return "short_rewrite"
    known = {base for word in content_words(" ".join([caption, *allowed])) for base in bases(word)}
    return "new_words" if any(known.isdisjoint(bases(word)) for word in content_words(rewritten)) else None
