"""One reader for each published layout of prompts and preferences: what its columns mean, its pictures not yet read.

Released files: RLHF-V, RLAIF-V, POVID, STIC, MIA-DPO, mDPO, S-VCO's MVC, LLaVA-RLHF, VLFeedback. Files made for trainers: TRL,
LLaMA-Factory (ShareGPT), ms-swift, EasyR1 and verl.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefalign.records import Message, RecordError, normalise_messages, user_message

AUTO = "auto"
ID_COLUMNS = ("id", "question_id", "idx")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PICTURES = ("images", "image", "image_path", "img_path")
CHOSEN = ("chosen", "chosen_response")
REJECTED = ("rejected", "rejected_response", "rejected_messages", "rejected_conversations")
_QUESTIONS = ("conversations", "messages", "prompt", "instruction_prompt", "question", "problem")
_READ = frozenset(
    (*ID_COLUMNS, "images", "image", *CHOSEN, *REJECTED, *_QUESTIONS, "chosen_images", "rejected_images", "system_prompt",
     "answer", "facts", "margin", "method", "category", "responses")
)  # fmt: skip
"""Columns that have a field of their own in records; all others are kept as `columns`."""
_VICUNA = re.compile(r"\s*(USER|ASSISTANT):\s*")


@dataclass
class Row:
    """What a row of any layout says.

    Attributes:
        layout: name of the layout.
        turns: conversation up to the question; pictures may be `<image>` marks in the text.
        last: the conversation's own last answer.
        chosen: preferred answer, in any form that `answer_text` reads.
        rejected: the other answer.
        answer: reference answer.
        images: paths or encoded pictures that both answers are about.
        rejected_images: the same of the other picture(s).
        responses: several answers, scored or not.
        columns: what has no field in a record.
    """

    layout: str
    turns: list[Message]
    last: str | None = None
    chosen: Any = None
    rejected: Any = None
    answer: str | None = None
    images: list[Any] = field(default_factory=list)
    rejected_images: list[Any] = field(default_factory=list)
    responses: list[Any] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A published layout.

    Attributes:
        needs: columns that tell it from the others.
        read: turns a row into what it says.
        uses: columns that only this layout's reader understands.
        fits: whether the columns hold what they do in this layout, where other files give them another meaning.
    """

    needs: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]
    uses: tuple[str, ...] = ()
    fits: Callable[[Mapping[str, Any]], bool] = lambda row: True


def read(row: Mapping[str, Any], layout: str = AUTO) -> Row:
    """Read a raw row as the layout that its columns tell, or as a named one.

    Args:
        row: raw row; columns that are None count as absent.
        layout: `auto`, or a name in `LAYOUTS`.

    Raises:
        RecordError: `missing_column` for a row that asks nothing, `wrong_layout` for one without the columns of the named
            layout, and what the layout's reader finds wrong.
    """
    given = {name: value for name, value in row.items() if value is not None}
    name = recognised(given) if layout == AUTO else layout
    if name is None:
        raise RecordError(
            "missing_column",
            f"a row needs `conversations`, `messages`, `prompt` or `question`; this one has {', '.join(sorted(row))}.",
        )
    known = LAYOUTS[name]
    if lacking := [column for column in known.needs if column not in given]:
        looks = recognised(given)
        raise RecordError(
            "wrong_layout",
            f"data.layout is {name}, whose rows have {' and '.join(known.needs)}; this one lacks {' and '.join(lacking)} and has "
            f"{', '.join(sorted(row))}{f', as {looks} rows have' if looks else ''}. Give data.layout {looks or AUTO}.",
        )
    found = known.read(given)
    found.layout = name
    used = {*_READ, *known.uses, *(() if {"images", "image"} & given.keys() else PICTURES)}
    found.columns = {column: value for column, value in given.items() if column not in used} | found.columns
    return found


