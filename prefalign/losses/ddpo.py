"""Dense DPO: the tokens in which the two answers differ count `gamma` times.

Source:
    DDPO of RLHF-V, arXiv 2312.00849, section 3.2. Meant for pairs whose rejected answer was corrected as little as possible.
Equation:
    -log sigmoid(beta * [h(y_w) - h(y_l)]), h = log pi - log pi_ref, each with
    log pi(y) := (sum of log p over unchanged tokens + gamma * sum over changed tokens) / N, N = n_unchanged + gamma * n_changed.
    Changed tokens: `changed_tokens`. ln 2 at the start.
Differs from the authors' code:
    Division by N is on, as in the paper (beta 0.5 belongs to it); the code divides behind a switch, here `normalise`. Without
    it gamma scales the loss: tune beta again. The code's gamma is 3, the paper's 5. Frequent tokens are never junk (`changed`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.changed import MIN_BLOCK, changed_tokens
from prefalign.losses.term import Scores


@dataclass(frozen=True)
class DDPO:
    """DPO on segment-weighted log-probs.

    Attributes:
        beta: scale of the implicit reward; None: `trainer.beta`. The paper's 0.5 goes with `normalise`.
        gamma: weight of a changed token against 1 for the others.
        normalise: divide by the sum of the weights, so that long answers do not count more.
        min_block: stretches of equal tokens shorter than this count as changed.
    """

    beta: float | None = None
    gamma: float = 5.0
    normalise: bool = True
    min_block: int = MIN_BLOCK

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    logits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_segments(self.gamma, self.min_block)

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        assert self.beta is not None
        sides = scores["chosen"], scores["rejected"]
        changed = changed_tokens(*sides, min_block=self.min_block)
        chosen, rejected = (self._logratios(*side) for side in zip(sides, changed, strict=True))
        margins = self.beta * (chosen - rejected)
        return -logsigmoid(margins), {
            "margins": margins.detach(),
            "accuracies": (margins > 0).float(),
            "changed": changed[0].sum(dim=1) / sides[0].lengths(),
        }

    def _logratios(self, side: Scores, changed: torch.Tensor) -> torch.Tensor:
        weights = segment_weights(side, changed, self.gamma)
        total = weighted_logratios(side, weights)
        return total / weights.sum(dim=1).clamp(min=min(1.0, self.gamma)) if self.normalise else total


def segment_weights(side: Scores, changed: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight of each token, (B, T): `gamma` where changed, else 1; 0 at padding."""
    return torch.where(changed, gamma, 1.0) * side.mask


def weighted_logratios(side: Scores, weights: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of weight * (log pi - log pi_ref), (B,)."""
    assert side.ref_logps is not None
    return (weights * (side.logps - side.ref_logps)).sum(dim=1)


def check_segments(gamma: float, min_block: int) -> None:
    """Raise `ValueError` for a weight or a block length that means nothing."""
    if not 0 < gamma < math.inf:
        raise ValueError(
            f"gamma is {gamma}; a changed token counts a positive number of times (1: as much as the others; RLHF-V's is 5)"
        )
    if min_block < 1:
        raise ValueError(
            f"min_block is {min_block}; a stretch of equal tokens has at least 1 token (3 is the published)"
        )
