"""Batches that are run in parts: the same loss and gradients as in one pass, whatever the budget."""

import pytest

from prefalign.config import ConfigError
from prefalign.records import Pair
from prefalign.store import OutputConfig, write_records
from prefalign.training import collator
from prefalign.training.reference import cache_reference
from tests.training_runs import largest_difference, losses, make_pair, make_trainer, weights, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", count=6)


def run(checkpoint, pairs, folder, **more):
    trainer = make_trainer(
        checkpoint, pairs, folder, losses=("text", "visual"), per_device_train_batch_size=6, max_steps=2, **more
    )
    if trainer.reference == "cached":
        assert cache_reference(trainer, folder / "reference", reference="start").computed == 6
    trainer.train()
    return trainer


@pytest.mark.parametrize("reference", ["online", "cached"])
@pytest.mark.parametrize("lora", [False, True])
def test_parts_are_one_pass(lora, reference, tiny_llava, pairs, tmp_path):
    whole = run(tiny_llava, pairs, tmp_path / "whole", lora=lora, reference=reference)
    parts = run(tiny_llava, pairs, tmp_path / "parts", lora=lora, reference=reference, tokens_per_pass=80)
    batch = parts.data_collator([parts.train_dataset[number] for number in range(6)])
    assert len(batch["parts"]) > 1
    assert losses(parts) == pytest.approx(losses(whole), abs=2e-6)
    for one, two in zip(parts.state.log_history[:2], whole.state.log_history[:2], strict=True):
        assert one.keys() == two.keys()
        for name in ("rewards/chosen", "rewards/margins", "visual/margins", "num_tokens"):
            assert one[name] == pytest.approx(two[name], abs=1e-5), name
    assert largest_difference(weights(parts.model), weights(whole.model)) < 2e-5


def test_a_budget_is_kept_and_each_row_is_in_one_part(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, tokens_per_pass=80)
    rows = [trainer.train_dataset[number] for number in range(6)]
    batch = trainer.data_collator(rows)
    tokens = [part["packed"]["tokens"]["input_ids"].numel() for part in batch["parts"]]
    assert max(tokens) <= 80 + len(tokens)
    assert max(tokens) <= 80
    assert sorted(row for part in batch["parts"] for row in part["rows"]) == list(range(6))
    assert sum(part["weight"] for part in batch["parts"]) == pytest.approx(1)
    trainer.data_collator.tokens_per_pass = 1
    assert [part["rows"] for part in trainer.data_collator(rows)["parts"]] != []
    assert all(len(part["rows"]) == 1 for part in trainer.data_collator(rows)["parts"])


def test_held_out_batches_are_run_in_parts_too(tiny_llava, pairs, tmp_path, caplog):
    """Rows 2 and 5 alone take more than 60 tokens, which is said once."""
    found = []
    for budget in (None, 60):
        trainer = make_trainer(
            tiny_llava, pairs, tmp_path, losses=("text", "visual"), tokens_per_pass=budget, evaluates=True,
            per_device_eval_batch_size=6, max_steps=1, save_strategy="no",
        )  # fmt: skip
        trainer.train()
        sizes = []
        trainer.model.get_input_embeddings().register_forward_hook(
            lambda _, ids, out, sizes=sizes: sizes.append(ids[0].numel())
        )
        found.append((trainer.evaluate(), sizes))
    (whole, one), (parts, several) = found
    assert max(several) < max(one)
    assert len(several) > len(one)
    for name in ("eval_loss", "eval_rewards/margins", "eval_visual/margins", "eval_logps/chosen"):
        assert parts[name] == pytest.approx(whole[name], abs=1e-4), name
    assert parts.keys() == whole.keys()
    told = [record.message for record in caplog.records if "tokens_per_pass is 60 and row pair-" in record.message]
    assert len(told) == 1
    assert "such a row is a pass of its own" in told[0]


def test_pairs_of_one_prompt_share_a_part(tiny_llava, tmp_path):
    ranked = [make_pair(0) for _ in range(3)]
    for number, pair in enumerate(ranked):
        pair.id, pair.rejected = f"ranked-{number}", make_pair(number + 1).rejected
    others = [make_pair(number) for number in (4, 5)]
    mixed = [ranked[0], others[0], ranked[1], others[1], ranked[2]]
    write_records("test", mixed, output=OutputConfig(tmp_path / "pairs"), record=Pair, settings={}, seed=0)
    trainer = make_trainer(tiny_llava, tmp_path / "pairs", tmp_path / "run", tokens_per_pass=60)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(5)])
    assert [0, 2, 4] in [sorted(part["rows"]) for part in batch["parts"]]


@pytest.mark.parametrize(("layout", "most"), [("plain", 260), ("mask", 120)])
def test_a_budget_counts_the_padding_of_its_layout(layout, most, tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, tokens_per_pass=most)
    trainer.data_collator.layout = layout
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(6)])
    for part in batch["parts"]:
        tokens = part["plain"]["input_ids"] if layout == "plain" else part["packed"]["tokens"]["input_ids"]
        assert tokens.numel() <= most
    assert 1 < len(batch["parts"]) < 6


def test_pictures_are_stacked_for_the_parts_alone(tiny_llava, pairs, tmp_path, monkeypatch):
    trainer, stacked = make_trainer(tiny_llava, pairs, tmp_path, tokens_per_pass=120, fast_path="off"), []
    stack = collator.stack_vision
    monkeypatch.setattr(collator, "stack_vision", lambda parts: stacked.append(len(parts)) or stack(parts))
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(6)])
    assert stacked == [2 * len(part["rows"]) for part in batch["parts"]]


def test_budgets_that_make_no_sense(tiny_llava, pairs, tmp_path):
    with pytest.raises(ConfigError, match="tokens_per_pass is -5; give the most tokens of one pass"):
        make_trainer(tiny_llava, pairs, tmp_path, tokens_per_pass=-5)


def test_losses_that_couple_rows_are_refused(tiny_llava, pairs, tmp_path):
    for settings, name in (({"loss_type": ["aot"]}, "aot"), ({"loss_type": ["sigmoid", "sft"]}, "sft")):
        with pytest.raises(
            ConfigError, match=f"tokens_per_pass: in loss {name} the rows of a batch depend on each other"
        ):
            make_trainer(tiny_llava, pairs, tmp_path, tokens_per_pass=100, **settings)
    with pytest.raises(ConfigError, match="tokens_per_pass: in loss bco the rows"):
        make_trainer(tiny_llava, pairs, tmp_path, losses=("bco",), tokens_per_pass=100)


def test_a_loss_that_trl_has_not(tiny_llava, pairs, tmp_path):
    with pytest.raises(ConfigError, match="trainer.loss_type: TRL has no loss 'sigmoyd'; did you mean 'sigmoid'"):
        make_trainer(tiny_llava, pairs, tmp_path, loss_type=["sigmoyd"])
