"""Drawing several answers to a prompt, or whole conversations, with all that is known of how each was drawn.

For `datagen/sample_responses.py`, and `datagen/quality_pairs.py`, which grades them in the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefalign import records
from prefalign.engines import Completion, Engine, Request, Sampling
from prefalign.pairing import AskedAttributes
from prefalign.records import Candidates, Message, Prompt, assistant_message, user_message
from prefalign.store import Failed

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class ResponseSampling(Sampling):
    """How answers are drawn: `Sampling` with the temperature and length of arXiv 2402.10884's sampling script."""

    max_new_tokens: int = 1024
    temperature: float = 1.2


def check_count(num_generations: int, sampling: Sampling) -> None:
    """Raise `ValueError` if so many answers cannot be drawn, or would all be the same."""
    if num_generations < 1:
        raise ValueError(f"num_generations is {num_generations}; give 1 or more.")
    if num_generations > 1 and sampling.temperature == 0:
        raise ValueError(
            f"sampling.temperature is 0, so all {num_generations} answers to a prompt would be the same greedy one. "
            "Raise the temperature, or set num_generations to 1."
        )


def row_settings(
    num_generations: int, sampling: Sampling, *, conversations: bool = False, attributes: AskedAttributes | None = None
) -> dict[str, Any]:
    """The settings of drawing that change rows."""
    known: dict[str, Any] = {"num_generations": num_generations, "sampling": dataclasses.asdict(sampling)}
    if conversations:
        known["conversations"] = True
    return known if attributes is None else {**known, "attributes": dataclasses.asdict(attributes)}


def draw(
    rows: Sequence[tuple[Prompt, list[Image.Image]]],
    engine: Engine,
    sampling: Sampling,
    *,
    num_generations: int,
    method: str,
    seed: int,
    attributes: AskedAttributes | None = None,
) -> list[Candidates | Failed]:
    """Candidates for each prompt; all answers to all prompts are drawn in one call.

    Each answer's noise comes from its own id, so answer 2 is the same whether 4 or 8 are drawn; the engine prefills a prompt
    once for all of them.

    Args:
        rows: prompts with their decoded pictures.
        engine: the generator.
        sampling: how answers are drawn.
        num_generations: answers to each prompt.
        method: name of the stage, part of the rows' ids.
        seed: seed of the stage.
        attributes: what a model trained on SteerLM rows is asked for. The candidates keep the plain question; an answer out of
            which a leaked line was taken has what the model wrote as `unstripped`, which its `token_ids` spell.

    Returns:
        One entry for each row, in order; `Failed` where an answer could not be generated.
    """
    requests = [
        Request(f"{prompt.id}/{number}", _asked(prompt.messages, attributes), images, seed=seed)
        for prompt, images in rows
        for number in range(num_generations)
    ]
    said = engine.generate(requests, sampling)
    settings = row_settings(num_generations, sampling, attributes=attributes)
    return [
        _candidates(prompt, said[place * num_generations : (place + 1) * num_generations], engine.fingerprint, settings,
                    method=method, seed=seed, attributes=attributes)
        for place, (prompt, _) in enumerate(rows)
    ]  # fmt: skip


def questions_of(facts: Mapping[str, Any]) -> list[str]:
    """The linked questions that a row asks one after the other (`facts["rules"]["questions"]`); none if it has no such."""
    rules = facts.get("rules") or {}
    return [str(question) for question in rules.get("questions") or []]


def history(messages: Sequence[Message], questions: Sequence[str], earlier: Sequence[str]) -> list[Message]:
    """A conversation up to the question after these answers.

    Args:
        messages: up to and including the first question.
        questions: all of them.
        earlier: answers to the first of them.
    """
    said = list(messages)
    for answer, question in zip(earlier, questions[1:], strict=False):
        said += [assistant_message(answer), user_message(question)]
    return said


