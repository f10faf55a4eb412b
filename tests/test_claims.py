"""Claims of an answer and what a labeller says of them: lists read, rules, worked verdicts, what cannot be judged; the reward."""

import math
import re

import pytest
from PIL import Image

from prefalign.claims import ClaimJudge, ConquerConfig, Judgement, as_meta, verdict
from prefalign.config import ConfigError
from prefalign.dividing import Answer, DivideConfig, Rules, asking_prompt, dividing_prompt, read_list
from prefalign.engines import Completion, FirstToken
from prefalign.images import encode_png
from prefalign.records import message_text, user_message
from prefalign.rewards import Response, read_rewards
from tests.tiny_vlms import picture


class Labeller:
    """Gives what a table says of the first of its words that a question holds, else a sure yes."""

    capabilities = frozenset({"first_token"})
    fingerprint = "labeller"

    def __init__(self, table=()):
        self.table = dict(table)
        self.asked = []

    def first_token(self, requests, words):
        self.asked += requests
        texts = [message_text(request.messages) for request in requests]
        found = [next((given for word, given in self.table.items() if word in text), {"Yes": 0.9}) for text in texts]
        return [
            FirstToken({}, given["error"])
            if "error" in given
            else FirstToken({word: given.get(word, given.get("all", 0.0)) for word in words})
            for given in found
        ]


class Splitter:
    """Replies in turn with what it was given, by the last word of the answer or by the number of claims."""

    capabilities = frozenset({"sample"})
    fingerprint = "splitter"

    def __init__(self, replies):
        self.replies = {key: list(given) for key, given in replies.items()}
        self.requests = []

    def generate(self, requests, sampling):
        assert (sampling.temperature, sampling.top_p) == (0.2, 0.9)
        self.requests += requests
        out = []
        for request in requests:
            text = message_text(request.messages)
            key = next(key for key in self.replies if key in text)
            reply = self.replies[key].pop(0)
            reason = "length" if reply.endswith("...") else "error" if reply == "cut" else "stop"
            out.append(
                Completion(request.id, reply, finish_reason=reason, error="no server" if reply == "cut" else None)
            )
        return out


RULES = DivideConfig(by="rules")


def answer(text, number=0, images=None):
    return Answer(f"row/{number}", [user_message("What is it?", 1)], text, images or [picture(1)])


def judge(text, table=(), splitter=None, divide=RULES, **label):
    judged = ClaimJudge(Labeller(table), splitter, divide, ConquerConfig(**label))
    return judged.judge([answer(text)])[0]


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("- A cat sits.\n- It is red.", ["A cat sits.", "It is red."]),
        ("Here is the list:\n\n* A cat sits. \n  * It is red.\n", ["A cat sits.", "It is red."]),
        ("1. A cat sits.\n2) It is red.\n10. A dog.", ["A cat sits.", "It is red.", "A dog."]),
        ("\u2022 A cat sits.", ["A cat sits."]),
        ("NONE", []),
        (" none.\n", []),
        ("A cat sits.\nIt is red.", None),
        ("- A cat sits.\nIt is red.", None),
        ("-A cat sits.", None),
        ("- A cat sits.\n-", None),
        ("One:\nTwo:\n- A cat sits.", None),
        ("Here is the list:", None),
        ("", None),
        ("3.5 metres is its length.", None),
    ],
)
def test_lists_are_read_line_by_line_or_not_at_all(text, entries):
    """No line loses its first character, and prose is no list."""
    assert read_list(text) == entries


@pytest.mark.parametrize(
    ("p_yes", "p_no", "least", "said"),
    [
        (0.51, 0.49, 0.5, "accepted"),
        (0.45, 0.45, 0.5, "rejected"),  # a tie
        (0.1, 0.8, 0.5, "rejected"),
        (0.3, 0.1, 0.5, "undecided"),
        (0.25, 0.25, 0.5, "rejected"),  # exactly the floor
        (0.3, 0.1, 0.0, "accepted"),
        (0.0, 0.0, 0.0, "rejected"),
    ],
)
def test_verdicts_by_hand(p_yes, p_no, least, said):
    assert verdict(p_yes, p_no, least) == said


def test_spellings_are_added_up_and_scores_count_rejections():
    """yes 0.3 + 0.15 against no 0.2 + 0.3: rejected, although Yes alone is as likely as No alone."""
    table = {"dragon": {"yes": 0.15, "Yes": 0.3, "no": 0.2, "No": 0.3}, "fog": {"all": 0.1}}
    found = judge("A cat. A dragon sleeps. There is fog.", table)
    assert found.p_yes == pytest.approx([0.9, 0.45, 0.2])
    assert found.p_no == pytest.approx([0.0, 0.5, 0.2])
    assert found.verdicts == ["accepted", "rejected", "undecided"]
    assert (found.score(), found.score(per_claim=True)) == (-1, -0.5)
    three = judge("A dragon. Two dragons. One dragon more.", {"dragon": {"No": 0.9}})
    assert (three.score(), three.score(per_claim=True)) == (-3, -1)
    good = judge("A cat.", table)
    assert (good.score(), math.copysign(1, good.score())) == (0, 1)


