"""Masked generation the slow way: one row, no cache, an explicit 4-D mask and explicit positions at every step."""

from __future__ import annotations

import torch

from prefalign import families
from prefalign.engines import ImageMask

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def hidden_places(input_ids: torch.Tensor, mask: ImageMask, config) -> torch.Tensor:
    """(T,) bool: the image tokens that a mask hides, by its definition: uniform draw of each below the share."""
    hidden = torch.zeros(len(input_ids), dtype=torch.bool)
    places = (input_ids == config.image_token_id).nonzero().squeeze(1)
    hidden[places] = torch.rand(len(places), generator=torch.Generator().manual_seed(mask.seed)) < mask.share
    return hidden


def greedy(
    model, processor, text: str, images, hide: ImageMask, steps: int, banned: list[int]
) -> tuple[list[int], torch.Tensor]:
    """Tokens and (steps, V) logits of one prompt whose hidden image tokens no later position may see."""
    batch = dict(processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt"))
    ids = batch["input_ids"]
    hidden = hidden_places(ids[0], hide, model.config)
    positions = families.position_ids(model, batch)
    types = batch.get("mm_token_type_ids")
    extra = {key: value for key, value in batch.items() if key not in PER_TOKEN}
    block = torch.zeros(ids.shape[1], dtype=torch.long)
    if "token_type_ids" in batch:  # Gemma3: the tokens of one picture see each other, later ones too
        image = batch["token_type_ids"][0] == 1
        block = torch.where(image, (image & ~torch.nn.functional.pad(image, (1, 0))[:-1]).cumsum(0), 0)
    chosen, logits = [], []
    for _ in range(steps):
        size = ids.shape[1]
        seen = torch.ones(size, size, dtype=torch.bool).tril()
        grown = torch.nn.functional.pad(block, (0, size - len(block)))
        seen |= (grown[:, None] == grown[None, :]) & (grown > 0)[:, None]
        seen &= ~torch.cat([hidden, torch.zeros(size - len(hidden), dtype=torch.bool)])[None, :]
        seen |= torch.eye(size, dtype=torch.bool)  # a hidden token sees itself; nobody else sees it
        more = (
            {} if types is None else {"mm_token_type_ids": torch.nn.functional.pad(types, (0, size - types.shape[1]))}
        )
        with torch.no_grad():
            out = model(
                input_ids=ids, attention_mask=seen[None, None], position_ids=positions, use_cache=False, **extra, **more
            ).logits[0, -1]
        logits.append(out.clone())
        out[banned] = float("-inf")
        chosen.append(int(out.argmax()))
        ids = torch.cat([ids, out.argmax()[None, None]], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
    return chosen, torch.stack(logits)
