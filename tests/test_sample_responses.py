"""Sampled responses on the embedded world: what is stored, that draws belong to rows, that pictures matter, what fails."""

import dataclasses
import shutil

import pytest

from prefalign import bundled, config
from prefalign.engines import Request
from prefalign.engines.transformers import load_engine
from prefalign.images import open_image
from prefalign.models import ModelConfig
from prefalign.records import Candidates, Prompt, assistant_message, user_message
from prefalign.rewards.stored import as_responses
from prefalign.scenes.export import export
from prefalign.sources import DataConfig, read_rows, to_candidates
from prefalign.store import Failed, OutputConfig, StoreError, read_records, write_records

ROWS = 6
SCENES = config.read_yaml(bundled.find("datagen/sample_responses_scenes"))


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("sample_responses")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=ROWS)
    return folder


@pytest.fixture(scope="module")
def engine():
    return load_engine(ModelConfig("scenes", device="cpu"), batch_size=8)


def settings(stage, rows, folder, **changes):
    known = {"data": {"path": rows}, "output": {"path": folder, "block_size": 4}, "batch_size": 8,
             "sampling": {"max_new_tokens": 48}}  # fmt: skip
    return config.build(stage.Config, config.merge(config.merge(SCENES, known), changes))


@pytest.fixture(scope="module")
def finished(stage, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "out"
    manifest = stage.main(settings(stage, rows, folder))
    return folder, manifest, list(read_records(folder, Candidates))


def test_candidates_hold_everything_that_is_known_of_the_draws(finished, rows):
    _, manifest, made = finished
    prompts = list(read_records(rows, Prompt))
    assert manifest.rows_in == ROWS == manifest.rows_out == len(made)
    for prompt, row in zip(prompts, made, strict=True):
        assert (row.images, row.messages, row.answer, row.facts) == (
            prompt.images, prompt.messages, prompt.answer, prompt.facts)  # fmt: skip
        assert [response["index"] for response in row.responses] == [0, 1, 2, 3]
        for response in row.responses:
            assert response["parent"] == prompt.id
            assert response["text"].strip() == response["text"] != ""
            finished_itself = response["finish_reason"] == "stop"
            assert response["tokens"] == len(response["token_ids"]) + finished_itself
            assert finished_itself or response["tokens"] == 48
            assert response["settings"]["temperature"] == 1.2
            assert response["settings"]["seed"] == 0
            assert response["generator"] == manifest.models["generator"] != ""
    assert len({row.id for row in made}) == ROWS
    assert sum(len({response["text"] for response in row.responses}) > 1 for row in made) == ROWS


def test_whole_conversations_are_drawn_in_view_of_their_earlier_answers(stage, engine, tmp_path):
    """A second answer is what the engine says to the conversation so far; rows without questions are dropped."""
    export(tmp_path / "linked", split="train_biased", kind="linked", start=0, stop=4)
    linked = list(read_records(tmp_path / "linked", Prompt))
    plain = dataclasses.replace(linked[0], id="plain", facts={})
    known = settings(stage, tmp_path / "linked", tmp_path / "out", conversations=True, num_generations=2)
    outcomes = stage.process([*linked, plain], engine, known)
    assert outcomes[-1].reason == "no_questions"
    for prompt, [row] in zip(linked, outcomes[:-1], strict=True):
        questions = prompt.facts["rules"]["questions"]
        assert (row.messages, row.images, row.facts) == (prompt.messages, prompt.images, prompt.facts)
        assert len(row.responses) == 2
        for number, response in enumerate(row.responses):
            [first] = response["earlier"]
            so_far = [*prompt.messages, assistant_message(first), user_message(questions[1])]
            request = Request(f"{prompt.id}/{number}/1", so_far, [open_image(prompt.images[0])], seed=0)
            [again] = engine.generate([request], known.sampling)
            assert again.text.strip() == response["text"]
            assert response["tokens"] > len(response["token_ids"])
            judged = as_responses(row, [])[number]
            assert (judged.messages, judged.text) == (so_far, response["text"])
    single = settings(stage, tmp_path / "linked", tmp_path / "out", num_generations=2)
    alone = stage.process(linked, engine, single)
    assert [r["text"] for [row] in alone for r in row.responses] == [
        r["earlier"][0] for [row] in outcomes[:-1] for r in row.responses
    ]


def test_token_ids_are_those_of_the_text(finished, engine):
    for row in finished[2]:
        for response in row.responses:
            assert engine.tokenizer.decode(response["token_ids"], skip_special_tokens=True).strip() == response["text"]


def test_an_answer_is_the_same_whatever_is_drawn_beside_it(stage, engine, rows, finished, tmp_path):
    """The noise is that of row and number: neither how many are drawn, nor order, nor batch changes an answer."""
    block = list(read_records(rows, Prompt))
    known = settings(stage, rows, tmp_path, num_generations=2)
    few = {outcome[0].responses[0]["parent"]: outcome[0] for outcome in stage.process(block[::-1], engine, known)}
    for row in finished[2]:
        other = few[row.responses[0]["parent"]]
        assert [response["text"] for response in other.responses] == [r["text"] for r in row.responses[:2]]
        assert other.id != row.id  # other settings, other rows
    again = stage.process(block, engine, settings(stage, rows, tmp_path, seed=1))
    assert [r["text"] for o in again for r in o[0].responses] != [
        r["text"] for row in finished[2] for r in row.responses
    ]


def test_all_answers_to_a_block_are_drawn_in_one_call_on_shared_prompts(stage, engine, rows, tmp_path, monkeypatch):
    """A prompt and its picture are read once for all four answers."""
    calls, prefilled = [], []
    generate, forward = engine.generate, engine.model.forward
    monkeypatch.setattr(
        engine, "generate", lambda requests, sampling: calls.append(requests) or generate(requests, sampling)
    )

    def watched(*given, **more):
        if more.get("pixel_values") is not None:
            prefilled.append(len(more["pixel_values"]))
        return forward(*given, **more)

    monkeypatch.setattr(engine.model, "forward", watched)
    stage.process(list(read_records(rows, Prompt)), engine, settings(stage, rows, tmp_path))
    assert [len(call) for call in calls] == [4 * ROWS]
    assert len({id(request.images) for request in calls[0]}) == ROWS
    assert sum(prefilled) == ROWS


def test_the_picture_decides_what_is_said(stage, engine, rows, tmp_path):
    one, other = list(read_records(rows, Prompt))[:2]
    known = settings(stage, rows, tmp_path, num_generations=2, sampling={"temperature": 0.5})
    swapped = dataclasses.replace(one, images=other.images)
    said = [[r["text"] for r in stage.process([row], engine, known)[0][0].responses] for row in (one, swapped)]
    assert said[0] != said[1]


def test_rows_without_a_picture_and_rows_that_cannot_be_asked(stage, engine, rows, tmp_path):
    row = next(iter(read_records(rows, Prompt)))
    broken = dataclasses.replace(row, id="broken", images=[{"bytes": b"no picture", "path": "x.png"}])
    marked = dataclasses.replace(row, id="marked", messages=[user_message("Is <image> here?", 1)])
    known = settings(stage, rows, tmp_path, num_generations=2)
    outcomes = stage.process([broken, row, marked], engine, known)
    assert isinstance(outcomes[0], Failed)
    assert len(outcomes[1][0].responses) == 2
    assert outcomes[2].reason == "generation_failed"
    assert "the text holds '<image>'" in outcomes[2].message
    alone = dataclasses.replace(row, id="text", images=[], messages=[user_message("Hello.")])
    assert len(stage.process([alone], engine, known)[0][0].responses) == 2


def test_a_stopped_run_ends_with_the_same_rows(stage, rows, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "progress" / "00001.json").unlink()
    (tmp_path / "out" / "data" / "train-00001.parquet").unlink()
    assert stage.main(settings(stage, rows, tmp_path / "out")) == finished[1]
    assert list(read_records(tmp_path / "out", Candidates)) == finished[2]
    with pytest.raises(StoreError, match="settings.num_generations: 4 -> 3"):
        stage.main(settings(stage, rows, tmp_path / "out", num_generations=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 0}, "num_generations is 0; give 1 or more"),
        (
            {"sampling": {"temperature": 0}},
            "temperature is 0, so all 4 answers to a prompt would be the same greedy one",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(stage, rows, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(stage, rows, tmp_path, **changes)
    assert settings(stage, rows, tmp_path, num_generations=1, sampling={"temperature": 0}).num_generations == 1


def test_candidates_are_read_back_as_they_were_written(finished):
    data = DataConfig(finished[0])
    assert [to_candidates(row, data) for row in read_rows(data)] == finished[2]


def test_candidates_of_text_alone_are_stored(tmp_path):
    row = Candidates("a", [], [user_message("Hi")], [{"text": "Hello."}])
    write_records("t", [row], output=OutputConfig(tmp_path / "o"), record=Candidates, settings={}, seed=0)
    assert list(read_records(tmp_path / "o", Candidates)) == [row]
