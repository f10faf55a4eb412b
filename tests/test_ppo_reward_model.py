"""A reward model on the policy's own base: one more adapter, which training leaves alone."""

import copy
import json
import re

import pytest
import torch
from peft import get_peft_model

from prefalign.config import ConfigError
from prefalign.models import ModelConfig, freeze, load_model, load_processor
from prefalign.online.reward_adapters import share_base, value_start
from prefalign.records import user_message
from prefalign.rewards import Combined, Response, Weighted
from prefalign.rewards.artefact import RewardModelError
from prefalign.rewards.learned import LearnedReward
from prefalign.training.forward import hidden_states
from prefalign.training.lora import LoraSettings
from tests.ppo_runs import begun, history, make_ppo, write_prompts
from tests.reward_runs import make_reward_model, write_reward_pairs
from tests.tiny_vlms import save_tiny
from tests.training_runs import weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_llava):
    """Prompts, and reward models as an adapter and with all weights."""
    from prefalign.rewards.rows import load_reward_pairs

    folder = tmp_path_factory.mktemp("rewards")
    write_prompts(folder / "prompts")
    pairs = load_reward_pairs(write_reward_pairs(folder / "pairs"))
    rows = [{**row, "facts": json.loads(row["facts"])} for row in pairs]
    for name, lora in (("adapter", True), ("full", False)):
        model = make_reward_model(tiny_llava, lora=lora)
        model.calibrate(rows)
        model.save(folder / name)
    return folder


def policy(checkpoint):
    model = load_model(ModelConfig(str(checkpoint), device="cpu", dtype="float32"))
    return get_peft_model(model, LoraSettings(r=4, alpha=8, dropout=0.1).to_peft())


def learned(folder):
    return Combined([Weighted("learned", LearnedReward(folder, device="cpu", batch_size=3))])


def make(tiny_llava, folders, output, **settings):
    model, rewards = policy(tiny_llava), learned(folders / "adapter")
    adapter, remark = share_base(rewards, model)
    assert (adapter, remark) == ("reward", "; the reward model is an adapter of the policy's base")
    trainer = make_ppo(tiny_llava, folders / "prompts", output, model=model, reward_adapter=adapter, **settings)
    trainer.scorer.rewards = rewards
    return trainer


def test_scores_and_adapter_are_the_same_before_and_after_training(tiny_llava, folders, tmp_path):
    """Test (g), to the bit; and on the policy's base the reward model says what it says by itself."""
    trainer = make(tiny_llava, folders, tmp_path, blank_picture_probe=4, gradient_checkpointing=True)
    start = weights(trainer.roles)
    begun(trainer)
    responses = [answer.response for answer in trainer.rollout.answers]
    before = trainer.scorer.rewards.score(responses)["total"]
    assert len(set(before.tolist())) == len(before)
    alone = learned(folders / "adapter").score(responses)["total"]
    assert torch.allclose(before, alone, atol=1e-4)
    trainer.train()
    end = weights(trainer.roles)
    changed = {
        re.sub(r"\d+", "N", name.rpartition("lora_")[2] or name)
        for name in start
        if not torch.equal(start[name], end[name])
    }
    assert changed == {"A.default.weight", "B.default.weight", "A.value.weight", "B.value.weight", "value_head.weight",
                       "value_head.bias"}  # fmt: skip
    assert torch.equal(trainer.scorer.rewards.score(responses)["total"], before)
    first = trainer.state.log_history[0]
    assert first["probe/learned/blank_picture_gap"] > 0.01
    assert not [name for name in first if name.startswith("alarms/blind")]
    assert history(trainer, "val/ratio")[0] == pytest.approx(1, abs=1e-6)


def test_values_start_from_the_reward_model(tiny_llava, folders, tmp_path):
    trainer = make(tiny_llava, folders, tmp_path)
    state = weights(trainer.roles)
    values = [name for name in state if ".value." in name and "lora_" in name]
    assert values
    assert all(torch.equal(state[name], state[name.replace(".value.", ".reward.")]) for name in values)
    assert all(bool(state[name].any()) for name in values)
    assert not any(
        parameter.requires_grad for name, parameter in trainer.roles.named_parameters() if ".reward." in name
    )


def test_a_picture_moves_a_learned_reward(tiny_llava, folders, tmp_path):
    trainer = begun(make(tiny_llava, folders, tmp_path))
    responses = [answer.response for answer in trainer.rollout.answers]
    before = trainer.scorer.rewards.score(responses)["total"]
    responses[0].images, responses[1].images = responses[1].images, responses[0].images
    after = trainer.scorer.rewards.score(responses)["total"]
    assert (after[:2] - before[:2]).abs().min() > 1e-3
    assert torch.allclose(after[2:], before[2:], atol=1e-4)


