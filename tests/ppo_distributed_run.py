"""What torchrun starts in PPO's tests: runs one after another in the same processes.

    ppo_distributed_run.py FOLDER    runs `FOLDER/runs.json`, a list of configs of train_ppo

A config's `copy_from` is a finished run whose checkpoint-2 lies in the output folder before it starts, as after a kill.
"""

import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from prefalign import bundled
from prefalign.config import build

RECIPE = bundled.load_stage("train_ppo")


def claimed(source: Path, target: Path) -> None:
    """A folder as a killed run leaves it."""
    target.mkdir(parents=True)
    for name in ("prefalign_config.yaml", "prompts_manifest.json", "base.json", "processes.json"):
        shutil.copy(source / name, target / name)
    shutil.copytree(source / "checkpoint-2", target / "checkpoint-2")


def main(folder: Path) -> None:
    for values in json.loads((folder / "runs.json").read_text()):
        source = values.pop("copy_from", None)
        if source is not None:
            if dist.get_rank() == 0:
                claimed(Path(source), Path(values["output"]))
            dist.barrier()
        RECIPE.main(build(RECIPE.Config, values))
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
