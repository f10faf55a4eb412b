"""Which answers changed most between two evaluations of the same questions, for better and for worse."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign.images import EncodedImage, read_image

MOST_OF_A_KIND = 6


@dataclass(frozen=True)
class Example:
    """One question and its answers before and after.

    Attributes:
        id: identity of the item.
        image: its picture, if the evaluation kept a copy.
        prompt: text of the question.
        before: answer of the first model.
        after: answer of the second model.
        invented_before: names in `before` of things that are not in the picture, each once.
        invented_after: the same for `after`.
        recalled_before: names in `before` of things that are in the picture, each once.
        recalled_after: the same for `after`.
    """

    id: str
    image: EncodedImage | None
    prompt: str
    before: str
    after: str
    invented_before: list[str]
    invented_after: list[str]
    recalled_before: list[str]
    recalled_after: list[str]


@dataclass(frozen=True)
class Examples:
    """Answers before and after, and how common each change is.

    Attributes:
        better: the largest improvement first.
        worse: the largest deterioration first.
        fewer: number of answers that invent fewer objects than before.
        more: number of answers that invent more.
        same: number of answers that invent as many.
        with_picture: number of answers whose picture was kept, if only these were chosen from; else 0.
    """

    better: list[Example]
    worse: list[Example]
    fewer: int
    more: int
    same: int
    with_picture: int = 0


def choose_examples(before: Path, after: Path) -> Examples:
    """Choose captions by rule: the largest change in invented objects, then in objects found, ties by a hash of the id.

    Where the first evaluation kept pictures, only items with a picture are chosen; the counts are over all.

    Args:
        before: evaluation folder of the first model (`predictions.jsonl`, `items.jsonl` with `chair` items).
        after: evaluation folder of the second model, asked the same questions.

    Returns:
        The examples and the counts over all items that both models answered.

    Raises:
        ValueError: if a file is missing, or the folders share no scored caption.
    """
    before, after = Path(before), Path(after)
    old, new = _named(before), _named(after)
    shared = [key for key in old if key in new]
    if not shared:
        raise ValueError(
            f"{before} and {after} share no scored caption ({len(old)} and {len(new)} of them): before and after cannot be put "
            "side by side. Evaluate both models on the same questions."
        )
    asked, asked_after = _rows(before / "predictions.jsonl"), _rows(after / "predictions.jsonl")
    changes = {}
    for key in shared:
        (invented, found), (invented_after, found_after) = old[key], new[key]
        changes[key] = len(invented_after) - len(invented), len(found) - len(found_after)
    pictured = [key for key in shared if asked[key].get("picture") and (before / asked[key]["picture"]).is_file()]

    def example(key: str) -> Example:
        picture = asked[key].get("picture")
        image = read_image(before / picture) if picture and (before / picture).is_file() else None
        return Example(key, image, asked[key]["prompt"], asked[key]["text"], asked_after[key]["text"], old[key][0], new[key][0],
                       old[key][1], new[key][1])  # fmt: skip

    def tie(key: str) -> str:
        return hashlib.sha256(key.encode()).hexdigest()

    pool = pictured or shared
    better = sorted((key for key in pool if changes[key] < (0, 0)), key=lambda key: (changes[key], tie(key)))
    worse = sorted(
        (key for key in pool if changes[key] > (0, 0)), key=lambda key: (-changes[key][0], -changes[key][1], tie(key))
    )
    return Examples(
        better=[example(key) for key in better[:MOST_OF_A_KIND]],
        worse=[example(key) for key in worse[:MOST_OF_A_KIND]],
        fewer=sum(change[0] < 0 for change in changes.values()),
        more=sum(change[0] > 0 for change in changes.values()),
        same=sum(change[0] == 0 for change in changes.values()),
        with_picture=len(pictured) if len(pictured) < len(shared) else 0,
    )


def _named(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Item id to (names invented, names recalled), each once, from `parsed` as `evals.chair` writes it: `circle, square!`."""
    result = {}
    for key, row in _rows(folder / "items.jsonl").items():
        if row["status"] == "ok":
            names = dict.fromkeys(name for name in (row["parsed"] or "").split(", ") if name)
            result[key] = (
                [name[:-1] for name in names if name.endswith("!")],
                [name for name in names if name[-1] != "!"],
            )
    return result


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        raise ValueError(
            f"{file} is not there: examples need the answers of both models. Give folders that an evaluation wrote."
        )
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line)
    return {row["id"]: row for row in rows if row["eval"] == "chair"}
