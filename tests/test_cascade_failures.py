"""A cascade whose judge, or whose model, does not answer: rows fail by name, nothing is decided by that, a rerun asks again."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from test_curate_instructions import MODEL, REWARDS, lengths, parents, row, run, write

from prefalign import bundled, execution
from prefalign.blocks import NoRows
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
    """Above the limit nothing is decided, and the next start asks for the one row alone; below it the decision stands."""
    data = write(tmp_path / "data", lengths(4))
    judge = Busy()
    stages = [graded_by(judge, "good", 0.6), {"name": "long", "rewards": words, "keep": 0.5}]
    whole = run(stage, data, tmp_path / "whole", stages=stages)
    assert parents(whole[1]) == [2, 3]
    strict = {"path": tmp_path / "strict", "block_size": 3, "max_quarantine": 0}
    judge.about = ["\nword word word word\n"]
    with pytest.raises(StoreError, match=r"stopped after stage good: 1 rows failed, above .* 0 \(one of them: judge_failed: "
                                         "judge: HTTP 503.*asked about again"):  # fmt: skip
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
    for name in ("manifest.json", "cascade.json"):
        (tmp_path / "tolerant" / name).unlink()
    assert run(stage, data, tmp_path / "tolerant", stages=stages) == tolerant
    assert len(judge.asked) == 1


def test_a_run_that_kept_nothing_since_no_judge_answered_asks_anew(stage, words, tmp_path):
    data = write(tmp_path / "data", lengths(4))
    judge = Busy(["Answer to grade"])
    stages = [graded_by(judge, "good", 0.6), {"name": "long", "rewards": words, "keep": 0.5}]
    with pytest.raises(NoRows, match="made no row out of 4: 4 judge_failed"):
        run(stage, data, tmp_path / "out", stages=stages)
    judge.about = []
    assert parents(run(stage, data, tmp_path / "out", stages=stages)[1]) == [2, 3]


@pytest.mark.parametrize("how", ["killed", "shards"])
def test_all_blocks_follow_the_first_decision(stage, tmp_path, monkeypatch, how):
    """Rows 1 and 2 are kept while nobody answers for 3; that somebody would after a block is written changes nothing."""
    data = write(tmp_path / "data", lengths(4))
    judge = Busy(["\nword word word word\n"])
    known = {"stages": [graded_by(judge, "good", 0.5)], "output": {"path": tmp_path / "out", "block_size": 1}}
    process, blocks = stage.process, []

    def killed(block, *given):
        blocks.append(block)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return process(block, *given)

    if how == "killed":
        monkeypatch.setattr(stage, "process", killed)
        with pytest.raises(KeyboardInterrupt):
            run(stage, data, tmp_path / "out", **known)
        monkeypatch.setattr(stage, "process", process)
    else:
        with execution.sharded(execution.Shard(0, 2)), pytest.raises(execution.LeftToOthers):
            run(stage, data, tmp_path / "out", **known)
    judge.about = []
    judge.asked.clear()
    with execution.sharded(execution.Shard(1, 2) if how == "shards" else execution.WHOLE):
        manifest, made = run(stage, data, tmp_path / "out", **known)
    assert (parents(made), manifest.dropped, judge.asked) == ([1, 2], {"below_good": 1, "judge_failed": 1}, [])
    table = json.loads((tmp_path / "out" / "cascade.json").read_text())
    assert (table["stages"][0]["scored"], table["stages"][0]["kept"]) == (3, 2)
    assert [one["id"] for one in table["rows"] if one["dropped"] is None] == ["row-01", "row-02"]


def test_an_answer_that_comes_after_the_decision_changes_nothing(stage, tmp_path):
    """As from a shard that began to ask again before another one decided."""
    data = write(tmp_path / "data", lengths(4))
    known = {"stages": [graded_by(Busy(["\nword word word word\n"]), "good", 0.5)]}
    with execution.sharded(execution.Shard(0, 2)), pytest.raises(execution.LeftToOthers):
        run(stage, data, tmp_path / "out", **known)
    file = tmp_path / "out" / "survey" / "stage-good-00001.json"
    found = json.loads(file.read_text())
    assert found["rows"][0]["failed"][0] == "judge_failed"
    found["rows"][0] |= {"failed": None, "score": 4.0}
    file.write_text(json.dumps(found))
    table = (tmp_path / "out" / "cascade.json").read_bytes()
    with execution.sharded(execution.Shard(1, 2)):
        manifest, made = run(stage, data, tmp_path / "out", **known)
    assert (parents(made), manifest.dropped) == ([1, 2], {"below_good": 1, "judge_failed": 1})
    assert (tmp_path / "out" / "cascade.json").read_bytes() == table


def test_a_row_whose_facts_a_reward_cannot_read_fails_alone(stage, tmp_path):
    rows = [row(number, "A dog.") for number in range(4)]
    rows = [replace(one, facts={"objects": ["dog"] if number != 1 else "dog"}) for number, one in enumerate(rows)]
    stages = [{"name": "good", "rewards": [{"name": "objects", "objects": {"dog": ["puppy"]}}], "keep": 1.0}]
    manifest, made = run(stage, write(tmp_path / "data", rows), tmp_path / "out", stages=stages)
    assert (parents(made), manifest.dropped) == ([0, 2, 3], {"bad_facts": 1})
    (failure,) = (json.loads(line) for file in (tmp_path / "out").glob("quarantine/*") for line in file.open())
    assert "facts.objects is 'dog', which names no object" in failure["message"]


def test_a_model_that_does_not_answer_fails_its_row_and_not_the_competition(stage, words, tmp_path, monkeypatch):
    monkeypatch.setattr("prefalign.engines.loading.load_engine", lambda *args, **known: Busy(["Why?"]))
    rows = [row(0, "one"), row(1, "one", "Why?"), row(2, "one two three")]
    stages = [{"name": "best", "rewards": words, "keep": 1.0, "num_generations": 1}]
    manifest, made = run(stage, write(tmp_path / "data", rows), tmp_path / "out", stages=stages, model=MODEL)
    assert manifest.dropped == {"generation_failed": 1}
    assert [message_text(example.messages[-1:]) for example in made] == ["one more", "one two three"]
