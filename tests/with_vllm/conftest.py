"""Checkpoints, engines and servers of the runs with vLLM.

`make test-vllm` runs them in the environment that `make vllm-env` builds; elsewhere nothing here is collected.
"""

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts in half the time

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random LLaVA-1.5 under the Hub's names, a random Qwen2.5-VL, and the trained model of the scenes."""
    from tiny_vlms import save_tiny

    from prefalign.checkpoints import SCENES_BASE

    folder = tmp_path_factory.mktemp("wide")
    found = {name: save_tiny(name, folder / name, wide=True) for name in ("llava", "qwen2_5_vl")}
    return {**found, "scenes": SCENES_BASE}


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on the language model of the scenes, far enough from zero to change answers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from prefalign.models import ModelConfig, load_model

    torch.manual_seed(0)
    model = load_model(ModelConfig("scenes", device="cpu"))
    targets = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def started(checkpoints: dict[str, Path], adapter: Path, request: pytest.FixtureRequest) -> Iterator[tuple]:
    """The engines of vLLM and of transformers on one checkpoint; of `scenes+adapter`, on its adapter."""
    from prefalign.engines.config import EngineConfig, VllmConfig
    from prefalign.engines.loading import load_engine

    name, _, with_adapter = request.param.partition("+")
    known = {"adapter": str(adapter) if with_adapter else None}
    slow = load_engine(EngineConfig(str(checkpoints[name]), **known))
    config = EngineConfig(str(checkpoints[name]), engine="vllm", vllm=VllmConfig(enforce_eager=True), **known)
    fast = load_engine(config, needs=["sample", "prefix", "first_token"])
    yield fast, slow
    fast.llm.llm_engine.engine_core.shutdown()
    del fast
    gc.collect()
