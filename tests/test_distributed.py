"""Two processes are one, resume as one, and run what was asked for: torchrun and accelerate on a CPU, DDP, ZeRO-2, ZeRO-3."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from prefalign import bundled
from prefalign.config import ConfigError, build
from prefalign.records import Pair
from prefalign.store import OutputConfig, write_records
from prefalign.training.arguments import training_arguments
from prefalign.training.distributed import Processes, claim_processes, prepare_processes, running_processes
from prefalign.training.runs import RunError
from tests.distributed_run import claimed
from tests.training_runs import largest_difference, make_pair, make_trainer, write_pairs

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
RECIPE = bundled.load_stage("train_preference")
CLOCK = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
CLOCK |= {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs prefalign[deepspeed]")
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
}
MODES = {
    "ddp": {"distributed_type": "MULTI_CPU", "num_processes": 2, "zero_stage": None, "backend": "gloo"},
    "zero2": {"distributed_type": "DEEPSPEED", "num_processes": 2, "zero_stage": 2, "backend": "gloo"},
    "zero3": {"distributed_type": "DEEPSPEED", "num_processes": 2, "zero_stage": 3, "backend": "gloo"},
}
with_deepspeed = [pytest.param(mode, marks=needs_deepspeed) for mode in ("zero2", "zero3")]
modes = pytest.mark.parametrize("mode", ["ddp", *with_deepspeed])
BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True, "per_device_eval_batch_size": 2}  # fmt: skip
MIXED = {"ddp": ("full", "lora"), "zero2": ("lora",), "zero3": ()}
"""Where one process may have a picture in its batch and the other none: ZeRO waits for ever for a tower that only one uses."""


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
          for kind in MIXED.get(mode, ("full", "lora"))),
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


def start(command, folder, **environment):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=folder,
                          env=ENVIRONMENT | environment, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
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
                launcher = [BIN / "accelerate", "launch", "--config_file", bundled.find("accelerate/zero3"),
                            "--num_processes", "2", "--main_process_port", "0"]  # fmt: skip
            output = start([*launcher, SCRIPT, work], work)
            started[mode] = (output, json.loads((work / "seen.json").read_text()))
        return started[mode]

    return launch


def history(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def without(keys: set[str], entries: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in keys} for entry in entries]


def saved(run: Path) -> dict[str, torch.Tensor]:
    files = [run / name for name in ("model.safetensors", "adapter_model.safetensors") if (run / name).is_file()]
    assert len(files) == 1
    return load_file(files[0])


def assert_same_run(one: Path, two: Path) -> None:
    """Losses, gradient norms and weights, to the rounding of sums in another order."""
    entries = [[entry for entry in history(run) if "loss" in entry] for run in (one, two)]
    assert len(entries[0]) == len(entries[1]) >= 3
    for first, second in zip(*entries, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=5e-6)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    assert largest_difference(saved(one), saved(two)) < 1e-5
    assert min(tensor.numel() for tensor in saved(two).values()) > 0


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


@modes
def test_text_rows_and_picture_rows_meet(mode, launched, folder):
    """Each step one process has a picture and the other none, by turns."""
    launched(mode)
    for kind in MIXED[mode]:
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


def test_fsdp_on_a_cpu_is_refused(folder, monkeypatch, tmp_path):
    """accelerate would train DDP (MULTI_CPU) and end well; a run of ours stops before it loads anything."""
    values = runs(folder, "one")[0] | {"output": str(tmp_path / "run"), "model": {"model_name_or_path": "no/model"}}
    message = (
        "FSDP is asked for by {} and this run is on a CPU: .* would train plain DDP .* configs/deepspeed/zero3.json"
    )
    with pytest.raises(ConfigError, match=message.format("`trainer.fsdp`")):
        RECIPE.main(build(RECIPE.Config, values | {"trainer": {"fsdp": True, "use_cpu": True}}))
    arguments, _, _ = launch_arguments("fsdp2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", prepare_multi_gpu_env(arguments)["ACCELERATE_USE_FSDP"])
    with pytest.raises(ConfigError, match=message.format("the profile of `accelerate launch`")):
        RECIPE.main(build(RECIPE.Config, values))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_prepared_is_refused(monkeypatch):
    both = {"fsdp": True, "deepspeed": "deepspeed/zero3"}
    with pytest.raises(ConfigError, match="two ways .*: DeepSpeed by `trainer.deepspeed` and FSDP by `trainer.fsdp`"):
        prepare_processes(both)
    monkeypatch.setattr("prefalign.training.distributed.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"DeepSpeed is asked for .* not installed. Run `pip install prefalign\[deepspeed\]`"
    ):
        prepare_processes({"deepspeed": "deepspeed/zero3"})


@needs_deepspeed
def test_deepspeed_needs_a_launcher_and_a_file_that_is_there(monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="nothing says which of the processes this is.* `torchrun --nproc_per_node 1"):
        prepare_processes({"deepspeed": "deepspeed/zero3"})
    with pytest.raises(ConfigError, match="file called 'deepspeed/zero4'; did you mean 'deepspeed/zero"):
        training_arguments({"deepspeed": "deepspeed/zero4"}, output=tmp_path, seed=0)


def test_what_runs_instead_is_named():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    assert running_processes(accelerator, {}) == Processes("NO", 1)
    with pytest.raises(
        RunError, match="FSDP is asked for by `trainer.fsdp`, and what runs is 1 process: .* shared out"
    ):
        running_processes(accelerator, {"fsdp": True})
    words = [str(Processes(*values)) for values in (("NO", 1), ("MULTI_GPU", 4), ("FSDP", 2), ("DEEPSPEED", 8, 3))]
    assert words == ["1 process", "4 processes, DDP (MULTI_GPU)", "2 processes, FSDP", "8 processes, DeepSpeed ZeRO-3"]


def test_a_run_keeps_its_processes(launched, folder, tmp_path):
    """One process cannot go on with the optimizer and random states of two; without a checkpoint it may begin."""
    launched("ddp")
    values = runs(folder, "ddp")[0] | {"output": str(tmp_path / "run")}
    claimed(folder / "ddp" / "full", tmp_path / "run")
    message = "holds checkpoints of a run on 2 processes, DDP .MULTI_CPU., and this is 1 process: .* Start it as before"
    with pytest.raises(RunError, match=message):
        RECIPE.main(build(RECIPE.Config, values))
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    claim_processes(tmp_path / "run", Processes("NO", 1), main_process=True)
    claim_processes(tmp_path / "run", Processes("NO", 1), main_process=False)
    assert json.loads((tmp_path / "run" / "processes.json").read_text())["num_processes"] == 1


def launch_arguments(profile):
    """What `accelerate launch` makes of a profile, by its own loader and checks."""
    command = ["--config_file", str(bundled.find(f"accelerate/{profile}")), "--num_processes", "2", "train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))


@pytest.mark.parametrize(
    "profile", [name.split("/")[1] for name in bundled.profiles() if name.startswith("accelerate/")]
)
def test_profiles_are_what_accelerate_reads(profile):
    arguments, read, _ = launch_arguments(profile)
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert read.distributed_type == DistributedType(kinds[profile])
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == tuple(
        kinds[profile] == kind for kind in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    )
    known = vars(launch_command_parser().parse_args(["train.py"]))
    assert not {*read.fsdp_config, *read.deepspeed_config} - known.keys()
    assert arguments.mixed_precision == "no"  # the recipe's to say
    header = bundled.find(f"accelerate/{profile}").read_text().split("\n\n")[0]
    assert f"accelerate launch --config_file configs/accelerate/{profile}.yaml --num_processes" in header


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_leave_everything_else_to_the_recipe(stage, tmp_path):
    from accelerate.utils import DeepSpeedPlugin

    file = bundled.find(f"configs/deepspeed/zero{stage}.json")
    assert launch_arguments(f"zero{stage}")[0].deepspeed_config_file == f"configs/deepspeed/{file.name}"
    values = json.loads(file.read_text())
    assert DeepSpeedPlugin(hf_ds_config=dict(values)).zero_stage == stage
    optimization = values.pop("zero_optimization")
    assert optimization.pop("stage") == stage
    assert optimization == ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})
    assert {setting if isinstance(setting, str) else setting["enabled"] for setting in values.values()} == {"auto"}


def test_killed_and_started_again_is_the_straight_run(folder, tiny_llava, tmp_path):
    """kill -9 while a checkpoint is written; the same command goes on by itself."""
    settings = {"use_cpu": True, "max_steps": 24, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
                "per_device_train_batch_size": 2, "save_total_limit": 2}  # fmt: skip
    values = {"model": {"model_name_or_path": str(tiny_llava), "device": "cpu"}, "pairs": str(folder / "pairs"),
              "trainer": settings}  # fmt: skip
    RECIPE.main(build(RECIPE.Config, values | {"output": str(tmp_path / "straight")}))
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(json.dumps(values | {"output": str(run)}))
    command = [sys.executable, str(ROOT / "recipes" / "train_preference.py"), "--config", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (run / "checkpoint-6").is_dir() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "all_results.json").exists()
    assert re.search(r"going on from checkpoint-[46]$", start(command, tmp_path), re.MULTILINE)
    assert without(CLOCK, history(run)) == without(CLOCK, history(tmp_path / "straight"))
    assert largest_difference(saved(run), saved(tmp_path / "straight")) == 0.0


SLURM = {
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "1",
    "SLURM_CPUS_PER_TASK": "1",
}
SRUN = """#!/bin/bash
shift
for node in 0 1; do SLURM_NODEID=$node "$@" & nodes+=("$!"); done
for node in "${nodes[@]}"; do wait "$node" || failed=1; done
exit "${failed:-0}"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$@" >> requeued; else printf 'localhost\\nlocalhost\\n'; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """Slurm's commands as two nodes of one machine, which are the two processes here; and the job's environment."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), ENVIRONMENT["PATH"]])
    return SLURM | {"PATH": path, "SLURM_JOB_ID": str(os.getpid())}


