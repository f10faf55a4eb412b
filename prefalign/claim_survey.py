"""What a pass over all inputs found of their answers' claims: counted, cut to equal lengths, and read back block by block.

Used by `datagen/rlaif_v.py`. What is found of a row is JSON-able: `id`, `responses` (with `text`), `judged` (`claims.as_meta` of
each), `dropped` (why its answers cannot be paired, if so), and `failed` (reason, message) where a model did not answer. Which of
them make pairs (`draw`) is no part of it, so that one pass serves any rule. Cut, figures and failed rows are one decision
(`Survey.decide`): of processes that found different rows failed, all follow the first.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefalign.length_balance import Balance, Cut, Lengths
from prefalign.manifest import differences
from prefalign.store import StoreError
from prefalign.surveys import Again, Survey, Work, but_for

PASS = "claims"
Row = dict[str, Any]
Draw = Callable[[Row], list[tuple[int, int]]]
"""Gives the numbers of the chosen and the rejected answer of each pair that is drawn of a row."""


@dataclass
class Found:
    """What a finished pass has found, read row by row.

    Attributes:
        survey: the pass's.
        places: number of each row's block, by id.
        failed: reason and message of the rows that had failed when all was decided, by id.
    """

    survey: Survey
    places: dict[str, int] = field(default_factory=dict)
    failed: dict[str, Any] = field(default_factory=dict)

    def add(self, number: int, block: Sequence[Row]) -> list[Row]:
        """Note where the rows of a block are. Returns those whose id is new."""
        new = []
        for row in block:
            if row["id"] not in self.places:
                self.places[row["id"]] = number
                new.append(row)
        return new

    def of(self, names: Sequence[str]) -> list[Row]:
        """What was found of the rows of these ids, in whatever order.

        A row that had failed has failed, though a process that did not know of the decision may have its answers by now.
        """
        files = [self.survey.file(PASS, number) for number in {self.places[name] for name in names}]
        known = {row["id"]: row for file in files for row in reversed(json.loads(file.read_text())["rows"])}
        return [{"id": name, "failed": self.failed[name]} if name in self.failed else known[name] for name in names]


class ClaimSurvey:
    """A finished pass over all inputs.

    Args:
        survey: reads the inputs and keeps what is found of them.
        work: what it finds of a block.
        again: rows of an earlier run that are worked on once more, unless all is decided.
        draw: which answers of a row make pairs.
        balance: from which side pairs may be dropped.
        least_kept: least share of the pairs that the balance keeps.

    Attributes:
        cut: which pairs stay.
        figures: answers by what became of them, claims by verdict, mean claims of either side, and what the balance did.

    Raises:
        StoreError: if more rows than `output.max_quarantine` failed, before anything is decided.
    """

    def __init__(self, survey: Survey, work: Work, *, again: Again, draw: Draw, balance: Balance, least_kept: float):
        self._found = Found(survey)
        counts, lengths = Counts(), Lengths()
        stands = survey.decision(PASS)
        for number, block in enumerate(survey(PASS, work, again=again)):
            for found in self._found.add(number, block):
                if stands is None:
                    drawn = draw(found)
                    counts.add(found, drawn, survey.stage, survey.output.max_quarantine)
                    for chosen, rejected in drawn:
                        lengths.add(*words_of(found, chosen, rejected))
        if stands is None:
            cut, balanced = lengths.balanced(balance, least_kept)
            figures = {**counts.figures(), "length_balance": balanced}
            stands = survey.decide(PASS, {"cut": vars(cut), "figures": figures, "failed": counts.failed})
        self.cut = Cut(**stands["cut"])
        self.figures: Row = stands["figures"]
        self._found.failed = stands["failed"]

    def of(self, block: Sequence[Any]) -> list[tuple[Any, Row]]:
        """Each row of a block with what was found of it when the cut was decided; blocks may come in any order."""
        return list(zip(block, self._found.of([row.id for row in block]), strict=True))


def config_of(folder: Path, stage: str) -> Row:
    """What decided the rows of an earlier run's output (`config.json`).

    Raises:
        ValueError: if the folder is none of this stage.
    """
    file = folder / "config.json"
    known: Row = json.loads(file.read_text()) if file.is_file() else {}
    if known.get("stage") != stage:
        raise ValueError(
            f"judged is {folder}, and that is no output of {stage}, so no answers and verdicts can be taken from it. Give the "
            "folder that an earlier run has as its output.path, or leave `judged` out to have all answers judged."
        )
    return known


def earlier(survey: Survey, folder: Path) -> Found:
    """What an earlier run has found of the same inputs, to be paired by another rule.

    Args:
        survey: of the run that reads it.
        folder: output of the earlier run.

    Raises:
        StoreError: if other rows were judged there, or in another way, or not all of them.
    """
    before, now = (
        but_for({**config_of(each, survey.stage), "revision": ""}, survey.rule) for each in (folder, survey.output.path)
    )
    if changed := list(differences(before, now)):
        raise StoreError(
            f"{folder} holds verdicts about other rows, or by other settings ({'; '.join(changed)}), and they would pass for "
            f"those of this run. Only {', '.join(survey.rule)} may differ: give the settings that it had, or leave `judged` "
            "out to have all answers judged."
        )
    found = Found(replace(survey, output=replace(survey.output, path=folder)))
    for number in range(math.ceil(survey.total / survey.output.block_size)):
        block = found.survey.kept(PASS, number)
        if block is None:
            raise StoreError(
                f"{folder} has not judged all its rows (block {number} is missing), so their pairs cannot be balanced. Start "
                "that run again, it goes on where it was; then this one."
            )
        found.add(number, block)
    found.failed = (found.survey.decision(PASS) or {"failed": {}})["failed"]
    return found


def words_of(found: Row, chosen: int, rejected: int) -> tuple[int, int]:
    """Words of the two answers of a pair."""
    texts = (found["responses"][number]["text"] for number in (chosen, rejected))
    one, other = (len(text.split()) for text in texts)
    return one, other


@dataclass
class Counts:
    """Running sums for the figures of a run."""

    answers: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    claims: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    failed: dict[str, list[str]] = field(default_factory=dict)

    def add(self, found: Row, drawn: Sequence[tuple[int, int]], stage: str, limit: int) -> None:
        """Count a row of the pass and its pairs. Raises `StoreError`, in the stage's name, if more than `limit` have failed."""
        if "failed" in found:
            self.failed[found["id"]] = found["failed"]
        if len(self.failed) > limit:
            raise StoreError(
                f"{stage} stopped: {len(self.failed)} rows failed before a pair was written, above --output.max_quarantine "
                f"{limit} (last: {': '.join(found['failed'])[:400]}). Mend the cause or raise the limit, and start again: what "
                "is judged stays, rows whose models did not answer are asked again."
            )
        self.answers.update(judged["reason"] or "judged" for judged in found.get("judged", ()))
        for judged in found.get("judged", ()):
            self.verdicts.update(judged["verdicts"])
        self.pairs += len(drawn)
        for pair in drawn:
            for side, number in zip(("chosen", "rejected"), pair, strict=True):
                self.claims[side] += len(found["judged"][number]["claims"])

    def figures(self) -> Row:
        """Answers by what became of them, claims by verdict, and mean claims of either side of the pairs that were drawn."""
        means = {side: round(self.claims[side] / max(1, self.pairs), 3) for side in ("chosen", "rejected")}
        return {"answers": dict(sorted(self.answers.items())), "claims": dict(sorted(self.verdicts.items())),
                "pairs_drawn": self.pairs, "mean_claims": means}  # fmt: skip