def test_reward_models_that_keep_their_own_weights(tiny_llava, folders, tmp_path):
    rewards = learned(folders / "full")
    assert share_base(rewards, policy(tiny_llava)) == (
        None, "; the reward model has weights of its own (all of them were trained)"
    )  # fmt: skip
    other = policy(save_tiny("llava", tmp_path / "other", seed=1))
    assert share_base(learned(folders / "adapter"), other) == (
        None, "; the reward model has weights of its own (it was trained on another base than the policy)"
    )  # fmt: skip
    assert value_start(learned(folders / "adapter"), other) is None
    trainer = make_ppo(tiny_llava, folders / "prompts", tmp_path / "run", save_strategy="no")
    trainer.scorer.rewards = rewards
    trainer.train()
    assert history(trainer, "val/ratio")[0] == pytest.approx(1, abs=1e-6)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(RewardModelError, match="is no reward model"):
        share_base(learned(tmp_path / "nothing"), policy(tiny_llava))


def test_where_all_weights_train_values_start_from_the_reward_models(tiny_llava, folders, tmp_path):
    rewards = learned(folders / "full")
    model = load_model(ModelConfig(str(tiny_llava), device="cpu", dtype="float32"))
    freeze(model, ["vision", "projector"])
    start = value_start(rewards, model)
    with torch.no_grad():
        start.model.language_model.layers[0].mlp.up_proj.weight.mul_(2)  # as reward training would have moved it
    wanted = start.model.language_model.layers[0].mlp.up_proj.weight.clone()
    trainer = make_ppo(tiny_llava, folders / "prompts", tmp_path, model=model, value_model=start, save_strategy="no")
    value = trainer.roles.value
    assert torch.equal(value.model.language_model.layers[0].mlp.up_proj.weight, wanted)
    assert value.model.vision_tower is trainer.roles.policy.model.vision_tower
    assert value.model.language_model is not trainer.roles.policy.model.language_model
    trainer.train()
    assert not torch.equal(value.model.language_model.layers[0].mlp.up_proj.weight, wanted)
    assert history(trainer, "val/ratio")[0] == pytest.approx(1, abs=1e-6)
    other = load_model(ModelConfig(str(save_tiny("idefics3", tmp_path / "other")), device="cpu"))
    assert value_start(rewards, other) is None
    with pytest.raises(ConfigError, match="are not of one architecture"):
        make_ppo(tiny_llava, folders / "prompts", tmp_path, model=freeze_parts(tiny_llava), value_model=other)


def test_a_reward_model_on_a_shared_base_runs_as_the_base_does(tiny_llava, folders, tmp_path):
    """The policy's route is chosen after the reward model's: packed batches on a plain model would be silently wrong."""
    model, rewards = policy(tiny_llava), learned(folders / "adapter")
    adapter, _ = share_base(rewards, model)
    trainer = make_ppo(tiny_llava, folders / "prompts", tmp_path / "run", model=model, reward_adapter=adapter,
                       fast_path="off")  # fmt: skip
    responses = [
        Response(str(number), [], [user_message("what is it ?")], "a red dog " * number) for number in range(1, 5)
    ]
    alone = learned(folders / "adapter").score(responses)["total"]
    assert alone.std() > 1e-3
    assert torch.allclose(rewards.score(responses)["total"], alone, atol=1e-4)
    packed = begun(make(tiny_llava, folders, tmp_path / "packed"))._prepared([0, 1])["packed"]
    with pytest.raises(ValueError, match="layout 'plain' and was given a packed batch"):
        hidden_states(trainer.roles.policy, packed)


def bigger(checkpoint, folder):
    small = load_model(ModelConfig(str(checkpoint), device="cpu", dtype="float32"))
    config = copy.deepcopy(small.config)
    config.get_text_config().intermediate_size *= 2
    type(small)(config).save_pretrained(folder)
    load_processor(ModelConfig(str(checkpoint))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["size", "weights"])
def test_a_policy_that_cannot_carry_the_adapter_stays_as_it_was(tiny_llava, folders, tmp_path, kind):
    """In another dtype the fingerprint says nothing, and the adapter is attached before it shows."""
    other = bigger(tiny_llava, tmp_path / "m") if kind == "size" else save_tiny("llava", tmp_path / "m", seed=1)
    model = load_model(ModelConfig(str(other), device="cpu", dtype="bfloat16"))
    model = get_peft_model(model, LoraSettings(r=4, alpha=8, dropout=0.1).to_peft())
    before = {name: (parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()}
    rewards = learned(folders / "adapter")
    adapter, remark = share_base(rewards, model)
    assert adapter is None
    assert "trained on another base than the policy" in remark
    assert list(model.peft_config) == ["default"]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(
        after[name].requires_grad == flag and torch.equal(after[name], was) for name, (flag, was) in before.items()
    )
    assert model.active_adapter == "default"
    assert rewards.entries[0].reward.model.adapter is None


def test_a_bigger_reward_model_is_no_start_for_the_values(tiny_llava, folders, tmp_path):
    big = make_reward_model(bigger(tiny_llava, tmp_path / "m"), lora=False)
    big.calibrate([entry.row for entry in learned(folders / "full").entries[0].reward.model.calibration.golden])
    big.save(tmp_path / "big")
    assert value_start(learned(tmp_path / "big"), freeze_parts(tiny_llava)) is None
    assert value_start(learned(folders / "full"), freeze_parts(tiny_llava)) is not None


def freeze_parts(checkpoint):
    model = load_model(ModelConfig(str(checkpoint), device="cpu"))
    freeze(model, ["vision", "projector"])
    return model
