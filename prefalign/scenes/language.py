"""What is said about a scene, and how to read it back.

Everything said is true. Captions and descriptions may leave objects out: a clear one is mentioned 95 % of the time, a faint one
half of the time, as people mention what they notice. They name clear objects first, then faint ones, each in reading order.
Answers to questions are always complete: "How many stars are there?" counts the faint ones too.

`parse` finds every object a text speaks of; `sentence_parses` tells whether a sentence is one this world can say.
"""

import random
import re
from dataclasses import dataclass

from prefalign.english import article
from prefalign.scenes.world import COLOURS, COMPANIONS, PLACES, SHAPES, SIZES, Object, Scene

MENTION_CLEAR = 0.95
MENTION_FAINT = 0.50
SYNONYMS: dict[str, list[str]] = {
    "circle": ["circle", "circles", "disc", "discs"],
    "square": ["square", "squares", "box", "boxes"],
    "triangle": ["triangle", "triangles"],
    "star": ["star", "stars"],
    "cross": ["cross", "crosses", "plus", "pluses"],
    "ring": ["ring", "rings", "hoop", "hoops"],
    "heart": ["heart", "hearts"],
    "diamond": ["diamond", "diamonds", "rhombus", "rhombuses"],
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION_PROMPTS = (
    "Describe the picture.",
    "What is in the picture?",
    "What can you see in the picture?",
    "Tell me what the picture shows.",
    "Write a caption for the picture.",
)
DESCRIPTION_PROMPTS = (
    "Describe the picture in detail.",
    "Give a long description of the picture.",
    "Tell me everything about the picture.",
)
SHORT = "Answer with one word."
KINDS = ("yes_no", "colour", "count", "place", "object")
_STYLES = ("there", "subject", "place", "see", "list")
_STYLE_WEIGHTS = (0.45, 0.20, 0.15, 0.10, 0.10)
_SYNONYM_RATE = 0.1
_PLAIN_RATE = 0.2  # captions that leave the sizes out
_OPENING = "The picture shows some coloured shapes."


@dataclass(frozen=True)
class Question:
    """A question with its true answer; `label` is the bare answer ("yes", "blue", "2", "top left", a shape or "nothing")."""

    kind: str
    text: str
    answer: str
    label: str
    shape: str = ""


@dataclass(frozen=True)
class Mention:
    """An object a text speaks of. What the text does not say is None; `start` and `end` span the words, in characters."""

    shape: str
    colour: str | None
    size: str | None
    place: str | None
    negated: bool
    start: int
    end: int


def at(place: str) -> str:
    """The place as a phrase: "at the top left", "in the centre", "on the right"."""
    word = {"centre": "in", "left": "on", "right": "on"}.get(place, "at")
    return f"{word} the {place}"


def singular(shape: str) -> str:
    """The shape's first name."""
    return SYNONYMS[shape][0]


def plural(shape: str) -> str:
    """The shape's first plural."""
    return SYNONYMS[shape][1]


def with_article(words: str) -> str:
    """A noun and what is before it with "a" or "an": "an orange star"."""
    return f"{article(words)} {words}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _named(thing: Object, rng: random.Random, *, plain: bool = False) -> str:
    """The object with article: "a large red circle", rarely under another name of its shape."""
    noun = rng.choice(SYNONYMS[thing.shape][::2]) if rng.random() < _SYNONYM_RATE else singular(thing.shape)
    return with_article(f"{thing.colour} {noun}" if plain else f"{thing.size} {thing.colour} {noun}")


def _mentioned(picture: Scene, rng: random.Random) -> list[Object]:
    """The objects a caption speaks of, in the order it does; never none."""
    order = sorted(picture.objects, key=lambda thing: (not thing.clear, PLACES.index(thing.place)))
    kept = [thing for thing in order if rng.random() < (MENTION_CLEAR if thing.clear else MENTION_FAINT)]
    return kept or order[:1]


def object_sentences(things: list[Object], rng: random.Random, style: str, plain: bool) -> list[str]:
    """What a caption says of each object, in one of the `_STYLES`; `plain` leaves sizes out."""
    if style == "list":
        parts = [f"{_named(thing, rng, plain=plain)} {at(thing.place)}" for thing in things]
        listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        return [f"The picture shows {listed}."]
    out = []
    for thing in things:
        name, where = _named(thing, rng, plain=plain), at(thing.place)
        out.append(
            {
                "there": f"There is {name} {where}.",
                "subject": f"{_capital(name)} is {where}.",
                "place": f"{_capital(where)} there is {name}.",
                "see": f"I can see {name} {where}.",
            }[style]
        )
    return out


def caption(picture: Scene, number: int = 0, *, style: str | None = None) -> str:
    """One caption; other `number`s give other phrasings and leave other things out. `style` forces a phrasing."""
    if style is not None and style not in _STYLES:
        raise ValueError(
            f"unknown caption style {style!r}: captions are written as {', '.join(_STYLES)}; use one of them"
        )
    rng = random.Random(f"caption {picture.id} {number}")
    drawn = rng.choices(_STYLES, weights=_STYLE_WEIGHTS)[0]
    plain = rng.random() < _PLAIN_RATE
    return " ".join(object_sentences(_mentioned(picture, rng), rng, style or drawn, plain))


def description(picture: Scene, number: int = 0) -> str:
    """A long description: an opening, a sentence per mentioned object, then up to two of how they stand to one another."""
    rng = random.Random(f"description {picture.id} {number}")
    things = _mentioned(picture, rng)
    out = [_OPENING, *object_sentences(things, rng, rng.choices(_STYLES[:2], weights=(0.7, 0.3))[0], False)]
    single = [thing for thing in things if picture.count(thing.shape) == 1]
    pairs = [(one, other) for one in single for other in single if _relation(one, other) and one is not other]
    rng.shuffle(pairs)
    told: list[set[str]] = []
    for one, other in pairs:
        if {one.shape, other.shape} not in told and len(told) < 2:
            told.append({one.shape, other.shape})
            out.append(f"The {singular(one.shape)} is {_relation(one, other)} the {singular(other.shape)}.")
    return " ".join(out)


def _relation(one: Object, other: Object) -> str:
    if one.row != other.row:
        return "above" if one.row < other.row else "below"
    if one.column != other.column:
        return "to the left of" if one.column < other.column else "to the right of"
    return ""


def questions(picture: Scene, number: int = 0) -> list[Question]:
    """Questions of every kind with their true answers, in an order drawn for `number`.

    Per scene: existence of every shape (as many about absent shapes as about present ones), some with a colour; colour and
    place of each shape that is there once; counts of two shapes; what stands at each of the nine places.
    """
    rng = random.Random(f"questions {picture.id} {number}")
    present = sorted(picture.shapes)
    absent = sorted(set(SHAPES) - picture.shapes)
    rng.shuffle(absent)
    out = [_existence(picture, shape, rng) for shape in present + absent[: len(present)]]
    single = [thing for thing in picture.objects if picture.count(thing.shape) == 1]
    for thing in single:
        out += [_attribute(picture, thing, rng), _colour(thing, rng), _where(thing, rng)]
    out += [_count(picture, shape, rng) for shape in (rng.choice(present), rng.choice(SHAPES))]
    out += [_what(picture, place) for place in PLACES]
    rng.shuffle(out)
    return out


def probe(picture: Scene, shape: str, *, short: bool = True) -> Question:
    """The plain yes/no question whether a shape is in the picture, as POPE asks it."""
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}: the world has {', '.join(SHAPES)}; ask about one of them")
    return _yes_no(picture, shape, f"Is there {with_article(shape)} in the picture?", short)


