"""A reward model's training put together as its config says, for the recipe and `prefalign doctor`.

`config` is always the config of `reward_models/train_reward_model.py`. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign.rewards.rows import check_pictures, check_rows, check_settings, load_reward_pairs
from prefalign.rewards.trainer import RewardTrainer, check_whole, reward_arguments
from prefalign.rewards.vlm import BaseModel, RewardModel
from prefalign.training.frame import Start
from prefalign.training.lora import check_quantised
from prefalign.training.runs import files_of

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import RewardConfig


@dataclass
class Inputs:
    """What a run is told and trains on.

    Attributes:
        arguments: TRL's `RewardConfig`.
        pairs: rows to train on.
        eval_pairs: held-out rows, if there are any.
        files: `runs.run_files` of the run.
    """

    arguments: RewardConfig
    pairs: Dataset
    eval_pairs: Dataset | None
    files: dict[str, str]


def read_inputs(config: Any, *, output: Path, trainer: Mapping[str, Any]) -> Inputs:
    """Settings and pairs, checked against each other.

    Args:
        config: the recipe's config.
        output: folder of the run.
        trainer: fields of `RewardConfig`.

    Raises:
        ConfigError: settings that contradict each other.
        ValueError: pairs that are not whole, or do not say which answer is better.
    """
    arguments = reward_arguments(trainer, output=output, seed=config.seed)
    check_whole(arguments)
    check_quantised(config.model, config.lora, arguments)
    folders = [config.pairs, *([config.eval_pairs] if config.eval_pairs else [])]
    datasets = [load_reward_pairs(folder) for folder in folders]
    for folder, dataset in zip(folders, datasets, strict=True):
        check_rows(dataset, folder, config.attributes, objective=config.objective)
        check_pictures(dataset, folder, rejected_pictures=config.rejected_pictures)
    check_settings(datasets[0], config.pairs, margins=config.margins, rejected_pictures=config.rejected_pictures)
    return Inputs(arguments, datasets[0], datasets[1] if config.eval_pairs else None, files_of(config, *folders))


def build_trainer(config: Any, inputs: Inputs, start: Start) -> RewardTrainer:
    """The trainer of the run, on all its rows."""
    model = start.model
    base = BaseModel(config.model.model_name_or_path, config.model.model_revision, start.fingerprint,
                     str(model.dtype).removeprefix("torch."), config.model.load_in_4bit)  # fmt: skip
    if config.lora:
        from peft import get_peft_model
        from transformers import set_seed

        set_seed(config.seed)
        model = get_peft_model(model, config.lora.to_peft())
    reward_model = RewardModel(model, start.processor, base=base, attributes=config.attributes, rating=config.prompt,
                               fast_path=config.fast_path, seed=config.seed)  # fmt: skip
    return RewardTrainer(
        reward_model,
        args=inputs.arguments,
        train_dataset=inputs.pairs,
        eval_dataset=inputs.eval_pairs,
        objective=config.objective,
        centring=config.centring,
        margins=config.margins,
        facts=config.facts,
        drop_facts=config.drop_facts,
        rejected_pictures=config.rejected_pictures,
        reference_rows=config.reference_rows,
        files=start.files,
    )
