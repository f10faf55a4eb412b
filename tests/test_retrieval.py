"""Neighbours in a pool of pictures: worked similarities, ties, limits, resume."""

import json

import numpy as np
import pytest
from PIL import Image

from prefalign import retrieval
from prefalign.config import ConfigError, build
from prefalign.embeddings import Embedder
from prefalign.pictures import build_pool
from prefalign.retrieval import Neighbour, PictureIndex, RetrievalConfig, build_index
from prefalign.sources import DataConfig

ANGLES = (0, 10, 30, 60, 90, 200)
"""Directions of the pictures' vectors in degrees: cosines to the first are 1, 0.984808, 0.866025, 0.5, 0, -0.939693."""


class Compass:
    """An embedder that reads a direction off the first pixel: degrees are 2 x red + green. Counts what it was shown."""

    batch_size = 4

    def __init__(self, fingerprint="compass"):
        self.fingerprint = fingerprint
        self.seen = 0

    def embed(self, images):
        self.seen += len(images)
        angles = [np.radians(2 * image.getpixel((0, 0))[0] + image.getpixel((0, 0))[1]) for image in images]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], dtype=np.float32)


def pool_of(folder, angles, *, order=None):
    """A pool of plain pictures with these directions; blue tells pictures of one direction apart."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in order if order is not None else range(len(angles)):
        angle = angles[number]
        Image.new("RGB", (4, 4), (angle // 2, angle % 2, number)).save(folder / f"{number}.png")
        lines.append(json.dumps({"id": number, "image": f"{number}.png", "question": "?"}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return build_pool(folder / "pool", DataConfig(folder / "rows.jsonl"))


def index_of(folder, angles, **more):
    return build_index(folder / "vectors", pool_of(folder, angles, **more), Compass())


@pytest.fixture
def index(tmp_path):
    return index_of(tmp_path, ANGLES)


def test_neighbours_are_the_nearest_by_cosine_without_the_picture_itself(index):
    """cos 10 = 0.984808 is above the ceiling; cos 30, cos 60, cos 90, cos 200 follow."""
    (found,) = index.neighbours([0], RetrievalConfig(k=10))
    assert found == [Neighbour(2, 0.866025), Neighbour(3, 0.5), Neighbour(4, 0.0), Neighbour(5, -0.939693)]
    assert index.neighbours([0], RetrievalConfig(k=2)) == [found[:2]]
    assert index.neighbours([0], RetrievalConfig(k=2, ceiling=0.99))[0][0] == Neighbour(1, 0.984808)
    assert len(index) == 6


def test_floor_and_ceiling_are_where_they_say(index):
    """The floor is inside, the ceiling outside: 0.5 passes floor 0.5, 0.866025 fails ceiling 0.866025."""
    assert index.neighbours([0], RetrievalConfig(floor=0.5))[0] == [Neighbour(2, 0.866025), Neighbour(3, 0.5)]
    assert index.neighbours([0], RetrievalConfig(floor=0.51))[0] == [Neighbour(2, 0.866025)]
    assert index.neighbours([0], RetrievalConfig(floor=0.5, ceiling=0.866025))[0] == [Neighbour(3, 0.5)]
    assert index.neighbours([5], RetrievalConfig(floor=0.9)) == [[]]


def test_other_pictures_of_the_row_are_passed_over(index):
    found = index.neighbours([0, 0], RetrievalConfig(k=2), exclude=[{2}, set()])
    assert [[neighbour.number for neighbour in row] for row in found] == [[3, 4], [2, 3]]


def test_queries_do_not_depend_on_their_company(index):
    together = index.neighbours(list(range(6)), RetrievalConfig(k=3))
    assert together == [index.neighbours([number], RetrievalConfig(k=3))[0] for number in range(6)]
    assert index.neighbours([], RetrievalConfig()) == []


def test_against_plain_numpy(tmp_path, monkeypatch):
    """Random directions over several shards, and near-duplicates in plenty, so that the first search is not wide enough."""
    monkeypatch.setattr(retrieval, "BLOCK", 32)
    rng = np.random.default_rng(0)
    angles = [*rng.integers(0, 360, 60).tolist(), *rng.integers(40, 44, 60).tolist()]
    index = index_of(tmp_path, angles)
    assert sorted(file.name for file in (tmp_path / "vectors").glob("*.npy")) == [f"0000{n}.npy" for n in range(4)]
    config = RetrievalConfig(k=5, floor=0.2, ceiling=0.99)
    vectors = Compass().embed([Image.new("RGB", (1, 1), (angle // 2, angle % 2, 0)) for angle in angles]).astype(float)
    np.testing.assert_array_equal(index.vectors([0, 31, 32, 119]), vectors[[0, 31, 32, 119]].astype(np.float32))
    similarity = (vectors @ vectors.T).round(6)
    for query, found in enumerate(index.neighbours(range(120), config)):
        fit = [n for n in range(120) if n != query and 0.2 <= similarity[query, n] < 0.99]
        fit.sort(key=lambda n: (-similarity[query, n], index.pool.digest(n)))
        assert [neighbour.number for neighbour in found] == fit[:5]
        assert [neighbour.similarity for neighbour in found] == pytest.approx([similarity[query, n] for n in fit[:5]])


def test_ties_do_not_depend_on_the_order_of_the_rows(tmp_path):
    """Forty pictures at 30 degrees, k = 3: the three with the smallest digests, wherever they stand in the data."""
    angles = [0, *[30] * 40]
    found = []
    for name, order in (("one", range(41)), ("other", [*range(40, -1, -1)])):
        index = index_of(tmp_path / name, angles, order=order)
        query = index.pool.number_of(index.pool[list(order).index(0)])
        (row,) = index.neighbours([query], RetrievalConfig(k=3))
        found.append([index.pool.digest(neighbour.number) for neighbour in row])
    others = sorted(index.pool.digest(number) for number in range(40))  # number 40 is the picture that is asked about
    assert found[0] == found[1] == others[:3]


def test_another_picture_has_other_neighbours(tmp_path):
    before = index_of(tmp_path / "before", (0, 30, 60, 120)).neighbours([0], RetrievalConfig(k=1))
    swapped_query = index_of(tmp_path / "query", (110, 30, 60, 120)).neighbours([0], RetrievalConfig(k=1, ceiling=0.99))
    swapped_pool = index_of(tmp_path / "pool", (0, 100, 50, 120)).neighbours([0], RetrievalConfig(k=1))
    assert [before[0][0], swapped_query[0][0], swapped_pool[0][0]] == [
        Neighbour(1, 0.866025), Neighbour(3, 0.984808), Neighbour(2, 0.642788)
    ]  # fmt: skip


def test_a_killed_run_continues_with_the_embeddings_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", 8)
    angles = list(range(0, 300, 10))
    pool = pool_of(tmp_path, angles)

    class Killed(Compass):
        def embed(self, images):
            if self.seen >= 16:
                raise KeyboardInterrupt
            return super().embed(images)

    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "vectors", pool, Killed())
    assert [file.name for file in sorted((tmp_path / "vectors").glob("*.npy"))] == ["00000.npy", "00001.npy"]
    rest = Compass()
    index = build_index(tmp_path / "vectors", pool, rest)
    assert rest.seen == 30 - 16
    whole = build_index(tmp_path / "whole", pool, Compass())
    np.testing.assert_array_equal(index.vectors(range(30)), whole.vectors(range(30)))
    third = Compass()
    assert isinstance(build_index(tmp_path / "vectors", pool, third), PictureIndex)
    assert third.seen == 0


def test_another_embedder_or_pool_embeds_anew(tmp_path):
    pool = pool_of(tmp_path / "one", ANGLES)
    build_index(tmp_path / "vectors", pool, Compass())
    other = Compass("another")
    build_index(tmp_path / "vectors", pool, other)
    assert other.seen == 6
    smaller = Compass("another")
    index = build_index(tmp_path / "vectors", pool_of(tmp_path / "two", ANGLES[:3]), smaller)
    assert (smaller.seen, len(index)) == (3, 3)


def test_with_a_real_embedder(tiny_llava, tmp_path):
    from prefalign.models import ModelConfig, load_model, load_processor

    config = ModelConfig(str(tiny_llava), device="cpu")
    embedder = Embedder(load_model(config), load_processor(config).image_processor, feature="auto", batch_size=4)
    index = build_index(tmp_path / "vectors", pool_of(tmp_path, ANGLES), embedder)
    assert index.vectors([0]).shape == (1, 32)
    assert len(index.neighbours([0], RetrievalConfig(k=2, ceiling=1.01))[0]) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, r"k is 0; at least 1 neighbour is needed \(10 is published\)"),
        (
            {"floor": 0.98},
            "floor 0.98 and ceiling 0.97 are cosine similarities between which neighbours lie; no picture",
        ),
        ({"floor": -2.0}, "floor -2.0 and ceiling 0.97"),
    ],
)
def test_settings_that_find_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**values)
    with pytest.raises((ConfigError, ValueError), match=message):
        build(RetrievalConfig, values)
