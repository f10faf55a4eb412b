"""Rows in the formats people have, and what happens to bad ones."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from prefalign.images import ImageError, read_image
from prefalign.records import Prompt, RecordError, assistant_message, placeholder_count, user_message
from prefalign.sources import (
    BadRow,
    DataConfig,
    RowReader,
    content_digest,
    files_of,
    fingerprint,
    read_rows,
    survey,
    to_prompt,
)


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    return tmp_path


def first_prompt(folder, row):
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    data = DataConfig(path=file)
    return to_prompt(next(iter(read_rows(data))), data)


ASKED = [user_message("What is this?", 1)]
FORMATS = {
    "llava": {
        "id": 1,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A dog."},
        ],
    },
    "povid": {
        "id": "1",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A dog."}],
        "rejected_conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A cat."},
        ],
    },
    "sharegpt": {
        "id": "1",
        "images": ["a.png"],
        "conversations": [{"from": "human", "value": "<image>What is this?"}],
        "chosen": {"from": "gpt", "value": "A dog."},
        "rejected": {"from": "gpt", "value": "A cat."},
    },
    "trl": {
        "id": "1",
        "images": ["a.png"],
        "prompt": ASKED,
        "chosen": [assistant_message("A dog.")],
        "rejected": [assistant_message("A cat.")],
    },
    "trl_plain": {
        "id": "1",
        "image": "a.png",
        "prompt": [{"role": "user", "content": "What is this?"}],
        "chosen": [{"role": "assistant", "content": "A dog."}],
        "rejected": [{"role": "assistant", "content": "A cat."}],
    },
    "rlaif_v": {"idx": 1, "image_path": "a.png", "question": "What is this?", "chosen": "A dog.", "rejected": "A cat."},
    "ms_swift": {
        "id": "1",
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": "<image>What is this?"},
            {"role": "assistant", "content": "A dog."},
        ],
        "rejected_response": "A cat.",
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_prompt(folder, name):
    prompt = first_prompt(folder, FORMATS[name])
    assert prompt.id == "1"
    assert prompt.messages == ASKED
    assert prompt.answer == "A dog."
    assert prompt.images[0]["bytes"] == (folder / "a.png").read_bytes()


def test_the_picture_of_the_row_is_read(folder):
    other = first_prompt(folder, {**FORMATS["llava"], "image": "b.png"})
    assert other.images[0]["bytes"] == (folder / "b.png").read_bytes()


def test_pictures_stay_where_their_marks_are(folder):
    row = {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "First <image> then <image>. Same?"}]}
    blocks = first_prompt(folder, row).messages[0]["content"]
    assert [block["type"] for block in blocks] == ["text", "image", "text", "image", "text"]


def test_many_turns_keep_their_context(folder):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."},
             {"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "Brown."}]  # fmt: skip
    prompt = first_prompt(folder, {"id": "1", "image": "a.png", "conversations": turns})
    assert [message["role"] for message in prompt.messages] == ["user", "assistant", "user"]
    assert prompt.answer == "Brown."
    assert placeholder_count(prompt.messages) == 1


def test_rows_without_id_get_one_from_their_content(folder):
    row = {key: value for key, value in FORMATS["rlaif_v"].items() if key != "idx"}
    one, again = first_prompt(folder, row), first_prompt(folder, row)
    other_picture = first_prompt(folder, {**row, "image_path": "b.png"})
    assert one.id == again.id != other_picture.id


def test_two_marks_and_one_picture(folder):
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image><image> Which?"}]}
    with pytest.raises(RecordError, match=r"2 image placeholder\(s\) for 1 picture"):
        first_prompt(folder, row)


def test_missing_picture(folder):
    with pytest.raises(ImageError, match=r"'gone\.png' is not in") as error:
        first_prompt(folder, {**FORMATS["llava"], "image": "gone.png"})
    assert error.value.reason == "missing_image"


def test_missing_column(folder):
    with pytest.raises(
        RecordError, match=r"needs `conversations`, `messages`, `prompt` or `question`; this one has .*text"
    ):
        first_prompt(folder, {"image": "a.png", "text": "hello"})


def test_bad_turn(folder):
    with pytest.raises(RecordError, match=r"a conversation turn needs `from`"):
        first_prompt(folder, {"conversations": [{"from": "robot", "value": "x"}]})


def test_bad_picture_field(folder):
    with pytest.raises(RecordError, match="a picture is a path or encoded bytes, got int"):
        first_prompt(folder, {"image": 7, "question": "x"})


def test_truncated_jsonl_costs_one_line(folder):
    file = folder / "rows.jsonl"
    whole = json.dumps(FORMATS["llava"])
    file.write_text(whole + "\n\n" + whole[:40])
    rows = list(read_rows(DataConfig(path=file)))
    assert len(rows) == 2
    assert isinstance(rows[1], BadRow)
    with pytest.raises(RecordError, match=r"rows\.jsonl line 3 is not complete JSON"):
        to_prompt(rows[1], DataConfig(path=file))


def test_json_list_and_limit(folder):
    file = folder / "rows.json"
    file.write_text(json.dumps([FORMATS["llava"]] * 5))
    assert survey(DataConfig(path=file, limit=3))[0] == len(list(read_rows(DataConfig(path=file, limit=3)))) == 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_mark_of_byte_order_is_no_part_of_the_rows(folder, name):
    rows = [FORMATS["llava"], FORMATS["rlaif_v"]]
    text = json.dumps(rows) if name == "rows.json" else "\n".join(map(json.dumps, rows))
    (folder / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(read_rows(DataConfig(folder / name))) == rows
    assert len(RowReader(DataConfig(folder / name)).read(0, 2)) == 2


def test_a_line_that_is_not_utf_8_is_not_read_with_other_words(folder):
    lines = [json.dumps({"id": "1", "question": "caf\xe9?", "answer": "A"}, ensure_ascii=False) for _ in range(3)]
    data = DataConfig(folder / "rows.jsonl")
    data.path.write_bytes("\n".join(lines[:2]).encode() + b"\n" + lines[2].encode("latin-1"))
    *good, bad = read_rows(data)
    assert [to_prompt(row, data).messages for row in good] == [[user_message("caf\xe9?")]] * 2
    with pytest.raises(
        RecordError, match=r"rows\.jsonl line 3 is not UTF-8 \(byte 0xe9\).*other words.*Convert the file"
    ) as error:
        to_prompt(bad, data)
    assert error.value.reason == "bad_encoding"
    assert survey(data)[0] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"question": "caf\xe9"}]'.encode("latin-1"), r"rows\.json is not UTF-8 \(byte 0xe9\).*Convert the file"),
        (b"[" * 100_000, r"rows\.json is not complete JSON \(maximum recursion depth"),
        (b'[{"id": 1},', r"rows\.json is not complete JSON .*Was the download cut off"),
    ],
    ids=["latin-1", "deep", "cut off"],
)
def test_a_list_that_cannot_be_read_is_named(folder, content, message):
    (folder / "rows.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(DataConfig(folder / "rows.json")))


def test_empty_file(folder):
    (folder / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"rows\.jsonl is empty"):
        list(read_rows(DataConfig(path=folder / "rows.jsonl")))


def test_no_file(folder):
    with pytest.raises(ValueError, match=r"no data at .*Set `data\.path`"):
        list(read_rows(DataConfig(path=folder / "nothing.jsonl")))


def test_unknown_file_type(folder):
    (folder / "rows.xlsx").write_text("a,b")
    with pytest.raises(ValueError, match=r"rows are read from \.jsonl, \.json, \.parquet, \.csv, \.tsv, not '\.xlsx'"):
        list(read_rows(DataConfig(path=folder / "rows.xlsx")))


def test_folder_without_rows(folder):
    with pytest.raises(ValueError, match=r"holds no \.parquet or \.jsonl rows"):
        list(read_rows(DataConfig(path=folder)))


def test_fingerprint_notices_other_content(folder):
    file = folder / "rows.jsonl"
    file.write_text("{}\n")
    before = fingerprint(DataConfig(path=file))
    file.write_text('{"a": 1}\n')
    assert fingerprint(DataConfig(path=file)) != before


def test_a_repeated_id_gets_its_contents_digits_in_every_format(folder):
    for name, row in FORMATS.items():
        data = DataConfig(path=folder / "rows.jsonl")
        picture = next(key for key in ("image", "images", "image_path") if key in row)
        others = [{**row, "chosen": "Another."}, {**row, picture: ["b.png"] if picture == "images" else "b.png"}]
        data.path.write_text("".join(json.dumps(line) + "\n" for line in (row, *others)))
        total, repeated = survey(data)
        assert (total, len(repeated), "1" in repeated) == (3, 1, True), name
        ids = [to_prompt(line, data, repeated=repeated).id for line in read_rows(data)]
        assert all(re.fullmatch("1-[0-9a-f]{8}", identity) for identity in ids)
        assert len(set(ids)) == 3
        assert to_prompt(row, data).id == "1"


def test_survey_of_parquet_reads_ids_only_and_keeps_to_the_limit(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question_id": [1, 2, 1], "question": ["a", "b", "c"]}), folder / "rows.parquet")
    total, repeated = survey(DataConfig(folder / "rows.parquet"))
    assert (total, "1" in repeated, "2" in repeated) == (3, True, False)
    total, repeated = survey(DataConfig(folder / "rows.parquet", limit=2))
    assert (total, len(repeated)) == (2, 0)
    pq.write_table(pa.table({"question": ["a", "b"]}), folder / "plain.parquet")
    total, repeated = survey(DataConfig(folder / "plain.parquet"))
    assert (total, len(repeated)) == (2, 0)


def test_own_parquet_rows_keep_their_id(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompt = Prompt("7", [read_image(folder / "a.png")], ASKED, "A dog.", {"objects": ["dog"]})
    table = pa.Table.from_pylist([prompt.to_row()] * 2, schema=Prompt.features().arrow_schema)
    pq.write_table(table, folder / "own.parquet")
    data = DataConfig(folder / "own.parquet")
    total, repeated = survey(data)
    assert (total, "7" in repeated) == (2, True)
    assert [to_prompt(row, data, repeated=repeated) for row in read_rows(data)] == [prompt, prompt]


def test_content_digest_is_of_picture_question_and_answer(folder):
    def digest(**changes):
        return content_digest(first_prompt(folder, {**FORMATS["rlaif_v"], **changes}))

    base = digest()
    assert digest(idx=2) == base
    assert len({base, digest(image_path="b.png"), digest(question="Where?"), digest(chosen="A cow.")}) == 4


def test_the_output_of_an_unfinished_stage_is_refused(folder):
    out = folder / "out"
    (out / "progress").mkdir(parents=True)
    (out / "data").mkdir()
    (out / "data" / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"output of a stage that is not finished.*Start that stage again"):
        files_of(DataConfig(out))
    (out / "manifest.json").write_text("{}")
    assert [file.name for file in files_of(DataConfig(out))] == ["train-00000.parquet"]
    assert files_of(DataConfig(out, images=folder / "not needed")) == files_of(DataConfig(out))


def test_a_picture_folder_that_is_not_there(folder):
    (folder / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"data\.images is .*gone.*there is no such folder"):
        files_of(DataConfig(folder / "rows.jsonl", images=folder / "gone"))


def test_truncated_parquet_is_named(folder):
    (folder / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"rows\.parquet is not a whole Parquet file"):
        survey(DataConfig(folder / "rows.parquet"))


def test_negative_limit(folder):
    with pytest.raises(ValueError, match="limit is -1; give how many"):
        DataConfig(folder / "rows.jsonl", limit=-1)


def test_a_fault_of_the_machine_is_not_put_down_to_the_row(folder):
    """/proc/self/mem is a regular file whose start cannot be read: EIO."""
    mem = Path("/proc/self/mem")
    if not mem.is_file():
        pytest.skip("needs /proc")
    with pytest.raises(OSError, match="Input/output error"):
        first_prompt(folder, {**FORMATS["llava"], "image": str(mem)})


def cloned(folder, *names):
    """A folder as `hf download` leaves it; each file has one row, called after the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in names:
        file = folder / "clone" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            pq.write_table(pa.table({"id": [name], "question": ["What?"]}), file)
        else:
            file.write_text(json.dumps({"id": name, "question": "What?"}) + "\n")
    return folder / "clone"


