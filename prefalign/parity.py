"""Do two short answers say the same, and what a pseudo annotator wrote: the string work of MPA (arXiv 2509.16633).

Answers are compared token by token. Letters of any script with their vowel signs make words (scripts without blanks: a token a
letter); a number keeps its sign, decimal point, percent or currency sign; articles do not count, number words are digits.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

TASK_PROMPTS = {
    "text": (
        "Look for text in this picture: signs, labels, screens, print. Write one question that can only be answered by reading "
        "it, and its answer as it is written there, in a few words at most."
    ),
    "chart": (
        "This picture shows a chart. Write one question about it that takes reading values off the chart, comparing them or a "
        "short calculation, and its answer as a single number or label."
    ),
    "knowledge": (
        "Write one question about something in this picture that takes knowledge of the world beyond what can be seen, and its "
        "answer in one to three words."
    ),
    "general": (
        "Write one question about this picture that has exactly one right answer, which can be seen in it, and the answer in one "
        "to three words."
    ),
}
"""What the pseudo annotator is asked for, by task (our wording of the paper's kinds)."""

FORM = "Reply with two lines and nothing else:\nQuestion: <the question>\nAnswer: <the answer>"
_PARTS = re.compile(
    r"^[\W\d]*question\W*?:[ \t*]*(?P<question>\S.*?)\s*^[\W\d]*answer\W*?:[ \t*]*(?P<answer>[^\n]*)",
    re.I | re.M | re.S,
)
_NUMBER = re.compile(
    r"(?P<sign>-?)(?P<before>[$\u00a3\u00a5\u20ac]?)(?P<digits>\d+(?:[.,]\d+)*|\.\d+)[ \t]?(?P<after>[%$\u00a3\u00a5\u20ac]?)"
)
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ARTICLES = frozenset(("a", "an", "the"))
_YES_NO = frozenset(("yes", "no"))
_NOT = frozenset(("not", "no", "never", "isn't", "aren't", "wasn't", "weren't"))
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_REFUSAL = re.compile(
    r"\bi(?:'m| am) (?:sorry|not sure|unable)|\bas an ai\b|\bi (?:can't|cannot|can not|do not know|don't know)|"
    r"\b(?:cannot|can't|can not) be (?:answered|determined|seen|read)|\bunanswerable\b|\bno answer\b|\bunknown\b|"
    r"\bnot (?:enough information|possible to (?:tell|say)|visible|clear)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Number:
    """A number in an answer: its value, and its unit sign (`%` or a currency, "" for none); `exact`: a year, say."""

    value: float
    unit: str = ""
    exact: bool = False


Token = str | Number


def tokens(text: str) -> list[Token]:
    """The words and numbers of an answer, to compare.

    Example:
        >>> tokens("The red car, 1.5 m")
        ['red', 'car', Number(value=1.5, unit='', exact=False), 'm']
    """
    text = unicodedata.normalize("NFKC", text.replace("\u2212", "-")).casefold().replace("\u2019", "'")
    found: list[Token] = []
    position = 0
    while position < len(text):
        number = _NUMBER.match(text, position) if not text[position].isspace() else None
        if number and number["sign"] and position and text[position - 1].isalnum():
            number = None  # the hyphen of "7-11"
        if number:
            found.append(_number(number))
            position = number.end()
        elif _in_word(text[position]):
            end = position + 1
            while end < len(text) and _continues(text, position, end):
                end += 1
            word = text[position:end]
            found.append(Number(float(_WORDS.index(word))) if word in _WORDS else word)
            position = end
        else:
            position += 1
    return [token for token in found if token not in _ARTICLES] or found


def _in_word(letter: str) -> bool:
    return letter.isalnum() or unicodedata.category(letter).startswith("M")


def _continues(text: str, start: int, end: int) -> bool:
    if unicodedata.category(text[end]).startswith("M"):
        return True
    if text[end] == "'" and end + 1 < len(text):
        return text[end + 1].isalpha()
    return text[end].isalnum() and not _UNSPACED.match(text[end]) and not _UNSPACED.match(text[start])


def _number(found: re.Match[str]) -> Number:
    digits = found["digits"]
    parts = re.split("[.,]", digits.replace(",", "") if _GROUPED.fullmatch(digits) else digits)
    value = float(".".join(parts) if len(parts) == 2 else "".join(parts))
    named = len(parts) > 2 or re.fullmatch(r"[12]\d{3}", digits) is not None  # a date, a version, a year
    return Number(-value if found["sign"] else value, found["before"] or found["after"], named)


def matches(
    wanted: str, said: str, *, tolerance: float = 0.0, most_words: int | None = None, whole: bool = False
) -> bool:
    """Whether an answer gives the wanted one: its tokens follow one another in it.

    Args:
        wanted: the short answer.
        said: the answer that is looked at. If "yes" or "no" is wanted it has to begin with that and hold no other one. One that
            offers a choice ("red or blue") or denies it ("not red") does not give it.
        tolerance: relative difference up to which two numbers are the same (years, dates and versions: none).
        most_words: an answer of more tokens gives none; None: of any length.
        whole: the answer must hold nothing else.

    Returns:
        False where nothing is wanted, since an empty text is in every other.

    Example:
        >>> matches("no", "snow"), matches("1", "10"), matches("15", "1.5"), matches("red car", "A red car.")
        (False, False, False, True)
    """
    inner, outer = tokens(wanted), tokens(said)
    if not inner or (most_words is not None and len(outer) > most_words):
        return False
    if whole:
        return len(inner) == len(outer) and all(map(_same, inner, outer, [tolerance] * len(inner)))
    if len(inner) == 1 and inner[0] in _YES_NO:
        return outer[:1] == inner and len(_YES_NO & {token for token in outer if isinstance(token, str)}) == 1
    if "or" in outer and "or" not in inner:
        return False
    return any(
        all(_same(one, other, tolerance) for one, other in zip(inner, outer[start:], strict=False))
        and (start == 0 or outer[start - 1] not in _NOT)
        for start in range(len(outer) - len(inner) + 1)
    )


def _same(wanted: Token, said: Token, tolerance: float) -> bool:
    if not isinstance(wanted, Number) or not isinstance(said, Number):
        return wanted == said
    if wanted.unit != said.unit:
        return False
    allowed = 0.0 if wanted.exact or said.exact else tolerance * abs(wanted.value)
    return abs(wanted.value - said.value) <= allowed + 1e-9 * abs(wanted.value)


def released_match(wanted: str, said: str) -> bool:
    """The rule of the authors' code (vl2g/MPA, `PI.py`): without white space and marks, one text is inside the other.

    So "no" is in "snow", "1" in "10", "15" in "1.5", and nothing at all in everything.
    """
    return re.sub(r"\W", "", wanted.lower()) in re.sub(r"\W", "", said.lower())


def words_of(text: str) -> int:
    """Number of tokens of an answer."""
    return len(tokens(text))


def read_annotation(reply: str) -> tuple[str, str] | None:
    """Question and answer in an annotator's reply, which begin lines with "Question:" and "Answer:".

    Returns:
        The question as it was written, its question mark too, on one line; the answer, "" if there is none. None for a reply
        without the two.
    """
    found = _PARTS.search(reply)
    if found is None:
        return None
    return " ".join(found["question"].strip("* ").split()), found["answer"].strip().strip("*").strip()


def is_refusal(text: str) -> bool:
    """Whether an answer says that it gives none."""
    return _REFUSAL.search(text.replace("\u2019", "'")) is not None


def with_request(question: str, request: str) -> str:
    """A question with the request for a short answer after it, and a blank between (the authors' code leaves it out)."""
    return f"{question.strip()} {request.strip()}".strip()


def within_pixels(image: Image.Image, least: int | None, most: int | None) -> Image.Image:
    """A picture enlarged or shrunk, in proportion, to hold at least and at most so many pixels; itself if it does."""
    count = image.width * image.height
    target = least if least is not None and count < least else most if most is not None and count > most else count
    if target == count:
        return image
    scale = (target / count) ** 0.5
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size)
