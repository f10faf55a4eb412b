"""`prefalign plan train_preference`: what it says a step holds is what a real step holds, and what it says fits, fits."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from prefalign import bundled, cli, config
from prefalign.checkpoints import ModelError
from prefalign.models import ModelConfig, fingerprint, load_processor
from prefalign.training import memory
from prefalign.training.arguments import check_precision, training_arguments
from prefalign.training.checkpoints import most_checkpoints
from prefalign.training.dry_run import Counted, count_step
from prefalign.training.fake_meter import Moment
from prefalign.training.largest import largest, largest_batch, largest_picture
from prefalign.training.lora import LoraSettings
from prefalign.training.metering import LiveTensors
from prefalign.training.planner import Options, Planner
from prefalign.training.reference import cache_reference
from prefalign.training.sized_rows import RowSize, sized_rows
from prefalign.training_plan import plan, table
from tests import tiny_vlms
from tests.training_runs import make_trainer, write_pairs

RECIPE = bundled.load_stage("train_preference")
GIB = 1 << 30
TOY = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 8}
LLAVA_7B = {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}  # fmt: skip
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def save_llava(folder, text, vision, weights=True):
    """A LLaVA of other sizes with pictures of 576 tokens; for a large one, without weights."""
    processor, model_class, made = tiny_vlms.BUILDERS["llava"]()
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    made.vision_config.update({**vision, "image_size": 336})
    made.text_config = LlamaConfig(**{**made.text_config.to_dict(), "max_position_embeddings": 2048, **text})
    made.image_seq_length = 576
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    if weights:
        torch.manual_seed(0)
        model_class(made).save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """3 layers of width 256, 576 tokens a picture."""
    text = {**TOY, "num_hidden_layers": 3, "vocab_size": 4096, "head_dim": 32}
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    return save_llava(tmp_path_factory.mktemp("models") / "toy", text, vision)


@pytest.fixture(scope="module")
def llava_7b(tmp_path_factory):
    """LLaVA-1.5-7B by its dimensions."""
    return save_llava(tmp_path_factory.mktemp("models") / "llava-1.5-7b", {**LLAVA_7B, "head_dim": 128}, CLIP_L, False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "two", 2)


def run_config(model, pairs, output="unused", *, lora=False, reference="cached", **trainer):
    values = {
        "model": {"model_name_or_path": str(model)},
        "pairs": str(pairs),
        "output": str(output),
        "reference": reference,
    }
    values["trainer"] = {"per_device_train_batch_size": 2, "optim": "adamw_torch", **trainer}
    values |= {"lora": {"r": 4, "alpha": 8}} if lora else {}
    return config.build(RECIPE.Config, values)


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
    ("optim", "expected"), [("adamw_torch", 8), ("sgd", 0), ("adafactor", 0.125), ("adamw_bnb_8bit", 2)]
)
def test_state_of_the_optimizer_that_is_asked_for(tmp_path, optim, expected):
    arguments = training_arguments({"optim": optim}, output=tmp_path, seed=0)
    assert memory.optimizer_bytes(arguments, torch.float32) == pytest.approx(expected, abs=0.01)


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


def test_rows_have_the_sizes_asked_for(planner):
    row = planner.tokens(planner.rows[-1])
    assert (row.pictures, row.prompt, row.answer) == (576, 40, 40)
    assert row.run == 576 + 40 + 2 * 39


def test_disk_counts_what_is_kept_at_once(toy, pairs):
    """Two kept checkpoints and a third before the oldest goes, each with 8 bytes of state per trained number."""
    settings = {"max_steps": 10, "save_steps": 2, "save_total_limit": 2}
    planner = Planner(run_config(toy, pairs, lora=True, **settings), Options(device="cpu"))
    made = plan(planner)
    trained = made.parameters[1]
    assert made.steps == 10
    assert made.disk["final model"] == trained * 4
    assert made.disk["checkpoints"] == pytest.approx(3 * trained * (4 + 8), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_steps": 4}, 3),  # 4, 8, and the end
        ({"save_steps": 5}, 2),
        ({"save_steps": 0.3}, 4),  # of 10 steps: 3, 6, 9, and the end
        ({"save_steps": 0.01}, 10),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "epoch"}, 3),
        ({"save_strategy": "epoch", "save_total_limit": 1}, 2),
    ],
)
def test_checkpoints_of_ten_steps(tmp_path, settings, expected):
    arguments = training_arguments({"max_steps": 10, **settings}, output=tmp_path, seed=0)
    assert most_checkpoints(arguments, 10, 2.5) == expected


def test_as_many_checkpoints_as_are_written(toy, pairs, tmp_path):
    trainer = make_trainer(toy, pairs, tmp_path, lora=True, max_steps=3, save_steps=2)
    trainer.train()
    assert most_checkpoints(trainer.args, 3, 3.0) == len(list(tmp_path.glob("checkpoint-*"))) == 2


def command(toy, tmp_path, *more):
    return ["plan", "train_preference", "--model.model_name_or_path", str(toy), "--pairs", str(tmp_path / "none"),
            "--output", "unused", "--rows", "1000", "--device", "cpu", "--prompt_tokens", "40", "--answer_tokens", "40",
            *more]  # fmt: skip


def test_the_command_prints_a_table(toy, tmp_path, capsys):
    assert (
        cli.main(
            command(toy, tmp_path, "--memory", "0.12", "--price", "2.5", "--trainer.per_device_train_batch_size", "1")
        )
        == 0
    )
    text = capsys.readouterr().out
    name, *lines = text.splitlines()
    assert name == str(toy)
    assert max(map(len, lines)) <= 120
    for piece in ("memory of one device", "of 0.12 GiB: ", "cost", "LoRA on 4 bits", "largest batch in 0.12 GiB", "*"):
        assert piece in text, piece
    assert not (tmp_path / "none").exists()


def test_json_and_table_say_the_same(toy, tmp_path, capsys):
    assert (
        cli.main(
            command(toy, tmp_path, "--devices", "4", "--profile", "zero3", "--trainer.loss_type", "[sft]", "--json")
        )
        == 0
    )
    made = json.loads(capsys.readouterr().out)
    parts = made["need"]
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert {other["profile"] for other in made["others"]} == {"ddp", "zero2", "zero3", "fsdp2"}
    same = {"method": "full", "profile": "zero3", "reference": "cached", "checkpointing": True}
    [asked] = [other["bytes"] for other in made["others"] if same.items() <= other.items()]
    assert asked == pytest.approx(sum(parts.values()))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A small checkpoint stored in float16, as LLaVA-1.5 is."""
    text = {"num_hidden_layers": 3}
    folder = save_llava(tmp_path_factory.mktemp("models") / "half", text, {"num_hidden_layers": 1}, weights=False)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "dtype": "float16"}))
    return folder


