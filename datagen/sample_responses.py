"""Sample responses: several answers of a model to every prompt, with all that is known of how each was drawn.

What best-of-n, pairs by score, SteerLM rows and the rounds of online DPO begin with: score the answers next
(`reward_models/score_responses.py`), then choose among them (`datagen/select_responses.py`).

Settings as published with arXiv 2402.10884 (its sampling script): four answers at temperature 1.2, at most 1024 tokens each.

Needs: rows with questions (rows without a picture are sampled too, where the model takes text alone); a generator that samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefalign import responses, sources, stages, store
from prefalign.engines import Engine
from prefalign.engines.config import EngineConfig
from prefalign.manifest import Manifest
from prefalign.pairing import AskedAttributes
from prefalign.records import Candidates, Prompt
from prefalign.responses import ResponseSampling
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig

if TYPE_CHECKING:
    from PIL import Image

METHOD = "sample_responses"
FIGURES = "attributes.json"


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        model: the generator, normally the model that will be trained.
        data: rows with questions.
        output: folder of candidates.
        num_generations: answers to each prompt.
        sampling: how they are drawn.
        conversations: ask all linked questions of a row one after the other (`facts.rules.questions`), for rules that judge whole
            conversations; a response's `earlier` are then the answers before its `text`.
        attributes: what a model trained on SteerLM rows is asked for, and whether lines that leak into its answers are taken
            out; `attributes.json` then counts them. null: the question as it is.
        batch_size: sequences per forward pass.
        seed: with a row's id and an answer's number it decides the draw.
    """

    model: EngineConfig
    data: DataConfig
    output: OutputConfig
    num_generations: int = 4
    sampling: ResponseSampling = field(default_factory=ResponseSampling)
    conversations: bool = False
    attributes: AskedAttributes | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        responses.check_count(self.num_generations, self.sampling)


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.engines.loading import load_engine

    sources.files_of(config.data)
    engine = load_engine(config.model, batch_size=config.batch_size)
    manifest = store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, engine, config),
        output=config.output,
        record=Candidates,
        settings=responses.row_settings(
            config.num_generations, config.sampling, conversations=config.conversations, attributes=config.attributes
        ),
        seed=config.seed,
        models={"generator": engine.fingerprint},
    )
    if config.attributes is not None and config.attributes.strip:
        folder = config.output.path
        drawn = (response for row in stages.columns_of(folder, "responses") for response in row["responses"])
        found = stages.write_figures(folder, FIGURES, lambda: responses.stripped_counts(drawn))
        stages.say(
            f"{METHOD}: attribute lines were taken out of {found['attributes_stripped']} of {found['answers']} answers"
        )
    return manifest


def process(block: list[Prompt], engine: Engine, config: Config) -> list[Outcome]:
    """One outcome for each prompt of a block; all answers to all prompts are drawn in one call, or in one for each question."""
    draw = responses.converse if config.conversations else responses.draw

    def prepare(prompt: Prompt) -> list[Image.Image] | Dropped | Failed:
        if config.conversations and not responses.questions_of(prompt.facts):
            return Dropped("no_questions")
        return stages.opened(prompt.images)

    def work(rows: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        drawn = draw(rows, engine, config.sampling, num_generations=config.num_generations, method=METHOD,
                     seed=config.seed, attributes=config.attributes)  # fmt: skip
        return [row if isinstance(row, Failed) else [row] for row in drawn]

    return stages.in_order(block, prepare, work)


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
