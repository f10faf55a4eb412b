"""Small folders of examples and trainers on them, shared by the SFT tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trl import SFTConfig

from prefalign import bundled
from prefalign.config import build
from prefalign.images import encode_png
from prefalign.models import ModelConfig, freeze, load_model, load_processor
from prefalign.records import Example, assistant_message, user_message
from prefalign.store import OutputConfig, write_records
from prefalign.training.arguments import training_arguments
from prefalign.training.examples import load_examples
from prefalign.training.lora import LoraSettings
from prefalign.training.sft import SupervisedTrainer
from tests.tiny_vlms import picture

RECIPE = bundled.load_stage("train_sft")


def make_example(number: int, images: int = 1) -> Example:
    """A conversation whose texts differ in length from its neighbours'."""
    return Example(
        id=f"example-{number}",
        images=[encode_png(picture(10 * number + i)) for i in range(images)],
        messages=[
            user_message("what is in the picture" + " now" * (number % 3) + " ?", images),
            assistant_message("a red square" + " on a blue background" * (number % 2)),
        ],
    )


def write_examples(folder: Path, examples: Iterable[Example]) -> Path:
    """A finished folder of examples."""
    write_records(
        "test", list(examples), output=OutputConfig(folder, block_size=5), record=Example, settings={}, seed=0
    )
    return folder


def make_sft_trainer(
    checkpoint: Path,
    data: Path,
    output: Path,
    *,
    lora: bool = False,
    frozen: tuple[str, ...] = ("vision",),
    evaluates: bool = False,
    **settings: Any,
) -> SupervisedTrainer:
    """A trainer of a tiny model: batches of 2, four steps, a checkpoint after the second."""
    config = ModelConfig(str(checkpoint), device="cpu")
    model = load_model(config)
    if not lora:
        freeze(model, frozen)
    base = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    base |= {"learning_rate": 1e-3, "gradient_checkpointing": False, "disable_tqdm": True}
    return SupervisedTrainer(
        model,
        args=training_arguments({**base, **settings}, output=output, seed=3, kind=SFTConfig),
        train_dataset=load_examples(data),
        processing_class=load_processor(config),
        eval_dataset=load_examples(data) if evaluates else None,
        peft_config=LoraSettings(r=4, alpha=8).to_peft() if lora else None,
    )


def recipe_config(checkpoint: Path, data: Path, output: Path, **more: Any) -> Any:
    """The recipe's config: four steps on batches of 4, a checkpoint after the second."""
    values = {
        "model": {"model_name_or_path": str(checkpoint), "device": "cpu"},
        "data": str(data),
        "output": str(output),
        "trainer": {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4,
                    "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        **more,
    }  # fmt: skip
    return build(RECIPE.Config, values)
