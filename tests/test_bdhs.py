"""BDHS end to end with the transformers engine on a tiny random LLaVA: gibberish answers, real plumbing."""

import json
import shutil

import pytest

from prefalign import bundled, config
from prefalign.manifest import read_manifest
from prefalign.records import Pair, message_text
from prefalign.store import StoreError, read_records
from tests.tiny_vlms import picture

ANSWERS = (
    "There is a red circle at the top. A blue star is at the left. I can see 3.5 green rings.",
    "Yes.",
    "1. A ball.\n2. A cat, e.g. a black one.",
    "No, there is no star. It is a very plain picture.",
    "Red.",
)


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("bdhs")


def write_rows(folder, *, shift=0, answers=ANSWERS):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, answer in enumerate(answers):
        picture(number + shift).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"row{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(stage, checkpoint, rows, output, *, bias=None, batch_size=8, max_quarantine=100, **more):
    values = {
        "model": {"model_name_or_path": str(checkpoint), "device": "cpu"},
        "data": {"path": rows / "rows.jsonl"},
        "output": {"path": output, "block_size": 2, "max_quarantine": max_quarantine},
        "bias": {"rho_th": 0.5, "iterations": 2, **(bias or {})},
        "sampling": {"max_new_tokens": 48},
        "batch_size": batch_size,
        **more,
    }
    manifest = stage.main(config.build(stage.Config, values))
    return manifest, {pair.meta["parent"]: pair for pair in read_records(output, Pair)}


def rejected(pairs):
    return {name: message_text(pair.rejected) for name, pair in pairs.items()}


@pytest.fixture(scope="module")
def speaker(tiny_llava, tmp_path_factory):
    """The random LLaVA with one token in eight ending the answer, so that what it says is seldom cut off."""
    folder = tmp_path_factory.mktemp("speaker") / "llava"
    shutil.copytree(tiny_llava, folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "eos_token_id": sorted({settings["eos_token_id"], *range(8, 400, 8)})}))
    return folder


