"""Operations of a PPO iteration, counted without computing one: at 7B shapes too, on any machine."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from ppo_cases import PARTS, PPOBench, PPOCase, iterate

from prefalign.training.metering import count_flops


def picture_flops(case: PPOCase) -> int:
    """Operations of one picture in vision tower and projector."""
    bench = PPOBench(case, weightless=True)
    llava = case.batch.family == "llava"
    taken = bench.bench.processor(text=["<image>" if llava else "<|image_pad|>"],
                                  images=[Image.new("RGB", case.batch.size)], return_tensors="pt")  # fmt: skip
    given = {name: taken[name] for name in ("pixel_values", "image_grid_thw") if name in taken}
    model = bench.base().model
    with torch.no_grad():
        return count_flops(lambda: model.get_image_features(**given), compute=False)


@dataclass
class Counted:
    """Operations of an iteration.

    Attributes:
        parts: by part.
        tower: of them, those of vision tower and projector.
    """

    parts: Counter[str] = field(default_factory=Counter)
    tower: int = 0

    @property
    def total(self) -> int:
        """Of the whole iteration."""
        return self.parts.total()


def count(case: PPOCase) -> dict[str, Counted]:
    """Operations of an iteration on each side, without computing one.

    Whole iterations run on two models without weights, the second a decoder layer longer, with a tower of two layers: decoder
    layers are alike, and so are the pictures that pass the tower.

    Args:
        case: which.

    Returns:
        By side: `ours`, `reencoding`, `repeating`.
    """
    few = max(1, min(2, case.batch.layers - 1))
    full = picture_flops(case)
    found: dict[str, list[tuple[Counter[str], Counter[str]]]] = {
        name: [] for name in ("ours", "reencoding", "repeating")
    }
    for layers in (few, few + 1):
        short = replace(case, batch=replace(case.batch, layers=layers, tower_layers=2))
        bench = PPOBench(short, weightless=True)
        with tempfile.TemporaryDirectory() as scratch:
            shared = bench.side("shared", Path(scratch))
            sides = {"ours": shared, "reencoding": replace(shared, reencodes=True),
                     "repeating": bench.side("repeating", Path(scratch))}  # fmt: skip
            for name, side in sides.items():
                side.meter.counting, side.meter.compute = True, False
                side.trainer.roles.activation_checkpointing_enable()  # as `train` would
                iterate(side)
                found[name].append((side.meter.flops.copy(), side.meter.pictures.copy()))
    more = full - picture_flops(short)
    results = {}
    for name, ((one, pictures), (two, _)) in found.items():
        steps = case.batch.layers - few
        parts = Counter({part: one[part] + (two[part] - one[part]) * steps + pictures[part] * more for part in PARTS})
        results[name] = Counted(parts, pictures.total() * full)
    return results
