"""Pictures of coloured shapes with complete truth, deterministic by (split, index, seed).

A picture is 60x60 pixels. Objects stand on a 3x3 grid of places, in two sizes, partly covered by one another, and two in
five are *faint*: drawn at a tenth of the contrast, under pixel noise, so that perception is uncertain and a prior shows.

In the biased splits shapes keep company (`COMPANIONS`: where there is a circle there is nearly always a square). In the fair
splits every shape is drawn alone, and in the adversarial split a shape's companion is never there. Splits have index ranges of
their own and share no layout: which shapes stand at which places decides, by a hash, the one split a scene may belong to.
"""

import io
import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from prefalign.scenes.outlines import mask

PIXELS = 60
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COMPANIONS = {
    "circle": "square",
    "square": "circle",
    "triangle": "star",
    "star": "triangle",
    "cross": "ring",
    "ring": "cross",
    "heart": "diamond",
    "diamond": "heart",
}
COLOURS = {
    "red": (214, 34, 34),
    "green": (24, 150, 58),
    "blue": (38, 66, 214),
    "yellow": (240, 214, 20),
    "purple": (132, 38, 168),
    "orange": (244, 128, 12),
}
SIZES = {"small": (5.5, 7.0), "large": (9.5, 12.0)}  # radius in pixels, from and to
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
BACKGROUND = (186, 186, 186)
FAINT_SHARE = 0.4
FAINT_CONTRAST = 0.10
NOISE = 14.0  # standard deviation, in grey levels of 255
COMPANY = 0.9  # how often a shape of a biased split has its companion beside it
CLEAR_VISIBLE = 0.6  # an object is clear if it is not faint and at least this share of it is uncovered
LEAST_VISIBLE = 0.35
_COUNTS = ((2, 3, 4, 5), (0.15, 0.30, 0.30, 0.25))
SLOTS = 12
"""Layouts fall into as many slots by their hash, and each split has slots of its own."""


@dataclass(frozen=True)
class Split:
    """One split: its own range of global indices, how shapes are drawn, and which layouts (hash slots) belong to it."""

    start: int
    size: int
    company: str  # "biased", "fair" or "adversarial"
    slots: tuple[int, ...]


SPLITS = {
    "train_biased": Split(0, 100_000, "biased", (0, 1, 2, 3, 4)),
    "train_fair": Split(100_000, 50_000, "fair", (5, 6, 7)),
    "val_fair": Split(150_000, 10_000, "fair", (8,)),
    "test_biased": Split(160_000, 10_000, "biased", (9,)),
    "test_fair": Split(170_000, 10_000, "fair", (10,)),
    "test_adversarial": Split(180_000, 10_000, "adversarial", (11,)),
}


@dataclass(frozen=True)
class Object:
    """One shape. `x`, `y` and `radius` are in pixels; `place` is a name of `PLACES`; `visible` is the uncovered share."""

    shape: str
    colour: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    faint: bool
    visible: float = 1.0

    @property
    def clear(self) -> bool:
        """Clearly visible: full contrast and mostly uncovered."""
        return not self.faint and self.visible >= CLEAR_VISIBLE

    @property
    def row(self) -> int:
        """Row of the 3x3 grid, 0 at the top."""
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        """Column of the 3x3 grid, 0 at the left."""
        return PLACES.index(self.place) % 3


@dataclass(frozen=True)
class Scene:
    """A picture's whole truth. `objects` are in drawing order: later ones cover earlier ones."""

    split: str
    index: int
    seed: int
    objects: tuple[Object, ...]
    variant: str = ""  # "" for a scene of the split, the twin's kind for a counterfactual twin

    @property
    def id(self) -> str:
        """A name that is unique among scenes; twins carry what was done to them."""
        name = f"scene-{self.seed}-{self.split}-{self.index:06d}"
        return f"{name}-{self.variant}" if self.variant else name

    @property
    def shapes(self) -> set[str]:
        """The shapes that are there, each once."""
        return {thing.shape for thing in self.objects}

    @property
    def layout(self) -> tuple[tuple[str, str], ...]:
        """Which shapes stand at which places: what the splits are disjoint in."""
        return tuple(sorted((thing.place, thing.shape) for thing in self.objects))

    def count(self, shape: str) -> int:
        """How many objects have this shape, faint ones included."""
        return sum(thing.shape == shape for thing in self.objects)


@dataclass(frozen=True)
class Twin:
    """A counterfactual twin: the scene with one object removed (`after` None), added (`before` None) or changed."""

    scene: Scene
    kind: str
    before: Object | None
    after: Object | None


