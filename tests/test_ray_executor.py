"""`--executor ray`: the folder of one process, whoever is killed; what actors say is said once and in words."""

import math
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from huggingface_hub import constants

from prefalign import bundled, config, ray_executor, running
from prefalign.execution import Options, take_options
from prefalign.manifest import read_manifest
from prefalign.ray_executor import ExecutorError
from prefalign.records import Candidates
from prefalign.sources import DataConfig
from prefalign.store import OutputConfig, StoreError, write_records
from tests.launching import ROOT
from tests.shared_out import files, prompts_with_a_duplicate, scenes_config, write_rows, write_stage
from tests.stand_in_hub import TOKEN, Repository, StandInHub
from tests.test_select_responses import row as scored_row

RAY = Options(executor="ray", actors=2)
ONE = Options(executor="ray", actors=1)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster of this machine; runs of this process are its jobs."""
    ray_executor.connect("local", num_cpus=4, include_dashboard=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "in")


@pytest.fixture
def file(tmp_path):
    return write_stage(tmp_path)


def run(file, rows, folder, *, options=RAY, mishap="none", marks=".", **output):
    stage = bundled.load_stage(str(file))
    values = {"data": {"path": rows}, "output": {"path": folder, "block_size": 3} | output, "mishap": mishap,
              "marks": str(marks)}  # fmt: skip
    return running.run(str(file), stage, config.build(stage.Config, values), options)


@pytest.fixture
def straight(file, rows, tmp_path):
    run(file, rows, tmp_path / "straight", options=Options())
    return files(tmp_path / "straight")


def test_the_folder_is_that_of_one_process(file, rows, straight, tmp_path):
    manifest = run(file, rows, tmp_path / "out")
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.dropped == {"bad_json": 1, "duplicate": 2, "missing_image": 1}
    assert files(tmp_path / "out") == straight
    assert run(file, rows, tmp_path / "out", options=ONE) == manifest, "a finished folder stays as it is"


def test_a_block_whose_actor_is_killed_is_done_again(file, rows, straight, tmp_path, capsys):
    run(file, rows, tmp_path / "out", mishap="die_once", marks=tmp_path)
    assert len(list(tmp_path.glob("mark-*"))) == 2, "two actors began with the block of r07; the first killed itself"
    assert "an actor was lost and another takes over what it had in hand: The actor is dead" in capsys.readouterr().err
    assert files(tmp_path / "out") == straight


def test_a_block_that_kills_every_actor_is_named(file, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "MOST_DEATHS", 1)
    message = (
        "^2 actors died at block 2 .The actor is dead because .* look at its rows, from input 6 on. Finished blocks"
    )
    with pytest.raises(ExecutorError, match=message):
        run(file, rows, tmp_path / "out", mishap="die", marks=tmp_path, options=ONE)
    assert len(list(tmp_path.glob("mark-*"))) == 2


def test_a_killed_driver_is_started_again(cluster, file, rows, straight, tmp_path):
    """The first driver is killed with SIGKILL while one of its actors hangs in a block; the second finds what is committed."""
    command = [sys.executable, str(file), "--data.path", str(rows), "--output.path", str(tmp_path / "out"),
               "--output.block_size", "3", "--executor", "ray", "--actors", "2", "--ray-address", cluster,
               "--marks", str(tmp_path)]  # fmt: skip
    driver = subprocess.Popen([*command, "--mishap", "hang"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    finished = tmp_path / "out" / "progress"
    while len(list(finished.glob("*.json"))) < 3 or not list(tmp_path.glob("mark-*")):
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.05)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    driver.stderr.close()
    before = {ledger.name: ledger.stat().st_mtime_ns for ledger in finished.glob("*.json")}
    assert "00002.json" not in before
    run(file, rows, tmp_path / "out")
    assert files(tmp_path / "out") == straight
    assert before.items() <= {ledger.name: ledger.stat().st_mtime_ns for ledger in finished.glob("*.json")}.items()


@pytest.mark.parametrize(("name", "options"), [("sample_responses", RAY), ("mia_dpo", ONE)])
def test_stages_with_a_model(name, options, tmp_path):
    """mia_dpo draws other pictures from a pool that the actor makes in the driver's folder."""
    prompts_with_a_duplicate(tmp_path / "in")
    stage = bundled.load_stage(name)
    running.run(name, stage, scenes_config(stage, name, tmp_path / "in", tmp_path / "straight"), Options())
    manifest = running.run(name, stage, scenes_config(stage, name, tmp_path / "in", tmp_path / "out"), options)
    assert manifest.dropped["duplicate"] == 1
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_what_a_stage_does_after_its_rows(tmp_path, capsys):
    """select_responses makes figures of all rows and tells them on stderr."""
    stage = bundled.load_stage("select_responses")
    write_records("t", [scored_row(f"row{n}") for n in range(6)], output=OutputConfig(tmp_path / "in"),
                  record=Candidates, settings={}, seed=0)  # fmt: skip
    said = []
    for folder, options in (("straight", Options()), ("out", RAY)):
        values = {"data": {"path": tmp_path / "in"}, "output": {"path": tmp_path / folder, "block_size": 2}}
        running.run("select_responses", stage, config.build(stage.Config, values), options)
        said.append(re.findall("^select_responses: .*", capsys.readouterr().err, re.MULTILINE))
    assert said[0] == said[1] != []
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_stage_that_writes_two_folders(file, rows, straight, tmp_path):
    run(file, rows, tmp_path / "two", options=Options(), mishap="two")
    manifest = run(file, rows, tmp_path / "out", mishap="two")
    assert manifest.config["settings"] == {"again": 1}
    assert files(tmp_path / "out") == files(tmp_path / "two")
    assert straight.items() < files(tmp_path / "out").items()


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        ("start", f"^there is no such model. Name another. .in an actor on node {re.escape(socket.gethostname())}.$"),
        ("refuse", "^r07 cannot be done. Leave it out. .in an actor on node "),
        ("bug", r"(?s)^the stage failed in an actor on node \S+:\nTraceback .*befall.*KeyError: 'unforeseen'"),
        ("differ", r"^actors disagree on what they make \(settings.pid: \d+ -> \d+\): .* load the same model"),
    ],
)
def test_what_goes_wrong_in_an_actor_is_told_once(file, rows, tmp_path, mishap, message):
    with pytest.raises(ExecutorError, match=message):
        run(file, rows, tmp_path / "out", mishap=mishap, options=RAY if mishap == "differ" else ONE)


