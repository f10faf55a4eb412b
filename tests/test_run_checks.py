"""What a run refuses, plan and doctor refuse in the same words; and what a plan takes from the config of its run."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from prefalign import config
from prefalign.config import ConfigError
from prefalign.training.planner import Options, Planner
from prefalign.training.profiles import asked_profile
from prefalign.training_plan import plan, table
from tests import doctor_runs, sft_runs
from tests.planned_runs import run_config, save_llava
from tests.training_runs import write_pairs

ZERO2, ZERO3 = "configs/deepspeed/zero2.json", "deepspeed/zero3"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 6)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A small model without weights."""
    text = {"num_hidden_layers": 2}
    return save_llava(tmp_path_factory.mktemp("models") / "half", text, {"num_hidden_layers": 1}, weights=False)


def planned(checkpoint, pairs, folder, **changes):
    return Planner(doctor_runs.settings(checkpoint, pairs, folder / "run", **changes), Options(device="cpu"))


def run(checkpoint, pairs, folder, **changes):
    doctor_runs.STAGE.main(doctor_runs.settings(checkpoint, pairs, folder / "run", **changes))


ENTRIES = pytest.mark.parametrize("entry", [planned, doctor_runs.prepare, run])
LORA = {"r": 4, "alpha": 8}


@ENTRIES
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora": {**LORA, "target_modules": "q_proj"}},
            (
                r"lora.target_modules 'q_proj' matches no module .* regular expression over full module names, such as "
                r"model\.language_model\.layers\.0\.\S+ and model\.language_model\.layers\.1\.\S+: `\.\*\\\.q_proj` matches"
            ),
        ),
        (
            {"lora": {**LORA, "target_modules": "*.q_proj"}},
            "'[*].q_proj' is not a regular expression: nothing to repeat",
        ),
        (
            {"negative": {"kind": "crop"}, "losses": [{"name": "text"}, {"name": "visual"}]},
            "negative.kind is 'crop', and all 6 pairs of .* have `rejected_images` already",
        ),
        (
            {"trainer": {"eval_strategy": "epoch"}},
            "eval_strategy is 'epoch', and no held-out pairs are named. Give `eval_pairs`",
        ),
        ({"freeze": ["visoin"]}, "no tower called 'visoin' to freeze"),
    ],
)
def test_settings_that_nobody_starts_with(entry, changes, message, tiny_llava, pairs, tmp_path):
    with pytest.raises(ValueError, match=message):
        entry(tiny_llava, pairs, tmp_path, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("entry", [planned, run])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"freeze": ["vision", "projector", "language_model"]},
            "freeze: vision, projector, language_model leaves nothing",
        ),
        (
            {"lora": {**LORA, "target_modules": r".*\.q_proj"}},
            "reaches .*vision.*, and `freeze` names the vision tower",
        ),
    ],
)
def test_runs_in_which_the_wrong_things_train(entry, changes, message, tiny_llava, pairs, tmp_path):
    """Doctor says so in its table."""
    with pytest.raises(ConfigError, match=message):
        entry(tiny_llava, pairs, tmp_path, **changes)


def test_a_negative_is_checked_before_there_are_pairs(half, tmp_path):
    chosen = run_config(half, tmp_path / "none")
    chosen.negative = config.build(type(chosen), {**config.to_mapping(chosen), "negative": {"kind": "swap"}}).negative
    with pytest.raises(ValueError, match="negative.kind is 'swap', and no loss of this run looks at another picture"):
        Planner(chosen, Options(device="cpu", rows=10))
    chosen.losses = [{"name": "visual"}]
    with pytest.raises(ValueError, match="negative.kind 'swap' shows a picture of another row"):
        Planner(chosen, Options(device="cpu", rows=10))


def test_imitation_names_the_targets_too(tiny_llava, tmp_path):
    rows = sft_runs.write_examples(tmp_path / "rows", map(sft_runs.make_example, range(2)))
    chosen = sft_runs.recipe_config(tiny_llava, rows, tmp_path / "run", lora={**LORA, "target_modules": "none"})
    with pytest.raises(ConfigError, match="lora.target_modules 'none' matches no module of the model"):
        sft_runs.RECIPE.main(chosen)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("entry", [planned, doctor_runs.prepare])
@pytest.mark.parametrize("sharing", [{"deepspeed": ZERO3}, {"fsdp": "full_shard"}])
def test_four_bits_are_not_shared_out(entry, sharing, tiny_llava, pairs, tmp_path):
    """Though doctor and plan set the run up in one process."""
    changes = {"lora": LORA, "model": {"load_in_4bit": True}, "trainer": sharing}
    with pytest.raises(ConfigError, match="model.load_in_4bit: DeepSpeed ZeRO-3 and FSDP share out the weights"):
        entry(tiny_llava, pairs, tmp_path, **changes)


@pytest.mark.parametrize("entry", [planned, doctor_runs.prepare])
def test_parts_of_a_batch_are_not_shared_out(entry, tiny_llava, pairs, tmp_path):
    with pytest.raises(ConfigError, match="tokens_per_pass: .*parts would be several .the config asks for zero2"):
        entry(tiny_llava, pairs, tmp_path, tokens_per_pass=100, trainer={"deepspeed": ZERO2})


