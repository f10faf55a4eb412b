"""SimPO: mean log-prob per token as the reward, with a margin to reach and no reference.

Source:
    SimPO, arXiv 2405.14734, eq. 6.
Equation:
    -log sigmoid(beta / |y_w| * log pi(y_w) - beta / |y_l| * log pi(y_l) - gamma), |y| tokens, end of turn included.
Differs from the authors' code:
    They set gamma as a share of beta; here it is the equation's. TRL's CPO trainer, which offers it for texts only, starts from
    beta 0.1 and gamma 0.5; these defaults are of the paper's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.term import Scores


@dataclass(frozen=True)
class SimPO:
    """Length-normalised preference without a reference.

    Attributes:
        beta: scale of the mean log-prob; the paper takes 2 to 2.5. `trainer.beta`, meant for summed log-ratios, is not used.
        gamma: margin in units of the scaled reward; the paper takes 0.5 to 1.6.
    """

    beta: float = 2.0
    gamma: float = 1.0

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    views: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    logits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(
                f"gamma is {self.gamma}; the chosen answer has to win by that margin, which is 0 or more (the paper: 0.5 to 1.6)"
            )

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        chosen, rejected = (self.beta * scores[view].logps.sum(dim=1) / scores[view].lengths() for view in self.views)
        margins = chosen - rejected
        return -logsigmoid(margins - self.gamma), {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "margins": margins.detach(),
            "accuracies": (margins > 0).float(),
        }
