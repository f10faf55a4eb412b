"""`prefalign doctor`: a healthy run passes, and each check tells of the set-up that it is there for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlms import picture
from transformers import LlavaProcessor

from prefalign import bundled, cli, config, doctor, families
from prefalign.doctor import data, model, prompts, world
from prefalign.images import encode_png
from prefalign.records import Pair, assistant_message, user_message
from prefalign.store import OutputConfig, write_records
from prefalign.training.lora import LANGUAGE_LINEAR
from prefalign.training.reference import SETTINGS_FILE, ReferenceCache

STAGE = bundled.load_stage("train_preference")
COLOURS = ("red", "blue", "green", "white", "black", "grey", "pink", "brown")


def pair(number: int, **more) -> Pair:
    """A pair with answers of like lengths."""
    mine, other = COLOURS[number % 8], COLOURS[(number + 3) % 8]
    values = {
        "id": f"pair-{number}",
        "images": [encode_png(picture(number))],
        "rejected_images": [encode_png(picture(100 + number))],
        "prompt": [user_message("what is in the picture" + " now" * (number % 3) + " ?", 1)],
        "chosen": [assistant_message(f"a {mine} square")],
        "rejected": [assistant_message(f"a {other} circle")],
        "method": "test",
    }
    return Pair(**{**values, **more})


def write(folder: Path, pairs: list[Pair]) -> Path:
    write_records("test", pairs, output=OutputConfig(folder, block_size=5), record=Pair, settings={}, seed=0)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "pairs", [pair(number) for number in range(8)])


@pytest.fixture(scope="module")
def checkpoints(tiny_llava, tiny_idefics3, tmp_path_factory) -> dict[str, Path]:
    """The tiny models; Idefics3 with a generation config that stops at its end of turn, as the real one's does."""
    idefics = shutil.copytree(tiny_idefics3, tmp_path_factory.mktemp("tiny") / "idefics3")
    settings = json.loads((idefics / "generation_config.json").read_text())
    ends = families.end_token_ids(STAGE_processor(idefics))
    (idefics / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": ends}))
    return {"llava": tiny_llava, "idefics3": idefics}


def STAGE_processor(folder: Path):
    from prefalign.models import ModelConfig, load_processor

    return load_processor(ModelConfig(str(folder), device="cpu"))


def settings(checkpoint: Path, pairs: Path, output: Path, **changes):
    """The recipe's config: full training on the CPU, batches of 4; `trainer` and `model` are merged into the defaults."""
    usual = {
        "model": {"model_name_or_path": str(checkpoint), "device": "cpu"},
        "pairs": str(pairs),
        "output": str(output),
        "trainer": {"learning_rate": 1e-4, "per_device_train_batch_size": 4, "max_steps": 4, "disable_tqdm": True},
    }
    return config.build(STAGE.Config, config.merge(usual, changes))


@pytest.fixture
def case(tiny_llava, pairs, tmp_path):
    """Set a run up; by default the tiny LLaVA on the healthy pairs."""

    def make(checkpoint=tiny_llava, folder=pairs, **changes):
        chosen = settings(checkpoint, folder, tmp_path / "run", **changes)
        return doctor.prepare(STAGE, chosen, rows=64, scratch=tmp_path / "scratch")

    return make


def edited(checkpoint: Path, folder: Path, **files) -> Path:
    """A copy of a checkpoint with JSON files changed, and `template` in place of its chat template."""
    made = shutil.copytree(checkpoint, folder)
    template = files.pop("template", None)
    for name, changes in files.items():
        file = made / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    if template is not None:
        (made / "chat_template.jinja").write_text(template)
    return made


def template_of(checkpoint: Path) -> str:
    return (checkpoint / "chat_template.jinja").read_text()


def only(findings):
    [finding] = findings
    return finding


# ------------------------------------------------------------------------------------------------ healthy runs

LORA = {"lora": {"r": 4, "alpha": 8}}


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_a_healthy_run_passes_everything(family, changes, checkpoints, pairs, tmp_path):
    chosen = settings(
        checkpoints[family], pairs, tmp_path / "run", **changes, losses=[{"name": "text"}, {"name": "visual"}]
    )
    findings = doctor.examine(STAGE, chosen)
    assert [finding for finding in findings if finding.verdict in ("warn", "fail")] == []
    skipped = {finding.check for finding in findings if finding.verdict == "skip"}
    assert skipped == {"reference cache"} | ({"lora targets"} if not changes else set())
    assert not chosen.output.exists()
    found = {finding.check: finding.seen for finding in findings}
    assert "8 of a sample of 8 read" in found["rows"]
    assert found["first loss"] == "1.38629; with all margins at zero 1.38629, by hand 1.38629"
    if family == "llava":
        assert found["visual tokens"].startswith("4 a picture, 4 a row")


def test_the_other_way_to_run_a_reference(case):
    seen = [only(model.check_reference(case(reference=kind, **more))).seen.split(";")[0]
            for kind, more in (("online", {}), ("cached", {}), ("online", LORA))]  # fmt: skip
    assert seen == ["a copy", "the policy as it starts", "adapter off"]


def test_the_loss_is_that_of_the_run(tiny_llava, pairs, tmp_path):
    """What is examined is what is run: the loss of all rows, which no reference makes a constant of."""
    trainer = {"loss_type": ["sft"], "per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1}
    chosen = settings(tiny_llava, pairs, tmp_path / "run", trainer=trainer)
    examined = doctor.prepare(STAGE, chosen, rows=64, scratch=tmp_path / "scratch").step.loss
    STAGE.main(chosen)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert examined == pytest.approx(history[0]["loss"], abs=1e-4)


def test_nothing_changes(case):
    made = case()
    before = {name: tensor.clone() for name, tensor in made.trainer.model.state_dict().items()}
    doctor.run_checks(made)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.trainer.model.state_dict().items())


# ------------------------------------------------------------------------------------------------ rows


def test_a_row_that_cannot_be_read(case, tmp_path):
    broken = pair(1)
    broken.images[0]["bytes"] = broken.images[0]["bytes"][:200]
    found = only(data.check_rows(case(folder=write(tmp_path / "pairs", [pair(0), broken]))))
    assert (found.verdict, found.seen) == ("fail", "1 of a sample of 2 read (2 in the folder)")
    assert "The run stops at such a row. pair-1" in found.advice


def test_a_shard_that_is_lost(case, pairs, tmp_path):
    made = shutil.copytree(pairs, tmp_path / "pairs")
    max((made / "data").glob("*.parquet")).unlink()
    found = only(data.check_manifest(case(folder=made)))
    assert found.verdict == "fail"
    assert "holds 5 rows and its manifest says 8: shards were added or lost" in found.advice


def test_a_context_that_is_too_short(case, tiny_llava, tmp_path):
    text = json.loads((tiny_llava / "config.json").read_text())["text_config"]
    short = edited(tiny_llava, tmp_path / "short", config={"text_config": {**text, "max_position_embeddings": 16}})
    found = only(data.check_visual_tokens(case(short)))
    assert found.verdict == "fail"
    assert "the model has 16. Set trainer.max_length to 16." in found.advice


def test_pictures_that_the_template_leaves_out(case, tiny_llava, tmp_path):
    blind = edited(tiny_llava, tmp_path / "blind", template=template_of(tiny_llava).replace("<image>", ""))
    made = case(blind)
    found = only(data.check_rows(made))
    assert (found.verdict, found.seen) == ("fail", "0 of a sample of 8 read (8 in the folder)")
    assert "Found total 0 <image> tokens and 1 images" in found.advice
    skipped = by_name(doctor.run_checks(made))["visual tokens"]
    assert (skipped.verdict, skipped.seen) == ("skip", "no row of the sample could be read")


def test_rows_without_pictures(case, tmp_path):
    texts = [replace(pair(n), images=[], rejected_images=[], prompt=[user_message("what ?")]) for n in range(4)]
    made = case(folder=write(tmp_path / "pairs", texts))
    found = only(data.check_visual_tokens(made))
    assert (found.verdict, found.seen) == ("warn", "no row of the sample holds a picture")
    assert {f.check for f in doctor.run_checks(made) if f.verdict == "skip"} >= {"pictures", "picture counts"}


def test_max_length_that_drops_and_cuts(case):
    whole = [reading.total for reading in case().readings]
    prompts_ = sorted(reading.prompt for reading in case().readings)
    found = only(data.check_max_length(case(trainer={"max_length": prompts_[-1]})))
    assert found.verdict == "warn"
    assert f"{sum(length == prompts_[-1] for length in prompts_)} of 8 rows" not in found.seen
    assert "Dropped, since prompt and image tokens fill it: pair-" in found.advice
    assert f"({prompts_[-1]} tokens)" in found.advice
    assert "Without its end an answer does not teach to stop: pair-" in found.advice
    assert f"trainer.max_length {max(whole)} keeps all of the sample whole." in found.advice


def test_max_length_that_leaves_nothing(case):
    findings = {found.check: found for found in doctor.run_checks(case(trainer={"max_length": 5}))}
    assert findings["max_length"].verdict == "fail"
    assert findings["max_length"].seen == "5: 0 of 8 rows kept, 0 lose the end of an answer"
    assert (findings["gradients"].verdict, findings["gradients"].seen) == ("skip", "no row of the sample can be run")


def test_pictures_of_one_colour(case, tmp_path):
    grey = [pair(n, images=[encode_png(Image.new("RGB", (40, 48), (99, 99, 99)))]) for n in range(4)]
    made = case(folder=write(tmp_path / "grey", grey))
    found = only(data.check_pictures(made))
    assert (found.verdict, found.advice[:33]) == ("fail", "All pictures are of one colour: t")
    found = only(model.check_picture(made))
    assert found.verdict == "fail"
    assert "nats with blank picture; no row of the sample has other pictures to swap with" in found.seen
    one = case(folder=write(tmp_path / "one", [grey[0], *(pair(n) for n in range(1, 4))]))
    found = only(data.check_pictures(one))
    assert (found.verdict, found.seen) == ("warn", "4 different in 4 rows, 40x48 pixels, 1 of one colour")
    assert "Nothing is to be seen in the pictures of pair-0." in found.advice


def test_one_picture_everywhere(case, tmp_path):
    same = [pair(n, images=[encode_png(picture(5))]) for n in range(4)]
    found = only(data.check_pictures(case(folder=write(tmp_path / "pairs", same))))
    assert (found.verdict, found.advice) == (
        "warn", "All rows of the sample show the same picture, so answers need not look at it."
    )  # fmt: skip


def test_another_picture_that_is_the_same(case, tmp_path):
    same = [pair(n, rejected_images=[encode_png(picture(n))]) for n in range(4)]
    made = case(folder=write(tmp_path / "pairs", same), losses=[{"name": "visual"}])
    found = only(data.check_other_picture(made))
    assert (found.verdict, found.seen[:24]) == ("fail", "differs in 0 of 4 rows, ")
    assert "such a loss stays where it starts" in found.advice
    found = only(model.check_gradients(made))
    assert (found.verdict, found.advice[:22]) == ("fail", "All gradients are zero")


def test_answers_of_other_lengths_equal_answers_and_copies(case, tmp_path):
    rows = [pair(0), pair(1, rejected=pair(1).chosen), replace(pair(0), id="again")]
    rows += [
        pair(n, chosen=[assistant_message("a large red square at the top left of the picture")]) for n in range(2, 6)
    ]
    lengths, differ, copies = data.check_pairs(case(folder=write(tmp_path / "pairs", rows)))
    assert [found.verdict for found in (lengths, differ, copies)] == ["warn"] * 3
    assert "the policy will learn longer ones" in lengths.advice
    assert (differ.seen, differ.advice) == (
        "in 6 of 7 rows",
        "Nothing is learned from one text as both answers: pair-1.",
    )
    assert copies.seen == "1 of 7 rows are copies of another"


# ------------------------------------------------------------------------------------------------ prompts


def by_name(findings):
    return {found.check: found for found in findings}


def test_a_begin_mark_that_is_doubled(case, tiny_llava, tmp_path):
    twice = edited(tiny_llava, tmp_path / "twice", template="{{ bos_token }}{{ bos_token }}" + template_of(tiny_llava))
    found = by_name(prompts.check_template(case(twice)))["one begin mark"]
    assert (found.verdict, found.seen) == ("fail", "8 of 8 rows begin with two <bos>")


def test_a_generation_prompt_that_training_never_shows(case, tiny_llava, tmp_path):
    asks = template_of(tiny_llava).replace("{{ 'ASSISTANT:' }}", "{{ 'ASSISTANT: Well' }}")
    found = by_name(prompts.check_template(case(edited(tiny_llava, tmp_path / "asks", template=asks))))
    assert found["generation prompt"].verdict == "fail"
    assert found["generation prompt"].seen == "equal to the prompt of training in 0 of 8 rows"
    assert "what is trained is not what is asked later" in found["generation prompt"].advice


def test_a_loss_that_covers_the_role(case, tiny_llava, tmp_path):
    start = template_of(tiny_llava).index("{% if add_generation_prompt")
    deaf = edited(tiny_llava, tmp_path / "deaf", template=template_of(tiny_llava)[:start])
    found = by_name(prompts.check_template(case(deaf)))["template round trip"]
    assert (found.verdict, found.seen) == ("warn", "answers begin with 'ASSISTANT: ' in 8 of 8 rows")


def test_tokens_that_merge_at_the_seam(case, tiny_llava, tmp_path):
    """A prompt that ends inside a word: `is` and `There is` are other tokens apart than together."""
    merged = template_of(tiny_llava).replace("{{ 'ASSISTANT: ' }}", "{{ 'ASSISTANT:' }}")
    merged = merged.replace("ASSISTANT:' }}", "ASSISTANT: Th' }}")
    rows = [
        pair(n, chosen=[assistant_message("ere is a square")], rejected=[assistant_message("ere is a dog")])
        for n in (0, 1)
    ]
    made = case(edited(tiny_llava, tmp_path / "merged", template=merged), write(tmp_path / "pairs", rows))
    found = by_name(prompts.check_template(made))["template round trip"]
    assert (found.verdict, found.seen) == ("warn", "prompt + answer, tokenised as one text, in 0 of 2 rows")


def test_a_turn_that_never_ends(case, tiny_llava, tmp_path):
    endless = edited(tiny_llava, tmp_path / "endless", template=template_of(tiny_llava).replace("{{ eos_token }}", ""))
    found = only(prompts.check_end_of_turn(case(endless)))
    assert (found.verdict, found.seen) == ("fail", "<eos> ends 0 of 16 answers")
    assert "so the model forgets to stop. The chat template has to close an assistant turn" in found.advice


def test_a_turn_that_generation_does_not_stop_at(case, tiny_idefics3):
    found = only(prompts.check_end_of_turn(case(tiny_idefics3)))
    assert (found.verdict, found.seen) == ("warn", "<end_of_utterance> ends 16 of 16 answers")
    assert "`generate` does not stop at <end_of_utterance>. Add its id" in found.advice


def test_an_end_outside_the_loss(case):
    """A loss mask that leaves out the last token, as masks built from ids do where padding is the end mark."""
    made = case()
    collator = made.trainer.data_collator

    def by_id(rows):
        batch = collator(rows)
        ends = batch["input_ids"] == made.processor.tokenizer.eos_token_id
        return {**batch, "completion_mask": batch["completion_mask"].masked_fill(ends, 0)}

    by_id.max_length = None
    made.trainer.data_collator = by_id
    found = only(prompts.check_end_of_turn(made))
    assert found.verdict == "fail"
    assert found.advice.startswith("<eos> is outside the loss in pair-")


def test_padding_that_is_the_end_mark(case, tiny_llava, tmp_path):
    same = edited(tiny_llava, tmp_path / "same", tokenizer_config={"pad_token": "<eos>"})
    found = only(prompts.check_padding(case(same)))
    assert found.verdict == "warn"
    assert "<eos> is padding and an end mark. Here masks come from lengths" in found.advice


def test_marks_in_answers(case, tmp_path):
    ends = [pair(0), pair(1, chosen=[assistant_message("a <eos> square")])]
    found = only(prompts.check_marks_in_answers(case(folder=write(tmp_path / "ends", ends))))
    assert (found.verdict, found.seen) == ("warn", "1 of 2 rows have some inside an answer")
    assert "<eos> in the text of an answer is read as a mark, not as text (pair-1)" in found.advice
    shows = [pair(0), pair(1, rejected=[assistant_message("an <image> of a dog")])]
    found = only(prompts.check_marks_in_answers(case(folder=write(tmp_path / "shows", shows))))
    assert found.verdict == "fail"
    assert "<image> in an answer is read as a place for a picture that is not there (pair-1)" in found.advice


class Mirrored(LlavaProcessor):
    """A processor of somebody's own, which a checkpoint does not hold."""


def test_a_processor_that_is_lost_when_saved(case):
    made = case()
    made.processor.__class__ = Mirrored
    found = only(prompts.check_processor_saved(made))
    assert found.verdict == "fail"
    assert found.seen.endswith(
        ("a Mirrored could not be loaded again", "loaded again as TokenizersBackend, it cannot prepare a row")
    )


def test_a_processor_that_is_saved_as_another(case):
    made = case()
    made.processor.tokenizer.chat_template = made.processor.chat_template = made.processor.chat_template + " "
    made.processor.save_pretrained = lambda folder: shutil.copytree(
        made.config.model.model_name_or_path, folder, dirs_exist_ok=True
    )
    found = only(prompts.check_processor_saved(made))
    assert (found.verdict, found.seen) == (
        "fail",
        "LlavaProcessor loaded again gives other the chat template and token ids",
    )


# ------------------------------------------------------------------------------------------------ model and loss


def test_nothing_that_trains(case):
    findings = by_name(doctor.run_checks(case(freeze=["vision", "projector", "language_model"])))
    assert findings["what trains"].verdict == "fail"
    assert "leaves nothing to train. Take one off the list." in findings["what trains"].advice
    assert (findings["gradients"].verdict, findings["gradients"].seen) == ("skip", "nothing trains")


def test_an_adapter_in_a_frozen_tower(case):
    found = only(model.check_what_trains(case(lora={"r": 2, "target_modules": r".*\.q_proj"})))
    assert found.verdict == "fail"
    assert "`freeze` names the vision tower" in found.advice


def test_an_adapter_that_leaves_blocks_out(case):
    narrow = LANGUAGE_LINEAR.replace(r".*\.(", r".*\.layers\.0\..*\.(")
    found = only(model.check_lora(case(lora={"r": 2, "target_modules": narrow})))
    assert found.verdict == "warn"
    assert found.seen.startswith("7 linear layers of the language_model (down_proj, gate_proj,")
    assert found.seen.endswith("1 of 2 blocks")


def test_dropout_parts_policy_and_reference(case):
    made = case(trainer={"disable_dropout": False}, lora={"r": 4, "alpha": 8, "dropout": 0.5})
    with torch.no_grad():  # at zero an adapter hides its dropout
        for name, parameter in made.trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    findings = by_name(doctor.run_checks(made))
    assert findings["policy = reference"].verdict == "fail"
    assert "trainer.disable_dropout to true; an adapter has to start at zero" in findings["policy = reference"].advice
    assert findings["first loss"].verdict == "fail"
    assert "The run does not start where its losses say it does" in findings["first loss"].advice
    assert findings["shared = plain"].verdict == "skip"


def test_a_reference_cache_that_is_not_this_runs(case, tiny_llava, pairs, tmp_path):
    kept = tmp_path / "reference"
    STAGE.main(settings(tiny_llava, pairs, tmp_path / "first", reference_folder=str(kept), trainer={"max_steps": 1}))
    found = only(model.check_reference_cache(case(reference_folder=str(kept))))
    assert found.verdict == "pass"
    assert found.seen.startswith("8 of 8 sampled rows are there; a token of the batch differs by ")

    part = next(kept.glob("part-*.arrow"))
    cache = ReferenceCache(kept, ("chosen", "rejected"))
    moved = [(key, {view: values + 0.5 for view, values in cache[key].items()}) for key in list(cache._places)]
    part.unlink()
    cache.write(moved)
    found = only(model.check_reference_cache(case(reference_folder=str(kept))))
    assert (found.verdict, found.seen[-22:]) == ("fail", "differs by 0.5 at most")
    assert "These are not this reference's numbers. Delete " in found.advice

    written = json.loads((kept / SETTINGS_FILE).read_text())
    (kept / SETTINGS_FILE).write_text(json.dumps({**written, "reference": "0123456789abcdef"}))
    found = only(model.check_reference_cache(case(reference_folder=str(kept))))
    assert found.verdict == "fail"
    assert "was made otherwise: reference: 0123456789abcdef -> " in found.seen


def test_a_tower_that_gets_no_gradient(case, tiny_llava, tmp_path):
    """Adapters in the tower's blocks, of a model that reads the tower before its first block."""
    early = edited(tiny_llava, tmp_path / "early", config={"vision_feature_layer": -3})
    found = only(model.check_gradients(case(early, freeze=[], lora={"r": 2, "target_modules": r".*\.q_proj"})))
    assert found.verdict == "fail"
    assert found.advice.startswith("none of the 4 trainable tensors of the vision tower got a gradient")


def test_tensors_without_a_gradient_are_named(case):
    """LLaVA reads the second-last layer of its tower."""
    found = only(model.check_gradients(case(freeze=[])))
    assert found.verdict == "warn"
    assert "These get none and will not change: model.vision_tower." in found.advice


def changed_weights(checkpoint: Path, folder: Path, part: str, value: float) -> Path:
    made = shutil.copytree(checkpoint, folder)
    tensors = load_file(made / "model.safetensors")
    assert any(part in name for name in tensors)
    for name, tensor in tensors.items():
        if part in name:
            tensor.fill_(value)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


def test_gradients_that_are_not_finite(case, tiny_llava, tmp_path):
    broken = changed_weights(tiny_llava, tmp_path / "nan", "layers.1.mlp.up_proj", float("nan"))
    found = only(model.check_gradients(case(broken)))
    assert found.verdict == "fail"
    assert found.advice.startswith("Not finite: ")


def test_steps_that_sixteen_bits_lose(case):
    lost = only(model.check_weights_move(case(model={"dtype": "bfloat16"}, trainer={"learning_rate": 1e-6})))
    assert lost.verdict == "fail"
    assert "bfloat16 weights with a gradient, by a step of 1e-06" in lost.seen
    assert "smaller than bfloat16 resolves, and are lost. Train all weights in float32" in lost.advice
    kept = only(model.check_weights_move(case(trainer={"learning_rate": 1e-6})))
    assert kept.verdict == "pass"
    assert float(kept.seen.split("%")[0]) > 99 > 10 > float(lost.seen.split("%")[0])
    adapter = only(model.check_weights_move(case(model={"dtype": "bfloat16"}, trainer={"learning_rate": 1e-6}, **LORA)))
    assert (adapter.verdict, "float32 weights" in adapter.seen) == ("pass", True)


def test_a_projector_without_weights(case, tiny_llava, tmp_path):
    blind = changed_weights(tiny_llava, tmp_path / "blind", "multi_modal_projector", 0.0)
    found = only(model.check_picture(case(blind)))
    assert (found.verdict, found.seen) == (
        "fail", "an answer's token moves by 0 nats with blank picture, 0 nats with another row's picture"
    )  # fmt: skip
    assert "The answers do not depend on the pictures at all." in found.advice


def test_a_projector_that_whispers(case, tiny_llava, tmp_path):
    made = shutil.copytree(tiny_llava, tmp_path / "quiet")
    tensors = load_file(made / "model.safetensors")
    for name, tensor in tensors.items():
        if "multi_modal_projector.linear_2.weight" in name:
            tensor.mul_(1e-2)
        if "multi_modal_projector.linear_2.bias" in name:
            tensor.fill_(1.0)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    found = only(model.check_picture(case(made)))
    assert found.verdict == "warn"
    assert "The pictures hardly count: these pairs are decided by their text." in found.advice


def test_a_shared_path_whose_attention_was_taken_away(case):
    made = case()
    passed = only(model.check_paths(made))
    assert passed.verdict == "pass"
    assert passed.seen.startswith("route split: loss differs by ")
    del made.step
    made.model_config.get_text_config()._attn_implementation = "sdpa"
    found = only(model.check_paths(made))
    assert found.verdict == "fail"
    assert "set fast_path to 'off', and report this table" in found.advice


def test_a_run_without_the_shared_path(case):
    findings = by_name(doctor.run_checks(case(fast_path="off")))
    assert findings["shared = plain"].verdict == "skip"
    assert findings["shared = plain"].seen == "prompts are not shared: fast_path is off"
    assert findings["picture counts"].verdict == "pass"


# ------------------------------------------------------------------------------------------------ world


def test_weights_in_float16(case):
    found = only(world.check_device(case(model={"dtype": "float16"})))
    assert (found.verdict, found.seen) == ("warn", "cpu, weights float16, no autocast, 1 process (NO)")


def test_a_disk_that_is_too_small(case):
    found = only(world.check_disk(case(trainer={"max_steps": 10**12, "save_steps": 1})))
    assert found.verdict == "fail"
    assert "keep fewer: trainer.save_total_limit: 1" in found.advice
    few = only(world.check_disk(case(trainer={"max_steps": 10**12, "save_steps": 1, "save_total_limit": 1})))
    assert few.verdict == "pass"
    assert "for 2 checkpoints and the model in 1000000000000 steps" in few.seen


def test_an_output_folder_of_somebody_else(case, tmp_path):
    made = case()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    found = only(world.check_output(made))
    assert found.verdict == "fail"
    assert "is not empty and holds no run of prefalign" in found.advice


def test_a_run_that_is_finished(tiny_llava, pairs, tmp_path):
    chosen = settings(tiny_llava, pairs, tmp_path / "run", trainer={"max_steps": 1})
    STAGE.main(chosen)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    findings = by_name(doctor.examine(STAGE, chosen))
    assert findings["output"].verdict == "warn"
    assert "The run would do nothing. Give another output to train again." in findings["output"].advice
    assert findings["reference cache"].verdict == "pass"
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}


