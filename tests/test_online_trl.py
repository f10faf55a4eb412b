"""GRPO and RLOO through TRL: each row's own pictures and facts reach policy and reward, and a resumed run is the same run."""

import inspect
import json

import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer

from prefalign import families
from prefalign.checkpoints import SCENES_BASE
from prefalign.config import ConfigError
from prefalign.engines import Completion, Request
from prefalign.engines.transformers import TransformersEngine
from prefalign.online import policy_gradient
from prefalign.online.prompts import gather_prompts
from prefalign.records import Prompt
from prefalign.rewards import Combined, Response, Weighted, as_trl_functions
from prefalign.store import OutputConfig, read_records, write_records
from prefalign.training import frame
from tests.online_runs import online_config, policy_weights, run, write_prompts
from tests.tiny_vlms import save_tiny
from tests.training_runs import largest_difference, weights

GROUP = {"algorithm": "grpo", "num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 24,
         "max_steps": 2, "beta": 0.05, "temperature": 1.2}  # fmt: skip
MEAN = '''
import numpy as np

def mean_pixel(responses):
    """A reward of the picture alone: the mean of its red channel."""
    return [float(np.asarray(one.images[0])[..., 0].mean()) for one in responses]
'''


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("trl") / "prompts", 4)


@pytest.fixture(scope="module")
def swapped(prompts, tmp_path_factory):
    """The same prompts with each other's pictures."""
    rows = list(read_records(prompts, Prompt))
    folder = tmp_path_factory.mktemp("swapped") / "prompts"
    pictures = [row.images for row in rows]
    for row, images in zip(rows, [*pictures[1:], pictures[0]], strict=True):
        row.images = images
    write_records("test", rows, output=OutputConfig(folder), record=Prompt, settings={}, seed=0)
    return folder


def trainer_of(prompts, folder, **changes):
    config = online_config(prompts, folder, trainer={**GROUP, **changes.pop("trainer", {})}, **changes)
    gather_prompts(config)
    return policy_gradient.make_trainer(config, {})


def history(folder):
    return [
        entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_each_reward_is_that_of_the_rows_own_picture(algorithm, prompts, tmp_path):
    from PIL import Image

    (tmp_path / "mean.py").write_text(MEAN)
    trainer = trainer_of(prompts, tmp_path / "run", trainer={"algorithm": algorithm},
                         rewards=[{"name": "function", "function": f"{tmp_path / 'mean.py'}:mean_pixel"}])  # fmt: skip
    rows = [trainer.train_dataset[number] for number in (0, 0, 1, 1)]
    trainer.model.train()
    made = trainer._prepare_inputs(rows)
    found = list(trainer._logs["rewards"]["total"])
    assert found == [pytest.approx(sum(row["images"][0].getdata(0)) / (row["images"][0].width * row["images"][0].height))
                     for row in rows]  # fmt: skip
    assert found[0] != found[2]
    assert isinstance(rows[0]["images"][0], Image.Image)
    assert made["pixel_values"].shape[0] == 4
    assert not torch.equal(made["pixel_values"][0], made["pixel_values"][2])


def test_another_picture_changes_log_probs(prompts, swapped, tmp_path):
    """The same answers on other pictures: TRL's own log-probs of them move."""
    trainer = trainer_of(prompts, tmp_path / "run")
    other = trainer_of(swapped, tmp_path / "other")
    made = [t._prepare_inputs([t.train_dataset[number] for number in (0, 0, 1, 1)]) for t in (trainer, other)]
    ids = torch.cat([made[0]["prompt_ids"], made[0]["completion_ids"]], dim=1)
    mask = torch.cat([made[0]["prompt_mask"], made[0]["completion_mask"]], dim=1)

    def logps(pixels):
        keep = made[0]["completion_ids"].size(1)
        with torch.no_grad():
            return trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, keep, pixel_values=pixels, num_images=[1] * 4
            )[0]

    own, foreign = logps(made[0]["pixel_values"]), logps(made[1]["pixel_values"])
    assert not torch.equal(made[0]["pixel_values"], made[1]["pixel_values"])
    assert ((own - foreign).abs() * made[0]["completion_mask"]).max() > 1e-3


@pytest.mark.parametrize("family", ["llava_next", "idefics3"])
def test_trls_log_probs_are_those_of_our_engine(family, prompts, tmp_path):
    """Of the same answers on the same pictures, in the batch as TRL lays it out: no picture is lost, cut or mixed up."""
    model = {"model_name_or_path": str(save_tiny(family, tmp_path / "model")), "device": "cpu"}
    trainer = trainer_of(
        prompts, tmp_path / "run", model=model, trainer={"temperature": 1.0, "max_completion_length": 6}
    )
    rows = [trainer.train_dataset[number] for number in (0, 0, 1, 1)]
    made = trainer._prepare_inputs(rows)
    known = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    pictures = {name: value for name, value in made.items() if name in known}
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1)
    mask = torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1)
    trainer.model.eval()
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, made["completion_ids"].size(1), **pictures
        )[0]
    engine = TransformersEngine(trainer.model, trainer.processing_class)
    requests = [Request(row["id"], row["prompt"], row["images"]) for row in rows]
    answers = [
        Completion(row["id"], "", token_ids=tokens[kept.bool()].tolist(), finish_reason="length")
        for row, tokens, kept in zip(rows, made["completion_ids"], made["completion_mask"], strict=True)
    ]
    for logps, expected in zip(found, engine.logprobs(requests, answers), strict=True):
        torch.testing.assert_close(logps[: len(expected)], expected, atol=1e-4, rtol=0)
    others = [Request(one.id, one.messages, two.images) for one, two in zip(requests, requests[::-1], strict=True)]
    swapped = engine.logprobs(others, answers)
    assert (
        max((one - two).abs().max() for one, two in zip(engine.logprobs(requests, answers), swapped, strict=True))
        > 1e-4
    )


