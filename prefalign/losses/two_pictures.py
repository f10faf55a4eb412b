"""Two answers on two pictures: the chosen answer on its picture against the rejected answer on its own.

Source:
    DPO, arXiv 2305.18290, eq. 7, with another context on the rejected side: what ms-swift trains on rows that have
    `rejected_images`.
Equation:
    -log sigmoid(beta * [d(y_w | images) - d(y_l | rejected_images)]), d = log pi - log pi_ref summed over the answer's tokens,
    end of turn included. ln 2 at the start. For a row without `rejected_images` y_l is read on `images`: DPO; for one whose
    answers are one text it is the term `visual`.
Differs from the authors' code:
    Nothing known. Both sides have the same prompt here; there the rejected side may ask something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.term import Scores


@dataclass(frozen=True)
class TwoPictures:
    """The chosen answer on its picture must gain on the rejected answer on its own.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`.
    """

    beta: float | None = None

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("chosen", "rejected_on_own_image")
    logits: ClassVar[tuple[str, ...]] = ()

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        assert self.beta is not None
        chosen, rejected = (self.beta * scores[view].logratios() for view in self.views)
        margins = chosen - rejected
        return -logsigmoid(margins), {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "margins": margins.detach(),
            "accuracies": (margins > 0).float(),
        }
