"""Selected responses: pairs by the gap rule, best of n, SteerLM rows, rankings; what is dropped and why; figures that add up."""

import dataclasses
import json
import math
import shutil
from collections import Counter

import pytest

from prefalign import bundled, config
from prefalign.images import encode_png, sha256
from prefalign.manifest import read_manifest
from prefalign.pairing import best_of_n_kl
from prefalign.records import Candidates, Example, Pair, message_text, user_message
from prefalign.sources import DataConfig, read_rows, to_pair
from prefalign.store import Dropped, OutputConfig, StoreError, read_records, write_records
from tests.tiny_vlms import picture

TEXTS = ("A grey cat sleeps on a red mat.", "There is a cat.", "I see two dogs that play with a ball.", "Nothing.")


def row(name="row", grades=(12, 11, 10, 4), texts=TEXTS, **changes):
    responses = [
        {"text": text, "finish_reason": "stop", "tokens": len(text), "generator": "g1", "settings": {"temperature": 1.2},
         "scores": {"total": None if grade is None else float(grade)}}
        for text, grade in zip(texts, grades, strict=False)
    ]  # fmt: skip
    known = Candidates(name, [encode_png(picture(0), "0.png")], [user_message("What is it?", 1)], responses, "A cat.",
                       {"objects": ["cat"]})  # fmt: skip
    return dataclasses.replace(known, **changes)


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("select_responses")


def settings(stage, data="d", folder="o", **changes):
    return config.build(stage.Config, {"data": {"path": data}, "output": {"path": folder, "block_size": 2}, **changes})


def run(stage, rows, folder, **changes):
    data = folder.parent / f"{folder.name}-data"
    write_records("t", rows, output=OutputConfig(data), record=Candidates, settings={}, seed=0)
    manifest = stage.main(settings(stage, data, folder, **changes))
    kind = Pair if changes.get("produce", "pairs") in ("pairs", "ranked") else Example
    return manifest, list(read_records(folder, kind)), json.loads((folder / "selection.json").read_text())


def test_one_pair_for_each_prompt_with_a_gap(stage, tmp_path, capsys):
    rows = [row("a"), row("b", (9, 8, 8, 8)), row("c", (12, 10, 4)), row("d", (3, 9, 1, 7))]
    manifest, pairs, figures = run(stage, rows, tmp_path / "out")
    assert manifest.dropped == {"group_size": 1, "small_gap": 1}
    assert [pair.meta["parent"] for pair in pairs] == ["a", "d"]
    assert message_text(pairs[0].chosen) == TEXTS[0]
    assert message_text(pairs[0].rejected) in TEXTS[2:]
    for pair, given in zip(pairs, (rows[0], rows[3]), strict=True):
        pair.check()
        meta = pair.meta
        assert (pair.images, pair.prompt, pair.answer, pair.facts) == (
            given.images,
            given.messages,
            given.answer,
            given.facts,
        )
        assert pair.margin == meta["scores"]["chosen"]["total"] - meta["scores"]["rejected"]["total"] >= 2
        assert pair.method == "select_responses"
        assert meta["generator"] == "g1"
        assert meta["qualities"] == [response["scores"]["total"] for response in given.responses]
        assert message_text(pair.rejected) == given.responses[meta["rejected_index"]]["text"]
        assert meta["length_gap"] == len(message_text(pair.chosen).split()) - len(message_text(pair.rejected).split())
        assert meta["images_sha256"] == [sha256(given.images[0])]
    assert figures["drop_rate"] == 0.5
    assert figures["margin"] == sum(pair.margin for pair in pairs) / 2
    assert figures["length_gap"] == sum(pair.meta["length_gap"] for pair in pairs) / 2
    assert "drop_rate 0.5" in capsys.readouterr().err


def test_the_seed_draws_the_rejected_answer_and_the_row_decides_nothing_else(stage):
    def drawn(seed, **changes):
        known = settings(stage, seed=seed, **changes)
        return [stage.outcome(row(str(n)), known)[0].meta["rejected_index"] for n in range(60)]

    counts = Counter(drawn(0))
    assert set(counts) == {2, 3}
    assert abs(counts[2] - 30) < 4 * math.sqrt(15)
    assert drawn(0) == drawn(0) != drawn(1)
    assert set(drawn(0, pairs={"rejected": "worst"})) == {3}
    assert set(drawn(0, pairs={"rejected": "nearest"})) == {2}


