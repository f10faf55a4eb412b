"""`prefalign plan train_preference` as a command: what it prints, plans for any way to train, and refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from prefalign import cli, config
from prefalign.checkpoints import ModelError
from prefalign.training.arguments import check_precision, training_arguments
from prefalign.training.checkpoints import most_checkpoints
from prefalign.training.largest import largest_batch
from prefalign.training.planner import Options, Planner
from prefalign.training_plan import plan, table
from tests.planned_runs import run_config, save_llava, save_toy
from tests.training_runs import make_trainer, write_pairs


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "two", 2)


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
        ({"save_steps": 1, "save_total_limit": 1, "metric_for_best_model": "loss"}, 3),  # best, last, and the new one
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
            command(
                toy,
                tmp_path,
                "--memory",
                "0.12",
                "--price",
                "2.5",
                "--tflops",
                "1",
                "--trainer.per_device_train_batch_size",
                "1",
            )
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
