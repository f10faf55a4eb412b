"""Two processes are one, resume as one, and run what was asked for: torchrun and accelerate on a CPU, DDP, ZeRO-2, ZeRO-3."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.integrations import HfDeepSpeedConfig

from prefalign import bundled
from prefalign.config import ConfigError, build
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.records import Pair
from prefalign.store import OutputConfig, write_records
from prefalign.training.arguments import training_arguments
from prefalign.training.distributed import Processes, claim_processes
from prefalign.training.pairs import load_pairs
from prefalign.training.preference import PreferenceTrainer
from prefalign.training.runs import RunError
from tests.distributed_run import claimed
from tests.launching import (
    CLOCK,
    ROOT,
    TORCHRUN,
    WARM,
    assert_same_run,
    history,
    needs_deepspeed,
    saved,
    start,
    without,
)
from tests.training_runs import largest_difference, make_pair, make_trainer, write_pairs

RECIPE = bundled.load_stage("train_preference")
MODES = {
    "ddp": {"distributed_type": "MULTI_CPU", "num_processes": 2, "zero_stage": None, "backend": "gloo"},
    "zero2": {"distributed_type": "DEEPSPEED", "num_processes": 2, "zero_stage": 2, "backend": "gloo"},
    "zero3": {"distributed_type": "DEEPSPEED", "num_processes": 2, "zero_stage": 3, "backend": "gloo"},
}
with_deepspeed = [
    pytest.param("zero2", marks=needs_deepspeed),
    pytest.param("zero3", marks=needs_deepspeed),
]
modes = pytest.mark.parametrize("mode", ["ddp", *with_deepspeed])
BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True, "per_device_eval_batch_size": 2}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llava, tiny_idefics3):
    """Runs in one process, which those in two have to equal: `one/full`, `one/lora`, `one/best`, `one/mixed-...`."""
    folder = tmp_path_factory.mktemp("distributed")
    write_pairs(folder / "pairs", 8)
    rows = [make_pair(number, images=int(number % 4 in (1, 2))) for number in range(8)]
    rows = [replace(row, rejected_images=[]) for row in rows]
    write_records("test", rows, output=OutputConfig(folder / "mixed"), record=Pair, settings={}, seed=0)
    (folder / "models.json").write_text(json.dumps({"llava": str(tiny_llava), "idefics3": str(tiny_idefics3)}))
    for values in runs(folder, "one"):
        RECIPE.main(build(RECIPE.Config, values))
    return folder


def runs(folder, mode, *, deepspeed=None):
    """Configs of the runs of a mode, with the same global batches whatever the number of processes."""
    models = json.loads((folder / "models.json").read_text())
    processes = 1 if mode == "one" else 2

    def run(name, model, batch, pairs="pairs", **more):
        settings = {"use_cpu": True, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
                    "warmup_steps": 2, "per_device_train_batch_size": batch // processes, "disable_dropout": False}  # fmt: skip
        settings |= {"deepspeed": deepspeed} if deepspeed else {}
        settings |= more.pop("trainer", {})
        return {"model": {"model_name_or_path": models[model], "device": "cpu"}, "pairs": str(folder / pairs),
                "output": str(folder / mode / name), "trainer": settings, "seed": 3, **more}  # fmt: skip

    lora = {"r": 4, "alpha": 8, "dropout": 0.0}
    evaluated = {"eval_pairs": str(folder / "pairs"), "trainer": BEST}
    in_order = {"max_steps": 3, "train_sampling_strategy": "sequential", "save_strategy": "no"}
    accumulated = {"gradient_accumulation_steps": 2, "gradient_checkpointing": False}
    return [
        run("full", "llava", 4),
        run("lora", "idefics3", 2, lora=lora, trainer=accumulated),
        run("best", "llava", 4, **evaluated),
        *(run(f"mixed-{kind}", "llava", 2, "mixed", trainer=in_order, lora=lora if kind == "lora" else None)
          for kind in ("full", "lora")),
    ]  # fmt: skip


def resumed(folder, mode, **more):
    """The first two runs again, from the second step on."""
    again = runs(folder, mode, **more)[:2]
    return [values | {"copy_from": values["output"], "output": values["output"] + "-resumed"} for values in again]


def on_an_adapter(folder, mode):
    """All weights, from the LoRA run's end."""
    values = runs(folder, mode)[0]
    model = {"model_name_or_path": str(folder / "one" / "lora"), "device": "cpu"}
    return values | {"model": model, "output": str(folder / mode / "merged")}


SCRIPT = ROOT / "tests" / "distributed_run.py"


@pytest.fixture(scope="module")
def launched(folder):
    """Start a mode once: torchrun for DDP and ZeRO-2, `accelerate launch` with its profile for ZeRO-3, from a foreign folder."""
    started = {}

    def launch(mode):
        if mode not in started:
            deepspeed = "configs/deepspeed/zero2.json" if mode == "zero2" else None
            work = folder / f"work-{mode}"
            work.mkdir()
            todo = runs(folder, mode, deepspeed=deepspeed) + resumed(folder, mode, deepspeed=deepspeed)
            todo += [on_an_adapter(folder, mode)] if mode == "zero3" else []
            (work / "runs.json").write_text(json.dumps(todo))
            launcher = TORCHRUN
            if mode == "zero3":
                launcher = [WARM / "accelerate", "launch", "--config_file", bundled.find("accelerate/zero3"),
                            "--num_processes", "2", "--main_process_port", "0"]  # fmt: skip
            output = start([*launcher, SCRIPT, work], work)
            started[mode] = (output, json.loads((work / "seen.json").read_text()))
        return started[mode]

    return launch


