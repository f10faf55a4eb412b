"""Engine against trainer, KL, warnings, and settings that contradict each other."""

import re

import pytest
import torch

from prefalign.config import ConfigError
from prefalign.engines import Request
from prefalign.engines.transformers import TransformersEngine
from prefalign.images import open_image
from prefalign.losses import read_losses
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.online.checking import EngineGap, Gap, check_gap, divergence, token_gap, trainer_logprobs
from prefalign.online.round_checks import check_trainer
from prefalign.online.round_metrics import warnings_of
from prefalign.online.sampling import drawn_answers
from prefalign.online.settings import check_settings, unread
from prefalign.records import Prompt, user_message
from prefalign.store import read_records
from tests.online_runs import online_config, run, write_prompts
from tests.tiny_vlms import PLAIN, picture, save_tiny

TEXTS = ["a red square", "a dog jumps over", "now"]


def load_tiny(family, folder):
    config = ModelConfig(str(save_tiny(family, folder / family)), device="cpu")
    return load_model(config), load_processor(config)


@pytest.fixture(params=["llava", "idefics3"])
def policy(request, tmp_path):
    return load_tiny(request.param, tmp_path)


def requests(shift=0):
    messages = [user_message("what is in the picture ?", 1)]
    return [Request(f"row-{n}", messages, [picture(n + shift)]) for n in range(len(TEXTS))]


@pytest.mark.parametrize("family", PLAIN)
def test_engine_and_trainer_agree_and_the_model_is_left_as_it_was(family, tmp_path):
    model, processor = load_tiny(family, tmp_path)
    engine = TransformersEngine(model, processor)
    before = engine.logprobs(requests(), TEXTS)
    trained = trainer_logprobs(model, processor, requests(), TEXTS)
    gap = token_gap(engine, requests(), TEXTS, trained)
    assert 0 <= gap.mean <= gap.largest < 1e-4
    assert (gap.answers, gap.tokens) == (3, sum(map(len, before)))
    check_gap(gap, 1e-4)
    assert all(torch.equal(one, two) for one, two in zip(before, engine.logprobs(requests(), TEXTS), strict=True))
    assert "forward" not in vars(model)


