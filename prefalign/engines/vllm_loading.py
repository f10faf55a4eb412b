"""vLLM started on a checkpoint, or why it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefalign import families
from prefalign.checkpoints import ModelError, check_model, check_weights, resolve
from prefalign.engines import require
from prefalign.engines.config import EngineConfig
from prefalign.engines.fingerprints import checkpoint_fingerprint
from prefalign.engines.vllm import NO_SCORES, VllmEngine
from prefalign.models import load_processor
from prefalign.processors import engine_fingerprint

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes that vLLM reserves room for (its `MaxLoRARanks`)."""


def load_engine(config: EngineConfig, *, needs: Sequence[str] = (), stage: str = "this stage") -> VllmEngine:
    """Start vLLM on a checkpoint; what it cannot do is refused before anything is loaded.

    Args:
        config: the model; `adapter` goes through vLLM's LoRA, `vllm` holds vLLM's own settings.
        needs: capabilities that the stage cannot do without.
        stage: its name, for the message.

    Raises:
        ValueError: if vLLM lacks one of `needs`.
        ModelError: if vLLM is not installed, or a setting or adapter is one that it cannot follow.
    """
    check_engine(config, needs=needs, stage=stage)
    source, adapter, revision = resolve(config)
    processor = load_processor(config)
    if families.rewrites_prompt(processor):
        raise ModelError(
            f"the {type(processor).__name__} writes text after the prompt's end, which vLLM does in its own way, so prompts "
            "would differ from those of training. Use the transformers engine for this model."
        )
    adapter = None if adapter is None else _local_adapter(adapter)
    rank = 0 if adapter is None else _lora_rank(adapter)
    fingerprint = engine_fingerprint(checkpoint_fingerprint(config), processor)  # before vLLM takes the memory

    from transformers import AutoConfig, GenerationConfig
    from vllm import LLM
    from vllm.platforms import current_platform

    model_config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=config.trust_remote_code)
    try:
        generation = GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:
        generation = GenerationConfig.from_model_config(model_config)
    lora = {"enable_lora": True, "max_lora_rank": next(size for size in LORA_RANKS if size >= rank)} if rank else {}
    llm = LLM(
        source,
        revision=revision,
        dtype=_dtype(config, model_config),
        trust_remote_code=config.trust_remote_code,
        tensor_parallel_size=config.vllm.tensor_parallel_size,
        gpu_memory_utilization=config.vllm.gpu_memory_utilization,
        max_model_len=config.vllm.max_model_len,
        enforce_eager=config.vllm.enforce_eager,
        enable_prefix_caching=True,
        enable_chunked_prefill=not current_platform.is_cpu(),  # there it breaks requests with a seed: "does not use offset"
        generation_config="vllm",
        limit_mm_per_prompt={"video": 0, "audio": 0},
        **lora,
    )
    ends = families.end_token_ids(processor, generation)
    own = None if config.vllm.max_model_len is None else families.context_length(model_config)
    return VllmEngine(
        llm, processor, model_config, ends=ends, fingerprint=fingerprint, adapter=adapter, own_context=own
    )


def check_engine(config: EngineConfig, *, needs: Sequence[str] = (), stage: str = "this stage") -> None:
    """Raise what would keep vLLM from being started, reading no weights: see `loading.check_engine`."""
    require(VllmEngine, needs, stage)
    if find_spec("vllm") is None:
        raise ModelError(
            "model.engine is vllm, and vLLM is not installed here. It needs an environment of its own, without TRL: `make "
            "vllm-env` builds it, or `pip install -c constraints-vllm.txt 'prefalign[vllm]'` on a machine with a GPU. Run the "
            "stage there, or use the engine transformers or openai."
        )
    _check_settings(config)
    check_model(config)
    if "logprobs" in needs and resolve(config)[1] is not None:
        raise ValueError(f"{stage} needs logprobs. {NO_SCORES}")


def _check_settings(config: EngineConfig) -> None:
    """Refuse settings of `ModelConfig` that vLLM would not follow."""
    from vllm.platforms import current_platform

    elsewhere = config.device != "auto" and not (config.device == "cpu" and current_platform.is_cpu())
    unread = [
        (config.load_in_4bit, "load_in_4bit", "true", "leave it out"),
        (elsewhere, "device", config.device, "choose GPUs with CUDA_VISIBLE_DEVICES"),
        (
            bool(config.processor),
            "processor",
            config.processor,
            "save a processor with these options beside the weights",
        ),
        (config.attn_implementation is not None, "attn_implementation", config.attn_implementation, "leave it out"),
    ]
    for wrong, name, value, cure in unread:
        if wrong:
            raise ModelError(
                f"model.{name} is {value}, which is for the transformers engine; vLLM decides that by itself and would not "
                f"follow it. With engine vllm, {cure}."
            )


def _dtype(config: EngineConfig, model_config: Any) -> str:
    """The precision that transformers loads a checkpoint in; vLLM's own `auto` makes float16 of float32."""
    from vllm.platforms import current_platform

    if config.dtype != "auto":
        return config.dtype
    stored = getattr(model_config, "dtype", None) or getattr(model_config.get_text_config(), "dtype", None)
    name = "auto" if stored is None else str(stored).removeprefix("torch.")
    return "float32" if name == "float16" and current_platform.is_cpu() else name


def _local_adapter(adapter: str) -> str:
    if Path(adapter).is_dir():
        return adapter
    from huggingface_hub import snapshot_download

    return snapshot_download(adapter, allow_patterns=["adapter_*"])


def _lora_rank(adapter: str) -> int:
    """Largest rank of an adapter.

    Raises:
        ModelError: if it changes what vLLM does not put LoRA on, or is larger than vLLM takes.
    """
    from safetensors import safe_open

    check_weights(adapter)
    with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    beyond = sorted(name for name in shapes if families.tower(name) != "language_model" or "lora_" not in name)
    rank = max((shape[0] for name, shape in shapes.items() if "lora_A" in name), default=0)
    if beyond or not 0 < rank <= LORA_RANKS[-1]:
        what = f"changes {beyond[0]!r}" if beyond else f"has rank {rank}"
        raise ModelError(
            f"adapter {Path(adapter).name!r} {what}; vLLM takes LoRA on the language model alone, up to rank {LORA_RANKS[-1]}, "
            "and would answer without the rest. Merge it into its base (`prefalign run merge_adapter`) and name the merged model."
        )
    return int(rank)
