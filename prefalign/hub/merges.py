"""What `merge.json` says of a merged model, for a model card: what it started from, what went in, how, under which licences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefalign.merged_folders import MERGE_FILE

PAPERS = {
    "merge_adapter": ("LoRA", "2106.09685"),
    "merge_llm": ("Aya Vision", "2505.08751"),
    "ties": ("TIES", "2306.01708"),
    "dare": ("DARE", "2311.03099"),
}
"""Names and arXiv ids, by stage and by a word in the method."""


def read_merge(folder: Path) -> dict[str, Any] | None:
    """The `merge.json` of a folder that `merge_adapter` or `merge_models` wrote, or None."""
    file = folder / MERGE_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def start_of(merge: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of what a merge started from: the adapters' base, the models' base, else the first model."""
    if merge["stage"] == "merge_adapter":
        return dict(merge["base"])
    sources: Sequence[Mapping[str, Any]] = merge["sources"]
    return sources[-1] if merge.get("base") is not None else sources[0]


def hub_ids(merge: Mapping[str, Any]) -> list[str]:
    """Hub ids of the full models that went in and came from there."""
    return [record["name"] for record in _records(merge) if record["revision"] is not None]


def licences(merge: Mapping[str, Any]) -> dict[str, str]:
    """The licence that each part's README names, for those that name one."""
    return {
        record["name"]: record["license"]
        for record in (*_records(merge), *merge.get("adapters", ()))
        if record.get("license")
    }


def merge_words(merge: Mapping[str, Any]) -> str:
    """The mixture in words and as a formula.

    Args:
        merge: `merge.json`, machine paths taken out.
    """
    if merge["stage"] == "merge_adapter":
        return _adapter_words(merge)
    density = f", density {merge['density']:g}" if merge.get("density") is not None else ""
    method = "" if merge["method"] == "linear" else f", by {merge['method']}{density}"
    names = [f"`{record['name']}`" for record in merge["sources"]]
    if merge["stage"] == "merge_llm":
        share = f"{merge['alpha']:g} of {names[0]} and {1 - merge['alpha']:g} of {names[1]}"
        return f"a merge of the language model, {share}{method}; the other weights are those of {names[0]}"
    if merge.get("base") is None:
        return f"a weighted mean of models, {_mixture(names, merge['weights'])}"
    changes = _mixture(names[:-1], merge["weights"])
    return f"a merge: the base and {merge['alpha']:g} times the change from it to {changes}{method}"


def merge_papers(merge: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and arXiv ids of what a merge follows."""
    how = str(merge.get("method") or merge.get("combination_type") or "")
    return [paper for key, paper in PAPERS.items() if key == merge["stage"] or key in how]


def _adapter_words(merge: Mapping[str, Any]) -> str:
    names = [f"`{record['name']}`" for record in merge["adapters"]]
    scale = "" if merge["scale"] == 1 else f", multiplied by {merge['scale']:g} in the language model"
    if len(names) == 1:
        return f"the LoRA adapter {names[0]} merged into its base{scale}"
    density = f", density {merge['density']:g}" if merge.get("density") is not None else ""
    mixture = _mixture(names, merge["weights"])
    return f"LoRA adapters merged into their base, {mixture}, combined by {merge['combination_type']}{density}{scale}"


def _mixture(names: Sequence[str], weights: Sequence[float]) -> str:
    return " + ".join(
        name if weight == 1 else f"{weight:.3g} x {name}" for name, weight in zip(names, weights, strict=True)
    )


def _records(merge: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [merge["base"]] if merge["stage"] == "merge_adapter" else merge["sources"]