@modes
def test_what_was_asked_for_runs(mode, launched, folder):
    """As the run itself sees it, as it says at its start, and as its folder keeps it."""
    output, seen = launched(mode)
    assert seen[: len(runs(folder, mode)) + 2] == [MODES[mode]] * (len(runs(folder, mode)) + 2)
    line = {"ddp": "2 processes, DDP (MULTI_CPU)", "zero2": "2 processes, DeepSpeed ZeRO-2"}
    assert f"8 pairs, all fit; {line.get(mode, '2 processes, DeepSpeed ZeRO-3')}" in output
    kept = json.loads((folder / mode / "full" / "processes.json").read_text())
    assert kept == {key: value for key, value in MODES[mode].items() if key != "backend"}


@modes
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_are_one(mode, kind, launched, folder):
    launched(mode)
    assert_same_run(folder / "one" / kind, folder / mode / kind)


@modes
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_is_the_straight_one(mode, kind, launched, folder):
    output, _ = launched(mode)
    straight, again = folder / mode / kind, folder / mode / f"{kind}-resumed"
    assert output.count("going on from checkpoint-2") == 2
    ignored = CLOCK | ({"total_flos"} if mode == "zero3" else set())  # transformers counts the parameters at hand
    assert without(ignored, history(again)) == without(ignored, history(straight))
    assert largest_difference(saved(again), saved(straight)) == 0.0
    assert largest_difference(saved(again), saved(straight / "checkpoint-2")) > 1e-5


@modes
def test_the_best_checkpoint_comes_back(mode, launched, folder):
    """The loss falls and the highest is asked for, so the first checkpoint is what is saved, under LLaVA's Hub names."""
    launched(mode)
    run = folder / mode / "best"
    state = json.loads((run / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-1"
    assert largest_difference(saved(run), saved(run / "checkpoint-1")) == 0.0
    assert largest_difference(saved(run), saved(run / "checkpoint-3")) > 1e-4
    assert largest_difference(saved(run), saved(folder / "one" / "best")) < 1e-5
    best = [entry["eval_loss"] for entry in state["log_history"] if entry.get("step") == 1 and "eval_loss" in entry]
    assert json.loads((run / "all_results.json").read_text())["eval_loss"] == pytest.approx(best[0], abs=1e-6)


@modes
def test_weights_are_known_by_one_fingerprint(mode, launched, folder):
    """ZeRO-3 cuts every tensor: a fingerprint of the cut ones would be that of any model of these shapes."""
    launched(mode)
    base = [json.loads((folder / name / "full" / "base.json").read_text()) for name in ("one", mode)]
    assert base[0] == base[1]


def test_all_weights_train_from_an_adapter(folder):
    """Merged first; the reference is the merged model."""
    RECIPE.main(build(RECIPE.Config, on_an_adapter(folder, "one")))
    entries = history(folder / "one" / "merged")
    assert entries[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert entries[3]["loss"] < entries[0]["loss"]
    assert (folder / "one" / "merged" / "model.safetensors").is_file()


@needs_deepspeed
def test_an_adapter_is_not_merged_into_shared_weights(launched):
    _, seen = launched("zero3")
    assert re.match(
        "model: an adapter cannot be merged .* ZeRO-3.* Merge and save the model first", seen[-1]["refused"]
    )


@needs_deepspeed
def test_shared_weights_are_no_reference_of_their_own(folder, tiny_llava, tmp_path):
    """TRL would load the model's path instead, whatever the policy is."""
    config = ModelConfig(str(tiny_llava), device="cpu")
    model, processor = load_model(config), load_processor(config)
    arguments, rows = training_arguments({}, output=tmp_path, seed=0), load_pairs(folder / "pairs")
    enabled = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    message = "reference is 'online' and all weights train under DeepSpeed ZeRO-3.*Set reference to 'cached', or give"
    with pytest.raises(ConfigError, match=message):
        PreferenceTrainer(model, args=arguments, train_dataset=rows, processing_class=processor)
    del enabled


@modes
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_text_rows_and_picture_rows_meet(mode, kind, launched, folder):
    """Each step one process has a picture and the other none, by turns."""
    launched(mode)
    assert_same_run(folder / "one" / f"mixed-{kind}", folder / mode / f"mixed-{kind}")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_eight_small_batches_are_one_large(lora, folder, tiny_llava, tmp_path):
    """In one process: losses, gradient norms and weights."""
    for size, steps in ((8, 1), (1, 8)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        trainer = make_trainer(tiny_llava, folder / "pairs", tmp_path / str(size), lora=lora, **settings)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
    assert_same_run(tmp_path / "8", tmp_path / "1")


def test_a_run_keeps_its_processes(launched, folder, tmp_path):
    """One process cannot go on with the optimizer and random states of two; without a checkpoint it may begin."""
    launched("ddp")
    values = runs(folder, "ddp")[0] | {"output": str(tmp_path / "run")}
    claimed(folder / "ddp" / "full", tmp_path / "run")
    with pytest.raises(
        RunError, match="holds checkpoint-2 of a run on 2 processes, and this is 1 process: .* Start it as"
    ):
        RECIPE.main(build(RECIPE.Config, values))
    message = "holds checkpoints of a run on 2 processes, DDP .MULTI_CPU., and this is 2 processes, DeepSpeed ZeRO-2: "
    with pytest.raises(RunError, match=message):
        claim_processes(tmp_path / "run", Processes("DEEPSPEED", 2, 2), main_process=True)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    claim_processes(tmp_path / "run", Processes("NO", 1), main_process=True)
    claim_processes(tmp_path / "run", Processes("NO", 1), main_process=False)
    assert json.loads((tmp_path / "run" / "processes.json").read_text())["num_processes"] == 1
