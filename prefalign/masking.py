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
from prefalign.guided import Item
from prefalign.records import message_text, user_message
from prefalign.rule_editor import Vocabulary
from prefalign.text import split_sentences

Span = tuple[int, int]

TOKEN = re.compile(
    r"\n+|\d+(?:[.,:]\d+)+\w*(?:[-'\u2019]\w+)*"  # 3.5, 1,000, 10:30
    r"|[^\W\d_](?:\.[^\W\d_])+(?!\w)(?:\.(?=[ \t]*[a-z,;:]))?"  # a.m, U.S. within a sentence
    r"|\w+(?:[-'\u2019]\w+)*|[^\w\s]"
)
ENDING = re.compile("[.!?\u3002\uff01\uff1f]+[\"')\\]*\u2019\u201d]*$")
_LABEL = re.compile(r"^\W*copy\W*:\s*", re.IGNORECASE)
_YES_NO = re.compile(r"\s*(?:yes|no)\b(?! \w)", re.IGNORECASE)
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve dozen hundred thousand first second third"
)
_COLOURS = "red green blue yellow purple orange pink brown black white grey gray beige violet turquoise golden silver"
_RELATIONS = (
    "above", "below", "behind", "beneath", "beside", "between", "in front of", "inside", "near", "next to", "on top of",
    "opposite", "outside", "over", "to the left of", "to the right of", "on the left", "on the right", "under", "underneath",
)  # fmt: skip
_OPENERS = "a an no some several many few both another"  # begin a phrase and are masked with it
_DETERMINERS = "the this that these those his her its their our my your each every"  # begin a phrase and stay
_FUNCTION = """
any all i you he she it we they them him us me who whom whose which what there here where when while as if than then so
and or but nor yet because although though also too not very just only is are was were be been being am has have had having
do does did can could may might must shall should will would of in on at by to from with without for into onto up down out
off over under through across along around about above below behind between beside near inside outside against during before
after toward towards within upon image picture photo photograph scene"""
_NUMBER_WORDS, _COLOUR_WORDS, _OPENING_WORDS, _DETERMINING_WORDS, FUNCTION_WORDS = (
    frozenset(words.split())
    for words in (_NUMBERS, _COLOURS, _OPENERS, _DETERMINERS, f"{_FUNCTION} {_OPENERS} {_DETERMINERS}")
)


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


def masked_text(answer: str, spans: Sequence[Span], marker: str) -> str:
    """The answer with a marker at each span."""
    return filled(answer, spans, [marker] * len(spans))


def filled(answer: str, spans: Sequence[Span], fills: Sequence[str]) -> str:
    """The answer with other text at its first `len(fills)` spans.

    Returns:
        All of it, or what stands before the first span that has no fill: the forced start for the next one.
    """
    text, position = "", 0
    for (start, end), fill in zip(spans, fills, strict=False):
        text += answer[position:start] + fill
        position = end
    return text + answer[position : spans[len(fills)][0] if len(fills) < len(spans) else len(answer)]


def align(template: str, text: str, marker: str) -> tuple[int, list[Span]]:
    """Lay a text with markers over one without, at the fewest edits: each marker takes one or more words.

    Args:
        template: words and markers.
        text: what is laid beneath it.
        marker: what stands for a gap.

    Returns:
        How many words and punctuation marks outside the markers differ, are missing or stand there too much, case aside; and the
        characters of the text that each marker covers (no spans where the text is too short for all markers).
    """
    units: list[str | None] = []
    for number, part in enumerate(template.split(marker)):
        units += [None] * (number > 0) + [token.casefold() for token in TOKEN.findall(part)]
    tokens = list(TOKEN.finditer(text))
    words = [token[0].casefold() for token in tokens]
    impossible = len(units) + len(words) + 1
    costs, moves = list(range(len(words) + 1)), [["extra"] * (len(words) + 1)]
    for unit in units:
        above, costs, steps = costs, [impossible if unit is None else costs[0] + 1], ["missing"]
        for place, word in enumerate(words):
            if unit is None:
                options = [(above[place], "begins"), (costs[place], "goes on")]
            else:
                options = [
                    (above[place] + (unit != word), "word"),
                    (above[place + 1] + 1, "missing"),
                    (costs[place] + 1, "extra"),
                ]
            cost, step = min(options, key=lambda option: option[0])
            costs.append(cost)
            steps.append(step)
        moves.append(steps)
    if costs[-1] >= impossible:
        return impossible, []
    spans: list[Span] = []
    row, place, last = len(units), len(words), len(words)
    while row:
        step = moves[row][place]
        if step == "begins":
            spans.append((tokens[place - 1].start(), tokens[last - 1].end()))
        place -= step != "missing"
        row -= step in ("begins", "word", "missing")
        last = last if step == "goes on" else place
    return costs[-1], spans[::-1]


def holds(text: str, marker: str) -> bool:
    """Whether a text holds the marker, in any case and with blanks inside its brackets."""
    core = marker.strip("[](){}<>")
    pattern = re.escape(marker) + (rf"|[\[(<{{]\s*{re.escape(core)}\s*[\])>}}]" if core else "")
    return re.search(pattern, text, re.IGNORECASE) is not None


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
        begins = number or word in _OPENING_WORDS or word in _DETERMINING_WORDS
        end = place + 1
        while begins and end < len(words) and end <= place + 4 and _content(words[end]):
            end += 1
        if number or (word in _OPENING_WORDS and end > place + 1):
            spans.append((tokens[place].start(), tokens[end - 1].end()))
        elif word in _DETERMINING_WORDS and end > place + 1:
            spans.append((tokens[place + 1].start(), tokens[end - 1].end()))
        elif word in _COLOUR_WORDS:
            spans.append(tokens[place].span())
        place = end
    return spans


def _content(word: str) -> bool:
    return word[0].isalnum() and word not in FUNCTION_WORDS


def _any_of(words: Sequence[str] | dict[str, str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)"
