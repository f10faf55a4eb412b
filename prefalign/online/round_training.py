"""Last arrow of a round: DPO on its pairs from the policy of the round before, against a reference that may be older.

Legend of shapes: `B` rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from prefalign.config import to_mapping
from prefalign.losses import Scores, read_losses, views_of
from prefalign.manifest import differences
from prefalign.models import ModelConfig, fingerprint, freeze, load_processor
from prefalign.processors import processor_fingerprint
from prefalign.training.arguments import check_precision, training_arguments
from prefalign.training.checks import needs_reference, reading_rejected
from prefalign.training.distributed import claim_processes, running_processes
from prefalign.training.lora import LoraSettings, check_quantised, check_trainable
from prefalign.training.pairs import check_columns, check_rejected_side, check_texts, keep_fitting, load_pairs
from prefalign.training.policy import load_policy
from prefalign.training.preference import PreferenceTrainer
from prefalign.training.reference import (
    SETTINGS_FILE,
    ReferenceCache,
    StaleReference,
    cache_reference,
    cache_settings,
    row_key,
)
from prefalign.training.runs import base_file, claim_run, full_disk_explained, is_finished, open_run, run_files
from prefalign.training.upkeep import train_and_save


@dataclass
class TrainingSettings:
    """How a round trains; the same in every round.

    Attributes:
        losses: weighted terms, as in `train_preference`.
        trainer: fields of TRL's `DPOConfig` by name.
        lora: train an adapter; without it all weights that are not frozen.
        freeze: towers that stay as they are.
        fast_path: `auto` or `off`, as in `train_preference`.
        tokens_per_pass: most tokens of one forward pass.
    """

    losses: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "text"}])
    trainer: dict[str, Any] = field(default_factory=dict)
    lora: LoraSettings | None = None
    freeze: list[str] = field(default_factory=lambda: ["vision"])
    fast_path: Literal["auto", "off"] = "auto"
    tokens_per_pass: int | None = None


class SourcesTrainer(PreferenceTrainer):
    """`PreferenceTrainer` that also logs reward margin and accuracy by where a row comes from.

    In an epoch every row is met once, before its own update: so these are held-out numbers of the policy as it is then. A margin
    of exactly 0, as in the first step, counts as half right.

    Args:
        *args: passed on.
        sources: id of each row to its source, such as `online` and `offline`.
        **kwargs: passed on.
    """

    def __init__(self, *args: Any, sources: Mapping[str, str], **kwargs: Any):
        self.sources = dict(sources)
        super().__init__(*args, **kwargs)

    def _trl_loss(
        self, inputs: Mapping[str, Any], policy: Mapping[str, torch.Tensor], scores: Mapping[str, Scores]
    ) -> torch.Tensor:
        chosen, rejected = (scores[view] for view in (*self.views, self.views[0])[:2])
        if chosen.ref_logps is not None and len(self.views) > 1:
            margins = self.beta * (chosen.logratios() - rejected.logratios()).detach()  # (B,)
            metrics = self._metrics["train" if self.model.training else "eval"]
            for row, margin in zip(inputs["ids"], margins.tolist(), strict=True):
                source = self.sources.get(row, "unknown")
                metrics[f"rewards/margins_{source}"].append(margin)
                metrics[f"rewards/accuracies_{source}"].append(0.5 if margin == 0 else float(margin > 0))
        return super()._trl_loss(inputs, policy, scores)


def policy_config(start: ModelConfig, folder: Path | None, *, lora: bool) -> ModelConfig:
    """How the policy that a round left in a folder is loaded; None: the one that the run starts from."""
    if folder is None:
        return start
    if lora:
        return replace(start, adapter=str(folder))
    return replace(start, model_name_or_path=str(folder), model_revision=None, adapter=None)


def fill_reference(
    settings: TrainingSettings,
    model: ModelConfig,
    pairs: Path,
    folder: Path,
    *,
    continues: bool,
    seed: int,
    output: Path,
) -> str:
    """Compute the reference's log-probs of a round's pairs, where they are not kept from an earlier round; resumable.

    Args:
        settings: of the run.
        model: the reference.
        pairs: pairs of the round.
        folder: the cache.
        continues: the reference is a policy with its adapter, and not the one that the run starts from.
        seed: which rows are verified.
        output: folder for files of TRL's trainer, of which none is kept.

    Returns:
        Fingerprint of the reference.
    """
    trainer, reference = _trainer(settings, model, pairs, output, continues=continues, seed=seed, files={})
    if trainer.needs_reference:
        print(cache_reference(trainer, folder, reference=reference))
    return reference


def _trainer(
    settings: TrainingSettings,
    model: ModelConfig,
    pairs: Path,
    output: Path,
    *,
    continues: bool,
    seed: int,
    files: Mapping[str, str],
    sources: Mapping[str, str] | None = None,
) -> tuple[SourcesTrainer, str]:
    """A trainer on a model, and the fingerprint of the model as it was loaded."""
    from accelerate.utils import is_peft_model

    arguments: Any = training_arguments(settings.trainer, output=output, seed=seed)
    check_quantised(model, settings.lora, arguments)
    losses = read_losses(settings.losses, beta=arguments.beta)
    dataset = load_pairs(pairs)
    check_columns(dataset, views_of(losses), pairs)
    check_rejected_side(dataset, pairs, reading_rejected(losses, arguments.loss_type))
    if needs_reference(losses, arguments.loss_type):
        check_texts(dataset, views_of(losses), pairs)
    policy = load_policy(model, settings.lora, device=str(arguments.device), continues=continues)
    check_precision(policy.dtype, arguments)
    loaded = fingerprint(policy)
    if settings.lora is None:
        freeze(policy, settings.freeze)
    trainer = SourcesTrainer(
        policy,
        args=arguments,
        train_dataset=dataset,
        processing_class=load_processor(model),
        losses=losses,
        peft_config=settings.lora.to_peft() if settings.lora and not is_peft_model(policy) else None,
        files=files,
        fast_path=settings.fast_path,
        reference="cached",
        tokens_per_pass=settings.tokens_per_pass,
        sources=sources or {},
    )
    check_trainable(trainer.model, settings.freeze)
    return trainer, loaded


def use_reference(trainer: PreferenceTrainer, folder: Path, reference: str) -> None:
    """Let a trainer read log-probs that another model left in a cache: a reference that is not the policy at its start.

    Raises:
        StaleReference: the cache was made otherwise, or lacks rows of the run.
    """
    kept = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(cache_settings(trainer, reference)))
    changed = list(differences(kept, now))
    cache = ReferenceCache(folder, tuple(trainer.views))
    missing = sum(row_key(row) not in cache for row in trainer.train_dataset)
    if changed or missing:
        why = "; ".join([*changed, *([f"{missing} rows of the run are not in it"] if missing else [])])
        raise StaleReference(
            f"{folder} does not hold this round's reference ({why}): training would pull towards another model. Delete the "
            "folder and start again; it is computed anew."
        )
    trainer.data_collator.cache = cache


def train_round(
    settings: TrainingSettings,
    model: ModelConfig,
    pairs: Path,
    output: Path,
    *,
    reference: str,
    reference_folder: Path,
    continues: bool,
    seed: int,
    resume: Literal["auto"] | bool = "auto",
) -> None:
    """Train on a round's pairs and save the policy; started again it goes on from its last checkpoint.

    The optimizer and the schedule of the learning rate start anew in every round.

    Args:
        settings: of the run.
        model: the policy that the round starts from.
        pairs: pairs of the round, with `meta["source"]`.
        output: folder of the policy.
        reference: fingerprint of the reference, from `fill_reference`.
        reference_folder: its cache.
        continues: the policy brings the adapter that is trained on.
        seed: order of the rows, and in the first round the adapter's start.
        resume: as in `train_preference`.
    """
    from prefalign.online.mixing import sources_of

    run = {
        "model": to_mapping(model), "pairs": str(pairs), "output": str(output), **to_mapping(settings),
        "reference": "cached", "reference_folder": str(reference_folder), "seed": seed,
    }  # fmt: skip
    files = run_files(run, (pairs / "manifest.json").read_text(encoding="utf-8"))
    open_run(output, files, resume=resume)
    if is_finished(output):
        return
    trainer, loaded = _trainer(settings, model, pairs, output, continues=continues, seed=seed, files=files,
                               sources=sources_of(pairs))  # fmt: skip
    quantised = bool(getattr(trainer.model, "is_quantized", False))
    prepares = processor_fingerprint(trainer.data_collator.processor)
    trainer.files = files = files | base_file(
        model.model_name_or_path, loaded, prepares, changed=continues or quantised
    )
    checkpoint = open_run(output, files, resume=resume)
    running = running_processes(trainer.accelerator, settings.trainer)
    trainer.train_dataset, fit = keep_fitting(trainer.train_dataset, trainer.data_collator)
    with full_disk_explained(output):
        claim_run(output, files)
        claim_processes(output, running, main_process=True)
        if trainer.needs_reference:
            use_reference(trainer, reference_folder, reference)
    train_and_save(trainer, output, checkpoint=checkpoint, rows=asdict(fit), counts=fit.counts())
