"""PPO on prompts of which some show no picture: two processes, one of them at times without any, make the weights of one."""

import json
from pathlib import Path

import pytest

from prefalign import bundled
from prefalign.config import build
from prefalign.images import encode_png
from prefalign.online.sampler import RolloutBatches
from prefalign.records import Prompt, user_message
from prefalign.store import OutputConfig, write_records
from tests.launching import ROOT, TORCHRUN, history, start
from tests.test_ppo_runs import SCRIPT, saved
from tests.tiny_vlms import picture
from tests.training_runs import largest_difference

RECIPE = bundled.load_stage("train_ppo")
NAMES = ("loss", "objective/scores", "objective/kl", "loss/value_avg", "policy/entropy_avg")


def runs(folder: Path, mode: str, checkpoint: Path) -> list[dict]:
    """A run of an adapter, where features are kept, and one that trains the tower too; two prompts in an iteration."""
    processes = 1 if mode == "one" else 2
    settings = {"use_cpu": True, "max_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
                "per_device_train_batch_size": 2 // processes, "max_new_tokens": 6, "gradient_checkpointing": False}  # fmt: skip
    shared = {"model": {"model_name_or_path": str(checkpoint), "device": "cpu"}, "prompts": str(folder / "prompts"),
              "trainer": settings, "seed": 3,
              "rewards": [{"name": "function", "function": f"{ROOT / 'tests' / 'ppo_rewards.py'}:letters"}]}  # fmt: skip
    lora = {"r": 4, "alpha": 8, "dropout": 0.0}
    return [
        {**shared, "output": str(folder / mode / "lora"), "lora": lora},
        {**shared, "output": str(folder / mode / "tower"), "freeze": []},
    ]


def test_two_processes_of_which_one_sees_no_picture_are_one(tiny_llava, tmp_path):
    prompts = [
        Prompt(f"prompt-{number}", [encode_png(picture(number))] if number % 2 else [],
               [user_message("what is in the picture ?", number % 2)], answer="a dog")
        for number in range(6)
    ]  # fmt: skip
    write_records("test", prompts, output=OutputConfig(tmp_path / "prompts"), record=Prompt, settings={}, seed=0)
    # prompts in the order of the folder are what the sampler numbers; the first iteration gives one process text alone
    asked = [
        [batch[0] % 2 for batch in RolloutBatches(6, prompts=1, visits=1, seed=3, process=process, processes=2)]
        for process in range(2)
    ]
    assert asked[0][0] != asked[1][0]
    for values in runs(tmp_path, "one", tiny_llava):
        RECIPE.main(build(RECIPE.Config, values))
    work = tmp_path / "work"
    work.mkdir()
    (work / "runs.json").write_text(json.dumps(runs(tmp_path, "two", tiny_llava)))
    start([*TORCHRUN, SCRIPT, work], work)
    for kind in ("lora", "tower"):
        one, two = tmp_path / "one" / kind, tmp_path / "two" / kind
        assert largest_difference(saved(one), saved(two)) < 2e-5, kind
        for first, second in zip(history(one), history(two), strict=True):
            for name in NAMES:
                assert second.get(name, 0) == pytest.approx(first.get(name, 0), abs=2e-5), (kind, name)
