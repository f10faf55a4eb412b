"""Which engine generates, and its settings: transformers or vLLM in this process, or a server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from prefalign.models import ModelConfig


@dataclass
class VllmConfig:
    """Settings of vLLM in this process, by its own names.

    Attributes:
        tensor_parallel_size: GPUs that one copy of the model is spread over.
        gpu_memory_utilization: share of a GPU's memory that weights and KV cache may take.
        max_model_len: longest prompt with its answer, in tokens; None: the model's own. Lower takes less memory and changes no
            row: a request that does not fit, or whose answer it would cut off, fails and says so.
        enforce_eager: no CUDA graphs: starts faster, generates more slowly.
    """

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    enforce_eager: bool = False


@dataclass
class ServerConfig:
    """An OpenAI-compatible server: vLLM, SGLang, llama.cpp, OpenAI itself or another provider.

    Attributes:
        base_url: address up to `/v1`; None: the environment's `OPENAI_BASE_URL`, else OpenAI's.
        api_key_env: name of the environment variable that holds the key; the key itself is never written down.
        concurrency: requests under way at once.
        requests_per_minute: at most so many are started in a minute; 0: no limit.
        timeout: seconds until a try whose answer is not whole counts as failed.
        max_retries: tries after the first, with growing pauses, of what a server refuses for the moment (429, 5xx), of timeouts
            and of cut connections.
        cache: file that keeps answers, so that a rerun pays nothing; None: none are kept.
    """

    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    requests_per_minute: int = 0
    timeout: float = 120.0
    max_retries: int = 8
    cache: Path | None = None


@dataclass
class EngineConfig(ModelConfig):
    """A model, and the engine that generates with it.

    Attributes:
        engine: `transformers` (every capability), `vllm` in this process (an environment of its own: constraints-vllm.txt), or
            `openai`: a server, whose name for the model is `model_name_or_path`.
        vllm: settings of vLLM.
        server: which server, and how it is asked.
    """

    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    vllm: VllmConfig = field(default_factory=VllmConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


def check_sections(config: EngineConfig) -> None:
    """Refuse settings of an engine that was not chosen, which nothing would read.

    Raises:
        ValueError: naming what is set in `vllm` or `server` and belongs to another engine than `config.engine`.
    """
    for name, owner in (("vllm", "vllm"), ("server", "openai")):
        section = getattr(config, name)
        plain = type(section)()
        own = {entry.name: getattr(plain, entry.name) for entry in fields(plain)}
        given = [f"{name}.{key}" for key, default in own.items() if getattr(section, key) != default]
        if given and config.engine != owner:
            off = ", ".join(f"{key} {json.dumps(own[key.partition('.')[2]])}" for key in given)
            raise ValueError(
                f"{', '.join(given)} would be read by nothing: the engine is {config.engine}, and this belongs to "
                f"`engine: {owner}`. Set engine to {owner}, or leave it out ({off} where a config has another)."
            )
