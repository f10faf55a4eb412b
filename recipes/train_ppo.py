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
    trainer: dict[str, Any] = field(default_factory=dict)
    lora: LoraSettings | None = None
    freeze: list[str] = field(default_factory=lambda: ["vision", "projector"])
    fast_path: Literal["auto", "off"] = "auto"
    resume: Literal["auto"] | bool = "auto"
    seed: int = 0


def _with_paths(config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of `rewards` and `watch`, their model's folder filled in."""
    from prefalign.config import ConfigError

    def wants(entry: dict[str, Any]) -> bool:
        return entry.get("name") == "reward_model" and "path" not in entry

    if config.reward_model is None:
        return config.rewards, config.watch
    if not any(wants(entry) for entry in [*config.rewards, *config.watch]):
        raise ConfigError(
            f"reward_model is {config.reward_model}, and no entry of rewards or watch is a `{{name: reward_model}}` without a "
            "`path`: it would not be asked. Add such an entry, or leave reward_model out."
        )
    filled = {"path": str(config.reward_model)}
    rewards, watch = (
        [{**entry, **filled} if wants(entry) else entry for entry in entries]
        for entries in (config.rewards, config.watch)
    )
    return rewards, watch


def main(config: Config) -> None:
    """Train, or go on training, and save everything that an evaluation and a model card need."""
    from accelerate.utils import is_peft_model
    from peft import get_peft_model
    from transformers import set_seed

    from prefalign.config import to_mapping
    from prefalign.models import fingerprint, freeze, load_processor, parameter_table
    from prefalign.online.arguments import PPOConfig
    from prefalign.online.ppo import PPOTrainer
    from prefalign.online.prompt_rows import keep_fitting, load_prompts
    from prefalign.online.reward_adapters import share_base, value_start
    from prefalign.rewards import read_rewards
    from prefalign.rewards.grading import check_rewards
    from prefalign.training.arguments import check_precision, training_arguments
    from prefalign.training.distributed import claim_processes, prepare_processes, running_processes
    from prefalign.training.lora import check_quantised, check_trainable
    from prefalign.training.policy import load_policy
    from prefalign.training.runs import base_file, claim_run, full_disk_explained, is_finished, open_run, run_files
    from prefalign.training.upkeep import plain_lines_without_a_terminal, train_and_save

    plain_lines_without_a_terminal()
    prepare_processes(config.trainer)
    arguments = training_arguments(config.trainer, output=config.output, seed=config.seed, kind=PPOConfig)
    arguments.check()
    check_quantised(config.model, config.lora, arguments)
    entries, watched = _with_paths(config)
    check_rewards(entries, floor=config.reward_floor, force=config.force_reward)
    rewards = read_rewards(entries)
    watch = read_rewards(watched) if watched else None
    prompts = load_prompts(config.prompts)
    manifest = (config.prompts / "manifest.json").read_text(encoding="utf-8")
    files = run_files(to_mapping(config), manifest, data="prompts")
    main_process, processes = arguments.process_index == 0, arguments.world_size
    open_run(config.output, files, resume=config.resume, processes=processes)

    processor = load_processor(config.model)
    model = load_policy(config.model, config.lora, device=str(arguments.device), continues=True)
    check_precision(model.dtype, arguments)
    base = fingerprint(model)
    goes_on = is_peft_model(model)
    changed = goes_on or bool(getattr(model, "is_quantized", False))
    files |= base_file(config.model.model_name_or_path, base, changed=changed)
    checkpoint = open_run(config.output, files, resume=config.resume, processes=processes)
    if is_finished(config.output):
        if main_process:
            print(f"{config.output} is finished; nothing to do.")
        return
    set_seed(config.seed)  # the start of the adapters
    if config.lora is None:
        freeze(model, config.freeze)
    elif not goes_on:
        model = get_peft_model(model, config.lora.to_peft())
    reward_adapter, how = share_base(rewards, model, config.fast_path) if config.lora else (None, "")
    value_model = None if config.lora else value_start(rewards, model)
    prompts, fit = keep_fitting(
        prompts, processor, arguments.max_length, arguments.max_new_tokens, conversations=arguments.conversations
    )
    trainer = PPOTrainer(
        model,
        args=arguments,
        train_dataset=prompts,
        processing_class=processor,
        rewards=rewards,
        watch=watch,
        reward_adapter=reward_adapter,
        value_model=value_model,
        files=files,
        fast_path=config.fast_path,
    )
    running = running_processes(trainer.accelerator, config.trainer)
    check_trainable(trainer.model, config.freeze)
    if main_process:
        for row in parameter_table(trainer.model):
            print(f"{row['tower']:<15}{row['parameters']:>16,} parameters{row['trainable']:>16,} trainable")
        answers = arguments.answers_per_iteration * processes
        print(f"{fit.rows_used} prompts, {fit.summary() or 'all fit'}; {running}")
        print(f"an iteration draws {answers} answers and makes {arguments.updates_per_iteration} updates on them{how}")
        if checkpoint:
            print(f"going on from {checkpoint.name}")
    with full_disk_explained(config.output):
        if main_process:
            claim_run(config.output, files)
        claim_processes(config.output, running, main_process=main_process)
    train_and_save(trainer, config.output, checkpoint=checkpoint, rows=fit.rows(), counts=fit.counts())
    if main_process:
        print(f"saved {config.output}")


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
