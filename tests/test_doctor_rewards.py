"""`prefalign doctor` of reward models, PPO and online DPO: healthy runs pass, and a check says what is wrong with a run."""

import pytest
import torch

from prefalign import bundled, cli, config, doctor
from prefalign.config import ConfigError
from prefalign.doctor import drawing, model
from tests.doctor_runs import by_name
from tests.launching import ROOT
from tests.online_runs import online_config, write_offline, write_prompts
from tests.ppo_runs import write_prompts as write_plain_prompts
from tests.reward_runs import STAGE as REWARD
from tests.reward_runs import make_reward_model, make_reward_pair, stage_config, write_reward_pairs

PPO = bundled.load_stage("train_ppo")
ONLINE = bundled.load_stage("train_online")
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("world") / "prompts", 8)


@pytest.fixture(scope="module")
def ungraded(tmp_path_factory, tiny_llava):
    """A reward model that nobody has graded."""
    made = make_reward_model(tiny_llava, lora=True)
    made.calibrate([make_reward_pair(number).to_row() for number in range(4)])
    made.save(tmp_path_factory.mktemp("reward") / "model")
    return tmp_path_factory.getbasetemp() / "reward0" / "model"


def verdicts(findings, kind):
    return {finding.check for finding in findings if finding.verdict == kind}


def ppo_config(checkpoint, prompts, output, **changes):
    values = {
        "model": {"model_name_or_path": str(checkpoint), "device": "cpu"},
        "prompts": str(prompts),
        "output": str(output),
        "rewards": [{"name": "function", "function": f"{ROOT / 'tests' / 'ppo_rewards.py'}:letters"}],
        "trainer": {"use_cpu": True, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "num_mini_batches": 2,
                    "per_device_train_batch_size": 4, "max_new_tokens": 24, "gradient_checkpointing": False},
        "lora": LORA,
    }  # fmt: skip
    return config.build(PPO.Config, config.merge(values, changes))


def test_a_healthy_reward_model_passes(tiny_llava, tmp_path):
    pairs = write_reward_pairs(tmp_path / "pairs", 8)
    chosen = stage_config(tiny_llava, pairs, tmp_path / "run", lora=LORA)
    findings = doctor.examine(REWARD, chosen)
    assert verdicts(findings, "fail") == set()
    assert verdicts(findings, "skip") == set()
    found = by_name(findings)
    assert found["rows"].seen == "8 pairs, 8 of a sample of 8 read"
    assert found["visual tokens"].seen == "4 to 4 a row with pictures"
    assert "on 4 pairs" in found["one batch"].seen
    moved = found["picture counts"].seen.split("another row's")[0].rpartition("by ")[2].split()[0]
    assert float(moved) > 1e-4
    assert not chosen.output.exists()


def test_what_is_wrong_with_a_reward_models_run(tiny_llava, tmp_path):
    pairs = write_reward_pairs(tmp_path / "pairs", [make_reward_pair(number, facts={}) for number in range(8)])
    chosen = stage_config(tiny_llava, pairs, tmp_path / "run", freeze=["vision"], trainer={"max_length": 40})
    found = by_name(doctor.examine(REWARD, chosen))
    assert found["max_length"].verdict == "fail"
    assert "keeps all of the sample" in found["max_length"].advice
    assert found["one batch"].verdict == "skip"
    assert found["facts"].verdict == "warn"
    assert "set facts to false" in found["facts"].advice


def test_a_healthy_ppo_run_passes(prompts, tmp_path):
    chosen = ppo_config("scenes", prompts, tmp_path / "run", trainer={"max_new_tokens": 96})
    findings = doctor.examine(PPO, chosen)
    assert verdicts(findings, "fail") == set()
    assert verdicts(findings, "skip") == {"reward graded"}
    found = by_name(findings)
    assert found["prompts"].seen == "8 prompts; 4 of 4 in the batch show pictures"
    assert found["generation"].seen.startswith("4 answers, 4 different")
    assert "4 of 4 count; function/" in found["rewards"].seen
    assert float(found["picture counts"].seen.split("by ")[1].split()[0]) > 0.01
    assert not chosen.output.exists()


