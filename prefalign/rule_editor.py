"""An editor without a model: puts mistakes into answers whose vocabulary it knows."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefalign.editors import Edit, EditItem
from prefalign.english import NUMBERS, article, plural
from prefalign.records import row_seed
from prefalign.text import split_sentences, swap_yes_no

KINDS = ("object", "attribute", "place", "relation", "count", "existence")
_ANYWHERE = "in the picture"


@dataclass
class Vocabulary:
    """The words a rule-based editor knows; the default is the embedded world's.

    Attributes:
        objects: name of each kind of object, with its other names.
        companions: for an object, those that are often seen with it.
        attributes: groups of words of which an object has one at a time; a group's name is its key in `facts["objects"]`.
        places: phrases for places; the place in `facts["objects"]` is the phrase after "the".
        opposites: relation phrases and what turns them around.
        numbers: number words from zero.
    """

    objects: dict[str, list[str]] = field(
        default_factory=lambda: {
            "circle": ["disc"], "square": ["box"], "triangle": [], "star": [], "cross": ["plus"], "ring": ["hoop"],
            "heart": [], "diamond": ["rhombus"],
        }
    )  # fmt: skip
    companions: dict[str, list[str]] = field(
        default_factory=lambda: {
            "circle": ["square"], "square": ["circle"], "triangle": ["star"], "star": ["triangle"], "cross": ["ring"],
            "ring": ["cross"], "heart": ["diamond"], "diamond": ["heart"],
        }
    )  # fmt: skip
    attributes: dict[str, list[str]] = field(
        default_factory=lambda: {
            "colour": ["red", "green", "blue", "yellow", "purple", "orange"],
            "size": ["small", "large"],
        }
    )
    places: list[str] = field(
        default_factory=lambda: [
            "at the top left", "at the top", "at the top right", "on the left", "in the centre", "on the right",
            "at the bottom left", "at the bottom", "at the bottom right",
        ]
    )  # fmt: skip
    opposites: dict[str, str] = field(
        default_factory=lambda: {
            "above": "below", "below": "above", "to the left of": "to the right of", "to the right of": "to the left of",
        }
    )  # fmt: skip
    numbers: list[str] = field(default_factory=lambda: list(NUMBERS[:10]))

    def __post_init__(self) -> None:
        stray = sorted({other for others in self.companions.values() for other in others} - set(self.objects))
        if not self.objects or stray:
            known = ", ".join(self.objects) or "nothing"
            raise ValueError(
                f"vocabulary: companions name {', '.join(stray) or 'nothing'}, and objects has {known}; an object that is to be "
                "written into answers must be known. Add it to `objects`."
            )
        words = [*self.objects, *self.places, *self.opposites, *self.numbers]
        words += [word for group in (*self.objects.values(), *self.attributes.values()) for word in group]
        capitals = [word for word in words if word != word.lower()]
        if capitals:
            raise ValueError(
                f"vocabulary: {capitals[0]!r} has capitals; words are found in any case: write them in lower case."
            )


@dataclass
class _Change:
    """A sentence after one edit; `added` begins at character `start` of it."""

    sentence: str
    removed: str
    added: str
    start: int


@dataclass
class _Mention:
    """An object a sentence speaks of: its name, and the spans of the whole phrase, its attributes and its noun."""

    name: str
    article: str
    start: int
    words: int
    noun: int
    end: int


class RuleEditor:
    """Puts mistakes into answers whose words it knows: an absent companion, a wrong attribute, place, number.

    What it writes is false by the row's `facts["objects"]` where those are given, and by the answer itself otherwise.
    At most one mistake goes into a sentence.
    """

    fingerprint = "rules"

    def __init__(
        self, vocabulary: Vocabulary, *, kinds: Sequence[str] = KINDS, injections: int = 1, seed: int = 0
    ) -> None:
        """Args:
            vocabulary: the words it knows.
            kinds: types of mistakes it may make, of `KINDS`.
            injections: mistakes per answer, fewer where an answer has no room for them.
            seed: seed of the stage.

        Raises:
            ValueError: for an unknown kind or no injection at all.
        """
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown or not kinds:
            raise ValueError(
                f"kinds {list(kinds)}: an editor makes mistakes of the types {', '.join(KINDS)}; name some of them."
            )
        if injections < 1:
            raise ValueError(f"injections {injections}: an edited answer needs at least 1 mistake.")
        self.vocabulary = vocabulary
        self.kinds = tuple(kinds)
        self.injections = injections
        self.seed = seed
        self._names = {word: name for name, others in vocabulary.objects.items() for word in (name, *others)}
        self._names |= {plural(word): name for word, name in list(self._names.items())}
        self._groups = {word: group for group, words in vocabulary.attributes.items() for word in words}
        words = _any_of(self._groups)
        self._mention = re.compile(
            rf"\b(?:(?P<article>an?|the|no) )?(?P<words>(?:(?:{words}) )*)(?P<noun>{_any_of(self._names)})\b",
            re.IGNORECASE,
        )
        self._attribute = re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
        self._place = re.compile(rf"\b(?:{_any_of(vocabulary.places)})(?! of\b)\b", re.IGNORECASE)
        self._relation = re.compile(rf"\b(?:{_any_of(vocabulary.opposites)})\b", re.IGNORECASE)
        numbers = _any_of(vocabulary.numbers)
        self._count = re.compile(rf"\b(is one|are (?:no|{numbers})) ({_any_of(self._names)})\b", re.IGNORECASE)
        self._number = re.compile(rf"(?:{numbers})(?=[.!]?$)", re.IGNORECASE)

    def edit(self, items: Sequence[EditItem]) -> list[Edit]:
        """One edit per item, in order; see `Editor`."""
        return [self._edit(item) for item in items]

    def _edit(self, item: EditItem) -> Edit:
        rng = random.Random(row_seed(self.seed, f"{item.id}/edit"))
        parts = split_sentences(item.answer)
        changes: dict[int, tuple[str, _Change]] = {}
        for _ in range(self.injections):
            kinds = list(self.kinds)
            rng.shuffle(kinds)
            order = [number for number in range(len(parts)) if number not in changes]
            rng.shuffle(order)
            found = self._first_change(kinds, order, parts, item, changes, rng)
            if found is None:
                break
            number, kind, change = found
            changes[number] = (kind, change)
        if not changes:
            return Edit(
                refused="nothing_to_edit", message="no word of the answer is one that the rules know how to change"
            )
        text = ""
        injected: list[dict[str, Any]] = []
        for number, part in enumerate(parts):
            if number in changes:
                kind, change = changes[number]
                lead = len(part) - len(part.lstrip())
                injected.append({"type": kind, "removed": change.removed, "added": change.added,
                                 "start": len(text) + lead + change.start})  # fmt: skip
                part = part[:lead] + change.sentence + part[len(part.rstrip()) :]
            text += part
        return Edit(text, injected, "+".join(entry["type"] for entry in injected))

    def _first_change(
        self,
        kinds: list[str],
        order: list[int],
        parts: list[str],
        item: EditItem,
        changes: Mapping[int, tuple[str, _Change]],
        rng: random.Random,
    ) -> tuple[int, str, _Change] | None:
        now = "".join(changes[number][1].sentence if number in changes else part for number, part in enumerate(parts))
        for kind in kinds:
            for number in order:
                change = getattr(self, f"_change_{kind}")(parts[number].strip(), item, now, rng)
                if change is not None:
                    return number, kind, change
        return None

    def _change_object(self, sentence: str, item: EditItem, now: str, rng: random.Random) -> _Change | None:
        """Speak of an absent object: in a sentence of its own after this one, or in the place of one that is there."""
        mentions = [mention for mention in self._mentions(sentence) if mention.article in ("a", "an")]
        absent = self._absent(item, now)
        if not mentions or not absent or swap_yes_no(sentence) is not None:
            return None
        name = rng.choice(absent)
        mention = rng.choice(mentions)
        alone = (
            len(mentions) == 1
            and mention.end - mention.start < len(sentence.rstrip(".!"))
            and self._place.search(sentence)
        )
        new = self._with_object(sentence, mention, name, rng if alone else None)
        if not alone:
            return _Change(
                new, sentence[mention.start : mention.end], _phrase_at(new, mention.start, name), mention.start
            )
        taken = {found[0].lower() for found in self._place.finditer(now)} | set(self._places_of(item, None))
        free = [place for place in self.vocabulary.places if place not in taken] or self.vocabulary.places
        new = self._place.sub(lambda found: _cased(rng.choice(free), found[0]), new, count=1)
        return _Change(f"{sentence} {new}", "", new, len(sentence) + 1)

    def _with_object(self, sentence: str, mention: _Mention, name: str, rng: random.Random | None) -> str:
        """The sentence with another object in a mention's place; with `rng`, its attributes drawn anew."""
        words = sentence[mention.words : mention.noun]
        if rng is not None:
            words = self._attribute.sub(
                lambda found: rng.choice(self.vocabulary.attributes[self._groups[found[0].lower()]]), words
            )
        before = _cased(article(words or name), sentence[mention.start :])
        return f"{sentence[: mention.start]}{before} {words.lower()}{name}{sentence[mention.end :]}"

    def _change_attribute(self, sentence: str, item: EditItem, now: str, rng: random.Random) -> _Change | None:
        """Another word of the same group, one that no object of that name has."""
        options = []
        for found in self._attribute.finditer(sentence):
            word = found[0].lower()
            group = self._groups[word]
            name = self._about(sentence, found.start())
            true = {str(thing.get(group)) for thing in _objects(item) if _name(thing) == name or name is None}
            options += [
                (found, other) for other in self.vocabulary.attributes[group] if other != word and other not in true
            ]
        if not options:
            return None
        found, other = rng.choice(options)
        return _replaced(sentence, found, other)

    def _change_place(self, sentence: str, item: EditItem, now: str, rng: random.Random) -> _Change | None:
        """Another place, one where no object of that name stands, and if possible one that the answer does not yet name."""
        options = []
        for found in self._place.finditer(sentence):
            true = {found[0].lower(), *self._places_of(item, self._about(sentence, found.start()))}
            options += [(found, other) for other in self.vocabulary.places if other not in true]
        named = {found[0].lower() for found in self._place.finditer(now)}
        options = [(found, other) for found, other in options if other not in named] or options
        return _replaced(sentence, *rng.choice(options)) if options else None

    def _change_relation(self, sentence: str, item: EditItem, now: str, rng: random.Random) -> _Change | None:
        """A relation turned around."""
        found = self._relation.search(sentence)
        return _replaced(sentence, found, self.vocabulary.opposites[found[0].lower()]) if found else None

    def _change_count(self, sentence: str, item: EditItem, now: str, rng: random.Random) -> _Change | None:
        """Another number: "is one star" to "are three stars", "Two." to "Four."."""
        numbers = self.vocabulary.numbers
        bare = self._number.match(sentence)
        if bare:
            return _replaced(sentence, bare, rng.choice([word for word in numbers if word != bare[0].lower()]))
        found = self._count.search(sentence)
        if found is None:
            return None
        word = found[1].lower().split()[1]
        other = rng.choice([number for number in numbers[1:6] if number != word])
        name = next(name for name in self._names if self._names[name] == self._names[found[2].lower()])
        return _replaced(sentence, found, f"is one {name}" if other == "one" else f"are {other} {plural(name)}")

    def _change_existence(self, sentence: str, item: EditItem, now: str, rng: random.Random) -> _Change | None:
        """Yes to no and no to yes, with "there is a" and "there is no" turned along."""
        swapped = swap_yes_no(sentence)
        if swapped is None:
            return None
        if sentence.rstrip(".!").lower() not in ("yes", "no"):
            mentions = self._mentions(swapped)
            if len(mentions) != 1 or mentions[0].article not in ("a", "an", "no") or "there is" not in swapped:
                return None
            mention, rest = mentions[0], swapped[mentions[0].words :]
            if mention.article == "no":
                before, rest = article(rest), rest.replace(_ANYWHERE, rng.choice(self.vocabulary.places))
            else:
                before, rest = "no", self._place.sub(_ANYWHERE, rest)
            swapped = f"{swapped[: mention.start]}{before} {rest}"
        return _Change(swapped, sentence, swapped, 0)

    def _mentions(self, sentence: str) -> list[_Mention]:
        return [
            _Mention(self._names[found["noun"].lower()], (found["article"] or "").lower(), found.start(), found.start("words"),
                     found.start("noun"), found.end())
            for found in self._mention.finditer(sentence)
        ]  # fmt: skip

    def _about(self, sentence: str, position: int) -> str | None:
        """The object that the words at a position are said of: the last one begun before it, else the first one after."""
        mentions = self._mentions(sentence)
        before = [mention.name for mention in mentions if mention.start <= position]
        return before[-1] if before else mentions[0].name if mentions else None

    def _absent(self, item: EditItem, now: str) -> list[str]:
        """Objects that are neither in the facts nor in the answer: companions of what is there, else any."""
        there = {_name(thing) for thing in _objects(item)} | {mention.name for mention in self._mentions(now)}
        company = [other for name in sorted(there) for other in self.vocabulary.companions.get(name, [])]
        return [name for name in company if name not in there] or [
            name for name in self.vocabulary.objects if name not in there
        ]

    def _places_of(self, item: EditItem, name: str | None) -> Iterator[str]:
        """Phrases of the places where objects of a name (None: any) stand, by the facts."""
        for thing in _objects(item):
            if name is None or _name(thing) == name:
                yield from (place for place in self.vocabulary.places if place.endswith(f" the {thing.get('place')}"))


def _any_of(words: Mapping[str, Any] | Sequence[str]) -> str:
    """A pattern of any of the words, the longest first; one that never matches for none."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)"


def _cased(word: str, like: str) -> str:
    return word[0].upper() + word[1:] if like[:1].isupper() else word


def _phrase_at(sentence: str, start: int, name: str) -> str:
    return sentence[start : sentence.index(name, start) + len(name)]


def _replaced(sentence: str, found: re.Match[str], other: str) -> _Change:
    """The sentence with other words for those found, and "a" or "an" before them to match."""
    start, removed, added = found.start(), found[0], _cased(other, found[0])
    before = re.search(r"\b([Aa])n? $", sentence[:start])
    if before:
        start = before.start()
        removed, added = sentence[start : found.end()], f"{_cased(article(other), before[1])} {added}"
    return _Change(sentence[:start] + added + sentence[found.end() :], removed, added, start)


def _objects(item: EditItem) -> list[dict[str, Any]]:
    return [thing for thing in item.facts.get("objects", []) if isinstance(thing, dict)]


def _name(thing: Mapping[str, Any]) -> str:
    return str(thing.get("shape") or thing.get("name"))
