"""PPO's passes on the families that need torchvision: the check of `test_ppo_families.py`."""

import pytest
import torch
from peft import get_peft_model

from prefalign.models import ModelConfig, load_model
from prefalign.online.reward_adapters import share_base
from prefalign.rewards import Combined, Weighted
from prefalign.rewards.learned import LearnedReward
from prefalign.training.lora import LoraSettings
from tests.ppo_runs import begun, make_ppo, write_prompts
from tests.reward_runs import make_reward_model, make_reward_pair
from tests.test_ppo_all_families import SIZES, check_family, folders  # noqa: F401
from tests.tiny_vlms import WITH_VIDEO

pytestmark = pytest.mark.families


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_minibatches_of_pictures_of_other_sizes(family, folders, tmp_path):  # noqa: F811
    check_family(folders(family), tmp_path)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_what_does_not_train_is_there_once_and_serves_the_reward_model_too(family, folders, tmp_path):  # noqa: F811
    """Three-dimensional positions, and picture features that go into several layers."""
    checkpoint = folders(family)
    prompts = write_prompts(tmp_path / "prompts", 4, sizes=SIZES)
    roles = make_ppo(checkpoint, prompts, tmp_path / "full", lora=False).roles
    for role in (roles.reference, roles.value):
        assert role.model.visual is roles.policy.model.visual
        assert role.model.language_model is not roles.policy.model.language_model
    reward_model = make_reward_model(checkpoint, lora=True)
    reward_model.calibrate([make_reward_pair(number).to_row() for number in range(4)])
    reward_model.save(tmp_path / "reward")
    policy = get_peft_model(
        load_model(ModelConfig(str(checkpoint), device="cpu", dtype="float32")), LoraSettings(r=4, alpha=8).to_peft()
    )
    rewards = Combined([Weighted("learned", LearnedReward(tmp_path / "reward", device="cpu", batch_size=4))])
    adapter, _ = share_base(rewards, policy)
    trainer = make_ppo(checkpoint, prompts, tmp_path / "run", model=policy, reward_adapter=adapter)
    trainer.scorer.rewards = rewards
    begun(trainer)
    assert trainer.keeps_features
    assert trainer.scorer.alike(rewards.entries[0].reward.model)
    responses = [answer.response for answer in trainer.rollout.answers]
    scores = trainer.rollout.scores["total"]
    assert torch.allclose(rewards.score(responses)["total"], scores, atol=1e-4)
    responses[0].images, responses[1].images = responses[1].images, responses[0].images
    with trainer.scorer._lent(trainer.rollout):
        swapped = rewards.score(responses)["total"]
    assert (swapped - scores)[:2].abs().min() > 1e-3
    assert torch.allclose(rewards.score(responses)["total"], swapped, atol=1e-4)
