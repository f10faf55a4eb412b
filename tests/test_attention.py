"""Attention of an answer to the picture: equal to `output_attentions=True`, whatever the kernel, the batch and the family."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from engine_cases import GREEDY, some_requests
from published_attention import check_against_published, published_attention
from tiny_vlms import BUILDERS, PLAIN, picture, save_tiny

from prefalign import families
from prefalign.engines import Completion, ImageMask, Request, Sampling
from prefalign.engines.attention import layer_number, probed_attention
from prefalign.engines.transformers import TransformersEngine, load_engine
from prefalign.models import ModelConfig
from prefalign.records import user_message

_GEMMA = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "head_dim", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip


@pytest.fixture(scope="module", params=[*PLAIN, "scenes"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    if request.param == "scenes":
        return load_engine(ModelConfig("scenes", device="cpu"), batch_size=8)
    folder = save_tiny(request.param, tmp_path_factory.mktemp("attention") / request.param)
    return load_engine(ModelConfig(str(folder), device="cpu"), batch_size=8)


@pytest.fixture
def llava(tiny_llava: Path) -> TransformersEngine:
    return load_engine(ModelConfig(str(tiny_llava), device="cpu"), batch_size=8)


def test_it_equals_the_published_way_of_taking_it(engine: TransformersEngine) -> None:
    requests = some_requests(4)
    completions = engine.generate(requests, GREEDY)
    layers = engine.config.get_text_config().num_hidden_layers
    found = {layer: engine.attention(requests, completions, layer=layer) for layer in range(layers)}
    check_against_published(engine, requests, completions, found)
    assert not torch.allclose(found[0][0].weights, found[layers - 1][0].weights, atol=1e-3)


def test_a_ragged_batch_equals_one_by_one(engine: TransformersEngine) -> None:
    requests = some_requests(6)
    answers = ["A red dog.", "Yes", "There is a large red circle at the top left. No.", "It is 3.5.", "No.", "Blue"]
    together = engine.attention(requests, answers)
    for request, answer, found in zip(requests, answers, together, strict=True):
        (alone,) = engine.attention([request], [answer])
        assert (alone.error, found.error) == (None, None)
        torch.testing.assert_close(alone.weights, found.weights, atol=1e-6, rtol=0)
        assert torch.equal(alone.image, found.image)


def test_each_token_belongs_to_its_picture(engine: TransformersEngine) -> None:
    """Two pictures of unlike sizes: as many tokens each as the processor gives them, first picture first."""
    images = [picture(1, (60, 40)), picture(2, (28, 56))]
    request = Request("a", [user_message("Which?", 2)], images)
    (found,) = engine.attention([request], ["A red dog."])
    assert found.image.unique().tolist() == [0, 1]
    assert (found.image.diff() >= 0).all()
    for number, image in enumerate(images):
        doubled = Request("b", [user_message("Which?", 2)], [image, image])
        (alone,) = engine.attention([doubled], ["A red dog."])
        assert (found.image == number).sum() * 2 == len(alone.image)


def test_another_picture_changes_the_numbers(engine: TransformersEngine) -> None:
    messages = [user_message("Which?", 2)]
    requests = [Request("a", messages, [picture(one), picture(2)]) for one in (1, 3)]
    first, second = engine.attention(requests, ["A red dog."] * 2)
    assert not torch.allclose(first.weights, second.weights, atol=1e-4)


def test_a_text_answer_reads_the_rows_before_its_end(llava: TransformersEngine) -> None:
    """A text is followed by the end of the turn, so all its own tokens were queries; a completion cut off lost its last."""
    (request,) = some_requests(1)
    text = "A red dog."
    tokens = llava.tokenizer(f" {text}", add_special_tokens=False).input_ids
    answers = [
        text,
        Completion("a", text, tokens),
        Completion("a", text, tokens, "length"),
        Completion("a", "", tokens[:-1]),
    ]
    given, whole, less, fewer = llava.attention([request] * 4, answers)
    torch.testing.assert_close(given.weights, whole.weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(less.weights, fewer.weights, atol=1e-6, rtol=0)
    assert not torch.allclose(whole.weights, less.weights, atol=1e-6)


def test_an_answer_of_one_token_cannot_be_measured(llava: TransformersEngine) -> None:
    """No token was fed back; the released code's slice then takes all rows. Others of the batch are measured all the same."""
    requests = some_requests(3)
    answers = [Completion("a", "No", [40], "length"), Completion("b", "", []), Completion("c", "A cat", [40, 41, 42])]
    single, empty, good = llava.attention(requests, answers)
    for found in (single, empty):
        assert found.error is not None
        assert "no token of its answer was fed back" in found.error
        assert len(found.weights) == len(found.image) == 0
    (alone,) = llava.attention(requests[2:], answers[2:])
    torch.testing.assert_close(good.weights, alone.weights, atol=1e-6, rtol=0)
    assert good.error is None


