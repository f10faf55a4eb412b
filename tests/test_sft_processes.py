"""Rows of SFT that processes with shared weights could not train on together."""

from pathlib import Path

import pytest
from datasets import Dataset

from prefalign.config import ConfigError
from prefalign.training.examples import check_pictures

FOLDER = Path("rows")


def rows(*counts):
    return Dataset.from_list([{"images": [{"bytes": b"x", "path": None}] * count} for count in counts])


def test_rows_without_pictures_beside_others_are_refused_where_weights_are_shared_out():
    message = (
        "2 of the 3 rows of rows have no picture, .* over 2 processes: .* waiting for the vision tower.*ZeRO-2 or DDP"
    )
    with pytest.raises(ConfigError, match=message):
        check_pictures([rows(1, 0, 0)], [FOLDER], processes=2, in_parts=True)


def test_other_rows_and_other_ways_are_taken():
    check_pictures([rows(1, 0, 0)], [FOLDER], processes=1, in_parts=True)
    check_pictures([rows(1, 0, 0)], [FOLDER], processes=2, in_parts=False)
    check_pictures([rows(1, 2), rows(1)], [FOLDER, FOLDER], processes=2, in_parts=True)
