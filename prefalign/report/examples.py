"""Which answers changed most between two evaluations of the same questions, for better and for worse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign.images import EncodedImage


@dataclass(frozen=True)
class Examples:
    """Answers before and after, and how common each change is.

    Attributes:
        better: mappings with `id`, `image`, `prompt`, `before`, `after`, `invented_before`, `invented_after`,
            `recalled_before`, `recalled_after`; the largest improvement first.
        worse: the same, the largest deterioration first.
        fewer: number of answers that invent fewer objects than before.
        more: number of answers that invent more.
        same: number of answers that invent as many.
    """

    better: list[dict[str, Any]]
    worse: list[dict[str, Any]]
    fewer: int
    more: int
    same: int


def choose_examples(
    before: Path,
    after: Path,
    *,
    pictures: Callable[[Mapping[str, Any]], EncodedImage | None],
    count: int = 6,
    name: str = "chair",
) -> Examples:
    """Choose by rule, not by taste: the largest change in invented objects, then in objects found, ties by a hash of the id.

    Args:
        before: evaluation folder of the first model (`predictions.jsonl`, `items.jsonl`).
        after: evaluation folder of the second model, asked the same questions.
        pictures: gives the picture of a row of `predictions.jsonl`.
        count: most examples of each kind.
        name: evaluation whose items carry `hallucinated` and `recalled` lists.

    Returns:
        The examples and the counts over all items that both models answered.

    Raises:
        ValueError: if a file is missing, or the folders share no scored item.
    """
    old, new = _items(Path(before), name), _items(Path(after), name)
    shared = [key for key in old if key in new]
    if not shared:
        raise ValueError(
            f"{before} and {after} share no scored item of {name!r} ({len(old)} and {len(new)} items): before and after "
            "cannot be put side by side. Evaluate both models on the same questions."
        )
    asked_old, asked_new = _rows(Path(before) / "predictions.jsonl", name), _rows(Path(after) / "predictions.jsonl", name)
    changes = []
    for key in shared:
        invented = len(set(new[key]["hallucinated"])) - len(set(old[key]["hallucinated"]))
        found = len(set(new[key].get("recalled", ()))) - len(set(old[key].get("recalled", ())))
        changes.append((invented, -found, hashlib.sha256(key.encode()).hexdigest(), key))
    changes.sort()

    def example(key: str) -> dict[str, Any]:
        return {
            "id": key,
            "image": pictures(asked_old[key]),
            "prompt": asked_old[key]["prompt"],
            "before": asked_old[key]["text"],
            "after": asked_new[key]["text"],
            "invented_before": sorted(set(old[key]["hallucinated"])),
            "invented_after": sorted(set(new[key]["hallucinated"])),
            "recalled_before": sorted(set(old[key].get("recalled", ()))),
            "recalled_after": sorted(set(new[key].get("recalled", ()))),
        }

    good = [change for change in changes if change[:2] < (0, 0)]
    bad = sorted((change for change in changes if change[:2] > (0, 0)), key=lambda c: (-c[0], -c[1], c[2]))
    return Examples(
        better=[example(change[3]) for change in good[:count]],
        worse=[example(change[3]) for change in bad[:count]],
        fewer=sum(change[0] < 0 for change in changes),
        more=sum(change[0] > 0 for change in changes),
        same=sum(change[0] == 0 for change in changes),
    )


def _items(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    rows = _rows(folder / "items.jsonl", name)
    return {key: row for key, row in rows.items() if row.get("status", "ok") == "ok" and "hallucinated" in row}


def _rows(file: Path, name: str) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        raise ValueError(
            f"{file} is not there: examples need the answers of both models. Give folders that an evaluation wrote."
        )
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line)
    return {str(row["id"]): row for row in rows if row.get("eval", name) == name}
