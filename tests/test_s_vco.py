"""The stage s_vco: which counterfactual pairs are kept, by their texts and by their pictures."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from prefalign import bundled, config
from prefalign.images import encode_png, open_image
from prefalign.manifest import read_manifest
from prefalign.records import Pair, assistant_message, message_text, user_message
from prefalign.report.pairs import write_pair_report
from prefalign.scenes import twins, world
from prefalign.scenes.export import export
from prefalign.store import OutputConfig, StoreError, read_records, write_records
from tests.tiny_vlms import picture

STAGE = bundled.load_stage("s_vco")


def run(data: Path, output: Path, *, block_size: int = 16, **changes):
    changes |= {"data": {"path": data}, "output": {"path": output, "block_size": block_size}}
    values = config.merge(config.read_yaml(bundled.configs()["datagen/s_vco_scenes"]), changes)
    manifest = STAGE.main(config.build(STAGE.Config, values))
    assert manifest.rows_in == manifest.rows_used + sum(manifest.dropped.values())
    return manifest, {pair.meta["parent"]: pair for pair in read_records(output, Pair)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """48 twins, the first exported and then filtered."""
    folder = tmp_path_factory.mktemp("s_vco")
    export(folder / "twins", kind="twin", start=0, stop=48)
    run(folder / "twins", folder / "pairs")
    return folder


def pair(chosen: str, rejected: str, asked: str = "Describe the picture.", **more) -> Pair:
    return Pair(id="p", images=[encode_png(picture(1))], rejected_images=[encode_png(picture(2))], method="test",
                prompt=[user_message(asked, 1)], chosen=[assistant_message(chosen)],
                rejected=[assistant_message(rejected)], **more)  # fmt: skip


def as_tiff(image):
    stream = io.BytesIO()
    open_image(image).save(stream, "TIFF")
    return {"bytes": stream.getvalue(), "path": "a.tif"}


def write(folder: Path, pairs: list[Pair]) -> Path:
    named = [replace(one, id=f"p{number}") for number, one in enumerate(pairs)]
    write_records("test", named, output=OutputConfig(folder), record=Pair, settings={}, seed=0)
    return folder


@pytest.mark.parametrize(
    ("chosen", "rejected", "asked", "fault"),
    [
        ("A red cat.", "A blue cat.", "What is it?", None),
        ("Two dogs play.", "Three dogs play.", "How many dogs play?", None),
        ("There is one star.", "There are two stars.", "How many stars are there?", None),
        ("The cat is left of the dog.", "The dog is left of the cat.", "Where is the cat?", None),
        ("It is on the box.", "It is under the box.", "Where is the box in the picture?", None),
        ("Yes, it is red.", "No, it is blue.", "Is it red?", None),
        ("It is red.", "It is blue.", "Is it red or blue?", None),
        ("A red cat.", "a red cat", "What is it?", "identical_texts"),
        ("A man is there.", "The man is here.", "Who is there?", "no_content_difference"),
        ("The red car waits.", "The blue car waits.", "What does the red car do?", "query_leaks"),
        ("A woman sings.", "A man sings.", "What do the women do?", "query_leaks"),
        ("There is one man.", "There are three men.", "How many men are there?", None),
        ("There are two women.", "There is one woman.", "How many women are there?", None),
        ("There is one person.", "There are four people.", "How many people are in the picture?", None),
        ("One child plays.", "Two children play.", "How many children are there?", None),
        ("One puppy.", "Three puppies.", "How many puppies are there?", None),
        ("There is one bus.", "There are two buses.", "How many buses are there?", None),
        ("One knife.", "Two knives.", "How many knives are on the table?", None),
        ("One house.", "Five houses.", "How many houses are there?", None),
        ("Three men.", "Three women.", "How many men are there?", "query_leaks"),
        ("The dog is in the box.", "The dog is under the box.", "Is the dog in the box or under the box?", None),
        ("The cat is in a box.", "The cat is on a box.", "What is in the picture?", None),
        ("The dog is in the box.", "The dog is under the box.", "What is the dog under the box?", "query_leaks"),
        ("She is running.", "He is running.", "Who is running?", None),
        ("She is running.", "He is running.", "What is she doing?", "query_leaks"),
        ("A man walking a dog.", "A man walking with a dog.", "What is the man doing?", None),
        ("He plays with a ball.", "He kicks a ball.", "What is he doing with the ball?", None),
    ],
)
def test_texts(chosen, rejected, asked, fault):
    assert STAGE.text_fault(pair(chosen, rejected, asked)) == fault


def test_singular_and_plural_have_one_stem():
    plurals = {"star": "stars", "box": "boxes", "cross": "crosses", "glass": "glasses", "dish": "dishes", "bus": "buses",
               "house": "houses", "horse": "horses", "vase": "vases", "goose": "geese", "man": "men", "woman": "women",
               "snowman": "snowmen", "person": "people", "child": "children", "puppy": "puppies", "movie": "movies",
               "tie": "ties", "knife": "knives", "leaf": "leaves", "glove": "gloves", "giraffe": "giraffes", "tomato": "tomatoes",
               "shoe": "shoes", "mouse": "mice", "foot": "feet", "bench": "benches", "bee": "bees", "toy": "toys"}  # fmt: skip
    for singular, plural in plurals.items():
        assert STAGE.stems([singular]) == STAGE.stems([plural]), singular
    assert len(STAGE.stems([*plurals, "two"])) == len(plurals) + 1  # no two of them are taken for one
    assert STAGE.stems(["bus", "glass", "stars", "puppies"]) == {"bus", "glass", "star", "puppy"}


def test_texts_are_held_against_the_truth_where_facts_tell_it():
    found = twins.contrast(world.scene("train_fair", 3), category="colour")
    one, two = found.answer, found.twin_answer
    shared = next(thing for thing in found.scene.objects if thing in found.twin.objects)
    both = f"There is a {shared.size} {shared.colour} {shared.shape} {twins.at(shared.place)}."
    from prefalign.scenes.language import facts

    known = {"facts": {**facts(found.scene), "rejected": facts(found.twin)}}
    assert STAGE.text_fault(pair(one, two, **known)) is None
    assert STAGE.text_fault(pair(two, one, **known)) == "false_of_its_picture"
    assert STAGE.text_fault(pair(both, two, **known)) == "true_of_both"


def test_twins_are_kept_with_both_sides_and_their_similarities(folder):
    manifest = read_manifest(folder / "pairs")
    pairs = list(read_records(folder / "pairs", Pair))
    given = {one.id: one for one in read_records(folder / "twins", Pair)}
    assert manifest.rows_in == 48
    assert 40 <= manifest.rows_out == len(pairs) < 48
    assert set(manifest.dropped) <= {"pictures_look_alike", "pictures_unrelated"}
    assert manifest.config["settings"]["two_sided"] is True
    for one in pairs:
        one.check()
        before = given[one.meta["parent"]]
        for name in ("images", "rejected_images", "prompt", "chosen", "rejected", "facts"):
            assert getattr(one, name) == getattr(before, name), name
        meta = one.meta
        assert one.method == "s_vco"
        assert meta["two_sided"] is True
        assert meta["category"] == before.facts["category"]
        assert meta["encoders"] == manifest.models
        assert meta["filter_skipped"] == (meta["category"] == "left-right")
        if not meta["filter_skipped"]:
            assert meta["semantic_similarity"] > 0.95
            assert meta["visual_similarity"] < 0.998
        removed, added = meta["contrast"]
        assert all(text in message_text(one.chosen) for text in removed)
        assert all(text in message_text(one.rejected) for text in added)
        assert removed != added


def test_every_kept_text_is_true_of_its_own_picture_only(folder):
    for one in read_records(folder / "pairs", Pair):
        own, other = one.facts, one.facts["rejected"]
        chosen, rejected = message_text(one.chosen), message_text(one.rejected)
        assert [twins.true_of(chosen, own), twins.true_of(chosen, other)] == [True, False]
        assert [twins.true_of(rejected, other), twins.true_of(rejected, own)] == [True, False]


def test_block_and_batch_size_and_resume_change_no_row(folder, tmp_path):
    rows = {one.id: one.to_row() for one in read_records(folder / "pairs", Pair)}
    small = {"model_name_or_path": "scenes", "device": "cpu", "batch_size": 3}
    _, again = run(folder / "twins", tmp_path / "b", block_size=7,
                   filter={"semantic": {**small, "feature": "max"}, "visual": {**small, "feature": "cls"}})  # fmt: skip
    assert {one.id: one.to_row() for one in again.values()} == rows
    shutil.copytree(folder / "pairs", tmp_path / "cut")
    for file in ("manifest.json", "progress/00002.json", "data/train-00002.parquet"):
        (tmp_path / "cut" / file).unlink()
    manifest, again = run(folder / "twins", tmp_path / "cut")
    assert {one.id: one.to_row() for one in again.values()} == rows
    assert manifest == read_manifest(folder / "pairs")
    with pytest.raises(StoreError, match="another config"):
        run(folder / "twins", tmp_path / "cut", filter={"most_visual": 0.9})


def test_swapped_pictures_change_the_verdict(folder, tmp_path):
    """The same texts with the twin of another scene: unrelated pictures are dropped, and so are pictures that look alike."""
    given = [replace(one, facts={"category": one.facts["category"]}) for one in read_records(folder / "twins", Pair)]
    given = [one for one in given if one.facts["category"] != "left-right"]
    swapped = [replace(one, rejected_images=given[number - 1].rejected_images) for number, one in enumerate(given)]
    manifest, kept = run(write(tmp_path / "a", swapped), tmp_path / "b")
    assert manifest.dropped["pictures_unrelated"] >= 0.8 * len(given)
    noisier = []
    for one in given[:8]:
        image = open_image(one.images[0])
        image.putpixel((0, 0), (0, 0, 0))
        noisier.append(replace(one, rejected_images=[encode_png(image)]))
    assert len(kept) < 0.2 * len(given)
    with pytest.raises(StoreError, match="made no row out of 8: 8 pictures_look_alike"):
        run(write(tmp_path / "c", noisier), tmp_path / "d")


def test_flips_and_a_null_filter_keep_what_the_filter_would_drop(folder, tmp_path):
    given = [replace(one, rejected_images=one.images[:1]) for one in read_records(folder / "twins", Pair)][:4]
    with pytest.raises(StoreError, match="4 same_picture"):
        run(write(tmp_path / "same", given), tmp_path / "x")
    again = [replace(one, rejected_images=[as_tiff(image) for image in one.images]) for one in given]
    again = [replace(one, facts={**one.facts, "category": "left-right"}) for one in again]
    assert all(one.images[0]["bytes"] != one.rejected_images[0]["bytes"] for one in again)
    with pytest.raises(StoreError, match="4 same_picture"):
        run(write(tmp_path / "encoded", again), tmp_path / "y")
    pairs = [pair("A red cat.", "A blue cat.", facts={"category": "left-right"}), pair("A red cat.", "A blue cat.")]
    manifest, made = run(write(tmp_path / "a", pairs), tmp_path / "b", filter={"least_semantic": 1.0})
    assert manifest.dropped == {"pictures_unrelated": 1}
    assert made["p0"].meta["filter_skipped"]
    assert made["p0"].meta["semantic_similarity"] < 1
    manifest, made = run(tmp_path / "a", tmp_path / "c", filter=None)
    assert (manifest.rows_out, manifest.models) == (2, {})
    assert made["p1"].meta["semantic_similarity"] is None
    assert made["p1"].meta["category"] == "unknown"


def test_your_own_pairs_in_the_layout_of_mvc(tmp_path):
    """Picture files beside a JSON; every row that cannot be used is counted under its reason."""
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    row = {"system_prompt": "Be brief.", "instruction_prompt": "What colour is the cat?", "chosen_images": ["0.png"],
           "chosen_response": "The cat is red.", "rejected_images": ["1.png"], "rejected_response": "The cat is blue.",
           "category": "attribute"}  # fmt: skip
    bad = [{**row, "rejected_response": "the cat is red"}, {**row, "rejected_images": []}, {**row, "rejected_images": ["9.png"]},
           {**row, "instruction_prompt": "What does the red cat do?"}, {**row, "rejected_images": ["0.png"]},
           {**row, "chosen_images": [], "rejected_images": []}, {**row, "rejected_images": ["1.png", "2.png"]}]  # fmt: skip
    (tmp_path / "mvc.json").write_text(json.dumps([{"id": n, **entry} for n, entry in enumerate([row, *bad])]))
    manifest, made = run(tmp_path / "mvc.json", tmp_path / "out", filter={"least_semantic": -1.0, "most_visual": 1.0})
    assert manifest.dropped == {"identical_texts": 1, "no_rejected_picture": 1, "missing_image": 1, "query_leaks": 1,
                                "same_picture": 1, "no_picture": 1, "placeholder_mismatch": 1}  # fmt: skip
    assert set(made) == {"0"}
    assert made["0"].meta["category"] == "attribute"
    assert made["0"].prompt[0]["role"] == "system"
    assert made["0"].rejected_images[0]["bytes"] == (tmp_path / "1.png").read_bytes()


def test_spoilt_pictures_are_not_two_sided(folder, tmp_path):
    """image_contrast takes the place of the twin: nothing it knew of the twin is left, and the pairs are refused here."""
    contrast = bundled.load_stage("image_contrast")
    values = {"data": {"path": folder / "twins"}, "output": {"path": tmp_path / "crops"}}
    contrast.main(config.build(contrast.Config, values))
    for one in read_records(tmp_path / "crops", Pair):
        assert not {"rejected", "category"} & set(one.facts)
        assert one.meta["two_sided"] is False
    with pytest.raises(StoreError, match="48 not_two_sided"):
        run(tmp_path / "crops", tmp_path / "x")
    contrast.main(config.build(contrast.Config, {**values, "output": {"path": tmp_path / "kept"}, "existing": "keep"}))
    kept = {one.meta["parent"]: one for one in read_records(tmp_path / "kept", Pair)}
    assert all(kept[one.id].facts == one.facts for one in read_records(folder / "twins", Pair))
    assert run(tmp_path / "kept", tmp_path / "y")[0].rows_out == read_manifest(folder / "pairs").rows_out


def test_of_several_pictures_the_least_alike_pair_counts(tmp_path):
    one = pair("A red cat.", "A blue cat.")
    same = replace(one, images=[one.images[0]] * 2, rejected_images=[one.images[0], one.rejected_images[0]],
                   prompt=[user_message("What is it?", 2)])  # fmt: skip
    _, made = run(
        write(tmp_path / "a", [one, same]), tmp_path / "b", filter={"least_semantic": -1.0, "most_visual": 1.0}
    )
    assert made["p0"].meta["visual_similarity"] == made["p1"].meta["visual_similarity"] < 1


def test_the_report_says_that_the_pairs_are_two_sided(folder, tmp_path):
    said = "Two-sided: each rejected answer is true of the rejected picture"
    assert said in write_pair_report(folder / "pairs", tmp_path / "report.html").read_text()
    assert said not in write_pair_report(folder / "twins", tmp_path / "other.html").read_text()


def test_config_is_the_published_one():
    built = config.load(STAGE.Config, bundled.find("datagen/s_vco"))
    assert (built.filter.least_semantic, built.filter.most_visual) == (0.7, 0.5)
    assert built.filter.semantic.model_name_or_path == "google/siglip-so400m-patch14-384"
    assert (built.filter.visual.model_name_or_path, built.filter.visual.feature) == ("facebook/dinov2-large", "cls")
    assert built.filter.exempt == ["left-right"]
