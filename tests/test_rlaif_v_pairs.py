"""RLAIF-V's pairs, by hand: scores of answers, what gives no pair, the length balance of a whole set."""

import json

import pytest
from test_claims import Labeller

from prefalign import bundled
from prefalign.claims import ClaimJudge
from prefalign.dividing import DivideConfig
from prefalign.engines.config import EngineConfig
from prefalign.length_balance import Cut
from prefalign.records import Candidates, Pair, message_text
from prefalign.store import Dropped, Failed, OutputConfig, read_records, write_records
from tests.rlaif_v_cases import CAT, DRAGON, SCENES, candidates, settings


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("rlaif_v")


@pytest.fixture
def by_hand(stage, tmp_path):
    """Judges stored answers by sentences; the labeller refutes dragons, and cannot be sure of fog."""
    labeller = Labeller({"dragon": {"No": 0.9}, "fog": {"all": 0.1}})
    models = stage.Models(None, ClaimJudge(labeller, None, DivideConfig(by="rules")))

    def judged(*rows, **pairs):
        known = stage.Config(
            data=None, output=OutputConfig(tmp_path), labeller=EngineConfig("scenes"), pairs=stage.PairsConfig(**pairs)
        )
        found = stage.measure(rows, models, known)
        return found, [stage.outcome(row, one, Cut(), {}, known) for row, one in zip(rows, found, strict=True)]

    return judged


def distinct(number, text):
    """The same claims, in another answer."""
    return text + "Cat number " + "abcdefgh"[number] + ". "


def test_worked_scores_and_pairs(by_hand):
    """Scores -1, -3, -1, 0: pairs 3-0, 3-1, 3-2, 0-1, 2-1 differ by a claim at least, 0-2 is a tie."""
    texts = [distinct(0, DRAGON + CAT), distinct(1, DRAGON + "Two dragons fly. One dragon reads. "),
             distinct(2, "A dragon flies. "), distinct(3, CAT)]  # fmt: skip
    (found,), (pairs,) = by_hand(candidates(texts), per_prompt=10)
    assert [judged["score"] for judged in found["judged"]] == [-1, -3, -1, 0]
    drawn = {(pair.meta["chosen_index"], pair.meta["rejected_index"]): pair.margin for pair in pairs}
    assert drawn == {(3, 0): 1, (3, 1): 3, (3, 2): 1, (0, 1): 2, (2, 1): 2}
    (_,), (two,) = by_hand(candidates(texts))
    assert len(two) == 2
    assert {(pair.meta["chosen_index"], pair.meta["rejected_index"]) for pair in two} < set(drawn)
    (_,), (wide,) = by_hand(candidates(texts), min_gap=3.0, per_prompt=10)
    assert [pair.margin for pair in wide] == [3]
    other = {tuple(pair.margin for pair in by_hand(candidates(texts, name))[1][0]) for name in "abcdefgh"}
    assert len(other) > 1  # which are drawn depends on the row


def test_what_gives_no_pair_says_why(by_hand):
    wordless, foggy = "no stop here", "There is fog. "
    rows = [
        candidates([DRAGON, "Two dragons. "], "tie"),
        candidates([DRAGON, wordless, foggy, ""], "few"),
        candidates([DRAGON, CAT], "two", generators=("g", "h")),
        candidates([DRAGON, CAT], "blind", images=[]),
        candidates([DRAGON, CAT], "broken", images=[{"bytes": b"no picture", "path": "a.png"}]),
        candidates([DRAGON, DRAGON.upper(), CAT], "good"),
    ]
    found, outcomes = by_hand(*rows)
    reasons = [one.reason for one in outcomes[:4]]
    assert reasons == ["small_gap", "few_judged", "several_generators", "no_picture"]
    assert all(isinstance(one, Dropped) for one in outcomes[:4])
    assert isinstance(outcomes[4], Failed)
    assert [judged["reason"] for judged in found[1]["judged"]] == [None, "no_claims", "undecided", "empty"]
    assert [judged["reason"] for judged in found[5]["judged"]] == [None, "duplicate", None]
    (pair,) = outcomes[5]
    assert (message_text(pair.chosen), message_text(pair.rejected)) == (CAT.strip(), DRAGON.strip())


def test_an_answer_that_could_not_be_judged_is_not_preferred(by_hand):
    """One accepted and four undecided claims would score 0, four accepted and a refuted one score -1."""
    judged = "A cat. A dog. A bird. A cup. A dragon."
    (found,), (outcome,) = by_hand(candidates([judged, "A cat. Some fog. More fog. Thick fog. Thin fog."]))
    assert [one["score"] for one in found["judged"]] == [-1, None]
    assert found["judged"][1]["reason"] == "undecided"
    assert outcome == Dropped("few_judged")


def test_answers_at_the_length_limit_are_used_as_published_or_left_out(by_hand):
    row = candidates([DRAGON, CAT])
    row.responses[0]["finish_reason"] = "length"
    assert len(by_hand(row)[1][0]) == 1
    found, (dropped,) = by_hand(row, unfinished=False)
    assert dropped.reason == "few_judged"
    assert found[0]["judged"][0]["reason"] == "unfinished"


def test_the_length_balance_is_of_the_whole_set(stage, tmp_path, monkeypatch):
    """Chosen answers of 2, 8, 10 and 12 words against 10 each: the shortest goes, wherever its block is."""
    labeller = Labeller({"dragon": {"No": 0.9}})
    words = "a b c d e f g h i j k l"
    rows = []
    for number, length in enumerate((2, 8, 10, 12)):
        good = " ".join(f"{word}{number}" for word in words.split()[:length]) + "."
        rows.append(candidates([f"A dragon is here in the room of the {number}.", good], f"row{number}"))
    write_records("t", rows, output=OutputConfig(tmp_path / "in"), record=Candidates, settings={}, seed=0)
    models = stage.Models(None, ClaimJudge(labeller, None, DivideConfig(by="rules")))
    monkeypatch.setattr(stage, "load", lambda config: models)
    known = {
        "model": None,
        "labeller": SCENES["model"],
        "pairs": {"length_balance": "both"},
        "output": {"block_size": 1},
    }
    manifest = stage.main(settings(stage, tmp_path / "in", tmp_path / "out", **known))
    kept = [pair.meta["words"] for pair in read_records(tmp_path / "out", Pair)]
    assert kept == [{"chosen": length, "rejected": 10} for length in (8, 10, 12)]
    assert manifest.dropped == {"length_balance": 1}
    balance = json.loads((tmp_path / "out" / "claims.json").read_text())["length_balance"]
    assert balance["before"] == {"pairs": 4, "chosen_words": 8.0, "rejected_words": 10.0}
    assert balance["after"] == {"pairs": 3, "chosen_words": 10.0, "rejected_words": 10.0}
