"""ms-swift's rows whose rejected answer has pictures of its own; rows with a thumb, its and LLaMA-Factory's."""

import pytest

from prefalign.records import Pair, RecordError, message_text
from prefalign.sources import DataConfig, to_candidates, to_pair, to_prompt
from tests.published_sets import BAD, GOOD, QUESTION, ROWS, pictures, said, talk


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path)


def data(folder):
    return DataConfig(folder / "rows.jsonl")


def test_the_rejected_answer_of_another_picture_is_no_answer_to_this_one(folder):
    row = {**ROWS["ms_swift"][3], "rejected_images": ["b.png"]}
    with pytest.raises(
        RecordError, match="here other pictures than the chosen one's.*`produce: pairs`, for the"
    ) as error:
        to_candidates(row, data(folder))
    assert error.value.reason == "two_pictures"
    assert to_prompt(row, data(folder)).answer == GOOD
    with pytest.raises(
        RecordError, match="here other pictures than the chosen one's"
    ):  # one answer, and nothing to choose between
        to_candidates(ROWS["ms_swift"][2], data(folder))
    assert to_pair({**row, "rejected_images": ["a.png"]}, data(folder)).rejected_images == []


@pytest.mark.parametrize("answer", ["rejected_response", "rejected_messages"])
def test_two_answers_on_two_pictures_are_a_pair_that_says_so(folder, answer):
    """As texts or as turns; one picture, one answer, or another layout are no such pair, whatever stands in `meta`."""
    row = {**ROWS["ms_swift"][3], "rejected_images": ["b.png"]}
    if answer == "rejected_response":
        row = {name: value for name, value in row.items() if name != "rejected_messages"} | {answer: BAD}
    pair = to_pair(row, data(folder))
    assert (message_text(pair.chosen), message_text(pair.rejected)) == (GOOD, BAD)
    assert pair.images[0]["bytes"] == (folder / "a.png").read_bytes()
    assert pair.rejected_images[0]["bytes"] == (folder / "b.png").read_bytes()
    assert pair.on_two_pictures
    assert pair.meta == {"layout": "ms_swift", "rejected_on_rejected_images": True}
    again = Pair.from_row(pair.to_row())
    assert to_pair(again.to_row(), data(folder)).on_two_pictures  # as a stage reads what another wrote
    for other in (ROWS["ms_swift"][0], ROWS["ms_swift"][2], {**row, "rejected_images": ["a.png"]}, {**row, answer: GOOD},
                  {**row, "rejected_on_rejected_images": True, "rejected_images": None}, ROWS["mvc"][0]):  # fmt: skip
        assert not to_pair(other, data(folder)).on_two_pictures
    swapped = to_pair({**row, "images": ["b.png"], "rejected_images": ["a.png"]}, data(folder))
    assert swapped.id != pair.id


def encoded(folder, name, path):
    return {"bytes": (folder / name).read_bytes(), "path": path}


def test_the_same_pictures_again_are_told_by_their_content(folder):
    """However they are named: with the rejected answer they are left out, without it there is nothing to prefer."""
    _, _, alone, both = ROWS["ms_swift"]
    spellings = (["a.png"], ["./a.png"], [{"path": "a.png"}], [encoded(folder, "a.png", "2.png")])
    for again in spellings:
        pair = to_pair({**both, "rejected_images": again}, data(folder))
        assert (pair.rejected_images, message_text(pair.rejected)) == ([], BAD)
        candidates = to_candidates({**both, "rejected_images": again}, data(folder))
        assert [answer["text"] for answer in candidates.responses] == [GOOD, BAD]
        for read in (to_pair, to_candidates):
            with pytest.raises(RecordError, match="this row has ") as error:
                read({**alone, "rejected_images": again}, data(folder))
            assert error.value.reason == "missing_column"
    # other content under the same name
    row = {
        **alone,
        "images": [encoded(folder, "a.png", "x.png")],
        "rejected_images": [encoded(folder, "b.png", "x.png")],
    }
    pair = to_pair(row, data(folder))
    assert (pair.images[0]["bytes"], message_text(pair.rejected)) == ((folder / "a.png").read_bytes(), GOOD)
    assert [picture["bytes"] for picture in pair.rejected_images] == [(folder / "b.png").read_bytes()]


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    ("layout", "column"),
    [("ms_swift", "label"), ("sharegpt", "kto_tag"), ("sharegpt", "label"), ("ms_swift", "kto_tag")],
)
def test_a_thumb_is_a_score(folder, layout, column, label):
    """ms-swift's `label`, LLaMA-Factory's `kto_tag`: a disliked answer is nothing to imitate."""
    turns = {"messages": [said("user", f"<image>{QUESTION}"), said("assistant", GOOD)]}
    if layout == "sharegpt":
        turns = {"conversations": talk(f"<image>{QUESTION}", GOOD)}
    row = {**turns, "images": ["a.png"], column: label}
    found = to_candidates(row, data(folder))
    assert (found.responses, found.answer, found.facts) == (
        [{"text": GOOD, "scores": {"label": float(label)}}],
        GOOD if label else None,
        {},
    )
    assert to_prompt(row, data(folder)).answer == found.answer
    with pytest.raises(RecordError, match=rf"{layout} holds 1 answer\(s\)"):
        to_pair(row, data(folder))


def test_what_is_no_thumb(folder):
    """A `label` of another kind is a column like any other; a `kto_tag` can only be a thumb, without an answer it is none."""
    row = {"conversations": talk(QUESTION, GOOD)}
    for label in ("cup", 0):
        prompt = to_prompt({**row, "label": label}, data(folder))
        assert (prompt.answer, prompt.facts) == (GOOD, {"columns": {"label": label}})
    with pytest.raises(RecordError, match="`kto_tag` of an unpaired row is true or false, got 'up'") as error:
        to_prompt({**row, "kto_tag": "up"}, data(folder))
    assert error.value.reason == "bad_label"
    unanswered = to_prompt({"conversations": talk(QUESTION), "kto_tag": False}, data(folder))
    assert unanswered.facts == {"columns": {"kto_tag": False}}
    pair = {**ROWS["sharegpt"][0], "kto_tag": False}
    assert message_text(to_pair(pair, data(folder)).chosen) == GOOD
