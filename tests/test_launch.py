"""How runs are started and end: launch profiles, what is refused before anything loads, kill -9, and Slurm."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec

import pytest
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from prefalign import bundled
from prefalign.config import ConfigError, build
from prefalign.training.arguments import training_arguments
from prefalign.training.distributed import Processes, prepare_processes, running_processes
from prefalign.training.runs import RunError
from tests.launching import (
    CLOCK,
    ENVIRONMENT,
    ROOT,
    WARM,
    assert_same_run,
    history,
    needs_deepspeed,
    saved,
    start,
    without,
)
from tests.training_runs import largest_difference, write_pairs

RECIPE = bundled.load_stage("train_preference")
SFT = bundled.load_stage("train_sft")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 8)


def recipe_values(model, pairs, output, **trainer):
    settings = {"use_cpu": True, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
    return {"model": {"model_name_or_path": str(model), "device": "cpu"}, "pairs": str(pairs), "output": str(output),
            "trainer": settings | trainer}  # fmt: skip


@pytest.mark.parametrize("recipe", [RECIPE, SFT], ids=["preference", "sft"])
def test_fsdp_on_a_cpu_is_refused(recipe, pairs, monkeypatch, tmp_path):
    """accelerate would train DDP (MULTI_CPU) and end well; a run of ours stops before it loads anything."""
    values = recipe_values("no/model", pairs, tmp_path / "run")
    values["data" if recipe is SFT else "pairs"] = values.pop("pairs")
    message = (
        "FSDP is asked for by {} and this run is on a CPU: .* would train plain DDP .* configs/deepspeed/zero3.json"
    )
    with pytest.raises(ConfigError, match=message.format("`trainer.fsdp`")):
        recipe.main(build(recipe.Config, values | {"trainer": {"fsdp": True, "use_cpu": True}}))
    arguments, _, _ = launch_arguments("fsdp2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", prepare_multi_gpu_env(arguments)["ACCELERATE_USE_FSDP"])
    with pytest.raises(ConfigError, match=message.format("the profile of `accelerate launch`")):
        recipe.main(build(recipe.Config, values))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", [RECIPE, SFT], ids=["preference", "sft"])
def test_both_recipes_keep_a_run_to_its_processes(recipe, pairs, tiny_llava, tmp_path):
    """The states tell how many there were, `processes.json` of what kind."""
    run = tmp_path / "run"
    values = recipe_values(tiny_llava, pairs, run, max_steps=1, save_steps=1)
    values["data" if recipe is SFT else "pairs"] = values.pop("pairs")
    recipe.main(build(recipe.Config, values))
    assert json.loads((run / "processes.json").read_text()) == {
        "distributed_type": "NO",
        "num_processes": 1,
        "zero_stage": None,
    }
    (run / "all_results.json").unlink()
    (run / "processes.json").write_text('{"distributed_type": "DEEPSPEED", "num_processes": 1, "zero_stage": 2}')
    message = "holds checkpoints of a run on 1 process, DeepSpeed ZeRO-2, and this is 1 process: .* Start it as before"
    with pytest.raises(RunError, match=message):
        recipe.main(build(recipe.Config, values))
    for rank in (0, 1):
        (run / "checkpoint-1" / f"rng_state_{rank}.pth").touch()
    (run / "checkpoint-1" / "rng_state.pth").unlink()
    weights = (run / "checkpoint-1" / "model.safetensors").read_bytes()
    with pytest.raises(
        RunError, match="holds checkpoint-1 of a run on 2 processes, and this is 1 process: .* overwrite it"
    ):
        recipe.main(build(recipe.Config, values))
    assert (run / "checkpoint-1" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("recipe", [RECIPE, SFT], ids=["preference", "sft"])
def test_both_recipes_prepare_their_processes(recipe, pairs, tmp_path, monkeypatch):
    """Before the model is looked for: the one named here does not exist."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    values = recipe_values("no/model", pairs, tmp_path / "run", deepspeed="deepspeed/zero3", fsdp=True)
    values["data" if recipe is SFT else "pairs"] = values.pop("pairs")
    with pytest.raises(ConfigError, match="two ways .*: DeepSpeed by `trainer.deepspeed` and FSDP by `trainer.fsdp`"):
        recipe.main(build(recipe.Config, values))


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


def wait_for(path, process):
    """Whether something appears there while a process runs, looked for every millisecond."""
    end = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    return path.exists()


def test_killed_and_started_again_is_the_straight_run(pairs, tiny_llava, tmp_path):
    """kill -9 while a checkpoint is written; the same command goes on by itself."""
    steps = {"max_steps": 24, "per_device_train_batch_size": 2, "save_total_limit": 2}
    values = recipe_values(tiny_llava, pairs, "", **steps)
    RECIPE.main(build(RECIPE.Config, values | {"output": str(tmp_path / "straight")}))
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(json.dumps(values | {"output": str(run)}))
    command = [sys.executable, str(ROOT / "recipes" / "train_preference.py"), "--config", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for(run / "checkpoint-6", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "all_results.json").exists()
    said = start([WARM / "python", *command[1:]], tmp_path)
    assert re.search(r"going on from checkpoint-[46]$", said, re.MULTILINE)
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


def test_slurm_script_trains_on_two_nodes(slurm, pairs, tiny_llava, tmp_path):
    profile, kind = ("zero2", "DeepSpeed ZeRO-2") if find_spec("deepspeed") else ("ddp", "DDP (MULTI_CPU)")
    script = bundled.find("slurm/train_preference")
    subprocess.run(["bash", "-n", script], check=True)
    values = recipe_values(tiny_llava, pairs, tmp_path / "one", per_device_train_batch_size=4)
    RECIPE.main(build(RECIPE.Config, values))
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    words = [
        "--config",
        tmp_path / "run.yaml",
        "--output",
        tmp_path / "two",
        "--trainer.per_device_train_batch_size",
        "2",
    ]
    output = start(["bash", script, *words], tmp_path, PROFILE=profile, **slurm)
    assert f"8 pairs, all fit; 2 processes, {kind}" in output
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_slurm_script_asks_to_be_queued_again_and_refuses_unknown_profiles(slurm, tmp_path):
    script = ["bash", str(bundled.find("slurm/train_preference"))]
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\ntouch started\nexec sleep 20\n")
    environment = ENVIRONMENT | slurm
    process = subprocess.Popen(script, cwd=tmp_path, env=environment, start_new_session=True)
    assert wait_for(tmp_path / "started", process)
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=60)  # or until the stand-in for srun ends by itself
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    refused = subprocess.run(
        script, cwd=tmp_path, env=environment | {"PROFILE": "zero4"}, capture_output=True, text=True
    )
    assert (refused.returncode, refused.stderr) == (2, "PROFILE=zero4 is not one of ddp, zero2, zero3.\n")
