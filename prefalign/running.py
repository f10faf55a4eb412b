"""Run a stage as its options say: in this process, as one of several shards, or over a Ray cluster."""

from __future__ import annotations

import typing
from pathlib import Path
from types import ModuleType
from typing import Any

from prefalign import folders
from prefalign.config import ConfigError
from prefalign.execution import LeftToOthers, Options, sharded
from prefalign.sources import DataConfig
from prefalign.store import OutputConfig


def is_shared_out(stage: ModuleType) -> bool:
    """Whether a stage makes rows out of rows, block by block, so that several processes can share them out."""
    kinds = typing.get_type_hints(stage.Config)
    return kinds.get("data") is DataConfig and kinds.get("output") is OutputConfig


def run(name: str, stage: ModuleType, config: Any, options: Options) -> Any:
    """What a stage's `main` returns; None where this was a shard and others have blocks left, which is printed.

    Args:
        name: the stage's name or file.
        stage: its module.
        config: its resolved config.
        options: who works on the blocks.

    Raises:
        ConfigError: if the stage does not work by blocks.
    """
    shared_out = is_shared_out(stage)
    if shared_out:
        folders.recall_source(config.output.path, config.data)
    if options.plain:
        return stage.main(config)
    if not shared_out:
        raise ConfigError(
            f"--shard and --executor share out the blocks of stages that make rows (those in datagen/, and score_responses), and "
            f"{Path(name).stem} does not work by blocks. A training is started on several devices with `torchrun` or `accelerate "
            "launch`."
        )
    if options.executor == "ray":
        from prefalign import ray_executor

        return ray_executor.run(name, config, options)
    try:
        with sharded(options.shard):
            return stage.main(config)
    except LeftToOthers as left:
        print(left)
        return None