def test_the_policy_is_examined_though_the_values_begin_alone(prompts, tmp_path):
    """A run whose first iterations train the values alone, an adapter of which only the B can move at the start."""
    trainer = {"max_new_tokens": 96, "value_warmup_iterations": 2}
    chosen = ppo_config("scenes", prompts, tmp_path / "run", trainer=trainer)
    findings = by_name(doctor.examine(PPO, chosen))
    found = findings["gradients"]
    assert found.verdict == "pass"
    # 4 blocks of 7 linear layers, in each a B that moves and an A behind it, beside 56 of the values and their head's two
    assert "; 30 of 114 trainable tensors have one" in found.seen
    assert found.seen.endswith(", 84 lie behind a factor that starts at 0")
    assert findings["weights move"].verdict == "pass"


def test_a_policy_without_a_gradient_is_told_from_values_that_have_one(prompts, tmp_path):
    chosen = ppo_config("scenes", prompts, tmp_path / "run", trainer={"max_new_tokens": 24})
    case = drawing.prepare_ppo(chosen, rows=4, scratch=tmp_path / "scratch")
    gradients, advantages = case.step.gradients, case.trainer.rollout.advantages
    for name in gradients:
        if not name.startswith("value_head"):
            gradients[name] = torch.zeros_like(gradients[name])
    (found,) = model.check_gradients(case)
    assert found.verdict == "fail"
    assert "No tensor of the policy gets a gradient other than 0 from tokens that have advantages" in found.advice
    case.trainer.rollout.advantages = torch.zeros_like(advantages)
    (found,) = model.check_gradients(case)
    assert found.verdict == "warn"
    assert "No token of the batch has an advantage" in found.advice


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": {"gradient_accumulation_steps": 0}}, "trainer.gradient_accumulation_steps is 0"),
        ({"trainer": {"learning_rate": -1.0}}, "trainer.learning_rate is -1.0"),
        ({"trainer": {"value_learning_rate": -1.0}}, "trainer.value_learning_rate is -1.0"),
        ({"rewards": [{"name": "objects", "weight": {"inventd": 1}}]}, "gives no term 'inventd'"),
        ({"watch": [{"name": "objects", "weight": {"inventd": 1}}]}, "gives no term 'inventd'"),
    ],
)
def test_settings_that_ppo_cannot_use_leave_no_folder(changes, words, prompts, tmp_path):
    chosen = ppo_config("scenes", prompts, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=words):
        PPO.main(chosen)
    assert not chosen.output.exists()


def test_what_is_wrong_with_a_ppo_run(tiny_llava, ungraded, tmp_path):
    """Random weights that never stop, an ungraded reward model, prompts without pictures."""
    prompts = write_plain_prompts(tmp_path / "prompts", images=0)
    rewards = [{"name": "reward_model", "path": str(ungraded), "device": "cpu"}]
    chosen = ppo_config(tiny_llava, prompts, tmp_path / "run", rewards=rewards, trainer={"max_new_tokens": 2})
    found = by_name(doctor.examine(PPO, chosen))
    assert found["reward graded"].verdict == "fail"
    assert "it was never graded" in found["reward graded"].advice
    assert "prefalign run grade_reward_model" in found["reward graded"].advice
    assert found["prompts"].verdict == "warn"
    assert found["picture counts"].verdict == "skip"
    assert found["one batch"].verdict == "pass"
    forced = ppo_config(tiny_llava, prompts, tmp_path / "run", rewards=rewards, force_reward=True)
    assert by_name(doctor.examine(PPO, forced))["reward graded"].verdict == "warn"
    nothing = [{"name": "objects"}]  # these prompts have no facts
    found = by_name(doctor.examine(PPO, ppo_config(tiny_llava, prompts, tmp_path / "run", rewards=nothing)))
    assert found["one batch"].verdict == "fail"
    assert "0 of the first rollout's answers got a score" in found["one batch"].seen
    assert found["gradients"].verdict == found["rewards"].verdict == "skip"
    trainer = {"normalise_rewards": False}
    found = by_name(
        doctor.examine(PPO, ppo_config(tiny_llava, prompts, tmp_path / "run", rewards=nothing, trainer=trainer))
    )
    assert found["rewards"].verdict == "fail"
    assert "0 of 4 count; 4 no score" in found["rewards"].seen


