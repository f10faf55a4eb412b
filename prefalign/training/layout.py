"""How documents lie in the rows of a forward pass: each prompt once, its answers as branches behind it.

A document is a prompt with its pictures and K answers to it. Its tokens are

    [ prompt | answer 1 without its last token | answer 2 without its last token | ... ]

and every branch goes on at the position after the prompt, so each answer is computed as if it followed the prompt alone. The
last prompt token predicts the first token of every branch; an answer's last token predicts nothing and is left out.

Source: prefix sharing for DPO, arXiv 2410.20305, which repeats the last prompt token in each branch; here the hidden state of
that token is gathered once per branch instead, so that a prompt that is read in both directions stays whole.

Legend of shapes: `D` documents, `R` rows of the forward pass, `S` tokens of a row, `N` labels of all branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Layout:
    """Where documents and labels lie.

    Attributes:
        documents: per document, tokens of its prompt and of each branch (one less than the answer has).
        one_row: all documents one after the other in one row (R = 1), or a row for each, padded at the right (R = D).
        width: `S`.
        label_rows: (N,) index into the flattened (R x S) positions, whose hidden state predicts the label.
        labels: (N,) token ids, document by document and branch by branch.
        masks: what `attention.py` needs of the device, made once per forward pass.
    """

    documents: list[tuple[int, tuple[int, ...]]]
    one_row: bool
    width: int
    label_rows: torch.Tensor
    labels: torch.Tensor
    masks: dict[str, object] = field(default_factory=dict)

    def to(self, device: torch.device) -> Layout:
        """The same with its tensors on a device."""
        return Layout(
            self.documents, self.one_row, self.width, self.label_rows.to(device), self.labels.to(device), self.masks
        )


def lay_out(prompts: Sequence[torch.Tensor], answers: Sequence[Sequence[torch.Tensor]], *, one_row: bool) -> Layout:
    """Lay documents out.

    Args:
        prompts: per document, (P,) token ids.
        answers: per document, the (A,) token ids of each of its answers, A >= 1.
        one_row: see `Layout`.
    """
    documents = [
        (len(prompt), tuple(len(answer) - 1 for answer in branches))
        for prompt, branches in zip(prompts, answers, strict=True)
    ]
    lengths = [prompt + sum(branches) for prompt, branches in documents]
    width = sum(lengths) if one_row else max(lengths)
    rows: list[torch.Tensor] = []
    start = 0
    for number, (prompt, branches) in enumerate(documents):
        if not one_row:
            start = number * width
        at = start + prompt
        for branch in branches:
            rows += [torch.tensor([start + prompt - 1]), torch.arange(at, at + branch)]
            at += branch
        start = at
    labels = torch.cat([answer for branches in answers for answer in branches])
    return Layout(documents, one_row, width, torch.cat(rows), labels)


def fill(
    layout: Layout,
    prompts: Sequence[torch.Tensor],
    branches: Sequence[Sequence[torch.Tensor]],
    *,
    padding: int,
) -> torch.Tensor:
    """A per-token tensor of the layout, (R, S) or (3, R, S).

    Args:
        layout: the layout.
        prompts: per document, the values over its prompt, (..., P).
        branches: per document and branch, the values over the whole answer, (..., A); the last is left out.
        padding: value where a row holds nothing.
    """
    pieces = [
        torch.cat([prompt, *(values[..., : values.shape[-1] - 1] for values in answers)], dim=-1)
        for prompt, answers in zip(prompts, branches, strict=True)
    ]
    if layout.one_row:
        return torch.cat(pieces, dim=-1).unsqueeze(-2)
    padded = [torch.nn.functional.pad(piece, (0, layout.width - piece.shape[-1]), value=padding) for piece in pieces]
    return torch.stack(padded, dim=-2)
