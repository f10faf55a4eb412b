"""Yes/no questions about what a caption may claim of a scene, half of them about something true, written by rules."""

from __future__ import annotations

import random
from dataclasses import dataclass

from prefalign.scenes.language import SYNONYMS, at, singular, with_article
from prefalign.scenes.world import COLOURS, PLACES, SHAPES, SIZES, Scene

_PLAIN = 0.3  # claims that leave the size out
_SYNONYM = 0.1
_WRONG = (("shape", 0.4), ("colour", 0.15), ("size", 0.15), ("place", 0.15), ("all", 0.15))


@dataclass(frozen=True)
class Claim:
    """A question whether a thing is at a place, and whether it is."""

    question: str
    true: bool


def question(what: str, place: str) -> str:
    """The question of `configs/datagen/rlaif_v_scenes.yaml` for "a large red circle" and "top left"."""
    return f"Is there {what} {at(place)}?"


def draw_claims(picture: Scene, rng: random.Random, number: int) -> list[Claim]:
    """Claims about a picture: of a true one, half of the time one detail or everything is drawn anew, and made wrong by it.

    Args:
        picture: the scene.
        rng: draws objects, details and names.
        number: how many claims.
    """
    return [_claim(picture, rng) for _ in range(number)]


def _claim(picture: Scene, rng: random.Random) -> Claim:
    thing = rng.choice(picture.objects)
    said = {"shape": thing.shape, "colour": thing.colour, "size": thing.size, "place": thing.place}
    plain = rng.random() < _PLAIN
    if rng.random() < 0.5:
        wrong = rng.choices([name for name, _ in _WRONG], weights=[weight for _, weight in _WRONG])[0]
        options = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": PLACES}
        for name in options if wrong == "all" else [wrong]:
            said[name] = rng.choice([value for value in options[name] if value != said[name]])
        plain = plain and wrong != "size"
    true = any(
        (one.shape, one.colour, one.place) == (said["shape"], said["colour"], said["place"])
        and (plain or one.size == said["size"])
        for one in picture.objects
    )
    noun = rng.choice(SYNONYMS[said["shape"]][::2]) if rng.random() < _SYNONYM else singular(said["shape"])
    what = f"{said['colour']} {noun}" if plain else f"{said['size']} {said['colour']} {noun}"
    return Claim(question(with_article(what), said["place"]), true)
