"""What torchrun and `accelerate launch` start in the tests: training runs one after another in the same processes.

    distributed_run.py FOLDER    runs `FOLDER/runs.json`, a list of recipe configs, and writes `FOLDER/seen.json`

A config's `copy_from` is a finished run whose checkpoint-2 lies in the output folder before it starts, as after a kill. A run
that is refused in all processes leaves its message.
"""

import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState

from prefalign import bundled
from prefalign.config import ConfigError, build

RECIPE = bundled.load_stage("train_preference")


def claimed(source: Path, target: Path) -> None:
    """A folder as a killed run leaves it."""
    target.mkdir(parents=True)
    for name in ("prefalign_config.yaml", "pairs_manifest.json", "base.json", "processes.json"):
        shutil.copy(source / name, target / name)
    shutil.copytree(source / "checkpoint-2", target / "checkpoint-2")


def main(folder: Path) -> None:
    seen = []
    for values in json.loads((folder / "runs.json").read_text()):
        source = values.pop("copy_from", None)
        if source is not None:
            if dist.get_rank() == 0:
                claimed(Path(source), Path(values["output"]))
            dist.barrier()
        try:
            RECIPE.main(build(RECIPE.Config, values))
        except ConfigError as error:
            seen.append({"refused": str(error)})
            continue
        state = AcceleratorState()
        plugin = state.deepspeed_plugin if state.distributed_type.value == "DEEPSPEED" else None
        seen.append({"distributed_type": state.distributed_type.value, "num_processes": state.num_processes,
                     "zero_stage": plugin and plugin.zero_stage, "backend": dist.get_backend()})  # fmt: skip
        dist.barrier()
    if dist.get_rank() == 0:
        (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
