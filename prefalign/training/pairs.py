"""A pairs folder as a memory-mapped dataset, pictures left encoded, and the rows that fit `max_length`."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prefalign.losses import VIEWS
from prefalign.losses.term import EITHER
from prefalign.manifest import Manifest, read_manifest, refuse_data_file
from prefalign.progress import progress_bar
from prefalign.records import ON_TWO_PICTURES, Pair, message_text
from prefalign.shards import whole_shards
from prefalign.sources import parquet_rows
from prefalign.text import same_answer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from datasets import Dataset

    from prefalign.negatives import Negative
    from prefalign.training.collator import PreferenceCollator

COLUMNS = ("id", "images", "rejected_images", "prompt", "chosen", "rejected")


def load_pairs(folder: Path) -> Dataset:
    """The columns that training reads, as Arrow on disk; a row's pictures are decoded when it is collated.

    Raises:
        ValueError: the folder is not the finished output of a stage.
    """
    pairs_manifest(folder)
    return load_columns(folder, COLUMNS)


def load_columns(folder: Path, columns: Sequence[str]) -> Dataset:
    """Some columns of the rows of a pairs folder, pictures left encoded."""
    from datasets import Features, Image, List, load_dataset

    shards = sorted(str(shard) for shard in folder.glob("data/*.parquet"))
    encoded = List(Image(decode=False))
    features = Features(
        {name: encoded if "images" in name else kind for name, kind in Pair.features().items() if name in columns}
    )
    return load_dataset("parquet", data_files=shards, columns=list(features), features=features, split="train")


def pairs_manifest(folder: Path) -> Manifest:
    """The manifest of a finished pairs folder.

    Raises:
        ValueError: there is none, or the folder holds no pairs, or rows of another kind, or shards are damaged or lost.
    """
    refuse_data_file(folder, "pairs")
    manifest = read_manifest(folder)
    if manifest is None and (folder / "pairs" / "manifest.json").is_file():
        raise ValueError(
            f"{folder} holds several folders of rows, and training reads one of them. Its pairs are in {folder / 'pairs'}: give "
            "that."
        )
    if manifest is None or not manifest.complete:
        raise ValueError(
            f"{folder} holds no finished pairs (no manifest.json). Give the output folder of a stage that makes pairs; if one "
            "was interrupted, start it again with the same config and it resumes."
        )
    if manifest.rows_out == 0:
        raise ValueError(f"{folder} holds 0 pairs; there is nothing to train on.")
    present = whole_shards(folder, manifest).columns
    if lacking := [name for name in COLUMNS if name not in present]:
        raise ValueError(
            f"the rows of {folder} are no pairs: they have no {', '.join(lacking)} (stage `{manifest.stage}` wrote "
            f"{', '.join(present)}). Give the output of a stage that makes pairs; on prompts and examples "
            "`prefalign run train_sft` trains."
        )
    return manifest


def check_negative(dataset: Dataset, views: Sequence[str], folder: Path, negative: Negative) -> None:
    """Check that a negative can be made on the fly, and that some row to train on needs it.

    Raises:
        ValueError: says why not.
    """
    if all(VIEWS[view].images != "rejected_images" for view in views):
        raise ValueError(
            f"negative.kind is {negative.kind!r}, and no loss of this run looks at another picture, so nothing would come of it. "
            "Leave `negative` out, or add {name: visual} to `losses`."
        )
    if negative.kind == "swap":
        raise ValueError(
            "negative.kind 'swap' shows a picture of another row, and a batch knows its own rows only. Store such pairs first "
            "(`prefalign run image_contrast --negative.kind swap`), or take crop, diffusion, blur, mask or blank."
        )
    if not rows_without(dataset, "rejected_images"):
        raise ValueError(
            f"negative.kind is {negative.kind!r}, and all {len(dataset)} pairs of {folder} have `rejected_images` already, "
            "which are kept, so nothing would be made. Take these with `--negative null`, or store others: `prefalign run "
            "image_contrast`."
        )


def check_columns(dataset: Dataset, views: Sequence[str], folder: Path, negative: Negative | None = None) -> None:
    """Check that each row has what a run's views look at; only lengths are read.

    Views on `images` alone take rows without a picture too. Rows without `rejected_images` are fine where a `negative` makes
    them from `images` on the fly.

    Raises:
        ValueError: names the column, how many rows lack it, and what to do.
    """
    needed = {VIEWS[view].answer for view in views}
    pictures = {VIEWS[view].images for view in views}
    if "rejected_images" in pictures:
        needed |= {"images", "rejected_images"} if negative is None else {"images"}
    if None in pictures:
        needed.add("images")
    for column in sorted(needed):
        if empty := rows_without(dataset, column):
            looking = ", ".join(view for view in views if column in (VIEWS[view].images, VIEWS[view].answer))
            hint = (
                "Pairs with another picture come from the stages image_contrast and re_align, and from the stage povid with "
                "`rejected_images: noised`; `negative.kind: crop` makes the picture on the fly; losses [{name: text}] need none."
                if column == "rejected_images"
                else "Take them out, or make the pairs again."
            )
            raise ValueError(
                f"the losses look at `{column}` (views {looking or ', '.join(views)}), which is empty in {empty} of the "
                f"{len(dataset)} pairs of {folder}. {hint}"
            )


def check_rejected_side(dataset: Dataset, folder: Path, reading: Sequence[str]) -> None:
    """Check that the losses read each rejected answer on the pictures that it was rejected for.

    Args:
        dataset: all rows of `folder`.
        folder: pairs folder.
        reading: names of the losses that depend on the rejected answer.

    Raises:
        ValueError: pairs `on_two_pictures` and another loss than `two_pictures`, or that loss and other pairs whose two answers
            and pictures differ.
    """
    apart = on_two_pictures(folder)
    others = [name for name in reading if name != "two_pictures"]
    if any(apart) and others:
        raise ValueError(
            f"{sum(apart)} of the {len(dataset)} pairs of {folder} reject an answer about `rejected_images` "
            f"(`meta.{ON_TWO_PICTURES}`), and {', '.join(others)} would reject it on `images`, where it may be right. Take "
            "[{name: two_pictures}], which reads each answer on its own picture, or with it losses that read the chosen answer "
            "alone, such as visual; or, if these answers are wrong of `images` too, import the rows without `rejected_images`."
        )
    if "two_pictures" not in reading:
        return
    texts = _texts_are_one(dataset)
    wrong = sum(
        pictures and not (two or same)
        for pictures, two, same in zip(_filled(dataset, "rejected_images"), apart, texts, strict=True)
    )
    if wrong:
        raise ValueError(
            f"two_pictures reads the rejected answer on `rejected_images`, and {wrong} of the {len(dataset)} pairs of {folder} "
            f"have such pictures without saying that it is about them (`meta.{ON_TWO_PICTURES}` is true in what "
            "import_published makes of ms-swift's rows). Elsewhere that answer was rejected on `images`: take [{name: text}, "
            "{name: visual}], or [{name: s_vco}] where each text is true of its own picture."
        )


def on_two_pictures(folder: Path) -> list[bool]:
    """For each row of a pairs folder, whether it is `Pair.on_two_pictures`."""
    metas = (
        row.get("meta") or ""
        for shard in sorted(folder.glob("data/*.parquet"))
        for row in parquet_rows(shard, ["meta"])
    )
    return [ON_TWO_PICTURES in meta and json.loads(meta).get(ON_TWO_PICTURES) is True for meta in metas]


def check_texts(dataset: Dataset, views: Sequence[str], folder: Path) -> None:
    """Check that a comparison has something to compare; a loss that only imitates needs no such check.

    Raises:
        ValueError: all views show the same pictures, and in every row both answers are one text.
    """
    if all(_same_texts(dataset, views)):
        raise ValueError(
            f"chosen and rejected are the same text in all {len(dataset)} pairs of {folder}, and the losses show both "
            "on the same pictures: every loss is the same and has no gradient. Add {name: visual} to `losses`, which "
            "compares pictures, or take pairs with two texts."
        )


def _same_texts(dataset: Dataset, views: Sequence[str]) -> Iterator[bool]:
    """For each row, whether a run compares a text with itself on the same pictures."""
    one_picture = _compares_on_one_picture(views)
    others = _filled(dataset, "rejected_images") if _reads_either(dataset, views) else itertools.repeat(False)
    return (one_picture and same and not other for same, other in zip(_texts_are_one(dataset), others, strict=False))


def _texts_are_one(dataset: Dataset) -> Iterator[bool]:
    """For each row, whether both answers are one text."""
    table = dataset.with_format("arrow").select_columns(["chosen", "rejected"])
    for batch in table.iter(batch_size=1000):
        for row in batch.to_pylist():
            yield same_answer(*(message_text(row[side]) for side in ("chosen", "rejected")))


def _reads_either(dataset: Dataset, views: Sequence[str]) -> bool:
    return any(VIEWS[view].images == EITHER for view in views) and "rejected_images" in dataset.column_names


def _compares_on_one_picture(views: Sequence[str]) -> bool:
    """Whether a run compares on the same pictures; with `EITHER`, in rows without others."""
    pictures = {VIEWS[view].images for view in views}
    return len(views) > 1 and (len(pictures) == 1 or pictures == {"images", EITHER})


def rows_without(dataset: Dataset, column: str) -> int:
    """Rows whose list in a column is empty or null."""
    return sum(not filled for filled in _filled(dataset, column))


def _filled(dataset: Dataset, column: str) -> Iterator[bool]:
    """For each row, whether its list in a column holds anything; only lengths are read."""
    import pyarrow.compute as pc

    table = dataset.with_format("arrow").select_columns(column)
    for batch in table.iter(batch_size=1000):
        yield from pc.greater(pc.fill_null(pc.list_value_length(batch[column]), 0), 0).to_pylist()


@dataclass
class Fit:
    """Which rows fit `max_length`, and what else a run should know of those that do. `rows_in == rows_used + len(too_long)`.

    Attributes:
        rows_in: rows looked at.
        rows_used: rows kept.
        too_long: id to tokens of the prompt, for rows dropped because the prompt fills `max_length`.
        answers_cut: rows kept of which an answer loses its end.
        same_texts: rows kept that compare a text with itself on the same pictures, which has no gradient.
        same_when_cut: rows kept that do so only because `max_length` cuts both answers before they differ.
        stored_pictures: with a `negative`, rows kept that show `rejected_images` of their own instead.
        without_picture: rows kept that show no picture.
    """

    rows_in: int
    rows_used: int
    too_long: dict[str, int] = field(default_factory=dict)
    answers_cut: int = 0
    same_texts: int = 0
    same_when_cut: int = 0
    stored_pictures: int = 0
    without_picture: int = 0

    @property
    def needed(self) -> int:
        """Smallest `max_length` that keeps every row."""
        return max(self.too_long.values()) + 1

    def counts(self) -> dict[str, int]:
        """The numbers, as they go among a run's metrics."""
        return {"rows_in": self.rows_in, "rows_used": self.rows_used, "rows_prompt_too_long": len(self.too_long)}

    def summary(self) -> str:
        """What was dropped, why, and what would keep it; empty if everything fits."""
        parts = []
        if self.too_long:
            some = ", ".join(list(self.too_long)[:5]) + (" ..." if len(self.too_long) > 5 else "")
            parts.append(
                f"dropped {len(self.too_long)} of {self.rows_in} rows whose prompt and image tokens fill max_length ({some}); "
                f"max_length {self.needed} keeps all of them"
            )
        if self.answers_cut:
            parts.append(f"{self.answers_cut} rows lose the end of an answer to max_length")
        if self.same_texts:
            parts.append(f"{self.same_texts} have one text as both answers, from which a comparison learns nothing")
        if self.same_when_cut:
            parts.append(
                f"{self.same_when_cut} have one text as both answers once cut; a greater max_length tells them apart"
            )
        if 0 < self.rows_used == self.without_picture:
            parts.append("none has a picture, so nothing visual is learned")
        if self.stored_pictures:
            made = self.rows_used - self.stored_pictures
            parts.append(f"{self.stored_pictures} show the other picture stored with them, {made} one made on the fly")
        return "; ".join(parts)


