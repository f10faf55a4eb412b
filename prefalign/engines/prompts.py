"""Prompts: what cannot be put to a model, and their tensors, with token ids put after them or image tokens hidden in them.

Legend of shapes: `B` rows of a batch, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from prefalign import families
from prefalign.engines import Completion, ImageMask, Request
from prefalign.records import placeholder_count

if TYPE_CHECKING:
    from prefalign.engines.transformers import TransformersEngine
    from prefalign.engines.vllm import VllmEngine

_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def request_problem(request: Request, answer: str, engine: TransformersEngine | VllmEngine) -> str | None:
    """Why a request with an answer cannot be put to an engine's model, as far as that shows in its text; None if it can."""
    placeholders = placeholder_count(request.messages)
    if placeholders != len(request.images):
        return (
            f"request {request.id} has {placeholders} image placeholder(s) for {len(request.images)} picture(s). "
            "Write one for each picture."
        )
    hidden = request.image_mask
    if hidden is not None and not 0 <= hidden.share <= 1:
        return f"request {request.id}: the share of image tokens to hide must be in [0, 1], got {hidden.share}."
    if hidden is not None and "image_mask" not in engine.capabilities:
        return (
            f"request {request.id}: image tokens cannot be hidden from a {engine.config.model_type}, which reads pictures "
            "through cross-attention layers and not as tokens of the prompt: a mask would hide nothing. Use a model that has "
            "its picture among the tokens, such as LLaVA or Qwen-VL."
        )
    blocks = [block["text"] for message in request.messages for block in message["content"] if block["type"] == "text"]
    for text in (*blocks, request.prefix, answer):
        for token in engine.visual_tokens:
            if token in text:
                return (
                    f"request {request.id}: the text holds {token!r}, which the model reads as a place for a picture. "
                    "Take it out, or make it an image block."
                )
    return None


def check_answers(requests: Sequence[Request], answers: Sequence[str | Completion]) -> None:
    """Raise `ValueError` unless there is one answer for each request."""
    if len(requests) != len(answers):
        raise ValueError(f"there are {len(requests)} requests for {len(answers)} answers; give one answer to each.")


def with_tails(
    tensors: dict[str, torch.Tensor], tails: Sequence[Sequence[int]], *, pad: int, token_type: int
) -> dict[str, torch.Tensor]:
    """Append token ids to left-padded prompts and pad to the left again.

    Args:
        tensors: what the processor gave, per-token entries (B, T).
        tails: token ids of each row, some may be empty.
        pad: padding id.
        token_type: what `token_type_ids` says of the appended tokens, where the processor gives them.

    Returns:
        The same entries, the per-token ones as wide as the longest row is now.
    """
    lengths = tensors["attention_mask"].sum(1).tolist()
    width = max(length + len(tail) for length, tail in zip(lengths, tails, strict=True))
    fill = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}
    mark = {"attention_mask": 1, "token_type_ids": token_type, "mm_token_type_ids": 0}
    result = dict(tensors)
    for name in _PER_TOKEN:
        if name not in tensors:
            continue
        old = tensors[name]
        new = torch.full((len(tails), width), fill[name], dtype=old.dtype)
        for index, (length, tail) in enumerate(zip(lengths, tails, strict=True)):
            start = width - length - len(tail)
            new[index, start : start + length] = old[index, old.shape[1] - length :]
            if tail:
                new[index, start + length :] = torch.tensor(tail) if name == "input_ids" else mark[name]
        result[name] = new
    return result


def hidden_mask(tensors: dict[str, torch.Tensor], wanted: Sequence[ImageMask | None], config: Any) -> torch.Tensor:
    """Attention mask (B, T) with zeros also at the image tokens drawn to be hidden (BDHS, arXiv 2407.02477, eq. 6)."""
    mask = tensors["attention_mask"]
    if all(hide is None for hide in wanted):
        return mask
    mask = mask.clone()
    pieces = families.image_token_mask(tensors["input_ids"], config)
    for index, hide in enumerate(wanted):
        if hide is None:
            continue
        places = pieces[index].nonzero().squeeze(1)
        draw = torch.rand(len(places), generator=torch.Generator().manual_seed(hide.seed))
        mask[index, places[(draw < hide.share).to(places.device)]] = 0
    return mask