def test_what_cannot_be_judged_has_no_score_and_a_reason():
    assert judge("").reason == "no_claims"
    assert judge("no stop here").reason == "no_claims"
    assert judge("A cat. A dog.", {"A": {"No": 0.2}}).reason == "undecided"
    limit = DivideConfig(by="rules", max_words=3)
    assert judge("A cat sits.", divide=limit).reason is None
    assert judge("A cat sits there.", divide=limit).reason == "too_long"
    assert judge("A cat. " * 3000, divide=DivideConfig(by="rules", max_words=0)).reason is None
    for text in ("", "A cat sits there."):
        found = judge(text, divide=limit)
        assert found.score() is None
        assert not found.verdicts


def test_what_the_labeller_cannot_judge_does_not_beat_what_it_judged():
    """Four accepted and one rejected claim make -1; one accepted and four undecided ones would make 0."""
    table = {"dragon": {"No": 0.9}, "fog": {"all": 0.1}}
    known = judge("A cat. A dog. A bird. A cup. A dragon.", table)
    assert (known.score(), known.score(per_claim=True)) == (-1, -0.2)
    unknown = judge("A cat. Some fog. More fog. Thick fog. Thin fog.", table)
    assert unknown.verdicts == ["accepted", *["undecided"] * 4]
    assert (unknown.reason, unknown.score(), unknown.score(per_claim=True)) == ("undecided", None, None)
    half = "A cat. A dragon. More fog. Thick fog."
    assert judge(half, table).score() == -1
    assert judge(half, table, least_decided=0.51).reason == "undecided"
    assert judge("A cat. Some fog. More fog.", table, least_decided=0).score() == 0
    assert judge("Some fog.", table, least_decided=0).reason == "undecided"


def test_equal_claims_count_once_in_either_case():
    found = judge("A dragon. A cat. a dragon! A Dragon.", {"dragon": {"No": 0.9}})
    assert found.claims == ["A dragon.", "A cat."]
    assert found.score() == -1


def test_claims_with_a_negation_can_be_left_out():
    leave = DivideConfig(by="rules", negated="leave_out")
    text = "There is no dog. A cat sits. It isn't red. A knot."
    found = judge(text, divide=leave)
    assert (found.claims, found.left_out) == (["A cat sits.", "A knot."], 2)
    assert len(judge(text).claims) == 4
    assert judge("There is no dog.", divide=leave).reason == "no_claims"


def test_rules_fill_their_templates_and_say_what_they_lack():
    rules = Rules([r"(?P<what>[Aa] \w+) (?P<where>on the \w+)"], "{What} is {where}.", "Is {what} {where}?")
    assert rules.of("A cat on the left and a dog on the right.") == [
        ("A cat is on the left.", "Is a cat on the left?"), ("A dog is on the right.", "Is a dog on the right?")]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"rules.question is 'Is \{it\}\?'.*'it'.*Its groups give What, what: name these"
    ):
        Rules([r"(?P<what>\w+)"], "{What}.", "Is {it}?")
    with pytest.raises(ValueError, match="has no named group"):
        Rules(["cat"])


LISTED = "- A cat sits.\n- A dragon sleeps."
ASKED = "- Does a cat sit?\n- Does a dragon sleep?"


def test_a_model_divides_and_asks():
    labeller = Labeller({"dragon": {"No": 0.9}})
    splitter = Splitter({"Answer:\nA cat": [LISTED], "2 statements": [ASKED]})
    asking = ClaimJudge(labeller, splitter, seed=5)
    (found,) = asking.judge([answer("A cat sits by a dragon.")])
    assert found.claims == ["A cat sits.", "A dragon sleeps."]
    assert found.questions == ["Does a cat sit?", "Does a dragon sleep?"]
    assert found.score() == -1
    divided, asked = splitter.requests
    assert not divided.images
    assert message_text(divided.messages) == dividing_prompt("User: What is it?", "A cat sits by a dragon.")
    assert message_text(asked.messages) == asking_prompt(found.claims)
    assert (divided.id, asked.id, divided.seed) == ("row/0/claims/0", "row/0/questions/0", 5)
    assert [message_text(one.messages) for one in labeller.asked] == [
        "Does a cat sit? Please answer yes or no.", "Does a dragon sleep? Please answer yes or no."]  # fmt: skip
    assert all(len(request.images) == 1 for request in labeller.asked)
    assert asking.version.startswith("labeller/splitter/claims-")


