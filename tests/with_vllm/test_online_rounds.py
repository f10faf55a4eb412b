"""Two rounds of online DPO sampled by vLLM here, trained by the ordinary environment, which has TRL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefalign.adapters import merge_adapters
from prefalign.engines.fingerprints import checkpoint_fingerprint
from prefalign.models import ModelConfig, load_processor
from prefalign.processors import engine_fingerprint
from prefalign.records import Candidates
from prefalign.scenes.export import export
from prefalign.store import read_records

ROOT = Path(__file__).parents[2]
TRAINING = Path(os.environ.get("TRAINING_PYTHON", ROOT / ".venv" / "bin" / "python"))
pytestmark = pytest.mark.skipif(not TRAINING.is_file(), reason=f"no Python with TRL in {TRAINING}; set TRAINING_PYTHON")

STALE = """
import sys
from dataclasses import replace
from pathlib import Path
from prefalign import bundled, config
from prefalign.online import serving
from prefalign.online.round_training import policy_config
from prefalign.online.sampling import Draw

settings = config.load(bundled.load_stage("train_online").Config, sys.argv[1])
run, folder = settings.output, Path(sys.argv[2])
served = serving.serve(settings, settings.model, folder / "served")  # what round 1 was sampled from
job = serving.make_job(settings, folder, run / "round-2" / "prompts", Draw(frozenset(), 0, 0, 2), served)
serving.check_engine(settings, job, policy_config(settings.model, run / "round-1" / "policy", lora=True), folder)
"""


def training(*arguments):
    """Run the training environment's Python to its end; its code and all that it said."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([TRAINING, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run's folder, its config file and its results."""
    folder = tmp_path_factory.mktemp("rounds")
    export(folder / "prompts", split="train_fair", kind="caption", start=0, stop=8)
    (folder / "run.yaml").write_text(yaml.safe_dump({
        "model": {"model_name_or_path": "scenes"},
        "data": {"path": str(folder / "prompts")},
        "output": str(folder / "run"),
        "rounds": {"count": 2, "prompts": 4},
        "sampling": {"max_new_tokens": 64, "temperature": 1.2},
        "rewards": [{"name": "objects", "weight": {"invented": 1.0, "recall": 3.0}}],
        "engine": "vllm",
        "vllm": {"enforce_eager": True},
        "vllm_python": sys.executable,
        "check": {"prompts": 4},
        "lora": {"r": 4, "alpha": 8},
        "trainer": {"learning_rate": 0.01, "per_device_train_batch_size": 1, "gradient_checkpointing": False},
    }))  # fmt: skip
    code, said = training("-m", "prefalign.cli", "run", "train_online", "--config", folder / "run.yaml")
    assert code == 0, said
    return folder / "run", folder / "run.yaml", json.loads((folder / "run" / "results.json").read_text())


def test_engine_and_trainer_agree_in_every_round(finished):
    run, _, results = finished
    for number, measured in enumerate(results["rounds"], 1):
        print(f"round {number}: {measured['check']}")
        assert measured["check"]["answers"] == 4
        assert measured["check"]["largest"] < 0.005  # the merged adapter is kept in the base's float16
        assert not (run / f"round-{number}" / "served").exists()
        rows = list(read_records(run / f"round-{number}" / "candidates", Candidates))
        assert len(rows) == 4
        assert all(answer["logp"] < 0 for row in rows for answer in row.responses)


def test_each_round_samples_from_what_the_round_before_trained(finished, tmp_path):
    run, _, _ = finished
    drawn = [
        {one["generator"] for row in read_records(run / f"round-{number}" / "candidates", Candidates) for one in row.responses}
        for number in (1, 2)
    ]  # fmt: skip
    trained = merge_adapters([str(run / "round-1" / "policy")], tmp_path / "merged")
    assert drawn == [
        {engine_fingerprint(checkpoint_fingerprint(model), load_processor(model))}
        for model in (ModelConfig("scenes"), ModelConfig(str(trained)))
    ]


def test_weights_of_another_round_stop_the_run(finished, tmp_path):
    _, config, _ = finished
    code, said = training("-c", STALE, config, tmp_path)
    print(said.strip().splitlines()[-1])
    assert code == 1
    assert "EngineGap: engine and trainer differ by up to" in said
    assert "above the bound of 0.01: the engine samples from another policy" in said
