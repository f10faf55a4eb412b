"""PPO on a tiny model: what its passes see, what its first losses are, and that it learns."""

import json
import math

import pytest
import torch

from prefalign.config import ConfigError
from prefalign.engines import Completion
from prefalign.models import ModelConfig, load_model
from prefalign.online.advantages import masked_mean
from prefalign.rewards import Response
from prefalign.training.lora import LoraSettings
from tests.ppo_runs import Brightness, Letters, begun, history, lively, make_ppo, passes, re_read, write_prompts
from tests.training_runs import largest_difference, weights


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "rows")


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_first_policy_loss_is_minus_the_mean_advantage_and_so_zero(tiny_llava, prompts, tmp_path, lora):
    trainer = make_ppo(tiny_llava, prompts, tmp_path, lora=lora, num_mini_batches=1, per_device_train_batch_size=4,
                       max_steps=1, save_strategy="no")  # fmt: skip
    seen = []
    update = trainer._end_update
    trainer._end_update = lambda: (seen.append(masked_mean(trainer.rollout.advantages, trainer.rollout.mask)), update())
    trainer.train()
    assert seen[0].item() == pytest.approx(0, abs=1e-6)
    assert history(trainer, "loss/policy_avg")[0] == pytest.approx(0, abs=1e-5)
    assert history(trainer, "val/ratio")[0] == pytest.approx(1, abs=1e-6)
    assert history(trainer, "objective/kl")[0] == pytest.approx(0, abs=1e-5)
    assert not [name for name in trainer.state.log_history[0] if name.startswith("alarms/")]


def test_permuting_the_batch_permutes_log_probs_and_values(tiny_llava, prompts, tmp_path):
    trainer = begun(lively(make_ppo(tiny_llava, prompts, tmp_path, per_device_train_batch_size=4)))
    whole = trainer.rollout
    order = [5, 2, 7, 0, 3]
    for role, name, kept in (("policy", "log_probs", whole.logps), ("value", "values", whole.values)):
        batch = trainer._prepared(order)
        with torch.no_grad():
            found = whole.spread(trainer.roles(role, batch)[name], batch, whole.mask.shape[1])
        assert torch.allclose(found[whole.mask[order]], kept[order][whole.mask[order]], atol=1e-5)
    assert whole.logps[5].sum() != whole.logps[0].sum()


@pytest.mark.parametrize("fast_path", ["auto", "off"])
def test_swapping_two_pictures_changes_reward_log_probs_and_value(tiny_llava, prompts, tmp_path, fast_path):
    trainer = begun(lively(make_ppo(tiny_llava, prompts, tmp_path, reward=Brightness(), fast_path=fast_path)))
    before, scores = passes(trainer), trainer.rollout.scores["total"].clone()
    rows = [trainer.train_dataset[number] for number in range(4)]
    rows[0]["images"], rows[1]["images"] = rows[1]["images"], rows[0]["images"]
    said = [answer.tokens for answer in trainer.rollout.answers]
    swapped = re_read(trainer, rows, said)
    for name, values in passes(trainer).items():
        moved = (values - before[name]).abs().masked_fill(~swapped.mask, 0).amax(dim=1)
        assert (moved[:2] > 1e-3).all(), name
        assert (moved[2:] < 1e-5).all(), name
    again = trainer.scorer.rewards.score([answer.response for answer in swapped.answers])["total"]
    assert (again[:2] != scores[:2]).all()
    assert torch.equal(again[2:], scores[2:])


def test_pictures_encoded_once_give_what_encoding_in_every_pass_gives(tiny_llava, prompts, tmp_path):
    trainer = lively(make_ppo(tiny_llava, prompts, tmp_path))
    calls = []
    tower = trainer.roles.policy.get_base_model().model.vision_tower
    tower.register_forward_hook(lambda *_: calls.append(1))
    begun(trainer)
    once = passes(trainer)
    assert len(calls) == 2  # four pictures, two at a time, and no more for drawing and three passes
    calls.clear()
    rows = [trainer.train_dataset[number] for number in range(4)]
    said = [answer.tokens for answer in trainer.rollout.answers]
    re_read(trainer, rows, said)
    assert len(calls) == 2
    trainer.keeps_features, trainer.rollout.features = False, None
    calls.clear()
    re_read(trainer, rows, said)
    assert len(calls) == 6
    for name, values in passes(trainer).items():
        assert torch.allclose(values, once[name], atol=1e-5)


