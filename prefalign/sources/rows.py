"""From raw rows to records: ours as they were written, published layouts through `sources.layouts`; pictures are read here.

A source streams raw rows and never opens a picture; `to_prompt`, `to_pair` and `to_candidates` turn one raw row into a record and
read its pictures, so that one bad row costs one row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

from prefalign.images import SYSTEM_ERRORS, EncodedImage, ImageError, read_image, sha256
from prefalign.records import (
    ON_TWO_PICTURES,
    Candidates,
    Message,
    Pair,
    Prompt,
    RecordError,
    assistant_message,
    canonical_json,
)
from prefalign.sources import hub, layouts, llama_factory
from prefalign.sources.columns import Row, pictures, source_id
from prefalign.sources.config import BadRow, DataConfig
from prefalign.sources.layouts import AUTO
from prefalign.sources.turns import marked_blocks, settle
from prefalign.text import same_answer

AnyInput = TypeVar("AnyInput", Prompt, Pair, Candidates)


def to_prompt(row: Mapping[str, Any] | BadRow, config: DataConfig, *, repeated: Container[str] = ()) -> Prompt:
    """Read one raw row of any known layout into a `Prompt`; its answer is the row's last or chosen assistant turn.

    Args:
        row: raw row.
        config: where it comes from.
        repeated: ids that several rows have (`survey`), as LLaVA-Instruct's, which are those of the pictures. Such a row's id
            gets 8 digits of its content's digest, so that neither rows nor their order decide who keeps the bare id. Rows
            without id are called after their content; our own Parquet rows keep the id they have.

    Returns:
        The prompt; columns without a field of their own are `facts["columns"]`.

    Raises:
        RecordError: with the reason a manifest counts it under; `bad_row` for what no layout has.
        ImageError: for a picture that is missing, unreadable or too large.
    """
    return _record(
        row,
        lambda known: _own_prompt(known) if _is_own(known, config) else _foreign_prompt(known, config, repeated)[0],
    )


def to_pair(row: Mapping[str, Any] | BadRow, config: DataConfig, *, repeated: Container[str] = ()) -> Pair:
    """Read one raw row with a chosen and a rejected answer, of any layout in `layouts.LAYOUTS` that has two, into a `Pair`.

    Arguments, ids and errors are those of `to_prompt`; besides, a row without one of the answers is a `missing_column`, one of
    several answers or of a single one `not_a_pair`, answers to two conversations `different_prompts`, a margin that is no number
    a `bad_margin`. Whether the answers differ is for the stage to say. `meta` names the layout, marks another answer about other
    pictures (`Pair.on_two_pictures`), and has columns without a field of their own as `meta["columns"]`.
    """
    return _record(
        row, lambda known: _own_pair(known) if _is_own_pair(known, config) else _foreign_pair(known, config, repeated)
    )


def to_candidates(row: Mapping[str, Any] | BadRow, config: DataConfig, *, repeated: Container[str] = ()) -> Candidates:
    """Read one raw row with answers to one question into `Candidates`: ours, VLFeedback's, TRL's unpaired ones (the thumb is the
    score `label`), a layout of two answers (scores `preference`, 1 and 0), or any with a list `responses` of texts or of mappings
    with `text` (and `scores`).

    Arguments, ids and errors are those of `to_prompt`; besides, a row without responses is a `missing_column`, and what is no
    response `bad_responses`, and answers about different pictures `two_pictures`.
    """
    return _record(row, lambda known: _candidates(known, config, repeated))


def pictures_of(row: Mapping[str, Any] | BadRow, config: DataConfig) -> list[EncodedImage]:
    """The encoded pictures of a raw row of any layout, `rejected_images` left out.

    Raises:
        RecordError: for a row that could not be read or a picture field that is none.
        ImageError: for a picture that is missing or too large.
    """
    if isinstance(row, BadRow):
        raise RecordError(row.reason, row.message)
    shown = row if row.get("chosen_images") is None else {"images": row["chosen_images"]}
    return [_read_picture(picture, config) for picture in pictures(shown)]


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
                          "the layouts in `prefalign.sources.layouts`.") from error  # fmt: skip
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


def _is_own(row: Mapping[str, Any], config: DataConfig) -> bool:
    """Whether a row is one that `Prompt.to_row` gave: all columns, facts as JSON text, pictures as bytes."""
    images = row.get("images")
    return (
        config.layout == AUTO
        and isinstance(row.get("id"), str)
        and "messages" in row
        and isinstance(row.get("answer", 0), (str, type(None)))
        and "responses" not in row
        and isinstance(row.get("facts"), str)
        and isinstance(images, list)
        and all(isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes) for image in images)
    )


def _is_own_pair(row: Mapping[str, Any], config: DataConfig) -> bool:
    """Whether a row is one that `Pair.to_row` gave."""
    named = all(isinstance(row.get(column), str) for column in ("id", "method", "meta"))
    return config.layout == AUTO and named


def _own_pair(row: Mapping[str, Any]) -> Pair:
    pair = Pair.from_row({**row, "facts": _facts(row), "meta": _facts(row, "meta")})
    pair.images, pair.rejected_images = pair.images or [], pair.rejected_images or []
    return pair


def _own_prompt(row: Mapping[str, Any]) -> Prompt:
    return Prompt.from_row({**row, "facts": _facts(row)})


def _said(row: Mapping[str, Any], config: DataConfig) -> tuple[Row, dict[str, Any]]:
    """What a row of another's layout says, asked `config.question` if it asks nothing; and its columns that are facts."""
    if config.question is not None and not layouts.asks(row):
        row = {**layouts.without_empty_questions(row), "question": config.question}
    said = layouts.read(row, config.layout)
    known = {name: row[name] for name in config.fact_columns if row.get(name) is not None}
    said.columns = {name: value for name, value in said.columns.items() if name not in known}
    return said, known


