"""What every trainer here adds to TRL's: resume that restores the weights, logs that a resume continues, a gradient audit.

`Upkeep` goes before a TRL trainer in the bases of a class: `class SupervisedTrainer(Upkeep, SFTTrainer)`. The private names
leaned on are listed in `PRIVATE`, which a test checks.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from transformers import Trainer, TrainerCallback

from prefalign.families import tower
from prefalign.manifest import write_atomically
from prefalign.training.checkpoints import restore_weights
from prefalign.training.plain_pass import unused_by_plain_pass
from prefalign.training.runs import claim_run, finish_run, full_disk_explained

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    import torch

logger = logging.getLogger(__name__)

PRIVATE = ("_load_best_model", "_load_from_checkpoint", "_save")


class Upkeep(Trainer):
    """Exact resume, `train_loss` of the whole run, files beside every saved model, and a gradient audit at the first step.

    Args:
        *args: passed on to TRL's trainer.
        files: text files by name, written beside every saved model.
        **kwargs: passed on to TRL's trainer.

    Raises:
        ValueError: in the first step, if nothing in a tower that is meant to train got a gradient.
        FloatingPointError: a logged training loss, or a weight that is to be saved, is not a finite number.
    """

    _total_train_tokens: int

    def __init__(self, *args: Any, files: Mapping[str, str] | None = None, **kwargs: Any):
        self.files = dict(files or {})
        self.saw_pictures = False
        super().__init__(*args, **kwargs)
        if getattr(self.model, "is_loaded_in_4bit", False):
            # TRL rounds such a model's adapter to bfloat16, in which a weight of 0.02 does not move by steps of 1e-5
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.add_callback(_LogBeforeSave(self))
        self.add_callback(_GradientAudit(self))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass of TRL's; notes whether it held a picture."""
        self.saw_pictures = self.saw_pictures or "pixel_values" in inputs
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with `train_loss` over the whole run and not only over what followed a resume.

        Raises:
            FloatingPointError: the training loss is not a finite number; there is a log before every checkpoint.
        """
        for name in ("loss", "train_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise FloatingPointError(
                    f"{name} is {logs[name]} at step {self.state.global_step}: the weights are broken or about to be, and every "
                    "later step would be too. Nothing more is saved. Lower trainer.learning_rate, or take trainer.bf16 in place "
                    "of fp16 or model.dtype float32, and start anew or from a checkpoint before this step."
                )
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
            restore_weights(self.accelerator.unwrap_model(self.model), Path(str(self.state.best_model_checkpoint)))

    def _restores_itself(self) -> bool:
        """DeepSpeed and FSDP keep state files of their own, and adapters are saved under the names they are loaded by."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or is_peft_model(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        check_finite(trained if state_dict is None else state_dict)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            for name, text in self.files.items():
                write_atomically(Path(output_dir or str(self.args.output_dir)) / name, text.encode())


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Check weights that are to be saved; a last step can break them after a finite loss.

    Raises:
        FloatingPointError: some are not finite.
    """
    broken = [
        name for name, weight in weights.items() if weight.is_floating_point() and not bool(weight.isfinite().all())
    ]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} of {len(weights)} tensors to save hold numbers that are not finite ({', '.join(broken[:3])}): this "
            "model answers nothing, so it is not saved. Lower trainer.learning_rate, or take trainer.bf16 in place of fp16 or "
            "model.dtype float32, and start anew or from an earlier checkpoint."
        )


class _LogBeforeSave(TrainerCallback):
    """Log at every checkpoint and carry the token count over, so that a resumed run logs what an uninterrupted one does."""

    def __init__(self, trainer: Upkeep):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        if counts:
            self.trainer._total_train_tokens = counts[-1]


class _GradientAudit(TrainerCallback):
    """After the first backward pass, and after the first one with a picture, name trainable tensors that got no gradient."""

    def __init__(self, trainer: Upkeep):
        self.trainer = trainer
        self.looked = self.done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if self.done or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return
        if trainer.saw_pictures or not self.looked:
            audit_gradients(
                trainer.model.named_parameters(),
                saw_pictures=trainer.saw_pictures,
                unused=lambda names: unused_by_plain_pass(trainer.model, trainer.processing_class, names),
            )
        self.looked, self.done = True, trainer.saw_pictures


def audit_gradients(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    saw_pictures: bool = True,
    unused: Callable[[Collection[str]], Collection[str]] | None = None,
) -> list[str]:
    """Names of trainable tensors without a gradient, logged as a warning.

    Args:
        parameters: names and parameters after a backward pass.
        saw_pictures: whether the pass held a picture; without one tower and projector rightly get nothing, and are left out.
        unused: of names without a gradient, which get none from the model's own forward pass either and are no surprise
            (`plain_pass.unused_by_plain_pass`); None: all are named.

    Raises:
        ValueError: nothing in a whole tower that is meant to train got a gradient.
    """
    trainable = [
        (name, parameter.grad is not None)
        for name, parameter in parameters
        if parameter.requires_grad and (saw_pictures or tower(name) == "language_model")
    ]
    without = [name for name, has_gradient in trainable if not has_gradient]
    for part in sorted({tower(name) for name in without}):
        if any(has_gradient for name, has_gradient in trainable if tower(name) == part):
            continue
        names = [name for name in without if tower(name) == part]
        raise ValueError(
            f"none of the {len(names)} trainable tensors of the {part} tower got a gradient in the first step "
            f"({names[0]}, ...): they would never change. Freeze that tower, or turn off reentrant gradient "
            "checkpointing (trainer.gradient_checkpointing_kwargs: {use_reentrant: false})."
        )
    if without and unused is not None:
        expected = unused(without)
        without = [name for name in without if name not in expected]
    if without:
        logger.warning(
            "%d of %d trainable tensors got no gradient in the first step and will not change: %s%s",
            len(without), len(trainable), ", ".join(without[:4]), " ..." if len(without) > 4 else "",
        )  # fmt: skip
    return without


def train_and_save(
    trainer: Upkeep,
    folder: Path,
    *,
    checkpoint: Path | None,
    rows: Mapping[str, Any],
    counts: Mapping[str, int],
    eval_counts: Mapping[str, int] | None = None,
) -> None:
    """Claim the folder of a run, train from a checkpoint or from the start, evaluate, save model, metrics and state.

    Args:
        trainer: the trainer; its `files` say whose folder it is.
        folder: folder of the run, found free by `runs.open_run`.
        checkpoint: where to go on, from `runs.open_run`.
        rows: which rows were used and which were not, written as `rows.json`.
        counts: numbers of training rows, written among the metrics.
        eval_counts: numbers of held-out rows; None: there are none.

    Raises:
        RunError: the disk that holds the run is full.
    """
    main_process = trainer.is_world_process_zero()
    with full_disk_explained(folder):
        if main_process:
            claim_run(folder, trainer.files)
        metrics = dict(trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics)
        metrics |= counts
        if eval_counts is not None:
            evaluated = trainer.evaluate() | eval_counts
            trainer.save_metrics("eval", evaluated, combined=False)
            metrics |= evaluated
        trainer.save_metrics("train", metrics, combined=False)
        trainer.save_model()
        trainer.save_state()
        if main_process:
            (folder / "rows.json").write_text(json.dumps(dict(rows), indent=2), encoding="utf-8")
            finish_run(folder, metrics)


def plain_lines_without_a_terminal() -> None:
    """No progress bars where nobody watches, and no warning at each step for names that TRL 1.16 still uses."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    if not sys.stderr.isatty():
        import datasets
        from transformers.utils import logging as transformers_logging

        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
