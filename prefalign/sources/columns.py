"""What the rows of most layouts have in common: id, pictures, answers and system text, by whatever name the column has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefalign.records import Message, normalise_messages, user_message
from prefalign.sources.turns import plain_text, text_turn

ID_COLUMNS = ("id", "question_id", "idx")
PICTURES = ("images", "image", "image_path", "img_path")
CHOSEN = ("chosen", "chosen_response")
REJECTED = ("rejected", "rejected_response", "rejected_messages", "rejected_conversations")


@dataclass
class Row:
    """What a row of any layout says.

    Attributes:
        layout: name of the layout.
        turns: conversation up to the question; pictures may be `<image>` marks in the text.
        last: the conversation's own last answer.
        chosen: preferred answer, in any form that `turns.settle` reads.
        rejected: the other answer.
        answer: reference answer.
        images: paths or encoded pictures that both answers are about.
        rejected_images: the same of the other picture(s).
        rejected_on_rejected_images: the rejected answer, or the chosen one where there is no other, is about the other pictures;
            those may be `images` again.
        responses: several answers, scored or not.
        columns: what has no field here.
        used: columns whose content is in one of these fields.
    """

    layout: str
    turns: list[Message]
    last: str | None = None
    chosen: Any = None
    rejected: Any = None
    answer: str | None = None
    images: list[Any] = field(default_factory=list)
    rejected_images: list[Any] = field(default_factory=list)
    rejected_on_rejected_images: bool = False
    responses: list[Any] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def source_id(row: Mapping[str, Any]) -> str | None:
    """The row's own id, if it has one."""
    name = first(row, ID_COLUMNS)
    return None if name is None else str(row[name])


def pictures(row: Mapping[str, Any]) -> list[Any]:
    """Paths or encoded pictures of a row, from the first picture column that it has."""
    name = _picture_column(row)
    if name is None:
        return []
    return list(row[name]) if isinstance(row[name], (list, tuple)) else [row[name]]


def _picture_column(row: Mapping[str, Any]) -> str | None:
    given = (name for name in PICTURES if row.get(name) is not None)
    return next((name for name in given if row[name] or name in ("images", "image")), None)


def first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these columns that is there."""
    return next((name for name in names if row.get(name) is not None), None)


def paired(row: Mapping[str, Any], turns: list[Message], systems: Sequence[str] = ("system_prompt",)) -> Row:
    """What the columns shared by most layouts say beside the question; of `systems` the first is the system turn."""
    last = plain_text(turns.pop()) if turns and turns[-1]["role"] == "assistant" else None
    shown = row if row.get("chosen_images") is None else {"images": row["chosen_images"]}
    pictured = _picture_column(row) if shown is row else "chosen_images"
    chosen, rejected = first(row, CHOSEN), first(row, REJECTED)
    used = {first(row, ID_COLUMNS), chosen, rejected, pictured, "rejected_images", "facts"}
    system = first(row, systems)
    told = row[system] if system is not None else None
    if isinstance(told, str) and not (told.strip() and any(turn["role"] == "system" for turn in turns)):
        used.add(system)
        turns = [text_turn("system", told), *turns] if told.strip() else turns
    answer = answer_text(row.get("answer"))
    if answer is not None:
        used.add("answer")
    elif isinstance(model := row.get("reward_model"), Mapping):
        answer = answer_text(model.get("ground_truth"))
    return Row(
        "",
        turns,
        last,
        chosen=row[chosen] if chosen is not None else None,
        rejected=row[rejected] if rejected is not None else None,
        answer=answer,
        images=pictures(shown),
        rejected_images=pictures({"images": row.get("rejected_images")}),
        responses=row.get("responses"),
        used={name for name in used if name is not None},
    )


def answer_text(value: Any) -> str | None:
    """A text, or a number as text; None for what is neither."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return value if isinstance(value, str) else None


def asked(row: Mapping[str, Any], column: str) -> Row:
    asked = row[column]
    return paired(row, [user_message(asked)] if isinstance(asked, str) else normalise_messages(asked))
