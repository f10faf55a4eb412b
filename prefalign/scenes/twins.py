"""Counterfactual pairs: two scenes that differ in one detail, one question, and what is true of each of them only.

The contrasts are those of MVC (S-VCO, arXiv 2502.13928): an object replaced, an attribute (colour, size), a count, a position
(one object moved, or the whole picture mirrored). Two answers are the same sentences except for the contrasted detail. A twin
keeps to the layouts of its split, so that no test picture is trained on by way of a twin.
"""

import random
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from prefalign.images import EncodedImage
from prefalign.records import Pair, assistant_message, user_message
from prefalign.scenes import data, language, world
from prefalign.scenes.language import CAPTION_PROMPTS, NUMBERS, at, plural, singular
from prefalign.scenes.world import COLOURS, LEAST_VISIBLE, PIXELS, PLACES, SHAPES, SIZES, SPLITS, Object, Scene

CATEGORIES = ("object", "colour", "size", "count", "position", "left-right")
METHOD = "scenes_twin"
_CAPTION_SHARE = 0.5
_STYLES, _WEIGHTS = ("there", "subject", "place", "see"), (0.5, 0.2, 0.2, 0.1)
_CELL = PIXELS / 3
_NUMBER = re.compile(rf"there (?:is|are) (no|{'|'.join(NUMBERS)}) ({language.NOUN}) in the picture", re.IGNORECASE)


@dataclass(frozen=True)
class Contrast:
    """A scene, its twin, the detail they differ in, and a question with its true answer for either."""

    scene: Scene
    twin: Scene
    category: str
    asked: str
    answer: str
    twin_answer: str


def pairs(split: str | None, start: int, stop: int, *, seed: int = 0, regime: str | None = None) -> Iterator[Pair]:
    """A pair for each scene `start` up to, not including, `stop`: `images` is the scene, `rejected_images` its twin.

    Args:
        split: name of a split; it follows from `regime` if left out.
        start: first index within the split.
        stop: index after the last.
        seed: draws contrast and wording, never the scene.
        regime: as in `data.rows`, except `none`.

    Returns:
        Pairs with `facts` of the scene, `facts["rejected"]` of the twin, and the `category` in both `facts` and `meta`. A scene
        for which no contrast can be made is left out.

    Raises:
        ValueError: from `data.rows`, for an unknown split or regime or a range outside the split; for regime `none`.
    """
    if regime == "none":
        raise ValueError(
            "regime 'none' has no reference answers, and a twin's two answers are its references: use 'seen' or 'fair', or "
            "leave regime out."
        )
    data.rows("caption", split, start, stop, regime=regime)  # checks split, regime and range
    name = split or data.REGIMES[str(regime)]
    found = (contrast(picture, seed) for picture in world.scenes(name, start, stop))
    return (_pair(one, seed) for one in found if one is not None)


def contrast(picture: Scene, seed: int = 0, *, category: str | None = None) -> Contrast | None:
    """A contrast of a drawn category (or the one named) in a drawn object; None if the scene allows none.

    Raises:
        ValueError: for an unknown category.
    """
    if category is not None and category not in CATEGORIES:
        raise ValueError(
            f"unknown category of contrast {category!r}: the categories are {', '.join(CATEGORIES)}; use one of them"
        )
    rng = random.Random(f"contrast {picture.id} {seed} {category}")
    for kind in [category] if category else rng.sample(CATEGORIES, len(CATEGORIES)):
        for before, after, twin in _twins(picture, kind, rng):
            found = _told(picture, twin, kind, before, after, rng)
            if found is not None and holds(found):
                return found
    return None


def holds(found: Contrast) -> bool:
    """Whether each answer is true of its own picture and says something false of the other."""
    facts = language.facts(found.scene, 0), language.facts(found.twin, 0)
    truths = [true_of(text, known) for text in (found.answer, found.twin_answer) for known in facts]
    return truths == [True, False, False, True]


def true_of(text: str, facts: Mapping[str, Any]) -> bool:
    """Whether everything a text says is true of the scene that `facts` (`language.facts`) describe."""
    for number, noun in _NUMBER.findall(text):
        wanted = 0 if number.lower() == "no" else NUMBERS.index(number.lower())
        if facts["counts"].get(language.SHAPE_OF[noun.lower()], 0) != wanted:
            return False
    for mention in language.parse(_NUMBER.sub("", text)):
        said = {"shape": mention.shape, "colour": mention.colour, "size": mention.size, "place": mention.place}
        there = any(all(value in (None, thing[name]) for name, value in said.items()) for thing in facts["objects"])
        if there is mention.negated:
            return False
    return True


def _twins(picture: Scene, category: str, rng: random.Random) -> Iterator[tuple[Object, Object | None, Scene]]:
    """Every twin of the category: the object that is contrasted, what became of it (None: it is gone), the other scene."""
    things = picture.objects
    clear = [number for number, thing in enumerate(things) if thing.clear]
    free = sorted(set(PLACES) - {thing.place for thing in things})
    for number in rng.sample(clear, len(clear)):
        before = things[number]
        if category == "left-right":
            if before.column != 1 and (twin := _drawn(picture, [_mirrored(thing) for thing in things], category)):
                yield before, twin.objects[number], twin
            continue
        for after in _changes(before, picture, category, free, rng):
            changed = [*things[:number], *([after] if after else []), *things[number + 1 :]]
            if category == "count" and after is not None:
                changed = [*things, after]
            if twin := _drawn(picture, changed, f"{category}{number}"):
                place = len(changed) - 1 if category == "count" else number
                if after is None or twin.objects[place].clear:
                    yield before, after and twin.objects[place], twin


