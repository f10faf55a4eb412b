"""Data sets that a `dataset_info.json` names: their rows as LLaMA-Factory's users mean them, and what is refused by name."""

import json

import pytest

from prefalign import bundled
from prefalign.records import Candidates, Example, Pair, message_text
from prefalign.sources import DataConfig, files_of, read_rows, to_candidates, to_pair, to_prompt
from prefalign.store import OutputConfig, StoreError, read_records
from tests.published_sets import BAD, GOOD, QUESTION, pictures, said

ENTRIES = {
    "plain": {
        "file_name": "plain.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"},
    },
    "renamed": {
        "file_name": "renamed.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "talk", "chosen": "good", "rejected": "bad", "images": "photo", "system": "rules"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "U", "assistant_tag": "A"},
    },
    "alpaca": {
        "file_name": "alpaca.json",
        "ranking": True,
        "columns": {
            "prompt": "ask",
            "query": "more",
            "history": "past",
            "chosen": "good",
            "rejected": "bad",
            "images": "photo",
        },
    },
    "thumbs": {
        "file_name": "thumbs.json",
        "formatting": "openai",
        "columns": {"messages": "messages", "kto_tag": "label", "images": "images"},
    },
    "answers": {"file_name": "answers.json", "num_samples": 2},
}
RULES = "Answer in one sentence."
PLAIN = {"conversations": [{"from": "human", "value": f"<image>{QUESTION}"}], "chosen": {"from": "gpt", "value": GOOD},
         "rejected": {"from": "gpt", "value": BAD}, "images": ["a.png"]}  # fmt: skip
RENAMED = {"id": "9", "talk": [{"who": "U", "what": f"<image>{QUESTION}"}], "good": {"who": "A", "what": GOOD},
           "bad": {"who": "A", "what": BAD}, "photo": "a.png", "rules": RULES, "source": "mine", "image": "b.png"}  # fmt: skip
ALPACA = {"ask": "Look at the picture.", "more": QUESTION, "past": [["Hello?", "Hello."]], "good": GOOD, "bad": BAD,
          "photo": ["a.png"]}  # fmt: skip
THUMBS = [{"messages": [said("user", f"<image>{QUESTION}"), said("assistant", text)], "label": text == GOOD, "images": ["a.png"]}
          for text in (GOOD, BAD)]  # fmt: skip
ANSWERS = [{"instruction": f"{QUESTION} {n}", "input": "", "output": GOOD, "images": ["a.png"]} for n in range(3)]


@pytest.fixture
def folder(tmp_path):
    pictures(tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps(ENTRIES))
    (tmp_path / "plain.json").write_text(json.dumps([PLAIN]))
    (tmp_path / "renamed.jsonl").write_text(json.dumps(RENAMED) + "\n")
    (tmp_path / "alpaca.json").write_text(json.dumps([ALPACA]))
    (tmp_path / "thumbs.json").write_text(json.dumps(THUMBS))
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    return tmp_path


def read(folder, name, how, **settings):
    data = DataConfig(folder / f"dataset_info.json@{name}", **settings)
    assert files_of(data) == [folder / ENTRIES[name]["file_name"]]
    return [how(row, data) for row in read_rows(data)]


def test_a_described_pair_is_that_of_the_file(folder):
    data = DataConfig(folder / "plain.json")
    [known] = [to_pair(row, data) for row in read_rows(data)]
    assert read(folder, "plain", to_pair) == [known]
    [pair] = read(folder, "renamed", to_pair)
    assert (pair.chosen, pair.rejected, pair.images) == (known.chosen, known.rejected, known.images)
    assert pair.images[0]["bytes"] == (folder / "a.png").read_bytes()
    assert [turn["role"] for turn in pair.prompt] == ["system", "user"]
    assert (message_text(pair.prompt[:1]), pair.prompt[1:]) == (RULES, known.prompt)
    assert pair.id == "9"
    # a column that the description does not name is no picture, whatever it is called
    assert pair.meta["columns"] == {"source": "mine", "undeclared": {"image": "b.png"}}
    (folder / "renamed.jsonl").write_text(json.dumps({**RENAMED, "photo": "b.png"}))
    assert read(folder, "renamed", to_pair)[0].images[0]["bytes"] == (folder / "b.png").read_bytes()


