"""The world: deterministic, splits apart, companions where they belong, twins that differ in one thing."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from prefalign.scenes import world
from prefalign.scenes.world import COMPANIONS, PLACES, SHAPES, SPLITS

SAMPLE = 300


@pytest.fixture(scope="module")
def sampled():
    return {split: list(world.scenes(split, 0, SAMPLE)) for split in SPLITS}


def test_a_picture_is_the_same_in_another_process():
    code = (
        "import hashlib\nfrom prefalign.scenes.world import png, scene\n"
        "print(hashlib.sha256(png(scene('val_fair', 7))).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert other == hashlib.sha256(world.png(world.scene("val_fair", 7))).hexdigest()


def test_split_index_and_seed_each_change_the_picture():
    pictures = [
        world.scene("val_fair", 7),
        world.scene("val_fair", 8),
        world.scene("test_fair", 7),
        world.scene("val_fair", 7, 1),
    ]
    assert len({world.png(picture) for picture in pictures}) == 4
    assert len({picture.id for picture in pictures}) == 4


def test_a_picture_is_60_pixels_wide_and_rgb():
    image = world.draw(world.scene("train_biased", 0))
    assert (image.size, image.mode) == ((60, 60), "RGB")


def test_splits_share_no_index_and_no_layout(sampled):
    ranges = [range(split.start, split.start + split.size) for split in SPLITS.values()]
    assert sum(map(len, ranges)) == len(set().union(*ranges))
    slots = [slot for split in SPLITS.values() for slot in split.slots]
    assert len(slots) == len(set(slots))
    owner: dict = {}
    for split, pictures in sampled.items():
        for picture in pictures:
            assert owner.setdefault(picture.layout, split) == split


def test_companions_are_near_always_there_in_biased_splits_by_chance_in_fair_ones_and_never_in_adversarial(sampled):
    assert all(COMPANIONS[COMPANIONS[shape]] == shape for shape in SHAPES)

    def company(split):
        pairs = [COMPANIONS[shape] in picture.shapes for picture in sampled[split] for shape in picture.shapes]
        return sum(pairs) / len(pairs)

    assert company("train_biased") > 0.85
    assert company("test_biased") > 0.85
    assert all(0.2 < company(split) < 0.45 for split in ("train_fair", "val_fair", "test_fair"))
    assert company("test_adversarial") == 0.0


def test_scenes_have_two_to_five_objects_at_different_places_some_faint_some_covered(sampled):
    things = [thing for picture in sampled["train_biased"] for thing in picture.objects]
    assert {len(picture.objects) for picture in sampled["train_biased"]} == {2, 3, 4, 5}
    assert all(len({thing.place for thing in p.objects}) == len(p.objects) for p in sampled["train_biased"])
    assert all(any(not thing.faint for thing in picture.objects) for picture in sampled["train_biased"])
    assert 0.3 < sum(thing.faint for thing in things) / len(things) < 0.45
    assert 0.05 < sum(thing.visible < 1 for thing in things) / len(things) < 0.3
    assert all(thing.visible >= world.LEAST_VISIBLE for thing in things)


def test_a_clear_object_stands_out_and_a_faint_one_hardly():
    bare = world.scene("train_biased", 3)
    thing = replace(bare.objects[-1], x=30.0, y=30.0, radius=12.0, shape="square", colour="blue", visible=1.0)

    def contrast(faint):
        drawn = np.asarray(world.draw(replace(bare, objects=(replace(thing, faint=faint),))), dtype=float)
        return np.abs(drawn[24:36, 24:36].mean((0, 1)) - np.array(world.BACKGROUND)).max()

    assert contrast(False) == pytest.approx(148, abs=6)  # blue's red channel: 186 - 38
    assert contrast(True) == pytest.approx(14.8, abs=6)


@pytest.mark.parametrize("kind", world.TWINS)
@pytest.mark.parametrize("index", range(6))
def test_a_twin_differs_in_exactly_one_thing_and_only_there(kind, index):
    origin = world.scene("train_biased", index)
    twin = world.twin(origin, kind)
    strip = [{replace(thing, visible=1.0) for thing in side.objects} for side in (origin, twin.scene)]
    lost, gained = strip[0] - strip[1], strip[1] - strip[0]
    assert (len(lost), len(gained)) == {"removed": (1, 0), "added": (0, 1), "changed": (1, 1)}[kind]
    assert (twin.before is not None, twin.after is not None) == (bool(lost), bool(gained))
    assert twin.scene.id != origin.id
    if kind == "changed":
        assert replace(twin.after, shape=twin.before.shape, visible=1.0) == replace(twin.before, visible=1.0)
    differs = np.argwhere((np.asarray(world.draw(origin)) != np.asarray(world.draw(twin.scene))).any(-1))
    assert len(differs) > 20
    thing = twin.after or twin.before
    reach = 1.1 * thing.radius + 2
    assert np.abs(differs - np.array([thing.y, thing.x])).max() <= reach


def test_a_twin_can_name_its_shape():
    origin = world.scene("test_adversarial", 0)
    shape = next(iter(origin.shapes))
    assert world.twin(origin, "added", shape=COMPANIONS[shape]).after.shape == COMPANIONS[shape]
    assert world.twin(origin, "removed", shape=shape).before.shape == shape
    assert world.twin(origin, "added", number=1) != world.twin(origin, "added", number=2)


def test_neighbours_are_alike_best_first_and_never_the_scene_itself():
    picture = world.scene("val_fair", 5)
    near = world.neighbours(picture, 4, pool=100)
    likeness = [world.likeness(picture, other) for other in near]
    assert likeness == sorted(likeness, reverse=True)
    assert picture not in near
    assert likeness[0] > world.likeness(picture, world.scene("val_fair", 6))


def test_multi_image_sets_start_at_the_index_and_wrap_round():
    last = SPLITS["val_fair"].size - 1
    assert [picture.index for picture in world.multi_image("val_fair", last, 3)] == [last, 0, 1]


def test_places_name_rows_and_columns():
    picture = world.scene("train_biased", 0)
    for thing in picture.objects:
        assert PLACES[3 * thing.row + thing.column] == thing.place
        assert abs(thing.x - (thing.column + 0.5) * 20) <= 3.01
        assert abs(thing.y - (thing.row + 0.5) * 20) <= 3.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: world.scene("train", 0),
            "unknown split 'train': the embedded world has train_biased, train_fair, val_fair",
        ),
        (
            lambda: world.scene("val_fair", 10_000),
            "index 10000 is outside split 'val_fair', whose indices run from 0 to 9999",
        ),
        (lambda: world.scene("val_fair", -1), "index -1 is outside split 'val_fair'"),
        (
            lambda: world.twin(world.scene("val_fair", 0), "moved"),
            "unknown kind of twin 'moved': a twin is one of removed, added",
        ),
        (
            lambda: world.twin(world.scene("val_fair", 0), shape="cube"),
            "unknown shape 'cube': the world has circle, square",
        ),
        (lambda: world.neighbours(world.scene("val_fair", 0), 0, pool=10), "k=0 neighbours of .*: ask for 1 to 9"),
        (
            lambda: world.multi_image("val_fair", 0, 0),
            "n=0 scenes for a multi-image set: split 'val_fair' allows 1 to 10000",
        ),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_twin_of_a_shape_that_is_not_there_is_an_error():
    picture = world.scene("val_fair", 0)
    absent = sorted(set(SHAPES) - picture.shapes)[0]
    with pytest.raises(ValueError, match=f"has no {absent} to make the 'removed' twin of: it has"):
        world.twin(picture, shape=absent)
