"""Readers of the files that people write for trainers: TRL, LLaMA-Factory (ShareGPT), ms-swift, EasyR1 and verl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign.records import RecordError, normalise_messages, user_message
from prefalign.sources.columns import Row, asked, paired
from prefalign.sources.turns import settle, turns_of


def trl(row: Mapping[str, Any]) -> Row:
    """`prompt` as text or turns."""
    prompt = row["prompt"]
    return paired(row, [user_message(prompt)] if isinstance(prompt, str) else normalise_messages(prompt))


def trl_implicit(row: Mapping[str, Any]) -> Row:
    """Whole conversations in `chosen` and `rejected`: the turns that lead to the answer are the prompt."""
    turns = normalise_messages(row["chosen"])[:-1]
    if not turns:
        raise RecordError(
            "missing_column",
            "a row needs `conversations`, `messages`, `prompt` or `question`, or in `chosen` the turns up to the answer; this "
            f"one has {', '.join(sorted(row))}.",
        )
    return paired(row, turns)


def kto(row: Mapping[str, Any]) -> Row:
    """TRL's unpaired rows: one answer and a thumb."""
    found = trl(row)
    _check_thumb(row, "label")
    found.turns, answers = settle(found.turns, {"completion": row["completion"]})
    said = answers["completion"]
    found.responses = [{"text": said, "scores": {"label": float(row["label"])}}]
    found.answer = said if row["label"] else None
    return found


def sharegpt(row: Mapping[str, Any]) -> Row:
    """`conversations` of `from` and `value`: LLaVA's, LLaMA-Factory's (`chosen`, `rejected`, `system`, or a thumb as `kto_tag`)
    and POVID's.
    """
    return _with_thumb(paired(row, turns_of(row["conversations"]), ("system_prompt", "system")), row)


def ms_swift(row: Mapping[str, Any]) -> Row:
    """`messages` whose last turn is the chosen answer, or with a true or false `label` the only one.

    The rejected answer is given on `rejected_images`, which repeat `images` where the pictures are the same. Rows with
    `rejected_images` alone prefer the answer on its own picture.
    """
    found = _with_thumb(paired(row, normalise_messages(row["messages"])), row)
    found.rejected_on_rejected_images = bool(found.rejected_images)
    return found


def _with_thumb(found: Row, row: Mapping[str, Any]) -> Row:
    """The last answer as the only response where `kto_tag`, or a true or false `label`, is a thumb; down, it is no reference."""
    column = "kto_tag" if row.get("kto_tag") is not None else "label"
    is_thumb = column == "kto_tag" or isinstance(row.get("label"), bool)
    if not is_thumb or found.last is None or found.rejected is not None:
        return found
    _check_thumb(row, column)
    found.responses = [{"text": found.last, "scores": {"label": float(row[column])}}]
    found.answer, found.last = found.last if row[column] else None, None
    found.used.add(column)
    return found


def _check_thumb(row: Mapping[str, Any], column: str) -> None:
    if not isinstance(row[column], (bool, int)) or row[column] not in (0, 1):
        raise RecordError(
            "bad_label", f"`{column}` of an unpaired row is true or false, got {str(row[column])[:80]!r}."
        )


def verl(row: Mapping[str, Any]) -> Row:
    """EasyR1's and verl's `problem` with its `answer`."""
    return asked(row, "problem")
