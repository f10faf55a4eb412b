"""What a pass over all inputs found of their answers' claims: counted, cut to equal lengths, and read back block by block.

Used by `datagen/rlaif_v.py`. What is found of a row is JSON-able: `id`, `responses` (with `text`), `judged` (`claims.as_meta` of
each), `drawn` (numbers of the chosen and the rejected answer of each pair), and `failed` (reason, message) where a model did not
answer. Cut, figures and failed rows are one decision (`Survey.decide`): of processes that found different rows failed, all follow
the first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefalign.length_balance import Balance, Cut, Lengths
from prefalign.store import StoreError
from prefalign.surveys import Again, Survey, Work

PASS = "claims"
Row = dict[str, Any]


class ClaimSurvey:
    """A finished pass over all inputs.

    Args:
        survey: reads the inputs and keeps what is found of them.
        work: what it finds of a block.
        again: rows of an earlier run that are worked on once more, unless all is decided.
        balance: from which side pairs may be dropped.
        least_kept: least share of the pairs that the balance keeps.

    Attributes:
        cut: which pairs stay.
        figures: answers by what became of them, claims by verdict, mean claims of either side, and what the balance did.

    Raises:
        StoreError: if more rows than `output.max_quarantine` failed, before anything is decided.
    """

    def __init__(self, survey: Survey, work: Work, *, again: Again, balance: Balance, least_kept: float):
        self._survey = survey
        self._places: dict[str, int] = {}
        counts, lengths = Counts(), Lengths()
        stands = survey.decision(PASS)
        for number, block in enumerate(survey(PASS, work, again=again)):
            for found in block:
                if found["id"] in self._places:
                    continue
                self._places[found["id"]] = number
                if stands is None:
                    counts.add(found, survey.stage, survey.output.max_quarantine)
                    for chosen, rejected in found["drawn"]:
                        lengths.add(*words_of(found, chosen, rejected))
        if stands is None:
            cut, balanced = lengths.balanced(balance, least_kept)
            figures = {**counts.figures(), "length_balance": balanced}
            stands = survey.decide(PASS, {"cut": vars(cut), "figures": figures, "failed": counts.failed})
        self.cut = Cut(**stands["cut"])
        self.figures: Row = stands["figures"]
        self._failed: dict[str, Any] = stands["failed"]

    def of(self, block: Sequence[Any]) -> list[tuple[Any, Row]]:
        """Each row of a block with what was found of it when the cut was decided; blocks may come in any order."""
        files = [self._survey.file(PASS, number) for number in {self._places[row.id] for row in block}]
        known = {found["id"]: found for file in files for found in reversed(json.loads(file.read_text())["rows"])}
        return [(row, self._as_decided(known[row.id])) for row in block]

    def _as_decided(self, found: Row) -> Row:
        """A row that had failed has failed, though a process that did not know of the decision may have its answers by now."""
        failed = self._failed.get(found["id"])
        return found if failed is None else {"id": found["id"], "failed": failed}


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

    def add(self, found: Row, stage: str, limit: int) -> None:
        """Count a row of the pass. Raises `StoreError`, in the stage's name, if more than `limit` have failed."""
        if "failed" in found:
            self.failed[found["id"]] = found["failed"]
        if len(self.failed) > limit:
            raise StoreError(
                f"{stage} stopped: {len(self.failed)} rows failed before a pair was written, above --output.max_quarantine "
                f"{limit} (last: {': '.join(found['failed'])[:400]}). Mend the cause or raise the limit, and start again: what "
                "is judged stays, rows whose models did not answer are asked again."
            )
        self.answers.update(judged["reason"] or "judged" for judged in found["judged"])
        for judged in found["judged"]:
            self.verdicts.update(judged["verdicts"])
        self.pairs += len(found["drawn"])
        for pair in found["drawn"]:
            for side, number in zip(("chosen", "rejected"), pair, strict=True):
                self.claims[side] += len(found["judged"][number]["claims"])

    def figures(self) -> Row:
        """Answers by what became of them, claims by verdict, and mean claims of either side of the pairs that were drawn."""
        means = {side: round(self.claims[side] / max(1, self.pairs), 3) for side in ("chosen", "rejected")}
        return {"answers": dict(sorted(self.answers.items())), "claims": dict(sorted(self.verdicts.items())),
                "pairs_drawn": self.pairs, "mean_claims": means}  # fmt: skip
