"""What a cascade did, row by row: the table that it leaves, and baselines that are drawn to match it (arXiv 2409.18541)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefalign.cascade import UNUSABLE, CascadeStage, Rated
from prefalign.curation import Baseline, Judged, baseline

TABLE = "cascade.json"


def summary(table: Mapping[str, Rated], stages: Sequence[CascadeStage]) -> dict[str, Any]:
    """What each stage saw and kept, and the score table."""
    found = []
    for number, stage in enumerate(stages):
        after = [other.name for other in stages[number + 1 : number + 2]]
        scored = {name: value for name, row in table.items() if (value := row.scores.get(stage.name)) is not None}
        kept = [name for name in scored if (after[0] in table[name].scores if after else table[name].dropped is None)]
        found.append(
            {
                "name": stage.name,
                "scored": len(scored),
                "kept": len(kept),
                "mean": _mean(scored.values()),
                "mean_kept": _mean(scored[name] for name in kept),
            }
        )
    listed = [
        {"id": name, "type": row.type, "words": row.words, "scores": row.scores, "dropped": row.dropped,
         "new_answers": len(row.answers)}
        for name, row in table.items() if row.failed is None
    ]  # fmt: skip
    return {"stages": found, "rows": listed}


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return round(statistics.fmean(known), 4) if known else None


def baseline_like(folder: Path, kind: Baseline, seed: int) -> dict[str, Rated]:
    """The rows of a finished cascade's table, of which a baseline keeps as many of each type as the cascade did.

    Args:
        folder: output of `curate_instructions` that produced `curated`.
        kind: how they are drawn (`curation.baseline`).
        seed: seed of the draw.

    Raises:
        ValueError: if the folder holds no score table.
    """
    file = folder / TABLE
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no {TABLE}, so there is no cascade whose counts could be matched. Give baseline.like the output "
            "folder of a finished curate_instructions run that produced `curated`."
        )
    rows = json.loads(file.read_text())["rows"]
    could = [row for row in rows if row["dropped"] not in UNUSABLE]
    judged = [Judged(row["id"], row["type"], row["words"], row["dropped"] is None) for row in could]
    drawn = baseline(judged, kind, seed)
    reasons = {row["id"]: row["dropped"] if row["dropped"] in UNUSABLE else "not_drawn" for row in rows}
    return {
        row["id"]: Rated(row["type"], row["words"], dropped=None if row["id"] in drawn else reasons[row["id"]])
        for row in rows
    }
