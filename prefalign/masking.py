"""What of an answer says something about the picture, masked: by word lists, or by a model.

Re-Align (arXiv 2502.13146, section 3.1) masks objects, attributes and relations of a true answer and has a model fill the
gaps while it looks at another picture (`prefalign.filling`). `RuleMasker` knows words, `EngineMasker` asks a model. Positions
are characters of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from prefalign.editors import cleaned
from prefalign.engines import Engine, Request, Sampling, require
from prefalign.english import DETERMINERS, FUNCTION_WORDS, NUMBERS, OPENERS
from prefalign.gaps import ENDING, TOKEN, Span, align, holds
from prefalign.guided import Item
from prefalign.records import message_text, user_message
from prefalign.rule_editor import Vocabulary
from prefalign.text import split_sentences

_LABEL = re.compile(r"^\W*copy\W*:\s*", re.IGNORECASE)
_YES_NO = re.compile(r"\s*(?:yes|no)\b(?! \w)", re.IGNORECASE)
_NUMBER_WORDS = frozenset((*NUMBERS[:13], "dozen", "hundred", "thousand", "first", "second", "third"))
_COLOUR_WORDS = frozenset(
    ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "black", "white", "grey", "gray", "beige", "violet",
     "turquoise", "golden", "silver")
)  # fmt: skip
_RELATIONS = (
    "above", "below", "behind", "beneath", "beside", "between", "in front of", "inside", "near", "next to", "on top of",
    "opposite", "outside", "over", "to the left of", "to the right of", "on the left", "on the right", "under", "underneath",
)  # fmt: skip


@dataclass
class MaskingConfig:
    """What is masked, and by whom.

    Attributes:
        masker: `engine` asks a model, as published; `rules` needs none.
        level: `segment` masks words and phrases, `sentence` every sentence that holds one (an ablation of the paper).
        words: what `rules` mask: `general` English by a list of function words, or the words of `vocabulary` alone.
        vocabulary: the words for `words: vocabulary`; the default is the embedded world's.
        marker: stands for what is masked; no answer may hold it.
    """

    masker: Literal["rules", "engine"] = "engine"
    level: Literal["segment", "sentence"] = "segment"
    words: Literal["general", "vocabulary"] = "general"
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    marker: str = "[MASK]"

    def __post_init__(self) -> None:
        if not self.marker.strip() or self.marker != self.marker.strip() or " " in self.marker:
            raise ValueError(
                f"marker {self.marker!r} stands in answers for what is masked: give a word without blanks that no answer holds, "
                "such as [MASK]."
            )


@dataclass
class Masked:
    """Where an answer is masked.

    Attributes:
        spans: (start, end) characters, in order and apart from one another.
        refused: why there is none: `nothing_to_mask`, `marker_in_answer`, `masker_rewrote`, `masker_cut_off`, `masker_failed`.
        message: more about a refusal.
    """

    spans: list[Span] = field(default_factory=list)
    refused: str | None = None
    message: str = ""


class Masker(Protocol):
    """What `datagen/re_align.py` asks of a masker."""

    fingerprint: str

    def mask(self, items: Sequence[Item]) -> list[Masked]:
        """One result per item, in order."""
        ...


class RuleMasker:
    """Masks by word lists: honest about what it cannot see, since it does not know parts of speech.

    `general` masks numbers, colours, relations of place, a yes or no at the start, and what follows a determiner up to the
    next function word or punctuation (at most four words). It misses bare nouns ("cars are parked") and verbs, and takes a
    participle after a noun along ("a man riding"). `vocabulary` masks the phrases made of its words and nothing else.
    """

    def __init__(self, config: MaskingConfig) -> None:
        self.config = config
        self.fingerprint = "rules"
        vocabulary = config.vocabulary
        attributes = _any_of([word for group in vocabulary.attributes.values() for word in group])
        nouns = _any_of([word for name, others in vocabulary.objects.items() for word in (name, *others)])
        self._known = re.compile(
            rf"\b(?:(?:(?:an?|no) )?(?:(?:{attributes}) )*(?:{nouns})(?:e?s)?|{attributes}|{_any_of(vocabulary.places)}|"
            rf"{_any_of(vocabulary.opposites)}|{_any_of(vocabulary.numbers)}|nothing)\b",
            re.IGNORECASE,
        )
        self._relation = re.compile(rf"\b(?:{_any_of(_RELATIONS)})\b", re.IGNORECASE)

    def mask(self, items: Sequence[Item]) -> list[Masked]:
        """One result per item, in order; see `Masker`."""
        return [self._mask(item.answer) for item in items]

    def _mask(self, answer: str) -> Masked:
        if holds(answer, self.config.marker):
            return _marker_in_answer(answer, self.config.marker)
        spans = [(found.start(), found.end()) for found in (_YES_NO.match(answer),) if found]
        if self.config.words == "vocabulary":
            spans += [found.span() for found in self._known.finditer(answer)]
        else:
            spans += [found.span() for found in self._relation.finditer(answer)] + _phrases(answer)
        return _finished(answer, spans, self.config.level)


class EngineMasker:
    """Asks a model to write the answer again with markers in it: the published way, with GPT-4o mini.

    The model's text counts only for where the markers are: words outside them must be the answer's own, in order, or the row is
    refused. The prompt is ours; the authors' was not released.
    """

    def __init__(self, engine: Engine, sampling: Sampling, config: MaskingConfig, *, seed: int = 0) -> None:
        """Args:
            engine: the masker's model; it is shown no picture.
            sampling: how it is drawn from.
            config: level and marker.
            seed: seed of the stage.

        Raises:
            ValueError: if the engine cannot sample.
        """
        require(engine, ["sample"], "masking")
        self.engine = engine
        self.sampling = sampling
        self.config = config
        self.seed = seed
        self.fingerprint = engine.fingerprint

    def mask(self, items: Sequence[Item]) -> list[Masked]:
        """One result per item, in order; all of them in one call of the engine."""
        asked = [item for item in items if not holds(item.answer, self.config.marker)]
        requests = [
            Request(f"{item.id}/mask", [user_message(mask_prompt(item, self.config.marker))], [], seed=self.seed)
            for item in asked
        ]
        answers = iter(self.engine.generate(requests, self.sampling) if requests else [])
        results = []
        for item in items:
            if holds(item.answer, self.config.marker):
                results.append(_marker_in_answer(item.answer, self.config.marker))
                continue
            completion = next(answers)
            if completion.finish_reason == "error":
                results.append(Masked(refused="masker_failed", message=str(completion.error)))
            elif completion.finish_reason == "length":
                results.append(Masked(refused="masker_cut_off", message=f"...{completion.text[-60:]}"))
            else:
                results.append(self.read(item.answer, cleaned(_LABEL.sub("", completion.text))))
        return results

    def read(self, answer: str, masked: str) -> Masked:
        """The spans that a model masked, or why its text cannot be used."""
        marker = re.escape(self.config.marker)
        masked = re.sub(rf"{marker}(?:[ \t]*{marker})+", lambda found: self.config.marker, masked)
        if self.config.marker not in masked:
            return Masked(refused="nothing_to_mask", message=f"the masker marked nothing: {masked[:60]!r}")
        edits, spans = align(masked, answer, self.config.marker)
        if edits:
            return Masked(
                refused="masker_rewrote", message=f"{edits} word(s) outside the marks differ: {masked[:60]!r}"
            )
        return _finished(answer, spans, self.config.level)


_TASK = """\
You are given a question about a picture and an answer. Copy the answer, but write {marker} in place of every word or group
of words that says what the picture holds: things and people, how they look (colour, size, number, material), what they do, and
where they are or how they stand to one another. A group of words that belong together gets one {marker}. Copy all other words
and every punctuation mark exactly as they are. Write the copy and nothing else."""
_SHOTS = (
    (
        "What is on the kitchen table?",
        "There is a white plate with two slices of toast, and a knife lies next to it.",
        "There is {marker} with {marker}, and {marker} {marker} it.",
    ),
    ("How many dogs are there?", "Three.", "{marker}."),
    (
        "Why might the woman be in a hurry?",
        "She is running along the platform, so it is likely that she wants to catch the train.",
        "She is {marker}, so it is likely that she wants to catch {marker}.",
    ),
)


def mask_prompt(item: Item, marker: str) -> str:
    """The instruction to mask an item's answer, with worked examples."""
    question = message_text(item.messages[-1:]).strip()
    shots = [f"Question: {ask}\nAnswer: {full}\nCopy: {gaps.format(marker=marker)}" for ask, full, gaps in _SHOTS]
    asked = f"Question: {question}\nAnswer: {item.answer.strip()}\nCopy:"
    return "\n\n".join([_TASK.format(marker=marker), *shots, asked])


