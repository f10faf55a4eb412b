"""Rows to imitate: conversations, chosen answers of pairs or reference answers, collated with the loss on the answers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl.data_utils import apply_chat_template
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from prefalign import families
from prefalign.config import ConfigError
from prefalign.images import ImageError
from prefalign.manifest import read_manifest, refuse_data_file
from prefalign.progress import progress_bar
from prefalign.records import (
    Example,
    Message,
    Pair,
    Prompt,
    assistant_message,
    message_text,
    normalise_messages,
    placeholder_count,
)
from prefalign.shards import whole_shards
from prefalign.training.documents import decode
from prefalign.training.pairs import rows_without

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin

COLUMNS = ("id", "images", "messages", "prompt", "completion")

Answer = Literal["chosen", "answer"]


class RowTooLong(ValueError):
    """A row longer than `max_length`: cutting it would cut its answer, or image tokens."""


def load_examples(folder: Path, answer: Answer | None = None) -> Dataset:
    """What training imitates, as Arrow on disk; a row's pictures are decoded when it is collated.

    Args:
        folder: finished output of a stage: `Example`, `Pair` or `Prompt` rows.
        answer: which answer is imitated: of pairs `chosen` (by default) or the reference `answer`, of prompts the reference
            `answer`. Examples hold theirs in their last turn.

    Returns:
        Rows of `id`, `images` and either `messages` (with the answer) or `prompt` and `completion`.

    Raises:
        ValueError: the folder is not the finished output of a stage, or shards are damaged or lost, or rows lack a column.
        ConfigError: its rows have no such answer.
    """
    from datasets import Features, Image, List, load_dataset

    refuse_data_file(folder, "examples")
    manifest = read_manifest(folder)
    if manifest is None and (inside := sorted(file.parent.name for file in folder.glob("*/manifest.json"))):
        raise ValueError(
            f"{folder} holds several folders of rows ({', '.join(inside)}), and training reads one of them. Give its path."
        )
    if manifest is None or not manifest.complete:
        raise ValueError(
            f"{folder} holds no finished rows (no manifest.json). Give the output folder of a stage that makes examples, pairs "
            "or prompts; if one was interrupted, start it again with the same config and it resumes."
        )
    if manifest.rows_out == 0:
        raise ValueError(f"{folder} holds 0 rows; there is nothing to train on.")
    shards = whole_shards(folder, manifest)
    kind, question, answers = _kind(folder, shards.columns)
    if answer is not None and answer not in answers:
        raise ConfigError(
            f"answer is {answer!r}, and the rows of {folder} have {' or '.join(answers) or 'their answer in their last turn'}. "
            f"{'Set answer to one of these, or leave it out.' if answers else 'Leave `answer` out.'}"
        )
    chosen = [answer or answers[0]] if answers else []
    features = {name: value for name, value in kind.features().items() if name in ("id", "images", question, *chosen)}
    if lacking := [name for name in features if name not in shards.columns]:
        raise ValueError(
            f"the rows of {folder} have no {', '.join(lacking)} (stage `{manifest.stage}` wrote {', '.join(shards.columns)}), "
            "which training reads. Give the output folder of a stage that makes examples, pairs or prompts."
        )
    features["images"] = List(Image(decode=False))
    files = [str(file) for file in shards.files]
    dataset = load_dataset(
        "parquet", data_files=files, columns=list(features), features=Features(features), split="train"
    )
    return dataset.rename_columns({question: "prompt", chosen[0]: "completion"}) if chosen else dataset


def _kind(folder: Path, columns: Sequence[str]) -> tuple[type[Example | Pair | Prompt], str, tuple[str, ...]]:
    """What a folder holds: its record, the column with the question, and the columns that may be imitated."""
    if {"prompt", "chosen"} <= set(columns):
        return Pair, "prompt", ("chosen", "answer")
    if {"messages", "answer"} <= set(columns):
        return Prompt, "messages", ("answer",)
    if "messages" in columns:
        return Example, "messages", ()
    raise ValueError(
        f"the rows of {folder} have neither `messages` nor `prompt` and `chosen` (they have {', '.join(sorted(columns))}), so "
        "there is nothing to imitate. Give a folder of examples, pairs or prompts."
    )


def question_and_answer(row: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """The turns that are given and the turns that are imitated; the latter are empty if a row has no answer.

    Args:
        row: a row of `load_examples`. Of `messages` the last turn is imitated if it is the assistant's.
    """
    if "completion" in row:
        completion = row["completion"]
        given = normalise_messages(row["prompt"])
        told = [assistant_message(completion or "")] if not isinstance(completion, list) else completion
        told = normalise_messages(told)
    else:
        messages = normalise_messages(row["messages"])
        given, told = messages[:-1], messages[-1:]
    asked = bool(given) and given[-1]["role"] == "user"
    said = bool(told) and all(turn["role"] == "assistant" for turn in told) and bool(message_text(told).strip())
    return given, told if asked and said else []


def check_pictures(datasets: Sequence[Dataset], folders: Sequence[Path], *, processes: int, in_parts: bool) -> None:
    """Refuse rows with and without pictures together where weights are shared out over processes (ZeRO-3, FSDP).

    A process whose batch holds no picture would not ask for the vision tower's weights while the others wait for it.

    Raises:
        ConfigError: names the folder and how many rows have no picture.
    """
    if processes == 1 or not in_parts:
        return
    for dataset, folder in zip(datasets, folders, strict=True):
        lacking = rows_without(dataset, "images")
        if 0 < lacking < len(dataset):
            raise ConfigError(
                f"{lacking} of the {len(dataset)} rows of {folder} have no picture, and the weights are shared out "
                f"over {processes} processes: one whose batch holds no picture would leave the others waiting for the "
                "vision tower. Train these rows with ZeRO-2 or DDP, or rows with and without pictures one after the other."
            )


@dataclass
class AnswerCollator:
    """Collate rows for TRL's `SFTTrainer`: TRL's vision collator on prompt and completion, nothing ever cut.

    Every answer ends with the mark that ends a turn, in the loss: of templates that close an answer with nothing (LLaVA-1.5's on
    the Hub) the tokenizer's end of sequence follows it, or a model would be taught never to stop. Rows are read, never edited.

    Attributes:
        processor: the model's processor.
        max_length: longest row allowed; None allows all.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    end: str = field(init=False)

    def __post_init__(self) -> None:
        self.end = families.missing_end(self.processor)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build a batch of B rows, T tokens.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, T) int64, -100 in `labels` where it is not an answer's token, and
            whatever else the processor gives.

        Raises:
            ValueError: a row has no answer, placeholders and pictures disagree, or it is too long (`RowTooLong`).
            ImageError: names the row whose picture cannot be decoded.
        """
        examples = [self._example(row) for row in rows]
        rewrites = families.rewrites_prompt(self.processor)
        processor = _AnswersAsTokens(self.processor) if rewrites else self.processor
        batch = dict(DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(examples))
        if rewrites:  # a token of type 0 sees those after it too, which an answer must not
            batch["token_type_ids"] = batch["token_type_ids"].masked_fill(batch["labels"] != -100, 1)
        if self.max_length is not None:
            for row, length in zip(rows, batch["attention_mask"].sum(dim=1).tolist(), strict=True):
                if length > self.max_length:
                    raise RowTooLong(
                        f"row {_name(row)} has {length} tokens with its image tokens and its answer, and max_length is "
                        f"{self.max_length}. Raise max_length to {length} or more, or leave it out."
                    )
        return batch

    def length(self, row: Mapping[str, Any]) -> int:
        """Tokens of one row, image tokens and the end of its answer included."""
        return int(AnswerCollator(self.processor)([row])["attention_mask"].sum())

    def _example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        prompt, answer = question_and_answer(row)
        if not answer:
            raise ValueError(
                f"row {_name(row)} does not end with a question and an answer; there is nothing to imitate."
            )
        pictures, placeholders = row.get("images") or [], placeholder_count(prompt)
        if len(pictures) != placeholders:
            raise ValueError(
                f"row {_name(row)}: the prompt has {placeholders} image placeholder(s) and `images` holds {len(pictures)} "
                "picture(s); the model would see the wrong picture or none. Write one placeholder for each picture, in order."
            )
        if not pictures and families.rewrites_prompt(self.processor):
            raise ValueError(
                f"row {_name(row)} has no picture, and a {type(self.processor).__name__} prepares no text without one. Take such "
                "rows out."
            )
        text = apply_chat_template({"prompt": prompt, "completion": answer}, self.processor)
        completion = text["completion"].rstrip() + self.end if self.end else text["completion"]
        try:
            images = [decode(picture) for picture in pictures]
        except ImageError as error:
            raise ImageError(error.reason, f"row {_name(row)}: {error}") from error
        return {
            "images": images,
            "prompt": text["prompt"],
            "completion": completion,
        }


class _AnswersAsTokens:
    """PaliGemma's processor for TRL's collator: text without pictures is an answer, which only the tokenizer may read.

    The processor refuses text without pictures, and would put a begin of sequence and a line break around it.
    """

    def __init__(self, processor: ProcessorMixin):
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, text: list[str], images: Any = None, **kwargs: Any) -> Any:
        if images is None:
            return self._processor.tokenizer(text, return_token_type_ids=True, **kwargs)
        return self._processor(images=images, text=text, **kwargs)


def _name(row: Mapping[str, Any]) -> str:
    return str(row.get("id", "(without id)"))


@dataclass
class Kept:
    """Which rows are trained on. `rows_in == rows_used + len(too_long) + len(unanswered)`.

    Attributes:
        rows_in: rows looked at.
        rows_used: rows kept.
        too_long: id to tokens, for rows dropped because they do not fit `max_length`.
        unanswered: ids of rows dropped because they do not end with a question and an answer.
        earlier_answers: rows kept in which the assistant spoke before; what it said there is given, not imitated.
    """

    rows_in: int
    rows_used: int = 0
    too_long: dict[str, int] = field(default_factory=dict)
    unanswered: list[str] = field(default_factory=list)
    earlier_answers: int = 0

    def counts(self) -> dict[str, int]:
        """The numbers, as they go among a run's metrics."""
        return {"rows_in": self.rows_in, "rows_used": self.rows_used, "rows_too_long": len(self.too_long),
                "rows_unanswered": len(self.unanswered)}  # fmt: skip

    def summary(self) -> str:
        """What was dropped, why, and what would keep it; empty if everything is used."""
        parts = []
        if self.too_long:
            parts.append(
                f"dropped {len(self.too_long)} of {self.rows_in} rows longer than max_length ({_some(self.too_long)}); "
                f"max_length {max(self.too_long.values())} keeps all of them"
            )
        if self.unanswered:
            parts.append(
                f"dropped {len(self.unanswered)} of {self.rows_in} rows that do not end with a question and an answer "
                f"({_some(self.unanswered)})"
            )
        if self.earlier_answers:
            parts.append(f"{self.earlier_answers} hold earlier answers, of which only the last is imitated")
        return "; ".join(parts)


