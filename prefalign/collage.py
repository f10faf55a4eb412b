"""Several pictures in one prompt: a sequence, a labelled grid, one laid into another; where everything lies, and how a question
names one of them.

Layouts of MIA-DPO (arXiv 2410.17637), released code at a85c51a. Pictures are RGB `PIL.Image`s, as `images.open_image` gives them:
orientation applied, transparency laid over white, first frame of animations.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefalign.records import Message

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]
"""A rectangle of pixels: left, top, right, bottom, the last two exclusive."""

GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Number of pictures to (rows, columns)."""

INSET_SHARE = (7, 10)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


@dataclass
class Collage:
    """A composed picture.

    Attributes:
        image: the canvas, RGB.
        cells: where each picture's cell lies on it; of a pic-in-pic the inset, then the whole canvas.
        regions: the cells with their labels.
    """

    image: Image.Image
    cells: list[Box]
    regions: list[Box]


@dataclass
class GridStyle:
    """How a grid is drawn.

    Attributes:
        cell: side of a cell in pixels.
        margin: pixels between columns and above each row, where the label stands.
        font: size of the label in points.
        square: pad the canvas to a square, as LLaVA's own preprocessing does with every picture.
    """

    cell: int = 448
    margin: int = 40
    font: int = 36
    square: bool = True


@dataclass
class Layouts:
    """How often each layout is drawn; shares need not sum to 1.

    Attributes:
        sequence: share of sequences of pictures.
        grid: share of labelled grids.
        pic_in_pic: share of pictures laid into another.
        sequence_sizes: number of pictures in a sequence to its share.
        grid_sizes: number of pictures in a grid (2, 3, 4, 6 or 9) to its share.
        style: how grids are drawn; its `square` also pads pic-in-pics.
    """

    sequence: float = 0.52
    grid: float = 0.32
    pic_in_pic: float = 0.16
    sequence_sizes: dict[int, float] = field(default_factory=lambda: {2: 0.55, 3: 0.16, 4: 0.16, 5: 0.13})
    grid_sizes: dict[int, float] = field(default_factory=lambda: {2: 0.5, 3: 0.125, 4: 0.125, 6: 0.125, 9: 0.125})
    style: GridStyle = field(default_factory=GridStyle)

    def __post_init__(self) -> None:
        for name, shares in (("sequence_sizes", self.sequence_sizes), ("grid_sizes", self.grid_sizes)):
            known = set(GRIDS) if name == "grid_sizes" else set(range(2, len(ORDINALS) + 1))
            if not set(shares) <= known or sum(shares.values()) <= 0 or min(shares.values()) < 0:
                raise ValueError(
                    f"layouts.{name} is {shares}; it gives a share to numbers of pictures out of {sorted(known)}, at least one "
                    "of them above 0."
                )
        if min(self.sequence, self.grid, self.pic_in_pic) < 0 or self.sequence + self.grid + self.pic_in_pic <= 0:
            raise ValueError(
                f"layouts.sequence, .grid and .pic_in_pic are {self.sequence}, {self.grid} and {self.pic_in_pic}; they are "
                "shares, at least one of them above 0."
            )

    def draw(self, rng: random.Random) -> tuple[str, int]:
        """A layout and its number of pictures (of a pic-in-pic: two)."""
        names = ("sequence", "grid", "pic_in_pic")
        layout = rng.choices(names, [getattr(self, name) for name in names])[0]
        if layout == "pic_in_pic":
            return layout, 2
        sizes: dict[int, float] = getattr(self, f"{layout}_sizes")
        return layout, rng.choices(sorted(sizes), [sizes[count] for count in sorted(sizes)])[0]


@dataclass
class Wording:
    """How a question names its picture. One template is drawn per row; `{question}` is the question with a small first letter.

    Attributes:
        line: what stands before each picture of a sequence; empty: the pictures follow one another.
        sequence: templates with `{number}` or `{ordinal}` (first, second, ...); without `{question}` they replace the question.
        grid: the same, for grids.
        pic_in_pic: templates for the picture in the middle.
    """

    line: str = "Image {number}: "
    sequence: list[str] = field(default_factory=lambda: ["In image {number}, {question}"])
    grid: list[str] = field(default_factory=lambda: ["In image {number}, {question}"])
    pic_in_pic: list[str] = field(
        default_factory=lambda: [
            "Looking only at the picture in the middle, {question}",
            "About the picture set into the centre: {question}",
            "For the smaller picture at the centre, {question}",
            "Considering just the inner picture, {question}",
            "Taking the picture that is framed by the other, {question}",
            "With your eyes on the middle picture, {question}",
            "As for the picture inside the larger one, {question}",
            "Leaving the surrounding picture aside, {question}",
        ]
    )

    def __post_init__(self) -> None:
        for name in ("sequence", "grid", "pic_in_pic"):
            for template in getattr(self, name):
                try:
                    one, other = (template.format(number=n, ordinal=ORDINALS[n], question="") for n in (1, 2))
                except (KeyError, IndexError, ValueError) as error:
                    raise ValueError(
                        f"wording.{name} has the template {template!r}, which cannot be filled ({error}). It may hold "
                        "{number}, {ordinal} and {question}."
                    ) from error
                if name != "pic_in_pic" and one == other:
                    raise ValueError(
                        f"wording.{name} has the template {template!r}, which does not say which picture is meant. Put "
                        "{number} or {ordinal} into it."
                    )
            if not getattr(self, name):
                raise ValueError(f"wording.{name} is empty; a question needs a template that names its picture.")

    def question(self, layout: str, target: int, question: str, rng: random.Random) -> str:
        """The question with a phrase, drawn among the layout's, that names picture number `target` (from 0)."""
        template: str = rng.choice(getattr(self, layout))
        return template.format(number=target + 1, ordinal=ORDINALS[target], question=lowered(question))

    def turn(self, text: str, count: int) -> Message:
        """A user turn with a sequence of `count` placeholders, each on its line, before the text."""
        blocks: list[dict[str, Any]] = []
        for number in range(1, count + 1):
            if self.line:
                before = "\n" if blocks else ""
                blocks.append({"type": "text", "text": before + self.line.format(number=number)})
            blocks.append({"type": "image"})
        return {"role": "user", "content": [*blocks, {"type": "text", "text": f"\n{text}" if self.line else text}]}


