"""Do two short answers say the same, and what a pseudo annotator wrote: the string work of MPA (arXiv 2509.16633).

Answers are compared token by token. Letters of any script with their vowel signs make words (scripts without blanks: a token a
letter); a number is one token, however many words say it, with its sign, decimal point and unit (percent or a currency, as sign
or word); one that cannot be read surely ("1/2", "10:30", "ten thirty", "two dozen") is the same as itself alone. Articles,
accents of Latin letters, apostrophes, and British or American spelling do not count.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from prefalign.english import AMOUNTS, ARTICLES, NUMBERS, ORDINALS, SCALES, TENS, read_number

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
    r"^[\W\d]*question\W*?:[ \t*]*(?P<question>\S.*?)(?:\s*^[\W\d]*|(?<=[?.!;])[ \t*]+)answer\W*?:[ \t*]*"
    r"(?:\n[\s*]*(?![\W\d]*question\W*?:))?(?P<answer>[^\n]*)",
    re.I | re.M | re.S,
)
_SIGNS = "%$\u00a3\u00a5\u20ac"
_UNITS = {
    "%": r"percent|per cent|pct", "$": "dollars?|usd", "\u00a3": "pounds?|gbp", "\u00a5": "yen|jpy", "\u20ac": "euros?|eur",
}  # fmt: skip
_UNIT = re.compile("|".join(rf"(?P<u{ord(sign):x}>{words})\b" for sign, words in _UNITS.items()))
_SCALE = "|".join(SCALES)
_WORD = rf"(?:{'|'.join((*NUMBERS, *TENS, *SCALES, *AMOUNTS))}|(?:{'|'.join(ORDINALS)})s?)(?![\w'])"
_AFTER_SCALE = "|".join(f"(?<={scale})" for scale in SCALES)
_JOIN = rf"(?:[ -]|(?:{_AFTER_SCALE})(?:,| and|, and) | and (?=an? (?:half|quarter)\b))(?:an? )?"
_FIGURES = r"(?:\d+(?:[.,/:-]\d+)*|\.\d+)(?: \d{3}(?!\d)(?:[.,]\d+)?)*(?: \d+/\d+)?(?:(?:st|nd|rd|th|k)\b)?"
_NUMBER = re.compile(
    rf"(?P<sign>-|(?:minus|negative) )?(?P<before>[{_SIGNS[1:]}]?)"
    rf"(?P<said>(?:{_FIGURES}|(?:a (?={_SCALE}))?{_WORD})(?:(?:{_JOIN}|(?<=\d)){_WORD})*)"
)
_DIGITS = re.compile(
    rf"(?P<digits>(?P<grouped>\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?)|\d*[.,]?\d+)(?:[ -]?(?P<scale>{_SCALE}))?"
)
_YES_NO = frozenset(("yes", "no"))
_NOT = frozenset(
    ("not", "never", "neither", "nor", "none", "nothing", "nobody", "nowhere", "without", "hardly", "cannot", "cant", "dont",
     "doesnt", "didnt", "isnt", "arent", "wasnt", "werent", "wont", "wouldnt")
)  # fmt: skip
_OR = re.compile(r"\bor\b", re.IGNORECASE)
_SLASH = re.compile(r"(?<=[^\W\d]{3})\s?/\s?(?=(?:(?:an?|the)\s)?[^\W\d]{3})", re.IGNORECASE)
_CLAUSE = re.compile(r"[(),;]|\.\s")
_SPELLINGS = {
    "grey": "gray", "tyre": "tire", "kerb": "curb", "doughnut": "donut", "aeroplane": "airplane", "moustache": "mustache",
    "jewellery": "jewelry", "pyjamas": "pajamas", "aluminium": "aluminum",
}  # fmt: skip
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_REFUSAL = re.compile(
    r"\bi(?:'m| am) (?:sorry|not sure|unable)|\bas an ai\b|\bi (?:can't|cannot|can not|do not know|don't know)|"
    r"\b(?:cannot|can't|can not) be (?:answered|determined|seen|read)|\bunanswerable\b|"
    r"\bnot (?:enough information|possible to (?:tell|say)|visible|clear)\b",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(r"\b(?:unknown|no answer)\b", re.IGNORECASE)
_ONLY_UNKNOWN = re.compile(r"\W*(?:(?:it|this|the answer) is )?(?:unknown|no answer)\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """A number in an answer.

    Attributes:
        value: its value; what is written, if that cannot be read surely.
        unit: `%` or the sign of a currency, "" for none.
        exact: without tolerance: a year.
    """

    value: float | str
    unit: str = ""
    exact: bool = False


Token = str | Number


def tokens(text: str) -> list[Token]:
    """The words and numbers of an answer, to compare.

    Example:
        >>> tokens("The red car, 1.5 m")
        ['red', 'car', Number(value=1.5, unit='', exact=False), 'm']
        >>> tokens("a hundred and twenty-one percent") == tokens("121%"), tokens("$5 million") == tokens("5 million dollars")
        (True, True)
    """
    text = _FRACTION.sub(r" \g<0>", re.sub("[\u2212\u2013]", "-", text))  # else 2 and a half would become 21/2
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").replace("\u2044", "/")
    text = "".join(map(_without_accent, " ".join(text.split())))
    found: list[Token] = []
    position = 0
    while position < len(text):
        number = _NUMBER.match(text, position)
        if number and number["sign"] == "-" and position and text[position - 1].isalnum():
            number = None  # the hyphen of "7-11"
        if number:
            value, position = _number(number, text)
            found.append(value)
        elif _in_word(text[position]):
            end = position + 1
            while end < len(text) and _continues(text, position, end):
                end += 1
            found.append(_spelled(text[position:end].replace("'", "")))
            position = end
        else:
            position += 1
    return [token for token in found if token not in ARTICLES] or found


def _without_accent(letter: str) -> str:
    plain = unicodedata.normalize("NFD", letter)[0]
    return plain if plain.isascii() and plain.isalpha() else letter


def _spelled(word: str) -> str:
    """A word as Americans spell it; of a word that both spell alike it need not be one."""
    word = re.sub("(?<=..)our(?=(?:s|ed|ing|ful)?$)", "or", word)
    return _SPELLINGS.get(word, re.sub("(?<=..)tre(s?)$", r"ter\1", word))


def _in_word(letter: str) -> bool:
    return letter.isalnum() or unicodedata.category(letter).startswith("M")


def _continues(text: str, start: int, end: int) -> bool:
    if unicodedata.category(text[end]).startswith("M"):
        return True
    if text[end] == "'" and end + 1 < len(text):
        return text[end + 1].isalpha()
    return text[end].isalnum() and not _UNSPACED.match(text[end]) and not _UNSPACED.match(text[start])


def _number(found: re.Match[str], text: str) -> tuple[Number, int]:
    """A number with the unit after it, and where it ends."""
    said, unit, end = found["said"], found["before"] or "", found.end()
    after = end + (text[end : end + 1] in (" ", "-"))
    if after < len(text) and text[after] in _SIGNS and not re.match(r"\d", text[after + 1 :]):
        unit, end = unit or text[after], after + 1
    elif word := _UNIT.match(text, after):
        unit, end = unit or chr(int(str(word.lastgroup)[1:], 16)), word.end()
    value = _value(said)
    if found["sign"]:
        value = f"-{value}" if isinstance(value, str) else -value
    return Number(value, unit, re.fullmatch(r"[12]\d{3}", said) is not None), end  # a year


def _value(said: str) -> float | str:
    """The value of a number; itself if it may be more than one number or none."""
    if found := _DIGITS.fullmatch(said):
        digits = found["digits"].replace(",", "" if found["grouped"] else ".")
        return float(digits) * (SCALES[found["scale"]] if found["scale"] else 1)
    read = read_number(said)
    return said if read is None else float(read)


def matches(
    wanted: str, said: str, *, tolerance: float = 0.0, most_words: int | None = None, whole: bool = False
) -> bool:
    """Whether an answer gives the wanted one: its tokens follow one another in it.

    Args:
        wanted: the short answer.
        said: the answer that is looked at. If "yes" or "no" is wanted it has to begin with that and hold no other one. One that
            offers a choice ("red or blue", "red/blue") or denies it ("not really red", "nothing is red") does not give it; a
            denial ends with "but". One
            that is `undecided` does not, either.
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
    if not inner or (most_words is not None and len(outer) > most_words) or undecided(wanted, said):
        return False
    if whole:
        return len(inner) == len(outer) and all(map(_same, inner, outer, [tolerance] * len(inner)))
    if len(inner) == 1 and inner[0] in _YES_NO:
        return outer[:1] == inner and len(_YES_NO & {token for token in outer if isinstance(token, str)}) == 1
    if len(choices(wanted)) == 1 and (_OR.search(said) or _beside_slash(wanted, said)):
        return False
    return any(
        all(_same(one, other, tolerance) for one, other in zip(inner, outer[start:], strict=False))
        and not _denied(outer[:start])
        for start in range(len(outer) - len(inner) + 1)
    )


