"""STIC's regulariser: the chosen answers stay likely. Added to `text`.

Source:
    STIC, arXiv 2405.19716, stage 1; alpha from the released `stic/dpo_trainer.py`. Stage 1 is `text` + this.
Equation:
    -alpha * sum over the answer's tokens of log pi(y_w | x, images). With `text`: ln 2 - log pi(y_w) / 1024 at the start.
Differs from the authors' code:
    Nothing in this part. (Their rejected log-prob is not that of the rejected answer; `text` is the paper's form.) TRL's `sft`
    is a mean over tokens instead of this sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefalign.losses.term import Scores


@dataclass(frozen=True)
class STIC:
    """A small negative log-likelihood of the chosen answer.

    Attributes:
        alpha: its weight on the summed log-prob.
    """

    alpha: float = 1 / 1024

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    views: ClassVar[tuple[str, ...]] = ("chosen",)
    logits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(
                f"alpha is {self.alpha}; it weighs a log-likelihood, and at 0 or below it would train nothing or make the chosen "
                "answers unlikely. The published one is 1/1024 (0.0009765625)"
            )

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        logps = scores["chosen"].logps.sum(dim=1)
        return -self.alpha * logps, {"logps": logps.detach()}