def _changes(
    before: Object, picture: Scene, category: str, free: list[str], rng: random.Random
) -> Iterator[Object | None]:
    """What an object can become, in a drawn order. For counts: None (it goes), or one more of its shape."""

    def shuffled(names: list[str]) -> list[str]:
        return rng.sample(names, len(names))

    match category:
        case "object":
            for shape in shuffled(sorted(set(SHAPES) - picture.shapes)):
                yield replace(before, shape=shape)
        case "colour":
            for colour in shuffled([name for name in COLOURS if name != before.colour]):
                yield replace(before, colour=colour)
        case "size":
            for size in shuffled([name for name in SIZES if name != before.size]):
                yield replace(before, size=size, radius=round(rng.uniform(*SIZES[size]), 2))
        case "position":
            for place in shuffled(free):
                yield _moved(before, place)
        case "count":
            more = [replace(_moved(before, place), colour=rng.choice(tuple(COLOURS))) for place in shuffled(free)]
            yield from [None, *more] if rng.random() < 0.5 else [*more, None]


def _moved(thing: Object, place: str) -> Object:
    row, column = divmod(PLACES.index(place), 3)
    return replace(thing, place=place, x=round(thing.x + (column - thing.column) * _CELL, 2),
                   y=round(thing.y + (row - thing.row) * _CELL, 2))  # fmt: skip


def _mirrored(thing: Object) -> Object:
    place = PLACES[3 * thing.row + 2 - thing.column]
    return replace(thing, place=place, x=round(PIXELS - thing.x, 2))


def _drawn(picture: Scene, things: list[Object], variant: str) -> Scene | None:
    """The scene with these objects; None if one is covered too much or the layout belongs to another split."""
    made = Scene(picture.split, picture.index, picture.seed, tuple(things), f"{picture.variant}{variant}")
    if zlib.crc32(repr(made.layout).encode()) % world.SLOTS not in SPLITS[picture.split].slots:
        return None
    drawn = world.uncovered(things)
    return replace(made, objects=tuple(drawn)) if all(thing.visible >= LEAST_VISIBLE for thing in drawn) else None


def _told(
    scene: Scene, twin: Scene, category: str, before: Object, after: Object | None, rng: random.Random
) -> Contrast | None:
    """Question and answers in words; None where the words cannot tell the two scenes apart."""
    if category == "count":
        counts = scene.count(before.shape), twin.count(before.shape)
        asked = f"How many {plural(before.shape)} are there?"
        return Contrast(scene, twin, category, asked, *(_number(before.shape, count) for count in counts))
    assert after is not None
    if rng.random() < _CAPTION_SHARE:
        things = [number for number, thing in enumerate(scene.objects) if thing == before or rng.random() < 0.7]
        if category == "left-right":
            things = [scene.objects.index(before)]
        things.sort(key=lambda number: (not scene.objects[number].clear, PLACES.index(scene.objects[number].place)))
        style, plain, wording = (
            rng.choices(_STYLES, _WEIGHTS)[0],
            category != "size" and rng.random() < 0.2,
            rng.random(),
        )
        answers = (
            " ".join(_sentence(picture.objects[number], style, plain, f"{wording} {number}") for number in things)
            for picture in (scene, twin)
        )
        return Contrast(scene, twin, category, rng.choice(CAPTION_PROMPTS), *answers)
    noun, single = singular(before.shape), scene.count(before.shape) == 1
    if category == "colour" and single:
        return Contrast(scene, twin, category, f"What colour is the {noun}?",
                        *(f"The {noun} is {thing.colour}." for thing in (before, after)))  # fmt: skip
    if category in ("position", "left-right"):
        told = (f"The {noun} is {at(thing.place)}." for thing in (before, after))
        return Contrast(scene, twin, category, f"Where is the {noun}?", *told) if single else None
    return Contrast(scene, twin, category, f"What is {at(before.place)}?",
                    *(_sentence(thing, "there", False, "") for thing in (before, after)))  # fmt: skip


def _sentence(thing: Object, style: str, plain: bool, wording: str) -> str:
    """One sentence about an object; `wording` decides whether it goes by another name of its shape."""
    rng = random.Random(f"wording {wording}")
    return language.object_sentences([thing], rng, style, plain)[0]


def _number(shape: str, count: int) -> str:
    told = f"is one {singular(shape)}" if count == 1 else f"are {NUMBERS[count] if count else 'no'} {plural(shape)}"
    return f"There {told} in the picture."


def _pair(found: Contrast, seed: int) -> Pair:
    def encoded(picture: Scene) -> list[EncodedImage]:
        return [{"bytes": world.png(picture), "path": f"{picture.id}.png"}]

    return Pair(
        id=f"{found.twin.id}-{seed}",
        images=encoded(found.scene),
        prompt=[user_message(found.asked, 1)],
        chosen=[assistant_message(found.answer)],
        rejected=[assistant_message(found.twin_answer)],
        method=METHOD,
        rejected_images=encoded(found.twin),
        facts={**language.facts(found.scene), "category": found.category, "rejected": language.facts(found.twin)},
        meta={"category": found.category, "scene": found.scene.id, "twin": found.twin.id, "seed": seed},
    )
