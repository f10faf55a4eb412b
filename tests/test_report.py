"""Reports: what is printed equals what is given, nothing is fetched, everything is escaped, the right picture is shown."""

from __future__ import annotations

import base64
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prefalign.images import encode_png
from prefalign.records import Pair, assistant_message, user_message
from prefalign.report.page import marked, thumbnail
from prefalign.report.pairs import write_pair_report
from prefalign.store import OutputConfig, write_records
from tests.report_page import Page, assert_self_contained, picture, pixels

ATTACK = "<script>alert('x')</script> <img src=x onerror=alert(1)> & \"quoted\" http://example.org/x"


def pair(
    number: int, *, chosen="a red cat", rejected="a blue cat", prompt="What is it?", images=None, **fields
) -> Pair:
    images = [picture("red")] if images is None else images
    return Pair(f"id{number:04d}", images, [user_message(prompt, len(images))], [assistant_message(chosen)],
                [assistant_message(rejected)], "bdhs", **fields)  # fmt: skip


def folder_of(pairs, folder: Path, **manifest) -> Path:
    write_records("bdhs", pairs, output=OutputConfig(path=folder), record=Pair, settings={"rho_th": 0.01}, seed=3)
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **manifest}))
    return folder


def page_of(pairs, tmp_path: Path, **fields) -> tuple[Page, str]:
    manifest = {key: fields.pop(key) for key in list(fields) if key != "limit"}
    html = write_pair_report(
        folder_of(pairs, tmp_path / "pairs", **manifest), tmp_path / "r.html", **fields
    ).read_text()
    return Page(html), html


def test_pair_report_is_well_formed_self_contained_and_has_both_themes(tmp_path):
    pairs = [pair(i, rejected_images=[picture("blue")] if i % 2 else [], margin=i / 3 - 1) for i in range(5)]
    page, html = page_of(pairs, tmp_path)
    assert_self_contained(page, html)
    assert "@media (prefers-color-scheme: dark)" in html
    assert "color-scheme: light dark" in html
    assert "width=device-width" in html
    assert len(page.all("article")) == 5


