"""Before a round: do engine and trainer agree on the policy, token by token, and how far has it moved from the reference.

An engine that samples from other weights than those that train (a server that was not refreshed, another precision, another
template) makes every pair off-policy without a word. Legend of shapes: `T` tokens of an answer, end of turn included.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from prefalign import families
from prefalign.engines import Engine, Request
from prefalign.training.collator import PreferenceCollator
from prefalign.training.forward import share, unshare
from prefalign.training.routes import find_route
from prefalign.training.scoring import FIELDS, run

DEFAULT_BOUND = {"float32": 0.01, "float16": 0.2, "bfloat16": 0.5}
"""Largest gap of one token's log-prob that the precision of the weights explains."""


class EngineGap(RuntimeError):
    """Engine and trainer do not agree on the policy."""


@dataclass(frozen=True)
class Gap:
    """How far an engine's log-probs are from the trainer's.

    Attributes:
        mean: mean absolute difference over tokens, in nats.
        largest: the largest of one token.
        tokens: tokens compared.
        answers: answers they are of.
    """

    mean: float
    largest: float
    tokens: int
    answers: int


def trainer_logprobs(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    answers: Sequence[str],
    *,
    autocast: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Log-probs of answers as preference training computes them: its collator, its shared layout, TRL's head.

    Args:
        model: the policy; it is left as it was found, in eval mode.
        processor: its processor.
        requests: the prompts.
        answers: one text each.
        autocast: precision of `trainer.bf16` or `trainer.fp16`.

    Returns:
        One float32 tensor (T,) per request, on the CPU.
    """
    from trl.trainer.utils import add_fused_lm_head

    base = families.core(model)
    text = base.config.get_text_config()
    attention = text._attn_implementation
    unshare(model)
    route = find_route(model)
    collator = PreferenceCollator(
        processor, ("chosen",), layout=route.layout, image_token_id=families.image_token_ids(base.config)[0]
    )
    add_fused_lm_head(base, outputs=FIELDS)
    share(model, route.layout)
    training = model.training
    model.eval()
    precision = torch.autocast(base.device.type, autocast) if autocast is not None else nullcontext()
    found = []
    try:
        for request, answer in zip(requests, answers, strict=True):
            turn = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            row = {
                "id": request.id,
                "images": request.images,
                "prompt": request.messages,
                "chosen": turn,
                "rejected": turn,
            }
            batch = _on(base.device, collator([row]))
            with torch.no_grad(), precision:
                values = run(model, batch)["log_probs"]
            found.append(values[batch["index"]["chosen"]].float().cpu())
    finally:
        unshare(model)
        text._attn_implementation = attention
        model.train(training)
    return found


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(device, item) for key, item in value.items()}
    return value


def token_gap(
    engine: Engine, requests: Sequence[Request], answers: Sequence[str], trained: Sequence[torch.Tensor]
) -> Gap:
    """Difference of an engine's log-probs of some answers from the trainer's.

    Args:
        engine: any engine with `logprobs`.
        requests: the prompts.
        answers: one text each.
        trained: the trainer's log-probs, (T,) each.

    Raises:
        EngineGap: an engine cuts an answer into other tokens, or one of the two cannot score it.
    """
    return gap_of(requests, engine.logprobs(requests, answers), trained)


def gap_of(requests: Sequence[Request], scored: Sequence[torch.Tensor], trained: Sequence[torch.Tensor]) -> Gap:
    """Difference of two sets of log-probs of the same answers.

    Args:
        requests: the prompts.
        scored: the engine's log-probs, (T,) each.
        trained: the trainer's.

    Raises:
        EngineGap: as `token_gap`.
    """
    apart = []
    for request, live, kept in zip(requests, scored, trained, strict=True):
        if live.shape != kept.shape:
            raise EngineGap(
                f"the engine gives {len(live)} log-probs for the answer to {request.id} and the trainer {len(kept)}: they do not "
                "share tokenizer, chat template or prompt, so the engine does not sample from the policy that trains. Give both "
                "the same checkpoint folder."
            )
        if not (torch.isfinite(live).all() and torch.isfinite(kept).all()):
            side = "trainer" if torch.isfinite(live).all() else "engine"
            raise EngineGap(
                f"the {side} gives log-probs for the answer to {request.id} that are no numbers, so nothing says whether "
                "both have one policy, and training on them would spoil it. The weights may hold NaN, or float16 overflowed: "
                "start from whole weights, and load them in bfloat16 or float32 (`model.dtype`)."
            )
        apart.append((live - kept).abs())
    values = torch.cat(apart)
    return Gap(values.mean().item(), values.max().item(), len(values), len(apart))


def check_gap(gap: Gap, bound: float) -> None:
    """Stop a run whose engine does not have the policy's weights.

    Raises:
        EngineGap: the largest gap is above the bound, or no number.
    """
    if not gap.largest <= bound:  # NaN is above every bound
        raise EngineGap(
            f"engine and trainer differ by up to {gap.largest:.3g} nats on one token (mean {gap.mean:.3g} over {gap.tokens}), "
            f"above the bound of {bound}: the engine samples from another policy than the one that trains. Refresh its weights "
            "and give both one precision, or raise `check.bound` if the precision explains it."
        )


@dataclass(frozen=True)
class Divergence:
    """KL of a policy to its reference, estimated on the policy's own samples.

    Attributes:
        kl: per answer, in nats.
        kl_per_token: per token.
        answers: answers it was estimated on.
    """

    kl: float
    kl_per_token: float
    answers: int


def divergence(policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> Divergence:
    """KL from log-probs of the policy's own samples, drawn at temperature 1 and not filtered.

    Equation: mean over answers of the sum over tokens of exp(-d) - 1 + d, d = log pi - log pi_ref (Schulman's k3): as unbiased as
    the mean of d, never negative, and of far less variance.

    Args:
        policy: per answer (T,) under the policy.
        reference: the same under the reference.
    """
    differences = [one - other for one, other in zip(policy, reference, strict=True)]
    tokens = sum(len(values) for values in differences)
    total = sum((torch.exp(-values) - 1 + values).sum().item() for values in differences)
    return Divergence(total / max(len(differences), 1), total / max(tokens, 1), len(differences))
