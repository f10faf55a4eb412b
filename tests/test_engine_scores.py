"""What the transformers engine hides and what it scores: against a slow loop, a plain forward pass and TRL."""

from pathlib import Path

import pytest
import torch
import transformers
from engine_cases import GREEDY, close, some_requests
from masked_reference import greedy, hidden_places
from tiny_vlms import BUILDERS, picture, save_tiny

from prefalign import families
from prefalign.engines import ImageMask, Request, Sampling
from prefalign.engines.transformers import TransformersEngine, load_engine
from prefalign.models import ModelConfig
from prefalign.records import assistant_message, user_message


@pytest.fixture(scope="module", params=["llava", "idefics3", "gemma3"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder = save_tiny(request.param, tmp_path_factory.mktemp("engine") / request.param)
    return load_engine(ModelConfig(str(folder)), batch_size=8)


@pytest.fixture(scope="module")
def llava(tiny_llava: Path) -> TransformersEngine:
    return load_engine(ModelConfig(str(tiny_llava)), batch_size=8)


def mllama_engine() -> TransformersEngine:
    """An engine on a random Mllama; its processor is LLaVA's, which is enough for requests that are not run."""
    processor, _, _ = BUILDERS["llava"]()
    words = len(processor.tokenizer)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": words, "cross_attention_layers": [1], "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1,
              "attention_heads": 2, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0],
              "vision_output_dim": 32, "supported_aspect_ratios": [[1, 1]]}  # fmt: skip
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=image)
    return TransformersEngine(transformers.MllamaForConditionalGeneration(config), processor)