def test_shared_prompts_give_what_each_answer_alone_gives(tiny_llava, prompts, tmp_path):
    settings = {"num_generations": 4, "per_device_train_batch_size": 8, "num_mini_batches": 1}
    shared = begun(lively(make_ppo(tiny_llava, prompts, tmp_path, **settings)))
    plain = begun(lively(make_ppo(tiny_llava, prompts, tmp_path, fast_path="off", **settings)))
    assert [a.tokens.tolist() for a in shared.rollout.answers] == [a.tokens.tolist() for a in plain.rollout.answers]
    assert len({tuple(a.tokens.tolist()) for a in shared.rollout.answers[:4]}) > 1  # four draws to one prompt
    assert len(shared.rollout.documents.documents) == 2
    for name, values in passes(plain).items():
        assert torch.allclose(values, passes(shared)[name], atol=1e-5)


def test_temperature_is_that_of_every_log_prob(tiny_llava, prompts, tmp_path):
    trainer = begun(lively(make_ppo(tiny_llava, prompts, tmp_path, temperature=0.5, fast_path="off")))
    kept = trainer.rollout
    batch = trainer._prepared([0, 1])
    trainer.roles.activate("policy")
    plain = {key: value for key, value in batch["plain"].items() if key != "completion_mask"}
    with torch.no_grad():
        logits = trainer.roles.policy.get_base_model()(**plain).logits[:, :-1]
    mask = batch["plain"]["completion_mask"][:, 1:].bool()
    wanted = (logits[mask] / 0.5).log_softmax(-1).gather(1, plain["input_ids"][:, 1:][mask][:, None])[:, 0]
    assert torch.allclose(kept.logps[:2][kept.mask[:2]], wanted, atol=1e-4)
    trainer._policy_loss(trainer.roles, batch, [0, 1], first=True)
    assert "first_ratio" not in trainer.alarms.warned


def test_reference_stays_to_the_bit_and_only_policy_and_value_change(tiny_llava, prompts, tmp_path):
    """Test (f), and (g) for an adapter that stands for a reward model."""
    from peft import get_peft_model

    model = get_peft_model(load_model(ModelConfig(str(tiny_llava), device="cpu")), LoraSettings(r=4, alpha=8).to_peft())
    model.add_adapter("reward", LoraSettings(r=4, alpha=8).to_peft())
    for name, parameter in model.named_parameters():
        if ".reward." in name and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    trainer = make_ppo(tiny_llava, prompts, tmp_path, model=model, reward_adapter="reward", save_strategy="no")
    begun(trainer)
    before, start = passes(trainer), weights(trainer.roles)
    rollout = trainer.rollout
    same = [name for name in start if ".value." in name and "lora" in name]
    assert all(torch.equal(start[name], start[name.replace(".value.", ".reward.")]) for name in same)
    trainer.train()
    trainer.rollout = rollout
    trainer._run_through(rollout)
    after = passes(trainer)
    assert torch.equal(after["ref_logps"], before["ref_logps"])
    assert (after["logps"] - before["logps"]).abs().max() > 1e-4
    assert (after["values"] - before["values"]).abs().max() > 1e-4
    end = weights(trainer.roles)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {n for n in start if (".default." in n or ".value." in n) and "lora" in n} | {
        "value_head.weight", "value_head.bias"
    }  # fmt: skip


