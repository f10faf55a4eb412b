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

from prefalign.english import NUMBERS
from prefalign.evals import yesno
from prefalign.rewards.denial import CERTAIN, denied
from prefalign.rewards.shaping import read_choice
from prefalign.rule_editor import Vocabulary

_UNSURE = re.compile(
    r"\b(?:(?:not|un)[ -]?(?:sure|certain)|(?:don't|do not|cannot|can't) (?:really )?(?:know|tell|say)|hard to (?:say|tell))\b"
)
_NUMBERS = NUMBERS[:13]
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


def _number(text: str) -> int | None:
    plain = re.sub(r"\b(?:no one|none|nothing|there (?:are|is) no|no)\b", "zero", text.lower())
    found = re.findall(rf"(?<!\d[.,])\b(\d+|{'|'.join(_NUMBERS)})\b(?![.,]\d)", plain)
    numbers = {int(word) if word.isdigit() else _NUMBERS.index(word) for word in found}
    return numbers.pop() if len(numbers) == 1 else None


def count(text: str, variable: str, rules: Mapping[str, Any]) -> str | None:
    """The one number that an answer says."""
    number = _number(text)
    return None if number is None else str(number)


def some_or_none(text: str, variable: str, rules: Mapping[str, Any]) -> str | None:
    """Whether the one number that an answer says is 0 (`none`) or more (`some`)."""
    number = _number(text)
    return None if number is None else "some" if number else "none"


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
