"""`PreferenceTrainer`: TRL's `DPOTrainer` with a picture for each side, resume that restores the weights, and a gradient audit.

TRL's losses, logging, checkpoints, PEFT and distributed handling are kept. The private names leaned on are listed in
`PRIVATE`, which a test checks.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, DPOTrainer

from prefalign.families import tower
from prefalign.losses import TERMS, Term
from prefalign.manifest import write_atomically
from prefalign.training.checkpoints import restore_weights
from prefalign.training.collator import PreferenceCollator
from prefalign.training.pairs import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, ProcessorMixin

    from prefalign.negatives import Negative

logger = logging.getLogger(__name__)

PRIVATE = (
    "_compute_loss",
    "_load_best_model",
    "_load_from_checkpoint",
    "_save",
    "_set_signature_columns_if_needed",
)


class PreferenceTrainer(DPOTrainer):
    """Train a vision-language model on pairs with one preference term.

    Args:
        model: policy; a full model or a `PeftModel`. May be built in memory.
        args: TRL's arguments.
        train_dataset: rows as `pairs.load_pairs` gives them.
        processing_class: the model's processor, saved with every checkpoint.
        term: preference term; decides the two views of each row.
        eval_dataset: held-out rows.
        ref_model: reference. By default the policy without its adapter, or a frozen copy of the policy as it is now (TRL
            loads the model's path again, at whatever revision is the default there).
        peft_config: wrap `model` in an adapter.
        files: text files by name, written beside every saved model.
        negative: how `rejected_images` are made for rows without them (see `PreferenceCollator`).
        negative_seed: seed of these pictures.

    Raises:
        ValueError: a `loss_type` does not fit the term.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        args: DPOConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin,
        term: Term = TERMS["text"],
        eval_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        files: Mapping[str, str] | None = None,
        negative: Negative | None = None,
        negative_seed: int = 0,
    ):
        term.check(args.loss_type)
        self.term = term
        self.files = dict(files or {})
        self.reference_free = not term.needs_reference(args.loss_type)
        self.saw_pictures = False
        adapts = peft_config is not None or is_peft_model(model)
        if ref_model is None and not adapts and not is_deepspeed_zero3_enabled():
            ref_model = copy.deepcopy(model).requires_grad_(False).eval()
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=PreferenceCollator(processing_class, term, args.max_length, negative, negative_seed),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
        )
        if self.reference_free:
            self.ref_model = None
            self.precompute_ref_logps = True
        self.add_callback(_LogBeforeSave(self))
        self.add_callback(_GradientAudit(self))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        self.saw_pictures = self.saw_pictures or "pixel_values" in inputs
        if not self.reference_free:
            return super()._compute_loss(model, inputs, return_outputs)
        nothing = torch.zeros(len(inputs["input_ids"]) // 2, device=inputs["input_ids"].device)
        inputs = {**inputs, "ref_chosen_logps": nothing, "ref_rejected_logps": nothing}
        loss = super()._compute_loss(model, inputs, return_outputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name in metrics if name.startswith("rewards/")]:
            del metrics[name]
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with `train_loss` over the whole run and not only over what followed a resume."""
        logged = [(entry["step"], entry["loss"]) for entry in self.state.log_history if "loss" in entry]
        if "train_loss" in logs and logged and logged[-1][0] == self.state.global_step:
            starts = [0, *(step for step, _ in logged[:-1])]
            total = sum(loss * (step - start) for (step, loss), start in zip(logged, starts, strict=True))
            logs["train_loss"] = total / self.state.global_step
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._restores_itself():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_weights(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._restores_itself():
            super()._load_best_model()
        else:
            restore_weights(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint))

    def _restores_itself(self) -> bool:
        """DeepSpeed and FSDP keep state files of their own, and adapters are saved under the names they are loaded by."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or is_peft_model(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            for name, text in self.files.items():
                write_atomically(Path(output_dir or self.args.output_dir) / name, text.encode())


class _LogBeforeSave(TrainerCallback):
    """Log at every checkpoint and carry the token count over, so that a resumed run logs what an uninterrupted one does."""

    def __init__(self, trainer: PreferenceTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        if counts:
            self.trainer._total_train_tokens = counts[-1]


class _GradientAudit(TrainerCallback):
    """After the first backward pass, name trainable tensors that got no gradient."""

    def __init__(self, trainer: PreferenceTrainer):
        self.trainer = trainer
        self.done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if self.done or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return
        self.done = True
        audit_gradients(trainer.model.named_parameters(), saw_pictures=trainer.saw_pictures)


def audit_gradients(parameters: Iterable[tuple[str, torch.nn.Parameter]], *, saw_pictures: bool = True) -> list[str]:
    """Names of trainable tensors without a gradient, logged as a warning.

    Args:
        parameters: names and parameters after a backward pass.
        saw_pictures: whether the pass held a picture; without one a vision tower rightly gets nothing.

    Raises:
        ValueError: nothing in a whole tower that is meant to train got a gradient.
    """
    trainable = [(name, parameter.grad is not None) for name, parameter in parameters if parameter.requires_grad]
    without = [name for name, has_gradient in trainable if not has_gradient]
    for part in sorted({tower(name) for name in without}):
        if any(has_gradient for name, has_gradient in trainable if tower(name) == part):
            continue
        if part == "language_model" or saw_pictures:
            names = [name for name in without if tower(name) == part]
            raise ValueError(
                f"none of the {len(names)} trainable tensors of the {part} tower got a gradient in the first step "
                f"({names[0]}, ...): they would never change. Freeze that tower, or turn off reentrant gradient "
                "checkpointing (trainer.gradient_checkpointing_kwargs: {use_reentrant: false})."
            )
    if without:
        logger.warning(
            "%d of %d trainable tensors got no gradient in the first step and will not change: %s%s",
            len(without), len(trainable), ", ".join(without[:4]), " ..." if len(without) > 4 else "",
        )  # fmt: skip
    return without
