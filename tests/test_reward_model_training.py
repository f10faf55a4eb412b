"""Reward training: TRL's loss and metrics on the same scores, micro-batches and resumes that change nothing."""

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import RewardTrainer as TextRewardTrainer

from prefalign.config import ConfigError
from prefalign.images import encode_png
from prefalign.rewards.rows import check_rows, check_settings, directions, keep_fitting, load_reward_pairs
from prefalign.rewards.trainer import bradley_terry, check_whole, reward_arguments
from prefalign.rewards.vlm import RewardModel
from tests.reward_runs import (
    FIVE,
    STAGE,
    assert_close,
    make_reward_model,
    make_reward_pair,
    make_reward_trainer,
    stage_config,
    write_reward_pairs,
)
from tests.tiny_vlms import picture
from tests.training_runs import largest_difference, losses, weights

CLOCK = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_reward_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


def graded(number):
    """A pair whose sides differ in some attributes, in both directions."""
    chosen = {name: (number + place) % 5 for place, name in enumerate(FIVE)}
    rejected = dict.fromkeys(FIVE, 2)
    return make_reward_pair(number, meta={"scores": {"chosen": chosen, "rejected": rejected}})


@pytest.fixture(scope="module")
def graded_pairs(tmp_path_factory):
    return write_reward_pairs(tmp_path_factory.mktemp("graded") / "pairs", [graded(number) for number in range(8)])


# --- the loss ---


def trl_loss(chosen, rejected, margin=None, coefficient=None):
    """TRL's own text trainer on given scores, with what it logs."""
    scores = torch.cat([chosen, rejected])
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(len(scores), 1), **({} if margin is None else {"margin": margin})}
    model = lambda **_: SimpleNamespace(logits=scores)  # noqa: E731
    loss = TextRewardTrainer.compute_loss(stand_in, model, inputs)
    return loss, {name: values[-1] for name, values in stand_in._metrics["train"].items()}


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 0.0, 2.0, -1.0])])
@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_the_loss_is_trls(margin, coefficient):
    chosen = torch.tensor([[1.0], [-0.3], [2.5], [0.0]], requires_grad=True)
    rejected = torch.tensor([[0.2], [0.4], [-1.0], [30.0]], requires_grad=True)
    ours = bradley_terry(chosen, rejected, margin=margin, centring=coefficient or 0.0)
    theirs, _ = trl_loss(chosen, rejected, margin, coefficient)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, (chosen, rejected)) for loss in (ours, theirs)]
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, atol=1e-7)


def test_the_centring_of_the_release_takes_the_mean_first():
    chosen, rejected = torch.tensor([[1.0], [3.0]]), torch.tensor([[-2.0], [1.0]])
    plain = bradley_terry(chosen, rejected)
    released = bradley_terry(chosen, rejected, centring=0.001, kind="abs_mean")
    squared = bradley_terry(chosen, rejected, centring=0.001)
    assert (released - plain).item() == pytest.approx(0.001 * abs((-1.0 + 4.0) / 2), abs=1e-7)
    assert (squared - plain).item() == pytest.approx(0.001 * (1.0 + 16.0) / 2, abs=1e-7)


def test_directions_turn_and_silence_attributes():
    chosen, rejected = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    loss = bradley_terry(chosen, rejected, direction=torch.tensor([[1.0, -1.0, 0.0]]))
    wanted = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 3
    assert loss.item() == pytest.approx(wanted, rel=1e-6)


# --- training ---


def test_the_first_step_logs_trls_loss_and_metrics(tiny_llava, pairs, tmp_path):
    settings = {"per_device_train_batch_size": 8, "max_steps": 1, "save_steps": 100, "center_rewards_coefficient": 0.01}
    trainer = make_reward_trainer(tiny_llava, pairs, tmp_path, trainer={"drop_facts": 0.0}, **settings)
    model, rows = trainer.model, [load_reward_pairs(pairs)[number] for number in range(8)]
    batch = model.collator(seed=3)(rows)
    with torch.no_grad():
        chosen, rejected = model(packed=batch["packed"], places=batch["places"]).chunk(2)
    loss, metrics = trl_loss(chosen, rejected, coefficient=0.01)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
        assert logged[name] == pytest.approx(metrics[name], abs=1e-4), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resume_equals_the_uninterrupted_run(lora, tiny_llava, pairs, tmp_path):
    """Six steps in two epochs, resumed in the first and at the start of the second: facts come in the same order."""
    settings = {"lora": lora, "max_steps": 6, "disable_dropout": False, "warmup_steps": 3, "logging_steps": 4}
    trainer = {"drop_facts": 0.4}
    straight = make_reward_trainer(tiny_llava, pairs, tmp_path / "straight", trainer=trainer, **settings)
    start = weights(straight.model)
    straight.train()
    for step in (2, 4):
        resumed = make_reward_trainer(tiny_llava, pairs, tmp_path / f"resumed-{step}", trainer=trainer, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        histories = [
            [{key: value for key, value in entry.items() if key not in CLOCK} for entry in run.state.log_history]
            for run in (straight, resumed)
        ]
        assert histories[0] == histories[1]
        assert largest_difference(weights(straight.model), weights(resumed.model)) == 0.0
    assert largest_difference(weights(straight.model), start) > 1e-4


def test_facts_change_their_order_from_epoch_to_epoch(tiny_llava, pairs, tmp_path):
    trainer = make_reward_trainer(tiny_llava, pairs, tmp_path, max_steps=9)
    seen = []
    collate = type(trainer.data_collator).answers

    def watch(self, rows):
        seen.append(self.epoch)
        return collate(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.data_collator), "answers", watch)
        trainer.train()
    assert seen[:4] == [0] * 4
    assert seen[4:8] == [1] * 4
    assert set(seen[8:]) == {2}


