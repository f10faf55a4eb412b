"""What scored answers become: pairs, best answers, SteerLM rows, all comparisons; each with its provenance.

The rules are `prefalign.pairing`'s; here they are settings of stages, and rows are made by them. For
`datagen/select_responses.py`, and `datagen/quality_pairs.py`, which grades answers and selects among them in one run.

Source: Li, Lin and Pei, "Multi-modal Preference Alignment Remedies Regression of Visual Instruction Tuning on Language Model",
arXiv 2402.10884, its released data notebook.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefalign import pairing, stages
from prefalign.manifest import Manifest
from prefalign.pairing import Choice
from prefalign.records import Candidates, Example, Message, Pair, Prompt, row_seed
from prefalign.store import Dropped, Outcome

Produce = Literal["pairs", "best", "steerlm", "ranked"]


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
        drop_prob: share of rows without their line (with `two_turn`: of rows that are the question and the best answer alone), so
            that the model answers without one as well.
        decimals: digits of a value that are kept; 0 for integer grades.
        place: where the line of what is wanted stands: `user`: end of the (last) user turn, as published; `system`: end of the
            system turn.
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
class Rules:
    """How rows are made of scored answers.

    Attributes:
        method: name of the stage, in ids and provenance.
        produce: what is made of them.
        quality: weight of each score in an answer's quality.
        pairs: which answers make a pair (`pairs`, `ranked`).
        best: which answers are imitated (`best`).
        steerlm: how attributes are written (`steerlm`).
        unfinished: use answers that ran into the length limit.
        seed: with a row's id it draws rejected answers and the rows without attributes.
    """

    method: str
    produce: Produce
    quality: dict[str, float]
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

    @property
    def record(self) -> type[Pair] | type[Example]:
        """What the rows are."""
        return Pair if self.produce in ("pairs", "ranked") else Example

    def settings(self) -> dict[str, Any]:
        """The settings that change rows of what is produced."""
        section = {"pairs": "pairs", "ranked": "pairs", "best": "best", "steerlm": "steerlm"}[self.produce]
        shared = {"produce": self.produce, "quality": self.quality, "unfinished": self.unfinished}
        return {**shared, section: dataclasses.asdict(getattr(self, section))}


def outcome(row: Candidates, rules: Rules) -> Outcome:
    """What one prompt's answers give, or why they give nothing."""
    qualities = [pairing.quality(response, rules.quality) for response in row.responses]
    problems = pairing.unusable(row.responses, unfinished=rules.unfinished)
    allowed = {number for number, problem in enumerate(problems) if problem is None}
    if rules.produce == "steerlm":
        return _steerlm(row, qualities, allowed, rules)
    if all(quality is None for quality in qualities):
        return Dropped("ungraded")
    if not allowed:
        return Dropped("unusable")
    return (_best if rules.produce == "best" else _pairs)(row, qualities, allowed, rules)


def _pairs(row: Candidates, qualities: pairing.Qualities, allowed: set[int], rules: Rules) -> Outcome:
    limits = rules.pairs
    graded = sum(quality is not None for quality in qualities)
    if graded < 2 or (limits.group_size is not None and graded != limits.group_size):
        return Dropped("group_size")

    best = pairing.make_rs(qualities, allowed=allowed)
    if not best:
        return Dropped("unusable")
    if rules.produce == "ranked":
        found = pairing.ranked_pairs(qualities, min_gap=limits.min_gap, allowed=allowed)
        made = [choice for choice in found if not _alike(row, choice.chosen, choice.rejected, limits)]
    else:
        distinct = {number for number in allowed if number == best[0] or not _alike(row, best[0], number, limits)}
        found, made = _drawn(row, qualities, allowed, rules), _drawn(row, qualities, distinct, rules)
    if not made:
        return Dropped("near_identical" if found else "small_gap")
    return [_pair(row, choice, number, qualities, rules) for number, choice in enumerate(made)]


def _alike(row: Candidates, one: int, other: int, limits: PairsConfig) -> bool:
    texts = (row.responses[number]["text"] for number in (one, other))
    return pairing.edit_similarity(*texts) > limits.max_similarity


def _drawn(row: Candidates, qualities: pairing.Qualities, usable: set[int], rules: Rules) -> list[Choice]:
    limits = rules.pairs
    rng = random.Random(row_seed(rules.seed, f"{row.id}/rejected"))
    return pairing.make_dpo_pairs(qualities, rng, min_gap=limits.min_gap, rejected=limits.rejected,
                                  per_prompt=limits.per_prompt, group_size=limits.group_size, allowed=usable)  # fmt: skip


def _pair(row: Candidates, choice: Choice, number: int, qualities: pairing.Qualities, rules: Rules) -> Pair:
    sides = {"chosen": choice.chosen, "rejected": choice.rejected}
    told = {side: row.responses[place] for side, place in sides.items()}
    meta = {
        "produced": rules.produce,
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
        method=rules.method,
        chosen=told["chosen"]["text"],
        rejected=told["rejected"]["text"],
        settings=rules.settings(),
        seed=rules.seed,
        model=_generator(row),
        meta=meta,
        margin=choice.margin,
        index=number,
    )


def _best(row: Candidates, qualities: pairing.Qualities, allowed: set[int], rules: Rules) -> Outcome:
    best = pairing.make_rs(qualities, k=rules.best.k, min_quality=rules.best.min_quality, allowed=allowed)
    if not best:
        return Dropped("low_quality" if pairing.make_rs(qualities, allowed=allowed) else "unusable")
    graded = sum(quality is not None for quality in qualities)
    return [
        _example(row, pairing.make_steerlm(row.messages, row.responses[place], None), place, rules,
                 quality=qualities[place], answers=graded, scores=row.responses[place].get("scores"))
        for place in best
    ]  # fmt: skip


def _steerlm(row: Candidates, qualities: pairing.Qualities, allowed: set[int], rules: Rules) -> Outcome:
    steer = rules.steerlm
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
        return _two_turn(row, qualities, lines, rules)
    made = []
    for place, line in lines.items():
        kept = line if pairing.keeps_attributes(rules.seed, f"{row.id}/{place}", steer.drop_prob) else None
        messages = pairing.make_steerlm(row.messages, row.responses[place], kept, place=steer.place)
        made.append(_example(row, messages, place, rules, quality=qualities[place], attributes=kept))
    return made


def _two_turn(row: Candidates, qualities: pairing.Qualities, lines: dict[int, str], rules: Rules) -> Outcome:
    best = pairing.make_rs(qualities, allowed=lines.keys())
    others = [place for place in lines if best and place != best[0]]
    if not others:
        return Dropped("one_answer")
    before = random.Random(row_seed(rules.seed, f"{row.id}/before")).choice(others)
    told, wanted = row.responses[before], row.responses[best[0]]
    if pairing.keeps_attributes(rules.seed, row.id, rules.steerlm.drop_prob):
        asked = [lines[before], lines[best[0]]]
        messages = pairing.make_two_turn(row.messages, told, wanted, (asked[0], asked[1]), place=rules.steerlm.place)
        known = {"quality": qualities[best[0]], "before": before, "attributes": asked}
    else:
        messages = pairing.make_steerlm(row.messages, wanted, None)
        known = {"quality": qualities[best[0]], "before": None, "attributes": None}
    return [_example(row, messages, best[0], rules, **known)]


def _example(row: Candidates, messages: list[Message], place: int, rules: Rules, **known: Any) -> Example:
    return stages.make_example(
        row, method=rules.method, messages=messages, settings=rules.settings(), seed=rules.seed, model=_generator(row),
        meta={"index": place, **known}, index=place,
    )  # fmt: skip


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