def _foreign_pair(row: Mapping[str, Any], config: DataConfig, repeated: Container[str]) -> Pair:
    said, known = _said(row, config)
    given = {"chosen": said.last if said.chosen is None else said.chosen, "rejected": said.rejected}
    if said.responses is not None and (said.chosen is None or said.rejected is None):
        raise RecordError(
            "not_a_pair",
            f"a row of the layout {said.layout} holds {len(said.responses)} answer(s) and does not say which is chosen and "
            "which rejected. Read it as candidates (import_published with `produce: candidates`); select_responses makes "
            "pairs of them.",
        )
    images = [_read_picture(picture, config) for picture in said.images]
    others = _other_pictures(said, images, config)
    if given["rejected"] is None and others and said.rejected_on_rejected_images:
        given["rejected"] = given["chosen"]
    for side, value in given.items():
        if value is None:
            raise RecordError(
                "missing_column",
                f"a pair needs `chosen` and `rejected`; this row has no `{side}`, only {_filled(row)}. Rows with one "
                "answer are prompts: bdhs and others make pairs of them, image_contrast with `--reads answers`.",
            )
    turns, answers = settle(said.turns, given)
    apart = others and said.rejected_on_rejected_images and not same_answer(answers["chosen"], answers["rejected"])
    used = {"margin"} | ({"method"} if row.get("method") else set()) | _category(row).keys()
    said.columns = {name: value for name, value in said.columns.items() if name not in used}
    meta: dict[str, Any] = {"layout": said.layout}
    if said.columns:
        meta["columns"] = _columns(said)
    if apart:
        meta[ON_TWO_PICTURES] = True
    pair = Pair(id="", images=images, prompt=_with_placeholders(turns, len(images)),
                chosen=[assistant_message(answers["chosen"])], rejected=[assistant_message(answers["rejected"])],
                method=str(row.get("method") or "imported"), rejected_images=others,
                answer=said.last if said.answer is None else said.answer, facts=known | _category(row) | _facts(row),
                margin=_margin(row), meta=meta)  # fmt: skip
    pair.id = _identity(row, pair, repeated)
    return pair


def _foreign_prompt(row: Mapping[str, Any], config: DataConfig, repeated: Container[str]) -> tuple[Prompt, Row]:
    said, known = _said(row, config)
    images = [_read_picture(picture, config) for picture in said.images]
    turns, answer = said.turns, said.last if said.answer is None else said.answer
    if said.chosen is not None:
        turns, answers = settle(turns, {"chosen": said.chosen})
        answer = answers["chosen"]
    said.columns.pop("responses", None)
    columns = {"columns": _columns(said)} if said.columns else {}
    prompt = Prompt("", images, _with_placeholders(turns, len(images)), answer, {**known, **_facts(row), **columns})
    prompt.id = _identity(row, prompt, repeated)
    return prompt, said


