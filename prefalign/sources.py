"""Rows from files in the formats people have: ours, TRL, LLaVA, ShareGPT (LLaMA-Factory), ms-swift, RLAIF-V, POVID.

A source streams raw rows and never opens a picture; `to_prompt` and `to_pair` turn one raw row into a record and read its
pictures, so that one bad row costs one row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prefalign.images import SYSTEM_ERRORS, EncodedImage, ImageError, read_image, sha256
from prefalign.records import (
    Candidates,
    Message,
    Pair,
    Prompt,
    RecordError,
    assistant_message,
    canonical_json,
    normalise_messages,
    user_message,
)
from prefalign.seen import RepeatedIds

AnyInput = TypeVar("AnyInput", Prompt, Pair, Candidates)
PLACEHOLDER = "<image>"
ID_COLUMNS = ("id", "question_id", "idx")
_QUESTION_COLUMNS = ("conversations", "messages", "prompt", "question", "instruction_prompt")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class DataConfig:
    """Where rows come from.

    Attributes:
        path: JSONL, JSON or Parquet file, or a folder of Parquet shards that a stage wrote.
        images: folder that relative picture paths start from; the data file's own folder if empty.
        limit: use only the first rows (0: all).
        fact_columns: columns that become facts of a row (labels, measurements).
        question: what is asked of rows that have no question of their own (a table of labels); None: they are bad rows.
    """

    path: Path
    images: Path | None = None
    limit: int = 0
    fact_columns: list[str] = field(default_factory=list)
    question: str | None = None

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"limit is {self.limit}; give how many of the first rows to use, or 0 for all of them.")


@dataclass(frozen=True)
class BadRow:
    """A line that could not even be read as a row."""

    reason: str
    message: str


def files_of(config: DataConfig) -> list[Path]:
    """The data files that `config.path` names, in order. Stages call it before they load a model, so that a typo costs no time.

    Raises:
        ValueError: if there is none, one is of a kind that is not read, a stage's output is not finished, or the folder of
            the pictures does not exist.
    """
    path = config.path
    embedded = (path / "manifest.json").is_file()  # a stage's output holds its pictures
    if config.images is not None and not embedded and not config.images.is_dir():
        raise ValueError(f"data.images is {str(config.images)!r}, and there is no such folder, so no picture would be found. "
                         "Give the folder that the rows' picture paths start from.")  # fmt: skip
    if path.is_dir():
        if (path / "progress").is_dir() and not embedded:
            raise ValueError(f"folder {path} is the output of a stage that is not finished: rows would be missing. Start that "
                             "stage again (it goes on where it stopped), then this one.")  # fmt: skip
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


def read_rows(config: DataConfig, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any] | BadRow]:
    """Stream raw rows; at most one Parquet batch or one line is in memory (a `.json` list is read whole).

    Args:
        config: where they are.
        columns: of Parquet rows, read only these.
    """
    count = 0
    for file in files_of(config):
        for row in _read_file(file, columns):
            if config.limit and count >= config.limit:
                return
            count += 1
            yield row


def survey(config: DataConfig) -> tuple[int, RepeatedIds]:
    """Number of rows that `read_rows` will give, and the ids that more than one of them has."""
    total = 0

    def ids() -> Iterator[str]:
        nonlocal total
        for row in read_rows(config, ID_COLUMNS):
            total += 1
            identity = None if isinstance(row, BadRow) else _source_id(row)
            if identity is not None:
                yield identity

    repeated = RepeatedIds(ids())
    return total, repeated


def parquet_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Stream the rows of a Parquet file, of all or of the named columns that it has.

    Raises:
        ValueError: if the file is not whole.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
        wanted = [name for name in opened.schema_arrow.names if name in columns] if columns is not None else None
        if wanted == []:
            yield from ({} for _ in range(opened.metadata.num_rows))
            return
        for batch in opened.iter_batches(batch_size=64, columns=wanted):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file.name} is not a whole Parquet file ({error}). Was the download or the copy cut off? Fetch it "
                         "again.") from error  # fmt: skip


def _read_file(file: Path, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any] | BadRow]:
    if file.suffix == ".parquet":
        yield from parquet_rows(file, columns)
        return
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.name} is not complete JSON ({error}). Was the download cut off?") from error
        if not isinstance(rows, list):
            raise ValueError(f"{file.name} must be a list of rows, got a {type(rows).__name__}.")
        for number, row in enumerate(rows, 1):
            yield row if isinstance(row, dict) else _not_an_object(row, f"{file.name} row {number}")
        return
    with file.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BadRow("bad_json", f"{file.name} line {number} is not complete JSON ({error}): {line[:60]!r}")
                continue
            yield row if isinstance(row, dict) else _not_an_object(row, f"{file.name} line {number}")


def _not_an_object(row: Any, where: str) -> BadRow:
    return BadRow("bad_json", f"{where} is a {type(row).__name__}, not an object.")


def to_prompt(row: Mapping[str, Any] | BadRow, config: DataConfig, *, repeated: Container[str] = ()) -> Prompt:
    """Read one raw row of any known format into a `Prompt`; its answer is the row's last or chosen assistant turn.

    Args:
        row: raw row.
        config: where it comes from.
        repeated: ids that several rows have (`survey`), as LLaVA-Instruct's, which are those of the pictures. Such a row's id
            gets 8 digits of its content's digest, so that neither rows nor their order decide who keeps the bare id. Rows
            without id are called after their content; our own Parquet rows keep the id they have.

    Raises:
        RecordError: with the reason a manifest counts it under; `bad_row` for what no format has.
        ImageError: for a picture that is missing, unreadable or too large.
    """
    return _record(
        row, lambda known: _own_prompt(known) if _is_own(known) else _foreign_prompt(known, config, repeated)
    )


def to_pair(row: Mapping[str, Any] | BadRow, config: DataConfig, *, repeated: Container[str] = ()) -> Pair:
    """Read one raw row with a chosen and a rejected answer into a `Pair`: ours, TRL's and RLAIF-V's columns, ms-swift's, POVID's,
    and S-VCO's (MVC).

    `chosen` (or `chosen_response`, or where both are absent the conversation's last turn) and `rejected` (or
    `rejected_response`, `rejected_messages`, `rejected_conversations`) are text or turns; pictures are `images` or `image` (or
    `chosen_images`), the other side's `rejected_images`. A `system_prompt` goes first unless the conversation has a system turn.
    Arguments, ids and errors are those of `to_prompt`; besides, a row without one of the answers is a `missing_column`, a margin
    that is no number a `bad_margin`. Whether the answers differ is for the stage to say.
    """
    return _record(
        row, lambda known: _own_pair(known) if _is_own_pair(known) else _foreign_pair(known, config, repeated)
    )


def to_candidates(row: Mapping[str, Any] | BadRow, config: DataConfig, *, repeated: Container[str] = ()) -> Candidates:
    """Read one raw row with several answers to one question into `Candidates`: ours, or any format of `to_prompt` with a list
    `responses` of texts or of mappings with `text` (and `scores`).

    Arguments, ids and errors are those of `to_prompt`; besides, a row without responses is a `missing_column`, and what is no
    response `bad_responses`.
    """
    return _record(row, lambda known: _candidates(known, config, repeated))


def pictures_of(row: Mapping[str, Any] | BadRow, config: DataConfig) -> list[EncodedImage]:
    """The encoded pictures of a raw row of any format, `rejected_images` left out.

    Raises:
        RecordError: for a row that could not be read or a picture field that is none.
        ImageError: for a picture that is missing or too large.
    """
    if isinstance(row, BadRow):
        raise RecordError(row.reason, row.message)
    shown = row if row.get("chosen_images") is None else {"images": row["chosen_images"]}
    return [_read_picture(picture, config) for picture in _pictures(shown)]


def _record(row: Mapping[str, Any] | BadRow, read: Callable[[Mapping[str, Any]], AnyInput]) -> AnyInput:
    if isinstance(row, BadRow):
        raise RecordError(row.reason, row.message)
    try:
        record: AnyInput = read(row)
        names = [image["path"] for image in (*record.images, *getattr(record, "rejected_images", ()))]
        canonical_json([record.id, _texts(record), record.facts, names]).encode()
        record.check_pictures()
    except (RecordError, ImageError):
        raise
    except (AttributeError, TypeError, KeyError, IndexError, ValueError, OSError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            raise
        raise RecordError("bad_row", f"the row cannot be read ({type(error).__name__}: {str(error)[:200]}). Compare it with "
                          "the formats in `prefalign.sources`.") from error  # fmt: skip
    return record


def content_digest(record: Prompt | Pair | Candidates) -> str:
    """Hex SHA-256 of what a record shows, asks and answers, whatever its id."""
    return hashlib.sha256(canonical_json(_texts(record)).encode()).hexdigest()


def _texts(record: Prompt | Pair | Candidates) -> dict[str, Any]:
    """What a record says and shows, pictures by their SHA-256."""
    if not isinstance(record, Pair):
        said = {"responses": record.responses} if isinstance(record, Candidates) else {}
        images = [sha256(image) for image in record.images]
        return {"turns": record.messages, "answer": record.answer, "images": images, **said}
    return {"turns": record.prompt, "chosen": record.chosen, "rejected": record.rejected, "answer": record.answer,
            "images": [sha256(image) for image in record.images],
            "rejected_images": [sha256(image) for image in record.rejected_images]}  # fmt: skip


def legible(value: Any) -> Any:
    """A row as JSON, encoded pictures replaced by their size."""
    if isinstance(value, Mapping):
        return {key: legible(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [legible(item) for item in value]
    if isinstance(value, bytes):
        return f"({len(value)} bytes)"
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _is_own(row: Mapping[str, Any]) -> bool:
    """Whether a row is one that `Prompt.to_row` gave: all columns, facts as JSON text, pictures as bytes."""
    images = row.get("images")
    return (
        isinstance(row.get("id"), str)
        and "messages" in row
        and isinstance(row.get("answer", 0), (str, type(None)))
        and "responses" not in row
        and isinstance(row.get("facts"), str)
        and isinstance(images, list)
        and all(isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes) for image in images)
    )


def _is_own_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row is one that `Pair.to_row` gave."""
    return isinstance(row.get("id"), str) and isinstance(row.get("method"), str) and isinstance(row.get("meta"), str)


