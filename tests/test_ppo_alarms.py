"""The alarms of a PPO run: each goes off where it should, once in words and in every log, and not where all is well."""

import logging
import math

import pytest
import torch

from prefalign.models import ModelConfig, freeze, load_model
from prefalign.online.monitoring import Alarms, Tally, correlation, distinct
from prefalign.online.roles import REFERENCE, VALUE
from prefalign.records import Prompt, user_message
from prefalign.rewards.learned import LearnedReward
from prefalign.store import OutputConfig, write_records
from tests.ppo_runs import Letters, begun, history, lively, make_ppo, perturb, write_prompts

WELL = {
    "objective/kl": 0.0, "objective/length": 30.0, "objective/eos_rate": 0.9, "objective/entropy_per_token": 1.0,
    "objective/distinct_2": 0.6, "objective/score_length_correlation": 0.1, "objective/scores": 0.0,
    "val/explained_variance": 0.2, "probe/learned/blank_picture_gap": 0.3, "watch/objects/recall": 0.6,
}  # fmt: skip

CASES = [
    ({"objective/kl": 1.0}, 0, "kl_at_start", "the reference is not the model that the policy starts from"),
    ({"objective/kl": -3.0}, 4, "negative_kl", "answers are not drawn from the policy"),
    ({"objective/kl": 80.0}, 4, "far_from_reference", "Raise kl_coef"),
    ({"objective/length": 60.0, "objective/eos_rate": 0.5}, 4, "verbosity", "end by themselves 40% less often"),
    (
        {"objective/length": 60.0, "objective/score_length_correlation": 0.8},
        4,
        "length_reward",
        "the policy learns length",
    ),
    ({"objective/entropy_per_token": 0.1}, 4, "collapse", "entropy is 10%"),
    ({"objective/distinct_2": 0.1}, 4, "collapse", "distinct word pairs 17%"),
    ({"probe/learned/blank_picture_gap": 0.0}, 4, "blind_reward/learned", "it does not look"),
    ({"objective/scores": 1.0, "watch/objects/recall": 0.3}, 4, "hacking/objects/recall", "has fallen by 0.3"),
]


@pytest.mark.parametrize(
    ("change", "iteration", "name", "message"), CASES, ids=[f"{case[2]}-{n}" for n, case in enumerate(CASES)]
)
def test_each_alarm_goes_off_once_in_words_and_in_every_log(change, iteration, name, message, caplog):
    alarms = Alarms(exact=True)
    with caplog.at_level(logging.WARNING):
        if iteration:
            assert alarms.rollout(WELL, 0) == {}
        for number in (iteration, iteration + 1):
            raised = alarms.rollout({**WELL, **change}, number)
            if number == iteration or name != "kl_at_start":
                assert raised == {f"alarms/{name}": 1.0}
        assert alarms.rollout(WELL, iteration + 2) == {}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"{name}: ")
    assert message in said[0]


def test_values_that_explain_less_than_nothing_for_three_iterations():
    alarms = Alarms(exact=True)
    bad = {**WELL, "val/explained_variance": -0.3}
    raised = [bool(alarms.rollout(bad, number)) for number in range(8)]
    assert raised == [False] * 5 + [True] * 3
    assert alarms.rollout(WELL, 8) == {}
    assert not alarms.rollout(bad, 9)


def test_clip_fraction_and_first_ratio():
    alarms = Alarms(exact=False)
    assert alarms.update({"policy/clipfrac_avg": 0.2}) == {}
    assert alarms.update({"policy/clipfrac_avg": 0.4}) == {"alarms/clip_fraction": 1.0}
    assert alarms.first_ratio(5e-3) == {}
    assert alarms.first_ratio(2e-2) == {"alarms/first_ratio": 1.0}
    assert Alarms(exact=True).first_ratio(5e-3) == {"alarms/first_ratio": 1.0}


def test_numbers_that_are_not_known_raise_nothing():
    alarms = Alarms(exact=True)
    unknown = dict.fromkeys(WELL, math.nan)
    assert alarms.rollout(unknown, 0) == {}
    assert alarms.rollout(unknown, 9) == {}


@pytest.mark.parametrize("fault", ["temperature", "picture", "adapter"])
def test_a_fault_between_rollout_and_update_is_noticed(tiny_llava, tmp_path, fault, caplog):
    """The ratio's alarm in a real run: passes that differ in what the table names."""
    trainer = lively(make_ppo(tiny_llava, write_prompts(tmp_path / "p"), tmp_path / "run", max_steps=1, num_mini_batches=1,
                              per_device_train_batch_size=4, save_strategy="no"))  # fmt: skip
    plan = trainer._plan

    def break_it(rollout):
        plan(rollout)
        if fault == "temperature":
            rollout.logps = rollout.logps * 0.9
        elif fault == "picture":
            for parts in rollout.features.values():
                parts["pooled"] = torch.zeros_like(parts["pooled"])
        else:
            perturb(trainer, "default", seed=9)

    trainer._plan = break_it
    trainer.train()
    assert trainer.state.log_history[0]["alarms/first_ratio"] == 1.0
    assert "before any update the policy gives the tokens that it drew other log-probs" in caplog.text


