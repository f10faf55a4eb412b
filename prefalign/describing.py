"""A model's own description of pictures, asked for by itself and put before a question: STIC (arXiv 2405.19716).

Stage 2 of STIC writes such descriptions into SFT rows; "describe and respond" does the same with a question at inference.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prefalign import families
from prefalign.engines import Completion, Engine, Request, Sampling
from prefalign.records import Message, row_seed, user_message

if TYPE_CHECKING:
    from PIL import Image

NEUTRAL_PROMPTS = (
    "Describe this picture in detail.",
    "Summarise what this picture shows.",
    "Explain what is going on in this picture.",
    "Which are the key elements of this picture?",
    "How is this picture composed?",
    "What mood does this picture convey, and what conveys it?",
    "How would you interpret this picture, going by what it shows?",
    "What draws the eye in this picture?",
)
"""Eight ways of asking for a description: details, summary, explanation, key elements, composition, mood, interpretation,
focal points."""

TEMPLATE = "Image description: {description}\n\n"
SLOT = "{description}"
_MARK = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?(?:s|bos|eos|pad|im|img|image|video|(?:start|end)_of_\w{1,20})>|\[/?INST\]", re.I
)
_TURN = re.compile(r"^[ \t]*(?:user|human|assistant)[ \t]*:[ \t]*", re.IGNORECASE | re.MULTILINE)


@dataclass
class DescriptionSampling(Sampling):
    """How descriptions are drawn: `Sampling` with the defaults of STIC's code."""

    max_new_tokens: int = 1024
    temperature: float = 0.2


@dataclass
class DescribeFirst:
    """Describe and respond: the model describes what it is shown, then answers with its description before the question.

    Attributes:
        prompts: ways of asking for a description; each row draws one.
        template: what is put before the question, with `{description}` once.
        sampling: how descriptions are drawn.
    """

    prompts: list[str] = field(default_factory=lambda: list(NEUTRAL_PROMPTS))
    template: str = TEMPLATE
    sampling: DescriptionSampling = field(default_factory=DescriptionSampling)

    def __post_init__(self) -> None:
        check_prompts("prompts", self.prompts)
        check_template(self.template)


def check_prompts(name: str, prompts: Sequence[str]) -> None:
    """Raise `ValueError` unless there is a prompt to draw and none of them is blank."""
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(
            f"{name} is {list(prompts)!r}: a row draws one of them, and a blank one asks nothing. Give at least one prompt and "
            "no blank one, or leave the setting out."
        )


def check_template(template: str) -> None:
    """Raise `ValueError` unless a template has exactly one place for the description."""
    if template.count(SLOT) != 1:
        raise ValueError(
            f"template {template!r} holds {SLOT} {template.count(SLOT)} times, so the description would be lost or doubled. "
            f"Write it once, as in {TEMPLATE!r}."
        )


def drawn_prompt(prompts: Sequence[str], seed: int, row: str) -> str:
    """The prompt that a row is described under, drawn evenly from `prompts` by the seed and the row's id."""
    return random.Random(row_seed(seed, f"{row}/description prompt")).choice(list(prompts))


def describe(
    engine: Engine,
    rows: Sequence[tuple[str, list[Image.Image]]],
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    seed: int,
) -> list[Completion]:
    """Descriptions of the pictures of rows, all asked for in one call.

    Args:
        engine: generator.
        rows: id and decoded pictures of each row; several pictures are described together.
        prompts: ways of asking; `drawn_prompt` tells which one a row got.
        sampling: how descriptions are drawn.
        seed: seed of the stage; with a row's id it decides prompt and draw.

    Returns:
        One completion per row, in order, its text cleaned of chat marks and image placeholders (`cleaned`).
    """
    requests = [
        Request(f"{row}/description", [user_message(drawn_prompt(prompts, seed, row), len(images))], images, seed=seed)
        for row, images in rows
    ]
    return clean_completions(engine, engine.generate(requests, sampling) if requests else [])


def with_description(messages: Sequence[Message], description: str, template: str = TEMPLATE) -> list[Message]:
    """A conversation with a description of its pictures after their placeholders and before the instruction.

    It goes into the first user turn that shows a picture, joined to that turn's first text (some chat templates trim text blocks,
    which would glue it to the question). Placeholders that close the turn come to its front, where LLaVA's loader puts them;
    in a turn that mixes pictures and words the description comes first and nothing moves.

    Args:
        messages: conversation with placeholders; left as it is.
        description: the description; nothing is put in for a blank one.
        template: what is put in, with `{description}` once.

    Raises:
        ValueError: for a template without the place for the description, or with two.
    """
    check_template(template)
    if not description.strip():
        return list(messages)
    before, after = template.split(SLOT)
    block = before + description.strip() + after
    result = list(messages)
    for number, message in enumerate(messages):
        kinds = [part["type"] for part in message["content"]]
        if message["role"] == "user" and "image" in kinds:
            result[number] = {**message, "content": _infused(message["content"], kinds, block)}
            break
    return result


def _infused(content: list[dict[str, Any]], kinds: list[str], block: str) -> list[dict[str, Any]]:
    mixed = kinds not in (sorted(kinds), sorted(kinds, reverse=True))
    pictures = [] if mixed else [part for part in content if part["type"] == "image"]
    rest = [part for part in content if mixed or part["type"] == "text"]
    if rest and rest[0]["type"] == "text":
        return [*pictures, {"type": "text", "text": block + rest[0]["text"].lstrip("\n")}, *rest[1:]]
    return [*pictures, {"type": "text", "text": block}, *rest]


def clean_completions(engine: Engine, completions: Sequence[Completion]) -> list[Completion]:
    """Completions with their text `cleaned`, of the engine's own marks too."""
    marks = marks_of(engine)
    return [replace(completion, text=cleaned(completion.text, marks)) for completion in completions]


def cleaned(text: str, marks: Sequence[str] = ()) -> str:
    """A generated text without what a model reads as a place for a picture or as a change of turn.

    Marks go wherever they stand, and again as long as taking one out makes another. A label such as `ASSISTANT:` that opens the
    text goes; one that opens a later line ends the text, since what follows is no longer this answer.

    Args:
        text: what a model wrote.
        marks: marks of the model at hand (`marks_of`), besides those of the common families.
    """
    before = None
    while text != before:
        before = text
        for mark in marks:
            text = text.replace(mark, "")
        text = _MARK.sub("", text)
    text = text.strip()
    opening = _TURN.match(text)
    text = text[opening.end() :] if opening else text
    later = _TURN.search(text)
    return (text[: later.start()] if later else text).strip()


def marks_of(engine: Engine) -> list[str]:
    """Image marks and special tokens of an engine's model, longest first; none where the engine does not hold its processor."""
    processor, config = getattr(engine, "processor", None), getattr(engine, "config", None)
    if processor is None or config is None:
        return []
    found = {*families.visual_tokens(processor, config), *processor.tokenizer.all_special_tokens}
    return sorted(filter(None, found), key=lambda mark: (-len(mark), mark))
