"""The `trainer:` mapping of a config to TRL's `DPOConfig` or `SFTConfig`: names checked, defaults that suit a VLM."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from prefalign import bundled
from prefalign.config import ConfigError, nearest

OWNED = {
    "output_dir": "set `output`",
    "seed": "set `seed`",
    "resume_from_checkpoint": "set `resume`",
}
DPO_WITHOUT_EFFECT = {
    "padding_free": "rows are packed without padding anyway, where a family allows it",
    "pad_to_multiple_of": "TRL does it for text only",
    "truncation_mode": "answers are cut at their end, prompts never",
    "dataset_num_proc": "rows are prepared batch by batch",
    "precompute_ref_batch_size": "the reference's pass takes the batches of training",
    "model_init_kwargs": "`model` says how the model is loaded",
    "trust_remote_code": "set `model.trust_remote_code`",
    "pad_token": "the processor has one",
}
"""Fields of `DPOConfig` that say nothing about pairs with pictures, and why."""

SFT_WITHOUT_EFFECT = {
    "completion_only_loss": "the loss is always on the answers only",
    "assistant_only_loss": "the loss is always on the answers only",
    "packing": "TRL packs text only",
    "eval_packing": "TRL packs text only",
    "padding_free": "TRL does it for text only",
    "pad_to_multiple_of": "TRL does it for text only",
    "truncation_mode": "nothing is cut: rows longer than max_length are dropped",
    "shuffle_dataset": "rows are drawn in a random order anyway, by `seed`",
    "dataset_text_field": "rows are conversations",
    "dataset_kwargs": "rows are prepared batch by batch",
    "dataset_num_proc": "rows are prepared batch by batch",
    "model_init_kwargs": "`model` says how the model is loaded",
    "trust_remote_code": "set `model.trust_remote_code`",
    "pad_token": "the processor has one",
}
"""Fields of `SFTConfig` that say nothing about conversations with pictures, and why."""

AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_length",
)
"""Fields that count rows, batches or tokens."""

NOT_NEGATIVE = ("learning_rate", "value_learning_rate", "weight_decay", "max_grad_norm")
"""Fields that are a number of 0 or more."""

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def defaults() -> dict[str, Any]:
    """Where this project starts from, if a config says nothing.

    `max_length` None (nothing is cut), bfloat16 only on a GPU that has it, no tracker, plain log lines without a
    terminal. `use_cpu` where there is nothing else: without it `torchrun` on a CPU trains separate models side by side.
    `logging_nan_inf_filter` off: it logs a loss that is not a number as 0, and `Upkeep` stops at one. Everything else
    is TRL's default, `beta` 0.1 and gradient checkpointing included.
    """
    on_gpu = torch.cuda.is_available()
    return {
        "use_cpu": not torch.accelerator.is_available(),
        "max_length": None,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "report_to": "none",
        "logging_nan_inf_filter": False,
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": on_gpu,
    }


def training_arguments(
    settings: Mapping[str, Any],
    *,
    output: Path,
    seed: int,
    kind: type[Arguments] = DPOConfig,
) -> Arguments:
    """Build TRL's arguments from a config's `trainer:` mapping.

    Args:
        settings: names and values of the fields of `kind`.
        output: folder of the run.
        seed: seed of the run; order of rows and LoRA start follow from it.
        kind: `trl.DPOConfig` or `trl.SFTConfig`.

    Raises:
        ConfigError: one line per unknown name (with the nearest known one), wrong type, number out of range, field that the
            recipe sets or that would have no effect; processes that do not see each other.
    """
    known = [entry.name for entry in dataclasses.fields(kind) if entry.init]
    hints = typing.get_type_hints(kind)
    without_effect = SFT_WITHOUT_EFFECT if issubclass(kind, SFTConfig) else DPO_WITHOUT_EFFECT
    problems, values = [], {}
    for name, value in settings.items():
        if name in OWNED:
            problems.append(f"trainer.{name}: the recipe sets this field; {OWNED[name]} instead.")
        elif name in without_effect:
            problems.append(f"trainer.{name}: has no effect here ({without_effect[name]}); leave it out.")
        elif name not in known:
            problems.append(f"trainer.{name}: unknown key (value {value!r}); {_hint(name, known, kind)}")
        else:
            try:
                values[name] = TypeAdapter(hints[name]).validate_python(value)
            except ValidationError as error:
                problems.append(f"trainer.{name}: {error.errors()[0]['msg']} (got {value!r}).")
            else:
                problems += _number_problem(name, values[name])
    if problems:
        raise ConfigError("\n  ".join(problems))
    if isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = str(bundled.find(values["deepspeed"]))
    start = {name: value for name, value in defaults().items() if name in known}  # GRPO has no max_length
    arguments = kind(**{**start, **values, "output_dir": str(output), "seed": seed})
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != started:
        raise ConfigError(
            f"{started} processes were started and this one sees {arguments.world_size}: each would train a model of its own and "
            "overwrite the others'. On a CPU start them with torchrun and leave trainer.use_cpu alone."
        )
    return arguments


def shares_weights(arguments: TrainingArguments) -> bool:
    """Whether no process holds all weights: DeepSpeed ZeRO-3 and FSDP share them out."""
    return bool(arguments.fsdp_plugin_args) or getattr(arguments.deepspeed_plugin, "zero_stage", 0) == 3


def check_precision(dtype: torch.dtype, arguments: TrainingArguments) -> None:
    """Check that weights and autocast can meet: with weights of the other 16 bits torch stops at the first operation on both.

    Args:
        dtype: of the loaded weights.
        arguments: `bf16` and `fp16` count.

    Raises:
        ConfigError: float16 weights under bfloat16 autocast, or the reverse.
    """
    pairs = ((arguments.bf16, "bf16", torch.float16, "bfloat16"), (arguments.fp16, "fp16", torch.bfloat16, "float32"))
    for asked, name, other, better in pairs:
        if asked and dtype == other:
            stored = str(other).removeprefix("torch.")
            raise ConfigError(
                f"model.dtype: the weights are {stored} and trainer.{name} is true (a GPU with bfloat16 makes it so by itself): "
                f"torch's autocast refuses to mix the two. Set model.dtype to {better}, or trainer.{name} to false."
            )


def _number_problem(name: str, value: Any) -> list[str]:
    """What is wrong with a plain number, which torch or transformers would say late, and not by the setting's name."""
    if value is None:
        return []
    if name == "num_train_epochs" and not 0 < value < math.inf:
        return [
            f"trainer.num_train_epochs is {value}: a run passes over its rows for some time. Give a number above 0."
        ]
    if name in AT_LEAST_ONE and value < 1:
        return [f"trainer.{name} is {value}, so no batch would hold anything. Give 1 or more."]
    if name in NOT_NEGATIVE and not 0 <= value < math.inf:
        return [f"trainer.{name} is {value}, with which no step can be taken. Give a number of 0 or more."]
    return []


def _hint(name: str, known: Sequence[str], kind: type) -> str:
    other = next((one for one in (DPOConfig, SFTConfig) if name in one.__dataclass_fields__), None)
    if other is not None:
        return f"it is a field of {other.__name__}, and this recipe trains with {kind.__name__}. Leave it out."
    hint = nearest(name, known)
    return hint if hint.startswith("did you mean") else f"{kind.__name__} of TRL lists the fields there are."
