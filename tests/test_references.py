"""What is taken for the reference, and that nothing of one run is left over in another."""

import inspect
import json
import math

import pytest
import torch
from peft import get_peft_model
from PIL import Image

from prefalign import bundled
from prefalign.config import ConfigError, build
from prefalign.families import core, tower
from prefalign.losses import read_losses
from prefalign.models import ModelConfig, freeze, load_model
from prefalign.training import frame, preference_run
from prefalign.training.documents import picture_bytes
from prefalign.training.frozen import FrozenTower
from prefalign.training.lora import LoraSettings
from prefalign.training.preference import PreferenceTrainer
from prefalign.training.reference import StaleReference, cache_reference, row_key
from prefalign.training.routes import find_route
from tests.launching import ROOT, WARM, history, needs_deepspeed, start, without
from tests.tiny_vlms import save_tiny
from tests.training_runs import losses, make_trainer, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", count=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A family's tiny checkpoint by name."""

    def saved(family):
        folder = tmp_path_factory.getbasetemp() / f"references-{family}"
        if not folder.exists():
            save_tiny(family, folder)
        return folder

    return saved


def again(trainer, model, output, **more):
    """A trainer with the settings of another on a model."""
    trainer.args.output_dir = str(output)
    return PreferenceTrainer(
        model, args=trainer.args, train_dataset=trainer.train_dataset, processing_class=trainer.processing_class, **more
    )


def first_loss(trainer):
    rows = [trainer.train_dataset[number] for number in range(2)]
    trainer.model.eval()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows))).item()


def test_an_adapter_that_a_run_starts_from_is_its_reference(tiny_llava, pairs, tmp_path):
    model = get_peft_model(load_model(ModelConfig(str(tiny_llava), device="cpu")), LoraSettings(r=4, alpha=8).to_peft())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    settings = make_trainer(tiny_llava, pairs, tmp_path / "settings")
    trainer = again(settings, model, tmp_path / "run", reference="cached")
    cache_reference(trainer, tmp_path / "cache", reference="adapter")
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    assert first_loss(trainer) != pytest.approx(math.log(2), abs=1e-4)


def test_a_reference_model_beside_a_cache_is_refused(tiny_llava, pairs, tmp_path):
    settings = make_trainer(tiny_llava, pairs, tmp_path / "settings")
    model, other = (load_model(ModelConfig(str(tiny_llava), device="cpu")) for _ in range(2))
    with pytest.raises(ConfigError, match="a `ref_model` is given: the cache is filled by the policy as it starts"):
        again(settings, model, tmp_path / "run", reference="cached", ref_model=other)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_model_is_trained_twice_in_one_process(family, checkpoint, pairs, tmp_path):
    terms = read_losses([{"name": "text"}, {"name": "chip", "weight": 0.5}], beta=0.1)
    once = make_trainer(checkpoint(family), pairs, tmp_path / "once", learning_rate=1e-2)
    once.train()
    model = once.accelerator.unwrap_model(once.model)
    model.save_pretrained(tmp_path / "saved")
    twice = again(once, model, tmp_path / "twice", losses=terms)
    loaded = load_model(ModelConfig(str(tmp_path / "saved"), device="cpu"))
    freeze(loaded, ["vision"])
    settings = make_trainer(checkpoint(family), pairs, tmp_path / "more", learning_rate=1e-2)
    fresh = again(settings, loaded, tmp_path / "fresh", losses=terms)
    assert first_loss(twice) == pytest.approx(1.5 * math.log(2), abs=1e-5)
    twice.train(), fresh.train()
    assert losses(twice) == pytest.approx(losses(fresh), abs=1e-4)


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_attention_that_takes_no_such_mask_goes_the_plain_way(family, checkpoint):
    model = load_model(ModelConfig(str(checkpoint(family)), device="cpu", attn_implementation="eager"))
    route = find_route(model)
    assert route.layout == "plain"
    assert "'eager', and sharing needs 'sdpa'" in route.reason


def test_pictures_of_one_pattern_in_two_palettes_are_two():
    red, blue = (Image.new("P", (8, 8)) for _ in range(2))
    red.putpalette([255, 0, 0]), blue.putpalette([0, 0, 255])
    assert red.tobytes() == blue.tobytes()
    assert picture_bytes(red) != picture_bytes(blue)


def test_a_pass_that_gives_no_number_is_no_reference(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path / "run", reference="cached")
    cache_reference(trainer, tmp_path / "cache", reference="start")
    with torch.no_grad():
        core(trainer.model).lm_head.weight.fill_(float("nan"))
    with pytest.raises(StaleReference, match="in 4 random rows a token differs by up to inf"):
        cache_reference(trainer, tmp_path / "cache", reference="start")


