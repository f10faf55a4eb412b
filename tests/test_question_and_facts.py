"""What a config says of rows that lack it: `data.question`, `data.fact_columns`, the same for prompts, pairs and candidates."""

import json

import pytest

from prefalign.records import Pair, RecordError, message_text
from prefalign.sources import DataConfig, to_candidates, to_pair, to_prompt
from tests.published_sets import BAD, GOOD, PAIRED, QUESTION, ROWS, pictures, said

ASKED = "What does the slide show?"
TABLE = {"image": "a.png", "chosen": GOOD, "rejected": BAD, "label": "x", "count": 3, "other": None}


@pytest.fixture
def data(tmp_path):
    return DataConfig(pictures(tmp_path) / "rows.jsonl", question=ASKED, fact_columns=["label", "count", "other"])


def told(record):
    return message_text(record.prompt if isinstance(record, Pair) else record.messages)


@pytest.mark.parametrize("read", [to_prompt, to_pair, to_candidates])
@pytest.mark.parametrize(
    "asking",
    [
        {},
        {"question": ""},
        {"prompt": ""},
        {"instruction_prompt": "", "messages": []},
        {"chosen": [said("assistant", GOOD)]},
        {"question": QUESTION},
    ],
)
def test_a_row_that_asks_nothing_is_asked_the_configs_question(data, read, asking):
    row = {**TABLE, **asking, "source": "mine"}
    found = read(row, data)
    assert told(found) == (asking.get("question") or ASKED)
    columns = found.meta["columns"] if isinstance(found, Pair) else found.facts.pop("columns")
    assert (found.facts, columns) == ({"label": "x", "count": 3}, {"source": "mine"})
    assert found.images[0]["bytes"] == (data.path.parent / "a.png").read_bytes()
    assert read({**row, "image": "b.png"}, data).id != found.id


@pytest.mark.parametrize("name", PAIRED)
def test_no_layouts_own_question_is_replaced(data, name):
    """Nor its answers: those of `rlhf_v` are in `text`, those of `trl_implicit` and `stic` end whole conversations."""
    plain = DataConfig(data.path)
    for row in ROWS[name]:
        assert to_prompt(row, data) == to_prompt(row, plain)
        assert to_pair(row, data) == to_pair(row, plain)


def test_facts_of_the_row_and_of_its_columns(data):
    row = {**TABLE, "question": QUESTION, "facts": json.dumps({"count": 4, "kind": "cup"}), "category": "counting"}
    pair = to_pair(row, data)
    assert pair.facts == {"label": "x", "category": "counting", "count": 4, "kind": "cup"}
    assert "columns" not in pair.meta
    with pytest.raises(RecordError, match="needs `conversations`, `messages`, `prompt` or `question`"):
        to_pair(TABLE, DataConfig(data.path))
