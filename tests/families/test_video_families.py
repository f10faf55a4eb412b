"""Families whose processor needs torchvision, in an environment of their own: each claim of the engine, once for each family."""

from pathlib import Path

import pytest
import torch
from engine_cases import close, some_requests
from masked_reference import greedy
from tiny_vlms import WITH_VIDEO, picture, save_tiny

from prefalign import families
from prefalign.engines import ImageMask, Request, Sampling
from prefalign.engines.transformers import TransformersEngine, load_engine
from prefalign.models import ModelConfig, parameter_table
from prefalign.records import assistant_message, user_message

pytestmark = pytest.mark.families

GREEDY = Sampling(max_new_tokens=8, temperature=0)
RENDERED = {
    "llava_onevision": "<|im_start|>user\n<image>What is it?<|im_end|>\n<|im_start|>assistant\n",
    "qwen2_vl": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n",
    "qwen2_5_vl": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n",
    "qwen3_vl": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n",
    "smolvlm": "<bos>User:<image>What is it?<end_of_utterance>\nAssistant:",
    "internvl": "<|im_start|>user\n<IMG_CONTEXT>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
}
MARK = {
    "llava_onevision": "<image>",
    "qwen2_vl": "<|vision_start|>",
    "qwen2_5_vl": "<|video_pad|>",
    "qwen3_vl": "<|image_pad|>",
    "smolvlm": "<row_1_col_1>",
    "internvl": "<IMG_CONTEXT>",
}
END = {"smolvlm": "<end_of_utterance>"}


@pytest.fixture(scope="module", params=WITH_VIDEO)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder: Path = save_tiny(request.param, tmp_path_factory.mktemp("families") / request.param)
    return load_engine(ModelConfig(str(folder)), batch_size=8)


def test_rendering_and_ends(engine: TransformersEngine) -> None:
    name = families.family(engine.config)
    messages = [user_message("What is it?", 1)]
    opened = families.render(engine.processor, messages)
    assert opened == RENDERED[name]
    assert families.render(engine.processor, messages, "A red ") == f"{opened}{' ' * opened.endswith(':')}A red"
    assert END.get(name, "<|im_end|>") in engine.tokenizer.convert_ids_to_tokens(engine.ends)
    banned = set(engine.tokenizer.convert_ids_to_tokens(engine.banned))
    assert banned >= {"<pad>", "<bos>", MARK[name]}
    assert not banned & set(engine.tokenizer.convert_ids_to_tokens(engine.ends))


def test_every_tower_is_found(engine: TransformersEngine) -> None:
    counts = {row["tower"]: row["parameters"] for row in parameter_table(engine.model)}
    assert min(counts.values()) > 0
    assert sum(counts[name] for name in families.TOWERS) == counts["total"]


def test_image_tokens_are_as_many_as_the_features(engine: TransformersEngine) -> None:
    (request,) = some_requests(2)[1:]
    batch = engine._encode([engine._row(0, request, "", score=False)], {}).tensors
    names = ("pixel_values", "image_sizes", "pixel_attention_mask", "image_grid_thw", "batch_num_images")
    pictures = {name: batch[name] for name in names if name in batch}
    found = engine.model.get_image_features(**pictures, return_dict=True).pooler_output
    parts = [found] if torch.is_tensor(found) else list(found)
    rows = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in parts)
    assert families.image_token_mask(batch["input_ids"], engine.config).sum() == rows > 0


def test_neither_batch_nor_order_changes_what_is_drawn(engine: TransformersEngine) -> None:
    requests, sampling = some_requests(6), Sampling(max_new_tokens=8)
    together = engine.generate(requests, sampling)
    assert [engine.generate([request], sampling)[0] for request in requests] == together
    assert engine.generate(requests[::-1], sampling) == together[::-1]
    assert all(completion.finish_reason != "error" for completion in together)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_hidden_tokens_equal_the_slow_loop_with_a_4d_mask(engine: TransformersEngine, share: float) -> None:
    requests = some_requests(3)
    for index, request in enumerate(requests):
        request.image_mask = ImageMask(share, 100 + index)
    fast = engine.generate(requests, GREEDY)
    scores = engine.logprobs(requests, [""] * 3)
    for request, completion, score in zip(requests, fast, scores, strict=True):
        assert request.image_mask is not None
        text = families.render(engine.processor, request.messages)
        tokens, logits = greedy(
            engine.model, engine.processor, text, request.images, request.image_mask, 8, engine.banned
        )
        assert completion.token_ids == tokens[: len(completion.token_ids)]
        _, closing = families.render_answer(engine.processor, request.messages, "")
        first = engine.tokenizer(closing, add_special_tokens=False).input_ids[0]
        assert logits[0].log_softmax(0)[first].item() == pytest.approx(score[0].item(), abs=3e-5)


