"""Conservative DPO: some pairs are expected to be labelled the wrong way round.

Source:
    E. Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023, eq. 4. TRL 1.16's `loss_type: robust` is
    another loss (arXiv 2403.00409), which subtracts the second part.
Equation:
    (1 - e) * -log sigmoid(beta * D) + e * -log sigmoid(-beta * D), D = d(y_w) - d(y_l), d = log pi - log pi_ref summed over the
    answer's tokens; least where sigmoid(beta * D) = 1 - e. ln 2 at the start.
Differs from the authors' code:
    None was released with the note; older TRL had this behind `label_smoothing` of its sigmoid loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.term import Scores


@dataclass(frozen=True)
class CDPO:
    """DPO with smoothed labels.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`.
        label_smoothing: e, the share of pairs taken to be labelled the wrong way round, from 0 (DPO) to below 0.5.
    """

    beta: float | None = None
    label_smoothing: float = 0.1

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    logits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; it is the share of wrong labels, from 0 to below 0.5: at a half the "
                "labels say nothing, above it they say the opposite"
            )

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        assert self.beta is not None
        margins = self.beta * (scores["chosen"].logratios() - scores["rejected"].logratios())
        losses = -(1 - self.label_smoothing) * logsigmoid(margins) - self.label_smoothing * logsigmoid(-margins)
        return losses, {"margins": margins.detach(), "accuracies": (margins > 0).float()}