def converse(
    rows: Sequence[tuple[Prompt, list[Image.Image]]],
    engine: Engine,
    sampling: Sampling,
    *,
    num_generations: int,
    method: str,
    seed: int,
    attributes: AskedAttributes | None = None,
) -> list[Candidates | Failed]:
    """Like `draw`, but all questions of a row are asked one after the other, each answer in view of those before it.

    Args are those of `draw`; every row has `questions_of` its facts. A response's `text` answers the last question, `earlier` are
    the answers before it; its `tokens` are those of all, and its `finish_reason` is `length` if one of them was cut off.
    `attributes` are asked for with each question, and earlier answers are shown again without what leaked into them.
    """
    asked = [questions_of(prompt.facts) for prompt, _ in rows]
    courses: list[list[Completion]] = [[] for _ in rows for _ in range(num_generations)]
    for turn in range(max(map(len, asked))):
        open_ones = [
            number
            for number, said in enumerate(courses)
            if turn < len(asked[number // num_generations]) and all(one.error is None for one in said)
        ]
        requests = []
        for number in open_ones:
            place, generation = divmod(number, num_generations)
            prompt, images = rows[place]
            identity = f"{prompt.id}/{generation}" + (f"/{turn}" if turn else "")
            messages = history(prompt.messages, asked[place], [_text(one, attributes) for one in courses[number]])
            requests.append(Request(identity, _asked(messages, attributes), images, seed=seed))
        for number, completion in zip(open_ones, engine.generate(requests, sampling), strict=True):
            courses[number].append(completion)
    settings = row_settings(num_generations, sampling, conversations=True, attributes=attributes)
    return [
        _conversation(prompt, courses[place * num_generations : (place + 1) * num_generations], engine.fingerprint, settings,
                      method=method, seed=seed, attributes=attributes)
        for place, (prompt, _) in enumerate(rows)
    ]  # fmt: skip


def _asked(messages: list[Message], attributes: AskedAttributes | None) -> list[Message]:
    return messages if attributes is None else attributes.asked(messages)


def _text(said: Completion, attributes: AskedAttributes | None) -> str:
    return said.text.strip() if attributes is None else attributes.stripped(said.text.strip())


def stripped_counts(responses: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many answers there are, and how many lost a leaked attribute line (in a conversation: in any turn of it)."""
    counts = {"answers": 0, "attributes_stripped": 0}
    for response in responses:
        counts["answers"] += 1
        counts["attributes_stripped"] += "unstripped" in response
    return counts


def _conversation(
    prompt: Prompt,
    courses: list[list[Completion]],
    generator: str,
    settings: dict[str, Any],
    *,
    method: str,
    seed: int,
    attributes: AskedAttributes | None,
) -> Candidates | Failed:
    last = [course[-1] for course in courses]
    found = _candidates(prompt, last, generator, settings, method=method, seed=seed, attributes=attributes)
    if isinstance(found, Failed):
        return found
    for response, course in zip(found.responses, courses, strict=True):
        response["earlier"] = [_text(one, attributes) for one in course[:-1]]
        if any(_text(one, attributes) != one.text.strip() for one in course[:-1]):
            response["unstripped"] = course[-1].text.strip()
            response["unstripped_earlier"] = [one.text.strip() for one in course[:-1]]
        response["tokens"] = sum(one.length + (one.finish_reason == "stop") for one in course)
        if any(one.finish_reason == "length" for one in course):
            response["finish_reason"] = "length"
    return found


def _candidates(
    prompt: Prompt,
    said: list[Completion],
    generator: str,
    settings: dict[str, Any],
    *,
    method: str,
    seed: int,
    attributes: AskedAttributes | None,
) -> Candidates | Failed:
    error = next((completion.error for completion in said if completion.error is not None), None)
    if error is not None:
        return Failed("generation_failed", error)
    name = records.record_id(method=method, parent=prompt.id, settings=settings, model=generator, seed=seed)
    responses: list[dict[str, Any]] = [
        {
            "index": number,
            "parent": prompt.id,
            "text": _text(completion, attributes),
            "token_ids": completion.token_ids,
            "tokens": completion.length + (completion.finish_reason == "stop"),
            "finish_reason": completion.finish_reason,
            "settings": {**settings["sampling"], "seed": seed},
            "generator": generator,
        }
        for number, completion in enumerate(said)
    ]
    for response, completion in zip(responses, said, strict=True):
        if response["text"] != completion.text.strip():
            response["unstripped"] = completion.text.strip()
    return Candidates(name, prompt.images, prompt.messages, responses, prompt.answer, prompt.facts)
