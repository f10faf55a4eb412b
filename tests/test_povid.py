"""POVID: the stage with rules and with a real tiny VLM, noised pictures beside."""

import json
import shutil

import pytest

from prefalign import bundled, config
from prefalign.corruption import diffusion_noise
from prefalign.images import open_image
from prefalign.records import Pair, message_text
from prefalign.rule_editor import KINDS
from prefalign.scenes import language, world
from prefalign.store import StoreError, read_records
from tests.tiny_vlms import picture


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("povid")


def write_rows(folder, *, shift=0):
    folder.mkdir(parents=True)
    rows = []
    for number, scene in enumerate(world.scenes("train_biased", 0, 4)):
        picture(number + shift).save(folder / f"{number}.png")
        rows.append({"id": f"row{number}", "image": f"{number}.png", "question": "Describe the picture.",
                     "answer": language.caption(scene), "facts": language.facts(scene)})  # fmt: skip
    rows.append({"id": "nothing", "image": "0.png", "question": "What?", "answer": "Nothing."})
    rows.append({"id": "silent", "image": "0.png", "question": "What?"})
    rows.append({"id": "text", "question": "What?", "answer": "A red circle."})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(stage, rows, output, *, max_quarantine=100, **more):
    values = {
        "data": {"path": rows / "rows.jsonl"},
        "output": {"path": output, "block_size": 3, "max_quarantine": max_quarantine},
        **more,
    }
    manifest = stage.main(config.build(stage.Config, values))
    return manifest, {pair.meta["parent"]: pair for pair in read_records(output, Pair)}


def test_stage_with_rules(stage, tmp_path):
    rows = write_rows(tmp_path / "rows")
    manifest, pairs = run(stage, rows, tmp_path / "pairs", rejected_images="noised")
    assert manifest.rows_in == 7 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.dropped == {"nothing_to_edit": 1, "no_reference": 1, "no_picture": 1}
    assert set(pairs) == {"row0", "row1", "row2", "row3"}
    for name, pair in pairs.items():
        pair.check()
        clean = picture(int(name[3:]))
        assert message_text(pair.chosen) == pair.answer
        assert pair.meta["injector"] == "rules"
        assert pair.meta["injection_type"] in KINDS
        assert (pair.meta["noise_step"], pair.meta["noise_space"]) == (500, "native")
        noised = open_image(pair.rejected_images[0])
        assert noised.tobytes() == diffusion_noise(clean, seed=pair.meta["noise_seed"]).tobytes()
        assert noised.size == clean.size
        assert open_image(pair.images[0]).tobytes() == clean.tobytes()
    again = run(stage, rows, tmp_path / "again", rejected_images="noised")[1]
    assert {name: pair.to_row() for name, pair in again.items()} == {
        name: pair.to_row() for name, pair in pairs.items()
    }


def test_noise_parity_switch_and_no_noise(stage, tmp_path):
    rows = write_rows(tmp_path / "rows")
    wrapped = run(stage, rows, tmp_path / "wrapped", rejected_images="noised", noise={"wrap": True})[1]["row0"]
    expected = diffusion_noise(picture(0), seed=wrapped.meta["noise_seed"], wrap=True)
    assert open_image(wrapped.rejected_images[0]).tobytes() == expected.tobytes()
    assert run(stage, rows, tmp_path / "none")[1]["row0"].rejected_images == []
    with pytest.raises(config.ConfigError, match="noise step 1000 is outside the schedule"):
        run(stage, rows, tmp_path / "never", noise={"step": 1000})


def test_another_vocabulary(stage, tmp_path):
    """Words for photographs come with the config; groups left empty are not used."""
    words = {
        "objects": {"dog": ["puppy"], "ball": [], "frisbee": []},
        "companions": {"dog": ["frisbee"]},
        "attributes": {"colour": ["brown", "white"]},
        "places": ["on the grass", "in the water"],
        "opposites": {},
        "numbers": [],
    }
    rows = tmp_path / "rows"
    rows.mkdir()
    picture(0).save(rows / "0.png")
    answer = "A brown puppy plays on the grass. It looks happy."
    (rows / "rows.jsonl").write_text(
        json.dumps({"id": "row0", "image": "0.png", "question": "What?", "answer": answer})
    )
    rules = {"vocabulary": words, "kinds": ["object"]}
    added = {
        message_text(run(stage, rows, tmp_path / str(seed), rules=rules, seed=seed)[1]["row0"].rejected)
        for seed in range(8)
    }
    assert added == {
        f"A brown puppy plays on the grass. A {colour} frisbee plays in the water. It looks happy."
        for colour in ("brown", "white")
    }


@pytest.fixture(scope="module")
def editor_checkpoint(tiny_llava, tmp_path_factory):
    """The random LLaVA with one token in eight ending the answer, so that what it writes is not always cut off."""
    folder = tmp_path_factory.mktemp("editor") / "llava"
    shutil.copytree(tiny_llava, folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    ends = sorted({settings["eos_token_id"], *range(8, 400, 8)})
    file.write_text(json.dumps({**settings, "eos_token_id": ends}))
    return folder


def vlm(checkpoint, **sampling):
    model = {"model_name_or_path": str(checkpoint), "device": "cpu"}
    return {"editor": "engine", "model": model, "sampling": {"max_new_tokens": 40, **sampling}}


def test_stage_with_a_vlm(stage, editor_checkpoint, tmp_path):
    rows = write_rows(tmp_path / "rows")
    manifest, pairs = run(stage, rows, tmp_path / "pairs", **vlm(editor_checkpoint))
    assert manifest.rows_in == 7 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out == len(pairs) >= 2
    for pair in pairs.values():
        pair.check()
        text = message_text(pair.rejected)
        assert pair.meta["injector"] == manifest.models["injector"] != "rules"
        assert pair.meta["injection_type"] == "captioning"
        assert pair.meta["injected"]
        assert all(text[entry["start"] :].startswith(entry["added"]) for entry in pair.meta["injected"])
    one_by_one = run(stage, rows, tmp_path / "one", batch_size=1, **vlm(editor_checkpoint))[1]
    assert {name: pair.to_row() for name, pair in one_by_one.items()} == {
        name: pair.to_row() for name, pair in pairs.items()
    }


def test_rows_without_picture_or_answer_stop_nothing(stage, tmp_path):
    manifest, _ = run(stage, write_rows(tmp_path / "rows"), tmp_path / "pairs", max_quarantine=0)
    assert (manifest.dropped["no_picture"], manifest.dropped["no_reference"], manifest.quarantined) == (1, 1, 0)


def test_edits_that_are_all_cut_off_are_told(stage, tiny_llava, tmp_path):
    with pytest.raises(StoreError, match="povid made no row out of 7: 5 cut_off, 1 no_picture, 1 no_reference"):
        run(stage, write_rows(tmp_path / "rows"), tmp_path / "cut", **vlm(tiny_llava, max_new_tokens=6))


def test_engine_editor_without_a_model(stage, tmp_path):
    with pytest.raises(ValueError, match="editor is `engine`, and no model is named"):
        run(stage, write_rows(tmp_path / "rows"), tmp_path / "none", editor="engine")


@pytest.mark.parametrize("name", ["povid", "povid_scenes"])
def test_configs(name, stage):
    built = config.load(stage.Config, bundled.find(f"datagen/{name}"))
    assert (built.noise.step, built.noise.space, built.noise.wrap) == (500, "native", False)
    assert built.editor == ("engine" if name == "povid" else "rules")
