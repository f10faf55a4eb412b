"""Picture features of a rollout, computed once: cut by document, and put together again for each minibatch.

A family gives the features of a batch as one tensor (flat, or in tiles) or as a list (one entry for each picture), and
Qwen3-VL more of them for its first layers. Minibatches take documents in another order, so rows are cut by the image tokens of
each document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def split_features(features: Any, counts: Sequence[int]) -> list[dict[str, Any]]:
    """The features of each document.

    Args:
        features: what `encode_pictures` gave.
        counts: image tokens of each document, in the order of the batch.

    Returns:
        One mapping for each document, for `join_features`; empty for one without pictures.

    Raises:
        ValueError: features and image tokens disagree in number.
    """
    pooled = features.pooler_output
    flat = _flat(pooled)
    if sum(counts) != len(flat):
        raise ValueError(
            f"the pictures gave {len(flat)} features for {sum(counts)} image tokens of the prompts, so features would "
            "move to other places. The processor and the model do not belong together."
        )
    deep = [_flat(layer) for layer in getattr(features, "deepstack_features", None) or []]
    tile = pooled.shape[1:-1] if isinstance(pooled, torch.Tensor) else None
    parts: list[dict[str, Any]] = []
    for start, count in zip(_starts(counts), counts, strict=True):
        if count == 0:
            parts.append({})
            continue
        rows = slice(start, start + count)
        parts.append({"kind": type(features), "tile": tile, "pooled": flat[rows].clone(),
                      "deep": [layer[rows].clone() for layer in deep]})  # fmt: skip
    return parts


def join_features(parts: Sequence[dict[str, Any]]) -> Any:
    """The features of several documents as the model takes them; None where none holds a picture."""
    parts = [part for part in parts if part]
    if not parts:
        return None
    pooled = torch.cat([part["pooled"] for part in parts])
    tile = parts[0]["tile"]
    joined = parts[0]["kind"](pooler_output=[pooled] if tile is None else pooled.unflatten(0, (-1, *tile)))
    if parts[0]["deep"]:
        joined.deepstack_features = [
            [torch.cat([part["deep"][layer] for part in parts])] for layer in range(len(parts[0]["deep"]))
        ]
    return joined


def _starts(counts: Sequence[int]) -> list[int]:
    starts, at = [], 0
    for count in counts:
        starts.append(at)
        at += count
    return starts


def _flat(values: Any) -> torch.Tensor:
    pieces = [values] if isinstance(values, torch.Tensor) else list(values)
    return torch.cat([piece.flatten(0, -2) for piece in pieces])
