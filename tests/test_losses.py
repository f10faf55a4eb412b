"""Preference terms: values worked by hand, values at the start, signs of gradients, symmetry, padding, state."""

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from prefalign.losses import TERMS, read_losses
from prefalign.losses.changed import changed_spans, changed_tokens
from tests.view_scores import at_random, by_hand, gradients, padded, pick

LN2 = math.log(2)
OWN = [name for name in TERMS if name != "text"]
ROWS = {"chosen": [3, 5, 1], "rejected": [4, 2, 6]}


def term(name, **more):
    return read_losses([{"name": name, **more}], beta=0.1)[0]


def pair():
    """One row: d_w 1, d_l -2; on the other picture -1 and 3, which is the rejected answer's own; without one -0.5 and 0.5."""
    return {
        "chosen": by_hand([-1.0, -2.0], [-1.5, -2.5]),
        "rejected": by_hand([-3.0], [-1.0]),
        "rejected_on_own_image": by_hand([-1.5], [-4.5]),
        "chosen_on_rejected_image": by_hand([-2.0, -2.0], [-1.5, -1.5]),
        "rejected_on_rejected_image": by_hand([-1.5], [-4.5]),
        "chosen_without_image": by_hand([-2.0, -3.0], [-2.25, -2.25]),
        "rejected_without_image": by_hand([-2.0], [-2.5]),
    }


# S(z) = ln(1 + exp(-z))
BY_HAND = [
    # S(0.1 * (1 + 1)) = S(0.2)
    ("visual", {}, 0.5981389),
    # S(0.1 * (1 - 3)) = S(-0.2)
    ("two_pictures", {}, 0.7981389),
    # S(0.5 * -2) = S(-1)
    ("two_pictures", {"beta": 0.5}, 1.3132617),
    # r_w = 0.1: S(0.1)
    ("anchor", {}, 0.6443967),
    # S(0.1 - 0.3), then + S(-(-0.2)) of the rejected, + S(-(-0.1)) of the other picture
    ("anchor", {"delta": 0.3}, 0.7981389),
    (
        "anchor",
        {"delta": 0.3, "below_zero": ["rejected", "chosen_on_rejected_image"]},
        0.7981389 + 0.5981389 + 0.6443967,
    ),
    # z: 0.1 * (1 + 0.5) = 0.15; 0.2 * (-0.5 + 1) = 0.1; 0.3 * (3 - 0.5) = 0.75; 0.4 * (0.5 + 2) = 1
    ("s_vco", {"betas": [0.1, 0.2, 0.3, 0.4]}, 0.6209570 + 0.6443967 + 0.3868710 + 0.3132617),
    ("s_vco", {"betas": [0.1, 0.2, 0, -1]}, 0.6209570 + 0.6443967),
    # 0.9 * S(0.3) + 0.1 * S(-0.3)
    ("cdpo", {}, 0.9 * 0.5543552 + 0.1 * 0.8543552),
    # r_w 0.1, r_l -0.2, their mean m -0.05: S(0.15) + S(0.15)
    ("bco", {}, 2 * 0.6209570),
    # S(0.3) + 0.2 * S(0.2) + S(0.1)
    ("opa_dpo", {}, 0.5543552 + 0.2 * 0.5981389 + 0.6443967),
    # gaps to the blind view: -3 + 5 = 2 and -3 + 2 = -1; z = 0.1 * (3 + 0.5 * (2 + 1)) = 0.45
    ("v_dpo", {"g": 1.5}, 0.4932489),
    # gaps: -3 + 4 = 1 and -3 + 1.5 = -1.5; z = 0.1 * (3 + 0.5 * 2.5) = 0.425
    ("v_dpo", {"g": 1.5, "without": "rejected_image"}, 0.5030574),
    # 3 / 1024
    ("stic", {}, 0.0029296875),
    # means -1.5 and -3: 2 * 1.5 - 0.5 = 2.5
    ("simpo", {"gamma": 0.5}, 0.0788897),
    # logit of exp(-1.5) = ln(0.2231302 / 0.7768698) = -1.2475175, of exp(-3) = -2.9489312; 1.5 + 0.1 * S(1.7014133)
    ("orpo", {}, 1.5 + 0.1 * 0.1675679),
]


