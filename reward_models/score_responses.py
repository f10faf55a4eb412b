"""Score responses: what rewards say of stored answers, every term by name on each answer.

Rewards are a weighted list (`prefalign.rewards.REWARDS`): a learned reward model, a judge, object lists, rules, a function of
yours. They are given the pictures, the conversation, the reference and the facts of a row. A score that a reward cannot give
(facts that are missing, a judge's reply that cannot be parsed) is null, never a default, and so is a total in which it would
count; `scores.json` counts both.

Scores of an earlier run stay under their names; `total` is that of this run.

Needs: candidates (`datagen/sample_responses.py`, or any rows with a list `responses`), or pairs, of which it makes candidates.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
    from prefalign.rewards import read_rewards

    sources.files_of(config.data)
    rewards = read_rewards(config.rewards)
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
    found = stages.write_figures(folder, FIGURES, lambda: figures(folder))
    total = found["scores"]["total"]
    print(
        f"{METHOD}: {found['responses']} responses, total {total['mean']} on average, missing for {total['missing']}; "
        f"correlation with length in words {found['length_correlation']}",
        file=sys.stderr,
    )
    return manifest


def process(block: Sequence[Any], rewards: Combined) -> list[Outcome]:
    """One outcome for each row of a block; all its responses are scored in one call, unless the facts of a row are bad."""
    from prefalign.rewards import FactsError, Response

    def prepare(row: Candidates | Pair) -> tuple[Candidates, list[Image.Image]] | Dropped | Failed:
        found = candidates_of(row) if isinstance(row, Pair) else row
        if isinstance(found, Dropped):
            return found
        if not found.responses:
            return Dropped("no_response")
        images = stages.opened(found.images)
        return images if isinstance(images, Failed) else (found, images)

    def work(rows: list[tuple[Any, tuple[Candidates, list[Image.Image]]]]) -> list[Outcome]:
        responses = [
            Response(
                id=f"{row.id}/{number}",
                images=images,
                messages=row.messages,
                text=response["text"],
                answer=row.answer,
                facts=row.facts,
                finished=response.get("finish_reason") != "length",
                tokens=response.get("tokens"),
            )
            for _, (row, images) in rows
            for number, response in enumerate(row.responses)
        ]
        try:
            scored = rewards.score(responses)
        except FactsError as error:  # of one row: each by itself
            return [Failed("bad_facts", str(error))] if len(rows) == 1 else [work([one])[0] for one in rows]
        terms = {name: values.tolist() for name, values in scored.items()}
        scores = iter(
            {name: _number(values[place]) for name, values in terms.items()} for place in range(len(responses))
        )
        return [[_scored(row, [next(scores) for _ in row.responses])] for _, (row, _) in rows]

    return stages.in_order(block, prepare, work)


def candidates_of(pair: Pair) -> Candidates | Dropped:
    """A pair's two answers as candidates, both on the pair's picture; a pair of pictures with one text has nothing to compare."""
    chosen, rejected = message_text(pair.chosen), message_text(pair.rejected)
    if same_answer(chosen, rejected):
        return Dropped("one_text")
    responses = [{"text": chosen, "from": "chosen"}, {"text": rejected, "from": "rejected"}]
    return Candidates(pair.id, pair.images, pair.prompt, responses, pair.answer, pair.facts)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _scored(row: Candidates, scores: list[dict[str, float | None]]) -> Candidates:
    responses = [
        {**response, "scores": {**(response.get("scores") or {}), **given}}
        for response, given in zip(row.responses, scores, strict=True)
    ]
    return dataclasses.replace(row, responses=responses)


def figures(folder: Path) -> dict[str, Any]:
    """By score: how many are missing, mean, deviation, range; and how the total goes with the length of the answer.

    A correlation with length near 1 is a reward that pays for words; what is trained on it will talk.
    """
    values: dict[str, list[float | None]] = {}
    words: list[int] = []
    for row in stages.columns_of(folder, "responses"):
        for response in row["responses"]:
            words.append(len(response["text"].split()))
            for name, value in response["scores"].items():
                values.setdefault(name, []).append(value)
    totals = [(value, length) for value, length in zip(values["total"], words, strict=True) if value is not None]
    return {
        "responses": len(words),
        "scores": {name: _figures(given) for name, given in sorted(values.items())},
        "length_correlation": _correlation(totals),
    }


def _figures(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {"missing": len(values), "mean": None, "deviation": None, "least": None, "most": None}
    return {
        "missing": len(values) - len(known),
        "mean": round(statistics.fmean(known), 4),
        "deviation": round(statistics.pstdev(known), 4),
        "least": round(min(known), 4),
        "most": round(max(known), 4),
    }


def _correlation(pairs: Sequence[tuple[float, int]]) -> float | None:
    if len({value for value, _ in pairs}) < 2 or len({length for _, length in pairs}) < 2:
        return None
    return round(statistics.correlation([value for value, _ in pairs], [length for _, length in pairs]), 4)


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
