"""A rollout's rewards per token, advantages and returns, and what is logged of it under the names of TRL's PPO.

Legend of shapes: `B` answers of this process, `T` tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from prefalign.online import advantages as maths
from prefalign.online.monitoring import correlation, distinct

if TYPE_CHECKING:
    from prefalign.online.arguments import PPOConfig
    from prefalign.online.monitoring import Tally
    from prefalign.online.rollout import Rollout


def estimate(
    rollout: Rollout,
    placed: torch.Tensor,
    args: PPOConfig,
    *,
    kl_coef: float,
    total: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Fill in `advantages`, whitened over all processes, and `returns`.

    Args:
        rollout: with log-probs, values and mask.
        placed: (B,) or (B, T) scores, see `advantages.place_rewards`.
        args: settings.
        kl_coef: beta now.
        total: adds a tensor up over processes.
    """
    mask = rollout.mask
    k1, _ = maths.kl_terms(rollout.logps, rollout.ref_logps)
    rewards = maths.place_rewards(placed.to(mask.device), k1, mask, kl_coef=kl_coef)
    if args.whiten_rewards:
        rewards = maths.whiten(rewards, mask, shift_mean=False, total=total)
    estimates, rollout.returns = maths.gae(rewards, rollout.values, mask, gamma=args.gamma, lam=args.lam)
    rollout.advantages = maths.whiten(estimates, mask, total=total)


def describe(rollout: Rollout, shaped: torch.Tensor, tally: Tally, *, kl_coef: float) -> None:
    """Add a rollout's metrics to a tally.

    Args:
        rollout: with everything filled in.
        shaped: (B,) scores as they are learned.
        tally: gets `objective/...`, `val/...` and `returns/...`, per answer unless the name says otherwise.
        kl_coef: beta now.
    """
    mask = rollout.mask
    answered = mask.any(dim=1)
    shaped = shaped.to(mask.device)
    k1, k3 = maths.kl_terms(rollout.logps, rollout.ref_logps)

    def per_answer(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(~mask, 0.0).sum(dim=1)[answered]

    tally.add("objective/kl", per_answer(k1))
    tally.add("objective/kl_k3", per_answer(k3))
    tally.add("objective/entropy", per_answer(rollout.entropy))
    tally.add("objective/entropy_per_token", rollout.entropy[mask])
    tally.add("objective/non_score_reward", per_answer(-kl_coef * k1))
    tally.add("objective/scores", rollout.scores["total"].to(mask.device)[answered])
    tally.add("objective/scores_shaped", shaped[answered])
    tally.add("objective/rlhf_reward", per_answer(-kl_coef * k1) + shaped[answered])
    tally.add("objective/missing", (~answered).float())
    lengths = rollout.drawn().sum(dim=1)
    tally.add("objective/length", lengths[answered.cpu()].float())
    finished = [float(answer.response.finished) for answer in rollout.answers if answer.failed is None]
    tally.add("objective/eos_rate", torch.tensor(finished))
    values, returns = rollout.values[mask], rollout.returns[mask]
    tally.add("val/mean", values)
    tally.add("val/error", (values - returns) ** 2)
    tally.add("returns/mean", returns)
    tally.add("returns/var", (returns - returns.mean()) ** 2)
    tokens = [answer.tokens[answer.drawn].tolist() for answer in rollout.answers]
    for name, value in (
        ("val/explained_variance", maths.explained_variance(rollout.values, rollout.returns, mask)),
        ("objective/distinct_1", distinct(tokens, 1)),
        ("objective/distinct_2", distinct(tokens, 2)),
        ("objective/score_length_correlation", correlation(rollout.scores["total"], lengths.float())),
    ):
        tally.add(name, torch.tensor(value))