def test_script_may_run_under_the_pages_own_policy(tmp_path):
    import hashlib

    page, html = page_of([pair(0)], tmp_path)
    script = re.search(r"<script>(.*?)</script>", html, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_text_is_shown_and_never_run(tmp_path):
    fields = {"prompt": ATTACK, "chosen": f"c {ATTACK}", "rejected": f"r {ATTACK}", "answer": ATTACK}
    row = pair(0, **fields, meta={ATTACK: ATTACK, "flags": [ATTACK], "scores": {"chosen": ATTACK}}, facts={"k": ATTACK})
    page, html = page_of([row], tmp_path, dropped={ATTACK: 1}, rows_in=2)
    assert_self_contained(page, html)
    assert len(page.all("script")) == 1
    assert len(page.all("img")) == 1
    assert page.words.count(ATTACK) >= 5


def test_counts_add_up(tmp_path):
    pairs = [pair(i) for i in range(7)]
    page, _ = page_of(
        pairs,
        tmp_path,
        rows_in=12,
        rows_used=7,
        dropped={"too_similar": 3, "missing_image": 2},
        quarantined=2,
        models={"generator": "ab12"},
    )
    assert "12 in = 7 used + 5 dropped" in page.words
    for line in (
        "Dropped: too_similar 3",
        "Dropped: missing_image 2",
        "Of the dropped, in quarantine 2",
        "Pairs out 7",
    ):
        assert line in page.words
    assert "7 pairs made by bdhs from 12 rows; seed 3, generator ab12." in page.words
    assert page.all("p", "warning") == []


def test_counts_that_do_not_add_up_are_said(tmp_path):
    page, _ = page_of([pair(0), pair(1)], tmp_path, rows_in=9, dropped={"too_similar": 3}, rows_out=4, complete=False)
    assert "does not add up: 9 rows in, but 2 used and 3 dropped make 5." in page.words
    assert "The shards hold 2 pairs, the manifest says 4" in page.words
    assert "did not finish" in page.words


def test_each_card_shows_its_own_picture(tmp_path):
    def shown(colours, name):
        pairs = [pair(i, images=[picture(c)], rejected_images=[picture("white")]) for i, c in enumerate(colours)]
        page, _ = page_of(pairs, tmp_path / name)
        return [pixels(a["src"]) for a in page.all("img")]

    one, other = shown(["red", "blue"], "one"), shown(["blue", "red"], "two")
    assert np.abs(one[0] - [255, 0, 0]).max() <= 2  # red, its rejected white, blue, its rejected white
    assert np.abs(one[1] - 255).max() <= 2
    assert np.abs(one[2] - [0, 0, 255]).max() <= 2
    assert np.abs(one[0] - other[2]).max() == 0
    assert np.abs(one[0] - other[0]).max() > 200


def test_thumbnails_small_pictures_stay_pixels_and_large_ones_shrink():
    rng = np.random.default_rng(0)
    tiny = Image.fromarray(rng.integers(0, 255, (40, 64, 3), dtype=np.uint8))
    thumb = thumbnail(encode_png(tiny))
    assert (thumb.width, thumb.height, thumb.size, thumb.pixelated) == (128, 80, "64 x 40", True)
    assert pixels(thumb.uri).shape == (40, 64, 3)
    large = thumbnail(picture("green", (800, 400)))
    assert pixels(large.uri).shape == (80, 160, 3)
    assert (large.width, large.height, large.size, large.pixelated) == (128, 64, "800 x 400", False)
    flat = thumbnail(picture("green"))
    assert flat.uri.startswith("data:image/png")  # lossless where it costs nothing


def test_unreadable_picture_is_said_not_hidden(tmp_path):
    page, _ = page_of([pair(0, images=[{"bytes": b"garbage", "path": "x.png"}])], tmp_path)
    assert "cannot be shown: not_an_image" in page.words
    assert page.all("article")[0]["data-flags"] == "unreadable picture"
    assert "unreadable picture" in page.words


def test_word_difference_marks_the_right_words(tmp_path):
    _, html = page_of([pair(0, chosen="a red cat sits", rejected="a blue cat sits down")], tmp_path)
    card = html[html.index("<article") :]
    assert re.findall(r"<ins>(.*?)</ins>", card) == ["red"]
    assert re.findall(r"<del>(.*?)</del>", card) == ["blue", "down"]
    assert "3 words" not in card
    assert "4 words" in card
    assert "5 words" in card


def test_marked_pieces_join_and_find_invented_names():
    before, after = marked("A cat and two benches. A cat.", "A cat.", invented_before=["bench", "at"])
    assert "".join(piece.text for piece in before) == "A cat and two benches. A cat."
    assert "".join(piece.text for piece in after) == "A cat."
    assert [piece.text for piece in before if piece.invented] == ["benches"]
    assert not any(piece.changed or piece.invented for piece in after)


def test_an_added_sentence_is_marked_whole():
    before, after = marked("A cat. It sits. The end", "A cat. The end is near")
    assert "".join(piece.text for piece in before) == "A cat. It sits. The end"
    assert "".join(piece.text for piece in after) == "A cat. The end is near"
    assert [piece.text for piece in before if piece.changed] == ["It sits."]
    assert [piece.text for piece in after if piece.changed] == ["is near"]


@given(st.text("ab .!\n", max_size=30), st.text("ab .!\n", max_size=30))
def test_marked_pieces_always_join_to_their_texts(before, after):
    old, new = marked(before, after, invented_before=["a"])
    assert "".join(piece.text for piece in old) == before
    assert "".join(piece.text for piece in new) == after
    assert before != after or not any(piece.changed for piece in (*old, *new))
    kept = [" ".join("".join(p.text for p in side if not p.changed).split()) for side in (old, new)]
    assert kept[0].replace(" ", "") == kept[1].replace(" ", "")


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"chosen": "A red cat!", "rejected": "a red  cat"}, "identical"),
        ({"chosen": " ".join("abcdefghijklmnopqrstuvwxyz"), "rejected": " ".join("abcdefghijklmnopqrstuvwxyz") + " a"},
         "near-identical"),
        ({"chosen": "red cat", "rejected": "a blue cat"}, "short"),
        ({"chosen": "a red cat", "rejected": "a blue cat sits on a mat"}, "length ratio"),
        ({"chosen": " ", "rejected": "a blue cat"}, "empty"),
        ({"images": []}, "no picture"),
        ({"rejected_images": [picture("red")]}, "same rejected picture"),
        ({"meta": {"flags": {"guessed": True, "other": False}}}, "guessed"),
    ],
)  # fmt: skip
def test_flags(tmp_path, fields, flag):
    page, _ = page_of([pair(0, **fields), pair(1)], tmp_path)
    assert page.all("article")[0]["data-flags"] == flag
    assert page.all("article")[1]["data-flags"] == ""
    assert f"{flag.capitalize()}" in page.words
    assert "Flagged 1 50.0 % of the pairs" in page.words


def test_same_text_with_another_picture_is_no_flag(tmp_path):
    page, _ = page_of([pair(0, rejected="a red cat", rejected_images=[picture("blue")])], tmp_path)
    assert page.all("article")[0]["data-flags"] == ""


