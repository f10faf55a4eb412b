"""Token-wise dispreference: what the model would have said next had it seen the spoilt picture, against the chosen answer.

Source:
    POVID, arXiv 2402.11411, stage 2; the form of the released code (`tool/dpo_trainer_inherent.py` at 92c7c67), eq. 5 of the
    re-implementation in arXiv 2407.02477. Stage 2 is 0.5 x `text` + 0.5 x this; stage 1 is `text` alone.
Equation:
    -log sigmoid(beta * [d(y_w | I) - d_noise]), d_noise = sum over positions t of
    log pi(a_t | I, y_w before t) - log pi_ref(b_t | I, y_w before t); a_t is the policy's most likely token at t after the same
    words on the other picture, b_t the reference's own. The other picture only selects the tokens, without gradient; their
    log-probs are read on the true one. Where a_t and b_t are the token of y_w, nothing is compared. ln 2 at the start.
Differs from the authors' code:
    The paper prints one logistic over a weighted sum of both rejected scores; code and this sum two losses. The noise is drawn
    once per pair, not at every fetch. An early upload took the second most likely token where the first was y_w's; the released
    code does not, nor does this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.term import Scores
from prefalign.losses.vocabulary import token_logps


@dataclass(frozen=True)
class PovidNoise:
    """The chosen answer against the tokens that the other picture suggests in its place.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`.
    """

    beta: float | None = None

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("chosen", "chosen_on_rejected_image")
    logits: ClassVar[tuple[str, ...]] = ("chosen", "chosen_on_rejected_image")

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        clean, noisy = scores["chosen"], scores["chosen_on_rejected_image"]
        assert self.beta is not None
        assert clean.logits is not None
        assert clean.ref_logits is not None
        assert noisy.logits is not None
        assert noisy.ref_logits is not None
        suggested = noisy.logits.detach().argmax(dim=2)
        score = token_logps(clean.logits, suggested, clean.mask).sum(dim=1)
        ref_score = token_logps(clean.ref_logits, noisy.ref_logits.argmax(dim=2), clean.mask).sum(dim=1)
        margins = self.beta * (clean.logratios() - (score - ref_score))
        disagreeing = ((suggested != clean.ids) & clean.mask).sum(dim=1) / clean.lengths()
        return -logsigmoid(margins), {
            "margins": margins.detach(),
            "accuracies": (margins > 0).float(),
            "disagreement": disagreeing,
        }
