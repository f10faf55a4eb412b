"""Rows of given sizes, to plan for pairs that are not there yet, or for larger ones than there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from prefalign.families import missing_end
from prefalign.images import encode_png
from prefalign.losses import VIEWS
from prefalign.losses.term import EITHER
from prefalign.records import assistant_message, user_message
from prefalign.training.documents import Reader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class RowSize:
    """How large a row is.

    Attributes:
        prompt: tokens of the prompt without those of its pictures.
        answer: tokens of each answer.
        pictures: pictures in the prompt.
        side: width and height of a picture in pixels.
    """

    prompt: int
    answer: int
    pictures: int
    side: int


@dataclass(frozen=True)
class RowTokens:
    """Tokens of a row as the trainer runs it.

    Attributes:
        run: of all its documents on the shared path.
        longest: of its longest prompt with the longest answer.
        pictures: image tokens of its longest prompt.
        prompt: tokens of that prompt without them.
        answer: of the longest answer.
        scored: tokens of the answers of all views.
    """

    run: int
    longest: int
    pictures: int
    prompt: int
    answer: int
    scored: int


def measure(reader: Reader, row: Mapping[str, Any], image_token: int, max_length: int | None) -> RowTokens:
    """Tokens of a row.

    Raises:
        PromptTooLong: its prompt fills `max_length`.
    """
    read = reader.read([row], max_length)
    prompt = max((document.prompt for document in read.documents), key=len)
    pictures = int((prompt == image_token).sum())
    answers = [len(answer) for document in read.documents for answer in document.answers]
    scored = [len(read.documents[number].answers[branch]) for ((number, branch),) in read.places.values()]
    longest = len(prompt) + max(answers)
    return RowTokens(read.tokens("split"), longest, pictures, len(prompt) - pictures, max(answers), sum(scored))


def sized_rows(
    processor: Any, views: Sequence[str], size: RowSize, number: int, image_token: int
) -> list[dict[str, Any]]:
    """Rows of one size, each with pictures of its own.

    Texts are one word over and over, as often as the tokenizer needs for the tokens asked for. A template that takes more than
    that is left as it is.

    Args:
        processor: the model's processor.
        views: names of `VIEWS` that are looked at.
        size: of each row.
        number: how many.
        image_token: id of a piece of a picture.
    """
    reader = Reader(processor, views, missing_end(processor))

    def row(place: int, prompt: int, answer: int) -> dict[str, Any]:
        def pictures(shade: int) -> list[Any]:
            colours = [(shade, place % 256, (place // 256 + piece) % 256) for piece in range(size.pictures)]
            return [encode_png(_plain(size.side, colour)) for colour in colours]

        other = any(VIEWS[view].images in ("rejected_images", EITHER) for view in views)
        return {
            "id": f"{size}-{place}",
            "images": pictures(64),
            "rejected_images": pictures(128) if other else [],
            "prompt": [user_message(" a" * prompt, size.pictures)],
            "chosen": [assistant_message("a" + " a" * answer)],
            "rejected": [assistant_message("b" + " a" * answer)],
        }

    short, long = (measure(reader, row(0, words, words), image_token, None) for words in (1, 101))
    prompt = 1 + max(0, round((size.prompt - short.prompt) * 100 / (long.prompt - short.prompt)))
    answer = 1 + max(0, round((size.answer - short.answer) * 100 / (long.answer - short.answer)))
    return [row(place, prompt, answer) for place in range(number)]


def _plain(side: int, colour: tuple[int, int, int]) -> Image.Image:
    """A picture of one colour as a palette of one entry: a bit a pixel, which encodes many times faster than RGB."""
    picture = Image.new("P", (side, side), 0)
    picture.putpalette(colour)
    return picture


def again(row: Mapping[str, Any], turn: int) -> dict[str, Any]:
    """A row under another name and with a picture that counts as another, so that it shares nothing with the first."""
    pictures = {
        side: [_other_bytes(picture, turn) for picture in row.get(side) or []] for side in ("images", "rejected_images")
    }
    return {**row, **pictures, "id": f"{row['id']}-{turn}"}


def _other_bytes(picture: Any, turn: int) -> Any:
    data = picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()
    return {"bytes": data + b" " * turn, "path": None}  # decoders stop at the picture's end
