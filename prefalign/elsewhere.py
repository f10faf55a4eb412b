"""What other rows of the same data have: pictures and texts that are put where they do not belong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prefalign import sources
from prefalign.images import EncodedImage, sha256
from prefalign.records import Candidates
from prefalign.sources import DataConfig
from prefalign.store import OutputConfig
from prefalign.surveys import Survey

if TYPE_CHECKING:
    from prefalign.pictures import PicturePool

TRIES = 50
"""Texts drawn to find one about another picture."""


class Elsewhere:
    """Pictures and texts of all candidates of a data set, read when the first of them is asked for.

    Args:
        stage: name of the stage, for the progress bar.
        data: the candidates.
        output: where the stage writes; the pool of pictures and what was read of the texts are kept there.
    """

    def __init__(self, stage: str, data: DataConfig, output: OutputConfig):
        self._stage, self._data, self._output = stage, data, output

    def text(self, own: Sequence[str], rng: random.Random) -> str | None:
        """A text about other pictures than these (hex SHA-256), drawn; None if none was found in `TRIES` draws."""
        drawn = (rng.choice(self._texts) for _ in range(TRIES))
        return next((text for images, text in drawn if not set(images) & set(own)), None)

    def pictures(self, own: Sequence[str], rng: random.Random) -> list[EncodedImage] | None:
        """As many other pictures as these (hex SHA-256), drawn from all pictures of the data; None if there are too few."""
        count, pool = len(own), self._pool
        drawn = rng.sample(range(len(pool)), min(len(pool), count + len(set(own))))
        numbers = (int(pool.by_digest[place]) for place in drawn)
        found = [number for number in numbers if pool.digest(number) not in own][:count]
        return [pool[number] for number in found] if len(found) == count else None

    @cached_property
    def _pool(self) -> PicturePool:
        from prefalign.pictures import build_pool

        return build_pool(self._output.path / "pool", self._data)

    @cached_property
    def _texts(self) -> list[tuple[list[str], str]]:
        """Every text with the pictures it is about, as SHA-256, in the order of its row's id."""
        total, repeated = sources.survey(self._data)
        survey = Survey(self._stage, self._data, self._output, Candidates, total, repeated)
        found = [row for block in survey("texts", lambda block: [_said(row) for row in block]) for row in block]
        return [(row["images"], text) for row in sorted(found, key=lambda row: row["id"]) for text in row["texts"]]


def _said(row: Candidates) -> dict[str, Any]:
    texts = [response["text"] for response in row.responses if response["text"].strip()]
    return {"id": row.id, "images": [sha256(image) for image in row.images], "texts": texts}
