"""Find and restore checkpoints so that a resumed run equals one that was never stopped, and count them beforehand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefalign.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from prefalign.losses import Weighted

TERMS_FILE = "terms.json"
"""State of loss terms that keep one, beside every saved model."""

REFERENCE_FOLDER = "reference_model"
"""The reference that `trainer.sync_ref_model` moves, in every checkpoint."""


def most_checkpoints(args: TrainingArguments, steps: int, epochs: float) -> int:
    """How many checkpoints a run's folder holds at the most; a new one is there before the oldest is deleted.

    Args:
        args: `save_strategy`, `save_steps`, `save_total_limit` and `metric_for_best_model` count; the best one is not deleted.
        steps: optimizer steps of the run; with `save_strategy: steps` the last one is saved whatever `save_steps` is.
        epochs: passes over the data, the last one perhaps in part; it is saved too with `save_strategy: epoch`.
    """
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    saves = {"no": 0, "epoch": math.ceil(epochs)}.get(strategy, math.ceil(steps / max(1, every)))
    kept = args.save_total_limit
    if kept == 1 and args.metric_for_best_model is not None:
        kept = 2  # the best one and the last one
    return min(saves, kept + 1) if kept else saves


def last_checkpoint(folder: Path, *, processes: int | None = None) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    A checkpoint is whole if its `trainer_state.json` (written last) can be read and each process left its random state, so
    one that a kill cut short is passed over for the one before.

    Args:
        folder: folder of the run.
        processes: world size that it has to be of; None: any.
    """
    numbered = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    counted = [(path, random_states(path)) for _, path in sorted(numbered) if _has_state(path)]
    whole = [path for path, count in counted if count and processes in (None, count)]
    return whole[-1] if whole else None


def random_states(checkpoint: Path) -> int:
    """How many processes left their random state in a checkpoint: the world size of the run that saved it; 0: not all did."""
    each = sum(1 for _ in checkpoint.glob("rng_state_*.pth"))
    return each if each > 1 else int((checkpoint / "rng_state.pth").is_file())


def _has_state(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def restore_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load a checkpoint's full weights into a model, under whatever names the family saves them.

    `save_pretrained` writes the Hub's names, which for most VLM families are not the names of the modules;
    `from_pretrained` renames them back, `load_state_dict` on the file does not (and with `strict=False` says nothing).

    Raises:
        ValueError: the checkpoint lacks weights of the model or has others.
    """
    loaded, report = type(model).from_pretrained(
        checkpoint, dtype=next(model.parameters()).dtype, output_loading_info=True
    )
    wrong = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind])
    if wrong:
        raise ValueError(
            f"{checkpoint.name} does not hold the weights of this {type(model).__name__}: {len(wrong)} tensors are missing, "
            f"unknown or of another shape ({', '.join(wrong[:3])}). Training would go on from other weights than were saved. "
            "Resume with the model that the run started from, or delete this checkpoint."
        )
    model.load_state_dict(loaded.state_dict(), strict=True)


def restore_terms(losses: Sequence[Weighted], checkpoint: Path) -> None:
    """Let losses that keep a state go on with that of a checkpoint.

    Args:
        losses: those whose term has a `load_state_dict`.
        checkpoint: folder of the checkpoint.

    Raises:
        ValueError: the checkpoint lacks the state of one.
    """
    file = checkpoint / TERMS_FILE
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for entry in losses:
        if entry.name not in kept:
            raise ValueError(
                f"{checkpoint} holds no state of the loss {entry.name} ({TERMS_FILE}), which would start at nothing in the "
                "middle of the run. Put the file back, or delete this checkpoint."
            )
        entry.term.load_state_dict(kept[entry.name])


def restore_reference(model: PreTrainedModel, checkpoint: Path, *, sharded: bool) -> None:
    """Load the reference that `trainer.sync_ref_model` had moved when a checkpoint was saved.

    Args:
        model: the reference, changed in place.
        checkpoint: folder of the checkpoint.
        sharded: the run is one of DeepSpeed or FSDP, whose checkpoints hold no such reference.

    Raises:
        ConfigError: the run is sharded.
        ValueError: the checkpoint lacks the reference, or it is another model's.
    """
    would = "so the run would go on against the one that it started with"
    if sharded:
        raise ConfigError(
            "trainer.sync_ref_model: under DeepSpeed and FSDP checkpoints do not hold the reference that moved, "
            f"{would}. Start anew in another `output`."
        )
    if not (checkpoint / REFERENCE_FOLDER).is_dir():
        raise ValueError(
            f"{checkpoint} holds no {REFERENCE_FOLDER}, the reference that trainer.sync_ref_model moved, {would}. Put it back, "
            "or delete this checkpoint."
        )
    restore_weights(model, checkpoint / REFERENCE_FOLDER)
