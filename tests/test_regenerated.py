"""Online BDHS: rejected answers drawn anew from the policy as it is now, by the library's guided completion."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefalign import families
from prefalign.engines import Sampling
from prefalign.engines.transformers import TransformersEngine
from prefalign.guided import BiasConfig, regenerated
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.records import Pair, assistant_message, message_text, user_message
from prefalign.scenes import world
from prefalign.scenes.language import caption
from prefalign.text import lexical_similarity

MODEL = ModelConfig("scenes", device="cpu")
BIAS = BiasConfig(rho_th=0.5)


def pair(index):
    scene = world.scene("train_biased", index)
    return Pair(
        id=scene.id,
        images=[{"bytes": world.png(scene), "path": "a.png"}],
        prompt=[user_message("Describe the picture.", 1)],
        chosen=[assistant_message(caption(scene))],
        rejected=[assistant_message("There is a small red ring at the top.")],
        method="bdhs",
        meta={"variant": "attention"},
    )


PAIRS = [pair(index) for index in range(6)]


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    return get_peft_model(load_model(MODEL), lora)


@pytest.fixture(scope="module")
def processor():
    return load_processor(MODEL)


def drawn(policy, processor, pairs=PAIRS, *, round=1, batch_size=16):
    engine = TransformersEngine(policy, processor, batch_size=batch_size)
    return regenerated(engine, pairs, BIAS, Sampling(max_new_tokens=48), lexical_similarity, seed=0, round=round)


def texts(pairs):
    return [message_text(one.rejected) for one in pairs]


def test_rejected_answers_come_from_the_policy_as_it_is_now(policy, processor):
    policy.train()
    first = drawn(policy, processor)
    assert policy.training
    assert all(one.meta["online"] and one.meta["round"] == 1 and one.meta["variant"] == "attention" for one in first)
    assert [one.chosen for one in first] == [one.chosen for one in PAIRS]
    assert texts(first) == texts(drawn(policy, processor, batch_size=2))
    with policy.disable_adapter():
        base = texts(drawn(policy, processor))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.mul_(-3)
    later = texts(drawn(policy, processor))
    assert len({tuple(texts(first)), tuple(base), tuple(later)}) == 3


def test_another_round_draws_anew(policy, processor):
    assert texts(drawn(policy, processor, round=1)) != texts(drawn(policy, processor, round=2))


def test_the_picture_matters(policy, processor):
    swapped = [dataclasses.replace(one, images=other.images) for one, other in zip(PAIRS, PAIRS[::-1], strict=True)]
    mine, theirs = texts(drawn(policy, processor)), texts(drawn(policy, processor, swapped))
    assert sum(one != other for one, other in zip(mine, theirs, strict=True)) >= 3


def test_a_pair_that_gives_no_usable_answer_keeps_the_one_it_has(policy, processor):
    broken = dataclasses.replace(PAIRS[0], images=[{"bytes": b"no picture", "path": "a.png"}])
    kept, other = drawn(policy, processor, [broken, PAIRS[1]])
    assert kept.rejected == broken.rejected
    assert kept.meta == {**broken.meta, "round_tried": 1}
    assert (other.meta["online"], other.meta["round"], other.meta["round_tried"]) == (True, 1, 1)
    fails_later = dataclasses.replace(other, images=broken.images)
    (kept,) = drawn(policy, processor, [fails_later], round=2)
    assert kept == dataclasses.replace(fails_later, meta={**other.meta, "round_tried": 2})


def test_answers_are_drawn_without_gradients(policy, processor):
    enabled = []
    handle = families.core(policy).register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    try:
        drawn(policy, processor, PAIRS[:1])
        assert enabled
        assert not any(enabled)
    finally:
        handle.remove()
