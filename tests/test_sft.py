"""SFT against stock TRL, what carries loss, what is dropped, exact resume, adapters that go on, and the recipe's messages."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from trl import SFTConfig, SFTTrainer

from prefalign import families
from prefalign.adapters import merge_adapters
from prefalign.config import ConfigError
from prefalign.images import ImageError
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.records import Prompt, assistant_message, user_message
from prefalign.store import OutputConfig, write_records
from prefalign.training.arguments import training_arguments
from prefalign.training.examples import AnswerCollator, keep_usable, load_examples, question_and_answer
from prefalign.training.lora import LoraSettings
from prefalign.training.policy import load_policy
from prefalign.training.upkeep import PRIVATE
from tests.sft_runs import RECIPE, make_example, make_sft_trainer, recipe_config, write_examples
from tests.tiny_vlms import PLAIN, save_tiny
from tests.training_runs import largest_difference, losses, weights, write_pairs

CLOCK = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
BOTH = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    return write_examples(tmp_path_factory.mktemp("sft") / "examples", map(make_example, range(8)))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Rows with one picture, two, and none."""
    rows = [make_example(number, images=(1, 0, 2, 0)[number % 4]) for number in range(8)]
    return write_examples(tmp_path_factory.mktemp("sft") / "mixed", rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("sft") / "pairs", 4, images=2)


def loss_of(trainer, rows) -> float:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()