def lowered(question: str) -> str:
    """The question with a small first letter, but for `I` and for words that begin with two capitals."""
    first = question.split(maxsplit=1)[0] if question else ""
    kept = first == "I" or (len(first) > 1 and first[:2].isupper())
    return question if kept else question[:1].lower() + question[1:]


def grid(pictures: Sequence[Image.Image], style: GridStyle) -> Collage:
    """Pictures in a grid on white, row by row, each with a label `Image1`, `Image2`, ... above its cell.

    A picture is scaled, its aspect ratio kept, to the largest size that fits its cell, and stands at the cell's top left.

    Args:
        pictures: 2, 3, 4, 6 or 9 RGB pictures.
        style: sizes; with a cell of 448, a margin of 40 and no padding the canvases are the published 936 x 488, 1424 x 488,
            936 x 976, 1424 x 976 and 1424 x 1464.

    Raises:
        ValueError: for another number of pictures.
    """
    from PIL import Image, ImageDraw, ImageFont

    if len(pictures) not in GRIDS:
        raise ValueError(
            f"a grid of {len(pictures)} pictures has no layout; it has one for {', '.join(map(str, GRIDS))}. Take one of them."
        )
    rows, columns = GRIDS[len(pictures)]
    step = style.cell + style.margin
    canvas = Image.new("RGB", (columns * step - style.margin, rows * step), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(style.font)
    cells: list[Box] = []
    for number, picture in enumerate(pictures):
        left, top = number % columns * step, number // columns * step + style.margin
        canvas.paste(fitted(picture, style.cell, style.cell), (left, top))
        place = (left + style.margin // 2, top - style.margin)
        draw.text(place, f"Image{number + 1}", fill="black", font=font, anchor="lt")
        cells.append((left, top, left + style.cell, top + style.cell))
    regions = [(left, top - style.margin, right, bottom) for left, top, right, bottom in cells]
    return _squared(Collage(canvas, cells, regions)) if style.square else Collage(canvas, cells, regions)


def inset(background: Image.Image, target: Image.Image, *, square: bool = True) -> Collage:
    """The target in the middle of another picture, scaled, its aspect ratio kept, to fit 70 % of its width and height.

    Both are RGB (the released code pastes in the background's own mode, which destroys colours on grey and palette pictures).

    Args:
        background: the picture around it.
        target: the picture laid in.
        square: pad the canvas to a square with white.
    """
    width, height = background.size
    small = fitted(target, *(side * INSET_SHARE[0] // INSET_SHARE[1] for side in background.size))
    left, top = (width - small.width) // 2, (height - small.height) // 2
    canvas = background.convert("RGB")
    canvas.paste(small, (left, top))
    boxes: list[Box] = [(left, top, left + small.width, top + small.height), (0, 0, width, height)]
    return _squared(Collage(canvas, boxes, list(boxes))) if square else Collage(canvas, boxes, list(boxes))


def fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in RGB at the largest size that fits, its aspect ratio kept (smaller ones are enlarged), at least 1 x 1."""
    if picture.width * height >= picture.height * width:
        size = (width, picture.height * width // picture.width)
    else:
        size = (picture.width * height // picture.height, height)
    return picture.convert("RGB").resize((max(1, size[0]), max(1, size[1])))


def noised(image: Image.Image, box: Box, *, std: float, seed: int, wrap: bool = False) -> Image.Image:
    """The picture with Gaussian noise on a part of it.

    Args:
        image: RGB picture.
        box: the part.
        std: standard deviation in levels of 255.
        seed: seed of the noise.
        wrap: parity with the released code, which casts the noise to unsigned bytes and adds those, so that both wrap around: at
            49 the mean change of a pixel is then about 59 instead of 34. Values are clamped otherwise.
    """
    import numpy as np
    from PIL import Image

    left, top, right, bottom = box
    levels = np.array(image.convert("RGB"))
    noise = np.random.default_rng(seed).normal(0, std, (bottom - top, right - left, 3))
    part = levels[top:bottom, left:right].astype(np.int64)
    changed = (
        (part + (np.trunc(noise).astype(np.int64) & 255)) & 255 if wrap else np.clip(np.rint(part + noise), 0, 255)
    )
    levels[top:bottom, left:right] = changed.astype(np.uint8)
    return Image.fromarray(levels)


def _squared(collage: Collage) -> Collage:
    """The canvas in the middle of a white square: processors that cut the centre out of an oblong picture then lose nothing."""
    from PIL import Image

    width, height = collage.image.size
    side = max(width, height)
    right, down = (side - width) // 2, (side - height) // 2
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(collage.image, (right, down))

    def moved(box: Box) -> Box:
        return (box[0] + right, box[1] + down, box[2] + right, box[3] + down)

    return Collage(canvas, [moved(box) for box in collage.cells], [moved(box) for box in collage.regions])
