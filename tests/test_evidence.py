"""Evidence of pairs: worked sums, one engine call for all, and a real model whose picture matters."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from prefalign import evidence
from prefalign.engines import ImageMask, Request
from prefalign.engines.transformers import load_engine
from prefalign.evidence import Answer, Judged, judge, request_without, unusable
from prefalign.images import encode_png
from prefalign.models import ModelConfig
from prefalign.records import Pair, assistant_message, placeholder_count, user_message
from tests.tiny_vlms import picture


def pair(name, chosen, rejected, images=(), others=()):
    return Pair(name, [encode_png(image) for image in images], [user_message("What is it?", len(images))],
                [assistant_message(chosen)], [assistant_message(rejected)], "test",
                rejected_images=[encode_png(image) for image in others])  # fmt: skip


def grey(level):
    return Image.new("RGB", (8, 8), (level, level, level))


class Sums:
    """Log-prob of a token: minus the number of its answer's words, times 1 with a bright picture and 2 without."""

    capabilities = frozenset({"logprobs", "image_mask"})
    fingerprint = "sums"

    def __init__(self):
        self.calls = []

    def logprobs(self, requests, answers):
        self.calls.append(requests)
        values = []
        for request, answer in zip(requests, answers, strict=True):
            words = len(answer.split())
            seen = request.images and request.image_mask is None and np.asarray(request.images[0]).mean() > 100
            values.append(torch.full((words + 1,), -float(words if seen else 2 * words)))
        return values


def test_worked_sums():
    """chosen "a b" (3 tokens of -2 seen, -4 unseen): -6 and -12. rejected "a b c" (4 tokens of -3, -6): -12 and -24.

    Preferred without the picture by -12 - -24 = 12, or -4 - -6 = 2 per token. Evidence: -6 - -12 = 6 seen, less w times 12:
    6, 0, -6 at w 0, 0.5, 1.
    """
    engine = Sums()
    image = grey(200)
    (judged,) = judge(engine, [(pair("p", "a b", "a b c", [image]), [image], [])], without="hidden")
    assert judged == Judged(Answer(-6, 3), Answer(-12, 4), Answer(-12, 3), Answer(-24, 4))
    assert (judged.text_preference("sum"), judged.text_preference("token")) == (12, 2)
    assert [judged.evidence_margin(weight) for weight in (0, 0.5, 1)] == [6, 0, -6]
    assert judged.complete


def test_a_pair_of_pictures_with_one_text_is_judged_by_its_pictures():
    """ "a b" on a bright picture (-6) against a dark one (3 tokens of -4): evidence 6, whatever the weight of the prior."""
    one, other = grey(200), grey(50)
    (judged,) = judge(Sums(), [(pair("p", "a b", "A b.", [one], [other]), [one], [other])])
    assert judged == Judged(Answer(-6, 3), Answer(-12, 3))
    assert judged.text_preference() is None
    assert [judged.evidence_margin(weight) for weight in (0, 1)] == [6, 6]
    (swapped,) = judge(Sums(), [(pair("p", "a b", "A b.", [other], [one]), [other], [one])])
    assert swapped.evidence_margin() == -6


def test_all_pairs_go_to_the_engine_in_one_call():
    engine = Sums()
    images = [grey(200), grey(60)]
    rows = [(pair("a", "x", "x y", images[:1]), images[:1], []),
            (pair("b", "x", "x", images[:1], images[1:]), images[:1], images[1:]),
            (pair("c", "x y", "x", images[1:]), images[1:], [])]  # fmt: skip
    together = judge(engine, rows, without="removed")
    assert [len(call) for call in engine.calls] == [10]
    assert together == [judge(engine, [row], without="removed")[0] for row in rows]
    assert judge(engine, []) == []


def test_an_answer_without_score_makes_the_pair_incomplete():
    assert not Judged(Answer(math.nan, 1), Answer(-1, 2)).complete
    assert not Judged(Answer(-1, 1), Answer(-1, 2), Answer(-1, 1), Answer(math.nan, 1)).complete


