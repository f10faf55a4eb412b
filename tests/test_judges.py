"""Judges as rewards and comparators: both orders, retries, the cache; one that knows the truth and one that babbles."""

import json
import math
import re
import sqlite3

import pytest
from witnesses import ASKED, FIVE, Overloaded, Scripted, Witness, response

from prefalign.config import ConfigError
from prefalign.engines import Sampling
from prefalign.judge import RUBRIC
from prefalign.models import ModelConfig
from prefalign.records import message_text, user_message
from prefalign.rewards import Response, read_comparator, read_rewards
from prefalign.rewards.comparing import ByReward
from prefalign.rewards.judged import JudgedAttributes, PairwiseJudge
from prefalign.scenes import language, world
from tests.tiny_vlms import picture


@pytest.fixture(scope="module")
def scenes():
    """Two scenes of which each has a shape that the other lacks."""
    one = world.scene("test_fair", 0)
    other = next(s for s in (world.scene("test_fair", i) for i in range(1, 50)) if s.shapes.isdisjoint(one.shapes))
    return one, other


def test_a_witness_names_the_true_answer_and_another_picture_turns_it_around(scenes):
    one, other = scenes
    true, false = language.caption(one), language.caption(other)
    pairwise = PairwiseJudge(engine=Witness(scenes))
    verdict, swapped = pairwise.compare(
        [(response(one, true), response(one, false)), (response(one, false), response(one, true))]
    )
    assert (verdict.winner, swapped.winner) == ("first", "second")
    assert verdict.votes == ("first", "first")
    assert verdict.confidence == pytest.approx(0.85)
    assert verdict.reason == "I looked."
    (turned,) = pairwise.compare([(response(other, true), response(other, false))])
    assert turned.winner == "second"


def test_a_judge_that_always_names_the_first_has_no_verdict(scenes):
    pair = (response(scenes[0], "A star."), response(scenes[0], "A ring."))
    (verdict,) = PairwiseJudge(engine=Scripted('{"better": "A"}')).compare([pair])
    assert verdict.winner is None
    assert verdict.votes == ("first", "second")
    assert "the two orders disagree: first, then second" in verdict.reason
    (half,) = PairwiseJudge(engine=Scripted('{"better": "A"}', "I cannot say.")).compare([pair])
    assert (half.winner, half.votes) == (None, ("first", None))
    assert half.reason == "no readable reply"
    (tie,) = PairwiseJudge(engine=Scripted("tie")).compare([pair])
    assert (tie.winner, tie.confidence) == ("tie", None)


def test_the_same_text_twice_ties_without_a_question(scenes):
    witness = Witness(scenes)
    pair = (response(scenes[0], "A star."), response(scenes[0], "A star."))
    (verdict,) = PairwiseJudge(engine=witness).compare([pair])
    assert (verdict.winner, verdict.reason) == ("tie", "the same text")
    assert not witness.requests


def test_two_prompts_cannot_be_compared(scenes):
    other = response(scenes[0], "A ring.")
    other.messages = [user_message("Why?", 1)]
    for wrong in (other, response(scenes[1], "A ring.")):
        with pytest.raises(ValueError, match="answer different prompts or pictures"):
            PairwiseJudge(engine=Witness(scenes)).compare([(response(scenes[0], "A star."), wrong)])


def test_grades_follow_the_picture(scenes):
    one, other = scenes
    reward = JudgedAttributes(engine=Witness(scenes))
    found = reward.score([response(one, language.caption(one)), response(other, language.caption(one))])
    assert list(found) == list(RUBRIC)
    assert all(values.tolist() == [4, 1] for values in found.values())
    assert reward.judge.counts == {"asked": 2, "read": 2, "missing": 0, "cached": 0}


def test_the_order_of_attributes_is_the_seeds():
    def order(seed, text):
        engine = Scripted(json.dumps(FIVE))
        JudgedAttributes(engine=engine, seed=seed).score([Response("row", [], ASKED[:0], text)])
        return tuple(re.findall(r'"(\w+)": <0-4>', message_text(engine.requests[0].messages)))

    assert order(0, "a") == order(0, "a")
    assert len({order(seed, "a") for seed in range(8)}) > 4
    assert len({order(0, text) for text in "abcdefgh"}) > 4