def test_all_actors_read_the_commit_that_the_driver_found(file, tmp_path, monkeypatch):
    """A branch may move before an actor comes to ask for itself. The driver writes of the data as one process does."""
    data = DataConfig(Path("tester/rows"))
    with StandInHub() as hub:
        hub.repositories["dataset", "tester/rows"] = Repository(False, commits=7)
        commit = hub.repositories["dataset", "tester/rows"].sha
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        with pytest.raises(ExecutorError, match=f"^tester/rows is read at {commit}. .in an actor on node "):
            run(file, data.path, tmp_path / "out", mishap="moved", options=ONE)
        jobs = []
        monkeypatch.setattr(ray_executor, "run_job", lambda job, *_: jobs.append(job))
        run(file, data.path, tmp_path / "out", options=ONE)
        assert [job.data for job in jobs] == [data]


def test_the_store_stops_a_run_on_actors_too(file, rows, tmp_path):
    with pytest.raises(StoreError, match="capitals stopped: 2 rows failed, above --output.max_quarantine 1"):
        run(file, rows, tmp_path / "out", max_quarantine=1, options=ONE)


def test_what_is_missing_is_one_line_and_ray_is_silent(cluster, file, rows, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "prefalign.cli", "run", str(file), "--mishap", "start", "--data.path", str(rows),
         "--output.path", str(tmp_path / "out"), "--executor", "ray", "--ray-address", cluster],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    first, second = done.stderr.strip().splitlines()
    assert first.startswith("error: there is no such model. Name another. (in an actor on node ")
    assert "PREFALIGN_TRACEBACK=1" in second


def test_actors_that_die_before_any_block_is_done(file, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "MOST_DEATHS", 1)
    with pytest.raises(
        ExecutorError, match="2 actors were lost in a row and no block was done .* memory enough for the model"
    ):
        run(file, rows, tmp_path / "out", mishap="die_at_start", options=ONE)


def test_what_cannot_be_placed(file, rows, tmp_path, monkeypatch, capsys):
    with pytest.raises(ExecutorError, match="--actor-gpus 2: this machine has 0 GPUs. Give no more than that"):
        run(file, rows, tmp_path / "out", options=Options(executor="ray", actor_gpus=2))
    monkeypatch.setattr(ray_executor, "_PATIENCE", 0.1)
    run(file, rows, tmp_path / "out", options=ONE)
    said = (
        r"waiting for an actor: .* passes over all rows first, or there is no place for one .1 CPU, 0 GPU.; "
        r"the cluster has \d CPU and 0 GPU free of 4 CPU"
    )
    assert re.search(said, capsys.readouterr().err)


