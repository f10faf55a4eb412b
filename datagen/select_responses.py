"""Select responses: from scored answers to a training set: pairs, best of n, SteerLM rows, or all comparisons.

- `pairs`: the best answer against one that is worse by a gap (DPO).
- `best`: the best answer of each prompt (rejection sampling, for SFT).
- `steerlm`: every answer, its attributes written into the prompt (SFT); at inference ask for the values that are wanted.
- `ranked`: every two answers that differ by the gap (for reward models).

Source: Li, Lin and Pei, "Multi-modal Preference Alignment Remedies Regression of Visual Instruction Tuning on Language Model",
arXiv 2402.10884, its released data notebook. Not in the release: empty, unfinished and repeated answers are in no pair, nor are
two that nearly agree (after the online rounds of arXiv 2407.02477).

Needs: candidates with scores (`reward_models/score_responses.py`); no model.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefalign import pairing, records, sources, stages, store
from prefalign.images import sha256
from prefalign.manifest import Manifest
from prefalign.pairing import Choice
from prefalign.records import Candidates, Example, Message, Pair, Prompt, row_seed
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Outcome, OutputConfig

METHOD = "select_responses"
FIGURES = "selection.json"


@dataclass
class PairsConfig:
    """Which answers make a pair.

    Attributes:
        min_gap: least difference of quality, above 0 (`ranked` too).
        rejected: `random` among the answers below the gap, `worst`, or `nearest` for hard pairs.
        per_prompt: most pairs of one prompt (not for `ranked`).
        group_size: answers of a prompt that must be graded; null: any two.
        max_similarity: edit similarity above which two answers are too alike to be a pair.
    """

    min_gap: float = 2.0
    rejected: pairing.Rejected = "random"
    per_prompt: int = 1
    group_size: int | None = 4
    max_similarity: float = 0.95

    def __post_init__(self) -> None:
        pairing.make_dpo_pairs([], random.Random(0), min_gap=self.min_gap, per_prompt=self.per_prompt)
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}, and a pair needs two graded answers. Give 2 or more, or null for any number."
            )
        if not 0 < self.max_similarity <= 1:
            raise ValueError(
                f"max_similarity is {self.max_similarity}; it is a share of characters above 0, and 1 drops no pair (0.95)."
            )


@dataclass
class BestConfig:
    """Which answers are imitated.

    Attributes:
        k: best answers of each prompt.
        min_quality: least quality; null: any.
    """

    k: int = 1
    min_quality: float | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}, so no answer would be kept. Give 1 for the best one.")


@dataclass
class SteerConfig:
    """How attributes are written into prompts.

    Attributes:
        attributes: names of the scores, in the order of the line.
        drop_prob: share of rows without their line, so that the model answers without one as well.
        decimals: digits of a value that are kept; 0 for integer grades.
        place: `user`: end of the user turn, as published; `system`: end of the system turn.
        two_turn: one row for each prompt: a drawn answer, its rating, the rating that is wanted, the best answer.
    """

    attributes: list[str] = field(default_factory=list)
    drop_prob: float = 0.1
    decimals: int = 0
    place: Literal["user", "system"] = "user"
    two_turn: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.drop_prob <= 1:
            raise ValueError(
                f"drop_prob is {self.drop_prob}; it is a share of rows, so give a value from 0 to 1 (0.1)."
            )


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: candidates with scores.
        output: folder of pairs or of examples.
        produce: what is made of them.
        quality: weight of each score in an answer's quality.
        pairs: which answers make a pair (`pairs`, `ranked`).
        best: which answers are imitated (`best`).
        steerlm: how attributes are written (`steerlm`).
        unfinished: use answers that ran into the length limit.
        seed: with a row's id it draws rejected answers and the rows without attributes.
    """

    data: DataConfig
    output: OutputConfig
    produce: Literal["pairs", "best", "steerlm", "ranked"] = "pairs"
    quality: dict[str, float] = field(default_factory=lambda: {"total": 1.0})
    pairs: PairsConfig = field(default_factory=PairsConfig)
    best: BestConfig = field(default_factory=BestConfig)
    steerlm: SteerConfig = field(default_factory=SteerConfig)
    unfinished: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not any(self.quality.values()):
            raise ValueError(
                "quality weighs no score, so all answers would be equally good. Name one, as in {total: 1}."
            )
        if self.produce == "steerlm" and not self.steerlm.attributes:
            raise ValueError(
                "steerlm.attributes is empty, so prompts would not say what is asked for. Name scores, such as "
                "[judge/helpfulness, judge/correctness]."
            )


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    sources.files_of(config.data)
    pairs = config.produce in ("pairs", "ranked")
    manifest = store.run_stage(
        METHOD,
        config.data,
        lambda block: [outcome(row, config) for row in block],
        output=config.output,
        record=Pair if pairs else Example,
        settings=row_settings(config),
        seed=config.seed,
        reads=Candidates,
    )
    folder = config.output.path
    found = stages.write_figures(folder, FIGURES, lambda: figures(folder, manifest))
    print(f"{METHOD}: " + ", ".join(f"{name} {value}" for name, value in found.items()), file=sys.stderr)
    return manifest


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows of what is produced."""
    known = dataclasses.asdict(config)
    section = {"pairs": "pairs", "ranked": "pairs", "best": "best", "steerlm": "steerlm"}[config.produce]
    shared = {name: known[name] for name in ("produce", "quality", "unfinished")}
    return {**shared, section: known[section]}


def outcome(row: Candidates, config: Config) -> Outcome:
    """What one prompt's answers give, or why they give nothing."""
    qualities = [pairing.quality(response, config.quality) for response in row.responses]
    problems = pairing.unusable(row.responses, unfinished=config.unfinished)
    allowed = {number for number, problem in enumerate(problems) if problem is None}
    if config.produce == "steerlm":
        return _steerlm(row, qualities, allowed, config)
    if all(quality is None for quality in qualities):
        return Dropped("ungraded")
    if not allowed:
        return Dropped("unusable")
    return (_best if config.produce == "best" else _pairs)(row, qualities, allowed, config)


