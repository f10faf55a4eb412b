"""M3ID the slow way: one row, no cache, two whole forward passes for each token, the formula in float64."""

from __future__ import annotations

import math

import torch

from prefalign import families
from prefalign.engines import Contrast
from prefalign.records import without_images
from tests.masked_reference import PER_TOKEN


def next_logits(engine, text: str, images: list, chosen: list[int], *, hidden: bool = False) -> torch.Tensor:
    """(V,) float64 logits after a prompt and the tokens chosen so far, from one forward pass over all of them."""
    batch = dict(
        engine.processor(
            text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt"
        )
    )
    batch.pop("labels", None)
    prompt = batch["input_ids"]
    positions = families.position_ids(engine.model, batch)
    grown = torch.arange(1, len(chosen) + 1)
    batch["position_ids"] = torch.cat([positions, positions[..., -1:] + grown.expand(*positions.shape[:-1], -1)], -1)
    if hidden:
        batch["attention_mask"] = batch["attention_mask"].masked_fill(prompt == engine.config.image_token_id, 0)
    suffix = {
        "input_ids": torch.tensor(chosen, dtype=torch.long),
        "attention_mask": torch.ones(len(chosen), dtype=torch.long),
    }
    causal = int(
        families.rewrites_prompt(engine.processor)
    )  # PaliGemma: what follows the prompt sees only what is before it
    for name in PER_TOKEN:
        if name in batch:
            more = suffix.get(name, torch.full((len(chosen),), causal if name == "token_type_ids" else 0))
            batch[name] = torch.cat([batch[name], more[None]], 1)
    with torch.no_grad():
        logits = engine.model(**batch, use_cache=False).logits[0, -1].double()
    families.clear_position_cache(engine.model)
    logits[engine.banned] = -math.inf
    logits[len(engine.tokenizer) :] = -math.inf
    return logits


def greedy(engine, request, contrast: Contrast, steps: int, *, way: str) -> tuple[list[int], list[torch.Tensor]]:
    """Chosen tokens and the (V,) float64 log-probs of the corrected scores they were chosen by."""
    text = families.render(engine.processor, request.messages, request.prefix)
    bare = families.render(engine.processor, without_images(request.messages), request.prefix)
    chosen: list[int] = []
    scores = []
    for step in range(steps):
        seeing = next_logits(engine, text, request.images, chosen).log_softmax(0)
        if way == "hidden":
            blind = next_logits(engine, text, request.images, chosen, hidden=True).log_softmax(0)
        else:
            blind = next_logits(engine, bare, [], chosen).log_softmax(0)
        weight = math.exp(contrast.decay * (step + contrast.offset)) - 1
        if contrast.max_weight is not None:
            weight = min(weight, contrast.max_weight)
        score = seeing.clone()
        if seeing.max().exp() < contrast.gate and weight > 0:
            known = seeing.isfinite()
            score[known] += weight * (seeing[known] - blind[known])
            if contrast.plausible:
                score[seeing.exp() < contrast.plausible * seeing.exp().max()] = -math.inf
        scores.append(score.log_softmax(0))
        if int(score.argmax()) in engine.ends:
            break
        chosen.append(int(score.argmax()))
    return chosen, scores
