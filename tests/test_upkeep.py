"""What every trainer checks as it goes: gradients at the first step, finite losses, finite weights."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefalign.families import tower
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.records import Pair
from prefalign.store import OutputConfig, write_records
from prefalign.training.plain_pass import unused_by_plain_pass
from prefalign.training.runs import is_finished
from prefalign.training.upkeep import audit_gradients, train_and_save
from tests.training_runs import losses, make_pair, make_trainer, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 8)


def losing(trainer, part):
    """The first trainable tensor of a part of the model, which from now on gets no gradient in training."""
    lost = next(name for name, weight in trainer.model.named_parameters() if weight.requires_grad and part in name)
    step = trainer.training_step

    def without_one(*args, **kwargs):
        loss = step(*args, **kwargs)
        trainer.model.get_parameter(lost).grad = None
        return loss

    trainer.training_step = without_one
    return lost


def test_tensors_without_gradient_are_named_where_a_plain_pass_gives_them_one(tiny_llava, pairs, tmp_path, caplog):
    """LLaVA reads the second-last layer of its tower: the last one, and the norm after it, learn in no run."""
    trainer = make_trainer(tiny_llava, pairs, tmp_path, frozen=(), max_steps=1, save_strategy="no")
    lost = losing(trainer, "vision_tower.encoder.layers.0.")
    with caplog.at_level(logging.WARNING, logger="prefalign.training.upkeep"):
        trainer.train()
    count = sum(weight.requires_grad for weight in trainer.model.parameters())
    assert caplog.messages == [
        f"1 of {count} trainable tensors got no gradient in the first step and will not change: {lost}"
    ]


def unread(names):
    return {name for name in names if ("layers.1." in name and "vision_tower" in name) or "post_layernorm" in name}


def test_what_a_plain_pass_leaves_untrained(tiny_llava):
    """Whatever mode the model is in, which it keeps, as it keeps its gradients; of a model in a wrapper, too."""
    config = ModelConfig(str(tiny_llava), device="cpu")
    model, processor = load_model(config), load_processor(config)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    names = {name for name, _ in model.named_parameters()}
    state = torch.get_rng_state()
    found = unused_by_plain_pass(model, processor, names)
    assert found == unread(names) != set()
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())
    assert unused_by_plain_pass(model, processor, ["lm_head.weight"]) == set()
    both = torch.nn.ModuleDict({"policy": model, "head": torch.nn.Linear(2, 2)})
    names = {name for name, _ in both.named_parameters()}
    assert unused_by_plain_pass(both, processor, names) == unread(names)


def test_a_plain_pass_that_finds_no_memory_stops_no_run(tiny_llava):
    config = ModelConfig(str(tiny_llava), device="cpu")
    model = load_model(config)

    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.lm_head.register_forward_pre_hook(full)
    model.train()
    assert unused_by_plain_pass(model, load_processor(config), {name for name, _ in model.named_parameters()}) == set()
    assert model.training


def test_of_adapters_a_plain_pass_tells_about_the_active_one(tiny_llava):
    config = ModelConfig(str(tiny_llava), device="cpu")
    targets = LoraConfig(r=2, target_modules=["q_proj", "fc1"])
    model = get_peft_model(load_model(config), targets, adapter_name="policy")
    model.add_adapter("value", targets)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora" in name)
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("value" in name for name in unread(names))
    active = {name for name in unread(names) if "policy" in name}
    assert unused_by_plain_pass(model, load_processor(config), names) == active != set()


def test_a_tower_without_any_gradient_stops_the_run(tiny_llava):
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
    lost = losing(trainer, "multi_modal_projector")
    with caplog.at_level(logging.WARNING, logger="prefalign.training.upkeep"):
        trainer.train()
    assert trainer.saw_pictures
    (warning,) = caplog.messages  # once a picture has been seen
    assert warning.startswith("1 of ")
    assert warning.endswith(lost)


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
