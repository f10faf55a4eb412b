"""What a caption of the embedded world says, asked about, judged and taken out again; and short questions about its truth.

`SceneAnnotator` does by rules what `prefalign.knowledge` asks a language model for (KnowAda, arXiv 2411.09018);
`short_question` stands for the pseudo annotator of MPA (arXiv 2509.16633).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefalign.evals import attributes, yesno
from prefalign.knowledge import Captioned, Reply
from prefalign.rewards import FactsError
from prefalign.scenes import language
from prefalign.scenes.language import NOUN, SHAPE_OF, Mention, Question, at, singular, with_article
from prefalign.scenes.twins import true_of
from prefalign.scenes.world import COLOURS, PLACES, Object, Scene

_ASKED = {
    "there": re.compile(rf"Is there an? (?P<noun>{NOUN}) in the picture\?"),
    "colour": re.compile(rf"What colour is the (?P<noun>{NOUN})\?"),
    "where": re.compile(rf"Where is the (?P<noun>{NOUN})\?"),
    "what": re.compile(rf"What is (?:at|in|on) the (?P<place>{'|'.join(PLACES)})\?"),
}
_RELATION = re.compile(r" is (?:above|below|to the left of|to the right of) the ", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(a)n? $", re.IGNORECASE)


class SceneAnnotator:
    """Writes questions about a caption, judges answers by the caption, and takes out what is unknown, all by rules."""

    fingerprint = "scenes-rules-1"

    def questions(self, items: Sequence[Captioned]) -> list[list[str] | Reply]:
        """Questions about everything each caption says of an object: that it is there, its colour, its place, what is at it.

        Colour and place are asked of shapes that are there once, by `facts["counts"]`: "the star" would be any of two.
        """
        return [_questions(item) for item in items]

    def judge(self, items: Sequence[tuple[str, str, str]]) -> list[int | None]:
        """For each (caption, question, answer): 3 right, 2 nearly (the next place, another size), 1 wrong or no answer."""
        return [_score(*item) for item in items]

    def rewrite(self, items: Sequence[tuple[Captioned, Sequence[str]]]) -> list[Reply]:
        """Each caption without what its unknown questions ask for."""
        return [Reply(_without(item.caption, questions)) for item, questions in items]

    def answerable(self, items: Sequence[tuple[str, str]]) -> list[bool | None]:
        """For each (text, question): whether the text says the answer."""
        return [bool(_told(text, question)) for text, question in items]

    def statements(self, items: Sequence[tuple[Captioned, str]]) -> list[list[str] | Reply]:
        """For each text about a captioned picture, a label by the facts for each sentence: `entailed` or `contradicted`.

        Raises:
            FactsError: the facts are not those of a scene.
        """
        for item, _ in items:
            if not isinstance(item.facts.get("counts"), Mapping) or not isinstance(item.facts.get("objects"), list):
                raise FactsError(
                    f"{item.id}: its facts have no counts and objects of a scene, so no rule can tell what is true of it. "
                    "Take rows of the embedded world, or have an LLM label statements (annotator: engine)."
                )
        return [
            ["entailed" if true_of(part, item.facts) else "contradicted" for part in language.sentences(text)]
            for item, text in items
        ]


def _questions(item: Captioned) -> list[str]:
    found = []
    for mention in (mention for mention in language.parse(item.caption) if not mention.negated):
        noun = singular(mention.shape)
        found.append(f"Is there {with_article(noun)} in the picture?")
        single = item.facts.get("counts", {}).get(mention.shape) == 1
        if single and mention.colour:
            found.append(f"What colour is the {noun}?")
        if single and mention.place:
            found.append(f"Where is the {noun}?")
        if mention.place:
            found.append(f"What is {at(mention.place)}?")
    return list(dict.fromkeys(found))


def _kind(question: str) -> tuple[str, str]:
    """Kind of a question and the shape or place it is about; two empty texts for one that this module does not write."""
    for kind, pattern in _ASKED.items():
        if found := pattern.fullmatch(question):
            about = found["place"] if kind == "what" else SHAPE_OF[found["noun"].lower()]
            return kind, about
    return "", ""


def _told(text: str, question: str) -> list[Mention]:
    """The objects in a text that answer a question."""
    kind, about = _kind(question)
    said = [mention for mention in language.parse(text) if not mention.negated]
    if kind == "what":
        return [mention for mention in said if mention.place == about]
    needed = {"there": "shape", "colour": "colour", "where": "place"}.get(kind)
    return [mention for mention in said if needed and mention.shape == about and getattr(mention, needed)]


def _score(caption: str, question: str, answer: str) -> int | None:
    known = _told(caption, question)
    if not known:
        return None
    kind, _ = _kind(question)
    truth = known[0]
    if kind == "there":
        return 3 if yesno.robust(answer) == "yes" else 1
    if kind == "colour":
        return 3 if attributes.parse(answer, tuple(COLOURS)) == truth.colour else 1
    if kind == "where":
        place = attributes.parse(answer, PLACES)
        return 1 if place is None else {0: 3, 1: 2}.get(_distance(place, str(truth.place)), 1)
    said = next((mention for mention in language.parse(answer) if not mention.negated), None)
    if said is None or said.shape != truth.shape or (truth.colour and said.colour not in (None, truth.colour)):
        return 1
    return 2 if truth.size and said.size not in (None, truth.size) else 3


def _distance(one: str, other: str) -> int:
    (row, column), (its_row, its_column) = (divmod(PLACES.index(place), 3) for place in (one, other))
    return abs(row - its_row) + abs(column - its_column)


def _without(caption: str, questions: Sequence[str]) -> str:
    unknown = {_kind(question) for question in questions}
    named = [mention.shape for mention in language.parse(caption) if mention.place]
    lost = {mention.shape for mention in language.parse(caption) if _lost(mention, named, unknown)}
    kept = []
    for sentence in language.sentences(caption):
        mentions = language.parse(sentence)
        if not _RELATION.search(sentence):
            kept.append(_edited(sentence, mentions, named, unknown))
        elif not {m.shape for m in mentions} & (lost | {about for kind, about in unknown if kind == "where"}):
            kept.append(sentence)
    return " ".join(dict.fromkeys(sentence for sentence in kept if sentence))


def _lost(mention: Mention, named: Sequence[str], unknown: set[tuple[str, str]]) -> bool:
    """Whether an object is unknown as such: its shape, or what is at its place and, by its name, where it is."""
    if ("there", mention.shape) in unknown:
        return True
    found = ("where", mention.shape) not in unknown and named.count(mention.shape) == 1
    return ("what", mention.place) in unknown and not found


def _edited(sentence: str, mentions: Sequence[Mention], named: Sequence[str], unknown: set[tuple[str, str]]) -> str:
    """A sentence without its unknown objects, colours and places; as it was if they are all known; "" if nothing is left."""
    stay = [mention for mention in mentions if not _lost(mention, named, unknown)]
    plain = {mention.start for mention in stay if ("colour", mention.shape) in unknown and mention.colour}
    nowhere = {
        mention.start
        for mention in stay
        if mention.place and (("where", mention.shape) in unknown or ("what", mention.place) in unknown)
    }
    if len(stay) == len(mentions) and not plain and not nowhere:
        return sentence
    if not stay:
        return ""
    phrases = []
    for mention in stay:
        words = sentence[mention.start : mention.end].split()
        thing = with_article(" ".join(word for word in words if mention.start not in plain or word not in COLOURS))
        placed = mention.place and mention.start not in nowhere
        phrases.append(f"{thing} {at(str(mention.place))}" if placed else thing)
    if len(mentions) == 1 and not nowhere:  # its colour goes, its wording stays
        mention, (phrase,) = stay[0], phrases
        bare = phrase.split(" ", 1)[1].removesuffix(f" {at(str(mention.place))}")
        before = _ARTICLE.sub(lambda found: found[1] + ("n " if bare[0] in "aeiou" else " "), sentence[: mention.start])
        return before + bare + sentence[mention.end :]
    start = next((begin for begin in ("I can see", "The picture shows") if sentence.startswith(begin)), "There is")
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return f"{start} {listed}."


def short_question(facts: Mapping[str, Any], seed: int) -> Question | None:
    """A question about a scene whose true answer is short ("Red.", "At the top left.", "A small red star.").

    Args:
        facts: `language.facts` of the scene.
        seed: draws the kind of question, then the question.

    Returns:
        The question with its answer; None if the facts are not those of a scene.
    """
    if facts.get("world") != "scenes" or not facts.get("objects"):
        return None
    things = tuple(
        Object(known["shape"], known["colour"], known["size"], known["place"], 0.0, 0.0, 0.0, known["faint"],
               known["visible"])
        for known in facts["objects"]
    )  # fmt: skip
    asked = language.questions(Scene("facts", 0, 0, things, str(facts.get("scene"))), seed)
    short = [
        question
        for question in asked
        if question.text.endswith(language.SHORT)
        or question.kind == "object"
        or (question.kind == "place" and question.text.startswith("Where"))
    ]
    rng = random.Random(f"short {facts.get('scene')} {seed}")
    kinds = sorted({question.kind for question in short})
    wanted = rng.choice(kinds)
    return rng.choice([question for question in short if question.kind == wanted])
