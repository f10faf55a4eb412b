"""What a policy trained by DPO thinks of a response: its own implicit reward, per token, for best of n without a judge.

Equation: implicit(y) = beta * (log pi(y | x) - log ref(y | x)) / |y|, sums over the tokens of the response and its end of turn.
Source: self-feedback of RLAIF-V, arXiv 2405.17220 (the division keeps it from favouring short responses); the reward is DPO's,
arXiv 2305.18290, without its term that depends on the prompt alone: compare responses to one prompt only.

Legend of shapes: `N` responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from prefalign.engines import Engine, Request
from prefalign.engines.config import EngineConfig
from prefalign.images import ImageError, open_image
from prefalign.processors import weights_of
from prefalign.rewards.reward import Response

if TYPE_CHECKING:
    import torch


NEEDS = ["logprobs"]
STAGE = "reward 'implicit'"


@dataclass
class Implicit:
    """beta * log-ratio of policy and reference, per token.

    Attributes:
        model: the policy after DPO; its engine needs `logprobs`.
        reference: the model that it was trained against.
        beta: that of the training; it scales all scores alike.
        per_token: divide by the number of tokens, as RLAIF-V does; false: DPO's own sum.
        batch_size: responses in one forward pass.
    """

    model: EngineConfig
    reference: EngineConfig
    beta: float = 0.1
    per_token: bool = True
    batch_size: int = 16

    terms: ClassVar[tuple[str, ...]] = ("log_ratio",)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(
                f"beta is {self.beta}: the reward would be nothing or turned around. Give DPO's, such as 0.1."
            )

    def check(self) -> None:
        """Look for both models, without loading one."""
        from prefalign.engines.loading import check_engine

        for config in (self.model, self.reference):
            check_engine(config, needs=NEEDS, stage=STAGE)

    @cached_property
    def engines(self) -> tuple[Engine, Engine]:
        """Policy and reference; both are loaded here.

        Raises:
            ValueError: if they are one and the same, so that every response would score 0.
        """
        from prefalign.engines.loading import load_engine

        self.check()
        policy, reference = (
            load_engine(config, batch_size=self.batch_size, needs=NEEDS, stage=STAGE)
            for config in (self.model, self.reference)
        )
        if weights_of(policy.fingerprint) == weights_of(reference.fingerprint):
            raise ValueError(
                f"model {self.model.model_name_or_path!r} and reference {self.reference.model_name_or_path!r} have the same "
                "weights, so every response would score 0. Give the policy after DPO, and the model that it started from."
            )
        return policy, reference

    @property
    def version(self) -> str:
        """Fingerprints of both."""
        return "/".join(engine.fingerprint for engine in self.engines)

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """`log_ratio` (N,): NaN for a response whose picture cannot be opened or whose prompt a model refuses."""
        import torch

        requests, rows = [], []
        for row, response in enumerate(responses):
            try:
                images = [open_image(image) if isinstance(image, dict) else image for image in response.images]
            except ImageError:
                continue
            rows.append(row)
            requests.append(Request(response.id, response.messages, images))
        texts = [responses[row].text for row in rows]
        scored = [engine.logprobs(requests, texts) if requests else [] for engine in self.engines]
        values = torch.full((len(responses),), math.nan)
        for row, mine, theirs in zip(rows, *scored, strict=True):
            ratio = self.beta * (mine.sum() - theirs.sum())
            values[row] = ratio / len(mine) if self.per_token else ratio
        return {"log_ratio": values}
