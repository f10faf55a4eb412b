"""A masked answer filled in again by a model, around words that stay: gap by gap with forced starts, or by request.

Used by Re-Align (arXiv 2502.13146, section 3.1), where the model looks at a neighbour of the answer's picture. How the authors
had gaps filled is not released; both ways here are ours.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from prefalign.editors import cleaned
from prefalign.engines import Engine, Request, Sampling
from prefalign.english import FUNCTION_WORDS, article
from prefalign.gaps import ENDING, TOKEN, Span, align, filled, holds, masked_text
from prefalign.guided import Item
from prefalign.records import Message, message_text
from prefalign.text import first_sentence, split_sentences

_SENTENCE_END = re.compile(r"[ \t]*(?:$|\n|[\u3002\uff01\uff1f]|[.!?]+[\"')\]*\u2019\u201d]*(?:\s|$))")
_REFUSAL = re.compile(
    r"\bi(?:'m| am) sorry|\bas an ai\b|\bi (?:can't|cannot|can not|am unable|am not able|do not|don't) |\bunable to\b|"
    r"\bmasked (?:token|word|part|span)s?\b|\bmask tokens?\b",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"([Aa])n? +(?:an? +)?(?=\w)")
_INSTRUCTION = """\
{question}

An answer to this has been written down for the picture, but words are missing. Each gap is marked {marker}:

{masked}

