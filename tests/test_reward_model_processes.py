"""Reward training in two processes is the run in one; rows with and without pictures fall on them as they come."""

import json

import pytest
from safetensors.torch import load_file

from prefalign import bundled
from prefalign.rewards.vlm import RewardModel
from tests.launching import TORCHRUN, start
from tests.reward_runs import STAGE, make_reward_pair, stage_config, write_reward_pairs
from tests.training_runs import largest_difference


def test_two_processes_are_one(tiny_llava, tmp_path):
    data = write_reward_pairs(tmp_path / "data", [make_reward_pair(number, images=number % 2) for number in range(8)])
    held_out = write_reward_pairs(tmp_path / "held_out", [make_reward_pair(number) for number in range(3)])
    one = stage_config(tiny_llava, data, tmp_path / "one", eval_pairs=str(held_out))
    STAGE.main(one)
    settings = {
        "model.model_name_or_path": tiny_llava, "model.device": "cpu", "pairs": data, "eval_pairs": held_out,
        "output": tmp_path / "two", "prompt.ask": json.dumps(one.prompt.ask), "prompt.lead": json.dumps(one.prompt.lead),
        "prompt.opening": one.prompt.opening, "trainer.max_steps": 4, "trainer.save_steps": 2, "trainer.logging_steps": 1,
        "trainer.per_device_train_batch_size": 2, "trainer.learning_rate": "1e-3", "trainer.lr_scheduler_type": "constant",
    }  # fmt: skip
    words = [part for name, value in settings.items() for part in (f"--{name}", value)]
    said = start([*TORCHRUN, bundled.stages()["train_reward_model"], *words], tmp_path)
    assert "2 processes, DDP (MULTI_CPU)" in said
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")]
    for measure in ("loss", "accuracy", "margin", "min_reward", "max_reward", "mean_reward"):
        first, second = ([entry[measure] for entry in log if measure in entry] for log in logs)
        assert len(first) == 4
        assert second == pytest.approx(first, abs=2e-5), measure
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two")]
    for measure in ("eval_accuracy", "eval_margin", "eval_mean_reward", "eval_without_facts_mean_reward"):
        assert results[1][measure] == pytest.approx(results[0][measure], abs=1e-4), measure
    heads = [load_file(tmp_path / name / "reward_head.safetensors") for name in ("one", "two")]
    assert largest_difference(*heads) < 1e-5
    rows = [make_reward_pair(number).to_row() for number in range(3)]
    first, second = (RewardModel.load(tmp_path / name, device="cpu").score(rows) for name in ("one", "two"))
    assert (first - second).abs().max() < 1e-3
    assert first.std() > 1e-2
