"""CSV and TSV files as data: the rows that JSONL gives, cell by cell, and what is wrong with a file said by line and column."""

import csv
import json

import pytest
from PIL import Image

from prefalign import cli
from prefalign.records import Pair, RecordError
from prefalign.sources import (
    BadRow,
    DataConfig,
    RowReader,
    files_of,
    fingerprint,
    read_rows,
    survey,
    to_pair,
    to_prompt,
)
from prefalign.store import read_records

TURNS = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": 'A "ring",\nred; no\ttab.'},
]
ROWS = [
    {"id": "007", "image": "red.png", "question": 'What is "this",\nin one word?', "chosen": "A ring; red.",
     "rejected": '[{"bbox": [1, 2]}]', "margin": 0.5, "count": 3},
    {"id": "8", "image": "blue.png", "question": "Caf\u00e9, \u2713 or \u00bf?", "chosen": "No\ttab.",
     "rejected": "Yes, 5\" wide.", "margin": 2, "count": None},
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def written(file, rows, *, encoding="utf-8", quoting=csv.QUOTE_MINIMAL, end="\r\n"):
    with file.open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(
            stream, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",", quoting=quoting, lineterminator=end
        )
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("quoting", "end"), [(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\n"), (csv.QUOTE_ALL, "\r")]
)
def test_a_table_gives_the_pairs_that_jsonl_gives(pictures, name, encoding, quoting, end):
    (pictures / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    asked = {"fact_columns": ["count"]}
    wanted, data = (DataConfig(file, **asked) for file in (
        pictures / "rows.jsonl", written(pictures / name, ROWS, encoding=encoding, quoting=quoting, end=end)))  # fmt: skip
    pairs = [to_pair(row, data) for row in read_rows(data)]
    assert pairs == [to_pair(row, wanted) for row in read_rows(wanted)]
    assert [pair.id for pair in pairs] == ["007", "8"]
    assert [pair.facts for pair in pairs] == [{"count": 3}, {}]
    assert [pair.margin for pair in pairs] == [0.5, 2]
    assert pairs[0].images[0]["bytes"] == (pictures / "red.png").read_bytes()
    assert pairs[1].images[0]["bytes"] == (pictures / "blue.png").read_bytes()


def test_turns_and_lists_of_pictures_are_json(pictures):
    row = {"": "0", "id": "a", "images": '["red.png", "blue.png"]', "conversations": json.dumps(
        [{"from": "human", "value": "<image><image>\nWhich is red?"}, TURNS[1]])}  # fmt: skip
    data = DataConfig(written(pictures / "rows.csv", [row]))
    prompt = to_prompt(next(read_rows(data)), data)
    assert prompt.answer == TURNS[1]["value"]
    assert [image["bytes"] for image in prompt.images] == [
        (pictures / f"{name}.png").read_bytes() for name in ("red", "blue")
    ]
    trl = {"id": "b", "image": "red.png", "prompt": json.dumps([{"role": "user", "content": "What is it?"}]),
           "chosen": json.dumps([{"role": "assistant", "content": "A ring."}]), "rejected": "[]"}  # fmt: skip
    data = DataConfig(written(pictures / "trl.csv", [trl]))
    pair = to_pair(next(read_rows(data)), data)
    assert (pair.chosen[0]["content"][0]["text"], pair.rejected[0]["content"][0]["text"]) == ("A ring.", "[]")


@pytest.mark.parametrize(
    ("cell", "value"),
    [("1", 1), ("0", 0), ("True", True), ("false", False), ("2.5", 2.5), ("007", "007"), ("yes", "yes"), ("1e999", "1e999"),
     ("", None), ("-3", -3), ("1_000", "1_000"), ("nan", "nan")],
)  # fmt: skip
def test_labels_and_facts_are_what_json_would_take_them_for(tmp_path, cell, value):
    file = written(tmp_path / "rows.csv", [{"question": cell, "label": cell, "count": cell}])
    (row,) = read_rows(DataConfig(file, fact_columns=["count"]))
    assert (row["label"], row["count"], row["question"]) == (value, value, cell or None)
    assert [type(row[name]) for name in ("label", "count")] == [type(value)] * 2


def test_rows_by_place_and_limits_are_those_of_the_whole_table(tmp_path):
    rows = [{"id": str(number), "question": f"Line\n{number}" * (number % 3)} for number in range(40)]
    data = DataConfig(written(tmp_path / "rows.csv", rows))
    every = list(read_rows(data))
    assert [row["id"] for row in every] == [row["id"] for row in rows]
    reader = RowReader(data)
    assert reader.read(3, 2) + reader.read(17, 100) == every[3:5] + every[17:]
    assert survey(DataConfig(data.path, limit=7))[0] == 7
    total, repeated = survey(DataConfig(written(tmp_path / "twice.csv", [*rows, rows[4]])))
    assert (total, "4" in repeated, "5" in repeated) == (41, True, False)
    assert fingerprint(data) != fingerprint(DataConfig(tmp_path / "twice.csv"))


def test_a_long_cell_is_read(tmp_path):
    """Longer than Python's csv takes by itself."""
    file = written(tmp_path / "rows.csv", [{"question": "x" * 300_000}])
    assert len(next(read_rows(DataConfig(file)))["question"]) == 300_000


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'b,"What, this?",c,d', "bad_table", "rows.csv line 4 has 4 cell(s) and the header 3"),
        (b"b,What?", "bad_table", "rows.csv line 4 has 2 cell(s) and the header 3"),
        (b"b,Caf\xe9?,c", "bad_encoding", "rows.csv line 4 is not UTF-8 (byte 0xe9)"),
    ],
)
def test_a_row_that_cannot_be_read_is_alone_in_that(tmp_path, line, reason, message):
    file = tmp_path / "rows.csv"
    file.write_bytes(b'id,question,chosen\na,"First\nquestion?",Yes.\n' + line + b"\n\nz,Last?,No.\n")
    first, bad, last = read_rows(DataConfig(file))
    assert (first["question"], last["question"]) == ("First\nquestion?", "Last?")
    assert isinstance(bad, BadRow)
    assert bad.reason == reason
    assert bad.message.startswith(message)


