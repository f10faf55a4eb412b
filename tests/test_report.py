"""Reports: what is printed equals what is given, nothing is fetched, everything is escaped, the right picture is shown."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prefalign.evals import Item, Prediction, Scored, chair
from prefalign.evals.scoring import write_items
from prefalign.images import EncodedImage, encode_png
from prefalign.manifest import write_atomically
from prefalign.records import Pair, assistant_message, user_message
from prefalign.report.charts import histogram, line_chart, nice_ticks
from prefalign.report.comparison import number, write_comparison
from prefalign.report.examples import choose_examples
from prefalign.report.page import flattened, marked, thumbnail
from prefalign.report.pairs import write_pair_report
from prefalign.report.runs import write_run_report
from prefalign.store import OutputConfig, write_records

VOID = {"meta", "img", "input", "br", "link", "hr"}
ATTACK = "<script>alert('x')</script> <img src=x onerror=alert(1)> & \"quoted\" http://example.org/x"


class Page(HTMLParser):
    """Walks a page: checks nesting, collects elements with their attributes and text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice on <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and css in (a.get("class") or "")]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def picture(colour, size=(64, 64)) -> EncodedImage:
    return encode_png(Image.new("RGB", size, colour))


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


def pixels(uri: str) -> np.ndarray:
    head, content = uri.split(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), dtype=float)


def page_of(pairs, tmp_path: Path, **fields) -> tuple[Page, str]:
    manifest = {key: fields.pop(key) for key in list(fields) if key != "limit"}
    html = write_pair_report(
        folder_of(pairs, tmp_path / "pairs", **manifest), tmp_path / "r.html", **fields
    ).read_text()
    return Page(html), html


def assert_self_contained(page: Page, html: str) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "srcset", "href", "xlink:href", "action", "poster", "data", "background"):
            value = attributes.get(name)
            if tag == "a" and value is not None:
                assert not re.match(r"[a-z]+:|/", value)
            elif value is not None:
                assert value.startswith("data:image/"), f"<{tag} {name}={value[:60]!r}>"
        assert not [name for name in attributes if name.startswith("on")]
        assert "url(" not in (attributes.get("style") or "")
    style, script = (re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)[1] for tag in ("style", "script"))
    for word in ("http:", "https:", "@import", "url(", "src="):
        assert word not in style
    for word in ("http:", "https:", "fetch(", "import", "XMLHttpRequest", "innerHTML"):
        assert word not in script
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")


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


def estimate(value, half=0.01):
    return {"value": value, "ci95": [value - half, value + half]}


RESULTS = {
    "base": {"chair_i": estimate(0.231), "recall": estimate(0.634), "objects_per_caption": estimate(2.71, 0.05),
             "odd": estimate(7.0)},
    "aligned": {"chair_i": estimate(0.158), "recall": estimate(0.619), "objects_per_caption": estimate(2.42, 0.05)},
    "sft_control": {"chair_i": estimate(0.216), "recall": estimate(0.664)},
    "difference": {"chair_i": estimate(-0.073), "recall": estimate(-0.015), "objects_per_caption": estimate(-0.29, 0.05)},
    "difference_sft": {"chair_i": estimate(-0.009), "recall": estimate(0.03)},
}  # fmt: skip
HISTORY = [
    {"step": 1, "loss": 0.69, "rewards/margins": 0.0, "logps/chosen": -20.0, "logps/rejected": -22.0},
    {"step": 2, "loss": float("nan"), "rewards/margins": 0.4, "logps/chosen": -21.0, "logps/rejected": -30.0},
    {"step": 3, "loss": 0.5, "rewards/margins": 0.9},
    {"step": 3, "eval_loss": 0.55},
    {"step": 3, "train_runtime": 9.0},
]


def comparison(tmp_path, **fields) -> tuple[Page, str]:
    given = {"title": "A run", "summary": "It helped.", "results": RESULTS, "histories": {"DPO": HISTORY}, **fields}
    html = write_comparison(tmp_path / "run.html", **given).read_text()
    return Page(html), html


