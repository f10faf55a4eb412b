"""What every report page shares: the jinja environment, thumbnails, marked word differences, tables of settings."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign.images import EncodedImage, ImageError, open_image
from prefalign.manifest import write_atomically
from prefalign.text import word_diff

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
LONGEST_SIDE = 160  # pixels kept of a thumbnail
SHOWN_SIDE = 128  # CSS pixels it is shown at
MINUS = "\u2212"
_WORDS = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")
_STOPS = (".", "!", "?")


@dataclass(frozen=True)
class Thumbnail:
    """A small picture for a page.

    Attributes:
        uri: the picture as a `data:` address; empty if it cannot be read.
        width: width it is shown at, in CSS pixels.
        height: height it is shown at, in CSS pixels.
        size: size of the original, as `640 x 480`.
        pixelated: enlarge without smoothing (the original is smaller than a thumbnail).
        problem: why it cannot be shown; empty if it can.
    """

    uri: str
    width: int
    height: int
    size: str
    pixelated: bool
    problem: str = ""


@dataclass(frozen=True)
class Piece:
    """Part of an answer: `changed` marks words that the other answer lacks, `invented` names of things that are not there."""

    text: str
    changed: bool
    invented: bool


def write_page(template: str, output: Path, **values: Any) -> Path:
    """Render a template of this folder into one file, style and script inside it.

    Args:
        template: name of the template.
        output: the HTML file to write; a folder gets a `report.html`.
        values: what the template shows; text is escaped.

    Returns:
        The file written.
    """
    from markupsafe import Markup

    output = output / "report.html" if output.is_dir() else output
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = (
        _environment()
        .get_template(template)
        .render(
            style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_sha256=digest,
            **values,
        )
    )
    write_atomically(output, page.encode("utf-8", "replace"))
    return output


@lru_cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    return environment


def thumbnail(image: EncodedImage) -> Thumbnail:
    """Decode a picture and make it small; one that cannot be read becomes a thumbnail that says why.

    Pictures smaller than a thumbnail keep their pixels and are enlarged by the browser in whole steps without smoothing.
    """
    from PIL import Image

    try:
        picture = open_image(image)
    except ImageError as error:
        return Thumbnail("", SHOWN_SIDE, SHOWN_SIDE, "", False, f"{error.reason}: {error}")
    size = f"{picture.width} x {picture.height}"
    tiny = max(picture.size) <= SHOWN_SIDE
    if not tiny:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    scale = SHOWN_SIDE / max(picture.size)
    if tiny:
        scale = max(1, int(scale))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return Thumbnail(_data_uri(picture), width, height, size, tiny)


def _data_uri(picture: Any) -> str:
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    # no chroma subsampling: it would bleed the colours of small drawings
    picture.save(jpeg, "JPEG", quality=82, subsampling=0, optimize=True)
    kind, content = ("png", png) if png.tell() <= 1.25 * jpeg.tell() else ("jpeg", jpeg)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def marked(
    before: str, after: str, *, invented_before: Sequence[str] = (), invented_after: Sequence[str] = ()
) -> tuple[list[Piece], list[Piece]]:
    """Two answers as pieces, marked where they differ and where they name what is not there.

    Args:
        before: first answer.
        after: second answer.
        invented_before: names (singular) in `before` of things that are not in the picture.
        invented_after: the same for `after`.

    Returns:
        Pieces of `before` and pieces of `after`; their texts join to the two answers.
    """
    old, new = _sides(before, after)
    return list(_pieces(old, before, invented_before)), list(_pieces(new, after, invented_after))


def _sides(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """`word_diff` for the eye: (text, changed) parts of each side.

    A word that differs only in the blanks after it (the last of a text) is not marked, and a sentence that one side adds is
    marked from its first word to its full stop, not from the full stop before it.
    """
    old: list[tuple[str, bool]] = []
    new: list[tuple[str, bool]] = []
    removed: list[str] = []
    added: list[str] = []
    for op, text in [*word_diff(before, after), ("same", "")]:
        words = _WORDS.findall(text)
        if op != "same":
            (removed if op == "removed" else added).extend(words)
            continue
        alike = 0
        while alike < min(len(removed), len(added)) and removed[alike].strip() == added[alike].strip():
            alike += 1
        for side, change, other in ((old, removed[alike:], added[alike:]), (new, added[alike:], removed[alike:])):
            side.append(("".join((removed if side is old else added)[:alike]), False))
            if change and not other and words and change[0].strip() == words[0].strip() and change[0].strip() in _STOPS:
                change, rest = [*change, words[0]], words[1:]
                side += [(change[0], False), ("".join(change[1:]), True), ("".join(rest), False)]
            else:
                side += [("".join(change), True), (text, False)]
        removed, added = [], []
    return [part for part in old if part[0]], [part for part in new if part[0]]


def _pieces(parts: list[tuple[str, bool]], text: str, invented: Sequence[str]) -> Iterator[Piece]:
    spans: list[tuple[int, int]] = []
    if invented:
        names = "|".join(re.escape(name) for name in sorted(invented, key=len, reverse=True))
        spans = [found.span() for found in re.finditer(rf"\b(?:{names})(?:e?s)?\b", text, re.IGNORECASE)]
    start = 0
    for part, changed in parts:
        stop = start + len(part)
        cuts = {start, stop, *(cut for span in spans for cut in span if start < cut < stop)}
        if changed:  # blanks around a changed run stay unmarked
            cuts |= {start + len(part) - len(part.lstrip()), start + len(part.rstrip())}
        edges = sorted(cuts)
        for low, high in pairwise(edges):
            inside = any(a <= low and high <= b for a, b in spans)
            yield Piece(text[low:high], changed and not text[low:high].isspace(), inside)
        start = stop


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as `(dotted.key, text)` rows in their order, for a table of settings."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows.extend(flattened(value, f"{name}."))
        else:
            rows.append((name, _legible(value)))
    return rows


def _legible(value: Any) -> str:
    """A value for people; of an absolute path only the name, for a report is shared and a machine's folders are not."""
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith(("/", "~/")) and "\n" not in value):
        path = Path(value)
        return f".../{path.name}" if path.is_absolute() or str(value).startswith("~") else str(path)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_legible(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_legible(item)}" for key, item in value.items()) or "none"
    return str(value)