@pytest.mark.parametrize(("name", "more", "expected"), BY_HAND, ids=[f"{name}-{more}" for name, more, _ in BY_HAND])
def test_values_worked_by_hand(name, more, expected):
    entry = term(name, **more)
    losses, metrics = entry.term.loss({view: pair()[view] for view in entry.term.views})
    assert losses.tolist() == pytest.approx([expected], abs=2e-6)
    assert all(value.shape == (1,) and not value.requires_grad for value in metrics.values())


# chosen 1 2 3 [9 9] 4 5 6 and rejected 1 2 3 [8] 4 5 6, log-ratios 0.5, changed 1, and 0.25, changed -1
DENSE = {
    "chosen": by_hand([-1, -1, -1, -1, -1, -1, -1, -1], [-1.5, -1.5, -1.5, -2, -2, -1.5, -1.5, -1.5], [1, 2, 3, 9, 9, 4, 5, 6]),
    "rejected": by_hand([-1] * 7, [-1.25, -1.25, -1.25, 0, -1.25, -1.25, -1.25], [1, 2, 3, 8, 4, 5, 6]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "margin"),
    [
        # (6 * 0.5 + 5 * 2) / 16 - (6 * 0.25 - 5) / 11
        ({"gamma": 5}, 0.8125 + 3.5 / 11),
        ({"gamma": 5, "normalise": False}, 13 + 3.5),
        # blocks of 3 are now too short: everything is changed, and the weight cancels
        ({"gamma": 5, "min_block": 4}, 5 / 8 - 0.5 / 7),
        ({"gamma": 0.1, "min_block": 4}, 5 / 8 - 0.5 / 7),  # although the weights then add up to less than 1
        ({"gamma": 1, "normalise": False}, 5 - 0.5),
    ],
)
def test_ddpo_by_hand(more, margin):
    losses, metrics = term("ddpo", beta=0.5, **more).term.loss(DENSE)
    assert metrics["margins"].tolist() == pytest.approx([0.5 * margin], abs=1e-6)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.5 * margin))], abs=1e-6)


def test_changed_spans():
    same = list(range(10, 20))
    assert changed_spans(same, same) == []
    assert changed_spans([*same, 1, 2], same) == []  # an insertion at the end
    assert changed_spans([*same[:5], 1, *same[5:]], same) == []  # and inside
    assert changed_spans([1, 2], [3, 4, 5]) == [(range(2), range(3))]
    assert changed_spans([1, 2, 3, 7, 4, 5, 8, 6, 9, 1], [1, 2, 3, 0, 4, 5, 0, 6, 9, 1]) == [(range(3, 7), range(3, 7))]
    assert changed_spans([7, *same, 8], [9, *same, 6]) == [(range(1), range(1)), (range(11, 12), range(11, 12))]
    assert changed_spans([], [1]) == []


def test_changed_spans_of_frequent_tokens():
    rng = random.Random(0)
    answer = [rng.randrange(4) for _ in range(300)]
    edited = [*answer[:100], 9, *answer[101:]]
    assert changed_spans(answer, edited) == [(range(100, 101), range(100, 101))]


def test_changed_tokens_stop_at_the_padding():
    chosen, rejected = by_hand([-1.0] * 5, [-1.0] * 5, [1, 2, 3, 5, 0]), by_hand([-1.0] * 4, [-1.0] * 4, [1, 2, 3, 6])
    chosen.mask[0, 4] = False
    marks, other_marks = changed_tokens(chosen, rejected)
    assert marks.tolist() == [[False, False, False, True, False]]
    assert other_marks.tolist() == [[False, False, False, True]]


AT_START = {"visual": 1, "two_pictures": 1, "anchor": 1, "s_vco": 4, "povid_noise": 1, "ddpo": 1, "chip": 1, "opa_dpo": 2.2,
            "tpo": 1, "cdpo": 1, "bco": 2}  # fmt: skip


