"""Publishing: uploads to a stand-in server and back, cards that parse and run, and what must be refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard, constants

from prefalign import hub
from prefalign.hub import publish, release_checks
from prefalign.hub.dataset_card import dataset_card, read_rows
from prefalign.hub.release_checks import CheckError
from prefalign.hub.staging import PublishError, kind_of, resolve_base, without_paths
from prefalign.hub.upload import check_login, upload
from prefalign.images import encode_png
from prefalign.manifest import read_manifest
from prefalign.records import Pair, assistant_message, user_message
from prefalign.store import OutputConfig, write_records
from tests.hub_folders import copy, save_adapter, save_evaluations, save_pairs, save_trained
from tests.stand_in_hub import TOKEN, StandInHub
from tests.tiny_vlms import picture


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return save_pairs(tmp_path_factory.mktemp("hub") / "pairs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llava, pairs):
    return save_trained(tmp_path_factory.mktemp("hub") / "aligned", tiny_llava, pairs)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, trained):
    return save_adapter(trained, tmp_path_factory.mktemp("hub") / "adapter", spread=1.0)


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    return save_evaluations(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def online(monkeypatch, tmp_path):
    """This process may talk to a stand-in and nothing else."""
    with StandInHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def python_block(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


UPLOADS = """
import json, sys
from prefalign.cli import main
for arguments in json.loads(sys.argv[1]):
    if main(arguments):
        sys.exit(1)
"""
DOWNLOADS = """
import json, sys
from huggingface_hub import snapshot_download
from datasets import load_dataset
for name, kind in (("full", "model"), ("adapter", "model"), ("pairs", "dataset")):
    snapshot_download("tester/" + name, repo_type=kind, local_dir=name)
answers = {}
for name in ("full", "adapter"):
    card = open(name + "/README.md", encoding="utf-8").read()
    scope = {}
    exec(card.split("```python\\n")[1].split("```")[0], scope)
    answers[name] = scope["answer"]