def _own_pair(row: Mapping[str, Any]) -> Pair:
    pair = Pair.from_row({**row, "facts": _facts(row), "meta": _facts(row, "meta")})
    pair.images, pair.rejected_images = pair.images or [], pair.rejected_images or []
    return pair


def _foreign_pair(row: Mapping[str, Any], config: DataConfig, repeated: Container[str]) -> Pair:
    answered = ("chosen", "rejected", "answer")
    asked = {name: value for name, value in row.items() if value is not None and name not in answered}
    if isinstance(row.get("chosen"), list) and not any(row.get(name) for name in _QUESTION_COLUMNS):
        asked["prompt"] = row["chosen"][:-1] or None  # TRL's implicit prompt: the turns that lead to the answer
    elif "instruction_prompt" in asked:
        asked.setdefault("prompt", asked["instruction_prompt"])
    turns, last = _conversation(asked)
    given = {
        "chosen": _first(row, "chosen", "chosen_response"),
        "rejected": _first(row, "rejected", "rejected_response", "rejected_messages", "rejected_conversations"),
    }
    if given["chosen"] is None:
        given["chosen"] = last
    for side, value in given.items():
        if value is None:
            raise RecordError(
                "missing_column",
                f"a pair needs `chosen` and `rejected`; this row has no `{side}`, only {', '.join(sorted(row))}. Rows with one "
                "answer are prompts: bdhs and others make pairs of them, image_contrast with `--reads answers`.",
            )
    answers = {side: _answer_text(value, side) for side, value in given.items()}
    answer = row["answer"] if isinstance(row.get("answer"), str) else last
    system = row.get("system_prompt")
    if isinstance(system, str) and system.strip() and not any(turn["role"] == "system" for turn in turns):
        turns = [{"role": "system", "content": [{"type": "text", "text": system}]}, *turns]
    images = pictures_of(row, config)
    others = [_read_picture(picture, config) for picture in _pictures({"images": row.get("rejected_images")})]
    identity = _source_id(row)
    pair = Pair(id=identity or "", images=images, prompt=_with_placeholders(turns, len(images)),
                chosen=[assistant_message(answers["chosen"])], rejected=[assistant_message(answers["rejected"])],
                method=str(row.get("method") or "imported"), rejected_images=others, answer=answer,
                facts=_category(row) | _facts(row), margin=_margin(row))  # fmt: skip
    digest = content_digest(pair)
    if identity is None:
        pair.id = digest[:24]
    elif identity in repeated:
        pair.id = f"{identity}-{digest[:8]}"
    return pair


