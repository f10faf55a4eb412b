"""Drawing the next token with noise that belongs to the row, whatever batch it is in.

Legend of shapes: `B` rows of a batch, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from prefalign.engines import Contrast, Request, Sampling
from prefalign.records import row_seed


class RowNoise(LogitsProcessor):
    """Ban tokens, apply temperature, top-k and top-p, and add Gumbel noise, whose argmax is a draw from the softmax."""

    def __init__(self, requests: Sequence[Request], sampling: Sampling, banned: list[int], words: int, width: int):
        self.seeds = torch.tensor([row_seed(request.seed, request.id) for request in requests])
        self.sampling = sampling
        self.banned = banned
        self.words = words
        self.width = width
        self.warpers: list[Any] = []
        if sampling.top_k > 0:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = ban(scores, self.banned, self.words)
        if self.sampling.temperature == 0:
            return scores
        scores = scores / self.sampling.temperature
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        self.seeds = self.seeds.to(scores.device)
        return scores + gumbel_noise(self.seeds, input_ids.shape[1] - self.width, scores.shape[1])


class RepetitionPenalty(LogitsProcessor):
    """transformers' repetition penalty, but for the padding: a batch does not decide what a row says.

    transformers counts padding as said; leaving it out is an argument of its processor in late 5.x only.

    Args:
        penalty: above 1 makes tokens of the prompt and of the answer so far less likely.
        attention_mask: (B, T) of the prompts, padded on the left.
    """

    def __init__(self, penalty: float, attention_mask: torch.Tensor):
        self.penalise = RepetitionPenaltyLogitsProcessor(float(penalty))
        self.starts = (attention_mask != 0).int().argmax(1, keepdim=True)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        padding = places < self.starts
        # a row's first token has been said anyway
        return self.penalise(torch.where(padding, input_ids.gather(1, self.starts), input_ids), scores)


def ban(scores: torch.Tensor, banned: list[int], words: int) -> torch.Tensor:
    """Scores (B, V) with minus infinity, in place, at tokens that no answer holds and at entries that are no token."""
    scores[:, banned] = float("-inf")
    scores[:, words:] = float("-inf")  # rows that round the embedding up to a multiple have no token
    return scores


def gumbel_noise(seeds: torch.Tensor, step: int, size: int) -> torch.Tensor:
    """Standard Gumbel noise as a pure function of (seed, step, index), the same on every device.

    The bits are those of SplitMix64 (Steele, Lea and Flood 2014), keyed by seed and step and counted by index.

    Args:
        seeds: (B,) int64, one of each row.
        step: number of the generated token.
        size: V.

    Returns:
        (B, V) float32.
    """
    keys = _mix(seeds + _wrap(step * 0xD1342543DE82EF95 + 1))
    counts = torch.arange(1, size + 1, device=seeds.device) * _wrap(0x9E3779B97F4A7C15)
    bits = (_mix(keys[:, None] + counts) >> 11) & (2**53 - 1)
    # float32 keeps small u exactly; they are the large noise that decides
    uniform = ((bits.float() + 0.5) * 2.0**-53).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _wrap(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _mix(value: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ ((value >> shift) & (2 ** (64 - shift) - 1))) * _wrap(factor)
    return value ^ ((value >> 31) & (2**33 - 1))


def check_sampling(sampling: Sampling) -> None:
    """Raise `ValueError` for a setting that means nothing, with its name and value."""
    layer = sampling.attention_layer
    problems = [
        (sampling.max_new_tokens < 1, f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}"),
        (sampling.temperature < 0, f"temperature must be 0 (greedy) or more, got {sampling.temperature}"),
        (not 0 < sampling.top_p <= 1, f"top_p must be in (0, 1], got {sampling.top_p}; 1 cuts nothing"),
        (sampling.top_k < 0, f"top_k must be 0 (cuts nothing) or more, got {sampling.top_k}"),
        (sampling.repetition_penalty <= 0, f"repetition_penalty must be above 0, got {sampling.repetition_penalty}"),
        (
            not (layer is None or layer == "middle" or isinstance(layer, int)),
            f"attention_layer must be the number of a decoder layer, `middle`, or null to measure nothing, got {layer!r}",
        ),
        (
            layer is not None and sampling.contrast is not None,
            (
                "attention_layer and contrast cannot be set together: of a contrasted answer's two passes one has no picture. "
                "Leave attention_layer out, and give the answers to `attention` afterwards"
            ),
        ),
    ]
    for wrong, message in [*problems, *_contrast_problems(sampling.contrast)]:
        if wrong:
            raise ValueError(message + ".")


def _contrast_problems(contrast: Contrast | None) -> list[tuple[bool, str]]:
    if contrast is None:
        return []
    cap = contrast.max_weight
    return [
        (
            contrast.decay < 0,
            f"contrast.decay must be 0 (corrects nothing) or more, got {contrast.decay}; as published 0.02",
        ),
        (
            contrast.gate < 0,
            f"contrast.gate must be 0 (never acts) or more, got {contrast.gate}; above 1 it always acts",
        ),
        (contrast.offset < 0, f"contrast.offset counts tokens and must be 0 or more, got {contrast.offset}"),
        (cap is not None and cap < 0, f"contrast.max_weight must be 0 or more, got {cap}; null caps nothing"),
        (
            not 0 <= contrast.plausible <= 1,
            f"contrast.plausible must be in [0, 1], got {contrast.plausible}; 0 keeps all",
        ),
        (
            contrast.without not in ("removed", "hidden"),
            f"contrast.without must be removed or hidden, got {contrast.without!r}",
        ),
    ]
