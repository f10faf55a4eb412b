"""ORPO: imitate the chosen answer, and raise its odds over the rejected one's; no reference.

Source:
    ORPO, arXiv 2403.07691, eq. 6 and 7.
Equation:
    NLL(y_w) + lam * -log sigmoid(logit p(y_w) - logit p(y_l)), p(y) = exp(mean over tokens of log pi),
    logit p = log(p / (1 - p)), NLL the mean over the answer's tokens.
Differs from the authors' code:
    Theirs, and TRL's for texts, take the NLL over the prompt too, and over all tokens of a batch; here the answer's tokens of
    each row. TRL calls lam `beta`.
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
class ORPO:
    """Negative log-likelihood and an odds ratio.

    Attributes:
        lam: weight of the odds ratio.
    """

    lam: float = 0.1

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    views: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    logits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.lam < math.inf:
            raise ValueError(
                f"lam is {self.lam}; it weighs the odds ratio and is above 0 (published: 0.1). For imitation alone take the term "
                "`text` with trainer.loss_type [sft]"
            )

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        chosen, rejected = (scores[view].logps.sum(dim=1) / scores[view].lengths() for view in self.views)
        log_odds = _logit(chosen) - _logit(rejected)
        return -chosen - self.lam * logsigmoid(log_odds), {
            "nll": -chosen.detach(),
            "log_odds": log_odds.detach(),
            "accuracies": (log_odds > 0).float(),
        }


def _logit(mean_logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps), (B,); finite where rounding has made p 1."""
    mean_logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return mean_logps - torch.log(-torch.expm1(mean_logps))
