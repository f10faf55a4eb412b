"""A reward model takes the picture features that the rollout has, where it would make the same ones, and only there."""

import copy
import json
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model

from prefalign.families import core
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.online.reward_adapters import encodes_alike, share_base
from prefalign.rewards import Combined, Weighted
from prefalign.rewards.learned import LearnedReward
from prefalign.rewards.rows import load_reward_pairs
from prefalign.training.lora import LoraSettings
from tests.ppo_runs import begun, make_ppo, write_prompts
from tests.reward_runs import make_reward_model, write_reward_pairs

IN_THE_TOWER = r".*vision.*\.(q_proj|v_proj)|.*language_model.*\.(q_proj|v_proj)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_llava):
    """Prompts, and reward models: an adapter, one that is in the tower too, frozen tower, trained tower."""
    folder = tmp_path_factory.mktemp("rewards")
    write_prompts(folder / "prompts", images=2)
    rows = load_reward_pairs(write_reward_pairs(folder / "pairs"))
    rows = [{**row, "facts": json.loads(row["facts"])} for row in rows]
    for name in ("adapter", "frozen", "trained"):
        model = make_reward_model(tiny_llava, lora=name == "adapter")
        with torch.no_grad():
            for parameter in core(model.model).model.vision_tower.parameters() if name == "trained" else ():
                parameter.mul_(1.3)
        model.calibrate(rows)
        model.save(folder / name)
    model = make_reward_model(tiny_llava)
    model.model = get_peft_model(model.model, LoraSettings(r=4, alpha=8, target_modules=IN_THE_TOWER).to_peft())
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.calibrate(rows)
    model.save(folder / "tower")
    return folder


def make(tiny_llava, folders, output, kind, **settings):
    """A trainer whose reward model of that kind is on the policy's base, where it can be; and that model."""
    model = load_model(ModelConfig(str(tiny_llava), device="cpu", dtype="float32"))
    torch.manual_seed(0)
    model = get_peft_model(model, LoraSettings(r=4, alpha=8, dropout=0.0).to_peft())
    rewards = Combined([Weighted("learned", LearnedReward(folders / kind, device="cpu", batch_size=3))])
    adapter, _ = share_base(rewards, model)
    assert adapter == ("reward" if kind in ("adapter", "tower") else None)
    trainer = make_ppo(tiny_llava, folders / "prompts", output, model=model, **settings)
    trainer.scorer.rewards = rewards
    return trainer, rewards.entries[0].reward.model


@contextmanager
def encoded(model):
    """Counts the pictures that a model's tower is run on."""
    seen, tower = [], core(model).model.vision_tower
    hook = tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def step(trainer):
    """Scores of the first rollout, loss of the first visit, gradients, and the pictures that were encoded in all."""
    with encoded(trainer.roles.policy) as seen:
        loss = trainer.training_step(trainer.model, {"rows": torch.arange(4)})
    gradients = torch.cat([p.grad.flatten() for p in trainer.roles.parameters() if p.grad is not None])
    return trainer.rollout.scores["total"], loss, gradients, sum(seen)


def test_a_step_with_the_rollouts_features_is_one_with_pictures_encoded_again(tiny_llava, folders, tmp_path):
    """Four prompts with two pictures: 8 are encoded, or 8 more in scoring; scores, loss and gradients stay."""
    taken, _ = make(tiny_llava, folders, tmp_path / "a", "adapter")
    again, _ = make(tiny_llava, folders, tmp_path / "b", "adapter")
    again.scorer.alike = lambda model: False
    for trainer in (taken, again):
        trainer.create_optimizer()
    scores, loss, gradients, pictures = step(taken)
    others, other_loss, other_gradients, more = step(again)
    assert (pictures, more) == (8, 16)
    assert scores.std() > 1e-2
    assert torch.allclose(scores, others, atol=1e-5)
    assert torch.allclose(loss, other_loss, rtol=1e-4)
    assert gradients.abs().max() > 0
    assert (gradients - other_gradients).abs().max() < 1e-4 * other_gradients.abs().max()


