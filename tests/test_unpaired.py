"""Pairs as rows for KTO: what they hold, in which order, and that TRL's trainer takes steps on them with a tiny VLM."""

import pytest
import torch
from trl import KTOConfig, KTOTrainer

from prefalign.images import open_image
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.records import Pair, normalise_messages
from prefalign.store import OutputConfig, read_records, write_records
from prefalign.training.unpaired import load_unpaired
from tests.training_runs import make_pair


def write(folder, count):
    pairs = [make_pair(number) for number in range(count)]
    write_records("test", pairs, output=OutputConfig(folder, block_size=5), record=Pair, settings={}, seed=0)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs") / "pairs", 9)


def test_each_answer_once_with_its_picture(pairs):
    rows = load_unpaired(pairs)
    assert set(rows.column_names) == {"id", "images", "prompt", "completion", "label"}
    assert len(rows) == 18
    found = {(row["id"], row["label"]): row for row in rows}
    for pair in read_records(pairs, Pair):
        for label, answer in ((True, pair.chosen), (False, pair.rejected)):
            row = found.pop((pair.id, label))
            assert normalise_messages(row["completion"]) == answer
            assert normalise_messages(row["prompt"]) == pair.prompt
            pictures = [open_image(image) for image in pair.images]
            assert [image.tobytes() for image in row["images"]] == [image.tobytes() for image in pictures]
    assert not found


@pytest.mark.parametrize("count", [2, 3, 8, 9])
def test_the_two_answers_of_a_pair_are_far_apart(count, tmp_path):
    rows = load_unpaired(write(tmp_path / "pairs", count), seed=4)
    places = {}
    for place, identity in enumerate(rows["id"]):
        places.setdefault(identity, []).append(place)
    assert min(last - first for first, last in places.values()) >= max(count - 2, 1)
    assert rows["label"] == [True, False] * count


def test_the_seed_decides_the_order(pairs):
    assert load_unpaired(pairs, seed=1)["id"] == load_unpaired(pairs, seed=1)["id"]
    assert load_unpaired(pairs, seed=1)["id"] != load_unpaired(pairs, seed=2)["id"]


def test_one_pair_is_too_few(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"pairs holds too few pairs \(1\): KTO shows a prompt the answer of another\. Take 2 or",
    ):
        load_unpaired(write(tmp_path / "pairs", 1))


def kto(checkpoint, pairs, output):
    config = ModelConfig(str(checkpoint), device="cpu")
    settings = {"per_device_train_batch_size": 3, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True,
                "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": None,
                "gradient_checkpointing": False, "seed": 3}  # fmt: skip
    return KTOTrainer(
        load_model(config),
        args=KTOConfig(str(output), **settings),
        train_dataset=load_unpaired(pairs),
        processing_class=load_processor(config),
    )


def test_kto_trains_on_them(tiny_llava, pairs, tmp_path):
    trainer = kto(tiny_llava, pairs, tmp_path)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.5, abs=1e-4)  # policy is reference: every row's loss is 1 - sigmoid(0)
    assert losses[1] != pytest.approx(0.5, abs=1e-4)
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("vision" in name for name in moved)
    assert any("language_model" in name for name in moved)


def test_kto_sees_the_picture(tiny_llava, pairs, tmp_path):
    trainer = kto(tiny_llava, pairs, tmp_path)
    rows = [trainer.train_dataset[number] for number in range(3)]
    own = trainer.data_collator([dict(row) for row in rows])
    other = trainer.data_collator([{**row, "images": rows[2 - place]["images"]} for place, row in enumerate(rows)])
    assert torch.equal(own["input_ids"], other["input_ids"])
    with torch.no_grad():
        logits = [trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                pixel_values=batch["pixel_values"]).logits for batch in (own, other)]  # fmt: skip
    assert (logits[0][0] - logits[1][0]).abs().max() > 1e-4
    assert torch.equal(own["label"], torch.tensor([True, False, True]))