def _some(names: Sequence[str] | Mapping[str, int]) -> str:
    return ", ".join(list(names)[:5]) + (" ..." if len(names) > 5 else "")


def lengths_of(dataset: Dataset, column: str) -> list[int]:
    """How many entries each row's list in a column has; null has none. Only lengths are read."""
    import pyarrow.compute as pc

    table = dataset.with_format("arrow").select_columns(column)
    return [
        length
        for batch in table.iter(batch_size=1000)
        for length in pc.fill_null(pc.list_value_length(batch[column]), 0).to_pylist()
    ]


def keep_usable(dataset: Dataset, collator: AnswerCollator) -> tuple[Dataset, Kept]:
    """Drop rows without an answer, and rows longer than `max_length` (with None no row is too long and none is measured).

    Raises:
        ValueError: no row is left, or rows have other pictures than their prompts ask for.
    """
    kept, keep, wrong = Kept(rows_in=len(dataset)), [], []
    needs_one = families.rewrites_prompt(collator.processor)
    texts, pictures = dataset.remove_columns("images"), lengths_of(dataset, "images")
    for index, row in enumerate(progress_bar(texts, desc="check rows", unit="row")):
        prompt, answer = question_and_answer(row)
        if not answer:
            kept.unanswered.append(row["id"])
            continue
        if pictures[index] != placeholder_count(prompt) or (needs_one and not pictures[index]):
            wrong.append(row["id"])
            continue
        if collator.max_length is not None and (length := collator.length(dataset[index])) > collator.max_length:
            kept.too_long[row["id"]] = length
            continue
        kept.earlier_answers += any(turn["role"] == "assistant" for turn in prompt)
        keep.append(index)
    if wrong:
        why = f", or none, which a {type(collator.processor).__name__} cannot prepare" if needs_one else ""
        raise ValueError(
            f"{len(wrong)} of the {len(dataset)} rows hold another number of pictures than their prompts have placeholders{why} "
            f"({_some(wrong)}): the model would see the wrong picture or none. Write one placeholder for each picture, in order, "
            "or take these rows out."
        )
    kept.rows_used = len(keep)
    if not keep and kept.too_long:
        raise ValueError(
            f"no row fits max_length {collator.max_length}: the shortest needs {min(kept.too_long.values())}, and max_length "
            f"{max(kept.too_long.values())} keeps all. Image tokens and answers are never cut. Raise max_length, or leave it out."
        )
    if not keep:
        raise ValueError(
            f"none of the {kept.rows_in} rows ends with a question and an answer ({_some(kept.unanswered)}); there is nothing to "
            "imitate. Prompts need a reference `answer`, conversations a last turn of the assistant's."
        )
    return (dataset if len(keep) == len(dataset) else dataset.select(keep)), kept
