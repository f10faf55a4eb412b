"""Shared by the tests that start training processes of their own: their environment, and how two runs are compared."""

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training_runs import largest_difference

ROOT = Path(__file__).parent.parent
WARM = Path(os.environ["WARM_BIN"])  # `python`, `prefalign`, `torchrun`, `accelerate` of `tests/warm_python.py`
TORCHRUN = [WARM / "torchrun", "--standalone", "--nproc_per_node", "2"]
CLOCK = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
CLOCK |= {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs prefalign[deepspeed]")
TIMEOUT = 150  # seconds, so that what hangs fails; ZeRO-3, the longest, took 70 to 90 on two cores that others used too
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "PATH": os.pathsep.join([str(WARM), os.environ["PATH"]]),
    "PYTHON_EXEC": str(WARM / "python"),  # what torchrun and accelerate start
}


def start(command, folder, **environment):
    """Run a command to its good end; what it printed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=folder,
                          env=ENVIRONMENT | environment, timeout=TIMEOUT)  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "Error" in line]
    assert done.returncode == 0, "\n".join([*said, done.stderr[-4000:]])
    return done.stdout


def history(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def without(keys: set[str], entries: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in keys} for entry in entries]


def saved(run: Path) -> dict[str, torch.Tensor]:
    files = [run / name for name in ("model.safetensors", "adapter_model.safetensors") if (run / name).is_file()]
    assert len(files) == 1
    return load_file(files[0])


def assert_same_run(one: Path, two: Path) -> None:
    """Losses, gradient norms and weights, to the rounding of sums in another order."""
    entries = [[entry for entry in history(run) if "loss" in entry] for run in (one, two)]
    assert len(entries[0]) == len(entries[1]) >= 3
    for first, second in zip(*entries, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=5e-6)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    assert largest_difference(saved(one), saved(two)) < 1e-5
    assert min(tensor.numel() for tensor in saved(two).values()) > 0
