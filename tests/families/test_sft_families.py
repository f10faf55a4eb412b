"""SFT with the families that need torchvision: what carries loss, the picture, text-only rows, and an exact resume."""

import math
from pathlib import Path

import pytest
import torch

from prefalign import families
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.training.examples import AnswerCollator
from tests.sft_runs import make_example, make_sft_trainer, write_examples
from tests.tiny_vlms import PLAIN, WITH_VIDEO, save_tiny
from tests.training_runs import largest_difference, losses, weights

pytestmark = pytest.mark.families


@pytest.mark.parametrize("family", PLAIN + WITH_VIDEO)
def test_every_family_imitates_answers_and_resumes(family, tmp_path):
    config = ModelConfig(str(save_tiny(family, tmp_path / "model")), device="cpu")
    counts = (1, 2, 1, 2) if family == "paligemma" else (1, 0, 2, 0)  # PaliGemma reads no text without a picture
    rows = [make_example(number, images=counts[number % 4]) for number in range(8)]
    folder = write_examples(Path(tmp_path / "data"), rows)

    processor, model = load_processor(config), load_model(config).train()
    encoded = [row.to_row() for row in rows[:4]]
    batch = AnswerCollator(processor)(encoded)
    labels, ids = batch.pop("labels"), batch["input_ids"]
    for row, trained in enumerate(ids[row][labels[row] != -100] for row in range(4)):
        answer = "a red square" + " on a blue background" * (row % 2)
        assert processor.tokenizer.decode(trained, skip_special_tokens=True).strip() == answer
        assert families.turn_end_id(processor) in trained[-2:]
    last = (labels[2] != -100).nonzero()[-1].item()
    other = ids.clone()
    other[2, last] = (ids[2, last] + 7) % 200
    with torch.no_grad():
        logits, changed = (model(**{**batch, "input_ids": given}).logits for given in (ids, other))
    assert torch.equal(changed[2, :last], logits[2, :last])  # no answer sees what comes after it

    straight = make_sft_trainer(tmp_path / "model", folder, tmp_path / "a")
    with torch.no_grad():
        swapped = [{**encoded[0], "images": make_example(7).to_row()["images"]}, *encoded[1:]]
        values = [
            straight.compute_loss(straight.model, straight.data_collator(given)).item() for given in (encoded, swapped)
        ]
    assert abs(values[0] - values[1]) > 1e-6
    straight._metrics["train"].clear()
    straight._metrics["eval"].clear()
    straight._total_train_tokens = 0
    straight.train()
    resumed = make_sft_trainer(tmp_path / "model", folder, tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert all(math.isfinite(loss) for loss in losses(straight))
    assert losses(straight) == losses(resumed)
    assert len(losses(straight)) == 4
    assert largest_difference(weights(straight.model), weights(resumed.model)) == 0.0