def test_run_report_prints_the_results_given(tmp_path):
    page, html = comparison(tmp_path)
    assert_self_contained(page, html)
    words = page.words
    assert words.startswith("A run Alignment run A run It helped.")
    columns = "Metric Base Aligned Aligned \u2212 base SFT control SFT control \u2212 base"
    chair = ("Invented objects (CHAIRi) \u2193 lower is better 23.1 % 22.1 to 24.1 15.8 % 14.8 to 16.8 "
             "\u22127.3 points \u22128.3 to \u22126.3 better 21.6 % 20.6 to 22.6 "
             "\u22120.9 points \u22121.9 to +0.1 no clear change")  # fmt: skip
    recall = ("Objects found (recall) \u2191 higher is better 63.4 % 62.4 to 64.4 61.9 % 60.9 to 62.9 "
              "\u22121.5 points \u22122.5 to \u22120.5 worse 66.4 % 65.4 to 67.4 +3.0 points +2.0 to +4.0 better")  # fmt: skip
    count = (
        "Objects per caption 2.71 2.66 to 2.76 2.42 2.37 to 2.47 \u22120.29 \u22120.34 to \u22120.24 less not measured"
    )
    for line in (columns, chair, recall, count, "odd 7.00 6.99 to 7.01 not measured"):
        assert line in words


def test_only_an_interval_without_zero_has_a_colour(tmp_path):
    _, html = comparison(tmp_path)
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    assert re.findall(r'class="(good|bad) strong">([^<]*)<', table) == [
        ("good", "\u22127.3\u00a0points"),
        ("bad", "\u22121.5\u00a0points"),
        ("good", "+3.0\u00a0points"),
    ]


@pytest.mark.parametrize(
    ("value", "fields", "text"),
    [
        (-0.0725, {"share": True, "signed": True}, "\u22127.2"),
        (0.0, {"share": True, "signed": True}, "+0.0"),
        (0.231, {"share": True}, "23.1"),
        (2.714, {"share": False}, "2.71"),
        (0.0123, {"share": False, "signed": True}, "+0.0123"),
        (None, {"share": True}, "not defined"),
        (float("nan"), {"share": True}, "not defined"),
    ],
)
def test_numbers_as_text(value, fields, text):
    assert number(value, **fields) == text


def test_curves_are_drawn_and_broken_values_are_said(tmp_path):
    page, _ = comparison(tmp_path)
    for title in ("Loss", "Reward margin", "Log-probability of the answers", "1 value not finite"):
        assert title in page.words
    assert "training: 0.9 at step 3" in page.words
    assert "held out: 0.55 at step 3" in page.words
    assert "rejected: \u221230 at step 2" in page.words
    chart = line_chart("Loss", {"training": [(1, 0.69), (2, float("nan")), (3, 0.5)]})
    assert chart.series[0]["path"].count("M") == 2
    assert line_chart("Loss", {"training": [(1, float("inf"))]}) is None
    low, high = (dot["y"] for dot in chart.series[0]["dots"])
    assert low < high  # 0.69 stands above 0.5


def test_run_without_curves_control_or_intervals(tmp_path):
    bare = {"base": {"chair_i": {"value": 0.2, "ci95": None}}, "aligned": {"chair_i": {"value": None, "ci95": None}}}
    page, _ = comparison(tmp_path, results=bare, histories={"DPO": [{"step": 1}]})
    assert "20.0 % not measured" in page.words
    assert "No curve was logged." in page.words
    assert "SFT control" not in page.words


def test_run_report_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(ValueError, match=r"results have no aligned \(they have base\)"):
        comparison(tmp_path, results={"base": RESULTS["base"]})
    for address in ("https://example.org/x", "/home/me/x.html", "javascript:alert(1)"):
        with pytest.raises(ValueError, match="is not relative to the report"):
            comparison(tmp_path, links={"pairs": address})


def test_nice_ticks_and_histogram_by_hand():
    assert nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(-0.2, 0.3) == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2, 0.3])
    assert nice_ticks(5, 5) == [5]
    chart = histogram("t", {"a": {1: 2, 2: 4}, "b": {2: 1}}, x_label="words", whole=True)
    assert [bar["title"] for bar in chart.series[0]["bars"]] == ["a: 2 at 1 words", "a: 4 at 2 words"]
    assert [bar["title"] for bar in chart.series[1]["bars"]] == ["b: 1 at 2 words"]
    heights = [bar["height"] for bar in chart.series[0]["bars"]]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.05)
    assert histogram("t", {"a": {}}, x_label="words") is None


def evaluation(folder: Path, answers: dict[str, str], colour: str | None = None) -> Path:
    """An evaluation's folder as the evals write it, scored by CHAIR against `TRUTH`."""
    words = chair.vocabulary({name: [name] for name in ("cat", "dog", "bird")})
    predictions, scored = [], []
    for key, text in answers.items():
        item = Item("chair", key, key, [], [user_message("Describe it.")], truth=frozenset(TRUTH[key]))
        predictions.append(Prediction("chair", key, key, "Describe it.", text, picture=f"pictures/{key}.png"))
        scored.append(chair.score(item, predictions[-1], words))
        if colour:
            write_atomically(folder / f"pictures/{key}.png", picture(colour if key == "a" else "white")["bytes"])
    predictions.append(Prediction("yesno", "a", "a", "Is there a cat?", "Yes."))
    scored.append(Scored("chair", "z", "z", "error"))
    rows = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in predictions)
    write_atomically(folder / "predictions.jsonl", rows.encode())
    write_items(folder / "items.jsonl", scored)
    results = {"model": "m", "fingerprint": "ab12", "settings": {}, "notes": ["1 reply was empty."]}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


