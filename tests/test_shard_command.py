"""How the command takes `--shard` and `--executor`, and a Slurm array that does a shard in each task."""

import os
import re
import signal
import subprocess
import time

import pytest

from prefalign import bundled, cli, config
from prefalign.execution import LeftToOthers, Options, Shard, take_options
from tests.launching import ENVIRONMENT
from tests.shared_out import files, settings, start, write_rows, write_stage

SRUN = '#!/bin/bash\nexec "$@"\n'

ARRAY = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_JOB_ID": "71",
         "SLURM_CPUS_PER_TASK": "1"}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "in")


@pytest.fixture
def stage(tmp_path):
    return bundled.load_stage(str(write_stage(tmp_path)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--shard", "3/3"], "--shard 3/3: give I/N with I from 0 to N - 1, as in `--shard 0/8`"),
        (["--shard=one"], "--shard one: give I/N"),
        (["--shard", "0/2", "--shard", "1/2"], "--shard is given twice"),
        (["--shard", "--seed", "1"], "--shard needs a value. do the blocks I, I [+] N"),
        (["--shard", "0/2", "--executor", "ray"], "two ways to share out the same blocks"),
        (["--executor", "dask"], "--executor dask: there are `local` and `ray`"),
        (["--actors", "4"], "--actors says something of Ray's actors, and nothing asks for them. Add `--executor ray`"),
        (["--executor", "ray", "--actors", "0"], "--actors 0: give a number of at least 1"),
        (["--executor", "ray", "--actor-gpus", "half"], "--actor-gpus half: give a number of at least 0"),
    ],
)
def test_options_that_cannot_be(given, message):
    with pytest.raises(config.ConfigError, match=message):
        take_options(given)


def test_options_are_taken_out_of_the_settings():
    options, rest = take_options(["--config", "x", "--shard=2/5", "--seed", "3"])
    assert (options, rest) == (Options(Shard(2, 5)), ["--config", "x", "--seed", "3"])
    options, rest = take_options(["--executor", "ray", "--actors", "4", "--actor-gpus", "0.5", "--ray-address", "auto"])
    assert (options, rest) == (Options(executor="ray", actors=4, actor_gpus=0.5, ray_address="auto"), [])


def test_the_command_tells_of_shards_and_says_which_stages_have_none(rows, tmp_path, capsys):
    file = str(write_stage(tmp_path))
    assert cli.main(["run", file, "--help"]) == 0
    assert "--shard I/N" in capsys.readouterr().out
    command = [
        "run",
        file,
        "--data.path",
        str(rows),
        "--output.path",
        str(tmp_path / "out"),
        "--output.block_size",
        "8",
    ]
    assert cli.main([*command, "--shard", "1/2"]) == 0
    assert "shard 1/2 of capitals has done its blocks; 2 of 3" in capsys.readouterr().out
    assert cli.main([*command, "--shard", "0/2"]) == 0
    dropped = "2 duplicate, 1 bad_json, 1 missing_image"
    failed = f"(2 failed: {tmp_path / 'out' / 'quarantine'} says why)"
    assert f"capitals: 22 rows in, 18 rows out; dropped: {dropped} {failed}\n" in capsys.readouterr().out
    assert "shard" not in (tmp_path / "out" / "config.json").read_text()
    assert cli.main(["run", "merge_adapter", "--help"]) == 0
    assert "--shard" not in capsys.readouterr().out
    assert cli.main(["run", "merge_adapter", "--adapter", "a", "--output", "b", "--shard", "0/2"]) == 1
    assert "merge_adapter does not work by blocks" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["plan", "doctor"])
@pytest.mark.parametrize("given", [["--shard", "0/2"], ["--executor=ray", "--actors", "2"]])
def test_what_is_told_of_a_training_knows_no_blocks(verb, given, capsys):
    assert cli.main([verb, "train_preference", *given]) == 1
    assert re.match("error: --shard and --executor share out .* and train_preference is a training: leave them out. It",
                    capsys.readouterr().err)  # fmt: skip


def test_a_plan_is_of_one_process(rows, tmp_path, capsys):
    file = str(write_stage(tmp_path))
    command = ["plan", file, "--data.path", str(rows), "--output.path", str(tmp_path / "out"), "--rows", "2"]
    assert cli.main(command) == 0
    plain = capsys.readouterr()
    assert cli.main([*command, "--shard", "0/4"]) == 0
    shared = capsys.readouterr()
    columns = [[line.split()[:4] for line in said.out.splitlines()] for said in (plain, shared)]
    assert columns[0] == columns[1] != []
    assert "capitals: --shard and --executor are left out: the plan is of all rows, in one process." in shared.err
    assert "left out" not in plain.err


@pytest.fixture
def slurm(tmp_path):
    """A command that does a task of an array on this machine: Slurm's own commands are stand-ins."""
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/bash\necho "$@" >> requeued\n')):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), ENVIRONMENT["PATH"]])

    def go(task, *words, **environment):
        return subprocess.Popen(["bash", str(bundled.find("slurm/generate")), *map(str, words)], cwd=tmp_path, text=True,
                                env=ENVIRONMENT | ARRAY | {"PATH": path, "SLURM_ARRAY_TASK_ID": str(task)} | environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip

    return go


def test_a_slurm_array_does_a_shard_in_each_task(slurm, stage, rows, tmp_path):
    start(stage, settings(stage, rows, tmp_path / "straight"))
    words = [tmp_path / "capitals.py", "--data.path", rows, "--output.path", tmp_path / "out", "--output.block_size", 3]
    said = slurm(2, *words).communicate()
    assert "shard 2/3 of capitals has done its blocks; 6 of 8" in said[0], said
    with pytest.raises(LeftToOthers):
        start(stage, settings(stage, rows, tmp_path / "out"), 0, 3)
    one = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "1"}
    for gaps in (one, {"SLURM_ARRAY_TASK_COUNT": "2"}):
        again = slurm(1, *words, **gaps)
        assert re.search(
            "The array has . tasks from . to 2?.*, and not every number from 0: .* set SHARDS", again.communicate()[1]
        )
        assert again.returncode == 2
    last = slurm(1, *words, SHARDS="3", **one).communicate()
    assert "capitals: 22 rows in, 18 rows out" in last[0], last
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_slurm_task_asks_to_be_queued_again(slurm, tmp_path):
    (tmp_path / "bin" / "srun").write_text(
        '#!/bin/bash\necho "$SRUN_CPUS_PER_TASK" >cpus\ntouch started\nexec sleep 20\n'
    )
    task = slurm(0, "capitals", SLURM_CPUS_PER_TASK="8")
    while not (tmp_path / "started").exists():
        assert task.poll() is None
        time.sleep(0.05)
    task.send_signal(signal.SIGUSR1)
    task.wait(timeout=60)
    os.killpg(task.pid, signal.SIGKILL)
    task.communicate()
    assert (tmp_path / "cpus").read_text() == "8\n"
    assert (tmp_path / "requeued").read_text() == "requeue 71\n"
