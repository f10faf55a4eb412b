"""DPO step by step: pairs made in the step that trains on them, on the very tokens that were drawn."""

import json

import pytest
import torch

from prefalign import families
from prefalign.config import ConfigError
from prefalign.online import step, step_run
from prefalign.records import Pair, Prompt, message_text
from prefalign.store import OutputConfig, read_records, write_records
from prefalign.training.pairs import load_pairs
from prefalign.training.policy import load_policy
from prefalign.training.preference import PreferenceTrainer
from tests.online_runs import online_config, policy_weights, run, write_offline, write_prompts
from tests.training_runs import largest_difference, weights

STEPS = {"algorithm": "online_dpo_step", "max_steps": 3, "per_device_train_batch_size": 3}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("step") / "prompts")


def trainer_of(prompts, folder, *, offline=None, **changes):
    """A trainer before its first step."""
    trainer = {**STEPS, **changes.pop("trainer", {})}
    config = online_config(prompts, folder, offline=offline, trainer=trainer, **changes)
    write_records("online_rows", step_run.step_rows(prompts, offline), output=OutputConfig(folder / "rows"), record=Pair,
                  settings={}, seed=0)  # fmt: skip
    return step_run.make_trainer(config, {}, step_run.read_settings(config))


def rows_of(trainer):
    return [trainer.train_dataset[number] for number in range(3)]


def test_a_step_trains_on_the_tokens_that_were_drawn(prompts, tmp_path):
    trainer = trainer_of(prompts, tmp_path, p_offline=0.0)
    pairs = trainer.make_pairs(rows_of(trainer))
    batch = trainer._collated(pairs)
    kept = [pair for pair in pairs if pair.reason is None]
    assert len(kept) >= 2
    end = families.turn_end_id(trainer.processing_class)
    for number, pair in enumerate(kept):
        for side in ("chosen", "rejected"):
            ids, mask = (batch["answers"][side][name][number] for name in ("ids", "mask"))
            assert ids[mask].tolist() == pair.tokens[side]
            assert pair.tokens[side][-1] == end
        assert pair.gap > 0
    other = trainer.make_pairs(rows_of(trainer))
    assert [pair.tokens for pair in other] == [pair.tokens for pair in pairs]  # seeded by the step
    trainer.state.global_step = 1
    assert [pair.tokens for pair in trainer.make_pairs(rows_of(trainer))] != [pair.tokens for pair in pairs]


def test_answers_come_from_the_policy_as_it_is_and_from_the_rows_picture(prompts, tmp_path):
    trainer = trainer_of(prompts, tmp_path, p_offline=0.0)
    rows = rows_of(trainer)
    before = [pair.tokens for pair in trainer.make_pairs(rows)]
    swapped = [{**row, "images": other["images"]} for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]
    assert [pair.tokens for pair in trainer.make_pairs(swapped)] != before
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lm_head" in name:
                parameter.neg_()
    assert [pair.tokens for pair in trainer.make_pairs(rows)] != before


def test_an_answer_that_the_tokenizer_cuts_otherwise_is_dropped(prompts, tmp_path):
    trainer = trainer_of(prompts, tmp_path, p_offline=0.0)
    pairs = [pair for pair in trainer.make_pairs(rows_of(trainer)) if pair.reason is None]
    first = pairs[0].tokens["chosen"]
    pairs[0].tokens["chosen"] = [*first[:1], first[0], *first[1:]]
    batch = trainer._collated(pairs)
    assert [pair.reason for pair in pairs] == ["retokenised", *[None] * (len(pairs) - 1)]
    assert len(batch["ids"]) == len(pairs) - 1


def test_all_offline_is_the_preference_trainer(prompts, tmp_path):
    """p 1: batches, losses and weights of `PreferenceTrainer` on the offline pairs."""
    offline = write_offline(tmp_path / "offline", prompts)
    online = trainer_of(prompts, tmp_path / "step", offline=offline, p_offline=1.0)
    named = {online.train_dataset[number]["id"] for number in range(6)}
    assert named == {prompt.id for prompt in read_records(prompts, Prompt)}  # rows are called after their prompt
    straight = PreferenceTrainer(
        load_policy(online_config(prompts, tmp_path).model, None, device="cpu"),
        args=step_run.training_arguments(
            {name: value for name, value in {**online_config(prompts, tmp_path).trl, **STEPS}.items() if name != "algorithm"},
            output=tmp_path / "straight", seed=0),
        train_dataset=load_pairs(offline),
        processing_class=online.processing_class,
    )  # fmt: skip
    for trainer in (online, straight):
        trainer.train()
    logs = [[(e["loss"], e["logps/chosen"]) for e in t.state.log_history if "loss" in e] for t in (online, straight)]
    assert logs[0] == logs[1]
    assert logs[0][0][0] == pytest.approx(0.6931472, abs=1e-6)
    assert largest_difference(weights(online.model), weights(straight.model)) == 0.0
    assert all(entry["online/share"] == 0.0 for entry in online.state.log_history if "loss" in entry)


