"""Visual token preference: tokens that hang on the picture weigh more in the chosen answer and less in the rejected one.

Source:
    Token Preference Optimization, arXiv 2412.14487; released `trl/trainer/tpo_trainer.py` of alibaba/TPO at 2f87f27. Not TRL's
    TPO, a loss for triples of texts.
Equation:
    -log sigmoid(beta * [h(y_w) - h(y_l)]), h = sum over tokens of (log pi + log c) - (log pi_ref + log c_ref);
    s = logit(y_t | I) - logit(y_t | I'), c = sigmoid(s) + 0.5 in the chosen answer, 1.5 - sigmoid(s) in the rejected one; c_ref
    from the reference's own logits; I' is the other picture (diffusion noise). ln 2 at the start.
Differs from the authors' code:
    The weights are constants here (`detach: true`): log c is then added to the margin and has no gradient of its own. The code
    propagates through them, `detach: false`, which also pays for a larger difference between the pictures, in the rejected
    answer too. Raw logits are subtracted as there, not log-probs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.term import Scores
from prefalign.losses.vocabulary import token_logits

_ALL = ("chosen", "rejected", "chosen_on_rejected_image", "rejected_on_rejected_image")


@dataclass(frozen=True)
class TPO:
    """DPO on log-probs with a weight for how much each token hangs on the picture.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`.
        detach: weights without gradient; false is the authors' code.
    """

    beta: float | None = None
    detach: bool = True

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = _ALL
    logits: ClassVar[tuple[str, ...]] = _ALL

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        assert self.beta is not None
        chosen, chosen_reliance = self._score(scores["chosen"], scores["chosen_on_rejected_image"], 1.0)
        rejected, rejected_reliance = self._score(scores["rejected"], scores["rejected_on_rejected_image"], -1.0)
        margins = self.beta * (chosen - rejected)
        return -logsigmoid(margins), {
            "margins": margins.detach(),
            "accuracies": (margins > 0).float(),
            "reliance/chosen": chosen_reliance,
            "reliance/rejected": rejected_reliance,
        }

    def _score(self, own: Scores, other: Scores, sign: float) -> tuple[torch.Tensor, torch.Tensor]:
        """h of the module's equation, and the mean of s, both (B,); 1.5 - sigmoid(s) is sigmoid(-s) + 0.5, the sign's use."""
        assert own.logits is not None
        assert own.ref_logits is not None
        assert other.logits is not None
        assert other.ref_logits is not None
        reliance = token_logits(own.logits, own.ids, own.mask) - token_logits(other.logits, own.ids, own.mask)
        ref_reliance = token_logits(own.ref_logits, own.ids, own.mask) - token_logits(
            other.ref_logits, own.ids, own.mask
        )
        if self.detach:
            reliance = reliance.detach()
        # sigmoid(0) + 0.5 is 1 at padding, and its log 0
        weights = ((sign * reliance).sigmoid() + 0.5).log() - ((sign * ref_reliance).sigmoid() + 0.5).log()
        return own.logratios() + weights.sum(dim=1), reliance.detach().sum(dim=1) / own.lengths()
