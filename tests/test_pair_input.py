"""Pairs in the layouts people have, read as pairs, and stages that read them."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prefalign import store
from prefalign.images import ImageError, read_image
from prefalign.records import Pair, RecordError, assistant_message, message_text, placeholder_count, user_message
from prefalign.sources import DataConfig, read_rows, survey, to_pair
from prefalign.store import Dropped, OutputConfig, read_records

ASKED = [user_message("What is this?", 1)]
DOG, CAT = [assistant_message("A dog.")], [assistant_message("A cat.")]


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    return tmp_path


def read(folder, row, *, repeated=()):
    return to_pair(row, DataConfig(folder / "rows.jsonl"), repeated=repeated)


LAYOUTS = {
    "trl turns": {"id": "1", "images": ["a.png"], "prompt": ASKED, "chosen": DOG, "rejected": CAT},
    "trl plain turns": {"id": "1", "image": "a.png", "prompt": [{"role": "user", "content": "What is this?"}],
                        "chosen": [{"role": "assistant", "content": "A dog."}],
                        "rejected": [{"role": "assistant", "content": "A cat."}]},
    "trl text": {"id": "1", "image": "a.png", "prompt": "What is this?", "chosen": "A dog.", "rejected": "A cat."},
    "trl implicit prompt": {"id": "1", "image": "a.png", "chosen": [*ASKED, *DOG], "rejected": [*ASKED, *CAT]},
    "rlaif_v": {"idx": 1, "image": "a.png", "question": "What is this?", "chosen": "A dog.", "rejected": "A cat.",
                "origin_dataset": "COCO", "image_path": "elsewhere/x.png"},
    "rlaif_v path": {"idx": 1, "image_path": "a.png", "question": "What is this?", "chosen": "A dog.", "rejected": "A cat."},
    "sharegpt": {"id": "1", "images": ["a.png"], "conversations": [{"from": "human", "value": "<image>What is this?"}],
                 "chosen": {"from": "gpt", "value": "A dog."}, "rejected": {"from": "gpt", "value": "A cat."}},
    "ms_swift": {"id": "1", "images": ["a.png"], "rejected_response": "A cat.",
                 "messages": [{"role": "user", "content": "<image>What is this?"},
                              {"role": "assistant", "content": "A dog."}]},
    "povid": {"id": "1", "image": "a.png",
              "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A dog."}],
              "rejected_conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                         {"from": "gpt", "value": "A cat."}]},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_pair(folder, name):
    pair = read(folder, LAYOUTS[name])
    pair.check()
    assert (pair.id, pair.prompt, pair.chosen, pair.rejected) == ("1", ASKED, DOG, CAT)
    assert [image["bytes"] for image in pair.images] == [(folder / "a.png").read_bytes()]
    assert pair.rejected_images == []


def test_the_picture_of_the_row_is_read(folder):
    other = read(folder, {**LAYOUTS["trl text"], "image": "b.png"})
    assert other.images[0]["bytes"] == (folder / "b.png").read_bytes()


MVC = {"chosen_images": ["a.png"], "rejected_images": ["b.png"], "instruction_prompt": "What is this?",
       "system_prompt": "Be short.", "chosen_response": "A dog.", "rejected_response": "A cat."}  # fmt: skip


def test_mvc_layout_has_two_pictures_and_a_system_turn(folder):
    pair = read(folder, MVC)
    assert [turn["role"] for turn in pair.prompt] == ["system", "user"]
    assert message_text(pair.prompt) == "Be short.\nWhat is this?"
    assert placeholder_count(pair.prompt) == 1
    assert pair.images[0]["bytes"] == (folder / "a.png").read_bytes()
    assert pair.rejected_images[0]["bytes"] == (folder / "b.png").read_bytes()
    assert (pair.chosen, pair.rejected) == (DOG, CAT)
    swapped = read(folder, {**MVC, "chosen_images": ["b.png"], "rejected_images": ["a.png"]})
    assert swapped.images == pair.rejected_images
    assert swapped.id != pair.id
    assert read(folder, {**MVC, "system_prompt": ""}).prompt == ASKED
    assert read(folder, {**MVC, "chosen_images": "a.png", "rejected_images": "b.png"}).images == pair.images


def test_margin_and_method_of_a_foreign_row_are_kept(folder):
    row = {**LAYOUTS["trl text"], "margin": 2, "method": "judge"}
    pair = read(folder, row)
    assert (pair.margin, pair.method) == (2.0, "judge")
    assert read(folder, LAYOUTS["trl text"]).margin is None
    assert read(folder, LAYOUTS["trl text"]).method == "imported"
    for bad in ("much", True, [1], float("nan")):
        with pytest.raises(RecordError, match="`margin` is a finite number or absent") as error:
            read(folder, {**row, "margin": bad})
        assert error.value.reason == "bad_margin"


def test_an_empty_answer_is_not_filled_in_from_the_reference(folder):
    """The reference is the row's `answer`; what stands in for an absent chosen one is the conversation's last turn alone."""
    row = {"id": "1", "image": "a.png", "question": "How many?", "rejected": "two", "answer": "Gold"}
    empty = read(folder, {**row, "chosen": ""})
    assert (message_text(empty.chosen), empty.answer) == ("", "Gold")
    with pytest.raises(RecordError) as error:
        empty.check()
    assert error.value.reason == "empty_chosen"
    for absent in (row, {**row, "chosen": None}):
        with pytest.raises(RecordError, match="this row has no `chosen`") as error:
            read(folder, absent)
        assert error.value.reason == "missing_column"
    talk = {**LAYOUTS["ms_swift"], "answer": "Gold"}
    assert (read(folder, talk).chosen, read(folder, talk).answer) == (DOG, "Gold")
    assert message_text(read(folder, {**talk, "chosen": ""}).chosen) == ""
    assert message_text(read(folder, {**talk, "chosen": "A cow."}).chosen) == "A cow."
    for side in ("chosen", "rejected"):
        with pytest.raises(RecordError, match=f"`{side}` has no turn") as error:
            read(folder, {**talk, side: []})
        assert error.value.reason == f"empty_{side}"


def test_null_columns_are_absent_ones(folder):
    """Parquet fills columns that a row lacks with nulls; an MVC row's question is then still read."""
    nulls = dict.fromkeys(("prompt", "question", "messages", "conversations", "chosen", "rejected", "answer"))
    assert read(folder, {**nulls, **MVC}) == read(folder, MVC)


