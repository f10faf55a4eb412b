"""`--shard i/n`: whatever the order, whoever dies, the folder is that of one process; what is shared is shared safely."""

import itertools
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack

import pytest

from prefalign import bundled, config, folders, running, store
from prefalign.execution import WHOLE, WORKER, LeftToOthers, Options, Shard, StageWorker, sharded
from prefalign.locks import locked
from prefalign.manifest import read_manifest, write_atomically
from prefalign.records import Prompt
from prefalign.sources import DataConfig, survey
from prefalign.store import OutputConfig, StoreError, write_records
from prefalign.surveys import Survey
from tests.shared_out import files, prompts_with_a_duplicate, scenes_config, settings, start, write_rows, write_stage
from tests.test_select_responses import row as scored_row


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "in")


@pytest.fixture
def stage(tmp_path):
    return bundled.load_stage(str(write_stage(tmp_path)))


def test_the_data_have_traps_across_blocks(stage, rows, tmp_path):
    manifest = start(stage, settings(stage, rows, tmp_path / "out"))
    assert manifest.dropped == {"bad_json": 1, "duplicate": 2, "missing_image": 1}
    assert (manifest.rows_in, manifest.rows_out, manifest.quarantined) == (22, 18, 2)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1)])
def test_shards_in_any_order_make_the_folder_of_one_process(stage, rows, tmp_path, order):
    start(stage, settings(stage, rows, tmp_path / "straight"))
    asked = settings(stage, rows, tmp_path / "out")
    for number in order[:2]:
        with pytest.raises(
            LeftToOthers, match=rf"shard {number}/3 of capitals has done its blocks; \d of 8 in .* are still to be done"
        ):
            start(stage, asked, number, 3)
        assert read_manifest(tmp_path / "out") is None
    manifest = start(stage, asked, order[2], 3)
    assert manifest.rows_in == 22
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    assert start(stage, asked, order[0], 3) == manifest


@pytest.mark.parametrize("then", [(0, 1), (0, 2)])
def test_what_shards_have_left_is_done_by_others(stage, rows, tmp_path, then):
    """By a process without --shard, or by another number of shards."""
    start(stage, settings(stage, rows, tmp_path / "straight"))
    asked = settings(stage, rows, tmp_path / "out")
    with pytest.raises(LeftToOthers):
        start(stage, asked, 1, 3)
    if then == (0, 2):
        with pytest.raises(LeftToOthers):
            start(stage, asked, 1, 2)
    assert start(stage, asked, *then).rows_out == 18
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def in_process(stage, asked, number, count, barrier=None):
    """A shard in a process of its own. Its exit status: 0, it wrote the manifest; 3, it left blocks; 1, it stopped."""

    def go():
        if barrier is not None:
            barrier.wait()
        try:
            start(stage, asked, number, count)
        except LeftToOthers:
            os._exit(3)
        except StoreError:
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=go)
    process.start()
    return process


def test_a_shard_killed_in_mid_block_is_started_again(stage, rows, tmp_path):
    """Shard 2 hangs in the block of r06 and is killed with SIGKILL; the others end meanwhile."""
    start(stage, settings(stage, rows, tmp_path / "straight"))
    asked = settings(stage, rows, tmp_path / "out", mishap="hang", marks=tmp_path)
    killed = in_process(stage, asked, 2, 3)
    while not list(tmp_path.glob("mark-*")):
        time.sleep(0.01)
    for number in (0, 1):
        with pytest.raises(LeftToOthers):
            start(stage, asked, number, 3)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    writers = {"killed": f"{socket.gethostname()}-{killed.pid}", "alive": f"{socket.gethostname()}-{os.getppid()}",
               "old": "node-17", "elsewhere": "node-18"}  # fmt: skip
    half = {kind: tmp_path / "out" / "data" / f".train-00002.parquet.{name}.tmp" for kind, name in writers.items()}
    for file in half.values():
        file.write_bytes(b"half")
    os.utime(half["old"], (0, time.time() - folders.STALE - 1))
    assert start(stage, asked, 2, 3).rows_in == 22
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    left = [file for file in (tmp_path / "out").rglob(".*") if file.is_file()]
    assert sorted(left) == sorted([half["alive"], half["elsewhere"]]), "what a killed writer left is swept up"


