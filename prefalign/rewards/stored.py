"""Scores of stored answers: every term by name on each answer, and what the scores of a folder are like.

For `reward_models/score_responses.py`, and `datagen/quality_pairs.py`, which draws the answers in the same run.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign import pairing, stages
from prefalign.records import Candidates, normalise_messages
from prefalign.responses import history, questions_of
from prefalign.rewards import Combined, FactsError, Response
from prefalign.store import Failed

if TYPE_CHECKING:
    from PIL import Image

Scores = dict[str, float | None]


def as_responses(row: Candidates, images: list[Image.Image]) -> list[Response]:
    """The answers of one row as rewards take them; the last ones of whole conversations, in view of those before.

    Args:
        row: candidates.
        images: its decoded pictures; empty for rewards that read texts alone.
    """
    questions = questions_of(row.facts)
    return [
        Response(
            id=f"{row.id}/{number}",
            images=images,
            messages=history(row.messages, questions, response.get("earlier", ())),
            text=response["text"],
            answer=row.answer,
            facts=row.facts,
            finished=pairing.is_finished(response),
            tokens=response.get("tokens"),
        )
        for number, response in enumerate(row.responses)
    ]


def score(responses: Sequence[Response], rewards: Combined) -> list[Scores]:
    """By response, every term by name; None where it is missing."""
    terms = {name: values.tolist() for name, values in rewards.score(responses).items()}
    return [{name: _number(values[place]) for name, values in terms.items()} for place in range(len(responses))]


def score_rows(rows: Sequence[tuple[Candidates, list[Image.Image]]], rewards: Combined) -> list[Candidates | Failed]:
    """Rows with their scores; all answers are scored in one call, unless the facts of a row are bad.

    Scores that an answer has already stay under their names; `total` is that of these rewards.

    Returns:
        One entry for each row, in order; `Failed` where a reward cannot read a row's facts (`bad_facts`), or a judge did not
        reply about one of its answers (`judge_failed`).
    """
    responses = [response for row, images in rows for response in as_responses(row, images)]
    try:
        scores = iter(score(responses, rewards))
    except FactsError as error:  # of one row: each by itself
        if len(rows) == 1:
            return [Failed("bad_facts", str(error))]
        return [score_rows([row], rewards)[0] for row in rows]
    found: list[Candidates | Failed] = []
    place = 0
    for row, _ in rows:
        scored = _scored(row, [next(scores) for _ in row.responses])
        found.append(judge_failure(rewards, range(place, place + len(row.responses))) or scored)
        place += len(row.responses)
    return found


def judge_failure(rewards: Combined, places: Iterable[int]) -> Failed | None:
    """Why a row cannot be scored whose responses had these places in the last call: a judge did not reply."""
    message = next((rewards.failures[place] for place in places if place in rewards.failures), None)
    return None if message is None else Failed("judge_failed", message)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _scored(row: Candidates, scores: Sequence[Scores]) -> Candidates:
    responses = [
        {**response, "scores": {**(response.get("scores") or {}), **given}}
        for response, given in zip(row.responses, scores, strict=True)
    ]
    return dataclasses.replace(row, responses=responses)


def without_pictures(folder: Path) -> Iterator[Candidates]:
    """The candidates of a folder, for what reads texts and scores alone."""
    for row in stages.columns_of(folder, "id", "messages", "responses", "answer", "facts"):
        yield Candidates(
            row["id"], [], normalise_messages(row["messages"]), row["responses"], row["answer"], row["facts"]
        )


def figures(folder: Path, rewards: Combined) -> dict[str, Any]:
    """By score: how many are missing, mean, deviation, range; and how the total goes with the length of the answer.

    Rewards that have an `accuracy` beside their terms (`symbolic`: by question, conversation, hint) report it by their label.

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
        **accuracies(folder, rewards),
    }


def accuracies(folder: Path, rewards: Combined) -> dict[str, dict[str, dict[str, float | None]]]:
    """`accuracy` by label of the rewards that give one, over the answers of a folder; empty if none does."""
    asked = [entry for entry in rewards.entries if callable(getattr(entry.reward, "accuracy", None))]
    if not asked:
        return {}
    responses = [response for row in without_pictures(folder) for response in as_responses(row, [])]
    found = {entry.name: entry.reward.accuracy(responses) for entry in asked}  # type: ignore[attr-defined]
    return {"accuracy": {name: {key: None if math.isnan(value) else round(value, 4) for key, value in one.items()}
                         for name, one in found.items()}}  # fmt: skip


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
