"""Prompts to answer: the folder of a stage that makes prompts or pairs, as Arrow on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign import families
from prefalign.manifest import read_manifest
from prefalign.online.conversations import Conversation, bridge, linked, single
from prefalign.online.rollout import VIEW, read_prompts
from prefalign.records import Pair, Prompt, message_text, user_message
from prefalign.training.documents import Reader

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin


@dataclass
class Fit:
    """Which prompts are asked. `rows_in == rows_used + len(too_long)`.

    Attributes:
        rows_in: rows of the folder.
        rows_used: rows that are asked.
        too_long: id to tokens, for prompts that leave no room for an answer.
    """

    rows_in: int
    rows_used: int = 0
    too_long: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """What was dropped, empty if nothing was."""
        if not self.too_long:
            return ""
        some = ", ".join(f"{name} with {tokens} tokens" for name, tokens in list(self.too_long.items())[:3])
        return f"dropped {len(self.too_long)} of {self.rows_in} prompts that leave no room for an answer in max_length ({some})"

    def counts(self) -> dict[str, int]:
        """Numbers of rows for a run's metrics."""
        return {"rows_in": self.rows_in, "rows_used": self.rows_used, "rows_prompt_too_long": len(self.too_long)}


def keep_fitting(
    dataset: Dataset,
    processor: ProcessorMixin,
    max_length: int | None,
    max_new_tokens: int,
    *,
    conversations: bool = False,
) -> tuple[Dataset, Fit]:
    """Drop prompts, pictures included, that leave no room for an answer; nothing is ever cut.

    Args:
        dataset: rows of `load_prompts`.
        processor: the model's.
        max_length: longest prompt with its answer; None drops none.
        max_new_tokens: longest answer.
        conversations: every question of a row is asked, in whatever order, and answered.
    """
    fit = Fit(len(dataset))
    if max_length is None:
        fit.rows_used = len(dataset)
        return dataset, fit
    reader = Reader(processor, [VIEW], families.missing_end(processor))
    kept = []
    for number, row in enumerate(dataset):
        plan = linked(row, "", permute=False, seed=0) if conversations else single(row)
        tokens = len(read_prompts(reader, [{**row, "messages": plan.messages}]).documents[0].prompt)
        tokens += _given_later(processor, plan) + len(plan.later) * max_new_tokens
        if tokens + max_new_tokens > max_length:
            fit.too_long[str(row["id"])] = tokens
        else:
            kept.append(number)
    fit.rows_used = len(kept)
    if not kept:
        raise ValueError(
            f"none of the {len(dataset)} prompts leaves room for {max_new_tokens} new tokens in max_length "
            f"{max_length} (the first has {next(iter(fit.too_long.values()))}). Raise trainer.max_length, or lower "
            "trainer.max_new_tokens."
        )
    return dataset.select(kept), fit


def _given_later(processor: Any, plan: Conversation) -> int:
    """Most tokens that a conversation adds to its prompt beside the answers, whichever question comes first."""
    if not plan.later:
        return 0

    def opened(question: str) -> int:
        return len(processor.tokenizer(families.render(processor, [user_message(question)])).input_ids)

    questions = [message_text(plan.messages[-1:]), *plan.later]
    between = [len(bridge(processor, plan.messages, question, ended=False)) for question in questions]
    swaps = [
        opened(question) - opened(questions[0]) - added for question, added in zip(questions, between, strict=True)
    ]
    return sum(between) + max(swaps)


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
            f"{folder} holds no finished rows (no manifest.json). Give the output folder of a stage that makes prompts "
            "or pairs; if one was interrupted, start it again with the same config and it resumes."
        )
    if manifest.rows_out == 0:
        raise ValueError(f"{folder} holds 0 rows; there is nothing to ask.")
    shards = sorted(str(shard) for shard in folder.glob("data/*.parquet"))
    present = set(pq.read_schema(shards[0]).names)
    if not {"messages", "facts"} <= present and "prompt" not in present:
        raise ValueError(
            f"the rows of {folder} have no question that is open (they have {', '.join(sorted(present))}). Give a "
            "folder of prompts (`prefalign scenes export`, or any stage's input) or of pairs."
        )
    question, kind = ("prompt", Pair) if "prompt" in present else ("messages", Prompt)
    wanted = ("id", "images", question, "answer", "facts")
    features = {name: value for name, value in kind.features().items() if name in wanted}
    features["images"] = List(Image(decode=False))
    rows = load_dataset(
        "parquet", data_files=shards, columns=list(features), features=Features(features), split="train"
    )
    return rows.rename_column("prompt", "messages") if question == "prompt" else rows