@pytest.mark.parametrize("name", AT_START)
def test_multiples_of_ln_2_at_the_start(name):
    entry = term(name)
    losses, _ = entry.term.loss(at_random(entry, ROWS, seed=1, reference="same"))
    assert losses.tolist() == pytest.approx([AT_START[name] * LN2] * 3, abs=1e-6)


def test_sums_of_terms_at_the_start():
    def total(*parts, text=1.0):
        entries = read_losses(list(parts), beta=0.1)
        return text * LN2 + sum(
            entry.weight * entry.term.loss(at_random(entry, ROWS, seed=1, reference="same"))[0] for entry in entries
        )

    assert total({"name": "visual"}, {"name": "anchor"}).tolist() == pytest.approx([2.0794] * 3, abs=1e-4)  # mDPO
    assert total({"name": "visual"}).tolist() == pytest.approx([1.3863] * 3, abs=1e-4)  # rDPO
    assert total({"name": "s_vco"}, text=0).tolist() == pytest.approx([2.7726] * 3, abs=1e-4)
    assert total({"name": "povid_noise", "weight": 0.5}, text=0.5).tolist() == pytest.approx([0.6931] * 3, abs=1e-4)
    assert total({"name": "bco", "weight": 0.2}, text=0.8).tolist() == pytest.approx(
        [0.8318] * 3, abs=1e-4
    )  # MPO less NLL
    assert total({"name": "opa_dpo"}, text=0).tolist() == pytest.approx([1.5249] * 3, abs=1e-4)

    stic = read_losses([{"name": "stic"}], beta=0.1)[0]
    chosen = at_random(stic, ROWS, seed=1)["chosen"].logps.sum(dim=1)
    torch.testing.assert_close(total({"name": "stic"}), LN2 - chosen / 1024)


def test_guidance_shows_at_the_start():
    entry = term("v_dpo", g=2.0)
    scores = at_random(entry, ROWS, seed=1, reference="same")
    sums = {view: side.logps.sum(dim=1) for view, side in scores.items()}
    effect = sums["chosen"] - sums["chosen_without_image"] - sums["rejected"] + sums["rejected_without_image"]
    losses, _ = entry.term.loss(scores)
    torch.testing.assert_close(losses, -logsigmoid(0.1 * effect))
    assert (losses - LN2).abs().min() > 1e-3


UP, DOWN = -1.0, 1.0
SIGNS = {
    "visual": {"chosen": UP, "chosen_on_rejected_image": DOWN},
    "two_pictures": {"chosen": UP, "rejected_on_own_image": DOWN},
    "anchor": {"chosen": UP, "rejected": DOWN, "chosen_on_rejected_image": DOWN},
    # without a picture, what one comparison pulls down the other pushes up: nothing at the start
    "s_vco": {"chosen": UP, "rejected": DOWN, "chosen_on_rejected_image": DOWN, "rejected_on_rejected_image": UP,
              "chosen_without_image": 0.0, "rejected_without_image": 0.0},
    "povid_noise": {"chosen": UP},
    "ddpo": {"chosen": UP, "rejected": DOWN},
    "chip": {"chosen": UP, "rejected": DOWN, "chosen_on_rejected_image": DOWN},
    "v_dpo": {"chosen": UP, "rejected": DOWN},
    "opa_dpo": {"chosen": UP, "rejected": DOWN, "chosen_on_rejected_image": DOWN},
    "tpo": {"chosen": UP, "rejected": DOWN},
    "cdpo": {"chosen": UP, "rejected": DOWN},
    "bco": {"chosen": UP, "rejected": DOWN},
    "stic": {"chosen": UP},
    "simpo": {"chosen": UP, "rejected": DOWN},
    "orpo": {"chosen": UP, "rejected": DOWN},
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNS)
def test_what_descent_makes_likelier(name):
    more = {"anchor": {"below_zero": ["rejected", "chosen_on_rejected_image"]}}
    entry = term(name, **more.get(name, {}))
    scores = at_random(entry, ROWS, seed=2, reference="same")
    found = gradients(entry, scores)
    for view, side in scores.items():
        gradient = found[view, "logps"]
        if view not in SIGNS[name]:
            assert gradient is None
            continue
        assert set(gradient[side.mask].sign().tolist()) == {SIGNS[name][view]}