def _pairs(row: Candidates, qualities: pairing.Qualities, allowed: set[int], config: Config) -> Outcome:
    rules = config.pairs
    graded = sum(quality is not None for quality in qualities)
    if graded < 2 or (rules.group_size is not None and graded != rules.group_size):
        return Dropped("group_size")

    best = pairing.make_rs(qualities, allowed=allowed)
    if not best:
        return Dropped("unusable")
    if config.produce == "ranked":
        found = pairing.ranked_pairs(qualities, min_gap=rules.min_gap, allowed=allowed)
        made = [choice for choice in found if not _alike(row, choice.chosen, choice.rejected, rules)]
    else:
        distinct = {number for number in allowed if number == best[0] or not _alike(row, best[0], number, rules)}
        found, made = _drawn(row, qualities, allowed, config), _drawn(row, qualities, distinct, config)
    if not made:
        return Dropped("near_identical" if found else "small_gap")
    return [_pair(row, choice, number, qualities, config) for number, choice in enumerate(made)]


def _alike(row: Candidates, one: int, other: int, rules: PairsConfig) -> bool:
    texts = (row.responses[number]["text"] for number in (one, other))
    return pairing.edit_similarity(*texts) > rules.max_similarity


def _drawn(row: Candidates, qualities: pairing.Qualities, usable: set[int], config: Config) -> list[Choice]:
    rules = config.pairs
    rng = random.Random(row_seed(config.seed, f"{row.id}/rejected"))
    return pairing.make_dpo_pairs(qualities, rng, min_gap=rules.min_gap, rejected=rules.rejected,
                                  per_prompt=rules.per_prompt, group_size=rules.group_size, allowed=usable)  # fmt: skip


def _pair(row: Candidates, choice: Choice, number: int, qualities: pairing.Qualities, config: Config) -> Pair:
    sides = {"chosen": choice.chosen, "rejected": choice.rejected}
    told = {side: row.responses[place] for side, place in sides.items()}
    meta = {
        "produced": config.produce,
        "answers": len(row.responses),
        "qualities": list(qualities),
        **{f"{side}_index": place for side, place in sides.items()},
        "scores": {side: pairing.bare_scores(response.get("scores") or {}) for side, response in told.items()},
        **{f"{side}_tokens": response.get("tokens") for side, response in told.items()},
        "sampling": told["chosen"].get("settings"),
        "length_gap": len(told["chosen"]["text"].split()) - len(told["rejected"]["text"].split()),
    }
    return stages.make_pair(
        Prompt(row.id, row.images, row.messages, row.answer, row.facts),
        method=METHOD,
        chosen=told["chosen"]["text"],
        rejected=told["rejected"]["text"],
        settings=row_settings(config),
        seed=config.seed,
        model=_generator(row),
        meta=meta,
        margin=choice.margin,
        index=number,
    )