def test_slurm_script_trains_on_two_nodes(slurm, folder, tmp_path):
    sharding = "zero2" if find_spec("deepspeed") else "ddp"
    script = bundled.find("slurm/train_preference")
    subprocess.run(["bash", "-n", script], check=True)
    values = runs(folder, "slurm")[0] | {"output": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    words = ["--config", tmp_path / "run.yaml", "--trainer.logging_steps", "1"]
    output = start(["bash", script, *words], tmp_path, PROFILE=sharding, **slurm)
    assert (
        f"8 pairs, all fit; 2 processes, {'DeepSpeed ZeRO-2' if sharding == 'zero2' else 'DDP (MULTI_CPU)'}" in output
    )
    assert_same_run(folder / "one" / "full", tmp_path / "run")


def test_slurm_script_asks_to_be_queued_again_and_refuses_unknown_profiles(slurm, tmp_path):
    script = ["bash", str(bundled.find("slurm/train_preference"))]
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\ntouch started\nexec sleep 20\n")
    environment = ENVIRONMENT | slurm
    process = subprocess.Popen(script, cwd=tmp_path, env=environment, start_new_session=True)
    while not (tmp_path / "started").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=20)
    os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    refused = subprocess.run(
        script, cwd=tmp_path, env=environment | {"PROFILE": "zero4"}, capture_output=True, text=True
    )
    assert (refused.returncode, refused.stderr) == (2, "PROFILE=zero4 is not one of ddp, zero2, zero3.\n")
