"""Score responses: what rewards say of stored answers, every term by name on each answer.

Rewards are a weighted list (`prefalign.rewards.REWARDS`): a learned reward model, a judge, object lists, rules, a function of
yours. They are given the pictures, the conversation, the reference and the facts of a row. A score that a reward cannot give
(facts that are missing, a judge's reply that cannot be parsed) is null, never a default, and so is a total in which it would
count; `scores.json` counts both. A row about which a judge did not reply at all (its server failed) is quarantined as
`judge_failed`: a run into another folder asks again, and with the judge's `cache` for nothing else.

Scores of an earlier run stay under their names; `total` is that of this run.

Needs: candidates (`datagen/sample_responses.py`, or any rows with a list `responses`), or pairs, of which it makes candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prefalign import sources, stages, store
from prefalign.manifest import Manifest
from prefalign.records import Candidates, Pair, message_text
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import same_answer

if TYPE_CHECKING:
    from PIL import Image

    from prefalign.rewards import Combined

METHOD = "score_responses"
FIGURES = "scores.json"


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: candidates or pairs.
        output: folder of candidates.
        rewards: the weighted list, as `prefalign.rewards.read_rewards` takes it.
        reads: what the rows are. A pair becomes candidates with two responses, `from` being `chosen` or `rejected`.
    """

    data: DataConfig
    output: OutputConfig
    rewards: list[dict[str, Any]]
    reads: Literal["candidates", "pairs"] = "candidates"


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.rewards import read_rewards, stored

    sources.files_of(config.data)
    rewards = read_rewards(config.rewards)
    rewards.check()
    manifest = store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, rewards),
        output=config.output,
        record=Candidates,
        settings={"rewards": stages.portable(config.rewards), "reads": config.reads},
        seed=0,
        models=rewards.versions(),
        reads=Pair if config.reads == "pairs" else Candidates,
    )
    folder = config.output.path
    found = stages.write_figures(folder, FIGURES, lambda: stored.figures(folder, rewards))
    total = found["scores"]["total"]
    stages.say(
        f"{METHOD}: {found['responses']} responses, total {total['mean']} on average, missing for {total['missing']}; "
        f"correlation with length in words {found['length_correlation']}"
    )
    return manifest


def process(block: Sequence[Any], rewards: Combined) -> list[Outcome]:
    """One outcome for each row of a block; all its responses are scored in one call, unless the facts of a row are bad."""
    from prefalign.rewards import stored

    def prepare(row: Candidates | Pair) -> tuple[Candidates, list[Image.Image]] | Dropped | Failed:
        found = candidates_of(row) if isinstance(row, Pair) else row
        if isinstance(found, Dropped):
            return found
        if not found.responses:
            return Dropped("no_response")
        images = stages.opened(found.images)
        return images if isinstance(images, Failed) else (found, images)

    def work(rows: list[tuple[Any, tuple[Candidates, list[Image.Image]]]]) -> list[Outcome]:
        scored = stored.score_rows([ready for _, ready in rows], rewards)
        return [row if isinstance(row, Failed) else [row] for row in scored]

    return stages.in_order(block, prepare, work)


def candidates_of(pair: Pair) -> Candidates | Dropped:
    """A pair's two answers as candidates, both on the pair's picture; a pair of pictures has nothing to compare there."""
    if pair.on_two_pictures:
        return Dropped("two_pictures")
    chosen, rejected = message_text(pair.chosen), message_text(pair.rejected)
    if same_answer(chosen, rejected):
        return Dropped("one_text")
    responses = [{"text": chosen, "from": "chosen"}, {"text": rejected, "from": "rejected"}]
    return Candidates(pair.id, pair.images, pair.prompt, responses, pair.answer, pair.facts)


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
