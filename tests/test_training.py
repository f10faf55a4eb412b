"""The trainer against stock TRL, its terms, the recipe's files, and the private names it leans on."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, GRPOConfig, RewardConfig, SFTConfig

from prefalign import bundled
from prefalign.config import ConfigError, build, load
from prefalign.families import tower
from prefalign.losses import TERMS, VIEWS, Weighted, read_losses, views_of
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.online.arguments import PPOConfig
from prefalign.training.arguments import training_arguments
from prefalign.training.checks import needs_reference
from prefalign.training.lora import LoraSettings, check_trainable
from prefalign.training.policy import load_policy
from prefalign.training.preference import PRIVATE, PreferenceTrainer
from tests.training_runs import largest_difference, losses, make_trainer, weights, write_pairs

LN2 = math.log(2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 8)


@pytest.fixture(scope="module")
def multi_image_pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 4, images=2)


def stock_trainer(checkpoint: Path, pairs: Path, output: Path, *, lora: bool, **settings) -> DPOTrainer:
    """What a user of TRL writes: the pair directory through `load_dataset`, no code of ours but the processor's loading."""
    config = ModelConfig(str(checkpoint), device="cpu")
    return DPOTrainer(
        load_model(config),
        args=training_arguments(
            {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no",
             "gradient_checkpointing": False, "disable_tqdm": True, **settings}, output=output, seed=3),
        train_dataset=load_dataset(str(pairs), split="train"),
        processing_class=load_processor(config),
        peft_config=LoraSettings(r=4, alpha=8).to_peft() if lora else None,
    )  # fmt: skip


@pytest.mark.parametrize("fast_path", ["off", "auto"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["tiny_llava", "tiny_idefics3"])
def test_same_losses_and_gradients_as_stock_trl(family, lora, fast_path, request, multi_image_pairs, tmp_path):
    """Prompts repeated as TRL does: equal to the bit. Shared: to rounding, and so are the weights after two SGD steps."""
    checkpoint = request.getfixturevalue(family)
    settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "max_steps": 2}
    if fast_path == "auto":
        settings |= {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    stock = stock_trainer(checkpoint, multi_image_pairs, tmp_path / "a", lora=lora, **settings)
    ours = make_trainer(
        checkpoint, multi_image_pairs, tmp_path / "b", lora=lora, frozen=(), fast_path=fast_path, **settings
    )
    assert ours.route.layout == ("plain" if fast_path == "off" else "split")

    raw = [stock.train_dataset[index] for index in (0, 1)]
    encoded = [ours.train_dataset[index] for index in (0, 1)]
    gradients = []
    for trainer, rows in ((stock, raw), (ours, encoded)):
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
    largest = max(gradient.abs().max().item() for gradient in gradients[1].values())
    assert largest > 1e-3
    rounding = 0.0 if fast_path == "off" else 1e-5
    assert largest_difference(*gradients) <= rounding * largest

    start = weights(ours.model)
    stock.train()
    ours.train()
    assert len(losses(ours)) == 2
    if fast_path == "off":
        assert losses(stock) == losses(ours)
    assert losses(ours) == pytest.approx(losses(stock), rel=rounding)
    moved = largest_difference(start, weights(ours.model))
    assert moved > 1e-3
    assert largest_difference(weights(stock.model), weights(ours.model)) <= rounding * moved


@pytest.mark.parametrize("term", ["text", "visual"])
def test_loss_is_ln2_at_the_start_and_falls(term, tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, losses=(term,), max_steps=8, per_device_train_batch_size=8)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(LN2, abs=1e-6)
    assert losses(trainer)[-1] < LN2 - 0.01


def test_visual_term_is_ln2_for_ever_when_both_pictures_are_one(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, losses=("visual",))
    same = trainer.train_dataset.to_list()
    trainer.train_dataset = [{**row, "rejected_images": row["images"]} for row in same]
    trainer.train()
    assert losses(trainer) == pytest.approx([LN2] * 4, abs=1e-6)


def visual_loss(trainer, rows) -> float:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()


def test_another_rejected_picture_is_another_loss(tiny_llava, pairs, tmp_path):
    """Conditional term by hand: -log sigmoid(beta * (d(chosen | images) - d(chosen | rejected_images)))."""
    trainer = make_trainer(tiny_llava, pairs, tmp_path, losses=("visual",), per_device_train_batch_size=8)
    trainer.train()
    rows = [trainer.train_dataset[index] for index in range(4)]
    swapped = [{**row, "rejected_images": rows[index - 1]["rejected_images"]} for index, row in enumerate(rows)]
    as_given = visual_loss(trainer, rows)
    assert abs(visual_loss(trainer, swapped) - as_given) > 1e-5

    batch = replace(trainer.data_collator, layout="plain")(rows)["plain"]
    sums = []
    for model in (trainer.model, trainer.ref_model):
        with torch.no_grad():
            inputs = {key: value for key, value in batch.items() if key != "completion_mask"}
            logps = model(**inputs).logits.log_softmax(-1)[:, :-1]
        tokens = logps.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2) * batch["completion_mask"][:, 1:]
        sums.append(tokens.sum(1))
    ratio = sums[0] - sums[1]
    by_hand = -torch.nn.functional.logsigmoid(0.1 * (ratio[:4] - ratio[4:])).mean().item()
    assert as_given == pytest.approx(by_hand, abs=1e-5)