def test_limit_is_kept_the_sample_is_even_and_flagged_pairs_are_found(tmp_path):
    pairs = [pair(i, rejected="a red cat" if i == 33 else "a blue cat") for i in range(101)]
    page, _ = page_of(pairs, tmp_path, limit=10)
    shown = [int(a["data-number"]) for a in page.all("article")]
    assert shown == [1, 15, 30, 34, 44, 58, 72, 87, 101]  # 8 of 101 evenly (every 14.3), and the flagged one
    assert "9 of 101, evenly spaced, and 1 of them chosen because they are flagged" in page.words
    assert "Pairs 101" in page.words
    with pytest.raises(ValueError, match="limit is 0; a report shows at least one pair"):
        write_pair_report(tmp_path / "pairs", tmp_path / "r.html", limit=0)


def test_statistics_are_over_all_pairs(tmp_path):
    pairs = [pair(i, chosen="w " * (i + 3), rejected="v " * 4, margin=0.5, meta={"similarity": 0.9}) for i in range(4)]
    page, _ = page_of(pairs, tmp_path, limit=1)
    assert "Median words 4.5 / 4 chosen / rejected" in page.words  # 3 4 5 6 against 4 4 4 4
    assert "Chosen is longer 50.0 % rejected is longer: 25.0 %" in page.words
    for title in ("Length of the answers", "Similarity of chosen and rejected", "Margin"):
        assert title in page.words
    assert "chosen: 1 at 6 words" in page.words
    assert "rejected: 4 at 4 words" in page.words


def test_vocabulary_of_one_side(tmp_path):
    pairs = [pair(i, chosen="the cat sleeps", rejected="the cat sleeps beside dogs") for i in range(3)]
    page, _ = page_of([*pairs, pair(9, chosen="dogs run about", rejected="birds run about")], tmp_path)
    assert "Rejected beside +3 dogs +2 birds +1" in page.words


def test_scores_margin_and_settings_are_printed(tmp_path):
    meta = {
        "scores": {"judge": {"chosen": 7, "rejected": -2.5}},
        "settings": {"rho_th": 0.01},
        "data": "/home/me/secret/x.json",
    }
    page, html = page_of([pair(0, margin=-0.25, meta=meta)], tmp_path)
    assert "3 words \u00b7 judge 7" in page.words
    assert "3 words \u00b7 judge \u22122.5" in page.words
    assert "margin \u22120.25" in page.words
    assert "settings.rho_th 0.01" in page.words
    assert "/home/me" not in html
    assert ".../x.json" in page.words


def test_nothing_optional_is_needed(tmp_path):
    page, _ = page_of([pair(0)], tmp_path)
    assert page.all("article")[0]["data-margin"] == ""
    assert "Similarity of" not in page.words
    assert "No pair is flagged." in page.words


def test_missing_manifest_and_empty_folder_are_refused(tmp_path):
    folder = folder_of([pair(0)], tmp_path / "pairs")
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"pairs has no manifest.json, so what was dropped is not known: .*it resumes"):
        write_pair_report(folder, tmp_path / "r.html")
    (folder / "manifest.json").write_text(manifest)
    next(folder.glob("data/*.parquet")).unlink()
    with pytest.raises(ValueError, match=r"holds no data/\*.parquet shards"):
        write_pair_report(folder, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_output_may_be_a_folder(tmp_path):
    folder = folder_of([pair(0)], tmp_path / "pairs")
    assert write_pair_report(folder, folder) == folder / "report.html"


def test_two_hundred_small_noisy_pictures_stay_below_three_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    noisy = [encode_png(Image.fromarray(rng.integers(120, 200, (64, 64, 3), dtype=np.uint8))) for _ in range(200)]
    _, html = page_of([pair(i, images=[image], chosen="word " * 60) for i, image in enumerate(noisy)], tmp_path)
    assert html.count("<article") == 200
    assert len(html.encode()) < 3_000_000


def test_memory_does_not_grow_with_the_folder(tmp_path):
    bulk = np.random.default_rng(0).bytes(60_000)

    def peak(rows: int) -> int:
        images = [{"bytes": picture("red")["bytes"] + bulk, "path": None}]  # bytes after the end of a PNG are ignored
        folder = folder_of((pair(i, images=images) for i in range(rows)), tmp_path / str(rows))
        tracemalloc.start()
        write_pair_report(folder, tmp_path / "r.html", limit=20)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(64)  # templates and libraries are loaded
    assert peak(640) < peak(64) + 4_000_000  # the larger folder holds 35 MB more


def test_importing_the_package_is_light():
    import subprocess
    import sys

    code = "import prefalign.report, sys; print([m for m in ('torch', 'jinja2', 'PIL', 'pyarrow') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
