"""The labeller of the embedded world: claims and their truth, prompts as the chat template has them, a picture that matters."""

import math
import random

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from prefalign.claims import ClaimJudge, ConquerConfig
from prefalign.dividing import Answer, DivideConfig, Rules
from prefalign.engines.transformers import load_engine
from prefalign.models import ModelConfig
from prefalign.records import user_message
from prefalign.scenes import base_checkpoint, labeller, language, measure, twins
from prefalign.scenes.claims import Claim, draw_claims
from prefalign.scenes.world import draw, scene


@pytest.fixture(scope="module")
def words():
    return AutoProcessor.from_pretrained(base_checkpoint(), backend="pil").tokenizer


@pytest.fixture(scope="module")
def model(words):
    return labeller.untrained(words).eval()


def test_claims_are_true_half_of_the_time_and_their_truth_is_the_scenes():
    asked = []
    for index in range(60):
        picture = scene("val_fair", index)
        for claim in draw_claims(picture, random.Random(index), 5):
            statement = claim.question.replace("Is there", "There is").replace("?", ".")
            assert language.sentence_parses(statement)
            assert twins.true_of(statement, language.facts(picture)) == claim.true
            asked.append(claim.true)
    assert 0.4 < sum(asked) / len(asked) < 0.65


def test_prompts_are_those_of_the_chat_template(words):
    maker = AutoProcessor.from_pretrained(base_checkpoint(), backend="pil")
    claim = Claim("Is there a large red circle at the top left?", True)
    row = labeller.ask(words, [claim])
    text = maker.apply_chat_template(measure.chat(claim.question), tokenize=False, add_generation_prompt=True)
    assert row.ids == maker(images=[[draw(scene("val_fair", 0))]], text=[text])["input_ids"][0]
    assert row.labels[-1] == labeller.answer_ids(words)[0]


def test_claims_in_one_sequence_count_as_each_by_itself(words, model):
    picture = scene("val_fair", 1)
    claims = draw_claims(picture, random.Random(0), 4)
    seen = torch.randn(1, labeller.IMAGE_TOKENS, labeller.WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = labeller.loss_of(model, [labeller.ask(words, claims)], seen, words)
        alone = [labeller.loss_of(model, [labeller.ask(words, [claim])], seen, words) for claim in claims]
    assert together.item() == pytest.approx(sum(one.item() for one in alone) / 4, abs=1e-4)


def test_false_claims_count_by_their_weight(words, model):
    picture = scene("val_fair", 1)
    claims = draw_claims(picture, random.Random(0), 6)
    one = {claim.true: claim for claim in claims}
    assert set(one) == {True, False}
    seen = torch.randn(1, labeller.IMAGE_TOKENS, labeller.WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        true, false = (
            labeller.loss_of(model, [labeller.ask(words, [one[kind]])], seen, words) for kind in (True, False)
        )
        both = labeller.loss_of(model, [labeller.ask(words, [one[True], one[False]])], seen, words, 4.0)
    assert both.item() == pytest.approx((true.item() + 4 * false.item()) / 5, abs=1e-4)


def test_seeing_changes_the_upper_half_of_the_tower_and_the_projector(words):
    model = labeller.untrained(words)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    scenes = [scene("val_fair", index) for index in range(4)]
    pixels = np.stack([np.asarray(draw(one)) for one in scenes])
    given = labeller.lower_half(model, pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    with torch.no_grad():
        whole = model.model.vision_tower(images).last_hidden_state[:, 1:]
        assert torch.allclose(labeller.upper_half(model, given), whole, atol=1e-4)
    labeller.learn_to_see(model, given, torch.stack([labeller.seen_truth(one) for one in scenes]), 2)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    upper = {name for name in before if "vision_tower.encoder.layers.2." in name or "encoder.layers.3." in name}
    assert upper
    assert changed == upper | {name for name in before if "multi_modal_projector" in name}


def test_attention_starts_out_with_gathering_the_claim_and_finding_it(words, model):
    """On tokens that say the truth, untrained attention goes to the thing that is claimed, and to the first token for others."""
    language_model = model.model.language_model
    language_model.set_attn_implementation("eager")
    shares = {True: [], False: []}
    for index in range(12):
        picture = scene("val_fair", index)
        said = torch.zeros(labeller.IMAGE_TOKENS, labeller.WIDTH)
        for (begin, _), values in zip(labeller.kinds(), labeller.seen_truth(picture).T, strict=True):
            there = (values != labeller.IGNORE).nonzero()[:, 0]
            said[there, begin + values[there]] = 1.0
        for claim in draw_claims(picture, random.Random(index), 4):
            ids = torch.tensor([labeller.ask(words, [claim]).ids])
            with torch.no_grad():
                table = model.get_input_embeddings()(ids)
                table[ids == model.config.image_token_id] = said
                seen = language_model(inputs_embeds=table, output_attentions=True, use_cache=False).attentions
            gathered = seen[0][0, 0, -1]
            about = [
                at
                for at, token in enumerate(ids[0])
                if table[0, at, labeller.WORD] > 0.5 and token != words.bos_token_id
            ]
            assert gathered[about].sum() > 0.9
            shares[claim.true].append(float(seen[1][0, 0, -1][ids[0] == model.config.image_token_id].sum()))
    means = {true: sum(found) / len(found) for true, found in shares.items()}
    assert means[True] > means[False] + 0.2


def test_a_short_training_leaves_a_checkpoint_whose_answer_the_picture_changes(tmp_path):
    found = labeller.build(tmp_path, steps=4, seeing=20, pictures=64, sample=4)
    assert set(found) == {"accuracy", "swapped"}
    assert f"{found['accuracy']:.3f} of 16 claims" in (tmp_path / "README.md").read_text()
    engine = load_engine(ModelConfig(str(tmp_path), device="cpu"), batch_size=8)
    rules = Rules(
        [r"(?P<what>a [a-z ]+?) (?P<where>at the [a-z]+ [a-z]+)"],
        "There is {what} {where}.",
        "Is there {what} {where}?",
    )
    judge = ClaimJudge(engine, None, DivideConfig("rules", rules), ConquerConfig(["Yes"], ["No"], "", 0.0))
    text = "There is a large red circle at the top left. There is a small blue star at the bottom right."
    answers = [
        Answer(str(at), [user_message("Describe the picture.", 1)], text, [draw(scene("val_fair", at))])
        for at in (0, 1)
    ]
    one, other = judge.judge(answers)
    assert one.questions[0] == "Is there a large red circle at the top left?"
    odds = [[math.log(yes / no) for yes, no in zip(told.p_yes, told.p_no, strict=True)] for told in (one, other)]
    assert max(abs(a - b) for a, b in zip(*odds, strict=True)) > 0.05
    assert all(yes + no > 0 for yes, no in zip(one.p_yes, one.p_no, strict=True))


def test_too_few_or_too_many_pictures_are_refused(tmp_path):
    for pictures in (8, 20_000):
        with pytest.raises(
            ValueError, match=f"pictures={pictures}: the labeller learns from 64 pictures of train_fair at least"
        ):
            labeller.build(tmp_path, pictures=pictures)
