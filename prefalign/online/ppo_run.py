"""A PPO run put together as its config says, for the recipe and `prefalign doctor`.

`config` is always the config of `recipes/train_ppo.py`. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from transformers import set_seed

from prefalign.config import ConfigError
from prefalign.online.arguments import PPOConfig
from prefalign.online.ppo import PPOTrainer
from prefalign.online.prompt_rows import Fit, keep_fitting, load_prompts
from prefalign.online.reward_adapters import share_base, value_start
from prefalign.rewards import Combined, read_rewards
from prefalign.training.arguments import training_arguments
from prefalign.training.frame import Start
from prefalign.training.lora import check_quantised
from prefalign.training.runs import files_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Inputs:
    """What a run is told, learns from and asks.

    Attributes:
        arguments: settings of the trainer.
        rewards: what answers are worth.
        watch: rewards that are logged only.
        prompts: rows to ask.
        files: `runs.run_files` of the run.
    """

    arguments: PPOConfig
    rewards: Combined
    watch: Combined | None
    prompts: Dataset
    files: dict[str, str]


def reward_entries(config: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of `rewards` and `watch`, their model's folder filled in.

    Raises:
        ConfigError: `reward_model` is named, and no entry asks for it.
    """

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


def read_inputs(config: Any, *, output: Path, trainer: Mapping[str, Any]) -> Inputs:
    """Settings, rewards and prompts.

    Args:
        config: the recipe's config.
        output: folder of the run.
        trainer: fields of `PPOConfig`.

    Raises:
        ConfigError: settings that contradict each other, or rewards that cannot be read.
        ValueError: a folder of prompts that is not whole.
    """
    arguments = training_arguments(trainer, output=output, seed=config.seed, kind=PPOConfig)
    arguments.check()
    check_quantised(config.model, config.lora, arguments)
    entries, watched = reward_entries(config)
    rewards = read_rewards(entries)
    watch = read_rewards(watched) if watched else None
    for combined in (rewards, watch):
        if combined is not None:
            combined.check()
    prompts = load_prompts(config.prompts)
    return Inputs(arguments, rewards, watch, prompts, files_of(config, config.prompts, data="prompts"))


def build_trainer(config: Any, inputs: Inputs, start: Start) -> tuple[PPOTrainer, Fit, str]:
    """The trainer of the run, on the prompts that fit.

    Returns:
        The trainer, which prompts fit, and a remark on where the reward model's weights are.
    """
    from peft import get_peft_model

    args, model = inputs.arguments, start.model
    set_seed(config.seed)  # the start of the adapters
    if config.lora and not is_peft_model(model):
        model = get_peft_model(model, config.lora.to_peft())
    reward_adapter, how = share_base(inputs.rewards, model, config.fast_path) if config.lora else (None, "")
    value_model = None if config.lora else value_start(inputs.rewards, model)
    prompts, fit = keep_fitting(
        inputs.prompts, start.processor, args.max_length, args.max_new_tokens, conversations=args.conversations
    )
    trainer = PPOTrainer(
        model,
        args=args,
        train_dataset=prompts,
        processing_class=start.processor,
        rewards=inputs.rewards,
        watch=inputs.watch,
        reward_adapter=reward_adapter,
        value_model=value_model,
        files=start.files,
        fast_path=config.fast_path,
    )
    return trainer, fit, how