def test_mixed_rows_weigh_alike(prompts, tmp_path):
    """Half the rows have offline pairs; those of them that draw it keep their texts, all others get new ones."""
    offline = write_offline(tmp_path / "offline", prompts, 3)
    trainer = trainer_of(prompts, tmp_path / "step", offline=offline, p_offline=1.0)
    rows = [trainer.train_dataset[number] for number in range(6)]
    pairs = trainer.make_pairs(rows)
    taken = [not pair.row["online"] for pair in pairs]
    assert taken == [bool(row["chosen"]) for row in rows]
    assert sum(taken) == 3
    for pair, row in zip(pairs, rows, strict=True):
        if not pair.row["online"]:
            assert pair.row["chosen"] == row["chosen"]
    batch = trainer._prepare_inputs(rows)
    assert batch["weight"] == len(batch["ids"]) / 6


def test_a_batch_without_a_usable_pair_moves_nothing(prompts, tmp_path):
    trainer = trainer_of(prompts, tmp_path, p_offline=0.0, margin=1000.0, trainer={"max_steps": 1})
    before = weights(trainer.model)
    trainer.train()
    assert largest_difference(before, weights(trainer.model)) == 0.0
    logged = trainer.state.log_history[0]
    assert logged["loss"] == logged["online/pairs"] == 0.0
    assert logged["online/dropped_small_gap"] > 0


def test_shares_of_usable_and_dropped_rows_add_up(prompts, tmp_path):
    """Logged once for several steps, of which some drop no row for a reason that others do."""
    six = {"max_steps": 6, "logging_steps": 6, "save_steps": 6, "per_device_train_batch_size": 1}
    trainer = trainer_of(prompts, tmp_path, p_offline=0.0, trainer=six)
    trainer.train()
    logged = trainer.state.log_history[0]
    dropped = {name: share for name, share in logged.items() if name.startswith("online/dropped_")}
    assert any(0 < share < 1 for share in dropped.values())
    assert logged["online/pairs"] + sum(dropped.values()) == pytest.approx(1.0)


PAIRS_OF_TWO = {"algorithm": "grpo", "num_generations": 2, "per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("trainer", "changes", "words"),
    [
        (STEPS, {"rewards": [{"name": "object"}]}, "object"),
        (STEPS, {"losses": [{"name": "visual"}]}, "look at `rejected_images`, and a row of online_dpo_step has none"),
        (PAIRS_OF_TWO, {"rewards": [{"name": "object"}]}, "object"),
        ({**PAIRS_OF_TWO, "num_iterations": 2, "save_steps": 3}, {}, "save_steps is 3"),
    ],
)
def test_bad_settings_leave_the_folder_free(trainer, changes, words, prompts, tmp_path):
    with pytest.raises(ConfigError, match=words):
        run(prompts, tmp_path / "run", trainer=trainer, **changes)
    assert not (tmp_path / "run").exists()


def test_online_bdhs_in_a_step(prompts, tmp_path):
    bdhs = {"rho_th": 0.9, "iterations": 2}
    trainer = trainer_of(prompts, tmp_path, rewards=[], bdhs=bdhs)
    rows = rows_of(trainer)
    pairs = trainer.make_pairs(rows)
    assert [message_text(pair.row["chosen"]) for pair in pairs] == [row["answer"] for row in rows]
    texts = [message_text(pair.row["rejected"]) for pair in pairs]
    assert all(text != row["answer"] for text, row in zip(texts, rows, strict=True))
    trainer.state.global_step = 1
    assert [message_text(pair.row["rejected"]) for pair in trainer.make_pairs(rows)] != texts


def test_a_resumed_run_equals_one_that_was_not(prompts, tmp_path, monkeypatch):
    settings = {"trainer": STEPS, "p_offline": 0.0}
    run(prompts, tmp_path / "straight", **settings)
    original, calls = step.OnlineStepTrainer.training_step, []

    def stopping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(step.OnlineStepTrainer, "training_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(prompts, tmp_path / "resumed", **settings)
    run(prompts, tmp_path / "resumed", **settings)
    one, two = policy_weights(tmp_path / "straight"), policy_weights(tmp_path / "resumed")
    assert largest_difference(one, two) == 0.0
    results = json.loads((tmp_path / "resumed" / "all_results.json").read_text())
    assert results["rows_used"] == sum(1 for _ in read_records(prompts, Prompt))


def test_several_processes_are_refused(prompts, tmp_path, monkeypatch):
    config = online_config(prompts, tmp_path, trainer=STEPS)

    class Two:
        world_size = 2

    monkeypatch.setattr(step_run, "training_arguments", lambda *args, **kwargs: Two())
    with pytest.raises(ConfigError, match=r"2 processes run.*Start one process, or take rounds"):
        step_run.make_trainer(config, {}, step_run.read_settings(config))


class CountedId(str):
    """An id that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        CountedId.compared += 1
        return str.__eq__(self, other)


def test_the_rows_of_a_run_cost_as_many_steps_as_there_are(monkeypatch):
    """Each id is looked up a few times, not compared with all before."""
    prompts = [Prompt(CountedId(f"p{number}"), [], []) for number in range(300)]
    pairs = [Pair(f"pair{n}", [], [], [], [], "test", meta={"parent": CountedId(f"p{n}")}) for n in range(0, 300, 2)]
    monkeypatch.setattr(step_run, "read_records", lambda folder, record: prompts if record is Prompt else pairs)
    monkeypatch.setattr(CountedId, "compared", 0)
    rows = list(step_run.step_rows("prompts", "offline"))
    assert CountedId.compared < 10 * len(prompts)
    assert [row.id for row in rows] == [f"p{n}" for n in [*range(0, 300, 2), *range(1, 300, 2)]]
    assert [row.method for row in rows] == ["test"] * 150 + ["online_step"] * 150
