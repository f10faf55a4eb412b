"""`max_model_len` changes no row: what it alone would cut off is an error. A stand-in takes vLLM's place, not our engine's."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from prefalign import families
from prefalign.engines import Sampling
from prefalign.engines.vllm import VllmEngine
from prefalign.models import ModelConfig, load_processor
from tests.engine_cases import some_requests


class StandIn:
    """Writes `drawn` tokens for each request, as many as its limits allow, as vLLM does."""

    def __init__(self, limit, drawn):
        self.limit, self.drawn, self.waiting = limit, drawn, []
        self.llm_engine = self
        self.model_config = SimpleNamespace(max_model_len=limit, get_vocab_size=lambda: 0)

    def add_request(self, name, prompt, params, lora_request=None):
        ids = prompt["prompt_token_ids"]
        if len(ids) >= self.limit:
            raise ValueError(
                f"The decoder prompt (length {len(ids)}) is longer than the maximum model length of {self.limit}."
            )
        count = min(self.drawn, params.max_tokens, self.limit - len(ids))
        self.waiting.append(
            SimpleNamespace(
                request_id=name, finished=True, prompt_token_ids=ids, outputs=[SimpleNamespace(token_ids=[40] * count)]
            )
        )

    def step(self):
        done, self.waiting = self.waiting, []
        return done

    def abort_request(self, names):
        self.waiting = []


@pytest.fixture
def start(tiny_llava, monkeypatch):
    from transformers import AutoConfig

    parts = {
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(CUMULATIVE=0, FINAL_ONLY=1)},
        "vllm.exceptions": {"VLLMClientError": type("VLLMClientError", (Exception,), {})},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    processor, config = load_processor(ModelConfig(str(tiny_llava))), AutoConfig.from_pretrained(tiny_llava)

    def engine(limit, own, drawn):
        return VllmEngine(
            StandIn(limit, drawn), processor, config, ends=families.end_token_ids(processor), own_context=own
        )

    return engine


def test_an_answer_that_only_the_limit_cuts_off_is_an_error(start):
    [request] = some_requests(1)
    long = Sampling(max_new_tokens=90, temperature=0)
    [cut] = start(60, 500, drawn=90).generate([request], long)
    assert cut.finish_reason == "error"
    assert cut.token_ids == []
    assert "was cut off after" in cut.error
    assert "by model.vllm.max_model_len 60" in cut.error
    assert "Raise max_model_len, or lower max_new_tokens." in cut.error
    [whole] = start(500, None, drawn=90).generate([request], long)
    assert (whole.finish_reason, whole.error, len(whole.token_ids)) == ("length", None, 90)
    [own] = start(60, None, drawn=90).generate([request], long)  # the model itself has no more positions
    assert (own.finish_reason, own.error) == ("length", None)
    [short] = start(60, 500, drawn=90).generate([request], Sampling(max_new_tokens=4, temperature=0))
    assert (short.finish_reason, short.error, len(short.token_ids)) == ("length", None, 4)


def test_a_prompt_that_only_the_limit_refuses_names_it(start):
    [request] = some_requests(1)
    greedy = Sampling(max_new_tokens=4, temperature=0)
    [refused] = start(5, 500, drawn=4).generate([request], greedy)
    assert "model.vllm.max_model_len is 5 (the model has 500 positions). Raise it." in refused.error
    [own] = start(5, None, drawn=4).generate([request], greedy)
    assert "the model has 5 positions. Use fewer or smaller pictures, or less text." in own.error
