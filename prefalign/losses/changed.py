"""Which tokens of two answers differ: the segments that DDPO and CHiP weigh more.

Source: RLHF-V, arXiv 2312.00849; rule of the released code (`utils/diff_lib.py` of RLHF-V/RLAIF-V at 8da5b48). Unlike there, no
token counts as junk: Python's matcher would otherwise ignore the frequent tokens of answers of 200 tokens and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch

from prefalign.losses.term import Scores

MIN_BLOCK = 3


def changed_spans(one: Sequence[int], other: Sequence[int], *, min_block: int = MIN_BLOCK) -> list[tuple[range, range]]:
    """The spans in which two sequences differ, as positions in each.

    What lies between two matching blocks of at least `min_block` tokens is a span; it counts only if both sides have tokens in
    it, so pure insertions and deletions do not.

    Example:
        >>> changed_spans([1, 2, 3, 7, 4, 5, 6], [1, 2, 3, 8, 9, 4, 5, 6])
        [(range(3, 4), range(3, 5))]
    """
    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    spans, start, other_start = [], 0, 0
    for block in [*(block for block in blocks if block.size >= min_block), blocks[-1]]:
        span, other_span = range(start, block.a), range(other_start, block.b)
        if span and other_span:
            spans.append((span, other_span))
        start, other_start = block.a + block.size, block.b + block.size
    return spans


def changed_tokens(one: Scores, other: Scores, *, min_block: int = MIN_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the tokens of a row's two answers differ.

    Args:
        one: scores of any view of one answer side; only `ids` and `mask` are read.
        other: the same of the other side.
        min_block: shorter stretches of equal tokens count as changed.

    Returns:
        Two bool tensors of the shapes of `one.ids` and `other.ids`, False at padding.
    """
    marks, other_marks = torch.zeros_like(one.mask), torch.zeros_like(other.mask)
    for row, (tokens, other_tokens) in enumerate(zip(_tokens(one), _tokens(other), strict=True)):
        for span, other_span in changed_spans(tokens, other_tokens, min_block=min_block):
            marks[row, span.start : span.stop] = True
            other_marks[row, other_span.start : other_span.stop] = True
    return marks, other_marks


def _tokens(scores: Scores) -> list[list[int]]:
    lengths = scores.mask.sum(dim=1).tolist()
    return [ids[:length] for ids, length in zip(scores.ids.tolist(), lengths, strict=True)]
