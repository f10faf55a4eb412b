"""Linked questions about a scene whose answers have to fit together, with what the symbolic reward needs to check them.

Two kinds, by the rule set that judges them: `existence_count` (is there a star, how many stars are there) and `attribute` (is the
star red, which colour is it).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prefalign.scenes.data import row
from prefalign.scenes.language import Question, probe, questions
from prefalign.scenes.world import COLOURS, Scene, scene


@dataclass(frozen=True)
class Linked:
    """A conversation to be had about a scene.

    Attributes:
        questions: the user's turns in order, with their true answers.
        rules: `facts["rules"]` of its row: `set`, `asked`, `reference`, and `questions`, the texts in order.
    """

    questions: tuple[Question, ...]
    rules: dict[str, Any]


def linked(picture: Scene, number: int = 0) -> list[Linked]:
    """All linked questions that can be asked about a scene, each two in an order drawn for `number`."""
    rng = random.Random(f"linked {picture.id} {number}")
    asked = questions(picture, number)
    out = []
    for count in (question for question in asked if question.kind == "count"):
        exists = probe(picture, count.shape, short=rng.random() < 0.5)
        reference = {"exists": exists.label, "count": "none" if count.label == "0" else "some"}
        asked_both = {"exists": exists, "count": count}
        out.append(_linked("existence_count", asked_both, reference, rng, number=int(count.label)))
    colours = {question.shape: question for question in asked if question.kind == "colour"}
    for question in asked:
        value = next((colour for colour in COLOURS if f" {colour}?" in question.text), None)
        if question.kind == "yes_no" and value is not None and question.text.startswith("Is the "):
            which = colours[question.shape]
            reference = {"is": question.label, "which": "yes" if which.label == value else "no"}
            out.append(
                _linked(
                    "attribute", {"is": question, "which": which}, reference, rng, value=value, values=list(COLOURS)
                )
            )
    return out


def rows(split: str, start: int, stop: int, *, seed: int = 0) -> Iterator[dict]:
    """One conversation about each scene, as `data.rows`: `messages` and `answer` are those of its first question."""
    for index in range(start, stop):
        picture = scene(split, index)
        one = random.Random(f"linked rows {picture.id} {seed}").choice(linked(picture, seed))
        first = one.questions[0]
        made = row(f"{picture.id}-linked-{seed}", [picture], first.text, first.answer)
        yield {**made, "facts": {**made["facts"], "rules": one.rules}}


def _linked(
    name: str, asked: dict[str, Question], reference: dict[str, str], rng: random.Random, **more: Any
) -> Linked:
    order = rng.sample(list(asked), len(asked))
    rules = {
        "set": name,
        "asked": order,
        "reference": reference,
        "questions": [asked[one].text for one in order],
        **more,
    }
    return Linked(tuple(asked[one] for one in order), rules)
