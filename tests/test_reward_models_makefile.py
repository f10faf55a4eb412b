"""`make -C reward_models`: the commands it starts, what it asks for, and a whole run on a few pictures."""

import json
import os
import re
import subprocess

import pytest

from tests.launching import ROOT, WARM

COMMAND = WARM / "prefalign"


def make(where, *arguments, code=0):
    """What make printed, started in `where`."""
    done = subprocess.run(["make", "--no-print-directory", "-C", str(ROOT / "reward_models"), f"PREFALIGN={COMMAND}", *arguments],
                          cwd=where, env={**os.environ, "PWD": str(where)}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def commands(where, *arguments):
    """The `prefalign run` commands on reward models that make would start."""
    shown = make(where, "-n", *arguments)
    return [
        " ".join(line.split()) for line in re.findall(r"^cd '.*?' && '.*?/prefalign' run (.*?)$", shown, re.MULTILINE)
    ]


def test_help_names_the_targets(tmp_path):
    shown = make(tmp_path)
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == ["train", "score", "grade"]
    assert make(tmp_path, "help") == shown


def test_own_model_and_data(tmp_path):
    given = ("MODEL=some/model", "PAIRS=my pairs", "HELD_OUT=h", "DATA=d", "OTHER=o", "OUT=out", "ARGS=--seed 3")
    reward = "--rewards '[{name: reward_model, path: \"out/model\"}]'"
    train = (
        "train_reward_model --config 'reward_models/train_reward_model' --model.model_name_or_path 'some/model' "
        "--pairs 'my pairs' --eval_pairs 'h' --output '{}' --seed 3"
    )
    score = (
        f"score_responses --config 'reward_models/score_responses' --data.path 'd' {reward} --output.path 'out/score' "
        "--seed 3"
    )
    grade = (
        f"grade_reward_model --config 'reward_models/grade_reward_model' {reward} --sets.held_out.path 'h' "
        "--sets.other.domain out --sets.other.path 'o' --output 'out/grade' --seed 3 --floor 0.7"
    )
    assert commands(tmp_path, "train", *given) == [train.format("out")]
    assert commands(tmp_path, "all", *given, "ARGS_grade=--floor 0.7") == [train.format("out/model"), score, grade]
    assert commands(tmp_path, "grade", "CONFIG=own.yaml") == ["grade_reward_model --config 'own.yaml'"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train",), "train with MODEL=m needs PAIRS=folder of pairs"),
        (("score",), "score with MODEL=m needs DATA=answers of sample_responses"),
        (("grade",), "grade with MODEL=m needs HELD_OUT=pairs that were kept out"),
        (("all", "PAIRS=p", "HELD_OUT=h"), "score with MODEL=m needs DATA="),
        (("all", "CONFIG=own.yaml"), "CONFIG is the config of one stage"),
    ],
)
def test_what_is_missing_is_asked_for_before_anything_starts(arguments, said, tmp_path):
    shown = make(tmp_path, "MODEL=m", *arguments, code=2)
    assert said in shown
    assert "' run " not in shown


def test_all_on_scenes(tmp_path):
    """From nothing to a graded model, in a folder with a blank and a quote; pairs that are there are not made anew."""
    where = tmp_path / "it's here"
    where.mkdir()
    own = "runs/scenes/own-32/test_fair/pairs"  # one set of pairs for everything: the chain is the same for each
    make(where, "all", "ROWS=32", f"PAIRS={own}", f"OTHER={own}", "OUT=o", "ARGS_train=--trainer.max_steps 1")
    assert sorted(entry.name for entry in (where / "o").iterdir()) == ["grade", "model", "score"]
    sets = json.loads((where / "o" / "grade" / "results.json").read_text())["sets"]
    assert {name: found["domain"] for name, found in sets.items()} == {"held_out": "in", "other": "out"}
    assert sets["held_out"]["metrics"]["accuracy"]["n"] > 0
    assert json.loads((where / "o" / "model" / "grade.json").read_text())["sets"].keys() == sets.keys()
    assert "reward_model/reward" in json.loads((where / "o" / "score" / "scores.json").read_text())["scores"]
    manifest = where / own / "manifest.json"
    before = manifest.stat().st_mtime_ns
    make(where, "own-test_fair", "ROWS=32")
    assert manifest.stat().st_mtime_ns == before