def choices(text: str) -> list[str]:
    """What an answer offers to choose from: the parts between "or" and slashes that stand between words of three letters or more.

    Example:
        >>> choices("red or blue"), choices("blue/red"), choices("60 km/h")
        (['red ', ' blue'], ['blue', 'red'], ['60 km/h'])
    """
    return [part for half in _OR.split(text) for part in _SLASH.split(half)]


def _beside_slash(wanted: str, said: str) -> bool:
    """Whether the wanted answer stands in a clause that offers a choice: "red/dark blue", not "2019" in "May 2019 (UTC/GMT)"."""
    inner = tokens(wanted)
    offers = [tokens(clause) for clause in _CLAUSE.split(said) if _SLASH.search(clause)]
    return any(inner == offer[at : at + len(inner)] for offer in offers for at in range(len(offer)))


def _denied(before: Sequence[Token]) -> bool:
    """Whether what follows these tokens is denied; the "no" that begins an answer speaks of another thing ("No, it is red")."""
    if "but" in before:
        before = before[len(before) - list(reversed(before)).index("but") :]
    return any(token in _NOT for token in before) or "no" in before[1:] or list(before) == ["no"]


def _same(wanted: Token, said: Token, tolerance: float) -> bool:
    if not isinstance(wanted, Number) or not isinstance(said, Number):
        return wanted == said
    if isinstance(wanted.value, str) or isinstance(said.value, str) or wanted.unit != said.unit:
        return wanted == said
    allowed = 0.0 if wanted.exact or said.exact else tolerance * abs(wanted.value)
    return abs(wanted.value - said.value) <= allowed + 1e-9 * abs(wanted.value)