def test_gradient_of_two_pictures_by_hand():
    """beta * sigmoid(-z) with z = -0.2: 0.1 * 0.5498340 for each token, up for the chosen and down for the rejected answer."""
    entry = term("two_pictures")
    scores = {view: pair()[view] for view in entry.term.views}
    found = gradients(entry, scores)
    assert found["chosen", "logps"].tolist()[0] == pytest.approx([-0.0549834] * 2, abs=1e-7)
    assert found["rejected_on_own_image", "logps"].tolist()[0] == pytest.approx([0.0549834], abs=1e-7)


@pytest.mark.parametrize(
    ("name", "more"),
    [("cdpo", {"label_smoothing": 0.0}), ("ddpo", {}), ("chip", {"image": False, "kl": 0.0}), ("simpo", {"gamma": 0.0}),
     ("v_dpo", {}), ("v_dpo", {"without": "rejected_image"})],
)  # fmt: skip
def test_swapping_the_answers_turns_the_margin(name, more):
    entry = term(name, **more)
    scores = at_random(entry, ROWS, seed=3)
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {view: scores[re.sub("^(chosen|rejected)", lambda found: other[found[0]], view)] for view in scores}
    (losses, metrics), (other_losses, other_metrics) = entry.term.loss(scores), entry.term.loss(swapped)
    torch.testing.assert_close(metrics["margins"], -other_metrics["margins"])
    torch.testing.assert_close(losses - other_losses, -metrics["margins"])  # S(z) - S(-z) = -z


def test_s_vco_does_not_care_which_side_is_chosen():
    entry = term("s_vco", betas=[0.1, 0.2, 0.1, 0.2])
    scores = at_random(entry, ROWS, seed=3)
    mirrored = {"chosen": "rejected_on_rejected_image", "rejected": "chosen_on_rejected_image",
                "chosen_without_image": "rejected_without_image"}  # fmt: skip
    mirrored |= {other: view for view, other in mirrored.items()}
    losses, _ = entry.term.loss(scores)
    torch.testing.assert_close(losses, entry.term.loss({view: scores[mirrored[view]] for view in scores})[0])
    assert not torch.allclose(losses, entry.term.loss({**scores, "chosen": scores["chosen_without_image"]})[0])


@pytest.mark.parametrize("name", OWN)
def test_padding_changes_no_bit(name):
    entry = term(name)
    scores = at_random(entry, {"chosen": [2, 1, 2], "rejected": [1, 2, 2]}, seed=4)
    wide = padded(scores, 9)
    results = [read_losses([{"name": name}], beta=0.1)[0].term.loss(each)[0] for each in (scores, wide)]
    assert torch.equal(*results)
    narrow_gradients, wide_gradients = (gradients(term(name), each) for each in (scores, wide))
    for key, gradient in narrow_gradients.items():
        if gradient is None:
            assert wide_gradients[key] is None
            continue
        view, part = key
        assert torch.equal(wide_gradients[key][wide[view].mask], gradient[scores[view].mask])
        if part == "logits":
            assert not wide_gradients[key][~wide[view].mask].any()


@pytest.mark.parametrize("name", [name for name in OWN if TERMS[name].per_row])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rows_do_not_see_each_other(name, seed):
    rng = random.Random(seed)
    entry, lengths = term(name), pick(rng, 2, 6)
    lengths = {answer: [*counts, 7] for answer, counts in lengths.items()}  # the third keeps the width
    one = at_random(entry, lengths, seed=seed)
    losses, _ = entry.term.loss(one)
    other = at_random(entry, lengths, seed=seed + 1)
    for view in one:
        for part in ("logps", "ids", "ref_logps", "logits", "ref_logits"):
            if getattr(one[view], part) is not None:
                mixed = getattr(one[view], part).detach().clone()
                mixed[1] = getattr(other[view], part)[1].detach()
                setattr(one[view], part, mixed)
    changed, _ = entry.term.loss(one)
    assert torch.equal(losses[[0, 2]], changed[[0, 2]])
    assert losses[1] != changed[1]