def test_requests_without_a_usable_picture():
    image = picture(0)
    request = Request("r", [user_message("What?", 1)], [image], seed=3)
    assert request_without(request, "hidden").image_mask == ImageMask(1.0, 0)
    assert request_without(request, "hidden").images == [image]
    removed = request_without(request, "removed")
    assert (removed.images, placeholder_count(removed.messages)) == ([], 0)
    assert placeholder_count(request.messages) == 1
    (blank,) = request_without(request, "blank").images
    assert blank.size == image.size
    assert len(blank.getcolors()) == 1
    noised = [request_without(request, "noise", seed=seed).images[0].tobytes() for seed in (0, 0, 1)]
    assert noised[0] == noised[1] != noised[2]
    assert noised[0] != image.tobytes()
    other = unusable([image], "noise", identity="other", seed=0)
    assert other[0].tobytes() != noised[0]
    text = Request("t", [user_message("What?")], [])
    assert request_without(text, "hidden").image_mask is None


def test_an_engine_that_cannot_do_it_is_refused():
    class Plain(Sums):
        capabilities = frozenset({"logprobs"})

    with pytest.raises(ValueError, match="scoring pairs needs image_mask .*Use the transformers engine"):
        judge(Plain(), [], without="hidden")
    assert judge(Plain(), [], without="blank") == []


@pytest.fixture(scope="module")
def engine(tiny_llava):
    return load_engine(ModelConfig(str(tiny_llava), device="cpu"), batch_size=3)


def test_swapping_the_picture_changes_the_evidence_and_never_the_prior(engine):
    """A random LLaVA: another picture moves what is said with the picture; without one (hidden, removed) it moves nothing."""
    for without in ("hidden", "removed"):
        one, other = (
            judge(engine, [(pair("p", "A cat.", "A red star.", [image]), [image], [])], without=without)[0]
            for image in (picture(0), picture(9))
        )
        assert one.complete
        assert abs(one.evidence_margin() - other.evidence_margin()) > 1e-4
        assert one.text_preference() == pytest.approx(other.text_preference(), abs=1e-5)


@pytest.mark.parametrize("without", ["blank", "noise", "hidden", "removed"])
def test_neither_batch_nor_company_changes_a_score(engine, without):
    rows = [(pair(f"p{n}", "A cat." * (n + 1), "A star.", [picture(n)]), [picture(n)], []) for n in range(4)]
    together = judge(engine, rows, without=without)
    for row, found in zip(rows, together, strict=True):
        (alone,) = judge(engine, [row], without=without)
        assert alone.evidence_margin() == pytest.approx(found.evidence_margin(), abs=1e-4)
        assert alone.text_preference() == pytest.approx(found.text_preference(), abs=1e-4)


def test_the_engine_says_which_pairs_it_cannot_score(engine):
    image = picture(0)
    good, bad = judge(engine, [(pair("a", "A cat.", "A dog.", [image]), [image], []),
                               (pair("b", "An <image> of a cat.", "A dog.", [image]), [image], [])])  # fmt: skip
    assert good.complete
    assert not bad.complete
    assert evidence.Without.__args__ == ("blank", "noise", "hidden", "removed")


def test_of_several_pictures_the_target_is_judged_alone():
    images = [picture(n) for n in range(3)]
    many = pair("p", "x", "y", images)
    many.prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look:"}, {"type": "image"},
                                                {"type": "image"}, {"type": "text", "text": "The second?"}]}]  # fmt: skip
    many.meta = {"target_index": 2}
    alone = evidence.on_target(many)
    alone.check_pictures()
    assert alone.images == [many.images[1]]
    assert [block["type"] for block in alone.prompt[0]["content"]] == ["text", "image", "text"]
    assert len(many.images) == 3
    for meta in ({}, {"target_index": 4}, {"target_index": "2"}, {"target_index": 0}):
        many.meta = meta
        assert evidence.on_target(many) is many
    twins = pair("p", "x", "x", images, images[::-1])
    twins.prompt, twins.meta = many.prompt, {"target_index": 3}
    alone = evidence.on_target(twins)
    alone.check_pictures()
    assert (alone.images, alone.rejected_images) == ([twins.images[2]], [twins.rejected_images[2]])
    assert twins.images[2] != twins.rejected_images[2]
    one = pair("p", "x", "y", images[:1])
    one.meta = {"target_index": 1}
    assert evidence.on_target(one) is one


