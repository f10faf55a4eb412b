"""MIA-DPO end to end on the tiny scenes model and a random LLaVA."""

import json
import math
import shutil

import pytest
import torch
from tiny_vlms import picture

from prefalign import bundled, config
from prefalign.engines.transformers import TransformersEngine
from prefalign.images import open_image, sha256
from prefalign.manifest import read_manifest
from prefalign.records import Pair, message_text, placeholder_count
from prefalign.scenes import world
from prefalign.scenes.export import export
from prefalign.sources import DataConfig
from prefalign.store import StoreError, read_records

EVERYTHING = {"least_perplexity": 0.0, "most_length_ratio": 1e9, "most_length_ratio_short": 1e9, "least_edit_distance": 0.0,
              "sequence": {2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}, "grid": {2: 1.1, 3: 1.1, 4: 1.1, 6: 1.1, 9: 1.1},
              "pic_in_pic": 1.1}  # fmt: skip


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("mia_dpo")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mia") / "prompts"
    export(folder, split="train_biased", kind="caption", regime="seen", start=0, stop=12)
    return folder


def run(stage, output, *, name="mia_dpo_scenes", **changes):
    values = config.merge(config.read_yaml(bundled.find(f"datagen/{name}")), changes)
    values = config.merge(values, {"output": {"path": output, "block_size": 4}})
    manifest = stage.main(config.build(stage.Config, values))
    return manifest, {pair.meta["parent"]: pair for pair in read_records(output, Pair)}


def rows_of(pairs):
    return {name: pair.to_row() for name, pair in pairs.items()}


@pytest.fixture(scope="module")
def finished(stage, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mia_pairs") / "pairs"
    return folder, *run(stage, folder, data={"path": prompts}, selection=EVERYTHING)


def test_pairs_hold_what_the_method_says(finished, prompts):
    _, manifest, pairs = finished
    assert manifest.rows_in == 12 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out == len(pairs) >= 10
    sources = {prompt["id"]: prompt for prompt in read_prompts(prompts)}
    for name, pair in pairs.items():
        pair.check()
        meta = pair.meta
        own = sha256(sources[name]["images"][0])
        place = meta["target_index"] - 1
        assert [sha256(image) for image in pair.images][place] == own
        assert meta["companions"] == [value for value in meta["images_sha256"] if value != own]
        assert len(meta["companions"]) == 1
        assert message_text(pair.prompt) == f"Describe the {('first', 'second')[place]} picture."
        assert placeholder_count(pair.prompt) == 2
        assert message_text(pair.chosen) == pair.answer == sources[name]["answer"]
        assert 0 < meta["attention_ratio"] < 1
        assert meta["perplexity"] >= 1
        assert meta["layer"] == 2  # of 4
        assert (meta["layout"], meta["n_images"], meta["noise_std"]) == ("sequence", 2, 0.0)
    assert {pair.meta["target_index"] for pair in pairs.values()} == {1, 2}


def read_prompts(folder):
    from prefalign import sources

    return [vars(sources.to_prompt(row, DataConfig(folder))) for row in sources.read_rows(DataConfig(folder))]


def test_batch_size_changes_no_row(stage, prompts, finished, tmp_path):
    _, pairs = run(stage, tmp_path / "one", data={"path": prompts}, selection=EVERYTHING, batch_size=1)
    assert rows_of(pairs) == rows_of(finished[2])


def test_order_and_blocks_change_no_row(stage, finished, prompts, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = []
    for prompt in read_prompts(prompts):
        (rows / f"{prompt['id']}.png").write_bytes(prompt["images"][0]["bytes"])
        lines.append(
            {"id": prompt["id"], "image": f"{prompt['id']}.png", "question": "Describe it.", "answer": prompt["answer"]}
        )
    both = []
    for name, ordered in (("one", lines), ("other", lines[::-1])):
        (rows / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ordered))
        _, pairs = run(stage, tmp_path / name, data={"path": rows / "rows.jsonl"}, selection=EVERYTHING)
        both.append({name: (message_text(pair.rejected), pair.meta) for name, pair in pairs.items()})
    assert both[0] == both[1]
    assert len(both[0]) >= 10


def test_resume_gives_the_same_rows(stage, prompts, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "pairs")
    (tmp_path / "pairs" / "manifest.json").unlink()
    (tmp_path / "pairs" / "progress" / "00001.json").unlink()
    (tmp_path / "pairs" / "data" / "train-00001.parquet").unlink()
    shutil.rmtree(tmp_path / "pairs" / "pool")
    manifest, pairs = run(stage, tmp_path / "pairs", data={"path": prompts}, selection=EVERYTHING)
    assert rows_of(pairs) == rows_of(finished[2])
    assert manifest == read_manifest(finished[0])


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 95}, {"seed": 1}, {"selection": {"layer": 1}}, {"layouts": {"grid": 0.5}}]
)
def test_another_config_refuses_the_folder(stage, prompts, finished, change):
    with pytest.raises(StoreError, match="another config"):
        run(stage, finished[0], **config.merge({"data": {"path": prompts}, "selection": EVERYTHING}, change))


