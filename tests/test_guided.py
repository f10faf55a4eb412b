"""Guided completion: what the engine is asked (it writes that down here), and how its answers are put together."""

import hashlib
import random

import pytest

from prefalign.engines import Completion, Request, Sampling
from prefalign.guided import (
    BiasConfig,
    Corrupted,
    Item,
    corrupted_answers,
    free_completions,
    guided_completions,
    rejection,
)
from prefalign.records import user_message
from prefalign.text import lexical_similarity
from tests.tiny_vlms import picture

ANSWER = "There is a red circle at the top. A blue star is at the left.  I can see 3.5 green rings."


class Scribe:
    """Answers by a fixed rule from everything a request holds, and keeps the requests of each call."""

    capabilities = frozenset({"sample", "prefix", "image_mask"})
    fingerprint = "scribe"

    def __init__(self, reply=None):
        self.calls: list[list[Request]] = []
        self.reply = reply or self.hashed

    def hashed(self, request):
        pixels = b"".join(image.tobytes() for image in request.images)
        seen = f"{request.id}|{request.seed}|{request.prefix}|{request.image_mask}".encode() + pixels
        return f" w{hashlib.sha256(seen).hexdigest()[:6]}. Not part of it."

    def generate(self, requests, sampling):
        self.calls.append(list(requests))
        return [Completion(request.id, self.reply(request)) for request in requests]


def item(answer=ANSWER, name="row", seed=0):
    return Item(name, [user_message("Describe the picture.", 1)], [picture(seed)], answer)


def guided(engine, items, bias=None, **more):
    return guided_completions(engine, items, bias or BiasConfig(), Sampling(), **{"seed": 0, **more})


def test_forced_starts_are_the_original_sentences_and_a_head():
    engine = Scribe()
    guided(engine, [item()])
    (requests,) = engine.calls
    first, second, third = (request.prefix for request in requests)
    assert "There is a red circle at the top.".startswith(first)
    assert second.startswith("There is a red circle at the top. A")
    assert ANSWER.startswith(second)
    assert third.startswith("There is a red circle at the top. A blue star is at the left.  I")
    assert ANSWER.startswith(third)
    assert all(request.prefix == request.prefix.rstrip() for request in requests)
    assert all(request.stop_at_sentence for request in requests)


def test_all_sentences_of_all_rows_in_one_call():
    engine = Scribe()
    guided(engine, [item(name="a"), item("One.", "b"), item(name="c")])
    assert [len(call) for call in engine.calls] == [7]
    assert len({request.id for request in engine.calls[0]}) == 7


def test_sentences_keep_their_heads_blanks_and_endings():
    (result,) = guided(
        Scribe(lambda request: " new words! And more"), [item("  Is it a cat?  It is  a dog.\n- one two")]
    )
    is_it, it_is, dash = result.split_points
    expected = (
        f"  {'Is it a cat?'[:is_it]} new words?  {'It is  a dog.'[:it_is]} new words.\n{'- one two'[:dash]} new words"
    )
    assert result.text.split() == expected.split()
    assert result.text.startswith("  Is")
    assert "\n-" in result.text
    assert not result.empty


def test_double_blank_at_the_cut_is_kept_as_in_the_original():
    texts = {guided(Scribe(lambda request: " x"), [item("a  b.", f"row{n}")])[0].text for n in range(3)}
    assert texts == {"a  x."}


def test_decimals_in_a_completion_do_not_end_it():
    (result,) = guided(Scribe(lambda request: " 2.5 cm of it. Stop"), [item("It is long.")])
    assert result.text.endswith(" 2.5 cm of it.")


def test_numbered_lists_keep_their_numbers():
    results = [
        guided(Scribe(lambda request: " egg. 7. x"), [item("1. A ball.\n2. A cat.", str(n))])[0].text for n in range(20)
    ]
    assert set(results) == {f"1.{one} egg.\n2.{two} egg." for one in ("", " A") for two in ("", " A")}


def test_one_word_answer_is_drawn_afresh():
    engine = Scribe(lambda request: "Blue. It is")
    (result,) = guided(engine, [item("Red.")])
    assert engine.calls[0][0].prefix == ""
    assert result.text == "Blue."
    assert result.split_points == [0]