def test_what_cannot_be_measured_says_why(llava: TransformersEngine) -> None:
    text = Request("t", [user_message("Hello?")], [])
    mismatch = Request("m", [user_message("Hello?", 2)], [picture(1)])
    (good,) = some_requests(1)
    first, second, third = llava.attention([text, mismatch, good], ["A cat."] * 3)
    assert first.error == "request t: its prompt holds no image token. Give it a picture."
    assert "request m has 2 image placeholder(s) for 1 picture(s)" in str(second.error)
    assert third.error is None
    with pytest.raises(ValueError, match="there are 1 requests for 2 answers"):
        llava.attention([good], ["A cat."] * 2)


def test_hidden_tokens_get_no_attention(llava: TransformersEngine) -> None:
    (request,) = some_requests(1, image_mask=ImageMask(1.0, 0))
    (found,) = llava.attention([request], ["A cat."])
    assert found.weights.abs().max() < 1e-12


def test_a_forced_prefix_is_prompt(engine: TransformersEngine) -> None:
    """Reading after a prefix is reading the rows of the rest: the whole answer's mean is the weighted mean of both parts."""
    (request,) = some_requests(1)
    (continued,) = some_requests(1, prefix="A red")
    (completion,) = engine.generate([continued], GREEDY)
    (rest,) = engine.attention([continued], [completion])
    row = engine._row(0, continued, completion, score=True)
    start = engine._row(0, request, "", score=False)
    before = engine._tokens(row.prompt[len(start.prompt) :]) if row.prompt != start.prompt else row.tail[: row.given]
    ids = [*before, *completion.token_ids]
    parts = [Completion("p", "", before, "stop"), Completion("w", "", ids, completion.finish_reason)]
    head, whole = engine.attention([request, request], parts)
    fed = len(completion.token_ids) - (completion.finish_reason != "stop")
    mean = (head.weights * len(before) + rest.weights * fed) / (len(before) + fed)
    torch.testing.assert_close(whole.weights, mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_model_is_left_as_it_was_found(
    llava: TransformersEngine, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llava.model
    model.set_attn_implementation({"text_config": kernel, "vision_config": "eager"})
    kernels = {
        name: part.config._attn_implementation for name, part in model.named_modules() if hasattr(part, "config")
    }
    seen = set()
    tower = type(model.model.vision_tower.encoder.layers[0].self_attn)
    forward = tower.forward

    def watched(self, *args, **more):
        seen.add(self.config._attn_implementation)
        return forward(self, *args, **more)

    monkeypatch.setattr(tower, "forward", watched)
    model.train()
    try:
        before = llava.attention(some_requests(2), ["A cat."] * 2)
        assert seen == {"eager"}
        monkeypatch.setattr(model.model.language_model.layers[0].mlp, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llava.attention(some_requests(2), ["A cat."] * 2, layer=1)
        monkeypatch.undo()
        assert model.training
        found = {
            name: part.config._attn_implementation for name, part in model.named_modules() if hasattr(part, "config")
        }
        assert found == kernels
        assert found["model.language_model"] == kernel
        again = llava.attention(some_requests(2), ["A cat."] * 2)
        assert all(torch.equal(one.weights, two.weights) for one, two in zip(before, again, strict=True))
    finally:
        model.eval()
        model.set_attn_implementation("sdpa")


def test_the_pass_stops_at_the_layer(llava: TransformersEngine) -> None:
    """Nothing above the layer read runs: not its own output, not the next layer, not the head."""
    reached = []
    parts = {"below": llava.model.model.language_model.layers[0].mlp, "head": llava.model.lm_head}
    hooks = [part.register_forward_hook(lambda *_, name=name: reached.append(name)) for name, part in parts.items()]
    llava.attention(some_requests(1), ["A cat."], layer=0)
    assert reached == []
    llava.attention(some_requests(1), ["A cat."], layer=1)
    assert reached == ["below"]
    for hook in hooks:
        hook.remove()


def test_adapters_count(tiny_llava: Path) -> None:
    from peft import LoraConfig, get_peft_model

    engine = load_engine(ModelConfig(str(tiny_llava), device="cpu"))
    (request,) = some_requests(1)
    (plain,) = engine.attention([request], ["A cat."])
    torch.manual_seed(0)
    wrapped = get_peft_model(engine.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted = TransformersEngine(wrapped, engine.processor)
    (found,) = adapted.attention([request], ["A cat."])
    assert not torch.allclose(found.weights, plain.weights, atol=1e-4)
    merged = TransformersEngine(wrapped.merge_and_unload(), engine.processor)
    (same,) = merged.attention([request], ["A cat."])
    torch.testing.assert_close(found.weights, same.weights, atol=1e-6, rtol=0)


def test_squashed_scores_equal_eager(tmp_path: Path) -> None:
    """PaliGemma 2 has Gemma 2's soft cap, which SDPA cannot do."""
    processor, _, config = BUILDERS["paligemma"]()
    text = {name: value for name, value in config.text_config.to_dict().items() if name in _GEMMA}
    config.text_config = transformers.Gemma2Config(**text, attn_logit_softcapping=0.5, query_pre_attn_scalar=16)
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "embed" not in name:
                weight.mul_(8)
    engine = TransformersEngine(model, processor)
    model.set_attn_implementation("eager")
    (request,) = some_requests(1)
    (completion,) = engine.generate([request], GREEDY)
    for layer in (0, 1):
        (found,) = engine.attention([request], [completion], layer=layer)
        _, rows = published_attention(model, processor, request, engine.banned, engine.ends, layer=layer, new_tokens=10)
        torch.testing.assert_close(found.weights, rows.mean(0), atol=1e-6, rtol=0)
        (watched,) = engine.generate([request], replace(GREEDY, attention_layer=layer))
        assert watched == completion
        torch.testing.assert_close(watched.attention.weights, found.weights, atol=1e-6, rtol=0)
    config.text_config.attn_logit_softcapping = 50.0
    for part in model.modules():
        if hasattr(part, "attn_logit_softcapping"):
            part.attn_logit_softcapping = 50.0
    (loose,) = engine.attention([request], [completion], layer=1)
    assert not torch.allclose(loose.weights, found.weights, atol=1e-4)


class TestLayer:
    def test_numbers(self, llava: TransformersEngine) -> None:
        config = llava.config
        assert [layer_number(config, layer) for layer in (None, 0, 1, -1, -2)] == [1, 0, 1, 1, 0]
        hybrid = transformers.LlamaConfig(num_hidden_layers=32)
        assert layer_number(hybrid, None) == 16
        hybrid.layer_types = ["full_attention" if index % 6 == 5 else "sliding_attention" for index in range(32)]
        assert layer_number(hybrid, None) == 17
        assert layer_number(hybrid, 16) == 16
        hybrid.layer_types = ["sliding_attention"] * 32
        assert layer_number(hybrid, None) == 16

    @pytest.mark.parametrize("layer", [2, -3])
    def test_outside(self, llava: TransformersEngine, layer: int) -> None:
        with pytest.raises(
            ValueError, match=rf"attention layer {layer} is outside the decoder, whose 2 layers are numbered 0"
        ):
            llava.attention(some_requests(1), ["A cat."], layer=layer)

    def test_a_linear_layer_has_no_map(self) -> None:
        hybrid = transformers.LlamaConfig(num_hidden_layers=4)
        hybrid.layer_types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
        with pytest.raises(
            ValueError, match=r"of type 'linear_attention' and has no attention map.*one of the layers \[3\]"
        ):
            layer_number(hybrid, -2)
        assert layer_number(hybrid, None) == 3

    def test_one_that_does_not_use_the_interface(
        self, llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(llava.model.model.language_model.layers[1].self_attn, "layer_idx", 7)
        with pytest.raises(
            ValueError, match="decoder layer 1 of this llava does not go through transformers' attention inter"
        ):
            llava.attention(some_requests(1), ["A cat."], layer=1)

    @pytest.mark.parametrize("name", ["s_aux", "position_bias"])
    def test_what_enters_the_softmax_besides(self, name: str) -> None:
        some = torch.ones(1, 1, 2, 4)
        with pytest.raises(ValueError, match=f"this model's attention has {name}, which the probe does not know"):
            probed_attention(torch.nn.Module(), some, some, some, None, **{name: some})

    def test_pictures_beside_the_prompt(self, llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(llava, "capabilities", frozenset({"sample"}))
        with pytest.raises(
            ValueError, match="attention to image tokens cannot be read from a llava, whose pictures are not among"
        ):
            llava.attention(some_requests(1), ["A cat."])


def test_scores_of_a_completion_are_those_of_its_own_tokens(llava: TransformersEngine) -> None:
    (request,) = some_requests(1)
    (completion,) = llava.generate([request], Sampling(max_new_tokens=6, temperature=0))
    (scores,) = llava.logprobs([request], [completion])
    text = families.render(llava.processor, request.messages)
    batch = llava.processor(text=[text], images=[request.images], add_special_tokens=False, return_tensors="pt")
    width = batch["input_ids"].shape[1]
    tokens = torch.tensor([completion.token_ids])
    batch["input_ids"] = torch.cat([batch["input_ids"], tokens], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        logits = llava.model(**batch).logits[0, width - 1 : -1]
    logits[:, llava.banned] = float("-inf")
    assert logits.argmax(-1).tolist() == completion.token_ids
    ours = logits.log_softmax(-1).max(-1).values
    assert len(scores) == 6
    torch.testing.assert_close(scores, ours, atol=0.05, rtol=0)  # `ours` leaves banned marks out of the sum
    (ended,) = llava.logprobs([request], [Completion("a", "", completion.token_ids, "stop")])
    torch.testing.assert_close(ended[:6], scores, atol=1e-5, rtol=0)
    assert len(ended) == 7
