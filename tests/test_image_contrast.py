"""The stage image_contrast: what it adds, what it leaves alone, what it drops and counts."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prefalign import bundled, config
from prefalign.images import encode_png, open_image, sha256
from prefalign.manifest import read_manifest
from prefalign.negatives import Negative, negative_seed, spoil
from prefalign.records import Pair, Prompt, message_text, user_message
from prefalign.store import OutputConfig, StoreError, read_records, write_records
from tests.tiny_vlms import picture
from tests.training_runs import make_pair

KINDS = ("crop", "diffusion", "blur", "mask", "blank", "swap")
STAGE = bundled.load_stage("image_contrast")


def plain(number: int, images: int = 1) -> Pair:
    return replace(
        make_pair(number, images), rejected_images=[], facts={"n": number}, margin=0.5, meta={"scores": {"a": number}}
    )


def write(folder: Path, pairs: list, record=Pair) -> Path:
    write_records("test", pairs, output=OutputConfig(folder), record=record, settings={"n": len(pairs)}, seed=0)
    return folder


def run(data: Path, output: Path, *, block_size: int = 3, **settings):
    values = {"data": {"path": data}, "output": {"path": output, "block_size": block_size}, **settings}
    manifest = STAGE.main(config.build(STAGE.Config, values))
    assert manifest.rows_in == manifest.rows_used + sum(manifest.dropped.values())
    return manifest, {pair.meta["parent"]: pair for pair in read_records(output, Pair)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "pairs", [plain(number) for number in range(8)])


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_get_a_picture_and_keep_everything_else(kind, data, tmp_path):
    manifest, pairs = run(data, tmp_path / "out", negative={"kind": kind})
    assert (manifest.rows_out, manifest.dropped) == (8, {})
    for number in range(8):
        before, pair = plain(number), pairs[f"pair-{number}"]
        pair.check()
        for name in ("images", "prompt", "chosen", "rejected", "answer", "facts", "margin"):
            assert getattr(pair, name) == getattr(before, name), name
        assert pair.method == "image_contrast"
        assert (pair.meta["kind"], pair.meta["existing"]) == (kind, "none")
        assert (pair.meta["parent_method"], pair.meta["parent_meta"]) == ("test", {"scores": {"a": number}})
        own, other = open_image(pair.images[0]), open_image(pair.rejected_images[0])
        assert own.size == other.size
        assert pair.meta["change"][0] > 0.004
        if kind != "swap":
            seed = pair.meta["negative_seeds"][0]
            assert seed == negative_seed(0, before.id, 0)
            assert other.tobytes() == spoil(own, Negative(kind=kind), seed=seed).tobytes()
    assert len({pair.id for pair in pairs.values()}) == 8


def test_crop_boxes_are_noted_as_shares_of_the_picture(data, tmp_path):
    """Pictures are 40 x 48: the box in pixels, cut out and enlarged, is the stored picture."""
    _, pairs = run(data, tmp_path / "out")
    for pair in pairs.values():
        (x, y, w, h) = pair.meta["crop_box"][0]
        assert 0 < w * h <= 0.2
        left, top, width, height = round(x * 40), round(y * 48), round(w * 40), round(h * 48)
        part = open_image(pair.images[0]).crop((left, top, left + width, top + height))
        enlarged = part.resize((40, 48), Image.Resampling.BILINEAR)
        assert enlarged.tobytes() == open_image(pair.rejected_images[0]).tobytes()


def test_block_size_order_and_resume_change_no_row(data, tmp_path):
    for kind in ("crop", "swap"):
        settings = {"negative": {"kind": kind}}
        _, pairs = run(data, tmp_path / kind, **settings)
        rows = {name: pair.to_row() for name, pair in pairs.items()}
        _, alone = run(data, tmp_path / f"{kind}-alone", block_size=1, **settings)
        assert {name: pair.to_row() for name, pair in alone.items()} == rows
        backwards = write(tmp_path / f"{kind}-data", [plain(number) for number in range(7, -1, -1)])
        _, turned = run(backwards, tmp_path / f"{kind}-turned", **settings)
        assert {name: pair.to_row() for name, pair in turned.items()} == rows
        shutil.copytree(tmp_path / kind, tmp_path / f"{kind}-cut")
        for file in ("manifest.json", "progress/00001.json", "data/train-00001.parquet"):
            (tmp_path / f"{kind}-cut" / file).unlink()
        manifest, again = run(data, tmp_path / f"{kind}-cut", **settings)
        assert {name: pair.to_row() for name, pair in again.items()} == rows
        assert manifest == read_manifest(tmp_path / kind)


def test_another_seed_or_setting_is_another_row_and_another_folder(data, tmp_path):
    _, base = run(data, tmp_path / "out")
    with pytest.raises(StoreError, match="another config"):
        run(data, tmp_path / "out", seed=1)
    for name, change in {"seed": {"seed": 1}, "area": {"negative": {"area": [0.01, 0.1]}}}.items():
        _, pairs = run(data, tmp_path / name, **change)
        assert not {pair.id for pair in pairs.values()} & {pair.id for pair in base.values()}
        assert pairs["pair-0"].rejected_images != base["pair-0"].rejected_images


@pytest.mark.parametrize("kind", ["crop", "diffusion", "blur", "mask"])
def test_swapping_pictures_changes_what_is_made_of_them(kind, data, tmp_path):
    """Rows keep their ids, and so their draws; only the pictures are others."""
    shifted = [replace(plain(number), images=plain((number + 1) % 8).images) for number in range(8)]
    _, pairs = run(data, tmp_path / "a", negative={"kind": kind})
    _, others = run(write(tmp_path / "data", shifted), tmp_path / "b", negative={"kind": kind})
    for name, pair in pairs.items():
        assert others[name].meta["negative_seeds"] == pair.meta["negative_seeds"]
        assert others[name].rejected_images != pair.rejected_images


def test_swap_shows_a_picture_of_another_row(tmp_path):
    pairs = [plain(number, images=2) for number in range(6)]
    _, made = run(write(tmp_path / "data", pairs), tmp_path / "out", negative={"kind": "swap"})
    known = {sha256(image): image for pair in pairs for image in pair.images}
    for pair in made.values():
        own = {sha256(image) for image in pair.images}
        assert len(pair.meta["swapped_sha256"]) == 2
        for digest, shown in zip(pair.meta["swapped_sha256"], pair.rejected_images, strict=True):
            assert digest not in own
            wanted = open_image(known[digest])
            assert open_image(shown).tobytes() == wanted.resize(wanted.size).tobytes()
    assert len({digest for pair in made.values() for digest in pair.meta["swapped_sha256"]}) > 3


def test_swap_stretches_the_other_picture_to_the_size_of_the_row_s(tmp_path):
    pairs = [replace(plain(number), images=[encode_png(picture(number, size))])
             for number, size in enumerate(((64, 30), (30, 64)))]  # fmt: skip
    _, made = run(write(tmp_path / "data", pairs), tmp_path / "out", negative={"kind": "swap"})
    assert open_image(made["pair-0"].rejected_images[0]).size == (64, 30)
    assert open_image(made["pair-0"].rejected_images[0]).tobytes() == picture(1, (30, 64)).resize((64, 30)).tobytes()


def test_swapped_pictures_of_a_row_are_all_different(tmp_path):
    """Five pictures: a row of two draws two of three others, which would be the same one for every third seed."""
    pairs = [plain(0, images=2), plain(1, images=2), plain(2)]
    data = write(tmp_path / "data", pairs)
    for seed in range(16):
        _, made = run(data, tmp_path / str(seed), negative={"kind": "swap"}, seed=seed)
        assert all(len(set(pair.meta["swapped_sha256"])) == len(pair.images) for pair in made.values())
    few = write(tmp_path / "few", [plain(0, images=2), plain(2)])
    manifest, made = run(few, tmp_path / "one", negative={"kind": "swap"})
    assert (manifest.dropped, set(made)) == ({"no_other_picture": 1}, {"pair-2"})


def test_swap_draws_by_digest(tmp_path):
    """The picture at the drawn place of all pictures in the order of their digests; of two, the row's own is drawn over."""
    _, made = run(write(tmp_path / "data", [plain(n) for n in range(8)]), tmp_path / "out", negative={"kind": "swap"})
    digests = sorted(sha256(plain(number).images[0]) for number in range(8))
    for name, pair in made.items():
        rng = random.Random(negative_seed(0, name, 0))
        drawn = next(found for _ in range(99) if (found := digests[rng.randrange(8)]) != sha256(pair.images[0]))
        assert pair.meta["swapped_sha256"] == [drawn]