def test_a_system_prompt_beside_a_system_turn_is_left_out(folder):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is this?"}]
    both = {**LAYOUTS["trl plain turns"], "prompt": turns, "system_prompt": "Be short."}
    assert message_text(read(folder, both).prompt) == "Be kind.\nWhat is this?"
    assert message_text(read(folder, {**both, "prompt": turns[1:]}).prompt) == "Be short.\nWhat is this?"


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_missing_answer_is_named(folder, side):
    row = {name: value for name, value in LAYOUTS["trl text"].items() if name != side}
    message = (
        rf"a pair needs `chosen` and `rejected`; this row has no `{side}`, only .*image, prompt.*`--reads answers`"
    )
    with pytest.raises(RecordError, match=message) as error:
        read(folder, row)
    assert error.value.reason == "missing_column"
    with pytest.raises(RecordError, match=f"this row has no `{side}`"):
        read(folder, {**row, side: None})


@pytest.mark.parametrize("nothing", [None, "", []])
def test_a_column_that_holds_nothing_is_not_told_as_one_that_the_row_has(folder, nothing):
    """A table gives every row every column."""
    row = {**LAYOUTS["trl text"], "rejected": None, "note": nothing}
    with pytest.raises(RecordError, match=r"no `rejected`, only chosen, id, image, prompt\. Rows"):
        read(folder, row)


def test_a_row_that_asks_nothing_is_named(folder):
    row = {"id": "1", "image": "a.png", "chosen": "A dog.", "rejected": "A cat."}
    with pytest.raises(RecordError, match="a row needs `conversations`, `messages`, `prompt` or `question`"):
        read(folder, row)


def test_placeholders_must_fit_the_pictures_of_both_sides(folder):
    row = {**LAYOUTS["trl text"], "prompt": "<image><image> Which?"}
    with pytest.raises(RecordError, match=r"2 image placeholder\(s\) for 1 picture"):
        read(folder, row)
    with pytest.raises(RecordError, match=r"\(rejected picture\) has 1 image placeholder\(s\) for 2 picture"):
        read(folder, {**LAYOUTS["trl text"], "rejected_images": ["a.png", "b.png"]})
    two = read(folder, {**row, "image": ["a.png", "b.png"]})
    assert [block["type"] for block in two.prompt[0]["content"]] == ["image", "image", "text"]


def test_a_missing_picture_of_either_side(folder):
    for name in ("image", "rejected_images"):
        with pytest.raises(ImageError, match=r"'gone\.png' is not in"):
            read(folder, {**LAYOUTS["trl text"], name: "gone.png"})


def test_rows_without_id_are_called_after_their_content(folder):
    row = {name: value for name, value in LAYOUTS["trl text"].items() if name != "id"}
    base = read(folder, row).id
    assert read(folder, dict(row)).id == base
    changed = [{"image": "b.png"}, {"prompt": "Where?"}, {"chosen": "A cow."}, {"rejected": "A cow."},
               {"rejected_images": ["b.png"]}]  # fmt: skip
    assert len({base, *(read(folder, {**row, **change}).id for change in changed)}) == 6


