"""What a preference term says about itself; the trainer and the collator read it and never compare names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """One combination of pictures and answer.

    Attributes:
        images: column of the pictures, `images` or `rejected_images`.
        answer: column of the answer, `chosen` or `rejected`.
    """

    images: str
    answer: str


VIEWS: dict[str, View] = {
    "chosen": View("images", "chosen"),
    "rejected": View("images", "rejected"),
    "chosen_on_rejected_image": View("rejected_images", "chosen"),
    "rejected_on_rejected_image": View("rejected_images", "rejected"),
}


@dataclass(frozen=True)
class Term:
    """A preference loss over two views.

    Attributes:
        name: key in `TERMS`.
        views: the preferred view and the other one, names of `VIEWS`.
        loss_types: TRL `loss_type`s that mean something on these views; empty: all of them.
        reference_free: those `loss_type`s that never look at the reference model.
    """

    name: str
    views: tuple[str, str]
    loss_types: frozenset[str] = frozenset()
    reference_free: frozenset[str] = frozenset({"sft"})

    def __post_init__(self) -> None:
        assert set(self.views) <= VIEWS.keys()

    @property
    def sides(self) -> tuple[View, View]:
        """The two views themselves."""
        return VIEWS[self.views[0]], VIEWS[self.views[1]]

    def needs_reference(self, loss_types: list[str]) -> bool:
        """Whether any of these TRL losses reads reference log-probs."""
        return not set(loss_types) <= self.reference_free

    def check(self, loss_types: list[str]) -> None:
        """Refuse TRL losses that mean nothing on this term's views.

        Raises:
            ValueError: names the loss and those that fit.
        """
        unfit = [name for name in loss_types if self.loss_types and name not in self.loss_types]
        if unfit:
            raise ValueError(
                f"loss_type {unfit[0]!r} does not fit term {self.name!r}, whose views are {' and '.join(self.views)}: it "
                f"is defined for two answers to one picture. Use one of {', '.join(sorted(self.loss_types))}, or term "
                "'text'."
            )
