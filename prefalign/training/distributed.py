"""Several processes: what has to happen before a model is loaded, what really runs, and that a resumed run runs the same way.

accelerate and DeepSpeed fall back to something else without a word in places; here that stops a run instead.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, parse_flag_from_env

from prefalign import bundled
from prefalign.config import ConfigError
from prefalign.manifest import write_atomically
from prefalign.training.runs import RunError

if TYPE_CHECKING:
    from accelerate import Accelerator

PROCESSES_FILE = "processes.json"
_PROFILE = "the profile of `accelerate launch`"


@dataclass(frozen=True)
class Processes:
    """How a run is spread over processes, as accelerate has set it up.

    Attributes:
        distributed_type: accelerate's name: `NO`, `MULTI_CPU`, `MULTI_GPU`, `DEEPSPEED`, `FSDP`, ...
        num_processes: how many there are on all nodes together.
        zero_stage: DeepSpeed's; None without DeepSpeed.
    """

    distributed_type: str
    num_processes: int
    zero_stage: int | None = None

    def __str__(self) -> str:
        count = "1 process" if self.num_processes == 1 else f"{self.num_processes} processes"
        kinds = {"DEEPSPEED": f"DeepSpeed ZeRO-{self.zero_stage}", "FSDP": "FSDP", "NO": ""}
        kind = kinds.get(self.distributed_type, f"DDP ({self.distributed_type})")
        return f"{count}, {kind}" if kind else count


def prepare_processes(settings: Mapping[str, Any]) -> None:
    """Do what several processes need before the training arguments are made and any model is loaded.

    On a CPU, accelerate starts torch's process group and leaves DeepSpeed's own view of it unset, so that ZeRO-3 would
    cut a model for a world of one; and DeepSpeed would compile a shared-memory operator for a minute and a half. A profile's
    DeepSpeed file that is not found from the working directory is looked up among the bundled ones.

    Args:
        settings: the `trainer:` mapping of a config (`deepspeed`, `fsdp` and `use_cpu` count).

    Raises:
        ConfigError: FSDP on a CPU, two kinds of sharding at once, or DeepSpeed without its package or without a launcher.
    """
    asked = _asked(settings)
    if len({kind for kind, _ in asked}) > 1:
        raise ConfigError(
            f"two ways to share out the weights are asked for: {' and '.join(f'{kind} by {by}' for kind, by in asked)}. Only "
            "one can run; leave the other out."
        )
    on_cpu = (
        settings.get("use_cpu") or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )
    for kind, by in asked[:1]:
        if kind == "FSDP" and on_cpu:
            raise ConfigError(
                f"FSDP is asked for by {by} and this run is on a CPU: accelerate uses FSDP on GPUs only and would train plain "
                "DDP without saying so, all weights in every process. Use DeepSpeed, which shards on a CPU too (torchrun with "
                "`--trainer.deepspeed configs/deepspeed/zero3.json`), or leave FSDP out."
            )
        if kind == "DeepSpeed":
            _prepare_deepspeed(by, on_cpu=bool(on_cpu))


def _asked(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Kinds of sharding and who asks for them."""
    asks = (
        ("DeepSpeed", "`trainer.deepspeed`", settings.get("deepspeed")),
        ("DeepSpeed", _PROFILE, parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")),
        ("FSDP", "`trainer.fsdp`", settings.get("fsdp")),
        ("FSDP", _PROFILE, parse_flag_from_env("ACCELERATE_USE_FSDP")),
    )
    return [(kind, by) for kind, by, is_asked in asks if is_asked]


def _prepare_deepspeed(by: str, *, on_cpu: bool) -> None:
    if find_spec("deepspeed") is None:
        raise ConfigError(
            f"DeepSpeed is asked for by {by} and is not installed. Run `pip install prefalign[deepspeed]`."
        )
    if "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"DeepSpeed is asked for by {by} and nothing says which of the processes this is. Start the recipe's file with "
            "torchrun or `accelerate launch`, for one process too: `torchrun --nproc_per_node 1 recipes/STAGE.py`."
        )
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file is not None:
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(bundled.find(file))
    # DeepSpeed 0.19 calls torch's older names at every step
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if on_cpu:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")


def running_processes(accelerator: Accelerator, settings: Mapping[str, Any]) -> Processes:
    """What really runs, from a trainer's accelerator.

    Args:
        accelerator: the trainer's, once the trainer is built.
        settings: the `trainer:` mapping of the config.

    Raises:
        RunError: it is not what was asked for.
    """
    state = accelerator.state
    kind = state.distributed_type
    stage = int(state.deepspeed_plugin.zero_stage) if kind == DistributedType.DEEPSPEED else None
    running = Processes(kind.value, accelerator.num_processes, stage)
    for asked, by in _asked(settings):
        if asked.upper() != kind.value:
            raise RunError(
                f"{asked} is asked for by {by}, and what runs is {running}: accelerate went on without it, so the weights would "
                f"not be shared out. Start more than one process on GPUs that {asked} supports, or leave it out."
            )
    return running


def processes_of(folder: Path) -> Processes | None:
    """What the run in a folder is spread over; None: no run has begun there."""
    file = folder / PROCESSES_FILE
    return Processes(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def claim_processes(folder: Path, running: Processes, *, main_process: bool) -> None:
    """Keep a run on the processes it began with: optimizer and random states are saved per process, in a form of their own.

    Args:
        folder: folder of the run, claimed by `runs.claim_run`.
        running: what runs now; `processes.json` says what ran before.
        main_process: whether this process writes.

    Raises:
        RunError: the folder holds checkpoints of a run on other processes.
    """
    before = processes_of(folder) or running
    if before != running and any(folder.glob("checkpoint-*")):
        raise RunError(
            f"{folder} holds checkpoints of a run on {before}, and this is {running}: the optimizer's state and the random "
            "states could not be restored, so the run would not be the same. Start it as before, give another `output`, or "
            "delete the folder."
        )
    if main_process:
        write_atomically(folder / PROCESSES_FILE, json.dumps(asdict(running), indent=2).encode())
