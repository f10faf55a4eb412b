"""KnowAda's DNLI as a reward: worked shares, who is asked what, and what has no score."""

import dataclasses
import json
import math

import pytest

from prefalign import bundled, caption_annotator, config
from prefalign.caption_annotator import EngineAnnotator
from prefalign.contradictions import dnli
from prefalign.engines import Completion
from prefalign.engines.config import EngineConfig
from prefalign.records import Candidates, user_message
from prefalign.rewards import FactsError, Response, read_rewards
from prefalign.rewards.statements import Statements
from prefalign.scenes import language
from prefalign.scenes.world import scene
from prefalign.store import OutputConfig, read_records, write_records

REFERENCE = "A cat sleeps on a blue towel. A pot stands on the sill."
LINES = {
    REFERENCE: "Entailed: a cat sleeps.\nEntailed: it is on a towel.\nEntailed: the towel is blue.\nEntailed: a pot on the sill.",
    "A cat and a dog, cosy.": "Entailed: a cat.\nContradicted: a dog.\nNeutral: it is cosy.",
    "It cannot be read.": "I would rather not.",
    "It fails.": None,
}


class Script:
    """An LLM that labels by the text it is asked about, and keeps what it was asked."""

    fingerprint = "script"
    capabilities = frozenset({"sample"})

    def __init__(self):
        self.asked = []

    def generate(self, requests, sampling):
        self.asked += requests
        return [self._said(request) for request in requests]

    def _said(self, request):
        asked = request.messages[0]["content"][0]["text"]
        text = asked.rsplit("\n\nText: ", 1)[1].removesuffix("\n\nStatements:")
        if LINES[text] is None:
            return Completion(request.id, "", finish_reason="error", error="the server is down")
        return Completion(request.id, LINES[text])


@pytest.fixture
def engine():
    return Script()


@pytest.fixture
def reward(engine):
    made = Statements(EngineConfig("llm"))
    made.__dict__["labeller"] = EngineAnnotator(engine)
    return made


def response(text, answer=REFERENCE, **facts):
    return Response("row", [], [user_message("Describe it.")], text, answer=answer, facts=facts)


def test_the_four_figures_by_hand():
    found = dnli(["entailed"] * 3 + ["contradicted", "neutral"], 2)
    assert found == {
        "descriptiveness_precision": 3 / 5,
        "descriptiveness_recall": 3 / 2,  # of the caption's own statements, so it can exceed 1
        "contradiction_precision": 1 / 5,
        "contradiction_recall": 1 / 2,
    }


def test_a_response_is_held_against_its_reference_which_is_asked_about_once(reward, engine):
    """One of three statements entailed, one contradicted; the reference makes four."""
    found = reward.score([response("A cat and a dog, cosy."), response(REFERENCE)])
    assert tuple(found) == reward.terms
    assert [[round(one, 4) for one in values.tolist()] for values in found.values()] == [
        [0.3333, 1.0],
        [0.25, 1.0],
        [-0.3333, -0.0],
        [-0.25, -0.0],
    ]
    assert len(engine.asked) == 3
    assert engine.asked[0].id == "row/statements/0"
    assert all(f"Caption: {REFERENCE}\n" in request.messages[0]["content"][0]["text"] for request in engine.asked)
    assert not any(request.images for request in engine.asked)


def test_what_cannot_be_told_has_no_score_and_a_failure_is_told_apart(reward):
    rows = [response(""), response("A cat.", answer=None), response("It cannot be read."), response("It fails.")]
    found = reward.score([*rows, response("A cat and a dog, cosy.")])
    for values in found.values():
        assert [math.isnan(one) for one in values.tolist()] == [True, True, True, True, False]
    assert reward.failures == {3: "the server is down"}
    reward.score([])
    assert reward.failures == {}