SHARDS = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002-6ef3991c06080e14.parquet")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("data/test-00000-of-00001.parquet", *SHARDS), "test, train"),
        (("test.jsonl", "train.jsonl"), "test, train"),
        (("dev.v2-00000-of-00001.parquet", "train.parquet"), "dev.v2, train"),
        (("llava_test_1.jsonl", "llava_train_1.jsonl", "llava_train_2.jsonl"), "test, train"),
        (("my-test-00000-of-00001.jsonl", "my-train-00000-of-00001.jsonl"), "test, train"),
    ],
)
def test_splits_of_a_downloaded_set_are_not_mixed(folder, names, splits):
    clone = cloned(folder, *names)
    with pytest.raises(
        ValueError, match=rf"has the splits {splits}, and no more than one .* Give one .* `data\.split`"
    ):
        files_of(DataConfig(clone))
    data = [DataConfig(clone, split=split) for split in splits.split(", ")]
    of = {each.split: [row["id"] for row in read_rows(each)] for each in data}
    assert of == {each.split: [name for name in names if each.split in name] for each in data}
    assert fingerprint(data[0]) != fingerprint(data[1])
    with pytest.raises(ValueError, match=rf"has no split 'validation', only {splits}\."):
        files_of(DataConfig(clone, split="validation"))
    with pytest.raises(ValueError, match="is on this disk, and data.revision is for data sets of the Hub"):
        files_of(DataConfig(clone, split="train", revision="v1"))


