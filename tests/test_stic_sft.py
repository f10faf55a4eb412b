"""STIC stage 2 and describe-and-respond on the embedded world: descriptions follow the picture and go before the question."""

import itertools
import json

import pytest
from PIL import Image

from prefalign import bundled, config
from prefalign.describing import drawn_prompt
from prefalign.engines import Completion
from prefalign.engines.transformers import load_engine
from prefalign.images import sha256
from prefalign.models import ModelConfig
from prefalign.records import Example, Prompt, message_text, user_message
from prefalign.scenes.export import export
from prefalign.store import Dropped, read_records

SFT = config.read_yaml(bundled.find("datagen/stic_sft_scenes"))


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("stic")


@pytest.fixture(scope="module")
def engine():
    return load_engine(ModelConfig("scenes", device="cpu"), batch_size=8)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stic") / "questions"
    export(folder, split="train_fair", kind="vqa", start=0, stop=8)
    return folder


def settings(stage, rows, folder, **changes):
    known = {"data": {"path": rows}, "output": {"path": folder, "block_size": 5}, "batch_size": 8}
    return config.build(stage.Config, config.merge(config.merge(SFT, known), changes))


def run(stage, rows, folder, **changes):
    manifest = stage.main(settings(stage, rows, folder, **changes))
    return manifest, {row.meta["parent"]: row for row in read_records(folder, Example)}


def prompts_of(folder):
    return list(read_records(folder, Prompt))


@pytest.fixture(scope="module")
def examples(stage, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stic") / "sft"
    return (folder, *run(stage, questions, folder))


def test_examples_hold_the_description_and_the_rows_own_answer(examples, questions):
    _, manifest, found = examples
    assert manifest.rows_in == 8 == manifest.rows_used + sum(manifest.dropped.values())
    assert len(found) == 8
    for prompt in prompts_of(questions):
        example = found[prompt.id]
        example.check()
        asked, answered = example.messages
        description = example.meta["description"]
        assert len(description) > 20
        assert [block["type"] for block in asked["content"]] == ["image", "text"]
        assert asked["content"][1]["text"] == f"{description} {message_text(prompt.messages)}"
        assert message_text([answered]) == prompt.answer
        assert example.images == prompt.images
        assert example.meta["images_sha256"] == [sha256(prompt.images[0])]
        assert example.meta["description_prompt"] == drawn_prompt(SFT["neutral_prompts"], 0, prompt.id)
        assert example.meta["description_tokens"] > 4


def test_examples_are_what_datasets_reads(examples):
    from datasets import load_dataset

    read = load_dataset(str(examples[0]), split="train")
    assert len(read) == 8
    assert set(read.column_names) == {"id", "images", "messages", "meta"}
    assert isinstance(read[0]["images"][0], Image.Image)


def test_examples_neither_depend_on_batches_nor_on_other_rows(stage, examples, questions, tmp_path):
    _, alone = run(stage, questions, tmp_path / "alone", batch_size=1, data={"limit": 3}, output={"block_size": 1})
    assert len(alone) == 3
    assert all(example.to_row() == examples[2][name].to_row() for name, example in alone.items())


def test_another_picture_changes_the_description(stage, engine, examples, questions, tmp_path):
    block = prompts_of(questions)
    swapped = [Prompt(one.id, other.images, one.messages, one.answer) for one, other in itertools.pairwise(block)]
    outcomes = stage.infuse(swapped, engine, settings(stage, questions, tmp_path))
    for prompt, outcome in zip(swapped, outcomes, strict=True):
        assert outcome[0].meta["description"] != examples[2][prompt.id].meta["description"]
        assert message_text(outcome[0].messages[1:]) == prompt.answer


def test_a_share_of_rows_stays_plain(stage, engine, questions, tmp_path, monkeypatch):
    block = prompts_of(questions)
    known = settings(stage, questions, tmp_path, infusion={"plain_share": 0.5})
    calls, generate = [], engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda requests, sampling: calls.append(requests) or generate(requests, sampling)
    )
    outcomes = stage.infuse(block, engine, known)
    plain = {outcome[0].meta["parent"] for outcome in outcomes if not outcome[0].meta["described"]}
    assert 0 < len(plain) < 8
    assert len(calls[0]) == 8 - len(plain)  # what stays plain is not described
    for prompt, outcome in zip(block, outcomes, strict=True):
        if prompt.id in plain:
            assert outcome[0].messages[:-1] == prompt.messages
            assert "description" not in outcome[0].meta


