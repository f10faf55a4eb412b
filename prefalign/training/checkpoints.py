"""Find and restore checkpoints so that a resumed run equals one that was never stopped, and count them beforehand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


def most_checkpoints(args: TrainingArguments, steps: int, epochs: float) -> int:
    """How many checkpoints a run's folder holds at the most; a new one is there before the oldest is deleted.

    Args:
        args: `save_strategy`, `save_steps` and `save_total_limit` count.
        steps: optimizer steps of the run; with `save_strategy: steps` the last one is saved whatever `save_steps` is.
        epochs: passes over the data, the last one perhaps in part; it is saved too with `save_strategy: epoch`.
    """
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    saves = {"no": 0, "epoch": math.ceil(epochs)}.get(strategy, math.ceil(steps / max(1, every)))
    return min(saves, args.save_total_limit + 1) if args.save_total_limit else saves


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
