"""Scenes rows as a stage's output folder, so that every stage reads them like anybody's data."""

from __future__ import annotations

from pathlib import Path

from prefalign.manifest import Manifest
from prefalign.records import Pair, Prompt
from prefalign.scenes import linked, twins
from prefalign.scenes.data import rows
from prefalign.store import OutputConfig, write_records


def export(
    output: Path,
    *,
    split: str | None = None,
    kind: str,
    regime: str | None = None,
    start: int,
    stop: int,
    seed: int = 0,
) -> Manifest:
    """Write prompts of one split and kind; with neither split nor regime, of the pictures that the base has seen.

    Args:
        output: folder to write; an equal finished export there is kept.
        split: name of a split, as in `world.SPLITS`; it follows from `regime` if left out.
        kind: kind of prompt, as in `data.rows`; `linked`, which writes conversations of linked questions (`linked.rows`); or
            `twin`, which writes counterfactual pairs (`twins.pairs`).
        regime: where reference answers come from: `seen`, `fair` or `none` (not for twins). Left out, rows of any split have one.
        start: first index within the split.
        stop: index after the last.
        seed: draws wording and question, never the picture (pictures are those of `world_seed` 0 in `data.rows`).

    Raises:
        ValueError: from `data.rows` and `twins.pairs`, for an unknown split, kind or regime or a range outside the split.
    """
    if split is None and regime is None:
        regime = "seen"
    settings = {"split": split, "kind": kind, "regime": regime, "start": start, "stop": stop}
    if kind == "twin":
        return write_records("scenes_export", twins.pairs(split, start, stop, seed=seed, regime=regime),
                             output=OutputConfig(path=output, block_size=256), record=Pair, settings=settings,
                             seed=seed)  # fmt: skip
    if kind == "linked":
        if split is None:
            raise ValueError("linked questions are about the pictures of a split; name one, such as train_biased.")
        prompts = (Prompt(**row) for row in linked.rows(split, start, stop, seed=seed))
        return write_records("scenes_export", prompts, output=OutputConfig(path=output, block_size=256), record=Prompt,
                             settings=settings, seed=seed)  # fmt: skip
    prompts = (Prompt(**row) for row in rows(kind, split, start, stop, seed=seed, regime=regime))
    return write_records("scenes_export", prompts, output=OutputConfig(path=output, block_size=256), record=Prompt,
                         settings=settings, seed=seed)  # fmt: skip
