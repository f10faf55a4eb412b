"""The shared path against the plain one and TRL, for the families that need no torchvision; see `equality.py` for the matrix."""

import logging
from dataclasses import replace

import pytest
import torch
import transformers as T

from prefalign.images import encode_png
from prefalign.training.frozen import frozen_tower
from prefalign.training.routes import find_route
from tests.equality import (
    EPSILON,
    Bench,
    Case,
    answer_changed,
    as_row,
    compare,
    log_probs,
    pairwise,
    patch_embeddings,
    ranked_rows,
    step,
)
from tests.tiny_vlms import PLAIN, picture
from tests.training_runs import make_pair

FULL = {"losses": "text+visual", "training": "frozen", "pictures": "1", "rows": 3, "checkpointing": False}


@pytest.fixture(scope="module")
def benches(tmp_path_factory) -> dict[str, Bench]:
    """A model and rows of each family."""
    return {family: Bench(family, tmp_path_factory.mktemp(family)) for family in PLAIN}


def case(family: str, **more) -> Case:
    return Case(**{"family": family, **FULL, "reference": "online", **more})


@pytest.mark.parametrize("cell", pairwise(PLAIN), ids=str)
def test_shared_is_plain_and_trl(cell, benches):
    """Same set of gradients, loss, every gradient and every metric, within rounding."""
    for other, difference in benches[cell.family].differences(cell).items():
        assert difference.holds(), (other, difference)


# --- answers, rows and pictures do not see each other ---


@pytest.mark.parametrize("fast_path", ["auto", "off"])
@pytest.mark.parametrize("family", PLAIN)
def test_an_answer_is_independent_of_the_others(family, fast_path, benches):
    """Every token of one view's answers changed: all other views keep their log-probs to the bit."""
    trainer = benches[family].ours(case(family), fast_path=fast_path)
    batch = trainer.data_collator(list(trainer.train_dataset))
    before = log_probs(trainer, batch)
    for view in trainer.views:
        after = log_probs(trainer, answer_changed(batch, view))
        for other in trainer.views:
            for row, (old, new) in enumerate(zip(before[other], after[other], strict=True)):
                assert torch.equal(old, new) == (other != view), (view, other, row)


@pytest.mark.parametrize("fast_path", ["auto", "off"])
@pytest.mark.parametrize("family", PLAIN)
def test_a_picture_changes_its_own_row_alone(family, fast_path, benches):
    """Another picture in one row, then a blank one: to the bit nothing else moves. The other side's picture likewise."""
    trainer = benches[family].ours(case(family), fast_path=fast_path)
    rows = [as_row(make_pair(number)) for number in range(3)]
    before = log_probs(trainer, trainer.data_collator(rows))
    blank = encode_png(picture(0).point(lambda _: 127))
    for side, looking in (("images", {"chosen", "rejected"}), ("rejected_images", {"chosen_on_rejected_image"})):
        for other in (encode_png(picture(77)), blank):
            changed = [rows[0], {**rows[1], side: [other]}, rows[2]]
            after = log_probs(trainer, trainer.data_collator(changed))
            moved = {
                (view, row)
                for view in trainer.views
                for row in range(3)
                if not torch.equal(before[view][row], after[view][row])
            }
            assert moved == {(view, 1) for view in looking}


@pytest.mark.parametrize("family", PLAIN)
def test_rows_of_a_pack_are_independent_and_may_stand_in_any_order(family, benches):
    trainer = benches[family].ours(case(family), fast_path="auto")
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    before = log_probs(trainer, batch)
    changed = batch
    for view in trainer.views:
        changed = answer_changed(changed, view, row=1)
    after = log_probs(trainer, changed)
    turned = log_probs(trainer, trainer.data_collator(rows[::-1]))
    for view in trainer.views:
        assert [torch.equal(*pair) for pair in zip(before[view], after[view], strict=True)] == [True, False, True]
        for old, new in zip(before[view], turned[view][::-1], strict=True):
            assert torch.allclose(old, new, atol=2e-5)