def test_the_picture_matters_for_the_text_term(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, per_device_train_batch_size=8)
    trainer.train()
    rows = [trainer.train_dataset[index] for index in range(4)]
    swapped = [{**row, "images": rows[index - 1]["images"]} for index, row in enumerate(rows)]
    blank = [{**row, "images": row["rejected_images"]} for row in rows]
    numbers = {round(visual_loss(trainer, batch), 6) for batch in (rows, swapped, blank)}
    assert len(numbers) == 3
    others = [{**row, "rejected_images": []} for row in rows]
    assert visual_loss(trainer, others) == visual_loss(trainer, rows)


def test_sft_loss_is_plain_nll_of_the_chosen_answers(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, loss_type=["sft"], per_device_train_batch_size=8)
    assert trainer.ref_model is None
    rows = [trainer.train_dataset[index] for index in range(8)]
    batch = replace(trainer.data_collator, layout="plain")(rows)["plain"]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:8]
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"][:8], "attention_mask": batch["attention_mask"][:8]}
        logits = load_model(ModelConfig(str(tiny_llava)))(**inputs, pixel_values=batch["pixel_values"][:8]).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(nll, abs=1e-5)
    assert losses(trainer)[-1] < nll
    assert "rewards/margins" not in trainer.state.log_history[0]
    assert "logps/chosen" in trainer.state.log_history[0]


