"""`prefalign plan train_preference`: what it says a step holds is what a real step holds, and what it says fits, fits."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoConfig

from prefalign.models import ModelConfig, fingerprint, load_processor
from prefalign.training import memory
from prefalign.training.arguments import training_arguments
from prefalign.training.dry_run import Counted, count_step
from prefalign.training.fake_meter import Moment
from prefalign.training.largest import largest, largest_batch, largest_picture
from prefalign.training.lora import LoraSettings
from prefalign.training.metering import LiveTensors
from prefalign.training.planner import GIB, Options, Planner
from prefalign.training.reference import cache_reference
from prefalign.training.sized_rows import RowSize, sized_rows
from tests import tiny_vlms
from tests.planned_runs import run_config, save_llava, save_toy
from tests.training_runs import make_trainer, write_pairs

LLAVA_7B = {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}  # fmt: skip
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "two", 2)


@pytest.fixture(scope="module")
def llava_7b(tmp_path_factory):
    """LLaVA-1.5-7B by its dimensions."""
    return save_llava(tmp_path_factory.mktemp("models") / "llava-1.5-7b", {**LLAVA_7B, "head_dim": 128}, CLIP_L, False)


def measured(model, pairs, output, *, lora, reference, **trainer):
    """Peak of live tensors of two whole real steps, weights and optimizer state included."""
    trainer = make_trainer(
        model, pairs, output, lora=lora, reference=reference, max_steps=2, save_strategy="no", **trainer
    )
    if reference == "cached":
        base = fingerprint(trainer.model)
        cache_reference(trainer, output / "reference", reference=base, progress=False)
    models = [trainer.model, *([trainer.ref_model] if trainer.ref_model is not None else [])]
    with LiveTensors([tensor for model in models for tensor in (*model.parameters(), *model.buffers())]) as meter:
        trainer.train()
    assert trainer.state.global_step == 2
    return meter.peak


CASES = [
    ("full", True, "cached", {}),
    ("full", False, "online", {}),
    ("lora", True, "online", {}),
    ("lora", False, "cached", {}),
    ("full", True, "cached", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    ("full", False, "cached", {"bf16": True}),
]


@pytest.mark.parametrize(("method", "checkpointing", "reference", "more"), CASES)
def test_planned_memory_is_the_measured_peak(toy, pairs, tmp_path, method, checkpointing, reference, more):
    settings = {"gradient_checkpointing": checkpointing, "optim": "adamw_torch", **more}
    lora = method == "lora"
    real = measured(toy, pairs, tmp_path, lora=lora, reference=reference, **settings)
    planner = Planner(run_config(toy, pairs, lora=lora, reference=reference, **settings), Options(device="cpu"))
    assert planner.need(planner.setup).total == pytest.approx(real, rel=0.05)


def test_planned_memory_of_another_family(tmp_path, pairs):
    """Idefics3, whose tower looks at masks of single patches, and whose pictures come in tiles."""
    folder = tiny_vlms.save_tiny("idefics3", tmp_path / "idefics3")
    real = measured(folder, pairs, tmp_path, lora=False, reference="cached", optim="adamw_torch")
    planner = Planner(run_config(folder, pairs, gradient_checkpointing=False), Options(device="cpu"))
    assert planner.need(planner.setup).total == pytest.approx(real, rel=0.05)


def dry(model, layers=None, *, whole=False, lora=False, prompt=40, answer=40, checkpointing=False, **more):
    made = AutoConfig.from_pretrained(model)
    made.text_config.num_hidden_layers = layers or made.text_config.num_hidden_layers
    processor = load_processor(ModelConfig(str(model)))
    rows = sized_rows(processor, ["chosen", "rejected"], RowSize(prompt, answer, 1, 336), 1, made.image_token_id)
    settings = {"use_cpu": True, "gradient_checkpointing": checkpointing}
    return count_step(
        made,
        rows,
        processor,
        arguments=lambda folder: training_arguments(settings, output=folder, seed=0),
        whole=whole,
        reference="cached",
        peft_config=LoraSettings(r=16).to_peft() if lora else None,
        **{"dtype": torch.float32, "frozen": () if lora else ("vision",), "target": "cpu", **more},
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_short_models_tell_what_a_long_one_holds(toy, lora, checkpointing):
    one, all_layers = (
        dataclasses.asdict(dry(toy, 7, whole=whole, lora=lora, checkpointing=checkpointing)) for whole in (False, True)
    )
    for name in ("top", "bottom"):
        assert one[name]["held"] == pytest.approx(all_layers[name]["held"], rel=1e-3)
        assert one[name]["rest"] == pytest.approx(all_layers[name]["rest"], rel=1e-3)
    for name in ("trainable", "frozen", "trainable_parameters", "linear_parameters", "gradients", "flops"):
        assert one[name] == pytest.approx(all_layers[name], rel=1e-6), name


@pytest.mark.parametrize(("lora", "published"), [(False, 37.8 + 0.38), (True, 25.7 + 0.38)])
def test_counted_operations_of_llava_7b(llava_7b, lora, published):
    """TFLOP of a shared pair, 576 + 60 + 2 x 150 tokens: counted before from text model and tower apart."""
    counted = dry(llava_7b, lora=lora, prompt=60, answer=150, target="cuda", dtype=torch.bfloat16)
    assert counted.flops / 1e12 == pytest.approx(published, rel=0.05)
    assert counted.trainable_parameters + counted.frozen_parameters == pytest.approx(7.06e9, rel=0.01)


def counted(**changes):
    """A step in round numbers: 100 numbers of 2 bytes train, 300 do not."""
    moment = Moment(held=500, kinds={"activations": 350, "vision": 40, "head": 10, "gradients": 100}, rest=400)
    values = {"trainable": 200, "frozen": 600, "reference": 800, "trainable_parameters": 100, "frozen_parameters": 300,
              "linear_parameters": 200, "block_parameters": 50, "matrix_parameters": 20, "gradients": 200, "layers": 6,
              "top": moment}  # fmt: skip
    return Counted(**{**values, **changes})


def shared(profile, devices=4, **more):
    values = {"devices": devices, "optimizer": 4.0, "width": 2, "target": "cpu", **more}
    return memory.share_out(counted(), profile, **values)


def test_one_device_holds_everything():
    need = shared("one", devices=1)
    assert (need.weights, need.reference, need.optimizer, need.gradients, need.exchange) == (800, 800, 400, 100, 0)
    assert need.total == 800 + 800 + 400 + 500


def test_ddp_shares_nothing_and_adds_buckets():
    assert shared("ddp").total == shared("one", devices=1).total + 200


def test_zero2_shares_gradients_and_optimizer():
    """On 4 devices: 100 numbers with 8 bytes of state and a copy of 4, and 200 bytes of gradients, a quarter each."""
    need = shared("zero2")
    assert (need.weights, need.reference) == (800, 800)
    assert (need.optimizer, need.gradients) == (100 * 12 / 4, 200 / 4)
    assert need.exchange == memory.REDUCE_BUCKET * 2


def test_zero3_shares_weights_too():
    need = shared("zero3")
    assert (need.weights, need.reference) == (800 / 4, 800 / 4)
    assert (need.optimizer, need.gradients) == (100 * 12 / 4, 200 / 4)
    assert need.gathered == 800  # all of it, since it is less than a billion numbers


def test_fsdp2_gathers_two_blocks_and_what_is_in_none():
    need = shared("fsdp2")
    assert need.gathered == (2 * 50 + 400 - 6 * 50) * 2
    assert need.weights == (100 * 4 + 600) / 4
    quantised = shared("fsdp2", quantised=True)
    saved = 2 - 4.127 / 8  # bytes of each of 200 numbers, a sixth of them in a block
    assert need.weights - quantised.weights == pytest.approx(200 * saved / 4)
    assert need.gathered - quantised.gathered == pytest.approx(2 * 200 / 6 * saved)
    assert need.exchange == quantised.exchange


def test_four_bits_hold_frozen_linear_layers():
    """200 numbers shrink from 2 bytes to 4.127 bits; the largest matrix is turned back while it is used."""
    plain, quantised = shared("one", devices=1), shared("one", devices=1, quantised=True)
    assert plain.weights - quantised.weights == pytest.approx(200 * (2 - 4.127 / 8))
    assert quantised.activations - plain.activations == 20 * 2


def test_a_gpu_takes_more_than_its_tensors():
    need = shared("one", devices=1, target="cuda")
    assert need.reserved == pytest.approx(memory.CONTEXT + 0.1 * 500)


@pytest.mark.parametrize(
    ("optim", "expected"), [("adamw_torch", 8), ("sgd", 0), ("adafactor", 0.008), ("adamw_bnb_8bit", 2.02)]
)
def test_state_of_the_optimizer_that_is_asked_for(tmp_path, optim, expected):
    arguments = training_arguments({"optim": optim}, output=tmp_path, seed=0)
    assert memory.optimizer_bytes(arguments, torch.float32) == pytest.approx(
        expected, abs=0.021
    )  # in 8 bits 2.03 with bitsandbytes, 2 without it


def test_state_in_8_bits_is_the_same_on_a_32_bit_copy():
    assert memory.optimizer_in_32(2.03, 2) == 2.03
    assert memory.optimizer_in_32(4.0, 2) == 8.0


@pytest.mark.parametrize("limit", [5, 99, 100, 101, 257, 1000, 10**9])
@pytest.mark.parametrize(
    "need", [lambda n: 10 * n, lambda n: 90 + 10 * n, lambda n: n * n, lambda n: 50 if n < 9 else 400]
)
def test_search_finds_the_last_that_fits(need, limit):
    found, why = largest(need, limit, 64)
    fits = [number for number in range(1, 65) if need(number) <= limit]
    assert (found, why) == (max(fits, default=0), "search" if len(fits) == 64 else "memory")


def test_search_stops_where_it_is_no_question_of_memory():
    assert largest(lambda n: n if n <= 17 else math.inf, 100, 64) == (17, "context")


@pytest.fixture
def planner(toy, tmp_path):
    """No pairs yet: sizes are given."""
    options = Options(device="cpu", rows=1000, prompt_tokens=40, answer_tokens=40, memory=0.35)
    return Planner(run_config(toy, tmp_path / "none", gradient_checkpointing=False), options)


def test_what_is_said_to_fit_fits_and_one_more_does_not(planner):
    found = largest_batch(planner)
    assert found.limit == "memory"
    assert found.size > 1
    fits, more = (planner.need(planner.setup, planner.longest(found.size + extra)).total for extra in (0, 1))
    assert fits == found.need <= planner.memory < more


def test_most_pictures_of_a_family_with_one_size(planner):
    """2,048 positions hold 3 pictures of 576 tokens, and 4 do not; a fixed size has no largest picture."""
    planner.options.memory = 4
    found = largest_picture(planner)
    assert (found.what, found.size, found.tokens, found.limit) == ("pictures", 3, 3 * 576, "context")


def test_a_batch_on_the_line_is_the_one_that_fits(tiny_llava, tmp_path, monkeypatch):
    """Beyond what is counted: the size that fits to the byte is found, though the first rows cost more than the later ones."""
    monkeypatch.setattr("prefalign.training.largest.COUNTED", 4)
    options = Options(device="cpu", rows=1000, prompt_tokens=10, answer_tokens=600, memory=1)
    planner = Planner(run_config(tiny_llava, tmp_path / "none", gradient_checkpointing=False), options)
    one, two, most = (planner.need(planner.setup, planner.longest(rows)).total for rows in (1, 2, 20))
    assert most < 0.9 * (one + 19 * (two - one))
    planner.options.memory = (most + 1) / GIB
    planner.counts.clear()
    assert largest_batch(planner).size == 20
    assert max(len(rows) for *_, rows in planner.counts) == 3 * 4


def test_many_small_pictures_are_found_with_few_steps(tiny_llava, tmp_path):
    """4 tokens a picture in 1,024 positions: what does not fit them is never counted, nor a picture read at full size."""
    options = Options(device="cpu", rows=1000, prompt_tokens=40, answer_tokens=40, memory=1)
    planner = Planner(run_config(tiny_llava, tmp_path / "none", gradient_checkpointing=False), options)
    found = largest_picture(planner)
    size = RowSize(40, 40, found.size, 28)
    fits, more = (
        planner.tokens(planner.sized(dataclasses.replace(size, pictures=found.size + extra), 1)[0]) for extra in (0, 1)
    )
    assert (found.what, found.limit, found.tokens) == ("pictures", "context", 4 * found.size)
    assert fits.longest <= 1024 < more.longest
    assert len(planner.counts) <= 3
    assert {row.split("side=")[1] for *_, rows in planner.counts for row in rows} == {"28)-0", "28)-1"}


def test_rows_have_the_sizes_asked_for(planner):
    row = planner.tokens(planner.rows[-1])
    assert (row.pictures, row.prompt, row.answer) == (576, 40, 40)
    assert row.run == 576 + 40 + 2 * 39
