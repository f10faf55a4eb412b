"""Train a vision-language model on its own answers: rounds of online or mixed DPO, online BDHS, DPO step by step, GRPO, RLOO.

Paper: Amirloo et al., "Understanding Alignment in Multimodal LLMs", arXiv 2407.02477, sections 3.2 to 3.4 (no released code).
`trainer.algorithm`: `online_dpo` runs rounds of sample -> annotate -> pair -> mix with offline pairs -> DPO; `online_dpo_step`
samples in every step, for small models; `grpo` and `rloo` are TRL's, on our rewards.

Needs: prompts or offline pairs, a model, and something that says which answer is better: `rewards`, an `annotator`, or `bdhs`.
Started again with the same config, a killed run goes on and ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefalign.online.settings import OnlineConfig, check_settings, unread


@dataclass
class Config(OnlineConfig):
    """One run; `prefalign.online.settings.OnlineConfig` says what each setting means."""


def main(config: Config) -> dict[str, Any] | None:
    """Train, or go on training; returns the content of `results.json` for rounds."""
    from prefalign.rewards.grading import check_rewards
    from prefalign.training.upkeep import plain_lines_without_a_terminal

    check_settings(config)
    entries = [*config.rewards, *([config.annotator] if config.annotator else [])]
    check_rewards(entries, floor=config.reward_floor, force=config.force_reward)
    if names := unread(config):
        print(f"not read by trainer.algorithm {config.algorithm}: {', '.join(names)}")
    plain_lines_without_a_terminal()
    if config.algorithm == "online_dpo":
        from prefalign.online.rounds import run_rounds

        return run_rounds(config)
    if config.algorithm == "online_dpo_step":
        from prefalign.online.step_run import train_steps

        train_steps(config)
        return None
    from prefalign.online.policy_gradient import train_policy_gradient

    train_policy_gradient(config)
    return None


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
