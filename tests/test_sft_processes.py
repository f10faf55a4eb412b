"""SFT in several processes: the same run as in one, and rows that could not be trained on together."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from prefalign import bundled
from prefalign.config import ConfigError, load
from prefalign.training.examples import check_pictures
from prefalign.training.runs import RunError
from tests.launching import TORCHRUN, start
from tests.sft_runs import RECIPE, make_example, recipe_config, write_examples
from tests.training_runs import largest_difference

FOLDER = Path("rows")


def rows(*counts):
    return Dataset.from_list([{"images": [{"bytes": b"x", "path": None}] * count} for count in counts])


def test_rows_without_pictures_beside_others_are_refused_where_weights_are_shared_out():
    message = (
        "2 of the 3 rows of rows have no picture, .* over 2 processes: .* waiting for the vision tower.*ZeRO-2 or DDP"
    )
    with pytest.raises(ConfigError, match=message):
        check_pictures([rows(1, 0, 0)], [FOLDER], processes=2, in_parts=True)


def test_other_rows_and_other_ways_are_taken():
    check_pictures([rows(1, 0, 0)], [FOLDER], processes=1, in_parts=True)
    check_pictures([rows(1, 0, 0)], [FOLDER], processes=2, in_parts=False)
    check_pictures([rows(1, 2), rows(1)], [FOLDER, FOLDER], processes=2, in_parts=True)


def test_two_processes_are_one(tiny_llava, tmp_path):
    """torchrun, vision tower training: once an epoch one process has a picture and the other none, else none has one."""
    data = write_examples(tmp_path / "data", [make_example(number, images=int(number == 5)) for number in range(8)])
    RECIPE.main(recipe_config(tiny_llava, data, tmp_path / "one", freeze=[]))
    values = {"freeze": "[]", "trainer.per_device_train_batch_size": "2", "trainer.max_steps": "4", "trainer.save_steps": "2",
              "trainer.logging_steps": "1", "trainer.learning_rate": "1e-3", "trainer.lr_scheduler_type": "constant",
              "model.model_name_or_path": str(tiny_llava), "model.device": "cpu", "data": str(data),
              "output": str(tmp_path / "two")}  # fmt: skip
    words = [part for name, value in values.items() for part in (f"--{name}", value)]
    said = start([*TORCHRUN, bundled.stages()["train_sft"], *words], tmp_path)
    assert "8 rows, all used; 2 processes, DDP (MULTI_CPU)" in said
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")]
    in_one, in_two = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert in_two == pytest.approx(in_one, abs=2e-6)
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    # a key's bias cancels in the softmax: its gradient is rounding alone, which Adam makes a step of
    for model in models:
        del model["vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias"]
    assert largest_difference(*models) < 1e-5
    untrained = load_file(tiny_llava / "model.safetensors")
    (tmp_path / "two" / "all_results.json").unlink()
    again = load(RECIPE.Config, tmp_path / "two" / "prefalign_config.yaml")
    with pytest.raises(
        RunError, match="holds checkpoint-4 of a run on 2 processes, and this is 1 process: .* Start it as"
    ):
        RECIPE.main(again)
    assert any((models[1][name] - untrained[name]).abs().max() > 1e-4 for name in models[1] if "vision" in name)
