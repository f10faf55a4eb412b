"""RLAIF-V where a model does not answer: rows in quarantine by name, asked about again by the next run."""

import json

import pytest
from test_claims import Labeller

from prefalign import bundled, execution
from prefalign.blocks import NoRows
from prefalign.claims import ClaimJudge
from prefalign.dividing import DivideConfig
from prefalign.engines import Completion, FirstToken
from prefalign.records import Candidates, Pair, message_text
from prefalign.store import OutputConfig, StoreError, read_records, write_records
from tests.rlaif_v_cases import SCENES, Absent, candidates, settings, survey_of


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("rlaif_v")


class Server(Labeller):
    """A labeller that is a splitter too; down, it answers nothing, about a picture (`labels`) or at all."""

    capabilities = frozenset({"first_token", "sample"})
    down = ""

    def first_token(self, requests, words):
        replies = super().first_token(requests, words)
        return [FirstToken({}, "HTTP 503") if self.down else one for one in replies]

    def generate(self, requests, sampling):
        if self.down == "all":
            return [Completion(request.id, "", finish_reason="error", error="HTTP 503") for request in requests]
        texts = [message_text(request.messages) for request in requests]
        claims = ["- A dragon sleeps." if "dragon" in text.lower() else "- A cat sits." for text in texts]
        return [Completion(request.id, text) for request, text in zip(requests, claims, strict=True)]


@pytest.mark.parametrize("down", ["labels", "all"])
def test_rows_that_a_server_failed_are_quarantined_and_asked_about_again(stage, tmp_path, monkeypatch, down):
    """Down for the second of three blocks: its row fails by name; a limit of 0 stops the run, the next asks only for it."""
    server = Server({"dragon": {"No": 0.9}})
    rows = [candidates([f"A dragon sleeps {number}.", f"A cat sits {number}."], f"row{number}") for number in range(3)]
    write_records("t", rows, output=OutputConfig(tmp_path / "in"), record=Candidates, settings={}, seed=0)
    monkeypatch.setattr(stage, "load", lambda config: stage.Models(None, ClaimJudge(server, server)))
    known = {"model": None, "labeller": SCENES["model"], "divide": {"by": "model"}}
    measure, asked = stage.measure, []

    def measured(block, models, config):
        asked.extend(row.id for row in block)
        server.down = down if len(asked) == 2 else ""
        return measure(block, models, config)

    monkeypatch.setattr(stage, "measure", measured)
    kept = settings(stage, tmp_path / "in", tmp_path / "kept", **known, output={"block_size": 1})
    manifest = stage.main(kept)
    assert manifest.dropped == {"generation_failed": 1}
    (failure,) = (json.loads(line) for file in (tmp_path / "kept").glob("quarantine/*") for line in file.open())
    assert failure["reason"] == "generation_failed"
    assert "HTTP 503" in failure["message"]
    assert "labeller failed at" in failure["message"] if down == "labels" else "list of claims" in failure["message"]
    assert [row["judged"] == [] for row in survey_of(tmp_path / "kept")] == [False, True, False]

    asked.clear()
    strict = settings(stage, tmp_path / "in", tmp_path / "out", **known, output={"block_size": 1, "max_quarantine": 0})
    with pytest.raises(
        StoreError, match="1 rows failed before a pair was written, above .* 0 .last: generation_failed: .*503"
    ):
        stage.main(strict)
    assert asked == ["row0", "row1"]
    asked[:] = ["not", "the second"]
    assert stage.main(strict).rows_used == 3
    assert asked[2:] == ["row1", "row2"]
    assert [pair.meta["parent"] for pair in read_records(tmp_path / "out", Pair)] == ["row0", "row1", "row2"]


