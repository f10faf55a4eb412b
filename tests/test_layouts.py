"""The readers of published layouts: what each row says, and what a row of the wrong layout is counted as."""

import json
import math

import pytest

from prefalign.images import ImageError
from prefalign.records import RecordError, message_text, placeholder_count
from prefalign.sources import LAYOUTS, DataConfig, to_candidates, to_pair, to_prompt
from prefalign.sources.layouts import recognised
from tests.published_sets import BAD, GOOD, PAIRED, QUESTION, ROWS, VICUNA, pictures, said, talk


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path)


def data(folder, layout="auto"):
    return DataConfig(folder / "rows.jsonl", layout=layout)


def test_every_layout_has_published_rows():
    assert set(ROWS) == set(LAYOUTS)


@pytest.mark.parametrize("name", ROWS)
def test_each_layout_is_told_from_its_columns(name):
    for row in ROWS[name]:
        assert recognised(row) == name


@pytest.mark.parametrize("layout", ["auto", "named"])
@pytest.mark.parametrize("name", PAIRED)
def test_each_paired_layout_gives_its_question_answers_and_picture(folder, name, layout):
    row = ROWS[name][0]
    pair = to_pair(row, data(folder, name if layout == "named" else "auto"))
    pair.check()
    assert message_text(pair.prompt).split("\n")[-1].strip().endswith(QUESTION)
    assert (message_text(pair.chosen), message_text(pair.rejected)) == (GOOD, BAD)
    assert pair.prompt[-1]["role"] == "user"
    assert pair.images[0]["bytes"] == (folder / "a.png").read_bytes()
    assert len(pair.images) == placeholder_count(pair.prompt) == (2 if name == "mia_dpo" else 1)
    assert pair.meta["layout"] == name
    swapped = to_pair(json.loads(json.dumps(row).replace("a.png", "b.png")), data(folder))
    assert swapped.images[0]["bytes"] == (folder / "b.png").read_bytes()
    assert swapped.id != pair.id or {"id", "idx"} & row.keys()


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("rlhf_v", {"ds_name": "RLHF-V", "image_path": "RLHF-V/a.jpg", "origin_dataset": "vqav2",
                    "origin_split": '{"model": "Muffin", "type": "detail description"}'}),
        ("rlaif_v", {"ds_name": "RLAIF-V", "origin_dataset": "COCO", "origin_split": "train", "image_path": "coco/a.jpg"}),
        ("stic", {"image_corruption": True, "hallu_prompt": ""}),
        ("mdpo", {"system": VICUNA}),
        ("llava_rlhf", {"hallucination": True}),
        ("ms_swift", {"chat_template_kwargs": {"max_pixels": 1003520}}),
        ("trl", {"source": "mine"}),
        ("povid", None),
    ],
)  # fmt: skip
def test_columns_without_a_field_survive(folder, name, columns):
    assert to_pair(ROWS[name][0], data(folder)).meta.get("columns") == columns


def test_a_column_that_is_no_json_survives_as_what_can_be_written(folder):
    row = {**ROWS["rlaif_v"][0], "score": math.nan, "thumbnail": b"abc", "sizes": (1, math.inf)}
    columns = to_pair(row, data(folder)).meta["columns"]
    assert (columns["score"], columns["thumbnail"], columns["sizes"]) == (None, "(3 bytes)", [1, None])


def test_the_preferred_output_is_the_one_that_people_named(folder):
    first, second = (to_pair(row, data(folder)) for row in ROWS["llava_rlhf"])
    assert message_text(first.chosen) == message_text(second.chosen) == GOOD
    assert first.answer == "A cup."  # the answer in the conversation is neither
    nested = {**ROWS["llava_rlhf"][0], "conversations": [ROWS["llava_rlhf"][0]["conversations"]]}
    assert to_pair(nested, data(folder)).prompt == first.prompt
    with pytest.raises(RecordError, match="`preference` says which output is better, 1 or 2, got '0'") as error:
        to_pair({**ROWS["llava_rlhf"][0], "preference": 0}, data(folder))
    assert error.value.reason == "bad_preference"
    with pytest.raises(RecordError, match="an output is a text or a turn with `value`"):
        to_pair({**ROWS["llava_rlhf"][0], "output_1": {"from": "llava"}}, data(folder))


@pytest.mark.parametrize("text", ['{"question": "x"', '{"chosen": "x"}', {"question": 7}])
def test_text_of_rlhf_v_that_is_not_its_json(folder, text):
    with pytest.raises(RecordError, match="`text` of an RLHF-V row") as error:
        to_pair({"image": "a.png", "text": text}, data(folder, "rlhf_v"))
    assert error.value.reason == "bad_text"


def test_a_plain_text_column_is_no_rlhf_v_row(folder):
    with pytest.raises(RecordError, match="a row needs `conversations`") as error:
        to_pair({"image": "a.png", "text": "hello"}, data(folder))
    assert error.value.reason == "missing_column"


def test_a_rendered_prompt_becomes_its_turns(folder):
    many = f"{VICUNA} USER: <image>\nWhat is it? ASSISTANT: A cup. USER: Which colour? ASSISTANT:"
    prompt = to_prompt({**ROWS["mdpo"][0], "prompt": many}, data(folder))
    assert [turn["role"] for turn in prompt.messages] == ["user", "assistant", "user"]
    assert message_text(prompt.messages) == "What is it?\nA cup.\nWhich colour?"
    plain = to_prompt({**ROWS["mdpo"][0], "prompt": QUESTION}, data(folder))
    assert message_text(plain.messages) == QUESTION
    assert "columns" not in plain.facts


