"""BDHS: pairs whose rejected answer the model makes up itself, with its eyes nearly closed.

Chosen is the reference answer of a row; rejected is what the generator says when most image tokens are hidden (or the
picture is noised) while every sentence is begun as in the reference. Both are conditioned on the clean picture.

Paper: Amirloo, Fauconnier, Roesmann, Kerl, Boney et al., "Understanding Alignment in Multimodal LLMs", arXiv 2407.02477,
section 3.4, algorithm 1. The authors released no code.

Needs: rows with pictures and reference answers; a generator that can hide image tokens (the transformers engine).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefalign import sources, stages, store
from prefalign.engines import Engine, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.guided import BiasConfig, Corrupted, Item, corrupted_answers, needs, rejection
from prefalign.manifest import Manifest
from prefalign.records import Pair, Prompt
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import Similarity, load_similarity

if TYPE_CHECKING:
    from PIL import Image

METHOD = "bdhs"


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        model: the generator, normally the model that will be trained.
        data: rows with pictures and reference answers.
        output: folder of pairs.
        bias: how the picture is hidden and answers accepted.
        similarity: `lexical`, or a sentence-transformers model such as `all-mpnet-base-v2`.
        sampling: how completions are drawn; `max_new_tokens` bounds a sentence when guided, the answer when not.
        batch_size: sequences per forward pass.
        seed: with a row's id it decides masks, split points, swaps and completions.
    """

    model: EngineConfig
    data: DataConfig
    output: OutputConfig
    bias: BiasConfig = field(default_factory=BiasConfig)
    similarity: str = "lexical"
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 16
    seed: int = 0


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.engines.loading import load_engine

    sources.files_of(config.data)
    similarity = load_similarity(config.similarity)
    engine = load_engine(config.model, batch_size=config.batch_size, needs=needs(config.bias), stage=METHOD)
    return store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, engine, similarity, config),
        output=config.output,
        record=Pair,
        settings=row_settings(config),
        seed=config.seed,
        models={"generator": engine.fingerprint},
    )


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows."""
    return {
        **dataclasses.asdict(config.bias),
        "similarity": config.similarity,
        "sampling": dataclasses.asdict(config.sampling),
    }


def process(block: list[Prompt], engine: Engine, similarity: Similarity, config: Config) -> list[Outcome]:
    """One outcome for each prompt of a block; all sentences of all prompts are drawn together."""

    def work(rows: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        items = [Item(prompt.id, prompt.messages, images, str(prompt.answer)) for prompt, images in rows]
        answers = corrupted_answers(engine, items, config.bias, config.sampling, similarity, seed=config.seed)
        return [
            _outcome(prompt, item, answer, engine.fingerprint, config)
            for (prompt, _), item, answer in zip(rows, items, answers, strict=True)
        ]

    return stages.in_order(block, stages.usable, work)


def _outcome(prompt: Prompt, item: Item, answer: Corrupted, generator: str, config: Config) -> Outcome:
    reason = rejection(item, answer)
    if reason == "generation_failed":
        return Failed(reason, str(answer.error))
    if reason is not None:
        return Dropped(reason)
    masked = config.bias.variant == "attention"
    meta = {
        "variant": config.bias.variant,
        "rho_th": config.bias.rho_th if masked else None,
        "noise_step": None if masked else config.bias.noise_step,
        "mask_seed" if masked else "noise_seed": answer.picture_seed,
        "guided": answer.guided,
        "iteration_accepted": answer.iteration,
        "similarity": round(answer.similarity, 6),
        "split_points": answer.split_points,
        "yesno_swapped": answer.yesno_swapped,
        "online": False,
    }
    return [
        stages.make_pair(prompt, method=METHOD, chosen=item.answer, rejected=answer.text, settings=row_settings(config),
                         seed=config.seed, model=generator, meta=meta)
    ]  # fmt: skip


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
