"""What is examined of runs on the policy's own answers: prompts, what it draws, what that is worth, one batch of training on it.

Of `train_ppo` an iteration of one batch; of `train_online` a batch whose pairs the policy makes, which is what rounds and single
steps train on alike. Both draw with the run's own settings. The checks of it are in `drawn_checks`.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prefalign import families
from prefalign.config import ConfigError, to_mapping
from prefalign.doctor.case import Step, alone, one_process
from prefalign.doctor.findings import NotExaminedError
from prefalign.engines.transformers import load_engine
from prefalign.online import ppo_run, rounds, step_run
from prefalign.online.checking import Gap
from prefalign.online.prompts import gather_prompts
from prefalign.online.rollout import Rollout
from prefalign.online.round_checks import gap_bound, measure_gap
from prefalign.online.settings import check_settings
from prefalign.records import Pair, normalise_messages
from prefalign.store import OutputConfig, write_records
from prefalign.training.frame import load_start
from prefalign.training.runs import CONFIG_FILE, run_files
from prefalign.training.upkeep import plain_lines_without_a_terminal

ONE_BATCH = {
    "num_mini_batches": 1,
    "gradient_accumulation_steps": 1,
    "num_ppo_epochs": 1,
    "value_warmup_iterations": 0,
}
"""PPO's settings with which an iteration is one batch, which trains the policy too."""


@dataclass
class DrawnCase:
    """What the checks look at.

    Attributes:
        config: the recipe's config.
        trainer: the trainer, its output folder apart.
        files: what the run would write beside its models.
        entries: rewards and annotators of the run.
        prompts: prompts that there are, and tokens of those that do not fit, by id.
        rows: the rows that one batch asks.
        draw: draws and judges them, and runs forward and backward pass.
        gap: engine against trainer, where the run compares them.
        bound: largest gap of one token.
        broke: drawing the batch ended in an error, which is said once.
    """

    config: Any
    trainer: Any
    files: dict[str, str]
    entries: Sequence[Mapping[str, Any]]
    prompts: tuple[int, Mapping[str, int]]
    rows: Sequence[Mapping[str, Any]]
    draw: Callable[[DrawnCase], Drawn]
    gap: Gap | None = None
    bound: float = 0.0
    broke: bool = False

    @property
    def model_config(self) -> Any:
        """The model's config."""
        return families.core(self.policy).config

    @property
    def policy(self) -> Any:
        """The model that draws."""
        return self.trainer.roles.policy if hasattr(self.trainer, "roles") else self.trainer.model

    @cached_property
    def drawn(self) -> Drawn:
        """One batch of answers with their scores and gradients.

        Raises:
            NotExaminedError: it ended in an error before.
        """
        if self.broke:
            raise NotExaminedError("no batch: see its error")
        self.broke = True
        found = self.draw(self)
        self.broke = False
        return found

    @property
    def step(self) -> Step:
        """Forward and backward pass over the batch; the weights stay as they are.

        Raises:
            NotExaminedError: there was nothing to train on.
        """
        if self.drawn.step is None:
            raise NotExaminedError("the batch gave nothing to train on")
        return self.drawn.step


@dataclass
class Drawn:
    """What a batch came to.

    Attributes:
        texts: answers, with the row each belongs to.
        finished: how many of them end by themselves.
        problems: what became of rows or answers that count in no loss, by reason.
        usable: rows (pairs) or answers that count.
        asked: of how many.
        scores: by term, of each answer.
        kl: largest difference of a token's log-prob between policy and reference at the start.
        step: forward and backward pass; None if there was nothing to train on.
    """

    texts: list[tuple[int, str]]
    finished: int | None
    problems: dict[str, int]
    usable: int
    asked: int
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    kl: float | None = None
    step: Step | None = None


def prepare_ppo(config: Any, *, rows: int, scratch: Path) -> DrawnCase:
    """Set up an iteration of one batch.

    Args:
        config: of `train_ppo`.
        rows: how many prompts are read.
        scratch: an empty folder.

    Raises:
        ValueError: whatever the recipe would refuse.
    """
    one_process()
    plain_lines_without_a_terminal()
    ppo_run.read_inputs(config, output=scratch, trainer=alone(config.trainer))  # the settings as they are
    inputs = ppo_run.read_inputs(config, output=scratch, trainer={**alone(config.trainer), **ONE_BATCH})
    entries = ppo_run.reward_entries(config)[0]
    total = len(inputs.prompts)
    needed = inputs.arguments.answers_per_iteration // inputs.arguments.num_generations
    picked = random.Random(config.seed).sample(range(total), min(max(rows, needed), total))
    inputs.prompts = inputs.prompts.select(sorted(picked))
    start = load_start(config, inputs.arguments, inputs.files, continues=True)
    trainer, fit, _ = ppo_run.build_trainer(config, inputs, start)
    if trainer.args.gradient_checkpointing:
        trainer.roles.activation_checkpointing_enable()
    asked = [trainer.train_dataset[number] for number in range(needed)]
    return DrawnCase(config, trainer, start.files, entries, (total, fit.too_long), asked, _iteration)


