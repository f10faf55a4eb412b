"""Shared by all tests: no network, one thread, tiny checkpoints, and a Python for processes of their own that starts fast."""

import gc
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny_vlms import save_tiny

torch.set_num_threads(1)
SERVER = Path(__file__).parent / "warm_python.py"


def pytest_configure(config: pytest.Config) -> None:
    """Start the server of `tests/warm_python.py`, one for all workers, and write `python`, `prefalign`, `torchrun` and
    `accelerate` that run by it. It imports nothing until it is first called."""
    if hasattr(config, "workerinput"):
        return
    folder = Path(tempfile.mkdtemp(prefix="warm-"))  # the path of a socket is short
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(SERVER.parent.parent),
    }
    server = subprocess.Popen([sys.executable, SERVER, "serve", str(listener.fileno())], stdin=subprocess.PIPE,
                              pass_fds=[listener.fileno()], env=environment)  # fmt: skip
    listener.close()
    for name in ("python", "prefalign", "torchrun", "accelerate"):
        script = f'"{Path(sys.executable).with_name(name)}"' if name != "python" else ""
        command = folder / name
        command.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -I -S "{SERVER}" ask "{folder / "socket"}" {script} "$@"\n'
        )
        command.chmod(0o755)
    os.environ["WARM_BIN"] = str(folder)

    def end() -> None:
        server.communicate()
        shutil.rmtree(folder)

    config.add_cleanup(end)


def pytest_collection_finish() -> None:
    """Take what is imported out of garbage collection: trainers collect at every turn, half a second with all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def warm_executable(monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this process starts as `sys.executable` has imported already."""
    python = Path(os.environ["WARM_BIN"]) / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    return python


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random LLaVA-1.5 of 165k parameters. Do not write into it."""
    return save_tiny("llava", tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="session")
def tiny_idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random Idefics3. Do not write into it."""
    return save_tiny("idefics3", tmp_path_factory.mktemp("tiny") / "idefics3")


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random Gemma3. Do not write into it."""
    return save_tiny("gemma3", tmp_path_factory.mktemp("tiny") / "gemma3")


@pytest.fixture(scope="session")
def tiny_checkpoints(tiny_llava: Path, tiny_idefics3: Path, tiny_gemma3: Path) -> dict[str, Path]:
    """The three above by the name of their family."""
    return {"llava": tiny_llava, "idefics3": tiny_idefics3, "gemma3": tiny_gemma3}


@pytest.fixture(scope="session")
def healthy_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 8 pairs with which `prefalign doctor` finds nothing wrong. Do not write into it."""
    from tests.doctor_runs import pair, write

    return write(tmp_path_factory.mktemp("doctor") / "pairs", [pair(number) for number in range(8)])


@pytest.fixture
def doctor_case(tiny_llava: Path, healthy_pairs: Path, tmp_path: Path) -> Callable[..., Any]:
    """Set a run up for `prefalign doctor`; by default the tiny LLaVA on the healthy pairs."""
    from tests.doctor_runs import prepare

    def make(checkpoint: Path = tiny_llava, folder: Path = healthy_pairs, **changes: Any) -> Any:
        return prepare(checkpoint, folder, tmp_path, **changes)

    return make


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A local server that speaks OpenAI's protocol, and no settings for another one in the environment."""
    from tests.stand_in_server import StandInServer

    for name in [name for name in os.environ if name.startswith("OPENAI_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with StandInServer() as running:
        yield running