def test_answers_that_teach_nothing_are_in_no_pair(stage):
    known = settings(stage, pairs={"rejected": "worst"})

    def outcome(texts, finish=("stop",) * 4, grades=(12, 11, 10, 4)):
        given = row(texts=texts, grades=grades)
        for response, reason in zip(given.responses, finish, strict=True):
            response["finish_reason"] = reason
        return stage.outcome(given, known)

    assert outcome((TEXTS[0], TEXTS[1], TEXTS[2], " "))[0].meta["rejected_index"] == 2
    assert outcome(TEXTS, ("stop", "stop", "stop", "length"))[0].meta["rejected_index"] == 2
    assert (
        outcome((*TEXTS[:3], "a grey cat sleeps on a red mat"))[0].meta["rejected_index"] == 2
    )  # the chosen one again
    assert outcome((*TEXTS[:3], "A grey cat sleeps on a red mate."))[0].meta["rejected_index"] == 2  # nearly
    alike = (TEXTS[0], TEXTS[1], "A grey cat sleeps on a red mad.", "A grey cat sleeps on a red mate.")
    assert outcome(alike) == Dropped("near_identical")
    assert outcome(TEXTS, ("length",) * 4) == Dropped("unusable")
    assert outcome(TEXTS, grades=(None,) * 4) == Dropped("ungraded")
    assert outcome(TEXTS, grades=(12, 11, 10, None)) == Dropped("group_size")
    given = row()
    given.responses[3]["finish_reason"] = "length"
    assert stage.outcome(given, dataclasses.replace(known, unfinished=True))[0].meta["rejected_index"] == 3


def test_several_pairs_of_a_prompt_have_ids_of_their_own(stage, tmp_path):
    changes = {"pairs": {"per_prompt": 2}}
    manifest, pairs, _ = run(stage, [row("a"), row("b", (1, 9, 2, 3))], tmp_path / "out", **changes)
    assert (manifest.rows_used, manifest.rows_out) == (2, 4)
    assert len({pair.id for pair in pairs}) == 4
    data = DataConfig(tmp_path / "out")
    assert [to_pair(line, data) for line in read_rows(data)] == pairs


def test_every_comparison_for_a_reward_model(stage, tmp_path):
    _, pairs, figures = run(stage, [row("a", (1, 9, 5, 4))], tmp_path / "out", produce="ranked")
    found = [(pair.meta["chosen_index"], pair.meta["rejected_index"], pair.margin) for pair in pairs]
    assert found == [(1, 2, 4), (1, 3, 5), (1, 0, 8), (2, 0, 4), (3, 0, 3)]
    assert figures["rows"] == 5


def test_qualities_are_weighted_sums_of_named_scores(stage):
    given = row()
    for response, helpful, wordy in zip(given.responses, (1, 4, 4, 2), (0, 3, 1, 0), strict=True):
        response["scores"] = {"judge/helpfulness": helpful, "judge/verbosity": wordy}
    known = settings(stage, quality={"judge/helpfulness": 1.0, "judge/verbosity": -1.0}, pairs={"rejected": "nearest"})
    [pair] = stage.outcome(given, known)
    assert pair.meta["qualities"] == [1, 1, 3, 2]
    assert (pair.meta["chosen_index"], pair.meta["rejected_index"]) == (2, 0)
    # as a reward model of several attributes reads them (`train_reward_model` with `attributes`)
    assert pair.meta["scores"] == {
        "chosen": {"helpfulness": 4, "verbosity": 1},
        "rejected": {"helpfulness": 1, "verbosity": 0},
    }
    assert stage.outcome(row(), known) == Dropped("ungraded")


def test_best_of_n(stage, tmp_path):
    rows = [row("a", (3, 9, 4, 9)), row("b", (8, 2)), row("c", (None, 1))]
    manifest, examples, figures = run(stage, rows, tmp_path / "out", produce="best", best={"min_quality": 2})
    assert manifest.dropped == {"low_quality": 1}
    assert [message_text(example.messages[-1:]) for example in examples] == [TEXTS[1], TEXTS[0]]
    assert [example.messages[:-1] for example in examples] == [rows[0].messages] * 2
    assert [example.meta["quality"] for example in examples] == [9, 8]
    assert all(example.images == rows[0].images for example in examples)
    assert figures == {"rows": 2, "drop_rate": 0.3333, "quality": 8.5,
                       "kl": round((best_of_n_kl(4) + best_of_n_kl(2)) / 2, 4)}  # fmt: skip
    known = settings(stage, produce="best", best={"k": 3})
    assert [example.meta["index"] for example in stage.outcome(rows[0], known)] == [1, 3, 2]


NAMES = ["judge/correctness", "judge/verbosity"]


def attributed(name="row"):
    given = row(name)
    for response, correct in zip(given.responses, (4, 3, 0, None), strict=True):
        response["scores"] |= {"judge/correctness": correct, "judge/verbosity": 1}
    return given


def test_steerlm_rows_tell_what_was_scored(stage, tmp_path):
    rows = [attributed(str(number)) for number in range(60)]
    manifest, examples, figures = run(stage, rows, tmp_path / "out", produce="steerlm", steerlm={"attributes": NAMES})
    assert manifest.rows_out == 180  # the answer without a grade gives none
    without = 0
    for example in examples:
        place = example.meta["index"]
        assert message_text(example.messages[-1:]) == TEXTS[place]
        asked = message_text(example.messages[:-1])
        line = f"<attributes>correctness:{(4, 3, 0)[place]},verbosity:1</attributes>"
        assert example.meta["attributes"] in (line, None)
        without += example.meta["attributes"] is None
        assert asked == ("What is it?" if example.meta["attributes"] is None else f"What is it?\n{line}")
    assert abs(without - 18) < 4 * math.sqrt(180 * 0.09)
    assert figures["without_attributes"] == round(without / 180, 4)
    assert len({example.id for example in examples}) == 180