def test_swapped_pictures_change_the_logged_reward(prompts, swapped, tmp_path):
    """The facts stay and the pictures move: the truth reward falls apart, and what is logged with it."""
    for name, data in (("own", prompts), ("other", swapped)):
        run(data, tmp_path / name, trainer={**GROUP, "max_steps": 1})
    own, other = history(tmp_path / "own")[0], history(tmp_path / "other")[0]
    assert own["objects/invented"] > other["objects/invented"]
    assert own["total"] == pytest.approx(own["reward"], abs=1e-5)
    assert own["kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_resumed_run_equals_one_that_was_not(algorithm, prompts, tmp_path, monkeypatch):
    settings = {"trainer": {**GROUP, "algorithm": algorithm}}
    run(prompts, tmp_path / "straight", **settings)
    trainer_class = policy_gradient.TRAINERS[algorithm][1]
    original, calls = trainer_class.training_step, []

    def stopping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_class, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(prompts, tmp_path / "resumed", **settings)
    run(prompts, tmp_path / "resumed", **settings)
    one, two = policy_weights(tmp_path / "straight"), policy_weights(tmp_path / "resumed")
    assert largest_difference(one, two) == 0.0
    assert history(tmp_path / "straight")[-1]["reward"] == history(tmp_path / "resumed")[-1]["reward"]
    assert largest_difference(one, policy_weights(SCENES_BASE)) > 1e-5


def test_the_reference_is_the_policy_as_it_starts(prompts, tmp_path, monkeypatch):
    """TRL loads the model's path again; here the policy is not what lies there (another revision, a merged adapter)."""
    load = frame.load_policy

    def moved(*args, **kwargs):
        model = load(*args, **kwargs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        return model

    monkeypatch.setattr(frame, "load_policy", moved)
    trainer = trainer_of(prompts, tmp_path)
    assert largest_difference(weights(trainer.ref_model), weights(trainer.model)) == 0.0


def test_an_adapter_needs_no_second_model(prompts, tmp_path):
    trainer = trainer_of(prompts, tmp_path, lora={"r": 4, "alpha": 8}, freeze=["vision"])
    assert trainer.ref_model is None
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora" in name for name in trainable)


class SeesEverything:
    def __init__(self):
        self.seen: list[Response] = []

    def score(self, responses):
        self.seen += responses
        return {"finished": torch.tensor([float(one.finished) for one in responses])}


def test_a_completion_cut_off_by_the_limit_is_not_finished(prompts, tmp_path):
    trainer = trainer_of(prompts, tmp_path, trainer={"max_completion_length": 3})
    reward = SeesEverything()
    ends = families.end_token_ids(trainer.processing_class, trainer.model.generation_config)
    trainer.reward_funcs = as_trl_functions(Combined([Weighted("seen", reward)]), end_token_ids=ends)
    trainer.model.train()
    trainer._prepare_inputs([trainer.train_dataset[number] for number in (0, 0, 1, 1)])
    assert [one.finished for one in reward.seen] == [False] * 4
    assert [one.tokens for one in reward.seen] == [3] * 4
    rows = list(read_records(prompts, Prompt))
    assert [one.facts for one in reward.seen] == [rows[number].facts for number in (0, 0, 1, 1)]
    assert [one.answer for one in reward.seen] == [rows[number].answer for number in (0, 0, 1, 1)]


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
def test_trl_has_what_is_overridden(trainer_class):
    assert [name for name in policy_gradient.PRIVATE if not callable(getattr(trainer_class, name, None))] == []


def test_several_pictures_of_a_row_that_trl_cannot_tell_apart_are_refused(prompts, tmp_path):
    trainer = trainer_of(prompts, tmp_path)
    with pytest.raises(ValueError, match=r"a row has 2 pictures, .*the llava which pictures.*Use rows of one picture"):
        trainer._get_per_token_logps_and_entropies(trainer.model, batch_num_images=torch.tensor([1, 2]))


def test_checkpoints_fall_where_answers_are_drawn_anew(prompts, tmp_path):
    with pytest.raises(
        ConfigError, match=r"save_steps is 1, and answers are used for 2 optimizer steps.*a multiple of 2"
    ):
        trainer_of(prompts, tmp_path, trainer={"num_iterations": 2})


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("answers", [0, 1])
def test_a_group_of_one_answer_is_refused_by_the_settings_name(algorithm, answers, prompts, tmp_path):
    with pytest.raises(ConfigError, match=f"trainer.num_generations is {answers}: .* Give 2 or more"):
        run(prompts, tmp_path / "run", trainer={**GROUP, "algorithm": algorithm, "num_generations": answers})
    assert not (tmp_path / "run").exists()