LIKELY = {"red cat": math.log(0.9), "blue dog": math.log(0.2), "fox": math.log(0.5)}


class Replies(Sums):
    """Yes with the probability of a table, else No; a dark picture turns the two round."""

    def logprobs(self, requests, answers):
        self.calls.append(requests)
        values = []
        for request, answer in zip(requests, answers, strict=True):
            asked = request.messages[0]["content"][-1]["text"]
            yes = next(value for name, value in LIKELY.items() if name in asked)
            if np.asarray(request.images[0]).mean() < 100:
                yes = math.log(1 - math.exp(yes))
            values.append(torch.tensor([yes if answer == "Yes" else math.log(1 - math.exp(yes)), 0.0]))
        return values


def test_claims_counted_by_hand():
    """Yes has 0.9, 0.2 and 0.5, so the cat, dog and fox are refuted with 0.1, 0.8 and 0.5.

    chosen "a red cat. a fox." expects 0.6 false claims, rejected "a blue dog. a fox." 1.3. A dark picture turns them to
    0.9 + 0.5 and 0.2 + 0.5. At a threshold of log 9 the cat is refuted with 0.5, the fox with 0.9, and the dog with
    1 / (1 + 0.25 / 9) = 36 / 37.
    """
    image, dark = grey(200), grey(50)
    row, other = ((pair("p", "a red cat. a fox.", "a blue dog. a fox.", [shown]), [shown]) for shown in (image, dark))
    engine = Replies()
    found = evidence.unsupported_claims(engine, [other, row], evidence.ClaimConfig())
    assert found == [pytest.approx((1.4, 0.7), abs=1e-5), pytest.approx((0.6, 1.3), abs=1e-5)]
    assert len(engine.calls) == 1
    assert len(engine.calls[0]) == 16
    asked = engine.calls[0][0].messages[0]["content"]
    assert [block["type"] for block in asked] == ["image", "text"]
    assert asked[1]["text"] == 'Is this statement true of the picture? "A red cat." Answer with yes or no.'
    (strict,) = evidence.unsupported_claims(engine, [row], evidence.ClaimConfig(threshold=math.log(9)))
    assert strict == pytest.approx((1.4, 0.9 + 36 / 37), abs=1e-5)
    # without a refuting reply its own log-prob counts: p / (p + 1) supported at threshold 0
    (alone,) = evidence.unsupported_claims(engine, [row], evidence.ClaimConfig(refuted=""))
    assert alone == pytest.approx((1 / 1.9 + 1 / 1.5, 1 / 1.2 + 1 / 1.5), abs=1e-5)
    assert len(engine.calls[-1]) == 4
    assert evidence.unsupported_claims(engine, [], evidence.ClaimConfig()) == []


def test_claims_and_their_words():
    found = evidence.ClaimConfig(patterns=[r"(?P<what>[Aa] \w+) (?P<where>on the \w+)"], question="What is {where}?",
                                 supported="{What}.")  # fmt: skip
    assert found.of("a ring on the left, and A star on the right") == [
        {"what": "a ring", "What": "A ring", "where": "on the left", "Where": "On the left"},
        {"what": "a star", "What": "A star", "where": "on the right", "Where": "On the right"},
    ]
    assert found.of("nothing") == []
    assert len(evidence.ClaimConfig().of("One. Two! Three? ")) == 3
    with pytest.raises(ValueError, match=r"claim pattern 'a \.\*' has no named group, so no question can be made"):
        evidence.ClaimConfig(patterns=["a .*"])


def test_a_claim_without_score_leaves_its_pair_without_count(engine):
    image = picture(0)
    rows = [
        (pair("a", "A cat.", "An <image> of a cat.", [image]), [image]),
        (pair("b", "A cat.", "A dog.", [image]), [image]),
    ]
    first, second = evidence.unsupported_claims(engine, rows, evidence.ClaimConfig())
    assert first is None
    assert second is not None
