"""M3ID decoding: equal to the slow loop token for token, plain where it should be plain, blind where it should be blind."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from engine_cases import some_requests
from peft import LoraConfig, get_peft_model
from tiny_vlms import picture, save_tiny

from prefalign.engines import Contrast, ImageMask, Request, Sampling, contrast
from prefalign.engines.contrast import corrected, text_only, weight
from prefalign.engines.transformers import TransformersEngine, load_engine
from prefalign.models import ModelConfig
from prefalign.records import user_message
from prefalign.scenes import world
from tests.contrast_reference import greedy

STRONG = Contrast(decay=0.3, gate=0.9, offset=1, max_weight=None)
GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module", params=["llava", "idefics3", "gemma3", "scenes"])
def engine(request, tmp_path_factory) -> TransformersEngine:
    name = request.param
    folder = name if name == "scenes" else str(save_tiny(name, tmp_path_factory.mktemp("contrast") / name))
    return load_engine(ModelConfig(folder, device="cpu"), batch_size=8)


@pytest.fixture(scope="module")
def llava(tiny_llava) -> TransformersEngine:
    return load_engine(ModelConfig(str(tiny_llava), device="cpu"), batch_size=8)


def asked(engine, count: int, **more) -> list[Request]:
    """Requests of several lengths: pictures of noise for random models, scenes for the model of scenes."""
    if engine.config.vision_config.image_size != 64:
        return some_requests(count, **more)
    texts = ("Describe the picture.", "What is in the picture?", "Is there a star in the picture?")
    return [
        Request(f"s{index}", [user_message(texts[index % 3], 1)], [world.draw(world.scene("test_fair", index))], **more)
        for index in range(count)
    ]


def generate(engine, requests, settings: Contrast | None, **more):
    return engine.generate(requests, replace(GREEDY, contrast=settings, **more))


def tokens(completions) -> list[list[int]]:
    assert not any(completion.error for completion in completions)
    return [completion.token_ids for completion in completions]


@pytest.fixture
def scores(monkeypatch) -> list[torch.Tensor]:
    """The corrected scores (B, V) of every step of the calls that follow."""
    seen: list[torch.Tensor] = []
    real = contrast.corrected

    def spy(*arguments):
        found = real(*arguments)
        seen.append(found[0].clone())
        return found

    monkeypatch.setattr(contrast, "corrected", spy)
    return seen


class TestFormula:
    @pytest.mark.parametrize(
        ("step", "expected"),
        [(0, 0.0), (1, 0.0202), (10, 0.2214), (35, 1.0138), (50, 1.7183), (100, 6.3891), (200, 53.598)],
    )
    def test_weights_of_the_paper(self, step: int, expected: float) -> None:
        """exp(0.02 t) - 1, for instance exp(1) - 1 = 1.7183 at t = 50."""
        assert weight(Contrast(0.02, max_weight=None), step) == pytest.approx(expected, rel=5e-4)

    def test_weight_is_capped_and_finite(self) -> None:
        assert weight(Contrast(0.02, max_weight=10.0), 200) == 10.0
        assert weight(Contrast(0.02, offset=10, max_weight=None), 0) == pytest.approx(math.exp(0.2) - 1)
        assert math.isfinite(weight(Contrast(1.0, max_weight=None), 10**6))

    def test_one_step_by_hand(self) -> None:
        """p = (0.5, 0.3, 0.2), q = (0.6, 0.1, 0.3), w = exp(ln 2) - 1 = 1: scores ln p + ln(p / q) = ln (0.41667, 0.9, 0.13333).

        Divided by their sum 1.45: (0.28736, 0.62069, 0.09195), so the second token wins.
        Distance: 1 - sum sqrt(p q) = 1 - (0.547723 + 0.173205 + 0.244949) = 0.034123, root 0.184724.
        """
        p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.6, 0.1, 0.3]])
        settings = Contrast(decay=math.log(2), gate=0.51, max_weight=None)
        found, active, distance = corrected(p.log() + 3.0, q.log() - 1.0, settings, 1)
        torch.testing.assert_close(found.softmax(-1), torch.tensor([[0.28736, 0.62069, 0.09195]]), atol=1e-5, rtol=0)
        assert active.tolist() == [True]
        assert distance.item() == pytest.approx(0.184724, abs=1e-5)
        found, active, _ = corrected(p.log() + 3.0, q.log(), replace(settings, gate=0.5), 1)
        assert torch.equal(found, p.log() + 3.0)  # 0.5 is not below 0.5: to the bit what came in
        assert active.tolist() == [False]

    def test_plausibility_and_cap_by_hand(self) -> None:
        """At least half as likely as the first (0.5): 0.3 stays, 0.2 goes. Capped at 0.5: ln p + 0.5 ln(p / q)."""
        p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.6, 0.1, 0.3]])
        settings = Contrast(decay=math.log(2), gate=2.0, max_weight=0.5, plausible=0.5)
        found, _, _ = corrected(p.log(), q.log(), settings, 1)
        expected = p * (p / q) ** 0.5 * torch.tensor([[1.0, 1.0, 0.0]])
        torch.testing.assert_close(found.softmax(-1), expected / expected.sum())

    def test_infinities_are_left_out(self) -> None:
        """A token that either branch rules out gets no correction, and nothing becomes NaN."""
        never = -math.inf
        seeing, blind = torch.tensor([[0.0, 1.0, never, never]]), torch.tensor([[0.0, never, 2.0, never]])
        found, _, distance = corrected(seeing, blind, Contrast(1.0, 2.0), 3)
        assert found.isneginf().tolist() == [[False, False, True, True]]
        assert found[0, 1] == 1.0
        assert found[0, 0] != 0.0
        assert 0 < distance.item() < 1

    def test_equal_branches_change_nothing(self) -> None:
        logits = torch.randn(3, 50)
        found, _, distance = corrected(logits, logits.clone(), STRONG, 5)
        assert torch.equal(found, logits)
        assert distance.abs().max() < 1e-3

    def test_a_turn_of_pictures_alone_keeps_a_text(self) -> None:
        turns = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nQ"}]},
        ]
        assert [turn["content"] for turn in text_only(turns)] == [
            [{"type": "text", "text": ""}],
            [{"type": "text", "text": "Q"}],
        ]


class TestAgainstTheSlowLoop:
    @pytest.mark.parametrize("way", ["removed", "hidden"])
    @pytest.mark.parametrize(
        "settings",
        [
            Contrast(decay=0.02, gate=0.9, offset=35, max_weight=None),
            replace(STRONG, max_weight=0.7, plausible=0.1, gate=2.0),
        ],
        ids=["paper", "cut"],
    )
    def test_tokens_and_scores(self, engine, scores, way, settings) -> None:
        requests = asked(engine, 4)
        requests[1].prefix = "There is a red"
        requests[2].prefix = "Yes. I can"
        settings = replace(settings, without=way)
        together = generate(engine, requests, settings)
        steps, changed = list(scores), 0
        for request, completion in zip(requests, together, strict=True):
            chosen, expected = greedy(engine, request, settings, 12, way=way)
            assert completion.token_ids == chosen
            assert completion.contrast.without == way
            scores.clear()
            assert generate(engine, [request], settings)[0].token_ids == chosen
            for one, other in zip(scores, expected, strict=False):
                one = one[0].double().log_softmax(0)
                assert torch.equal(one.isneginf(), other.isneginf())
                torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-6)
            changed += generate(engine, [request], None)[0].token_ids != chosen
        assert len(steps) == 12 or len(steps) > max(map(len, tokens(together)))
        assert changed

    def test_batch_of_different_lengths_is_one_by_one(self, engine) -> None:
        requests = asked(engine, 6)
        for sampling in (
            replace(GREEDY, contrast=STRONG),
            Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, contrast=STRONG),
        ):
            together = engine.generate(requests, sampling)
            assert tokens(engine.generate(requests[::-1], sampling)[::-1]) == tokens(together)
            alone = [engine.generate([request], sampling)[0] for request in requests]
            assert tokens(alone) == tokens(together)
            for one, other in zip(alone, together, strict=True):
                assert one.contrast.active == pytest.approx(other.contrast.active, abs=1e-6)
                assert one.contrast.dependence == pytest.approx(other.contrast.dependence, abs=1e-4)


class TestPlainWhereItShouldBe:
    @pytest.mark.parametrize(
        "settings", [replace(STRONG, gate=0.0), replace(STRONG, decay=0.0), replace(STRONG, max_weight=0.0)]
    )
    def test_no_gate_no_decay_no_weight(self, engine, settings) -> None:
        requests = asked(engine, 4)
        for sampling in (GREEDY, Sampling(max_new_tokens=12, repetition_penalty=1.3)):
            found = engine.generate(requests, replace(sampling, contrast=settings))
            assert tokens(found) == tokens(engine.generate(requests, sampling))
            assert {completion.contrast.active for completion in found} == {0.0}

    def test_above_one_the_gate_is_always_open(self, engine) -> None:
        found = generate(engine, asked(engine, 4), replace(STRONG, gate=1.01))
        assert {completion.contrast.active for completion in found} == {1.0}

    def test_rows_without_pictures_are_decoded_plainly(self, engine) -> None:
        bare = [
            Request(f"t{index}", [user_message(text)], []) for index, text in enumerate(("Q", "A longer question?"))
        ]
        mixed = [bare[0], *asked(engine, 3), bare[1]]
        found = generate(engine, mixed, STRONG)
        assert tokens([found[0], found[4]]) == tokens(generate(engine, bare, None))
        assert found[0].contrast is None
        assert tokens(found[1:4]) == tokens(generate(engine, asked(engine, 3), STRONG))
        assert found[1].contrast is not None

    def test_one_bad_request_fails_alone(self, llava) -> None:
        bad = Request("bad", [user_message("Q", 2)], [picture(1)])
        found = generate(llava, [bad, *some_requests(2)], STRONG)
        assert found[0].finish_reason == "error"
        assert tokens(found[1:]) == tokens(generate(llava, some_requests(2), STRONG))


class TestThePicture:
    def test_another_picture_gives_another_answer(self, engine) -> None:
        one, other = asked(engine, 1)[0], asked(engine, 3)[2]
        shown = replace(one, images=other.images[: len(one.images)])
        assert tokens(generate(engine, [one], STRONG)) != tokens(generate(engine, [shown], STRONG))

    @pytest.mark.parametrize("way", ["removed", "hidden"])
    def test_the_blind_branch_never_sees_it(self, engine, way, monkeypatch) -> None:
        """Blind scores of the first step are the same whatever is shown, and differ from those with the picture."""
        blind = []
        real = contrast.corrected

        def spy(seeing, other, *rest):
            blind.append((seeing.clone(), other.clone()))
            return real(seeing, other, *rest)

        monkeypatch.setattr(contrast, "corrected", spy)
        request = asked(engine, 1)[0]
        for shown in (request.images, asked(engine, 3)[2].images[:1]):
            generate(engine, [replace(request, images=[image.resize(request.images[0].size) for image in shown])],
                     replace(STRONG, without=way), max_new_tokens=1)  # fmt: skip
        (seeing, first), (other_seeing, second) = blind
        said = first.isfinite()
        torch.testing.assert_close(first[said], second[said], atol=1e-5, rtol=0)
        assert (seeing[said] - other_seeing[said]).abs().max() > 1e-2
        assert (seeing[said].log_softmax(-1) - first[said].log_softmax(-1)).abs().max() > 1e-2

    def test_hidden_is_the_engines_own_mask(self, llava, monkeypatch) -> None:
        """The blind scores of `hidden` are those of an `ImageMask` of share 1; those of `removed` those of a text prompt."""
        blind = {}
        real = contrast.corrected

        def spy(seeing, other, settings, step):
            blind[settings.without] = other.clone()
            return real(seeing, other, settings, step)

        monkeypatch.setattr(contrast, "corrected", spy)
        request = some_requests(1)[0]
        for way in ("hidden", "removed"):
            generate(llava, [request], replace(STRONG, without=way), max_new_tokens=1)
        others = {"hidden": replace(request, image_mask=ImageMask(1.0, 0)),
                  "removed": Request("a", text_only(request.messages), [])}  # fmt: skip
        ids = [llava.tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" Yes", " There")]
        for way, other in others.items():
            yes, there = (llava.logprobs([other], [word])[0][0].item() for word in ("Yes", "There"))
            found = blind[way][0, ids]
            assert (found[0] - found[1]).item() == pytest.approx(yes - there, abs=2e-5)
        assert not torch.allclose(blind["hidden"], blind["removed"], atol=1e-2)

    def test_a_mask_on_the_request_stays_on_the_seeing_branch(self, llava) -> None:
        """With every image token hidden the `hidden` branch says the same as the seeing one: nothing to correct."""
        requests = some_requests(3, image_mask=ImageMask(1.0, 5))
        found = generate(llava, requests, replace(STRONG, without="hidden"))
        assert tokens(found) == tokens(generate(llava, requests, None))
        assert max(completion.contrast.dependence for completion in found) < 1e-3
        half = some_requests(3, image_mask=ImageMask(0.5, 5))
        assert tokens(generate(llava, half, STRONG)) != tokens(generate(llava, some_requests(3), STRONG))


class TestTogetherWith:
    def test_repetition_penalty_comes_after(self, llava, scores) -> None:
        """The corrected scores are the same with and without a penalty for as long as the tokens are."""
        request = some_requests(1)[0]
        generate(llava, [request], STRONG)
        plain = scores[0].clone()
        scores.clear()
        generate(llava, [request], STRONG, repetition_penalty=1.5)
        assert torch.equal(scores[0], plain)

    def test_stop_at_sentence(self, engine) -> None:
        requests = asked(engine, 3)
        whole = generate(engine, requests, STRONG, max_new_tokens=40)
        for request in requests:
            request.stop_at_sentence = True
        for one, found in zip(whole, generate(engine, requests, STRONG, max_new_tokens=40), strict=True):
            assert one.token_ids[: len(found.token_ids)] == found.token_ids
            assert (found.contrast is None) == (not found.token_ids)

    def test_adapters_are_in_both_branches(self, tiny_llava) -> None:
        engine = load_engine(ModelConfig(str(tiny_llava), device="cpu"), batch_size=8)
        before = tokens(generate(engine, some_requests(3), STRONG))
        torch.manual_seed(0)
        tuned = get_peft_model(engine.model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        found = generate(TransformersEngine(tuned, engine.processor), some_requests(3), STRONG)
        assert tokens(found) != before
        merged = TransformersEngine(tuned.merge_and_unload(), engine.processor)
        assert tokens(generate(merged, some_requests(3), STRONG)) == tokens(found)

    def test_training_mode_and_gradients_are_left_as_they_were(self, llava) -> None:
        llava.model.train()
        try:
            generate(llava, some_requests(2), STRONG)
            assert llava.model.training
        finally:
            llava.model.eval()


def test_a_processor_that_needs_a_picture_hides_it(tmp_path, caplog) -> None:
    engine = load_engine(ModelConfig(str(save_tiny("paligemma", tmp_path / "paligemma")), device="cpu"), batch_size=4)
    requests = some_requests(3)
    requests[1].prefix = "There is"
    with caplog.at_level(logging.WARNING):
        found = generate(engine, requests, STRONG)
        generate(engine, requests, STRONG)
    assert [message.count("cannot be asked without a picture") for message in caplog.messages] == [1]
    assert {completion.contrast.without for completion in found} == {"hidden"}
    assert tokens(found) == tokens(generate(engine, requests, replace(STRONG, without="hidden")))
    for request, completion in zip(requests, found, strict=True):
        if not request.prefix:
            assert completion.token_ids == greedy(engine, request, STRONG, 12, way="hidden")[0]


def test_cross_attention_is_refused_by_name(tiny_llava) -> None:
    engine = load_engine(ModelConfig(str(tiny_llava), device="cpu"))
    engine.config.text_config.cross_attention_layers = [1]
    refusing = TransformersEngine(engine.model, engine.processor)
    assert "contrast" in engine.capabilities - refusing.capabilities
    with pytest.raises(
        ValueError, match="a llava reads pictures through cross-attention layers .* no prompt without its picture"
    ):
        generate(refusing, some_requests(1), STRONG)
    assert tokens(generate(refusing, some_requests(1), None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": -0.1}, r"contrast.decay must be 0 \(corrects nothing\) or more, got -0.1"),
        ({"gate": -1.0}, r"contrast.gate must be 0 \(never acts\) or more, got -1.0"),
        ({"offset": -1}, "contrast.offset counts tokens and must be 0 or more, got -1"),
        ({"max_weight": -2.0}, "contrast.max_weight must be 0 or more, got -2.0"),
        ({"plausible": 1.5}, r"contrast.plausible must be in \[0, 1\], got 1.5"),
        ({"without": "black"}, "contrast.without must be removed or hidden, got 'black'"),
    ],
)
def test_settings_that_mean_nothing(llava, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate(llava, some_requests(1), replace(Contrast(), **change))
