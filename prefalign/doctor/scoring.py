"""What is examined of a reward model's training: its rows, one batch forward and backward, and what the scores depend on.

Legend of shapes: `B` pairs of the batch, `A` attributes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prefalign import families
from prefalign.corruption import blank
from prefalign.doctor import model, world
from prefalign.doctor.case import Step, alone, one_process, peak, shown, tokens_of
from prefalign.doctor.findings import Finding, NotExaminedError, judge, some
from prefalign.rewards.reward_run import build_trainer, read_inputs
from prefalign.rewards.rows import as_mapping
from prefalign.rewards.trainer import RewardTrainer
from prefalign.training.documents import decode
from prefalign.training.frame import load_start
from prefalign.training.upkeep import plain_lines_without_a_terminal

DULL = 0.02
"""Change of a score, in deviations of the batch's scores, below which the picture hardly counts."""


@dataclass
class RewardCase:
    """What the checks look at.

    Attributes:
        config: the config of `train_reward_model`.
        trainer: the trainer as the recipe builds it, its output folder apart.
        files: what the run would write beside its models.
        sample: rows that could be read.
        unreadable: id to error of those that could not.
    """

    config: Any
    trainer: RewardTrainer
    files: dict[str, str]
    sample: list[Mapping[str, Any]] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def model_config(self) -> Any:
        """The model's config."""
        return self.trainer.model.config

    @cached_property
    def fitting(self) -> list[Mapping[str, Any]]:
        """Rows of the sample within `max_length`."""
        most, collator = self.trainer.args.max_length, self.trainer.data_collator
        return [row for row in self.sample if most is None or collator.longest(row) <= most]

    @cached_property
    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of the batch.

        Raises:
            NotExaminedError: there is none.
        """
        if not self.fitting:
            raise NotExaminedError("no row of the sample can be run")
        return self.fitting[: self.trainer.args.per_device_train_batch_size]

    @cached_property
    def step(self) -> Step:
        """Forward and backward pass over the batch; the weights stay as they are."""
        trainer = self.trainer
        batch = trainer._prepare_inputs(trainer.data_collator(self.rows))
        trainer.model.train()
        start = time.perf_counter()
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad(set_to_none=True)
        return Step(loss.item(), gradients, time.perf_counter() - start, tokens_of(batch))

    def scores(self, rows: Sequence[Mapping[str, Any]], **settings: Any) -> torch.Tensor:
        """(2, B, A) scores of chosen and rejected answers in eval mode.

        Args:
            rows: pairs.
            **settings: fields of the collator that are changed.
        """
        trainer = self.trainer
        collator = replace(trainer.data_collator, drop_facts=0.0, **settings)
        batch = trainer._prepare_inputs(collator.answers(rows))
        trainer.model.eval()
        with torch.no_grad(), trainer.accelerator.autocast():
            return trainer.model(**batch).float().cpu().unflatten(0, (2, len(rows)))


def prepare(config: Any, *, rows: int, scratch: Path) -> RewardCase:
    """Set a run up as the recipe does, with a scratch folder in place of its output.

    Args:
        config: of `train_reward_model`.
        rows: how many rows are read.
        scratch: an empty folder.

    Raises:
        ValueError: whatever the recipe would refuse.
    """
    one_process()
    plain_lines_without_a_terminal()
    inputs = read_inputs(config, output=scratch, trainer=alone(config.trainer))
    start = load_start(config, inputs.arguments, inputs.files)
    trainer = build_trainer(config, inputs, start)
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    case = RewardCase(config, trainer, start.files)
    drawn = random.Random(config.seed).sample(range(len(inputs.pairs)), min(rows, len(inputs.pairs)))
    for number in drawn:
        row = inputs.pairs[number]
        try:
            trainer.data_collator.reader.read([row])
            case.sample.append(row)
        except (ValueError, OSError) as error:
            case.unreadable[str(row["id"])] = str(error)
    return case


def check_rows(case: RewardCase) -> list[Finding]:
    """Rows of the sample that can be read."""
    drawn = len(case.sample) + len(case.unreadable)
    seen = f"{len(case.trainer.train_dataset)} pairs, {len(case.sample)} of a sample of {drawn} read"
    advice = "; ".join(list(case.unreadable.values())[:2])
    return [judge("rows", seen, fail=advice)]


def check_max_length(case: RewardCase) -> list[Finding]:
    """Rows that `max_length` drops, facts and rating turn included."""
    most, rows = case.trainer.args.max_length, case.sample
    longest = max((case.trainer.data_collator.longest(row) for row in rows), default=0)
    if most is None:
        return [judge("max_length", f"none: nothing is dropped; sides take up to {longest} tokens")]
    lost = [str(row["id"]) for row in rows if row not in case.fitting]
    advice = f"trainer.max_length {longest} keeps all of the sample; dropped: {some(lost)}." if lost else ""
    seen = f"{most}: {len(case.fitting)} of {len(rows)} rows kept"
    return [judge("max_length", seen, fail=advice * (not case.fitting), warn=advice)]


def check_facts(case: RewardCase) -> list[Finding]:
    """Rows that have the facts which the rating turn is to show."""
    rating = case.config.prompt
    if not (case.config.facts and rating.shows_facts):
        raise NotExaminedError("no facts are shown")
    have = sum(bool(rating.facts_of({**row, "facts": as_mapping(row["facts"])})) for row in case.sample)
    advice = (
        "The rating turn shows facts and no row of the sample has any, so the model learns to score without. Take pairs with "
        "facts, or set facts to false."
    )
    return [judge("facts", f"in {have} of {len(case.sample)} rows", warn=advice if not have else "")]


def check_visual_tokens(case: RewardCase) -> list[Finding]:
    """Image tokens of the batch's prompts, which have to be there where a row shows pictures."""
    [token] = families.image_token_ids(case.model_config)
    counts, lost = [], []
    for row in case.sample:
        if not row["images"]:
            continue
        documents = case.trainer.data_collator.reader.read([row]).documents
        counts.append(min(int((document.prompt == token).sum()) for document in documents))
        lost += [str(row["id"])] if not counts[-1] else []
    if not counts:
        return [judge("visual tokens", "no row of the sample holds a picture", warn="Nothing visual is judged by it.")]
    fail = f"The pictures of {some(lost)} become no token: the processor is not the model's." if lost else ""
    return [judge("visual tokens", f"{min(counts)} to {max(counts)} a row with pictures", fail=fail)]


