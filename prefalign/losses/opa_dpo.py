"""On-policy alignment DPO: text pair, a light visual pair and an anchor for each revised answer against the model's own.

Source:
    OPA-DPO, arXiv 2501.09695; released `opadpo/dpo_models/dpo_trainer.py` at 6722e19. The reference is the model after stage 1,
    fine-tuned on true and revised answers (a run of its own).
Equation:
    S(beta * [d_w - d_l]) + image * S(beta * [d_w - d(y_w | rejected_images)]) + anchor * S(beta * d_w - delta), S(z) = -log
    sigmoid(z), d = log pi - log pi_ref summed over the answer's tokens. (1 + 0.2 + 1) ln 2 at the start.
    A triple of the paper (true answer, revised answer, own answer) becomes two pairs that share the rejected side: true over
    own and revised over own. Their two rows together are the paper's sum of six terms: 2 (1 + 0.2 + 1) ln 2 at the start.
Differs from the authors' code:
    One sigmoid per answer, as the paper writes it; the code takes one per token and averages over padding too. Both chosen
    answers are anchored upwards; the code pushes the revised one down. GPT-4V's scores per token, which multiply the
    log-ratios of the revised pair, have no place in a pair and are left out. A batch means over rows: half of the triple's sum.
    Its masked pixels have the picture's mean colour; those of `negative: {kind: mask}` are black.
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
class OPADPO:
    """Text, picture and anchor in one term, with the published weights.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`.
        image: weight of the visual pair.
        anchor: weight of the anchor.
        delta: what the chosen answer's scaled reward is to exceed.
    """

    beta: float | None = None
    image: float = 0.2
    anchor: float = 1.0
    delta: float = 0.0

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("chosen", "rejected", "chosen_on_rejected_image")
    logits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, value in (("image", self.image), ("anchor", self.anchor)):
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"{name} is {value}, and a part's weight is 0 or more; below 0 it would train the opposite (published: image "
                    "0.2, anchor 1)"
                )
        if not math.isfinite(self.delta):
            raise ValueError(f"delta is {self.delta}; a finite reward is to exceed it (published: 0)")

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        assert self.beta is not None
        chosen, rejected, blind = (self.beta * scores[view].logratios() for view in self.views)
        losses = -logsigmoid(chosen - rejected) - self.image * logsigmoid(chosen - blind)
        losses = losses - self.anchor * logsigmoid(chosen - self.delta)
        return losses, {
            "margins/text": (chosen - rejected).detach(),
            "margins/image": (chosen - blind).detach(),
            "rewards/chosen": chosen.detach(),
            "accuracies": (chosen > rejected).float(),
        }
