"""What cannot be done with vLLM is said before it starts."""

import pytest

from prefalign.checkpoints import ModelError
from prefalign.engines.config import EngineConfig
from prefalign.engines.loading import load_engine


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_4bit": True}, "model.load_in_4bit is true, which is for the transformers engine"),
        ({"device": "cuda:1"}, "model.device is cuda:1.*choose GPUs with CUDA_VISIBLE_DEVICES"),
        ({"attn_implementation": "eager"}, "model.attn_implementation is eager.*leave it out"),
        ({"model_name_or_path": "no/such/model"}, "there is no folder|neither a folder here"),
    ],
)
def test_settings_that_vllm_would_not_follow_are_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        load_engine(EngineConfig(**{"model_name_or_path": "scenes", "engine": "vllm", **settings}))


def test_scoring_through_an_adapter_is_refused_before_anything_is_loaded(adapter):
    config = EngineConfig("scenes", engine="vllm", adapter=str(adapter))
    with pytest.raises(ValueError, match="evidence needs logprobs. vLLM does not score .* Merge it into its base"):
        load_engine(config, needs=["logprobs"], stage="evidence")
