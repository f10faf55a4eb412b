"""Image contrast: any pairs, with a second picture that supports their chosen answer no longer.

The texts stay; `rejected_images` is the row's picture cropped, noised, blurred, masked or blanked, or another picture of the
data. A visual term compares the chosen answer on the two pictures. Rows with one reference answer (`reads: answers`) become
pairs whose two texts are that answer: good for the visual term alone.

Paper: Wang, Zhou, Huang et al., "mDPO: Conditional Preference Optimization for Multimodal Large Language Models", arXiv
2406.11839, section 3.2 and table 4. Code: luka-group/mDPO. Other kinds: POVID (2402.11411), CHiP (2501.16629), V-DPO
(2411.02712), OPA-DPO (2501.09695). Differs from mDPO's code: the crop is drawn once for each row, not anew in every forward
(policy and reference see the same one), and on the picture itself, not on the padded tensor.

Needs: pairs with pictures (or rows with reference answers); no model. `prefalign run train_preference --negative.kind crop`
makes the same pictures on the fly, without storing them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from prefalign import stages, store
from prefalign.corruption import crop_box, difference
from prefalign.images import EncodedImage, encode_png, sha256
from prefalign.manifest import Manifest
from prefalign.negatives import Negative, negative_seed, negatives
from prefalign.records import Pair, Prompt, assistant_message, message_text, record_id
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import same_answer

if TYPE_CHECKING:
    from PIL import Image

    from prefalign.pictures import PicturePool

METHOD = "image_contrast"


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: pairs, or rows with reference answers.
        output: folder of pairs.
        negative: how the other picture is made.
        reads: `pairs`, or `answers` for rows with a reference answer, which is then both texts of the pair.
        existing: what happens to `rejected_images` that a pair has already: `replace` (facts about them go too) or `keep`.
        least_change: a row is dropped as `unchanged` if none of its pictures changes by more than this (mean absolute difference,
            0 to 1): a crop of a plain wall shows the same wall.
        seed: with a row's id it decides boxes, noise, masks and swaps.
    """

    data: DataConfig
    output: OutputConfig
    negative: Negative = field(default_factory=Negative)
    reads: Literal["pairs", "answers"] = "pairs"
    existing: Literal["replace", "keep"] = "replace"
    least_change: float = 0.004
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.least_change < 1:
            raise ValueError(
                f"least_change is {self.least_change}; give a difference from 0 up to 1, such as 0.004 (one grey level of 255)."
            )


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""

    @cache
    def pool() -> PicturePool:
        from prefalign.pictures import build_pool

        return build_pool(config.output.path / "pool", config.data)

    return store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, config, pool),
        output=config.output,
        record=Pair,
        settings=row_settings(config),
        seed=config.seed,
        reads=Pair if config.reads == "pairs" else Prompt,
    )


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows."""
    return {**config.negative.settings(), "reads": config.reads, "existing": config.existing,
            "least_change": config.least_change}  # fmt: skip


def process(block: list[Pair] | list[Prompt], config: Config, pool: Callable[[], PicturePool]) -> list[Outcome]:
    """One outcome for each row of a block; `pool` gives the pictures of the data, for `swap`."""
    return [_outcome(row, config, pool) for row in block]


def _outcome(row: Pair | Prompt, config: Config, pool: Callable[[], PicturePool]) -> Outcome:
    if not row.images:
        return Dropped("no_picture")
    if isinstance(row, Prompt):
        if row.answer is None or not row.answer.strip():
            return Dropped("no_reference")
        row = _same_text(row, row.answer)
    if row.on_two_pictures:  # with another picture its rejected answer would be about nothing
        return Dropped("two_pictures")
    had = bool(row.rejected_images)
    if had and config.existing == "keep":
        return [_pair(row, row.rejected_images, {"kind": "kept", "existing": "kept"}, config)]
    images = stages.opened(row.images)
    if isinstance(images, Failed):
        return images
    numbers = config.negative.numbers(len(images))
    swapped: list[EncodedImage] = []
    if config.negative.kind == "swap":
        drawn = _others(pool(), row, numbers, config.seed)
        if drawn is None:
            return Dropped("no_other_picture")
        swapped = drawn
    shown = stages.opened(swapped)
    if isinstance(shown, Failed):
        return shown
    made = negatives(images, config.negative, seed=config.seed, identity=row.id, others=shown)
    changes = [difference(images[number], made[number]) for number in numbers]
    if max(changes) <= config.least_change:
        return Dropped("unchanged")
    meta = {
        **config.negative.settings(),
        "change": [round(change, 6) for change in changes],
        "negative_seeds": [negative_seed(config.seed, row.id, number) for number in numbers],
        "existing": "replaced" if had else "none",
    }
    if config.negative.kind == "crop":
        meta["crop_box"] = [_relative_box(images[number], row, number, config) for number in numbers]
    if swapped:
        meta["swapped_sha256"] = [sha256(picture) for picture in swapped]
    encoded = [
        encode_png(made[number], f"{config.negative.kind}-{number}.png") if number in numbers else row.images[number]
        for number in range(len(made))
    ]
    # what a pair of two pictures knew of the other one does not hold for this one
    facts = {name: value for name, value in row.facts.items() if not (had and name in ("rejected", "category"))}
    return [_pair(dataclasses.replace(row, facts=facts), encoded, {**meta, "two_sided": False}, config)]


def _others(pool: PicturePool, row: Pair, numbers: Iterable[int], seed: int) -> list[EncodedImage] | None:
    """A picture for each place in `numbers`, all different and none of the row's own; None if the data has too few.

    They are drawn by digest, so that the order of the rows decides nothing.
    """
    taken = {pool.number_of(image) for image in row.images} - {None}
    drawn = []
    for number in numbers:
        if len(taken) >= len(pool):
            return None
        rng = random.Random(negative_seed(seed, row.id, number))
        while (found := int(pool.by_digest[rng.randrange(len(pool))])) in taken:
            pass
        taken.add(found)
        drawn.append(pool[found])
    return drawn


def _same_text(prompt: Prompt, answer: str) -> Pair:
    """A pair of one answer with itself: only the pictures will differ."""
    return Pair(id=prompt.id, images=prompt.images, prompt=prompt.messages, chosen=[assistant_message(answer)],
                rejected=[assistant_message(answer)], method="", answer=answer, facts=prompt.facts)  # fmt: skip


def _relative_box(image: Image.Image, row: Pair, number: int, config: Config) -> list[float]:
    """Left, top, width and height of the crop as shares of the picture's sides."""
    how = config.negative
    box = crop_box(image.size, seed=negative_seed(config.seed, row.id, number), area=how.area, aspect=how.aspect,
                   least_side=how.least_side)  # fmt: skip
    return [round(value / side, 6) for value, side in zip(box, image.size * 2, strict=True)]


def _pair(row: Pair, others: list[EncodedImage], meta: dict[str, Any], config: Config) -> Pair:
    """The row with its other pictures, under an id of its own; what was known of it stays in `meta`."""
    settings = row_settings(config)
    known = {"parent": row.id, "seed": config.seed, "settings": settings,
             "images_sha256": [sha256(image) for image in row.images],
             "same_text": same_answer(message_text(row.chosen), message_text(row.rejected)), **meta,
             "parent_method": row.method, "parent_meta": row.meta}  # fmt: skip
    return dataclasses.replace(
        row,
        id=record_id(method=METHOD, parent=row.id, settings=settings, model="", seed=config.seed),
        method=METHOD,
        rejected_images=list(others),
        meta=known,
    )


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
