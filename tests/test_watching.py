"""Attention watched while answers are drawn equals what measuring it afterwards gives, whatever kernel, batch and family."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_cases import GREEDY, some_requests
from tiny_vlms import BUILDERS, PLAIN, picture, save_tiny
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prefalign.engines import Completion, Contrast, ImageMask, Request, Sampling
from prefalign.engines.transformers import TransformersEngine, load_engine
from prefalign.models import ModelConfig
from prefalign.records import user_message

WATCHED = replace(GREEDY, attention_layer="middle")
DRAWN = Sampling(max_new_tokens=24, attention_layer="middle")


@pytest.fixture(scope="module", params=[*PLAIN, "scenes"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    if request.param == "scenes":
        return load_engine(ModelConfig("scenes", device="cpu"), batch_size=8)
    folder = save_tiny(request.param, tmp_path_factory.mktemp("watching") / request.param)
    return load_engine(ModelConfig(str(folder), device="cpu"), batch_size=8)


@pytest.fixture
def llava(tiny_llava: Path) -> TransformersEngine:
    return load_engine(ModelConfig(str(tiny_llava), device="cpu"), batch_size=8)


def assert_same(
    engine: TransformersEngine, requests: list[Request], answers: list[Completion], layer: int | None = None
) -> None:
    """The watched attention of each answer is what measuring it by itself gives."""
    for request, answer in zip(requests, answers, strict=True):
        (other,) = engine.attention([request], [answer], layer=layer)
        mine = answer.attention
        assert (mine.error, mine.layer) == (other.error, other.layer)
        torch.testing.assert_close(mine.weights, other.weights, atol=1e-6, rtol=0)
        assert torch.equal(mine.image, other.image)


def ended_early(engine: TransformersEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a token that some answer has in its middle end answers."""
    said = [answer.token_ids for answer in engine.generate(requests, replace(DRAWN, attention_layer=None))]
    first = {token for ids in said for token in ids[:2]}
    token = next(token for ids in said for token in ids[3:-3] if token not in first)
    monkeypatch.setattr(engine, "ends", [*engine.ends, token])


