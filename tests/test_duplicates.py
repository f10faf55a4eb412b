"""Duplicates of pictures: leaders by worked distances, the search against brute force, benchmark lists and their gaps."""

import json
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from prefalign import duplicates
from prefalign.duplicates import (
    PictureKey,
    leaders,
    listed,
    perceptual_hash,
    picture_key,
    picture_name,
    read_picture_lists,
)
from prefalign.images import encode_png, sha256


def bits(*places):
    return sum(1 << place for place in places)


def photo(seed, size=(96, 64)):
    """A smooth picture, as photographs are: low frequencies carry most of it."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def test_leaders_by_hand():
    """0, 3 bits away, 6 bits away from the first (3 from the second), far away, and the second again; distance 3.

    The second joins the first. The third is 3 from the second, which leads nobody, and 6 from the first: it leads itself, so a
    chain of small steps does not join its ends. The fifth equals the second and joins the first.
    """
    hashes = [0, bits(0, 1, 2), bits(0, 1, 2, 3, 4, 5), bits(*range(40)), bits(0, 1, 2)]
    assert leaders(hashes, 3) == [0, 0, 2, 3, 0]
    assert leaders(hashes, 0) == [0, 1, 2, 3, 1]
    assert leaders(hashes, 6) == [0, 0, 0, 3, 0]
    assert leaders([], 3) == []


def test_the_first_in_order_leads_whatever_its_value():
    one, other = bits(63, 5), bits(63)
    assert leaders([one, other], 1) == [0, 0]
    assert leaders([other, one], 1) == [0, 0]


@pytest.mark.parametrize("distance", [0, 1, 4, 7, 8, 12])
def test_the_search_equals_comparing_all_with_all(distance):
    """Random hashes, half of them with up to 12 bits of another one flipped; both indices (up to 7 bits, and beyond)."""
    rng = random.Random(distance)
    hashes = [rng.getrandbits(64) for _ in range(150)]
    for _ in range(150):
        hashes.append(rng.choice(hashes) ^ bits(*rng.sample(range(64), rng.randint(0, 12))))
    found: list[int] = []
    for number, value in enumerate(hashes):
        near = (o for o in range(number) if found[o] == o and (hashes[o] ^ value).bit_count() <= distance)
        found.append(next(near, number))
    assert leaders(hashes, distance) == found
    assert len(set(found)) < len(hashes)


@pytest.mark.parametrize("distance", [-1, 17])
def test_distances_that_mean_nothing(distance):
    with pytest.raises(ValueError, match=f"max_distance is {distance}: of the 64 bits .* Take 0 for equal hashes"):
        leaders([1], distance)


def test_a_reencoded_and_a_resized_picture_are_near_and_another_is_not(tmp_path):
    picture = photo(0)
    picture.save(tmp_path / "worse.jpg", quality=60)
    versions = [picture, Image.open(tmp_path / "worse.jpg"), picture.resize((48, 32)), picture.filter(ImageFilter.BLUR)]
    hashes = [perceptual_hash(version) for version in versions] + [perceptual_hash(photo(1))]
    assert leaders(hashes, 4) == [0, 0, 0, 0, 4]
    assert all(value.bit_length() <= 64 for value in hashes)


@pytest.mark.parametrize(
    ("name", "mode", "key"),
    [
        ("COCO_val2014_000000310196.jpg", "coco", "coco 000000310196"),
        ("000000310196.jpg", "coco", "coco 000000310196"),
        ("coco/train2017/000000310196.jpg", "coco", "coco 000000310196"),
        ("COCO_val2014_000000310196.jpg", "none", None),
        ("image_1.png", "coco", None),
        ("image_1.png", "all", "image_1"),
        ("Image_1.PNG", "all", "image_1"),
        ("0000003101965.jpg", "coco", None),
    ],
)
def test_picture_names(name, mode, key):
    assert picture_name(name, mode) == key


def key_of(image, name=None):
    return picture_key({**encode_png(image), "path": name}, perceptual=True)


def test_every_kind_of_list_is_read_and_compared(tmp_path):
    """Bytes, perceptual hash and name each find their picture alone; a picture that is on no list is never found."""
    folder = tmp_path / "benchmark"
    folder.mkdir()
    photo(0).save(folder / "a.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 cut")
    (tmp_path / "hashes.txt").write_text(f"{perceptual_hash(photo(1)):016x}\n{sha256(encode_png(photo(2)))}\n\n")
    (tmp_path / "names.txt").write_text("COCO_val2014_000000000003.jpg\n")
    pope = {"question_id": 1, "image": "COCO_val2014_000000000004.jpg", "text": "Is there a dog?", "label": "no"}
    (tmp_path / "pope.json").write_text(json.dumps(pope) + "\n" + json.dumps({**pope, "image": "x.png"}) + "\n")
    coco = {"images": [{"file_name": "COCO_val2014_000000000005.jpg", "id": 5}], "annotations": [{"image_id": 5}]}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(coco))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"images": ["beside.png"]}))
    photo(6).save(tmp_path / "beside.png")
    files = [
        folder,
        *(tmp_path / name for name in ("hashes.txt", "names.txt", "pope.json", "captions_val2014.json", "rows.jsonl")),
    ]
    known = read_picture_lists(files)
    pictures = {
        "same bytes as in a folder": (0, "other.png"),
        "perceptual hash in a list": (1, None),
        "digest in a list": (2, None),
        "COCO name in a text list": (103, "000000000003.jpg"),
        "COCO name in POPE's file": (104, "COCO_train2014_000000000004.jpg"),
        "COCO name in annotations": (105, "COCO_val2014_000000000005.jpg"),
        "file beside a list": (6, None),
        "on no list": (107, "COCO_val2014_000000000009.jpg"),
    }
    keys = [key_of(photo(seed), name) for seed, name in pictures.values()]
    assert dict(zip(pictures, listed(keys, known, names="coco", max_distance=4), strict=True)) == {
        name: name != "on no list" for name in pictures
    }
    assert listed([key_of(photo(0).resize((48, 32)))], known, names="coco", max_distance=4) == [True]
    plain = read_picture_lists([folder], perceptual=False)
    assert not plain.hashes
    assert listed([key_of(photo(0).resize((48, 32)))], plain, names="coco", max_distance=4) == [False]
    assert listed([PictureKey("0", None, "x.png")], known, names="all", max_distance=0) == [False]
    everything = read_picture_lists([tmp_path / "pope.json"], names="all")
    assert listed([PictureKey("0", None, "X.jpg")], everything, names="all", max_distance=0) == [True]


def test_lists_are_the_same_whatever_the_order_of_their_files(tmp_path):
    (tmp_path / "a.txt").write_text("COCO_val2014_000000000003.jpg\n")
    (tmp_path / "b.txt").write_text("0" * 64 + "\n")
    one = read_picture_lists([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert one.fingerprint == read_picture_lists([tmp_path / "b.txt", tmp_path / "a.txt"]).fingerprint
    assert one.fingerprint != read_picture_lists([tmp_path / "a.txt"]).fingerprint
    assert len(one) == 2


def test_lists_that_would_leave_the_gate_open(tmp_path):
    with pytest.raises(
        ValueError, match=r"contamination list .*gone\.txt' does not exist, so nothing could be compared"
    ):
        read_picture_lists([tmp_path / "gone.txt"])
    (tmp_path / "names.txt").write_text("dog_1.jpg\n")
    with pytest.raises(ValueError, match=r"names\.txt' holds nothing to compare with \(names: coco\).*need names: all"):
        read_picture_lists([tmp_path / "names.txt"])
    assert read_picture_lists([tmp_path / "names.txt"], names="all").names == {"dog_1"}
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"cut\.json' is not complete JSON .*pictures would be missed"):
        read_picture_lists([tmp_path / "cut.json"])


def test_a_list_given_twice_is_no_error(tmp_path):
    (tmp_path / "a.txt").write_text("COCO_val2014_000000000003.jpg\n")
    assert len(read_picture_lists([tmp_path / "a.txt", tmp_path / "a.txt"])) == 1


def test_large_sets_are_searched_in_parts(monkeypatch):
    monkeypatch.setattr(duplicates, "_CHUNK", 3)
    assert leaders([bits(n % 5, 20 + 4 * (n % 5)) for n in range(17)], 1) == [n % 5 for n in range(17)]
