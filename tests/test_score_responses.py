"""Scored responses: totals and terms by name, missing scores, pictures that matter, pairs and foreign rows, resuming."""

import dataclasses
import json
import shutil

import pytest

from prefalign import bundled, config, stages
from prefalign.config import ConfigError
from prefalign.images import encode_png
from prefalign.records import Candidates, Pair, RecordError, assistant_message, user_message
from prefalign.rewards import Combined, Weighted, read_rewards
from prefalign.sources import DataConfig, to_candidates
from prefalign.store import Dropped, Failed, OutputConfig, StoreError, read_records, write_records
from tests.tiny_vlms import picture

FACTS = {"objects": ["cat", "mat"]}
OBJECTS = {"name": "objects", "objects": {"cat": [], "dog": [], "mat": []}, "weight": {"precision": 1.0, "recall": 1.0}}

REWARDS = '''
"""Rewards that read pictures and words."""

import math

import numpy as np

from prefalign.images import open_image


def brightness(responses):
    return [float(np.asarray(one.images[0]).mean()) for one in responses]


def told(responses):
    return {
        "finished": [float(one.finished) for one in responses],
        "tokens": [math.nan if one.tokens is None else one.tokens for one in responses],
        "same": [None if one.answer is None else float(one.answer == one.text) for one in responses],
        "turns": [len(one.messages) for one in responses],
    }


def wordy(responses):
    return [len(one.text.split()) for one in responses]
'''


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("score_responses")


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(REWARDS)
    return lambda name, **more: {"name": "function", "function": f"{file}:{name}", "label": name, **more}


def row(number=0, texts=("A cat on a mat.", "A dog."), **changes):
    responses = [{"text": text, "finish_reason": "stop", "tokens": 5 + place} for place, text in enumerate(texts)]
    known = Candidates(f"row-{number}", [encode_png(picture(number), f"{number}.png")], [user_message("What is it?", 1)],
                       responses, None, FACTS)  # fmt: skip
    return dataclasses.replace(known, **changes)


def write(folder, records, kind=Candidates):
    write_records("t", records, output=OutputConfig(folder), record=kind, settings={}, seed=0)
    return folder


def run(stage, data, folder, *entries, **changes):
    known = {"data": {"path": data}, "output": {"path": folder, "block_size": 2}, "rewards": list(entries)}
    manifest = stage.main(config.build(stage.Config, config.merge(known, changes)))
    return manifest, {
        row.id: [response["scores"] for response in row.responses] for row in read_records(folder, Candidates)
    }


def test_every_term_and_the_total_by_name(stage, tmp_path):
    data = write(tmp_path / "data", [row(0), row(1, ("A dog on a mat.",))])
    manifest, scores = run(stage, data, tmp_path / "out", OBJECTS)
    assert manifest.rows_in == 2 == manifest.rows_out
    first = scores["row-0"][0]
    assert first["objects/invented"] == 0
    assert (first["objects/precision"], first["objects/recall"], first["total"]) == (1, 1, 2)
    assert scores["row-0"][1]["total"] == 0
    assert scores["row-1"][0]["total"] == pytest.approx(0.5 + 0.5)
    for given, made in zip(read_records(data, Candidates), read_records(tmp_path / "out", Candidates), strict=True):
        bare = [{name: value for name, value in r.items() if name != "scores"} for r in made.responses]
        assert dataclasses.replace(made, responses=bare) == given


def test_rewards_are_told_all_that_is_known_of_an_answer(stage, rewards, tmp_path):
    turns = [user_message("Hi", 1), assistant_message("Hello."), user_message("And now?")]
    asked = row(0, answer="A dog.", messages=turns)
    asked.responses[0] = {"text": "A cat", "finish_reason": "length"}
    _, scores = run(stage, write(tmp_path / "data", [asked]), tmp_path / "out", rewards("told", weight={"turns": 1}))
    first, second = scores["row-0"]
    assert (first["told/finished"], first["told/tokens"], first["told/same"], first["total"]) == (0, None, 0, 3)
    assert (second["told/finished"], second["told/tokens"], second["told/same"], second["total"]) == (1, 6, 1, 3)


def test_a_missing_score_is_null_and_counted(stage, tmp_path, capsys):
    data = write(tmp_path / "data", [row(0), row(1, facts={})])
    _, scores = run(stage, data, tmp_path / "out", OBJECTS)
    assert scores["row-0"][0]["total"] == 2
    assert [scores["row-1"][0][name] for name in ("objects/precision", "total")] == [None, None]
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["responses"] == 4
    assert found["scores"]["total"] == {"missing": 2, "mean": 1.0, "deviation": 1.0, "least": 0.0, "most": 2.0}
    assert "total 1.0 on average, missing for 2" in capsys.readouterr().err