def test_an_engine_on_other_weights_is_stopped(policy):
    model, processor = policy
    trained = trainer_logprobs(model, processor, requests(), TEXTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    gap = token_gap(TransformersEngine(model, processor), requests(), TEXTS, trained)
    with pytest.raises(EngineGap, match=r"differ by up to .* above the bound of 0.01.*Refresh its weights"):
        check_gap(gap, 0.01)


def test_an_engine_that_is_shown_another_picture_is_found(policy):
    model, processor = policy
    trained = trainer_logprobs(model, processor, requests(), TEXTS)
    gap = token_gap(TransformersEngine(model, processor), requests(shift=7), TEXTS, trained)
    assert gap.largest > 1e-4


def test_an_engine_that_cuts_answers_otherwise_is_refused(policy):
    model, processor = policy
    trained = trainer_logprobs(model, processor, requests(), TEXTS)
    others = ["a red square now", *TEXTS[1:]]
    with pytest.raises(
        EngineGap, match=r"log-probs for the answer to row-0 and the trainer.*the same checkpoint folder"
    ):
        token_gap(TransformersEngine(model, processor), requests(), others, trained)


@pytest.mark.parametrize("side", ["engine", "trainer"])
def test_log_probs_that_are_no_numbers_do_not_pass_the_check(side, policy):
    model, processor = policy
    engine = TransformersEngine(model, processor)
    trained = trainer_logprobs(model, processor, requests(), TEXTS)
    if side == "trainer":
        trained[1][0] = float("nan")
    else:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
    with pytest.raises(
        EngineGap, match=rf"the {side} gives log-probs for the answer to row-\d that are no numbers.*model.dtype"
    ):
        token_gap(engine, requests(), TEXTS, trained)
    with pytest.raises(EngineGap, match=r"differ by up to nan"):
        check_gap(Gap(float("nan"), float("nan"), 5, 1), 0.01)


def test_divergence_by_hand():
    """d = ln 2 and -ln 2: exp(-d) - 1 + d is 0.5 - 1 + 0.6931 and 2 - 1 - 0.6931; in one answer they add up to 0.5."""
    log2 = 0.6931472
    found = divergence(
        [torch.tensor([-1.0, -1.0]), torch.tensor([-3.0])], [torch.tensor([-1 - log2, -1 + log2]), torch.tensor([-3.0])]
    )
    assert found.kl == pytest.approx(0.25)
    assert found.kl_per_token == pytest.approx(0.5 / 3)
    assert found.answers == 2


def test_checks_are_made_on_the_policys_own_answers(tmp_path):
    config = ModelConfig("scenes", device="cpu")
    engine = TransformersEngine(load_model(config), load_processor(config))
    prompts = list(read_records(write_prompts(tmp_path / "prompts", 2), Prompt))
    asked, answers = drawn_answers(engine, prompts, max_new_tokens=32, seed=0)
    assert [request.id for request in asked] == [f"{prompt.id}/check" for prompt in prompts]
    assert asked[0].images[0].tobytes() == open_image(prompts[0].images[0]).tobytes()
    assert all(answer.text for answer in answers)


def measured(number=1, **changes):
    base = {
        "round": number,
        "length_ratio": {"online": 1.0},
        "rewards": {},
        "order_consistency": None,
        "check": {},
        "evaluation": {},
    }
    return {**base, **changes}


def test_no_warning_without_a_sign():
    good = measured(rewards={"offline": {"accuracies": 0.97}, "online": {"accuracies": 0.7}}, order_consistency=0.9,
                    check={"mean": 0.001, "largest": 0.1})  # fmt: skip
    assert (
        warnings_of([good, measured(2, length_ratio={"online": 1.5}, evaluation={"recall": 0.61})], {"recall": 0.65})
        == []
    )


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ([measured(length_ratio={"online": 1.3}), measured(2, length_ratio={"online": 1.2})], "20% or more.*may prefer length"),
        ([measured(rewards={"offline": {"accuracies": 0.99}, "online": {"accuracies": 0.5}})], "too easy.*Lower p_offline"),
        ([measured(evaluation={"recall": 0.59})], "recall is 0.590 and was 0.650.*say less"),
        ([measured(order_consistency=0.5)], "itself in both orders on 50% .*stronger judge"),
        ([measured(check={"mean": 0.2, "largest": 0.9})], "differ by 0.2 nats per token.*one precision"),
    ],
)  # fmt: skip
def test_signs_of_failure_are_named(rounds, words):
    (text,) = warnings_of(rounds, {"recall": 0.65})
    assert re.search(words, text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": {"algorithm": "gpro"}}, "no algorithm 'gpro'; did you mean 'grpo'"),
        ({"sampling": {"temperature": 0.0}}, "so all 2 answers to a prompt are the same one.*above 0"),
        ({"p_offline": 0.8}, "p_offline is 0.8, and there is no `offline`.*all would be drawn online. Name the folder"),
        ({"p_offline": 1.0, "trainer": {"algorithm": "online_dpo_step"}}, "p_offline is 1.0, and there is no `offline`"),
        ({"bdhs": {}}, "chosen is the reference answer.*Leave `annotator` and `rewards` out"),
        ({"trainer": {"algorithm": "grpo"}, "offline": "pairs"}, "needs `data` and `rewards`, and does not read offline"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        check_settings(online_config(tmp_path, tmp_path, **changes))


@pytest.mark.parametrize("p_offline", [0.0, 0.5])
def test_no_share_and_the_default_share_of_no_offline_pairs_are_no_mistake(p_offline, tmp_path):
    check_settings(online_config(tmp_path, tmp_path, p_offline=p_offline))


def test_a_run_needs_prompts(tmp_path):
    with pytest.raises(ConfigError, match="neither `data` nor `offline` is given"):
        check_settings(online_config(None, tmp_path))


def test_settings_that_an_algorithm_does_not_read_are_named(tmp_path):
    config = online_config(tmp_path, tmp_path, trainer={"algorithm": "grpo"})
    assert unread(config) == ["rounds", "check", "sampling", "batch_size"]
    assert unread(online_config(tmp_path, tmp_path)) == []
    given = {"p_offline": 0.1, "similarity": "some/model", "responses": 8, "margin": 3.0}
    assert unread(online_config(tmp_path, tmp_path, **given)) == ["similarity"]
    hiding = online_config(tmp_path, tmp_path, rewards=[], bdhs={}, **given)
    assert unread(hiding) == ["responses", "margin"]
    config = online_config(tmp_path, tmp_path, trainer={"algorithm": "grpo"}, **given)
    assert {"p_offline", "similarity"} <= set(unread(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p_offline": 1.5}, "p_offline 1.5 is a probability"),
        ({"responses": 1}, "responses is 1; a pair needs 2"),
        ({"rounds": {"count": 0}}, "rounds.count is 0.*at least 1 round"),
    ],
)
def test_bad_values(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        online_config(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": {"loss_type": ["exo_pair"]}}, "Label smoothing must be greater than 0.0 when using 'exo_pair' loss"),
        ({"trainer": {"loss_type": ["aot"], "use_weighting": True}}, "WPO-style weighting is not implemented for 'aot'"),
        ({"trainer": {"report_to": "dvclive"}}, r"dvclive.*\(Refused by \w+ before anything was drawn"),
        ({"trainer": {"lr_scheduler_type": "warmup_stable_decay"}}, "num_decay_steps.*before anything was drawn"),
        ({"model": {"dtype": "float16"}, "trainer": {"bf16": True}}, "model.dtype: the weights are float16 and trainer.bf16"),
        ({"lora": {"r": 2, "target_modules": r".*\.q_porj"}}, "lora.target_modules .* matches no module of the model"),
        ({"lora": {"r": 2, "target_modules": "lm_head"}}, "Applying a PEFT adapter to `lm_head` is not supported"),
        ({"freeze": ["vision", "projector", "language_model"]}, "leaves nothing to train"),
    ],
)  # fmt: skip
def test_what_would_stop_the_trainer_of_a_round_stops_the_run_before_it_draws(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        run(write_prompts(tmp_path / "prompts"), tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", PLAIN)
def test_the_trainer_is_tried_without_weights_and_refuses_no_family(family, tmp_path):
    """Whatever a family's modules do while they are made, they do on no memory."""
    model = {"model_name_or_path": str(save_tiny(family, tmp_path / family))}
    for changes in ({}, {"lora": {"r": 2}}, {"freeze": ["vision"]}):
        config = online_config(tmp_path / "rows", tmp_path / "run", model=model, **changes)
        check_trainer(config, config.trl, read_losses(config.losses, beta=0.1))
        with pytest.raises(ConfigError, match="num_decay_steps.*before anything was drawn"):
            check_trainer(
                config,
                {**config.trl, "lr_scheduler_type": "warmup_stable_decay"},
                read_losses([{"name": "text"}], beta=0.1),
            )
