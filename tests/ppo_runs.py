"""Small PPO trainers on tiny models, shared by the PPO tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefalign.images import encode_png
from prefalign.models import ModelConfig, freeze, load_model, load_processor
from prefalign.online.arguments import PPOConfig
from prefalign.online.ppo import PPOTrainer
from prefalign.online.prompt_rows import load_prompts
from prefalign.online.roles import VALUE
from prefalign.online.rollout import VIEW, Rollout, encode_once, read_prompts
from prefalign.records import Prompt, user_message
from prefalign.rewards import Combined, Response, Weighted
from prefalign.store import OutputConfig, write_records
from prefalign.training.arguments import training_arguments
from prefalign.training.documents import Documents, decode
from prefalign.training.lora import LoraSettings
from tests.tiny_vlms import picture


@dataclass
class Letters:
    """How often a letter stands in the answer."""

    letter: str = "a"

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        return {"letters": torch.tensor([float(response.text.count(self.letter)) for response in responses])}


@dataclass
class Brightness:
    """How bright the first picture is, and a little of the answer's length: a reward that looks."""

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        means = [sum(decode(r.images[0]).convert("L").getdata()) / 1e4 for r in responses]
        return {"brightness": torch.tensor([m + len(r.text) / 100 for m, r in zip(means, responses, strict=True)])}


def write_prompts(
    folder: Path, count: int = 8, images: int = 1, sizes: Sequence[tuple[int, int]] = ((40, 48),)
) -> Path:
    """A finished folder of prompts."""
    prompts = [
        Prompt(f"prompt-{number}", [encode_png(picture(10 * number + i, sizes[number % len(sizes)])) for i in range(images)],
               [user_message("what is in the picture" + " now" * (number % 3) + " ?", images)], answer="a dog")
        for number in range(count)
    ]  # fmt: skip
    write_records(
        "test", prompts, output=OutputConfig(folder, block_size=5), record=Prompt, settings={"n": count}, seed=0
    )
    return folder


def make_ppo(
    checkpoint: Path,
    prompts: Path,
    output: Path,
    *,
    reward: Any = None,
    watch: Any = None,
    lora: bool = True,
    frozen: tuple[str, ...] = ("vision", "projector"),
    fast_path: str = "auto",
    model: Any = None,
    r: int = 4,
    reward_adapter: str | None = None,
    value_model: Any = None,
    **settings: Any,
) -> PPOTrainer:
    """A trainer of a tiny model: four answers of up to 6 tokens in an iteration, an update for two of them."""
    config = ModelConfig(str(checkpoint), device="cpu")
    given = model is not None
    model = load_model(config) if model is None else model
    if not lora:
        freeze(model, frozen)
    base = {
        "per_device_train_batch_size": 2,
        "num_mini_batches": 2,
        "max_new_tokens": 6,
        "max_steps": 4,
        "save_steps": 2,
    }
    base |= {"learning_rate": 1e-3, "gradient_checkpointing": False, "disable_tqdm": True, "blank_picture_probe": 0}
    arguments = training_arguments({**base, **settings}, output=output, seed=3, kind=PPOConfig)
    return PPOTrainer(
        model,
        args=arguments,
        train_dataset=load_prompts(prompts),
        processing_class=load_processor(config),
        rewards=Combined([Weighted("toy", Letters() if reward is None else reward)]),
        watch=Combined([Weighted("watched", watch)]) if watch is not None else None,
        fast_path=fast_path,
        peft_config=LoraSettings(r=r, alpha=2 * r).to_peft() if lora and not given else None,
        reward_adapter=reward_adapter,
        value_model=value_model,
    )


def begun(trainer: PPOTrainer, rows: Sequence[int] | None = None) -> PPOTrainer:
    """The trainer with its first rollout drawn and run through, no update made."""
    count = trainer.args.answers_per_iteration // trainer.args.num_generations
    trainer._begin(list(range(count)) if rows is None else list(rows))
    return trainer


def history(trainer: PPOTrainer, name: str) -> list[float]:
    """A logged metric, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def perturb(trainer: PPOTrainer, adapter: str, seed: int = 0, scale: float = 0.3) -> None:
    """Give an adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainer.roles.policy.named_parameters():
        if f".{adapter}." in name and "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def passes(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """What policy, reference and value said of the rollout."""
    kept = trainer.rollout
    return {name: getattr(kept, name).clone() for name in ("logps", "ref_logps", "values")}


def lively(trainer: PPOTrainer) -> PPOTrainer:
    """Policy and value adapters and the value head with weights of their own."""
    perturb(trainer, "default", 1)
    perturb(trainer, VALUE, 2)
    with torch.no_grad():
        trainer.roles.value_head.weight.normal_(generator=torch.Generator().manual_seed(3))
    return trainer


def re_read(trainer: PPOTrainer, rows: Sequence[Any], said: Sequence[torch.Tensor]) -> Rollout:
    """The first rollout once more, with these rows' pictures and the tokens that were said."""
    read = read_prompts(trainer.reader, rows)
    each = len(said) // len(rows)
    where = [number for number, _ in read.places[VIEW] for _ in range(each)]
    places = [(number, read.documents[number].branch(tokens)) for number, tokens in zip(where, said, strict=True)]
    kept = trainer.rollout
    assert kept is not None
    kept.documents = Documents(read.documents, {VIEW: places})
    kept.answers = [replace(answer, response=replace(answer.response, images=list(row["images"])))
                    for answer, row in zip(kept.answers, [row for row in rows for _ in range(each)], strict=True)]  # fmt: skip
    if trainer.keeps_features:
        kept.features = encode_once(read.documents, trainer.roles.policy, trainer.collator, most=2)
    trainer._run_through(kept)
    return kept