def test_instructions_are_put_together_as_they_are_there(folder):
    [pair] = read(folder, "alpaca", to_pair)
    pair.check()
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "user"]
    assert message_text(pair.prompt) == f"Hello?\nHello.\nLook at the picture.\n{QUESTION}"
    assert (message_text(pair.chosen), message_text(pair.rejected), len(pair.images)) == (GOOD, BAD, 1)
    prompts = read(folder, "answers", to_prompt)
    assert [message_text(prompt.messages) for prompt in prompts] == [f"{QUESTION} 0", f"{QUESTION} 1"]  # num_samples
    assert {prompt.answer for prompt in prompts} == {GOOD}
    assert all(not prompt.images for prompt in prompts)  # no column of pictures is declared
    (folder / "answers.json").write_text(json.dumps([{**ANSWERS[0], "kto_tag": False}]))
    [prompt] = read(folder, "answers", to_prompt)  # nor one of thumbs
    assert (prompt.answer, prompt.facts["columns"]["undeclared"]["kto_tag"]) == (GOOD, False)
    assert len(read(folder, "answers", to_prompt, limit=1)) == 1


def test_thumbs_are_candidates(folder):
    up, down = read(folder, "thumbs", to_candidates)
    assert [row.responses for row in (up, down)] == [
        [{"text": GOOD, "scores": {"label": 1.0}}],
        [{"text": BAD, "scores": {"label": 0.0}}],
    ]
    assert up.images[0]["bytes"] == (folder / "a.png").read_bytes()


def run(folder, name, output, *, record=Pair, **settings):
    stage = bundled.load_stage("import_published")
    data = DataConfig(folder / f"dataset_info.json@{name}")
    manifest = stage.main(stage.Config(data, OutputConfig(folder / output), **settings))
    return manifest, list(read_records(folder / output, record))


