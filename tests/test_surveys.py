"""Rows that a pass finds anew, those named, once for all processes, until it is decided on; and the decision."""

import json
import multiprocessing
import time

import pytest

from prefalign import folders, sources
from prefalign.execution import Shard, sharded
from prefalign.records import Prompt
from prefalign.sources import DataConfig
from prefalign.store import OutputConfig
from prefalign.surveys import Survey
from tests.tiny_vlms import picture


@pytest.fixture
def asked():
    return []


@pytest.fixture
def passed(tmp_path, asked):
    """Runs a pass over four rows in blocks of two; rows named in `failing` fail, and those that failed are found anew."""
    picture(1).save(tmp_path / "a.png")
    rows = [{"id": f"r{n}", "image": "a.png", "question": f"What is {n}?"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    data = DataConfig(tmp_path / "rows.json", images=tmp_path)
    survey = Survey("test", data, OutputConfig(tmp_path / "out", block_size=2), Prompt, *sources.survey(data))

    def run(failing=(), *, anew=True, shard=None):
        asked.clear()

        def work(rows):
            asked.append([row.id for row in rows])
            return [{"id": row.id, "failed": row.id in failing} for row in rows]

        again = (lambda row: row["failed"]) if anew else None
        with sharded(shard or Shard()):
            return [row["failed"] for block in survey("k", work, again=again) for row in block]

    run.survey = survey
    return run


def test_only_rows_that_failed_are_found_anew(passed, asked):
    assert passed({"r1", "r2", "r3"}) == [False, True, True, True]
    assert asked == [["r0", "r1"], ["r2", "r3"]]
    assert passed(anew=False) == [False, True, True, True]
    assert asked == []
    assert passed({"r3"}) == [False, False, False, True]
    assert asked == [["r1"], ["r2", "r3"]]
    assert passed() == [False] * 4
    assert asked == [["r3"]]
    assert passed() == [False] * 4
    assert asked == []


def test_nothing_is_found_anew_once_it_is_decided_on(passed, asked):
    passed({"r1", "r2"})
    assert passed.survey.decision("k") is None
    assert passed.survey.decide("k", {"kept": ["r0"]}) == {"kept": ["r0"]}
    assert passed() == [False, True, True, False]
    assert asked == []
    with sharded(Shard(0, 2)):
        assert passed.survey.decide("k", {"kept": ["r0", "r1"]}) == {"kept": ["r0"]}, "the first one stands"
    assert passed.survey.decision("other") is None


def test_a_decision_is_forgotten_with_the_config_that_it_was_made_of_and_with_a_run_without_rows(
    passed, asked, tmp_path
):
    passed({"r1"})
    passed.survey.decide("k", {"kept": []})
    folders.start_afresh(tmp_path / "out")
    assert passed() == [False] * 4
    assert asked == [["r1"]]
    passed.survey.decide("k", {"kept": ["r1"]})
    (tmp_path / "out" / "config.json").write_text('{"seed": 1}')
    assert passed.survey.decide("k", {"kept": ["r2"]}) == {"kept": ["r2"]}


def test_of_several_processes_each_asks_again_for_its_own_blocks_first(passed, asked):
    passed({"r1", "r2"}, shard=Shard(0, 2))
    assert asked == [["r0", "r1"], ["r2", "r3"]]
    assert passed({"r2"}, shard=Shard(1, 2)) == [False, False, True, False]
    assert asked == [["r2"], ["r1"]]
    assert passed(shard=Shard(0, 2)) == [False] * 4
    assert asked == [["r2"]]


@pytest.mark.parametrize("still", [(), ("r1",)])
def test_who_is_done_first_waits_for_what_others_ask_again(passed, still):
    """Two shards start again after an outage; the one without a failed row of its own must not decide on the old failures."""
    passed({"r1"})
    context = multiprocessing.get_context("fork")
    barrier, told = context.Barrier(2), context.Queue()

    def go(number):
        def slowly(rows):
            time.sleep(0.5)
            told.put([row.id for row in rows])
            return [{"id": row.id, "failed": row.id in still} for row in rows]

        barrier.wait()
        with sharded(Shard(number, 2)):
            blocks = passed.survey("k", slowly, again=lambda row: row["failed"])
            found = [row["id"] for block in blocks for row in block if row["failed"]]
            told.put(passed.survey.decide("k", {"failed": found}))

    processes = [context.Process(target=go, args=(number,)) for number in (0, 1)]
    for process in processes:
        process.start()
    answers = [told.get(timeout=30) for _ in range(3)]
    for process in processes:
        process.join()
    assert answers == [["r1"], {"failed": list(still)}, {"failed": list(still)}], "asked once, whoever it was"
