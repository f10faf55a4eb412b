"""Rows from files in the formats people have: ours, TRL, LLaVA, ShareGPT (LLaMA-Factory), ms-swift, RLAIF-V, POVID.

A source streams raw rows and never opens a picture; `to_prompt` turns one raw row into a `Prompt` and reads its
pictures, so that one bad row costs one row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign.images import EncodedImage, read_image
from prefalign.records import Message, Prompt, RecordError, canonical_json, normalise_messages, user_message

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class DataConfig:
    """Where rows come from.

    Attributes:
        path: JSONL, JSON or Parquet file, or a folder of Parquet shards that a stage wrote.
        images: folder that relative picture paths start from; the data file's own folder if empty.
        limit: use only the first rows (0: all).
    """

    path: Path
    images: Path | None = None
    limit: int = 0


@dataclass(frozen=True)
class BadRow:
    """A line that could not even be read as a row."""

    reason: str
    message: str


def files_of(config: DataConfig) -> list[Path]:
    """The data files that `config.path` names, in order.

    Raises:
        ValueError: if there is none, or one is of a kind that is not read.
    """
    path = config.path
    if path.is_dir():
        files = sorted(path.glob("data/*.parquet")) or sorted(path.glob("*.parquet")) or sorted(path.glob("*.jsonl"))
        if not files:
            raise ValueError(
                f"folder {path} holds no .parquet or .jsonl rows. Give the data file itself as `data.path`."
            )
        return files
    if not path.is_file():
        raise ValueError(
            f"no data at {path}. Set `data.path` to a JSONL, JSON or Parquet file, or to a stage's output."
        )
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"{path.name}: rows are read from .jsonl, .json and .parquet, not {path.suffix or 'this'!r}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty: there is nothing to do. Check how it was written.")
    return [path]


def fingerprint(config: DataConfig) -> str:
    """SHA-256 over the data files' contents (streamed), so that a resumed run notices other data."""
    digest = hashlib.sha256()
    for file in files_of(config):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_rows(config: DataConfig) -> Iterator[Mapping[str, Any] | BadRow]:
    """Stream raw rows; at most one Parquet batch or one line is in memory (a `.json` list is read whole)."""
    count = 0
    for file in files_of(config):
        for row in _read_file(file):
            if config.limit and count >= config.limit:
                return
            count += 1
            yield row


def count_rows(config: DataConfig) -> int:
    """Number of rows that `read_rows` will give."""
    import pyarrow.parquet as pq

    total = 0
    for file in files_of(config):
        if file.suffix == ".parquet":
            total += pq.read_metadata(file).num_rows
        else:
            total += sum(1 for _ in _read_file(file))
    return min(total, config.limit) if config.limit else total


def _read_file(file: Path) -> Iterator[Mapping[str, Any] | BadRow]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
            yield from batch.to_pylist()
        return
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.name} is not complete JSON ({error}). Was the download cut off?") from error
        if not isinstance(rows, list):
            raise ValueError(f"{file.name} must be a list of rows, got a {type(rows).__name__}.")
        yield from rows
        return
    with file.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield BadRow("bad_json", f"{file.name} line {number} is not complete JSON ({error.msg}): {line[:60]!r}")
                continue
            if not isinstance(row, dict):
                yield BadRow("bad_json", f"{file.name} line {number} is a {type(row).__name__}, not an object.")
                continue
            yield row