def test_a_file_that_another_process_has_written_and_swept_stays(tmp_path, monkeypatch):
    """Between a process's writing and its renaming another one commits the same block and deletes the temporary file."""
    replace = os.replace

    def after_another(unfinished, file):
        unfinished.unlink()
        raced.append(file)
        if len(raced) == 1:
            file.write_bytes(b"the other's")
        replace(unfinished, file)

    raced = []
    monkeypatch.setattr(os, "replace", after_another)
    write_atomically(tmp_path / "a", b"mine")
    assert (tmp_path / "a").read_bytes() == b"the other's"
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "b", b"mine")


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (1, 1, 0, 0)], ids=["four shards", "two shards, twice each"])
def test_shards_that_start_at_the_same_moment(stage, rows, tmp_path, numbers):
    start(stage, settings(stage, rows, tmp_path / "straight"))
    barrier = multiprocessing.get_context("fork").Barrier(4)
    count = max(numbers) + 1
    processes = [
        in_process(stage, settings(stage, rows, tmp_path / "out"), number, count, barrier) for number in numbers
    ]
    for process in processes:
        process.join()
    assert {process.exitcode for process in processes} <= {0, 3}
    assert 0 in {process.exitcode for process in processes}
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_of_two_configs_started_at_the_same_moment_one_gets_the_folder(stage, rows, tmp_path):
    for trial in range(3):
        barrier = multiprocessing.get_context("fork").Barrier(2)
        folder = tmp_path / f"out{trial}"
        processes = [
            in_process(stage, settings(stage, rows, folder, block_size=size), 0, 2, barrier) for size in (3, 4)
        ]
        for process in processes:
            process.join()
        assert sorted(process.exitcode for process in processes) == [1, 3]


def test_a_claimed_folder_is_not_taken_over_while_others_may_work_there(stage, rows, tmp_path):
    with pytest.raises(ValueError, match="r06 cannot be done"):
        start(stage, settings(stage, rows, tmp_path / "out", mishap="refuse"), 2, 8)
    with pytest.raises(StoreError, match=r"another config \(block_size: 3 -> 4\)"):
        start(stage, settings(stage, rows, tmp_path / "out", block_size=4), 0, 8)


def test_failures_of_all_shards_count_together(stage, rows, tmp_path):
    """r09 has no picture (block 3, shard 1 of 2) and a line is torn (the same block); one more fails in block 0."""
    lines = rows.read_text().splitlines()
    lines[0] = "{"
    rows.write_text("\n".join(lines))
    asked = settings(stage, rows, tmp_path / "out", max_quarantine=2)
    with pytest.raises(LeftToOthers):
        start(stage, asked, 0, 2)
    with pytest.raises(StoreError, match="capitals stopped: 3 rows failed, above --output.max_quarantine 2"):
        start(stage, asked, 1, 2)
    assert len(list((tmp_path / "out").glob("progress/*.json"))) > 4, "blocks of the others stay"


def test_shards_without_a_row_do_not_forget_the_blocks_of_others(stage, rows, tmp_path):
    rows.write_text('{"id": "a"}\n' * 8)
    asked = settings(stage, rows, tmp_path / "out", max_quarantine=4)
    with pytest.raises(
        StoreError, match="No row was made yet: mend the cause, stop the other shards, delete .*out and start again"
    ):
        start(stage, asked, 0, 2)
    assert list((tmp_path / "out").glob("progress/*.json"))


def test_rows_of_other_shards_are_read_only_where_ids_may_meet(stage, rows, tmp_path, monkeypatch):
    read = []
    plain = store.READERS[Prompt]
    monkeypatch.setitem(
        store.READERS, Prompt, lambda row, *rest, **more: read.append(row["id"]) or plain(row, *rest, **more)
    )
    distinct = [json.dumps({"id": f"r{n}", "image": "1.png", "question": f"{n}?", "answer": "Yes."}) for n in range(12)]
    rows.write_text("\n".join(distinct))
    with pytest.raises(LeftToOthers):
        start(stage, settings(stage, rows, tmp_path / "out"), 1, 2)
    assert read == ["r3", "r4", "r5", "r9", "r10", "r11"]
    read.clear()
    rows.write_text("\n".join([*distinct, distinct[0]]))
    with pytest.raises(LeftToOthers):
        start(stage, settings(stage, rows, tmp_path / "out2"), 1, 2)
    assert len(read) == 13


@pytest.fixture
def passes(rows, tmp_path):
    data, output = DataConfig(rows), OutputConfig(tmp_path / "out", block_size=3)
    output.path.mkdir()
    (output.path / "config.json").write_text("{}")
    return Survey("test", data, output, Prompt, *survey(data))


def test_a_pass_over_all_inputs_begins_with_the_shards_own_blocks(passes, tmp_path):
    kept, done = tmp_path / "out" / "survey", []

    def work(block):
        done.append(block[0].id)
        if done == order:  # all but what another one is at, which now dies
            other.close()
        return [{"id": prompt.id} for prompt in block]

    order: list[str] = []
    plain = list(passes("straight", work))
    firsts = [block[0]["id"] for block in plain]
    assert done == firsts
    order = [firsts[number] for number in (1, 3, 7, 4, 6)]
    with sharded(Shard(1, 2)):
        done.clear()
        (kept / "shared-00000.json").write_bytes((kept / "straight-00000.json").read_bytes())
        (kept / "shared-00004.json").write_text('{"of": "another config", "rows": []}')
        (kept / ".shared-00001.lock").touch()  # of one that was killed
        other = ExitStack()
        for number in (2, 5):
            assert other.enter_context(locked(kept / f".shared-{number:05}.lock"))
        assert list(passes("shared", work)) == plain
    assert done == [*order, firsts[2], firsts[5]], "its own, what nobody is at, what is left of the dead"
    assert not [*kept.glob(".*")]