def test_rows_that_make_no_example_are_counted(stage, engine, questions, tmp_path):
    known = settings(stage, questions, tmp_path, sampling={"max_new_tokens": 4})
    first = prompts_of(questions)[0]
    block = [
        Prompt("text", [], [user_message("What?")], "A cat."),
        Prompt("silent", first.images, first.messages),
        first,
    ]
    assert stage.infuse(block, engine, known) == [Dropped("no_picture"), Dropped("no_reference"), Dropped("cut_off")]
    refused = settings(stage, questions, tmp_path, neutral_prompts=["<image>?"])
    assert stage.infuse([first], engine, refused)[0].reason == "generation_failed"
    assert stage._example(first, Completion("x", ""), "", known) == Dropped("empty_description")


def test_describe_and_respond(tmp_path):
    """The question holds the model's description of the picture that is shown; settings say so; without a picture it is plain."""
    evaluation = bundled.load_stage("evaluate_model")
    first = {"prompts": ["Describe the picture."], "template": "{description} ", "sampling": {"max_new_tokens": 64}}

    def evaluate(name, describe_first, baseline=None):
        values = {"model": {"model_name_or_path": "scenes", "device": "cpu"}, "output": tmp_path / name,
                  "scenes": {"pictures": 4, "evals": ["yesno"]}, "baseline": baseline,
                      "reliance": {"conditions": ["mismatched", "none"]},
                  "asking": {"describe_first": describe_first, "short_answer_tokens": 16}, "draws": 100}  # fmt: skip
        results = evaluation.main(config.build(evaluation.Config, values))
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        return results, {(line["eval"], line["id"]): line for line in map(json.loads, lines)}

    plain_results, plain = evaluate("plain", None)
    results, described = evaluate("described", first)
    assert "describe_first" not in plain_results["settings"]
    assert results["settings"]["describe_first"]["prompts"] == ["Describe the picture."]
    assert results["settings"]["describe_first"]["sampling"]["temperature"] == 0.2
    added = {}
    for key, reply in described.items():
        question = plain[key]["prompt"]
        assert reply["prompt"].endswith(question)
        added[key] = reply["prompt"].removesuffix(question)
        assert (len(added[key]) > 15) == (reply["condition"] != "none")
    yes_no = [key for key in described if key[0] == "yesno"]
    assert len({added[key] for key in yes_no}) == len(yes_no) == 4  # four pictures, four descriptions
    for _, name in yes_no:  # of another picture shown, another description
        assert added["reliance", f"yesno/{name}@mismatched"] != added["yesno", name]
    with pytest.raises(ValueError, match="replies made with other settings .describe_first: "):
        evaluate("plain", first)
    told, _ = evaluate("compared", first, baseline=tmp_path / "plain")
    assert any("only this run used asking.describe_first" in note for note in told["notes"])


def test_a_description_that_fails_fails_its_answer(tmp_path):
    evaluation = bundled.load_stage("evaluate_model")
    values = {"model": {"model_name_or_path": "scenes", "device": "cpu"}, "output": tmp_path / "out",
              "scenes": {"pictures": 2, "evals": ["yesno"]}, "reliance": {"conditions": []}, "draws": 100,
              "asking": {"describe_first": {"prompts": ["<image>?"]}}}  # fmt: skip
    results = evaluation.main(config.build(evaluation.Config, values))
    assert results["counts"]["yesno"]["error_rate"] == 1.0
    line = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert "the text holds '<image>'" in line["error"]