def to_prompt(row: Mapping[str, Any] | BadRow, config: DataConfig) -> Prompt:
    """Read one raw row of any known format into a `Prompt`; its answer is the row's last or chosen assistant turn.

    Raises:
        RecordError: with the reason a manifest counts it under.
        ImageError: for a picture that is missing or too large.
    """
    if isinstance(row, BadRow):
        raise RecordError(row.reason, row.message)
    if "messages" in row and "responses" not in row and isinstance(row.get("facts"), str):
        prompt = Prompt.from_row(row)
        prompt.check()
        return prompt
    images = [_read_picture(picture, config) for picture in _pictures(row)]
    turns, answer = _conversation(row)
    turns = _with_placeholders(turns, len(images))
    facts = row.get("facts") or {}
    facts = json.loads(facts) if isinstance(facts, str) else dict(facts)
    identity = row.get("id", row.get("question_id", row.get("idx")))
    if identity is None:
        content = {"turns": turns, "answer": answer, "images": [hashlib.sha256(i["bytes"]).hexdigest() for i in images]}
        identity = hashlib.sha256(canonical_json(content).encode()).hexdigest()[:24]
    prompt = Prompt(id=str(identity), images=images, messages=turns, answer=answer, facts=facts)
    prompt.check()
    return prompt


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    pictures = row.get("images") if row.get("images") is not None else row.get("image")
    if pictures is None:
        return [row["image_path"]] if row.get("image_path") else []
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


def _read_picture(picture: Any, config: DataConfig) -> EncodedImage:
    if isinstance(picture, dict) and picture.get("bytes"):
        return {"bytes": picture["bytes"], "path": Path(picture["path"]).name if picture.get("path") else None}
    path = picture.get("path") if isinstance(picture, dict) else picture
    if not isinstance(path, str):
        raise RecordError("bad_image_field", f"a picture is a path or encoded bytes, got {type(picture).__name__}.")
    base = config.images or (config.path if config.path.is_dir() else config.path.parent)
    return read_image(base / path)


def _conversation(row: Mapping[str, Any]) -> tuple[list[Message], str | None]:
    """Turns up to the question, and the answer, from whichever columns the row has."""
    if row.get("conversations"):
        turns = [_shared_turn(turn) for turn in row["conversations"]]
    elif row.get("messages"):
        turns = normalise_messages(row["messages"])
    elif row.get("prompt") is not None:
        prompt = row["prompt"]
        turns = [user_message(prompt)] if isinstance(prompt, str) else normalise_messages(prompt)
    elif isinstance(row.get("question"), str):
        turns = [user_message(row["question"])]
    else:
        raise RecordError(
            "missing_column",
            f"a row needs `conversations`, `messages`, `prompt` or `question`; this one has {', '.join(sorted(row))}.",
        )
    answer = None
    if turns and turns[-1]["role"] == "assistant":
        answer = _plain_text(turns.pop())
    if row.get("chosen") is not None:
        answer = _answer_text(row["chosen"])
    elif isinstance(row.get("answer"), str):
        answer = row["answer"]
    return turns, answer


def _shared_turn(turn: Mapping[str, Any]) -> Message:
    role = ROLES.get(str(turn.get("from", turn.get("role"))))
    text = turn.get("value", turn.get("content"))
    if role is None or not isinstance(text, str):
        raise RecordError(
            "bad_messages",
            f"a conversation turn needs `from` (human, gpt) and `value`, got {str(dict(turn))[:120]}.",
        )
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _plain_text(message: Message) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def _answer_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return _plain_text(_shared_turn(value))
    return _plain_text(normalise_messages(value)[-1])


def _with_placeholders(turns: list[Message], pictures: int) -> list[Message]:
    """Turn `<image>` marks in user text into placeholders; with pictures and no mark at all, put them first."""
    result: list[Message] = []
    for turn in turns:
        blocks: list[dict[str, Any]] = []
        for block in turn["content"]:
            if block["type"] == "image" or turn["role"] != "user" or PLACEHOLDER not in block["text"]:
                blocks.append(block)
                continue
            for position, text in enumerate(block["text"].split(PLACEHOLDER)):
                if position:
                    blocks.append({"type": "image"})
                if text.strip():
                    blocks.append({"type": "text", "text": text.strip("\n")})
        result.append({"role": turn["role"], "content": blocks})
    if pictures and not any(block["type"] == "image" for turn in result for block in turn["content"]):
        first = next((turn for turn in result if turn["role"] == "user"), None)
        if first is not None:
            first["content"] = [{"type": "image"}] * pictures + first["content"]
    return result
