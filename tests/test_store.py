"""Stage output: counts add up, a crash changes nothing, another config is refused, bad rows are kept aside."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from prefalign import blocks
from prefalign.manifest import read_manifest, temporary, write_atomically
from prefalign.records import Pair, Prompt, assistant_message, user_message
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, OutputConfig, StoreError, read_records, run_stage, write_records


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
    with pytest.raises(StoreError, match=r"test made no row out of 20: 20 too_similar\. Mend the cause"):
        start(data, tmp_path / "out", lambda prompts: [Dropped("too_similar")] * len(prompts))
    assert not (tmp_path / "out" / "quarantine").exists()


def test_what_lies_behind_the_commonest_reason_is_told_with_the_figures(data, tmp_path):
    def process(prompts):
        (tmp_path / "out" / "claims.json").write_text("{}")
        return [Dropped("no_reference" if int(prompt.id) % 4 == 0 else "small_gap") for prompt in prompts]

    told = r"5 no_reference, 15 small_gap\. No two answers of a row differ enough .*`pairs\.min_gap`\. Figures are in "
    with pytest.raises(StoreError, match=rf"{told}\S+/out/claims\.json\. Mend the cause"):
        start(data, tmp_path / "out", process)


def test_the_first_message_of_the_commonest_reason_is_shown_with_the_folder_of_the_others(data, tmp_path):
    failed = [Failed("missing_image", "no 0.png."), *[Failed("too_long", "9000 tokens. Raise max_length.")] * 3]
    with pytest.raises(
        StoreError,
        match=r"5 missing_image, 15 too_long\. First message: 9000 tokens\. Raise max_length\. All .*/quarantine\. Mend",
    ):
        start(data, tmp_path / "out", lambda prompts: failed)
    with pytest.raises(StoreError, match=r"too_long\)\. First message: 9000 tokens.*/quarantine\. No row was made yet"):
        start(data, tmp_path / "few", lambda prompts: failed, max_quarantine=5)


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
    shard = temporary(tmp_path / "out" / "data" / "train-00002.parquet")
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


def write(data, rows):
    data.path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def quarantined(folder):
    return [
        json.loads(line) for file in sorted(folder.glob("quarantine/*.jsonl")) for line in file.read_text().splitlines()
    ]


@pytest.mark.parametrize("turned", [False, True])
def test_rows_that_share_an_id_are_all_kept_whatever_their_order(data, tmp_path, turned):
    """LLaVA-Instruct's ids are those of the pictures: three questions about picture 7, the first asked twice."""
    rows = [{"id": 7, "image": "0.png", "question": f"Question {n}?", "answer": "Yes."} for n in (0, 1, 0)]
    rows += [{"id": 7, "image": "1.png", "question": "Question 0?", "answer": "Yes."}, {**rows[0], "id": 8}]
    write(data, rows[::-1] if turned else rows)
    manifest = start(data, tmp_path / "out", block_size=2)
    assert (manifest.rows_used, manifest.dropped) == (4, {"duplicate": 1})
    ids = {pair.id: pair.prompt[0]["content"][-1]["text"] for pair in read_records(tmp_path / "out", Pair)}
    assert sorted(ids.values()) == ["Question 0?", "Question 0?", "Question 0?", "Question 1?"]
    assert "pair-8" in ids
    assert {len(name) for name in ids} == {len("pair-8"), len("pair-7-12345678")}
    shared = tmp_path / "shared.json"
    shared.write_text(json.dumps(sorted(ids)))
    write(data, rows if turned else rows[::-1])
    start(data, tmp_path / "again", block_size=3)
    assert sorted(pair.id for pair in read_records(tmp_path / "again", Pair)) == json.loads(shared.read_text())


def test_own_prompts_with_one_id_and_two_contents_are_kept_aside(tmp_path):
    prompts = [Prompt("a", [], [user_message(text)], "Yes.") for text in ("One?", "Two?")]
    write_records("export", prompts, output=OutputConfig(tmp_path / "in"), record=Prompt, settings={}, seed=0)
    manifest = start(DataConfig(tmp_path / "in"), tmp_path / "out")
    assert manifest.dropped == {"conflicting_id": 1}
    assert [pair.id for pair in read_records(tmp_path / "out", Pair)] == ["pair-a"]
    assert "Give each row its own id" in quarantined(tmp_path / "out")[0]["message"]


