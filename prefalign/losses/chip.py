"""Cross-modal hierarchical preference: answer, segment, token and picture level in one logistic.

Source:
    CHiP, arXiv 2501.16629; released trainer `muffin/train/trainers.py` at ea61529. The token part is that of TDPO,
    arXiv 2404.11999, second form.
Equation:
    -log sigmoid(beta * [(d_w - d_l) + image * (d_w - d_w') - kl * (K_l - sg(K_w))]), d = sum over the answer's tokens of
    weight * (log pi - log pi_ref) with weight `gamma` on changed tokens (`changed_tokens`), not normalised; d_w' on the other
    picture; K = sum over the answer's tokens of KL(pi_ref || pi) over the whole vocabulary; sg: no gradient. ln 2 at the start.
Differs from the authors' code:
    Their LLaVA path multiplies the reference of the other picture by the sum of the weights, so the picture part does not
    start at 0, and drops the last row of a batch; neither is done here. Rewards are logged without K.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.changed import MIN_BLOCK, changed_tokens
from prefalign.losses.ddpo import check_segments, segment_weights, weighted_logratios
from prefalign.losses.term import Scores
from prefalign.losses.vocabulary import token_kl


@dataclass(frozen=True)
class CHiP:
    """DPO with weighted segments, a divergence per token, and a second picture, all inside one sigmoid.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`.
        gamma: weight of a changed token; 1 switches the segment level off. Published: 4 for LLaVA-1.6, 2 for Muffin.
        kl: weight of the token level; 0 switches it off, and with it the need for full logits.
        image: false switches the picture level off, and with it the need for another picture.
        min_block: stretches of equal tokens shorter than this count as changed.
    """

    beta: float | None = None
    gamma: float = 4.0
    kl: float = 0.1
    image: bool = True
    min_block: int = MIN_BLOCK

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_segments(self.gamma, self.min_block)
        if not 0 <= self.kl < math.inf:
            raise ValueError(
                f"kl is {self.kl}; below 0 it would reward the rejected answer for leaving the reference. Take 0.1 as published, "
                "or 0 to leave the token level out"
            )

    @property
    def views(self) -> tuple[str, ...]:
        return ("chosen", "rejected", "chosen_on_rejected_image") if self.image else ("chosen", "rejected")

    @property
    def logits(self) -> tuple[str, ...]:
        return ("chosen", "rejected") if self.kl else ()

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        assert self.beta is not None
        chosen, rejected = scores["chosen"], scores["rejected"]
        changed, changed_rejected = changed_tokens(chosen, rejected, min_block=self.min_block)
        weights = segment_weights(chosen, changed, self.gamma)
        ratio = weighted_logratios(chosen, weights)
        text = ratio - weighted_logratios(rejected, segment_weights(rejected, changed_rejected, self.gamma))
        total, metrics = text, {"margins/text": self.beta * text.detach()}
        if self.image:
            picture = ratio - weighted_logratios(scores["chosen_on_rejected_image"], weights)
            total, metrics["margins/image"] = total + picture, self.beta * picture.detach()
        if self.kl:
            divergence = _divergence(rejected)
            with torch.no_grad():
                chosen_divergence = _divergence(chosen)
            total = total - self.kl * (divergence - chosen_divergence)
            metrics |= {"kl/rejected": divergence.detach(), "kl/chosen": chosen_divergence}
        metrics |= {"margins": self.beta * total.detach(), "accuracies": (total > 0).float()}
        return -logsigmoid(self.beta * total), metrics


def _divergence(side: Scores) -> torch.Tensor:
    """K of the module's equation, (B,)."""
    assert side.logits is not None
    assert side.ref_logits is not None
    return token_kl(side.ref_logits, side.logits, side.mask).sum(dim=1)
