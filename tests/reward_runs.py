"""Small folders of pairs with facts, reward models on tiny checkpoints, and their trainers, for their tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from prefalign import bundled
from prefalign.config import build
from prefalign.models import ModelConfig, fingerprint, freeze, load_model, load_processor
from prefalign.records import Pair, Prompt, assistant_message
from prefalign.rewards.augmentation import RatingPrompt
from prefalign.rewards.rows import load_reward_pairs
from prefalign.rewards.trainer import RewardTrainer, bradley_terry, reward_arguments
from prefalign.rewards.vlm import BaseModel, RewardModel
from prefalign.store import OutputConfig, read_records, write_records
from prefalign.training.lora import LoraSettings
from tests.training_runs import make_pair

STAGE = bundled.load_stage("train_reward_model")
RATING = RatingPrompt(
    ask="Is the answer right?{facts}\nOne mark.", lead="In the image there is:", opening="The mark is"
)
FIVE = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
FACTS = ["A red square.", "A blue background.", "The lazy dog.", "A large red circle at the top left."]


def make_reward_pair(number: int, images: int = 1, **more: Any) -> Pair:
    """A pair with facts: as many lines as its number says, up to four."""
    pair = make_pair(number, images)
    return replace(pair, **{"facts": {"captions": FACTS[: number % 5]}, "rejected_images": [], **more})


def write_reward_pairs(folder: Path, pairs: Iterable[Pair] | int = 8) -> Path:
    """A finished folder of such pairs."""
    pairs = [make_reward_pair(number) for number in range(pairs)] if isinstance(pairs, int) else list(pairs)
    write_records("test", pairs, output=OutputConfig(folder, block_size=5), record=Pair, settings={}, seed=0)
    return folder


def make_reward_model(
    checkpoint: Path, *, lora: bool = False, frozen: tuple[str, ...] = (), **settings: Any
) -> RewardModel:
    """A reward model on a tiny checkpoint; its adapter does something from the start."""
    config = ModelConfig(str(checkpoint), device="cpu", dtype="float32")
    model = load_model(config)
    base = BaseModel(str(checkpoint), None, fingerprint(model), "float32")
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraSettings(r=4, alpha=8, dropout=0.0).to_peft())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    elif frozen:
        freeze(model, frozen)
    return RewardModel(model, load_processor(config), base=base, **{"rating": RATING, **settings})


def make_reward_trainer(
    checkpoint: Path,
    pairs: Path,
    output: Path,
    *,
    lora: bool = False,
    evaluates: bool = False,
    model: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> RewardTrainer:
    """A trainer of a tiny reward model: batches of 2, four steps, a checkpoint after the second."""
    base = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    base |= {"learning_rate": 1e-3, "gradient_checkpointing": False, "disable_tqdm": True}
    return RewardTrainer(
        make_reward_model(checkpoint, lora=lora, frozen=("vision",), **(model or {})),
        args=reward_arguments({**base, **settings}, output=output, seed=3),
        train_dataset=load_reward_pairs(pairs),
        eval_dataset=load_reward_pairs(pairs) if evaluates else None,
        **(trainer or {}),
    )


def loss_and_gradients(
    model: RewardModel, rows: list[dict[str, Any]], **settings: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Scores (M, A) and the gradients of the Bradley-Terry loss on some rows."""
    batch = model.collator(**settings)(rows)
    scores = model(**{name: batch[name] for name in ("packed", "plain", "places") if name in batch})
    chosen, rejected = scores.chunk(2)
    bradley_terry(chosen, rejected, direction=batch["direction"], centring=0.1).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return scores.detach(), gradients


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    """The same names, and no value further off than a share of the largest."""
    assert one.keys() == two.keys()
    largest = max(tensor.abs().max().item() for tensor in one.values())
    assert largest > 1e-3
    for name in one:
        assert (one[name] - two[name]).abs().max().item() <= tolerance * largest, name


def stage_config(checkpoint: Path, pairs: Path, output: Path, **more: Any) -> Any:
    """The stage's config: four steps on batches of 4, a checkpoint after the second."""
    values = {
        "model": {"model_name_or_path": str(checkpoint), "device": "cpu"},
        "pairs": str(pairs),
        "output": str(output),
        "prompt": {"ask": RATING.ask, "lead": RATING.lead, "opening": RATING.opening},
        "trainer": {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4,
                    "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        **more,
    }  # fmt: skip
    return build(STAGE.Config, values)


def graded_by_chance(prompts: Path, output: Path) -> Path:
    """Pairs from a folder of prompts: chosen is the reference answer, rejected the same with a word gone; scores by chance."""
    pairs = []
    for number, prompt in enumerate(read_records(prompts, Prompt)):
        answer = str(prompt.answer)
        scores = {name: (number + place) % 5 for place, name in enumerate(FIVE)}
        meta = {"scores": {"chosen": scores, "rejected": dict.fromkeys(FIVE, 2)}}
        sides = [[assistant_message(text)] for text in (answer, answer.replace(" the ", " ", 1))]
        pairs.append(Pair(prompt.id, prompt.images, prompt.messages, *sides, "test", facts=prompt.facts, meta=meta))
    return write_reward_pairs(output, pairs)