def _candidates(row: Mapping[str, Any], config: DataConfig, repeated: Container[str]) -> Candidates:
    asked = {name: value for name, value in row.items() if name != "responses"}
    given = row.get("responses")
    if given is not None and _is_own(asked, config):
        prompt = _own_prompt(asked)
    else:
        prompt, said = _foreign_prompt(asked, config, repeated)
        given = said.responses if given is None else given
        chosen = said.last if said.chosen is None else said.chosen
        if given is None and chosen is not None:
            if said.rejected_on_rejected_images and _other_pictures(said, prompt.images, config):
                raise _two_pictures(said)
            if said.rejected is not None:
                _, texts = settle(said.turns, {"chosen": chosen, "rejected": said.rejected})
                given = [{"text": texts[side], "scores": {"preference": float(side == "chosen")}} for side in texts]
    if given is None:
        raise RecordError(
            "missing_column", f"candidates need `responses`; this row has only {_filled(row)}. "
            "sample_responses makes them of prompts."
        )  # fmt: skip
    given = json.loads(given) if isinstance(given, str) else given
    responses = [{"text": response} if isinstance(response, str) else response for response in given]
    found = Candidates(prompt.id, prompt.images, prompt.messages, responses, prompt.answer, prompt.facts)
    found.check()
    return found


def _other_pictures(said: Row, images: list[EncodedImage], config: DataConfig) -> list[EncodedImage]:
    """The other pictures of a row; none where a layout that repeats `images` there has done so, under whatever names."""
    others = [_read_picture(picture, config) for picture in said.rejected_images]
    again = said.rejected_on_rejected_images and [*map(sha256, others)] == [*map(sha256, images)]
    return [] if again else others


def _two_pictures(said: Row) -> RecordError:
    return RecordError(
        "two_pictures",
        f"rows of the layout {said.layout} give the rejected answer on `rejected_images`, here other pictures than the chosen "
        "one's. Candidates are compared on `images`, where that one may be right. Read such rows as pairs (import_published with "
        "`produce: pairs`, for the loss `two_pictures`), or leave `rejected_images` out if the answer is wrong there too.",
    )


def _identity(row: Mapping[str, Any], record: Prompt | Pair, repeated: Container[str]) -> str:
    identity, digest = source_id(row), content_digest(record)
    if identity is None:
        return digest[:24]
    return f"{identity}-{digest[:8]}" if identity in repeated else identity


def _columns(said: Row) -> dict[str, Any]:
    """Columns without a field of their own as JSON: no bytes, no NaN."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    found: dict[str, Any] = finite(legible(said.columns))
    return found


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


def _filled(row: Mapping[str, Any]) -> str:
    """Names of the columns that hold something: in a table, every row has every column."""
    return ", ".join(sorted(name for name, value in row.items() if value is not None and value != "" and value != []))


def _category(row: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of contrast of an MVC row, which the S-VCO filter reads."""
    return {"category": row["category"]} if isinstance(row.get("category"), str) else {}


def _read_picture(picture: Any, config: DataConfig) -> EncodedImage:
    if isinstance(picture, dict) and picture.get("bytes"):
        return {"bytes": picture["bytes"], "path": Path(picture["path"]).name if picture.get("path") else None}
    path = picture.get("path") if isinstance(picture, dict) else picture
    if not isinstance(path, str):
        raise RecordError("bad_image_field", f"a picture is a path or encoded bytes, got {type(picture).__name__}.")
    config = llama_factory.source_of(config)
    if config.images is None and hub.is_named(config):
        return hub.read_picture(path, config)
    base = config.images or (config.path if config.path.is_dir() else config.path.parent)
    return read_image(base / path)


def _with_placeholders(turns: list[Message], pictures: int) -> list[Message]:
    """Turn `<image>` marks in user text into placeholders; with pictures and no mark at all, put them first."""
    result = [
        {**turn, "content": marked_blocks(turn["content"])} if turn["role"] == "user" else {**turn} for turn in turns
    ]
    if pictures and not any(block["type"] == "image" for turn in result for block in turn["content"]):
        first = next((turn for turn in result if turn["role"] == "user"), None)
        if first is not None:
            first["content"] = [{"type": "image"}] * pictures + first["content"]
    return result