def test_a_downloaded_set_of_one_split_needs_no_name_of_it(folder):
    clone = cloned(folder, *SHARDS)
    both = [clone / name for name in SHARDS]
    assert files_of(DataConfig(clone)) == files_of(DataConfig(clone, split="train")) == both
    for name in ("rows.jsonl", "data/rows.jsonl"):
        cloned(folder, name)
        with pytest.raises(
            ValueError, match=rf"clone holds .*train-00000-of-00002\.parquet and {name}, .* Give .* `data"
        ):
            files_of(DataConfig(clone))
        (clone / name).unlink()
    (clone / "manifest.json").write_text("{}")
    cloned(folder, "notes.jsonl")
    assert files_of(DataConfig(clone)) == both  # a stage's output says itself what its rows are


def test_files_that_are_no_splits_are_read_together(folder):
    names = ("a.parquet", "b-00000-of.parquet", "latest.parquet", "train.parquet", "train_and_test.parquet")
    assert [row["id"] for row in read_rows(DataConfig(cloned(folder, *names)))] == list(names)
    with pytest.raises(ValueError, match=r"is on this disk, and data\.split is for .*or name the file of that split"):
        files_of(DataConfig(cloned(folder / "other", "a.parquet", "b.parquet"), split="train"))
    cloned(folder, "c.jsonl")
    with pytest.raises(ValueError, match=r"clone holds a\.parquet and c\.jsonl, which are not read together"):
        files_of(DataConfig(folder / "clone"))