def _yes_no(picture: Scene, shape: str, text: str, short: bool) -> Question:
    things = sorted(
        (thing for thing in picture.objects if thing.shape == shape),
        key=lambda thing: (not thing.clear, PLACES.index(thing.place)),
    )
    label = "yes" if things else "no"
    if short:
        return Question("yes_no", f"{text} {SHORT}", f"{_capital(label)}.", label, shape)
    answer = (
        f"Yes, there is {with_article(singular(shape))} {at(things[0].place)}."
        if things
        else f"No, there is no {singular(shape)} in the picture."
    )
    return Question("yes_no", text, answer, label, shape)


def _existence(picture: Scene, shape: str, rng: random.Random) -> Question:
    noun = with_article(singular(shape))
    text = rng.choice(
        (f"Is there {noun} in the picture?", f"Does the picture show {noun}?", f"Can you see {noun} in the picture?")
    )
    return _yes_no(picture, shape, text, rng.random() < 0.5)


def _attribute(picture: Scene, thing: Object, rng: random.Random) -> Question:
    colour = thing.colour if rng.random() < 0.5 else rng.choice([c for c in COLOURS if c != thing.colour])
    label = "yes" if colour == thing.colour else "no"
    noun = singular(thing.shape)
    if rng.random() < 0.5:
        return Question("yes_no", f"Is the {noun} {colour}? {SHORT}", f"{_capital(label)}.", label, thing.shape)
    answer = f"Yes, the {noun} is {colour}." if label == "yes" else f"No, the {noun} is {thing.colour}."
    return Question("yes_no", f"Is the {noun} {colour}?", answer, label, thing.shape)


