"""Rows for the data stages: prompts with pictures, true reference answers and facts, as plain dicts.

Where reference answers come from decides which method wins, so it is a setting, `regime`:

- `seen`: references of pictures the base was trained on (`train_biased`, its first `BASE_PICTURES`);
- `fair`: references of pictures without the prior (`train_fair`, an index range apart from validation and test);
- `none`: no references and no facts, prompts only, on pictures of `train_fair`.

Without a regime a row carries its answer and facts, whatever the split: that is what validation and tests want.
"""

import random
from collections.abc import Iterator

from prefalign.scenes import language
from prefalign.scenes.language import Question, at, singular
from prefalign.scenes.world import SHAPES, Scene, multi_image, png, scene, split_named

BASE_PICTURES = 24_000
REGIMES = {"seen": "train_biased", "fair": "train_fair", "none": "train_fair"}
KINDS = ("caption", "description", "yes_no", "colour", "count", "place", "object", "vqa", "mix", "pair")


def rows(
    kind: str,
    split: str | None = None,
    start: int = 0,
    stop: int | None = None,
    *,
    seed: int = 0,
    regime: str | None = None,
    world_seed: int = 0,
) -> Iterator[dict]:
    """Rows of one kind for the scenes `start` up to, not including, `stop` of a split, at most one per scene.

    Each is `{"id", "images": [{"bytes", "path"}], "messages", "answer", "facts"}`; `messages` holds the user's turn with its
    image blocks first. `kind` is "caption", "description", one kind of question, "vqa" (any of them), "mix" (captions,
    descriptions and questions) or "pair" (a question about two pictures). `seed` draws wording and question, never the
    picture; `world_seed` draws other pictures. A scene that has no question of the kind (no shape that is there only once, say)
    is left out. With a `regime` the split follows from it and may be left out.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of row {kind!r}: the kinds are {', '.join(KINDS)}; use one of them")
    split = _split_of(regime, split, world_seed)
    size = split_named(split).size
    if regime == "seen":
        size = BASE_PICTURES
    stop = size if stop is None else stop
    if not 0 <= start <= stop <= size:
        raise ValueError(
            f"rows {start} to {stop} are outside {split!r}, whose indices run from 0 to {size}"
            f"{' (the pictures the base has seen)' if regime == 'seen' else ''}: ask within it"
        )
    return _rows(kind, split, start, stop, seed, world_seed, answers=regime != "none")


def _split_of(regime: str | None, split: str | None, world_seed: int) -> str:
    if regime is None:
        if split is None:
            raise ValueError(
                "neither split nor regime is given, so there are no pictures to ask about: name one of them"
            )
        return split
    if regime not in REGIMES:
        raise ValueError(f"unknown regime {regime!r}: supervision is one of {', '.join(REGIMES)}; use one of them")
    if regime == "seen" and world_seed != 0:
        raise ValueError(
            f"world_seed={world_seed} with regime 'seen': the base has seen the pictures of world seed 0 only; "
            "leave world_seed at 0 or take another regime"
        )
    if regime == "none" and split is not None:
        return split
    if split not in (None, REGIMES[regime]):
        raise ValueError(
            f"regime {regime!r} takes its references from {REGIMES[regime]!r}, not from {split!r}: leave split out, "
            "or leave regime out to have answers on any split"
        )
    return REGIMES[regime]


def _rows(kind: str, split: str, start: int, stop: int, seed: int, world_seed: int, *, answers: bool) -> Iterator[dict]:
    for index in range(start, stop):
        picture = scene(split, index, world_seed)
        pictures = [picture]
        rng = random.Random(f"rows {kind} {picture.id} {seed}")
        if kind == "pair":
            pictures = multi_image(split, index, 2, world_seed)
            turns = pair_turns(pictures[0], pictures[1], rng)[:1]
        else:
            turns = [turn for turn in [_turn(kind, picture, rng)] if turn]
        for asked, answer in turns:
            yield row(f"{picture.id}-{kind}-{seed}", pictures, asked, answer if answers else None, facts=answers)


def row(name: str, pictures: list[Scene], asked: str, answer: str | None, *, facts: bool = True) -> dict:
    """One row: what is asked of these pictures. `facts` describe the first; of a set, `facts["pictures"]` holds one each."""
    known: dict = {}
    if facts:
        known = language.facts(pictures[0])
        if len(pictures) > 1:
            known["pictures"] = [language.facts(picture) for picture in pictures]
    blocks: list[dict] = [{"type": "image"} for _ in pictures]
    return {
        "id": name,
        "images": [{"bytes": png(picture), "path": f"{picture.id}.png"} for picture in pictures],
        "messages": [{"role": "user", "content": [*blocks, {"type": "text", "text": asked}]}],
        "answer": answer,
        "facts": known,
    }


def _turn(kind: str, picture: Scene, rng: random.Random) -> tuple[str, str] | None:
    if kind == "mix":
        kind = rng.choices(("caption", "description", "vqa"), weights=(0.5, 0.2, 0.3))[0]
    number = rng.randrange(1_000_000)
    if kind == "caption":
        return rng.choice(language.CAPTION_PROMPTS), language.caption(picture, number)
    if kind == "description":
        return rng.choice(language.DESCRIPTION_PROMPTS), language.description(picture, number)
    asked: list[Question] = language.questions(picture, number)
    if kind == "vqa":
        wanted = rng.choice([name for name in language.KINDS if any(question.kind == name for question in asked)])
        asked = [question for question in asked if question.kind == wanted]
    elif kind == "yes_no":
        label = rng.choice(("yes", "no"))
        asked = [question for question in asked if question.kind == kind and question.label == label]
    else:
        asked = [question for question in asked if question.kind == kind]
    return (asked[0].text, asked[0].answer) if asked else None


def pair_turns(first: Scene, second: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Questions about two pictures with true answers: which of them shows a shape, and what stands where in each."""
    some = sorted(first.shapes | second.shapes)
    shapes = [rng.choice(some), rng.choice(some), rng.choice(SHAPES)]
    turns = []
    for shape in shapes:
        there = (shape in first.shapes, shape in second.shapes)
        answer = {
            (True, True): "Both pictures.",
            (True, False): "The first picture.",
            (False, True): "The second picture.",
            (False, False): "Neither picture.",
        }[there]
        turns.append((f"Which picture shows a {singular(shape)}?", answer))
    for name, picture in (("first", first), ("second", second)):
        thing = rng.choice(picture.objects)
        answer = f"A {thing.size} {thing.colour} {singular(thing.shape)}."
        turns.append((f"What is {at(thing.place)} in the {name} picture?", answer))
    turns.append(
        ("Describe the first picture.", language.caption(first, rng.randrange(1_000_000)))
        if rng.random() < 0.5
        else ("Describe the second picture.", language.caption(second, rng.randrange(1_000_000)))
    )
    rng.shuffle(turns)
    return turns
