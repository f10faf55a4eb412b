"""Planned and measured memory of families with rotary positions in three dimensions and pictures of any size."""

import pytest
from tiny_vlms import save_tiny

from prefalign import bundled, config
from prefalign.models import fingerprint
from prefalign.training.largest import largest_picture
from prefalign.training.metering import LiveTensors
from prefalign.training.planner import Options, Planner
from prefalign.training.reference import cache_reference
from tests.training_runs import make_trainer, write_pairs

pytestmark = pytest.mark.families


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "internvl"])
def model(request, tmp_path_factory):
    return save_tiny(request.param, tmp_path_factory.mktemp("plan_families") / request.param)


def planner(model, pairs, *, options, **trainer):
    values = {"model": {"model_name_or_path": str(model)}, "pairs": str(pairs), "output": "unused"}
    values["trainer"] = {
        "per_device_train_batch_size": 2,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        **trainer,
    }
    return Planner(config.build(bundled.load_stage("train_preference").Config, values), options)


def test_planned_memory_is_the_measured_peak(model, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 2)
    trainer = make_trainer(
        model, pairs, tmp_path / "run", reference="cached", max_steps=2, save_strategy="no", optim="adamw_torch"
    )
    cache_reference(trainer, tmp_path / "reference", reference=fingerprint(trainer.model), progress=False)
    with LiveTensors([*trainer.model.parameters(), *trainer.model.buffers()]) as meter:
        trainer.train()
    made = planner(model, pairs, options=Options(device="cpu"))
    assert made.need(made.setup).total == pytest.approx(meter.peak, rel=0.05)


def test_largest_picture_fits_and_a_larger_one_does_not(model, tmp_path):
    made = planner(
        model, tmp_path / "none", options=Options(device="cpu", rows=10, memory=1, prompt_tokens=40, answer_tokens=10)
    )
    found = largest_picture(made)
    assert found.size > 0
    assert found.limit in ("processor", "context")
    assert found.need <= made.memory
