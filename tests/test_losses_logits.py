"""Terms that read full logits: values worked by hand, which logits get a gradient and of which sign, padding full of nonsense."""

import math

import pytest
import torch

from prefalign.losses import Scores, read_losses
from prefalign.losses.vocabulary import token_kl, token_logits, token_logps
from tests.view_scores import VOCABULARY, at_random, gradients

LN2, LN3 = math.log(2), math.log(3)
ROWS = {"chosen": [3, 5, 1], "rejected": [4, 2, 6]}


def term(name, **more):
    return read_losses([{"name": name, **more}], beta=0.1)[0]


def one_token(token, logits, ref_logits, *, logps=None, ref_logps=None):
    """One row of one token, with the log-probs that belong to its logits or others."""
    given, ref_given = torch.tensor([[logits]]), torch.tensor([[ref_logits]])
    return Scores(
        logps=given.log_softmax(2)[:, :, token] if logps is None else torch.tensor([[logps]]),
        mask=torch.ones(1, 1, dtype=torch.bool),
        ids=torch.tensor([[token]]),
        ref_logps=ref_given.log_softmax(2)[:, :, token] if ref_logps is None else torch.tensor([[ref_logps]]),
        logits=given.requires_grad_(),
        ref_logits=ref_given,
    )


def test_povid_by_hand():
    scores = {
        # probabilities 1/4 1/4 1/2 under the policy, 1/2 1/8 3/8 under the reference: d_w = ln(1/4) - ln(1/2) = -ln 2
        "chosen": one_token(0, [0.0, 0.0, LN2], [2 * LN2, 0.0, LN3]),
        # the noisy picture suggests token 2 to the policy and token 1 to the reference: d = ln(1/2) - ln(1/8) = 2 ln 2
        "chosen_on_rejected_image": one_token(0, [0.0, 1.0, 5.0], [0.0, 3.0, 1.0]),
    }
    losses, metrics = term("povid_noise").term.loss(scores)
    assert metrics["margins"].tolist() == pytest.approx([-0.3 * LN2], abs=1e-6)
    assert losses.tolist() == pytest.approx([0.8025146], abs=1e-6)  # S(-0.3 ln 2) = ln(1 + 2 ** 0.3)
    assert metrics["disagreement"].tolist() == [1.0]


def test_povid_compares_nothing_where_the_noise_changes_nothing():
    clean = one_token(0, [0.3, -1.0, 0.2], [0.1, 0.0, 0.0])
    noisy = one_token(0, [2.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    clean.logps = clean.logits.log_softmax(2)[:, :, 0]
    losses, metrics = term("povid_noise").term.loss({"chosen": clean, "chosen_on_rejected_image": noisy})
    (gradient,) = torch.autograd.grad(losses.sum(), [clean.logits])
    assert losses.tolist() == pytest.approx([LN2], abs=1e-6)
    assert gradient.abs().max() < 1e-8
    assert metrics["disagreement"].tolist() == [0.0]


def test_povid_pushes_down_what_the_noise_suggests():
    entry = term("povid_noise")
    scores = at_random(entry, ROWS, seed=5)
    found = gradients(entry, scores)
    assert found["chosen_on_rejected_image", "logits"] is None
    assert found["chosen_on_rejected_image", "logps"] is None
    suggested = scores["chosen_on_rejected_image"].logits.argmax(dim=2)
    mask = scores["chosen"].mask
    at_suggested = found["chosen", "logits"].gather(2, suggested[..., None]).squeeze(2)
    assert (at_suggested[mask] > 0).all()
    assert not found["chosen", "logits"][~mask].any()


def chip_row():
    return {
        # 3/4 under the policy, 1/2 under the reference: d ln 1.5, KL 0.5 ln(4/3) = 0.1438410
        "chosen": one_token(0, [LN3, 0.0], [0.0, 0.0]),
        # 1/2 and 1/4: d ln 2, KL 0.75 ln 1.5 - 0.25 ln 2 = 0.1308120
        "rejected": one_token(1, [0.0, 0.0], [LN3, 0.0]),
        "chosen_on_rejected_image": one_token(0, [0.0, 0.0], [0.0, 0.0], logps=-2.0, ref_logps=-1.0),
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        # the one token of each side is changed and counts 4 times
        ({}, 4 * (math.log(1.5) - LN2) + 4 * (math.log(1.5) + 1) - 0.1 * (0.1308120 - 0.1438410)),
        ({"gamma": 2, "kl": 0.5}, 2 * (math.log(1.5) - LN2) + 2 * (math.log(1.5) + 1) - 0.5 * (0.1308120 - 0.1438410)),
        ({"image": False, "kl": 0}, 4 * (math.log(1.5) - LN2)),
    ],
)
def test_chip_by_hand(more, expected):
    losses, metrics = term("chip", **more).term.loss(chip_row())
    assert metrics["margins"].tolist() == pytest.approx([0.1 * expected], abs=1e-6)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.1 * expected))], abs=1e-6)


