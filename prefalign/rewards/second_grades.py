"""Grades that are asked for twice: of a share of the answers, and how far a judge agrees with itself.

Used by `datagen/quality_pairs.py`. A judge is asked for its attributes in the reverse order (`Reward.again`).
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING

from prefalign import stages
from prefalign.evals.statistics import weighted_kappa
from prefalign.records import Candidates, row_seed
from prefalign.rewards import Combined, Weighted, stored
from prefalign.store import Failed

if TYPE_CHECKING:
    from PIL import Image

GRADES = 5  # 0 to 4


def asked_again(rewards: Combined) -> Combined:
    """The rewards that can be asked for a second opinion.

    Raises:
        ValueError: if there is none.
    """
    entries = [
        Weighted(entry.name, again(), entry.weight)
        for entry in rewards.entries
        if callable(again := getattr(entry.reward, "again", None))
    ]
    if not entries:
        names = ", ".join(entry.name for entry in rewards.entries)
        raise ValueError(
            f"regrade asks for second grades, and {names} would say the same again: only a judge can disagree with itself. Set "
            "regrade to 0."
        )
    return Combined(entries)


def grade_again(
    rows: list[tuple[Candidates | Failed, list[Image.Image]]], again: Combined, *, share: float, seed: int
) -> list[Candidates | Failed]:
    """Rows in which the answers that are drawn for it have second grades, as `regraded`.

    Args:
        rows: graded answers, or why there are none, with their decoded pictures.
        again: what grades (`asked_again`).
        share: of the answers, from 0 to 1.
        seed: with a row's id it decides which.

    Returns:
        The rows in order. A second grade to which the judge did not reply is None, as one that cannot be read: the first counts.
    """
    drawn = [
        (place, number)
        for place, (row, _) in enumerate(rows)
        if isinstance(row, Candidates)
        for number in range(len(row.responses))
        if random.Random(row_seed(seed, f"{row.id}/{number}/again")).random() < share
    ]
    made = [row for row, _ in rows]
    asked = {}
    for place in {place for place, _ in drawn}:
        row, images = rows[place]
        assert isinstance(row, Candidates)
        asked[place] = stored.as_responses(row, images)
    scores = stored.score([asked[place][number] for place, number in drawn], again) if drawn else []
    for (place, number), given in zip(drawn, scores, strict=True):
        row = made[place]
        assert isinstance(row, Candidates)
        answers = list(row.responses)
        answers[number] = {**answers[number], "regraded": {name: v for name, v in given.items() if name != "total"}}
        made[place] = dataclasses.replace(row, responses=answers)
    return made


def agreement(folder: Path) -> dict[str, dict[str, float | None]]:
    """By attribute, of the answers that were graded twice: quadratic-weighted kappa, share of equal grades, how many, and of how
    many a grade is missing.

    Args:
        folder: graded answers.
    """
    twice: dict[str, list[tuple[float | None, float | None]]] = {}
    for row in stages.columns_of(folder, "responses"):
        for response in row["responses"]:
            for name, second in response.get("regraded", {}).items():
                twice.setdefault(name, []).append((response["scores"][name], second))
    found: dict[str, dict[str, float | None]] = {}
    for name, given in sorted(twice.items()):
        known = [(int(one), int(other)) for one, other in given if one is not None and other is not None]
        kappa = weighted_kappa([one for one, _ in known], [other for _, other in known], grades=GRADES)
        found[name] = {
            "kappa": None if kappa is None else round(kappa, 4),
            "equal": round(sum(one == other for one, other in known) / len(known), 4) if known else None,
            "answers": len(known),
            "missing": len(given) - len(known),
        }
    return found
