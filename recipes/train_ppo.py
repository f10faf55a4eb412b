"""Train a vision-language model with PPO on rewards of its own answers: reward models, judges, rules or any Python function.

Papers: Fact-RLHF, arXiv 2309.14525 (factually augmented PPO: one base, adapters for policy, value and reward); PPO, arXiv
1707.06347. docs/ppo.md says what is kept of the released code and what is not.

Needs: a folder of prompts (or of pairs, whose questions are asked), a model that has been through SFT, and rewards. Started again
with the same config it goes on from its last checkpoint and ends with the weights of an uninterrupted run. Several processes:
`torchrun --nproc_per_node N`, or `accelerate launch` with a profile of configs/accelerate/ (DDP and ZeRO-2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefalign.models import ModelConfig
from prefalign.training.lora import LoraSettings


@dataclass
class Config:
    """One training run.

    Attributes:
        model: the policy's starting weights, which are the reference too. An adapter is trained on where `lora` describes it
            (its start is then the reference), and merged without `lora`.
        prompts: folder of prompts to answer.
        output: folder of the run: checkpoints, final model or adapter with its processor, answers of every rollout, logs.
        rewards: what an answer is worth: entries {name, weight, settings}, whose weighted sum is learned. Names are those of
            `prefalign.rewards.REWARDS`. A reward model that is a LoRA on the policy's base becomes one more adapter of it, and
            the values start from its weights.
        reward_model: folder of the reward model that entries `{name: reward_model}` (of `watch` too) without a `path` mean.
        reward_floor: least accuracy of a reward model on every set that it was graded on (`grade_reward_model`).
        force_reward: train against a reward model that was not graded as it is used here, on enough pairs, or is below the floor.
        watch: more such entries that are logged and never learned: what the policy should not lose while the reward rises.
        trainer: fields of `prefalign.online.arguments.PPOConfig` by name.
        lora: train an adapter; without it all weights that are not frozen.
        freeze: without `lora`, towers that stay as they are. With `vision` and `projector` pictures are encoded once per rollout.
        fast_path: `auto` runs prompt and pictures once per prompt where the family allows it exactly; `off` repeats them.
        resume: "auto" goes on from the last checkpoint if there is one; true demands one; false refuses one.
        seed: order of the prompts, start of the adapter, and with a prompt's id its answers.
    """

    model: ModelConfig
    prompts: Path
    output: Path
    rewards: list[dict[str, Any]]
    reward_model: Path | None = None
    reward_floor: float = 0.6
    force_reward: bool = False
    watch: list[dict[str, Any]] = field(default_factory=list)
    trainer: dict[str, Any] = field(
        default_factory=dict, metadata={"fields_of": "prefalign.online.arguments.PPOConfig"}
    )
    lora: LoraSettings | None = None
    freeze: list[str] = field(default_factory=lambda: ["vision", "projector"])
    fast_path: Literal["auto", "off"] = "auto"
    resume: Literal["auto"] | bool = "auto"
    seed: int = 0


def main(config: Config) -> None:
    """Train, or go on training, and save everything that an evaluation and a model card need."""
    from prefalign.online.ppo_run import build_trainer, read_inputs, reward_entries
    from prefalign.rewards.grading import check_rewards
    from prefalign.training.distributed import running_processes
    from prefalign.training.frame import begin_run, claim_folder, prepare_training, train_run
    from prefalign.training.lora import check_trainable

    prepare_training(config.trainer)
    check_rewards(reward_entries(config)[0], floor=config.reward_floor, force=config.force_reward)
    inputs = read_inputs(config, output=config.output, trainer=config.trainer)
    start = begin_run(config, inputs.arguments, inputs.files, continues=True)
    if start is None:
        return
    trainer, fit, how = build_trainer(config, inputs, start)
    running = running_processes(trainer.accelerator, config.trainer)
    check_trainable(trainer.model, config.freeze)
    answers = trainer.args.answers_per_iteration * trainer.args.world_size
    lines = [
        f"{fit.rows_used} prompts, {fit.summary() or 'all fit'}; {running}",
        f"an iteration draws {answers} answers and makes {trainer.args.updates_per_iteration} updates on them{how}",
    ]
    claim_folder(config, trainer, start, running, lines)
    train_run(config, trainer, start, fit)


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