def _own_prompt(row: Mapping[str, Any]) -> Prompt:
    return Prompt.from_row({**row, "facts": _facts(row)})


def _candidates(row: Mapping[str, Any], config: DataConfig, repeated: Container[str]) -> Candidates:
    if row.get("responses") is None:
        raise RecordError(
            "missing_column", f"candidates need `responses`; this row has only {', '.join(sorted(row))}. "
            "sample_responses makes them of prompts."
        )  # fmt: skip
    given = json.loads(row["responses"]) if isinstance(row["responses"], str) else row["responses"]
    responses = [{"text": response} if isinstance(response, str) else response for response in given]
    asked = {name: value for name, value in row.items() if name != "responses"}
    prompt = _own_prompt(asked) if _is_own(asked) else _foreign_prompt(asked, config, repeated)
    found = Candidates(prompt.id, prompt.images, prompt.messages, responses, prompt.answer, prompt.facts)
    found.check()
    return found


def _foreign_prompt(row: Mapping[str, Any], config: DataConfig, repeated: Container[str]) -> Prompt:
    images = [_read_picture(picture, config) for picture in _pictures(row)]
    asks = config.question is None or any(row.get(name) for name in _QUESTION_COLUMNS)
    turns, answer = _conversation(row if asks else {**row, "question": config.question})
    identity = _source_id(row)
    known = {name: row[name] for name in config.fact_columns if row.get(name) is not None} | _facts(row)
    prompt = Prompt(identity or "", images, _with_placeholders(turns, len(images)), answer, known)
    digest = content_digest(prompt)
    if identity is None:
        prompt.id = digest[:24]
    elif identity in repeated:
        prompt.id = f"{identity}-{digest[:8]}"
    return prompt


