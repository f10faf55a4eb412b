"""What two ways of computing one step have in common: batches of ours and of TRL's, and the outcome of a training step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from prefalign.images import open_image


def as_row(pair: Any) -> dict[str, Any]:
    """A row as Arrow gives it: image blocks with a null text."""
    row = pair.to_row()
    for name in ("prompt", "chosen", "rejected"):
        row[name] = [
            {"role": turn["role"], "content": [{"type": b["type"], "text": b.get("text")} for b in turn["content"]]}
            for turn in row[name]
        ]
    return row


def trl_batch(
    processor: Any, rows: Sequence[Mapping[str, Any]], side: str = "images", max_length: int | None = None
) -> dict[str, torch.Tensor]:
    """What TRL's own collator makes of the rows with the pictures of one side."""
    examples = [
        {**{name: row[name] for name in ("prompt", "chosen", "rejected")}, "images": [open_image(x) for x in row[side]]}
        for row in copy.deepcopy(list(rows))
    ]
    return dict(DataCollatorForVisionPreference(processor, max_length=max_length)(examples))


def assert_same_inputs(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Equal to the bit; ids of padding, which no model reads, are the end of turn in TRL's batch and padding in ours."""
    assert ours.keys() == theirs.keys()
    real = theirs["attention_mask"].bool()
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype, name
        assert ours[name].shape == wanted.shape, name
        same = torch.equal(ours[name][real], wanted[real]) if name == "input_ids" else torch.equal(ours[name], wanted)
        assert same, name
