"""Length balance of a whole set of pairs: which pairs go so that chosen and rejected answers are equally long on average.

Equation: for r in {0, 0.02, ..., 0.98} keep the pairs with (rejected - chosen) / rejected <= r, in words, and take the r for
which |mean chosen - mean rejected| / mean rejected is least; of equals the largest, which keeps most.
Source: RLAIF-V, arXiv 2405.17220, released pair filter. Differs from it: that rule only drops pairs whose chosen answer is
shorter; where chosen answers are longer on average, `both` drops by (chosen - rejected) / chosen instead. An r that keeps
less than a given share of the pairs is not taken (0: one that leaves no pair), and if all do, all pairs stay.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

logger = logging.getLogger(__name__)

STEPS = 50
Balance = Literal["both", "published", "off"]


def step(shorter: int, longer: int) -> int:
    """The least r, in steps of 1/50, that keeps a pair: 0 where nothing is missing, 50 where none does.

    Args:
        shorter: words of the side that a pair is dropped for being short.
        longer: words of the other.

    Example:
        >>> step(8, 10), step(10, 8), step(0, 10)
        (10, 0, 50)
    """
    return max(0, -(-(longer - shorter) * STEPS // longer)) if longer else 0


@dataclass(frozen=True)
class Cut:
    """Which pairs stay.

    Attributes:
        side: which side may not be much shorter than the other; None: all pairs stay.
        step: the largest difference that stays, in steps of 1/50.
    """

    side: Literal["chosen", "rejected"] | None = None
    step: int = STEPS

    def keeps(self, chosen: int, rejected: int) -> bool:
        """Whether a pair of these lengths stays."""
        if self.side is None:
            return True
        short, long = (chosen, rejected) if self.side == "chosen" else (rejected, chosen)
        return step(short, long) <= self.step


@dataclass
class Lengths:
    """Sums of lengths by the `r` that keeps a pair: all that is needed of a set, whatever its size."""

    sums: dict[str, list[list[int]]] = field(
        default_factory=lambda: {side: [[0, 0, 0] for _ in range(STEPS + 1)] for side in ("chosen", "rejected")}
    )

    def add(self, chosen: int, rejected: int) -> None:
        """Count a pair.

        Args:
            chosen: words of the chosen answer.
            rejected: words of the rejected answer.
        """
        for side, at in (("chosen", step(chosen, rejected)), ("rejected", step(rejected, chosen))):
            for place, value in enumerate((1, chosen, rejected)):
                self.sums[side][at][place] += value

    def cut(self, balance: Balance = "both", least_kept: float = 0.0) -> Cut:
        """The cut of the rule above.

        Args:
            balance: from which side pairs may be dropped.
            least_kept: least share of the pairs that is kept.
        """
        pairs, chosen, rejected = self._within("chosen", STEPS)
        if balance == "off" or not pairs:
            return Cut()
        side: Literal["chosen", "rejected"] = "rejected" if balance == "both" and chosen > rejected else "chosen"
        known = [(number, self._within(side, number)) for number in range(STEPS)]
        gaps = [(abs(c - r) / r, -number) for number, (count, c, r) in known if r and count >= least_kept * pairs]
        return Cut(side, -min(gaps)[1]) if gaps else Cut()

    def balanced(self, balance: Balance = "both", least_kept: float = 0.0) -> tuple[Cut, dict[str, Any]]:
        """`cut` and its `summary`. Of a better balance that keeps too few pairs it warns, and adds its figures as `too_few`."""
        cut, best = (self.cut(balance, least) for least in (least_kept, 0.0))
        found = self.summary(cut)
        if cut != best:
            few, after = self.summary(best)["after"], found["after"]
            found["too_few"] = few
            logger.warning(
                "the best length balance keeps %d of %d pairs, a smaller share than the least, %g. %d are kept, with %g words of "
                "chosen and %g of rejected answers. Lower the share, or see why the lengths differ so.",
                few["pairs"], found["before"]["pairs"], least_kept, after["pairs"], after["chosen_words"],
                after["rejected_words"],
            )  # fmt: skip
        return cut, found

    def summary(self, cut: Cut) -> dict[str, Any]:
        """What the cut does: pairs and mean words of both sides, before and after it."""
        before = self._within("chosen", STEPS)
        after = before if cut.side is None else self._within(cut.side, cut.step)
        share = None if cut.side is None else cut.step / STEPS
        return {"short_side": cut.side, "share": share, "before": _means(*before), "after": _means(*after)}

    def _within(self, side: str, number: int) -> tuple[int, int, int]:
        """Pairs, words of chosen and words of rejected answers that a step keeps."""
        count, chosen, rejected = (sum(column) for column in zip(*self.sums[side][: number + 1], strict=True))
        return count, chosen, rejected


def _means(pairs: int, chosen: int, rejected: int) -> dict[str, float]:
    return {
        "pairs": pairs,
        "chosen_words": round(chosen / max(1, pairs), 3),
        "rejected_words": round(rejected / max(1, pairs), 3),
    }
