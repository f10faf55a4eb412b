"""Rows with and without pictures in one batch, batches without any, and the dummy picture that keeps processes in step."""

import pytest
import torch

from prefalign.families import tower
from prefalign.training.collator import blank_vision
from tests.equality import Bench, Case, as_row, compare, log_probs, step
from tests.training_runs import make_pair

FAMILIES = ("llava", "llava_next", "idefics3", "gemma3")  # PaliGemma reads no prompt without a picture


@pytest.fixture(scope="module")
def benches(tmp_path_factory) -> dict[str, Bench]:
    """A model and rows of each family."""
    return {family: Bench(family, tmp_path_factory.mktemp(family)) for family in (*FAMILIES, "paligemma")}


def trainers(bench: Bench, training: str):
    case = Case(bench.family, "text", training, "1", 3, False, "online")
    return bench.ours(case, fast_path="auto"), bench.ours(case, fast_path="off")


@pytest.mark.parametrize("images", [(1, 0, 2), (0, 0, 0), (0, 1, 0)], ids=["mixed", "text only", "one picture"])
@pytest.mark.parametrize("training", ["tower", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_with_and_without_pictures(family, training, images, benches):
    """Shared = plain, and each row's log-probs are those that it has alone."""
    rows = [as_row(make_pair(number, images=count)) for number, count in enumerate(images)]
    shared, plain = trainers(benches[family], training)
    difference = compare(step(shared, rows), step(plain, rows), lora=training == "lora")
    assert difference.holds(), difference
    together = log_probs(shared, shared.data_collator(rows))
    for number, row in enumerate(rows):
        alone = log_probs(plain, plain.data_collator([row]))
        for view in shared.views:
            assert torch.allclose(together[view][number], alone[view][0], atol=2e-5), (view, number)


@pytest.mark.parametrize("fast_path", ["auto", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dummy_picture_changes_no_number_and_reaches_every_vision_tensor(family, fast_path, benches):
    """Under DDP and ZeRO all processes must run the same modules, whatever their batch holds."""
    rows = [as_row(make_pair(number, images=0)) for number in range(2)]
    trainer = trainers(benches[family], "tower")[fast_path == "off"]
    without = step(trainer, rows)
    pictured = step(trainer, [as_row(make_pair(0))])
    trainer.data_collator.dummy = blank_vision(trainer.processing_class)
    with_dummy = step(trainer, rows)
    assert with_dummy.loss == without.loss
    assert with_dummy.metrics == without.metrics
    seeing = {name for name in pictured.gradients if tower(name) != "language_model"}
    assert len(seeing) > 20
    assert with_dummy.gradients.keys() == without.gradients.keys() | seeing
    for name, gradient in with_dummy.gradients.items():
        if name in seeing:
            assert not gradient.any(), name
        else:
            assert torch.equal(gradient, without.gradients[name]), name
    assert "dummy" not in trainer.data_collator([as_row(make_pair(0)), *rows])


def test_paligemma_refuses_rows_without_a_picture(benches):
    shared, _ = trainers(benches["paligemma"], "lora")
    with pytest.raises(
        ValueError, match="PaliGemmaProcessor prepares no prompt without a picture, and a row or a loss"
    ):
        shared.data_collator([as_row(make_pair(0, images=0))])