def test_chip_holds_the_rejected_answer_at_the_reference():
    entry = term("chip")
    scores = at_random(entry, ROWS, seed=6)
    found = gradients(entry, scores)
    assert found["chosen", "logits"] is None
    rejected = scores["rejected"]
    (of_kl,) = torch.autograd.grad(
        token_kl(rejected.ref_logits, rejected.logits, rejected.mask).sum(), [rejected.logits]
    )
    per_row = (found["rejected", "logits"] * of_kl).sum(dim=(1, 2)) / (of_kl**2).sum(dim=(1, 2))
    assert (per_row > 0).all()  # descent lowers the divergence, and does nothing else to these logits
    torch.testing.assert_close(found["rejected", "logits"], per_row[:, None, None] * of_kl)


def tpo_row():
    return {
        # raw differences ln 3 and 0: weights 0.75 + 0.5 = 1.25 and 1
        "chosen": one_token(0, [2 + LN3, 0.0], [1.0, 0.0], logps=-1.0, ref_logps=-2.0),
        "chosen_on_rejected_image": one_token(0, [2.0, 5.0], [1.0, 7.0]),
        # ln 3 and -ln 3: weights 1.5 - 0.75 = 0.75 and 1.5 - 0.25 = 1.25
        "rejected": one_token(1, [0.0, LN3], [0.0, 0.0], logps=-3.0, ref_logps=-1.0),
        "rejected_on_rejected_image": one_token(1, [9.0, 0.0], [9.0, LN3]),
    }


@pytest.mark.parametrize("detach", [True, False])
def test_tpo_by_hand(detach):
    losses, metrics = term("tpo", detach=detach).term.loss(tpo_row())
    margin = 0.1 * ((1 + math.log(1.25)) - (-2 + math.log(0.75 / 1.25)))
    assert metrics["margins"].tolist() == pytest.approx([margin], abs=1e-6)
    assert losses.tolist() == pytest.approx([0.5237766], abs=1e-6)  # S(0.3733969)
    assert metrics["reliance/chosen"].tolist() == pytest.approx([LN3])


def test_tpo_weights_have_a_gradient_only_where_asked():
    scores = at_random(term("tpo"), ROWS, seed=7)
    detached = gradients(term("tpo"), scores)
    assert all(gradient is None for (_, part), gradient in detached.items() if part == "logits")
    flowing = gradients(term("tpo", detach=False), scores)
    # a larger difference of the pictures counts for the chosen answer and against the rejected one: both lower the loss
    signs = {"chosen": -1.0, "chosen_on_rejected_image": 1.0, "rejected": -1.0, "rejected_on_rejected_image": 1.0}
    for view, sign in signs.items():
        side = scores[view]
        gradient = flowing[view, "logits"]
        at_label = gradient.gather(2, side.ids[..., None]).squeeze(2)
        assert set(at_label[side.mask].sign().tolist()) == {sign}
        assert torch.equal(gradient, torch.zeros_like(gradient).scatter(2, side.ids[..., None], at_label[..., None]))
        assert not gradient[~side.mask].any()


def test_vocabulary_functions_against_plain_softmax():
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = (torch.randn(3, 4, VOCABULARY, generator=generator) for _ in range(2))
    tokens = torch.randint(VOCABULARY, (3, 4), generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 1, 2])[:, None]
    policy, reference = logits.softmax(2), ref_logits.softmax(2)
    expected = {
        token_logits: logits.gather(2, tokens[..., None]).squeeze(2),
        token_logps: policy.log().gather(2, tokens[..., None]).squeeze(2),
    }
    for function, values in expected.items():
        torch.testing.assert_close(function(logits, tokens, mask), values * mask)
        half = function(logits.bfloat16(), tokens, mask)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, values * mask, atol=0.05, rtol=0.05)
    torch.testing.assert_close(
        token_kl(ref_logits, logits, mask), (reference * (reference / policy).log()).sum(2) * mask
    )
    assert token_kl(ref_logits, ref_logits, mask).abs().max() < 1e-6
