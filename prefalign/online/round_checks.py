"""What is checked before a round draws: that its trainer can be made, and its engine against its trainer; and room for both."""

from __future__ import annotations

import gc
import json
import tempfile
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefalign.checkpoints import resolve
from prefalign.config import ConfigError
from prefalign.engines.transformers import TransformersEngine
from prefalign.manifest import write_atomically
from prefalign.models import freeze, load_processor
from prefalign.online.checking import DEFAULT_BOUND, Gap, check_gap, token_gap, trainer_logprobs
from prefalign.online.sampling import drawn_answers
from prefalign.records import Prompt
from prefalign.store import read_records
from prefalign.training.arguments import check_precision, training_arguments
from prefalign.training.lora import check_targets, check_trainable
from prefalign.training.preference import PreferenceTrainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefalign.losses import Weighted
    from prefalign.online.settings import OnlineConfig


def check_held_out(arguments: Any) -> None:
    """Check that no held-out pairs are asked for, of which a run on the policy's own answers has none.

    Raises:
        ConfigError: names the setting.
    """
    strategies = {name: getattr(arguments, name) for name in ("eval_strategy", "save_strategy")}
    given = {name: str(getattr(value, "value", value)) for name, value in strategies.items()}
    asked = {
        "eval_strategy": given["eval_strategy"] if given["eval_strategy"] != "no" else None,
        "save_strategy": "best" if given["save_strategy"] == "best" else None,
        "eval_on_start": arguments.eval_on_start or None,
    }
    for name, value in asked.items():
        if value is not None:
            raise ConfigError(
                f"trainer.{name} is {value!r}, and training on the policy's own answers has no held-out pairs to evaluate. Leave "
                "it out; what the policy has learned is for `evaluate_model` to tell."
            )


def check_trainer(config: OnlineConfig, settings: dict[str, Any], losses: Sequence[Weighted]) -> None:
    """Make the trainer of a round, with its optimizer and schedule, on the model without its weights.

    What TRL, transformers, PEFT or a package that they need would refuse after the first round's answers were drawn and judged,
    they refuse here. What needs the weights or the rows stays for then.

    Args:
        config: of the run.
        settings: the `trainer:` mapping of a round.
        losses: weighted terms.

    Raises:
        ConfigError: with what was refused.
    """
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    source, _, revision = resolve(config.model)
    trusted = config.model.trust_remote_code
    dtype = "float32" if config.lora is None and config.model.dtype == "auto" else config.model.dtype
    chosen = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    with tempfile.TemporaryDirectory(prefix="prefalign-check-") as scratch:
        # a repository would be made at once, under the name of the scratch folder
        arguments: Any = training_arguments({**settings, "push_to_hub": False}, output=Path(scratch), seed=config.seed)
        check_held_out(arguments)
        if arguments.n_gpu > 1:
            raise ConfigError(
                f"{arguments.n_gpu} GPUs are visible to one process, and TRL trains on one. Make one visible with "
                "CUDA_VISIBLE_DEVICES."
            )
        found = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trusted)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                found, attn_implementation=config.model.attn_implementation, trust_remote_code=trusted, **chosen
            )
        model.hf_device_map = {"weights": "meta", "buffers": "meta"}  # neither transformers nor accelerate moves it
        check_precision(model.dtype, arguments)
        if config.lora is None:
            freeze(model, config.freeze)
        else:
            check_targets(model, config.lora)
        try:
            with no_init_weights():
                trainer = PreferenceTrainer(
                    model,
                    args=arguments,
                    train_dataset=Dataset.from_list([{"images": []}]),
                    processing_class=load_processor(config.model),
                    losses=losses,
                    peft_config=config.lora.to_peft() if config.lora else None,
                    fast_path=config.fast_path,
                    reference="cached",
                )
            check_trainable(trainer.model, config.freeze)
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
        except ConfigError:
            raise
        except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"trainer: {error} (Refused by {type(error).__name__} before anything was drawn: the rounds train with these "
                "settings.)"
            ) from error


def first_prompts(prompts: Path, count: int) -> list[Prompt]:
    """The first rows of a folder of prompts."""
    return list(islice(read_records(prompts, Prompt), count))


def measure_gap(config: OnlineConfig, engine: TransformersEngine, prompts: Path) -> Gap | None:
    """How far engine and trainer are apart on the policy's answers to the first prompts; None if there is no answer."""
    if not config.check.prompts:
        return None
    requests, answers = drawn_answers(engine, first_prompts(prompts, config.check.prompts),
                                      max_new_tokens=config.sampling.max_new_tokens, seed=config.seed)  # fmt: skip
    texts = [answer.text for answer in answers]
    if not texts:
        return None
    trained = trainer_logprobs(engine.model, engine.processor, requests, texts, autocast=autocast(config))
    return token_gap(engine, requests, texts, trained)


def keep_gap(gap: Gap | None, bound: float, folder: Path) -> None:
    """Stop a run whose gap is above the bound, or note it in `check.json` of the round's folder.

    A policy that says nothing has no gap; it gives no pair either, and the pairs' manifest says so.

    Raises:
        EngineGap: the gap is above the bound.
    """
    if gap is None:
        return
    check_gap(gap, bound)
    write_atomically(folder / "check.json", json.dumps(asdict(gap), indent=2).encode())


def gap_bound(config: OnlineConfig, dtype: torch.dtype) -> float:
    """The bound of `check`, or what the precision that training runs in explains."""
    precision = str(autocast(config) or dtype).removeprefix("torch.")
    return DEFAULT_BOUND[precision] if config.check.bound is None else config.check.bound


def autocast(config: OnlineConfig) -> torch.dtype | None:
    """The precision that `trainer.bf16` or `trainer.fp16` computes in."""
    arguments: Any = training_arguments(config.trl, output=config.output, seed=config.seed)
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def free_memory() -> None:
    """Give a GPU's memory back before the next arrow loads its models: a trainer is a cycle, which only a collection ends."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