def test_scores_of_pictures_change_with_the_pictures(stage, rewards, tmp_path):
    """Swapping the pictures of two rows swaps their scores; blanking one changes its own."""
    from PIL import Image

    one, other = row(0), row(1)
    blank = encode_png(Image.new("RGB", (48, 48), (0, 0, 0)), "blank.png")
    swapped = [dataclasses.replace(one, images=other.images), dataclasses.replace(other, images=one.images)]
    blanked = [dataclasses.replace(one, images=[blank]), other]
    found = {
        name: run(stage, write(tmp_path / name, given), tmp_path / f"{name}-out", rewards("brightness"))[1]
        for name, given in {"own": [one, other], "swapped": swapped, "blanked": blanked}.items()
    }
    totals = {name: [scores[key][0]["total"] for key in ("row-0", "row-1")] for name, scores in found.items()}
    assert totals["own"][0] != totals["own"][1]
    assert totals["swapped"] == totals["own"][::-1]
    assert totals["blanked"] == [0, totals["own"][1]]


def test_earlier_scores_stay(stage, rewards, tmp_path):
    graded = row(0)
    graded.responses[0]["scores"] = {"human": 0.7, "total": 5.0}
    run(stage, write(tmp_path / "data", [graded]), tmp_path / "once", OBJECTS)
    _, scores = run(stage, tmp_path / "once", tmp_path / "twice", rewards("wordy"))
    assert scores["row-0"][0] == {"human": 0.7, "objects/invented": 0, "objects/wrong": 0, "objects/precision": 1,
                                  "objects/recall": 1, "wordy/value": 5, "total": 5}  # fmt: skip


def test_a_reward_that_pays_for_words_shows_in_the_correlation(stage, rewards, tmp_path):
    data = write(tmp_path / "data", [row(0, ("a", "a b c", "a b")), row(1, ("a b c d", "a"))])
    run(stage, data, tmp_path / "wordy", rewards("wordy"))
    assert json.loads((tmp_path / "wordy" / "scores.json").read_text())["length_correlation"] == 1
    run(stage, data, tmp_path / "flat", rewards("told", weight={"turns": 1}))
    assert json.loads((tmp_path / "flat" / "scores.json").read_text())["length_correlation"] is None


def pair(name, chosen, rejected, **changes):
    return Pair(name, [encode_png(picture(3), "3.png")], [user_message("What is it?", 1)], [assistant_message(chosen)],
                [assistant_message(rejected)], "imported", facts=FACTS, **changes)  # fmt: skip


def test_both_answers_of_pairs_are_scored_on_the_picture_of_the_pair(stage, tmp_path):
    other = [encode_png(picture(4), "4.png")]
    pairs = [pair("a", "A cat on a mat.", "A dog."), pair("b", "A cat.", "a cat", rejected_images=other)]
    manifest, scores = run(stage, write(tmp_path / "data", pairs, Pair), tmp_path / "out", OBJECTS, reads="pairs")
    assert manifest.dropped == {"one_text": 1}
    assert [score["total"] for score in scores["a"]] == [2, 0]
    [made] = read_records(tmp_path / "out", Candidates)
    assert [response["from"] for response in made.responses] == ["chosen", "rejected"]
    assert made.images == pairs[0].images


def test_rows_that_cannot_be_scored_are_counted(stage, tmp_path):
    broken = [{"bytes": b"none", "path": "x.png"}]
    outcomes = stage.process([row(0, ()), row(1, images=broken), row(2)], read_rewards([OBJECTS]))
    assert outcomes[0] == Dropped("no_response")
    assert isinstance(outcomes[1], Failed)
    assert outcomes[2][0].responses[0]["scores"]["total"] == 2


def test_a_stopped_run_ends_with_the_same_rows(stage, rewards, tmp_path):
    data = write(tmp_path / "data", [row(number) for number in range(5)])
    manifest, scores = run(stage, data, tmp_path / "out", rewards("brightness"))
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    for name in ("manifest.json", "scores.json", "progress/00001.json", "data/train-00001.parquet"):
        (tmp_path / "cut" / name).unlink()
    assert run(stage, data, tmp_path / "cut", rewards("brightness")) == (manifest, scores)
    assert (tmp_path / "cut" / "scores.json").read_bytes() == (tmp_path / "out" / "scores.json").read_bytes()
    with pytest.raises(StoreError, match="holds rows made with another config"):
        run(stage, data, tmp_path / "cut", rewards("brightness", weight=2.0))