def test_a_cluster_that_is_not_there():
    code = "from prefalign.ray_executor import connect; connect('127.0.0.1:1')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = (
        "ExecutorError: no Ray cluster could be reached at 127.0.0.1:1: .* Start one .`ray start --head`., or leave"
    )
    assert re.search(message, done.stderr)


def test_a_cluster_that_wants_another_token(monkeypatch):
    """What Ray 2.60 raises there after twenty seconds of trying."""
    said = (
        'Failed to connect to GCS. Last connection error: Traceback (most recent call last):\n  File "ray/node.py", line '
        "996, in _init_gcs_client\n    client = GcsClient(\n             ^^^^^^^^^^\n"
        + "  of ray\n"
        * 40
        + "ray.exceptions."
        "AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing or incorrect. Ensure that\n"
    )

    def refuse(**settings):
        raise ConnectionError("Failed to connect to Ray cluster") from RuntimeError(said)

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ExecutorError, match="^the Ray cluster at head did not take this run's token: .*InvalidAuthToken: Auth"
                       ".* or incorrect. It must be the cluster's: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):  # fmt: skip
        ray_executor.connect("head")
    said = said.replace("InvalidAuthToken", "Unforeseen")
    with pytest.raises(
        ExecutorError, match="^no Ray cluster could be reached at head: ray.exceptions.*: Unforeseen: Auth"
    ):
        ray_executor.connect("head")


def test_nodes_that_do_not_see_the_folder(file, rows, tmp_path, monkeypatch):
    """Actors are told the driver's folder; here it is gone when they start."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(ray_executor.Path, "cwd", lambda: gone)
    with pytest.raises(ExecutorError, match="node .* does not see .*gone, from where the run was started"):
        run(file, rows, tmp_path / "out", options=ONE)


def test_without_ray_the_extra_is_named(file, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutorError, match=r"needs Ray, which is not installed: pip install 'prefalign\[ray\]'"):
        run(file, rows, tmp_path / "out")


def test_the_cluster_file_is_one_that_ray_takes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    path = bundled.find("ray/cluster")
    known = prepare_config(config.read_yaml(path))
    validate_config(known)
    assert known["max_workers"] == len(known["provider"]["worker_ips"])
    header = "".join(line.lstrip("# \\") for line in path.read_text().splitlines() if line.startswith("#"))
    command = re.search('prefalign run (sample\\S+) (.*?)"', header.replace("\\", " "))
    options, rest = take_options(command[2].split())
    assert options == Options(executor="ray", actors=16, ray_address="auto")
    assert command[1] in bundled.stages()
    assert rest[:2] == ["--config", "configs/datagen/sample_responses.yaml"]


def test_the_benchmark_of_executors(tmp_path):
    benchmark = bundled.load_stage(str(ROOT / "benchmarks" / "executors.py"))
    lines = benchmark.measure("povid", 32, [1], [2], 1, tmp_path)
    found = {line["name"].removeprefix("executors/povid/"): line["value"] for line in lines}
    assert list(found) == ["plain/ms_per_row", "plain/cpu_ms", "plain/start_s",
                           "ray_1/ms_per_row", "ray_1/cpu_ms", "ray_1/start_s", "ray_1/overhead_ms", "ray_1/overhead_cpu_ms",
                           "ray_1/driver_cpu_ms",
                           "shards_2/ms_per_row", "shards_2/cpu_ms", "shards_2/start_s", "shards_2/overhead_ms",
                           "shards_2/overhead_cpu_ms"]  # fmt: skip
    assert all(map(math.isfinite, found.values()))  # 32 rows are too few for the sign of a difference
    made = [read_manifest(tmp_path / f"povid-{way}-32-0") for way in ("plain", "ray_1", "shards_2")]
    assert made[0] == made[1] == made[2]
    assert made[0].rows_in == 32


def test_the_benchmark_counts_the_time_of_processes_that_have_ended():
    benchmark = bundled.load_stage(str(ROOT / "benchmarks" / "executors.py"))
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    with benchmark.cpu_time() as spent:
        subprocess.run([sys.executable, "-c", busy], check=True)
    assert 0.29 < spent[0] < 3
