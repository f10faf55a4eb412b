"""Conditional image preference: the chosen answer on its picture against the same answer on the other picture.

Source:
    mDPO, arXiv 2406.11839, eq. 4 (L_CoPO); the same term is L_vDPO of Re-Align (rDPO), arXiv 2502.13146, eq. 1.
Equation:
    -log sigmoid(beta * [d(y_w | images) - d(y_w | rejected_images)]), d = log pi - log pi_ref summed over the answer's
    tokens, end of turn included. ln 2 at the start, and always ln 2 if both sides show the same picture.
Differs from the authors' code:
    mDPO draws a new crop in every forward, so its policy and its reference see different pictures; here both see the one
    stored in the pair, or drawn for it from (seed, id). Re-Align scores the top-1 or top-2 token instead of the label; here
    it is the label. mDPO is `text` + `visual` + `anchor`; rDPO is `text` + `visual`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.term import Scores


@dataclass(frozen=True)
class Visual:
    """The chosen answer must be likelier on its own picture.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`.
    """

    beta: float | None = None

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("chosen", "chosen_on_rejected_image")
    logits: ClassVar[tuple[str, ...]] = ()

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        assert self.beta is not None
        margins = self.beta * (scores["chosen"].logratios() - scores["chosen_on_rejected_image"].logratios())
        return -logsigmoid(margins), {"margins": margins.detach(), "accuracies": (margins > 0).float()}