def test_all_weights_leave_reference_and_frozen_tower(tiny_llava, prompts, tmp_path):
    trainer = make_ppo(tiny_llava, prompts, tmp_path, lora=False, save_strategy="no")
    start = weights(trainer.roles)
    tower = trainer.roles.policy.model.vision_tower
    assert trainer.roles.reference.model.vision_tower is tower is trainer.roles.value.model.vision_tower
    trainer.train()
    end = weights(trainer.roles)
    same = {name for name in start if torch.equal(start[name], end[name])}
    assert {name for name in start if name.startswith("reference.")} <= same
    assert {name for name in start if "vision" in name or "projector" in name} <= same
    moved = {name.split(".")[0] for name in start if name not in same}
    assert moved == {"policy", "value", "value_head"}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_letter_is_learned(tiny_llava, prompts, tmp_path, lora):
    """Test (h): +1 for each letter a, within 50 iterations."""
    settings = {"learning_rate": 1e-2, "value_learning_rate": 3e-3, "r": 16} if lora else {"learning_rate": 5e-3}
    trainer = make_ppo(tiny_llava, prompts, tmp_path, lora=lora, num_mini_batches=1, per_device_train_batch_size=32,
                       num_generations=4, num_ppo_epochs=2, max_steps=28 if lora else 16, save_strategy="no", kl_coef=0.0,
                       missing_eos_penalty=None, lr_scheduler_type="constant", gradient_checkpointing=True,
                       **settings)  # fmt: skip
    trainer.train()
    scores = history(trainer, "objective/scores")
    assert scores[0] < 0.6
    assert sum(scores[-3:]) / 3 > 4 * max(scores[0], 0.25)
    assert history(trainer, "objective/kl")[-1] > 2
    assert "clip_fraction" in trainer.alarms.warned  # the steps are as wide as a test needs them


def test_checkpointed_gradients_are_those_without(tiny_llava, prompts, tmp_path):
    """Each backward pass recomputes with its own adapter."""
    found = []
    for checkpointing in (False, True):
        trainer = begun(lively(make_ppo(tiny_llava, prompts, tmp_path)))
        if checkpointing:
            trainer.roles.activation_checkpointing_enable()
        trainer.roles.train()
        batch = trainer._prepared([0, 1])
        trainer._policy_loss(trainer.roles, batch, [0, 1], first=True).backward()
        trainer._value_loss(trainer.roles, batch, [0, 1]).backward()
        found.append({name: p.grad.clone() for name, p in trainer.roles.named_parameters() if p.requires_grad})
        assert "first_ratio" not in trainer.alarms.warned
    assert found[0].keys() == found[1].keys()
    assert largest_difference(*found) < 1e-6
    moved = {name: bool(gradient.any()) for name, gradient in found[0].items()}
    assert sum(moved.values()) > 0.8 * len(moved)


class Sometimes(Letters):
    """A reward that is missing for every other answer."""

    def score(self, responses: list[Response]):
        values = super().score(responses)["letters"]
        values[1::2] = math.nan
        return {"letters": values}


def test_answers_without_a_score_count_in_nothing(tiny_llava, prompts, tmp_path):
    trainer = begun(make_ppo(tiny_llava, prompts, tmp_path, reward=Sometimes()))
    kept = trainer.rollout
    assert not kept.mask[1::2].any()
    assert kept.mask[::2].any(dim=1).all()
    assert not kept.advantages[1::2].any()
    assert trainer._logged["objective/missing"] == [0.5]
    assert sum(trainer._tokens) == kept.mask.sum()


def test_scores_are_normalised_clipped_and_lowered_for_unfinished_answers(tiny_llava, prompts, tmp_path):
    trainer = make_ppo(tiny_llava, prompts, tmp_path, reward_clip=1.0, missing_eos_penalty=2.0)
    begun(trainer)
    raw = torch.tensor([0.0, 1.0, 2.0, 9.0])
    trainer.rollout.scores["total"] = raw
    for number, answer in enumerate(trainer.rollout.answers):
        answer.response.finished = number != 1
    trainer.scorer.scale = None
    mean, deviation = raw.mean().item(), raw.std(correction=0).item()
    wanted = ((raw - mean) / deviation).clamp(-1, 1) - torch.tensor([0, 2.0, 0, 0])
    assert torch.allclose(trainer.scorer.shaped(trainer.rollout), wanted)
    trainer.rollout.scores["total"] = raw + 100  # later rollouts are measured by the first
    assert torch.allclose(trainer.scorer.shaped(trainer.rollout), torch.tensor([1.0, -1.0, 1.0, 1.0]))
    trainer.args.missing_eos_score = -5.0
    assert trainer.scorer.shaped(trainer.rollout)[1] == -5