def test_profiles_that_a_config_asks_for():
    for trainer, profile in (
        ({}, None),
        ({"deepspeed": ZERO2}, "zero2"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "zero3"),
        ({"fsdp": True}, "fsdp2"),
    ):
        assert asked_profile(trainer) == profile
    for trainer, message in (
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "asks for stage 1 of ZeRO, and only 2 and 3 are known"),
        ({"deepspeed": ZERO2, "fsdp": True}, "both share out the weights"),
        ({"deepspeed": "train_preference"}, "is no JSON that can be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            asked_profile(trainer)


def test_the_config_says_how_the_model_is_shared(half, pairs):
    """ZeRO-3 on 8 devices: an eighth of the weights each, and the same on one device when the config asks for it."""
    chosen = run_config(half, pairs, deepspeed=ZERO3)
    planner = Planner(chosen, Options(device="cpu", devices=8))
    assert planner.setup.profile == "zero3"
    alone = Planner(run_config(half, pairs), Options(device="cpu"))
    assert planner.need(planner.setup).weights == pytest.approx(alone.need(alone.setup).weights / 8)
    assert Planner(chosen, Options(device="cpu", devices=8, profile="zero3")).setup == planner.setup
    with pytest.raises(ConfigError, match="--profile ddp, and the config's own trainer.deepspeed .* asks for zero3"):
        Planner(chosen, Options(device="cpu", devices=8, profile="ddp"))
    single = Planner(chosen, Options(device="cpu"))
    listed = []
    single.alternatives(lambda setups: listed.extend(setups) or [])
    assert {setup.profile for setup in listed} == {"one", "zero3"}
    assert "one device, ZeRO-3" in table(plan(single))


@pytest.mark.parametrize("changes", [{"losses": [{"name": "chip"}]}, {"trainer": {"sync_ref_model": True}}])
def test_ways_that_the_run_would_refuse_are_left_out(changes, half, pairs):
    """Neither a loss on logits nor a reference that moves has a cache."""
    chosen = run_config(half, pairs, reference="online", **changes.get("trainer", {}))
    chosen.losses = changes.get("losses", chosen.losses)
    planner = Planner(chosen, Options(device="cpu"))
    found = planner.alternatives(lambda setups: [planner.setup, replace(planner.setup, reference="cached")])
    assert list(found) == [planner.setup]
    made = replace(plan(planner), others={**found, replace(planner.setup, method="lora", reference="cached"): 1.0})
    rows = {line.split()[0]: line.split()[-2:] for line in table(made).splitlines() if " one device " in line}
    assert [cell == "-" for cell in rows["LoRA"] + rows["all"]] == [True, False, False, True]


def test_the_time_on_a_cpu_is_not_that_of_a_gpu(half, pairs):
    planner = Planner(run_config(half, pairs), Options(device="cpu", price=2.0))
    made = plan(planner)
    assert (made.seconds, made.cost) == (None, None)
    assert "not known" in table(made)
    assert "--tflops says how fast this CPU is" in table(made)
    planner.options = replace(planner.options, tflops=0.1, utilisation=0.5)
    told = plan(planner)
    assert told.seconds == pytest.approx(made.flops / 0.05e12)
    assert told.cost == pytest.approx(2 * told.seconds / 3600)
    assert Options().tflops == 312
    with pytest.raises(ConfigError, match="--price -3.0: give what one device costs"):
        Options(price=-3.0)


def test_held_out_pairs_take_time_and_disk(half, pairs, tmp_path):
    """3 pairs, measured after each of 2 epochs and at the end: three forward passes each, and one of the reference."""
    chosen = run_config(half, pairs, num_train_epochs=2, gradient_checkpointing=False)
    chosen.freeze = []
    chosen.trainer["eval_strategy"] = "no"
    without = plan(Planner(chosen, Options(device="cpu")))
    chosen.trainer["eval_strategy"] = "epoch"
    chosen.eval_pairs = write_pairs(tmp_path / "held", 3)
    planner = Planner(chosen, Options(device="cpu"))
    made = plan(planner)
    assert (made.eval_rows, made.evaluations, without.evaluations) == (3, 3, 0)
    counted = planner.count(planner.setup, [planner.eval_rows[1]])
    assert 2.5 < counted.flops / counted.forward <= 3
    more = made.flops - without.flops
    assert more == pytest.approx((3 + 1) * 3 * counted.forward, rel=0.1)
    tokens = sum(planner.tokens(row).scored for row in planner.eval_rows)
    assert made.disk["reference cache"] - without.disk["reference cache"] == pytest.approx(4 * tokens)
    assert "held out" in table(made)
    assert "3  pairs, measured 3 times" in table(made)
    chosen.eval_pairs = tmp_path / "none"
    with pytest.raises(ValueError, match="holds no finished pairs"):
        Planner(chosen, Options(device="cpu"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1),
        ({"eval_strategy": "steps", "eval_steps": 4}, 3),
        ({"eval_strategy": "steps", "eval_steps": 0.25, "eval_on_start": True}, 5),
        ({"eval_strategy": "epoch"}, 1 + math.ceil(10 / 3)),
    ],
)
def test_how_often_held_out_pairs_are_measured(half, pairs, settings, expected):
    chosen = run_config(half, pairs, **settings)
    chosen.eval_pairs = pairs
    planner = Planner(chosen, Options(device="cpu"))
    assert planner.steps_of_epoch == 3
    assert planner.evaluations(10) == expected
