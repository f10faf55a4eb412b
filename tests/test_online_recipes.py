"""The shell recipes, on the embedded world and a handful of prompts."""

import json
import subprocess

from prefalign.records import Pair
from prefalign.store import read_records
from tests.launching import ENVIRONMENT, ROOT, TIMEOUT


def test_mixed_dpo_end_to_end(tmp_path):
    """`mixed_dpo.sh` ends in `online_dpo.sh`, so both run."""
    small = ["--rounds.count", "1", "--rounds.prompts", "8", "--evaluation", "null", "--check.prompts", "2",
             "--trainer.per_device_train_batch_size", "4", "--sampling.max_new_tokens", "64"]  # fmt: skip
    settings = "--scenes.pictures 8 --scenes.evals [chair] --reliance.conditions [] --draws 100"
    command = ["sh", "recipes/mixed_dpo.sh", "configs/recipes/train_online_mixed_scenes.yaml", str(tmp_path), *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT,
                          env={**ENVIRONMENT, "PROMPTS": "8", "EVALUATION_SETTINGS": settings})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    sources = [pair.meta["source"] for pair in read_records(tmp_path / "run" / "round-1" / "mixed", Pair)]
    assert set(sources) == {"offline", "online"}
    results = json.loads((tmp_path / "evaluation" / "policy" / "results.json").read_text())["metrics"]
    assert {"chair_i", "recall", "difference.chair_i"} <= set(results)
    assert "acc. online" in done.stdout
