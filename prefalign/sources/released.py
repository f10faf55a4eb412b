"""Readers of released preference sets whose columns are their own: RLHF-V, RLAIF-V, S-VCO's MVC, LLaVA-RLHF, mDPO, MIA-DPO,
VLFeedback.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from prefalign.records import RecordError
from prefalign.sources.columns import Row, answer_text, asked, paired
from prefalign.sources.trainer_formats import trl
from prefalign.sources.turns import text_turn, turns_of

_VICUNA = re.compile(r"\s*(USER|ASSISTANT):\s*")
_MARKS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id|system|user|assistant|end)\|>|\[/?INST\]|<(?:start|end)_of_turn>"
    r"|<end_of_utterance>"
)
_HEADER = re.compile(r"\b(?:assistant|ASSISTANT|Assistant):\s*$|### Response:\s*$")


def rlaif_v(row: Mapping[str, Any]) -> Row:
    """`question`, a text without marks."""
    return asked(row, "question")


def mvc(row: Mapping[str, Any]) -> Row:
    """S-VCO's MVC: `instruction_prompt`, `chosen_images` with `chosen_response`, and the same of the other side."""
    return asked(row, "instruction_prompt")


def rlhf_v(row: Mapping[str, Any]) -> Row:
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
    found = asked({**row, **text}, "question")
    found.columns = {name: value for name, value in text.items() if name not in (*found.used, "question")}
    return found


def llava_rlhf(row: Mapping[str, Any]) -> Row:
    """Two answers to the last turn and which of them people chose; the answer in `conversations` is neither."""
    turns = row["conversations"]
    nested = isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], list)
    found = paired(row, turns_of(turns[0] if nested else turns))
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


def mdpo(row: Mapping[str, Any]) -> Row:
    """A prompt in the wording of a model's chat template, `... USER: <image>\\nquestion ASSISTANT:`; its system text is noted.

    A prompt without that wording is the question itself (or turns).

    Raises:
        RecordError: `bad_prompt` for a prompt in the wording of another chat template.
    """
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        return trl(row)
    pieces = _VICUNA.split(prompt)
    mark = _MARKS.search(prompt)
    if mark is None and ("USER" not in pieces[1::2] or (pieces[0] and pieces[-2:] != ["ASSISTANT", ""])):
        mark = _HEADER.search(prompt) or _VICUNA.search(prompt)
    if mark is not None:
        raise RecordError(
            "bad_prompt",
            f"`prompt` holds {mark[0].strip()!r} of a chat template ({prompt[:80]!r}), and the model's own would be put around "
            "it. Give the question alone with `<image>` for each picture, turns of `role` and `content`, or mDPO's form "
            "`USER: <image>\\nquestion ASSISTANT:`.",
        )
    if len(pieces) == 1:
        return trl(row)
    roles = {"USER": "user", "ASSISTANT": "assistant"}
    turns = [text_turn(roles[role], text) for role, text in zip(pieces[1::2], pieces[2::2], strict=True) if text]
    found = paired(row, turns)
    if pieces[0].strip():
        found.columns = {"system": pieces[0].strip()}
    return found


def mia_dpo(row: Mapping[str, Any]) -> Row:
    """`prompt` with a mark for each picture; `gt` is the reference answer."""
    found = trl(row)
    found.answer = answer_text(row["gt"])
    found.used = (found.used - {"answer"}) | ({"gt"} if found.answer is not None else set())
    return found


def vlfeedback(row: Mapping[str, Any]) -> Row:
    """Four answers, each graded on three attributes; `datasets` stores the list of answers as columns."""
    found, given = trl(row), row["completions"]
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
