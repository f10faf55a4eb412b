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
from prefalign.sources.turns import plain_text, settle, text_turn, turns_of

AUTO = "auto"
ID_COLUMNS = ("id", "question_id", "idx")
PICTURES = ("images", "image", "image_path", "img_path")
CHOSEN = ("chosen", "chosen_response")
REJECTED = ("rejected", "rejected_response", "rejected_messages", "rejected_conversations")
_QUESTIONS = ("conversations", "messages", "prompt", "instruction_prompt", "question", "problem")
_VICUNA = re.compile(r"\s*(USER|ASSISTANT):\s*")


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
    responses: list[Any] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Layout:
    """A published layout.

    Attributes:
        needs: columns that tell it from the others.
        read: turns a row into what it says.
        uses: columns that only this layout's reader understands, and uses up.
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
    used = {*found.used, *known.uses, *(column for column in known.needs if column in _QUESTIONS)}
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


def _pair(row: Mapping[str, Any], turns: list[Message], systems: Sequence[str] = ("system_prompt",)) -> Row:
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
    answer = _answer(row.get("answer"))
    if answer is not None:
        used.add("answer")
    elif isinstance(model := row.get("reward_model"), Mapping):
        answer = _answer(model.get("ground_truth"))
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


def _answer(value: Any) -> str | None:
    """A text, or a number as text; None for what is neither."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return value if isinstance(value, str) else None


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
    found.turns, answers = settle(found.turns, {"completion": row["completion"]})
    said = answers["completion"]
    found.responses = [{"text": said, "scores": {"label": float(row["label"])}}]
    found.answer = said if row["label"] else None
    return found


def _sharegpt(row: Mapping[str, Any]) -> Row:
    """`conversations` of `from` and `value`: LLaVA's, LLaMA-Factory's (`chosen`, `rejected`, `system`) and POVID's."""
    return _pair(row, turns_of(row["conversations"]), ("system_prompt", "system"))


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
    found.columns = {name: value for name, value in text.items() if name not in (*found.used, "question")}
    return found


def _llava_rlhf(row: Mapping[str, Any]) -> Row:
    """Two answers to the last turn and which of them people chose; the answer in `conversations` is neither."""
    turns = row["conversations"]
    nested = isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], list)
    found = _pair(row, turns_of(turns[0] if nested else turns))
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
    turns = [text_turn(roles[role], text) for role, text in zip(pieces[1::2], pieces[2::2], strict=True) if text]
    found = _pair(row, turns)
    if pieces[0].strip():
        found.columns = {"system": pieces[0].strip()}
    return found


def _mia_dpo(row: Mapping[str, Any]) -> Row:
    """`prompt` with a mark for each picture; `gt` is the reference answer."""
    found = _trl(row)
    found.answer = _answer(row["gt"])
    found.used = (found.used - {"answer"}) | ({"gt"} if found.answer is not None else set())
    return found


def _vlfeedback(row: Mapping[str, Any]) -> Row:
    """Four answers, each graded on three attributes; `datasets` stores the list of answers as columns."""
    found, given = _trl(row), row["completions"]
    if isinstance(given, Mapping):
        given = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    if not isinstance(given, list):
        raise RecordError("bad_responses", f"`completions` is a list of answers, got {str(given)[:120]!r}.")
    found.responses = [_graded(answer) for answer in given]
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


LAYOUTS: dict[str, Layout] = {
    "llava_rlhf": Layout(
        ("conversations", "output_1", "output_2", "preference"), _llava_rlhf, ("output_1", "output_2", "preference")
    ),
    "povid": Layout(("conversations", "rejected_conversations"), _sharegpt),
    "sharegpt": Layout(("conversations",), _sharegpt),
    "ms_swift": Layout(("messages",), _ms_swift),
    "vlfeedback": Layout(("prompt", "completions"), _vlfeedback, ("completions",)),
    "kto": Layout(("prompt", "completion", "label"), _kto, ("completion", "label")),
    "mdpo": Layout(("img_path", "prompt", "chosen", "rejected"), _mdpo, ("img_path",)),
    "mia_dpo": Layout(("prompt", "gt"), _mia_dpo),
    "trl": Layout(("prompt",), _trl),
    "mvc": Layout(("instruction_prompt",), _mvc),
    "rlaif_v": Layout(("question",), _rlaif_v),
    "verl": Layout(("problem",), _verl),
    "stic": Layout(("image", "chosen", "rejected", "hallu_prompt"), _trl_implicit),
    "trl_implicit": Layout(("chosen",), _trl_implicit, fits=lambda row: isinstance(row["chosen"], list)),
    "rlhf_v": Layout(("text",), _rlhf_v, ("text",), fits=lambda row: str(row["text"]).lstrip().startswith("{")),
}
"""Name to layout, in the order in which `auto` looks for them."""
