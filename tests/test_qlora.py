"""QLoRA: which weights are in 4 bits, that an adapter trains on them as on any other model, and what is refused."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from prefalign import bundled
from prefalign.adapters import merge_adapters
from prefalign.checkpoints import ModelError
from prefalign.config import ConfigError, build
from prefalign.families import tower
from prefalign.losses import read_losses
from prefalign.models import ModelConfig, fingerprint, load_model, load_processor, parameter_table
from prefalign.training.arguments import training_arguments
from prefalign.training.lora import LoraSettings, check_quantised
from prefalign.training.pairs import load_pairs
from prefalign.training.preference import PreferenceTrainer
from prefalign.training.reference import StaleReference, cache_reference, cache_settings
from prefalign.training.scoring import run
from tests.distributed_run import claimed
from tests.equality import compare, disturb, step
from tests.launching import CLOCK, history, without
from tests.tiny_vlms import PLAIN, save_tiny
from tests.training_runs import largest_difference, write_pairs

PREFERENCE, SFT = (bundled.load_stage(name) for name in ("train_preference", "train_sft"))
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs prefalign[qlora]")
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 6)


def in_4_bits(checkpoint: Path, **more) -> ModelConfig:
    return ModelConfig(str(checkpoint), device="cpu", load_in_4bit=True, **more)


def make_trainer(config: ModelConfig, pairs: Path, output: Path, **more) -> PreferenceTrainer:
    entries = [{"name": "text"}, {"name": "visual"}]
    settings = {"per_device_train_batch_size": 2, "disable_tqdm": True}
    return PreferenceTrainer(
        load_model(config), args=training_arguments(settings, output=output, seed=3), train_dataset=load_pairs(pairs),
        processing_class=load_processor(config), losses=read_losses(entries, beta=0.1),
        peft_config=LoraSettings(**LORA).to_peft(), **more)  # fmt: skip


def recipe(module, checkpoint: Path, rows: Path, output: Path, **more):
    """A config of `train_preference` or `train_sft`."""
    data = "pairs" if module is PREFERENCE else "data"
    trainer = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True}
    model = {"model_name_or_path": str(checkpoint), "device": "cpu", "load_in_4bit": True}
    values = {"model": model, data: str(rows), "output": str(output), "trainer": trainer, "lora": LORA, **more}
    return build(module.Config, values)


@needs_bitsandbytes
@pytest.mark.parametrize("family", PLAIN)
def test_the_language_models_blocks_are_in_4_bits_and_nothing_else(family, tmp_path):
    from bitsandbytes.nn import Linear4bit

    checkpoint = save_tiny(family, tmp_path / family)
    model, whole = load_model(in_4_bits(checkpoint)), load_model(ModelConfig(str(checkpoint), device="cpu"))
    linear = {name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {name for name in linear if tower(name) == "language_model" and name != "lm_head"}
    found = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert found.keys() == expected
    assert len(expected) == 14
    assert {module.weight.quant_state.quant_type for module in found.values()} == {"nf4"}
    assert all(module.weight.quant_state.nested for module in found.values())
    assert {module.compute_dtype for module in found.values()} == {torch.float32}
    rest = {name: weight for name, weight in whole.state_dict().items() if name.removesuffix(".weight") not in found}
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in rest.items())
    assert [row["parameters"] for row in parameter_table(model)] == [
        row["parameters"] for row in parameter_table(whole)
    ]


@needs_bitsandbytes
def test_what_is_computed_in(tiny_llava, tmp_path):
    config = json.loads((tiny_llava / "config.json").read_text())
    stored = shutil.copytree(tiny_llava, tmp_path / "stored")

    def dtypes(asked):
        model = load_model(in_4_bits(stored, dtype=asked))
        return model.dtype, model.config.quantization_config.bnb_4bit_compute_dtype

    for asked, stated, expected in (
        ("bfloat16", "float32", torch.bfloat16),
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", "float16", torch.float32),  # on a CPU
    ):
        (stored / "config.json").write_text(json.dumps(config | {"dtype": stated}))
        assert dtypes(asked) == (expected, expected)


@needs_bitsandbytes
def test_a_fingerprint_is_that_of_the_rounded_weights(tiny_llava, tiny_idefics3):
    prints = [fingerprint(load_model(in_4_bits(folder))) for folder in (tiny_llava, tiny_llava, tiny_idefics3)]
    assert prints[0] == prints[1]
    assert len({*prints, fingerprint(load_model(ModelConfig(str(tiny_llava), device="cpu")))}) == 3


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3"])
def test_the_shared_path_is_the_plain_one(family, pairs, tmp_path):
    """Loss and every gradient, policy and reference apart, gradient checkpointing on."""
    checkpoint = save_tiny(family, tmp_path / family)
    outcomes = []
    for way in ("auto", "off"):
        trainer = make_trainer(in_4_bits(checkpoint), pairs, tmp_path / way, fast_path=way)
        assert (trainer.route.layout == "plain") == (way == "off")
        disturb(trainer.model)
        outcomes.append(step(trainer, trainer.train_dataset.select(range(3))))
    assert outcomes[0].gradients.keys() == outcomes[1].gradients.keys()
    assert len(outcomes[0].gradients) == 28
    assert {gradient.dtype for gradient in outcomes[0].gradients.values()} == {torch.float32}
    difference = compare(*outcomes, lora=True)
    assert difference.holds(), difference


@needs_bitsandbytes
def test_its_gradients_are_those_of_the_rounded_weights_written_out(tiny_llava, pairs, tmp_path):
    """Also after a pass in eval mode, as the reference's: on some CPUs that packs weights for a kernel without gradients."""
    rounded = load_model(in_4_bits(tiny_llava)).dequantize()
    stored = shutil.copytree(tiny_llava, tmp_path / "stored")
    rounded.save_pretrained(stored)
    trainers = [
        make_trainer(config, pairs, tmp_path / "run")
        for config in (in_4_bits(tiny_llava), ModelConfig(str(stored), device="cpu"))
    ]
    disturb(trainers[0].model)
    set_peft_model_state_dict(trainers[1].model, get_peft_model_state_dict(trainers[0].model))
    rows = trainers[0].train_dataset.select(range(3))
    outcomes = [[step(trainer, rows) for _ in range(2)][1] for trainer in trainers]
    difference = compare(*outcomes, lora=True)
    assert difference.holds(), difference
    assert all(gradient.any() for gradient in outcomes[0].gradients.values())