def _marker_in_answer(answer: str, marker: str) -> Masked:
    return Masked(refused="marker_in_answer",
                  message=f"the answer itself holds {marker!r}: choose another `masking.marker` ({answer[:60]!r})")  # fmt: skip


def _finished(answer: str, spans: Sequence[Span], level: str) -> Masked:
    """Spans in order, those that touch or have blanks between them joined, widened to sentences if asked."""
    if level == "sentence":
        spans = _sentences(answer, spans)
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and not answer[joined[-1][1] : start].strip(" \t"):
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return (
        Masked(joined) if joined else Masked(refused="nothing_to_mask", message=f"no word is masked: {answer[:60]!r}")
    )


def _sentences(answer: str, spans: Sequence[Span]) -> list[Span]:
    """The sentences that hold a span, without their terminal punctuation."""
    found, position = [], 0
    for part in split_sentences(answer):
        body = ENDING.sub("", part.rstrip())
        start, end = position + len(part) - len(part.lstrip()), position + len(body)
        if start < end and any(one < end and start < other for one, other in spans):
            found.append((start, end))
        position += len(part)
    return found


def _phrases(answer: str) -> list[Span]:
    """Numbers, colours, and what a determiner or a number begins, in general English."""
    tokens = list(TOKEN.finditer(answer))
    words = [token[0].casefold() for token in tokens]
    spans: list[Span] = []
    place = 0
    while place < len(words):
        word = words[place]
        number = word in _NUMBER_WORDS or word[0].isdigit()
        begins = number or word in OPENERS or word in DETERMINERS
        end = place + 1
        while begins and end < len(words) and end <= place + 4 and _content(words[end]):
            end += 1
        if number or (word in OPENERS and end > place + 1):
            spans.append((tokens[place].start(), tokens[end - 1].end()))
        elif word in DETERMINERS and end > place + 1:
            spans.append((tokens[place + 1].start(), tokens[end - 1].end()))
        elif word in _COLOUR_WORDS:
            spans.append(tokens[place].span())
        place = end
    return spans


def _content(word: str) -> bool:
    return word[0].isalnum() and word not in FUNCTION_WORDS


def _any_of(words: Sequence[str] | dict[str, str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)"
