"""Asking a model for SteerLM attributes: the prompt is that of its training, leaks are taken out and counted."""

import dataclasses
import json

import pytest

from prefalign import bundled, config, families
from prefalign.engines import Completion
from prefalign.evals import Item, asking, reliance
from prefalign.evals.asking import Asking
from prefalign.models import ModelConfig, load_processor
from prefalign.pairing import AskedAttributes
from prefalign.records import Candidates, Example, Prompt, assistant_message, user_message
from prefalign.scenes.export import export
from prefalign.selecting import Rules, SteerConfig, outcome
from prefalign.store import OutputConfig, read_records, write_records

NAMES = ["judge/helpfulness", "judge/verbosity"]
WANTED = {"judge/helpfulness": 4.0, "judge/verbosity": 2.0}
LEAK = "\n<attributes>helpfulness:4</attributes>"
RULES = {"set": "presence", "asked": ["exists", "absent"], "questions": ["Is there a star?", "And a ring?"]}


class Engine:
    """Answers every second request with a leaked line, and keeps what it was asked."""

    fingerprint = "leaking"
    capabilities = frozenset({"sample"})

    def __init__(self):
        self.requests = []

    def generate(self, requests, sampling):
        self.requests += requests
        return [
            Completion(one.id, "Yes." + LEAK * (number % 2 == 0), [1, 2], "stop") for number, one in enumerate(requests)
        ]


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("sample_responses")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=2)
    return folder


def prompt_of(rows):
    return next(iter(read_records(rows, Prompt)))


def trained(prompt, decimals=0, place="user"):
    """The conversation up to the answer of a row that SFT reads."""
    responses = [{"text": "A star.", "scores": dict(WANTED), "finish_reason": "stop"}]
    steer = SteerConfig(NAMES, drop_prob=0.0, decimals=decimals, place=place)
    row = Candidates(prompt.id, prompt.images, prompt.messages, responses, prompt.answer, prompt.facts)
    [example] = outcome(row, Rules("select_responses", "steerlm", {"judge/helpfulness": 1.0}, steerlm=steer))
    return example


def settings(stage, rows, folder, **changes):
    known = {
        "model": {"model_name_or_path": "scenes"},
        "data": {"path": rows},
        "output": {"path": folder},
        "num_generations": 2,
    }
    return config.build(stage.Config, config.merge(known, changes))


@pytest.mark.parametrize(("decimals", "place"), [(0, "user"), (1, "system")])
def test_the_prompt_is_byte_for_byte_that_of_training(stage, rows, tmp_path, decimals, place):
    prompt, asked = prompt_of(rows), {"values": WANTED, "decimals": decimals, "place": place}
    example = trained(prompt, decimals, place)
    write_records(
        "select_responses", [example], output=OutputConfig(tmp_path / "sft"), record=Example, settings={}, seed=0
    )
    [row] = read_records(tmp_path / "sft", Example)
    sampler = Engine()
    stage.process([prompt], sampler, settings(stage, rows, tmp_path, attributes=asked))
    evaluated = Engine()
    item = Item("yesno", "1", "g", prompt.images, prompt.messages, label="yes")
    attributes = AskedAttributes(WANTED, decimals, place)
    asking.ask(evaluated, [reliance.Variant(item)], tmp_path / "asked", Asking(attributes=attributes))
    processor = load_processor(ModelConfig("scenes"))
    told, _ = families.render_answer(processor, row.messages[:-1], "A star.")
    for request in (sampler.requests[0], evaluated.requests[0]):
        assert request.messages == row.messages[:-1]
        assert families.render(processor, request.messages).rstrip() == told.rstrip()
    assert ("helpfulness:4,verbosity:2" if decimals == 0 else "helpfulness:4.0,verbosity:2.0") in told
    plain = Engine()
    stage.process([prompt], plain, settings(stage, rows, tmp_path))
    assert plain.requests[0].messages == prompt.messages != row.messages[:-1]


