"""What a reward model reads: the rating turn ends in an open sentence, facts keep their lines and change their order, some go."""

from collections import Counter

import pytest

from prefalign.config import ConfigError, build
from prefalign.models import ModelConfig, load_processor
from prefalign.records import assistant_message, user_message
from prefalign.rewards.augmentation import RatingPrompt, image_marks, shown_facts
from prefalign.rewards.collator import RewardCollator
from tests.reward_runs import FACTS, RATING, make_reward_pair
from tests.tiny_vlms import PLAIN, save_tiny
from tests.training_runs import make_pair

QUESTION = [user_message("what is it ?", 1)]
ANSWER = [assistant_message("a dog")]


@pytest.fixture(scope="module")
def processor(tiny_llava):
    return load_processor(ModelConfig(str(tiny_llava), device="cpu"))


@pytest.fixture(scope="module", params=PLAIN)
def any_processor(request, tmp_path_factory):
    folder = save_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    return load_processor(ModelConfig(str(folder), device="cpu"))


def test_the_whole_text_is_conversation_answer_and_an_open_sentence(processor):
    prompt, rest = RATING.split(processor, QUESTION, ANSWER, ["- A red square.", "- The lazy dog."])
    assert prompt + rest == (
        "<bos>USER: <image>\nwhat is it ? ASSISTANT: a dog<eos>USER: Is the answer right?\nIn the image there is:\n"
        "- A red square.\n- The lazy dog.\nOne mark. ASSISTANT: The mark is"
    )
    assert prompt.endswith("what is it ? ASSISTANT:")


def test_without_facts_their_place_is_empty(processor):
    _, rest = RATING.split(processor, QUESTION, ANSWER)
    assert rest == " a dog<eos>USER: Is the answer right?\nOne mark. ASSISTANT: The mark is"


def test_facts_stand_under_the_first_point_of_the_usual_turn(processor):
    usual = RatingPrompt()
    _, rest = usual.split(processor, QUESTION, ANSWER, ["- A red square."])
    lines = rest.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("1. Accurate"))
    assert lines[first + 1 : first + 4] == [usual.lead, "- A red square.", lines[first + 3]]
    assert lines[first + 3].startswith("2. Helpful")
    assert [line.split(":")[0] for line in lines if line[:2] in ("1.", "2.", "3.", "4.")] == [
        "1. Accurate", "2. Helpful", "3. Natural", "4. Concise"
    ]  # fmt: skip
    assert rest.endswith(usual.opening)


def test_every_family_opens_a_sentence_after_the_rating_turn(any_processor):
    conversation = [user_message("what is it ?", 1), assistant_message("a dog"), user_message("red ?")]
    prompt, rest = RATING.split(any_processor, conversation, ANSWER, ["- The lazy dog."])
    assert rest.endswith("The mark is")
    assert rest.index("a dog") < rest.index("right?") < rest.index("- The lazy dog.")
    assert "red ?" in prompt
    assert prompt == RATING.split(any_processor, conversation, [assistant_message("two dogs")])[0]


def test_an_answer_ends_with_the_mark_that_the_template_lacks(processor):
    template = processor.chat_template
    processor.chat_template = template.replace("{{ eos_token }}", "")
    try:
        _, rest = RATING.split(processor, QUESTION, ANSWER, end="<eos>")
    finally:
        processor.chat_template = template
    assert rest.startswith(" a dog<eos>USER:")


def test_a_plain_text_holds_question_answer_and_pictures(any_processor):
    question, answer = (
        RatingPrompt(plain=text) for text in ("Question: {answer}", "Question: {question}\nAnswer: {answer}")
    )
    marks = image_marks(any_processor, 2)
    assert marks
    assert image_marks(any_processor, 0) == ""
    two = [user_message("what is it ?", 2)]
    prompt, rest = question.split(any_processor, [user_message("", 2)], [assistant_message("how many dogs ?")])
    assert (prompt.split(marks)[1], rest) == ("Question:", " how many dogs ?")
    prompt, rest = answer.split(any_processor, two, ANSWER)
    assert (prompt.split(marks)[1], rest) == ("Question: what is it ?\nAnswer:", " a dog")
    assert prompt.split(marks)[0] in ("", "<bos>")


def test_a_plain_text_keeps_earlier_turns_and_takes_words_as_they_are(processor):
    plain = RatingPrompt(plain="Q: {question}\nA: {answer}{facts}\nMark:", lead="")
    turns = [user_message("{answer} ?", 1), assistant_message("{facts}"), user_message("and now ?")]
    prompt, rest = plain.split(processor, turns, ANSWER, ["- {question}"])
    assert (
        prompt + rest == "<bos><image>\nQ: {answer} ?\nA: {facts}\nMark:\nQ: and now ?\nA: a dog\n- {question}\nMark:"
    )


def test_plain_and_opening_are_checked():
    with pytest.raises(ConfigError, match="holds {answer} 0 times.*Write it once"):
        RatingPrompt(plain="Question: {question}")
    with pytest.raises(ConfigError, match="opening is empty, so there is no sentence"):
        build(RatingPrompt, {"opening": " "})