def test_minibatches_hold_every_answer_once_and_count_tokens(tiny_llava, prompts, tmp_path):
    trainer = begun(make_ppo(tiny_llava, prompts, tmp_path, num_generations=2, num_ppo_epochs=3, num_mini_batches=2,
                             gradient_accumulation_steps=2, save_steps=6, max_steps=6))  # fmt: skip
    plan, mask = trainer._schedule, trainer.rollout.mask
    assert [len(numbers) for numbers in plan] == [2] * 12
    for epoch in range(3):
        assert sorted(number for numbers in plan[4 * epoch : 4 * epoch + 4] for number in numbers) == list(range(8))
    assert all(numbers[0] // 2 == numbers[1] // 2 for numbers in plan)  # the answers to one prompt together
    assert plan[:4] != plan[4:8]
    wanted = [int(mask[plan[2 * update] + plan[2 * update + 1]].sum()) for update in range(6)]
    assert trainer._tokens == wanted


def test_accumulated_gradients_are_those_of_one_pass(tiny_llava, prompts, tmp_path):
    """The mean runs over the tokens of the whole minibatch, however it is cut."""
    ends = []
    for size, parts in ((4, 1), (1, 4)):
        trainer = make_ppo(tiny_llava, prompts, tmp_path / str(size), per_device_train_batch_size=size, num_mini_batches=1,
                           gradient_accumulation_steps=parts, max_steps=2, save_strategy="no")  # fmt: skip
        trainer.train()
        ends.append(weights(trainer.roles))
    assert largest_difference(*ends) < 1e-5


def test_updates_stop_once_the_policy_has_moved_too_far(tiny_llava, prompts, tmp_path):
    trainer = make_ppo(tiny_llava, prompts, tmp_path, num_ppo_epochs=4, num_mini_batches=1, per_device_train_batch_size=4,
                       target_kl=1e-4, learning_rate=3e-2, max_steps=4, save_strategy="no")  # fmt: skip
    ends = []
    update = trainer._end_update
    trainer._end_update = lambda: (
        update(),
        ends.append({n: p.clone() for n, p in trainer.roles.parameters_of("policy")}),
    )
    trainer.train()
    assert len(ends) == 2  # the second update's log-probs are far from those that drew
    assert 1.0 in history(trainer, "policy/stopped_early")
    assert history(trainer, "policy/approxkl_avg")[-1] > 1.5e-4


def test_values_train_alone_at_first(tiny_llava, prompts, tmp_path):
    trainer = make_ppo(tiny_llava, prompts, tmp_path, value_warmup_iterations=1, max_steps=2, save_strategy="no",
                       value_learning_rate=1e-2)  # fmt: skip
    start = weights(trainer.roles)
    trainer.train()
    end = weights(trainer.roles)
    assert [group["lr"] for group in trainer.optimizer.param_groups] != []
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3, 1e-2}
    assert all(torch.equal(start[name], end[name]) for name in start if ".default." in name)
    assert not torch.equal(start["value_head.weight"], end["value_head.weight"])


def test_rollouts_are_written_with_every_term(tiny_llava, prompts, tmp_path):
    trainer = make_ppo(tiny_llava, prompts, tmp_path, watch=Brightness(), save_strategy="no")
    trainer.train()
    files = sorted((tmp_path / "rollouts").iterdir())
    assert [file.name for file in files] == ["000000-0.jsonl", "000001-0.jsonl"]
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(lines) == 4
    assert set(lines[0]["scores"]) == {"toy/letters", "total", "watch/watched/brightness"}
    assert lines[0]["scores"]["toy/letters"] == lines[0]["text"].count("a")
    logged = trainer.state.log_history[0]
    assert logged["watch/watched/brightness"] == pytest.approx(
        sum(line["scores"]["watch/watched/brightness"] for line in lines) / 4
    )
    assert {"objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores",
            "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg",
            "val/clipfrac_avg", "val/ratio", "val/explained_variance", "objective/eos_rate", "objective/length",
            "objective/distinct_2", "rewards/toy/letters", "episode"} <= set(logged)  # fmt: skip
    second = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert {line["id"].split("/")[0] for line in lines}.isdisjoint({line["id"].split("/")[0] for line in second})


