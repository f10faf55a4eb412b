"""What a preference term says about itself and what it is given: views, and what policy and reference say of each.

Legend of shapes: `B` rows (pairs), `T` tokens of the longest answer of a side, `V` entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch


EITHER = "rejected_images or images"
"""The other pictures of a row that has some, else its pictures."""


@dataclass(frozen=True)
class View:
    """One combination of pictures and answer.

    Attributes:
        images: column of the pictures, `images` or `rejected_images`, or `EITHER`; None: the prompt is shown without its
            pictures.
        answer: column of the answer, `chosen` or `rejected`.
    """

    images: str | None
    answer: str


VIEWS: dict[str, View] = {
    "chosen": View("images", "chosen"),
    "rejected": View("images", "rejected"),
    "rejected_on_own_image": View(EITHER, "rejected"),
    "chosen_on_rejected_image": View("rejected_images", "chosen"),
    "rejected_on_rejected_image": View("rejected_images", "rejected"),
    "chosen_without_image": View(None, "chosen"),
    "rejected_without_image": View(None, "rejected"),
}


@dataclass
class Scores:
    """What policy and reference say of one view's answers, token by token. Views of one answer side have the same tokens.

    Attributes:
        logps: (B, T) float32 log-probs of the answer's tokens under the policy; 0 where `mask` is False.
        mask: (B, T) bool, True at the answer's tokens, end of turn included; answers start at column 0.
        ids: (B, T) int64 token ids of the answer; padding where `mask` is False.
        ref_logps: (B, T) float32, the same under the reference, without gradient; None where no term of the run needs it.
        logits: (B, T, V) float32 logits at the answer's tokens (row t predicts `ids[:, t]`), for the views that a term lists
            in `logits`; else None.
        ref_logits: (B, T, V) the same under the reference, without gradient.
    """

    logps: torch.Tensor
    mask: torch.Tensor
    ids: torch.Tensor
    ref_logps: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    ref_logits: torch.Tensor | None = None

    def logratios(self) -> torch.Tensor:
        """d of the specifications, (B,): sum over the answer's tokens of log pi - log pi_ref."""
        assert self.ref_logps is not None
        return (self.logps - self.ref_logps).sum(dim=1)

    def lengths(self) -> torch.Tensor:
        """Tokens of each answer, (B,), at least 1."""
        return self.mask.sum(dim=1).clamp(min=1)


class Term(Protocol):
    """A preference loss: a frozen dataclass of its settings, and a function of the views' scores.

    A setting called `beta` that is None becomes `trainer.beta`. A term whose loss depends on more than its row (a running mean,
    a sort over the batch) sets `per_row` False. Optional state is kept by `state_dict() -> dict` and
    `load_state_dict(dict)`, which the trainer saves with every checkpoint.
    """

    per_row: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    @property
    def views(self) -> tuple[str, ...]:
        """The views that it looks at, names of `VIEWS`."""

    @property
    def logits(self) -> tuple[str, ...]:
        """Those of its views whose full logits it reads; usually none, since they cost memory: B x T x V x 4 bytes each."""
        return ()

    def loss(self, scores: Mapping[str, Scores]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each row.

        Args:
            scores: by view name.

        Returns:
            (B,) losses, and (B,) tensors to log as means under `<term>/<name>`, detached.
        """