def test_repeated_ids_get_digits_of_their_content(folder):
    rows = [LAYOUTS["rlaif_v"], {**LAYOUTS["rlaif_v"], "rejected": "A cow."}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(folder / "rows.jsonl")
    total, repeated = survey(data)
    assert (total, "1" in repeated) == (2, True)
    ids = [to_pair(row, data, repeated=repeated).id for row in read_rows(data)]
    assert all(re.fullmatch("1-[0-9a-f]{8}", identity) for identity in ids)
    assert len(set(ids)) == 2


@pytest.mark.parametrize("name", ["chosen", "rejected", "prompt"])
def test_half_a_surrogate_pair_costs_its_row_only(folder, name):
    with pytest.raises(RecordError) as error:
        read(folder, {**LAYOUTS["trl text"], name: "A \ud83d dog."})
    assert error.value.reason == "bad_row"


def own_pair(folder, **changes):
    values = {"id": "7", "images": [read_image(folder / "a.png")], "prompt": ASKED, "chosen": DOG, "rejected": CAT,
              "method": "bdhs", "rejected_images": [read_image(folder / "b.png")], "answer": "A dog.",
              "facts": {"objects": ["dog"]}, "margin": 0.5, "meta": {"seed": 3}}  # fmt: skip
    return Pair(**{**values, **changes})


def write_own(folder, *pairs):
    (folder / "own").mkdir(exist_ok=True)
    table = pa.Table.from_pylist([pair.to_row() for pair in pairs], schema=Pair.features().arrow_schema)
    pq.write_table(table, folder / "own" / "pairs.parquet")
    return DataConfig(folder / "own")


def test_own_rows_come_back_whole(folder):
    pair = own_pair(folder)
    data = write_own(folder, pair)
    assert [to_pair(row, data) for row in read_rows(data)] == [pair]


def test_nulls_of_own_columns(folder):
    """Another tool may write nulls where we write empty values; pictures, facts and meta are then empty."""
    row = own_pair(folder).to_row()
    empty = {"rejected_images": None, "facts": None, "answer": None, "margin": None}
    pair = read(folder, {**row, **empty})
    assert (pair.rejected_images, pair.facts, pair.answer, pair.margin) == ([], {}, None, None)
    pair.check()


def test_own_rows_without_meta_are_read_as_foreign_ones(folder):
    """TRL's columns with pictures embedded, as a Parquet export has them."""
    row = {name: value for name, value in own_pair(folder).to_row().items() if name not in ("meta", "method")}
    pair = read(folder, row)
    assert (pair.id, pair.chosen, pair.rejected, pair.method, pair.margin) == ("7", DOG, CAT, "imported", 0.5)
    assert pair.images[0]["bytes"] == (folder / "a.png").read_bytes()
    assert pair.facts == {"objects": ["dog"]}


@pytest.mark.parametrize("meta", ["[1]", "{", '"x"'])
def test_meta_that_is_no_object_costs_the_row(folder, meta):
    row = {**own_pair(folder).to_row(), "meta": meta}
    with pytest.raises(RecordError, match="`meta` is a JSON object") as error:
        read(folder, row)
    assert error.value.reason == "bad_meta"


def test_a_stage_that_reads_pairs(folder):
    rows = [
        LAYOUTS["trl text"],
        {**LAYOUTS["rlaif_v"], "idx": 2},
        {**LAYOUTS["trl text"], "id": "3", "rejected": None},
        {**LAYOUTS["trl text"], "id": "4", "image": "gone.png"},
        {**LAYOUTS["trl text"], "id": "5", "rejected": "a dog"},
        {**LAYOUTS["trl text"], "id": "6", "chosen": "drop me"},
        LAYOUTS["trl text"],
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"id": "cut\n')
    seen = []

    def process(block):
        seen.extend(type(row) for row in block)
        return [Dropped("asked") if message_text(row.chosen) == "drop me" else [row] for row in block]

    manifest = store.run_stage("copy", DataConfig(folder / "rows.jsonl"), process, output=OutputConfig(folder / "out"),
                               record=Pair, settings={}, seed=0, reads=Pair)  # fmt: skip
    assert set(seen) == {Pair}
    assert manifest.rows_in == 8 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.dropped == {"asked": 1, "bad_json": 1, "duplicate": 1, "identical_answers": 1, "missing_column": 1,
                                "missing_image": 1}  # fmt: skip
    kept = list(read_records(folder / "out", Pair))
    assert [(pair.id.split("-")[0], pair.chosen, pair.rejected) for pair in kept] == [("1", DOG, CAT), ("2", DOG, CAT)]
