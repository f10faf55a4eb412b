"""A user's photographs and checkpoint, through the README's commands: pairs, report, training, evaluation, publish.

Photographs are scikit-image's; checkpoints are tiny random ones in the Hub's layout, so texts are gibberish and only the
plumbing and the numbers' equality are under test.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from prefalign import cli
from prefalign.images import open_image
from prefalign.manifest import read_manifest
from prefalign.records import Pair
from prefalign.store import read_records

README = (Path(__file__).parent.parent / "README.md").read_text()
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
ANSWERS = (
    "An astronaut smiles in front of a flag. She wears an orange suit. A model of a shuttle is behind her.",
    "A cup of coffee stands on a saucer. There is a spoon beside the cup.",
    "A cat looks into the camera. Its fur is orange and its eyes are green.",
    "A rocket stands on a launch pad at night. Four towers surround it.",
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Folder with `photos/` and `rows.jsonl` in LLaVA's conversation format, with one bad row of each common kind."""
    from PIL import Image
    from skimage import data

    folder = tmp_path_factory.mktemp("mine")
    (folder / "photos").mkdir()
    rows = []
    for name, answer in zip(PHOTOGRAPHS, ANSWERS, strict=True):
        Image.fromarray(getattr(data, name)()).save(folder / "photos" / f"{name}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nDescribe the picture."}, {"from": "gpt", "value": answer}]
        rows.append({"id": name, "image": f"{name}.jpg", "conversations": turns})
    whole = (folder / "photos" / "coffee.jpg").read_bytes()
    (folder / "photos" / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    rows.append({**rows[1], "id": "cut", "image": "cut.jpg"})
    rows.append({**rows[1], "id": "gone", "image": "gone.jpg"})
    two_marks = [{"from": "human", "value": "<image><image>\nWhich one?"}, {"from": "gpt", "value": "The first."}]
    rows.append({"id": "marks", "image": "coffee.jpg", "conversations": two_marks})
    text = "".join(json.dumps(row) + "\n" for row in rows) + json.dumps(rows[0])[:50] + "\n"
    (folder / "rows.jsonl").write_text(text)
    return folder


def readme_commands():
    """The commands of the README's section on own data, as argument lists."""
    section = README.split("## Your own pictures and model")[1].split("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL).group(1).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("prefalign ")]


def generate_pairs(checkpoint, photographs, folder, *extra):
    command = next(words for words in readme_commands() if words[:2] == ["run", "bdhs"])
    known = {"llava-hf/llava-1.5-7b-hf": checkpoint, "rows.jsonl": photographs / "rows.jsonl",
             "photos/": photographs / "photos", "runs/pairs": folder}  # fmt: skip
    words = [str(known.get(word, word)) for word in command]
    assert cli.main([*words, "--similarity", "lexical", "--sampling.max_new_tokens", "8", *extra]) == 0


@pytest.mark.parametrize("family", ["tiny_llava", "tiny_idefics3"])
def test_pairs_come_out_and_every_bad_row_is_counted(family, request, photographs, tmp_path):
    generate_pairs(request.getfixturevalue(family), photographs, tmp_path / "pairs")
    manifest = read_manifest(tmp_path / "pairs")
    assert manifest.rows_in == 8 == manifest.rows_used + sum(manifest.dropped.values())
    for reason in ("truncated_image", "missing_image", "placeholder_mismatch", "bad_json"):
        assert manifest.dropped[reason] == 1
    pairs = {pair.meta["parent"]: pair for pair in read_records(tmp_path / "pairs", Pair)}
    assert len(pairs) == manifest.rows_out >= 3
    for name, pair in pairs.items():
        assert pair.images[0]["bytes"] == (photographs / "photos" / f"{name}.jpg").read_bytes()
        assert open_image(pair.images[0]).mode == "RGB"
        assert pair.chosen[0]["content"][0]["text"] == ANSWERS[PHOTOGRAPHS.index(name)]


@pytest.mark.usefixtures("warm_executable")
def test_readme_commands_from_pairs_to_publish(tiny_llava, photographs, tmp_path, monkeypatch, capsys):
    generate_pairs(tiny_llava, photographs, tmp_path / "runs" / "pairs")
    questions = [{"question_id": n, "image": f"{name}.jpg", "text": f"Is there a {name} in the picture?", "label": "yes"}
                 for n, name in enumerate(PHOTOGRAPHS)]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    monkeypatch.chdir(tmp_path)
    training = "--trainer.max_steps 2 --trainer.per_device_train_batch_size 1 --trainer.bf16 false "
    training += "--trainer.gradient_accumulation_steps 1"
    extra = {
        "doctor": training,
        "train_preference": training,
        "evaluate_model": "--asking.short_answer_tokens 4",
        "publish": "--base-model llava-hf/llava-1.5-7b-hf --output runs/staged",
    }
    ran = []
    for words in readme_commands():
        name = words[1] if words[0] == "run" else words[0]
        if name == "bdhs":
            continue
        known = {"llava-hf/llava-1.5-7b-hf": str(tiny_llava), "photos/": str(photographs / "photos")}
        words = [known.get(word, word) for word in words]
        assert cli.main([*words, *shlex.split(extra.get(name, ""))]) == 0, capsys.readouterr().err
        ran.append(name)
    assert ran == ["inspect", "doctor", "train_preference", "evaluate_model", "publish"]
    assert (tmp_path / "runs/pairs/report.html").stat().st_size > 10_000
    assert (tmp_path / "runs/policy/adapter_model.safetensors").is_file()
    assert (tmp_path / "runs/policy/preprocessor_config.json").is_file() or (
        tmp_path / "runs/policy/processor_config.json"
    ).is_file()
    assert json.loads((tmp_path / "runs/evaluation/results.json").read_text())["metrics"]["yesno_accuracy"]["n"] == 4
    assert "image-text-to-text" in (tmp_path / "runs/staged/README.md").read_text()