def test_which_first_leaves_the_other_pictures_as_they_were(tmp_path):
    data = write(tmp_path / "data", [plain(number, images=3) for number in range(3)])
    _, made = run(data, tmp_path / "first", negative={"which": "first"})
    for pair in made.values():
        assert pair.rejected_images[1:] == pair.images[1:]
        assert pair.rejected_images[0] != pair.images[0]
        assert len(pair.meta["change"]) == len(pair.meta["crop_box"]) == 1
    _, made = run(data, tmp_path / "all")
    assert all(
        one != other for pair in made.values() for one, other in zip(pair.images, pair.rejected_images, strict=True)
    )


def test_pictures_that_pairs_have_are_replaced_or_kept(tmp_path):
    facts = {"n": 1, "rejected": {"objects": []}, "category": "colour"}
    data = write(
        tmp_path / "data", [replace(make_pair(0), facts=facts), replace(plain(1), facts={"category": "colour"})]
    )
    _, made = run(data, tmp_path / "replace")
    assert made["pair-0"].facts == {"n": 1}  # the others were facts of the picture that is gone
    assert made["pair-1"].facts == {"category": "colour"}
    assert (made["pair-0"].meta["two_sided"], made["pair-1"].meta["two_sided"]) == (False, False)
    assert made["pair-0"].meta["existing"] == "replaced"
    assert made["pair-0"].rejected_images != make_pair(0).rejected_images
    _, made = run(data, tmp_path / "keep", existing="keep")
    assert made["pair-0"].rejected_images == make_pair(0).rejected_images
    assert (made["pair-0"].meta["kind"], made["pair-0"].meta["existing"]) == ("kept", "kept")
    assert made["pair-0"].facts == facts
    assert "two_sided" not in made["pair-0"].meta
    assert made["pair-1"].meta["kind"] == "crop"


