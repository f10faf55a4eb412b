"""Attention over documents whose branches do not see each other: split into plain calls, or as a dense mask.

`split` (the default) runs one `scaled_dot_product_attention` per branch, over its prompt and itself; nothing of size S x S is
built, and documents cost what they cost alone. Families that read pictures or prompts in both directions, or through windows
(Gemma 3, PaliGemma), get `dense_masks` with one document per row.

Legend of shapes: `H` heads, `S` tokens of the row, `P` of a prompt, `B` of a branch, `E` width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefalign.training.layout import Layout

SPLIT = "prefalign_split"
"""Name under which `split_attention` is registered; without a layout it is transformers' own sdpa."""


def split_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    prefix_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; with `prefix_layout`, one causal call per branch.

    Args:
        module: the attention module.
        query: (1, H, S, E).
        key: (1, H or fewer, S, E).
        value: as `key`.
        attention_mask: ignored with a layout.
        dropout: probability.
        scaling: of the scores.
        prefix_layout: the documents of the row.

    Returns:
        (1, S, H, E) and None.
    """
    if prefix_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    sizes = []
    for prompt, branches in prefix_layout.documents:
        sizes += [prompt + branches[0], *branches[1:]]
    # one split per tensor: its backward is one cat, where slices would cost the square of the documents
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    masks = _branch_masks(prefix_layout, query.device)
    outputs, at = [], 0
    for number, (prompt, branches) in enumerate(prefix_layout.documents):
        trunk_key, trunk_value = keys[at], values[at]
        outputs.append(
            scaled_dot_product_attention(
                queries[at], _repeat(trunk_key, groups), _repeat(trunk_value, groups), dropout_p=dropout,
                is_causal=True, scale=scaling,
            )
        )  # fmt: skip
        for branch, tokens in enumerate(branches[1:], start=1):
            own = at + branch
            if tokens == 0:
                outputs.append(queries[own])
                continue
            branch_key = torch.cat([trunk_key[:, :, :prompt], keys[own]], dim=2)
            branch_value = torch.cat([trunk_value[:, :, :prompt], values[own]], dim=2)
            outputs.append(
                scaled_dot_product_attention(
                    queries[own], _repeat(branch_key, groups), _repeat(branch_value, groups),
                    attn_mask=masks[number, branch], dropout_p=dropout, scale=scaling,
                )
            )  # fmt: skip
        at += len(branches)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _repeat(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """Key or value heads, each as often as query heads share it."""
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)


def _branch_masks(layout: Layout, device: torch.device) -> dict[tuple[int, int], Any]:
    """Per document and further branch, a causal mask aligned at the lower right, made once and used by all layers.

    `is_causal=True` aligns at the upper left, which is wrong where there are more keys than queries.
    """
    kept = layout.masks.get("branches")
    if kept is None:
        kept = {
            (number, branch): _lower_right(tokens, prompt + tokens, device)
            for number, (prompt, branches) in enumerate(layout.documents)
            for branch, tokens in enumerate(branches)
            if branch and tokens
        }
        layout.masks["branches"] = kept
    return kept  # type: ignore[return-value]


def _lower_right(queries: int, keys: int, device: torch.device) -> Any:
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(queries, keys)  # the flash kernel knows this one; a tensor it would refuse
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


AttentionInterface.register(SPLIT, split_attention)
AttentionMaskInterface.register(SPLIT, sdpa_mask)


def dense_masks(
    layout: Layout,
    blocks: torch.Tensor,
    *,
    window: int | None,
    window_everywhere: bool = False,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Who sees whom, one document per row.

    A token sees what is before it in its prompt and its branch, all of its own block, and in sliding layers only what is
    less than `window` positions before it.

    Args:
        layout: documents, one per row.
        blocks: (R, S) int64; tokens of equal number >= 0 see each other in both directions (a picture in Gemma 3, the whole
            prompt in PaliGemma); -1: none.
        window: width of the sliding layers' window in positions; None: the family has no such layers.
        window_everywhere: Gemma 3 windows its picture blocks too; PaliGemma does not.

    Returns:
        (R, 1, S, S) bool, or with a window {"full_attention", "sliding_attention"} of such.
    """
    device, rows, width = blocks.device, len(layout.documents), layout.width
    branch = torch.full((rows, width), -1, device=device)
    position = torch.zeros((rows, width), dtype=torch.long, device=device)
    for row, (prompt, branches) in enumerate(layout.documents):
        branch[row, :prompt], position[row, :prompt] = 0, torch.arange(prompt, device=device)
        at = prompt
        for number, tokens in enumerate(branches, start=1):
            branch[row, at : at + tokens] = number
            position[row, at : at + tokens] = prompt + torch.arange(tokens, device=device)
            at += tokens
    same_line = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    real = (branch[:, None, :] >= 0) & (branch[:, :, None] >= 0)
    before = position[:, None, :] <= position[:, :, None]
    block = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0)
    alone = torch.eye(width, dtype=torch.bool, device=device)  # padding sees itself: no row of a softmax is empty
    full = (same_line & real & before) | (block & real)
    if window is None:
        return (full | alone)[:, None]
    near = position[:, :, None] - position[:, None, :] < window
    sliding = full & near if window_everywhere else (same_line & real & before & near) | (block & real)
    return {"full_attention": (full | alone)[:, None], "sliding_attention": (sliding | alone)[:, None]}