def test_one_batch_of_eight_is_eight_of_one(tiny_llava, pairs, tmp_path):
    runs = []
    for name, size in (("whole", 8), ("parts", 1)):
        settings = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 8 // size,
            "max_steps": 3,
            "save_steps": 100,
        }
        runs.append(make_reward_trainer(tiny_llava, pairs, tmp_path / name, **settings))
        runs[-1].train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=2e-6)
    logged = [[entry["accuracy"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert logged[0] == pytest.approx(logged[1])
    one, two = (
        {name: value for name, value in weights(run.model).items() if "k_proj.bias" not in name} for run in runs
    )
    assert largest_difference(one, two) < 2e-5


def test_gradient_checkpointing_changes_no_gradient(tiny_llava, pairs, tmp_path):
    found = []
    for checkpointing in (False, True):
        trainer = make_reward_trainer(tiny_llava, pairs, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing,
                                      max_steps=1, save_steps=100)  # fmt: skip
        trainer.train()
        found.append(weights(trainer.model))
    assert_close(found[0], found[1], 1e-6)


def test_training_learns_and_freezes_what_it_should(tiny_llava, pairs, tmp_path):
    trainer = make_reward_trainer(tiny_llava, pairs, tmp_path, per_device_train_batch_size=8, max_steps=30, save_steps=100,
                                  learning_rate=3e-3)  # fmt: skip
    before = weights(trainer.model)
    trainer.train()
    assert losses(trainer)[0] > 0.3
    assert losses(trainer)[-1] < 0.1
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name or "lm_head" in name for name in moved)
    assert {"head.weight", "model.model.multi_modal_projector.linear_1.weight"} <= moved


def test_margins_ask_for_a_lead(tiny_llava, tmp_path):
    data = write_reward_pairs(tmp_path / "pairs", [make_reward_pair(number, margin=3.0) for number in range(4)])
    firsts = []
    for margins in (False, True):
        trainer = make_reward_trainer(
            tiny_llava, data, tmp_path / str(margins), trainer={"margins": margins}, max_steps=1
        )
        trainer.train()
        firsts.append(losses(trainer)[0])
    assert firsts[1] > firsts[0] + 1.0


@pytest.mark.parametrize("objective", ["ranking", "regression"])
def test_five_attributes_learn_their_scores(objective, tiny_llava, graded_pairs, tmp_path):
    trainer = make_reward_trainer(tiny_llava, graded_pairs, tmp_path, model={"attributes": FIVE}, evaluates=True,
                                  trainer={"objective": objective}, per_device_train_batch_size=8, max_steps=40,
                                  save_steps=100, learning_rate=5e-3)  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.5 * losses(trainer)[0]
    assert {f"eval_accuracy/{name}" for name in FIVE} <= metrics.keys()
    assert metrics["eval_accuracy"] > 0.9


def test_directions_come_from_scores_or_from_the_attribute_a_row_is_about():
    assert directions(graded(0).to_row(), FIVE) == [-1.0, -1.0, 0.0, 1.0, 1.0]
    about = make_reward_pair(0, meta={"attribute": "coherence"}).to_row()
    assert directions(about, FIVE) == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert directions(make_reward_pair(0).to_row(), ["reward"]) == [1.0]
    with pytest.raises(
        ValueError, match="row pair-0: `meta.scores` has no number for chosen.helpfulness, chosen.correct"
    ):
        directions(make_reward_pair(0).to_row(), FIVE)
    with pytest.raises(ValueError, match="about the attribute 'coherence', and the reward model learns correctness, x"):
        directions(about, ["correctness", "x"])


# --- rows and settings ---


def check(folder, pairs, attributes=("reward",), objective="ranking", **settings):
    rows = load_reward_pairs(write_reward_pairs(folder, pairs))
    check_rows(rows, folder, attributes, objective=objective)
    check_settings(rows, folder, **{"margins": False, "rejected_pictures": False, **settings})


def test_rows_that_teach_nothing_are_refused_before_a_model_is_loaded(tmp_path):
    plain = [make_reward_pair(0), make_reward_pair(1)]
    same = {"scores": {side: {"a": 1, "b": 1} for side in ("chosen", "rejected")}}
    equal = [make_reward_pair(number, meta=same) for number in range(2)]
    check(tmp_path / "good", plain)
    for name, message, rows, settings in (
        ("margins", "none of the 2 pairs of .* has a `margin`", plain, {"margins": True}),
        (
            "pictures",
            "none of the 2 pairs of .* has `rejected_images`.*image_contrast",
            plain,
            {"rejected_pictures": True},
        ),
        (
            "equal",
            "in all 2 pairs of .* the same scores, so none says which is better",
            equal,
            {"attributes": ["a", "b"]},
        ),
        ("scores", "no number for chosen.reward", plain, {"objective": "regression"}),
        ("names", "attributes are .'a', 'a'.; give each score one name", plain, {"attributes": ["a", "a"]}),
    ):
        with pytest.raises(ValueError, match=message):
            check(tmp_path / name, rows, **settings)


def test_rows_that_are_too_long_are_dropped_and_counted(tiny_llava, pairs):
    collator = make_reward_model(tiny_llava).collator()
    rows = load_reward_pairs(pairs)
    lengths = [collator.longest(row) for row in rows]
    assert lengths[4] > lengths[0]  # four facts and none
    limit = sorted(lengths)[3]
    kept, fit = keep_fitting(rows, collator, limit)
    assert [row["id"] for row in kept] == [
        row["id"] for row, length in zip(rows, lengths, strict=True) if length <= limit
    ]
    assert fit.rows_in == 8 == fit.rows_used + len(fit.too_long)
    assert f"max_length {max(lengths)} keeps all of them" in fit.summary()
    assert keep_fitting(rows, collator, None)[1].summary() == "6 have facts"
    with pytest.raises(ValueError, match=f"the shortest needs {min(lengths)}, .* never cut"):
        keep_fitting(rows, collator, min(lengths) - 1)


def test_settings_of_trls_text_trainer_without_effect_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="trainer.eos_token: has no effect here .a conversation ends in an open sentence."
    ):
        reward_arguments({"eos_token": "x"}, output=tmp_path, seed=0)
    assert reward_arguments({}, output=tmp_path, seed=0).center_rewards_coefficient == 0.001


def test_workers_that_outlive_an_epoch_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="the order of facts would never change .* Leave it out"):
        reward_arguments({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, output=tmp_path, seed=0)
    assert reward_arguments({"dataloader_num_workers": 1}, output=tmp_path, seed=0).dataloader_num_workers == 1


def test_weights_that_are_not_finite_are_not_saved(tiny_llava, pairs, tmp_path):
    trainer = make_reward_trainer(tiny_llava, pairs, tmp_path / "run")
    with torch.no_grad():
        trainer.model.head.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"tensors to save hold numbers that are not finite \(head.bias\)"):
        trainer._save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_rows_about_another_attribute_are_refused_for_one_attribute_too():
    row = {"id": "pair-0", "meta": {"attribute": "verbosity"}}
    with pytest.raises(
        ValueError, match="about the attribute 'verbosity', and the reward model learns helpfulness.*leave"
    ):
        directions(row, ["helpfulness"])
    assert directions(row, ["verbosity"]) == directions(row, ["reward"]) == [1.0]