def keep_fitting(dataset: Dataset, collator: PreferenceCollator) -> tuple[Dataset, Fit]:
    """Drop rows whose prompt leaves no room for an answer; with `max_length` None none is dropped.

    Raises:
        ValueError: no row is left.
    """
    if collator.max_length is None:
        return dataset, _counted(dataset, collator, Fit(rows_in=len(dataset), rows_used=len(dataset)))
    fit = Fit(rows_in=len(dataset), rows_used=0)
    one_picture, either = _compares_on_one_picture(collator.views), _reads_either(dataset, collator.views)
    keep = []
    for index, row in enumerate(progress_bar(dataset, desc="count tokens", unit="row")):
        lengths = collator.lengths(row)
        if lengths.prompt >= collator.max_length:
            fit.too_long[row["id"]] = lengths.prompt
            continue
        fit.answers_cut += lengths.total > collator.max_length
        one = one_picture and not (either and row["rejected_images"])
        fit.same_when_cut += one and collator.max_length - lengths.prompt <= lengths.alike
        keep.append(index)
    fit.rows_used = len(keep)
    if not keep:
        raise ValueError(
            f"no row fits max_length {collator.max_length}: the shortest prompt needs {min(fit.too_long.values()) + 1} and "
            f"max_length {fit.needed} keeps all {fit.rows_in} rows. Image tokens are never cut. Raise max_length, or "
            "leave it out."
        )
    kept = dataset.select(keep)
    return kept, _counted(kept, collator, fit)


def _counted(dataset: Dataset, collator: PreferenceCollator, fit: Fit) -> Fit:
    fit.same_texts = sum(_same_texts(dataset, collator.views))
    fit.without_picture = rows_without(dataset, "images")
    if collator.negative is not None:
        fit.stored_pictures = len(dataset) - rows_without(dataset, "rejected_images")
    return fit