TRUTH = {"a": ["cat"], "b": ["cat"], "c": ["cat", "dog"], "d": ["cat"], "x": ["cat"]}
BEFORE = {"a": "A cat and a dog and a bird.", "b": "A cat.", "c": "A cat and a dog.", "d": "A cat."}
AFTER = {"a": "A cat.", "b": "A cat and dogs.", "c": "A cat.", "d": "A cat."}


def test_examples_are_chosen_by_rule(tmp_path):
    found = choose_examples(evaluation(tmp_path / "base", BEFORE), evaluation(tmp_path / "after", AFTER))
    assert [example.id for example in found.better] == ["a"]
    assert [example.id for example in found.worse] == ["b", "c"]  # one more invented; then one fewer found
    assert (found.fewer, found.more, found.same) == (1, 1, 2)
    assert (found.better[0].invented_before, found.better[0].invented_after) == (["dog", "bird"], [])
    assert (found.worse[1].recalled_before, found.worse[1].recalled_after) == (["cat", "dog"], ["cat"])
    assert found.better[0].image is None
    assert found.better[0].prompt == "Describe it."


def test_examples_refuse_folders_that_do_not_match(tmp_path):
    one = evaluation(tmp_path / "one", BEFORE)
    with pytest.raises(ValueError, match=r"share no scored caption \(4 and 1 of them\)"):
        choose_examples(one, evaluation(tmp_path / "two", {"x": "A cat."}))
    (one / "items.jsonl").unlink()
    with pytest.raises(ValueError, match="items.jsonl is not there: examples need the answers of both models"):
        choose_examples(one, tmp_path / "two")


def run_folders(tmp_path: Path, colour: str) -> Path:
    run = tmp_path / "aligned"
    run.mkdir(parents=True)
    (run / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY[:1]}))
    (run / "prefalign_config.yaml").write_text(f"beta: 0.1\noutput: {tmp_path}\n")
    evaluations = {
        "base": evaluation(tmp_path / "e/base", BEFORE, colour),
        "aligned": evaluation(tmp_path / "e/a", AFTER),
    }
    return write_run_report(tmp_path / "report.html", results={**RESULTS, "verdict": "It helped."}, runs={"aligned": run},
                            evaluations=evaluations, config={"seed": 5}, pairs_report="pairs.html")  # fmt: skip


def test_run_report_from_folders(tmp_path):
    html = run_folders(tmp_path / "one", "red").read_text()
    page = Page(html)
    assert_self_contained(page, html)
    for line in ("It helped.", "Of 4 answers, 1 invent fewer objects than before, 1 invent more and 2 as many",
                 "invents dog, bird", "Base: 1 reply was empty.", "beta 0.1", "seed 5", "training: 0.69 at step 1"):  # fmt: skip
        assert line in page.words
    assert [a["href"] for a in page.all("a")] == ["pairs.html"]
    assert str(tmp_path) not in html
    assert html.count("<mark>dogs</mark>") == 1
    shown = [pixels(a["src"]) for a in page.all("img")]
    assert np.abs(shown[0] - [255, 0, 0]).max() <= 2
    swapped = Page(run_folders(tmp_path / "two", "blue").read_text())
    assert np.abs(shown[0] - pixels(swapped.all("img")[0]["src"])).max() > 200


def test_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trainer_state.json is not there, so that run did not finish"):
        write_run_report(tmp_path / "r.html", results=RESULTS, runs={"aligned": tmp_path}, evaluations={}, config={})


def test_settings_are_flattened_in_order():
    values = {"b": {"y": 1, "x": None}, "a": [1.5, True], "empty": {}, "where": Path("/srv/me/data")}
    assert flattened(values) == [
        ("b.y", "1"),
        ("b.x", "none"),
        ("a", "1.5, yes"),
        ("empty", "none"),
        ("where", ".../data"),
    ]


def test_importing_the_package_is_light():
    import subprocess
    import sys

    code = "import prefalign.report, sys; print([m for m in ('torch', 'jinja2', 'PIL', 'pyarrow') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
