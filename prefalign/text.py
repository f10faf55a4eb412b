"""Sentences, splits, swaps, diffs and similarity of answers, JSON in them: plain string work, no model.

A sentence keeps the blanks that follow it, so the parts of a text always join to the text itself.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Similarity = Callable[[list[str], list[str]], list[float]]
"""Takes two lists of N texts, gives N cosine similarities in [-1, 1]."""

_CLOSERS = "\"')\\]*\u2019\u201d"
_END = re.compile(rf"(?:[.!?]+[{_CLOSERS}]*(?=\s|$))|[\u3002\uff01\uff1f]+[{_CLOSERS}]*|\n")
_NEVER_LAST = frozenset(
    ("mr", "mrs", "ms", "dr", "prof", "st", "mt", "figs", "vs", "e.g", "i.e", "cf", "approx", "ca", "al")
)
_MAYBE_LAST = frozenset(("etc", "a.m", "p.m", "u.s", "u.k", "inc", "ltd", "co", "jr", "sr"))
_LAST_WORD = re.compile(r"[^\s(\[\"'\u201c\u2018]+$")
_LIST_MARK = re.compile(r"(?:^|\n[ \t]*)(?:\d{1,3}|[A-Za-z])$")
_YES_NO = re.compile(r"(\s*)(yes|no|Yes|No)(?![\w-])")
_OPPOSITE = {"yes": "no", "no": "yes", "Yes": "No", "No": "Yes"}
_LOOSE_MARK = re.compile(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)")
_DIFF_PIECE = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")


def split_sentences(text: str) -> list[str]:
    """Cut a text into sentences; each keeps the white space after it.

    A sentence ends at a run of `.`, `!`, `?` (and closing quotes) that white space or the end of the text follows, and at
    a newline. Decimals, abbreviations, initials and the numbers of a list end none.

    Returns:
        Parts with `"".join(parts) == text`; none for an empty text.

    Example:
        >>> split_sentences("It is 3.5 m tall. Dr. Who?!  Yes")
        ['It is 3.5 m tall. ', 'Dr. Who?!  ', 'Yes']
    """
    parts = []
    start = 0
    for end in _ends(text):
        if end <= start:
            continue
        stop = end
        while stop < len(text) and text[stop].isspace():
            stop += 1
        parts.append(text[start:stop])
        start = stop
    if start < len(text):
        parts.append(text[start:])
    return parts


def first_sentence(text: str) -> str:
    """The text up to and including its first sentence end, without the white space after it; else all of it.

    Leading white space is kept and ends nothing. In a text that still grows, an end is certain once something follows it, that is
    when `first_sentence(text) != text` ("3." may become "3.5", and "Dr." ends nothing).

    Example:
        >>> first_sentence(" a red cat. It sleeps.")
        ' a red cat.'
    """
    for end in _ends(text):
        return text[:end].rstrip()
    return text


def _ends(text: str) -> Iterator[int]:
    """Index just after each sentence end (after its closing quotes; after the newline that ends an open line)."""
    begin = len(text) - len(text.lstrip())
    for found in _END.finditer(text, begin):
        if found[0] == "\n" or not _goes_on(text, found):
            yield found.end()


def _goes_on(text: str, found: re.Match[str]) -> bool:
    """Whether the full stop found is one of an abbreviation, an initial, a list number or a trailing-off."""
    marks = found[0].rstrip("\"')]*\u2019\u201d")
    rest = text[found.end() :]
    following = rest.lstrip(" \t\r")
    if not rest or following[:1] == "\n":
        return False
    if marks == "...":
        return not following or following[0].islower()
    if marks != ".":
        return False
    before = text[: found.start()]
    if _LIST_MARK.search(before):
        return True
    word = _LAST_WORD.search(before)
    if word is None:
        return False
    name = word[0].lower()
    if name in _MAYBE_LAST:
        return not following[:1].isupper()
    return name in _NEVER_LAST or (len(word[0]) == 1 and word[0].isupper() and word[0] != "I")


def split_inside(sentence: str, rng: random.Random) -> tuple[str, str]:
    """Cut a sentence between two of its words, at a place drawn evenly among the inner ones.

    Args:
        sentence: the sentence; words are what white space separates.
        rng: source of the draw.

    Returns:
        `(head, tail)` with `head + tail == sentence`; the blanks at the cut begin the tail. Fewer than two words: the head is
        empty.
    """
    words = list(re.finditer(r"\S+", sentence))
    if len(words) < 2:
        return "", sentence
    cut = words[rng.randint(1, len(words) - 1) - 1].end()
    return sentence[:cut], sentence[cut:]


def swap_yes_no(sentence: str) -> str | None:
    """The sentence with its leading yes or no (lower case or capitalised) replaced by the opposite; None without one."""
    found = _YES_NO.match(sentence)
    if found is None:
        return None
    return found[1] + _OPPOSITE[found[2]] + sentence[found.end() :]


def normalised(text: str) -> str:
    """Case, white space and punctuation taken away (a point between digits stays), to compare answers."""
    return " ".join(_LOOSE_MARK.sub(" ", text.casefold()).split())


def same_answer(one: str, other: str) -> bool:
    """Whether two answers differ at most in case, white space and punctuation."""
    return normalised(one) == normalised(other)


def word_diff(before: str, after: str) -> list[tuple[str, str]]:
    """Word-level difference of two texts. Words are the same whatever blanks follow them; blanks that differ are pieces too.

    Returns:
        `(op, text)` pieces with op `same`, `removed` or `added`: those not added join to `before`, those not removed to
        `after`.

    Example:
        >>> word_diff("a red cat", "a blue cat")
        [('same', 'a '), ('removed', 'red '), ('added', 'blue '), ('same', 'cat')]
    """
    old, new = _DIFF_PIECE.findall(before), _DIFF_PIECE.findall(after)
    bare_old, bare_new = [piece.rstrip() for piece in old], [piece.rstrip() for piece in new]
    found: list[tuple[str, str]] = []
    for op, i1, i2, j1, j2 in difflib.SequenceMatcher(None, bare_old, bare_new, autojunk=False).get_opcodes():
        if op != "equal":
            found += [("removed", "".join(old[i1:i2])), ("added", "".join(new[j1:j2]))]
            continue
        for one, other in zip(old[i1:i2], new[j1:j2], strict=True):
            shared = one if one == other else one.rstrip()
            found += [("same", shared), ("removed", one[len(shared) :]), ("added", other[len(shared) :])]
    pieces = []
    for _, run in itertools.groupby((piece for piece in found if piece[1]), key=lambda piece: piece[0] == "same"):
        joined = {"same": "", "removed": "", "added": ""}
        for kind, text in run:
            joined[kind] += text
        pieces += [(kind, text) for kind, text in joined.items() if text]
    return pieces


def lexical_similarity(one: Sequence[str], other: Sequence[str]) -> list[float]:
    """Cosine similarity of word and word-pair counts, offline and exact.

    Each word and each pair of neighbouring words is one dimension with weight 1 + ln(count), so that what a text repeats
    (there is a ... at the ...) does not drown what it says.

    Args:
        one: N texts.
        other: N texts to compare them with, in order.

    Returns:
        N values in [0, 1]; 1 for two texts without words.
    """
    return [_cosine(_weights(a), _weights(b)) for a, b in zip(one, other, strict=True)]


def _weights(text: str) -> dict[tuple[str, ...], float]:
    words = normalised(text).split()
    counts: Counter[tuple[str, ...]] = Counter((word,) for word in words)
    counts.update(itertools.pairwise(words))
    return {key: 1 + math.log(count) for key, count in counts.items()}


def _cosine(one: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    if one == other:
        return 1.0
    if not one or not other:
        return 0.0
    dot = math.fsum(weight * other[key] for key, weight in one.items() if key in other)
    return dot / math.sqrt(math.fsum(w * w for w in one.values()) * math.fsum(w * w for w in other.values()))


def load_similarity(name: str = "lexical") -> Similarity:
    """A similarity of answers by name.

    Args:
        name: `lexical` (offline, `lexical_similarity`) or a sentence-transformers model (BDHS used `all-mpnet-base-v2`,
            arXiv 2407.02477 appendix E.2).

    Raises:
        ImportError: for a sentence-transformers model where that library is not installed.
    """
    if name == "lexical":
        return lexical_similarity
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"similarity {name!r} is a sentence-transformers model and that library is not installed. Run "
            '`pip install "prefalign[similarity]"` (in a checkout: `pip install -e ".[similarity]"`), or give '
            "`--similarity lexical`, which needs nothing."
        ) from error
    model = SentenceTransformer(name)

    def similarity(one: list[str], other: list[str]) -> list[float]:
        ours = model.encode(one, normalize_embeddings=True, show_progress_bar=False)
        theirs = model.encode(other, normalize_embeddings=True, show_progress_bar=False)
        return [float(value) for value in (ours * theirs).sum(axis=1)]

    return similarity


def json_objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text that are in no other one; none that has a key twice."""
    decoder = json.JSONDecoder(object_pairs_hook=_no_key_twice)
    found, position = [], text.find("{")
    while position >= 0:
        try:
            entry, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):  # the latter of brackets in brackets, a thousand deep
            end = position + 1
        else:
            found.append(entry)
        position = text.find("{", end)
    return found


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)