scope = {}
exec(open("pairs/README.md", encoding="utf-8").read().split("```python\\n")[1].split("```")[0], scope)
assert len(scope["pairs"]) == 5
rows = load_dataset("pairs", split="train")
answers["rows"] = [[row["id"], row["chosen"][0]["content"][0]["text"], row["images"][0].size] for row in rows]
print(json.dumps(answers))
"""


def test_uploads_come_back_equal_and_the_cards_examples_run(tmp_path, trained, adapter, pairs, evaluations):
    measured = ["--evaluation", str(evaluations / "after"), "--license", "mit"]
    commands = [
        ["publish", str(trained), "--to", "tester/full", *measured],
        ["publish", str(adapter), "--to", "tester/adapter", "--base-model", "tester/full", "--private"],
        ["publish", str(pairs), "--to", "tester/pairs"],
    ]
    with StandInHub() as server:
        environment = server.environment(tmp_path / "cache")
        call = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
        up = subprocess.run([sys.executable, "-c", UPLOADS, json.dumps(commands)], **call)
        assert up.returncode == 0, up.stderr
        assert up.stdout.count("published: ") == 3
        assert TOKEN not in up.stdout + up.stderr
        picture(0).save(tmp_path / "picture.jpg")
        down = subprocess.run([sys.executable, "-c", DOWNLOADS], **call)
        assert down.returncode == 0, down.stderr
        repositories = server.repositories
    full, lora, rows = (repositories[key] for key in
                        (("model", "tester/full"), ("model", "tester/adapter"), ("dataset", "tester/pairs")))  # fmt: skip
    assert (full.private, lora.private, rows.private) == (False, True, False)
    for repository, source, names in (
        (full, trained, ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json")),
        (lora, adapter, ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja")),
        (rows, pairs, ("data/train-00000.parquet", "data/train-00002.parquet", "manifest.json")),
    ):
        for name in names:
            assert repository.files[name] == (source / name).read_bytes(), name
    for name, repository in (("full", full), ("adapter", lora), ("pairs", rows)):
        for path, content in repository.files.items():
            assert (tmp_path / name / path).read_bytes() == content
    published = {**full.files, **lora.files, **rows.files}
    assert not [name for name in published if re.search(r"\.bin|\.pt$|checkpoint|quarantine|progress", name)]
    assert json.loads(lora.files["adapter_config.json"])["base_model_name_or_path"] == "tester/full"
    answers = json.loads(down.stdout.strip().splitlines()[-1])
    assert answers["full"] != answers["adapter"]
    assert answers["rows"][0] == ["row0", "a fox", [40, 48]]
    assert len(answers["rows"]) == 5
    card = ModelCard(lora.files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model, card.data.base_model_relation) == (
        "peft",
        "tester/full",
        "adapter",
    )
    dataset_card = DatasetCard(rows.files["README.md"].decode())
    assert dataset_card.data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    ]
    assert "| distinct pictures | 3 |" in dataset_card.content  # pictures 0, 0, 1, 1, 2
    assert "| words in `chosen` | mean 2.8, from 2 to 3 |" in dataset_card.content  # (2 + 4 * 3) / 5
    assert "| margin | mean 2.000, from 0.000 to 4.000 |" in dataset_card.content


@pytest.mark.usefixtures("warm_executable")
def test_dry_run_writes_a_complete_folder_and_uploads_nothing(
    tmp_path, capsys, trained, pairs, evaluations, tiny_llava
):
    arguments = {"output": tmp_path / "out", "dry_run": True, "evaluation": evaluations / "after", "pairs": pairs,
                 "baseline_evaluation": evaluations / "before", "license": "mit", "datasets": ["me/pairs"]}  # fmt: skip
    written = hub.publish_model(trained, "me/x", **arguments)
    assert sorted(file.name for file in written.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "pairs_manifest.json", "prefalign_config.yaml", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "left out: checkpoint-4/, rows.json, trainer_state.json, training_args.bin" in printed
    assert "nothing uploaded" in printed
    config = yaml.safe_load((written / "prefalign_config.yaml").read_text())
    assert config == {"model": {"model_name_or_path": "llava"}, "pairs": "pairs", "trainer": {"beta": 0.2}}
    assert release_checks.verify(written, base=str(tiny_llava))["changed_tensors"] == 1

    card = ModelCard.load(written / "README.md")
    data = card.data
    assert (data.pipeline_tag, data.library_name, data.license) == ("image-text-to-text", "transformers", "mit")
    assert data.datasets == ["me/pairs"]
    assert {"trl", "dpo", "bdhs"} <= set(data.tags)
    assert data.base_model is None  # the base is a local folder
    assert [(result.metric_type, result.metric_value, result.metric_args["n"]) for result in data.eval_results] == [
        ("chair_i", 0.2, 120), ("recall", 0.5, 120),
    ]  # fmt: skip
    assert data.eval_results[0].metric_args["ci95"] == pytest.approx([0.16, 0.24])
    for line in (
        "a local checkpoint called `llava`, which is not on the Hub",
        "| `chair_i` | 120 | 0.300 [0.260, 0.340] | 0.200 [0.160, 0.240] | -0.100 [-0.150, -0.050], p 0.004 |",
        "| `patchy` | 9 | 0.700, INVALID: 5 % of the items are missing | 0.700, INVALID: 5 % of the items are missing | n/a |",
        "p: two-sided, Holm-corrected",
        "| `no_items` | 0 | n/a | n/a | n/a |",
        "| inputs dropped | none |",
        "| rows made | 5 |",
        "| seed | 3 |",
        "| updates | 4 |",
        "| pairs trained on | 4 of 5 (1 dropped: prompt longer than max_length) |",
        "Measured on scenes test_fair.",
        "| first and last logged loss | 0.6931, 0.5000 |",
        "beta: 0.2",
        "synthetic scenes world only",
        "- greedy answers",
    ):
        assert line in card.content, line
    # written again by the same command; a folder that is not ours stays
    assert hub.publish_dataset(pairs, "me/pairs", output=tmp_path / "out", dry_run=True) == tmp_path / "out"
    assert len(load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))) == 5
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(PublishError, match="was not written by a dry run"):
        hub.publish_dataset(pairs, "me/pairs", output=tmp_path / "out", dry_run=True)


def test_broken_processor_is_refused_by_the_fresh_process(tmp_path, trained):
    broken = copy(trained, tmp_path / "broken")
    (broken / "processor_config.json").unlink()
    with pytest.raises(
        CheckError, match=r"failed in a fresh process: .*processor.*Save the processor beside the model"
    ):
        hub.publish_model(broken, "me/x", dry_run=True)
    assert not (tmp_path / "broken-publish").exists()


def test_folders_that_are_refused(tmp_path, trained, adapter):
    with pytest.raises(PublishError, match="no folder at"):
        kind_of(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PublishError, match="neither model weights .* nor pairs .* but nothing"):
        kind_of(tmp_path / "empty")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "prefalign_config.yaml").write_text("pairs: p")
    with pytest.raises(PublishError, match="has not saved its model. Start the same command again"):
        kind_of(tmp_path / "stopped")
    torch.save({}, tmp_path / "empty" / "pytorch_model.bin")
    with pytest.raises(PublishError, match=r"only pickle files \(pytorch_model.bin\), which run code"):
        kind_of(tmp_path / "empty")
    both = copy(trained, tmp_path / "both")
    shutil.copyfile(adapter / "adapter_model.safetensors", both / "adapter_model.safetensors")
    with pytest.raises(PublishError, match="an adapter and full weights"):
        kind_of(both)
    damaged = copy(trained, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    with pytest.raises(PublishError, match="config.json is damaged"):
        hub.publish_model(damaged, "me/x", dry_run=True)


def test_pairs_that_are_refused(tmp_path, pairs, trained):
    with pytest.raises(PublishError, match="holds pairs, not a model"):
        hub.publish_model(pairs, "me/x", dry_run=True)
    unfinished = copy(pairs, tmp_path / "unfinished")
    (unfinished / "manifest.json").unlink()
    with pytest.raises(PublishError, match="no manifest of a finished stage"):
        hub.publish_dataset(unfinished, "me/x", dry_run=True)
    with pytest.raises(PublishError, match=r"has no manifest.json"):
        hub.publish_model(trained, "me/x", dry_run=True, pairs=unfinished)
    short = copy(pairs, tmp_path / "short")
    (short / "data" / "train-00001.parquet").unlink()
    with pytest.raises(PublishError, match=r"hold 3 rows, but manifest.json says 5"):
        hub.publish_dataset(short, "me/x", dry_run=True)
    other = copy(pairs, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "seed": 4}))
    with pytest.raises(PublishError, match="is not what this model was trained on"):
        hub.publish_model(trained, "me/x", dry_run=True, pairs=other)


def test_evaluations_that_are_refused(tmp_path, trained, evaluations):
    with pytest.raises(PublishError, match="no results.json"):
        hub.publish_model(trained, "me/x", dry_run=True, evaluation=tmp_path)
    (tmp_path / "results.json").write_text('{"metrics": {}}')
    with pytest.raises(PublishError, match="holds no metrics"):
        hub.publish_model(trained, "me/x", dry_run=True, evaluation=tmp_path)
    with pytest.raises(PublishError, match="--baseline-evaluation without --evaluation"):
        hub.publish_model(trained, "me/x", dry_run=True, baseline_evaluation=evaluations / "before")
    with pytest.raises(PublishError, match="its fingerprint is abc, that of the folder 123.*`dtype: auto`"):
        publish._check_same_weights({"fingerprint": "abc", "settings": {}}, {"fingerprint": "123"})
    publish._check_same_weights({"fingerprint": ""}, {"fingerprint": "123"})
    weights = "0123456789abcdef"
    with pytest.raises(
        PublishError, match="same weights with another chat template, .* of the folder 0.*-bbbbbbbb.*as it is"
    ):
        publish._check_same_weights({"fingerprint": f"{weights}-aaaaaaaa"}, {"fingerprint": f"{weights}-bbbbbbbb"})


def test_wrong_usage_is_refused(trained, pairs, tmp_path):
    with pytest.raises(PublishError, match="OWNER/NAME"):
        hub.publish_model(trained, "just-a-name", dry_run=True)
    with pytest.raises(PublishError, match="--output is where a dry run writes"):
        hub.publish_model(trained, "me/x", output=tmp_path / "x")
    with pytest.raises(PublishError, match="--base-model 'nothing' is not a model on the Hub"):
        hub.publish_model(trained, "me/x", dry_run=True, base_model="nothing")
    from prefalign.cli import build_parser

    parsed = build_parser().parse_args(["publish", str(pairs), "--to", "me/x", "--dry-run", "--base-model", "a/b"])
    with pytest.raises(PublishError, match="--base-model describe a model"):
        hub.main(parsed)


def test_what_was_trained_from(tmp_path, trained, adapter):
    with pytest.raises(PublishError, match=r"folder of this machine \(aligned\).*--base-model OWNER/NAME"):
        resolve_base(adapter, "adapter", {}, None)
    named = resolve_base(adapter, "adapter", {}, "me/full")
    assert (named.hub_id, named.local) == ("me/full", trained)
    from_hub = resolve_base(trained, "full", {"model": {"model_name_or_path": "llava-hf/llava-1.5-7b-hf"}}, None)
    assert (from_hub.hub_id, from_hub.local) == ("llava-hf/llava-1.5-7b-hf", None)
    scenes = resolve_base(trained, "full", {"model": {"model_name_or_path": "scenes"}}, None)
    assert scenes.is_scenes
    assert scenes.hub_id is None
    assert "ships with prefalign" in scenes.label
    assert resolve_base(trained, "full", {}, None).label == "a base that was not recorded"


def test_a_relative_base_is_no_name_on_the_hub(tmp_path, monkeypatch):
    """`runs/sft` reads like OWNER/NAME. Published from anywhere, by a run that noted its base and by one that did not."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = {"model": {"model_name_or_path": "runs/sft"}}
    run = tmp_path / "project" / "runs" / "dpo"
    run.mkdir(parents=True)
    gone = resolve_base(run, "full", config, None)
    assert (gone.hub_id, gone.local) == (None, Path("runs/sft"))
    (run.parent / "sft").mkdir()
    found = resolve_base(run, "full", config, None)
    assert (found.hub_id, found.local) == (None, run.parent / "sft")
    assert "a local checkpoint called `sft`" in found.label
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "runs/sft"}))
    with pytest.raises(PublishError, match=r"folder of this machine \(sft\).*--base-model OWNER/NAME"):
        resolve_base(run, "adapter", config, None)
    named = resolve_base(run, "adapter", config, "me/sft")
    portable = without_paths({"base_model_name_or_path": "runs/sft", "pairs": "runs/sft"}, named)
    assert portable == {"base_model_name_or_path": "me/sft", "pairs": "runs/sft"}

    far = tmp_path / "far"  # moved away from its project: only its note knows
    far.mkdir()
    assert resolve_base(far, "full", config, None).hub_id == "runs/sft"
    (far / "base.json").write_text(json.dumps({"name": "runs/sft", "local": "/gone/runs/sft", "fingerprint": "a"}))
    noted = resolve_base(far, "full", config, None)
    assert (noted.hub_id, noted.local) == (None, Path("/gone/runs/sft"))
    (far / "base.json").write_text(json.dumps({"name": "runs/sft", "local": None, "fingerprint": "a"}))
    assert resolve_base(far, "full", config, None).hub_id == "runs/sft"
    with pytest.raises(PublishError, match="recorded as 'sft', which is no folder here and not the name of a model"):
        resolve_base(far, "full", {"model": {"model_name_or_path": "sft"}}, None)