@pytest.mark.parametrize(
    ("lists", "questions", "reason", "calls"),
    [
        (["prose", LISTED], [ASKED], None, 3),
        (["- A cat...", LISTED], [ASKED], None, 3),  # a list that ran into the limit
        (["prose"] * 3, [], "unreadable_list", 3),
        (["NONE"], [], "no_claims", 1),
        ([LISTED], ["- Does a cat sit?", ASKED], None, 3),
        ([LISTED], ["- Does a cat sit?"] * 3, "unequal_counts", 4),
        ([LISTED], [ASKED + "\n- And?"] * 3, "unequal_counts", 4),
        ([LISTED], ["- Does a cat sit?", "prose", "prose"], "unequal_counts", 4),
        ([LISTED], ["prose"] * 3, "unreadable_list", 4),
    ],
)
def test_lists_are_asked_for_again_and_then_given_up(lists, questions, reason, calls):
    splitter = Splitter({"Answer:\n": lists, "statements": questions})
    labeller = Labeller()
    (found,) = ClaimJudge(labeller, splitter).judge([answer("A cat sits.")])
    assert (found.reason, len(splitter.requests)) == (reason, calls)
    assert len({request.id for request in splitter.requests}) == calls
    assert len(labeller.asked) == (0 if reason else 2)


def test_a_splitter_that_fails_is_heard_of(caplog):
    splitter = Splitter({"Answer:\n": ["cut", LISTED], "statements": [ASKED]})
    (found,) = ClaimJudge(Labeller(), splitter).judge([answer("A cat sits.")])
    assert found.score() == 0
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 1 requests to the splitter failed (first: no server)."
    ]


@pytest.mark.parametrize(
    ("lists", "questions", "what"),
    [
        (["cut"] * 3, [], "claims"),
        (["prose", "cut", "prose"], [], "claims"),  # the try that failed could have given the list
        ([LISTED], ["- Does a cat sit?", "cut", "prose"], "questions"),
    ],
)
def test_a_list_that_a_fault_cost_is_no_verdict(lists, questions, what):
    splitter = Splitter({"Answer:\n": lists, "statements": questions})
    (found,) = ClaimJudge(Labeller(), splitter).judge([answer("A cat sits.")])
    assert (found.reason, found.score()) == ("generation_failed", None)
    assert found.error == f"the splitter could not be asked for the list of {what}: no server"
    assert "error" not in as_meta(found)


def test_a_labeller_that_fails_says_why_and_spoils_only_the_answers_it_was_asked_about():
    labeller = Labeller({"dog": {"error": "HTTP 429"}, "dragon": {"error": "HTTP 503"}, "bird": {"No": 0.9}})
    texts = ["A cat. A dog.", "A bird.", "A dragon. A cat.", "no stop here"]
    found = ClaimJudge(labeller, None, RULES).judge([answer(text, n) for n, text in enumerate(texts)])
    assert [one.reason for one in found] == ["generation_failed", None, "generation_failed", "no_claims"]
    assert found[1].score() == -1
    assert found[2].error == (
        "the labeller failed at 2 of 5 questions, 'Is this statement true of the picture? \"A dragon.\"' among them: HTTP 503"
    )
    assert found[0].error.endswith("among them: HTTP 429")
    assert (found[0].p_yes, found[0].verdicts, found[1].error) == ([], [], None)


def test_one_bad_answer_of_several_is_alone_in_that():
    splitter = Splitter({"Answer:\nOne": [LISTED], "Answer:\nTwo": ["prose"] * 3, "Answer:\nThree": ["- A dragon."],
                         "2 statements": [ASKED], "1 statements": ["- Is there a dragon?"]})  # fmt: skip
    labeller = Labeller({"dragon": {"No": 0.9}})
    found = ClaimJudge(labeller, splitter).judge([answer(text, n) for n, text in enumerate(("One", "Two", "Three"))])
    assert [one.score() for one in found] == [-1, None, -1]


def test_a_question_about_a_picture_is_asked_once():
    labeller = Labeller()
    shared, other = [picture(1)], [picture(1)]
    answers = [answer("A cat. A dog.", 0, shared), answer("A dog.", 1, shared), answer("A dog.", 2, other)]
    found = ClaimJudge(labeller, None, RULES).judge(answers)
    assert len(labeller.asked) == 3
    assert all(one.score() == 0 for one in found)
    assert labeller.asked[2].images[0] is other[0]


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="divide.by is 'model', and no splitter is given"):
        ClaimJudge(Labeller(), None)
    with pytest.raises(ValueError, match="none may be in both, or it would speak for and against"):
        ConquerConfig(yes=["yes", "no"])
    with pytest.raises(ValueError, match="conquer.least_mass is 50; it is a probability"):
        ConquerConfig(least_mass=50)
    with pytest.raises(ValueError, match="conquer.least_decided is 3.0; it is a share of an answer's claims"):
        ConquerConfig(least_decided=3.0)
    with pytest.raises(ValueError, match="divide.attempts is 0 .* at least once"):
        DivideConfig(attempts=0)


