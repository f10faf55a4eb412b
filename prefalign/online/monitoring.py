"""What a PPO run says about itself: numbers added up over processes, and warnings when they mean that something is wrong.

The alarms are those of the table in docs/ppo.md. Each is logged as `alarms/<name>` 1 in the steps where it holds, and is
warned of once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

logger = logging.getLogger(__name__)


class Tally:
    """Weighted sums by name, which give means over all processes.

    Args:
        total: adds a tensor up over processes; each must have tallied the same names.
    """

    def __init__(self, total: Callable[[torch.Tensor], torch.Tensor], device: torch.device):
        self.total = total
        self.device = device
        self.sums: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Values to take the mean of, NaN left out; with `weights` they are sums over so many."""
        values = values.detach().double().to(self.device).flatten()
        if weights is None:
            known = ~values.isnan()
            pair = torch.stack([values[known].sum(), known.sum().double()])
        else:
            pair = torch.stack([values.sum(), weights.detach().double().to(self.device).sum()])
        before = self.sums.get(name)
        self.sums[name] = [pair] if before is None else [before[0] + pair]

    def means(self) -> dict[str, float]:
        """Means over all processes, NaN where nothing was counted; starts anew."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        both = self.total(torch.stack([self.sums[name][0] for name in names]))
        self.sums = {}
        return {
            name: float(both[row, 0] / both[row, 1]) if both[row, 1] else math.nan for row, name in enumerate(names)
        }


def distinct(tokens: Sequence[Sequence[int]], size: int) -> float:
    """Distinct n-grams per n-gram over all answers together (Li et al., arXiv 1510.03055); NaN without any."""
    grams = [tuple(answer[at : at + size]) for answer in tokens for at in range(len(answer) - size + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def correlation(one: torch.Tensor, two: torch.Tensor) -> float:
    """Pearson's correlation where both are known, NaN if either does not vary."""
    known = ~(one.isnan() | two.isnan())
    one, two = one[known].double(), two[known].double()
    if len(one) < 3 or float(one.std()) < 1e-12 or float(two.std()) < 1e-12:
        return math.nan
    return float(torch.corrcoef(torch.stack([one, two]))[0, 1])