def test_an_unreadable_reply_is_asked_for_twice_more_and_then_missing():
    engine = Scripted("Fine.", "Four!", json.dumps(FIVE))
    found = JudgedAttributes(engine=engine).score([Response("row", [], [user_message("Hi")], "Hello.")])
    assert found["correctness"].item() == 4
    assert len(engine.requests) == 3
    texts = [message_text(request.messages) for request in engine.requests]
    assert ["could not be read" in text for text in texts] == [False, True, True]
    assert [sampling.temperature for sampling in engine.samplings] == [0, 0, 0.7]
    reward = JudgedAttributes(engine=Scripted("Fine."))
    found = reward.score([Response("row", [], [user_message("Hi")], "Hello.")])
    assert all(math.isnan(values.item()) for values in found.values())
    assert reward.judge.counts == {"asked": 3, "read": 0, "missing": 1, "cached": 0}


def test_a_rerun_asks_nothing_and_another_picture_wording_or_model_asks_again(scenes, tmp_path):
    one, other = scenes
    cache = str(tmp_path / "new" / "replies.sqlite")
    rows = [response(one, "A star."), response(one, "A ring."), response(one, "A star.")]

    def asked(rows, engine=None, **settings):
        engine = engine or Witness(scenes)
        JudgedAttributes(engine=engine, cache=cache, **settings).score(rows)
        return len(engine.requests)

    assert asked(rows) == 2  # the third is the first again
    assert asked(rows) == 0
    assert asked([response(other, "A star.")]) == 1
    assert asked(rows, facts=True) == 2
    assert asked(rows, sampling=Sampling(max_new_tokens=64, temperature=0.0)) == 2
    newer = Witness(scenes)
    newer.fingerprint = "newer"
    assert asked(rows, newer) == 2
    assert asked(rows) == 0
    asking = (
        JudgedAttributes(engine=Witness([])),
        JudgedAttributes(engine=Witness([]), facts=True),
        JudgedAttributes(engine=newer),
    )
    with sqlite3.connect(cache) as base:
        assert {row[0] for row in base.execute("SELECT source FROM replies")} == {reward.version for reward in asking}


def test_a_question_that_was_given_up_is_asked_anew_and_what_is_said_then_is_kept(tmp_path, caplog):
    rows = [Response("row", [], [user_message("Hi")], text) for text in ("Hello.", "Bye.")]
    cache = tmp_path / "replies.sqlite"

    def graded(*replies):
        engine = Scripted(*replies)
        reward = JudgedAttributes(engine=engine, cache=str(cache))
        scores = reward.score(rows)["correctness"].tolist()
        return [None if math.isnan(score) else score for score in scores], len(engine.requests), reward.judge

    good = json.dumps(FIVE)
    found, asked, judge = graded(
        "Fine.", "So so.", "Fine.", good, "Fine."
    )  # the second one is read when it is reminded
    assert (found, asked, judge.unread) == ([None, 4], 5, "Fine.")
    assert "1 of 2 judgements are missing: no readable reply in 3 attempts (first: row: 'Fine.')" in caplog.text
    with sqlite3.connect(cache) as base:
        assert base.execute("SELECT count(*) FROM replies WHERE reply = 'Fine.'").fetchone() == (3,)
    assert graded("Fine.")[:2] == ([None, 4], 3)  # a judge that says the same again
    assert graded("Well.", good)[:2] == ([4, 4], 2)
    assert graded("Never asked.")[:2] == ([4, 4], 0)


def test_a_question_that_was_not_given_up_goes_on_where_it_stopped(tmp_path):
    row = Response("row", [], [user_message("Hi")], "Hello.")
    cache = str(tmp_path / "replies.sqlite")
    busy = JudgedAttributes(engine=Overloaded("could not be read", reply="Fine."), cache=cache)
    assert math.isnan(busy.score([row])["correctness"].item())
    assert (busy.failures, busy.judge.unread) == ({0: "busy"}, None)
    engine = Overloaded(reply=json.dumps(FIVE))
    assert JudgedAttributes(engine=engine, cache=cache).score([row])["correctness"].item() == 4
    assert ["could not be read" in message_text(one.messages) for one in engine.requests] == [True]


def test_a_judge_without_pictures_is_told_the_facts_or_does_not_judge(scenes):
    engine = Scripted('{"better": "A"}', '{"better": "B"}')
    pairwise = PairwiseJudge(engine=engine, pictures=False)
    first, second = response(scenes[0], "A star."), response(scenes[0], "A ring.")
    assert pairwise.compare([(first, second)])[0].winner == "first"
    assert not engine.requests[0].images
    assert language.facts(scenes[0])["captions"][0] in message_text(engine.requests[0].messages)
    first.facts = second.facts = {}
    (verdict,) = pairwise.compare([(first, second)])
    assert (verdict.winner, len(engine.requests)) == (None, 2)
    assert "no facts" in verdict.reason
    graded = JudgedAttributes(engine=engine, pictures=False)
    assert math.isnan(graded.score([first])["helpfulness"].item())
    assert graded.judge.counts["missing"] == 1


