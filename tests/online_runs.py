"""Small runs of `train_online` on the embedded world, shared by its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prefalign import bundled, config
from prefalign.records import Pair, Prompt
from prefalign.scenes.export import export
from prefalign.stages import make_pair
from prefalign.store import OutputConfig, read_records, write_records

RECIPE = bundled.load_stage("train_online")


def write_prompts(folder: Path, count: int = 6) -> Path:
    """Caption prompts of fair pictures, with their facts."""
    export(folder, split="train_fair", kind="caption", start=0, stop=count)
    return folder


def write_offline(folder: Path, prompts: Path, count: int | None = None) -> Path:
    """A pair for each of the first prompts: its answer against a sentence about nothing in it."""
    made = [
        make_pair(prompt, method="test", chosen=str(prompt.answer), rejected="There is a purple spiral.", settings={},
                  seed=0, meta={"source": "offline"})
        for prompt in list(read_records(prompts, Prompt))[:count]
    ]  # fmt: skip
    write_records("test", made, output=OutputConfig(folder), record=Pair, settings={}, seed=0)
    return folder


def online_config(data: Path | None, output: Path, **changes: Any) -> Any:
    """Two rounds of three prompts on the tiny scenes model, checkpoints at every step."""
    base: dict[str, Any] = {
        "model": {"model_name_or_path": "scenes", "device": "cpu"},
        "data": None if data is None else {"path": data},
        "output": output,
        "p_offline": 0.5,
        "rounds": {"count": 2, "prompts": 3, "block_size": 2},
        "sampling": {"max_new_tokens": 64, "temperature": 1.2},
        "rewards": [{"name": "objects", "weight": {"invented": 1.0, "recall": 3.0}}],
        "check": {"prompts": 0},
        "batch_size": 8,
        "trainer": {"learning_rate": 1e-4, "per_device_train_batch_size": 1, "save_steps": 1, "logging_steps": 1,
                    "num_train_epochs": 1,
                    "gradient_checkpointing": False, "disable_tqdm": True},
        "freeze": [],
    }  # fmt: skip
    return config.build(RECIPE.Config, config.merge(base, changes), source="test")


def run(data: Path | None, output: Path, **changes: Any) -> Any:
    """Run it."""
    return RECIPE.main(online_config(data, output, **changes))


def policy_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a saved policy or adapter."""
    return load_file(next(folder.glob("*model.safetensors")))
