"""Scenes rows as a stage's output folder, so that every stage reads them like anybody's data."""

from __future__ import annotations

from pathlib import Path

from prefalign.records import Prompt
from prefalign.scenes.data import rows
from prefalign.store import Manifest, OutputConfig, write_records


def export(output: Path, *, split: str, kind: str, regime: str, start: int, stop: int, seed: int = 0) -> Manifest:
    """Write prompts of one split and kind.

    Args:
        output: folder to write; an equal finished export there is kept.
        split: name of a split, as in `world.SPLITS`.
        kind: kind of prompt, as in `data.rows`.
        regime: where reference answers come from: `seen`, `fair` or `none`.
        start: first index within the split.
        stop: index after the last.
        seed: seed of the world.

    Raises:
        ValueError: from `data.rows`, for an unknown split, kind or regime or a range outside the split.
    """
    settings = {"split": split, "kind": kind, "regime": regime, "start": start, "stop": stop}
    prompts = (Prompt(**row) for row in rows(kind, split, start, stop, seed=seed, regime=regime))
    return write_records("scenes_export", prompts, output=OutputConfig(path=output, block_size=256), record=Prompt,
                         settings=settings, seed=seed)  # fmt: skip
