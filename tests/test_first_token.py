"""Probabilities of an answer's first word: against a forward pass made by hand, log-probs of answers, and other batches."""

import pytest
import torch
from engine_cases import some_requests
from test_engine_scores import mllama_engine
from tiny_vlms import picture, save_tiny

from prefalign import families
from prefalign.engines import USAGE, ImageMask, Request
from prefalign.engines.transformers import TransformersEngine, load_engine
from prefalign.models import ModelConfig
from prefalign.records import user_message

WORDS = ("Yes", "No", "There", "A")


@pytest.fixture(scope="module", params=["llava", "idefics3", "gemma3", "paligemma"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder = save_tiny(request.param, tmp_path_factory.mktemp("first") / request.param)
    return load_engine(ModelConfig(str(folder), device="cpu"), batch_size=8)


@pytest.fixture(scope="module")
def scenes() -> TransformersEngine:
    return load_engine(ModelConfig("scenes", device="cpu"), batch_size=8)


def test_it_equals_a_forward_pass_made_by_hand(engine: TransformersEngine) -> None:
    for request, found in zip(some_requests(4), engine.first_token(some_requests(4), WORDS), strict=True):
        text = families.render(engine.processor, request.messages)
        inputs = engine.processor(text=[text], images=[request.images], add_special_tokens=False, return_tensors="pt")
        inputs.pop("labels", None)
        with torch.no_grad():
            probs = engine.model(**inputs).logits[0, -1].softmax(-1)
        for word in WORDS:
            _, answer = families.render_answer(engine.processor, request.messages, word)
            token = engine.tokenizer(answer, add_special_tokens=False).input_ids[0]
            assert found.probs[word] == pytest.approx(float(probs[token]), rel=1e-4)
    assert list(found.probs) == list(WORDS)
    assert 0 < sum(found.probs.values()) < 1


def test_it_agrees_with_log_probs_of_whole_answers(engine: TransformersEngine) -> None:
    requests = some_requests(4)
    found = engine.first_token(requests, WORDS)
    for word in WORDS:
        scored = engine.logprobs(requests, [word] * 4)
        assert [row.probs[word] for row in found] == pytest.approx([float(one[0].exp()) for one in scored], rel=1e-4)


def test_a_ragged_batch_equals_one_by_one_and_order_does_not_count(engine: TransformersEngine) -> None:
    requests = some_requests(6)
    together = engine.first_token(requests, WORDS)
    for request, found in zip(requests, together, strict=True):
        assert engine.first_token([request], WORDS)[0].probs == pytest.approx(found.probs, rel=1e-4)
    turned = engine.first_token(requests[::-1], WORDS[::-1])[::-1]
    for one, other in zip(turned, together, strict=True):
        assert one.probs == pytest.approx(other.probs, rel=1e-4)


def test_another_picture_gives_other_numbers(engine: TransformersEngine) -> None:
    (request,) = some_requests(1)
    swapped = Request(request.id, request.messages, [picture(77, (40, 48))], seed=request.seed)
    (one,), (other,) = engine.first_token([request], WORDS), engine.first_token([swapped], WORDS)
    assert max(abs(one.probs[word] / other.probs[word] - 1) for word in WORDS) > 1e-3


def test_a_hidden_picture_gives_what_any_picture_gives(scenes: TransformersEngine) -> None:
    def asked(number: int, share: float) -> Request:
        text = "Is there a circle in the picture? Answer with one word."
        return Request("a", [user_message(text, 1)], [picture(number, (60, 60))], image_mask=ImageMask(share, 0))

    seen = [scenes.first_token([asked(number, 0.0)], ["Yes", "No"])[0].probs for number in (1, 2)]
    blind = [scenes.first_token([asked(number, 1.0)], ["Yes", "No"])[0].probs for number in (1, 2)]
    assert blind[0] == pytest.approx(blind[1], abs=1e-6)
    assert abs(seen[0]["Yes"] - seen[1]["Yes"]) > 1e-3
    assert seen[0]["Yes"] + seen[0]["No"] > 0.9


def test_a_forced_start_counts_as_prompt(scenes: TransformersEngine) -> None:
    """After "There is a" come sizes, not yes or no; the blank before a word is the template's."""
    request = Request("a", [user_message("Describe the picture.", 1)], [picture(1, (60, 60))], prefix="There is a")
    (found,) = scenes.first_token([request], [" small", " large", " Yes"])
    probs = found.probs
    assert probs[" small"] + probs[" large"] > 0.8 > 0.01 > probs[" Yes"]


def test_a_request_that_fails_is_alone_in_that(scenes: TransformersEngine) -> None:
    good, bad = some_requests(2)
    bad = Request("bad", bad.messages, [])
    before = USAGE.requests
    first, second, third = scenes.first_token([good, bad, good], ["Yes", "No"])
    assert (second.probs, second.error) == ({}, str(scenes.problem(bad)))
    assert first == third
    assert first.error is None
    assert USAGE.requests == before + 2
    assert scenes.first_token([], ["Yes"]) == []


def test_words_that_the_first_token_cannot_tell_apart_are_refused(scenes: TransformersEngine) -> None:
    (request,) = some_requests(1)
    with pytest.raises(ValueError, match="'Yes' and 'Yes, there is' begin with the same token .' Yes'.*count it twice"):
        scenes.first_token([request], ["Yes", "No", "Yes, there is"])
    with pytest.raises(ValueError, match="give at least one that an answer can begin with"):
        scenes.first_token([request], [])
    with pytest.raises(ValueError, match="none of them empty"):
        scenes.first_token([request], ["Yes", " "])
    given = Request("a", request.messages, request.images, given=[5])
    with pytest.raises(ValueError, match="in the middle of a conversation.*into its messages"):
        scenes.first_token([given], ["Yes"])


def test_a_mask_is_refused_where_it_would_hide_nothing() -> None:
    engine = mllama_engine()
    assert "first_token" in engine.capabilities
    (request,) = some_requests(1, image_mask=ImageMask(0.5, 0))
    assert "a mask would hide nothing" in str(engine.first_token([request], ["Yes"])[0].error)


def test_an_unknown_word_is_refused() -> None:
    engine = load_engine(ModelConfig("scenes", device="cpu"))
    (request,) = some_requests(1)
    _, answer = families.render_answer(engine.processor, request.messages, "Yes")
    token = engine.tokenizer(answer, add_special_tokens=False).input_ids[0]
    engine.tokenizer.unk_token = engine.tokenizer.convert_ids_to_tokens(token)
    with pytest.raises(
        ValueError, match="'Yes' begins with a token that is unknown to this model.*Give another spelling"
    ):
        engine.first_token([request], ["No", "Yes"])