def test_swapped_pictures_take_their_features_along(tiny_llava, folders, tmp_path):
    trainer, model = make(tiny_llava, folders, tmp_path, "adapter", blank_picture_probe=4)
    begun(trainer)
    rollout, rewards = trainer.rollout, trainer.scorer.rewards
    responses = [answer.response for answer in rollout.answers]
    before = rollout.scores["total"]
    responses[0].images, responses[1].images = responses[1].images, responses[0].images
    with encoded(model.model) as seen, trainer.scorer._lent(rollout):
        swapped = rewards.score(responses)["total"]
    assert seen == []
    assert (swapped - before).abs()[:2].min() > 1e-3
    assert torch.allclose(swapped[2:], before[2:], atol=1e-5)
    with encoded(model.model) as seen:
        assert torch.allclose(rewards.score(responses)["total"], swapped, atol=1e-5)
    assert sum(seen) == 8
    # pictures in another order are others, and of those nobody has features
    responses[0].images = responses[0].images[::-1]
    with encoded(model.model) as seen, trainer.scorer._lent(rollout):
        turned = rewards.score(responses)["total"]
    assert sum(seen) > 0
    assert abs(turned[0] - swapped[0]) > 1e-4
    responses[0].images = responses[0].images[::-1]
    # the features of other pictures are what the score follows
    digests = list(rollout.features)
    rollout.features[digests[2]], rollout.features[digests[3]] = (rollout.features[digests[3]],
                                                                  rollout.features[digests[2]])  # fmt: skip
    with trainer.scorer._lent(rollout):
        assert (rewards.score(responses)["total"] - swapped)[2:].abs().min() > 1e-3


@pytest.mark.parametrize("kind", ["tower", "trained"])
def test_a_reward_model_with_a_tower_of_its_own_encodes_for_itself(tiny_llava, folders, tmp_path, kind):
    trainer, model = make(tiny_llava, folders, tmp_path, kind)
    assert not encodes_alike(model, trainer.roles.policy, trainer.processing_class)
    begun(trainer)
    responses = [answer.response for answer in trainer.rollout.answers]
    alone = LearnedReward(folders / kind, device="cpu").score(responses)["reward"]
    assert torch.allclose(trainer.rollout.scores["total"], alone, atol=1e-4)
    with model.with_features(trainer.rollout.features):
        wrong = trainer.scorer.rewards.score(responses)["total"]
    assert (wrong - alone).abs().min() > 1e-3


def test_weights_of_its_own_with_the_same_tower_take_the_features(tiny_llava, folders, tmp_path):
    trainer, model = make(tiny_llava, folders, tmp_path, "frozen")
    with encoded(model.model) as seen:
        begun(trainer)
    assert seen == []
    responses = [answer.response for answer in trainer.rollout.answers]
    assert torch.allclose(trainer.rollout.scores["total"], trainer.scorer.rewards.score(responses)["total"], atol=1e-5)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        core(moved.model).model.multi_modal_projector.linear_1.bias.add_(0.1)
    assert encodes_alike(model, trainer.roles.policy, trainer.processing_class)
    assert not encodes_alike(moved, trainer.roles.policy, trainer.processing_class)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("", "vision_feature_layer", -1),
        ("", "vision_feature_select_strategy", "full"),
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "layer_norm_eps", 1e-3),
    ],
)
def test_the_same_tensors_used_in_another_way_are_others(place, name, value, tiny_llava, folders, tmp_path):
    trainer, model = make(tiny_llava, folders, tmp_path, "frozen")
    policy, processor = trainer.roles.policy, trainer.processing_class
    assert encodes_alike(model, policy, processor)
    whole = core(model.model).config
    settings = getattr(whole, place) if place else whole
    assert getattr(settings, name) != value
    setattr(settings, name, value)
    assert not encodes_alike(model, policy, processor)


def test_image_tokens_counted_in_another_way_are_others(tiny_llava, folders, tmp_path):
    trainer, model = make(tiny_llava, folders, tmp_path, "frozen")
    other = load_processor(ModelConfig(str(tiny_llava)))
    assert encodes_alike(model, trainer.roles.policy, other)
    other.num_additional_image_tokens += 1
    assert not encodes_alike(model, trainer.roles.policy, other)


def test_pictures_prepared_in_another_way_are_others(tiny_llava, folders, tmp_path):
    trainer, model = make(tiny_llava, folders, tmp_path, "adapter")
    other = load_processor(ModelConfig(str(tiny_llava)))
    assert encodes_alike(model, trainer.roles.policy, other)
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert not encodes_alike(model, trainer.roles.policy, other)
