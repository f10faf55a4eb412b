"""How the answer to one question is read as a category: by phrases, or by a function that reads a number, a list or an option.

A text is read by whole words and phrases: a phrase that is negated ("no clot") is not said, the longest phrase at a place counts
("no abnormal cells" names no abnormal cells), and a text that says two categories, none, or that it does not know, abstains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from prefalign.english import NUMBERS, SCALES, TENS, read_number
from prefalign.evals import yesno
from prefalign.rewards.denial import CERTAIN, denied
from prefalign.rewards.shaping import read_choice
from prefalign.rule_editor import Vocabulary

_UNSURE = re.compile(
    r"\b(?:(?:not|un)[ -]?(?:sure|certain)|(?:don't|do not|cannot|can't) (?:really )?(?:know|tell|say)|hard to (?:say|tell)|"
    r"yes ?(?:or|and|/) ?no)\b"
)
_LEADS = re.compile(  # not "No stars are there"
    r"\W*(?:(?P<yes>yes|yeah|yep)|(?P<no>no|nope))"
    r"(?=\W*$|\s*[,.;:!]|\s+-|\s+(?:there|it|i|the|that|this|these|they|you|we|an?)\b)[,.;:!]?\s*"
)
_STATES = re.compile(r"there(?:'s| is| are| isn't| aren't) (?:no|not|an?|any|one)\b|no \w")
_WORDS = "|".join((*NUMBERS, *TENS, *SCALES))
_RUN = rf"(?:a (?=hundred|thousand|million))?(?:{_WORDS})(?:(?:[ -]|[ -]and[ -])(?:{_WORDS}))*"
_NUMBER = rf"(?<!\d[.,])\b(?:\d+|{_RUN})\b(?![.,]\d)"
_SPELLED = {"half a dozen": "six", "a dozen": "twelve", "a single": "one", "one single": "one"}
_NEGATION = r"\b(?:not|cannot|never|\w+n't)\b"
_NOT_MISSING = re.compile(rf"(?:\bno\b|{_NEGATION})(?: \w+){{0,4}}? (?:missing|absent)\b")
_SEEN = "there|here|present|visible|shown|seen|in the|in this|at the|on the"
_ZERO = re.compile(
    r"\b(?:no one|none|nobody|nothing(?! but)|nowhere|there (?:are|is) no|no(?: single)?|neither|lacks?|"
    r"(?:is|are|seems?) (?:\w+ly )?(?:missing|absent)|(?:is|are|picture|image) without(?: any| an?)?)\b|"
    rf"{_NEGATION}(?: \w+ly| be)? (?:{_SEEN}|see|find|appear|contain|show|have|include)\b"
    r"(?: (?:an?|any|one)\b)?(?: single\b)?|"
    rf"{_NEGATION}(?: (?!but|only|just|merely|more|less|fewer|than)\w+){{0,4}}? (?:(?:a|one) single|any|an?|one)\b"
)
_ABOUT = re.compile(
    rf"(?<!no )(?<!not )\b(?:at least|more than|over|about|around|almost|nearly|roughly|approximately) {_NUMBER}"
)
_NOT_SO_MANY = re.compile(
    rf"(?:{_NEGATION}(?: \w+){{0,3}}|\b(?:at most|up to|(?:more|fewer|less) than)) (?!zero){_NUMBER}|"
    rf"{_NUMBER} (?:dozen|and a half)"
)
_A_FEW = r"(?:some|several|many|multiple|numerous|plenty|lots|a lot|(?:quite )?a few|few|a couple|dozens|hundreds)"
_SOME = re.compile(
    r"\b(?:there(?:'s| is| are)|sees?|shows?|contains?|includes?|has|have)(?: \w+ly| also| indeed)?"
    rf" (?:an?|{_A_FEW})\b|^{_A_FEW}\b|\bthere are (?!only|just|other)(?:\w+ )?\w+s\b|"
    r"^(?:just |only )?an? (?!.*\b(?:picture|image|photo|scene)\b)(?:\w+ ){0,2}\w+\W*$"  # "A red star."
)
_IS_SEEN = re.compile(rf"\b(?:is|are) (?:\w+ly )?(?:{_SEEN}|to be seen)\b")
_MAYBE = re.compile(r"\b(?:if|whether|maybe|perhaps|possibly|may|might|could be)\b")
_LIST_VERB = re.compile(r"\b(?:are|is|shows?|sees?|includes?|contains?)\b")
_NO_THING = re.compile(
    r"(?:^|\b(?:there|here|it|this|these|they|i|we|you|picture|image|photo|photograph|scene|list|answer)|"
    r"\b(?:things|objects|items|animals)\b.*)(?: can| could| also)?\s*$"
)
_COLOURS = "|".join(
    [*Vocabulary().attributes["colour"], "black", "white", "gr[ae]y", "brown", "pink", "beige", "gold", "silver"]
)
_TWO_COLOURED = re.compile(rf"\b(?:{_COLOURS})(?:, (?:{_COLOURS}))*,? and (?={_COLOURS})")
Reader = Callable[[str, str, Mapping[str, Any]], "str | None"]
"""Takes an answer, the variable asked for and `facts["rules"]`; gives the category, or None."""


@dataclass(frozen=True)
class Variable:
    """What one of the linked questions asks for.

    Attributes:
        phrases: regular expressions by category, in lower case, put between word boundaries.
        opposites: what a negated category says ("not suitable" is bad); a category without one says nothing when negated.
        strong: categories that count alone, whatever else is said.
        weak: categories that count only if nothing else is said.
        read: a function that reads answers instead of phrases.
        closed: the categories that `read` gives; none: open, or by the row.
    """

    phrases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    opposites: Mapping[str, str] = field(default_factory=dict)
    strong: tuple[str, ...] = ()
    weak: tuple[str, ...] = ()
    read: Reader | None = None
    closed: tuple[str, ...] = ()

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        named = [(phrase, category) for category, phrases in self.phrases.items() for phrase in phrases]
        named.sort(key=lambda entry: -len(entry[0]))
        groups = "|".join(
            f"(?P<_{list(self.phrases).index(category)}_{number}>{phrase})"
            for number, (phrase, category) in enumerate(named)
        )
        return re.compile(rf"(?<![\w-])(?:{groups})(?![\w-])")

    def parse(self, text: str) -> str | None:
        """The category that a text says by the phrases; None if it abstains."""
        plain = CERTAIN.sub("", " ".join(text.lower().replace("\u2019", "'").split()))
        if _UNSURE.search(plain):
            return None
        said = set()
        for found in self._pattern.finditer(plain):
            category = list(self.phrases)[int(str(found.lastgroup).split("_")[1])]
            said_not = denied(plain, found.start(), found.end())
            if said_not is None:
                return None
            if said_not:
                said |= {self.opposites[category]} if category in self.opposites else set()
            else:
                said.add(category)
        for strong in self.strong:
            if strong in said:
                return strong
        said = (said - set(self.weak)) or said
        return said.pop() if len(said) == 1 else None


def yes_no(text: str, variable: str, rules: Mapping[str, Any]) -> str | None:
    """Whether an answer says yes or no."""
    return yesno.robust(text)


def exists(text: str, variable: str, rules: Mapping[str, Any]) -> str | None:
    """Whether an answer says that a thing is there: by the yes or no that it begins with, else by its statement."""
    plain = _plain(text)
    said = _presence(plain, {"some": "yes", "none": "no"}, firm="no")
    nothing_said = said is None and not _LEADS.match(plain) and not _numbers(plain)
    return yesno.robust(text) if nothing_said else said  # "It does not."


def absent(text: str, variable: str, rules: Mapping[str, Any]) -> str | None:
    """Whether an answer says that a thing is not there: "Yes." and "There is no star." do, "There is a star." is no."""
    return _presence(_plain(text), {"some": "no", "none": "yes"})


def _presence(plain: str, meaning: Mapping[str, str], *, firm: str | None = None) -> str | None:
    """By what a text begins with, unless its statement contradicts that; `firm` is never contradicted: "No, there is a ring." """
    lead = _LEADS.match(plain)
    rest = plain[lead.end() :] if lead else plain
    stated = meaning.get(_some_or_none(rest, seen=True) or "")
    if lead is None:
        return stated
    contradicts = _STATES.match(rest) and stated not in (None, lead.lastgroup) and lead.lastgroup != firm
    return None if contradicts else lead.lastgroup


def number(text: str) -> int | None:
    """The one number that an answer says; "no", "none" and "not a single" are 0, "a star" and "several" are no number."""
    said = _numbers(_without_lead(text))
    return said.pop() if len(said) == 1 else None


def count(text: str, variable: str, rules: Mapping[str, Any]) -> str | None:
    """The one number that an answer says."""
    said = number(text)
    return None if said is None else str(said)


def some_or_none(text: str, variable: str, rules: Mapping[str, Any]) -> str | None:
    """Whether an answer says that there are none (`none`), or a number, "a star" or "several" (`some`)."""
    return _some_or_none(_without_lead(text))


def _plain(text: str) -> str:
    return CERTAIN.sub("", " ".join(text.lower().replace("\u2019", "'").split())).strip()


def _without_lead(text: str) -> str:
    """ "No, there are two." is about two."""
    plain = _plain(text)
    lead = _LEADS.match(plain)
    return plain[lead.end() :] or plain if lead else plain


def _numbers(plain: str) -> set[int | None]:
    """The numbers that a text says; among them None where one cannot be read or a negation may belong to it."""
    if _UNSURE.search(plain):
        return {None}
    plain = _with_zeros(plain)
    for words, short in _SPELLED.items():
        plain = re.sub(rf"\b{words}\b", short, plain)
    said = re.findall(_NUMBER, plain)
    unclear: set[int | None] = {None} if _NOT_SO_MANY.search(plain) else set()
    return unclear | {int(words) if words.isdigit() else read_number(words) for words in said}


def _with_zeros(plain: str) -> str:
    """A text with "zero" for what says that there are none."""
    return _ZERO.sub("zero", _NOT_MISSING.sub("is there", _ABOUT.sub("several", plain)))


def _some_or_none(plain: str, *, seen: bool = False) -> str | None:
    """With `seen`, "the star is at the top" counts, too."""
    numbers, zeros = _numbers(plain), _with_zeros(plain)
    if not numbers:
        told = _SOME.search(zeros) or (seen and _IS_SEEN.search(zeros))
        return "some" if told and not _MAYBE.search(plain) else None
    only = numbers.pop() if len(numbers) == 1 else None
    if only is None or (only == 0 and _SOME.search(zeros.partition("zero")[0])):  # "a circle, but no star"
        return None
    return "some" if only else "none"


def how_many_listed(text: str, variable: str, rules: Mapping[str, Any]) -> str | None:
    """How many things a text lists: its marked lines, or the parts of its first sentence."""
    lines = [line for line in text.splitlines() if re.match(r"\s*(?:[-*\u2022]|\d+[.)])\s+\S", line)]
    if lines:
        return str(len(lines))
    sentence = re.split(r"[.!?](?:\s|$)", text.strip())[0]
    if not sentence or _UNSURE.search(sentence.lower()):
        return None
    if re.match(r"\W*(?:none|nothing|there (?:is|are) (?:no|nothing)|no)\b", sentence.lower()):
        return "0"
    listed = sentence.lower().rsplit(":", 1)[-1]
    verb = None if ":" in sentence else _LIST_VERB.search(listed)
    if verb is not None:  # "there are a dog and a cat", "a dog and a cat are here"
        listed = listed[verb.end() :] if _NO_THING.search(listed[: verb.start()]) else listed[: verb.start()]
    listed = _TWO_COLOURED.sub(" ", listed)
    return str(len([part for part in re.split(r",\s*(?:and\s+)?|\s+and\s+|;", listed) if part.strip()]))


def option_taken(text: str, variable: str, rules: Mapping[str, Any]) -> str | None:
    """What the option that an answer takes says, by `rules["options"][variable]`."""
    options = rules["options"][variable]
    letter = read_choice(text, "".join(options))
    return None if letter is None else str(options[letter]).lower()


def value_named(text: str, variable: str, rules: Mapping[str, Any]) -> str | None:
    """Whether an answer names `rules["value"]` ("yes") or another of `rules["values"]` ("no")."""
    values = [str(value).lower() for value in rules["values"]]
    said = Variable({value: [re.escape(value)] for value in values}).parse(text)
    return None if said is None else "yes" if said == str(rules["value"]).lower() else "no"
