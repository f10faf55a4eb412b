"""Editors: rewrite a true answer into one with plausible mistakes (POVID's text dispreference, arXiv 2402.11411).

`EngineEditor` asks an LLM or a VLM through any engine; `rule_editor.RuleEditor` needs no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from prefalign.engines import Engine, Request, Sampling, require
from prefalign.records import Message, message_text, user_message
from prefalign.text import same_answer, word_diff

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class EditItem:
    """An answer to spoil, with its question, pictures and what is known of them; `id` and the seed decide every draw."""

    id: str
    messages: list[Message]
    images: list[Image.Image]
    answer: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Edit:
    """A rewritten answer.

    Attributes:
        text: the answer with mistakes.
        injected: one mapping per mistake: `type`, `removed`, `added`, and `start`, the character of `text` where it begins.
        kind: the mistakes' types in order, joined by `+` (rules), or the prompt family (engines).
        refused: why there is no edit: `nothing_to_edit`, `unchanged`, `telltale`, `empty`, `cut_off`, `generation_failed`.
        message: more about a refusal.
    """

    text: str = ""
    injected: list[dict[str, Any]] = field(default_factory=list)
    kind: str = ""
    refused: str | None = None
    message: str = ""


class Editor(Protocol):
    """What `datagen/povid.py` asks of an editor."""

    fingerprint: str

    def edit(self, items: Sequence[EditItem]) -> list[Edit]:
        """One edit per item, in order."""
        ...


Family = Literal["captioning", "reasoning"]

_TASK = {
    "captioning": """\
You are given a question about a picture and a correct answer. Rewrite the answer the way someone would put it who goes by
habit instead of looking: let it contain two or three mistakes about what can be seen. Name a thing that is usual in such a
scene but is not there, or get a colour, a number, a position or the way two things stand to each other wrong.
Keep the order, the length and the tone, and leave the other words as they are. A reader who cannot see the picture must not
be able to find the mistakes: no contradiction, no doubt, no remark. Give the new answer and nothing else.""",
    "reasoning": """\
You are given a question about a picture that asks for an explanation, and a correct answer. Rewrite the answer so that it
starts from exactly one thing that cannot be seen in the picture, and let the explanation follow from it step by step.
Keep the length and the tone. A reader who cannot see the picture must find the explanation sound: no contradiction, no doubt,
no remark. Give the new answer and nothing else.""",
}
_SHOTS = {
    "captioning": (
        (
            "What is on the kitchen table?",
            "A white plate with two slices of toast lies on the table, and a knife lies to the right of it.",
            "A white plate with three slices of toast lies on the table, and a knife and a fork lie to the left of it.",
        ),
        (
            "Describe the picture.",
            "A man in a grey coat waits at a bus stop. The street behind him is empty.",
            "A man in a grey coat waits at a bus stop with an umbrella in his hand. A taxi passes on the street behind him.",
        ),
    ),
    "reasoning": (
        (
            "Why might the woman be in a hurry?",
            "She is running along the platform while the doors of the train are closing, so she probably wants to catch it.",
            "She keeps looking at the watch on her wrist while she walks along the platform, so she probably fears to be late.",
        ),
        (
            "What does the picture say about the weather?",
            "People wear thick jackets and their breath can be seen, which points to a cold day.",
            "People wear thick jackets and there is snow on the roofs behind them, which points to a cold winter day.",
        ),
    ),
}
_EXPLAINS = re.compile(
    r"\b(?:why|how (?:can|could|do|does|might|would)|explain|reasons?|infer|suggests?|purpose|likely|might|could)\b",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^(?:\W*(?:here is|here's|sure|certainly|of course)\b[^\n:]*:|\W*(?:(?:new|rewritten|modified|edited) )?answer\W*:)\s*",
    re.IGNORECASE,
)
_TELLTALE = re.compile(
    r"hallucinat|as an ai\b|\bi (?:can't|cannot|am unable)\b|\bi(?:'m| am) sorry|fabricat|made[- ]up|\[[^\]]*\]|</?\w+>|^note:|"
    r"\((?:added|changed|wrong|incorrect|false|note)\b|\b(?:original|new|rewritten|modified|correct|incorrect) answer|"
    r"\bnot (?:actually |really )?(?:visible |shown )?in the (?:original|picture|image|photo)",
    re.IGNORECASE | re.MULTILINE,
)


class EngineEditor:
    """Asks an LLM, or a VLM that sees the row's pictures, for the rewritten answer.

    Departures from the paper: GPT-4V is any engine; the wording is ours (the authors' was not released); answers that are
    unchanged, cut off or that give the edit away are refused (BDHS, arXiv 2407.02477, appendix C.1, saw quality fall with them).
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        *,
        family: Literal["auto", "captioning", "reasoning"] = "auto",
        pictures: bool = True,
        seed: int = 0,
    ) -> None:
        """Args:
            engine: the editor's model.
            sampling: how it is drawn from.
            family: prompt family; `auto` takes `reasoning` for questions that ask for an explanation.
            pictures: show the row's pictures (VLM); without them an LLM edits blindly.
            seed: seed of the stage.

        Raises:
            ValueError: if the engine cannot sample.
        """
        require(engine, ["sample"], "POVID")
        self.engine = engine
        self.sampling = sampling
        self.family = family
        self.pictures = pictures
        self.seed = seed
        self.fingerprint = engine.fingerprint

    def edit(self, items: Sequence[EditItem]) -> list[Edit]:
        """One edit per item, in order; all of them in one call of the engine."""
        families = [self._family(item) for item in items]
        requests = [
            Request(
                id=f"{item.id}/edit",
                messages=[user_message(edit_prompt(item, family), len(item.images) if self.pictures else 0)],
                images=item.images if self.pictures else [],
                seed=self.seed,
            )
            for item, family in zip(items, families, strict=True)
        ]
        completions = self.engine.generate(requests, self.sampling) if requests else []
        edits = []
        for item, family, completion in zip(items, families, completions, strict=True):
            if completion.finish_reason == "error":
                edits.append(Edit(kind=family, refused="generation_failed", message=str(completion.error)))
            elif completion.finish_reason == "length":
                edits.append(Edit(kind=family, refused="cut_off", message=f"...{completion.text[-60:]}"))
            else:
                edits.append(judged(item.answer, completion.text, family))
        return edits

    def _family(self, item: EditItem) -> Family:
        if self.family != "auto":
            return self.family
        return "reasoning" if _EXPLAINS.search(message_text(item.messages[-1:])) else "captioning"