def _colour(thing: Object, rng: random.Random) -> Question:
    noun = singular(thing.shape)
    if rng.random() < 0.5:
        text, answer = f"What colour is the {noun}? {SHORT}", f"{_capital(thing.colour)}."
    else:
        text, answer = f"What colour is the {noun}?", f"The {noun} is {thing.colour}."
    return Question("colour", text, answer, thing.colour, thing.shape)


def _where(thing: Object, rng: random.Random) -> Question:
    noun = singular(thing.shape)
    if rng.random() < 0.5:
        text, answer = f"Where is the {noun}?", f"{_capital(at(thing.place))}."
    else:
        text, answer = f"Tell me where the {noun} is.", f"The {noun} is {at(thing.place)}."
    return Question("place", text, answer, thing.place, thing.shape)


def _count(picture: Scene, shape: str, rng: random.Random) -> Question:
    number = picture.count(shape)
    if rng.random() < 0.5:
        text, answer = f"How many {plural(shape)} are there? {SHORT}", f"{_capital(NUMBERS[number])}."
    else:
        noun = (
            f"is one {singular(shape)}" if number == 1 else f"are {NUMBERS[number] if number else 'no'} {plural(shape)}"
        )
        text, answer = f"How many {plural(shape)} are there?", f"There {noun} in the picture."
    return Question("count", text, answer, str(number), shape)


def _what(picture: Scene, place: str) -> Question:
    text = f"What is {at(place)}?"
    for thing in picture.objects:
        if thing.place == place:
            answer = _capital(with_article(f"{thing.size} {thing.colour} {singular(thing.shape)}")) + "."
            return Question("object", text, answer, thing.shape, thing.shape)
    return Question("object", text, "Nothing.", "nothing")


def facts(picture: Scene, captions: int = 3) -> dict:
    """The scene's truth as JSON-able data: objects (with `clear`), shapes, counts, companions and a few captions."""
    order = sorted(picture.objects, key=lambda thing: PLACES.index(thing.place))
    return {
        "world": "scenes",
        "scene": picture.id,
        "objects": [
            {
                "name": singular(thing.shape),
                "shape": thing.shape,
                "colour": thing.colour,
                "size": thing.size,
                "place": thing.place,
                "clear": thing.clear,
                "faint": thing.faint,
                "visible": thing.visible,
            }
            for thing in order
        ],
        "shapes": sorted(picture.shapes),
        "counts": {shape: picture.count(shape) for shape in sorted(picture.shapes)},
        "companions": {shape: COMPANIONS[shape] for shape in sorted(picture.shapes)},
        "captions": [caption(picture, number) for number in range(captions)],
    }


