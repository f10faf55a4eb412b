"""Small pairs folders and trainers, shared by the training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prefalign.images import encode_png
from prefalign.losses import read_losses
from prefalign.models import ModelConfig, freeze, load_model, load_processor
from prefalign.records import Pair, assistant_message, user_message
from prefalign.store import OutputConfig, write_records
from prefalign.training.arguments import training_arguments
from prefalign.training.lora import LoraSettings
from prefalign.training.pairs import load_pairs
from prefalign.training.preference import PreferenceTrainer
from tests.tiny_vlms import picture


def make_pair(number: int, images: int = 1, rejected_size: tuple[int, int] = (40, 48)) -> Pair:
    """A pair whose texts differ in length from its neighbours'."""
    return Pair(
        id=f"pair-{number}",
        images=[encode_png(picture(10 * number + i)) for i in range(images)],
        rejected_images=[encode_png(picture(1000 + 10 * number + i, rejected_size)) for i in range(images)],
        prompt=[user_message("what is in the picture" + " now" * (number % 3) + " ?", images)],
        chosen=[assistant_message("a red square" + " on a blue background" * (number % 2))],
        rejected=[assistant_message("a dog jumps" + " over" * (number % 3))],
        method="test",
    )


def write_pairs(folder: Path, count: int = 8, **more: Any) -> Path:
    """A finished pairs folder."""
    pairs = [make_pair(number, **more) for number in range(count)]
    write_records("test", pairs, output=OutputConfig(folder, block_size=5), record=Pair, settings=more, seed=0)
    return folder


def make_trainer(
    checkpoint: Path,
    pairs: Path,
    output: Path,
    *,
    losses: tuple[str | dict[str, Any], ...] = ("text",),
    lora: bool = False,
    frozen: tuple[str, ...] = ("vision",),
    evaluates: bool = False,
    fast_path: str = "auto",
    reference: str = "online",
    negative: Any = None,
    tokens_per_pass: int | None = None,
    **settings: Any,
) -> PreferenceTrainer:
    """A trainer of a tiny model: batches of 2, four steps, a checkpoint after the second."""
    config = ModelConfig(str(checkpoint), device="cpu")
    model = load_model(config)
    if not lora:
        freeze(model, frozen)
    base = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    base |= {"learning_rate": 1e-3, "gradient_checkpointing": False, "disable_tqdm": True}
    arguments = training_arguments({**base, **settings}, output=output, seed=3)
    entries = [{"name": entry} if isinstance(entry, str) else entry for entry in losses]
    return PreferenceTrainer(
        model,
        args=arguments,
        train_dataset=load_pairs(pairs),
        processing_class=load_processor(config),
        eval_dataset=load_pairs(pairs) if evaluates else None,
        losses=read_losses(entries, beta=arguments.beta),
        fast_path=fast_path,
        reference=reference,
        negative=negative,
        tokens_per_pass=tokens_per_pass,
        peft_config=LoraSettings(r=4, alpha=8).to_peft() if lora else None,
    )


def losses(trainer: Any) -> list[float]:
    """Logged training losses, in order."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over all tensors; the names must agree."""
    assert one.keys() == two.keys()
    return max((one[name].float() - two[name].float()).abs().max().item() for name in one)