def undecided(one: str, other: str) -> bool:
    """Whether rules cannot tell if two answers differ: both hold numbers, not the same, and one of these cannot be read surely.

    Example:
        >>> undecided("1:30", "half past one"), undecided("24", "two dozen"), undecided("24", "25"), undecided("half", "red")
        (True, True, False, False)
    """
    numbers = [[token for token in tokens(text) if isinstance(token, Number)] for text in (one, other)]
    unread = any(isinstance(number.value, str) for found in numbers for number in found)
    return unread and all(numbers) and numbers[0] != numbers[1]


def released_match(wanted: str, said: str) -> bool:
    """The rule of the authors' code (vl2g/MPA, `PI.py`): without white space and marks, one text is inside the other.

    So "no" is in "snow", "1" in "10", "15" in "1.5", and nothing at all in everything.
    """
    return re.sub(r"\W", "", wanted.lower()) in re.sub(r"\W", "", said.lower())


def words_of(text: str) -> int:
    """Number of tokens of an answer."""
    return len(tokens(text))


def read_annotation(reply: str) -> tuple[str, str] | None:
    """Question and answer in an annotator's reply, after "Question:" and "Answer:", on one line or on several.

    Returns:
        The question as it was written, its question mark too, on one line; the answer, "" if there is none. None for a reply
        without the two.
    """
    found = _PARTS.search(reply)
    if found is None:
        return None
    return " ".join(found["question"].strip("* ").split()), found["answer"].strip().strip("*").strip()


def is_refusal(text: str, *, read: bool = False) -> bool:
    """Whether an answer says that it gives none.

    Args:
        text: the answer.
        read: it may be written in the picture, as "Unknown Soldier" or "No Answer Road": these words refuse alone only.

    Example:
        >>> is_refusal("The author is unknown."), is_refusal("Unknown Soldier", read=True), is_refusal("unknown", read=True)
        (True, False, True)
    """
    if _REFUSAL.search(text.replace("\u2019", "'")):
        return True
    return (_ONLY_UNKNOWN.fullmatch(text) if read else _UNKNOWN.search(text)) is not None


def with_request(question: str, request: str) -> str:
    """A question with the request for a short answer after it, and a blank between (the authors' code leaves it out)."""
    return f"{question.strip()} {request.strip()}".strip()