SHAPE_OF = {word: shape for shape, words in SYNONYMS.items() for word in words}
"""The shape that a noun names, singular or plural."""
NOUN = "|".join(sorted(SHAPE_OF, key=len, reverse=True))
"""A pattern of every noun."""
_PLACE = rf"(?:at|in|on) the (?:{'|'.join(sorted(PLACES, key=len, reverse=True))})"
_PHRASE = re.compile(
    rf"\b(?:(?P<no>no|zero) )?(?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<noun>{NOUN})\b",
    re.IGNORECASE,
)
_AFTER = re.compile(rf"(?: is| are)? ({_PLACE})(?! of)\b", re.IGNORECASE)
_BEFORE = re.compile(rf"({_PLACE}) there (?:is|are) (?:an? |the )?$", re.IGNORECASE)
_COLOUR_AFTER = re.compile(rf" is ({'|'.join(COLOURS)})\b", re.IGNORECASE)

_NP = rf"(?:a|an) (?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLOURS)}) )?(?:{NOUN})"
_THE = rf"the (?:{NOUN})"
_NPP = rf"{_NP} {_PLACE}"
_SENTENCE = re.compile(
    "(?:"
    + "|".join(
        (
            rf"(?:there is|i can see) {_NPP}",
            rf"{_NP} is {_PLACE}",
            rf"{_PLACE} there is {_NP}",
            rf"the picture shows {_NPP}(?:(?:, {_NPP})* and {_NPP})?",
            r"the picture shows some coloured shapes",
            rf"{_THE} is (?:above|below|to the left of|to the right of) {_THE}",
            r"(?:yes|no|nothing)",
            rf"yes, there is {_NPP}",
            rf"no, there is no (?:{NOUN}) in the picture",
            rf"(?:(?:yes|no), )?{_THE} is (?:{'|'.join(COLOURS)})",
            rf"{_THE} is {_PLACE}",
            rf"(?:{'|'.join(COLOURS)}|{'|'.join(NUMBERS)}|{_PLACE}|{_NP})",
            rf"there (?:is one|are no|are (?:{'|'.join(NUMBERS[2:])})) (?:{NOUN}) in the picture",
            r"the (?:first|second) picture|both pictures|neither picture",
        )
    )
    + r")\.",
    re.IGNORECASE,
)


def sentences(text: str) -> list[str]:
    """The text cut after each full stop, exclamation or question mark that white space follows."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def sentence_parses(sentence: str) -> bool:
    """Whether this one sentence, with its capital letter and full stop, is one the world can say."""
    sentence = sentence.strip()
    return bool(sentence) and sentence[0].isupper() and _SENTENCE.fullmatch(sentence) is not None


def parse(text: str) -> list[Mention]:
    """Every object the text speaks of, in order, with whatever it says of each. `negated`: "no star", "zero stars"."""
    out = []
    for found in _PHRASE.finditer(text):
        after = _AFTER.match(text, found.end())
        before = _BEFORE.search(text, 0, found.start())
        colour = found["colour"]
        if colour is None and (late := _COLOUR_AFTER.match(text, found.end())):
            colour = late[1]
        where = after[1] if after else before[1] if before else None
        out.append(
            Mention(
                shape=SHAPE_OF[found["noun"].lower()],
                colour=colour.lower() if colour else None,
                size=found["size"].lower() if found["size"] else None,
                place=where.lower().split(" the ", 1)[1] if where else None,
                negated=found["no"] is not None,
                start=found.start(),
                end=found.end(),
            )
        )
    return out
