"""Pairs as a reward model trains on them: with facts, margins and scores, and what each row says of which side is better."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign.progress import progress_bar
from prefalign.training.pairs import load_columns, on_two_pictures, pairs_manifest, rows_without

if TYPE_CHECKING:
    from datasets import Dataset

    from prefalign.rewards.collator import RewardCollator

USUAL = "reward"
"""Name of the score of a model whose `attributes` are not given: how good an answer is on the whole."""

COLUMNS = ("id", "images", "rejected_images", "prompt", "chosen", "rejected", "facts", "margin", "meta")


def load_reward_pairs(folder: Path) -> Dataset:
    """The columns that reward training reads, as Arrow on disk; a row's pictures are decoded when it is collated.

    Raises:
        ValueError: the folder is not the finished output of a stage that makes pairs.
    """
    pairs_manifest(folder)
    return load_columns(folder, COLUMNS)


def as_mapping(value: Any) -> dict[str, Any]:
    """`facts` or `meta` of a row, which are JSON text on disk."""
    return json.loads(value) if isinstance(value, str) else dict(value or {})


def scores_of(row: Mapping[str, Any], attributes: Sequence[str]) -> list[tuple[float, float]]:
    """For each attribute, what the chosen and the rejected answer were given (`meta["scores"][side][attribute]`).

    Raises:
        ValueError: the row lacks one.
    """
    scores = as_mapping(row.get("meta")).get("scores") or {}
    lacking = [
        f"{side}.{name}"
        for side in ("chosen", "rejected")
        for name in attributes
        if not isinstance((scores.get(side) or {}).get(name), (int, float))
    ]
    if lacking:
        raise ValueError(
            f"row {row.get('id')}: `meta.scores` has no number for {', '.join(lacking[:3])}, and the reward model learns "
            f"{', '.join(attributes)}. Store the graders' scores of both answers there ({{'chosen': {{'{attributes[0]}': 4}}, "
            "...}), take pairs of one attribute each (`meta.attribute`), or leave `attributes` out."
        )
    return [(float(scores["chosen"][name]), float(scores["rejected"][name])) for name in attributes]


def directions(row: Mapping[str, Any], attributes: Sequence[str]) -> list[float]:
    """For each attribute, 1 where the chosen answer is better, -1 where the rejected one is, 0 where the row does not say.

    A row with `meta["attribute"]` is about that one; one attribute alone is what chosen and rejected say. The usual
    one, `reward`, takes rows about any.

    Raises:
        ValueError: the row is about another attribute, or there are several and it neither names one nor has scores for all.
    """
    about = as_mapping(row.get("meta")).get("attribute")
    if about is not None and list(attributes) != [USUAL]:
        if about not in attributes:
            raise ValueError(
                f"row {row.get('id')} is about the attribute {about!r}, and the reward model learns {', '.join(attributes)}. Add "
                "it to `attributes`, take such rows out, or leave `attributes` out to learn one score from all."
            )
        return [float(name == about) for name in attributes]
    if len(attributes) == 1:
        return [1.0]
    return [float((better > worse) - (better < worse)) for better, worse in scores_of(row, attributes)]


def check_rows(
    dataset: Dataset,
    folder: Path,
    attributes: Sequence[str],
    *,
    objective: str = "ranking",
) -> None:
    """Check before a model is loaded that rows say which answer is better; pictures are not read.

    Raises:
        ValueError: names the setting, what rows lack, and what to do.
    """
    if len(set(attributes)) < len(attributes) or not attributes:
        raise ValueError(f"attributes are {list(attributes)}; give each score one name of its own, at least one.")
    told = 0
    for row in dataset.select_columns(["id", "meta"]):
        if objective == "regression":
            scores_of(row, attributes)
        told += any(directions(row, attributes))
    if objective == "ranking" and not told:
        raise ValueError(
            f"in all {len(dataset)} pairs of {folder} both answers have the same scores, so none says which is better. Take "
            "pairs with different scores, or `objective: regression`."
        )


def check_pictures(dataset: Dataset, folder: Path, *, rejected_pictures: bool) -> None:
    """Check that rejected answers are shown with the pictures that they are about.

    Raises:
        ValueError: there are pairs `on_two_pictures`, and they are not.
    """
    apart = sum(on_two_pictures(folder))
    if apart and not rejected_pictures:
        raise ValueError(
            f"{apart} of the {len(dataset)} pairs of {folder} reject an answer about `rejected_images`, which would be shown "
            "with `images`, where it may be right. Set rejected_pictures to true."
        )


def check_settings(dataset: Dataset, folder: Path, *, margins: bool, rejected_pictures: bool) -> None:
    """Check that some row to train on has what a setting uses; held-out pairs may come from another method.

    Raises:
        ValueError: names the setting, and what to do.
    """
    if margins and not any(dataset["margin"]):
        raise ValueError(
            f"margins is true, and none of the {len(dataset)} pairs of {folder} has a `margin`. Leave it out, or take "
            "scored pairs."
        )
    if rejected_pictures and rows_without(dataset, "rejected_images") == len(dataset):
        raise ValueError(
            f"rejected_pictures is true, and none of the {len(dataset)} pairs of {folder} has `rejected_images`. Leave it out, "
            "or make such pairs (`prefalign run image_contrast`)."
        )


@dataclass
class Fit:
    """Which rows fit. `rows_in == rows_used + len(too_long)`.

    Attributes:
        rows_in: rows looked at.
        rows_used: rows kept.
        too_long: id to tokens of the longer side, for rows dropped.
        with_facts: rows kept that have facts to show.
    """

    rows_in: int
    rows_used: int = 0
    too_long: dict[str, int] = field(default_factory=dict)
    with_facts: int = 0

    def counts(self) -> dict[str, int]:
        """The numbers, as they go among a run's metrics."""
        return {"rows_in": self.rows_in, "rows_used": self.rows_used, "rows_too_long": len(self.too_long),
                "rows_with_facts": self.with_facts}  # fmt: skip

    def summary(self) -> str:
        """What was dropped, why, what would keep it, and how many rows have facts."""
        parts = []
        if self.too_long:
            some = ", ".join(list(self.too_long)[:5]) + (" ..." if len(self.too_long) > 5 else "")
            parts.append(
                f"dropped {len(self.too_long)} of {self.rows_in} rows longer than max_length ({some}); max_length "
                f"{max(self.too_long.values())} keeps all of them"
            )
        return "; ".join([*parts, f"{self.with_facts} have facts"])


def keep_fitting(dataset: Dataset, collator: RewardCollator, max_length: int | None) -> tuple[Dataset, Fit]:
    """Drop rows of which a side is longer than `max_length`, facts and rating turn included; with None nothing is measured.

    Raises:
        ValueError: no row is left.
    """
    fit, keep = Fit(rows_in=len(dataset)), []
    texts = dataset.remove_columns(["images", "rejected_images"])
    for index, row in enumerate(progress_bar(texts, desc="check rows", unit="row")):
        if max_length is not None and (length := collator.longest(dataset[index])) > max_length:
            fit.too_long[row["id"]] = length
            continue
        fit.with_facts += collator.facts and bool(collator.rating.facts_of({"facts": as_mapping(row["facts"])}))
        keep.append(index)
    fit.rows_used = len(keep)
    if not keep:
        raise ValueError(
            f"no row fits max_length {max_length}: the shortest needs {min(fit.too_long.values())}, and max_length "
            f"{max(fit.too_long.values())} keeps all. Pictures, answers and rating turns are never cut. Raise max_length, or "
            "leave it out."
        )
    return (dataset if len(keep) == len(dataset) else dataset.select(keep)), fit
