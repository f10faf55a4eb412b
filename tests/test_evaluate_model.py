"""The evaluation recipe end to end, on a tiny random LLaVA and files in the benchmarks' formats, and on scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prefalign import bundled, config
from prefalign.engines import Completion
from prefalign.evals import Item, Scored, asking, reliance, scoring, summary
from prefalign.records import user_message
from tests.launching import TORCHRUN, start

DRAWS = ["--draws", "200"]


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("evaluate_model")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Four pictures with CHAIR, POPE and short-answer files about them."""
    folder = tmp_path_factory.mktemp("benchmark")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    names = [f"{n}.png" for n in range(4)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / "images" / name)
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)  # noqa: E731
    (folder / "synonyms.txt").write_text(
        "person, man\nbench, pew\ndog, puppy\ncat, kitten\nbicycle, bike\ncar\ntruck\n"
    )
    (folder / "chair.jsonl").write_text(lines({"image_id": n, "image": name} for n, name in enumerate(names)))
    categories = [{"id": 1, "name": "bench"}, {"id": 2, "name": "person"}, {"id": 3, "name": "bicycle"}]
    annotations = [
        {"image_id": 0, "category_id": 1},
        {"image_id": 1, "category_id": 2},
        {"image_id": 1, "category_id": 3},
    ]
    instances = {"images": [{"id": n} for n in range(4)], "categories": categories, "annotations": annotations}
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(json.dumps({"annotations": [{"image_id": 0, "caption": "A puppy."}]}))
    captions = [
        "A dog and a cat sit on a wooden bench next to a man.",
        "A man on his bike rides past a car, another car and a truck.",
    ]
    (folder / "generated.jsonl").write_text(lines({"image_id": n, "caption": text} for n, text in enumerate(captions)))
    asked = [("dog", "yes"), ("dog", "no"), ("cat", "no"), ("cat", "yes")]
    questions = [
        {"question_id": n, "image": name, "text": f"Is there a {thing}?", "label": label}
        for n, (name, (thing, label)) in enumerate(zip(names, asked, strict=True))
    ]
    (folder / "pope.json").write_text(lines(questions))
    answers = [
        {"question": row["text"], "answer": text}
        for row, text in zip(questions, ["Yes", "No.", "Yes", "maybe"], strict=True)
    ]
    (folder / "answers.jsonl").write_text(lines(answers))
    short = [
        {"id": n, "image": name, "question": "What colour?", "answer": "red", "kind": "colour"}
        for n, name in enumerate(names)
    ]
    (folder / "short.jsonl").write_text(lines(short))
    return folder


def files_of(folder: Path, **changes) -> dict:
    sections = {
        "chair": {"questions": folder / "chair.jsonl", "images": folder / "images", "synonyms": folder / "synonyms.txt",
                  "instances": [folder / "instances.json"], "captions": [folder / "captions.json"]},
        "pope": {"questions": [folder / "pope.json"], "images": folder / "images"},
        "short": {"questions": folder / "short.jsonl", "images": folder / "images"},
    }  # fmt: skip
    return config.merge(sections, changes)


def evaluate(stage, output: Path, model: Path | None = None, **settings):
    values = {
        "asking": {"max_new_tokens": 4, "short_answer_tokens": 2, "block_size": 3},
        "draws": 100,
        "output": output,
        **settings,
    }
    if model is not None:
        values["model"] = {"model_name_or_path": str(model), "device": "cpu"}
    return stage.main(config.build(stage.Config, values))