# --- what is equal is run once ---


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_six_pairs_of_four_ranked_answers_are_one_document(family, training, benches):
    bench, rows = benches[family], ranked_rows(4)
    shared = bench.ours(case(family, losses="text", training=training), fast_path="auto")
    plain = bench.ours(case(family, losses="text", training=training), fast_path="off")
    (_, branches), = shared.data_collator(rows)["packed"]["layout"].documents  # fmt: skip
    assert len(branches) == 4
    assert plain.data_collator(rows)["plain"]["input_ids"].shape[0] == 12
    difference = compare(step(shared, rows), step(plain, rows), lora=training == "lora")
    assert difference.holds(), difference


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("training", ["frozen", "tower", "lora"])
def test_a_picture_passes_the_tower_once(family, training, benches):
    """Two questions about one picture: one goes through, once for policy and reference where the tower is frozen."""
    bench = benches[family]
    first, second = as_row(make_pair(0)), as_row(make_pair(1))
    rows = [first, {**second, "images": first["images"]}]
    shared = bench.ours(case(family, losses="text", training=training), fast_path="auto")
    plain = bench.ours(case(family, losses="text", training=training), fast_path="off")
    with patch_embeddings(shared.model, shared.ref_model) as ran:
        outcome = step(shared, rows)
    with patch_embeddings(plain.model, plain.ref_model) as ran_plain:
        repeated = step(plain, rows)
    # what joins Qwen's patches belongs to the tower's own forward and trains: policy and reference each run it
    trains = training == "tower" or (training == "frozen" and family.startswith("qwen"))
    assert len(ran) == len(ran_plain) == (2 if trains else 1)
    assert [4 * pictures for pictures in ran] == ran_plain
    difference = compare(outcome, repeated, lora=training == "lora")
    assert difference.holds(), difference


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_a_frozen_tower_runs_once_a_step_without_a_graph_in_train(family, training, benches):
    """In `train()`, with gradient checkpointing really on: transformers alone would run it again in the backward pass."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 3, "logging_steps": 1}
    trainer = benches[family].ours(case(family, training=training, checkpointing=True), fast_path="auto", **settings)
    flags, features, words = [], [], []
    trainer.model.register_forward_hook(
        lambda *_: flags.append(sum(bool(getattr(m, "gradient_checkpointing", False)) for m in trainer.model.modules()))
    )
    frozen_tower(trainer.model).register_forward_hook(lambda *call: features.append(call[-1][0].requires_grad))
    trainer.model.get_input_embeddings().register_forward_hook(lambda *call: words.append(call[-1].requires_grad))
    with patch_embeddings(trainer.model, trainer.ref_model) as ran:
        trainer.train()
    assert min(flags) > 0
    assert len(ran) == trainer.state.global_step == 2
    assert len(features) >= 2
    assert not any(features)
    assert any(words) == (training == "frozen")  # the embeddings train there, and take no gradient under an adapter


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_three_steps_of_train_end_at_the_same_weights(family, benches):
    """Plain gradient descent, checkpointing on for the shared path alone: rounding is not blown up as Adam would."""
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.02, "per_device_train_batch_size": 3}
    ends = []
    for fast_path, checkpointing in (("auto", True), ("off", False)):
        cell = case(family, training="tower", checkpointing=checkpointing)
        trainer = benches[family].ours(cell, fast_path=fast_path, **settings)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        ends.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    moved = max((ends[1][name] - start[name]).abs().max() for name in start)
    assert moved > 1e-3
    for name, end in ends[1].items():  # a weight itself is rounded in every step
        assert (ends[0][name] - end).abs().max() < 2e-5 * moved + 3 * EPSILON * end.abs().max(), name


@pytest.mark.parametrize("fast_path", ["auto", "off"])
@pytest.mark.parametrize("losses", ["text+visual", "six views"])
def test_parts_of_a_batch_add_up_to_the_whole(losses, fast_path, benches):
    """`tokens_per_pass`: one backward pass for each row here."""
    trainer = benches["llava"].ours(case("llava", losses=losses), fast_path=fast_path)
    rows = list(trainer.train_dataset)
    whole = step(trainer, rows)
    trainer.data_collator.tokens_per_pass = 1
    assert len(trainer.data_collator(rows)["parts"]) == 3
    difference = compare(replace(step(trainer, rows), metrics=whole.metrics), whole)
    assert difference.holds(), difference


# --- windows, both directions, and families that cannot share ---


def test_gemma3_with_a_window_shorter_than_its_prompt(tmp_path, benches):
    """A window of 8 in the first of two layers, prompts of more than 20 tokens; the second layer sees everything."""
    bench = Bench("gemma3", tmp_path, narrow)
    assert [layer.self_attn.is_sliding for layer in bench.model.model.language_model.layers] == [True, False]
    for losses in ("text+visual", "six views"):
        for training in ("tower", "lora"):
            for other, difference in bench.differences(case("gemma3", losses=losses, training=training)).items():
                assert difference.holds(), (losses, training, other, difference)
    numbers = []
    for one in (bench, benches["gemma3"]):
        trainer = one.ours(case("gemma3", losses="text"), fast_path="auto", moved=False)
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert min(prompt for prompt, _ in batch["packed"]["layout"].documents) > 20
        numbers.append(log_probs(trainer, batch)["chosen"][0])
    assert (numbers[0] - numbers[1]).abs().max() > 1e-3


def narrow(config: T.Gemma3Config) -> None:
    """A sliding window of 8 positions, in the first layer."""
    config.text_config.sliding_window = 8
    config.text_config.layer_types = ["sliding_attention", "full_attention"]


def test_paligemma_reads_its_prompt_in_both_directions(benches):
    """Another last word of the prompt moves the hidden states of its first; a causal reader's would stay."""
    trainer = benches["paligemma"].ours(case("paligemma", losses="text", rows=1), fast_path="auto")
    batch = trainer.data_collator(list(trainer.train_dataset))
    kept = []
    language_model = trainer.model.model.language_model
    hook = language_model.register_forward_hook(lambda *call: kept.append(call[-1].last_hidden_state.detach()))
    log_probs(trainer, batch)
    (prompt, _), = batch["packed"]["layout"].documents  # fmt: skip
    batch["packed"]["tokens"]["input_ids"][0, prompt - 2] += 1
    log_probs(trainer, batch)
    hook.remove()
    assert (kept[0][0, 0] - kept[1][0, 0]).abs().max() > 1e-4