def test_marks_of_several_pictures_stay_in_place(folder):
    pair = to_pair(ROWS["mia_dpo"][0], data(folder))
    assert [block["type"] for block in pair.prompt[0]["content"]] == ["text", "image", "text", "image", "text"]
    assert [image["bytes"] for image in pair.images] == [(folder / name).read_bytes() for name in ("a.png", "b.png")]
    assert pair.answer == GOOD


def test_another_picture_alone_makes_the_same_answer_the_rejected_one(folder):
    """ms-swift's rows of `rejected_images`: the answer is right of one picture and wrong of the other."""
    pair = to_pair(ROWS["ms_swift"][2], data(folder))
    pair.check()
    assert message_text(pair.chosen) == message_text(pair.rejected) == GOOD
    assert pair.images[0]["bytes"] == (folder / "a.png").read_bytes()
    assert pair.rejected_images[0]["bytes"] == (folder / "b.png").read_bytes()
    assert to_pair(ROWS["ms_swift"][0], data(folder)).margin == 1.5
    assert message_text(to_pair(ROWS["ms_swift"][1], data(folder)).rejected) == BAD


def test_graded_answers_are_candidates(folder):
    row = ROWS["vlfeedback"][0]
    found = to_candidates(row, data(folder))
    assert [answer["text"] for answer in found.responses] == [GOOD, BAD]
    assert [answer["generator"] for answer in found.responses] == ["gpt4_v", "qwen_vl_chat"]
    assert [answer["scores"] for answer in found.responses] == [
        {"helpfulness": 5.0, "ethical_considerations": 5.0, "visual_faithfulness": 4.0},
        {"helpfulness": 2.0, "ethical_considerations": None, "visual_faithfulness": 1.0},
    ]
    assert found.responses[1]["rationales"]["visual_faithfulness"] == "No vase."
    assert found.facts["columns"] == {"models": ["gpt4_v", "qwen_vl_chat"]}
    given = row["completions"]
    listed = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    assert to_candidates({**row, "completions": listed}, data(folder)) == found
    with pytest.raises(RecordError, match=r"vlfeedback holds 2 answer\(s\).*`produce: candidates`") as error:
        to_pair(row, data(folder))
    assert error.value.reason == "not_a_pair"
    with pytest.raises(RecordError, match="a completion needs `response`") as error:
        to_candidates({**row, "completions": [{"model": "x"}]}, data(folder))
    assert error.value.reason == "bad_responses"


def test_one_thumb_is_a_score(folder):
    up, down = (to_candidates(row, data(folder)) for row in ROWS["kto"])
    assert (up.responses, up.answer) == ([{"text": GOOD, "scores": {"label": 1.0}}], GOOD)
    assert (down.responses, down.answer) == ([{"text": BAD, "scores": {"label": 0.0}}], None)
    with pytest.raises(RecordError, match=r"kto holds 1 answer\(s\)"):
        to_pair(ROWS["kto"][0], data(folder))
    with pytest.raises(RecordError, match="`label` of an unpaired row is true or false, got 'good'") as error:
        to_candidates({**ROWS["kto"][0], "label": "good"}, data(folder))
    assert error.value.reason == "bad_label"


def test_two_answers_are_candidates_with_a_preference(folder):
    found = to_candidates(ROWS["rlaif_v"][0], data(folder))
    assert found.responses == [
        {"text": GOOD, "scores": {"preference": 1.0}},
        {"text": BAD, "scores": {"preference": 0.0}},
    ]
    with pytest.raises(RecordError, match="candidates need `responses`"):
        to_candidates(ROWS["verl"][0], data(folder))


def test_rows_of_one_answer_are_prompts(folder):
    assert to_prompt(ROWS["verl"][0], data(folder)).answer == GOOD
    llava = {"id": "1", "image": "a.png", "conversations": talk(f"<image>\n{QUESTION}", GOOD)}
    assert to_prompt(llava, data(folder)).answer == GOOD
    with pytest.raises(RecordError, match="this row has no `rejected`"):
        to_pair(llava, data(folder))


def test_a_row_of_another_layout_is_named(folder):
    with pytest.raises(RecordError, match="data.layout is povid.*lacks conversations and rejected_conversations.*as trl "
                                          "rows have.*Give data.layout trl") as error:  # fmt: skip
        to_pair(ROWS["trl"][0], data(folder, "povid"))
    assert error.value.reason == "wrong_layout"
    with pytest.raises(RecordError, match="this one lacks prompt and has answer, images, problem, as verl rows have"):
        to_pair(ROWS["verl"][0], data(folder, "trl"))
    with pytest.raises(ValueError, match="layout is 'llava', and no reader has that name.*auto, .*rlhf_v"):
        data(folder, "llava")


def test_a_layout_that_is_named_reads_ambiguous_rows_its_way(folder):
    """A row with the columns of two layouts: `auto` takes the first, a name the other."""
    row = {**ROWS["rlaif_v"][0], "prompt": "What colour?"}
    assert message_text(to_pair(row, data(folder)).prompt) == "What colour?"
    assert message_text(to_pair(row, data(folder, "rlaif_v")).prompt) == QUESTION


@pytest.mark.parametrize("name", ["mdpo", "mia_dpo", "vlfeedback", "mvc", "rlhf_v"])
def test_a_picture_that_is_not_there(folder, name):
    read = to_candidates if name == "vlfeedback" else to_pair
    with pytest.raises(ImageError, match="is not in") as error:
        read(json.loads(json.dumps(ROWS[name][0]).replace("a.png", "gone.png")), data(folder))
    assert error.value.reason == "missing_image"


def test_an_implicit_prompt_without_turns(folder):
    with pytest.raises(RecordError, match="or in `chosen` the turns up to the answer"):
        to_pair({"images": ["a.png"], "chosen": [said("assistant", GOOD)], "rejected": BAD}, data(folder))
