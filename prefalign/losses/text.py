"""Text preference: the chosen against the rejected answer on the same pictures, with any of TRL's `loss_type`s.

Source: DPO, arXiv 2305.18290, eq. 7 for `sigmoid`; the other losses and their papers are in TRL's paper index. Nothing is
rewritten here: the trainer hands this term's views to TRL's own `_compute_loss`, with `trainer.loss_type`,
`trainer.loss_weights` and all other settings of TRL. `loss_type: [sft]` is plain negative log-likelihood of the chosen answers
(mean over tokens), the control that a preference method has to beat; it needs no reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefalign.losses.term import Scores

LOSS_TYPES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip
"""TRL's, which learns of a wrong name in its first step only."""

REFERENCE_FREE = frozenset({"sft"})
"""TRL `loss_type`s that never look at the reference."""

COUPLED = frozenset({"sft", "aot", "aot_unpaired"})
"""TRL `loss_type`s in which rows of a batch depend on each other: a sort over the batch, a mean over all its tokens."""


@dataclass(frozen=True)
class Text:
    """TRL's losses on the two answers; their settings are TRL's, under `trainer`."""

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    logits: ClassVar[tuple[str, ...]] = ()

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Never called: the loss is TRL's."""
        raise AssertionError("the text term's loss is computed by TRL")
