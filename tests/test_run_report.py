"""Reports of runs: the numbers given are those printed, curves, examples before and after."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from prefalign.evals import Item, Prediction, Scored, chair
from prefalign.evals.scoring import write_items
from prefalign.manifest import write_atomically
from prefalign.records import user_message
from prefalign.report.charts import histogram, line_chart, nice_ticks
from prefalign.report.comparison import number, write_comparison
from prefalign.report.examples import choose_examples
from prefalign.report.page import flattened
from prefalign.report.runs import write_run_report
from tests.report_page import Page, assert_self_contained, picture, pixels

TRUTH = {"a": ["cat"], "b": ["cat"], "c": ["cat", "dog"], "d": ["cat"], "x": ["cat"]}


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
