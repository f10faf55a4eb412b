"""The arithmetic of PPO as pure functions: rewards per token, advantages, losses, KL estimates.

Papers: PPO, arXiv 1707.06347; GAE, arXiv 1506.02438; the details that matter on language models, Huang, Liu and von Werra,
"The N Implementation Details of RLHF with PPO" (2023). Departures from released code: means run over real tokens only, summed
over the whole minibatch (LLaVA-RLHF and align-anything average padding in), and the KL part of the reward is not clamped.

Legend of shapes: `B` answers, `T` tokens of the longest. Log-probs and values at `t` are read at the position before token `t`,
the state that emits it. `mask` (B, T) bool is true at tokens that the policy drew, its end of turn included; the false ones
between them (the next question of a conversation) are passed over as if they were not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over real tokens; whatever stands at the others, NaN included, does not count."""
    return values.masked_fill(~mask, 0.0).sum()


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens of all rows together, 0 without any."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    shift_mean: bool = True,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> torch.Tensor:
    """Values with masked mean 0 and standard deviation 1 (of the population), 0 outside the mask.

    Args:
        values: (B, T).
        mask: (B, T).
        shift_mean: False: the mean stays as it was (rewards; the mean of what is whitened carries the task).
        total: adds a tensor up over processes, so that the whole rollout is whitened as one.
    """
    count, first = total(torch.stack([mask.sum().double(), masked_sum(values.double(), mask)])).unbind()
    mean = first / count.clamp(min=1)
    variance = total(masked_sum((values.double() - mean) ** 2, mask)) / count.clamp(min=1)
    whitened = (values - mean) / (variance.sqrt() + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0).to(values.dtype)


def kl_terms(logps: torch.Tensor, ref_logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Schulman's estimates of KL(policy, reference) per token, k1 and k3 (arXiv 2510.01555 compares them).

    k1 is unbiased and may be negative at a token; it goes into the reward, unclamped. k3 is never negative and smoother: it is
    what is watched. Clamping k1 at 0, as LLaVA-RLHF does, makes its sum no estimate of the KL.
    """
    k1 = logps - ref_logps
    return k1, torch.expm1(-k1) + k1


def place_rewards(
    scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, *, kl_coef: float, ends: torch.Tensor | None = None
) -> torch.Tensor:
    """Reward of each token: `-kl_coef * kl`, and the score on the last real token.

    LLaVA-RLHF adds the score at the last column of the padded answer, which is right for gamma = lambda = 1 only.

    Args:
        scores: (B,) score of each answer, or (B, T) a score for each token where a conversation is scored turn by turn.
        kl: (B, T) k1 per token.
        mask: (B, T).
        kl_coef: beta.
        ends: (B,) place of the last real token, where it is known; by default found in the mask.

    Returns:
        (B, T), 0 outside the mask.
    """
    rewards = -kl_coef * kl.masked_fill(~mask, 0.0)
    if scores.ndim == 2:
        return (rewards + scores).masked_fill(~mask, 0.0)
    ends = last_places(mask) if ends is None else ends
    said = mask.any(dim=1)
    rewards[said, ends[said]] += scores[said].to(rewards.dtype)
    return rewards


def last_places(mask: torch.Tensor) -> torch.Tensor:
    """(B,) place of the last real token of each row; 0 for a row without any."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places * mask).amax(dim=1)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and returns (arXiv 1506.02438, equations 11 and 12), backwards over real tokens.

    `delta_t = r_t + gamma V_(t+1) - V_t`, `A_t = delta_t + gamma lam A_(t+1)`, where t+1 is the next real token and both are 0
    after the last; returns are `A + V`.

    Args:
        rewards: (B, T).
        values: (B, T) of the policy that drew the tokens.
        mask: (B, T).
        gamma: discount.
        lam: lambda; 1 with gamma 1 and no values gives the sum of the rewards still to come.

    Returns:
        Advantages and returns, (B, T) each, 0 outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(len(rewards))
    for place in reversed(range(rewards.shape[1])):
        real = mask[:, place]
        delta = rewards[:, place] + gamma * next_value - values[:, place]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, values[:, place], next_value)
        advantages[:, place] = advantage.masked_fill(~real, 0.0)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def policy_loss(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *, cliprange: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), summed over real tokens.

    Returns:
        The sum, which the caller divides by the tokens of the whole minibatch, and the sums `approxkl` (k3 of old and new
        policy), `clipfrac`, `ratio` and `tokens`.
    """
    difference = (logps - old_logps).masked_fill(~mask, 0.0)
    ratio = difference.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    with torch.no_grad():
        sums = {
            "approxkl": masked_sum(ratio - 1 - difference, mask),
            "clipfrac": masked_sum((clipped > unclipped).float(), mask),
            "ratio": masked_sum(ratio, mask),
            "tokens": mask.sum(),
        }
    return masked_sum(torch.maximum(unclipped, clipped), mask), sums


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, *, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of values, clipped around those of the rollout, summed over real tokens.

    Returns:
        The sum, and the number of tokens where clipping decided.
    """
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    error, clipped = (values - returns) ** 2, (near - returns) ** 2
    decided = masked_sum((clipped > error).float(), mask).detach()
    return 0.5 * masked_sum(torch.maximum(error, clipped), mask), decided


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens; NaN where the returns do not vary."""
    wanted, missed = returns[mask].double(), (returns - values)[mask].double()
    if len(wanted) < 2 or float(wanted.var()) < 1e-12:
        return math.nan
    return 1 - float(missed.var() / wanted.var())


@dataclass
class AdaptiveKL:
    """A KL coefficient that is raised while the policy is farther from the reference than asked, and lowered while it is nearer.

    Ziegler et al., arXiv 1909.08593, section 2.2.

    Attributes:
        coef: the coefficient now.
        target: nats per answer.
        horizon: answers over which an error of 100 % would change the coefficient by a factor of e.
    """

    coef: float
    target: float = 6.0
    horizon: float = 10_000.0

    def update(self, kl: float, answers: int) -> None:
        """Move the coefficient after a rollout.

        Args:
            kl: mean k1 per answer, in nats; NaN (no answer was scored) leaves the coefficient as it is.
            answers: how many answers it is the mean of.
        """
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * answers / self.horizon
