"""The readers of published layouts: what each row says, and what a row of the wrong layout is counted as."""

import json
import math
import re
from pathlib import Path

import pytest

from prefalign.images import ImageError
from prefalign.records import RecordError, message_text, placeholder_count
from prefalign.sources import LAYOUTS, DataConfig, files_of, read_rows, to_candidates, to_pair, to_prompt
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


def spoken(*turns):
    return [said("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(turns)]


FIRST, OTHER, MORE = "It is red.", "It is green.", "And how many?"
SHARED = {
    "trl": {"prompt": spoken(QUESTION), "chosen": spoken(QUESTION, FIRST, MORE, GOOD)[1:],
            "rejected": spoken(QUESTION, FIRST, MORE, BAD)[1:]},
    "trl, whole conversations beside the prompt": {"prompt": QUESTION, "chosen": spoken(QUESTION, FIRST, MORE, GOOD),
                                                   "rejected": spoken(f"<image>\n{QUESTION} ", FIRST, MORE, BAD)},
    "trl, one side from the prompt on": {"prompt": spoken(QUESTION), "chosen": spoken(QUESTION, FIRST, MORE, GOOD),
                                         "rejected": spoken(QUESTION, FIRST, MORE, BAD)[1:]},
    "trl_implicit": {"chosen": spoken(QUESTION, FIRST, MORE, GOOD), "rejected": spoken(QUESTION, FIRST, MORE, BAD)},
    "povid": {"conversations": talk(f"<image>\n{QUESTION}", FIRST, MORE, GOOD),
              "rejected_conversations": talk(f"<image>\n{QUESTION}", FIRST, MORE, BAD)},
    "ms_swift": {"messages": spoken(f"<image>{QUESTION}", FIRST, MORE, GOOD),
                 "rejected_messages": spoken(f"<image>{QUESTION}", FIRST, MORE, BAD)},
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_turns_that_both_sides_share_are_the_prompt(folder, name):
    row = {"image": "a.png", **SHARED[name]}
    pair = to_pair(row, data(folder))
    pair.check()
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "user"]
    assert message_text(pair.prompt).split("\n")[-3:] == [QUESTION, FIRST, MORE]
    assert (message_text(pair.chosen), message_text(pair.rejected)) == (GOOD, BAD)
    assert (prompt := to_prompt(row, data(folder))).answer == GOOD
    assert prompt.messages == pair.prompt == to_candidates(row, data(folder)).messages
    assert [answer["text"] for answer in to_candidates(row, data(folder)).responses] == [GOOD, BAD]
    swapped = to_pair({**row, "image": "b.png"}, data(folder))
    assert (swapped.prompt, swapped.images != pair.images) == (pair.prompt, True)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("what", [FIRST, MORE])
def test_answers_to_two_conversations_are_no_pair(folder, name, what):
    """The hallucination of a first turn, or another question: the last turns alone would be a pair of nothing."""
    row = {"image": "a.png", **SHARED[name]}
    rejected = next(column for column in row if column.startswith("rejected"))
    row[rejected] = json.loads(json.dumps(row[rejected]).replace(what, OTHER))
    for read in (to_pair, to_candidates):
        with pytest.raises(
            RecordError,
            match=rf"turn {2 if what == FIRST else 3} before the answer is not the same.*'{re.escape(what)}'"
            rf".*`rejected` \w+: '{OTHER}'. .*Cut the row at the first answer",
        ) as error:
            read(row, data(folder))
        assert error.value.reason == "different_prompts"
    assert to_prompt(row, data(folder)).answer == GOOD  # the chosen side is a conversation by itself


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": QUESTION, "chosen": SHARED["trl"]["chosen"], "rejected": BAD},
         "turn 2 .* of `chosen` assistant: 'It is red.', of `rejected` missing"),
        ({"prompt": QUESTION, "chosen": spoken("Why?", GOOD), "rejected": spoken("Why?", BAD)},
         f"turn 1 .* of the question user: '{re.escape(QUESTION)}', of `chosen` user: 'Why"),
        ({"messages": spoken(QUESTION, GOOD), "rejected_messages": spoken("Why?", BAD)}, "of `rejected` user: 'Why"),
        ({"prompt": spoken(QUESTION), "chosen": [said("system", "Be terse."), *spoken(QUESTION, GOOD)],
          "rejected": spoken(QUESTION, BAD)}, "of `chosen` system: 'Be terse.', of `rejected` user"),
    ],
)  # fmt: skip
def test_what_is_compared_before_the_last_turn(folder, row, message):
    with pytest.raises(RecordError, match=message) as error:
        to_pair({"image": "a.png", **row}, data(folder))
    assert error.value.reason == "different_prompts"


def test_an_answer_that_is_a_question(folder):
    with pytest.raises(
        RecordError, match="`rejected` ends with a user turn .'And how many.'., so it is no answer"
    ) as error:
        to_pair(
            {"image": "a.png", **SHARED["trl"], "rejected": [said("user", MORE)]},
            data(folder),
        )
    assert error.value.reason == "bad_messages"


