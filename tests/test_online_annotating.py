"""Which answers become pairs: filters, scores with a margin, a judge in both orders."""

from dataclasses import dataclass

import pytest
import torch

from prefalign.config import ConfigError
from prefalign.online.annotating import ByJudge, ByScore, as_pair, read_annotator
from prefalign.online.sampling import near_identical, usable
from prefalign.records import Prompt, user_message
from prefalign.rewards import Combined, Response, Verdict, Weighted
from prefalign.store import Dropped


def drawn(text, finished=True):
    return {"text": text, "finished": finished, "tokens": 3, "logp": -1.0, "token_ids": [1, 2], "settings": {},
            "generator": "g"}  # fmt: skip


def responses(*texts):
    return [Response("row", [], [user_message("what is there ?")], text) for text in texts]


@dataclass
class LongerIsBetter:
    """A rule: more words win; or, `follows`, whatever stands first."""

    follows: bool = False
    asked: int = 0
    version: str = "longer/1"

    def compare(self, pairs):
        self.asked += len(pairs)
        lengths = [(len(one.text.split()), len(other.text.split())) for one, other in pairs]
        if self.follows:
            return [Verdict("first") for _ in lengths]
        return [Verdict("tie" if a == b else "first" if a > b else "second", 0.9, "words") for a, b in lengths]


@pytest.mark.parametrize(
    ("answers", "left", "reason"),
    [
        ([drawn("A red ring."), drawn("a red ring")], ["A red ring."], "duplicate"),
        ([drawn("A red ring."), drawn("a blue", finished=False)], ["A red ring."], "unfinished"),
        ([drawn(" "), drawn("A red ring.")], ["A red ring."], "empty"),
        ([drawn("A red ring."), drawn("A blue ring."), drawn("a", False)], ["A red ring.", "A blue ring."], None),
    ],
)
def test_answers_that_cannot_stand_in_a_pair(answers, left, reason):
    kept, why = usable(answers)
    assert [entry["text"] for entry in kept] == left
    assert why == reason


def test_near_identical_answers():
    text = "There is a small red ring at the top of the picture."
    assert near_identical(text, text.replace("red", "rad"))  # 1 of 52 characters
    assert not near_identical(text, text.replace("red ring", "blue disc"))


def test_a_judge_says_the_same_in_both_orders():
    groups = [responses("one two", "one"), responses("one", "one two"), responses("one", "two")]
    judge = LongerIsBetter()
    found = ByJudge(judge).prefer(groups)
    assert [(one.chosen, one.rejected, one.reason) for one in found] == [(0, 1, ""), (1, 0, ""), (None, None, "tie")]
    assert found[0].votes == ("first", "first")
    assert found[1].votes == ("first", "first")  # of (chosen, rejected)
    assert judge.asked == 6  # three pairs in both orders


def test_a_judge_that_follows_the_order_is_found_out():
    (found,) = ByJudge(LongerIsBetter(follows=True)).prefer([responses("one two", "one")])
    assert (found.chosen, found.reason) == (None, "order_disagrees")
    assert found.votes == ("first", "second")


def test_a_judge_that_asks_in_both_orders_itself_is_not_asked_again():
    class Both(LongerIsBetter):
        def compare(self, pairs):
            return [Verdict(one.winner, votes=(one.winner, one.winner)) for one in super().compare(pairs)]

    judge = Both()
    (found,) = ByJudge(judge).prefer([responses("one", "one two")])
    assert (found.chosen, judge.asked) == (1, 1)


def test_best_against_worst_of_four():
    texts = ["a b", "a b c d", "a", "a b c"]
    (found,) = ByJudge(LongerIsBetter()).prefer([responses(*texts)])
    assert (found.chosen, found.rejected) == (1, 2)


@dataclass
class Numbers:
    values: list

    def score(self, responses):
        return {"value": torch.tensor(self.values)}


@pytest.mark.parametrize(
    ("values", "margin", "expected"),
    [
        ([0.5, 2.0], 0.0, (1, 0, "")),
        ([2.0, 0.5], 1.5, (0, 1, "")),
        ([2.0, 0.5], 1.6, (None, None, "small_gap")),
        ([2.0, 2.0], 0.0, (None, None, "tie")),
        ([2.0, float("nan")], 0.0, (None, None, "no_score")),
        ([1.0, float("nan"), 3.0, 2.0], 0.0, (2, 0, "")),
    ],
)
def test_scores_and_their_margin(values, margin, expected):
    annotator = ByScore(Combined([Weighted("number", Numbers(values))]), margin)
    (found,) = annotator.prefer([responses(*(str(v) for v in values))])
    assert (found.chosen, found.rejected, found.reason) == expected


def test_a_pair_that_says_nearly_the_same_is_dropped_after_four_answers_too():
    prompt = Prompt("p", [], [user_message("what is there ?")])
    long = "There is a small red ring at the top of the picture"
    entries = [drawn(long), drawn(long + "s"), drawn("A disc.")]
    annotator = ByScore(Combined([Weighted("number", Numbers([2.0, 1.0, 1.5]))]))
    (found,) = annotator.prefer([responses("a", "b", "c")])
    made = as_pair(prompt, entries, found, "v", seed=0, visit=1)
    assert isinstance(made, Dropped)
    assert made.reason == "near_identical"


def test_the_annotator_of_a_config():
    rewards = [{"name": "objects"}]
    assert read_annotator(None, rewards, 0.5).margin == 0.5
    judge = read_annotator({"name": "rewards", "rewards": rewards}, [], 0.0)
    assert judge.version.startswith("rewards/")
    with pytest.raises(ConfigError, match=r"neither `annotator` nor `rewards` is given.*not both"):
        read_annotator(None, [], 0.0)
    with pytest.raises(ConfigError, match=r"both are given"):
        read_annotator({"name": "rewards"}, rewards, 0.0)
    with pytest.raises(ConfigError, match=r"margin: -1.0 is no least difference.*Give 0"):
        read_annotator(None, rewards, -1.0)
    with pytest.raises(ConfigError, match=r"margin: 0.5 .* a pairwise judge gives none. Leave it out"):
        read_annotator({"name": "rewards", "rewards": rewards}, [], 0.5)