def test_a_run_notes_where_its_base_was(tiny_llava):
    from prefalign.training.runs import base_file

    (text,) = base_file(str(tiny_llava), "abc", "12").values()
    assert json.loads(text) == {
        "name": str(tiny_llava),
        "local": str(tiny_llava.resolve()),
        "fingerprint": "abc",
        "processor": "12",
        "changed": False,
    }
    (text,) = base_file("owner/name", "abc", "12").values()
    assert json.loads(text)["local"] is None


@pytest.mark.usefixtures("warm_executable")
def test_publishing_the_folder_one_stands_in(tmp_path, pairs, monkeypatch):
    monkeypatch.chdir(copy(pairs, tmp_path / "pairs"))
    assert hub.publish_dataset(Path("."), "me/pairs", dry_run=True) == tmp_path / "pairs-publish"
    assert (tmp_path / "pairs-publish" / "README.md").is_file()


def test_only_drawn_pictures_are_called_drawn(tmp_path):
    """Told from the rows' facts, not from a word in the settings."""
    scene = {"world": "scenes", "objects": [{"name": "star", "shape": "star", "colour": "red", "clear": True}]}
    photograph = {"objects": ["dog"], "captions": ["a dog by film scenes"]}

    def card(name, facts):
        rows = [
            Pair(id=f"{name}{n}", images=[encode_png(picture(n))], prompt=[user_message("what ?", images=1)],
                 chosen=[assistant_message("yes")], rejected=[assistant_message("no")], method="bdhs", facts=known)
            for n, known in enumerate(facts)
        ]  # fmt: skip
        settings = {"data": "film_scenes.jsonl"}
        write_records("bdhs", rows, output=OutputConfig(tmp_path / name), record=Pair, settings=settings, seed=0)
        statistics, schema = read_rows(sorted((tmp_path / name).glob("data/*.parquet")))
        manifest = read_manifest(tmp_path / name)
        return dataset_card("me/x", manifest=manifest, statistics=statistics, schema=schema, size=1, license=None)

    assert "All rows show drawn pictures of the embedded world" in card("drawn", [scene, scene])
    assert "1 rows show drawn pictures of the embedded world" in card("mixed", [photograph, scene])
    assert "drawn" not in card("photographs", [photograph, {}]).split("## Licence")[1]


