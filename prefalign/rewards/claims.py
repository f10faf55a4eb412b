"""Trust in a response by its claims: how many of them a labeller that sees the picture refutes (RLAIF-V, arXiv 2405.17220).

No facts and no reference are needed; the labeller may be the policy's start, a peer or a larger model. Equations and departures
from the release are in `prefalign.claims`.

Legend of shapes: `N` responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from prefalign.claims import ClaimJudge, ConquerConfig
from prefalign.dividing import Answer, DivideConfig
from prefalign.engines.config import EngineConfig
from prefalign.images import EncodedImage, ImageError, open_image
from prefalign.judge import picture_hash
from prefalign.rewards.reward import Response

if TYPE_CHECKING:
    import torch
    from PIL import Image


STAGE = "reward 'claims'"
NEEDS = (["first_token"], ["sample"])
"""What labeller and splitter must be capable of."""


@dataclass
class Claims:
    """-(number of claims that the labeller rejects), 0 at best.

    Attributes:
        labeller: model that says yes or no to each claim; its engine needs `first_token`.
        splitter: model that lists claims and questions, from text alone; null: the labeller.
        divide: how responses become claims and questions.
        conquer: how the labeller is asked.
        per_claim: over the number of decided claims: a share of rejected ones, which does not grow with length.
        batch_size: questions in one forward pass.
        seed: with a response's id it decides the draw of its lists.
    """

    labeller: EngineConfig
    splitter: EngineConfig | None = None
    divide: DivideConfig = field(default_factory=DivideConfig)
    conquer: ConquerConfig = field(default_factory=ConquerConfig)
    per_claim: bool = False
    batch_size: int = 16
    seed: int = 0

    terms: ClassVar[tuple[str, ...]] = ("trust",)

    def __post_init__(self) -> None:
        self.failures: dict[int, str] = {}

    def _wanted(self) -> tuple[EngineConfig, EngineConfig | None]:
        """Labeller and, where a model lists claims, the splitter."""
        return self.labeller, (self.splitter or self.labeller) if self.divide.by == "model" else None

    def check(self) -> None:
        """Look for the models, without loading one."""
        from prefalign.engines.loading import check_engine

        for config, needs in zip(self._wanted(), NEEDS, strict=True):
            if config is not None:
                check_engine(config, needs=needs, stage=STAGE)

    @cached_property
    def judge(self) -> ClaimJudge:
        """The judge; models are loaded here."""
        from prefalign.engines.loading import load_engine

        self.check()
        wanted, other = self._wanted()
        labeller = load_engine(wanted, batch_size=self.batch_size, needs=NEEDS[0], stage=STAGE)
        splitter = None if other is None else labeller
        if other is not None and other != wanted:
            splitter = load_engine(other, batch_size=self.batch_size, needs=NEEDS[1], stage=STAGE)
        return ClaimJudge(labeller, splitter, self.divide, self.conquer, self.seed)

    @property
    def version(self) -> str:
        """Models and wording."""
        return self.judge.version

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """`trust` (N,): NaN for a response that has no claim, whose claims could not be judged, or that shows no picture.

        Where splitter or labeller did not reply `failures` says why, by place of the response.
        """
        import torch

        opened: dict[str, Image.Image] = {}
        answers, rows = [], []
        for row, response in enumerate(responses):
            try:
                images = [_opened(image, opened) for image in response.images]
            except ImageError:
                continue
            if images:
                rows.append(row)
                answers.append(Answer(response.id, response.messages, response.text, images))
        values = [math.nan] * len(responses)
        self.failures = {}
        for row, judged in zip(rows, self.judge.judge(answers), strict=True):
            if judged.error is not None:
                self.failures[row] = judged.error
            score = judged.score(per_claim=self.per_claim)
            values[row] = math.nan if score is None else score
        return {"trust": torch.tensor(values)}


def _opened(image: EncodedImage | Image.Image, known: dict[str, Image.Image]) -> Image.Image:
    """The decoded picture, one object for equal ones, so that equal questions about it are asked once."""
    key = picture_hash(image)
    if key not in known:
        known[key] = open_image(image) if isinstance(image, dict) else image
    return known[key]
