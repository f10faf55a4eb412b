"""The pool of pictures: each once, bad ones left out, reused when finished and rebuilt when not."""

import json
import random

import pytest
from tiny_vlms import picture

from prefalign import pictures
from prefalign.images import encode_png, open_image, read_image, sha256
from prefalign.pictures import PicturePool, build_pool
from prefalign.sources import DataConfig


def row(number, image):
    return {"id": number, "image": image, "question": "What is it?"}


def write(folder, images, *, subfolder="photos", shift=0):
    (folder / subfolder).mkdir(parents=True, exist_ok=True)
    for number in range(4):
        picture(number + shift).save(folder / subfolder / f"{number}.png")
    lines = [json.dumps(row(number, image)) + "\n" for number, image in enumerate(images)]
    (folder / "rows.jsonl").write_text("".join(lines))
    return DataConfig(folder / "rows.jsonl", images=folder / subfolder)


def names(pool):
    """Which of the written pictures a pool holds, in its order."""
    known = {sha256(encode_png(picture(number))): number for number in range(40)}
    return [known[pool.digest(number)] for number in range(len(pool))]


def test_each_picture_is_kept_once_in_the_order_of_the_data(tmp_path):
    data = write(tmp_path, ["2.png", "0.png", "2.png", ["1.png", "0.png"], "3.png"])
    pool = build_pool(tmp_path / "pool", data)
    assert names(pool) == [2, 0, 1, 3]
    for number, name in enumerate((2, 0, 1, 3)):
        image = pool[number]
        assert image["bytes"] == (data.images / f"{name}.png").read_bytes()
        assert image["path"] == pool.digest(number)[:16] == sha256(image)[:16]
        assert pool.number_of(read_image(data.images / f"{name}.png")) == number
        assert open_image(image).tobytes() == picture(name).tobytes()
    assert pool.number_of(encode_png(picture(9))) is None
    assert (tmp_path / "pool" / "pictures.bin").stat().st_size == sum(len(pool[n]["bytes"]) for n in range(4))
    with pytest.raises(IndexError, match="picture 4 of a pool of 4; numbers go from 0 to 3"):
        pool[4]
    with pytest.raises(IndexError, match="picture -1 of a pool of 4"):
        pool[-1]


def test_numbers_are_found_among_many(tmp_path):
    """Digests are searched in sorted order, one that ends in a zero byte too."""
    images = [encode_png(picture(number, (8, 8))) for number in range(800)]
    digests = [sha256(image) for image in images]
    assert any(digest.endswith("00") for digest in digests)
    folder = tmp_path / "photos"
    folder.mkdir()
    order = list(range(800))
    random.Random(0).shuffle(order)
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(image["bytes"])
    lines = [json.dumps(row(place, f"{number}.png")) + "\n" for place, number in enumerate(order)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    pool = build_pool(tmp_path / "pool", DataConfig(tmp_path / "rows.jsonl", images=folder))
    assert [pool.number_of(images[number]) for number in order] == list(range(800))
    assert [pool.digest(place) for place in range(800)] == [digests[number] for number in order]
    assert [pool.digest(place) for place in pool.by_digest] == sorted(digests)


def test_what_cannot_be_read_is_left_out(tmp_path):
    data = write(tmp_path, ["0.png", "gone.png", "cut.png", None, {"path": 7}, 5, "text.png", "empty.png", "1.png"])
    whole = (data.images / "2.png").read_bytes()
    (data.images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (data.images / "text.png").write_text("no picture")
    (data.images / "empty.png").touch()
    with data.path.open("a") as stream:
        stream.write("not json\n[1, 2]\n" + json.dumps({"id": "x", "image": ["3.png", "gone.png"]}) + "\n")
    assert names(build_pool(tmp_path / "pool", data)) == [0, 1]


def test_paths_start_from_the_data_file_where_no_folder_is_named(tmp_path):
    write(tmp_path, ["photos/1.png", "photos/0.png"])
    assert names(build_pool(tmp_path / "pool", DataConfig(tmp_path / "rows.jsonl"))) == [1, 0]


def test_pictures_of_a_stages_folder(tmp_path):
    from prefalign.scenes import world
    from prefalign.scenes.export import export

    export(tmp_path / "prompts", split="train_biased", kind="caption", regime="seen", start=0, stop=3)
    pool = build_pool(tmp_path / "pool", DataConfig(tmp_path / "prompts"))
    assert [pool[number]["bytes"] for number in range(3)] == [
        world.png(scene) for scene in world.scenes("train_biased", 0, 3)
    ]


def test_a_finished_pool_is_taken_as_it_is_and_other_data_builds_another(tmp_path, monkeypatch):
    data = write(tmp_path, ["0.png", "1.png"])
    first = build_pool(tmp_path / "pool", data)
    read = []
    ours = pictures.sources.pictures_of
    monkeypatch.setattr(pictures.sources, "pictures_of", lambda *given: read.append(1) or ours(*given))
    again = build_pool(tmp_path / "pool", data)
    assert (names(again), read) == ([0, 1], [])
    assert again.fingerprint == first.fingerprint
    assert names(build_pool(tmp_path / "pool", DataConfig(data.path, data.images, limit=1))) == [0]
    assert read == [1]
    other = build_pool(tmp_path / "pool", write(tmp_path, ["3.png", "1.png"]))
    assert names(other) == [3, 1]
    assert other.fingerprint != first.fingerprint
    elsewhere = write(tmp_path, ["3.png", "1.png"], subfolder="others", shift=10)  # the same rows with other pictures
    assert names(build_pool(tmp_path / "pool", elsewhere)) == [13, 11]


def test_a_pool_that_was_killed_half_way_is_built_again(tmp_path, monkeypatch):
    data = write(tmp_path, ["0.png", "1.png", "2.png", "3.png"])
    opened = []

    def killed(image):
        opened.append(image)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return open_image(image)

    with monkeypatch.context() as patched:
        patched.setattr(pictures, "open_image", killed)
        with pytest.raises(KeyboardInterrupt):
            build_pool(tmp_path / "pool", data)
    assert not (tmp_path / "pool" / "pool.json").exists()
    assert names(build_pool(tmp_path / "pool", data)) == [0, 1, 2, 3]
    # killed while it was being replaced: what is left of the old one is not taken for it
    with monkeypatch.context() as patched:
        patched.setattr(pictures, "open_image", killed)
        opened.clear()
        with pytest.raises(KeyboardInterrupt):
            build_pool(tmp_path / "pool", DataConfig(data.path, data.images, limit=3))
    assert names(build_pool(tmp_path / "pool", data)) == [0, 1, 2, 3]
    assert names(PicturePool(tmp_path / "pool")) == [0, 1, 2, 3]


def test_a_full_disk_is_not_put_down_to_a_picture(tmp_path, monkeypatch):
    import errno

    data = write(tmp_path, ["0.png"])

    def broken(*given):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(pictures.sources, "pictures_of", broken)
    with pytest.raises(OSError, match="input/output error"):
        build_pool(tmp_path / "pool", data)


def test_data_without_any_picture_is_refused(tmp_path):
    data = write(tmp_path, ["gone.png", None])
    message = r"rows.jsonl holds no picture that can be opened.*Check the rows' picture paths and `data.images`"
    with pytest.raises(ValueError, match=message):
        build_pool(tmp_path / "pool", data)
