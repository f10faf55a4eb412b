"""Conversations in a rollout: what is drawn and what is given, how it is scored, and what each turn earns."""

import pytest
import torch
from datasets import Dataset

from prefalign import families
from prefalign.config import ConfigError
from prefalign.engines import Completion
from prefalign.models import ModelConfig, load_processor
from prefalign.online import advantages as maths
from prefalign.online.conversations import Conversation, Course, bridge, linked, spread_turns, turn_rewards
from prefalign.online.prompt_rows import keep_fitting
from prefalign.records import Prompt, assistant_message, user_message
from prefalign.rewards import Combined, Response, Weighted
from prefalign.rewards.symbolic import Symbolic
from prefalign.scenes.linked import rows as linked_rows
from prefalign.store import OutputConfig, write_records
from tests.ppo_runs import Letters, begun, lively, make_ppo, passes, re_read, write_prompts
from tests.tiny_vlms import save_tiny

RULES = {"set": "existence_count", "asked": ["exists", "count"], "reference": {"exists": "yes", "count": "some"},
         "questions": ["Is there a star?", "How many stars are there?"]}  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linked") / "rows"
    rows = [Prompt(**row) for row in linked_rows("train_biased", 0, 6)]
    write_records("test", rows, output=OutputConfig(folder), record=Prompt, settings={}, seed=0)
    return folder


def make(checkpoint, prompts, output, **settings):
    return make_ppo(checkpoint, prompts, output, **{"conversations": True, "reward": Symbolic(), **settings})


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3"])
@pytest.mark.parametrize("ends", [True, False], ids=["ended", "cut"])
def test_given_and_drawn_tokens_are_those_of_the_template(family, ends, tmp_path):
    processor = load_processor(ModelConfig(str(save_tiny(family, tmp_path / family)), device="cpu"))
    plan = Conversation([user_message("Is there a star?", 1)], ["How many?", "Where?"], {})
    course = Course("c", plan, [])
    said = ["yes", "two of them", "left"]
    end = families.turn_end_id(processor)
    texts = []
    for text in said:
        _, completion = families.render_answer(processor, course.messages, text)
        ids = processor.tokenizer(completion, add_special_tokens=False).input_ids
        ids = ids[: ids.index(end)] if end in ids else ids
        texts.append(ids)
        course.take(Completion("c", text, ids, end_token=end if ends or text == "left" else None), processor)
    assert not course.is_open
    assert course.finished is ends
    messages = [*course.messages]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    prompt, answer = families.render_answer(processor, messages, said[-1])
    written = processor.tokenizer(prompt + answer, add_special_tokens=False).input_ids
    closes = end in processor.tokenizer(answer, add_special_tokens=False).input_ids
    whole = written[: len(written) - written[::-1].index(end)] if closes else [*written, end]
    if closes or not ends:
        assert whole[-len(course.tokens) :] == course.tokens
    drawn = [token for token, mine in zip(course.tokens, course.drawn, strict=True) if mine]
    stops = [[end] if ends else [], [end] if ends else [], [end]]
    assert drawn == [token for ids, stop in zip(texts, stops, strict=True) for token in ids + stop]
    assert course.turn.count(0) == len(texts[0]) + len(stops[0])


def test_answers_are_drawn_after_the_very_tokens_that_are_trained_on(tiny_idefics3, prompts, tmp_path):
    """At a temperature near 0 each drawn token is the likeliest after everything before it."""
    trainer = begun(make(tiny_idefics3, prompts, tmp_path, temperature=0.01, num_generations=2, max_new_tokens=5,
                         fast_path="off"))  # fmt: skip
    kept = trainer.rollout
    assert all(answer.turn.max() == 1 for answer in kept.answers)
    assert kept.mask.equal(kept.drawn())
    given = [~answer.drawn for answer in kept.answers]
    assert all(8 < int(one.sum()) < 60 for one in given)
    batch = {key: value for key, value in trainer._prepared([0, 1, 2, 3])["plain"].items() if key != "completion_mask"}
    trainer.roles.activate("policy")
    with torch.no_grad():
        logits = trainer.roles.policy.get_base_model()(**batch).logits
    logits[..., trainer.engine.banned] = -torch.inf
    for row, answer in enumerate(kept.answers):
        start = int(batch["attention_mask"][row].sum()) - len(answer.tokens)
        at = logits[row, start - 1 : start - 1 + len(answer.tokens)]
        behind = at.amax(dim=1) - at.gather(1, answer.tokens[:, None])[:, 0]
        assert behind[answer.drawn].max() < 0.1
        assert behind[~answer.drawn].max() > 1  # questions are not what the model would say
    assert kept.advantages[~kept.mask].eq(0).all()
    assert len({answer.response.messages[0]["content"][-1]["text"] for answer in kept.answers}) == 2
    batch = trainer._prepared([0, 1])
    trainer.alarms.exact = False  # logits are multiplied by 100 before the softmax
    trainer._policy_loss(trainer.roles, batch, [0, 1], first=True)
    assert "first_ratio" not in trainer.alarms.warned