def mistral(config: T.LlavaNextConfig) -> None:
    """LLaVA-NeXT as of Mistral-7B v0.1: every layer looks back a few tokens only."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "pad_token_id",
    )
    names += ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id")
    same = {name: getattr(config.text_config, name) for name in names}
    config.text_config = T.MistralConfig(**same, sliding_window=8)


def test_sliding_windows_over_the_row_take_the_plain_route_and_say_so_once(tmp_path, caplog):
    bench = Bench("llava_next", tmp_path, mistral)
    cell = case("llava_next", losses="text", training="tower")
    with caplog.at_level(logging.WARNING, logger="prefalign.training.preference"):
        trainer = bench.ours(cell, fast_path="auto")
        outcome = step(trainer, trainer.train_dataset)
    said = [record.message for record in caplog.records if "fast path" in record.message]
    assert len(said) == 1
    assert said[0].endswith("exactly, because its attention looks back 8 positions only, counted in the row.")
    assert trainer.route.layout == "plain"
    stock = bench.stock(cell)
    assert compare(outcome, step(stock, stock.train_dataset)).holds()


def test_a_recurrent_hybrid_takes_the_plain_route():
    """Qwen3.5: no mask stops a recurrence at the end of an answer."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    text |= {"num_key_value_heads": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    text |= {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    model = T.Qwen3_5ForConditionalGeneration(T.Qwen3_5Config(text_config=text, vision_config=vision))
    route = find_route(model)
    assert route.layout == "plain"
    assert route.reason.startswith("its layers linear_attention carry a state from token to token")


def test_the_fast_path_can_be_turned_off_silently(benches, caplog):
    with caplog.at_level(logging.WARNING, logger="prefalign.training.preference"):
        trainer = benches["llava"].ours(case("llava"), fast_path="off")
    assert trainer.route.layout == "plain"
    assert "packed" not in trainer.data_collator(list(trainer.train_dataset))
    assert not caplog.records


def test_kinds_of_attention_that_cannot_be_split_take_the_plain_route(benches):
    trainer = benches["llava"].ours(case("llava"), fast_path="off")
    trainer.model.config.text_config._attn_implementation = "eager"
    route = find_route(trainer.model)
    assert route.layout == "plain"
    assert "it runs with attention 'eager', and sharing needs 'sdpa'" in route.reason
