"""Texts with gaps in them: markers put in, filled, and a text with markers laid over one without. Positions are characters."""

from __future__ import annotations

import re
from collections.abc import Sequence

Span = tuple[int, int]

TOKEN = re.compile(
    r"\n+|\d+(?:[.,:]\d+)+\w*(?:[-'\u2019]\w+)*"  # 3.5, 1,000, 10:30
    r"|[^\W\d_](?:\.[^\W\d_])+(?!\w)(?:\.(?=[ \t]*[a-z,;:]))?"  # a.m, U.S. within a sentence
    r"|\w+(?:[-'\u2019]\w+)*|[^\w\s]"
)
ENDING = re.compile("[.!?\u3002\uff01\uff1f]+[\"')\\]*\u2019\u201d]*$")


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