REFUSED = [
    ({"save_steps": 3}, "a checkpoint in the middle of one would lose its rollout"),
    ({"max_steps": 3}, "the last rollout would be drawn and not be used up"),
    ({"num_generations": 4}, "the answers to one prompt would be cut apart"),
    ({"missing_eos_score": -1.0}, "both say what an unfinished answer is worth"),
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"lam": 1.5}, "lam must lie between 0 and 1"),
    ({"num_mini_batches": 16, "max_steps": 16, "save_steps": 16}, "a rollout asks 32 prompts"),
    ({"eval_strategy": "steps"}, "PPO has no loss on held-out rows"),
    ({"kl_coef": 0.0, "kl_target": 6.0}, "Start from about 0.15"),
    ({"label_smoothing_factor": 0.1}, r"trainer\.label_smoothing_factor: has no effect in PPO"),
    ({"neftune_noise_alpha": 5.0}, "noise in the embeddings would make the first ratio another than 1"),
    ({"dataloader_num_workers": 2}, r"trainer\.dataloader_num_workers: has no effect"),
    ({"dataloader_drop_last": True}, "every rollout is whole"),
    ({"auto_find_batch_size": True}, r"trainer\.auto_find_batch_size: has no effect"),
    ({"eval_steps": 5}, r"trainer\.eval_steps: has no effect"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant checkpointing"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[next(iter(settings)) for settings, _ in REFUSED])
def test_settings_that_contradict_each_other(tiny_llava, prompts, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_ppo(tiny_llava, prompts, tmp_path, **settings)


def test_what_is_logged_as_episode_and_what_decays_during_the_warm_up(tiny_llava, prompts, tmp_path):
    """Weight decay would move the policy without a gradient; answers are counted to the end of what is logged."""
    trainer = make_ppo(tiny_llava, prompts, tmp_path, value_warmup_iterations=1, max_steps=4, logging_steps=4,
                       weight_decay=0.5, learning_rate=0.1, save_strategy="no")  # fmt: skip
    start, seen = weights(trainer.roles), []
    end = trainer._end_update
    trainer._end_update = lambda: (seen.append(weights(trainer.roles)), end())
    trainer.train()
    mine = [name for name in start if ".default." in name]
    assert len(seen) == 4  # each before its optimizer step
    assert all(torch.equal(start[name], seen[2][name]) for name in mine)
    assert not all(torch.equal(start[name], seen[3][name]) for name in mine)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups if group["decays"]} == {0.5}
    assert history(trainer, "episode") == [8.0]


def test_a_policy_without_a_gradient_is_noticed(tiny_llava, prompts, tmp_path):
    trainer = make_ppo(tiny_llava, prompts, tmp_path, max_steps=2, save_strategy="no", reward=Brightness())
    forward = trainer.roles.forward

    def cut(role, batch):
        found = forward(role, batch)
        nothing = torch.stack([0.0 * p.sum() for p, trains in trainer.roles._flags if trains]).sum()
        return {name: value.detach() + nothing for name, value in found.items()} if role == "policy" else found

    trainer.roles.forward = cut
    with pytest.raises(ValueError, match="got a gradient of 0 from tokens that have advantages"):
        trainer.train()


def test_broken_weights_are_not_saved(tiny_llava, prompts, tmp_path):
    trainer = make_ppo(tiny_llava, prompts, tmp_path, save_strategy="no")
    with torch.no_grad():
        trainer.roles.value_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"value_head\.weight"):
        trainer.save_model(str(tmp_path / "broken"))
    assert not (tmp_path / "broken" / "adapter_model.safetensors").exists()


def test_answers_that_could_not_be_drawn_are_scored_by_nobody(tiny_llava, prompts, tmp_path):
    asked = []

    class Counted(Brightness):
        def score(self, responses):
            asked.append([response.id for response in responses])
            return super().score(responses)

    trainer = make_ppo(tiny_llava, prompts, tmp_path, reward=Counted(), watch=Counted())
    generate = trainer.engine.generate

    def fails(requests, sampling):
        found = generate(requests, sampling)
        found[0] = Completion(requests[0].id, "", finish_reason="error", error="no")
        return found

    trainer.engine.generate = fails
    kept = begun(trainer).rollout
    assert [len(ids) for ids in asked] == [3, 3]
    assert all(kept.answers[0].response.id not in ids for ids in asked)
    assert all(values.isnan().tolist() == [True, False, False, False] for values in kept.scores.values())
    assert kept.mask.any(dim=1).tolist() == [False, True, True, True]
    assert kept.advantages.isfinite().all()
    known = kept.scores["total"][1:]
    assert trainer.scorer.scale == pytest.approx((known.mean().item(), known.std(correction=0).item()))
    ended = [answer.response.finished for answer in kept.answers[1:]]
    assert trainer._logged["objective/eos_rate"] == [pytest.approx(sum(ended) / 3)]
