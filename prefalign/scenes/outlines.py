"""The outlines of the eight shapes."""

import math

from PIL import Image, ImageDraw

Point = tuple[float, float]
POLYGONS: dict[str, list[Point]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -1.0), (0.98, 0.8), (-0.98, 0.8)],
    "diamond": [(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)],
    "heart": [(-0.93, -0.08), (0.93, -0.08), (0, 1.0)],
    "star": [
        (radius * math.cos(turn), radius * math.sin(turn))
        for radius, turn in ((0.45 if at % 2 else 1.1, math.pi * (at / 5 - 0.5)) for at in range(10))
    ],
    "cross": [
        *[(-1.0, -0.36), (-0.36, -0.36), (-0.36, -1.0), (0.36, -1.0), (0.36, -0.36), (1.0, -0.36)],
        *[(1.0, 0.36), (0.36, 0.36), (0.36, 1.0), (-0.36, 1.0), (-0.36, 0.36), (-1.0, 0.36)],
    ],
}
DISCS: dict[
    str, list[tuple[Point, float, bool]]
] = {  # centre and radius, and whether the disc is filled in or taken out
    "circle": [((0, 0), 1.0, True)],
    "ring": [((0, 0), 1.0, True), ((0, 0), 0.55, False)],
    "heart": [((-0.46, -0.3), 0.52, True), ((0.46, -0.3), 0.52, True)],
}


def mask(shape: str, x: float, y: float, radius: float, *, pixels: int, zoom: int) -> Image.Image:
    """The shape at (x, y), in pixels, as an "L" image of `pixels * zoom` a side: 255 inside, 0 outside."""
    image = Image.new("L", (pixels * zoom, pixels * zoom), 0)
    pen = ImageDraw.Draw(image)

    def point(right: float, down: float) -> tuple[float, float]:
        return (x + right * radius) * zoom, (y + down * radius) * zoom

    for (right, down), reach, filled in DISCS.get(shape, []):
        pen.ellipse([point(right - reach, down - reach), point(right + reach, down + reach)], fill=255 * filled)
    if shape in POLYGONS:
        pen.polygon([point(*corner) for corner in POLYGONS[shape]], fill=255)
    return image