def split_named(name: str) -> Split:
    """The split of this name, or an error that lists the names."""
    if name not in SPLITS:
        raise ValueError(f"unknown split {name!r}: the embedded world has {', '.join(SPLITS)}; use one of them")
    return SPLITS[name]


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """The scene at `index` (0 to the split's size) of a split, the same for ever for the same (split, index, seed)."""
    rules = split_named(split)
    if not 0 <= index < rules.size:
        raise ValueError(
            f"index {index} is outside split {split!r}, whose indices run from 0 to {rules.size - 1}: "
            "splits are disjoint by index range, so ask within it"
        )
    rng = random.Random(f"prefalign.scenes {seed} {rules.start + index}")
    while True:
        number = rng.choices(_COUNTS[0], weights=_COUNTS[1])[0]
        shapes = _shapes(rng, number, rules.company)
        rng.shuffle(shapes)
        places = rng.sample(PLACES, number)
        layout = tuple(sorted(zip(places, shapes, strict=True)))
        if zlib.crc32(repr(layout).encode()) % SLOTS in rules.slots:
            break
    faint = [rng.random() < FAINT_SHARE for _ in range(number)]
    if all(faint):
        faint[rng.randrange(number)] = False
    looks = [(rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES))) for _ in range(number)]
    while True:
        things = [
            _place(rng, shape, colour, size, place, dim)
            for shape, (colour, size), place, dim in zip(shapes, looks, places, faint, strict=True)
        ]
        things = uncovered(sorted(things, key=lambda thing: not thing.faint))
        if all(thing.visible >= LEAST_VISIBLE for thing in things):
            return Scene(split, index, seed, tuple(things))


def scenes(split: str, start: int, stop: int, seed: int = 0) -> Iterator[Scene]:
    """The scenes from `start` up to, not including, `stop`."""
    for index in range(start, stop):
        yield scene(split, index, seed)


def _shapes(rng: random.Random, number: int, company: str) -> list[str]:
    if company == "fair":
        return [rng.choice(SHAPES) for _ in range(number)]
    shapes: list[str] = []
    if company == "adversarial":
        while len(shapes) < number:
            shape = rng.choice(SHAPES)
            if COMPANIONS[shape] not in shapes:
                shapes.append(shape)
        return shapes
    while len(shapes) < number:
        keeps = rng.random() < COMPANY
        if len(shapes) % 2:
            shapes.append(COMPANIONS[shapes[-1]] if keeps else rng.choice(SHAPES))
        elif shapes and len(shapes) == number - 1:  # the odd one out: a second of something that is there already
            shapes.append(rng.choice(shapes) if keeps else rng.choice(SHAPES))
        else:
            shapes.append(rng.choice(SHAPES))
    return shapes


def _place(rng: random.Random, shape: str, colour: str, size: str, place: str, faint: bool) -> Object:
    row, column = divmod(PLACES.index(place), 3)
    radius = rng.uniform(*SIZES[size])
    x, y = ((cell + 0.5) * PIXELS / 3 + rng.uniform(-3.0, 3.0) for cell in (column, row))
    return Object(shape, colour, size, place, round(x, 2), round(y, 2), round(radius, 2), faint)


def uncovered(things: list[Object]) -> list[Object]:
    """The same objects with `visible` worked out from the masks of those drawn later."""

    def inside(number: int) -> np.ndarray:
        return np.asarray(_mask(things[number], 1)) > 127

    out = []
    for number, thing in enumerate(things):
        covers = [
            later
            for later in range(number + 1, len(things))
            if math.hypot(thing.x - things[later].x, thing.y - things[later].y) < thing.radius + things[later].radius
        ]
        visible = 1.0
        if covers:
            own = inside(number)
            hidden = np.logical_or.reduce([inside(later) for later in covers]) & own
            visible = 1.0 - float(hidden.sum()) / max(1, int(own.sum()))
        out.append(replace(thing, visible=round(visible, 3)))
    return out


def _mask(thing: Object, zoom: int) -> Image.Image:
    return mask(thing.shape, thing.x, thing.y, thing.radius, pixels=PIXELS, zoom=zoom)