@dataclass
class Alarms:
    """Warnings of a run, and what they compare with.

    Attributes:
        exact: the models compute in float32, so equal passes agree to 1e-3 and not to 1e-2 only.
        answers: how many an iteration draws in all processes.
        start: metrics of the first iteration.
        warned: names of the alarms that have been warned of.
        low_variance: iterations in a row in which the values explained less than nothing.
    """

    exact: bool
    answers: int = 64
    start: dict[str, float] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    low_variance: int = 0

    def first_ratio(self, distance: float) -> dict[str, float]:
        """Check the ratio before the first update on a rollout.

        Args:
            distance: mean distance of the tokens' ratios from 1.
        """
        allowed = 1e-3 if self.exact else 1e-2
        return self._raise(
            "first_ratio",
            distance > allowed,
            "before any update the policy gives the tokens that it drew other log-probs: the ratio is off by "
            f"{distance:.2g} (allowed {allowed:g}). The passes differ in dropout, temperature, pictures, mask or "
            "active adapter, so the clipped loss compares two models. Run in float32 to tell rounding from a fault.",
        )

    def rollout(self, metrics: Mapping[str, float], iteration: int) -> dict[str, float]:
        """Check the metrics of a rollout.

        Args:
            metrics: as they are logged.
            iteration: number of the rollout.
        """
        if not self.start:
            self.start = {name: value for name, value in metrics.items() if not math.isnan(value)}

        def now(name: str) -> float:
            return metrics.get(name, math.nan)

        def then(name: str) -> float:
            return self.start.get(name, math.nan)

        kl, length = now("objective/kl"), now("objective/length")
        per_token = abs(kl) / length if length else 0.0
        raised: dict[str, float] = {}
        if iteration == 0:
            raised |= self._raise(
                "kl_at_start",
                per_token > (1e-4 if self.exact else 1e-2),
                f"the KL to the reference is {kl:.3g} nats per answer before the first update, and it should be about "
                "0: the reference is not the model that the policy starts from.",
            )
        raised |= self._raise(
            "negative_kl",
            kl < -1.0,
            f"the KL to the reference is {kl:.3g} nats per answer, far below 0: answers are not drawn from the policy "
            "whose log-probs are taken (top_p, top_k, another temperature, or kernels that differ).",
        )
        raised |= self._raise(
            "far_from_reference",
            kl > 50.0,
            f"the KL to the reference is {kl:.3g} nats per answer. The reward was learned on answers nearer to the "
            "reference and says little out here. Raise kl_coef, set kl_target, or stop earlier.",
        )
        self.low_variance = self.low_variance + 1 if now("val/explained_variance") < -0.05 else 0
        raised |= self._raise(
            "explained_variance",
            self.low_variance >= 3 and iteration >= 5,
            f"the values explain less than nothing of the returns ({now('val/explained_variance'):.3g}) for the third "
            "iteration in a row: advantages are noisier than without them. Lower value_learning_rate, raise "
            "value_warmup_iterations, or look at the scale of the reward.",
        )
        longer = length / then("objective/length") if then("objective/length") else math.nan
        fewer_ends = then("objective/eos_rate") - now("objective/eos_rate")
        raised |= self._raise(
            "verbosity",
            longer > 1.5 and fewer_ends > 0.1,
            f"answers are {longer:.2g} times as long as at the start and end by themselves {fewer_ends:.0%} less "
            "often: the policy gains by talking on. Raise missing_eos_penalty, or add a length term to the reward.",
        )
        biased = now("objective/score_length_correlation")
        raised |= self._raise(
            "length_reward",
            abs(biased) > 0.5 and (longer > 1.25 or longer < 0.8),
            f"score and length go together (correlation {biased:.2f}) and answers are {longer:.2g} times as long as at "
            "the start: the policy learns length. Grade the reward with length controlled, or add a length term "
            "against it.",
        )
        lively = now("objective/entropy_per_token") / then("objective/entropy_per_token")
        varied = now("objective/distinct_2") / then("objective/distinct_2")
        raised |= self._raise(
            "collapse",
            lively < 0.3 or varied < 0.4,
            f"answers lose their variety: entropy is {lively:.0%} and the share of distinct word pairs {varied:.0%} of "
            "what they were. Raise kl_coef, lower the learning rate, or stop earlier.",
        )
        for name in [name for name in metrics if name.endswith("/blank_picture_gap")]:
            entry = name.split("/")[1]
            raised |= self._raise(
                f"blind_reward/{entry}",
                now(name) < 1e-6,
                f"the reward {entry!r} gives answers the same score when their picture is blanked: it does not look, "
                "so the policy will learn nothing about pictures from it. Grade the reward model, or set "
                "blank_picture_probe to 0 if this is meant.",
            )
        gained = now("objective/scores") - then("objective/scores")
        for name in sorted(name for name in metrics if name.startswith("watch/") and not name.endswith("/std")):
            lost = then(name) - now(name)
            raised |= self._raise(
                f"hacking/{name.removeprefix('watch/')}",
                gained > 0 and lost > 3 * self.start.get(f"{name}/std", 0.0) * math.sqrt(2 / self.answers),
                f"the reward has risen by {gained:.3g} while {name} has fallen by {lost:.3g}: the policy has found "
                "what the reward likes and you do not. Stop at an earlier checkpoint, raise kl_coef, or mend the "
                "reward.",
            )
        return raised

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Check the metrics of an optimizer step."""
        clipped = metrics["policy/clipfrac_avg"]
        return self._raise(
            "clip_fraction",
            clipped > 0.3,
            f"{clipped:.0%} of the tokens are clipped in an update (0.05 to 0.2 is usual): the policy moves too fast. "
            "Lower the learning rate or num_ppo_epochs, or set target_kl.",
        )

    def _raise(self, name: str, holds: bool, message: str) -> dict[str, float]:
        if not holds:
            return {}
        if name not in self.warned:
            self.warned.append(name)
            logger.warning("%s: %s", name, message)
        return {f"alarms/{name}": 1.0}