def test_yes_no_is_turned_around_half_of_the_time():
    engine = Scribe(lambda request: " so")
    results = guided(engine, [item("Yes, there is a cat.", str(number)) for number in range(200)])
    swapped = [result for result in results if result.yesno_swapped == [0]]
    assert 75 <= len(swapped) <= 125
    assert all(result.text.startswith("No,") for result in swapped)
    assert all(result.text.startswith("Yes,") for result in results if not result.yesno_swapped)


def test_bare_yes_is_turned_around_without_the_model_or_drawn_afresh():
    engine = Scribe(lambda request: "Maybe.")
    results = guided(engine, [item("yes.", str(number)) for number in range(40)])
    assert {result.text for result in results} == {"no.", "Maybe."}
    assert len(engine.calls[0]) == sum(result.text == "Maybe." for result in results)


def test_rows_do_not_depend_on_their_company():
    items = [item(name=str(number), seed=number) for number in range(4)]
    together = guided(Scribe(), items, iteration=2)
    alone = [guided(Scribe(), [one], iteration=2)[0] for one in items]
    backwards = guided(Scribe(), items[::-1], iteration=2)[::-1]
    assert together == alone == backwards


def test_picture_seed_and_round_change_the_answer():
    (base,) = guided(Scribe(), [item()])
    assert guided(Scribe(), [item()])[0] == base
    for other in (
        guided(Scribe(), [item(seed=1)]),
        guided(Scribe(), [item()], seed=1),
        guided(Scribe(), [item()], iteration=2),
        guided(Scribe(), [item(name="other")]),
    ):
        assert other[0].text != base.text


def test_one_mask_for_all_sentences_of_a_round():
    engine = Scribe()
    first, second = (guided(engine, [item()], BiasConfig(rho_th=0.7), iteration=n)[0] for n in (1, 2))
    masks = [{request.image_mask for request in call} for call in engine.calls]
    assert [len(found) for found in masks] == [1, 1]
    assert masks[0] != masks[1]
    assert masks[0].pop().share == 0.7
    assert first.picture_seed != second.picture_seed


def test_noise_variant_shows_a_noised_picture_of_the_same_size_and_no_mask():
    engine = Scribe()
    guided(engine, [item()], BiasConfig(variant="noise"))
    for request in engine.calls[0]:
        assert request.image_mask is None
        assert request.images[0].size == picture(0).size
        assert request.images[0].tobytes() != picture(0).tobytes()
    assert len({request.images[0].tobytes() for request in engine.calls[0]}) == 1


def run(engine, items, **bias):
    return corrupted_answers(engine, items, BiasConfig(**bias), Sampling(), lexical_similarity, seed=0)


def parrot(request):
    """Says what the reference says."""
    return ANSWER[len(request.prefix) :] if request.prefix else ANSWER


def test_last_round_is_unguided_and_taken_as_it_comes():
    engine = Scribe(parrot)
    (result,) = run(engine, [item()], iterations=3)
    assert [len(call) for call in engine.calls] == [3, 3, 1]
    assert engine.calls[2][0].prefix == ""
    assert not engine.calls[2][0].stop_at_sentence
    assert engine.calls[2][0].image_mask is not None
    assert (result.guided, result.iteration, result.split_points) == (False, 3, [])
    assert result.similarity == 1
    assert rejection(item(), result) == "identical_answers"


def test_single_round_and_guided_last_round():
    for bias in ({"iterations": 1}, {"iterations": 2, "unguided_last": False}):
        engine = Scribe(parrot)
        (result,) = run(engine, [item()], **bias)
        assert result.guided
        assert [len(call) for call in engine.calls] == [3] * bias["iterations"]


def test_without_guidance_every_round_is_free():
    engine = Scribe(parrot)
    run(engine, [item()], guided=False, iterations=2)
    assert [[request.prefix for request in call] for call in engine.calls] == [[""], [""]]
    assert engine.calls[0][0].id != engine.calls[1][0].id


def test_accepted_rows_are_not_asked_again():
    def reply(request):
        return " else entirely" if request.id.startswith("easy") or "/3/" in request.id else parrot(request)

    engine = Scribe(reply)
    easy, hard = run(engine, [item(name="easy"), item(name="hard")])
    assert [sorted({request.id.split("/")[0] for request in call}) for call in engine.calls] == [
        ["easy", "hard"],
        ["hard"],
        ["hard"],
    ]
    assert (easy.iteration, hard.iteration) == (1, 3)
    assert max(easy.similarity, hard.similarity) < 0.97


