"""Which instruction data is kept, and what its reward models are trained on: pure functions of Align2LLaVA's cascade.

Source: "Align^2LLaVA: Cascaded Human and Large Language Model Preference Alignment for Multi-modal Instruction Curation",
arXiv 2409.18541, and its released scripts. Differs from the release: question corruption works on words (its code iterates a
string, so it joins characters: `characters` repeats that); pairs need a gap; a corrupted copy can also be the same text on
another picture or another picture's answer, which only a model that looks can tell; ranks can be taken of z-scores.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prefalign.records import Message, Prompt, assistant_message, message_text, row_seed
from prefalign.text import same_answer

Corruption = Literal["word_shuffle", "word_drop", "duplicate", "swap_image", "swap_answer"]
Compare = Literal["within_type", "z_score", "overall"]
Aggregate = Literal["mean", "min"]
Baseline = Literal["random", "length_matched"]

_TRIES = 20
_BINS = 10


@dataclass
class BuilderConfig:
    """How rated texts about one picture become comparisons.

    Attributes:
        min_gap: least difference of two ratings, above 0 (0.2: two steps of the published scale; the release took any).
        max_pairs_per_group: most pairs of one picture, drawn; 0: all.
        aug_prob: share of texts that are also compared with a corrupted copy of themselves.
        corruptions: what that copy is; each text draws one.
        drop: share of words that `word_drop` takes out.
        characters: parity with the released code, which corrupts characters instead of words.
    """

    min_gap: float = 0.2
    max_pairs_per_group: int = 0
    aug_prob: float = 0.25
    corruptions: list[Corruption] = field(
        default_factory=lambda: ["word_shuffle", "word_drop", "duplicate", "swap_image", "swap_answer"]
    )
    drop: float = 0.3
    characters: bool = False

    def __post_init__(self) -> None:
        if not self.min_gap > 0:
            raise ValueError(
                f"min_gap is {self.min_gap}: texts of one rating would be compared. Give a gap above 0 (0.2)."
            )
        if self.max_pairs_per_group < 0:
            raise ValueError(
                f"max_pairs_per_group is {self.max_pairs_per_group}: no number of pairs can be drawn. Give 0 for all, or more."
            )
        if not 0 <= self.aug_prob <= 1:
            raise ValueError(
                f"aug_prob is {self.aug_prob}; it is a share of texts, so give a value from 0 to 1 (0.25)."
            )
        if self.aug_prob and not self.corruptions:
            raise ValueError(
                "corruptions is empty, so there is nothing to compare with. Name one, or set aug_prob to 0."
            )
        if not 0 < self.drop < 1:
            raise ValueError(f"drop is {self.drop}; it is a share of words between 0 and 1 (0.3).")


@dataclass(frozen=True)
class Turn:
    """A question and its answer in a conversation.

    Attributes:
        place: number of the assistant's message.
        context: conversation up to and including the question.
        question: text of the question.
        answer: text of the answer.
    """

    place: int
    context: list[Message]
    question: str
    answer: str


def turns_of(prompt: Prompt, answers: Mapping[int, str] | None = None) -> list[Turn]:
    """The questions and answers of a conversation whose last answer is the prompt's reference.

    Args:
        prompt: the row.
        answers: by `Turn.place`, what is answered instead; later turns have it in their context.
    """
    messages = conversation(prompt, {}, answers or {})
    return [
        Turn(
            place,
            messages[:place],
            message_text(messages[place - 1 : place]),
            message_text(messages[place : place + 1]),
        )
        for place, message in enumerate(messages)
        if message["role"] == "assistant" and place and messages[place - 1]["role"] == "user"
    ]


def conversation(prompt: Prompt, questions: Mapping[int, str], answers: Mapping[int, str]) -> list[Message]:
    """The whole conversation with other texts.

    Args:
        prompt: the row.
        questions: by `Turn.place`, what is asked instead; the pictures of the turn stay where they are.
        answers: by `Turn.place`, what is answered instead.
    """
    messages = [*prompt.messages, assistant_message(prompt.answer or "")]
    for place, text in answers.items():
        messages[place] = assistant_message(text)
    for place, text in questions.items():
        blocks = messages[place - 1]["content"]
        assert one_text(messages[place - 1]), "a question is put into a turn with one text"
        said = [block if block["type"] == "image" else {"type": "text", "text": text} for block in blocks]
        messages[place - 1] = {**messages[place - 1], "content": said}
    return messages


def one_text(message: Message) -> bool:
    """Whether a turn has one text, so that another can take its place among the pictures."""
    return sum(block["type"] == "text" for block in message["content"]) == 1


@dataclass(frozen=True)
class Comparison:
    """A text that is better than another about the same picture.

    Attributes:
        better: number of the better text in its group.
        text: the worse text; for `swap_image` the same text, to be shown with another picture.
        worse: number of the worse text; None: it is a corrupted copy.
        margin: difference of the ratings; None for a corrupted copy.
        corruption: what was done to the copy; None: both are rated texts.
    """

    better: int
    text: str
    worse: int | None = None
    margin: float | None = None
    corruption: Corruption | None = None


def corrupted(
    text: str, kind: Corruption, rng: random.Random, *, drop: float = 0.3, characters: bool = False
) -> str | None:
    """A text with its words shuffled, thinned out or repeated; None if that leaves it as it was (case and punctuation aside).

    Args:
        text: the text.
        kind: `word_shuffle`, `word_drop` or `duplicate` (a run of words stands twice).
        rng: draws the change.
        drop: share of words that `word_drop` takes out; at least one goes and one stays.
        characters: take characters for words, as the released code does.
    """
    words = list(text) if characters else text.split()
    if not words or (kind != "duplicate" and len(words) < 2):
        return None
    for _ in range(_TRIES):
        if kind == "word_shuffle":
            made = rng.sample(words, len(words))
        elif kind == "word_drop":
            made = [word for word in words if rng.random() >= drop] or [rng.choice(words)]
        else:
            start, end = sorted(rng.sample(range(len(words) + 1), 2))
            made = words[:end] + words[start:]
        changed = " ".join(made)
        if not same_answer(changed, text):
            return changed
    return None


def build_comparisons(
    texts: Sequence[str],
    ratings: Sequence[float | None],
    rng: random.Random,
    config: BuilderConfig,
    others: Callable[[random.Random], str | None] = lambda rng: None,
) -> list[Comparison]:
    """Comparisons of the texts about one picture: every two that differ by the gap, then corrupted copies.

    Args:
        texts: questions, or answers to one question.
        ratings: one for each text; None: not rated (in no comparison, and not augmented).
        rng: draws pairs beyond the limit, who is augmented, and how.
        config: settings.
        others: draws a text about another picture, for `swap_answer`; None: there is none.

    Returns:
        Comparisons whose texts differ, but for `swap_image`.
    """
    rated = [number for number, rating in enumerate(ratings) if rating is not None and texts[number].strip()]
    found = []
    for one, other in itertools.permutations(rated, 2):
        gap = round(float(ratings[one] or 0) - float(ratings[other] or 0), 9)
        if gap >= config.min_gap and not same_answer(texts[one], texts[other]):
            found.append(Comparison(one, texts[other], other, gap))
    if config.max_pairs_per_group and len(found) > config.max_pairs_per_group:
        drawn = rng.sample(range(len(found)), config.max_pairs_per_group)
        found = [found[place] for place in sorted(drawn)]
    for number in rated:
        if rng.random() >= config.aug_prob:
            continue
        kind = rng.choice(config.corruptions)
        if kind == "swap_image":
            worse: str | None = texts[number]
        elif kind == "swap_answer":
            worse = others(rng)
            worse = None if worse is None or same_answer(worse, texts[number]) else worse
        else:
            worse = corrupted(texts[number], kind, rng, drop=config.drop, characters=config.characters)
        if worse is not None:
            found.append(Comparison(number, worse, corruption=kind))
    return found


def aggregated(values: Sequence[float | None], how: Aggregate = "mean") -> float | None:
    """One score of a conversation from those of its turns; None if one is missing."""
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return None
    return statistics.fmean(known) if how == "mean" else min(known)


def kept_count(rows: int, keep: float) -> int:
    """ceil(keep * rows), free of binary fractions."""
    return math.ceil(round(keep * rows, 9))


def z_scores(scores: Mapping[str, float], types: Mapping[str, str]) -> dict[str, float]:
    """Scores in deviations from the mean of their type; 0 throughout a type whose scores do not differ."""
    found = {}
    for ids in _by_type(scores, types).values():
        values = [scores[row] for row in ids]
        mean, deviation = statistics.fmean(values), statistics.pstdev(values)
        found.update({row: (scores[row] - mean) / deviation if deviation else 0.0 for row in ids})
    return found


def keep_best(scores: Mapping[str, float], types: Mapping[str, str], keep: float, compare: Compare) -> set[str]:
    """Ids of the best share of rows; on ties the lower id is kept, whatever the order of the rows.

    Args:
        scores: by id, of the rows that have one.
        types: type of each row.
        keep: share that is kept, rounded up.
        compare: `within_type`: the share of each type (published); `overall`: of all rows by score; `z_score`: of all rows by
            what they are above the mean of their type, which favours no type for its scale but leaves their counts free.
    """
    ranked = z_scores(scores, types) if compare == "z_score" else dict(scores)
    groups = _by_type(scores, types).values() if compare == "within_type" else [list(scores)]
    kept: set[str] = set()
    for ids in groups:
        order = sorted(ids, key=lambda row: (-ranked[row], row))
        kept.update(order[: kept_count(len(order), keep)])
    return kept


@dataclass(frozen=True)
class Judged:
    """A row of a cascade's table.

    Attributes:
        id: id of the row.
        type: its type.
        words: words of its answers.
        kept: whether the cascade kept it.
    """

    id: str
    type: str
    words: int
    kept: bool


def baseline(table: Iterable[Judged], kind: Baseline, seed: int) -> set[str]:
    """Ids of as many rows of each type as a cascade kept, drawn without looking at a score.

    Args:
        table: every row that the cascade could choose from.
        kind: `random`; or `length_matched`: as many as were kept in each tenth of the type's rows by length, so that what the
            cascade gains by length alone is gained here too.
        seed: with a row's id it decides the draw.
    """
    groups: dict[tuple[str, int], list[Judged]] = {}
    by_type: dict[str, list[Judged]] = {}
    for row in table:
        by_type.setdefault(row.type, []).append(row)
    for name, rows in by_type.items():
        order = sorted(rows, key=lambda row: (row.words, row.id))
        for place, row in enumerate(order):
            tenth = place * _BINS // len(order) if kind == "length_matched" else 0
            groups.setdefault((name, tenth), []).append(row)
    drawn: set[str] = set()
    for rows in groups.values():
        order = sorted(rows, key=lambda row: (row_seed(seed, f"{row.id}/{kind}"), row.id))
        drawn.update(row.id for row in order[: sum(row.kept for row in rows)])
    return drawn


def _by_type(scores: Mapping[str, float], types: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in scores:
        found.setdefault(types[row], []).append(row)
    return found
