"""Publishing: uploads to a stand-in server and back, cards that parse and run, and everything that must be refused."""

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
from safetensors.torch import load_file, save_file

from prefalign import hub, release_checks
from prefalign.images import encode_png
from prefalign.records import Pair, assistant_message, user_message
from prefalign.release_checks import CheckError
from prefalign.staging import PublishError, kind_of, resolve_base
from prefalign.store import OutputConfig, write_records
from prefalign.upload import check_login, upload
from tests.stand_in_hub import TOKEN, StandInHub
from tests.tiny_vlms import picture

SECRET = "hf_" + "Ab1" * 9


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "pairs"
    rows = [
        Pair(
            id=f"row{n}",
            images=[encode_png(picture(n // 2), "p.png")],
            prompt=[user_message("what is in the image ?", images=1)],
            chosen=[assistant_message("a red square" if n else "a fox")],
            rejected=[assistant_message("a lazy dog")],
            method="bdhs",
            meta={"generator": "scenes-base", "seed": 3},
            margin=float(n),
        )
        for n in range(5)
    ]
    write_records("bdhs", rows, output=OutputConfig(folder, block_size=2), record=Pair, settings={"share": 0.9}, seed=3)
    (folder / "quarantine").mkdir()
    (folder / "quarantine" / "00000.jsonl").write_text("{}\n")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llava, pairs):
    """A full-weight run: weights other than the base's, and all the files that must not be published."""
    folder = tmp_path_factory.mktemp("hub") / "aligned"
    shutil.copytree(tiny_llava, folder)
    weights = load_file(folder / "model.safetensors")
    weights["language_model.lm_head.weight" if "language_model.lm_head.weight" in weights else "lm_head.weight"] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model": {"model_name_or_path": str(tiny_llava)}, "pairs": str(pairs), "trainer": {"beta": 0.2}}
    (folder / "prefalign_config.yaml").write_text(yaml.safe_dump(config))
    shutil.copyfile(pairs / "manifest.json", folder / "pairs_manifest.json")
    log = [{"loss": 0.6931, "step": 1}, {"loss": 0.5, "rewards/accuracies": 0.75, "step": 4}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 2.0, "log_history": log}))
    (folder / "rows.json").write_text(
        json.dumps({"rows_in": 5, "rows_used": 4, "too_long": {"row2": 900}, "answers_cut": 0})
    )
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    (folder / "checkpoint-4").mkdir()
    torch.save({"state": 1}, folder / "checkpoint-4" / "optimizer.pt")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, trained):
    return save_adapter(trained, tmp_path_factory.mktemp("hub") / "adapter", spread=1.0)