def test_bco_keeps_a_running_mean_of_rewards():
    bco = term("bco").term
    bco.loss(pair())  # rewards 0.1 and -0.2
    assert bco.shift == pytest.approx(-0.05)
    losses, metrics = bco.loss(
        {"chosen": by_hand([-1.0], [-7.0]), "rejected": by_hand([-1.0], [-3.0])}  # 0.6 and 0.2
    )
    assert bco.shift == pytest.approx(0.7 / 4)
    assert metrics["shift"].tolist() == pytest.approx([0.175])
    # S(0.6 - 0.175) + S(0.175 - 0.2)
    assert losses.tolist() == pytest.approx([0.5030574 + 0.7057253], abs=2e-6)


def test_bco_adds_nothing_in_an_evaluation():
    bco = term("bco").term
    bco.loss(pair())
    with torch.no_grad():
        losses, _ = bco.loss({"chosen": by_hand([-1.0], [-7.0]), "rejected": by_hand([-1.0], [-3.0])})
    assert bco.shift == pytest.approx(-0.05)
    # rewards 0.6 and 0.2 against training's mean: S(0.65) + S(-0.25)
    assert losses.tolist() == pytest.approx([0.4200553 + 0.8259394], abs=2e-6)


def test_bco_state_round_trip():
    straight, stopped = term("bco").term, term("bco").term
    batches = [at_random(term("bco"), ROWS, seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        straight.loss(batch)
        stopped.loss(batch)
    resumed = term("bco").term
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    fresh = term("bco").term
    for batch in batches[2:]:
        expected = straight.loss(batch)[0]
        assert torch.equal(expected, resumed.loss(batch)[0])
        assert not torch.equal(expected, fresh.loss(batch)[0])
    assert straight.shift == resumed.shift


def rank_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    bco = term("bco").term
    logps = ([-1.0], [-7.0]) if rank else ([-1.0, -2.0], [-1.5, -2.5])  # rewards 0.6 and 0.1
    bco.loss({"chosen": by_hand(*logps), "rejected": by_hand([-3.0], [-1.0])})  # and -0.2 twice
    Path(folder, f"{rank}.json").write_text(json.dumps([bco.shift, bco.state_dict()["count"]]))
    torch.distributed.destroy_process_group()


def test_bco_shares_its_mean_among_processes(tmp_path):
    torch.multiprocessing.start_processes(rank_of_two, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        shift, count = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (shift, count) == (pytest.approx(0.3 / 4), 4)


@pytest.mark.filterwarnings("ignore")
def test_simpo_and_orpo_against_trl():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    accelerator = SimpleNamespace(device="cpu")
    scores = at_random(term("simpo"), ROWS, seed=8)
    means = [scores[view].logps.sum(dim=1) / scores[view].lengths() for view in ("chosen", "rejected")]

    cpo = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.5, label_smoothing=0.0, accelerator=accelerator
    )
    losses, _ = term("simpo", beta=2.5, gamma=0.7).term.loss(scores)
    torch.testing.assert_close(losses, CPOTrainer.cpo_loss(cpo, *means)[0])

    orpo = SimpleNamespace(beta=0.3, accelerator=accelerator)
    losses, _ = term("orpo", lam=0.3).term.loss(scores)
    torch.testing.assert_close(losses, -means[0] - ORPOTrainer.odds_ratio_loss(orpo, *means)[0])


def test_orpo_of_a_certain_answer_is_finite():
    scores = {"chosen": by_hand([0.0], [0.0]), "rejected": by_hand([-3.0], [0.0])}
    losses, _ = term("orpo").term.loss(scores)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert scores["chosen"].logps.grad.isfinite().all()
