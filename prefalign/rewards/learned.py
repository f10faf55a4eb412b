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

    from prefalign.rewards.vlm import RewardModel, Scale


@dataclass
class LearnedReward:
    """Scores of a reward model, one term for each of its attributes.

    Attributes:
        path: folder of a finished `train_reward_model` run.
        facts: show the responses' facts; a response without any is scored without.
        weights: None: each attribute is a term of its own. A mapping by attribute: one term `reward`, their weighted sum.
        normalise: subtract the mean and divide by the deviation that the model's reference answers had, per attribute: shown with
            their facts for a response that is, without for one that has none.
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
        if self.weights is not None and not any(self.weights.values()):
            raise ConfigError(
                f"weights is {self.weights}, which counts no attribute, so all responses would score alike. Name one, such as "
                "{helpfulness: 1.0}, or leave `weights` out: then each attribute is a term of its own."
            )

    @property
    def terms(self) -> tuple[str, ...] | None:
        """The terms, where the settings say them: without `weights` they are the model's attributes, known once it is loaded."""
        return None if self.weights is None else ("reward",)

    @cached_property
    def model(self) -> RewardModel:
        """The reward model, loaded and tested when it is first asked for. Another one (on a policy's base, say) may be set."""
        from prefalign.rewards.vlm import RewardModel

        return RewardModel.load(self.path, device=self.device, dtype=self.dtype)

    def check(self) -> None:
        """Look for a finished reward model in the folder, without loading it.

        Raises:
            RewardModelError: if there is none.
        """
        from prefalign.rewards.artefact import read_note

        read_note(self.path)

    @property
    def version(self) -> str:
        """Digest of the reward model's weights and settings, so that a resumed stage notices other ones at the same path."""
        from prefalign.rewards.grading import weights_digest

        return weights_digest(self.path)

    def score(self, responses: Sequence[Response]) -> Mapping[str, torch.Tensor]:
        """Score responses.

        Returns:
            By attribute (or `reward`, with `weights`), (N,) float32. NaN for a response that spells the mark of a picture, in its
            text, its facts or its conversation, and for one that is nothing where `prompt.plain` ends with it.

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
        rows = [self._row(response) for response in responses]
        collator = model.collator(views=("chosen",), facts=self.facts)
        readable = [number for number, row in enumerate(rows) if collator.is_readable(row)]
        scores = torch.full((len(rows), len(model.attributes)), torch.nan)
        scores[readable] = model.score(
            [rows[number] for number in readable], facts=self.facts, batch_size=self.batch_size
        )
        if self.normalise and rows:
            scales = [self._scale(response) for response in responses]
            mean, deviation = (
                torch.tensor([getattr(scale, name) for scale in scales]) for name in ("mean", "deviation")
            )
            scores = (scores - mean) / deviation
        terms = dict(zip(model.attributes, scores.unbind(dim=1), strict=True))
        if self.weights is None:
            return terms
        return {"reward": torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum(dim=0)}

    def deviation(self, response: Response, attribute: str) -> float:
        """What a response's raw score of an attribute is divided by: 1 without `normalise`."""
        place = self.model.attributes.index(attribute)
        return self._scale(response).deviation[place] if self.normalise else 1.0

    def _scale(self, response: Response) -> Scale:
        calibration, rating = self.model.calibration, self.model.rating
        assert calibration is not None
        shown = self.facts and rating.shows_facts and rating.facts_of({"facts": response.facts})
        return calibration.with_facts if shown else calibration.without_facts

    def _row(self, response: Response) -> dict[str, Any]:
        return {
            "id": response.id,
            "images": response.images,
            "prompt": response.messages,
            "chosen": [assistant_message(response.text)],
            "facts": response.facts,
        }