def save_adapter(base: Path, folder: Path, *, spread: float) -> Path:
    """A LoRA on `base`; `spread` is the width of lora_B (0: as before training, a no-op)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_().mul_(spread)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for name, value in (("after", 0.2), ("before", 0.3)):
        metrics = {
            "chair_i": {"value": value, "ci95": [value - 0.04, value + 0.04], "n": 120},
            "recall": {"value": 0.5, "ci95": [0.4, 0.6], "n": 120},
            "no_items": {"value": float("nan"), "ci95": [float("nan"), float("nan")], "n": 0},
        }
        if name == "after":
            metrics["difference.chair_i"] = {"value": -0.1, "ci95": [-0.15, -0.05], "n": 120}
        results = {"model": f"/somewhere/else/{name}", "settings": {"test_set": "scenes test_fair"},
                   "metrics": metrics, "notes": ["greedy answers"]}  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(json.dumps(results))
    return folder


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


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


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
        "| `chair_i` | 120 | 0.300 [0.260, 0.340] | 0.200 [0.160, 0.240] | -0.100 [-0.150, -0.050] |",
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


def test_the_sample_picture_is_the_first_training_picture(trained, pairs, tmp_path):
    """Another picture gives another answer to the check: it is really shown."""
    drawn = release_checks.verify(trained)["picture_effect"]
    given = release_checks.verify(trained, picture=hub._first_picture(pairs, tmp_path))["picture_effect"]
    assert drawn != given
    assert (tmp_path / "picture.png").is_file()


def test_adapter_that_does_nothing_is_refused(tmp_path, trained, adapter):
    assert release_checks.verify(adapter, base=str(trained))["adapter_effect"] > 0.01
    untrained = save_adapter(trained, tmp_path / "untrained", spread=0.0)
    with pytest.raises(CheckError, match="the adapter is a no-op"):
        release_checks.verify(untrained, base=str(trained))


def change_weights(folder, name, change):
    weights = load_file(folder / "model.safetensors")
    changed = [key for key in weights if name in key]
    assert changed
    for key in changed:
        weights[key] = change(weights[key])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_model_that_cannot_see_is_refused(tmp_path, trained):
    blind = copy(trained, tmp_path / "blind")
    change_weights(blind, "multi_modal_projector", torch.zeros_like)
    with pytest.raises(CheckError, match="does not see pictures"):
        release_checks.verify(blind)


def test_broken_weights_are_refused(tmp_path, trained):
    broken = copy(trained, tmp_path / "broken")
    change_weights(broken, "lm_head", lambda weight: weight * float("nan"))
    with pytest.raises(CheckError, match="NaN or infinite logits"):
        release_checks.verify(broken)


def test_weights_of_the_base_are_refused(trained):
    with pytest.raises(CheckError, match=r"all \d+ weight tensors are those of the base"):
        release_checks.verify(trained, base=str(trained))


def test_broken_processor_is_refused_by_the_fresh_process(tmp_path, trained):
    broken = copy(trained, tmp_path / "broken")
    (broken / "processor_config.json").unlink()
    with pytest.raises(
        CheckError, match=r"failed in a fresh process: .*processor.*Save the processor beside the model"
    ):
        hub.publish_model(broken, "me/x", dry_run=True)
    assert not (tmp_path / "broken-publish").exists()


def test_processor_without_chat_template_is_refused(tmp_path, trained):
    broken = copy(trained, tmp_path / "broken")
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(CheckError, match="no chat template"):
        release_checks.verify(broken)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f'{{"token": "{SECRET}"}}', "Hugging Face token"),
        ("judge_key: sk-proj-" + "a1B2" * 6, "API key"),
        ("AKIA" + "ABCD1234" * 2, "AWS key"),
        ("aws_secret_access_key = " + "a/B+" * 10, "AWS secret"),
        ("ghp_" + "a1B2" * 9, "GitHub token"),
        ("Authorization: Bearer " + "abcd1234", "authorization header"),
        ("-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("WANDB_API_KEY: " + "0123456789abcdef" * 2, "secret"),
        ("see /home/anna/notes.txt", "absolute path"),
        ("see /Users/anna/x", "absolute path"),
        ("in /root/cache/x", "absolute path"),
        ("file:///tmp/run/x.png", "absolute path"),
        (r"C:\Users\anna\x", "absolute path"),
        (r'"C:\\Users\\anna"', "absolute path"),
    ],
)
def test_scan_finds(text, kind):
    findings = release_checks.scan_text(text)
    assert [finding.startswith(kind) for finding in findings].count(True) >= 1
    assert SECRET not in "".join(findings)


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/home/anna/x.png",
        "the ratio a/tmp/b, ./home/x and ~/data",
        '"pad_token": "<pad>", "eos_token": "<|endoftext|>", "token": null',
        r'"{{ \'A:\\n\' + message }}"',
        "hf_hub and sk-learn, AKIA",
    ],
)
def test_scan_lets_pass(text):
    assert release_checks.scan_text(text) == []


def test_secret_in_a_config_is_refused_and_masked(tmp_path, trained):
    leaking = copy(trained, tmp_path / "leaking")
    with (leaking / "prefalign_config.yaml").open("a") as stream:
        stream.write(f"judge: {{key: {SECRET}}}\n")
    masked = r"prefalign_config.yaml line \d+: Hugging Face token hf_A... \(30 characters\)"
    with pytest.raises(CheckError, match=masked) as error:
        hub.publish_model(leaking, "me/x", dry_run=True)
    assert SECRET not in str(error.value)
    assert "replace any key" in str(error.value)


def test_absolute_path_inside_text_is_refused(tmp_path, trained):
    leaking = copy(trained, tmp_path / "leaking")
    with (leaking / "prefalign_config.yaml").open("a") as stream:
        stream.write("comment: rows are from /home/anna/rows.jsonl\n")
    with pytest.raises(CheckError, match=r"prefalign_config.yaml line \d+: absolute path /home/anna/r\.\.\."):
        hub.publish_model(leaking, "me/x", dry_run=True)


def test_secret_and_path_in_rows_are_refused(tmp_path):
    row = Pair(id="row0", images=[encode_png(picture(0))], prompt=[user_message("what ?", images=1)],
               chosen=[assistant_message(f"my key is {SECRET}")], rejected=[assistant_message("a dog in /home/of/dogs")],
               method="bdhs", meta={"source": "/home/anna/rows.jsonl"})  # fmt: skip
    write_records("bdhs", [row], output=OutputConfig(tmp_path / "pairs"), record=Pair, settings={}, seed=0)
    with pytest.raises(
        CheckError, match=r"train-00000.parquet row row0, column chosen: Hugging Face token hf_A"
    ) as error:
        hub.publish_dataset(tmp_path / "pairs", "me/x", dry_run=True)
    assert "column meta: absolute path" in str(error.value)
    assert "column rejected" not in str(error.value)


def test_notes_of_an_evaluation_reach_the_scan(tmp_path):
    (tmp_path / "README.md").write_text("- judged with key " + SECRET)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckError, match=r"README.md line 1: Hugging Face token") as error:
        release_checks.refuse(release_checks.scan_folder(tmp_path))
    assert "weights.bin: a pickle file, which runs code" in str(error.value)


def test_paths_in_a_vocabulary_are_not_leaks(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"/home/anna/": 7}')
    assert release_checks.scan_folder(tmp_path) == []


def test_folders_that_are_refused(tmp_path, trained, adapter):
    with pytest.raises(PublishError, match="no folder at"):
        kind_of(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PublishError, match="neither model weights .* nor pairs .* but nothing"):
        kind_of(tmp_path / "empty")
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
    with pytest.raises(PublishError, match="its fingerprint is abc, that of the folder 123"):
        hub._check_same_weights({"fingerprint": "abc", "settings": {}}, {"fingerprint": "123"})
    hub._check_same_weights({"fingerprint": ""}, {"fingerprint": "123"})


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


def test_adapter_on_the_shipped_base_can_be_found_again(tmp_path, adapter):
    """Its config says `scenes`, which `prefalign` resolves anywhere, and the card's example names the function."""
    from prefalign.model_card import model_card
    from prefalign.staging import without_paths

    config = {"base_model_name_or_path": "/opt/env/prefalign/scenes/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = resolve_base(tmp_path, "adapter", {}, None)
    shipped = str(Path(hub.__file__).parent / "scenes" / "base")
    assert without_paths({"base_model_name_or_path": shipped}, base) == {"base_model_name_or_path": "scenes"}
    card = model_card("me/x", base=base, adapter=True, method="DPO", license=None, datasets=[], config=None, pairs=None,
                      trainer_state=None, evaluation=None, baseline=None, rows=None,
                      checked={"picture_effect": 0.5, "adapter_effect": 0.25, "text": "x"})  # fmt: skip
    assert "from_pretrained(base_checkpoint(), " in python_block(card)
    compile(python_block(card), "card", "exec")
    assert "nothing here shows that it is better than its base" in card
    assert "base_model:" not in card


def test_before_and_after_measured_differently_is_said(evaluations):
    from prefalign.model_card import _evaluation_table

    after, before = (json.loads((evaluations / name / "results.json").read_text()) for name in ("after", "before"))
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
    upload(tmp_path, "tester/rows", repo_type="dataset", private=False, replace=hub.SHARDS)
    online.repositories["dataset", "tester/rows"].files["LICENSE"] = b"mine"
    (tmp_path / "data" / "train-00001.parquet").unlink()
    upload(tmp_path, "tester/rows", repo_type="dataset", private=False, replace=hub.SHARDS)
    assert set(online.repositories["dataset", "tester/rows"].files) == {"data/train-00000.parquet", "LICENSE"}