def test_facts_come_from_the_first_key_that_a_row_has():
    prompt = RatingPrompt()
    captions = {"captions": ["a", " b "], "objects": [{"name": "dog"}]}
    assert prompt.facts_of({"facts": captions}) == ["- a", "- b"]
    assert prompt.facts_of({"facts": {**captions, "rationales": ["why"]}}) == ["- why"]
    assert prompt.facts_of({"facts": {**captions, "rationales": []}}) == ["- a", "- b"]
    assert prompt.facts_of({"facts": {"captions": "one"}}) == ["- one"]
    assert RatingPrompt(fact_keys=["objects"]).facts_of({"facts": captions}) == []
    assert prompt.facts_of({"facts": {}}) == prompt.facts_of({}) == []


def test_facts_of_several_pictures_say_which():
    prompt = RatingPrompt(fact="- Picture {number}: {fact}")
    facts = {"captions": ["a"], "pictures": [{"captions": ["a"]}, {"captions": ["b", "c"]}]}
    assert prompt.facts_of({"facts": facts}) == ["- Picture 1: a", "- Picture 2: b", "- Picture 2: c"]
    assert RatingPrompt().facts_of({"facts": facts}) == prompt.facts_of({"facts": facts})
    assert RatingPrompt().facts_of({"facts": {"pictures": [{"captions": ["a"]}], "captions": ["a"]}}) == ["- a"]


def test_shuffling_keeps_every_line_as_often_as_it_is_there():
    facts = [*FACTS, FACTS[0]]
    orders = [shown_facts(facts, identity="row", seed=0, epoch=epoch) for epoch in range(12)]
    assert all(Counter(order) == Counter(facts) for order in orders)
    assert len({tuple(order) for order in orders}) > 6
    assert shown_facts(facts, identity="row", seed=0, epoch=3) == orders[3]
    assert len({tuple(shown_facts(facts, identity=f"row {n}", seed=0)) for n in range(12)}) > 6
    assert facts == [*FACTS, FACTS[0]]


def test_a_share_of_the_uses_has_no_facts():
    shown = [bool(shown_facts(FACTS, identity=f"row {n}", seed=0, drop=0.15)) for n in range(2000)]
    assert 0.82 < sum(shown) / len(shown) < 0.88
    again = [bool(shown_facts(FACTS, identity=f"row {n}", seed=0, epoch=1, drop=0.15)) for n in range(2000)]
    assert again != shown


def texts(collator, row):
    """The texts of both sides, read back from a batch."""
    plain = collator([row])["plain"]
    rows = [ids[mask.bool()][:-1] for ids, mask in zip(plain["input_ids"], plain["attention_mask"], strict=True)]
    return [collator.processor.tokenizer.decode(ids) for ids in rows]


def lines(text):
    return [line for line in text.splitlines() if line.startswith("- ")]


def test_both_sides_of_a_pair_see_the_same_facts_in_one_order_that_changes(processor):
    row = make_reward_pair(4).to_row()
    orders = set()
    for epoch in range(6):
        chosen, rejected = (lines(text) for text in texts(RewardCollator(processor, rating=RATING, epoch=epoch), row))
        assert chosen == rejected
        assert Counter(chosen) == Counter(f"- {fact}" for fact in FACTS)
        orders.add(tuple(chosen))
    assert len(orders) > 2


def test_facts_are_dropped_shown_or_off_as_asked(processor):
    row = make_reward_pair(4).to_row()
    for settings, shown in (({}, 4), ({"drop_facts": 1.0}, 0), ({"facts": False}, 0)):
        found = texts(RewardCollator(processor, rating=RATING, **settings), row)
        assert [len(lines(text)) for text in found] == [shown, shown], settings
    no_place = RatingPrompt(ask="Is it right?", opening="The mark is")
    assert "- " not in "".join(texts(RewardCollator(processor, rating=no_place), row))


def test_a_share_is_from_0_to_1_and_an_answer_is_not_nothing(processor):
    with pytest.raises(ConfigError, match="drop_facts is 15; it is a share of the rows"):
        RewardCollator(processor, drop_facts=15)
    row = {**make_reward_pair(0).to_row(), "rejected": [assistant_message("")]}
    with pytest.raises(ValueError, match="row pair-0: the answer is empty, and `prompt.plain` ends with it"):
        RewardCollator(processor, rating=RatingPrompt(plain="{answer}"))([row])
    assert len(RewardCollator(processor, rating=RATING)([row])["places"]) == 2


def test_the_last_position_is_the_end_of_the_open_sentence(processor):
    batch = RewardCollator(processor, rating=RATING)([make_pair(0).to_row(), make_reward_pair(3).to_row()])
    for ids, last in zip(batch["plain"]["input_ids"], batch["places"].tolist(), strict=True):
        assert processor.tokenizer.decode(ids[: last + 1]).endswith("One mark. ASSISTANT: The mark is")
