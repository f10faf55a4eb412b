"""What is checked before a push: the picture and the adapter matter, nothing is broken, nothing leaks."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefalign import hub
from prefalign.hub import publish, release_checks
from prefalign.hub.dataset_card import read_rows
from prefalign.hub.release_checks import CheckError
from prefalign.images import encode_png
from prefalign.records import Candidates, Pair, assistant_message, user_message
from prefalign.store import OutputConfig, write_records
from tests.hub_folders import SECRET, copy, save_adapter, save_pairs, save_trained
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


def test_the_sample_picture_is_the_first_training_picture(trained, pairs, tmp_path):
    """Another picture gives another answer to the check: it is really shown."""
    drawn = release_checks.verify(trained)["picture_effect"]
    given = release_checks.verify(trained, picture=publish._first_picture(pairs, tmp_path))["picture_effect"]
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


def test_damaged_weights_are_refused(tmp_path, trained):
    damaged = copy(trained, tmp_path / "damaged")
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckError, match="the model does not load .*model.safetensors .* is damaged"):
        release_checks.verify(damaged)


def test_model_that_says_nothing_is_refused(tmp_path, trained):
    silent = copy(trained, tmp_path / "silent")
    settings = json.loads((silent / "generation_config.json").read_text())
    words = json.loads((silent / "config.json").read_text())["text_config"]["vocab_size"]
    settings["suppress_tokens"] = [token for token in range(words) if token != settings["eos_token_id"]]
    (silent / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckError, match="on a sample picture with nothing at all"):
        release_checks.verify(silent)


def test_chat_template_without_the_picture_is_refused(tmp_path, trained):
    deaf = copy(trained, tmp_path / "deaf")
    (deaf / "chat_template.jinja").write_text("USER: what is it ? ASSISTANT:")
    before_5_23 = "|cannot read a picture as .*tokens: 0, "  # there the model notices, not the processor
    with pytest.raises(CheckError, match="cannot encode a picture .*0 <image> tokens and 1 images" + before_5_23):
        release_checks.verify(deaf)


def test_processor_that_counts_patches_otherwise_is_refused(tmp_path, trained):
    other = copy(trained, tmp_path / "other")
    settings = json.loads((other / "processor_config.json").read_text())
    settings["patch_size"] *= 2
    (other / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckError, match="cannot read a picture as its processor gives it .*tokens: 1, "):
        release_checks.verify(other)


def test_half_a_processor_is_refused(tmp_path, trained, adapter):
    half = copy(trained, tmp_path / "half")
    (half / "processor_config.json").unlink()
    with pytest.raises(CheckError, match=r"the processor does not load \(Can't load image processor"):
        release_checks.verify(half)
    half = copy(adapter, tmp_path / "half-adapter")
    (half / "processor_config.json").unlink()
    tokenizer = json.loads((half / "tokenizer_config.json").read_text())
    del tokenizer["processor_class"]  # as a tokenizer that was saved alone
    (half / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckError, match="no complete processor: .* lacks .*image_processor"):
        release_checks.verify(half, base=str(trained))


def test_weights_of_the_base_are_refused(trained):
    with pytest.raises(CheckError, match=r"all \d+ weight tensors are those of the base"):
        release_checks.verify(trained, base=str(trained))


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


def test_notes_of_an_evaluation_reach_the_scan(tmp_path):
    (tmp_path / "README.md").write_text("- judged with key " + SECRET)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckError, match=r"README.md line 1: Hugging Face token") as error:
        release_checks.refuse(release_checks.scan_folder(tmp_path))
    assert "weights.bin: a pickle file, which runs code" in str(error.value)


def test_paths_in_a_vocabulary_are_not_leaks(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"/home/anna/": 7}')
    assert release_checks.scan_folder(tmp_path) == []


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


def test_a_path_beside_an_answer_is_refused_and_one_in_it_is_not(tmp_path):
    row = Candidates("row0", [encode_png(picture(0))], [user_message("what ?", images=1)],
                     [{"text": "it shows /home/of/dogs", "generator": "scenes", "earlier": ["It says /home/me."]}])  # fmt: skip
    write_records("t", [row], output=OutputConfig(tmp_path / "fine"), record=Candidates, settings={}, seed=0)
    assert read_rows([tmp_path / "fine" / "data" / "train-00000.parquet"])[0].rows == 1
    row.responses[0] |= {
        "generator": "/mnt/models/Qwen2.5-VL-7B",
        "text": f"my key is {SECRET}",
        "earlier": ["The sign says /home/me/x."],
    }
    write_records("t", [row], output=OutputConfig(tmp_path / "leaky"), record=Candidates, settings={}, seed=0)
    with pytest.raises(CheckError, match=r"row row0, column responses: absolute path /mnt/models/\.\.\.") as error:
        read_rows([tmp_path / "leaky" / "data" / "train-00000.parquet"])
    assert "row row0, column responses: Hugging Face token hf_A" in str(error.value)
