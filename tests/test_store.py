"""Stage output: counts add up, a crash changes nothing, another config is refused, bad rows are kept aside."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from prefalign.records import Pair, assistant_message
from prefalign.sources import DataConfig
from prefalign.store import (
    Dropped,
    Failed,
    OutputConfig,
    StoreError,
    read_manifest,
    read_records,
    run_stage,
    write_atomically,
)


@pytest.fixture
def data(tmp_path):
    rows = tmp_path / "in" / "rows.jsonl"
    rows.parent.mkdir()
    for name in range(3):
        Image.new("RGB", (4, 4), (name * 80, 0, 0)).save(rows.parent / f"{name}.png")
    with rows.open("w") as stream:
        for number in range(20):
            row = {"id": str(number), "image": f"{number % 3}.png", "question": f"Question {number}?", "answer": "Yes."}
            stream.write(json.dumps(row) + "\n")
    return DataConfig(path=rows)


def to_pairs(prompts):
    for prompt in prompts:
        yield [Pair(id=f"pair-{prompt.id}", images=prompt.images, prompt=prompt.messages, method="test",
                    chosen=[assistant_message(prompt.answer)], rejected=[assistant_message(f"No {prompt.id}.")])]  # fmt: skip


def start(data, folder, process=to_pairs, *, settings=None, **output):
    return run_stage("test", data, process, output=OutputConfig(path=folder, **{"block_size": 4, **output}), record=Pair,
                     settings=settings or {"a": 1}, seed=0)  # fmt: skip


def contents(folder):
    return [pair.to_row() for pair in read_records(folder, Pair)]


def files(folder: Path):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_rows_manifest_and_datasets(data, tmp_path):
    manifest = start(data, tmp_path / "out")
    assert (manifest.rows_in, manifest.rows_used, manifest.rows_out, manifest.dropped) == (20, 20, 20, {})
    assert read_manifest(tmp_path / "out") == manifest
    from datasets import load_dataset

    loaded = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["id"][:] == [f"pair-{n}" for n in range(20)]
    assert loaded[1]["images"][0].getpixel((0, 0)) == (80, 0, 0)
    assert loaded[2]["images"][0].getpixel((0, 0)) == (160, 0, 0)


def test_pictures_stay_their_original_bytes(data, tmp_path):
    start(data, tmp_path / "out")
    first = next(read_records(tmp_path / "out", Pair))
    assert first.images[0]["bytes"] == (data.path.parent / "0.png").read_bytes()


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing of ours may catch it."""


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_killed_between_blocks_then_resumed_equals_uninterrupted(data, tmp_path, survivors):
    start(data, tmp_path / "straight")
    calls = 0

    def dies(prompts):
        nonlocal calls
        calls += 1
        if calls > survivors:
            raise Killed
        return to_pairs(prompts)

    with pytest.raises(Killed):
        start(data, tmp_path / "resumed", dies)
    assert len(list((tmp_path / "resumed").glob("progress/*.json"))) == survivors
    start(data, tmp_path / "resumed")
    assert files(tmp_path / "resumed") == files(tmp_path / "straight")


