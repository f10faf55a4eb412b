"""Twins with known truth: each answer true of its own picture only, pictures that differ, layouts that stay in their split."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from prefalign.images import open_image
from prefalign.records import Pair, message_text
from prefalign.scenes import language, twins, world
from prefalign.scenes.export import export
from prefalign.store import StoreError, read_records
from prefalign.text import word_diff

SAMPLE = 256


@pytest.fixture(scope="module")
def contrasts():
    return [found for index in range(SAMPLE) if (found := twins.contrast(world.scene("train_biased", index)))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> list[Pair]:
    folder = tmp_path_factory.mktemp("twins") / "twins"
    assert export(folder, kind="twin", start=0, stop=48).rows_out == 48
    return list(read_records(folder, Pair))


def said_of(text: str, facts: dict) -> list[bool]:
    """Truth of each claim of a text, worked out apart from `twins.true_of`: mentions against objects, numbers against counts."""
    words = text.lower().rstrip(".").split()
    if "in the picture" in text and words[0] == "there":
        shape = language.parse(text)[0].shape
        number = {"no": 0}.get(words[2], language.NUMBERS.index(words[2]) if words[2] in language.NUMBERS else None)
        return [facts["counts"].get(shape, 0) == number]
    things = [(o["shape"], o["colour"], o["size"], o["place"]) for o in facts["objects"]]
    mentions = [(m.shape, m.colour, m.size, m.place) for m in language.parse(text)]
    return [any(all(a in (None, b) for a, b in zip(said, thing, strict=True)) for thing in things) for said in mentions]


def test_both_answers_are_true_of_their_own_picture_and_false_of_the_other(contrasts):
    assert len(contrasts) == SAMPLE
    for found in contrasts:
        facts = language.facts(found.scene), language.facts(found.twin)
        for answer, own, other in ((found.answer, *facts), (found.twin_answer, *facts[::-1])):
            assert said_of(answer, own)
            assert all(said_of(answer, own)), (answer, found.twin.id)
            assert not all(said_of(answer, other)), (answer, found.twin.id)
            assert twins.true_of(answer, own)
            assert not twins.true_of(answer, other)
            assert all(language.sentence_parses(sentence) for sentence in language.sentences(answer))


def test_every_category_is_there_and_two_pictures_really_differ(contrasts):
    shares = {name: sum(found.category == name for found in contrasts) / SAMPLE for name in twins.CATEGORIES}
    assert min(shares.values()) > 0.05, shares
    for found in contrasts:
        one, other = (np.asarray(world.draw(picture)).astype(int) for picture in (found.scene, found.twin))
        changed = (np.abs(one - other).max(axis=2) > 0).mean()
        assert np.abs(one - other).mean() / 255 > 0.002, found.twin.id
        assert changed < (0.6 if found.category == "left-right" else 0.35), found.twin.id


def test_answers_differ_in_one_place_only(contrasts):
    for found in contrasts:
        changes = word_diff(found.answer, found.twin_answer)
        gone = [text for op, text in changes if op == "removed"]
        assert len(gone) <= 2, (found.answer, found.twin_answer)
        assert sum(len(text.split()) for text in gone) <= 3, (found.answer, found.twin_answer)


@pytest.mark.parametrize("category", twins.CATEGORIES)
def test_what_each_category_changes(category, contrasts):
    """One object in one attribute; a count by one; or every place mirrored: columns 0, 1, 2 become 2, 1, 0."""
    for found in [found for found in contrasts if found.category == category][:12]:
        one, other = found.scene.objects, found.twin.objects
        if category == "count":
            assert abs(len(one) - len(other)) == 1
            continue
        assert len(one) == len(other)
        names = {"object": "shape", "colour": "colour", "size": "size", "position": "place"}
        if category == "left-right":
            assert [(thing.row, 2 - thing.column) for thing in one] == [(thing.row, thing.column) for thing in other]
            assert [thing.shape for thing in one] == [thing.shape for thing in other]
            continue
        changed = [
            (a, b)
            for a, b in zip(one, other, strict=True)
            if a != b and getattr(a, names[category]) != getattr(b, names[category])
        ]
        assert len(changed) == 1
        for name in ("shape", "colour", "size", "place"):
            assert (getattr(changed[0][0], name) != getattr(changed[0][1], name)) == (name == names[category])


def test_twins_keep_to_the_layouts_of_their_split():
    for split in ("train_biased", "test_fair"):
        for index in range(60):
            found = twins.contrast(world.scene(split, index))
            slot = zlib.crc32(repr(found.twin.layout).encode()) % world.SLOTS
            assert slot in world.SPLITS[split].slots


def test_seed_draws_another_contrast_of_the_same_scene():
    one, again, other = (twins.contrast(world.scene("train_fair", 5), seed) for seed in (0, 0, 3))
    assert one == again
    assert one != other
    assert one.scene == other.scene


def test_true_of_by_hand():
    facts = {"objects": [{"shape": "star", "colour": "red", "size": "small", "place": "top"},
                         {"shape": "star", "colour": "blue", "size": "large", "place": "left"}],
             "counts": {"star": 2}}  # fmt: skip
    true = ("There is a small red star at the top.", "There are two stars in the picture.", "The star is blue.",
            "There are no rings in the picture.", "The star is on the left.")  # fmt: skip
    false = ("There is a small blue star at the top.", "There is one star in the picture.", "The star is green.",
             "There are no stars in the picture.", "The star is red. The star is in the centre.")  # fmt: skip
    assert [twins.true_of(text, facts) for text in true] == [True] * 5
    assert [twins.true_of(text, facts) for text in false] == [False] * 5


def test_exported_pairs_hold_both_sides(exported):
    for pair in exported:
        pair.check()
        assert pair.method == "scenes_twin"
        assert pair.meta["category"] == pair.facts["category"] in twins.CATEGORIES
        own, other = pair.facts, pair.facts["rejected"]
        assert all(said_of(message_text(pair.chosen), own))
        assert all(said_of(message_text(pair.rejected), other))
        assert open_image(pair.images[0]).tobytes() != open_image(pair.rejected_images[0]).tobytes()
    assert len({pair.id for pair in exported}) == 48


def test_export_refuses_what_it_cannot_make(tmp_path: Path):
    with pytest.raises(ValueError, match="regime 'none' has no reference answers, and a twin's two answers"):
        export(tmp_path / "a", kind="twin", regime="none", start=0, stop=4)
    with pytest.raises(ValueError, match="rows 0 to 10001 are outside 'val_fair'"):
        export(tmp_path / "b", kind="twin", split="val_fair", start=0, stop=10_001)
    with pytest.raises(ValueError, match="unknown category of contrast 'shade'.*left-right"):
        twins.contrast(world.scene("val_fair", 0), category="shade")
    export(tmp_path / "c", kind="twin", start=0, stop=4)
    assert export(tmp_path / "c", kind="twin", start=0, stop=4).rows_out == 4
    with pytest.raises(StoreError, match="another config"):
        export(tmp_path / "c", kind="twin", start=0, stop=5)
