"""Replies -> scored items, with no model and no picture; `items.jsonl` keeps them, so that any two runs can be compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefalign.evals import Item, Prediction, Scored, attributes, chair, reliance, yesno
from prefalign.evals.reading import read_jsonl
from prefalign.manifest import write_atomically


def score_all(
    items: Sequence[Item],
    variants: Sequence[reliance.Variant],
    replies: Sequence[Prediction],
    vocabularies: Mapping[str, chair.Vocabulary],
) -> list[Scored]:
    """One row per item, and one per probed item; an item without a reply is an error, not a score."""
    by_key = {(reply.eval, reply.id): reply for reply in replies}
    scored = []
    for item in items:
        reply = by_key.get((item.eval, item.id))
        if item.eval == "chair":
            scored.append(chair.score(item, reply, vocabularies[item.id]))
        else:
            scored.append(yesno.score(item, reply) if item.eval == "yesno" else attributes.score(item, reply))
    probed: dict[tuple[str, str], dict[str, Prediction]] = {}
    for variant in variants:
        reply = by_key.get((variant.eval, variant.id))
        if reply is not None and variant.condition != "true":
            probed.setdefault((variant.item.eval, variant.item.id), {})[variant.condition] = reply
    labels = reliance.shown_labels(items)
    for item in items:
        conditions = probed.get((item.eval, item.id))
        if conditions:
            true = by_key.get((item.eval, item.id))
            together = {**({"true": true} if true is not None else {}), **conditions}
            scored.append(reliance.score(item, together, labels))
    return scored


def write_items(path: Path, scored: Sequence[Scored]) -> None:
    """`items.jsonl`: eval, id, group, kind, status, parsed and the named numbers of each item."""
    rows = []
    for item in scored:
        row = dataclasses.asdict(item)
        rows.append({**{key: value for key, value in row.items() if key != "numbers"}, **row["numbers"]})
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_items(path: Path) -> list[Scored]:
    """Scored items of a finished evaluation.

    Raises:
        ValueError: if a line is cut off or is not a scored item.
    """
    named = {entry.name for entry in dataclasses.fields(Scored)} - {"numbers"}
    found = []
    for _, row in read_jsonl(path, required=sorted(named)):
        numbers = {key: value for key, value in row.items() if key not in named}
        found.append(Scored(**{key: row[key] for key in named}, numbers=numbers))
    return found
