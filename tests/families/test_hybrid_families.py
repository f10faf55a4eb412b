"""Qwen3.5, whose layers mostly carry a state: it trains on TRL's layout, says why, equals TRL and looks at the picture."""

import logging

import pytest
import transformers as T

from tests.equality import Bench, Case, compare, step
from tests.tiny_vlms import BUILDERS

pytestmark = pytest.mark.families

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 16, "out_hidden_size": 64,
          "num_position_embeddings": 64}  # fmt: skip


def qwen3_5():
    """Three layers of linear attention and one of full attention, with the processor of Qwen3-VL, which it shares."""
    processor, _, qwen3_vl = BUILDERS["qwen3_vl"]()
    shared = qwen3_vl.text_config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
             "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters")  # fmt: skip
    text = {name: shared[name] for name in names} | LINEAR | {"num_hidden_layers": 4}
    ids = {name: getattr(qwen3_vl, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id",
                                                      "vision_end_token_id")}  # fmt: skip
    config = T.Qwen3_5Config(text_config=text, vision_config=VISION, **ids)
    return processor, T.Qwen3_5ForConditionalGeneration, config


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILDERS, "qwen3_5", qwen3_5)
        return Bench("qwen3_5", tmp_path_factory.mktemp("qwen3_5"))


def case(training: str, **more) -> Case:
    given = {"losses": "text", "training": training, "pictures": "1", "rows": 3, "checkpointing": False}
    return Case("qwen3_5", **{**given, "reference": "online", **more})


@pytest.mark.parametrize("reference", ["online", "cached"])
@pytest.mark.parametrize("training", ["frozen", "tower", "lora"])
def test_a_step_is_that_of_trl(training, reference, bench):
    """Loss, the set of gradients, every gradient and every metric, within rounding."""
    trainer = bench.ours(case(training, reference=reference), fast_path="auto")
    assert trainer.model.config.get_text_config().layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert trainer.route.layout == trainer.data_collator.layout == "plain"
    stock = bench.stock(case(training))
    difference = compare(
        step(trainer, trainer.train_dataset), step(stock, stock.train_dataset), lora=training == "lora"
    )
    assert difference.holds(), difference


def test_why_it_takes_the_plain_path_is_said_once(bench, caplog):
    with caplog.at_level(logging.WARNING, logger="prefalign.training.preference"):
        trainer = bench.ours(case("frozen"), fast_path="auto", max_steps=2)
        trainer.train()
    assert trainer.state.global_step == 2
    [said] = [record.message for record in caplog.records if "fast path" in record.message]
    assert said == (
        "The fast path is off: prompts cannot be shared exactly, because its layers linear_attention carry a state from token "
        "to token, which no mask stops at the end of an answer."
    )


@pytest.mark.parametrize("losses", ["text", "text+visual"])
def test_another_picture_gives_another_loss(losses, bench):
    trainer = bench.ours(case("frozen", losses=losses), fast_path="auto")
    rows = list(trainer.train_dataset)
    swapped = [{**row, "images": rows[index - 1]["images"]} for index, row in enumerate(rows)]
    values = [step(trainer, given).loss for given in (rows, swapped)]
    assert step(trainer, rows).loss == values[0]
    assert abs(values[0] - values[1]) > 1e-4
