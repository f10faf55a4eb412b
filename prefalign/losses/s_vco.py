"""Symmetric visual contrast: each side's text needs its own picture, and the other picture must speak against it.

Source:
    S-VCO, arXiv 2502.13928 (loss in the released `trainer.py` at bc8f941). Setting the last two betas to 0 is its ablation VCO.
Equation:
    S(b1 * [d(y_w | I_w) - d(y_w | none)]) + S(b2 * [d(y_w | none) - d(y_w | I_l)])
    + S(b3 * [d(y_l | I_l) - d(y_l | none)]) + S(b4 * [d(y_l | none) - d(y_l | I_w)]),
    S(z) = -log sigmoid(z), d = log pi - log pi_ref summed over the answer's tokens; I_w are `images`, I_l `rejected_images`, none
    is the same prompt without its pictures. 4 ln 2 at the start. Both texts are true of their own picture (stage `s_vco`);
    nothing compares the two texts on one picture.
Differs from the authors' code:
    Answers are not cut to 128 tokens, and an end of turn counts even where it is the padding token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from prefalign.losses.term import VIEWS, Scores

PARTS = {
    "attend": ("chosen", "chosen_without_image"),
    "reject": ("chosen_without_image", "chosen_on_rejected_image"),
    "mirrored_attend": ("rejected_on_rejected_image", "rejected_without_image"),
    "mirrored_reject": ("rejected_without_image", "rejected"),
}
"""The four comparisons by name: the view that must become likelier, then the other."""


@dataclass(frozen=True)
class SVCO:
    """Four comparisons of pictures, two for each text.

    Attributes:
        betas: scale of each comparison, in the order of `PARTS`; 0 or less switches it off, and views that no other needs
            are not computed.
    """

    betas: tuple[float, float, float, float] = (0.1, 0.1, 0.1, 0.1)

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    logits: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not any(beta > 0 for beta in self.betas) or not all(math.isfinite(beta) for beta in self.betas):
            raise ValueError(
                f"betas are {list(self.betas)}: 0 or less switches a comparison off, and at least one must be left, all of them "
                "finite. The published ones are [0.1, 0.1, 0.1, 0.1]"
            )

    @property
    def views(self) -> tuple[str, ...]:
        wanted = {view for _, views in self._parts().values() for view in views}
        return tuple(view for view in VIEWS if view in wanted)

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Term.loss`."""
        ratios = {view: scores[view].logratios() for view in self.views}
        margins = {name: beta * (ratios[one] - ratios[other]) for name, (beta, (one, other)) in self._parts().items()}
        losses = torch.stack([-logsigmoid(margin) for margin in margins.values()]).sum(dim=0)
        return losses, {f"margins/{name}": margin.detach() for name, margin in margins.items()}

    def _parts(self) -> dict[str, tuple[float, tuple[str, str]]]:
        """Those that are on, with their beta."""
        return {name: (beta, PARTS[name]) for name, beta in zip(PARTS, self.betas, strict=True) if beta > 0}
