"""The engine that a config asks for."""

from __future__ import annotations

from collections.abc import Sequence

from prefalign.engines import Engine, require
from prefalign.engines.config import EngineConfig, check_sections
from prefalign.models import ModelConfig


def load_engine(
    config: ModelConfig, *, batch_size: int = 16, needs: Sequence[str] = (), stage: str = "this stage"
) -> Engine:
    """The engine of a config, its model loaded.

    Args:
        config: model and engine; of a plain `ModelConfig` the engine is transformers.
        batch_size: sequences in one forward pass of the transformers engine; the others make up batches by themselves.
        needs: capabilities that the stage cannot do without.
        stage: its name, for the message.

    Raises:
        ValueError: if the engine lacks one of `needs`; where that does not depend on the model, before it is loaded. If `vllm` or
            `server` holds settings and another engine is chosen.
    """
    if isinstance(config, EngineConfig):
        check_sections(config)
    if isinstance(config, EngineConfig) and config.engine == "vllm":
        from prefalign.engines import vllm_loading

        return vllm_loading.load_engine(config, needs=needs, stage=stage)
    if isinstance(config, EngineConfig) and config.engine == "openai":
        from prefalign.engines import openai

        return openai.load_engine(config, needs=needs, stage=stage)
    from prefalign.engines import transformers

    engine = transformers.load_engine(config, batch_size=batch_size)
    require(engine, needs, stage)
    return engine