def test_share_zero_is_no_mask_to_the_bit(engine: TransformersEngine) -> None:
    plain, masked = some_requests(3), some_requests(3, image_mask=ImageMask(0.0, 9))
    assert engine.generate(plain, Sampling(max_new_tokens=6)) == engine.generate(masked, Sampling(max_new_tokens=6))
    for one, other in zip(engine.logprobs(plain, ["Yes."] * 3), engine.logprobs(masked, ["Yes."] * 3), strict=True):
        assert torch.equal(one, other)


def test_the_picture_matters_and_hidden_it_does_not(engine: TransformersEngine) -> None:
    messages = [user_message("What is in the image?", 1)]
    pictures = [picture(1), picture(2), picture(1).point(lambda _: 127)]
    seeing = engine.logprobs([Request("a", messages, [shown]) for shown in pictures], ["A red dog."] * 3)
    blind = engine.logprobs(
        [Request("a", messages, [shown], image_mask=ImageMask(1.0, 0)) for shown in pictures], ["A red dog."] * 3
    )
    assert all(values.isfinite().all() for values in blind)
    assert not any(close([seeing[one]], [seeing[other]]) for one, other in ((0, 1), (0, 2), (1, 2)))
    assert close(blind[1:], blind[:1] * 2)
    assert not close(seeing[:1], blind[:1])


def test_logprobs_equal_the_plain_forward_pass(engine: TransformersEngine) -> None:
    requests = some_requests(4)
    answers = ["A red dog.", "Yes", "There is a large red circle at the top left. No.", "3.5"]
    for request, answer, scores in zip(requests, answers, engine.logprobs(requests, answers), strict=True):
        prompt, completion = families.render_answer(engine.processor, request.messages, answer)
        batch = engine.processor(
            text=[prompt + completion], images=[request.images], add_special_tokens=False, return_tensors="pt"
        )
        with torch.no_grad():
            logits = engine.model(**batch).logits[0]
        families.clear_position_cache(engine.model)
        targets = engine.tokenizer(completion, add_special_tokens=False).input_ids
        assert batch["input_ids"][0, -len(targets) :].tolist() == targets
        before = logits[-len(targets) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(
            scores, before.gather(1, torch.tensor(targets)[:, None]).squeeze(1), atol=3e-5, rtol=0
        )


def test_the_tokens_are_those_that_trl_trains_on(engine: TransformersEngine) -> None:
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
    families.clear_position_cache(engine.model)
    gathered = logits[:, :-1].gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    theirs = [values[mask] for values, mask in zip(gathered, completion_mask[:, 1:], strict=True)]
    assert close(engine.logprobs([request, request], answers), theirs)


def test_nothing_stays_behind_after_generation(engine: TransformersEngine) -> None:
    """Qwen-VL keeps the rotary offsets of its last call; a later pass on other rows must not see them."""
    first, second = some_requests(3), some_requests(2)
    before = engine.logprobs(second, ["Yes."] * 2)
    engine.generate(first, GREEDY)
    assert getattr(engine.model.model, "rope_deltas", None) is None
    assert all(torch.equal(a, b) for a, b in zip(before, engine.logprobs(second, ["Yes."] * 2), strict=True))


def test_text_without_pictures(engine: TransformersEngine) -> None:
    mixed = [
        Request("a", [user_message("Q")], []),
        *some_requests(1),
        Request("b", [user_message("A longer question?")], []),
    ]
    out = engine.generate(mixed, GREEDY)
    assert [completion.finish_reason == "error" for completion in out] == [False] * 3
    text = families.render(engine.processor, mixed[0].messages)
    batch = engine.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    _, closing = families.render_answer(engine.processor, mixed[0].messages, "")
    first = engine.tokenizer(closing, add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        expected = engine.model(**batch).logits[0, -1].log_softmax(0)[first]
    families.clear_position_cache(engine.model)
    assert engine.logprobs(mixed, [""] * 3)[0][0].item() == pytest.approx(expected.item(), abs=3e-5)
