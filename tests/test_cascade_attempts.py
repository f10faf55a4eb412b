"""A cascade that stops in a later stage: what got no answer in any stage is asked about again, the rest is not paid for twice."""

import shutil
from collections import Counter

import pytest
from test_cascade_failures import Busy, graded_by
from test_curate_instructions import REWARDS, lengths, parents, row, run, write

from prefalign import bundled, execution
from prefalign.store import StoreError
from tests.stand_in_server import StandInServer, model_section

ROWS = 6


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("curate_instructions")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with StandInServer() as server:
        yield server


@pytest.fixture
def data(tmp_path):
    """Six rows whose questions have names of their own, with answers of 21 to 26 words, longer than what the server says."""
    return write(tmp_path / "data", [row(n, " ".join(["word"] * (21 + n)), f"q{n} what is it?") for n in range(ROWS)])


@pytest.fixture
def two_stages(tmp_path, server):
    """Runs a cascade of two stages, for each of which a model on a server writes an answer to each question that came to it."""
    (tmp_path / "mine.py").write_text(REWARDS)
    words = [{"name": "function", "function": f"{tmp_path / 'mine.py'}:words"}]

    def known(folder, *, keep=1.0, limit=1):
        stages = [{"name": name, "rewards": words, "keep": share, "num_generations": 1}
                  for name, share in (("first", keep), ("second", 0.5))]  # fmt: skip
        return {"stages": stages, "model": model_section(server, max_retries=0),
                "output": {"path": tmp_path / folder, "block_size": 4, "max_quarantine": limit}}  # fmt: skip

    return known


def clean(stage, data, tmp_path, server, known):
    """A run whose server answers all, and how often it answered about each row."""
    found = run(stage, data, tmp_path / "clean", **known)
    answered = Counter(server.answers())
    server.asked.clear()
    return found, answered


def stopped(stage, data, folder, known, message):
    with pytest.raises(StoreError, match=message):
        run(stage, data, folder, **known)
    assert not list((folder / "progress").glob("*.json")), "no row was kept yet"


STOP = (
    r"curate_instructions stopped after stage second: 2 rows failed, above --output.max_quarantine 1 \(one of them: "
    r"generation_failed: .*500.*Mend the cause and start again: the 2 rows that got no answer, in this stage and those before, "
    r"are asked about again. To go on without what fails then, give --output.max_quarantine 2 or more"
)


def test_rows_that_failed_in_a_decided_stage_are_asked_about_again(stage, data, tmp_path, server, two_stages):
    """Row 2 fails in the first stage, which is decided; row 4 in the second is one too many. Then the server is well."""
    whole, answered = clean(stage, data, tmp_path, server, two_stages("clean"))
    assert answered == {f"q{n}": 2 for n in range(ROWS)}
    server.faults = {"q2": [500], "q4": [0, 500]}
    stopped(stage, data, tmp_path / "out", two_stages("out"), STOP)
    assert (tmp_path / "out" / "survey" / "decided-stage-first.json").is_file()
    asked = len(server.asked)
    assert run(stage, data, tmp_path / "out", **two_stages("out")) == whole
    assert Counter(one.name for one in server.asked[asked:]) == {"q2": 2, "q4": 1}
    assert server.answers() == answered, "none lost, none paid for twice"
    for name in ("cascade.json", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()


def test_a_stage_that_is_decided_anew_may_keep_others(stage, data, tmp_path, server, two_stages):
    """Of six rows the longest three are kept: 3, 4, 5. Without 4 these are 2, 3, 5; 2 is dropped again once 4 is answered."""
    whole, answered = clean(stage, data, tmp_path, server, two_stages("clean", keep=0.5))
    assert parents(whole[1]) == [4, 5]
    server.faults = {"q4": [500], "q5": [0, 500]}
    stopped(stage, data, tmp_path / "out", two_stages("out", keep=0.5), STOP)
    asked = len(server.asked)
    assert run(stage, data, tmp_path / "out", **two_stages("out", keep=0.5)) == whole
    assert Counter(one.name for one in server.asked[asked:]) == {"q4": 2, "q5": 1}
    assert server.answers() - answered == {"q2": 1}


def test_with_a_higher_limit_it_goes_on_without_what_fails_again(stage, data, tmp_path, server, two_stages):
    server.faults = {"q2": [500, 500], "q4": [0, 500, 500]}
    stopped(stage, data, tmp_path / "out", two_stages("out"), STOP)
    manifest, made = run(stage, data, tmp_path / "out", **two_stages("out", limit=2))
    assert (manifest.dropped, manifest.quarantined) == ({"below_second": 2, "generation_failed": 2}, 2)
    assert parents(made) == [3, 5]
    assert server.faults == {"q2": [], "q4": []}


def test_within_the_limit_a_killed_run_goes_on_as_it_would_have(stage, data, tmp_path, server, two_stages, monkeypatch):
    """A stage that was decided without row 2 stays so: a run that was killed ends as one that was not."""
    server.faults = {"q2": [500]}
    whole = run(stage, data, tmp_path / "whole", **two_stages("whole"))
    assert whole[0].dropped == {"below_second": 2, "generation_failed": 1}
    server.faults = {"q2": [500]}
    monkeypatch.setattr(stage, "process", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(stage, data, tmp_path / "out", **two_stages("out"))
    monkeypatch.undo()
    asked = len(server.asked)
    assert run(stage, data, tmp_path / "out", **two_stages("out")) == whole
    assert len(server.asked) == asked


def test_shards_stop_together_and_begin_together(stage, data, tmp_path, server, two_stages):
    whole, answered = clean(stage, data, tmp_path, server, two_stages("clean"))
    server.faults = {"q2": [500], "q4": [0, 500]}
    with execution.sharded(execution.Shard(0, 2)):
        stopped(stage, data, tmp_path / "out", two_stages("out"), STOP)
    with execution.sharded(execution.Shard(1, 2)), pytest.raises(execution.LeftToOthers):
        run(stage, data, tmp_path / "out", **two_stages("out"))
    with execution.sharded(execution.Shard(0, 2)):
        assert run(stage, data, tmp_path / "out", **two_stages("out")) == whole
    assert server.answers() == answered


class Watched(Busy):
    """Busy about row 0; before it replies to the fifth question, the first of the second stage, `then` happens."""

    def __init__(self, then):
        super().__init__(["\nword\n"])
        self.then = then

    def reply(self, request, text):
        if len(self.asked) == 4:
            self.then()
        return super().reply(request, text)


def test_a_shard_that_knows_of_no_failure_stops_where_another_has(stage, tmp_path):
    """One decides to stop while the other is at the second stage and has every answer there: none keeps rows by the first."""
    data = write(tmp_path / "data", lengths(4))

    def start(folder, judge):
        stages = [graded_by(judge, name, 0.5) for name in ("good", "better")]
        output = {"path": tmp_path / folder, "block_size": 2, "max_quarantine": 1}
        return run(stage, data, tmp_path / folder, stages=stages, output=output)

    failing = Watched(lambda: failing.about.append("\nword word word word\n"))
    with pytest.raises(StoreError, match="stopped after stage better: 2 rows failed"):
        start("other", failing)
    name = "survey/decided-stage-better.json"
    with (
        execution.sharded(execution.Shard(1, 2)),
        pytest.raises(StoreError, match="stopped after stage better: 2 rows"),
    ):
        start("out", Watched(lambda: shutil.copy(tmp_path / "other" / name, tmp_path / "out" / name)))
    manifest, made = start("out", Busy())
    assert (manifest.dropped, parents(made)) == ({"below_better": 1, "below_good": 2}, [3])
