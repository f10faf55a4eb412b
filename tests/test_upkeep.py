"""What every trainer checks as it goes: gradients at the first step, finite losses, finite weights."""

import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefalign.families import tower
from prefalign.models import ModelConfig, load_model
from prefalign.records import Pair
from prefalign.store import OutputConfig, write_records
from prefalign.training.runs import is_finished
from prefalign.training.upkeep import audit_gradients, train_and_save
from tests.training_runs import losses, make_pair, make_trainer, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 8)


def test_tensors_without_gradient_are_named(tiny_llava, pairs, tmp_path, caplog):
    """LLaVA reads the second-last layer of its tower, so the last one never learns: a warning names it."""
    trainer = make_trainer(tiny_llava, pairs, tmp_path, frozen=(), max_steps=1, save_strategy="no")
    with caplog.at_level(logging.WARNING, logger="prefalign.training.upkeep"):
        trainer.train()
    assert re.search(r"\d+ of \d+ trainable tensors got no gradient .* model\.vision_tower.*layers\.1\.", caplog.text)
    model = load_model(ModelConfig(str(tiny_llava)))
    for name, parameter in model.named_parameters():
        parameter.grad = None if tower(name) == "vision" else torch.zeros_like(parameter)
    with pytest.raises(ValueError, match="none of the 39 trainable tensors of the vision tower got a gradient"):
        audit_gradients(model.named_parameters())
    assert audit_gradients(model.named_parameters(), saw_pictures=False) == []


@pytest.mark.parametrize("eval_on_start", [False, True])
def test_the_audit_waits_for_a_picture_in_training(eval_on_start, tiny_llava, tmp_path, caplog):
    """The first batch holds none, which is no fault of the projector; the evaluation before it does not count."""
    rows = [replace(make_pair(number, images=int(number > 1)), rejected_images=[]) for number in range(8)]
    write_records("test", rows, output=OutputConfig(tmp_path / "pairs"), record=Pair, settings={}, seed=0)
    settings = {"train_sampling_strategy": "sequential", "frozen": (), "save_strategy": "no", "max_steps": 2}
    trainer = make_trainer(
        tiny_llava, tmp_path / "pairs", tmp_path, evaluates=True, eval_on_start=eval_on_start, **settings
    )
    with caplog.at_level(logging.WARNING, logger="prefalign.training.upkeep"):
        trainer.train()
    assert trainer.saw_pictures
    (warning,) = caplog.messages  # LLaVA's last layer, once a picture has been seen
    assert "vision_tower" in warning
    assert int(warning.split()[0]) < 39, warning


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(logging_steps, tiny_llava, pairs, tmp_path):
    """HF logs such a loss as 0 by default; without checkpoints, and logs only at the end, the end tells."""
    trainer = make_trainer(
        tiny_llava, pairs, tmp_path, learning_rate=1e30, save_strategy="no", logging_steps=logging_steps
    )
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d: .* Lower trainer.learning_rate"):
        train_and_save(trainer, tmp_path, checkpoint=None, rows={}, counts={})
    assert not (tmp_path / "model.safetensors").exists()
    assert not is_finished(tmp_path)


def test_weights_that_a_last_step_broke_are_not_saved(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, max_steps=1)
    trainer.args.weight_decay, trainer.args.learning_rate = 1e30, 1e30
    with pytest.raises(FloatingPointError, match=r"tensors to save hold numbers that are not finite \(.*lower|Lower"):
        train_and_save(trainer, tmp_path, checkpoint=None, rows={}, counts={})
    assert math.isfinite(losses(trainer)[0])
    assert not list(tmp_path.glob("**/model.safetensors"))
