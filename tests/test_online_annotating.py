"""Which answers become pairs: filters, scores with a margin, a judge in both orders."""

from dataclasses import dataclass

import pytest
import torch

from prefalign.config import ConfigError
from prefalign.engines import Completion, Sampling
from prefalign.online.annotating import ByJudge, ByScore, annotate, as_pair, read_annotator
from prefalign.online.round_metrics import _annotation
from prefalign.online.sampling import Draw, near_identical, response, usable
from prefalign.pairing import unusable
from prefalign.records import Candidates, Prompt, user_message
from prefalign.rewards import Combined, Response, Verdict, Weighted
from prefalign.rewards.comparing import ByReward
from prefalign.store import Dropped, OutputConfig, read_records, write_records
from tests.online_runs import write_prompts


def drawn(text, finished=True):
    return {"text": text, "finish_reason": "stop" if finished else "length", "tokens": 3, "logp": -1.0,
            "token_ids": [1, 2], "settings": {}, "generator": "g"}  # fmt: skip


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


def test_a_judge_that_did_not_reply_has_failed_whatever_it_said_of_the_other_answers():
    class Broken(LongerIsBetter):
        def compare(self, pairs):
            said = super().compare(pairs)
            return [
                Verdict(None, error="503") if b.text == "d" else one for (_, b), one in zip(pairs, said, strict=True)
            ]

    found = ByJudge(Broken()).prefer([responses("a b", "c", "d"), responses("a b", "c")])
    assert [(one.chosen, one.reason, one.words) for one in found] == [
        (None, "judge_failed", "503"),
        (0, "", "words"),
    ]


def test_best_against_worst_of_four():
    texts = ["a b", "a b c d", "a", "a b c"]
    (found,) = ByJudge(LongerIsBetter()).prefer([responses(*texts)])
    assert (found.chosen, found.rejected) == (1, 2)


@dataclass
class Table:
    """What a judge says of two answers by their texts, in both orders; of others: that the orders disagree."""

    beaten: list[tuple[str, str]]
    version: str = "table/1"

    def compare(self, pairs):
        said = [
            "first" if (a.text, b.text) in self.beaten else "second" if (b.text, a.text) in self.beaten else None
            for a, b in pairs
        ]
        return [Verdict(winner, votes=(winner, winner) if winner else ("first", "second")) for winner in said]


@pytest.mark.parametrize(
    ("count", "beaten", "expected"),
    [
        (4, ["AD", "BC"], (0, 3, "")),  # B wins as often as A, and A did not meet C
        (4, ["AC", "BD"], (0, 2, "")),
        (4, ["CA", "DB"], (2, 0, "")),
        (3, ["AB", "BC", "CA"], (None, None, "cycle")),
        (5, ["AB", "AC", "BE", "CE", "EA", "BD", "CD"], (1, 3, "")),
        (3, [], (None, None, "order_disagrees")),
    ],
)
def test_a_pair_of_several_answers_needs_the_best_to_have_beaten_the_worst(count, beaten, expected):
    (found,) = ByJudge(Table([tuple(pair) for pair in beaten])).prefer([responses(*"ABCDE"[:count])])
    assert (found.chosen, found.rejected, found.reason) == expected
    assert found.chosen is None or found.votes == ("first", "first")


def test_the_version_of_rewards_is_the_same_on_every_machine_and_tells_weights_apart(tmp_path):
    versions = []
    for folder, weights in (("one", "a"), ("two", "a"), ("two", "b")):
        model = tmp_path / folder / "rm"
        model.mkdir(parents=True, exist_ok=True)
        (model / "model.safetensors").write_text(weights)
        (model / "reward_model.json").write_text('{"schema": 1, "self_test": {}}')
        rewards = [{"name": "reward_model", "path": str(model), "batch_size": len(versions) + 1}]
        versions.append((read_annotator(None, rewards, 0.0).version, ByReward(rewards).version))
    assert versions[0] == versions[1]
    assert all(one != other for one, other in zip(versions[1], versions[2], strict=True))
    assert str(tmp_path) not in str(versions)


def test_a_prompt_whose_answers_failed_is_not_one_that_was_drawn_offline(tmp_path):
    """Of three prompts one takes its offline pair, and the engine could not answer another one."""
    prompts = write_prompts(tmp_path / "prompts", 3)
    rows = list(read_records(prompts, Prompt))
    answers = [drawn("A red ring."), drawn("There is nothing at all in the picture.")]
    kept = rows[0]
    write_records("test", [Candidates(kept.id, kept.images, kept.messages, answers, kept.answer, kept.facts)],
                  output=OutputConfig(tmp_path / "candidates"), record=Candidates, settings={}, seed=0)  # fmt: skip
    draw = Draw(frozenset([rows[1].id]), 1.0, 0, 1)
    annotator = ByScore(Combined([Weighted("number", Numbers([2.0, 1.0]))]))
    (tmp_path / "round").mkdir()
    manifest = annotate(
        prompts, tmp_path / "candidates", annotator, draw, output=OutputConfig(tmp_path / "round" / "pairs")
    )
    assert manifest.dropped == {"drawn_offline": 1, "generation_failed": 1}
    assert _annotation(tmp_path / "round")["dropped"] == {"generation_failed": 1}


def test_stored_answers_say_how_they_ended_as_other_stages_read_it():
    cut = response(Completion("x", "A long cut answ", token_ids=[1, 2], finish_reason="length"), -1.0, Sampling(), "g")
    assert unusable([cut]) == [usable([cut, cut])[1]] == ["unfinished"]
    whole = response(Completion("x", "A ring.", token_ids=[1, 2], finish_reason="stop"), -1.0, Sampling(), "g")
    assert [cut["tokens"], whole["tokens"]] == [2, 3]


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


@dataclass
class Unanswered(Numbers):
    failures: dict


def test_a_prompt_whose_judge_did_not_reply_goes_to_quarantine(tmp_path):
    prompts = write_prompts(tmp_path / "prompts", count=2)
    rows = [Candidates(one.id, one.images, one.messages, [drawn("A red ring."), drawn("There is a disc.")])
            for one in read_records(prompts, Prompt)]  # fmt: skip
    write_records("t", rows, output=OutputConfig(tmp_path / "candidates"), record=Candidates, settings={}, seed=0)
    reward = Unanswered([2.0, 1.0, 2.0, float("nan")], {3: "503"})
    manifest = annotate(prompts, tmp_path / "candidates", ByScore(Combined([Weighted("judge", reward)])),
                        Draw(frozenset(), 0.0, 0, 1), output=OutputConfig(tmp_path / "pairs"))  # fmt: skip
    assert (manifest.rows_out, manifest.quarantined, manifest.dropped) == (1, 1, {"judge_failed": 1})
    [file] = (tmp_path / "pairs" / "quarantine").glob("*.jsonl")
    assert '"judge: 503"' in file.read_text()


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