def test_eight_small_batches_are_one_large(tiny_llava, pairs, tmp_path):
    runs = []
    for size, steps in ((8, 1), (1, 8)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        trainer = make_trainer(tiny_llava, pairs, tmp_path / str(size), save_strategy="no", **settings)
        trainer.train()
        runs.append((losses(trainer), weights(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=2e-6)
    assert largest_difference(runs[0][1], runs[1][1]) < 2e-5


def test_what_is_free_changes_and_what_is_frozen_does_not(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, save_strategy="no")
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if tower(name) != "vision"}


@pytest.mark.parametrize("family", ["tiny_llava", "tiny_idefics3"])
def test_lora_reaches_every_layer_of_the_language_model_and_nothing_else(family, request, pairs, tmp_path):
    trainer = make_trainer(request.getfixturevalue(family), pairs, tmp_path, lora=True)
    adapted = {name.split(".lora_")[0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {tower(name) for name in adapted} == {"language_model"}
    assert len(adapted) == 2 * 7  # layers x projections
    check_trainable(trainer.model, ["vision", "projector"])


@pytest.mark.parametrize(
    ("disable", "dropout"), [({}, 0.0), ({"disable_dropout": False}, 0.05)], ids=["default", "kept"]
)
def test_lora_dropout_counts_only_when_dropout_is_kept(disable, dropout, tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, lora=True, **disable)
    found = {module.p for name, module in trainer.model.named_modules() if name.endswith("lora_dropout.default")
             and isinstance(module, torch.nn.Dropout)}  # fmt: skip
    assert found == {dropout}


def test_adapter_in_a_frozen_tower_is_refused(tiny_llava):
    from peft import get_peft_model

    model = load_model(ModelConfig(str(tiny_llava)))
    wide = get_peft_model(model, LoraSettings(r=2, target_modules=r".*\.q_proj").to_peft())
    with pytest.raises(ConfigError, match="lora.target_modules reaches .*vision.* `freeze` names the vision tower"):
        check_trainable(wide, ["vision"])
    with pytest.raises(ConfigError, match="freeze: there is no tower called 'vison'; did you mean 'vision'"):
        check_trainable(wide, ["vison"])
    wide.requires_grad_(False)
    with pytest.raises(ConfigError, match="freeze: vision, projector, language_model leaves nothing to train"):
        check_trainable(wide, ["vision", "projector", "language_model"])


def test_losses_are_read_by_name_with_their_weights():
    read = read_losses([{"name": "visual", "weight": 0.5}, {"name": "text"}], beta=0.2)
    assert read == [Weighted("visual", TERMS["visual"](beta=0.2), 0.5), Weighted("text", TERMS["text"](), 1.0)]
    assert read_losses([{"name": "visual", "beta": 0.3}], beta=0.2)[0].term.beta == 0.3
    assert views_of(read) == ("chosen", "rejected", "chosen_on_rejected_image")
    assert VIEWS["chosen_on_rejected_image"].images == "rejected_images"
    assert needs_reference(read[1:], ["sigmoid", "sft"])
    assert not needs_reference(read[1:], ["sft"])
    assert needs_reference(read, ["sft"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], r"losses: the list is empty.* The usual list is \[{name: text}\]"),
        ([{"name": "visuel"}], "losses.0.name: no preference term called 'visuel'; did you mean 'visual'"),
        ([{"name": ["text"]}], r"losses.0.name: no preference term called \['text'\]"),
        (["text"], "losses.0: 'text' is no entry; write {name: text}"),
        ([{"name": "anchor", "delta": float("nan")}], "losses.0: delta is nan; a finite reward is to exceed it"),
        ([{"name": "opa_dpo", "delta": float("inf")}], "losses.0: delta is inf; a finite reward"),
        ([{"name": "text+visual"}], r"losses.0.name: no preference term called 'text\+visual'"),
        ([{"name": "text", "weight": 0}], "losses.0.weight: 0 is no positive number; leave the entry out"),
        (
            [{"name": "text"}, {"name": "visual", "bta": 1}],
            r"losses.1.bta: unknown key \(value 1\); did you mean 'beta'",
        ),
        ([{"name": "visual", "beta": "high"}], r"losses.0.beta: .* valid number.* \(got 'high'\)"),
        ([{"name": "text"}, {"name": "text"}], "losses: 'text' stands in the list 2 times; add their weights up"),
    ],
)
def test_losses_that_cannot_be_read_are_refused_by_entry(entries, message):
    with pytest.raises(ConfigError, match=message):
        read_losses(entries, beta=0.1)


def test_trainer_mapping_is_checked_by_name_and_type(tmp_path):
    arguments = training_arguments({"learning_rate": "1e-6", "loss_type": ["ipo"]}, output=tmp_path, seed=5)
    assert (arguments.learning_rate, arguments.loss_type, arguments.seed) == (1e-6, ["ipo"], 5)
    assert (arguments.max_length, arguments.beta, arguments.report_to) == (None, 0.1, [])
    assert arguments.bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    with pytest.raises(ConfigError) as error:
        training_arguments(
            {"lerning_rate": 1, "beta": "high", "output_dir": "x", "trust_remote_code": True}, output=tmp_path, seed=0
        )
    assert "trainer.lerning_rate: unknown key (value 1); did you mean 'learning_rate'?" in str(error.value)
    assert "trainer.beta: Input should be a valid number" in str(error.value)
    assert "trainer.trust_remote_code: has no effect here (set `model.trust_remote_code`); leave" in str(error.value)
    assert "trainer.output_dir: the recipe sets this field; set `output` instead." in str(error.value)


@pytest.mark.parametrize("kind", [DPOConfig, SFTConfig, RewardConfig, GRPOConfig, PPOConfig])
def test_plain_numbers_out_of_range_are_refused_by_name(kind, tmp_path):
    wrong = {"learning_rate": -1.0, "gradient_accumulation_steps": 0, "per_device_train_batch_size": 0,
             "per_device_eval_batch_size": -2, "num_train_epochs": 0, "weight_decay": math.nan,
             "max_grad_norm": -0.1}  # fmt: skip
    with pytest.raises(ConfigError) as error:
        training_arguments(wrong, output=tmp_path, seed=0, kind=kind)
    lines = str(error.value).split("\n  ")
    assert [line.split(" is ")[0] for line in lines] == [f"trainer.{name}" for name in wrong]
    assert "trainer.gradient_accumulation_steps is 0, so no batch would hold anything. Give 1 or more." in lines
    assert "trainer.weight_decay is nan, with which no step can be taken. Give a number of 0 or more." in lines
    fine = {"learning_rate": 0.0, "gradient_accumulation_steps": 1, "num_train_epochs": 0.5, "max_grad_norm": 0.0}
    arguments = training_arguments(
        {**fine, "use_cpu": True, "per_device_train_batch_size": 8}, output=tmp_path, seed=0, kind=kind
    )
    assert all(getattr(arguments, name) == value for name, value in fine.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the processes do find each other")
def test_processes_that_do_not_see_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started and this one sees 1.* leave trainer.use_cpu alone"):
        training_arguments({"use_cpu": False}, output=tmp_path, seed=0)


def test_private_names_that_we_lean_on_exist():
    for name in PRIVATE:
        assert callable(getattr(DPOTrainer, name)), name
    from trl.trainer import utils
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    assert isinstance(utils._CHUNKED_LOGPROB_CHUNK_SIZE, int)

    assert callable(DataCollatorForVisionPreference.torch_call)
    source = Path(sys.modules["trl.trainer.dpo_trainer"].__file__).read_text()
    for used in ("self._metrics[mode]", "self._total_train_tokens", "self.precompute_ref_logps", 'inputs["ref_chosen_logps"]',
                 "self._signature_columns", '"rewards/margins"'):  # fmt: skip
        assert used in source, used
    assert {"max_length", "loss_type", "beta"} <= set(DPOConfig.__dataclass_fields__)


RECIPE = bundled.load_stage("train_preference")


def recipe_config(checkpoint: Path, pairs: Path, output: Path, **more):
    values = {
        "model": {"model_name_or_path": str(checkpoint), "device": "cpu"},
        "pairs": str(pairs),
        "output": str(output),
        "trainer": {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4,
                    "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        **more,
    }  # fmt: skip
    return build(RECIPE.Config, values)


def test_recipe_saves_everything_and_starts_no_second_time(tiny_llava, pairs, tmp_path, capsys):
    config = recipe_config(tiny_llava, pairs, tmp_path / "run", lora={"r": 4, "alpha": 8}, eval_pairs=str(pairs))
    RECIPE.main(config)
    run = tmp_path / "run"
    printed = capsys.readouterr().out
    assert re.search(r"vision +36,224 parameters +0 trainable", printed)
    assert yaml.safe_load((run / "prefalign_config.yaml").read_text())["lora"]["r"] == 4
    assert (run / "pairs_manifest.json").read_text() == (pairs / "manifest.json").read_text()
    results = json.loads((run / "all_results.json").read_text())
    assert results["rows_used"] == results["rows_in"] == 8
    assert results["eval_loss"] < results["train_loss"] < LN2
    assert [
        row["step"] for row in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ] == [1, 2, 3, 4]
    for folder in (run, run / "checkpoint-2", run / "checkpoint-4"):
        AutoProcessor.from_pretrained(folder)
        assert (folder / "prefalign_config.yaml").is_file()
        PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_llava), folder)
    RECIPE.main(config)
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_recipe_drops_what_does_not_fit_and_says_so(tiny_llava, pairs, tmp_path, capsys):
    collate = make_trainer(tiny_llava, pairs, tmp_path / "x").data_collator
    dataset = make_trainer(tiny_llava, pairs, tmp_path / "x").train_dataset
    longest = max(collate.lengths(row).prompt for row in dataset)
    settings = {"max_steps": 1, "max_length": longest, "per_device_train_batch_size": 2, "save_strategy": "no"}
    RECIPE.main(recipe_config(tiny_llava, pairs, tmp_path / "run", trainer=settings))
    assert f"max_length {longest + 1} keeps all" in capsys.readouterr().out
    rows = json.loads((tmp_path / "run" / "rows.json").read_text())
    assert rows["rows_in"] == 8 == rows["rows_used"] + len(rows["too_long"])
    assert set(rows["too_long"]) == {"pair-2", "pair-5"}


def test_recipe_refuses_an_adapter_on_an_adapter(tiny_llava, pairs, tmp_path):
    make_trainer(tiny_llava, pairs, tmp_path / "a", lora=True).save_model(str(tmp_path / "a"))
    on_top = {"model": {"model_name_or_path": str(tmp_path / "a"), "device": "cpu"}}
    with pytest.raises(ConfigError, match="the model is an adapter already"):
        RECIPE.main(recipe_config(tiny_llava, pairs, tmp_path / "b", lora={"r": 4}, **on_top))


def test_reference_stays_the_starting_point(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, save_strategy="no")
    start = weights(trainer.model)
    trainer.train()
    assert largest_difference(weights(trainer.ref_model), start) == 0.0
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_a_model_built_in_memory_trains(tiny_llava, pairs, tmp_path):
    """Stock TRL loads the reference from the model's path, which such a model has not."""
    config = ModelConfig(str(tiny_llava))
    model = load_model(config)
    model.config._name_or_path = ""
    trainer = make_trainer(tiny_llava, pairs, tmp_path)
    again = PreferenceTrainer(
        model, args=trainer.args, train_dataset=trainer.train_dataset, processing_class=load_processor(config)
    )
    again.train()
    assert losses(again)[0] == pytest.approx(LN2, abs=1e-6)


def test_full_training_of_a_16_bit_checkpoint_is_in_32_bits(tiny_llava, pairs, tmp_path):
    config = ModelConfig(str(tiny_llava))
    load_model(config).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    load_processor(config).save_pretrained(tmp_path / "half")
    assert load_model(ModelConfig(str(tmp_path / "half"), device="cpu")).dtype == torch.bfloat16
    full = recipe_config(tmp_path / "half", pairs, tmp_path / "run")
    assert load_policy(full.model, full.lora, device="cpu").dtype == torch.float32
    adapter = recipe_config(tmp_path / "half", pairs, tmp_path / "run", lora={"r": 4})
    assert load_policy(adapter.model, adapter.lora, device="cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["train_preference", "train_preference_scenes"])
def test_bundled_configs_name_fields_that_trl_has(name, tmp_path):
    config = load(RECIPE.Config, bundled.find(f"recipes/{name}"))
    arguments = training_arguments(config.trainer, output=tmp_path, seed=config.seed)
    assert views_of(read_losses(config.losses, beta=arguments.beta))
    assert arguments.learning_rate == config.trainer["learning_rate"] > 0
