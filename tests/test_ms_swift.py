"""ms-swift's rows whose rejected answer has pictures of its own, and its rows with a thumb."""

import pytest

from prefalign.records import RecordError
from prefalign.sources import DataConfig, to_candidates, to_pair, to_prompt
from tests.published_sets import GOOD, QUESTION, ROWS, pictures, said


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path)


def data(folder):
    return DataConfig(folder / "rows.jsonl")


def test_the_rejected_answer_of_another_picture_is_no_answer_to_this_one(folder):
    row = {**ROWS["ms_swift"][3], "rejected_images": ["b.png"]}
    for read in (to_pair, to_candidates):
        with pytest.raises(RecordError, match="here other pictures than the chosen one's.*Leave `rejected_im") as error:
            read(row, data(folder))
        assert error.value.reason == "two_pictures"
    assert to_prompt(row, data(folder)).answer == GOOD
    with pytest.raises(
        RecordError, match="here other pictures than the chosen one's"
    ):  # one answer, and nothing to choose between
        to_candidates(ROWS["ms_swift"][2], data(folder))
    assert to_pair({**row, "rejected_images": ["a.png"]}, data(folder)).rejected_images == []


@pytest.mark.parametrize("label", [True, False])
def test_a_thumb_of_ms_swift_is_a_score(folder, label):
    row = {
        "messages": [said("user", f"<image>{QUESTION}"), said("assistant", GOOD)],
        "images": ["a.png"],
        "label": label,
    }
    found = to_candidates(row, data(folder))
    assert (found.responses, found.answer) == (
        [{"text": GOOD, "scores": {"label": float(label)}}],
        GOOD if label else None,
    )
    with pytest.raises(RecordError, match=r"ms_swift holds 1 answer\(s\)"):
        to_pair(row, data(folder))
