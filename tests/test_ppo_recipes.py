"""`fact_rlhf.sh` on the embedded world and a few prompts: one base from SFT to PPO, and a second start does nothing twice."""

import json

import pytest
from safetensors.torch import load_file

from prefalign import bundled
from prefalign.config import ConfigError, build
from prefalign.online.ppo_run import reward_entries
from tests.test_online_recipes import carry_out

SCENES = "configs/recipes/train_ppo_fact_rlhf_scenes.yaml"


def test_fact_rlhf_end_to_end(tmp_path):
    small = ["--trainer.max_steps", "2", "--trainer.save_steps", "2", "--trainer.per_device_train_batch_size", "4",
             "--trainer.num_generations", "2", "--force_reward", "true"]  # fmt: skip
    few = "--trainer.max_steps 1 --trainer.per_device_train_batch_size 4 --trainer.save_steps 1"
    output = tmp_path / "out"
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
        given = carry_out("recipes/fact_rlhf.sh", [SCENES, str(output), *small], tmp_path / name, ROWS="8", HELD_OUT_ROWS="8",
                          SFT_SETTINGS=few, REWARD_SETTINGS=few)  # fmt: skip
        verbs = [words[1] for words in given if words[0] == "run"]
        assert verbs == ["povid", "povid", "train_sft", "train_reward_model", "grade_reward_model", "train_ppo"]
        if name == "first":
            finished = (output / "ppo" / "adapter_model.safetensors").stat().st_mtime_ns
    assert (output / "ppo" / "adapter_model.safetensors").stat().st_mtime_ns == finished
    grade = json.loads((output / "reward" / "grade.json").read_text())
    assert grade["sets"]["held_out"]["pairs"] >= 4
    history = json.loads((output / "ppo" / "trainer_state.json").read_text())["log_history"]
    assert abs(history[0]["objective/kl"]) < 1e-3
    assert {"rewards/reward_model/reward", "watch/objects/recall", "probe/reward_model/blank_picture_gap"} <= set(
        history[0]
    )
    reward, value = (load_file(output / place / "adapter_model.safetensors") for place in ("reward", "ppo/value"))
    assert {name.removeprefix("base_model.model.") for name in value} == {
        name.removeprefix("base_model.model.") for name in reward
    }
    close = [(reward[name] - value[name]).abs().max().item() for name in reward]
    assert 0 < max(close) < 0.01  # the values went on from the reward model


def test_a_reward_model_that_nobody_asks_is_refused(tmp_path):
    stage = bundled.load_stage("train_ppo")
    values = {"model": {"model_name_or_path": "m"}, "prompts": "p", "output": str(tmp_path), "reward_model": "runs/r",
              "trainer": {"use_cpu": True}}  # fmt: skip
    config = build(stage.Config, {**values, "rewards": [{"name": "length"}]})
    with pytest.raises(ConfigError, match="no entry of rewards or watch is a `{name: reward_model}`"):
        stage.main(config)
    config = build(stage.Config, {**values, "rewards": [{"name": "length"}], "watch": [{"name": "reward_model"}]})
    assert reward_entries(config) == ([{"name": "length"}], [{"name": "reward_model", "path": "runs/r"}])
