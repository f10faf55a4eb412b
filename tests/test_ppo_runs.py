"""Runs of the recipe: resumed as never stopped, and two processes as one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefalign import bundled
from prefalign.config import ConfigError, build
from prefalign.models import ModelConfig, load_model
from tests.launching import CLOCK, ROOT, TORCHRUN, history, needs_deepspeed, start, without
from tests.ppo_distributed_run import claimed
from tests.ppo_runs import write_prompts
from tests.training_runs import largest_difference

RECIPE = bundled.load_stage("train_ppo")
SCRIPT = ROOT / "tests" / "ppo_distributed_run.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llava):
    folder = tmp_path_factory.mktemp("ppo")
    write_prompts(folder / "prompts", 8)
    (folder / "model.json").write_text(json.dumps(str(tiny_llava)))
    for values in runs(folder, "one"):
        RECIPE.main(build(RECIPE.Config, values))
    return folder


def runs(folder, mode, **trainer):
    """A run of an adapter and one of all weights; whole rollouts are minibatches, the same whatever the number of processes."""
    processes = 1 if mode == "one" else 2
    settings = {"use_cpu": True, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
                "num_ppo_epochs": 2, "per_device_train_batch_size": 4 // processes, "num_generations": 2,
                "gradient_accumulation_steps": 2, "max_new_tokens": 6, "gradient_checkpointing": False, "warmup_steps": 1,
                "kl_target": 0.01, **trainer}  # fmt: skip
    shared = {"model": {"model_name_or_path": json.loads((folder / "model.json").read_text()), "device": "cpu"},
              "prompts": str(folder / "prompts"), "trainer": settings, "seed": 3,
              "rewards": [{"name": "function", "function": f"{ROOT / 'tests' / 'ppo_rewards.py'}:letters"}]}  # fmt: skip
    lora = {"r": 4, "alpha": 8, "dropout": 0.1}
    return [
        {**shared, "output": str(folder / mode / "lora"), "lora": lora},
        {**shared, "output": str(folder / mode / "full")},
    ]


def saved(run: Path) -> dict[str, torch.Tensor]:
    """Everything that trains, as it is saved."""
    files = [run / "model.safetensors", run / "adapter_model.safetensors", *(run / "value").glob("*.safetensors")]
    return {f"{file.name}/{file.parent.name == 'value'}/{name}": tensor
            for file in files if file.is_file() for name, tensor in load_file(file).items()}  # fmt: skip


def answers(run: Path) -> list[dict]:
    return [json.loads(line) for file in sorted((run / "rollouts").iterdir()) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, kind):
    values = next(values for values in runs(folder, "one") if values["output"].endswith(kind))
    whole, again = Path(values["output"]), folder / "one" / f"{kind}-resumed"
    claimed(whole, again)
    RECIPE.main(build(RECIPE.Config, {**values, "output": str(again)}))
    clock = CLOCK | {f"time/{name}" for name in ("rollout", "scoring", "forwards", "updates")}
    assert clock - {name for entry in history(whole) for name in entry} <= CLOCK
    assert without(clock, history(again)) == without(clock, history(whole))
    one, two = saved(whole), saved(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert answers(again) == answers(whole)[8:]
    state = [json.loads((run / "ppo_state.json").read_text()) for run in (whole, again)]
    assert state[0] == state[1]
    assert state[0]["kl_coef"] != 0.05
    before = saved(whole / "checkpoint-2")
    assert any(not torch.equal(before[name], one[name]) for name in one)


def test_a_finished_run_is_a_model_like_any_other(folder, capsys):
    values = runs(folder, "one")[0]
    run = Path(values["output"])
    assert {"adapter_model.safetensors", "processor_config.json", "prefalign_config.yaml", "rows.json", "all_results.json",
            "prompts_manifest.json", "ppo_state.json"} <= {file.name for file in run.iterdir()}  # fmt: skip
    model = load_model(ModelConfig(str(run), device="cpu"))
    assert set(model.peft_config) == {"default"}
    RECIPE.main(build(RECIPE.Config, values))
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_a_run_on_an_adapter_goes_on_with_it_and_keeps_its_start_as_reference(folder, tmp_path):
    """Nothing but the adapter's start gives a KL of 0 at the first step."""
    values = runs(folder, "one", max_steps=2)[0]
    model = {"model_name_or_path": str(folder / "one" / "lora"), "device": "cpu"}
    values |= {"model": model, "output": str(tmp_path / "on")}
    RECIPE.main(build(RECIPE.Config, values))
    first = history(tmp_path / "on")[0]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert "alarms/kl_at_start" not in first
    plain = history(folder / "one" / "lora")[0]
    assert first["objective/entropy"] != plain["objective/entropy"]
    lora = {**values["lora"], "r": 8}
    with pytest.raises(ConfigError, match="lora.r is 8 and the adapter's 4"):
        RECIPE.main(build(RECIPE.Config, {**values, "lora": lora, "output": str(tmp_path / "other")}))


@pytest.mark.parametrize("mode", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_processes_are_one(folder, mode):
    more = {"deepspeed": "configs/deepspeed/zero2.json"} if mode == "zero2" else {}
    todo = runs(folder, mode, **more)
    todo.append({**todo[0], "copy_from": todo[0]["output"], "output": todo[0]["output"] + "-resumed"})
    work = folder / f"work-{mode}"
    work.mkdir()
    (work / "runs.json").write_text(json.dumps(todo))
    start([*TORCHRUN, SCRIPT, work], work)
    for kind in ("lora", "full", "lora-resumed"):
        one, two = folder / "one" / kind.removesuffix("-resumed"), folder / mode / kind
        assert largest_difference(saved(one), saved(two)) < 2e-5
        pairs = zip(history(one), history(two), strict=True)
        for first, second in pairs:
            for name in (
                "loss",
                "objective/scores",
                "objective/kl",
                "objective/kl_coef",
                "val/error",
                "loss/value_avg",
            ):
                assert (name in first) == (name in second)
                assert second.get(name, 0) == pytest.approx(first.get(name, 0), abs=2e-5), name
    said = sorted(answers(folder / mode / "lora"), key=lambda line: line["id"])
    alone = sorted(answers(folder / "one" / "lora"), key=lambda line: line["id"])
    assert [line["text"] for line in said] == [line["text"] for line in alone]
    assert len(list((folder / mode / "lora" / "rollouts").glob("*-1.jsonl"))) == 2