def draw(picture: Scene) -> Image.Image:
    """The picture, 60x60 RGB: drawn at twice the size, reduced, then noise seeded by (seed, split, index).

    A twin gets its origin's noise, so that the two differ only where the changed object is.
    """
    canvas = Image.new("RGB", (PIXELS * 2, PIXELS * 2), BACKGROUND)
    for thing in picture.objects:
        contrast = FAINT_CONTRAST if thing.faint else 1.0
        paint = tuple(
            round(under + contrast * (over - under))
            for under, over in zip(BACKGROUND, COLOURS[thing.colour], strict=True)
        )
        canvas.paste(paint, mask=_mask(thing, 2))
    pixels = np.asarray(canvas.reduce(2), dtype=np.float64)
    rng = np.random.Generator(np.random.PCG64([picture.seed, SPLITS[picture.split].start + picture.index]))
    noisy = pixels + NOISE * rng.standard_normal(pixels.shape)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def png(picture: Scene) -> bytes:
    """The picture as PNG bytes, about 11 kB."""
    out = io.BytesIO()
    draw(picture).save(out, format="PNG", compress_level=6)
    return out.getvalue()


TWINS = ("removed", "added", "changed")


def twin(picture: Scene, kind: str = "removed", *, shape: str | None = None, number: int = 0) -> Twin:
    """The scene with exactly one object removed, added or changed (to another shape at the same place, in its old looks).

    `shape` names the object to remove or change, or the shape to add; without it the choice is drawn, clear objects first.
    `number` draws another choice. An added or new shape is one that the scene does not have, unless `shape` says so.
    """
    if kind not in TWINS:
        raise ValueError(f"unknown kind of twin {kind!r}: a twin is one of {', '.join(TWINS)}; use one of them")
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}: the world has {', '.join(SHAPES)}; use one of them")
    rng = random.Random(f"twin {picture.id} {kind} {shape} {number}")
    things = list(picture.objects)
    absent = sorted(set(SHAPES) - picture.shapes)
    before: Object | None = None
    after: Object | None = None
    if kind == "added":
        free = sorted(set(PLACES) - {thing.place for thing in things})
        while True:
            colour, size = rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES))
            after = _place(rng, shape or rng.choice(absent), colour, size, rng.choice(free), False)
            drawn = uncovered([*things, after])
            if all(thing.visible >= LEAST_VISIBLE for thing in drawn):
                break
    else:
        pool = [thing for thing in things if shape is None or thing.shape == shape]
        if not pool:
            raise ValueError(
                f"scene {picture.id} has no {shape} to make the {kind!r} twin of: "
                f"it has {', '.join(sorted(picture.shapes))}; name one of these or leave shape out"
            )
        before = rng.choice([thing for thing in pool if thing.clear] or pool)
        at = things.index(before)
        if kind == "removed":
            drawn = uncovered(things[:at] + things[at + 1 :])
        else:
            after = replace(before, shape=rng.choice(absent))
            drawn = uncovered(things[:at] + [after] + things[at + 1 :])
            after = drawn[at]
    if kind == "added":
        after = drawn[-1]
    variant = f"{picture.variant}{kind}{number}" + (f"-{shape}" if shape else "")
    return Twin(replace(picture, objects=tuple(drawn), variant=variant), kind, before, after)


def likeness(one: Scene, other: Scene) -> float:
    """How alike two scenes are, 0 to 1: shared shapes, shared (shape, colour) and shared layout, equally weighted."""

    def overlap(a: set, b: set) -> float:
        return len(a & b) / max(1, len(a | b))

    coloured = [{(thing.shape, thing.colour) for thing in side.objects} for side in (one, other)]
    return (overlap(one.shapes, other.shapes) + overlap(*coloured) + overlap(set(one.layout), set(other.layout))) / 3


@lru_cache(maxsize=8)
def _pool(split: str, seed: int, size: int) -> tuple[Scene, ...]:
    return tuple(scenes(split, 0, size, seed))


def neighbours(picture: Scene, k: int, *, pool: int = 512) -> list[Scene]:
    """The `k` scenes of the same split (among its first `pool`) most like this one, itself left out, best first."""
    others = [other for other in _pool(picture.split, picture.seed, pool) if other.index != picture.index]
    if not 1 <= k <= len(others):
        raise ValueError(f"k={k} neighbours of {picture.id}: ask for 1 to {len(others)}, or raise pool={pool}")
    return sorted(others, key=lambda other: (-likeness(picture, other), other.index))[:k]


def multi_image(split: str, index: int, n: int, seed: int = 0) -> list[Scene]:
    """A set of `n` different scenes of one split: the scene at `index` and the `n - 1` that follow it, wrapping round."""
    size = split_named(split).size
    if not 1 <= n <= size:
        raise ValueError(f"n={n} scenes for a multi-image set: split {split!r} allows 1 to {size}")
    return [scene(split, index, seed), *(scene(split, (index + step) % size, seed) for step in range(1, n))]