def test_the_config_for_files_measures_the_weights_as_they_are_published():
    from prefalign import bundled
    from prefalign.config import build, read_yaml

    values = read_yaml(bundled.find("recipes/evaluate_files"))
    assert build(bundled.load_stage("evaluate_model").Config, values).model.dtype == "auto"


def test_adapter_on_the_shipped_base_can_be_found_again(tmp_path, adapter):
    """Its config says `scenes`, which `prefalign` resolves anywhere, and the card's example names the function."""
    from prefalign.hub.model_card import model_card

    config = {"base_model_name_or_path": "/opt/env/prefalign/scenes/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = resolve_base(tmp_path, "adapter", {}, None)
    shipped = str(Path(hub.__file__).parent.parent / "scenes" / "base")
    assert without_paths({"base_model_name_or_path": shipped}, base) == {"base_model_name_or_path": "scenes"}
    card = model_card("me/x", base=base, adapter=True, method="DPO", license=None, datasets=[], config=None, data=None,
                      merge=None, trainer_state=None, evaluation=None, baseline=None, rows=None,
                      checked={"picture_effect": 0.5, "adapter_effect": 0.25, "text": "x"})  # fmt: skip
    assert "from_pretrained(base_checkpoint(), " in python_block(card)
    compile(python_block(card), "card", "exec")
    assert "nothing here shows that it is better than its base" in card
    assert "base_model:" not in card


@pytest.mark.parametrize(
    ("groups", "name"),
    [
        (["scene-0-test_fair-000001", "scene-0-test_adversarial-000001"], "scenes test_adversarial, test_fair"),
        (["COCO_1"], "chair, yesno from files"),
        (["COCO_1", "scene-0-test_fair-000001"], "chair, yesno from files and scenes test_fair"),
    ],
)
def test_what_was_measured_on_is_read_from_the_items(tmp_path, groups, name):
    (tmp_path / "results.json").write_text('{"metrics": {"x": {}}, "counts": {"chair": {}, "yesno": {}}}')
    assert publish._read_results(tmp_path)["test_set"] == "pictures that the evaluation did not name"
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps({"group": group}) for group in groups))
    assert publish._read_results(tmp_path)["test_set"] == name