def test_what_is_published_of_the_rewards(stage, tmp_path, rewards):
    """Versions go to the manifest; folders of this machine, batch sizes and devices do not."""

    class Versioned:
        version = "judge-7b+v2"

    listed = Combined([Weighted("judge", Versioned()), *read_rewards([OBJECTS]).entries])
    assert listed.versions() == {"judge": "judge-7b+v2"}
    manifest, _ = run(stage, write(tmp_path / "data", [row(0)]), tmp_path / "out", rewards("wordy"))
    assert manifest.config["settings"]["rewards"] == [
        {"name": "function", "function": "mine.py:wordy", "label": "wordy"}
    ]
    entry = {"name": "reward_model", "path": "/somewhere/reward", "batch_size": 4, "device": "cpu", "list": ["/a/b", 1]}
    assert stages.portable([entry]) == [{"name": "reward_model", "path": "reward", "list": ["b", 1]}]


def test_settings_that_make_no_sense_are_refused(stage, tmp_path):
    data = write(tmp_path / "data", [row(0)])
    with pytest.raises(ConfigError, match="rewards: the list is empty"):
        run(stage, data, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no reward called 'object'; did you mean 'objects'\?"):
        run(stage, data, tmp_path / "out", {"name": "object"})


def test_rows_of_other_formats_with_a_list_of_responses(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_png(picture(0), "a.png")["bytes"])
    data = DataConfig(tmp_path / "rows.jsonl")
    line = {
        "image": "a.png",
        "question": "What?",
        "answer": "A cat.",
        "responses": ["A cat.", {"text": "A dog.", "scores": {"human": 0.2}}],
    }
    found = to_candidates(line, data)
    assert [response["text"] for response in found.responses] == ["A cat.", "A dog."]
    assert found.responses[1]["scores"] == {"human": 0.2}
    assert (found.answer, len(found.images), found.messages) == ("A cat.", 1, [user_message("What?", 1)])
    assert to_candidates({**line, "responses": json.dumps(line["responses"])}, data) == found
    for bad, reason in (
        ({"responses": None}, "missing_column"),
        ({"responses": [3]}, "bad_responses"),
        ({"responses": 3}, "bad_row"),
    ):
        with pytest.raises(RecordError) as problem:
            to_candidates({**line, **bad}, data)
        assert problem.value.reason == reason
    with pytest.raises(RecordError, match="candidates need `responses`.*sample_responses makes them of prompts"):
        to_candidates({**line, "responses": None}, data)


def test_bad_facts_of_one_row_stop_no_other():
    broken = row(1, facts={"objects": [5]})
    outcomes = score_block([row(0), broken, row(2)])
    assert [type(outcome) for outcome in outcomes] == [list, Failed, list]
    assert outcomes[1].reason == "bad_facts"
    assert "response row-1/0: facts.objects holds '5'" in outcomes[1].message
    assert [outcomes[place][0].responses[0]["scores"]["total"] for place in (0, 2)] == [2, 2]
    with pytest.raises(ValueError, match="no names of objects are set"):  # a fault of the settings, not of a row
        score_block([row(0)], {"name": "objects"})


def score_block(rows, entry=OBJECTS):
    return bundled.load_stage("score_responses").process(rows, read_rewards([entry]))


def test_rules_over_conversations_report_their_accuracy(stage, tmp_path):
    """One answer of two is right; the second was misled by a wrong hint."""
    rules = {"set": "existence_count", "asked": ["exists", "count"], "reference": {"exists": "yes", "count": "some"},
             "questions": ["Is there a star?", "I was told that there are no stars. How many?"],
             "hints": {"count": "none"}}  # fmt: skip
    responses = [
        {"text": "None. I agree.", "earlier": ["Yes."]},
        {"text": "There are two stars.", "earlier": ["Yes, a star."], "finished": False},
    ]
    known = row(0, (), facts={"rules": rules}, messages=[user_message("Is there a star?", 1)], responses=responses)
    run(stage, write(tmp_path / "data", [known]), tmp_path / "out", {"name": "symbolic"})
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written["accuracy"] == {
        "symbolic": {"question_accuracy": 0.75, "conversation_accuracy": 0.5, "no_match": 0.0, "accuracy_hint_none": 1.0,
                     "accuracy_hint_correct": None, "accuracy_hint_wrong": 0.5, "misled": 0.5}
    }  # fmt: skip


def test_answers_that_say_that_they_are_not_finished_are_taken_at_their_word(stage, tmp_path):
    answers = [{"text": "A cat.", "finished": False}, {"text": "A cat.", "finish_reason": "max_tokens"}, {"text": "A cat."},
               {"text": "A cat.", "finish_reason": "stop"}]  # fmt: skip
    penalty = [{"name": "missing_eos", "replace": False}]
    known = row(0, (), responses=answers)
    [outcome] = stage.process([known], read_rewards(penalty))
    totals = [response["scores"]["total"] for response in outcome[0].responses]
    assert totals[0] == totals[1] < totals[2] == totals[3]
