"""Prompts to answer: the folder of a stage that makes prompts or pairs, as Arrow on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prefalign.manifest import read_manifest
from prefalign.records import Pair, Prompt

if TYPE_CHECKING:
    from datasets import Dataset


def load_prompts(folder: Path) -> Dataset:
    """Rows of `id`, `images` (encoded), `messages`, `answer` and `facts` (JSON text).

    Args:
        folder: finished output of a stage: `Prompt` rows, or `Pair` rows, whose answers are not looked at.

    Raises:
        ValueError: the folder is not the finished output of a stage, holds no row, or its rows are neither.
    """
    import pyarrow.parquet as pq
    from datasets import Features, Image, List, load_dataset

    manifest = read_manifest(folder)
    if manifest is None or not manifest.complete:
        raise ValueError(
            f"{folder} holds no finished rows (no manifest.json). Give the output folder of a stage that makes prompts or pairs; if "
            "one was interrupted, start it again with the same config and it resumes."
        )
    if manifest.rows_out == 0:
        raise ValueError(f"{folder} holds 0 rows; there is nothing to ask.")
    shards = sorted(str(shard) for shard in folder.glob("data/*.parquet"))
    present = set(pq.read_schema(shards[0]).names)
    if not {"messages", "facts"} <= present and "prompt" not in present:
        raise ValueError(
            f"the rows of {folder} have no question that is open (they have {', '.join(sorted(present))}). Give a folder of prompts "
            "(`prefalign scenes export`, or any stage's input) or of pairs."
        )
    question, kind = ("prompt", Pair) if "prompt" in present else ("messages", Prompt)
    wanted = ("id", "images", question, "answer", "facts")
    features = {name: value for name, value in kind.features().items() if name in wanted}
    features["images"] = List(Image(decode=False))
    rows = load_dataset(
        "parquet", data_files=shards, columns=list(features), features=Features(features), split="train"
    )
    return rows.rename_column("prompt", "messages") if question == "prompt" else rows