class TestImageMask:
    def test_it_equals_the_slow_loop_with_a_4d_mask(self, engine: TransformersEngine) -> None:
        requests = some_requests(4)
        for index, request in enumerate(requests):
            request.image_mask = ImageMask((0.3, 0.5, 0.7, 1.0)[index], 100 + index)
        fast = engine.generate(requests, GREEDY)
        scores = engine.logprobs(requests, [""] * 4)
        for request, completion, score in zip(requests, fast, scores, strict=True):
            assert request.image_mask is not None
            text = families.render(engine.processor, request.messages)
            tokens, logits = greedy(
                engine.model, engine.processor, text, request.images, request.image_mask, 10, engine.banned
            )
            assert completion.token_ids == tokens[: len(completion.token_ids)]
            _, closing = families.render_answer(engine.processor, request.messages, "")
            first = engine.tokenizer(closing, add_special_tokens=False).input_ids[0]
            assert logits[0].log_softmax(0)[first].item() == pytest.approx(score[0].item(), abs=2e-5)

    def test_positions_do_not_shift(self, llava: TransformersEngine) -> None:
        """With positions counted over what is visible the numbers would be others."""
        request = Request("a", [user_message("Q", 1)], [picture(1)], image_mask=ImageMask(0.7, 5))
        batch = llava._encode([llava._row(0, request, "Yes.", score=True)], {})
        hidden = int((batch.tensors["attention_mask"] == 0).sum())
        assert hidden == int(hidden_places(batch.tensors["input_ids"][0], ImageMask(0.7, 5), llava.config).sum()) > 0
        length = batch.tensors["input_ids"].shape[1]
        assert batch.tensors["position_ids"].tolist() == [list(range(length))]
        (right,) = llava._score(batch)
        batch.tensors["position_ids"] = (batch.tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
        (shifted,) = llava._score(batch)
        assert (right - shifted).abs().max() > 1e-3

    def test_share_zero_is_no_mask_to_the_bit(self, engine: TransformersEngine) -> None:
        plain, masked = some_requests(4), some_requests(4, image_mask=ImageMask(0.0, 9))
        assert engine.generate(plain, Sampling(max_new_tokens=8)) == engine.generate(masked, Sampling(max_new_tokens=8))
        for one, other in zip(engine.logprobs(plain, ["Yes."] * 4), engine.logprobs(masked, ["Yes."] * 4), strict=True):
            assert torch.equal(one, other)

    def test_all_hidden_is_blind_and_finite(self, engine: TransformersEngine) -> None:
        pictures = [picture(1), picture(2), picture(3, (40, 48))]
        blind = [Request("a", [user_message("Q", 1)], [p], image_mask=ImageMask(1.0, 4)) for p in pictures]
        scores = engine.logprobs(blind, ["A red dog."] * 3)
        assert all(values.isfinite().all() for values in scores)
        assert close(scores[1:], scores[:1] * 2)
        assert len({completion.text for completion in engine.generate(blind, Sampling(max_new_tokens=8))}) == 1
        seeing = engine.logprobs([Request("a", [user_message("Q", 1)], [p]) for p in pictures], ["A red dog."] * 3)
        assert not close(seeing[1:], seeing[:1] * 2)
        assert not close(seeing[:1], scores[:1])

    def test_the_seed_of_the_mask_draws_it(self, llava: TransformersEngine) -> None:
        one, same, other = (
            Request(name, [user_message("Q", 2)], [picture(1), picture(2)], image_mask=ImageMask(0.5, seed))
            for name, seed in (("a", 1), ("b", 1), ("a", 2))
        )
        scores = llava.logprobs([one, same, other], ["Yes."] * 3)
        assert torch.equal(scores[0], scores[1])
        assert not torch.allclose(scores[0], scores[2], atol=1e-4)

    def test_a_share_outside_the_unit_interval(self, llava: TransformersEngine) -> None:
        (completion,) = llava.generate(some_requests(1, image_mask=ImageMask(1.5, 0)), GREEDY)
        assert completion.error is not None
        assert "the share of image tokens to hide must be in [0, 1], got 1.5" in completion.error

    def test_a_prompt_without_a_picture_has_nothing_to_hide(self, llava: TransformersEngine) -> None:
        blind, seeing = (Request(name, [user_message("Q", count)], [picture(1)] * count, image_mask=ImageMask(0.5, 1))
                         for name, count in (("blind", 0), ("seeing", 1)))  # fmt: skip
        failed, good = llava.generate([blind, seeing], GREEDY)
        assert failed.error is not None
        assert "request blind: its prompt holds no image token, so the image mask would hide nothing" in failed.error
        assert good.error is None
        scores = llava.logprobs([blind, seeing], ["Yes."] * 2)
        assert [bool(values.isfinite().all()) for values in scores] == [False, True]

    def test_a_model_that_looks_through_cross_attention_is_refused(self) -> None:
        """Mllama has one image token in the prompt and its picture elsewhere: a mask on the token hides nothing."""
        engine = mllama_engine()
        assert engine.capabilities == {"sample", "logprobs", "prefix", "vision_embed", "first_token"}
        plain, masked = (Request("a", [user_message("Q", 1)], [picture(1)], image_mask=mask)
                         for mask in (None, ImageMask(1.0, 1)))  # fmt: skip
        assert engine.problem(plain) is None
        assert "image tokens cannot be hidden from a mllama, which reads pictures through cross-attention" in str(
            engine.problem(masked)
        )
        (completion,) = engine.generate([masked], GREEDY)
        assert completion.finish_reason == "error"


class TestLogprobs:
    def test_they_equal_the_plain_forward_pass(self, engine: TransformersEngine) -> None:
        requests = some_requests(5)
        answers = ["A red dog.", "Yes", "There is a large red circle at the top left. No.", "3.5", "Two\nlines"]
        for request, answer, scores in zip(requests, answers, engine.logprobs(requests, answers), strict=True):
            prompt, completion = families.render_answer(engine.processor, request.messages, answer)
            batch = engine.processor(
                text=[prompt + completion], images=[request.images], add_special_tokens=False, return_tensors="pt"
            )
            with torch.no_grad():
                logits = engine.model(**batch).logits[0]
            targets = engine.tokenizer(completion, add_special_tokens=False).input_ids
            assert batch["input_ids"][0, -len(targets) :].tolist() == targets
            by_hand = [
                logits[len(logits) - len(targets) + place - 1].log_softmax(0)[token]
                for place, token in enumerate(targets)
            ]
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, torch.stack(by_hand), atol=2e-5, rtol=0)

    def test_the_tokens_are_those_that_trl_trains_on(self, engine: TransformersEngine) -> None:
        from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

        answers = ["A red dog.", "There is a large red circle at the top left."]
        request = some_requests(1)[0]
        row = {
            "images": request.images,
            "prompt": request.messages,
            "chosen": [assistant_message(answers[0])],
            "rejected": [assistant_message(answers[1])],
        }
        batch = DataCollatorForVisionPreference(engine.processor)([row])
        completion_mask = batch.pop("completion_mask").bool()
        with torch.no_grad():
            logits = engine.model(**batch).logits.log_softmax(-1)
        gathered = logits[:, :-1].gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        theirs = [values[mask] for values, mask in zip(gathered, completion_mask[:, 1:], strict=True)]
        ours = engine.logprobs([request, request], answers)
        assert [len(values) for values in ours] == [len(values) for values in theirs]
        assert close(ours, theirs)

    def test_they_are_those_of_generation(self, engine: TransformersEngine) -> None:
        """A greedy answer has the highest log-prob at each of its tokens that any token has."""
        request = Request("a", [user_message("Q", 1)], [picture(4)], prefix="There is")
        completion = engine.generate([request], Sampling(max_new_tokens=6, temperature=0))[0]
        tokens = completion.token_ids
        row = engine._row(0, request, "", score=True)
        row.tail = tokens
        batch = engine._encode([row], {})
        (scores,) = engine._score(batch)
        for place in range(len(tokens)):
            for rival in (20, 50, 90, 200):
                if rival in engine.banned or rival == tokens[place]:
                    continue
                row.tail = [*tokens[:place], rival]
                assert engine._score(engine._encode([row], {}))[0][-1] < scores[place]

    def test_the_picture_matters(self, engine: TransformersEngine) -> None:
        messages = [user_message("What is in the image?", 1)]
        blank = picture(1).point(lambda _: 127)
        scores = engine.logprobs(
            [Request("a", messages, [shown]) for shown in (picture(1), picture(2), blank)], ["A red dog."] * 3
        )
        sums = [values.sum().item() for values in scores]
        assert min(abs(sums[0] - sums[1]), abs(sums[0] - sums[2]), abs(sums[1] - sums[2])) > 1e-3
        two = [user_message("Which?", 2)]
        swapped = engine.logprobs(
            [Request("a", two, [picture(1), picture(2)]), Request("a", two, [picture(2), picture(1)])], ["A"] * 2
        )
        assert not close(swapped[:1], swapped[1:])

    def test_a_prefix_is_not_scored(self, llava: TransformersEngine) -> None:
        messages = [user_message("Q", 1)]
        whole = llava.logprobs([Request("a", messages, [picture(1)])], ["There is a red dog."])[0]
        rest = llava.logprobs([Request("a", messages, [picture(1)], prefix="There is a")], [" red dog."])[0]
        torch.testing.assert_close(whole[-len(rest) :], rest, atol=2e-5, rtol=0)
        assert len(rest) < len(whole)

    def test_text_without_pictures(self, llava: TransformersEngine) -> None:
        mixed = [Request("a", [user_message("Q")], []), Request("b", [user_message("Q", 1)], [picture(1)])]
        scores = llava.logprobs(mixed, ["Yes."] * 2)
        assert torch.equal(scores[0], llava.logprobs(mixed[:1], ["Yes."])[0])
        assert not torch.allclose(scores[0], scores[1], atol=1e-4)

    def test_a_request_that_cannot_be_scored_is_nan_alone(self, llava: TransformersEngine) -> None:
        good, bad = some_requests(2)
        scores = llava.logprobs([good, bad], ["Yes.", "An <image> of a dog."])
        assert scores[0].isfinite().all()
        assert scores[1].shape == (1,)
        assert scores[1].isnan().all()
        assert "the text holds '<image>'" in (llava.problem(bad, "An <image> of a dog.") or "")
        with pytest.raises(ValueError, match="there are 1 requests for 2 answers"):
            llava.logprobs([good], ["a", "b"])