def test_another_picture_changes_the_answer_and_the_attention(stage, finished, prompts, tmp_path):
    """Every row gets the picture of the next: same ids, layouts, distractor draws and questions."""
    rows = read_prompts(prompts)
    folder = tmp_path / "rows"
    folder.mkdir()
    found = []
    for shift in (0, 1):
        lines = []
        for number, row in enumerate(rows):
            name = f"{number}-{shift}.png"
            (folder / name).write_bytes(rows[(number + shift) % len(rows)]["images"][0]["bytes"])
            lines.append({"id": row["id"], "image": name, "question": "Describe it.", "answer": row["answer"]})
        (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        _, pairs = run(stage, tmp_path / f"out{shift}", data={"path": folder / "rows.jsonl"}, selection=EVERYTHING)
        found.append(pairs)
    both = set(found[0]) & set(found[1])
    assert len(both) >= 10
    for name in both:
        one, other = (pairs[name] for pairs in found)
        assert one.meta["target_index"] == other.meta["target_index"]
        assert one.meta["attention_ratio"] != other.meta["attention_ratio"]
    assert sum(message_text(found[0][name].rejected) != message_text(found[1][name].rejected) for name in both) >= 8


class TestLayoutsThatAreComposed:
    @pytest.mark.parametrize(("layout", "size"), [("grid", (132, 132)), ("pic_in_pic", (60, 60))])
    def test_one_canvas_is_stored_clean(self, stage, prompts, tmp_path, layout, size):
        others = {"sequence": 0.0, "grid": 0.0, "pic_in_pic": 0.0, layout: 1.0}
        changes = {"data": {"path": prompts, "limit": 6}, "selection": EVERYTHING, "layouts": others}
        manifest, plain = run(stage, tmp_path / "plain", **changes)
        assert manifest.rows_in == 6 == manifest.rows_used + sum(manifest.dropped.values())
        _, noised = run(stage, tmp_path / "noised", **changes, noise={"grid": 225.0, "pic_in_pic": 49.0})
        assert len(plain) >= 5
        for name, pair in plain.items():
            assert len(pair.images) == placeholder_count(pair.prompt) == 1
            assert open_image(pair.images[0]).size == size
            assert pair.meta["layout"] == layout
            assert pair.meta["noise_std"] == 0
            if name in noised:
                assert noised[name].images == pair.images
                assert noised[name].meta["noise_std"] == (225.0 if layout == "grid" else 49.0)
        both = set(plain) & set(noised)
        assert any(noised[name].meta["attention_ratio"] != plain[name].meta["attention_ratio"] for name in both)

    def test_the_released_even_cells(self, stage, prompts, tmp_path):
        """The same answers, other shares: the 6 x 6 tokens are cut into halves, padding and labels included."""
        changes = {"data": {"path": prompts, "limit": 6}, "layouts": {"sequence": 0.0, "grid": 1.0}}
        shares = []
        for cells in ("pixels", "even"):
            selection = config.merge(EVERYTHING, {"cells": cells})
            _, pairs = run(stage, tmp_path / cells, **changes, selection=selection)
            shares.append(
                {name: (message_text(pair.rejected), pair.meta["attention_ratio"]) for name, pair in pairs.items()}
            )
        assert set(shares[0]) == set(shares[1])
        for name in shares[0]:
            assert shares[0][name][0] == shares[1][name][0]
        assert any(shares[0][name][1] != shares[1][name][1] for name in shares[0])

    def test_cells_that_the_processor_crops_away(self, stage, tiny_llava, prompts, tmp_path):
        """LLaVA-1.5's centre crop leaves the middle of three cells: without padding every row is dropped and counted."""
        changes = {
            "model": {"model_name_or_path": str(tiny_llava)},
            "data": {"path": prompts, "limit": 3},
            "max_new_tokens": 8,
            "selection": EVERYTHING,
            "layouts": {"sequence": 0.0, "grid": 1.0, "grid_sizes": {2: 0.0, 3: 1.0}, "style": {"square": False}},
        }
        with pytest.raises(StoreError, match="mia_dpo made no row out of 3: 3 cell_cropped_away"):
            run(stage, tmp_path / "wide", **changes)


def test_an_answer_that_cannot_be_scored_fails_alone(stage, prompts, tmp_path, monkeypatch):
    real = TransformersEngine.logprobs

    def first_fails(self, requests, answers):
        return [torch.tensor([float("nan")]), *real(self, requests[1:], answers[1:])] if requests else []

    monkeypatch.setattr(TransformersEngine, "logprobs", first_fails)
    manifest, _ = run(stage, tmp_path / "out", data={"path": prompts}, selection=EVERYTHING)
    assert manifest.dropped["perplexity_failed"] == manifest.quarantined > 0
    assert manifest.rows_used + sum(manifest.dropped.values()) == 12


def test_five_pictures_on_a_random_model(stage, prompts, tiny_llava, tmp_path):
    """Sequences of five with their lines: placeholders where the pictures are named, the phrase before the question."""
    folder = tmp_path / "llava"
    shutil.copytree(tiny_llava, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    ends = sorted({settings["eos_token_id"], *range(8, 400, 8)})
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": ends}))
    changes = {
        "model": {"model_name_or_path": str(folder), "device": "cpu", "dtype": "auto"},
        "data": {"path": prompts, "images": None},
        "max_new_tokens": 64,
        "selection": EVERYTHING,
        "layouts": {"sequence": 1.0, "grid": 0.0, "pic_in_pic": 0.0, "sequence_sizes": {2: 0, 3: 0, 4: 0, 5: 1}},
    }
    _, pairs = run(stage, tmp_path / "pairs", name="mia_dpo", **changes)
    assert len(pairs) >= 3
    for pair in pairs.values():
        number = pair.meta["target_index"]
        blocks = pair.prompt[-1]["content"]
        assert [block["type"] for block in blocks] == ["text", "image"] * 5 + ["text"]
        assert [block["text"] for block in blocks[:-1:2]] == ["Image 1: ", *(f"\nImage {n}: " for n in (2, 3, 4, 5))]
        assert blocks[-1]["text"].startswith(f"\nIn image {number}, ")
        assert blocks[-1]["text"][len(f"\nIn image {number}, ")].islower()
        assert len({sha256(image) for image in pair.images}) == 5


def test_every_row_that_cannot_be_used_is_counted(stage, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    for number in range(3):
        (rows / f"{number}.png").write_bytes(world.png(world.scene("train_biased", number)))
    (rows / "cut.png").write_bytes((rows / "0.png").read_bytes()[:500])
    lines = [
        {"id": "good", "image": "0.png", "question": "Describe it.", "answer": "A red star."},
        {"id": "silent", "image": "0.png", "question": "What?"},
        {"id": "text", "question": "What?", "answer": "A cat."},
        {"id": "two", "images": ["0.png", "1.png"], "question": "What?", "answer": "A cat."},
        {"id": "long", "image": "1.png", "question": "What?", "answer": "x" * 512},
        {"id": "fits", "image": "2.png", "question": "What?", "answer": "x" * 511},
        {"id": "cut", "image": "cut.png", "question": "What?", "answer": "A cat."},
        {"id": "late", "image": "0.png", "conversations": [
            {"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
    ]  # fmt: skip
    (rows / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest, _ = run(stage, tmp_path / "out", data={"path": rows / "rows.jsonl"}, selection=EVERYTHING)
    assert manifest.rows_in == 8 == manifest.rows_used + sum(manifest.dropped.values())
    expected = {"no_reference": 1, "no_picture": 1, "not_one_picture": 1, "long_answer": 1, "truncated_image": 1,
                "picture_not_in_first_turn": 1}  # fmt: skip
    assert {reason: manifest.dropped.get(reason) for reason in expected} == expected
    assert manifest.rows_used >= 1


def test_the_first_question_of_a_conversation_counts(stage, prompts, tmp_path):
    turns = [
        ("human", "<image>\nDescribe the picture."),
        ("gpt", "A red star."),
        ("human", "And?"),
        ("gpt", "A blue ring."),
    ]
    lines = []
    for number, prompt in enumerate(read_prompts(prompts)[:4]):
        (tmp_path / f"{number}.png").write_bytes(prompt["images"][0]["bytes"])
        said = [{"from": who, "value": text} for who, text in turns]
        lines.append({"id": f"row{number}", "image": f"{number}.png", "conversations": said})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"wording": {"sequence": ["{ordinal} picture {question}"]}, "selection": EVERYTHING}
    _, pairs = run(stage, tmp_path / "out", data={"path": tmp_path / "rows.jsonl"}, **changes)
    for pair in pairs.values():
        assert message_text(pair.chosen) == pair.answer == "A red star."
        assert len(pair.prompt) == 1
        assert message_text(pair.prompt).endswith(" picture describe the picture.")


def test_a_lone_picture_has_no_distractors(stage, tmp_path):
    """The same bytes under two names are one picture."""
    for name in ("a", "b"):
        picture(0, (60, 60)).save(tmp_path / f"{name}.png")
    lines = [{"id": n, "image": f"{n}.png", "question": "What?", "answer": "A cat."} for n in ("a", "b")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(StoreError, match="2 too_few_pictures"):
        run(stage, tmp_path / "out", data={"path": tmp_path / "rows.jsonl"})


def test_boxes_are_left_out_of_composed_pictures(stage, tmp_path):
    lines = []
    for number, answer in enumerate(("At [0.1, 0.25, .5, 1] a cat.", "A cat [1].", "At [ 10,20,30,40 ] a dog.")):
        (tmp_path / f"{number}.png").write_bytes(world.png(world.scene("train_biased", number)))
        lines.append({"id": f"row{number}", "image": f"{number}.png", "question": "What?", "answer": answer})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"data": {"path": tmp_path / "rows.jsonl"}, "selection": EVERYTHING}
    manifest, _ = run(stage, tmp_path / "grid", **data, layouts={"sequence": 0.0, "grid": 1.0})
    assert manifest.dropped["names_a_box"] == 2
    manifest, _ = run(stage, tmp_path / "sequence", **data)
    assert "names_a_box" not in manifest.dropped


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        ({"sequence": {2: 0.0}}, "attention_on_target"),
        ({"least_perplexity": 1e9}, "too_certain"),
        ({"least_edit_distance": 1.1}, "near_reference"),
        ({"most_length_ratio": 0.5}, "length_ratio"),
    ],
)
def test_each_limit_drops_and_is_counted(stage, prompts, tmp_path, selection, reason):
    with pytest.raises(StoreError, match=f"mia_dpo made no row out of 4: 4 {reason}"):
        run(stage, tmp_path / "out", data={"path": prompts, "limit": 4}, selection=config.merge(EVERYTHING, selection))


def test_answers_cut_off_are_dropped(stage, prompts, tmp_path):
    with pytest.raises(StoreError, match="mia_dpo made no row out of 4: 4 cut_off"):
        run(stage, tmp_path / "out", data={"path": prompts, "limit": 4}, selection=EVERYTHING, max_new_tokens=3)


def test_perplexity_is_that_of_the_greedy_steps(finished):
    """exp(-mean log p_max) over the steps of a plain greedy `generate`, end of the answer included."""
    from prefalign import families
    from prefalign.engines.transformers import load_engine
    from prefalign.models import ModelConfig

    engine = load_engine(ModelConfig("scenes", device="cpu"))
    for pair in list(finished[2].values())[:3]:
        text = families.render(engine.processor, pair.prompt)
        pictures = [[open_image(image) for image in pair.images]]
        batch = engine.processor(text=[text], images=pictures, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = engine.model.generate(**batch, max_new_tokens=96, do_sample=False, output_logits=True,
                                        return_dict_in_generate=True)  # fmt: skip
        best = torch.stack([step[0].log_softmax(-1).max() for step in out.logits])
        assert pair.meta["perplexity"] == pytest.approx(math.exp(-best.mean()), abs=1e-3)