# ------------------------------------------------------------------------------------------------ the command


def arguments(checkpoint: Path, pairs: Path, output: Path, *more: str) -> list[str]:
    return ["doctor", "train_preference", "--model.model_name_or_path", str(checkpoint), "--model.device", "cpu",
            "--pairs", str(pairs), "--output", str(output), "--trainer.learning_rate", "1e-4",
            "--trainer.per_device_train_batch_size", "4", "--trainer.max_steps", "4", *more]  # fmt: skip


def test_the_command_passes(tiny_llava, pairs, tmp_path, capsys):
    target = tmp_path / "found.json"
    assert cli.main(arguments(tiny_llava, pairs, tmp_path / "run", "--rows", "6", "--json", str(target))) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "pass  6 of a sample of 6 read (8 in the folder)" in shown
    assert shown.endswith(" passed, 3 not for this run\n")
    written = json.loads(target.read_text())
    assert len(written) >= len(doctor.CHECKS)
    assert {entry["verdict"] for entry in written} == {"pass", "skip"}
    assert sorted(tmp_path.iterdir()) == [target]


def test_the_command_fails_and_says_what_to_do(tiny_llava, pairs, tmp_path, capsys):
    blind = changed_weights(tiny_llava, tmp_path / "blind", "multi_modal_projector", 0.0)
    assert cli.main(arguments(blind, pairs, tmp_path / "run")) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "picture counts fail an answer's token moves by 0 nats" in shown
    assert "-> The answers do not depend on the pictures at all." in shown
    assert "1 failed" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--pairs", "nowhere"], "nowhere holds no finished pairs (no manifest.json)"),
        (["--losses", "[{name: texd}]"], "no preference term called 'texd'; did you mean 'text'"),
        (["--trainer.lerning_rate", "1"], "trainer.lerning_rate: unknown key (value 1); did you mean 'learning_rate'?"),
        (["--rows", "none"], "--rows none: give the number of rows to read, as in `--rows 64`."),
        (["--json"], "--json needs a value."),
    ],
)
def test_errors_read_like_the_recipes(changes, message, tiny_llava, pairs, tmp_path, capsys):
    given = arguments(tiny_llava, pairs, tmp_path / "run")
    if changes[0] == "--pairs":
        at = given.index("--pairs")
        given, changes = given[:at] + given[at + 2 :], changes
    assert cli.main([*given, *changes]) == 1
    assert message in capsys.readouterr().err


def test_one_text_as_both_answers_everywhere(tiny_llava, tmp_path, capsys):
    same = write(tmp_path / "pairs", [pair(n, rejected=pair(n).chosen) for n in range(3)])
    assert cli.main(arguments(tiny_llava, same, tmp_path / "run")) == 1
    assert "chosen and rejected are the same text in all 3 pairs" in capsys.readouterr().err


def test_what_doctor_does_not_examine(capsys):
    assert cli.main(["doctor", "bdhs", "--config", "datagen/bdhs"]) == 1
    assert "doctor examines train_preference, and was given 'bdhs'." in capsys.readouterr().err
    assert cli.main(["doctor", "--config", "x.yaml"]) == 1
    assert "doctor needs a recipe before --config" in capsys.readouterr().err
    assert cli.main(["doctor", "--help"]) == 0
    assert "The exit status is 0 if nothing failed, else 1." in capsys.readouterr().out


def test_several_processes_are_refused(tiny_llava, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        config.ConfigError, match="doctor was started in 2 processes.* Start it without torchrun or accelerate"
    ):
        doctor.examine(STAGE, settings(tiny_llava, pairs, tmp_path / "run"))
