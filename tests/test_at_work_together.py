"""Several processes at work in one folder that draw other rows each: every block is one process's, and no config is mixed."""

import fcntl
import json
import multiprocessing
import random
import time

import pyarrow.parquet as pq
import pytest

from prefalign.blocks import Failed, NoRows
from prefalign.execution import LeftToOthers, Shard, sharded
from prefalign.locks import locked
from prefalign.records import Pair, assistant_message
from prefalign.sources import DataConfig
from prefalign.store import OutputConfig, StoreError, read_records, run_stage

FORK = multiprocessing.get_context("fork")
ROWS = 160


@pytest.fixture
def data(tmp_path):
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"id": f"r{number}", "question": "What?", "answer": "A cat."}) for number in range(ROWS)]
    (tmp_path / "in" / "rows.jsonl").write_text("\n".join(lines))
    return DataConfig(tmp_path / "in" / "rows.jsonl")


def run(data, folder, answer, *, settings=None, **output):
    """A stage whose rows are what `answer` gives for each prompt's id: a text, or None for no answer."""

    def process(prompts):
        for prompt in prompts:
            text = answer(prompt.id)
            yield Failed("generation_failed", f"no answer about {prompt.id}") if text is None else [
                Pair(f"pair-{prompt.id}", prompt.images, prompt.messages, [assistant_message(text)],
                     [assistant_message("no")], "test")
            ]  # fmt: skip

    output = OutputConfig(folder, **{"block_size": 8, "max_quarantine": ROWS, **output})
    return run_stage("test", data, process, output=output, record=Pair, settings=settings or {}, seed=0)


def begin(shard, barrier, ended, *known, **more):
    """The stage in a process of its own; what it came to goes into the queue `ended`."""

    def go():
        barrier.wait()
        try:
            with sharded(shard):
                ended.put(run(*known, **more).rows_out)
        except (LeftToOthers, StoreError) as error:
            ended.put(f"{type(error).__name__}: {error}")

    process = FORK.Process(target=go)
    process.start()
    return process