def _source_id(row: Mapping[str, Any]) -> str | None:
    identity = next((row[name] for name in ID_COLUMNS if row.get(name) is not None), None)
    return None if identity is None else str(identity)


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _margin(row: Mapping[str, Any]) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise RecordError("bad_margin", f"`margin` is a finite number or absent, got {str(margin)[:80]!r}.")
    return float(margin)


def _facts(row: Mapping[str, Any], column: str = "facts") -> dict[str, Any]:
    facts = row.get(column) or {}
    try:
        known = json.loads(facts) if isinstance(facts, str) else facts
        if isinstance(known, Mapping):
            canonical_json(known)
            return dict(known)
    except (ValueError, TypeError, RecursionError):
        known = facts
    raise RecordError(f"bad_{column}", f"`{column}` is a JSON object or absent, got {str(known)[:80]!r}.")


def _category(row: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of contrast of an MVC row, which the S-VCO filter reads."""
    return {"category": row["category"]} if isinstance(row.get("category"), str) else {}


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
        turns = [_shared_turn(turn) for turn in _list(row["conversations"])]
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


def _list(turns: Any) -> list[Any]:
    if not isinstance(turns, list):
        raise RecordError("bad_messages", f"a conversation is a list of turns, got {str(turns)[:120]!r}.")
    return turns


def _shared_turn(turn: Any) -> Message:
    fields = turn if isinstance(turn, Mapping) else {}
    role = ROLES.get(str(fields.get("from", fields.get("role"))))
    text = fields.get("value", fields.get("content"))
    if role is None or not isinstance(text, str):
        raise RecordError(
            "bad_messages", f"a conversation turn needs `from` (human, gpt) and `value`, got {str(turn)[:120]}."
        )
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _plain_text(message: Message) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def _answer_text(value: Any, side: str = "chosen") -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return _plain_text(_shared_turn(value))
    if isinstance(value, list) and value and isinstance(value[-1], Mapping) and "from" in value[-1]:
        return _plain_text(_shared_turn(value[-1]))
    turns = normalise_messages(value)
    if not turns:
        raise RecordError(
            f"empty_{side}", f"`{side}` has no turn, so there is no answer. Leave it out, or drop the row."
        )
    return _plain_text(turns[-1])


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
