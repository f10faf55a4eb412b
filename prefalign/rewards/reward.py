"""What a reward is given and what it gives back: responses with their pictures and facts in, named scores out.

One interface serves scoring of stored candidates, best-of-n, online DPO, PPO and TRL's online trainers. A pairwise judge is a
`Comparator` beside it.

Legend of shapes: `N` responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from prefalign.images import EncodedImage
    from prefalign.records import Message


@dataclass
class Response:
    """A response to a prompt, with everything that a reward may look at.

    Attributes:
        id: names it in logs and errors; not unique.
        images: pictures in the order of their placeholders, encoded or decoded.
        messages: conversation up to and including the user turn that was answered; earlier assistant turns are in it.
        text: the response, without special tokens.
        answer: reference answer, if there is one.
        facts: what is known of the pictures (`Prompt.facts`).
        finished: the generator ended the response itself; False: it ran into the length limit.
        tokens: tokens generated, end of turn included; None: not known.
    """

    id: str
    images: list[EncodedImage] | list[Image.Image]
    messages: list[Message]
    text: str
    answer: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    finished: bool = True
    tokens: int | None = None


class Reward(Protocol):
    """Scores of responses. A dataclass whose fields are its settings, listed in `prefalign.rewards.REWARDS`.

    A reward that asks somebody may have `failures`: of its last call, by place of the response, why nobody replied. Such a score
    is NaN too, but it can be had another time: stages that store scores quarantine the row.
    One that loads a model, or asks a server, may have `check()`: it raises if that cannot be had, and reads no weights
    (`engines.loading.check_engine`). Stages call it before they load anything.

    One whose terms follow from its settings names them in an attribute or property `terms`, so that a misspelt weight fails
    before anything is drawn.
    """

    def score(self, responses: Sequence[Response]) -> Mapping[str, torch.Tensor]:
        """Score responses.

        Returns:
            By name of the term, (N,) float32. NaN where a response has no score (a judge's reply that cannot be parsed, facts
            that a term needs and a row lacks): never a default.
        """
        ...


@dataclass(frozen=True)
class Verdict:
    """Which of two responses is better.

    Attributes:
        winner: `first`, `second` or `tie`; None: no verdict (unparsable, or the two orders disagree).
        confidence: in [0, 1]; None: not known.
        reason: the judge's own words, or why there is no verdict.
        votes: what was said in the given order and in the swapped one, both in terms of the given order.
        error: why the judge did not reply at all (its server failed); None: it did, or was not asked.
    """

    winner: Literal["first", "second", "tie"] | None
    confidence: float | None = None
    reason: str = ""
    votes: tuple[str | None, ...] = ()
    error: str | None = None


class Comparator(Protocol):
    """A judge of two responses to one prompt."""

    @property
    def version(self) -> str:
        """Model and prompt version, stored with every pair."""
        ...

    def check(self) -> None:
        """Raise if its model cannot be had; reads no weights."""
        ...

    def compare(self, pairs: Sequence[tuple[Response, Response]]) -> list[Verdict]:
        """One verdict for each pair, in order."""
        ...
