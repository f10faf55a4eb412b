"""The engine that a config asks for."""

from __future__ import annotations

from collections.abc import Sequence

from prefalign.engines import Engine, require
from prefalign.engines.config import EngineConfig


def load_engine(
    config: EngineConfig, *, batch_size: int = 16, needs: Sequence[str] = (), stage: str = "this stage"
) -> Engine:
    """The engine of a config, its model loaded.

    Args:
        config: model and engine.
        batch_size: sequences in one forward pass of the transformers engine; the others make up batches by themselves.
        needs: capabilities that the stage cannot do without.
        stage: its name, for the message.

    Raises:
        ValueError: if the engine lacks one of `needs`; where that does not depend on the model, before it is loaded.
    """
    if config.engine == "vllm":
        from prefalign.engines import vllm_loading

        require(vllm_loading.VllmEngine, needs, stage)
        return vllm_loading.load_engine(config)
    from prefalign.engines import transformers

    engine = transformers.load_engine(config, batch_size=batch_size)
    require(engine, needs, stage)
    return engine
