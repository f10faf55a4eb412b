"""vLLM in this process against the transformers engine: equal under greedy decoding, close where numbers come out."""

import sys
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from engine_cases import GREEDY, some_requests
from scipy.stats import chi2_contingency
from tiny_vlms import picture

from prefalign import families
from prefalign.engines import Contrast, ImageMask, Request, Sampling
from prefalign.engines.vllm import VllmEngine
from prefalign.models import fingerprint
from prefalign.processors import engine_fingerprint
from prefalign.records import user_message
from prefalign.scenes.world import draw, scene

pytestmark = pytest.mark.parametrize(
    "started", ["llava", "qwen2_5_vl", "scenes+adapter"], indirect=True, scope="module"
)


@pytest.fixture
def fast(started) -> VllmEngine:
    return started[0]


@pytest.fixture
def slow(started):
    return started[1]


def scene_requests(count, **more):
    return [
        Request(f"scene-{number}", [user_message("Describe the picture.", 1)], [draw(scene("train_biased", number))], **more)
        for number in range(count)
    ]  # fmt: skip


def without_adapter(engine) -> VllmEngine:
    return VllmEngine(engine.llm, engine.processor, engine.config, ends=engine.ends)


def close(one, other):
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))


def test_greedy_answers_are_equal_with_one_and_two_pictures(fast, slow):
    requests = some_requests(8)
    assert {len(request.images) for request in requests} == {1, 2}
    assert fast.generate(requests, GREEDY) == slow.generate(requests, GREEDY)


def test_a_repetition_penalty_is_that_of_transformers(fast, slow):
    requests = some_requests(3)
    answers = fast.generate(requests, Sampling(max_new_tokens=10, temperature=0, repetition_penalty=1.3))
    expected = []
    for request in requests:
        text = families.render(slow.processor, request.messages)
        inputs = slow.processor(text=[text], images=[request.images], add_special_tokens=False, return_tensors="pt")
        ids = slow.model.generate(**inputs, do_sample=False, repetition_penalty=1.3, suppress_tokens=slow.banned,
                                  max_new_tokens=10)  # fmt: skip
        expected.append([token for token in ids[0, inputs["input_ids"].shape[1] :].tolist() if token not in slow.ends])
    assert [answer.token_ids for answer in answers] == expected
    assert answers != fast.generate(requests, GREEDY)


def test_swapped_and_blank_pictures_change_the_answer(fast, slow):
    first, second = picture(1), picture(2)
    blank = picture(1).point(lambda value: 0)
    asked = [
        Request(str(number), [user_message("What is in the image?", 2)], images)
        for number, images in enumerate([[first, second], [second, first], [first, blank]])
    ]
    answers = fast.generate(asked, GREEDY)
    assert answers == slow.generate(asked, GREEDY)
    if fast.adapter is None:
        assert len({tuple(answer.token_ids) for answer in answers}) == 3
        scores = fast.logprobs(asked, ["Yes, there is a dog."] * 3)
        assert (scores[0] - scores[1]).abs().max() > 0.01
        assert (scores[0] - scores[2]).abs().max() > 0.01
    else:
        said = [one.probs["Yes"] for one in fast.first_token(asked, ["Yes"])]
        assert len({f"{value:.3g}" for value in said}) == 3


def test_prefixes_and_given_tokens_are_part_of_the_prompt(fast, slow):
    given = fast.tokenizer(" Yes. And now?", add_special_tokens=False).input_ids
    requests = some_requests(4, prefix="There is") + some_requests(4, given=given)
    answers = fast.generate(requests, GREEDY)
    assert answers == slow.generate(requests, GREEDY)
    plain = fast.generate(some_requests(4), GREEDY)
    assert answers[:4] != plain
    assert answers[4:] != plain


def test_answers_end_where_they_end(fast, slow):
    long = Sampling(max_new_tokens=60, temperature=0)
    whole, sentences = scene_requests(6), scene_requests(6, stop_at_sentence=True)
    answers, cut = fast.generate(whole, long), fast.generate(sentences, long)
    assert answers == slow.generate(whole, long)
    assert cut == slow.generate(sentences, long)
    if fast.adapter is not None:
        base = without_adapter(fast)
        assert {one.finish_reason for one in base.generate(whole, long)} == {"stop"}
        ended = base.generate(sentences, long)
        assert {one.finish_reason for one in ended} == {"sentence"}
        assert all(one.text.endswith(".") and one.text.count(".") == 1 for one in ended)


def test_a_draw_is_decided_by_seed_and_id(fast):
    (one,) = some_requests(1)
    ids = [(name, seed) for name in ("a", "b") for seed in (1, 2)]
    asked = [Request(name, one.messages, one.images, seed=seed) for name, seed in ids]
    sampling = Sampling(max_new_tokens=12, temperature=1.5)
    drawn = fast.generate(asked, sampling)
    assert fast.generate(asked, sampling) == drawn
    assert len({tuple(answer.token_ids) for answer in drawn}) == 4