def test_before_and_after_measured_differently_is_said(evaluations):
    from prefalign.hub.model_card import _evaluation_table

    after, before = (publish._read_results(evaluations / name) for name in ("after", "before"))
    before["settings"]["max_new_tokens"] = 8
    before["metrics"]["recall"]["n"] = 60
    notes = _evaluation_table(after, before)["notes"]
    assert "Before and after were NOT measured alike; these settings differ: max_new_tokens." in notes
    assert "Before and after cover different numbers of items in: recall." in notes


def test_login_problems(online, monkeypatch):
    check_login()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PublishError, match=r"does not accept the token \(401, the login\)") as error:
        check_login()
    assert "hf_wrong" not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="no Hugging Face token: set HF_TOKEN or run `hf auth login`"):
        check_login()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set"):
        check_login()


def test_server_that_is_down(online, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PublishError, match=r"cannot reach the Hub at http://127.0.0.1:9 \(ConnectError\)"):
        check_login()


def test_upload_problems(online, tmp_path):
    (tmp_path / "README.md").write_text("# x\n")
    arguments = {"repo_type": "model", "private": False, "replace": ()}
    with pytest.raises(PublishError, match=r"may not write to somebody/x \(403\)"):
        upload(tmp_path, "somebody/x", **arguments)
    online.commit_status = 409
    with pytest.raises(PublishError, match=r"tester/x changed while this was being pushed \(409\)"):
        upload(tmp_path, "tester/x", **arguments)
    online.commit_status = 418
    with pytest.raises(PublishError, match=r"the Hub answered 418 for tester/x \(told to refuse\)"):
        upload(tmp_path, "tester/x", **arguments)
    online.commit_status = 200
    (tmp_path / "README.md").write_text("---\nlicense: nonsense\n---\n# x\n")
    with pytest.raises(PublishError, match='"license" must be one of') as error:
        upload(tmp_path, "tester/x", **arguments)
    assert TOKEN not in str(error.value)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    assert "tester/x/commit/" in upload(tmp_path, "tester/x", **arguments)
    with pytest.raises(PublishError, match="tester/x exists and is public"):
        upload(tmp_path, "tester/x", repo_type="model", private=True, replace=())


def test_second_upload_removes_shards_that_are_gone(online, tmp_path):
    """A shard left from an earlier push would be read as rows of this one."""
    (tmp_path / "data").mkdir()
    for name in ("train-00000.parquet", "train-00001.parquet"):
        (tmp_path / "data" / name).write_bytes(name.encode())
    upload(tmp_path, "tester/rows", repo_type="dataset", private=False, replace=publish.SHARDS)
    online.repositories["dataset", "tester/rows"].files["LICENSE"] = b"mine"
    (tmp_path / "data" / "train-00001.parquet").unlink()
    upload(tmp_path, "tester/rows", repo_type="dataset", private=False, replace=publish.SHARDS)
    assert set(online.repositories["dataset", "tester/rows"].files) == {"data/train-00000.parquet", "LICENSE"}