@BOTH
@pytest.mark.parametrize("family", ["tiny_llava", "tiny_idefics3"])
def test_same_losses_and_gradients_as_stock_trl(family, lora, request, pairs, tmp_path):
    """Stock: what a user of TRL writes, the chosen answers of a pairs folder as `completion`."""
    checkpoint, settings = request.getfixturevalue(family), {"max_steps": 2, "save_strategy": "no"}
    ours = make_sft_trainer(checkpoint, pairs, tmp_path / "a", lora=lora, frozen=(), **settings)
    stock_rows = load_dataset(str(pairs), split="train").select_columns(["images", "prompt", "chosen"])
    stock = SFTTrainer(
        load_model(ModelConfig(str(checkpoint), device="cpu")),
        args=ours.args,
        train_dataset=stock_rows.rename_column("chosen", "completion"),
        processing_class=load_processor(ModelConfig(str(checkpoint))),
        peft_config=LoraSettings(r=4, alpha=8).to_peft() if lora else None,
    )
    seen = []
    for trainer in (stock, ours):
        rows = [trainer.train_dataset[index] for index in (0, 1)]
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        trainer.model.train()
        torch.manual_seed(0)  # the adapter's dropout
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        seen.append({"loss": loss.detach()})
        seen[-1] |= {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0
    assert largest_difference(*seen) == 0.0
    assert max(gradient.abs().max() for name, gradient in seen[1].items() if name != "loss") > 1e-3
    for trainer in (stock, ours):
        torch.manual_seed(0)
        trainer.train()
    assert losses(stock) == losses(ours)
    assert len(losses(ours)) == 2
    assert largest_difference(weights(stock.model), weights(ours.model)) == 0.0


@pytest.mark.parametrize("family", PLAIN)
def test_only_the_answer_and_its_end_carry_loss(family, tmp_path):
    """Loss by hand; and no answer sees what comes after it, which PaliGemma's and Gemma's masks could allow."""
    config = ModelConfig(str(save_tiny(family, tmp_path / "model")), device="cpu")
    processor, model = load_processor(config), load_model(config).train()
    batch = AnswerCollator(processor)([make_example(0).to_row(), make_example(1, images=2).to_row()])
    labels, ids = batch.pop("labels"), batch["input_ids"]
    for row, answer in enumerate(("a red square", "a red square on a blue background")):
        trained = labels[row][labels[row] != -100]
        assert torch.equal(trained, ids[row][labels[row] != -100])
        assert processor.tokenizer.decode(trained, skip_special_tokens=True).strip() == answer
        assert families.turn_end_id(processor) in trained[-2:]
    with torch.no_grad():
        logits = model(**batch).logits
        by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        last = (labels[1] != -100).nonzero()[-1].item()
        other = ids.clone()
        other[1, last] = (ids[1, last] + 7) % 200
        assert torch.equal(model(**{**batch, "input_ids": other}).logits[1, :last], logits[1, :last])
    folder = write_examples(tmp_path / "data", [make_example(0), make_example(1, images=2)])
    trainer = make_sft_trainer(tmp_path / "model", folder, tmp_path / "run")
    trainer.model.train()
    loss = loss_of(trainer, list(trainer.train_dataset))
    assert loss == pytest.approx(by_hand.item(), abs=1e-5)
    assert math.isfinite(loss)


def test_an_answer_that_the_template_leaves_open_gets_an_end(tiny_llava):
    """LLaVA-1.5's template on the Hub writes a blank after an answer and no end: a model would be taught never to stop."""
    processor = load_processor(ModelConfig(str(tiny_llava)))
    assert AnswerCollator(processor).end == ""
    processor.chat_template = processor.tokenizer.chat_template = processor.chat_template.replace(
        "{{ eos_token }}", "{{ ' ' }}"
    )
    collator = AnswerCollator(processor)
    assert collator.end == processor.tokenizer.eos_token
    batch = collator([make_example(0).to_row()])
    trained = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(trained) == " a red square<eos>"


def test_the_picture_matters(tiny_llava, examples, tmp_path):
    trainer = make_sft_trainer(tiny_llava, examples, tmp_path)
    rows = [trainer.train_dataset[index] for index in range(4)]
    swapped = [{**row, "images": rows[index - 1]["images"]} for index, row in enumerate(rows)]
    assert abs(loss_of(trainer, swapped) - loss_of(trainer, rows)) > 1e-4


@BOTH
@pytest.mark.parametrize("family", ["tiny_llava", "tiny_idefics3"])
def test_resume_equals_the_uninterrupted_run(family, lora, request, mixed, tmp_path):
    """The adapter's dropout, a warm-up, rows without pictures, logs that do not meet the checkpoints."""
    checkpoint = request.getfixturevalue(family)
    settings = {"warmup_steps": 3, "logging_steps": 3, "lora": lora}
    straight = make_sft_trainer(checkpoint, mixed, tmp_path / "straight", **settings)
    start = weights(straight.model)
    straight.train()
    resumed = make_sft_trainer(checkpoint, mixed, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    logs = [
        [{key: value for key, value in entry.items() if key not in CLOCK} for entry in trainer.state.log_history]
        for trainer in (straight, resumed)
    ]
    assert logs[0] == logs[1]
    assert largest_difference(weights(straight.model), weights(resumed.model)) == 0.0
    assert largest_difference(weights(straight.model), start) > 1e-4


def test_best_model_is_the_best_one(tiny_llava, examples, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3, "evaluates": True}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_sft_trainer(tiny_llava, examples, tmp_path, **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    saved = AutoModelForImageTextToText.from_pretrained(best).state_dict()
    assert largest_difference(weights(trainer.model), saved) == 0.0


def test_rows_without_pictures_alone_do_not_alarm_the_audit(tiny_llava, tmp_path):
    """Nothing reaches the vision tower, which trains, and rightly so; the batch holds no picture."""
    folder = write_examples(tmp_path / "text", [make_example(number, images=0) for number in range(4)])
    trainer = make_sft_trainer(tiny_llava, folder, tmp_path / "run", frozen=(), max_steps=2, save_strategy="no")
    trainer.train()
    assert not trainer.saw_pictures
    assert losses(trainer)[1] < losses(trainer)[0]


def test_rows_are_told_apart_by_their_columns(examples, pairs, tmp_path):
    rows = [Prompt("a", [], [user_message("Who?")], "A fox."), Prompt("b", [], [user_message("Who?")])]
    prompts = tmp_path / "prompts"
    write_records("test", rows, output=OutputConfig(prompts), record=Prompt, settings={}, seed=0)
    assert question_and_answer(load_examples(examples)[0])[1] == [assistant_message("a red square")]
    assert question_and_answer(load_examples(pairs)[1])[1] == [assistant_message("a red square on a blue background")]
    assert question_and_answer(load_examples(pairs, "answer")[1])[1] == []
    told = [question_and_answer(row)[1] for row in load_examples(prompts)]
    assert told == [[assistant_message("A fox.")], []]
    with pytest.raises(
        ConfigError, match="answer is 'chosen', and the rows of .*prompts have answer. Set answer to one"
    ):
        load_examples(prompts, "chosen")
    with pytest.raises(
        ConfigError, match="answer is 'answer', and .* their answer in their last turn. Leave `answer` out"
    ):
        load_examples(examples, "answer")
    (prompts / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no finished rows .*start it again with the same config"):
        load_examples(prompts)


def test_what_cannot_be_used_is_counted_and_named(tiny_llava, tmp_path):
    rows = [make_example(number) for number in range(6)]
    rows[1] = replace(rows[1], messages=rows[1].messages[:1])
    rows[2] = replace(rows[2], messages=[*rows[2].messages[:1], assistant_message("  ")])
    rows[3] = replace(rows[3], messages=[*rows[3].messages, user_message("where ?"), assistant_message("here")])
    dataset = load_examples(write_examples(tmp_path / "data", rows))
    processor = load_processor(ModelConfig(str(tiny_llava)))
    collator = AnswerCollator(processor)
    lengths = {row["id"]: collator.length(row) for row in dataset if question_and_answer(row)[1]}
    longest = max(lengths.values())
    limited = AnswerCollator(processor, max_length=longest - 1)
    used, kept = keep_usable(dataset, limited)
    too_long = {name: length for name, length in lengths.items() if length == longest}
    assert kept.too_long == too_long
    assert kept.unanswered == ["example-1", "example-2"]
    assert kept.rows_in == 6 == kept.rows_used + len(kept.too_long) + len(kept.unanswered)
    assert len(used) == kept.rows_used == 3
    assert kept.summary().startswith(
        f"dropped 1 of 6 rows longer than max_length ({next(iter(too_long))}); max_length {longest} keeps"
    )
    assert "dropped 2 of 6 rows that do not end with a question and an answer (example-1, example-2)" in kept.summary()
    again, all_fit = keep_usable(dataset, AnswerCollator(processor, max_length=longest))
    assert (len(again), all_fit.too_long, all_fit.earlier_answers) == (4, {}, 1)
    with pytest.raises(
        ValueError, match=f"row {next(iter(too_long))} has {longest} tokens .* Raise max_length to {longest}"
    ):
        limited(list(again))
    with pytest.raises(ValueError, match=f"no row fits max_length 3: .* max_length {longest} keeps all"):
        keep_usable(again, AnswerCollator(processor, max_length=3))
    with pytest.raises(ValueError, match="none of the 2 rows ends with a question and an answer .example-1, example-2"):
        keep_usable(dataset.select([1, 2]), collator)
    with pytest.raises(ValueError, match="row example-1 does not end with a question and an answer"):
        collator([dataset[1]])
    with pytest.raises(
        ValueError, match="row example-0: the prompt has 1 image placeholder.* `images` holds 0 picture"
    ):
        collator([{**dataset[0], "images": []}])


@pytest.mark.parametrize("max_length", [None, 100])
def test_rows_that_cannot_be_collated_are_named_before_training(max_length, tiny_llava, tmp_path):
    """Without a look at the pictures themselves."""
    rows = [make_example(number, images=2) for number in range(4)]
    rows[1] = replace(rows[1], images=rows[1].images[:1])
    rows[2] = replace(rows[2], images=[])
    dataset = load_examples(write_examples(tmp_path / "data", rows))
    collator = AnswerCollator(load_processor(ModelConfig(str(tiny_llava))), max_length)
    message = (
        r"2 of the 4 rows hold another number of pictures than their prompts .* \(example-1, example-2\): .*Write one"
    )
    with pytest.raises(ValueError, match=message):
        keep_usable(dataset, collator)
    assert keep_usable(dataset.select([0, 3]), collator)[1].rows_used == 2


def test_a_broken_picture_is_told_with_its_row(tiny_llava, tmp_path):
    row = make_example(3)
    row.images[0]["bytes"] = row.images[0]["bytes"][:200]
    dataset = load_examples(write_examples(tmp_path / "data", [row]))
    with pytest.raises(ImageError, match="row example-3: picture .* is damaged") as raised:
        AnswerCollator(load_processor(ModelConfig(str(tiny_llava))))(list(dataset))
    assert raised.value.reason == "truncated_image"


def test_paligemma_needs_a_picture_in_every_row(tmp_path):
    processor = load_processor(ModelConfig(str(save_tiny("paligemma", tmp_path / "model"))))
    with pytest.raises(
        ValueError, match="row example-0 has no picture, and a PaliGemmaProcessor prepares no text without"
    ):
        AnswerCollator(processor)([make_example(0, images=0).to_row()])
    folder = write_examples(tmp_path / "data", [make_example(0, images=0), make_example(1)])
    with pytest.raises(
        ValueError, match=r"1 of the 2 rows hold .*or none, which a PaliGemmaProcessor cannot prepare .example-0"
    ):
        keep_usable(load_examples(folder), AnswerCollator(processor))


def test_recipe_saves_everything_goes_on_and_starts_no_second_time(tiny_llava, mixed, tmp_path, capsys):
    """A kill while checkpoint-4 was written leaves checkpoint-2; the same command ends with the same files."""
    collator = AnswerCollator(load_processor(ModelConfig(str(tiny_llava))))
    longest = max(collator.length(row) for row in load_examples(mixed))
    settings = recipe_config(tiny_llava, mixed, tmp_path / "a").trainer | {"max_length": longest - 1}
    changes = {"eval_data": str(mixed), "trainer": settings}
    RECIPE.main(recipe_config(tiny_llava, mixed, tmp_path / "a", **changes))
    printed = capsys.readouterr().out
    assert re.search(r"vision +36,224 parameters +0 trainable", printed)
    assert re.search(
        r"(\d) rows, dropped \d of 8 rows longer than max_length \(example-\d.*\); max_length \d+ keeps all", printed
    )
    run = tmp_path / "a"
    results, rows = (json.loads((run / name).read_text()) for name in ("all_results.json", "rows.json"))
    assert results["rows_in"] == 8 == results["rows_used"] + results["rows_too_long"] == results["eval_rows_in"]
    assert len(rows["too_long"]) == results["rows_too_long"] > 0
    assert results["eval_loss"] < results["train_loss"]
    assert (run / "data_manifest.json").read_text() == (mixed / "manifest.json").read_text()
    for folder in (run, run / "checkpoint-4"):
        AutoProcessor.from_pretrained(folder)
        assert (folder / "prefalign_config.yaml").is_file()
    (run / "all_results.json").rename(tmp_path / "all_results.json")
    final = load_file(run / "model.safetensors")
    (run / "checkpoint-4" / "trainer_state.json").write_text('{"epoch"')
    RECIPE.main(recipe_config(tiny_llava, mixed, run, **changes))
    assert "going on from checkpoint-2" in capsys.readouterr().out
    assert largest_difference(final, load_file(run / "model.safetensors")) == 0.0
    again = json.loads((run / "all_results.json").read_text())
    assert {name: value for name, value in again.items() if "per_second" not in name and "runtime" not in name} == {
        name: value for name, value in results.items() if "per_second" not in name and "runtime" not in name
    }
    RECIPE.main(recipe_config(tiny_llava, mixed, run, **changes))
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_the_adapter_of_the_first_stage_goes_on(tiny_llava, examples, tmp_path, capsys):
    """STIC: stage 2 trains the adapter of stage 1 on; without `lora` it is merged and all weights train."""
    lora = {"r": 4, "alpha": 8}
    RECIPE.main(recipe_config(tiny_llava, examples, tmp_path / "one", lora=lora))
    first = load_file(tmp_path / "one" / "adapter_model.safetensors")
    model = load_policy(ModelConfig(str(tmp_path / "one")), LoraSettings(**lora), device="cpu", continues=True)
    free = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(free) == len(first) == 2 * 2 * 7  # A and B, layers, projections
    RECIPE.main(recipe_config(tmp_path / "one", examples, tmp_path / "two", lora=lora))
    assert capsys.readouterr().out.count(f"training goes on with the adapter of {tmp_path / 'one'}") == 1
    second = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert 0 < largest_difference(first, second) < 0.02  # four steps of 1e-3 from there, not from the start
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_llava
    )
    base = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    together = PeftModel.from_pretrained(base, tmp_path / "two").merge_and_unload().state_dict()
    assert (
        largest_difference(together, weights(load_model(ModelConfig(str(tmp_path / "two"))).merge_and_unload())) == 0.0
    )
    full = load_file(merge_adapters([str(tmp_path / "two")], tmp_path / "full") / "model.safetensors")
    assert largest_difference(full, load_file(tiny_llava / "model.safetensors")) > 1e-4
    merged = load_policy(ModelConfig(str(tmp_path / "one"), device="cpu"), None, device="cpu")
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with pytest.raises(
        ConfigError, match="lora.r is 8 and the adapter's 4; lora.dropout is 0.1 and the adapter's 0.05"
    ):
        load_policy(
            ModelConfig(str(tmp_path / "one")), LoraSettings(r=8, alpha=8, dropout=0.1), device="cpu", continues=True
        )
    only_q = LoraSettings(**lora, target_modules=r".*language_model.*q_proj")
    with pytest.raises(
        ConfigError, match="lora.target_modules matches 2 modules and the adapter is on 14 .they differ in"
    ):
        load_policy(ModelConfig(str(tmp_path / "one")), only_q, device="cpu", continues=True)
    with pytest.raises(
        ConfigError, match="lora: the model is an adapter already, and a second one would be saved without"
    ):
        load_policy(ModelConfig(str(tmp_path / "one")), LoraSettings(**lora), device="cpu")


def test_trainer_mapping_is_checked_against_sft_config(tmp_path):
    arguments = training_arguments(
        {"learning_rate": "2e-5", "loss_type": "dft"}, output=tmp_path, seed=5, kind=SFTConfig
    )
    assert (arguments.learning_rate, arguments.loss_type, arguments.seed, arguments.max_length) == (
        2e-5,
        "dft",
        5,
        None,
    )
    with pytest.raises(ConfigError) as error:
        training_arguments({"beta": 0.1, "packing": True, "max_lenght": 5, "zzzz": 1, "completion_only_loss": False, "seed": 1},
                           output=tmp_path, seed=0, kind=SFTConfig)  # fmt: skip
    lines = str(error.value)
    assert (
        "trainer.beta: unknown key (value 0.1); it is a field of DPOConfig, and this recipe trains with SFTConfig."
        in lines
    )
    assert "trainer.packing: has no effect here (TRL packs text only); leave it out." in lines
    assert "trainer.max_lenght: unknown key (value 5); did you mean 'max_length'?" in lines
    assert "trainer.zzzz: unknown key (value 1); SFTConfig of TRL lists the fields there are." in lines
    assert "trainer.completion_only_loss: has no effect here (the loss is always on the answers only)" in lines
    assert "trainer.seed: the recipe sets this field; set `seed` instead." in lines
    with pytest.raises(
        ConfigError, match="trainer.packing: .* it is a field of SFTConfig, and this recipe trains with DPOConfig"
    ):
        training_arguments({"packing": True}, output=tmp_path, seed=0)


def test_names_that_we_lean_on_exist():
    assert all(callable(getattr(Trainer, name)) for name in PRIVATE)
    source = Path(sys.modules["trl.trainer.sft_trainer"].__file__).read_text()
    for used in ("self._total_train_tokens", "self._signature_columns", "_set_signature_columns_if_needed"):
        assert used in source, used