def test_shared_conversations_are_plain_ones_and_see_their_picture(tiny_llava, prompts, tmp_path):
    settings = {"num_generations": 2, "reward": Letters()}
    shared = begun(lively(make(tiny_llava, prompts, tmp_path / "a", **settings)))
    plain = begun(lively(make(tiny_llava, prompts, tmp_path / "b", fast_path="off", **settings)))
    assert [a.tokens.tolist() for a in shared.rollout.answers] == [a.tokens.tolist() for a in plain.rollout.answers]
    before = passes(shared)
    for name, values in passes(plain).items():
        assert torch.allclose(values, before[name], atol=1e-4)
    rows = [shared.train_dataset[number] for number in range(2)]
    for row, answer in zip(rows, shared.rollout.answers[::2], strict=True):
        row["messages"] = answer.response.messages[:1]
    rows[0]["images"], rows[1]["images"] = rows[1]["images"], rows[0]["images"]
    swapped = re_read(shared, rows, [answer.tokens for answer in shared.rollout.answers])
    second = torch.nn.utils.rnn.pad_sequence([answer.turn == 1 for answer in swapped.answers], batch_first=True)
    for name, values in passes(shared).items():
        moved = (values - before[name]).abs().masked_fill(~(swapped.mask & second), 0).amax(dim=1)
        assert (moved > 1e-4).all(), name


def test_questions_are_asked_in_an_order_drawn_for_each_iteration():
    row = {"id": "r", "images": [], "messages": [user_message("Is there a star?", 1)], "facts": {"rules": RULES}}
    made = [linked(row, f"r/{number}", permute=True, seed=0) for number in range(12)]
    orders = {tuple(one.facts["rules"]["asked"]) for one in made}
    assert orders == {("exists", "count"), ("count", "exists")}
    for one in made:
        assert [block["type"] for block in one.messages[0]["content"]] == ["image", "text"]
        texts = [one.messages[0]["content"][-1]["text"], *one.later]
        assert texts == one.facts["rules"]["questions"]
        assert dict(zip(one.facts["rules"]["asked"], texts, strict=True)) == dict(
            zip(RULES["asked"], RULES["questions"], strict=True)
        )
        assert one.facts["rules"]["reference"] == RULES["reference"]
    kept = linked(row, "r/3", permute=False, seed=0)
    assert kept.facts["rules"] == RULES
    with pytest.raises(ValueError, match="one name for each question"):
        linked({**row, "facts": {"rules": {**RULES, "asked": ["exists"]}}}, "r/0", permute=True, seed=0)


def test_a_turn_earns_at_its_own_end_and_a_conversation_no_more_than_its_total():
    said = [user_message("Is there a star?", 1), assistant_message("Yes."), user_message("How many?")]
    response = Response("r", [], said, "There are two stars.", facts={"rules": RULES})
    rewards = Combined(
        [Weighted("rules", Symbolic(), {"correct": 2.0, "consistent": 0.5}), Weighted("letters", Letters())]
    )
    earned = turn_rewards(rewards, [response])[0]
    assert earned.tolist() == [2.0, 2.5]  # right; right and consistent with the first
    total = float(rewards.score([response])["total"])
    assert total == pytest.approx(4.5 + response.text.count("a"))
    turn = torch.tensor([0, 0, 1, 1, 1, 1])
    drawn = torch.tensor([True, True, False, False, True, True])
    placed = spread_turns(earned, total, turn, drawn)
    assert placed.tolist() == pytest.approx([0, 2.0, 0, 0, 0, total - 2.0])
    assert spread_turns(earned, 1.0, turn, drawn).sum().item() == pytest.approx(1.0)  # a clipped total

    # with gamma and lambda 1 the first turn's return is that of everything at the end; later turns are rid of the first's
    kl, values = torch.zeros(1, 6), torch.zeros(1, 6)
    at_end, by_turn = (maths.place_rewards(score, kl, drawn[None], kl_coef=0.0)
                       for score in (torch.tensor([total]), placed[None]))  # fmt: skip
    one = maths.gae(at_end, values, drawn[None], gamma=1, lam=1)[1][0]
    two = maths.gae(by_turn, values, drawn[None], gamma=1, lam=1)[1][0]
    assert two[:2].tolist() == pytest.approx(one[:2].tolist())
    assert two[4:].tolist() == pytest.approx((one[4:] - 2.0).tolist())


