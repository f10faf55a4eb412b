"""The benchmark's figures, worked by hand, and its part on reward models on a few rows."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefalign.evals.statistics import Estimate
from tests.launching import WARM

FILE = Path(__file__).parent.parent / "benchmarks" / "rl_truth.py"
spec = importlib.util.spec_from_file_location("rl_truth", FILE)
rl_truth = importlib.util.module_from_spec(spec)
sys.modules["rl_truth"] = rl_truth
spec.loader.exec_module(rl_truth)


def graded(folder, margins):
    folder.mkdir()
    lines = [
        {"set": "held_out", "id": name, "picture": name, "margins": {"own": margin}} for name, margin in margins.items()
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, [*lines, {**lines[0], "set": "other"}])) + "\n")
    return folder


def test_two_grades_differ_on_the_pairs_that_both_scored(tmp_path):
    """Right, right, wrong, tie against wrong, right, wrong, right; the pair without a score is left out of both."""
    one = graded(tmp_path / "one", {"a": 1.0, "b": 2.0, "c": -1.0, "d": 0.0, "e": 1.0})
    other = graded(tmp_path / "other", {"a": -1.0, "b": 0.5, "c": -2.0, "d": 1.0, "e": None})
    found = rl_truth.paired(one, other, "held_out", 200)
    assert found.value == pytest.approx((2.5 - 2) / 4)
    assert found.n == 4
    assert found.ci95[0] < 0 < found.ci95[1]


def test_a_mean_over_seeds_has_the_interval_of_student():
    mean, interval = rl_truth.summed_up([Estimate(value, (0.0, 1.0), 9) for value in (0.1, 0.2, 0.3)])
    assert mean == pytest.approx(0.2)
    assert interval == pytest.approx((0.2 - 4.3027 * 0.1 / 3**0.5, 0.2 + 4.3027 * 0.1 / 3**0.5), abs=1e-4)
    assert rl_truth.summed_up([Estimate(0.1, (0.0, 0.4), 9), Estimate(None, None, 0)]) == (0.1, (0.0, 0.4))
    assert rl_truth.summed_up([Estimate(None, None, 0)]) == (None, None)


def ppo_run(folder, logs):
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*logs, {"train_runtime": 1.0}]}))
    return folder


def test_what_a_ppo_run_says_of_itself(tmp_path):
    logs = [{"objective/scores": 0.1 * step, "objective/kl": float(step), "watch/objects/recall": 0.6 - 0.01 * step,
             "watch/objects/recall/std": 0.1} for step in range(12)]  # fmt: skip
    quiet = rl_truth.logged(ppo_run(tmp_path, logs))
    assert quiet["reward_before"].value == 0
    assert quiet["reward_after"].value == pytest.approx(1.05)
    assert quiet["kl"].value == 10.5
    assert quiet["watch/objects/recall/after"].value == pytest.approx(0.495)
    assert quiet["hacking_noticed"].value == 0
    logs[9]["alarms/clip_fraction"] = 1.0
    assert rl_truth.logged(ppo_run(tmp_path, logs))["hacking_noticed"].value == 0
    logs[11]["alarms/hacking/objects/recall"] = 1.0
    rung = rl_truth.logged(ppo_run(tmp_path, logs))
    assert rung["hacking_noticed"].value == 1
    assert rung["alarms/hacking/objects/recall"].value == pytest.approx(1 / 12)
    by_seed = {0: {"length": rung}, 1: {"length": quiet}}
    rows = {
        row["name"]: row
        for row in rl_truth.rows_of("ppo", {seed: {"base": {}, **found} for seed, found in by_seed.items()})
    }
    assert rows["rl/ppo/length/alarms/hacking/objects/recall/1"]["value"] == 0  # a run that stayed silent counts
    assert rows["rl/ppo/length/hacking_noticed/mean"]["value"] == 0.5
    assert "at least 1 MISSED" in rl_truth.table(list(rows.values()))


def distance(folder, variant, changed):
    """By how much the margins of a grade change at most when their facts or pictures do."""
    lines = (folder / "kept" / "seed-0" / "grade" / variant / "items.jsonl").read_text().splitlines()
    margins = [json.loads(line)["margins"] for line in lines]
    return max(abs(margin["own"] - margin[changed]) for margin in margins if margin[changed] is not None)


def test_the_benchmark_on_a_few_rows(tmp_path):
    file = tmp_path / "rows.json"
    command = [str(WARM / "python"), str(FILE), "--quick", "--parts", "rm", "--seeds", "0", "--pictures", "12", "--held_out", "6",
               "--keep", str(tmp_path / "kept"), "--json", str(file)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())
    assert all(set(row) == {"name", "value", "unit", "baseline", "goal"} for row in rows)
    found = {row["name"]: row["value"] for row in rows}
    for half in ("held_out", "other"):
        accuracy = [found[f"rl/rm/{variant}/{half}_accuracy/0"] for variant in ("facts", "no_facts")]
        assert found[f"rl/rm/difference/{half}_accuracy/mean"] == pytest.approx(accuracy[0] - accuracy[1], abs=2e-4)
        assert found[f"rl/rm/facts/pairs_{half}/0"] == found[f"rl/rm/no_facts/pairs_{half}/0"] > 0
    assert distance(tmp_path, "facts", "without_facts") > 1e-2
    assert distance(tmp_path, "facts", "shuffled_picture") > 1e-3
    assert distance(tmp_path, "no_facts", "without_facts") < 1e-4 < distance(tmp_path, "no_facts", "shuffled_picture")
    assert "rl/rm/difference/held_out_accuracy" in done.stdout
    wrong = subprocess.run([*command[:2], "--parts", "grpo"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "unknown part 'grpo': known are rm, ppo, online" in wrong.stderr
