"""A reward model's scores: one forward pass for all answers equals one each, and every picture counts on its own side alone."""

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image

from prefalign.config import ConfigError
from prefalign.families import core
from prefalign.images import encode_png, open_image
from prefalign.records import assistant_message, user_message
from prefalign.rewards.augmentation import RatingPrompt, shown_facts
from prefalign.rewards.learned import LearnedReward
from prefalign.rewards.reward import Response
from prefalign.rewards.vlm import RewardModel
from tests.reward_runs import assert_close, loss_and_gradients, make_reward_model, make_reward_pair
from tests.tiny_vlms import PLAIN, picture, save_tiny

LAYOUTS = {"llava": "split", "llava_next": "split", "idefics3": "split", "gemma3": "mask", "paligemma": "mask"}
WHITE = encode_png(Image.new("RGB", (40, 48), "white"))


def rows_of(*pairs):
    return [pair.to_row() for pair in pairs]


@pytest.fixture(scope="module", params=PLAIN)
def family(request, tmp_path_factory):
    return request.param, save_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A calibrated reward model of a tiny LLaVA, saved and loaded again."""
    folder = tmp_path_factory.mktemp("model")
    made = make_reward_model(save_tiny("llava", folder / "base"))
    made.calibrate(rows_of(*(make_reward_pair(number) for number in range(6))))
    made.save(folder / "reward")
    return RewardModel.load(folder / "reward", device="cpu")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_prompts_run_once_give_the_scores_and_gradients_of_prompts_run_for_each_answer(family, lora):
    """Two rows with one prompt and picture, facts of different lengths, and a picture of its own for a rejected answer."""
    name, checkpoint = family
    shared, alone = (make_reward_model(checkpoint, lora=lora, fast_path=path) for path in ("auto", "off"))
    assert (shared.route.layout, alone.route.layout) == (LAYOUTS[name], "plain")
    pairs = [make_reward_pair(2), make_reward_pair(3), make_reward_pair(4)]
    pairs.append(replace(pairs[0], id="again", chosen=[assistant_message("a large red circle")]))
    pairs.append(make_reward_pair(5, rejected_images=[encode_png(picture(99))]))
    found = [loss_and_gradients(one, rows_of(*pairs), rejected_pictures=True) for one in (shared, alone)]
    assert torch.allclose(found[0][0], found[1][0], atol=5e-5)
    assert found[0][0].std() > 1e-2
    assert_close(found[0][1], found[1][1])
    assert {"head.weight", "head.bias"} < found[0][1].keys()


def test_a_score_is_the_head_on_the_last_hidden_state_of_the_whole_text(model):
    """Against transformers alone: one text, one picture, the backbone's last position."""
    pair = make_reward_pair(4)
    facts = shown_facts(model.rating.facts_of({"facts": pair.facts}), identity=pair.id, seed=0)
    text = "".join(model.rating.split(model.processor, pair.prompt, pair.chosen, facts))
    inputs = model.processor(
        text=[text], images=[[open_image(pair.images[0])]], add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = model.head(core(model.model).model(**inputs).last_hidden_state[:, -1])
    assert torch.allclose(model.score([pair.to_row()]), wanted, atol=2e-5)
    assert wanted.abs() > 1e-2


def test_one_prompt_and_picture_run_once(tiny_llava):
    """Three answers to one prompt: one document, one picture, as many scores."""
    model = make_reward_model(tiny_llava)
    pair = make_reward_pair(1).to_row()
    rows = [{**pair, "chosen": [assistant_message(text)]} for text in ("a dog", "a red dog", "a dog")]
    packed = model.collator(views=("chosen",)).answers(rows)
    assert packed["packed"]["vision"]["pixel_values"].shape[0] == 1
    assert len(packed["packed"]["layout"].documents) == 1
    assert packed["places"].tolist() == [0, 1, 0]
    seen = []
    hook = core(model.model).model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    scores = model.score(rows, batch_size=3)
    hook.remove()
    assert seen == [1]
    assert scores[0] == scores[2] != scores[1]


def test_scores_do_not_depend_on_the_batch_or_the_order(model):
    rows = rows_of(*(make_reward_pair(number) for number in range(5)))
    rows += [{**row, "chosen": row["rejected"]} for row in rows]
    whole = model.score(rows, batch_size=10)
    assert torch.allclose(model.score(rows, batch_size=3), whole, atol=2e-5)
    assert torch.allclose(model.score(rows[::-1], batch_size=4), whole.flip(0), atol=2e-5)


def test_swapping_or_blanking_a_picture_changes_its_own_scores_alone(model):
    rows = rows_of(*(make_reward_pair(number) for number in range(4)))
    before = model.score(rows)
    swapped = copy.deepcopy(rows)
    swapped[0]["images"], swapped[1]["images"] = rows[1]["images"], rows[0]["images"]
    blank = [{**rows[0], "images": [WHITE]}, *rows[1:]]
    assert ((model.score(swapped) - before).abs() > 1e-3).squeeze().tolist() == [True, True, False, False]
    assert ((model.score(blank) - before).abs() > 1e-3).squeeze().tolist() == [True, False, False, False]


def test_the_order_of_several_pictures_counts(model):
    row = make_reward_pair(1, images=2).to_row()
    turned = {**row, "images": row["images"][::-1]}
    first, second = model.score([row, turned])
    assert (first - second).abs() > 1e-3


def test_the_rejected_answer_is_shown_on_its_own_picture_where_that_is_asked(model):
    other = [encode_png(picture(77))]
    row = make_reward_pair(3, rejected_images=other).to_row()
    same = {**row, "rejected_images": []}
    scores = {}
    for name, one, asked in (("own", row, True), ("not asked", row, False), ("none stored", same, True)):
        batch = model.collator(rejected_pictures=asked, facts=False)([one])
        del batch["direction"], batch["margin"]
        scores[name] = model(**batch).detach().squeeze()
    chosen, rejected = model.score(
        [{**row, "facts": {}}, {**row, "chosen": row["rejected"], "images": other, "facts": {}}]
    )
    assert torch.allclose(scores["own"], torch.cat([chosen, rejected]), atol=2e-5)
    assert torch.allclose(scores["not asked"], scores["none stored"], atol=2e-5)
    assert torch.allclose(scores["own"][0], scores["not asked"][0], atol=2e-5)
    assert (scores["own"][1] - scores["not asked"][1]).abs() > 1e-3


def test_facts_of_one_picture_are_not_shown_where_the_sides_have_two(model):
    row = make_reward_pair(3, rejected_images=[encode_png(picture(77))]).to_row()
    tokens = {}
    for name, asked, facts in (("one", False, True), ("two", True, True), ("none", True, False)):
        batch = model.collator(rejected_pictures=asked, facts=facts)([row])
        branches = [branch for _, answers in batch["packed"]["layout"].documents for branch in answers]
        tokens[name] = sum(branches)
    assert tokens["one"] > tokens["two"] == tokens["none"]


def response(pair, **more):
    return Response(**{"id": pair.id, "images": pair.images, "messages": pair.prompt, "text": "a red square", "facts": pair.facts,
                       **more})  # fmt: skip


@pytest.fixture
def reward(model, tmp_path):
    learned = LearnedReward(tmp_path)
    learned.model = model
    return learned


def test_a_reward_is_the_models_score_on_its_scale(reward, model):
    pair = make_reward_pair(4)
    row = {**pair.to_row(), "chosen": [assistant_message("a red square")]}
    for facts, scale in ((True, model.calibration.with_facts), (False, model.calibration.without_facts)):
        reward.facts = facts
        wanted = (model.score([row], facts=facts)[0, 0] - scale.mean[0]) / scale.deviation[0]
        assert reward.score([response(pair)])["reward"].tolist() == pytest.approx([float(wanted)], abs=1e-5)
    reward.normalise = False
    assert reward.score([response(pair)])["reward"].tolist() == pytest.approx([model.score([row], facts=False).item()])


def test_a_reward_looks_at_picture_text_and_facts(reward):
    pairs = [make_reward_pair(number) for number in (3, 4)]
    before = reward.score([response(pair) for pair in pairs])["reward"]
    others = {
        "images": [response(pairs[0], images=pairs[1].images), response(pairs[1])],
        "text": [response(pairs[0], text="a dog"), response(pairs[1])],
        "facts": [response(pairs[0], facts={"captions": ["A dog."]}), response(pairs[1])],
        "no facts": [response(pairs[0], facts={}), response(pairs[1])],
    }
    for what, changed in others.items():
        differs = (reward.score(changed)["reward"] - before).abs() > 1e-3
        assert differs.tolist() == [True, False], what


def test_an_empty_response_has_a_score_too(reward):
    assert reward.score([response(make_reward_pair(1), text="")])["reward"].isfinite().all()


def test_a_response_that_cannot_be_read_has_no_score_and_stops_no_other(reward, model):
    pairs = [make_reward_pair(number) for number in range(4)]
    alone = reward.score([response(pairs[0])])["reward"]
    drawn = [*pairs[2].prompt, assistant_message("an <image>"), user_message("again ?")]
    answers = [response(pairs[0]), response(pairs[1], text="a red <image> square"), response(pairs[2], messages=drawn),
               response(pairs[3], facts={"captions": ["A <image>."]}), response(pairs[0], text="")]  # fmt: skip
    found = reward.score(answers)["reward"]
    assert found.isfinite().tolist() == [True, False, False, False, True]
    assert torch.allclose(found[:1], alone, atol=2e-5)
    usual, model.rating = model.rating, RatingPrompt(plain="Q: {question} A:{answer}")
    try:
        assert reward.score(answers)["reward"].isfinite().tolist() == [True, False, False, True, False]
    finally:
        model.rating = usual


def test_a_response_is_put_on_the_scale_of_what_it_is_shown_with(reward, model):
    """One with facts and one without in a batch: each on the scale of reference answers that were shown so."""
    with_facts, without = response(make_reward_pair(4)), response(make_reward_pair(4), facts={})
    reward.normalise = False
    raw = reward.score([with_facts, without])["reward"].tolist()
    reward.normalise = True
    scales = (model.calibration.with_facts, model.calibration.without_facts)
    assert scales[0].mean != scales[1].mean
    wanted = [(value - scale.mean[0]) / scale.deviation[0] for value, scale in zip(raw, scales, strict=True)]
    assert reward.score([with_facts, without])["reward"].tolist() == pytest.approx(wanted, abs=1e-5)
    assert [reward.deviation(one, "reward") for one in (with_facts, without)] == [
        scale.deviation[0] for scale in scales
    ]


def test_weights_that_count_nothing_are_refused(tmp_path):
    for weights in ({}, {"helpfulness": 0.0}):
        with pytest.raises(ConfigError, match="which counts no attribute.*Name one"):
            LearnedReward(tmp_path, weights=weights)


def test_no_responses_have_no_scores(reward):
    assert reward.score([])["reward"].shape == (0,)


def test_attributes_are_terms_or_one_weighted_sum(tiny_llava, tmp_path):
    five = make_reward_model(tiny_llava, attributes=["correctness", "verbosity"])
    reward = LearnedReward(tmp_path, normalise=False)
    reward.model = five
    answers = [response(make_reward_pair(number)) for number in range(3)]
    terms = reward.score(answers)
    assert list(terms) == ["correctness", "verbosity"]
    assert not torch.allclose(terms["correctness"], terms["verbosity"])
    reward.weights = {"verbosity": -0.5, "correctness": 2.0}
    total = reward.score(answers)
    assert list(total) == ["reward"]
    assert torch.allclose(total["reward"], 2 * terms["correctness"] - 0.5 * terms["verbosity"], atol=1e-6)
    reward.weights = {"corectness": 1.0}
    with pytest.raises(ValueError, match="has no attribute 'corectness'; did you mean 'correctness'"):
        reward.score(answers)


def test_the_mark_of_a_picture_in_an_answer_is_refused(model):
    row = {**make_reward_pair(0).to_row(), "chosen": [assistant_message("a red <image> square")]}
    with pytest.raises(
        ValueError, match="row pair-0: an answer, its facts or an earlier turn hold '<image>', .* Take the row out"
    ):
        model.score([row])


def test_pictures_and_placeholders_have_to_agree(model):
    row = {**make_reward_pair(0).to_row(), "images": []}
    with pytest.raises(ValueError, match="row pair-0: the prompt has 1 image placeholder.s. and `images` holds 0"):
        model.score([row])