def check_loss(case: RewardCase) -> list[Finding]:
    """The loss of the batch is a number."""
    step = case.step
    seen = f"{step.loss:.4g} on {len(case.rows)} pairs, {step.tokens} tokens in {step.seconds:.1f} s{peak()}"
    finite = bool(torch.isfinite(torch.tensor(step.loss)))
    fail = "" if finite else "The first loss is no number. Load the weights in float32 or bfloat16 (model.dtype)."
    return [judge("one batch", seen, fail=fail)]


def check_picture(case: RewardCase) -> list[Finding]:
    """How far scores move when rows are shown another row's pictures, and blank ones."""
    rows = [row for row in case.rows if row["images"]]
    if not rows:
        raise NotExaminedError("the batch shows no pictures")
    own = case.scores(rows)
    spread = max(float(own.std()), 1e-6)
    blanked = [{**row, "images": [blank(decode(picture)) for picture in row["images"]]} for row in rows]
    moved = {"blank": (case.scores(blanked) - own).abs().mean().item()}
    swapped = {number: found for number, row in enumerate(rows) if (found := _others(case, row))}
    if swapped:
        kept = list(swapped)
        shown_others = [{**rows[number], "images": images} for number, images in swapped.items()]
        moved["another row's"] = (case.scores(shown_others) - own[:, kept]).abs().mean().item()
    seen = f"scores spread by {spread:.3g} and move by " + ", ".join(
        f"{v:.3g} with {k} picture" for k, v in moved.items()
    )
    fail = warn = ""
    if max(moved.values()) < 1e-6:
        fail = "The scores do not depend on the pictures at all: look at the pictures and at the checkpoint."
    elif min(moved.values()) < DULL * spread:
        warn = "Before training the pictures hardly count. Grade the model on shuffled pictures when it is trained."
    return [judge("picture counts", seen, fail=fail, warn=warn)]


def _others(case: RewardCase, row: Mapping[str, Any]) -> list[Any]:
    """As many pictures, but others, from a row of the sample; none if there is no such row."""
    for other in case.sample:
        if len(other["images"]) == len(row["images"]) and shown(other) != shown(row):
            return list(other["images"])
    return []


CHECKS = (
    ("rows", check_rows),
    ("max_length", check_max_length),
    ("facts", check_facts),
    ("visual tokens", check_visual_tokens),
    ("what trains", model.check_what_trains),
    ("lora targets", model.check_lora),
    ("one batch", check_loss),
    ("gradients", model.check_gradients),
    ("weights move", model.check_weights_move),
    ("picture counts", check_picture),
    ("device", world.check_device),
    ("disk", world.check_disk),
    ("output", world.check_output),
)