def prepare_online(config: Any, *, rows: int, scratch: Path) -> DrawnCase:
    """Set up a step on pairs of the policy's own answers.

    Args:
        config: of `train_online`.
        rows: how many prompts are read.
        scratch: an empty folder.

    Raises:
        ValueError: whatever the recipe would refuse, or TRL's trainers, which are not examined.
    """
    one_process()
    check_settings(config)
    if config.algorithm in ("grpo", "rloo"):
        raise ConfigError(
            f"trainer.algorithm is {config.algorithm!r}: TRL's trainer draws and learns by itself, and doctor looks into "
            "prefalign's own. Look at the prompts and rewards with trainer.algorithm: online_dpo_step, and start the run with "
            "trainer.max_steps: 1 and another output before the long one."
        )
    plain_lines_without_a_terminal()
    if config.algorithm == "online_dpo":
        rounds._check_settings(config)
    tried = replace(config, output=scratch / "run", trainer=alone(config.trainer))
    gathered = gather_prompts(tried)
    found = list(step_run.step_rows(gathered, config.offline))
    picked = random.Random(config.seed).sample(range(len(found)), min(rows, len(found)))
    write_records("online_rows", (found[number] for number in sorted(picked)), output=OutputConfig(tried.output / "rows"),
                  record=Pair, settings={}, seed=config.seed)  # fmt: skip
    gap, bound = None, 0.0
    if (
        config.algorithm == "online_dpo" and config.check.prompts
    ):  # before the trainer: settings that are read reset accelerate
        engine = load_engine(config.model, batch_size=config.batch_size)
        gap, bound = measure_gap(tried, engine, gathered), gap_bound(tried, engine.model.dtype)
    trainer = step_run.make_trainer(tried, {}, step_run.read_settings(tried))
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    size = trainer.args.per_device_train_batch_size
    asked = [trainer.train_dataset[number] for number in range(min(size, len(trainer.train_dataset)))]
    entries = [*config.rewards, *([config.annotator] if config.annotator else [])]
    return DrawnCase(config, trainer, _files(config), entries, (len(found), {}), asked, _pairs, gap, bound)


def _files(config: Any) -> dict[str, str]:
    if config.algorithm == "online_dpo_step":
        return {CONFIG_FILE: run_files(to_mapping(config), "")[CONFIG_FILE]}
    manifest = (config.offline / "manifest.json").read_text(encoding="utf-8") if config.offline is not None else ""
    return run_files(to_mapping(config), manifest, data="offline")


def _iteration(case: DrawnCase) -> Drawn:
    trainer = case.trainer
    trainer.create_optimizer()
    start = time.perf_counter()
    loss = trainer.training_step(trainer.model, {"rows": torch.arange(len(case.rows))})
    seconds = time.perf_counter() - start
    kept: Rollout = trainer.rollout
    gradients = {name: p.grad.cpu() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    failed = Counter(answer.failed for answer in kept.answers if answer.failed is not None)
    missing = int(kept.scores["total"].isnan().sum()) - failed.total()
    problems = {**failed, **({"no score": missing} if missing else {})}
    each = trainer.args.num_generations
    texts = [(number // each, answer.response.text) for number, answer in enumerate(kept.answers)]
    apart = (kept.logps - kept.ref_logps).abs()[kept.mask]
    return Drawn(
        texts,
        sum(answer.response.finished for answer in kept.answers),
        problems,
        len(kept.answers) - sum(problems.values()),
        len(kept.answers),
        {name: values for name, values in kept.scores.items() if not name.startswith("watch/")},
        float(apart.max()) if len(apart) else None,
        Step(loss.item(), gradients, seconds, int(kept.mask.sum())) if kept.mask.any() else None,
    )


def _pairs(case: DrawnCase) -> Drawn:
    trainer = case.trainer
    trainer.model.train()
    start = time.perf_counter()
    made = trainer.make_pairs(list(case.rows))
    batch = trainer._collated(made)
    kept = [pair for pair in made if pair.reason is None]
    taken = None
    if kept:
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss = trainer.compute_loss(
                trainer.model, trainer._prepare_inputs({**batch, "weight": len(kept) / len(made)})
            )
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad(set_to_none=True)
        tokens = sum(int(side["mask"].sum()) for side in batch["answers"].values())
        taken = Step(loss.item(), gradients, time.perf_counter() - start, tokens)
    texts = [
        (number, block["text"])
        for number, pair in enumerate(made)
        for side in ("chosen", "rejected")
        for message in normalise_messages(pair.row[side] or [])
        for block in message["content"]
        if pair.row["online"]
    ]
    problems = Counter(pair.reason for pair in made if pair.reason is not None)
    return Drawn(texts, None, dict(problems), len(kept), len(made), step=taken)
