"""Rows by their place: the same rows whatever is left out, and what is left out is not read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefalign.sources import BadRow, DataConfig, RowReader, read_rows, survey

ROWS = [{"id": str(number), "question": f"Question {number}?", "answer": "Yes." * number} for number in range(11)]


def lines(folder):
    text = [json.dumps(row) for row in ROWS]
    text[4] = text[4][:9]
    text[7] = "[7]"
    (folder / "rows.jsonl").write_text("\n\n".join(text[:6]) + "\n" + "\n".join(text[6:]))
    return folder / "rows.jsonl"


def listed(folder):
    (folder / "rows.json").write_text(json.dumps([*ROWS[:3], "no row", *ROWS[4:]]))
    return folder / "rows.json"


def shards(folder, size=3):
    for number, rows in enumerate((ROWS[:7], ROWS[7:8], ROWS[8:])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet", row_group_size=size)
    return folder


@pytest.mark.parametrize("limit", [0, 9])
@pytest.mark.parametrize("source", [lines, listed, shards])
def test_rows_do_not_depend_on_what_is_left_out(tmp_path, source, limit):
    data = DataConfig(source(tmp_path), limit=limit)
    every = list(read_rows(data))
    assert len(every) == (limit or 11)
    assert sum(isinstance(row, BadRow) for row in every) == {lines: 2, listed: 1, shards: 0}[source]
    for stretches in (
        [(0, 11)],
        [(0, 4), (4, 4), (8, 4)],
        [(2, 1), (6, 2), (10, 2)],
        [(5, 3)],
        [(7, 1), (8, 1)],
        [(11, 2)],
    ):
        reader = RowReader(data)
        for first, count in stretches:
            assert reader.read(first, count) == every[first : first + count]


def test_a_large_row_group_is_read_from_its_middle(tmp_path):
    rows = [{"id": str(number)} for number in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    reader = RowReader(DataConfig(tmp_path / "rows.parquet"))
    assert reader.read(130, 3) == rows[130:133]
    assert reader.read(133, 100) == rows[133:233]
    assert reader.read(299, 5) == rows[299:]


def test_files_and_row_groups_that_are_left_out_are_not_read(tmp_path):
    """Their bytes are destroyed: only the footers are whole."""
    shards(tmp_path)
    for name, groups in (("0", (0, 1)), ("1", (0,))):
        file = tmp_path / f"{name}.parquet"
        footer, content = pq.read_metadata(file), bytearray(file.read_bytes())
        for group in groups:
            for column in range(footer.num_columns):
                chunk = footer.row_group(group).column(column)
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
        file.write_bytes(content)
    data = DataConfig(tmp_path)
    with pytest.raises(ValueError, match=r"0\.parquet is not a whole Parquet file"):
        RowReader(data).read(0, 1)
    reader = RowReader(data)
    assert reader.read(6, 1) == ROWS[6:7]
    assert reader.read(8, 3) == ROWS[8:]


def test_columns_in_which_datasets_keeps_json_are_read(tmp_path):
    import datasets
    from datasets import Dataset, Features, Json, List, Value
    from packaging.version import Version

    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    features = Features({"id": Value("string"), "prompt": List(Json()), "more": {"a": Json(), "b": Value("int64")}})
    rows = [{"id": "1", "prompt": turns, "more": {"a": {"x": [1]}, "b": 2}}, {"id": "2", "prompt": None, "more": None}]
    kept = Dataset.from_list(rows, features=features)
    kept.to_parquet(str(tmp_path / "rows.parquet"))
    read = list(read_rows(DataConfig(tmp_path / "rows.parquet")))
    assert read == list(kept)
    assert [row["prompt"] for row in read] == [turns, None]
    twice = Version(datasets.__version__) < Version("5.1")  # JSON inside a mapping was made a string of JSON
    assert read[0]["more"]["a"] == ('{"x":[1]}' if twice else {"x": [1]})
    assert survey(DataConfig(tmp_path / "rows.parquet"))[0] == 2