def test_a_plan_for_four_gpus(half, tmp_path, capsys):
    """With the command's defaults: GPUs, bfloat16, a checkpoint in float16. The other ways have the reference both ways."""
    given = ["plan", "train_preference", "--model.model_name_or_path", str(half), "--pairs", str(tmp_path / "none"),
             "--output", "unused", "--rows", "100", "--devices", "4", "--reference", "online", "--lora.r", "4",
             "--trainer.per_device_train_batch_size", "1", "--json"]  # fmt: skip
    assert cli.main(given) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["bf16"], made["setup"]["profile"], made["setup"]["reference"]) == (True, "ddp", "online")
    frozen = made["parameters"][0] - made["parameters"][1]
    assert made["need"]["weights"] == pytest.approx(2 * frozen + 4 * made["parameters"][1], rel=0.01)
    needs = {
        tuple(value for name, value in other.items() if name != "bytes"): other["bytes"] for other in made["others"]
    }
    fours = [setup for setup in needs if setup[0] == "qlora"]
    assert {setup[1:3] for setup in fours} == {
        (profile, reference) for profile in ("ddp", "zero2") for reference in ("cached", "online")
    }
    for setup in fours:
        assert needs[setup] <= needs["lora", *setup[1:]], setup


def test_weights_and_autocast_of_two_kinds(half, pairs, tmp_path):
    """float16 weights under bfloat16 autocast stop a run at its first step; plan and recipe say so before it."""
    message = (
        "the weights are float16 and trainer.bf16 is true .* Set model.dtype to bfloat16, or trainer.bf16 to false"
    )
    chosen = run_config(half, pairs, lora=True, bf16=True)
    chosen.model.dtype = "float16"
    with pytest.raises(config.ConfigError, match=message):
        plan(Planner(chosen, Options(device="cpu")))
    arguments = training_arguments({"fp16": True, "use_cpu": False}, output=tmp_path, seed=0)
    with pytest.raises(config.ConfigError, match="bfloat16 and trainer.fp16 is true .* Set model.dtype to float32"):
        check_precision(torch.bfloat16, arguments)
    check_precision(torch.float16, arguments)


