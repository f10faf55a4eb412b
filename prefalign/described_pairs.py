"""Which two descriptions of a picture, a good one and one that was led astray, make a pair.

Source: the pairs of STIC (arXiv 2405.19716; code yihedeng9/STIC). Its code keeps all of them; every rule here is ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from prefalign.engines import Completion
from prefalign.text import same_answer

ANNOUNCED = (
    "imagine", "imagined", "imaginary", "hypothetical", "hypothetically", "fictional", "let us suppose", "if there were",
    "might also be", "could also be", "could be added", "one could add", "we could add", "outside the frame", "beyond the frame",
    "out of frame", "not visible", "not shown", "not in the picture", "not in the image",
)  # fmt: skip


@dataclass
class FilterConfig:
    """Which answers are dropped, each for a reason of its own. The released code drops none.

    Attributes:
        length_ratio: lowest and highest tokens of rejected over tokens of chosen (`length_ratio`); None: any.
        announced: words with which a rejected answer owns up to inventing, in any case (`announced_fiction`); empty: any.
        similarity: pairs at least this similar are dropped (`near_identical`); above 1: only the same answer is.
        cut_off: drop answers and descriptions that reached the limit on their tokens (`cut_off`).
    """

    length_ratio: tuple[float, float] | None = (0.5, 2.0)
    announced: list[str] = field(default_factory=lambda: list(ANNOUNCED))
    similarity: float = 0.97
    cut_off: bool = True

    def __post_init__(self) -> None:
        ratio = self.length_ratio
        if ratio is not None and not 0 <= ratio[0] < ratio[1]:
            raise ValueError(
                f"length_ratio {ratio} is no range, so no pair would be kept. Take (0.5, 2), or null for any."
            )
        if not all(word.strip() for word in self.announced):
            raise ValueError("announced holds a blank word, which every answer has: all would be dropped. Take it out.")


def rejection(chosen: Completion, rejected: Completion, similarity: float, filters: FilterConfig) -> str | None:
    """Why two answers make no pair, as the word it is counted under; None if they do."""
    if not chosen.text or not rejected.text:
        return "empty_rejected" if chosen.text else "empty_chosen"
    if filters.cut_off and "length" in (chosen.finish_reason, rejected.finish_reason):
        return "cut_off"
    if same_answer(chosen.text, rejected.text):
        return "identical_answers"
    if similarity >= filters.similarity:
        return "near_identical"
    words = "|".join(map(re.escape, filters.announced))
    if words and re.search(rf"\b(?:{words})\b", rejected.text, re.IGNORECASE):
        return "announced_fiction"
    lowest, highest = filters.length_ratio or (0.0, float("inf"))
    ratio = rejected.length / max(1, chosen.length)
    return None if lowest <= ratio <= highest else "length_ratio"