@pytest.mark.parametrize("algorithm", ["online_dpo", "online_dpo_step"])
def test_a_healthy_online_run_passes(prompts, tmp_path, algorithm):
    trainer = {"algorithm": algorithm, "per_device_train_batch_size": 4}
    chosen = online_config(
        prompts, tmp_path / "run", trainer=trainer, check={"prompts": 2}, lora=LORA, freeze=["vision"]
    )
    findings = doctor.examine(ONLINE, chosen)
    assert verdicts(findings, "fail") == set()
    found = by_name(findings)
    assert found["engine = trainer"].verdict == ("pass" if algorithm == "online_dpo" else "skip")
    usable = int(found["rewards"].seen.split()[0])  # the others weigh as pairs of loss 0
    assert float(found["one batch"].seen.split()[1]) == pytest.approx(0.693147 * usable / 4, abs=1e-3)
    assert float(found["picture counts"].seen.split("by ")[1].split()[0]) > 0.01
    assert not chosen.output.exists()


def test_the_towers_last_norm_is_not_missed(prompts, tmp_path):
    """LLaVA reads its tower before that norm; a layer that it does read is missed."""
    chosen = online_config(prompts, tmp_path / "run", trainer={"per_device_train_batch_size": 4})
    case = drawing.prepare_online(chosen, rows=8, scratch=tmp_path / "scratch")
    names = [name for name, weight in case.trainer.model.named_parameters() if weight.requires_grad]
    assert set(names) - set(case.step.gradients) == {
        f"model.vision_tower.post_layernorm.{k}" for k in ("weight", "bias")
    }
    (found,) = model.check_gradients(case)
    assert found.verdict == "pass"
    read = "model.vision_tower.encoder.layers.0.layer_norm1.bias"
    case.step.gradients[read].zero_()
    (found,) = model.check_gradients(case)
    assert (found.verdict, found.advice) == ("warn", f"These get none and will not change: {read}.")


def test_what_is_wrong_with_an_online_run(prompts, tmp_path):
    lost = online_config(prompts, tmp_path / "run", margin=1000.0, trainer={"per_device_train_batch_size": 2})
    found = by_name(doctor.examine(ONLINE, lost))
    assert found["rewards"].verdict == "fail"
    assert "small_gap" in found["rewards"].seen
    assert found["one batch"].verdict == "skip"
    offline = write_offline(tmp_path / "offline", prompts)
    found = by_name(doctor.examine(ONLINE, online_config(prompts, tmp_path / "run", offline=offline, p_offline=1.0)))
    assert found["generation"].verdict == "skip"
    assert found["one batch"].verdict == "pass"
    with pytest.raises(ConfigError, match="trainer.algorithm is 'grpo': TRL's trainer draws and learns by itself"):
        doctor.examine(ONLINE, online_config(prompts, tmp_path / "run", trainer={"algorithm": "grpo"}))


def test_plan_says_what_to_do_instead(capsys):
    for name in ("train_reward_model", "train_ppo", "train_online"):
        assert cli.main(["plan", name]) != 0
        said = capsys.readouterr().err
        assert f"plan has no estimate for {name}: it counts the passes of preference training" in said
        assert f"`prefalign doctor {name}`" in said
