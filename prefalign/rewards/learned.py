"""`LearnedReward`: a saved reward model as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign.config import ConfigError, nearest
from prefalign.records import assistant_message
from prefalign.rewards.reward import Response

if TYPE_CHECKING:
    import torch

    from prefalign.rewards.vlm import RewardModel


@dataclass
class LearnedReward:
    """Scores of a reward model, one term for each of its attributes.

    Attributes:
        path: folder of a finished `train_reward_model` run.
        facts: show the responses' facts; a response without any is scored without.
        weights: None: each attribute is a term of its own. A mapping by attribute: one term `reward`, their weighted sum.
        normalise: subtract the mean and divide by the deviation that the model's reference answers had, per attribute.
        batch_size: responses of one forward pass; those to one prompt share it and its pictures.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto` is that in which the model was trained.
    """

    path: Path
    facts: bool = True
    weights: dict[str, float] | None = None
    normalise: bool = True
    batch_size: int = 16
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; a forward pass scores at least 1 response.")

    @cached_property
    def model(self) -> RewardModel:
        """The reward model, loaded and tested when it is first asked for. Another one (on a policy's base, say) may be set."""
        from prefalign.rewards.vlm import RewardModel

        return RewardModel.load(self.path, device=self.device, dtype=self.dtype)

    @property
    def version(self) -> str:
        """Digest of the reward model's weights and settings, so that a resumed stage notices other ones at the same path."""
        from prefalign.rewards.grading import weights_digest

        return weights_digest(self.path)

    def score(self, responses: Sequence[Response]) -> Mapping[str, torch.Tensor]:
        """Score responses.

        Returns:
            By attribute (or `reward`, with `weights`), (N,) float32.

        Raises:
            ConfigError: `weights` names an attribute that the model has not.
            ValueError: the folder holds no reward model that can be used, or a response's pictures and placeholders disagree.
        """
        import torch

        model = self.model
        unknown = [name for name in self.weights or {} if name not in model.attributes]
        if unknown:
            raise ConfigError(
                f"weights: the reward model in {self.path} has no attribute {unknown[0]!r}; "
                f"{nearest(unknown[0], model.attributes)}"
            )
        scores = model.score(
            [self._row(response) for response in responses], facts=self.facts, batch_size=self.batch_size
        )
        if self.normalise:
            assert model.calibration is not None
            scale = model.calibration.with_facts if self.facts else model.calibration.without_facts
            scores = (scores - torch.tensor(scale.mean)) / torch.tensor(scale.deviation)
        terms = dict(zip(model.attributes, scores.unbind(dim=1), strict=True))
        if self.weights is None:
            return terms
        return {"reward": torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum(dim=0)}

    def _row(self, response: Response) -> dict[str, Any]:
        return {
            "id": response.id,
            "images": response.images,
            "prompt": response.messages,
            "chosen": [assistant_message(response.text)],
            "facts": response.facts,
        }