def asks(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a question or a conversation, in any layout."""
    return any(row.get(name) for name in _QUESTIONS)


def recognised(row: Mapping[str, Any]) -> str | None:
    """Name of the layout whose columns a row has, of several the first in `LAYOUTS`; None: of none."""
    return next(
        (
            name
            for name, layout in LAYOUTS.items()
            if all(row.get(column) not in (None, []) for column in layout.needs) and layout.fits(row)
        ),
        None,
    )


def source_id(row: Mapping[str, Any]) -> str | None:
    """The row's own id, if it has one."""
    identity = next((row[name] for name in ID_COLUMNS if row.get(name) is not None), None)
    return None if identity is None else str(identity)


def pictures(row: Mapping[str, Any]) -> list[Any]:
    """Paths or encoded pictures of a row, from the first picture column that it has."""
    for name in PICTURES:
        if row.get(name) is not None and (row[name] or name in ("images", "image")):
            return list(row[name]) if isinstance(row[name], (list, tuple)) else [row[name]]
    return []


def answer_text(value: Any, side: str = "chosen") -> str:
    """The text of an answer: a text, a turn, or the last of several turns.

    Raises:
        RecordError: `bad_messages`, or `empty_chosen` (`empty_rejected`) for a list without a turn.
    """
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


def first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of these columns that is there."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _pair(row: Mapping[str, Any], turns: list[Message]) -> Row:
    """What the columns shared by most layouts say beside the question."""
    last = _plain_text(turns.pop()) if turns and turns[-1]["role"] == "assistant" else None
    system = row.get("system_prompt")
    if isinstance(system, str) and system.strip() and not any(turn["role"] == "system" for turn in turns):
        turns = [{"role": "system", "content": [{"type": "text", "text": system}]}, *turns]
    shown = row if row.get("chosen_images") is None else {"images": row["chosen_images"]}
    return Row(
        "",
        turns,
        last,
        chosen=first(row, CHOSEN),
        rejected=first(row, REJECTED),
        answer=row["answer"] if isinstance(row.get("answer"), str) else None,
        images=pictures(shown),
        rejected_images=pictures({"images": row.get("rejected_images")}),
        responses=row.get("responses"),
    )


def _trl(row: Mapping[str, Any]) -> Row:
    """`prompt` as text or turns."""
    prompt = row["prompt"]
    return _pair(row, [user_message(prompt)] if isinstance(prompt, str) else normalise_messages(prompt))


def _trl_implicit(row: Mapping[str, Any]) -> Row:
    """Whole conversations in `chosen` and `rejected`: the turns that lead to the answer are the prompt."""
    turns = normalise_messages(row["chosen"])[:-1]
    if not turns:
        raise RecordError(
            "missing_column",
            "a row needs `conversations`, `messages`, `prompt` or `question`, or in `chosen` the turns up to the answer; this "
            f"one has {', '.join(sorted(row))}.",
        )
    return _pair(row, turns)


def _kto(row: Mapping[str, Any]) -> Row:
    """TRL's unpaired rows: one answer and a thumb."""
    found = _trl(row)
    if not isinstance(row["label"], (bool, int)) or row["label"] not in (0, 1):
        raise RecordError("bad_label", f"`label` of an unpaired row is true or false, got {str(row['label'])[:80]!r}.")
    said = answer_text(row["completion"])
    found.responses = [{"text": said, "scores": {"label": float(row["label"])}}]
    found.answer = said if row["label"] else None
    return found


def _sharegpt(row: Mapping[str, Any]) -> Row:
    """`conversations` of `from` and `value`: LLaVA's, LLaMA-Factory's (`chosen`, `rejected`) and POVID's."""
    return _pair(row, [_shared_turn(turn) for turn in _list(row["conversations"])])


def _ms_swift(row: Mapping[str, Any]) -> Row:
    """`messages` whose last turn is the chosen answer. Rows with `rejected_images` alone prefer the answer on its own picture."""
    found = _pair(row, normalise_messages(row["messages"]))
    if found.rejected_images and found.rejected is None:
        found.rejected = found.last if found.chosen is None else found.chosen
    return found


def _rlaif_v(row: Mapping[str, Any]) -> Row:
    """`question`, a text without marks."""
    return _asked(row, "question")


def _mvc(row: Mapping[str, Any]) -> Row:
    """S-VCO's MVC: `instruction_prompt`, `chosen_images` with `chosen_response`, and the same of the other side."""
    return _asked(row, "instruction_prompt")


def _verl(row: Mapping[str, Any]) -> Row:
    """EasyR1's and verl's `problem` with its `answer`."""
    return _asked(row, "problem")


def _asked(row: Mapping[str, Any], column: str) -> Row:
    asked = row[column]
    return _pair(row, [user_message(asked)] if isinstance(asked, str) else normalise_messages(asked))


def _rlhf_v(row: Mapping[str, Any]) -> Row:
    """Question and answers as JSON in the column `text`."""
    try:
        text = json.loads(row["text"]) if isinstance(row["text"], str) else row["text"]
    except ValueError as error:
        raise RecordError(
            "bad_text",
            f"`text` of an RLHF-V row is JSON with `question`, `chosen` and `rejected`, and this is not JSON ({error}).",
        ) from error
    if not isinstance(text, Mapping) or not isinstance(text.get("question"), str):
        raise RecordError(
            "bad_text", f"`text` of an RLHF-V row has `question`, `chosen` and `rejected`, got {str(text)[:120]!r}."
        )
    found = _asked({**row, **text}, "question")
    found.columns = {name: value for name, value in text.items() if name not in _READ}
    return found


def _llava_rlhf(row: Mapping[str, Any]) -> Row:
    """Two answers to the last turn and which of them people chose; the answer in `conversations` is neither."""
    turns = _list(row["conversations"])
    turns = turns[0] if len(turns) == 1 and isinstance(turns[0], list) else turns
    found = _pair(row, [_shared_turn(turn) for turn in turns])
    if row["preference"] not in (1, 2):
        raise RecordError(
            "bad_preference", f"`preference` says which output is better, 1 or 2, got {str(row['preference'])[:80]!r}."
        )
    outputs = [_output(row["output_1"]), _output(row["output_2"])]
    found.chosen, found.rejected = outputs if row["preference"] == 1 else outputs[::-1]
    found.answer = found.last
    return found


def _output(value: Any) -> str:
    text = value.get("value") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise RecordError("bad_messages", f"an output is a text or a turn with `value`, got {str(value)[:120]!r}.")
    return text


def _mdpo(row: Mapping[str, Any]) -> Row:
    """A prompt in the wording of a model's chat template, `... USER: <image>\\nquestion ASSISTANT:`; its system text is noted."""
    prompt = row["prompt"]
    if not isinstance(prompt, str) or not (pieces := _VICUNA.split(prompt))[1:]:
        return _trl(row)
    roles = {"USER": "user", "ASSISTANT": "assistant"}
    turns = [
        {"role": roles[role], "content": [{"type": "text", "text": text}]}
        for role, text in zip(pieces[1::2], pieces[2::2], strict=True)
        if text
    ]
    found = _pair(row, turns)
    if pieces[0].strip():
        found.columns = {"system": pieces[0].strip()}
    return found


def _mia_dpo(row: Mapping[str, Any]) -> Row:
    """`prompt` with a mark for each picture; `gt` is the reference answer."""
    found = _trl(row)
    found.answer = row["gt"] if isinstance(row["gt"], str) else None
    return found


def _vlfeedback(row: Mapping[str, Any]) -> Row:
    """Four answers, each graded on three attributes; `datasets` stores the list of answers as columns."""
    found, given = _trl(row), row["completions"]
    if isinstance(given, Mapping):
        given = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    found.responses = [_graded(answer) for answer in _list(given)]
    return found


def _graded(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, Mapping) or not isinstance(answer.get("response"), str):
        raise RecordError("bad_responses", f"a completion needs `response`, got {str(answer)[:120]!r}.")
    grades = {name: grade for name, grade in (answer.get("annotations") or {}).items() if isinstance(grade, Mapping)}
    graded: dict[str, Any] = {
        "text": answer["response"],
        "scores": {name.lower().replace(" ", "_"): _rating(grade.get("Rating")) for name, grade in grades.items()},
        "rationales": {name.lower().replace(" ", "_"): grade.get("Rationale") for name, grade in grades.items()},
    }
    return {**graded, "generator": answer["model"]} if isinstance(answer.get("model"), str) else graded


def _rating(value: Any) -> float | None:
    """A grade as a number; None for what the grader left out (`N/A`)."""
    try:
        rating = float(value)
    except (TypeError, ValueError):
        return None
    return rating if math.isfinite(rating) else None


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


LAYOUTS: dict[str, Layout] = {
    "llava_rlhf": Layout(
        ("conversations", "output_1", "output_2", "preference"), _llava_rlhf, ("output_1", "output_2", "preference")
    ),
    "povid": Layout(("conversations", "rejected_conversations"), _sharegpt),
    "sharegpt": Layout(("conversations",), _sharegpt),
    "ms_swift": Layout(("messages",), _ms_swift),
    "vlfeedback": Layout(("prompt", "completions"), _vlfeedback, ("completions", "img_path")),
    "kto": Layout(("prompt", "completion", "label"), _kto, ("completion", "label")),
    "mdpo": Layout(("img_path", "prompt", "chosen", "rejected"), _mdpo, ("img_path",)),
    "mia_dpo": Layout(("prompt", "gt"), _mia_dpo, ("gt",)),
    "trl": Layout(("prompt",), _trl),
    "mvc": Layout(("instruction_prompt",), _mvc),
    "rlaif_v": Layout(("question",), _rlaif_v),
    "verl": Layout(("problem",), _verl),
    "stic": Layout(("image", "chosen", "rejected", "hallu_prompt"), _trl_implicit),
    "trl_implicit": Layout(("chosen",), _trl_implicit, fits=lambda row: isinstance(row["chosen"], list)),
    "rlhf_v": Layout(("text",), _rlhf_v, ("text",), fits=lambda row: str(row["text"]).lstrip().startswith("{")),
}
"""Name to layout, in the order in which `auto` looks for them."""
