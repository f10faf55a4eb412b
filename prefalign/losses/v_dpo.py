"""Vision-guided DPO: the policy's log-probs are guided away from what it would say without the picture.

Source:
    V-DPO, arXiv 2411.02712 (guidance as in classifier-free guidance). `g` is the released code's number; the paper's guidance
    strength is g - 1.
Equation:
    -log sigmoid(beta * [(q(y_w) - log pi_ref(y_w | I)) - (q(y_l) - log pi_ref(y_l | I))]),
    q(y) = log pi(y | I) + (g - 1) * [log pi(y | I) - sg(log pi(y | none))], summed over the answer's tokens; sg: no gradient. The
    reference stays unguided, so the loss is NOT ln 2 at the start.
Differs from the authors' code:
    Its released script sets g to 0: q is then the detached log-prob without the picture, and nothing is trained; here g must
    exceed 1. Its pairs of two pictures with one text are not read here (`visual` and `s_vco` do that). Its `none` is a black
    picture, `without: rejected_image` with `negative: {kind: blank}`; `removed` shows no picture at all. The shared beginning of
    the two answers, which it skips, cancels.
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
class VDPO:
    """DPO on guided log-probs.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`.
        g: guidance, above 1; higher asks for a larger effect of the picture. 1 would be the text loss.
        without: `removed` takes the picture out of the prompt; `rejected_image` shows the pair's other picture instead.
    """

    beta: float | None = None
    g: float = 1.5
    without: Literal["removed", "rejected_image"] = "removed"

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    logits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 1 < self.g < math.inf:
            raise ValueError(
                f"g is {self.g}: at 1 there is no guidance (take the term `text`), below 1 it rewards answers that ignore the "
                "picture, and at 0, the released script's value, no gradient is left. Take 1.5 to 2"
            )

    @property
    def views(self) -> tuple[str, ...]:
        return ("chosen", "rejected", *self._blind())

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        assert self.beta is not None
        gaps = [
            scores[view].logps.sum(dim=1) - scores[blind].logps.detach().sum(dim=1)
            for view, blind in zip(("chosen", "rejected"), self._blind(), strict=True)
        ]
        text = scores["chosen"].logratios() - scores["rejected"].logratios()
        margins = self.beta * (text + (self.g - 1) * (gaps[0] - gaps[1]))
        return -logsigmoid(margins), {
            "margins": margins.detach(),
            "accuracies": (text > 0).float(),
            "guidance/chosen": gaps[0].detach(),
            "guidance/rejected": gaps[1].detach(),
        }

    def _blind(self) -> tuple[str, str]:
        if self.without == "removed":
            return "chosen_without_image", "rejected_without_image"
        return "chosen_on_rejected_image", "rejected_on_rejected_image"