SCENES = {"model_name_or_path": "scenes", "device": "cpu"}
PLACES = {
    "labeller": SCENES,
    "divide": {"by": "rules", "rules": {"patterns": [r"(?P<where>(?:at|on|in) the (?:top|bottom) ?(?:left|right)?)"],
                                        "claim": "Something is {where}.", "question": "What is {where}?"}},
    "conquer": {"yes": ["A"], "no": ["Nothing"], "suffix": ""},
}  # fmt: skip


@pytest.fixture(scope="module")
def reward():
    return read_rewards([{"name": "claims", **PLACES}])


def response(text, image, name="r"):
    return Response(name, [image], [user_message("Describe the picture.", 1)], text)


def test_the_reward_scores_what_the_picture_says(reward):
    """Of a blank picture nothing at any place is true; the same text on a drawn one is believed where something stands."""
    from prefalign.scenes import world

    scenes = (world.scene("train_fair", number) for number in range(50))
    drawn = next(one for one in scenes if "top left" in [thing.place for thing in one.objects if thing.clear])
    real = {"bytes": world.png(drawn), "path": "a.png"}
    blank = encode_png(Image.new("RGB", (60, 60), "white"), "b.png")
    text = "There is a circle at the top left. There is a star at the bottom right. There is a ring at the bottom left."
    found = reward.score([response(text, real), response(text, blank), response("I see.", real)])["claims/trust"]
    assert float(found[1]) <= -2
    assert float(found[0]) > float(found[1])
    assert math.isnan(float(found[2]))
    assert math.isnan(float(reward.score([response("I see.", real)])["total"]))


def test_the_reward_says_which_responses_a_labeller_failed():
    rewards = read_rewards([{"name": "claims", "labeller": SCENES, "divide": {"by": "rules"}}])
    rewards.entries[0].reward.judge = ClaimJudge(Labeller({"dragon": {"error": "HTTP 503"}}), None, RULES)
    blank = encode_png(Image.new("RGB", (60, 60), "white"), "b.png")
    broken = {"bytes": b"no picture", "path": "c.png"}
    rows = [
        response("A cat.", broken),
        response("A cat.", blank),
        response("I see", blank),
        response("A dragon.", blank),
    ]
    assert rewards.score(rows)["total"].isnan().tolist() == [True, False, True, True]
    assert list(rewards.failures) == [3]
    assert rewards.failures[3].endswith("among them: HTTP 503")
    rewards.score(rows[:2])
    assert rewards.failures == {}


def test_the_reward_gives_no_score_where_too_few_claims_are_decided():
    fog = Labeller({"fog": {"all": 0.1}, "dragon": {"No": 0.9}})
    blank = encode_png(Image.new("RGB", (60, 60), "white"), "b.png")
    said = ["A cat. Some fog. More fog. Thick fog. Thin fog.", "A cat. A dog. A bird. A cup. A dragon."]
    for least, expected in ((0.5, None), (0.2, 0.0)):
        conquer = {"least_decided": least}
        rewards = read_rewards([{"name": "claims", "labeller": SCENES, "divide": {"by": "rules"}, "conquer": conquer}])
        reward = rewards.entries[0].reward
        reward.judge = ClaimJudge(fog, None, RULES, reward.conquer)
        unknown, known = rewards.score([response(text, blank) for text in said])["total"].tolist()
        assert known == -1
        assert math.isnan(unknown) if expected is None else unknown == expected


def test_the_reward_per_claim_and_what_it_cannot_open():
    reward = read_rewards([{"name": "claims", **PLACES, "per_claim": True}])
    blank = encode_png(Image.new("RGB", (60, 60), "white"), "b.png")
    broken = {"bytes": b"no picture", "path": "c.png"}
    text = "A star at the top. A ring at the bottom right."
    none = Response("n", [], [user_message("What?")], text)
    found = reward.score([response(text, blank), response(text, broken), none])["total"].tolist()
    assert -1 <= found[0] < 0
    assert found[0] == -round(-found[0] * 2) / 2
    assert all(map(math.isnan, found[1:]))
    (entry,) = reward.entries
    assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{8}/rules", entry.reward.version)
    with pytest.raises(ConfigError, match="unknown key"):
        read_rewards([{"name": "claims", "labeller": SCENES, "judge": 1}])


def test_a_judgement_without_verdicts_is_no_zero():
    assert Judgement(reason="no_claims").score(per_claim=True) is None