def test_a_run_on_four_bits_is_planned_so(half, pairs):
    chosen = run_config(half, pairs, lora=True)
    plain = Planner(chosen, Options(device="cpu"))
    chosen = run_config(half, pairs, lora=True)
    chosen.model.load_in_4bit = True
    quantised = Planner(chosen, Options(device="cpu"))
    assert (plain.setup.method, quantised.setup.method) == ("lora", "qlora")
    assert quantised.need(quantised.setup).weights < plain.need(plain.setup).weights
    with pytest.raises(
        config.ConfigError, match="--profile zero3 shares out the weights, and those of 4 bits stay whole"
    ):
        Planner(chosen, Options(device="cpu", devices=2, profile="zero3"))
    chosen.lora = None
    with pytest.raises(config.ConfigError, match="weights of 4 bits cannot be trained"):
        Planner(chosen, Options(device="cpu"))


def test_a_checkpoint_that_is_quantised(half, pairs, tmp_path):
    folder = Path(shutil.copytree(half, tmp_path / "quantised"))
    stored = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**stored, "quantization_config": said}))
    planner = Planner(run_config(folder, pairs, lora=True), Options(device="cpu"))
    assert planner.setup.method == "qlora"
    assert {other.method for other in planner.alternatives()} == {"qlora"}
    said = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps({**stored, "quantization_config": said}))
    with pytest.raises(config.ConfigError, match="is quantised .bitsandbytes., and not to 4 bits"):
        Planner(run_config(folder, pairs, lora=True), Options(device="cpu"))


def test_sizes_of_rows_that_are_there(half, pairs):
    with pytest.raises(
        config.ConfigError, match="--rows, --pictures would say what the rows will be, and .*two is there"
    ):
        Planner(run_config(half, pairs), Options(rows=5, pictures=1))


@pytest.mark.parametrize("stages", [["train_sft"], ["bdhs", "--then", "train_sft"], ["evaluate_model"]])
def test_stages_that_plan_does_not_know(capsys, stages):
    given = [*stages[:1], "--config", "datagen/bdhs", *stages[1:]] if stages[0] == "bdhs" else stages
    data = ["--data.path", "rows.jsonl", "--output.path", "unused"] if stages[0] == "bdhs" else []
    assert cli.main(["plan", *given[:3], *data, *given[3:]]) == 1
    assert f"and was given '{stages[-1]}'" in capsys.readouterr().err


def test_notes_say_what_would_fit(toy, pairs):
    planner = Planner(run_config(toy, pairs, reference="online"), Options(device="cpu", memory=0.1))
    made = plan(planner)
    made.others = planner.alternatives()
    text = table(made)
    assert "does not fit, " in text
    assert "What fits: LoRA, one device" in text
    assert "LoRA on 4 bits: `--model.load_in_4bit true` with `lora`." in text
    assert "`reference: cached` needs no second model: " in text


def test_pairs_that_are_missing(toy, tmp_path):
    with pytest.raises(
        config.ConfigError, match="there are no pairs at .*none, so nothing says how long rows are.*--rows"
    ):
        Planner(run_config(toy, tmp_path / "none"), Options())


def test_a_model_that_is_not_there(tmp_path, pairs):
    with pytest.raises(ModelError, match="no folder '.*nowhere'"):
        Planner(run_config(tmp_path / "nowhere", pairs), Options())


def test_memory_that_is_no_number(toy, tmp_path, capsys):
    assert cli.main(command(toy, tmp_path, "--memory", "lots")) == 1
    assert "memory: Input should be a valid number" in capsys.readouterr().err
    with pytest.raises(config.ConfigError, match="--memory -3: a plan needs a number above 0"):
        Options(memory=-3)


def test_one_device_is_not_four():
    with pytest.raises(config.ConfigError, match="--profile one runs on one device, and --devices says 4"):
        Options(devices=4, profile="one")


def test_what_fits_needs_the_memory(toy, pairs):
    with pytest.raises(config.ConfigError, match="--memory is needed to say what fits"):
        largest_batch(Planner(run_config(toy, pairs), Options(device="cpu")))


def test_prompts_that_do_not_fit(toy, pairs):
    with pytest.raises(ValueError, match="no prompt of the 2 rows looked at fits max_length 100"):
        Planner(run_config(toy, pairs, max_length=100), Options(device="cpu"))