def test_another_config_of_the_same_weights_is_another_reference(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path / "run", reference="cached")
    cache_reference(trainer, tmp_path / "cache", reference="start")
    trainer.model.config.vision_feature_layer = -1
    with pytest.raises(StaleReference, match=r"made otherwise \(config: "):
        cache_reference(trainer, tmp_path / "cache", reference="start")


def test_a_second_model_is_loaded_for_losses_that_look_at_it_only(tiny_llava, pairs, tmp_path, monkeypatch):
    """Weights as ZeRO-3 leaves them cannot be copied, so the reference is loaded from its path."""
    recipe, load, models = bundled.load_stage("train_preference"), preference_run.load_policy, []
    for module in (frame, preference_run):
        monkeypatch.setattr(module, "load_policy", lambda *of, **how: models.append(load(*of, **how)) or models[-1])
    for entry, expected in (("simpo", 1), ("text", 2)):
        values = {"model": {"model_name_or_path": str(tiny_llava), "device": "cpu"}, "pairs": str(pairs), "output": str(tmp_path),
                  "reference": "online", "losses": [{"name": entry}]}  # fmt: skip
        config = build(recipe.Config, values)
        inputs = preference_run.read_inputs(config, output=tmp_path, trainer={})
        models.clear()
        begin = frame.load_start(config, inputs.arguments, inputs.files)
        for parameter in begin.model.parameters():
            parameter.ds_id = 0
        preference_run.build_trainer(config, inputs, begin)
        assert len(models) == expected
    config.reference_folder = tmp_path / "cache"
    with pytest.raises(ConfigError, match="reference_folder: nothing is kept there while reference is 'online'"):
        preference_run.read_inputs(config, output=tmp_path, trainer={})


def test_what_is_frozen_is_held_once(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, frozen=("vision", "language_model"))
    held = dict(trainer.ref_model.named_parameters())
    for name, weight in trainer.model.named_parameters():
        assert (held[name] is weight) == (not weight.requires_grad), name
    assert {tower(name) for name, weight in trainer.model.named_parameters() if weight.requires_grad} == {"projector"}
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[3] != pytest.approx(math.log(2), abs=1e-6)


def test_a_picture_given_by_path_is_what_is_in_the_file(tmp_path):
    row = {
        "id": "a",
        "images": [{"bytes": None, "path": str(tmp_path / "a.png")}],
        "prompt": [],
        "chosen": [],
        "rejected": [],
    }
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png")
    before = row_key(row)
    Image.new("RGB", (8, 8), (0, 0, 255)).save(tmp_path / "a.png")
    assert row_key(row) != before
    encoded = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    assert row_key({**row, "images": [encoded]}) == row_key(row)


def test_a_picture_changed_in_place_is_not_the_one_before():
    module = torch.nn.Linear(2, 2)
    tower, picture = FrozenTower(module, keep=True), torch.ones(1, 2)
    before = module(picture)
    assert torch.equal(module(picture), before)
    picture.zero_()
    assert not torch.equal(module(picture), before)
    tower.forget()


def test_a_models_signature_is_its_own(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path)
    assert "input_ids" in inspect.signature(trainer.model.forward).parameters


def test_one_view_has_no_margins(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, losses=("anchor",), max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {"rewards/chosen", "logps/chosen", "anchor/loss"} <= logged.keys()
    assert not {"rewards/margins", "rewards/accuracies", "rewards/rejected", "logps/rejected"} & logged.keys()


@needs_deepspeed
def test_16_bits_round_no_reference_and_lose_no_state(tiny_llava, pairs, tmp_path):
    """Under DeepSpeed batches are cast to bfloat16, in which a log-prob of -70 is known to 0.25; and it loads states itself."""
    trainer = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "bf16": True,
               "deepspeed": "deepspeed/zero2", "learning_rate": 1e-3, "gradient_checkpointing": False}  # fmt: skip
    run = {"model": {"model_name_or_path": str(tiny_llava), "device": "cpu"}, "pairs": str(pairs), "trainer": trainer,
           "losses": [{"name": "text"}, {"name": "bco"}]}  # fmt: skip
    runs = [{**run, "output": str(tmp_path / "straight")},
            {**run, "output": str(tmp_path / "resumed"), "copy_from": str(tmp_path / "straight")}]  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    start([WARM / "torchrun", "--nproc_per_node", 1, ROOT / "tests/distributed_run.py", tmp_path], tmp_path)
    straight, resumed = (history(tmp_path / name) for name in ("straight", "resumed"))
    assert abs(straight[0]["rewards/chosen"]) < 1e-3
    clock = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    assert without(clock, resumed) == without(clock, straight)
    assert straight[3]["bco/shift"] != 0