@pytest.mark.parametrize(
    "shared", [{"fsdp_plugin_args": {"x": 1}}, {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}]
)
def test_weights_that_are_shared_out_are_refused(shared):
    with pytest.raises(ConfigError, match="ZeRO-3 and FSDP share out the weights.*Use DDP or ZeRO-2"):
        check_whole(SimpleNamespace(**{"fsdp_plugin_args": None, "deepspeed_plugin": None, **shared}))
    check_whole(SimpleNamespace(fsdp_plugin_args=None, deepspeed_plugin=SimpleNamespace(zero_stage=2)))


# --- the stage ---


def test_the_stage_trains_saves_and_reports_with_facts_and_without(tiny_llava, pairs, tmp_path, capsys):
    rows = [
        make_reward_pair(number, rejected_images=[encode_png(picture(500 + number))] * (number % 2))
        for number in range(6)
    ]
    held_out = write_reward_pairs(tmp_path / "held_out", rows)
    config = stage_config(tiny_llava, pairs, tmp_path / "run", eval_pairs=str(held_out), lora={"r": 4, "alpha": 8})
    STAGE.main(config)
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["rows_used"] == 8
    assert results["rows_with_facts"] == 6
    assert results["eval_rows_used"] == 6
    assert 0 <= results["eval_accuracy"] <= 1
    assert results["eval_mean_reward"] != results["eval_without_facts_mean_reward"]
    model = RewardModel.load(tmp_path / "run", device="cpu")
    answers = [{**row.to_row(), "chosen": side} for row in rows for side in (row.chosen, row.rejected)]
    scores = model.score(answers)
    assert scores.mean().item() == pytest.approx(results["eval_mean_reward"], abs=1e-4)
    assert model.calibration.with_facts.mean[0] == pytest.approx(scores.mean().item(), abs=1e-4)
    accuracy = (scores[::2] > scores[1::2]).float().mean().item()
    assert accuracy == pytest.approx(results["eval_accuracy"])
    without = model.score(answers, facts=False)
    assert (without[::2] > without[1::2]).float().mean().item() == pytest.approx(results["eval_without_facts_accuracy"])
    STAGE.main(config)
    assert "is finished; nothing to do" in capsys.readouterr().out