def test_leaked_lines_are_taken_out_of_sampled_answers_and_counted(stage, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("prefalign.engines.loading.load_engine", lambda *_, **__: Engine())
    manifest = stage.main(settings(stage, rows, tmp_path / "out", attributes={"values": WANTED}))
    made = list(read_records(tmp_path / "out", Candidates))
    assert [response["text"] for row in made for response in row.responses] == ["Yes."] * 4
    assert [response.get("unstripped") for response in made[0].responses] == [f"Yes.{LEAK}", None]
    assert made[0].messages == prompt_of(rows).messages
    assert json.loads((tmp_path / "out" / "attributes.json").read_text()) == {"answers": 4, "attributes_stripped": 2}
    assert "attribute lines were taken out of 2 of 4 answers" in capsys.readouterr().err
    assert manifest.config["settings"]["attributes"]["values"] == WANTED
    kept = stage.main(settings(stage, rows, tmp_path / "kept", attributes={"values": WANTED, "strip": False}))
    [first, *_] = read_records(tmp_path / "kept", Candidates)
    assert first.responses[0]["text"] == f"Yes.{LEAK}"
    assert not (tmp_path / "kept" / "attributes.json").exists()
    plain = stage.main(settings(stage, rows, tmp_path / "plain"))
    assert "attributes" not in plain.config["settings"]
    assert kept.config["settings"]["attributes"]["strip"] is False


def test_conversations_ask_with_every_question_and_show_no_leak_again(stage, rows, tmp_path):
    prompt = dataclasses.replace(prompt_of(rows), facts={"rules": RULES})
    engine = Engine()
    known = settings(stage, rows, tmp_path, conversations=True, attributes={"values": WANTED})
    [[made]] = stage.process([prompt], engine, known)
    wanted = AskedAttributes(WANTED)
    so_far = [*prompt.messages, assistant_message("Yes."), user_message("And a ring?")]
    assert [request.messages for request in engine.requests] == [wanted.asked(prompt.messages)] * 2 + [
        wanted.asked(so_far)
    ] * 2
    assert [response["earlier"] for response in made.responses] == [["Yes."], ["Yes."]]
    assert made.responses[0]["unstripped_earlier"] == [f"Yes.{LEAK}"]
    assert "unstripped" not in made.responses[1]


def test_leaked_lines_are_taken_out_of_evaluated_replies_and_counted(rows, tmp_path):
    prompt = prompt_of(rows)
    items = [Item("yesno", str(number), "g", prompt.images, prompt.messages, label="yes") for number in range(2)]
    variants = [reliance.Variant(item) for item in items]
    only_strip = Asking(attributes=AskedAttributes())
    engine = Engine()
    asking.ask(engine, variants, tmp_path / "a", only_strip)
    replies = asking.read_predictions(tmp_path / "a")
    assert engine.requests[0].messages == prompt.messages  # nothing is asked for
    assert [(reply.text, reply.unstripped) for reply in replies] == [("Yes.", f"Yes.{LEAK}"), ("Yes.", None)]
    notes = bundled.load_stage("evaluate_model").leaked
    assert notes(replies) == ["attribute lines were taken out of 1 of 2 replies (`unstripped` in predictions.jsonl)"]
    plainly = asking.ask(Engine(), variants, tmp_path / "b", Asking())
    assert plainly[0].text == f"Yes.{LEAK}"
    assert notes(plainly) == []
    assert "unstripped" not in (tmp_path / "b" / "predictions.jsonl").read_text()
    assert "attributes" not in asking.read_settings(tmp_path / "b")
    with pytest.raises(ValueError, match=r"replies made with other settings \(attributes: None -> "):
        asking.ask(Engine(), variants, tmp_path / "b", only_strip)


def test_a_section_that_does_nothing_or_asks_for_no_number_is_refused():
    with pytest.raises(ValueError, match="nothing is stripped, so the section does nothing.*Give `values`"):
        AskedAttributes(strip=False)
    with pytest.raises(ValueError, match="judge/helpfulness is nan, which no row of training has"):
        AskedAttributes({"judge/helpfulness": float("nan")})