def test_what_is_drawn_for_a_response_does_not_depend_on_its_neighbours(reward, engine):
    """Requests are named by row and reference, and a name and a seed decide a draw."""
    said = [
        ("A cat and a dog, cosy.", REFERENCE),
        ("It cannot be read.", REFERENCE),
        ("A cat and a dog, cosy.", "It fails."),
    ]
    rows = [dataclasses.replace(response(*one), id=f"row{number}") for number, one in enumerate(said)]

    def names(asked):
        engine.asked = []
        reward.score(asked)
        return {request.messages[0]["content"][0]["text"]: request.id for request in engine.asked}

    together = names(rows)
    assert len(set(together.values())) == len(engine.asked) == 5
    alone = [names([row]) for row in rows]
    assert all(one.items() <= together.items() for one in alone)
    assert names(rows[::-1]) == together


def test_rules_cannot_label_what_is_said_of_a_picture_without_its_facts():
    (entry,) = read_rewards([{"name": "statements", "annotator": "rules"}]).entries
    for facts in ({}, {"world": "scenes"}, {"objects": ["cat"]}):
        with pytest.raises(FactsError, match="row: its facts have no counts and objects of a scene.*annotator: engine"):
            entry.reward.score([response("A cat.", **facts)])


def test_a_reference_that_nobody_replied_about_fails_its_responses(reward):
    reward.score([response("A cat and a dog, cosy.", answer="It fails.")])
    assert reward.failures == {0: "the server is down"}


def test_on_the_embedded_world_the_picture_decides():
    """A caption of one picture, held against the truth of two."""
    (entry,) = read_rewards([{"name": "statements", "annotator": "rules"}]).entries
    one, other = (scene("val_fair", number) for number in (0, 1))
    text = language.caption(one)
    rows = [response(text, language.caption(own), **language.facts(own)) for own in (one, other)]
    found = entry.reward.score(rows)
    precision, contradiction = (found[f"{name}_precision"].tolist() for name in ("descriptiveness", "contradiction"))
    assert precision[0] == 1 > precision[1]
    assert contradiction[0] == 0 > contradiction[1]
    assert entry.reward.version == "scenes-rules-1"


@pytest.mark.parametrize(
    "prompt", ["_ASK", "_JUDGE", "_REWRITE", "_MAY_ADD", "_ADD_NOTHING", "_ANSWERABLE", "_STATEMENTS"]
)
def test_another_wording_is_another_version(reward, engine, monkeypatch, prompt):
    """So that a folder is not finished with other prompts than it was begun with."""
    monkeypatch.setattr(caption_annotator, prompt, getattr(caption_annotator, prompt) + " Be strict.")
    changed = EngineAnnotator(engine).fingerprint
    assert reward.version.startswith("script/knowada-")
    assert changed.startswith("script/knowada-")
    assert changed != reward.version


def test_an_llm_has_to_be_named():
    with pytest.raises(config.ConfigError, match="no LLM is named to split captions into statements"):
        read_rewards([{"name": "statements"}])


def test_a_stage_stores_the_figures_and_their_means(tmp_path):
    """Each picture's own caption is true of it; the next picture's, said of it, is not."""
    pictures = [scene("val_fair", number) for number in range(3)]
    rows = []
    for place, picture in enumerate(pictures):
        told = [{"text": language.caption(pictures[(place + step) % 3], step)} for step in (0, 1)]
        asked = [user_message("Describe it.")]
        rows.append(Candidates(f"row{place}", [], asked, told, language.caption(picture), language.facts(picture)))
    write_records("t", rows, output=OutputConfig(tmp_path / "in"), record=Candidates, settings={}, seed=0)
    stage = bundled.load_stage("score_responses")
    values = config.read_yaml(bundled.find("reward_models/score_responses_statements_scenes"))
    changes = {"data": {"path": tmp_path / "in"}, "output": {"path": tmp_path / "out"}}
    stage.main(config.build(stage.Config, config.merge(values, changes)))
    for row in read_records(tmp_path / "out", Candidates):
        own, other = (response["scores"]["statements/descriptiveness_precision"] for response in row.responses)
        assert own == 1 > other
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert {name for name in found if "/" in name} == {f"statements/{term}" for term in Statements.terms}
    precision = found["statements/descriptiveness_precision"]["mean"]
    assert precision - found["statements/contradiction_precision"]["mean"] == pytest.approx(1, abs=1e-3)