@needs_bitsandbytes
def test_with_the_adapter_off_it_is_the_reference(tiny_llava, pairs, tmp_path):
    """The same log-probs as another load, whatever the adapter has become; those of the whole weights are others."""
    trainer = make_trainer(in_4_bits(tiny_llava), pairs, tmp_path / "a")
    other = make_trainer(in_4_bits(tiny_llava), pairs, tmp_path / "b")
    whole = make_trainer(ModelConfig(str(tiny_llava), device="cpu"), pairs, tmp_path / "c")
    disturb(trainer.model)
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(3))))
    with torch.no_grad():
        policy, fresh, rounded_away = (run(one.model, batch)["log_probs"] for one in (trainer, other, whole))
        with trainer.as_reference() as reference:
            off = run(reference, batch)["log_probs"]
    assert torch.equal(off, fresh)
    assert (policy - off).abs().max() > 1e-3
    assert (rounded_away - off).abs().max() > 1e-4


@needs_bitsandbytes
def test_a_reference_cache_is_that_of_these_4_bits(tiny_llava, pairs, tmp_path):
    trainers = [
        make_trainer(config, pairs, tmp_path / "run", reference="cached")
        for config in (in_4_bits(tiny_llava), ModelConfig(str(tiny_llava), device="cpu"))
    ]
    settings = [cache_settings(trainer, "same")["quantisation"] for trainer in trainers]
    assert settings[0]["bnb_4bit_quant_type"] == "nf4"
    assert settings[1] is None
    assert cache_reference(trainers[0], tmp_path / "cache", reference="same").largest_difference == 0.0
    with pytest.raises(StaleReference, match="made otherwise .*quantisation"):
        cache_reference(trainers[1], tmp_path / "cache", reference="same")


@needs_bitsandbytes
@pytest.mark.parametrize("module", [PREFERENCE, SFT], ids=["preference", "sft"])
def test_a_resumed_run_is_the_straight_one(module, tiny_llava, pairs, tmp_path):
    """Its adapter trains in float32 and can be merged into the whole weights that were rounded."""
    module.main(recipe(module, tiny_llava, pairs, tmp_path / "straight"))
    if module is PREFERENCE:
        claimed(tmp_path / "straight", tmp_path / "resumed")
    else:
        shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
        for file in ("prefalign_config.yaml", "data_manifest.json", "base.json", "processes.json"):
            shutil.copy(tmp_path / "straight" / file, tmp_path / "resumed" / file)
    module.main(recipe(module, tiny_llava, pairs, tmp_path / "resumed", resume=True))
    straight, again = tmp_path / "straight", tmp_path / "resumed"
    assert without(CLOCK, history(again)) == without(CLOCK, history(straight))
    adapters = [load_file(run / "adapter_model.safetensors") for run in (straight, again, straight / "checkpoint-2")]
    assert largest_difference(adapters[0], adapters[1]) == 0.0
    assert largest_difference(adapters[0], adapters[2]) > 1e-3
    assert {tensor.dtype for tensor in adapters[0].values()} == {torch.float32}
    losses = [entry["loss"] for entry in history(straight) if "loss" in entry]
    assert losses[3] < losses[0]
    merged = merge_adapters([str(straight)], tmp_path / "merged")
    whole = load_file(tiny_llava / "model.safetensors")
    assert largest_difference(load_file(merged / "model.safetensors"), whole) > 1e-3


def test_without_the_package(tiny_llava, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"load_in_4bit needs bitsandbytes, .* `pip install prefalign\[qlora\]`"):
        load_model(in_4_bits(tiny_llava))


@pytest.mark.parametrize("module", [PREFERENCE, SFT], ids=["preference", "sft"])
def test_training_all_weights_is_refused(module, tiny_llava, pairs, tmp_path):
    with pytest.raises(ConfigError, match="model.load_in_4bit: weights of 4 bits cannot be trained, .* Set `lora`"):
        module.main(recipe(module, tiny_llava, pairs, tmp_path / "run", lora=None))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stage", "fsdp"), [(3, None), (None, {"version": 2})])
def test_sharing_out_the_weights_is_refused(stage, fsdp, tiny_llava):
    plugin = stage and SimpleNamespace(zero_stage=stage)
    arguments = SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin_args=fsdp)
    with pytest.raises(
        ConfigError, match="model.load_in_4bit: DeepSpeed ZeRO-3 and FSDP share out .* Use DDP or ZeRO-2"
    ):
        check_quantised(in_4_bits(tiny_llava), LoraSettings(), arguments)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"quantization_config": {"quant_method": "awq"}},
            r"is quantised already \(awq\), .* Name the model that it was made",
        ),
        ({"dtype": None, "text_config": {}}, "does not say its dtype, .* Set `dtype`, such as bfloat16"),
    ],
)
def test_checkpoints_that_cannot_be_rounded(change, message, tiny_llava, tmp_path):
    stored = shutil.copytree(tiny_llava, tmp_path / "stored")
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        load_model(in_4_bits(stored))
