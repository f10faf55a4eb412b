"""Merging in the other families: adapters into their base, and the language model towards its text model."""

import pytest
import torch
import transformers
from tiny_vlms import WITH_VIDEO, save_tiny

from prefalign import families
from prefalign.adapters import merge_adapters
from prefalign.merging import merge_llm
from prefalign.models import ModelConfig, load_model, load_processor
from tests.merging_cases import VISION_TOO, answer, logits, question, save_adapter, save_text_llm, stored

pytestmark = pytest.mark.families

FAMILIES = ("llava_next", "paligemma", *WITH_VIDEO)
TEXT = {"qwen2_vl": "Qwen2Config", "qwen2_5_vl": "Qwen2Config", "qwen3_vl": "Qwen3Config"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip


def load(folder):
    return load_model(ModelConfig(str(folder), device="cpu"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merging")
    return {family: save_tiny(family, folder / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_adapted_model(family, checkpoints, tmp_path):
    base = checkpoints[family]
    made = save_adapter(base, tmp_path / "adapter", targets=VISION_TOO + r"|.*blocks.*\.qkv")
    out = merge_adapters([str(made)], tmp_path / "out")
    adapted, merged, batch = load(made), load(out), question(out)
    torch.testing.assert_close(logits(merged, batch), logits(adapted, batch), atol=5e-3, rtol=1e-3)
    assert not torch.allclose(logits(merged, batch), logits(load(base), batch), atol=0.1)
    assert answer(merged, batch) == answer(adapted, batch)
    other = question(out, 1)
    assert not torch.allclose(logits(merged, batch)[:, -1], logits(merged, other)[:, -1], atol=1e-3)
    assert stored(out).keys() == stored(base).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_language_model_moves_towards_the_text_model(family, checkpoints, tmp_path):
    vlm, config = checkpoints[family], None
    if family in TEXT:  # the text part of a Qwen-VL is no model of its own: its positions have three parts
        inner = load(vlm).config.get_text_config()
        config = getattr(transformers, TEXT[family])(
            **{name: getattr(inner, name) for name in SIZES if hasattr(inner, name)}
        )
    text = save_text_llm(vlm, tmp_path / "text", noise=0.05, config=config)
    zero, part, one = (merge_llm(str(vlm), str(text), tmp_path / f"{alpha}", alpha) for alpha in (0.0, 0.4, 1.0))
    words = load_processor(ModelConfig(str(zero))).tokenizer("What is in the image?", return_tensors="pt")
    batch = {name: words[name] for name in ("input_ids", "attention_mask")}
    written = transformers.AutoModelForCausalLM.from_pretrained(text).eval()
    torch.testing.assert_close(logits(load(zero), batch), logits(written, batch), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(load(zero), batch), logits(load(vlm), batch), atol=0.1)
    before, after, same = stored(vlm), stored(part), stored(one)
    for name in before:
        assert torch.equal(before[name], same[name])
        assert torch.equal(before[name], after[name]) == (families.tower(name) != "language_model"), name
    load(part)
