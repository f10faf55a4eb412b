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
    if not isinstance(row["label"], (bool, int)) or row["label"] not in (0, 1):
        raise RecordError("bad_label", f"`label` of an unpaired row is true or false, got {str(row['label'])[:80]!r}.")
    found.turns, answers = settle(found.turns, {"completion": row["completion"]})
    said = answers["completion"]
    found.responses = [{"text": said, "scores": {"label": float(row["label"])}}]
    found.answer = said if row["label"] else None
    return found


def sharegpt(row: Mapping[str, Any]) -> Row:
    """`conversations` of `from` and `value`: LLaVA's, LLaMA-Factory's (`chosen`, `rejected`, `system`) and POVID's."""
    return paired(row, turns_of(row["conversations"]), ("system_prompt", "system"))


def ms_swift(row: Mapping[str, Any]) -> Row:
    """`messages` whose last turn is the chosen answer, or with a true or false `label` the only one.

    The rejected answer is given on `rejected_images`, which repeat `images` where the pictures are the same. Rows with
    `rejected_images` alone prefer the answer on its own picture.
    """
    found = paired(row, normalise_messages(row["messages"]))
    if isinstance(row.get("label"), bool) and found.last is not None and found.rejected is None:
        found.responses = [{"text": found.last, "scores": {"label": float(row["label"])}}]
        found.answer, found.last = found.last if row["label"] else None, None
        found.used.add("label")
    if found.rejected_images == found.images:
        found.rejected_images = []
    found.rejected_on_rejected_images = bool(found.rejected_images)
    if found.rejected_images and found.rejected is None:
        found.rejected = found.last if found.chosen is None else found.chosen
    return found


def verl(row: Mapping[str, Any]) -> Row:
    """EasyR1's and verl's `problem` with its `answer`."""
    return asked(row, "problem")