def test_turns_that_are_no_json_are_named(tmp_path):
    file = written(tmp_path / "rows.csv", [{"id": "a", "conversations": str(TURNS)}])
    (bad,) = read_rows(DataConfig(file))
    assert bad.reason == "bad_json"
    assert "rows.csv line 2, column 'conversations', is not complete JSON" in bad.message
    assert "str() of a Python list is not JSON" in bad.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'id,question\na,"What?\nb,Who?\n', r"line 2 has a quote that is not closed.* written twice"),
        (b'id,question\na,"What" is\nit?\n', r"line 2 has a quote that .* cannot be told where this row ends"),
        (b"id;question\na;What?\n", "'id;question': it seems to be separated by semicolons, and a .csv .* Save it with commas"),
        (b"id\tquestion\na\tWhat?\n", "separated by tabs, and a .csv file is read by its commas. Name it .tsv"),
        (b"id,question,id\na,What?,b\n", "two columns called 'id'; only one could count"),
        ("id,question\na,What?\n".encode("utf-16"), r"is not UTF-8 \(byte 0xff\)"),
        (b"\n\n", "has no header, only blank lines"),
        (b"", "is empty"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_such_table_is_refused(tmp_path, content, message):
    file = tmp_path / "rows.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        survey(DataConfig(file))


def test_a_missing_column_names_those_that_are_there(tmp_path):
    data = DataConfig(written(tmp_path / "rows.tsv", [{"id": "a", "Question": "What?"}]))
    with pytest.raises(
        RecordError, match="a row needs `conversations`, `messages`, `prompt` or `question`; this one has Question, id"
    ):
        to_prompt(next(read_rows(data)), data)


def test_a_folder_points_to_its_tables(tmp_path):
    written(tmp_path / "rows.csv", ROWS)
    with pytest.raises(ValueError, match=r"Give the data file itself as `data.path`. It has rows.csv"):
        files_of(DataConfig(tmp_path))


def test_a_stage_reads_a_table(pictures, capsys):
    file = written(pictures / "rows.csv", [{name: row[name] for name in ("id", "image", "question", "chosen", "rejected")}
                                           for row in ROWS])  # fmt: skip
    options = ["import_published", "--config", "datagen/import_published_scenes", "--data.path", str(file)]
    folder = pictures / "pairs"
    status = cli.main(["run", *options, "--data.layout", "auto", "--output.path", str(folder)])
    assert status == 0, capsys.readouterr().err
    made = {pair.meta["parent"]: pair for pair in read_records(folder, Pair)}
    assert set(made) == {"007", "8"}
    assert made["8"].images[0]["bytes"] == (pictures / "blue.png").read_bytes()