def test_every_dropped_row_is_counted(tmp_path):
    """A grey picture cropped, blurred or swapped for its like shows what it showed; a broken one is quarantined."""
    grey = [encode_png(Image.new("RGB", (50, 40), (128, 128, 128)))]
    nearly = np.full((40, 50, 3), 128, dtype=np.uint8)
    nearly[::2] += 1  # one level of 255 in every other row: 0.002 at most, below least_change
    whole = picture(3)
    broken = {"bytes": encode_png(whole)["bytes"][:200], "path": "cut.png"}
    pairs = [plain(0), replace(plain(1), images=grey), replace(plain(2), images=[encode_png(Image.fromarray(nearly))]),
             plain(3, images=0), replace(plain(4), images=[broken])]  # fmt: skip
    data = write(tmp_path / "data", pairs)
    manifest, made = run(data, tmp_path / "out")
    assert (set(made), manifest.rows_in) == ({"pair-0"}, 5)
    assert manifest.dropped == {"unchanged": 2, "no_picture": 1, "truncated_image": 1}
    assert manifest.quarantined == 1
    manifest, made = run(data, tmp_path / "all", least_change=0.0)
    assert set(made) == {"pair-0", "pair-2"}
    alone = write(tmp_path / "alone", [replace(plain(0), images=plain(1).images), plain(1)])
    with pytest.raises(StoreError, match="made no row out of 2: 2 no_other_picture"):
        run(alone, tmp_path / "swap", negative={"kind": "swap"})


def test_rows_with_one_answer_become_image_only_pairs(tmp_path):
    prompts = [Prompt(f"p{n}", [encode_png(picture(n))], [user_message("What is it?", 1)], answer)
               for n, answer in enumerate(("A cat.", None, " "))]  # fmt: skip
    manifest, made = run(write(tmp_path / "data", prompts, Prompt), tmp_path / "out", reads="answers")
    assert manifest.dropped == {"no_reference": 2}
    pair = made["p0"]
    pair.check()
    assert message_text(pair.chosen) == message_text(pair.rejected) == pair.answer == "A cat."
    assert pair.rejected_images
    assert pair.meta["same_text"] is True
    with pytest.raises(StoreError, match="3 missing_column.*First message: .*image_contrast with `--reads answers`"):
        run(tmp_path / "data", tmp_path / "pairs")


def test_pairs_of_one_text_are_noted(tmp_path):
    """The visual term can use them; their note tells them from the others."""
    same = replace(plain(1), rejected=plain(1).chosen)
    _, made = run(write(tmp_path / "data", [plain(0), same]), tmp_path / "out")
    assert [made[f"pair-{number}"].meta["same_text"] for number in range(2)] == [False, True]


def test_rows_of_other_formats_are_read(tmp_path):
    picture(1).save(tmp_path / "a.png")
    rows = [{"idx": 7, "question": "What is it?", "image": "a.png", "chosen": "A cat.", "rejected": "A dog."},
            {"idx": 8, "question": "What is it?", "image": "a.png", "chosen": "A cat."}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest, made = run(tmp_path / "rows.jsonl", tmp_path / "out", negative={"kind": "mask"})
    assert manifest.dropped == {"missing_column": 1}
    assert message_text(made["7"].rejected) == "A dog."


@pytest.mark.parametrize("name", ["image_contrast", "image_contrast_scenes"])
def test_configs_are_the_published_ones(name):
    built = config.load(STAGE.Config, bundled.find(f"datagen/{name}"))
    assert (built.negative.kind, built.negative.area, built.negative.aspect) == ("crop", [0.01, 0.2], [3 / 4, 4 / 3])
    assert built.negative.least_side == (10 if name.endswith("scenes") else 28)


def test_a_difference_that_no_picture_can_have(tmp_path):
    with pytest.raises(ValueError, match="least_change is 1.0; give a difference from 0 up to 1"):
        config.build(STAGE.Config, {"data": {"path": "x"}, "output": {"path": "y"}, "least_change": 1.0})