def test_a_wrong_reference_is_noticed(tiny_llava, tmp_path):
    trainer = lively(make_ppo(tiny_llava, write_prompts(tmp_path / "p"), tmp_path / "run", save_strategy="no"))
    begun(trainer)
    assert trainer._logged["alarms/kl_at_start"] == [1.0]
    assert REFERENCE not in trainer.roles.policy.peft_config
    assert VALUE in trainer.roles.policy.peft_config


class Longer(Letters):
    """A reward that likes length, and nothing else."""

    def score(self, responses):
        return {"letters": torch.tensor([float(response.tokens) for response in responses])}


class Truth(Letters):
    """What is lost meanwhile: short answers."""

    def score(self, responses):
        return {"short": torch.tensor([-float(response.tokens) for response in responses])}


def freeze_vision(model):
    freeze(model, ["vision", "projector"])
    return model


def test_a_reward_for_length_is_seen_in_the_runs_own_alarms(tiny_llava, tmp_path):
    """Answers that end early learn not to: the reward rises, what is watched falls, and the run says so."""
    prompts = write_prompts(tmp_path / "p")
    settings = {"lora": False, "reward": Longer(), "watch": Truth(), "max_new_tokens": 12, "per_device_train_batch_size": 32,
                "num_generations": 4, "num_mini_batches": 1, "missing_eos_penalty": None, "kl_coef": 0.0}  # fmt: skip
    model = load_model(ModelConfig(str(tiny_llava), device="cpu"))
    first = begun(
        make_ppo(tiny_llava, prompts, tmp_path / "first", model=freeze_vision(model), max_steps=1, **settings)
    )
    with torch.no_grad():
        states = first.roles._states(first.roles.policy, first._prepared([0, 1, 2, 3])).mean(dim=0)
        model.lm_head.weight[first.engine.ends[0]] = 6 * states / states.norm() ** 2
    trainer = make_ppo(tiny_llava, prompts, tmp_path / "run", model=model, max_steps=6, learning_rate=5e-3, save_strategy="no",
                       **settings)  # fmt: skip
    trainer.train()
    lengths, watched = history(trainer, "objective/length"), history(trainer, "watch/watched/short")
    assert lengths[-1] > 1.5 * lengths[0]
    assert watched[-1] < watched[0]
    assert history(trainer, "objective/scores")[-1] > history(trainer, "objective/scores")[0]
    assert {"verbosity", "hacking/watched/short", "length_reward"} <= set(trainer.alarms.warned)


def test_tallied_means_leave_out_what_is_missing():
    tally = Tally(lambda sums: 2 * sums, torch.device("cpu"))  # two processes that saw the same
    tally.add("a", torch.tensor([1.0, math.nan, 3.0]))
    tally.add("a", torch.tensor([8.0]))
    tally.add("sums", torch.tensor(6.0), torch.tensor(4))
    tally.add("none", torch.tensor([math.nan]))
    means = tally.means()
    assert means["a"] == 4.0
    assert means["sums"] == 1.5
    assert math.isnan(means["none"])
    assert tally.means() == {}


def test_distinct_and_correlation():
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert distinct([[1, 1, 1, 1]], 1) == 1 / 4
    assert math.isnan(distinct([[1]], 2))
    one = torch.tensor([1.0, 2.0, 3.0, math.nan])
    assert correlation(one, torch.tensor([2.0, 4.0, 6.0, 0.0])) == pytest.approx(1)
    assert correlation(one, -one) == pytest.approx(-1)
    assert math.isnan(correlation(one, torch.ones(4)))


def test_what_is_tallied_has_the_same_names_without_pictures(tiny_llava, tmp_path):
    """Processes add up by place, and one of them may have drawn no row with a picture."""
    text = [Prompt(f"t{number}", [], [user_message("what is it ?")], answer="a dog") for number in range(8)]
    write_records("test", text, output=OutputConfig(tmp_path / "text"), record=Prompt, settings={}, seed=0)
    names = []
    for folder in (write_prompts(tmp_path / "shown"), tmp_path / "text"):
        trainer = make_ppo(tiny_llava, folder, tmp_path / f"run-{folder.name}", reward=Graded(tmp_path),
                           blank_picture_probe=2)  # fmt: skip
        trainer.scorer.alike = lambda model: False
        begun(trainer)
        tally = Tally(lambda sums: sums, torch.device("cpu"))
        trainer.scorer.score(trainer.rollout, tally)
        names.append(set(tally.sums))
        gap = tally.means()["probe/toy/blank_picture_gap"]
        assert math.isnan(gap) == (folder.name == "text")
    assert names[0] == names[1]


class Graded(LearnedReward):
    """A reward that counts as one that looks."""

    model = None

    def score(self, responses):
        return {"length": torch.tensor([float(len(response.text)) for response in responses])}
