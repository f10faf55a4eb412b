"""How many blocks a folder may have: as many as keep the order of the rows in the names of their shards."""

import json

import pytest

from prefalign import blocks
from prefalign.records import Prompt, user_message
from prefalign.sources import DataConfig
from prefalign.store import OutputConfig, StoreError, read_records, run_stage, write_records

COUNTS = {"rows_in": 1, "rows_used": 1, "rows_out": 1, "dropped": {}, "quarantined": 0}


def prompt(number):
    return Prompt(str(number), [], [user_message(f"Question {number}?")])


def test_too_many_blocks_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_BLOCKS", 6)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": str(n), "question": f"Question {n}?"}) + "\n" for n in range(20)))

    def start(size):
        return run_stage("test", DataConfig(file), lambda block: [[one] for one in block], record=Prompt, settings={}, seed=0,
                         output=OutputConfig(tmp_path / "out", block_size=size))  # fmt: skip

    message = r"the rows make 10 blocks, and a folder has 6 at most.*Raise --output\.block_size to 4 or more"
    with pytest.raises(StoreError, match=message):
        start(2)
    assert not (tmp_path / "out").exists()
    assert start(4).rows_out == 20
    with pytest.raises(
        StoreError, match=r"more than 6 blocks.*Raise --output\.block_size \(with another --output\.path"
    ):
        write_records("test", map(prompt, range(7)), output=OutputConfig(tmp_path / "made", block_size=1), record=Prompt,
                      settings={}, seed=0)  # fmt: skip


def test_the_last_two_blocks_are_read_in_order_and_one_more_is_refused(tmp_path):
    """`train-100000.parquet` would be read before `train-99999.parquet`, here and by `datasets`."""
    for number in (99_999, 99_998):
        blocks.commit(tmp_path, number, blocks.to_parquet([prompt(number)], Prompt), [], {"block": number, **COUNTS})
    with pytest.raises(StoreError, match="more than 100,000 blocks"):
        blocks.commit(tmp_path, 100_000, None, [], {"block": 100_000, **COUNTS})
    assert [row.id for row in read_records(tmp_path, Prompt)] == ["99998", "99999"]
