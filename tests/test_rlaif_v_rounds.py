"""recipes/rlaif_v.sh: rounds end to end, what it refuses before it starts, and the published settings of training."""

import json
import os
import subprocess

import pytest
from test_online_recipes import carry_out

from prefalign import bundled, config
from prefalign.records import Pair
from prefalign.scenes import labeller
from prefalign.store import read_records
from tests.launching import ROOT

LLAVA = "configs/datagen/rlaif_v.yaml"
NAMES = """#!/bin/sh
echo "$@" >> "$COMMANDS"
if [ "$1 $3" = "path model.model_name_or_path" ]; then echo llava-hf/llava-1.5-7b-hf; else echo "$2"; fi
"""
"""Stands where `prefalign` is: notes what it is asked for and does nothing but name files and the model."""


def test_rounds_end_to_end(tmp_path):
    """Two rounds, each with an adapter: the second answers with the first one's merged policy and is trained from it."""
    labeller.build(tmp_path / "labeller", steps=8, seeing=20, pictures=64, sample=2)
    settings = {
        "LABELLER": str(tmp_path / "labeller"),
        "ROUNDS": "2",
        "PROMPTS": "8",
        "PAIR_SETTINGS": "--num_generations 4 --sampling.temperature 1.2 --sampling.max_new_tokens 64 "
        "--pairs.length_balance off --pairs.min_gap 1",
        "TRAINING_SETTINGS": "--trainer.max_steps 1 --trainer.per_device_train_batch_size 4 --trainer.save_steps 1 "
        "--lora.r 2 --lora.alpha 4",
        "EVALUATION_SETTINGS": "--scenes.pictures 8 --scenes.evals [chair] --reliance.conditions [] --draws 100",
    }
    (tmp_path / "commands").mkdir()
    arguments = [
        "configs/datagen/rlaif_v_scenes.yaml",
        "configs/recipes/train_preference_scenes.yaml",
        str(tmp_path / "out"),
    ]
    given = carry_out("recipes/rlaif_v.sh", arguments, tmp_path / "commands", **settings)
    verbs = [words[1] for words in given if words[0] == "run"]
    assert verbs == ["rlaif_v", "train_preference", "merge_adapter"] * 2 + ["evaluate_model"] * 2
    rounds = [tmp_path / "out" / f"round-{number}" for number in (1, 2)]
    for words in given[-5:-3]:
        assert words[words.index("--model.model_name_or_path") + 1] == str(rounds[0] / "merged")
    first, second = (next(read_records(folder / "pairs", Pair)) for folder in rounds)
    assert first.meta["generator"] != second.meta["generator"]
    assert first.meta["seed"] == 1 != second.meta["seed"]
    results = json.loads((tmp_path / "out" / "evaluation" / "policy" / "results.json").read_text())["metrics"]
    assert {"chair_i", "recall", "difference.chair_i"} <= set(results)
    weights = rounds[1] / "policy" / "adapter_model.safetensors"
    before = weights.read_bytes()
    again = carry_out("recipes/rlaif_v.sh", arguments, tmp_path / "commands", **settings)
    assert [words[1] for words in again if words[0] == "run"] == [verb for verb in verbs if verb != "merge_adapter"]
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([LLAVA], {}, "DATA is not set, so there are no prompts for llava-hf/llava-1.5-7b-hf"),
        (
            [LLAVA],
            {"DATA": "p.json"},
            "EVALUATION is not set, and the pictures of the embedded world say little of llava-hf",
        ),
        (
            [LLAVA, "t.yaml", "out", "--batch_size", "2"],
            {},
            "--batch_size 2 is for no step. Give settings as PAIR_SETTINGS",
        ),
    ],
)
def test_rounds_that_could_not_end_are_refused_before_anything_runs(tmp_path, arguments, environment, message):
    (tmp_path / "prefalign").write_text(NAMES)
    (tmp_path / "prefalign").chmod(0o755)
    known = {
        **os.environ,
        "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]),
        "COMMANDS": str(tmp_path / "given"),
    }
    done = subprocess.run(["sh", "recipes/rlaif_v.sh", *arguments], cwd=ROOT, env=known | environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert (tmp_path / "given").read_text() == f"path {LLAVA}\npath {LLAVA} model.model_name_or_path\n"


def test_a_real_base_is_trained_by_the_published_settings_and_measured_by_its_own_config(tmp_path):
    """The commands of one round, none carried out."""
    (tmp_path / "prefalign").write_text(NAMES)
    (tmp_path / "prefalign").chmod(0o755)
    known = {"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]), "COMMANDS": str(tmp_path / "given"), "ROUNDS": "1",
             "DATA": "prompts-ROUND.json", "IMAGES": "photos", "EVALUATION": "mine.yaml"}  # fmt: skip
    subprocess.run(
        ["sh", "recipes/rlaif_v.sh", LLAVA], cwd=ROOT, env=os.environ | known, capture_output=True, check=True
    )
    given = [line.split() for line in (tmp_path / "given").read_text().splitlines() if not line.startswith("path ")]
    assert [words[:4] for words in given if words[0] == "run"] == [
        ["run", "rlaif_v", "--config", LLAVA],
        ["run", "train_preference", "--config", "configs/recipes/train_preference_rlaif_v.yaml"],
        *[["run", "evaluate_model", "--config", "mine.yaml"]] * 2,
    ]
    assert given[0][4:8] == ["--model.model_name_or_path", "llava-hf/llava-1.5-7b-hf", "--data.path", "prompts-1.json"]
    assert given[0][8:10] == ["--data.images", "photos"]


def test_the_published_settings_of_training():
    """Section 3 of the release's scripts: eight processes of one row, sums over tokens."""
    values = config.read_yaml(bundled.find("recipes/train_preference_rlaif_v"))
    trainer = values["trainer"]
    published = {"learning_rate": 5e-7, "beta": 0.1, "num_train_epochs": 4, "per_device_train_batch_size": 1,
                 "gradient_accumulation_steps": 1, "warmup_steps": 0.05, "weight_decay": 0.01}  # fmt: skip
    assert {name: trainer[name] for name in published} == published
    assert "lora" not in values
