"""Anchor: the chosen answer must become likelier than it was at the start, whatever happens to the others.

Source:
    mDPO, arXiv 2406.11839, eq. 5 (L_AncPO); `below_zero` are the variants of its table 5.
Equation:
    -log sigmoid(beta * d(y_w | images) - delta) + sum over `below_zero` of -log sigmoid(-beta * d(view)),
    d = log pi - log pi_ref summed over the answer's tokens. ln 2 at the start for delta 0, and ln 2 more for each entry.
Differs from the authors' code:
    Nothing known. It is a term of its own here, so it can be added to any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.term import Scores


@dataclass(frozen=True)
class Anchor:
    """The chosen answer's reward must be positive.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`.
        delta: what the reward is to exceed, in units of the scaled reward; longer answers reach it sooner.
        below_zero: views whose reward is pushed below zero too; the paper's gains from them are mixed.
    """

    beta: float | None = None
    delta: float = 0.0
    below_zero: tuple[Literal["rejected", "chosen_on_rejected_image"], ...] = ()

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    logits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if len(set(self.below_zero)) < len(self.below_zero):
            raise ValueError(f"below_zero names a view twice: {', '.join(self.below_zero)}; once is enough")
        if not math.isfinite(self.delta):
            raise ValueError(f"delta is {self.delta}; a finite reward is to exceed it (published: 0)")

    @property
    def views(self) -> tuple[str, ...]:
        return ("chosen", *self.below_zero)

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        assert self.beta is not None
        reward = self.beta * scores["chosen"].logratios()
        losses = -logsigmoid(reward - self.delta)
        for view in self.below_zero:
            losses = losses - logsigmoid(-self.beta * scores[view].logratios())
        return losses, {"rewards": reward.detach(), "accuracies": (reward > self.delta).float()}