def test_rows_that_had_failed_when_all_was_decided_are_not_asked_about_again(stage, tmp_path, monkeypatch):
    """Killed after a block was written and started again, a run does what it had decided; without a row, it starts afresh."""
    server = Server({"dragon": {"No": 0.9}})
    server.down = "all"
    rows = [candidates(["A dragon sleeps.", "A cat sits."], f"row{number}") for number in range(2)]
    write_records("t", rows, output=OutputConfig(tmp_path / "in"), record=Candidates, settings={}, seed=0)
    monkeypatch.setattr(stage, "load", lambda config: stage.Models(None, ClaimJudge(server, server)))
    asked, killed = [], []
    measure, outcome = stage.measure, stage.outcome

    def measured(block, models, config):
        asked.extend(row.id for row in block)
        return measure(block, models, config)

    def kill(row, *given):
        if row.id == "row1" and not killed:
            killed.append(row.id)
            raise KeyboardInterrupt
        return outcome(row, *given)

    monkeypatch.setattr(stage, "measure", measured)
    monkeypatch.setattr(stage, "outcome", kill)
    known = settings(stage, tmp_path / "in", tmp_path / "out", model=None, labeller=SCENES["model"], divide={"by": "model"},
                     output={"block_size": 1})  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        stage.main(known)
    server.down = ""
    with pytest.raises(NoRows, match="made no row out of 2: 2 generation_failed"):
        stage.main(known)
    assert asked == ["row0", "row1"]
    assert stage.main(known).rows_used == 2
    assert asked == ["row0", "row1"] * 2


WORDS = [chr(97 + number) for number in range(18)]
SENTENCES = {"by": "rules", "rules": {"patterns": ["(?P<claim>[^.]+[.])"], "claim": "{Claim}", "question": "{Claim}"}}


@pytest.mark.parametrize("how", ["killed", "shards", "late"])
def test_all_blocks_follow_one_cut(stage, tmp_path, monkeypatch, how):
    """Chosen answers of 2, 18 and 10 words stand against 10: all three are balanced, without the second the first has to go.

    The row that failed is answered once a block is written, or just after the decision by a shard that did not know of it.
    """
    answers = [[f"A dragon is here in the room of the {n}.", " ".join(f"{word}{n}" for word in WORDS[:size]) + "."]
               for n, size in enumerate((2, 18, 10))]  # fmt: skip
    rows = [candidates(texts, f"row{n}") for n, texts in enumerate(answers)]
    write_records("t", rows, output=OutputConfig(tmp_path / "in"), record=Candidates, settings={}, seed=0)
    server, outcome = Absent({"dragon": {"No": 0.9}}), stage.outcome
    judge = ClaimJudge(server, None, DivideConfig(by="rules"))
    monkeypatch.setattr(stage, "load", lambda config: stage.Models(None, judge))

    def start(folder, shard=execution.WHOLE):
        with execution.sharded(shard):
            stage.main(
                settings(stage, tmp_path / "in", folder, model=None, labeller=SCENES["model"], divide=SENTENCES,
                         pairs={"length_balance": "both", "least_kept": 0.0}, output={"block_size": 1})
            )  # fmt: skip

    def written(folder):
        pairs = [pair.meta["parent"] for pair in read_records(folder, Pair)]
        return pairs, json.loads((folder / "claims.json").read_text())["length_balance"]["after"]["pairs"]

    def kill(row, *given):
        if row.id == "row1":
            raise KeyboardInterrupt
        return outcome(row, *given)

    start(tmp_path / "clean")
    assert written(tmp_path / "clean") == (["row0", "row1", "row2"], 3)
    server.down = "row1"
    if how == "killed":
        monkeypatch.setattr(stage, "outcome", kill)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "out")
        monkeypatch.setattr(stage, "outcome", outcome)
    else:
        with pytest.raises(execution.LeftToOthers):
            start(tmp_path / "out", execution.Shard(0, 2))
    server.down = ""
    if how == "late":
        name = "survey/claims-00001.json"
        found = json.loads((tmp_path / "out" / name).read_text())
        found["rows"] = json.loads((tmp_path / "clean" / name).read_text())["rows"]
        (tmp_path / "out" / name).write_text(json.dumps(found))
    start(tmp_path / "out", execution.WHOLE if how == "killed" else execution.Shard(1, 2))
    assert written(tmp_path / "out") == (["row2"], 1)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dropped"] == {"generation_failed": 1, "length_balance": 1}