def _best(row: Candidates, qualities: pairing.Qualities, allowed: set[int], config: Config) -> Outcome:
    best = pairing.make_rs(qualities, k=config.best.k, min_quality=config.best.min_quality, allowed=allowed)
    if not best:
        return Dropped("low_quality" if pairing.make_rs(qualities, allowed=allowed) else "unusable")
    graded = sum(quality is not None for quality in qualities)
    return [
        _example(row, pairing.make_steerlm(row.messages, row.responses[place], None), place, config,
                 quality=qualities[place], answers=graded, scores=row.responses[place].get("scores"))
        for place in best
    ]  # fmt: skip


def _steerlm(row: Candidates, qualities: pairing.Qualities, allowed: set[int], config: Config) -> Outcome:
    steer = config.steerlm
    if not allowed:
        return Dropped("unusable")
    lines = {
        place: line
        for place in sorted(allowed)
        if (line := pairing.attribute_line(row.responses[place].get("scores") or {}, steer.attributes,
                                           decimals=steer.decimals)) is not None
    }  # fmt: skip
    if not lines:
        return Dropped("ungraded")
    if steer.two_turn:
        return _two_turn(row, qualities, lines, config)
    made = []
    for place, line in lines.items():
        kept = line if pairing.keeps_attributes(config.seed, f"{row.id}/{place}", steer.drop_prob) else None
        messages = pairing.make_steerlm(row.messages, row.responses[place], kept, place=steer.place)
        made.append(_example(row, messages, place, config, quality=qualities[place], attributes=kept))
    return made


def _two_turn(row: Candidates, qualities: pairing.Qualities, lines: dict[int, str], config: Config) -> Outcome:
    best = pairing.make_rs(qualities, allowed=lines.keys())
    others = [place for place in lines if best and place != best[0]]
    if not others:
        return Dropped("one_answer")
    before = random.Random(row_seed(config.seed, f"{row.id}/before")).choice(others)
    asked = (lines[before], lines[best[0]])
    messages = pairing.make_two_turn(row.messages, row.responses[before], row.responses[best[0]], asked)
    known = {"quality": qualities[best[0]], "before": before, "attributes": list(asked)}
    return [_example(row, messages, best[0], config, **known)]


def _example(row: Candidates, messages: list[Message], place: int, config: Config, **known: Any) -> Example:
    settings, generator = row_settings(config), _generator(row)
    name = records.record_id(
        method=METHOD, parent=row.id, settings=settings, model=generator, seed=config.seed, index=place
    )
    meta = {"method": METHOD, "parent": row.id, "generator": generator, "seed": config.seed, "settings": settings,
            "images_sha256": [sha256(image) for image in row.images], "index": place, **known}  # fmt: skip
    return Example(name, row.images, messages, meta)


def _generator(row: Candidates) -> str:
    return next((response["generator"] for response in row.responses if response.get("generator")), "")


def figures(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """How many prompts gave nothing, and what the rows are like on average.

    `length_gap` (words of chosen less those of rejected) far above 0 teaches length. `kl`: bound on how far best-of-n moved from
    its sampler, in nats, to compare with DPO at equal KL.
    """
    rows = list(stages.columns_of(folder, "margin", "meta"))
    metas = [row["meta"] for row in rows]
    found: dict[str, Any] = {"rows": len(rows), "drop_rate": round(1 - manifest.rows_used / manifest.rows_in, 4)}
    if "length_gap" in metas[0]:
        found["margin"] = _mean([row["margin"] for row in rows])
        found["length_gap"] = _mean([meta["length_gap"] for meta in metas])
        return found
    found["quality"] = _mean([meta["quality"] for meta in metas if meta["quality"] is not None])
    if "answers" in metas[0]:
        found["kl"] = _mean([pairing.best_of_n_kl(meta["answers"]) for meta in metas])
    if "attributes" in metas[0]:
        found["without_attributes"] = _mean([meta["attributes"] is None for meta in metas])
    return found


def _mean(values: Sequence[float]) -> float | None:
    return round(statistics.fmean(values), 4) if values else None


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
