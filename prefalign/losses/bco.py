"""Binary classifier optimisation: each answer against the running mean of all rewards, instead of against the other.

Source:
    BCO, arXiv 2404.04656, with its reward shift; the quality part of MPO, arXiv 2411.10442. TRL 1.16's `bco_pair` has no
    shift. MPO is `text` with `loss_type: [sigmoid, sft]` and `loss_weights: [0.8, 1.0]`, + 0.2 x this.
Equation:
    -log sigmoid(r_w - m) - log sigmoid(-(r_l - m)), r = beta * d, d = log pi - log pi_ref summed over the answer's tokens; m
    is the mean of all rewards so far, this batch and both sides included, without gradient. 2 ln 2 at the start.
Differs from the authors' code:
    The mean is over rows, not over means of batches, which is the same as long as batches are equal; all processes share one.
    An evaluation takes the mean as training left it, and adds nothing to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.term import Scores


@dataclass
class BCO:
    """Chosen rewards above, rejected rewards below the running mean, which is state of the run.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`.
    """

    beta: float | None = None

    per_row: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    logits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self._total, self._count = 0.0, 0

    @property
    def shift(self) -> float:
        """m: the mean of all rewards that training has seen, 0 before any."""
        return self._total / self._count if self._count else 0.0

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`. Where the policy has a gradient, the batch's rewards go into the running mean first."""
        assert self.beta is not None
        chosen, rejected = (self.beta * scores[view].logratios() for view in self.views)
        if chosen.requires_grad:
            self._add(torch.cat([chosen, rejected]).detach())
        losses = -logsigmoid(chosen - self.shift) - logsigmoid(self.shift - rejected)
        return losses, {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "shift": torch.full_like(chosen, self.shift).detach(),
            "accuracies": (chosen > rejected).float(),
        }

    def state_dict(self) -> dict[str, float | int]:
        """The running mean, as sum and count."""
        return {"total": self._total, "count": self._count}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Go on from a saved running mean."""
        self._total, self._count = float(state["total"]), int(state["count"])

    def _add(self, rewards: torch.Tensor) -> None:
        sums = torch.stack([rewards.sum(), rewards.new_tensor(rewards.numel())])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        total, count = sums.tolist()
        self._total, self._count = self._total + total, self._count + int(count)
