"""The layouts of prompts and preferences that are read, and how a row's is told from its columns; no picture is read here.

`released` has the readers of published sets, `trainer_formats` those of the files that trainers take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefalign.records import RecordError
from prefalign.sources import released, trainer_formats
from prefalign.sources.columns import Row

AUTO = "auto"
_QUESTIONS = ("conversations", "messages", "prompt", "instruction_prompt", "question", "problem")


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
    """Whether a row holds a question or a conversation, in any layout; an empty one is none."""
    name = recognised(without_empty_questions(row))
    if name is None or LAYOUTS[name].read is not trainer_formats.trl_implicit:
        return name is not None
    return isinstance(row["chosen"], list) and len(row["chosen"]) > 1  # the last turn is the answer


def without_empty_questions(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the columns that could hold its question and hold none."""
    return {column: value for column, value in row.items() if value or column not in _QUESTIONS}


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


LAYOUTS: dict[str, Layout] = {
    "llava_rlhf": Layout(
        ("conversations", "output_1", "output_2", "preference"),
        released.llava_rlhf,
        ("output_1", "output_2", "preference"),
    ),
    "povid": Layout(("conversations", "rejected_conversations"), trainer_formats.sharegpt),
    "sharegpt": Layout(("conversations",), trainer_formats.sharegpt),
    "ms_swift": Layout(("messages",), trainer_formats.ms_swift),
    "vlfeedback": Layout(("prompt", "completions"), released.vlfeedback, ("completions",)),
    "kto": Layout(("prompt", "completion", "label"), trainer_formats.kto, ("completion", "label")),
    "mdpo": Layout(("img_path", "prompt", "chosen", "rejected"), released.mdpo, ("img_path",)),
    "mia_dpo": Layout(("prompt", "gt"), released.mia_dpo),
    "trl": Layout(("prompt",), trainer_formats.trl),
    "mvc": Layout(("instruction_prompt",), released.mvc),
    "rlaif_v": Layout(("question",), released.rlaif_v),
    "verl": Layout(("problem",), trainer_formats.verl),
    "stic": Layout(("image", "chosen", "rejected", "hallu_prompt"), trainer_formats.trl_implicit),
    "trl_implicit": Layout(("chosen",), trainer_formats.trl_implicit, fits=lambda row: isinstance(row["chosen"], list)),
    "rlhf_v": Layout(("text",), released.rlhf_v, ("text",), fits=lambda row: str(row["text"]).lstrip().startswith("{")),
}
"""Name to layout, in the order in which `auto` looks for them."""
