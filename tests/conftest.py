"""Shared by all tests: no network, one thread, tiny checkpoints."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny_vlms import save_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random LLaVA-1.5 of 165k parameters. Do not write into it."""
    return save_tiny("llava", tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="session")
def tiny_idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random Idefics3. Do not write into it."""
    return save_tiny("idefics3", tmp_path_factory.mktemp("tiny") / "idefics3")
