"""Object-list reward: what a response names that is not in the picture, what it says wrong of what is, and what it misses.

The truth is `facts["objects"]`: a list of names, or of mappings with `name` (or `shape`) and attributes; where
`facts["pictures"]` describes several pictures, the objects of all of them. In rows of the embedded world (`facts["world"]` is
`scenes`) this is the true reward that experiments are judged by.

Equation, for a response with mentions m (repeats kept) and a picture with kinds of objects G:
    invented  = -#(m that affirm a kind not in G)            CHAIR's numerator, per response, negated
    wrong     = -#(m of a kind in G that deny it, or give it a colour, size, place or number that the picture's do not have)
    precision = 1 - #(m not in G) / #m                       1 - CHAIRi of the response; 1 where nothing is named
    recall    = #(kinds affirmed in G) / #G                  CHAIR's recall
    More is better in each, and a weight of 1 for all is `{name: objects}`.
Source: CHAIR, Rohrbach et al. 2018, arXiv 1809.02156; words become kinds through `prefalign.evals.chair`.
Differs from CHAIR: "no dog", "neither a cat nor a dog" and "a dog is not visible" are denials, and no
    mentions; "an orange cat" is a cat and not a fruit.
Not checked: relations ("above the star"), and numbers that are too small, since a description may leave things out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from prefalign.english import plural_spellings
from prefalign.evals import chair
from prefalign.rewards import FactsError
from prefalign.rewards.reward import Response
from prefalign.rule_editor import Vocabulary as WorldWords

if TYPE_CHECKING:
    import torch

TERMS = ("invented", "wrong", "precision", "recall")

_NO = (
    r"no(?: (?:visible|obvious|clear|signs? of)(?: any| an?)?)?|zero|without(?: any| an?)?|"
    r"neither(?: an?)?|nor(?: any| an?)?|not an?(?: single)?|"
    r"(?:(?:is|are|was|were|do|does|can|could)(?: not|n't|not)|can't)(?: (?:see|show|have|any|an?|the|single))*"
)
_LISTED = re.compile(r"(?P<or>,? n?or|,? and|,)(?: an?| any| the)? ", re.IGNORECASE)
_SEEN = (
    r"(?:visible|present|seen|shown|there|here|found|depicted|pictured|in view|"
    r"(?:in|on) (?:the|this) (?:picture|image|photo|scene))\b"
)
_DENIED_AFTER = re.compile(
    rf" (?:(?:(?:is|are|was|were|can|could)(?: not|n't)|cannot|can't)(?: to)?(?: be)?(?: \w+ly)? {_SEEN}|"
    r"(?:do|does)(?: not|n't) appear\b|"
    r"(?:is|are|was|were)(?: \w+ly)? (?:absent|nowhere|missing(?! (?:an?|its|his|her|their|the|some|one|two)\b)))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Mention:
    """An object that a text speaks of.

    Attributes:
        kind: its node in the vocabulary.
        said: what the text says of it by group (`colour`, `size`, `place`).
        number: how many it says there are; 1 if it does not.
        denied: it says that there is none.
    """

    kind: str
    said: Mapping[str, str]
    number: int
    denied: bool


@dataclass
class Objects:
    """Counts of invented, wrongly described and recalled objects.

    Attributes:
        synonyms: CHAIR's file of names, one line per kind (`evals.chair.read_synonyms`).
        objects: names by kind instead, such as `{dog: [puppy]}`. Rows of the embedded world need neither.
        attributes: groups of words of which an object has one at a time; a group's name is its key in `facts["objects"]`, and
            what the facts do not say of an object is not checked.
        places: phrases for places; the place in `facts["objects"]` is what comes after "the", whichever of the prepositions a
            text has.
    """

    synonyms: str | None = None
    objects: dict[str, list[str]] = field(default_factory=dict)
    attributes: dict[str, list[str]] = field(default_factory=lambda: WorldWords().attributes)
    places: list[str] = field(default_factory=lambda: WorldWords().places)

    terms: ClassVar[tuple[str, ...]] = TERMS

    def __post_init__(self) -> None:
        if self.synonyms is not None and self.objects:
            raise ValueError("both `synonyms` and `objects` give the names of objects; which ones count? Keep one.")
        bare = [place for place in self.places if " the " not in place]
        if bare:
            raise ValueError(
                f"places: {bare[0]!r} has no 'the', and facts name the place by what comes after it: write 'at the top'."
            )

    @cached_property
    def reader(self) -> Reader | None:
        """What finds objects in texts about real pictures; None without names."""
        if self.synonyms is None and not self.objects:
            return None
        table = chair.read_synonyms(self.synonyms) if self.synonyms is not None else with_plain_names(self.objects)
        return Reader(chair.vocabulary(table), self.attributes, self.places)

    @cached_property
    def scenes_reader(self) -> Reader:
        """What finds objects in texts about the embedded world."""
        words = WorldWords()
        return Reader(chair.vocabulary(with_plain_names(words.objects)), words.attributes, words.places)

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """`invented`, `wrong`, `precision` and `recall`, (N,) each.

        NaN for all where facts have no `objects`, and for `recall` where that list is empty.

        Raises:
            FactsError: for objects without a name, or that are no list.
            ValueError: for rows of real pictures without a vocabulary.
        """
        import torch

        rows = [self._row(one) for one in responses]
        return {term: torch.tensor([row[number] for row in rows]) for number, term in enumerate(TERMS)}

    def _row(self, response: Response) -> tuple[float, float, float, float]:
        pictures = response.facts.get("pictures") or [response.facts]
        if any("objects" not in picture for picture in pictures):
            return (math.nan,) * 4
        reader = self.scenes_reader if response.facts.get("world") == "scenes" else self.reader
        if reader is None:
            raise ValueError(
                f"response {response.id}: its facts are of a real picture, and no names of objects are set, so that "
                "nothing could be found that is not there. Set `synonyms` to CHAIR's file of names, or `objects`."
            )
        for picture in pictures:
            if not isinstance(picture["objects"], (list, tuple)):
                raise FactsError(
                    f"response {response.id}: facts.objects is {str(picture['objects'])[:80]!r}, which names no object. Write "
                    "a list of names, or of mappings with `name` and attributes."
                )
        things = [reader.thing(thing, response.id) for picture in pictures for thing in picture["objects"]]
        kinds = {thing["kind"] for thing in things}
        found = reader.mentions(response.text, kinds)
        affirmed = [mention for mention in found if not mention.denied]
        invented = sum(mention.kind not in kinds for mention in affirmed)
        wrong = sum(mention.kind in kinds and not _holds(mention, things) for mention in found)
        hit = len(kinds & {mention.kind for mention in affirmed})
        precision = 1 - invented / len(affirmed) if affirmed else 1.0
        return -float(invented), -float(wrong), precision, hit / len(kinds) if kinds else math.nan


class Reader:
    """Finds objects in a text, with what is said of each."""

    def __init__(self, vocabulary: chair.Vocabulary, attributes: Mapping[str, Sequence[str]], places: Sequence[str]):
        """Args:
        vocabulary: words to kinds.
        attributes: words by group.
        places: phrases with "the" before the name of the place.
        """
        self.vocabulary = vocabulary
        self.groups = {word: group for group, words in attributes.items() for word in words}
        self.numbers = WorldWords().numbers
        self._kinds = dict(vocabulary.nodes)
        for phrase, name in vocabulary.merges.items():
            self._kinds.setdefault(phrase, vocabulary.nodes.get(name, ""))  # "home plate" is no plate
        for name, kind in list(self._kinds.items()):
            for plural in plural_spellings(name):
                self._kinds.setdefault(plural, kind)
        words = _any_of(self.groups)
        self._attributes = rf"(?:(?:{words})(?:,| and|,? but)? )*"
        cut = [place.split(" the ", 1) for place in places]
        self._places = rf"(?:{_any_of(before for before, _ in cut)}) the (?:{_any_of(name for _, name in cut)})"
        self._phrase = self._pattern(self._kinds)
        self._after = re.compile(rf"(?: is| are)? ({self._places})(?! of)\b", re.IGNORECASE)
        self._before = re.compile(rf"({self._places}) there (?:is|are) (?:an? |the )?$", re.IGNORECASE)
        self._later = re.compile(rf" (?:is|are) ({words})\b", re.IGNORECASE)

    def _pattern(self, names: Iterable[str]) -> re.Pattern[str]:
        number = _any_of([*self.numbers[1:], *(str(digit) for digit in range(1, 20))])
        return re.compile(
            rf"\b(?:(?P<no>{_NO}) )?(?:(?P<number>{number}) )?(?P<words>{self._attributes})(?P<noun>{_any_of(names)})(?![\w-])",
            re.IGNORECASE,
        )

    def kind(self, name: str) -> str:
        """The kind of a name in facts; itself if the vocabulary lacks it."""
        plain = " ".join(name.lower().split())
        return self._kinds.get(plain) or plain

    def thing(self, thing: Any, where: str) -> dict[str, str]:
        """An entry of `facts["objects"]` as its `kind` and attributes."""
        entry = {"name": thing} if isinstance(thing, str) else thing
        name = (entry.get("shape") or entry.get("name")) if isinstance(entry, Mapping) else None
        if not isinstance(entry, Mapping) or not isinstance(name, str):
            raise FactsError(
                f"response {where}: facts.objects holds {str(thing)[:80]!r}, which names no object. Write names, or "
                "mappings with `name` and attributes."
            )
        said = {
            group: entry[group].lower()
            for group in (*set(self.groups.values()), "place")
            if isinstance(entry.get(group), str)
        }
        return {**said, "kind": self.kind(name)}

    def mentions(self, text: str, known: Iterable[str] = ()) -> list[Mention]:
        """Objects that a text speaks of, in order.

        Args:
            text: the text.
            known: kinds to look for even if the vocabulary lacks them.
        """
        missing = {name: kind for kind in known if kind not in self._kinds for name in (kind, *plural_spellings(kind))}
        kinds = {**self._kinds, **missing}
        phrase = self._pattern(kinds) if missing else self._phrase
        found = []
        text = text.replace("\u2019", "'")
        matches = list(phrase.finditer(text))
        toilet = any(match["noun"].lower().startswith("toilet") for match in matches)
        denied = self._denials(text, matches)
        for match in matches:
            if toilet and match["noun"].lower() in ("seat", "seats"):  # as CHAIR: not a chair
                continue
            kind = kinds[re.sub(r"[\s-]+", " ", match["noun"].lower())]
            if not kind:
                continue
            said = {
                self.groups[word]: word
                for word in re.split(r",? and |,? but |, | ", match["words"].lower())
                if word in self.groups
            }
            later = self._later.match(text, match.end())
            if later and self.groups[later[1].lower()] not in said:
                said[self.groups[later[1].lower()]] = later[1].lower()
            place = self._after.match(text, match.end()) or self._before.search(text, 0, match.start())
            if place:
                said["place"] = place[1].lower().split(" the ", 1)[1]
            number = (match["number"] or "1").lower()
            count = int(number) if number.isdigit() else self.numbers.index(number)
            found.append(Mention(kind, said, count, denied[match.start()]))
        return found

    @staticmethod
    def _denials(text: str, matches: Sequence[re.Match[str]]) -> dict[int, bool]:
        """Whether each match is denied, by its start: by itself, or in a list with one that is ("no dogs, cats or birds")."""
        joined = [_LISTED.fullmatch(text, before.end(), after.start()) for before, after in itertools.pairwise(matches)]
        words = ["" if join is None else join["or"].lower().strip(", ") or "," for join in joined]
        found = [match["no"] is not None for match in matches]
        for place, word in enumerate(words):  # a comma carries a denial if an "or" ends its list
            later = next((other for other in words[place:] if other != ","), "")
            if found[place] and matches[place + 1]["no"] is None and "or" in (word, later)[word == ","]:
                found[place + 1] = True
        for place, match in enumerate(matches):
            if not _DENIED_AFTER.match(text, match.end()):
                continue
            first = place
            while first and words[first - 1]:
                first -= 1
            starts = re.search(
                r"(?:^|[.!?;:]\s+)(?:an? |any |the |both )?$", text[: matches[first].start()], re.IGNORECASE
            )
            for one in range(first if starts else place, place + 1):
                found[one] = True
        return dict(zip((match.start() for match in matches), found, strict=True))


def with_plain_names(objects: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """CHAIR's table of names by kind, the kind's own name first."""
    return {kind: [kind, *names] for kind, names in objects.items()}


def _holds(mention: Mention, things: Sequence[Mapping[str, str]]) -> bool:
    """Whether the picture has what is said (or, of a denial, has not)."""
    fitting = sum(
        thing["kind"] == mention.kind and all(thing.get(group, word) == word for group, word in mention.said.items())
        for thing in things
    )
    return fitting == 0 if mention.denied else fitting >= mention.number


def _any_of(words: Iterable[str]) -> str:
    """A pattern of any of these, the longest first; "(?!)" matches nothing."""
    listed = sorted(set(words), key=lambda word: (-len(word), word))
    return "|".join(re.escape(word).replace(r"\ ", "[ -]") for word in listed) or "(?!)"
