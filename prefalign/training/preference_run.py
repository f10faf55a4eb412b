"""A preference run put together as its config says, for all that sets one up: the recipe, `prefalign doctor`, `prefalign plan`.

`config` is always the config of `recipes/train_preference.py`. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign.config import ConfigError
from prefalign.losses import Weighted, read_losses, views_of
from prefalign.training.arguments import training_arguments
from prefalign.training.checks import needs_reference, reading_rejected
from prefalign.training.frame import Start
from prefalign.training.lora import check_quantised, check_targets
from prefalign.training.pairs import check_columns, check_negative, check_rejected_side, check_texts, load_pairs
from prefalign.training.policy import in_parts, load_policy
from prefalign.training.preference import PreferenceTrainer
from prefalign.training.runs import files_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Inputs:
    """What a run is told and trains on.

    Attributes:
        arguments: TRL's `DPOConfig`.
        losses: weighted terms.
        pairs: rows to train on.
        eval_pairs: held-out rows, if there are any.
        files: `runs.run_files` of the run.
    """

    arguments: Any
    losses: list[Weighted]
    pairs: Dataset
    eval_pairs: Dataset | None
    files: dict[str, str]


def read_inputs(config: Any, *, output: Path, trainer: Mapping[str, Any]) -> Inputs:
    """Settings and pairs, checked against each other.

    Args:
        config: the recipe's config.
        output: folder of the run.
        trainer: fields of `DPOConfig`.

    Raises:
        ConfigError: settings that contradict each other, or a `negative` that makes nothing.
        ValueError: pairs that are not whole, or lack what a loss reads.
    """
    if config.reference_folder is not None and config.reference == "online":
        raise ConfigError(
            "reference_folder: nothing is kept there while reference is 'online'. Leave it out, or set reference to 'cached'."
        )
    arguments: Any = training_arguments(trainer, output=output, seed=config.seed)
    check_quantised(config.model, config.lora, arguments)
    check_held_out(arguments, config.eval_pairs)
    losses = read_losses(config.losses, beta=arguments.beta)
    views = views_of(losses)
    folders = [config.pairs, *([config.eval_pairs] if config.eval_pairs else [])]
    datasets = [load_pairs(folder) for folder in folders]
    if config.negative is not None:
        check_negative(datasets[0], views, config.pairs, config.negative)
    for folder, dataset in zip(folders, datasets, strict=True):
        check_columns(dataset, views, folder, config.negative)
        check_rejected_side(dataset, folder, reading_rejected(losses, arguments.loss_type))
        if needs_reference(losses, arguments.loss_type):
            check_texts(dataset, views, folder)
    held_out = datasets[1] if config.eval_pairs else None
    return Inputs(arguments, losses, datasets[0], held_out, files_of(config, *folders))


def check_held_out(arguments: Any, eval_pairs: Path | None) -> None:
    """Check that a run that is to be measured on its way has something to be measured on.

    Raises:
        ConfigError: it has nothing.
    """
    if arguments.eval_strategy != "no" and eval_pairs is None:
        raise ConfigError(
            f"trainer.eval_strategy is {arguments.eval_strategy.value!r}, and no held-out pairs are named. Give `eval_pairs`, or "
            "set eval_strategy to 'no'."
        )


def build_trainer(config: Any, inputs: Inputs, start: Start) -> PreferenceTrainer:
    """The trainer of the run, on all its rows.

    Raises:
        ConfigError: settings that contradict each other, or an adapter that has no module to sit on.
    """
    if config.lora:
        check_targets(start.model, config.lora)
    # weights that are shared out cannot be copied, so the reference is loaded once more
    online = config.reference == "online" and needs_reference(inputs.losses, inputs.arguments.loss_type)
    loads_reference = online and config.lora is None and in_parts(start.model)
    return PreferenceTrainer(
        start.model,
        ref_model=load_policy(config.model, None, device=str(inputs.arguments.device)) if loads_reference else None,
        args=inputs.arguments,
        train_dataset=inputs.pairs,
        eval_dataset=inputs.eval_pairs,
        processing_class=start.processor,
        files=start.files,
        losses=inputs.losses,
        **trainer_settings(config),
    )


def trainer_settings(config: Any) -> dict[str, Any]:
    """Arguments of `PreferenceTrainer` that come from the config as they are."""
    return {
        "peft_config": config.lora.to_peft() if config.lora else None,
        "negative": config.negative,
        "negative_seed": config.seed,
        "fast_path": config.fast_path,
        "reference": config.reference,
        "tokens_per_pass": config.tokens_per_pass,
    }
