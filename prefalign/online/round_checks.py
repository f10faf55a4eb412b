"""The check of a round's engine against its trainer: what it is made on, its bound, and room for it."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefalign.engines.transformers import TransformersEngine
from prefalign.manifest import write_atomically
from prefalign.online.checking import DEFAULT_BOUND, Gap, check_gap, token_gap, trainer_logprobs
from prefalign.online.sampling import drawn_answers
from prefalign.records import Prompt
from prefalign.store import read_records
from prefalign.training.arguments import training_arguments

if TYPE_CHECKING:
    from prefalign.online.settings import OnlineConfig


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