Look at the picture and write the answer out in full, with words that fit the picture in place of every {marker}. Keep all other
words and the punctuation exactly as they are. Write the full answer and nothing else."""


@dataclass
class Completed:
    """An answer filled in again.

    Attributes:
        text: the answer; its words outside the spans are the original's.
        fills: what stands in each span.
        cut: fills that were cut to their first phrase, since the model did not come to the words after the gap by itself.
        refused: why there is none: `empty_completion` (nothing for a gap), `cut_off` (the limit came first), `rewritten` (other
            words were changed), `unfilled`, `refusal`, `generation_failed`.
        message: the engine's, for `generation_failed`.
    """

    text: str = ""
    fills: list[str] = field(default_factory=list)
    cut: int = 0
    refused: str | None = None
    message: str | None = None


def fill_gaps(
    engine: Engine, items: Sequence[Item], spans: Sequence[Sequence[Span]], sampling: Sampling, *, seed: int
) -> list[Completed]:
    """Gap by gap: the answer up to the gap, earlier gaps filled, is forced, and the gap takes its part of what comes.

    The first gaps of all answers go to the engine together, then the second ones, and so on.

    Args:
        engine: generator with `prefix`.
        items: questions with the pictures to look at, and the answers.
        spans: what of each answer is to be filled.
        sampling: how words are drawn; `max_new_tokens` bounds one gap.
        seed: seed of the stage.

    Returns:
        One result per item, in order. Nothing tells the model what follows a gap; so that it does not begin a sentence of another
        build, a gap at the start of one keeps its first function words ("On the", "A").
    """
    results = [Completed() for _ in items]
    for number in range(max((len(row) for row in spans), default=0)):
        active = [index for index, row in enumerate(spans) if number < len(row) and results[index].refused is None]
        requests = []
        for index in active:
            item, given = items[index], filled(items[index].answer, spans[index], results[index].fills)
            given += opening(item.answer, spans[index][number])
            requests.append(Request(f"{item.id}/{number}", item.messages, item.images, prefix=given.rstrip(" \t"), seed=seed,
                                    stop_at_sentence=True))  # fmt: skip
        written = engine.generate(requests, sampling) if requests else []
        for index, completion in zip(active, written, strict=True):
            answer, row, result = items[index].answer, spans[index], results[index]
            start, end = row[number]
            following = row[number + 1][0] if number + 1 < len(row) else len(answer)
            lead = opening(answer, (start, end))
            fill, how = fill_of(completion.text, answer[end:following], answer[start + len(lead) : end],
                                last=following == len(answer))  # fmt: skip
            result.fills.append(_with_article(f"{lead} {fill}" if lead else fill))
            result.cut += how == "phrase"
            if completion.error is not None:
                result.refused, result.message = "generation_failed", completion.error
            elif not fill:
                result.refused = "empty_completion"
            elif how == "sentence" and completion.finish_reason == "length":
                result.refused = "cut_off"
    for item, row, result in zip(items, spans, results, strict=True):
        if result.refused is None:
            result.text = filled(item.answer, row, result.fills)
    return results


def fill_by_request(
    engine: Engine,
    items: Sequence[Item],
    spans: Sequence[Sequence[Span]],
    sampling: Sampling,
    *,
    marker: str,
    max_edits: float,
    seed: int,
) -> list[Completed]:
    """The model is shown each masked answer and asked for all of it; what it wrote is laid over the words that stay.

    Args:
        engine: generator that can follow an instruction.
        items: questions with the pictures to look at, and the answers.
        spans: what of each answer is to be filled.
        sampling: how answers are drawn.
        marker: stands for a gap.
        max_edits: share of the words that stay which may have been changed; they are put back as they were.
        seed: seed of the stage.

    Returns:
        One result per item, in order.
    """
    masked = [masked_text(item.answer, row, marker) for item, row in zip(items, spans, strict=True)]
    requests = [
        Request(item.id, _instruction(item.messages, gaps, marker), item.images, seed=seed)
        for item, gaps in zip(items, masked, strict=True)
    ]
    results = []
    for item, row, gaps, completion in zip(
        items, spans, masked, engine.generate(requests, sampling) if requests else [], strict=True
    ):
        written = cleaned(completion.text)
        result = Completed()
        results.append(result)
        if completion.error is not None:
            result.refused, result.message = "generation_failed", completion.error
        elif completion.finish_reason == "length":
            result.refused = "cut_off"
        elif not written:
            result.refused = "empty_completion"
        elif (reason := unusable(written, item.answer, marker)) is not None:
            result.refused = reason
        else:
            edits, places = align(gaps, written, marker)
            if edits > max_edits * len(TOKEN.findall(gaps.replace(marker, ""))):
                result.refused = "rewritten"
            else:
                result.fills = [written[start:end] for start, end in places]
                result.text = filled(item.answer, row, result.fills)
    return results


def opening(answer: str, span: Span) -> str:
    """The function words that a span begins with, where it begins a sentence and goes on with others; else nothing."""
    start, end = span
    if start not in itertools.accumulate(map(len, split_sentences(answer)), initial=0):
        return ""
    tokens = list(TOKEN.finditer(answer, start, end))
    kept = FUNCTION_WORDS - {"no", "not"}  # these say what is true
    content = next((token for token in tokens if token[0].casefold() not in kept), None)
    return answer[start : content.start()].rstrip() if content is not None else ""


def fill_of(written: str, gap: str, original: str, *, last: bool) -> tuple[str, str]:
    """What of a model's continuation fills a span.

    Args:
        written: what the model wrote after the words before the span.
        gap: the unmasked text from the span to the next one, or to the end of the answer.
        original: the words of the span.
        last: whether the gap goes up to the answer's end. Where it does not, a mark at its end has the next span right behind it
            and no blank, so it ends no sentence.

    Returns:
        `(fill, how)`. How: `sentence`, where the gap opens with a sentence's end (a mark before a blank or the answer's end), the
        rest of the model's; `anchor`, up to where the model itself goes on with the first words (two, else one) of the gap;
        `phrase`, the first phrase of what it wrote, at most two words longer than the original. The fill is empty if nothing
        was written.
    """
    sentence = first_sentence(written)
    body = ENDING.sub("", sentence.strip())
    if _SENTENCE_END.match(gap if last else f"{gap}_"):
        return body, "sentence"
    tokens = list(TOKEN.finditer(body))
    words = [token[0].casefold() for token in tokens]
    wanted = [token.casefold() for token in TOKEN.findall(gap)[:2]]
    for anchor in (wanted, wanted[:1]):
        for place in range(1, len(words) - len(anchor) + 1):
            if words[place : place + len(anchor)] == anchor:
                return body[: tokens[place].start()].rstrip(), "anchor"
    longest = len(TOKEN.findall(original)) + 2
    content = False
    for place, word in enumerate(words):
        function = word in FUNCTION_WORDS or not word[0].isalnum()
        if place == longest or (content and function) or (place and not word[0].isalnum()):
            return body[: tokens[place].start()].rstrip(), "phrase"
        content = content or not function
    return body, "phrase"


def unusable(text: str, answer: str, marker: str) -> str | None:
    """Why a completed answer cannot serve: `unfilled` (a marker is left in it) or `refusal`; None if it can."""
    if holds(text, marker):
        return "unfilled"
    refusal = _REFUSAL.search(text)
    return "refusal" if refusal and refusal[0].casefold() not in answer.casefold() else None


def _with_article(fill: str) -> str:
    """A fill that begins with a or an, once, and the one that its next word wants."""
    found = _ARTICLE.match(fill)
    if found is None:
        return fill
    thing = fill[found.end() :]
    return f"{found[1]}{article(thing)[1:]} {thing}"


def _instruction(messages: Sequence[Message], masked: str, marker: str) -> list[Message]:
    """The conversation with the request to fill the gaps in the place of its last question, placeholders kept."""
    *before, last = messages
    text = _INSTRUCTION.format(question=message_text([last]).strip(), marker=marker, masked=masked)
    pictures = [block for block in last["content"] if block["type"] == "image"]
    return [*before, {"role": last["role"], "content": [*pictures, {"type": "text", "text": text}]}]
