"""A cascade whose judge, or whose model, does not answer: rows fail by name, nothing is decided by that, a rerun asks again."""

import json
import re
import shutil

import pytest
from test_curate_instructions import MODEL, REWARDS, lengths, parents, row, run, settings, write

from prefalign import bundled, execution
from prefalign.engines import Completion
from prefalign.records import message_text
from prefalign.store import StoreError


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("curate_instructions")


@pytest.fixture
def words(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    return [{"name": "function", "function": f"{tmp_path / 'mine.py'}:words"}]


class Busy:
    """A judge that grades an answer by its words, and a model that says one word more; both fail about texts in `about`."""

    capabilities, fingerprint = frozenset({"sample"}), "busy"

    def __init__(self, about=()):
        self.about, self.asked = about, []

    def generate(self, requests, sampling):
        return [self.reply(request, message_text(request.messages)) for request in requests]

    def reply(self, request, text):
        self.asked.append(text)
        if any(one in text for one in self.about):
            return Completion(request.id, "", finish_reason="error", error=f"request {request.id}: HTTP 503")
        if "Answer to grade:" not in text:
            return Completion(request.id, "one more")
        answer = re.search("Answer to grade:\n(.*)\n", text)[1]
        return Completion(request.id, json.dumps({"helpfulness": min(4, len(answer.split()))}))


def graded_by(judge, name, keep, **more):
    return {
        "name": name,
        "keep": keep,
        "rewards": [{"name": "judge", "engine": judge, "attributes": ["helpfulness"]}],
        **more,
    }


def test_a_row_that_a_judge_did_not_answer_for_is_no_unscored_one(stage, tmp_path):
    data = write(tmp_path / "data", lengths(4))
    stages = [graded_by(Busy(["\nword word word word\n"]), "good", 0.6)]
    manifest, made = run(stage, data, tmp_path / "out", stages=stages)
    assert (parents(made), manifest.quarantined) == ([1, 2], 1)
    assert manifest.dropped == {"below_good": 1, "judge_failed": 1}
    (failure,) = (json.loads(line) for file in (tmp_path / "out").glob("quarantine/*") for line in file.open())
    assert failure["message"] == "judge: HTTP 503"


def test_a_rerun_asks_again_for_what_a_judge_did_not_answer(stage, words, tmp_path):
    """Above the limit nothing is kept, and the next start asks for the one row alone; below it, until its block is written."""
    data = write(tmp_path / "data", lengths(4))
    judge = Busy()
    stages = [graded_by(judge, "good", 0.6), {"name": "long", "rewards": words, "keep": 0.5}]
    whole = run(stage, data, tmp_path / "whole", stages=stages)
    assert parents(whole[1]) == [2, 3]
    strict = {"path": tmp_path / "strict", "block_size": 3, "max_quarantine": 0}
    judge.about = ["\nword word word word\n"]
    with pytest.raises(StoreError, match=r"stopped after stage good: 1 rows failed, above .* 0 \(last: judge_failed: judge: "
                                         "HTTP 503.*asked about again"):  # fmt: skip
        run(stage, data, tmp_path / "strict", stages=stages, output=strict)
    assert not (tmp_path / "strict" / "survey" / "stage-long-00000.json").exists()
    tolerant = run(stage, data, tmp_path / "tolerant", stages=stages)
    assert parents(tolerant[1]) == [2]
    judge.about = []
    judge.asked.clear()
    assert run(stage, data, tmp_path / "strict", stages=stages, output=strict) == whole
    assert len(judge.asked) == 1
    for folder in ("data", "progress", "quarantine"):
        shutil.rmtree(tmp_path / "tolerant" / folder)
    (tmp_path / "tolerant" / "manifest.json").unlink()
    assert run(stage, data, tmp_path / "tolerant", stages=stages) == whole
    assert len(judge.asked) == 2


def test_one_shard_of_several_stops_where_a_judge_did_not_answer(stage, tmp_path):
    """Another shard may have its answer, and would keep other rows."""
    data = write(tmp_path / "data", lengths(4))
    known = settings(stage, data, tmp_path / "out", stages=[graded_by(Busy(["\nword word word word\n"]), "good", 0.6)])
    with (
        execution.sharded(execution.Shard(1, 2)),
        pytest.raises(StoreError, match="and other shards may keep other rows"),
    ):
        stage.main(known)


def test_a_model_that_does_not_answer_fails_its_row_and_not_the_competition(stage, words, tmp_path, monkeypatch):
    monkeypatch.setattr("prefalign.engines.loading.load_engine", lambda *args, **known: Busy(["Why?"]))
    rows = [row(0, "one"), row(1, "one", "Why?"), row(2, "one two three")]
    stages = [{"name": "best", "rewards": words, "keep": 1.0, "num_generations": 1}]
    manifest, made = run(stage, write(tmp_path / "data", rows), tmp_path / "out", stages=stages, model=MODEL)
    assert manifest.dropped == {"generation_failed": 1}
    assert [message_text(example.messages[-1:]) for example in made] == ["one more", "one two three"]