@pytest.mark.parametrize(
    "shards", [[Shard(0, 2), Shard(0, 2), Shard(1, 2)], [Shard(), Shard()], [Shard(), Shard(1, 2)]]
)
def test_each_block_is_of_one_process(data, tmp_path, shards):
    """As a server answers: other texts each time, and at times none."""

    def answer(_):
        time.sleep(0.0005)
        return f"Process {multiprocessing.current_process().pid}." if random.random() > 0.3 else None

    barrier, ended, folder = FORK.Barrier(len(shards)), FORK.Queue(), tmp_path / "out"
    processes = [begin(shard, barrier, ended, data, folder, answer) for shard in shards]
    told = [ended.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    counts = {one for one in told if isinstance(one, int)}
    assert len(counts) == 1, told
    assert all(isinstance(one, int) or one.startswith("LeftToOthers") for one in told)
    for number in range(ROWS // 8):
        ledger = json.loads((folder / "progress" / f"{number:05d}.json").read_text())
        shard, failures = folder / f"data/train-{number:05d}.parquet", folder / f"quarantine/{number:05d}.jsonl"
        texts = pq.read_table(shard)["chosen"].to_pylist() if shard.exists() else []
        assert len({text[0]["content"][0]["text"] for text in texts}) <= 1
        assert len(texts) == ledger["rows_out"]
        assert (len(failures.read_text().splitlines()) if failures.exists() else 0) == ledger["quarantined"]
        assert ledger["rows_out"] + ledger["quarantined"] == ledger["rows_in"] == 8
    assert sum(1 for _ in read_records(folder, Pair)) == counts.pop()
    assert not [file.name for file in folder.rglob(".*")]


@pytest.mark.parametrize("at_work", [Shard(0, 2), Shard()])
def test_a_folder_in_which_another_process_is_at_work_is_not_taken_over(data, tmp_path, at_work):
    asked, go_on = FORK.Event(), FORK.Event()

    def answer(_):
        asked.set()
        go_on.wait(60)
        return "Mine."

    ended, folder = FORK.Queue(), tmp_path / "out"
    process = begin(at_work, FORK.Barrier(1), ended, data, folder, answer)
    assert asked.wait(60)
    with pytest.raises(
        StoreError, match=r"claimed for another config \(settings\.a: None -> 2\), and another process may"
    ):
        run(data, folder, lambda _: "Others.", settings={"a": 2})
    go_on.set()
    process.join()
    run(data, folder, lambda _: "Of the same config.")
    assert json.loads((folder / "manifest.json").read_text())["config"]["settings"] == {}


def test_a_folder_whose_process_has_died_is_taken_over(data, tmp_path):
    with pytest.raises(ValueError, match="none"):
        run(data, tmp_path / "out", lambda _: int("none"))
    assert run(data, tmp_path / "out", lambda _: "Mine.", settings={"a": 2}).rows_out == ROWS


def test_rows_that_got_no_answer_are_asked_again_after_the_run_has_stopped(data, tmp_path):
    """A server that begins to refuse in the third block: what is below the limit is kept aside, the block above it is not."""
    asked = []

    def tired(identity):
        asked.append(identity)
        return "A dog." if len(asked) <= 20 else None

    said = (
        r"12 rows failed, above --output\.max_quarantine 5 \(last block: 8 of 8 rows got no answer\)\. "
        r"First message: no answer about r24 .*start again: this block was not written"
    )
    with pytest.raises(StoreError, match=said):
        run(data, tmp_path / "out", tired, max_quarantine=5)
    asked.clear()
    manifest = run(data, tmp_path / "out", lambda identity: asked.append(identity) or "A dog.", max_quarantine=5)
    assert asked == [f"r{number}" for number in range(24, ROWS)]
    assert (manifest.rows_out, manifest.dropped) == (ROWS - 4, {"generation_failed": 4})


def test_a_run_that_got_no_answer_at_all_starts_afresh(data, tmp_path):
    with pytest.raises(StoreError, match=r"start again: .*out starts afresh\.") as stopped:
        run(data, tmp_path / "out", lambda _: None, max_quarantine=12)
    assert not isinstance(stopped.value, NoRows)
    assert run(data, tmp_path / "out", lambda _: "A dog.").rows_out == ROWS


def test_a_plain_run_without_an_answer_leaves_the_rows_of_a_shard(data, tmp_path):
    with sharded(Shard(1, 2)), pytest.raises(LeftToOthers):
        run(data, tmp_path / "out", lambda _: "Mine.")
    kept = sorted(file.name for file in (tmp_path / "out" / "progress").glob("*.json"))
    with pytest.raises(StoreError, match=r"start again: this block was not written"):
        run(data, tmp_path / "out", lambda _: None, max_quarantine=3)
    assert sorted(file.name for file in (tmp_path / "out" / "progress").glob("*.json")) == kept


def test_a_shard_without_an_answer_is_not_told_to_delete_anything(data, tmp_path):
    with (
        sharded(Shard(0, 2)),
        pytest.raises(StoreError, match=r"raise the limit, and start again: this block") as stopped,
    ):
        run(data, tmp_path / "out", lambda _: None, max_quarantine=3)
    assert "delete" not in str(stopped.value)


def test_a_file_system_that_gives_shared_locks_on_readable_files_only(data, tmp_path, monkeypatch):
    """NFS 4 makes `fcntl` locks of `flock`."""
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    assert run(data, tmp_path / "out", lambda _: "Mine.").rows_out == ROWS


def test_a_lock_is_let_go_though_a_child_has_the_file_open(tmp_path):
    ended = FORK.Event()
    with locked(tmp_path / "lock") as held:
        assert held
        child = FORK.Process(target=ended.wait, args=(60,))
        child.start()
    with locked(tmp_path / "lock", wait=False) as held:
        assert held
    ended.set()
    child.join()


def test_failures_of_a_block_that_another_process_has_committed_count_once(data, tmp_path):
    """A shard is in a block while a plain run does all of them."""
    lost = ("r8", "r9", "r10")

    def overtaken(identity):
        if identity == "r8" and not (tmp_path / "out" / "manifest.json").exists():
            with sharded(Shard()):
                run(data, tmp_path / "out", lambda one: None if one in lost else "Theirs.", max_quarantine=5)
        return None if identity in lost else "Mine."

    with sharded(Shard(1, 2)):
        assert run(data, tmp_path / "out", overtaken, max_quarantine=5).quarantined == 3


def test_a_lone_run_goes_on_where_a_commit_was_killed(data, tmp_path):
    """Between the shard and its ledger; nothing has to be deleted."""
    run(data, tmp_path / "whole", lambda _: "Mine.")
    (tmp_path / "out" / "data").mkdir(parents=True)
    for name in ("config.json", "data/train-00000.parquet"):
        (tmp_path / "out" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    with pytest.raises(StoreError, match=r"or raise the limit, and start again\.$"):
        run(data, tmp_path / "out", lambda _: None, max_quarantine=5)
