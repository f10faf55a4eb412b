"""From rewards to the scores that PPO learns from: terms logged one by one, normalised, clipped, lowered where no end came.

Legend of shapes: `B` answers of this process, `T` tokens of the longest.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from prefalign.online.conversations import spread_turns, turn_rewards
from prefalign.rewards.judged import JudgedAttributes
from prefalign.rewards.learned import LearnedReward
from prefalign.training.documents import decode

if TYPE_CHECKING:
    from prefalign.online.arguments import PPOConfig
    from prefalign.online.monitoring import Tally
    from prefalign.online.rollout import Rollout
    from prefalign.rewards import Combined
    from prefalign.rewards.vlm import RewardModel

logger = logging.getLogger(__name__)

PROBED = (LearnedReward, JudgedAttributes)
"""Rewards that are meant to look at the picture; the others judge by the facts."""


@dataclass
class Scorer:
    """What answers are worth.

    Attributes:
        rewards: whose total is learned.
        watch: rewards that are logged only.
        args: settings of the run.
        total: adds a tensor up over processes.
        alike: whether a reward model makes the same features of a picture as the policy, and may take those of the rollout.
        scale: mean and deviation of the totals of the first rollout, which is drawn from the reference; None before.
    """

    rewards: Combined
    watch: Combined | None
    args: PPOConfig
    total: Callable[[torch.Tensor], torch.Tensor]
    alike: Callable[[RewardModel], bool]
    scale: tuple[float, float] | None = None
    _alike: dict[int, bool] = field(default_factory=dict, init=False)

    def score(self, rollout: Rollout, tally: Tally) -> None:
        """Score a rollout's answers, every term of what is learned and what is watched, and once more with blank pictures.

        An answer that could not be drawn is handed to no reward; its scores are missing. What is tallied has the same names
        in every process, whatever its rows hold.

        Args:
            rollout: gets its `scores`.
            tally: gets `rewards/...`, `watch/...` and `probe/...`.
        """
        responses = [answer.response for answer in rollout.answers]
        with self._lent(rollout):
            rollout.scores = self._of_drawn(self.rewards, rollout)
            watched = self._of_drawn(self.watch, rollout) if self.watch is not None else {}
        watched.pop("total", None)
        for prefix, terms in (("rewards", rollout.scores), ("watch", watched)):
            for name, values in terms.items():
                if name != "total":
                    tally.add(f"{prefix}/{name}", values)
                    tally.add(f"{prefix}/{name}/std", values[~values.isnan()].std(correction=0))
        rollout.scores |= {f"watch/{name}": values for name, values in watched.items()}
        some = [number for number in _drawn(rollout) if responses[number].images][: self.args.blank_picture_probe]
        blanked = [replace(responses[number], images=_blank(responses[number].images)) for number in some]
        for entry in self.rewards.entries:
            if self.args.blank_picture_probe and isinstance(entry.reward, PROBED):
                found = entry.reward.score(blanked) if some else {"": torch.empty(0)}
                gaps = torch.stack(
                    [
                        rollout.scores[f"{entry.name}/{term}"][some] - values.cpu() if some else values
                        for term, values in found.items()
                    ]
                )
                tally.add(f"probe/{entry.name}/blank_picture_gap", gaps.abs().amax(dim=0))
                tally.add(f"probe/{entry.name}/blank_picture_drop", gaps.mean(dim=0))

    def _lent(self, rollout: Rollout) -> ExitStack:
        """Within it, reward models that see pictures as the policy does take the rollout's features; others encode their own."""
        stack = ExitStack()
        entries = [*self.rewards.entries, *(self.watch.entries if self.watch is not None else [])]
        for model in [entry.reward.model for entry in entries if isinstance(entry.reward, LearnedReward)]:
            if not rollout.features:
                continue
            if id(model) not in self._alike:  # towers stay as they are while there are features, so a run looks once
                self._alike[id(model)] = self.alike(model)
            if self._alike[id(model)]:
                stack.enter_context(model.with_features(rollout.features))
        return stack

    @staticmethod
    def _of_drawn(rewards: Combined, rollout: Rollout) -> dict[str, torch.Tensor]:
        """Every term and the total, (B,) each; NaN for answers that could not be drawn."""
        drawn = _drawn(rollout)
        found = rewards.score([rollout.answers[number].response for number in drawn])
        missing = torch.full((len(rollout.answers),), math.nan)
        places = torch.tensor(drawn, dtype=torch.long)
        return {name: missing.index_copy(0, places, values) for name, values in found.items()}

    def shaped(self, rollout: Rollout) -> torch.Tensor:
        """(B,) the totals, normalised and clipped, and lowered (or replaced) where an answer is not finished."""
        args = self.args
        scores = rollout.scores["total"].clone()
        if args.normalise_rewards:
            if self.scale is None:
                self.scale = self._measure(scores)
            mean, deviation = self.scale
            scores = (scores - mean) / deviation
        if args.reward_clip is not None:
            scores = scores.clamp(-args.reward_clip, args.reward_clip)
        unfinished = torch.tensor([not answer.response.finished for answer in rollout.answers])
        if args.missing_eos_score is not None:
            scores = torch.where(unfinished & ~scores.isnan(), torch.full_like(scores, args.missing_eos_score), scores)
        elif args.missing_eos_penalty:
            scores = scores - args.missing_eos_penalty * unfinished
        return scores

    def placed(self, rollout: Rollout, shaped: torch.Tensor) -> torch.Tensor:
        """The same scores for `place_rewards`: (B,), or (B, T) where a turn gets at its own end what it earns by itself."""
        if not (self.args.conversations and self.args.turn_rewards):
            return shaped
        drawn = _drawn(rollout)
        earned = [torch.zeros(0)] * len(rollout.answers)
        with self._lent(rollout):
            found = turn_rewards(self.rewards, [rollout.answers[number].response for number in drawn])
        for number, one in zip(drawn, found, strict=True):
            earned[number] = one
        deviation = self.scale[1] if self.scale is not None and self.args.normalise_rewards else 1.0
        rows = [
            spread_turns(one / deviation, score, answer.turn, answer.drawn)
            for one, score, answer in zip(earned, shaped.tolist(), rollout.answers, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _measure(self, scores: torch.Tensor) -> tuple[float, float]:
        known = scores[~scores.isnan()].double()
        count, first = self.total(torch.stack([torch.tensor(float(len(known))).double(), known.sum()])).tolist()
        if count < 2:
            raise ValueError(
                f"{int(count)} of the first rollout's answers got a score, and their mean and deviation are what later "
                "scores are measured by. Look at why the rewards are missing, or set trainer.normalise_rewards to "
                "false."
            )
        mean = first / count
        deviation = math.sqrt(float(self.total(((known - mean) ** 2).sum()[None])) / count)
        if deviation < 1e-6:
            logger.warning(
                "All %d answers of the first rollout got the same score (%.4g): there is nothing to learn yet, and "
                "scores are not "
                "divided by their deviation. Draw more answers, or look at the reward.", count, mean,
            )  # fmt: skip
            deviation = 1.0
        return mean, deviation


def _drawn(rollout: Rollout) -> list[int]:
    """Numbers of the answers that could be drawn."""
    return [number for number, answer in enumerate(rollout.answers) if answer.failed is None]


def _blank(images: Sequence[Any]) -> list[Image.Image]:
    """Grey pictures of the same sizes."""
    return [Image.new("RGB", decode(image).size, (127, 127, 127)) for image in images]