def test_described_sets_are_imported(folder):
    tool = {**RENAMED, "id": "tool", "talk": [{"who": "observation", "what": "{}"}]}
    lacking = {"id": "x", "speech": []}
    (folder / "renamed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (RENAMED, tool, lacking)) + "{")
    manifest, [pair] = run(folder, "renamed", "pairs")
    assert manifest.dropped == {"bad_json": 1, "bad_messages": 1, "missing_column": 1}
    assert (pair.meta["layout"], message_text(pair.rejected)) == ("sharegpt", BAD)
    told = (folder / "pairs/quarantine/00000.jsonl").read_text()
    assert "a turn of renamed has 'who' (U, A, system) and 'what' with a text, as dataset_info.json says" in told
    assert "renamed has its messages in the column 'talk', as dataset_info.json says; this row has id, speech." in told
    assert [len(run(folder, "thumbs", "thumbs", record=Candidates, produce="candidates")[1])] == [2]
    assert len(run(folder, "answers", "answers", record=Example, produce="examples")[1]) == 2
    changed = {**ENTRIES, "renamed": {**ENTRIES["renamed"], "num_samples": 1}}
    (folder / "dataset_info.json").write_text(json.dumps(changed))
    with pytest.raises(StoreError, match="another config .*data_sha256"):
        run(folder, "renamed", "pairs")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"script_url": "my_set"}, "script_url is 'my_set', a loading script, and no code that comes with data is run here"),
        ({"ms_hub_url": "a/b"}, "ms_hub_url is 'a/b', a data set of ModelScope, which is not asked. Save the rows"),
        ({"cloud_file_name": "s3://x"}, "cloud_file_name is 's3://x', a file in cloud storage"),
        ({"formatting": "sharegpt"}, "says neither `file_name` nor `hf_hub_url`, so there are no rows"),
        ({"file_name": "x.json", "ranking": True}, "ranking is true, and `columns` does not say which one is chosen and w"),
        ({"file_name": "x.json", "rankng": True}, "unknown key 'rankng'; did you mean 'ranking'?"),
        ({"file_name": "x.json", "columns": {"image": "photo"}}, "columns: unknown key 'image'; did you mean 'images'?"),
        ({"file_name": "x.json", "tags": {"role": "who"}}, "tags: unknown key 'role'; did you mean 'role_tag'?"),
        ({"file_name": "x.json", "columns": []}, None),
        ({"file_name": "x.json", "columns": "images"}, "columns is a str, not an object"),
        ({"file_name": "x.json", "formatting": "share"}, "formatting is 'share'; there are alpaca, sharegpt and openai"),
        ({"file_name": "x.json", "columns": {"videos": "clip"}}, "columns.videos is 'clip', and only pictures are read here"),
        ({"file_name": "x.json", "hf_hub_url": None}, None),
        ({"file_name": "x.json", "hf_hub_url": "", "num_samples": None}, None),
        ({"file_name": 7}, "file_name is 7, not a text"),
        ({"hf_hub_url": ["a/b"]}, r"hf_hub_url is \['a/b'\], not a text"),
        ({"hf_hub_url": "a/b", "split": 1}, "split is 1, not a text"),
        ({"file_name": "x.json", "columns": {"prompt": ["a"]}}, r"columns: prompt is \['a'\], not a text"),
        ({"file_name": "x.json", "tags": {"role_tag": 1}}, "tags: role_tag is 1, not a text"),
        ({"file_name": "x.json", "num_samples": "10"}, "num_samples is '10', and it is how many of the first rows are used"),
        ({"file_name": "x.json", "num_samples": -3}, "num_samples is -3, and it is how many"),
        ({"file_name": "x.json", "ranking": "false"}, "ranking is 'false', not true or false"),
        ({"hf_hub_url": "a/b", "folder": "c"}, "folder is 'c', and folders of a repository on the Hub are not told apart"),
    ],
)  # fmt: skip
def test_descriptions_that_cannot_be_followed(folder, entry, message):
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    (folder / "x.json").write_text("[{}]")
    data = DataConfig(folder / "dataset_info.json@mine")
    if message is None:
        assert files_of(data) == [folder / "x.json"]
        return
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        files_of(data)
    assert f"{folder / 'dataset_info.json'}, mine" in str(error.value)


def test_a_folder_may_have_an_at_in_its_name(folder):
    home = folder / "user@host"
    home.mkdir()
    for name in ("dataset_info.json", "plain.json", "a.png"):
        (folder / name).rename(home / name)
    assert len(read(home, "plain", to_pair)) == 1


def test_a_name_that_is_not_there(folder):
    with pytest.raises(
        ValueError, match=r"names no data set 'plian'; did you mean 'plain'\? Give .*@NAME with one of alpaca, ans"
    ):
        files_of(DataConfig(folder / "dataset_info.json@plian"))
    with pytest.raises(
        ValueError, match="names several data sets, and `data.path` none of them.* with one of alpaca, answers"
    ):
        files_of(DataConfig(folder / "dataset_info.json"))
    with pytest.raises(
        ValueError, match="no dataset_info.json at .*gone/dataset_info.json. Give `data.path` as folder/"
    ):
        files_of(DataConfig(folder / "gone/dataset_info.json@plain"))
    with pytest.raises(
        ValueError, match="data.layout is 'trl', and dataset_info.json says itself what the columns mean"
    ):
        files_of(DataConfig(folder / "dataset_info.json@plain", layout="trl"))
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="dataset_info.json is not complete JSON"):
        files_of(DataConfig(folder / "dataset_info.json@plain"))
    (folder / "dataset_info.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match="dataset_info.json is not complete JSON"):
        files_of(DataConfig(folder / "dataset_info.json@plain"))
    (folder / "dataset_info.json").write_text("[]")
    with pytest.raises(ValueError, match="must map names to data sets, got a list"):
        files_of(DataConfig(folder / "dataset_info.json@plain"))


def test_a_folder_of_descriptions_says_how_to_name_one(folder):
    (folder / "renamed.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"holds no \.parquet or \.jsonl rows.*dataset_info\.json@NAME reads what dataset_info.json n"
    ):
        files_of(DataConfig(folder))