def test_a_combined_reward_says_which_responses_failed():
    rewards = read_rewards(
        [{"name": "objects"}, {"name": "judge", "engine": Overloaded("A ring.", reply=json.dumps(FIVE))}]
    )
    facts = {"world": "scenes", "objects": [{"shape": "star", "colour": "red"}]}
    rows = [Response("row", [], [user_message("Hi")], text, facts=facts) for text in ("A star.", "A ring.")]
    assert rewards.score(rows)["total"].isnan().tolist() == [False, True]
    assert rewards.failures == {1: "judge: busy"}
    assert not rewards.score(rows)["total"].isnan().any()
    assert rewards.failures == {}


def test_a_picture_that_cannot_be_opened_is_missing_alone(scenes):
    broken = response(scenes[0], "A star.")
    broken.images = [{"bytes": b"no picture", "path": "a.png"}]
    found = JudgedAttributes(engine=Witness(scenes)).score([broken, response(scenes[0], "A star.")])
    assert found["helpfulness"].isnan().tolist() == [True, False]


def test_a_model_that_babbles_is_counted_missing(tiny_llava, tmp_path):
    model = ModelConfig(str(tiny_llava), device="cpu")
    settings = {
        "model": model,
        "sampling": Sampling(max_new_tokens=4, temperature=0.0),
        "cache": str(tmp_path / "c.sqlite"),
    }
    rows = [Response(f"{side}", [picture(side)], ASKED, "A dog.") for side in (0, 1)]
    reward = JudgedAttributes(**settings, attributes=["correctness"])
    assert reward.score(rows)["correctness"].isnan().all()
    assert reward.judge.counts == {"asked": 6, "read": 0, "missing": 2, "cached": 0}  # two pictures, three attempts
    with sqlite3.connect(tmp_path / "c.sqlite") as base:
        assert base.execute("SELECT count(*) FROM replies").fetchone()[0] == 6  # no request failed
    again = JudgedAttributes(**settings, attributes=["correctness"])
    assert again.score(rows)["correctness"].isnan().all()
    assert again.judge.counts == reward.judge.counts  # what nobody could read is asked anew
    assert again.version == reward.version


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither is given"),
        ({"engine": "gpt"}, "engine is a str, which cannot generate"),
        ({"engine": "gpt", "model": {"model_name_or_path": "a"}}, "both are given"),
        (
            {"model": {"model_name_or_path": "a"}, "attributes": ["honesty"]},
            r"attributes \['honesty'\]: there is a rubric",
        ),
        ({"model": {"model_name_or_path": "a"}, "attributes": []}, r"attributes \[\]"),
        ({"model": {"name": "a"}}, "model.name: unknown key"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        read_rewards([{"name": "judge", **settings}])


def test_a_judge_from_a_config_loads_no_model_yet():
    assert isinstance(read_comparator({"name": "judge", "model": {"model_name_or_path": "nowhere"}}), PairwiseJudge)


def test_by_reward():
    facts = {"world": "scenes", "objects": [{"shape": "star", "colour": "red"}]}
    texts = ["A red star.", "A red star and a ring.", "A blue star.", "A star."]
    true, invented, wrong, plain = (Response("row", [], ASKED, text, facts=facts) for text in texts)
    unknown = Response("row", [], ASKED, "A star.")
    judge = read_comparator(
        {"name": "rewards", "rewards": [{"name": "objects", "weight": {"invented": 1, "wrong": 0.5}}]}
    )
    pairs = [(true, invented), (invented, true), (true, wrong), (true, plain), (true, unknown)]
    verdicts = judge.compare(pairs)
    assert [verdict.winner for verdict in verdicts] == ["first", "second", "first", "tie", None]
    assert verdicts[0].reason == "totals 0 and -1"
    assert "no total" in verdicts[4].reason
    wider = ByReward([{"name": "objects", "weight": {"invented": 1, "wrong": 0.5}}], margin=0.5)
    assert [verdict.winner for verdict in wider.compare(pairs)] == ["first", "second", "tie", "tie", None]
    assert wider.version != judge.version
    assert wider.compare([]) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"margin": -1.0, "rewards": [{"name": "objects"}]}, "margin is -1.0"),
     ({"rewards": [{"name": "object"}]}, "did you mean 'objects'"),
     ({"rewards": []}, "the list is empty")],
)  # fmt: skip
def test_by_reward_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        read_comparator({"name": "rewards", **settings})
