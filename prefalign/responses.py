"""Drawing several answers to a prompt, with all that is known of how each was drawn.

For `datagen/sample_responses.py`, and `datagen/quality_pairs.py`, which grades them in the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefalign import records
from prefalign.engines import Completion, Engine, Request, Sampling
from prefalign.records import Candidates, Prompt
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
        raise ValueError(f"num_generations is {num_generations}; give 1 or more (4, as published).")
    if num_generations > 1 and sampling.temperature == 0:
        raise ValueError(
            f"sampling.temperature is 0, so all {num_generations} answers to a prompt would be the same greedy one. "
            "Raise the temperature (1.2, as published), or set num_generations to 1."
        )


def row_settings(num_generations: int, sampling: Sampling) -> dict[str, Any]:
    """The settings of drawing that change rows."""
    return {"num_generations": num_generations, "sampling": dataclasses.asdict(sampling)}


def draw(
    rows: Sequence[tuple[Prompt, list[Image.Image]]],
    engine: Engine,
    sampling: Sampling,
    *,
    num_generations: int,
    method: str,
    seed: int,
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

    Returns:
        One entry for each row, in order; `Failed` where an answer could not be generated.
    """
    requests = [
        Request(f"{prompt.id}/{number}", prompt.messages, images, seed=seed)
        for prompt, images in rows
        for number in range(num_generations)
    ]
    said = engine.generate(requests, sampling)
    settings = row_settings(num_generations, sampling)
    return [
        _candidates(prompt, said[place * num_generations : (place + 1) * num_generations], engine.fingerprint, settings,
                    method=method, seed=seed)
        for place, (prompt, _) in enumerate(rows)
    ]  # fmt: skip


def _candidates(
    prompt: Prompt, said: list[Completion], generator: str, settings: dict[str, Any], *, method: str, seed: int
) -> Candidates | Failed:
    error = next((completion.error for completion in said if completion.error is not None), None)
    if error is not None:
        return Failed("generation_failed", error)
    name = records.record_id(method=method, parent=prompt.id, settings=settings, model=generator, seed=seed)
    responses = [
        {
            "index": number,
            "parent": prompt.id,
            "text": completion.text.strip(),
            "token_ids": completion.token_ids,
            "tokens": len(completion.token_ids) + (completion.finish_reason == "stop"),
            "finish_reason": completion.finish_reason,
            "settings": {**settings["sampling"], "seed": seed},
            "generator": generator,
        }
        for number, completion in enumerate(said)
    ]
    return Candidates(name, prompt.images, prompt.messages, responses, prompt.answer, prompt.facts)
