"""The run that is examined: set up as the recipe sets it up, with a sample of its rows and one batch of them.

Legend of shapes: `B` rows of the batch, `A` tokens of the longest answer of a side.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefalign import families
from prefalign.config import ConfigError
from prefalign.doctor.findings import NotExaminedError
from prefalign.losses import VIEWS
from prefalign.training.documents import Documents, digest_of, picture_bytes
from prefalign.training.frame import load_start
from prefalign.training.preference_run import build_trainer, read_inputs
from prefalign.training.profiles import SHARING, check_sharing
from prefalign.training.scoring import run
from prefalign.training.upkeep import plain_lines_without_a_terminal

if TYPE_CHECKING:
    from prefalign.training.collator import PreferenceCollator
    from prefalign.training.preference import PreferenceTrainer


@dataclass
class Reading:
    """A row of the sample as the processor prepares it, answers whole.

    Attributes:
        row: the row.
        documents: its prompts and answers.
    """

    row: Mapping[str, Any]
    documents: Documents

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(document.prompt) for document in self.documents.documents)

    @property
    def total(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return self.prompt + max(len(answer) for document in self.documents.documents for answer in document.answers)

    def answers(self) -> dict[str, torch.Tensor]:
        """Side (`chosen`, `rejected`) to the token ids of its answer, (A,); only sides that the run looks at."""
        found = {}
        for view, [(number, branch)] in self.documents.places.items():
            found[VIEWS[view].answer] = self.documents.documents[number].answers[branch]
        return found


@dataclass
class Step:
    """Forward and backward pass over the batch.

    Attributes:
        loss: the loss.
        gradients: parameter name to gradient, on the CPU.
        seconds: time of both passes.
        tokens: tokens that the language model read, padding apart.
    """

    loss: float
    gradients: dict[str, torch.Tensor]
    seconds: float
    tokens: int


@dataclass
class Case:
    """What the checks look at.

    Attributes:
        config: the recipe's config.
        trainer: the trainer as the recipe builds it, its output folder apart.
        files: what the run would write beside its models.
        base: fingerprint of the weights that the run starts from.
        readings: rows of the sample that could be read.
        unreadable: id to error of those that could not.
    """

    config: Any
    trainer: PreferenceTrainer
    files: dict[str, str]
    base: str
    readings: list[Reading] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def processor(self) -> Any:
        """The processor."""
        return self.trainer.processing_class

    @property
    def model_config(self) -> Any:
        """The model's config."""
        return families.core(self.trainer.model).config

    @cached_property
    def collator(self) -> PreferenceCollator:
        """The trainer's collator, for batches that are one pass."""
        return replace(self.trainer.data_collator, tokens_per_pass=None)

    @property
    def precise(self) -> bool:
        """Whether the run computes in float32."""
        return not (self.trainer.args.bf16 or self.trainer.args.fp16) and self.trainer.model.dtype == torch.float32

    @cached_property
    def fitting(self) -> list[Reading]:
        """Readings whose prompt leaves room for an answer."""
        room = self.collator.max_length
        return [reading for reading in self.readings if room is None or reading.prompt < room]

    @cached_property
    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of the batch: the first of the sample that fit, as many as a device takes in one pass.

        Raises:
            NotExaminedError: there is none.
        """
        if not self.fitting:
            raise NotExaminedError("no row of the sample can be run")
        rows = [reading.row for reading in self.fitting[: self.trainer.args.per_device_train_batch_size]]
        budget = self.trainer.data_collator.tokens_per_pass
        if budget is None:
            return rows
        read = self.collator.reader.read(rows, self.collator.max_length)
        most = max(read.passes(budget, self.collator.layout), key=lambda group: len(list(group)))
        return [rows[number] for number in sorted(most)]

    @cached_property
    def step(self) -> Step:
        """The batch as the run takes it.

        Raises:
            NotExaminedError: nothing trains.
        """
        return self.take_step(self.collator)

    def take_step(self, collator: PreferenceCollator) -> Step:
        """Loss and gradients of the batch as a collator lays it out; the weights stay as they are."""
        model, trainer = self.trainer.model, self.trainer
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise NotExaminedError("nothing trains")
        batch = self.batch(self.rows, collator)
        model.train()
        start = time.perf_counter()
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, batch)
        loss.backward()
        value = loss.item()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return Step(value, gradients, seconds, tokens_of(batch))

    def batch(self, rows: Sequence[Mapping[str, Any]], collator: PreferenceCollator) -> dict[str, Any]:
        """Rows on the run's device, with the reference's log-probs where the run reads them from a cache."""
        batch = self.trainer._prepare_inputs(collator(rows))
        if self.trainer.needs_reference and self.trainer.reference == "cached":
            batch["reference"] = self.log_probs(batch, reference=True)
        return batch

    def log_probs(
        self, batch: Mapping[str, Any], *, reference: bool = False, training: bool = False
    ) -> dict[str, torch.Tensor]:
        """Per view the log-probs of the answers' tokens, (B, A), 0 past their ends.

        Args:
            batch: a collated batch.
            reference: of the reference instead of the policy.
            training: in the mode that training is in, dropout included.
        """
        trainer = self.trainer
        trainer.model.train(training)
        with (
            torch.no_grad(),
            trainer.accelerator.autocast(),
            trainer.as_reference() if reference else nullcontext(trainer.model) as model,
        ):
            flat = run(model, batch)["log_probs"].float()
        found = {}
        for view in trainer.views:
            mask = batch["answers"][VIEWS[view].answer]["mask"]
            found[view] = flat.new_zeros(mask.shape).masked_scatter(mask, flat[batch["index"][view]])
        return found


def prepare(config: Any, *, rows: int, scratch: Path) -> Case:
    """Set a run up as the recipe does, with a scratch folder in place of its output.

    Args:
        config: config of the recipe.
        rows: how many rows are read.
        scratch: an empty folder.

    Raises:
        ValueError: whatever the recipe would refuse.
    """
    one_process()
    plain_lines_without_a_terminal()
    check_sharing(config)  # a batch is examined in one process, which holds all weights
    inputs = read_inputs(config, output=scratch, trainer=alone(config.trainer))
    start = load_start(config, inputs.arguments, inputs.files)
    trainer = build_trainer(config, inputs, start)
    checkpoint_activations(trainer)
    case = Case(config, trainer, start.files, start.fingerprint)
    read_sample(case, rows)
    return case


def alone(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's settings without those that share a run out over processes."""
    return {name: value for name, value in trainer.items() if name not in SHARING}


