"""Sample responses: several answers of a model to every prompt, with all that is known of how each was drawn.

What best-of-n, pairs by score, SteerLM rows and the rounds of online DPO begin with: score the answers next
(`reward_models/score_responses.py`), then choose among them (`datagen/select_responses.py`).

Settings as published with arXiv 2402.10884 (its sampling script): four answers at temperature 1.2, at most 1024 tokens each.

Needs: rows with questions (rows without a picture are sampled too, where the model takes text alone); a generator that samples.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefalign import records, sources, stages, store
from prefalign.engines import Completion, Engine, Request, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.manifest import Manifest
from prefalign.records import Candidates, Prompt
from prefalign.sources import DataConfig
from prefalign.store import Failed, Outcome, OutputConfig

if TYPE_CHECKING:
    from PIL import Image

METHOD = "sample_responses"


@dataclass
class ResponseSampling(Sampling):
    """How answers are drawn: `Sampling` with the published temperature and length."""

    max_new_tokens: int = 1024
    temperature: float = 1.2


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        model: the generator, normally the model that will be trained.
        data: rows with questions.
        output: folder of candidates.
        num_generations: answers to each prompt.
        sampling: how they are drawn.
        batch_size: sequences per forward pass.
        seed: with a row's id and an answer's number it decides the draw.
    """

    model: EngineConfig
    data: DataConfig
    output: OutputConfig
    num_generations: int = 4
    sampling: ResponseSampling = field(default_factory=ResponseSampling)
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_generations < 1:
            raise ValueError(f"num_generations is {self.num_generations}; give 1 or more (4, as published).")
        if self.num_generations > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"sampling.temperature is 0, so all {self.num_generations} answers to a prompt would be the same greedy one. "
                "Raise the temperature (1.2, as published), or set num_generations to 1."
            )


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.engines.loading import load_engine

    sources.files_of(config.data)
    engine = load_engine(config.model, batch_size=config.batch_size)
    return store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, engine, config),
        output=config.output,
        record=Candidates,
        settings=row_settings(config),
        seed=config.seed,
        models={"generator": engine.fingerprint},
    )


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows."""
    return {"num_generations": config.num_generations, "sampling": dataclasses.asdict(config.sampling)}


def process(block: list[Prompt], engine: Engine, config: Config) -> list[Outcome]:
    """One outcome for each prompt of a block; all answers to all prompts are drawn in one call.

    Each answer's noise comes from its own id, so answer 2 is the same whether 4 or 8 are drawn; the engine prefills a prompt
    once for all of them.
    """
    count = config.num_generations

    def work(rows: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        requests = [
            Request(f"{prompt.id}/{number}", prompt.messages, images, seed=config.seed)
            for prompt, images in rows
            for number in range(count)
        ]
        said = engine.generate(requests, config.sampling)
        return [
            _outcome(prompt, said[place * count : (place + 1) * count], engine.fingerprint, config)
            for place, (prompt, _) in enumerate(rows)
        ]

    return stages.in_order(block, lambda prompt: stages.opened(prompt.images), work)


def _outcome(prompt: Prompt, said: list[Completion], generator: str, config: Config) -> Outcome:
    error = next((completion.error for completion in said if completion.error is not None), None)
    if error is not None:
        return Failed("generation_failed", error)
    settings = row_settings(config)
    name = records.record_id(method=METHOD, parent=prompt.id, settings=settings, model=generator, seed=config.seed)
    responses = [
        {
            "index": number,
            "parent": prompt.id,
            "text": completion.text.strip(),
            "token_ids": completion.token_ids,
            "tokens": len(completion.token_ids) + (completion.finish_reason == "stop"),
            "finish_reason": completion.finish_reason,
            "settings": {**settings["sampling"], "seed": config.seed},
            "generator": generator,
        }
        for number, completion in enumerate(said)
    ]
    return [Candidates(name, prompt.images, prompt.messages, responses, prompt.answer, prompt.facts)]


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