def test_a_picture_folder_that_is_none_is_named_before_the_folder_is_claimed(data, tmp_path):
    data.images = tmp_path / "photoz"
    with pytest.raises(ValueError, match=r"data\.images is '.*photoz', and there is no such folder.*Give the folder"):
        start(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_picture_folder_is_another_config_and_no_path_is_published(data, tmp_path):
    (tmp_path / "other").mkdir()
    data.images = data.path.parent
    start(data, tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    data.images = tmp_path / "other"
    with pytest.raises(StoreError, match="another config .*images_folder_sha256"):
        start(data, tmp_path / "out")


@pytest.mark.parametrize("limit", [100, 5])
def test_a_folder_without_a_row_starts_afresh_once_the_cause_is_mended(data, tmp_path, limit):
    (tmp_path / "empty").mkdir()
    pictures, data.images = data.path.parent, tmp_path / "empty"
    with pytest.raises(StoreError, match="start again.* starts afresh"):
        start(data, tmp_path / "out", max_quarantine=limit)
    assert quarantined(tmp_path / "out")[0]["reason"] == "missing_image"
    data.images = pictures
    assert start(data, tmp_path / "out", block_size=8).rows_out == 20
    start(data, tmp_path / "straight", block_size=8)
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_folder_of_another_program_with_a_config_is_left_alone(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(StoreError, match="is not empty and holds no stage's output"):
        start(data, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "llava"}'


MALFORMED = {
    "facts_list": ({"facts": [1]}, "bad_facts"),
    "facts_text": ({"facts": "not json"}, "bad_facts"),
    "facts_number": ({"facts": "7"}, "bad_facts"),
    "facts_nan": ({"facts": {"x": float("nan")}}, "bad_facts"),
    "turn": ({"conversations": ["hi"]}, "bad_messages"),
    "turns": ({"conversations": "hi"}, "bad_messages"),
    "message": ({"messages": ["hi"]}, "bad_messages"),
    "messages": ({"messages": "hi"}, "bad_messages"),
    "content": ({"messages": [{"role": "user", "content": ["hi"]}]}, "bad_messages"),
    "chosen": ({"chosen": []}, "empty_chosen"),
    "base64": ({"image": "iVBORw0KGgo" * 1000}, "unreadable_image"),
    "nul": ({"image": "a\x00.png"}, "unreadable_image"),
    "bytes_text": ({"image": {"bytes": "iVBORw0KGgo", "path": None}}, "bad_row"),
    "path_number": ({"image": {"bytes": "x", "path": 5}}, "bad_row"),
    "surrogate": ({"question": "What \ud800?"}, "bad_row"),
    "surrogate_facts": ({"facts": {"a": "\udfff"}}, "bad_row"),
    "surrogate_id": ({"id": "\ud800"}, "bad_row"),
    "own_without_bytes": ({"messages": [], "images": ["1.png"], "facts": "{}"}, "missing_column"),
    "own_turns": ({"question": None, "messages": 5, "images": [], "facts": "{}"}, "bad_messages"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_one_malformed_row_costs_one_row(data, tmp_path, name):
    change, reason = MALFORMED[name]
    rows = [json.loads(line) for line in data.path.read_text().splitlines()]
    base = {"id": "bad", "image": "0.png", "question": "What?", "answer": "Yes."}
    if name.startswith("own"):
        del base["image"], base["question"]
    write(data, [*rows[:3], {**base, **change}, *rows[3:]])
    manifest = start(data, tmp_path / "out")
    assert (manifest.rows_in, manifest.rows_used, manifest.dropped) == (21, 20, {reason: 1})
    assert quarantined(tmp_path / "out")[0]["index"] == 3
    assert all(file.read_bytes().isascii() for file in (tmp_path / "out").glob("quarantine/*"))


def test_rows_of_a_json_list_that_are_no_objects_cost_one_row_each(data, tmp_path):
    rows = [json.loads(line) for line in data.path.read_text().splitlines()]
    data.path = data.path.with_suffix(".json")
    data.path.write_text(json.dumps([*rows, "hi", 7, None]))
    manifest = start(data, tmp_path / "out")
    assert (manifest.rows_used, manifest.dropped) == (20, {"bad_json": 3})
    assert quarantined(tmp_path / "out")[0]["message"] == "rows.json row 21 is a str, not an object."


def test_every_record_is_checked(data, tmp_path):
    def careless(prompts):
        for prompt, (pair,) in zip(prompts, to_pairs(prompts), strict=True):
            if prompt.id == "3":
                pair.rejected = [assistant_message("YES!")]
            if prompt.id == "4":
                pair.images = []
            yield [] if prompt.id == "5" else [pair]

    manifest = start(data, tmp_path / "out", careless)
    assert manifest.dropped == {"identical_answers": 1, "no_record": 1, "placeholder_mismatch": 1}
    assert (manifest.rows_used, manifest.rows_out) == (17, 17)


def test_a_redone_block_that_gives_nothing_leaves_nothing(data, tmp_path):
    """Killed between shard and ledger, the block is made again, and now gives other files."""
    out = tmp_path / "out"
    start(data, out)
    (out / "manifest.json").unlink()
    (out / "progress" / "00002.json").unlink()
    (out / "quarantine").mkdir()
    (out / "quarantine" / "00002.jsonl").write_text("{}\n")
    manifest = start(data, out, lambda prompts: [Dropped("too_similar")] * len(prompts))
    assert manifest.rows_out == 16 == len(contents(out))
    assert not (out / "data" / "train-00002.parquet").exists()
    assert not (out / "quarantine" / "00002.jsonl").exists()


def test_a_block_of_too_many_bytes_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_BLOCK_BYTES", 3 * (data.path.parent / "0.png").stat().st_size)
    with pytest.raises(
        StoreError, match=r"a block of 4 rows holds [\d,]+ bytes of `images`.*Lower --output\.block_size"
    ):
        start(data, tmp_path / "out")
    assert start(data, tmp_path / "smaller", block_size=2).rows_out == 20


def test_a_truncated_shard_is_named(data, tmp_path):
    start(data, tmp_path / "out")
    shard = tmp_path / "out" / "data" / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"train-00001\.parquet is not a whole Parquet file .*Fetch it again"):
        contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"train-00001\.parquet is not a whole Parquet file"):
        start(DataConfig(tmp_path / "out"), tmp_path / "next")
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize(("values", "message"), [({"block_size": 0}, "block_size is 0; a block has at least 1 row"),
                                                 ({"max_quarantine": -1}, "max_quarantine is -1; 0 stops")])  # fmt: skip
def test_output_limits(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        OutputConfig(tmp_path, **values)