def test_a_ragged_batch_equals_measuring_one_by_one(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unlike prompts that end at different steps, in every layer; those that ended are fed padding meanwhile."""
    requests = some_requests(8)
    ended_early(engine, requests, monkeypatch)
    layers = engine.config.get_text_config().num_hidden_layers
    for layer in range(layers):
        answers = engine.generate(requests, replace(DRAWN, attention_layer=layer))
        assert len({len(answer.token_ids) for answer in answers}) > 1
        assert "stop" in {answer.finish_reason for answer in answers}
        assert min(len(answer.token_ids) for answer in answers) > 1
        assert_same(engine, requests, answers, layer)
        assert all(answer.attention.weights.sum() > 1e-3 for answer in answers)
    assert answers[0].attention.layer == layers - 1


def test_the_answers_are_those_without_it(engine: TransformersEngine) -> None:
    requests = some_requests(5)
    plain, watched = (engine.generate(requests, replace(DRAWN, attention_layer=layer)) for layer in (None, "middle"))
    assert plain == watched
    assert all(answer.attention is None for answer in plain)
    assert all(answer.attention.error is None for answer in watched)


def test_the_middle_layer(engine: TransformersEngine) -> None:
    requests = some_requests(1)
    (middle,) = engine.generate(requests, WATCHED)
    assert_same(engine, requests, [middle], None)
    (last,) = engine.generate(requests, replace(GREEDY, attention_layer=-1))
    assert last.attention.layer == engine.config.get_text_config().num_hidden_layers - 1


def test_another_picture_changes_the_numbers(engine: TransformersEngine) -> None:
    messages = [user_message("Which?", 2)]
    requests = [Request("a", messages, [picture(one), picture(2)]) for one in (1, 3)]
    first, second = engine.generate(requests, WATCHED)
    assert not torch.allclose(first.attention.weights, second.attention.weights, atol=1e-4)


def test_a_forced_prefix_and_hidden_image_tokens(engine: TransformersEngine) -> None:
    """The prefix is prompt; what is hidden from the model gets nothing, the others of the row are where they were."""
    requests = [
        replace(request, prefix=prefix, image_mask=hidden)
        for request, prefix, hidden in zip(
            some_requests(3), ["A red", "", "There is a"], [ImageMask(0.5, 1), None, ImageMask(1.0, 0)], strict=True
        )
    ]
    answers = engine.generate(requests, DRAWN)
    assert_same(engine, requests, answers)
    half, none, everything = ((answer.attention.weights < 1e-12).float().mean() for answer in answers)
    assert 0.2 < half < 0.8
    assert (none, everything) == (0, 1)


def test_what_follows_a_cut_sentence_does_not_count() -> None:
    """A sentence end is certain once more was drawn: the tokens behind it were queries, and are not the answer's."""
    engine = load_engine(ModelConfig("scenes", device="cpu"), batch_size=8)
    requests = some_requests(6, stop_at_sentence=True)
    answers = engine.generate(requests, replace(DRAWN, max_new_tokens=40))
    assert [answer.finish_reason for answer in answers].count("sentence") >= 2
    assert_same(engine, requests, answers)


def test_a_full_context(llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = some_requests(4)
    batch = llava.encode(requests)
    monkeypatch.setattr(llava, "context", max(batch.lengths) + 6)
    answers = llava.generate(requests, DRAWN)
    assert min(len(answer.token_ids) for answer in answers) == 6
    assert len({len(answer.token_ids) for answer in answers}) > 1
    assert_same(llava, requests, answers)


def test_a_window_that_slides_over_the_pictures(tmp_path: Path) -> None:
    """The cache of such a layer drops its first slots, so those that are left are told apart from its end."""
    processor, model_class, config = BUILDERS["gemma3"]()
    config.text_config.layer_types = ["sliding_attention", "full_attention"]
    config.text_config.sliding_window = 24
    torch.manual_seed(0)
    engine = TransformersEngine(model_class(config).eval(), processor)
    with torch.no_grad():
        for weight in engine.model.parameters():
            if weight.dim() >= 2 and not weight.any():
                weight.normal_(std=0.05)  # the projector, which begins at zero
    requests = some_requests(4)
    answers = engine.generate(requests, replace(DRAWN, attention_layer=0))
    assert_same(engine, requests, answers, 0)
    unseen = [int((answer.attention.weights == 0).sum()) for answer in answers]
    assert any(0 < zeros < len(answer.attention.weights) for zeros, answer in zip(unseen, answers, strict=True))


def test_prompts_that_begin_alike(llava: TransformersEngine) -> None:
    """Such rows go on from one prefill, unless they are watched."""
    (request,) = some_requests(1)
    requests = [replace(request, id=f"row-{index}", prefix="A red" * index) for index in range(4)]
    assert llava.shares
    assert_same(llava, requests, llava.generate(requests, DRAWN))


def test_an_answer_of_one_token_cannot_be_measured(llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    (request,) = some_requests(1)
    (single,) = llava.generate([request], replace(WATCHED, max_new_tokens=1))
    assert "request row-0: no token of its answer was fed back" in single.attention.error
    assert_same(llava, [request], [single])
    monkeypatch.setattr(llava, "ends", [*llava.ends, *single.token_ids])
    empty, good = llava.generate([request, *some_requests(2)[1:]], WATCHED)
    assert empty.token_ids == []
    assert "no token of its answer was fed back" in empty.attention.error
    assert len(empty.attention.weights) == 0
    assert good.attention.error is None


def test_what_cannot_be_measured_says_why(llava: TransformersEngine) -> None:
    text = Request("t", [user_message("Hello?")], [])
    mismatch = Request("m", [user_message("Hello?", 2)], [picture(1)])
    (good,) = some_requests(1)
    first, second, third = llava.generate([text, mismatch, good], WATCHED)
    assert first.attention.error == "request t: its prompt holds no image token. Give it a picture."
    assert (second.finish_reason, second.attention) == ("error", None)
    assert third.attention.error is None


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_model_is_left_as_it_was_found(
    llava: TransformersEngine, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llava.model
    model.set_attn_implementation({"text_config": kernel, "vision_config": "eager"})

    def found() -> dict[str, tuple[int, str]]:
        parts = {name: part.config for name, part in model.named_modules() if hasattr(part, "config")}
        return {name: (id(config), config._attn_implementation) for name, config in parts.items()}

    before = found()
    model.train()
    requests = some_requests(3)
    answers = llava.generate(requests, WATCHED)
    assert_same(llava, requests, answers)
    assert found() == before
    with monkeypatch.context() as patch:
        patch.setattr(model.model.language_model.layers[1].mlp, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llava.generate(requests, WATCHED)
    assert found() == before
    assert before["model.language_model"][1] == kernel
    assert model.training
    again = llava.generate(requests, WATCHED)
    assert all(
        torch.equal(one.attention.weights, two.attention.weights) for one, two in zip(answers, again, strict=True)
    )


class TestKernel:
    """A kernel of one's own is called by every layer and at every step, with the masks that were made for it."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, type]]:
        calls: list[tuple[int, type]] = []

        def of_keys(*, attention_mask, kv_length, **_):
            """(B, T), as flash attention takes it, or None."""
            return attention_mask[:, -kv_length:]

        def kernel(module, query, key, value, attention_mask, **more):
            calls.append((module.layer_idx, type(attention_mask)))
            if isinstance(attention_mask, torch.Tensor):
                causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
                attention_mask = attention_mask[:, None, None].bool() & causal
            else:
                attention_mask = None
            return sdpa_attention_forward(module, query, key, value, attention_mask, **more)

        monkeypatch.setitem(AttentionInterface._global_mapping, "keys", kernel)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "keys", of_keys)
        return calls

    def test_masks_of_keys(self, llava: TransformersEngine, calls: list[tuple[int, type]]) -> None:
        requests = some_requests(3)
        lengths = llava.encode(requests).lengths
        assert len(set(lengths)) > 1, "rows are padded"
        expected = llava.generate(requests, WATCHED)
        llava.model.set_attn_implementation({"text_config": "keys"})
        answers = llava.generate(requests, WATCHED)
        steps = max(len(answer.token_ids) for answer in answers)
        assert calls == [(0, torch.Tensor), (1, torch.Tensor)] * steps
        for mine, other in zip(answers, expected, strict=True):
            torch.testing.assert_close(mine.attention.weights, other.attention.weights, atol=1e-6, rtol=0)

    def test_masks_that_cannot_be_read(
        self, llava: TransformersEngine, calls: list[tuple[int, type]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "keys", lambda **_: SimpleNamespace())
        llava.model.set_attn_implementation({"text_config": "keys"})
        assert llava.generate(some_requests(1), GREEDY)
        assert set(calls) == {(0, SimpleNamespace), (1, SimpleNamespace)}
        with pytest.raises(
            ValueError, match="the attention kernel 'keys' hides tokens by a SimpleNamespace, which cannot"
        ):
            llava.generate(some_requests(1), WATCHED)


def test_only_fed_tokens_are_computed(llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one layer for each token but the last; pictures and prompt are read once."""
    module = sys.modules["prefalign.engines.watching"]
    rows, seen = module.row_weights, []
    monkeypatch.setattr(module, "row_weights", lambda query, *more: seen.append(query.shape[2]) or rows(query, *more))
    pictures = []
    hook = llava.model.model.vision_tower.register_forward_hook(lambda *_: pictures.append(1))
    (answer,) = llava.generate(some_requests(1), WATCHED)
    hook.remove()
    assert seen == [1] * (len(answer.token_ids) - 1)
    assert len(pictures) == 1


def test_adapters_count(tiny_llava: Path) -> None:
    from peft import LoraConfig, get_peft_model

    engine = load_engine(ModelConfig(str(tiny_llava), device="cpu"))
    requests = some_requests(3)
    plain = engine.generate(requests, WATCHED)
    torch.manual_seed(0)
    wrapped = get_peft_model(engine.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted = TransformersEngine(wrapped, engine.processor)
    answers = adapted.generate(requests, WATCHED)
    assert_same(adapted, requests, answers)
    assert not torch.allclose(answers[0].attention.weights, plain[0].attention.weights, atol=1e-4)


class TestRefused:
    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (2, "attention layer 2 is outside the decoder, whose 2 layers are numbered 0 to 1"),
            (-3, "attention layer -3 is outside the decoder"),
            ("last", "attention_layer must be the number of a decoder layer, `middle`, or null .* got 'last'"),
        ],
    )
    def test_layers_that_are_none(self, llava: TransformersEngine, layer: int | str, message: str) -> None:
        for requests in (some_requests(1), []):
            with pytest.raises(ValueError, match=message):
                llava.generate(requests, replace(GREEDY, attention_layer=layer))

    def test_a_contrasted_answer(self, llava: TransformersEngine) -> None:
        with pytest.raises(ValueError, match="attention_layer and contrast cannot be set together"):
            llava.generate(some_requests(1), replace(WATCHED, contrast=Contrast()))

    def test_pictures_beside_the_prompt(self, llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(llava, "capabilities", frozenset({"sample"}))
        with pytest.raises(ValueError, match="attention to image tokens cannot be read from a llava"):
            llava.generate(some_requests(1), WATCHED)

    def test_a_layer_that_does_not_use_the_interface(
        self, llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attention = llava.model.model.language_model.layers[1].self_attn
        config, forward = attention.config, attention.forward

        def by_itself(*parts, **more):
            attention.config = config
            return forward(*parts, **more)

        monkeypatch.setattr(attention, "forward", by_itself)
        message = "decoder layer 1 of this llava does not go through transformers' attention inter"
        with pytest.raises(ValueError, match=message):
            llava.generate(some_requests(1), WATCHED)
        monkeypatch.setattr(attention, "layer_idx", 7)
        with pytest.raises(ValueError, match=message):
            llava.generate(some_requests(1), WATCHED)

    def test_what_enters_the_softmax_besides(self, llava: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        attention = llava.model.model.language_model.layers[1].self_attn
        forward = attention.forward
        monkeypatch.setattr(attention, "forward", lambda *a, **more: forward(*a, **more, s_aux=torch.zeros(4)))
        with pytest.raises(ValueError, match="this model's attention has s_aux, which the probe does not know"):
            llava.generate(some_requests(1), WATCHED)
