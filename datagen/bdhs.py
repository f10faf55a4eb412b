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
from typing import Any

from prefalign import records, store
from prefalign.engines import Engine, Sampling
from prefalign.guided import BiasConfig, Corrupted, Item, corrupted_answers, rejection
from prefalign.images import ImageError, open_image
from prefalign.models import ModelConfig
from prefalign.records import Pair, Prompt
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Manifest, Outcome, OutputConfig
from prefalign.text import Similarity, load_similarity

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

    model: ModelConfig
    data: DataConfig
    output: OutputConfig
    bias: BiasConfig = field(default_factory=BiasConfig)
    similarity: str = "lexical"
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 16
    seed: int = 0


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.engines.transformers import load_engine

    similarity = load_similarity(config.similarity)
    engine = load_engine(config.model, batch_size=config.batch_size)
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
    items: dict[int, Item] = {}
    outcomes: dict[int, Outcome] = {}
    for index, prompt in enumerate(block):
        found = _item(prompt)
        if isinstance(found, Item):
            items[index] = found
        else:
            outcomes[index] = found
    answers = corrupted_answers(
        engine, list(items.values()), config.bias, config.sampling, similarity, seed=config.seed
    )
    for (index, item), answer in zip(items.items(), answers, strict=True):
        reason = rejection(item, answer)
        if reason == "generation_failed":
            outcomes[index] = Failed(reason, str(answer.error))
        elif reason is not None:
            outcomes[index] = Dropped(reason)
        else:
            outcomes[index] = [_pair(block[index], answer, engine.fingerprint, config)]
    return [outcomes[index] for index in range(len(block))]


def _item(prompt: Prompt) -> Item | Dropped | Failed:
    """The prompt with decoded pictures, or why it cannot be used: no answer to corrupt, or no picture to hide."""
    if prompt.answer is None or not prompt.answer.strip():
        return Dropped("no_reference")
    if not prompt.images:
        return Dropped("no_picture")
    try:
        images = [open_image(image) for image in prompt.images]
    except ImageError as error:
        return Failed(error.reason, str(error))
    return Item(prompt.id, prompt.messages, images, prompt.answer)


def _pair(prompt: Prompt, answer: Corrupted, generator: str, config: Config) -> Pair:
    assert prompt.answer is not None
    settings = row_settings(config)
    masked = config.bias.variant == "attention"
    meta = {
        "parent": prompt.id,
        "generator": generator,
        "seed": config.seed,
        "settings": settings,
        "images_sha256": store.provenance(prompt.images),
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
    return Pair(
        id=records.record_id(method=METHOD, parent=prompt.id, settings=settings, model=generator, seed=config.seed),
        images=prompt.images,
        prompt=prompt.messages,
        chosen=[records.assistant_message(prompt.answer)],
        rejected=[records.assistant_message(answer.text)],
        method=METHOD,
        answer=prompt.answer,
        facts=prompt.facts,
        meta=meta,
    )


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
