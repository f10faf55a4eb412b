"""The engine that a config asks for, loaded or only looked for."""

from __future__ import annotations

from collections.abc import Sequence

from prefalign.checkpoints import check_model
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
        ValueError: if the engine lacks one of `needs`, or a setting cannot be used, before weights are read.
        ModelError: see `check_engine`.
        ServerError: likewise.
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

    _check_local(config, needs, stage)
    return transformers.load_engine(config, batch_size=batch_size)


def check_engine(config: ModelConfig, *, needs: Sequence[str] = (), stage: str = "this stage") -> None:
    """Find what would keep an engine from being loaded, in a moment: no weights are read.

    A run with several models calls it for those that are loaded later before it loads the first, so that a server that is down
    is not found out about after minutes of loading.

    Args:
        config: model and engine.
        needs: capabilities that the stage cannot do without.
        stage: its name, for the message.

    Raises:
        ValueError: if the engine lacks one of `needs`, or a setting cannot be used.
        ModelError: if there is no such model, it is no vision-language model, or its weights or processor are not whole.
        ServerError: if no server answers, it refuses the key, or has no such model.
    """
    if isinstance(config, EngineConfig):
        check_sections(config)
    if isinstance(config, EngineConfig) and config.engine == "vllm":
        from prefalign.engines import vllm_loading

        vllm_loading.check_engine(config, needs=needs, stage=stage)
    elif isinstance(config, EngineConfig) and config.engine == "openai":
        from prefalign.engines import openai

        openai.load_engine(config, needs=needs, stage=stage).server.close()
    else:
        _check_local(config, needs, stage)


def _check_local(config: ModelConfig, needs: Sequence[str], stage: str) -> None:
    from transformers import AutoConfig

    from prefalign.engines.transformers import TransformersEngine, capabilities

    source, revision = check_model(config)
    if needs:
        own_code = config.trust_remote_code
        model_config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=own_code)
        require(TransformersEngine, needs, stage, can=capabilities(model_config))