@pytest.fixture(scope="module")
def finished(stage, benchmark, tiny_llava, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation") / "base"
    return output, evaluate(stage, output, tiny_llava, files=files_of(benchmark))


def test_files_of_every_benchmark(finished):
    output, results = finished
    asked = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    # 4 captions, 4 + 4 questions, and these 8 under three conditions
    assert len(asked) == 4 + 8 + 8 * 3
    assert {"eval", "id", "group", "prompt", "text", "picture"} <= asked[0].keys()
    assert (output / asked[0]["picture"]).is_file()
    items = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    assert [row["eval"] for row in items] == ["chair"] * 4 + ["yesno"] * 4 + ["attributes"] * 4 + ["reliance"] * 8
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    metrics = results["metrics"]
    for name in ("chair_i", "chair_s", "recall", "words_per_caption", "objects_per_caption", "accuracy", "yesno_f1", "yes_ratio",
                 "yesno_strict_accuracy", "attribute_accuracy.colour", "reliance", "reliance_blank", "reliance_noise",
                 "logprob_drop_blank"):  # fmt: skip
        assert metrics[name].keys() >= {"value", "ci95", "n"}, name
    assert "recall_clear" not in metrics
    assert metrics["accuracy"]["n"] == 8
    assert results["counts"]["yesno"]["n"] == 4
    assert results["constant_answers"]["yesno"]["always_yes"]["accuracy"] == 0.5
    assert results["fingerprint"] == results["settings"]["fingerprint"] != ""


def test_rerun_asks_nothing_and_interrupted_run_ends_the_same(
    stage, benchmark, tiny_llava, finished, tmp_path, monkeypatch
):
    output, _ = finished
    whole = (output / "predictions.jsonl").read_text()
    for name in ("settings.json", "predictions.jsonl"):
        (tmp_path / name).write_text((output / name).read_text())
    lines = whole.splitlines(keepends=True)
    broken = json.loads(lines[2]) | {"error": "out of memory", "finish_reason": "error", "text": ""}
    (tmp_path / "predictions.jsonl").write_text(
        "".join([*lines[:2], json.dumps(broken) + "\n", *lines[3:9]]) + lines[9][:25]
    )
    asked = []
    original = asking._ask_block
    monkeypatch.setattr(
        asking, "_ask_block", lambda engine, block, *rest: asked.extend(block) or original(engine, block, *rest)
    )
    evaluate(stage, tmp_path, tiny_llava, files=files_of(benchmark))
    assert len(asked) == len(lines) - 8
    again = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for row, was in zip(again, map(json.loads, lines), strict=True):
        assert (row["eval"], row["id"], row["text"], row["shown"]) == (
            was["eval"],
            was["id"],
            was["text"],
            was["shown"],
        )
        assert row["logp"] == (None if was["logp"] is None else pytest.approx(was["logp"], abs=1e-3))
    asked.clear()
    evaluate(stage, tmp_path, tiny_llava, files=files_of(benchmark))
    assert asked == []


def test_folder_of_other_settings_is_refused(stage, benchmark, tiny_llava, finished):
    with pytest.raises(ValueError, match=r"replies made with other settings \(temperature: 0.0 -> 0.5\)"):
        evaluate(stage, finished[0], tiny_llava, files=files_of(benchmark),
                 asking={"max_new_tokens": 4, "short_answer_tokens": 2, "block_size": 3, "temperature": 0.5})  # fmt: skip


def test_saved_predictions_are_scored_without_a_model(stage, benchmark, finished, tmp_path):
    output, results = finished
    no_pictures = files_of(benchmark)
    for section in no_pictures.values():
        section.pop("images")
    again = evaluate(stage, tmp_path, predictions=output, files=no_pictures)
    assert again["metrics"] == results["metrics"]
    assert (tmp_path / "items.jsonl").read_text() == (output / "items.jsonl").read_text()


def test_baseline_of_the_same_replies_differs_by_nothing(stage, benchmark, finished, tmp_path, capsys):
    output, _ = finished
    results = evaluate(stage, tmp_path, predictions=output, files=files_of(benchmark), baseline=output)
    for name, entry in results["metrics"].items():
        if name.startswith("difference.") and entry["value"] is not None:
            assert (entry["value"], entry["p"], entry["p_holm"]) == (0, 1, 1), name
    assert (tmp_path / "regressions.jsonl").read_text() == ""
    assert "p (Holm)" in capsys.readouterr().out


def test_answers_made_elsewhere_are_scored_without_a_model(stage, benchmark, tmp_path):
    """CHAIR examples 1 and 2 of the spec pool to 5/9, both captions hallucinate, recall 4/4; POPE answers Yes No Yes maybe."""
    files = files_of(benchmark, chair={"generated": benchmark / "generated.jsonl", "questions": None, "images": None},
                     pope={"answers": [benchmark / "answers.jsonl"], "images": None})  # fmt: skip
    del files["short"]
    metrics = evaluate(stage, tmp_path, files=files)["metrics"]
    assert metrics["chair_i"]["value"] == pytest.approx(5 / 9)
    assert metrics["chair_s"]["value"] == 1
    assert metrics["recall"]["value"] == 1
    assert metrics["words_per_caption"]["value"] == 14
    assert metrics["yesno_accuracy"]["value"] == 0.5
    assert metrics["yesno_strict_accuracy"]["value"] == 0.75
    assert metrics["yes_ratio"]["value"] == 0.5
    assert metrics["yes_ratio_strict"]["value"] == 0.75


def test_scenes(stage, tiny_llava, tmp_path):
    results = evaluate(stage, tmp_path, tiny_llava, scenes={"pictures": 6, "splits": ["test_fair"]},
                       reliance={"conditions": ["blank"], "items": 4})  # fmt: skip
    metrics = results["metrics"]
    assert metrics["chair_s"]["n"] == 6
    assert metrics["recall_clear"]["value"] is not None
    assert {
        "attribute_accuracy.colour",
        "attribute_accuracy.place",
        "attribute_accuracy.count",
        "yesno_accuracy",
    } <= metrics.keys()
    assert metrics["reliance_blank"]["n"] == 4
    assert "reliance" not in metrics


def test_scenes_items_score_their_own_answers_perfectly(stage):
    """The world's own captions and answers: nothing invented, every question right."""
    items = stage.scenes_items(stage.ScenesData(pictures=40), seed=0)
    variants = stage.plan(items, stage.Config(scenes=stage.ScenesData(), reliance=stage.Probe(conditions=[])))
    replies = [asking.Prediction(item.eval, item.id, item.group, "", item.answer) for item in items]
    _, vocabularies, _ = stage.load_items(stage.Config(scenes=stage.ScenesData(pictures=40)))
    metrics = summary.aggregate(scoring.score_all(items, variants, replies, vocabularies), draws=50)
    assert metrics["chair_i"]["value"] == 0
    assert 0.9 < metrics["recall_clear"]["value"] <= 1
    assert 0.6 < metrics["recall"]["value"] < metrics["recall_clear"]["value"]
    assert metrics["accuracy"]["value"] == 1
    assert metrics["accuracy"]["n"] > 120
    assert {item.kind for item in items} == {"caption", "yes_no", "colour", "place", "count"}


def test_gains_and_losses_against_a_baseline():
    def run(right):
        columns = ("asked", "tp", "said_yes", "gold_yes", "strict_correct", "strict_tp", "strict_said_yes")
        ones = dict.fromkeys(columns, 1.0)
        return [
            Scored("yesno", str(n), str(n), "ok", numbers={**ones, "correct": float(good)})
            for n, good in enumerate(right)
        ]

    now, before = run([1] * 10 + [0] * 3 + [1] * 87), run([0] * 10 + [1] * 3 + [1] * 87)
    results, regressions = summary.compare(now, before, draws=300)
    entry = results["difference.yesno_accuracy"]
    assert entry["value"] == pytest.approx(0.07)
    assert (entry["gains"], entry["losses"], entry["ties"]) == (10, 3, 87)
    assert entry["p"] == pytest.approx(0.0923, abs=5e-5)
    assert entry["p_holm"] >= entry["p"]
    assert [row["id"] for row in regressions] == ["10", "11", "12"]
    with pytest.raises(ValueError, match="no item in common"):
        summary.compare(now, [Scored("yesno", "else", "g", "ok")])


def test_metric_with_more_than_one_percent_missing_is_invalid():
    columns = ("captions", "mentions", "hallucinated", "hallucinating", "hit", "truth", "words")
    numbers = dict(zip(columns, (1.0, 2.0, 1.0, 1.0, 1.0, 2.0, 5.0), strict=True))
    good = [Scored("chair", str(n), str(n), "ok", numbers=numbers) for n in range(98)]
    lost = [Scored("chair", "x", "x", "empty"), Scored("chair", "y", "y", "error")]
    found = summary.aggregate([*good, *lost], draws=50)["chair_i"]
    assert (found["value"], found["n"], found["missing"]) == (0.5, 98, 0.02)
    assert found["invalid"] == "2.0% of what was asked has no score"
    differences, _ = summary.compare(
        good, [*good[:-2], Scored("chair", "96", "96", "empty"), Scored("chair", "97", "97", "error")], draws=50
    )
    assert differences["difference.chair_i"]["n"] == 96
    assert differences["difference.chair_i"]["invalid"].startswith("2.0%")
    assert summary.counts([*good, *lost])["chair"]["empty_rate"] == 0.01
    assert "INVALID: 2.0%" in summary.table({"chair_i": found})
    assert "invalid" not in summary.aggregate([*good, *good[:2], *lost[:1]], draws=50)["chair_i"]


def test_picture_that_cannot_be_opened_is_an_error_not_a_score(stage, benchmark, tiny_llava, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("0.png", "1.png", "2.png"):
        (tmp_path / "images" / name).write_bytes((benchmark / "images" / name).read_bytes())
    (tmp_path / "images" / "3.png").write_bytes(b"not a picture")
    files = {"short": {"questions": benchmark / "short.jsonl", "images": tmp_path / "images"}}
    results = evaluate(stage, tmp_path / "out", tiny_llava, files=files, reliance={"conditions": []})
    assert results["counts"]["attributes"]["error_rate"] == 0.25
    assert results["metrics"]["attribute_accuracy"]["n"] == 3
    assert results["metrics"]["attribute_accuracy"]["invalid"] == "25.0% of what was asked has no score"
    assert "attributes: 25.0% failed (no score)" in results["notes"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to ask: give `scenes`"),
        ({"scenes": {"pictures": 1}}, "there is nobody to answer"),
        (
            {"scenes": {"pictures": 1}, "predictions": "x", "model": {"model_name_or_path": "y"}},
            "both `model` and `predictions`",
        ),
        ({"scenes": {"pictures": 1}, "baseline": "nowhere"}, "baseline nowhere holds no items.jsonl"),
        ({"scenes": {"pictures": 1}, "predictions": "nowhere.jsonl"}, "no replies at nowhere.jsonl"),
    ],
)
def test_settings_that_cannot_work(stage, settings, message):
    with pytest.raises(ValueError, match=message):
        stage.main(config.build(stage.Config, settings))


def test_sections_that_cannot_work(stage, benchmark, tiny_llava, tmp_path):
    with pytest.raises(ValueError, match="`files.pope.images` is None, which is no folder"):
        evaluate(stage, tmp_path, tiny_llava, files={"pope": {"questions": [benchmark / "pope.json"]}})
    with pytest.raises(ValueError, match=r"has 2 answer file\(s\) for 1 question file"):
        evaluate(stage, tmp_path, files={"pope": {"questions": [benchmark / "pope.json"], "answers": ["a", "b"]}})
    with pytest.raises(ValueError, match="`files.chair` needs `questions`"):
        evaluate(stage, tmp_path, files={"chair": {"synonyms": benchmark / "synonyms.txt"}})
    with pytest.raises(ValueError, match="both `model` and answer files are given"):
        evaluate(
            stage, tmp_path, tiny_llava, files=files_of(benchmark, pope={"answers": [benchmark / "answers.jsonl"]})
        )
    (tmp_path / "p.jsonl").write_text('{"no": "reply"}\n')
    with pytest.raises(ValueError, match=r"p.jsonl line 1 lacks eval, id, group, prompt, text"):
        evaluate(
            stage, tmp_path, predictions=tmp_path / "p.jsonl", files={"pope": {"questions": [benchmark / "pope.json"]}}
        )


def test_baseline_asked_differently_is_refused_before_the_model_is_asked(
    stage, benchmark, tiny_llava, finished, tmp_path
):
    files, base = files_of(benchmark), finished[0]
    short = {"max_new_tokens": 4, "short_answer_tokens": 2, "block_size": 3}
    for changes, message in (
        ({"asking": {**short, "temperature": 1.0}}, r"\(temperature: 0.0 -> 1.0\)"),
        ({"seed": 1}, r"\(asked: .*seed: 0 -> 1\)"),
        ({"files": files_of(benchmark, chair={"parser": "original"})}, r"\(chair_parser: robust -> original\)"),
        ({"reliance": {"conditions": ["blank"]}}, r"items: 36 -> 20"),
    ):
        with pytest.raises(ValueError, match=f"was asked or read differently .*{message}"):
            evaluate(stage, tmp_path, tiny_llava, **{"files": files, "baseline": base, **changes})
    assert not any(tmp_path.iterdir())
    results = evaluate(stage, tmp_path, tiny_llava, files=files, baseline=base)
    assert results["metrics"]["difference.accuracy"]["value"] == 0


def test_baseline_that_is_cut_off_is_refused(stage, benchmark, tiny_llava, finished, tmp_path):
    base, _ = finished
    (tmp_path / "results.json").write_text((base / "results.json").read_text())
    (tmp_path / "items.jsonl").write_text((base / "items.jsonl").read_text()[:-9])
    with pytest.raises(ValueError, match=r"items.jsonl line 20 is not complete JSON"):
        evaluate(stage, tmp_path / "out", predictions=base, files=files_of(benchmark), baseline=tmp_path)
    (tmp_path / "results.json").unlink()
    with pytest.raises(ValueError, match="holds no results.json"):
        evaluate(stage, tmp_path / "out", predictions=base, files=files_of(benchmark), baseline=tmp_path)


def test_printed_table_is_the_headlines_and_says_where_the_rest_is(stage, finished, tmp_path, capsys):
    _, results = finished
    stage.show(results, tmp_path)
    printed = capsys.readouterr().out
    rows = [line.split()[0] for line in printed.splitlines() if "[" in line or "INVALID" in line]
    assert rows == [name for name in summary.HEADLINES if name in results["metrics"]]
    assert rows[:3] == ["chair_i", "chair_s", "recall"]
    assert rows[-3:] == ["reliance", "reliance_blank", "reliance_noise"]
    for hidden in ("yesno_strict_accuracy", "reliance_blank_normalised", "flip_rate_blank", "logprob_drop_blank"):
        assert hidden in results["metrics"]
        assert hidden not in printed
    assert "results.json has the rest" in printed.splitlines()[-1]
    assert len(printed.splitlines()) < 30


def test_two_items_of_one_id_are_refused(stage, tmp_path):
    items = stage.scenes_items(stage.ScenesData(pictures=1), seed=0)
    variants = [asking.Variant(items[0]), asking.Variant(items[0])]
    with pytest.raises(ValueError, match="is there twice in chair"):
        asking.ask(None, variants, tmp_path, asking.Asking())


def test_bundled_configs_resolve(stage):
    scenes = config.load(stage.Config, bundled.find("recipes/evaluate_scenes"), DRAWS)
    assert scenes.asking.temperature == 0
    assert scenes.draws == 200
    assert config.load(stage.Config, bundled.find("recipes/evaluate_files")).files.chair.parser == "robust"


def test_two_processes_ask_a_share_each_and_find_what_one_finds(stage, tmp_path):
    """torchrun: the same files to the byte."""
    words = ["--model.model_name_or_path", "scenes", "--model.device", "cpu", "--scenes.pictures", "6", *DRAWS,
             "--asking.block_size", "4", "--asking.pictures", "3"]  # fmt: skip
    stage.main(config.load(stage.Config, None, [*words, "--output", str(tmp_path / "one")]))
    file = bundled.root() / "recipes" / "evaluate_model.py"
    start([*TORCHRUN, file, *words, "--output", tmp_path / "two"], tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    left = sorted(path.relative_to(two).as_posix() for path in two.rglob("*"))
    assert left == sorted(path.relative_to(one).as_posix() for path in one.rglob("*"))
    assert not [name for name in left if "part" in name]
    for name in ("predictions.jsonl", "items.jsonl", "results.json"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    assert len(list((one / "pictures").iterdir())) == 3


def test_replies_of_a_process_that_was_killed_are_kept(tmp_path):
    """What another process left in its own file is joined, and only the rest is asked."""
    lines = []

    class Counting:
        fingerprint = "x"
        capabilities = frozenset()

        def generate(self, requests, sampling):
            lines.extend(request.id for request in requests)
            return [Completion(request.id, "yes", finish_reason="stop") for request in requests]

    variants = [reliance.Variant(Item("yesno", str(n), f"{n}", [], [user_message("?")], label="yes")) for n in range(8)]
    how = asking.Asking(block_size=2)
    whole = asking.ask(Counting(), variants, tmp_path, how)
    rows = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text("".join(rows[:2]))
    (tmp_path / "predictions.jsonl.part1").write_text("".join(rows[2:4]) + rows[6][:20])
    lines.clear()
    assert asking.ask(Counting(), variants, tmp_path, how) == whole
    assert lines == ["4", "5", "6", "7"]
    assert not (tmp_path / "predictions.jsonl.part1").exists()
    assert (tmp_path / "predictions.jsonl").read_text() == "".join(rows)
