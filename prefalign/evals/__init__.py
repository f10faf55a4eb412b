"""Evaluation: load -> ask -> parse -> score -> statistics, one file per benchmark, every per-item answer kept.

chair.py        what a caption names that is not there, and what it misses
yesno.py        POPE-style questions
attributes.py   short answers: colour, count, place
reliance.py     the same questions under another picture, or none
reading.py      the benchmarks' files, line by line
files.py        benchmarks from a user's own files
asking.py       engine -> predictions.jsonl, resumable
scoring.py      predictions.jsonl -> items.jsonl, each item to its benchmark's `score`
statistics.py   cluster bootstrap, paired tests (scipy)
summary.py      items -> metrics, comparison of two runs, table
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prefalign.images import EncodedImage
from prefalign.records import Message

Status = Literal["ok", "unparsed", "empty", "error"]


@dataclass(frozen=True)
class Item:
    """One thing to ask, with what is known of its answer.

    Attributes:
        eval: the module that scores it (`chair`, `yesno`, `attributes`); see `scoring.score_all`.
        id: identity within its eval; two runs are joined on it.
        group: cluster for statistics: items about one picture are not independent.
        images: encoded pictures in the order of their placeholders.
        messages: conversation up to the user turn.
        label: gold short answer (`yes`, `blue`, `top left`).
        answer: gold reply whose log-prob the reliance probe takes; the label if None.
        kind: group of questions reported on its own (`colour`, `count`).
        choices: the answers that can be given, if they are a closed set.
        truth: names of what is in the picture (captions).
        clear: those of `truth` that are clearly visible; None if not known.
    """

    eval: str
    id: str
    group: str
    images: list[EncodedImage]
    messages: list[Message]
    label: str | None = None
    answer: str | None = None
    kind: str = ""
    choices: tuple[str, ...] = ()
    truth: frozenset[str] = frozenset()
    clear: frozenset[str] | None = None


@dataclass
class Prediction:
    """A reply as it is kept in `predictions.jsonl`.

    Attributes:
        eval, id, group: of the item (`reliance` ids end in `@condition`).
        prompt: text of the question.
        text: the reply.
        unstripped: the reply as the model wrote it, if a leaked attribute line was taken out (`Asking.attributes`).
        picture: name of the first picture's copy in the evaluation's folder; only the first few are copied.
        condition: picture shown: `true`, `blank`, `noise`, `mismatched` or `none`.
        shown: id of the item whose picture was shown instead (`mismatched`).
        n_tokens: length of the reply; None for replies that were read from a file.
        finish_reason: the engine's (`stop`, `length`, `error`).
        error: why there is no reply.
        logp: summed log-prob of the gold reply under this picture, end of turn included.
        logp_tokens: number of tokens in that sum.
    """

    eval: str
    id: str
    group: str
    prompt: str
    text: str
    picture: str = ""
    condition: str = "true"
    shown: str = ""
    n_tokens: int | None = None
    finish_reason: str = "stop"
    error: str | None = None
    logp: float | None = None
    logp_tokens: int | None = None
    unstripped: str | None = None


@dataclass
class Scored:
    """What one reply is worth. An empty reply or an error is never a score: it carries no `numbers` that a metric is made of.

    Attributes:
        parsed: what was understood.
        numbers: additive quantities; each metric is a ratio of their sums.
    """

    eval: str
    id: str
    group: str
    status: Status
    kind: str = ""
    parsed: str | None = None
    numbers: dict[str, float] = field(default_factory=dict)


def reply_status(prediction: Prediction | None) -> Status | None:
    """`error` or `empty` when there is nothing to parse, else None."""
    if prediction is None or prediction.error is not None or prediction.finish_reason == "error":
        return "error"
    return None if prediction.text.strip() else "empty"