@pytest.mark.parametrize("torn", ["progress/00002.json", "data/train-00002.parquet", "manifest.json"])
def test_a_half_written_block_is_made_again(data, tmp_path, torn):
    start(data, tmp_path / "out")
    before = files(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink(missing_ok=True)
    (tmp_path / "out" / "progress" / "00002.json").unlink()
    (tmp_path / "out" / torn).with_name(f".{Path(torn).name}.tmp").write_bytes(b"half")
    start(data, tmp_path / "out")
    after = {name: content for name, content in files(tmp_path / "out").items() if not name.endswith(".tmp")}
    assert after == before


def test_finished_blocks_are_not_worked_on_again(data, tmp_path):
    start(data, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()

    def never(prompts):
        raise AssertionError("a finished block was worked on again")

    assert start(data, tmp_path / "out", never).rows_out == 20


def test_duplicates_are_counted(data, tmp_path):
    data.path.write_text(data.path.read_text() * 2)
    manifest = start(data, tmp_path / "out", block_size=7)
    assert (manifest.rows_in, manifest.rows_used, manifest.dropped) == (40, 20, {"duplicate": 20})


def test_bad_rows_are_kept_aside_and_everything_adds_up(data, tmp_path):
    lines = data.path.read_text().splitlines()
    lines[3] = json.dumps({"id": "3", "image": "gone.png", "question": "?"})
    lines[5] = lines[5][:30]
    lines[8] = json.dumps({"id": "8", "image": "1.png", "question": "<image><image>?"})
    lines[9] = json.dumps({"id": "9", "image": "1.png"})
    data.path.write_text("\n".join(lines) + "\n")

    def picky(prompts):
        for prompt, outcome in zip(prompts, to_pairs(prompts), strict=True):
            if prompt.id == "11":
                yield Dropped("too_similar")
            elif prompt.id == "12":
                yield Failed("engine_error", "prompt of 9000 tokens")
            else:
                yield outcome

    manifest = start(data, tmp_path / "out", picky)
    assert manifest.dropped == {"bad_json": 1, "engine_error": 1, "missing_column": 1, "missing_image": 1,
                                "placeholder_mismatch": 1, "too_similar": 1}  # fmt: skip
    assert manifest.rows_in == 20 == manifest.rows_used + sum(manifest.dropped.values())
    kept = [json.loads(line) for file in sorted((tmp_path / "out" / "quarantine").glob("*.jsonl"))
            for line in file.read_text().splitlines()]  # fmt: skip
    assert [row["index"] for row in kept] == [3, 5, 8, 9, 12]
    assert kept[0]["row"]["image"] == "gone.png"
    assert "9000 tokens" in kept[-1]["message"]


def test_too_many_bad_rows_stop_and_resume_with_a_higher_limit(data, tmp_path):
    for name in range(3):
        (data.path.parent / f"{name}.png").unlink() if name else None
    with pytest.raises(StoreError, match=r"stopped: 8 rows failed, above --output\.max_quarantine 5 .*missing_image"):
        start(data, tmp_path / "out", max_quarantine=5)
    manifest = start(data, tmp_path / "out", max_quarantine=50)
    assert manifest.rows_out == 7
    assert manifest.quarantined == 13


def test_nothing_left_is_an_error(data, tmp_path):
    with pytest.raises(StoreError, match=r"test made no row out of 20: 20 too_similar"):
        start(data, tmp_path / "out", lambda prompts: [Dropped("too_similar")] * len(prompts))


def test_another_config_is_refused(data, tmp_path):
    start(data, tmp_path / "out")
    with pytest.raises(StoreError, match=r"made with another config \(settings\.a: 1 -> 2\).*another `output\.path`"):
        start(data, tmp_path / "out", settings={"a": 2})


def test_other_data_is_refused(data, tmp_path):
    start(data, tmp_path / "out")
    data.path.write_text(data.path.read_text().replace("Question 7", "Question 77"))
    with pytest.raises(StoreError, match="data_sha256"):
        start(data, tmp_path / "out")


def test_a_folder_of_somebody_else_is_refused(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("...")
    with pytest.raises(StoreError, match="is not empty and holds no stage's output"):
        start(data, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "..."


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_says_what_to_do_and_resumes(data, tmp_path):
    start(data, tmp_path / "straight")
    shard = tmp_path / "out" / "data" / ".train-00002.parquet.tmp"
    shard.parent.mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_bytes((tmp_path / "straight" / "config.json").read_bytes())
    os.symlink("/dev/full", shard)
    with pytest.raises(StoreError, match=r"the disk that holds .* is full.*start the same command again"):
        start(data, tmp_path / "out")
    shard.unlink()
    start(data, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "x.json"
    write_atomically(target, b"old")
    with pytest.raises(TypeError):
        write_atomically(target, "not bytes")
    assert target.read_bytes() == b"old"