def peak() -> str:
    """What a GPU has held at most so far, in words; nothing on a CPU."""
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most" if torch.cuda.is_available() else ""


def one_process() -> None:
    """Check that one process runs.

    Raises:
        ConfigError: several do.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ConfigError(
            f"doctor was started in {processes} processes, and it examines what one of them does with one batch. Start it "
            "without torchrun or accelerate."
        )


def checkpoint_activations(trainer: PreferenceTrainer) -> None:
    """What `train()` does about activation checkpointing before its first step."""
    args = trainer.args
    if args.gradient_checkpointing:
        settings = args.gradient_checkpointing_kwargs or {}
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings or None)
        if not settings.get("use_reentrant"):
            families.core(trainer.model).disable_input_require_grads()


def read_sample(case: Case, rows: int) -> None:
    """Prepare some rows, drawn by the run's seed."""
    dataset, reader = case.trainer.train_dataset, case.collator.reader
    drawn = random.Random(case.config.seed).sample(range(len(dataset)), min(rows, len(dataset)))
    for number in drawn:
        row = dataset[number]
        try:
            case.readings.append(Reading(row, reader.read([row])))
        except (ValueError, OSError) as error:
            case.unreadable[row["id"]] = str(error)


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Tokens that a batch puts through the language model."""
    if "packed" in batch:
        return sum(prompt + sum(branches) for prompt, branches in batch["packed"]["layout"].documents)
    return int(batch["plain"]["attention_mask"].sum())


def shown(row: Mapping[str, Any], side: str = "images") -> str:
    """Digest of the pictures of a row's side."""
    return digest_of([picture_bytes(picture) for picture in row.get(side) or []])


def plain(collator: PreferenceCollator) -> PreferenceCollator:
    """The same collator in TRL's layout."""
    return replace(collator, layout="plain")
