"""The `trainer:` mapping of a config to TRL's `DPOConfig`: names checked, numbers read, defaults that suit a VLM."""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from trl import DPOConfig

from prefalign import bundled
from prefalign.config import ConfigError, nearest

OWNED = {
    "output_dir": "set `output`",
    "seed": "set `seed`",
    "resume_from_checkpoint": "set `resume`",
}


def defaults() -> dict[str, Any]:
    """Where this project starts from, if a config says nothing.

    `max_length` None (nothing is cut), bfloat16 only on a GPU that has it, no tracker, plain log lines without a
    terminal. `use_cpu` where there is nothing else: without it `torchrun` on a CPU trains separate models side by side.
    Everything else is TRL's default, `beta` 0.1 and gradient checkpointing included.
    """
    on_gpu = torch.cuda.is_available()
    return {
        "use_cpu": not torch.accelerator.is_available(),
        "max_length": None,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": on_gpu,
    }


def training_arguments(settings: Mapping[str, Any], *, output: Path, seed: int) -> DPOConfig:
    """Build TRL's arguments from a config's `trainer:` mapping.

    Args:
        settings: names and values of `trl.DPOConfig` fields.
        output: folder of the run.
        seed: seed of the run; order of rows and LoRA start follow from it.

    Raises:
        ConfigError: one line per unknown name (with the nearest known one), wrong type, or field that the recipe sets;
            processes that do not see each other.
    """
    known = [entry.name for entry in dataclasses.fields(DPOConfig) if entry.init]
    hints = typing.get_type_hints(DPOConfig)
    problems, values = [], {}
    for name, value in settings.items():
        if name in OWNED:
            problems.append(f"trainer.{name}: the recipe sets this field; {OWNED[name]} instead.")
        elif name not in known:
            problems.append(f"trainer.{name}: unknown key (value {value!r}); {nearest(name, known)}")
        else:
            try:
                values[name] = TypeAdapter(hints[name]).validate_python(value)
            except ValidationError as error:
                problems.append(f"trainer.{name}: {error.errors()[0]['msg']} (got {value!r}).")
    if problems:
        raise ConfigError("\n  ".join(problems))
    if isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = str(bundled.find(values["deepspeed"]))
    arguments = DPOConfig(**{**defaults(), **values, "output_dir": str(output), "seed": seed})
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != started:
        raise ConfigError(
            f"{started} processes were started and this one sees {arguments.world_size}: each would train a model of its own and "
            "overwrite the others'. On a CPU start them with torchrun and leave trainer.use_cpu alone."
        )
    return arguments