def test_empty_completion_counts_as_similar():
    engine = Scribe(lambda request: "" if request.id.endswith("/1/2") else " else")
    (result,) = run(engine, [item()])
    assert (result.iteration, result.empty) == (2, False)
    (silent,) = run(Scribe(lambda request: ""), [item()])
    assert (silent.iteration, silent.text) == (5, "")
    assert rejection(item(), silent) == "empty_rejected"


def answering(complete):
    """An engine whose `complete(request)` gives text and finish reason."""
    engine = Scribe()
    engine.generate = lambda requests, sampling: [
        Completion(request.id, text, finish_reason=reason)
        for request, (text, reason) in ((request, complete(request)) for request in requests)
    ]
    return engine


def test_sentence_to_which_nothing_was_added_is_no_rejected_answer():
    """Without a free last round the last guided one comes back although a sentence of it is empty."""
    engine = Scribe(lambda request: "" if request.id.endswith("/2") else " else")
    (result,) = run(engine, [item()], unguided_last=False, iterations=2)
    assert (result.empty, result.guided, result.iteration) == (True, True, 2)
    assert result.text.strip()
    assert rejection(item(), result) == "empty_completion"


def test_free_answer_cut_off_by_its_limit_is_drawn_again_and_never_kept():
    engine = answering(lambda request: (" else and", "length" if request.id.endswith("/1") else "stop"))
    (result,) = run(engine, [item()], guided=False)
    assert (result.iteration, result.finish_reason, rejection(item(), result)) == (2, "stop", None)
    (result,) = run(answering(lambda request: (" else and", "length")), [item()], iterations=2, guided=False)
    assert (result.iteration, result.finish_reason, rejection(item(), result)) == (2, "length", "cut_off")


def test_guided_sentence_at_its_limit_gets_the_original_s_ending():
    (result,) = guided(answering(lambda request: (" else and", "length")), [item("A cat sits.")])
    assert result.text.endswith("else and.")
    assert (result.finish_reason, rejection(item("A cat sits."), result)) == ("stop", None)


def test_failed_generation_is_told():
    class Broken(Scribe):
        def generate(self, requests, sampling):
            self.calls.append(requests)
            return [Completion(request.id, "", finish_reason="error", error="too long") for request in requests]

    engine = Broken()
    (result,) = run(engine, [item()])
    assert len(engine.calls) == 1
    assert result.error == "too long"
    assert rejection(item(), result) == "generation_failed"


def test_rejection_of_near_copies():
    assert rejection(item("A cat."), Corrupted("a  cat", True, 1)) == "identical_answers"
    assert rejection(item("A cat."), Corrupted("A dog.", True, 1)) is None


def test_engine_without_a_mask_is_refused_but_may_do_noise():
    class Served(Scribe):
        capabilities = frozenset({"sample", "prefix"})

    with pytest.raises(ValueError, match=r"BDHS needs image_mask .*Served cannot do"):
        run(Served(), [item()])
    assert run(Served(), [item()], variant="noise")[0].text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho_th": 99}, r"rho_th 99 is a share of image tokens to hide"),
        ({"threshold": 0}, r"threshold 0 is the cosine similarity below which"),
        ({"iterations": 0}, r"iterations 0: at least 1 round"),
        ({"variant": "noise", "noise_step": 5000}, r"noise step 5000 is outside the schedule"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        BiasConfig(**settings)


def test_free_completions_of_no_rows():
    assert free_completions(Scribe(), [], BiasConfig(), Sampling(), seed=0) == []
    assert corrupted_answers(Scribe(), [], BiasConfig(), Sampling(), lexical_similarity, seed=0) == []


def test_random_answers_always_come_back_whole():
    rng = random.Random(0)
    words = ["yes", "No", "a", "3.5", "Dr.", "cat.", "dog!", "1.", "end?", "\n", "e.g.", "Hm..."]
    items = [item(" ".join(rng.choices(words, k=rng.randint(1, 9))).strip() or "a", str(n)) for n in range(60)]
    for one, result in zip(items, guided(Scribe(lambda request: " z"), items), strict=True):
        assert result.text.strip()
        assert result.text.count("\n") == one.answer.count("\n")