def edit_prompt(item: EditItem, family: Family) -> str:
    """The instruction to rewrite an item's answer, with two worked examples."""
    question = message_text(item.messages[-1:]).strip()
    shots = [f"Question: {ask}\nCorrect answer: {true}\nNew answer: {false}" for ask, true, false in _SHOTS[family]]
    return "\n\n".join(
        [_TASK[family], *shots, f"Question: {question}\nCorrect answer: {item.answer.strip()}\nNew answer:"]
    )


def cleaned(text: str) -> str:
    """An editor's answer without labels, code fences and quotes around the whole of it."""
    text = re.sub(r"^```\w*\n|\n?```$", "", text.strip()).strip()
    text = _LABEL.sub("", text, count=1).strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def judged(answer: str, edited: str, kind: str) -> Edit:
    """The cleaned edit with its changes, or why it is refused: `empty`, `unchanged`, `telltale`."""
    text = cleaned(edited)
    if not text:
        return Edit(kind=kind, refused="empty", message="the editor answered nothing")
    if same_answer(answer, text):
        return Edit(kind=kind, refused="unchanged", message=text[:60])
    telltale = _TELLTALE.search(text)
    if telltale and telltale[0].lower() not in answer.lower():
        return Edit(kind=kind, refused="telltale", message=f"{telltale[0]!r} gives the edit away: {text[:60]}")
    return Edit(text, changes(answer, text, kind), kind)


def changes(before: str, after: str, kind: str) -> list[dict[str, Any]]:
    """Each stretch of words that differs: `type`, `removed`, `added` and `start`, the character of `after` where it begins."""
    found: list[dict[str, Any]] = []
    position, open_change = 0, False
    for op, piece in word_diff(before, after):
        if op == "same":
            position, open_change = position + len(piece), False
            continue
        if not open_change:
            found.append({"type": kind, "removed": "", "added": "", "start": position})
            open_change = True
        found[-1][op] += piece
        position += len(piece) if op == "added" else 0
    for change in found:  # the blank before words that were added at the end of a text
        change["start"] += len(change["added"]) - len(change["added"].lstrip()) if change["added"].strip() else 0
        change["added"], change["removed"] = change["added"].lstrip(), change["removed"].lstrip()
    return [change for change in found if change["added"] or change["removed"]]
