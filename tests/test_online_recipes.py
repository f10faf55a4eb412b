"""The shell recipes, on the embedded world and a handful of prompts. Their commands are carried out in this process, in order."""

import contextlib
import io
import json
import os
import subprocess
import time

import pytest

from prefalign import cli
from prefalign.records import Pair
from prefalign.store import read_records
from tests.launching import ROOT

STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" > "$COMMANDS/writing" && mv "$COMMANDS/writing" "$COMMANDS/request"
while [ ! -f "$COMMANDS/answer" ]; do sleep 0.02; done
cat "$COMMANDS/answer" && rm "$COMMANDS/answer"
"""
"""Stands where `prefalign` is, and hands each command line over: a process of its own for each would take most of the time."""


def carry_out(script, arguments, folder, **environment):
    """Run a script; the command lines of `prefalign` that it gave."""
    status, errors, given = run_with(STAND_IN, script, arguments, folder, environment)
    assert status == 0, errors
    return given


def stopped(script, arguments, folder, **environment):
    """Run a script up to its first step, which ends it with 3: status, errors, and the command lines that it gave."""
    first = '[ "$1" = path ] || { printf "%s\\n" "$@" > "$COMMANDS/step"; exit 3; }'
    stand_in = STAND_IN.replace("\n", f"\n{first}\n", 1)
    status, errors, given = run_with(stand_in, script, arguments, folder, environment)
    step = folder / "step"
    return status, errors, [*given, *([step.read_text().splitlines()] if step.is_file() else [])]


def run_with(stand_in, script, arguments, folder, environment):
    """Run a script with what stands where `prefalign` is: status, errors, and the command lines that were carried out."""
    (folder / "prefalign").write_text(stand_in)
    (folder / "prefalign").chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    process = subprocess.Popen(["sh", script, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PATH": path, "COMMANDS": str(folder), **environment})  # fmt: skip
    request, given = folder / "request", []
    while process.poll() is None:
        if not request.is_file():
            time.sleep(0.02)
            continue
        given.append(request.read_text().splitlines())
        request.unlink()
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                assert cli.main(given[-1]) in (0, None), given[-1]
        except BaseException:
            process.kill()
            raise
        (folder / "answering").write_text(said.getvalue())
        (folder / "answering").rename(folder / "answer")
    return process.returncode, process.stderr.read(), given


@pytest.mark.parametrize("recipe", ["online_dpo", "mixed_dpo", "fact_rlhf", "rlaif_v"])
def test_a_model_on_the_command_line_is_refused_before_anything_runs(recipe, tmp_path):
    words = [
        "sh",
        f"recipes/{recipe}.sh",
        "some/config.yaml",
        str(tmp_path / "out"),
        "--model.model_name_or_path",
        "other",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "set model.model_name_or_path in some/config.yaml" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["online_dpo", "mixed_dpo", "fact_rlhf", "rlaif_v"])
def test_a_config_without_a_model_is_refused(recipe, tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("model: null\nlabeller:\n  model_name_or_path: other\nseed: 0\n")
    status, errors, _ = stopped(f"recipes/{recipe}.sh", [str(file)], tmp_path)
    assert status == 2
    assert "empty.yaml names no model. Set model.model_name_or_path in it." in errors


@pytest.mark.parametrize("model", ["{dtype: float32, model_name_or_path: 'runs/my model'}  # ours",
                                   "\n    model_name_or_path: runs/my model\n    dtype: float32"])  # fmt: skip
def test_the_model_is_the_configs_however_it_is_written(model, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(f"model: {model}\ndata: {{path: prompts}}\n")
    status, errors, given = stopped("recipes/mixed_dpo.sh", [str(file), str(tmp_path / "out")], tmp_path)
    assert (status, errors) == (3, "")
    step = given[-1]
    assert step[step.index("--model.model_name_or_path") + 1] == "runs/my model"


def test_pairs_of_a_stage_that_the_recipe_does_not_know_are_refused(tmp_path):
    arguments = ["configs/recipes/train_online.yaml", str(tmp_path / "out")]
    status, errors, _ = stopped("recipes/mixed_dpo.sh", arguments, tmp_path, PAIRS="configs/datagen/s_vco.yaml")
    assert status == 2
    assert "knows configs of bdhs, m3id, povid and re_align" in errors


@pytest.mark.parametrize(
    ("data", "prompts", "images"),
    [
        ("data: {path: 'my prompts', images: my photos}", "my prompts", "my photos"),
        ("data:\n    path: own\n", "own", None),
        ("data: null", None, None),
    ],
)
def test_mixed_dpo_takes_the_prompts_of_its_config_and_their_pictures(data, prompts, images, tmp_path):
    """Another `path` stands before them."""
    file = tmp_path / "own.yaml"
    file.write_text(
        f"model:\n  model_name_or_path: some/model\nrewards:\n- name: reward_model\n  path: runs/reward\n{data}\n"
    )
    status, errors, given = stopped("recipes/mixed_dpo.sh", [str(file), str(tmp_path / "out")], tmp_path)
    if prompts is None:
        assert status == 2
        assert f"{file} names no prompts. Set data.path in it." in errors
        return
    assert status == 3
    step = given[-1]
    assert step[:2] == ["run", "bdhs"]
    assert step[step.index("--data.path") + 1] == prompts
    assert (step[step.index("--data.images") + 1] if "--data.images" in step else None) == images


def test_mixed_dpo_end_to_end(tmp_path):
    """`mixed_dpo.sh` ends in `online_dpo.sh`, so both run."""
    small = ["--rounds.count", "1", "--rounds.prompts", "8", "--evaluation", "null", "--check.prompts", "0",
             "--trainer.per_device_train_batch_size", "4", "--sampling.max_new_tokens", "64"]  # fmt: skip
    measured = "--scenes.pictures 8 --scenes.evals [chair] --reliance.conditions [] --draws 100"
    (tmp_path / "commands").mkdir()
    arguments = ["configs/recipes/train_online_mixed_scenes.yaml", str(tmp_path / "out"), *small]
    given = carry_out(
        "recipes/mixed_dpo.sh", arguments, tmp_path / "commands", PROMPTS="8", EVALUATION_SETTINGS=measured
    )
    verbs = [words[1] for words in given if words[0] == "run"]
    assert verbs == ["bdhs", "train_online", "evaluate_model", "evaluate_model"]
    sources = {pair.meta["source"] for pair in read_records(tmp_path / "out" / "run" / "round-1" / "mixed", Pair)}
    assert sources == {"offline", "online"}
    results = json.loads((tmp_path / "out" / "evaluation" / "policy" / "results.json").read_text())["metrics"]
    assert {"chair_i", "recall", "difference.chair_i"} <= set(results)