@pytest.mark.parametrize("turn_rewards", [True, False])
def test_a_run_with_rules_places_scores_as_asked(tiny_llava, prompts, tmp_path, turn_rewards):
    class Fixed(Symbolic):
        """The rules' scores as if every answer were right."""

        def turns(self, response):
            found = super().turns(response)
            for turn in found:
                turn.said = turn.reference
            return found

    trainer = make(tiny_llava, prompts, tmp_path, reward=Fixed(), turn_rewards=turn_rewards, permute_questions=False, kl_coef=0.0,
                   missing_eos_penalty=None, normalise_rewards=False, reward_clip=None, lam=1.0)  # fmt: skip
    begun(trainer)
    kept = trainer.rollout
    assert kept.scores["total"].tolist() == [3.0] * 4  # two right, one consistent pair
    for row, answer in enumerate(kept.answers):
        first = kept.returns[row][: len(answer.turn)][(answer.turn == 0) & answer.drawn]
        second = kept.returns[row][: len(answer.turn)][(answer.turn == 1) & answer.drawn]
        assert first.tolist() == pytest.approx([3.0] * len(first))
        assert second.tolist() == pytest.approx([2.0 if turn_rewards else 3.0] * len(second))


def test_what_holds_no_conversation_says_so(tiny_llava, tmp_path):
    processor = load_processor(ModelConfig(str(save_tiny("paligemma", tmp_path / "m")), device="cpu"))
    with pytest.raises(ConfigError, match="holds one question and one answer only"):
        bridge(processor, [user_message("Is there a star?", 1)], "How many?", ended=True)
    trainer = make(tiny_llava, write_prompts(tmp_path / "rows"), tmp_path / "run")
    with pytest.raises(ValueError, match="row prompt-0: facts.rules has 0 `questions`"):
        begun(trainer)


@pytest.mark.parametrize("turn", [0, 1])
def test_a_conversation_that_breaks_off_is_scored_by_nobody(tiny_llava, prompts, tmp_path, turn):
    trainer = make(tiny_llava, prompts, tmp_path)
    generate, calls = trainer.engine.generate, []

    def fails(requests, sampling):
        found = generate(requests, sampling)
        if len(calls) == turn:
            found[0] = Completion(requests[0].id, "", finish_reason="error", error="too long")
        calls.append(len(requests))
        return found

    trainer.engine.generate = fails
    kept = begun(trainer).rollout
    assert kept.answers[0].failed == "too long"
    assert kept.scores["total"].isnan().tolist() == [True, False, False, False]
    assert kept.mask.any(dim=1).tolist() == [False, True, True, True]
    assert kept.advantages.isfinite().all()
    assert kept.returns[kept.mask].isfinite().all()


def test_max_length_is_that_of_the_whole_conversation(tiny_llava, prompts, tmp_path):
    trainer = begun(make(tiny_llava, prompts, tmp_path, max_new_tokens=6))
    places = trainer.rollout.documents.places["chosen"]
    for answer, (document, _) in zip(trainer.rollout.answers, places, strict=True):
        row = next(row for row in trainer.train_dataset if row["id"] == answer.response.id.split("/")[0])
        drawn = 6 * len(answer.turn.unique())
        whole = len(trainer.rollout.documents.documents[document].prompt) + int((~answer.drawn).sum()) + drawn
        one = Dataset.from_list([row])
        assert keep_fitting(one, trainer.processing_class, whole + 8, 6, conversations=True)[1].rows_used == 1
        with pytest.raises(ValueError, match="leaves room"):
            keep_fitting(one, trainer.processing_class, whole - 6, 6, conversations=True)
        assert keep_fitting(one, trainer.processing_class, whole - 6, 6)[1].rows_used == 1