def test_an_adapter_is_used(tiny_llava: Path, llava: TransformersEngine) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = load_engine(ModelConfig(str(tiny_llava))).model
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    engine = TransformersEngine(get_peft_model(base, lora), llava.processor)
    requests = some_requests(3)
    plain = llava.logprobs(requests, ["A red dog."] * 3)
    assert not close(engine.logprobs(requests, ["A red dog."] * 3), plain)
    assert engine.generate(requests, GREEDY) != llava.generate(requests, GREEDY)
    with engine.model.disable_adapter():
        assert close(engine.logprobs(requests, ["A red dog."] * 3), plain)


def test_paligemma_which_sees_its_prompt_both_ways(tmp_path: Path) -> None:
    """Its processor ends the prompt with a newline, so a prefix follows as tokens; the prompt is not causal, the answer is."""
    engine = load_engine(ModelConfig(str(save_tiny("paligemma", tmp_path))), batch_size=4)
    requests = some_requests(3)
    answers = ["A red dog.", "Yes", "There is a large red circle."]
    scores = engine.logprobs(requests, answers)
    for request, answer, values in zip(requests, answers, scores, strict=True):
        prompt = families.render(engine.processor, request.messages)
        batch = engine.processor(text=[prompt], images=[request.images], suffix=[answer], return_tensors="pt")
        targets = engine.tokenizer(answer + "<eos>", add_special_tokens=False).input_ids
        assert batch["input_ids"][0, -len(targets) :].tolist() == targets
        with torch.no_grad():
            logits = engine.model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
        by_hand = logits[-len(targets) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(targets)[:, None]).squeeze(1)
        torch.testing.assert_close(values, by_hand, atol=2e-5, rtol=0)
    assert not torch.allclose(
        *engine.logprobs([requests[0], Request("b", requests[0].messages, [picture(77)])], ["A"] * 2)
    )
    requests[1].prefix = "Yes, "
    together = engine.generate(requests, Sampling(max_new_tokens=6))
    assert [engine.generate([request], Sampling(max_new_tokens=6))[0] for request in requests] == together
    for completion in engine.generate([Request("a", [user_message("Q")], [])], GREEDY):
        assert "`images` are expected as arguments" in (completion.error or "")