@pytest.fixture(scope="module")
def finished(stage, speaker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bdhs")
    rows = write_rows(folder / "rows")
    manifest, pairs = run(stage, speaker, rows, folder / "pairs")
    return rows, folder / "pairs", manifest, pairs


def test_pairs_hold_what_the_method_says(finished):
    rows, _, manifest, pairs = finished
    assert manifest.rows_in == 5 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out == len(pairs) >= 4
    for name, pair in pairs.items():
        number = int(name.removeprefix("row"))
        pair.check()
        assert message_text(pair.chosen) == ANSWERS[number] == pair.answer
        assert pair.images[0]["bytes"] == (rows / f"{number}.png").read_bytes()
        assert pair.rejected_images == []
        assert pair.method == "bdhs"
        meta = pair.meta
        assert meta["rho_th"] == 0.5
        assert meta["generator"] == manifest.models["generator"] != ""
        assert 1 <= meta["iteration_accepted"] <= 2
        assert meta["guided"] == (meta["iteration_accepted"] == 1)
        assert meta["similarity"] < 0.97 or not meta["guided"]
        assert len(meta["images_sha256"][0]) == 64
        assert isinstance(meta["mask_seed"], int)
        assert meta["settings"]["sampling"]["temperature"] == 1.0


def test_sentences_begin_as_in_the_reference(finished):
    pair = finished[3]["row0"]
    assert pair.meta["guided"]
    head = pair.meta["split_points"][0]
    assert head > 0
    assert message_text(pair.rejected).startswith(ANSWERS[0][:head])
    assert message_text(pair.rejected).endswith(".")


def test_batch_size_changes_no_row(stage, speaker, finished, tmp_path):
    _, pairs = run(stage, speaker, finished[0], tmp_path / "one", batch_size=1)
    assert rejected(pairs) == rejected(finished[3])
    assert {pair.id for pair in pairs.values()} == {pair.id for pair in finished[3].values()}


def test_order_of_rows_changes_no_row(stage, speaker, finished, tmp_path):
    rows = tmp_path / "rows"
    shutil.copytree(finished[0], rows)
    lines = (rows / "rows.jsonl").read_text().splitlines(keepends=True)
    (rows / "rows.jsonl").write_text("".join(lines[::-1]))
    _, pairs = run(stage, speaker, rows, tmp_path / "pairs")
    assert rejected(pairs) == rejected(finished[3])


def test_resume_gives_the_same_rows(stage, speaker, finished, tmp_path):
    rows, folder, _, pairs = finished
    shutil.copytree(folder, tmp_path / "pairs")
    (tmp_path / "pairs" / "manifest.json").unlink()
    (tmp_path / "pairs" / "progress" / "00000.json").unlink()
    (tmp_path / "pairs" / "data" / "train-00000.parquet").unlink()
    manifest, again = run(stage, speaker, rows, tmp_path / "pairs")
    assert {name: pair.to_row() for name, pair in again.items()} == {
        name: pair.to_row() for name, pair in pairs.items()
    }
    assert manifest == read_manifest(folder)


@pytest.mark.parametrize("change", [{"bias": {"rho_th": 0.6}}, {"sampling": {"max_new_tokens": 47}}, {"seed": 1}])
def test_another_config_refuses_the_folder(change, stage, speaker, finished):
    with pytest.raises(StoreError, match="another config"):
        run(stage, speaker, finished[0], finished[1], **change)


def test_seed_and_settings_change_ids_and_answers(stage, speaker, finished, tmp_path):
    base = finished[3]
    for name, change in {"seed": {"seed": 1}, "share": {"bias": {"rho_th": 0.25}}}.items():
        _, pairs = run(stage, speaker, finished[0], tmp_path / name, **change)
        assert not {pair.id for pair in pairs.values()} & {pair.id for pair in base.values()}
        assert rejected(pairs) != rejected(base)


@pytest.mark.parametrize(
    ("bias", "matters"),
    [
        ({"rho_th": 0.0}, True),
        ({"rho_th": 1.0}, False),
        ({"variant": "noise", "noise_step": 300}, True),
    ],
)
def test_another_picture_changes_the_answer_unless_all_of_it_is_hidden(bias, matters, stage, speaker, tmp_path):
    answers = ANSWERS[:1] + ANSWERS[3:4]
    first, second = (
        rejected(
            run(
                stage,
                speaker,
                write_rows(tmp_path / f"rows{shift}", shift=shift, answers=answers),
                tmp_path / f"pairs{shift}",
                bias=bias,
            )[1]
        )
        for shift in (0, 10)
    )
    assert (first != second) == matters


def test_noise_is_noted(stage, speaker, tmp_path):
    rows = write_rows(tmp_path / "rows", answers=ANSWERS[:1])
    _, pairs = run(stage, speaker, rows, tmp_path / "pairs", bias={"variant": "noise"})
    meta = pairs["row0"].meta
    assert (meta["variant"], meta["noise_step"], meta["rho_th"]) == ("noise", 500, None)
    assert "mask_seed" not in meta
    assert isinstance(meta["noise_seed"], int)


def test_every_bad_row_is_counted(stage, speaker, tmp_path):
    rows = write_rows(tmp_path / "rows", answers=ANSWERS[:2])
    whole = (rows / "0.png").read_bytes()
    (rows / "cut.png").write_bytes(whole[: len(whole) // 2])
    bad = [
        {"id": "silent", "image": "0.png", "question": "What?"},
        {"id": "blank", "image": "0.png", "question": "What?", "answer": "  \n"},
        {"id": "text", "question": "What?", "answer": "A cat."},
        {"id": "cut", "image": "cut.png", "question": "What?", "answer": "A cat."},
        {"id": "mark", "image": "0.png", "question": "What?", "answer": "An <image> of a cat. It sits."},
        {"id": "gone", "image": "gone.png", "question": "What?", "answer": "A cat."},
    ]
    with (rows / "rows.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in bad)
    manifest, pairs = run(stage, speaker, rows, tmp_path / "pairs")
    assert manifest.rows_in == 8 == manifest.rows_used + sum(manifest.dropped.values())
    expected = {"no_reference": 2, "no_picture": 1, "truncated_image": 1, "missing_image": 1, "generation_failed": 1}
    assert {reason: manifest.dropped[reason] for reason in expected} == expected
    assert manifest.quarantined == 3
    messages = " ".join(file.read_text() for file in sorted((tmp_path / "pairs" / "quarantine").iterdir()))
    assert "the text holds '<image>'" in messages
    assert '"id": "text"' not in messages
    assert len(pairs) == manifest.rows_out


def test_rows_without_picture_or_answer_stop_nothing(stage, speaker, tmp_path):
    """A mixed LLaVA set: such rows are counted, and only failures stop a run."""
    rows = write_rows(tmp_path / "rows", answers=ANSWERS[:2])
    other = [{"id": f"text{n}", "question": "What?", "answer": "A cat."} for n in range(3)]
    other += [{"id": f"silent{n}", "image": "0.png", "question": "What?"} for n in range(2)]
    with (rows / "rows.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in other)
    manifest, pairs = run(stage, speaker, rows, tmp_path / "pairs", max_quarantine=0)
    assert (manifest.dropped["no_picture"], manifest.dropped["no_reference"], manifest.quarantined) == (3, 2, 0)
    assert manifest.rows_in == 7 == manifest.rows_used + sum(manifest.dropped.values())
    assert len(pairs) >= 1


def test_answers_cut_off_by_the_limit_are_counted(stage, tiny_llava, tmp_path):
    """The random LLaVA hardly ever ends an answer: drawn freely up to eight tokens, all of them are cut off."""
    rows = write_rows(tmp_path / "rows", answers=ANSWERS[:2])
    with pytest.raises(StoreError, match="bdhs made no row out of 2: 2 cut_off"):
        run(stage, tiny_llava, rows, tmp_path / "pairs", bias={"guided": False}, sampling={"max_new_tokens": 8})


def test_identical_answers_are_dropped_and_counted(stage, speaker, finished, tmp_path):
    """What a blind model says freely is made the reference of the same row: its rejected answer is then the same."""
    answers = ["A."] * 6
    rows = write_rows(tmp_path / "rows", answers=answers)
    settings = {"bias": {"rho_th": 1.0, "guided": False, "iterations": 1}}
    _, pairs = run(stage, speaker, rows, tmp_path / "first", **settings)
    name = min(pairs)
    answers[int(name.removeprefix("row"))] = message_text(pairs[name].rejected)
    write_rows(rows, answers=answers)
    manifest, again = run(stage, speaker, rows, tmp_path / "second", **settings)
    assert manifest.dropped["identical_answers"] == 1
    assert set(again) == set(pairs) - {name} != set()


@pytest.mark.parametrize("name", ["bdhs", "bdhs_noise", "bdhs_scenes"])
def test_configs_are_the_published_ones(name, stage):
    built = config.load(stage.Config, bundled.find(f"datagen/{name}"))
    assert (built.bias.threshold, built.bias.iterations, built.bias.guided, built.bias.unguided_last) == (
        0.97,
        5,
        True,
        True,
    )
    assert (built.bias.variant, built.bias.noise_step) == ("noise" if name == "bdhs_noise" else "attention", 500)
    assert built.bias.rho_th == 0.99
    assert built.sampling.temperature == 1.0
    if name != "bdhs_scenes":
        assert built.model.model_name_or_path == "llava-hf/llava-v1.6-vicuna-7b-hf"
    assert built.similarity == "lexical"  # needs nothing; the header names the paper's
    if name != "bdhs_scenes":
        assert "--similarity all-mpnet-base-v2" in bundled.find(f"datagen/{name}").read_text()
