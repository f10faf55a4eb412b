"""Rows of pairs to batches: TRL's vision collator, with a picture of its own for each side and image tokens never cut.

Shapes: B rows, T tokens. A batch stacks the two sides, `[first view; second view]`, as TRL's losses expect, so every
per-token tensor is (2B, T); tensors that hold pictures follow the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from prefalign.images import EncodedImage, encode_png, open_image, read_image
from prefalign.losses import TERMS, Term
from prefalign.negatives import Negative, negatives
from prefalign.records import normalise_messages, placeholder_count

if TYPE_CHECKING:
    from PIL import Image
    from transformers import ProcessorMixin


class PromptTooLong(ValueError):
    """A prompt that fills `max_length`: cutting it would cut image tokens or leave no answer."""


@dataclass
class Lengths:
    """Tokens of one row.

    Attributes:
        prompt: prompt with its image tokens, the longer of the two sides.
        total: prompt and answer, end of turn included, the longer of the two sides.
    """

    prompt: int
    total: int


@dataclass
class PreferenceCollator:
    """Collate rows with `images`, `rejected_images`, `prompt`, `chosen`, `rejected` for a preference term.

    Equal to TRL's `DataCollatorForVisionPreference`, every key and every bit, where both views use `images`. Rows are
    read, never edited. Pictures are encoded (`{"bytes", "path"}`) or `PIL.Image`; every key of the processor is passed
    on.

    Attributes:
        processor: the model's processor.
        term: the preference term; its two views decide picture and answer of each half of the batch.
        max_length: longest sequence; only answers are cut to it. None cuts nothing.
        negative: how `rejected_images` are made for rows that have none, decided by `seed` and the row's id: the same at every
            visit, for policy and reference, and the same that the stage `image_contrast` stores with these settings.
        seed: seed of the negatives.
    """

    processor: ProcessorMixin
    term: Term = field(default_factory=lambda: TERMS["text"])
    max_length: int | None = None
    negative: Negative | None = None
    seed: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build a batch.

        Returns:
            `input_ids`, `attention_mask`, `completion_mask` (2B, T) int64 and whatever else the processor gives.

        Raises:
            ValueError: placeholders and pictures of a side disagree, or a prompt leaves no room (`PromptTooLong`).
        """
        batch = self._uncut(rows)
        if self.max_length is None:
            return batch
        first_answer_token = batch["completion_mask"].argmax(dim=1)
        for row, position in enumerate(first_answer_token.tolist()):
            if position >= self.max_length:
                raise PromptTooLong(
                    f"row {_name(rows[row % len(rows)])}: the prompt has {position} tokens with its image tokens, and "
                    f"max_length {self.max_length} leaves no room for an answer. Raise max_length to {position + 1} or "
                    "more, or leave it out."
                )
        shape = batch["input_ids"].shape
        return {key: value[:, : self.max_length] if _per_token(value, shape) else value for key, value in batch.items()}

    def lengths(self, row: Mapping[str, Any]) -> Lengths:
        """Tokens that one row needs."""
        batch = self._uncut([row])
        return Lengths(
            prompt=int(batch["completion_mask"].argmax(dim=1).max()),
            total=int(batch["attention_mask"].sum(dim=1).max()),
        )

    def _uncut(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        first, second = self.term.sides
        examples, other_images = [], []
        for row in rows:
            prompt = normalise_messages(row["prompt"])
            images = self._pictures(row, first.images, placeholder_count(prompt))
            if second.images != first.images:
                other_images.append(self._pictures(row, second.images, placeholder_count(prompt)))
            examples.append(
                {
                    "images": images,
                    "prompt": prompt,
                    "chosen": normalise_messages(row[first.answer]),
                    "rejected": normalise_messages(row[second.answer]),
                }
            )
        processor = _TwoPictures(self.processor, other_images) if other_images else self.processor
        return dict(DataCollatorForVisionPreference(processor)(examples))

    def _pictures(self, row: Mapping[str, Any], side: str, placeholders: int) -> list[Image.Image]:
        pictures = row.get(side) or []
        if side == "rejected_images" and not pictures and self.negative is not None:
            own = self._pictures(row, "images", placeholders)
            return negatives(own, self.negative, seed=self.seed, identity=row["id"])
        if len(pictures) != placeholders:
            hint = (
                f"Term {self.term.name!r} needs {side}: use pairs that have them, or term 'text'."
                if side == "rejected_images"
                else "Write one placeholder for each picture, in order."
            )
            raise ValueError(
                f"row {_name(row)}: the prompt has {placeholders} image placeholder(s) and `{side}` holds {len(pictures)} "
                f"picture(s); the model would see the wrong picture or none. {hint}"
            )
        return [decode(picture) for picture in pictures]


def decode(picture: EncodedImage | Image.Image) -> Image.Image:
    """An RGB picture from encoded bytes, from a `datasets` file reference, or from a `PIL.Image` that `datasets` decoded."""
    if isinstance(picture, Mapping):
        if picture["bytes"] is None and picture["path"]:
            return open_image(read_image(Path(picture["path"])))
        return open_image(picture)
    if picture.mode == "RGB":
        return picture
    return open_image(encode_png(picture if picture.mode != "CMYK" else picture.convert("RGB")))


class _TwoPictures:
    """A processor that shows the second half of the rows another list of pictures than the first.

    TRL's collator repeats one list of pictures for both halves; this is the one place where the halves differ.
    """

    def __init__(self, processor: ProcessorMixin, other_images: list[list[Image.Image]]):
        self._processor = processor
        self._other_images = other_images

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, images: Any = None, **kwargs: Any) -> Any:
        if images is not None:
            images = list(images[: len(self._other_images)]) + self._other_images
        return self._processor(images=images, **kwargs)


def _per_token(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shape and not value.is_floating_point()


def _name(row: Mapping[str, Any]) -> str:
    return str(row.get("id", "(without id)"))
