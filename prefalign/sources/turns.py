"""Turns of published conversations, and the one conversation that the answers of a row are given to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefalign.records import Message, RecordError, message_text, normalise_messages

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def turns_of(turns: Any) -> list[Message]:
    """A conversation of `from` and `value`, as turns of `role` and `content`.

    Raises:
        RecordError: `bad_messages`.
    """
    if not isinstance(turns, list):
        raise RecordError("bad_messages", f"a conversation is a list of turns, got {str(turns)[:120]!r}.")
    return [turn_of(turn) for turn in turns]


def turn_of(turn: Any) -> Message:
    """One turn of `from` and `value`, or of `role` and a text as `content`.

    Raises:
        RecordError: `bad_messages`.
    """
    fields = turn if isinstance(turn, Mapping) else {}
    role = ROLES.get(str(fields.get("from", fields.get("role"))))
    text = fields.get("value", fields.get("content"))
    if role is None or not isinstance(text, str):
        raise RecordError(
            "bad_messages", f"a conversation turn needs `from` (human, gpt) and `value`, got {str(turn)[:120]}."
        )
    return text_turn(role, text)


def text_turn(role: str, text: str) -> Message:
    """A turn of text alone."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def marked_blocks(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Blocks of a user turn with a placeholder for each `<image>` in their text, which is else left as it is.

    Left out is white space alone before the first picture, after the last, and among leading ones, and two newlines that are no
    part of the text in LLaVA's files: the one after leading marks, which LLaVA's chat templates write themselves, and where all
    pictures follow the text (`What is this?\\n<image>`) the one before them, which LLaVA's own training takes off when it moves
    the mark to the front (`preprocess_multimodal`). Templates that join blocks in order (Qwen-VL) show all other line breaks as
    published: `Image 1: <image>\\nImage 2: <image>\\nWhich?` stays on three lines.

    Args:
        blocks: the turn's content; left as it is.
    """
    if not any(block["type"] == "text" and PLACEHOLDER in block["text"] for block in blocks):
        return [{**block} for block in blocks]
    found: list[dict[str, Any]] = []
    for block in blocks:
        if block["type"] == "image":
            found.append({"type": "image"})
            continue
        for position, text in enumerate(block["text"].split(PLACEHOLDER)):
            found += [{"type": "image"}] if position else []
            found += [{"type": "text", "text": text}] if text else []
    shown = [place for place, block in enumerate(found) if block["type"] == "image"]
    said = [place for place, block in enumerate(found) if block["type"] == "text" and block["text"].strip()]
    first, last = (said[0], said[-1]) if said else (0, -1)
    if said and shown[0] < first:
        found[first]["text"] = found[first]["text"].removeprefix("\n")
    elif said and last < shown[0]:
        found[last]["text"] = found[last]["text"].removesuffix("\n")
    return [block for place, block in enumerate(found) if block["type"] == "image" or first <= place <= last]


def plain_text(message: Message) -> str:
    """The text of a turn, pictures left out."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def settle(turns: Sequence[Message], answers: Mapping[str, Any]) -> tuple[list[Message], dict[str, str]]:
    """The conversation that all answers of a row are given to, and the text of each.

    An answer is a text, a turn, turns that go on from the question (what stands before the last of them is part of the
    conversation), or a whole conversation with the question in it. Marks of pictures and white space are not compared; an answer
    without a system turn has the question's.

    Args:
        turns: the conversation up to the question, as the row's own columns have it.
        answers: answer by side (`chosen`, `rejected`).

    Raises:
        RecordError: `different_prompts` if turns before the last differ, `empty_chosen` (`empty_rejected`) for a list without a
            turn, `bad_messages` for what is no conversation or ends with a question.
    """
    said = {side: _side(answer, side) for side, answer in answers.items()}
    asked = list(turns)
    before = {side: _before(asked, each[:-1]) for side, each in said.items()}
    first, *others = before
    for side in others:
        _compare(before[first], before[side], f"`{first}`", f"`{side}`")
    whole = before[first]
    if whole and whole[0]["role"] == "system" and (not asked or asked[0]["role"] != "system"):
        asked.insert(0, whole[0])
    _compare(asked, whole[: len(asked)], "the question", f"`{first}`")
    return [*asked, *whole[len(asked) :]], {side: plain_text(each[-1]) for side, each in said.items()}


def _side(answer: Any, side: str) -> list[Message]:
    if isinstance(answer, str):
        return [text_turn("assistant", answer)]
    if isinstance(answer, Mapping):
        said = [turn_of(answer)]
    elif isinstance(answer, list) and answer and isinstance(answer[-1], Mapping) and "from" in answer[-1]:
        said = turns_of(answer)
    else:
        said = normalise_messages(answer)
    if not said:
        raise RecordError(
            f"empty_{side}", f"`{side}` has no turn, so there is no answer. Leave it out, or drop the row."
        )
    if said[-1]["role"] in ("user", "system"):
        raise RecordError(
            "bad_messages",
            f"`{side}` ends with a {said[-1]['role']} turn ({plain_text(said[-1])[:60]!r}), so it is no answer. Give the "
            "assistant's turn last.",
        )
    return said


def _before(asked: list[Message], context: list[Message]) -> list[Message]:
    """All that stands before an answer, `context` being what its own list has of it."""
    if not context or [_told(turn) for turn in context] == [_told(turn) for turn in asked]:
        return asked
    if context[0]["role"] not in ("user", "system"):
        return [*asked, *context]
    if context[0]["role"] == "user" and asked and asked[0]["role"] == "system":
        return [asked[0], *context]
    return context


def _compare(one: Sequence[Message], other: Sequence[Message], first: str, second: str) -> None:
    told = [[_told(turn) for turn in turns] for turns in (one, other)]
    if told[0] == told[1]:
        return
    place = next((n for n, (a, b) in enumerate(zip(*told, strict=False)) if a != b), min(map(len, told)))
    found = [f"{turns[place][0]}: {turns[place][1][:60]!r}" if place < len(turns) else "missing" for turns in told]
    raise RecordError(
        "different_prompts",
        f"turn {place + 1} before the answer is not the same on both sides: of {first} {found[0]}, of {second} {found[1]}. The "
        "last turns would be compared as answers to one conversation, which they are not. Cut the row at the first answer that "
        "differs, or drop it.",
    )


def _told(turn: Message) -> tuple[str, str]:
    return turn["role"], " ".join(message_text([turn]).replace(PLACEHOLDER, " ").split())