def test_a_system_turn_counts_for_the_side_that_has_none(folder):
    row = {
        "images": ["a.png"],
        "messages": [said("system", "Be terse."), *spoken(QUESTION, GOOD)],
        "rejected_messages": spoken(QUESTION, BAD),
    }
    pair = to_pair(row, data(folder))
    assert [turn["role"] for turn in pair.prompt] == ["system", "user"]
    both = {"images": ["a.png"], "prompt": QUESTION, "chosen": row["messages"],
            "rejected": [said("system", "Be terse."), *spoken(QUESTION, BAD)]}  # fmt: skip
    assert to_pair(both, data(folder)).prompt == pair.prompt


def test_a_thumb_on_the_last_of_several_turns(folder):
    row = {"image": "a.png", "prompt": QUESTION, "completion": SHARED["trl"]["chosen"], "label": True}
    found = to_candidates(row, data(folder))
    assert message_text(found.messages) == f"{QUESTION}\n{FIRST}\n{MORE}"
    assert found.responses == [{"text": GOOD, "scores": {"label": 1.0}}]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"id": "7", "idx": 3, "question_id": "q9", "image": "a.png", "image_path": "coco/a.jpg", "question": QUESTION,
          "chosen": GOOD, "rejected": BAD, "method": "m", "system_prompt": 7, "answer": ["A"], "problem": "p", "category": 4},
         {"idx": 3, "question_id": "q9", "image_path": "coco/a.jpg", "system_prompt": 7, "answer": ["A"], "problem": "p",
          "category": 4}),
        ({"prompt": QUESTION, "image": "a.png", "chosen": GOOD, "chosen_response": "x", "rejected": BAD, "rejected_response": "y",
          "question": "Why?", "responses": ["one"]},
         {"chosen_response": "x", "rejected_response": "y", "question": "Why?", "responses": ["one"]}),
        ({"prompt": QUESTION, "chosen_images": ["a.png"], "images": ["b.png"], "chosen": GOOD, "rejected": BAD},
         {"images": ["b.png"]}),
    ],
)  # fmt: skip
def test_a_column_that_is_not_used_is_kept(folder, row, columns):
    pair = to_pair(row, data(folder))
    assert pair.meta["columns"] == columns
    assert pair.images[0]["bytes"] == (folder / "a.png").read_bytes()


def test_a_prompt_keeps_what_belongs_to_a_pair_alone(folder):
    row = {**ROWS["ms_swift"][0], "category": "counting", "method": "m"}
    kept = {"margin": 1.5, "category": "counting", "method": "m", "chat_template_kwargs": {"max_pixels": 1003520}}
    assert to_prompt(row, data(folder)).facts["columns"] == kept
    assert to_candidates(row, data(folder)).facts["columns"] == kept


@pytest.mark.parametrize(("given", "answer"), [(42, "42"), (0.5, "0.5"), ("42", "42")])
def test_answers_may_be_numbers(folder, given, answer):
    assert to_prompt({**ROWS["verl"][0], "answer": given}, data(folder)).answer == answer
    rule = {"style": "rule", "ground_truth": given}
    row = {
        "prompt": [said("user", f"<image>{QUESTION}")],
        "images": ["a.png"],
        "data_source": "geo",
        "reward_model": rule,
    }
    verl = to_prompt(row, data(folder))
    assert (verl.answer, verl.facts["columns"]) == (answer, {"data_source": "geo", "reward_model": rule})
    mia = to_pair({**ROWS["mia_dpo"][0], "gt": given, "answer": "x"}, data(folder))
    assert (mia.answer, mia.meta["columns"]) == (answer, {"answer": "x"})


def test_the_system_column_of_llama_factory_is_the_system_turn(folder):
    row = {**ROWS["sharegpt"][0], "system": "Be terse."}
    pair = to_pair(row, data(folder))
    assert pair.prompt[0] == {"role": "system", "content": [{"type": "text", "text": "Be terse."}]}
    assert (message_text(pair.chosen), "columns" in pair.meta) == (GOOD, False)
    plain = to_pair({**ROWS["trl"][0], "system": "Be terse."}, data(folder))  # no such column in TRL's rows
    assert plain.meta["columns"] == {"source": "mine", "system": "Be terse."}


def test_a_split_in_the_name_of_a_set(tmp_path):
    named = DataConfig(Path("hiyouga/geometry3k@train"))
    assert (named.path, named.split) == (Path("hiyouga/geometry3k"), "train")
    assert DataConfig(Path("hiyouga/geometry3k@test"), split="test") == DataConfig(
        Path("hiyouga/geometry3k"), split="test"
    )
    with pytest.raises(
        ValueError, match="path is a/b@test, which names the split 'test', and split is 'train': only one"
    ):
        DataConfig(Path("a/b@test"), split="train")
    (tmp_path / "b@test").write_text("")
    assert DataConfig(tmp_path / "b@test").split is None
    assert DataConfig(Path("data/rows@2.jsonl")).path == Path("data/rows@2.jsonl")


def test_the_folder_of_llama_factory_says_how_to_name_a_set(folder):
    (folder / "dataset_info.json").write_text(
        '{"mine": {"file_name": "mine.json", "ranking": true, "formatting": "sharegpt"}}'
    )
    (folder / "mine.json").write_text(json.dumps(ROWS["sharegpt"]))
    with pytest.raises(
        ValueError,
        match=r"Give the data file itself.*It has dataset_info.json, mine.json. .*dataset_info.json@NAME reads",
    ):
        files_of(DataConfig(folder))
    [row] = read_rows(DataConfig(folder / "mine.json"))
    assert message_text(to_pair(row, DataConfig(folder / "mine.json")).rejected) == BAD
