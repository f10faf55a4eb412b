"""Which way a model can take: documents in one row with split attention, one per row with a dense mask, or TRL's layout."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from prefalign import families

BOTH_WAYS = frozenset({"gemma3", "paligemma"})
"""Families that read pictures (Gemma 3) or the whole prompt (PaliGemma) in both directions."""


@dataclass(frozen=True)
class Route:
    """How a model's documents are run.

    Attributes:
        layout: `split`, `mask` or `plain`.
        reason: for `plain`, why nothing can be shared; else empty.
    """

    layout: Literal["split", "mask", "plain"]
    reason: str = ""


def find_route(model: Any, fast_path: Literal["auto", "off"] = "auto") -> Route:
    """The fastest exact route of a model, read off its config and its forward's signature.

    Args:
        model: a transformers model, with or without an adapter.
        fast_path: `off` always takes the plain route.
    """
    if fast_path == "off":
        return Route("plain", "fast_path is off")
    base = families.core(model)
    config = base.config
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    recurrent = sorted(kinds - {"full_attention", "sliding_attention"})
    if recurrent:
        return Route(
            "plain",
            f"its layers {', '.join(recurrent)} carry a state from token to token, which no mask stops at the end of an answer",
        )
    if families.cross_attends(config):
        return Route("plain", "its pictures reach the language model beside the prompt")
    if "mm_encoder_outputs" not in inspect.signature(type(base.model).forward).parameters:
        return Route("plain", "its forward takes no encoded pictures (mm_encoder_outputs)")
    if config.model_type not in families.TESTED:
        return Route("plain", f"the family {config.model_type!r} is not among those whose shared path is tested")
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if getattr(text, "_attn_implementation", "sdpa") not in ("sdpa", "prefalign_split"):
        return Route("plain", f"it runs with attention {text._attn_implementation!r}, and sharing needs 'sdpa'")
    if config.model_type in BOTH_WAYS:
        return Route("mask")
    if window is not None or "sliding_attention" in kinds:
        return Route("plain", f"its attention looks back {window} positions only, counted in the row")
    return Route("split")