def test_steerlm_in_the_system_turn_and_in_two_turns(stage):
    known = settings(stage, produce="steerlm", steerlm={"attributes": NAMES, "place": "system", "drop_prob": 0.0})
    first = stage.outcome(attributed(), known)[0]
    assert [turn["role"] for turn in first.messages] == ["system", "user", "assistant"]
    two = settings(stage, produce="steerlm", steerlm={"attributes": NAMES, "two_turn": True, "drop_prob": 0.0})
    befores = set()
    for number in range(20):
        [example] = stage.outcome(attributed(str(number)), two)
        befores.add(example.meta["before"])
        assert message_text(example.messages[-1:]) == TEXTS[0]
        assert "correctness:4" in message_text(example.messages[2:3])
        assert message_text(example.messages[1:2]) == TEXTS[example.meta["before"]]
    assert befores == {1, 2}
    alone = attributed()
    alone.responses = alone.responses[:1]
    assert stage.outcome(alone, two) == Dropped("one_answer")
    assert stage.outcome(row(), two) == Dropped("ungraded")


def test_two_turns_lose_their_lines_and_put_them_where_they_are_told(stage):
    steer = {"attributes": NAMES, "two_turn": True, "drop_prob": 0.25, "place": "system"}
    known = settings(stage, produce="steerlm", steerlm=steer)
    rows = [attributed(str(number)) for number in range(80)]
    made = [stage.outcome(given, known)[0] for given in rows]
    plain = [example for example in made if example.meta["attributes"] is None]
    assert abs(len(plain) - 20) < 4 * math.sqrt(80 * 0.25 * 0.75)
    for example in made:
        turns = [turn["role"] for turn in example.messages]
        told = message_text(example.messages)
        assert message_text(example.messages[-1:]) == TEXTS[0]
        if example.meta["attributes"] is None:
            assert turns == ["user", "assistant"]
            assert "<attributes>" not in told
            continue
        rated, wanted = example.meta["attributes"]
        assert turns == ["system", "user", "assistant", "user", "assistant"]
        assert message_text(example.messages[:1]) == wanted == "<attributes>correctness:4,verbosity:1</attributes>"
        assert rated in message_text(example.messages[3:4])
        assert wanted not in message_text(example.messages[1:])


def test_answers_that_were_cut_off_count_as_unfinished_whoever_says_so(stage):
    known = settings(stage, pairs={"rejected": "worst"})
    for told in ({"finish_reason": "max_tokens"}, {"finish_reason": "abort"}, {"finished": False}):
        given = row()
        given.responses[3] |= told
        assert stage.outcome(given, known)[0].meta["rejected_index"] == 2
    given.responses[3] |= {"finish_reason": "length", "finished": True}
    assert stage.outcome(given, known)[0].meta["rejected_index"] == 3


def test_a_stopped_run_ends_with_the_same_rows(stage, tmp_path):
    rows = [row(str(number)) for number in range(5)]
    manifest, pairs, _ = run(stage, rows, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    for name in ("manifest.json", "selection.json", "progress/00001.json", "data/train-00001.parquet"):
        (tmp_path / "cut" / name).unlink()
    again = stage.main(settings(stage, tmp_path / "out-data", tmp_path / "cut"))
    assert (again, list(read_records(tmp_path / "cut", Pair))) == (manifest, pairs)
    assert (tmp_path / "cut" / "selection.json").read_bytes() == (tmp_path / "out" / "selection.json").read_bytes()
    with pytest.raises(StoreError, match="settings.pairs.min_gap: 2.0 -> 3.0"):
        stage.main(settings(stage, tmp_path / "out-data", tmp_path / "cut", pairs={"min_gap": 3.0}))


def test_a_run_that_makes_nothing_says_why(stage, tmp_path):
    with pytest.raises(StoreError, match="made no row out of 2: 2 small_gap"):
        run(stage, [row("a", (1, 1, 1, 1)), row("b", (2, 2, 2, 2))], tmp_path / "out")
    assert read_manifest(tmp_path / "out") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": {"min_gap": 0}}, "min_gap is 0.0: answers of equal quality"),
        ({"pairs": {"per_prompt": 0}}, "per_prompt is 0, so no prompt would give a pair"),
        ({"pairs": {"group_size": 1}}, "group_size is 1, and a pair needs two graded answers"),
        ({"pairs": {"max_similarity": 0}}, "max_similarity is 0.0; it is a share of characters"),
        ({"best": {"k": 0}}, "k is 0, so no answer would be kept"),
        ({"quality": {"total": 0}}, "quality weighs no score"),
        ({"produce": "steerlm"}, "steerlm.attributes is empty, so prompts would not say what is asked for"),
        ({"steerlm": {"drop_prob": 1.5}}, "drop_prob is 1.5; it is a share of rows"),
    ],
)
def test_settings_that_make_no_sense_are_refused(stage, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(stage, **changes)
