"""Records: message shapes, ids, checks, and a Parquet round trip."""

import pytest

from prefalign.images import encode_png
from prefalign.records import (
    Candidates,
    Example,
    Pair,
    Prompt,
    RecordError,
    assistant_message,
    normalise_messages,
    record_id,
    row_seed,
    user_message,
)
from prefalign.text import same_answer


def picture(colour="red"):
    from PIL import Image

    return encode_png(Image.new("RGB", (4, 4), colour), "a.png")


def pair(**changes):
    values = {"id": "p", "images": [picture()], "prompt": [user_message("What?", 1)], "method": "test",
              "chosen": [assistant_message("A dog.")], "rejected": [assistant_message("A cat.")]}  # fmt: skip
    return Pair(**{**values, **changes})


def test_ids_depend_on_what_changes_rows_and_on_nothing_else():
    base = {"method": "bdhs", "parent": "1", "settings": {"a": 1, "b": 2.0}, "model": "m", "seed": 0}
    one = record_id(**base)
    assert one == record_id(**{**base, "settings": {"b": 2.0, "a": 1}})
    others = [record_id(**{**base, key: value}) for key, value in
              [("method", "povid"), ("parent", "2"), ("settings", {"a": 1}), ("model", "n"), ("seed", 1)]]  # fmt: skip
    others.append(record_id(**base, index=1))
    assert len({one, *others}) == 7
    assert len(one) == 24


def test_row_seed_is_stable():
    assert row_seed(0, "a") == row_seed(0, "a")
    assert len({row_seed(0, "a"), row_seed(1, "a"), row_seed(0, "b")}) == 3
    assert 0 <= row_seed(0, "a") < 2**63


def test_arrow_nulls_are_removed_from_image_blocks():
    stored = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "hi"}]}]
    assert normalise_messages(stored) == [user_message("hi", 1)]


def test_plain_text_content_becomes_a_block():
    assert normalise_messages([{"role": "assistant", "content": "Yes."}]) == [assistant_message("Yes.")]


@pytest.mark.parametrize(
    "message",
    [{"role": "user"}, {"content": "x"}, {"role": "user", "content": [{"type": "video"}]},
     {"role": "user", "content": [{"type": "text", "text": None}]}],
)  # fmt: skip
def test_bad_messages(message):
    with pytest.raises(RecordError, match="message|block") as error:
        normalise_messages([message])
    assert error.value.reason == "bad_messages"


def test_two_placeholders_and_one_picture():
    with pytest.raises(RecordError, match=r"2 image placeholder\(s\) for 1 picture\(s\).*Write one `<image>`"):
        Prompt("x", [picture()], [user_message("Compare.", 2)]).check()


def test_prompt_without_question():
    with pytest.raises(RecordError, match="does not end with a user turn"):
        Prompt("x", [], [assistant_message("hello")]).check()


def test_identical_answers():
    with pytest.raises(RecordError, match="same text on the same picture") as error:
        pair(rejected=[assistant_message("a  dog. ")]).check()
    assert error.value.reason == "identical_answers"


def test_identical_answers_on_another_picture_are_a_pair():
    pair(rejected=[assistant_message("A dog.")], rejected_images=[picture("blue")]).check()


def test_empty_answer():
    with pytest.raises(RecordError, match="the rejected answer is empty"):
        pair(rejected=[assistant_message("  ")]).check()


def test_rejected_pictures_must_fit_the_prompt():
    with pytest.raises(RecordError, match=r"\(rejected picture\) has 1 image placeholder\(s\) for 2"):
        pair(rejected_images=[picture(), picture()]).check()


def test_missing_column_is_named():
    with pytest.raises(RecordError, match="a Pair row lacks chosen, method"):
        Pair.from_row({"id": "x", "images": [], "prompt": [], "rejected": []})


def test_parquet_round_trip(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    original = pair(meta={"seed": 1, "nested": {"x": [1, 2]}}, facts={"objects": ["dog"]}, margin=0.5)
    table = pa.Table.from_pylist([original.to_row()], schema=Pair.features().arrow_schema)
    pq.write_table(table, tmp_path / "x.parquet")
    assert Pair.from_row(pq.read_table(tmp_path / "x.parquet").to_pylist()[0]) == original


def test_candidates_round_trip():
    original = Candidates("c", [], [user_message("Hi")], [{"text": "a", "scores": {"rule": 1.0}}])
    assert Candidates.from_row(original.to_row()) == original
    assert set(Candidates.features()) == set(original.to_row())


@pytest.mark.parametrize("messages", ["hi", 5, {"role": "user"}, ["hi"], [{"role": "user", "content": ["hi"]}]])
def test_messages_of_another_shape(messages):
    with pytest.raises(RecordError, match="messages are a list of turns|a message needs|a content block is") as error:
        normalise_messages(messages)
    assert error.value.reason == "bad_messages"


@pytest.mark.parametrize(("other", "same"), [("A DOG!", True), ("a dog", True), ("A dog, 2.5 m.", False)])
def test_answers_are_compared_as_stages_compare_them(other, same):
    both = pair(rejected=[assistant_message(other)])
    assert same_answer("A dog.", other) == same
    if same:
        with pytest.raises(RecordError, match="the gradient is zero"):
            both.check()
    else:
        both.check()


@pytest.mark.parametrize("record", [Candidates("c", [], [user_message("Hi", 1)], []),
                                    Example("e", [], [user_message("Hi", 1)])])  # fmt: skip
def test_every_record_checks_its_placeholders(record):
    with pytest.raises(RecordError, match=rf"{record.id} has 1 image placeholder\(s\) for 0 picture"):
        record.check()
    record.images = [picture()]
    record.check()