def test_all_see_what_came_to_disk_first(passes, tmp_path):
    kept, drawn = tmp_path / "out" / "survey", itertools.count()

    def work(block):
        for file in kept.glob("plain-*"):  # another process is faster
            (kept / file.name.replace("plain", "raced")).write_bytes(file.read_bytes())
        return [{"id": prompt.id, "answer": next(drawn)} for prompt in block]

    plain = list(passes("plain", work))
    with sharded(Shard(0, 2)):
        assert list(passes("raced", work)) == plain


def test_a_block_of_the_pass_that_fails_is_not_waited_for(passes, tmp_path):
    def work(block):
        raise ValueError("the server is gone")

    with sharded(Shard(0, 2)), pytest.raises(ValueError, match="the server is gone"):
        list(passes("shared", work))
    [lock] = (tmp_path / "out" / "survey").iterdir()  # nothing else, and nobody holds it
    with locked(lock, wait=False) as held:
        assert held
    folders.sweep(tmp_path / "out")
    assert not lock.exists()


def test_two_of_eight_shards_share_out_the_blocks_of_all(passes, tmp_path):
    """As in an array of which two tasks run at once. No block is done twice: what another is at is waited for."""

    def go(number):
        def work(block):
            time.sleep(0.05 if number else 0.3)
            with (tmp_path / f"log{number}").open("a") as log:
                log.write(f"{block[0].id}\n")
            return [{"id": prompt.id} for prompt in block]

        with sharded(Shard(number, 8)):
            barrier.wait()
            assert len(list(passes("shared", work, again=lambda row: False))) == 8
        os._exit(0)

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=go, args=(number,)) for number in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    done = [(tmp_path / f"log{number}").read_text().split() for number in (0, 1)]
    assert len({*done[0], *done[1]}) == len(done[0]) + len(done[1]) == 8
    assert min(map(len, done)) >= 1


def test_a_stage_that_writes_a_second_folder_has_it_written_by_the_last_shard(stage, rows, tmp_path):
    start(stage, settings(stage, rows, tmp_path / "straight", mishap="two"))
    asked = settings(stage, rows, tmp_path / "out", mishap="two")
    with pytest.raises(LeftToOthers):
        start(stage, asked, 0, 2)
    assert not (tmp_path / "out" / "again").exists()
    assert start(stage, asked, 1, 2).config["settings"] == {"again": 1}
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_figures_are_made_when_the_last_block_is_done(tmp_path):
    stage = bundled.load_stage("select_responses")
    write_records("t", [scored_row(f"row{n}") for n in range(6)], output=OutputConfig(tmp_path / "in"),
                  record=store.Candidates, settings={}, seed=0)  # fmt: skip

    def asked(folder):
        return config.build(
            stage.Config, {"data": {"path": tmp_path / "in"}, "output": {"path": folder, "block_size": 2}}
        )

    start(stage, asked(tmp_path / "straight"))
    for number in (2, 0):
        with pytest.raises(LeftToOthers):
            start(stage, asked(tmp_path / "out"), number, 3)
        assert not (tmp_path / "out" / "selection.json").exists()
    start(stage, asked(tmp_path / "out"), 1, 3)
    assert files(tmp_path / "out") == files(tmp_path / "straight")


@pytest.mark.parametrize("name", ["sample_responses", "mia_dpo"])
def test_stages_with_a_model(name, tmp_path, capsys):
    """mia_dpo draws other pictures from a pool in the output folder, which every shard needs and one builds."""
    prompts_with_a_duplicate(tmp_path / "in")
    stage = bundled.load_stage(name)

    def asked(folder):
        return scenes_config(stage, name, tmp_path / "in", folder)

    running.run(name, stage, asked(tmp_path / "straight"), Options())
    for number in (1, 0):
        made = running.run(name, stage, asked(tmp_path / "out"), Options(Shard(number, 2)))
        assert (made is None) == (number == 1)
    assert "shard 1/2 of" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.dropped["duplicate"] == 1
    assert manifest.rows_out > 3


class Panic(BaseException):
    """Such is `pyo3_runtime.PanicException`, which libraries written in Rust (tokenizers, safetensors) raise."""


@pytest.mark.parametrize("error", [KeyError("unforeseen"), Panic("index out of bounds"), SystemExit("gone")])
def test_whatever_a_block_raises_in_a_worker_is_answered(error):
    """A driver that waits for the block's rows hears of it; nobody else would."""

    def process(inputs):
        raise error

    worker = StageWorker(lambda config: WORKER.get().serve("job", process), None, WHOLE)
    assert worker.next_step() == "job"
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(worker.work(["row"])), daemon=True)
    waiting.start()
    waiting.join(timeout=5)
    assert [(answer.error, answer.expected) for answer in answers] == [(str(error), False)]
    assert f"{type(error).__name__}: {error}" in answers[0].trace
    assert worker.next_step().error == str(error)