def test_draws_are_spread_as_those_of_the_transformers_engine(fast, slow):
    one = some_requests(1)[0]
    draws = [Request(f"draw-{number}", one.messages, one.images, seed=5) for number in range(400)]
    sampling = Sampling(max_new_tokens=1, temperature=0.7, top_k=8)
    counts = []
    for engine in (fast, slow):
        answers = engine.generate(draws, sampling)
        counts.append(Counter(answer.token_ids[0] if answer.token_ids else answer.end_token for answer in answers))
    assert len(counts[0] + counts[1]) <= 8
    common = [token for token, count in (counts[0] + counts[1]).items() if count >= 20]
    if len(common) > 1:
        assert chi2_contingency([[count[token] for token in common] for count in counts]).pvalue > 0.001


def test_logprobs_are_those_of_the_transformers_engine(fast, slow):
    requests = some_requests(6)
    if fast.adapter is not None:
        assert "logprobs" not in fast.capabilities
        with pytest.raises(ValueError, match="does not score given answers through a LoRA adapter. Merge it"):
            fast.logprobs(requests[:1], ["No."])
        return
    texts = ["Yes, there is a dog.", "No."] * 3
    assert close(fast.logprobs(requests, texts), slow.logprobs(requests, texts))
    answers = slow.generate(requests, GREEDY)
    answers[0].finish_reason = "stop"  # its end of turn is scored then
    scores = fast.logprobs(requests, answers)
    assert close(scores, slow.logprobs(requests, answers))
    assert [len(values) for values in scores] == [11, *[len(answer.token_ids) for answer in answers[1:]]]
    prefixed = some_requests(6, prefix="There is")
    assert close(fast.logprobs(prefixed, texts), slow.logprobs(prefixed, texts))


def test_first_words_have_the_probabilities_of_the_transformers_engine(fast, slow):
    requests = some_requests(4)
    for mine, theirs in zip(*(engine.first_token(requests, ["Yes", "No"]) for engine in (fast, slow)), strict=True):
        assert mine.probs == pytest.approx(theirs.probs, rel=1e-3)
    with pytest.raises(ValueError, match="goes on in the middle of a conversation"):
        fast.first_token(some_requests(1, given=[5]), ["Yes"])


def test_what_cannot_be_answered_fails_alone_with_the_same_words(fast, slow):
    good = some_requests(2)
    bad = [
        Request("many", [user_message("Q", 2)], [picture(0)]),
        Request("mark", [user_message(f"Is {fast.visual_tokens[0]} here?", 1)], [picture(0)]),
        Request("long", [user_message("dog " * 3000, 1)], [picture(0)]),
    ]
    answers = fast.generate([good[0], *bad, good[1]], GREEDY)
    assert [answers[0], answers[4]] == slow.generate(good, GREEDY)
    expected = [answer.error for answer in slow.generate(bad, GREEDY)]
    assert [answer.error for answer in answers[1:3]] == expected[:2]
    assert answers[3].finish_reason == "error"
    assert [one.error for one in fast.first_token(bad, ["Yes"])] == [answer.error for answer in answers[1:4]]
    assert "request long: the prompt" in answers[3].error
    assert f"the model has {fast.context} positions. Use fewer or smaller pictures, or less text." in answers[3].error
    many = Request("large", [user_message("Q", 500)], [picture(0)] * 500)
    assert "request large: the prompt has" in fast.generate([many], GREEDY)[0].error
    if fast.adapter is None:
        assert all(torch.isnan(values).all() for values in fast.logprobs(bad, ["Yes."] * 3))


def test_what_vllm_cannot_do_is_refused(fast):
    for name, value in (("contrast", Contrast()), ("attention_layer", 0)):
        with pytest.raises(
            ValueError, match=f"sampling.{name} was asked for, and vLLM .* Set `engine` to transformers"
        ):
            fast.generate(some_requests(1), Sampling(**{name: value}))
    masked = some_requests(1, image_mask=ImageMask(0.5, 0))
    for ask in (lambda: fast.generate(masked, GREEDY), lambda: fast.first_token(masked, ["Yes"])):
        with pytest.raises(ValueError, match="image_mask was asked for, and vLLM"):
            ask()
    with pytest.raises(ValueError, match="attention was asked for, and vLLM"):
        fast.attention(some_requests(1), ["Yes."])
    with pytest.raises(ValueError, match="temperature must be 0"):
        fast.generate(some_requests(1), Sampling(temperature=-1))


def test_it_has_the_fingerprint_that_the_transformers_engine_has(fast, slow):
    assert fast.fingerprint == slow.fingerprint == engine_fingerprint(fingerprint(slow.model), slow.processor)


def test_an_adapter_counts(fast, slow):
    if fast.adapter is None:
        pytest.skip("this one has no adapter")
    requests = scene_requests(4)
    base = without_adapter(fast)
    adapted, plain = fast.generate(requests, GREEDY), base.generate(requests, GREEDY)
    assert adapted != plain
    with slow.model.disable_adapter():
        assert plain == slow.generate(requests, GREEDY)


def test_prompts_begin_with_what_the_tokenizer_adds(fast, slow):
    request = some_requests(1)[0]
    row = fast._row(0, request, "", score=False)
    (encoded,) = slow.encode([request]).tensors["input_ids"].tolist()
    outputs = list(fast._run([row], {}, lambda row: fast._sampling(request, GREEDY)))
    assert outputs[0][1] == encoded
    assert families.render(fast.processor, request.messages) == row.prompt


def test_no_trl_is_here(fast):
    assert find_spec("trl") is None
    assert "trl" not in sys.modules
